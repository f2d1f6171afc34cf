"""The rates that thresholds attain, in words: for `hgad-fast info`, and as warnings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..files import printable

MIN_POOLED = 3  # images a group needs for its scores to be pooled: the others standardise each, a spread takes two
MAX_LISTED = 20  # groups that are described, or named, one by one
NO_THRESHOLDS = (
    "there are no thresholds, as no normal image was held out to calibrate on: {} is ever called anomalous, whatever "
    "its score; calibrate on normal images that were not trained on (model.calibrate, hgad-fast calibrate), or train "
    "with a calibration_fraction above 0 and 2 images or more of each class"
)


def described(rows: Sequence[Mapping[str, Any]], images: int, target: float) -> dict[str, str]:
    """Return rows of `Calibration.rates` by titles, for people: a line for each group, or one for many together."""
    facts = {"calibration": f"{images} images, false-alarm rate {percent(target)} asked for"}
    known = [row for row in rows if row["reference"]]
    if len(rows) <= MAX_LISTED:
        facts |= {f"threshold, {row['group']}": _rate_text(row) for row in rows}
    elif known:
        counts, attained = ([row[name] for row in known] for name in ("reference", "attained"))
        facts["thresholds"] = (
            f"{len(known)} of {len(rows)} groups, from {min(counts)} to {max(counts)} images each; they attain "
            f"{percent(min(attained))} to {percent(max(attained))}"
        )
    return facts


def shortcomings(rows: Sequence[Mapping[str, Any]], target: float, borrowing: bool) -> str:
    """Return what users should know of the thresholds in rows of `Calibration.rates`, and the remedy, or nothing.

    That is: groups that can raise no alarm, and rates above the target. Classes are named. Of groups that a method
    forms by itself, which may be many, those are counted that have images and yet borrow.
    """
    if not any(row["reference"] for row in rows):
        names = [row["group"] for row in rows]
        return NO_THRESHOLDS.format("no image" if borrowing else f"no image of {listed(names)}")
    above = [row for row in rows if row["attained"] > target and (row["images"] or not borrowing)]
    if borrowing:
        texts = []
        used = [row for row in rows if row["images"]]
        if borrowers := [row for row in used if row["images"] < MIN_POOLED]:
            texts.append(
                f"{len(borrowers)} of {len(used)} groups have fewer than {MIN_POOLED} of them and borrow constants "
                "and scores from the others"
            )
        if above:
            groups = (
                "the threshold of 1 group stands" if len(above) == 1 else f"thresholds of {len(above)} groups stand"
            )
            highest = percent(max(row["attained"] for row in above))
            texts.append(
                f"{groups} for a false-alarm rate of up to {highest} instead of "
                f"{percent(target)}, which takes {_images_for(target)} of them, of one group or, with {MIN_POOLED} "
                "or more each, of all"
            )
        return f"too few calibration images: {'; '.join(texts)}" if texts else ""
    exceptions = [f"{row['group']} {percent(row['attained'])}" for row in above]
    exceptions += [f"{row['group']} has no threshold" for row in rows if not row["reference"]]
    if not exceptions:
        return ""
    remedies = []
    if above:
        remedies.append(
            f"{percent(target)} takes {_images_for(target)} held-out normal images of the class, or of all classes "
            f"together with {MIN_POOLED} or more of each"
        )
    if any(not row["reference"] for row in rows):
        remedies.append(
            "without a threshold no image of a class is ever called anomalous: give it more training images, or "
            "calibrate it on others (model.calibrate, hgad-fast calibrate)"
        )
    return (
        f"too few calibration images for a false-alarm rate of {percent(target)}; thresholds stand for: "
        f"{', '.join(exceptions)}. {'; '.join(remedies)}"
    )


def percent(rate: float) -> str:
    """Return a rate as people read it: 12.5%, 1.0%, 0.02%."""
    return f"{rate:.1%}" if rate >= 0.001 or math.isnan(rate) else f"{100 * rate:.2g}%"


def _rate_text(row: Mapping[str, Any]) -> str:
    """Return a row of `Calibration.rates` in words."""
    if not row["reference"]:
        return "none, as there are no calibration images: no image is ever called anomalous"
    others = f" ({row['images']} its own)" if row["pooled"] else ""
    rates = f"it attains {percent(row['attained'])}, {percent(row['target'])} asked for"
    return f"{row['threshold']:.4g}, from {row['reference']} images{others}; {rates}"


def _images_for(rate: float) -> int:
    """Return how many images a threshold of this false-alarm rate takes."""
    return math.ceil(min(1 / rate, 1e12) - 1e-9) - 1


def listed(names: Sequence[str]) -> str:
    """Return names in quotes, the first of many."""
    return enumerated([repr(name) for name in names])


def enumerated(names: Sequence[str]) -> str:
    """Return names with commas; of many the first, and how many more there are."""
    rest = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(map(printable, names[:MAX_LISTED])) + rest
