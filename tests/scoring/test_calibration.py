from __future__ import annotations

import dataclasses
import json
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rounding import SAME_IN_FLOAT64

from hgad_fast import HGADConfig, HGADModel, protocol
from hgad_fast.features.extract import FeatureSet
from hgad_fast.scoring import densities, maps
from hgad_fast.scoring.calibration import Calibration, _weights, calibrate_on, split
from hgad_fast.scoring.stored import stored_calibration

DISTRIBUTIONS = {
    "normal": lambda *shape: torch.randn(*shape),
    "uniform": lambda *shape: torch.rand(*shape),
    "heavy": lambda *shape: torch.distributions.StudentT(2.0).sample(shape),
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def calibration(*scores, rate=0.01) -> Calibration:
    """From one list of scores a class."""
    ids = torch.tensor([k for k, own in enumerate(scores) for _ in own], dtype=torch.int64)
    flat = torch.tensor([float(s) for own in scores for s in own])
    return Calibration(torch.zeros(len(scores), 1), flat, ids, rate)


def stored(given: Calibration) -> Calibration:
    """As a model file gives it back."""
    settings = json.loads(json.dumps(given.settings()))
    groups, levels = given.level_max.shape
    return stored_calibration(given.tensors(), settings, groups=groups, levels=levels, parts=1, fusion="product")


def judge(actual, scores, k=0):
    scores = torch.as_tensor(scores, dtype=torch.float32)
    return actual.judge(scores, torch.full((len(scores),), k))


def pooled_by_hand(scores, k):
    """Scores of all classes of 3 images or more, standardised by others of the class, on the scale of class k."""
    own = np.float64(np.float32(scores[k]))
    pooled = []
    for values in scores:
        values = np.float64(np.float32(values))
        n = len(values)
        if n >= 3:
            for i in range(n):
                others = [values[(i + j) % n] for j in range(1, min(len(own), n - 1) + 1)]
                pooled.append((values[i] - np.mean(others)) / np.std(others, ddof=1))
    return np.sort(np.array(pooled) * own.std(ddof=1) + own.mean())


# ------------------------------------------------------------------------------------------------ p-values


def test_p_values_by_hand_with_ties():
    actual = calibration([1, 2, 2, 3, 5, 5, 5, 8, 9], rate=0.3)
    p_value, is_anomalous, threshold, rate = judge(actual, [0, 1, 2, 2.5, 5, 6, 8, 9, 10])
    assert p_value.tolist() == [n / 10 for n in (10, 10, 9, 7, 6, 3, 3, 2, 1)]
    assert threshold.tolist() == [5] * 9  # three of ten may raise an alarm: those above the third largest
    assert is_anomalous.tolist() == [False] * 5 + [True] * 4
    assert rate.tolist() == [3 / 10] * 9


@pytest.mark.parametrize("n", [1, 2, 9, 99, 250])
@pytest.mark.parametrize("rate", [0.01, 0.07, 0.29, 0.5])
def test_p_value_floor_and_attained_rate(n, rate):
    actual = calibration(torch.randn(n).tolist(), rate=rate)
    p_value, is_anomalous, threshold, attained = judge(actual, [1e9, -1e9])
    assert p_value.tolist() == [1 / (n + 1), 1]
    assert is_anomalous.tolist() == [True, False]
    alarms = int((actual.scores > threshold[0]).sum()) + 1  # of n + 1 images that are all alike: at most the target's
    assert attained.tolist() == [alarms / (n + 1)] * 2 == [actual.attained_rate(0)] * 2
    assert alarms == 1 or alarms / (n + 1) <= rate + 1e-9
    assert (alarms + 1) / (n + 1) > rate  # and one more would be too many
    assert float(threshold[0]) == actual.threshold(0)


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("counts", [(120, 30), (20, 20, 20), (3, 50), (2, 40), (9, 1, 0)])
@pytest.mark.parametrize("ties", [False, True])
def test_verdict_threshold_and_p_value_agree_to_the_bit(rate, counts, ties):
    draw = [torch.randn(n) * (k + 1) + 3 for k, n in enumerate(counts)]
    actual = calibration(*([x.round() if ties else x for x in draw]), rate=rate)
    for k in range(len(counts)):
        _, _, threshold, _ = judge(actual, [0.0], k)
        at = float(threshold[0]) if counts[k] else 0.0
        edge = np.float32(
            [at, np.nextafter(np.float32(at), np.float32(1e9)), np.nextafter(np.float32(at), np.float32(-1e9))]
        )
        scores = torch.cat([actual.scores, torch.from_numpy(edge), torch.randn(50) * 5])
        p_value, is_anomalous, threshold, attained = judge(actual, scores, k)
        if counts[k] == 0:
            assert p_value.isnan().all() and threshold.isnan().all() and attained.isnan().all()
            assert not is_anomalous.any()
        else:
            assert torch.equal(is_anomalous, scores > threshold)
            assert torch.equal(is_anomalous, p_value <= attained)
            assert p_value.min() >= 1 / (1 + sum(counts))
            order = scores.argsort()
            assert (p_value[order].diff() <= 0).all()


@pytest.mark.parametrize("counts", [(20, 20, 20, 20, 20), (3, 50, 50), (8, 30, 2, 70, 1, 0)])
def test_pooled_scores_are_standardised_by_class(counts):
    scores = [(torch.randn(n) * 10.0**k + k).tolist() for k, n in enumerate(counts)]
    actual = calibration(*scores)
    for k, n in enumerate(counts):
        if n < 3:
            continue
        expected = pooled_by_hand(scores, k)
        tests = torch.randn(30) * 10.0**k + k
        p_value, _, threshold, rate = judge(actual, tests, k)
        total = len(expected)
        assert total == sum(m for m in counts if m >= 3)
        at_least = (expected[None] >= tests.double().numpy()[:, None]).sum(1)
        assert np.allclose(p_value, (1 + at_least) / (total + 1), atol=1e-12)
        assert np.allclose(threshold, expected[total - max(1, int(0.01 * (total + 1) + 1e-9))])
        assert np.allclose(rate, max(1, int(0.01 * (total + 1) + 1e-9)) / (total + 1))


def test_a_class_with_enough_images_is_compared_with_its_own_alone():
    own = torch.randn(99).tolist()
    alone, among = calibration(own), calibration(own, [1e6, 2e6, 3e6, 4e6])
    tests = torch.randn(20) * 3
    for mine, theirs in zip(judge(alone, tests), judge(among, tests), strict=True):
        assert torch.equal(mine, theirs)


def test_classes_with_none_one_or_two_images():
    actual = calibration([], [1.0], [1.0, 2.0], [1.0, 2.0, 4.0], torch.randn(40).tolist())
    for k, (n, rate) in enumerate([(0, math.nan), (1, 1 / 2), (2, 1 / 3), (43, 1 / 44), (43, 1 / 44)]):
        p_value, is_anomalous, threshold, attained = judge(actual, [100.0], k)
        assert np.array_equal([actual.attained_rate(k), float(attained)], [rate, rate], equal_nan=True)
        assert bool(is_anomalous) == (n > 0)
        assert math.isnan(p_value) if n == 0 else float(p_value) == 1 / (n + 1)
        assert math.isnan(threshold) == (n == 0)


def test_a_lone_class_is_not_pooled_with_itself():
    scores = torch.randn(20).tolist()
    _, _, threshold, rate = judge(calibration(scores, [1.0, 2.0]), [0.0])
    assert float(threshold) == np.float32(max(scores)) and float(rate) == 1 / 21


def test_groups_with_few_images_borrow():
    scores = [[1.0, 2.0, 4.0, 8.0, 9.0], [], [3.0], [0.5, 5.0], [7.0, 7.5, 7.6]]
    borrowing = dataclasses.replace(calibration(*scores, rate=0.2), borrowing=True)
    assert borrowing.borrowers == [1, 2, 3] and borrowing.counts == [5, 0, 1, 2, 3]
    union = sorted(score for own in scores for score in own)
    for k in borrowing.borrowers:
        p_value, is_anomalous, threshold, rate = judge(borrowing, [0.0, 4.0, 8.0, 8.5, 100.0], k)
        assert p_value.tolist() == [(1 + sum(s >= x for s in union)) / 12 for x in (0.0, 4.0, 8.0, 8.5, 100.0)]
        assert threshold.tolist() == [8.0] * 5 and is_anomalous.tolist() == [False] * 3 + [True] * 2
        assert rate.tolist() == [2 / 12] * 5 == [borrowing.attained_rate(k)] * 5
    alone = calibration(*scores, rate=0.2)
    for k in (0, 4):  # with images of their own, nothing changes
        for one, other in zip(judge(borrowing, [1.0, 7.0, 9.0], k), judge(alone, [1.0, 7.0, 9.0], k), strict=True):
            assert torch.equal(one, other)
    assert judge(alone, [100.0], 1)[0].isnan().all()
    assert judge(dataclasses.replace(calibration([], []), borrowing=True), [1.0])[0].isnan().all()


def test_groups_that_borrow_take_the_largest_weights():
    """Weights of the parts of the densities: of groups with images enough, or of all with images if there are none."""
    parts = [[torch.rand(1, 6, 6) - 3] for _ in range(9)], [[torch.rand(1, 6, 6) - 1] for _ in range(9)]

    def weights(groups, of_its_own):
        images = [protocol.Densities(a, b, torch.tensor([k])) for a, b, k in zip(*parts, groups, strict=False)]
        model = SimpleNamespace(groups_are_classes=not of_its_own, config=SimpleNamespace(msk_size=12))
        return _weights(model, images, torch.zeros(4, 1), None)

    groups = [0, 0, 0, 1, 1, 1, 2, 2]
    own, borrowed = weights(groups, False), weights(groups, True)
    assert torch.equal(borrowed[:2], own[:2])
    assert torch.equal(borrowed[2], own[:2].amax(0)) and torch.equal(borrowed[3], own[:2].amax(0))
    own, borrowed = weights([0, 0, 2], False), weights([0, 0, 2], True)
    assert torch.equal(borrowed, own[[0, 2]].amax(0).expand(4, 2))


def test_whether_groups_borrow_is_stored_with_the_settings():
    one = calibration([1.0, 2.0])
    assert one.settings() == {"false_alarm_rate": 0.01, "img_size": None}  # as it always was
    assert not stored(one).borrowing
    other = dataclasses.replace(one, borrowing=True)
    assert stored(other).borrowing


def test_the_table_of_rates_says_what_each_threshold_rests_on():
    actual = calibration([], [1.0], [1.0, 2.0, 4.0], list(range(30)), list(range(30, 150)), rate=0.01)
    rows = actual.rates("abcde")
    assert [row["group"] for row in rows] == list("abcde")
    assert [row["images"] for row in rows] == [0, 1, 3, 30, 120]
    assert [row["reference"] for row in rows] == [0, 1, 153, 153, 120]
    assert [row["pooled"] for row in rows] == [False, False, True, True, False]
    attained = [math.nan, 1 / 2, 1 / 154, 1 / 154, 1 / 121]
    assert np.array_equal([row["attained"] for row in rows], attained, equal_nan=True)
    assert rows[4]["threshold"] == 149 and math.isnan(rows[0]["threshold"])
    facts = actual.describe("abcde")
    assert list(facts) == ["calibration", *(f"threshold, {name}" for name in "abcde")]
    assert "never" not in facts["threshold, b"] and "no image is ever called anomalous" in facts["threshold, a"]
    assert "153 images (3 its own); it attains 0.6%, 1.0% asked for" in facts["threshold, c"]
    many = calibration(*([float(i)] * 9 for i in range(30)), [], rate=0.2)
    assert many.describe([str(i) for i in range(31)])["thresholds"] == (
        "30 of 31 groups, from 9 to 9 images each; they attain 20.0% to 20.0%"
    )


def test_scores_without_spread():
    actual = calibration([2.0] * 10, [3.0] * 10)
    p_value, is_anomalous, threshold, _ = judge(actual, [1.0, 2.0, 2.5], 0)
    assert threshold.tolist() == [2.0] * 3
    assert is_anomalous.tolist() == [False, False, True]
    assert p_value.tolist() == [1, 1, 1 / 21]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("n, rate", [(99, 0.01), (149, 0.01), (30, 0.1), (9, 0.01)])
def test_normal_images_raise_no_more_alarms_than_allowed(name, n, rate):
    """Own scores: whatever their distribution. 200 calibrations of 200 images each."""
    flagged, small = [], []
    for _ in range(200):
        draw = DISTRIBUTIONS[name](n + 200)
        p_value, is_anomalous, _, attained = judge(calibration(draw[:n].tolist(), rate=rate), draw[n:])
        flagged.append(float(is_anomalous.double().mean()))
        small.append(float((p_value <= 0.2).double().mean()))
    assert np.mean(flagged) == pytest.approx(float(attained[0]), abs=4 * np.std(flagged) / 200**0.5)
    assert np.mean(small) <= 0.2 + 4 * np.std(small) / 200**0.5


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("counts", [(8,) * 15, (3, 60, 60), (8, 8, 90), (20,) * 5])
def test_pooling_raises_no_more_alarms_than_allowed(name, counts):
    """Classes that differ in location and scale; the first is the smallest. 100 calibrations of 200 images each."""
    flagged = []
    for _ in range(100):
        draws = [DISTRIBUTIONS[name](n) * 3.0 ** (k % 4) + k for k, n in enumerate(counts)]
        _, is_anomalous, _, attained = judge(calibration(*draws), DISTRIBUTIONS[name](200))
        total = sum(counts) + 1
        assert float(attained[0]) == max(1, int(0.01 * total)) / total
        flagged.append(float(is_anomalous.double().mean()))
    assert np.mean(flagged) <= float(attained[0]) + 3 * np.std(flagged) / 100**0.5


def test_false_alarm_rate_may_be_set_at_any_time():
    actual = calibration(torch.arange(99).tolist())
    tests = torch.arange(100) - 0.5
    for rate in (0.01, 0.1, 0.5, 0.1):
        actual.false_alarm_rate = rate
        _, is_anomalous, threshold, attained = judge(actual, tests)
        assert int(is_anomalous.sum()) == round(100 * rate)
        assert float(attained[0]) == rate and float(threshold[0]) == 99 - 100 * rate


@pytest.mark.parametrize("counts", [(99, 99), (9, 9)], ids=["own scores", "pooled"])
def test_what_scores_are_compared_with_follows_what_it_is_made_of(counts):
    """It is kept from one call to the next."""
    kept = calibration(*(torch.randn(n).tolist() for n in counts), rate=0.02)

    def change_score() -> None:
        kept.scores[3] += 10

    def change_group() -> None:
        kept.class_ids[0] = 1

    def borrow() -> None:
        kept.class_ids[:-2], kept.borrowing = 0, True

    changes = change_score, change_group, lambda: kept.scores.neg_(), borrow
    tests, groups = torch.randn(80), torch.arange(2).repeat(40)
    for change in changes:
        before = kept.judge(tests, groups)
        change()
        after, fresh = kept.judge(tests, groups), dataclasses.replace(kept).judge(tests, groups)
        assert not torch.equal(after[0], before[0])
        for actual, expected in zip(after, fresh, strict=True):
            assert torch.equal(actual, expected)


# ------------------------------------------------------------------------------------------------ from a model


def detector(n_classes=2, **settings) -> HGADModel:
    settings = {"meta_epochs": 1, "sub_epochs": 1, "batch_size": 4} | settings
    return HGADModel(
        HGADConfig(
            n_classes=n_classes,
            n_intra_centers=2,
            backbone_arch=None,
            feature_dims=(6, 6),
            feature_levels=2,
            coupling_layers=1,
            pos_embed_dim=4,
            msk_size=12,
            **settings,
        )
    )


def normal_features(ids) -> FeatureSet:
    offsets = torch.randn(len(ids), 6, 1, 1)
    return FeatureSet.from_levels([torch.randn(len(ids), 6, 4, 5) + offsets, torch.randn(len(ids), 6, 2, 2)], ids)


def batches(features):
    return [torch.stack(level) for level in zip(*features.images, strict=True)]


def test_constants_are_the_largest_densities_and_scores_those_of_score_features():
    model, normal = detector(), normal_features([0, 1, 0, 1, 1])
    with pytest.warns(UserWarning, match="too few"):
        model.calibrate(normal)
    given = model.score_features(batches(normal), normal.class_ids)
    for level, logps in enumerate(given.logps):
        for k in (0, 1):
            assert model.calibration.level_max[k, level] == logps[normal.class_ids == k].max()
    assert torch.equal(model.calibration.scores, given.image_score)
    assert torch.equal(model.calibration.class_ids, normal.class_ids)
    assert given.p_value.min() >= 1 / 6


@pytest.mark.usefixtures("float64")
def test_standardised_fusion_is_the_sum_in_units_of_the_normal_peaks(tmp_path):
    """By hand from the maps of a model of one class; and every image has its bits, alone and after loading."""
    model, normal = detector(fusion="standardised"), normal_features([0, 1, 0, 1, 1])
    with pytest.warns(UserWarning, match="too few"):
        model.calibrate(normal)
    calibration, parts = model.calibration, densities.densities(model, batches(normal), normal.class_ids)
    factors = []
    for levels, constants in (("logps", calibration.level_max), ("neg_entropy", calibration.level_max * 0)):
        alone = [protocol.Densities(getattr(part, levels), [], part.group_ids) for part in parts]
        factors.append(torch.cat([maps.calibrated_maps(part, constants, model.config.msk_size) for part in alone]))
    expected = torch.empty_like(factors[0])
    for k in (0, 1):
        rows = normal.class_ids == k
        expected[rows] = sum(m[rows] / (m[rows].amax((1, 2)).mean() - m[rows].mean()) for m in factors)
    actual = model.score_features(batches(normal), normal.class_ids)
    torch.testing.assert_close(actual.anomaly_map, expected, rtol=SAME_IN_FLOAT64, atol=SAME_IN_FLOAT64)
    assert torch.equal(actual.image_score, calibration.scores)
    model.save(tmp_path / "m.safetensors")
    one = HGADModel.load(tmp_path / "m.safetensors").score_features([x[3:4] for x in batches(normal)], 1)
    assert torch.equal(one.anomaly_map[0], actual.anomaly_map[3]) and torch.equal(one.p_value, actual.p_value[3:4])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("fusion", ["likelihood", "entropy", "standardised", "product"])
def test_the_map_is_of_some_levels_and_the_score_of_all(tmp_path, fusion):
    """Map and score by hand from models that have these levels alone, or all; and alike after loading."""
    model, normal = detector(fusion=fusion, map_levels=1), normal_features([0, 1, 0, 1, 1])
    with pytest.warns(UserWarning, match="too few"):
        model.calibrate(normal)
    calibration, parts = model.calibration, densities.densities(model, batches(normal), normal.class_ids)
    level_max, ids = calibration.level_max, normal.class_ids

    def by_hand(levels: int) -> torch.Tensor:
        factors = []
        for part, constants in (("logps", level_max), ("neg_entropy", level_max * 0)):
            alone = [protocol.Densities(getattr(image, part)[:levels], [], image.group_ids) for image in parts]
            factors.append(
                torch.cat([maps.calibrated_maps(image, constants, model.config.msk_size) for image in alone])
            )
        if fusion == "product":
            return factors[0] * factors[1]
        for factor in factors:
            for k in (0, 1):
                own = factor[ids == k].clone()
                factor[ids == k] /= own.amax((1, 2)).mean() - own.mean()
        return {"likelihood": factors[0], "entropy": factors[1], "standardised": sum(factors)}[fusion]

    actual = model.score_features(batches(normal), ids)
    close = {"rtol": SAME_IN_FLOAT64, "atol": SAME_IN_FLOAT64}
    torch.testing.assert_close(actual.anomaly_map, by_hand(1), **close)
    torch.testing.assert_close(actual.image_score, by_hand(2).amax((1, 2)), **close)
    assert (actual.image_score != actual.anomaly_map.amax((1, 2))).any()
    model.save(tmp_path / "m.safetensors")
    again = HGADModel.load(tmp_path / "m.safetensors").score_features(batches(normal), ids)
    assert torch.equal(again.anomaly_map, actual.anomaly_map) and torch.equal(again.image_score, actual.image_score)


def test_the_levels_of_the_map_infer_the_class():
    """A second level, which is surer of another one, is not asked."""
    model = detector(n_classes=3, map_levels=1)
    levels = [torch.randn(40, 6, 4, 5), 5 * torch.randn(40, 6, 2, 2)]
    per_class = [model.score_features(levels, torch.full((40,), k), "official").logps for k in range(3)]
    first, second = (torch.stack([logps[level].mean((1, 2)) for logps in per_class]).argmax(0) for level in (0, 1))
    assert (first != second).any()
    assert torch.equal(model.score_features(levels, None, "official").class_id, first)


def test_all_levels_by_name_are_all_levels():
    normal = normal_features([0, 1, 0, 1, 1])
    results = []
    for map_levels in (None, 2):
        model = detector(map_levels=map_levels)
        with pytest.warns(UserWarning, match="too few"):
            model.calibrate(normal)
        assert model.scored_on == "map"
        results.append(model.score_features(batches(normal)))
    assert torch.equal(results[0].anomaly_map, results[1].anomaly_map)
    assert torch.equal(results[0].image_score, results[1].image_score)


@pytest.mark.parametrize("fusion", ["standardised", "likelihood", "entropy", "product"])
def test_without_held_out_images_those_trained_on_give_the_weights(fusion):
    """So that a fusion is the same sum, or the same part alone, whether or not there are thresholds."""
    normal = normal_features([0, 1, 0, 1, 1])
    model = detector(fusion=fusion, calibration_fraction=0)
    with pytest.warns(UserWarning, match="there are no thresholds"):
        model.fit(normal, progress=False)
    actual = model.score_features(batches(normal), normal.class_ids)
    assert actual.p_value.isnan().all()
    with pytest.warns(UserWarning, match="too few"):
        model.calibrate(normal)
    expected = model.score_features(batches(normal), normal.class_ids)
    assert actual.anomaly_map.isfinite().all() and torch.equal(actual.anomaly_map, expected.anomaly_map)


def test_scores_of_new_normal_images_are_valid_although_the_constants_come_from_the_same_images():
    model, count, n = detector(), 1000, 9
    images = normal_features([0] * count)
    parts = densities.densities(model, batches(images), images.class_ids, throughput=True)
    logps, neg_entropy = (
        [torch.cat(level) for level in zip(*(getattr(part, name) for part in parts), strict=True)]
        for name in ("logps", "neg_entropy")
    )
    flagged = []
    for _ in range(150):
        rows = torch.randperm(count)[: n + 100]
        some = protocol.Densities([x[rows] for x in logps], [x[rows] for x in neg_entropy], images.class_ids[rows])
        level_max = torch.stack([x[:n].max() for x in some.logps]).expand(2, -1)
        scores = maps.calibrated_maps(some, level_max, 12).amax((1, 2))
        actual = Calibration(level_max, scores[:n], some.group_ids[:n], 0.1)
        flagged.append(float(actual.judge(scores[n:], some.group_ids[n:])[1].double().mean()))
    assert np.mean(flagged) <= 0.1 + 3 * np.std(flagged) / 150**0.5


def test_one_warning_tells_the_rates_that_can_be_attained():
    model = detector(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.calibrate(normal_features([0] * 2 + [1] * 8 + [2] * 5))
        model.score_features(batches(normal_features([0, 1, 2])))
    (warning,) = caught
    text = "false-alarm rate of 1.0%; thresholds stand for: class 0 33.3%, class 1 7.1%, class 2 7.1%"
    assert text in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.calibrate(normal_features([0] * 4 + [1] * 8 + [2] * 5), false_alarm_rate=0.2)


def test_a_class_of_which_nothing_was_held_out():
    model, trained = detector(), normal_features([0, 0, 1, 1])
    held_out = normal_features([0] * 12)
    with pytest.warns(UserWarning, match="class 0 7.7%, class 1 has no threshold"):
        calibrate_on(model, held_out, stand_in=trained)
    given = model.score_features(batches(trained), trained.class_ids)
    assert model.calibration.level_max[1].tolist() == [float(x[2:].max()) for x in given.logps]
    assert given.p_value[:2].isfinite().all() and given.p_value[2:].isnan().all()
    assert not given.is_anomalous[2:].any()
    with pytest.raises(ValueError, match="there is none of 'class 1'"):
        calibrate_on(model, held_out)


@pytest.mark.parametrize("fraction", [0.0, 0.1])
def test_fit_save_and_load(tmp_path, fraction):
    model = detector(calibration_fraction=fraction)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(normal_features([0, 1] * 10), progress=False, false_alarm_rate=0.02)
    warning = caught[0]  # the others say that classes of noise are hard to tell
    expected = "too few calibration images" if fraction else "no image of 'class 0', 'class 1' is ever called anomalous"
    assert expected in str(warning.message)
    assert model.calibration.class_ids.bincount(minlength=2).tolist() == ([5, 5] if fraction else [0, 0])
    images = batches(normal_features([0, 1, 0]))
    before = model.score_features(images)
    assert before.anomaly_map.isfinite().all() and before.image_score.isfinite().all()
    assert before.p_value.isnan().all() == before.threshold.isnan().all() == (fraction == 0)
    if not fraction:
        assert not before.is_anomalous.any()
    model.save(tmp_path / "model.safetensors")
    loaded = HGADModel.load(tmp_path / "model.safetensors")
    assert loaded.calibration.false_alarm_rate == 0.02
    after = loaded.score_features(images)
    for name in ("anomaly_map", "image_score", "class_id", "is_anomalous"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name
    for name in ("p_value", "threshold", "false_alarm_rate"):
        assert np.array_equal(getattr(before, name), getattr(after, name), equal_nan=True), name


@pytest.mark.parametrize("rate", [0, 1, -0.1, 1.5, math.nan])
def test_false_alarm_rates_that_cannot_be(rate):
    with pytest.raises(ValueError, match="false_alarm_rate is"):
        detector().calibrate(normal_features([0, 1]), false_alarm_rate=rate)


def test_a_model_that_diverged_is_named():
    model = detector()
    with torch.no_grad():
        model.mixture.mus[0].fill_(math.nan)
    with pytest.raises(ValueError, match="'class 0' have no finite density"):
        model.calibrate(normal_features([0, 1]))


# ------------------------------------------------------------------------------------------------ split


@pytest.mark.parametrize("fraction", [0.1, 0.3])
def test_split_is_seeded_and_takes_of_every_class(fraction):
    ids = torch.tensor([0] * 200 + [1] * 20 + [2] * 10 + [3] + [4] * 3)[torch.randperm(234)]
    train, held_out = split(ids, fraction, seed=3)
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(234))
    expected = {0.1: [20, 8, 5, 0, 1], 0.3: [60, 8, 5, 0, 1]}[fraction]
    assert ids[held_out].bincount(minlength=5).tolist() == expected
    again, other = split(ids, fraction, seed=3), split(ids, fraction, seed=4)
    assert torch.equal(again[1], held_out) and not torch.equal(other[1], held_out)


def test_nothing_is_held_out_at_fraction_0():
    train, held_out = split(torch.tensor([0, 1, 1, 0]), 0.0, seed=0)
    assert train.tolist() == [0, 1, 2, 3] and held_out.tolist() == []


# ------------------------------------------------------------------------------------------------ of some classes


def of_classes(features: FeatureSet, *classes: int) -> FeatureSet:
    return features.subset(torch.isin(features.class_ids, torch.tensor(classes)).nonzero().flatten())


@pytest.mark.parametrize("fusion", ["product", "standardised"])
@pytest.mark.parametrize("count", [5, 30], ids=["pooled", "own scores"])
def test_only_the_classes_given_are_renewed(tmp_path, fusion, count):
    """The others keep constants, scores, weights and thresholds to the bit, at any rate, through a file too."""
    ids = [0, 1, 2] * count
    model, first, second = detector(3, fusion=fusion), normal_features(ids), normal_features(ids)
    model.calibrate(first, false_alarm_rate=0.05)
    before = model.calibration
    assert model.calibrate(of_classes(second, 1)) == ("class 1",)
    after = model.calibration
    model.save(tmp_path / "m.safetensors")
    loaded = HGADModel.load(tmp_path / "m.safetensors").calibration
    model.calibrate(second, false_alarm_rate=0.05)
    complete = model.calibration
    for k, expected in enumerate((before, complete, before)):
        assert torch.equal(after.level_max[k], expected.level_max[k])
        assert torch.equal(after.scores[after.class_ids == k], expected.scores[expected.class_ids == k])
        if fusion == "standardised":
            assert torch.equal(after.weights[k], expected.weights[k])
    for rate in (0.05, 0.3):
        for each in (before, after, loaded):
            each.false_alarm_rate = rate
        for k in (0, 2):
            assert after.threshold(k) == before.threshold(k) == loaded.threshold(k)
            assert after.attained_rate(k) == before.attained_rate(k)
    assert after.threshold(1) != before.threshold(1)
    again = after.renewed(before, [1])  # the other thresholds stay, although the class has its old images once more
    assert again.threshold(0) == before.threshold(0) and again.counts == before.counts


def test_some_classes_are_not_calibrated_by_rules_of_their_own():
    model, normal = detector(3), normal_features([0, 1, 2] * 8)
    with pytest.raises(ValueError, match="there is none of 'class 0'"):
        model.calibrate(of_classes(normal, 1, 2))  # nothing is known of it yet
    model.calibrate(normal, false_alarm_rate=0.2)
    with pytest.raises(ValueError, match="false_alarm_rate is 0.1, and there are images of 'class 1' alone: 'class 0'"):
        model.calibrate(of_classes(normal, 1), false_alarm_rate=0.1)
    with pytest.raises(ValueError, match="img_size is 99, .* would stay calibrated at 1024"):
        model.calibrate(of_classes(normal, 1), img_size=99)
    with pytest.raises(ValueError, match="class ids run from 3 to 3"):
        model.calibrate(FeatureSet(of_classes(normal, 1).images, torch.full((8,), 3)))
    assert model.calibration.false_alarm_rate == 0.2


# ------------------------------------------------------------------------------------------------ no alarm, no number


def test_a_class_that_can_raise_no_alarm_is_named_once_a_model():
    model, normal = detector(), normal_features([0, 0, 1, 1])
    with pytest.warns(
        UserWarning, match="class 1 has no threshold.*no image of a class is ever called anomalous: give"
    ):
        calibrate_on(model, normal_features([0] * 12), stand_in=normal)
    images = batches(normal)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.score_features(images, 0)
        model.score_features(images, 1)
        model.score_features(images, [1, 0, 1, 0])
    (warning,) = caught
    assert "'class 1' has no threshold" in str(warning.message) and "(model.calibrate" in str(warning.message)
    assert "class 1 has no threshold" in model.calibration.shortcomings(model.groups)


def test_the_remedy_says_how_many_images_are_needed():
    for rate, count in ((0.01, 99), (0.07, 14), (0.2, 4)):
        lacking, enough = (calibration(list(range(n)), rate=rate).shortcomings("a") for n in (count - 1, count))
        assert not enough and f" takes {count} held-out normal images" in lacking
    borrowing = dataclasses.replace(calibration([1.0] * 5, [], rate=0.01), borrowing=True)
    assert "the threshold of 1 group stands for" in borrowing.shortcomings("ab")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("normalization", ["calibrated", "official"])
def test_a_score_that_is_no_number_is_refused(value, normalization):
    model, normal = detector(), normal_features([0, 1] * 8)
    model.calibrate(normal, false_alarm_rate=0.2)
    images = batches(normal)
    plain = model.densities

    def broken(maps, group_ids):
        made = plain(maps, group_ids)
        if torch.equal(next(iter(maps.pieces()))[3][0], images[0][5]):
            made.logps[0][0, 1, 2] = value
        return made

    model.densities = broken
    if value == -math.inf:  # no density at all is a finite score: as anomalous as can be
        assert model.score_features(images, normal.class_ids, normalization).image_score.isfinite().all()
    else:
        with pytest.raises(ValueError, match="image 5 has no score: it is (nan|inf|-inf) under 'class 1'.*weights"):
            model.score_features(images, normal.class_ids, normalization)
        if normalization == "calibrated":
            with pytest.raises(ValueError, match="'class 1'.* no finite density|image 5, a normal image of 'class 1'"):
                model.calibrate(normal)


@pytest.mark.parametrize("borrowing", [False, True])
@pytest.mark.parametrize("rate", [0.01, 0.2, 1e-320])
def test_sizes_in_the_table_are_those_of_what_scores_are_compared_with(borrowing: bool, rate: float) -> None:
    actual = calibration(range(9), [], [1.0], range(4), rate=rate)
    actual.borrowing = borrowing
    actual.pooled_scores, actual.pooled_ids = torch.arange(5, dtype=torch.float64), torch.full((5,), 3)
    names = ("a", "b", "c", "d")
    sizes = [len(actual.reference(k)) for k in range(4)]
    assert [row["reference"] for row in actual.rates(names)] == sizes
    assert [row["attained"] for row in actual.rates(names, thresholds=False) if row["reference"]] == [
        actual.attained_rate(k) for k in range(4) if sizes[k]
    ]
    assert actual.shortcomings(names)
