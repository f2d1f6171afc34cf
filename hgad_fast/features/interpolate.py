"""Bilinear interpolation of any part of a resized map, for maps too large to be resized as a whole."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Between(NamedTuple):
    """Where positions of a resized axis lie on the original one: between two of its positions."""

    first: Tensor  # int64
    second: Tensor  # int64, one more, except at the end
    share: Tensor  # float32, how far from the first

    def part(self, start: int, stop: int, origin: int) -> Between:
        """Some of the positions, for a piece of the axis that begins at `origin`."""
        first, second, share = (t[start:stop] for t in self)
        return Between(first - origin, second - origin, share)


def between(index: Tensor, n: int, resized: int, *, align_corners: bool) -> Between:
    """Of positions `index` (r,) int64 on an axis of n positions that becomes one of `resized`.

    Coordinates are float32, as `torch.nn.functional.interpolate` has them.
    """
    at = index.float()
    if align_corners:
        at = at * (torch.tensor(n - 1.0) / max(resized - 1, 1)).item()
    else:
        at = ((at + 0.5) * (torch.tensor(float(n)) / resized).item() - 0.5).clamp(min=0)
    first = at.long().clamp(max=n - 1)
    return Between(first, (first + 1).clamp(max=n - 1), (at - first).clamp(max=1))


def bilinear(x: Tensor, rows: Between, columns: Between) -> Tensor:
    """Maps (..., h, w) at rows (r,) and columns (c,): (..., r, c)."""
    across, down = columns.share.to(x.dtype), rows.share.to(x.dtype)[:, None]

    def row(at: Tensor) -> Tensor:
        at = at[:, None]
        return torch.lerp(x[..., at, columns.first], x[..., at, columns.second], across)

    return torch.lerp(row(rows.first), row(rows.second), down)
