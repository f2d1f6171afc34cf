"""The hierarchical mixture: Triton twins of `mixture_terms`, its backward, and `mixture_scores` in ops/mixture.py.

Training. All rows of a tile share the class y, and everything is taken relative to its main centre. With
z' = z - mu_y, one table of offsets o_j holds mu_k - mu_y for the K classes, then delta_ym for the M centres of y
(delta_y0 = 0), and one product gives the logits of both mixtures,

    S_j = z'.o_j - |o_j|^2 / 2 = d_k - d_y or e_m - d_y,    d_y = -|z'|^2 / 2.

The large common term d_y drops out of entropy and information, and no |z|^2 - 2 z.mu + |mu|^2 cancels. The
columns j are taken in blocks of at most MAX_BLOCK_J, with running sums of exponentials.

Scoring centres z at the mean of all K x M centres and streams over blocks of classes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# tf32x3 has the accuracy of float32 on tensor cores. AMD has a native float32 mode in its place.
PRECISION = "ieee" if torch.version.hip or triton.knobs.runtime.interpret else "tf32x3"
NUM_STAGES = 1 if torch.version.hip else 2
BLOCK_N = 64  # Hopper's and Blackwell's matrix instructions take 64 rows or more
MAX_BLOCK_J = 64
SCORES_TILE = 128 * 64  # rows times columns
SCORES_BLOCK_C = 16  # at 32, Triton 3.6 spills 22 registers on sm_80


@triton.jit
def _accumulate(peak, total, x):
    """Add the columns of x (N, J) to a running sum of exponentials, total * e^peak per row."""
    new_peak = tl.maximum(peak, tl.max(x, axis=1))
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row of -inf must give -inf, not NaN
    return new_peak, total * tl.exp(peak - shift) + tl.sum(tl.exp(x - shift[:, None]), axis=1)


@triton.jit
def _log(peak, total):
    """Return the logarithm of a running sum of exponentials."""
    return tl.where(peak == float("-inf"), 0.0, peak) + tl.log(total)


@triton.jit
def _accumulate_entropy(peak, total, weighted, x, mask):
    """Do `_accumulate` over the columns in `mask`, and beside it sum (x - peak) e^(x - peak)."""
    new_peak = tl.maximum(peak, tl.max(tl.where(mask, x, float("-inf")), axis=1))
    fall = tl.where(total > 0, peak - new_peak, 0.0)  # -inf before the first block
    x = tl.where(mask, x - new_peak[:, None], 0.0)
    e = tl.where(mask, tl.exp(x), 0.0)
    scale = tl.exp(fall)
    weighted = scale * (weighted + total * fall) + tl.sum(e * x, axis=1)
    return new_peak, scale * total + tl.sum(e, axis=1), weighted


@triton.jit
def _tile(tiles_ptr, order_ptr, T, BLOCK_N: tl.constexpr):
    """Return the rows of this program's tile, a mask of those that exist, and their class."""
    tile = tl.program_id(0)
    first = tl.load(tiles_ptr + tile)  # int64, as row * stride must be
    stop = tl.load(tiles_ptr + T + tile)
    y = tl.load(tiles_ptr + 2 * T + tile)
    row = first + tl.arange(0, BLOCK_N)
    row_mask = row < stop
    if order_ptr is not None:
        row = tl.load(order_ptr + row, mask=row_mask, other=0)
    return row, row_mask, y


@triton.jit
def _columns(
    mu_ptr, delta_ptr, log_pi_ptr, log_w_ptr, y, j,
    C: tl.constexpr, K: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Return the places of the offsets j of class y, their log-weights, and masks of the classes and the centres."""
    is_class = j < K
    is_centre = (j >= K) & (j < K + M)
    m = j - K
    o_ptr = tl.where(is_class, mu_ptr + j * C, delta_ptr + (y * (M - 1) + m - 1) * C)
    log_weight_ptr = tl.where(is_class, log_pi_ptr + j, log_w_ptr + y * M + m)
    log_weight = tl.load(log_weight_ptr, mask=is_class | is_centre, other=float("-inf"))
    return o_ptr, log_weight, is_class, is_centre


@triton.jit
def _chunk(
    z_ptr, row, row_mask, mu_ptr, y, o_ptr, is_class, is_centre, j, c,
    C: tl.constexpr, K: tl.constexpr, Z_STRIDE: tl.constexpr,
):  # fmt: skip
    """Load channels c of z' (BLOCK_N, BLOCK_C) and of the offsets (BLOCK_J, BLOCK_C); 0 in channels beyond C."""
    c_mask = c < C
    z_at = z_ptr + row[:, None] * Z_STRIDE + c[None, :]
    z = tl.load(z_at, mask=row_mask[:, None] & c_mask[None, :], other=0.0).to(tl.float32)
    mu_y = tl.load(mu_ptr + y * C + c, mask=c_mask, other=0.0)
    stored = is_class | (is_centre & (j > K))  # centre 0 is the main centre: its offset is 0
    o = tl.load(o_ptr[:, None] + c[None, :], mask=stored[:, None] & c_mask[None, :], other=0.0)
    return z - mu_y[None, :], o - tl.where(is_class[:, None], mu_y[None, :], 0.0)


@triton.jit
def _logits(
    z_ptr, row, row_mask, mu_ptr, y, o_ptr, is_class, is_centre, j,
    C: tl.constexpr, K: tl.constexpr, Z_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Return S (BLOCK_N, BLOCK_J) and |z'|^2 (BLOCK_N,).

    S takes the half norms chunk by chunk: product and norm are both large where S is not.
    """
    s = tl.full((BLOCK_N, BLOCK_J), 0.0, tl.float32)
    norm = tl.full((BLOCK_N,), 0.0, tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        z, o = _chunk(z_ptr, row, row_mask, mu_ptr, y, o_ptr, is_class, is_centre, j, c, C, K, Z_STRIDE)
        s = tl.dot(z, tl.trans(o), s - 0.5 * tl.sum(o * o, axis=1)[None, :], input_precision=PRECISION)
        norm += tl.sum(z * z, axis=1)
    return s, norm


@triton.jit(do_not_specialize=["T"])
def _terms_kernel(
    z_ptr,  # (N, C) in
    mu_ptr,  # (K, C) in
    delta_ptr,  # (K, M - 1, C) in
    log_pi_ptr,  # (K,) in
    log_w_ptr,  # (K, M) in
    tiles_ptr,  # (3, T) in: first row, row after the last, class
    order_ptr,  # (N,) in: the rows the tiles count are order[row]; None: row itself
    lse_ptr,  # (N,) out; all four relative to d_y with RELATIVE
    entropy_ptr,  # (N,) out
    information_ptr,  # (N,) out; log sum_k e^S_k with RELATIVE
    own_ptr,  # (N,) out
    T,
    label_smoothing,
    C: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,  # 0 in stage 1
    Z_STRIDE: tl.constexpr,
    RELATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row, row_mask, y = _tile(tiles_ptr, order_ptr, T, BLOCK_N)
    peak = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.full((BLOCK_N,), 0.0, tl.float32)
    own_peak = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    own_total = tl.full((BLOCK_N,), 0.0, tl.float32)
    p_peak = tl.full((BLOCK_N,), 0.0, tl.float32)  # S_y = 0 is among the columns
    p_total = tl.full((BLOCK_N,), 0.0, tl.float32)
    p_weighted = tl.full((BLOCK_N,), 0.0, tl.float32)
    s_total = tl.full((BLOCK_N,), 0.0, tl.float32)
    norm = tl.full((BLOCK_N,), 0.0, tl.float32)
    for j0 in range(0, K + M, BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)
        o_ptr, log_weight, is_class, is_centre = _columns(mu_ptr, delta_ptr, log_pi_ptr, log_w_ptr, y, j, C, K, M)
        s, norm = _logits(
            z_ptr, row, row_mask, mu_ptr, y, o_ptr, is_class, is_centre, j,
            C, K, Z_STRIDE, PRECISION, BLOCK_N, BLOCK_J, BLOCK_C,
        )  # fmt: skip
        x = s + log_weight[None, :]  # -inf in the padding, after the product
        peak, total = _accumulate(peak, total, tl.where(is_class[None, :], x, float("-inf")))
        p_peak, p_total, p_weighted = _accumulate_entropy(p_peak, p_total, p_weighted, s, is_class[None, :])
        s_total += tl.sum(tl.where(is_class[None, :], s, 0.0), axis=1)
        if M > 0:
            own_peak, own_total = _accumulate(own_peak, own_total, tl.where(is_centre[None, :], x, float("-inf")))
    lse = _log(peak, total)
    entropy = tl.log(p_total) - p_weighted / p_total
    if RELATIVE:
        d_y = 0.0
        information = p_peak + tl.log(p_total)
    else:
        d_y = -0.5 * norm
        information = label_smoothing / K * s_total - lse
    tl.store(lse_ptr + row, d_y + lse, mask=row_mask)
    tl.store(entropy_ptr + row, entropy, mask=row_mask)
    tl.store(information_ptr + row, information, mask=row_mask)
    if M > 0:
        tl.store(own_ptr + row, d_y + _log(own_peak, own_total), mask=row_mask)


@triton.jit(do_not_specialize=["T", "j0"])
def _terms_backward_kernel(
    z_ptr,  # (N, C) in
    mu_ptr,  # (K, C) in
    delta_ptr,  # (K, M - 1, C) in
    log_pi_ptr,  # (K,) in
    log_w_ptr,  # (K, M) in
    tiles_ptr,  # (3, T) in
    order_ptr,  # (N,) in, or None
    glse_ptr,  # (N,) in
    gentropy_ptr,  # (N,) in
    ginformation_ptr,  # (N,) in
    gown_ptr,  # (N,) in
    lse_ptr,  # (N,) in: `_terms_kernel` with RELATIVE; not read when all columns are in this block
    entropy_ptr,  # (N,) in
    p_lse_ptr,  # (N,) in
    own_ptr,  # (N,) in
    gz_ptr,  # (N, C) out, contiguous; added to if j0 > 0
    goffset_ptr,  # (T, WIDTH, C) out: this tile's gradients of mu and of the centres
    gweight_ptr,  # (T, WIDTH) out: this tile's gradients of the log-weights
    T,
    j0,
    label_smoothing,
    C: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,  # 0 in stage 1
    WIDTH: tl.constexpr,
    Z_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row, row_mask, y = _tile(tiles_ptr, order_ptr, T, BLOCK_N)
    j = j0 + tl.arange(0, BLOCK_J)
    o_ptr, log_weight, is_class, is_centre = _columns(mu_ptr, delta_ptr, log_pi_ptr, log_w_ptr, y, j, C, K, M)
    s, _ = _logits(
        z_ptr, row, row_mask, mu_ptr, y, o_ptr, is_class, is_centre, j,
        C, K, Z_STRIDE, PRECISION, BLOCK_N, BLOCK_J, BLOCK_C,
    )  # fmt: skip
    s = tl.where(row_mask[:, None], s, 0.0)  # what no row owns must not overflow: its gradients are 0 times it
    x = s + log_weight[None, :]
    none = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    zero = tl.full((BLOCK_N,), 0.0, tl.float32)
    own = zero
    gown = zero
    if K + M <= BLOCK_J:
        peak, total = _accumulate(none, zero, tl.where(is_class[None, :], x, float("-inf")))
        lse = _log(peak, total)
        p_peak, p_total, p_weighted = _accumulate_entropy(zero, zero, zero, s, is_class[None, :])
        p_lse = p_peak + tl.log(p_total)
        entropy = tl.log(p_total) - p_weighted / p_total
        if M > 0:
            peak, total = _accumulate(none, zero, tl.where(is_centre[None, :], x, float("-inf")))
            own = _log(peak, total)
    else:
        lse = tl.load(lse_ptr + row, mask=row_mask, other=0.0)
        entropy = tl.load(entropy_ptr + row, mask=row_mask, other=0.0)
        p_lse = tl.load(p_lse_ptr + row, mask=row_mask, other=0.0)
        if M > 0:
            own = tl.load(own_ptr + row, mask=row_mask, other=0.0)

    # Rows that do not exist have upstream gradients of 0, hence no share in any sum over rows below.
    glse = tl.load(glse_ptr + row, mask=row_mask, other=0.0).to(tl.float32)
    gentropy = tl.load(gentropy_ptr + row, mask=row_mask, other=0.0).to(tl.float32)
    ginformation = tl.load(ginformation_ptr + row, mask=row_mask, other=0.0).to(tl.float32)
    if M > 0:
        gown = tl.load(gown_ptr + row, mask=row_mask, other=0.0).to(tl.float32)
    of_class = is_class[None, :]
    scale = tl.where(of_class, lse[:, None], own[:, None])
    weight = tl.exp(x - tl.where(scale == float("-inf"), 0.0, scale))  # q_k, then r_m; 0 in the padding
    gweight = tl.where(of_class, glse[:, None], gown[:, None]) * weight
    log_p = tl.where(of_class, s - p_lse[:, None], 0.0)
    target = tl.where(j == y, 1.0 - label_smoothing, 0.0) + label_smoothing / K
    g = ginformation[:, None] * (target[None, :] - weight) - gentropy[:, None] * tl.exp(log_p) * (
        log_p + entropy[:, None]
    )
    g = gweight + tl.where(of_class, g, 0.0)  # dL / dS

    j_mask = (j - j0 < WIDTH) & (j < K + M)
    gsum = tl.sum(g, axis=0)
    tile = tl.program_id(0).to(tl.int64)
    at = tile * WIDTH + (j - j0)
    tl.store(gweight_ptr + at, tl.sum(gweight, axis=0), mask=j_mask)
    gnorm = tl.where(j0 == 0, glse + gown, zero)  # the sum of g over all columns, with the first block
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        c_mask = c < C
        mask = row_mask[:, None] & c_mask[None, :]
        z, o = _chunk(z_ptr, row, row_mask, mu_ptr, y, o_ptr, is_class, is_centre, j, c, C, K, Z_STRIDE)
        gz_at = gz_ptr + row[:, None] * C + c[None, :]
        gz = tl.load(gz_at, mask=mask & (j0 > 0), other=0.0).to(tl.float32) - gnorm[:, None] * z
        tl.store(gz_at, tl.dot(g, o, gz, input_precision=PRECISION), mask=mask)
        goffset = tl.dot(tl.trans(g), z, -gsum[:, None] * o, input_precision=PRECISION)
        tl.store(goffset_ptr + at[:, None] * C + c[None, :], goffset, mask=j_mask[:, None] & c_mask[None, :])


@triton.jit(do_not_specialize=["T"])
def _sum_by_class_kernel(
    part_ptr,  # (T, WIDTH) in
    class_ptr,  # (T,) in
    out_ptr,  # (K, WIDTH) out: the sum of each class's rows, in their order
    T,
    WIDTH: tl.constexpr,
    PART_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    k = tl.program_id(0)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    w_mask = w < WIDTH
    total = tl.full((BLOCK_W,), 0.0, tl.float32)
    t0 = 0
    while t0 < T:  # a range that ends at run time stops Triton 3.6's interpreter
        t = t0 + tl.arange(0, BLOCK_T)
        in_class = tl.load(class_ptr + t, mask=t < T, other=-1) == k
        at = t.to(tl.int64)[:, None] * PART_STRIDE + w[None, :]
        total += tl.sum(tl.load(part_ptr + at, mask=in_class[:, None] & w_mask[None, :], other=0.0), axis=0)
        t0 += BLOCK_T
    tl.store(out_ptr + k * OUT_STRIDE + w, total, mask=w_mask)


@triton.jit(do_not_specialize=["N", "rows_per_label"])
def _scores_kernel(
    z_ptr,  # (N, C) in
    log_det_ptr,  # (N,) in
    mean_ptr,  # (C,) in: what the centres are relative to
    centres_ptr,  # (K, M, C) in
    half_norm_ptr,  # (K, M) in: |centre|^2 / 2
    log_pi_ptr,  # (K,) in
    log_w_ptr,  # (K, M) in
    labels_ptr,  # (N / rows_per_label,) in, or None
    density_ptr,  # (N,) out
    best_class_ptr,  # (N,) out
    best_ptr,  # (N,) out
    own_ptr,  # (N,) out, or None
    entropy_ptr,  # (N,) out
    class_density_ptr,  # (N, K) out, or None
    N,
    rows_per_label,
    constant,
    C: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    Z_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # classes per block
    SLOTS: tl.constexpr,  # columns per class: M rounded up to a power of two
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = row < N
    constant += tl.load(log_det_ptr + row, mask=row_mask, other=0.0).to(tl.float32)
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row // rows_per_label, mask=row_mask, other=0)
    peak = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.full((BLOCK_N,), 0.0, tl.float32)
    p_peak = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    p_total = tl.full((BLOCK_N,), 0.0, tl.float32)
    p_weighted = tl.full((BLOCK_N,), 0.0, tl.float32)
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    best_class = tl.full((BLOCK_N,), 0, tl.int32)
    own = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    base = tl.full((BLOCK_N,), 0.0, tl.float32)
    slot = tl.arange(0, BLOCK_K * SLOTS)
    m = slot % SLOTS
    for k0 in range(0, K, BLOCK_K):
        centre = (k0 + slot // SLOTS) * M + m
        exists = (k0 + slot // SLOTS < K) & (m < M)
        e = tl.full((BLOCK_N, BLOCK_K * SLOTS), 0.0, tl.float32)
        norm = tl.full((BLOCK_N,), 0.0, tl.float32)
        for c0 in range(0, C, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            c_mask = c < C
            mask = row_mask[:, None] & c_mask[None, :]
            z = tl.load(z_ptr + row[:, None] * Z_STRIDE + c[None, :], mask=mask, other=0.0).to(tl.float32)
            z -= tl.load(mean_ptr + c, mask=c_mask, other=0.0)[None, :]
            centres_at = centres_ptr + centre[:, None] * C + c[None, :]
            centres = tl.load(centres_at, mask=exists[:, None] & c_mask[None, :], other=0.0)
            e = tl.dot(z, tl.trans(centres), e, input_precision=PRECISION)
            norm += tl.sum(z * z, axis=1)
        base = constant - 0.5 * norm  # common to all centres, hence left out of every softmax
        e -= tl.load(half_norm_ptr + centre, mask=exists, other=0.0)[None, :]
        x = e + tl.load(log_w_ptr + centre, mask=exists, other=float("-inf"))[None, :]

        k = k0 + tl.arange(0, BLOCK_K)
        x = tl.reshape(x, (BLOCK_N, BLOCK_K, SLOTS))
        x_peak = tl.max(x, axis=2)
        x_peak = tl.where(x_peak == float("-inf"), 0.0, x_peak)
        density = x_peak + tl.log(tl.sum(tl.exp(x - x_peak[:, :, None]), axis=2))
        log_pi = tl.load(log_pi_ptr + k, mask=k < K, other=float("-inf"))
        peak, total = _accumulate(peak, total, density + log_pi[None, :])
        main = tl.sum(tl.reshape(tl.where(m == 0, e, 0.0), (BLOCK_N, BLOCK_K, SLOTS)), axis=2)
        p_peak, p_total, p_weighted = _accumulate_entropy(p_peak, p_total, p_weighted, main, (k < K)[None, :])
        block_best, block_best_class = tl.max(density, axis=1, return_indices=True)
        best_class = tl.where(block_best > best, k0 + block_best_class, best_class)  # on ties the lowest stays
        best = tl.maximum(best, block_best)
        if labels_ptr is not None:
            is_own = k[None, :] == label[:, None]
            own = tl.maximum(own, tl.max(tl.where(is_own, density, float("-inf")), axis=1))
        if class_density_ptr is not None:
            at = class_density_ptr + row[:, None] * K + k[None, :]
            tl.store(at, density + base[:, None], mask=row_mask[:, None] & (k < K)[None, :])
    tl.store(density_ptr + row, _log(peak, total) + base, mask=row_mask)
    tl.store(best_class_ptr + row, best_class, mask=row_mask)
    tl.store(best_ptr + row, best + base, mask=row_mask)
    tl.store(entropy_ptr + row, tl.log(p_total) - p_weighted / p_total, mask=row_mask)
    if labels_ptr is not None:
        tl.store(own_ptr + row, own + base, mask=row_mask)


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
    """Compute `mixture_terms` of ops/mixture.py; nothing but z has to be kept for the backward pass."""
    N = z.shape[0]
    lse, entropy, information, own = (_empty(z, n, dtype=z.dtype) for n in (N, N, N, N if stage == 2 else 0))
    if N > 0:
        operands = _operands(z, labels, mu, delta, phi_inter, phi_intra, stage)
        block = _terms_block(sum(operands.log_w.shape), backward=False)
        _launch_terms(operands, [lse, entropy, information, own], label_smoothing, block, relative=False)
    return lse, entropy, information, own


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
    """Compute `mixture_terms_backward` of ops/mixture.py.

    Each tile writes its share of the parameters' gradients, and a second pass adds the shares up in a fixed
    order: no atomics, so that a gradient is the same to the bit in every run. The shares take min(K + M, 64) C
    floats per tile of 64 rows.
    """
    gdelta, gphi_intra = _empty(z, *delta.shape, dtype=delta.dtype).zero_(), torch.zeros_like(phi_intra)
    if z.numel() == 0:
        return torch.zeros_like(z), torch.zeros_like(mu), gdelta, torch.zeros_like(phi_inter), gphi_intra
    operands = _operands(z, labels, mu, delta, phi_inter, phi_intra, stage)
    upstream = [gterm.contiguous() for gterm in (glse, gentropy, ginformation, gown)]
    (N, C), (K, M), T = z.shape, operands.log_w.shape, operands.tiles.shape[1]
    block = _terms_block(K + M, backward=True)
    width = min(K + M, block.J)

    gz, gmu = _empty(z, N, C, dtype=z.dtype), _empty(z, K, C, dtype=mu.dtype)
    glog_pi, glog_w = _empty(z, K), _empty(z, K, M)
    goffset, gweight = _empty(z, T, width, C), _empty(z, T, width)
    relative = [_empty(z, N if K + M > width else 0) for _ in range(4)]
    if K + M > width:  # with the same block, so that S is rounded alike in both kernels: its error cancels
        _launch_terms(operands, relative, label_smoothing, block, relative=True)
    for j0 in range(0, K + M, width):
        _terms_backward_kernel[(T,)](
            *operands, *upstream, *relative, gz, goffset, gweight, T, j0, label_smoothing,
            C, K, M, width, operands.z.stride(0), PRECISION, BLOCK_N, block.J, block.C,
            num_warps=block.warps, num_stages=NUM_STAGES,
        )  # fmt: skip
        columns = min(width, K + M - j0)
        classes = min(max(K - j0, 0), columns)
        gmu[j0 : j0 + classes] = goffset[:, :classes].sum(0)
        glog_pi[j0 : j0 + classes] = gweight[:, :classes].sum(0)
        if classes < columns:
            m0, m1 = j0 + classes - K, j0 + columns - K
            _sum_by_class(gweight[:, classes:columns], operands.tiles, glog_w[:, m0:m1])
            stored = max(m0, 1)  # centre 0 is mu, a constant here
            gcentres = goffset[:, stored + K - j0 : columns]
            _sum_by_class(gcentres, operands.tiles, gdelta[:, stored - 1 : m1 - 1])
    gphi_inter = glog_pi - operands.log_pi.exp() * glog_pi.sum()
    if stage == 2:
        gphi_intra = (glog_w - operands.log_w.exp() * glog_w.sum(1, keepdim=True)).to(phi_intra.dtype)
    return gz, gmu, gdelta, gphi_inter.to(phi_inter.dtype), gphi_intra


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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """Compute `mixture_scores` of ops/mixture.py: the fields of `MixtureScores`, in order."""
    (N, C), (K, M) = z.shape, phi_intra.shape
    log_density, best, entropy = (_empty(z, N, dtype=z.dtype) for _ in range(3))
    best_class = _empty(z, N, dtype=torch.int64)
    own = None if labels is None else _empty(z, N, dtype=z.dtype)
    class_density = _empty(z, N, K, dtype=z.dtype) if per_class else None
    if N > 0:
        labels = None if labels is None else labels.contiguous()
        centres = torch.cat([mu[:, None], mu[:, None] + delta], 1).double()
        mean = centres.mean((0, 1)).float()
        centres = (centres - mean).float()
        half_norm = (0.5 * centres.double().square().sum(-1)).float()
        log_pi, log_w = _log_weights(phi_inter), _log_weights(phi_intra)
        rows_per_label = 1 if labels is None else N // labels.numel()
        z = _rows(z)
        slots = triton.next_power_of_2(M)
        columns = max(MAX_BLOCK_J, slots)
        block_n = max(SCORES_TILE // columns, 16)
        _scores_kernel[(triton.cdiv(N, block_n),)](
            z, log_det.contiguous(), mean, centres, half_norm, log_pi, log_w, labels,
            log_density, best_class, best, own, entropy, class_density,
            N, rows_per_label, -0.5 * C * math.log(2 * math.pi),
            C, K, M, z.stride(0), PRECISION, block_n, columns // slots, slots, SCORES_BLOCK_C,
            num_warps=8, num_stages=NUM_STAGES,
        )  # fmt: skip
    return log_density, best_class, best, own, entropy, class_density


class _Operands(NamedTuple):
    """Inputs of both training kernels, in their order."""

    z: Tensor  # (N, C), rows contiguous
    mu: Tensor  # (K, C)
    delta: Tensor  # (K, M - 1, C)
    log_pi: Tensor  # (K,)
    log_w: Tensor  # (K, M); M = 0 in stage 1
    tiles: Tensor  # (3, T) int64: first row, row after the last, class
    order: Tensor | None  # (N,) int64


class _Block(NamedTuple):
    """Sizes of a training kernel's inner products."""

    J: int  # columns: classes and centres
    C: int  # channels
    warps: int


def _operands(
    z: Tensor, labels: Tensor, mu: Tensor, delta: Tensor, phi_inter: Tensor, phi_intra: Tensor, stage: int
) -> _Operands:
    """Return the inputs of the training kernels; in stage 1 without the centres of each class."""
    log_w = _log_weights(phi_intra)[:, : phi_intra.shape[1] if stage == 2 else 0]
    parameters = mu.float().contiguous(), delta.float().contiguous(), _log_weights(phi_inter), log_w
    return _Operands(_rows(z), *parameters, *_tiles(labels, z.shape[0], mu.shape[0]))


def _tiles(labels: Tensor, N: int, K: int) -> tuple[Tensor, Tensor | None]:
    """Return tiles (3, T), at most BLOCK_N rows of one class each, and the order that makes their rows neighbours.

    Nothing here waits for the device. So per-pixel labels get as many tiles as their classes could need at most,
    and the tiles left over are empty.
    """
    if labels.numel() < N:  # one per image
        rows = N // labels.numel()
        tiles_per_image = triton.cdiv(rows, BLOCK_N)
        image = torch.arange(labels.numel(), device=labels.device)[:, None]
        first = image * rows + torch.arange(0, rows, BLOCK_N, device=labels.device)
        stop = torch.minimum(first + BLOCK_N, (image + 1) * rows)
        return torch.stack([first, stop, labels[:, None].expand(-1, tiles_per_image)]).flatten(1), None
    in_order, order = labels.sort(stable=True)
    edges = torch.searchsorted(in_order, torch.arange(K + 1, device=labels.device))  # where each class starts
    tiles = (edges.diff() + BLOCK_N - 1) // BLOCK_N
    last_tile = tiles.cumsum(0)
    tile = torch.arange(triton.cdiv(N, BLOCK_N) + min(K, N), device=labels.device)
    y = torch.searchsorted(last_tile, tile, right=True).clamp(max=K - 1)
    first = edges[y] + (tile - last_tile[y] + tiles[y]) * BLOCK_N
    return torch.stack([first, torch.minimum(first + BLOCK_N, edges[y + 1]), y]), order


def _terms_block(columns: int, *, backward: bool) -> _Block:
    """Return fixed block sizes: they order the sums, so that tuned ones would let a result depend on the machine.

    These are the largest whose backward pass spills no register (tests/kernels/test_aot.py).
    """
    J = min(max(triton.next_power_of_2(columns), 16), MAX_BLOCK_J)
    return _Block(J, 16 if backward and J >= 32 else 32, warps=8 if J == 64 else 4)


def _launch_terms(
    operands: _Operands, terms: list[Tensor], label_smoothing: float, block: _Block, *, relative: bool
) -> None:
    """Launch `_terms_kernel`, which writes A, H, I and B of all rows to `terms`; `relative` is its RELATIVE."""
    (K, M), C, T = operands.log_w.shape, operands.z.shape[1], operands.tiles.shape[1]
    _terms_kernel[(T,)](
        *operands, *terms, T, label_smoothing, C, K, M, operands.z.stride(0), relative,
        PRECISION, BLOCK_N, block.J, block.C, num_warps=block.warps, num_stages=NUM_STAGES,
    )  # fmt: skip


def _sum_by_class(part: Tensor, tiles: Tensor, out: Tensor) -> None:
    """Sum part (T, W, ...) over the tiles of each class into out (K, W, ...)."""
    part, out = part.flatten(1), out.flatten(1)
    if out.numel() == 0:
        return
    width = out.shape[1]
    _sum_by_class_kernel[(out.shape[0], triton.cdiv(width, 64))](
        part, tiles[2], out, part.shape[0], width, part.stride(0), out.stride(0), BLOCK_T=128, BLOCK_W=64,
    )  # fmt: skip


def _log_weights(phi: Tensor) -> Tensor:
    """Return log softmax over the last axis, in float32; a row of -inf stays -inf."""
    phi = phi.float().contiguous()
    return phi - phi.logsumexp(-1, keepdim=True).clamp(min=torch.finfo(phi.dtype).min)


def _rows(z: Tensor) -> Tensor:
    """Return `z` if its rows are contiguous, else a copy."""
    return z if z.stride(1) == 1 and z.stride(0) >= z.shape[1] else z.contiguous()


def _empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)
