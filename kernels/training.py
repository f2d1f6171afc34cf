"""A flow in training: the Triton twins of `_flow_forward` and `_flow_backward` in ops/blocks.py.

A block is five kernels and two products: forward the subnet with the coupling, then the rotation; backward the
rotation's inverse with both gradients, the subnet and the coupling once more, and the hidden layer's gradient. Features
are changed in place where nobody else holds them. At 200 channels and 256 positional ones that moves 19 KB a pixel
and block.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .common import FEW_PIXELS, FLOAT32, accelerated, launch, pieces, tile_of, tiled
from .packing import BLOCK_HIDDEN, Axis, Layout, gains, gathered, pack, pack_subnets, position_table, spread
from .rotation import rotate, rotate_arguments, rotation_programs, unrotate, unrotate_arguments
from .subnet import POSITIONS, _coupling_backward_kernel, _coupling_kernel, _hidden_backward_kernel

TABLE_PIECES = 2  # bfloat16 pieces of what positions add: with one, it would be rounded where the definition rounds not
DOT = {"bf16": "ieee", "tf32": FLOAT32 if FLOAT32 == "ieee" else "tf32"}  # input_precision of the subnet's products
OPERAND = {"bf16": torch.bfloat16, "tf32": torch.float32}


class _Subnets(NamedTuple):
    """Parameters of the subnets, the blocks in front."""

    w1: Tensor  # (L, 1, HIDDEN, WIDTH)
    w2: Tensor  # (L, 1, 2 HALF, HIDDEN)
    b2: Tensor  # (L, 1, 1, 2 HALF)
    table: Tensor  # (L, w + h, pieces HIDDEN)

    @classmethod
    def packed(cls, conditions: list[Tensor], parameters: list[Tensor], layout: Layout, precision: str) -> _Subnets:
        """Return the parameters as the kernels read them."""
        w1, b1, w2, b2, *_ = parameters
        return cls(
            *pack_subnets(w1, w2, b2, layout, precision),
            table=position_table(conditions, w1, b1, layout, TABLE_PIECES),
        )


class _Flow:
    """What forward and backward pass of a flow have in common; the latter gets what the former has `packed`."""

    def __init__(
        self,
        x: Tensor,
        conditions: list[Tensor],
        parameters: list[Tensor],
        clamp: float,
        precision: str,
        packed: list[Tensor] | None = None,
    ) -> None:
        self.w1, _, _, _, self.global_scale, self.global_offset, self.w_perm = parameters
        self.N, self.device, self.clamp, self.precision = len(x), x.device, clamp, precision
        self.layout = Layout(x.shape[1], self.w1.shape[1])
        self.C = self.layout.C
        if packed is None:
            packed = [gains(self.global_scale), *_Subnets.packed(conditions, parameters, self.layout, precision)]
        self.packed = packed
        self.gain, self.subnets = packed[0], _Subnets._make(packed[1:])
        self.conditions = conditions
        self.W, self.H = map(len, conditions) if conditions else (1, self.N)
        few = ", few pixels" if precision == "bf16" and self.N <= FEW_PIXELS else ""
        self.tile = tile_of(f"subnet, {precision}{few}", self.device)
        self.patch = (self.tile.pixels // 16, 16) if conditions else (self.tile.pixels, 1)
        images = self.N // max(self.H * self.W, 1)
        self.patches = images * triton.cdiv(self.H, self.patch[0]) * triton.cdiv(self.W, self.patch[1])

    def subnet_arguments(self, edges: tuple[int, ...]) -> dict[str, Any]:
        """Return the arguments of the kernels that compute the subnet, its results in pieces; but for the block."""
        w1, w2, b2, table = self.subnets
        hidden, width = self.layout.hidden.size, self.layout.width.size
        return {
            "w1": tiled(w1, BLOCK_HIDDEN, width), **pieces("w2", w2, edges, BLOCK_HIDDEN),
            "table": tiled(table, POSITIONS.value, BLOCK_HIDDEN), "b2_ptr": b2,
            "H": self.H, "W": self.W, "clamp": self.clamp,
            "C2": self.C // 2, "WIDTH": width, "HIDDEN": hidden, "HALF_EDGES": edges,
            "ROWS": bool(self.conditions), "PIECES": TABLE_PIECES, "PRECISION": self.precision,
            "DOT": DOT[self.precision], "PATCH_H": self.patch[0], "PATCH_W": self.patch[1],
            "BLOCK_HIDDEN": BLOCK_HIDDEN, "TILED": accelerated(self.device),
            "warps": self.tile.warps, "stages": self.tile.stages,
        }  # fmt: skip

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return new memory."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def rotations(self, *, transpose: bool, divide: bool = False) -> Tensor:
        """Return the pieces (L, 2, FULL, K) of R with columns times g, or of R^T with rows times, or over, g."""
        source = self.w_perm.mT if transpose else self.w_perm
        return pack(
            source, self.layout.full, self.layout.rotated, "bf16", pieces=2,
            scale=self.gain, scale_rows=transpose, divide=divide,
        )  # fmt: skip


def flow_forward(
    x: Tensor, conditions: list[Tensor], parameters: list[Tensor], clamp: float, keep: bool, every: int, precision: str
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Compute `_flow_forward` of ops/blocks.py: z (N, C), log-determinant (N,), and what is kept.

    With `keep` that is what each block rotates, [x1, y2]; else the inputs of blocks every, 2 every, ...: (N, C) with
    the padding of `Layout`. The packed parameters follow. `kept_like` says the same in shapes.
    """
    flow = _Flow(x, conditions, parameters, clamp, precision)
    channels, half, L = x.shape[1], flow.C // 2, len(flow.w1)
    log_det = flow.gain.log().sum().repeat(flow.N)
    rotations = flow.rotations(transpose=False)
    shifts = pack(flow.global_offset @ flow.w_perm.mT, Axis.plain(1, 1), flow.layout.full, "fp32")
    subnet = flow.subnet_arguments(flow.layout.half_edges)  # of all blocks: a launch has no time for it
    rotation = rotate_arguments(rotations, shifts, flow.layout.full_edges)
    kept: list[Tensor] = []
    given = spread(x, flow.C).contiguous()
    owned = given is not x  # else the caller's memory
    x = given
    for k in range(L if flow.N else 0):
        if not keep and every and k and k % every == 0:
            kept.append(x)
            owned = False
        if keep and not owned:
            x, owned = x.clone(), True
        y2 = x[:, half:] if owned else flow.empty(flow.N, half)
        launch(
            _coupling_kernel, flow.patches, x1_ptr=x[:, :half], x2_ptr=x[:, half:], y2_ptr=y2, log_det_ptr=log_det,
            k=k, **subnet,
        )  # fmt: skip
        out = x if owned and not keep else flow.empty(flow.N, flow.C)
        rotate(x[:, :half], y2, k, rotation, out)
        if keep:
            kept.append(x)
        x, owned = out, True
    return gathered(x if owned else x.clone(), channels), log_det, kept + flow.packed


def kept_like(
    x: Tensor, conditions: list[Tensor], parameters: list[Tensor], keep: bool, every: int, precision: str
) -> list[Tensor]:
    """Return empty tensors like those that `flow_forward` keeps."""
    layout, L = Layout(x.shape[1], parameters[0].shape[1]), len(parameters[0])
    count = L if keep else (L - 1) // every if every else 0
    kept = [x.new_empty(x.shape[0], layout.C) for _ in range(count if x.shape[0] else 0)]
    positions, outputs, hidden = sum(map(len, conditions)) or 1, layout.scales_and_shifts.size, layout.hidden.size
    return [
        *kept,
        x.new_empty(L, x.shape[1]),
        x.new_empty(L, 1, hidden, layout.width.size, dtype=OPERAND[precision]),
        x.new_empty(L, 1, outputs, hidden, dtype=OPERAND[precision]),
        x.new_empty(L, 1, 1, outputs),
        x.new_empty(L, positions, TABLE_PIECES * hidden, dtype=torch.bfloat16),
    ]


def flow_backward(
    gz: Tensor,
    glog_det: Tensor,
    z: Tensor,
    saved: list[Tensor],
    conditions: list[Tensor],
    parameters: list[Tensor],
    clamp: float,
    keep: bool,
    every: int,
    precision: str,
    tf32_products: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[Tensor, list[Tensor]]:
    """Compute `_flow_backward` of ops/blocks.py: the gradients of x and of the parameters but the rotations.

    In the context of `tf32_products` torch multiplies float32 with tf32 operands.
    """
    packed = saved[-1 - len(_Subnets._fields) :]
    flow = _Flow(z, conditions, parameters, clamp, precision, packed)
    channels, half, L, N = z.shape[1], flow.C // 2, len(flow.w1), flow.N
    layout, dtype = flow.layout, OPERAND[precision]
    if N == 0:
        return torch.zeros_like(gz), [t.new_zeros(t.shape) for t in parameters[:-1]]
    inverses, transposed = flow.rotations(transpose=True, divide=True), flow.rotations(transpose=True)
    shifts = pack(flow.global_offset, Axis.plain(1, 1), layout.full, "fp32", scale=flow.gain, divide=True)
    w1 = pack(flow.w1[:, :, : layout.half.first].mT, layout.half, layout.hidden, precision)
    w2 = pack(parameters[2].mT, layout.hidden, layout.scales_and_shifts, precision)

    first_inputs = _first_inputs(flow, dtype)
    units, programs = triton.cdiv(layout.units, 8) * 8, rotation_programs(N, flow.device)
    h, ga = flow.empty(N, units, dtype=dtype), flow.empty(N, flow.C, dtype=dtype)
    u, gu = (flow.empty(N, flow.C) for _ in range(2))
    gfirst, gw2 = flow.empty(L, units, first_inputs.shape[1]), flow.empty(L, flow.C, units)
    gu_sums = flow.empty(L, programs, 2, layout.full.size)
    ga_sums = flow.empty(L, flow.patches, layout.scales_and_shifts.size)
    subnet = flow.subnet_arguments(layout.short_edges)
    rotation = unrotate_arguments(inverses, shifts, transposed, layout.short_full_edges)
    hidden = pieces("w2", w2, layout.half_edges, BLOCK_HIDDEN, transposed=True)
    hidden |= pieces("w1", w1, layout.half_edges, BLOCK_HIDDEN)
    inputs = dict(zip(range(every, L, every), saved, strict=False)) if every and not keep else {}
    glog_det = glog_det.contiguous()
    output, gz = None if keep else spread(z, flow.C), spread(gz, flow.C)
    for k in reversed(range(L)):
        u = saved[k] if keep else u
        unrotate(output, gz, k, rotation, u, gu, gu_sums[k])
        launch(
            _coupling_backward_kernel, flow.patches, x1_ptr=u[:, :half], y2_ptr=u[:, half:], gy2_ptr=gu[:, half:],
            glog_det_ptr=glog_det, h_ptr=h, x1_operand_ptr=first_inputs, ga_ptr=ga, gb_ptr=ga_sums[k],
            REBUILD=not keep, k=k, **subnet,
        )  # fmt: skip
        _product(ga.mT, h, gw2[k], tf32_products)
        launch(
            _hidden_backward_kernel, triton.cdiv(N, flow.tile.pixels), warps=flow.tile.warps, stages=flow.tile.stages,
            ga_ptr=ga, h_ptr=h, gx1_ptr=gu[:, :half], **hidden, k=k, N=N,
            C2=half, HIDDEN=layout.hidden.size, HALF_EDGES=layout.half_edges, PRECISION=precision, DOT=DOT[precision],
            BLOCK_N=flow.tile.pixels, BLOCK_HIDDEN=BLOCK_HIDDEN, TILED=accelerated(flow.device),
        )  # fmt: skip
        _product(h.mT, first_inputs, gfirst[k], tf32_products)
        gz = gu
        if not keep:
            output = inputs.get(k, u)
    gx = gathered(gz, channels)
    del h, ga, u, first_inputs
    gw1, gb1 = _first_layer_gradients(flow, gfirst[:, : layout.units])
    gw2 = gw2.view(L, 2, half, units)[:, :, : channels // 2, : layout.units].reshape(parameters[2].shape).contiguous()
    gb2 = ga_sums.sum(1).view(L, 2, -1)[:, :, : channels // 2].reshape(parameters[3].shape).contiguous()
    gu_u, gu_sum = gathered(gu_sums.sum(1)[..., : flow.C], channels).unbind(1)
    ggain = (gu_u + glog_det.sum()) / flow.gain
    gscale = torch.sigmoid(0.5 * flow.global_scale) * (0.1 * ggain[:, None])
    return gx, [gw1, gb1, gw2, gb2, gscale, (gu_sum / flow.gain)[:, None]]


def _first_inputs(flow: _Flow, dtype: torch.dtype) -> Tensor:
    """Return memory for what W1 is multiplied by (N, columns): x1, then one-hot codes of column and row, or a one.

    A gradient's product with the codes sums it over the pixels of each column and row, exactly. The columns are a
    multiple of 64, so that maps of many sizes share a few kernels.
    """
    half, W, H = flow.C // 2, flow.W, flow.H if flow.conditions else 0
    inputs = torch.zeros((flow.N, triton.cdiv(half + W + H, 64) * 64), dtype=dtype, device=flow.device)
    if not flow.conditions:
        inputs[:, half] = 1
        return inputs
    maps = inputs.view(-1, H, W, inputs.shape[1])
    maps[..., half : half + W].diagonal(dim1=2, dim2=3).fill_(1)
    maps[..., half + W : half + W + H].diagonal(dim1=1, dim2=3).fill_(1)
    return inputs


def _first_layer_gradients(flow: _Flow, gfirst: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of w1 and b1 from those with respect to `_first_inputs`, (L, units, columns)."""
    half = flow.C // 2
    parts = [gfirst[:, :, : flow.layout.half.first]]
    if not flow.conditions:
        return parts[0].contiguous(), gfirst[:, :, half].contiguous()
    gcolumn, grow = gfirst[:, :, half : half + flow.W + flow.H].split([flow.W, flow.H], 2)
    column, row = flow.conditions
    return torch.cat([*parts, gcolumn @ column, grow @ row], 2), gcolumn.sum(2)


def _product(a: Tensor, b: Tensor, out: Tensor, tf32_products: Callable[[], AbstractContextManager[None]]) -> None:
    """Write a b to `out` in float32; the operands are rounded already."""
    if a.dtype == torch.bfloat16 and a.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        with tf32_products():
            torch.mm(a.float(), b.float(), out=out)
