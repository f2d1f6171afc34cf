"""The official formulation that the library is measured against, and the reference of the contract tests.

It restates HGAD (arXiv 2403.13349) the way its official implementation computes it: flow blocks of FrEIA, a dense
positional code, every distance materialised.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..modules.flow import ConditionalFlow, official_names
from ..ops import Blocks

LOG_2PI = math.log(2 * math.pi)


def official_flow(channels: int, position_dim: int, blocks: int, clamp: float = 1.9) -> nn.Module:
    """Return the official flow of one level, `SequenceINN` of `AllInOneBlock`; unconditional if `position_dim` is 0.

    Call it as `flow(x, [position])` with x (N, C) and position (N, P); it returns z (N, C) and log_det (N,).
    Its state dict has the names of official checkpoints. Its rotations come from NumPy's global random state.

    Raises:
        ImportError: FrEIA is not installed.
    """
    try:
        from FrEIA import framework, modules
    except ImportError as error:
        raise ImportError(
            "the official formulation is built from FrEIA blocks: pip install 'hgad_fast[bench]'"
        ) from error

    def subnet(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, 2 * inputs), nn.ReLU(), nn.Linear(2 * inputs, outputs))

    flow = framework.SequenceINN(channels)
    condition: dict[str, Any] = {"cond": 0, "cond_shape": (position_dim,)} if position_dim else {}
    for _ in range(blocks):
        flow.append(
            modules.AllInOneBlock,
            **condition,
            subnet_constructor=subnet,
            affine_clamping=clamp,
            global_affine_init=1.0,
            global_affine_type="SOFTPLUS",
            permute_soft=True,
        )
    return flow


def official_position(position_dim: int, height: int, width: int) -> Tensor:
    """Return the sinusoidal code (P, h, w): columns in the first half of the channels, rows in the second."""
    half = position_dim // 2
    frequency = torch.exp(torch.arange(0, half, 2) * (-math.log(1e4) / half))
    column = torch.arange(width)[None, :] * frequency[:, None]
    row = torch.arange(height)[None, :] * frequency[:, None]
    code = torch.empty(position_dim, height, width)
    code[0:half:2] = column.sin()[:, None, :]
    code[1:half:2] = column.cos()[:, None, :]
    code[half::2] = row.sin()[:, :, None]
    code[half + 1 :: 2] = row.cos()[:, :, None]
    return code


def dense_position(position_dim: int, images: int, height: int, width: int) -> Tensor:
    """Return `official_position` repeated for every image, (images * h * w, P), as the official loop passes it."""
    code = official_position(position_dim, height, width)
    return code.expand(images, -1, -1, -1).permute(0, 2, 3, 1).reshape(-1, position_dim)


def smoothed_onehot(labels: Tensor, n_classes: int, smoothing: float) -> Tensor:
    """Return uniformly smoothed targets (N, K) of labels (N,)."""
    return F.one_hot(labels, n_classes) * (1 - smoothing) + smoothing / n_classes


def negative_half_squared_distances(z: Tensor, centres: Tensor) -> Tensor:
    """Return -|z - c|^2 / 2 of z (N, C) to centres (R, C), (N, R), by the expansion of the square."""
    cross = z @ centres.t()
    return -0.5 * (z.square().sum(1, keepdim=True) - 2 * cross + centres.square().sum(1))


def log_density(z: Tensor, centres: Tensor, log_weights: Tensor, log_det: Tensor) -> Tensor:
    """Return the natural-log density (N,) of z (N, C) under mixtures of centres (N, M, C) and log_weights (N, M)."""
    distances = (z[:, None] - centres).square().sum(2)
    return torch.logsumexp(log_weights - 0.5 * distances, 1) + log_det - z.shape[1] / 2 * LOG_2PI


def intra_class_centres(mu: Tensor, delta: Tensor) -> Tensor:
    """Return the centres (K, M, C) from main centres mu (K, C) and offsets delta (K, M - 1, C)."""
    return torch.cat([mu[:, None], mu[:, None] + delta], 1)


def official_losses(
    z: Tensor,
    log_det: Tensor,
    labels: Tensor,
    onehot: Tensor,
    mu: Tensor,
    delta: Tensor,
    phi_inter: Tensor,
    phi_intra: Tensor,
    stage: int,
) -> dict[str, Tensor]:
    """Return the loss terms of the paper's section 3, means over pixels, with every distance materialised.

    Args:
        z, log_det: output of the flow, (N, C) and (N,).
        labels: class of each pixel, (N,) int64.
        onehot: target distribution over the classes, (N, K); exactly one entry of a row exceeds one half.
        mu, delta, phi_inter, phi_intra: parameters, (K, C), (K, M - 1, C), (K,), (K, M).
        stage: 1 leaves out the intra-class terms, 2 has all of them.
    """
    channels = z.shape[1]
    n_classes, n_centres = phi_intra.shape

    distances = negative_half_squared_distances(z, mu)
    log_prior = F.log_softmax(phi_inter, 0)
    log_joint = torch.logsumexp(distances + log_prior, 1)
    log_prior = log_prior.detach()
    log_posterior = F.log_softmax(distances + log_prior, 1)
    log_responsibility = F.log_softmax(distances, 1)
    terms = {
        "L_g": (-(log_joint + log_det) / channels).mean(),
        "L_mi": (onehot * (log_posterior - log_prior)).sum(1).mean(),
        "L_e": -(log_responsibility.exp() * log_responsibility).sum(1).mean(),
    }
    if stage == 1:
        return terms

    centres = intra_class_centres(mu.detach(), delta)
    log_weights = F.log_softmax(phi_intra, 1)[labels]
    to_every_centre = negative_half_squared_distances(z, centres.flatten(0, 1))
    to_own_centres = to_every_centre.view(-1, n_classes, n_centres)[onehot > 0.5]
    log_intra = torch.logsumexp(to_own_centres + log_weights, 1)
    terms["L_g_intra"] = (-(log_intra + log_det) / channels).mean()
    terms["L_z"] = -F.logsigmoid(log_density(z, centres[labels], log_weights, log_det) / channels).mean()
    return terms


def official_loss(terms: dict[str, Tensor], lambda1: float = 1.0, lambda2: float = 100.0) -> Tensor:
    """Return what is minimised: lambda1 L_g - lambda2 L_mi + L_e, plus the intra-class terms where there are any."""
    intra = (terms[name] for name in ("L_g_intra", "L_z") if name in terms)
    return lambda1 * terms["L_g"] - lambda2 * terms["L_mi"] + terms["L_e"] + sum(intra)


def official_scores(
    z: Tensor,
    log_det: Tensor,
    mu: Tensor,
    delta: Tensor,
    phi_intra: Tensor,
    classes: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what pixels are scored by: log-density / C of each class (N, len(classes)), and negative entropy (N,).

    A column is what the official code computes when told that all images show the class; None is all classes.
    """
    centres = intra_class_centres(mu, delta)
    log_weights = F.log_softmax(phi_intra, 1)
    of_class = [
        log_density(z, centres[k].expand(len(z), -1, -1), log_weights[k].expand(len(z), -1), log_det)
        for k in (range(len(mu)) if classes is None else classes)
    ]
    log_responsibility = F.log_softmax(negative_half_squared_distances(z, mu), 1)
    negative_entropy = (log_responsibility.exp() * log_responsibility).sum(1)
    return torch.stack(of_class, 1) / z.shape[1], negative_entropy


def official_map(levels: list[Tensor], map_size: int) -> Tensor:
    """Return the map (B, s, s) from scores (B, h, w) of each level: one of `official_scores`, for images of one class.

    The product of the maps of the log-density and of the negative entropy is the published anomaly map.
    """
    from scipy.ndimage import gaussian_filter

    size = (map_size, map_size)
    total = torch.zeros(())
    for score in levels:
        normality = (score - score.max()).exp()[:, None]
        total = total + F.interpolate(normality, size, mode="bilinear", align_corners=True)[:, 0]
    return torch.stack(
        [torch.from_numpy(gaussian_filter(image.numpy(), sigma=4)) for image in (total.max() - total).cpu()]
    )


class DefinitionFlow(ConditionalFlow):
    """The flow as `ops.flow_definition` states it, called like `official_flow`: the peer where FrEIA is missing."""

    def forward(self, x: Tensor, condition: Any = None, rev: bool = False) -> tuple[Tensor, Tensor]:
        return ops.flow_definition(x, self.blocks, condition[0], clamp=self.clamp, inverse=rev)


def named_gradients(flow: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of a flow, ours or the official one, under the names of official checkpoints."""
    if not isinstance(flow, ConditionalFlow):
        return {name: p.grad for name, p in flow.named_parameters() if p.grad is not None}
    gradients = Blocks._make(torch.zeros_like(p) if p.grad is None else p.grad for p in flow.blocks)
    return {name: grad for name, grad in official_names(gradients).items() if "w_perm" not in name}


def has_freia() -> bool:
    return importlib.util.find_spec("FrEIA") is not None


class OfficialLevel(nn.Module):
    """One level of the official model: its flow, and the parameters of its mixture."""

    def __init__(self, flow: nn.Module, mu: Tensor, delta: Tensor, phi_inter: Tensor, phi_intra: Tensor) -> None:
        super().__init__()
        self.flow = flow
        self.mu, self.delta = nn.Parameter(mu), nn.Parameter(delta)
        self.phi_inter, self.phi_intra = nn.Parameter(phi_inter), nn.Parameter(phi_intra)

    @classmethod
    def of(cls, model: Any, level: int = 0) -> OfficialLevel:
        """Return a copy of one level of an `HGADModel`, on its device; without FrEIA its flow is a `DefinitionFlow`."""
        config = model.config
        mixture = [part[level] for part in (model.mus, model.mu_deltas, model.phi_inters, model.phi_intras)]
        channels, layers, position_dim = mixture[0].shape[1], config.coupling_layers, config.pos_embed_dim
        if has_freia():
            flow = official_flow(channels, position_dim, layers, config.clamp_alpha)
        else:
            flow = DefinitionFlow(channels, layers, position_dim, config.clamp_alpha)
        flow.load_state_dict(model.nfs[level].state_dict())
        return cls(flow, *(part.detach().clone() for part in mixture)).to(mixture[0].device)

    @property
    def mixture(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.mu, self.delta, self.phi_inter, self.phi_intra

    def forward(self, x: Tensor, labels: Tensor, onehot: Tensor, position: Tensor, stage: int) -> dict[str, Tensor]:
        """Return the loss terms of features x (N, C); the other arguments as in `official_losses`, position (N, P)."""
        z, log_det = self.flow(x, [position])
        return official_losses(z, log_det, labels, onehot, *self.mixture, stage)

    def optimizer(self, lr: float = 2e-4) -> torch.optim.Adam:
        """Return Adam as published."""
        groups: list[dict[str, Any]] = [
            {"params": list(self.flow.parameters()), "weight_decay": 1e-4},
            {"params": [self.mu, self.delta]},
            {"params": [self.phi_inter, self.phi_intra]},
        ]
        return torch.optim.Adam(groups, lr=lr, betas=(0.95, 0.99))
