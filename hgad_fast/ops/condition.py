"""The convolution of a condition that takes finitely many values, by table look-ups (VQ-Flow, arXiv 2409.00942).

The condition of a level is [base + q ; p]: q is the nearest code of each pixel, p the image's prototype, and base is
[PE ; p], p or nothing, PE a fixed position code. A convolution is linear, so the part of it that reads the condition is
a sum of rows of small tables: for each of the k k taps the weight times the code there, the weight times PE at each
pixel, and the weight times the prototype for each way in which the window reaches over the border.

Symbols: B images of H x W pixels; K codes and K_p prototypes; D_s channels of a code, D_p of a prototype, D_e of the
position code; m output channels; k x k taps of a kernel, k odd; padding k // 2 with zeros.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import in_float32, no_double_backward


class Condition(NamedTuple):
    """The condition of a level, in the form that is cheap to convolve; `dense_condition` is what it stands for."""

    indices: Tensor  # (B, H, W), int64, the nearest code of each pixel
    codes: Tensor  # (K, D_s), gets no gradient
    prototype: Tensor  # (B, D_p), gets the gradient of its copy behind the pattern only
    position: Tensor | None  # (D_e, H, W), gets no gradient; read where `residual`
    residual: bool  # the codes quantise what is left of the pattern without its base
    pattern: Tensor | None = None  # (B, D_s, H, W), gets the pattern's gradient; its values are not read


class ConditionTables(NamedTuple):
    """What `convolve_tables` adds up: made by `condition_tables` of one weight, for all codes and prototypes."""

    # (R, m): k k rows a code, and as many of zeros for the outside; a row a prototype for each of (k // 2 + 1)^4 ways
    # in which a window may reach over the border; a row a pixel of the position code, if there is one.
    rows: Tensor
    codes: int  # K
    prototypes: int  # K_p
    kernel: int  # k
    size: tuple[int, int]  # (H, W)


def dense_condition(condition: Condition) -> Tensor:
    """Return the condition [base + q ; p] of every pixel, with straight-through gradients.

    The gradient of the first D_s channels goes to `condition.pattern` unchanged, and to nothing else; the prototype
    gets that of the last D_p channels, summed over pixels.

    Returns:
        (B, D_s + D_p, H, W), in the dtype of the codes.

    Raises:
        ValueError: the shapes do not fit each other, or an index is out of range (seen on the CPU only).
    """
    indices, codes, prototype, position, residual, pattern = condition
    _check_condition(condition)
    value = codes.detach()[indices].permute(0, 3, 1, 2)
    spread = prototype[:, :, None, None].expand(-1, -1, *indices.shape[1:])
    if residual:
        base = spread.detach()
        if position is not None:
            base = torch.cat([position.detach().expand(len(indices), -1, -1, -1), base], 1)
        value = value + base
    if pattern is not None:
        value = _StraightThrough.apply(value, pattern, None)
    return torch.cat([value, spread], 1)


def condition_convolution(condition: Condition, weight: Tensor) -> Tensor:
    """Return `F.conv2d(dense_condition(condition), weight, padding=k // 2)`, computed by table look-ups.

    Tables are made for the codes that occur (on CUDA for all, which needs no word from the device). The gradient of the
    weight is summed by code before it is multiplied with the codes; that of the pattern is a transposed convolution.

    Args:
        condition: of B images.
        weight: (m, D_s + D_p, k, k), k odd.

    Returns:
        (B, m, H, W), channels last in memory; differentiable once, in the weight, the prototype and the pattern.

    Raises:
        ValueError: the shapes do not fit each other, or an index is out of range (seen on the CPU only).
    """
    indices, codes, prototype, position, residual, pattern = condition
    _check_condition(condition)
    if not (indices.is_cuda or torch.compiler.is_compiling()):
        used, indices = torch.unique(indices, return_inverse=True)
        codes = codes[used]
    size = (indices.shape[1], indices.shape[2])
    tables = condition_tables(weight, codes, prototype, position, residual, size)
    result = _look_up(tables, indices, torch.arange(len(indices), device=indices.device))
    if pattern is not None:
        result = _StraightThrough.apply(result, pattern, weight)
    return result


def _condition_convolution_definition(condition: Condition, weight: Tensor) -> Tensor:
    """Return what `condition_convolution` is: the dense condition, convolved."""
    return F.conv2d(dense_condition(condition), weight, padding=weight.shape[-1] // 2)


condition_convolution.reference = _condition_convolution_definition  # type: ignore[attr-defined]


def condition_tables(
    weight: Tensor,
    codes: Tensor,
    prototypes: Tensor,
    position: Tensor | None,
    residual: bool,
    size: tuple[int, int],
    bias: Tensor | None = None,
) -> ConditionTables:
    """Return the tables of a kernel's products with all codes, prototypes and positions, for `convolve_tables`.

    Args:
        weight: (m, D_s + D_p, k, k), k odd; the rows are differentiable in it, and in the prototypes' trailing copy.
        codes: (K, D_s), at least one.
        prototypes: (K_p, D_p), at least one.
        position: (D_e, H, W) with D_e + D_p = D_s, or None where D_p = D_s; read where `residual`.
        residual: whether base is [position ; prototype] or the prototype, or else nothing.
        size: (H, W) of the maps to convolve.
        bias: (m,), added to every pixel for nothing.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    position = position if residual else None
    _check_tables(weight, codes, prototypes, position, residual, size, bias)
    windows = None
    if position is not None:
        windows = F.unfold(position.detach()[None], weight.shape[-1], padding=weight.shape[-1] // 2)[0]
    rows = _condition_rows(weight, codes.detach(), prototypes, windows, bias, residual)
    return ConditionTables(rows, len(codes), len(prototypes), weight.shape[-1], (size[0], size[1]))


def convolve_tables(tables: ConditionTables, indices: Tensor, prototype_ids: Tensor) -> Tensor:
    """Return the convolution of conditions whose products are in tables already; see `condition_convolution`.

    Every pixel is the sum of its rows in the same order, so that images do not change each other's bits.

    Args:
        tables: of `condition_tables`.
        indices: (B, H, W), int64, the nearest code of each pixel.
        prototype_ids: (B,), int64, the prototype of each image.

    Returns:
        (B, m, H, W), channels last in memory.

    Raises:
        ValueError: a shape does not fit the tables, or an index is out of range (seen on the CPU only).
    """
    if indices.dim() != 3 or tuple(indices.shape[1:]) != tables.size:
        raise ValueError(f"indices {tuple(indices.shape)} must be (B, H, W), here with (H, W) = {tables.size}")
    if prototype_ids.shape != indices.shape[:1]:
        raise ValueError(f"prototype_ids {tuple(prototype_ids.shape)} must be (B,), here ({len(indices)},)")
    _check_range("indices", indices, tables.codes)
    _check_range("prototype_ids", prototype_ids, tables.prototypes)
    return _look_up(tables, indices, prototype_ids)


def _look_up(tables: ConditionTables, indices: Tensor, prototype_ids: Tensor) -> Tensor:
    """Add up the rows of every pixel; every row number is within the table."""
    (height, width), kernel, images = tables.size, tables.kernel, len(indices)
    reach, taps, pixels = kernel // 2, kernel * kernel, height * width
    device = indices.device
    outside = F.pad(indices, (reach, reach, reach, reach), value=tables.codes)
    windows = outside.unfold(1, kernel, 1).unfold(2, kernel, 1).reshape(images, pixels, taps)
    rows = [windows * taps + torch.arange(taps, device=device)]
    cases = _border_cases(height, reach, device)[:, None] * (reach + 1) ** 2 + _border_cases(width, reach, device)
    first, n_cases = (tables.codes + 1) * taps, (reach + 1) ** 4
    rows.append((first + cases.flatten() * tables.prototypes + prototype_ids[:, None])[:, :, None])
    first += tables.prototypes * n_cases
    if len(tables.rows) > first:
        rows.append((first + torch.arange(pixels, device=device)).expand(images, -1)[:, :, None])
    # Without padding_idx, which is slow on a CPU: what lies outside is a row of zeros as any other.
    summed = F.embedding_bag(torch.cat(rows, 2).flatten(0, 1), tables.rows, mode="sum")
    return summed.view(images, height, width, -1).permute(0, 3, 1, 2)


@torch.library.custom_op("hgad_fast::condition_rows", mutates_args=())
@in_float32
def _condition_rows(
    weight: Tensor, codes: Tensor, prototypes: Tensor, windows: Tensor | None, bias: Tensor | None, residual: bool
) -> Tensor:
    """Return the rows of `ConditionTables`; for the backward pass the weight is kept, and no copy of it by taps."""
    (m, _, kernel, _), (n_codes, d_s), (n, d_p) = weight.shape, codes.shape, prototypes.shape
    taps, inside = _by_taps(weight), _taps_inside(kernel, weight)
    sizes = _parts(n_codes, n, kernel, windows)
    rows = weight.new_empty(sum(sizes), m)
    of_codes, of_prototypes, of_positions = rows.split(sizes)
    by_code = of_codes.view(n_codes + 1, -1, m)
    torch.bmm(codes.expand(len(taps), -1, -1), taps[:, :, :d_s].mT, out=by_code[:n_codes].transpose(0, 1))
    by_code[n_codes] = 0
    everywhere = prototypes.expand(len(taps), -1, -1)
    products = torch.bmm(everywhere, taps[:, :, d_s:].mT)  # (k k, K_p, m)
    if residual:
        products.baddbmm_(everywhere, taps[:, :, d_s - d_p : d_s].mT)
    torch.mm(inside, products.flatten(1), out=of_prototypes.view(len(inside), -1))
    if bias is not None:
        of_prototypes += bias
    if windows is not None:
        torch.mm(windows.T, _of_positions(weight, windows).flatten(1).T, out=of_positions)
    return rows


@_condition_rows.register_fake
def _(weight, codes, prototypes, windows, bias, residual):  # type: ignore[no-untyped-def]
    sizes = _parts(codes.shape[0], prototypes.shape[0], weight.shape[-1], windows)
    return weight.new_empty(sum(sizes), weight.shape[0])


@torch.library.custom_op("hgad_fast::condition_rows_backward", mutates_args=())
@in_float32
def _condition_rows_backward(
    gradient: Tensor,
    weight: Tensor,
    codes: Tensor,
    prototypes: Tensor,
    windows: Tensor | None,
    residual: bool,
    wants_weight: bool,
    wants_prototypes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of weight and prototypes (as trailing copies), empty where unwanted, and of the bias."""
    (m, _, kernel, _), (n_codes, d_s), (n, d_p) = weight.shape, codes.shape, prototypes.shape
    of_codes, of_prototypes, of_positions = gradient.split(_parts(n_codes, n, kernel, windows))
    inside = _taps_inside(kernel, weight)
    products = (inside.T @ of_prototypes.view(len(inside), -1)).view(-1, n, m)  # (k k, K_p, m)
    gweight, gprototypes = weight.new_empty(0), weight.new_empty(0)
    if wants_weight:
        gweight = torch.empty_like(weight, memory_format=torch.channels_last)
        gtaps = _by_taps(gweight)
        by_code = of_codes.view(n_codes + 1, -1, m)[:n_codes]
        torch.bmm(by_code.permute(1, 2, 0), codes.expand(len(gtaps), -1, -1), out=gtaps[:, :, :d_s])
        everywhere = prototypes.expand(len(gtaps), -1, -1)
        torch.bmm(products.mT, everywhere, out=gtaps[:, :, d_s:])
        if residual:
            gtaps[:, :, d_s - d_p : d_s].baddbmm_(products.mT, everywhere)
        if windows is not None:
            gpositions = _of_positions(gweight, windows)
            gpositions += (of_positions.T @ windows.T).view(gpositions.shape)
    if wants_prototypes:
        gprototypes = torch.bmm(products, _by_taps(weight[:, d_s:])).sum(0)
    return gweight, gprototypes, of_prototypes.sum(0)


@_condition_rows_backward.register_fake
def _(gradient, weight, codes, prototypes, windows, residual, wants_weight, wants_prototypes):  # type: ignore[no-untyped-def]
    return (
        torch.empty_like(weight, memory_format=torch.channels_last) if wants_weight else weight.new_empty(0),
        weight.new_empty(prototypes.shape) if wants_prototypes else weight.new_empty(0),
        weight.new_empty(weight.shape[0]),
    )


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, codes, prototypes, windows, _, ctx.residual = inputs
    ctx.save_for_backward(weight, codes, prototypes, windows)


def _row_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    of_weight, _, of_prototypes, _, of_bias, _ = ctx.needs_input_grad
    gweight, gprototypes, gbias = _condition_rows_backward(
        gradient.contiguous(), *ctx.saved_tensors, ctx.residual, of_weight, of_prototypes
    )
    return (
        gweight if of_weight else None,
        None,
        gprototypes if of_prototypes else None,
        None,
        gbias if of_bias else None,
        None,
    )


_condition_rows.register_autograd(_row_gradients, setup_context=_save_rows)
_condition_rows_backward.register_autograd(no_double_backward)


def _parts(codes: int, prototypes: int, kernel: int, windows: Tensor | None) -> list[int]:
    """Return how many rows of a table are of codes, of prototypes and of positions."""
    pixels = 0 if windows is None else windows.shape[1]
    return [(codes + 1) * kernel * kernel, prototypes * (kernel // 2 + 1) ** 4, pixels]


def _by_taps(weight: Tensor) -> Tensor:
    """Return a weight (m, D, k, k) as (k k, m, D): a view, if it is channels last in memory."""
    return weight.contiguous(memory_format=torch.channels_last).permute(2, 3, 0, 1).flatten(0, 1)


def _of_positions(weight: Tensor, windows: Tensor) -> Tensor:
    """Return the part (m, D_e, k, k) of a weight that reads the position code, given its windows (D_e k k, H W)."""
    return weight[:, : len(windows) // weight.shape[-1] ** 2]


def _border_cases(length: int, reach: int, device: torch.device) -> Tensor:
    """Return the number (length,) of each place's distances from both ends, where those are less than `reach`."""
    place = torch.arange(length, device=device)
    return place.clamp(max=reach) * (reach + 1) + (length - 1 - place).clamp(max=reach)


def _taps_inside(kernel: int, like: Tensor) -> Tensor:
    """Return ((k // 2 + 1)^4, k k): 1 where a tap is inside the map, for each pair of `_border_cases`."""
    reach = kernel // 2
    tap = torch.arange(-reach, reach + 1, device=like.device)
    distance = torch.arange(reach + 1, device=like.device)
    along = ((-tap <= distance[:, None, None]) & (tap <= distance[:, None])).flatten(0, 1)  # ((k // 2 + 1)^2, k)
    both = along[:, None, :, None] & along[None, :, None, :]
    return both.flatten(2).flatten(0, 1).to(like.dtype)


class _StraightThrough(torch.autograd.Function):
    """Returns a value unchanged, and lets its gradient reach the pattern that was quantised in it.

    With a weight the value is a convolution with it, and the pattern gets what a convolution's input gets.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, pattern: Tensor, weight: Tensor | None) -> Tensor:
        ctx.channels = pattern.shape[1]
        ctx.save_for_backward(*([] if weight is None else [weight]))
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        of_value, of_pattern = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        passed = gradient
        if of_pattern and ctx.saved_tensors:
            weight = ctx.saved_tensors[0].detach()[:, : ctx.channels]
            passed = F.conv_transpose2d(gradient, weight, padding=weight.shape[-1] // 2)
        return gradient if of_value else None, passed if of_pattern else None, None


def _check_condition(condition: Condition) -> None:
    """Raise a ValueError where a condition's shapes do not fit each other, or an index is out of range."""
    indices, codes, prototype, position, residual, pattern = condition
    if indices.dim() != 3:
        raise ValueError(f"indices {tuple(indices.shape)} must be (B, H, W)")
    _check_widths(codes, prototype, position if residual else None, residual, (indices.shape[1], indices.shape[2]))
    if len(prototype) != len(indices):
        raise ValueError(f"prototype {tuple(prototype.shape)} must be (B, D_p), here with B = {len(indices)}")
    expected = (len(indices), codes.shape[1], *indices.shape[1:])
    if pattern is not None and pattern.shape != expected:
        raise ValueError(f"pattern {tuple(pattern.shape)} must be (B, D_s, H, W), here {expected}")
    _check_range("indices", indices, len(codes))


def _check_tables(
    weight: Tensor,
    codes: Tensor,
    prototypes: Tensor,
    position: Tensor | None,
    residual: bool,
    size: tuple[int, int],
    bias: Tensor | None,
) -> None:
    """Raise a ValueError where the shapes do not fit each other."""
    _check_widths(codes, prototypes, position, residual, size)
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3] or weight.shape[2] % 2 == 0:
        raise ValueError(f"weight {tuple(weight.shape)} must be (m, D_s + D_p, k, k) with k odd")
    channels = codes.shape[1] + prototypes.shape[1]
    if weight.shape[1] != channels:
        raise ValueError(f"weight {tuple(weight.shape)} reads {weight.shape[1]} channels; the condition has {channels}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} must be (m,), here ({weight.shape[0]},)")


def _check_widths(
    codes: Tensor, prototypes: Tensor, position: Tensor | None, residual: bool, size: tuple[int, int]
) -> None:
    """Raise a ValueError where codes, prototypes and position are not of widths that add up."""
    if codes.dim() != 2 or not len(codes):
        raise ValueError(f"codes {tuple(codes.shape)} must be (K, D_s) with K >= 1")
    if prototypes.dim() != 2 or not len(prototypes):
        raise ValueError(f"prototypes {tuple(prototypes.shape)} must be (B or K_p, D_p), at least one")
    if position is not None and (position.dim() != 3 or tuple(position.shape[1:]) != tuple(size)):
        raise ValueError(f"position {tuple(position.shape)} must be (D_e, H, W), here with (H, W) = {tuple(size)}")
    base = prototypes.shape[1] + (0 if position is None else len(position))
    if residual and base != codes.shape[1]:
        raise ValueError(f"codes {tuple(codes.shape)} have {codes.shape[1]} channels; their base has {base}")


def _check_range(name: str, values: Tensor, count: int) -> None:
    """Raise a ValueError where a value is not one of 0..count - 1; on a CPU, where looking costs nothing."""
    if values.dtype != torch.int64:
        raise ValueError(f"{name} must be int64, not {values.dtype}")
    if values.is_cuda or torch.compiler.is_compiling() or not values.numel():
        return
    low, high = (int(value) for value in values.aminmax())
    if low < 0 or high >= count:
        raise ValueError(f"{name} reach from {low} to {high}; allowed are 0 to {count - 1}")
