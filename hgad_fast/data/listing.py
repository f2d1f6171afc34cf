"""The image files below folders, and what else lies there."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from ..files import printable

IMAGE_SUFFIXES: tuple[str, ...] = (
    ".png",
    ".apng",
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".jif",
    ".jfi",
    ".mpo",
    ".bmp",
    ".dib",
)
IMAGE_SUFFIXES += (".tif", ".tiff", ".webp", ".pgm", ".ppm", ".pbm", ".pnm", ".gif", ".tga", ".avif")
IMAGE_SUFFIXES += (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx")

# Folders that no image is scored from when they lie below a folder that is scored, and what their name must stand
# beside: the masks of MVTec AD and its like, those and the depth of MVTec 3D-AD, those of VisA.
_NOT_SCORED = {"ground_truth": None, "gt": "rgb", "xyz": "rgb", "masks": "images"}


def list_images(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the image files at any depth below `folder`, sorted by name within each folder, without hidden ones.

    Links are followed, except those that lead upwards. Each real folder is entered once, by the path with the fewest
    links, the shortest of these, and of these the first; files that are links are listed by all their names.
    """
    return [file for file in files_below(Path(folder)) if is_image(file)]


def is_image(file: Path) -> bool:
    """Return whether a file has one of the `IMAGE_SUFFIXES`, in small or capital letters."""
    return file.suffix.lower() in IMAGE_SUFFIXES


def files_below(folder: Path, left_out: Mapping[str, str | None] | None = None) -> Iterator[Path]:
    """Yield all visible files below `folder`, as `list_images` orders them; see there for links.

    `left_out` are the names (in small letters) of folders that are not entered, each with the name that must stand
    beside it, or None.
    """
    entries_of = _entered(folder, left_out or {})
    waiting = [folder]
    while waiting:
        path = waiting.pop()
        if path in entries_of:
            waiting += reversed(entries_of[path])
        elif not path.is_dir():  # a folder that is not entered here is left out, or entered by another path
            yield path


def folders_below(folder: Path) -> list[Path]:
    """Return `folder` and all visible folders below it, each after the one that holds it; links as in `list_images`."""
    return list(_entered(folder, {}))


def _entered(folder: Path, left_out: Mapping[str, str | None]) -> dict[Path, list[Path]]:
    """Return the entries of `folder` and of all folders below it, each real folder under one path only.

    That path has as few links as possible, so that folders and links are each looked at once.
    """
    entries_of: dict[Path, list[Path]] = {}
    known: set[str] = set()
    waiting = deque([(folder, os.path.realpath(folder))])
    links: deque[Path] = deque()
    while waiting or links:
        if waiting:
            path, real = waiting.popleft()
        else:
            path = links.popleft()
            real = os.path.realpath(path)
        if real in known:
            continue
        known.add(real)
        entries_of[path] = entries = _visible(path, real)
        names = {entry.name.lower() for entry in entries}
        for entry in entries:
            name = entry.name.lower()
            if not entry.is_dir() or name in left_out and left_out[name] in (None, *names):
                continue
            if entry.is_symlink():
                links.append(entry)
            else:
                waiting.append((entry, os.path.join(real, entry.name)))
    return entries_of


def visible(folder: Path) -> list[Path]:
    """Return the files and folders in `folder`, sorted by name, without hidden ones and without links upwards.

    A link leads upwards if its target is `folder` itself or a folder that holds it.
    """
    return _visible(folder, os.path.realpath(folder))


def _visible(folder: Path, real: str) -> list[Path]:
    """Return what `visible` does, of a folder whose real path is known."""
    entries = [
        entry
        for entry in folder.iterdir()
        if not entry.name.startswith(".") and not (entry.is_symlink() and _holds(os.path.realpath(entry), real))
    ]
    return sorted(entries, key=lambda entry: entry.name)  # paths themselves sort without case on Windows


def _holds(folder: str, path: str) -> bool:
    """Return whether `path` is `folder` or below it; both are real paths."""
    return path == folder or path.startswith(os.path.join(folder, ""))


def endings(files: Iterable[Path]) -> dict[str, int]:
    """Return how many of the files that are no images have each ending, the most frequent first."""
    counts = Counter(file.suffix.lower() for file in files if not is_image(file))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def passed_over(counts: Mapping[str, int]) -> str:
    """Return a line about files with the endings of `counts`, "passed over: 3 .txt, 2 .heic"; "" for none."""
    parts = (f"{count} {printable(ending) or 'without an ending'}" for ending, count in counts.items())
    return f"passed over: {', '.join(parts)}" if counts else ""


def images_to_score(paths: Sequence[str | os.PathLike[str]]) -> tuple[list[Path], list[str]]:
    """Return the files to score, of images and folders of images, and lines on what in the folders is left out.

    In a folder that is a dataset its masks are no images to score: folders `ground_truth` (`Masks` beside `Images`,
    `gt` and `xyz` beside `rgb`) are left out, and Real-IAD's masks, which lie beside the images of defects. Masks in a
    folder that is itself given are scored. A path that is no folder is taken as a file, which reading will judge.
    """
    files: list[Path] = []
    notes: list[str] = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(path)
            continue
        entered = list(files_below(path, _NOT_SCORED))
        images = [file for file in entered if is_image(file)]
        scored = _without_masks_beside(images)
        files += scored
        count = len(list_images(path)) - len(scored)
        if count:
            notes.append(
                f"{printable(path)}: {count} masks (or depth maps) of a dataset are left out; give their folder itself "
                "to score them"
            )
        if line := passed_over(endings(entered)):
            notes.append(f"{printable(path)}: {line}")
    return files, notes


def _without_masks_beside(images: list[Path]) -> list[Path]:
    """Return the images without Real-IAD's masks: below a folder `NG`, a .png beside the .jpg of the same name."""
    known = set(images)
    return [
        file
        for file in images
        if not (file.suffix == ".png" and "NG" in file.parts and file.with_suffix(".jpg") in known)
    ]
