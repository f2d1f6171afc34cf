"""Exact metrics of detection and localisation, over images or pixels: AUROC, average precision, F1max, AUPRO.

Every metric here is a function of a few numbers: for each distinct score of an *anomalous* item, how many normal
items score less and how many score the same. Normal pixels are therefore never kept, only counted, and pixel
metrics take any number of maps at native resolution, in memory that grows with the anomalous pixels alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PIECE = 1 << 21  # anomalous pixels ranked at a time
_STREAM = 1 << 24  # normal pixels sorted and counted at a time: 64 MiB of float32
_BLOCK = 1 << 16  # thresholds handled at a time: bounds temporaries, keeps binary searches in the cache
_BINS = 1000  # bins of scores, where images are resampled


def auroc(scores: Any, labels: Any) -> float:
    """Return the area under the ROC curve; a tie between a normal and an anomalous item counts one half.

    scores: (n,), higher is more anomalous; labels: (n,), 1 or True for anomalous. Arrays, tensors or lists.
    Raises ValueError for a score that is not finite, labels of one class only, or lengths that differ.
    """
    from sklearn.metrics import roc_auc_score

    scores, labels = _scores_and_labels(scores, labels)
    return float(roc_auc_score(labels, scores))


def average_precision(scores: Any, labels: Any) -> float:
    """Return the sum of precision times step in recall, without interpolation. Arguments and errors as for `auroc`."""
    from sklearn.metrics import average_precision_score

    scores, labels = _scores_and_labels(scores, labels)
    return float(average_precision_score(labels, scores))


def f1_max(scores: Any, labels: Any) -> tuple[float, float]:
    """Return the largest F1 of alarms at score >= threshold, and the highest threshold that attains it.

    Arguments and errors as for `auroc`.
    """
    return _Ranking.of(*_scores_and_labels(scores, labels)).f1_max()


def aupro(maps: Iterable[Any], masks: Iterable[Any], limit: float = 0.3) -> float:
    """Return the area under the per-region-overlap curve up to the false-positive rate `limit`, divided by `limit`.

    The PRO curve (Bergmann et al., IJCV 2021) is the overlap averaged over all defect regions of all images,
    against the false-positive rate over all normal pixels. It has a point at every distinct score, is linear between
    them, and is cut at exactly `limit`. A region is an 8-connected component of a mask, as MVTec evaluates it.

    maps, masks and errors: see `pixel_metrics`.
    """
    _check_limit(limit)
    return sum(ranking.area(overlap, limit) for ranking, overlap in _rank_pixels(maps, masks)) / limit


def pixel_metrics(maps: Iterable[Any], masks: Iterable[Any], limits: Sequence[float] = (0.3, 0.05)) -> dict[str, float]:
    """Return AUROC, average precision and F1max over all pixels of all images, and AUPRO at each of `limits`.

    maps: one (H, W) anomaly map an image, higher is more anomalous; sizes and dtypes may differ between images, and no
    precision is lost. masks: as many (H, W) masks, non-zero where anomalous, or None for an image without a defect.
    Both are arrays, tensors, or any iterables of them.

    Memory beyond the maps is about 0.35 GB and 9 bytes an anomalous pixel (for float32 maps whose scores do not tie
    by the million). The maps are read once, and once more for every two million anomalous pixels. A generator
    is kept as a list: where the maps do not fit in memory, pass memory-mapped arrays, or a sequence that reads
    its files on access.

    Returns {"auroc", "average_precision", "f1_max", "aupro_0.3", "aupro_0.05"}.
    Raises ValueError for a score that is not finite, a NaN in a mask, a mask of another shape than its map, another
    number of masks than maps, no anomalous or no normal pixel at all, or a limit outside (0, 1].
    """
    for limit in limits:
        _check_limit(limit)
    names = {limit: f"aupro_{limit:g}" for limit in limits}
    figures = dict.fromkeys(["auroc", "average_precision", "f1_max", *names.values()], 0.0)
    for ranking, overlap in _rank_pixels(maps, masks):
        figures["auroc"] += ranking.auroc()
        figures["average_precision"] += ranking.average_precision()
        figures["f1_max"] = max(figures["f1_max"], ranking.f1_max()[0])
        for limit, name in names.items():
            figures[name] += ranking.area(overlap, limit) / limit
    return figures


def pro_800(maps: Iterable[Any], masks: Iterable[Any], limit: float = 0.3, steps: int = 800) -> float:
    """Return the area under the per-region-overlap curve as some official codes compute it, by `steps` thresholds.

    The thresholds divide the range of all scores evenly, from the smallest on; a pixel above one (not at it) is marked.
    Of the points with a false-positive rate below `limit` the rates are stretched to [0, 1], and the curve through the
    points is integrated by trapezoids: nothing is interpolated at `limit`, and there is no point at a rate of 0 unless
    a threshold gives one. `aupro` is exact instead. NaN where fewer than two rates remain, as for maps that are the
    same everywhere.

    maps, masks and errors: see `pixel_metrics`. The maps are read twice, and each region is labelled once.
    """
    _check_limit(limit)
    maps, masks = _rereadable(maps), _rereadable(masks)
    anomalous = _anomalous_pixels(_images(maps, masks))
    bounds = [(float(map_.min()), float(map_.max())) for map_, _ in _images(maps, masks)]
    low, high = min(low for low, _ in bounds), max(high for _, high in bounds)
    thresholds = low + (high - low) / steps * np.arange(steps)
    normal, overlap = np.zeros((2, steps + 1))  # by the number of thresholds that pixels are above
    for map_, mask in _images(maps, masks):
        normal += np.bincount(np.searchsorted(thresholds, map_[~mask].astype(np.float64)), minlength=steps + 1)
    for scores, regions in zip(anomalous.scores, anomalous.regions, strict=True):
        above = np.searchsorted(thresholds, scores.astype(np.float64))
        overlap += np.bincount(above, anomalous.shares[regions], minlength=steps + 1)
    # Sums from the highest threshold down: the shares of what is above each.
    rates, covers = (sums[:0:-1].cumsum() for sums in (normal / anomalous.n_negatives, overlap))
    rates, covers = rates[rates < limit], covers[rates < limit]
    if len(rates) < 2 or rates[0] == rates[-1]:
        return float("nan")
    return float(np.diff(rates) @ (covers[1:] + covers[:-1]) / 2 / (rates[-1] - rates[0]))


def image_metrics(scores: Any, labels: Any) -> dict[str, float]:
    """Return {"auroc", "average_precision", "f1_max"} over images. Arguments and errors as for `auroc`."""
    return {
        "auroc": auroc(scores, labels),
        "average_precision": average_precision(scores, labels),
        "f1_max": f1_max(scores, labels)[0],
    }


def image_curves(scores: Any, labels: Any, points: int = 500) -> dict[str, np.ndarray]:
    """Return the curves behind `image_metrics`, to be drawn. Arguments and errors as for `auroc`.

    Returns {"roc": false-positive rate and recall, "pr": recall and precision}, (2, at most `points`) float64 each,
    from the strictest threshold to the loosest. "roc" is a polyline with every corner of the exact curve, "pr" a step
    function (each precision holds back to the recall of the point before): their areas are AUROC and average
    precision. A curve of more than `points` points is thinned to points that are evenly spaced along it.
    """
    ranking = _Ranking.of(*_scores_and_labels(scores, labels))
    roc = _from_corner_to_corner([ranking.rate_curve(ranking.recall_rise(), 0.0)])
    return {"roc": _thinned(roc, points), "pr": _thinned(ranking.precision_curve()[:, ::-1], points)}


def pixel_curves(maps: Iterable[Any], masks: Iterable[Any], points: int = 500) -> dict[str, np.ndarray]:
    """Return the curves behind `pixel_metrics`, as `image_curves`, and "pro": false-positive rate and mean overlap.

    Arguments, errors and the number of times that the maps are read are those of `pixel_metrics`; memory is some 0.3 GB
    more.
    """
    roc, pr, pro = [], [], []
    lost = uncovered = 0.0  # recall and overlap below the piece: what a threshold in it misses at least
    for ranking, overlap in _rank_pixels(maps, masks):
        recall = ranking.recall_rise()
        roc.append(_thinned(ranking.rate_curve(recall, lost), points))
        pr.append(_thinned(ranking.precision_curve(), points))
        pro.append(_thinned(ranking.rate_curve(overlap, uncovered), points))
        lost, uncovered = lost + recall.sum(), uncovered + overlap.sum()
    return {
        "roc": _thinned(_from_corner_to_corner(roc), points),
        "pr": _thinned(np.concatenate(pr, 1)[:, ::-1], points),
        "pro": _thinned(_from_corner_to_corner(pro), points),
    }


def _from_corner_to_corner(pieces: list[np.ndarray]) -> np.ndarray:
    """Return pieces of a curve, their thresholds ascending, as one curve from (0, 0) to (1, 1)."""
    return np.concatenate([np.ones((2, 1)), *pieces, np.zeros((2, 1))], 1)[:, ::-1]


def _thinned(line: np.ndarray, points: int) -> np.ndarray:
    """Return at most `points` of the points of a line (2, n), its ends among them, evenly spaced along it."""
    if line.shape[1] <= points:
        return line
    distances = np.concatenate([[0.0], np.abs(np.diff(line)).sum(0).cumsum()])  # from the start of the line
    return line[:, np.unique(np.searchsorted(distances, np.linspace(0, distances[-1], points)))]


@dataclass(frozen=True)
class ByClass:
    """Figures of each class on its own images, their unweighted mean, and those of all images together."""

    per_class: dict[Hashable, dict[str, float]]
    mean: dict[str, float]
    pooled: dict[str, float]


def by_class(
    metrics: Callable[[Any, Any], dict[str, float]],
    predictions: Any,
    targets: Any,
    classes: Sequence[Hashable],
) -> ByClass:
    """Return `image_metrics` or `pixel_metrics` of each class, their mean over the classes, and those of all images.

    predictions, targets: what `metrics` takes, indexable by image; classes: the class of each image.
    Raises the ValueError of `metrics` with the class named.
    """
    classes = classes.tolist() if isinstance(classes, (Tensor, np.ndarray)) else list(classes)
    for name, values in (("predictions", predictions), ("targets", targets)):
        if len(values) != len(classes):
            raise ValueError(f"{name} holds {len(values)} images and classes {len(classes)}: pass as many")
    # NumPy cannot read the rows of a tensor on another device or in bfloat16.
    predictions, targets = (
        _array(values) if isinstance(values, Tensor) else values for values in (predictions, targets)
    )
    per_class = {}
    for class_ in dict.fromkeys(classes):
        images = [i for i, other in enumerate(classes) if other == class_]
        try:
            per_class[class_] = metrics(_Subset(predictions, images), _Subset(targets, images))
        except ValueError as error:
            raise ValueError(f"class {class_!r}: {error}") from error
    pooled = metrics(predictions, targets)
    mean = {name: float(np.mean([figures[name] for figures in per_class.values()])) for name in pooled}
    return ByClass(per_class, mean, pooled)


def bootstrap_interval(
    scores: Any,
    labels: Any,
    metric: Callable[[Any, Any], Any] = auroc,
    n: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile bootstrap confidence interval (low, high) of an image-level metric.

    Normal and anomalous images are resampled separately, `n` times, because a test set fixes how many there are of
    each. metric: `auroc`, `average_precision`, `f1_max` (the interval of F1, not of its threshold), or any
    function of (scores, labels) that returns a number. level: the share of the resamples between the bounds. Other
    arguments and errors as for `auroc`.
    """
    _check_bootstrap(n, level)
    scores, labels = _scores_and_labels(scores, labels)
    statistic = _STATISTICS.get(metric)
    values = []
    for rows in _resamples(labels, n, seed):
        if statistic is None:
            values.append(metric(scores[rows], labels[rows]))
        else:
            values.append(statistic(_Ranking.of(scores[rows], labels[rows])))
    return _middle(values, level)


def pixel_intervals(
    maps: Iterable[Any],
    masks: Iterable[Any],
    limits: Sequence[float] = (0.3, 0.05),
    n: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Return percentile bootstrap confidence intervals (low, high) of the figures of `pixel_metrics`, by their names.

    Images are resampled, not pixels, which depend on their neighbours: those with a defect and those without
    separately, `n` times. Each image counts by its histogram: its scores fall into a thousand bins, with about as many
    anomalous pixels of all images in each, and the scores in one bin count as ties. That moves a bound by about a
    hundredth of the interval's width.

    Other arguments and errors as for `pixel_metrics` and `bootstrap_interval`. Memory beyond the maps is 25 kB an image
    and 9 bytes an anomalous pixel; the maps are read twice.
    """
    _check_bootstrap(n, level)
    for limit in limits:
        _check_limit(limit)
    binned = _Binned.of(_rereadable(maps), _rereadable(masks))
    figures: dict[str, list[float]] = {}
    for rows in _resamples(binned.regions > 0, n, seed):
        if ranked := binned.ranking(rows):
            ranking, overlap = ranked
            sample = {metric.__name__: statistic(ranking) for metric, statistic in _STATISTICS.items()}
            sample |= {f"aupro_{limit:g}": ranking.area(overlap, limit) / limit for limit in limits}
            for name, value in sample.items():
                figures.setdefault(name, []).append(value)
    return {name: _middle(values, level) for name, values in figures.items()}


def _check_bootstrap(n: int, level: float) -> None:
    if n < 1 or not 0 < level < 1:
        raise ValueError(f"n = {n} and level = {level}: pass n of at least 1 and a level between 0 and 1")


def _resamples(labels: np.ndarray, n: int, seed: int) -> Iterator[np.ndarray]:
    """Yield the rows of `n` resamples, each with as many normal and as many anomalous items as there are."""
    normal, anomalous = np.flatnonzero(~labels), np.flatnonzero(labels)
    rng = np.random.default_rng(seed)
    for _ in range(n):
        yield np.concatenate([rng.choice(rows, len(rows)) for rows in (normal, anomalous) if len(rows)])


def _middle(values: Sequence[float], level: float) -> tuple[float, float]:
    """Return the bounds between which the middle share `level` of the values lies."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class _Ranking:
    """The ranks of T distinct scores of anomalous items, the thresholds, among all items.

    They may be those of a piece of the range of scores: to get a metric of the whole, add those of its pieces, or take
    their largest F1max.
    """

    thresholds: np.ndarray  # (T,) ascending
    positives_below: np.ndarray  # (T + 1,) int64: anomalous items that score less; last: up to the last threshold
    negatives_below: np.ndarray  # (T,) int64: normal items that score less
    negatives_up_to: np.ndarray  # (T,) int64: normal items that score less or the same
    n_positives: int
    n_negatives: int

    @classmethod
    def of(cls, scores: np.ndarray, labels: np.ndarray) -> _Ranking:
        """Return the ranking of items with scores (n,) and labels (n,) bool."""
        positives, negatives = np.sort(scores[labels]), np.sort(scores[~labels])
        thresholds, starts = _distinct(positives)
        below, up_to = (np.searchsorted(negatives, thresholds, side) for side in ("left", "right"))
        return cls(thresholds, starts, below, up_to, len(positives), len(negatives))

    def area(self, rise: np.ndarray, limit: float) -> float:
        """Return the integral of the curve of recall against false-positive rate, over rates from 0 to `limit`.

        rise: (T,), by how much recall grows at each threshold. Where normal items tie with a threshold, it
        grows linearly between the rates a (above the threshold) and b (from the threshold on). A rise r adds r
        times the mean of max(limit - x, 0) over x in [a, b], so the area is a plain sum over thresholds.
        """
        area = 0.0
        for t in _blocks(len(self.thresholds)):
            a = 1 - self.negatives_up_to[t] / self.n_negatives
            b = 1 - self.negatives_below[t] / self.n_negatives
            a_cut, b_cut = np.minimum(a, limit), np.minimum(b, limit)
            inside = np.divide(b_cut - a_cut, b - a, out=np.ones_like(a), where=b > a)
            area += float(rise[t] @ (inside * (limit - (a_cut + b_cut) / 2)))
        return area

    def recall_rise(self) -> np.ndarray:
        """Return by how much recall grows at each threshold, (T,)."""
        return np.diff(self.positives_below) / self.n_positives

    def rate_curve(self, rise: np.ndarray, below: float) -> np.ndarray:
        """Return the curve that `area` integrates, (2, 2T), thresholds ascending; `below`: the rise in lower pieces."""
        lost = below + np.cumsum(rise)
        from_threshold_on, above = self.negatives_below, self.negatives_up_to
        rates = 1 - np.stack([from_threshold_on, above], 1) / self.n_negatives
        return np.stack([rates, 1 - np.stack([lost - rise, lost], 1)]).reshape(2, -1)

    def precision_curve(self) -> np.ndarray:
        """Return recall and precision of alarms at score >= threshold, (2, T), thresholds ascending."""
        true, false = self._alarms(slice(0, len(self.thresholds)))
        return np.stack([true / self.n_positives, true / (true + false)])

    def auroc(self) -> float:
        return self.area(self.recall_rise(), 1.0)

    def average_precision(self) -> float:
        total = 0.0
        for t in _blocks(len(self.thresholds)):
            true, false = self._alarms(t)
            total += float(np.diff(self.positives_below[t.start : t.stop + 1]) @ (true / (true + false)))
        return total / self.n_positives

    def f1_max(self) -> tuple[float, float]:
        best, threshold = 0.0, float("nan")
        for t in _blocks(len(self.thresholds)):
            true, false = self._alarms(t)
            f1 = 2 * true / (true + false + self.n_positives)
            last = len(f1) - 1 - int(np.argmax(f1[::-1]))
            if f1[last] >= best:
                best, threshold = float(f1[last]), float(self.thresholds[t][last])
        return best, threshold

    def _alarms(self, t: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers of true and false alarms, if every score >= threshold raises one, for thresholds `t`."""
        return self.n_positives - self.positives_below[t], self.n_negatives - self.negatives_below[t]


# The metrics that a ranking gives in 0.1 ms, where a call to scikit-learn takes some milliseconds.
_STATISTICS: dict[Callable, Callable[[_Ranking], float]] = {
    auroc: _Ranking.auroc,
    average_precision: _Ranking.average_precision,
    f1_max: lambda ranking: ranking.f1_max()[0],
}


def _rank_pixels(maps: Iterable[Any], masks: Iterable[Any]) -> Iterator[tuple[_Ranking, np.ndarray]]:
    """Yield the ranking of all pixels in pieces of ascending score, each with the rise of the mean overlap (T,).

    The rise is that of the overlap averaged over all regions, at each threshold.
    """
    maps, masks = _rereadable(maps), _rereadable(masks)
    pixels = _anomalous_pixels(_images(maps, masks))
    positives_below = negatives_below = 0
    for low, high in pairwise(_edges(pixels.scores)):
        inside = [(of_image >= low) & (of_image < high) for of_image in pixels.scores]
        scores = np.concatenate([x[rows] for x, rows in zip(pixels.scores, inside, strict=True)])
        regions = np.concatenate([x[rows] for x, rows in zip(pixels.regions, inside, strict=True)])
        order = np.argsort(scores)
        thresholds, starts = _distinct(scores[order])
        overlap = np.add.reduceat(pixels.shares[regions[order]], starts[:-1])
        del inside, scores, regions, order

        images = _images(maps, masks)
        negatives = (map_[~mask & (map_ >= low) & (map_ < high)] for map_, mask in images)
        below, up_to = np.full((2, len(thresholds)), negatives_below)
        for chunk in _sorted_chunks(negatives, min(pixels.n_negatives, _STREAM), thresholds.dtype):
            negatives_below += len(chunk)
            for t in _blocks(len(thresholds)):
                block = thresholds[t]
                first = int(np.searchsorted(chunk, block[0], "left"))
                near = chunk[first : np.searchsorted(chunk, block[-1], "right")]
                below[t] += first + np.searchsorted(near, block, "left")
                up_to[t] += first + np.searchsorted(near, block, "right")
        starts += positives_below
        positives_below = int(starts[-1])
        yield _Ranking(thresholds, starts, below, up_to, pixels.n_positives, pixels.n_negatives), overlap


def _rereadable(items: Iterable[Any]) -> Iterable[Any]:
    """Return items that can be iterated over more than once: those of a generator as a list."""
    return list(items) if iter(items) is items else items


@dataclass(frozen=True)
class _AnomalousPixels:
    """The P_i anomalous pixels of each image with a defect, and the numbers of pixels of all images."""

    scores: list[np.ndarray]  # (P_i,) each
    regions: list[np.ndarray]  # (P_i,) int32 each: the pixels' regions, numbered over all images
    shares: np.ndarray  # (R,): what a pixel of each region adds to the mean overlap
    n_positives: int
    n_negatives: int


def _anomalous_pixels(images: Iterable[tuple[np.ndarray, np.ndarray]]) -> _AnomalousPixels:
    """Return the anomalous pixels of images, each given as map and mask; errors as for `pixel_metrics`."""
    from scipy import ndimage

    scores, regions, areas = [], [], []
    n_regions = n_pixels = 0
    for i, (map_, mask) in enumerate(images):
        if not np.isfinite(map_).all():
            raise ValueError(f"maps[{i}] holds a NaN or an infinity, which have no rank: find their origin")
        if mask.any():
            components, n_components = ndimage.label(mask, np.ones((3, 3)))
            region = components[mask] - 1
            scores.append(map_[mask])
            regions.append(region + np.int32(n_regions))
            areas.append(np.bincount(region))
            n_regions += n_components
        n_pixels += mask.size
    n_positives = sum(map(len, scores))
    if n_positives in (0, n_pixels):
        missing = "anomalous" if n_positives == 0 else "normal"
        raise ValueError(f"masks hold no {missing} pixel: pixel metrics need both, add images with some")
    shares = 1 / (n_regions * np.concatenate(areas))
    return _AnomalousPixels(scores, regions, shares, n_positives, n_pixels - n_positives)


@dataclass(frozen=True)
class _Binned:
    """Histograms of each of n images over B bins of ascending scores, from which any sample of them can be ranked."""

    pixels: np.ndarray  # (n, 3, B) float64: numbers of normal and of anomalous pixels, and shares of regions
    regions: np.ndarray  # (n,) int64: number of regions of each image

    @classmethod
    def of(cls, maps: Iterable[Any], masks: Iterable[Any]) -> _Binned:
        """Return the histograms of maps and masks, which are read twice; errors as for `pixel_metrics`."""
        anomalous = _anomalous_pixels(_images(maps, masks))
        step = 1 + anomalous.n_positives // _PIECE
        sample = np.sort(np.concatenate([of_image[::step] for of_image in anomalous.scores]))
        edges = np.unique(sample[len(sample) * np.arange(1, _BINS) // _BINS])
        defects = zip(anomalous.scores, anomalous.regions, strict=True)
        pixels, counts = [], []
        for map_, mask in _images(maps, masks):
            row, count = np.zeros((3, len(edges) + 1)), 0
            row[0] = np.bincount(np.searchsorted(edges, map_[~mask], "right"), minlength=row.shape[1])
            if mask.any():
                scores, regions = next(defects)
                bins = np.searchsorted(edges, scores, "right")
                row[1] = np.bincount(bins, minlength=row.shape[1])
                row[2] = np.bincount(bins, anomalous.shares[regions] * len(anomalous.shares), minlength=row.shape[1])
                count = int(regions.max() - regions.min()) + 1
            pixels.append(row)
            counts.append(count)
        return cls(np.stack(pixels), np.array(counts))

    def ranking(self, rows: np.ndarray) -> tuple[_Ranking, np.ndarray] | None:
        """Return what `_rank_pixels` yields, in one piece, for images of which any may occur more than once.

        None if these images have no normal pixel.
        """
        images, times = np.unique(rows, return_counts=True)
        normal, anomalous, overlap = np.tensordot(times, self.pixels[images], 1)
        bins = np.flatnonzero(anomalous)
        up_to = np.cumsum(normal)
        below = np.concatenate([[0], np.cumsum(anomalous[bins])])
        if up_to[-1] == 0:
            return None
        ranking = _Ranking(bins, below, (up_to - normal)[bins], up_to[bins], below[-1], up_to[-1])
        return ranking, overlap[bins] / (times @ self.regions[images])


def _edges(scores: list[np.ndarray]) -> np.ndarray:
    """Return the edges (E + 1, 1) of E pieces [edge, next edge), none empty, of about _PIECE of these scores each."""
    n_pieces = -(-sum(map(len, scores)) // _PIECE)
    sample = np.sort(np.concatenate([of_image[:: 1 + _PIECE // 4096] for of_image in scores]))
    quantiles = sample[[len(sample) * i // n_pieces for i in range(1, n_pieces)]]
    inner = np.unique(quantiles[quantiles > sample[0]])
    # Rows of one edge rather than scalars: NumPy 1 would round a float64 scalar to compare it with float32.
    return np.concatenate([[-np.inf], inner, [np.inf]]).astype(sample.dtype)[:, None]


def _images(maps: Iterable[Any], masks: Iterable[Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield each image's map, (H, W) float32 or float64, and mask, (H, W) bool; errors as for `pixel_metrics`."""
    end = object()
    for i, (map_, mask) in enumerate(zip_longest(maps, masks, fillvalue=end)):
        if map_ is end or mask is end:
            short, long = ("maps", "masks") if map_ is end else ("masks", "maps")
            raise ValueError(f"{short} ends after {i} images and {long} goes on: pass one mask a map")
        map_ = _array(map_)
        if map_.dtype not in (np.float32, np.float64):
            map_ = map_.astype(np.float32 if map_.dtype == np.float16 else np.float64)
        mask = np.zeros(map_.shape, bool) if mask is None else _array(mask)
        if mask.dtype.kind == "f" and np.isnan(mask).any():
            raise ValueError(f"masks[{i}] holds a NaN: pass 0 where a pixel is normal, anything else where it is not")
        mask = mask != 0
        if map_.ndim != 2 or map_.shape != mask.shape:
            raise ValueError(
                f"maps[{i}] has shape {map_.shape} and masks[{i}] {mask.shape}: pass both as (H, W), "
                "the mask resized to the map or the map to the mask"
            )
        yield map_, mask


def _sorted_chunks(arrays: Iterable[np.ndarray], size: int, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Yield all values, `size` at a time, sorted, in `dtype` or a wider one. A chunk is valid until the next."""
    buffer, used = np.empty(size, dtype), 0
    for array in arrays:
        buffer = buffer.astype(np.promote_types(array.dtype, buffer.dtype), copy=False)
        while len(array):
            head = array[: size - used]
            buffer[used : used + len(head)] = head
            used, array = used + len(head), array[len(head) :]
            if used == size:
                buffer.sort()
                yield buffer
                used = 0
    buffer[:used].sort()
    yield buffer[:used]


def _scores_and_labels(scores: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return scores (n,) as float64 and labels (n,) as bool; errors as for `auroc`."""
    scores, labels = _array(scores).astype(np.float64), _array(labels)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(f"scores has shape {scores.shape} and labels {labels.shape}: pass both as (n,)")
    if not np.isfinite(scores).all():
        first = int(np.argmin(np.isfinite(scores)))
        raise ValueError(f"scores[{first}] is {scores[first]}, which has no rank: find its origin")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels holds values other than 0 and 1: pass 1 for anomalous and 0 for normal")
    labels = labels.astype(bool)
    if labels.all() or not labels.any():
        only, other = ("anomalous", "normal") if labels.any() else ("normal", "anomalous")
        raise ValueError(f"labels is {only} throughout ({len(labels)} items): add {other} items")
    return scores, labels


def _check_limit(limit: float) -> None:
    if not 0 < limit <= 1:
        raise ValueError(f"limit = {limit}: a false-positive rate is above 0 and at most 1")


def _distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the T distinct values of a sorted, non-empty array, and where each starts, the array's length last."""
    starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1], [True]]))
    return values[starts[:-1]], starts


def _blocks(length: int) -> Iterator[slice]:
    """Return consecutive slices of at most _BLOCK items, up to `length`."""
    return (slice(start, min(start + _BLOCK, length)) for start in range(0, length, _BLOCK))


def _array(values: Any) -> np.ndarray:
    """Return an array, or a tensor on any device and of any dtype, or a list, as an array; bfloat16 as float32."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return np.asarray(values)


class _Subset(Sequence):
    """Items of a sequence at the given indices, each read when it is indexed."""

    def __init__(self, items: Any, indices: Sequence[int]):
        self.items, self.indices = items, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: Any) -> Any:
        return self.items[self.indices[i]]
