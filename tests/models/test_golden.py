"""Parity with the official implementation: the numbers in tests/data were computed by it, in float32 on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hgad_fast import HGADConfig, HGADModel, ops
from hgad_fast.bench.official import named_gradients
from hgad_fast.modules.flow import dense_position, sinusoidal_position
from hgad_fast.protocol import Progress
from hgad_fast.training.step import make_optimizer

DATA = Path(__file__).parents[1] / "golden"
CENTRES = ("mus", "mu_deltas", "phi_inters", "phi_intras")
STAGES = {"inter": 0, "full": 3}  # and a meta-epoch that is in it


class Golden:
    """A golden file, and the model it was computed with."""

    def __init__(self, name: str) -> None:
        self.arrays = np.load(DATA / f"{name}.npz")
        self.config = json.loads(str(self.arrays["config_json"]))
        c = self.config
        self.levels = range(c["levels"])
        self.model = HGADModel(
            HGADConfig(
                n_classes=c["K"],
                n_intra_centers=c["M"],
                backbone_arch=None,
                feature_levels=c["levels"],
                feature_dims=(c["C"],) * c["levels"],
                flow_arch=c["flow_arch"],
                coupling_layers=c["coupling_layers"],
                clamp_alpha=c["clamp_alpha"],
                pos_embed_dim=c["pos_embed_dim"],
                label_smoothing=c["label_smoothing"],
                msk_size=int(self.arrays["score.msk_size"]) if "score.msk_size" in self.arrays else 32,
            )
        )
        state = {key: self[key] for key in self.arrays.files if key.startswith("nfs.")}
        state |= {f"mixture.{part}.{level}": self[f"{part}.{level}"] for part in CENTRES for level in self.levels}
        self.model.load_state_dict(state)

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(self.arrays[key])

    def size(self, level: int) -> tuple[int, int]:
        return self.config["H"] >> level, self.config["W"] >> level

    def dense(self, level: int) -> Tensor:
        """The positional code as the official loop passes it, (N, P)."""
        code = self[f"level{level}.pos_embed"].permute(1, 2, 0).reshape(-1, self.config["pos_embed_dim"])
        return code.repeat(len(self["labels"]), 1)

    def labels(self, level: int) -> Tensor:
        h, w = self.size(level)
        return self["labels"].view(-1, 1, 1).repeat(1, h, w)

    def onehot(self, level: int) -> Tensor:
        e, classes = self.config["label_smoothing"], self.config["K"]
        return torch.nn.functional.one_hot(self.labels(level).flatten(), classes) * (1 - e) + e / classes


@pytest.fixture(params=["hgad_small", "hgad_odd"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def error(found: Tensor, wanted: Tensor) -> float:
    """Frobenius-relative."""
    return float((found.detach().double() - wanted.double()).norm() / wanted.double().norm())


def total(losses: dict[str, Tensor]) -> Tensor:
    loss = losses["L_g"] - 100 * losses["L_mi"] + losses["L_e"]
    return loss + losses["L_g_intra"] + losses["L_z"] if "L_z" in losses else loss


def test_positions(golden: Golden):
    for level in golden.levels:
        h, w = golden.size(level)
        position = sinusoidal_position(h, w, golden.config["pos_embed_dim"])
        assert torch.allclose(dense_position(position, len(golden["labels"])), golden.dense(level), rtol=0, atol=1e-6)
        recognised = golden.model.nfs[level].position([golden.dense(level)])
        assert recognised is not None and (len(recognised.row), len(recognised.column)) == (h, w)


def test_flow(golden: Golden):
    for level in golden.levels:
        x, z = golden[f"level{level}.features"], golden[f"level{level}.z"]
        found, log_det = golden.model.nfs[level](x, [golden.dense(level)])
        assert error(found, z) < 1e-5
        assert error(log_det, golden[f"level{level}.log_jac_det"]) < 1e-5
        back, _ = golden.model.nfs[level](z, [golden.dense(level)], rev=True)
        assert error(back, x) < 1e-5


def test_unconditional_flow():
    golden = Golden("hgad_unconditional")
    for level in golden.levels:
        z, log_det = golden.model.nfs[level](golden[f"level{level}.features"])
        assert error(z, golden[f"level{level}.z"]) < 1e-5
        assert error(log_det, golden[f"level{level}.log_jac_det"]) < 1e-5


@pytest.mark.parametrize("memory", ["standard", "reversible"])
@pytest.mark.parametrize("stage", STAGES)
def test_losses_and_gradients(golden: Golden, stage: str, memory: str):
    golden.model.memory = memory
    for level in golden.levels:
        x = golden[f"level{level}.features"].requires_grad_()
        targets = (golden.labels(level), golden.onehot(level))
        losses = golden.model(x, targets, golden.dense(level), scale=level, epoch=STAGES[stage])
        for name, value in losses.items():
            assert error(value, golden[f"level{level}.{stage}.{name}"]) < 1e-5, name
        assert error(total(losses), golden[f"level{level}.{stage}.loss"]) < 1e-5
        total(losses).backward()
        prefix = f"level{level}.{stage}.grad."
        parameters = dict(golden.model.named_parameters())
        of_flow = named_gradients(golden.model.nfs[level])
        wanted = [key.removeprefix(prefix) for key in golden.arrays.files if key.startswith(prefix)]
        assert {"features", "mus"} < set(wanted)
        for name in wanted:
            if name == "features":
                gradient = x.grad
            elif name.startswith("nfs."):
                gradient = of_flow[name.removeprefix("nfs.")]
            else:
                gradient = parameters[f"mixture.{name}.{level}"].grad
            assert error(gradient, golden[prefix + name]) < 1e-4, name
        if stage == "inter":
            assert golden.model.mu_deltas[level].grad is None and golden.model.phi_intras[level].grad is None


def test_scores_and_maps(golden: Golden):
    channels, images = golden.config["C"], len(golden["score.image"])
    features = [
        golden[f"score.level{level}.features"].view(images, *golden.size(level), channels).permute(0, 3, 1, 2)
        for level in golden.levels
    ]
    result = golden.model.score_features(features, int(golden["score.class_id"]), normalization="official")
    for level in golden.levels:
        assert error(result.logps[level], golden[f"score.level{level}.logps"]) < 1e-5
        assert error(result.neg_entropy[level], golden[f"score.level{level}.neg_entropy"]) < 1e-5
    assert error(result.anomaly_map, golden["score.map"]) < 1e-4
    assert error(result.image_score, golden["score.image"]) < 1e-4


def test_learning_rate(golden: Golden):
    for meta_epoch, sub_epoch, batch, rate in golden["lr_schedule"].tolist():
        stage, scheduled = golden.model.schedule(Progress(int(meta_epoch), int(sub_epoch), int(batch), batches=4))
        assert abs(scheduled - rate) < 1e-12 and stage == (1 if meta_epoch < 2 else 2)


def test_trajectory(golden: Golden):
    """Four Adam steps in stage 2: the losses before each, and where the centres end."""
    model, epoch = golden.model, int(golden["trajectory.epoch"])
    optimizer = make_optimizer(model)
    for group in optimizer.param_groups:
        group["lr"] = model.schedule(Progress(epoch, 0, 0, batches=4))[1]
    losses = []
    for _ in range(len(golden["trajectory.losses"])):
        for level in golden.levels:
            x, labels = golden[f"level{level}.features"], golden.labels(level)
            loss = total(model(x, (labels, None), golden.dense(level), scale=level, epoch=epoch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    wanted = golden["trajectory.losses"]
    assert error(torch.stack(losses).view_as(wanted), wanted) < 1e-4
    for level in golden.levels:
        assert error(model.mus[level], golden[f"trajectory.final.mus.{level}"]) < 1e-4
        assert error(model.mu_deltas[level], golden[f"trajectory.final.mu_deltas.{level}"]) < 1e-4


def test_official_checkpoint_loads():
    golden = Golden("hgad_small")
    wanted = {key: value.clone() for key, value in golden.model.state_dict().items()}
    for parameter in golden.model.parameters():
        torch.nn.init.normal_(parameter)
    golden.model.load_official_checkpoint(DATA / "hgad_official_checkpoint.pt")
    assert all(torch.equal(value, wanted[key]) for key, value in golden.model.state_dict().items())
    checkpoint = torch.load(DATA / "hgad_official_checkpoint.pt", weights_only=True)
    assert checkpoint["nfs"][0].keys() == golden.model.nfs[0].state_dict().keys()


def test_official_checkpoint_of_another_size_is_refused():
    model = Golden("hgad_odd").model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit this model"):
        model.load_official_checkpoint(DATA / "hgad_official_checkpoint.pt")
    with pytest.raises(ValueError, match="no official HGAD checkpoint"):
        model.load_official_checkpoint({"nfs": []})
    with pytest.raises(ValueError, match="there is no file"):
        model.load_official_checkpoint(DATA / "none.pt")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_kernels_are_what_runs(interpreted, launches: dict[str, int]):
    """Golden losses, gradients and scores through the kernels, on Triton's interpreter, with their launches counted."""
    golden = Golden("hgad_small")
    layers, level = golden.config["coupling_layers"], 1
    x = golden[f"level{level}.features"].requires_grad_()
    losses = golden.model(x, (golden.labels(level), None), golden.dense(level), scale=level, epoch=3)
    assert launches == {"_forward_kernel": layers, "_terms_kernel": 1}
    for name, value in losses.items():
        assert error(value, golden[f"level{level}.full.{name}"]) < 1e-5, name
    total(losses).backward()
    assert launches["_backward_kernel"] == layers and launches["_terms_backward_kernel"] >= 1
    assert error(x.grad, golden[f"level{level}.full.grad.features"]) < 1e-4
    assert error(golden.model.mus[level].grad, golden[f"level{level}.full.grad.mus"]) < 1e-4
    assert error(golden.model.mu_deltas[level].grad, golden[f"level{level}.full.grad.mu_deltas"]) < 1e-4

    launches.clear()
    features = [
        golden[f"score.level{level}.features"].view(5, *golden.size(level), -1).permute(0, 3, 1, 2)[:2]
        for level in golden.levels
    ]
    result = golden.model.score_features(features, int(golden["score.class_id"]), normalization="official")
    assert launches == {"_forward_kernel": 2 * 2 * layers, "_terms_kernel": 2 * 2}  # two images, two levels
    for level in golden.levels:
        assert error(result.logps[level], golden[f"score.level{level}.logps"][:2]) < 1e-5
        assert error(result.neg_entropy[level], golden[f"score.level{level}.neg_entropy"][:2]) < 1e-5


@pytest.mark.parametrize("name", ["hgad_small", "hgad_odd", "hgad_unconditional"])
def test_golden_flow_through_the_block_kernel(interpreted, launches: dict[str, int], name: str):
    """In float32 operands to the tolerance of all else; in bfloat16, as `flow` uses it, to what rounding costs."""
    golden, level = Golden(name), 1
    flow, x = golden.model.nfs[level], golden[f"level{level}.features"]
    wanted = golden[f"level{level}.z"], golden[f"level{level}.log_jac_det"]
    position = flow.grid(*golden.size(level))
    layers, conditions = golden.config["coupling_layers"], list(position or ())
    found = ops.coupling_blocks(x, conditions, flow.blocks, flow.clamp, "fp32", backend="triton")
    assert launches == {"_block_kernel": layers}
    for value, right in zip(found, wanted, strict=True):
        assert error(value, right) < 1e-5

    flow.precision = "bf16"
    with torch.no_grad():
        z, log_det = flow(x, position)
    assert launches == {"_block_kernel": 2 * layers}
    assert error(z, wanted[0]) < 5e-3 and error(log_det, wanted[1]) < 2e-2
