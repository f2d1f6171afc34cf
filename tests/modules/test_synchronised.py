"""Statistics over several processes: batch normalization is torch's in one, and that of the joined batch in several."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import SAME_IN_FLOAT64
from torch import nn

from hgad_fast.modules import synchronised
from hgad_fast.modules.synchronised import BatchNorm, exchanging, process_count, process_rank, summed

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5, 2)])
def test_in_one_process_it_is_torchs(shape: tuple[int, ...]) -> None:
    torchs = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(3)
    own = BatchNorm(3)
    own.load_state_dict(torchs.state_dict())
    for training in (True, True, False):
        x = torch.randn(shape) * 3 + 1
        outcomes = []
        for module in (own.train(training), torchs.train(training)):
            inputs = x.clone().requires_grad_()
            with exchanging():
                y = module(inputs)
            y.square().sum().backward()
            outcomes.append((y, inputs.grad, module.weight.grad, *module.state_dict().values()))
        assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_other_shapes_and_a_batch_of_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"batch normalization takes \(B, C\) or \(B, C, h, w\), and not \(2, 3, 4\)"):
        BatchNorm(3)(torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match="more than 1 value"):
        BatchNorm(3)(torch.randn(1, 3))


def test_processes_exchange_where_they_are_asked_to_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synchronised.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(synchronised.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(synchronised.dist, "get_rank", lambda: 2)
    monkeypatch.setattr(synchronised.dist, "all_reduce", lambda x: x.mul_(10))
    x = torch.ones(2)
    assert (process_count(), process_rank()) == (1, 0) and summed(x) is x
    with exchanging():
        assert (process_count(), process_rank()) == (3, 2)
        assert summed(x).tolist() == [10, 10] and x.tolist() == [1, 1]
        with exchanging():
            assert process_count() == 3
        assert process_count() == 3
    with pytest.raises(KeyError), exchanging():
        raise KeyError
    assert process_count() == 1
    alone = BatchNorm(2).train()(torch.randn(3, 2))  # outside, statistics are the process's own
    assert alone.mean(0).abs().max() < 1e-6


SCRIPT = """
    import os, sys
    import torch
    from hgad_fast.modules.codebook import Codebook
    from hgad_fast.modules.synchronised import BatchNorm, exchanging, summed

    torch.set_num_threads(1)
    torch.manual_seed(0)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        torch.distributed.init_process_group("gloo")
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    result = {}
    for name, shape in (("vectors", (5, 3)), ("maps", (3, 3, 4, 2))):
        x, weights, state = 2 * random(*shape) + 1, random(*shape), random(2, 3)
        norm = BatchNorm(3).double()
        with torch.no_grad():
            norm.weight.copy_(state[0])
            norm.bias.copy_(state[1])
        own = x[rank::world].clone().requires_grad_()
        for _ in range(2):
            with exchanging():
                y = norm(own)
        (y.square() * weights[rank::world]).sum().backward()
        result[name] = {"y": y.detach(), "gradient": own.grad}
        result[name + ", all"] = {"weight": norm.weight.grad, "bias": norm.bias.grad}
        result[name + ", state"] = {n: b for n, b in norm.named_buffers()}
    book, x = Codebook(3, 12).double().train(), random(5, 4, 3)
    book.embed.copy_(random(3, 12))
    book.cluster_size.copy_(torch.arange(12.0).clamp(max=1))
    own = x[rank::world].clone().requires_grad_()
    with exchanging():
        quantised = book(own)
    quantised.commitment.backward()
    result["codebook"] = {"indices": quantised.indices, "gradient": own.grad}
    result["codebook, all"] = {"commitment": quantised.commitment.detach()}
    result["codebook, state"] = book.state_dict()
    torch.save(result, sys.argv[1])
    if world > 1:
        torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what one process comes to, and each of two that share its batch: images 0, 2, ... and 1, 3, ..."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pair = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    running = [
        subprocess.Popen([*command, folder / name], env=environment | variables, stderr=subprocess.PIPE, text=True)
        for name, variables in (("one", {}), ("first", pair | {"RANK": "0"}), ("second", pair | {"RANK": "1"}))
    ]
    try:
        errors = [process.communicate(timeout=600)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0, 0], errors
    return [torch.load(folder / name) for name in ("one", "first", "second")]


@pytest.mark.parametrize("name", ["vectors", "maps", "codebook"])
def test_over_two_processes_it_is_that_of_the_joined_batch(results: list[dict[str, Any]], name: str) -> None:
    """Outputs and gradients of each image; gradients of parameters add up; buffers are alike in all processes."""
    one, *pair = results
    for key, expected in one[name].items():
        joined = torch.empty_like(expected)
        joined[0::2], joined[1::2] = (result[name][key] for result in pair)
        torch.testing.assert_close(joined, expected, rtol=SAME_IN_FLOAT64, atol=SAME_IN_FLOAT64, msg=key)
    for key, expected in one[f"{name}, all"].items():
        total = pair[0][f"{name}, all"][key] + pair[1][f"{name}, all"][key]
        torch.testing.assert_close(total, expected, rtol=SAME_IN_FLOAT64, atol=SAME_IN_FLOAT64, msg=key)
    for key, expected in one[f"{name}, state"].items():
        first, second = (result[f"{name}, state"][key] for result in pair)
        assert torch.equal(first, second), key
        torch.testing.assert_close(first, expected, rtol=SAME_IN_FLOAT64, atol=SAME_IN_FLOAT64, msg=key)
    if name == "codebook":  # the first code was dead
        assert float(one["codebook, state"]["cluster_size"][0]) == 1
