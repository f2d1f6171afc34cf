"""Figures of a trained model on a labelled test set, under two protocols side by side.

``official``: as published. The class of each image is given, and the maps of a class are normalised by maxima over its
test images; a method may have published another procedure, or several (`Detector.official_maps`), each of which has a
protocol of its own. Published figures are moreover those of the checkpoint that is best on the test set (see
`BestCheckpoint`).
``honest``: as in use. The class is inferred, every score depends on its image alone, the thresholds come from held-out
normal images, and the checkpoint is the last one.
"""

from __future__ import annotations

import functools
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.datasets import Dataset, Sample, discover
from ..data.images import read_image, resize_mask
from ..data.masks import read_mask
from ..data.survey import mask_warnings
from ..environment import plain_torch
from ..features.extract import ShowProgress
from ..features.preprocess import image_features, preprocess, seeing
from ..files import printable
from ..methods import load
from ..protocol import Densities, Detector
from ..scoring.calibration import required_calibration
from ..scoring.densities import densities, naming
from ..scoring.result import require_numbers
from ..scoring.score import first_official, seen_at
from ..terminal import warn_user
from . import metrics

Features = Callable[[Sample], Sequence[Tensor]]  # returns prepared features of a test image, (1, C, h, w) a level
Curve = tuple[list[float], list[float]]  # x and y of its points


@dataclass
class Figures:
    """Figures in [0, 1] of one class or of all images together, or means over the classes.

    A figure is NaN where the test images do not have what it takes: normal ones, anomalous ones, or masks.

    Attributes:
        pixel_aupro_30, pixel_aupro_5: per-region overlap up to the false-positive rates 0.3 and 0.05. Under official
            protocols the former may be that of `metrics.pro_800`, without an interval (`Detector.official_aupro`).
        intervals: 95% bootstrap intervals over the images, by the names of the figures.
        curves: "image_roc", "image_pr", "pixel_roc", "pixel_pr" and "pixel_pro", see `metrics.pixel_curves`.
    """

    image_auroc: float = math.nan
    image_average_precision: float = math.nan
    image_f1_max: float = math.nan
    pixel_auroc: float = math.nan
    pixel_average_precision: float = math.nan
    pixel_f1_max: float = math.nan
    pixel_aupro_30: float = math.nan
    pixel_aupro_5: float = math.nan
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)


FIGURES = tuple(figure.name for figure in fields(Figures) if figure.name not in ("intervals", "curves"))


@dataclass
class ScoredImage:
    """A test image with its score and verdict under one protocol.

    Attributes:
        path: relative to the dataset's root if the image lies below it; what cannot be shown of it is escaped.
        class_name, inferred_class: the image's own class, and the class (or other group) that the model takes it for.
        score: the image score; each class has its own scale, so compare scores within a class only.
        p_value, threshold, is_flagged: None without a threshold, as always under the official protocol.
    """

    path: str
    class_name: str
    inferred_class: str
    defect: str
    is_anomalous: bool
    score: float
    p_value: float | None = None
    threshold: float | None = None
    is_flagged: bool | None = None


@dataclass
class Evaluation:
    """Figures of a model on a test set.

    Attributes:
        figures: protocol -> class name -> figures.
        pooled: protocol -> figures of all images together, with one threshold for all classes.
        images: protocol -> every test image.
        checkpoints: protocol -> which checkpoint was tested: "last", or how it was chosen.
        descriptions: protocol -> which maps and scores its figures are of, where that is not the rule.
        knows_classes: whether the model's groups are the classes, so that the class of an image can be given.
    """

    figures: dict[str, dict[str, Figures]]
    pooled: dict[str, Figures]
    images: dict[str, list[ScoredImage]]
    checkpoints: dict[str, str]
    knows_classes: bool = True
    descriptions: dict[str, str] = field(default_factory=dict)

    def mean(self, protocol: str) -> Figures:
        """Return the unweighted mean of each figure over the classes that have it."""
        figures = Figures()
        for name in FIGURES:
            setattr(figures, name, mean(getattr(row, name) for row in self.figures[protocol].values()))
        return figures

    @property
    def confusion(self) -> dict[str, dict[str, int]]:
        """Class -> inferred class -> number of images."""
        counts: dict[str, Counter[str]] = {}
        for image in self._test_images:
            counts.setdefault(image.class_name, Counter())[image.inferred_class] += 1
        return {name: dict(row) for name, row in counts.items()}

    @property
    def inferred_class_accuracy(self) -> float:
        """Share of images whose inferred class is their own; NaN where the model's groups are not the classes."""
        if not self.knows_classes:
            return math.nan
        return mean(image.inferred_class == image.class_name for image in self._test_images)

    @property
    def groups(self) -> dict[str, dict[str, int]]:
        """Group -> class -> number of images, for the groups that any image is taken for, the largest first."""
        counts: dict[str, Counter[str]] = {}
        for image in self._test_images:
            counts.setdefault(image.inferred_class, Counter())[image.class_name] += 1
        by_size = sorted(counts.items(), key=lambda item: (-item[1].total(), item[0]))
        return {name: dict(row) for name, row in by_size}

    @property
    def purity(self) -> float:
        """Share of images whose class is the most frequent one of their group; NaN where groups are the classes."""
        if self.knows_classes:
            return math.nan
        return sum(max(row.values()) for row in self.groups.values()) / len(self._test_images)

    @property
    def false_alarm_rate(self) -> float:
        """Share of normal test images called anomalous, of those with a threshold; NaN without any."""
        return self._flagged_share(False)

    @property
    def recall(self) -> float:
        """Share of anomalous test images called anomalous, of those with a threshold; NaN without any."""
        return self._flagged_share(True)

    @property
    def n_normal(self) -> int:
        """Number of normal test images."""
        return sum(not image.is_anomalous for image in self._test_images)

    @property
    def n_anomalous(self) -> int:
        """Number of anomalous test images."""
        return sum(image.is_anomalous for image in self._test_images)

    @property
    def _test_images(self) -> list[ScoredImage]:
        """The test images under the first protocol: classes, inferred classes and labels are the same under all."""
        return next(iter(self.images.values()))

    def _flagged_share(self, is_anomalous: bool) -> float:
        """Return the share of the normal or anomalous images with a threshold that are called anomalous."""
        images = (image for image in self.images.get("honest", ()) if image.is_anomalous == is_anomalous)
        return mean(image.is_flagged for image in images if image.is_flagged is not None)

    def to_dict(self, details: bool = True) -> dict[str, Any]:
        """Return the evaluation as JSON takes it, NaN as None; without `details` no curves and no single images."""

        def as_json(figures: Figures) -> dict[str, Any]:
            return {name: value for name, value in asdict(figures).items() if details or name != "curves"}

        protocols = {
            protocol: {
                "checkpoint": self.checkpoints[protocol],
                "classes": {name: as_json(figures) for name, figures in by_class.items()},
                "mean": {name: getattr(self.mean(protocol), name) for name in FIGURES},
                "pooled": as_json(self.pooled[protocol]),
            }
            | ({"description": self.descriptions[protocol]} if protocol in self.descriptions else {})
            for protocol, by_class in self.figures.items()
        }
        summary = ("inferred_class_accuracy", "confusion", "false_alarm_rate", "recall", "n_normal", "n_anomalous")
        content: dict[str, Any] = {"protocols": protocols, **{name: getattr(self, name) for name in summary}}
        content["knows_classes"] = self.knows_classes
        if not self.knows_classes:
            content |= {"groups": self.groups, "purity": self.purity}
        if details:
            content["images"] = {
                protocol: [asdict(image) for image in images] for protocol, images in self.images.items()
            }
        return without_nan(content)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Evaluation:
        """Return the evaluation that `to_dict` gave, with its details, even if it went through JSON."""
        protocols = content["protocols"]
        return cls(
            figures={
                protocol: {name: _figures_from(figures) for name, figures in part["classes"].items()}
                for protocol, part in protocols.items()
            },
            pooled={protocol: _figures_from(part["pooled"]) for protocol, part in protocols.items()},
            images={
                protocol: [ScoredImage(**image) for image in images] for protocol, images in content["images"].items()
            },
            checkpoints={protocol: part["checkpoint"] for protocol, part in protocols.items()},
            knows_classes=content["knows_classes"],
            descriptions={
                protocol: part["description"] for protocol, part in protocols.items() if "description" in part
            },
        )

    def table(self) -> str:
        """Return tables in percent: AUROC, average precision and F1max of images and pixels, and AUPRO."""
        lines = []
        for protocol, by_class in self.figures.items():
            is_honest = protocol == "honest"
            description = self.descriptions.get(protocol) or _DESCRIPTIONS["honest" if is_honest else "official"]
            whose = f"class {'inferred' if is_honest else 'given'}, " if self.knows_classes else ""
            lines.append(f"{protocol} protocol: {whose}{description}, checkpoint: {self.checkpoints[protocol]}")
            lines.append(f"{'':<22}" + "".join(f"{head:>9}" for head in _HEADS))
            summary = {"mean": self.mean(protocol), "pooled": self.pooled[protocol]}
            for row_name, row in (*by_class.items(), *summary.items()):
                lines.append(
                    f"{printable(row_name):<22}" + "".join(f"{_percent(getattr(row, name)):>9}" for name in FIGURES)
                )
            lines.append("")
        if self.knows_classes:
            total = self.n_normal + self.n_anomalous
            lines.append(f"inferred class right in {self.inferred_class_accuracy:.1%} of {total} images")
        else:
            lines.append(
                f"groups: purity {_percent(self.purity)}% (images whose class is the most frequent one of their group)"
            )
            sizes = [f"{printable(name)} {sum(row.values())}" for name, row in self.groups.items()]
            others = f", and {len(sizes) - _GROUPS} smaller groups" if len(sizes) > _GROUPS else ""
            lines.append(f"images a group: {', '.join(sizes[:_GROUPS])}{others}")
        if not (math.isnan(self.recall) and math.isnan(self.false_alarm_rate)):
            lines.append(
                f"at the thresholds: {_percent(self.recall)}% of the {self.n_anomalous} defects found, "
                f"{_percent(self.false_alarm_rate)}% false alarms among the {self.n_normal} normal images"
            )
        return "\n".join(lines)


_DESCRIPTIONS = {
    "official": "maps normalised over the test set of the class",
    "honest": "each score from its image alone",
}
_GROUPS = 40  # groups that a table names
# Of FIGURES in their order; i: of images, p: of pixels.
_HEADS = ("i-AUROC", "i-AP", "i-F1max", "p-AUROC", "p-AP", "p-F1max", "AUPRO.3", "AUPRO.05")


@plain_torch()
@torch.no_grad()
def evaluate(
    model: Detector,
    data: Dataset | str | os.PathLike[str],
    *,
    official: Detector | None = None,
    img_size: int | str | None = None,
    features_of: Features | None = None,
    details: bool = True,
    progress: ShowProgress | None = None,
) -> Evaluation:
    """Score the test images of a dataset and compare the scores with their labels, the maps with their masks.

    Maps and masks are compared at the size that scores are computed on (`msk_size`), after the model's own
    preprocessing. With another `img_size` the maps of the honest protocol grow with it, as in `score`; those of the
    official one do not. Without calibration only the official protocol is reported. An anomalous image without a mask
    counts for the image figures alone. Masks that look like a mistake (see `hgad_fast.data.survey`) are warned of.

    Args:
        model: the detector.
        data: a dataset with test images, or its root.
        official: another checkpoint of the same training, for the official protocol (see `BestCheckpoint`).
        img_size: short side at which images are seen, or ``"native"``; default the model's.
        features_of: returns the features of a test image, where they are at hand already.
        details: also compute bootstrap intervals and curves.
        progress: wraps the loop over the images, e.g. in a progress bar with the given title.

    Raises:
        ValueError: the dataset's classes are not the model's, or it has no test images.
    """
    dataset = test_set(model, data)
    for text in mask_warnings(dataset):
        warn_user(text)
    _, cells = seen_at(model, img_size)
    model = seeing(model, img_size)
    official = model if official is None else seeing(official, img_size)
    features_of = features_of or functools.partial(_features, model)
    msk_size = model.config.msk_size
    tallies: dict[str, _Tally] = {}
    honest = None if model.calibration is None else _Tally(model, dataset, True, details)
    descriptions: dict[str, str] = {}
    for name, group_id, samples in _classes(model, dataset):
        given, inferred = [], []
        for sample in progress(samples, f"scoring {name}") if progress else samples:
            with naming(functools.partial(printable, sample.path)):
                features = list(features_of(sample))
                inferred += densities(model, features, None)
                # Where the inferred class is the given one, the densities of the official protocol are the same.
                same = official is model and (group_id is None or bool(inferred[-1].group_ids == group_id))
                given += inferred[-1:] if same else densities(official, features, group_id)
        group_names = [model.groups[int(image.group_ids)] for image in inferred]
        for number, (procedure, published) in enumerate(official.official_maps(given).items()):
            protocol = f"official {procedure}" if number else "official"
            if protocol not in tallies:
                tallies[protocol] = _Tally(official, dataset, False, details)
            tallies[protocol].add(samples, list(published.maps), published.scores, group_names)
            if description := _description(official, published.description):
                descriptions[protocol] = description
        if honest is not None:
            calibration = required_calibration(model)
            scored = [calibration.maps(image, msk_size, cells) for image in inferred]
            maps, scores = zip(*scored, strict=True)
            ids = torch.cat([image.group_ids for image in inferred])
            files = [printable(sample.path) for sample in samples]
            require_numbers(model, torch.cat(scores), ids, files.__getitem__)
            honest.add(samples, [anomaly_map[0] for anomaly_map in maps], torch.cat(scores), group_names)
    if honest is not None:
        tallies["honest"] = honest
    return Evaluation(
        figures={protocol: tally.figures for protocol, tally in tallies.items()},
        pooled={protocol: tally.pooled() for protocol, tally in tallies.items()},
        images={protocol: tally.images for protocol, tally in tallies.items()},
        checkpoints={protocol: tally.model.checkpoint for protocol, tally in tallies.items()},
        knows_classes=model.groups_are_classes,
        descriptions=descriptions,
    )


def _description(model: Detector, of_maps: str) -> str:
    """Return how an official protocol is described, given the description of its maps; empty where that is the rule."""
    if not _by_800(model):
        return of_maps
    return f"{of_maps or _DESCRIPTIONS['official']}, AUPRO 30 % by 800 thresholds as in the official code"


def _by_800(model: Detector) -> bool:
    """Return whether AUPRO 30 % of the official protocols is that of `metrics.pro_800`."""
    ways = {"exact": False, "official800": True}
    if model.official_aupro not in ways:
        raise ValueError(f"official_aupro is {model.official_aupro!r}; allowed are {', '.join(map(repr, ways))}")
    return ways[model.official_aupro]


class BestCheckpoint:
    """A callback of `fit` that keeps the checkpoint with the best official mean image AUROC on a test set.

    Published figures are those of such a checkpoint. Of several official protocols the first counts. The model is
    tested after every meta-epoch, and the best one so far is written to `path`, for ``evaluate(..., official=)``. Its
    figures flatter, because it is chosen by the very images that it is then measured on: its `Detector.checkpoint` says
    so, and it has no thresholds.

    Args:
        model: the detector that is trained.
        data: a dataset with test images, or its root.
        path: the file to write.
        resume: start with the checkpoint at `path`, if there is one, as the best so far; else it will be replaced.
        features_of: see `evaluate`; by default the features are computed anew each time.

    Raises:
        ValueError: no class has normal and anomalous test images, or the classes are not the model's.
    """

    def __init__(
        self,
        model: Detector,
        data: Dataset | str | os.PathLike[str],
        path: str | os.PathLike[str],
        *,
        resume: bool = False,
        features_of: Features | None = None,
    ) -> None:
        self.model, self.dataset, self.path = model, test_set(model, data), Path(path)
        self.features_of = features_of or functools.partial(_features, model)
        if not any(_has_both_labels(samples) for *_, samples in _classes(model, self.dataset)):
            raise ValueError(
                f"{printable(self.dataset.root)} has no class with both normal and anomalous test images: no "
                "checkpoint is best"
            )
        self.best = -math.inf
        if resume and self.path.is_file():
            self.best = self._auroc(load(self.path, model.device))

    def __call__(self, record: dict[str, Any]) -> None:
        """Test the model at the end of a meta-epoch, and save it if it is the best so far."""
        if record["sub_epoch"] < self.model.config.sub_epochs - 1:
            return
        auroc = self._auroc(self.model)
        if auroc > self.best:
            self.best, checkpoint = auroc, self.model.checkpoint
            self.model.checkpoint = f"best on the test set (mean image AUROC), meta-epoch {record['meta_epoch']}"
            self.model.save(self.path)
            self.model.checkpoint = checkpoint

    @torch.no_grad()
    def _auroc(self, model: Detector) -> float:
        """Return the mean image AUROC, under the official protocol, of the classes that have one."""
        aurocs = []
        for _, group_id, samples in _classes(model, self.dataset):
            if _has_both_labels(samples):
                given: list[Densities] = []
                for sample in samples:
                    given += densities(model, list(self.features_of(sample)), group_id)
                aurocs.append(
                    metrics.auroc(first_official(model, given).scores, [sample.is_anomalous for sample in samples])
                )
        return mean(aurocs)


def _has_both_labels(samples: Sequence[Sample]) -> bool:
    """Return whether there are both normal and anomalous images, as an AUROC needs."""
    return len({sample.is_anomalous for sample in samples}) == 2


def _classes(model: Detector, dataset: Dataset) -> Iterator[tuple[str, Tensor | None, list[Sample]]]:
    """Yield each class that has test images: its name, its group id (1,) where groups are classes, and the images."""
    in_order = sorted(dataset.test, key=lambda sample: sample.class_id)
    for k, samples in groupby(in_order, lambda sample: sample.class_id):
        name = dataset.class_names[k]
        group_id = torch.tensor([model.groups.index(name)]) if model.groups_are_classes else None
        yield name, group_id, list(samples)


def _features(model: Detector, sample: Sample) -> list[Tensor]:
    """Return the features of a test image, computed anew."""
    return image_features(model, read_image(sample.path, model.config.white_level))


def test_set(model: Detector, data: Dataset | str | os.PathLike[str]) -> Dataset:
    """Return the dataset, if it is fit to test the model on.

    Raises:
        ValueError: it has no test images, or classes that are not among the model's groups where these are classes.
    """
    dataset = data if isinstance(data, Dataset) else discover(data)
    unknown = set(dataset.class_names) - set(model.groups)
    if unknown and model.groups_are_classes:
        raise ValueError(f"{printable(dataset.root)} has classes the model does not know: {', '.join(sorted(unknown))}")
    if not dataset.test:
        raise ValueError(
            f"{printable(dataset.root)} has no test images; put them into <class>/test/good and <class>/test/<defect>"
        )
    return dataset


class _Tally:
    """The results of one protocol, class by class; the maps wait in a file for the figures of all classes together."""

    def __init__(self, model: Detector, dataset: Dataset, judged: bool, details: bool) -> None:
        self.model, self.dataset, self.judged, self.details = model, dataset, judged, details
        self.by_800 = not judged and _by_800(model)
        self.figures: dict[str, Figures] = {}
        self.images: list[ScoredImage] = []
        self.maps, self.masks = _Shelf(np.float32), _Shelf(np.bool_)

    def add(self, samples: list[Sample], maps: list[Tensor], scores: Tensor, group_names: list[str]) -> None:
        """Add all test images of one class, with their maps, scores (n,) and the groups that they are taken for."""
        start, maps, scores = len(self.maps), [anomaly_map.cpu() for anomaly_map in maps], scores.cpu()
        class_name = self.dataset.class_names[samples[0].class_id]
        images = []
        for sample, anomaly_map, score, group in zip(samples, maps, scores.tolist(), group_names, strict=True):
            if sample.mask or not sample.is_anomalous:
                self.maps.append(anomaly_map.numpy())
                self.masks.append(seen_mask(self.model, sample, anomaly_map).numpy())
            path = shown_path(sample, self.dataset)
            defect = printable(sample.defect)
            images.append(ScoredImage(path, class_name, group, defect, sample.is_anomalous, score))
        if self.judged:
            self._judge(images, scores)
        self.images += images
        self.figures[class_name] = self._figures(images, self.maps[start:], self.masks[start:])

    def pooled(self) -> Figures:
        """Return the figures of all images together."""
        return self._figures(self.images, self.maps, self.masks)

    def _judge(self, images: list[ScoredImage], scores: Tensor) -> None:
        """Set p-value, threshold and verdict of the images that have a threshold."""
        group_ids = torch.tensor([self.model.groups.index(image.inferred_class) for image in images])
        p_values, verdicts, thresholds, _ = required_calibration(self.model).judge(scores, group_ids)
        for i, image in enumerate(images):
            if not thresholds[i].isnan():
                image.p_value, image.threshold = float(p_values[i]), float(thresholds[i])
                image.is_flagged = bool(verdicts[i])

    def _figures(self, images: list[ScoredImage], maps: Sequence[Any], masks: Sequence[Any]) -> Figures:
        """Return the figures of images; `maps` and `masks` are of those that count for the pixel figures."""
        figures = Figures()
        scores = np.array([image.score for image in images])
        labels = np.array([image.is_anomalous for image in images])
        if labels.any() and not labels.all():
            for name, value in metrics.image_metrics(scores, labels).items():
                setattr(figures, f"image_{name}", value)
            if self.details:
                for name in ("auroc", "average_precision", "f1_max"):
                    interval = metrics.bootstrap_interval(scores, labels, getattr(metrics, name))
                    figures.intervals[f"image_{name}"] = interval
                figures.curves |= _curves_from("image", metrics.image_curves(scores, labels))
        if any(mask.any() for mask in masks) and any(not mask.all() for mask in masks):
            values = metrics.pixel_metrics(maps, masks)
            figures.pixel_aupro_30, figures.pixel_aupro_5 = values.pop("aupro_0.3"), values.pop("aupro_0.05")
            for name, value in values.items():
                setattr(figures, f"pixel_{name}", value)
            if self.by_800:
                figures.pixel_aupro_30 = metrics.pro_800(maps, masks)
            if self.details:
                intervals = metrics.pixel_intervals(maps, masks)
                figures.intervals["pixel_aupro_30"] = intervals.pop("aupro_0.3")
                figures.intervals["pixel_aupro_5"] = intervals.pop("aupro_0.05")
                figures.intervals |= {f"pixel_{name}": interval for name, interval in intervals.items()}
                if self.by_800:
                    del figures.intervals["pixel_aupro_30"]  # that of the exact figure
                figures.curves |= _curves_from("pixel", metrics.pixel_curves(maps, masks))
        return figures


def _figures_from(content: dict[str, Any]) -> Figures:
    """Return the figures that `Evaluation.to_dict` gave."""
    values = {name: math.nan if content[name] is None else content[name] for name in FIGURES}
    intervals = {name: (low, high) for name, (low, high) in content["intervals"].items()}
    curves = {name: (x, y) for name, (x, y) in content.get("curves", {}).items()}
    return Figures(**values, intervals=intervals, curves=curves)


def _curves_from(kind: str, curves: dict[str, np.ndarray]) -> dict[str, Curve]:
    """Return curves (2, n) of `metrics`, of the kind "image" or "pixel", as `Figures` holds them."""
    return {f"{kind}_{name}": (x.round(5).tolist(), y.round(5).tolist()) for name, (x, y) in curves.items()}


class _Shelf(Sequence[np.ndarray]):
    """Arrays of one type in a temporary file, each read when it is indexed."""

    def __init__(self, dtype: type[np.generic]) -> None:
        self.dtype = dtype
        self.file = tempfile.TemporaryFile()
        self.places: list[tuple[int, tuple[int, ...]]] = []  # offset and shape

    def append(self, array: np.ndarray) -> None:
        self.places.append((self.file.seek(0, os.SEEK_END), array.shape))
        self.file.write(array.astype(self.dtype, order="C").tobytes())

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        self.file.flush()
        offset, shape = self.places[i]
        return np.memmap(self.file, self.dtype, "r", offset, shape)


def shown_path(sample: Sample, dataset: Dataset) -> str:
    """Return the path of an image as `ScoredImage` has it."""
    path = sample.path
    return printable((path.relative_to(dataset.root) if path.is_relative_to(dataset.root) else path).as_posix())


def seen_mask(model: Detector, sample: Sample, anomaly_map: Tensor) -> Tensor:
    """Return what the model sees of an image's mask, (h, w) bool, at the size of its anomaly map (h, w)."""
    if sample.mask is None:
        return torch.zeros_like(anomaly_map, dtype=torch.bool)
    seen = preprocess(read_mask(sample.mask), model.config)
    return resize_mask(seen, (anomaly_map.shape[0], anomaly_map.shape[1]))


def mean(values: Iterable[float]) -> float:
    """Return the mean of the values that are not NaN; NaN if there are none."""
    known = [float(value) for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def without_nan(value: Any) -> Any:
    """Return a value as JSON takes it: NaN as None, tuples as lists."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
