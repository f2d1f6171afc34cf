"""Features of the frozen backbone, computed once a picture."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import data as pictures
from . import score

if TYPE_CHECKING:
    from .model import HGADModel


@dataclass
class FeatureSet:
    """Features of n normal pictures, ready for training.

    Attributes:
        images: for each picture a list of one (C, h, w) float32 tensor a level; pictures may differ in size.
        class_ids: (n,) int64.
        fingerprint: names the data, so that training is not resumed on other data; made from them where it is empty.
    """

    images: Sequence[list[Tensor]]
    class_ids: Tensor
    fingerprint: str = ""

    def __post_init__(self) -> None:
        self.class_ids = torch.as_tensor(self.class_ids, dtype=torch.int64).cpu()
        if self.class_ids.shape != (len(self.images),):
            raise ValueError(f"{len(self.images)} pictures and class ids of shape {tuple(self.class_ids.shape)}")
        self.fingerprint = self.fingerprint or _fingerprint(self.images, self.class_ids)

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def from_levels(cls, levels: Sequence[Tensor], class_ids: Tensor | Sequence[int]) -> FeatureSet:
        """From one (n, C, h, w) tensor a level."""
        shapes = [tuple(getattr(level, "shape", ())) for level in levels]
        if any(len(shape) != 4 or shape[0] != shapes[0][0] for shape in shapes):
            raise ValueError(f"features must be one (n, C, h, w) tensor a level with one n; the shapes are {shapes}")
        images = [[channels_last(level) for level in image] for image in zip(*levels, strict=True)]
        return cls(images, torch.as_tensor(class_ids))

    def subset(self, indices: Tensor) -> FeatureSet:
        fingerprint = hashlib.sha256(self.fingerprint.encode() + indices.numpy().tobytes()).hexdigest()
        return FeatureSet(_Selected(self.images, indices.tolist()), self.class_ids[indices], fingerprint)


def _fingerprint(images: Sequence[list[Tensor]], class_ids: Tensor) -> str:
    digest = hashlib.sha256(class_ids.numpy().tobytes())
    for image in images:
        for level in image:
            digest.update(f"{tuple(level.shape)} {level.dtype}".encode())
            pixels = level.detach().cpu().movedim(0, -1).contiguous()  # a view of what channels_last made
            digest.update(pixels.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _Selected(Sequence[list[Tensor]]):
    """Some items of a sequence; none is touched before it is asked for."""

    def __init__(self, items: Sequence[list[Tensor]], indices: list[int]) -> None:
        self.items, self.indices = items, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: Any) -> Any:
        return self.items[self.indices[i]]


class _Uncached(Sequence[list[Tensor]]):
    """Features that are computed each time they are asked for."""

    def __init__(self, model: HGADModel, samples: Sequence[pictures.Sample]) -> None:
        self.model, self.samples = model, samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: Any) -> Any:
        levels = score.picture_features(self.model, pictures.read_image(self.samples[i].path))
        return [channels_last(level[0].cpu()) for level in levels]


def channels_last(features: Tensor) -> Tensor:
    """A map (C, h, w) in float32 whose pixels are contiguous, so that its rows of pixels are a view."""
    return features.detach().float().permute(1, 2, 0).contiguous().permute(2, 0, 1)


def feature_set(
    model: HGADModel,
    data: Any,
    *,
    cache: str | None = "ram",
    skip_bad: bool = False,
    on_bad: Callable[[pictures.ImageError], None] | None = None,
    progress: Callable[[Sequence[Any], str], Iterable[Any]] | None = None,
) -> FeatureSet:
    """Features of normal pictures, in whatever form they come.

    Args:
        model: gives the backbone, the preprocessing and the classes; takes the dataset's class names if it has none.
        data: a `FeatureSet`, a `data.Dataset` or the root of one (its training pictures), or a pair (one (n, C, h, w)
            tensor a level, n class ids).
        cache: ``"ram"`` keeps the features, None computes those of a picture each time they are needed.
        skip_bad: leave out pictures that cannot be decoded, and report each to `on_bad`, instead of an error that lists
            them all.
        on_bad: told of each picture that is left out.
        progress: wraps the loop over the pictures, e.g. in a progress bar with the given title.

    Raises:
        ValueError: the classes or the features' shapes are not those of the model; pictures cannot be decoded.
    """
    if isinstance(data, FeatureSet):
        return _checked(model, data)
    if isinstance(data, (tuple, list)) and len(data) == 2:
        return _checked(model, FeatureSet.from_levels(*data))
    model.require_encoder()
    dataset = data if isinstance(data, pictures.Dataset) else pictures.discover(data)
    if model.config.class_names is not None and model.config.class_names != dataset.class_names:
        raise ValueError(
            f"{dataset.root} has the classes {', '.join(dataset.class_names)}; the model was made for "
            f"{', '.join(model.config.class_names)}"
        )
    if len(dataset.class_names) != model.config.n_classes:
        raise ValueError(
            f"{dataset.root} has {len(dataset.class_names)} classes ({', '.join(dataset.class_names)}), the model has "
            f"n_classes={model.config.n_classes}"
        )
    model.config = model.config.replace(class_names=dataset.class_names)  # made-up ones give way
    samples, errors = pictures.check_images(dataset.train, skip_bad=skip_bad)
    for error in errors if on_bad else ():
        assert on_bad is not None
        on_bad(error)
    images: Sequence[list[Tensor]] = _Uncached(model, samples)
    if cache == "ram":
        images = list(progress(images, "features") if progress else images)
    class_ids = torch.tensor([sample.class_id for sample in samples], dtype=torch.int64)
    return FeatureSet(images, class_ids, pictures.fingerprint(samples, dataset.root))


def _checked(model: HGADModel, features: FeatureSet) -> FeatureSet:
    dims = model.feat_dims
    for i, levels in enumerate(features.images):
        if [level.shape[0] for level in levels] != dims or any(
            level.dim() != 3 or level.dtype != torch.float32 or level.numel() == 0 for level in levels
        ):
            found = [(*level.shape, level.dtype) for level in levels]
            raise ValueError(
                f"picture {i} has features {found}; the model takes one float32 (C, h, w) a level, with C = {dims}"
            )
    ids = features.class_ids
    if len(ids) and not (ids.min() >= 0 and ids.max() < model.config.n_classes):
        raise ValueError(
            f"class ids run from {ids.min()} to {ids.max()}; the model has n_classes={model.config.n_classes}"
        )
    return features
