"""The subnet of a coupling block in training: forward, and backward with the coupling, in three kernels.

With x1 (N, C1) and the position's contribution to a pixel, table[column] + table[row],

    h = relu(x1 W1x^T + table[column] + table[row]),   a = h W2^T + b2,   y2 = affine_coupling(x2, a).

Forward, a program owns a patch of one image and takes the hidden units chunk by chunk: a chunk is multiplied by W2 at
once, and neither h nor a leaves the chip. Backward, a first kernel rebuilds h and a in the same way, writes h and the
gradient ga of a, and replaces y2 by x2 and the gradient of y2 by that of x2. A second one takes the hidden units chunk
by chunk again, gh = (ga W2) [h > 0], overwrites h by gh, and adds gh W1x to the gradient of x1. The gradients of the
weights, ga^T h and gh^T [x1 | position], are sums over all pixels, which torch's matrix products do best.

Operands are bfloat16 or tf32, rounded to nearest; sums are float32. A product's extents are sums of powers of two: 100
channels are 64 + 32 + 16. The channels are a multiple of 8, with zeros behind x1 and x2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import load, multiply, operand, tanh, tile, to_bfloat16, zeros

POSITIONS = tl.constexpr(16)  # columns, and rows, that a patch has at most; a product takes 16 terms or more


@triton.jit
def one_hot(n, BLOCK_N: tl.constexpr):
    """Return a matrix (BLOCK_N, POSITIONS) with a one in column n of each row."""
    return to_bfloat16((n[:, None] == tl.arange(0, POSITIONS)[None, :]).to(tl.float32))


@triton.jit
def add_positions(
    h, one_hot_n, table, first, last, column,
    HIDDEN: tl.constexpr, PIECES: tl.constexpr, BLOCK_HIDDEN: tl.constexpr, TILED: tl.constexpr,
):  # fmt: skip
    """Add to h the rows of a table (rows, PIECES HIDDEN) from `first` on, picked by a one-hot matrix.

    Loading a row for every pixel would double the traffic with the cache. Rows beyond the patch are multiplied by 0.
    """
    for piece in tl.static_range(PIECES):
        at = piece * HIDDEN + column
        if TILED:
            rows = table.load([first, at])
        else:
            r = tl.minimum(first + tl.arange(0, POSITIONS), last)
            rows = load(table + r[:, None] * (PIECES * HIDDEN) + (at + tl.arange(0, BLOCK_HIDDEN))[None, :])
        h = tl.dot(one_hot_n, rows, h, input_precision="ieee")
    return h


@triton.jit
def subnet_output(
    x1, n_h, n_w, h0, w0, H, W, k, w1, w2, table, h_ptr, row, row_mask,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, HALF_EDGES: tl.constexpr, H_STRIDE: tl.constexpr,
    ROWS: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_HIDDEN: tl.constexpr, TILED: tl.constexpr,
):  # fmt: skip
    """Return a without its bias: scales, then shifts, in pieces (BLOCK_N, edge to edge). With `h_ptr` h is stored."""
    HALF: tl.constexpr = HALF_EDGES[len(HALF_EDGES) - 1]
    columns = one_hot(n_w, BLOCK_N)
    rows = one_hot(n_h, BLOCK_N)
    entry = k * (W + H if ROWS else W)
    scales = zeros(BLOCK_N, HALF_EDGES)
    shifts = zeros(BLOCK_N, HALF_EDGES)
    for j0 in range(0, HIDDEN, BLOCK_HIDDEN):
        w = tile(w1, k * HIDDEN + j0, 0, BLOCK_HIDDEN, WIDTH, WIDTH, TILED)
        h = tl.dot(x1, tl.trans(w), input_precision=DOT)
        h = add_positions(h, columns, table, entry + w0, entry + W - 1, j0, HIDDEN, PIECES, BLOCK_HIDDEN, TILED)
        if ROWS:
            last = entry + W + H - 1
            h = add_positions(h, rows, table, entry + W + h0, last, j0, HIDDEN, PIECES, BLOCK_HIDDEN, TILED)
        h = operand(tl.maximum(h, 0.0, propagate_nan=tl.PropagateNan.ALL), PRECISION)
        if h_ptr is not None:
            j = j0 + tl.arange(0, BLOCK_HIDDEN)
            tl.store(h_ptr + row[:, None] * H_STRIDE + j[None, :], h, mask=row_mask[:, None] & (j < H_STRIDE)[None, :])
        scales = multiply(h, w2, 2 * k * HALF, j0, scales, HIDDEN, HALF_EDGES, BLOCK_HIDDEN, DOT, TILED)
        shifts = multiply(h, w2, (2 * k + 1) * HALF, j0, shifts, HIDDEN, HALF_EDGES, BLOCK_HIDDEN, DOT, TILED)
    return scales, shifts


@triton.jit
def patch_of_program(H, W, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr):
    """Return this program's patch: its first pixel in all images, row and column of it, and those of its pixels."""
    across = (W + PATCH_W - 1) // PATCH_W
    down = (H + PATCH_H - 1) // PATCH_H
    patch = tl.program_id(0)
    w0 = patch % across * PATCH_W
    h0 = patch // across % down * PATCH_H
    image = patch // (across * down)
    first = (image.to(tl.int64) * H + h0) * W + w0  # 64 bits for the program, 32 inside its patch
    n = tl.arange(0, PATCH_H * PATCH_W)
    return first, h0, w0, n // PATCH_W, n % PATCH_W


@triton.jit(do_not_specialize=["H", "W", "k"])
def _coupling_kernel(
    x1_ptr,  # (N, C1) in
    x2_ptr,  # (N, C2) in
    w1,  # (L HIDDEN, WIDTH) in: W1's columns for x1, of all blocks, by tiles
    w2_a,  # (2 L HALF, HIDDEN) in: scales, then shifts of each block, by tiles of the first piece of HALF
    w2_b,  # by tiles of the second piece, or None
    w2_c,
    w2_d,
    table,  # (L (W + H), PIECES HIDDEN) in: what columns, then rows add, b1 in the former, by tiles
    b2_ptr,  # (L, 2, HALF) in
    k,  # the block
    y2_ptr,  # (N, C2) out; may be x2
    log_det_ptr,  # (N,) in and out: added to
    H,
    W,
    clamp,
    C2: tl.constexpr,  # a multiple of 4, as is C1, its equal
    X1_STRIDE: tl.constexpr,
    X2_STRIDE: tl.constexpr,
    Y2_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,  # C1 and zeros
    HIDDEN: tl.constexpr,  # the units, and zeros
    HALF_EDGES: tl.constexpr,  # where the pieces of C2 begin and end
    ROWS: tl.constexpr,  # whether the table has rows beside columns
    PIECES: tl.constexpr,  # bfloat16 pieces of the table
    PRECISION: tl.constexpr,
    DOT: tl.constexpr,  # input_precision of the products
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    TILED: tl.constexpr,
):
    HALF: tl.constexpr = HALF_EDGES[len(HALF_EDGES) - 1]
    first, h0, w0, n_h, n_w = patch_of_program(H, W, PATCH_H, PATCH_W)
    x1_ptr += first * X1_STRIDE
    x2_ptr += first * X2_STRIDE
    y2_ptr += first * Y2_STRIDE
    log_det_ptr += first
    row = n_h * W + n_w
    row_mask = (h0 + n_h < H) & (w0 + n_w < W)
    c = tl.arange(0, WIDTH)
    x1 = tl.load(x1_ptr + row[:, None] * X1_STRIDE + c[None, :], mask=row_mask[:, None] & (c < C2)[None, :], other=0.0)
    scales, shifts = subnet_output(
        operand(x1, PRECISION), n_h, n_w, h0, w0, H, W, k, w1, (w2_a, w2_b, w2_c, w2_d), table, None, row, row_mask,
        WIDTH, HIDDEN, HALF_EDGES, 0, ROWS, PIECES, PRECISION, DOT, PATCH_H * PATCH_W, BLOCK_HIDDEN, TILED,
    )  # fmt: skip
    b2_ptr += k * (2 * HALF)
    log_det = tl.load(log_det_ptr + row, mask=row_mask, other=0.0)
    for i in tl.static_range(len(HALF_EDGES) - 1):
        c2 = tl.arange(HALF_EDGES[i], HALF_EDGES[i + 1])
        s = clamp * tanh(0.1 * (scales[i] + tl.load(b2_ptr + c2)[None, :]))  # 0 in the padding
        t = 0.1 * (shifts[i] + tl.load(b2_ptr + HALF + c2)[None, :])
        log_det += tl.sum(s, axis=1)
        mask = row_mask[:, None] & (c2 < C2)[None, :]
        x2 = tl.load(x2_ptr + row[:, None] * X2_STRIDE + c2[None, :], mask=mask, other=0.0)
        tl.store(y2_ptr + row[:, None] * Y2_STRIDE + c2[None, :], x2 * tl.exp(s) + t, mask=mask)
    tl.store(log_det_ptr + row, log_det, mask=row_mask)


@triton.jit(do_not_specialize=["H", "W", "k"])
def _coupling_backward_kernel(
    x1_ptr,  # (N, C1) in
    y2_ptr,  # (N, C2) in; out, with REBUILD: x2
    gy2_ptr,  # (N, C2) in: gradient of y2; out: of x2
    glog_det_ptr,  # (N,) in
    w1,  # these seven as in `_coupling_kernel`
    w2_a,
    w2_b,
    w2_c,
    w2_d,
    table,
    b2_ptr,
    k,
    h_ptr,  # (N, units) out, as an operand
    x1_operand_ptr,  # (N, C1) out: x1 as an operand
    ga_ptr,  # (N, 2 C2) out, as an operand
    gb_ptr,  # (programs, 2, HALF) out: sums of ga over each program's pixels
    H,
    W,
    clamp,
    C2: tl.constexpr,
    X1_STRIDE: tl.constexpr,
    Y2_STRIDE: tl.constexpr,
    GY2_STRIDE: tl.constexpr,
    H_STRIDE: tl.constexpr,
    X1_OPERAND_STRIDE: tl.constexpr,
    GA_STRIDE: tl.constexpr,
    REBUILD: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    HALF_EDGES: tl.constexpr,
    ROWS: tl.constexpr,  # whether the table has rows beside columns
    PIECES: tl.constexpr,  # bfloat16 pieces of the table
    PRECISION: tl.constexpr,
    DOT: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    TILED: tl.constexpr,
):
    HALF: tl.constexpr = HALF_EDGES[len(HALF_EDGES) - 1]
    first, h0, w0, n_h, n_w = patch_of_program(H, W, PATCH_H, PATCH_W)
    x1_ptr += first * X1_STRIDE
    y2_ptr += first * Y2_STRIDE
    gy2_ptr += first * GY2_STRIDE
    glog_det_ptr += first
    h_ptr += first * H_STRIDE
    x1_operand_ptr += first * X1_OPERAND_STRIDE
    ga_ptr += first * GA_STRIDE
    gb_ptr += tl.program_id(0).to(tl.int64) * (2 * HALF)
    row = n_h * W + n_w
    row_mask = (h0 + n_h < H) & (w0 + n_w < W)
    c = tl.arange(0, WIDTH)
    x1_mask = row_mask[:, None] & (c < C2)[None, :]
    x1 = operand(tl.load(x1_ptr + row[:, None] * X1_STRIDE + c[None, :], mask=x1_mask, other=0.0), PRECISION)
    tl.store(x1_operand_ptr + row[:, None] * X1_OPERAND_STRIDE + c[None, :], x1, mask=x1_mask)
    scales, shifts = subnet_output(
        x1, n_h, n_w, h0, w0, H, W, k, w1, (w2_a, w2_b, w2_c, w2_d), table, h_ptr, row, row_mask,
        WIDTH, HIDDEN, HALF_EDGES, H_STRIDE, ROWS, PIECES, PRECISION, DOT, PATCH_H * PATCH_W, BLOCK_HIDDEN, TILED,
    )  # fmt: skip
    b2_ptr += k * (2 * HALF)
    glog_det = tl.load(glog_det_ptr + row, mask=row_mask, other=0.0)
    for i in tl.static_range(len(HALF_EDGES) - 1):
        tl.debug_barrier()  # one piece after the other: together they would not fit into the registers
        c2 = tl.arange(HALF_EDGES[i], HALF_EDGES[i + 1])
        tanh_s = tanh(0.1 * (scales[i] + tl.load(b2_ptr + c2)[None, :]))
        t = 0.1 * (shifts[i] + tl.load(b2_ptr + HALF + c2)[None, :])
        exp_s = tl.exp(clamp * tanh_s)
        mask = row_mask[:, None] & (c2 < C2)[None, :]
        y2_at = y2_ptr + row[:, None] * Y2_STRIDE + c2[None, :]
        gy2_at = gy2_ptr + row[:, None] * GY2_STRIDE + c2[None, :]
        gy2 = tl.load(gy2_at, mask=mask, other=0.0)
        scaled = tl.load(y2_at, mask=mask, other=0.0) - t  # x2 e^s without a division
        gs = tl.where(mask, gy2 * scaled + glog_det[:, None], 0.0)
        ga_s = (0.1 * clamp) * (1.0 - tanh_s * tanh_s) * gs
        ga_t = 0.1 * gy2
        tl.store(gy2_at, gy2 * exp_s, mask=mask)
        if REBUILD:
            tl.store(y2_at, scaled / exp_s, mask=mask)
        ga_at = ga_ptr + row[:, None] * GA_STRIDE + c2[None, :]
        tl.store(ga_at, operand(ga_s, PRECISION), mask=mask)
        tl.store(ga_at + C2, operand(ga_t, PRECISION), mask=mask)
        tl.store(gb_ptr + c2, tl.sum(ga_s, axis=0))
        tl.store(gb_ptr + HALF + c2, tl.sum(ga_t, axis=0))


@triton.jit(do_not_specialize=["N", "k"])
def _hidden_backward_kernel(
    ga_ptr,  # (N, 2 C2) in
    h_ptr,  # (N, units) in: h; out: its gradient before the ReLU, gh
    w2_a,  # (L HIDDEN, 2 HALF) in: transposed, by tiles of the first piece of HALF
    w2_b,  # by tiles of the second piece, or None
    w2_c,
    w2_d,
    w1_a,  # (L HALF, HIDDEN) in: W1's columns for x1, transposed, by tiles of the first piece of HALF
    w1_b,
    w1_c,
    w1_d,
    gx1_ptr,  # (N, C1) in and out: gh W1x is added
    k,  # the block
    N,
    C2: tl.constexpr,
    GA_STRIDE: tl.constexpr,
    H_STRIDE: tl.constexpr,
    GX1_STRIDE: tl.constexpr,
    HIDDEN: tl.constexpr,
    HALF_EDGES: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    TILED: tl.constexpr,
):
    HALF: tl.constexpr = HALF_EDGES[len(HALF_EDGES) - 1]
    row0 = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = tl.arange(0, BLOCK_N)
    row_mask = row0 + n < N
    h_ptr += row0 * H_STRIDE
    gx1_ptr += row0 * GX1_STRIDE
    ga_at = ga_ptr + row0 * GA_STRIDE + n[:, None] * GA_STRIDE
    ga_s = ()
    ga_t = ()
    for i in tl.static_range(len(HALF_EDGES) - 1):
        c2 = tl.arange(HALF_EDGES[i], HALF_EDGES[i + 1])
        mask = row_mask[:, None] & (c2 < C2)[None, :]
        ga_s += (load(ga_at + c2[None, :], mask),)  # type: ignore[assignment]
        ga_t += (load(ga_at + C2 + c2[None, :], mask),)  # type: ignore[assignment]
    w2 = (w2_a, w2_b, w2_c, w2_d)
    gx1 = zeros(BLOCK_N, HALF_EDGES)
    for j0 in range(0, HIDDEN, BLOCK_HIDDEN):
        j = k * HIDDEN + j0
        gh = tl.full((BLOCK_N, BLOCK_HIDDEN), 0.0, tl.float32)
        for i in tl.static_range(len(HALF_EDGES) - 1):
            c = HALF_EDGES[i]
            scales = tile(w2[i], j, c, BLOCK_HIDDEN, HALF_EDGES[i + 1] - HALF_EDGES[i], 2 * HALF, TILED)
            shifts = tile(w2[i], j, HALF + c, BLOCK_HIDDEN, HALF_EDGES[i + 1] - HALF_EDGES[i], 2 * HALF, TILED)
            gh = tl.dot(ga_s[i], tl.trans(scales), gh, input_precision=DOT)
            gh = tl.dot(ga_t[i], tl.trans(shifts), gh, input_precision=DOT)
        units = j0 + tl.arange(0, BLOCK_HIDDEN)
        h_at = h_ptr + n[:, None] * H_STRIDE + units[None, :]
        h_mask = row_mask[:, None] & (units < H_STRIDE)[None, :]
        gh = operand(tl.where(load(h_at, h_mask) > 0, gh, 0.0), PRECISION)
        tl.store(h_at, gh, mask=h_mask)
        gx1 = multiply(gh, (w1_a, w1_b, w1_c, w1_d), k * HALF, j0, gx1, HIDDEN, HALF_EDGES, BLOCK_HIDDEN, DOT, TILED)
    for i in tl.static_range(len(HALF_EDGES) - 1):
        c = tl.arange(HALF_EDGES[i], HALF_EDGES[i + 1])
        mask = row_mask[:, None] & (c < C2)[None, :]
        at = gx1_ptr + n[:, None] * GX1_STRIDE + c[None, :]
        tl.store(at, tl.load(at, mask=mask, other=0.0) + gx1[i], mask=mask)
