"""Folders of images: what is there, of which class, and whether it is normal.

Two layouts are read, with any class names. The first is that of MVTec AD, for a dataset or one class of it:

    root/<class>/train/good/*                            normal images for training
    root/<class>/test/good/*, root/<class>/test/<defect>/*
    root/<class>/ground_truth/<defect>/<stem>_mask.png   or <stem>.png, one mask an anomalous image

The second holds normal images only: `root/<class>/*`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .images import (
    IMAGE_SUFFIXES,
    ImageError,
    centre_crop,
    centre_crop_geometry,
    from_pil,
    list_images,
    read_image,
    read_mask,
    resize_image,
    resize_mask,
    visible,
    whole_picture,
    whole_picture_size,
)

__all__ = [
    "GOOD",
    "IMAGE_SUFFIXES",
    "Dataset",
    "DatasetError",
    "ImageError",
    "Sample",
    "centre_crop",
    "centre_crop_geometry",
    "check_images",
    "discover",
    "fingerprint",
    "from_pil",
    "list_images",
    "read_image",
    "read_mask",
    "resize_image",
    "resize_mask",
    "whole_picture",
    "whole_picture_size",
]

GOOD = "good"
_NOT_A_CLASS = ("ground_truth", "__MACOSX", "@eaDir")


class DatasetError(ValueError):
    """A dataset that cannot be used as it lies on disk; the message says where, and what to do about it."""


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
    folders = [entry for entry in visible(root) if entry.is_dir() and entry.name not in _NOT_A_CLASS]
    classes = [folder for folder in folders if (folder / "train").is_dir()]
    if not classes:
        return _normals_dataset(root, folders)
    for folder in folders:
        if folder not in classes and list_images(folder):
            raise DatasetError(f"{folder}: images, but no train/{GOOD}; add it, or move the folder away")
    return _mvtec_dataset(root, classes)


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
    for entry in visible(folder / "test") if (folder / "test").is_dir() else []:
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
