"""The hierarchical Gaussian mixture prior: centres and weights of every level, and the losses over them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import ops


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
