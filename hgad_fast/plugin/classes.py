"""The class of an image by its path, in data that do not name it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..files import printable

SPLITS = ("train", "training", "test", "testing", "val", "validation", "test_public", "test_private")


def class_in(path: str, names: Sequence[str]) -> int:
    """Return the number of the class of an image.

    It is that of the folder before the last one that is named like a split of the data (train, test, ...), or else of
    the innermost folder that is named like a class. Of a single class all images are.

    Args:
        path: of the image.
        names: of the classes.

    Raises:
        ValueError: no folder is named like a class.
    """
    if len(names) == 1:
        return 0
    folders = Path(path).parts[:-1]
    before_split = [name for name, after in zip(folders, folders[1:], strict=False) if after.lower() in SPLITS]
    candidates = [name for name in (*folders, *before_split) if name in names]
    if not candidates:
        raise ValueError(
            f"{printable(path)}: no folder in this path has the name of a class ({', '.join(names)}); take "
            "MultiClassFolder, which knows the classes of its images"
        )
    return list(names).index(candidates[-1])
