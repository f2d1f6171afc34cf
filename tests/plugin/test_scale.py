"""The scale of scores in anomalib: verdicts survive every step of it, and so does the order."""

from __future__ import annotations

import math

import pytest
import torch

from hgad_fast.plugin.scale import multiples, to_multiple, to_unit

ONE_ULP = torch.tensor([1.0]).nextafter(torch.tensor([2.0]))


def test_half_is_the_threshold_to_the_bit() -> None:
    x = torch.cat([torch.linspace(0, 3, 100_001), 1 + torch.arange(-50, 51) * 2.0**-24, ONE_ULP])
    x = x.sort().values
    unit = to_unit(x)
    assert torch.equal(unit > 0.5, x > 1)
    assert bool((unit.diff() >= 0).all()) and 0 <= float(unit.min()) and float(unit.max()) < 1
    exact = x.double() / (1 + x.double())
    assert float((unit - exact).abs().max()) <= 2 * 2.0**-24  # two roundings of numbers below 1


def test_small_multiples_keep_their_order() -> None:
    """Scores far below the threshold rank images, too: no two become one."""
    x = torch.logspace(-30, -1, 1000)
    assert bool((to_unit(x).diff() > 0).all())


def test_what_is_no_number_is_as_anomalous_as_can_be() -> None:
    assert to_unit(torch.tensor([math.nan, math.inf, -1.0])).tolist() == [1.0, 1.0, 1.0]


def test_multiples_keep_the_verdict() -> None:
    """Division rounds a score just above its threshold to 1: the verdict says what it is."""
    generator = torch.Generator().manual_seed(0)
    threshold = torch.rand(10_000, generator=generator, dtype=torch.float64) + 0.01
    above = threshold.float().double() * (1 + 1e-9)
    for scores, verdict in ((above, True), (threshold, False)):
        x = multiples(scores, threshold, torch.full((10_000,), verdict))
        assert torch.equal(x > 1, torch.full((10_000,), verdict))


def test_a_threshold_of_zero() -> None:
    scores, verdicts = torch.tensor([0.0, 1e-30, math.inf]), torch.tensor([False, True, True])
    x = multiples(scores, torch.zeros(3), verdicts)
    assert torch.equal(x > 1, verdicts) and x[0] == 0


def test_to_multiple_is_the_inverse() -> None:
    for unit in (0.1, 0.5, 0.9):
        multiple = torch.tensor(to_multiple(unit), dtype=torch.float64)
        assert float(to_unit(multiple)) == pytest.approx(unit, abs=2 * 2.0**-53)


def test_scores_below_zero() -> None:
    """Their distance from the threshold takes the place of the quotient: in order, and 1 at the threshold."""
    scores, threshold = torch.linspace(-5, 20, 1001), torch.tensor(-0.3)
    verdicts = scores > threshold
    x = multiples(scores, threshold, verdicts, from_zero=False)
    assert torch.equal(x > 1, verdicts) and bool((x.diff() > 0).all()) and bool((x > 0).all())
    torch.testing.assert_close(x[-1], torch.tensor(21.3))
    torch.testing.assert_close(x[0], torch.tensor(1 / 5.7))
