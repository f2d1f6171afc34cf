"""Squared Mahalanobis distances of pixels to the Gaussians of their places: what a place Gaussian scores with.

Each class has a Gaussian at each place of a grid (PaDiM, arXiv 2011.08785, has one at each place). Its inverse
covariance is given by a factor, F F^T, so that a distance is the squared length of a vector times a matrix.

Symbols: N pixels; D channels; P places; K classes; M columns of a factor, D as a rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import fused

CHUNK_BYTES = 4 << 20  # of pixels, less their means and times their factors, that the definition holds at a time


def _check_place(x: Tensor, place: Tensor, mean: Tensor, factor: Tensor) -> None:
    """Raise a ValueError where a shape, a dtype, or a place on the CPU does not fit."""
    if x.dim() != 2 or place.shape != x.shape[:1]:
        raise ValueError(f"x {tuple(x.shape)} must be (N, D), and place {tuple(place.shape)} then (N,)")
    if mean.dim() != 3 or mean.shape[2] != x.shape[1] or not mean.numel():
        raise ValueError(
            f"mean {tuple(mean.shape)} must be (K, P, D) with D = {x.shape[1]} as in x {tuple(x.shape)}, and at least "
            "one of each"
        )
    if factor.dim() != 4 or factor.shape[:3] != mean.shape or not 1 <= factor.shape[3]:
        raise ValueError(
            f"factor {tuple(factor.shape)} must be (K, P, D, M) with K, P, D of mean {tuple(mean.shape)}, and at least "
            "one column"
        )
    for name, tensor in (("x", x), ("mean", mean), ("factor", factor)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; it must be of a floating-point type")
    if place.dtype != torch.int64:
        raise ValueError(f"place is {place.dtype}; it must be torch.int64")
    if place.device.type == "cpu" and place.numel() and not torch.compiler.is_compiling():
        low, high = (int(edge) for edge in place.aminmax())
        if low < 0 or high >= mean.shape[1]:
            raise ValueError(f"place names a place {low if low < 0 else high}; allowed are 0 to {mean.shape[1] - 1}")


@fused("place", check=_check_place)
def place_distances(x: Tensor, place: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    r"""Return the squared Mahalanobis distance of each pixel to its place's Gaussian, for each class.

    .. math:: D_{nk} = \left| (x_n - \mu_{k p_n})^T F_{k p_n} \right|^2, \quad \Sigma_{kp}^{-1} = F_{kp} F_{kp}^T

    Classes are taken one after the other and places in chunks; nothing of N D K elements exists, and no factor is
    copied for a pixel. Reading the factors is what few pixels a place take their time for. Where the channels of a
    column follow each other in memory (``factor.stride(2) == 1``: a table stored as (K, P, M, D), transposed), a CPU
    reads them several times as fast for one pixel a place, and as fast for many.

    A difference is rounded once, a product of D terms and a sum of M squares as float32 rounds them: a distance is
    exact to some (D + M) 6e-8 of :math:`\sum_m (\sum_d |x_d - \mu_d| |F_{dm}|)^2`, at worst.

    On a CPU, a pixel that is the only one of its place, where all places have at most one, has the same bits in any
    company and in any order; so have pixels of a batch whose images are given one by one. With several pixels a place,
    how they are multiplied depends on how many there are. Classes never depend on each other.

    Args:
        x: pixels of any strides, shape (N, D), in any floating-point type.
        place: the place of each pixel, shape (N,), int64. Pixels in any order and any number of a place; images one
            after the other, each with all P places in order, need no sorting.
        mean: of each class and place, of any strides, shape (K, P, D).
        factor: of the inverse covariances, of any strides, shape (K, P, D, M).

    Returns:
        Distances (N, K) in float32 (float64 for float64 x), without a gradient. A pixel with NaN has distances of NaN.

    Raises:
        ValueError: the shapes do not fit each other, a type is a wrong one, K, P, D or M is 0, or, on the CPU, a place
            is not from 0 to P - 1. A look at those on another device would wait for it: there, they count as the
            nearest one that is.
    """
    x, mean, factor = x.detach(), mean.detach(), factor.detach()
    if torch.compiler.is_compiling():
        return _place_distances(x, place, mean, factor)
    return _distances(x, place, mean, factor)


class _Block(NamedTuple):
    """Consecutive places, and as many pixels of each."""

    first: int  # of the places
    stop: int
    x: Tensor  # (places, pixels, D); where a place has fewer, other pixels fill up
    rows: Tensor | slice  # of the results: the pixels in `x` that count
    counted: Tensor | slice  # where these are in `x`, place by place


def _distances(x: Tensor, place: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    K, P, D, M = factor.shape
    distances = torch.empty((K, len(x)), dtype=dtype, device=x.device)
    most = max(CHUNK_BYTES // ((D + M) * dtype.itemsize), 1)
    for block in _blocks(x, place.clamp(0, P - 1), P, most):
        pixels = block.x.to(dtype)
        for k in range(K):
            means, factors = (table[k, block.first : block.stop].to(dtype) for table in (mean, factor))
            offsets = torch.empty(pixels.shape, dtype=dtype, device=x.device)
            torch.sub(pixels, means[:, None], out=offsets)
            # Strides decide how a product of one pixel is computed: these make it dot products with rows of memory.
            if factors.stride(1) == 1:
                lengths = torch.bmm(factors.mT, offsets.mT).square_().sum(1)
            else:
                lengths = torch.bmm(offsets, factors).square_().sum(2)
            distances[k, block.rows] = lengths.flatten()[block.counted]
    return distances.T


def _blocks(x: Tensor, place: Tensor, P: int, most: int) -> Iterator[_Block]:
    """Yield all pixels, by place, in blocks of about `most`."""
    everything, N = slice(None), len(x)
    if N and N % P == 0 and torch.equal(place.view(-1, P), torch.arange(P, device=place.device).expand(N // P, P)):
        images = x.unflatten(0, (-1, P)).transpose(0, 1)
        if N <= most:
            yield (
                _Block(0, P, images, everything, everything)
                if N == P
                else _Block(0, P, images, torch.arange(N, device=x.device).view(-1, P).T.flatten(), everything)
            )
            return
    order = place.argsort(stable=True)
    counts = torch.bincount(place, minlength=P)
    starts = counts.cumsum(0) - counts
    # Up to 4 pixels a place cost what one costs, for the factor has to be read. More are rounded up to powers of two,
    # so that neighbours go together; the waste is less than half.
    widths = 2 ** counts.clamp(min=4).sub(1).log2().floor().add(1).long()
    widths = torch.where(counts > 0, widths, 0)
    same, lengths = torch.unique_consecutive(widths, return_counts=True)
    first = 0
    for width, length in zip(same.tolist(), lengths.tolist(), strict=True):
        stop = first + length
        if width:
            together = max(most // width, 1)
            for begin in range(first, stop, together):
                end = min(begin + together, stop)
                width_here = int(counts[begin:end].max())
                for rank in range(0, width_here, most):
                    ranks = torch.arange(rank, min(rank + most, width_here), device=x.device)
                    at = starts[begin:end, None] + ranks
                    counted = (ranks < counts[begin:end, None]).flatten().nonzero().squeeze(1)
                    rows = order[at.clamp(max=N - 1)]
                    yield _Block(begin, end, x[rows], rows.flatten()[counted], counted)
        first = stop


@torch.library.custom_op("hgad_fast::place_distances", mutates_args=())
def _place_distances(x: Tensor, place: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    return _distances(x, place, mean, factor)


@_place_distances.register_fake
def _(x: Tensor, place: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    return x.new_empty((mean.shape[0], len(x)), dtype=torch.promote_types(x.dtype, torch.float32)).T
