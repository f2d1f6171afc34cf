"""Connected regions of an anomaly map above the threshold, found in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

BAND_PIXELS = 2**20  # pixels of the map that are labelled together; one above the threshold takes some 80 bytes

Columns = dict[str, NDArray[Any]]  # a table: fields of regions, or of parts of regions, by name


@dataclass(frozen=True)
class Region:
    """Pixels above the threshold that touch each other by sides or corners.

    Attributes:
        left, top, right, bottom: the bounding box in pixels of the map; right and bottom lie just outside.
        area: the number of pixels.
        peak: the largest score.
        peak_x, peak_y: the pixel with the largest score (the first in reading order, if there are several).
        mean: the mean score.
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
    """Return the regions of a map (H, W) with scores above `threshold`, the highest peak first; none if it is NaN.

    The map is labelled in bands of `BAND_PIXELS`, and parts that touch across the edge of a band are joined, so that
    the memory does not grow with the map. The image score is the maximum of the map at `msk_size`. In a map of another
    size the peak may be a little lower, so an image just above the threshold may have no region.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    scores = np.asarray(anomaly_map)
    rows = max(1, BAND_PIXELS // scores.shape[1])
    parts: list[Columns] = []
    touching = [np.empty((2, 0), np.int64)]  # pairs of labels on both sides of a band's edge
    count = 0
    row_above = np.zeros(scores.shape[1], np.int64)  # labels in the row above the band, 0 below the threshold
    for top in range(0, len(scores), rows):
        labels, band_parts = _labelled_band(scores[top : top + rows], threshold, top)
        labels[labels > 0] += count
        touching.append(_touching_labels(row_above, labels[0]))
        row_above = labels[-1]
        if band_parts is not None:
            parts.append(band_parts)
            count += len(band_parts["area"])
    if not parts:
        return []
    first, second = np.concatenate(touching, 1) - 1
    graph = coo_array((np.ones(len(first), bool), (first, second)), shape=(count, count))
    _, region_ids = connected_components(graph, directed=False)
    regions = _merge(region_ids, {name: np.concatenate([columns[name] for columns in parts]) for name in parts[0]})
    regions["mean"] = regions.pop("total") / regions["area"]
    order = np.lexsort((regions["left"], regions["top"], -regions["peak"]))
    values = zip(*(regions[name][order].tolist() for name in Region.__dataclass_fields__), strict=True)
    return [Region(*row) for row in values]


def _labelled_band(band: NDArray[Any], threshold: float, top: int) -> tuple[NDArray[np.int64], Columns | None]:
    """Return labels (rows, W) from 1 of a band that starts at row `top`, and the labelled parts of regions, if any."""
    from scipy.ndimage import label

    labels, count = label(band > threshold, np.ones((3, 3)), output=np.int64)
    if not count:
        return labels, None
    y, x = np.nonzero(labels)
    score, ids = band[y, x].astype(np.float64), labels[y, x]
    y += top
    pixels = {"left": x, "top": y, "right": x + 1, "bottom": y + 1, "area": np.ones_like(x)}
    return labels, _merge(ids, pixels | {"total": score, "peak": score, "peak_x": x, "peak_y": y})


def _touching_labels(upper: NDArray[np.int64], lower: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the pairs (2, n) of labels in two neighbouring rows whose pixels touch by a side or a corner."""
    width = len(upper)
    pairs = []
    for shift in (-1, 0, 1):
        pair = np.stack([upper[max(0, -shift) : width - max(0, shift)], lower[max(0, shift) : width + min(0, shift)]])
        pairs.append(pair[:, (pair > 0).all(0)])
    return np.unique(np.concatenate(pairs, 1), axis=1)


def _merge(ids: NDArray[Any], parts: Columns) -> Columns:
    """Return the parts (pixels at first) merged by their ids: one row per id, in the order of the ids."""
    order = np.lexsort((-parts["peak"], ids))
    parts = {name: column[order] for name, column in parts.items()}
    starts = np.flatnonzero(np.diff(ids[order], prepend=-1))
    return {
        **{name: np.minimum.reduceat(parts[name], starts) for name in ("left", "top")},
        **{name: np.maximum.reduceat(parts[name], starts) for name in ("right", "bottom")},
        **{name: np.add.reduceat(parts[name], starts) for name in ("area", "total")},
        **{name: parts[name][starts] for name in ("peak", "peak_x", "peak_y")},
    }
