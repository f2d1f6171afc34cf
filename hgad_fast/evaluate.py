"""AUROC tables of a trained model on a labelled test set, under two protocols side by side.

``official``: the class of each picture is given, and maps are normalised by maxima over the test set of the class, as
in the paper. ``calibrated``: the class is inferred and every score depends on its picture alone, as in use.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import data as pictures
from . import metrics, score

if TYPE_CHECKING:
    from .model import HGADModel

PROTOCOLS = ("official", "calibrated")


@dataclass
class ClassFigures:
    """AUROCs of one class under one protocol, in [0, 1]; NaN where its test set cannot tell (no defects, no masks)."""

    image_auroc: float
    pixel_auroc: float


@dataclass
class Evaluation:
    """Figures of a model on a test set.

    Attributes:
        figures: protocol -> class name -> figures.
        inferred_class_accuracy: share of pictures whose inferred class is their own.
        false_alarm_rate: share of normal test pictures called anomalous; NaN without thresholds.
        recall: share of anomalous test pictures called anomalous; NaN without thresholds.
        n_normal, n_anomalous: how many pictures there are. Those of a class without threshold count in neither share.
    """

    figures: dict[str, dict[str, ClassFigures]]
    inferred_class_accuracy: float
    false_alarm_rate: float
    recall: float
    n_normal: int
    n_anomalous: int

    def mean(self, protocol: str) -> ClassFigures:
        """Unweighted mean over the classes that have the figure."""
        rows = self.figures[protocol].values()
        return ClassFigures(_mean(row.image_auroc for row in rows), _mean(row.pixel_auroc for row in rows))

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON takes it; NaN becomes None."""
        figures = {
            protocol: {
                **{name: asdict(row) for name, row in rows.items()},
                "mean": asdict(self.mean(protocol)),
            }
            for protocol, rows in self.figures.items()
        }
        return _without_nan({**asdict(self), "figures": figures})

    def table(self) -> str:
        """A text table, image / pixel AUROC in percent."""
        lines = [f"{'AUROC in %, image / pixel':<26}" + "".join(f"{protocol:>16}" for protocol in self.figures)]
        names = list(next(iter(self.figures.values())))
        for name in [*names, "mean"]:
            rows = [self.mean(p) if name == "mean" else self.figures[p][name] for p in self.figures]
            lines.append(
                f"{name:<26}"
                + "".join(f"{_percent(r.image_auroc)} / {_percent(r.pixel_auroc)}".rjust(16) for r in rows)
            )
        lines.append(
            f"inferred class right in {self.inferred_class_accuracy:.1%} of {self.n_normal + self.n_anomalous} pictures"
        )
        if not (math.isnan(self.recall) and math.isnan(self.false_alarm_rate)):
            lines.append(
                f"at the thresholds, in %: {_percent(self.recall)} of {self.n_anomalous} defects found, "
                f"{_percent(self.false_alarm_rate)} false alarms among {self.n_normal} normal pictures"
            )
        return "\n".join(lines)


@torch.no_grad()
def evaluate(
    model: HGADModel,
    data: pictures.Dataset | str | os.PathLike[str],
    *,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] | None = None,
) -> Evaluation:
    """Score the test pictures of a dataset and compare with their labels and masks.

    Maps and masks are compared at the size that scores are computed on (`msk_size`), after the model's own
    preprocessing. Without calibration only the official protocol is reported. A picture of a defect without a mask
    counts for the image AUROC alone.

    Raises:
        ValueError: the dataset's classes are not the model's, or it has no test pictures.
    """
    dataset = data if isinstance(data, pictures.Dataset) else pictures.discover(data)
    unknown = set(dataset.class_names) - set(model.class_names)
    if unknown:
        raise ValueError(f"{dataset.root} has classes the model does not know: {', '.join(sorted(unknown))}")
    if not dataset.test:
        raise ValueError(
            f"{dataset.root} has no test pictures; put them into <class>/test/good and <class>/test/<defect>"
        )
    figures: dict[str, dict[str, ClassFigures]] = {"official": {}}
    if model.calibration is not None:
        figures["calibrated"] = {}
    right: list[bool] = []
    flagged: dict[bool, list[bool]] = {False: [], True: []}
    in_order = sorted(dataset.test, key=lambda sample: sample.class_id)
    for k, samples in groupby(progress(in_order, "scoring") if progress else in_order, lambda sample: sample.class_id):
        name = dataset.class_names[k]
        class_id = torch.tensor([model.class_names.index(name)])
        members, given, inferred = [], [], []
        for sample in samples:
            features = score.picture_features(model, pictures.read_image(sample.path))
            (guess,) = score.densities(model, features, None)
            right.append(bool(guess.class_id == class_id))
            members.append(sample)
            inferred.append(guess)
            given += [guess] if right[-1] else score.densities(model, features, class_id)
        official = score.official_maps(given, model.config.msk_size)
        figures["official"][name] = _figures(model, members, list(official), official.amax((1, 2)))
        if model.calibration is not None:
            maps = [score.calibrated_maps(g, model.calibration.level_max, model.config.msk_size)[0] for g in inferred]
            scores = torch.stack([m.max() for m in maps])
            figures["calibrated"][name] = _figures(model, members, maps, scores)
            _, verdicts, thresholds, _ = model.calibration.judge(scores, torch.cat([g.class_id for g in inferred]))
            for sample, verdict, threshold in zip(members, verdicts.tolist(), thresholds.tolist(), strict=True):
                if not math.isnan(threshold):
                    flagged[sample.is_anomalous].append(verdict)
    anomalous = sum(sample.is_anomalous for sample in dataset.test)
    return Evaluation(
        figures=figures,
        inferred_class_accuracy=_mean(right),
        false_alarm_rate=_mean(flagged[False]),
        recall=_mean(flagged[True]),
        n_normal=len(dataset.test) - anomalous,
        n_anomalous=anomalous,
    )


def _figures(model: HGADModel, samples: list[pictures.Sample], maps: list[Tensor], scores: Tensor) -> ClassFigures:
    labels = torch.tensor([sample.is_anomalous for sample in samples])
    seen = [
        (sample, m.cpu()) for sample, m in zip(samples, maps, strict=True) if sample.mask or not sample.is_anomalous
    ]
    masks = [_mask(model, sample, m) for sample, m in seen]
    image = metrics.auroc(scores.cpu(), labels) if 0 < labels.sum() < len(labels) else math.nan
    told = any(mask.any() for mask in masks) and any(not mask.all() for mask in masks)
    pixel = metrics.pixel_metrics([m for _, m in seen], masks)["auroc"] if told else math.nan
    return ClassFigures(image, pixel)


def _mask(model: HGADModel, sample: pictures.Sample, anomaly_map: Tensor) -> Tensor:
    """What the model sees of the mask, at the size of the map, (h, w) bool."""
    if sample.mask is None:
        return torch.zeros_like(anomaly_map, dtype=torch.bool)
    prepare = pictures.centre_crop if model.config.center_crop else pictures.whole_picture
    seen = prepare(pictures.read_mask(sample.mask), model.config.img_size)
    return pictures.resize_mask(seen, (anomaly_map.shape[0], anomaly_map.shape[1]))


def _mean(values: Iterable[float]) -> float:
    known = [float(value) for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
