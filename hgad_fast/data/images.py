"""Image files as float tensors, upright and in [0, 1], and brought to the size of the model."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import PIL.Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
MAX_IMAGE_PIXELS = 2**29
"""More pixels than these are refused as a decompression bomb: 23170 x 23170, 6.4 GB as a float32 tensor."""

# Pillow would otherwise try every format it knows, and hand PostScript in a file named .png to Ghostscript.
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM")
_warned_of_16_bits = False


class ImageError(ValueError):
    """The image file `path` cannot be used, for `reason`."""

    def __init__(self, path: Path, reason: str):
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def list_images(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the image files at any depth below `folder`, sorted by name within each folder, without hidden ones."""
    images = []
    for entry in visible(Path(folder)):
        if entry.is_dir():
            images += list_images(entry)
        elif entry.suffix.lower() in IMAGE_SUFFIXES:
            images.append(entry)
    return images


def visible(folder: Path) -> list[Path]:
    """Return the files and folders in `folder`, sorted by name, without hidden ones."""
    entries = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
    return sorted(entries, key=lambda entry: entry.name)  # paths themselves sort without case on Windows


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """Read an image file as (3, H, W) float32 in [0, 1], upright, its values converted as by `from_pil`.

    Of a file with several pages the first is read. 16-bit colour is cut to 8 bits, with one warning per process.

    Raises:
        ImageError: the file is missing, in an unknown format, damaged or truncated anywhere, its values are refused by
            `from_pil`, or it has more than `MAX_IMAGE_PIXELS` pixels.
    """
    with _opened(Path(path)) as image:
        _warn_of_16_bit_colour(Path(path), image)
        return from_pil(image)


def _warn_of_16_bit_colour(path: Path, image: PIL.Image.Image) -> None:
    """Warn, once per process, if an image has 16 bits per colour; it must not be decoded yet.

    Only the decoder that Pillow chose tells: Pillow's mode is RGB for 8 and for 16 bits.
    """
    global _warned_of_16_bits
    raw_modes = "".join(str(tile.args) for tile in getattr(image, "tile", []))  # "RGB;16B", or ("RGBA;16L", ...)
    if image.mode.startswith("RGB") and ";16" in raw_modes and not _warned_of_16_bits:
        _warned_of_16_bits = True
        warnings.warn(
            f"{path} has 16 bits a colour, of which Pillow reads the upper 8; so for all such files. To keep all, "
            "score arrays of uint16, or store grey images of 16 bits",
            stacklevel=3,
        )


def read_header(path: str | os.PathLike[str]) -> tuple[int, int, str]:
    """Return height, width and Pillow's mode of an image file, without decoding its pixels.

    Height and width are those of the upright image, unless the orientation stands behind the pixels or only in XMP.

    Raises:
        ImageError: as in `read_image`, but not for damage within the pixels.
    """
    with _opened(Path(path)) as image:
        width, height = image.size
        if "exif" in image.info and image.getexif().get(0x0112, 1) >= 5:  # TIFFs have none: Pillow turns their size
            width, height = height, width
        return height, width, image.mode


@contextmanager
def _opened(path: Path) -> Iterator[PIL.Image.Image]:
    """Yield the opened image, not decoded yet; an error inside the block becomes an ImageError."""
    from PIL import Image, UnidentifiedImageError

    try:
        # By file name Pillow would map uncompressed grey TIFFs into memory, and scramble those to be rotated.
        with _unlimited_pixels(), open(path, "rb") as file, Image.open(file, formats=_FORMATS) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise ValueError(
                    f"{image.width} x {image.height} pixels, more than hgad_fast.data.images.MAX_IMAGE_PIXELS = "
                    f"{MAX_IMAGE_PIXELS}: cut it into tiles, unless it is a decompression bomb"
                )
            yield image
    except UnidentifiedImageError as error:
        reason = f"no image, or a truncated or damaged one; read are {', '.join(_FORMATS)}"
        if path.stat().st_size == 0:
            reason = "the file is empty"
        raise ImageError(path, reason) from error
    except OSError as error:
        raise ImageError(path, error.strerror or str(error)) from error
    except Exception as error:  # on a damaged file Pillow raises anything from SyntaxError to struct.error
        raise ImageError(path, str(error) or type(error).__name__) from error


def from_pil(image: PIL.Image.Image) -> Tensor:
    """Convert a Pillow image of any mode to (3, H, W) float32 in [0, 1], rotated as its EXIF orientation says.

    - 8 bits per channel are divided by 255. Grey is repeated over the channels, a palette is looked up.
    - 16-bit grey is divided by 65535, its whole range: 12-bit values in 16-bit words stay dark.
    - 16-bit colour is cut to 8 bits (the upper byte): Pillow reads no more of it.
    - 32-bit integers must lie in 0..65535 and count as 16-bit. Floats must lie in [0, 1] and are kept.
    - Alpha is dropped, as `convert("RGB")` does: a pixel is what the camera wrote. Some leave the fourth byte of their
      32-bit pixels zero, so that compositing would blank the image.
    - CMYK is converted without colour management; embedded ICC profiles are not applied.

    Raises:
        ValueError: values are outside these ranges, or the image is a 16-bit TIFF whose white is zero.
    """
    from PIL import ImageOps

    white_is_zero = getattr(image, "tag_v2", {}).get(262) == 0  # the TIFF tag PhotometricInterpretation
    if white_is_zero and image.mode.startswith("I;16"):
        raise ValueError("16-bit TIFF whose white is zero, which Pillow reads inverted; store black as zero")
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        return _grey(_within(np.array(image), 1.0))
    if image.mode.startswith("I"):
        return _grey(_within(np.array(image), 65535.0).astype(np.float32) / np.float32(65535))
    image.info.pop("transparency", None)  # or Pillow warns that RGB has no room for the alpha of a palette
    channels = np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))
    return torch.from_numpy(channels).to(torch.float32).div_(255)


def _grey(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).repeat(3, 1, 1)


def _within(values: np.ndarray, upper: float) -> np.ndarray:
    """Return the values if they are in [0, upper]; a ValueError otherwise."""
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= upper):  # a NaN fails both
        raise ValueError(
            f"{values.dtype} grey values from {low:g} to {high:g} are not in [0, {upper:g}]; "
            "store 16-bit integers, or floats in [0, 1]"
        )
    return values


_decoding_lock = threading.Lock()
_decoding = 0  # threads inside `_unlimited_pixels`
_pillow_limit: int | None = None


@contextmanager
def _unlimited_pixels() -> Iterator[None]:
    """Lift Pillow's process-wide limit on pixels, and its warnings below it, while any thread is in the block.

    Line-scan and microscope images are beyond that limit; `MAX_IMAGE_PIXELS` takes its place.
    """
    from PIL import Image

    global _decoding, _pillow_limit
    with _decoding_lock:
        if _decoding == 0:
            _pillow_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _decoding += 1
    try:
        yield
    finally:
        with _decoding_lock:
            _decoding -= 1
            if _decoding == 0:
                Image.MAX_IMAGE_PIXELS = _pillow_limit


def read_mask(path: str | os.PathLike[str]) -> Tensor:
    """Read a mask file as (H, W) bool: true where any channel is above zero (0/1, 0/255, coloured masks).

    In a JPEG, whose edges ring, the bound is one half. For a folder, return the union of the masks in it.

    Raises:
        ImageError: as in `read_image`, and for a folder without masks or with masks of several sizes.
    """
    if os.path.isdir(path):
        masks = [read_mask(file) for file in list_images(path)]
        if len({mask.shape for mask in masks}) != 1:
            reason = "its masks differ in size" if masks else "there is no mask in this folder"
            raise ImageError(Path(path), f"{reason}; they belong to one image, and have its size")
        return torch.stack(masks).any(0)
    lossy = Path(path).suffix.lower() in (".jpg", ".jpeg")
    return (read_image(path) > (0.5 if lossy else 0.0)).any(0)


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resample an image (C, H, W) float to `size` (h, w) by Pillow's Lanczos filter, as float32 in [0, 1].

    Channels are resampled as floats: 8-bit, 16-bit and computed images take one path, without rounding. The filter's
    overshoot at edges is clipped. An image that has this size already is returned as it is.
    """
    from PIL import Image

    if tuple(image.shape[-2:]) == tuple(size):
        return image
    height, width = size
    resized = [
        np.array(Image.fromarray(plane).resize((width, height), Image.Resampling.LANCZOS))  # copies one plane at a time
        for plane in image.detach().to("cpu", torch.float32).numpy()
    ]
    return torch.from_numpy(np.stack(resized)).clamp_(0, 1).to(image.device)


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Resample a mask (H, W) bool to `size` (h, w) by Pillow's nearest neighbour."""
    from PIL import Image

    height, width = size
    image = Image.fromarray(mask.to("cpu", torch.uint8).numpy())
    resized = np.array(image.resize((width, height), Image.Resampling.NEAREST))
    return torch.from_numpy(resized).to(mask.device, torch.bool)


def whole_image(image: Tensor, img_size: int | str, square: bool = False) -> Tensor:
    """Resize a whole image (3, H, W) float or mask (H, W) bool to `whole_image_size`."""
    height, width = image.shape[-2:]
    return _resize(image, whole_image_size(height, width, img_size, square))


def whole_image_size(height: int, width: int, img_size: int | str, square: bool = False) -> tuple[int, int]:
    """Return the (h, w) of `whole_image`: the short side is `img_size`, the long one keeps the proportions, rounded.

    With ``"native"`` it is the size of the image itself. With `square` both sides are the short one, whatever the
    proportions.
    """
    short = min(height, width)
    side = _side(short, img_size)
    if square:
        return side, side
    return round(side * height / short), round(side * width / short)


def centre_crop(image: Tensor, img_size: int | str) -> Tensor:
    """Resize an image (3, H, W) float or a mask (H, W) bool, and cut a square of side `img_size` from its centre.

    This is the official protocol: the short side is resized to `img_size`, then the centre is cut out, as by
    torchvision's Resize and CenterCrop. With ``"native"`` the side of the square is the image's short side.
    """
    height, width = image.shape[-2:]
    size, top, left = centre_crop_geometry(height, width, img_size)
    side = _side(min(height, width), img_size)
    return _resize(image, size)[..., top : top + side, left : left + side].contiguous()


def centre_crop_geometry(height: int, width: int, img_size: int | str) -> tuple[tuple[int, int], int, int]:
    """Return the (h, w) to which `centre_crop` resizes an image, and the top and left of the crop in it."""
    short = min(height, width)
    side = _side(short, img_size)
    h, w = side * height // short, side * width // short
    return (h, w), round((h - side) / 2), round((w - side) / 2)


def _side(short: int, img_size: int | str) -> int:
    """Return the short side after resizing: `img_size`, or with ``"native"`` the image's own."""
    return short if isinstance(img_size, str) else img_size


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resample an image, or a mask, which is bool."""
    return resize_mask(image, size) if image.dtype == torch.bool else resize_image(image, size)
