"""The hierarchical Gaussian mixture prior: centres and weights of every level, and the losses over them."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import ops

EM_ROUNDS = 100  # at most
EM_GAIN = 1e-4  # nats of the mean log-density of a latent, below which a round is the last


class HierarchicalMixture(nn.Module):
    """K classes of M unit-covariance Gaussians for each level (HGAD, sections 3.2 to 3.4).

    Attributes:
        mus: main centre of each class, one (K, C) per level.
        mu_deltas: offsets of the other centres from it, one (K, M - 1, C) per level.
        phi_inters: unnormalised log-weights of the classes, one (K,) per level.
        phi_intras: unnormalised log-weights of the centres of a class, one (K, M) per level.
    """

    def __init__(self, feature_dims: Sequence[int], n_classes: int, n_intra_centers: int) -> None:
        super().__init__()
        offsets = n_intra_centers - 1
        self.mus = nn.ParameterList(initial_centres(n_classes, channels) for channels in feature_dims)
        self.mu_deltas = nn.ParameterList(torch.randn(n_classes, offsets, channels) for channels in feature_dims)
        self.phi_inters = nn.ParameterList(torch.zeros(n_classes) for _ in feature_dims)
        self.phi_intras = nn.ParameterList(torch.zeros(n_classes, n_intra_centers) for _ in feature_dims)

    def level(self, level: int) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter, nn.Parameter]:
        """Return (mu, delta, phi_inter, phi_intra) of a level, in the order of the operations' arguments."""
        return self.mus[level], self.mu_deltas[level], self.phi_inters[level], self.phi_intras[level]

    def extended(self, levels: Sequence[tuple[Tensor, Tensor, Tensor]]) -> HierarchicalMixture:
        """Return a mixture with one class more, the last; `levels` has its mu (C,), delta (M - 1, C), phi_intra (M,).

        The class has the mean weight of the others, whose weights stay as they are relative to each other.
        """
        extended = copy.deepcopy(self)
        for level, (mu, delta, phi_intra) in enumerate(levels):
            phi_inters = self.phi_inters[level].detach()
            phi_inter = phi_inters.logsumexp(0) - math.log(len(phi_inters))
            new = {"mus": mu, "mu_deltas": delta, "phi_inters": phi_inter, "phi_intras": phi_intra}
            for name, row in new.items():
                known = getattr(self, name)[level]
                getattr(extended, name)[level] = nn.Parameter(torch.cat([known.detach(), row.to(known)[None]]))
        return extended

    def losses(
        self,
        z: Tensor,
        log_det: Tensor,
        labels: Tensor,
        level: int,
        *,
        stage: int,
        label_smoothing: float,
        targets: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the loss terms of every pixel; see `ops.mixture_losses`."""
        return ops.mixture_losses(
            z,
            log_det,
            labels,
            *self.level(level),
            stage=stage,
            label_smoothing=label_smoothing,
            targets=targets,
        )

    def scores(
        self, z: Tensor, log_det: Tensor, level: int, labels: Tensor | None = None, *, per_class: bool = False
    ) -> ops.MixtureScores:
        """Return the densities of every pixel; see `ops.mixture_scores`."""
        return ops.mixture_scores(z, log_det, *self.level(level), labels, per_class=per_class)

    def own_scores(self, z: Tensor, log_det: Tensor, level: int, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-density under the own class, and the entropy, of every pixel; see `ops.own_class_scores`."""
        return ops.own_class_scores(z, log_det, *self.level(level), labels)


def initial_centres(n_classes: int, channels: int) -> Tensor:
    """Return well separated main centres (K, C).

    They are the official ones: 5 / sqrt(2C // K) times the identity, tiled along the channels. With more classes than
    channels these would all be zero, so that no class could be told from another; the centres are then random
    directions of the length that the official ones approach, 5 / sqrt(2).
    """
    if n_classes > channels:
        directions = nn.functional.normalize(torch.randn(n_classes, channels), dim=1)
        return directions * (5 / math.sqrt(2))
    centres = torch.zeros(n_classes, channels)
    if centres.is_meta:  # shapes alone are wanted, and for `eye` torch would import its compiler
        return centres
    repeats = channels // n_classes
    spread = 5 / math.sqrt(2 * channels // n_classes)
    centres[:, : repeats * n_classes] = torch.eye(n_classes).repeat(1, repeats) * spread
    return centres


def fitted_centres(z: Tensor, centres: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return mu (C,), delta (M - 1, C) and phi_intra (M,) of one class, fitted to its latents (N, C), in float64.

    The main centre is the mean, the likeliest one of a single unit-covariance Gaussian. The other `centres` - 1, and
    the weights of all, are fitted by expectation maximisation, from random latents that lie far from those chosen
    before (k-means++, Arthur and Vassilvitskii 2007). The main centre stays, as in training (see `ops.mixture_losses`).
    """
    generator = torch.Generator().manual_seed(seed)
    z = z.double().cpu()
    mu = z.mean(0)
    z = z - mu  # from here on centres are offsets from the main one
    squares = z.square().sum(1)
    offsets = z.new_zeros(centres, z.shape[1])
    nearest = squares.clone()
    for m in range(1, centres):
        if nearest.sum() > 0:
            offsets[m] = z[torch.multinomial(nearest / nearest.sum(), 1, generator=generator)[0]]
        nearest = torch.minimum(nearest, (z - offsets[m]).square().sum(1))
    log_weights, before = z.new_full((centres,), -math.log(centres)), -math.inf
    for _ in range(EM_ROUNDS):
        exponents = z @ offsets.T - 0.5 * offsets.square().sum(1) + log_weights
        evidence = exponents.logsumexp(1)
        shares = (exponents - evidence[:, None]).exp()
        counts = shares.sum(0)
        moved = counts > 1  # a centre of less than a latent stays
        moved[0] = False
        offsets[moved] = (shares.T @ z)[moved] / counts[moved, None]
        log_weights = (counts.clamp(min=1) / len(z)).log()
        mean_evidence = float((evidence - 0.5 * squares).mean())
        if mean_evidence - before < EM_GAIN:
            break
        before = mean_evidence
    return mu, offsets[1:], log_weights
