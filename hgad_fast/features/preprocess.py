"""An image as the network sees it, its feature maps, and the memory that scoring it takes.

Scoring and the extraction of features for training take this one way, so that a model is trained on the very bits that
it scores (which is why this file is in `features/` and not in `scoring/`).
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..data.images import centre_crop, centre_crop_geometry, whole_image, whole_image_size
from ..files import byte_count, readable
from ..terminal import warn_user
from .backbone import ALWAYS_WHOLE, Backbone, BackboneSettings, FeatureMaps
from .interpolate import BAND_PIXELS

MAX_MEMORY = 4 * 10**9  # bytes that scoring an image may take if no limit is given


class ImageSettings(BackboneSettings, Protocol):
    """The fields of a configuration that say how images are seen."""

    img_size: int | str
    white_level: int
    center_crop: bool
    batch_size: int

    @property
    def square(self) -> bool: ...

    def replace(self, **changes: Any) -> Any: ...


class Seeing(Protocol):
    """The fields of a configuration that say at which size images are seen."""

    @property
    def img_size(self) -> int | str: ...
    @property
    def center_crop(self) -> bool: ...
    @property
    def square(self) -> bool: ...


@dataclass(frozen=True)
class AsItIs:
    """The `Seeing` of an image that is preprocessed already: at its own size."""

    img_size: int | str = "native"
    center_crop: bool = False
    square: bool = False


class FeatureSource(Protocol):
    """The parts of a detector that are needed to make features for it; see `models.detector.Detector` for each."""

    config: Any
    encoder: Any

    @property
    def device(self) -> torch.device: ...
    @property
    def feature_dims(self) -> list[int]: ...
    @property
    def groups(self) -> tuple[str, ...]: ...

    groups_are_classes: bool
    pointwise: bool
    preparation: str

    def require_encoder(self) -> nn.Module: ...
    def adopt_classes(self, names: tuple[str, ...], source: str) -> None: ...
    def prepare(self, features: list[Tensor]) -> list[Tensor]: ...
    def scoring_bytes(self, sizes: Sequence[tuple[int, int]], group_known: bool) -> tuple[int, int]: ...


Source = TypeVar("Source", bound=FeatureSource)


def seeing(model: Source, img_size: int | str | None) -> Source:
    """Return a copy of the model, with the same weights, that sees images at `img_size`; itself for None or its own.

    Raises:
        ValueError: the method scores at the trained size only.
    """
    if img_size is None or img_size == model.config.img_size:
        return model
    if not model.pointwise:
        raise ValueError(
            f"img_size is {img_size!r}: the method {model.config.method!r} looks at a feature map as a whole, so it "
            f"scores images at the size that it was trained at ({model.config.img_size})"
        )
    resized = copy.copy(model)
    resized.config = model.config.replace(img_size=img_size)
    return resized


def preprocess(image: Tensor, config: Seeing) -> Tensor:
    """Resize an image (3, H, W) float or a mask (H, W) bool to what the backbone sees of it.

    That is the whole image, in its proportions or as a square, or the official centre crop.
    """
    if config.center_crop:
        return centre_crop(image, config.img_size)
    return whole_image(image, config.img_size, config.square)


def seen_shape(shape: tuple[int, int], config: Seeing) -> tuple[int, int]:
    """Return the (h, w) at which `preprocess` gives an image of (H, W) pixels to the backbone."""
    if config.center_crop:
        side = min(shape) if isinstance(config.img_size, str) else config.img_size
        return side, side
    return whole_image_size(*shape, config.img_size, config.square)


def image_features(model: FeatureSource, image: Tensor) -> list[Tensor]:
    """Return the features (1, C, h, w), one tensor per level, from which an image (3, H, W) in [0, 1] is scored.

    Raises:
        ValueError: scoring the image takes more than `MAX_MEMORY`.
    """
    return seen_features(model, preprocess(image, model.config))


def seen_features(model: FeatureSource, seen: Tensor) -> list[Tensor]:
    """Return the `image_features` of an image (3, h, w) as `preprocess` gives it."""
    return feature_maps(model, seen, may_cut(model, AsItIs(), (seen.shape[1], seen.shape[2]))).whole()


def feature_maps(model: FeatureSource, seen: Tensor, cut: bool) -> FeatureMaps:
    """Return the features of an image (3, h, w) as `preprocess` gives it, in tiles if it is large and may be `cut`."""
    encoder = model.require_encoder()
    if isinstance(encoder, Backbone):
        maps = encoder.feature_maps(seen, cut)
    else:  # the user's own encoder
        maps = FeatureMaps.of(encoder(encoder.normalize(seen[None].to(model.device))))  # type: ignore[operator]
    return FeatureMaps.of(model.prepare(maps.whole())) if model.preparation else maps


def batch_features(model: FeatureSource, images: list[Tensor], config: ImageSettings) -> list[Tensor]:
    """Return the features (B, C, h, w), one tensor per level, of images (3, H, W) of one size."""
    encoder: Any = model.require_encoder()
    normalised = encoder.normalize(torch.stack([preprocess(image, config) for image in images]).to(model.device))
    return model.prepare(encoder(normalised, fast=True) if isinstance(encoder, Backbone) else encoder(normalised))


# ------------------------------------------------------------------------------------------------ memory


def memory_bytes(amount: int | str | None, name: str = "max_memory") -> int:
    """Return a limit on memory in bytes: a number, or a string such as "900MB", "1.5GB" or "2GiB"; None: `MAX_MEMORY`.

    `name` is what an error calls it.
    """
    if amount is None:
        return MAX_MEMORY
    try:
        size = byte_count(amount) or 0
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(f"{name} is {amount!r}; pass bytes, or a size such as '900MB' or '1.5GB'")
    return size


def working_set(
    model: FeatureSource, config: Seeing, shape: tuple[int, int], cut: bool = True, group_known: bool = False
) -> int:
    """Return the bytes that scoring an image of (H, W) pixels takes at the worst moment, beyond model, image and map.

    They are the sum of what is held all the time (the resized image, the densities of the pixels, what the method keeps
    until it knows the group) and of the most that any of the steps takes: backbone (activations of a tile), densities,
    a band of the map.
    """
    encoder = model.require_encoder()
    assert isinstance(encoder, Backbone)
    seen = seen_shape(shape, config)
    passes = encoder.passes(*seen, cut)
    sizes = [size for image_pass in passes for size in image_pass.levels]
    until_group, densities_step = model.scoring_bytes(sizes, group_known)
    held = 2**27 + 16 * sum(h * w for h, w in sizes) + until_group
    resized = centre_crop_geometry(*shape, config.img_size)[0] if config.center_crop else seen
    if resized != shape:
        held += 24 * math.prod(resized)
        held += 4 * (math.prod(shape) + max(shape[0] * resized[1], resized[0] * shape[1]))  # Pillow's, of a channel
    channels = max(model.feature_dims)
    piece_features = (
        4
        * channels
        * max(
            math.prod(image_pass.levels[0]) if image_pass.whole else image_pass.tile_pixels / encoder.strides[0] ** 2
            for image_pass in passes
        )
    )
    return int(held + max(encoder.working_set(*seen, cut), densities_step + piece_features, 48 * BAND_PIXELS))


def may_cut(
    model: FeatureSource,
    config: Seeing,
    shape: tuple[int, int],
    limit: int | None = None,
    tiles: str = "auto",
    group_known: bool = True,
) -> bool:
    """Return whether the backbone may cut images of (H, W) pixels into tiles; warn if that changes their features.

    Raises:
        ValueError: scoring such an image takes more than `limit`, or `tiles` is "always" and the method takes no tiles.
    """
    encoder, limit = model.require_encoder(), limit or MAX_MEMORY
    if tiles == "always" and not model.pointwise:
        raise ValueError(
            f"tiles is 'always': the method {model.config.method!r} looks at a feature map as a whole, so an image "
            "cannot be cut"
        )
    seen = seen_shape(shape, config)
    if not isinstance(encoder, Backbone) or limit >= MAX_MEMORY and math.prod(seen) <= ALWAYS_WHOLE:
        return False
    needs = functools.partial(working_set, model, config, shape, group_known=group_known)
    is_local = encoder.is_local
    cut = model.pointwise and (tiles == "always" or tiles == "auto" and (is_local or needs(cut=False) > limit))
    if (needed := needs(cut=cut)) > limit:
        remedy = "a smaller img_size" if model.pointwise else "a smaller img_size to train at"
        if tiles == "never" and is_local and model.pointwise:
            remedy += ", tiles='auto'"
        elif cut:
            remedy += ", or smaller tiles (hgad_fast.features.backbone.TILE_MEMORY)"
        raise ValueError(
            f"an image of {shape[0]} x {shape[1]} pixels (height x width), seen at {seen[0]} x {seen[1]}, takes about "
            f"{_gigabytes(needed)} to score, and max_memory is {readable(limit)}: allow more, or choose {remedy}"
        )
    if (
        cut
        and not is_local
        and any(len(image_pass.rows) * len(image_pass.columns) > 1 for image_pass in encoder.passes(*seen))
    ):
        warn_user(
            f"{encoder.arch} looks at the whole image, so tiles of one of {seen[0]} x {seen[1]} pixels give other "
            f"features than the whole; tiles='never' and max_memory='{_gigabytes(needs(cut=False))}' score it whole"
        )
    return cut


def _gigabytes(amount: int) -> str:
    """Return a number of bytes in GB, rounded up to a hundredth, so that the result is enough as `max_memory`."""
    return f"{math.ceil(amount / 1e7) / 100:g} GB"
