"""The arguments of scoring (images, features, classes, sizes): converted to one form, or refused with the reason."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.images import WHITE_LEVEL, check_white_level, from_pil, read_image
from ..data.listing import images_to_score
from ..protocol import Detector
from ..terminal import warn_user

MAX_NUMBERED = 8  # groups without names of their own that an error lists


def as_images(images: Any, white_level: int = WHITE_LEVEL) -> Iterable[Tensor]:
    """Yield images in any accepted form as (3, H, W) float32 tensors in [0, 1] on the CPU, one by one.

    Channels are in the order red, green, blue. OpenCV's are blue first, which no value tells:
    ``cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)`` turns them. `white_level` is the value of white in 16-bit words, of
    files, arrays and tensors.

    Raises:
        ValueError: something is no image, cannot be read, or has values outside [0, 1] or above the white level.
    """
    if isinstance(images, (str, os.PathLike)):
        files, notes = images_to_score([images])
        for note in notes:
            warn_user(note)
        for file in files:
            yield read_image(file, white_level)
    elif isinstance(images, Tensor):
        yield from _from_tensor(images, white_level)
    elif hasattr(images, "getbands"):  # a PIL image
        yield from_pil(images, white_level)
    elif hasattr(images, "__array_interface__"):
        yield from _from_array(images, white_level)
    elif isinstance(images, Iterable) and not isinstance(images, (bytes, bytearray, memoryview, Mapping)):
        for image in images:
            yield from as_images(image, white_level)
    else:
        raise ValueError(f"cannot score a {type(images).__name__}; {_remedy(images)}")


def _remedy(images: Any) -> str:
    """Return what to pass instead of something that is no image."""
    if isinstance(images, (bytes, bytearray, memoryview)):
        return "decode a file's content first: PIL.Image.open(io.BytesIO(content))"
    if isinstance(images, Mapping):
        return "pass its images: list(images.values())"
    if images is None:
        return "no image came; cv2.imread gives None for a file that it cannot read"
    return "pass tensors, arrays, PIL images, or paths"


def _from_tensor(images: Tensor, white_level: int) -> Iterable[Tensor]:
    """Yield the images of a tensor (B, 3, H, W) or (3, H, W) of floats in [0, 1], or of unsigned 8 or 16 bits."""
    shape = tuple(images.shape)
    if images.dim() not in (3, 4) or images.shape[-3] != 3 or 0 in shape[-2:]:
        hint = ""
        if 0 not in shape and images.dim() in (3, 4) and shape[-1] == 3:
            hint = "; the channels come last: .movedim(-1, -3), or pass an array"
        elif 0 not in shape and images.dim() in (3, 4) and shape[-3] == 1:
            hint = "; repeat grey: .expand(*x.shape[:-3], 3, *x.shape[-2:])"
        elif 0 not in shape and images.dim() in (3, 4) and shape[-3] == 4:
            hint = "; drop alpha: x[..., :3, :, :]"
        raise ValueError(f"an image tensor has shape {shape}; expected (B, 3, H, W) or (3, H, W){hint}")
    if images.dtype in (torch.uint8, torch.uint16):
        yield from _from_array(images.detach().cpu().movedim(-3, -1).numpy(), white_level)
        return
    if not images.is_floating_point():
        raise ValueError(
            f"an image tensor is {images.dtype}; pass floats in [0, 1], or unsigned integers of 8 or 16 bits"
        )
    for image in images.detach() if images.dim() == 4 else [images.detach()]:
        yield _checked_values(image.to("cpu", torch.float32))


def _checked_values(image: Tensor) -> Tensor:
    """Return an image (3, H, W) float32 if its values lie in [0, 1]; raise a ValueError otherwise."""
    low, high = float(image.min()), float(image.max())
    if low >= 0 and high <= 1:
        return image
    if math.isnan(low) or math.isnan(high):
        count = int(image.isnan().any(0).sum())
        raise ValueError(f"{count} pixels of an image are NaN; values must lie in [0, 1]: find the origin of the NaN")
    remedy = "do not normalise, the model does" if low < 0 else "clip them"
    if low >= 0 and 2 <= high <= 65535:
        divisor = 255 if high <= 255 else "the value of white"
        remedy = f"divide by {divisor}; do not normalise, the model does"
    raise ValueError(f"image values run from {low:.7g} to {high:.7g}; they must lie in [0, 1] ({remedy})")


def _from_array(images: Any, white_level: int) -> Iterable[Tensor]:
    """Yield the images of an array of unsigned integers, or floats in [0, 1].

    It is (B, H, W, 3), (H, W, 3), (H, W), or with a last axis of 1 grey.
    """
    array = np.asarray(images)
    shape, kind = array.shape, array.dtype
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim not in (3, 4) or array.shape[-1] not in (1, 3) or 0 in array.shape[-3:-1]:
        hint = ""
        if 0 in shape:
            hint = "; it is empty"
        elif array.ndim in (3, 4) and array.shape[-1] == 4:
            hint = "; drop alpha: image[..., :3]"
        elif array.ndim in (3, 4) and array.shape[-3] in (1, 3):
            hint = "; the channels come first: np.moveaxis(image, -3, -1), or pass a tensor"
        raise ValueError(f"an image array has shape {shape}; expected (B, H, W, 3), (H, W, 3) or (H, W){hint}")
    if kind.kind not in "uf":
        hint = "image.astype(np.uint8) if its values are of 0 to 255, np.uint16 if of 0 to 65535"
        if kind.kind == "b":
            hint = "image.astype(np.float32)"
        elif kind.kind not in "i":
            hint = "numbers are needed"
        raise ValueError(
            f"an image array is {kind}; pass unsigned integers of full range, or floats in [0, 1] ({hint})"
        )
    for image in array if array.ndim == 4 else [array]:
        if kind.kind == "u" and kind.itemsize == 2:
            check_white_level(image, white_level)
        full = white_level if kind == np.uint16 else np.iinfo(kind).max if kind.kind == "u" else 1
        if kind.kind == "u" and kind.itemsize > 2 and 0 < (peak := int(image.max())) <= 65535:
            raise ValueError(
                f"an image array is {kind} of values to {peak}, whose white would be {full}; pass "
                f"image.astype(np.{'uint8' if peak <= 255 else 'uint16'})"
            )
        chw = np.array(image.transpose(2, 0, 1), np.float32, order="C")
        if kind.kind == "u":
            chw /= np.float32(full)
        yield _checked_values(torch.from_numpy(chw if len(chw) == 3 else chw.repeat(3, 0)))


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


def checked_map_size(size: Any, name: str = "map_size") -> tuple[int, int] | None:
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
        raise ValueError(f"{name} is {size!r}; pass (height, width), or one whole number for both, from 1 pixel")
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
