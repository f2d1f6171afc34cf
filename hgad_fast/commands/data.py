"""`hgad-fast data`: what a dataset holds, and what looks wrong with it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..options import AsJson, begin, plain_errors
from ..terminal import printable, say


@plain_errors
def data(
    roots: Annotated[
        list[Path],
        typer.Argument(metavar="ROOT...", help="Folders of datasets, or CSV files; several are one dataset."),
    ],
    decode: Annotated[bool, typer.Option("--decode", help="Decode every image too: finds truncated files.")] = False,
    as_json: AsJson = False,
) -> None:
    """Count the images of a dataset by class and split, and say what looks wrong with them.

    MVTec AD, MVTec AD 2, BTAD, VisA, MVTec 3D-AD, MVTec LOCO, Real-IAD and MPDD are recognised as they are published.
    The exit code is 1 if something must be fixed: an unreadable file, a mask that is empty or does not fit, the same
    image in training and test.
    """
    with begin(f"reading {', '.join(map(printable, roots))}"):
        from ..data.datasets import discover
        from ..data.survey import survey

        result = survey(discover(roots), decode=decode)
    say(json.dumps(result.to_dict(), indent=2) if as_json else result.table(), sys.stdout)
    if result.errors:
        place = printable(result.root)
        raise ValueError(f"{len(result.errors)} errors in {place}: figures of it are wrong until they are fixed")
