"""Sums, whitening and Gaussians of places against definitions in float64."""

import math

import numpy as np
import pytest
import torch

from hgad_fast.modules import place_gaussian
from hgad_fast.modules.place_gaussian import (
    STEP,
    ExactSum,
    Moments,
    PlaceGaussians,
    Whitening,
    grid_fits,
    places,
)

GRIDS = ((2, 3), (4, 2), (2, 3))


def drawn(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(images=9, dim=4, coarse_dim=2, shrinkage=0.5, floor=0.02):
    """Return Gaussians that have seen images of each group, and what they have seen, in whole steps."""
    gaussians = PlaceGaussians(GRIDS, dim, coarse_dim, shrinkage, floor).double()
    seen = []
    for k, (h, w) in enumerate(GRIDS):
        mixing = drawn(h * w, dim + coarse_dim, dim + coarse_dim, seed=10 + k)
        y = torch.einsum("npi,pij->npj", drawn(images, h * w, dim + coarse_dim, seed=k), mixing)
        gaussians.add(k, y)
        seen.append((y / STEP).round() * STEP)
    gaussians.solve()
    return gaussians, seen


def assert_same_bits(actual, expected):
    """Compare all but the bounds, of which Gaussians that are known make no use."""
    buffers = dict(expected.named_buffers())
    for name, buffer in buffers.items():
        assert name.startswith("least_") or torch.equal(actual.get_buffer(name), buffer), name


@pytest.mark.parametrize("shrinkage, floor", [(0.5, 0.02), (0.0, 0.1), (1.0, 0.02)])
@pytest.mark.parametrize("first, band", [(1, 2), (3, 9), (6, 9)])
def test_gaussians_are_the_same_in_whatever_order_they_are_asked_for(monkeypatch, shrinkage, floor, first, band):
    """Those of a model that was loaded are computed when they are asked for, group by group, the first band before."""
    monkeypatch.setattr(place_gaussian, "FIRST", first)
    monkeypatch.setattr(place_gaussian, "BAND", band)
    whole, _ = filled(shrinkage=shrinkage, floor=floor)
    asked = PlaceGaussians(GRIDS, 4, 2, shrinkage, floor).double()
    asked.load_state_dict(whole.state_dict())
    assert asked.mean_0.isnan().all()
    for k in (2, 0, 1):
        least = asked.least_mean_log_det(GRIDS[k], k)
        exact = whole.mean_log_det(GRIDS[k], k)
        assert exact - 15 < least <= exact, k
        assert least < exact - 1e-4 or len(asked.bands) == 1 and least == exact
    assert asked.band_0_1.isfinite().all() and asked.log_det_1.isnan().all() == (len(asked.bands) > 1)
    assert asked.require([1]) and not asked.require([1]) and not asked.require([1, 0], first_band=True)
    assert asked.least_mean_log_det(GRIDS[1], 1) == asked.mean_log_det(GRIDS[1], 1) == whole.mean_log_det(GRIDS[1], 1)
    assert asked.log_det_0.isnan().all() == (len(asked.bands) > 1)
    asked.require([2, 0])
    assert_same_bits(asked, whole)
    whole.add(1, drawn(2, 8, 6))
    assert whole.require([1])  # they are those of all sums


def test_an_exact_sum_is_the_same_in_any_order_and_right():
    summands = [drawn(7, seed=i, scale=10.0 ** (i % 9 - 3)) for i in range(40)]
    sums = []
    for order in (range(40), reversed(range(40)), np.random.default_rng(0).permutation(40)):
        total = ExactSum()
        for i in order:
            total.add(summands[i])
        sums.append(total.value())
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])
    exact = torch.tensor([math.fsum(column) for column in torch.stack(summands).T.tolist()], dtype=torch.float64)
    assert (sums[0] - exact).abs().max() <= 1e-15 * exact.abs().max() + 40 * 2.0**-61


def test_moments_are_those_of_all_rows():
    parts = [drawn(n, 3, seed=n, scale=4.0) + 5 for n in (3, 8, 5)]
    moments = Moments()
    for part in parts:
        moments.add(part)
    mean, covariance = moments.mean_and_covariance()
    rows = torch.cat(parts)
    torch.testing.assert_close(mean, rows.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(covariance, torch.cov(rows.T, correction=0), rtol=1e-10, atol=1e-12)


def test_whitened_features_are_uncorrelated_and_coarse_ones_add_what_fine_ones_lack():
    mixing = drawn(9, 9, seed=3)
    x = drawn(500, 9, seed=4) @ mixing + 2
    moments = Moments()
    moments.add(x)
    whitening = Whitening(9, 4, 3).double()
    whitening.fit(moments, (3, 2, 4), 2)
    y = whitening(x)
    torch.testing.assert_close(y.mean(0), torch.zeros(7).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.cov(y.T, correction=0), torch.eye(7).double(), rtol=0, atol=1e-8)
    assert not whitening.matrix[5:, :4].any()  # the fine columns do not read the coarse channels
    changed = x.clone()
    changed[:, 5:] += 1
    assert torch.equal(whitening(changed)[:, :4], y[:, :4]) and not torch.equal(whitening(changed)[:, 4:], y[:, 4:])


def test_each_stage_counts_by_its_own_scale():
    """What a stage is multiplied by changes nothing: its principal components are those of the scaled stage."""
    x = drawn(400, 6, seed=5) @ drawn(6, 6, seed=6)
    larger = x * torch.tensor([1.0, 1, 1, 50, 50, 50]).double()
    distances = []
    for features in (x, larger):
        moments, whitening = Moments(), Whitening(6, 3, 0).double()
        moments.add(features)
        whitening.fit(moments, (3, 3), 2)
        distances.append(whitening(features).square().sum(1))
    torch.testing.assert_close(distances[0], distances[1], rtol=1e-9, atol=1e-9)


def test_a_constant_channel_makes_no_infinity():
    x = drawn(50, 4, seed=1)
    x[:, 2:] = 7
    moments, whitening = Moments(), Whitening(4, 4, 0).double()
    moments.add(x)
    whitening.fit(moments, (2, 2), 2)
    assert whitening(x).isfinite().all()


@pytest.mark.parametrize("shrinkage, floor", [(0.5, 0.02), (0.0, 0.1), (1.0, 0.02)])
def test_distances_are_those_of_the_shrunk_covariances(shrinkage, floor):
    gaussians, seen = filled(shrinkage=shrinkage, floor=floor)
    for k, (y, (h, w)) in enumerate(zip(seen, GRIDS, strict=True)):
        mean = y.mean(0).numpy()
        own = np.stack([np.cov(y[:, p].numpy().T) for p in range(h * w)])
        covariance = (1 - shrinkage) * own + shrinkage * own.mean(0) + floor * np.eye(6)
        x = drawn(h * w, 6, seed=20, scale=3.0)
        distances = gaussians.distances(x, (h, w), k)
        for p in range(h * w):
            e = x[p].numpy() - mean[p]
            assert float(distances.total[p]) == pytest.approx(e @ np.linalg.solve(covariance[p], e), rel=1e-9)
            fine = covariance[p][:4, :4]
            assert float(distances.fine[p]) == pytest.approx(e[:4] @ np.linalg.solve(fine, e[:4]), rel=1e-9)
            log_det = np.linalg.slogdet(covariance[p])[1]
            assert float(gaussians.log_dets((h, w), k)[p]) == pytest.approx(log_det, rel=1e-9, abs=1e-9)
        assert gaussians.mean_log_det((h, w), k) == pytest.approx(np.linalg.slogdet(covariance)[1].mean(), abs=1e-9)


def test_all_groups_of_a_grid_have_the_same_distances():
    gaussians, _ = filled()
    x = drawn(6, 6, seed=21)
    together = gaussians.all_distances(0, x, (2, 3))
    assert gaussians.members[0] == [0, 2]
    for column, k in enumerate(gaussians.members[0]):
        for all_groups, group in zip(together, gaussians.distances(x, (2, 3), k), strict=True):
            torch.testing.assert_close(all_groups[:, [column]], group)


@pytest.mark.parametrize(
    "first, band, dim, coarse_dim, expected",
    [
        (32, 64, 4, 2, [(0, 4), (4, 6)]),
        (32, 64, 80, 80, [(0, 32), (32, 80), (80, 120), (120, 160)]),
        (32, 64, 32, 0, [(0, 32)]),
        (32, 64, 33, 1, [(0, 32), (32, 33), (33, 34)]),
        (1, 2, 4, 2, [(0, 1), (1, 2), (2, 4), (4, 6)]),
    ],
)
def test_bands_are_of_all_values_and_one_ends_with_those_of_the_map(
    monkeypatch, first, band, dim, coarse_dim, expected
):
    monkeypatch.setattr(place_gaussian, "FIRST", first)
    monkeypatch.setattr(place_gaussian, "BAND", band)
    assert list(PlaceGaussians(GRIDS, dim, coarse_dim, 0.5, 0.02).bands) == expected


@pytest.mark.parametrize("first, band", [(1, 1), (1, 2), (3, 9)])
def test_bands_add_up_to_the_distances(monkeypatch, first, band):
    """Whatever they are, and each of them by itself is what its values add."""
    whole, _ = filled()
    monkeypatch.setattr(place_gaussian, "FIRST", first)
    monkeypatch.setattr(place_gaussian, "BAND", band)
    gaussians, _ = filled()
    assert len(gaussians.bands) > len(whole.bands)
    for j, (h, w) in enumerate(gaussians.distinct):
        x = drawn(h * w, 6, seed=21)
        for row, k in enumerate(gaussians.members[j]):
            added = [gaussians.added_by(i, x, (h, w), j, row) for i in range(len(gaussians.bands))]
            assert all((squares >= 0).all() for squares in added)
            for distances in (gaussians.distances(x, (h, w), k), gaussians.added(added)):
                for actual, expected in zip(distances, whole.distances(x, (h, w), k), strict=True):
                    torch.testing.assert_close(actual, expected)


def test_images_add_up_in_any_order_and_in_any_parts():
    y = drawn(12, 6, 6, seed=30, scale=5.0)
    states = []
    for parts in ([y], [y.flip(0)], [y[5:], y[:2], y[2:5]]):
        gaussians = PlaceGaussians(GRIDS[:1], 4, 2, 0.5, 0.02)
        for part in parts:
            gaussians.add(0, part)
        gaussians.solve()
        states.append(gaussians)
    for other in states[1:]:
        assert_same_bits(other, states[0])


def test_sums_that_outgrow_32_bits_go_on_in_64_and_come_back_from_a_state():
    y = drawn(40, 6, 6, seed=31, scale=60.0)
    gaussians = PlaceGaussians(GRIDS[:1], 4, 2, 0.5, 0.02).double()
    assert gaussians.products_0.dtype == torch.int32
    gaussians.add(0, y)
    assert gaussians.products_0.dtype == torch.int64
    gaussians.solve()
    steps = (y / STEP).round()
    lower = torch.tril_indices(6, 6)
    expected = torch.einsum("npi,npj->pij", steps, steps)[:, lower[0], lower[1]]
    assert torch.equal(gaussians.products_0[0].double(), expected)
    loaded = PlaceGaussians(GRIDS[:1], 4, 2, 0.5, 0.02).double()
    loaded.load_state_dict(gaussians.state_dict())
    loaded.require([0])
    assert_same_bits(loaded, gaussians)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_features_that_would_spoil_the_sums_are_refused(value):
    gaussians = PlaceGaussians(GRIDS[:1], 4, 2, 0.5, 0.02)
    y = drawn(3, 6, 6)
    y[1, 2, 3] = value
    with pytest.raises(ValueError, match="not finite, or beyond"):
        gaussians.add(0, y)
    assert not gaussians.images.any() and not gaussians.totals_0.any()


def test_a_group_of_one_image_takes_the_covariance_of_the_others():
    gaussians = PlaceGaussians(((2, 3), (2, 3)), 4, 2, 0.5, 0.02).double()
    many, one = drawn(9, 6, 6, seed=40), drawn(1, 6, 6, seed=41)
    gaussians.add(0, many)
    gaussians.add(1, one)
    gaussians.solve()
    steps = (many / STEP).round() * STEP
    shared = np.mean([np.cov(steps[:, p].numpy().T) for p in range(6)], 0) + 0.02 * np.eye(6)
    x = drawn(6, 6, seed=42)
    e = (x - (one[0] / STEP).round() * STEP).numpy()
    expected = [row @ np.linalg.solve(shared, row) for row in e]
    np.testing.assert_allclose(gaussians.distances(x, (2, 3), 1).total[:, 0].numpy(), expected, rtol=1e-9)


def test_an_addition_leaves_what_is_known_of_other_groups():
    """A group of one image is solved anew, as it takes the covariances of the others."""
    gaussians = PlaceGaussians(((2, 3), (2, 3), (2, 3)), 4, 2, 0.5, 0.02)
    for k, count in enumerate((9, 5, 1)):
        gaussians.add(k, drawn(count, 6, 6, seed=50 + k))
    gaussians.solve()
    before = gaussians.mean_log_det_0.clone()
    gaussians.add(0, drawn(3, 6, 6, seed=60, scale=4.0))
    assert [known == len(gaussians.bands) for known in gaussians._known] == [False, True, False]
    gaussians.require(range(3))
    assert (gaussians.mean_log_det_0 != before).tolist() == [True, False, True]
    afresh = PlaceGaussians(gaussians.grids, 4, 2, 0.5, 0.02)
    afresh.load_state_dict(gaussians.state_dict())
    afresh.solve()
    assert_same_bits(afresh, gaussians)


@pytest.mark.parametrize("grid", [(4, 2), (3, 3)], ids=["known grid", "new grid"])
@pytest.mark.parametrize("wide", [False, True], ids=["sums of 32 bits", "sums of 64 bits"])
def test_a_group_more_leaves_the_others_as_they_are(grid, wide):
    gaussians, _ = filled()
    if wide:
        gaussians.products_1 = gaussians.products_1.long()
    extended = gaussians.extended(grid)
    assert extended.grids == (*GRIDS, grid) and extended.images.tolist() == [9, 9, 9, 0]
    for name, buffer in gaussians.named_buffers():
        other = extended.get_buffer(name)[: len(buffer)]
        assert other.dtype == buffer.dtype and torch.equal(other.nan_to_num(-7), buffer.nan_to_num(-7)), name
    y = drawn(7, math.prod(grid), 6, seed=70)
    extended.add(3, y)
    extended.require(range(4))
    alone = PlaceGaussians([grid], 4, 2, 0.5, 0.02).double()
    alone.add(0, y)
    alone.solve()
    x = drawn(math.prod(grid), 6, seed=71)
    assert torch.equal(extended.distances(x, grid, 3).total, alone.distances(x, grid, 0).total)
    x = drawn(6, 6, seed=72)
    assert torch.equal(extended.distances(x, (2, 3), 2).total, gaussians.distances(x, (2, 3), 2).total)
    assert gaussians.images.tolist() == [9, 9, 9]


@pytest.mark.parametrize("size, grid", [((4, 4), (4, 4)), ((8, 8), (4, 4)), ((3, 3), (4, 4)), ((10, 5), (8, 4))])
def test_a_pixel_takes_the_place_at_its_relative_position(size, grid):
    cpu = torch.device("cpu")
    expected = [
        int((i + 0.5) * grid[0] / size[0]) * grid[1] + int((j + 0.5) * grid[1] / size[1])
        for i in range(size[0])
        for j in range(size[1])
    ]
    assert places(size, grid, cpu).tolist() == expected


@pytest.mark.parametrize(
    "size, fits",
    [((16, 16), True), ((32, 32), True), ((1, 1), True), ((8, 16), False), ((1, 3), False)]
    + [((16, 17), True), ((16, 18), False)]  # up to 16 x 17 cells of an image may be within 5%
    + [
        ((32, 34), True),
        ((32, 35), False),
        ((64, 68), True),
        ((64, 69), False),
        ((640, 672), True),
        ((640, 673), False),
    ],
)
def test_grids_fit_where_aspect_ratios_agree_within_5_percent(size, fits):
    assert grid_fits(size, (16, 16)) is fits
    assert grid_fits(size[::-1], (16, 16)) is fits


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_no_image_within_5_percent_is_refused(stride):
    for side in (96, 256, 512):
        grid = side // stride, side // stride
        for other in range(math.ceil(side / 1.05), int(1.05 * side) + 1):
            size = -(-side // stride), -(-other // stride)
            assert grid_fits(size, grid) and grid_fits(size[::-1], grid), (side, other)
        other = int((1.05 + 1.05 * stride / side) * side) + 1  # more by a cell than may be
        assert not grid_fits((side // stride, -(-other // stride)), grid)
