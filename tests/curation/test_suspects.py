"""The ranking of training images: what it finds, what it does not depend on, and what is written of it."""

from __future__ import annotations

import csv
import math
import os
import shutil
import weakref
from pathlib import Path

import numpy as np
import products
import pytest
import torch
from PIL import Image

from hgad_fast.curation import suspects as module
from hgad_fast.curation.suspects import suspects

WRONG = ("amber/train/good/13-spot.png", "amber/train/good/3-blue.png", "blue/train/good/7-spot.png")


def write_dataset(root: Path) -> Path:
    """Write two classes; one has an image of the other and a defect among its training images, the other a defect."""
    for kind, count in (("amber", 16), ("blue", 12)):
        for i in range(count):
            products.write(root / kind / "train" / "good" / f"{i}.png", kind, i)
    products.write(root / WRONG[0], "amber", 20, spot=True)
    products.write(root / WRONG[1], "blue", 21)
    products.write(root / WRONG[2], "blue", 22, spot=True)
    return root


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def ranking(dataset) -> module.Suspects:
    return suspects(dataset, config=products.config())


def scores(ranking: module.Suspects) -> dict[tuple[str, bytes], float]:
    return {(row.class_name, row.path.read_bytes()): row.score for row in ranking.rows}


def test_what_is_wrong_comes_first(ranking, dataset):
    assert {str(row.path.relative_to(dataset)) for row in ranking.rows[:3]} == set(WRONG)
    assert [row.rank for row in ranking.rows] == list(range(1, 32))
    values = [row.score for row in ranking.rows]
    assert values == sorted(values, reverse=True) and all(map(math.isfinite, values))
    assert all(row.path.parts[-4] == row.class_name for row in ranking.rows)


def test_scores_of_a_class_are_in_its_own_spread(ranking):
    for name in ("amber", "blue"):
        values = np.array([row.score for row in ranking.rows if row.class_name == name])
        assert np.median(values) == pytest.approx(0, abs=1e-9)
        assert 1.4826 * np.median(np.abs(values)) == pytest.approx(1)


def test_scores_depend_on_contents_alone(ranking, dataset, tmp_path):
    """They have the same bits with other names and orders, and without the other class."""
    for number, path in enumerate(sorted((dataset / "amber" / "train" / "good").iterdir(), reverse=True)):
        (tmp_path / "amber").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "amber" / f"{number:03}.png")
    again = scores(suspects(tmp_path, config=products.config()))
    assert again == {key: score for key, score in scores(ranking).items() if key[0] == "amber"}
    alone = suspects(tmp_path / "amber", config=products.config())  # a folder of images: one class
    assert scores(alone) == again


def test_an_image_is_scored_without_itself_and_its_copies(dataset, tmp_path):
    """A defect that lies there three times is as suspicious as one: copies do not vouch for each other."""
    root = shutil.copytree(dataset / "amber" / "train" / "good", tmp_path / "amber")
    for number in range(2):
        shutil.copy(root / "13-spot.png", root / f"copy {number}.png")
    ranking = suspects(root, config=products.config())
    first = {row.path.name for row in ranking.rows[:4]}
    assert first == {"13-spot.png", "copy 0.png", "copy 1.png", "3-blue.png"}
    assert len({row.score for row in ranking.rows if row.path.name in ("13-spot.png", "copy 0.png", "copy 1.png")}) == 1


def test_the_images_that_scored_highest_are_left_out_in_the_second_pass(monkeypatch, dataset):
    known = []
    score = module._map

    def seen(model, levels):
        known.append(int(model.gaussians[0].images[0]))
        return score(model, levels)

    monkeypatch.setattr(module, "_map", seen)
    suspects([dataset / "amber"], config=products.config(), folds=18)
    assert known[:18] == [17] * 18  # of 18 different images each is scored by the others
    assert sorted(set(known[18:])) == [16, 17] and known[18:].count(17) == 1  # one is left out of all


def test_images_of_several_shapes_are_compared_as_squares(tmp_path):
    for i in range(12):
        products.write(tmp_path / "blue" / f"{i}.png", "blue", i, size=(48, 48) if i % 2 else (48, 96))
    products.write(tmp_path / "blue" / "spot.png", "blue", 30, size=(48, 96), spot=True)
    for i in range(9):
        products.write(tmp_path / "amber" / f"{i}.png", "amber", i, size=(48, 96))
    with pytest.warns(
        UserWarning, match="the images of 'blue' differ in their proportions.*compared as squares"
    ) as told:
        ranking = suspects(tmp_path, config=products.config())
    assert len(told) == 1 and ranking.rows[0].path.name == "spot.png" and len(ranking.rows) == 22
    one_shape = suspects(tmp_path / "amber", config=products.config())  # is seen as it is
    assert scores(one_shape) == {key: score for key, score in scores(ranking).items() if key[0] == "amber"}


def test_images_that_are_seen_as_squares_by_the_settings(tmp_path, recwarn):
    for i in range(12):
        products.write(tmp_path / "blue" / f"{i}.png", "blue", i, size=(48, 48) if i % 2 else (48, 96))
    squares = suspects(tmp_path, config=products.config(square=True))
    assert not recwarn.list
    with pytest.warns(UserWarning, match="are compared as squares"):
        assert scores(suspects(tmp_path, config=products.config())) == scores(squares)


def test_maps_are_kept_of_the_images_that_a_sheet_shows_alone(monkeypatch, ranking, dataset, tmp_path):
    monkeypatch.setattr(module, "SHEET_ROWS", 4)
    coarse = module._coarse
    made: list[weakref.ref[np.ndarray]] = []
    alive = []

    def watched(anomaly_map):
        kept = coarse(anomaly_map)
        made.append(weakref.ref(kept))
        alive.append(sum(reference() is not None for reference in made))
        return kept

    monkeypatch.setattr(module, "_coarse", watched)
    few = suspects(dataset, config=products.config())
    assert max(alive) <= 4 + 4 + 2  # of the ranking so far, of the class, the new one, and the one before it
    assert few == ranking and len(few._drawn) == sum(reference() is not None for reference in made) == 4
    for drawn, same in zip(few._drawn, ranking._drawn[:4], strict=True):
        np.testing.assert_array_equal(drawn.anomaly_map, same.anomaly_map)
        assert drawn.threshold == same.threshold
    assert few.write_sheet(tmp_path / "sheet.jpg", 1000).is_file()


def test_equal_scores_of_many_images_keep_their_maps(monkeypatch, dataset):
    """All of a class, more than a sheet shows, are no numbers."""
    monkeypatch.setattr(module, "SHEET_ROWS", 4)
    score = module._map
    monkeypatch.setattr(module, "_map", lambda model, levels: score(model, levels) * math.nan)
    ranking = suspects(dataset / "amber", config=products.config())
    assert {row.score for row in ranking.rows} == {math.inf} and len(ranking._drawn) == 4
    assert [row.path for row in ranking.rows] == sorted(row.path for row in ranking.rows)


def test_no_sheet_replaces_an_image(ranking):
    image = ranking.rows[-1].path
    with pytest.raises(ValueError, match="is one of the images, and a sheet would replace it"):
        ranking.write_sheet(image, 3)


def test_a_class_of_few_images(tmp_path):
    for i in range(7):
        products.write(tmp_path / "blue" / f"{i}.png", "blue", i)
    shutil.copy(tmp_path / "blue" / "0.png", tmp_path / "blue" / "copy.png")
    with pytest.raises(ValueError, match="class 'blue' has 7 different training images; 8 are needed"):
        suspects(tmp_path, config=products.config())
    products.write(tmp_path / "blue" / "7.png", "blue", 7)
    assert len(suspects(tmp_path, config=products.config()).rows) == 9


def test_images_that_are_all_alike_but_one(tmp_path):
    """Most of the scores are one and the same, so that their spread is 0."""
    flat = np.full((48, 48, 3), 90, np.uint8)
    for i in range(9):
        flat[0, 0] = i // 8  # eight, and one that differs by a pixel
        Image.fromarray(flat).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match="has 2 different training images"):
        suspects(tmp_path, config=products.config())


@pytest.mark.parametrize("folds", [1, 0, True, 2.0, "5"])
def test_a_number_of_folds_that_is_none(dataset, folds):
    with pytest.raises(ValueError, match="folds is .*; give a whole number from 2"):
        suspects(dataset, folds=folds, config=products.config())


def test_a_score_that_is_no_number_comes_first(monkeypatch, dataset):
    score, calls = module._map, []

    def broken(model, levels):
        calls.append(0)
        return score(model, levels) * (math.nan if len(calls) % 18 == 5 else 1)

    monkeypatch.setattr(module, "_map", broken)
    ranking = suspects(dataset / "amber", config=products.config())
    assert ranking.rows[0].score == math.inf and all(math.isfinite(row.score) for row in ranking.rows[1:])


def test_damaged_images(dataset, tmp_path):
    root = shutil.copytree(dataset, tmp_path / "dataset")
    (root / "amber" / "train" / "good" / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.png"):
        suspects(root, config=products.config())
    with pytest.warns(UserWarning, match=r"broken\.png"):
        assert len(suspects(root, config=products.config(), skip_bad=True).rows) == 31


def test_a_folder_that_is_no_dataset(tmp_path):
    with pytest.raises(ValueError, match="no class folders"):
        suspects(tmp_path, config=products.config())
    with pytest.raises(ValueError, match="no such folder"):
        suspects(tmp_path / "none", config=products.config())


def test_the_list_and_the_sheet(ranking, dataset, tmp_path):
    path = ranking.write_csv(tmp_path / "suspects.csv")
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["rank"]) for row in rows] == list(range(1, 32))
    for row, suspect in zip(rows, ranking.rows, strict=True):
        assert os.path.samefile(tmp_path / row["path"], suspect.path) and row["class"] == suspect.class_name
        assert float(row["score"]) == pytest.approx(suspect.score, abs=5e-5)
    sheet = ranking.write_sheet(tmp_path / "suspects.jpg", 3)
    pixels = np.asarray(Image.open(sheet).convert("RGB"), np.int64)
    red = (abs(pixels - (255, 42, 26)) < 40).all(2)
    assert red.sum() > 100  # outlines around what is wrong
    assert ranking.write_sheet(tmp_path / "all.jpg", 1000) == tmp_path / "all.jpg"


def test_coarse_maps_keep_their_maxima():
    anomaly_map = torch.zeros(100, 300)
    anomaly_map[37, 211] = 5.0
    coarse = module._coarse(anomaly_map)
    assert coarse.shape == (21, 64) and coarse.max() == 5.0 and (coarse > 0).sum() == 1
    assert module._coarse(anomaly_map[:10, :20]).shape == (10, 20)
