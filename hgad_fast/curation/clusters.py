"""Groups of unsorted normal images, by what they show, so that a person names a few groups and not every image.

An image is described by the mean over its pixels of the features that the place Gaussian takes, each stage divided by
the standard deviation of all its values. That is the first step of `modules.place_gaussian.Whitening`; the second,
which gives all principal components the same variance, is left out: it raises the many components in which images of
one product differ to those that tell products apart, and distances between groups vanish among the others
(docs/data.md has figures). The images are grouped by k-means, for each number K of groups.

K is that of the largest mean silhouette (Rousseeuw 1987, doi:10.1016/0377-0427(87)90125-7), provided it reaches
`REASONABLE`, the border between a weak and a reasonable structure of Kaufman and Rousseeuw (Finding Groups in Data,
1990, table 4 of chapter 2); else all images are one group.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.datasets import Dataset, DatasetError, Sample, csv_rows, dataset_folders, discover, notes_on
from ..data.images import read_image
from ..data.listing import endings, files_below, images_to_score, list_images, passed_over
from ..features.extract import ShowProgress
from ..files import printable
from ..models.config import GaussianConfig
from ..models.gaussian import GaussianModel
from .sheets import require_no_image, sheet_of_group, sheets_of_groups
from .source import features_of, listed_path, model_of, write_rows

LEAST = 8
"""The number of images below which a group is merged into the nearest."""

MOST = 20  # groups that "auto" tries
REASONABLE = 0.5  # the least mean silhouette of several groups
MEASURED = 4096  # images, evenly spread over all, that a silhouette is the mean of: it takes the square of their number
SHOWN = 24  # images of a group on its sheet

Vectors = NDArray[np.float64]


@dataclass(frozen=True)
class Clusters:
    """Images in groups.

    Attributes:
        groups: the images of each group, from the centre to the edge; the largest group first.
        silhouettes: the mean silhouette of each K that was tried, after small groups were merged, if two or more are
            left; empty for a K that was given.
        notes: what in the folders was left out, in lines for people.
    """

    groups: tuple[tuple[Path, ...], ...]
    silhouettes: dict[int, float]
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names for the groups until a person gives better ones: group-1, group-2, ..."""
        return tuple(f"group-{number}" for number in range(1, len(self.groups) + 1))

    def write_csv(self, path: str | os.PathLike[str]) -> Path:
        """Write the list that training reads, all images normal, each of the class of its group; return its path.

        If it replaces a list, sheets beside that of the groups that it names are removed, unless they are images of
        these groups.

        Raises:
            ValueError: the name of an image cannot stand in a CSV file.
        """
        path = Path(path)
        rows = [
            (listed_path(image, path), name, "train", "good", "")
            for name, group in zip(self.names, self.groups, strict=True)
            for image in sorted(group)
        ]
        replaced = _classes_in(path)
        write_rows(path, ("path", "class", "split", "label", "mask"), rows)
        images = {os.path.realpath(image) for group in self.groups for image in group}
        for name, sheet in sheets_of_groups(path).items():
            if name in replaced and sheet.is_file() and os.path.realpath(sheet) not in images:
                sheet.unlink()
        return path

    def write_sheets(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write a sheet of images of each group beside the CSV file at `path`, for a person to name; return the files.

        A sheet shows `SHOWN` images at most, evenly chosen from the centre of the group to its edge. It needs
        matplotlib.

        Raises:
            ValueError: a sheet would replace one of the images.
        """
        from ..scoring.plot import Case, image_sheet, reduced

        path = Path(path)
        sheets = [sheet_of_group(path, name) for name in self.names]
        require_no_image(sheets, (image for group in self.groups for image in group))
        for sheet, name, group in zip(sheets, self.names, self.groups, strict=True):
            places = np.unique(np.linspace(0, len(group) - 1, min(SHOWN, len(group))).round().astype(int))
            shown = [group[place] for place in places]
            cases = [Case(reduced(read_image(image).numpy()), np.zeros((1, 1)), float("nan")) for image in shown]
            some = "" if len(shown) == len(group) else f", {len(shown)} of them, evenly chosen"
            image_sheet(
                cases,
                sheet,
                names=[image.name for image in shown],
                title=f"{name}: {len(group)} images",
                note=f"from the centre of the group to its edge{some}",
            )
        return sheets


def _classes_in(table: Path) -> set[str]:
    """Return the classes that a list names; none where there is no list, or another kind of file."""
    try:
        return {row["class"] for _, row in csv_rows(table, ("path", "class"))}
    except (DatasetError, OSError):
        return set()


def cluster(
    data: Any,
    k: int | str = "auto",
    *,
    config: GaussianConfig | None = None,
    device: str | None = None,
    progress: ShowProgress | None = None,
    **options: Any,
) -> Clusters:
    """Group unsorted normal images. The groups depend on the images alone, and on neither their names nor their order.

    Images may differ in size and proportions.

    Args:
        data: a folder of normal images, at any depth; or a dataset (root, CSV file, `Dataset`), whose training images
            are taken without their classes; or several of these in a list. Of a dataset that lies somewhere in a
            folder of images the training images alone are taken, too.
        k: the number of groups, or ``"auto"``, which tries up to `MOST`. Groups of fewer than `LEAST` images are merged
            into the nearest, so that there may be fewer than were asked for.
        config: gives the backbone; None: the preset "gaussian".
        device: of the backbone.
        progress: wraps the loop over the images, e.g. in a progress bar with the given title.
        options: further arguments of `feature_set`, such as ``skip_bad=True``.

    Raises:
        ValueError: `k` is neither, or too large for the number of images; there are no images; or they, or the weights
            of the backbone, cannot be used.
    """
    if k != "auto" and (isinstance(k, (bool, str)) or not isinstance(k, int) or k < 1):
        raise ValueError(f"the number of groups is {k!r}; give a whole number from 1, or 'auto'")
    root, paths, notes = unsorted_images(data)
    if isinstance(k, int) and k > 1 and k * LEAST > len(paths):
        raise ValueError(
            f"{k} groups of {LEAST} images or more take {k * LEAST} images, and there are {len(paths)}; give fewer "
            "groups, or more images"
        )
    model = model_of(config, device)
    samples, vectors = _vectors(model, root, paths, progress, {"cache": None} | options)
    order = np.lexsort(vectors.T)  # k-means is seeded, and sums are rounded, in this order
    vectors = vectors[order]
    silhouettes: dict[int, float] = {}
    if k == "auto":
        ids, silhouettes = _best_groups(vectors)
    else:
        ids = _groups(vectors, int(k))
    groups = []
    for number in range(ids.max() + 1):
        members = np.flatnonzero(ids == number)
        distances = np.linalg.norm(vectors[members] - vectors[members].mean(0), axis=1)
        groups.append(tuple(samples[order[i]].path for i in members[np.argsort(distances, kind="stable")]))
    groups.sort(key=len, reverse=True)
    return Clusters(tuple(groups), silhouettes, tuple(notes))


def unsorted_images(data: Any) -> tuple[Path, list[Sample], list[str]]:
    """Return the folder of normal images, these, and lines on what was left out; `data` is as in `cluster`.

    Raises:
        ValueError: there are none.
    """
    roots = [data] if isinstance(data, (str, os.PathLike, Dataset)) else list(data)
    samples: list[Sample] = []
    notes: list[str] = []
    for root in roots:
        if isinstance(root, Dataset) or not Path(root).is_dir():
            dataset = discover(root)
            found, left_out = list(dataset.train), notes_on(dataset)
        else:
            found, left_out = _in_folder(Path(root))
        samples += found
        notes += left_out
    shown = ", ".join(printable(root.root if isinstance(root, Dataset) else root) for root in roots)
    if not samples:
        raise ValueError(
            f"there are no images in {shown or 'an empty list of folders'}; {'; '.join(notes)}".rstrip("; ")
        )
    return Path(os.path.commonpath([os.path.abspath(sample.path.parent) for sample in samples])), samples, notes


def _in_folder(folder: Path) -> tuple[list[Sample], list[str]]:
    """Return the normal images below a folder, and lines on what was left out.

    Of datasets in it these are the training images; elsewhere, at any depth, all images but masks.

    Raises:
        ValueError: a dataset in it cannot be used.
    """
    paths, notes = images_to_score([folder])
    places = dataset_folders(folder)
    if not places:
        return [Sample(path, 0) for path in paths], notes
    datasets = [discover(place) for place in places]
    samples = [sample for dataset in datasets for sample in dataset.train]
    samples += [Sample(path, 0) for path in paths if not any(place in path.parents for place in places)]
    others = set(list_images(folder)).difference(sample.path for sample in samples)
    notes = [note for dataset in datasets for note in notes_on(replace(dataset, passed_over={}))]
    if others:
        shown = ", ".join(printable(place) for place in places[:3])
        more = f" and {len(places) - 3} more" if len(places) > 3 else ""
        notes.append(
            f"{printable(folder)}: {len(others)} images (or masks) are left out, as of {shown}{more} the training "
            "images alone are taken"
        )
    if line := passed_over(endings(files_below(folder))):
        notes.append(f"{printable(folder)}: {line}")
    return samples, notes


def _vectors(
    model: GaussianModel, root: Path, samples: Sequence[Sample], progress: ShowProgress | None, options: dict[str, Any]
) -> tuple[list[Sample], Vectors]:
    """Return the images that can be decoded, and what describes each, (n, C)."""
    sound, features = features_of(model, root, samples, progress, options)
    means, squares = [], []
    for i in (progress or (lambda items, title: items))(range(len(features)), "features"):
        levels = [level.double() for level in features.images[i]]
        means.append(torch.cat([level.mean((1, 2)) for level in levels]).numpy())
        squares.append(torch.cat([level.square().mean((1, 2)) for level in levels]).numpy())
        if not np.isfinite(squares[-1]).all():
            raise ValueError(f"{features.name(i)} has a NaN or an infinity in its features: look at the image")
    if not means:
        raise ValueError(f"none of the {len(samples)} images can be decoded")
    encoder: Any = model.encoder
    ends = np.cumsum([channels for stages in encoder.stage_dims for channels in stages])
    vectors, energies = np.stack(means), np.stack(squares)
    order = np.lexsort(vectors.T)
    for stage in np.split(np.arange(vectors.shape[1]), ends[:-1]):
        in_order = vectors[order][:, stage], energies[order][:, stage]
        variance = in_order[1].mean() - in_order[0].mean() ** 2
        vectors[:, stage] /= np.sqrt(variance) if variance > 0 else 1.0
    return sound, vectors


class _Trial(NamedTuple):
    """Groups (n,) of the images, and their mean silhouette."""

    silhouette: float
    ids: NDArray[np.int64]


def _best_groups(vectors: Vectors) -> tuple[NDArray[np.int64], dict[int, float]]:
    """Return the group (n,) of each image for the best K, and the silhouette of each K that was tried."""
    from sklearn.metrics import pairwise_distances, silhouette_score

    measured = np.unique(np.linspace(0, len(vectors) - 1, min(MEASURED, len(vectors))).round().astype(int))
    distances = pairwise_distances(vectors[measured])
    np.fill_diagonal(distances, 0.0)
    best, silhouettes = _Trial(REASONABLE, np.zeros(len(vectors), np.int64)), {}
    for k in range(2, min(MOST, len(vectors) // LEAST) + 1):
        ids = _groups(vectors, k)
        if len(np.unique(ids[measured])) < 2:
            continue
        trial = _Trial(float(silhouette_score(distances, ids[measured], metric="precomputed")), ids)
        silhouettes[k] = trial.silhouette
        if trial.silhouette > best.silhouette:
            best = trial
    return best.ids, silhouettes


def _groups(vectors: Vectors, k: int) -> NDArray[np.int64]:
    """Return the group (n,) of each image by k-means, after groups of fewer than `LEAST` images were merged.

    The smallest group goes first, to the one whose centre is nearest to its own.
    """
    from sklearn.cluster import KMeans

    k = min(k, len(np.unique(vectors, axis=0)))  # copies are one point
    ids = KMeans(k, n_init=10, random_state=0).fit_predict(vectors).astype(np.int64)
    while True:
        groups, ids, counts = np.unique(ids, return_inverse=True, return_counts=True)
        if len(groups) == 1 or counts.min() >= LEAST:
            return ids
        centres = np.stack([vectors[ids == group].mean(0) for group in range(len(groups))])
        smallest = int(counts.argmin())
        distances = np.linalg.norm(centres - centres[smallest], axis=1)
        distances[smallest] = np.inf
        ids[ids == smallest] = distances.argmin()
