"""The flow's parameters are stacked; in state dicts, and for operations given block by block, nothing of it shows."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hgad_fast import ops
from hgad_fast.bench.official import official_flow
from hgad_fast.modules.flow import ConditionalFlow

SIZES = [(7, 3, 8), (10, 1, 0), (2, 2, 4)]


def flow_of(channels: int, layers: int, position_dim: int) -> ConditionalFlow:
    flow = ConditionalFlow(channels, layers, position_dim)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return flow


@pytest.mark.parametrize("sizes", SIZES)
def test_its_state_dict_is_the_official_one(sizes) -> None:
    """Names, order of the blocks, shapes; and each reads the other's, to the bit."""
    channels, layers, position_dim = sizes
    flow, official = flow_of(*sizes), official_flow(channels, position_dim, layers)
    shapes = {name: tensor.shape for name, tensor in flow.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in official.state_dict().items()}
    official.load_state_dict(flow.state_dict())
    for name, tensor in flow.state_dict().items():
        assert torch.equal(official.state_dict()[name], tensor), name
    other = ConditionalFlow(channels, layers, position_dim)
    other.load_state_dict(official.state_dict())
    for name in ops.Blocks._fields:
        assert torch.equal(getattr(other, name), getattr(flow, name)), name


def test_a_state_dict_shows_the_parameters_themselves() -> None:
    flow = flow_of(6, 2, 4)
    state = flow.state_dict()
    assert not any(tensor.requires_grad for tensor in state.values())
    with torch.no_grad():
        flow.w1.zero_()
    assert not state["module_list.1.subnet.0.weight"].any()
    kept = flow.state_dict(keep_vars=True)
    assert kept["module_list.0.global_scale"].requires_grad and not kept["module_list.0.w_perm"].requires_grad
    inverse = state["module_list.1.w_perm"] @ state["module_list.1.w_perm_inv"]
    torch.testing.assert_close(inverse, torch.eye(6))


@pytest.mark.parametrize("change", ["missing", "unexpected", "of another shape"])
def test_a_state_dict_that_does_not_fit_is_refused_and_names_the_block(change: str) -> None:
    flow = flow_of(6, 2, 4)
    state = {name: tensor.clone() for name, tensor in flow.state_dict().items()}
    name = "module_list.1.subnet.2.bias"
    if change == "missing":
        del state[name]
    elif change == "unexpected":
        name = "module_list.2.global_scale"
        state[name] = torch.zeros(1, 6)
    else:
        state[name] = torch.zeros(5)
    with pytest.raises(RuntimeError, match=name.replace(".", r"\.")):
        flow.load_state_dict(state)
    if change != "of another shape":
        missing, unexpected = flow.load_state_dict(state, strict=False)
        assert [*missing, *unexpected] == [name]


def test_a_part_of_a_state_dict_changes_that_part_alone() -> None:
    flow = flow_of(6, 3, 4)
    before = copy.deepcopy(flow)
    flow.load_state_dict({"module_list.1.global_offset": torch.full((1, 6), 3.0)}, strict=False)
    assert flow.global_offset[1].eq(3).all()
    assert torch.equal(flow.global_offset[::2], before.global_offset[::2]) and torch.equal(flow.w1, before.w1)


def test_each_block_begins_as_an_official_one_does() -> None:
    """PyTorch's own initialisation of linear layers, gain 1, offset 0, a rotation."""
    flow = ConditionalFlow(200, 3, 16)
    width = 100 + 16
    for weights, biases, inputs in ((flow.w1, flow.b1, width), (flow.w2, flow.b2, 2 * width)):
        for values in (weights, biases):
            assert (
                float(values.detach().abs().max()) <= inputs**-0.5 and float(values.detach().std()) > 0.5 * inputs**-0.5
            )
    gain = 0.1 * torch.nn.functional.softplus(flow.global_scale, beta=0.5)
    torch.testing.assert_close(gain, torch.ones_like(gain))
    assert not flow.global_offset.any()
    for rotation in flow.w_perm.double():
        torch.testing.assert_close(
            rotation @ rotation.T, torch.eye(200, dtype=torch.float64), rtol=0, atol=2**-22
        )  # entries are rounded
        assert torch.linalg.det(rotation) > 0
    assert not torch.equal(flow.w1[0], flow.w1[1])


@pytest.mark.parametrize("memory", ops.MEMORY_MODES)
def test_stacked_or_block_by_block_is_the_same_operation(memory: str) -> None:
    """To the bit, gradients as well."""
    flow, x = flow_of(7, 3, 8), torch.randn(12, 7)
    position = flow.grid(3, 4)
    blocks = [ops.Block(*(t.detach().clone() for t in block)) for block in flow.blocks.each()]
    for block in blocks:
        for tensor in block[:-1]:
            tensor.requires_grad_()
    outcomes = []
    for parameters in (flow.blocks, blocks):
        z, log_det = ops.flow(x, parameters, position, memory=memory)
        (z.square().sum() + log_det.sum()).backward()
        outcomes.append((z, log_det))
    for stacked, single in zip(*outcomes, strict=True):
        assert torch.equal(stacked, single)
    for k, block in enumerate(blocks):
        for field, tensor in block._asdict().items():
            if field != "w_perm":
                assert torch.equal(tensor.grad, getattr(flow, field).grad[k]), field
    again = ops.Blocks.stack(blocks)
    assert ops.Blocks.stack(again) is again


def test_rotations_keep_the_layout_of_qr_through_copies_and_files():
    """A product with the other layout rounds otherwise, and old files would score otherwise in the last digit."""
    flow = ConditionalFlow(6, 3, 4)
    loaded = ConditionalFlow(6, 3, 4)
    loaded.load_state_dict(flow.state_dict())
    for each in (flow, loaded, copy.deepcopy(flow).double()):
        assert each.w_perm.mT.is_contiguous() and not each.w_perm.is_contiguous()


def test_a_state_may_be_assigned_and_what_does_not_fit_is_named():
    flow, taken = ConditionalFlow(6, 2, 0), ConditionalFlow(6, 2, 0).to("meta")
    taken.w1.requires_grad_(False)
    taken.load_state_dict(flow.state_dict(), assign=True)
    x = torch.randn(5, 6)
    assert torch.equal(taken(x)[0], flow(x)[0]) and not taken.w1.requires_grad and taken.w2.requires_grad
    name, state = "module_list.1.subnet.0.weight", flow.state_dict()
    with pytest.raises(RuntimeError, match=rf"size mismatch for {name}: the shape in the state is \(3,\), and"):
        flow.load_state_dict(state | {name: torch.zeros(3)})
    with pytest.raises(RuntimeError, match=f"{name} is of type int; it must be a tensor"):
        flow.load_state_dict(state | {name: 3})


def test_a_map_that_was_scored_first_can_be_trained_on():
    """Positions are kept from call to call, and those made in inference mode cannot be saved for a backward pass."""
    flow, x = ConditionalFlow(6, 2, 8), torch.randn(13 * 3, 6)
    with torch.inference_mode():
        flow(x, flow.grid(13, 3))
    z, log_det = flow(x, flow.grid(13, 3))
    (z.sum() + log_det.sum()).backward()
    assert flow.w1.grad.isfinite().all()


def test_scoring_is_one_operator_for_whoever_follows_operations_and_has_the_same_bits_without() -> None:
    class Names(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    flow = flow_of(6, 2, 4)
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    grid = flow.grid(3, 4, x.device)
    with torch.no_grad():
        alone = flow(x, grid)
        with Names() as mode:
            followed = flow(x, grid)
        compiled = torch.compile(flow, backend="eager", fullgraph=True)(x, grid)
    assert [name for name in mode.names if name.startswith("hgad_fast")] == ["hgad_fast.flow_inference.default"]
    for other in (followed, compiled):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(alone, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_features_in_half_precision_are_computed_in_float32(dtype, precision):
    flow, x = ConditionalFlow(6, 2, 8), torch.randn(12, 6).to(dtype)
    flow.precision = precision
    z, log_det = flow(x, flow.grid(3, 4))
    assert z.dtype == log_det.dtype == torch.float32 and z.equal(flow(x.float(), flow.grid(3, 4))[0])


def test_positions_have_the_precision_of_the_flow():
    flow = ConditionalFlow(6, 2, 8).double()
    z, _ = flow(torch.randn(12, 6, dtype=torch.float64), flow.grid(3, 4))
    assert z.dtype == torch.float64
