"""Layers of a network -> stages (groups of layers averaged) -> levels (the stages of a pass joined on one grid)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

OutIndices = tuple[Any, ...]  # of each stage: the layer, an int, or the layers of a group, a tuple of them


def layers_of(out_indices: OutIndices) -> tuple[int, ...]:
    """Return the layers that the stages of a backbone are made of, in order."""
    return tuple(layer for entry in out_indices for layer in (entry if isinstance(entry, tuple) else (entry,)))


def by_stage(values: Sequence[Any], out_indices: OutIndices) -> list[list[Any]]:
    """Return what is given for each layer as one list for each stage."""
    remaining = iter(values)
    return [[next(remaining) for _ in (entry if isinstance(entry, tuple) else (entry,))] for entry in out_indices]


def stages_of(layers: Sequence[Tensor], out_indices: OutIndices) -> list[Tensor]:
    """Return the stages (B, C, h, w) of layers (B, C, h, w): a layer as it is, a group averaged and normalised.

    The mean of a group has a length of 1 over the channels of each pixel.
    """
    stages = []
    for entry, group in zip(out_indices, by_stage(layers, out_indices), strict=True):
        if not isinstance(entry, tuple):
            stages += group
            continue
        mean = sum(group[1:], start=group[0]) / len(group)
        # over neighbours in memory, so that the order of the sum does not depend on the size of batch and map
        stages.append(F.normalize(mean.permute(0, 2, 3, 1).contiguous(), dim=3).permute(0, 3, 1, 2))
    return stages


def grid_of(strides: Sequence[int], grid_stride: int) -> int:
    """Return the index of the stage on whose grid all are joined: of the stride nearest to `grid_stride`.

    Of two that are equally near it is the finer one.
    """
    return min(range(len(strides)), key=lambda stage: (abs(strides[stage] - grid_stride), strides[stage]))


def joined(stages: Sequence[Tensor], strides: Sequence[float], grid: int) -> Tensor:
    """Return stages (B, C, h, w) joined along the channels, on the grid of the stage of index `grid`.

    Finer stages are averaged, coarser ones interpolated (bilinear, corners not aligned).
    """
    size = (stages[grid].shape[2], stages[grid].shape[3])
    parts = []
    for x, stride in zip(stages, strides, strict=True):
        x = x.contiguous(memory_format=torch.channels_last)  # one layout: the others round in another way
        if x.shape[2:] != size:
            if stride < strides[grid]:
                x = F.adaptive_avg_pool2d(x, size)
            else:
                x = F.interpolate(x, size, mode="bilinear", align_corners=False)
        parts.append(x)
    return torch.cat(parts, 1)


def joined_plainly(stages: Sequence[Tensor], strides: Sequence[float], grid: int) -> Tensor:
    """Return what `joined` does, to rounding, by averages of whole cells and products with constant matrices.

    It is for graphs that other runtimes run: these resize with coordinates of their own, or gather cells of several
    sizes one by one.
    """
    size = (stages[grid].shape[2], stages[grid].shape[3])
    parts = []
    for x, stride in zip(stages, strides, strict=True):
        h, w = x.shape[2], x.shape[3]
        finer = stride < strides[grid]
        if finer and h % size[0] == 0 and w % size[1] == 0:
            parts.append(F.avg_pool2d(x, (h // size[0], w // size[1])))
            continue
        weights = _averages if finer else _interpolations
        if h != size[0]:
            x = torch.tensor(weights(h, size[0]), dtype=x.dtype, device=x.device) @ x
        if w != size[1]:
            x = x @ torch.tensor(weights(w, size[1]), dtype=x.dtype, device=x.device).T
        parts.append(x)
    return torch.cat(parts, 1)


def _averages(n: int, cells: int) -> list[list[float]]:
    """Return the weights (cells, n) by which `adaptive_avg_pool2d` averages n positions of an axis."""
    ends = [(i * n // cells, -(-(i + 1) * n // cells)) for i in range(cells)]
    return [[float(first <= at < end) / (end - first) for at in range(n)] for first, end in ends]


def _interpolations(n: int, resized: int) -> list[list[float]]:
    """Return the weights (resized, n) by which `interpolate` reads an axis, bilinear and with corners not aligned."""
    rows = []
    for i in range(resized):
        at = min(max((i + 0.5) * n / resized - 0.5, 0), n - 1)
        rows.append([max(1 - abs(at - position), 0) for position in range(n)])
    return rows
