"""Past runs of `hgad-fast score`, seen by a `Monitor`: whether, when and how their images changed."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.datasets import csv_rows
from ..files import printable, replacing
from ..scoring.monitor import Monitor, MonitorState, references_of
from ..scoring.rates import percent

RUNNING = 50  # images of the running share in the image
LOW = 0.1  # p-value, whose share is shown
SHOWN_CLASSES = 20


@dataclass(frozen=True)
class ClassCourse:
    """The images of a class: their number, the mean of their p-values, and the share of these up to `LOW`."""

    images: int
    mean_p: float
    low_p: float


@dataclass(frozen=True)
class Course:
    """What a monitor made of past images, n of them.

    Attributes:
        files: of each image.
        classes: by name.
        p_values: (n,) float64.
        evidence: (n,) float64, `Monitor.evidence` after each image.
        state: that of the monitor at the end.
        alpha: the probability of a false alarm that it was made with.
        skipped: how many rows had no p-value: images that could not be scored, or have no threshold.
    """

    files: list[str]
    classes: dict[str, ClassCourse]
    p_values: NDArray[np.float64]
    evidence: NDArray[np.float64]
    state: MonitorState
    alpha: float
    skipped: int

    def to_dict(self) -> dict[str, Any]:
        """Return the state, the files that it speaks of, and figures by class, in types that JSON has."""
        state = asdict(self.state)
        state["since_file"] = None if self.state.since is None else self.files[self.state.since]
        state["found_at_file"] = None if self.state.found_at is None else self.files[self.state.found_at]
        classes = {name: asdict(figures) for name, figures in self.classes.items()}
        return {**state, "alpha": self.alpha, "skipped": self.skipped, "classes": classes}

    def table(self) -> str:
        """Return the verdict and the figures by class as text."""
        state = self.state
        lines = []
        if state.changed:
            assert state.since is not None and state.found_at is not None
            subject = "all classes" if state.group is None else f"class {state.group}"
            of_which = f" of {subject}" if len(self.classes) > 1 else ""
            lines.append(
                f"CHANGED: scores{of_which} are {state.direction} since about image {state.since + 1} "
                f"({self.files[state.since]}), found at image {state.found_at + 1} ({self.files[state.found_at]})"
            )
        else:
            lines.append("no change found")
        lines.append(
            f"{state.images} images, p {state.p_value:.2g}; a false alarm, ever, has a probability of at most "
            f"{percent(self.alpha)}"
        )
        if self.skipped:
            lines.append(f"left out: {self.skipped} rows without a p-value (failed, or of a class without a threshold)")
        lines.append(f"  {'class':<20} {'images':>7} {'mean p':>7} {f'p <= {LOW}':>9}")
        for name, figures in list(self.classes.items())[:SHOWN_CLASSES]:
            lines.append(f"  {name:<20} {figures.images:>7} {figures.mean_p:>7.2f} {percent(figures.low_p):>9}")
        if len(self.classes) > SHOWN_CLASSES:
            lines.append(f"  and {len(self.classes) - SHOWN_CLASSES} more classes")
        lines.append(f"of images like the calibration images, about half have p <= 0.5, and {percent(LOW)} p <= {LOW}")
        return "\n".join(lines)


def course(tables: Sequence[str | os.PathLike[str]], alpha: float = 0.01, defect_rate: float = 0.0) -> Course:
    """Return what a monitor makes of the images in tables such as `hgad-fast score` writes, in their order.

    Args:
        tables: CSV files with the columns class and p_value, as scores.csv, the oldest first. An image is called what
            stands in the column file or frame, or by its line.
        alpha, defect_rate: as for `Monitor`.

    Raises:
        ValueError: a file is no such table, a p-value is no number above 0 and at most 1, or there is none at all; or
            the monitor cannot be.
        OSError: a file cannot be read.
    """
    Monitor(alpha, defect_rate=defect_rate)  # what is wrong with these is told first
    files, classes, p_values, skipped = [], [], [], 0
    for table in tables:
        for place, row in csv_rows(Path(table), ("class", "p_value")):
            if not row["p_value"]:
                skipped += 1
                continue
            try:
                p_value = float(row["p_value"])
            except ValueError:
                p_value = math.nan
            if not 0 < p_value <= 1:
                raise ValueError(f"{place}: p_value is {row['p_value']!r}; it must be above 0 and at most 1")
            files.append(printable(row.get("file") or row.get("frame") or place))
            classes.append(printable(row["class"]))
            p_values.append(p_value)
    if not files:
        raise ValueError(
            f"there is no p-value in {', '.join(printable(str(table)) for table in tables)}: the model has no "
            "thresholds, or no image was scored; hgad-fast calibrate makes thresholds"
        )
    of_classes: dict[str, list[float]] = defaultdict(list)
    for name, p_value in zip(classes, p_values, strict=True):
        of_classes[name].append(p_value)
    references = {name: n for name, values in of_classes.items() if (n := references_of(values))}
    monitor = Monitor(alpha, references=references, defect_rate=defect_rate)
    evidence = []
    for p_value, name in zip(p_values, classes, strict=True):
        monitor.update(p_value, name)
        evidence.append(monitor.evidence)
    by_class = {
        name: ClassCourse(len(values), float(np.mean(values)), float(np.mean(np.array(values) <= LOW)))
        for name, values in sorted(of_classes.items())
    }
    return Course(files, by_class, np.array(p_values), np.array(evidence), monitor.state, alpha, skipped)


def plot(past: Course, path: str | os.PathLike[str]) -> Path:
    """Write an image of the p-values, the evidence for a change, and when it was found.

    Args:
        past: the course.
        path: its ending says the format (.png, .svg, .pdf, ...); without one it is PNG.

    Raises:
        ValueError: matplotlib does not know the format.
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    count = len(past.p_values)
    numbers = np.arange(1, count + 1)
    figure = Figure(figsize=(9, 5), dpi=120, facecolor="white", layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.plot(
        numbers, past.p_values, ".", color="#8a94a6", markersize=max(2.0, min(6.0, 900 / count)), label="p-value"
    )
    window = min(RUNNING, max(count // 4, 1))
    running = np.convolve(past.p_values, np.full(window, 1 / window), "valid")
    upper.plot(numbers[window - 1 :], running, color="#1f5fbf", linewidth=1.8, label=f"mean of {window} images")
    upper.axhline(0.5, color="#444444", linewidth=0.8, linestyle=":")
    upper.set_ylim(0, 1.02)
    upper.set_ylabel("p-value")
    lower.plot(numbers, np.log10(past.evidence), color="#1f5fbf", linewidth=1.8, label="evidence")
    lower.axhline(-np.log10(past.alpha), color="#b3261e", linewidth=1.2, linestyle="--", label=f"1 / {past.alpha:g}")
    lower.set_ylabel("evidence for a change, log10")
    lower.set_xlabel("image, in the order of the table")
    if past.state.since is not None and past.state.found_at is not None:
        for panel in (upper, lower):
            panel.axvspan(past.state.since + 1, past.state.found_at + 1, color="#b3261e", alpha=0.12, linewidth=0)
            panel.axvline(past.state.found_at + 1, color="#b3261e", linewidth=1.2)
        title = f"changed since about image {past.state.since + 1}, found at image {past.state.found_at + 1}"
    else:
        title = f"no change found in {count} images"
    upper.set_title(title, loc="left", fontsize=11)
    for panel in (upper, lower):
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:] or "png")
    return Path(path)
