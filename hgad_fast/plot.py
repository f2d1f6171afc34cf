"""Pictures that show what a model found. Needs matplotlib: `pip install hgad-fast[plot]`.

Scores are drawn in multiples of the threshold, on one scale from 0 to SCALE_END, so that pictures can be compared.
Without a threshold the scale ends at the picture's own maximum, and nothing is outlined as found.
Figures are made without pyplot: no backend is chosen and no global state of matplotlib changes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCALE_END = 2.0
_COLOURS = "inferno"
_TRUE, _FOUND = "#00c8f0", "#ff2a1a"
_RIGHT, _WRONG, _QUIET = "#0a7d38", "#c00000", "#555555"
_DPI = 120


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
        size = self.pixels.shape[:2]
        if self.mask is not None and np.shape(self.mask) != size:
            raise ValueError(f"mask has the shape {np.shape(self.mask)}; its picture has {size}")

    @property
    def pixels(self) -> NDArray[Any]:
        """The picture as matplotlib takes it, (H, W, 3)."""
        image = np.asarray(self.image)
        if image.ndim == 2:
            image = np.stack([image] * 3)
        if image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"image has the shape {image.shape}; a picture has (3, H, W) or (H, W)")
        return image.transpose(1, 2, 0).clip(0, 1)

    @property
    def has_threshold(self) -> bool:
        return 0 < self.threshold < np.inf

    @property
    def heat(self) -> NDArray[Any]:
        """The map on the colour scale: 1 at the threshold; without one, SCALE_END at the maximum."""
        scores = np.asarray(self.anomaly_map, dtype=float)
        unit = self.threshold if self.has_threshold else scores.max() / SCALE_END
        return scores / max(unit, 1e-30)

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
) -> Path:
    """Write a PNG of the picture, its heat map, and the outline of what reaches the threshold with the true one.

    Arguments as in `Case`. Returns the path.

    Raises:
        ValueError: an argument has a shape or a value that cannot be drawn.
    """
    case = Case(image, anomaly_map, threshold, mask)
    rows, columns = case.pixels.shape[:2]
    high, gap, top, below = 3.0, 0.1, 0.75 if title else 0.4, 0.7
    wide = high * min(max(columns / rows, 0.5), 3.0)
    sheet = _Sheet(3 * wide + 4 * gap, top + high + below)
    sheet.text(gap, 0.3, title, size=12, weight="bold")
    x = gap
    for name, draw in (("picture", _draw_picture), ("score", _draw_heat), ("found", _draw_found)):
        sheet.text(x + wide / 2, top - 0.1, name, size=10, align="center", color=_QUIET)
        draw(sheet.panel(x, top, wide, high), case)
        x += wide + gap
    sheet.legend(gap, top + high + 0.12, [case])
    return sheet.save(path)


def contact_sheet(cases: Sequence[Case], path: str | os.PathLike[str], *, title: str = "", columns: int = 1) -> Path:
    """Write one PNG of many cases: of each the label, the verdict, picture, true defect, heat map and what was found.

    The cases run downwards, in `columns` blocks side by side. Returns the path.

    Raises:
        ValueError: there are no cases.
    """
    if not cases:
        raise ValueError("contact_sheet: there are no cases to draw")
    panels = {"picture": _draw_picture, "true defect": _draw_truth, "score": _draw_heat, "found": _draw_found}
    side, gap, line, between, margin = 1.35, 0.05, 0.3, 0.4, 0.3
    block = len(panels) * (side + gap) - gap
    rows = -(-len(cases) // columns)
    top = 0.9 if title else 0.4
    bottom = top + rows * (line + side)
    sheet = _Sheet(2 * margin + columns * (block + between) - between, bottom + 0.75)
    sheet.text(margin, 0.45, title, size=16, weight="bold")
    for index, case in enumerate(cases):
        column, row = divmod(index, rows)
        x, y = margin + column * (block + between), top + row * (line + side) + line
        sheet.text(x, y - 0.07, case.label, size=11, weight="bold")
        colour = _WRONG if case.is_wrong else _RIGHT
        sheet.text(x + block, y - 0.07, case.verdict, size=11, align="right", color=colour)
        for name, draw in panels.items():
            if row == 0:
                sheet.text(x + side / 2, top - 0.05, name, size=10, align="center", color=_QUIET)
            draw(sheet.panel(x, y, side, side), case)
            x += side + gap
    sheet.legend(margin, bottom + 0.2, cases)
    return sheet.save(path)


def thumbnails(case: Case) -> tuple[bytes, bytes]:
    """Two JPEGs of the picture's own size for a page: it with the true defect, and its heat map with what was found."""
    return (
        _jpeg(case, lambda panel: _draw_picture(panel, case), found=False),
        _jpeg(case, lambda panel: _draw_heat(panel, case), found=True),
    )


def _jpeg(case: Case, draw: Callable[[Axes], None], *, found: bool) -> bytes:
    rows, columns = case.pixels.shape[:2]
    sheet = _Sheet(columns / _DPI, rows / _DPI)
    panel = sheet.panel(0, 0, sheet.width, sheet.height)
    draw(panel)
    if case.mask is not None:
        _outline(panel, case, np.asarray(case.mask, dtype=float), 0.5, _TRUE, width=1.2)
    if found and case.has_threshold:
        _outline(panel, case, case.heat, 1, _FOUND, width=1.6)
    file = io.BytesIO()
    sheet.figure.savefig(file, format="jpeg", pil_kwargs={"quality": 82})
    return file.getvalue()


class _Sheet:
    """A page measured in inches from its top left corner."""

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure: Figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")

    def panel(self, x: float, y: float, width: float, height: float) -> Axes:
        axes = self.figure.add_axes(
            (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        )
        axes.set_axis_off()
        return axes

    def text(self, x: float, y: float, words: str, *, size: float, align: str = "left", **style: Any) -> None:
        x, y = x / self.width, 1 - y / self.height
        self.figure.text(x, y, words, fontsize=size, ha=align, va="baseline", **style)

    def legend(self, x: float, y: float, cases: Sequence[Case]) -> None:
        """The colour scale, and what the lines mean."""
        bar = self.panel(x, y, 2.4, 0.13)
        bar.set_axis_on()
        bar.imshow(np.linspace(0, 1, 256)[None], cmap=_COLOURS, aspect="auto", extent=(0, SCALE_END, 0, 1))
        bar.set_yticks([])
        lines = []
        if any(case.has_threshold for case in cases):
            bar.axvline(1, color=_FOUND, linewidth=2)
            bar.set_xticks([0, 1, SCALE_END], ["score 0", "threshold", f"{SCALE_END:g} x"], fontsize=9)
            lines.append(("red line: the score reaches the threshold", _FOUND))
        else:
            bar.set_xticks([0, SCALE_END], ["score 0", "maximum"], fontsize=9)
        if any(case.mask is not None for case in cases):
            lines.append(("blue line: the true defect", _TRUE))
        for number, (words, colour) in enumerate(lines):
            self.text(x + 2.8, y + 0.13 + 0.22 * number, words, size=9, color=colour, weight="bold")

    def save(self, path: str | os.PathLike[str]) -> Path:
        with replacing(path) as temporary:
            self.figure.savefig(temporary, format="png")
        return Path(path)


def _draw_picture(panel: Axes, case: Case) -> None:
    rows, columns = case.pixels.shape[:2]
    panel.imshow(case.pixels, extent=(0, columns, rows, 0), interpolation="nearest")


def _draw_truth(panel: Axes, case: Case) -> None:
    if case.mask is None:
        middle: dict[str, Any] = {"ha": "center", "va": "center", "transform": panel.transAxes}
        panel.text(0.5, 0.5, "none", color=_QUIET, fontsize=10, **middle)
        return
    _draw_picture(panel, case)
    _outline(panel, case, np.asarray(case.mask, dtype=float), 0.5, _TRUE, width=1.4)


def _draw_heat(panel: Axes, case: Case) -> None:
    from matplotlib import colormaps

    _draw_picture(panel, case)
    rows, columns = case.pixels.shape[:2]
    heat = colormaps[_COLOURS](case.heat / SCALE_END)
    panel.imshow(heat, extent=(0, columns, rows, 0), interpolation="bilinear", alpha=0.65)


def _draw_found(panel: Axes, case: Case) -> None:
    _draw_picture(panel, case)
    if case.mask is not None:
        _outline(panel, case, np.asarray(case.mask, dtype=float), 0.5, _TRUE, width=0.8)
    if case.has_threshold:
        _outline(panel, case, case.heat, 1, _FOUND, width=1.8)


def _outline(panel: Axes, case: Case, values: NDArray[Any], level: float, colour: str, width: float) -> None:
    """Draw where `values` (h, w), spread over the whole picture, pass `level`; closed at the picture's border."""
    if not values.min() < level <= values.max():
        return
    rows, columns = case.pixels.shape[:2]
    closed = np.pad(values, 1, constant_values=values.min())
    x, y = (
        np.concatenate([[0.0], (np.arange(n) + 0.5) * (size / n), [float(size)]])
        for n, size in zip(values.shape[::-1], (columns, rows), strict=True)
    )
    panel.contour(x, y, closed, levels=[level], colors=[colour], linewidths=width)
