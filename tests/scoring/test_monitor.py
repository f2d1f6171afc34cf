"""The monitor: what it may report where nothing has changed, and what it reports where something has."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import small_detectors
import torch
from numpy.typing import NDArray
from scipy.stats import binom

from hgad_fast import Monitor
from hgad_fast.scoring.monitor import _Gambler


def p_values(scores: NDArray[np.float64], calibration: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the conformal p-values of scores: the share, themselves among them, that is at least as high."""
    below = np.searchsorted(np.sort(calibration), scores)
    return (1 + len(calibration) - below) / (len(calibration) + 1)


def urn_probability(gaps: tuple[int, ...], number_of_gaps: int) -> Fraction:
    """Return the probability of a sequence of gaps between calibration scores, of any continuous distribution."""
    probability, counts = Fraction(1), Counter[int]()
    for images, gap in enumerate(gaps):
        probability *= Fraction(1 + counts[gap], number_of_gaps + images)
        counts[gap] += 1
    return probability


@pytest.mark.parametrize("references", [1, 2, 3])
def test_the_evidence_is_a_martingale(references: int) -> None:
    """Its expectation over all sequences of five images, each with its own probability, is 1: nobody can win."""
    total, expected = Fraction(0), 0.0
    for gaps in itertools.product(range(references + 1), repeat=5):
        probability = urn_probability(gaps, references + 1)
        monitor = Monitor(references=references)
        monitor.update([(1 + gap) / (references + 1) for gap in gaps])
        total += probability
        expected += float(probability) * monitor.evidence
    assert total == 1
    assert expected == pytest.approx(1, rel=1e-12)


def test_the_evidence_of_several_classes_is_a_martingale() -> None:
    expected = 0.0
    for gaps in itertools.product(range(2), range(3), range(2), range(3), range(2)):
        probability = urn_probability(gaps[::2], 2) * urn_probability(gaps[1::2], 3)
        monitor = Monitor(references={"a": 1, "b": 2})
        for gap, group, count in zip(gaps, "ababa", (1, 2, 1, 2, 1), strict=True):
            monitor.update((1 + gap) / (count + 1), group)
        expected += float(probability) * monitor.evidence
    assert expected == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("references", [1, 2, 3, 5, 7])
def test_nobody_can_win_by_what_p_values_tell_of_their_number(references: int) -> None:
    """Where n is found from the p-values, the expectation of the evidence is 1, to half a percent, or below."""
    for images in range(1, 6 if references < 5 else 5):
        expected = 0.0
        for gaps in itertools.product(range(references + 1), repeat=images):
            monitor = Monitor()
            monitor.update([(1 + gap) / (references + 1) for gap in gaps])
            expected += float(urn_probability(gaps, references + 1)) * monitor.evidence
        assert expected <= 1.005  # with a few images, whose p-values are multiples of a larger fraction by chance


@pytest.mark.parametrize(("references", "compared"), [(5, 2), (8, 1)])
def test_of_many_calibration_scores_few_are_on_the_safe_side(references: int, compared: int) -> None:
    """Then the expectation of the evidence falls below 1, the more images there are."""
    expected = []
    for images in range(1, 5):
        total = 0.0
        for gaps in itertools.product(range(references + 1), repeat=images):
            monitor = Monitor(references=references, max_references=compared)
            monitor.update([(1 + gap) / (references + 1) for gap in gaps])
            total += float(urn_probability(gaps, references + 1)) * monitor.evidence
        expected.append(total)
    assert expected[0] == pytest.approx(1, rel=1e-12)
    assert np.all(np.diff(expected) < 0)


def test_defects_up_to_their_rate_do_not_pay() -> None:
    """Where one image in ten may lie anywhere, no bet on the next one has an expectation above its stake."""
    for share in np.linspace(0, 1, 21):
        bets = _Gambler(0.1)
        bets.wealths[:] = 1.0
        uniform = np.zeros_like(bets.wealths)
        for cell in range(100):
            trial = _Gambler(0.1)
            trial.wealths[:], trial.waiting = 1.0, 0.0
            trial.bet((cell / 100, (cell + 1) / 100), 0)
            uniform += trial.wealths / 100
        bets.waiting = 0.0
        bets.bet((share * 0.99, share * 0.99 + 0.01), 0)
        assert (0.9 * uniform + 0.1 * bets.wealths <= 1 + 1e-12).all()


@pytest.mark.parametrize("count", [8, 100, None])
def test_the_rate_of_false_alarms_is_held(count: int | None) -> None:
    """Of 100 monitors with alpha = 10% no more report a change than chance allows, whatever the number of scores."""
    generator = np.random.default_rng(0)
    alarms = 0
    for _ in range(100):
        scores = generator.standard_normal(200)
        values = generator.random(200) if count is None else p_values(scores, generator.standard_normal(count))
        alarms += Monitor(0.1).update(values).changed
    assert alarms <= binom.ppf(0.999, 100, 0.1)


@pytest.mark.parametrize("count", [20, 200])
@pytest.mark.parametrize(("shift", "direction"), [(4.0, "higher"), (-4.0, "lower")])
@pytest.mark.parametrize("before", [0, 300])
def test_changes_are_found(count: int, shift: float, direction: str, before: int) -> None:
    generator = np.random.default_rng(1)
    scores = generator.standard_normal(before + 100)
    scores[before:] += shift
    monitor = Monitor(0.01, references=count)
    values = p_values(scores, generator.standard_normal(count))
    assert not monitor.update(values[:before]).changed
    state = monitor.update(values[before:])
    assert state.changed and state.direction == direction and state.p_value <= 0.01
    assert state.found_at is not None and before <= state.found_at < before + 50
    assert state.since is not None and abs(state.since - before) <= 5
    assert state.images == before + 100 and state.group is None


def test_the_class_that_changed_is_named() -> None:
    generator = np.random.default_rng(2)
    names = ["bottle", "grid", "tire"] * 150
    scores = generator.standard_normal(450)
    scores[[i for i in range(150, 450) if names[i] == "grid"]] += 3
    state = Monitor(0.01).update(p_values(scores, generator.standard_normal(50)), names)
    assert state.changed and state.group == "grid" and state.direction == "higher"
    assert state.found_at is not None and names[state.found_at] == "grid"


def test_a_change_stays_found() -> None:
    monitor = Monitor(0.01)
    found = monitor.update([1 / 50] * 20)
    assert found.changed
    later = monitor.update([i / 50 for i in range(1, 51)] * 4)
    assert later.changed and later.found_at == found.found_at and later.p_value <= found.p_value
    assert later.images == 220


def test_defects_alone_are_no_change() -> None:
    """Defects from image 200 on, one image in four, are a change only where they are not expected."""
    generator = np.random.default_rng(3)
    alarms = {0.0: 0, 0.3: 0}
    for rate in alarms:
        for _ in range(25):
            scores = generator.standard_normal(500)
            scores[200:][generator.random(300) < 0.25] = 50.0
            monitor = Monitor(0.05, defect_rate=rate)
            alarms[rate] += monitor.update(p_values(scores, generator.standard_normal(99))).changed
    assert alarms[0.3] <= binom.ppf(0.999, 25, 0.05) < alarms[0.0]


def test_the_number_of_calibration_images_is_found_from_the_p_values() -> None:
    generator = np.random.default_rng(4)
    values = generator.integers(1, 25, 200) / 24
    values[:3] = 1.0, 0.5, 0.25  # of which the number cannot be told yet
    found, given = Monitor(), Monitor(references=23)
    found.update(values[:20])
    given.update(values[:20])
    before = found.evidence / given.evidence
    found.update(values[20:])
    given.update(values[20:])
    assert found.evidence / given.evidence == pytest.approx(before, rel=0.05)  # only the first bets differ
    single = Monitor()
    single.update(values.astype(np.float32))
    assert single.evidence == pytest.approx(found.evidence, rel=1e-5)


def test_a_model_tells_what_its_p_values_rest_on() -> None:
    model = small_detectors.gaussian()
    assert model.calibration is not None
    counts = [row["reference"] for row in model.calibration.rates(model.groups)]
    monitor = Monitor.of(model, 0.05, defect_rate=0.01)
    assert monitor.references == {0: counts[0], 1: counts[1], 2: counts[2]} | dict(
        zip(model.groups, counts, strict=True)
    )
    assert (monitor.alpha, monitor.defect_rate, monitor.max_references) == (0.05, 0.01, 8)
    assert Monitor.of(model).update([1.0] * 60, [1] * 60).direction == "lower"  # p-values of 1 say something, too
    for wrong in ("class 9", 7):
        with pytest.raises(ValueError, match=f"groups has {wrong!r}, which is no class of the model"):
            Monitor.of(model).update([0.5], wrong)
    assert Monitor.of(model).update([0.5], np.array("class 1")).images == Monitor.of(model).update(0.5).images == 1
    model.calibration = None
    with pytest.raises(ValueError, match="the model has no thresholds: calibrate it first"):
        Monitor.of(model)


def test_one_by_one_or_together_is_the_same() -> None:
    values = np.random.default_rng(5).integers(1, 31, 60) / 30
    together, single = Monitor(), Monitor()
    state = together.update(torch.from_numpy(values), torch.arange(60) % 3)
    for i, value in enumerate(values):
        single.update(float(value), i % 3)
    assert single.state == state and single.evidence == together.evidence


def test_evidence_stays_finite() -> None:
    monitor = Monitor()
    monitor.update([1e-9] * 3000)
    assert math.isfinite(monitor.evidence) and monitor.state.changed


def test_nothing_is_taken_from_a_wrong_update() -> None:
    monitor = Monitor(references={"a": 10})
    for values, groups, message in (
        ([0.5, math.nan], "a", r"p-value 1 is nan; .* calibrate the model"),
        ([0.5, 0.0], "a", "p-value 1 is 0.0"),
        ([0.5, 1.5], "a", "p-value 1 is 1.5"),
        ([[0.5]], "a", r"shape \(1, 1\)"),
        ([True], "a", "type bool"),
        (["0.5"], "a", "type <U3"),
        ([0.5, 0.5], ["a"], "1 groups and 2 p-values"),
    ):
        with pytest.raises(ValueError, match=message):
            monitor.update(values, groups)
        assert monitor.state.images == 0 and monitor.evidence == 1
    assert monitor.update([]).images == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0}, "alpha is 0"),
        ({"alpha": 1.0}, "alpha is 1.0"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"references": 0}, "references is 0"),
        ({"references": {"a": 0}}, "references is {'a': 0}"),
        ({"max_references": 0}, "max_references is 0"),
        ({"max_references": 2.5}, "max_references is 2.5"),
        ({"references": 2.5}, "references is 2.5"),
        ({"alpha": "0.01"}, "alpha is '0.01'"),
        ({"defect_rate": 0.5}, "defect_rate is 0.5"),
        ({"defect_rate": -0.1}, "defect_rate is -0.1"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Monitor(**arguments)  # type: ignore[arg-type]
