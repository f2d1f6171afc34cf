"""masks.py: which pixels a mask marks, however it was written, and what is said where that is not clear."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hgad_fast.data.masks import inspect_mask, read_mask

DEFECT = np.zeros((24, 30), bool)
DEFECT[6:12, 9:17] = True
COVERS, LEVELS = "mask that covers most of its image", "mask of more than two levels"


def draw(path: Path, pixels: np.ndarray | Image.Image, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def check(path: Path, expected: np.ndarray, *kinds: str) -> dict[str, str]:
    """Assert what a mask marks and the kinds of remarks about it, and return these."""
    mask = inspect_mask(path)
    assert mask.marked.dtype == torch.bool and read_mask(path).equal(mask.marked)
    np.testing.assert_array_equal(mask.marked.numpy(), expected)
    assert set(mask.remarks) == set(kinds) and all(str(path) in text for text in mask.remarks.values())
    return mask.remarks


def grey(on: int, off: int = 0, kind: type = np.uint8) -> np.ndarray:
    return np.where(DEFECT, on, off).astype(kind)


def coloured(on: tuple[int, ...], off: tuple[int, ...]) -> np.ndarray:
    return np.where(DEFECT[..., None], on, off).astype(np.uint8)


@pytest.mark.parametrize(
    "pixels",
    [
        *(grey(on) for on in (1, 3, 255)),
        *(grey(on, kind=np.uint16) for on in (1, 255, 65535)),
        grey(1, kind=bool),
        coloured((0, 0, 200), (0, 0, 0)),
        coloured((255, 255, 255, 255), (0, 0, 0, 255)),
        coloured((255, 0, 0, 255), (0, 0, 0, 0)),
        coloured((255, 0, 0, 255), (255, 255, 255, 0)),  # transparent white is no mark
        coloured((255, 255, 255, 0), (0, 0, 0, 0)),  # alpha that says nothing
    ],
)
def test_two_levels_are_a_mask(tmp_path: Path, pixels: np.ndarray) -> None:
    check(draw(tmp_path / "a.png", pixels), DEFECT)


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), (200, 30, 0), (255,), (0,)])
@pytest.mark.parametrize("on", [255, 1, 128])
def test_the_shape_may_be_in_alpha(tmp_path: Path, colour: tuple[int, ...], on: int) -> None:
    check(draw(tmp_path / "a.png", coloured((*colour, on), (*colour, 0))), DEFECT)


def palette(colours: list[tuple[int, int, int]], indices: np.ndarray) -> Image.Image:
    image = Image.fromarray(indices.astype(np.uint8))
    image.putpalette([value for colour in colours for value in colour])
    return image


BLACK, BLUE, RED, WHITE = (0, 0, 0), (0, 0, 90), (200, 0, 0), (255, 255, 255)


@pytest.mark.parametrize("colours", [[BLACK, RED], [BLUE, RED], [WHITE, RED], [BLUE, RED, BLACK]])
def test_index_0_of_a_palette_is_the_background(tmp_path: Path, colours: list) -> None:
    check(draw(tmp_path / "a.png", palette(colours, DEFECT)), DEFECT)


def test_colours_of_a_palette_count_before_indices(tmp_path: Path) -> None:
    check(draw(tmp_path / "a.png", palette([RED, BLACK], ~DEFECT)), DEFECT)


def test_a_palette_that_does_not_tell_is_reported(tmp_path: Path) -> None:
    everything = np.ones_like(DEFECT)
    check(draw(tmp_path / "a.png", palette([RED, BLUE], ~DEFECT)), everything, COVERS)  # index 0 is the defect's
    check(draw(tmp_path / "b.png", palette([WHITE, BLACK], DEFECT)), ~DEFECT, COVERS)


def test_transparency_of_a_palette(tmp_path: Path) -> None:
    check(draw(tmp_path / "a.png", palette([WHITE, RED], DEFECT), transparency=0), DEFECT)
    check(draw(tmp_path / "b.png", palette([RED, WHITE], ~DEFECT), transparency=1), DEFECT)


def test_an_inverted_mask_is_reported(tmp_path: Path) -> None:
    text = check(draw(tmp_path / "a.png", grey(0, 255)), ~DEFECT, COVERS)[COVERS]
    assert "marks 93% of its image: inverted?" in text


@pytest.mark.parametrize("most", [1, 2, 8])
@pytest.mark.parametrize("share", [1.0, 0.05])
def test_noise_beside_a_bright_level_is_background(tmp_path: Path, most: int, share: float) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, most + 1, DEFECT.shape) * (rng.random(DEFECT.shape) < share)
    path = draw(tmp_path / "a.png", np.where(DEFECT, 255 - noise, noise).astype(np.uint8))
    text = check(path, DEFECT, LEVELS)[LEVELS]
    assert f"{(noise[~DEFECT] > 0).sum()} pixels of 1 to 8 of 255 are taken for noise" in text


def test_a_background_of_one_faint_level_is_background(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read_mask(draw(tmp_path / "a.png", grey(255, 1))).numpy(), DEFECT)


def test_labels_are_all_defects(tmp_path: Path) -> None:
    """Those of 1, 2, 3, and faint ones beside a bright one, as they form areas."""
    for levels in ((1, 2, 3), (1, 8, 255), (255, 254, 128)):
        labels = np.zeros((40, 40), np.uint8)
        for i, level in enumerate(levels):
            labels[5 + 10 * i : 11 + 10 * i, 4:30] = level
        text = check(draw(tmp_path / "a.png", labels), labels > 0, LEVELS)[LEVELS]
        assert "4 levels; 312 marked pixels are below the highest level" in text
    colours = np.zeros((40, 40, 3), np.uint8)
    colours[5:9, 5:9], colours[20:24, 5:9] = (255, 0, 0), (0, 255, 0)
    check(draw(tmp_path / "b.png", colours), colours.any(-1))


def test_soft_edges_are_reported(tmp_path: Path) -> None:
    soft = grey(255)
    soft[5, 9:17], soft[12, 9:17] = 60, 200
    text = check(draw(tmp_path / "a.png", soft), soft > 0, LEVELS)[LEVELS]
    assert "4 levels; 16 marked pixels are below the highest level, 8 of them below half of it" in text


@pytest.mark.parametrize("name", ["a.jpg", "a.jfif", "a.png"])
def test_a_jpeg_does_not_ring_whatever_its_name(tmp_path: Path, name: str) -> None:
    disc = np.hypot(*np.mgrid[-20:20, -30:30]) < 14.5
    path = draw(tmp_path / name, disc.astype(np.uint8) * np.uint8(255), quality=90, format="JPEG")
    assert (np.asarray(Image.open(path)) > 0).sum() > disc.sum()  # there is something to suppress
    check(path, disc)


DISC = np.hypot(*np.mgrid[-20:20, -30:30]) < 14.5


@pytest.mark.parametrize("colour", [(100, 100, 100), (128, 0, 0), (0, 0, 128), (40, 40, 40)])
def test_the_bound_of_a_lossy_mask_is_half_of_its_own_maximum(tmp_path: Path, colour: tuple[int, ...]) -> None:
    pixels = np.where(DISC[..., None], colour, 0).astype(np.uint8)
    for name, options in (
        ("a.jpg", {"quality": 95, "subsampling": 0}),
        ("a.tif", {"compression": "jpeg", "quality": 95}),
        ("a.jp2", {"irreversible": True, "quality_mode": "rates", "quality_layers": [8]}),
    ):
        marked = read_mask(draw(tmp_path / name, pixels, **options)).numpy()
        assert (marked ^ DISC).sum() <= 8 and marked[20, 30] and not marked[:3].any(), name


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.webp", {"quality": 60}),
        ("a.jp2", {"irreversible": True, "quality_mode": "rates", "quality_layers": [5]}),
        ("a.jp2", {"quality_mode": "rates", "quality_layers": [5]}),
    ],
)
def test_what_a_lossy_format_adds_is_not_marked(tmp_path: Path, name: str, options: dict) -> None:
    path = draw(tmp_path / name, DISC.astype(np.uint8) * np.uint8(255), **options)
    assert (np.asarray(Image.open(path).convert("L")) > 8).sum() > DISC.sum() + 8  # there is something to suppress
    assert (read_mask(path).numpy() ^ DISC).sum() <= 8


@pytest.mark.parametrize(("name", "options"), [("a.webp", {"lossless": True}), ("a.jp2", {})])
def test_labels_in_a_format_that_lost_nothing_stay(tmp_path: Path, name: str, options: dict) -> None:
    labels = np.zeros((40, 60, 3), np.uint8)
    labels[4:12, 5:50], labels[16:24, 5:50], labels[28:34, 5:50] = 1, 2, 3
    np.testing.assert_array_equal(read_mask(draw(tmp_path / name, labels, **options)).numpy(), labels.any(-1))


def test_a_jpeg_of_ringing_alone_is_blank(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 12, (24, 32), dtype=np.uint8)
    path = draw(tmp_path / "a.jpg", noise, quality=90)
    assert 0 < np.asarray(Image.open(path)).max() <= 16
    check(path, np.zeros((24, 32), bool))


def test_a_palette_of_one_colour_marks_by_its_indices(tmp_path: Path) -> None:
    for off, on in ((0, 1), (0, 2), (1, 2), (2, 1), (1, 0)):
        indices = np.where(DEFECT, on, off)
        path = draw(tmp_path / "a.png", palette([BLACK] * 3, indices))
        check(path, indices > 0 if on == 0 else DEFECT, *([COVERS] if on == 0 else []))


@pytest.mark.parametrize(
    ("on", "off"),
    [
        ((0, 0, 0, 255), (255, 255, 255, 0)),
        ((0, 0, 0, 90), (7, 0, 200, 0)),
        ((0, 0, 0, 255), (0, 0, 0, 128)),
    ],
)
def test_what_is_opaque_is_marked_where_colour_marks_nothing(
    tmp_path: Path, on: tuple[int, ...], off: tuple[int, ...]
) -> None:
    check(draw(tmp_path / "a.png", coloured(on, off)), DEFECT)


def test_parts_of_a_mask(tmp_path: Path) -> None:
    draw(tmp_path / "000" / "0.png", grey(200))
    draw(tmp_path / "000" / "1.png", grey(0, 255))
    check(tmp_path / "000", np.ones_like(DEFECT), COVERS)
