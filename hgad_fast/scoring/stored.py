"""A calibration as a model file holds it, which may come from anywhere: checked like the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .calibration import POOLED_TENSORS, TENSORS, WEIGHT_TENSORS, Calibration

IDS = ("class_ids", "pooled_ids")


def stored_calibration(
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    *,
    groups: int,
    levels: int,
    parts: int,
    fusion: str,
) -> Calibration:
    """Return the calibration that `Calibration.tensors` and `Calibration.settings` came from.

    Args:
        tensors: by their names.
        settings: likewise.
        groups: G, the number of groups of the model.
        levels: S, that of the levels of its densities.
        parts: that of the parts of its densities.
        fusion: its rule that makes one map of them.

    Raises:
        ValueError: one of them is missing or unknown, or cannot be that of such a model; the message names it.
    """
    names = {*TENSORS, *WEIGHT_TENSORS, *POOLED_TENSORS}
    known = {attribute.name for attribute in fields(Calibration) if attribute.init} - names
    for name in TENSORS:
        if name not in tensors:
            raise ValueError(f"the tensor {name} is missing")
    if unknown := sorted({*tensors} - names) + sorted({*settings} - known):
        raise ValueError(f"{unknown[0]!r} is unknown")
    given: dict[str, Any] = {**tensors, **settings}
    calibration = Calibration(**given)
    _check_settings(calibration)
    scored_alone = calibration.scored_on != "map"
    if fusion != "product" and (parts > 1 or scored_alone):
        for name in WEIGHT_TENSORS if scored_alone else WEIGHT_TENSORS[:1]:
            if name not in tensors:
                raise ValueError(f"the tensor {name} is missing, without which maps cannot be fused ({fusion})")
    _check_tensors(calibration, groups, levels, parts)
    return calibration


def _check_settings(calibration: Calibration) -> None:
    rate, size, share = calibration.false_alarm_rate, calibration.img_size, calibration.share
    whole = isinstance(size, int) and not isinstance(size, bool) and size >= 1
    for name, holds, allowed in (
        ("false_alarm_rate", _is_number(rate) and 0 < rate < 1, "a number above 0 and below 1"),
        ("img_size", size is None or size == "native" or whole, "a whole number from 1, 'native', or null"),
        ("borrowing", isinstance(calibration.borrowing, bool), "true or false"),
        ("share", _is_number(share) and 0 <= share <= 1, "a number from 0 to 1"),
        ("scored_on", calibration.scored_on in ("map", "all"), "'map' or 'all'"),
    ):
        if not holds:
            raise ValueError(f"{name} is {str(getattr(calibration, name))[:100]!r}; allowed: {allowed}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_tensors(calibration: Calibration, groups: int, levels: int, parts: int) -> None:
    tensors = calibration.tensors()
    if len(tensors.keys() & POOLED_TENSORS) == 1:
        raise ValueError(f"one of the tensors {' and '.join(POOLED_TENSORS)} is missing")
    images, pooled = (calibration.class_ids.numel(),), (tensors.get("pooled_ids", calibration.class_ids).numel(),)
    shapes = {"level_max": (groups, levels), "scores": images, "class_ids": images}
    shapes |= dict.fromkeys(WEIGHT_TENSORS, (groups, parts)) | dict.fromkeys(POOLED_TENSORS, pooled)
    for name, tensor in tensors.items():
        shape, is_ids = tuple(tensor.shape), name in IDS
        if shape != shapes[name]:
            raise ValueError(f"{name} has shape {shape}; expected is {shapes[name]}")
        if tensor.is_floating_point() == is_ids or is_ids and tensor.dtype != torch.int64:
            raise ValueError(f"{name} is of type {tensor.dtype}; it must be {'int64' if is_ids else 'floating'}")
        if not is_ids and not tensor.isfinite().all():
            raise ValueError(f"{name} holds a NaN or an infinity")
        if name in WEIGHT_TENSORS and (tensor < 0).any():
            raise ValueError(f"{name} holds a number below 0")
        if is_ids and not ((tensor >= 0) & (tensor < groups)).all():
            raise ValueError(f"{name} holds a number that is none of the {groups} groups, from 0 on")
    if "pooled_ids" in tensors:
        ids, order = tensors["pooled_ids"].sort(stable=True)
        descending = (tensors["pooled_scores"][order].diff() < 0) & (ids.diff() == 0)
        if descending.any():
            raise ValueError(f"pooled_scores do not ascend in group {int(ids[1:][descending][0])}")
