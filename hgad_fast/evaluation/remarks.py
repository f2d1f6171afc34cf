"""What somebody should look at in the figures of a model, before trusting them: a sentence each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from operator import itemgetter

from ..data.datasets import Dataset
from ..data.survey import of_same_content
from ..files import printable
from ..protocol import Detector
from ..scoring.calibration import rate_table
from ..scoring.rates import enumerated, percent
from ..training.fit import RECOGNISED
from .evaluate import Evaluation, Figures

CHANCE = 0.6  # AUROC up to which a detector hardly tells anything; below 1 - CHANCE it tells the opposite
BAND = 0.99  # share of the binomial distribution outside which a number of false alarms is no chance
LISTED = 3  # images or classes that a sentence names


def remarks(model: Detector, evaluation: Evaluation | None, dataset: Dataset | None) -> list[str]:
    """Return sentences on what a person would act on: none where all is as it should be.

    Args:
        model: the detector.
        evaluation: its figures on test images; None: there are none.
        dataset: the images that they are of, and those trained on.
    """
    found = [*_of_rates(model)]
    if evaluation is not None:
        found = [*_of_figures(evaluation), *_of_classes(evaluation), *found, *_of_false_alarms(model, evaluation)]
    if dataset is not None:
        found += _of_duplicates(dataset)
    return found


def _of_figures(evaluation: Evaluation) -> Iterator[str]:
    """Yield a sentence on the classes that are not told from normal ones, for images and for pixels."""
    protocol = "honest" if "honest" in evaluation.figures else next(iter(evaluation.figures))
    for figure, what, remedy in (
        ("image_auroc", "defective images", "look at images and labels: hgad-fast data DATA"),
        ("pixel_auroc", "defective pixels", "look at the masks: hgad-fast data DATA"),
    ):
        poor = {name: auroc for name, auroc in _known(evaluation.figures[protocol], figure) if auroc <= CHANCE}
        if poor:
            opposite = any(auroc < 1 - CHANCE for auroc in poor.values())
            chance = "below 50% the scores say the opposite" if opposite else "50% is chance"
            values = ", ".join(f"{printable(name)} {percent(auroc)}" for name, auroc in _first(poor))
            yield f"{what} are hardly told from normal ones, AUROC: {values} ({chance}): {remedy}"


def _known(by_class: dict[str, Figures], figure: str) -> list[tuple[str, float]]:
    """Return a figure of each class that has it."""
    values = {name: getattr(figures, figure) for name, figures in by_class.items()}
    return [(name, value) for name, value in values.items() if not math.isnan(value)]


def _first(values: dict[str, float]) -> list[tuple[str, float]]:
    """Return the lowest values."""
    return sorted(values.items(), key=lambda item: item[1])[:10]


def _of_classes(evaluation: Evaluation) -> Iterator[str]:
    """Yield a sentence on classes that are taken for others."""
    accuracy = evaluation.inferred_class_accuracy
    if accuracy < RECOGNISED:
        confused = [
            (count, f"{printable(name)} for {printable(taken)} ({count})")
            for name, row in evaluation.confusion.items()
            for taken, count in row.items()
            if taken != name
        ]
        most = ", ".join(text for _, text in sorted(confused, reverse=True)[:LISTED])
        yield (
            f"the class is recognised in {percent(accuracy)} of the images only, e.g. {most}: an image is judged by "
            "the threshold of the class it is taken for; give the class (score --class) where it is known"
        )


def _of_rates(model: Detector) -> Iterator[str]:
    """Yield sentences on thresholds that do not stand for the false-alarm rate asked for."""
    rows = [row for row in rate_table(model) if row["images"] or model.groups_are_classes]
    kind = "classes" if model.groups_are_classes else "groups"
    if model.calibration is None:
        yield "the model is not calibrated: no image is ever called anomalous; hgad-fast calibrate makes thresholds"
    if without := [row["group"] for row in rows if not row["reference"]]:
        yield f"no image of {enumerated(without)} is ever called anomalous, as no normal images were held out of them"
    # An attained rate is a multiple of 1 / (n + 1), below the target if there is one.
    known = [row for row in rows if row["reference"]]
    unlike = [row for row in known if not 0.5 <= row["attained"] / row["target"] <= 1.5]
    if unlike:
        rates = [row["attained"] for row in unlike]
        span = percent(min(rates)) if min(rates) == max(rates) else f"{percent(min(rates))} to {percent(max(rates))}"
        names, fewest = enumerated([row["group"] for row in unlike]), min(row["reference"] for row in unlike)
        yield (
            f"the thresholds of {len(unlike)} {kind} ({names}) attain a false-alarm rate of {span} instead of "
            f"{percent(unlike[0]['target'])}, as they rest on {fewest} normal images: hold out more (hgad-fast "
            "calibrate)"
        )


def _of_false_alarms(model: Detector, evaluation: Evaluation) -> Iterator[str]:
    """Yield a sentence where normal test images raise more or fewer alarms than the thresholds promise."""
    from scipy.stats import binom

    judged = [image for image in evaluation.images.get("honest", ()) if image.is_flagged is not None]
    normal = [image for image in judged if not image.is_anomalous]
    attained = {row["group"]: row["attained"] for row in rate_table(model)}
    if not normal:
        return
    promised = sum(attained[image.inferred_class] for image in normal) / len(normal)
    alarms = sum(bool(image.is_flagged) for image in normal)
    low, high = binom.interval(BAND, len(normal), promised)
    if alarms > high:
        yield (
            f"{alarms} of {len(normal)} normal test images raise an alarm ({percent(alarms / len(normal))}), where the "
            f"thresholds stand for {percent(promised)}: they differ from the images that were calibrated on, in light, "
            "camera or product; calibrate on such images (hgad-fast calibrate)"
        )
    elif alarms < low:
        yield (
            f"only {alarms} of {len(normal)} normal test images raise an alarm, where the thresholds stand for "
            f"{percent(promised)}: they are more alike than the images that were calibrated on"
        )


def _of_duplicates(dataset: Dataset) -> Iterator[str]:
    """Yield a sentence on test images that were trained on."""
    places = [(sample.path, False) for sample in dataset.train] + [(sample.path, True) for sample in dataset.test]
    pairs = []
    for group in of_same_content(places, itemgetter(0)):
        if trained := [path for path, is_test in group if not is_test]:
            pairs += [(trained[0], path) for path, is_test in group if is_test]
    if pairs:
        examples = "; ".join(f"{printable(original)} and {printable(copy)}" for original, copy in pairs[:LISTED])
        yield (
            f"test images that are the same files as training images, so that the figures flatter: {len(pairs)}, e.g. "
            f"{examples}; all of them: hgad-fast data DATA"
        )
