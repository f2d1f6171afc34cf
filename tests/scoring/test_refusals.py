"""What cannot be scored, or is doubtful, is named: the image, the class, the argument; and the others are scored."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hgad_fast import GaussianConfig, GaussianModel, Scorer
from hgad_fast.evaluation.evaluate import evaluate
from hgad_fast.scoring import pipeline
from hgad_fast.scoring.calibration import rate_table

SIZE = (48, 64)


def write(path: Path, seed: int, size: tuple[int, int] = SIZE, level: int = 128) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).normal(level, 20, (*size, 3)).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for k, name in enumerate(("dark", "light")):
        for i in range(8):
            write(folder / name / "train" / "good" / f"{i}.png", 100 * k + i, level=60 + 120 * k)
        for kind in ("good", "dent"):
            write(folder / name / "test" / kind / "0.png", 100 * k + 50, level=60 + 120 * k)
    return folder


def made(**changes: Any) -> GaussianModel:
    settings: dict[str, Any] = {
        "n_classes": 2, "backbone_arch": "test_efficientnet", "backbone_weights": None, "out_indices": (2, 3),
        "img_size": 48, "msk_size": 24, "dim": 6, "coarse_dim": 3,
    }  # fmt: skip
    return GaussianModel(GaussianConfig(**settings | changes))


@pytest.fixture(scope="module")
def fitted(root: Path) -> GaussianModel:
    model = made()
    history = model.fit(root, progress=False, false_alarm_rate=0.2)
    assert history.recognition == {"dark": (4, 4), "light": (4, 4)}
    return model


def breaking(model: Any, bad: Callable[[torch.Tensor], bool]) -> Callable[..., Any]:
    """Densities that are no number for the images whose features are `bad`."""
    plain = model.densities

    def densities(maps: Any, group_ids: Any) -> Any:
        result = plain(maps, group_ids)
        for i, features in enumerate(maps.whole()[0]):
            if bad(features):
                result.distances["likelihood"][i, 0, 0] = math.nan  # of the map, and not of the score
        return result

    return densities


@pytest.mark.parametrize("throughput", [False, True])
def test_one_image_without_a_score_fails_alone(
    fitted: GaussianModel, root: Path, throughput: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted((root / "dark" / "train" / "good").iterdir())
    expected = fitted.score(files).image_score
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(fitted, "densities", breaking(fitted, lambda x: bool(seen.append(x.clone()))))
    fitted.score(files[3])
    bad = seen[0]
    monkeypatch.undo()
    monkeypatch.setattr(
        fitted, "densities", breaking(fitted, lambda x: x.shape == bad.shape and torch.allclose(x, bad, atol=1e-4))
    )
    records = pipeline.score_files(fitted, files, pipeline.Job(throughput=throughput))
    assert [i for i, record in enumerate(records) if record.error is not None] == [3]
    assert str(records[3].error).startswith(f"{files[3]}: the image has no score: it is nan under 'dark'")
    for i, record in enumerate(records):
        assert i == 3 or record.row is not None and record.row["score"] == pytest.approx(float(expected[i]), rel=1e-4)
    for wrong, name in ((files, str(files[3])), (files[3], str(files[3])), (files[3].parent, str(files[3]))):
        with pytest.raises(ValueError, match="has no score") as error:
            fitted.score(wrong)
        assert str(error.value).startswith(name)
    with Image.open(files[3]) as opened, pytest.raises(ValueError, match="the image has no score"):
        Scorer(fitted)(np.asarray(opened))


def test_other_proportions_are_named_by_file_and_in_pixels(fitted: GaussianModel, root: Path, tmp_path: Path) -> None:
    wide = write(tmp_path / "new" / "dark" / "train" / "good" / "wide.png", 7, (48, 128))
    seen = r"an image seen at about 48 x 128 pixels \(height x width\) has other proportions.* the about 48 x 64 pixels"
    for images in ([wide], wide, wide.parent, [root / "dark/train/good/0.png", wide]):
        with pytest.raises(ValueError, match=rf"^{wide}: {seen}"):
            fitted.score(images)
    with pytest.raises(ValueError, match=f"^{wide}: {seen}"):
        fitted.calibrate(tmp_path / "new")
    write(tmp_path / "new" / "dark" / "test" / "good" / "wide.png", 7, (48, 128))
    write(tmp_path / "new" / "light" / "train" / "good" / "0.png", 7)
    with pytest.raises(ValueError, match=f"^{wide}: {seen}"):
        fitted.add(tmp_path / "new")
    with pytest.raises(ValueError, match=f"^{tmp_path / 'new/dark/test/good/wide.png'}: {seen}"):
        evaluate(fitted, tmp_path / "new")
    for i in range(1, 4):
        for name in ("dark", "light"):
            write(tmp_path / "new" / name / "train" / "good" / f"{i}.png", i)
    with pytest.raises(ValueError, match=r"'dark' have about 48 x 128 pixels \(.*wide.png\) and about 48 x 64"):
        made(calibration_fraction=0).fit(tmp_path / "new", progress=False)


def test_classes_that_are_taken_for_each_other_are_named(root: Path, tmp_path: Path) -> None:
    for name in ("one", "other"):
        for i in range(6):
            write(tmp_path / name / "train" / "good" / f"{i}.png", i)
    model = made()
    with pytest.warns(UserWarning, match=r"the class of \d of 6 held-out images is recognised \(.*class_ids, --class"):
        history = model.fit(tmp_path, progress=False, false_alarm_rate=0.3)
    assert sum(right for right, _ in history.recognition.values()) < 6


def test_one_camera_is_calibrated_anew(fitted: GaussianModel, root: Path, tmp_path: Path) -> None:
    before, kept = rate_table(fitted), fitted.calibration
    for i in range(5):
        write(tmp_path / "light" / "train" / "good" / f"{i}.png", 900 + i, level=200)
    try:
        assert fitted.calibrate(tmp_path) == ("light",)
        after = rate_table(fitted)
        assert after[0] == before[0] and after[1]["images"] == 5 and after[1]["threshold"] != before[1]["threshold"]
        assert fitted.calibrate([tmp_path]) == ("light",) and rate_table(fitted) == after
        write(tmp_path / "blue" / "train" / "good" / "0.png", 1)
        with pytest.raises(ValueError, match="has images of 'blue', and the model was made for dark, light"):
            fitted.calibrate(tmp_path)
    finally:
        fitted.calibration = kept


def test_wrong_arguments_are_named(fitted: GaussianModel, root: Path) -> None:
    frame = np.zeros((*SIZE, 3), np.uint8)
    with pytest.raises(ValueError, match="class_id is no argument of score: it is class_ids"):
        fitted.score(frame, class_id=1)
    for wrong in (frame, None, 3, [frame], torch.zeros(3, 4, 4)):
        for use in (fitted.add, fitted.fit, fitted.calibrate):
            with pytest.raises(ValueError, match="pass a dataset .* Images alone are no dataset: put their files into"):
                use(wrong)  # type: ignore[operator]
    with pytest.raises(ValueError, match="img_size is 'foo'; allowed: a whole number from 1: places are"):
        Scorer(fitted, img_size="foo")


def test_the_image_of_a_folder_is_named_and_not_a_mask_that_is_left_out(fitted: GaussianModel, tmp_path: Path) -> None:
    write(tmp_path / "ground_truth" / "dent" / "0.png", 1)
    long = write(tmp_path / "test" / "dent" / "0.png", 2, size=(48, 200))
    write(tmp_path / "test" / "dent" / "1.png", 3)
    message = f"^{re.escape(str(long))}: .* proportions"
    with pytest.warns(UserWarning, match="1 masks"), pytest.raises(ValueError, match=message):
        fitted.score(tmp_path)


def test_a_damaged_test_image_is_named_once(fitted: GaussianModel, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "data")
    damaged = tmp_path / "data" / "dark" / "test" / "dent" / "0.png"
    damaged.write_bytes(b"no image")
    with pytest.raises(ValueError, match=f"^{re.escape(str(damaged))}: no image"):
        evaluate(fitted, tmp_path / "data")
