"""survey.py: every fault that is planted is found, with its kind, and nothing else is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hgad_fast.data.datasets import Dataset, discover
from hgad_fast.data.survey import Counts, Survey, mask_warnings, survey


def draw(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes in order: enough images, all of them distinct, each with its mask."""
    rng = np.random.default_rng(0)
    for name, shape in (("bolt", (8, 12)), ("nut", (8, 12, 3))):
        for folder, count in (("train/good", 16), ("test/good", 2), ("test/dent", 3)):
            for i in range(count):
                draw(tmp_path / "set" / name / folder / f"{i}.png", rng.integers(0, 256, shape, dtype=np.uint8))
        for i in range(3):
            mask = np.zeros((8, 12), np.uint8)
            mask[2:4, i : i + 3] = 1
            draw(tmp_path / "set" / name / "ground_truth/dent" / f"{i}_mask.png", mask)
    return tmp_path / "set"


def kinds(actual: Survey) -> list[str]:
    return [finding.kind for finding in actual.findings]


def test_a_dataset_in_order(root: Path) -> None:
    actual = survey(discover(root), decode=True)
    assert actual.counts == {"bolt": Counts(16, 0, 2, 3, 3), "nut": Counts(16, 0, 2, 3, 3)}
    assert actual.images == {"12 x 8 L": 21, "12 x 8 RGB": 21}
    assert actual.findings == () and actual.layout == "MVTec AD"
    text = actual.table().splitlines()
    assert text[0] == f"MVTec AD: {root}"
    assert text[-2].split() == ["all", "32", "0", "4", "6", "6"]
    assert text[-1] == "images: 21 of 12 x 8 L, 21 of 12 x 8 RGB"


def truncated(root: Path) -> None:
    path = root / "bolt/test/good/1.png"
    path.write_bytes(path.read_bytes()[:-40])


def emptied(root: Path) -> None:
    for i in (0, 1):
        (root / f"bolt/test/good/{i}.png").write_bytes(b"")


def broken_mask(root: Path) -> None:
    (root / "nut/ground_truth/dent/1_mask.png").write_bytes(b"GIF89a")


def wide_mask(root: Path) -> None:
    draw(root / "nut/ground_truth/dent/1_mask.png", np.eye(8, 13, dtype=np.uint8))


def blank_mask(root: Path) -> None:
    draw(root / "nut/ground_truth/dent/1_mask.png", np.zeros((8, 12), np.uint8))


def leak(root: Path) -> None:
    shutil.copy(root / "nut/train/good/3.png", root / "nut/test/good/3.png")


def two_classes(root: Path) -> None:
    shutil.copy(root / "bolt/train/good/3.png", root / "nut/train/good/x.png")


def two_labels(root: Path) -> None:
    shutil.copy(root / "nut/test/good/1.png", root / "nut/test/dent/2.png")


def twice(root: Path) -> None:
    shutil.copy(root / "nut/train/good/3.png", root / "nut/train/good/x.png")


def no_mask(root: Path) -> None:
    (root / "nut/ground_truth/dent/1_mask.png").unlink()


def no_image(root: Path) -> None:
    (root / "nut/test/dent/1.png").unlink()


def inverted_mask(root: Path) -> None:
    mask = np.full((8, 12), 255, np.uint8)
    mask[2:4, 3:5] = 0
    draw(root / "nut/ground_truth/dent/1_mask.png", mask)


def noisy_mask(root: Path) -> None:
    mask = np.arange(96, dtype=np.uint8).reshape(8, 12) % 3
    mask[2:4, 3:5] = 255
    draw(root / "nut/ground_truth/dent/1_mask.png", mask)


def mask_of_a_normal_image(root: Path) -> None:
    draw(root / "nut/ground_truth/good/0_mask.png", np.zeros((8, 12), np.uint8))  # as some are published
    draw(root / "nut/ground_truth/good/1_mask.png", np.eye(8, 12, dtype=np.uint8))


def outside_of_good(root: Path) -> None:
    draw(root / "nut/train/x.png", np.eye(8, 12, dtype=np.uint8))


def few(root: Path) -> None:
    (root / "bolt/train/good/0.png").unlink()


def untested(root: Path) -> None:
    shutil.rmtree(root / "bolt/test/good")


@pytest.mark.parametrize(
    ("fault", "kind", "detail", "is_error"),
    [
        (emptied, "unreadable file", "bolt/test/good/0.png: the file is empty", True),
        (broken_mask, "unreadable file", "nut/ground_truth/dent/1_mask.png: no image", True),
        (
            wide_mask,
            "mask of another size",
            "1_mask.png is 13 x 8, its image 12 x 8: {root}/nut/test/dent/1.png",
            True,
        ),
        (blank_mask, "empty mask", "nut/ground_truth/dent/1_mask.png: draw the defect", True),
        (leak, "same image in two places", "nut/test/good/3.png (train and test): remove one", True),
        (two_classes, "same image in two places", "nut/train/good/x.png (bolt and nut): remove one", True),
        (two_labels, "same image in two places", "(normal and defect): remove one", True),
        (twice, "same image twice", "nut/train/good/3.png and {root}/nut/train/good/x.png", False),
        (no_mask, "defect without mask", "nut/test/dent/1.png: counts for image metrics only", False),
        (no_image, "mask without image", "nut/ground_truth/dent/1_mask.png", False),
        (
            inverted_mask,
            "mask that covers most of its image",
            "nut/ground_truth/dent/1_mask.png marks 96% of its image: inverted?",
            False,
        ),
        (noisy_mask, "mask of more than two levels", "1_mask.png: 4 levels; 62 pixels of 1 to 8 of 255", False),
        (mask_of_a_normal_image, "mask of a normal image", "good/1_mask.png marks 8 pixels and is ignored", False),
        (outside_of_good, "image that is not used", "nut/train/x.png: it lies beside the normal images", False),
        (few, "few training images", "bolt: 15; calibration would hold half of them out", False),
        (untested, "nothing to evaluate on", "bolt: no normal test images", False),
    ],
)
def test_what_is_wrong_is_found(root: Path, fault: Callable, kind: str, detail: str, is_error: bool) -> None:
    fault(root)
    actual = survey(discover(root))
    assert set(kinds(actual)) == {kind} and len(actual.findings) == (2 if fault is emptied else 1)
    assert detail.format(root=root) in actual.findings[0].detail
    assert actual.errors == (actual.findings if is_error else ())
    assert f"{'error' if is_error else 'warning'}: {kind} ({len(actual.findings)})" in actual.table().splitlines()


def test_a_truncated_image_is_found_by_decoding(root: Path) -> None:
    truncated(root)
    assert survey(discover(root)).findings == ()
    assert kinds(survey(discover(root), decode=True)) == ["unreadable file"]


def test_an_image_that_lies_on_its_side_has_a_mask_that_stands(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = Image.fromarray(np.arange(96, dtype=np.uint8).reshape(12, 8))
    lying.save(root / "bolt/test/dent/1.png", exif=exif)
    assert survey(discover(root)).findings == ()


def test_errors_come_first_and_only_a_few_of_a_kind_are_shown(root: Path) -> None:
    for i in range(8):
        draw(root / f"nut/ground_truth/dent/stray{i}.png", np.ones((8, 12), np.uint8))
    leak(root)
    actual = survey(discover(root))
    assert kinds(actual) == ["same image in two places"] + ["mask without image"] * 8
    text = actual.table()
    assert "... and 3 more; --json lists them all" in text and text.count("stray") == 5
    told = json.loads(json.dumps(actual.to_dict()))
    assert len(told["findings"]) == 9 and told["counts"]["nut"]["with_mask"] == 3 and told["root"] == str(root)


def test_a_leak_between_datasets_is_found(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "nut", tmp_path / "other/nut")
    dataset: Dataset = discover([root, tmp_path / "other"])
    actual = survey(dataset)
    assert set(actual.counts) == {"bolt", "set-nut", "other-nut"}
    assert kinds(actual) == ["same image in two places"] * 21
    assert "(set-nut and other-nut)" in actual.findings[0].detail


def test_a_camera_of_12_bits_is_recognised(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(50):  # of which 20 are looked at; the brightest pixel is in all
        image = rng.integers(0, 3000, (8, 12), dtype=np.uint16)
        image[0, 0] = 4000
        draw(tmp_path / f"cam/train/good/{i}.png", image)
    actual = survey(discover(tmp_path))
    (finding,) = (finding for finding in actual.findings if finding.kind == "white level")
    assert "16-bit images reach 4000 (in 20 that were looked at), as those of a camera of 12 bits" in finding.detail
    assert "--set white_level=4095" in finding.detail and not finding.is_error


def test_images_of_8_and_16_bits_in_a_mixture_are_reported(root: Path) -> None:
    draw(root / "bolt/test/good/0.png", np.full((8, 12), 60000, np.uint16))
    (finding,) = survey(discover(root)).findings
    assert finding.kind == "mixed depths" and finding.detail.startswith("1 images have 16 bits and 41 fewer")


def test_what_was_passed_over_is_said(root: Path) -> None:
    (root / "nut/train/good/a.heic").write_bytes(b"")
    (root / "nut/notes.txt").write_bytes(b"")
    actual = survey(discover(root))
    assert actual.findings == () and actual.table().splitlines()[-1] == "passed over: 1 .heic, 1 .txt"
    assert actual.to_dict()["passed_over"] == {".heic": 1, ".txt": 1}


def test_names_of_any_bytes_can_be_printed(root: Path) -> None:
    name = os.fsdecode(b"n\xf6t\n")
    try:
        (root / "nut").rename(root / name)
    except OSError:
        return  # a file system of UTF-8 names
    for fault in ("train/good/0.png", "ground_truth/dent/1_mask.png"):
        (root / name / fault).write_bytes(b"")
    actual = survey(discover(root))
    for text in (actual.table(), json.dumps(actual.to_dict(), ensure_ascii=False)):
        text.encode()
    assert "n\\xf6t\\n/train/good/0.png: the file is empty" in actual.table()
    assert not any(line.startswith("/train") for line in actual.table().splitlines())


def test_eval_says_the_same_of_masks_in_a_line_for_each_kind(root: Path) -> None:
    inverted_mask(root)
    shutil.copy(root / "nut/ground_truth/dent/1_mask.png", root / "nut/ground_truth/dent/2_mask.png")
    mask_of_a_normal_image(root)
    lines = mask_warnings(discover(root))
    assert len(lines) == 2
    assert lines[0].startswith(
        f"mask that covers most of its image, 2 of them, the first: {root}/nut/ground_truth/dent/1"
    )
    assert lines[1].startswith(f"mask of a normal image, 1 of them, the first: {root}/nut/ground_truth/good/1_mask.png")
