"""Squared Mahalanobis distances of pixels to the Gaussian of their place, for each class.

Of a place Gaussian (PaDiM, arXiv 2011.08785, has one a place; here there is one a class and place) a pixel knows its own
place alone: the products are those of many small matrices, one for each class and place, with the few pixels of that
place. Of a single image each place has one pixel, and all that takes time is to read the matrices once.

Symbols: N pixels; d features; P places; K classes; m columns of a factor, d where it is square.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import fused

CHUNK_BYTES = 32 << 20  # of pixels, and of factors that are not read in place, that the definition holds at a time


def _check(x: Tensor, place: Tensor, mean: Tensor, factor: Tensor) -> None:
    """Raise a ValueError where a shape, a dtype, or a place on the CPU does not fit."""
    if x.dim() != 2 or place.shape != x.shape[:1]:
        raise ValueError(f"x {tuple(x.shape)} must be (N, d), and place {tuple(place.shape)} then (N,)")
    if factor.dim() != 4 or mean.shape != factor.shape[:3] or factor.shape[2] != x.shape[1] or 0 in factor.shape:
        raise ValueError(
            f"factor {tuple(factor.shape)} must be (K, P, d, m), with at least one of each, mean {tuple(mean.shape)} "
            f"then (K, P, d), and x {tuple(x.shape)} (N, d)"
        )
    for name, tensor in (("x", x), ("mean", mean), ("factor", factor)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; it must be of a floating-point type")
    if place.dtype != torch.int64:
        raise ValueError(f"place is {place.dtype}; it must be torch.int64")
    if place.device.type == "cpu" and place.numel() and not torch.compiler.is_compiling():
        low, high, places = int(place.min()), int(place.max()), factor.shape[1]
        if low < 0 or high >= places:
            raise ValueError(f"place has a {low if low < 0 else high}; allowed are 0 to {places - 1}")


@fused("place", check=_check)
def place_distances(x: Tensor, place: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    r"""Return the squared Mahalanobis distances of pixels to the Gaussians of their place, one for each class.

    .. math:: D_{nk} = \left| (x_n - \mu_{k p_n}) F_{k p_n} \right|^2, \quad \Sigma_{kp}^{-1} = F_{kp} F_{kp}^T

    A factor may have fewer columns than rows: with F the transposed inverse of the Cholesky factor of a covariance, its
    first columns give the distance by the first variables alone, and the others what the rest of them adds.

    Pixels are put together by place, and classes follow one another: neither N x d x K values nor a matrix for each
    pixel are ever in memory. Where `place` runs through all places in order, image after image, factors are read where
    they lie, in any strides; rows of m values side by side are read fastest. Arithmetic is float64 for float64 x, and
    float32 for all else, and the distances of a pixel depend on no other pixel but through the order in which a library
    of matrix products adds up d terms.

    Args:
        x: pixels of any strides, shape (N, d), in any floating-point type.
        place: the place of each pixel, from 0 to P - 1, shape (N,), int64.
        mean: shape (K, P, d).
        factor: shape (K, P, d, m).

    Returns:
        Distances (N, K) without a gradient, in float32 (float64 for float64 x). NaN where x is not finite.

    Raises:
        ValueError: the shapes do not fit each other, a type is a wrong one, or, on the CPU, a place is not from 0 to
            P - 1. A look at those on another device would wait for it: there, they count as the nearest one that is.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, mean, factor = x.detach().to(dtype), mean.detach().to(dtype), factor.detach().to(dtype)
    classes, n_places = factor.shape[:2]
    distances = torch.empty(len(x), classes, dtype=dtype, device=x.device)
    every = torch.arange(n_places, device=x.device)
    if len(x) % n_places == 0 and torch.equal(place, every.repeat(len(x) // n_places)):
        by_place = x.view(-1, n_places, x.shape[1]).transpose(0, 1)  # (P, n, d)
        squares = distances.view(-1, n_places, classes).transpose(0, 1)
        step = max(1, CHUNK_BYTES // max(by_place[:1].nbytes, 1))
        for k in range(classes):
            for start in range(0, n_places, step):
                part = slice(start, start + step)
                squares[part, :, k] = _squares(by_place[part], mean[k, part], factor[k, part])
        return distances
    in_order, order = place.clamp(0, n_places - 1).sort(stable=True)
    ends = torch.searchsorted(in_order, every, right=True)
    counts = ends.diff(prepend=ends.new_zeros(1))
    for count in counts.unique().tolist():
        if count == 0:
            continue
        chosen = (counts == count).nonzero().flatten()  # places of this many pixels
        step = max(1, CHUNK_BYTES // (factor[0, :1].nbytes + count * x[:1].nbytes))
        for some in chosen.split(step):
            rows = order[(ends[some] - count)[:, None] + torch.arange(count, device=x.device)]  # (places, count)
            for k in range(classes):
                distances[rows, k] = _squares(x[rows], mean[k, some], factor[k, some])
    return distances


def _squares(x: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    """Return the squared lengths (p, n) of (x - mean) factor, of x (p, n, d), mean (p, d) and factor (p, d, m)."""
    return torch.bmm(x - mean[:, None], factor).square_().sum(2)
