"""Distances to the Gaussians of places: the Triton twin of `place_distances` in ops/place.py.

Each pixel has a matrix of its own, shared by the pixels of its place in other images: what costs time is reading the
matrices. With one image a program owns a pixel and a class, and multiplies in float32, element by element, while it
reads. With several a program owns a place and a class; it takes as many pixels of that place at once as a product on
tensor cores has rows, so that up to 32 images read each matrix once. Either way the products of a pixel with the
columns of a matrix are squared and added up in registers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FLOAT32, launch, rows, stages

BLOCK_D = 32  # channels of a product on tensor cores
MAX_BLOCK_M = 128  # columns of such a product
READ = 64  # channels, and columns, that are read at once for a single pixel
ROWS = 16, 32  # of such a product: what matrix instructions of a warp take; others take 64, more than batches have


@triton.jit
def _columns(factor_ptr, d, m, D: tl.constexpr, M: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr):
    """Return channels d of columns m of a matrix with these strides; 0 beyond it."""
    at = factor_ptr + d[:, None] * ROW + m[None, :] * COLUMN
    return tl.load(at, mask=(d < D)[:, None] & (m < M)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _indices(first, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Return BLOCK indices from the first; of 64 bits where their products with strides need them."""
    i = first + tl.arange(0, BLOCK)
    return i.to(tl.int64) if WIDE else i


@triton.jit(do_not_specialize=["N", "P"])
def _pixel_kernel(
    x_ptr,  # (N, D) in
    place_ptr,  # (N,) in, or anything where pixels come in the order of their places
    mean_ptr,  # (K, P, D) in
    factor_ptr,  # (K, P, D, M) in
    distances_ptr,  # (K, N) out
    N,
    P,
    D: tl.constexpr,
    M: tl.constexpr,
    X_STRIDE: tl.constexpr,
    mean_strides: tl.constexpr,
    factor_strides: tl.constexpr,
    WIDE: tl.constexpr,  # offsets within a matrix or a mean pass 2^31
    IN_ORDER: tl.constexpr,  # there are no places
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    n, k = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    p = n if IN_ORDER else tl.minimum(tl.maximum(tl.load(place_ptr + n), 0), P - 1)
    x_ptr += n * X_STRIDE
    mean_ptr += k * mean_strides[0] + p * mean_strides[1]
    factor_ptr += k * factor_strides[0] + p * factor_strides[1]
    distance = 0.0
    for m0 in range(0, M, BLOCK_M):
        m = _indices(m0, BLOCK_M, WIDE)
        products = tl.full((BLOCK_D, BLOCK_M), 0.0, tl.float32)
        for d0 in range(0, D, BLOCK_D):
            d = _indices(d0, BLOCK_D, WIDE)
            x = tl.load(x_ptr + d, mask=d < D, other=0.0).to(tl.float32)
            mean = tl.load(mean_ptr + d * mean_strides[2], mask=d < D, other=0.0).to(tl.float32)
            columns = _columns(factor_ptr, d, m, D, M, factor_strides[2], factor_strides[3])
            products += (x - mean)[:, None] * columns
        lengths = tl.sum(products, axis=0)
        distance += tl.sum(lengths * lengths, axis=0)
    tl.store(distances_ptr + k * N + n, distance)


@triton.jit(do_not_specialize=["N"])
def _place_kernel(
    x_ptr,  # (N, D) in
    order_ptr,  # (N,) in: pixels by their places
    edges_ptr,  # (P + 1,) in: where in `order` the pixels of each place start
    mean_ptr,  # (K, P, D) in
    factor_ptr,  # (K, P, D, M) in
    distances_ptr,  # (K, N) out
    N,
    D: tl.constexpr,
    M: tl.constexpr,
    X_STRIDE: tl.constexpr,
    mean_strides: tl.constexpr,
    factor_strides: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,  # offsets within a matrix or a mean pass 2^31
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    p, k = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = tl.load(edges_ptr + p)
    stop = tl.load(edges_ptr + p + 1)
    mean_ptr += k * mean_strides[0] + p * mean_strides[1]
    factor_ptr += k * factor_strides[0] + p * factor_strides[1]
    while at < stop:  # a range that ends at run time stops Triton 3.6's interpreter
        i = at + tl.arange(0, BLOCK_N)
        n = tl.load(order_ptr + i, mask=i < stop, other=0)
        distance = tl.full((BLOCK_N,), 0.0, tl.float32)
        for m0 in range(0, M, BLOCK_M):
            m = _indices(m0, BLOCK_M, WIDE)
            products = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
            for d0 in range(0, D, BLOCK_D):
                d = _indices(d0, BLOCK_D, WIDE)
                mask = (i < stop)[:, None] & (d < D)[None, :]
                x = tl.load(x_ptr + n[:, None] * X_STRIDE + d[None, :], mask=mask, other=0.0).to(tl.float32)
                mean = tl.load(mean_ptr + d * mean_strides[2], mask=d < D, other=0.0).to(tl.float32)
                columns = _columns(factor_ptr, d, m, D, M, factor_strides[2], factor_strides[3])
                products = tl.dot(x - mean[None, :], columns, products, input_precision=PRECISION)
            distance += tl.sum(products * products, axis=1)
        tl.store(distances_ptr + k * N + n, distance, mask=i < stop)
        at += BLOCK_N


def place_distances(x: Tensor, place: Tensor | None, mean: Tensor, factor: Tensor) -> Tensor:
    """Compute `place_distances` of ops/place.py: distances (N, K) in float32."""
    N = len(x)
    K, P, D, M = factor.shape
    distances = torch.empty((K, N), dtype=torch.float32, device=x.device)
    if N == 0:
        return distances.T
    farthest = max((D - 1) * mean.stride(2), (D - 1) * factor.stride(2) + (M - 1) * factor.stride(3))
    tables: dict[str, Any] = {
        "mean_ptr": mean, "mean_strides": mean.stride(), "factor_ptr": factor, "factor_strides": factor.stride(),
        "distances_ptr": distances, "N": N, "D": D, "M": M, "WIDE": farthest >= 2**31,
    }  # fmt: skip
    if N < 2 * P:
        launch(
            _pixel_kernel, (N, K),
            x_ptr=rows(x), place_ptr=distances if place is None else place.contiguous(), IN_ORDER=place is None, P=P,
            **tables, BLOCK_D=_block(D, READ), BLOCK_M=_block(M, READ),
        )  # fmt: skip
        return distances.T
    edges = torch.arange(P + 1, device=x.device)
    if place is None:
        order, edges = torch.arange(N, device=x.device).view(-1, P).T.contiguous(), edges * (N // P)
    else:
        in_order, order = place.clamp(0, P - 1).sort(stable=True)
        edges = torch.searchsorted(in_order, edges)
    launch(
        _place_kernel, (P, K), stages=stages(x.device, tiles=True),
        x_ptr=rows(x), order_ptr=order, edges_ptr=edges, **tables,
        PRECISION=FLOAT32, BLOCK_N=ROWS[N // P > ROWS[0]], BLOCK_D=BLOCK_D, BLOCK_M=_block(M, MAX_BLOCK_M),
    )  # fmt: skip
    return distances.T


def _block(size: int, most: int) -> int:
    return min(max(triton.next_power_of_2(size), 16), most)
