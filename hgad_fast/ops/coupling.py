"""The affine coupling of a block, forward, inverse and backward (HGAD, arXiv 2403.13349, section 3.2).

Symbols: N pixels; C2 = C // 2 channels that a coupling block transforms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dispatch import fused, kernels


def _check_coupling(x2: Tensor, a: Tensor, clamp: float = 1.9, *, inverse: bool = False) -> None:
    """Raise a ValueError where the shapes do not fit each other."""
    if x2.dim() != 2 or a.shape != (x2.shape[0], 2 * x2.shape[1]):
        raise ValueError(f"x2 {tuple(x2.shape)} must be (N, C2), and a {tuple(a.shape)} then (N, 2 C2)")


@fused("coupling", check=_check_coupling)
def affine_coupling(x2: Tensor, a: Tensor, clamp: float = 1.9, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    r"""Apply the affine transform of a coupling block to the second half of the channels.

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
    log_det = s.sum(1)
    if inverse:
        return ((x2 - t) * torch.exp(-s)).to(x2.dtype), -log_det
    return torch.addcmul(t, x2.to(t.dtype), torch.exp(s)).to(x2.dtype), log_det


@fused("coupling")
def affine_coupling_backward(
    gy2: Tensor, glog_det: Tensor, y2: Tensor, a: Tensor, clamp: float = 1.9
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `affine_coupling` from its output: x2 is rebuilt, so that it need not be kept.

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
    x2_scaled, wide_gy2 = y2 - t, gy2.to(t.dtype)  # y2 - t = x2 exp(s)
    gs = torch.addcmul(glog_det[:, None].to(t.dtype), wide_gy2, x2_scaled)
    ga = torch.cat([gs.mul_((clamp - s.square() / clamp).mul_(0.1)), 0.1 * wide_gy2], 1)
    gx2, x2 = wide_gy2 * torch.exp(s), x2_scaled.mul_(torch.exp(-s))
    return gx2.to(gy2.dtype), ga.to(a.dtype), ga.sum(0), x2.to(y2.dtype)


def _scale_and_shift(a: Tensor, clamp: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return s and t = 0.1 a_t, (N, C2) each, in `dtype` or in float32 if that is wider."""
    a_s, a_t = a.to(torch.promote_types(dtype, torch.float32)).chunk(2, 1)
    # tanh(v) = 2 sigmoid(2 v) - 1, several times as fast on a CPU. A small v loses digits, exp(s) does not.
    return torch.sigmoid(0.2 * a_s) * (2 * clamp) - clamp, 0.1 * a_t


@torch.library.custom_op("hgad_fast::affine_coupling", mutates_args=())
def _affine_coupling(x2: Tensor, a: Tensor, clamp: float, inverse: bool) -> tuple[Tensor, Tensor]:
    return kernels("coupling").affine_coupling(x2, a, clamp, inverse=inverse)


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
    return gx2.to(gy.dtype), 0.1 * torch.cat([gs, -gx2], 1).to(a.dtype), None, None


_affine_coupling.register_autograd(_affine_coupling_gradients, setup_context=_save_affine_coupling)
affine_coupling.differentiable = _affine_coupling
