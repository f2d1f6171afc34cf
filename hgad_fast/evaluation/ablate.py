"""Ablation: variants of one training, compared to see what each part of a method contributes (`hgad-fast ablate DATA`).

The method names its variants (`Detector.variants`). They are compared by the anomaly maps of each part of the densities
alone and of all parts together, and by how much the log-densities of normal and anomalous pixels overlap.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import methods
from ..data.datasets import Dataset, Sample
from ..data.images import read_image
from ..environment import environment
from ..features.extract import FeatureSet, ShowProgress, feature_set
from ..features.preprocess import image_features
from ..files import printable, replacing
from ..protocol import Densities, Detector, ProportionsError
from ..scoring.calibration import (
    Calibration,
    calibration_of,
    held_out_densities,
    largest_densities,
    required_calibration,
)
from ..scoring.densities import densities
from ..scoring.lettering import drawable
from ..scoring.score import first_official
from ..training import runs
from . import metrics
from .evaluate import Features, mean, seen_mask, test_set, without_nan

SETTINGS = ("official", "class given", "class inferred")
FUSIONS = ("product", "standardised")
SPLITS = 5  # draws of calibration images from the held-out ones, to measure the false-alarm rate
RATES = (0.05, 0.01)  # target false-alarm rates
RESULTS, HISTOGRAM = "ablation.json", "log-density.png"
STRIDE = 2  # the pixel AUROC takes every second pixel in both directions


@dataclass(frozen=True)
class _Data:
    """The data that all variants share; `test` holds the features of each test image, one (1, C, h, w) a level."""

    dataset: Dataset
    train: FeatureSet
    held_out: FeatureSet
    test: list[list[Tensor]]


def run(
    data: Dataset | str,
    config: Any,
    output: str | Path,
    *,
    variants: Mapping[str, Any] | None = None,
    training_images: int | None = None,
    features: FeatureSet | None = None,
    features_of: Features | None = None,
    device: str = "cpu",
    say: Callable[[str], None] = print,
    progress: ShowProgress | None = None,
) -> dict[str, Any]:
    """Train every variant on the same features and compare them on the test images.

    The model and a histogram (``log-density.png``) of each variant are written to a folder of its own in `output`, and
    the comparison to ``ablation.json``. A training that lies there already is resumed, or kept if it is finished.

    Args:
        data: a dataset with test images, or its root.
        config: what the variants have in common, with the dataset's classes.
        output: the folder, made if need be.
        variants: configurations by name; None: all those of `Detector.variants`. Of several, one of places is left out
            where images of a class have several shapes.
        training_images: how many normal images of a class are trained on, drawn with ``config.seed``; the others
            calibrate. None: all but a tenth.
        features: features of all training images of the dataset, where they are at hand already.
        features_of: returns the features of a test image, where they are at hand already.
        device: where to compute.
        say: called with a line of text before each step, and with the table at the end.
        progress: wraps the long loops over images, e.g. in a progress bar with the given title.

    Returns:
        The content of ``ablation.json``; under "variants" it has of each "figures" (setting -> map -> image and pixel
        AUROC, mean and per class), "confusion", "log_density_overlap" (of normal and anomalous pixels, by class and
        mean: 1 where the density cannot tell them apart, 0 where it always does) and "false_alarms". The settings are
        the official procedure (of several: the first) with the class given, and the calibrated normalisation with the
        class given and inferred. The maps are those of each part of the densities and, where there are several, their
        product, unless they may be below 0, and standardised sum; "standardised" is also what a method with a single
        part does where it computes the image score on another map than the anomaly map.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        ValueError: a class has no images to calibrate on, the dataset has no test images, or a folder holds the
            training of another configuration or of other images.
    """
    chosen = methods.METHODS[config.method].variants(config) if variants is None else variants
    progress = progress or (lambda items, title: items)
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("the ablation draws histograms, which need matplotlib: pip install 'hgad-fast[plot]'")
    base = methods.create(config).to(device)
    dataset = test_set(base, data)
    say("features of the training images")
    normals = features or feature_set(base, dataset, progress=progress)
    training_rows, held_out_rows = _drawn(normals.class_ids, dataset.class_names, training_images, config.seed)
    say("features of the test images")
    features_of = features_of or (lambda sample: image_features(base, read_image(sample.path, config.white_level)))
    test = [list(features_of(sample)) for sample in progress(dataset.test, "test images")]
    shared = _Data(dataset, normals.subset(training_rows), normals.subset(held_out_rows), test)
    report: dict[str, Any] = environment(torch.device(device))
    report |= {"config": json.loads(config.to_json()), "training_images": len(training_rows), "variants": {}}
    for name, variant in chosen.items():
        folder = Path(output) / name
        try:
            model = _trained(variant, shared, folder, device, say)
        except ProportionsError as error:
            if len(chosen) == 1:
                raise
            say(f"{name}: left out, as {error}")
            continue
        say(f"{name}: comparing")
        report["variants"][name] = _compare(model, shared, folder, progress)
        with replacing(Path(output) / RESULTS) as file:
            file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    say(table(report))
    return report


def check_output(output: Path, resume: bool, overwrite: bool) -> None:
    """Raise a ValueError where a folder holds an ablation, and it is not said what to do with that."""
    if resume and overwrite:
        raise ValueError("--resume goes on with the trainings in OUTPUT and --overwrite removes them: give one of them")
    if not resume and not overwrite and (found := _variant_folders(output)):
        raise ValueError(
            f"{printable(output)} holds an ablation ({printable(found[0].name)}): --resume keeps its trainings and "
            "goes on, --overwrite removes them; or give another --output"
        )


def clear_output(output: Path) -> None:
    """Remove an ablation from a folder: the results, and of each variant the training and the histogram."""
    for folder in _variant_folders(output):
        runs.remove(folder)
        (folder / HISTOGRAM).unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()
    (output / RESULTS).unlink(missing_ok=True)


def _variant_folders(output: Path) -> list[Path]:
    """Return the folders of the variants whose trainings an ablation left in a folder."""
    folders = sorted(path for path in output.iterdir() if path.is_dir()) if output.is_dir() else []
    return [folder for folder in folders if any((folder / name).is_file() for name in runs.WRITTEN)]


def table(report: dict[str, Any]) -> str:
    """Return a table of mean image / pixel AUROC in percent: a row a variant and setting, a column a map."""
    rows = [
        (f"{variant}, {setting}", maps)
        for variant, results in report["variants"].items()
        for setting, maps in results["figures"].items()
    ]
    kinds = dict.fromkeys(kind for _, maps in rows for kind in maps)
    columns = [kind for kind in kinds if kind not in FUSIONS] + [kind for kind in FUSIONS if kind in kinds]
    lines = [f"{'mean AUROC in %, image / pixel':<38}" + "".join(f"{kind:>16}" for kind in columns)]
    for name, maps in rows:
        cells = (maps[kind]["mean"] if kind in maps else [None] for kind in columns)
        texts = (" / ".join("-" if auroc is None else f"{100 * auroc:.1f}" for auroc in cell) for cell in cells)
        lines.append(f"{printable(name):<38}" + "".join(f"{text:>16}" for text in texts))
    settings = dict.fromkeys(setting for results in report["variants"].values() for setting in results["figures"])
    return "\n".join([*lines, "", *_legend(columns, list(settings))])


def _legend(columns: Sequence[str], settings: Sequence[str]) -> list[str]:
    """Return what rows and columns of the table mean."""
    lines = ["Rows: a variant, and how its maps are normalised and whether the class of an image is known:"]
    lines += [f"  {setting:<16} {text}" for setting, text in _SETTINGS.items() if setting in settings]
    lines.append("Columns: the map that the AUROCs are of, mean over the classes:")
    texts = {kind: _FUSIONS.get(kind, "the part of the density of that name alone") for kind in columns}
    return lines + [f"  {kind:<16} {text}" for kind, text in texts.items()]


_SETTINGS = {
    "official": "as published: the class is given, maps by maxima over the test images of the class (flatters)",
    "class given": "constants from held-out normal images, the class of each image given",
    "class inferred": "constants from held-out normal images, the class inferred: as in use",
}
_FUSIONS = {
    "sum": "all parts together, as the method was published",
    "product": "all parts multiplied, as published",
    "standardised": "sum of all parts, each in units of the peaks of normal images",
}


def _drawn(class_ids: Tensor, names: Sequence[str], count: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """Return the rows to train on, `count` of each class (None: all but a tenth), and the others; both sorted."""
    generator = torch.Generator().manual_seed(seed)
    chosen: list[Tensor] = []
    others: list[Tensor] = []
    for k in class_ids.unique().tolist():
        members = (class_ids == k).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        n = len(members) - max(1, len(members) // 10) if count is None else count
        if not 0 < n < len(members):
            raise ValueError(
                f"class {names[k]!r} has {len(members)} training images, of which {n} cannot be trained on: at least "
                "one, and fewer than all, for the others calibrate"
            )
        chosen.append(members[:n])
        others.append(members[n:])
    return torch.cat(chosen).sort().values, torch.cat(others).sort().values


def _trained(config: Any, shared: _Data, folder: Path, device: str, say: Callable[[str], None]) -> Any:
    """Return the model of a variant, trained in its folder, or read from it if its training is finished."""
    say(f"{folder.name}: training")
    model = methods.create(config.replace(calibration_fraction=0.0)).to(device)  # what calibrates is held out already
    model.fit(_with_classes_of(model, shared.train), output_dir=folder, resume=True)
    return model


def _with_classes_of(model: Detector, features: FeatureSet) -> FeatureSet:
    """Return the features with the class ids that the model knows: 0 for all, where it has a single class."""
    single_class = model.groups_are_classes and len(model.groups) == 1
    return dataclasses.replace(features, class_ids=features.class_ids * 0) if single_class else features


def _compare(model: Detector, shared: _Data, folder: Path, progress: ShowProgress) -> dict[str, Any]:
    """Return the results of a variant, as `run` describes them, and write its histogram."""
    dataset = shared.dataset
    held_out = held_out_densities(model, _with_classes_of(model, shared.held_out), progress)
    class_ids = torch.tensor([sample.class_id for sample in dataset.test])
    known_ids = class_ids * 0 if len(model.groups) == 1 else class_ids  # see `_with_classes_of`
    tests = list(zip(shared.test, known_ids.tolist(), strict=True))
    inferred, given = [], []
    for features, k in progress(tests, "densities of the test images"):
        inferred += densities(model, features, None)
        # Where the inferred class is the given one, the densities are the same.
        same = not model.groups_are_classes or int(inferred[-1].group_ids) == k
        given += inferred[-1:] if same else densities(model, features, torch.tensor([k]))
    model.calibration = _calibration(model, held_out, "standardised")
    classes = [(name, (class_ids == k).nonzero().flatten().tolist()) for k, name in enumerate(dataset.class_names)]
    classes = [(name, rows) for name, rows in classes if rows]
    settings = {
        setting: images
        for setting, images in zip(SETTINGS, (given, given, inferred), strict=True)
        if model.groups_are_classes or setting != "class given"
    }
    figures: dict[str, dict[str, dict[str, Any]]] = {setting: {} for setting in settings}
    for name, rows in progress(classes, "maps of the test images"):
        samples = [dataset.test[i] for i in rows]
        for setting, images in settings.items():
            maps_of = _official if setting == "official" else _calibrated
            for kind, scored in maps_of([images[i] for i in rows], model).items():
                figures[setting].setdefault(kind, {})[name] = _aurocs(model, samples, *scored)
    for by_kind in figures.values():
        for by_class in by_kind.values():
            by_class["mean"] = [mean(aurocs) for aurocs in zip(*by_class.values(), strict=True)]
    group_names = [model.groups[int(image.group_ids)] for image in inferred]
    confusion = {
        name: {group: [group_names[i] for i in rows].count(group) for group in model.groups} for name, rows in classes
    }
    return without_nan(
        {
            "figures": figures,
            "confusion": confusion,
            "log_density_overlap": _histogram(model, shared, given, folder / HISTOGRAM),
            "false_alarms": _false_alarms(model, shared, held_out, inferred, progress),
        }
    )


def _calibration(model: Detector, held_out: Sequence[Densities], fusion: str) -> Calibration:
    """Return the calibration of the model on the densities of held-out images, for maps of the given fusion."""
    return calibration_of(model, held_out, largest_densities(model, held_out), model.config.img_size, fusion)


def _official(images: list[Densities], model: Detector) -> dict[str, tuple[list[Tensor], list[float]]]:
    """Return official maps and scores of the images of a class: of each part and, if there are several, of all.

    They are those of the first procedure that the method was published with, and all parts together are their
    "product", or "sum" where the procedure is one of the method's own.
    """
    parts = {part: [image.alone(part) for image in images] for part in images[0].parts}
    published = {kind: first_official(model, of_images) for kind, of_images in parts.items()}
    if len(parts) > 1:
        together = first_official(model, images)
        published["sum" if together.description else "product"] = together
    return {kind: (list(maps), scores.tolist()) for kind, (maps, scores, _) in published.items()}


def _calibrated(images: list[Densities], model: Detector) -> dict[str, tuple[list[Tensor], list[float]]]:
    """Return calibrated maps and scores of images: of each part and, if there are several, their `FUSIONS`.

    There is no product of what may be below 0. The standardised sum, and the model's own fusion if it is another one,
    have the method's own scores (`Detector.scored_on`); the scores of the others are those of their maps.
    """
    calibration = required_calibration(model)
    parts = list(images[0].parts)
    one_hot = torch.eye(len(parts))
    weights = {part: one_hot[[i]].expand(len(calibration.level_max), -1) for i, part in enumerate(parts)}
    fusions: dict[str, Tensor | None] = dict(weights)
    if calibration.weights is not None:
        fusions |= {"product": None} if len(parts) > 1 and images[0].multipliable else {}
        fusions["standardised"] = calibration.weights
    scored: dict[str, tuple[list[Tensor], list[float]]] = {}
    for kind, kind_weights in fusions.items():
        rule = dataclasses.replace(calibration, weights=kind_weights)
        if kind != "standardised":
            rule.scored_on = model.scored_on if kind == model.fusion else "map"
            rule.score_weights = kind_weights
        maps, scores = zip(*(rule.maps(image, model.config.msk_size) for image in images), strict=True)
        scored[kind] = [anomaly_map[0] for anomaly_map in maps], torch.cat(scores).tolist()
    return scored


def _aurocs(
    model: Detector, samples: list[Sample], maps: list[Tensor], image_scores: list[float]
) -> tuple[float, float]:
    """Return image and pixel AUROC of one class; NaN where its test images are all normal or all anomalous.

    Anomalous images without a mask do not count for the pixels.
    """
    labels = [sample.is_anomalous for sample in samples]
    image_auroc = math.nan
    if 0 < sum(labels) < len(labels):
        image_auroc = metrics.auroc(image_scores, labels)
    scores, truth = [], []
    for sample, anomaly_map in zip(samples, (m.cpu() for m in maps), strict=True):
        if sample.mask or not sample.is_anomalous:
            scores.append(anomaly_map[::STRIDE, ::STRIDE].flatten())
            truth.append(seen_mask(model, sample, anomaly_map)[::STRIDE, ::STRIDE].flatten())
    pixel_labels = torch.cat(truth)
    if pixel_labels.all() or not pixel_labels.any():
        return image_auroc, math.nan
    return image_auroc, metrics.auroc(torch.cat(scores), pixel_labels)


def _false_alarms(
    model: Detector,
    shared: _Data,
    held_out: Sequence[Densities],
    inferred: list[Densities],
    progress: ShowProgress,
) -> dict[str, Any]:
    """Count the test images called anomalous after each of several calibrations.

    A calibration takes a third of the held-out images of every group, and maps are joined as the model joins them.
    Returns the counts of each one and target rate, and the rates pooled over the calibrations.
    """
    anomalous = torch.tensor([sample.is_anomalous for sample in shared.dataset.test])
    group_ids = torch.cat([image.group_ids for image in inferred])
    held_out_ids = torch.cat([image.group_ids for image in held_out])
    splits: list[dict[str, Any]] = []
    for seed in progress(range(SPLITS), "false alarms"):
        generator, rows = torch.Generator().manual_seed(seed), []
        for k in held_out_ids.unique().tolist():
            members = (held_out_ids == k).nonzero().flatten()
            chosen = torch.randperm(len(members), generator=generator)[: max(1, len(members) // 3)]
            rows += members[chosen].tolist()
        calibration = _calibration(model, [held_out[i] for i in sorted(rows)], model.fusion)
        scores = torch.cat([calibration.scores_alone(image, model.config.msk_size) for image in inferred])
        for rate in RATES:
            calibration.false_alarm_rate = rate
            _, flagged, _, attainable = calibration.judge(scores, group_ids)
            splits.append(
                {
                    "seed": seed,
                    "nominal": rate,
                    "attainable": mean(attainable[~anomalous].tolist()),
                    "calibration_images": len(calibration.scores),
                    "normal_images": int((~anomalous).sum()),
                    "false_alarms": int(flagged[~anomalous].sum()),
                    "recall": mean(flagged[anomalous].tolist()),
                }
            )
    pooled = {}
    for rate in RATES:
        at_rate = [split for split in splits if split["nominal"] == rate]
        false_alarms = sum(split["false_alarms"] for split in at_rate)
        normal_images = sum(split["normal_images"] for split in at_rate)
        pooled[str(rate)] = {
            "false_alarm_rate": false_alarms / normal_images if normal_images else None,
            "recall": mean(split["recall"] for split in at_rate),
            "interval_95_of_one_split": _binomial(rate, at_rate[0]["normal_images"]),
        }
    return {"splits": splits, "pooled": pooled}


def _binomial(rate: float, n: int) -> list[float]:
    """Return the bounds between which the share of alarms among n images at a rate lies in 95% of cases."""
    from scipy.stats import binom

    return [float(binom.ppf(quantile, n, rate)) / max(n, 1) for quantile in (0.025, 0.975)]


def _histogram(model: Detector, shared: _Data, given: list[Densities], path: Path) -> dict[str, float]:
    """Draw histograms of the log-density, divided by C, of normal and anomalous pixels of the finest level.

    Each class has a panel. Returns the share of the two distributions that overlaps, by class and mean.
    """
    from matplotlib.figure import Figure

    names = shared.dataset.class_names
    overlap: dict[str, float] = {}
    figure = Figure(figsize=(3 * len(names), 2.6), layout="constrained")
    for k, (name, axes) in enumerate(zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True)):
        pixels: dict[str, list[Tensor]] = {"normal": [], "anomalous": []}
        for sample, image in zip(shared.dataset.test, given, strict=True):
            if sample.class_id == k and (sample.mask or not sample.is_anomalous):
                logps = image.logps[0][0].cpu()
                mask = seen_mask(model, sample, logps)
                pixels["normal"].append(logps[~mask])
                pixels["anomalous"].append(logps[mask])
        present = {label: torch.cat(values).numpy() for label, values in pixels.items() if any(map(len, values))}
        edges = np.histogram_bin_edges(np.concatenate([np.empty(0), *present.values()]), bins=60)
        shares = []
        for label, values in present.items():
            density, *_ = axes.hist(values, edges, density=True, histtype="stepfilled", alpha=0.5, label=label)
            shares.append(density * np.diff(edges))
        overlap[name] = float(np.minimum(*shares).sum()) if len(shares) == 2 else math.nan
        axes.set(xlabel="log-density / C", yticks=[])
        axes.set_title(drawable(name), parse_math=False)
    axes.legend()
    with replacing(path) as file:
        figure.savefig(file, dpi=100)
    return overlap | {"mean": mean(overlap.values())}
