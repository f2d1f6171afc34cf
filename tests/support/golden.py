"""The golden files: values that the official code computed in float32 on a CPU, with its inputs and parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from hgad_fast import HGADConfig, HGADModel
from hgad_fast.bench import official

FOLDER = Path(__file__).parents[1] / "golden"
CENTRES = ("mus", "mu_deltas", "phi_inters", "phi_intras")


class Golden:
    """A golden file: its arrays as tensors by their names, and the models that it was computed with.

    `model` has the parameters as this library holds them, `official_flow` and `prior` as the official formulation does.
    """

    def __init__(self, name: str) -> None:
        self.arrays = np.load(FOLDER / f"hgad_{name}.npz")
        self.config = json.loads(str(self.arrays["config_json"]))
        c = self.config
        self.levels = range(c["levels"])
        self.conditional = c["flow_arch"] == "conditional_flow_model"
        self.model = HGADModel(
            HGADConfig(
                n_classes=c["K"],
                n_intra_centers=c["M"],
                backbone_arch=None,
                feature_levels=c["levels"],
                feature_dims=(c["C"],) * c["levels"],
                flow_arch=c["flow_arch"],
                coupling_layers=c["coupling_layers"],
                clamp_alpha=c["clamp_alpha"],
                pos_embed_dim=c["pos_embed_dim"],
                label_smoothing=c["label_smoothing"],
                msk_size=int(self.arrays["score.msk_size"]) if "score.msk_size" in self.arrays else 32,
            )
        )
        state = {key: self[key] for key in self.arrays.files if key.startswith("nfs.")}
        state |= {f"mixture.{part}.{level}": self[f"{part}.{level}"] for part in CENTRES for level in self.levels}
        self.model.load_state_dict(state)

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(self.arrays[key])

    def below(self, prefix: str) -> dict[str, Tensor]:
        """Return the values whose names begin with the prefix, by the rest of their names."""
        return {key.removeprefix(prefix): self[key] for key in self.arrays.files if key.startswith(prefix)}

    def size(self, level: int) -> tuple[int, int]:
        return self.config["H"] >> level, self.config["W"] >> level

    def dense(self, level: int) -> Tensor:
        """Return the positional code as the official loop passes it, (N, P)."""
        code = self[f"level{level}.pos_embed"].permute(1, 2, 0).reshape(-1, self.config["pos_embed_dim"])
        return code.repeat(len(self["labels"]), 1)

    def conditions(self, level: int) -> list[Tensor]:
        return [self.dense(level)] if self.conditional else []

    def labels(self, level: int) -> Tensor:
        h, w = self.size(level)
        return self["labels"].view(-1, 1, 1).repeat(1, h, w)

    def onehot(self, level: int) -> Tensor:
        return official.smoothed_onehot(self.labels(level).flatten(), self.config["K"], self.config["label_smoothing"])

    def score_features(self) -> list[Tensor]:
        """Return the features of the images to be scored, (B, C, h, w) of each level."""
        images, channels = len(self["score.image"]), self.config["C"]
        return [
            self[f"score.level{level}.features"].view(images, *self.size(level), channels).permute(0, 3, 1, 2)
            for level in self.levels
        ]

    def official_flow(self, level: int) -> Module:
        c = self.config
        position_dim = c["pos_embed_dim"] if self.conditional else 0
        flow = official.official_flow(c["C"], position_dim, c["coupling_layers"], c["clamp_alpha"])
        flow.load_state_dict(self.below(f"nfs.{level}."))
        return flow

    def prior(self, level: int) -> dict[str, Tensor]:
        """Return the centres and weights of one level, by the arguments of the official formulation."""
        arguments = dict(zip(("mu", "delta", "phi_inter", "phi_intra"), CENTRES, strict=True))
        return {argument: self[f"{part}.{level}"] for argument, part in arguments.items()}

    def official_inputs(self, level: int, stage: int) -> tuple[Any, ...]:
        """Return the arguments of `official_losses_and_gradients` for one level in stage 1 or 2."""
        prior = {part: tensor.requires_grad_() for part, tensor in self.prior(level).items()}
        x = self[f"level{level}.features"].requires_grad_()
        labels = self.labels(level).flatten()
        return self.official_flow(level), x, self.conditions(level), labels, self.onehot(level), prior, stage


def official_losses_and_gradients(
    flow: Module,
    x: Tensor,
    condition: list[Tensor],
    labels: Tensor,
    onehot: Tensor,
    prior: dict[str, Tensor],
    stage: int,
) -> dict[str, Tensor]:
    """Return loss terms and gradients as the official formulation computes them, by the names in the golden files."""
    terms = official.official_losses(*flow(x, condition), labels, onehot, **prior, stage=stage)
    loss = official.official_loss(terms)
    loss.backward()
    gradients = {part: tensor.grad for part, tensor in zip(CENTRES, prior.values(), strict=True)}
    gradients |= {f"nfs.{part}": tensor.grad for part, tensor in flow.named_parameters()} | {"features": x.grad}
    return {**terms, "loss": loss} | {f"grad.{name}": grad for name, grad in gradients.items() if grad is not None}
