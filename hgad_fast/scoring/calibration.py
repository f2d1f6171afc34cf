"""Held-out normal pictures -> normalisation constants, thresholds and p-values that can be trusted."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import score

if TYPE_CHECKING:
    from .features import FeatureSet, Progress
    from .model import HGADModel

MIN_POOLED = 3  # pictures a class needs to share in standardised scores: without one, two are left to make a spread


@dataclass
class Calibration:
    """What normal pictures that the training never saw look like to the model.

    A picture's p-value is conformal: the share, among it and n normal pictures of its class, of those that score at
    least as high. So normal pictures fall to p or below at rate p at most, whatever the distribution, and no p-value is
    below 1 / (n + 1). Where a class has too few pictures for `false_alarm_rate`, the scores of all classes stand in,
    each standardised by others of its class and brought to the scale of the class in question; this takes the scores of
    the classes to differ in location and scale alone. Where those are too few too, the lowest attainable rate stands.

    Attributes:
        level_max: (K, S) largest log-density over C that the class's normal pictures reach at each level.
        scores: (n,) image scores of the calibration pictures.
        class_ids: (n,) their classes.
        false_alarm_rate: share of normal pictures that may be called anomalous; may be set at any time.
        weights: (K, 2) of likelihood and entropy map with ``fusion="standardised"``: one over the height of each map's
            peaks, the mean over the class's normal pictures of the map's maximum, less its mean over all their pixels.
            Both count alike in their sum where normal pictures stand out most, whatever their tails. None: their
            product, as published; so too where no picture was held out.
        img_size: at which the pictures were seen; None where it is not known.
    """

    level_max: Tensor
    scores: Tensor
    class_ids: Tensor
    false_alarm_rate: float = 0.01
    weights: Tensor | None = None
    img_size: int | str | None = None

    def maps(self, found: score.Densities, msk_size: int, cells: int | None = None) -> Tensor:
        """See `score.calibrated_maps`."""
        return score.calibrated_maps(found, self.level_max, msk_size, self.weights, cells)

    def judge(self, image_score: Tensor, class_id: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """p-value, verdict, threshold and attainable false-alarm rate, (B,) each, of images (B,)."""
        p_value, threshold, rate = (torch.full((len(class_id),), math.nan, dtype=torch.float64) for _ in range(3))
        scores, class_id = image_score.detach().cpu().double(), class_id.cpu()
        for k in class_id.unique().tolist():
            reference = self._reference(k)
            n = len(reference)
            if n == 0:
                continue
            rows = class_id == k
            at_least = n - torch.searchsorted(reference, scores[rows])
            p_value[rows] = (1 + at_least).double() / (n + 1)
            alarms = math.floor(self.false_alarm_rate * (n + 1) + 1e-9)  # that n + 1 normal pictures may raise
            threshold[rows] = reference[n - min(max(alarms, 1), n)]
            rate[rows] = max(self.false_alarm_rate, 1 / (n + 1))
        return p_value, scores > threshold, threshold, rate

    def _reference(self, k: int) -> Tensor:
        """Sorted scores that pictures of class k are compared with, on the scale of its scores."""
        own, *others = (self.scores[self.class_ids == j].double() for j in self._lenders(k))
        if others:
            pooled = torch.cat([_standardised(scores, len(own)) for scores in (own, *others)])
            own = pooled * own.std() + own.mean()
        return own.sort().values

    def _lenders(self, k: int) -> list[int]:
        """Classes whose scores class k is compared with, itself first."""
        counts = torch.bincount(self.class_ids, minlength=len(self.level_max)).tolist()
        if counts[k] < MIN_POOLED or (counts[k] + 1) * self.false_alarm_rate >= 1 - 1e-9:
            return [k]
        return [k, *(j for j, count in enumerate(counts) if j != k and count >= MIN_POOLED)]

    def attainable_rate(self, k: int) -> float:
        """Lowest false-alarm rate at or above the wished one that the calibration pictures allow; NaN without any."""
        n = sum(int((self.class_ids == j).sum()) for j in self._lenders(k))
        return max(self.false_alarm_rate, 1 / (n + 1)) if n else math.nan

    def tensors(self) -> dict[str, Tensor]:
        tensors = {"level_max": self.level_max, "scores": self.scores, "class_ids": self.class_ids}
        return tensors if self.weights is None else tensors | {"weights": self.weights}

    def settings(self) -> dict[str, Any]:
        return {"false_alarm_rate": self.false_alarm_rate, "img_size": self.img_size}

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, Tensor], false_alarm_rate: float = 0.01, img_size: int | str | None = None
    ) -> Calibration:
        return cls(**tensors, false_alarm_rate=false_alarm_rate, img_size=img_size)


def _standardised(scores: Tensor, count: int) -> Tensor:
    """(s_i - mean) / std with mean and std of `count` other scores, or of all others where there are fewer.

    That is what a picture outside the set is given in a class of `count` pictures: had the others more to go by, their
    scores would spread less, and the class would raise too many alarms.
    """
    n = len(scores)
    others = scores[(torch.arange(n)[:, None] + torch.arange(1, min(count, n - 1) + 1)) % n]
    return (scores - others.mean(1)) / others.std(1).clamp(min=1e-12)


def calibrate(
    model: HGADModel, data: Any, *, false_alarm_rate: float = 0.01, img_size: int | str | None = None
) -> None:
    """Set `model.calibration` from normal pictures that were not trained on.

    Args:
        model: a trained detector.
        data: a dataset root or `Dataset` (its training images are used) or a `FeatureSet`.
        false_alarm_rate: share of normal pictures that may be called anomalous.
        img_size: short side at which the pictures are seen, or ``"native"``, as they will be scored; default the
            model's.

    Raises:
        ValueError: the classes are not the model's, or one has no pictures.
    """
    from .features import feature_set

    check_false_alarm_rate(false_alarm_rate)
    seen = score.seeing(model, img_size)
    features = feature_set(seen, data)
    model.config = model.config.replace(class_names=seen.config.class_names)
    calibrate_on(model, features, false_alarm_rate, img_size=seen.config.img_size)


def calibrate_on(
    model: HGADModel,
    held_out: FeatureSet,
    false_alarm_rate: float = 0.01,
    stand_in: FeatureSet | None = None,
    img_size: int | str | None = None,
) -> None:
    """Set `model.calibration` from features of held-out normal pictures.

    `stand_in` (training pictures) gives the normalisation constants of a class of which nothing was held out; such a
    class has no p-values of its own. `img_size` is that of the pictures, default the model's.
    """
    img_size = model.config.img_size if img_size is None else img_size
    check_false_alarm_rate(false_alarm_rate)
    classes, levels = model.config.n_classes, model.config.feature_levels
    found = held_out_densities(model, held_out)
    level_max = largest(found, classes, levels)
    for k in set(range(classes)).difference(held_out.class_ids.tolist()):
        rows = [] if stand_in is None else (stand_in.class_ids == k).nonzero().flatten().tolist()
        if not rows:
            raise ValueError(
                f"calibration needs normal pictures of every class; there is none of {model.class_names[k]!r}"
            )
        assert stand_in is not None
        for i in rows:
            level_max[k] = torch.maximum(level_max[k], _level_max(_image_densities(model, stand_in, i)))
    if not level_max.isfinite().all():
        k = int((~level_max.isfinite()).nonzero()[0, 0])
        raise ValueError(f"normal pictures of {model.class_names[k]!r} have no finite density: the training diverged")
    calibration = calibration_of(model, found, level_max, img_size)
    calibration.false_alarm_rate = false_alarm_rate
    _warn_of_unattainable_rates(model, calibration)
    model.calibration = calibration


def held_out_densities(
    model: HGADModel,
    held_out: FeatureSet,
    progress: Progress = lambda items, title: items,
) -> list[score.Densities]:
    """Of each picture under its own class. `progress` may wrap the loop."""
    return [
        _image_densities(model, held_out, i) for i in progress(range(len(held_out)), "densities of normal pictures")
    ]


def largest(found: Sequence[score.Densities], classes: int, levels: int) -> Tensor:
    """`Calibration.level_max` of pictures; -inf for classes without any."""
    level_max = torch.full((classes, levels), -math.inf)
    for item in found:
        k = int(item.class_id)
        level_max[k] = torch.maximum(level_max[k], _level_max(item))
    return level_max


def calibration_of(
    model: HGADModel, found: Sequence[score.Densities], level_max: Tensor, img_size: int | str
) -> Calibration:
    """What follows from the densities of held-out normal pictures."""
    cells = score.cells_on_map(model, img_size)
    class_ids = torch.cat([item.class_id for item in found]) if found else torch.empty(0, dtype=torch.int64)
    calibration = Calibration(level_max, torch.empty(0), class_ids, img_size=img_size)
    if model.config.fusion == "standardised" and model.config.n_classes > 1 and found:
        calibration.weights = _weights(model, found, level_max, cells)
    maps = [calibration.maps(item, model.config.msk_size, cells) for item in found]
    calibration.scores = torch.tensor([float(m.max()) for m in maps])
    return calibration


def _weights(model: HGADModel, found: Sequence[score.Densities], level_max: Tensor, cells: int | None) -> Tensor:
    """(K, 2), see `Calibration`; a class of which nothing was held out takes the mean of the others."""
    size, alone = model.config.msk_size, torch.eye(2)
    sums = torch.zeros(len(level_max), 2, 3, dtype=torch.float64)  # of each map: pictures, maxima, means
    for item in found:
        for j in range(2):
            pixels = score.calibrated_maps(item, level_max, size, alone[j].expand(len(level_max), 2), cells).double()
            added = [1.0, float(pixels.max()), float(pixels.mean())]
            sums[int(item.class_id), j] += torch.tensor(added, dtype=torch.float64)
    count, maxima, means = sums.unbind(2)
    weights = ((maxima - means) / count).clamp(min=1e-12).reciprocal()
    return torch.where(count > 0, weights, weights[count[:, 0] > 0].mean(0)).float()


def check_false_alarm_rate(rate: float) -> None:
    if not 0 < rate < 1:
        raise ValueError(f"false_alarm_rate is {rate}; allowed: above 0 and below 1")


def _level_max(found: score.Densities) -> Tensor:
    return torch.stack([level.max().cpu() for level in found.logps])


def _image_densities(model: HGADModel, features: FeatureSet, i: int) -> score.Densities:
    images = features.images if features.exact is None else features.exact
    maps = [level[None].to(model.device) for level in images[i]]
    (found,) = score.densities(model, maps, features.class_ids[i : i + 1].cpu())
    return found


def _warn_of_unattainable_rates(model: HGADModel, calibration: Calibration) -> None:
    wished = calibration.false_alarm_rate
    rates = {name: calibration.attainable_rate(k) for k, name in enumerate(model.class_names)}
    short = [f"{name} {rate:.1%}" for name, rate in rates.items() if rate > wished]
    short += [f"{name} has no threshold" for name, rate in rates.items() if math.isnan(rate)]
    if short and len(calibration.scores):
        warnings.warn(
            f"too few calibration pictures for a false-alarm rate of {wished:.1%}; thresholds stand for: "
            + ", ".join(short),
            stacklevel=3,
        )


def split(class_ids: Tensor, fraction: float, seed: int, at_least: int = 8) -> tuple[Tensor, Tensor]:
    """Indices (train, calibration) of a seeded split of normal pictures, class by class.

    A class lends `fraction` of its pictures, but at least `at_least` of them, and never more than half.
    """
    generator = torch.Generator().manual_seed(seed)
    train: list[Tensor] = []
    held_out: list[Tensor] = []
    for k in class_ids.unique().tolist():
        members = (class_ids == k).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        count = min(max(math.ceil(fraction * len(members)), at_least), len(members) // 2) if fraction else 0
        held_out.append(members[:count])
        train.append(members[count:])
    return torch.cat(train).sort().values, torch.cat(held_out).sort().values
