"""The flow and the mixture of a level as plain operations on maps of one size, for other runtimes to run.

Symbols: B images of h x w pixels; C channels, of which C1 pass through a coupling block; Hd hidden units; K classes of
M centres.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..features.graph import constant
from ..ops import mixture, subnet
from ..ops.subnet import Weights
from .flow import ConditionalFlow

MOST = 1e30  # what stands for infinity in exponents: a sum of -inf alone would give NaN


class CouplingGraph(nn.Module):
    """A coupling block with its rotation: features (B, h w, C) -> features and log-determinants (B, h w)."""

    w1: Tensor
    b1: Tensor
    column: Tensor
    row: Tensor
    w2: Tensor
    b2: Tensor
    rotation: Tensor
    offset: Tensor

    def __init__(self, weights: Weights, tables: tuple[Tensor, ...], clamp: float) -> None:
        """Take the weights of `subnet.weights_of` with 0.1 as factors, and the (column, row) of `subnet.tables_of`."""
        super().__init__()
        self.clamp = clamp
        self.passive = len(weights.w1x)
        self.positional = bool(tables)
        constants = {"w1": weights.w1x, "w2": weights.w2, "b2": weights.b2, "rotation": weights.rotation}
        constants["offset"] = weights.offset
        # Columns and rows stay apart in the file: a table of all pixels would be larger than the weights.
        constants |= dict(zip(("column", "row"), tables, strict=True)) if tables else {"b1": weights.b1}
        for name, tensor in constants.items():
            self.register_buffer(name, constant(tensor))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the block makes of x, and s of each pixel summed over the channels."""
        x1, x2 = x[..., : self.passive], x[..., self.passive :]
        table = (self.row[:, None] + self.column).flatten(0, 1) if self.positional else self.b1
        scale, shift = (torch.relu(x1 @ self.w1 + table) @ self.w2 + self.b2).chunk(2, -1)
        log_scale = self.clamp * torch.tanh(scale)
        x = torch.cat([x1, x2 * log_scale.exp() + shift], -1) @ self.rotation + self.offset
        return x, log_scale.sum(-1)


class LevelGraph(nn.Module):
    """Scaled features (B, h w, C) of a level -> log-densities of each class and the entropy of the classes' posterior.

    Args:
        flow: that of the level.
        centres: (mu, delta, phi_inter, phi_intra) of the level.
        size: (h, w) of the maps.
        group: the only class whose log-density is wanted; None: of all.
    """

    mean: Tensor
    centres: Tensor
    bias: Tensor
    main_centres: Tensor
    main_half_norms: Tensor

    def __init__(
        self, flow: ConditionalFlow, centres: Sequence[Tensor], size: tuple[int, int], group: int | None = None
    ) -> None:
        super().__init__()
        parameters = [tensor.detach() for tensor in flow.blocks]
        weights = subnet.weights_of(parameters, "fp32", factors=(0.1, 0.1))
        position = flow.grid(*size, parameters[0].device)
        tables = subnet.tables_of([] if position is None else [position.column, position.row], parameters, "fp32")
        self.blocks = nn.ModuleList(CouplingGraph(*block, flow.clamp) for block in zip(weights, tables, strict=True))
        self.log_gain = float(torch.cat([block.gain for block in weights]).double().log().sum())
        prior = mixture.prior_of(*(tensor.detach() for tensor in centres))
        classes = slice(None) if group is None else slice(group, group + 1)
        self.shape = tuple(prior.bias[classes].shape)
        for name, tensor in (
            ("mean", prior.mean),
            ("centres", prior.centres[classes].flatten(0, 1).T),
            ("bias", prior.bias[classes].flatten().clamp(min=-MOST)),
            ("main_centres", prior.centres[:, 0].T),
            ("main_half_norms", prior.half_norms[:, 0]),
        ):
            self.register_buffer(name, constant(tensor))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-densities (B, h w, K), in nats, and entropies (B, h w)."""
        log_dets = []
        for block in self.blocks:
            x, log_det = block(x)
            log_dets.append(log_det)
        z, base = mixture.centred(x, self.mean, sum(log_dets) + self.log_gain)
        # `Prior.of_classes` would become ReduceLogSumExp, which some runtimes lack and which makes -inf NaN in others;
        # its products, and those of `Prior.entropy`, are of rows without an axis of images.
        exponents = (z @ self.centres + self.bias).unflatten(-1, self.shape)
        largest = exponents.amax(-1)
        density = largest + (exponents - largest[..., None]).exp().sum(-1).log() + base[..., None]
        return density, mixture.posterior_entropy(z @ self.main_centres - self.main_half_norms)
