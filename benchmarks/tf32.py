"""Rounding of float32 operands of a tf32 product on a GPU: one 64 x 64 product by Triton against emulations."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

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
