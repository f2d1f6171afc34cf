"""What lies above the threshold in an anomaly map: connected regions, found in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

BAND_PIXELS = 2**20  # of the map that are looked at together; a pixel above the threshold takes some 80 bytes

Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Region:
    """Pixels above the threshold that touch each other, by sides or corners.

    Attributes:
        left, top, right, bottom: the box around them in pixels of the map; right and bottom are the first outside.
        area: how many pixels.
        peak: their largest score.
        peak_x, peak_y: the pixel that has it (the first of equals in reading order).
        mean: their mean score.
    """

    left: int
    top: int
    right: int
    bottom: int
    area: int
    peak: float
    peak_x: int
    peak_y: int
    mean: float


def find_regions(anomaly_map: ArrayLike, threshold: float) -> list[Region]:
    """The regions of a map (H, W) whose scores are above `threshold`, the highest peak first; none if it is NaN.

    The map is labelled in bands of `BAND_PIXELS` and what touches across their edges is joined, so that the memory
    does not grow with the map. An image score comes from the map at `msk_size`; in a map of another size the peak may
    be a little lower, so a picture just above the threshold may have no region.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    scores = np.asarray(anomaly_map)
    rows = max(1, BAND_PIXELS // scores.shape[1])
    parts: list[Columns] = []
    joins = [np.empty((2, 0), np.int64)]
    count = 0
    above = np.zeros(scores.shape[1], np.int64)  # labels in the row above the band, 0 below the threshold
    for top in range(0, len(scores), rows):
        labels, columns = _band(scores[top : top + rows], threshold, top)
        labels[labels > 0] += count
        joins.append(_touching(above, labels[0]))
        above = labels[-1]
        if columns is not None:
            parts.append(columns)
            count += len(columns["area"])
    if not parts:
        return []
    first, second = np.concatenate(joins, 1) - 1
    graph = coo_array((np.ones(len(first), bool), (first, second)), shape=(count, count))
    _, region = connected_components(graph, directed=False)
    found = _merge(region, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    found["mean"] = found.pop("total") / found["area"]
    order = np.lexsort((found["left"], found["top"], -found["peak"]))
    values = zip(*(found[name][order].tolist() for name in Region.__dataclass_fields__), strict=True)
    return [Region(*row) for row in values]


def _band(band: NDArray[Any], threshold: float, top: int) -> tuple[NDArray[np.int64], Columns | None]:
    """Labels (rows, W) from 1 of a band that starts at row `top`, and of each label what `_merge` makes."""
    from scipy.ndimage import label

    labels, count = label(band > threshold, np.ones((3, 3)), output=np.int64)
    if not count:
        return labels, None
    y, x = np.nonzero(labels)
    score, ids = band[y, x].astype(np.float64), labels[y, x]
    y += top
    pixels = {"left": x, "top": y, "right": x + 1, "bottom": y + 1, "area": np.ones_like(x)}
    return labels, _merge(ids, pixels | {"total": score, "peak": score, "peak_x": x, "peak_y": y})


def _touching(upper: NDArray[np.int64], lower: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pairs (2, n) of labels in two neighbouring rows whose pixels touch by a side or a corner."""
    width = len(upper)
    pairs = []
    for shift in (-1, 0, 1):
        pair = np.stack([upper[max(0, -shift) : width - max(0, shift)], lower[max(0, shift) : width + min(0, shift)]])
        pairs.append(pair[:, (pair > 0).all(0)])
    return np.unique(np.concatenate(pairs, 1), axis=1)


def _merge(ids: NDArray[Any], parts: Columns) -> Columns:
    """One row for each id, in the order of the ids, of the parts that carry it."""
    order = np.lexsort((-parts["peak"], ids))
    parts = {name: column[order] for name, column in parts.items()}
    starts = np.flatnonzero(np.diff(ids[order], prepend=-1))
    return {
        **{name: np.minimum.reduceat(parts[name], starts) for name in ("left", "top")},
        **{name: np.maximum.reduceat(parts[name], starts) for name in ("right", "bottom")},
        **{name: np.add.reduceat(parts[name], starts) for name in ("area", "total")},
        **{name: parts[name][starts] for name in ("peak", "peak_x", "peak_y")},
    }
