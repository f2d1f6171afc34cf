"""Sheets of images beside the lists that curation writes: their names, which of them are there, what they must not be.

Nothing here imports torch, so that the command line refuses an output at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from ..terminal import printable


def sheet_of_group(table: Path, group: str) -> Path:
    """Return the sheet of a group in a list of groups."""
    return table.with_name(f"{table.stem}-{group}.jpg")


def sheet_of_suspects(table: Path) -> Path:
    """Return the sheet beside a list of suspects."""
    return table.with_suffix(".jpg")


def sheets_of_groups(table: Path) -> dict[str, Path]:
    """Return the files beside a list that are named as sheets of its groups are, by group; there need be no list."""
    found = {}
    for path in sorted(table.parent.iterdir()) if table.parent.is_dir() else []:
        group = path.stem.removeprefix(f"{table.stem}-")
        if re.fullmatch("group-[1-9][0-9]*", group) and path == sheet_of_group(table, group):
            found[group] = path
    return found


def require_no_image(sheets: Iterable[Path], images: Iterable[Path]) -> None:
    """Raise a ValueError if one of the sheets would replace one of the images that were looked at."""
    known = set(map(os.path.realpath, images))
    for sheet in sheets:
        if os.path.realpath(sheet) in known:
            raise ValueError(
                f"{printable(sheet)} is one of the images, and a sheet would replace it; write to another folder"
            )
