"""One HTML file that says how good a trained model is, to somebody who has never seen this library.

Everything is inside the file: no network, no fonts, no other file. ``report.html`` is the page, `charts` draws, this
module decides what is shown and in which words. Needs Jinja2 and matplotlib: `pip install hgad-fast[report]`.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import math
import os
import platform
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import __version__, charts
from . import data as pictures
from .evaluate import Evaluation, Picture, evaluate, test_set
from .files import replacing
from .train import BEST, METRICS, MODEL, RUN

if TYPE_CHECKING:
    from .calibrate import Calibration
    from .features import Progress
    from .model import HGADModel

EVALUATION = "evaluation.json"
REPORT = "report.html"
SHOWN = 6  # pictures of each kind of mistake
LISTED = 300  # mistakes named in the list
THUMBNAIL = 320  # long side of a picture in the page, pixels
RATES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)  # wished false-alarm rates of the table
BAND = 0.95  # of the binomial distribution


def write_report(
    run: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the report of a training run.

    The evaluation behind it is kept in ``evaluation.json`` in the folder, and used again while model, test pictures,
    masks and version stay the same.

    Args:
        run: the folder that `fit` wrote (``model.safetensors``, ``metrics.jsonl``, ``run.json``). Where it holds
            ``best.safetensors`` too, that is the checkpoint of the official protocol.
        data: root of the dataset with the test pictures; None: the one that the model was trained on, where
            ``run.json`` names it and it is still there. Without test pictures the report says that they are missing,
            and shows the rest.
        output: the file to write; None: ``report.html`` in the folder.
        device: where the test pictures are scored; None: on a CPU.
        progress: wraps the loops over the test pictures, e.g. in a progress bar with the given title.

    Returns:
        The path of the report.

    Raises:
        ModuleNotFoundError: Jinja2 or matplotlib is missing.
        ValueError: the folder holds no model, or `data` cannot be used.
    """
    from .model import HGADModel

    _require_packages()
    folder = Path(run)
    if not (folder / MODEL).is_file():
        raise ValueError(f"{folder} holds no {MODEL}; give the folder that training wrote, and finish it with --resume")
    output = Path(output or folder / REPORT)
    model = HGADModel.load(folder / MODEL, device)
    record = _read_json(folder / RUN)
    dataset, missing = _test_data(model, data, record.get("data"))
    evaluation = None if dataset is None else _evaluated(model, dataset, folder, progress)
    page = _page(model, folder, record, dataset, evaluation, missing)
    with replacing(output) as file:
        file.write_text(page, encoding="utf-8")
    return output


def _require_packages() -> None:
    for module, name in (("jinja2", "Jinja2"), ("matplotlib", "matplotlib")):
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"the report needs {name}: pip install 'hgad-fast[report]'", name=module)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is no file."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it: the report can do without") from error


def _test_data(
    model: HGADModel, given: str | os.PathLike[str] | None, recorded: str | None
) -> tuple[pictures.Dataset | None, str]:
    """The dataset to test on, or None and what the reader should be told.

    A dataset that was asked for must do. One that is only recorded may be gone or have changed since; and of several
    datasets in one, the folder that they share is recorded, which need not be a dataset.
    """
    root = given or recorded
    if root is None:
        return None, _WITHOUT_TEST.format("none were named")
    try:
        dataset = pictures.discover(root)
        if dataset.test:
            return test_set(model, dataset), ""
    except ValueError as error:
        if given is not None:
            raise
        return None, _WITHOUT_TEST.format(
            f"those of {recorded}, which the model was trained on, do not serve ({error})"
        )
    return None, _WITHOUT_TEST.format(f"{root} has none")


_WITHOUT_TEST = (
    "There are no test pictures: {}. hgad-fast report RUN --data ROOT names some. So this report cannot say how well "
    "the model detects; it shows how it was trained, calibrated and configured."
)


def _evaluated(
    model: HGADModel,
    dataset: pictures.Dataset,
    folder: Path,
    progress: Progress | None,
) -> Evaluation:
    """The evaluation kept in the folder if it is of this model, these pictures and this version; else a new one."""
    masks = [replace(sample, path=sample.mask) for sample in dataset.test if sample.mask is not None]
    models = [path for path in (folder / MODEL, folder / BEST) if path.is_file()]
    identity = {
        "version": __version__,
        "models": [hashlib.sha256(path.read_bytes()).hexdigest() for path in models],
        "data": pictures.fingerprint([*dataset.test, *masks], dataset.root),
    }
    kept = _read_json(folder / EVALUATION)
    if kept.get("identity") == identity:
        return Evaluation.from_dict(kept["evaluation"])
    official = type(model).load(folder / BEST, model.device) if (folder / BEST).is_file() else None
    evaluation = evaluate(model, dataset, official=official, progress=progress)
    with replacing(folder / EVALUATION) as file:
        file.write_text(json.dumps({"identity": identity, "evaluation": evaluation.to_dict()}) + "\n", encoding="utf-8")
    return evaluation


# ------------------------------------------------------------------------------------------------ the page


def _page(
    model: HGADModel,
    folder: Path,
    record: dict[str, Any],
    dataset: pictures.Dataset | None,
    evaluation: Evaluation | None,
    missing: str,
) -> str:
    from jinja2 import Environment, StrictUndefined

    page: dict[str, Any] = {
        "title": f"Anomaly detection report: {folder.resolve().name}",
        "lead": _lead(model, evaluation),
        "missing": missing,
        "tiles": None,
        "figures": None,
        "curves": None,
        "scores": _scores(model, evaluation),
        "calibration": _calibration(model, evaluation),
        "mistakes": None,
        "training": _training(folder / METRICS),
        "setup": _setup(model, folder, record, dataset),
        "version": __version__,
    }
    if dataset is not None and evaluation is not None:
        page["tiles"] = _tiles(model, evaluation)
        page["figures"] = _figures(evaluation)
        page["curves"] = _curves(evaluation)
        page["mistakes"] = _mistakes(model, dataset, evaluation)
    template = resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    return Environment(autoescape=True, undefined=StrictUndefined).from_string(template).render(page)


def _lead(model: HGADModel, evaluation: Evaluation | None) -> str:
    names = model.class_names
    classes = f"{len(names)} classes ({', '.join(names)})" if len(names) > 1 else f"one class ({names[0]})"
    lead = f"One model that has seen normal pictures of {classes} and nothing else."
    if evaluation is None:
        return lead
    tested = f"{evaluation.n_normal:,} other normal pictures and {evaluation.n_anomalous:,} defective ones"
    return f"{lead} Here it is tested on {tested}."


def _protocols(evaluation: Evaluation) -> list[str]:
    """The honest protocol first; a model without calibration has only the official one."""
    return sorted(evaluation.figures)


def _tiles(model: HGADModel, evaluation: Evaluation) -> list[dict[str, Any]]:
    """The figures that a reader wants first."""
    main, *others = _protocols(evaluation)
    tiles = []
    for figure, name in (
        ("image_auroc", "Image AUROC"),
        ("pixel_auroc", "Pixel AUROC"),
        ("pixel_aupro_30", "AUPRO 30 %"),
    ):
        words = [f"{main}{', mean of the classes' if len(evaluation.figures[main]) > 1 else ''}"]
        words += [f"{protocol}: {_percent(getattr(evaluation.mean(protocol), figure))}" for protocol in others]
        tiles.append({"name": name, "value": _percent(getattr(evaluation.mean(main), figure)), "words": words})
    judged = [p for p in evaluation.pictures[main] if p.is_flagged is not None]
    for is_anomalous, name in ((True, "Defects found"), (False, "False alarms")):
        flags = [p.is_flagged for p in judged if p.is_anomalous == is_anomalous]
        if flags and model.calibration is not None:
            words = ["at the model's thresholds" if is_anomalous else "among the normal pictures"]
            words += [] if is_anomalous else [f"asked for: {_percent(model.calibration.false_alarm_rate)}"]
            tiles.append({"name": name, "value": f"{sum(map(bool, flags))} of {len(flags)}", "words": words})
    if len(model.class_names) > 1:
        words = ["of the pictures were taken for what they show"]
        tiles.append(
            {"name": "Class recognised", "value": _percent(evaluation.inferred_class_accuracy), "words": words}
        )
    return tiles


def _figures(evaluation: Evaluation) -> dict[str, Any]:
    """Both protocols side by side, a table for pictures and one for pixels."""
    protocols = _protocols(evaluation)
    tables = []
    for kind, caption in _TABLES.items():
        rows = [(name, [evaluation.figures[p][name] for p in protocols]) for name in evaluation.figures[protocols[0]]]
        summary = [("mean", [evaluation.mean(p) for p in protocols])]
        summary += [("pooled", [evaluation.pooled[p] for p in protocols])]
        figures = [name for name in _NAMES if name.startswith(kind)]
        tables.append(
            {
                "caption": caption,
                "metrics": [_NAMES[figure] for figure in figures],
                "protocols": protocols,
                "groups": [
                    [
                        (name, [(_known(getattr(row, f)), row.intervals.get(f)) for f in figures for row in columns])
                        for name, columns in group
                    ]
                    for group in (rows, summary)
                ],
            }
        )
    wrong = [
        (name, other, count, sum(row.values()))
        for name, row in evaluation.confusion.items()
        for other, count in sorted(row.items())
        if other != name
    ]
    return {
        "tables": tables,
        "protocols": [
            (name, words.format(evaluation.checkpoints[name]))
            for name, words in _PROTOCOLS.items()
            if name in protocols
        ],
        "confusion": wrong,
    }


_PROTOCOLS = {
    "honest": "As in use: nobody tells the model which class a picture shows, and normalisation and thresholds come "
    "from normal pictures that were held out of the training. A score depends on its picture alone. Checkpoint: {}.",
    "official": "As published: the model is told the class of each picture, and the maps of a class are normalised by "
    "maxima over its test pictures. Comparable with published tables, but out of reach in use. Checkpoint: {}.",
}
_TABLES = {
    "image": "Pictures: is a defective one told from a normal one? In percent.",
    "pixel": "Pixels: is the defect found within the picture? In percent.",
}
_NAMES = {
    "image_auroc": "AUROC",
    "image_average_precision": "AP",
    "image_f1_max": "F1max",
    "pixel_auroc": "AUROC",
    "pixel_average_precision": "AP",
    "pixel_f1_max": "F1max",
    "pixel_aupro_30": "AUPRO 30 %",
    "pixel_aupro_5": "AUPRO 5 %",
}


def _panel(svg: str, title: str, words: str) -> dict[str, Any]:
    from markupsafe import Markup

    return {"svg": Markup(svg), "title": title, "words": words}


def _curves(evaluation: Evaluation) -> dict[str, Any] | None:
    """ROC and precision-recall of pictures and of pixels, and PRO: all classes together, and each for itself."""
    main, *others = _protocols(evaluation)
    classes = evaluation.figures[main] if len(evaluation.figures[main]) > 1 else {}
    panels = []
    for name, title, words, x, y in _CURVES:
        rows = [("muted", row) for row in classes.values()]
        rows += [(protocol, evaluation.pooled[protocol]) for protocol in (*others, main)]  # the last lies on top
        if lines := [(row.curves[name], colour) for colour, row in rows if name in row.curves]:
            end = 0.3 if name == "pixel_pro" else 1.0
            panels.append(_panel(charts.curves(lines, x, y, f"{title}. {words}", end=end), title, words))
    legend = [(protocol, protocol, f"{protocol} protocol, all classes together") for protocol in (main, *others)]
    legend += [("muted", "thin", f"a single class, {main} protocol")] if classes else []
    return {"panels": panels, "legend": legend} if panels else None


_CURVES = (
    (
        "image_roc",
        "Pictures: ROC",
        "How many defective pictures are found for how many false alarms.",
        "false-alarm rate",
        "defective pictures found",
    ),
    (
        "image_pr",
        "Pictures: precision and recall",
        "How many alarms are true while more and more defective pictures are found.",
        "defective pictures found",
        "alarms that are true",
    ),
    (
        "pixel_roc",
        "Pixels: ROC",
        "How much of the defective area is found for how much of the normal area.",
        "normal area marked",
        "defective area found",
    ),
    (
        "pixel_pr",
        "Pixels: precision and recall",
        "How much of the marked area is defective while more and more of it is found.",
        "defective area found",
        "marked area that is defective",
    ),
    (
        "pixel_pro",
        "Regions: PRO",
        "How much of a defect is covered, averaged over the defects, small and large alike.",
        "normal area marked",
        "mean cover of a defect",
    ),
)


# ------------------------------------------------------------------------------------------------ scores, calibration


def _ratio(picture: Picture) -> float:
    """A picture's score in multiples of its threshold; NaN without one."""
    return picture.score / picture.threshold if picture.threshold else math.nan


def _scores(model: HGADModel, evaluation: Evaluation | None) -> dict[str, Any] | None:
    """Histograms of each class: of the test pictures, else of those held out for calibration."""
    if evaluation is not None:
        found = evaluation.pictures[_protocols(evaluation)[0]]
    elif model.calibration is not None:
        found = _calibration_pictures(model, model.calibration)
    else:
        return None
    judged = any(picture.threshold is not None for picture in found)
    panels = []
    for name in model.class_names:
        own = [picture for picture in found if picture.class_name == name and (picture.threshold is not None) == judged]
        if own:
            values = [_ratio(picture) if judged else picture.score for picture in own]
            normal, defective = (
                [v for v, p in zip(values, own, strict=True) if p.is_anomalous == d] for d in (False, True)
            )
            words = f"{len(normal)} normal pictures, {len(defective)} defective ones."
            if judged:
                words = f"Above the threshold: {sum(v > 1 for v in normal)} of {len(normal)} normal pictures"
                words += f", {sum(v > 1 for v in defective)} of {len(defective)} defective ones." if evaluation else "."
            x = "score / threshold" if judged else "score"
            svg = charts.histogram(
                normal, defective, x, f"Histogram of the scores of {name}. {words}", 1.0 if judged else None
            )
            panels.append(_panel(svg, name, words))
    legend = [("normal", "", "normal pictures")]
    legend += [("defect", "", "defective pictures")] if evaluation else []
    legend += [("ink", "official", "threshold")] if judged else []
    what = "the test pictures" if evaluation else "the normal pictures held out for calibration"
    return {"what": what, "judged": judged, "panels": panels, "legend": legend} if panels else None


def _calibration_pictures(model: HGADModel, calibration: Calibration) -> list[Picture]:
    _, _, thresholds, _ = calibration.judge(calibration.scores, calibration.class_ids)
    names = [model.class_names[k] for k in calibration.class_ids.tolist()]
    return [
        Picture("", name, name, pictures.GOOD, False, score, threshold=_known(threshold))
        for name, score, threshold in zip(names, calibration.scores.tolist(), thresholds.tolist(), strict=True)
    ]


def _calibration(model: HGADModel, evaluation: Evaluation | None) -> dict[str, Any] | None:
    """Nominal against actual false-alarm rate, and the recall it leaves; what each class's threshold rests on."""
    calibration = model.calibration
    if calibration is None or not len(calibration.scores):
        return None
    section: dict[str, Any] = {
        "count": len(calibration.scores),
        "rate": _percent(calibration.false_alarm_rate),
        "panels": [],
        "tables": [_threshold_table(model, calibration, evaluation)],
    }
    if evaluation is not None:
        curve = [_at_rate(model, calibration, evaluation, thousandths / 1000) for thousandths in range(1, 200)]
        section["panels"] = _rate_panels(curve)
        section["tables"].insert(0, _rates_table([_at_rate(model, calibration, evaluation, rate) for rate in RATES]))
    return section


@dataclass(frozen=True)
class _AtRate:
    """What the thresholds do to the test pictures where `wished` is the false-alarm rate asked for."""

    wished: float
    attainable: float  # what the thresholds stand for, mean over the normal pictures
    false_alarms: int
    normal: int
    found: int
    defective: int

    @property
    def expected(self) -> tuple[int, int]:
        """False alarms in `BAND` of all cases, if the thresholds keep what they stand for."""
        from scipy.stats import binom

        low, high = binom.interval(BAND, self.normal, self.attainable)
        return int(low), int(high)


def _at_rate(model: HGADModel, calibration: Calibration, evaluation: Evaluation, rate: float) -> _AtRate:
    calibration = replace(calibration, false_alarm_rate=rate)
    counts: dict[bool, tuple[int, int]] = {}
    for is_anomalous in (True, False):
        found = [picture for picture in evaluation.pictures["honest"] if picture.is_anomalous == is_anomalous]
        scores = torch.tensor([picture.score for picture in found], dtype=torch.float64)
        classes = torch.tensor([model.class_names.index(p.inferred_class) for p in found], dtype=torch.int64)
        _, flags, thresholds, rates = calibration.judge(scores, classes)
        known = thresholds.isfinite()
        counts[is_anomalous] = int(flags[known].sum()), int(known.sum())
    attainable = float(rates[known].mean()) if known.any() else math.nan  # of the normal ones
    return _AtRate(rate, attainable, *counts[False], *counts[True])


def _rates_table(rows: list[_AtRate]) -> dict[str, Any]:
    return {
        "caption": "What other rates would do to these test pictures",
        "heads": ["Rate asked for", "Rate attainable", "False alarms", "Expected (95 %)", "Defects found"],
        "rows": [
            [
                _percent(row.wished),
                _percent(row.attainable),
                _share(row.false_alarms, row.normal),
                "{} to {}".format(*row.expected) if row.normal else "–",
                _share(row.found, row.defective),
            ]
            for row in rows
        ],
    }


def _rate_panels(rows: list[_AtRate]) -> list[dict[str, Any]]:
    wished = [row.wished for row in rows]
    panels = []
    if normal := rows[0].normal:
        band = np.array([row.expected for row in rows]) / normal
        actual = [row.false_alarms / normal for row in rows]
        words = "Thresholds that keep their promise stay within the band."
        svg = charts.rates(wished, actual, "normal pictures called defective", f"False alarms. {words}", band=band.T)
        panels.append(_panel(svg, "False alarms", words))
    if defective := rows[0].defective:
        found = [row.found / defective for row in rows]
        words = "What fewer false alarms cost."
        panels.append(
            _panel(
                charts.rates(wished, found, "defective pictures found", f"Defects found. {words}"),
                "Defects found",
                words,
            )
        )
    return panels


def _threshold_table(model: HGADModel, calibration: Calibration, evaluation: Evaluation | None) -> dict[str, Any]:
    ids = torch.arange(len(model.class_names))
    _, _, thresholds, rates = calibration.judge(torch.zeros(len(ids)), ids)
    counts = torch.bincount(calibration.class_ids, minlength=len(ids)).tolist()
    rows = []
    for name, count, threshold, rate in zip(
        model.class_names, counts, thresholds.tolist(), rates.tolist(), strict=True
    ):
        row = [name, str(count), f"{threshold:.4g}" if math.isfinite(threshold) else "–", _percent(rate)]
        for is_anomalous in (False, True) if evaluation else ():
            assert evaluation is not None
            own = [p for p in evaluation.pictures["honest"] if p.class_name == name and p.is_anomalous == is_anomalous]
            flags = [picture.is_flagged for picture in own if picture.is_flagged is not None]
            row.append(_share(sum(map(bool, flags)), len(flags)))
        rows.append(row)
    heads = ["Class", "Calibration pictures", "Threshold", "Rate attainable"]
    heads += ["False alarms", "Defects found"] if evaluation else []
    return {"caption": "What the threshold of each class rests on", "heads": heads, "rows": rows}


# ------------------------------------------------------------------------------------------------ mistakes


def _mistakes(model: HGADModel, dataset: pictures.Dataset, evaluation: Evaluation) -> dict[str, Any] | None:
    """The pictures that are most wrong, or came closest to it."""
    judged = [picture for picture in evaluation.pictures[_protocols(evaluation)[0]] if picture.is_flagged is not None]
    if not judged:
        return None
    parts = []
    for is_anomalous in (True, False):
        # The worst come first: defective pictures that score lowest, normal ones that score highest.
        group = [picture for picture in judged if picture.is_anomalous == is_anomalous]
        group.sort(key=_ratio, reverse=not is_anomalous)
        if group:
            count = sum(picture.is_flagged != is_anomalous for picture in group)
            shown = [_shown(model, dataset, picture) for picture in group[:SHOWN]]
            parts.append({"is_anomalous": is_anomalous, "wrong": count, "total": len(group), "pictures": shown})
    wrong = [picture for picture in judged if picture.is_flagged != picture.is_anomalous]
    wrong.sort(key=lambda picture: (picture.is_anomalous, picture.class_name, -_ratio(picture)))
    rows = [
        (picture.path, picture.class_name, _truth(picture), f"{_ratio(picture):.2f}", f"{picture.p_value:.3f}")
        for picture in wrong[:LISTED]
    ]
    return {"parts": parts, "rows": rows, "total": len(wrong)}


def _shown(model: HGADModel, dataset: pictures.Dataset, picture: Picture) -> dict[str, Any]:
    """A picture and its map, small, and what is to be said of them."""
    from . import plot

    path = dataset.root / picture.path
    sample = next(sample for sample in dataset.test if sample.path == path)
    image = pictures.read_image(path)
    scale = min(1.0, THUMBNAIL / max(image.shape[1:]))
    height, width = (max(1, round(side * scale)) for side in image.shape[1:])
    case = plot.Case(
        image=pictures.resize_image(image, (height, width)),
        anomaly_map=model.score(image, map_size=(height, width)).anomaly_map[0],
        threshold=picture.threshold or math.nan,
        mask=pictures.resize_mask(pictures.read_mask(sample.mask), (height, width)) if sample.mask else None,
        is_anomalous=picture.is_flagged,
        is_defective=picture.is_anomalous,
    )
    verdict = "called defective" if picture.is_flagged else "called normal"
    if case.is_wrong:
        verdict = "missed" if picture.is_anomalous else "false alarm"
    images = ["data:image/jpeg;base64," + base64.b64encode(jpeg).decode() for jpeg in plot.thumbnails(case)]
    return {
        "images": images,
        "width": width,
        "height": height,
        "kind": f"{picture.class_name}: {_truth(picture)}",
        "verdict": verdict,
        "is_wrong": case.is_wrong,
        "ratio": f"{_ratio(picture):.2f}",
        "p_value": f"{picture.p_value:.3f}",
        "taken_for": picture.inferred_class if picture.inferred_class != picture.class_name else "",
        "file": picture.path,
        "has_mask": case.mask is not None,
    }


def _truth(picture: Picture) -> str:
    return picture.defect if picture.is_anomalous else "normal"


# ------------------------------------------------------------------------------------------------ training, setup


def _training(path: Path) -> dict[str, Any]:
    """Loss terms, learning rate and speed over the passes."""
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError:
        records = []
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it: the report can do without") from error
    if not records:
        return {"records": 0, "panels": []}
    levels = range(len(records[0]["losses"]))
    second_stage = next((i + 0.5 for i, record in enumerate(records) if i and record["stage"] == 2), None)
    curves = [
        (term, *words, [[record["losses"][level].get(term, math.nan) for record in records] for level in levels])
        for term, words in _TERMS.items()
    ]
    curves.append(("learning rate", "Learning rate", "Rises at first, then falls.", [[r["lr"] for r in records]]))
    speeds = [record["images_per_second"] for record in records]
    curves.append(("pictures a second", "Speed", "How many pictures were trained in a second.", [speeds]))
    panels = [
        _panel(charts.training(lines, y, f"{title}. {words}", second_stage), title, words)
        for y, title, words, lines in curves
        if np.isfinite(lines).any()
    ]
    return {
        "records": len(records),
        "pictures": round(records[-1]["images_per_second"] * records[-1]["seconds"]),
        "minutes": sum(record["seconds"] for record in records) / 60,
        "stages": second_stage is not None,
        "panels": panels,
        "legend": [(charts.level_colour(level), f"dash-{level % 4}", f"level {level}") for level in levels],
    }


_TERMS = {
    "L_g": ("Likelihood, all classes", "How surprising the normal pictures are; it should fall."),
    "L_mi": ("Mutual information", "How well the classes keep apart; it should rise."),
    "L_e": ("Entropy", "How unsure the class of a pixel is; small is good."),
    "L_g_intra": (
        "Likelihood, own class",
        "How surprising the normal pictures are to their own class; it should fall.",
    ),
    "L_z": ("Log-density, own class", "The same on the scale of the anomaly map; it should fall."),
}


def _setup(
    model: HGADModel, folder: Path, record: dict[str, Any], dataset: pictures.Dataset | None
) -> list[tuple[str, list[tuple[str, str]]]]:
    """Tables of two columns, each with its caption."""
    files = [
        ("model", f"{folder / MODEL} ({(folder / MODEL).stat().st_size / 1e6:.1f} MB)"),
        ("trained on", record.get("data") or "not recorded"),
        ("tested on", "nothing" if dataset is None else str(dataset.root)),
        ("report made", datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")),
    ]
    settings = [(name, _setting(value)) for name, value in asdict(model.config).items()]
    return [("Files", files), ("Versions", list(_versions().items())), ("Configuration", settings)]


def _versions() -> dict[str, str]:
    found = {"hgad_fast": __version__, "python": platform.python_version()}
    for package in ("torch", "triton", "timm", "numpy", "scikit-learn", "scipy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _setting(value: Any) -> str:
    if value is None:
        return "–"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _share(part: int, whole: int) -> str:
    return f"{_percent(part / whole)} ({part} of {whole})" if whole else "–"


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
