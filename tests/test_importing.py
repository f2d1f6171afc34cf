"""Imports that leave out what is never used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORT = """
import sys
from hgad_fast.importing import dynamo_deferred
with dynamo_deferred():
    import timm
assert not [name for name in sys.modules if name.startswith("torch._dynamo")]
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_timm_and_torchvision_took_of_dynamo_works_when_it_is_called() -> None:
    run(
        IMPORT
        + """
import torch, torchvision
boxes = torch.tensor([[0, 0, 0, 4.0, 4.0]])
eager = torchvision.ops.roi_align(torch.ones(1, 3, 8, 8), boxes, 2)
roi_align = sys.modules["torchvision.ops.roi_align"]
supported = roi_align.is_compile_supported("cpu")
import torch._dynamo.utils
assert torch._dynamo.__file__ and supported == torch._dynamo.utils.is_compile_supported("cpu")
assert torch.equal(torch.compile(torchvision.ops.roi_align, backend="eager")(torch.ones(1, 3, 8, 8), boxes, 2), eager)
"""
    )


def test_functions_that_the_compiler_is_to_leave_alone_run_and_are_left_alone() -> None:
    run(
        """
import sys, torch
from hgad_fast.importing import dynamo_deferred
with dynamo_deferred():
    @torch.compiler.disable
    def left(x):
        return x + 1
    @torch.compiler.disable(reason="why")
    def left_too(x):
        return x * 2
assert not [name for name in sys.modules if name.startswith("torch._dynamo")]
graphs = []
def backend(graph, inputs):
    graphs.append(graph)
    return graph.forward
compiled = torch.compile(lambda x: left_too(left(x.sin())).cos(), backend=backend)
x = torch.ones(3)
assert torch.equal(compiled(x), (2 * (x.sin() + 1)).cos())
nodes = [node.target for graph in graphs for node in graph.graph.nodes if node.op.startswith("call")]
assert len(nodes) == 2 and len(graphs) == 2, nodes
"""
    )


def test_a_disabled_function_may_be_called_at_once() -> None:
    run(
        """
import sys, torch
from hgad_fast.importing import dynamo_deferred
with dynamo_deferred():
    @torch.compiler.disable
    def left(x):
        return x + 1
    assert left(1) == 2
assert sys.modules["torch._dynamo"].__file__
"""
    )


def test_anything_else_brings_the_real_module_at_once() -> None:
    for statement in (
        "import torch._dynamo.config as config; assert config.__file__",
        "from torch._dynamo import allow_in_graph; assert callable(allow_in_graph)",
        "from torch._dynamo.utils import counters; assert counters is not None",
        "import torch; assert callable(torch._dynamo.reset)",
    ):
        run(
            f"""
import sys
from hgad_fast.importing import dynamo_deferred
with dynamo_deferred():
    {statement}
    assert sys.modules["torch._dynamo"].__file__
import torch._dynamo.utils
assert torch._dynamo.utils.__file__
"""
        )


def test_an_error_leaves_no_stand_in() -> None:
    run(
        """
import sys
from hgad_fast.importing import dynamo_deferred
try:
    with dynamo_deferred():
        raise KeyError
except KeyError:
    pass
assert "torch._dynamo" not in sys.modules and "torch._dynamo.utils" not in sys.modules
import torch._dynamo
assert torch._dynamo.__file__
"""
    )
