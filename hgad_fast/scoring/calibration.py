"""Calibration: normalisation constants, thresholds and p-values from held-out normal images."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.datasets import Dataset, are_roots, discover
from ..environment import plain_torch
from ..features.extract import FeatureSet, ShowProgress, feature_set
from ..features.preprocess import seeing
from ..files import printable
from ..protocol import Densities, Detector
from ..terminal import warn_user
from .densities import densities, naming
from .maps import Fill, calibrated_maps, cells_on_map, map_grid, write_calibrated
from .rates import MAX_LISTED, MIN_POOLED, NO_THRESHOLDS, described, listed, shortcomings

TENSORS = ("level_max", "scores", "class_ids")  # that a calibration has
WEIGHT_TENSORS = ("weights", "score_weights")  # and may have
POOLED_TENSORS = ("pooled_scores", "pooled_ids")


class _References(NamedTuple):
    """Scores that images are compared with, and what they were made of."""

    rules: tuple[float, bool]
    scores: Tensor
    class_ids: Tensor
    by_group: dict[int, Tensor]


@dataclass
class Calibration:
    """Statistics of held-out normal images, which give the p-value and the verdict of any other image.

    An image's p-value is conformal: the share, among the image itself and n normal images of its group, of those that
    score at least as high. So normal images have p-values of p or less at a rate of at most p, whatever the
    distribution of the scores, and no p-value is below 1 / (n + 1). Where a group has too few images for
    `false_alarm_rate`, the scores of all groups are pooled, each standardised by others of its group and brought to the
    scale of the group in question; this assumes that the scores of the groups differ in location and scale alone. Where
    these are too few as well, the threshold stands for the lowest attainable rate. Groups are the classes, or those
    that a method forms by itself.

    A class has images, or calibration is refused. Groups that a method forms by itself may have few or none, and yet an
    image may fall to them: to call it normal, because nothing is known, would miss its defects. So with `borrowing` a
    group of fewer than `MIN_POOLED` images borrows. Its normalisation constants are the largest that any group reaches,
    its own included: what no group knows counts as anomalous, and scores are rather too high than too low. They are
    compared with the scores of the images of all groups together, as they are: there are too few of its own to say what
    its scale is. Its p-values are finite, and are valid as far as its normal images score like those of the others; as
    a rule they score higher and raise more false alarms than the target, which is the safe side.

    Attributes:
        level_max: (G, S) largest log-density, divided by C, that the group's normal images reach at each level.
        scores: (n,) image scores of the calibration images.
        class_ids: (n,) their groups.
        false_alarm_rate: target share of normal images that may be called anomalous; may be set at any time.
        weights: (G, parts) of the maps of the parts of the densities. With ``fusion="standardised"`` it is one over the
            height of the map's peaks, which is the mean over the group's normal images of the map's maximum, less its
            mean over all their pixels. In their sum all maps count alike where normal images stand out most, whatever
            their tails. Where one part makes the map alone, the others have 0, and it has 1, or where scores are of
            another map its weight in the sum. Without held-out images those trained on take their place. None: there is
            one map, or they are multiplied, as published.
        img_size: the size at which the images were seen; None where it is not known.
        borrowing: whether groups with fewer than `MIN_POOLED` images borrow from the others.
        share: share of a map's pixels, the largest ones, whose mean is the image score; 0: their maximum.
        scored_on: the scope of the anomalies (`Densities.anomalies`) whose map gives the image score; with another one
            than ``"map"`` nobody sees that map.
        score_weights: (G, parts) of the parts in that map, made like `weights`; None where it is the anomaly map. Both
            maps are in units of the peaks of normal images then, so that the threshold of the scores says of a pixel of
            the anomaly map, too, how far beyond the normal it is.
        pooled_scores: (m,) float64, on the scale of the group, and ascending: what the scores of groups are compared
            with that kept their thresholds when others were renewed (`renewed`).
        pooled_ids: (m,) their groups. Both are None where nothing was renewed.
    """

    level_max: Tensor
    scores: Tensor
    class_ids: Tensor
    false_alarm_rate: float = 0.01
    weights: Tensor | None = None
    img_size: int | str | None = None
    borrowing: bool = False
    share: float = 0.0
    scored_on: str = "map"
    score_weights: Tensor | None = None
    pooled_scores: Tensor | None = None
    pooled_ids: Tensor | None = None
    _references: _References | None = field(default=None, init=False, repr=False, compare=False)
    _told: set[int] = field(default_factory=set, init=False, repr=False, compare=False)  # groups warned of

    def maps(self, densities: Densities, msk_size: int, cells: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the `calibrated_maps` of densities, (B, h, w), and the image scores, (B,)."""
        grid = map_grid(densities, msk_size, cells)
        maps = densities.logps[0].new_empty(len(densities.group_ids), *grid)
        return maps, self._write(maps, densities, grid)

    def fill(self, densities: Densities, msk_size: int, cells: int | None = None) -> Fill:
        """Return the `Fill` of the map of one image."""
        grid = map_grid(densities, msk_size, cells)
        return Fill(lambda out: self._write(out[None], densities, grid)[0], grid)

    def scores_alone(self, densities: Densities, msk_size: int, cells: int | None = None) -> Tensor:
        """Return the image scores (B,) of densities, without the maps."""
        return self._scores(densities, map_grid(densities, msk_size, cells))

    def _write(self, out: Tensor, densities: Densities, grid: tuple[int, int]) -> Tensor:
        """Fill `out` (B, H, W) with the maps, and return the image scores (B,)."""
        if self.scored_on == "map":
            scores = write_calibrated(out, densities, self.level_max, grid, self.weights, self.share)
            return numbers(scores, densities)
        largest = write_calibrated(out, densities, self.level_max, grid, self.weights)
        return self._scores(densities, grid).to(out).where(largest.isfinite(), math.nan)

    def _scores(self, densities: Densities, grid: tuple[int, int]) -> Tensor:
        """Return the image scores (B,)."""
        weights = self.weights if self.scored_on == "map" else self.score_weights
        scores = write_calibrated(None, densities, self.level_max, grid, weights, self.share, self.scored_on)
        return numbers(scores, densities)

    def judge(self, image_score: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return p-value, verdict, threshold and attainable false-alarm rate, (B,) each, of B images."""
        p_value, threshold, rate = (torch.full((len(group_ids),), math.nan, dtype=torch.float64) for _ in range(3))
        scores, group_ids = image_score.detach().cpu().double(), group_ids.cpu()
        for k in group_ids.unique().tolist():
            reference = self.reference(k)
            n = len(reference)
            if n == 0:
                continue
            rows = group_ids == k
            as_high = n - torch.searchsorted(reference, scores[rows])  # reference scores that are at least as high
            p_value[rows] = (1 + as_high).double() / (n + 1)
            threshold[rows] = self.threshold(k)
            rate[rows] = self.attained_rate(k)
        # A score that is not a number passes every threshold.
        return p_value, ~(scores <= threshold) & threshold.isfinite(), threshold, rate

    def threshold(self, k: int) -> float:
        """Return the score above which an image of group k is called anomalous; NaN if nothing is known of the group.

        It is the largest one of its kind that calls no more than the target share of normal images anomalous, or where
        the images are too few for that, the largest score of all that images are compared with.
        """
        reference = self.reference(k)
        return float(reference[len(reference) - self._alarms(len(reference))]) if len(reference) else math.nan

    def attained_rate(self, k: int) -> float:
        """Return the false-alarm rate of group k's threshold; NaN if it has none.

        It is the largest p-value of an image that is called anomalous. Of n + 1 exchangeable normal images, n of them
        those that the threshold rests on, each is as likely as any other to be among the k highest: the rate is
        k / (n + 1), k at least 1, the largest that is no more than the target, or else 1 / (n + 1), which is more. With
        ties among the scores it is an upper bound.
        """
        return self._rate_from(len(self.reference(k)))

    def _rate_from(self, n: int) -> float:
        """Return the false-alarm rate of a threshold that rests on n images; NaN for none."""
        return self._alarms(n) / (n + 1) if n else math.nan

    def _alarms(self, n: int) -> int:
        """Return how many of n + 1 normal images a threshold from n of them may call anomalous."""
        return min(max(math.floor(self.false_alarm_rate * (n + 1) + 1e-9), 1), n)

    def rates(self, names: Sequence[str], thresholds: bool = True) -> list[dict[str, Any]]:
        """Return a row for each group, of its name in `names`: what its threshold rests on, and what it stands for.

        Without `thresholds` these are left out, which takes no time even where there are very many groups.

        Its keys:
            group: the name.
            images: the number of its own calibration images.
            reference: the number of images that the threshold rests on; more than `images` where they are pooled.
            pooled: whether the threshold rests on scores of other groups, too: pooled, or borrowed.
            target: the false-alarm rate asked for.
            attained: that of the threshold, see `attained_rate`; NaN where there is none.
            threshold: the image score above which an image is called anomalous; NaN: never.
        """
        return [
            {
                "group": name,
                "images": images,
                "reference": n,
                "pooled": n > images,
                "target": self.false_alarm_rate,
                "attained": self._rate_from(n),
                **({"threshold": self.threshold(k)} if thresholds else {}),
            }
            for k, (name, images, n) in enumerate(zip(names, self.counts, self._reference_sizes(), strict=True))
        ]

    def _reference_sizes(self) -> list[int]:
        """Return the number of scores in `_reference` of each group."""
        counts = self.counts
        pooled = sum(count for count in counts if count >= MIN_POOLED)
        frozen = [0] * len(counts)
        if self.pooled_ids is not None:
            frozen = torch.bincount(self.pooled_ids, minlength=len(counts)).tolist()
        return [
            len(self.scores) if self.borrowing and n < MIN_POOLED else n if self._suffice(n) else frozen[k] or pooled
            for k, n in enumerate(counts)
        ]

    def _suffice(self, n: int) -> bool:
        """Return whether a group of n images is compared with them alone: they do, or pooling takes more."""
        return n < MIN_POOLED or (n + 1) * self.false_alarm_rate >= 1 - 1e-9

    def describe(self, names: Sequence[str]) -> dict[str, str]:
        """Return what `rates` says of groups with these names, by titles, for people (`rates.described`)."""
        return described(self.rates(names, len(names) <= MAX_LISTED), len(self.scores), self.false_alarm_rate)

    def shortcomings(self, names: Sequence[str]) -> str:
        """Return what users should know of the thresholds, and the remedy; empty: nothing (`rates.shortcomings`)."""
        return shortcomings(self.rates(names, thresholds=False), self.false_alarm_rate, self.borrowing)

    def warn_of_silence(self, names: Sequence[str], group_ids: Tensor) -> None:
        """Warn, once for each group, where images of these groups can raise no alarm."""
        for k in sorted(set(group_ids.tolist()) - self._told):
            if len(self.reference(k)):
                continue
            self._told.add(k)
            if len(self.scores):
                text = f"{names[k]!r} has no threshold, as it has no calibration images: no image of it is called "
                text += "anomalous, whatever its score; calibrate it (model.calibrate, hgad-fast calibrate)"
            else:
                self._told.update(range(len(names)))
                text = NO_THRESHOLDS.format("no image")
            warn_user(text)

    def reference(self, k: int) -> Tensor:
        """Return the sorted scores that images of group k are compared with, on the scale of its own scores, float64.

        They are made anew where what they are made of has changed: a camera loop asks for each frame.
        """
        known = self._references
        if (
            known is None
            or known.rules != (self.false_alarm_rate, self.borrowing)
            or not torch.equal(known.scores, self.scores)  # nor is NaN, which is then computed each time
            or not torch.equal(known.class_ids, self.class_ids)
        ):
            rules = self.false_alarm_rate, self.borrowing
            known = self._references = _References(rules, self.scores.clone(), self.class_ids.clone(), {})
        if k not in known.by_group:
            known.by_group[k] = self._reference(k)
        return known.by_group[k]

    def _reference(self, k: int) -> Tensor:
        """Return the sorted scores that images of group k are compared with, on the scale of its own scores."""
        if k in self.borrowers:
            return self.scores.double().sort().values
        own = self.scores[self.class_ids == k].double()
        return own.sort().values if self._suffice(len(own)) else self._pool(k)

    def with_group(self, parts: int) -> Calibration:
        """Return the calibration with one group more, the last, without images, whose constants are placeholders.

        Groups that took no account of some of the `parts` of the densities, as there were fewer, take none.
        """

        def grown(weights: Tensor | None) -> Tensor | None:
            return None if weights is None else F.pad(weights, (0, parts - weights.shape[1], 0, 1))

        return replace(
            self,
            level_max=F.pad(self.level_max, (0, 0, 0, 1)),
            weights=grown(self.weights),
            score_weights=grown(self.score_weights),
        )

    def joined_by(self, scores: Tensor, group_ids: Tensor) -> Calibration:
        """Return the calibration with more scores (n,) of normal images of the given groups (n,).

        Constants and weights stay, with which the scores were made. Where groups are classes, the others keep their
        thresholds and p-values, as in `renewed`.
        """
        more = replace(
            self,
            scores=torch.cat([self.scores, scores.to(self.scores)]),
            class_ids=torch.cat([self.class_ids, group_ids.to(self.class_ids)]),
        )
        return more if self.borrowing else self.renewed(more, group_ids.unique().tolist())

    def renewed(self, other: Calibration, groups: Sequence[int]) -> Calibration:
        """Return the calibration that takes some groups from another one; the others keep all that they have.

        What their scores are pooled with, too, is what it was: `pooled_scores`.

        Raises:
            ValueError: the two make maps and scores by different rules.
        """
        rules = [
            (each.share, each.scored_on, each.weights is None, each.score_weights is None) for each in (self, other)
        ]
        if rules[0] != rules[1]:
            raise ValueError("the model was calibrated by other rules than it has now: calibrate all its classes")
        own = torch.ones(len(self.level_max), dtype=torch.bool)
        own[list(groups)] = False

        def joined(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
            return mine if mine is None or theirs is None else torch.where(own[:, None], mine, theirs)

        level_max = joined(self.level_max, other.level_max)
        assert level_max is not None
        mine, theirs = own[self.class_ids], ~own[other.class_ids]
        pools = {k: self._pool(k) for k, count in enumerate(self.counts) if own[k] and count >= MIN_POOLED}
        sizes = torch.tensor([len(pool) for pool in pools.values()], dtype=torch.int64)
        return replace(
            self,
            level_max=level_max,
            scores=torch.cat([self.scores[mine], other.scores[theirs]]),
            class_ids=torch.cat([self.class_ids[mine], other.class_ids[theirs]]),
            weights=joined(self.weights, other.weights),
            score_weights=joined(self.score_weights, other.score_weights),
            pooled_scores=torch.cat([torch.empty(0, dtype=torch.float64), *pools.values()]),
            pooled_ids=torch.tensor(list(pools), dtype=torch.int64).repeat_interleave(sizes),
        )

    def _pool(self, k: int) -> Tensor:
        """Return the pooled scores that images of group k are compared with where its own are too few, sorted."""
        if self.pooled_scores is not None and self.pooled_ids is not None and (self.pooled_ids == k).any():
            return self.pooled_scores[self.pooled_ids == k]
        groups = [k, *(j for j, count in enumerate(self.counts) if j != k and count >= MIN_POOLED)]
        own, *others = (self.scores[self.class_ids == j].double() for j in groups)
        if not others:
            return own.sort().values
        pooled = torch.cat([_standardised(scores, len(own)) for scores in (own, *others)])
        return (pooled * own.std() + own.mean()).sort().values

    @property
    def counts(self) -> list[int]:
        """The number of calibration images of each group."""
        return torch.bincount(self.class_ids, minlength=len(self.level_max)).tolist()

    @property
    def borrowers(self) -> list[int]:
        """The groups that borrow from the others."""
        return few(self.counts) if self.borrowing else []

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors, as a model file holds them."""
        tensors = {name: getattr(self, name) for name in (*TENSORS, *WEIGHT_TENSORS, *POOLED_TENSORS)}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def settings(self) -> dict[str, Any]:
        """Return everything but the tensors, as a model file holds it; the last three only where they are so."""
        settings = {"false_alarm_rate": self.false_alarm_rate, "img_size": self.img_size}
        rules: dict[str, Any] = {"borrowing": self.borrowing, "share": self.share}
        if self.scored_on != "map":
            rules["scored_on"] = self.scored_on
        return settings | {name: value for name, value in rules.items() if value}


def rate_table(model: Detector) -> list[dict[str, Any]]:
    """Return the `Calibration.rates` of a model's groups; empty where it is not calibrated."""
    return required_calibration(model).rates(model.groups) if model.calibration is not None else []


def few(counts: Sequence[int]) -> list[int]:
    """Return the groups with fewer than `MIN_POOLED` images, given the number of images of each."""
    return [k for k, count in enumerate(counts) if count < MIN_POOLED]


def _standardised(scores: Tensor, count: int) -> Tensor:
    """Return (s_i - mean) / std with mean and std of `count` other scores, or of all others where there are fewer.

    A new image of a group of `count` images is standardised by as many scores. If the pooled scores were standardised
    by more, they would spread less, and the group would raise too many alarms.
    """
    n = len(scores)
    others = scores[(torch.arange(n)[:, None] + torch.arange(1, min(count, n - 1) + 1)) % n]
    return (scores - others.mean(1)) / others.std(1).clamp(min=1e-12)


def numbers(scores: Tensor, densities: Densities) -> Tensor:
    """Return image scores (B,), NaN where a log-density is NaN or +inf: a map takes +inf for what is most normal."""
    highest = torch.stack([level.amax((1, 2)) for level in densities.logps]).amax(0)
    return scores.where((highest < math.inf).to(scores.device), math.nan)


def required_calibration(model: Detector) -> Calibration:
    """Return the calibration of a model that is calibrated."""
    assert isinstance(model.calibration, Calibration), "the caller has checked that the model is calibrated"
    return model.calibration


@plain_torch()
def calibrate(
    model: Detector,
    data: Any,
    *,
    false_alarm_rate: float | None = None,
    img_size: int | str | None = None,
    skip_bad: bool = False,
) -> tuple[str, ...]:
    """Set `model.calibration` from normal images that were not trained on: of all classes, or of some.

    Images of some classes alone, e.g. from a new camera for one product, renew those of a model that is calibrated.
    The others keep constants, scores and thresholds; where a threshold rests on pooled scores, those of the renewed
    classes are pooled with what the others have. Groups that a method forms by itself are renewed all together.

    Args:
        model: a trained detector.
        data: a dataset root or `Dataset`, or several (their training images are used), or a `FeatureSet`.
        false_alarm_rate: target share of normal images that may be called anomalous, one for all classes; None: the
            model's own, or 0.01 where it is not calibrated.
        img_size: short side at which the images are seen, or ``"native"``: the one at which images will be scored;
            default the model's.
        skip_bad: leave out images that cannot be decoded, with a warning, instead of stopping.

    Returns:
        the names of the groups that were renewed.

    Raises:
        ValueError: a class is not one of the model's, or has no images and is not calibrated; or images of some classes
            alone are to have another rate or size than the others.
    """
    known = model.calibration
    if false_alarm_rate is None:
        false_alarm_rate = 0.01 if known is None else known.false_alarm_rate
    check_false_alarm_rate(false_alarm_rate)
    resized = seeing(model, img_size)
    images = _of_these_classes(resized, data) if known is not None else data

    features = feature_set(resized, images, skip_bad=skip_bad, on_bad=lambda error: warn_user(str(error)))
    present = sorted(set(features.class_ids.tolist()))
    if known is None or not present or not model.groups_are_classes or len(present) == len(model.groups):
        model.config = model.config.replace(class_names=resized.config.class_names)
        calibrate_on(model, features, false_alarm_rate, img_size=resized.config.img_size)
        return model.groups
    renewed, others = ([name for k, name in enumerate(model.groups) if (k in present) == own] for own in (True, False))
    for title, own, wanted in (
        ("false_alarm_rate", known.false_alarm_rate, false_alarm_rate),
        ("img_size", known.img_size or model.config.img_size, resized.config.img_size),
    ):
        if own != wanted:
            raise ValueError(
                f"{title} is {wanted}, and there are images of {listed(renewed)} alone: {listed(others)} would stay "
                f"calibrated at {own}; give images of all classes, or leave {title} as it is"
            )
    model.calibration = known.renewed(
        calibration_from(model, features, false_alarm_rate, None, resized.config.img_size, known.level_max), present
    )
    warn_of_shortcomings(model)
    return tuple(renewed)


def _of_these_classes(model: Detector, data: Any) -> Any:
    """Return a dataset of some of the model's classes as one of all of them; anything else, and all, as it is.

    Raises:
        ValueError: it has a class that the model does not know.
    """
    own = model.config.class_names
    if own is None or not model.groups_are_classes or not are_roots(data):
        return data
    dataset = data if isinstance(data, Dataset) else discover(data)
    if unknown := [name for name in dataset.class_names if name not in own]:
        raise ValueError(
            f"{printable(str(dataset.root))} has images of {listed(unknown)}, and the model was made for "
            f"{', '.join(own)}; give images of these classes, or of some of them, in folders of these names"
        )
    ids = [own.index(name) for name in dataset.class_names]
    samples = [replace(sample, class_id=ids[sample.class_id]) for sample in dataset.train]
    samples.sort(key=lambda sample: (sample.class_id, sample.path))
    return replace(dataset, class_names=own, train=tuple(samples), test=(), validation=())


def calibrate_on(
    model: Detector,
    held_out: FeatureSet,
    false_alarm_rate: float = 0.01,
    stand_in: FeatureSet | None = None,
    img_size: int | str | None = None,
) -> None:
    """Set `model.calibration` to the `calibration_from` features of held-out normal images, and warn of `shortcomings`.

    Raises:
        ValueError: as `calibration_from`.
    """
    model.calibration = calibration_from(model, held_out, false_alarm_rate, stand_in, img_size)
    warn_of_shortcomings(model)


def warn_of_shortcomings(model: Detector) -> None:
    """Warn of thresholds that the calibration of a model cannot give as they were asked for."""
    if text := required_calibration(model).shortcomings(model.groups):
        warn_user(text)


def calibration_from(
    model: Detector,
    held_out: FeatureSet,
    false_alarm_rate: float = 0.01,
    stand_in: FeatureSet | None = None,
    img_size: int | str | None = None,
    level_max: Tensor | None = None,
) -> Calibration:
    """Return the calibration that features of held-out normal images give.

    `stand_in` (training images) gives the normalisation constants of a class of which no image was held out; such a
    class has no p-values. It gives the weights of the maps, too, if no image at all was held out. Where a method forms
    the groups by itself, `stand_in` is used only in that case, and a group with few images borrows from the others, see
    `Calibration`. `img_size` is the size at which the images were seen, default the model's. `level_max` (G, S) holds
    the constants of classes that have no images in either.

    Raises:
        ValueError: a class has no normal images, or one has no finite density.
    """
    img_size = model.config.img_size if img_size is None else img_size
    check_false_alarm_rate(false_alarm_rate)
    image_densities = held_out_densities(model, held_out)
    stand_ins = [] if image_densities or stand_in is None else held_out_densities(model, stand_in)
    sample = image_densities or stand_ins
    if not sample and not model.groups_are_classes:
        raise ValueError("calibration needs normal images; there are none")
    known, level_max = level_max, largest_densities(model, sample)
    missing = set(range(len(model.groups))).difference(int(image.group_ids) for image in sample)
    for k in sorted(missing) if model.groups_are_classes else ():
        if known is not None:
            level_max[k] = known[k]
            continue
        if stand_in is None or not (stand_in.class_ids == k).any():
            raise ValueError(f"calibration needs normal images of every class; there is none of {model.groups[k]!r}")
        for i in (stand_in.class_ids == k).nonzero().flatten().tolist():
            level_max[k] = torch.maximum(level_max[k], _level_max(_image_densities(model, stand_in, i)))
    if not level_max.isfinite().all():
        k = int((~level_max.isfinite()).nonzero()[0, 0])
        raise ValueError(f"normal images of {model.groups[k]!r} have no finite density: the training diverged")
    calibration = calibration_of(model, image_densities, level_max, img_size, stand_ins=stand_ins)
    if not calibration.scores.isfinite().all():
        i = int((~calibration.scores.isfinite()).nonzero()[0])
        raise ValueError(
            f"{held_out.name(i)}, a normal image of {model.groups[int(calibration.class_ids[i])]!r}, has the score "
            f"{float(calibration.scores[i])}: the model's weights are broken, or the training diverged"
        )
    calibration.false_alarm_rate = false_alarm_rate
    return calibration


def held_out_densities(
    model: Detector,
    held_out: FeatureSet,
    progress: ShowProgress = lambda items, title: items,
) -> list[Densities]:
    """Return the densities of each image, under its own class where groups are classes; `progress` wraps the loop."""
    return [_image_densities(model, held_out, i) for i in progress(range(len(held_out)), "densities of normal images")]


def largest_densities(model: Detector, image_densities: Sequence[Densities]) -> Tensor:
    """Return the `Calibration.level_max` of the densities of single images.

    It is -inf for a class without any. Of groups that a method forms by itself, those with few images borrow.
    """
    level_max = torch.full((len(model.groups), model.density_levels), -math.inf)
    for image in image_densities:
        k = int(image.group_ids)
        level_max[k] = torch.maximum(level_max[k], _level_max(image))
    if not model.groups_are_classes:
        groups = torch.cat([image.group_ids for image in image_densities])
        level_max[few(torch.bincount(groups, minlength=len(level_max)).tolist())] = level_max.amax(0)
    return level_max


def calibration_of(
    model: Detector,
    image_densities: Sequence[Densities],
    level_max: Tensor,
    img_size: int | str,
    fusion: str | None = None,
    stand_ins: Sequence[Densities] = (),
) -> Calibration:
    """Return the calibration that the densities of single held-out images give; `fusion`: default the model's.

    Where there are none, the weights of the maps come from `stand_ins`, images that were trained on.
    """
    cells, fusion = cells_on_map(model, img_size), fusion or model.fusion
    groups = torch.tensor([int(image.group_ids) for image in image_densities], dtype=torch.int64)
    calibration = Calibration(
        level_max,
        torch.empty(0),
        groups,
        img_size=img_size,
        borrowing=not model.groups_are_classes,
        share=model.score_share,
        scored_on=model.scored_on,
    )
    sample = image_densities or stand_ins
    parts = list(sample[0].parts) if sample else []
    if parts and fusion != "product":
        alone = torch.eye(len(parts))[parts.index(fusion)] if fusion in parts else torch.ones(len(parts))
        if model.scored_on != "map":
            calibration.weights = alone * _weights(model, sample, level_max, cells)
            calibration.score_weights = alone * _weights(model, sample, level_max, cells, model.scored_on)
        elif fusion in parts:
            calibration.weights = alone.expand(len(level_max), -1).contiguous()
        elif len(parts) > 1:
            calibration.weights = _weights(model, sample, level_max, cells)
    scores = [calibration.scores_alone(image, model.config.msk_size, cells) for image in image_densities]
    calibration.scores = torch.cat(scores).float().cpu() if scores else torch.empty(0)
    return calibration


def _weights(
    model: Detector,
    image_densities: Sequence[Densities],
    level_max: Tensor,
    cells: int | None,
    scope: str = "map",
) -> Tensor:
    """Return the weights (G, parts) of the maps of a scope, as `Calibration` has them.

    A class without held-out images takes the mean of the others. A group that borrows takes the largest of those that
    do not (of all with images, if there are none): its scores are rather too high than too low.
    """
    groups, parts = len(level_max), len(image_densities[0].parts)
    one_hot = torch.eye(parts)
    sums = torch.zeros(groups, parts, 3, dtype=torch.float64)  # over the images: of 1, maximum and mean of each map
    for image in image_densities:
        for j in range(parts):
            part_alone = one_hot[j].expand(groups, parts)
            pixels = calibrated_maps(image, level_max, model.config.msk_size, part_alone, cells, scope).double()
            summands = [1.0, float(pixels.max()), float(pixels.mean())]
            sums[int(image.group_ids), j] += torch.tensor(summands, dtype=torch.float64)
    count, maxima, means = sums.unbind(2)
    weights = ((maxima - means) / count).clamp(min=1e-12).reciprocal()
    if model.groups_are_classes:
        return torch.where(count > 0, weights, weights[count[:, 0] > 0].mean(0)).float()
    images = count[:, 0]
    lenders = weights[images >= MIN_POOLED] if (images >= MIN_POOLED).any() else weights[images > 0]
    return torch.where(count >= MIN_POOLED, weights, lenders.amax(0)).float()


def check_false_alarm_rate(rate: float) -> None:
    """Raise a ValueError for a target false-alarm rate that is not between 0 and 1."""
    if not 0 < rate < 1:
        raise ValueError(f"false_alarm_rate is {rate}; allowed: above 0 and below 1")


def _level_max(image: Densities) -> Tensor:
    """Return the largest log-density, divided by C, of an image at each level, (S,)."""
    return torch.stack([level.max().cpu() for level in image.logps])


def _image_densities(model: Detector, features: FeatureSet, i: int) -> Densities:
    """Return the densities of image i, under its own class where groups are classes."""
    images = features.images if features.exact is None else features.exact
    maps = [level[None].to(model.device) for level in images[i]]
    with naming(functools.partial(features.name, i)):
        (image,) = densities(model, maps, features.class_ids[i : i + 1].cpu() if model.groups_are_classes else None)
    return image


def split(class_ids: Tensor, fraction: float, seed: int, at_least: int = 8) -> tuple[Tensor, Tensor]:
    """Return the indices (train, calibration) of a seeded split of normal images, class by class.

    Of each class `fraction` of the images are held out, but at least `at_least` of them, and never more than half;
    none with a fraction of 0.
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
