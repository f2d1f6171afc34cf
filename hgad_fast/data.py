"""Folders of images: what is there, decoded to float tensors, and brought to the size of the model.

Two layouts are read, with any class names. The first is that of MVTec AD, for a dataset or one class of it:

    root/<class>/train/good/*                            normal images for training
    root/<class>/test/good/*, root/<class>/test/<defect>/*
    root/<class>/ground_truth/<defect>/<stem>_mask.png   or <stem>.png, one mask an anomalous image

The second holds normal images only: `root/<class>/*`.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import PIL.Image

GOOD = "good"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
MAX_IMAGE_PIXELS = 2**29
"""More pixels than these are refused as a decompression bomb: 23170 x 23170, 6.4 GB as a float32 tensor."""

# Pillow would otherwise try every format it knows, and hand PostScript in a file named .png to Ghostscript.
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM")
_NOT_A_CLASS = ("ground_truth", "__MACOSX", "@eaDir")


class DatasetError(ValueError):
    """A dataset that cannot be used as it lies on disk; the message says where, and what to do about it."""


class ImageError(ValueError):
    """The image file `path` cannot be used, for `reason`."""

    def __init__(self, path: Path, reason: str):
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class Sample:
    """An image of class `class_id`; `defect` is "good" for a normal one, `mask` None if it has none."""

    path: Path
    class_id: int
    defect: str = GOOD
    mask: Path | None = None

    @property
    def is_anomalous(self) -> bool:
        return self.defect != GOOD


@dataclass(frozen=True)
class Dataset:
    """The images under `root`, by class and path; `class_id` indexes `class_names`; `train` is all normal."""

    root: Path
    class_names: tuple[str, ...]
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]


def discover(root: str | os.PathLike[str]) -> Dataset:
    """The dataset at `root`, in one of the two layouts of this module.

    Classes and images come sorted by name. Below `train/good`, `test/<defect>` and `ground_truth/<defect>`
    files may lie in folders, the same for an image and its mask. Only the name `good` stands for normal
    images. Hidden files, and files with none of the `IMAGE_SUFFIXES`, are passed over. Files are listed, not
    opened: that they can be decoded is for `check_images` to find out.

    Raises DatasetError for a missing folder, a class without training images, images of which their place
    does not say whether they are normal, and masks of a defect that fit none of its images.
    """
    root = Path(root)
    if not root.is_dir():
        raise DatasetError(f"{root}: no such folder; give the folder that holds one folder a class")
    if (root / "train").is_dir() or (root / "test").is_dir():
        return _mvtec_dataset(root, [root])
    folders = [entry for entry in _visible(root) if entry.is_dir() and entry.name not in _NOT_A_CLASS]
    classes = [folder for folder in folders if (folder / "train").is_dir()]
    if not classes:
        return _normals_dataset(root, folders)
    for folder in folders:
        if folder not in classes and list_images(folder):
            raise DatasetError(f"{folder}: images, but no train/{GOOD}; add it, or move the folder away")
    return _mvtec_dataset(root, classes)


def list_images(folder: str | os.PathLike[str]) -> list[Path]:
    """The image files at any depth below `folder`, sorted by name within each folder, without hidden ones."""
    images = []
    for entry in _visible(Path(folder)):
        if entry.is_dir():
            images += list_images(entry)
        elif entry.suffix.lower() in IMAGE_SUFFIXES:
            images.append(entry)
    return images


def _visible(folder: Path) -> list[Path]:
    entries = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
    return sorted(entries, key=lambda entry: entry.name)  # paths themselves sort without case on Windows


def _mvtec_dataset(root: Path, classes: list[Path]) -> Dataset:
    train: list[Sample] = []
    test: list[Sample] = []
    for class_id, folder in enumerate(classes):
        train += _normals(folder / "train" / GOOD, class_id)
        test += _test_samples(folder, class_id)
    # abspath names the class of `discover(".")`, and leaves the names of linked folders as they are
    names = tuple(os.path.basename(os.path.abspath(folder)) for folder in classes)
    return Dataset(root, names, tuple(train), tuple(test))


def _normals_dataset(root: Path, classes: list[Path]) -> Dataset:
    if not classes:
        raise DatasetError(f"{root}: no class folders; put the normal images into {root / '<class>'}")
    if root / GOOD in classes:
        raise DatasetError(f"{root / GOOD}: this is no class; move it to {root / '<class>' / 'train' / GOOD}")
    train: list[Sample] = []
    for class_id, folder in enumerate(classes):
        samples = _normals(folder, class_id)
        for sample in samples:
            if sample.path.parent != folder:
                raise DatasetError(
                    f"{sample.path.parent}: nothing says whether these images are normal; "
                    f"put normal ones directly into {folder}, or into {folder / 'train' / GOOD}"
                )
        train += samples
    return Dataset(root, tuple(folder.name for folder in classes), tuple(train), ())


def _normals(folder: Path, class_id: int) -> list[Sample]:
    images = list_images(folder) if folder.is_dir() else []
    if not images:
        raise DatasetError(f"{folder}: no training images; put normal ones here ({' '.join(IMAGE_SUFFIXES)})")
    return [Sample(path, class_id) for path in images]


def _test_samples(folder: Path, class_id: int) -> list[Sample]:
    samples: list[Sample] = []
    for entry in _visible(folder / "test") if (folder / "test").is_dir() else []:
        if entry.is_dir():
            samples += _defect_samples(entry, folder / "ground_truth" / entry.name, class_id)
        elif entry.suffix.lower() in IMAGE_SUFFIXES:
            raise DatasetError(
                f"{entry}: nothing says whether this image is normal; "
                f"move it to {entry.parent / GOOD} or {entry.parent / '<defect>'}"
            )
    return samples


def _defect_samples(folder: Path, mask_folder: Path, class_id: int) -> list[Sample]:
    masks = _masks(mask_folder) if folder.name != GOOD and mask_folder.is_dir() else {}
    samples = [
        Sample(path, class_id, folder.name, masks.get(path.relative_to(folder).with_suffix("")))
        for path in list_images(folder)
    ]
    if masks and samples and not any(sample.mask for sample in samples):
        image = samples[0].path
        raise DatasetError(
            f"{mask_folder}: no mask fits an image of {folder}; that of {image.name} is {image.stem}_mask.png"
        )
    return samples


def _masks(folder: Path) -> dict[Path, Path]:
    """Masks by the relative path of their image without its suffix; `<stem>_mask` goes before `<stem>`."""
    masks: dict[Path, Path] = {}
    for path in list_images(folder):
        key = path.relative_to(folder).with_suffix("")
        masks.setdefault(key, path)
        if key.name.endswith("_mask"):
            masks[key.with_name(key.name.removesuffix("_mask"))] = path
    return masks


def check_images(
    samples: Sequence[Sample], *, skip_bad: bool = False
) -> tuple[tuple[Sample, ...], tuple[ImageError, ...]]:
    """Decode every image and mask; the sound samples in their order, and what is wrong with the others.

    A mask must have the size of its image. Files are decoded to their last pixel, since a header says
    nothing about a truncated file. Damage inside a JPEG stream that decodes without an error goes unseen.

    Raises DatasetError with every unusable file and its reason, unless `skip_bad`; and with `skip_bad` where
    that would leave a class without images.
    """
    # Decoding releases the GIL. Few threads: each holds one decoded image, which may be of gigabytes.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        faults = list(pool.map(_fault, samples))
    sound = tuple(sample for sample, fault in zip(samples, faults, strict=True) if fault is None)
    errors = tuple(fault for fault in faults if fault is not None)
    listing = "".join(f"\n  {error}" for error in errors)
    if errors and not skip_bad:
        raise DatasetError(
            f"{len(errors)} of {len(samples)} images cannot be used; replace or remove them, "
            f"or go on without them (--skip-bad, skip_bad=True):{listing}"
        )
    if lost := {sample.class_id for sample in samples} - {sample.class_id for sample in sound}:
        raise DatasetError(f"class {min(lost)} has no image that can be used; replace these:{listing}")
    return sound, errors


def _fault(sample: Sample) -> ImageError | None:
    try:
        image = read_image(sample.path)
        if sample.mask is not None and (mask := read_mask(sample.mask)).shape != image.shape[1:]:
            sizes = f"(height, width) {tuple(mask.shape)}, its image {tuple(image.shape[1:])}"
            raise ImageError(sample.mask, f"the mask has {sizes}; draw it on {sample.path}")
    except ImageError as error:
        return error
    return None


def fingerprint(samples: Iterable[Sample], root: str | os.PathLike[str]) -> str:
    """SHA-256 in hexadecimal of each sample's class, path relative to `root` and file content, in this order.

    It is the same for a copy of the dataset elsewhere, and differs for the same samples in another order.
    """
    digest = hashlib.sha256()
    for sample in samples:
        path = sample.path.relative_to(root).as_posix()
        content = sample.path.read_bytes()
        # no path holds a NUL, and the content's length stands before it: other samples hash other bytes
        digest.update(f"{sample.class_id} {path}\0{len(content)} ".encode(errors="surrogateescape"))
        digest.update(content)
    return digest.hexdigest()


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """The image file as (3, H, W) float32 in [0, 1], upright, its values converted as by `from_pil`.

    A file of several pages gives the first. Raises ImageError if the file is missing, not of a format that is
    read, damaged or truncated anywhere, or of more than `MAX_IMAGE_PIXELS` pixels.
    """
    from PIL import Image, UnidentifiedImageError

    path = Path(path)
    try:
        # By file name Pillow would map uncompressed grey TIFFs into memory, and scramble those to be rotated.
        with _unlimited_pixels(), open(path, "rb") as file, Image.open(file, formats=_FORMATS) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise ValueError(
                    f"{image.width} x {image.height} pixels, more than hgad_fast.data.MAX_IMAGE_PIXELS = "
                    f"{MAX_IMAGE_PIXELS}: cut it into tiles, unless it is a decompression bomb"
                )
            return from_pil(image)
    except UnidentifiedImageError as error:
        known = f"no image, or a truncated or damaged one; read are {', '.join(_FORMATS)}"
        raise ImageError(path, known if path.stat().st_size else "the file is empty") from error
    except OSError as error:
        raise ImageError(path, error.strerror or str(error)) from error
    except Exception as error:  # on a damaged file Pillow raises anything from SyntaxError to struct.error
        raise ImageError(path, str(error) or type(error).__name__) from error


def from_pil(image: PIL.Image.Image) -> Tensor:
    """A Pillow image of any mode as (3, H, W) float32 in [0, 1], rotated as its EXIF orientation says.

    - 8 bits a channel are divided by 255. Grey is repeated over the channels, a palette is looked up.
    - 16-bit grey is divided by 65535, its whole range: 12-bit values in 16-bit words stay dark.
    - 16-bit colour is cut to 8 bits (the upper byte): Pillow reads no more of it.
    - 32-bit integers must lie in 0..65535 and count as 16-bit. Floats must lie in [0, 1] and are kept.
    - Alpha is dropped, as `convert("RGB")` does: a pixel is what the camera wrote, also where the fourth byte
      of its 32-bit pixels stayed zero, and compositing would blank the picture.
    - CMYK is converted without colour management; embedded ICC profiles are not applied.

    Raises ValueError for values outside these ranges, and for 16-bit TIFFs whose white is zero.
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
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= upper):  # a NaN fails both
        raise ValueError(
            f"{values.dtype} grey values from {low:g} to {high:g} are not in [0, {upper:g}]; "
            "store 16-bit integers, or floats in [0, 1]"
        )
    return values


_decoding_lock = threading.Lock()
_decoding = 0
_pillow_limit: int | None = None


@contextmanager
def _unlimited_pixels() -> Iterator[None]:
    """Lift Pillow's process-wide limit, and its warnings below it, while any thread is in here.

    Line-scan and microscope images are beyond it; ours, `MAX_IMAGE_PIXELS`, takes its place.
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
    """The mask file as (H, W) bool: true where any channel is above zero (0/1, 0/255, coloured masks).

    In a JPEG, whose edges ring, above one half. Raises ImageError as `read_image` does.
    """
    lossy = Path(path).suffix.lower() in (".jpg", ".jpeg")
    return (read_image(path) > (0.5 if lossy else 0.0)).any(0)


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """`image` (C, H, W) float, resampled to `size` (h, w) by Pillow's Lanczos filter, as float32 in [0, 1].

    Channels are resampled as floats: 8-bit, 16-bit and computed images take one path, without rounding.
    The filter's overshoot at edges is clipped. An image of the right size is returned as it is.
    """
    from PIL import Image

    if tuple(image.shape[-2:]) == tuple(size):
        return image
    height, width = size
    planes = [Image.fromarray(plane) for plane in image.detach().to("cpu", torch.float32).numpy()]
    resized = [np.array(plane.resize((width, height), Image.Resampling.LANCZOS)) for plane in planes]
    return torch.from_numpy(np.stack(resized)).clamp_(0, 1).to(image.device)


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """`mask` (H, W) bool, resampled to `size` (h, w) by Pillow's nearest neighbour."""
    from PIL import Image

    height, width = size
    picture = Image.fromarray(mask.to("cpu", torch.uint8).numpy())
    resized = np.array(picture.resize((width, height), Image.Resampling.NEAREST))
    return torch.from_numpy(resized).to(mask.device, torch.bool)


def whole_picture(picture: Tensor, img_size: int) -> Tensor:
    """`picture`, an image (3, H, W) float or a mask (H, W) bool, resized to `whole_picture_size`."""
    height, width = picture.shape[-2:]
    return _resize(picture, whole_picture_size(height, width, img_size))


def whole_picture_size(height: int, width: int, img_size: int) -> tuple[int, int]:
    """(h, w) of the whole picture: the short side is `img_size`, the long one follows the aspect, rounded."""
    short = min(height, width)
    return round(img_size * height / short), round(img_size * width / short)


def centre_crop(picture: Tensor, img_size: int) -> Tensor:
    """`picture`, an image (3, H, W) float or a mask (H, W) bool, cut to `img_size` x `img_size`.

    The official protocol: short side to `img_size`, then the centre, as torchvision's Resize and CenterCrop.
    """
    height, width = picture.shape[-2:]
    size, top, left = centre_crop_geometry(height, width, img_size)
    return _resize(picture, size)[..., top : top + img_size, left : left + img_size].contiguous()


def centre_crop_geometry(height: int, width: int, img_size: int) -> tuple[tuple[int, int], int, int]:
    """Of `centre_crop`: (h, w) to which the picture is resized, and the top and left of the crop in it."""
    short = min(height, width)
    h, w = img_size * height // short, img_size * width // short
    return (h, w), round((h - img_size) / 2), round((w - img_size) / 2)


def _resize(picture: Tensor, size: tuple[int, int]) -> Tensor:
    return resize_mask(picture, size) if picture.dtype == torch.bool else resize_image(picture, size)
