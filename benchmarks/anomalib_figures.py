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


class ClassFigures(Evaluator):
    """anomalib's evaluator of a test, which keeps the figures of each class, too.

    As an evaluator of the model it gets batches after the post-processor: its scores, and verdicts by its threshold.

    Args:
        root: of a dataset in the MVTec AD layout: the folder of an image under it says its class.
        class_names: the classes that the test may have.
    """

    def __init__(self, root: Path, class_names: tuple[str, ...]) -> None:
        super().__init__(test_metrics=_of_images())
        self.root = root.resolve()
        self._of_class = {name: _of_images() + _of_pixels() for name in class_names}
        self._verdicts: dict[str, list[Tensor]] = {name: [] for name in class_names}  # (n, 2): label, verdict

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *place: int) -> None:
        """Take the predictions of a batch into the metrics."""
        super().on_test_batch_end(trainer, pl_module, outputs, batch, *place)
        names = [Path(path).resolve().relative_to(self.root).parts[0] for path in batch.image_path]
        for name in set(names):
            rows = torch.tensor([i for i, other in enumerate(names) if other == name])
            part = {
                field: None if value is None else value[rows].cpu()
                for field in ("image", "gt_label", "gt_mask", "pred_score", "pred_label", "anomaly_map")
                for value in [getattr(batch, field)]
            }
            for metric in self._of_class[name]:
                metric.update(ImageBatch(**part))
            self._verdicts[name].append(torch.stack([part["gt_label"].bool(), part["pred_label"].bool()], dim=1))

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
