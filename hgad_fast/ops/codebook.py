"""Vector quantisation: the nearest code of each row, and the statistics that a codebook learns from.

VQ-Flow (arXiv 2409.00942, the section on quantisation) assigns every pixel to the nearest entry of a codebook, and
moves the entries by exponential moving averages of how many pixels each one got, and of their sums. Neither operation
has a gradient: an index is a step function of its inputs, and the statistics update buffers.

Symbols: N rows (pixels, or images); D channels; K codes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import fused

CHUNK_BYTES = 4 << 20  # of distances, and of rows in the precision of the products, that the definition holds at a time


def _check_nearest(x: Tensor, codes: Tensor) -> None:
    """Raise a ValueError where a shape or a dtype does not fit."""
    if x.dim() != 2 or codes.dim() != 2 or x.shape[1] != codes.shape[1] or not codes.numel():
        raise ValueError(
            f"x {tuple(x.shape)} must be (N, D), and codes {tuple(codes.shape)} then (K, D), with at least one of each"
        )
    for name, tensor in (("x", x), ("codes", codes)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; it must be of a floating-point type")


@fused("codebook", check=_check_nearest)
def nearest_code(x: Tensor, codes: Tensor) -> Tensor:
    r"""Return the index of the code nearest to each row.

    .. math:: i_n = \arg\min_k |x_n - e_k|^2 = \arg\min_k \left( |e_k|^2 - 2 x_n \cdot e_k \right)

    What all distances of a row have in common, :math:`|x_n|^2`, is left out: it would cost digits. The rest is exact to
    some 1e-7 of :math:`|x_n| |e_k|` in float32, and codes whose distances differ by less are not told apart: vectors
    that lie close together and far from the origin should be moved there. Rows are taken in chunks, so that the N K
    distances never exist together.

    Args:
        x: rows of any strides, shape (N, D), in any floating-point type.
        codes: the codebook, of any strides, shape (K, D).

    Returns:
        Indices (N,) in int64, always from 0 to K - 1, without a gradient. Of equal distances the first wins. A distance
        that is NaN is not less than any: a code with NaN in it is nobody's nearest, and a row with NaN gets code 0. (A
        row with an infinite element gets some code.) Arithmetic is float64 for float64 x, and float32 for all else.

    Raises:
        ValueError: the shapes do not fit each other, a type is not one of floating-point, or K or D is 0.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, codes = x.detach(), codes.detach().to(dtype)
    chunk = max(CHUNK_BYTES // ((sum(codes.shape)) * codes.element_size()), 1)
    norms = torch.cat([part.square().sum(1) for part in codes.split(chunk)])
    indices = torch.empty(len(x), dtype=torch.int64, device=x.device)
    for rows, nearest in zip(x.split(chunk), indices.split(chunk), strict=True):
        distances = torch.addmm(norms, rows.to(dtype), codes.T, alpha=-2)
        nearest.copy_(distances.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).argmin(1))
    return indices


def _check_statistics(x: Tensor, indices: Tensor, K: int) -> None:
    """Raise a ValueError where a shape, a dtype, or an index on the CPU does not fit."""
    if x.dim() != 2 or indices.shape != x.shape[:1]:
        raise ValueError(f"x {tuple(x.shape)} must be (N, D), and indices {tuple(indices.shape)} then (N,)")
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; it must be of a floating-point type")
    if indices.dtype != torch.int64:
        raise ValueError(f"indices are {indices.dtype}; they must be torch.int64")
    if K < 1:
        raise ValueError(f"K is {K}; a codebook has at least one code")
    if indices.device.type == "cpu" and indices.numel() and not torch.compiler.is_compiling():
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= K:
            raise ValueError(f"indices name a code {low if low < 0 else high}; allowed are 0 to {K - 1}")


@fused("codebook", check=_check_statistics)
def code_statistics(x: Tensor, indices: Tensor, K: int) -> tuple[Tensor, Tensor]:
    r"""Count the rows of each code, and add them up.

    .. math:: n_k = |\{n : i_n = k\}|, \quad S_k = \sum_{n : i_n = k} x_n

    The rows of a code are added one after the other, in their order in `x`. That holds for the kernel too, so a sum has
    the same bits in every run and on every device. There is no one-hot matrix and no atomic addition: a stable sort
    makes the rows of a code neighbours. Where one code owns nearly all rows, as of a codebook that has collapsed, its
    sum is one long chain of additions, and takes a GPU milliseconds.

    Args:
        x: rows of any strides, shape (N, D), in any floating-point type.
        indices: the code of each row, shape (N,), int64.
        K: how many codes there are.

    Returns:
        Counts (K,) and sums (K, D), in float32 (float64 for float64 x), without gradients.

    Raises:
        ValueError: the shapes do not fit each other, a type is a wrong one, K is less than 1, or, on the CPU, an index
            is not from 0 to K - 1. A look at those on another device would wait for it: there, they count as the
            nearest one that is.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    in_order, order = indices.clamp(0, K - 1).sort(stable=True)
    edges = torch.searchsorted(in_order, torch.arange(K + 1, device=indices.device))  # where each code's rows start
    counts = edges.diff().to(dtype)
    if not x.numel():
        return counts, x.new_zeros((K, x.shape[1]), dtype=dtype)
    return counts, F.embedding_bag(order, x.detach().to(dtype), edges, mode="sum", include_last_offset=True)
