"""The features of the images of a dataset of anomalib, computed once and found by the images' paths."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import CenterCrop, Resize

from ..data.datasets import Dataset, Sample
from ..environment import plain_torch
from ..features.extract import FeatureSet, ShowProgress, channels_last, feature_set
from ..features.preprocess import preprocess, seen_features
from ..files import printable
from ..protocol import Detector
from ..terminal import warn_user
from .data import MultiClassDataset
from .processing import SeenResize, checked


@dataclass
class Keeping:
    """How features are kept during a training.

    Attributes:
        cache: ``"ram"``, ``"disk"``, or None: computed anew each time they are needed.
        cache_dir: the folder of ``"disk"``.
        workers: processes that read images, of datasets other than `MultiClassDataset`.
        progress: wraps the loop over the images.
        say: called with what is done now.
    """

    cache: str | None
    cache_dir: str | None
    workers: int
    progress: ShowProgress
    say: Callable[[str], None]


@dataclass
class PathFeatures:
    """The features of images, and the number of each image in them by its path.

    Attributes:
        features: of all images.
        numbers: by the `image_path` that batches have.
        fixed: whether an image has the same features each time they are asked for.
    """

    features: FeatureSet
    numbers: dict[str, int]
    fixed: bool = True

    def subset(self, rows: Tensor) -> PathFeatures:
        """Return the images with these numbers (n,), in this order."""
        position = {number: i for i, number in enumerate(rows.tolist())}
        numbers = {path: position[number] for path, number in self.numbers.items() if number in position}
        return PathFeatures(self.features.subset(rows), numbers, self.fixed)


@plain_torch()
def path_features(detector: Detector, dataset: Any, class_of: Callable[[str], int], keeping: Keeping) -> PathFeatures:
    """Return the features of a dataset's images, each image by itself, as scoring has them.

    Files of a `MultiClassDataset` are read as `hgad_fast.features.extract.feature_set` reads them, unless images are
    augmented. Items of any other dataset are taken as they come: of random augmentations one draw is kept.

    Args:
        detector: gives the backbone; that of a `MultiClassDataset` has the `white_level` of the dataset.
        dataset: a dataset of anomalib, whose items have `image` (3, H, W) in [0, 1] and `image_path`.
        class_of: returns the number of the class of an image, by its path.
        keeping: how they are kept.

    Raises:
        ValueError: an image cannot be used, or the dataset has no length or no paths, or its features cannot be kept on
            disk.
    """
    if isinstance(dataset, MultiClassDataset) and isinstance(dataset.augmentations, (SeenResize, type(None))):
        samples = dataset.samples
        train = tuple(Sample(Path(path), int(k)) for path, k in zip(samples.image_path, samples.gt_class, strict=True))
        features = feature_set(
            detector,
            Dataset(dataset.root, dataset.class_names, train, test=()),
            cache=keeping.cache,
            cache_dir=keeping.cache_dir,
            progress=keeping.progress,
            say=keeping.say,
        )
        return PathFeatures(features, {path: i for i, path in enumerate(samples.image_path)})
    if keeping.cache == "disk":
        raise ValueError(
            "cache='disk' tells images by the content of their files, which MultiClassFolder without training "
            f"augmentations gives; {type(dataset).__name__} gives images that may be changed: take cache='ram'"
        )
    if not hasattr(dataset, "__len__"):
        raise ValueError(f"{type(dataset).__name__} has no length: a model is trained on images that can be counted")
    if keeping.cache is not None and _has_augmentations(dataset):
        warn_user(
            "training images are augmented, and their features are computed once: each keeps its first draw; "
            "cache=None draws anew in each epoch, and runs the backbone in each"
        )
    if isinstance(dataset, MultiClassDataset):
        dataset = copy.copy(dataset)  # that of the batches goes without pixels
        dataset.needs_images = True
    images = _ItemFeatures(detector, dataset, keep=keeping.cache is not None)
    paths = images.read(keeping)
    if len(set(paths)) < len(paths):
        twice = next(path for i, path in enumerate(paths) if path in paths[:i])
        raise ValueError(f"{printable(twice)} is in the training images twice; features are kept by path: list it once")
    class_ids = torch.tensor([class_of(path) for path in paths], dtype=torch.int64)
    # what the set is called says nothing: a training in anomalib is resumed by its checkpoints alone
    features = FeatureSet(images, class_ids, fingerprint="items of a dataset")
    return PathFeatures(features, {path: i for i, path in enumerate(paths)}, fixed=keeping.cache is not None)


def _has_augmentations(dataset: Any) -> bool:
    """Return whether a dataset changes its images by more than resizing."""
    augmentations = getattr(dataset, "augmentations", None)
    parts = [] if augmentations is None else _flat(augmentations)
    return not all(isinstance(part, (Resize, CenterCrop)) for part in parts)


def _flat(transform: Any) -> list[Any]:
    parts = getattr(transform, "transforms", None)
    return [transform] if parts is None else [each for part in parts for each in _flat(part)]


class _ItemFeatures(Sequence[list[Tensor]]):
    """Features of the items of a dataset, one (C, h, w) tensor per level of each, kept or computed when asked for."""

    def __init__(self, detector: Detector, dataset: Any, keep: bool) -> None:
        self.detector, self.dataset, self.keep = detector, dataset, keep
        self._kept: list[list[Tensor]] = []

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: Any) -> Any:
        return self._kept[i] if self.keep else self._of(self.dataset[i])

    def read(self, keeping: Keeping) -> list[str]:
        """Read all items, keep their features if they are to be kept, and return their paths."""
        loader = DataLoader(self.dataset, batch_size=None, num_workers=keeping.workers, collate_fn=_as_it_is)
        items = iter(loader)
        paths = []
        for _ in keeping.progress(range(len(self.dataset)), "features"):
            item = next(items)
            path = getattr(item, "image_path", None)
            if not path:
                raise ValueError(
                    f"an item of {type(self.dataset).__name__} has no image_path, by which its features are kept"
                )
            paths.append(str(path))
            if self.keep:
                self._kept.append(self._of(item))
        return paths

    def _of(self, item: Any) -> list[Tensor]:
        return computed(self.detector, item.image, str(item.image_path))


@plain_torch()
@torch.no_grad()
def computed(detector: Detector, image: Tensor, name: str) -> list[Tensor]:
    """Return the features of an image (3, H, W) in [0, 1]: one (C, h, w) per level, prepared, on the CPU.

    Raises:
        ValueError: it is no such image; `name` says which.
    """
    seen = preprocess(checked(image.as_subclass(Tensor), name), detector.config)
    return [channels_last(level[0]).cpu() for level in seen_features(detector, seen)]


def _as_it_is(item: Any) -> Any:
    return item
