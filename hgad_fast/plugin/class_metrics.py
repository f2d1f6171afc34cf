"""Figures of each class in a test with anomalib, and their mean, where its own metrics pool all classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ..evaluation.metrics import image_metrics, pixel_metrics
from ..files import printable
from ..terminal import warn_user

_IMAGE_FIGURES = {"auroc": "image_AUROC", "average_precision": "image_AP"}
_PIXEL_FIGURES = {
    "auroc": "pixel_AUROC",
    "average_precision": "pixel_AP",
    "aupro_0.3": "pixel_AUPRO",
    "aupro_0.05": "pixel_AUPRO_5",
}


@dataclass
class _Collected:
    """What is known of the test images of one class, image by image; maps and masks of those that have both."""

    scores: list[float] = field(default_factory=list)
    labels: list[bool] = field(default_factory=list)
    maps: list[Tensor] = field(default_factory=list)  # (h, w) float32 each
    masks: list[Tensor] = field(default_factory=list)  # (h, w) bool each


class ClassMetrics(Callback):
    """Computes AUROC, average precision and AUPRO of each class in `Engine.test`, and their means over the classes.

    It is a callback as any other: `Engine(callbacks=[ClassMetrics()])`. The figures are those of
    `hgad_fast.evaluation.metrics`, exact, at the size at which images are seen. They are logged as `cloth/image_AUROC`,
    and their means as `mean/image_AUROC`; after image_AUROC and image_AP (average precision) come pixel_AUROC,
    pixel_AP, pixel_AUPRO (up to a false-positive rate of 0.3) and pixel_AUPRO_5 (0.05).

    A class has no image figures where its images are all normal or all anomalous, and no pixel figures where its masks
    mark nothing; it is then left out of their mean, with a warning. An image without a mask counts for the image
    figures alone. Scores and pixels that are no numbers, or infinite, count as the highest there are, as in verdicts.

    Classes are those of `MultiClassFolder`. Batches of other datamodules need a model that has `class_names` and
    `class_of`, which returns the number of an image's class by its path, as our models do. Maps and masks are kept in
    memory until the end of the test: 0.33 MB for an image of 256 x 256 pixels. The test takes one process.

    Attributes:
        figures: of the last test: by the names of the classes, and "mean", and then by the names of the figures.
    """

    def __init__(self) -> None:
        self.figures: dict[str, dict[str, float]] = {}
        self._classes: dict[str, _Collected] = {}

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what was collected.

        Raises:
            ValueError: several processes share the test images.
        """
        if trainer.world_size > 1:
            raise ValueError(
                f"ClassMetrics compares all images of a class, and {trainer.world_size} processes share them: test on "
                "one device (devices=1)"
            )
        self._classes = {}

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect the scores, maps, labels and masks of a batch, which `test_step` returned.

        Raises:
            ValueError: they have no scores or labels, or the classes of their images are not known.
        """
        for name in ("pred_score", "gt_label"):
            if getattr(outputs, name, None) is None:
                raise ValueError(f"a batch of the test has no {name}, which ClassMetrics compares")
        classes = [self._classes.setdefault(name, _Collected()) for name in _class_names(trainer, pl_module, outputs)]
        scores, labels = _rankable(outputs.pred_score).flatten(), outputs.gt_label.flatten()
        for collected, score, label in zip(classes, scores.tolist(), labels.tolist(), strict=True):
            collected.scores.append(score)
            collected.labels.append(bool(label))
        if outputs.anomaly_map is None or outputs.gt_mask is None:
            return
        masks = outputs.gt_mask.as_subclass(Tensor).cpu().bool()
        for collected, anomaly_map, mask in zip(classes, _rankable(outputs.anomaly_map), masks, strict=True):
            collected.maps.append(anomaly_map)
            collected.masks.append(mask)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the figures and log them.

        Raises:
            ValueError: a map and its mask differ in size.
        """
        self.figures = {name: _figures(name, self._classes[name]) for name in sorted(self._classes)}
        self._classes = {}
        _warn_of_lacking(self.figures)
        # a class may have any name, even that of the row of means
        row = "mean" if "mean" not in self.figures else "mean of classes"
        self.figures[row] = {
            figure: fmean(figures[figure] for figures in self.figures.values() if figure in figures)
            for figure in (*_IMAGE_FIGURES.values(), *_PIXEL_FIGURES.values())
            if any(figure in figures for figures in self.figures.values())
        }
        for name, figures in self.figures.items():
            for figure, value in figures.items():
                pl_module.log(f"{printable(name)}/{figure}", value)


def _class_names(trainer: Trainer, pl_module: LightningModule, batch: Any) -> list[str]:
    """Return the names of the classes of a batch's images; a ValueError if they are not known."""
    numbers, paths = getattr(batch, "gt_class", None), batch.image_path
    # numbers in batches are those of the data, whose classes may come in another order than the model's, or be fewer
    of_data = getattr(getattr(trainer, "datamodule", None), "class_names", None)
    of_model = getattr(pl_module, "class_names", None)
    if numbers is not None and (names := of_data or of_model):
        return [names[k] for k in numbers.tolist()]
    if of_model and paths and hasattr(pl_module, "class_of"):
        return [of_model[pl_module.class_of(path)] for path in paths]
    raise ValueError(
        f"ClassMetrics does not know the classes of the test images: test with MultiClassFolder (the batches of this "
        f"test have no gt_class), or a model with class_names and class_of ({type(pl_module).__name__} lacks them)"
    )


def _rankable(values: Tensor) -> Tensor:
    """Return values as float32 on the CPU; infinite ones and those that are no numbers as the largest there is."""
    highest = torch.finfo(torch.float32).max
    return values.as_subclass(Tensor).detach().float().cpu().nan_to_num(nan=highest, posinf=highest)


def _figures(name: str, collected: _Collected) -> dict[str, float]:
    """Return the figures of a class, by their names, as far as its images have what they take."""
    figures: dict[str, float] = {}
    if len(set(collected.labels)) == 2:
        values = image_metrics(collected.scores, collected.labels)
        figures |= {figure: values[key] for key, figure in _IMAGE_FIGURES.items()}
    masks = collected.masks
    if any(mask.any() for mask in masks) and not all(mask.all() for mask in masks):
        try:
            values = pixel_metrics(collected.maps, masks)
        except ValueError as error:
            raise ValueError(f"class {printable(name)}: {error}") from error
        figures |= {figure: values[key] for key, figure in _PIXEL_FIGURES.items()}
    return figures


def _warn_of_lacking(by_class: dict[str, dict[str, float]]) -> None:
    """Warn, in one line, of classes without figures; of pixels only where other classes have them."""
    lacking: dict[str, list[str]] = {"image_AUROC": [], "pixel_AUROC": []}
    for figure, names in lacking.items():
        names += (printable(name) for name, figures in by_class.items() if figure not in figures)
    parts = []
    if lacking["image_AUROC"]:
        parts.append(f"image figures of {', '.join(lacking['image_AUROC'])} (all test images normal, or all anomalous)")
    if 0 < len(lacking["pixel_AUROC"]) < len(by_class):
        parts.append(f"pixel figures of {', '.join(lacking['pixel_AUROC'])} (no mask marks a defect)")
    if parts:
        warn_user(f"there are no {' and no '.join(parts)}; the means are those of the other classes")
