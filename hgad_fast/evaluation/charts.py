"""Small charts as inline SVG whose colours and fonts are those of the page around them.

Every chart is made for a column of some 320 CSS pixels, bears no text but numbers and its axis labels, and refers to
the page's CSS variables (`COLOURS`), so that one file serves light and dark. Needs matplotlib; figures are made
without pyplot.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What matplotlib is given -> what the page is given.
COLOURS = {
    "ink": "#010101",
    "muted": "#010102",
    "grid": "#010103",
    "honest": "#010104",
    "official": "#010105",
    "normal": "#010106",
    "defect": "#010107",
    "line-0": "#010108",
    "line-1": "#010109",
    "line-2": "#01010a",
    "line-3": "#01010b",
}
_LEVELS = 4  # line-0 to line-3, told apart by dashes too
_DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1, 2)))
_SIZE = (4.4, 3.1)  # inches of 72 CSS pixels


class Chart:
    """One pair of axes. Draw into it, then take `svg()`."""

    def __init__(self, x: str, y: str) -> None:
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=_SIZE, layout="constrained")
        self.axes: Axes = self.figure.add_subplot()
        self.axes.set_xlabel(x, color=COLOURS["muted"])
        self.axes.set_ylabel(y, color=COLOURS["muted"])
        self.axes.tick_params(which="both", length=0, pad=5, labelcolor=COLOURS["muted"])
        self.axes.grid(color=COLOURS["grid"], linewidth=0.8)
        self.axes.set_axisbelow(True)
        self.axes.spines[["top", "right"]].set_visible(False)
        self.axes.spines[["left", "bottom"]].set_color(COLOURS["grid"])

    def line(self, x: ArrayLike, y: ArrayLike, colour: str, *, dash: int = 0, width: float = 2.0, **more: Any) -> None:
        style: dict[str, Any] = {"linestyle": _DASHES[dash % _LEVELS], "solid_capstyle": "round", "clip_on": False}
        self.axes.plot(x, y, color=COLOURS[colour], linewidth=width, **(style | more))

    def band(self, x: ArrayLike, low: ArrayLike, high: ArrayLike, colour: str) -> None:
        outline = np.concatenate([x, np.flip(x)]), np.concatenate([low, np.flip(high)])
        self.axes.fill(*outline, color=COLOURS[colour], alpha=0.2, linewidth=0)

    def mark(self, x: float) -> None:
        """A vertical line: a threshold, the end of a stage."""
        self.axes.axvline(x, color=COLOURS["ink"], linewidth=1.4, linestyle=(0, (4, 2)))

    def svg(self, description: str) -> str:
        """The drawing for a page, without a size of its own; `description` is what a screen reader says.

        Nothing in it has an id, so that many charts can stand on one page.
        """
        from html import escape

        import matplotlib

        file = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none"}):
            self.figure.savefig(file, format="svg", transparent=True)
        text = file.getvalue()
        body = text[text.index(">", text.index("<svg")) + 1 :]
        body = re.sub(r"<metadata>.*?</metadata>|<defs>.*?</defs>|<!--.*?-->", "", body, flags=re.DOTALL)
        body = re.sub(r' (id|clip-path)="[^"]*"', "", body)
        body = re.sub(r"font-family: [^;\"]*", "", body)
        body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", body)  # matplotlib before 3.11
        body = re.sub(r' d="[^"]*"', lambda d: re.sub(r"(\d+\.\d)\d*|\n", r"\1", d[0]), body)
        for name, colour in COLOURS.items():
            body = body.replace(colour, f"var(--{name})")
        body = re.sub(r"\s*\n\s*", "\n", body)
        size = " ".join(f"{72 * inches:g}" for inches in _SIZE)
        return f'<svg class="chart" viewBox="0 0 {size}" role="img" aria-label="{escape(description)}">{body}'


def curves(lines: Sequence[tuple[ArrayLike, str]], x: str, y: str, description: str, *, end: float = 1.0) -> str:
    """Curves (2, n) in the unit square, up to x = `end`, each with the name of its colour; "muted" ones are thin."""
    chart = Chart(x, y)
    for order, (points, colour) in enumerate(lines):
        horizontal, vertical = _cut(np.asarray(points, dtype=float), end)
        style = {"width": 1.0, "alpha": 0.5} if colour == "muted" else {"width": 2.2}
        chart.line(horizontal, vertical, colour, dash=int(colour == "official"), zorder=2 + order, **style)
    chart.axes.set_xlim(0, end)
    chart.axes.set_ylim(0, 1)
    return chart.svg(description)


def _cut(points: NDArray[Any], end: float) -> NDArray[Any]:
    """The part of a curve (2, n) with x up to `end`, interpolated there."""
    x, y = points
    if x[-1] <= end:
        return points
    inside = x <= end
    return np.stack([np.append(x[inside], end), np.append(y[inside], np.interp(end, x, y))])


def histogram(normal: ArrayLike, defect: ArrayLike, x: str, description: str, mark: float | None = None) -> str:
    """How many normal and how many defective pictures have which score; a logarithmic axis where scores need one."""
    groups = {"normal": np.asarray(normal, dtype=float), "defect": np.asarray(defect, dtype=float)}
    scores = np.concatenate([*groups.values()])
    low, high = (function([*scores, *([] if mark is None else [mark])]) for function in (np.min, np.max))
    logarithmic = bool(low > 0 and high / low > 30)
    edges = _edges(low, high, mark, logarithmic, min(30, max(8, round(2 * len(scores) ** 0.5))))
    chart = Chart(x, "pictures")
    for name, values in groups.items():
        if len(values):
            counts, _ = np.histogram(values, edges)
            chart.axes.stairs(counts, edges, fill=True, alpha=0.35, color=COLOURS[name])
            chart.axes.stairs(counts, edges, linewidth=1.6, color=COLOURS[name])
    if mark is not None:
        chart.mark(mark)
    if logarithmic:
        _logarithmic(chart)
    chart.axes.set_ylim(bottom=0)
    chart.axes.yaxis.set_major_locator(_whole_numbers(5))
    return chart.svg(description)


def _edges(low: float, high: float, mark: float | None, logarithmic: bool, bins: int) -> NDArray[Any]:
    """Even edges of about `bins` bins from `low` to `high`, one at `mark`: no bar stands on both sides of it."""
    if logarithmic:
        return np.exp(_edges(np.log(low), np.log(high), mark and np.log(mark), False, bins))
    step = (high - low) / bins or max(abs(low), 1.0) / bins
    mark = low if mark is None else mark
    edges = mark + step * np.arange(-np.ceil((mark - low) / step), np.floor((high - mark) / step) + 2)
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)  # whatever was rounded
    return edges


def _logarithmic(chart: Chart) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    chart.axes.set_xscale("log")
    chart.axes.xaxis.set_major_locator(LogLocator(numticks=7))
    chart.axes.xaxis.set_major_formatter("{x:g}")
    chart.axes.xaxis.set_minor_formatter(NullFormatter())


def _whole_numbers(count: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(count, integer=True)


def rates(
    wished: Sequence[float], actual: Sequence[float], y: str, description: str, band: NDArray[Any] | None = None
) -> str:
    """A share of pictures against the false-alarm rate asked for, up to 0.2; `band` (2, n): where it is expected."""
    from matplotlib.ticker import MultipleLocator, PercentFormatter

    chart = Chart("false-alarm rate asked for", y)
    if band is not None:
        chart.band(wished, band[0], band[1], "muted")
        chart.line([0, 0.2], [0, 0.2], "muted", dash=1, width=1.4)
    chart.line(wished, actual, "honest", drawstyle="steps-post")
    chart.axes.set_xlim(0, 0.2)
    chart.axes.set_ylim(0, 1 if band is None else None)
    chart.axes.xaxis.set_major_locator(MultipleLocator(0.05))
    for axis in (chart.axes.xaxis, chart.axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    return chart.svg(description)


def training(lines: Sequence[ArrayLike], y: str, description: str, mark: float | None = None) -> str:
    """One line a level over the passes of a training; `mark`: where the second stage begins."""
    chart = Chart("pass over the training pictures", y)
    for level, values in enumerate(lines):
        values = np.asarray(values, dtype=float)
        marker = "o" if np.isfinite(values).sum() == 1 else ""  # one point is no line
        chart.line(np.arange(1, len(values) + 1), values, level_colour(level), dash=level, marker=marker)
    if mark is not None:
        chart.mark(mark)
    chart.axes.xaxis.set_major_locator(_whole_numbers(6))
    return chart.svg(description)


def level_colour(level: int) -> str:
    return f"line-{level % _LEVELS}"
