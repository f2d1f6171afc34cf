"""Several backbones as one: each sees the same image, and gives one level of its joined stages."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import tiles
from .backbone import Backbone, BackboneSettings, FeatureMaps, Pass


def make_backbone(config: BackboneSettings) -> Backbone:
    """Return the backbone of a configuration: one, or several for a `backbone_arch` such as ``"a+b"``."""
    return CompositeBackbone(config) if "+" in str(config.backbone_arch) else Backbone(config)


def weights_of(weights: str | None, n: int) -> list[str | None]:
    """Return what ``backbone_weights`` says for each of n backbones: one for all, or n that are joined by +.

    The list is not of n where there are other numbers of them.
    """
    if weights in (None, "pretrained", "packaged"):
        return [weights] * n
    return [*str(weights).split("+")]


class CompositeBackbone(Backbone):
    """Several timm models, the `members`; images are given to each normalised by its own statistics.

    Level i has the stages of member i, joined on its own grid. All else is as in `Backbone`.
    """

    def __init__(self, config: Any) -> None:
        nn.Module.__init__(self)  # the members have what `Backbone` makes
        self.mode = config.feature_mode
        archs = config.backbone_arch.split("+")
        members = []
        given_weights = weights_of(config.backbone_weights, len(archs))
        for arch, weights, out_indices in zip(archs, given_weights, config.out_indices, strict=True):
            member = copy.copy(config)  # of its class, which errors name
            member.backbone_arch, member.backbone_weights = arch, weights
            member.out_indices, member.feature_levels = out_indices, 1
            members.append(Backbone(member))
        self.arch = "+".join(member.arch for member in members)
        own_weights = [member.weights for member in members]  # others than those given for models of the hub
        self.weights = config.backbone_weights if own_weights == given_weights else "+".join(map(str, own_weights))
        self.members = nn.ModuleList(members)
        self.feature_dims = tuple(dims for member in members for dims in member.feature_dims)
        self.stage_dims = tuple(dims for member in members for dims in member.stage_dims)
        self.fine_stages = tuple(n for member in members for n in member.fine_stages)

    @property
    def _backbones(self) -> list[Backbone]:
        return cast(list[Backbone], list(self.members))

    def normalize(self, images: Tensor) -> Tensor:
        """Return the images as they are: `forward` normalises them for each member."""
        return images

    @torch.no_grad()
    def forward(self, images: Tensor, *, fast: bool = False) -> list[Tensor]:
        """Return the features of images (B, 3, H, W) in [0, 1]: one (B, C, h, w) per level; see `Backbone.forward`."""
        return [x for member in self._backbones for x in member(member.normalize(images), fast=fast)]

    def feature_values(self, height: int, width: int) -> int:
        """Return about how many values the features of an image have."""
        return sum(member.feature_values(height, width) for member in self._backbones)

    def cells(self, length: int) -> int:
        """Return how many cells the first level has along `length` pixels: that on which the map's size depends."""
        return self._backbones[0].cells(length)

    def feature_maps(self, image: Tensor, cut: bool = True) -> FeatureMaps:
        """Return the features of an image (3, H, W) in [0, 1], with `cut` in tiles if it is large."""
        maps = [member.feature_maps(image, cut) for member in self._backbones]

        def pieces() -> Iterator[tuple[int, int, int, Tensor]]:
            for level, member_maps in enumerate(maps):
                for _, top, left, x in member_maps.pieces():
                    yield level, top, left, x

        return FeatureMaps(1, [size for member_maps in maps for size in member_maps.sizes], pieces)

    def passes(self, height: int, width: int, cut: bool = True) -> list[Pass]:
        """Plan the passes over an image of this size, one for each member."""
        return [image_pass for member in self._backbones for image_pass in member.passes(height, width, cut)]

    @property
    def footprint(self) -> tiles.Footprint:
        """The most that any member needs of memory and surroundings."""
        footprints = [member.footprint for member in self._backbones]
        return tiles.Footprint(
            stride=max(footprint.stride for footprint in footprints),
            halo=max(footprint.halo for footprint in footprints),
            is_local=all(footprint.is_local for footprint in footprints),
            bytes_per_pixel=max(footprint.bytes_per_pixel for footprint in footprints),
        )

    @property
    def strides(self) -> list[int]:
        """The strides of the levels, from the finest."""
        return sorted(stride for member in self._backbones for stride in member.strides)

    def working_set(self, height: int, width: int, cut: bool = True) -> int:
        """Return about how many bytes it takes to compute the features of an image: members run one after another."""
        return max(member.working_set(height, width, cut) for member in self._backbones)
