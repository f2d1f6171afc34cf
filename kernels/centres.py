"""What the mixture's kernels read of its parameters: tables that do not depend on the pixels, made in one launch.

Tensor cores multiply tf32, of 11 bits. A float32 factor is the sum of two such pieces, big + small, and three products
of pieces have the accuracy of float32. Centres are split here, once: operands that a loop forms go through registers to
shared memory, and a fence waits for each. AMD's cards and the interpreter multiply float32, and take one piece.

Training reads, for each class y, the offsets o_yj = mu_j - mu_y of the K classes, then delta_ym of the M centres of y,
delta_y0 = 0. Scoring reads all K x M centres, less their mean.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FLOAT32, accelerated, launch, tile, tiled, to_tf32

MAX_BLOCK_J = 64  # columns of offsets, or of centres, that a product takes at once
MAX_TABLE = 64 << 20  # bytes of offsets; where K (K + M) C needs more, the training kernels form them in their loops
BLOCK_C = 32  # the channels of tables are rounded up to it, so that no load of them needs a mask
SPLIT = FLOAT32 == "tf32x3"


@triton.jit
def split(x, SPLIT: tl.constexpr):
    """Return two pieces of tf32 whose sum is x to float32's accuracy; without SPLIT x itself, and it again."""
    if SPLIT:
        big = to_tf32(x)
        return big, to_tf32(x - big)
    else:
        return x, x


@triton.jit
def multiply_split(
    big, small, table, row, column, sums,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr, PIECE: tl.constexpr,
    SPLIT: tl.constexpr, TILED: tl.constexpr,
):  # fmt: skip
    """Return sums + (big + small) W^T; W are ROWS rows of a table, whose small pieces are PIECE rows further on.

    Without a small piece (None) big has to be exact.
    """
    w = tile(table, row, column, ROWS, COLUMNS, STRIDE, TILED)
    if SPLIT:
        w_small = tile(table, row + PIECE, column, ROWS, COLUMNS, STRIDE, TILED)
        if small is not None:
            sums = tl.dot(small, tl.trans(w), sums, input_precision="tf32")
        sums = tl.dot(big, tl.trans(w_small), sums, input_precision="tf32")
        return tl.dot(big, tl.trans(w), sums, input_precision="tf32")
    else:
        return tl.dot(big, tl.trans(w), sums, input_precision="ieee")


@triton.jit
def store_pieces(at, x, PIECE: tl.constexpr, SPLIT: tl.constexpr):
    """Store x as operands: its big pieces at `at`, its small ones PIECE elements behind."""
    big, small = split(x, SPLIT)
    tl.store(at, big)
    if SPLIT:
        tl.store(at + PIECE, small)


@triton.jit
def _log_weights(phi_ptr, j, N: tl.constexpr, BLOCK: tl.constexpr):
    """Return elements j of log softmax of phi (N,); -inf for other j, and for all where phi is -inf throughout."""
    i = tl.arange(0, BLOCK)
    phi = tl.load(phi_ptr + i, mask=i < N, other=float("-inf")).to(tl.float32)
    peak = tl.max(phi, axis=0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp(phi - peak), axis=0)
    log_total = tl.where(total > 0, tl.log(total), 0.0)
    phi = tl.load(phi_ptr + j, mask=(j >= 0) & (j < N), other=float("-inf")).to(tl.float32)
    return phi - peak - log_total


@triton.jit
def offset_rows(
    mu_ptr, delta_ptr, y, j, c,
    C: tl.constexpr, K: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Form channels c of the offsets j of class y (J, C); 0 beyond K + M columns and C channels."""
    stored = (j < K) | ((j > K) & (j < K + M))  # centre 0 is the main centre: its offset is 0
    at = tl.where(j < K, mu_ptr + j * C, delta_ptr + (y * (M - 1) + j - K - 1) * C)
    o = tl.load(at[:, None] + c[None, :], mask=stored[:, None] & (c < C)[None, :], other=0.0)
    mu_y = tl.load(mu_ptr + y * C + c, mask=c < C, other=0.0)
    return o - tl.where((j < K)[:, None], mu_y[None, :], 0.0)


@triton.jit
def _prepare_terms_kernel(
    mu_ptr,  # (K, C) in
    delta_ptr,  # (K, M - 1, C) in
    phi_inter_ptr,  # (K,) in
    phi_intra_ptr,  # (K, M) in
    mean_ptr,  # (K, PADDED_C) out: mu and zeros
    offsets_ptr,  # (PIECES, K, J, PADDED_C) out, or None
    turned_ptr,  # (PIECES, K, PADDED_C, J) out: the same with rows and columns exchanged; or None
    half_norm_ptr,  # (K, J) out: |o_yj|^2 / 2
    log_weight_ptr,  # (K, J) out: of the K classes, then of the M centres of y; -inf beyond
    C: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,  # 0 in stage 1
    J: tl.constexpr,  # K + M rounded up, as columns are read in blocks
    PADDED_C: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    y = tl.program_id(0)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    norm = tl.full((BLOCK_J,), 0.0, tl.float64)
    for c0 in range(0, PADDED_C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        o = offset_rows(mu_ptr, delta_ptr, y, j, c, C, K, M)
        norm += tl.sum(o.to(tl.float64) * o.to(tl.float64), axis=1)
        mu_y = tl.load(mu_ptr + y * C + c, mask=c < C, other=0.0)
        tl.store(mean_ptr + y * PADDED_C + c, mu_y, mask=(c < PADDED_C) & (tl.program_id(1) == 0))
        if offsets_ptr is not None:
            at = offsets_ptr + (y * J + j)[:, None] * PADDED_C + c[None, :]
            store_pieces(at, o, K * J * PADDED_C, SPLIT)
            at = turned_ptr + (y * PADDED_C + c)[:, None] * J + j[None, :]
            store_pieces(at, tl.trans(o), K * J * PADDED_C, SPLIT)
    log_weight = _log_weights(phi_inter_ptr, j, K, BLOCK_K)
    if M > 0:
        log_weight = tl.where(j < K, log_weight, _log_weights(phi_intra_ptr + y * M, j - K, M, BLOCK_M))
    tl.store(half_norm_ptr + y * J + j, (0.5 * norm).to(tl.float32))
    tl.store(log_weight_ptr + y * J + j, log_weight)


@triton.jit
def _centres(mu_ptr, delta_ptr, k, m, exists, c, C: tl.constexpr, M: tl.constexpr):
    """Load channels c of the centres m of classes k in float64; 0 where there is none."""
    mask = exists[:, None] & (c < C)[None, :]
    mu = tl.load(mu_ptr + k[:, None] * C + c[None, :], mask=mask, other=0.0)
    at = delta_ptr + (k * (M - 1) + m - 1)[:, None] * C + c[None, :]
    return mu.to(tl.float64) + tl.load(at, mask=mask & (m > 0)[:, None], other=0.0).to(tl.float64)


@triton.jit
def _prepare_scores_kernel(
    mu_ptr,  # (K, C) in
    delta_ptr,  # (K, M - 1, C) in
    phi_inter_ptr,  # (K,) in
    phi_intra_ptr,  # (K, M) in
    mean_ptr,  # (PADDED_C,) out: of all K x M centres
    centres_ptr,  # (PIECES, PADDED_K, SLOTS, PADDED_C) out, less the mean; 0 where there is none
    half_norm_ptr,  # (PADDED_K, SLOTS) out: |centre|^2 / 2
    log_pi_ptr,  # (PADDED_K,) out; -inf where there is no class
    log_w_ptr,  # (PADDED_K, SLOTS) out; -inf where there is no centre
    C: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    PADDED_K: tl.constexpr,
    SLOTS: tl.constexpr,
    PADDED_C: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,  # centres summed together
    BLOCK_C: tl.constexpr,
):
    k = tl.program_id(0)
    m = tl.arange(0, SLOTS)
    exists = (m < M) & (k < K)
    norm = tl.full((SLOTS,), 0.0, tl.float64)
    for c0 in range(0, PADDED_C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        total = tl.full((BLOCK_C,), 0.0, tl.float64)
        for i0 in range(0, K * M, BLOCK):  # each program sums all centres: together they would need another launch
            i = i0 + tl.arange(0, BLOCK)
            total += tl.sum(_centres(mu_ptr, delta_ptr, i // M, i % M, i < K * M, c, C, M), axis=0)
        mean = (total / (K * M)).to(tl.float32)
        centres = _centres(mu_ptr, delta_ptr, k + m * 0, m, exists, c, C, M) - mean.to(tl.float64)[None, :]
        centres = tl.where(exists[:, None], centres, 0.0).to(tl.float32)
        norm += tl.sum(centres.to(tl.float64) * centres.to(tl.float64), axis=1)
        at = centres_ptr + (k * SLOTS + m)[:, None] * PADDED_C + c[None, :]
        store_pieces(at, centres, PADDED_K * SLOTS * PADDED_C, SPLIT)
        tl.store(mean_ptr + c, mean, mask=(c < PADDED_C) & (k == 0))
    tl.store(half_norm_ptr + k * SLOTS + m, (0.5 * norm).to(tl.float32))
    log_w = _log_weights(phi_intra_ptr + tl.minimum(k, K - 1) * M, m, M, SLOTS)
    tl.store(log_w_ptr + k * SLOTS + m, tl.where(exists, log_w, float("-inf")))
    tl.store(log_pi_ptr + k, _log_weights(phi_inter_ptr, k, K, BLOCK_K))


class Offsets(NamedTuple):
    """What the training kernels read of the parameters; see `_prepare_terms_kernel`."""

    mu: Tensor  # (K, C)
    delta: Tensor  # (K, centres - 1, C)
    mean: Tensor  # (K, padded C): mu again
    table: Tensor | None  # (pieces, K, J, padded C)
    turned: Tensor | None  # (pieces, K, padded C, J)
    half_norm: Tensor  # (K, J)
    log_weight: Tensor  # (K, J)
    M: int  # 0 in stage 1

    def arguments(self, block_j: int, block_c: int) -> dict[str, Any]:
        """Return the arguments that both training kernels take from here, tables by tiles of these sizes."""
        (K, padded_c), J = self.mean.shape, self.half_norm.shape[1]
        offsets = None if self.table is None else tiled(self.table, block_j, block_c)
        return {
            "mu_ptr": self.mu, "delta_ptr": self.delta, "mean_ptr": self.mean, "offsets": offsets,
            "half_norm_ptr": self.half_norm, "log_weight_ptr": self.log_weight,
            "K": K, "M": self.M, "J": J, "PADDED_C": padded_c, "PRECISION": FLOAT32,
            "BLOCK_J": block_j, "BLOCK_C": block_c, "TILED": accelerated(self.mean.device),
        }  # fmt: skip

    @classmethod
    def prepare(cls, mu: Tensor, delta: Tensor, phi_inter: Tensor, phi_intra: Tensor, stage: int) -> Offsets:
        """Make the tables: two for products from either side, as long as they are small."""
        mu, delta, phi_inter, phi_intra = (t.float().contiguous() for t in (mu, delta, phi_inter, phi_intra))
        (K, C), M = mu.shape, phi_intra.shape[1] if stage == 2 else 0
        J = triton.cdiv(K + M, block_j(K + M)) * block_j(K + M)
        pieces, padded_c = 1 + SPLIT, _padded(C)
        table = turned = None
        if 2 * 4 * pieces * K * J * padded_c <= MAX_TABLE:
            table, turned = _empty(mu, pieces, K, J, padded_c), _empty(mu, pieces, K, padded_c, J)
        columns = 16 if J < MAX_BLOCK_J else MAX_BLOCK_J  # few classes: more programs
        mean, half_norm, log_weight = _empty(mu, K, padded_c), _empty(mu, K, J), _empty(mu, K, J)
        launch(
            _prepare_terms_kernel, (K, triton.cdiv(J, columns)),
            mu_ptr=mu, delta_ptr=delta, phi_inter_ptr=phi_inter, phi_intra_ptr=phi_intra,
            mean_ptr=mean, offsets_ptr=table, turned_ptr=turned, half_norm_ptr=half_norm, log_weight_ptr=log_weight,
            C=C, K=K, M=M, J=J, PADDED_C=padded_c, SPLIT=SPLIT,
            BLOCK_K=triton.next_power_of_2(K), BLOCK_M=triton.next_power_of_2(max(M, 1)), BLOCK_J=columns,
            BLOCK_C=BLOCK_C,
        )  # fmt: skip
        return cls(mu, delta, mean, table, turned, half_norm, log_weight, M)


class Centres(NamedTuple):
    """What scoring reads of the parameters; see `_prepare_scores_kernel`."""

    mean: Tensor  # (padded C,)
    table: Tensor  # (pieces, padded K, slots, padded C)
    half_norm: Tensor  # (padded K, slots)
    log_pi: Tensor  # (padded K,)
    log_w: Tensor  # (padded K, slots)

    @classmethod
    def prepare(cls, mu: Tensor, delta: Tensor, phi_inter: Tensor, phi_intra: Tensor) -> Centres:
        """Make the tables."""
        mu, delta, phi_inter, phi_intra = (t.float().contiguous() for t in (mu, delta, phi_inter, phi_intra))
        (K, C), M = mu.shape, phi_intra.shape[1]
        slots = triton.next_power_of_2(M)
        block_k = max(MAX_BLOCK_J // slots, 1)
        padded_k, padded_c = triton.cdiv(K, block_k) * block_k, _padded(C)
        self = cls(
            _empty(mu, padded_c), _empty(mu, 1 + SPLIT, padded_k, slots, padded_c), _empty(mu, padded_k, slots),
            _empty(mu, padded_k), _empty(mu, padded_k, slots),
        )  # fmt: skip
        launch(
            _prepare_scores_kernel, padded_k,
            mu_ptr=mu, delta_ptr=delta, phi_inter_ptr=phi_inter, phi_intra_ptr=phi_intra, mean_ptr=self.mean,
            centres_ptr=self.table, half_norm_ptr=self.half_norm, log_pi_ptr=self.log_pi, log_w_ptr=self.log_w,
            C=C, K=K, M=M, PADDED_K=padded_k, SLOTS=slots, PADDED_C=padded_c, SPLIT=SPLIT,
            BLOCK_K=triton.next_power_of_2(K), BLOCK=128, BLOCK_C=BLOCK_C,
        )  # fmt: skip
        return self


def block_j(columns: int) -> int:
    """Return how many columns of offsets a product takes."""
    return min(max(triton.next_power_of_2(columns), 16), MAX_BLOCK_J)


def _padded(C: int) -> int:
    return triton.cdiv(C, BLOCK_C) * BLOCK_C


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)
