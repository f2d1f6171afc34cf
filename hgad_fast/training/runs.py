"""The folder of a training run: whose it is, and what its thresholds do, for people."""

from __future__ import annotations

from pathlib import Path

from ..files import printable
from ..protocol import Detector
from ..scoring.calibration import rate_table, required_calibration
from ..scoring.rates import percent
from .checkpoint import BEST, CHECKPOINT, METRICS, MODEL, RUN

WRITTEN = (MODEL, BEST, CHECKPOINT, METRICS, RUN)
ABOUT_IT = ("evaluation.json", "report.html")  # what `hgad-fast report` adds
MAX_LISTED = 40  # groups that have a line each


def written(folder: Path) -> list[str]:
    """Return the names of the files in a folder that a training run writes."""
    return [name for name in WRITTEN if (folder / name).exists()]


def check(folder: Path, resume: bool, overwrite: bool) -> None:
    """Raise a ValueError where a folder holds a training run, and it is not said what to do with that."""
    if resume and overwrite:
        raise ValueError("--resume goes on with the run in OUTPUT and --overwrite removes it: give one of them")
    found = written(folder)
    if found and not resume and not overwrite:
        raise ValueError(
            f"{printable(folder)} holds a training run ({found[0]}): --resume goes on with it, --overwrite replaces "
            "it; or give another --output"
        )


def remove(folder: Path) -> None:
    """Remove what a training run wrote into a folder, and its report; features stay, and a card, which people edit."""
    for name in (*WRITTEN, *ABOUT_IT):
        (folder / name).unlink(missing_ok=True)


def summary(model: Detector) -> list[str]:
    """Return what the thresholds of a model do to the held-out normal images that they rest on: a line in all, a table.

    Groups without images have no line in the table, unless groups are classes.
    """
    rows = rate_table(model)
    if not rows or not any(row["images"] for row in rows):
        return ["no normal images were held out: there are no thresholds; hgad-fast calibrate makes some"]
    calibration = required_calibration(model)
    _, flags, _, _ = calibration.judge(calibration.scores, calibration.class_ids)
    alarms = [int(flags[calibration.class_ids == k].sum()) for k in range(len(rows))]
    images, target = len(calibration.scores), percent(calibration.false_alarm_rate)
    lines = [f"held-out normal images: {images}, of which {sum(alarms)} raise an alarm (target {target})"]
    shown = [(row, count) for row, count in zip(rows, alarms, strict=True) if row["images"] or model.groups_are_classes]
    shown.sort(key=lambda pair: -pair[0]["images"] if not model.groups_are_classes else 0)
    title = "class" if model.groups_are_classes else "group"
    lines.append(f"  {title:<20} {'images':>6} {'alarms':>6} {'target':>7} {'attained':>8} {'threshold':>10}  rests on")
    for row, count in shown[:MAX_LISTED]:
        cells = f"{row['images']:>6} {count:>6} {percent(row['target']):>7}"
        if row["reference"]:
            cells += f" {percent(row['attained']):>8} {row['threshold']:>10.4g}"
            cells += f"  {row['reference']} images{', of other classes too' if row['pooled'] else ''}"
        else:
            cells += f" {'-':>8} {'-':>10}  nothing: no image is ever called anomalous"
        lines.append(f"  {printable(row['group']):<20} {cells}")
    if len(shown) > MAX_LISTED:
        lines.append(f"  and {len(shown) - MAX_LISTED} smaller groups")
    return lines
