"""Vector quantisation: the Triton twins of `nearest_code` and `code_statistics` in ops/codebook.py.

The nearest code is the one with the largest x.e - |e|^2 / 2. A program owns BLOCK_N rows, walks over blocks of codes,
and keeps the best of each row: the N x K matrix stays in registers. The codes are split beforehand into pieces that
tensor cores multiply without loss, as centres are (see centres.py).

For the statistics a stable sort makes the rows of a code neighbours; a program adds up BLOCK_D channels of one code,
row by row, as the definition does: the order of additions is the same, and so is every bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .centres import SPLIT, multiply_split, split, store_pieces
from .common import FEW_PIXELS, accelerated, launch, rows, tile_of, tiled

BLOCK_D = 16  # channels of a product
MAX_BLOCK_K = 64  # codes of a product; twice as many where matrix instructions read them from shared memory themselves
REGISTERS = {"sm_90": 128}  # so that two programs of 8 warps share a multiprocessor
PREPARED = 16  # codes that a program prepares
SUMMED = 16  # rows whose loads are under way together
SUMMED_BYTES = 512  # of a row that a program reads: 16 for each thread of a warp


@triton.jit
def _prepare_codes_kernel(
    codes_ptr,  # (K, D) in
    table_ptr,  # (PIECES, PADDED_K, PADDED_D) out; 0 where there is no code or channel
    half_norm_ptr,  # (PADDED_K,) out: |e|^2 / 2; infinite where there is no code
    K: tl.constexpr,
    D: tl.constexpr,
    PADDED_K: tl.constexpr,
    PADDED_D: tl.constexpr,
    codes_strides: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    norm = tl.full((BLOCK_K,), 0.0, tl.float64)
    for d0 in range(0, PADDED_D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        at = codes_ptr + k[:, None] * codes_strides[0] + d[None, :] * codes_strides[1]
        e = tl.load(at, mask=(k < K)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        norm += tl.sum(e.to(tl.float64) * e.to(tl.float64), axis=1)
        store_pieces(table_ptr + k[:, None] * PADDED_D + d[None, :], e, PADDED_K * PADDED_D, SPLIT)
    tl.store(half_norm_ptr + k, tl.where(k < K, (0.5 * norm).to(tl.float32), float("inf")))


@triton.jit(do_not_specialize=["N"])
def _nearest_kernel(
    x_ptr,  # (N, D) in
    codes,  # (PIECES PADDED_K, PADDED_D) in, by tiles
    half_norm_ptr,  # (PADDED_K,) in
    index_ptr,  # (N,) out
    N,
    D: tl.constexpr,
    PADDED_K: tl.constexpr,
    PADDED_D: tl.constexpr,
    X_STRIDE: tl.constexpr,
    SPLIT: tl.constexpr,
    ONE_PIECE: tl.constexpr,  # x is bfloat16, which tf32 holds exactly: two products do
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILED: tl.constexpr,
):
    row0 = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = tl.arange(0, BLOCK_N)
    row_mask = row0 + n < N
    x_ptr += row0 * X_STRIDE
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    index = tl.full((BLOCK_N,), 0, tl.int32)
    for k0 in range(0, PADDED_K, BLOCK_K):
        s = tl.full((BLOCK_N, BLOCK_K), 0.0, tl.float32)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            mask = row_mask[:, None] & (d < D)[None, :]
            x = tl.load(x_ptr + n[:, None] * X_STRIDE + d[None, :], mask=mask, other=0.0).to(tl.float32)
            if ONE_PIECE:
                big, small = x, None
            else:
                big, small = split(x, SPLIT)
            s = multiply_split(
                big, small, codes, k0, d0, s, BLOCK_K, BLOCK_D, PADDED_D, PADDED_K, SPLIT, TILED
            )  # fmt: skip
        s -= tl.load(half_norm_ptr + k0 + tl.arange(0, BLOCK_K))[None, :]
        s = tl.where(s == s, s, float("-inf"))  # NaN is not less than any distance
        block_best, block_index = tl.max(s, axis=1, return_indices=True)
        index = tl.where(block_best > best, k0 + block_index, index)  # on ties the first stays
        best = tl.maximum(best, block_best)
    tl.store(index_ptr + row0 + n, index, mask=row_mask)


@triton.jit
def _sum_kernel(
    x_ptr,  # (N, D) in
    order_ptr,  # (N,) in: rows by their codes
    edges_ptr,  # (K + 1,) in: where in `order` the rows of each code start
    sums_ptr,  # (K, D) out
    D: tl.constexpr,
    X_STRIDE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    at = tl.load(edges_ptr + k)
    stop = tl.load(edges_ptr + k + 1)
    total = tl.full((BLOCK_D,), 0.0, tl.float32)
    while at < stop:  # a range that ends at run time stops Triton 3.6's interpreter
        for i in tl.static_range(ROWS):
            row = tl.load(order_ptr + at + i, mask=at + i < stop, other=0)
            x = tl.load(x_ptr + row * X_STRIDE + d, mask=(at + i < stop) & (d < D), other=0.0)
            total += x.to(tl.float32)  # 0 beyond the last row changes no bit: a total is never -0
        at += ROWS
    tl.store(sums_ptr + k * D + d, total, mask=d < D)


def nearest_code(x: Tensor, codes: Tensor) -> Tensor:
    """Compute `nearest_code` of ops/codebook.py: indices (N,) in int64."""
    N, D = x.shape
    indices = torch.empty(N, dtype=torch.int64, device=x.device)
    if N > 0:
        codebook = Codebook.prepare(codes)
        padded_k, padded_d = codebook.table.shape[1:]
        chosen = tile_of("codes, few rows" if N <= FEW_PIXELS else "codes", x.device)
        launch(
            _nearest_kernel, triton.cdiv(N, chosen.pixels),
            warps=chosen.warps, stages=chosen.stages, registers=REGISTERS,
            x_ptr=rows(x), codes=tiled(codebook.table, codebook.block_k, BLOCK_D),
            half_norm_ptr=codebook.half_norm, index_ptr=indices,
            N=N, D=D, PADDED_K=padded_k, PADDED_D=padded_d,
            SPLIT=SPLIT, ONE_PIECE=x.dtype == torch.bfloat16,
            BLOCK_N=chosen.pixels, BLOCK_K=codebook.block_k, BLOCK_D=BLOCK_D, TILED=accelerated(x.device),
        )  # fmt: skip
    return indices


def code_statistics(x: Tensor, indices: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Compute `code_statistics` of ops/codebook.py: counts (K,) and sums (K, D) in float32."""
    N, D = x.shape
    in_order, order = indices.clamp(0, K - 1).sort(stable=True)
    edges = torch.searchsorted(in_order, torch.arange(K + 1, device=indices.device))
    sums = torch.empty((K, D), dtype=torch.float32, device=x.device)
    if D > 0:
        block_d = min(max(triton.next_power_of_2(D), 32), SUMMED_BYTES // x.element_size())
        launch(
            _sum_kernel, (K, triton.cdiv(D, block_d)), warps=1,
            x_ptr=rows(x), order_ptr=order, edges_ptr=edges, sums_ptr=sums, D=D, BLOCK_D=block_d, ROWS=SUMMED,
        )  # fmt: skip
    return edges.diff().float(), sums


class Codebook(NamedTuple):
    """What the search reads of the codes; see `_prepare_codes_kernel`."""

    table: Tensor  # (pieces, padded K, padded D)
    half_norm: Tensor  # (padded K,)
    block_k: int  # codes that a product takes at once

    @classmethod
    def prepare(cls, codes: Tensor) -> Codebook:
        """Make the tables of codes (K, D) of any strides: at each call, for training moves the codes at each step.

        Nothing is kept for the next call: a recorded CUDA graph moves them without anybody counting it.
        """
        K, D = codes.shape
        most = MAX_BLOCK_K * (2 if accelerated(codes.device) else 1)
        block_k = min(max(triton.next_power_of_2(K), PREPARED), most)
        padded_k, padded_d = triton.cdiv(K, block_k) * block_k, triton.cdiv(D, 32) * 32
        if (1 + SPLIT) * padded_k * padded_d >= 2**31:
            raise ValueError(f"{K} codes of {D} channels are more than the kernel's offsets of 32 bits reach")
        table = torch.empty((1 + SPLIT, padded_k, padded_d), dtype=torch.float32, device=codes.device)
        half_norm = torch.empty(padded_k, dtype=torch.float32, device=codes.device)
        launch(
            _prepare_codes_kernel, padded_k // PREPARED,
            codes_ptr=codes, table_ptr=table, half_norm_ptr=half_norm, codes_strides=codes.stride(),
            K=K, D=D, PADDED_K=padded_k, PADDED_D=padded_d, SPLIT=SPLIT, BLOCK_K=PREPARED, BLOCK_D=32,
        )  # fmt: skip
        return cls(table, half_norm, block_k)
