"""Squared Mahalanobis distances of pixels to the Gaussian of their place: the Triton twin of ops/place.py.

A stable sort makes the pixels of a place neighbours. A program owns a class, a place and every so many-th block of the
place's pixels; it walks over blocks of columns and rows of the factor, which it reads as it is stored, and keeps
differences, products and squares in registers. Nothing of N K elements but the result leaves the chip.

With few pixels a place all time goes into reading factors: products are multiplied and added one by one, in float32.
With many, tensor cores multiply.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FLOAT32, launch, stages

FEW_PIXELS = 16  # a place, on the average: up to so many the factors take longer to read than to multiply
BLOCK_N = 64  # pixels that tensor cores multiply at once
BLOCK_M = 64  # columns of a factor, if it has so many


@triton.jit
def _distances_kernel(
    x_ptr,  # (N, d) in
    order_ptr,  # (N,) in: pixels by their places
    edges_ptr,  # (P + 1,) in: where in `order` the pixels of each place start
    mean_ptr,  # (K, P, d) in
    factor_ptr,  # (K, P, d, m) in
    distances_ptr,  # (N, K) out
    K: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    x_strides: tl.constexpr,
    mean_strides: tl.constexpr,
    factor_strides: tl.constexpr,
    SHARES: tl.constexpr,  # programs that share the pixels of a place
    PRECISION: tl.constexpr,  # of products on tensor cores
    BLOCK_N: tl.constexpr,  # less than 16: without tensor cores
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    k, p = program // (P * SHARES), program // SHARES % P
    at = tl.load(edges_ptr + p) + program % SHARES * BLOCK_N
    stop = tl.load(edges_ptr + p + 1)
    mean_ptr += k * mean_strides[0] + p * mean_strides[1]
    factor_ptr += k * factor_strides[0] + p * factor_strides[1]
    while at < stop:  # a range that ends at run time stops Triton 3.6's interpreter
        n = at + tl.arange(0, BLOCK_N)
        row = tl.load(order_ptr + n, mask=n < stop, other=0)
        total = tl.full((BLOCK_N,), 0.0, tl.float32)
        for m0 in range(0, M, BLOCK_M):
            m = m0 + tl.arange(0, BLOCK_M)
            if BLOCK_N < 16:
                products = tl.full((BLOCK_N, BLOCK_D, BLOCK_M), 0.0, tl.float32)
            else:
                y = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
            for d0 in range(0, D, BLOCK_D):
                d = d0 + tl.arange(0, BLOCK_D)
                mask = (n < stop)[:, None] & (d < D)[None, :]
                x = tl.load(x_ptr + row[:, None] * x_strides[0] + d[None, :] * x_strides[1], mask=mask, other=0.0)
                mean = tl.load(mean_ptr + d * mean_strides[2], mask=d < D, other=0.0)
                offset = tl.where(mask, x.to(tl.float32) - mean.to(tl.float32)[None, :], 0.0)
                matrix_at = factor_ptr + d[:, None] * factor_strides[2] + m[None, :] * factor_strides[3]
                matrix = tl.load(matrix_at, mask=(d < D)[:, None] & (m < M)[None, :], other=0.0).to(tl.float32)
                if BLOCK_N < 16:
                    products += offset[:, :, None] * matrix[None, :, :]
                else:
                    y = tl.dot(offset, matrix, y, input_precision=PRECISION)
            if BLOCK_N < 16:
                y = tl.sum(products, axis=1)
            total += tl.sum(y * y, axis=1)
        tl.store(distances_ptr + row * K + k, total, mask=n < stop)
        at += SHARES * BLOCK_N


def place_distances(x: Tensor, place: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    """Compute `place_distances` of ops/place.py: distances (N, K) in float32."""
    K, P, D, M = factor.shape
    N = len(x)
    if sum((size - 1) * stride for size, stride in zip(factor.shape[2:], factor.stride()[2:], strict=True)) >= 2**31:
        raise ValueError(f"factor has strides {factor.stride()}: the kernel's offsets of 32 bits do not reach a matrix")
    distances = torch.empty((N, K), dtype=torch.float32, device=x.device)
    if N == 0:
        return distances
    in_order, order = place.clamp(0, P - 1).sort(stable=True)
    edges = torch.searchsorted(in_order, torch.arange(P + 1, device=place.device))
    average = triton.cdiv(N, P)
    block_m = min(max(triton.next_power_of_2(M), 16), BLOCK_M)
    if average <= FEW_PIXELS:
        block_n = min(triton.next_power_of_2(average), 4)
        block_d, block_m, ahead = 64, block_m if block_n == 1 else min(block_m, 32), stages(x.device)
    else:
        block_n, block_d, ahead = BLOCK_N, 32, stages(x.device)
    shares = triton.cdiv(average, block_n)
    launch(
        _distances_kernel, K * P * shares, stages=ahead,
        x_ptr=x, order_ptr=order, edges_ptr=edges, mean_ptr=mean, factor_ptr=factor, distances_ptr=distances,
        K=K, P=P, D=D, M=M,
        x_strides=x.stride(), mean_strides=mean.stride(), factor_strides=factor.stride(),
        SHARES=shares, PRECISION=FLOAT32, BLOCK_N=block_n, BLOCK_D=block_d, BLOCK_M=block_m,
    )  # fmt: skip
    return distances
