"""Normal images of one class, as a folder or as a list of files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..files import printable
from .datasets import GOOD, DatasetError, discover
from .listing import is_image, list_images, visible

Files = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def are_files(images: object) -> bool:
    """Return whether `normal_images` may take something: a path, or a list of paths."""
    paths = images if isinstance(images, (list, tuple)) else [images]
    return bool(paths) and all(isinstance(path, (str, os.PathLike)) for path in paths)


def normal_images(images: Files) -> list[Path]:
    """Return the files of normal images of one class, each once, in the order of `list_images` or as they are listed.

    Args:
        images: a folder of images; the folder of one class in a layout of `data.datasets`, of which the normal training
            images are taken; an image; or a list of images.

    Raises:
        DatasetError: there are none, or nothing says which of those in a folder are normal.
    """
    if not isinstance(images, (str, os.PathLike)):
        return list(dict.fromkeys(file for path in images for file in normal_images(path)))
    path = Path(images)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DatasetError(f"{printable(path)}: no such file or folder; give a folder of normal images, or a list")
    directly = [entry for entry in visible(path) if is_image(entry) and not entry.is_dir()]
    if not directly:
        if not list_images(path):
            raise DatasetError(f"{printable(path)}: no images; put normal images of the class here")
        dataset = discover(path)
        if len(dataset.class_names) > 1:
            raise DatasetError(
                f"{printable(path)}: images of {len(dataset.class_names)} classes "
                f"({', '.join(dataset.class_names)}); give the folder of one"
            )
        return [sample.path for sample in dataset.train]
    below = [file for file in list_images(path) if file.parent != path]
    if below:
        raise DatasetError(
            f"{printable(below[0].parent)}: nothing says whether these images are normal; put normal ones directly "
            f"into {printable(path)}, or all of the class into {printable(path / 'train' / GOOD)}"
        )
    return directly
