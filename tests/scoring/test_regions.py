"""Regions against a count by hand and against scipy's labels of the whole map, in bands of every height."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from scipy import ndimage

from hgad_fast.scoring import regions
from hgad_fast.scoring.regions import Region, find_regions


def test_regions_of_a_map_drawn_by_hand() -> None:
    scores = np.array(
        [
            [0, 5, 0, 0, 0, 2],
            [0, 0, 7, 0, 0, 2],
            [0, 0, 0, 0, 0, 0],
            [3, 0, 0, 1, 1, 0],
        ],
        dtype=np.float32,
    )
    assert find_regions(scores, 1.0) == [  # 1 is not above 1; corners touch
        Region(left=1, top=0, right=3, bottom=2, area=2, peak=7, peak_x=2, peak_y=1, mean=6),
        Region(left=0, top=3, right=1, bottom=4, area=1, peak=3, peak_x=0, peak_y=3, mean=3),
        Region(left=5, top=0, right=6, bottom=2, area=2, peak=2, peak_x=5, peak_y=0, mean=2),
    ]


@pytest.mark.parametrize("threshold", [math.nan, math.inf, 2.0])
def test_nothing_lies_above(threshold: float) -> None:
    assert find_regions(np.ones((5, 7)), threshold) == []


def whole(scores: np.ndarray, threshold: float) -> list[Region]:
    """Return the same from labels of the whole map."""
    labels, count = ndimage.label(scores > threshold, np.ones((3, 3)))
    actual = []
    for k, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
        values = scores[labels == k]
        y, x = map(int, np.argwhere((labels == k) & (scores == values.max()))[0])
        box = (columns.start, rows.start, columns.stop, rows.stop)
        actual.append(Region(*box, values.size, float(values.max()), x, y, float(values.mean(dtype=np.float64))))
    return sorted(actual, key=lambda region: (-region.peak, region.top, region.left))


@pytest.mark.parametrize("rows", [1, 2, 5, 40])
@pytest.mark.parametrize("density", [0.1, 0.45, 0.9, 1.0])
def test_bands_do_not_show(rows: int, density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(0).random((37, 23), dtype=np.float32)
    monkeypatch.setattr(regions, "BAND_PIXELS", rows * 23)
    actual, expected = find_regions(scores, 1 - density), whole(scores, 1 - density)
    assert [dataclasses.replace(region, mean=0) for region in actual] == [
        dataclasses.replace(region, mean=0) for region in expected
    ]
    np.testing.assert_allclose([region.mean for region in actual], [region.mean for region in expected], rtol=1e-12)


def test_a_spiral_across_all_bands_is_one_region(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions, "BAND_PIXELS", 1)
    comb = np.zeros((9, 9))
    comb[:, ::2] = 1  # teeth that meet in the last row only
    comb[-1] = 1
    (actual,) = find_regions(comb, 0.5)
    assert (actual.left, actual.top, actual.right, actual.bottom, actual.area) == (0, 0, 9, 9, int(comb.sum()))
