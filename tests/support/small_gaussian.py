"""A place Gaussian of a few channels, and features for it: each class has a pattern of its own over the places."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hgad_fast import GaussianConfig, GaussianModel
from hgad_fast.features.extract import FeatureSet

DIMS = (5, 6, 7)
SIDES = (8, 4, 2)  # of the stages; two are fine, and the grid is that of the second
SMALL: dict[str, Any] = {
    "n_classes": 3,
    "backbone_arch": None,
    "feature_dims": DIMS,
    "map_stages": 2,
    "dim": 6,
    "coarse_dim": 3,
    "img_size": 64,
    "msk_size": 16,
    "calibration_fraction": 0.0,
}


def small_model(**changes: Any) -> GaussianModel:
    return GaussianModel(GaussianConfig(**SMALL | changes))


def class_features(
    n: int = 36, classes: int = 3, seed: int = 0, sides: tuple[Any, ...] = SIDES, noise: float = 0.5
) -> list[Tensor]:
    """Return features of n images, (n, C, h, w) a stage; image i is of class i % classes, which differ in spread."""
    generator = torch.Generator().manual_seed(seed)
    levels = []
    for channels, side in zip(DIMS, sides, strict=True):
        h, w = (side, side) if isinstance(side, int) else side
        means = torch.Generator().manual_seed(1000 + h * w)  # the same for any seed
        centres = torch.randn(classes, channels, h, w, generator=means)
        mixing = torch.randn(classes, channels, channels, generator=means) / 2
        drawn = torch.randn(n, channels, h, w, generator=generator)
        ids = torch.arange(n) % classes
        spread = noise * (1 + ids)[:, None, None, None]
        levels.append(centres[ids] + spread * torch.einsum("nij,njhw->nihw", mixing[ids], drawn))
    return levels


def labels(n: int = 36, classes: int = 3) -> Tensor:
    return torch.arange(n) % classes


def feature_set(n: int = 36, seed: int = 0, **options: Any) -> FeatureSet:
    return FeatureSet.from_levels(class_features(n, seed=seed, **options), labels(n))


def fitted(features: FeatureSet | None = None, **changes: Any) -> GaussianModel:
    """Return a fitted model, calibrated on other images."""
    model = small_model(**changes)
    model.fit(features or feature_set(), calibration=feature_set(30, seed=1), false_alarm_rate=0.2)
    return model
