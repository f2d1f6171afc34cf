"""One HTML file that says how good a trained model is, to somebody who has never seen this library.

The file is complete in itself: it loads no fonts, no other files, nothing from the network. ``report.html`` is the
template of the page, `charts` draws, and this module decides what is shown and in which words. Needs Jinja2 and
matplotlib: `pip install hgad-fast[report]`.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import math
import os
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.datasets import GOOD, Dataset
from ..data.images import read_image, resize_image, resize_mask
from ..data.masks import read_mask
from ..environment import VERSION, versions
from ..features.extract import ShowProgress
from ..files import printable, replacing
from ..methods import load
from ..protocol import Detector
from ..scoring import plot
from ..scoring.calibration import Calibration
from ..scoring.score import score_images
from ..training.checkpoint import METRICS, MODEL
from . import charts
from .evaluate import Evaluation, ScoredImage, shown_path
from .remarks import remarks
from .report_figures import (
    curve_panels,
    figure_tables,
    finite_or_none,
    group_table,
    panel,
    percent,
    protocol_names,
    share,
    threshold_table,
    tiles,
)
from .run_folder import evaluated, test_data, training_record

REPORT = "report.html"
SHOWN = 6  # images shown of each kind of mistake
LISTED = 300  # mistakes named in the list
THUMBNAIL = 320  # long side of an image on the page, pixels
RATES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)  # target false-alarm rates of the table
BAND = 0.95  # share of the binomial distribution that the expected numbers of false alarms cover


def write_report(
    run: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device | None = None,
    progress: ShowProgress | None = None,
) -> Path:
    """Write the report of a training run.

    The evaluation behind it is kept in ``evaluation.json`` in the folder, and used again as long as model, test images,
    masks and version stay the same.

    Args:
        run: the folder that `fit` wrote (``model.safetensors``, ``metrics.jsonl``, ``run.json``). Where it holds
            ``best.safetensors`` too, that is the checkpoint of the official protocol.
        data: root of the dataset with the test images; None: the one that the model was trained on, if ``run.json``
            names it and it is still there. Without test images the report says that they are missing, and shows the
            rest.
        output: the file to write; None: ``report.html`` in the folder.
        device: where the test images are scored; None: on a CPU.
        progress: wraps the loops over the test images, e.g. in a progress bar with the given title.

    Returns:
        The path of the report.

    Raises:
        ModuleNotFoundError: Jinja2 or matplotlib is missing.
        ValueError: the folder holds no model, or `data` cannot be used.
    """
    _require_packages()
    folder = Path(run)
    if not (folder / MODEL).is_file():
        raise ValueError(
            f"{printable(folder)} holds no {MODEL}; give the folder that training wrote, and finish it with --resume"
        )
    output = Path(output or folder / REPORT)
    model = load(folder / MODEL, device)
    record = training_record(folder)
    dataset, reason = test_data(model, data, record.get("data"))
    evaluation = None if dataset is None else evaluated(model, dataset, folder, progress)
    page = _page(model, folder, record, dataset, evaluation, "" if dataset else _WITHOUT_TEST.format(reason))
    with replacing(output) as file:
        file.write_text(page, encoding="utf-8")
    return output


_WITHOUT_TEST = (
    "There are no test images: {}. Name some with hgad-fast report RUN --data ROOT. Without them this report cannot "
    "say how well the model detects; it shows how it was trained, calibrated and configured."
)


def _require_packages() -> None:
    """Raise a ModuleNotFoundError that says how to install what is missing."""
    for module, name in (("jinja2", "Jinja2"), ("matplotlib", "matplotlib")):
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"the report needs {name}: pip install 'hgad-fast[report]'", name=module)


# ------------------------------------------------------------------------------------------------ the page


def _page(
    model: Detector,
    folder: Path,
    record: dict[str, Any],
    dataset: Dataset | None,
    evaluation: Evaluation | None,
    missing: str,
) -> str:
    """Return the page; `missing` tells why there is no evaluation."""
    from jinja2 import Environment, StrictUndefined

    page: dict[str, Any] = {
        "title": f"Anomaly detection report: {folder.resolve().name}",
        "lead": _lead(model, evaluation),
        "remarks": remarks(model, evaluation, dataset),
        "missing": missing,
        "tiles": None,
        "figures": None,
        "curves": None,
        "groups": None,
        "scores": _scores(model, evaluation),
        "calibration": _calibration(model, evaluation),
        "mistakes": None,
        "training": _training(folder / METRICS, model),
        "setup": _setup(model, folder, record, dataset),
        "version": VERSION,
    }
    if dataset is not None and evaluation is not None:
        page["groups"] = group_table(model, evaluation)
        page["tiles"] = tiles(model, evaluation)
        page["figures"] = figure_tables(evaluation)
        page["curves"] = curve_panels(evaluation)
        page["mistakes"] = _mistakes(model, dataset, evaluation)
    template = resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=_text)
    return environment.from_string(template).render(page)


def _text(value: Any) -> Any:
    """Return a value as the page takes it: texts hold names of files and classes, of which not all can be shown."""
    return printable(value) if type(value) is str else value


def _lead(model: Detector, evaluation: Evaluation | None) -> str:
    """Return the first sentences of the page."""
    names = model.groups
    classes = f"{len(names)} classes ({', '.join(names)})" if len(names) > 1 else f"one class ({names[0]})"
    lead = f"One model that has seen normal images of {classes} and nothing else."
    if not model.groups_are_classes:
        lead = f"One model that has seen normal images and nothing else; it tells {len(names)} groups of them apart."
    if evaluation is None:
        return lead
    tested = f"{evaluation.n_normal:,} other normal images and {evaluation.n_anomalous:,} defective ones"
    return f"{lead} Here it is tested on {tested}."


# ------------------------------------------------------------------------------------------------ scores, calibration


def _ratio(image: ScoredImage) -> float:
    """Return an image's score in multiples of its threshold; NaN without one."""
    return image.score / image.threshold if image.threshold else math.nan


def _scores(model: Detector, evaluation: Evaluation | None) -> dict[str, Any] | None:
    """Return a histogram of the scores of each class: of its test images, else of those held out for calibration."""
    if evaluation is not None:
        images = evaluation.images[protocol_names(evaluation)[0]]
    elif model.calibration is not None:
        images = _calibration_images(model, model.calibration)
    else:
        return None
    judged = any(image.threshold is not None for image in images)
    class_names = model.groups if model.groups_are_classes else dict.fromkeys(image.class_name for image in images)
    panels = []
    for name in class_names:
        own = [image for image in images if image.class_name == name and (image.threshold is not None) == judged]
        if not own:
            continue
        values: dict[bool, list[float]] = {False: [], True: []}
        for image in own:
            values[image.is_anomalous].append(_ratio(image) if judged else image.score)
        normal, defective = values[False], values[True]
        words = f"{len(normal)} normal images, {len(defective)} defective ones."
        if judged:
            words = f"Above the threshold: {sum(ratio > 1 for ratio in normal)} of {len(normal)} normal images"
            if evaluation is not None:
                words += f", {sum(ratio > 1 for ratio in defective)} of {len(defective)} defective ones"
            words += "."
        x, mark = ("score / threshold", 1.0) if judged else ("score", None)
        svg = charts.histogram(normal, defective, x, f"Histogram of the scores of {printable(name)}. {words}", mark)
        panels.append(panel(svg, name, words))
    legend = [("normal", "", "normal images")]
    legend += [("defect", "", "defective images")] if evaluation else []
    legend += [("ink", "official", "threshold")] if judged else []
    subject = "the test images" if evaluation else "the normal images held out for calibration"
    return {"subject": subject, "judged": judged, "panels": panels, "legend": legend} if panels else None


def _calibration_images(model: Detector, calibration: Calibration) -> list[ScoredImage]:
    """Return the images that the thresholds come from, with their scores and thresholds, but without paths."""
    _, _, thresholds, _ = calibration.judge(calibration.scores, calibration.class_ids)
    names = [model.groups[k] for k in calibration.class_ids.tolist()]
    return [
        ScoredImage("", name, name, GOOD, False, score, threshold=finite_or_none(threshold))
        for name, score, threshold in zip(names, calibration.scores.tolist(), thresholds.tolist(), strict=True)
    ]


def _calibration(model: Detector, evaluation: Evaluation | None) -> dict[str, Any] | None:
    """Return what each threshold rests on, and target against actual false-alarm rate, with the recall it leaves."""
    calibration = model.calibration
    if calibration is None or not len(calibration.scores):
        return None
    section: dict[str, Any] = {
        "count": len(calibration.scores),
        "rate": percent(calibration.false_alarm_rate),
        "kind": "class" if model.groups_are_classes else "group",
        "borrowers": len(calibration.borrowers),
        "panels": [],
        "tables": [threshold_table(model, calibration, evaluation)],
    }
    if evaluation is not None:
        curve = [_at_rate(model, calibration, evaluation, thousandths / 1000) for thousandths in range(1, 200)]
        section["panels"] = _rate_panels(curve)
        section["tables"].insert(0, _rates_table([_at_rate(model, calibration, evaluation, rate) for rate in RATES]))
    return section


@dataclass(frozen=True)
class _AtRate:
    """Test images called defective by the thresholds for a target false-alarm rate; images without one do not count."""

    target: float
    attained: float  # the rate that the thresholds stand for, mean over the normal images
    false_alarms: int
    normal: int
    found: int
    defective: int

    @property
    def expected(self) -> tuple[int, int]:
        """Bounds of the number of false alarms in `BAND` of all cases, if they occur at the attained rate."""
        from scipy.stats import binom

        low, high = binom.interval(BAND, self.normal, self.attained)
        return int(low), int(high)


def _at_rate(model: Detector, calibration: Calibration, evaluation: Evaluation, rate: float) -> _AtRate:
    """Return what the thresholds for a target false-alarm rate do to the test images."""
    calibration = replace(calibration, false_alarm_rate=rate)
    counts: dict[bool, tuple[int, int]] = {}  # images flagged, of images with a threshold
    attained = math.nan
    for is_anomalous in (False, True):
        images = [image for image in evaluation.images["honest"] if image.is_anomalous == is_anomalous]
        scores = torch.tensor([image.score for image in images], dtype=torch.float64)
        groups = torch.tensor([model.groups.index(image.inferred_class) for image in images], dtype=torch.int64)
        _, flags, thresholds, rates = calibration.judge(scores, groups)
        known = thresholds.isfinite()
        counts[is_anomalous] = int(flags[known].sum()), int(known.sum())
        if not is_anomalous and known.any():
            attained = float(rates[known].mean())
    return _AtRate(rate, attained, *counts[False], *counts[True])


def _rates_table(rows: list[_AtRate]) -> dict[str, Any]:
    """Return the table of false alarms and defects found at several target false-alarm rates."""
    return {
        "caption": "What other target rates would do to these test images",
        "heads": ["Rate asked for", "Rate attained", "False alarms", "Expected (95 %)", "Defects found"],
        "rows": [
            [
                percent(row.target),
                percent(row.attained),
                share(row.false_alarms, row.normal),
                "{} to {}".format(*row.expected) if row.normal else "–",
                share(row.found, row.defective),
            ]
            for row in rows
        ],
    }


def _rate_panels(rows: list[_AtRate]) -> list[dict[str, Any]]:
    """Return charts of the false alarms and of the defects found against the target false-alarm rate."""
    targets = [row.target for row in rows]
    panels = []
    if normal := rows[0].normal:
        band = np.array([row.expected for row in rows]) / normal
        actual = [row.false_alarms / normal for row in rows]
        words = "Thresholds that keep their promise stay within the band."
        svg = charts.rates(targets, actual, "normal images called defective", f"False alarms. {words}", band=band.T)
        panels.append(panel(svg, "False alarms", words))
    if defective := rows[0].defective:
        recall = [row.found / defective for row in rows]
        words = "What fewer false alarms cost."
        svg = charts.rates(targets, recall, "defective images found", f"Defects found. {words}")
        panels.append(panel(svg, "Defects found", words))
    return panels


# ------------------------------------------------------------------------------------------------ mistakes


def _mistakes(model: Detector, dataset: Dataset, evaluation: Evaluation) -> dict[str, Any] | None:
    """Return the images that are most wrong, or closest to it, and the names of all that are wrong."""
    judged = [image for image in evaluation.images[protocol_names(evaluation)[0]] if image.is_flagged is not None]
    if not judged:
        return None
    parts = []
    for is_anomalous in (True, False):
        # The worst come first: defective images that score lowest, normal ones that score highest.
        group = [image for image in judged if image.is_anomalous == is_anomalous]
        group.sort(key=_ratio, reverse=not is_anomalous)
        if group:
            count = sum(image.is_flagged != is_anomalous for image in group)
            shown = [_shown(model, dataset, image) for image in group[:SHOWN]]
            parts.append({"is_anomalous": is_anomalous, "wrong": count, "total": len(group), "images": shown})
    wrong = [image for image in judged if image.is_flagged != image.is_anomalous]
    wrong.sort(key=lambda image: (image.is_anomalous, image.class_name, -_ratio(image)))
    rows = [
        (image.path, image.class_name, _truth(image), f"{_ratio(image):.2f}", f"{image.p_value:.3f}")
        for image in wrong[:LISTED]
    ]
    return {"parts": parts, "rows": rows, "total": len(wrong)}


def _shown(model: Detector, dataset: Dataset, scored: ScoredImage) -> dict[str, Any]:
    """Return an image and its anomaly map as small JPEGs, and what the page says about them."""
    sample = next(sample for sample in dataset.test if shown_path(sample, dataset) == scored.path)
    image = read_image(sample.path, model.config.white_level)
    scale = min(1.0, THUMBNAIL / max(image.shape[1:]))
    height, width = (max(1, round(side * scale)) for side in image.shape[1:])
    case = plot.Case(
        image=resize_image(image, (height, width)),
        anomaly_map=score_images(model, image, map_size=(height, width)).anomaly_map[0],
        threshold=scored.threshold or math.nan,
        mask=resize_mask(read_mask(sample.mask), (height, width)) if sample.mask else None,
        is_anomalous=scored.is_flagged,
        is_defective=scored.is_anomalous,
    )
    taken_for = "" if scored.inferred_class == scored.class_name else f"taken for {scored.inferred_class}"
    if not model.groups_are_classes:
        taken_for = f"of the group {scored.inferred_class}"
    verdict = "called defective" if scored.is_flagged else "called normal"
    if case.is_wrong:
        verdict = "missed" if scored.is_anomalous else "false alarm"
    images = [_data_uri(jpeg) for jpeg in plot.thumbnails(case)]
    return {
        "images": images,
        "width": width,
        "height": height,
        "kind": f"{scored.class_name}: {_truth(scored)}",
        "verdict": verdict,
        "is_wrong": case.is_wrong,
        "ratio": f"{_ratio(scored):.2f}",
        "p_value": f"{scored.p_value:.3f}",
        "taken_for": taken_for,
        "file": scored.path,
        "has_mask": case.mask is not None,
    }


def _data_uri(jpeg: bytes) -> Any:
    """Return a JPEG as the address of an image on the page."""
    from markupsafe import Markup

    return Markup("data:image/jpeg;base64," + base64.b64encode(jpeg).decode())


def _truth(image: ScoredImage) -> str:
    """Return the name of an image's defect, or "normal"."""
    return image.defect if image.is_anomalous else "normal"


# ------------------------------------------------------------------------------------------------ training, setup


def _training(path: Path, model: Detector) -> dict[str, Any]:
    """Return charts of loss terms, learning rate and speed over the passes, and where the stages begin."""
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError:
        records = []
    except ValueError as error:
        raise ValueError(f"{printable(path)} is damaged ({error}); delete it: the report can do without") from error
    if not records:
        return {"records": 0, "panels": []}
    levels = range(len(records[0]["losses"]))
    stages = [record["stage"] for record in records]
    # Passes are counted from 1: a stage begins between pass i, the last one of the stage before, and pass i + 1.
    changes = {i + 0.5: stages[i] for i in range(1, len(stages)) if stages[i] != stages[i - 1]}
    terms = dict.fromkeys(term for record in records for term in record["losses"][0])
    curves = [
        (
            term,
            *model.loss_terms.get(term, (term, "")),
            [[record["losses"][level].get(term, math.nan) for record in records] for level in levels],
        )
        for term in terms
    ]
    learning_rates = [record["lr"] for record in records]
    curves.append(("learning rate", "Learning rate", "Rises at first, then falls.", [learning_rates]))
    speeds = [record["images_per_second"] for record in records]
    curves.append(("images a second", "Speed", "How many images were trained in a second.", [speeds]))
    panels = [
        panel(charts.training(lines, y, f"{title}. {words}", list(changes)), title, words)
        for y, title, words, lines in curves
        if np.isfinite(lines).any()
    ]
    return {
        "records": len(records),
        "images": round(records[-1]["images_per_second"] * records[-1]["seconds"]),
        "minutes": sum(record["seconds"] for record in records) / 60,
        "stages": [(stage, model.stages.get(stage, "")) for stage in changes.values()],
        "panels": panels,
        "legend": [(charts.level_colour(level), charts.level_dash(level), f"level {level}") for level in levels],
    }


def _setup(
    model: Detector, folder: Path, record: dict[str, Any], dataset: Dataset | None
) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return tables of two columns, each with its caption: files, versions and configuration."""
    files = [
        ("model", f"{folder / MODEL} ({(folder / MODEL).stat().st_size / 1e6:.1f} MB)"),
        ("trained on", record.get("data") or "not recorded"),
        ("tested on", "nothing" if dataset is None else str(dataset.root)),
        ("report made", datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")),
    ]
    settings = [(name, _setting(value)) for name, value in asdict(model.config).items()]
    return [("Files", files), ("Versions", list(versions().items())), ("Configuration", settings)]


def _setting(value: Any) -> str:
    """Return the value of a configuration's field as text."""
    if value is None:
        return "–"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
