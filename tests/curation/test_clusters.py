"""Groups of unsorted images: what they are, what they do not depend on, and the files for people and for training."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path

import numpy as np
import products
import pytest
from PIL import Image

from hgad_fast.curation import clusters
from hgad_fast.curation.clusters import cluster
from hgad_fast.data.datasets import discover

COUNTS = {"amber": 14, "blue": 11, "grey": 9}


def write_mixture(root: Path, counts: dict[str, int] = COUNTS, prefix: str = "") -> Path:
    """Write images of several products and sizes, at several depths; their kind is the end of their names."""
    sizes = ((48, 48), (64, 48), (48, 96))
    for kind, count in counts.items():
        for i in range(count):
            products.write(root / ("" if i % 2 else f"day {i % 3}") / f"{prefix}{i}-{kind}.png", kind, i, sizes[i % 3])
    return root


def kinds(found: clusters.Clusters) -> list[set[str]]:
    return [{path.stem.split("-")[-1] for path in group} for group in found.groups]


def contents(found: clusters.Clusters) -> list[list[bytes]]:
    return [[path.read_bytes() for path in group] for group in found.groups]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    return write_mixture(tmp_path_factory.mktemp("mixture"))


@pytest.fixture(scope="module")
def found(mixture) -> clusters.Clusters:
    return cluster(mixture, config=products.config())


def test_products_are_told_apart_and_the_largest_group_is_first(found):
    assert kinds(found) == [{"amber"}, {"blue"}, {"grey"}]
    assert [len(group) for group in found.groups] == list(COUNTS.values())
    assert found.names == ("group-1", "group-2", "group-3")
    assert max(found.silhouettes, key=found.silhouettes.__getitem__) == 3
    assert list(found.silhouettes) == [2, 3, 4] and found.silhouettes[3] > clusters.REASONABLE  # 34 images: 4 x 8


def test_groups_depend_on_neither_names_nor_order(found, mixture, tmp_path):
    for number, path in enumerate(sorted(mixture.rglob("*.png"), reverse=True)):
        shutil.copy(path, tmp_path / f"{number:03}.png")
    again = cluster(tmp_path, config=products.config())
    assert contents(again) == contents(found) and again.silhouettes == found.silhouettes


def test_images_of_one_product_are_one_group(tmp_path):
    found = cluster(write_mixture(tmp_path, {"blue": 20}), config=products.config())
    assert [len(group) for group in found.groups] == [20]
    assert all(value < clusters.REASONABLE for value in found.silhouettes.values())


def test_a_number_of_groups_that_is_given(mixture):
    (group,) = cluster(mixture, 1, config=products.config()).groups
    assert len(group) == sum(COUNTS.values())
    two = cluster(mixture, 2, config=products.config())
    assert len(two.groups) == 2 and two.silhouettes == {}


@pytest.mark.parametrize("k", [0, -1, True, "3", "many", 2.0])
def test_a_number_of_groups_that_is_none(mixture, k):
    with pytest.raises(ValueError, match="the number of groups is .*; give a whole number from 1, or 'auto'"):
        cluster(mixture, k, config=products.config())


def test_more_groups_than_images_allow(mixture):
    with pytest.raises(ValueError, match="5 groups of 8 images or more take 40 images, and there are 34; give fewer"):
        cluster(mixture, 5, config=products.config())


def test_small_groups_go_to_the_nearest():
    rng = np.random.default_rng(0)
    centres = np.repeat([[0.0, 0], [10, 0], [0, 9], [1, 9]], [20, 20, 20, 3], axis=0)  # the last three: too few
    ids = clusters._groups(centres + rng.normal(0, 0.01, centres.shape), 4)
    assert len(set(ids)) == 3 and set(ids[60:]) == set(ids[40:60])
    assert [len(set(ids[start : start + 20])) for start in (0, 20, 40)] == [1, 1, 1]


def test_outliers_are_no_product():
    """Ten images of which three are far away would be two groups of a large silhouette."""
    vectors = np.r_[np.random.default_rng(0).normal(0, 1, (40, 20)), np.full((3, 20), 50.0)]
    ids, silhouettes = clusters._best_groups(vectors)
    assert set(ids) == {0} and all(value < clusters.REASONABLE for value in silhouettes.values())


def test_a_silhouette_of_a_part_of_many_images(monkeypatch):
    vectors = np.repeat([[0.0, 0], [10, 0], [0, 10]], 30, axis=0) + np.random.default_rng(0).normal(0, 0.1, (90, 2))
    monkeypatch.setattr(clusters, "MEASURED", 30)
    ids, silhouettes = clusters._best_groups(vectors)
    assert len(set(ids)) == 3 and silhouettes[3] > 0.9
    assert [len(set(ids[start : start + 30])) for start in (0, 30, 60)] == [1, 1, 1]


def test_the_list_is_one_that_training_reads(found, mixture, tmp_path):
    path = found.write_csv(tmp_path / "lists" / "classes.csv")
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "class", "split", "label", "mask"]
    assert not any(os.path.isabs(row["path"]) for row in rows)
    dataset = discover(path)
    assert dataset.class_names == found.names and dataset.test == ()
    for class_id, group in enumerate(found.groups):
        own = {sample.path.resolve() for sample in dataset.train if sample.class_id == class_id}
        assert own == {image.resolve() for image in group}


def test_the_list_lies_in_a_linked_folder(found, tmp_path):
    """A path upwards from a link leads to where the folder really lies."""
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    dataset = discover(found.write_csv(tmp_path / "link" / "classes.csv"))
    assert len(dataset.train) == sum(COUNTS.values())


def test_names_of_any_kind(tmp_path):
    root = write_mixture(tmp_path / "bilder, größe 1; 部品", {"amber": 8}, prefix='"é,\n')
    path = cluster(root, 1, config=products.config()).write_csv(tmp_path / "classes.csv")
    assert {sample.path.name for sample in discover(path).train} == {file.name for file in root.rglob("*.png")}


@pytest.mark.parametrize("name", [" first.png", os.fsdecode(b"gr\xf6n.png")])
def test_names_that_no_list_can_hold(tmp_path, name):
    image = products.write(tmp_path / "0.png", "amber", 0).rename(tmp_path / name)
    found = clusters.Clusters(((image,),), {})
    (tmp_path / "classes.csv").write_text("as it was")
    with pytest.raises(ValueError, match=r"this name cannot stand in a CSV file.*; rename the file"):
        found.write_csv(tmp_path / "classes.csv")
    assert (tmp_path / "classes.csv").read_text() == "as it was"


def test_a_sheet_for_each_group(found, tmp_path):
    sheets = found.write_sheets(tmp_path / "classes.csv")
    assert [path.name for path in sheets] == [f"classes-{name}.jpg" for name in found.names]
    assert set(tmp_path.iterdir()) == set(sheets)
    for path, colour in zip(sheets, products.COLOURS.values(), strict=True):
        pixels = np.asarray(Image.open(path).convert("RGB"), np.float64)
        coloured = pixels[np.ptp(pixels, axis=2) > 60] if len(set(colour)) > 1 else pixels[pixels[..., 0] < 200]
        hue = coloured.mean(0) / coloured.mean(0).max()
        np.testing.assert_allclose(hue, np.array(colour) / max(colour), atol=0.15)


def test_sheets_of_the_groups_of_a_replaced_list_alone_are_removed(found, tmp_path):
    path = tmp_path / "classes.csv"
    names = ["group-12.jpg", "group-4.jpg", "group-07.jpg", "group-one.jpg", "group-12.png"]
    listed, *others = [tmp_path / f"classes-{name}" for name in names]
    others.append(tmp_path / "other-group-12.jpg")
    for file in (listed, *others):
        file.touch()
    found.write_csv(path)  # replaces nothing
    assert set(tmp_path.iterdir()) == {path, listed, *others}
    path.write_text("no list, group-12")
    found.write_csv(path)
    assert listed.exists()
    path.write_text("path,class,split,label\na.png,group-12,train,good\nb.png,group-07,train,good\n")
    found.write_csv(path)
    assert set(tmp_path.iterdir()) == {path, *others}


def test_no_sheet_replaces_an_image(tmp_path):
    image = products.write(tmp_path / "c-group-1.jpg", "amber", 0)
    before = image.read_bytes()
    found = clusters.Clusters(((image,),), {})
    path = tmp_path / "c.csv"
    path.write_text("path,class,split,label\nc-group-1.jpg,group-1,train,good\n")
    found.write_csv(path)
    with pytest.raises(ValueError, match=r"c-group-1\.jpg is one of the images, and a sheet would replace it"):
        found.write_sheets(path)
    assert image.read_bytes() == before


def test_a_sheet_of_a_large_group_shows_a_part_from_centre_to_edge(monkeypatch, found, tmp_path):
    from hgad_fast.scoring import plot

    drawn = []
    monkeypatch.setattr(plot, "image_sheet", lambda cases, path, **texts: drawn.append(texts))
    monkeypatch.setattr(clusters, "SHOWN", 5)
    found.write_sheets(tmp_path / "classes.csv")
    first = found.groups[0]
    assert drawn[0]["names"] == [first[i].name for i in (0, 3, 6, 10, 13)]
    assert drawn[0]["title"] == "group-1: 14 images" and "5 of them" in drawn[0]["note"]


def test_the_training_images_of_a_dataset_without_their_classes(tmp_path):
    for kind in ("amber", "blue"):
        for i in range(9):
            products.write(tmp_path / kind / "train" / "good" / f"{i}-{kind}.png", kind, i)
        products.write(tmp_path / kind / "test" / "spot" / f"0-{kind}.png", kind, 50, spot=True)
    found = cluster(tmp_path, config=products.config())
    assert [len(group) for group in found.groups] == [9, 9] and {frozenset(kind) for kind in kinds(found)} == {
        frozenset({"amber"}),
        frozenset({"blue"}),
    }
    again = cluster([tmp_path / "amber", tmp_path / "blue"], config=products.config())
    assert contents(again) == contents(found)
    deeper = cluster(shutil.copytree(tmp_path, tmp_path / "deep" / "er").parent, config=products.config())
    assert contents(deeper) == contents(found)  # and not the defects too


def test_a_dataset_among_loose_images(tmp_path):
    """Of it the training images are taken, of the rest all."""
    for i in range(9):
        products.write(tmp_path / "blue" / "train" / "good" / f"{i}-blue.png", "blue", i)
        products.write(tmp_path / "loose" / ("" if i % 2 else "day 1") / f"{i}-amber.png", "amber", i)
    products.write(tmp_path / "10-amber.png", "amber", 10)
    left_out = {
        products.write(tmp_path / "blue" / place, "blue", 50 + i, spot=True)
        for i, place in enumerate(("test/good/0.png", "test/spot/0.png", "ground_truth/spot/0_mask.png", "new/0.png"))
    }
    (tmp_path / "loose" / "notes.txt").touch()
    found = cluster(tmp_path, config=products.config())
    assert {path for group in found.groups for path in group} == set(tmp_path.rglob("*.png")) - left_out
    assert [len(group) for group in found.groups] == [10, 9] and kinds(found) == [{"amber"}, {"blue"}]
    assert found.notes == (
        f"{tmp_path}: 4 images (or masks) are left out, as of {tmp_path / 'blue'} the training images alone are taken",
        f"{tmp_path}: passed over: 1 .txt",
    )


@pytest.mark.parametrize("place", ["candle/Data/Images/Anomaly", "dirt/test/spot", "wood/train/new"])
def test_images_in_a_folder_of_a_layout_that_does_not_say_which_are_normal(tmp_path, place):
    products.write(tmp_path / "loose" / "0.png", "amber", 0)
    products.write(tmp_path / "a" / place / "0.png", "blue", 0, spot=True)
    with pytest.raises(ValueError, match=rf"{place.partition('/')[0]}.*put normal ones"):
        clusters.unsorted_images(tmp_path)


def test_damaged_images(mixture, tmp_path):
    root = shutil.copytree(mixture, tmp_path / "images")
    (root / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.png"):
        cluster(root, config=products.config())
    with pytest.warns(UserWarning, match=r"broken\.png"):
        found = cluster(root, config=products.config(), skip_bad=True)
    assert [len(group) for group in found.groups] == list(COUNTS.values())


def test_there_are_no_images(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"there are no images in .*; .*passed over: 1 \.txt"):
        cluster(tmp_path, config=products.config())
    with pytest.raises(ValueError, match="no such folder"):
        cluster(tmp_path / "none", config=products.config())


def test_it_takes_a_backbone(mixture):
    from hgad_fast import GaussianConfig

    with pytest.raises(ValueError, match="backbone_arch is None"):
        cluster(mixture, config=GaussianConfig(n_classes=1, backbone_arch=None, feature_dims=(4,)))


def test_images_of_which_none_can_be_decoded_are_an_error(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of the 3 images can be decoded"), pytest.warns(UserWarning):
        cluster(tmp_path, config=products.config(), skip_bad=True)
