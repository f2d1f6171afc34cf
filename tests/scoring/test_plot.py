"""The images are read back and measured: the right thing must be outlined, in the right place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from hgad_fast.scoring import lettering
from hgad_fast.scoring.plot import SHEET_PANEL, Case, contact_sheet, image_sheet, overlay, reduced

GREY = 0.5  # of test images, so that panels can be found on the white page
RED, BLUE = (255, 42, 26), (0, 200, 240)


def hot_square(height: int, width: int, rows: slice, columns: slice, score: float = 3.0) -> np.ndarray:
    scores = np.full((height, width), 0.1)
    scores[rows, columns] = score
    return scores


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def close_to(image: np.ndarray, colour: tuple[int, ...], within: int = 60) -> np.ndarray:
    return (np.abs(image - colour) <= within).all(-1)


def panels_of(image: np.ndarray) -> list[tuple[int, int]]:
    """Columns [left, right) of the panels along the row of pixels through the middle of the image."""
    inside = (image[image.shape[0] // 2] < 250).any(-1)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], inside, [0]])))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2) if b - a > 20]


def extent_in_image(marked: np.ndarray, panel: np.ndarray) -> np.ndarray:
    """Top, bottom, left and right of the marked pixels, as shares of the panel's rows and columns."""
    top, bottom = np.flatnonzero(panel.any(1))[[0, -1]]
    left, right = np.flatnonzero(panel.any(0))[[0, -1]]
    rows, columns = np.nonzero(marked)
    height, width = bottom - top + 1, right - left + 1
    return np.array(
        [
            (rows.min() - top) / height,
            (rows.max() + 1 - top) / height,
            (columns.min() - left) / width,
            (columns.max() + 1 - left) / width,
        ]
    )


@pytest.mark.parametrize(("height", "width"), [(64, 64), (60, 140)])
def test_lines_are_where_score_and_mask_are(tmp_path: Path, height: int, width: int) -> None:
    # A map at a third of the image's resolution; its square covers rows 1/4 to 1/2, columns 1/2 to 3/4.
    scores = hot_square(20, 40, slice(5, 10), slice(20, 30))
    mask = np.zeros((height, width), dtype=bool)
    mask[height // 2 : height * 3 // 4, width // 10 : width // 5] = True
    image = np.full((3, height, width), GREY)
    image = read(overlay(image, scores, 1.0, mask, path=tmp_path / "overlay.png", title="here"))
    left, right = panels_of(image)[-1]
    actual = image[:, left:right]
    below = actual.shape[0] * 9 // 10  # leaves out the words under the panels
    panel = (actual < 250).any(-1)
    panel[below:] = False
    panel[: np.flatnonzero(panel.all(1))[0]] = False
    red, blue = close_to(actual, RED) & panel, close_to(actual, BLUE) & panel
    pixel = 1 / min(height, width)
    # The line runs between the last cell below and the first above the threshold: within one cell of the map.
    np.testing.assert_allclose(extent_in_image(red, panel), [1 / 4, 1 / 2, 1 / 2, 3 / 4], atol=0.05)
    top, start = (height // 2) / height, (width // 10) / width
    bottom, end = (height * 3 // 4) / height, (width // 5) / width
    np.testing.assert_allclose(extent_in_image(blue, panel), [top, bottom, start, end], atol=1.5 * pixel)


def test_nothing_is_outlined_below_the_threshold(tmp_path: Path) -> None:
    scores = hot_square(16, 16, slice(4, 8), slice(4, 8), score=0.9)
    image = read(overlay(np.full((32, 32), GREY), scores, 1.0, path=tmp_path / "normal.png"))
    left, right = panels_of(image)[-1]
    assert not close_to(image[: image.shape[0] * 8 // 10, left:right], RED).any()


@pytest.mark.parametrize(("score", "share"), [(0.0, 0.0), (1.5, 0.5), (3.0, 1.0), (9.0, 1.0)])
def test_heat_is_score_over_threshold_on_a_scale_from_0_to_2(tmp_path: Path, score: float, share: float) -> None:
    from matplotlib import colormaps

    image = read(overlay(np.full((32, 32), GREY), np.full((8, 8), score), 1.5, path=tmp_path / "heat.png"))
    left, right = panels_of(image)[1]
    centre = image[image.shape[0] // 2, (left + right) // 2]
    expected = 255 * (0.35 * GREY + 0.65 * np.array(colormaps["inferno"](share)[:3]))
    np.testing.assert_allclose(centre, expected, atol=3)  # Agg rounds every layer to 8 bits


def test_without_a_threshold_the_scale_ends_at_the_maximum(tmp_path: Path) -> None:
    scores = hot_square(16, 16, slice(4, 12), slice(4, 12), score=7.0)
    with_nan = read(overlay(np.full((32, 32), GREY), scores, float("nan"), path=tmp_path / "nan.png"))
    known = read(overlay(np.full((32, 32), GREY), scores, 3.5, path=tmp_path / "known.png"))
    (a, b), (c, d) = panels_of(with_nan)[1:]
    rows = slice(0, with_nan.shape[0] * 8 // 10)
    np.testing.assert_array_equal(with_nan[rows, a:b], known[rows, a:b])
    assert not close_to(with_nan[rows, c:d], RED).any()


@pytest.mark.parametrize(
    ("actual", "true", "verdict", "wrong"),
    [
        (True, True, "score 1.50: defect", False),
        (True, False, "score 1.50: defect (false alarm)", True),
        (False, True, "score 1.50: normal (missed)", True),
        (False, False, "score 1.50: normal", False),
        (False, None, "score 1.50: normal", False),
        (None, True, "score 1.50", False),
    ],
)
def test_verdict(actual: bool | None, true: bool | None, verdict: str, wrong: bool) -> None:
    case = Case(np.zeros((8, 8)), np.zeros((4, 4)), 2.0, image_score=3.0, is_anomalous=actual, is_defective=true)
    assert case.verdict == verdict
    assert case.is_wrong == wrong


def test_contact_sheet_outlines_every_found_defect_and_no_other(tmp_path: Path) -> None:
    image, mask = np.full((3, 24, 24), GREY), np.zeros((24, 24), dtype=bool)
    mask[6:12, 6:12] = True
    hot, cold = hot_square(24, 24, slice(14, 20), slice(6, 12)), np.full((24, 24), 0.2)
    cases = [Case(image, hot, 1.0, mask), Case(image, cold, 1.0), Case(image, cold, 1.0, mask), Case(image, hot, 1.0)]
    image = read(contact_sheet(cases, tmp_path / "sheet.png", columns=2))
    image[image.shape[0] - 90 :] = 255  # the legend has words and a line in the same colours

    def drawn(colour: tuple[int, ...]) -> list[list[bool]]:
        """Return whether the colour occurs in the panel "found" of each row and block."""
        half = image.shape[1] // 2
        actual = [image[:, 3 * half // 4 : half], image[:, half + 3 * half // 4 :]]
        middle = 20 + (image.shape[0] - 90) // 2
        return [[bool(close_to(block[rows], colour, 40).any()) for block in actual] for rows in _halves(middle)]

    assert drawn(RED) == [[True, False], [False, True]]
    assert drawn(BLUE) == [[True, True], [False, False]]


def _halves(middle: int) -> tuple[slice, slice]:
    return slice(0, middle), slice(middle, None)


def test_errors_name_the_argument(tmp_path: Path) -> None:
    image, scores = np.zeros((3, 8, 8)), np.zeros((4, 4))
    with pytest.raises(ValueError, match=r"anomaly_map has the shape \(1, 4, 4\)"):
        overlay(image, scores[None], 1.0, path=tmp_path / "no.png")
    with pytest.raises(ValueError, match=r"mask has the shape \(4, 4\).*\(8, 8\)"):
        overlay(image, scores, 1.0, scores > 0, path=tmp_path / "no.png")
    with pytest.raises(ValueError, match=r"image has the shape \(4, 8, 8\)"):
        overlay(np.zeros((4, 8, 8)), scores, 1.0, path=tmp_path / "no.png")
    with pytest.raises(ValueError, match="no cases"):
        contact_sheet([], tmp_path / "no.png")
    assert not list(tmp_path.iterdir())


def test_drawing_changes_no_global_state_of_matplotlib(tmp_path: Path) -> None:
    code = f"""
import sys, matplotlib, numpy as np
before = matplotlib.rcParams.copy()
from hgad_fast.scoring.plot import overlay
overlay(np.zeros((8, 8)), np.eye(8), 0.5, np.eye(8) > 0, path={str(tmp_path / "image.png")!r})
assert dict.__eq__(before, matplotlib.rcParams)  # reading "backend" would choose one
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_contact_sheet_of_several_models_has_the_maps_of_each(tmp_path: Path) -> None:
    image, low, high = np.full((40, 40), 0.5), np.zeros((40, 40)), np.zeros((40, 40))
    high[10:30, 10:30] = 2.0
    quiet, loud = (Case(image, scores, 1.0, label="a", image_score=scores.max()) for scores in (low, high))

    def sheet(*models: Case) -> np.ndarray:
        cases = {name: [case] for name, case in zip(("first", "second"), models, strict=False)}
        return np.asarray(Image.open(contact_sheet(cases, tmp_path / "sheet.png")).convert("RGB")).astype(int)

    neither, of_second, both = sheet(quiet, quiet), sheet(quiet, loud), sheet(loud, loud)
    changed = (neither != of_second).any(2).nonzero()[1]
    assert len(changed) and changed.min() > (of_second != both).any(2).nonzero()[1].max()
    assert sheet(quiet).shape[1] < neither.shape[1]
    with pytest.raises(ValueError, match="the models have 1 and 2 cases; give each those of the same images"):
        contact_sheet({"first": [quiet], "second": [quiet, loud]}, tmp_path / "no.png")


# ---------------------------------------------------------------------------------------------- words


def ink(text: str, points: float = 12) -> np.ndarray:
    """Return the pixels of a line of text, cut to what is drawn."""
    image = Image.new("L", (1200, 60), 255)
    lettering.Lettering(points).write(ImageDraw.Draw(image), (10, 40), text, "black")
    pixels = np.asarray(image) < 200
    rows, columns = (np.flatnonzero(pixels.any(axis)) for axis in (1, 0))
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def test_names_in_any_script_are_drawn_or_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A box for a missing character is never drawn: without a font that has it, its number stands there."""
    monkeypatch.setattr(lettering, "_fonts", tuple)
    lettering._font_with.cache_clear()
    assert np.array_equal(ink("a部.png"), ink(r"a\u90e8.png"))
    assert np.array_equal(ink("a\udcf6\n\x1b.png"), ink(r"a\xf6\n\x1b.png"))
    assert not np.array_equal(ink("Größe"), ink(r"Gr\xf6\xdfe")) and not np.array_equal(ink("قطعة"), ink("صورة"))
    monkeypatch.undo()
    lettering._font_with.cache_clear()


def test_a_font_that_has_a_character_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = lettering._characters(None), str(Path(lettering.font_of(12, True).path))
    monkeypatch.setattr(lettering, "_fonts", lambda: (str(tmp_path / "no font.ttf"), other))
    monkeypatch.setattr(lettering, "_characters", lambda path: own - {ord("b")} if path is None else real(path))
    lettering._font_with.cache_clear()
    fonts = [Path(font.path).name for font, _ in lettering.Lettering(12)._runs("abc")]
    assert fonts == ["DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans.ttf"]
    monkeypatch.undo()
    lettering._font_with.cache_clear()


real = lettering._characters


@pytest.mark.parametrize("cut", ["start", "end"])
def test_long_lines_are_cut(cut: str) -> None:
    font, line = lettering.Lettering(12), "".join(map(str, range(2000)))
    shortened = font.shortened(line, 300, cut)
    kept = shortened.strip("\u2026")
    assert font.width(shortened) <= 300 < font.width(shortened + "0") + 15
    assert (line.startswith(kept), shortened.endswith("\u2026")) == ((cut == "end"), (cut == "end"))
    assert line.endswith(kept) == (cut == "start")


def test_title_and_note_are_above_the_panels(tmp_path: Path) -> None:
    image, scores = np.full((32, 32), GREY), np.zeros((8, 8))
    plain, titled = (
        read(overlay(image, scores, 1.0, path=tmp_path / "a.png", **words))
        for words in ({}, {"title": "ANOMALOUS: score 2", "note": "部品/$x$.png"})
    )
    added = len(titled) - len(plain)
    assert added > 40 and np.array_equal(titled[added + 24 :], plain[24:])
    for rows in (slice(10, 42), slice(48, 70)):
        assert (titled[rows] < 150).any()


def sheet_case(height: int, width: int, hot: bool = True) -> Case:
    scores = hot_square(12, 12, slice(3, 6), slice(6, 9)) if hot else np.zeros((1, 1))
    return Case(np.full((3, height, width), GREY, np.float32), scores, 1.0 if hot else float("nan"), label="1. brick")


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_an_image_sheet_has_all_images_and_no_overlap(tmp_path: Path, suffix: str) -> None:
    cases = [sheet_case(*size, hot=False) for size in [(64, 64), (40, 120), (120, 40), (64, 64), (64, 64)] * 2]
    names = [f"{i}-größe-部品-{'very-' * 20}long.png" for i in range(len(cases))]
    path = image_sheet(cases, tmp_path / f"sheet{suffix}", names=names, title="all", note="a note")
    assert Image.open(path).format == {".jpg": "JPEG", ".png": "PNG"}[suffix]
    grey = close_to(read(path), (128, 128, 128), within=12)
    boxes = [box for box in connected(grey) if min(box[1] - box[0], box[3] - box[2]) > 30]
    assert len(boxes) == len(cases)
    shapes = sorted(round((right - left) / (bottom - top), 1) for top, bottom, left, right in boxes)
    assert shapes == pytest.approx([0.3] * 2 + [1.0] * 6 + [3.0] * 2, abs=0.1)


def connected(marked: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Top, bottom, left and right of each connected part of the marked pixels."""
    from scipy.ndimage import find_objects, label

    return [(y.start, y.stop, x.start, x.stop) for y, x in find_objects(label(marked)[0])]


def test_an_image_sheet_with_maps_outlines_what_reaches_the_threshold(tmp_path: Path) -> None:
    image = read(image_sheet([sheet_case(60, 60)], tmp_path / "sheet.png", names=["a.png"], title="t", with_maps=True))
    boxes = connected(close_to(image, (128, 128, 128), within=2))  # of the image itself, and in letters
    top, bottom, left, right = max(boxes, key=lambda box: (box[1] - box[0]) * (box[3] - box[2]))
    assert right - left == bottom - top == SHEET_PANEL // 2
    red = close_to(image, RED)
    assert not red[:, right:].any()  # in the heat map nothing is outlined
    extent = extent_in_image(red[top:bottom, left:right], np.ones((bottom - top, right - left), bool))
    np.testing.assert_allclose(extent, [0.25, 0.5, 0.5, 0.75], atol=0.03)


def test_an_image_sheet_of_no_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no images to draw"):
        image_sheet([], tmp_path / "sheet.jpg", names=[], title="")
    assert list(tmp_path.iterdir()) == []


def test_images_for_a_sheet_are_reduced_and_never_enlarged() -> None:
    image = np.zeros((3, 1000, 2000), np.float32)
    image[:, :, ::2] = 1
    small = reduced(image)
    assert small.shape == (3, SHEET_PANEL // 2, SHEET_PANEL)
    np.testing.assert_allclose(small, 0.5, atol=0.11)  # means of four or five columns
    assert np.array_equal(reduced(image[:, :40, :50]), image[:, :40, :50])
    assert reduced(np.ones((3, 1, 5000))).shape == (3, 1, SHEET_PANEL)
