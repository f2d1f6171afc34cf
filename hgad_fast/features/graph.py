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

LARGEST = 3e38  # that a finite float32 may be, almost: a comparison with it is no operation that a runtime leaves out


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
        self.register_buffer("mean", constant(backbone.mean))
        self.register_buffer("std", constant(backbone.std))
        self.sizes = backbone.pass_sizes(*size)
        self.out_indices = backbone.out_indices
        net = streamlined(backbone.net, own_padding=False).cpu()
        net = net.to(memory_format=torch.contiguous_format).requires_grad_(False)
        self.nets = nn.ModuleList([net] if backbone.multiple == 1 else [_of_one_size(net, each) for each in self.sizes])
        self.joining = None
        if backbone.mode == "joined":
            stages = self._stages(torch.empty(1, 3, *self.sizes[0], device="meta"), tiles.shadow(self.nets[0]))
            sizes = [(x.shape[2], x.shape[3]) for x in stages]
            self.joining = joining.JoiningGraph(sizes, backbone.stage_strides, backbone.grid)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the features of the images."""
        images = (images - self.mean) / self.std
        levels: list[Tensor] = []
        for size, net in zip(self.sizes, itertools.cycle(self.nets), strict=False):
            resized = images
            if size != tuple(images.shape[2:]):
                resized = F.interpolate(images, size, mode="bilinear", align_corners=True)
            stages = self._stages(resized, net)
            levels += [self.joining(stages)] if self.joining else stages
        return levels

    def _stages(self, images: Tensor, net: nn.Module) -> list[Tensor]:
        """Return the stages (B, C, h, w) that a network makes of normalised images."""
        return joining.stages_of(tiles.channels_first(net, net(images)), self.out_indices)


def constant(tensor: Tensor) -> Tensor:
    """Return a tensor as a graph holds it: a copy on the CPU, in float32, row after row in memory."""
    return tensor.detach().to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)


def sharing_copy(module: Any) -> Any:
    """Return a copy of a module with the tensors of the module itself."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})


def _of_one_size(net: Any, size: tuple[int, int]) -> Any:
    """Return a transformer for images of one size, its position embedding resampled once for all.

    Other embeddings than those that are added to the patches are left as they are. All else is shared.
    """
    net = sharing_copy(net)
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
