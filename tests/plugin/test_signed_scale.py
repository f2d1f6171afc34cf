"""The scale of anomalib keeps verdicts and order where scores lie below 0, as distances from the expected one do."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("anomalib")

from hgad_fast.plugin.scale import multiples, to_unit  # noqa: E402


@pytest.mark.parametrize("threshold", [2.5, 0.03, -0.4])
def test_verdicts_and_order_are_kept(threshold):
    scores = torch.linspace(-9, 9, 401)
    anomalous = scores > threshold
    x = multiples(scores, torch.tensor(threshold), anomalous)
    units = to_unit(x)
    assert torch.equal(x > 1, anomalous) and torch.equal(units > 0.5, anomalous)
    assert ((units > 0) & (units < 1) & (units.diff(prepend=torch.zeros(1)) > 0)).all()


def test_ties_with_a_threshold_below_0():
    threshold = torch.tensor(-0.7)
    scores = torch.stack([threshold.nextafter(torch.tensor(-1.0)), threshold, threshold.nextafter(torch.tensor(0.0))])
    for anomalous in (scores > threshold, ~(scores > threshold)):
        assert torch.equal(to_unit(multiples(scores, threshold, anomalous)) > 0.5, anomalous)


def test_what_is_below_0_is_below_all_others():
    units = to_unit(torch.tensor([-math.inf, -1e4, -1.0, 0.0, 1e-30, 1e-20]))
    assert units[0] == 0 and (units.diff() > 0).all()
