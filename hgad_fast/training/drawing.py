"""Which pixels of a feature map take part in a step: all of them, or some that are drawn at random for each step."""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor


class Drawn(NamedTuple):
    """The pixels of a map in which some of its rows and columns cross, so that their positions stay separable."""

    rows: Tensor  # (r,) int64, increasing
    columns: Tensor  # (c,) int64, increasing

    def of(self, pixels: Tensor) -> Tensor:
        """Return these pixels (r c, C), row-major, of a map (h, w, C)."""
        return pixels[self.rows[:, None], self.columns].flatten(0, 1)


class Draw(NamedTuple):
    """The draw of one step, the same for all its images of one size, in all processes and parts of its batch."""

    pixels: int | float | None = None  # of each image, at each level: this number at most, or share; None: all
    seed: int = 0
    step: int = 0  # its number in the training

    def at(self, level: int, height: int, width: int) -> Drawn | None:
        """Return the pixels that are drawn from the maps of a level and size; None: all, as there are no more of them.

        They depend on seed, step, level and size alone, and each pixel is as likely as any other.
        """
        pixels = pixel_count(self.pixels, height * width)
        if pixels == height * width:
            return None
        rows, columns = drawn_shape(pixels, height, width)
        # torch keeps 32 bits of a seed, and the generators of seeds that differ in few bits begin alike.
        digest = hashlib.sha256(f"{self.seed} {self.step} {level}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        drawn = [
            torch.randperm(length, generator=generator)[:count].sort().values
            for length, count in ((height, rows), (width, columns))
        ]
        return Drawn(*drawn)


EVERY_PIXEL = Draw()


def pixel_count(pixels: int | float | None, of: int) -> int:
    """Return how many of the pixels of a map are asked for: a number (int), a share (float) or all (None)."""
    if pixels is None:
        return of
    return min(of, pixels) if isinstance(pixels, int) else max(1, round(pixels * of))


def drawn_shape(pixels: int, height: int, width: int) -> tuple[int, int]:
    """Return how many rows and columns of a larger map give about this many pixels, and no more.

    Their proportions are those of the map, as far as whole numbers go.
    """
    rows = min(height, pixels, max(math.ceil(pixels / width), round(math.sqrt(pixels * height / width))))
    columns = pixels // rows
    return min(height, pixels // columns), columns
