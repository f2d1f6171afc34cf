"""The machinery of the benchmark that runs models of anomalib and ours by anomalib's Engine, on a tiny dataset."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

pytest.importorskip("anomalib")

from anomalib.data import ImageBatch  # noqa: E402

from benchmarks import anomalib_engine, anomalib_figures  # noqa: E402
from benchmarks.anomalib_figures import ClassFigures  # noqa: E402
from hgad_fast.data import datasets  # noqa: E402
from hgad_fast.data.datasets import Dataset  # noqa: E402
from hgad_fast.data.masks import read_mask  # noqa: E402
from hgad_fast.evaluation import metrics  # noqa: E402

SIDE = 64
CLASSES = ("bolt", "nut")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes with six training images, three normal ones to test on, and two of each of two defects."""
    rng = np.random.default_rng(0)
    for k, name in enumerate(CLASSES):
        for split, defect, count in (("train", "good", 6), ("test", "good", 3), ("test", "dot", 2), ("test", "gap", 2)):
            for i in range(count):
                pixels = rng.integers(100 * k, 100 * k + 60, (SIDE, SIDE, 3)).astype(np.uint8)
                files = {f"{name}/{split}/{defect}/{i}.png": pixels}
                if defect != "good":
                    mask = np.zeros((SIDE, SIDE), np.uint8)
                    mask[20:40, 10 : 30 + i] = 1
                    pixels[mask > 0] = 255
                    files[f"{name}/ground_truth/{defect}/{i}_mask.png"] = mask
                for path, array in files.items():
                    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(array).save(tmp_path / path)
    return tmp_path


@pytest.fixture
def images(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same dataset as `write_images` writes it."""
    images = tmp_path_factory.mktemp("outcome") / "images"
    anomalib_engine.write_images(datasets.discover(root), images)
    return images


def test_images_are_written_as_they_are_and_masks_with_them(root: Path, images: Path) -> None:
    given, written = datasets.discover(root), datasets.discover(images)
    assert written.class_names == given.class_names
    for ours, theirs in ((given.train, written.train), (given.test, written.test)):
        assert [(s.class_id, s.defect) for s in ours] == [(s.class_id, s.defect) for s in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert one.path.read_bytes() == other.path.read_bytes()
            if one.mask is not None and other.mask is not None:
                assert torch.equal(read_mask(one.mask), read_mask(other.mask))
            assert (one.mask is None) == (other.mask is None)


def test_an_anomalous_image_without_a_mask_is_refused(root: Path, tmp_path: Path) -> None:
    (root / "nut" / "ground_truth" / "gap" / "1_mask.png").unlink()
    with pytest.raises(ValueError, match=r"gap.1\.png has no mask; give each anomalous image one"):
        anomalib_engine.write_images(datasets.discover(root), tmp_path / "written")


@pytest.mark.parametrize("classes", [CLASSES, ("nut",)])
def test_the_datamodule_of_anomalib_has_the_images_of_the_classes(images: Path, classes: tuple[str, ...]) -> None:
    data = anomalib_engine.folders(images, classes, "same_as_test")
    data.setup()
    dataset = datasets.discover(images)
    names = dataset.class_names

    def expected(samples: Any) -> set[tuple[str, bool]]:
        return {(str(s.path), s.is_anomalous) for s in samples if names[s.class_id] in classes}

    def listed(frame: Any) -> set[tuple[str, bool]]:
        return set(zip(frame.image_path, frame.label_index.astype(bool), strict=True))

    assert listed(data.train_data.samples) == expected(dataset.train)
    assert listed(data.test_data.samples) == listed(data.val_data.samples) == expected(dataset.test)
    masks = {str(sample.path): str(sample.mask or "") for sample in dataset.test}
    assert all(masks[row.image_path] == row.mask_path for row in data.test_data.samples.itertuples())


def test_validation_from_test_images_takes_half_of_them(images: Path) -> None:
    data = anomalib_engine.folders(images, CLASSES, "from_test")
    data.setup()
    tested, validated = set(data.test_data.samples.image_path), set(data.val_data.samples.image_path)
    assert len(tested) == len(validated) == 7 and not tested & validated


def batches_of(dataset: Dataset, rng: np.random.Generator) -> list[ImageBatch]:
    """Return the test images in batches of five, of mixed classes, with predictions that are drawn."""
    order = rng.permutation(len(dataset.test)).tolist()
    batches = []
    for start in range(0, len(order), 5):
        samples = [dataset.test[i] for i in order[start : start + 5]]
        masks = [read_mask(s.mask) if s.mask else torch.zeros(SIDE, SIDE, dtype=torch.bool) for s in samples]
        scores = torch.from_numpy(rng.random(len(samples), np.float32))
        batches.append(
            ImageBatch(
                image=torch.zeros(len(samples), 3, SIDE, SIDE),
                image_path=[str(sample.path) for sample in samples],
                gt_label=torch.tensor([sample.is_anomalous for sample in samples]),
                gt_mask=torch.stack(masks),
                pred_score=scores,
                pred_label=scores > 0.5,
                anomaly_map=torch.from_numpy(rng.random((len(samples), 1, SIDE, SIDE), np.float32)),
            )
        )
    return batches


def test_figures_of_a_class_are_those_of_its_images_alone(images: Path) -> None:
    dataset = datasets.discover(images)
    evaluator = ClassFigures(dataset, dataset.class_names, SIDE)
    batches = batches_of(dataset, np.random.default_rng(1))
    for i, batch in enumerate(batches):
        evaluator.on_test_batch_end(None, None, None, batch, i)
    figures = evaluator.by_class()
    assert tuple(figures) == dataset.class_names
    items = [item for batch in batches for item in batch]
    for name in dataset.class_names:
        own = [item for item in items if Path(item.image_path).relative_to(images).parts[0] == name]
        labels, verdicts = ([bool(getattr(i, field)) for i in own] for field in ("gt_label", "pred_label"))
        of_images = metrics.image_metrics([float(item.pred_score) for item in own], labels)
        # anomalib's metrics compute in float32: sums of some ten thousand terms, far from 1e-4 of the result
        maps, masks = ([getattr(i, field).reshape(SIDE, SIDE) for i in own] for field in ("anomaly_map", "gt_mask"))
        of_pixels = metrics.pixel_metrics([each.numpy() for each in maps], [each.bool().numpy() for each in masks])
        found = figures[name]
        assert found["image_AUROC"] == pytest.approx(of_images["auroc"], abs=1e-4)
        assert found["pixel_AUROC"] == pytest.approx(of_pixels["auroc"], abs=1e-4)
        assert found["pixel_AUPRO"] == pytest.approx(of_pixels["aupro_0.3"], abs=1e-4)
        pairs = list(zip(labels, verdicts, strict=True))
        assert found["normal"] == 3 and found["anomalous"] == 4
        assert found["false_alarms"] == pairs.count((False, True)) and found["misses"] == pairs.count((True, False))
        hits, wrong = pairs.count((True, True)), found["false_alarms"] + found["misses"]
        assert found["image_F1Score"] == pytest.approx(2 * hits / (2 * hits + wrong), abs=1e-6)


def test_maps_of_several_sizes_count_at_one_size(images: Path) -> None:
    dataset = datasets.discover(images)
    batches, small = batches_of(dataset, np.random.default_rng(1)), SIDE // 2
    evaluators = [ClassFigures(dataset, dataset.class_names, small) for _ in range(2)]
    for i, batch in enumerate(batches):
        evaluators[0].on_test_batch_end(None, None, None, batch, i)
        # bilinear samples of a map of half the size lie between four pixels
        maps = torch.nn.functional.avg_pool2d(batch.anomaly_map[:, None], 2)
        masks = batch.gt_mask[:, ::2, ::2]  # the nearest pixel that resizing takes
        batch.update(anomaly_map=maps, gt_mask=masks, image=torch.zeros(len(maps), 3, small, small))
        evaluators[1].on_test_batch_end(None, None, None, batch, i)
    resized, as_given = (evaluator.by_class() for evaluator in evaluators)
    for name in dataset.class_names:
        for figure, value in as_given[name].items():
            # rounding of the maps may exchange a few of some ten thousand pixels
            assert resized[name][figure] == pytest.approx(value, abs=1e-4), (name, figure)


def test_the_stopwatch_adds_up_validations(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([1.0, 4.0, 10.0, 15.0])
    monkeypatch.setattr(anomalib_figures, "time", SimpleNamespace(perf_counter=lambda: next(readings)))
    stopwatch = anomalib_figures.Stopwatch()
    for _ in range(2):
        stopwatch.on_validation_epoch_start(None, None)
        stopwatch.on_validation_end(None, None)
    assert stopwatch.seconds == 8


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """Options for contenders with a tiny backbone, of random weights, on images of 64 pixels, and one epoch."""
    monkeypatch.setattr(anomalib_engine, "SIDE", SIDE)
    monkeypatch.setattr(anomalib_engine, "BACKBONE", "test_efficientnet")
    monkeypatch.setattr(anomalib_engine, "LAYERS", {2: "blocks.1", 3: "blocks.2"})
    monkeypatch.setattr(anomalib_engine, "CHANNELS", {2: 24, 3: 32})
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_efficientnet", pretrained=False).state_dict(), weights)
    return argparse.Namespace(validation="same_as_test", epochs=1, coreset=0.5, weights=weights)


@pytest.mark.parametrize("name", ["padim", "padim-each", "patchcore", "place-gaussian", "hgad-fast"])
def test_a_contender_gets_a_row_and_a_record(name: str, images: Path, options: argparse.Namespace) -> None:
    require_outcome(name, anomalib_engine.outcome_of(name, images.parent, options))


def require_outcome(name: str, outcome: dict[str, Any]) -> None:
    """Require an outcome with figures of both classes that becomes a table."""
    each = name.endswith("-each")
    assert outcome["models"] == (2 if each else 1) and ("pooled" in outcome) != each
    assert tuple(outcome["by_class"]) == CLASSES
    assert (outcome["normal"], outcome["anomalous"]) == (6, 8)
    ours = anomalib_engine.CONTENDERS[name].is_ours
    assert outcome["validation"] == ("held out of training" if ours else "same_as_test")
    assert outcome["validation_images"] == (6 if ours else 14)  # 3 of a class are held out at least
    assert 0 < outcome["validation_seconds"] < outcome["fit_seconds"]
    assert outcome["model_bytes"] > 0 and outcome["checkpoint_bytes"] > 0
    for figure in anomalib_engine.FIGURES.values():
        values = [outcome["by_class"][class_name][figure] for class_name in CLASSES]
        assert outcome["mean"][figure] == pytest.approx(np.mean(values)) and 0 <= min(values) <= max(values) <= 1
    setting = {"classes": CLASSES, "training_images": 12, "test_images": 14, "dataset": "tiny"}
    record = setting | {"device": "a CPU", "threads": 1, "contenders": {name: outcome}}
    means, classes, line = anomalib_engine.table(json.loads(json.dumps(record))).split("\n\n")
    for text in (means, classes):
        widths = {row.count("|") for row in text.splitlines()}
        assert len(widths) == 1 and text.splitlines()[2].startswith(f"| {name} | ")
    assert f"{outcome['false_alarms']} of 6" in means and "12 training and 14 test images of tiny" in line


def test_a_missing_anomalib_is_an_error_before_anything_is_fitted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anomalib_engine.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(anomalib_engine, "run", lambda *_: pytest.fail("something was fitted"))
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hgad-fast\[anomalib\]'"):
        anomalib_engine.main([str(root), "--contenders", "padim"])


def test_contenders_of_an_earlier_run_are_kept_if_its_setting_is_the_same(tmp_path: Path) -> None:
    earlier = {"classes": ["bolt"], "commit": "a", "date": "yesterday", "contenders": {"padim": {"models": 1}}}
    record = earlier | {"commit": "b", "date": "today", "contenders": {}}
    assert anomalib_engine.kept(earlier, record, tmp_path) == {"padim": {"models": 1}}
    with pytest.raises(ValueError, match=r"record\.json has other values of classes: .* leave out --keep"):
        anomalib_engine.kept(earlier, record | {"classes": ["nut"]}, tmp_path / "record.json")
