"""Rounding of float32 operands of a tf32 product on a GPU: one 64 x 64 product by Triton against emulations."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hgad_fast import ops

SIDE = 64
DROPPED_BITS = 13  # of float32's 23 mantissa bits; tf32 keeps 10


@triton.jit
def _dot_kernel(
    a_ptr,  # (SIDE, SIDE) in
    b_ptr,  # (SIDE, SIDE) in
    c_ptr,  # (SIDE, SIDE) out
    SIDE: tl.constexpr,
):
    at = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    c = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision="tf32")
    tl.store(c_ptr + at, c)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Compute a @ b (SIDE, SIDE) on the tensor cores, operands as they are."""
    c = torch.empty_like(a)
    _dot_kernel[(1,)](a, b, c, SIDE)
    return c


def product_of_a_flow(a: Tensor, b: Tensor, trained: bool, precision: str = "tf32") -> Tensor:
    """Compute a @ b (SIDE, SIDE) by the flow's own products, with gradients wanted or not.

    It has one block, x1 = a and x2 = 0. The subnet's first layer parts the positive from the negative entries of x1,
    exactly; its second multiplies both with b and adds them up again, and the coupling adds a tenth of that to x2.
    """
    zero, one = torch.zeros_like(a), torch.eye(SIDE, device=a.device)
    no_bias = zero[0].repeat(2)
    block = ops.Block(
        w1=torch.cat([one, -one]),
        b1=no_bias,
        w2=torch.cat([torch.cat([zero, zero], 1), torch.cat([b.T, -b.T], 1)]),
        b2=no_bias,
        global_scale=no_bias[None],
        global_offset=no_bias[None],
        w_perm=torch.eye(2 * SIDE, device=a.device),
    )
    x = torch.cat([a, zero], 1).requires_grad_(trained)
    z, _ = ops.flow(x, [block], precision=precision)
    gain = 0.1 * torch.nn.functional.softplus(zero[0, 0], beta=0.5)
    return z.detach()[:, SIDE:] / (0.1 * gain)


def truncated(x: Tensor) -> Tensor:
    """Return float32 cut off to tf32."""
    return (x.view(torch.int32) & -(1 << DROPPED_BITS)).view(torch.float32)


def rounded(x: Tensor) -> Tensor:
    """Return float32 rounded to the nearest tf32, ties away from zero."""
    return truncated((x.view(torch.int32) + (1 << (DROPPED_BITS - 1))).view(torch.float32))


def deviations(product: Tensor, a: Tensor, b: Tensor) -> dict[str, float]:
    """Return the Frobenius-relative deviation of a product from that of truncated, rounded and exact operands."""
    operands = {"truncated": truncated, "rounded": rounded, "exact": lambda x: x}
    errors = {}
    for name, prepare in operands.items():
        expected = prepare(a).double() @ prepare(b).double()
        errors[name] = float((product.double() - expected).norm() / expected.norm())
    return errors
