"""What the tests of the definition and of the kernel share about distances by place: what is right, and cases of it."""

from __future__ import annotations

import torch
from torch import Tensor

SIZES = {  # K, P, d, m
    "several blocks of channels and columns": (2, 5, 70, 67),
    "one of each": (1, 1, 1, 1),
    "fewer columns than channels": (3, 7, 37, 5),
    "one column": (2, 6, 20, 1),
    "one channel, more columns": (2, 6, 1, 3),
    "whole blocks": (2, 4, 64, 64),
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


def draw(K: int, P: int, d: int, m: int, place: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Return x (N, d), mean and factor."""
    table = torch.promote_types(dtype, torch.float32)
    factor = torch.randn(K, P, d, m, dtype=table)
    return torch.randn(len(place), d).to(dtype), torch.randn(K, P, d, dtype=table), factor


def strided(t: Tensor) -> dict[str, Tensor]:
    """Return a tensor in other strides, and NaN in all that does not belong to it."""
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 9), torch.nan, dtype=t.dtype)
    tall = torch.full((t.shape[0], 2 * t.shape[1], *t.shape[2:]), torch.nan, dtype=t.dtype)
    wide[..., 4:-5], tall[:, ::2] = t, t
    return {
        "columns": wide[..., 4:-5],
        "rows": tall[:, ::2],
        "transposed": t.mT.contiguous().mT,
        "reversed": t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim()))),
    }


def right(place: Tensor, x: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    """Return the distances (N, K) with a mean and a factor for each pixel and class."""
    offsets = x - mean[:, place]
    return (offsets[:, :, None] @ factor[:, place]).squeeze(2).square().sum(2).T
