"""A VQ-Flow of a few channels, and features for it: of classes far apart, whose pixels hold a pattern or another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hgad_fast import VQFlowConfig, VQFlowModel
from hgad_fast.scoring.result import ScoreResult

DIMS = (4, 6, 8, 10)
RAW = (16, 8, 4, 2)  # sides of the maps as a backbone gives them; pooled, they are 8, 4, 2 and 2
SMALL: dict[str, Any] = {
    "n_classes": 3,
    "backbone_arch": None,
    "feature_dims": DIMS,
    "coupling_layers": (1, 2, 1),
    "n_prototypes": 6,
    "n_patterns": 8,
    "prototype_dim": 8,
    "pos_embed_dim": 4,
    "hidden_channels": 12,
    "img_size": 64,
    "msk_size": 16,
    "batch_size": 6,
    "meta_epochs": 3,
    "sub_epochs": 2,
    "lr": 1e-3,
    "calibration_fraction": 0.0,
}


def small_config(**changes: Any) -> VQFlowConfig:
    return VQFlowConfig(**SMALL | changes)


def small_model(**changes: Any) -> VQFlowModel:
    return VQFlowModel(small_config(**changes))


def class_features(n: int = 12, classes: int = 3, seed: int = 0, sides: tuple[int, ...] = RAW) -> list[Tensor]:
    """Return raw features of n images, (n, C, h, w) a level; image i is of class i % classes."""
    means = torch.Generator().manual_seed(1000)  # the same for any seed
    generator = torch.Generator().manual_seed(seed)
    levels = []
    for channels, side in zip(DIMS, sides, strict=True):
        centres = 3 * torch.randn(classes, channels, 1, 1, generator=means)
        noise = torch.randn(n, channels, side, side, generator=generator)
        levels.append(centres[torch.arange(n) % classes] + 0.3 * noise)
    return levels


def labels(n: int = 12, classes: int = 3) -> Tensor:
    return torch.arange(n) % classes


def stirred(model: VQFlowModel, by: float = 0.1) -> VQFlowModel:
    """Move parameters and batch-norm statistics off their initial values, at which much is 0 or 1; codes onto data."""
    generator = torch.Generator().manual_seed(5)

    def noise(tensor: Tensor) -> Tensor:
        return by * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("encoder."):
                parameter += noise(parameter)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer += noise(buffer)
            elif name.endswith("running_var"):
                buffer *= 1 + noise(buffer).abs()
    return model


def assert_same_state(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Assert that two state dicts are equal to the bit."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


def assert_same_scores(first: ScoreResult, second: ScoreResult) -> None:
    """Assert that two results are equal to the bit; NaN equals NaN."""
    for name in ("anomaly_map", "image_score", "class_id", "p_value", "threshold", "false_alarm_rate"):
        assert torch.equal(getattr(first, name).nan_to_num(-7.0), getattr(second, name).nan_to_num(-7.0)), name
    assert torch.equal(first.is_anomalous, second.is_anomalous)
    for one, other in zip(first.logps or [], second.logps or [], strict=True):
        assert torch.equal(one, other)
