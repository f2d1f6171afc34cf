"""The command `hgad-fast card`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..options import Device, begin, plain_errors, require_no_folder, usable_device
from ..terminal import printable, say, tracked


@plain_errors
def card(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder that hgad-fast train wrote, or a model file alone.")
    ],
    data: Annotated[
        Path | None, typer.Option(help="Dataset with test images; default: the one that RUN was trained on.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file to write; default: card.md beside the model.")
    ] = None,
    repo: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="The repository of a hub from which the example loads it.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a card that is there, edited or not.")
    ] = False,
    device: Device = None,
) -> None:
    """Write a model card: what the model was trained on, how well it does, what its thresholds stand for, its limits.

    It is Markdown with the front matter of a model hub, of the same data as the report; the licence is left to you.
    Figures take the test images, or RUN/evaluation.json of an earlier report; a model file alone has none without
    --data.
    """
    require_no_folder(output)
    with begin(f"loading {printable(run)}"):
        from ..evaluation.card import write_card

        where = usable_device(device)
    path = write_card(run, output, data, repo=repo, overwrite=overwrite, device=where, progress=tracked)
    say(f"card: {path}", sys.stdout)
