"""The formats of exported files: how a graph is written in one, and how the file is run to see what it gives."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .contract import KEY, OPSET
from .graph import Plan

MOST_IMAGES = 4096  # in a batch of a torch program; an ONNX file takes any number
FOLDED = 512  # numbers of a constant that may be made of others in an ONNX file: what is made of larger ones is larger
LARGEST_FILE = 2**30  # bytes of weights in an ONNX file, which has no room for 2 GiB; more are written beside it
SMALLEST_HALF = 1024  # numbers of a tensor that is worth storing in float16, and that no exporter folds
Run = Callable[[Sequence[Tensor]], list[Tensor]]


def require_packages(kind: str, check: bool) -> None:
    """Raise an ImportError where a package is missing that writes ONNX files, or with `check` runs them."""
    needed = ("onnx", "onnxscript", *(("onnxruntime",) if check else ())) if kind == "onnx" else ()
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        remedy = "pip install 'hgad-fast[export]'"
        if missing == ["onnxruntime"]:
            remedy += ", or write the file unchecked: check=False (--no-check)"
        raise ImportError(f"an ONNX file needs {' and '.join(missing)}: {remedy}")


def traced(graph: nn.Module, plan: Plan, example: Sequence[Tensor]) -> Any:
    """Return the `torch.export.ExportedProgram` of a graph, for batches of any size.

    Raises:
        ValueError: the graph holds something that cannot be exported, such as an encoder that looks at values.
    """
    remedy = (
        "" if plan.size is None else "; inputs='features' (--inputs features) exports all that follows the backbone"
    )
    batch = any_batch()
    return traced_for(graph, example, (tuple({0: batch} for _ in example),), remedy)


def any_batch() -> Any:
    """Return the `torch.export.Dim` of a batch of any number of images."""
    return torch.export.Dim("batch", min=1, max=MOST_IMAGES)


@torch.no_grad()
def traced_for(graph: nn.Module, example: Sequence[Tensor], dynamic_shapes: Any, remedy: str = "") -> Any:
    """Return the `torch.export.ExportedProgram` of a graph.

    Args:
        graph: takes tensors alone.
        example: the tensors.
        dynamic_shapes: the axes whose sizes are not fixed, as `torch.export.export` has them.
        remedy: the end of the error where the graph cannot be exported.

    Raises:
        ValueError: the graph holds something that cannot be exported.
    """
    try:
        program = torch.export.export(graph, tuple(example), dynamic_shapes=dynamic_shapes)
    except (MemoryError, OSError):
        raise
    except Exception as error:  # torch raises many kinds
        raise ValueError(f"the model cannot be exported: {_first_line(error)}{remedy}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # of the machine that writes the file
    return program


class Names(Protocol):
    """The names of what goes into a graph and comes out, in their order."""

    @property
    def inputs(self) -> tuple[str, ...]: ...
    @property
    def outputs(self) -> tuple[str, ...]: ...


class Program:
    """A traced graph that is written in a format.

    Args:
        kind: ``"onnx"`` or ``"torch"``.
        program: of `traced`.
        plan: names of inputs and outputs.
    """

    def __init__(self, kind: str, program: Any, plan: Names) -> None:
        self.kind, self._program = kind, program
        self._onnx: Any = None
        if kind == "onnx":
            from onnxscript import optimizer

            with _quiet():
                self._onnx = torch.onnx.export(
                    program,
                    dynamo=True,
                    opset_version=OPSET,
                    input_names=list(plan.inputs),
                    output_names=list(plan.outputs),
                    verbose=False,
                    optimize=False,
                )
                optimizer.optimize(self._onnx.model, input_size_limit=FOLDED, output_size_limit=FOLDED)
            for node in self._onnx.model.graph.all_nodes():
                node.metadata_props.clear()  # where in the source each comes from, on the machine that wrote the file

    def keep(self, outputs: int) -> None:
        """Leave out all but the first outputs of an ONNX program: the others were there to be compared."""
        del self._onnx.model.graph.outputs[outputs:]

    def save(self, path: Path, sidecar: str) -> None:
        """Write the program to `path`, with the text of its sidecar in it.

        Large weights of ONNX are written beside it, into a file whose name has a hash of that text: so no file reads
        the weights of another one that had its name.
        """
        if self.kind == "torch":
            content = io.BytesIO()  # a full disk under torch's own writer would end the process
            with _quiet():
                torch.export.save(self._program, content, extra_files={f"{KEY}.json": sidecar})
            path.write_bytes(content.getbuffer())
            return
        import onnx_ir

        self._onnx.model.metadata_props[KEY] = sidecar
        weights = sum(value.const_value.nbytes for value in self._onnx.model.graph.initializers.values())
        beside = f"{path.name}.{hashlib.sha256(sidecar.encode()).hexdigest()[:8]}.data"
        onnx_ir.save(self._onnx.model, path, external_data=beside if weights > LARGEST_FILE else None)


def runner(kind: str, path: Path) -> Run:
    """Return a function that runs a file: inputs in their order -> outputs in theirs, on the CPU."""
    return _onnx_runner(path) if kind == "onnx" else _torch_runner(path)


def _onnx_runner(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        arrays = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, arrays)]

    return run


def _torch_runner(path: Path) -> Run:
    with _quiet():
        module = torch.export.load(str(path)).module()

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return list(module(*inputs))

    return run


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep exporters from warning of what they do inside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


# ------------------------------------------------------------------------------------------------ half precision


class _Half(nn.Module):
    """float16 in memory, float32 for all who ask."""

    def forward(self, stored: Tensor) -> Tensor:
        """Return the weights in float32."""
        return stored.float()


def halved(graph: nn.Module) -> None:
    """Store the float32 weights of a graph in float16, in place, but for small tensors and those beyond its range."""
    for module in list(graph.modules()):
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            large = tensor.dtype == torch.float32 and tensor.numel() >= SMALLEST_HALF
            if large and float(tensor.abs().max()) <= torch.finfo(torch.float16).max:
                delattr(module, name)
                module.register_buffer(name, tensor.detach().half())
                parametrize.register_parametrization(module, name, _Half(), unsafe=True)
