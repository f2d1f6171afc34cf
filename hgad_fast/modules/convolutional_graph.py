"""VQ-Flow's conditions and flows as plain operations on maps of fixed size, for other runtimes to run.

A condition takes finitely many values, so what a convolution makes of it is a sum of rows of tables (see
`ops.condition`). They are made once for all here, in place of the weights that read conditions, which are most of a
model. The modules here keep parts of those that they are made of, which should be copies.

Symbols: B images; h x w pixels of a level; C channels, of which C1 pass through a coupling block; K patterns and K_p
prototypes; D_s, D_p and D_e channels of a pattern, a prototype and a position code; m channels of a convolution's
result.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..features.graph import LARGEST, constant, sharing_copy
from ..features.interpolate import resizing
from ..ops import SeparablePosition
from .codebook import Codebook
from .conditions import Conditions
from .convolutional_flow import (
    ConditionedConvolution,
    ConvolutionalBlock,
    ConvolutionalFlow,
    CrossScaleNet,
    FusionFlow,
    PrototypePrior,
    channels_first,
    channels_last,
    fused,
)
from .flow import dense_position, sinusoidal_position
from .groups import groups_of_images, one_group

TAPS = 9  # of a kernel, 3 x 3


class ConditionValues(NamedTuple):
    """All values that the condition of a level can have.

    Attributes:
        codes: (K + 1, D_s), the patterns, and behind them zeros: what a kernel sees outside the map.
        prototypes: (K_p, D_p); a single one where all images have the same.
        position: the code of each pixel; None: patterns do not know it.
        residual: whether patterns are what prototype and position leave, or everything.
        size: (h, w).
    """

    codes: Tensor
    prototypes: Tensor
    position: SeparablePosition | None
    residual: bool
    size: tuple[int, int]


class ConditionRows(NamedTuple):
    """The conditions of B images at a level, as rows of tables.

    Attributes:
        patterns: (B, h, w) int64 for each tap of a kernel: the row of the pattern that the tap sees.
        prototypes: (B,) int64.
    """

    patterns: list[Tensor]
    prototypes: Tensor


def condition_values(
    conditions: Conditions, sizes: Sequence[tuple[int, int]], group: int | None = None
) -> list[ConditionValues]:
    """Return the values of the conditions of each level.

    Args:
        conditions: the model's.
        sizes: (h, w) of each level.
        group: the prototype of all images; None: any.
    """
    prototypes = conditions.cpc_quantizer.codes()
    if group is not None:
        prototypes = constant(prototypes[group : group + 1])
    values = []
    for codebook, size in zip(conditions.cspc_quantizers, sizes, strict=True):
        assert isinstance(codebook, Codebook)
        position = sinusoidal_position(*size, conditions.position_dim) if conditions.position_dim else None
        codes = F.pad(codebook.codes(), (0, 0, 0, 1))
        values.append(ConditionValues(codes, prototypes, position, conditions.residual, size))
    return values


class NearestCode(nn.Module):
    """Vectors (N, D) -> the index (N,) int64 of the nearest of the codes (K, D), as `ops.nearest_code` computes it."""

    codes: Tensor

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the indices."""
        norms = self.codes.square().sum(1)  # of the codes as they are, should they be stored in half precision
        return torch.addmm(norms, x, self.codes.T, alpha=-2).argmin(1)


class PatternGraph(nn.Module):
    """Vectors of a level's pixels (B, h w, D_s) -> the `ConditionRows.patterns`."""

    column: Tensor | None
    row: Tensor | None

    def __init__(self, values: ConditionValues) -> None:
        super().__init__()
        self.nearest = NearestCode(constant(values.codes[:-1]))
        self.size = values.size
        for name, code in zip(("column", "row"), values.position or (None, None), strict=True):
            self.register_buffer(name, None if code is None else constant(code))

    @property
    def position(self) -> Tensor | None:
        """The position code (D_e, h, w); None without position."""
        if self.column is None or self.row is None:
            return None
        return dense_position(SeparablePosition(self.column, self.row)).T.unflatten(1, self.size)

    def forward(self, vectors: Tensor) -> list[Tensor]:
        """Return the rows."""
        (h, w), codes = self.size, len(self.nearest.codes)
        indices = self.nearest(vectors.flatten(0, 1)).view(-1, h, w)
        padded = TAPS * F.pad(indices, (1, 1, 1, 1), value=codes)  # outside lies the code of zeros
        return [padded[:, i : i + h, j : j + w] + (3 * i + j) for i in range(3) for j in range(3)]


class ConditionGraph(nn.Module):
    """Prepared features (B, C, h, w) of each level -> the `ConditionRows` of each level, and what holds for images.

    Args:
        conditions: the model's.
        values: of `condition_values`.
        group: the prototype of all images; None: the nearest one, or one that is given with the features.

    An image whose semantic vector is no number is invalid even where its prototype is known, as in the model.
    """

    group: Any
    prototypes: Tensor

    def __init__(self, conditions: Conditions, values: Sequence[ConditionValues], group: int | None) -> None:
        super().__init__()
        self.group = group
        self.networks = sharing_copy(conditions)
        del self.networks.cpc_quantizer, self.networks.cspc_quantizers
        prototypes = values[0].prototypes
        self.register_buffer("prototypes", prototypes)
        self.nearest = NearestCode(prototypes) if group is None else None
        self.patterns: Any = nn.ModuleList(PatternGraph(of_level) for of_level in values)

    def forward(self, levels: Sequence[Tensor], group_ids: Tensor | None) -> tuple[list[ConditionRows], Tensor, Tensor]:
        """Return the conditions, the numbers (B,) int64 of the prototypes, and the `ConditionMaps.validity` (B,).

        Args:
            levels: the features.
            group_ids: (B,) int64, the prototypes of the images, -1 where they are to be inferred; None: all are.
        """
        semantic_vectors = self.networks.semantic_vectors(levels[-1])
        if self.nearest is None:
            rows, numbers = one_group(levels[-1], 0), one_group(levels[-1], self.group)
        else:
            rows = numbers = groups_of_images(self.nearest(semantic_vectors), group_ids)
        prototype = self.prototypes.index_select(0, rows)
        conditions, finite = [], [_finite(semantic_vectors)]
        for features, patterns in zip(self.networks.pattern_features(levels), self.patterns, strict=True):
            vectors, _ = self.networks.pixel_vectors(features, patterns.position, prototype)
            conditions.append(ConditionRows(patterns(vectors), rows))
            finite.append(_finite(vectors))
        return conditions, numbers, torch.where(torch.stack(finite).all(0), 0.0, torch.nan)


class Table(nn.Module):
    """A constant product (N, 9 m) of rows (N, D) with each tap of a kernel (m, D, 3, 3).

    The factors are held instead of the product where they are smaller: it is for the runtime to multiply them, once.
    """

    product: Tensor | None
    rows: Tensor
    taps: Tensor

    def __init__(self, rows: Tensor, kernel: Tensor) -> None:
        super().__init__()
        taps = kernel.permute(1, 2, 3, 0).flatten(1)
        smaller = len(rows) * taps.shape[1] <= rows.numel() + taps.numel()
        self.register_buffer("product", rows @ taps if smaller else None)
        if not smaller:
            self.register_buffer("rows", rows)
            self.register_buffer("taps", taps.contiguous())

    def forward(self) -> Tensor:
        """Return the product."""
        return self.rows @ self.taps if self.product is None else self.product


class ConditionedConvolutionGraph(nn.Module):
    """A `ConditionedConvolution`: maps (B, C1, h, w) and conditions -> maps (B, h, w, m).

    What the kernel makes of a prototype, of the code of a column or of that of a row changes across the map, or along
    one of its axes, by nothing but which taps lie inside: two small products spread it over the pixels.
    """

    kernel: Tensor
    bias: Tensor | None
    inside_rows: Tensor
    inside_columns: Tensor
    column: Tensor | None
    row: Tensor | None

    def __init__(self, convolution: ConditionedConvolution, values: ConditionValues) -> None:
        super().__init__()
        weight, own = convolution.weight.detach(), convolution.own_channels
        kernel, others = weight.split([own, convolution.in_channels - own], 1)
        self.register_buffer("kernel", kernel.contiguous())
        self.register_buffer("bias", None if convolution.bias is None else convolution.bias.detach())
        d_s, d_p = values.codes.shape[1], values.prototypes.shape[1]
        self.patterns = Table(values.codes, others[:, :d_s])
        of_prototypes = others[:, d_s:] + (others[:, d_s - d_p : d_s] if values.residual else 0)
        self.prototypes = Table(values.prototypes, of_prototypes)
        h, w = self.size = values.size
        for name, n in (("inside_rows", h), ("inside_columns", w)):
            self.register_buffer(name, F.pad(torch.ones(n), (1, 1)).unfold(0, 3, 1).contiguous())
        column = row = None
        if values.residual and values.position is not None:
            across, along = others[:, : d_s - d_p].chunk(2, 1)
            column, row = _axis_table(values.position.column, across), _axis_table(values.position.row, along.mT)
        self.register_buffer("column", column)
        self.register_buffer("row", row)

    def forward(self, x: Tensor, condition: ConditionRows) -> Tensor:
        """Return the convolution."""
        h, w = self.size
        products = self.prototypes()
        if len(products) > 1:
            products = products.index_select(0, condition.prototypes)
        by_rows = self.inside_columns @ products.unflatten(1, (3, 3, -1))  # (B or 1, 3, w, m)
        if self.column is not None:
            by_rows = by_rows + self.column
        own = channels_last(F.conv2d(x, self.kernel, self.bias, padding=1))
        result = own + (self.inside_rows @ by_rows.flatten(2)).unflatten(2, (w, -1))
        if self.row is not None:
            result = result + (self.inside_columns @ self.row.flatten(1)).unflatten(1, (h, -1)).transpose(0, 1)
        table = self.patterns().unflatten(1, (TAPS, -1)).flatten(0, 1)
        for rows in condition.patterns:
            result = result + F.embedding(rows, table)
        return result


class SubnetGraph(nn.Module):
    """Maps (B, C1, h, w) and conditions -> convolved, normalised, rectified and convolved once more, (B, C', h, w)."""

    def __init__(
        self, first: ConditionedConvolution, norm: nn.LayerNorm, second: nn.Conv2d, values: ConditionValues
    ) -> None:
        super().__init__()
        self.first = ConditionedConvolutionGraph(first, values)
        self.norm, self.second = norm, second

    def forward(self, x: Tensor, condition: ConditionRows) -> Tensor:
        """Return the maps."""
        return self.second(channels_first(F.relu(self.norm(self.first(x, condition)))))


class BlockGraph(nn.Module):
    """A `ConvolutionalBlock`: maps (B, C, h, w) and conditions -> maps, and s summed over the channels (B, h, w)."""

    permutation: Tensor
    scale: Tensor
    offset: Tensor

    def __init__(self, block: ConvolutionalBlock, values: ConditionValues) -> None:
        super().__init__()
        self.clamp, self.halves = block.clamp, [block.passive, block.active]
        self.subnet = SubnetGraph(block.subnet.conv1, block.subnet.ln, block.subnet.conv2, values)
        scale, offset = block.scale_and_offset()
        self.log_gain = float(scale.double().log().sum())
        for name, tensor in (("scale", scale), ("offset", offset)):
            self.register_buffer(name, tensor[block.permutation, None, None])
        self.register_buffer("permutation", block.permutation)

    def forward(self, x: Tensor, condition: ConditionRows) -> tuple[Tensor, Tensor]:
        """Return the maps and log-determinants, but for the constant `log_gain`."""
        passive, active = x.split(self.halves, 1)
        scale, shift = (0.1 * self.subnet(passive, condition)).chunk(2, 1)
        log_scale = self.clamp * torch.tanh(scale)
        coupled = torch.cat([passive, active * log_scale.exp() + shift], 1)
        return coupled.index_select(1, self.permutation) * self.scale + self.offset, log_scale.sum(1)


class FlowGraph(nn.Module):
    """A `ConvolutionalFlow`: maps (B, C, h, w) and conditions -> maps, and log-determinants (B, h, w)."""

    def __init__(self, flow: ConvolutionalFlow, values: ConditionValues) -> None:
        super().__init__()
        blocks = [BlockGraph(block, values) for block in flow.module_list if isinstance(block, ConvolutionalBlock)]
        self.blocks = nn.ModuleList(blocks)
        self.log_gain = sum(block.log_gain for block in blocks)

    def forward(self, x: Tensor, condition: ConditionRows) -> tuple[Tensor, Tensor]:
        """Return the maps and log-determinants."""
        log_dets = []
        for block in self.blocks:
            x, log_det = block(x, condition)
            log_dets.append(log_det)
        return x, torch.stack(log_dets).sum(0) + self.log_gain


class PriorGraph(nn.Module):
    """The `PrototypePrior` of a level: maps (B, C, h, w) and the rows (B,) of prototypes -> standardised maps."""

    mean: Tensor
    std: Tensor

    def __init__(self, prior: PrototypePrior, level: int, prototypes: Tensor) -> None:
        super().__init__()
        for name, tensor in zip(("mean", "std"), prior(prototypes, level), strict=True):
            self.register_buffer(name, tensor[..., None, None])

    def forward(self, z: Tensor, rows: Tensor) -> Tensor:
        """Return the maps."""
        return (z - self.mean.index_select(0, rows)) / self.std.index_select(0, rows)


class CrossScaleGraph(nn.Module):
    """A `CrossScaleNet`: maps (B, C / 2, h, w) of all levels and conditions -> scales and shifts of each level.

    Args:
        net: the network.
        values: those of the condition.
        sides: h = w of each level.
    """

    def __init__(self, net: CrossScaleNet, values: ConditionValues, sides: Sequence[int]) -> None:
        super().__init__()
        self.channels, self.coarsest = net.channels, values.size[0]
        first, norm, second = net.cross_convs.values()
        assert isinstance(first, ConditionedConvolution)
        assert isinstance(norm, nn.LayerNorm) and isinstance(second, nn.Conv2d)
        self.mixed = SubnetGraph(first, norm, second, values)
        self.conv_s, self.conv_t = net.conv_s, net.conv_t
        for level, side in enumerate(sides):
            self.register_buffer(f"resizing_{level}", resizing(self.coarsest, side, align_corners=True).float())

    def forward(self, halves: Sequence[Tensor], condition: ConditionRows) -> list[tuple[Tensor, Tensor]]:
        """Return the scales and shifts."""
        joined = torch.cat([F.avg_pool2d(x, x.shape[2] // self.coarsest) for x in halves], 1)
        mixed = F.relu(self.mixed(joined, condition)).split(self.channels, 1)
        result = []
        for level, (x, context) in enumerate(zip(halves, mixed, strict=True)):
            matrix = self.get_buffer(f"resizing_{level}")  # of each axis
            inputs = x + matrix @ context @ matrix.T
            result.append((self.conv_s[level](inputs), self.conv_t[level](inputs)))
        return result


class FusionGraph(nn.Module):
    """A `FusionFlow`: maps (B, C, h, w) of all levels and conditions -> maps, and log-determinants (B, h, w).

    Args:
        flow: the flow.
        values: those of the condition.
        sides: h = w of each level.
    """

    def __init__(self, flow: FusionFlow, values: ConditionValues, sides: Sequence[int]) -> None:
        super().__init__()
        self.clamp = flow.clamp
        self.subnet_1 = CrossScaleGraph(flow.subnet_1, values, sides)
        self.subnet_2 = CrossScaleGraph(flow.subnet_2, values, sides)
        for level in range(len(sides)):
            self.register_buffer(f"permutation_{level}", flow.permutation(level))

    def forward(self, maps: Sequence[Tensor], condition: ConditionRows) -> tuple[list[Tensor], list[Tensor]]:
        """Return the maps and log-determinants of each level."""
        shuffled = [x.index_select(1, self.get_buffer(f"permutation_{level}")) for level, x in enumerate(maps)]
        nets: Any = self.subnet_1, self.subnet_2
        told_by_a, told_by_b = (functools.partial(net, condition=condition) for net in nets)
        return fused(shuffled, told_by_a, told_by_b, self.clamp, axis=1)


def _finite(vectors: Tensor) -> Tensor:
    """Return whether the vectors (B, ...) of each image are finite, (B,), in a form that no runtime simplifies away."""
    return (vectors.abs() <= LARGEST).flatten(1).all(1)


def _axis_table(code: Tensor, kernel: Tensor) -> Tensor:
    """Return what the taps along one axis make of the codes (n, D) of its places, for each tap across it, (3, n, m).

    Args:
        code: of the places.
        kernel: (m, D, 3, 3), its last axis the one along which the codes differ.
    """
    by_tap_across = kernel.permute(2, 0, 1, 3).flatten(0, 1)
    return F.conv1d(code.T[None], by_tap_across, padding=1)[0].unflatten(0, (3, -1)).mT.contiguous()
