"""What curation looks at, features by a place Gaussian of one class, and the lists that it writes."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from ..data.datasets import Dataset, Sample
from ..data.images import ImageError
from ..features.extract import FeatureSet, ShowProgress, feature_set
from ..files import printable, replacing
from ..models.config import GaussianConfig
from ..models.gaussian import GaussianModel
from ..terminal import warn_user

CLASS = ("images",)  # what the only class of the model is called, in which all images are together


def model_of(config: GaussianConfig | None, device: str | None) -> GaussianModel:
    """Return a place Gaussian with one class for all images; None stands for the preset "gaussian"."""
    settings = GaussianConfig.preset("gaussian") if config is None else config
    if settings.backbone_arch is None:
        raise ValueError("GaussianConfig.backbone_arch is None; curation looks at images, which takes a backbone")
    one_class = settings.replace(n_classes=1, class_names=None, grouping="class", grids=None)
    return GaussianModel(one_class).to(device or "cpu")


def features_of(
    model: GaussianModel, root: Path, samples: Sequence[Sample], progress: ShowProgress | None, options: dict[str, Any]
) -> tuple[list[Sample], FeatureSet]:
    """Return the images that can be decoded, and their features, all as of one class.

    Args:
        model: from `model_of`.
        root: the folder of the images.
        samples: the images.
        progress, options: further arguments of `feature_set`.
    """
    bad: list[ImageError] = []
    images = tuple(Sample(path, 0) for path in dict.fromkeys(sample.path for sample in samples))
    dataset = Dataset(root, CLASS, images, ())
    features = feature_set(cast(Any, model), dataset, progress=progress, on_bad=bad.append, **options)
    for error in bad:
        warn_user(str(error))
    left_out = {error.path for error in bad}
    by_path = {sample.path: sample for sample in samples}
    return [sample for path, sample in by_path.items() if path not in left_out], features


def listed_path(image: Path, table: Path) -> str:
    """Return the path by which a CSV file names an image: relative to the folder of the file where there is such a one.

    Raises:
        ValueError: the name of the image cannot stand in a CSV file.
    """
    place = Path(os.path.realpath(image.parent), image.name)  # links in the way of ".." would lead elsewhere
    try:
        name = Path(os.path.relpath(place, os.path.realpath(table.parent))).as_posix()
    except ValueError:  # on another drive of Windows
        name = place.as_posix()
    if name != name.strip() or name.encode(errors="replace").decode() != name:
        raise ValueError(
            f"{printable(image)}: this name cannot stand in a CSV file, for a blank at one of its ends or bytes that "
            "are no UTF-8; rename the file or its folder"
        )
    return name


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file in UTF-8, as a whole or not at all."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
