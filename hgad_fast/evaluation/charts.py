"""Small charts as inline SVG whose colours and fonts are those of the page around them.

Every chart is made for a column of about 320 CSS pixels and has no text but numbers and axis labels. Its colours are
the page's CSS variables (`COLOURS`), so that one file serves light and dark. Needs matplotlib, but not pyplot.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The page's CSS variables, and the colours that matplotlib draws in their place until `Chart.svg` puts them in.
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
_DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1, 2)))  # of line-0 to line-3
_FURTHER = (("line-3", 2), ("line-2", 3))  # colour and dashes of official protocols after the first
_SIZE = (4.4, 3.1)  # inches of 72 CSS pixels


class Chart:
    """One pair of axes with labels: draw into it, then take its `svg`."""

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

    def line(self, x: ArrayLike, y: ArrayLike, colour: str, *, dash: int = 0, width: float = 2.0, **style: Any) -> None:
        """Draw a line in a colour of `COLOURS` and one of the four kinds of dashes; `style`: options of matplotlib."""
        defaults: dict[str, Any] = {
            "linestyle": _DASHES[dash % len(_DASHES)],
            "solid_capstyle": "round",
            "clip_on": False,
        }
        self.axes.plot(x, y, color=COLOURS[colour], linewidth=width, **(defaults | style))

    def band(self, x: ArrayLike, low: ArrayLike, high: ArrayLike, colour: str) -> None:
        """Fill the area between two curves over the same `x`."""
        outline = np.concatenate([x, np.flip(x)]), np.concatenate([low, np.flip(high)])
        self.axes.fill(*outline, color=COLOURS[colour], alpha=0.2, linewidth=0)

    def mark(self, x: float) -> None:
        """Draw a vertical line, at a threshold or where a stage of the training begins."""
        self.axes.axvline(x, color=COLOURS["ink"], linewidth=1.4, linestyle=(0, (4, 2)))

    def svg(self, description: str) -> str:
        """Return the chart as an SVG element without a size of its own; screen readers read out the `description`.

        Nothing in it has an id, so that many charts can stand on one page.
        """
        import matplotlib

        file = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none"}):
            self.figure.savefig(file, format="svg", transparent=True)
        text = file.getvalue()
        body = text[text.index(">", text.index("<svg")) + 1 :]
        body = re.sub(r"<metadata>.*?</metadata>|<defs>.*?</defs>|<!--.*?-->", "", body, flags=re.DOTALL)
        body = re.sub(r' (id|clip-path)="[^"]*"', "", body)
        body = re.sub(r"font-family: [^;\"]*", "", body)  # the page's font instead
        body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", body)  # matplotlib before 3.11
        body = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\d+\.\d)\d*|\n", r"\1", path[0]), body)  # tenths will do
        for name, colour in COLOURS.items():
            body = body.replace(colour, f"var(--{name})")
        body = re.sub(r"\s*\n\s*", "\n", body)
        size = " ".join(f"{72 * inches:g}" for inches in _SIZE)
        return f'<svg class="chart" viewBox="0 0 {size}" role="img" aria-label="{escape(description)}">{body}'


def curves(lines: Sequence[tuple[ArrayLike, str]], x: str, y: str, description: str, *, end: float = 1.0) -> str:
    """Return a chart of curves (2, n) in the unit square, cut at x = `end`, each with the name of its colour.

    The curves in "muted" are thin, those in "official" and of `further_key` dashed. Later ones lie on top.
    """
    chart, dashes = Chart(x, y), {"official": 1} | dict(_FURTHER)
    for i, (points, colour) in enumerate(lines):
        horizontal, vertical = _cut(np.asarray(points, dtype=float), end)
        style = {"width": 1.0, "alpha": 0.5} if colour == "muted" else {"width": 2.2}
        chart.line(horizontal, vertical, colour, dash=dashes.get(colour, 0), zorder=2 + i, **style)
    chart.axes.set_xlim(0, end)
    chart.axes.set_ylim(0, 1)
    return chart.svg(description)


def _cut(points: NDArray[Any], end: float) -> NDArray[Any]:
    """Return the part of a curve (2, n) with x up to `end`, interpolated there."""
    x, y = points
    if x[-1] <= end:
        return points
    inside = x <= end
    return np.stack([np.append(x[inside], end), np.append(y[inside], np.interp(end, x, y))])


def histogram(normal: ArrayLike, defect: ArrayLike, x: str, description: str, mark: float | None = None) -> str:
    """Return a histogram of the scores of normal and of defective images, with a line at `mark`.

    The axis of the scores is logarithmic where they spread over more than a factor of 30.
    """
    groups = {"normal": np.asarray(normal, dtype=float), "defect": np.asarray(defect, dtype=float)}
    scores = np.concatenate([*groups.values()])
    shown = scores if mark is None else np.append(scores, mark)
    low, high = np.min(shown), np.max(shown)
    logarithmic = bool(low > 0 and high / low > 30)
    edges = _edges(low, high, mark, logarithmic, min(30, max(8, round(2 * len(scores) ** 0.5))))
    chart = Chart(x, "images")
    for name, values in groups.items():
        if len(values):
            counts, _ = np.histogram(values, edges)
            chart.axes.stairs(counts, edges, fill=True, alpha=0.35, color=COLOURS[name])
            chart.axes.stairs(counts, edges, linewidth=1.6, color=COLOURS[name])
    if mark is not None:
        chart.mark(mark)
    if logarithmic:
        _use_logarithmic_scores(chart)
    chart.axes.set_ylim(bottom=0)
    chart.axes.yaxis.set_major_locator(_whole_numbers(5))
    return chart.svg(description)


def _edges(low: float, high: float, mark: float | None, logarithmic: bool, bins: int) -> NDArray[Any]:
    """Return even edges of about `bins` bins from `low` to `high`; one is at `mark`, so that no bar lies across it."""
    if logarithmic:
        return np.exp(_edges(np.log(low), np.log(high), None if mark is None else np.log(mark), False, bins))
    step = (high - low) / bins or max(abs(low), 1.0) / bins
    mark = low if mark is None else mark
    edges = mark + step * np.arange(-np.ceil((mark - low) / step), np.floor((high - mark) / step) + 2)
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)  # whatever rounding did
    return edges


def _use_logarithmic_scores(chart: Chart) -> None:
    """Make the horizontal axis logarithmic, with plain numbers at a few ticks."""
    from matplotlib.ticker import LogLocator, NullFormatter

    chart.axes.set_xscale("log")
    chart.axes.xaxis.set_major_locator(LogLocator(numticks=7))
    chart.axes.xaxis.set_major_formatter("{x:g}")
    chart.axes.xaxis.set_minor_formatter(NullFormatter())


def _whole_numbers(count: int) -> Any:
    """Return a locator of ticks at whole numbers, with at most `count` intervals between them."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(count, integer=True)


def rates(
    targets: Sequence[float], actual: Sequence[float], y: str, description: str, band: NDArray[Any] | None = None
) -> str:
    """Return a chart of a share of images against the target false-alarm rate, from 0 to 0.2.

    `band` (2, n): the bounds between which the share is expected at each target; where there is one, a line shows the
    targets themselves.
    """
    from matplotlib.ticker import MultipleLocator, PercentFormatter

    chart = Chart("target false-alarm rate", y)
    if band is not None:
        chart.band(targets, band[0], band[1], "muted")
        chart.line([0, 0.2], [0, 0.2], "muted", dash=1, width=1.4)
    chart.line(targets, actual, "honest", drawstyle="steps-post")
    chart.axes.set_xlim(0, 0.2)
    chart.axes.set_ylim(0, 1 if band is None else None)
    chart.axes.xaxis.set_major_locator(MultipleLocator(0.05))
    for axis in (chart.axes.xaxis, chart.axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    return chart.svg(description)


def training(lines: Sequence[ArrayLike], y: str, description: str, marks: Sequence[float] = ()) -> str:
    """Return a chart of one line a level over the passes of a training, with vertical lines at `marks`."""
    chart = Chart("pass over the training images", y)
    for level, values in enumerate(lines):
        values = np.asarray(values, dtype=float)
        marker = "o" if np.isfinite(values).sum() == 1 else ""  # one point is no line
        chart.line(np.arange(1, len(values) + 1), values, level_colour(level), dash=level, marker=marker)
    for mark in marks:
        chart.mark(mark)
    chart.axes.xaxis.set_major_locator(_whole_numbers(6))
    return chart.svg(description)


def further_key(number: int) -> tuple[str, str]:
    """Return colour (of `COLOURS`) and CSS class of an official protocol after the first, by its number from 0."""
    colour, dash = _FURTHER[number % len(_FURTHER)]
    return colour, f"dash-{dash}"


def level_colour(level: int) -> str:
    """Return the name of a level's colour in `COLOURS`."""
    return f"line-{level % len(_DASHES)}"


def level_dash(level: int) -> str:
    """Return the CSS class that gives a level's key in a legend the dashes of its line."""
    return f"dash-{level % len(_DASHES)}"
