"""The arguments of scoring (images, features, classes, sizes): converted to one form, or refused with the reason."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.images import from_pil, list_images, read_image
from ..protocol import Detector

MAX_NUMBERED = 8  # groups without names of their own that an error lists


def as_images(images: Any) -> Iterable[Tensor]:
    """Yield images in any accepted form as (3, H, W) float32 tensors in [0, 1] on the CPU, one by one.

    Raises:
        ValueError: something is no image, cannot be read, or has values outside [0, 1].
    """
    if isinstance(images, (str, os.PathLike)):
        path = Path(images)
        for file in list_images(path) if path.is_dir() else [path]:
            yield read_image(file)
    elif isinstance(images, Tensor):
        yield from _from_tensor(images)
    elif hasattr(images, "getbands"):  # a PIL image
        yield from_pil(images)
    elif hasattr(images, "__array_interface__"):
        yield from _from_array(images)
    elif isinstance(images, Iterable):
        for image in images:
            yield from as_images(image)
    else:
        raise ValueError(f"cannot score a {type(images).__name__}; pass tensors, arrays, PIL images, or paths")


def _from_tensor(images: Tensor) -> Iterable[Tensor]:
    """Yield the images of a tensor (B, 3, H, W) or (3, H, W) of floats in [0, 1]."""
    if images.dim() not in (3, 4) or images.shape[-3] != 3 or 0 in images.shape[-2:]:
        raise ValueError(f"an image tensor has shape {tuple(images.shape)}; expected (B, 3, H, W) or (3, H, W)")
    if not images.is_floating_point():
        raise ValueError(
            f"an image tensor is {images.dtype}; pass floats in [0, 1] (divide 8-bit values by 255), or an array"
        )
    for image in images.detach() if images.dim() == 4 else [images.detach()]:
        image = image.to("cpu", torch.float32)
        if not (image.min() >= 0 and image.max() <= 1):  # a NaN fails both
            raise ValueError(
                f"image values run from {float(image.min()):.7g} to {float(image.max()):.7g}; they must lie in "
                "[0, 1] (divide 8-bit values by 255; do not normalise, the model does)"
            )
        yield image


def _from_array(images: Any) -> Iterable[Tensor]:
    """Yield the images of an array (B, H, W, 3), (H, W, 3) or (H, W) of unsigned integers, or floats in [0, 1]."""
    array = np.asarray(images)
    if array.ndim == 2:
        array = np.broadcast_to(array[..., None], (*array.shape, 3))
    if array.ndim not in (3, 4) or array.shape[-1] != 3:
        raise ValueError(f"an image array has shape {array.shape}; expected (B, H, W, 3), (H, W, 3) or (H, W)")
    if array.dtype.kind not in "uf":
        raise ValueError(f"an image array is {array.dtype}; pass unsigned integers of full range, or floats in [0, 1]")
    for image in array if array.ndim == 4 else [array]:
        chw = np.array(image.transpose(2, 0, 1), np.float32, order="C")
        if array.dtype.kind == "u":
            chw /= np.float32(np.iinfo(array.dtype).max)
        yield from _from_tensor(torch.from_numpy(chw))


def checked_features(model: Detector, features: Sequence[Tensor]) -> list[Tensor]:
    """Return features (B, C, h, w) of each level in float32 on the model's device.

    Raises:
        ValueError: the features do not fit the model, or hold a NaN or an infinity.
    """
    dims = model.feature_dims
    if isinstance(features, Tensor) or len(features) != len(dims):
        raise ValueError(f"features must be a list of {len(dims)} tensors (B, C, h, w), one for each level")
    for level, (x, channels) in enumerate(zip(features, dims, strict=True)):
        if x.dim() != 4 or x.shape[1] != channels or x.shape[0] != features[0].shape[0] or x.numel() == 0:
            raise ValueError(
                f"features[{level}] has shape {tuple(x.shape)}; expected (B, {channels}, h, w), none of them 0, and "
                "the same B for every level"
            )
        if not x.isfinite().all():
            raise ValueError(f"features[{level}] holds a NaN or an infinity; find its origin")
    return [x.to(model.device, torch.float32) for x in features]


def checked_group_ids(model: Detector, class_ids: Any, batch: int) -> Tensor | None:
    """Return the ids (B,) of the images' groups from an id, a name, or a sequence of either; None stays None.

    Raises:
        ValueError: a class is unknown, or there is not one for each image.
    """
    if class_ids is None:
        return None
    if hasattr(class_ids, "tolist"):  # an array or tensor, perhaps of no dimension
        class_ids = class_ids.tolist()
    if isinstance(class_ids, str) or not isinstance(class_ids, Iterable):
        class_ids = [class_ids] * batch
    ids = []
    for value in class_ids:
        try:
            ids.append(model.groups.index(value) if isinstance(value, str) else range(len(model.groups)).index(value))
        except ValueError as error:
            names = model.groups
            if len(names) > MAX_NUMBERED and not model.groups_are_classes:
                names = (*names[:2], "...", names[-1])
            known = f"{', '.join(names)} (0 to {len(model.groups) - 1})"
            raise ValueError(f"class {value!r} is unknown; the model knows {known}") from error
    if len(ids) != batch:
        raise ValueError(f"{len(ids)} class ids for {batch} images")
    return torch.tensor(ids, dtype=torch.int64)


def checked_map_size(size: Any) -> tuple[int, int] | None:
    """Return the height and width of a map from a pair, or from one number for both; None stays None.

    Raises:
        ValueError: they are not whole numbers from 1.
    """
    if size is None:
        return None
    try:
        height, width = map(operator.index, size if isinstance(size, Sequence) else (size, size))
    except (TypeError, ValueError):
        height = width = 0
    if height < 1 or width < 1:
        raise ValueError(f"map_size is {size!r}; pass (height, width), or one whole number for both, from 1 pixel")
    return height, width


def check_normalization(model: Detector, normalization: str) -> None:
    """Raise a ValueError for an unknown normalisation, or one for which the model has no constants."""
    if normalization not in ("calibrated", "official"):
        raise ValueError(f"normalization is {normalization!r}; allowed are 'calibrated' and 'official'")
    if normalization == "calibrated" and model.calibration is None:
        raise ValueError(
            "the model has no normalisation constants: train it with fit, call calibrate(normal images), or score "
            "with normalization='official'"
        )
