"""The sections of a report that are about figures: tables and curves of every protocol, and the groups of images.

`report` puts them on the page, with the sections about scores, calibration, mistakes and training.
"""

from __future__ import annotations

import math
from typing import Any

from ..protocol import Detector
from ..scoring.calibration import Calibration
from . import charts
from .evaluate import Evaluation, Figures

GROUPS_LISTED = 40  # groups in the table of those that a method forms


def protocol_names(evaluation: Evaluation) -> list[str]:
    """Return the protocols, the honest one first; a model without calibration has only the official one."""
    return sorted(evaluation.figures)


def tiles(model: Detector, evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return the figures that a reader wants first."""
    main, *others = protocol_names(evaluation)
    tiles = []
    for figure, name in (
        ("image_auroc", "Image AUROC"),
        ("pixel_auroc", "Pixel AUROC"),
        ("pixel_aupro_30", "AUPRO 30 %"),
    ):
        words = [f"{main}{', mean of the classes' if len(evaluation.figures[main]) > 1 else ''}"]
        words += [f"{protocol}: {percent(getattr(evaluation.mean(protocol), figure))}" for protocol in others]
        tiles.append({"name": name, "value": percent(getattr(evaluation.mean(main), figure)), "words": words})
    judged = [image for image in evaluation.images[main] if image.is_flagged is not None]
    for is_anomalous, name in ((True, "Defects found"), (False, "False alarms")):
        flags = [image.is_flagged for image in judged if image.is_anomalous == is_anomalous]
        if flags and model.calibration is not None:
            words = ["at the model's thresholds"]
            if not is_anomalous:
                words = ["among the normal images", f"target: {percent(model.calibration.false_alarm_rate)}"]
            tiles.append({"name": name, "value": f"{sum(map(bool, flags))} of {len(flags)}", "words": words})
    if evaluation.knows_classes and len(model.groups) > 1:
        words = ["of the images were taken for what they show"]
        tiles.append({"name": "Class recognised", "value": percent(evaluation.inferred_class_accuracy), "words": words})
    return tiles


def figure_tables(evaluation: Evaluation) -> dict[str, Any]:
    """Return a table for images and one for pixels, with all protocols side by side, and the classes confused."""
    protocols = protocol_names(evaluation)
    by_class = {
        name: [evaluation.figures[protocol][name] for protocol in protocols]
        for name in evaluation.figures[protocols[0]]
    }
    summary = {
        "mean": [evaluation.mean(protocol) for protocol in protocols],
        "pooled": [evaluation.pooled[protocol] for protocol in protocols],
    }
    tables = []
    for kind, caption in _TABLES.items():
        names = [name for name in NAMES if name.startswith(kind)]
        tables.append(
            {
                "caption": caption,
                "metrics": [NAMES[name] for name in names],
                "protocols": protocols,
                "groups": [
                    [(row_name, _cells(columns, names)) for row_name, columns in rows.items()]
                    for rows in (by_class, summary)
                ],
            }
        )
    confusion = [
        (name, inferred, count, sum(row.values()))
        for name, row in evaluation.confusion.items()
        for inferred, count in sorted(row.items())
        if inferred != name and evaluation.knows_classes
    ]
    return {
        "tables": tables,
        "protocols": [
            (name, f"{description(evaluation, name)} Checkpoint: {evaluation.checkpoints[name]}.") for name in protocols
        ],
        "confusion": confusion,
    }


def _cells(columns: list[Figures], names: list[str]) -> list[tuple[float | None, tuple[float, float] | None]]:
    """Return each named figure of each column, the columns of one figure side by side, with its interval."""
    return [(finite_or_none(getattr(column, name)), column.intervals.get(name)) for name in names for column in columns]


def description(evaluation: Evaluation, protocol: str) -> str:
    """Return sentences on what the figures of a protocol are of."""
    told = evaluation.knows_classes
    if protocol == "honest":
        unaided = "nobody tells the model which class an image shows, and " if told else ""
        return (
            f"As in use: {unaided}normalisation and thresholds come from normal images that were held out of the "
            "training. A score depends on its image alone."
        )
    if protocol in evaluation.descriptions:
        aided = "the model is told the class of each image; " if told else ""
        words = f"As published: {aided}{evaluation.descriptions[protocol]}."
        return f"{words} Comparable with published tables, but such scores have no threshold."
    aided = "the model is told the class of each image, and " if told else ""
    return (
        f"As published: {aided}the maps of a class are normalised by maxima over its test images. Comparable with "
        "published tables, but out of reach in use."
    )


_TABLES = {
    "image": "Images: is a defective one told from a normal one? In percent.",
    "pixel": "Pixels: is the defect found within the image? In percent.",
}
NAMES = {
    "image_auroc": "AUROC",
    "image_average_precision": "AP",
    "image_f1_max": "F1max",
    "pixel_auroc": "AUROC",
    "pixel_average_precision": "AP",
    "pixel_f1_max": "F1max",
    "pixel_aupro_30": "AUPRO 30 %",
    "pixel_aupro_5": "AUPRO 5 %",
}


def panel(svg: str, title: str, words: str) -> dict[str, Any]:
    """Return a chart with its title and explanation, as the page takes it."""
    from markupsafe import Markup

    return {"svg": Markup(svg), "title": title, "words": words}


def curve_panels(evaluation: Evaluation) -> dict[str, Any] | None:
    """Return ROC and precision-recall curves of images and of pixels, and PRO, of all classes together and of each.

    The curve of PRO is the exact one, whatever AUPRO is computed from.
    """
    main, *others = protocol_names(evaluation)
    classes = evaluation.figures[main] if len(evaluation.figures[main]) > 1 else {}
    further = [protocol for protocol in others if protocol not in charts.COLOURS]
    keys = {protocol: (protocol, protocol) for protocol in (main, *others)}  # colour and CSS class of the lines
    keys |= {protocol: charts.further_key(number) for number, protocol in enumerate(further)}
    panels = []
    for name, title, words, x, y in _CURVES:
        layers = [("muted", figures) for figures in classes.values()]
        layers += [
            (keys[protocol][0], evaluation.pooled[protocol]) for protocol in (*others, main)
        ]  # the last lies on top
        if lines := [(figures.curves[name], colour) for colour, figures in layers if name in figures.curves]:
            end = 0.3 if name == "pixel_pro" else 1.0
            panels.append(panel(charts.curves(lines, x, y, f"{title}. {words}", end=end), title, words))
    legend = [(*keys[protocol], f"{protocol} protocol, all classes together") for protocol in (main, *others)]
    legend += [("muted", "thin", f"a single class, {main} protocol")] if classes else []
    return {"panels": panels, "legend": legend} if panels else None


_CURVES = (
    (
        "image_roc",
        "Images: ROC",
        "How many defective images are found for how many false alarms.",
        "false-alarm rate",
        "defective images found",
    ),
    (
        "image_pr",
        "Images: precision and recall",
        "How many alarms are true while more and more defective images are found.",
        "defective images found",
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


def group_table(model: Detector, evaluation: Evaluation) -> dict[str, Any] | None:
    """Return how the test images of each class are shared out over the groups that the model forms, the largest first.

    None where the groups are the classes.
    """
    if evaluation.knows_classes:
        return None
    classes, counts = list(evaluation.confusion), evaluation.groups
    rows = [
        [
            name,
            str(sum(by_class.values())),
            *(str(by_class[class_name]) if class_name in by_class else "" for class_name in classes),
        ]
        for name, by_class in counts.items()
    ]
    return {
        "used": len(rows),
        "total": len(model.groups),
        "purity": percent(evaluation.purity),
        "hidden": len(rows) - len(rows[:GROUPS_LISTED]),
        "heads": ["Group", "Images", *classes],
        "rows": rows[:GROUPS_LISTED],
    }


def threshold_table(model: Detector, calibration: Calibration, evaluation: Evaluation | None) -> dict[str, Any]:
    """Return the table of thresholds: how many images each rests on, and what it does to the test images."""
    rows = []
    for k, rate in enumerate(calibration.rates(model.groups)):
        name, others = rate["group"], rate["reference"] - rate["images"]
        images = f"{rate['images']}, and {others} of others" if others > 0 else str(rate["images"])
        images = f"{rate['images']}, borrows" if k in calibration.borrowers else images
        limit = f"{rate['threshold']:.4g}" if math.isfinite(rate["threshold"]) else "–"
        row = [name, images, limit, percent(rate["target"]), percent(rate["attained"])]
        if evaluation is not None:
            judged = [
                image
                for image in evaluation.images["honest"]
                if (image.class_name if model.groups_are_classes else image.inferred_class) == name
                and image.is_flagged is not None
            ]
            for is_anomalous in (False, True):
                flags = [image.is_flagged for image in judged if image.is_anomalous == is_anomalous]
                row.append(share(sum(map(bool, flags)), len(flags)))
        rows.append(row)
    kind = "Class" if model.groups_are_classes else "Group"
    heads = [kind, "Calibration images", "Threshold", "Rate asked for", "Rate attained"]
    heads += ["False alarms", "Defects found"] if evaluation else []
    return {"caption": f"What the threshold of each {kind.lower()} rests on", "heads": heads, "rows": rows}


def share(part: int, whole: int) -> str:
    """Return a share as text, e.g. "5.0 % (1 of 20)"; a dash of nothing."""
    return f"{percent(part / whole)} ({part} of {whole})" if whole else "–"


def percent(value: float) -> str:
    """Return a share in percent as text; a dash for NaN."""
    return "–" if math.isnan(value) else f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
