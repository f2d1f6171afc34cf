"""`hgad-fast add-class` and `hgad-fast absorb`: what a trained model learns from images of a new or a known product."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..options import AsJson, Device, begin, load_model, plain_errors, require_no_folder
from ..terminal import printable, say, tracked

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A model file (model.safetensors).")]
Images = Annotated[
    Path,
    typer.Argument(metavar="FOLDER", help="Normal images of the class: a folder of images, or the class of a dataset."),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="The model file to write.", show_default=False)]
SkipBad = Annotated[bool, typer.Option(help="Leave out images that cannot be decoded, and report them.")]


@plain_errors
def add_class(
    model: Model,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name of the new class.")],
    images: Images,
    output: Output,
    calibration: Annotated[
        Path | None, typer.Option(help="Other normal images, for the threshold; default: some of FOLDER are held out.")
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(metavar="DATA", help="Dataset of the others, laid out as for train, to measure what they lose."),
    ] = None,
    skip_bad: SkipBad = False,
    as_json: AsJson = False,
    device: Device = None,
) -> None:
    """Add a class to a model from normal images of it, in a minute and without training.

    Place Gaussian: exact, and the other classes keep the bits of their scores. HGAD: its flows stay, and what the other
    classes lose is measured with --check. VQ-Flow forms its groups by itself: it cannot. A file OUTPUT is replaced, be
    it MODEL itself.
    """
    require_no_folder(output)
    with begin(f"loading {printable(model)}"):
        detector = load_model(model, device)
    added = detector.add_class(
        name,
        images,
        calibration=calibration,
        check=check,
        skip_bad=skip_bad,
        progress=tracked,
    )
    _finish(detector, output, added, as_json)


@plain_errors
def absorb(
    model: Model,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The class of the images.")],
    images: Images,
    output: Output,
    skip_bad: SkipBad = False,
    as_json: AsJson = False,
    device: Device = None,
) -> None:
    """Take more normal images of a known class, such as false alarms, so that others like them raise none.

    Place Gaussian: they join the sums of the class, which is exact. HGAD and VQ-Flow: the calibration alone takes
    account of them, and thresholds follow. Never give images of defects. A file OUTPUT is replaced, be it MODEL itself.
    """
    require_no_folder(output)
    with begin(f"loading {printable(model)}"):
        detector = load_model(model, device)
    _finish(detector, output, detector.absorb(name, images, skip_bad=skip_bad, progress=tracked), as_json)


def _finish(detector: Any, output: Path, done: Any, as_json: bool) -> None:
    """Write the model, and say what was done."""
    detector.save(output)
    lines = [json.dumps(done.to_dict(), indent=2)] if as_json else [*done.lines(), f"model: {printable(output)}"]
    for line in lines:
        say(line, sys.stdout)
