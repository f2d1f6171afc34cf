"""The parameters of coupling blocks as the kernels read them: padded, rounded, all blocks of a flow at once.

A matrix is copied with zeros behind its rows and columns, scaled, transposed and split into pieces by one launch,
whatever the number of blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .common import launch, to_bfloat16, to_tf32

CHANNEL_MULTIPLE = 8  # halves of rows begin at multiples of 16 bytes; others load value by value, and spill registers
BLOCK_HIDDEN = 32  # hidden units that are computed together
BLOCK_K = 32  # terms of a rotation's sums that are read together
PACK_ROWS, PACK_COLUMNS = 16, 64


class Axis(NamedTuple):
    """How `first`, then `second` elements of an axis are laid out in `size`: the second ones begin at `half`."""

    first: int
    second: int
    half: int
    size: int

    @classmethod
    def plain(cls, elements: int, size: int) -> Axis:
        """Lay out elements with zeros behind them."""
        return cls(elements, 0, size, size)

    @classmethod
    def halves(cls, channels: int, half: int, size: int) -> Axis:
        """Lay out x1 with zeros behind it up to `half`, then x2 with zeros behind it."""
        return cls(channels - channels // 2, channels // 2, half, size)


@triton.jit
def _place(i, first, second, half):
    """Return which element of the source is at i, and whether there is one."""
    return tl.where(i < half, i, i - half + first), (i < first) | ((i >= half) & (i < half + second))


@triton.jit(do_not_specialize=["batch_stride", "first", "second", "half", "size"])
def _pack_kernel(
    source_ptr,  # (L, rows, columns) in
    scale_ptr,  # (L, rows or columns) in: factors of rows or columns; or None
    out_ptr,  # (L, PIECES, size, SIZE) out
    source_strides: tl.constexpr,  # of rows and columns
    batch_stride,
    first,  # the rows' `Axis`
    second,
    half,
    size,
    FIRST: tl.constexpr,  # the columns' `Axis`
    SECOND: tl.constexpr,
    HALF: tl.constexpr,
    SIZE: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    DIVIDE: tl.constexpr,  # by the scale
    PIECES: tl.constexpr,
    IN_ROWS: tl.constexpr,  # out is (L, size, PIECES SIZE)
    ROUND: tl.constexpr,  # "bf16", "tf32" or "fp32"
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    row, row_exists = _place(r, first, second, half)
    column, column_exists = _place(c, FIRST, SECOND, HALF)
    exists = row_exists[:, None] & column_exists[None, :]
    at = source_ptr + block * batch_stride + row[:, None] * source_strides[0] + column[None, :] * source_strides[1]
    x = tl.load(at, mask=exists, other=0.0)
    if scale_ptr is not None:
        if SCALE_ROWS:
            scale = tl.load(scale_ptr + block * (first + second) + row, mask=row_exists, other=1.0)[:, None]
        else:
            scale = tl.load(scale_ptr + block * (FIRST + SECOND) + column, mask=column_exists, other=1.0)[None, :]
        x = x / scale if DIVIDE else x * scale
    row_stride: tl.constexpr = PIECES * SIZE if IN_ROWS else SIZE
    out_at = out_ptr + block * PIECES * size * SIZE + r[:, None] * row_stride + c[None, :]
    piece_stride = SIZE if IN_ROWS else size * SIZE
    mask = (r < size)[:, None] & (c < SIZE)[None, :]
    for piece in tl.static_range(PIECES):
        if ROUND == "bf16":
            rounded = to_bfloat16(x)
        elif ROUND == "tf32":
            rounded = to_tf32(x)
        else:
            rounded = x
        tl.store(out_at + piece * piece_stride, rounded, mask=mask)
        x -= rounded.to(tl.float32)


def pack(
    source: Tensor,
    rows: Axis,
    columns: Axis,
    precision: str,
    *,
    pieces: int = 1,
    in_rows: bool = False,
    scale: Tensor | None = None,
    scale_rows: bool = False,
    divide: bool = False,
) -> Tensor:
    """Return matrices laid out anew and rounded, (L, pieces, rows.size, columns.size).

    With `in_rows` the pieces of a row follow each other, (L, rows.size, pieces columns.size).

    Args:
        source: (L, rows, columns), float32, of any strides.
        rows, columns: the layout.
        precision: ``"bf16"``, ``"tf32"`` or ``"fp32"``; bfloat16 for the first, else float32.
        pieces: in how many terms of this precision each number is split: their sum has the more bits.
        scale: factors of the columns (L, columns), or with `scale_rows` of the rows; with `divide` divisors.
    """
    blocks, scaled = source.shape[0], rows if scale_rows else columns
    expected = blocks, rows.first + rows.second, columns.first + columns.second
    if source.shape != expected or scale is not None and scale.shape != (blocks, scaled.first + scaled.second):
        given = f"{tuple(source.shape)}" + ("" if scale is None else f", scaled by {tuple(scale.shape)}")
        raise ValueError(f"parameters of shape {given} do not fit the flow, which takes {expected} there")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    shape = (rows.size, pieces * columns.size) if in_rows else (pieces, rows.size, columns.size)
    out = torch.empty((blocks, *shape), dtype=dtype, device=source.device)
    grid = blocks, triton.cdiv(rows.size, PACK_ROWS), triton.cdiv(columns.size, PACK_COLUMNS)
    launch(
        _pack_kernel, grid,
        source_ptr=source, scale_ptr=scale, out_ptr=out, source_strides=source.stride()[1:],
        batch_stride=source.stride(0), first=rows.first, second=rows.second, half=rows.half, size=rows.size,
        FIRST=columns.first, SECOND=columns.second, HALF=columns.half, SIZE=columns.size,
        SCALE_ROWS=scale_rows, DIVIDE=divide, PIECES=pieces, IN_ROWS=in_rows, ROUND=precision,
        BLOCK_R=PACK_ROWS, BLOCK_C=PACK_COLUMNS,
    )  # fmt: skip
    return out


def edges(n: int, largest: int = 256) -> tuple[int, ...]:
    """Return 0 and the ends of shrinking pieces that cover n, powers of two from 16 up: 100 gives 0, 64, 96, 112."""
    ends, remaining = [0], triton.cdiv(n, 16) * 16
    while remaining:
        ends.append(ends[-1] + min(2 ** (remaining.bit_length() - 1), largest))
        remaining -= ends[-1] - ends[-2]
    return tuple(ends)


class Layout(NamedTuple):
    """The sizes of a flow's blocks, real and padded."""

    channels: int
    units: int

    @property
    def C(self) -> int:
        """Channels with zeros behind x1 and x2."""
        return triton.cdiv(self.channels, CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE

    @property
    def half_edges(self) -> tuple[int, ...]:
        """The pieces of C / 2 channels in a product."""
        return edges(self.C // 2)

    @property
    def short_edges(self) -> tuple[int, ...]:
        """Shorter pieces of C / 2 channels, for a kernel that does so much with each that longer ones do not fit."""
        return edges(self.C // 2, largest=32)

    @property
    def full_edges(self) -> tuple[int, ...]:
        """The pieces of C channels in a product."""
        return edges(self.C)

    @property
    def short_full_edges(self) -> tuple[int, ...]:
        """Shorter pieces of C channels, for the same reason."""
        return edges(self.C, largest=64)

    @property
    def half(self) -> Axis:
        """x1, or x2, alone: the extent of a product's result."""
        return Axis.plain(self.channels - self.channels // 2, self.half_edges[-1])

    @property
    def scales_and_shifts(self) -> Axis:
        """What a subnet returns."""
        changed, size = self.channels // 2, self.half_edges[-1]
        return Axis(changed, changed, size, 2 * size)

    @property
    def width(self) -> Axis:
        """x1 as the terms of a sum."""
        return Axis.plain(self.channels - self.channels // 2, max(triton.next_power_of_2(self.C // 2), 16))

    @property
    def hidden(self) -> Axis:
        """The hidden units."""
        return Axis.plain(self.units, triton.cdiv(self.units, BLOCK_HIDDEN) * BLOCK_HIDDEN)

    @property
    def full(self) -> Axis:
        """[x1, x2] as the extent of a product's result."""
        return Axis.halves(self.channels, self.C // 2, self.full_edges[-1])

    @property
    def rotated(self) -> Axis:
        """[x1, x2] as the terms of a sum, each half by chunks."""
        half = triton.cdiv(self.C // 2, BLOCK_K) * BLOCK_K
        return Axis.halves(self.channels, half, 2 * half)


def spread(t: Tensor, C: int) -> Tensor:
    """Return (..., channels) with zeros behind x1 and behind x2, (..., C)."""
    channels = t.shape[-1]
    if channels == C:
        return t
    halves = t.split([channels - channels // 2, channels // 2], -1)
    return torch.cat([F.pad(half, (0, C // 2 - half.shape[-1])) for half in halves], -1)


def gathered(t: Tensor, channels: int) -> Tensor:
    """Undo `spread`."""
    C = t.shape[-1]
    if channels == C:
        return t
    return torch.cat([t[..., : channels - channels // 2], t[..., C // 2 : C // 2 + channels // 2]], -1)


def gains(global_scale: Tensor) -> Tensor:
    """Return the gain of each channel in each block, (L, C), from the parameter (L, 1, C)."""
    return 0.1 * F.softplus(global_scale, beta=0.5).squeeze(1)


def pack_subnets(w1: Tensor, w2: Tensor, b2: Tensor, layout: Layout, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the subnets' weights rounded: W1's columns for x1, W2, and b2 in float32."""
    return (
        pack(w1[:, :, : layout.half.first], layout.hidden, layout.width, precision),
        pack(w2, layout.scales_and_shifts, layout.hidden, precision),
        pack(b2[:, None], Axis.plain(1, 1), layout.scales_and_shifts, "fp32"),
    )


def position_table(conditions: list[Tensor], w1: Tensor, b1: Tensor, layout: Layout, pieces: int) -> Tensor:
    """Return what a pixel's column, then its row adds to the hidden units, b1 in the former.

    Returns:
        (L, w + h, pieces hidden) in bfloat16 pieces; without conditions a map is one column wide, and has no rows.
    """
    if not conditions:
        return pack(b1[:, None], Axis.plain(1, 1), layout.hidden, "bf16", pieces=pieces, in_rows=True)
    column, row = conditions
    by_column, by_row = w1[:, :, layout.half.first :].split([column.shape[1], row.shape[1]], 2)
    by_column = torch.baddbmm(b1[:, None], column.expand(len(w1), -1, -1), by_column.mT)
    table = torch.cat([by_column, row @ by_row.mT], 1)
    return pack(table, Axis.plain(table.shape[1], table.shape[1]), layout.hidden, "bf16", pieces=pieces, in_rows=True)
