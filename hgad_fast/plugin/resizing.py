"""Images as a model sees them, as a graph of plain operations: Pillow's Lanczos filter is a matrix along each axis.

Symbols: B images; H x W pixels, as they come; h x w pixels, as the model sees them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..data.images import centre_crop_geometry
from ..export.graph import SLACK
from ..features.graph import LARGEST, constant
from ..features.preprocess import Seeing, seen_shape

LARGEST_SIDE = 2**15  # pixels of a side of an image: twice their product with those of a seen side is an int32


class Resizing(nn.Module):
    """Images (B, 3, H, W) of any size -> images (B, 3, h, w) in [0, 1], as `preprocess` gives them to 1e-6.

    A second output says of each image (B,) whether it is one that the model sees at this size, with values in [0, 1].
    With fixed H and W the matrices are constants; otherwise they are made of the sizes of the images.

    Args:
        config: how the model sees images; its `img_size` is that at which it is calibrated.
        seen: h and w.
        input_size: H and W of all images; None: any.

    Raises:
        ValueError: images of these sizes are seen at another size, or the size at which any are seen is not fixed.
    """

    rows: Tensor | None
    columns: Tensor | None

    def __init__(self, config: Seeing, seen: tuple[int, int], input_size: tuple[int, int] | None) -> None:
        super().__init__()
        self.seen, self.input_size = seen, input_size
        self.crops, self.any_proportions = config.center_crop, config.center_crop or config.square
        rows = columns = None
        if input_size is None:
            if isinstance(config.img_size, str):
                raise ValueError(
                    "input_size is None, and the model sees images at their own sizes (img_size='native'), each of "
                    "which takes a graph of its own: give the (height, width) of the images as input_size"
                )
        else:
            if (own := seen_shape(input_size, config)) != seen:
                raise ValueError(
                    f"input_size is {by(input_size)}: the model sees such images at {by(own)}, and the graph is made "
                    f"for what it sees at {by(seen)}; give an input_size of these proportions, or seen={own}"
                )
            resized, self.start = seen, (0, 0)
            if self.crops:
                resized, *start = centre_crop_geometry(*input_size, config.img_size)
                self.start = (start[0], start[1])
            axes = zip(input_size, resized, self.start, seen, strict=True)
            rows, columns = (None if n == m else constant(lanczos(n, m, a, k, torch.float64)) for n, m, a, k in axes)
        self.register_buffer("rows", rows)
        self.register_buffer("columns", None if columns is None else columns.T.contiguous())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images as the model sees them, and which of them are such."""
        low, high = images.amin((1, 2, 3)), images.amax((1, 2, 3))
        valid = (low >= -SLACK) & (high <= 1 + SLACK)
        rows, columns = self.rows, self.columns
        if self.input_size is None:
            rows, columns, fits = self._made_of_sizes(images)
            valid = valid & fits
        elif self.crops:  # an axis that keeps its size has no matrix
            (top, left), (h, w) = self.start, self.seen
            images = images if rows is not None else images[:, :, top : top + h]
            images = images if columns is not None else images[..., left : left + w]
        if columns is not None:
            images = images @ columns
        if rows is not None:
            images = rows @ images
        finite = (images.abs() <= LARGEST).flatten(1).all(1)  # a NaN of an image is in all that a product makes of it
        return images.clamp(0, 1), valid & finite

    def _made_of_sizes(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the matrices (h, H) and (W, w) for images, and whether they have the proportions of those seen."""
        height, width = (torch.full((), images.shape[axis], device=images.device) for axis in (2, 3))
        short, side = torch.minimum(height, width), min(self.seen)
        fits = short > 0
        resized: list[Any] = list(self.seen)
        start: list[Any] = [0, 0]
        if self.crops:
            resized = [floored(side * n, short) for n in (height, width)]
            start = [half(n - side) for n in resized]
        elif not self.any_proportions:
            for n, seen in zip((height, width), self.seen, strict=True):
                # the nearest whole number to side * n / short, and between two the even one
                fits = fits & (2 * (side * n - seen * short).abs() < short + 1 - seen % 2)
        axes = zip(images.shape[2:], resized, start, self.seen, strict=True)
        rows, columns = (lanczos(n, m, a, k, images.dtype, images.device) for n, m, a, k in axes)
        return rows, columns.T, fits


def lanczos(
    n: int, resized: Any, start: Any, count: int, dtype: torch.dtype, device: torch.device | None = None
) -> Tensor:
    """Return the matrix (count, n) that resamples an axis, as Pillow does, for a part of the resampled positions.

    Positions are whole multiples of 1 / (2 resized) of a pixel: their differences have no rounding, in float32 either.

    Args:
        n: pixels of the axis.
        resized: to how many it is resampled, a number or () int64.
        start: the first position that is wanted, a number or () int64.
        count: how many are wanted.
        dtype: of the matrix.
        device: of the matrix.
    """
    every, wanted = torch.arange(n, device=device), torch.arange(count, device=device) + start
    offsets = (2 * every + 1) * resized - (2 * wanted[:, None] + 1) * n
    larger = torch.maximum(*(torch.full((), 1, device=device) * length for length in (n, resized)))
    distance = offsets.to(dtype) / (2 * larger).to(dtype)  # in zeros of the filter, which is scaled by a reduction
    whole = distance == distance.round()
    apart = torch.where(whole, 0.5, distance)
    third = torch.sin(apart * (math.pi / 3)).square()
    # sin(3 a) = sin(a) (3 - 4 sin(a)^2), so that sinc(x) sinc(x / 3) takes one sine
    weights = 3 * third * (3 - 4 * third) / (apart * math.pi).square()
    weights = torch.where(whole, (offsets == 0).to(dtype), torch.where(distance.abs() < 3, weights, 0.0))
    return weights / weights.sum(1, keepdim=True)


def floored(n: Tensor, divisor: Tensor | int) -> Tensor:
    """Return the quotient of whole numbers from 0, rounded down.

    Exporters divide whole numbers as floats, and runtimes multiply by a reciprocal: 6208 / 97 becomes 63.999996.
    """
    quotient = (n.float() / divisor).long()
    rest = n - quotient * divisor
    return quotient + (rest >= divisor).long() - (rest < 0).long()


def half(n: Tensor) -> Tensor:
    """Return half of a whole number from 0, rounded as Python does: between two numbers to the even one."""
    below = floored(n, 2)
    odd = below - 2 * floored(below, 2)
    return below + (n - 2 * below) * odd


def by(size: tuple[int, int]) -> str:
    """Return a size as errors write it: height x width."""
    return f"{size[0]} x {size[1]}"
