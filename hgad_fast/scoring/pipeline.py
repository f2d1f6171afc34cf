"""Many picture files through one model: decoding, scoring and writing overlap, memory is bounded, a run can go on.

The model works in the caller's thread, picture by picture in the order of the files; other threads decode what comes
next and look for regions, draw and write what was scored (mostly outside Python's global lock).
So every score has the bits that `model.score` gives for the file alone.

In the output folder `scores.jsonl` gains a line when everything that is written about a picture is whole. From it
`scores.csv` and `regions.csv` are made at the end, also at an end by Ctrl-C, and a resumed run takes what is in it.

Under `torchrun` each rank scores its share of the files and keeps a journal of its own; rank 0 merges and reports.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import __version__, images
from .backbone import Backbone
from .files import replacing
from .regions import Region, find_regions
from .score import ScoreResult, check_class_ids, check_normalization, memory_bytes, seeing

if TYPE_CHECKING:
    from .model import HGADModel

MAX_PIXELS_IN_FLIGHT = 2**25
"""Pixels of pictures that are decoded, scored or written at a time, some 16 bytes each; a larger picture goes alone."""

MAX_FILES_IN_FLIGHT = 64
MAP_FORMATS = {"npy": ".npy", "tiff16": ".tif", "tiff32": ".tif"}
COLUMNS = ("file", "class", "score", "threshold", "p_value", "anomalous")


@dataclass(frozen=True)
class Job:
    """What is done with every file.

    Attributes:
        class_id: id or name of the class of all pictures; None: inferred for each.
        output: folder for scores.csv, regions.csv, scores.jsonl and overlays/*.png; None: nothing is written.
        maps: write the anomaly maps too, maps/*: "npy" (float32), "tiff32" (float) or "tiff16", whose values times
            the `scale` in the file's description, and in the row as `map_scale`, are scores; None: none.
        resume: take over what an earlier run with the same model and settings wrote into `output`, unless the picture
            has changed since (its size or time of modification).
        throughput: let neighbouring pictures of one size share batches; scores then agree to 1e-5.
        options: further arguments of `score_images`: `img_size`, `max_memory`, `tiles`.
    """

    class_id: int | str | None = None
    output: Path | None = None
    maps: str | None = None
    resume: bool = False
    throughput: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def paths(self, name: str) -> dict[str, Path]:
        """The files that are written about a picture."""
        if self.output is None:
            return {}
        paths = {"overlay": self.output / "overlays" / f"{name}.png"}
        if self.maps is not None:
            paths["map"] = self.output / "maps" / f"{name}{MAP_FORMATS[self.maps]}"
        return paths


@dataclass(frozen=True)
class Task:
    """A file, the name for what is written about it, and its size and time of modification: None where it has none."""

    file: Path
    name: str
    state: tuple[int, int] | None

    @classmethod
    def of(cls, file: Path, name: str) -> Task:
        try:
            status = file.stat()
        except OSError:
            return cls(file, name, None)  # decoding will say what is wrong
        return cls(file, name, (status.st_size, status.st_mtime_ns))


@dataclass(frozen=True)
class Record:
    """What became of a task: the row of figures, or why there is none."""

    task: Task
    row: dict[str, Any] | None = None
    error: Exception | None = None


def score_files(
    model: HGADModel, files: Sequence[Path], job: Job, report: Callable[[Record], None] = lambda record: None
) -> list[Record]:
    """Score picture files; see `Job` for what is written.

    A row has the keys of `COLUMNS` and `regions`: of each region above the threshold, the worst first, the fields of
    `Region`. A file that cannot be read or scored has an error instead, and the others go on.

    Args:
        model: the detector.
        files: the pictures.
        job: what to do with each.
        report: is given the records one by one, in the order of the files; under `torchrun` on rank 0, at the end.

    Returns:
        the records in the order of the files; under `torchrun` all of them on rank 0, and none on the others.

    Raises:
        ValueError: the model or the class cannot be used, or what is to be resumed was made with other settings.
        OSError: a result cannot be written. As after Ctrl-C, the tables hold what was finished.
    """
    check_normalization(model, "calibrated")
    check_class_ids(model.config, job.class_id, 1)
    tasks = [Task.of(file, name) for file, name in zip(files, file_names(files), strict=True)]
    with Ranks() as ranks:
        journal = None if job.output is None else Journal(job.output, _settings(model, job), ranks.rank)
        kept = _taken_up(journal, tasks, job, ranks) if journal is not None else {}
        done: list[Record] = []
        mine = tasks[ranks.rank :: ranks.size]
        fresh = _scored(model, [task for task in mine if task not in kept], job)
        try:
            with contextlib.closing(fresh):
                for task in mine:
                    record = kept.get(task) or next(fresh)
                    if journal is not None and task not in kept and record.row is not None:
                        journal.append(record)
                    done.append(record)
                    if ranks.size == 1:
                        report(record)
        except BaseException:
            if journal is not None and ranks.rank == 0:
                _write_tables(journal.output, journal.read(tasks).values())
            raise
        if ranks.size > 1:
            done = ranks.gather(done)
            for record in done:
                report(record)
        if journal is not None and ranks.rank == 0:
            journal.start([record for record in done if record.row is not None])
            _write_tables(journal.output, done)
    return done


def _taken_up(journal: Journal, tasks: Sequence[Task], job: Job, ranks: Ranks) -> dict[Task, Record]:
    """What need not be done again; every rank's journal is ready afterwards."""
    kept: dict[Task, Record] = {}
    if job.resume:
        found = journal.read(tasks)
        kept = {task: found[task] for task in found if all(p.is_file() for p in job.paths(task.name).values())}
    ranks.wait()  # until all have read
    if ranks.rank == 0:
        journal.start(list(kept.values()))
    ranks.wait()
    if ranks.rank:
        journal.start([])
    return kept


# ---------------------------------------------------------------------------------------------- in one process


@dataclass
class _Decoding:
    task: Task
    size: tuple[int, int]
    picture: Future[Tensor]


def _size(file: Path) -> tuple[int, int]:
    """(height, width) by the file's header; nothing where decoding will say what is wrong."""
    try:
        return images.read_header(file)[:2]
    except images.ImageError:
        return 0, 0


def _scored(model: HGADModel, tasks: Sequence[Task], job: Job) -> Generator[Record, None, None]:
    """The record of each task in turn, while later ones are on their way."""
    coming = deque(tasks)
    decoding: deque[_Decoding] = deque()
    writing: deque[tuple[int, Future[Record]]] = deque()  # with their pixels
    in_flight = 0
    batch_size = model.config.batch_size if job.throughput else 1
    pool = ThreadPoolExecutor(max(2, min(4, os.cpu_count() or 1)), thread_name_prefix="hgad-fast")
    try:
        while coming or decoding or writing:
            while coming:
                size = _size(coming[0].file)
                pixels = math.prod(size)
                full = in_flight + pixels > MAX_PIXELS_IN_FLIGHT or len(decoding) + len(writing) >= MAX_FILES_IN_FLIGHT
                if full and (decoding or writing):
                    break
                task = coming.popleft()
                decoding.append(_Decoding(task, size, pool.submit(images.read_image, task.file)))
                in_flight += pixels
            if decoding:
                batch = [decoding.popleft()]
                while decoding and len(batch) < batch_size and decoding[0].size == batch[0].size:
                    batch.append(decoding.popleft())
                futures = _score_batch(model, batch, job, pool)
                writing += zip((math.prod(each.size) for each in batch), futures, strict=True)
            while writing and (writing[0][1].done() or not decoding):
                pixels, future = writing.popleft()
                in_flight -= pixels
                yield future.result()
                if coming and not decoding:
                    break  # there may be room again
    finally:
        pool.shutdown(cancel_futures=True)


def _score_batch(
    model: HGADModel, batch: Sequence[_Decoding], job: Job, pool: ThreadPoolExecutor
) -> list[Future[Record]]:
    """Score pictures that share a batch; the pool does the rest."""
    pictures: dict[Task, Tensor] = {}
    errors: dict[Task, Exception] = {}
    for each in batch:
        try:
            pictures[each.task] = each.picture.result()
        except images.ImageError as error:
            errors[each.task] = error
    rows: dict[Task, tuple[dict[str, Any], Tensor]] = {}
    try:
        if pictures:
            result = model.score(list(pictures.values()), job.class_id, throughput=job.throughput, **job.options)
            rows = {task: (_row(model, task, result, i), result.anomaly_map[i]) for i, task in enumerate(pictures)}
    except (ValueError, torch.OutOfMemoryError) as error:  # too long and thin, or too large
        errors |= {task: ValueError(f"{task.file}: {error}") for task in pictures}
    futures: list[Future[Record]] = []
    for each in batch:
        task = each.task
        if task in errors:
            futures.append(Future())
            futures[-1].set_result(Record(task, error=errors[task]))
        else:
            futures.append(pool.submit(_finished, task, pictures[task], *rows[task], job))
    return futures


def _row(model: HGADModel, task: Task, result: ScoreResult, i: int) -> dict[str, Any]:
    p_value = _known(result.p_value[i])
    return {
        "file": str(task.file),
        "class": model.class_names[int(result.class_id[i])],
        "score": float(result.image_score[i]),
        "threshold": _known(result.threshold[i]),
        "p_value": p_value,
        "anomalous": bool(result.is_anomalous[i]) if p_value is not None else None,
    }


def _known(value: Tensor) -> float | None:
    """A number that JSON can write, or None."""
    number = float(value)
    return number if math.isfinite(number) else None


def _finished(task: Task, picture: Tensor, row: dict[str, Any], anomaly_map: Tensor, job: Job) -> Record:
    """Find the regions, and write what is to be written."""
    scores = anomaly_map.numpy()
    threshold = math.nan if row["threshold"] is None else row["threshold"]
    regions = find_regions(scores, threshold)
    row["regions"] = [asdict(region) for region in regions]
    paths = job.paths(task.name)
    if "overlay" in paths:
        from .plot import overlay

        title = f"{row['class']}: {row['file']}"
        overlay(picture, scores, threshold, path=paths["overlay"], title=title, regions=regions)
    if "map" in paths:
        scale = write_map(paths["map"], scores, job.maps)
        if scale is not None:
            row["map_scale"] = scale
    return Record(task, row)


# ---------------------------------------------------------------------------------------------- what is written


def file_names(files: Sequence[Path]) -> list[str]:
    """One name a picture for what is written about it: its stem; where stems repeat, its path below all pictures."""
    stems = Counter(file.stem for file in files)
    paths = [Path(os.path.abspath(file)) for file in files]
    root = os.path.commonpath([path.parent for path in paths])
    names: dict[str, None] = {}
    for path in paths:
        stem = "-".join(path.relative_to(root).with_suffix("").parts) if stems[path.stem] > 1 else path.stem
        name, number = stem, 1
        while name in names:
            number += 1
            name = f"{stem}-{number}"
        names[name] = None
    return list(names)


def write_map(path: Path, scores: np.ndarray, map_format: str | None) -> float | None:
    """Write a map (H, W) float32 in one of `MAP_FORMATS`; of "tiff16" the score that a value of 1 stands for.

    The scale is the picture's own, so that 65535 is its largest score; the TIFF's description states it too.
    """
    scale = None
    with replacing(path) as temporary:
        if map_format == "npy":
            np.save(temporary, scores)
            return None
        from PIL import Image

        about: dict[str, Any] = {"content": "anomaly map"}
        if map_format == "tiff16":
            scale = float(scores.max()) / 65535 or 1.0
            scores = np.rint(scores / np.float32(scale)).clip(0, 65535).astype(np.uint16)
            about["scale"] = scale
        Image.fromarray(scores).save(temporary, format="TIFF", description=json.dumps(about))
    return scale


def _write_tables(output: Path, records: Iterable[Record]) -> None:
    """scores.csv and regions.csv of those records that have a row."""
    rows = [record.row for record in records if record.row is not None]
    _write_csv(output / "scores.csv", COLUMNS, rows)
    regions = [
        {"file": row["file"], "region": number, **region}
        for row in rows
        for number, region in enumerate(row["regions"], 1)
    ]
    _write_csv(output / "regions.csv", ("file", "region", *Region.__dataclass_fields__), regions)


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _settings(model: HGADModel, job: Job) -> dict[str, Any]:
    """What the figures of a run depend on, besides the pictures.

    Not on `max_memory`, unless it may decide what is cut into tiles: what was refused can be tried again with more.
    """
    from .model import state_hash

    calibration = model.calibration
    assert calibration is not None
    class_id = check_class_ids(model.config, job.class_id, 1)
    memory_decides = isinstance(model.encoder, Backbone) and not model.encoder.is_local
    digest = hashlib.sha256((model.config.to_json() + state_hash(model)).encode())
    for tensor in calibration.tensors().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return {
        "hgad_fast": __version__,
        "model": digest.hexdigest(),
        "false_alarm_rate": calibration.false_alarm_rate,
        "class": None if class_id is None else int(class_id),
        "maps": job.maps,
        "img_size": seeing(model, job.options.get("img_size")).config.img_size,
        "tiles": job.options.get("tiles", "auto"),
        "max_memory": memory_bytes(job.options.get("max_memory")) if memory_decides else None,
        "throughput": job.throughput,
    }


class Journal:
    """`scores.jsonl` in the output folder: the settings, then a line for each finished picture.

    Ranks other than 0 have `scores-rank<n>.jsonl` while they are at work.
    """

    def __init__(self, output: Path, settings: dict[str, Any], rank: int) -> None:
        self.output, self.settings, self.rank = output, settings, rank
        self.path = output / (f"scores-rank{rank}.jsonl" if rank else "scores.jsonl")

    def read(self, tasks: Sequence[Task]) -> dict[Task, Record]:
        """What the journals of all ranks know of these tasks, in their order.

        Raises:
            ValueError: a journal was written with other settings, or is none.
        """
        rows: dict[Any, dict[str, Any]] = {}
        for path in sorted(self.output.glob("scores*.jsonl")):
            settings, *entries = _whole_lines(path)
            if settings != self.settings:
                odd = ", ".join(key for key in self.settings if settings.get(key) != self.settings[key])
                raise ValueError(
                    f"{path} was written with another {odd}: give what it was written with, another --output, or start "
                    "anew without --resume"
                )
            rows |= {(entry["name"], *entry["state"]): entry["row"] for entry in entries}
        found = {task: rows.get((task.name, *(task.state or ()))) for task in tasks}
        return {task: Record(task, row) for task, row in found.items() if row and row["file"] == str(task.file)}

    def start(self, records: Sequence[Record]) -> None:
        """Hold these records and no others; on rank 0, those of the other ranks go."""
        with replacing(self.path) as temporary:
            temporary.write_text("".join(map(_line, [self.settings, *map(_entry, records)])))
        if self.rank == 0:
            for path in self.output.glob("scores-rank*.jsonl"):
                path.unlink()

    def append(self, record: Record) -> None:
        with open(self.path, "a") as file:
            file.write(_line(_entry(record)))


def _entry(record: Record) -> dict[str, Any]:
    return {"name": record.task.name, "state": record.task.state, "row": record.row}


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal but one that was cut off while it was written."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): start anew without --resume") from error


# ---------------------------------------------------------------------------------------------- ranks


class Ranks:
    """The processes that `torchrun` started, or this one alone."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    def __enter__(self) -> Ranks:
        if self.size > 1:
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))  # one may have long work
        return self

    def __exit__(self, *_: object) -> None:
        if self.size > 1:
            torch.distributed.destroy_process_group()

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            torch.distributed.barrier()

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all ranks, one of each in turn, as they were shared out; on ranks other than 0 nothing."""
        parts: list[Any] = [None] * self.size
        torch.distributed.gather_object(items, parts if self.rank == 0 else None)
        if self.rank:
            return []
        return [parts[i % self.size][i // self.size] for i in range(sum(map(len, parts)))]
