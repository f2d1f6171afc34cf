"""The calibration in a model file, which is untrusted input: each part is checked, and named where it is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .calibration import Calibration

TENSORS = ("level_max", "scores", "class_ids")  # that a calibration has
OPTIONAL_TENSORS = ("weights", "score_weights", "pooled_scores", "pooled_ids")


def stored_calibration(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], groups: int, levels: int, parts: int, fusion: str
) -> Calibration:
    """Return the calibration that `Calibration.tensors` and `Calibration.settings` wrote.

    Args:
        tensors, settings: what they wrote.
        groups: G, the number of groups of the model.
        levels: S, that of the levels of its densities.
        parts: that of the parts of its densities.
        fusion: its rule that makes one map of them.

    Raises:
        ValueError: a part is missing or unknown, or is not that of such a model; the message names it.
    """
    names = {*TENSORS, *OPTIONAL_TENSORS}
    known = {attribute.name for attribute in fields(Calibration) if attribute.init} - names
    for name in TENSORS:
        if name not in tensors:
            raise ValueError(f"the tensor {name} is missing")
    if unknown := sorted({*tensors} - names) + sorted({*settings} - known):
        raise ValueError(f"{unknown[0]!r} is unknown")
    calibration = Calibration.from_tensors(tensors, **settings)
    _check_settings(calibration)
    _check_presence(calibration, parts, fusion)
    _check_tensors(calibration, groups, levels, parts)
    return calibration


def _check_settings(calibration: Calibration) -> None:
    """Raise a ValueError for a setting that cannot be."""

    def is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    rate, size, share = calibration.false_alarm_rate, calibration.img_size, calibration.share
    whole = isinstance(size, int) and not isinstance(size, bool) and size >= 1
    for name, holds, allowed in (
        ("false_alarm_rate", is_number(rate) and 0 < rate < 1, "a number above 0 and below 1"),
        ("img_size", size is None or size == "native" or whole, "a whole number from 1, 'native', or null"),
        ("borrowing", isinstance(calibration.borrowing, bool), "true or false"),
        ("share", is_number(share) and 0 <= share <= 1, "a number from 0 to 1"),
        ("scored_on", calibration.scored_on in ("map", "all"), "'map' or 'all'"),
    ):
        if not holds:
            raise ValueError(f"{name} is {str(getattr(calibration, name))[:100]!r}; allowed: {allowed}")


def _check_presence(calibration: Calibration, parts: int, fusion: str) -> None:
    """Raise a ValueError where a tensor is missing that the settings ask for."""
    if fusion != "product" and (parts > 1 or calibration.scored_on != "map"):
        for name in ("weights",) if calibration.scored_on == "map" else ("weights", "score_weights"):
            if getattr(calibration, name) is None:
                raise ValueError(f"the tensor {name} is missing, without which maps cannot be fused ({fusion})")
    if (calibration.pooled_scores is None) != (calibration.pooled_ids is None):
        raise ValueError("one of the tensors pooled_scores and pooled_ids is missing")


def _check_tensors(calibration: Calibration, groups: int, levels: int, parts: int) -> None:
    """Raise a ValueError for a tensor of another shape or type, or with values that cannot be."""
    images = (calibration.class_ids.numel(),)
    shapes = {"level_max": (groups, levels), "scores": images, "class_ids": images}
    shapes |= {"weights": (groups, parts), "score_weights": (groups, parts)}
    pooled_scores, pooled_ids = calibration.pooled_scores, calibration.pooled_ids
    if pooled_ids is not None:
        shapes |= dict.fromkeys(("pooled_scores", "pooled_ids"), (pooled_ids.numel(),))
    for name, tensor in calibration.tensors().items():
        shape, floating = tuple(tensor.shape), not name.endswith("_ids")
        if shape != shapes[name]:
            raise ValueError(f"{name} has shape {shape}; expected is {shapes[name]}")
        if tensor.is_floating_point() != floating or not floating and tensor.dtype != torch.int64:
            raise ValueError(f"{name} is of type {tensor.dtype}; it must be {'floating' if floating else 'int64'}")
        if floating and not tensor.isfinite().all():
            raise ValueError(f"{name} holds a NaN or an infinity")
        if name.endswith("weights") and (tensor < 0).any():
            raise ValueError(f"{name} holds a number below 0")
        if not floating and not ((tensor >= 0) & (tensor < groups)).all():
            raise ValueError(f"{name} holds a number that is none of the {groups} groups, from 0 on")
    if pooled_scores is not None and pooled_ids is not None:
        for k in pooled_ids.unique().tolist():
            if (pooled_scores[pooled_ids == k].diff() < 0).any():
                raise ValueError("the pooled_scores of a group are not in ascending order")
