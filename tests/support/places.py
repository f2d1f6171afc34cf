"""What the tests of the definition and of the kernels share about distances by place: cases, and what is right."""

from __future__ import annotations

import rounding
import torch
from torch import Tensor

SIZES = {  # K, P, d, m
    "one of each": (1, 1, 1, 1),
    "as many columns as channels": (3, 12, 20, 20),
    "fewer columns than channels": (3, 7, 37, 5),
    "one column": (2, 6, 20, 1),
    "one channel, more columns": (2, 6, 1, 3),
    "one channel, one column": (2, 3, 1, 1),
    "one class": (1, 5, 50, 7),
    "more columns than channels": (2, 4, 3, 40),
    "several blocks of channels and columns": (2, 5, 70, 150),
    "whole blocks": (2, 4, 64, 128),
    "one more than whole blocks": (2, 3, 65, 129),
}
PLACES = {  # of pixels, given how many places there are
    "one image": torch.arange,
    "images": lambda P: torch.arange(P).repeat(3),
    "many images": lambda P: torch.arange(P).repeat(17),
    "one image in another order": torch.randperm,
    "some places": lambda P: torch.arange(P)[::2],
    "one pixel": lambda P: torch.tensor([P - 1]),
    "nothing": lambda P: torch.zeros(0, dtype=torch.int64),
    "any": lambda P: torch.randint(P, (61,)),
    "few in most places, many in one": lambda P: torch.cat([torch.randint(P, (9,)), torch.full((150,), P // 2)]),
}


def draw(
    place: Tensor,
    K: int,
    P: int,
    d: int,
    m: int,
    dtype: torch.dtype = torch.float32,
    tables: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return pixels of `dtype`, their places, and means and factors of `tables` (float32, float64 for float64 x)."""
    precision = torch.promote_types(dtype, torch.float32)
    x, mean = 3 + torch.randn(len(place), d, dtype=precision), 3 + torch.randn(K, P, d, dtype=precision)
    factor = torch.randn(K, P, d, m, dtype=precision)
    return x.to(dtype), place, mean.to(tables or precision), factor.to(tables or precision)


def right(x: Tensor, place: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    """Return the distances (N, K) with a mean and a factor for each pixel and class."""
    offsets = x - mean[:, place]
    return (offsets[:, :, None] @ factor[:, place]).squeeze(2).square().sum(2).T


def assert_right(actual: Tensor, x: Tensor, place: Tensor, mean: Tensor, factor: Tensor) -> None:
    """Check type and shape, and that the values are what rounding can make of the formula."""
    precision = torch.promote_types(x.dtype, torch.float32)
    assert actual.dtype == precision and actual.shape == (len(x), len(mean)) and not actual.requires_grad
    rounding.assert_close(actual, right, x, place, mean, factor, precision=precision)


def strided(t: Tensor) -> dict[str, Tensor]:
    """Return a tensor in other strides, and NaN in all that does not belong to it."""
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 9), torch.nan, dtype=t.dtype)
    long = torch.full((2 * len(t), *t.shape[1:]), torch.nan, dtype=t.dtype)
    tall = torch.full((t.shape[0], 2 * t.shape[1], *t.shape[2:]), torch.nan, dtype=t.dtype)
    wide[..., 4:-5], long[::2], tall[:, ::2] = t, t, t
    order = list(range(t.dim()))[::-1]
    return {
        "columns": wide[..., 4:-5],
        "every second": long[::2],
        "every second of the second": tall[:, ::2],
        "last two exchanged": t.mT.contiguous().mT,
        "all in reverse": t.permute(order).contiguous().permute(order),
    }
