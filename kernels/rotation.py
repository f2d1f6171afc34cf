"""The rotation at the end of a coupling block, and both products with it that a backward pass needs.

A block ends with out = R u + shift, u = [x1, y2], where R is the rotation with the block's gains in its columns. Going
back, u = R^-1 (out - shift), and the gradient of u is R^T gout. Rotations decide how exact a flow is (the subnets
tolerate less), and float32 products would take longer than all others together. So each factor is split in two bfloat16
pieces, a large and a small one, and all products but that of the small ones are added: an error of 1e-5, the same
operands in both directions.

A program owns rows and all their channels. It has read them before it writes: outputs may be the inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FLOAT32, accelerated, launch, pieces, tile, tile_of, to_bfloat16, zeros
from .packing import BLOCK_K

EXACT = tl.constexpr(FLOAT32)


@triton.jit
def rotated(
    sums, x_ptr, n, row_mask, matrix, row, column,
    HALF: tl.constexpr, X_STRIDE: tl.constexpr, K: tl.constexpr, EDGES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, TILED: tl.constexpr,
):  # fmt: skip
    """Add x M^T to sums, x (BLOCK_N, HALF) in float32 and M in pieces (2, FULL, K), of which HALF columns.

    With the PRECISION "fp32" the first piece is M itself.
    """
    FULL: tl.constexpr = EDGES[len(EDGES) - 1]
    for k0 in range(0, HALF, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + n[:, None] * X_STRIDE + k[None, :], mask=row_mask[:, None] & (k < HALF)[None, :], other=0.0)
        if PRECISION == "bf16":
            large = to_bfloat16(x)
            small = to_bfloat16(x - large.to(tl.float32))
        new = ()
        for i in tl.static_range(len(EDGES) - 1):
            at = row + EDGES[i]
            large_m = tile(matrix[i], at, column + k0, EDGES[i + 1] - EDGES[i], BLOCK_K, K, TILED)
            if PRECISION == "bf16":
                small_m = tile(matrix[i], at + FULL, column + k0, EDGES[i + 1] - EDGES[i], BLOCK_K, K, TILED)
                total = tl.dot(small, tl.trans(large_m), sums[i])
                total = tl.dot(large, tl.trans(small_m), total)
                new += (tl.dot(large, tl.trans(large_m), total),)  # type: ignore[assignment]
            else:
                new += (tl.dot(x, tl.trans(large_m), sums[i], input_precision=EXACT),)  # type: ignore[assignment]
        sums = new
    return sums


@triton.jit(do_not_specialize=["N", "k"])
def _rotate_kernel(
    x1_ptr,  # (N, C / 2) in
    y2_ptr,  # (N, C / 2) in
    matrix_a,  # (L 2 FULL, K) in: pieces; columns for x1, and from K / 2 on for y2; by tiles of FULL's first piece
    matrix_b,  # by tiles of the second piece, or None
    matrix_c,
    matrix_d,
    shift_ptr,  # (L, FULL) in
    out_ptr,  # (N, C) out; x1 and y2 may be its halves
    k,  # the block
    N,
    C: tl.constexpr,
    X1_STRIDE: tl.constexpr,
    Y2_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    K: tl.constexpr,
    EDGES: tl.constexpr,  # where the pieces of C begin and end; the last end is FULL
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILED: tl.constexpr,
):
    row0 = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = tl.arange(0, BLOCK_N)
    row_mask = row0 + n < N
    FULL: tl.constexpr = EDGES[len(EDGES) - 1]
    HALF: tl.constexpr = C // 2
    x1_ptr += row0 * X1_STRIDE
    y2_ptr += row0 * Y2_STRIDE
    shift_ptr += k * FULL
    matrix = (matrix_a, matrix_b, matrix_c, matrix_d)
    row = 2 * k * FULL
    sums = zeros(BLOCK_N, EDGES)
    sums = rotated(sums, x1_ptr, n, row_mask, matrix, row, 0, HALF, X1_STRIDE, K, EDGES, "bf16", BLOCK_K, TILED)
    sums = rotated(sums, y2_ptr, n, row_mask, matrix, row, K // 2, HALF, Y2_STRIDE, K, EDGES, "bf16", BLOCK_K, TILED)
    tl.debug_barrier()  # nobody overwrites what another still reads
    for i in tl.static_range(len(EDGES) - 1):
        c = tl.arange(EDGES[i], EDGES[i + 1])
        at = out_ptr + row0 * OUT_STRIDE + n[:, None] * OUT_STRIDE + c[None, :]
        tl.store(at, sums[i] + tl.load(shift_ptr + c)[None, :], mask=row_mask[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=["N", "k"])
def _unrotate_kernel(
    z_ptr,  # (N, C) in: the block's output; None: u is given
    gz_ptr,  # (N, C) in: its gradient
    inverse_a,  # (L 2 FULL, K) in: R^-1, as the matrix of `_rotate_kernel`
    inverse_b,
    inverse_c,
    inverse_d,
    transposed_a,  # (L 2 FULL, K) in: R^T
    transposed_b,
    transposed_c,
    transposed_d,
    shift_ptr,  # (L, FULL) in: R^-1 shift
    u_ptr,  # (N, C) out, or in; may be z
    gu_ptr,  # (N, C) out; may be gz
    sums_ptr,  # (programs, 2, FULL) out: sums of gu u, and of gu, over each program's rows
    k,  # the block
    N,
    C: tl.constexpr,
    Z_STRIDE: tl.constexpr,
    GZ_STRIDE: tl.constexpr,
    U_STRIDE: tl.constexpr,
    GU_STRIDE: tl.constexpr,
    K: tl.constexpr,
    EDGES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILED: tl.constexpr,
):
    HALF: tl.constexpr = C // 2
    FULL: tl.constexpr = EDGES[len(EDGES) - 1]
    row0 = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = tl.arange(0, BLOCK_N)
    row_mask = row0 + n < N
    u_ptr += row0 * U_STRIDE
    shift_ptr += k * FULL
    row = 2 * k * FULL
    if z_ptr is not None:
        z_ptr += row0 * Z_STRIDE
        inverse = (inverse_a, inverse_b, inverse_c, inverse_d)
        sums = zeros(BLOCK_N, EDGES)
        sums = rotated(sums, z_ptr, n, row_mask, inverse, row, 0, HALF, Z_STRIDE, K, EDGES, "bf16", BLOCK_K, TILED)
        z_ptr += HALF
        sums = rotated(sums, z_ptr, n, row_mask, inverse, row, K // 2, HALF, Z_STRIDE, K, EDGES, "bf16", BLOCK_K, TILED)
        tl.debug_barrier()
        for i in tl.static_range(len(EDGES) - 1):
            c = tl.arange(EDGES[i], EDGES[i + 1])
            u = sums[i] - tl.load(shift_ptr + c)[None, :]
            mask = row_mask[:, None] & (c < C)[None, :]
            tl.store(u_ptr + n[:, None] * U_STRIDE + c[None, :], u, mask=mask)
    gz_ptr += row0 * GZ_STRIDE
    transposed = (transposed_a, transposed_b, transposed_c, transposed_d)
    sums = zeros(BLOCK_N, EDGES)
    sums = rotated(sums, gz_ptr, n, row_mask, transposed, row, 0, HALF, GZ_STRIDE, K, EDGES, "bf16", BLOCK_K, TILED)
    gz_ptr += HALF
    sums = rotated(
        sums, gz_ptr, n, row_mask, transposed, row, K // 2, HALF, GZ_STRIDE, K, EDGES, "bf16", BLOCK_K, TILED
    )
    tl.debug_barrier()  # u was written by other threads, too
    sums_ptr += tl.program_id(0).to(tl.int64) * (2 * FULL)
    for i in tl.static_range(len(EDGES) - 1):
        c = tl.arange(EDGES[i], EDGES[i + 1])
        mask = row_mask[:, None] & (c < C)[None, :]
        gu = sums[i]
        tl.store(gu_ptr + row0 * GU_STRIDE + n[:, None] * GU_STRIDE + c[None, :], gu, mask=mask)
        u = tl.load(u_ptr + n[:, None] * U_STRIDE + c[None, :], mask=mask, other=0.0)
        tl.store(sums_ptr + c, tl.sum(gu * u, axis=0))
        tl.store(sums_ptr + FULL + c, tl.sum(gu, axis=0))


def rotate_arguments(matrices: Tensor, shifts: Tensor, edges: tuple[int, ...]) -> dict[str, Any]:
    """Return the arguments of `rotate` that all blocks share.

    `matrices` (L, 2, FULL, K) are the bfloat16 pieces of M for L blocks, padded with zeros up to the last of `edges`;
    `shifts` has FULL numbers of each block.
    """
    return {
        **pieces("matrix", matrices, edges, BLOCK_K), "shift_ptr": shifts,
        "K": matrices.shape[-1], "EDGES": edges, "BLOCK_K": BLOCK_K, "TILED": accelerated(matrices.device),
    }  # fmt: skip


def rotate(x1: Tensor, y2: Tensor, k: int, shared: dict[str, Any], out: Tensor) -> None:
    """Write [x1, y2] M^T + shift of block k to `out` (N, C), of which x1 and y2 (N, C / 2) may be the halves."""
    N, C = out.shape
    chosen = tile_of("rotation", out.device)
    launch(
        _rotate_kernel, triton.cdiv(N, chosen.pixels), warps=chosen.warps, stages=chosen.stages,
        x1_ptr=x1, y2_ptr=y2, out_ptr=out, k=k, N=N, C=C, BLOCK_N=chosen.pixels, **shared,
    )  # fmt: skip


def unrotate_arguments(inverses: Tensor, shifts: Tensor, transposed: Tensor, edges: tuple[int, ...]) -> dict[str, Any]:
    """Return the arguments of `unrotate` that all blocks share: two matrices, and shifts, as `rotate_arguments`."""
    return {
        **pieces("inverse", inverses, edges, BLOCK_K), **pieces("transposed", transposed, edges, BLOCK_K),
        "shift_ptr": shifts, "K": inverses.shape[-1], "EDGES": edges, "BLOCK_K": BLOCK_K,
        "TILED": accelerated(inverses.device),
    }  # fmt: skip


def unrotate(z: Tensor | None, gz: Tensor, k: int, shared: dict[str, Any], u: Tensor, gu: Tensor, sums: Tensor) -> None:
    """Write the input of block k's rotation and its gradient, `u` and `gu` (N, C), and of the latter sums over rows.

    They may be written over z and gz (N, C). Without z, u is given. The inverse's shift is subtracted from u. `sums`
    (programs, 2, FULL) gets sums of gu u, then of gu, over the rows of each of `rotation_programs` programs.
    """
    N, C = gz.shape
    chosen = tile_of("rotation", gz.device)
    launch(
        _unrotate_kernel, triton.cdiv(N, chosen.pixels), warps=chosen.warps, stages=chosen.stages,
        z_ptr=z, gz_ptr=gz, u_ptr=u, gu_ptr=gu, sums_ptr=sums, k=k, N=N, C=C, BLOCK_N=chosen.pixels, **shared,
    )  # fmt: skip


def rotation_programs(N: int, device: torch.device) -> int:
    """Return the number of programs that rotate N rows on a device."""
    return triton.cdiv(N, tile_of("rotation", device).pixels)
