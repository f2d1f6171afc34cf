"""Pictures that show what a model found. Needs matplotlib, for its fonts and colours: `pip install hgad-fast[plot]`.

Scores are drawn in multiples of the threshold, on one scale from 0 to SCALE_END, so that pictures can be compared.
Without a threshold the scale ends at the picture's own maximum, and nothing is outlined as found.
Pages are put together with Pillow, which takes a tenth of the time that a figure of matplotlib takes. A picture is
reduced before anything else is done with it, a map by its maxima, so that a hot spot of one pixel still shows.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .files import replacing
from .regions import Region, find_regions

if TYPE_CHECKING:
    from PIL import Image
    from PIL.ImageFont import FreeTypeFont

SCALE_END = 2.0
SHEET_SIDE = 2000
"""Pictures with a longer side than this get a sheet: a reduced view, and the worst regions at full resolution."""

CROPS = 6  # regions that a sheet shows
_COLOURS = "inferno"
_TRUE, _FOUND = "#00c8f0", "#ff2a1a"
_RIGHT, _WRONG, _QUIET, _DARK = "#0a7d38", "#c00000", "#555555", "#111111"

Pixels = NDArray[np.float32]  # (h, w, 3) in [0, 1], a panel


@dataclass(frozen=True)
class Case:
    """A picture, what the model says of it, and the truth where it is known.

    Attributes:
        image: (3, H, W) or (H, W), in [0, 1].
        anomaly_map: (h, w) over the whole picture, at any resolution.
        threshold: the score from which a pixel counts as defective, in the map's units; NaN: there is none.
        mask: (H, W) bool, the true defect; None if there is none, or none is known.
        label: what the picture is, e.g. "brick: scratch".
        image_score: the picture's own score, in the same units.
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
            raise ValueError(f"image has the shape {shape}; a picture has (3, H, W) or (H, W)")
        if self.mask is not None and np.shape(self.mask) != self.size:
            raise ValueError(f"mask has the shape {np.shape(self.mask)}; its picture has {self.size}")

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the picture."""
        height, width = np.shape(self.image)[-2:]
        return height, width

    @property
    def has_threshold(self) -> bool:
        return 0 < self.threshold < np.inf

    @property
    def unit(self) -> float:
        """The score that is 1 on the colour scale: the threshold; without one, half of the maximum (SCALE_END 2)."""
        unit = self.threshold if self.has_threshold else float(np.max(np.asarray(self.anomaly_map))) / SCALE_END
        return max(unit, 1e-30)

    @property
    def verdict(self) -> str:
        """E.g. "score 1.73: defect", in multiples of the threshold, and a note where the truth is another."""
        score = ""
        if self.image_score is not None and self.has_threshold:
            score = f"score {self.image_score / self.threshold:.2f}"
        found = {True: "defect", False: "normal", None: ""}[self.is_anomalous]
        note = (" (missed)" if self.is_defective else " (false alarm)") if self.is_wrong else ""
        return ": ".join(filter(None, (score, found))) + note

    @property
    def is_wrong(self) -> bool:
        known = self.is_anomalous is not None and self.is_defective is not None
        return known and self.is_anomalous != self.is_defective


def overlay(
    image: ArrayLike,
    anomaly_map: ArrayLike,
    threshold: float,
    mask: ArrayLike | None = None,
    *,
    path: str | os.PathLike[str],
    title: str = "",
    regions: Sequence[Region] | None = None,
) -> Path:
    """Write a PNG of the picture, its heat map, and the outline of what reaches the threshold with the true one.

    A picture with a side above `SHEET_SIDE` is shown reduced, with numbered boxes around its `CROPS` worst regions, and
    below are these regions at full resolution. `regions` are those of the map at the picture's size, in the order of
    their numbers; None: they are looked for. The other arguments are as in `Case`. Returns the path.

    Raises:
        ValueError: an argument has a shape or a value that cannot be drawn.
    """
    case = Case(image, anomaly_map, threshold, mask)
    if max(case.size) > SHEET_SIDE:
        return _sheet_of_crops(case, _regions(case) if regions is None else regions, title).save(path)
    rows, columns = case.size
    high, gap, top, below = 360, 12, 90 if title else 48, 84
    wide = round(high * min(max(columns / rows, 0.5), 3.0))
    page = _Page(max(3 * wide + 4 * gap, _LEGEND_WIDTH), top + high + below)
    page.text(gap, 36, title, size=12, bold=True)
    x = gap
    for name, draw in (("picture", _picture), ("score", _heat), ("found", _found)):
        page.text(x + wide // 2, top - 12, name, size=10, align="m", colour=_QUIET)
        page.panel(x, top, wide, high, case, draw)
        x += wide + gap
    page.legend(gap, top + high + 14, [case])
    return page.save(path)


def contact_sheet(cases: Sequence[Case], path: str | os.PathLike[str], *, title: str = "", columns: int = 1) -> Path:
    """Write one PNG of many cases: of each the label, the verdict, picture, true defect, heat map and what was found.

    The cases run downwards, in `columns` blocks side by side. Returns the path.

    Raises:
        ValueError: there are no cases.
    """
    if not cases:
        raise ValueError("contact_sheet: there are no cases to draw")
    panels = {"picture": _picture, "true defect": _truth, "score": _heat, "found": _found}
    side, gap, line, between, margin = 162, 6, 36, 48, 36
    block = len(panels) * (side + gap) - gap
    rows = -(-len(cases) // columns)
    top = 108 if title else 48
    bottom = top + rows * (line + side)
    page = _Page(2 * margin + columns * (block + between) - between, bottom + 90)
    page.text(margin, 54, title, size=16, bold=True)
    for index, case in enumerate(cases):
        column, row = divmod(index, rows)
        x, y = margin + column * (block + between), top + row * (line + side) + line
        verdict = page.text(x + block, y - 8, case.verdict, size=11, align="r", colour=_verdict_colour(case))
        page.text(x, y - 8, case.label, size=11, bold=True, width=block - verdict - gap)
        for name, draw in panels.items():
            if row == 0:
                page.text(x + side // 2, top - 6, name, size=10, align="m", colour=_QUIET)
            page.panel(x, y, side, side, case, draw)
            x += side + gap
    page.legend(margin, bottom + 24, cases)
    return page.save(path)


def _verdict_colour(case: Case) -> str:
    return _WRONG if case.is_wrong else _RIGHT


def _regions(case: Case) -> list[Region]:
    """Regions of the map in pixels of the picture, whatever the map's resolution."""
    return find_regions(_resized(np.asarray(case.anomaly_map, np.float32), case.size), case.threshold)


def _sheet_of_crops(case: Case, regions: Sequence[Region], title: str) -> _Page:
    """Reduced picture and heat map, side by side or one above the other, and a grid of crops below."""
    rows, columns = case.size
    gap, crop, facts, per_row = 16, 400, 52, 3
    inner = per_row * crop + (per_row - 1) * gap
    stacked = columns > 1.8 * rows
    high = min(round((inner if stacked else (inner - gap) // 2) * rows / columns), 900)
    wide = max(round(high * columns / rows), 400)  # room for the words above
    top = 84 if title else 44
    second = (gap, top + high + 34) if stacked else (gap + wide + gap, top)
    headline = second[1] + high + 44
    worst = regions[:CROPS]
    bottom = headline + 24 + -(-len(worst) // per_row) * (facts + crop + gap)
    page = _Page(inner + 2 * gap, bottom + 84)
    page.text(gap, 36, title, size=14, bold=True)
    page.text(gap, top - 10, f"picture, {columns} x {rows} pixels, reduced", size=10, colour=_QUIET)
    frame = page.panel(gap, top, wide, high, case, _found)
    page.boxes(frame, worst)
    page.text(second[0], second[1] - 10, "score", size=10, colour=_QUIET)
    page.panel(*second, wide, high, case, _heat)
    page.text(gap, headline, _count(case, regions), size=12, bold=True)
    for index, region in enumerate(worst):
        row, column = divmod(index, per_row)
        x, y = gap + column * (crop + gap), headline + 24 + row * (facts + crop + gap) + facts
        view = _window(region, crop, case.size)
        page.text(x, y - 14, f"{index + 1}", size=18, bold=True, colour=_FOUND)
        page.text(x + 30, y - 28, f"score {region.peak / case.unit:.2f}, {region.area} pixels", size=10)
        box = f"x {region.left} to {region.right - 1}, y {region.top} to {region.bottom - 1}"
        page.text(x + 30, y - 8, box + (", around the peak" if view.is_part else ""), size=10)
        page.panel(x, y, crop, crop, _cut(case, view), functools.partial(_found, closed=False))
    page.legend(gap, bottom + 14, [case])
    return page


def _count(case: Case, regions: Sequence[Region]) -> str:
    if not case.has_threshold:
        return "there is no threshold"
    if not regions:
        return "nothing is above the threshold"
    words = "1 region is" if len(regions) == 1 else f"{len(regions)} regions are"
    worst = f"the worst {CROPS} " if len(regions) > CROPS else ""
    return f"{words} above the threshold; {worst}at full resolution:"


class _Window(NamedTuple):
    """Pixels of the picture, right and bottom outside; `is_part`: of the region, not all of it is inside."""

    left: int
    top: int
    right: int
    bottom: int
    is_part: bool


def _window(region: Region, side: int, size: tuple[int, int]) -> _Window:
    """A square of `side` pixels inside the picture: around the region, or where that is larger, around its peak."""
    rows, columns = size
    fits = region.right - region.left <= side and region.bottom - region.top <= side
    x = (region.left + region.right) // 2 if fits else region.peak_x
    y = (region.top + region.bottom) // 2 if fits else region.peak_y
    left, top = max(0, min(x - side // 2, columns - side)), max(0, min(y - side // 2, rows - side))
    return _Window(left, top, min(left + side, columns), min(top + side, rows), not fits)


def _cut(case: Case, view: _Window) -> Case:
    """What a window shows, as a case of its own."""
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
    """Two JPEGs of the picture's own size for a page: it with the true defect, and its heat map with what was found."""
    picture, heat = _picture(case, case.size), _heat(case, case.size)
    if case.mask is not None:
        picture, heat = (_outlined(pixels, case.mask, 0.5, _TRUE, width=2) for pixels in (picture, heat))
    if case.has_threshold:
        heat = _outlined(heat, case.anomaly_map, case.threshold, _FOUND, width=2.6)
    return _jpeg(picture), _jpeg(heat)


def _jpeg(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    _image(pixels).save(file, format="JPEG", quality=82)
    return file.getvalue()


# ------------------------------------------------------------------------------------------------ pages


def _image(pixels: Pixels) -> Image.Image:
    from PIL import Image

    return Image.fromarray(np.rint(pixels * 255).astype(np.uint8))


@functools.cache
def _font(points: float, bold: bool) -> FreeTypeFont:
    import matplotlib
    from PIL import ImageFont

    file = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", file), points * 120 / 72)


class _Frame(NamedTuple):
    """Where a panel lies on the page, and the size (H, W) of the picture that it shows."""

    x: int
    y: int
    wide: int
    high: int
    size: tuple[int, int]


_LEGEND_WIDTH = 760


class _Page:
    """A white page measured in pixels from its top left corner; text stands on its y."""

    def __init__(self, width: int, height: int) -> None:
        from PIL import Image, ImageDraw

        self.image: Image.Image = Image.new("RGB", (width, height), "white")
        self.draw = ImageDraw.Draw(self.image)

    def text(
        self,
        x: int,
        y: int,
        words: str,
        *,
        size: float,
        align: str = "l",
        bold: bool = False,
        colour: str = _DARK,
        width: int | None = None,
    ) -> int:
        """Write words, left, middle or right of x, their start cut off where they are wider than `width`; how wide."""
        font = _font(size, bold)
        width = self.image.width - x - 8 if width is None and align == "l" else width
        if width is not None and font.getlength(words) > width:
            while words and font.getlength(f"\u2026{words}") > width:
                words = words[1:]
            words = f"\u2026{words}"
        self.draw.text((x, y), words, fill=colour, font=font, anchor=f"{align}s")
        return round(font.getlength(words))

    def panel(self, x: int, y: int, wide: int, high: int, case: Case, draw: Any) -> _Frame:
        """Draw a case in the middle of a box, as large as its proportions allow."""

        rows, columns = case.size
        scale = min(wide / columns, high / rows)
        w, h = max(1, round(columns * scale)), max(1, round(rows * scale))
        x, y = x + (wide - w) // 2, y + (high - h) // 2
        pixels = draw(case, (h, w))
        if pixels is None:
            self.text(x + w // 2, y + h // 2, "none", size=10, align="m", colour=_QUIET)
        else:
            self.image.paste(_image(pixels), (x, y))
        return _Frame(x, y, w, h, case.size)

    def boxes(self, frame: _Frame, regions: Sequence[Region]) -> None:
        """Numbered boxes around regions of the picture in a frame; the numbers keep clear of each other if they can."""
        sx, sy, side = frame.wide / frame.size[1], frame.high / frame.size[0], 20
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
            beside = [(a, b) for b in (top - side - 2, bottom + 2) for a in (left, right - side)]
            beside += [(a, b) for a in (right + 2, left - side - 2) for b in (top, bottom - side)]
            clamped = [
                (min(max(a, frame.x), frame.x + frame.wide - side), min(max(b, frame.y), frame.y + frame.high - side))
                for a, b in beside
            ]
            clear = [(a, b) for a, b in clamped if a + side < left or a > right or b + side < top or b > bottom]
            free = [(a, b) for a, b in clear if all(abs(a - c) > side or abs(b - d) > side for c, d in taken)]
            a, b = (free or clear or clamped)[0]
            taken.append((a, b))
            self.draw.rectangle((a, b, a + side, b + side), fill=_FOUND, outline="white")
            self.draw.text((a + side / 2, b + 16), str(number), fill="white", font=_font(9.5, True), anchor="ms")

    def legend(self, x: int, y: int, cases: Sequence[Case]) -> None:
        """The colour scale, and what the lines mean."""

        wide, high = 288, 16
        colours = np.tile(_coloured(np.linspace(0, 1, wide, dtype=np.float32))[None], (high, 1, 1))
        self.image.paste(_image(colours), (x, y))
        self.draw.rectangle((x, y, x + wide - 1, y + high - 1), outline=_DARK)
        has_threshold = any(case.has_threshold for case in cases)
        below = y + high + 20
        self.text(x, below, "score 0", size=9)
        self.text(x + wide, below, f"{SCALE_END:g} x" if has_threshold else "maximum", size=9, align="r")
        lines = []
        if has_threshold:
            self.text(x + wide // 2, below, "threshold", size=9, align="m")
            self.draw.line((x + wide // 2, y - 3, x + wide // 2, y + high + 2), fill=_FOUND, width=2)
            lines.append(("red line: the score reaches the threshold", _FOUND))
        if any(case.mask is not None for case in cases):
            lines.append(("blue line: the true defect", _TRUE))
        for number, (words, colour) in enumerate(lines):
            self.text(x + wide + 48, y + 14 + 24 * number, words, size=9, colour=colour, bold=True)

    def save(self, path: str | os.PathLike[str]) -> Path:
        with replacing(path) as temporary:
            self.image.save(temporary, format="PNG", compress_level=3)
        return Path(path)


# ------------------------------------------------------------------------------------------------ panels


def _picture(case: Case, size: tuple[int, int]) -> Pixels:
    """The picture at (h, w): means where it is reduced, its own pixels where it is enlarged."""
    planes = np.asarray(case.image)
    planes = planes[None] if planes.ndim == 2 else planes
    seen = _resized(planes.astype(np.float32, copy=False), size, reduce="mean", enlarge="nearest")
    return np.broadcast_to(seen.transpose(1, 2, 0).clip(0, 1), (*size, 3))


def _truth(case: Case, size: tuple[int, int]) -> Pixels | None:
    return None if case.mask is None else _outlined(_picture(case, size), case.mask, 0.5, _TRUE, width=2.4)


def _heat(case: Case, size: tuple[int, int]) -> Pixels:
    heat = _resized(np.asarray(case.anomaly_map, np.float32), size) / np.float32(case.unit)
    return 0.35 * _picture(case, size) + 0.65 * _coloured(heat / SCALE_END)


def _found(case: Case, size: tuple[int, int], closed: bool = True) -> Pixels:
    pixels = _picture(case, size)
    if case.mask is not None:
        pixels = _outlined(pixels, case.mask, 0.5, _TRUE, width=1.4)
    if case.has_threshold:
        pixels = _outlined(pixels, case.anomaly_map, case.threshold, _FOUND, width=3, closed=closed)
    return pixels


def _coloured(shares: NDArray[np.float32]) -> NDArray[np.float32]:
    """Colours (..., 3) of values in [0, 1]; what is above has the last colour."""
    from matplotlib import colormaps

    return colormaps[_COLOURS](shares)[..., :3].astype(np.float32)


def _resized(
    planes: NDArray[np.float32], size: tuple[int, int], *, reduce: str = "max", enlarge: str = "bilinear"
) -> NDArray[np.float32]:
    """Planes (..., H, W) at (h, w): each axis is reduced by the mean or maximum of its cells, or enlarged."""
    import torch
    from torch.nn import functional as F

    found = torch.from_numpy(np.ascontiguousarray(planes))
    found = found.view(1, -1, *planes.shape[-2:])
    smaller = min(size[0], planes.shape[-2]), min(size[1], planes.shape[-1])
    if smaller != planes.shape[-2:]:
        found = F.adaptive_max_pool2d(found, smaller) if reduce == "max" else F.adaptive_avg_pool2d(found, smaller)
    if smaller != size:
        options = {"align_corners": False} if enlarge == "bilinear" else {}
        found = F.interpolate(found, size, mode=enlarge, **options)
    return found.view(*planes.shape[:-2], *size).numpy()


def _outlined(
    pixels: Pixels, values: ArrayLike, level: float, colour: str, width: float, closed: bool = True
) -> Pixels:
    """Draw a line, `width` wide, where `values`, spread over the panel, pass `level`; if closed, along its border."""
    from PIL import ImageColor
    from scipy.ndimage import distance_transform_edt

    spread = _resized(np.asarray(values, np.float32), pixels.shape[:2])
    inside = np.pad(spread >= level, 1) if closed else np.pad(spread >= level, 1, mode="edge")
    if inside.all() or not inside.any():
        return pixels
    apart = np.where(inside, distance_transform_edt(inside), distance_transform_edt(~inside))[1:-1, 1:-1]
    ink = (width / 2 + 1 - apart).clip(0, 1)[..., None].astype(np.float32)  # the edge is half a pixel from either side
    return pixels + ink * (np.asarray(ImageColor.getrgb(colour), np.float32) / 255 - pixels)
