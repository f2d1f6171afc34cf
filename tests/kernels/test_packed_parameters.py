"""The parameters that the block kernel keeps in its own layout: made once, and never of values that have changed."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hgad_fast.modules.flow import ConditionalFlow

pytestmark = pytest.mark.usefixtures("nan_memory", "packings")

SIZE = 3, 5  # of the map
x = torch.linspace(-2, 2, 15 * 8).view(15, 8)


@pytest.fixture
def packings(interpreted: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what was packed, in order; the kernel keeps nothing of before."""
    made: list[str] = []
    for name in ("_pack", "position_table"):
        original = getattr(interpreted.blocks, name)

        def noted(*args, name: str = name, original: Callable = original):
            made.append(name)
            return original(*args)

        monkeypatch.setattr(interpreted.blocks, name, noted)
    cache = interpreted.cache.Cache(32)
    monkeypatch.setattr(interpreted.blocks, "PACKED", cache)
    monkeypatch.setattr(interpreted.cache, "PACKED", cache)  # which steps of optimizers empty
    return made


def make_flow(seed: int = 0) -> ConditionalFlow:
    torch.manual_seed(seed)
    flow = ConditionalFlow(8, 2, 4)
    flow.precision = "bf16"
    return flow


def score(flow: ConditionalFlow, h: int = SIZE[0], w: int = SIZE[1]) -> Tensor:
    with torch.no_grad():
        return torch.cat([t.flatten() for t in flow(x, flow.grid(h, w))])


def check_follows(flow: ConditionalFlow, change: Callable[[], object]) -> None:
    """Check that a flow scores with its values of now, also after a change: as a copy that nobody has seen does."""
    before = score(flow)
    assert torch.equal(score(flow), before)
    change()
    after = score(flow)
    assert torch.equal(after, score(copy.deepcopy(flow))) and not torch.equal(after, before)


def test_parameters_are_packed_once(packings):
    flow = make_flow()
    assert torch.equal(score(flow), score(flow))
    assert packings == ["_pack", "position_table"]


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_a_step_of_the_optimizer_is_seen(optimizer, options):
    flow = make_flow()
    stepping = optimizer(flow.parameters(), lr=0.1, **options)
    for parameter in flow.parameters():
        parameter.grad = torch.ones_like(parameter)
    for _ in range(3):
        check_follows(flow, stepping.step)


@pytest.mark.parametrize("name", ["w1", "b1", "w2", "b2", "global_scale", "global_offset", "w_perm"])
def test_an_edit_in_place_is_seen(name):
    flow = make_flow()

    def edit() -> None:
        with torch.no_grad():
            getattr(flow, name)[1].neg_().add_(0.1)  # a view of the parameter

    check_follows(flow, edit)


def test_another_state_is_seen():
    flow, other = make_flow(), make_flow(1)
    check_follows(flow, lambda: flow.load_state_dict(other.state_dict()))
    check_follows(flow, lambda: flow.load_state_dict(make_flow(2).state_dict(), assign=True))


def test_other_memory_is_seen_even_at_an_address_of_before():
    """As in a loop over mixtures of two models: memory that was let go is given to the next mixture."""
    flow = make_flow()
    memory = flow.w2.detach().numpy().copy()

    def replace() -> None:
        memory[:] *= 1.1
        flow.w2.data = torch.from_numpy(memory)  # torch does not count it, and the address is one of before

    for _ in range(3):
        check_follows(flow, replace)


def test_maps_of_other_sizes_share_the_parameters(packings):
    flow = make_flow()
    results = [score(flow, *size) for size in ((3, 5), (5, 3), (1, 15), (3, 5))]
    assert packings == ["_pack"] + 3 * ["position_table"]
    assert torch.equal(results[0], results[3]) and not torch.equal(results[0], results[1])
    packings.clear()
    flow.precision = "tf32"  # no kernel of whole blocks
    score(flow)
    assert packings == []


def test_what_is_kept_is_bounded_and_the_oldest_goes_first(interpreted, monkeypatch, packings):
    cache = interpreted.cache.Cache(4)
    monkeypatch.setattr(interpreted.blocks, "PACKED", cache)
    flows = [make_flow(seed) for seed in range(3)]
    for flow in flows:
        score(flow)
        assert len(cache._kept) <= 4
    packings.clear()
    score(flows[2])
    score(flows[1])
    assert packings == []
    score(flows[0])
    assert packings == ["_pack", "position_table"]


def test_nothing_is_kept_of_tensors_that_do_not_count_their_changes(interpreted, packings):
    flow = make_flow()
    with torch.inference_mode():
        flow = copy.deepcopy(flow)
        check_follows(flow, lambda: flow.w2.mul_(2))
        assert all(parameter.is_inference() for parameter in flow.parameters())
    assert not interpreted.blocks.PACKED._kept


def test_parameters_are_not_kept_alive():
    flow = make_flow()
    score(flow)
    other = make_flow(1)  # may get the places of those that are gone
    del flow
    check_follows(other, lambda: other.load_state_dict(make_flow(2).state_dict()))


class Counter:
    """A tensor that a thread writes to, and what is made of it."""

    def __init__(self) -> None:
        self.value = torch.zeros(())

    def make(self) -> float:
        return float(self.value)


def test_threads_at_once_see_their_own_values(interpreted):
    """What is kept has room for two of three, and is emptied all the time, as by another one's optimizer."""
    cache, wrong = interpreted.cache.Cache(2), []

    def work(number: int) -> None:
        counter = Counter()
        for i in range(1000):
            if i % 100 == 0:
                counter = Counter()
            counter.value.fill_(number + 10 * i)
            wrong.extend(
                (number, i) for _ in range(2) if cache.get(counter.make, ("kind",), [counter.value]) != number + 10 * i
            )
            if number == 0:
                cache.empty()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(cache._kept) <= 2


def test_what_is_made_while_an_optimizer_steps_is_not_kept(interpreted):
    """It may be of values from before."""
    cache, value = interpreted.cache.Cache(2), torch.zeros(())

    def make() -> float:
        made = float(value)
        value.data.add_(1)  # not counted, like a fused optimizer's step in another thread
        cache.empty()
        return made

    assert [cache.get(make, ("kind",), [value]) for _ in range(3)] == [0, 1, 2]
