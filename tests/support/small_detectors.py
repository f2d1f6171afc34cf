"""Small calibrated models on images, of every method: backbones have random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import exported
import torch
from small_gaussian import SMALL as SMALL_GAUSSIAN
from small_vqflow import SMALL as SMALL_VQFLOW
from small_vqflow import stirred
from torch import Tensor

from hgad_fast import GaussianConfig, GaussianModel, HGADModel, VQFlowConfig, VQFlowModel
from hgad_fast.features.extract import FeatureSet

STAGES: dict[str, Any] = {"backbone_arch": "test_efficientnet", "backbone_weights": None, "feature_dims": None}


def hgad(**changes: Any) -> HGADModel:
    """Return an HGAD that sees images at 64 pixels."""
    return exported.on_images(**changes)


def vqflow(**changes: Any) -> VQFlowModel:
    """Return a VQ-Flow that sees images as squares of 64 pixels, its codes on features of drawn ones."""
    sizes = STAGES | {"out_indices": (1, 2, 3, 4), "coupling_layers": (1, 1, 1)}
    model = stirred(VQFlowModel(VQFlowConfig(**SMALL_VQFLOW | sizes | changes))).eval()
    model.begin(feature_set(model, 12, seed=1))
    model.calibrate(feature_set(model, 12, seed=2), false_alarm_rate=0.25)
    return model


def gaussian(size: tuple[int, int] = (64, 64), **changes: Any) -> GaussianModel:
    """Return a place Gaussian that sees images at 64 pixels, fitted to drawn ones of a size."""
    sizes = STAGES | {"out_indices": (1, 2, 3), "feature_levels": 1, "map_stages": None}
    model = GaussianModel(GaussianConfig(**SMALL_GAUSSIAN | sizes | changes))
    model.fit(
        feature_set(model, 24, seed=1, size=size),
        calibration=feature_set(model, 12, seed=2, size=size),
        false_alarm_rate=0.25,
    )
    return model


def feature_set(model: Any, n: int, seed: int, size: tuple[int, int] = (64, 64)) -> FeatureSet:
    """Return features of n drawn images, as they are cached; image i is of class i % 3."""
    images = images_of_classes(n, seed, size)
    with torch.no_grad():
        levels = [model.prepare(model.encoder(model.encoder.normalize(image[None]), fast=True)) for image in images]
    return FeatureSet.from_levels(list(map(torch.cat, zip(*levels, strict=True))), torch.arange(n) % 3)


def images_of_classes(n: int, seed: int = 0, size: tuple[int, int] = (64, 64)) -> Tensor:
    """Return n images (n, 3, H, W) in [0, 1], of three kinds of noise in turns."""
    images = exported.images(n, seed, size)
    powers = torch.tensor([1.0, 2.0, 0.5])[torch.arange(n) % 3]
    return images ** powers[:, None, None, None]


def broken(densities: Callable[..., Any]) -> Callable[..., Any]:
    """Return the `densities` of a model whose log-densities are no numbers, as those of images that overflow."""

    def without_numbers(*args: Any, **kwargs: Any) -> Any:
        result = densities(*args, **kwargs)
        for level in result.logps:
            level.fill_(float("nan"))
        return result

    return without_numbers
