"""Drawings of what a model finds: overlays, contact sheets, thumbnails. Needs `pip install hgad-fast[plot]`.

Scores are drawn in multiples of the threshold, on one scale from 0 to SCALE_END, so that images can be compared.
Without a threshold the scale ends at the image's own maximum, and nothing is outlined as found.
Pages are composed with Pillow, in a tenth of the time that a matplotlib figure takes; fonts and colours are those of
matplotlib. Images are reduced to the size of their panel first, and maps by their maxima, so that a single high pixel
still shows.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..files import replacing
from .lettering import Lettering, font_of
from .regions import Region, find_regions

if TYPE_CHECKING:
    from PIL import Image

SCALE_END = 2.0  # the last score on the colour scale, in multiples of the threshold
SHEET_SIDE = 2000
"""Images with a longer side than this get a sheet: a reduced view, and the worst regions at full resolution."""

SHEET_PANEL = 480
"""Longest side, in pixels, to which images for an `image_sheet` are reduced; its panels have half of that, squared."""

CROPS = 6  # regions that a sheet shows at full resolution
_COLOUR_MAP = "inferno"  # of scores
_TRUE, _FOUND = "#00c8f0", "#ff2a1a"  # lines around the true defect, and around what the model finds
_RIGHT, _WRONG, _QUIET, _DARK = "#0a7d38", "#c00000", "#555555", "#111111"  # text
_LEGEND_WIDTH = 760
_HEAD, _LINE = 42, 26  # heights of the title and of the note below it

Pixels = NDArray[np.float32]  # (h, w, 3) in [0, 1], a panel


@dataclass(frozen=True)
class Case:
    """An image, its anomaly map and verdict, and the truth where it is known.

    Attributes:
        image: (3, H, W) or (H, W), in [0, 1].
        anomaly_map: (h, w) over the whole image, at any resolution.
        threshold: the score from which a pixel counts as defective, in the map's units; NaN: there is none.
        mask: (H, W) bool, the true defect; None if there is none, or none is known.
        label: a name for the image, e.g. "brick: scratch".
        image_score: the score of the image, in the map's units.
        is_anomalous: the model's verdict; None: not stated.
        is_defective: the truth; None: unknown.
    """

    image: ArrayLike
    anomaly_map: ArrayLike
    threshold: float
    mask: ArrayLike | None = None
    label: str = ""
    image_score: float | None = None
    is_anomalous: bool | None = None
    is_defective: bool | None = None

    def __post_init__(self) -> None:
        if np.ndim(self.anomaly_map) != 2:
            raise ValueError(f"anomaly_map has the shape {np.shape(self.anomaly_map)}; a map has (h, w)")
        shape = np.shape(self.image)
        if len(shape) != 2 and (len(shape) != 3 or shape[0] != 3):
            raise ValueError(f"image has the shape {shape}; an image has (3, H, W) or (H, W)")
        if self.mask is not None and np.shape(self.mask) != self.size:
            raise ValueError(f"mask has the shape {np.shape(self.mask)}; its image has {self.size}")

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the image."""
        height, width = np.shape(self.image)[-2:]
        return height, width

    @property
    def has_threshold(self) -> bool:
        """True if scores can be compared with the threshold: it is positive and finite."""
        return 0 < self.threshold < np.inf

    @property
    def unit(self) -> float:
        """The score that is 1 on the colour scale: the threshold, or without one the map's maximum / SCALE_END."""
        unit = self.threshold if self.has_threshold else float(np.max(np.asarray(self.anomaly_map))) / SCALE_END
        return max(unit, 1e-30)

    @property
    def verdict(self) -> str:
        """The score in multiples of the threshold, the verdict, and a note if it is wrong: "score 1.73: defect"."""
        score = ""
        if self.image_score is not None and self.has_threshold:
            score = f"score {self.image_score / self.threshold:.2f}"
        outcome = {True: "defect", False: "normal", None: ""}[self.is_anomalous]
        note = (" (missed)" if self.is_defective else " (false alarm)") if self.is_wrong else ""
        return ": ".join(filter(None, (score, outcome))) + note

    @property
    def is_wrong(self) -> bool:
        """True if verdict and truth are both known, and differ."""
        both_known = self.is_anomalous is not None and self.is_defective is not None
        return both_known and self.is_anomalous != self.is_defective


PanelFunction = Callable[[Case, tuple[int, int]], Pixels | None]
"""Draws one view of a case at a size (h, w); None where there is nothing to draw."""


def overlay(
    image: ArrayLike,
    anomaly_map: ArrayLike,
    threshold: float,
    mask: ArrayLike | None = None,
    *,
    path: str | os.PathLike[str],
    title: str = "",
    note: str = "",
    regions: Sequence[Region] | None = None,
) -> Path:
    """Write a PNG of an image, its heat map, and the outlines of what reaches the threshold and of the true defect.

    An image with a side above `SHEET_SIDE` is shown reduced, with numbered boxes around its `CROPS` worst regions, and
    these regions are shown below at full resolution. `regions` are those of the map at the image's size, in the order
    of their numbers; None: they are searched for. `note` is a second line below the title, for a name. The other
    arguments are as in `Case`. Returns the path.

    Raises:
        ValueError: an argument has a shape or a value that cannot be drawn.
    """
    case = Case(image, anomaly_map, threshold, mask)
    if max(case.size) > SHEET_SIDE:
        if regions is None:
            full_map = _resized(np.asarray(case.anomaly_map, np.float32), case.size)
            regions = find_regions(full_map, threshold)
        return _sheet_of_crops(case, regions, title, note).save(path)
    rows, columns = case.size
    height, gap, top, below = 360, 12, 48 + _HEAD * bool(title) + _LINE * bool(note), 84
    width = round(height * min(max(columns / rows, 0.5), 3.0))
    page = _Page(max(3 * width + 4 * gap, _LEGEND_WIDTH), top + height + below)
    page.head(gap, title, note, size=12)
    x = gap
    for name, draw in (("image", _image_panel), ("score", _score_panel), ("found", _found_panel)):
        page.text(x + width // 2, top - 12, name, size=10, align="m", colour=_QUIET)
        page.panel(x, top, width, height, case, draw)
        x += width + gap
    page.legend(gap, top + height + 14, [case])
    return page.save(path)


def contact_sheet(
    cases: Sequence[Case] | Mapping[str, Sequence[Case]],
    path: str | os.PathLike[str],
    *,
    title: str = "",
    columns: int = 1,
) -> Path:
    """Write one PNG of many cases, each with label, verdict, image, true defect, heat map and what the model found.

    The cases run downwards, in `columns` blocks side by side. Those of several models on the same images, in the same
    order, are given by the models' names: each image is shown once, and beside it the verdict, the heat map and the
    outlines of each model, which are those of the true defect too. Returns the path.

    Raises:
        ValueError: there are no cases, or models have different numbers of them.
    """
    by_model = cases if isinstance(cases, Mapping) else {"": cases}
    counts = {len(of_model) for of_model in by_model.values()}
    if not counts - {0}:
        raise ValueError("contact_sheet: there are no cases to draw")
    if len(counts) > 1:
        raise ValueError(
            f"contact_sheet: the models have {' and '.join(map(str, sorted(counts)))} cases; give each those of the "
            "same images"
        )
    (count,) = counts
    images: dict[str, PanelFunction] = {"image": _image_panel}
    if len(by_model) == 1:
        images["true defect"] = _truth_panel
    results: dict[str, PanelFunction] = {"score": _score_panel, "found": _found_panel}
    side, gap, line, model_gap, block_gap, margin = 162, 6, 36, 18, 48, 36
    pair_width = len(results) * (side + gap) - gap
    first_x = len(images) * (side + gap)
    models_x = [first_x + number * (pair_width + model_gap) for number in range(len(by_model))]
    if len(by_model) > 1:
        models_x = [x + model_gap - gap for x in models_x]
    block_width = models_x[-1] + pair_width
    rows = -(-count // columns)
    top = (108 if title else 48) + (24 if len(by_model) > 1 else 0)
    bottom = top + rows * (line + side)
    page = _Page(2 * margin + columns * (block_width + block_gap) - block_gap, bottom + 90)
    page.text(margin, 54, title, size=16, bold=True)
    for index in range(count):
        column, row = divmod(index, rows)
        left, y = margin + column * (block_width + block_gap), top + row * (line + side) + line
        label_width = models_x[0] + (pair_width if len(by_model) == 1 else -gap)
        for (name, of_model), model_x in zip(by_model.items(), models_x, strict=True):
            case, x = of_model[index], left + model_x
            colour = _WRONG if case.is_wrong else _RIGHT
            verdict_width = page.text(x + pair_width, y - 8, case.verdict, size=11, align="r", colour=colour)
            if len(by_model) == 1:
                label_width -= verdict_width + gap
            if row == 0 and name:
                page.text(x + pair_width // 2, top - 30, name, size=12, align="m", bold=True)
            _panels(page, case, results, x, y, side, gap, top if row == 0 else None)
        case = next(iter(by_model.values()))[index]
        page.text(left, y - 8, case.label, size=11, bold=True, width=label_width)
        _panels(page, case, images, left, y, side, gap, top if row == 0 else None)
    page.legend(margin, bottom + 24, [case for of_model in by_model.values() for case in of_model])
    return page.save(path)


def reduced(image: ArrayLike) -> NDArray[np.float32]:
    """Return an image (3, H, W) that takes little memory, for `image_sheet`: reduced to its panels by means of pixels.

    One with no side above `SHEET_PANEL` stays as it is.
    """
    planes = np.asarray(image, np.float32)
    scale = min(SHEET_PANEL / max(planes.shape[1:]), 1.0)
    return _resized(
        planes, (max(round(planes.shape[1] * scale), 1), max(round(planes.shape[2] * scale), 1)), reduce="mean"
    )


def image_sheet(
    cases: Sequence[Case],
    path: str | os.PathLike[str],
    *,
    names: Sequence[str],
    title: str,
    note: str = "",
    with_maps: bool = False,
) -> Path:
    """Write a JPEG or PNG of many images in rows, each with its label, if it has one, and its name below.

    With maps, what reaches the threshold is outlined in each image, and its heat map stands beside it. Panels have the
    proportions of the middle one of the images. Returns the path.

    Raises:
        ValueError: there are no cases.
    """
    if not cases:
        raise ValueError("image_sheet: there are no images to draw")
    aspect = float(np.clip(np.median([case.size[1] / case.size[0] for case in cases]), 0.3, 3))
    width, height = (round(SHEET_PANEL / 2 * side) for side in (aspect**0.5, aspect**-0.5))
    views: list[PanelFunction] = [_found_panel, _score_panel] if with_maps else [_image_panel]
    gap, between, line, margin = 22, 4, 24, 32
    cell_width = max(len(views) * (width + between) - between, 150)
    columns = min(max(1600 // (cell_width + gap), 1), len(cases))
    text_lines = 1 + any(case.label for case in cases)
    cell_height = height + text_lines * line + gap
    top = 60 + _LINE * bool(note)
    page_width = max(2 * margin + columns * (cell_width + gap) - gap, _LEGEND_WIDTH)
    page = _Page(page_width, top + -(-len(cases) // columns) * cell_height + margin - gap)
    page.head(margin, title, note, size=14)
    for index, (case, name) in enumerate(zip(cases, names, strict=True)):
        row, column = divmod(index, columns)
        left, y = margin + column * (cell_width + gap), top + row * cell_height
        scale = min(width / case.size[1], height / case.size[0])
        w, h = (max(1, round(side * scale)) for side in (case.size[1], case.size[0]))
        middle, baseline = left + cell_width // 2, y + height + line - 5
        x = middle - (len(views) * (w + between) - between) // 2
        for draw in views:
            page.panel(x, y + height - h, w, h, case, draw)
            x += w + between
        if case.label:
            page.text(middle, baseline, case.label, size=10, align="m", bold=True, width=cell_width)
            baseline += line
        page.text(middle, baseline, name, size=9, align="m", colour=_QUIET, width=cell_width)
    return page.save(path)


def _panels(
    page: _Page, case: Case, panels: Mapping[str, PanelFunction], x: int, y: int, side: int, gap: int, top: int | None
) -> None:
    """Draw views of a case side by side, `gap` apart, and with a `top` the name of each above that."""
    for name, draw in panels.items():
        if top is not None:
            page.text(x + side // 2, top - 6, name, size=10, align="m", colour=_QUIET)
        page.panel(x, y, side, side, case, draw)
        x += side + gap


def _sheet_of_crops(case: Case, regions: Sequence[Region], title: str, note: str) -> _Page:
    """Return a page with the reduced image and heat map, side by side or stacked, and a grid of crops below."""
    rows, columns = case.size
    gap, crop, caption, per_row = 16, 400, 52, 3
    inner_width = per_row * crop + (per_row - 1) * gap
    stacked = columns > 1.8 * rows
    height = min(round((inner_width if stacked else (inner_width - gap) // 2) * rows / columns), 900)
    width = max(round(height * columns / rows), 400)  # room for the text above
    top = 44 + _HEAD * bool(title) + _LINE * bool(note)
    score_x, score_y = (gap, top + height + 34) if stacked else (gap + width + gap, top)
    headline = score_y + height + 44
    worst = regions[:CROPS]
    bottom = headline + 24 + -(-len(worst) // per_row) * (caption + crop + gap)
    page = _Page(inner_width + 2 * gap, bottom + 84)
    page.head(gap, title, note, size=14)
    page.text(gap, top - 10, f"image, {columns} x {rows} pixels, reduced", size=10, colour=_QUIET)
    frame = page.panel(gap, top, width, height, case, _found_panel)
    page.boxes(frame, worst)
    page.text(score_x, score_y - 10, "score", size=10, colour=_QUIET)
    page.panel(score_x, score_y, width, height, case, _score_panel)
    page.text(gap, headline, _region_count(case, regions), size=12, bold=True)
    for index, region in enumerate(worst):
        row, column = divmod(index, per_row)
        x, y = gap + column * (crop + gap), headline + 24 + row * (caption + crop + gap) + caption
        view = _window(region, crop, case.size)
        page.text(x, y - 14, f"{index + 1}", size=18, bold=True, colour=_FOUND)
        page.text(x + 30, y - 28, f"score {region.peak / case.unit:.2f}, {region.area} pixels", size=10)
        box = f"x {region.left} to {region.right - 1}, y {region.top} to {region.bottom - 1}"
        page.text(x + 30, y - 8, box + (", around the peak" if view.is_part else ""), size=10)
        page.panel(x, y, crop, crop, _cropped(case, view), functools.partial(_found_panel, closed=False))
    page.legend(gap, bottom + 14, [case])
    return page


def _region_count(case: Case, regions: Sequence[Region]) -> str:
    """Return the headline of the crops."""
    if not case.has_threshold:
        return "there is no threshold"
    if not regions:
        return "nothing is above the threshold"
    words = "1 region is" if len(regions) == 1 else f"{len(regions)} regions are"
    worst = f"the worst {CROPS} " if len(regions) > CROPS else ""
    return f"{words} above the threshold; {worst}at full resolution:"


class _Window(NamedTuple):
    """A rectangle of the image, whose right and bottom lie just outside.

    `is_part` says that it shows a part of its region only.
    """

    left: int
    top: int
    right: int
    bottom: int
    is_part: bool


def _window(region: Region, side: int, size: tuple[int, int]) -> _Window:
    """Return a square of `side` pixels inside the image: around a region, or if that is larger, around its peak."""
    rows, columns = size
    fits = region.right - region.left <= side and region.bottom - region.top <= side
    x = (region.left + region.right) // 2 if fits else region.peak_x
    y = (region.top + region.bottom) // 2 if fits else region.peak_y
    left, top = max(0, min(x - side // 2, columns - side)), max(0, min(y - side // 2, rows - side))
    return _Window(left, top, min(left + side, columns), min(top + side, rows), not fits)


def _cropped(case: Case, view: _Window) -> Case:
    """Return the part of a case that a window shows."""
    rows, columns = case.size
    scores = np.asarray(case.anomaly_map)
    if scores.shape == case.size:
        scores = scores[view.top : view.bottom, view.left : view.right]
    else:  # the cells of a coarse map, a fraction of a pixel apart at most
        y = (np.arange(view.top, view.bottom) + 0.5) * (scores.shape[0] / rows)
        x = (np.arange(view.left, view.right) + 0.5) * (scores.shape[1] / columns)
        scores = scores[y.astype(int)][:, x.astype(int)]
    area = (..., slice(view.top, view.bottom), slice(view.left, view.right))
    mask = None if case.mask is None else np.asarray(case.mask)[area]
    return Case(np.asarray(case.image)[area], scores, case.unit if case.has_threshold else float("nan"), mask)


def thumbnails(case: Case) -> tuple[bytes, bytes]:
    """Return two JPEGs of the image's size: the image with the true defect, the heat map with that and what was found.

    They are for a page of HTML.
    """
    image, heat_map = _image_panel(case, case.size), _score_panel(case, case.size)
    if case.mask is not None:
        image, heat_map = (_outlined(pixels, case.mask, 0.5, _TRUE, width=2) for pixels in (image, heat_map))
    if case.has_threshold:
        heat_map = _outlined(heat_map, case.anomaly_map, case.threshold, _FOUND, width=2.6)
    return _jpeg(image), _jpeg(heat_map)


def _jpeg(pixels: Pixels) -> bytes:
    """Return a JPEG file of pixels."""
    file = io.BytesIO()
    _to_pil(pixels).save(file, format="JPEG", quality=82)
    return file.getvalue()


# ------------------------------------------------------------------------------------------------ pages


def _to_pil(pixels: Pixels) -> Image.Image:
    """Return pixels as a Pillow image of 8 bits per channel."""
    from PIL import Image

    return Image.fromarray(np.rint(pixels * 255).astype(np.uint8))


class _Frame(NamedTuple):
    """The place of a panel on the page, and the size (H, W) of the image that it shows."""

    x: int
    y: int
    width: int
    height: int
    size: tuple[int, int]


class _Page:
    """A white page with pixel coordinates from its top left corner; the y of a text is its baseline."""

    def __init__(self, width: int, height: int) -> None:
        from PIL import Image, ImageDraw

        self.image: Image.Image = Image.new("RGB", (width, height), "white")
        self.draw = ImageDraw.Draw(self.image)

    def text(
        self,
        x: int,
        y: int,
        line: str,
        *,
        size: float,
        align: str = "l",
        bold: bool = False,
        colour: str = _DARK,
        width: int | None = None,
        cut: str = "start",
    ) -> int:
        """Write a line of text, and return its width.

        With `align` "l", "m" or "r" its left end, middle or right end is at x. Where it is wider than `width` (default
        for "l": the page), its "start" or "end" is cut off.
        """
        font = Lettering(size, bold)
        width = self.image.width - x - 8 if width is None and align == "l" else width
        if width is not None and font.width(line) > width:
            line = font.shortened(line, width, cut)
        length = font.width(line)
        left = x - {"l": 0.0, "m": length / 2, "r": length}[align]
        font.write(self.draw, (left, y), line, colour)
        return round(length)

    def head(self, x: int, title: str, note: str, size: float) -> None:
        """Write the title of a page, and below it a note."""
        self.text(x, 36, title, size=size, bold=True, cut="end")
        self.text(x, 36 + _LINE * bool(title), note, size=size - 2, colour=_QUIET)

    def panel(self, x: int, y: int, width: int, height: int, case: Case, draw: PanelFunction) -> _Frame:
        """Draw a case in the middle of a box, as large as its proportions allow, and return where it is."""
        rows, columns = case.size
        scale = min(width / columns, height / rows)
        w, h = max(1, round(columns * scale)), max(1, round(rows * scale))
        x, y = x + (width - w) // 2, y + (height - h) // 2
        pixels = draw(case, (h, w))
        if pixels is None:
            self.text(x + w // 2, y + h // 2, "none", size=10, align="m", colour=_QUIET)
        else:
            self.image.paste(_to_pil(pixels), (x, y))
        return _Frame(x, y, w, h, case.size)

    def boxes(self, frame: _Frame, regions: Sequence[Region]) -> None:
        """Draw numbered boxes around regions of the image in a frame, with numbers that do not overlap if possible."""
        sx, sy, side = frame.width / frame.size[1], frame.height / frame.size[0], 20
        taken: list[tuple[float, float]] = []
        for number, region in enumerate(regions, 1):
            x, y = frame.x + sx * (region.left + region.right) / 2, frame.y + sy * (region.top + region.bottom) / 2
            dx, dy = (
                max(sx * (region.right - region.left), 12) / 2 + 3,
                max(sy * (region.bottom - region.top), 12) / 2 + 3,
            )
            left, top, right, bottom = x - dx, y - dy, x + dx, y + dy
            self.draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline="white", width=4)
            self.draw.rectangle((left, top, right, bottom), outline=_FOUND, width=2)
            corners = [(a, b) for b in (top - side - 2, bottom + 2) for a in (left, right - side)]
            corners += [(a, b) for a in (right + 2, left - side - 2) for b in (top, bottom - side)]
            last_a, last_b = frame.x + frame.width - side, frame.y + frame.height - side
            clamped = [(min(max(a, frame.x), last_a), min(max(b, frame.y), last_b)) for a, b in corners]
            clear = [(a, b) for a, b in clamped if a + side < left or a > right or b + side < top or b > bottom]
            free = [(a, b) for a, b in clear if all(abs(a - c) > side or abs(b - d) > side for c, d in taken)]
            a, b = (free or clear or clamped)[0]
            taken.append((a, b))
            self.draw.rectangle((a, b, a + side, b + side), fill=_FOUND, outline="white")
            self.draw.text((a + side / 2, b + 16), str(number), fill="white", font=font_of(9.5, True), anchor="ms")

    def legend(self, x: int, y: int, cases: Sequence[Case]) -> None:
        """Draw the colour scale, and say what the lines mean."""
        width, height = 288, 16
        colours = np.tile(_coloured(np.linspace(0, 1, width, dtype=np.float32))[None], (height, 1, 1))
        self.image.paste(_to_pil(colours), (x, y))
        self.draw.rectangle((x, y, x + width - 1, y + height - 1), outline=_DARK)
        has_threshold = any(case.has_threshold for case in cases)
        below = y + height + 20
        self.text(x, below, "score 0", size=9)
        self.text(x + width, below, f"{SCALE_END:g} x" if has_threshold else "maximum", size=9, align="r")
        lines = []
        if has_threshold:
            self.text(x + width // 2, below, "threshold", size=9, align="m")
            self.draw.line((x + width // 2, y - 3, x + width // 2, y + height + 2), fill=_FOUND, width=2)
            lines.append(("red line: the score reaches the threshold", _FOUND))
        if any(case.mask is not None for case in cases):
            lines.append(("blue line: the true defect", _TRUE))
        for number, (line, colour) in enumerate(lines):
            self.text(x + width + 48, y + 14 + 24 * number, line, size=9, colour=colour, bold=True)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to a PNG file, or to a JPEG where the name says so, and return its path."""
        is_jpeg = Path(path).suffix.lower() in (".jpg", ".jpeg")
        options: dict[str, Any] = (
            {"format": "JPEG", "quality": 90} if is_jpeg else {"format": "PNG", "compress_level": 3}
        )
        with replacing(path) as temporary:
            self.image.save(temporary, **options)
        return Path(path)


# ------------------------------------------------------------------------------------------------ panels


def _image_panel(case: Case, size: tuple[int, int]) -> Pixels:
    """Return the image at (h, w): means of its pixels where it is reduced, its own pixels where it is enlarged."""
    planes = np.asarray(case.image)
    planes = planes[None] if planes.ndim == 2 else planes
    resized = _resized(planes.astype(np.float32, copy=False), size, reduce="mean", enlarge="nearest")
    return np.broadcast_to(resized.transpose(1, 2, 0).clip(0, 1), (*size, 3))


def _truth_panel(case: Case, size: tuple[int, int]) -> Pixels | None:
    """Return the image at (h, w) with an outline of the true defect; None without a mask."""
    return None if case.mask is None else _outlined(_image_panel(case, size), case.mask, 0.5, _TRUE, width=2.4)


def _score_panel(case: Case, size: tuple[int, int]) -> Pixels:
    """Return the heat map at (h, w): the colours of the scores over the image."""
    scores = _resized(np.asarray(case.anomaly_map, np.float32), size) / np.float32(case.unit)
    return 0.35 * _image_panel(case, size) + 0.65 * _coloured(scores / SCALE_END)


def _found_panel(case: Case, size: tuple[int, int], closed: bool = True) -> Pixels:
    """Return the image at (h, w) with outlines of the true defect, and `closed` ones of what reaches the threshold."""
    pixels = _image_panel(case, size)
    if case.mask is not None:
        pixels = _outlined(pixels, case.mask, 0.5, _TRUE, width=1.4)
    if case.has_threshold:
        pixels = _outlined(pixels, case.anomaly_map, case.threshold, _FOUND, width=3, closed=closed)
    return pixels


def _coloured(shares: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the colours (..., 3) of values in [0, 1]; larger values have the last colour."""
    from matplotlib import colormaps

    return colormaps[_COLOUR_MAP](shares)[..., :3].astype(np.float32)


def _resized(
    planes: NDArray[np.float32], size: tuple[int, int], *, reduce: str = "max", enlarge: str = "bilinear"
) -> NDArray[np.float32]:
    """Return planes (..., H, W) at (h, w): an axis is reduced by the mean or maximum of its cells, or enlarged."""
    import torch
    from torch.nn import functional as F

    resized = torch.from_numpy(np.ascontiguousarray(planes))
    resized = resized.view(1, -1, *planes.shape[-2:])
    reduced_size = min(size[0], planes.shape[-2]), min(size[1], planes.shape[-1])
    if reduced_size != planes.shape[-2:]:
        pool = F.adaptive_max_pool2d if reduce == "max" else F.adaptive_avg_pool2d
        resized = pool(resized, reduced_size)
    if reduced_size != size:
        options = {"align_corners": False} if enlarge == "bilinear" else {}
        resized = F.interpolate(resized, size, mode=enlarge, **options)
    return resized.view(*planes.shape[:-2], *size).numpy()


def _outlined(
    pixels: Pixels, values: ArrayLike, level: float, colour: str, width: float, closed: bool = True
) -> Pixels:
    """Return a panel with a line where `values`, resized to it, cross `level`.

    The line is `width` pixels wide. With `closed` it follows the border of the panel too, where values reach the level
    there.
    """
    from PIL import ImageColor
    from scipy.ndimage import distance_transform_edt

    above = _resized(np.asarray(values, np.float32), pixels.shape[:2]) >= level
    inside = np.pad(above, 1) if closed else np.pad(above, 1, mode="edge")
    if inside.all() or not inside.any():
        return pixels
    distance = np.where(inside, distance_transform_edt(inside), distance_transform_edt(~inside))[1:-1, 1:-1]
    # The distance is that to the nearest pixel on the other side, half a pixel more than that to the edge.
    opacity = (width / 2 + 1 - distance).clip(0, 1)[..., None].astype(np.float32)
    return pixels + opacity * (np.asarray(ImageColor.getrgb(colour), np.float32) / 255 - pixels)
