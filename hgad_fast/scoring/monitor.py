"""Monitor: says from the p-values of a running detector that the camera, the light or the product has changed.

The question is whether new images are still like the normal images that the detector was calibrated on. As long as they
are, the scores of both are exchangeable, and that alone is what the test rests on. Of the n calibration scores of an
image's class, s are compared with; an image's score falls into one of the s + 1 gaps between them, and its p-value says
into which. If m images have come before, c_j of them in gap j, then the next one falls there with the probability

.. math:: \\frac{1 + c_j}{s + 1 + m}

whatever the distribution of scores (Polya's urn), if n = s and no two scores are equal. So the monitor knows how little
s scores say: that 30% of the images have p-values below 0.2, because few calibration images happened to score high, is
no change. Of more scores, s are chosen evenly; then gaps vary less from their means than the urn allows for, and the
test is on the safe side. It is to be: where p-values rest on pooled scores (`scoring.calibration.Calibration`), or
training and calibration images are of the same scenes, calibration is less exact than n says, and a sharper test would
take that for a change.

The gaps in order, each as wide as its probability, divide [0, 1]; a bet is a density f on [0, 1], and its mean over the
interval of an image's gap has the expectation 1. Multiplied over images it is the wealth of a gambler who cannot win as
long as nothing changes: a nonnegative martingale (conformal test martingales: Vovk, Gammerman and Shafer, Algorithmic
Learning in a Random World, 2nd ed., 2022, chapter 8). By Ville's inequality it ever reaches 1 / alpha with a
probability of alpha at most, however long the monitor runs, and however often it is looked at. A change may come at any
time: a part of the wealth waits, and with every image some of it begins to bet, so that what bets have lost before the
change does not count.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from torch import Tensor

from ..protocol import Detector
from .calibration import rate_table

WIDTHS = (0.02, 0.1, 0.3, 0.6)  # of the end of [0, 1] that a bet is on
STAKES = (0.4, 0.8)  # share of the wealth that a bet risks
MOST_REFERENCES = 10**5  # calibration images; of more, p-values are taken to be exact
REMEMBERED = 1000  # p-values of a group from which the number of its calibration images is found
ROUNDING = 1e-6  # of a p-value: less than the distance of any two
LARGEST = 1e280  # of a wealth: beyond, it is told exactly enough


@dataclass(frozen=True)
class MonitorState:
    """What a `Monitor` has come to.

    Attributes:
        changed: whether a change has been found. It stays so: calibrate, and begin with a new monitor.
        p_value: anytime-valid: without any change, the probability that it is ever p or less is at most p.
        images: how many p-values have come.
        found_at: number, from 0, of the image at which the change was found; None: there is none.
        since: number of the image at which the change seems to have begun, an estimate; None likewise.
        direction: "higher" or "lower": where the scores of images have gone, as far as can be told; None likewise.
        group: the group (the class) that has changed; None: all of them, or none.
    """

    changed: bool
    p_value: float
    images: int
    found_at: int | None = None
    since: int | None = None
    direction: str | None = None
    group: Hashable = None


class Monitor:
    """A sequential test for a change of the images, by their p-values, with a false-alarm rate over all time.

    As long as images are taken like the calibration images, the probability that it ever reports a change is at most
    `alpha`, where p-values rest on calibration images of the image's own class and equal scores do not occur. Where
    scores pile up at a bound, as where a detector gives many normal images 0, p-values are higher than their rank, and
    a change to lower scores is reported where there is none. Where these were too few for the target false-alarm rate,
    p-values rest on pooled scores, and it holds as far as pooling does: measured in docs/monitor.md. The memory does
    not grow with the images. Several threads must not update it at the same time.

    Args:
        alpha: probability of a false alarm, over all time; above 0, below 1.
        references: n, the number of calibration images that p-values rest on: one for all groups, or by group. None,
            and for groups that are not named: n is found, as p-values are multiples of 1 / (n + 1); those that are
            multiples of nothing are exact, as if n were infinite. An image tells it to the next ones alone; while all
            p-values are 1, nothing is known. It adds at most half a percent of `alpha` to the rate.
        max_references: s, how many of the n scores are compared with, at most. More find small changes sooner, but take
            for one what calibration images happen to differ from others. The default, 8, is the number that training
            holds out of a class of 16 images or more, at least.
        defect_rate: share of images, at most, that are of defects and are not to count as a change; below 0.5.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        alpha: float = 0.01,
        *,
        references: int | Mapping[Any, int] | None = None,
        max_references: int = 8,
        defect_rate: float = 0.0,
    ) -> None:
        if not isinstance(alpha, (int, float, np.number)) or not 0 < alpha < 1:
            raise ValueError(f"alpha is {alpha!r}; allowed: above 0 and below 1")
        if not isinstance(defect_rate, (int, float, np.number)) or not 0 <= defect_rate < 0.5:
            raise ValueError(f"defect_rate is {defect_rate!r}; allowed: 0 or more, below 0.5")
        for n in references.values() if isinstance(references, Mapping) else [references]:
            if n is not None and (not isinstance(n, (int, np.integer)) or n < 1):
                raise ValueError(f"references is {references!r}; a p-value rests on 1 or more calibration images")
        if not isinstance(max_references, (int, np.integer)) or max_references < 1:
            raise ValueError(f"max_references is {max_references!r}; allowed: a whole number, 1 or more")
        self.alpha, self.references, self.max_references = alpha, references, max_references
        self.defect_rate = defect_rate
        self.state = MonitorState(False, 1.0, 0)
        self._most = 1.0  # of the evidence so far
        self._urns: dict[Hashable, _Urn] = {}
        self._all = _Gambler(defect_rate)
        self._of_groups: dict[Hashable, _Gambler] = {}
        self._wealths: dict[Hashable, float] = {}
        self._known_groups: set[Hashable] | None = None  # of a model; None: any

    @classmethod
    def of(cls, model: Detector, alpha: float = 0.01, *, max_references: int = 8, defect_rate: float = 0.0) -> Monitor:
        """Return a monitor of the p-values of a model, which knows from the first image on what they rest on.

        Args:
            model: a calibrated detector; groups are given as its results have them, by number, or by name.
            alpha, max_references, defect_rate: as for the class.

        Raises:
            ValueError: the model has no thresholds; or as the class.
        """
        counts = {row["group"]: row["reference"] for row in rate_table(model)}
        if not any(counts.values()):
            raise ValueError("the model has no thresholds: calibrate it first (model.calibrate, hgad-fast calibrate)")
        by_number = dict(enumerate(counts.values()))
        references = {group: count for group, count in {**counts, **by_number}.items() if count}
        monitor = cls(alpha, references=references, max_references=max_references, defect_rate=defect_rate)
        monitor._known_groups = {None, *counts, *by_number}
        return monitor

    def update(self, p_values: Any, groups: Any = None) -> MonitorState:
        """Take the p-values of the next images, in the order in which they were taken, and return the new `state`.

        Args:
            p_values: one, or a sequence, array or tensor (B,); above 0, at most 1: `ScoreResult.p_value`.
            groups: the class of the images, one for all or one for each, ids or names; None: they are of one.

        Raises:
            ValueError: a p-value is none, as that of an image without a threshold; groups are not one for each, or none
                of the model's.
        """
        values, names = (x.detach().cpu() if isinstance(x, Tensor) else x for x in (p_values, groups))
        values = np.atleast_1d(np.asarray(values))
        if values.ndim != 1 or (len(values) and values.dtype.kind not in "fi"):
            raise ValueError(
                f"p_values have the shape {values.shape} and the type {values.dtype}; give one number, or (B,) of them"
            )
        tolerance = 1e-7 if values.dtype == np.float32 else 1e-13
        values = values.astype(np.float64)
        names = [names] * len(values) if np.ndim(names) == 0 else list(names)
        names = [name.item() if isinstance(name, (Tensor, np.generic, np.ndarray)) else name for name in names]
        if len(names) != len(values):
            raise ValueError(f"there are {len(names)} groups and {len(values)} p-values; give one for each, or one")
        if self._known_groups is not None and (unknown := set(names) - self._known_groups):
            raise ValueError(f"groups has {unknown.pop()!r}, which is no class of the model, by name or number")
        wrong = np.flatnonzero(~((values > 0) & (values <= 1)))
        if len(wrong):
            i = int(wrong[0])
            raise ValueError(
                f"p-value {i} is {values[i]}; allowed: above 0, at most 1. An image without a threshold has none: "
                "calibrate the model on normal images of its class"
            )
        for value, group in zip(values.tolist(), names, strict=True):
            self._take(value, group, tolerance)
        return self.state

    @property
    def evidence(self) -> float:
        """The wealth of the gambler, 1 at the start; a change is reported when it reaches 1 / `alpha`."""
        wealths = np.fromiter(self._wealths.values(), np.float64)
        numbers = np.arange(1, len(wealths) + 1)
        of_groups = float((wealths / (numbers * (numbers + 1))).sum()) + 1 / (len(wealths) + 1)  # what waits
        return (self._all.wealth + of_groups) / 2

    def _take(self, p_value: float, group: Hashable, tolerance: float) -> None:
        """Let all gamblers whom an image concerns bet on it, and renew the state."""
        if group not in self._urns:
            references = self.references.get(group) if isinstance(self.references, Mapping) else self.references
            self._urns[group] = _Urn(references, self.max_references)
            self._of_groups[group] = _Gambler(self.defect_rate)
        interval = self._urns[group].draw(p_value, tolerance)
        for gambler in (self._all, self._of_groups[group]):
            gambler.bet(interval, self.state.images)
        self._wealths[group] = self._of_groups[group].wealth
        self._most = max(self._most, self.evidence)
        state = replace(self.state, images=self.state.images + 1, p_value=1 / self._most)
        if not state.changed and state.p_value <= self.alpha:
            leader = max(self._wealths, key=self._wealths.__getitem__)
            alone = len(self._wealths) > 1 and self._wealths[leader] > self._all.wealth
            since, direction = (self._of_groups[leader] if alone else self._all).change()
            state = replace(
                state,
                changed=True,
                found_at=self.state.images,
                since=since,
                direction=direction,
                group=leader if alone else None,
            )
        self.state = state


class _Urn:
    """The gaps between calibration scores of a group, and how many images have fallen into each.

    Args:
        references: n, how many calibration images there are. None: it is found, as more and more p-values are multiples
            of 1 / (n + 1); as long as they are all 1, there is one gap.
        most: s, how many of them the scores are compared with, at most.
    """

    def __init__(self, references: int | None, most: int) -> None:
        self.most = most
        self.p_values: list[float] | None = [] if references is None else None  # from which n is found
        self._compare_with(references or 0)

    def _compare_with(self, references: int) -> None:
        """Choose the calibration scores to compare with, evenly among all, and empty the gaps between them."""
        self.references = references
        gaps = min(self.most, references) + 1
        ranks = np.round(np.arange(1, gaps) * ((references + 1) / gaps))  # of these scores, the highest has rank 1
        self.lowest = ranks / (references + 1) + ROUNDING  # what does not reach the score has a p-value above this
        self.weights = np.ones(gaps)

    def draw(self, p_value: float, tolerance: float) -> tuple[float, float]:
        """Return the interval of [0, 1] that stands for the gap of an image, and put the image there.

        The gaps are those that were known before it: what an image tells of n counts from the next one on, or it would
        be bet on with a knowledge of where it lies.
        """
        gap = int(np.searchsorted(self.lowest, p_value))
        total, below, weight = float(self.weights.sum()), float(self.weights[:gap].sum()), float(self.weights[gap])
        self.weights[gap] += 1
        if self.p_values is not None:
            self._find_references(p_value, tolerance)
        return below / total, (below + weight) / total

    def _find_references(self, p_value: float, tolerance: float) -> None:
        """Where a p-value shows that there are more calibration images, begin anew with all that have come."""
        assert self.p_values is not None
        self.p_values.append(p_value)
        references = references_of([p_value], tolerance, self.references)
        if references > self.references:
            self._compare_with(references)
            for each in self.p_values:
                self.weights[np.searchsorted(self.lowest, each)] += 1
        if references > MOST_REFERENCES or len(self.p_values) > REMEMBERED:
            self.p_values = None


def references_of(p_values: Iterable[float], tolerance: float = 1e-13, known: int = 0) -> int:
    """Return the least n of which p-values, up to a tolerance, are multiples of 1 / (n + 1), and `known` is another.

    It is more than `MOST_REFERENCES` where there is none up to that.
    """
    largest = round(MOST_REFERENCES * min(1.0, math.sqrt(1e-13 / tolerance)))  # of fewer, some is near by chance
    gaps = known + 1
    for p_value in p_values:
        nearest = Fraction(p_value).limit_denominator(largest)
        if abs(float(nearest) - p_value) > tolerance:
            return MOST_REFERENCES + 1
        gaps = math.lcm(gaps, nearest.denominator)
        if gaps > MOST_REFERENCES:
            return MOST_REFERENCES + 1
    return gaps - 1


class _Gambler:
    """The wealth of bets that images lie near one end of [0, 1], each begun at every image so far.

    Args:
        defect_rate: share of images that may lie anywhere. Winnings are divided by what they can bring.
    """

    widths = np.tile(np.repeat(WIDTHS, len(STAKES)), 2)
    stakes = np.tile(STAKES, 2 * len(WIDTHS))
    upper = np.arange(len(widths)) >= len(widths) // 2
    first, last = np.where(upper, 1 - widths, 0.0), np.where(upper, 1.0, widths)  # the ends of what is bet on

    def __init__(self, defect_rate: float) -> None:
        self.expected = 1 + defect_rate * self.stakes * (1 / self.widths - 1)
        self.wealths = np.zeros_like(self.widths)
        self.waiting, self.images = 1.0, 0
        self.streaks = np.zeros_like(self.widths)  # log of what each bet has won since it last stood at its lowest
        self.starts = np.zeros(len(self.widths), np.int64)

    @property
    def wealth(self) -> float:
        """All wealth, of all bets and what waits."""
        return float(self.wealths.mean()) + self.waiting

    def bet(self, interval: tuple[float, float], image: int) -> None:
        """Bet on an image, given by its number, and take what the interval that it falls into brings."""
        self.images += 1
        waiting = 1 / math.log(self.images + math.e)  # what begins at image t is about 1 / (t log(t)^2)
        begun, self.waiting = self.waiting - waiting, waiting
        low, high = interval
        share = (np.minimum(high, self.last) - np.maximum(low, self.first)).clip(min=0) / (high - low)
        won = (1 - self.stakes + self.stakes * share / self.widths) / self.expected
        self.wealths = np.minimum((self.wealths + begun) * won, LARGEST)
        self.starts[self.streaks <= 0] = image
        self.streaks = np.maximum(self.streaks + np.log(won), 0)

    def change(self) -> tuple[int, str]:
        """Return the number of the image at which the leading bet began to win, and where the scores have gone."""
        leader = int(self.wealths.argmax())
        return int(self.starts[leader]), "lower" if self.upper[leader] else "higher"
