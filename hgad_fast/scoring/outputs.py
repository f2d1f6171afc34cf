"""The files that a run of `pipeline.score_files` writes: their names, the tables, the journal, and whose folder it is.

In the output folder ``scores.jsonl``, the journal, has a line of settings, with the names from which those of overlays
and maps follow, and one for each image about which all files are complete. From it ``scores.csv`` and ``regions.csv``
are made.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..files import printable, replacing
from .rates import enumerated, percent
from .regions import Region

MAP_FORMATS = {"npy": ".npy", "tiff16": ".tif", "tiff32": ".tif"}
VERDICT = ("file", "class", "score", "threshold", "p_value", "anomalous")
FIGURES = (*VERDICT, "target_false_alarm_rate", "false_alarm_rate")
COLUMNS = (*FIGURES, "error")
JOURNAL, SCORES, REGIONS = "scores.jsonl", "scores.csv", "regions.csv"
OVERLAYS, MAPS = "overlays", "maps"
LONGEST = 240  # bytes of the name of an overlay or map without its ending; file systems take 255 with it


@dataclass(frozen=True)
class Job:
    """The settings of a run: what is done with every file.

    Attributes:
        class_id: id or name of the class of all images; None: inferred for each.
        output: folder for scores.csv, regions.csv, scores.jsonl and overlays/*.png; None: nothing is written.
        maps: format of the anomaly maps, which are written to maps/*: "npy" (float32), "tiff32" (float) or "tiff16",
            whose values become scores when multiplied by the `scale` in the file's description, which is also
            `map_scale` in the row; None: no maps are written.
        resume: take over the results that an earlier run with the same model and settings wrote into `output`, except
            of images that have changed since (in size or time of modification), or are gone.
        throughput: let consecutive images of one size share batches; scores then agree to 1e-5.
        options: further arguments of `score_images`: `img_size`, `max_memory`, `tiles`.
        regions: find the regions above the threshold; without, a row lists none.
        overlays: draw overlays; needs matplotlib.
        overwrite: remove what an earlier run wrote into `output`, and start anew. Without this and `resume`, a folder
            that holds a run is refused.
    """

    class_id: int | str | None = None
    output: Path | None = None
    maps: str | None = None
    resume: bool = False
    throughput: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    regions: bool = True
    overlays: bool = True
    overwrite: bool = False

    def paths(self, name: str) -> dict[str, Path]:
        """Return the files that are written about an image, by kind: "overlay" and "map"."""
        if self.output is None:
            return {}
        paths = {"overlay": self.output / OVERLAYS / f"{name}.png"} if self.overlays else {}
        if self.maps is not None:
            paths["map"] = self.output / MAPS / f"{name}{MAP_FORMATS[self.maps]}"
        return paths


@dataclass(frozen=True)
class Task:
    """One image file to score.

    Attributes:
        file: its path.
        name: name of the files that are written about it.
        state: its size and time of modification; None if they cannot be read.
    """

    file: Path
    name: str
    state: tuple[int, int] | None

    @classmethod
    def of(cls, file: Path, name: str) -> Task:
        """Return the task of a file in its present state."""
        try:
            status = file.stat()
        except (OSError, ValueError):  # of a name that no file can have
            return cls(file, name, None)  # decoding reports what is wrong
        return cls(file, name, (status.st_size, status.st_mtime_ns))


@dataclass(frozen=True)
class Record:
    """The result of a task: a row of figures, or the error because of which there is none.

    Attributes:
        task: the task.
        row: the `FIGURES`, and "regions".
        error: why there are none.
        no_overlay: why the overlay could not be drawn, although there are figures.
    """

    task: Task
    row: dict[str, Any] | None = None
    error: Exception | None = None
    no_overlay: str | None = None


def file_names(files: Sequence[Path]) -> list[str]:
    """Return a name for the files written about each image: its stem, or where stems repeat, its path.

    The path is that below the folder which all images have in common, its parts joined by hyphens; a name that repeats
    all the same, be it in other cases, is numbered. What cannot be shown is escaped (`files.printable`), with ``_`` for
    backslashes, and only the end is kept of a name that is too long for a file.
    """
    stems = Counter(file.stem.casefold() for file in files)
    paths = [Path(os.path.abspath(file)) for file in files]
    shared = len(os.path.commonprefix([path.parent.parts for path in paths])) or 1  # 1: of several drives, no drive
    names: dict[str, str] = {}  # by what file systems take them for
    for path in paths:
        repeats = stems[path.stem.casefold()] > 1
        stem = "-".join(path.with_suffix("").parts[shared:]) if repeats else path.stem
        stem = _last_bytes(printable(stem).replace("\\", "_"), LONGEST)
        name, number = stem, 1
        while name.casefold() in names:
            number += 1
            name = f"{stem}-{number}"
        names[name.casefold()] = name
    return list(names.values())


def _last_bytes(text: str, count: int) -> str:
    """Return as much of the end of a text as `count` bytes of UTF-8 hold."""
    return text.encode()[-count:].decode(errors="ignore")


def write_map(path: Path, scores: np.ndarray, map_format: str | None) -> float | None:
    """Write a map (H, W) float32 in one of `MAP_FORMATS`, and return the scale of "tiff16", None for the others.

    The scale is the score that a value of 1 stands for. Each map has its own, so that 65535 is its largest score; the
    TIFF's description states it too.
    """
    scale = None
    with replacing(path) as temporary:
        if map_format == "npy":
            np.save(temporary, scores)
            return None
        from PIL import Image

        description: dict[str, Any] = {"content": "anomaly map"}
        if map_format == "tiff16":
            scores, scale = in_16_bits(scores)
            description["scale"] = scale
        Image.fromarray(scores).save(temporary, format="TIFF", description=json.dumps(description))
    return scale


def in_16_bits(scores: np.ndarray) -> tuple[np.ndarray, float]:
    """Return a map (H, W) as uint16, and its scale: the score that a value of 1 stands for."""
    scale = float(scores.max()) / 65535 or 1.0
    return np.rint(scores / np.float32(scale)).clip(0, 65535).astype(np.uint16), scale


# ---------------------------------------------------------------------------------------------- tables


def write_tables(output: Path, records: Iterable[Record]) -> None:
    """Write scores.csv, with a line for each record, and regions.csv."""
    records = list(records)
    _write_csv(output / SCORES, COLUMNS, [_table_row(record) for record in records])
    regions = [
        {"file": record.row["file"], "region": number, **region}
        for record in records
        if record.row is not None
        for number, region in enumerate(record.row["regions"], 1)
    ]
    _write_csv(output / REGIONS, ("file", "region", *Region.__dataclass_fields__), regions)


def _table_row(record: Record) -> dict[str, Any]:
    """Return the cells of a record by `COLUMNS`; of an image without figures its name and the error."""
    if record.row is not None:
        return record.row
    return {"file": printable(record.task.file), "error": printable(str(record.error))}


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write these columns of the rows, and leave out the others."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([cell(column, row.get(column)) for column in columns] for row in rows)


def cell(column: str, value: Any) -> Any:
    """Return a value as a table holds it: no text begins like a formula, which spreadsheets would compute.

    The path of such a file begins with ``./`` instead, and is a path to it still; other texts begin with an apostrophe.
    """
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@")):
        return value
    return os.path.join(os.curdir, value) if column == "file" else f"'{value}"


def summary(records: Sequence[Record], job: Job) -> list[str]:
    """Return what a run found and where it lies, for people: counts, the false-alarm rates by class, and paths."""
    rows = [record.row for record in records if record.row is not None]
    verdicts = Counter(row["anomalous"] for row in rows)
    counts = [f"{verdicts[True]} ANOMALOUS", f"{verdicts[False]} normal"]
    counts += [f"{verdicts[None]} without a verdict"] if verdicts[None] else []
    counts += [f"{len(records) - len(rows)} failed"] if len(rows) < len(records) else []
    line = f"{len(records)} image{'s' * (len(records) != 1)}: {', '.join(counts)}"
    if job.output is not None:
        folders = [OVERLAYS] * job.overlays + [MAPS] * (job.maps is not None)
        places = [str(job.output / SCORES), *(f"{job.output / folder}{os.sep}" for folder in folders)]
        line += f"; {', '.join(map(printable, places))}"
    by_class = {row["class"]: (row["target_false_alarm_rate"], row["false_alarm_rate"]) for row in rows}
    return [line, *_rate_lines(by_class)]


def _rate_lines(by_class: Mapping[str, tuple[float, float | None]]) -> list[str]:
    """Return sentences on the target and attained false-alarm rates of classes."""
    lines = []
    for target in dict.fromkeys(target for target, _ in by_class.values()):
        classes: dict[str, list[str]] = {}
        for name, (asked, attained) in sorted(by_class.items()):
            if asked == target and attained is not None:
                classes.setdefault(percent(attained), []).append(name)
        texts = [f"{rate} of {enumerated(names)}" for rate, names in classes.items()]
        if texts:
            lines.append(f"false-alarm rate: {percent(target)} asked for; the thresholds attain {', '.join(texts)}")
    without = sorted(name for name, (_, attained) in by_class.items() if attained is None)
    if without:
        lines.append(f"no threshold, as there are no calibration images: {enumerated(without)}")
    return lines


# ---------------------------------------------------------------------------------------------- journal


class Journal:
    """The journal in the output folder: settings and names, then a line for each finished image.

    Ranks other than 0 write to `scores-rank<n>.jsonl` while they score.
    """

    def __init__(self, output: Path, settings: dict[str, Any], rank: int, names: Sequence[str]) -> None:
        self.output, self.settings, self.rank, self.names = output, settings, rank, list(names)
        self.path = output / (f"scores-rank{rank}.jsonl" if rank else JOURNAL)

    def read(self, tasks: Sequence[Task]) -> dict[Task, Record]:
        """Return the records of those tasks that the journals of all ranks hold, in the order of the tasks.

        Rows of earlier versions may lack the rates.

        Raises:
            ValueError: a journal was written with other settings, or is damaged.
        """
        rows: dict[Any, dict[str, Any]] = {}
        for path in _journals(self.output):
            settings, _, entries = _read(path)
            if settings != self.settings:
                keys = {**self.settings, **settings}
                differing = ", ".join(key for key in keys if settings.get(key) != self.settings.get(key))
                raise ValueError(
                    f"{printable(path)} was written with another {differing}: give what it was written with, another "
                    "--output, or --overwrite, which starts anew"
                )
            rows |= {
                (entry["name"], *entry["state"], _path_of(entry)): entry["row"]
                for entry in entries
                if entry["state"] is not None and set(VERDICT) <= set(entry["row"])
            }
        task_rows = {task: rows.get((task.name, *(task.state or ()), str(task.file))) for task in tasks}
        return {task: Record(task, row) for task, row in task_rows.items() if row}

    def start(self, records: Sequence[Record]) -> None:
        """Begin the journal anew, with these records; rank 0 deletes the journals of the other ranks."""
        with replacing(self.path) as temporary:
            lines = [self.settings | {"names": self.names}, *map(_entry, records)]
            temporary.write_text("".join(map(_line, lines)), encoding="ascii")
        if self.rank == 0:
            for path in _journals(self.output):
                if path != self.path:
                    path.unlink()

    def append(self, record: Record) -> None:
        """Add the line of a record."""
        with open(self.path, "a", encoding="ascii") as file:
            file.write(_line(_entry(record)))


def _journals(output: Path) -> list[Path]:
    """Return the journals of all ranks that lie in a folder."""
    return sorted(path for path in output.glob("scores*.jsonl") if re.fullmatch(r"scores(-rank\d+)?\.jsonl", path.name))


def _entry(record: Record) -> dict[str, Any]:
    """Return a record as the journal holds it; the file's own name may be one that cannot be shown."""
    task = record.task
    return {"name": task.name, "state": task.state, "path": str(task.file), "row": record.row}


def _path_of(entry: Mapping[str, Any]) -> str:
    """Return the path of an entry's image; the earliest journals have it in the row alone."""
    return entry.get("path", entry["row"]["file"])


def _line(entry: dict[str, Any]) -> str:
    """Return an entry, or the settings, as a line of the journal, in ASCII."""
    return json.dumps(entry) + "\n"


def _read(path: Path) -> tuple[dict[str, Any], list[str], list[dict[str, Any]]]:
    """Return settings, names and entries of a journal, without a line that was cut off while it was written."""
    try:
        text = path.read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        settings, *entries = lines
        names = settings.pop("names", [])  # earlier journals have none
        for entry in entries:
            _path_of(entry), entry["state"], entry["row"].keys()
        for name in (*names, *(entry["name"] for entry in entries)):
            if name != os.path.basename(name):  # `clear_output` deletes files of these names
                raise ValueError(f"{name!r} is no name of a file")
        return settings, names, entries
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{printable(path)} is damaged ({error}): delete it, or give another --output") from error


# ---------------------------------------------------------------------------------------------- whose folder


def check_output(output: Path, resume: bool, overwrite: bool) -> None:
    """Raise a ValueError where a folder holds an earlier run, and it is not said what to do with that."""
    if resume and overwrite:
        raise ValueError("--resume keeps what lies in OUTPUT and --overwrite removes it: give one of them")
    if not resume and not overwrite and (found := next(_of_a_run(output), None)) is not None:
        raise ValueError(
            f"{printable(output)} holds the results of an earlier run ({found.name}): --resume keeps what fits and "
            "goes on, --overwrite removes what that run wrote; or give another --output"
        )
    written_by_runs = {folder for journal in _journals(output) for folder, _ in _folders_of(_read(journal)[0])}
    for folder in (output / OVERLAYS, output / MAPS):
        if folder.is_symlink():
            raise ValueError(f"{printable(folder)} is a link; a run writes into a folder of its own: remove the link")
        if folder.name not in written_by_runs and folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"{printable(folder)} holds files that no run wrote: move them, or give another --output")


def not_written(files: Sequence[Path], output: Path) -> tuple[list[Path], int]:
    """Return the files that are no overlays or maps of `output`, and the number of those that are."""
    own = {os.path.realpath(output / folder) for folder in (OVERLAYS, MAPS)}
    others = [file for file in files if os.path.dirname(os.path.realpath(file)) not in own]
    return others, len(files) - len(others)


def _of_a_run(output: Path) -> Iterator[Path]:
    """Yield what shows that a folder holds a run."""
    yield from (path for path in (output / SCORES, output / REGIONS, *_journals(output)) if path.exists())
    yield from (folder for folder in (output / OVERLAYS, output / MAPS) if folder.is_dir() and any(folder.iterdir()))


def clear_output(output: Path, keep: Sequence[str] | None = None) -> None:
    """Remove from a folder what earlier runs wrote there: overlays and maps but for those of the names to keep.

    Without names to keep the tables and journals go as well. Nothing else is touched.

    Raises:
        ValueError: a journal, which says what was written, is damaged.
    """
    journals = _journals(output)
    for journal in journals:
        settings, planned, entries = _read(journal)
        written = {*planned, *(entry["name"] for entry in entries)}
        starts = {f".{name[:20]}-" for name in written}  # of what a killed run left half-written: see `files.replacing`
        for folder, ending in ((output / name, ending) for name, ending in _folders_of(settings)):
            if folder.is_symlink() or not folder.is_dir():
                continue
            for name in written - set(keep or ()):
                (folder / f"{name}{ending}").unlink(missing_ok=True)
            for path in list(folder.glob(".*")):
                if path.suffix == ending and path.name[: path.name.rfind("-") + 1] in starts:
                    path.unlink(missing_ok=True)
            if keep is None and not any(folder.iterdir()):
                folder.rmdir()
    if keep is None:
        for path in (output / SCORES, output / REGIONS, *journals):
            path.unlink(missing_ok=True)


def _folders_of(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the folders into which a run of these settings writes, and the endings of its files there."""
    maps = MAP_FORMATS.get(settings.get("maps") or "")
    return [(OVERLAYS, ".png"), *([(MAPS, maps)] if maps else [])]


def require_all_given(output: Path, tasks: Sequence[Task]) -> None:
    """Raise a ValueError where a run to be resumed has results of images that are there still, but not given now."""
    given = {os.path.abspath(task.file) for task in tasks}
    finished = [_path_of(entry) for journal in _journals(output) for entry in _read(journal)[2]]
    left_out = [path for path in finished if os.path.abspath(path) not in given and os.path.exists(path)]
    if left_out:
        raise ValueError(
            f"{printable(output)} holds results of {len(left_out)} images that are not given now, such as "
            f"{printable(left_out[0])}: give all images of the run to --resume, another --output, or --overwrite"
        )
