"""Squared Mahalanobis distances of pixels to the Gaussian of their place."""

from __future__ import annotations

import torch
from torch import Tensor


def place_distances(x: Tensor, place: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    """Return |(x_n - mean_kp) factor_kp|^2 of each row n and class k, with p the row's place, (N, K)."""
    classes, n_places = factor.shape[:2]
    if len(x) % n_places == 0 and torch.equal(place, torch.arange(n_places).repeat(len(x) // n_places)):
        by_place = x.view(-1, n_places, x.shape[1]).transpose(0, 1)
        squares = [((by_place - mean[k][:, None]) @ factor[k]).square().sum(-1).T.flatten() for k in range(classes)]
    else:
        squares = [((x - mean[k][place])[:, None] @ factor[k][place]).square().sum((1, 2)) for k in range(classes)]
    return torch.stack(squares, 1)
