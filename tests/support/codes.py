"""What the tests of the definitions and of the kernels share about codes: what is right, and by how much it may differ.

Arithmetic of unit roundoff u computes |e|^2 - 2 x.e, in whatever order, within

    b = (D + 8) u (|e|^2 + 2 sum_d |x_d e_d|)

of the exact value: D u for sums of D products (gamma_n = n u / (1 - n u), Higham, "Accuracy and stability of numerical
algorithms", 2002, section 3.1), u for the last addition, 4 u for the product of two small pieces that a product in
three pieces of 11 bits leaves out, and the rest for gamma's denominator. The code found may be farther away than the
nearest by the errors of both distances, and no more: beyond that margin the indices have to agree.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIZES = {  # N, D, K
    "several blocks of rows, codes and channels": (150, 37, 70),
    "one of each": (1, 1, 1),
    "one channel": (20, 1, 5),
    "one code": (20, 7, 1),
    "whole blocks": (64, 32, 64),
    "one more than whole blocks": (65, 33, 65),
    "three blocks of codes": (10, 48, 129),
}


def draw(N: int, D: int, K: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return rows around codes, and the codes: every code is somebody's nearest if the rows suffice."""
    codes = torch.randn(K, D, dtype=torch.promote_types(dtype, torch.float32))
    return (codes[torch.arange(N) % K] + 0.5 * torch.randn(N, D)).to(dtype), codes


def draw_near_ties(N: int = 400, D: int = 24, K: int = 70, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return rows all but in the middle of two codes, at distances down to what rounding hides; and the codes."""
    codes = torch.randn(K, D)
    first = torch.randint(K, (N,))
    second = (first + torch.randint(1, K, (N,))) % K
    aside = 10 ** -(1 + 6 * torch.rand(N, 1, dtype=torch.float64))
    e, f = codes[first].double(), codes[second].double()
    return ((e + f) / 2 + aside * (e - f)).to(dtype), codes


def strided(x: Tensor) -> dict[str, Tensor]:
    """Return a matrix in other strides, and NaN in all that does not belong to it."""
    n, d = x.shape
    wide, tall = torch.full((n, d + 9), torch.nan, dtype=x.dtype), torch.full((2 * n, d), torch.nan, dtype=x.dtype)
    wide[:, 4 : 4 + d], tall[::2] = x, x
    return {"columns": wide[:, 4 : 4 + d], "rows": tall[::2], "transposed": x.T.contiguous().T}


def squared_distances(x: Tensor, codes: Tensor) -> Tensor:
    """Return the squared distances (N, K) by explicit differences in float64."""
    return (x.double()[:, None] - codes.double()).square().sum(2)


def assert_nearest(indices: Tensor, x: Tensor, codes: Tensor) -> None:
    """Check that each index is that of the nearest code, or of one that rounding cannot tell from it."""
    assert indices.dtype == torch.int64 and indices.shape == x.shape[:1] and not indices.requires_grad
    distances = squared_distances(x, codes)
    x, codes, eps = x.double(), codes.double(), torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    scale = codes.square().sum(1) + 2 * x.abs() @ codes.abs().T
    bounds = (x.shape[1] + 8) * eps / 2 * scale
    found, nearest = indices[:, None], distances.argmin(1, keepdim=True)
    excess = distances.gather(1, found) - distances.gather(1, nearest)
    allowed = bounds.gather(1, found) + bounds.gather(1, nearest)
    assert (excess <= allowed).all(), f"farther than the nearest by {excess.max():.3g}"


def sums_in_order(x: Tensor, indices: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Return counts and sums, the rows added one after the other."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    counts, sums = torch.zeros(K, dtype=dtype), torch.zeros(K, x.shape[1], dtype=dtype)
    for row, k in zip(x.to(dtype), indices.tolist(), strict=True):
        counts[k] += 1
        sums[k] += row
    return counts, sums
