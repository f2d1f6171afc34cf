"""The parameters of coupling blocks, and the positions that they are conditioned on.

Symbols: C channels, of which C1 = C - C // 2 pass through a coupling block and C2 = C // 2 are transformed; P
positional channels; Hd = 2 (C1 + P) hidden units; L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Block(NamedTuple):
    """Parameters of one coupling block."""

    w1: Tensor  # (Hd, C1 + P)
    b1: Tensor  # (Hd,)
    w2: Tensor  # (2 C2, Hd)
    b2: Tensor  # (2 C2,)
    global_scale: Tensor  # (1, C), before its softplus
    global_offset: Tensor  # (1, C)
    w_perm: Tensor  # (C, C), orthogonal, not trained


class Blocks(NamedTuple):
    """Parameters of the L coupling blocks of a flow, stacked: those of a `Block` with L in front."""

    w1: Tensor  # (L, Hd, C1 + P)
    b1: Tensor  # (L, Hd)
    w2: Tensor  # (L, 2 C2, Hd)
    b2: Tensor  # (L, 2 C2)
    global_scale: Tensor  # (L, 1, C), before its softplus
    global_offset: Tensor  # (L, 1, C)
    w_perm: Tensor  # (L, C, C), orthogonal, not trained

    @classmethod
    def stack(cls, blocks: Blocks | Sequence[Block]) -> Blocks:
        """Return blocks in the stacked form, differentiable in each of them."""
        if isinstance(blocks, Blocks):
            return blocks
        if not blocks:
            raise ValueError("blocks is empty; a flow has at least one coupling block")
        stacked = cls._make(map(torch.stack, zip(*blocks, strict=True)))
        # Column after column, as QR gives a rotation: a product with the other layout rounds otherwise.
        return stacked._replace(w_perm=stacked.w_perm.mT.contiguous().mT)

    def each(self) -> list[Block]:
        """Return the blocks in order, as views."""
        return [Block._make(parts) for parts in zip(*(stacked.unbind() for stacked in self), strict=True)]


class SeparablePosition(NamedTuple):
    """The sinusoidal code of a feature map of h x w pixels: channels 0..P/2 depend on the column, P/2..P on the row.

    A product with it splits in two tiny ones, W pos(row, column) = W_c column + W_r row: exact, and almost free.
    """

    column: Tensor  # (w, P / 2)
    row: Tensor  # (h, P / 2)


Position = SeparablePosition | Tensor | None


def gain_of(global_scale: Tensor) -> Tensor:
    """Return the scale g of a block, (1, C), or those of all blocks."""
    return 0.1 * F.softplus(global_scale, beta=0.5)
