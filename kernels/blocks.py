"""Whole coupling blocks: the Triton twin of `coupling_blocks` in ops/blocks.py, one launch per block.

A program owns a patch of one image. It multiplies its x1 by W1 a chunk of hidden units at a time, adds what the
position contributes, and multiplies the chunk by W2 at once: the hidden layer never leaves the chip. Then it transforms
x2, parks [x1, y2] in its rows of the output, reads them back from the cache and multiplies by the rotation.

The position contributes table[column] + table[row]. A patch has few columns and rows, so that a product with a one-hot
matrix adds both; loading rows of the table for every pixel would double the traffic with the cache. The table is more
exact than bfloat16, being a sum of bfloat16 pieces, which the product adds up too.

A product's extents are sums of powers of two: 100 channels are computed as 64 + 32 + 16, not as 128. The channels
themselves are a multiple of 8, with zeros behind x1 and x2 if need be. So all models share a few kernels, few enough
that each has been compiled in advance, and up to 200 channels none spills a register in a loop.

`flow` takes this kernel for bfloat16 subnets alone. Compiled for 200 channels in tf32, with operands twice as wide, a
patch of 64 pixels spills 74 registers on sm_90 (6 of them in the rotation's loop), 18 on sm_100 and 427 on sm_80; in
fp32 it spills 281 on sm_90 (127 in loops) and 659 on sm_80. Larger patches, for less traffic with the cache, hold twice
the sums. At 112 channels tf32 fits; whether it would be faster than products in torch is not known.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .common import FLOAT32, launch, load, multiply, operand, stages, tanh, to_bfloat16, zeros

BLOCK_HIDDEN = 32
BLOCK_K = 32
CHANNEL_MULTIPLE = 8  # halves of rows begin at multiples of 16 bytes; others load value by value, and spill registers
ROTATED_MULTIPLE = 64  # an even number of chunks: the compiler fully unrolls the loop over an odd number
SLOTS = tl.constexpr(32)  # columns, then rows of a patch, in the one-hot product
FEW_PIXELS = 8192  # up to so many, programs take patches of half the size, to keep more processors busy


class _Variant(NamedTuple):
    """The way in which the products of a precision are computed."""

    subnet: str  # input_precision of the subnet's products, whose operands are rounded before if they have fewer bits
    rotation: str  # input_precision of the rotation's product
    table_pieces: int


VARIANTS = {
    "fp32": _Variant(FLOAT32, FLOAT32, table_pieces=3),
    "tf32": _Variant(FLOAT32 if FLOAT32 == "ieee" else "tf32", FLOAT32, table_pieces=2),
    "bf16": _Variant("ieee", "ieee", table_pieces=2),
}


@triton.jit
def _park(out_ptr, u, row, c, mask, C: tl.constexpr, PRECISION: tl.constexpr):
    """Store channels c of u in the output's rows until they are rotated, for bf16x3 as two bfloat16 pieces."""
    if PRECISION == "bf16":
        large = to_bfloat16(u)
        at = out_ptr.to(tl.pointer_type(tl.bfloat16)) + row[:, None] * (2 * C) + c[None, :]
        tl.store(at, large, mask=mask)
        tl.store(at + C, to_bfloat16(u - large.to(tl.float32)), mask=mask)
    else:
        tl.store(out_ptr + row[:, None] * C + c[None, :], u, mask=mask)


@triton.jit(do_not_specialize=["H", "W"])
def _block_kernel(
    x_ptr,  # (N, C) in
    w1_ptr,  # (HIDDEN, WIDTH) in: W1's columns for x1
    w2_ptr,  # (2, HALF, HIDDEN) in: scales, then shifts
    b2_ptr,  # (2, HALF) in
    table_ptr,  # (TABLE_PIECES, W + H, HIDDEN) in: what columns, then rows add, b1 in the former; or b1 (HIDDEN,)
    rotation_ptr,  # (FULL, ROTATED) in: in bf16 its large, small and large pieces, for large, large and small of u
    shift_ptr,  # (FULL,) in
    log_det_ptr,  # (N,) in and out: added to
    out_ptr,  # (N, C) out; not x
    H,
    W,
    clamp,
    C: tl.constexpr,  # a multiple of CHANNEL_MULTIPLE
    WIDTH: tl.constexpr,  # C1 and zeros
    HIDDEN: tl.constexpr,  # all that follow end in zeros too
    HALF_EDGES: tl.constexpr,  # where the pieces of C2, and of C, begin and end
    FULL_EDGES: tl.constexpr,
    ROTATED: tl.constexpr,  # C or 3 C in chunks of BLOCK_K
    POSITION: tl.constexpr,
    TABLE_PIECES: tl.constexpr,
    ONE_HOT: tl.constexpr,  # TABLE_PIECES * SLOTS up to a power of two
    PRECISION: tl.constexpr,
    SUBNET: tl.constexpr,  # input_precision of the subnet's products, and of the rotation's
    ROTATION: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    C2: tl.constexpr = C // 2
    C1: tl.constexpr = C - C2
    BLOCK_N: tl.constexpr = PATCH_H * PATCH_W
    HALF: tl.constexpr = HALF_EDGES[len(HALF_EDGES) - 1]

    across = (W + PATCH_W - 1) // PATCH_W
    down = (H + PATCH_H - 1) // PATCH_H
    patch = tl.program_id(0)
    w0 = patch % across * PATCH_W
    h0 = patch // across % down * PATCH_H
    image = patch // (across * down)
    first = (image.to(tl.int64) * H + h0) * W + w0  # 64 bits for the program, 32 inside its patch
    x_ptr += first * C
    out_ptr += first * C
    log_det_ptr += first
    n = tl.arange(0, BLOCK_N)
    n_h = n // PATCH_W
    n_w = n % PATCH_W
    row = n_h * W + n_w
    row_mask = (h0 + n_h < H) & (w0 + n_w < W)

    c = tl.arange(0, WIDTH)
    x1_mask = row_mask[:, None] & (c < C1)[None, :]
    x1_at = row[:, None] * C + c[None, :]
    x1 = tl.load(x_ptr + x1_at, mask=x1_mask, other=0.0)
    _park(out_ptr, x1, row, c, x1_mask, C, PRECISION)
    x1 = operand(x1, PRECISION)
    if POSITION:
        slot = tl.arange(0, ONE_HOT)
        piece = slot // SLOTS
        s = slot % SLOTS
        one_hot = (s[None, :] == n_w[:, None]) | (s[None, :] == PATCH_W + n_h[:, None])
        one_hot = to_bfloat16((one_hot & (piece < TABLE_PIECES)[None, :]).to(tl.float32))
        entry = tl.where(s < PATCH_W, tl.minimum(w0 + s, W - 1), W + tl.minimum(h0 + s - PATCH_W, H - 1))
        entry += tl.minimum(piece, TABLE_PIECES - 1) * (W + H)

    scales = zeros(BLOCK_N, HALF_EDGES)
    shifts = zeros(BLOCK_N, HALF_EDGES)
    for j0 in range(0, HIDDEN, BLOCK_HIDDEN):
        j = j0 + tl.arange(0, BLOCK_HIDDEN)
        w1 = load(w1_ptr + j[:, None] * WIDTH + c[None, :])
        hidden = tl.dot(x1, tl.trans(w1), input_precision=SUBNET)
        if POSITION:
            table = load(table_ptr + entry[:, None] * HIDDEN + j[None, :])
            hidden = tl.dot(one_hot, table, hidden, input_precision="ieee")
        else:
            hidden += tl.load(table_ptr + j)[None, :]
        hidden = operand(tl.maximum(hidden, 0.0), PRECISION)
        scales = multiply(hidden, w2_ptr, j, scales, HIDDEN, HALF_EDGES, SUBNET)
        shifts = multiply(hidden, w2_ptr + HALF * HIDDEN, j, shifts, HIDDEN, HALF_EDGES, SUBNET)

    log_det = tl.load(log_det_ptr + row, mask=row_mask, other=0.0)
    for i in tl.static_range(len(HALF_EDGES) - 1):
        c2 = tl.arange(HALF_EDGES[i], HALF_EDGES[i + 1])
        a_s = scales[i] + tl.load(b2_ptr + c2)[None, :]
        a_t = shifts[i] + tl.load(b2_ptr + HALF + c2)[None, :]
        s = clamp * tanh(0.1 * a_s)  # 0 in the padding
        log_det += tl.sum(s, axis=1)
        x2_mask = row_mask[:, None] & (c2 < C2)[None, :]
        x2_at = row[:, None] * C + (C1 + c2)[None, :]
        x2 = tl.load(x_ptr + x2_at, mask=x2_mask, other=0.0)
        _park(out_ptr, x2 * tl.exp(s) + 0.1 * a_t, row, C1 + c2, x2_mask, C, PRECISION)
    tl.store(log_det_ptr + row, log_det, mask=row_mask)

    tl.debug_barrier()  # what is parked was written by other threads
    rotated = zeros(BLOCK_N, FULL_EDGES)
    for k0 in range(0, ROTATED, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        if PRECISION == "bf16":  # large, large, small
            u_ptr = out_ptr.to(tl.pointer_type(tl.bfloat16)) + tl.where(k < C, k, k - C)[None, :]
            u = load(u_ptr + row[:, None] * (2 * C), row_mask[:, None] & (k < 3 * C)[None, :])
        else:
            u = load(out_ptr + row[:, None] * C + k[None, :], row_mask[:, None] & (k < C)[None, :])
        rotated = multiply(u, rotation_ptr, k, rotated, ROTATED, FULL_EDGES, ROTATION)
    tl.debug_barrier()  # nobody overwrites what another still reads
    for i in tl.static_range(len(FULL_EDGES) - 1):
        c = tl.arange(FULL_EDGES[i], FULL_EDGES[i + 1])
        out_mask = row_mask[:, None] & (c < C)[None, :]
        out = rotated[i] + tl.load(shift_ptr + c)[None, :]
        tl.store(out_ptr + row[:, None] * C + c[None, :], out, mask=out_mask)


@torch.no_grad()
def coupling_blocks(
    x: Tensor,
    conditions: list[Tensor],
    parameters: tuple[Tensor, ...],
    clamp: float = 1.9,
    precision: str = "fp32",
) -> tuple[Tensor, Tensor]:
    """Compute `coupling_blocks` of ops/blocks.py: z (N, C) and log_det (N,), both float32.

    The parameters are padded and rounded for the kernel anew in each call, all blocks at once: this costs some forty
    short launches, and no copy has to follow parameters that change.
    """
    if len(conditions) == 1 or x.dtype != torch.float32:
        raise ValueError("the block kernel takes float32 features and a separable position or none; `flow` takes any")
    N, channels = x.shape
    C = triton.cdiv(channels, CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE
    variant = VARIANTS[precision]
    packed, log_gain = _pack(conditions, parameters, C, precision)
    log_det = log_gain.repeat(N)
    W, H = map(len, conditions) if conditions else (N, 1)
    warps = 8 if precision == "bf16" and N > FEW_PIXELS else 4
    patch_h, patch_w = (warps, 16) if conditions else (1, 16 * warps)
    patches = N // max(H * W, 1) * triton.cdiv(H, patch_h) * triton.cdiv(W, patch_w)
    if patches == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device), log_det
    x = _spread(x, C).contiguous()
    buffers = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(min(len(parameters[0]), 2))]
    for i, constants in enumerate(map(_Constants._make, zip(*packed, strict=True))):
        out = buffers[i % 2]
        launch(
            _block_kernel, patches, warps=warps, stages=stages(x.device),
            x_ptr=x, w1_ptr=constants.w1, w2_ptr=constants.w2, b2_ptr=constants.b2, table_ptr=constants.table,
            rotation_ptr=constants.rotation, shift_ptr=constants.shift, log_det_ptr=log_det, out_ptr=out,
            H=H, W=W, clamp=clamp, C=C, WIDTH=constants.w1.shape[1], HIDDEN=constants.w1.shape[0],
            HALF_EDGES=_edges(C // 2), FULL_EDGES=_edges(C), ROTATED=constants.rotation.shape[-1],
            POSITION=bool(conditions), TABLE_PIECES=variant.table_pieces,
            ONE_HOT=SLOTS.value * triton.next_power_of_2(variant.table_pieces),
            PRECISION=precision, SUBNET=variant.subnet, ROTATION=variant.rotation,
            PATCH_H=patch_h, PATCH_W=patch_w, BLOCK_HIDDEN=BLOCK_HIDDEN, BLOCK_K=BLOCK_K,
        )  # fmt: skip
        x = out
    if C > channels:
        x = torch.cat([x[:, : channels - channels // 2], x[:, C // 2 : C // 2 + channels // 2]], 1)
    return x, log_det


class _Constants(NamedTuple):
    """The parameters of a block as the kernel reads them, in its order; of all blocks with the blocks in front."""

    w1: Tensor
    w2: Tensor
    b2: Tensor
    table: Tensor
    rotation: Tensor
    shift: Tensor


def _pack(
    conditions: list[Tensor], parameters: tuple[Tensor, ...], C: int, precision: str
) -> tuple[_Constants, Tensor]:
    """Return the constants of all blocks, with zeros up to C channels, and the sum of their log-gains (1,)."""
    w1, b1, w2, b2, global_scale, global_offset, w_perm = parameters  # the blocks in front
    blocks, units = w1.shape[:2]
    C2 = w2.shape[1] // 2
    C1 = w_perm.shape[1] - C2
    width, hidden = max(triton.next_power_of_2(C // 2), 16), triton.cdiv(units, BLOCK_HIDDEN) * BLOCK_HIDDEN
    half, full = _edges(C // 2)[-1], _edges(C)[-1]

    gain = 0.1 * F.softplus(global_scale, beta=0.5)
    with _float32_products():
        shift = _spread(global_offset @ w_perm.mT, C)
        table = b1[:, None]
        if conditions:
            column, row = conditions
            by_column, by_row = w1[:, :, C1:].split([column.shape[1], row.shape[1]], 2)
            table = torch.cat([table + column @ by_column.mT, row @ by_row.mT], 1)
    table = F.pad(table, (0, hidden - units))
    rotation = _spread(_spread(w_perm * gain, C).mT, C).mT
    if precision == "bf16":
        rotation = torch.cat([*_pieces(rotation, 2).unbind(1), rotation.to(torch.bfloat16)], 2)
    packed = _Constants(
        w1=_operands(F.pad(w1[:, :, :C1], (0, width - C1, 0, hidden - units)), precision),
        w2=_operands(F.pad(w2.reshape(blocks, 2, C2, units), (0, hidden - units, 0, half - C2)), precision),
        b2=F.pad(b2.reshape(blocks, 2, C2), (0, half - C2)),
        table=_pieces(table, VARIANTS[precision].table_pieces) if conditions else table,
        rotation=F.pad(rotation, (0, -rotation.shape[2] % ROTATED_MULTIPLE, 0, full - C)),
        shift=F.pad(shift, (0, full - C)),
    )
    return packed, gain.log().sum().view(1)


def _spread(t: Tensor, C: int) -> Tensor:
    """Return (..., channels) with zeros behind x1 and behind x2, (..., C)."""
    channels = t.shape[-1]
    if channels == C:
        return t
    halves = t.split([channels - channels // 2, channels // 2], -1)
    return torch.cat([F.pad(half, (0, C // 2 - half.shape[-1])) for half in halves], -1)


def _edges(n: int) -> tuple[int, ...]:
    """Return 0 and the ends of shrinking pieces that cover n, powers of two from 16 up: 100 gives 0, 64, 96, 112."""
    edges, remaining = [0], triton.cdiv(n, 16) * 16
    while remaining:
        edges.append(edges[-1] + 2 ** (remaining.bit_length() - 1))
        remaining -= edges[-1] - edges[-2]
    return tuple(edges)


def _operands(w: Tensor, precision: str) -> Tensor:
    """Return weights rounded to nearest, once for all programs."""
    if precision == "bf16":
        return w.to(torch.bfloat16)
    return ((w.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) if precision == "tf32" else w


def _pieces(t: Tensor, count: int) -> Tensor:
    """Split (L, ...) into a sum of bfloat16 tensors, (L, count, ...): each holds the next 8 bits of the mantissa."""
    pieces = []
    for _ in range(count):
        pieces.append(t.to(torch.bfloat16))
        t = t - pieces[-1]
    return torch.stack(pieces, 1)


@contextmanager
def _float32_products() -> Iterator[None]:
    """Multiply float32 on CUDA with all its bits, whatever the process's default is."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
