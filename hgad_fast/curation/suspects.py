"""Training images that look least like their class: defects among the normal images, and images of another class.

Each image is scored by a place Gaussian that does not know it. The images of a class are cut into folds by the hashes
of their contents, so that copies of a file share a fold, and each fold is scored by the Gaussians of the others. This
is done twice: defects in the training images widen the Gaussians and hide each other, so the second time the share
`TRIMMED` of the images that scored highest in the first is left out of all Gaussians.

The scores of classes differ in height and spread. A suspect's score says how far its image score lies above the median
of its class, in standard deviations of the class as 1.4826 times the median absolute deviation gives them, which a few
defects do not move. It is no probability: maxima of maps have a longer tail than a normal distribution.
"""

from __future__ import annotations

import heapq
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ..data.datasets import Dataset, DatasetError, Sample, content_hashes, discover, is_dataset
from ..data.images import read_image
from ..data.listing import is_image, visible
from ..features.extract import ShowProgress
from ..files import printable
from ..models.config import GaussianConfig
from ..models.gaussian import GaussianModel
from ..protocol import ProportionsError
from ..scoring.densities import densities
from ..scoring.maps import calibrated_maps
from ..terminal import warn_user
from .sheets import require_no_image
from .source import features_of, listed_path, model_of, write_rows

FOLDS = 5
LEAST = 8
"""Different images that a class needs, for medians of their scores to say something."""

TRIMMED = 0.1  # share of the images of a class that is left out of its Gaussians in the second pass
OUTLINED = 3.0  # the score from which a sheet outlines what is unusual
SHEET_ROWS = 48  # suspects on a sheet at most
MAP_SIDE = 64  # longest side of the maps that are kept


@dataclass(frozen=True)
class Suspect:
    """A training image and how unlike its class it is.

    Attributes:
        rank: 1 for the most suspicious of all classes.
        path: the image.
        class_name: the class that it is in.
        score: how far its image score lies above the median of its class, in robust standard deviations.
    """

    rank: int
    path: Path
    class_name: str
    score: float


@dataclass(frozen=True)
class _Drawn:
    """The anomaly map (h, w) of an image, coarse, and the value in it that stands for a score of `OUTLINED`."""

    anomaly_map: NDArray[np.float32]
    threshold: float


@dataclass(frozen=True)
class Suspects:
    """All training images, the most suspicious first.

    Attributes:
        rows: a `Suspect` for each image.
    """

    rows: tuple[Suspect, ...]
    _drawn: tuple[_Drawn, ...] = field(repr=False, compare=False)  # of the first `SHEET_ROWS` rows

    def write_csv(self, path: str | os.PathLike[str]) -> Path:
        """Write rank, path (relative to the file), class and score of each image, and return the path.

        Raises:
            ValueError: the name of an image cannot stand in a CSV file.
        """
        path = Path(path)
        rows = [(row.rank, listed_path(row.path, path), row.class_name, f"{row.score:.4f}") for row in self.rows]
        write_rows(path, ("rank", "path", "class", "score"), rows)
        return path

    def write_sheet(self, path: str | os.PathLike[str], count: int = 24) -> Path:
        """Write a JPEG or PNG of the first images, with what is unusual in each, and return its path.

        It shows `count` of them, `SHEET_ROWS` at most. It needs matplotlib.

        Raises:
            ValueError: the sheet would replace one of the images.
        """
        from ..scoring.plot import Case, image_sheet, reduced

        require_no_image([Path(path)], (row.path for row in self.rows))
        rows = self.rows[:count][: len(self._drawn)]
        cases = [
            Case(
                reduced(read_image(row.path).numpy()),
                drawn.anomaly_map,
                drawn.threshold,
                label=f"{row.rank}. {row.class_name}, {row.score:.1f}",
            )
            for row, drawn in zip(rows, self._drawn, strict=False)
        ]
        return image_sheet(
            cases,
            path,
            names=[row.path.name for row in rows],
            title=f"the {len(rows)} of {len(self.rows)} training images that look least like their class",
            note=f"score behind the class; red: what is further from the class than a score of {OUTLINED:g} says",
            with_maps=True,
        )


def suspects(
    data: Any,
    *,
    folds: int = FOLDS,
    config: GaussianConfig | None = None,
    device: str | None = None,
    progress: ShowProgress | None = None,
    **options: Any,
) -> Suspects:
    """Rank the training images of a dataset by how unlike the others of their class they are.

    The scores of a class depend on the contents of its images alone: on neither their names and order nor on the other
    classes. Where the images of a class differ in their proportions by more than 5%, they are compared as squares, with
    a warning.

    Args:
        data: a dataset (root, CSV file, `Dataset`, or several), or a folder of images of one class.
        folds: parts of each class, each of which is scored without itself; at least 2.
        config: gives the backbone and the Gaussians; None: the preset "gaussian".
        device: where it is computed.
        progress: wraps the loops, e.g. in progress bars with the given titles.
        options: further arguments of `feature_set`, such as ``skip_bad=True``.

    Raises:
        ValueError: there are fewer than 2 folds, a class has too few images, or they, or the weights of the backbone,
            cannot be used.
    """
    if isinstance(folds, bool) or not isinstance(folds, int) or folds < 2:
        raise ValueError(f"folds is {folds!r}; give a whole number from 2")
    dataset = _classes(data)
    model = model_of(config, device)
    ranked: list[tuple[float, str, Path, _Drawn | None]] = []
    for class_id, name in enumerate(dataset.class_names):
        of_class = [sample for sample in dataset.train if sample.class_id == class_id]
        try:
            scored = _scored(model, dataset.root, name, of_class, folds, progress, options)
        except ProportionsError:
            warn_user(
                f"the images of {name!r} differ in their proportions by more than 5%, and are compared as squares; a "
                "place Gaussian takes images of one shape"
            )
            of_squares = GaussianModel(model.config.replace(square=True, grids=None), model.encoder).to(model.device)
            scored = _scored(of_squares, dataset.root, name, of_class, folds, progress, options)
        scores = np.array([image.score for image in scored])
        finite = scores[np.isfinite(scores)]
        median = float(np.median(finite)) if len(finite) else 0.0
        deviation = float(np.median(np.abs(finite - median))) if len(finite) else 0.0
        spread = max(1.4826 * deviation, 1e-6 * abs(median), 1e-12)
        for image in scored:
            drawn = None if image.coarse_map is None else _Drawn(image.coarse_map, median + OUTLINED * spread)
            ranked.append(((image.score - median) / spread, name, image.path, drawn))
        ranked.sort(key=lambda row: (-row[0], row[1]))  # stable: the images of a class stay in the order of `_scored`
        ranked[SHEET_ROWS:] = [(*row[:3], None) for row in ranked[SHEET_ROWS:]]
    rows = (Suspect(rank, path, name, score) for rank, (score, name, path, _) in enumerate(ranked, 1))
    return Suspects(tuple(rows), tuple(drawn for *_, drawn in ranked if drawn is not None))


def _classes(data: Any) -> Dataset:
    """Return the dataset, or that of a folder of images alone as one class."""
    try:
        return discover(data)
    except DatasetError:
        if not isinstance(data, (str, os.PathLike)) or not Path(data).is_dir() or is_dataset(Path(data)):
            raise
        folder = Path(data)
        images = tuple(Sample(file, 0) for file in visible(folder) if is_image(file))
        if not images:
            raise
        return Dataset(folder, (printable(os.path.basename(os.path.abspath(folder))),), images, (), layout="normals")


class _Scored(NamedTuple):
    """An image and its score within its class; with a map (h, w) if it is one of the first `SHEET_ROWS`."""

    path: Path
    score: float
    coarse_map: NDArray[np.float32] | None


def _scored(
    model: GaussianModel,
    root: Path,
    name: str,
    samples: Sequence[Sample],
    folds: int,
    progress: ShowProgress | None,
    options: dict[str, Any],
) -> list[_Scored]:
    """Return the images of a class that can be decoded, those of the highest image scores first, of equal ones by path.

    Raises:
        ProportionsError: their proportions differ.
        ValueError: there are too few.
    """
    sound, features = features_of(model, root, samples, progress, options)
    contents = content_hashes(sound)
    different = sorted(set(contents))
    if len(different) < LEAST:
        raise ValueError(
            f"class {name!r} has {len(different)} different training images; {LEAST} are needed to say which of them "
            "is unlike the others: give it more, or leave it out"
        )
    fold_of = {content: rank % folds for rank, content in enumerate(different)}
    fold = torch.tensor([fold_of[content] for content in contents])
    by_path = {i: place for place, i in enumerate(sorted(range(len(sound)), key=lambda i: sound[i].path))}
    model.begin(features)
    scores = np.zeros(len(sound))
    maps: list[tuple[float, int, NDArray[np.float32]]] = []  # a heap: the least suspicious is at its top
    left_out = torch.zeros(len(sound), dtype=torch.bool)
    steps = [(trimmed, k) for trimmed in (False, True) for k in range(folds)]
    for trimmed, k in (progress or (lambda items, title: items))(steps, f"{name}, folds"):
        if trimmed and k == 0:
            highest = np.lexsort((np.array(contents), -scores))[: int(TRIMMED * len(sound))]
            left_out[torch.from_numpy(highest)] = True
        with model.without(features.subset(((fold == k) | left_out).nonzero().flatten())):
            for i in (fold == k).nonzero().flatten().tolist():
                anomaly_map = _map(model, features.images[i])
                highest_pixel = float(anomaly_map.max())
                scores[i] = highest_pixel if math.isfinite(highest_pixel) else math.inf  # NaN is never normal
                if trimmed:
                    push = heapq.heappush if len(maps) < SHEET_ROWS else heapq.heappushpop
                    push(maps, (scores[i], -by_path[i], _coarse(anomaly_map)))
    order = sorted(range(len(sound)), key=lambda i: (-scores[i], by_path[i]))
    kept = [coarse_map for _, _, coarse_map in sorted(maps, key=lambda entry: entry[:2], reverse=True)]
    return [
        _Scored(sound[i].path, float(scores[i]), coarse_map) for i, coarse_map in itertools.zip_longest(order, kept)
    ]


def _map(model: GaussianModel, levels: Sequence[Tensor]) -> Tensor:
    """Return the map (h, w) of the features of an image whose maximum is the image score."""
    class_ids = torch.zeros(1, dtype=torch.int64)
    (image,) = densities(cast(Any, model), [level[None].to(model.device) for level in levels], class_ids)
    weights = torch.ones(1, model.density_parts)
    return calibrated_maps(image, torch.empty(0), model.config.msk_size, weights, scope=model.scored_on)[0].cpu()


def _coarse(anomaly_map: Tensor) -> NDArray[np.float32]:
    """Return the maxima of a map in cells, so that its longest side is `MAP_SIDE` at most."""
    scale = min(MAP_SIDE / max(anomaly_map.shape), 1.0)
    cells = [max(round(side * scale), 1) for side in anomaly_map.shape]
    return F.adaptive_max_pool2d(anomaly_map[None].float(), cells)[0].numpy()
