"""Masks of defects: which pixels a mask file marks, and what in it does not look like a mask."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..files import printable
from .images import ImageError, Pixels, read_pixels, within_memory
from .listing import list_images

NOISE = 8 / 255
"""Values up to this are background in a mask that reaches one half, unless they form areas as labels do."""

_RINGING = 16 / 255  # a JPEG mask without larger values is blank
_LABELS = 16  # more levels than these are no labels, in a format that may have lost something
_MOST = 0.5  # a mask that marks a larger share of its image may be inverted


@dataclass(frozen=True)
class Mask:
    """A mask as it was read.

    Attributes:
        marked: (H, W) bool, true where there is a defect.
        remarks: what in it does not look like a mask, by kind: what was made of it, and which pixels hang on that.
    """

    marked: Tensor
    remarks: dict[str, str]


def read_mask(path: str | os.PathLike[str]) -> Tensor:
    """Read a mask file as (H, W) bool: true where any channel is above zero (0/1, 0/255, grey levels, colours).

    - Where the colour is the same everywhere and alpha is not, alpha is the mask. Where both differ, pixels that are
      wholly transparent are unmarked; but if the colour marks no other, alpha is the mask. Of alpha that is above 8 of
      255 everywhere, the upper half of its range is marked.
    - In a palette, colours count, and not indices; but if no colour that the mask uses is black, index 0 is the
      background, if it has most of the image's border. If all colours that it uses are the same, indices count: those
      above 0, or if there is no 0, those other than the one that has most of the border.
    - Values up to 8 of 255 beside values of one half or more are noise, and unmarked, unless they form areas as labels
      do (a quarter of them have four neighbours of their own value, and other pixels are zero).
    - In a JPEG, whose edges ring, the bound is one half of the mask's largest value, and a mask without values above 16
      of 255 is blank. So it is in lossy WebP and JPEG 2000 of more than two levels, and in JPEG 2000 and AVIF that do
      not say whether they are lossy of more than 16, as labels have fewer.

    For a folder, return the union of the masks in it. `inspect_mask` tells what is doubtful about a mask.

    Raises:
        ImageError: as in `read_image`, and for a folder without masks or with masks of several sizes.
    """
    return inspect_mask(path).marked


def inspect_mask(path: str | os.PathLike[str]) -> Mask:
    """Read a mask as `read_mask` does, and remark on what in it may be a mistake.

    Raises:
        ImageError: as `read_mask`.
    """
    path = Path(path)
    with within_memory(path):
        return _with_share(path, _union(path) if path.is_dir() else _inspected(path))


def _union(folder: Path) -> Mask:
    """Return the union of the masks in a folder."""
    parts = [_inspected(file) for file in list_images(folder)]
    if len({part.marked.shape for part in parts}) != 1:
        reason = "its masks differ in size" if parts else "there is no mask in this folder"
        raise ImageError(folder, f"{reason}; they belong to one image, and have its size")
    remarks = {kind: text for part in parts for kind, text in part.remarks.items()}
    return Mask(torch.stack([part.marked for part in parts]).any(0), remarks)


def _with_share(path: Path, mask: Mask) -> Mask:
    """Return the mask with a remark if it marks most of its image."""
    share = int(mask.marked.count_nonzero()) / mask.marked.numel()
    if share <= _MOST:
        return mask
    text = f"{printable(path)} marks {share:.0%} of its image: inverted? The defect is above zero, the rest zero"
    return Mask(mask.marked, {"mask that covers most of its image": text, **mask.remarks})


def _inspected(path: Path) -> Mask:
    """Return the mask of one file, without a look at how much it covers."""
    pixels = read_pixels(path, for_mask=True)
    with within_memory(path, pixels.values.shape[:2]):
        return _judged(path, pixels)


def _judged(path: Path, pixels: Pixels) -> Mask:
    """Return what the pixels of a mask file mark."""
    values = _levels(pixels.values)
    remarks: dict[str, str] = {}
    alpha = pixels.alpha
    one_colour = _is_one_colour(pixels.values)
    if alpha is not None and alpha.min() < alpha.max():
        if one_colour or not ((values > 0) & (alpha > 0)).any():
            values = _opacity(alpha)
        else:
            if (hidden := int(((values > 0) & (alpha == 0)).sum())) and (values == 0).any():
                remarks["mask with colours that are transparent"] = (
                    f"{printable(path)}: {hidden} coloured pixels are wholly transparent, and count as background"
                )
            values = np.where(alpha > 0, values, 0)
    elif pixels.palette is not None and one_colour and pixels.palette.min() < pixels.palette.max():
        background = 0 if (pixels.palette == 0).any() else _border_index(pixels.palette)
        values = (pixels.palette != background).astype(np.float32)
    elif pixels.palette is not None and values.all() and _is_background(pixels.palette, 0):
        values = np.where(pixels.palette == 0, 0, values)
    if _rings(pixels.lossy, values):
        highest = values.max()
        return Mask(torch.from_numpy(values > (highest / 2 if highest > _RINGING else highest)), remarks)
    marked = values > 0
    faint = marked & (values <= NOISE)
    if faint.any() and values.max() >= 0.5 and not _form_areas(values, faint):
        marked &= ~faint
    if ((values > values.min()) & (values < values.max())).any():
        remarks["mask of more than two levels"] = f"{printable(path)}: {_on_levels(values, marked)}"
    return Mask(torch.from_numpy(marked), remarks)


def _levels(values: np.ndarray) -> np.ndarray:
    """Return the largest of the channels, (H, W) float32, as a share of the type's range."""
    grey = values.max(-1) if values.ndim == 3 else values
    full = np.iinfo(values.dtype).max if values.dtype.kind == "u" else 1
    return grey.astype(np.float32) / np.float32(full)


def _is_one_colour(values: np.ndarray) -> bool:
    return bool((values == values[:1, :1]).all())


def _opacity(alpha: np.ndarray) -> np.ndarray:
    """Return alpha as levels of a mask: (H, W) float32, zero where it is background."""
    low, high = int(alpha.min()), int(alpha.max())
    if low / 255 <= NOISE:
        return _levels(alpha)
    return (alpha > (low + high) / 2).astype(np.float32)


def _rings(lossy: str, values: np.ndarray) -> bool:
    """Return whether the edges of a mask ring, by how it was compressed (see `Pixels`) and by its levels."""
    most_levels = {"JPEG": 0, "lossy": 2, "perhaps": _LABELS}
    return lossy in most_levels and len(np.unique(values)) > most_levels[lossy]


def _border_index(palette: np.ndarray) -> int:
    """Return the index that has most of the border."""
    return int(np.bincount(_border(palette)).argmax())


def _border(palette: np.ndarray) -> np.ndarray:
    return np.concatenate([palette[0], palette[-1], palette[:, 0], palette[:, -1]])


def _is_background(palette: np.ndarray, index: int) -> bool:
    """Return whether more than half of the border has the index, and not all of the image."""
    return bool((_border(palette) == index).mean() > 0.5 and (palette != index).any())


def _form_areas(values: np.ndarray, faint: np.ndarray) -> bool:
    """Return whether a quarter of the faint pixels have four neighbours of their own value, and others are zero."""
    padded = np.pad(values, 1, mode="edge")
    same = np.ones_like(faint)
    for rows, columns in ((slice(0, -2), slice(1, -1)), (slice(2, None), slice(1, -1))):
        same &= (padded[rows, columns] == values) & (padded[columns, rows] == values)
    return bool((values == 0).any() and same[faint].mean() >= 0.25)


def _on_levels(values: np.ndarray, marked: np.ndarray) -> str:
    """Return what a mask of more than two levels was taken for, and how many pixels hang on it."""
    levels, highest = len(np.unique(values)), values.max()
    between, low = (int((marked & (values < bound)).sum()) for bound in (highest, highest / 2))
    text = f"{levels} levels; "
    if noise := int(((values > 0) & ~marked).sum()):
        text += f"{noise} pixels of 1 to 8 of 255 are taken for noise, and are background; "
    return text + (
        f"{between} marked pixels are below the highest level, {low} of them below half of it: right for labels, too "
        "wide for soft edges and noise"
    )
