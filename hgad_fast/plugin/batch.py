"""Images and batches of anomalib that know of classes: theirs, with the class, and in predictions the p-value."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from anomalib.data import ImageBatch, ImageItem
from torch import Tensor

from ..files import printable


@dataclass
class MultiClassItem(ImageItem):
    """An image, and what is predicted of it.

    Attributes:
        gt_class: number of its own class, () int64; None where it is not known.
        pred_class: number of the class, or of the group that the method forms, as which it was scored.
        pred_class_name: the name of that.
        p_value: conformal p-value, () float64, see `hgad_fast.scoring.result.ScoreResult`.
    """

    gt_class: Tensor | None = None
    pred_class: Tensor | None = None
    pred_class_name: str | None = None
    p_value: Tensor | None = None


@dataclass
class MultiClassBatch(ImageBatch):
    """B images, and what is predicted of them: the fields of `MultiClassItem`, (B,) each.

    Attributes:
        gt_class: numbers of their own classes, (B,) int64; None where they are not known.
        pred_class: numbers of the classes, or of the groups that the method forms, as which they were scored, (B,)
            int64.
        pred_class_name: the names of these, a list of B.
        p_value: conformal p-values, (B,) float64, see `hgad_fast.scoring.result.ScoreResult`.
    """

    item_class: ClassVar[type[MultiClassItem]] = MultiClassItem

    gt_class: Tensor | None = None
    pred_class: Tensor | None = None
    pred_class_name: list[str] | None = None
    p_value: Tensor | None = None

    @classmethod
    def of(cls, batch: Any) -> MultiClassBatch:
        """Return a batch of images as one that knows of classes.

        anomalib's metrics look at the batch that went into a step: a plain one becomes what is returned, in its place.
        Batches of other kinds, of depth or video, are returned as they are.
        """
        if type(batch) is ImageBatch:
            batch.__class__ = cls
            for field in fields(cls):
                batch.__dict__.setdefault(field.name, None)
        return batch

    @classmethod
    def collate(cls, items: list[MultiClassItem]) -> MultiClassBatch:
        """Return items as a batch. None is stretched, as those of anomalib's other batches are.

        Where any has the path of a mask, those without have "".

        Raises:
            ValueError: images differ in size, or only some have a mask.
        """
        for item in items[1:]:
            _require_stackable(items[0], item)
        batch = super().collate(items)
        if any(item.mask_path for item in items):
            batch.mask_path = [item.mask_path or "" for item in items]
        return batch


def _require_stackable(first: MultiClassItem, other: MultiClassItem) -> None:
    """Raise a ValueError if two items cannot be in one batch."""
    names = [printable(item.image_path or "an image without a path") for item in (first, other)]
    if first.image.shape != other.image.shape:
        sizes = [" x ".join(map(str, item.image.shape[-2:])) for item in (first, other)]
        raise ValueError(
            f"{names[0]} is seen at {sizes[0]} pixels (height x width), {names[1]} at {sizes[1]}, and images of one "
            "batch have one size: let MultiClassFolder make the batches, take batches of 1 image, or a model that sees "
            "all images at one size (center_crop=True)"
        )
    if (first.gt_mask is None) != (other.gt_mask is None):
        with_mask, without = names if other.gt_mask is None else reversed(names)
        raise ValueError(
            f"{with_mask} has a mask and {without} none, so they do not stack: let MultiClassFolder make the batches, "
            "or take batches of 1 image"
        )
