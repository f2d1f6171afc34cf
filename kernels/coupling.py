"""Affine coupling: the Triton twins of `affine_coupling` and `affine_coupling_backward` in ops/coupling.py.

One program owns BLOCK_N rows and walks over the channels: a row's log-determinant is one program's sum.
Arithmetic is float32; tensors are read and written in their own dtype. The raw subnet output `a` (N, 2*C2)
holds scales, then shifts: s = clamp * tanh(0.1 a_s), t = 0.1 a_t.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import launch, rows, tanh

BLOCK_N = 16  # more rows per program double its registers and gain nothing: the kernels are bound by memory
MAX_BLOCK_C = 256
NUM_WARPS = 4


@triton.jit(do_not_specialize=["N"])
def _forward_kernel(
    x_ptr,  # (N, C2) in
    a_ptr,  # (N, 2*C2) in
    y_ptr,  # (N, C2) out; may be x
    log_det_ptr,  # (N,) in and out: the row sums are added
    N,
    clamp,
    C2: tl.constexpr,
    X_STRIDE: tl.constexpr,  # of rows, in elements; constexpr, because 200 is no multiple of 16 and an int
    A_STRIDE: tl.constexpr,  # argument that is none loses Triton its vector loads
    Y_STRIDE: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row0 = tl.program_id(0).to(tl.int64) * BLOCK_N  # 64 bits for the program, 32 inside its tile
    x_ptr += row0 * X_STRIDE
    a_ptr += row0 * A_STRIDE
    y_ptr += row0 * Y_STRIDE
    n = tl.arange(0, BLOCK_N)
    row_mask = row0 + n < N
    log_det = tl.load(log_det_ptr + row0 + n, mask=row_mask, other=0.0)
    for c0 in range(0, C2, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        mask = row_mask[:, None] & (c < C2)[None, :]
        a_at = n[:, None] * A_STRIDE + c[None, :]
        x = tl.load(x_ptr + n[:, None] * X_STRIDE + c[None, :], mask=mask, other=0.0).to(tl.float32)
        a_s = tl.load(a_ptr + a_at, mask=mask, other=0.0).to(tl.float32)  # 0 adds nothing to log_det
        a_t = tl.load(a_ptr + C2 + a_at, mask=mask, other=0.0).to(tl.float32)
        s = clamp * tanh(0.1 * a_s)
        t = 0.1 * a_t
        if INVERSE:
            y = (x - t) * tl.exp(-s)
            log_det -= tl.sum(s, axis=1)
        else:
            y = x * tl.exp(s) + t
            log_det += tl.sum(s, axis=1)
        tl.store(y_ptr + n[:, None] * Y_STRIDE + c[None, :], y, mask=mask)
    tl.store(log_det_ptr + row0 + n, log_det, mask=row_mask)


@triton.jit(do_not_specialize=["N"])
def _backward_kernel(
    gy_ptr,  # (N, C2) in
    glog_det_ptr,  # (N,) in
    y_ptr,  # (N, C2) in
    a_ptr,  # (N, 2*C2) in
    gx_ptr,  # (N, C2) out; may be gy
    ga_ptr,  # (N, 2*C2) out, contiguous
    gb_ptr,  # (programs, 2*C2) out, contiguous: column sums of ga over each program's rows
    x_ptr,  # (N, C2) out; may be y
    N,
    clamp,
    C2: tl.constexpr,
    GY_STRIDE: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    A_STRIDE: tl.constexpr,
    GX_STRIDE: tl.constexpr,
    X_STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row0 = tl.program_id(0).to(tl.int64) * BLOCK_N
    gy_ptr += row0 * GY_STRIDE
    y_ptr += row0 * Y_STRIDE
    a_ptr += row0 * A_STRIDE
    gx_ptr += row0 * GX_STRIDE
    ga_ptr += row0 * 2 * C2
    gb_ptr += tl.program_id(0).to(tl.int64) * 2 * C2
    x_ptr += row0 * X_STRIDE
    n = tl.arange(0, BLOCK_N)
    row_mask = row0 + n < N
    glog_det = tl.load(glog_det_ptr + row0 + n, mask=row_mask, other=0.0)
    for c0 in range(0, C2, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        c_mask = c < C2
        mask = row_mask[:, None] & c_mask[None, :]
        a_at = n[:, None] * A_STRIDE + c[None, :]
        ga_at = n[:, None] * (2 * C2) + c[None, :]
        gy = tl.load(gy_ptr + n[:, None] * GY_STRIDE + c[None, :], mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + n[:, None] * Y_STRIDE + c[None, :], mask=mask, other=0.0).to(tl.float32)
        a_s = tl.load(a_ptr + a_at, mask=mask, other=0.0).to(tl.float32)
        a_t = tl.load(a_ptr + C2 + a_at, mask=mask, other=0.0).to(tl.float32)
        tanh_s = tanh(0.1 * a_s)
        exp_s = tl.exp(clamp * tanh_s)
        scaled = y - 0.1 * a_t  # x e^s without a division
        gs = gy * scaled + glog_det[:, None]
        ga_s = (0.1 * clamp) * (1.0 - tanh_s * tanh_s) * gs
        ga_t = 0.1 * gy
        tl.store(gx_ptr + n[:, None] * GX_STRIDE + c[None, :], gy * exp_s, mask=mask)
        tl.store(x_ptr + n[:, None] * X_STRIDE + c[None, :], scaled / exp_s, mask=mask)
        tl.store(ga_ptr + ga_at, ga_s, mask=mask)
        tl.store(ga_ptr + C2 + ga_at, ga_t, mask=mask)
        tl.store(gb_ptr + c, tl.sum(ga_s, axis=0), mask=c_mask)  # rows beyond N carry zero gradients
        tl.store(gb_ptr + C2 + c, tl.sum(ga_t, axis=0), mask=c_mask)


def affine_coupling_into(x2: Tensor, a: Tensor, clamp: float, *, inverse: bool, out: Tensor, log_det: Tensor) -> None:
    """Write `affine_coupling` to memory that the caller owns: y2 to `out`, and add its log-determinants to `log_det`.

    `out` (N, C2) may be a column slice of a wider row-major buffer, and may be x2 itself. `log_det` (N,) is
    float32 and contiguous.
    """
    N, C2 = x2.shape
    if x2.numel() == 0:
        return
    x2, a = rows(x2), rows(a)
    launch(
        _forward_kernel, triton.cdiv(N, BLOCK_N), warps=NUM_WARPS,
        x_ptr=x2, a_ptr=a, y_ptr=out, log_det_ptr=log_det, N=N, clamp=clamp,
        C2=C2, INVERSE=inverse, BLOCK_N=BLOCK_N, BLOCK_C=_block_c(C2),
    )  # fmt: skip


def affine_coupling_backward_into(
    gy2: Tensor, glog_det: Tensor, y2: Tensor, a: Tensor, clamp: float, *, gx2: Tensor, x2: Tensor
) -> tuple[Tensor, Tensor]:
    """Write `affine_coupling_backward` to memory that the caller owns: gx2 and the rebuilt x2; return (ga, gb).

    `gx2` and `x2` are (N, C2), may be column slices of wider row-major buffers, and may be gy2 and y2 themselves.
    """
    N, C2 = y2.shape
    programs = triton.cdiv(N, BLOCK_N)
    ga = torch.empty((N, 2 * C2), dtype=a.dtype, device=a.device)
    gb = torch.empty((programs, 2 * C2), dtype=torch.float32, device=a.device)
    if y2.numel() > 0:
        gy2, glog_det, y2, a = rows(gy2), glog_det.contiguous(), rows(y2), rows(a)
        launch(
            _backward_kernel, programs, warps=NUM_WARPS,
            gy_ptr=gy2, glog_det_ptr=glog_det, y_ptr=y2, a_ptr=a, gx_ptr=gx2, ga_ptr=ga, gb_ptr=gb, x_ptr=x2,
            N=N, clamp=clamp, C2=C2, BLOCK_N=BLOCK_N, BLOCK_C=_block_c(C2),
        )  # fmt: skip
    return ga, gb.sum(0)


def affine_coupling(x2: Tensor, a: Tensor, clamp: float = 1.9, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """Compute `affine_coupling` of ops/coupling.py: y2 (N, C2) in the dtype of x2, log_det (N,) in float32."""
    y2 = torch.empty(x2.shape, dtype=x2.dtype, device=x2.device)
    log_det = torch.zeros(x2.shape[0], dtype=torch.float32, device=x2.device)
    affine_coupling_into(x2, a, clamp, inverse=inverse, out=y2, log_det=log_det)
    return y2, log_det


def affine_coupling_backward(
    gy2: Tensor, glog_det: Tensor, y2: Tensor, a: Tensor, clamp: float = 1.9
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `affine_coupling_backward` of ops/coupling.py: (gx2, ga, gb, x2), with gb (2*C2,) in float32."""
    gx2 = torch.empty(y2.shape, dtype=gy2.dtype, device=y2.device)
    x2 = torch.empty(y2.shape, dtype=y2.dtype, device=y2.device)
    ga, gb = affine_coupling_backward_into(gy2, glog_det, y2, a, clamp, gx2=gx2, x2=x2)
    return gx2, ga, gb, x2


def _block_c(C2: int) -> int:
    return min(triton.next_power_of_2(C2), MAX_BLOCK_C)
