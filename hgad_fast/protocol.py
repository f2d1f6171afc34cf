"""The types by which scoring, training and evaluation know a detector, whatever its method.

A method of detection is defined in `models/`, as a subclass of `models.detector.Detector`; the rest of the library
knows it by this protocol alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .features.backbone import FeatureMaps
from .features.extract import FeatureSet
from .features.preprocess import FeatureSource, ImageSettings


class Settings(ImageSettings, Protocol):
    """The fields of a configuration that every method has."""

    msk_size: int
    meta_epochs: int
    sub_epochs: int
    accumulate: int
    clip_grad_norm: float | None
    calibration_fraction: float
    seed: int
    lr: float

    @property
    def method(self) -> str: ...

    def identity(self) -> str: ...

    def to_json(self) -> str: ...


class Progress(NamedTuple):
    """The position of the next batch in the training."""

    meta_epoch: int
    sub_epoch: int
    batch: int  # its number in the sub-epoch
    batches: int  # their number in a sub-epoch


class ProportionsError(ValueError):
    """An image has other proportions than those that a model of places was fitted to."""


@dataclass
class Densities:
    """The log-densities of the pixels of B images, and the entropies of the groups' posterior.

    Attributes:
        logps: per level (B, h, w), the log-density under the image's group divided by C, in nats per channel.
        neg_entropy: per level (B, h, w), the negative entropy of the groups' posterior, in nats; empty where a method
            has no posterior, or it carries no information.
        group_ids: (B,) int64 on the CPU, the group of each image, given or inferred.
        multipliable: whether `anomalies` are never below 0, so that the maps of several parts can be multiplied.
    """

    multipliable: ClassVar[bool] = True

    logps: list[Tensor]
    neg_entropy: list[Tensor]
    group_ids: Tensor

    @property
    def parts(self) -> dict[str, list[Tensor]]:
        """The densities by name: the anomaly map is the product of the maps that they give, or their weighted sum."""
        return {"likelihood": self.logps} | ({"entropy": self.neg_entropy} if self.neg_entropy else {})

    def alone(self, part: str) -> Densities:
        """Return densities whose map is that of a single one of the `parts`."""
        return replace(self, logps=self.parts[part], neg_entropy=[])

    def anomalies(self, level_max: Tensor, scope: str = "map") -> list[list[Tensor]]:
        """Return how anomalous each pixel is: a list of levels (B, h, w) for each of the `parts`, 0 or more.

        A part x becomes 1 - min(1, exp(x_l - m_l)). For the log-density, m_l is the largest that normal images of the
        group reach at level l; for other parts it is 0, which they cannot exceed. Differences from 1 are computed by
        expm1: the entropy of a posterior that is almost certain is far below the rounding of 1.

        Args:
            level_max: the m_l of each group, (G, S).
            scope: ``"map"``: what the anomaly map is made of. A method may know others, on which image scores are
                computed (`Detector.scored_on`).
        """
        of_groups = level_max.index_select(0, self.group_ids.to(level_max.device))
        constants = of_groups.to(self.logps[0].device)[..., None, None]
        likelihood, *others = self.parts.values()
        anomalies = [[-torch.expm1((x - constants[:, i]).clamp(max=0)) for i, x in enumerate(likelihood)]]
        return anomalies + [[-torch.expm1(x) for x in levels] for levels in others]

    def images(self) -> Iterator[Densities]:
        """Yield the densities of one image after the other, with B = 1."""
        for i in range(len(self.group_ids)):
            logps, neg_entropy = ([x[i : i + 1] for x in levels] for levels in (self.logps, self.neg_entropy))
            yield replace(self, logps=logps, neg_entropy=neg_entropy, group_ids=self.group_ids[i : i + 1])


class About(NamedTuple):
    """What people who are given a model of a method should know of it, in sentences for the model card."""

    what: str  # a phrase: its name, and what it is
    keeps: str  # what of the training images a model file holds
    limits: tuple[str, ...] = ()  # what it cannot do, beyond what no method here can


class OfficialMaps(NamedTuple):
    """The maps and scores of n images by one of the procedures that a method was published with."""

    maps: Tensor  # (n, h, w)
    scores: Tensor  # (n,)
    description: str = ""  # a phrase on what they are; empty: maps normalised by maxima over the images, their maxima


class Detector(FeatureSource, Protocol):
    """An anomaly detector as the library sees it; `models.detector.Detector` documents each member."""

    config: Any  # with the fields of Settings
    calibration: Any  # a `scoring.calibration.Calibration`, or None before there is one
    checkpoint: str

    @property
    def about(self) -> About: ...
    @property
    def stages(self) -> Mapping[int, str]: ...
    @property
    def loss_terms(self) -> Mapping[str, tuple[str, str]]: ...
    @property
    def fusion(self) -> str: ...
    @property
    def pixels_per_step(self) -> int | float | None: ...
    @property
    def density_levels(self) -> int: ...
    @property
    def density_parts(self) -> int: ...
    @property
    def score_share(self) -> float: ...
    @property
    def scored_on(self) -> str: ...
    @property
    def closed_form(self) -> bool: ...
    @property
    def scores_from_zero(self) -> bool: ...
    @property
    def official_aupro(self) -> str: ...
    def begin(self, feature_set: FeatureSet) -> None: ...
    def finish(self, feature_set: FeatureSet) -> None: ...
    def grow(self, name: str, feature_set: FeatureSet) -> str: ...
    def take_images(self, feature_set: FeatureSet) -> bool: ...
    def objective(self, stage: int) -> nn.Module: ...
    def parameter_groups(self) -> list[dict[str, Any]]: ...
    def clip_groups(self) -> list[list[nn.Parameter]]: ...
    def schedule(self, progress: Progress) -> tuple[int, float]: ...
    def densities(self, maps: FeatureMaps, group_ids: Tensor | None) -> Densities: ...
    def density_graph(self, sizes: Sequence[tuple[int, int]], group: int | None = None) -> nn.Module: ...
    def in_float32(self) -> Any: ...
    def official_maps(self, batches: Sequence[Densities]) -> dict[str, OfficialMaps]: ...
    def describe(self) -> dict[str, Any]: ...
    def make_ready(self) -> None: ...
    def convert_checkpoint(self, state: dict[str, Any]) -> dict[str, Any] | None: ...

    # ---- what a torch.nn.Module has
    def train(self, mode: bool = True) -> Any: ...
    def eval(self) -> Any: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def buffers(self) -> Iterator[Tensor]: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any: ...

    # ---- files
    def save(self, path: Any, include_backbone: bool = True) -> None: ...
