"""The pretended GPU of tests/support/pretended.py refuses what a real one refuses, and computes what a CPU does."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pretended import pretended_gpu
from torch import nn

from hgad_fast import ops
from hgad_fast.modules.flow import sinusoidal_position

WAITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "a copy to the host": lambda x: x.cpu(),
    "a copy between the devices": lambda x: x.copy_(torch.ones(3)),
    "nonzero": lambda x: x.nonzero(),
    "an index by a mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "synchronize": lambda x: torch.cuda.synchronize(),
}
pytestmark = pytest.mark.usefixtures("clean_process")


def test_tensors_are_made_moved_and_computed_with_where_they_lie() -> None:
    with pretended_gpu():
        x = torch.arange(6.0).view(2, 3)
        there = x.to("cuda")
        made = torch.ones(3, device="cuda"), torch.tensor([1.0], device="cuda"), there.new_zeros(2), there[0, 1:]
        assert all(t.is_cuda and t.device == torch.device("cuda", 0) for t in (there, *made))
        there.add_(1)
        assert torch.equal(x, torch.arange(6.0).view(2, 3)) and torch.equal(there.cpu(), x + 1)
        there[0].zero_()  # a view: of the same memory
        assert there.sum().item() == 15 and there.tolist()[0] == [0, 0, 0]
        assert there.to("cuda") is there and there.to(torch.float64).is_cuda and not there.cpu().is_cuda
        assert torch.equal(torch.nn.functional.one_hot(made[1].long(), 3).cpu(), torch.tensor([[0, 1, 0]]))


def test_two_devices_in_one_operation_are_refused() -> None:
    with pretended_gpu():
        x, there = torch.ones(3), torch.ones(3, device="cuda")
        for wrong in (
            lambda: x + there,
            lambda: torch.cat([x, there]),
            lambda: nn.Linear(3, 2)(there),
            lambda: nn.Linear(3, 2).to("cuda")(x),
            lambda: x[there.long()],
            lambda: torch.mm(there[None], there[:, None], out=torch.empty(1, 1)),
        ):
            with pytest.raises(RuntimeError, match="on the same device, but found .*(cuda:0 .*cpu|cpu .*cuda:0)"):
                wrong()
        with pytest.raises(TypeError, match="to numpy"):
            there.numpy()
        assert (there * torch.tensor(2.0)).tolist() == [2, 2, 2] and there[torch.tensor([0])].is_cuda
        assert x.copy_(there) is x and there.copy_(x) is there


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Sequential(nn.Conv2d(4, 3, 3, bias=False), nn.BatchNorm2d(3))])
def test_gradients_and_steps_are_those_of_a_cpu(layer: nn.Module) -> None:
    x, results = torch.randn(5, 4) if isinstance(layer, nn.Linear) else torch.randn(5, 4, 6, 6), []
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for device in ("cpu", "cuda"):
        layer.load_state_dict(state)
        with pretended_gpu():
            model = nn.Sequential(layer).to(device)
            optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
            for _ in range(2):
                optimizer.zero_grad()
                model(x.to(device)).square().sum().backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            assert {p.grad.device.type for p in model.parameters() if p.grad is not None} == {device}
            results.append({name: tensor.cpu().clone() for name, tensor in model.state_dict().items()})
            model.to("cpu")
    for name, right in results[0].items():
        torch.testing.assert_close(results[1][name], right)


@pytest.mark.parametrize("what", WAITS)
def test_waits_of_the_host_are_counted(what: str) -> None:
    with pretended_gpu() as waits:
        there = torch.ones(3, device="cuda")
        (there * 2).to("cuda").sum()
        there.copy_(torch.zeros(3), non_blocking=True)
        assert not waits
        WAITS[what](there)
        assert set(waits) == {what}


def test_a_graph_does_nothing_before_it_is_replayed_and_the_same_again() -> None:
    with pretended_gpu():
        x, total = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            doubled = (2 * x).view(3, 1).flatten().to(torch.float64)
            total += doubled
        assert total.tolist() == [0, 0, 0] and doubled.isnan().all()
        graph.replay()
        x.fill_(10)
        graph.replay()
        assert total.tolist() == [22, 22, 22] and doubled.tolist() == [20, 20, 20]


@pytest.mark.parametrize("what", [*WAITS, "a copy to the device"])
def test_what_cannot_be_recorded_is_refused(what: str) -> None:
    with pretended_gpu():
        there = torch.ones(3, device="cuda")
        work = WAITS.get(what, lambda there: torch.tensor([1.0], device="cuda"))
        with pytest.raises(RuntimeError, match=f"when stream is capturing: {what}"):
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                work(there)
        work(there)


def test_nothing_of_it_is_kept() -> None:
    """What the library keeps by device is made anew: a GPU that is there has no use for it."""
    with pretended_gpu():
        assert sinusoidal_position(2, 2, 4, torch.device("cuda", 0)).column.is_cuda
    assert sinusoidal_position.cache_info().currsize == 0


def test_kernels_run_on_what_the_device_holds(interpreted: SimpleNamespace, launches: dict[str, int]) -> None:
    x2, a = torch.randn(5, 2), torch.randn(5, 4)
    right = ops.affine_coupling.reference(x2, a)
    with pretended_gpu(interpreted):
        y2, log_det = ops.affine_coupling(x2.to("cuda"), a.to("cuda"))
        assert y2.is_cuda and log_det.is_cuda and sum(launches.values()) == 1
        torch.testing.assert_close((y2.cpu(), log_det.cpu()), tuple(right))
        with pytest.raises(ValueError, match="is on|tensors on"):
            interpreted.coupling.affine_coupling(x2.to("cuda"), a)
