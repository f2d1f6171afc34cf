"""`hgad-fast monitor`: whether the images of past runs have changed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..options import AsJson, begin, plain_errors, require_no_folder, require_package
from ..terminal import printable, say


@plain_errors
def monitor(
    tables: Annotated[
        list[Path],
        typer.Argument(metavar="SCORES...", help="Tables of hgad-fast score (scores.csv), oldest first."),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also draw p-values and evidence here (PNG, SVG, ...).")
    ] = None,
    alpha: Annotated[
        float, typer.Option(help="Probability that a change is ever reported where there is none.")
    ] = 0.01,
    defect_rate: Annotated[
        float, typer.Option(help="Share of images that are of defects as a rule, and are no change.")
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Say whether camera, light or product have changed since the model was calibrated, from the scores of past runs.

    The images have to stand in the order in which they were taken. As long as they are like the calibration images, a
    change is reported with a probability of at most --alpha, however many images there are. The exit code is 0 whether
    there is a change or not; --json says it to programs. Drawing needs matplotlib:
    pip install 'hgad-fast[plot]'
    """
    require_no_folder(output)
    if output is not None:
        require_package("matplotlib", "--output", "plot")
        if output.resolve() in [table.resolve() for table in tables]:
            raise ValueError(f"--output is {printable(output)}, a table to be read: name an image to draw")
    with begin(f"reading {', '.join(map(printable, tables))}"):
        from ..evaluation.monitoring import course, plot

        past = course(tables, alpha, defect_rate)
    say(json.dumps(past.to_dict(), indent=2) if as_json else past.table(), sys.stdout)
    if output is not None:
        say(f"drawn: {printable(plot(past, output))}", sys.stderr if as_json else sys.stdout)
