"""`hgad-fast data`: what a dataset holds, what looks wrong with it, groups of its images, and those that look odd."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..curation.sheets import sheet_of_suspects, sheets_of_groups
from ..options import (
    AsJson,
    Assignments,
    Backbone,
    Device,
    Weights,
    begin,
    configuration,
    plain_errors,
    quoted,
    require_no_folder,
    usable_device,
)
from ..terminal import printable, say, tracked


@plain_errors
def data(
    roots: Annotated[
        list[Path],
        typer.Argument(metavar="ROOT...", help="Folders of datasets, or CSV files; several are one dataset."),
    ],
    decode: Annotated[bool, typer.Option("--decode", help="Decode every image too: finds truncated files.")] = False,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="[auto|K]",
            help="Group normal images, which need not be sorted into classes, by what they show; K groups, or as many "
            "as are clearly apart. Needs --output, the CSV file for training.",
        ),
    ] = None,
    suspects: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="List the N training images that look least like their class: defects among normal images, or images "
            "of another class. With --output all of them, and a sheet.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="CSV file to write, outside the folders ROOT; sheets of images come beside it."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUTPUT, and files with the names of its sheets.")
    ] = False,
    skip_bad: Annotated[
        bool,
        typer.Option(help="Of --cluster and --suspects: leave out images that cannot be decoded, and report them."),
    ] = False,
    backbone: Backbone = None,
    weights: Weights = None,
    set_: Assignments = None,
    as_json: AsJson = False,
    device: Device = None,
) -> None:
    """Count the images of a dataset by class and split, and say what looks wrong with them.

    MVTec AD, MVTec AD 2, BTAD, VisA, MVTec 3D-AD, MVTec LOCO, Real-IAD and MPDD are recognised as they are published.
    The exit code is 1 if something must be fixed: an unreadable file, a mask that is empty or does not fit, the same
    image in training and test.

    With --cluster or --suspects the images are looked at instead, by the features of the preset gaussian: see
    docs/data.md.
    """
    looked_at = cluster is not None or suspects is not None
    if cluster is not None and suspects is not None:
        raise ValueError("give --cluster or --suspects; suspects are looked for in the classes that --cluster forms")
    if decode and looked_at:
        raise ValueError("--decode belongs to the count; --cluster and --suspects decode every image anyhow")
    if output is not None and not looked_at:
        raise ValueError("--output is written by --cluster or --suspects; give one of them")
    if cluster is not None and output is None:
        raise ValueError("--cluster needs --output, the CSV file to write, such as -o classes.csv")
    if suspects is not None and suspects < 1:
        raise ValueError(f"--suspects is {suspects}; give a whole number from 1")
    sheets = output is not None and importlib.util.find_spec("matplotlib") is not None
    if output is not None:
        _require_outside(output, roots)
        _require_new_csv(output, overwrite)
        if sheets and not overwrite:
            _require_new_sheets(output, cluster is not None)
    if looked_at:
        with begin(f"reading {', '.join(map(printable, roots))}"):
            options: dict[str, Any] = {
                "config": configuration(None, "gaussian", ("images",), None, set_, backbone, weights),
                "device": usable_device(device),
                "progress": tracked,
                "skip_bad": skip_bad,
            }
        if output is not None and not sheets:
            say("hgad-fast: sheets are left out, as they need matplotlib: pip install 'hgad-fast[plot]'")
        if cluster is not None and output is not None:
            _cluster(roots, cluster, output, sheets, as_json, options)
        elif suspects is not None:
            _suspects(roots, suspects, output, sheets, as_json, options)
        return
    with begin(f"reading {', '.join(map(printable, roots))}"):
        from ..data.datasets import discover
        from ..data.survey import survey

        result = survey(discover(roots), decode=decode)
    say(json.dumps(result.to_dict(), indent=2) if as_json else result.table(), sys.stdout)
    if result.errors:
        place = printable(result.root)
        raise ValueError(f"{len(result.errors)} errors in {place}: figures of it are wrong until they are fixed")


def _require_new_csv(output: Path, overwrite: bool) -> None:
    """Raise a ValueError unless --output names a CSV file that may be written."""
    require_no_folder(output)
    if output.suffix.lower() != ".csv":
        raise ValueError(f"--output is {printable(output)}; give a name that ends in .csv")
    if output.exists() and not overwrite:
        raise ValueError(f"{printable(output)} exists, perhaps with names by hand; --overwrite replaces it")


def _require_new_sheets(output: Path, of_groups: bool) -> None:
    """Raise a ValueError where a sheet may replace a file; how many groups there will be is not known yet."""
    sheets = list(sheets_of_groups(output).values()) if of_groups else [sheet_of_suspects(output)]
    if there := [sheet for sheet in sheets if sheet.exists()]:
        raise ValueError(
            f"{printable(there[0])} exists, and is named as a sheet of {printable(output)}; give --output another name "
            "(--overwrite replaces such files)"
        )


def _require_outside(output: Path, roots: Sequence[Path]) -> None:
    """Raise a ValueError where --output lies in a folder of images, in which its sheets would be images next time."""
    place = Path(os.path.realpath(output.parent))
    folders = []
    for root in roots:  # which `discover` takes for several where there is a + in its name
        folders += [root] if root.exists() else list(map(Path, os.fspath(root).split("+")))
    above = [folder for folder in folders if folder.is_dir() and place.is_relative_to(os.path.realpath(folder))]
    if above:
        outermost = min(above, key=lambda folder: len(os.path.realpath(folder)))
        outside = os.path.join(os.path.dirname(os.path.abspath(outermost)), output.name)
        shown = outside if outermost.is_absolute() else os.path.relpath(outside)
        raise ValueError(
            f"--output is {printable(output)}, in the folder {printable(outermost)} that is looked at: its sheets "
            f"would be images there the next time. Write elsewhere, such as {quoted(['-o', shown])}"
        )


def _cluster(
    roots: Sequence[Path], wanted: str, output: Path, with_sheets: bool, as_json: bool, options: dict[str, Any]
) -> None:
    """Group the images, write the list and the sheets, and say what to do with them."""
    from ..curation.clusters import LEAST, REASONABLE, cluster

    clusters = cluster(roots, int(wanted) if wanted.isdecimal() else wanted, **options)
    clusters.write_csv(output)
    sheets = clusters.write_sheets(output) if with_sheets else []
    for note in clusters.notes:
        say(note)
    sizes = {name: len(group) for name, group in zip(clusters.names, clusters.groups, strict=True)}
    if as_json:
        facts = {
            "images": sum(sizes.values()),
            "groups": sizes,
            "silhouettes": clusters.silhouettes,
            "csv": printable(output),
            "sheets": list(map(printable, sheets)),
        }
        print(json.dumps(facts, indent=2))
        return
    images = sum(sizes.values())
    lines = [f"{images} image{'s' * (images != 1)} in {len(sizes)} group{'s' * (len(sizes) != 1)}"]
    lines += [f"  {name}: {size} image{'s' * (size != 1)}" for name, size in sizes.items()]
    if clusters.silhouettes:
        values = ", ".join(f"{k}: {value:.2f}" for k, value in clusters.silhouettes.items())
        lines.append(f"silhouettes by the K of k-means, small groups merged: {values}")
        if len(sizes) == 1:
            lines.append(
                f"none reaches {REASONABLE:g}, so that all images are one group; --cluster K makes more of them"
            )
    elif wanted.isdecimal() and len(sizes) < int(wanted):
        lines.append(f"groups of fewer than {LEAST} images were merged into the nearest")
    lines.append(f"list: {printable(output)}")
    lines += [f"sheet: {printable(sheet)}" for sheet in sheets]
    lines.append(
        f"next: look at the sheets, and give the groups names: in the column class of {printable(output)}, by a "
        f"spreadsheet or as in {quoted(['sed', '-i', 's/,group-1,/,NAME,/', output])}"
    )
    lines.append(f"then: {quoted(['hgad-fast', 'train', output])}")
    say("\n".join(lines), sys.stdout)


def _suspects(
    roots: Sequence[Path], count: int, output: Path | None, with_sheet: bool, as_json: bool, options: dict[str, Any]
) -> None:
    """Rank the training images, list the first ones, and write all of them and a sheet where they are asked for."""
    from ..curation.suspects import suspects
    from ..scoring.result import finite

    ranking = suspects(roots if len(roots) > 1 else roots[0], **options)
    rows = ranking.rows[:count]
    written = []
    if output is not None:
        written.append(f"list: {printable(ranking.write_csv(output))}")
        if with_sheet:
            written.append(f"sheet: {printable(ranking.write_sheet(sheet_of_suspects(output), count))}")
    if as_json:
        columns = [
            {"rank": row.rank, "path": printable(row.path), "class": row.class_name, "score": finite(row.score)}
            for row in rows
        ]
        print(json.dumps(columns, indent=2))
        return
    width = max(len("class"), *(len(row.class_name) for row in rows))
    lines = [f"{'rank':>4}  {'score':>6}  {'class':<{width}}  image"]
    lines += [f"{row.rank:>4}  {row.score:>6.2f}  {row.class_name:<{width}}  {printable(row.path)}" for row in rows]
    lines.append(
        f"{len(rows)} of {len(ranking.rows)} training images; the score says how many standard deviations an image is "
        "less usual than the middle one of its class"
    )
    say("\n".join([*lines, *written]), sys.stdout)
