"""The coupling blocks of a level's flow, computed together, forward and backward (HGAD, arXiv 2403.13349, section 3.2).

Symbols: N pixels, row-major over (image, row, column); C channels, of which C1 = C - C // 2 pass through a coupling
block and C2 = C // 2 are transformed; P positional channels; Hd = 2 (C1 + P) hidden units; L blocks.

(This file is not called flow.py, because `hgad_fast.ops.flow` is the operation.)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..environment import bfloat16_instructions
from .coupling import affine_coupling, affine_coupling_backward
from .dispatch import float32_products, fused, in_float32, kernels, no_double_backward, path

PRECISIONS = ("fp32", "tf32", "bf16")
MEMORY_MODES = ("standard", "reversible")
BLOCK_KERNEL_CHANNELS = range(2, 201)  # with more, the kernels' sums spill from the registers inside their loops
MAX_POSITIONS = 1024  # rows and columns of a map that the kernels of training take
ROTATION = "fp32"  # operands of the rotations' products here; the kernels' are bf16x3 (see `coupling_blocks`)


class Block(NamedTuple):
    """Parameters of one coupling block."""

    w1: Tensor  # (Hd, C1 + P)
    b1: Tensor  # (Hd,)
    w2: Tensor  # (2 C2, Hd)
    b2: Tensor  # (2 C2,)
    global_scale: Tensor  # (1, C), before its softplus
    global_offset: Tensor  # (1, C)
    w_perm: Tensor  # (C, C), orthogonal, not trained


class Blocks(NamedTuple):
    """Parameters of the L coupling blocks of a flow, stacked: those of a `Block` with L in front."""

    w1: Tensor  # (L, Hd, C1 + P)
    b1: Tensor  # (L, Hd)
    w2: Tensor  # (L, 2 C2, Hd)
    b2: Tensor  # (L, 2 C2)
    global_scale: Tensor  # (L, 1, C), before its softplus
    global_offset: Tensor  # (L, 1, C)
    w_perm: Tensor  # (L, C, C), orthogonal, not trained

    @classmethod
    def stack(cls, blocks: Blocks | Sequence[Block]) -> Blocks:
        """Return blocks in the stacked form, differentiable in each of them."""
        if isinstance(blocks, Blocks):
            return blocks
        if not blocks:
            raise ValueError("blocks is empty; a flow has at least one coupling block")
        stacked = cls._make(map(torch.stack, zip(*blocks, strict=True)))
        # Column after column, as QR gives a rotation: a product with the other layout rounds otherwise.
        return stacked._replace(w_perm=stacked.w_perm.mT.contiguous().mT)

    def each(self) -> list[Block]:
        """Return the blocks in order, as views."""
        return [Block._make(parts) for parts in zip(*(stacked.unbind() for stacked in self), strict=True)]


class SeparablePosition(NamedTuple):
    """The sinusoidal code of a feature map of h x w pixels: channels 0..P/2 depend on the column, P/2..P on the row.

    A product with it splits in two tiny ones, W pos(row, column) = W_c column + W_r row: exact, and almost free.
    """

    column: Tensor  # (w, P / 2)
    row: Tensor  # (h, P / 2)


Position = SeparablePosition | Tensor | None


@in_float32
def flow_definition(
    x: Tensor,
    blocks: Blocks | Sequence[Block],
    position: Position = None,
    *,
    clamp: float = 1.9,
    inverse: bool = False,
    precision: str = "fp32",
) -> tuple[Tensor, Tensor]:
    """Compute the conditional flow of one level in plain torch, differentiable to any order; `flow` is the fast form.

    Each block maps [x1, x2] to R ([x1, y2] g + offset), y2 = affine_coupling(x2, subnet(x1, position)), with g =
    0.1 softplus(global_scale) of sharpness 0.5; scale, offset and rotation R act as one matrix R diag(g).
    """
    log_det = x.new_zeros(x.shape[0])
    c1 = x.shape[1] - x.shape[1] // 2
    conditions = _conditions(position)
    in_order = Blocks.stack(blocks).each()
    for block in reversed(in_order) if inverse else in_order:
        gain = _gain(block.global_scale)
        if inverse:
            x = (x @ block.w_perm - block.global_offset) / gain
        x1, x2 = x[:, :c1], x[:, c1:]
        a = _subnet_definition(x1, block, conditions, precision)
        y2, coupling_log_det = affine_coupling(x2, a, clamp, inverse=inverse, backend="torch")
        x = torch.cat([x1, y2], 1)
        if not inverse:
            x = (x * gain + block.global_offset) @ block.w_perm.T
        log_det = log_det + coupling_log_det + (-1 if inverse else 1) * gain.log().sum()
    return x, log_det


def flow(
    x: Tensor,
    blocks: Blocks | Sequence[Block],
    position: Position = None,
    *,
    clamp: float = 1.9,
    inverse: bool = False,
    memory: str = "standard",
    checkpoint_every: int = 0,
    precision: str = "fp32",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute all coupling blocks of a level, one operation forward and one backward; defined by `flow_definition`.

    Args:
        x: features (N, C), float32 (float64 is computed in float64).
        blocks: parameters of the L blocks, stacked, or one `Block` after the other in order.
        position: `SeparablePosition` of an (h, w) map with N a multiple of h w, a dense code (N, P), or None. A dense
            code may learn; a separable one gets no gradient, nor do the rotations.
        clamp: bound of the log-scale of a coupling block.
        inverse: map z to x instead (differentiable through plain autograd).
        memory: ``"standard"`` keeps activations of every block for the backward pass (where the kernels of training
            run, one tensor like x each), ``"reversible"`` only z, and rebuilds them block by block.
        checkpoint_every: with reversible memory, the input of every so many blocks is kept too (4 C bytes per pixel
            each in float32), so that rounding errors of the rebuilt activations grow from there only; 0 keeps none.
        precision: operands of the subnets' products: ``"fp32"``, ``"tf32"`` (rounded to nearest) or ``"bf16"``, all
            with float32 accumulation. In bf16 a CPU rounds the results of these products to bfloat16, too; one without
            bfloat16 instructions (`environment.bfloat16_instructions`) multiplies the rounded operands in float32,
            which takes longer than ``"fp32"``. Rotations stay in float32, on CUDA in tf32 and bf16 in bf16x3; see
            `coupling_blocks`.
        backend: what computes the affine coupling, or whole blocks where `flow_path` says so: ``"auto"``, ``"triton"``
            or ``"torch"``.

    Returns:
        z (N, C) and log-determinant (N,), in the dtype of x.

    Raises:
        ValueError: a shape or a named choice does not fit; the message says which.
    """
    parameters = Blocks.stack(blocks)
    _check_flow(x, parameters, position, memory, checkpoint_every, precision)
    if inverse:
        return flow_definition(x, parameters, position, clamp=clamp, inverse=True)
    conditions = _conditions(position)
    options = (precision, backend or "")
    wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *conditions, *parameters))
    if not wants_gradient:
        return _flow_inference(x, conditions, list(parameters), clamp, *options)
    keep = memory == "standard"
    z, log_det, _ = _flow_forward(
        x, conditions, list(parameters), clamp, keep, 1 if keep else checkpoint_every, *options
    )
    return z, log_det


def flow_path(x: Tensor, position: Position, precision: str, backend: str | None = None) -> str:
    """Return what computes `flow` for tensors like these where no gradient is wanted.

    Returns:
        ``"torch"``, ``"triton"`` (products in torch, the coupling in a kernel) or ``"triton, whole blocks"``, for
        bfloat16 subnets of at most 200 channels with a separable position or none. There the hidden layer, seven times
        the size of the features, never leaves the chip. Where a gradient is wanted, and in tf32, the kernels of
        training compute flows of such sizes, block by block.
    """
    computed_by = path(x, backend)
    whole = computed_by == "triton" and _block_kernel_fits(x, _conditions(position), precision)
    return "triton, whole blocks" if whole else computed_by


def _block_kernel_fits(x: Tensor, conditions: list[Tensor], precision: str) -> bool:
    """Return whether the kernel of whole blocks is used for such tensors."""
    channels_fit = x.shape[1] in BLOCK_KERNEL_CHANNELS
    return channels_fit and x.dtype == torch.float32 and precision == "bf16" and len(conditions) != 1


def _training_kernels_run(x: Tensor, conditions: list[Tensor], precision: str, backend: str) -> bool:
    """Return whether the kernels of training compute the blocks: for operands of less than float32's bits.

    They take one-hot codes of a map's columns and rows, which for very long maps would be larger than the hidden layer.
    """
    fits = x.shape[1] in BLOCK_KERNEL_CHANNELS and len(conditions) != 1 and x.dtype == torch.float32
    fits = fits and sum(map(len, conditions)) <= MAX_POSITIONS
    return fits and precision != "fp32" and path(x, backend) == "triton"


def _check_coupling_blocks(
    x: Tensor,
    conditions: list[Tensor],
    parameters: tuple[Tensor, ...],
    clamp: float = 1.9,
    precision: str = "fp32",
) -> None:
    """Raise a ValueError where a shape or the precision does not fit."""
    position = SeparablePosition(*conditions) if len(conditions) == 2 else conditions[0] if conditions else None
    _check_flow(x, Blocks._make(parameters), position, "standard", 0, precision)


@fused("blocks", check=_check_coupling_blocks)
def coupling_blocks(
    x: Tensor,
    conditions: list[Tensor],
    parameters: tuple[Tensor, ...],
    clamp: float = 1.9,
    precision: str = "fp32",
) -> tuple[Tensor, Tensor]:
    """Compute coupling blocks as `flow_definition` does, the subnets' operands rounded, and keep nothing of them.

    Args:
        x: (N, C).
        conditions: [column, row] of a `SeparablePosition`, or nothing.
        parameters: those of `Blocks`.
        clamp, precision: as in `flow`. The kernel multiplies the rotation with the accuracy of float32, but in bf16 and
            tf32 as bf16x3: factors are split in two bfloat16 pieces, a large and a small one, and all products but that
            of the small ones are added (error 1e-5).

    Returns:
        z (N, C) and log-determinant (N,); not differentiable.
    """
    position = SeparablePosition(*conditions) if conditions else None
    with torch.no_grad():
        return flow_definition(x, Blocks._make(parameters), position, clamp=clamp, precision=precision)


def _check_flow(
    x: Tensor, blocks: Blocks, position: Position, memory: str, checkpoint_every: int, precision: str
) -> None:
    """Raise a ValueError where a shape or a named choice does not fit."""
    for name, value, allowed in (("memory", memory, MEMORY_MODES), ("precision", precision, PRECISIONS)):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; allowed are {', '.join(allowed)}")
    if not isinstance(checkpoint_every, int) or checkpoint_every < 0:
        raise ValueError(f"checkpoint_every is {checkpoint_every!r}; allowed is a whole number from 0")
    channels = blocks.w_perm.shape[-1]
    if x.dim() != 2 or x.shape[1] != channels:
        raise ValueError(f"x has shape {tuple(x.shape)}; this flow takes (N, {channels})")
    n, width = x.shape[0], blocks.w1.shape[-1] - (channels - channels // 2)
    if isinstance(position, SeparablePosition):
        pixels = position.row.shape[0] * position.column.shape[0]
        if position.row.shape[1] + position.column.shape[1] != width or (n % pixels if pixels else n):
            raise ValueError(
                f"a separable position of row code {tuple(position.row.shape)} and column code "
                f"{tuple(position.column.shape)} does not fit {n} pixels of {width} positional channels"
            )
    elif position is None and width or position is not None and position.shape != (n, width):
        shape = None if position is None else tuple(position.shape)
        raise ValueError(f"position has shape {shape}; {n} pixels of this flow need ({n}, {width})")


def _conditions(position: Position) -> list[Tensor]:
    """Return the position as a list of tensors, as the schema of an operator needs it: [column, row], [dense] or []."""
    if isinstance(position, SeparablePosition):
        return [position.column, position.row]
    return [] if position is None else [position]


def _gain(global_scale: Tensor) -> Tensor:
    """Return the scale g of a block, (1, C), or those of all blocks."""
    return 0.1 * F.softplus(global_scale, beta=0.5)


def _operand(x: Tensor, precision: str) -> Tensor:
    """Return x rounded to nearest in a product's operand precision; tensor cores would truncate, which is biased."""
    if precision == "fp32" or x.dtype == torch.float64:
        return x
    if precision == "tf32":
        rounded = ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
        return torch.where(x.isnan(), x, rounded)  # a GPU's NaN is 0x7FFFFFFF, which would become 0
    rounded = x.to(torch.bfloat16)
    return rounded if x.is_cuda or bfloat16_instructions() else rounded.to(x.dtype)


def _result(y: Tensor, precision: str) -> Tensor:
    """Return the result of a subnet's product as it is kept: in bf16 a CPU gives bfloat16, a GPU float32."""
    return _operand(y, precision) if precision == "bf16" and not y.is_cuda else y


def _product(x: Tensor, w: Tensor, precision: str, add: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Return x @ w with operands of the given precision and float32 accumulation, added to `add` or put into `out`.

    Added to a bfloat16 tensor, the sum is rounded once.
    """
    if precision == "bf16x3" and x.dtype == torch.float32:
        (x, small_x), (w, small_w) = _pieces(x), _pieces(w)
        y = small_x @ w + x @ small_w
        y += x @ w
    else:
        x, w = _operand(x, precision), _operand(w, precision)
        if precision != "bf16" or (add is not None and add.dtype == torch.bfloat16):
            with float32_products(x.device, "tf32") if precision == "tf32" else nullcontext():  # else they are exact
                return torch.mm(x, w, out=out) if add is None else add.addmm_(x, w)
        y = torch.mm(x, w, out_dtype=torch.float32) if x.is_cuda else _result(torch.mm(x, w), precision)
    if add is not None:
        return add.add_(y)
    return y if out is None else out.copy_(y)


def _pieces(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split x into two bfloat16 numbers, a large and a small one, returned as float32."""
    large = x.bfloat16().to(x.dtype)
    return large, (x - large).bfloat16().to(x.dtype)


def _subnet_definition(x1: Tensor, block: Block, conditions: list[Tensor], precision: str) -> Tensor:
    """Return a = W2 relu(W1 [x1, position] + b1) + b2 (N, 2 C2), operands rounded, results not."""

    def product(x: Tensor, w: Tensor) -> Tensor:
        return _operand(x, precision).to(x.dtype) @ _operand(w, precision).to(w.dtype).T

    c1 = x1.shape[1]
    if len(conditions) == 2:
        column, row = _position_tables(block.w1[:, c1:], conditions)
        table = (row[:, None] + (column + block.b1)).flatten(0, 1)
        hidden = table.repeat(len(x1) // max(len(table), 1), 1)
    else:
        hidden = block.b1.expand(len(x1), -1)
        for dense in conditions:
            hidden = hidden + product(dense, block.w1[:, c1:])
    return product((hidden + product(x1, block.w1[:, :c1])).relu(), block.w2) + block.b2


def _position_tables(w1p: Tensor, conditions: list[Tensor]) -> list[Tensor]:
    """Return the products of the first layer with the codes of columns and rows; of all blocks with L in front."""
    column, row = conditions
    half = column.shape[1]
    return [column @ w1p[..., :half].mT, row @ w1p[..., half:].mT]


class _Weights(NamedTuple):
    """What the features of a block are multiplied with, and what is added to them."""

    w1x: Tensor  # (Hd, C1), operand
    w1p: Tensor  # (Hd, P)
    b1: Tensor  # (Hd,), as results are kept
    w2: Tensor  # (2 C2, Hd), operand
    b2: Tensor  # (2 C2,), as results are kept
    gain: Tensor  # (1, C)
    rotation: Tensor  # (C, C), R diag(g)
    offset: Tensor  # (1, C), R offset


def _weights(parameters: list[Tensor], precision: str) -> list[_Weights]:
    """Return the weights of each block; they are made together, and kept while no parameter changes."""

    def make() -> list[_Weights]:
        blocks = Blocks._make(parameters)
        c1 = blocks.w_perm.shape[-1] - blocks.w_perm.shape[-1] // 2
        gain = _gain(blocks.global_scale)
        weights = _Weights(
            w1x=_operand(blocks.w1[..., :c1], precision),
            w1p=blocks.w1[..., c1:],
            b1=_result(blocks.b1, precision),
            w2=_operand(blocks.w2, precision),
            b2=_result(blocks.b2, precision),
            gain=gain,
            rotation=blocks.w_perm * gain,
            offset=blocks.global_offset @ blocks.w_perm.mT,
        )
        return [_Weights._make(parts) for parts in zip(*map(torch.unbind, weights), strict=True)]

    return kernels("cache").PACKED.get(make, ("weights", precision), parameters)


def _tables(conditions: list[Tensor], parameters: list[Tensor], precision: str) -> list[tuple[Tensor, ...]]:
    """Return what a separable position adds to the hidden layer of each block, kept like `_weights`: (w, Hd), (h, Hd).

    With a dense position, or none, there is nothing for any block.
    """
    blocks = Blocks._make(parameters)
    if len(conditions) != 2:
        return [()] * len(blocks.w1)

    def make() -> list[tuple[Tensor, ...]]:
        column, row = _position_tables(blocks.w1[..., -2 * conditions[0].shape[1] :], conditions)
        tables = _result(column + blocks.b1[:, None], precision), _result(row, precision)
        return list(zip(*map(torch.unbind, tables), strict=True))

    return kernels("cache").PACKED.get(make, ("tables", precision), [*conditions, blocks.w1, blocks.b1])


def _subnet(
    x1: Tensor,
    weights: _Weights,
    tables: tuple[Tensor, ...],
    conditions: list[Tensor],
    precision: str,
    memory: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return h = relu(W1 [x1, position] + b1) (N, Hd) and a = W2 h + b2 (N, 2 C2), in `memory` if there is some."""
    h, a = memory or _subnet_memory(len(x1), weights)
    if tables and len(h):
        column, row = tables
        maps = h.view(-1, len(row), len(column), h.shape[1])
        torch.add(row[:, None], column, out=maps[0])
        maps[1:] = maps[0]
    else:
        h.copy_(weights.b1)
        for dense in conditions:
            _product(dense, weights.w1p.T, precision, add=h)
    h = _operand(_relu(_product(x1, weights.w1x.T, precision, add=h)), precision)
    return h, _result(_product(h, weights.w2.T, precision, add=a.copy_(weights.b2)), precision)


def _subnet_memory(n: int, weights: _Weights) -> tuple[Tensor, Tensor]:
    """Return memory for the results of a subnet's products for n pixels."""
    return weights.b1.new_empty(n, len(weights.b1)), weights.b2.new_empty(n, len(weights.b2))


def _relu(h: Tensor) -> Tensor:
    """Set what is negative in h to 0, in place; a NaN stays one."""
    if h.dtype != torch.bfloat16 or h.is_cuda:
        return h.relu_()
    # The bits of bfloat16 as integers, which a CPU works on several times as fast: those up to -infinity are -128 and
    # less, those of NaNs with a sign lie above.
    torch.threshold_(h.view(torch.int16), -128, 0)
    return h


def _masked(gh: Tensor, h: Tensor) -> Tensor:
    """Set the gradient to 0 where h = relu(...) is, in place."""
    bits, mask = (t.view(torch.int16) if t.dtype == torch.bfloat16 and not t.is_cuda else t for t in (gh, h))
    torch.ops.aten.threshold_backward.grad_input(bits, mask, 0, grad_input=bits)
    return gh


@torch.library.custom_op("hgad_fast::flow_forward", mutates_args=())
@in_float32
def _flow_forward(
    x: Tensor,
    conditions: list[Tensor],
    parameters: list[Tensor],
    clamp: float,
    keep: bool,
    every: int,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return z, the log-determinant, and what is kept for the backward pass.

    That is the inputs of blocks every, 2 every, ..., or with `keep` (u = [x1, y2], h, a) of each block; where the
    training kernels compute, which rebuild h and a in any case, u of each block alone.
    """
    if _training_kernels_run(x, conditions, precision, backend):
        return kernels("training").flow_forward(x, conditions, parameters, clamp, keep, every, precision)
    c1 = x.shape[1] - x.shape[1] // 2
    weights, tables = _weights(parameters, precision), _tables(conditions, parameters, precision)
    coupling: Any = affine_coupling.reference
    if path(x, backend) == "triton":
        coupling = functools.partial(affine_coupling, backend=backend)
    log_det = torch.cat([block.gain for block in weights]).log().sum().repeat(len(x))
    inputs, activations = [], []
    x = x.clone(memory_format=torch.contiguous_format)
    for k, block in enumerate(weights):
        if keep or k == 0:
            memory, spare = _subnet_memory(len(x), block), torch.empty_like(x)
        if every and not keep and k and k % every == 0:
            inputs.append(x.clone())
        h, a = _subnet(x[:, :c1], block, tables[k], conditions, precision, memory)
        x[:, c1:], coupling_log_det = coupling(x[:, c1:], a, clamp)
        log_det += coupling_log_det
        u, x = x, _product(x, block.rotation.T, ROTATION, add=spare.copy_(block.offset))
        if keep:
            activations += [u, h, a]
        spare = u
    return x, log_det, inputs + activations


@_flow_forward.register_fake
def _(x, conditions, parameters, clamp, keep, every, precision, backend):  # type: ignore[no-untyped-def]
    blocks, hidden = parameters[0].shape[:2]
    n, c2 = x.shape[0], x.shape[1] // 2
    if _training_kernels_run(x, conditions, precision, backend):
        kept = kernels("training").kept_like(x, conditions, parameters, keep, every, precision)
        return x.new_empty(x.shape), x.new_empty(n), kept
    kept = [x.new_empty(x.shape) for _ in range((blocks - 1) // every if every and not keep else 0)]
    for _ in range(blocks if keep else 0):
        h = _operand(x.new_empty(n, hidden), precision)
        kept += [x.new_empty(x.shape), h, _result(x.new_empty(n, 2 * c2), precision)]
    return x.new_empty(x.shape), x.new_empty(n), kept


@torch.library.custom_op("hgad_fast::flow_inference", mutates_args=())
@in_float32
def _flow_inference(
    x: Tensor, conditions: list[Tensor], parameters: list[Tensor], clamp: float, precision: str, backend: str
) -> tuple[Tensor, Tensor]:
    """Return z and the log-determinant where no gradient is wanted."""
    if path(x, backend) == "triton" and _block_kernel_fits(x, conditions, precision):
        return coupling_blocks(x, conditions, tuple(parameters), clamp, precision, backend="triton")
    z, log_det, _ = _flow_forward(x, conditions, parameters, clamp, False, 0, precision, backend)
    return z, log_det


@_flow_inference.register_fake
def _(x, conditions, parameters, clamp, precision, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), x.new_empty(x.shape[0])


@torch.library.custom_op("hgad_fast::flow_backward", mutates_args=())
@in_float32
def _flow_backward(
    gz: Tensor,
    glog_det: Tensor,
    z: Tensor,
    saved: list[Tensor],
    conditions: list[Tensor],
    parameters: list[Tensor],
    clamp: float,
    keep: bool,
    every: int,
    wants_gx: bool,
    wants_gposition: bool,
    precision: str,
    backend: str,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return the gradients of x, of a dense position, and of all stacked parameters but w_perm.

    `saved` is what the forward pass kept. Without `keep` the input of each block is rebuilt from its output, with the
    forward pass's operands.
    """
    if _training_kernels_run(z, conditions, precision, backend):
        multiply = functools.partial(float32_products, z.device, "tf32")
        gx, gradients = kernels("training").flow_backward(
            gz, glog_det, z, saved, conditions, parameters, clamp, keep, every, precision, multiply
        )
        return gx, [], gradients
    c1 = z.shape[1] - z.shape[1] // 2
    blocks = Blocks._make(parameters).each()
    weights, tables = _weights(parameters, precision), _tables(conditions, parameters, precision)
    inputs = {} if keep else dict(zip(range(every, len(blocks), max(every, 1)), saved, strict=False))
    glog_det = glog_det.contiguous()
    gposition = [torch.zeros_like(dense) for dense in conditions] if wants_gposition else []
    gradients = [torch.empty_like(stacked, memory_format=torch.contiguous_format) for stacked in parameters[:-1]]
    gw1, gb1, gw2, gb2, gscale, goffset = gradients
    for k in reversed(range(len(blocks))):
        block, gain = blocks[k], weights[k].gain
        if keep:
            u, h, a = saved[3 * k : 3 * k + 3]
        else:
            offset = (-block.global_offset / gain).repeat(z.shape[0], 1)
            u = _product(z, block.w_perm / gain, ROTATION, add=offset)
            h, a = _subnet(u[:, :c1], weights[k], tables[k], conditions, precision)
        x1, y2 = u[:, :c1], u[:, c1:]

        gu = _product(gz, weights[k].rotation, ROTATION)
        ggain = (gu * u).sum(0).add_(glog_det.sum()) / gain
        torch.mul(ggain, 0.1 * torch.sigmoid(0.5 * block.global_scale), out=gscale[k])
        torch.div(gu.sum(0), gain, out=goffset[k])

        gx2, ga, gb2[k], x2 = affine_coupling_backward(gu[:, c1:], glog_det, y2, a, clamp, backend=backend)
        ga = _operand(ga, precision)
        _product(ga.T, h, precision, out=gw2[k])
        gh = _masked(_product(ga, weights[k].w2, precision), h)
        _first_layer_gradients(gh, x1, conditions, precision, gw1[k], gb1[k])
        for gdense in gposition:
            _product(gh, block.w1[:, c1:], precision, add=gdense)

        gz = gu
        if k or wants_gx:
            _product(gh, weights[k].w1x, precision, add=gz[:, :c1])
            gz[:, c1:] = gx2
        if k in inputs:
            z = inputs[k]
        elif k and not keep:
            u[:, c1:] = x2
            z = u
    return gz, gposition, gradients


def _first_layer_gradients(
    gh: Tensor, x1: Tensor, conditions: list[Tensor], precision: str, gw1: Tensor, gb1: Tensor
) -> None:
    """Write the gradients of W1 and b1; with a separable position, gh is summed per column and row of the map first."""
    parts = [_product(gh.T, x1, precision)]
    if len(conditions) == 2:
        column, row = conditions
        gtable = (
            gh.view(-1, len(row) * len(column), gh.shape[1]).sum(0, dtype=gb1.dtype).view(len(row), len(column), -1)
        )
        gcolumn, grow = gtable.sum(0), gtable.sum(1)
        parts += [gcolumn.T @ column, grow.T @ row]
        torch.sum(gcolumn, 0, out=gb1)
    else:
        parts += [_product(gh.T, dense, precision) for dense in conditions]
        torch.sum(gh, 0, dtype=gb1.dtype, out=gb1)
    torch.cat(parts, 1, out=gw1)


@_flow_backward.register_fake
def _(gz, glog_det, z, saved, conditions, parameters, clamp, keep, every, wants_gx, wants_gposition, *_):  # type: ignore[no-untyped-def]
    gposition = [torch.empty_like(dense) for dense in conditions] if wants_gposition else []
    gradients = [torch.empty_like(stacked, memory_format=torch.contiguous_format) for stacked in parameters[:-1]]
    return torch.empty_like(z), gposition, gradients


def _save_flow(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    """Save what `_flow_gradients` reads."""
    _, conditions, parameters, clamp, keep, every, precision, backend = inputs
    z, _, saved = output
    ctx.set_materialize_grads(False)  # zeros for every saved activation would cost what keeping them costs
    ctx.conditions = slice(1 + len(saved), 1 + len(saved) + len(conditions))
    ctx.options = (clamp, keep, every, precision, backend)
    ctx.save_for_backward(z, *saved, *conditions, *parameters)


def _flow_gradients(ctx: Any, gz: Tensor | None, glog_det: Tensor | None, _: Any) -> tuple[Any, ...]:
    """Return the gradients of the inputs of `_flow_forward`; None where none is wanted."""
    tensors, slots = ctx.saved_tensors, ctx.conditions
    z, saved, conditions, parameters = tensors[0], tensors[1 : slots.start], tensors[slots], tensors[slots.stop :]
    clamp, keep, every, precision, backend = ctx.options
    gz = torch.zeros_like(z) if gz is None else gz.contiguous()
    glog_det = z.new_zeros(z.shape[0]) if glog_det is None else glog_det
    wants_gx = ctx.needs_input_grad[0]
    wants_gposition = len(conditions) == 1 and conditions[0].requires_grad
    gx, gposition, gradients = _flow_backward(
        gz,
        glog_det,
        z,
        list(saved),
        list(conditions),
        list(parameters),
        clamp,
        keep,
        every,
        wants_gx,
        wants_gposition,
        precision,
        backend,
    )
    gconditions = gposition or [None] * len(conditions)
    return gx if wants_gx else None, gconditions, [*gradients, None], *[None] * len(ctx.options)


_flow_forward.register_autograd(_flow_gradients, setup_context=_save_flow)
_flow_backward.register_autograd(no_double_backward)
