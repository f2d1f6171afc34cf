"""What `benchmarks.anomalib_engine` reads off a run of anomalib's Engine: figures of each class, and seconds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from anomalib.data import ImageBatch
from anomalib.metrics import AUPRO, AUROC, AnomalibMetric, Evaluator, F1Score
from lightning.pytorch import Callback
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import resize

from hgad_fast.data.datasets import Dataset, Sample
from hgad_fast.data.masks import read_mask


class ClassFigures(Evaluator):
    """anomalib's evaluator of a test, which keeps the figures of each class, too.

    As an evaluator of the model it gets batches after the post-processor: its scores, and verdicts by its threshold.
    Figures of pixels are those of maps of one size, which anomalib's AUPRO needs, too: maps of another size are resized
    bilinearly, and the masks of their images as anomalib resizes them.

    Args:
        dataset: has the images that are tested.
        class_names: the classes that the test may have.
        side: pixels of a side of the maps that figures are computed from.
    """

    def __init__(self, dataset: Dataset, class_names: tuple[str, ...], side: int) -> None:
        super().__init__(test_metrics=_of_images())
        self._samples = {sample.path.resolve(): sample for sample in dataset.test}
        self._class_names, self._side = dataset.class_names, side
        self._of_class = {name: _of_images() + _of_pixels() for name in class_names}
        self._verdicts: dict[str, list[Tensor]] = {name: [] for name in class_names}  # (n, 2): label, verdict

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *place: int) -> None:
        """Take the predictions of a batch into the metrics."""
        super().on_test_batch_end(trainer, pl_module, outputs, batch, *place)
        samples = [self._samples[Path(path).resolve()] for path in batch.image_path]
        for class_id in {sample.class_id for sample in samples}:
            rows = [i for i, sample in enumerate(samples) if sample.class_id == class_id]
            maps, masks = batch.anomaly_map[rows].cpu(), batch.gt_mask[rows].cpu()
            if maps.shape[-2:] != (self._side, self._side):
                maps = resize(maps, [self._side, self._side], antialias=False)
                masks = torch.stack([self._mask(samples[i]) for i in rows])
            labels, verdicts = batch.gt_label[rows].cpu(), batch.pred_label[rows].cpu()
            part = ImageBatch(
                image=torch.zeros(len(rows), 3, self._side, self._side),
                gt_label=labels,
                gt_mask=masks,
                pred_score=batch.pred_score[rows].cpu(),
                pred_label=verdicts,
                anomaly_map=maps,
            )
            name = self._class_names[class_id]
            for metric in self._of_class[name]:
                metric.update(part)
            self._verdicts[name].append(torch.stack([labels.bool(), verdicts.bool()], dim=1))

    def _mask(self, sample: Sample) -> Tensor:
        """Return the mask of an image at the size of the maps, (side, side) bool."""
        if sample.mask is None:
            return torch.zeros(self._side, self._side, dtype=torch.bool)
        mask = resize(tv_tensors.Mask(read_mask(sample.mask)), [self._side, self._side])
        return mask.as_subclass(Tensor).bool()

    def by_class(self) -> dict[str, dict[str, float]]:
        """Return the figures of each class by the names of the metrics, and the counts of images and verdicts."""
        return {
            name: {metric.name: float(metric.compute()) for metric in metrics} | self._counts(name)
            for name, metrics in self._of_class.items()
        }

    def _counts(self, name: str) -> dict[str, int]:
        are_anomalous, verdicts = torch.cat(self._verdicts[name]).unbind(1)
        return {
            "normal": int((~are_anomalous).sum()),
            "false_alarms": int((~are_anomalous & verdicts).sum()),
            "anomalous": int(are_anomalous.sum()),
            "misses": int((are_anomalous & ~verdicts).sum()),
        }


class Stopwatch(Callback):
    """Adds up the time of validations, from before their first batch to the thresholds.

    Attributes:
        seconds: of all validations so far.
    """

    def __init__(self) -> None:
        self.seconds = self._start = 0.0

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start: anomalib's models have been fitted, before the validation began."""
        self._start = time.perf_counter()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop."""
        self.seconds += time.perf_counter() - self._start


def _of_images() -> list[AnomalibMetric]:
    return [AUROC(fields=["pred_score", "gt_label"], prefix="image_"), F1Score(["pred_label", "gt_label"], "image_")]


def _of_pixels() -> list[AnomalibMetric]:
    return [cls(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False) for cls in (AUROC, AUPRO)]
