"""Figures of a trained model on a labelled test set, under two protocols side by side.

``official``: the class of each picture is given, and maps are normalised by maxima over the test set of the class, as
published; the published checkpoint is moreover the best one on the test set (`BestCheckpoint` keeps it).
``honest``: the class is inferred and every score depends on its picture alone, with the last checkpoint and thresholds
from held-out normal pictures, as in use.
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
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import data as pictures
from . import metrics, score

if TYPE_CHECKING:
    from .features import Progress
    from .model import HGADModel

PROTOCOLS = ("official", "honest")
Features = Callable[[pictures.Sample], Sequence[Tensor]]  # of a picture: one (1, C, h, w) a level
Curve = tuple[list[float], list[float]]  # x and y of a line to draw


@dataclass
class Figures:
    """Figures of one class, of all pictures together or a mean, in [0, 1]; NaN where the test set cannot tell.

    Attributes:
        pixel_aupro_30, pixel_aupro_5: per-region overlap up to the false-positive rates 0.3 and 0.05.
        intervals: 95% bootstrap intervals over the pictures, by the names of the figures.
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


FIGURES = tuple(f.name for f in fields(Figures) if f.name not in ("intervals", "curves"))


@dataclass
class Picture:
    """What one protocol says of a test picture.

    Attributes:
        path: below the dataset's root where it lies there.
        class_name, inferred_class: its own, and the one that the model takes it for.
        score: the class's own unit; compare it within a class.
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
        pooled: protocol -> figures of all pictures together, one threshold for all classes.
        pictures: protocol -> every test picture.
        checkpoints: protocol -> which state of the training was tested: "last", or how it was chosen.
    """

    figures: dict[str, dict[str, Figures]]
    pooled: dict[str, Figures]
    pictures: dict[str, list[Picture]]
    checkpoints: dict[str, str]

    def mean(self, protocol: str) -> Figures:
        """Unweighted mean over the classes that have the figure."""
        figures = Figures()
        for name in FIGURES:
            setattr(figures, name, mean(getattr(row, name) for row in self.figures[protocol].values()))
        return figures

    @property
    def confusion(self) -> dict[str, dict[str, int]]:
        """Class -> inferred class -> number of pictures."""
        counts: dict[str, Counter[str]] = {}
        for picture in self._any():
            counts.setdefault(picture.class_name, Counter())[picture.inferred_class] += 1
        return {name: dict(row) for name, row in counts.items()}

    @property
    def inferred_class_accuracy(self) -> float:
        """Share of pictures whose inferred class is their own."""
        return mean(picture.inferred_class == picture.class_name for picture in self._any())

    @property
    def false_alarm_rate(self) -> float:
        """Share of normal test pictures called anomalous, of those with a threshold; NaN without any."""
        return self._flagged(False)

    @property
    def recall(self) -> float:
        """Share of anomalous test pictures called anomalous, of those with a threshold; NaN without any."""
        return self._flagged(True)

    @property
    def n_normal(self) -> int:
        return sum(not picture.is_anomalous for picture in self._any())

    @property
    def n_anomalous(self) -> int:
        return sum(picture.is_anomalous for picture in self._any())

    def _any(self) -> list[Picture]:
        return next(iter(self.pictures.values()))

    def _flagged(self, is_anomalous: bool) -> float:
        judged = (p for p in self.pictures.get("honest", ()) if p.is_anomalous == is_anomalous)
        return mean(picture.is_flagged for picture in judged if picture.is_flagged is not None)

    def to_dict(self, details: bool = True) -> dict[str, Any]:
        """Everything as JSON takes it, NaN as None; without `details` no curves and no single pictures."""

        def plain(row: Figures) -> dict[str, Any]:
            return {k: v for k, v in asdict(row).items() if details or k != "curves"}

        protocols = {
            protocol: {
                "checkpoint": self.checkpoints[protocol],
                "classes": {name: plain(row) for name, row in rows.items()},
                "mean": {name: getattr(self.mean(protocol), name) for name in FIGURES},
                "pooled": plain(self.pooled[protocol]),
            }
            for protocol, rows in self.figures.items()
        }
        summary = ("inferred_class_accuracy", "confusion", "false_alarm_rate", "recall", "n_normal", "n_anomalous")
        whole: dict[str, Any] = {"protocols": protocols, **{name: getattr(self, name) for name in summary}}
        if details:
            whole["pictures"] = {p: [asdict(picture) for picture in found] for p, found in self.pictures.items()}
        return without_nan(whole)

    @classmethod
    def from_dict(cls, read: dict[str, Any]) -> Evaluation:
        """What `to_dict` gave with its details, perhaps through JSON."""
        protocols = read["protocols"]
        return cls(
            figures={p: {name: _figures_from(row) for name, row in protocols[p]["classes"].items()} for p in protocols},
            pooled={p: _figures_from(protocols[p]["pooled"]) for p in protocols},
            pictures={p: [Picture(**picture) for picture in found] for p, found in read["pictures"].items()},
            checkpoints={p: protocols[p]["checkpoint"] for p in protocols},
        )

    def table(self) -> str:
        """Text tables in percent: AUROC, average precision and F1max of pictures and pixels, and AUPRO."""
        lines = []
        for protocol, rows in self.figures.items():
            lines.append(f"{protocol} protocol: {_DESCRIPTIONS[protocol]}, checkpoint: {self.checkpoints[protocol]}")
            lines.append(f"{'':<22}" + "".join(f"{head:>9}" for head in _HEADS))
            last = {"mean": self.mean(protocol), "pooled": self.pooled[protocol]}
            for name, row in (*rows.items(), *last.items()):
                lines.append(f"{name:<22}" + "".join(f"{_percent(getattr(row, figure)):>9}" for figure in FIGURES))
            lines.append("")
        total = self.n_normal + self.n_anomalous
        lines.append(f"inferred class right in {self.inferred_class_accuracy:.1%} of {total} pictures")
        if not (math.isnan(self.recall) and math.isnan(self.false_alarm_rate)):
            lines.append(
                f"at the thresholds: {_percent(self.recall)}% of the {self.n_anomalous} defects found, "
                f"{_percent(self.false_alarm_rate)}% false alarms among the {self.n_normal} normal pictures"
            )
        return "\n".join(lines)


_DESCRIPTIONS = {
    "official": "class given, maps normalised over the test set of the class",
    "honest": "class inferred, each score from its picture alone",
}
# i: of pictures, p: of pixels
_HEADS = ("i-AUROC", "i-AP", "i-F1max", "p-AUROC", "p-AP", "p-F1max", "AUPRO.3", "AUPRO.05")


@torch.no_grad()
def evaluate(
    model: HGADModel,
    data: pictures.Dataset | str | os.PathLike[str],
    *,
    official: HGADModel | None = None,
    img_size: int | str | None = None,
    features_of: Features | None = None,
    details: bool = True,
    progress: Progress | None = None,
) -> Evaluation:
    """Score the test pictures of a dataset and compare with their labels and masks.

    Maps and masks are compared at the size that scores are computed on (`msk_size`), after the model's own
    preprocessing. With another `img_size` the maps of the honest protocol grow along, as in `score`; those of the
    official one do not. Without calibration only the official protocol is reported. A picture of a defect without a
    mask counts for the image figures alone.

    Args:
        model: the detector.
        data: a dataset with test pictures, or its root.
        official: another checkpoint of the same training, for the official protocol (see `BestCheckpoint`).
        img_size: short side at which pictures are seen, or ``"native"``; default the model's.
        features_of: gives the features of a test picture where they are at hand already.
        details: also bootstrap intervals and curves.
        progress: wraps the loop over the pictures, e.g. in a progress bar with the given title.

    Raises:
        ValueError: the dataset's classes are not the model's, or it has no test pictures.
    """
    dataset = test_set(model, data)
    _, cells = score.seen_at(model, img_size)
    model = score.seeing(model, img_size)
    official = model if official is None else score.seeing(official, img_size)
    features_of = features_of or functools.partial(_features, model)
    tallies = {"official": _Tally(official, dataset, False, details)}
    if model.calibration is not None:
        tallies["honest"] = _Tally(model, dataset, True, details)
    for class_id, samples in _classes(model, dataset):
        given, inferred = [], []
        for sample in progress(samples, f"scoring {model.class_names[int(class_id)]}") if progress else samples:
            features = list(features_of(sample))
            inferred += score.densities(model, features, None)
            own = official is model and bool(inferred[-1].class_id == class_id)
            given += inferred[-1:] if own else score.densities(official, features, class_id)
        names = [model.class_names[int(guess.class_id)] for guess in inferred]
        tallies["official"].add(samples, list(score.official_maps(given, model.config.msk_size)), names)
        if model.calibration is not None:
            maps = [model.calibration.maps(guess, model.config.msk_size, cells)[0] for guess in inferred]
            tallies["honest"].add(samples, maps, names)
    return Evaluation(
        figures={protocol: tally.figures for protocol, tally in tallies.items()},
        pooled={protocol: tally.pooled() for protocol, tally in tallies.items()},
        pictures={protocol: tally.pictures for protocol, tally in tallies.items()},
        checkpoints={protocol: tally.model.checkpoint for protocol, tally in tallies.items()},
    )


class BestCheckpoint:
    """A callback of `fit` that keeps the checkpoint with the best official mean image AUROC on a test set.

    That is what the published figures are of. The model is tested after every meta-epoch, and the best so far is
    written to `path`, to be given as ``evaluate(..., official=)``. Its figures flatter, as it is chosen by the very
    pictures that it is then measured on: `HGADModel.checkpoint` says so, and it has no thresholds.

    Args:
        model: the detector that is trained.
        data: a dataset with test pictures, or its root.
        path: the file.
        resume: go on from the checkpoint that lies there, if one does, instead of replacing it.
        features_of: see `evaluate`; by default the features are computed anew each time.

    Raises:
        ValueError: no class has normal and anomalous test pictures, or the classes are not the model's.
    """

    def __init__(
        self,
        model: HGADModel,
        data: pictures.Dataset | str | os.PathLike[str],
        path: str | os.PathLike[str],
        *,
        resume: bool = False,
        features_of: Features | None = None,
    ) -> None:
        self.model, self.dataset, self.path = model, test_set(model, data), Path(path)
        self.features_of = features_of or functools.partial(_features, model)
        if not any(len({s.is_anomalous for s in samples}) == 2 for _, samples in _classes(model, self.dataset)):
            raise ValueError(
                f"{self.dataset.root} has no class with both normal and anomalous test pictures: no checkpoint is best"
            )
        self.best = -math.inf
        if resume and self.path.is_file():
            self.best = self._auroc(type(model).load(self.path, model.device))

    def __call__(self, record: dict[str, Any]) -> None:
        if record["sub_epoch"] < self.model.config.sub_epochs - 1:
            return
        auroc = self._auroc(self.model)
        if auroc > self.best:
            self.best, checkpoint = auroc, self.model.checkpoint
            self.model.checkpoint = f"best on the test set (mean image AUROC), meta-epoch {record['meta_epoch']}"
            self.model.save(self.path)
            self.model.checkpoint = checkpoint

    @torch.no_grad()
    def _auroc(self, model: HGADModel) -> float:
        found = []
        for class_id, samples in _classes(model, self.dataset):
            labels = [sample.is_anomalous for sample in samples]
            if 0 < sum(labels) < len(labels):
                given = [part for s in samples for part in score.densities(model, list(self.features_of(s)), class_id)]
                found.append(metrics.auroc(score.official_maps(given, model.config.msk_size).amax((1, 2)), labels))
        return mean(found)


def _classes(model: HGADModel, dataset: pictures.Dataset) -> Iterator[tuple[Tensor, list[pictures.Sample]]]:
    """The class, as the model counts (1,), and its test pictures."""
    in_order = sorted(dataset.test, key=lambda sample: sample.class_id)
    for k, samples in groupby(in_order, lambda sample: sample.class_id):
        yield torch.tensor([model.class_names.index(dataset.class_names[k])]), list(samples)


def _features(model: HGADModel, sample: pictures.Sample) -> list[Tensor]:
    return score.picture_features(model, pictures.read_image(sample.path))


def test_set(model: HGADModel, data: pictures.Dataset | str | os.PathLike[str]) -> pictures.Dataset:
    """A dataset with test pictures, of classes that the model knows.

    Raises:
        ValueError: it is none.
    """
    dataset = data if isinstance(data, pictures.Dataset) else pictures.discover(data)
    unknown = set(dataset.class_names) - set(model.class_names)
    if unknown:
        raise ValueError(f"{dataset.root} has classes the model does not know: {', '.join(sorted(unknown))}")
    if not dataset.test:
        raise ValueError(
            f"{dataset.root} has no test pictures; put them into <class>/test/good and <class>/test/<defect>"
        )
    return dataset


class _Tally:
    """What one protocol gives, class by class; the maps wait in a file for the figures of all classes together."""

    def __init__(self, model: HGADModel, dataset: pictures.Dataset, judged: bool, details: bool) -> None:
        self.model, self.dataset, self.judged, self.details = model, dataset, judged, details
        self.figures: dict[str, Figures] = {}
        self.pictures: list[Picture] = []
        self.maps, self.masks = _Shelf(np.float32), _Shelf(np.bool_)

    def add(self, samples: list[pictures.Sample], maps: list[Tensor], inferred: list[str]) -> None:
        """All test pictures of one class."""
        start, maps = len(self.maps), [m.cpu() for m in maps]
        scores = torch.stack([m.max() for m in maps])
        name = self.dataset.class_names[samples[0].class_id]
        found = []
        for sample, m, value, guess in zip(samples, maps, scores.tolist(), inferred, strict=True):
            if sample.mask or not sample.is_anomalous:
                self.maps.append(m.numpy())
                self.masks.append(seen_mask(self.model, sample, m).numpy())
            path = sample.path
            if path.is_relative_to(self.dataset.root):
                path = path.relative_to(self.dataset.root)
            found.append(Picture(path.as_posix(), name, guess, sample.defect, sample.is_anomalous, value))
        if self.judged:
            self._judge(found, scores)
        self.pictures += found
        self.figures[name] = self._figures(found, self.maps[start:], self.masks[start:])

    def pooled(self) -> Figures:
        return self._figures(self.pictures, self.maps, self.masks)

    def _judge(self, found: list[Picture], scores: Tensor) -> None:
        calibration = self.model.calibration
        assert calibration is not None
        class_ids = torch.tensor([self.model.class_names.index(picture.inferred_class) for picture in found])
        p_values, verdicts, thresholds, _ = calibration.judge(scores, class_ids)
        for i, picture in enumerate(found):
            if not thresholds[i].isnan():
                picture.p_value, picture.threshold = float(p_values[i]), float(thresholds[i])
                picture.is_flagged = bool(verdicts[i])

    def _figures(self, found: list[Picture], maps: Sequence[Any], masks: Sequence[Any]) -> Figures:
        figures = Figures()
        scores, labels = np.array([p.score for p in found]), np.array([p.is_anomalous for p in found])
        if labels.any() and not labels.all():
            for name, value in metrics.image_metrics(scores, labels).items():
                setattr(figures, f"image_{name}", value)
            if self.details:
                for name in ("auroc", "average_precision", "f1_max"):
                    interval = metrics.bootstrap_interval(scores, labels, getattr(metrics, name))
                    figures.intervals[f"image_{name}"] = interval
                figures.curves |= _lines("image", metrics.image_curves(scores, labels))
        if any(mask.any() for mask in masks) and any(not mask.all() for mask in masks):
            values = metrics.pixel_metrics(maps, masks)
            figures.pixel_aupro_30, figures.pixel_aupro_5 = values.pop("aupro_0.3"), values.pop("aupro_0.05")
            for name, value in values.items():
                setattr(figures, f"pixel_{name}", value)
            if self.details:
                intervals = metrics.pixel_intervals(maps, masks)
                figures.intervals["pixel_aupro_30"] = intervals.pop("aupro_0.3")
                figures.intervals["pixel_aupro_5"] = intervals.pop("aupro_0.05")
                figures.intervals |= {f"pixel_{name}": interval for name, interval in intervals.items()}
                figures.curves |= _lines("pixel", metrics.pixel_curves(maps, masks))
        return figures


def _figures_from(read: dict[str, Any]) -> Figures:
    known = {name: math.nan if read[name] is None else read[name] for name in FIGURES}
    intervals = {name: (low, high) for name, (low, high) in read["intervals"].items()}
    curves = {name: (x, y) for name, (x, y) in read.get("curves", {}).items()}
    return Figures(**known, intervals=intervals, curves=curves)


def _lines(kind: str, curves: dict[str, np.ndarray]) -> dict[str, Curve]:
    """Curves (2, n) as JSON takes them."""
    return {f"{kind}_{name}": (x.round(5).tolist(), y.round(5).tolist()) for name, (x, y) in curves.items()}


class _Shelf(Sequence[np.ndarray]):
    """Arrays of one type in a temporary file, each read when asked for."""

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


def seen_mask(model: HGADModel, sample: pictures.Sample, anomaly_map: Tensor) -> Tensor:
    """What the model sees of the mask, at the size of the map, (h, w) bool."""
    if sample.mask is None:
        return torch.zeros_like(anomaly_map, dtype=torch.bool)
    prepare = pictures.centre_crop if model.config.center_crop else pictures.whole_picture
    seen = prepare(pictures.read_mask(sample.mask), model.config.img_size)
    return pictures.resize_mask(seen, (anomaly_map.shape[0], anomaly_map.shape[1]))


def mean(values: Iterable[float]) -> float:
    """Of those that are no NaN; NaN without any."""
    known = [float(value) for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def without_nan(value: Any) -> Any:
    """What JSON takes: NaN as None, tuples as lists."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
