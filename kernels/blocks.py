"""Whole coupling blocks: the Triton twin of `coupling_blocks` in ops/blocks.py, one launch per block.

A program owns a patch of one image. It computes the subnet and the coupling as in subnet.py, so that the hidden layer
never leaves the chip, parks y2 in its rows of the output, reads it back from the cache, and rotates [x1, y2] as in
rotation.py.

A product's extents are sums of powers of two: 100 channels are computed as 64 + 32 + 16, not as 128. The channels
themselves are a multiple of 8, with zeros behind x1 and x2 if need be. So all models share a few kernels, few enough
that each has been compiled in advance, and up to 200 channels none spills a register in a loop.

`flow` takes this kernel for bfloat16 subnets alone: in tf32 and fp32, with operands twice as wide, it spills registers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cache import PACKED
from .common import FEW_PIXELS, FLOAT32, accelerated, launch, operand, pieces, tanh, tile_of, tiled, zeros
from .packing import BLOCK_HIDDEN, BLOCK_K, Axis, Layout, gains, gathered, pack, pack_subnets, position_table, spread
from .rotation import rotated
from .subnet import POSITIONS, patch_of_program, subnet_output


class _Variant(NamedTuple):
    """The way in which the products of a precision are computed."""

    subnet: str  # input_precision of the subnet's products, whose operands are rounded before if they have fewer bits
    rotation: str  # of a rotation's operands: bfloat16 pieces, or float32
    table_pieces: int


VARIANTS = {
    "fp32": _Variant(FLOAT32, "fp32", table_pieces=3),
    "tf32": _Variant(FLOAT32 if FLOAT32 == "ieee" else "tf32", "bf16", table_pieces=2),
    "bf16": _Variant("ieee", "bf16", table_pieces=2),
}


@triton.jit(do_not_specialize=["H", "W", "k"])
def _block_kernel(
    x_ptr,  # (N, C) in
    w1,  # these six as in `_coupling_kernel` of subnet.py
    w2_a,
    w2_b,
    w2_c,
    w2_d,
    table,
    b2_ptr,
    matrix_a,  # these five as in `_rotate_kernel` of rotation.py
    matrix_b,
    matrix_c,
    matrix_d,
    shift_ptr,
    log_det_ptr,  # (N,) in and out: added to
    out_ptr,  # (N, C) out; not x
    k,  # the block
    H,
    W,
    clamp,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    HALF_EDGES: tl.constexpr,  # where the pieces of C / 2, and of C, begin and end
    FULL_EDGES: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT: tl.constexpr,
    ROTATION: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILED: tl.constexpr,
):
    HALF: tl.constexpr = HALF_EDGES[len(HALF_EDGES) - 1]
    FULL: tl.constexpr = FULL_EDGES[len(FULL_EDGES) - 1]
    C2: tl.constexpr = C // 2
    BLOCK_N: tl.constexpr = PATCH_H * PATCH_W
    first, h0, w0, n_h, n_w = patch_of_program(H, W, PATCH_H, PATCH_W)
    x_ptr += first * C
    out_ptr += first * C
    log_det_ptr += first
    b2_ptr += k * (2 * HALF)
    shift_ptr += k * FULL
    row = n_h * W + n_w
    row_mask = (h0 + n_h < H) & (w0 + n_w < W)
    c = tl.arange(0, WIDTH)
    x1 = tl.load(x_ptr + row[:, None] * C + c[None, :], mask=row_mask[:, None] & (c < C2)[None, :], other=0.0)
    scales, shifts = subnet_output(
        operand(x1, PRECISION), n_h, n_w, h0, w0, H, W, k, w1, (w2_a, w2_b, w2_c, w2_d), table, None, row, row_mask,
        WIDTH, HIDDEN, HALF_EDGES, 0, ROWS, PIECES, PRECISION, DOT, BLOCK_N, BLOCK_HIDDEN, TILED,
    )  # fmt: skip
    # As in `_coupling_kernel`; a function for both lets this kernel spill registers on AMD and Blackwell.
    log_det = tl.load(log_det_ptr + row, mask=row_mask, other=0.0)
    for i in tl.static_range(len(HALF_EDGES) - 1):
        c2 = tl.arange(HALF_EDGES[i], HALF_EDGES[i + 1])
        s = clamp * tanh(0.1 * (scales[i] + tl.load(b2_ptr + c2)[None, :]))  # 0 in the padding
        t = 0.1 * (shifts[i] + tl.load(b2_ptr + HALF + c2)[None, :])
        log_det += tl.sum(s, axis=1)
        mask = row_mask[:, None] & (c2 < C2)[None, :]
        at = row[:, None] * C + (C2 + c2)[None, :]
        x2 = tl.load(x_ptr + at, mask=mask, other=0.0)
        tl.store(out_ptr + at, x2 * tl.exp(s) + t, mask=mask)
    tl.store(log_det_ptr + row, log_det, mask=row_mask)

    tl.debug_barrier()  # what is parked was written by other threads
    matrix = (matrix_a, matrix_b, matrix_c, matrix_d)
    at = 2 * k * FULL
    sums = zeros(BLOCK_N, FULL_EDGES)
    sums = rotated(sums, x_ptr, row, row_mask, matrix, at, 0, C2, C, K, FULL_EDGES, ROTATION, BLOCK_K, TILED)
    parked = out_ptr + C2
    sums = rotated(sums, parked, row, row_mask, matrix, at, K // 2, C2, C, K, FULL_EDGES, ROTATION, BLOCK_K, TILED)
    tl.debug_barrier()  # nobody overwrites what another still reads
    for i in tl.static_range(len(FULL_EDGES) - 1):
        c = tl.arange(FULL_EDGES[i], FULL_EDGES[i + 1])
        mask = row_mask[:, None] & (c < C)[None, :]
        tl.store(out_ptr + row[:, None] * C + c[None, :], sums[i] + tl.load(shift_ptr + c)[None, :], mask=mask)


@torch.no_grad()
def coupling_blocks(
    x: Tensor,
    conditions: list[Tensor],
    parameters: tuple[Tensor, ...],
    clamp: float = 1.9,
    precision: str = "fp32",
) -> tuple[Tensor, Tensor]:
    """Compute `coupling_blocks` of ops/blocks.py: z (N, C) and log_det (N,), both float32.

    The parameters are padded and rounded for the kernel once, all blocks at once, and again when they have changed.
    """
    if len(conditions) == 1 or x.dtype != torch.float32:
        raise ValueError("the block kernel takes float32 features and a separable position or none; `flow` takes any")
    N, channels = x.shape
    layout, variant = Layout(channels, parameters[0].shape[1]), VARIANTS[precision]
    C, L = layout.C, len(parameters[0])
    packed = PACKED.get(lambda: _pack(parameters, layout, precision), (precision,), parameters)
    w1, b1 = parameters[:2]
    table = PACKED.get(
        lambda: position_table(conditions, w1, b1, layout, variant.table_pieces),
        ("table", variant.table_pieces),
        [w1, b1, *conditions],
    )
    log_det = packed.log_gain.repeat(N)
    W, H = map(len, conditions) if conditions else (1, N)
    chosen = tile_of("blocks" if precision == "bf16" and N > FEW_PIXELS else "subnet, bf16, few pixels", x.device)
    patch_h, patch_w = (chosen.pixels // 16, 16) if conditions else (chosen.pixels, 1)
    patches = N // max(H * W, 1) * triton.cdiv(H, patch_h) * triton.cdiv(W, patch_w)
    if patches == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device), log_det
    x = spread(x, C).contiguous()
    buffers = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(min(L, 2))]
    shared = {
        "w1": tiled(packed.w1, BLOCK_HIDDEN, layout.width.size),
        **pieces("w2", packed.w2, layout.half_edges, BLOCK_HIDDEN),
        "table": tiled(table, POSITIONS.value, BLOCK_HIDDEN), "b2_ptr": packed.b2,
        **pieces("matrix", packed.rotation, layout.full_edges, BLOCK_K), "shift_ptr": packed.shift,
        "log_det_ptr": log_det, "H": H, "W": W, "clamp": clamp,
        "C": C, "WIDTH": layout.width.size, "HIDDEN": layout.hidden.size,
        "HALF_EDGES": layout.half_edges, "FULL_EDGES": layout.full_edges, "K": layout.rotated.size,
        "ROWS": bool(conditions), "PIECES": variant.table_pieces, "PRECISION": precision, "DOT": variant.subnet,
        "ROTATION": variant.rotation, "PATCH_H": patch_h, "PATCH_W": patch_w, "BLOCK_HIDDEN": BLOCK_HIDDEN,
        "BLOCK_K": BLOCK_K, "TILED": accelerated(x.device), "warps": chosen.warps, "stages": chosen.stages,
    }  # fmt: skip
    for k in range(L):
        out = buffers[k % 2]
        launch(_block_kernel, patches, x_ptr=x, out_ptr=out, k=k, **shared)
        x = out
    return gathered(x, channels), log_det


class _Packed(NamedTuple):
    """The parameters of all blocks as the kernel reads them."""

    w1: Tensor  # (L, 1, HIDDEN, WIDTH)
    w2: Tensor  # (L, 1, 2 HALF, HIDDEN)
    b2: Tensor  # (L, 1, 1, 2 HALF)
    rotation: Tensor  # (L, 2, FULL, K): bfloat16 pieces; or float32 and zeros
    shift: Tensor  # (L, 1, 1, FULL)
    log_gain: Tensor  # (1,): the sum of the logarithms of all gains


def _pack(parameters: tuple[Tensor, ...], layout: Layout, precision: str) -> _Packed:
    """Pack the parameters of all blocks."""
    w1, _, w2, b2, global_scale, global_offset, w_perm = parameters
    gain = gains(global_scale)
    return _Packed(
        *pack_subnets(w1, w2, b2, layout, precision),
        rotation=pack(w_perm, layout.full, layout.rotated, VARIANTS[precision].rotation, pieces=2, scale=gain),
        shift=pack(global_offset @ w_perm.mT, Axis.plain(1, 1), layout.full, "fp32"),
        log_gain=gain.log().sum().view(1),
    )
