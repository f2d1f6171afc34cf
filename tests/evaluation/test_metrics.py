"""Metrics against scikit-learn and against a naive AUPRO that visits every threshold."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.measure import label as label_regions
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from benchmarks.metrics import aupro_800
from hgad_fast.evaluation import metrics

EXACT = 1e-9
Arrays = Sequence[np.ndarray]


def naive_aupro(maps: Arrays, masks: Arrays, limit: float) -> float:
    """Regions labelled once, then the PRO curve at every distinct score of any pixel, in float64."""
    regions = []
    for map_, mask in zip(maps, masks, strict=True):
        labelled = label_regions(np.asarray(mask) != 0, connectivity=2)
        regions += [np.float64(map_[labelled == r]) for r in range(1, labelled.max() + 1)]
    normal = np.concatenate([np.float64(map_[mask == 0]) for map_, mask in zip(maps, masks, strict=True)])
    thresholds = np.unique(np.concatenate([normal, *regions]))[::-1]
    curve = [(0.0, 0.0)]
    for t in thresholds:
        curve.append(((normal >= t).mean(), np.mean([(region >= t).mean() for region in regions])))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 < limit and x1 > x0:
            cut = min(x1, limit)
            area += (cut - x0) * (y0 + y0 + (y1 - y0) * (cut - x0) / (x1 - x0)) / 2
    return area / limit


def naive_f1_max(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    best = (0.0, float("nan"))
    for t in np.unique(scores):
        alarms = scores >= t
        f1 = 2 * (alarms & labels).sum() / (alarms.sum() + labels.sum())
        best = max(best, (f1, t))
    return best


def defects(n: int, size: int, seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Smooth float32 maps, higher within their masks: up to three rectangles each, none in every fourth."""
    rng = np.random.default_rng(seed)
    maps, masks = [], []
    for i in range(n):
        mask = np.zeros((size, size), bool)
        for _ in range(0 if i % 4 == 3 else rng.integers(1, 4)):
            row, column = rng.integers(0, size - size // 4, 2)
            height, width = rng.integers(1, size // 4, 2)
            mask[row : row + height, column : column + width] = True
        noise = ndimage.gaussian_filter(rng.normal(size=mask.shape), 2)
        maps.append((noise / noise.std() + 1.5 * mask).astype(np.float32))
        masks.append(mask)
    return maps, masks


def assert_exact(maps: Arrays, masks: Arrays, limits: Sequence[float] = (0.3, 0.05, 1.0)) -> None:
    figures = metrics.pixel_metrics(maps, masks, limits)
    scores = np.concatenate([np.float64(m).ravel() for m in maps])
    labels = np.concatenate([np.asarray(m).ravel() != 0 for m in masks])
    expected = {
        "auroc": roc_auc_score(labels, scores),
        "average_precision": average_precision_score(labels, scores),
        "f1_max": naive_f1_max(scores, labels)[0],
        **{f"aupro_{limit:g}": naive_aupro(maps, masks, limit) for limit in limits},
    }
    assert figures == pytest.approx(expected, abs=EXACT)
    assert metrics.aupro(maps, masks, limits[0]) == pytest.approx(figures[f"aupro_{limits[0]:g}"], abs=1e-12)


@pytest.mark.parametrize("levels", [2, 5, 10**6])
@pytest.mark.parametrize("n", [2, 7, 500])
def test_image_metrics_agree_with_scikit_learn(levels: int, n: int) -> None:
    rng = np.random.default_rng(n + levels)
    labels = rng.permutation(np.arange(n) < max(1, n // 3))
    scores = rng.integers(-levels, levels, n) / levels + 0.3 * labels
    assert metrics.auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=EXACT)
    assert metrics.average_precision(scores, labels) == pytest.approx(
        average_precision_score(labels, scores), abs=EXACT
    )
    precision, recall, _ = precision_recall_curve(labels, scores)
    sklearn_f1 = (2 * precision * recall / np.maximum(precision + recall, 1e-300)).max()
    f1, threshold = metrics.f1_max(scores, labels)
    assert (f1, threshold) == naive_f1_max(scores, labels)
    assert f1 == pytest.approx(sklearn_f1, abs=EXACT)
    assert metrics.image_metrics(scores, labels) == {
        "auroc": metrics.auroc(scores, labels),
        "average_precision": metrics.average_precision(scores, labels),
        "f1_max": f1,
    }


def test_f1_max_takes_the_highest_of_equal_thresholds() -> None:
    # At 3: one of two found, F1 = 2/3. At 1: both found with two false alarms, F1 = 4/6 again.
    assert metrics.f1_max([3.0, 2.0, 2.0, 1.0], [1, 0, 0, 1]) == (2 / 3, 3.0)


def test_scores_and_labels_may_be_lists_arrays_or_tensors() -> None:
    scores, labels = [0.5, -1.0, 2.0, 0.5], [0, 0, 1, 1]
    expected = roc_auc_score(labels, scores)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        tensor = torch.tensor(scores, dtype=dtype, requires_grad=True)
        assert metrics.auroc(tensor, torch.tensor(labels)) == expected
    assert metrics.auroc(scores, [bool(y) for y in labels]) == expected
    assert metrics.auroc(np.float16(scores), np.float64(labels)) == expected


# AUPRO at 0.3, 0.05 and 1 of `quantised_maps(seed, size, levels)`, computed once with anomalib 2.7.0 (torch 2.14.1,
# torchmetrics 1.9.0, NumPy 2.4.6, opencv-python-headless 5.0.0.93):
#     metric = anomalib.metrics.aupro._AUPRO(fpr_limit=limit)
#     metric.update(torch.from_numpy(maps), torch.from_numpy(masks).float())
#     metric.compute()
# The definition is ours: a threshold at every distinct score, 8-connected regions, interpolation at the limit. But it
# sums in float32.
ANOMALIB_AUPRO = {
    (0, 16, 4): (0.5081191658973694, 0.37319716811180115, 0.7560893297195435),
    (1, 32, 50): (0.7273892164230347, 0.5441709756851196, 0.8753505945205688),
    (2, 48, 10**6): (0.6297912001609802, 0.5020485520362854, 0.8354126214981079),
    (3, 64, 10**6): (0.6575838327407837, 0.5409142971038818, 0.8474555015563965),
}


def quantised_maps(seed: int, size: int, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Four maps of noise in `levels` steps, more of it within masks of three rectangles; the last has no defect."""
    random = np.random.RandomState(seed)  # whose numbers NumPy promises not to change
    masks = np.zeros((4, size, size), bool)
    for mask in masks[:3]:
        for _ in range(3):
            row, column = random.randint(0, size - 4), random.randint(0, size - 4)
            height, width = random.randint(1, size // 3, 2)
            mask[row : row + height, column : column + width] = True
    maps = random.randint(0, levels, masks.shape) + random.randint(0, levels, masks.shape) * masks
    return (maps / levels).astype(np.float32), masks


@pytest.mark.parametrize("case", ANOMALIB_AUPRO)
def test_aupro_agrees_with_anomalib(case: tuple[int, int, int]) -> None:
    maps, masks = quantised_maps(*case)
    figures = metrics.pixel_metrics(maps, masks, (0.3, 0.05, 1.0))
    actual = [figures[f"aupro_{limit}"] for limit in ("0.3", "0.05", "1")]
    assert actual == pytest.approx(ANOMALIB_AUPRO[case], abs=1e-6)  # ten roundings of a float32 near 1


@pytest.mark.parametrize("seed", range(3))
def test_pixel_metrics_are_exact(seed: int) -> None:
    assert_exact(*defects(5, 24, seed))


@pytest.mark.parametrize("seed", range(3))
def test_pixel_metrics_are_exact_with_many_ties(seed: int) -> None:
    maps, masks = defects(5, 24, seed)
    assert_exact([np.round(m) for m in maps], masks)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4).flatmap(lambda levels: st.lists(st.integers(0, levels), min_size=24, max_size=24)),
    st.lists(st.booleans(), min_size=24, max_size=24).filter(lambda mask: 0 < sum(mask) < 24),
    st.floats(0.01, 1.0),
)
def test_pixel_metrics_are_exact_on_tiny_maps(levels: list[int], mask: list[bool], limit: float) -> None:
    maps = np.array(levels, np.float32).reshape(2, 3, 4)
    assert_exact(list(maps), list(np.array(mask).reshape(2, 3, 4)), [limit])


def test_a_constant_map_scores_as_chance() -> None:
    maps, masks = [np.full((8, 8), 0.25, np.float32)] * 2, [np.eye(8, dtype=bool), np.zeros((8, 8), bool)]
    assert_exact(maps, masks)
    assert metrics.pixel_metrics(maps, masks)["auroc"] == 0.5
    assert metrics.aupro(maps, masks, 0.3) == pytest.approx(0.15, abs=EXACT)  # the diagonal


def test_a_perfect_and_a_reversed_map() -> None:
    mask = np.zeros((8, 8), bool)
    mask[2:4, 2:4] = True
    perfect = metrics.pixel_metrics([mask.astype(np.float32)], [mask])
    assert perfect == dict.fromkeys(perfect, 1.0)
    reversed_ = metrics.pixel_metrics([-mask.astype(np.float32)], [mask])
    assert (reversed_["auroc"], reversed_["aupro_0.3"]) == (0.0, 0.0)


def test_an_image_anomalous_throughout_and_single_pixel_regions() -> None:
    rng = np.random.default_rng(0)
    dots = np.zeros((9, 9), bool)
    dots[::3, ::3] = True
    masks = [np.ones((5, 7), bool), dots, np.zeros((4, 4), bool)]
    assert_exact([rng.normal(size=m.shape).astype(np.float32) for m in masks], masks)


def test_pixels_that_touch_at_a_corner_are_one_region() -> None:
    # One region of two pixels (one found: 1/2), not two regions of one, beside a found region: (1/2 + 1) / 2.
    mask = np.zeros((4, 4), bool)
    mask[0, 0] = mask[1, 1] = mask[3, 3] = True
    map_ = np.zeros((4, 4), np.float32)
    map_[1, 1] = map_[3, 3] = 1
    map_[0, 0] = -1
    assert metrics.aupro([map_], [mask], 1.0) == 0.75


def test_the_curve_is_interpolated_at_the_limit() -> None:
    # Four normal pixels tie with half of the region; the curve rises from (0, 1/2) to (1, 1) in a line.
    map_, mask = np.array([[2, 1, 1, 1, 1, 1]]), np.array([[1, 1, 0, 0, 0, 0]])
    assert metrics.aupro([map_], [mask], 0.3) == pytest.approx((0.5 + 0.65) / 2, abs=EXACT)


def test_negative_zero_ties_with_zero() -> None:
    map_ = np.array([[0.0, -0.0, 0.0, -0.0, 1.0, -1.0]], np.float32)
    mask = np.array([[1, 1, 0, 0, 0, 1]], bool)
    assert_exact([map_], [mask])
    unsigned = np.where(map_ == 0, 0.0, map_)
    assert metrics.pixel_metrics([map_], [mask]) == metrics.pixel_metrics([unsigned], [mask])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint8, np.int64])
def test_no_dtype_loses_precision(dtype: type) -> None:
    maps, masks = defects(4, 16)
    assert_exact([(40 * m + 100).astype(dtype) for m in maps], masks)


@pytest.mark.parametrize("wide", ["normal", "anomalous"])
def test_float64_is_kept_where_only_some_maps_have_it(wide: str) -> None:
    # 1 + 1e-12 is 1 in float32: rounding either side would turn a miss into a tie.
    normal, anomalous = np.full((2, 2), 1.0), np.full((2, 2), 1.0)
    (normal if wide == "normal" else anomalous)[:] += 1e-12
    maps = [normal if wide == "normal" else normal.astype(np.float32)]
    maps += [anomalous if wide == "anomalous" else anomalous.astype(np.float32)]
    figures = metrics.pixel_metrics(maps, [None, np.ones((2, 2))])
    assert figures["auroc"] == (0.0 if wide == "normal" else 1.0)


def test_maps_may_be_arrays_tensors_generators_or_files_of_any_sizes(tmp_path: Path) -> None:
    maps, masks = defects(4, 24)
    expected = metrics.pixel_metrics(maps, masks)
    assert metrics.pixel_metrics(np.stack(maps), 255 * np.uint8(masks)) == expected
    tensors = torch.from_numpy(np.stack(maps)), [torch.from_numpy(mask) for mask in masks]
    assert metrics.pixel_metrics(*tensors) == expected
    assert metrics.pixel_metrics((m for m in maps), (m if m.any() else None for m in masks)) == expected
    np.save(tmp_path / "maps.npy", np.stack(maps))
    assert metrics.pixel_metrics(np.load(tmp_path / "maps.npy", mmap_mode="r"), masks) == expected
    halves = [half for m in maps for half in (m[:, :10], m[:, 10:])]
    assert_exact(halves, [half for m in masks for half in (m[:, :10], m[:, 10:])])


@pytest.mark.parametrize("size", [1, 7, 100])
@pytest.mark.parametrize("name", ["_PIECE", "_STREAM", "_BLOCK"])
def test_pieces_of_any_size_give_the_same(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    maps, masks = defects(3, 16)
    maps[0] = maps[0].astype(np.float64) + 1e-12  # between float32 neighbours, piece edges too
    maps[1] = np.round(maps[1])
    whole = metrics.pixel_metrics(maps, masks)
    monkeypatch.setattr(metrics, name, size)
    assert metrics.pixel_metrics(maps, masks) == pytest.approx(whole, abs=1e-12)
    assert_exact(maps, masks)


def test_memory_does_not_grow_with_the_normal_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("_PIECE", 1 << 14), ("_STREAM", 1 << 14), ("_BLOCK", 1 << 12)):
        monkeypatch.setattr(metrics, name, size)
    shape = (48, 256, 256)
    rng = np.random.default_rng(0)
    maps = np.lib.format.open_memmap(tmp_path / "maps.npy", "w+", np.float32, shape)
    maps[:] = rng.standard_normal(shape, np.float32)
    masks = np.zeros(shape, bool)
    masks[1::4, :100, :100] = True
    peaks = []
    for n in (24, 48):
        tracemalloc.start()
        figures = metrics.pixel_metrics(maps[:n], masks[:n])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert figures["auroc"] == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=EXACT)
    assert peaks[1] < maps.nbytes / 4
    assert peaks[1] - peaks[0] < 10 * np.count_nonzero(masks[24:])


class Read(Sequence):
    """Maps that count how often one of them is read."""

    def __init__(self, maps: Arrays) -> None:
        self.maps, self.times = maps, 0

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, i: int) -> np.ndarray:
        image = self.maps[i]
        self.times += 1
        return image


def test_work_does_not_grow_with_the_thresholds_and_the_figure_is_that_of_800(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each map is read twice, each mask labelled and each pixel sorted once; what that saves: benchmarks/metrics.py."""
    maps, masks = defects(3, 256)
    labelled, label, chunks, sorted_chunks = [], ndimage.label, [], metrics._sorted_chunks

    def counted_label(mask: np.ndarray, *rest: np.ndarray) -> tuple[np.ndarray, int]:
        labelled.append(mask.size)
        return label(mask, *rest)

    def counted_chunks(*arguments: Any) -> Iterator[np.ndarray]:
        for chunk in sorted_chunks(*arguments):
            chunks.append(len(chunk))
            yield chunk

    monkeypatch.setattr(ndimage, "label", counted_label)
    monkeypatch.setattr(metrics, "_sorted_chunks", counted_chunks)
    read = Read(maps)
    exact = metrics.pixel_metrics(read, masks)["aupro_0.3"]
    assert read.times == 2 * 3 and labelled == [256 * 256] * 3
    assert sum(chunks) == sum(np.count_nonzero(~mask) for mask in masks)
    labelled.clear()
    assert exact == pytest.approx(aupro_800(maps, masks), abs=0.01)
    assert len(labelled) == 800 * 3


@pytest.mark.parametrize("n", [1, 3, 6])
def test_pro_800_is_the_customary_figure_without_labelling_at_every_threshold(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps, masks = defects(n, 64, seed=n)
    maps = [map_.astype(np.float64) for map_ in maps]
    expected = aupro_800(maps, masks)
    labelled, label = [], ndimage.label

    def counted_label(mask: np.ndarray, *rest: np.ndarray) -> tuple[np.ndarray, int]:
        labelled.append(mask.size)
        return label(mask, *rest)

    monkeypatch.setattr(ndimage, "label", counted_label)
    assert metrics.pro_800(iter(maps), iter(masks)) == pytest.approx(expected, rel=EXACT)
    assert len(labelled) == sum(mask.any() for mask in masks)


def test_pro_800_by_hand() -> None:
    """Thresholds 0, 0.25, 0.5 and 0.75; a pixel at a threshold is not above it, and rates below the limit are kept."""
    map_ = np.array([[0.0, 0.25, 0.3, 0.5, 1.0, 0.1, 0.8, 0.8, 0.8, 0.8]])
    mask = np.array([[0, 0, 0, 0, 0, 0, 1, 1, 0, 1]])
    # Above them: 0.75: 2 of 7 normal pixels, 0.5: 2, 0.25: 4, 0: 6; of the two regions all of the pixels.
    assert metrics.pro_800([map_], [mask], limit=0.6, steps=4) == 1.0
    assert np.isnan(metrics.pro_800([map_], [mask], limit=0.3, steps=4))  # one rate twice, 2 / 7
    map_[0, 9] = 0.6  # this region is covered from 0.5 on: (2/7, 1/2), (2/7, 1), (4/7, 1)
    assert metrics.pro_800([map_], [mask], limit=0.6, steps=4) == 1.0
    map_[0, 9] = 0.4  # and now from 0.25 on: (2/7, 1/2), (2/7, 1/2), (4/7, 1)
    assert metrics.pro_800([map_], [mask], limit=0.6, steps=4) == pytest.approx(0.75, rel=EXACT)
    assert np.isnan(metrics.pro_800([np.zeros((2, 2))], [np.eye(2)]))  # the same everywhere


def trapezoids(line: np.ndarray, limit: float = 1.0) -> float:
    """Return the area under a polyline up to `limit`, as `naive_aupro` takes it."""
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(line.T):
        if x0 < limit and x1 > x0:
            cut = min(x1, limit)
            area += (cut - x0) * (y0 + y0 + (y1 - y0) * (cut - x0) / (x1 - x0)) / 2
    return area


def steps(line: np.ndarray) -> float:
    recall, precision = line
    return float(np.diff(recall, prepend=0.0) @ precision)


@pytest.mark.parametrize(
    ("levels", "points", "tolerance"), [(3, 10**9, 1e-12), (10**6, 10**9, 1e-12), (10**6, 500, 2e-3)]
)
@pytest.mark.parametrize("piece", [150, 1 << 21])
def test_curves_have_the_areas_that_the_metrics_say(
    levels: int, points: int, tolerance: float, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_PIECE", piece)
    maps, masks = defects(8, 48)
    maps = [np.round(m * levels) / levels for m in maps]
    figures, curves = metrics.pixel_metrics(maps, masks), metrics.pixel_curves(maps, masks, points)
    assert trapezoids(curves["roc"]) == pytest.approx(figures["auroc"], abs=tolerance)
    assert steps(curves["pr"]) == pytest.approx(figures["average_precision"], abs=tolerance)
    assert trapezoids(curves["pro"], 0.3) / 0.3 == pytest.approx(figures["aupro_0.3"], abs=tolerance)
    assert trapezoids(curves["pro"], 0.05) / 0.05 == pytest.approx(figures["aupro_0.05"], abs=4 * tolerance)
    scores, labels = np.concatenate([m.ravel() for m in maps]), np.concatenate([m.ravel() for m in masks])
    images = metrics.image_curves(scores, labels, points)
    assert images.keys() == {"roc", "pr"}
    for name, line in images.items():
        assert line.shape[0] == 2 and line.shape[1] <= points
        assert curves[name].shape[1] <= points and curves[name][:, [0, -1]] == pytest.approx(line[:, [0, -1]])
        assert (np.diff(line[0]) >= 0).all()
    assert trapezoids(images["roc"]) == pytest.approx(figures["auroc"], abs=tolerance)
    assert steps(images["pr"]) == pytest.approx(figures["average_precision"], abs=tolerance)


def test_by_class_gives_each_class_the_mean_and_the_pool() -> None:
    rng = np.random.default_rng(0)
    classes = np.array(["nut", "bolt", "bolt", "nut"] * 10)
    labels = rng.random(40) < 0.5
    scores = rng.normal(size=40) + labels + 5 * (classes == "nut")
    table = metrics.by_class(metrics.image_metrics, scores, labels, classes)
    aurocs = {c: roc_auc_score(labels[classes == c], scores[classes == c]) for c in ("nut", "bolt")}
    assert list(table.per_class) == ["nut", "bolt"]
    assert {c: figures["auroc"] for c, figures in table.per_class.items()} == pytest.approx(aurocs, abs=EXACT)
    assert table.mean["auroc"] == pytest.approx(np.mean(list(aurocs.values())), abs=EXACT)
    assert table.pooled["auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=EXACT)
    tensors = torch.tensor(scores), torch.tensor(labels)
    assert metrics.by_class(metrics.image_metrics, *tensors, classes.tolist()) == table


def test_by_class_serves_pixels_and_names_the_class_that_fails() -> None:
    maps, masks = defects(8, 16)  # images 3 and 7 have no defect
    table = metrics.by_class(metrics.pixel_metrics, maps, masks, [0, 0, 1, 1, 0, 0, 1, 1])
    assert table.per_class[1] == metrics.pixel_metrics(maps[2:4] + maps[6:], masks[2:4] + masks[6:])
    assert table.pooled == metrics.pixel_metrics(maps, masks)
    with pytest.raises(ValueError, match="class 'good': masks hold no anomalous pixel"):
        metrics.by_class(metrics.pixel_metrics, maps, masks, ["bad"] * 3 + ["good"] + ["bad"] * 3 + ["good"])
    with pytest.raises(ValueError, match="predictions holds 8 images and classes 2"):
        metrics.by_class(metrics.pixel_metrics, maps, masks, [0, 1])


@pytest.mark.parametrize("metric", [metrics.auroc, metrics.average_precision, metrics.f1_max])
def test_bootstrap_resamples_within_each_label(metric: Callable) -> None:
    rng = np.random.default_rng(1)
    labels = np.arange(60) < 25
    scores = np.round(rng.normal(size=60) + labels, 1)
    number = (lambda s, y: metric(s, y)[0]) if metric is metrics.f1_max else (lambda s, y: metric(s, y))
    low, high = metrics.bootstrap_interval(scores, labels, metric, n=100, level=0.9, seed=3)
    assert low < number(scores, labels) < high
    seen: list[float] = []

    def recorded(s: np.ndarray, y: np.ndarray) -> float:
        assert y.sum() == labels.sum()
        assert set(s[y]) <= set(scores[labels]) and set(s[~y]) <= set(scores[~labels])
        seen.append(number(s, y))
        return seen[-1]

    slow = metrics.bootstrap_interval(scores, labels, recorded, n=100, level=0.9, seed=3)
    assert (low, high) == pytest.approx(slow, abs=EXACT)
    assert slow == pytest.approx((np.quantile(seen, 0.05), np.quantile(seen, 0.95)), abs=EXACT)


def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    # AUROC of N(1, 1) against N(0, 1) is Phi(1 / sqrt 2) = 0.76025.
    rng = np.random.default_rng(0)
    labels = np.arange(200) < 100
    covered = 0
    for seed in range(100):
        scores = rng.normal(size=200) + labels
        low, high = metrics.bootstrap_interval(scores, labels, n=100, level=0.8, seed=seed)
        covered += low <= 0.76025 <= high
    assert 68 <= covered <= 91  # 99.7% of Binomial(100, 0.8)


def test_pixel_intervals_are_those_of_images_resampled_in_full() -> None:
    maps, masks = defects(12, 32)
    labels = np.array([bool(np.any(mask)) for mask in masks])
    assert 0 < labels.sum() < len(labels)
    drawn = [
        metrics.pixel_metrics([maps[i] for i in rows], [masks[i] for i in rows])
        for rows in metrics._resamples(labels, 40, seed=3)
    ]
    actual = metrics.pixel_intervals(maps, masks, n=40, level=0.9, seed=3)
    assert list(actual) == list(drawn[0])
    for name, interval in actual.items():
        expected = np.quantile([figures[name] for figures in drawn], [0.05, 0.95])
        width = expected[1] - expected[0]
        assert width > 0.01
        np.testing.assert_allclose(interval, expected, atol=0.02 * width, err_msg=name)


def test_pixel_intervals_of_one_defect_and_of_images_without_a_normal_pixel() -> None:
    ramp = np.arange(16.0).reshape(4, 4)
    one = metrics.pixel_intervals([ramp], [ramp > 7], n=5)
    assert {name: low for name, (low, _) in one.items()} == pytest.approx(dict.fromkeys(one, 1.0))
    assert all(low == high for low, high in one.values())
    actual = metrics.pixel_intervals([ramp, ramp], [ramp > 7, ramp >= 0], n=20)  # some draw the second twice
    assert all(0 <= low <= high <= 1 for low, high in actual.values())


SQUARE = np.ones((2, 2), np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.auroc([1, 2], [1, 1]), r"labels is anomalous throughout \(2 items\): add normal"),
        (lambda: metrics.f1_max([1, 2], [0, 0]), "labels is normal throughout .* add anomalous"),
        (lambda: metrics.auroc([], []), r"labels is normal throughout \(0 items\)"),
        (lambda: metrics.average_precision([1, float("nan")], [0, 1]), r"scores\[1\] is nan"),
        (lambda: metrics.auroc([1, 2, -float("inf")], [0, 1, 1]), r"scores\[2\] is -inf"),
        (lambda: metrics.auroc([1, 2], [0, 1, 1]), r"scores has shape \(2,\) and labels \(3,\)"),
        (lambda: metrics.auroc([1, 2, 3], [0, 1, 2]), "labels holds values other than 0 and 1"),
        (lambda: metrics.bootstrap_interval([1, 2], [1, 1]), "labels is anomalous throughout"),
        (lambda: metrics.bootstrap_interval([1, 2], [0, 1], level=95), "level = 95"),
        (lambda: metrics.aupro([SQUARE], [0 * SQUARE]), "masks hold no anomalous pixel.* add images"),
        (lambda: metrics.aupro([SQUARE], [None]), "masks hold no anomalous pixel"),
        (lambda: metrics.pixel_metrics([], []), "masks hold no anomalous pixel"),
        (lambda: metrics.pixel_metrics([SQUARE], [SQUARE]), "masks hold no normal pixel.* add images"),
        (lambda: metrics.aupro([SQUARE, SQUARE * np.nan], [SQUARE, None]), r"maps\[1\] holds a NaN"),
        (lambda: metrics.aupro([SQUARE, SQUARE * np.inf], [SQUARE, None]), r"maps\[1\] holds .* infinity"),
        (lambda: metrics.aupro([SQUARE, SQUARE], [SQUARE, SQUARE * np.nan]), r"masks\[1\] holds a NaN"),
        (lambda: metrics.aupro([SQUARE, SQUARE], [SQUARE, SQUARE[:1]]), r"maps\[1\] .*\(2, 2\) .* \(1, 2\)"),
        (lambda: metrics.aupro([SQUARE[None]], [SQUARE[None]]), r"shape \(1, 2, 2\) .* \(H, W\)"),
        (lambda: metrics.aupro([SQUARE] * 2, [SQUARE]), "masks ends after 1 images"),
        (lambda: metrics.aupro(iter([SQUARE]), [SQUARE, None]), "maps ends after 1 images"),
        (lambda: metrics.aupro([SQUARE], [SQUARE], limit=30), "limit = 30"),
        (lambda: metrics.pixel_metrics([SQUARE], [SQUARE], limits=(0.3, 0)), "limit = 0"),
        (lambda: metrics.pro_800([SQUARE], [None]), "masks hold no anomalous pixel"),
        (lambda: metrics.pro_800([SQUARE * np.nan], [SQUARE]), r"maps\[0\] holds a NaN"),
        (lambda: metrics.pro_800([SQUARE], [SQUARE], limit=2), "limit = 2"),
        (lambda: metrics.pixel_intervals([SQUARE], [None]), "masks hold no anomalous pixel"),
        (lambda: metrics.pixel_intervals([SQUARE], [SQUARE], n=0), "n = 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
