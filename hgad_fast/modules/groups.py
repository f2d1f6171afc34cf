"""The groups of images in graphs for other runtimes: one for all images, given with each, or inferred."""

from __future__ import annotations

import torch
from torch import Tensor


def group_numbers(group: int | None, count: int) -> Tensor:
    """Return the numbers (int64) of the groups that images can be of: the one of all images, or without it `count`."""
    return torch.arange(count) if group is None else torch.tensor([group])


def one_group(x: Tensor, group: int) -> Tensor:
    """Return the number of a group for each image of x (B, ., ., .), (B,) int64."""
    return torch.full_like(x[:, 0, 0, 0], group, dtype=torch.int64)


def groups_of_images(inferred: Tensor, given: Tensor | None) -> Tensor:
    """Return the groups (B,) int64 of images: those given, or where none is (-1, or None for all) those inferred."""
    return inferred if given is None else torch.where(given < 0, inferred, given)
