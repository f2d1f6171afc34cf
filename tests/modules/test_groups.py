"""The groups of images in a graph."""

from __future__ import annotations

import torch

from hgad_fast.modules.groups import group_numbers, groups_of_images, one_group


def test_groups_are_given_or_inferred() -> None:
    inferred = torch.tensor([2, 0, 1])
    assert groups_of_images(inferred, None) is inferred
    assert groups_of_images(inferred, torch.tensor([-1, 0, 2])).tolist() == [2, 0, 2]


def test_one_group_is_that_of_all_images() -> None:
    numbers = one_group(torch.rand(3, 2, 1, 1), 4)
    assert numbers.dtype == torch.int64 and numbers.tolist() == [4, 4, 4]


def test_images_can_be_of_all_groups_or_of_one() -> None:
    assert group_numbers(None, 3).tolist() == [0, 1, 2]
    assert group_numbers(0, 3).tolist() == [0]
    assert group_numbers(2, 3).dtype == group_numbers(None, 3).dtype == torch.int64
