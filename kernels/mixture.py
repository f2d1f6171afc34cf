"""The hierarchical mixture: Triton twins of `mixture_terms`, its backward, and `mixture_scores` in ops/mixture.py.

Training. All rows of a tile share the class y, and everything is taken relative to its main centre. With
z' = z - mu_y, one table of offsets o_yj holds mu_j - mu_y for the K classes, then delta_ym for the M centres of y
(delta_y0 = 0), and one product gives the logits of both mixtures,

    S_j = z'.o_yj - |o_yj|^2 / 2 = d_j - d_y or e_m - d_y,    d_y = -|z'|^2 / 2.

The large common term d_y drops out of entropy and information, and no |z|^2 - 2 z.mu + |mu|^2 cancels. The
columns j are taken in blocks of at most MAX_BLOCK_J, with running sums of exponentials. With G = dL / dS, the
gradients are

    gz = G o_y - (sum_j G_j) z',    gmu_j or gdelta_ym = sum_n G_nj (z'_n - o_yj),

and those of the log-weights' phi follow from d lse / d phi_j = softmax(S + log w)_j - w_j. A tile writes its sums of
G z' and of G, and one reduction adds them up and subtracts what the offsets take.

Scoring centres z at the mean of all K x M centres and streams over blocks of classes.

What does not depend on the pixels is made once, by the kernels of centres.py; see there how products are exact.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cache import PACKED
from .centres import MAX_BLOCK_J, SPLIT, Centres, Offsets, block_j, multiply_split, offset_rows, split
from .common import accelerated, launch, rows, stages, tiled

BLOCK_N = 64  # Hopper's and Blackwell's matrix instructions take 64 rows or more
SCORES_TILE = 128 * 64  # rows times columns
SCORES_BLOCK_C = 16  # at 32, a program takes 180 registers and more
SCORES_REGISTERS = {"sm_90": 128}  # so that two programs of 8 warps share a multiprocessor


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
def _class(tile, labels_ptr, tiles_ptr, T, tiles_per_image, K: tl.constexpr):
    """Return the class of tiles; a label that is none counts as the nearest."""
    if tiles_ptr is None:
        y = tl.load(labels_ptr + tile // tiles_per_image, mask=tile < T, other=0)
    else:
        y = tl.load(tiles_ptr + 2 * T + tile, mask=tile < T, other=0)
    return tl.minimum(tl.maximum(y, 0), K - 1).to(tl.int32)


@triton.jit
def _tile(
    labels_ptr, tiles_ptr, order_ptr, T, tiles_per_image, rows_per_image,
    K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return this program's rows as a first one and distances from it, a mask of those that exist, and their class."""
    tile = tl.program_id(0)
    y = _class(tile, labels_ptr, tiles_ptr, T, tiles_per_image, K)
    n = tl.arange(0, BLOCK_N)
    if tiles_ptr is None:  # an image has tiles of its own
        start = (tile % tiles_per_image) * BLOCK_N
        return (tile // tiles_per_image).to(tl.int64) * rows_per_image + start, n, start + n < rows_per_image, y
    else:
        first = tl.load(tiles_ptr + tile)
        row_mask = first + n < tl.load(tiles_ptr + T + tile)
        return first * 0, tl.load(order_ptr + first + n, mask=row_mask, other=0), row_mask, y


@triton.jit
def _centred(z_ptr, n, row_mask, mean_ptr, c, C: tl.constexpr, Z_STRIDE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Load channels c of rows n less a mean (BLOCK_N, BLOCK_C); 0 in channels beyond C.

    The mean is loaded for every row, 16 bytes a thread: a single row would be copied by 4 bytes, or, as a tile read
    into registers, be fenced from the next copy.
    """
    mask = row_mask[:, None] & (c < C)[None, :]
    z = tl.load(z_ptr + n[:, None] * Z_STRIDE + c[None, :], mask=mask, other=0.0).to(tl.float32)
    return z - tl.load(mean_ptr + tl.arange(0, BLOCK_N)[:, None] * 0 + c[None, :])


@triton.jit
def _logits(
    z_ptr, n, row_mask, mu_ptr, delta_ptr, mean_ptr, offsets, half_norm_ptr, y, j0,
    C: tl.constexpr, K: tl.constexpr, M: tl.constexpr, J: tl.constexpr, PADDED_C: tl.constexpr,
    Z_STRIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr, TILED: tl.constexpr,
):  # fmt: skip
    """Return S (BLOCK_N, BLOCK_J) and |z'|^2 (BLOCK_N,)."""
    SPLIT: tl.constexpr = PRECISION == "tf32x3"
    j = j0 + tl.arange(0, BLOCK_J)
    s = tl.full((BLOCK_N, BLOCK_J), 0.0, tl.float32)
    squares = tl.full((BLOCK_N, BLOCK_C), 0.0, tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        z = _centred(z_ptr, n, row_mask, mean_ptr + y * PADDED_C, c, C, Z_STRIDE, BLOCK_N)
        squares += z * z
        if offsets is not None:
            big, small = split(z, SPLIT)
            s = multiply_split(
                big, small, offsets, y * J + j0, c0, s, BLOCK_J, BLOCK_C, PADDED_C, K * J, SPLIT, TILED
            )  # fmt: skip
        else:
            o = offset_rows(mu_ptr, delta_ptr, y, j, c, C, K, M)
            s = tl.dot(z, tl.trans(o), s, input_precision=PRECISION)
    return s - tl.load(half_norm_ptr + y * J + j)[None, :], tl.sum(squares, axis=1)


@triton.jit(do_not_specialize=["T", "tiles_per_image", "rows_per_image"])
def _terms_kernel(
    z_ptr,  # (N, C) in
    mu_ptr,  # (K, C) in
    delta_ptr,  # (K, M - 1, C) in
    mean_ptr,  # (K, PADDED_C) in: mu and zeros
    offsets,  # (PIECES K J, PADDED_C) in, by tiles; None: they are formed from mu and delta
    half_norm_ptr,  # (K, J) in
    log_weight_ptr,  # (K, J) in
    labels_ptr,  # (images,) in
    tiles_ptr,  # (3, T) in: first row, row after the last, class; None: each image has tiles_per_image tiles
    order_ptr,  # (N,) in: the rows that tiles_ptr counts are order[row]; None like it
    lse_ptr,  # (N,) out; all four relative to d_y with RELATIVE
    entropy_ptr,  # (N,) out
    information_ptr,  # (N,) out; log sum_k e^S_k with RELATIVE
    own_ptr,  # (N,) out
    T,
    tiles_per_image,
    rows_per_image,
    label_smoothing,
    C: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,  # 0 in stage 1
    J: tl.constexpr,
    PADDED_C: tl.constexpr,
    Z_STRIDE: tl.constexpr,
    RELATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILED: tl.constexpr,
):
    first, n, row_mask, y = _tile(
        labels_ptr, tiles_ptr, order_ptr, T, tiles_per_image, rows_per_image, K, BLOCK_N
    )  # fmt: skip
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
        s, norm = _logits(
            z_ptr + first * Z_STRIDE, n, row_mask, mu_ptr, delta_ptr, mean_ptr, offsets, half_norm_ptr, y, j0,
            C, K, M, J, PADDED_C, Z_STRIDE, PRECISION, BLOCK_N, BLOCK_J, BLOCK_C, TILED,
        )  # fmt: skip
        is_class = (j < K)[None, :]
        x = s + tl.load(log_weight_ptr + y * J + j)[None, :]  # -inf in the padding
        peak, total = _accumulate(peak, total, tl.where(is_class, x, float("-inf")))
        p_peak, p_total, p_weighted = _accumulate_entropy(p_peak, p_total, p_weighted, s, is_class)
        s_total += tl.sum(tl.where(is_class, s, 0.0), axis=1)
        if M > 0:
            own_peak, own_total = _accumulate(own_peak, own_total, tl.where(is_class, float("-inf"), x))
    lse = _log(peak, total)
    entropy = tl.log(p_total) - p_weighted / p_total
    if RELATIVE:
        d_y = 0.0
        information = p_peak + tl.log(p_total)
    else:
        d_y = -0.5 * norm
        information = label_smoothing / K * s_total - lse
    row = first + n
    tl.store(lse_ptr + row, d_y + lse, mask=row_mask)
    tl.store(entropy_ptr + row, entropy, mask=row_mask)
    tl.store(information_ptr + row, information, mask=row_mask)
    if M > 0:
        tl.store(own_ptr + row, d_y + _log(own_peak, own_total), mask=row_mask)


@triton.jit(do_not_specialize=["T", "tiles_per_image", "rows_per_image", "block"])
def _terms_backward_kernel(
    z_ptr,  # (N, C) in
    mu_ptr,  # (K, C) in
    delta_ptr,  # (K, M - 1, C) in
    mean_ptr,  # (K, PADDED_C) in
    offsets,  # (PIECES K J, PADDED_C) in, by tiles, or None
    turned,  # (PIECES K PADDED_C, J) in, by tiles, or None
    half_norm_ptr,  # (K, J) in
    log_weight_ptr,  # (K, J) in
    labels_ptr,  # (images,) in
    tiles_ptr,  # (3, T) in, or None
    order_ptr,  # (N,) in, or None
    glse_ptr,  # (N,) in
    gentropy_ptr,  # (N,) in
    ginformation_ptr,  # (N,) in
    gown_ptr,  # (N,) in
    lse_ptr,  # (N,) in: `_terms_kernel` with RELATIVE; not read when all columns are in this block
    entropy_ptr,  # (N,) in
    p_lse_ptr,  # (N,) in
    own_ptr,  # (N,) in
    gz_ptr,  # (N, C) out, contiguous; added to if block > 0
    part_ptr,  # (T, WIDTH, PART_C) out: sums over a tile's rows of G z', then the gradient of phi, and the sum of G
    T,
    tiles_per_image,
    rows_per_image,
    block,  # of columns
    label_smoothing,
    C: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,  # 0 in stage 1
    J: tl.constexpr,
    PADDED_C: tl.constexpr,
    WIDTH: tl.constexpr,
    PART_C: tl.constexpr,
    Z_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILED: tl.constexpr,
):
    SPLIT: tl.constexpr = PRECISION == "tf32x3"
    first, n, row_mask, y = _tile(
        labels_ptr, tiles_ptr, order_ptr, T, tiles_per_image, rows_per_image, K, BLOCK_N
    )  # fmt: skip
    z_ptr += first * Z_STRIDE
    column = tl.arange(0, BLOCK_J)
    j = block * BLOCK_J + column
    s, _ = _logits(
        z_ptr, n, row_mask, mu_ptr, delta_ptr, mean_ptr, offsets, half_norm_ptr, y, block * BLOCK_J,
        C, K, M, J, PADDED_C, Z_STRIDE, PRECISION, BLOCK_N, BLOCK_J, BLOCK_C, TILED,
    )  # fmt: skip
    s = tl.where(row_mask[:, None], s, 0.0)  # what no row owns must not overflow: its gradients are 0 times it
    is_class = j < K
    of_class = is_class[None, :]
    log_weight = tl.load(log_weight_ptr + y * J + j)
    x = s + log_weight[None, :]
    none = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    zero = tl.full((BLOCK_N,), 0.0, tl.float32)
    row = first + n
    own = zero
    gown = zero
    if K + M <= BLOCK_J:
        peak, total = _accumulate(none, zero, tl.where(of_class, x, float("-inf")))
        lse = _log(peak, total)
        p_peak, p_total, p_weighted = _accumulate_entropy(zero, zero, zero, s, of_class)
        p_lse = p_peak + tl.log(p_total)
        entropy = tl.log(p_total) - p_weighted / p_total
        if M > 0:
            peak, total = _accumulate(none, zero, tl.where(of_class, float("-inf"), x))
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
    scale = tl.where(of_class, lse[:, None], own[:, None])
    weight = tl.exp(x - tl.where(scale == float("-inf"), 0.0, scale))  # q_k, then r_m; 0 in the padding
    gweight = tl.where(of_class, glse[:, None], gown[:, None]) * weight
    log_p = tl.where(of_class, s - p_lse[:, None], 0.0)
    target = tl.where(j == y, 1.0 - label_smoothing, 0.0) + label_smoothing / K
    g = ginformation[:, None] * (target[None, :] - weight) - gentropy[:, None] * tl.exp(log_p) * (
        log_p + entropy[:, None]
    )
    g = gweight + tl.where(of_class, g, 0.0)  # dL / dS

    gphi = tl.sum(gweight, axis=0) - tl.exp(log_weight) * tl.where(is_class, tl.sum(glse, axis=0), tl.sum(gown, axis=0))
    stored = (column < WIDTH) & (j < K + M)
    part_ptr += tl.program_id(0).to(tl.int64) * (WIDTH * PART_C)
    tl.store(part_ptr + column * PART_C + C, gphi, mask=stored)
    tl.store(part_ptr + column * PART_C + C + 1, tl.sum(g, axis=0), mask=stored)
    gz_ptr += first * C
    gnorm = tl.where(block == 0, glse + gown, zero)  # the sum of g over all columns, with the first block
    g_big, g_small = split(g, SPLIT)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        c_mask = c < C
        mask = row_mask[:, None] & c_mask[None, :]
        z = _centred(z_ptr, n, row_mask, mean_ptr + y * PADDED_C, c, C, Z_STRIDE, BLOCK_N)
        gz_at = gz_ptr + n[:, None] * C + c[None, :]
        gz = -gnorm[:, None] * z
        if K + M > BLOCK_J:
            gz += tl.load(gz_at, mask=mask & (block > 0), other=0.0).to(tl.float32)
        if turned is not None:
            gz = multiply_split(
                g_big, g_small, turned, y * PADDED_C + c0, block * BLOCK_J, gz,
                BLOCK_C, BLOCK_J, J, K * PADDED_C, SPLIT, TILED,
            )  # fmt: skip
        else:
            gz = tl.dot(g, offset_rows(mu_ptr, delta_ptr, y, j, c, C, K, M), gz, input_precision=PRECISION)
        tl.store(gz_at, gz, mask=mask)
        if SPLIT:  # fewer than 64 rows, the channels: then operands from registers need no fence
            z_big, z_small = split(tl.trans(z), SPLIT)
            products = tl.dot(z_small, g_big, input_precision="tf32")
            products = tl.dot(z_big, g_small, products, input_precision="tf32")
            products = tl.dot(z_big, g_big, products, input_precision="tf32")
        else:
            products = tl.dot(tl.trans(z), g, input_precision=PRECISION)
        at = part_ptr + column[None, :] * PART_C + c[:, None]
        tl.store(at, products, mask=stored[None, :] & c_mask[:, None])


@triton.jit(do_not_specialize=["T", "tiles_per_image", "k0", "m0", "classes"])
def _reduce_kernel(
    mu_ptr,  # (K, C) in
    delta_ptr,  # (K, CENTRES - 1, C) in
    part_ptr,  # (T, WIDTH, PART_C) in
    labels_ptr,  # (images,) in
    tiles_ptr,  # (3, T) in, or None
    gmu_ptr,  # (K, C) out
    gdelta_ptr,  # (K, CENTRES - 1, C) out
    gphi_inter_ptr,  # (K,) out
    gphi_intra_ptr,  # (K, CENTRES) out
    T,
    tiles_per_image,
    k0,  # the first columns of part are `classes` classes from k0 on
    m0,  # the others are centres from m0 on
    classes,
    C: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,  # 0 in stage 1, where the gradients of all centres are 0
    CENTRES: tl.constexpr,
    WIDTH: tl.constexpr,
    PART_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum a column over the tiles, in their order: a class's over all of them, a centre's over those of its class."""
    p = tl.program_id(0)
    of_class = p < classes
    centre = tl.maximum(p - classes, 0)
    k = tl.where(of_class, k0 + p, centre % K)
    m = m0 + centre // K
    column = tl.where(of_class, p, classes + centre // K)
    stop = T
    if M == 0:
        stop = tl.where(of_class, T, 0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_ptr = tl.where(of_class, mu_ptr + k * C, delta_ptr + (k * (CENTRES - 1) + m - 1) * C)
    o = tl.load(o_ptr + c, mask=(c < C) & (of_class | (m > 0)), other=0.0)
    total = tl.full((BLOCK_C,), 0.0, tl.float32)
    t0 = 0
    while t0 < stop:  # a range that ends at run time stops Triton 3.6's interpreter
        t = t0 + tl.arange(0, BLOCK_T)
        y = _class(t, labels_ptr, tiles_ptr, T, tiles_per_image, K)
        wanted = (t < T) & (of_class | (y == k))
        row_ptr = part_ptr + (t.to(tl.int64) * WIDTH + column) * PART_C
        gsum = tl.load(row_ptr + C + 1, mask=wanted, other=0.0)
        products = tl.load(row_ptr[:, None] + c[None, :], mask=wanted[:, None] & (c < PART_C)[None, :], other=0.0)
        mu_y = tl.load(mu_ptr + y[:, None] * C + c[None, :], mask=of_class & (c < C)[None, :], other=0.0)
        total += tl.sum(products - gsum[:, None] * (o[None, :] - mu_y), axis=0)
        t0 += BLOCK_T
    if of_class:
        tl.store(gmu_ptr + k * C + c, total, mask=c < C)
        tl.store(gphi_inter_ptr + k + c * 0, total, mask=c == C)
    else:
        if CENTRES > 1:
            tl.store(gdelta_ptr + (k * (CENTRES - 1) + m - 1) * C + c, total, mask=(c < C) & (m > 0))
        tl.store(gphi_intra_ptr + k * CENTRES + m + c * 0, total, mask=c == C)


@triton.jit(do_not_specialize=["N", "rows_per_label"])
def _scores_kernel(
    z_ptr,  # (N, C) in
    log_det_ptr,  # (N,) in
    mean_ptr,  # (PADDED_C,) in: what the centres are relative to
    centres,  # (PIECES PADDED_K SLOTS, PADDED_C) in, by tiles
    half_norm_ptr,  # (PADDED_K, SLOTS) in
    log_pi_ptr,  # (PADDED_K,) in
    log_w_ptr,  # (PADDED_K, SLOTS) in
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
    PADDED_K: tl.constexpr,
    SLOTS: tl.constexpr,  # columns per class: M rounded up to a power of two
    PADDED_C: tl.constexpr,
    Z_STRIDE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # classes per block
    BLOCK_C: tl.constexpr,
    TILED: tl.constexpr,
):
    row0 = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = tl.arange(0, BLOCK_N)
    row = row0 + n
    row_mask = row < N
    z_ptr += row0 * Z_STRIDE
    peak = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.full((BLOCK_N,), 0.0, tl.float32)
    p_peak = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    p_total = tl.full((BLOCK_N,), 0.0, tl.float32)
    p_weighted = tl.full((BLOCK_N,), 0.0, tl.float32)
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    best_class = tl.full((BLOCK_N,), 0, tl.int32)
    own = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    squares = tl.full((BLOCK_N, BLOCK_C), 0.0, tl.float32)
    for c0 in range(0, C, BLOCK_C):
        z = _centred(z_ptr, n, row_mask, mean_ptr, c0 + tl.arange(0, BLOCK_C), C, Z_STRIDE, BLOCK_N)
        squares += z * z
    base = constant + tl.load(log_det_ptr + row, mask=row_mask, other=0.0).to(tl.float32)
    base -= 0.5 * tl.sum(squares, axis=1)  # common to all centres, hence left out of every softmax
    slot = tl.arange(0, BLOCK_K * SLOTS)
    for k0 in range(0, PADDED_K, BLOCK_K):
        e = tl.full((BLOCK_N, BLOCK_K * SLOTS), 0.0, tl.float32)
        for c0 in range(0, C, BLOCK_C):
            z = _centred(z_ptr, n, row_mask, mean_ptr, c0 + tl.arange(0, BLOCK_C), C, Z_STRIDE, BLOCK_N)
            big, small = split(z, SPLIT)
            e = multiply_split(
                big, small, centres, k0 * SLOTS, c0, e,
                BLOCK_K * SLOTS, BLOCK_C, PADDED_C, PADDED_K * SLOTS, SPLIT, TILED,
            )  # fmt: skip
        e -= tl.load(half_norm_ptr + k0 * SLOTS + slot)[None, :]
        x = e + tl.load(log_w_ptr + k0 * SLOTS + slot)[None, :]

        k = k0 + tl.arange(0, BLOCK_K)
        x = tl.reshape(x, (BLOCK_N, BLOCK_K, SLOTS))
        x_peak = tl.max(x, axis=2)
        x_peak = tl.where(x_peak == float("-inf"), 0.0, x_peak)
        density = x_peak + tl.log(tl.sum(tl.exp(x - x_peak[:, :, None]), axis=2))
        peak, total = _accumulate(peak, total, density + tl.load(log_pi_ptr + k)[None, :])
        main = tl.sum(tl.reshape(tl.where(slot % SLOTS == 0, e, 0.0), (BLOCK_N, BLOCK_K, SLOTS)), axis=2)
        p_peak, p_total, p_weighted = _accumulate_entropy(p_peak, p_total, p_weighted, main, (k < K)[None, :])
        block_best, block_best_class = tl.max(density, axis=1, return_indices=True)
        best_class = tl.where(block_best > best, k0 + block_best_class, best_class)  # on ties the lowest stays
        best = tl.maximum(best, block_best)
        if labels_ptr is not None:
            label = tl.load(labels_ptr + row // rows_per_label, mask=row_mask, other=0)
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
        offsets = Offsets.prepare(mu, delta, phi_inter, phi_intra, stage)
        terms = [lse, entropy, information, own]
        _launch_terms(rows(z), offsets, _Tiles.cut(labels, N, len(mu)), terms, label_smoothing)
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
    if z.numel() == 0:
        return tuple(t.new_zeros(t.shape) for t in (z, mu, delta, phi_inter, phi_intra))  # type: ignore[return-value]
    gz, gmu, gdelta, gphi_inter, gphi_intra = (
        _empty(z, *t.shape, dtype=t.dtype) for t in (z, mu, delta, phi_inter, phi_intra)
    )
    z = rows(z)
    offsets = Offsets.prepare(mu, delta, phi_inter, phi_intra, stage)
    (N, C), (K, CENTRES), M = z.shape, phi_intra.shape, offsets.M
    tiles = _Tiles.cut(labels, N, K)
    columns, width = block_j(K + M), min(K + M, MAX_BLOCK_J)
    channels = 16 if columns >= 32 else 32  # the most whose loop spills no register
    warps = 8 if columns == 64 else 4  # with 4, 64 columns spill on Blackwell
    turned = None if offsets.turned is None else tiled(offsets.turned, channels, columns)
    part = _empty(z, tiles.T, width, triton.cdiv(C + 2, 4) * 4)  # rows of 16 bytes
    relative = [_empty(z, N if K + M > width else 0) for _ in range(4)]
    if K + M > width:  # with the same blocks, so that S is rounded alike in both kernels: its error cancels
        _launch_terms(z, offsets, tiles, relative, label_smoothing, channels, relative=True)
    for i in range(triton.cdiv(K + M, width)):
        j0 = i * width
        launch(
            _terms_backward_kernel, tiles.T, warps=warps, stages=stages(z.device, tiles=turned is not None),
            z_ptr=z, **offsets.arguments(columns, channels), turned=turned,
            **tiles.arguments(), order_ptr=tiles.order, rows_per_image=tiles.rows_per_image, BLOCK_N=BLOCK_N,
            glse_ptr=glse.contiguous(), gentropy_ptr=gentropy.contiguous(), ginformation_ptr=ginformation.contiguous(),
            gown_ptr=gown.contiguous(),
            lse_ptr=relative[0], entropy_ptr=relative[1], p_lse_ptr=relative[2], own_ptr=relative[3],
            gz_ptr=gz, part_ptr=part, block=i, label_smoothing=label_smoothing,
            C=C, WIDTH=width, PART_C=part.shape[2],
        )  # fmt: skip
        classes = min(max(K - j0, 0), width)
        centres = min(width, K + M - j0) - classes if stage == 2 else CENTRES * (j0 == 0)
        launch(
            _reduce_kernel, (classes + centres * K, triton.cdiv(C + 1, 64)),
            mu_ptr=offsets.mu, delta_ptr=offsets.delta, part_ptr=part, **tiles.arguments(),
            gmu_ptr=gmu, gdelta_ptr=gdelta, gphi_inter_ptr=gphi_inter, gphi_intra_ptr=gphi_intra,
            k0=j0, m0=max(j0 - K, 0), classes=classes,
            C=C, K=K, M=M, CENTRES=CENTRES, WIDTH=width, PART_C=part.shape[2], BLOCK_T=64, BLOCK_C=64,
        )  # fmt: skip
    return gz, gmu, gdelta, gphi_inter, gphi_intra


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
    (N, C), K = z.shape, mu.shape[0]
    log_density, best, entropy = (_empty(z, N, dtype=z.dtype) for _ in range(3))
    best_class = _empty(z, N, dtype=torch.int64)
    own = None if labels is None else _empty(z, N, dtype=z.dtype)
    class_density = _empty(z, N, K, dtype=z.dtype) if per_class else None
    if N > 0:
        labels = None if labels is None else labels.contiguous()
        parameters = mu, delta, phi_inter, phi_intra
        centres = PACKED.get(lambda: Centres.prepare(*parameters), ("centres",), parameters)
        _, padded_k, slots, padded_c = centres.table.shape
        columns = max(MAX_BLOCK_J, slots)
        block_n = max(SCORES_TILE // columns, 16)
        launch(
            _scores_kernel, triton.cdiv(N, block_n), warps=8, stages=stages(z.device, tiles=True),
            registers=SCORES_REGISTERS,
            z_ptr=rows(z), log_det_ptr=log_det.contiguous(),
            mean_ptr=centres.mean, centres=tiled(centres.table, columns, SCORES_BLOCK_C),
            half_norm_ptr=centres.half_norm, log_pi_ptr=centres.log_pi, log_w_ptr=centres.log_w, labels_ptr=labels,
            density_ptr=log_density, best_class_ptr=best_class, best_ptr=best, own_ptr=own, entropy_ptr=entropy,
            class_density_ptr=class_density,
            N=N, rows_per_label=1 if labels is None else N // labels.numel(), constant=-0.5 * C * math.log(2 * math.pi),
            C=C, K=K, PADDED_K=padded_k, SLOTS=slots, PADDED_C=padded_c, SPLIT=SPLIT,
            BLOCK_N=block_n, BLOCK_K=columns // slots, BLOCK_C=SCORES_BLOCK_C, TILED=accelerated(z.device),
        )  # fmt: skip
    return log_density, best_class, best, own, entropy, class_density


class _Tiles(NamedTuple):
    """At most BLOCK_N rows of one class each."""

    T: int
    labels: Tensor  # (images,)
    tiles_per_image: int
    rows_per_image: int
    table: Tensor | None  # (3, T) int64, for labels per pixel: first row, row after the last, class
    order: Tensor | None  # (N,) int64, what makes their rows neighbours

    @classmethod
    def cut(cls, labels: Tensor, N: int, K: int) -> _Tiles:
        """Cut N rows into tiles.

        Nothing here waits for the device. So per-pixel labels get as many tiles as their classes could need at most,
        and the tiles left over are empty.
        """
        labels = labels.contiguous()
        if labels.numel() < N:  # one per image
            rows_per_image = N // labels.numel()
            tiles_per_image = triton.cdiv(rows_per_image, BLOCK_N)
            return cls(labels.numel() * tiles_per_image, labels, tiles_per_image, rows_per_image, None, None)
        in_order, order = labels.clamp(0, K - 1).sort(stable=True)
        edges = torch.searchsorted(in_order, torch.arange(K + 1, device=labels.device))  # where each class starts
        tiles = (edges.diff() + BLOCK_N - 1) // BLOCK_N
        last_tile = tiles.cumsum(0)
        tile = torch.arange(triton.cdiv(N, BLOCK_N) + min(K, N), device=labels.device)
        y = torch.searchsorted(last_tile, tile, right=True).clamp(max=K - 1)
        first = edges[y] + (tile - last_tile[y] + tiles[y]) * BLOCK_N
        table = torch.stack([first, torch.minimum(first + BLOCK_N, edges[y + 1]), y])
        return cls(len(tile), labels, 1, 1, table, order)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `_class`."""
        tiles_per_image = self.tiles_per_image
        return {"labels_ptr": self.labels, "tiles_ptr": self.table, "T": self.T, "tiles_per_image": tiles_per_image}


def _launch_terms(
    z: Tensor,
    offsets: Offsets,
    tiles: _Tiles,
    terms: list[Tensor],
    label_smoothing: float,
    channels: int = 32,
    *,
    relative: bool = False,
) -> None:
    """Launch `_terms_kernel`, which writes A, H, I and B of all rows to `terms`; `relative` is its RELATIVE.

    Block sizes are fixed: they order the sums, so that tuned ones would let a result depend on the machine.
    """
    lse, entropy, information, own = terms
    columns = block_j(len(offsets.mu) + offsets.M)
    launch(
        _terms_kernel, tiles.T, warps=4, stages=stages(z.device, tiles=offsets.table is not None),
        z_ptr=z, **offsets.arguments(columns, channels),
        **tiles.arguments(), order_ptr=tiles.order, rows_per_image=tiles.rows_per_image, BLOCK_N=BLOCK_N,
        lse_ptr=lse, entropy_ptr=entropy, information_ptr=information, own_ptr=own, label_smoothing=label_smoothing,
        C=z.shape[1], RELATIVE=relative,
    )  # fmt: skip


def _empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)
