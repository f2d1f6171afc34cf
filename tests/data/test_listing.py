"""listing.py: which files are found below folders, by whatever links, and which are left out with a word."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hgad_fast.data.datasets import discover
from hgad_fast.data.listing import endings, files_below, images_to_score, list_images, passed_over


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def link(path: Path, target: str | Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target, target_is_directory=True)


def names(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in list_images(root)]


def test_links_upwards_are_not_followed(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / f"set/w/train/good/{i}.png")
    write(tmp_path / "set/w/test/dent/0.png")
    expected = discover(tmp_path / "set")
    good = tmp_path / "set/w/train/good"
    for name, target in (("here", "."), ("up", ".."), ("up2", ".."), ("root", "../../.."), ("far", tmp_path)):
        link(good / name, target)
        link(tmp_path / "set/w/test/dent" / name, target)
    link(tmp_path / "set/again", ".")
    link(tmp_path / "set/w/inside", tmp_path / "set")
    assert discover(tmp_path / "set") == expected
    assert [path.name for path in list_images(good)] == ["0.png", "1.png", "2.png"]


def test_links_in_a_circle_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "a/1.png")
    write(tmp_path / "b/2.png")
    link(tmp_path / "a/to_b", "../b")
    link(tmp_path / "b/to_a", "../a")
    assert names(tmp_path / "a") == ["1.png", "to_b/2.png"]
    assert names(tmp_path) == ["a/1.png", "b/2.png"]


def test_links_of_each_folder_to_all_others_take_no_time(tmp_path: Path) -> None:
    """By ways down that enter no folder twice there would be 14! of them."""
    for i in range(14):
        write(tmp_path / f"set/d{i:02}/{i:02}.png")
        for k in range(14):
            link(tmp_path / f"set/d{i:02}/to_{k:02}", f"../d{k:02}")
    assert names(tmp_path / "set") == [f"d{i:02}/{i:02}.png" for i in range(14)]
    assert sorted(path.name for path in list_images(tmp_path / "set/d03")) == [f"{i:02}.png" for i in range(14)]


def test_folders_may_be_nested_deeply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = tmp_path / "w/train/good"
    write(good / "e.png")
    monkeypatch.chdir(good)
    for _ in range(1100):
        os.mkdir("d")
        os.chdir("d")
    write(Path("1.png"))
    assert names(tmp_path) == ["w/train/good/" + 1100 * "d/" + "1.png", "w/train/good/e.png"]
    assert len(discover(tmp_path).train) == 2
    os.unlink("1.png")
    for _ in range(1100):  # pytest removes folders by recursion
        os.chdir("..")
        os.rmdir("d")


def test_links_elsewhere_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "store/lot/1.png")
    write(tmp_path / "store/2.png")
    (tmp_path / "set").mkdir()
    link(tmp_path / "set/first", tmp_path / "store")
    link(tmp_path / "set/second", "../store")
    (tmp_path / "set/3.png").symlink_to(tmp_path / "store/2.png")
    assert names(tmp_path / "set") == [
        *("3.png", "first/2.png", "first/lot/1.png"),
    ]
    link(tmp_path / "start", tmp_path / "set")  # a folder that is given by a link
    assert names(tmp_path / "start") == names(tmp_path / "set")


def test_what_is_passed_over_is_counted_by_its_ending(tmp_path: Path) -> None:
    for name in ("1.png", "2.PNG", "a.HEIC", "b.heic", "c.txt", "d", ".hidden", "e.\udcf6", "lot/f.heic"):
        write(tmp_path / name)
    counts = endings(files_below(tmp_path))
    assert passed_over(counts) == "passed over: 3 .heic, 1 without an ending, 1 .txt, 1 .\\xf6"
    assert passed_over({}) == ""


PUBLISHED = {
    "w/train/good/0.png w/test/good/0.png w/test/dent/0.png w/test/dent/1.png": (
        "w/ground_truth/dent/0_mask.png w/ground_truth/dent/1/000.png"
    ),
    "can/train/good/0.png can/test_public/bad/1.png": "can/test_public/ground_truth/bad/1_mask.png",
    "tire/train/good/rgb/0.png tire/test/cut/rgb/0.png": "tire/train/good/xyz/0.tiff tire/test/cut/gt/0.png",
    "pcb/Data/Images/Normal/0.JPG pcb/Data/Images/Anomaly/1.JPG": "pcb/Data/Masks/Anomaly/1.png",
    "realiad_256/usb/OK/S1/0.jpg realiad_256/usb/NG/HS/S3/1.jpg": "realiad_256/usb/NG/HS/S3/1.png",
}


@pytest.mark.parametrize(("images", "masks"), PUBLISHED.items())
def test_the_masks_of_a_dataset_are_no_images_to_score(tmp_path: Path, images: str, masks: str) -> None:
    for name in f"{images} {masks}".split():
        write(tmp_path / name)
    write(tmp_path / "readme.txt")
    files, notes = images_to_score([tmp_path])
    assert sorted(files) == sorted(tmp_path / name for name in images.split())
    count = len(masks.split())
    assert notes == [
        f"{tmp_path}: {count} masks (or depth maps) of a dataset are left out; give their folder itself to score them",
        f"{tmp_path}: passed over: 1 .txt",
    ]


def test_what_is_given_by_name_is_scored(tmp_path: Path) -> None:
    mask = write(tmp_path / "w/ground_truth/dent/0.png")
    gt, masks = write(tmp_path / "own/gt/1.png"), write(tmp_path / "own/masks/2.png")  # beside neither rgb nor images
    folder = tmp_path / "w/ground_truth"
    assert images_to_score([folder, mask, tmp_path / "own", str(tmp_path / "absent.png")]) == (
        [mask, mask, gt, masks, tmp_path / "absent.png"],
        [],
    )


def test_names_of_any_bytes_are_listed(tmp_path: Path) -> None:
    name = os.fsdecode(b"b\xf6lt\n.png")
    try:
        write(tmp_path / "w/train/good" / name)
    except OSError:
        return  # a file system of UTF-8 names
    assert [sample.path.name for sample in discover(tmp_path).train] == [name]
