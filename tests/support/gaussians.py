"""What the tests of the definition and of the kernels share about Gaussians of places: inputs, and what is right."""

from __future__ import annotations

import rounding
import torch
from torch import Tensor

SIZES = {  # N, P, K, D, M
    "a pixel a place": (12, 12, 3, 20, 20),
    "places without a pixel": (5, 12, 2, 37, 37),
    "one of each": (1, 1, 1, 1, 1),
    "one channel, several places": (20, 3, 2, 1, 1),
    "one class, fewer columns than channels": (40, 5, 1, 50, 7),
    "more columns than channels": (9, 4, 2, 3, 40),
    "several blocks of channels and columns": (9, 9, 2, 70, 150),
    "several blocks of pixels, channels and columns": (40, 2, 2, 70, 150),
    "whole blocks": (64, 4, 2, 64, 128),
    "one more than whole blocks": (51, 3, 2, 65, 129),
    "many pixels a place": (150, 3, 2, 19, 16),
}


def draw(
    N: int, P: int, K: int, D: int, M: int, dtype: torch.dtype = torch.float32, tables: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return pixels of `dtype` at random places, and means and factors of `tables` (float32, float64 for float64 x)."""
    tables = tables or torch.promote_types(dtype, torch.float32)
    x = (3 + torch.randn(N, D)).to(dtype)
    mean, factor = 3 + torch.randn(K, P, D), torch.randn(K, P, D, M)
    return x, torch.randint(P, (N,)), mean.to(tables), factor.to(tables)


def distances(x: Tensor, place: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    """Return the squared distances (N, K), every pixel with a copy of its matrix."""
    offsets = x - mean[:, place]
    return (offsets[:, :, None] @ factor[:, place]).square().sum((2, 3)).T


def assert_distances(actual: Tensor, x: Tensor, place: Tensor, mean: Tensor, factor: Tensor) -> None:
    """Check type and shape, and that the values are what rounding can make of the formula."""
    precision = torch.promote_types(x.dtype, torch.float32)
    assert actual.dtype == precision and actual.shape == (len(x), len(mean)) and not actual.requires_grad
    rounding.assert_close(actual, distances, x, place, mean, factor, precision=precision)


def strided(t: Tensor) -> dict[str, Tensor]:
    """Return a tensor in other strides, and NaN in all that does not belong to it."""
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 9), torch.nan, dtype=t.dtype)
    wide[..., 4 : 4 + t.shape[-1]] = t
    long = torch.full((2 * len(t), *t.shape[1:]), torch.nan, dtype=t.dtype)
    long[::2] = t
    order = list(range(t.dim()))[::-1]
    return {
        "columns": wide[..., 4 : 4 + t.shape[-1]],
        "every second": long[::2],
        "last two exchanged": t.mT.contiguous().mT,
        "all in reverse": t.permute(order).contiguous().permute(order),
    }
