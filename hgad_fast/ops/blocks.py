"""The coupling blocks of a level's flow, computed together, forward and backward (HGAD, arXiv 2403.13349, section 3.2).

Symbols: N pixels, row-major over (image, row, column); C channels, of which C1 = C - C // 2 pass through a coupling
block and C2 = C // 2 are transformed; P positional channels; Hd = 2 (C1 + P) hidden units; L blocks.

(This file is not called flow.py, because `hgad_fast.ops.flow` is the operation.)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import subnet
from .coupling import affine_coupling, affine_coupling_backward
from .dispatch import float32_products, fused, in_float32, kernels, no_double_backward, path
from .parameters import Block, Blocks, Position, SeparablePosition, gain_of

PRECISIONS = ("fp32", "tf32", "bf16")
MEMORY_MODES = ("standard", "reversible")
BLOCK_KERNEL_CHANNELS = range(2, 201)  # with more, the kernels' sums spill from the registers inside their loops
MAX_POSITIONS = 1024  # rows and columns of a map that the kernels of training take
ROTATION = "fp32"  # operands of the rotations' products here; the kernels' are bf16x3 (see `coupling_blocks`)


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
        gain = gain_of(block.global_scale)
        if inverse:
            x = (x @ block.w_perm - block.global_offset) / gain
        x1, x2 = x[:, :c1], x[:, c1:]
        a = subnet.definition(x1, block, conditions, precision)
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
        inference = _flow_inference if _is_recorded(x) else _infer
        return inference(x, conditions, list(parameters), clamp, *options)
    keep = memory == "standard"
    z, log_det, _ = _flow_forward(
        x, conditions, list(parameters), clamp, keep, 1 if keep else checkpoint_every, *options
    )
    return z, log_det


def _is_recorded(x: Tensor) -> bool:
    """Return whether somebody follows the operations on x: a compiler, an export, a mode. They are to see one operator.

    Where nobody does, an operator's first call would import torch's compiler in vain. Of an x without memory, the
    operator knows the shapes.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return type(x) is not Tensor or x.is_meta or _get_current_dispatch_mode() is not None


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
    weights, tables = subnet.weights_of(parameters, precision), subnet.tables_of(conditions, parameters, precision)
    coupling: Any = affine_coupling.reference
    if path(x, backend) == "triton":
        coupling = functools.partial(affine_coupling, backend=backend)
    log_det = torch.cat([block.gain for block in weights]).log().sum().repeat(len(x))
    inputs, activations = [], []
    x = x.clone(memory_format=torch.contiguous_format)
    for k, block in enumerate(weights):
        if keep or k == 0:
            memory, spare = subnet.memory_for(len(x), block), torch.empty_like(x)
        if every and not keep and k and k % every == 0:
            inputs.append(x.clone())
        h, a = subnet.layers(x[:, :c1], block, tables[k], conditions, precision, memory)
        x[:, c1:], coupling_log_det = coupling(x[:, c1:], a, clamp)
        log_det += coupling_log_det
        u, x = x, subnet.product(x, block.rotation, ROTATION, add=spare.copy_(block.offset))
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
        h = subnet.operand(x.new_empty(n, hidden), precision)
        kept += [x.new_empty(x.shape), h, subnet.result(x.new_empty(n, 2 * c2), precision)]
    return x.new_empty(x.shape), x.new_empty(n), kept


@in_float32
def _infer(
    x: Tensor, conditions: list[Tensor], parameters: list[Tensor], clamp: float, precision: str, backend: str
) -> tuple[Tensor, Tensor]:
    """Return z and the log-determinant where no gradient is wanted."""
    if path(x, backend) == "triton" and _block_kernel_fits(x, conditions, precision):
        return coupling_blocks(x, conditions, tuple(parameters), clamp, precision, backend="triton")
    if not x.is_cuda and path(x, backend) == "torch" and precision != "tf32":  # which is there to compare with a GPU
        return _blocks_in_place(x, conditions, parameters, clamp, precision)
    z, log_det, _ = _flow_forward(x, conditions, parameters, clamp, False, 0, precision, backend)
    return z, log_det


def _blocks_in_place(
    x: Tensor, conditions: list[Tensor], parameters: list[Tensor], clamp: float, precision: str
) -> tuple[Tensor, Tensor]:
    r"""Return z and the log-determinant by as few operations as there can be: for a small map their number counts.

    The factors in :math:`s = 2 c \, \sigma(0.2 a_s) - c` and in :math:`t = 0.1 a_t` are in the last layer's weights.
    """
    c1 = x.shape[1] - x.shape[1] // 2
    weights = subnet.weights_of(parameters, precision, factors=(0.2, 0.1))
    tables = subnet.tables_of(conditions, parameters, precision)
    log_det = torch.cat([block.gain for block in weights]).log().sum().repeat(len(x))
    x, memory = x.clone(memory_format=torch.contiguous_format), subnet.memory_for(len(x), weights[0])
    spare = torch.empty_like(x)
    for block, block_tables in zip(weights, tables, strict=True):
        _, a = subnet.layers(x[:, :c1], block, block_tables, conditions, precision, memory)
        s, t = a.to(x.dtype).chunk(2, 1)
        s.sigmoid_().mul_(2 * clamp).sub_(clamp)
        log_det += s.sum(1)
        x2 = x[:, c1:]
        torch.addcmul(t, x2, s.exp_(), out=x2)
        x, spare = subnet.product(x, block.rotation, ROTATION, add=spare.copy_(block.offset)), x
    return x, log_det


_flow_inference = torch.library.custom_op("hgad_fast::flow_inference", _infer, mutates_args=())


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
    weights, tables = subnet.weights_of(parameters, precision), subnet.tables_of(conditions, parameters, precision)
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
            u = subnet.product(z, block.w_perm / gain, ROTATION, add=offset)
            h, a = subnet.layers(u[:, :c1], weights[k], tables[k], conditions, precision)
        x1, y2 = u[:, :c1], u[:, c1:]

        gu = subnet.product(gz, weights[k].rotation.T, ROTATION)
        ggain = (gu * u).sum(0).add_(glog_det.sum()) / gain
        torch.mul(ggain, 0.1 * torch.sigmoid(0.5 * block.global_scale), out=gscale[k])
        torch.div(gu.sum(0), gain, out=goffset[k])

        gx2, ga, gb2[k], x2 = affine_coupling_backward(gu[:, c1:], glog_det, y2, a, clamp, backend=backend)
        ga = subnet.operand(ga, precision)
        subnet.product(ga.T, h, precision, out=gw2[k])
        gh = subnet.masked_(subnet.product(ga, weights[k].w2.T, precision), h)
        subnet.first_layer_gradients(gh, x1, conditions, precision, gw1[k], gb1[k])
        for gdense in gposition:
            subnet.product(gh, block.w1[:, c1:], precision, add=gdense)

        gz = gu
        if k or wants_gx:
            subnet.product(gh, weights[k].w1x.T, precision, add=gz[:, :c1])
            gz[:, c1:] = gx2
        if k in inputs:
            z = inputs[k]
        elif k and not keep:
            u[:, c1:] = x2
            z = u
    return gz, gposition, gradients


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
