"""The surface of the official HGAD class, with which `HGADModel` takes its place in the official scripts.

Settings come as an `argparse.Namespace`, one level is trained at a time on dense positions, the optimizer belongs to
the model, and official checkpoints can be read.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..files import printable, read_torch_file, require_tensors
from ..modules.flow import ConditionalFlow
from ..modules.mixture import HierarchicalMixture
from ..training.step import make_optimizer
from .config import HGADConfig

Args = argparse.Namespace


def config_from_args(args: Args) -> HGADConfig:
    """Return the settings in the official arguments; fields that the library does not know are ignored.

    Where they do not say otherwise, maps are joined as published, by their product.

    Class names come from ``args.class_to_idx`` (name to index) where the script has set it.
    """
    known_names = {field.name for field in dataclasses.fields(HGADConfig)}
    settings = {name: value for name, value in vars(args).items() if name in known_names}
    class_to_idx = getattr(args, "class_to_idx", None)
    if class_to_idx and settings.get("class_names") is None:
        names = sorted(class_to_idx, key=class_to_idx.__getitem__)
        settings["class_names"] = names if len(names) == settings.get("n_classes", len(names)) else None
    return HGADConfig(**{"fusion": "product"} | settings)


class OfficialSurface:
    """Names, shapes and meaning of the official class; see the official training script for how they are used.

    A mixin of `HGADModel` alone: nothing else of the library calls it.
    """

    config: HGADConfig
    nfs: Any  # an nn.ModuleList of ConditionalFlow, whose items have no type of their own
    mixture: HierarchicalMixture
    scaled: Any  # of HGADModel
    state_dict: Any  # of nn.Module
    load_state_dict: Any
    _optimizer: torch.optim.Adam | None = None

    @property
    def mus(self) -> nn.ParameterList:
        """Main centre of each class, one (K, C) per level."""
        return self.mixture.mus

    @property
    def mu_deltas(self) -> nn.ParameterList:
        """Offsets of the other centres from the main one, one (K, M - 1, C) per level."""
        return self.mixture.mu_deltas

    @property
    def phi_inters(self) -> nn.ParameterList:
        """Unnormalised log-weights of the classes, one (K,) per level."""
        return self.mixture.phi_inters

    @property
    def phi_intras(self) -> nn.ParameterList:
        """Unnormalised log-weights of the centres of a class, one (K, M) per level."""
        return self.mixture.phi_intras

    @property
    def feat_dims(self) -> list[int]:
        """Channels of each level."""
        return [flow.channels for flow in self.nfs]

    @property
    def n_centers_each_class(self) -> int:
        """Number of centres of each class, M."""
        return self.config.n_intra_centers

    @property
    def optimizer(self) -> torch.optim.Adam:
        """The official Adam, made on first use."""
        if self._optimizer is None:
            self._optimizer = make_optimizer(self)  # type: ignore[arg-type]  # the mixin of a Detector
        return self._optimizer

    def forward(
        self,
        x: Tensor,
        y: tuple[Tensor, Tensor | None],
        pos_embed: Tensor | None = None,
        scale: int = 0,
        epoch: int = 0,
    ) -> dict[str, Tensor]:
        """Return the loss terms of one level, each the mean over the pixels.

        Args:
            x: features (N, C), row-major over (image, row, column).
            y: (labels, onehot): labels int64 (B, h, w) or (N,); onehot (N, K), a smoothed or any soft target, used as
                given, or None for the smoothing of the configuration.
            pos_embed: positional code (N, P), or None to build it from labels of shape (B, h, w).
            scale: the level.
            epoch: meta-epoch; below 2 is stage 1, with the inter-class terms only.

        Returns:
            ``L_g``, ``L_mi``, ``L_e`` and in stage 2 ``L_g_intra``, ``L_z``.

        Raises:
            ValueError: shapes do not fit, or `pos_embed` is None and the map's size cannot be known.
        """
        flow: ConditionalFlow = self.nfs[scale]
        labels, onehot = y
        position = self._position(flow, pos_embed, labels)
        z, log_det = flow(self.scaled(x, scale), position)
        smoothing, targets = self.config.label_smoothing, None
        if onehot is not None:
            uniform = _uniform_smoothing(onehot, labels.reshape(-1))
            smoothing, targets = (smoothing, onehot.to(z.dtype)) if uniform is None else (uniform, None)
        losses = self.mixture.losses(
            z,
            log_det,
            _per_image(labels, position),
            scale,
            stage=1 if epoch < 2 else 2,
            label_smoothing=smoothing,
            targets=targets,
        )
        return {name: term.mean() for name, term in losses.items()}

    def _position(self, flow: ConditionalFlow, pos_embed: Tensor | None, labels: Tensor) -> ops.Position:
        """Return the given positions, or those of a map of the labels' size; none where the flow takes none."""
        if pos_embed is not None or not flow.position_dim:
            return flow.position(pos_embed)
        if labels.dim() != 3:
            raise ValueError(
                f"pos_embed is None and labels have shape {tuple(labels.shape)}: pass labels of shape (B, h, w), from "
                "which the positions can be built, or a pos_embed of shape (N, P)"
            )
        return flow.grid(labels.shape[1], labels.shape[2], labels.device)

    def get_logps(self, z: Tensor, mu: Tensor, log_py: Tensor, logdet_J: Tensor, C: int) -> Tensor:
        """Return the log-density of x under a Gaussian mixture, (N,) in nats, not divided by C.

        Args:
            z: (N, C).
            mu: centres (M, C), or (N, M, C) for centres of each pixel's own.
            log_py: log-weights of the centres, (M,) or (N, M).
            logdet_J: log-determinant of the flow (N,).
            C: channels.
        """
        if mu.dim() == 3 and len(mu) and mu.stride(0) == 0:  # as the official validation expands a class's centres
            mu = mu[0]
        squared = _squared_distances(z, mu) if mu.dim() == 2 else (z[:, None] - mu).square().sum(-1)
        return torch.logsumexp(log_py - 0.5 * squared, -1) + logdet_J - 0.5 * C * math.log(2 * math.pi)

    def calculate_distances_to_inter_class_centers(self, z: Tensor, mu: Tensor | None = None) -> Tensor:
        """Return the squared Euclidean distances (N, K) of z (N, C) to centres mu (K, C); None: the first level's."""
        return _squared_distances(z, self.mus[0] if mu is None else mu)

    def calculate_distances_to_intra_class_centers(self, z: Tensor, mu: Tensor) -> Tensor:
        """Return the squared Euclidean distances of z (N, C) to centres mu (K, M, C) or (M, C): (N, K, M) or (N, M)."""
        return _squared_distances(z, mu.flatten(0, -2)).unflatten(1, mu.shape[:-1])

    def load_official_checkpoint(self, checkpoint: str | Path | dict[str, Any]) -> None:
        """Load the flows, centres and weights of a checkpoint that the official code saved.

        Args:
            checkpoint: a path (read with ``weights_only=True``: nothing in the file is executed) or the loaded dict.

        Raises:
            ValueError: the file is no such checkpoint, or was made with other sizes; the model is left as it was.
        """
        name = "the checkpoint" if isinstance(checkpoint, dict) else printable(checkpoint)
        if not isinstance(checkpoint, dict):
            checkpoint = read_torch_file(checkpoint, "PyTorch checkpoint")
        parts = ("nfs", "mus", "mu_deltas", "phi_inters", "phi_intras")
        if not isinstance(checkpoint, dict) or any(part not in checkpoint for part in parts):
            raise ValueError(f"{name} is no official HGAD checkpoint: it must hold {', '.join(parts)}")
        if not isinstance(checkpoint["nfs"], (list, tuple)):
            raise ValueError(f"{name} is no official HGAD checkpoint: nfs is no list of a state dict for each level")
        state: dict[str, Tensor] = {}
        for level, flow in enumerate(checkpoint["nfs"]):
            require_tensors(name, flow)
            state |= {f"nfs.{level}.{key}": tensor for key, tensor in flow.items()}
        for part in parts[1:]:
            require_tensors(name, checkpoint[part])
            state |= {f"mixture.{part}.{level}": tensor for level, tensor in checkpoint[part].items()}
        own = {key: tensor for key, tensor in self.state_dict().items() if key.startswith(("nfs.", "mixture."))}
        misfits = [key for key in own.keys() | state.keys() if _shape(own, key) != _shape(state, key)]
        if misfits:
            first = min(misfits)
            raise ValueError(
                f"{name} does not fit this model in {len(misfits)} tensors; {first} has shape {_shape(state, first)} "
                f"there and {_shape(own, first)} here. Check n_classes, n_intra_centers, feature_levels, "
                "feature_dims, coupling_layers, pos_embed_dim and flow_arch."
            )
        self.load_state_dict(state, strict=False)


def _shape(state: dict[str, Tensor], key: str) -> tuple[int, ...] | None:
    """Return the shape of a tensor in the state; None if there is none of that key."""
    return tuple(state[key].shape) if key in state else None


def _squared_distances(z: Tensor, centres: Tensor) -> Tensor:
    """Return |z - c|^2 (N, K), expanded around the centres' mean, so that large common norms do not cancel."""
    mean = centres.detach().mean(0)
    z, centres = z - mean, centres - mean
    squared = z.square().sum(1, keepdim=True) + centres.square().sum(1) - 2 * z @ centres.T
    return squared.clamp(min=0)


def _per_image(labels: Tensor, position: ops.Position) -> Tensor:
    """Return one label per image (B,) where labels are constant over each image, else one per pixel (N,)."""
    if labels.dim() == 3:
        images = labels.flatten(1)
    elif isinstance(position, ops.SeparablePosition):
        images = labels.reshape(-1, len(position.row) * len(position.column))
    else:
        return labels.reshape(-1)
    constant = images.numel() and bool((images == images[:, :1]).all())
    return images[:, 0].contiguous() if constant else labels.reshape(-1)


def _uniform_smoothing(onehot: Tensor, labels: Tensor) -> float | None:
    """Return e if `onehot` is the smoothed one-hot of the labels, (1 - e) 1[y = k] + e / K, for some e; else None."""
    n, classes = onehot.shape
    if n == 0:
        return 0.0
    own = onehot.gather(1, labels[:, None])
    smoothing = 0.0 if classes == 1 else (1 - float(own[0])) * classes / (classes - 1)
    expected = torch.full_like(onehot, smoothing / classes, dtype=torch.float64)
    expected.scatter_(1, labels[:, None], 1 - smoothing + smoothing / classes)
    return smoothing if bool((onehot - expected).abs().max() <= 1e-6) else None
