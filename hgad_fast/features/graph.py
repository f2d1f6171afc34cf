"""Backbones as plain operations on images of one size, for other runtimes to run: images -> features of each level."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import joining, tiles
from .backbone import Backbone
from .composite import CompositeBackbone
from .streamlined import streamlined


class BackboneGraph(nn.Module):
    """What a `Backbone` computes of images (B, 3, H, W) in [0, 1]: one (B, C, h, w) a level, as in scoring to rounding.

    Args:
        backbone: the backbone.
        size: H and W.

    Raises:
        ValueError: the network does not take images of this size.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Backbone, size: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("mean", backbone.mean.detach().cpu().clone())
        self.register_buffer("std", backbone.std.detach().cpu().clone())
        self.sizes = backbone.pass_sizes(*size)
        self.out_indices, self.strides, self.grid = backbone.out_indices, backbone.stage_strides, backbone.grid
        self.joins = backbone.mode == "joined"
        net = streamlined(copy.deepcopy(backbone.net).cpu(), own_padding=False)
        net = net.to(memory_format=torch.contiguous_format).requires_grad_(False)
        self.nets = nn.ModuleList([net] if backbone.multiple == 1 else [_of_one_size(net, each) for each in self.sizes])

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the features of the images."""
        images = (images - self.mean) / self.std
        levels = []
        for size, net in zip(self.sizes, itertools.cycle(self.nets), strict=False):
            resized = images
            if size != tuple(images.shape[2:]):
                resized = F.interpolate(images, size, mode="bilinear", align_corners=True)
            layers = net(resized)
            stages = joining.stages_of(tiles.channels_first(net, layers), self.out_indices)
            levels += [joining.joined_plainly(stages, self.strides, self.grid)] if self.joins else stages
        return levels


def _of_one_size(net: Any, size: tuple[int, int]) -> Any:
    """Return a copy of a transformer for images of one size, its position embedding resampled once for all.

    Other embeddings than those that are added to the patches are left as they are.
    """
    net = copy.deepcopy(net)
    model = getattr(net, "model", net)
    resampled = getattr(model, "dynamic_img_size", False) and hasattr(model, "set_input_size")
    if resampled and getattr(model, "rope", None) is None:
        with torch.no_grad():
            model.set_input_size(img_size=size)
        model.dynamic_img_size, model.patch_embed.flatten = False, True
    return net


class CompositeGraph(nn.Module):
    """What a `CompositeBackbone` computes: the levels of all of its members."""

    def __init__(self, backbone: CompositeBackbone, size: tuple[int, int]) -> None:
        super().__init__()
        members: Any = backbone.members
        self.members = nn.ModuleList(BackboneGraph(member, size) for member in members)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the features of the images."""
        return [level for member in self.members for level in member(images)]


class EncoderGraph(nn.Module):
    """An encoder of the user's own, as scoring calls it."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).cpu().requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the features of the images."""
        return list(self.encoder(self.encoder.normalize(images)))


def image_graph(encoder: nn.Module, size: tuple[int, int]) -> nn.Module:
    """Return what an encoder computes of images (B, 3, H, W) in [0, 1] as a module that can be exported.

    Args:
        encoder: a `Backbone`, or an encoder of the user's own.
        size: H and W.
    """
    if isinstance(encoder, CompositeBackbone):
        return CompositeGraph(encoder, size)
    return BackboneGraph(encoder, size) if isinstance(encoder, Backbone) else EncoderGraph(encoder)
