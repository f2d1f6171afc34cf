"""Squared Mahalanobis distances of pixels to the Gaussian of their place, for each class.

A pixel meets the Gaussians of its own place alone (PaDiM, arXiv 2011.08785, has one a place; here each class has one):
the products are those of many small matrices, one for each class and place, with the few pixels of that place. Of a
single image each place has one pixel, and all that takes time is to read the matrices once.

Symbols: N pixels; d features; P places; K classes; m columns of a factor, d where it is square.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .dispatch import fused

CHUNK_BYTES = 4 << 20  # of pixels, and of factors that are not read in place, that the definition holds at a time
CHEAP_PIXELS = 4  # a place's matrix is read in the time that it takes to multiply it with so many


def _check(x: Tensor, place: Tensor | None, mean: Tensor, factor: Tensor) -> None:
    """Raise a ValueError where a type, a shape, a dtype, or a place on the CPU does not fit."""
    for name, value in (("x", x), ("place", place), ("mean", mean), ("factor", factor)):
        if not isinstance(value, Tensor) and (name != "place" or value is not None):
            raise ValueError(
                f"{name} is a {type(value).__name__}; place_distances takes tensors: x (N, d), place (N,) or None, "
                "mean (K, P, d) and factor (K, P, d, m)"
            )
    if x.dim() != 2 or place is not None and place.shape != x.shape[:1]:
        shape = None if place is None else tuple(place.shape)
        raise ValueError(f"x {tuple(x.shape)} must be (N, d), and place {shape} then (N,)")
    if factor.dim() != 4 or mean.shape != factor.shape[:3] or factor.shape[2] != x.shape[1] or 0 in factor.shape:
        raise ValueError(
            f"factor {tuple(factor.shape)} must be (K, P, d, m), with at least one of each, mean {tuple(mean.shape)} "
            f"then (K, P, d), and x {tuple(x.shape)} (N, d)"
        )
    for name, tensor in (("x", x), ("mean", mean), ("factor", factor)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; it must be of a floating-point type")
    if place is None:
        if len(x) % factor.shape[1]:
            raise ValueError(f"x has {len(x)} pixels; without places they must be of images of {factor.shape[1]} each")
        return
    if place.dtype != torch.int64:
        raise ValueError(f"place is {place.dtype}; it must be torch.int64")
    if place.device.type == "cpu" and place.numel() and not torch.compiler.is_compiling():
        (low, high), places = (int(edge) for edge in place.aminmax()), factor.shape[1]
        if low < 0 or high >= places:
            raise ValueError(f"place has a {low if low < 0 else high}; allowed are 0 to {places - 1}")


@fused("place", check=_check)
def place_distances(x: Tensor, place: Tensor | None, mean: Tensor, factor: Tensor) -> Tensor:
    r"""Return the squared Mahalanobis distances of pixels to the Gaussians of their place, one for each class.

    .. math:: D_{nk} = \left| (x_n - \mu_{k p_n}) F_{k p_n} \right|^2, \quad \Sigma_{kp}^{-1} = F_{kp} F_{kp}^T

    A factor may have fewer columns than rows: with F the transposed inverse of the Cholesky factor of a covariance, its
    first columns give the distance by the first variables alone, and the others what the rest of them adds.

    Pixels are put together by place, and classes follow one another: neither N x d x K values nor a matrix for each
    pixel are ever in memory. Factors are read where they lie if one of their last two strides is 1. On a CPU it should
    be that of the rows: ``table.mT`` of a table (K, P, m, d), whose rows of d values are the columns of the factors.
    For one pixel a place that is read several times as fast as a table (K, P, d, m); for many it makes no difference.

    Arithmetic is float64 for float64 x, and float32 for all else: errors are within some (d + m) 1e-7 of
    :math:`\sum_m (\sum_d |x_d - \mu_d| |F_{dm}|)^2`. The order in which a library
    of matrix products adds up d terms depends on how many pixels and places there are: other pixels change last digits.

    Args:
        x: pixels of any strides, shape (N, d), in any floating-point type.
        place: the place of each pixel, from 0 to P - 1, shape (N,), int64. They may come in any order. None: x is of
            whole images, one after the other, whose pixels come in the order of their places; this takes less time.
        mean: of any strides, shape (K, P, d).
        factor: of any strides, shape (K, P, d, m).

    Returns:
        Distances (N, K) without a gradient, in float32 (float64 for float64 x). Not finite where x is not finite.

    Raises:
        ValueError: the shapes do not fit each other, a type is a wrong one, or, on the CPU, a place is not from 0 to
            P - 1. A look at those on another device would wait for it: there, they count as the nearest one that is.
    """
    x, mean, factor = x.detach(), mean.detach(), factor.detach()
    if torch.compiler.is_compiling():  # how pixels are put together depends on values: a graph calls an operator
        return _place_distances(x, place, mean, factor)
    return _distances(x, place, mean, factor)


def _distances(x: Tensor, place: Tensor | None, mean: Tensor, factor: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    (K, P, d, m), N = factor.shape, len(x)
    distances = torch.empty(N, K, dtype=dtype, device=x.device)
    in_place = factor.dtype == dtype and 1 in factor.stride()[2:]
    most_places = P if in_place else max(1, CHUNK_BYTES // (d * m * dtype.itemsize))
    most_pixels = max(1, CHUNK_BYTES // ((d + m) * dtype.itemsize))
    images = N // P
    if place is None or (N == images * P and (place.view(images, P) == torch.arange(P, device=place.device)).all()):
        by_place, results = x.unflatten(0, (images, P)).transpose(0, 1), distances.unflatten(0, (images, P))
        if images == 1 and K > 1 and in_place and factor.stride(0) == P * factor.stride(1):
            step = max(1, most_pixels // P)  # of classes, whose matrices are those of more places
            for classes in (slice(at, at + step) for at in range(0, K, step)):
                pixels = x.to(dtype).expand(len(mean[classes]), P, d).flatten(0, 1)[:, None]
                squares = _squares(pixels, mean[classes].flatten(0, 1), factor[classes].flatten(0, 1))
                distances[:, classes] = squares.view(-1, P).T
            return distances
        step = min(most_places, max(1, most_pixels // max(images, 1)))
        for places in (slice(at, at + step) for at in range(0, P, step)):
            for k in range(K):
                squares = _squares(by_place[places].to(dtype), mean[k, places], factor[k, places])
                results[:, places, k] = squares.T
        return distances
    place = place.clamp(0, P - 1)
    order, counts = place.argsort(stable=True), torch.bincount(place, minlength=P)
    first = counts.cumsum(0) - counts  # where in `order` the pixels of each place are
    in_order = torch.empty(K, N, dtype=dtype, device=x.device)
    for places, ranks in _blocks(counts, most_places, most_pixels):
        at = first[places, None] + torch.arange(ranks.start, ranks.stop, device=x.device)  # (places, ranks)
        exists = at < (first + counts)[places, None]
        start = int(at[0, 0])
        stop = start + int(exists.sum())  # a block is of all pixels of some places, or of one: these are neighbours
        pixels = x.index_select(0, order[at.where(exists, 0).flatten()]).to(dtype).unflatten(0, at.shape)
        for k in range(K):
            in_order[k, start:stop] = _squares(pixels, mean[k, places], factor[k, places])[exists]
    distances[order] = in_order.T
    return distances


def _squares(x: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    """Return the squared lengths (p, n) of (x - mean) factor, of x (p, n, d), mean (p, d) and factor (p, d, m)."""
    offsets = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.sub(x, mean[:, None], out=offsets)
    factor = factor.to(x.dtype)
    if factor.stride(1) == 1:  # strides decide how single pixels are multiplied: so, with rows of d values in memory
        return torch.bmm(factor.mT, offsets.mT).square_().sum(1)
    return torch.bmm(offsets, factor).square_().sum(2)


def _blocks(counts: Tensor, most_places: int, most_pixels: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices of places, and of the pixels of each of them by their rank, that hold all pixels of `counts` (P,).

    Places that follow one another are taken together if their counts are the same when rounded up to a power of two:
    at most half of the products are of pixels that do not exist, beyond `CHEAP_PIXELS`.
    """
    powers = torch.where(counts > 0, counts.clamp(min=CHEAP_PIXELS).sub(1).double().log2().floor().long(), -1)
    stop = 0
    for power, length in zip(*(t.tolist() for t in torch.unique_consecutive(powers, return_counts=True)), strict=True):
        start, stop = stop, stop + length
        if power < 0:
            continue
        step = min(most_places, max(1, most_pixels >> (power + 1)))
        for at in range(start, stop, step):
            places = slice(at, min(at + step, stop))
            count = int(counts[places].max())
            for rank in range(0, count, most_pixels):
                yield places, slice(rank, min(rank + most_pixels, count))


@torch.library.custom_op("hgad_fast::place_distances", mutates_args=())
def _place_distances(x: Tensor, place: Tensor | None, mean: Tensor, factor: Tensor) -> Tensor:
    return place_distances(x, place, mean, factor).contiguous()  # a kernel's results lie class by class


@_place_distances.register_fake
def _(x, place, mean, factor):  # type: ignore[no-untyped-def]
    return x.new_empty(len(x), mean.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
