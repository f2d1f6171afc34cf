"""Every fused operation of HGAD: its definition in torch, and the one place that chooses who computes it.

Symbols: N pixels, row-major over (image, row, column); C channels, of which C1 = C - C // 2 pass through a coupling
block and C2 = C // 2 are transformed; P positional channels; Hd = 2 (C1 + P) hidden units; K classes; M intra-class
centres. Equations: HGAD (arXiv 2403.13349), sections 3.2 to 3.4.

An operation with a Triton twin in `hgad_fast.kernels` carries `@fused`: CUDA tensors (and, under
``TRITON_INTERPRET=1``, CPU tensors) take the kernel, all others the definition. ``backend="triton"|"torch"`` or the
environment variable ``HGAD_FAST_BACKEND`` overrule that; a forced backend that cannot run says why.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("auto", "triton", "torch")
PRECISIONS = ("fp32", "tf32", "bf16")
BLOCK_KERNEL_CHANNELS = range(2, 201)  # with more its sums spill from the registers inside the loops
MEMORY_MODES = ("standard", "reversible")
SCORE_ROWS = 8192  # pixels whose densities are worked out together by the definitions of scoring


# ------------------------------------------------------------------------------------------------ dispatch


@functools.cache
def _kernels(file: str) -> Any:
    """The kernel module `hgad_fast.kernels.<file>`; imported on first use, because Triton is slow to import."""
    return importlib.import_module(f"hgad_fast.kernels.{file}")


def path(x: Tensor, backend: str | None = None) -> str:
    """Who computes a fused operation on a tensor like `x`: ``"triton"`` or ``"torch"``.

    Raises:
        ValueError: `backend` (or HGAD_FAST_BACKEND) is none of auto, triton, torch.
        RuntimeError: Triton is asked for and cannot run on this tensor.
    """
    choice = backend or os.environ.get("HGAD_FAST_BACKEND") or "auto"
    if choice not in BACKENDS:
        raise ValueError(f"backend is {choice!r}; allowed are {', '.join(BACKENDS)}")
    if choice == "torch":
        return "torch"
    if obstacle := _obstacle(x):
        if choice == "triton":
            raise RuntimeError(f"backend 'triton' cannot run: {obstacle}")
        return "torch"
    return "triton"


def _obstacle(x: Tensor) -> str | None:
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"the kernels compute in float32, the tensor is {x.dtype}"
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensor is on {x.device}, and TRITON_INTERPRET=1 (Triton's interpreter) is not set"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton, Linux only)"
    return None


def fused(
    file: str, make: Callable[[Any], Any] | None = None, check: Callable[..., None] | None = None
) -> Callable[[Callable[..., Any]], Any]:
    """Give a definition its kernel, the function of the same name and signature in ``kernels/<file>.py``.

    Kernels return plain tuples; `make` turns one into the definition's named tuple. `check` gets the arguments first: a
    kernel would read beyond what does not fit.

    A kernel knows nothing of autograd: where a gradient is wanted, `op.differentiable` (the operator that pairs the
    kernel with its backward, same arguments by position) runs it.
    """

    def decorate(reference: Callable[..., Any]) -> Any:
        @functools.wraps(reference)
        def op(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
            if check:
                check(*args, **kwargs)
            if path(args[0], backend) == "torch":
                return reference(*args, **kwargs)
            wants_gradient = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args)
            if wants_gradient and public.differentiable is not None:
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                return public.differentiable(*bound.args, *bound.kwargs.values())
            found = getattr(_kernels(file), reference.__name__)(*args, **kwargs)
            return make(found) if make else found

        signature = inspect.signature(reference)
        public: Any = op
        public.reference, public.kernel_file, public.differentiable = reference, file, None
        return public

    return decorate


# ------------------------------------------------------------------------------------------------ affine coupling


def _check_coupling(x2: Tensor, a: Tensor, clamp: float = 1.9, *, inverse: bool = False) -> None:
    if x2.dim() != 2 or a.shape != (x2.shape[0], 2 * x2.shape[1]):
        raise ValueError(f"x2 {tuple(x2.shape)} must be (N, C2), and a {tuple(a.shape)} then (N, 2 C2)")


@fused("coupling", check=_check_coupling)
def affine_coupling(x2: Tensor, a: Tensor, clamp: float = 1.9, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    r"""Affine transform of a coupling block's second half.

    .. math:: s = c \tanh(0.1 a_s), \quad y_2 = x_2 e^s + 0.1 a_t, \quad \log|\det| = \sum_c s_c

    Args:
        x2: the half to transform, shape (N, C2).
        a: raw output of the subnet, [a_s | a_t], shape (N, 2 C2); the factor 0.1 is applied here.
        clamp: bound c of s.
        inverse: solve for x2 given y2 instead; the log-determinant is that of the inverse map.

    Returns:
        y2 (N, C2) in the dtype of x2, log-determinant (N,) in float32 (float64 for float64 input).

    Raises:
        ValueError: the shapes do not fit each other.
    """
    s, t = _scale_and_shift(a, clamp, x2.dtype)
    log_det = s.sum(1, dtype=torch.promote_types(x2.dtype, torch.float32))
    if inverse:
        return (x2 - t) * torch.exp(-s), -log_det
    return torch.addcmul(t, x2, torch.exp(s)), log_det


@fused("coupling")
def affine_coupling_backward(
    gy2: Tensor, glog_det: Tensor, y2: Tensor, a: Tensor, clamp: float = 1.9
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `affine_coupling` from its output: x2 is rebuilt, so that nobody has to keep it.

    Args:
        gy2: gradient of y2, shape (N, C2).
        glog_det: gradient of the log-determinant, shape (N,).
        y2: output of the forward map, shape (N, C2).
        a: raw output of the subnet, shape (N, 2 C2).
        clamp: as in the forward map.

    Returns:
        gx2 (N, C2), ga (N, 2 C2) in the dtype of a, gb (2 C2,): column sums of ga, the gradient of the subnet's last
        bias, and the rebuilt x2 (N, C2).
    """
    s, t = _scale_and_shift(a, clamp, y2.dtype)
    x2_scaled = y2 - t  # = x2 exp(s)
    gs = torch.addcmul(glog_det[:, None].to(gy2.dtype), gy2, x2_scaled)
    ga = torch.cat([gs.mul_((clamp - s.square() / clamp).mul_(0.1)), 0.1 * gy2], 1)
    return gy2 * torch.exp(s), ga.to(a.dtype), ga.sum(0), x2_scaled.mul_(torch.exp(-s))


def _scale_and_shift(a: Tensor, clamp: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    a_s, a_t = a.to(dtype).chunk(2, 1)
    return clamp * torch.tanh(0.1 * a_s), 0.1 * a_t


@torch.library.custom_op("hgad_fast::affine_coupling", mutates_args=())
def _affine_coupling(x2: Tensor, a: Tensor, clamp: float, inverse: bool) -> tuple[Tensor, Tensor]:
    return _kernels("coupling").affine_coupling(x2, a, clamp, inverse=inverse)


@_affine_coupling.register_fake
def _(x2, a, clamp, inverse):  # type: ignore[no-untyped-def]
    return x2.new_empty(x2.shape), x2.new_empty(x2.shape[0], dtype=torch.float32)


def _save_affine_coupling(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, a, ctx.clamp, ctx.inverse = inputs
    ctx.save_for_backward(output[0], a)


def _affine_coupling_gradients(ctx: Any, gy: Tensor, glog_det: Tensor) -> tuple[Any, ...]:
    y, a = ctx.saved_tensors
    if not ctx.inverse:
        gx2, ga, _, _ = affine_coupling_backward(gy, glog_det, y, a, ctx.clamp)
        return gx2, ga, None, None
    s, _ = _scale_and_shift(a, ctx.clamp, y.dtype)  # y = (x2 - t) exp(-s)
    gx2 = gy * torch.exp(-s)
    gs = -(gy * y + glog_det[:, None]) * (ctx.clamp - s.square() / ctx.clamp)
    return gx2, 0.1 * torch.cat([gs, -gx2], 1).to(a.dtype), None, None


_affine_coupling.register_autograd(_affine_coupling_gradients, setup_context=_save_affine_coupling)
affine_coupling.differentiable = _affine_coupling


# ------------------------------------------------------------------------------------------------ flow


class Block(NamedTuple):
    """Parameters of one coupling block."""

    w1: Tensor  # (Hd, C1 + P)
    b1: Tensor  # (Hd,)
    w2: Tensor  # (2 C2, Hd)
    b2: Tensor  # (2 C2,)
    global_scale: Tensor  # (1, C), before its softplus
    global_offset: Tensor  # (1, C)
    w_perm: Tensor  # (C, C), orthogonal, not trained


class SeparablePosition(NamedTuple):
    """The sinusoidal code of a feature map of h x w pixels: channels 0..P/2 depend on the column, P/2..P on the row.

    A product with it splits in two tiny ones, W pos(row, column) = W_c column + W_r row: exact, and free.
    """

    column: Tensor  # (w, P / 2)
    row: Tensor  # (h, P / 2)


Position = SeparablePosition | Tensor | None


def flow_definition(
    x: Tensor,
    blocks: Sequence[Block],
    position: Position = None,
    *,
    clamp: float = 1.9,
    inverse: bool = False,
    precision: str = "fp32",
) -> tuple[Tensor, Tensor]:
    """The conditional flow of one level in plain torch, differentiable to any order; `flow` is the fast form.

    Each block maps [x1, x2] to R ([x1, y2] g + offset), y2 = affine_coupling(x2, subnet(x1, position)), with g =
    0.1 softplus(global_scale) of sharpness 0.5; scale, offset and rotation R act as one matrix R diag(g).
    """
    total = x.new_zeros(x.shape[0])
    c1 = x.shape[1] - x.shape[1] // 2
    conditions = _conditions(position)
    for block in reversed(blocks) if inverse else blocks:
        g = _gain(block)
        if inverse:
            x = (x @ block.w_perm - block.global_offset) / g
        x1, x2 = x[:, :c1], x[:, c1:]
        _, a = _subnet(x1, block, conditions, precision)
        y2, log_det = affine_coupling(x2, a, clamp, inverse=inverse, backend="torch")
        x = torch.cat([x1, y2], 1)
        if not inverse:
            x = (x * g + block.global_offset) @ block.w_perm.T
        total = total + log_det + (-1 if inverse else 1) * g.log().sum()
    return x, total


def flow(
    x: Tensor,
    blocks: Sequence[Block],
    position: Position = None,
    *,
    clamp: float = 1.9,
    inverse: bool = False,
    memory: str = "standard",
    checkpoint_every: int = 0,
    precision: str = "fp32",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """All coupling blocks of a level, one operation forward and one backward; the mathematics is `flow_definition`.

    Args:
        x: features (N, C), float32 (float64 is computed in float64).
        blocks: parameters of the L blocks, in order.
        position: `SeparablePosition` of an (h, w) map with N a multiple of h w, a dense code (N, P), or None.
        clamp: bound of the log-scale of a coupling block.
        inverse: map z to x instead (differentiable through plain autograd).
        memory: ``"standard"`` keeps the activations of every block for the backward pass, ``"reversible"`` only z,
            and rebuilds them block by block.
        checkpoint_every: with reversible memory, the input of every so many blocks is kept too (4 C bytes a pixel each
            in float32), so that rounding errors of the rebuilt ones grow from there only; 0 keeps none.
        precision: operands of the subnets' products: ``"fp32"``, ``"tf32"`` (rounded to nearest) or ``"bf16"``, all
            with float32 accumulation. The rotation stays in float32, but see `coupling_blocks`.
        backend: who computes the affine coupling, or whole blocks where `flow_path` says so, ``"auto"``, ``"triton"``
            or ``"torch"``.

    Returns:
        z (N, C) and log-determinant (N,), in the dtype of x.

    Raises:
        ValueError: a shape or a named choice does not fit; the message says which.
    """
    _check_flow(x, blocks, position, memory, checkpoint_every, precision)
    if inverse:
        return flow_definition(x, blocks, position, clamp=clamp, inverse=True)
    parameters = [list(column) for column in zip(*blocks, strict=True)]
    conditions = _conditions(position)
    leaves = [x, *conditions, *(p for group in parameters for p in group)]
    wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in leaves)
    if not wants_gradient:
        return _flow_inference(x, conditions, *parameters, clamp, precision, backend or "")
    keep = memory == "standard" and torch.is_grad_enabled()
    every = 1 if keep else checkpoint_every if torch.is_grad_enabled() else 0
    z, log_det, _ = _flow_forward(x, conditions, *parameters, clamp, keep, every, precision, backend or "")
    return z, log_det


def flow_path(x: Tensor, position: Position, precision: str, backend: str | None = None) -> str:
    """Who computes `flow` for tensors like these where no gradient is wanted.

    Returns:
        ``"torch"``, ``"triton"`` (products in torch, the coupling a kernel) or ``"triton, whole blocks"``: bfloat16
        subnets of at most 200 channels with a separable position or none. There the hidden layer, seven times the
        size of the features, never leaves the chip. Where a gradient is wanted the blocks are computed as the
        backward pass rebuilds them, with the rotation in float32.
    """
    found = path(x, backend)
    whole = found == "triton" and _block_kernel_fits(x, _conditions(position), precision)
    return "triton, whole blocks" if whole else found


def _block_kernel_fits(x: Tensor, conditions: list[Tensor], precision: str) -> bool:
    channels_fit = x.shape[1] in BLOCK_KERNEL_CHANNELS
    return channels_fit and x.dtype == torch.float32 and precision == "bf16" and len(conditions) != 1


@fused("flow_block")
def coupling_blocks(
    x: Tensor,
    conditions: list[Tensor],
    w1: list[Tensor],
    b1: list[Tensor],
    w2: list[Tensor],
    b2: list[Tensor],
    global_scale: list[Tensor],
    global_offset: list[Tensor],
    w_perm: list[Tensor],
    clamp: float = 1.9,
    precision: str = "fp32",
) -> tuple[Tensor, Tensor]:
    """Coupling blocks in a row of which nothing is kept: `flow_definition`, with the subnets' operands rounded.

    Args:
        x: (N, C).
        conditions: [column, row] of a `SeparablePosition`, or nothing.
        w1, b1, w2, b2, global_scale, global_offset, w_perm: of each `Block`.
        clamp, precision: as in `flow`. The kernel multiplies the rotation with the accuracy of float32, but in bf16 as
            bf16x3: of factors split in two bfloat16 pieces, all products but that of the small ones (error 1e-5).

    Returns:
        z (N, C) and log-determinant (N,); not differentiable.
    """
    blocks = [Block._make(block) for block in zip(w1, b1, w2, b2, global_scale, global_offset, w_perm, strict=True)]
    position = SeparablePosition(*conditions) if conditions else None
    with torch.no_grad():
        return flow_definition(x, blocks, position, clamp=clamp, precision=precision)


def _check_flow(
    x: Tensor, blocks: Sequence[Block], position: Position, memory: str, checkpoint_every: int, precision: str
) -> None:
    for name, value, allowed in (("memory", memory, MEMORY_MODES), ("precision", precision, PRECISIONS)):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; allowed are {', '.join(allowed)}")
    if not isinstance(checkpoint_every, int) or checkpoint_every < 0:
        raise ValueError(f"checkpoint_every is {checkpoint_every!r}; allowed is a whole number from 0")
    channels = blocks[0].w_perm.shape[0]
    if x.dim() != 2 or x.shape[1] != channels:
        raise ValueError(f"x has shape {tuple(x.shape)}; this flow takes (N, {channels})")
    n, width = x.shape[0], blocks[0].w1.shape[1] - (channels - channels // 2)
    if isinstance(position, SeparablePosition):
        pixels = position.row.shape[0] * position.column.shape[0]
        if position.row.shape[1] + position.column.shape[1] != width or (n % pixels if pixels else n):
            raise ValueError(
                f"a separable position of row code {tuple(position.row.shape)} and column code "
                f"{tuple(position.column.shape)} does not fit {n} pixels of {width} positional channels"
            )
    elif position is None and width or position is not None and position.shape != (n, width):
        found = None if position is None else tuple(position.shape)
        raise ValueError(f"position has shape {found}; {n} pixels of this flow need ({n}, {width})")


def _conditions(position: Position) -> list[Tensor]:
    """An operator's schema knows lists of tensors: [column, row], [dense] or []."""
    if isinstance(position, SeparablePosition):
        return [position.column, position.row]
    return [] if position is None else [position]


def _gain(block: Block) -> Tensor:
    return 0.1 * F.softplus(block.global_scale, beta=0.5)


@contextmanager
def _cuda_products(precision: str, x: Tensor) -> Iterator[None]:
    """float32 matrix products on CUDA in true float32, or with tf32 operands, whatever the process's default is."""
    if not x.is_cuda:
        yield
        return
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _operand(x: Tensor, precision: str) -> Tensor:
    """Round to the operand precision of a product. Tensor cores truncate to tf32, which is biased: round to nearest."""
    if precision == "fp32" or x.dtype == torch.float64:
        return x
    if precision == "tf32":
        return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    rounded = x.to(torch.bfloat16)
    return rounded if x.is_cuda else rounded.to(x.dtype)  # a CPU multiplies the rounded operands in float32


def _product(x: Tensor, w: Tensor, precision: str, add: Tensor | None = None) -> Tensor:
    """x @ w (+ add, overwritten) with operands of the given precision and float32 accumulation."""
    x, w = _operand(x, precision), _operand(w, precision)
    with _cuda_products(precision, x):
        if x.dtype == torch.bfloat16:
            y = torch.mm(x, w, out_dtype=torch.float32)
            return y if add is None else add.add_(y)
        return torch.mm(x, w) if add is None else add.addmm_(x, w)


def _subnet(x1: Tensor, block: Block, conditions: list[Tensor], precision: str) -> tuple[Tensor, Tensor]:
    """h = relu(W1 [x1, position] + b1) (N, Hd) and a = W2 h + b2 (N, 2 C2)."""
    n, c1 = x1.shape
    w1x, w1p = block.w1[:, :c1], block.w1[:, c1:]
    if len(conditions) == 2:
        column, row = conditions
        half = column.shape[1]
        table = (row @ w1p[:, half:].T)[:, None] + (column @ w1p[:, :half].T + block.b1)
        h = table.flatten(0, 1).repeat(n // max(table.shape[0] * table.shape[1], 1), 1)
    else:
        h = block.b1.repeat(n, 1)
        for dense in conditions:
            h = _product(dense, w1p.T, precision, add=h)
    h = _product(x1, w1x.T, precision, add=h).relu_()
    if precision == "bf16" and h.is_cuda:
        h = h.to(torch.bfloat16)
    return h, _product(h, block.w2.T, precision, add=block.b2.repeat(n, 1))


@torch.library.custom_op("hgad_fast::flow_forward", mutates_args=())
def _flow_forward(
    x: Tensor,
    conditions: list[Tensor],
    w1: list[Tensor],
    b1: list[Tensor],
    w2: list[Tensor],
    b2: list[Tensor],
    global_scale: list[Tensor],
    global_offset: list[Tensor],
    w_perm: list[Tensor],
    clamp: float,
    keep: bool,
    every: int,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """z, log-determinant, and what is kept: inputs of blocks every, 2 every, ...; with `keep` each (y2, h, a), too."""
    c1 = x.shape[1] - x.shape[1] // 2
    x = x.contiguous()
    log_det = x.new_zeros(x.shape[0])
    inputs, activations = [], []
    for k, block in enumerate(map(Block._make, zip(w1, b1, w2, b2, global_scale, global_offset, w_perm, strict=True))):
        if every and k and k % every == 0:
            inputs.append(x)
        x1, x2 = x[:, :c1], x[:, c1:]
        h, a = _subnet(x1, block, conditions, precision)
        y2, s = affine_coupling(x2, a, clamp, backend=backend)
        g = _gain(block)
        log_det += s.add_(g.log().sum())
        rotation = (block.w_perm * g).T
        x = _product(x1, rotation[:c1], "fp32", add=(block.global_offset @ block.w_perm.T).repeat(x.shape[0], 1))
        x = _product(y2, rotation[c1:], "fp32", add=x)
        if keep:
            activations += [y2, h, a]
    return x, log_det, inputs + activations


@_flow_forward.register_fake
def _(x, conditions, w1, b1, w2, b2, global_scale, global_offset, w_perm, clamp, keep, every, precision, backend):  # type: ignore[no-untyped-def]
    n, c2 = x.shape[0], x.shape[1] // 2
    hidden = torch.bfloat16 if precision == "bf16" and x.is_cuda else x.dtype
    inputs = [x.new_empty(x.shape) for _ in range((len(w1) - 1) // every if every else 0)]
    activations = [
        t for w in w1 for t in (x.new_empty(n, c2), x.new_empty(n, w.shape[0], dtype=hidden), x.new_empty(n, 2 * c2))
    ]
    return x.new_empty(x.shape), x.new_empty(n), inputs + (activations if keep else [])


@torch.library.custom_op("hgad_fast::flow_inference", mutates_args=())
def _flow_inference(
    x: Tensor,
    conditions: list[Tensor],
    w1: list[Tensor],
    b1: list[Tensor],
    w2: list[Tensor],
    b2: list[Tensor],
    global_scale: list[Tensor],
    global_offset: list[Tensor],
    w_perm: list[Tensor],
    clamp: float,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """z and log-determinant where no gradient is wanted."""
    parameters = w1, b1, w2, b2, global_scale, global_offset, w_perm
    if path(x, backend) == "triton" and _block_kernel_fits(x, conditions, precision):
        return coupling_blocks(x, conditions, *parameters, clamp, precision, backend="triton")
    z, log_det, _ = _flow_forward(x, conditions, *parameters, clamp, False, 0, precision, backend)
    return z, log_det


@_flow_inference.register_fake
def _(x, conditions, w1, b1, w2, b2, global_scale, global_offset, w_perm, clamp, precision, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), x.new_empty(x.shape[0])


@torch.library.custom_op("hgad_fast::flow_backward", mutates_args=())
def _flow_backward(
    gz: Tensor,
    glog_det: Tensor,
    z: Tensor,
    saved: list[Tensor],
    conditions: list[Tensor],
    w1: list[Tensor],
    b1: list[Tensor],
    w2: list[Tensor],
    b2: list[Tensor],
    global_scale: list[Tensor],
    global_offset: list[Tensor],
    w_perm: list[Tensor],
    clamp: float,
    keep: bool,
    every: int,
    wants_gx: bool,
    wants_gposition: bool,
    precision: str,
    backend: str,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradients of x, of a dense position, and of (w1, b1, w2, b2, global_scale, global_offset) block by block.

    `saved` is what the forward pass kept, after x itself with `keep`. Without it the input of each block is rebuilt
    from its output, with the forward pass's operands.
    """
    c1 = z.shape[1] - z.shape[1] // 2
    blocks = [Block._make(block) for block in zip(w1, b1, w2, b2, global_scale, global_offset, w_perm, strict=True)]
    first = 0 if keep else every
    inputs = dict(zip(range(first, len(blocks), max(every, 1)), saved, strict=False))
    activations = saved[len(inputs) :]
    glog_det = glog_det.contiguous()
    gposition = [torch.zeros_like(dense) for dense in conditions] if wants_gposition else []
    gradients: list[list[Tensor]] = []
    for k in reversed(range(len(blocks))):
        block, g = blocks[k], _gain(blocks[k])
        if keep:
            x1 = inputs[k][:, :c1]
            y2, h, a = activations[3 * k : 3 * k + 3]
        else:
            offset = (-block.global_offset / g).repeat(z.shape[0], 1)
            u = _product(z, block.w_perm / g, "fp32", add=offset)
            x1, y2 = u[:, :c1], u[:, c1:]
            h, a = _subnet(x1, block, conditions, precision)

        gu = _product(gz, block.w_perm * g, "fp32")
        gscale = torch.cat([(gu[:, :c1] * x1).sum(0), (gu[:, c1:] * y2).sum(0)]).add_(glog_det.sum()) / g
        gscale *= 0.1 * torch.sigmoid(0.5 * block.global_scale)
        goffset = gu.sum(0) / g

        gx2, ga, gb2, x2 = affine_coupling_backward(gu[:, c1:], glog_det, y2, a, clamp, backend=backend)
        gh = torch.ops.aten.threshold_backward(_product(ga, block.w2, precision), h, 0)
        gw1, gb1 = _first_layer_gradients(gh, x1, conditions, precision)
        gradients.append([gw1, gb1, _product(ga.T, h, precision), gb2.to(z.dtype), gscale, goffset])
        for gdense in gposition:
            _product(gh, block.w1[:, c1:], precision, add=gdense)

        gz = gu
        if k or wants_gx:
            _product(gh, block.w1[:, :c1], precision, add=gz[:, :c1])
            gz[:, c1:] = gx2
        if k in inputs:
            z = inputs[k]
        elif k:
            u[:, c1:] = x2
            z = u
    return gz, gposition, [gradient for block in reversed(gradients) for gradient in block]


def _first_layer_gradients(gh: Tensor, x1: Tensor, conditions: list[Tensor], precision: str) -> tuple[Tensor, Tensor]:
    """Gradients of W1 and b1; with a separable position, gh is first summed to one row a column and one a row."""
    gw1 = [_product(gh.T, x1, precision)]
    if len(conditions) != 2:
        gw1 += [_product(gh.T, dense, precision) for dense in conditions]
        return torch.cat(gw1, 1), gh.sum(0)
    column, row = conditions
    gtable = gh.view(-1, row.shape[0] * column.shape[0], gh.shape[1]).sum(0).view(row.shape[0], column.shape[0], -1)
    gcolumn, grow = gtable.sum(0), gtable.sum(1)
    return torch.cat([*gw1, gcolumn.T @ column, grow.T @ row], 1), gcolumn.sum(0)


@_flow_backward.register_fake
def _(gz, glog_det, z, saved, conditions, w1, b1, w2, b2, global_scale, global_offset, w_perm, *options):  # type: ignore[no-untyped-def]
    wants_gposition = options[4]
    blocks = zip(w1, b1, w2, b2, global_scale, global_offset, strict=True)
    gposition = [torch.empty_like(dense) for dense in conditions] if wants_gposition else []
    return torch.empty_like(z), gposition, [torch.empty_like(t) for block in blocks for t in block]


def _save_flow(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    x, conditions, *parameters, clamp, keep, every, precision, backend = inputs
    z, _, saved = output
    saved = [x, *saved] if keep else saved
    ctx.set_materialize_grads(False)  # zeros for every saved activation would cost what keeping them costs
    ctx.counts = [len(saved), len(conditions), *map(len, parameters)]
    ctx.options = (clamp, keep, every, precision, backend)
    ctx.save_for_backward(z, *saved, *conditions, *(p for group in parameters for p in group))


def _flow_gradients(ctx: Any, gz: Tensor | None, glog_det: Tensor | None, _: Any) -> tuple[Any, ...]:
    z, *rest = ctx.saved_tensors
    groups = list(_split(rest, ctx.counts))
    clamp, keep, every, precision, backend = ctx.options
    gz = torch.zeros_like(z) if gz is None else gz.contiguous()
    glog_det = z.new_zeros(z.shape[0]) if glog_det is None else glog_det
    wants_gposition = len(groups[1]) == 1 and groups[1][0].requires_grad
    gx, gposition, gradients = _flow_backward(
        gz, glog_det, z, *groups, clamp, keep, every, ctx.needs_input_grad[0], wants_gposition, precision, backend
    )
    by_kind = [gradients[i::6] for i in range(6)]
    gconditions = gposition or [None] * len(groups[1])
    return (
        gx if ctx.needs_input_grad[0] else None,
        gconditions,
        *by_kind,
        [None] * len(groups[-1]),
        *[None] * 5,
    )


def _split(tensors: list[Tensor], counts: list[int]) -> Iterator[list[Tensor]]:
    for count in counts:
        yield tensors[:count]
        tensors = tensors[count:]


def _no_double_backward(ctx: Any, *gradients: Any) -> Any:
    raise RuntimeError(
        "the fused operations of hgad_fast are differentiable once; for second derivatives use "
        "hgad_fast.ops.flow_definition and mixture_terms.reference"
    )


_flow_forward.register_autograd(_flow_gradients, setup_context=_save_flow)
_flow_backward.register_autograd(_no_double_backward)


# ------------------------------------------------------------------------------------------------ mixture


def log_weights(phi: Tensor) -> Tensor:
    """log softmax over the last axis; a row of -inf stays -inf where log_softmax would give NaN."""
    return phi - phi.logsumexp(-1, keepdim=True).clamp(min=torch.finfo(phi.dtype).min)


@fused("mixture")
def mixture_terms(
    z: Tensor,
    labels: Tensor,
    mu: Tensor,
    delta: Tensor,
    phi_inter: Tensor,
    phi_intra: Tensor,
    *,
    label_smoothing: float,
    stage: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""The four per-pixel quantities of HGAD's training losses (equations 5 to 9 of the paper).

    With :math:`d_k = -\|z - \mu_k\|^2 / 2`, own class y, label smoothing e, and the centres of y at
    :math:`\mu_y` and :math:`\mu_y + \delta_{ym}`:

    .. math::
        A = \log \sum_k \pi_k e^{d_k}, \quad H = \mathrm{entropy}(\mathrm{softmax}(d)), \quad
        I = (1 - e) d_y + \frac{e}{K} \sum_k d_k - A, \quad B = \log \sum_m w_{ym} e^{-\|z - c_{ym}\|^2 / 2}

    The weights are constants in I, and mu is one in B. Everything is computed relative to the own class: z - mu_y
    and mu_k - mu_y are formed first, so that no large squared norms cancel.

    Args:
        z: (N, C).
        labels: own class, int64: (N,) one a pixel, or (B,) one an image, image b owning the rows b N/B .. (b+1) N/B.
        mu: main centres (K, C).
        delta: offsets of the other intra-class centres (K, M - 1, C).
        phi_inter: unnormalised log-weights of the classes (K,).
        phi_intra: unnormalised log-weights of the centres of each class (K, M).
        label_smoothing: e.
        stage: 1 (inter-class terms only) or 2.

    Returns:
        A, H, I, B, each (N,) in the dtype of z; in stage 1 B is empty, and delta and phi_intra receive no gradient.
    """
    order, groups = _by_class(labels, z)
    log_pi, log_w = log_weights(phi_inter), log_weights(phi_intra)
    parts = []
    for y, (pixels,) in groups:
        inter = _inter_class_terms(pixels, y, mu, log_pi, label_smoothing)
        own = _own_class_lse(pixels, mu[y], delta[y], log_w[y]) if stage == 2 else z.new_empty(0)
        parts.append((*inter, own))
    if not parts:
        return z.sum(1), z.sum(1), z.sum(1), z.sum(1)
    terms = [torch.cat(part) for part in zip(*parts, strict=True)]
    if order is not None:
        back = torch.argsort(order)
        terms = [term[back] if term.numel() else term for term in terms]
    return terms[0], terms[1], terms[2], terms[3]


def _by_class(labels: Tensor, *rows: Tensor) -> tuple[Tensor | None, Iterator[tuple[int, tuple[Tensor, ...]]]]:
    """Split per-pixel tensors in groups of one class. Per-pixel labels need an order, per-image labels do not."""
    n = rows[0].shape[0]
    if labels.numel() != n:
        counts, classes, order = [n // labels.numel()] * labels.numel(), labels, None
    else:
        order = torch.argsort(labels, stable=True)
        classes, sizes = torch.unique_consecutive(labels[order], return_counts=True)
        counts, rows = sizes.tolist(), tuple(t.index_select(0, order) for t in rows)
    return order, zip(classes.tolist(), zip(*(t.split(counts) for t in rows), strict=True), strict=True)


def _inter_class_terms(z: Tensor, y: int, mu: Tensor, log_pi: Tensor, label_smoothing: float) -> tuple[Tensor, ...]:
    z, centres = z - mu[y], mu - mu[y]
    d_y = -0.5 * z.square().sum(1)
    d = z @ centres.T - 0.5 * centres.square().sum(1)  # d_k - d_y
    lse = d_y + (d + log_pi).logsumexp(1)
    log_p = d.log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    information = label_smoothing * d.mean(1) - (d + log_pi.detach()).logsumexp(1)
    return lse, entropy, information


def _own_class_lse(z: Tensor, mu: Tensor, delta: Tensor, log_w: Tensor) -> Tensor:
    z = z - mu.detach()
    offsets = F.pad(delta, (0, 0, 1, 0))  # the main centre comes first
    e = z @ offsets.T - 0.5 * offsets.square().sum(1)
    return -0.5 * z.square().sum(1) + (e + log_w).logsumexp(1)


@fused("mixture")
def mixture_terms_backward(
    glse: Tensor,
    gentropy: Tensor,
    ginformation: Tensor,
    gown: Tensor,
    z: Tensor,
    labels: Tensor,
    mu: Tensor,
    delta: Tensor,
    phi_inter: Tensor,
    phi_intra: Tensor,
    *,
    label_smoothing: float,
    stage: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `mixture_terms` for z, mu, delta, phi_inter and phi_intra, from z alone.

    Args:
        glse, gentropy, ginformation, gown: gradients of A, H, I and B, each (N,); in stage 1 `gown` is empty.
        z, labels, mu, delta, phi_inter, phi_intra, label_smoothing, stage: as in `mixture_terms`.

    Returns:
        gradients in the shapes of z, mu, delta, phi_inter, phi_intra; those of delta and phi_intra are zero in stage 1.
    """
    classes = mu.shape[0]
    log_pi, log_w = log_weights(phi_inter), log_weights(phi_intra)
    gmu, gdelta = torch.zeros_like(mu), torch.zeros_like(delta)
    glog_pi, glog_w = torch.zeros_like(phi_inter), torch.zeros_like(phi_intra)
    gzs = []
    gown = gown if stage == 2 else torch.zeros_like(glse)
    order, groups = _by_class(labels, z, *(g[:, None] for g in (glse, gentropy, ginformation, gown)))
    for y, (pixels, gl, gh, gi, gb) in groups:
        pixels, centres = pixels - mu[y], mu - mu[y]
        d = pixels @ centres.T - 0.5 * centres.square().sum(1)
        q, log_p = log_weights(d + log_pi).exp(), d.log_softmax(1)
        p_log_p = log_p.exp() * log_p
        target = torch.full_like(mu[:, 0], label_smoothing / classes)
        target[y] += 1 - label_smoothing
        gd = gl * q + gi * (target - q) - gh * (p_log_p - log_p.exp() * p_log_p.sum(1, keepdim=True))
        gmu += gd.T @ pixels - gd.sum(0)[:, None] * centres
        glog_pi += (gl * q).sum(0)
        gz = torch.addmm((gl + gb) * pixels, gd, centres, beta=-1)
        if stage == 2:
            offsets = F.pad(delta[y], (0, 0, 1, 0))
            r = log_weights(pixels @ offsets.T - 0.5 * offsets.square().sum(1) + log_w[y]).exp()
            ge = gb * r
            gdelta[y] += (ge.T @ pixels - ge.sum(0)[:, None] * offsets)[1:]
            glog_w[y] += ge.sum(0)
            gz.addmm_(ge, offsets)
        gzs.append(gz)
    gz = torch.cat(gzs) if gzs else torch.zeros_like(z)
    if order is not None:
        gz = gz.index_select(0, torch.argsort(order))
    gphi_inter = glog_pi - log_pi.exp() * glog_pi.sum()
    return gz, gmu, gdelta, gphi_inter, glog_w - log_w.exp() * glog_w.sum(1, keepdim=True)


def mixture_losses(
    z: Tensor,
    log_det: Tensor,
    labels: Tensor,
    mu: Tensor,
    delta: Tensor,
    phi_inter: Tensor,
    phi_intra: Tensor,
    *,
    label_smoothing: float = 0.02,
    stage: int = 2,
    targets: Tensor | None = None,
    backend: str | None = None,
) -> dict[str, Tensor]:
    """The loss terms of one level, pixel by pixel.

    Args:
        z, labels, mu, delta, phi_inter, phi_intra, label_smoothing, stage: as in `mixture_terms`.
        log_det: log-determinant of the flow (N,).
        targets: soft class targets (N, K) for the mutual-information term in place of the smoothed label; rows sum
            to 1.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        ``L_g`` (negative log-likelihood of the inter-class mixture, nats per channel), ``L_mi`` (to be maximised),
        ``L_e`` (entropy), and in stage 2 ``L_g_intra`` and ``L_z``; each (N,).

    Raises:
        ValueError: a shape does not fit; the message says which.
    """
    _check_mixture(z, log_det, mu, delta, phi_inter, phi_intra, labels)
    if stage not in (1, 2):
        raise ValueError(f"stage is {stage!r}; allowed are 1 and 2")
    lse, entropy, information, own = _mixture_forward(
        z, labels, mu, delta, phi_inter, phi_intra, label_smoothing, stage, backend or ""
    )
    channels = z.shape[1]
    if targets is not None:
        information = _soft_information(z, targets, mu, log_weights(phi_inter.detach()))
    losses = {"L_g": -(lse + log_det) / channels, "L_mi": information, "L_e": entropy}
    if stage == 2:
        losses["L_g_intra"] = -(own + log_det) / channels
        losses["L_z"] = F.softplus(losses["L_g_intra"] + 0.5 * math.log(2 * math.pi))
    return losses


def _soft_information(z: Tensor, targets: Tensor, mu: Tensor, log_pi: Tensor) -> Tensor:
    """I for any target: sum_k t_k (log softmax(d + log pi)_k - log pi_k), distances taken from the centres' mean."""
    if targets.shape != (z.shape[0], mu.shape[0]):
        raise ValueError(f"targets have shape {tuple(targets.shape)}; expected {(z.shape[0], mu.shape[0])}")
    mean = mu.detach().mean(0)
    centres = mu - mean
    d = (z - mean) @ centres.T - 0.5 * centres.square().sum(1)
    return (targets * ((d + log_pi).log_softmax(1) - log_pi)).sum(1)


def _check_mixture(
    z: Tensor,
    log_det: Tensor,
    mu: Tensor,
    delta: Tensor,
    phi_inter: Tensor,
    phi_intra: Tensor,
    labels: Tensor | None = None,
    **_: Any,  # what an operation takes besides
) -> None:
    (n, channels), classes, centres = z.shape, mu.shape[0], phi_intra.shape[-1]
    expected = {
        "log_det": (log_det, (n,)),
        "mu": (mu, (classes, channels)),
        "delta": (delta, (classes, centres - 1, channels)),
        "phi_inter": (phi_inter, (classes,)),
        "phi_intra": (phi_intra, (classes, centres)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; with z of {(n, channels)} it must be {shape}")
    if labels is None:
        return
    count = labels.numel()
    if labels.dim() != 1 or labels.dtype != torch.int64 or (n % count if count else n):
        raise ValueError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}; expected int64, one for each of the {n} pixels "
            "or one for each image"
        )


@torch.library.custom_op("hgad_fast::mixture_forward", mutates_args=())
def _mixture_forward(
    z: Tensor,
    labels: Tensor,
    mu: Tensor,
    delta: Tensor,
    phi_inter: Tensor,
    phi_intra: Tensor,
    label_smoothing: float,
    stage: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return mixture_terms(
        z,
        labels,
        mu,
        delta,
        phi_inter,
        phi_intra,
        label_smoothing=label_smoothing,
        stage=stage,
        backend=backend,
    )


@_mixture_forward.register_fake
def _(z, labels, mu, delta, phi_inter, phi_intra, label_smoothing, stage, backend):  # type: ignore[no-untyped-def]
    n = z.shape[0]
    return z.new_empty(n), z.new_empty(n), z.new_empty(n), z.new_empty(n if stage == 2 else 0)


@torch.library.custom_op("hgad_fast::mixture_backward", mutates_args=())
def _mixture_backward(
    gterms: list[Tensor],
    z: Tensor,
    labels: Tensor,
    mu: Tensor,
    delta: Tensor,
    phi_inter: Tensor,
    phi_intra: Tensor,
    label_smoothing: float,
    stage: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of z, mu, delta, phi_inter, phi_intra; the terms are recomputed, so that only z has to be kept."""
    return mixture_terms_backward(
        *gterms,
        z,
        labels,
        mu,
        delta,
        phi_inter,
        phi_intra,
        label_smoothing=label_smoothing,
        stage=stage,
        backend=backend,
    )


@_mixture_backward.register_fake
def _(gterms, z, labels, mu, delta, phi_inter, phi_intra, label_smoothing, stage, backend):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(t) for t in (z, mu, delta, phi_inter, phi_intra))


def _save_mixture(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, label_smoothing, stage, backend = inputs
    ctx.options = (label_smoothing, stage, backend)
    ctx.save_for_backward(*tensors)


def _mixture_gradients(ctx: Any, *gterms: Tensor) -> tuple[Any, ...]:
    stage = ctx.options[1]
    gz, gmu, gdelta, gphi_inter, gphi_intra = _mixture_backward(
        [g.contiguous() for g in gterms], *ctx.saved_tensors, *ctx.options
    )
    if stage == 1:  # None, not zeros: Adam would count the steps
        gdelta = gphi_intra = None
    return gz, None, gmu, gdelta, gphi_inter, gphi_intra, None, None, None


_mixture_forward.register_autograd(_mixture_gradients, setup_context=_save_mixture)
mixture_terms.differentiable = lambda *arguments: _mixture_forward(*arguments, "triton")
_mixture_backward.register_autograd(_no_double_backward)


class MixtureScores(NamedTuple):
    """Natural-log densities of x (log-determinant and constants inside, not divided by C), per pixel."""

    log_density: Tensor  # (N,) of the full mixture over all K x M centres
    best_class: Tensor  # (N,) int64
    best_log_density: Tensor  # (N,)
    own_log_density: Tensor | None  # (N,) of the labelled class
    entropy: Tensor  # (N,) of the class posterior softmax_k(-|z - mu_k|^2 / 2)
    class_log_density: Tensor | None  # (N, K)


@fused("mixture", MixtureScores._make, _check_mixture)
def mixture_scores(
    z: Tensor,
    log_det: Tensor,
    mu: Tensor,
    delta: Tensor,
    phi_inter: Tensor,
    phi_intra: Tensor,
    labels: Tensor | None = None,
    *,
    per_class: bool = False,
) -> MixtureScores:
    r"""Densities of every pixel under the hierarchical mixture, the K x M centres streamed class by class.

    .. math:: \log p_k = \log \sum_m w_{km} e^{-\|z - c_{km}\|^2 / 2} + \log|\det| - \tfrac{C}{2} \log 2\pi

    Args:
        z: (N, C).
        log_det: (N,).
        mu, delta, phi_inter, phi_intra: as in `mixture_terms`.
        labels: own class, int64, (N,) or (B,) one an image; None leaves `own_log_density` out.
        per_class: also return log p_k of every class, (N, K).

    Returns:
        `MixtureScores`; not differentiable. `best_class` maximises log p_k, the lowest index on ties; `log_density` is
        log sum_k pi_k p_k.

    Raises:
        ValueError: a shape does not fit; the message says which.
    """
    labels = None if labels is None else labels.repeat_interleave(len(z) // max(labels.numel(), 1))
    with torch.no_grad():
        prior = _prior(mu, delta, phi_inter, phi_intra)
        parts = []
        for start in range(0, max(len(z), 1), SCORE_ROWS):
            rows = slice(start, start + SCORE_ROWS)
            own = None if labels is None else labels[rows]
            parts.append(_mixture_scores(z[rows], log_det[rows], prior, own, per_class))
        fields = zip(*parts, strict=True)
        return MixtureScores._make(None if field[0] is None else torch.cat(field) for field in fields)


class _Prior(NamedTuple):
    """The mixture, its centres taken from their mean: no large squared norms cancel."""

    mean: Tensor  # (C,)
    centres: Tensor  # (K, M, C), less the mean
    half_norms: Tensor  # (K, M), half their squares
    log_pi: Tensor  # (K,)
    log_w: Tensor  # (K, M)

    def centred(self, z: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
        """z less the mean (N, C), and the part of a log-density that no centre changes (N,)."""
        z = z - self.mean
        return z, log_det - 0.5 * z.square().sum(1) - 0.5 * z.shape[1] * math.log(2 * math.pi)

    def of_class(self, k: int, z: Tensor) -> Tensor:
        """The rest of the log-density of class k (N,), of a centred z."""
        return torch.addmm(-self.half_norms[k], z, self.centres[k].T).add_(self.log_w[k]).logsumexp(1)

    def entropy(self, z: Tensor) -> Tensor:
        log_p = torch.addmm(-self.half_norms[:, 0], z, self.centres[:, 0].T).log_softmax(1)
        return -(log_p.exp() * log_p).sum(1)


def _prior(mu: Tensor, delta: Tensor, phi_inter: Tensor, phi_intra: Tensor) -> _Prior:
    centres = torch.cat([mu[:, None], mu[:, None] + delta], 1)
    mean = centres.mean((0, 1))
    centres = centres - mean
    half_norms = 0.5 * centres.double().square().sum(-1).to(mu.dtype)
    return _Prior(mean, centres, half_norms, log_weights(phi_inter), log_weights(phi_intra))


def _mixture_scores(z: Tensor, log_det: Tensor, prior: _Prior, labels: Tensor | None, per_class: bool) -> MixtureScores:
    z, base = prior.centred(z, log_det)
    density = z.new_empty(len(z), len(prior.log_pi))
    for k in range(density.shape[1]):
        density[:, k] = prior.of_class(k, z)
    best, best_class = density.max(1)
    return MixtureScores(
        log_density=(density + prior.log_pi).logsumexp(1) + base,
        best_class=best_class,
        best_log_density=best + base,
        own_log_density=None if labels is None else density.gather(1, labels[:, None]).squeeze(1) + base,
        entropy=prior.entropy(z),
        class_log_density=density.add_(base[:, None]) if per_class else None,
    )


@torch.no_grad()
def own_class_scores(
    z: Tensor,
    log_det: Tensor,
    mu: Tensor,
    delta: Tensor,
    phi_inter: Tensor,
    phi_intra: Tensor,
    labels: Tensor,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-density under each pixel's own class, and entropy of its class posterior: all that a map needs.

    They are those of `mixture_scores`, at K + M distances a pixel instead of K M. On a CPU, rows of one class that come
    without others have the same bits from both.

    Args:
        z, log_det, mu, delta, phi_inter, phi_intra: as in `mixture_scores`.
        labels: own class, int64, (N,) or (B,) one an image.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        log p_y and the entropy, (N,) each; not differentiable.

    Raises:
        ValueError: a shape does not fit; the message says which.
    """
    _check_mixture(z, log_det, mu, delta, phi_inter, phi_intra, labels)
    if path(z, backend) == "triton":
        parameters = (z, labels, mu, delta, phi_inter, phi_intra)
        _, entropy, _, own = mixture_terms(*parameters, label_smoothing=0.0, stage=2, backend=backend)
        return own + log_det - 0.5 * z.shape[1] * math.log(2 * math.pi), entropy
    prior = _prior(mu, delta, phi_inter, phi_intra)
    order, groups = _by_class(labels, z, log_det)
    densities, entropies = [z.new_empty(0)], [z.new_empty(0)]
    for k, rows in groups:
        for part in zip(*(t.split(SCORE_ROWS) for t in rows), strict=True):
            centred, base = prior.centred(*part)
            densities.append(prior.of_class(k, centred) + base)
            entropies.append(prior.entropy(centred))
    density, entropy = torch.cat(densities), torch.cat(entropies)
    if order is not None:
        back = torch.argsort(order)
        density, entropy = density[back], entropy[back]
    return density, entropy
