"""VQ-Flow against the official modules: blocks, fusion, quantisation, positions and three steps of a training."""

from __future__ import annotations

import re

import pytest
import torch
from golden_vqflow import (
    VQFlowGolden,
    free_condition,
    golden_block,
    golden_fusion,
    gradients,
    official_model,
    relative_error,
    state_and_config,
)

from hgad_fast import VQFlowModel
from hgad_fast.features.extract import FeatureSet, channels_last
from hgad_fast.models.vqflow_official import RENAMED
from hgad_fast.modules.codebook import Codebook
from hgad_fast.modules.flow import dense_position, sinusoidal_position
from hgad_fast.training.processes import Processes
from hgad_fast.training.step import Step

EXACT = 1e-12  # relative, in float64: parts
STEPS = 1e-3  # of an update: three steps of Adam, whose first divides small gradients by themselves
# A bias in front of a batch norm has no gradient but rounding, of which Adam makes whole steps.
NO_GRADIENT = re.compile(r"(semantic_mlp|semantic_encoder|feature_mlps\.\d)\.[03]\.bias$")


def renamed(name: str) -> str:
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


@pytest.mark.parametrize("name", ["block", "block_odd"])
@pytest.mark.parametrize("by_tables", [True, False])
def test_a_block_is_the_official_one(name: str, by_tables: bool) -> None:
    golden = VQFlowGolden(name)
    block = golden_block(golden, torch.float64)
    block.subnet.conv1.by_tables = by_tables
    x, values = (golden[key].double().requires_grad_() for key in ("x", "cond"))
    condition = free_condition(values)
    z, log_det = block(x.permute(0, 2, 3, 1), condition)
    weights = golden["upstream_z"].double(), golden["upstream_jac"].double()
    loss = (z.permute(0, 3, 1, 2) * weights[0]).sum() + (log_det.sum((1, 2)) * weights[1]).sum()
    loss.backward()
    actual = {"z": z.permute(0, 3, 1, 2), "jac": log_det.sum((1, 2)), "loss": loss}
    actual |= {"grad_x": x.grad, "grad_cond": values.grad}
    actual |= {f"grad/{key}": gradient for key, gradient in gradients(block).items()}
    back, inverse_log_det = block.inverse(z.detach(), condition)
    actual |= {"x_rev": back.permute(0, 3, 1, 2), "jac_rev": inverse_log_det.sum((1, 2))}
    for key, value in actual.items():
        assert relative_error(value, golden[f"f64/{key}"]) <= EXACT, key
    assert len(golden.below("f64/grad/")) == len(gradients(block))


def test_the_fusion_flow_is_the_official_one() -> None:
    golden = VQFlowGolden("fusion")
    flow = golden_fusion(golden, torch.float64)
    maps = [golden[f"x{level}"].double().requires_grad_() for level in range(3)]
    values = golden["cond"].double().requires_grad_()
    z, log_dets = flow([x.permute(0, 2, 3, 1) for x in maps], free_condition(values))
    log_det = sum(level.sum((1, 2)) for level in log_dets)
    loss = (log_det * golden["upstream_jac"].double()).sum()
    for level in range(3):
        loss = loss + (z[level].permute(0, 3, 1, 2) * golden[f"upstream_z{level}"].double()).sum()
    loss.backward()
    actual = {"jac": log_det, "loss": loss, "grad_cond": values.grad}
    for level in range(3):
        actual |= {f"z{level}": z[level].permute(0, 3, 1, 2), f"grad_x{level}": maps[level].grad}
    actual |= {f"grad/module_list.3.{key}": gradient for key, gradient in gradients(flow).items()}
    for key, value in actual.items():
        assert relative_error(value, golden[f"f64/{key}"]) <= EXACT, key


@pytest.mark.parametrize("start", ["fresh", "trained"])
def test_quantisation_is_the_official_one(start: str) -> None:
    golden = VQFlowGolden("quantize")
    state = golden.below(f"{start}/state0/")
    book = Codebook(*state["embed"].shape, revive=False)
    book.load_state_dict(state | {"updates": torch.tensor(0)})
    book.double().eval()

    def quantised(inputs: torch.Tensor):
        result = book(inputs.flatten(2).transpose(1, 2))
        values = result.codes[result.indices]
        return result, values.transpose(1, 2).reshape(inputs.shape)

    result, values = quantised(golden[f"{start}/x0"].double())
    assert torch.equal(result.indices.view(2, 8, 8), golden[f"{start}/f64/eval/ind"])
    assert relative_error(values, golden[f"{start}/f64/eval/quantize"]) <= EXACT
    assert relative_error(result.commitment, golden[f"{start}/f64/eval/diff"]) <= EXACT
    book.train()
    for step in range(3):
        x = golden[f"{start}/x{step}"].double().requires_grad_()
        result, values = quantised(x)
        loss = ((values + (x - x.detach())) * golden[f"{start}/upstream"].double()).sum() + 3 * result.commitment
        loss.backward()
        expected = golden.below(f"{start}/f64/train{step}/")
        assert torch.equal(result.indices.view(2, 8, 8), expected["ind"])
        for value, key in ((values, "quantize"), (result.commitment, "diff"), (loss, "loss"), (x.grad, "grad_x")):
            assert relative_error(value, expected[key]) <= EXACT, (step, key)
        for key in state:
            assert relative_error(book.state_dict()[key], expected[f"state_after/{key}"]) <= EXACT, (step, key)


def test_position_codes_are_the_official_ones() -> None:
    golden = VQFlowGolden("posenc")
    for i in range(10):
        if f"pe{i}" in golden:
            dim, h, w = golden[f"pe{i}_DHW"].tolist()
            code = dense_position(sinusoidal_position(h, w, dim)).t().reshape(dim, h, w)
            assert (code - golden[f"pe{i}"]).abs().max() <= 4e-6  # float32 angles of up to w, sines to the last digits
    assert "pe0" in golden


@pytest.mark.parametrize("by_tables", [True, False])
def test_three_steps_are_the_official_ones(monkeypatch: pytest.MonkeyPatch, by_tables: bool) -> None:
    """They are those of `Step`, with its clipping and optimizer; what the steps change is compared, not the states."""
    golden = VQFlowGolden("steps3")
    model = official_model().train()
    for module in model.modules():
        if hasattr(module, "by_tables"):
            module.by_tables = by_tables
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step = Step(model, Processes())
    for number in range(3):
        levels = model.prepare([golden[f"step{number}/h{level}"].double() for level in range(4)])
        images = [[level[i] for level in levels] for i in range(4)]
        step(images, torch.zeros(4, dtype=torch.int64), 1, float(golden["lr"]))
    after = model.state_dict()
    expected = {renamed(name): tensor for name, tensor in golden.below("f64/state_after/").items()}
    compared = 0
    for name, tensor in expected.items():
        if name not in after or "permutation" in name or NO_GRADIENT.search(name):
            continue
        update, own = tensor - before[name], after[name] - before[name]
        if update.abs().max() > 0:
            assert relative_error(own, update) <= STEPS, name
            compared += 1
    assert compared > 150


def test_the_initial_state_of_the_official_code_is_read() -> None:
    golden, config = state_and_config("full_state_init")
    model = VQFlowModel(config)
    state = golden.below("")
    model.load_official_checkpoint(state)
    for level, blocks in enumerate(config.coupling_layers):
        for block in range(blocks):
            one_hot = state[f"parallel_flows.{level}.module_list.{block}.w_perm"][..., 0, 0]
            x = torch.randn(3, len(one_hot))
            permutation = model.parallel_flows[level].module_list[block].permutation
            assert torch.equal(x[:, permutation], x @ one_hot.T)
    assert torch.equal(model.prior.mean[1].weight, state["sigma_mu_generators.1.sigma.weight"])
    assert torch.equal(model.prior.std[1].weight, state["sigma_mu_generators.1.mu.weight"])


def test_features_of_a_training_are_pooled_once() -> None:
    model = official_model(dtype=torch.float32)
    golden = VQFlowGolden("full_state")
    raw = [golden[f"h{level}"] for level in range(4)]
    features = FeatureSet([[channels_last(level[0]) for level in model.prepare(raw)]], [0])
    assert [tuple(level.shape[1:]) for level in features.images[0]] == [(16, 16), (8, 8), (4, 4), (4, 4)]
