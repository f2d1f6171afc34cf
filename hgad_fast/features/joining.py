"""Layers of a network -> stages (groups of layers averaged) -> levels (the stages of a pass joined on one grid)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import interpolate

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


class JoiningGraph(nn.Module):
    """What `joined` does of stages of fixed sizes, to rounding, by averages of whole cells and products with matrices.

    It is for graphs that other runtimes run: these resize with coordinates of their own, or gather cells of several
    sizes one by one.

    Args:
        sizes: (h, w) of each stage.
        strides: those of the stages.
        grid: the index of the stage on whose grid all are joined.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], strides: Sequence[float], grid: int) -> None:
        super().__init__()
        self.cells: list[tuple[int, int] | None] = []  # of each stage that is averaged by whole cells: their size
        for stage, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
            (h, w), (rows, columns) = size, sizes[grid]
            finer = stride < strides[grid]
            whole = finer and h % rows == 0 and w % columns == 0
            self.cells.append((h // rows, w // columns) if whole else None)
            matrices = (None, None) if whole else (_resizing(h, rows, finer), _resizing(w, columns, finer))
            self.register_buffer(f"rows_{stage}", matrices[0])
            self.register_buffer(f"columns_{stage}", None if matrices[1] is None else matrices[1].T.contiguous())

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        """Return the stages (B, C, h, w) joined along the channels."""
        parts = []
        for stage, (x, cells) in enumerate(zip(stages, self.cells, strict=True)):
            rows, columns = getattr(self, f"rows_{stage}"), getattr(self, f"columns_{stage}")
            x = x if cells in (None, (1, 1)) else F.avg_pool2d(x, cells)
            x = x if rows is None else rows @ x
            parts.append(x if columns is None else x @ columns)
        return torch.cat(parts, 1)


def _resizing(n: int, resized: int, finer: bool) -> Tensor | None:
    """Return the matrix (resized, n), float32, by which `joined` resizes an axis; None: it has the size already."""
    if n == resized:
        return None
    if not finer:
        return interpolate.resizing(n, resized, align_corners=False).float()
    # what `adaptive_avg_pool2d` averages
    ends = [(i * n // resized, -(-(i + 1) * n // resized)) for i in range(resized)]
    return torch.tensor([[float(first <= at < end) / (end - first) for at in range(n)] for first, end in ends])
