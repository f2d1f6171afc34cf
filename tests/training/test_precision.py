"""Training with operands of fewer bits, rounded as the kernels or a CPU round them, reaches the loss of float32."""

from __future__ import annotations

import functools
import warnings
from contextlib import nullcontext

import pytest
import rounding
import torch
from torch import Tensor

from hgad_fast import HGADConfig, HGADModel
from hgad_fast.features.extract import FeatureSet
from hgad_fast.models import hgad
from hgad_fast.ops import subnet
from hgad_fast.training.processes import Processes
from hgad_fast.training.step import Step

CHANNELS, CLASSES, IMAGES, SIDE = 20, 3, 6, 4
STEPS, LAST, RATE = 300, 20, 1e-3
ALLOWED = 0.005  # of float32's loss: what users are promised


@functools.cache
def batches() -> list[tuple[list[list[Tensor]], Tensor]]:
    """Return images, new ones in each step, whose pixels are Gaussian: a class has its mean and mixes its channels."""
    generator = torch.Generator().manual_seed(0)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    means = 0.5 * normal(CLASSES, 1, CHANNELS)
    mixing = normal(CLASSES, CHANNELS, CHANNELS) / CHANNELS**0.5
    labels = torch.arange(IMAGES) % CLASSES
    drawn = []
    for _ in range(STEPS):
        pixels = means[labels] + normal(IMAGES, SIDE * SIDE, CHANNELS) @ mixing[labels]
        drawn.append(([[image] for image in pixels.float().mT.unflatten(2, (SIDE, SIDE))], labels))
    return drawn


def train(precision: str) -> Tensor:
    """Return the total loss of every step of a training."""
    config = HGADConfig(
        backbone_arch=None, feature_levels=1, feature_dims=(CHANNELS,), n_classes=CLASSES, n_intra_centers=2,
        coupling_layers=4, pos_embed_dim=8, batch_size=IMAGES, memory="reversible", precision=precision,
    )  # fmt: skip
    step = Step(HGADModel(config), Processes())
    terms = torch.cat([step(images, labels, stage=2, rate=RATE) for images, labels in batches()])
    weights = {"L_g": config.lambda1, "L_mi": -config.lambda2}
    return terms.double() @ torch.tensor([weights.get(term, 1.0) for term in step.terms], dtype=torch.float64)


@functools.cache
def float32_losses() -> Tensor:
    return train("fp32")


@pytest.mark.parametrize(
    ("precision", "on"), [("bf16", "a GPU"), ("tf32", "a GPU"), ("bf16", "this processor"), ("bf16", "AMX")]
)
def test_training_reaches_the_loss_of_float32(precision, on, monkeypatch):
    """300 steps of the full objective, activations rebuilt."""
    expected = float32_losses()
    start, end = expected[:LAST].mean(), expected[-LAST:].mean()
    assert start - end > 100 and abs(end) > 10  # it learned, and a share of what it reached means something
    if on == "AMX":
        monkeypatch.setattr(subnet, "bfloat16_instructions", lambda: on)
    with rounding.as_in_the_kernels() if on == "a GPU" else nullcontext():
        losses = train(precision)
    assert not torch.equal(losses[:LAST], expected[:LAST])  # it did round
    assert abs(losses[-LAST:].mean() - end) < ALLOWED * abs(end)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_emulation_is_said_before_a_training_and_a_score(precision, monkeypatch):
    monkeypatch.setattr(hgad, "bfloat16_instructions", lambda: "")
    config = HGADConfig(
        backbone_arch=None, feature_levels=1, feature_dims=(4,), n_classes=2, pos_embed_dim=4, precision=precision
    )
    model, features = HGADModel(config), [torch.randn(1, 4, 3, 3)]
    beginning = functools.partial(model.begin, FeatureSet.from_levels(features, [0]))
    for work in (beginning, functools.partial(model.score_features, features, normalization="official")):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
        said = [str(warning.message) for warning in caught]
        assert any("emulated, which is slower than fp32" in text for text in said) == (precision == "bf16")
    assert ("emulated" in model.describe()["precision"]) == (precision == "bf16")
