"""The machinery of the comparison with anomalib, without anomalib: contenders of this library on a tiny dataset."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import peers
from hgad_fast.data import datasets

SMALL = {  # of the contender "gaussian"
    "backbone_arch": "test_efficientnet",
    "backbone_weights": None,
    "img_size": 64,
    "dim": 8,
    "coarse_dim": 4,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes with six training images, two normal ones to test on and two with a square and its mask."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)

    def write(path: Path, array: np.ndarray) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)

    for k, name in enumerate(("bolt", "nut")):
        folders = {"train/good": 6, "test/good": 2, "test/square": 2}
        for folder, count in folders.items():
            for i in range(count):
                image = rng.integers(100 * k, 100 * k + 60, (72, 96, 3)).astype(np.uint8)
                if folder == "test/square":
                    mask = np.zeros((72, 96), np.uint8)
                    mask[20:40, 30:50] = 255
                    image[mask > 0] = 255
                    write(root / name / "ground_truth" / "square" / f"{i}_mask.png", mask)
                write(root / name / folder / f"{i}.png", image)
    return root


def test_a_contender_of_ours_gets_a_row_and_a_record(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "peers.json"
    changes = [f"{field}={json.dumps(value)}" for field, value in SMALL.items()]
    words = [str(root), "--contenders", "gaussian", "--training-images", "4", "--limit", "1", "--rounds", "2"]
    peers.main([*words, "--output", str(output), "--set", *changes])

    heading, rule, row, *after = capsys.readouterr().out.splitlines()
    columns = heading.count("|")
    assert columns == 11 and rule.count("|") == columns and row.count("|") == columns
    assert row.startswith("| gaussian | ")
    assert after[0] == "" and "8 training and 4 test images" in after[1]

    record = json.loads(output.read_text())
    assert record["versions"]["torch"] and record["training_images"] == 8 and record["classes"] == ["bolt", "nut"]
    contender = record["contenders"]["gaussian"]
    assert set(contender["by_class"]) == {"bolt", "nut"}
    for kind in ("score_seconds", "features_seconds"):
        times = contender[kind]
        assert 0 < times["lower_quartile"] <= times["median"] <= times["upper_quartile"]
    for name in ("fit_seconds", "fit_memory_bytes", "score_memory_bytes", "model_bytes"):
        assert contender[name] > 0, name
    assert contender["settings"]["backbone_arch"] == "test_efficientnet"

    # Maps and scores one by one have the very figures of the library's own evaluation.
    evaluated = contender["honest"]["mean"]
    for name, value in contender["mean"].items():
        of_evaluation = {"pixel_aupro_0.3": "pixel_aupro_30", "pixel_aupro_0.05": "pixel_aupro_5"}.get(name, name)
        assert value == evaluated[of_evaluation], name


def test_figures_that_readme_shows_are_among_those_that_are_computed(root: Path) -> None:
    dataset = datasets.discover(root)
    maps = np.random.default_rng(0).random((len(dataset.test), 256, 256), dtype=np.float32)
    scores = [float(sample.is_anomalous) for sample in dataset.test]

    class Detector:
        config = peers.CentreCrop()

    figures = peers.figures(Detector(), dataset, maps, scores)
    assert set(peers.FIGURES.values()) <= set(figures["mean"])
    assert figures["mean"]["image_auroc"] == 1  # the scores are the labels
    for name, value in figures["mean"].items():
        assert value == np.mean([figures["by_class"][class_name][name] for class_name in dataset.class_names])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_images_are_chosen_evenly(root: Path, count: int) -> None:
    train = datasets.discover(root).train
    chosen = peers.spread(train, count, lambda sample: sample.class_id)
    assert [sample.class_id for sample in chosen] == [0] * count + [1] * count
    assert [int(sample.path.stem) for sample in chosen[:count]] == [i * 6 // count for i in range(count)]


@pytest.mark.parametrize("count", [None, 0, 6, 100])
def test_all_images_are_taken_where_there_are_no_more(root: Path, count: int | None) -> None:
    train = datasets.discover(root).train
    assert peers.spread(train, count, lambda sample: sample.class_id) == train


def test_a_missing_anomalib_is_an_error_before_anything_is_fitted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(peers, "run", lambda *_: pytest.fail("something was fitted"))
    with pytest.raises(ModuleNotFoundError, match=r"padim patchcore: .*pip install 'hgad-fast\[peers\]'"):
        peers.main([str(root), "--contenders", "gaussian", "padim", "patchcore"])


def test_a_setting_that_cannot_work_is_an_error_before_anything_is_fitted(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "in_process", lambda *_: pytest.fail("something was fitted"))
    with pytest.raises(ValueError, match="GaussianConfig.shrinkage is 2; allowed"):
        peers.main([str(root), "--contenders", "gaussian", "--set", "shrinkage=2"])
