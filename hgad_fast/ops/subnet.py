"""The subnets of coupling blocks in plain torch: their products in each precision, and what these are made of.

Symbols as in `blocks`: N pixels, C1 channels, P positional channels, Hd hidden units, 2 C2 outputs, L blocks.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from ..environment import bfloat16_instructions
from .dispatch import float32_products, kernels
from .parameters import Block, Blocks, gain_of


def operand(x: Tensor, precision: str) -> Tensor:
    """Return x rounded to nearest in a product's operand precision; tensor cores would truncate, which is biased."""
    if precision == "fp32" or x.dtype == torch.float64:
        return x
    if precision == "tf32":
        rounded = ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
        return torch.where(x.isnan(), x, rounded)  # a GPU's NaN is 0x7FFFFFFF, which would become 0
    rounded = x.to(torch.bfloat16)
    return rounded if x.is_cuda or bfloat16_instructions() else rounded.to(x.dtype)


def result(y: Tensor, precision: str) -> Tensor:
    """Return the result of a subnet's product as it is kept: in bf16 a CPU gives bfloat16, a GPU float32."""
    return operand(y, precision) if precision == "bf16" and not y.is_cuda else y


def product(x: Tensor, w: Tensor, precision: str, add: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Return x @ w with operands of the given precision and float32 accumulation, added to `add` or put into `out`.

    Added to a bfloat16 tensor, the sum is rounded once.
    """
    if precision == "bf16x3" and x.dtype == torch.float32:
        (x, small_x), (w, small_w) = _pieces(x), _pieces(w)
        y = small_x @ w + x @ small_w
        y += x @ w
    else:
        x, w = operand(x, precision), operand(w, precision)
        if precision != "bf16" or (add is not None and add.dtype == torch.bfloat16):
            with float32_products(x.device, "tf32") if precision == "tf32" else nullcontext():  # else they are exact
                return torch.mm(x, w, out=out) if add is None else add.addmm_(x, w)
        y = torch.mm(x, w, out_dtype=torch.float32) if x.is_cuda else result(torch.mm(x, w), precision)
    if add is not None:
        return add.add_(y)
    return y if out is None else out.copy_(y)


def _pieces(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split x into two bfloat16 numbers, a large and a small one, returned as float32."""
    large = x.bfloat16().to(x.dtype)
    return large, (x - large).bfloat16().to(x.dtype)


def definition(x1: Tensor, block: Block, conditions: list[Tensor], precision: str) -> Tensor:
    """Return a = W2 relu(W1 [x1, position] + b1) + b2 (N, 2 C2), operands rounded, results not."""

    def product(x: Tensor, w: Tensor) -> Tensor:
        return operand(x, precision).to(x.dtype) @ operand(w, precision).to(w.dtype).T

    c1 = x1.shape[1]
    if len(conditions) == 2:
        column, row = position_tables(block.w1[:, c1:], conditions)
        table = (row[:, None] + (column + block.b1)).flatten(0, 1)
        hidden = table.repeat(len(x1) // max(len(table), 1), 1)
    else:
        hidden = block.b1.expand(len(x1), -1)
        for dense in conditions:
            hidden = hidden + product(dense, block.w1[:, c1:])
    return product((hidden + product(x1, block.w1[:, :c1])).relu(), block.w2) + block.b2


def position_tables(w1p: Tensor, conditions: list[Tensor]) -> list[Tensor]:
    """Return the products of the first layer with the codes of columns and rows; of all blocks with L in front."""
    column, row = conditions
    half = column.shape[1]
    return [column @ w1p[..., :half].mT, row @ w1p[..., half:].mT]


class Weights(NamedTuple):
    """What the features of a block are multiplied with, from the right, and what is added to them."""

    w1x: Tensor  # (C1, Hd), operand
    w1p: Tensor  # (P, Hd)
    b1: Tensor  # (Hd,), as results are kept
    w2: Tensor  # (Hd, 2 C2), operand
    b2: Tensor  # (2 C2,), as results are kept
    gain: Tensor  # (1, C)
    rotation: Tensor  # (C, C), the transpose of R diag(g)
    offset: Tensor  # (1, C), R offset


def weights_of(parameters: list[Tensor], precision: str, factors: tuple[float, float] | None = None) -> list[Weights]:
    """Return the weights of each block; they are made together, and kept while no parameter changes.

    The halves of a subnet's output are multiplied by `factors`, if there are any.
    """

    def make() -> list[Weights]:
        blocks = Blocks._make(parameters)
        channels = blocks.w_perm.shape[-1]
        c1 = channels - channels // 2
        if factors is not None:
            factor = torch.tensor(factors, dtype=blocks.b2.dtype, device=blocks.b2.device)
            factor = factor.repeat_interleave(channels // 2)
            blocks = blocks._replace(w2=blocks.w2 * factor[:, None], b2=blocks.b2 * factor)
        gain = gain_of(blocks.global_scale)
        weights = Weights(
            w1x=operand(blocks.w1[..., :c1], precision).mT,
            w1p=blocks.w1[..., c1:].mT,
            b1=result(blocks.b1, precision),
            w2=operand(blocks.w2, precision).mT,
            b2=result(blocks.b2, precision),
            gain=gain,
            rotation=(blocks.w_perm * gain).mT,
            offset=blocks.global_offset @ blocks.w_perm.mT,
        )
        return [Weights._make(parts) for parts in zip(*map(torch.unbind, weights), strict=True)]

    return kernels("cache").PACKED.get(make, ("weights", precision, bfloat16_instructions(), factors), parameters)


def tables_of(conditions: list[Tensor], parameters: list[Tensor], precision: str) -> list[tuple[Tensor, ...]]:
    """Return what a separable position adds to the hidden layer of each block, kept likewise: (w, Hd), (h, Hd).

    With a dense position, or none, there is nothing for any block.
    """
    blocks = Blocks._make(parameters)
    if len(conditions) != 2:
        return [()] * len(blocks.w1)

    def make() -> list[tuple[Tensor, ...]]:
        column, row = position_tables(blocks.w1[..., -2 * conditions[0].shape[1] :], conditions)
        tables = result(column + blocks.b1[:, None], precision), result(row, precision)
        return list(zip(*map(torch.unbind, tables), strict=True))

    return kernels("cache").PACKED.get(
        make, ("tables", precision, bfloat16_instructions()), [*conditions, blocks.w1, blocks.b1]
    )


def layers(
    x1: Tensor,
    weights: Weights,
    tables: tuple[Tensor, ...],
    conditions: list[Tensor],
    precision: str,
    memory: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return h = relu(W1 [x1, position] + b1) (N, Hd) and a = W2 h + b2 (N, 2 C2), in `memory` if there is some."""
    h, a = memory or memory_for(len(x1), weights)
    if tables:
        column, row = tables
        maps = h.view(len(h) // max(len(row) * len(column), 1), len(row), len(column), h.shape[1])
        if len(maps):
            torch.add(row[:, None], column, out=maps[0])
        if len(maps) > 1:
            maps[1:] = maps[0]
    else:
        h.copy_(weights.b1)
        for dense in conditions:
            product(dense, weights.w1p, precision, add=h)
    h = operand(relu_(product(x1, weights.w1x, precision, add=h)), precision)
    return h, result(product(h, weights.w2, precision, add=a.copy_(weights.b2)), precision)


def memory_for(n: int, weights: Weights) -> tuple[Tensor, Tensor]:
    """Return memory for the results of a subnet's products for n pixels."""
    return weights.b1.new_empty(n, len(weights.b1)), weights.b2.new_empty(n, len(weights.b2))


def relu_(h: Tensor) -> Tensor:
    """Set what is negative in h to 0, in place; a NaN stays one."""
    if h.dtype != torch.bfloat16 or h.is_cuda:
        return h.relu_()
    # The bits of bfloat16 as integers, which a CPU works on several times as fast: those up to -infinity are -128 and
    # less, those of NaNs with a sign lie above.
    torch.threshold_(h.view(torch.int16), -128, 0)
    return h


def masked_(gh: Tensor, h: Tensor) -> Tensor:
    """Set the gradient to 0 where h = relu(...) is, in place."""
    bits, mask = (t.view(torch.int16) if t.dtype == torch.bfloat16 and not t.is_cuda else t for t in (gh, h))
    torch.ops.aten.threshold_backward.grad_input(bits, mask, 0, grad_input=bits)
    return gh


def first_layer_gradients(
    gh: Tensor, x1: Tensor, conditions: list[Tensor], precision: str, gw1: Tensor, gb1: Tensor
) -> None:
    """Write the gradients of W1 and b1; with a separable position, gh is summed per column and row of the map first."""
    parts = [product(gh.T, x1, precision)]
    if len(conditions) == 2:
        column, row = conditions
        gtable = (
            gh.view(-1, len(row) * len(column), gh.shape[1]).sum(0, dtype=gb1.dtype).view(len(row), len(column), -1)
        )
        gcolumn, grow = gtable.sum(0), gtable.sum(1)
        parts += [gcolumn.T @ column, grow.T @ row]
        torch.sum(gcolumn, 0, out=gb1)
    else:
        parts += [product(gh.T, dense, precision) for dense in conditions]
        torch.sum(gh, 0, dtype=gb1.dtype, out=gb1)
    torch.cat(parts, 1, out=gw1)
