"""Coupling blocks drawn for the tests of the kernels, and sizes that meet every way in which a kernel cuts its work."""

from __future__ import annotations

from typing import Any, NamedTuple

import rounding
import torch
from torch import Tensor

from hgad_fast import ops
from hgad_fast.modules.flow import ConditionalFlow

BLOCKS = {  # channels, positional channels, blocks, images, height, width; a patch has 4 rows of 16 pixels
    "three blocks, two images, a patch and a row": (29, 8, 3, 2, 5, 7),
    "patches cut at the right and below": (37, 8, 1, 2, 5, 17),
    "extents of several powers of two": (72, 4, 1, 1, 3, 5),
    "unconditional, pixels beyond a tile": (29, 0, 2, 1, 1, 70),
    "one pixel": (37, 4, 2, 1, 1, 1),
    "two channels": (2, 4, 1, 1, 3, 3),
    "a column of pixels, images side by side": (6, 12, 1, 2, 9, 1),
    "a row of pixels, no channel to add": (24, 4, 1, 1, 1, 35),
}


class Blocks(NamedTuple):
    """Features of (images, height, width), and blocks far from their initialisation, so that every term counts."""

    x: Tensor
    position: ops.SeparablePosition | None
    blocks: ops.Blocks

    @classmethod
    def draw(cls, channels: int, position_dim: int, layers: int, images: int, height: int, width: int) -> Blocks:
        flow = ConditionalFlow(channels, layers, position_dim).requires_grad_(False)
        flow.global_scale.add_(torch.randn(layers, 1, channels))
        flow.global_offset.copy_(torch.randn(layers, 1, channels))
        flow.w2.mul_(5)
        return cls(torch.randn(images * height * width, channels), flow.grid(height, width), flow.blocks)

    def exact_and_tolerance(self, clamp: float = 1.9, precision: str = "fp32") -> tuple[Any, Any]:
        """Return z and log_det by the definition, and their rounding in the precision."""

        def definition(x: Tensor, position: ops.SeparablePosition | None, blocks: ops.Blocks) -> tuple[Tensor, Tensor]:
            return ops.flow_definition(x, blocks, position, clamp=clamp, precision=precision)

        return rounding.exact_and_tolerance(definition, self.x, self.position, self.blocks)

    def check(self, result: tuple[Tensor, Tensor], clamp: float = 1.9, precision: str = "fp32") -> None:
        rounding.assert_within(tuple(result), *self.exact_and_tolerance(clamp, precision))

    def arguments(self) -> list:
        return [self.x, list(self.position or ()), self.blocks]
