"""Images and batches of anomalib that know of classes: theirs, with the class, and in predictions the p-value."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from anomalib.data import ImageBatch, ImageItem
from torch import Tensor


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
        """Return a batch of images as one that knows of classes; itself if it does."""
        if isinstance(batch, cls):
            return batch
        return cls(**{field.name: getattr(batch, field.name) for field in fields(batch)})
