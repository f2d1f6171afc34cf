"""plugin/class_metrics.py: figures of each class, against anomalib's own metrics and the library's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("anomalib")

import torch
from anomalib.data import ImageBatch
from anomalib.metrics import AUPRO, AUROC
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch.utils.data import DataLoader

from hgad_fast.evaluation.metrics import image_metrics, pixel_metrics
from hgad_fast.plugin.batch import MultiClassBatch
from hgad_fast.plugin.class_metrics import ClassMetrics
from hgad_fast.plugin.data import MultiClassFolder

NAMES = ("cloth", "steel", "wood")
SIDE = 32
FIGURES = ("image_AUROC", "image_AP", "pixel_AUROC", "pixel_AP", "pixel_AUPRO", "pixel_AUPRO_5")


class Model(LightningModule):
    """A model whose test batches come with their scores."""

    class_names = NAMES

    def test_step(self, batch: Any, number: int) -> Any:
        return batch

    def class_of(self, path: str) -> int:
        return NAMES.index(Path(path).parts[0])


def drawn(seed: int, classes: Sequence[int], labels: Sequence[int]) -> MultiClassBatch:
    """Return a scored batch of images of these classes, of which those labelled 1 have two defects."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((len(labels), SIDE, SIDE), bool)
    for mask, label in zip(masks, labels, strict=True):
        if label:
            row, column = rng.integers(0, 12, 2)
            mask[row : row + 5, column : column + 8] = mask[20:24, 20:29] = True
    noise = gaussian_filter(rng.standard_normal(masks.shape), (0, 2, 2))
    maps = torch.tensor(noise + 0.3 * masks, dtype=torch.float32)
    return MultiClassBatch(
        image=torch.zeros(len(labels), 3, SIDE, SIDE),
        image_path=[f"{NAMES[k]}/{seed}_{i}.png" for i, k in enumerate(classes)],
        gt_label=torch.tensor(labels),
        gt_class=torch.tensor(classes),
        gt_mask=torch.tensor(masks),
        pred_score=maps.amax((1, 2)),
        anomaly_map=maps,
    )


@pytest.fixture
def batches() -> list[MultiClassBatch]:
    """Twelve images of each class, three of which are anomalous, in batches that hold several classes."""
    rng = np.random.default_rng(0)
    classes, labels = rng.permutation(np.stack([np.arange(36) % 3, np.arange(36) < 9], 1)).T.tolist()
    return [drawn(i, classes[i : i + 5], labels[i : i + 5]) for i in range(0, 36, 5)]


def outcome(
    batches: Sequence[Any], model: LightningModule | None = None, datamodule: Any = None
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Return the figures of a test, and what was logged."""
    metrics = ClassMetrics()
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", devices=1, callbacks=[metrics], enable_checkpointing=False, **options)
    loader = None if datamodule else DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)
    (logged,) = trainer.test(model or Model(), loader, datamodule=datamodule, verbose=False)
    return metrics.figures, logged


def of_class(batches: Sequence[MultiClassBatch], k: int) -> MultiClassBatch:
    """Return the images of a class as one batch."""
    fields = ("image", "gt_label", "gt_mask", "pred_score", "anomaly_map")
    joined = {name: torch.cat([getattr(batch, name)[batch.gt_class == k] for batch in batches]) for name in fields}
    return MultiClassBatch(**joined)


def test_figures_agree_with_anomalib_and_with_the_library(batches: list[MultiClassBatch]) -> None:
    figures, _ = outcome(batches)
    assert list(figures) == [*NAMES, "mean"]
    for k, name in enumerate(NAMES):
        own = of_class(batches, k)
        theirs = {
            "image_AUROC": AUROC(fields=["pred_score", "gt_label"]),
            "pixel_AUROC": AUROC(fields=["anomaly_map", "gt_mask"]),
            "pixel_AUPRO": AUPRO(fields=["anomaly_map", "gt_mask"]),
            "pixel_AUPRO_5": AUPRO(fields=["anomaly_map", "gt_mask"], fpr_limit=0.05),
        }
        for figure, metric in theirs.items():
            metric.update(own)
            assert figures[name][figure] == pytest.approx(float(metric.compute()), abs=1e-4), (name, figure)
        image = image_metrics(own.pred_score, own.gt_label)
        pixel = pixel_metrics(own.anomaly_map, own.gt_mask)
        ours = [image[key] for key in ("auroc", "average_precision")]
        ours += [pixel[key] for key in ("auroc", "average_precision", "aupro_0.3", "aupro_0.05")]
        assert figures[name] == dict(zip(FIGURES, ours, strict=True))
    for figure in FIGURES:
        assert 0.3 < figures["mean"][figure] < 1
        assert figures["mean"][figure] == pytest.approx(sum(figures[name][figure] for name in NAMES) / 3)


def test_what_is_logged(batches: list[MultiClassBatch]) -> None:
    figures, logged = outcome(batches)
    expected = {f"{name}/{figure}": value for name, row in figures.items() for figure, value in row.items()}
    assert len(expected) == 4 * len(FIGURES)
    assert logged == pytest.approx(expected, rel=2**-24)  # lightning logs float32


def test_batches_do_not_matter(batches: list[MultiClassBatch]) -> None:
    one_by_one = [MultiClassBatch.collate([item]) for batch in batches for item in batch]
    assert outcome(one_by_one)[0] == outcome(batches)[0]


def test_batches_without_classes_take_the_models(batches: list[MultiClassBatch]) -> None:
    fields = ("image", "image_path", "gt_label", "gt_mask", "pred_score", "anomaly_map")
    plain = [ImageBatch(**{name: getattr(batch, name) for name in fields}) for batch in batches]
    assert outcome(plain)[0] == outcome(batches)[0]


def test_unknown_classes(batches: list[MultiClassBatch]) -> None:
    class Nameless(LightningModule):
        test_step = Model.test_step

    with pytest.raises(ValueError, match=r"MultiClassFolder .* class_names and class_of \(Nameless lacks them\)"):
        outcome(batches, Nameless())


def test_numbers_are_those_of_the_data(tmp_path: Path) -> None:
    """A test of some of the model's classes: their numbers are other ones than in the model."""
    rng = np.random.default_rng(0)
    for name in ("wood", "steel"):
        for place in ("train/good", "test/good", "test/hole", "ground_truth/hole"):
            for i in range(2):
                file = tmp_path / name / place / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray((pixels > 200).astype(np.uint8) if "ground" in place else pixels).save(file)

    class Scoring(Model):
        def test_step(self, batch: Any, number: int) -> Any:
            is_wood = torch.tensor(["wood" in Path(path).parts for path in batch.image_path])
            score = torch.where(is_wood, 1.0, -1.0) * batch.gt_label
            return batch.update(pred_score=score, anomaly_map=batch.image.mean(1))

    figures, _ = outcome([], Scoring(), MultiClassFolder(tmp_path, num_workers=0))
    assert {name: row["image_AUROC"] for name, row in figures.items()} == {"steel": 0.0, "wood": 1.0, "mean": 0.5}
    assert list(figures["steel"]) == list(FIGURES)


def test_classes_that_lack_images_are_left_out_of_the_mean(batches: list[MultiClassBatch]) -> None:
    """Of cloth there are normal images alone, of steel anomalous ones."""
    for batch in batches:
        batch.update(gt_label=batch.gt_label & (batch.gt_class != 0) | (batch.gt_class == 1))
        batch.update(gt_mask=batch.gt_mask & (batch.gt_class != 0)[:, None, None])
    with pytest.warns(UserWarning) as record:
        figures, logged = outcome(batches)
    (message,) = [str(warning.message) for warning in record if "no image figures" in str(warning.message)]
    assert "cloth, steel (all test images normal, or all anomalous) and no pixel figures of cloth (" in message
    assert figures["cloth"] == {} and list(figures["steel"]) == list(FIGURES[2:])
    assert figures["mean"]["image_AUROC"] == figures["wood"]["image_AUROC"]
    assert figures["mean"]["pixel_AP"] == pytest.approx(
        (figures["steel"]["pixel_AP"] + figures["wood"]["pixel_AP"]) / 2
    )
    assert not any(math.isnan(value) for value in logged.values())


def test_images_without_masks_count_for_image_figures(batches: list[MultiClassBatch]) -> None:
    without = [replace(batch, gt_mask=None) for batch in batches[:2]] + batches[2:]
    figures, expected = outcome(without)[0], outcome(batches)[0]
    for k, name in enumerate(NAMES):
        own = of_class(batches[2:], k)
        pixels = pixel_metrics(own.anomaly_map, own.gt_mask)
        assert figures[name]["pixel_AUPRO"] == pixels["aupro_0.3"] != expected[name]["pixel_AUPRO"]
        assert figures[name]["image_AUROC"] == expected[name]["image_AUROC"]


def test_data_without_masks(batches: list[MultiClassBatch]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*figures.*")
        figures, _ = outcome([replace(batch, gt_mask=None) for batch in batches])
    assert all(list(row) == list(FIGURES[:2]) for row in figures.values())


def test_scores_without_a_number_are_the_highest(batches: list[MultiClassBatch]) -> None:
    """Infinite scores, and those that are no numbers, tie above all others."""
    high = [replace(batch) for batch in batches]
    for batch, score in zip(high, (math.inf, math.nan), strict=False):
        values, maps = batch.pred_score.clone(), batch.anomaly_map.clone()
        values[0] = maps[0, 0, 0] = score
        batch.update(pred_score=values, anomaly_map=maps)
    finite = [replace(batch) for batch in high]
    for batch in finite[:2]:
        batch.update(pred_score=batch.pred_score.nan_to_num(9, 9), anomaly_map=batch.anomaly_map.nan_to_num(9, 9))
    assert outcome(high)[0] == outcome(finite)[0] != outcome(batches)[0]


def test_several_tests_are_apart(batches: list[MultiClassBatch]) -> None:
    metrics, trainer, model = ClassMetrics(), SimpleNamespace(world_size=1, datamodule=None), Model()
    model.log = lambda *args: None
    for part in (batches, batches[:4]):
        metrics.on_test_epoch_start(trainer, model)
        for i, batch in enumerate(part):
            metrics.on_test_batch_end(trainer, model, batch, batch, i)
        metrics.on_test_epoch_end(trainer, model)
    assert metrics.figures == outcome(batches[:4])[0]


def test_a_class_called_mean(batches: list[MultiClassBatch]) -> None:
    class Named(Model):
        class_names = ("mean", "steel", "wood")

    figures = outcome(batches, Named())[0]
    assert list(figures) == ["mean", "steel", "wood", "mean of classes"]
    assert figures["mean"] == outcome(batches)[0]["cloth"]


def test_mistakes(batches: list[MultiClassBatch]) -> None:
    with pytest.raises(ValueError, match="2 processes share them: test on one device"):
        ClassMetrics().on_test_epoch_start(SimpleNamespace(world_size=2), Model())
    with pytest.raises(ValueError, match="no pred_score, which ClassMetrics compares"):
        outcome([replace(batches[0], pred_score=None)])
    with pytest.raises(ValueError, match="no gt_label"):
        outcome([replace(batches[0], gt_label=None)])
    with pytest.raises(ValueError, match=r"class \w+: maps\[0\] has shape \(32, 32\) and masks\[0\] \(16, 16\)"):
        outcome([replace(batch, gt_mask=batch.gt_mask[:, ::2, ::2]) for batch in batches])
