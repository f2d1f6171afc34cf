"""Parity with the official implementation: the numbers in tests/golden were computed by it, in float32 on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import rounding
import torch
from golden import CENTRES, FOLDER, Golden, official_losses_and_gradients
from torch import Tensor
from torch.nn import Module

from hgad_fast import HGADModel, ops
from hgad_fast.bench import official
from hgad_fast.bench.official import named_gradients
from hgad_fast.modules.flow import dense_position, sinusoidal_position
from hgad_fast.protocol import Progress
from hgad_fast.training.step import make_optimizer

STAGES = {"inter": 1, "full": 2}
EPOCHS = {"inter": 0, "full": 3}  # a meta-epoch that is in the stage


@pytest.fixture(params=["small", "odd"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def total(losses: dict[str, Tensor]) -> Tensor:
    loss = losses["L_g"] - 100 * losses["L_mi"] + losses["L_e"]
    return loss + losses["L_g_intra"] + losses["L_z"] if "L_z" in losses else loss


def assert_golden(actual: Any, golden: Any, function: Callable[..., Any], *inputs: Any) -> None:
    """Check that the values under test and the golden ones differ from `function` in float64 by rounding alone."""
    exact, tolerance = rounding.exact_and_tolerance(function, *inputs)
    rounding.assert_within(golden, exact, tolerance)
    rounding.assert_within(actual, exact, tolerance)


def test_positions(golden: Golden):
    images, channels = len(golden["labels"]), golden.config["pos_embed_dim"]
    for level in golden.levels:
        h, w = golden.size(level)
        assert_golden(
            dense_position(sinusoidal_position(h, w, channels), images),
            golden.dense(level),
            partial(official.dense_position, channels, images, h, w),
        )
        recognised = golden.model.nfs[level].position([golden.dense(level)])
        assert recognised is not None and (len(recognised.row), len(recognised.column)) == (h, w)


def forward_and_back(flow: Module, x: Tensor, condition: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return z, log_det, and x again from z."""
    z, log_det = flow(x, condition)
    return z, log_det, flow(z, condition, rev=True)[0]


@pytest.mark.parametrize("name", ["small", "odd", "unconditional"])
def test_flow(name: str):
    golden = Golden(name)
    for level in golden.levels:
        x, z, log_det = (golden[f"level{level}.{part}"] for part in ("features", "z", "log_jac_det"))
        inputs = golden.model.nfs[level], x, golden.conditions(level)
        exact, tolerance = rounding.exact_and_tolerance(forward_and_back, *inputs)
        rounding.assert_within(forward_and_back(*inputs), exact, tolerance)
        rounding.assert_within((z, log_det, x), exact, tolerance)


def losses_and_gradients(
    model: HGADModel, x: Tensor, targets: tuple[Tensor, Tensor | None], position: Tensor, level: int, epoch: int
) -> dict[str, Tensor]:
    """Return the loss terms of one level and the gradients of their total, by the names in the golden files."""
    losses = model(x, targets, position, scale=level, epoch=epoch)
    loss = total(losses)
    loss.backward()
    gradients = {f"nfs.{name}": gradient for name, gradient in named_gradients(model.nfs[level]).items()}
    gradients |= {part: getattr(model, part)[level].grad for part in CENTRES} | {"features": x.grad}
    return {**losses, "loss": loss} | {f"grad.{name}": g for name, g in gradients.items() if g is not None}


@pytest.mark.parametrize("memory", ["standard", "reversible"])
@pytest.mark.parametrize("stage", STAGES)
def test_losses_and_gradients(golden: Golden, stage: str, memory: str):
    golden.model.memory = memory
    for level in golden.levels:
        x = golden[f"level{level}.features"].requires_grad_()
        targets = (golden.labels(level), golden.onehot(level))
        inputs = golden.model, x, targets, golden.dense(level), level, EPOCHS[stage]
        exact, tolerance = rounding.exact_and_tolerance(losses_and_gradients, *inputs)
        actual = losses_and_gradients(*inputs)
        rounding.assert_within(actual, exact, tolerance)

        recorded = golden.below(f"level{level}.{stage}.")
        assert {"L_g", "loss", "grad.features", "grad.mus"} < set(recorded)
        inputs = golden.official_inputs(level, STAGES[stage])
        exact, tolerance = rounding.exact_and_tolerance(official_losses_and_gradients, *inputs)
        rounding.assert_within(recorded, exact, tolerance)
        rounding.assert_within({name: actual[name] for name in recorded}, exact, tolerance)
        if stage == "inter":
            assert golden.model.mu_deltas[level].grad is None and golden.model.phi_intras[level].grad is None


def official_scores(model: HGADModel, features: list[Tensor], class_id: int) -> tuple[Any, ...]:
    result = model.score_features(features, class_id, normalization="official")
    return result.logps, result.neg_entropy, result.anomaly_map, result.image_score


def test_scores_and_maps(golden: Golden):
    recorded = [[golden[f"score.level{i}.{part}"] for i in golden.levels] for part in ("logps", "neg_entropy")]
    recorded += [golden["score.map"], golden["score.image"]]
    inputs = golden.model, golden.score_features(), int(golden["score.class_id"])
    assert_golden(official_scores(*inputs), tuple(recorded), official_scores, *inputs)


def test_learning_rate(golden: Golden):
    for meta_epoch, sub_epoch, batch, rate in golden["lr_schedule"].tolist():
        stage, scheduled = golden.model.schedule(Progress(int(meta_epoch), int(sub_epoch), int(batch), batches=4))
        assert abs(scheduled - rate) < 1e-12 and stage == (1 if meta_epoch < 2 else 2)


def trajectory(model: HGADModel, golden: Golden, features: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the losses before each Adam step (step, level), and where the centres end."""
    epoch, (steps, _) = int(golden["trajectory.epoch"]), golden["trajectory.losses"].shape
    optimizer = make_optimizer(model)
    for group in optimizer.param_groups:
        group["lr"] = model.schedule(Progress(epoch, 0, 0, batches=4))[1]
    losses = []
    for _ in range(steps):
        for level in golden.levels:
            targets = golden.labels(level), None
            loss = total(model(features[level], targets, golden.dense(level), scale=level, epoch=epoch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses).view(steps, -1), *(
        part[i] for part in (model.mus, model.mu_deltas) for i in golden.levels
    )


def test_trajectory(golden: Golden):
    """Four Adam steps in stage 2."""
    recorded = [golden[f"trajectory.final.{part}.{i}"] for part in ("mus", "mu_deltas") for i in golden.levels]
    features = [golden[f"level{level}.features"] for level in golden.levels]
    exact, tolerance = rounding.exact_and_tolerance(trajectory, golden.model, golden, features)
    rounding.assert_within((golden["trajectory.losses"], *recorded), exact, tolerance)
    rounding.assert_within(trajectory(golden.model, golden, features), exact, tolerance)


def test_official_checkpoint_loads():
    golden = Golden("small")
    expected = {key: value.clone() for key, value in golden.model.state_dict().items()}
    for parameter in golden.model.parameters():
        torch.nn.init.normal_(parameter)
    golden.model.load_official_checkpoint(FOLDER / "hgad_official_checkpoint.pt")
    assert all(torch.equal(value, expected[key]) for key, value in golden.model.state_dict().items())
    checkpoint = torch.load(FOLDER / "hgad_official_checkpoint.pt", weights_only=True)
    assert checkpoint["nfs"][0].keys() == golden.model.nfs[0].state_dict().keys()


def test_official_checkpoint_of_another_size_is_refused():
    model = Golden("odd").model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit this model"):
        model.load_official_checkpoint(FOLDER / "hgad_official_checkpoint.pt")
    with pytest.raises(ValueError, match="no official HGAD checkpoint"):
        model.load_official_checkpoint({"nfs": []})
    with pytest.raises(ValueError, match="there is no PyTorch checkpoint"):
        model.load_official_checkpoint(FOLDER / "none.pt")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_kernels_are_what_runs(interpreted, launches: dict[str, int]):
    """Golden losses, gradients and scores through the kernels, on Triton's interpreter, with their launches counted."""
    golden = Golden("small")
    layers, level = golden.config["coupling_layers"], 1
    x = golden[f"level{level}.features"].requires_grad_()
    inputs = golden.model, x, (golden.labels(level), None), golden.dense(level), level, EPOCHS["full"]
    exact, tolerance = rounding.exact_and_tolerance(losses_and_gradients, *inputs)
    assert launches == {}
    rounding.assert_within(losses_and_gradients(*inputs), exact, tolerance)
    assert launches["_forward_kernel"] == launches["_backward_kernel"] == layers
    assert launches["_terms_kernel"] == 1 and launches["_terms_backward_kernel"] >= 1

    inputs = golden.model, [x[:2] for x in golden.score_features()], int(golden["score.class_id"])
    exact, tolerance = rounding.exact_and_tolerance(official_scores, *inputs)
    launches.clear()
    rounding.assert_within(official_scores(*inputs), exact, tolerance)
    of_mixture = {"_prepare_terms_kernel": 2 * 2, "_terms_kernel": 2 * 2}  # two images, two levels
    assert launches == {"_forward_kernel": 2 * 2 * layers, **of_mixture}


@pytest.mark.parametrize("name", ["small", "odd", "unconditional"])
def test_golden_flow_through_the_block_kernel(interpreted, launches: dict[str, int], name: str):
    """The values in float32, and in bfloat16 as `flow` uses it, within what the rounding of the operands costs."""
    golden, level = Golden(name), 1
    flow, x = golden.model.nfs[level], golden[f"level{level}.features"]
    position = flow.grid(*golden.size(level))
    layers, conditions = golden.config["coupling_layers"], list(position or ())
    z = ops.coupling_blocks(x, conditions, flow.blocks, flow.clamp, "fp32", backend="triton")
    assert launches["_block_kernel"] == layers
    with torch.no_grad():
        rounding.assert_close(z, lambda flow, x: flow(x, position), flow, x)
        flow.precision = "bf16"
        z = flow(x, position)
        assert launches["_block_kernel"] == 2 * layers
        rounding.assert_close(z, lambda flow, x: flow(x, position), flow, x)
        flow.precision = "fp32"
        with pytest.raises(AssertionError, match="rounding explains"):
            rounding.assert_close(z, lambda flow, x: flow(x, position), flow, x)  # it did round
