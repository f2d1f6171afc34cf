"""Results of benchmarks: rows and failures, as a table, as JSON and as a roofline image."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import replacing
from . import latency
from .cases import Size
from .latency import Latency

OUT_OF_MEMORY = "out of memory"
WRONG = "wrong: "
TOLERANCE = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 3e-2}
# A hidden unit within rounding of zero may pass the ReLU of one side and not of the other: of the 17 million in a
# step one or two do in float32, and each moves the gradient of its layer by some 5e-4 (float32 against float64 shows
# the same). With operands of fewer bits many do; the bounds are three times what was seen.
GRADIENT_TOLERANCE = {"fp32": 5e-3, "tf32": 3e-2, "bf16": 6e-2}


@dataclass(frozen=True)
class Ceiling:
    """The best that the machine does now: a large copy, and a large matrix product at each precision."""

    bytes_per_second: float
    flop_per_second: dict[str, float]


@dataclass(frozen=True)
class Row:
    """One contender at one size; medians and quartiles are over the rounds."""

    case: str
    size: Size
    device: str  # its name
    contender: str
    path: str
    precision: str
    is_peer: bool
    rounds: int
    seconds: float
    seconds_quartiles: tuple[float, float]
    images_per_second: float
    pixels_per_second: float
    flop: int
    bytes: int
    flop_per_second: float
    bytes_per_second: float
    ceiling: Ceiling
    ceiling_share: float
    peak_bytes: int  # beyond what was allocated before the work began
    speedups: dict[str, tuple[float, float, float]]  # peer's time / this time: median over the rounds, and quartiles
    error: float  # largest Frobenius-relative deviation of a result from the first peer's


@dataclass(frozen=True)
class Failure:
    """A contender that has no figures, and why: it ran out of memory, or its results are wrong."""

    case: str
    size: Size
    device: str  # its name
    contender: str
    path: str
    precision: str
    reason: str
    is_wrong: bool = False


Outcome = Row | Failure | Latency


def wrong_results(outcomes: Iterable[Outcome]) -> list[str]:
    """Return a line for each contender whose results are wrong."""
    lines = []
    for outcome in outcomes:
        if isinstance(outcome, Latency):
            if not outcome.error <= TOLERANCE["fp32"]:
                lines.append(f"latency, {outcome.call}: the score deviates by {outcome.error:.1e}")
        elif isinstance(outcome, Failure) and outcome.is_wrong:
            reason = outcome.reason.removeprefix(WRONG)
            lines.append(f"{outcome.case}, {outcome.contender} ({outcome.size}): {reason}")
    return lines


def table(outcomes: Iterable[Outcome]) -> str:
    """Return the outcomes as text, one block for each case and size."""
    outcomes = list(outcomes)
    lines: list[str] = []
    for (case, size, device), block in grouped(outcomes).items():
        rows = [outcome for outcome in block if isinstance(outcome, Row)]
        heading = f"{case} on {device}: {size}"
        if rows:
            ceiling = rows[0].ceiling
            rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in ceiling.flop_per_second.items())
            heading += f"; {rows[0].rounds} rounds; copy {ceiling.bytes_per_second / 1e9:.1f} GB/s, "
            heading += f"matrix product {rates} GFLOP/s"
        columns = ["path", "ms (quartiles)", "images/s", "pixels/s", "GB/s", "GFLOP/s", "ceiling", "peak MiB", "error"]
        peers = list(rows[0].speedups) if rows else []
        cells = [["", *columns, *(f"{peer} / this" for peer in peers)]]
        cells += [[outcome.contender, *(_cells(outcome, peers))] for outcome in block]
        full = [line for line in cells if len(line) == len(cells[0])]
        widths = [max(map(len, column)) for column in zip(*full, strict=True)]
        widths[0] = max(len(line[0]) for line in cells)
        lines += ["", heading]
        for line in cells:
            name, *others = line
            aligned = (f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=False))
            lines.append("  " + "  ".join([f"{name:{widths[0]}}", *aligned]).rstrip())
    if frames := [outcome for outcome in outcomes if isinstance(outcome, Latency)]:
        lines += ["", latency.table(frames)]
    return "\n".join(lines[1:])


def grouped(outcomes: Iterable[Outcome]) -> dict[tuple[str, Size, str], list[Row | Failure]]:
    """Group rows and failures by case, size and device, in their order."""
    groups: dict[tuple[str, Size, str], list[Row | Failure]] = {}
    for outcome in outcomes:
        if isinstance(outcome, Latency):
            continue
        groups.setdefault((outcome.case, outcome.size, outcome.device), []).append(outcome)
    return groups


def _cells(outcome: Row | Failure, peers: list[str]) -> list[str]:
    if isinstance(outcome, Failure):
        return [outcome.path, outcome.reason]
    low, high = (1e3 * quartile for quartile in outcome.seconds_quartiles)
    return [
        outcome.path,
        f"{1e3 * outcome.seconds:.2f} ({low:.2f}-{high:.2f})",
        f"{outcome.images_per_second:.1f}",
        f"{outcome.pixels_per_second:.0f}",
        f"{outcome.bytes_per_second / 1e9:.2f}",
        f"{outcome.flop_per_second / 1e9:.1f}",
        f"{outcome.ceiling_share:.0%}",
        f"{outcome.peak_bytes / 2**20:.1f}",
        f"{outcome.error:.0e}",
        *("{:.2f} ({:.2f}-{:.2f})".format(*outcome.speedups[peer]) for peer in peers),
    ]


def plot(outcomes: Iterable[Outcome], path: str | os.PathLike[str]) -> Path:
    """Write a roofline image (PNG): what every contender attains, under what this machine can do.

    There is a panel for each number of pixels, with the first size of each case that has it. All contenders of a case
    stand over one another, at the least operations and bytes that one of them needs: their distance is the ratio of
    their times, and that to the roof what is left to gain.

    Raises:
        ValueError: there is no row to draw.
        ImportError: matplotlib is not installed.
    """
    blocks: dict[int, dict[str, list[Row]]] = {}
    for (case, size, _), block in grouped(outcomes).items():
        if rows := [outcome for outcome in block if isinstance(outcome, Row)]:
            blocks.setdefault(size.pixels, {}).setdefault(case, rows)
    if not blocks:
        raise ValueError("plot: there are no measured rows to draw")
    from matplotlib.figure import Figure

    columns = min(len(blocks), 2)
    lines = math.ceil(len(blocks) / columns)
    figure = Figure(figsize=(3 + 5.5 * columns, 1 + 4 * lines), dpi=120, facecolor="white", layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    every_row = [row for cases in blocks.values() for rows in cases.values() for row in rows]
    colours = {case: f"C{i}" for i, case in enumerate(dict.fromkeys(row.case for row in every_row))}
    for panel in panels[len(blocks) :]:
        panel.set_visible(False)
    for panel, pixels in zip(panels, sorted(blocks), strict=False):
        _draw_panel(panel, blocks[pixels], colours)
        panel.set_title(f"{pixels:,} pixels".replace(",", " "), loc="left", fontsize=10)
    _draw_roof(panels[: len(blocks)], every_row)
    figure.suptitle(f"Roofline of {every_row[0].device}")
    figure.supxlabel("operations per byte that has to be moved (FLOP/B)", fontsize=10)
    figure.supylabel("operations per second (FLOP/s)", fontsize=10)
    figure.legend(handles=_keys(every_row, colours), loc="outside right upper", frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    return Path(path)


_GREY = "#444444"
_SHAPES = {"fp32": "o", "tf32": "^", "bf16": "D", "compiled": "s"}


def _shape(row: Row) -> str:
    return "compiled" if row.contender.endswith("compiled") else row.precision


def _draw_panel(panel: Any, cases: dict[str, list[Row]], colours: dict[str, str]) -> None:
    for case, rows in cases.items():
        flop, moved = min(row.flop for row in rows), min(row.bytes for row in rows)
        rates = [flop / row.seconds for row in rows]
        panel.plot([flop / moved] * 2, [min(rates), max(rates)], color=colours[case], linewidth=0.8, alpha=0.6)
        for row, rate in zip(rows, rates, strict=True):
            face = "white" if row.is_peer else colours[case]
            style = {"markerfacecolor": face, "markeredgewidth": 1.5, "markersize": 7}
            panel.plot(flop / moved, rate, _SHAPES[_shape(row)], color=colours[case], zorder=3, **style)


def _draw_roof(panels: Any, rows: list[Row]) -> None:
    from matplotlib.ticker import EngFormatter

    ceiling = rows[0].ceiling
    knees = {name: rate / ceiling.bytes_per_second for name, rate in ceiling.flop_per_second.items()}
    intensities = [row.flop / row.bytes for row in rows] + list(knees.values())
    left, right = min(intensities) / 4, max(intensities) * 4
    x = np.array(sorted([left, *knees.values(), right]))
    for panel in panels:
        panel.set(xscale="log", yscale="log", xlim=(left, right))
        panel.yaxis.set_major_formatter(EngFormatter())
        panel.grid(which="major", color="#dddddd", linewidth=0.6)
        for rate in ceiling.flop_per_second.values():
            panel.plot(x, np.minimum(x * ceiling.bytes_per_second, rate), color=_GREY, linewidth=1.2, zorder=1)
    words: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "color": _GREY, "zorder": 2}
    for name, knee in knees.items():
        rate = ceiling.flop_per_second[name]
        panels[0].annotate(f"{name} product, {EngFormatter('FLOP/s', 0)(rate)}", (knee, rate), (14, 3), **words)
    copied = f"copy, {EngFormatter('B/s', 1)(ceiling.bytes_per_second)}"
    panels[0].annotate(copied, (left, left * ceiling.bytes_per_second), (8, -2), va="top", **words)


def _keys(rows: list[Row], colours: dict[str, str]) -> list[Any]:
    from matplotlib.lines import Line2D

    def key(label: str, marker: str, colour: str, face: str) -> Line2D:
        return Line2D([], [], linestyle="", marker=marker, color=colour, markerfacecolor=face, label=label)

    used = {_shape(row) for row in rows}
    ours, peer = key("hgad_fast", "o", _GREY, _GREY), key("official", "o", _GREY, "white")
    return [
        *(key(case, "s", colour, colour) for case, colour in colours.items()),
        *(ours, peer),
        *(key(name, marker, _GREY, "white") for name, marker in _SHAPES.items() if name in used and len(used) > 1),
    ]


def save(outcomes: Iterable[Outcome], path: str | os.PathLike[str], about: dict[str, Any], **more: Any) -> Path:
    """Write outcomes as JSON, and before them `about` (of `environment`) and anything more.

    `path` is a `.json` file, or a folder that gets `<device>-<date>.json`.
    """
    target = Path(path)
    if target.suffix != ".json":
        target /= f"{re.sub('[^a-z0-9]+', '-', about['device'].lower()).strip('-')}-{about['date'][:10]}.json"
    with replacing(target) as temporary:
        temporary.write_text(json.dumps(document(outcomes, about) | more, indent=1) + "\n")
    return target


def document(outcomes: Iterable[Outcome], about: dict[str, Any]) -> dict[str, Any]:
    """Return what `save` writes."""
    outcomes = list(outcomes)
    return about | {
        "rows": [asdict(outcome) for outcome in outcomes if isinstance(outcome, Row)],
        "failures": [asdict(outcome) for outcome in outcomes if isinstance(outcome, Failure)],
        "latencies": [asdict(outcome) for outcome in outcomes if isinstance(outcome, Latency)],
    }
