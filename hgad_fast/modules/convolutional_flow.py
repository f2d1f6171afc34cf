"""VQ-Flow's flows of whole feature maps: a convolutional flow of each level, and one that joins the levels.

Maps are (B, h, w, C) here: the pixels are rows, on which the affine coupling works as on HGAD's, and for convolutions
they are images with channels last. (VQ-Flow, arXiv 2409.00942; the block is FrEIA's all-in-one block.)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .. import ops
from ..ops import Condition, ConditionTables
from ..ops.dispatch import kernels

FUSION_CLAMP = 0.636  # of the fusion flow's arctan: the official value, near 2 / pi
MIN_STD = 0.01  # of the prior, whose standard deviation is 1 at first
KEPT_TABLES = 40  # those of the subnets of two models of the published size


class Known(NamedTuple):
    """The prototypes of images that are scored, and all codebooks: what tables can be kept for.

    Attributes:
        prototypes: (K_p, D_p), all of them.
        ids: (B,) int64, those of the images.
        codebooks: the codes as their modules hold them; tables are made anew where one of them has changed.
    """

    prototypes: Tensor
    ids: Tensor
    codebooks: tuple[Tensor, ...]


@functools.cache
def kept_tables() -> Any:
    """Return the cache of the tables that scoring keeps; made on first use, like all in `kernels`."""
    cache = kernels("cache").Cache(KEPT_TABLES)
    register_optimizer_step_post_hook(lambda *_: cache.empty())  # torch does not count what fused optimizers write
    return cache


class ConditionedConvolution(nn.Conv2d):
    """A 3 x 3 convolution of [x; condition] that reads the condition's part from tables, which cost less than products.

    Args:
        channels: those of x.
        condition_dim: those of the condition.
        out_channels: those of the result.

    Attributes:
        by_tables: in training, too; False: by a dense convolution, which is faster where the condition has few
            channels. The result is the same.
    """

    def __init__(self, channels: int, condition_dim: int, out_channels: int) -> None:
        super().__init__(channels + condition_dim, out_channels, 3, padding=1)
        self.own_channels = channels
        self.by_tables = True

    def convolve(self, x: Tensor, condition: Condition, known: Known | None = None) -> Tensor:
        """Return the convolution (B, h, w, out) of a map x (B, h, w, channels) and a condition of the same images.

        Args:
            x: the map.
            condition: of the same images and size.
            known: prototypes for which tables are kept; None: nothing is kept, and there is a gradient.
        """
        images = channels_first(x)
        own, others = self.weight.split([self.own_channels, self.in_channels - self.own_channels], 1)
        if known is not None:
            conditioned = ops.convolve_tables(self.tables(condition, known), condition.indices, known.ids)
            return channels_last(F.conv2d(images, own, padding=1) + conditioned)  # the bias is in the tables
        kept_tables().empty()  # a training needs the memory
        if self.by_tables:
            conditioned = ops.condition_convolution(condition, others)
            return channels_last(F.conv2d(images, own, self.bias, padding=1) + conditioned)
        whole = torch.cat([images, ops.dense_condition(condition)], 1)
        return channels_last(F.conv2d(whole, self.weight, self.bias, padding=1))

    def tables(self, condition: Condition, known: Known) -> ConditionTables:
        """Return tables for maps of the condition's size; they are made anew when weights or codes have changed."""
        size = (condition.indices.shape[1], condition.indices.shape[2])
        weight, bias = self.weight, self.bias
        assert bias is not None

        def make() -> ConditionTables:
            others = weight.detach()[:, self.own_channels :]
            codes, position, residual = condition.codes, condition.position, condition.residual
            return ops.condition_tables(others, codes, known.prototypes, position, residual, size, bias.detach())

        return kept_tables().get(make, (size, condition.residual), (weight, bias, *known.codebooks))


class Subnet(nn.Module):
    """The subnet of a coupling block: 3 x 3 convolution, LayerNorm over the channels, ReLU, 3 x 3 convolution.

    Args:
        channels: those of the passive half.
        condition_dim: those of the condition.
        hidden: those between the convolutions.
        out_channels: those of the result.
    """

    def __init__(self, channels: int, condition_dim: int, hidden: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = ConditionedConvolution(channels, condition_dim, hidden)
        self.ln = nn.LayerNorm(hidden)
        self.conv2 = nn.Conv2d(hidden, out_channels, 3, padding=1)

    def forward(self, x: Tensor, condition: Condition, known: Known | None = None) -> Tensor:
        """Return the raw scales and shifts (B, h, w, out_channels) of a map x (B, h, w, channels)."""
        hidden = F.relu(self.ln(self.conv1.convolve(x, condition, known)))
        return channels_last(self.conv2(channels_first(hidden)))


class ConvolutionalBlock(nn.Module):
    r"""A conditional coupling block of a map: coupling, a scale and offset of each channel, a permutation of channels.

    The first half x_1 of the channels (the larger one of an odd number) stays, and

    .. math:: [a_s | a_t] = \phi([x_1; \kappa]), \quad x_2' = x_2 e^{s} + 0.1 a_t, \quad s = \alpha \tanh(0.1 a_s)

    .. math:: u = \psi \odot [x_1; x_2'] + o, \quad \psi = 0.2 \ln(1 + e^{G / 2}), \quad z_i = u_{\pi(i)}

    Args:
        channels: C.
        condition_dim: channels of the condition.
        hidden: channels between the subnet's convolutions; None: as many as it reads, as published.
        clamp: the bound alpha of s.
    """

    permutation: Tensor

    def __init__(self, channels: int, condition_dim: int, hidden: int | None = None, clamp: float = 1.9) -> None:
        super().__init__()
        self.active = channels // 2
        self.passive = channels - self.active
        self.clamp = clamp
        hidden = hidden or self.passive + condition_dim
        self.subnet = Subnet(self.passive, condition_dim, hidden, 2 * self.active)
        self.global_scale = nn.Parameter(torch.full((1, channels, 1, 1), 2 * math.log(math.exp(5) - 1)))  # psi = 1
        self.global_offset = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.register_buffer("permutation", torch.randperm(channels))

    def forward(self, x: Tensor, condition: Condition, known: Known | None = None) -> tuple[Tensor, Tensor]:
        """Return z (B, h, w, C) and each pixel's part of the log-determinant (B, h, w)."""
        passive, active = x[..., : self.passive], x[..., self.passive :]
        y, log_det = self._coupled(passive, active, condition, known, inverse=False)
        scale, offset = self.scale_and_offset()
        z = torch.addcmul(offset, torch.cat([passive, y], -1), scale)
        return permuted(z, self.permutation), log_det + scale.log().sum()

    def inverse(self, z: Tensor, condition: Condition, known: Known | None = None) -> tuple[Tensor, Tensor]:
        """Return the x of `forward`, and each pixel's part of the log-determinant of the inverse."""
        scale, offset = self.scale_and_offset()
        u = (permuted(z, torch.argsort(self.permutation)) - offset) / scale
        passive, active = u[..., : self.passive], u[..., self.passive :]
        x, log_det = self._coupled(passive, active, condition, known, inverse=True)
        return torch.cat([passive, x], -1), log_det - scale.log().sum()

    def _coupled(
        self, passive: Tensor, active: Tensor, condition: Condition, known: Known | None, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the active half (B, h, w, C // 2) after the coupling, or before it, and log-determinants (B, h, w)."""
        a = self.subnet(passive, condition, known)
        y, log_det = ops.affine_coupling(active.flatten(0, 2), a.flatten(0, 2), self.clamp, inverse=inverse)
        return y.view(active.shape), log_det.view(active.shape[:3])

    def scale_and_offset(self) -> tuple[Tensor, Tensor]:
        """Return psi and o, (C,) each."""
        return 0.1 * F.softplus(self.global_scale.flatten(), beta=0.5), self.global_offset.flatten()


class ConvolutionalFlow(nn.Module):
    """The flow of one level: several `ConvolutionalBlock`."""

    def __init__(
        self, channels: int, condition_dim: int, coupling_layers: int, hidden: int | None = None, clamp: float = 1.9
    ) -> None:
        super().__init__()
        self.module_list = nn.ModuleList(
            ConvolutionalBlock(channels, condition_dim, hidden, clamp) for _ in range(coupling_layers)
        )

    def forward(self, x: Tensor, condition: Condition, known: Known | None = None) -> tuple[Tensor, Tensor]:
        """Return z (B, h, w, C) of a map, and each pixel's part of the log-determinant (B, h, w)."""
        log_det = x.new_zeros(x.shape[:3])
        for block in self.module_list:
            x, block_log_det = block(x, condition, known)
            log_det = log_det + block_log_det
        return x, log_det

    def inverse(self, z: Tensor, condition: Condition, known: Known | None = None) -> tuple[Tensor, Tensor]:
        """Return the map of which `forward` makes z, and each pixel's part of the log-determinant of the inverse."""
        log_det = z.new_zeros(z.shape[:3])
        for block in reversed(self.module_list):
            z, block_log_det = block.inverse(z, condition, known)  # type: ignore[operator]
            log_det = log_det + block_log_det
        return z, log_det


class CrossScaleNet(nn.Module):
    """The fusion flow's network: from half of the channels of every level to scales and shifts of the other half.

    The halves are pooled to the coarsest level's size, joined with the condition, mixed by two convolutions, resized
    again and added; two convolutions a level then give its scales and shifts.
    """

    def __init__(self, channels: Sequence[int], condition_dim: int) -> None:
        super().__init__()
        self.channels = list(channels)
        joined = sum(channels)
        hidden = (joined + condition_dim) // 4
        self.cross_convs = nn.ModuleDict(
            {
                "conv1": ConditionedConvolution(joined, condition_dim, hidden),
                "norm": nn.LayerNorm(hidden),
                "conv2": nn.Conv2d(hidden, joined, 3, padding=1),
            }
        )
        self.conv_s, self.conv_t = (nn.ModuleList(nn.Conv2d(n, n, 3, padding=1) for n in channels) for _ in range(2))

    def forward(
        self, halves: Sequence[Tensor], condition: Condition, known: Known | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Return scales and shifts (B, h, w, C / 2) of each level from the halves (B, h, w, C / 2) of all levels."""
        maps = [channels_first(half) for half in halves]
        coarsest = (condition.indices.shape[1], condition.indices.shape[2])
        joined = torch.cat([F.adaptive_avg_pool2d(x, coarsest) for x in maps], 1)
        convolution = self.cross_convs["conv1"]
        assert isinstance(convolution, ConditionedConvolution)
        hidden = F.relu(self.cross_convs["norm"](convolution.convolve(channels_last(joined), condition, known)))
        mixed = F.relu(self.cross_convs["conv2"](channels_first(hidden))).split(self.channels, 1)
        result = []
        for level, (x, context) in enumerate(zip(maps, mixed, strict=True)):
            resized = F.interpolate(context, x.shape[2:], mode="bilinear", align_corners=True)
            inputs = x + resized
            result.append((channels_last(self.conv_s[level](inputs)), channels_last(self.conv_t[level](inputs))))
        return result


class FusionFlow(nn.Module):
    r"""One coupling of all levels: each half of the channels is transformed as the other half of all levels says.

    The channels of each level are permuted and halved into A and B; with the cross-scale networks of `CrossScaleNet`

    .. math:: A' = A e^{L(s_2)} + t_2, \quad B' = B e^{L(s_1)} + t_1, \quad L(s) = 0.636 \alpha \arctan(s / \alpha)

    where s_2, t_2 come from all B and s_1, t_1 from all A'.

    Args:
        channels: C of each level, even numbers.
        condition_dim: channels of the condition, which has the size of the coarsest level.
        clamp: alpha.
    """

    def __init__(self, channels: Sequence[int], condition_dim: int, clamp: float = 1.9) -> None:
        super().__init__()
        self.clamp = clamp
        halves = [c // 2 for c in channels]
        self.subnet_1, self.subnet_2 = (CrossScaleNet(halves, condition_dim) for _ in range(2))
        for level, c in enumerate(channels):
            self.register_buffer(f"permutation_{level}", torch.randperm(c))

    def forward(
        self, maps: Sequence[Tensor], condition: Condition, known: Known | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return z (B, h, w, C) of each level, and each pixel's part of the log-determinant (B, h, w)."""
        shuffled = [permuted(x, self.permutation(level)) for level, x in enumerate(maps)]
        nets: Any = self.subnet_1, self.subnet_2
        told_by_a, told_by_b = (functools.partial(net, condition=condition, known=known) for net in nets)
        return fused(shuffled, told_by_a, told_by_b, self.clamp, axis=-1)

    def permutation(self, level: int) -> Tensor:
        """Return which channel of a level each permuted channel is, (C,) int64."""
        return self.get_buffer(f"permutation_{level}")


ScalesAndShifts = Sequence[tuple[Tensor, Tensor]]  # of each level, of the size of half of its channels


def fused(
    maps: Sequence[Tensor],
    told_by_a: Callable[[Sequence[Tensor]], ScalesAndShifts],
    told_by_b: Callable[[Sequence[Tensor]], ScalesAndShifts],
    clamp: float,
    axis: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """Couple permuted maps of all levels; see `FusionFlow`.

    Args:
        maps: those of each level, of 4 axes, B first.
        told_by_a: s_1 and t_1, by A' of all levels.
        told_by_b: s_2 and t_2, by B of all levels.
        clamp: alpha.
        axis: that of the channels.

    Returns:
        the coupled maps, and each pixel's part of the log-determinant (B, h, w), of each level.
    """

    def coupled(halves: Sequence[Tensor], scales_and_shifts: ScalesAndShifts) -> tuple[list[Tensor], list[Tensor]]:
        transformed, log_dets = [], []
        for x, (s, t) in zip(halves, scales_and_shifts, strict=True):
            log_scale = clamp * FUSION_CLAMP * torch.arctan(s / clamp)
            transformed.append(torch.addcmul(t, x, torch.exp(log_scale)))
            log_dets.append(log_scale.sum(axis))
        return transformed, log_dets

    a, b = ([x.chunk(2, axis)[half] for x in maps] for half in range(2))
    a, log_det_2 = coupled(a, told_by_b(b))
    b, log_det_1 = coupled(b, told_by_a(a))
    z = [torch.cat(halves, axis).clamp(-1e6, 1e6) for halves in zip(a, b, strict=True)]
    return z, [one + two for one, two in zip(log_det_1, log_det_2, strict=True)]


class PrototypePrior(nn.Module):
    """The Gaussian of each level's latents, whose mean and standard deviation follow from the image's prototype.

    Args:
        prototype_dim: D_p.
        channels: C of each level.
        std: ``"softplus"``: positive, 1 at first; ``"signed"``: a linear map that may cross zero, as published.
    """

    def __init__(self, prototype_dim: int, channels: Sequence[int], std: str = "softplus") -> None:
        super().__init__()
        self.std_form = std
        self.mean, self.std = (nn.ModuleList(nn.Linear(prototype_dim, c) for c in channels) for _ in range(2))
        if std == "softplus":
            for layer in self.std:
                assert isinstance(layer, nn.Linear)
                nn.init.zeros_(layer.weight)
                nn.init.constant_(layer.bias, math.log(math.expm1(1 - MIN_STD)))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(self.parameters()).dtype

    @torch.no_grad()
    def start(self, level: int, z: Tensor) -> None:
        """Set mean and standard deviation of a level, for every prototype, to those of pixels z (N, C)."""
        mean, std = self.mean[level], self.std[level]
        assert isinstance(mean, nn.Linear) and isinstance(std, nn.Linear)
        mean.weight.zero_()
        std.weight.zero_()
        mean.bias.copy_(z.mean(0))
        std.bias.copy_(torch.log(torch.expm1((z.std(0) - MIN_STD).clamp(min=MIN_STD))))

    def forward(self, prototype: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """Return the means and standard deviations (B, C) of a level for prototypes (B, D_p)."""
        mean, raw = self.mean[level](prototype), self.std[level](prototype)
        if self.std_form == "softplus":
            return mean, F.softplus(raw) + MIN_STD
        return mean, torch.sqrt(raw.square() + 1e-8)


class _Permuted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, permutation: Tensor) -> Tensor:
        ctx.save_for_backward(permutation)
        return x.index_select(-1, permutation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.index_select(-1, torch.argsort(ctx.saved_tensors[0])), None


def permuted(x: Tensor, permutation: Tensor) -> Tensor:
    """Return a map (..., C) whose channel i is channel permutation[i] of x; its gradient is gathered as well."""
    return _Permuted.apply(x, permutation)


def channels_first(x: Tensor) -> Tensor:
    """Return a map (B, h, w, C) as an image (B, C, h, w), a view."""
    return x.permute(0, 3, 1, 2)


def channels_last(x: Tensor) -> Tensor:
    """Return an image (B, C, h, w) as a map (B, h, w, C), a view."""
    return x.permute(0, 2, 3, 1)
