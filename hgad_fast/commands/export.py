"""The command `hgad-fast export`."""

from __future__ import annotations

import glob
import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..options import AsJson, begin, given_class, load_model, plain_errors, require_no_folder
from ..terminal import printable, say, working


@plain_errors
def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model file (model.safetensors).")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file to write: NAME.onnx, or NAME.pt2.", show_default=False)
    ],
    format: Annotated[
        str | None, typer.Option(metavar="[onnx|torch]", help="What to write; default: as OUTPUT ends.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="N|HxW[,HxW...]",
            help="Height and width of the images as the model sees them; default: a square of the side in training. Of "
            "a model without a backbone those of the features of each level.",
        ),
    ] = None,
    inputs: Annotated[
        str | None,
        typer.Option(metavar="[image|features]", help="What goes in; features: of a backbone of your own."),
    ] = None,
    outputs: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="What comes out, with commas between: anomaly_map, score, class_id, p_value, threshold, is_anomalous; "
            "default: all.",
        ),
    ] = None,
    class_: Annotated[
        str | None, typer.Option("--class", help="The only class, name or number: a smaller file for one product.")
    ] = None,
    class_input: Annotated[
        bool, typer.Option("--class-input", help="One input more: the class of each image, -1 where it is inferred.")
    ] = False,
    map_size: Annotated[
        str | None,
        typer.Option(
            metavar="[seen|N|HxW]", help="Of the anomaly maps; seen: as scores are computed; default: the input's."
        ),
    ] = None,
    precision: Annotated[
        str, typer.Option(metavar="[fp32|fp16]", help="Of the weights in the file: fp16 halves it, and moves scores.")
    ] = "fp32",
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Run the file and compare it with the model before it is kept.")
    ] = True,
    check_images: Annotated[
        Path | None, typer.Option(help="An image or a folder of images to compare on; default: drawn ones.")
    ] = None,
    false_alarm_rate: Annotated[float | None, typer.Option(help="Judge at another rate than the model's own.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a model as ONNX or torch.export, for runtimes without this library: same scores, maps and verdicts.

    Beside OUTPUT comes OUTPUT.json, which says how images are resized, what goes in and out, and what was checked.
    examples/onnx_score.py is a reader of it. Needs the packages of: pip install 'hgad-fast[export]'
    """
    require_no_folder(output)
    with begin(f"loading {printable(model)}"):
        detector = load_model(model, "cpu", false_alarm_rate)
    levels = size is not None and "," in size
    sizes = [_pair("--size", each) for each in size.split(",")] if levels and size else _pair("--size", size)
    options: dict[str, Any] = {"size": sizes, "inputs": inputs, "precision": precision, "check": check}
    if outputs is not None:
        options["outputs"] = tuple(name.strip() for name in outputs.split(","))
    with working(f"writing {printable(output)}"):
        path = detector.export(
            output,
            format,
            class_id=given_class(class_, detector.groups),
            class_input=class_input,
            map_size=map_size if map_size == "seen" else _pair("--map-size", map_size),
            check_images=check_images,
            **options,
        )
    sidecar_path = path.with_name(f"{path.name}.json")
    sidecar = json.loads(sidecar_path.read_text())
    if as_json:
        print(json.dumps(sidecar, indent=2))
        return
    for line in _summary(path, sidecar_path, sidecar):
        say(line, sys.stdout)


def _summary(path: Path, sidecar_path: Path, sidecar: dict[str, Any]) -> list[str]:
    """Return what was written, for people."""
    beside = path.parent.glob(f"{glob.escape(path.name)}.*.data")  # large weights
    bytes_written = sum(file.stat().st_size for file in (path, *beside))
    shapes = {name: " x ".join(map(str, each["shape"])) for name, each in sidecar["inputs"].items()}
    lines = [
        f"{sidecar['kind']}: {printable(path)} ({bytes_written / 1e6:.1f} MB)",
        f"sidecar: {printable(sidecar_path)}",
        *(f"input {name}: {shape}" for name, shape in shapes.items()),
        f"outputs: {', '.join(sidecar['outputs'])}",
    ]
    check = sidecar["check"]
    if check is None:
        lines.append("not checked (--no-check)")
    else:
        figures = ", ".join(f"{name} {check[name]:g}" for name in sidecar["outputs"])
        lines.append(f"checked on {check['images']} images in {check['runtime']}; differences: {figures}")
    if sidecar.get("resize", {}).get("rule") == "short side":
        height, width = (sidecar["resize"][side] for side in ("height", "width"))
        lines.append(f"images of other proportions than {height} x {width} take another file (--size HxW)")
    return lines


def _pair(option: str, value: str | None) -> int | tuple[int, int] | None:
    """Return the number, or the height and width, that an option gives.

    Raises:
        ValueError: it gives neither.
    """
    if value is None:
        return None
    found = re.fullmatch(r"(\d+)(?:[xX](\d+))?", value.strip())
    if not found:
        raise ValueError(f"{option} is {value!r}; give one number, or height and width, such as 256x320")
    return int(found[1]) if found[2] is None else (int(found[1]), int(found[2]))
