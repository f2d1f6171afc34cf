"""Bilinear interpolation of any part of a resized map, for maps too large to be resized as a whole."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BAND_PIXELS = 2**20  # pixels of a map that are computed together


class Between(NamedTuple):
    """Positions (r,) of a resized axis on the original one: each lies between two positions of that."""

    first: Tensor  # int64
    second: Tensor  # int64, one more, except at the end
    share: Tensor  # float32, the distance from the first

    def part(self, start: int, stop: int, origin: int) -> Between:
        """Return positions start to stop, counted on a piece of the original axis that begins at `origin`."""
        first, second, share = (field[start:stop] for field in self)
        return Between(first - origin, second - origin, share)


def between(index: Tensor, n: int, resized: int, *, align_corners: bool) -> Between:
    """Locate positions `index` (r,) int64 of an axis of `resized` positions on the original axis of n positions.

    Coordinates are float32, as `torch.nn.functional.interpolate` has them.
    """
    coordinate = index.float()
    if align_corners:
        coordinate = coordinate * (torch.tensor(n - 1.0) / max(resized - 1, 1)).item()
    else:
        coordinate = ((coordinate + 0.5) * (torch.tensor(float(n)) / resized).item() - 0.5).clamp(min=0)
    first = coordinate.long().clamp(max=n - 1)
    return Between(first, (first + 1).clamp(max=n - 1), (coordinate - first).clamp(max=1))


def weights_of(positions: Between, n: int) -> Tensor:
    """Return the interpolation at positions (r,) of an axis of n positions as a matrix (r, n), float64."""
    weights = torch.zeros(len(positions.first), n, dtype=torch.float64)
    every, share = torch.arange(len(weights)), positions.share.double()
    weights[every, positions.first] = 1 - share
    weights[every, positions.second] += share  # at the end it is the first once more
    return weights


def resizing(n: int, resized: int, *, align_corners: bool) -> Tensor:
    """Return the matrix (resized, n), float64, that resizes an axis of n positions, bilinear."""
    return weights_of(between(torch.arange(resized), n, resized, align_corners=align_corners), n)


def bilinear(x: Tensor, rows: Between, columns: Between) -> Tensor:
    """Interpolate maps (..., h, w) at rows (r,) and columns (c,): (..., r, c)."""
    row_share, column_share = rows.share.to(x.dtype)[:, None], columns.share.to(x.dtype)

    def along_rows(index: Tensor) -> Tensor:
        index = index[:, None]
        return torch.lerp(x[..., index, columns.first], x[..., index, columns.second], column_share)

    return torch.lerp(along_rows(rows.first), along_rows(rows.second), row_share)
