"""Scoring of many image files: decoding, scoring and writing overlap, memory is bounded, and a run can be resumed.

The model works in the caller's thread, image by image in the order of the files; other threads decode the next images,
and find regions, draw and write for those that have been scored (mostly outside Python's global lock). So every score
has the bits that `model.score` gives for the file alone.

In the output folder `scores.jsonl`, the journal, gains a line when all files about an image are complete. From it
`scores.csv` and `regions.csv` are made at the end, also after Ctrl-C, and a resumed run takes over its lines.

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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.images import ImageError, read_header, read_image
from ..environment import VERSION
from ..features.backbone import Backbone
from ..features.preprocess import memory_bytes, seeing
from ..files import replacing, tensor_hash
from ..protocol import Detector
from .calibration import required_calibration
from .inputs import check_normalization, checked_group_ids
from .plot import overlay
from .regions import Region, find_regions
from .result import ScoreResult
from .score import score_images

MAX_PIXELS_IN_FLIGHT = 2**25
"""Pixels of images that are decoded, scored or written at a time, some 16 bytes each; a larger image goes alone."""

MAX_FILES_IN_FLIGHT = 64
MAP_FORMATS = {"npy": ".npy", "tiff16": ".tif", "tiff32": ".tif"}
COLUMNS = ("file", "class", "score", "threshold", "p_value", "anomalous")


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
            of images that have changed since (in size or time of modification).
        throughput: let consecutive images of one size share batches; scores then agree to 1e-5.
        options: further arguments of `score_images`: `img_size`, `max_memory`, `tiles`.
        regions: find the regions above the threshold; without, a row lists none.
    """

    class_id: int | str | None = None
    output: Path | None = None
    maps: str | None = None
    resume: bool = False
    throughput: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    regions: bool = True

    def paths(self, name: str) -> dict[str, Path]:
        """Return the files that are written about an image, by kind: "overlay" and "map"."""
        if self.output is None:
            return {}
        paths = {"overlay": self.output / "overlays" / f"{name}.png"}
        if self.maps is not None:
            paths["map"] = self.output / "maps" / f"{name}{MAP_FORMATS[self.maps]}"
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
        except OSError:
            return cls(file, name, None)  # decoding reports what is wrong
        return cls(file, name, (status.st_size, status.st_mtime_ns))


@dataclass(frozen=True)
class Record:
    """The result of a task: a row of figures, or the error because of which there is none."""

    task: Task
    row: dict[str, Any] | None = None
    error: Exception | None = None


def score_files(
    model: Detector, files: Sequence[Path], job: Job, report: Callable[[Record], None] = lambda record: None
) -> list[Record]:
    """Score image files and return their records; see `Job` for what is written.

    A row has the keys of `COLUMNS`, and `regions`: the fields of each `Region` above the threshold, the worst first. A
    file that cannot be read or scored has an error instead of a row, and the others are scored all the same.

    Args:
        model: the detector.
        files: the images.
        job: what to do with each.
        report: called with the records one by one, in the order of the files; under `torchrun` on rank 0, at the end.

    Returns:
        the records in the order of the files; under `torchrun` all of them on rank 0, and none on the others.

    Raises:
        ValueError: the model or the class cannot be used, or the run to resume had other settings.
        OSError: a result cannot be written. As after Ctrl-C, the tables hold the images that were finished.
    """
    check_normalization(model, "calibrated")
    checked_group_ids(model, job.class_id, 1)
    tasks = [Task.of(file, name) for file, name in zip(files, file_names(files), strict=True)]
    with Ranks() as ranks:
        journal = None if job.output is None else Journal(job.output, _settings(model, job), ranks.rank)
        finished = _resumed(journal, tasks, job, ranks) if journal is not None else {}
        records: list[Record] = []
        rank_tasks = tasks[ranks.rank :: ranks.size]
        new_records = _scored(model, [task for task in rank_tasks if task not in finished], job)
        try:
            with contextlib.closing(new_records):
                for task in rank_tasks:
                    record = finished.get(task) or next(new_records)
                    if journal is not None and task not in finished and record.row is not None:
                        journal.append(record)
                    records.append(record)
                    if ranks.size == 1:
                        report(record)
        except BaseException:
            if journal is not None and ranks.rank == 0:
                _write_tables(journal.output, journal.read(tasks).values())
            raise
        if ranks.size > 1:
            records = ranks.gather(records)
            for record in records:
                report(record)
        if journal is not None and ranks.rank == 0:
            journal.start([record for record in records if record.row is not None])
            _write_tables(journal.output, records)
    return records


def _resumed(journal: Journal, tasks: Sequence[Task], job: Job, ranks: Ranks) -> dict[Task, Record]:
    """Return the records of the tasks that a resumed run has finished already, and start the journals of all ranks."""
    finished: dict[Task, Record] = {}
    if job.resume:
        finished = {
            task: record
            for task, record in journal.read(tasks).items()
            if all(path.is_file() for path in job.paths(task.name).values())
        }
    ranks.wait()  # until all ranks have read the journals
    if ranks.rank == 0:
        journal.start(list(finished.values()))
    ranks.wait()
    if ranks.rank:
        journal.start([])
    return finished


# ---------------------------------------------------------------------------------------------- in one process


@dataclass
class _Decoding:
    """A task whose image is being decoded, with the size (height, width) that the file's header states."""

    task: Task
    size: tuple[int, int]
    image: Future[Tensor]


def _header_size(file: Path) -> tuple[int, int]:
    """Return the (height, width) that the file's header states; (0, 0) where decoding will report an error."""
    try:
        return read_header(file)[:2]
    except ImageError:
        return 0, 0


def _scored(model: Detector, tasks: Sequence[Task], job: Job) -> Generator[Record, None, None]:
    """Yield the record of each task in turn, while the pool decodes later images and finishes earlier ones."""
    waiting = deque(tasks)
    decoding: deque[_Decoding] = deque()
    writing: deque[tuple[int, Future[Record]]] = deque()  # the pixels of each image, and its record
    pixels_in_flight = 0
    batch_size = model.config.batch_size if job.throughput else 1
    pool = ThreadPoolExecutor(max(2, min(4, os.cpu_count() or 1)), thread_name_prefix="hgad-fast")
    try:
        while waiting or decoding or writing:
            while waiting:
                size = _header_size(waiting[0].file)
                pixels = math.prod(size)
                too_many_pixels = pixels_in_flight + pixels > MAX_PIXELS_IN_FLIGHT
                full = too_many_pixels or len(decoding) + len(writing) >= MAX_FILES_IN_FLIGHT
                if full and (decoding or writing):
                    break
                task = waiting.popleft()
                decoding.append(_Decoding(task, size, pool.submit(read_image, task.file)))
                pixels_in_flight += pixels
            if decoding:
                batch = [decoding.popleft()]
                while decoding and len(batch) < batch_size and decoding[0].size == batch[0].size:
                    batch.append(decoding.popleft())
                futures = _score_batch(model, batch, job, pool)
                writing += zip((math.prod(item.size) for item in batch), futures, strict=True)
            while writing and (writing[0][1].done() or not decoding):
                pixels, future = writing.popleft()
                pixels_in_flight -= pixels
                yield future.result()
                if waiting and not decoding:
                    break  # there may be room for a waiting image again
    finally:
        pool.shutdown(cancel_futures=True)


def _score_batch(
    model: Detector, batch: Sequence[_Decoding], job: Job, pool: ThreadPoolExecutor
) -> list[Future[Record]]:
    """Score images that share a batch, and return the futures of their records, which the pool completes."""
    images: dict[Task, Tensor] = {}
    errors: dict[Task, Exception] = {}
    for decoding in batch:
        try:
            images[decoding.task] = decoding.image.result()
        except ImageError as error:
            errors[decoding.task] = error
    rows: dict[Task, tuple[dict[str, Any], Tensor]] = {}
    try:
        if images:
            result = score_images(model, list(images.values()), job.class_id, throughput=job.throughput, **job.options)
            rows = {task: (_row(model, task, result, i), result.anomaly_map[i]) for i, task in enumerate(images)}
    except (ValueError, torch.OutOfMemoryError) as error:  # too long and thin, or too large
        errors |= {task: ValueError(f"{task.file}: {error}") for task in images}
    futures: list[Future[Record]] = []
    for decoding in batch:
        task = decoding.task
        if task in errors:
            futures.append(Future())
            futures[-1].set_result(Record(task, error=errors[task]))
        else:
            futures.append(pool.submit(_finished, task, images[task], *rows[task], job))
    return futures


def _row(model: Detector, task: Task, result: ScoreResult, i: int) -> dict[str, Any]:
    """Return the figures of image i of a result, without its regions."""
    p_value = _finite(result.p_value[i])
    return {
        "file": str(task.file),
        "class": model.groups[int(result.class_id[i])],
        "score": float(result.image_score[i]),
        "threshold": _finite(result.threshold[i]),
        "p_value": p_value,
        "anomalous": bool(result.is_anomalous[i]) if p_value is not None else None,
    }


def _finite(value: Tensor) -> float | None:
    """Return a number that JSON can hold; None for a NaN or an infinity."""
    number = float(value)
    return number if math.isfinite(number) else None


def _finished(task: Task, image: Tensor, row: dict[str, Any], anomaly_map: Tensor, job: Job) -> Record:
    """Find the regions of a scored image, write its overlay and map as the job says, and return its record."""
    scores = anomaly_map.numpy()
    threshold = math.nan if row["threshold"] is None else row["threshold"]
    regions = find_regions(scores, threshold) if job.regions else []
    row["regions"] = [asdict(region) for region in regions]
    paths = job.paths(task.name)
    if "overlay" in paths:
        title = f"{row['class']}: {row['file']}"
        overlay(image, scores, threshold, path=paths["overlay"], title=title, regions=regions)
    if "map" in paths:
        scale = write_map(paths["map"], scores, job.maps)
        if scale is not None:
            row["map_scale"] = scale
    return Record(task, row)


# ---------------------------------------------------------------------------------------------- output files


def file_names(files: Sequence[Path]) -> list[str]:
    """Return a name for the files written about each image: its stem, or where stems repeat, its path.

    The path is that below the folder which all images have in common, its parts joined by hyphens; a name that repeats
    all the same is numbered.
    """
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
            scale = float(scores.max()) / 65535 or 1.0
            scores = np.rint(scores / np.float32(scale)).clip(0, 65535).astype(np.uint16)
            description["scale"] = scale
        Image.fromarray(scores).save(temporary, format="TIFF", description=json.dumps(description))
    return scale


def _write_tables(output: Path, records: Iterable[Record]) -> None:
    """Write scores.csv and regions.csv of the records that have a row."""
    rows = [record.row for record in records if record.row is not None]
    _write_csv(output / "scores.csv", COLUMNS, rows)
    regions = [
        {"file": row["file"], "region": number, **region}
        for row in rows
        for number, region in enumerate(row["regions"], 1)
    ]
    _write_csv(output / "regions.csv", ("file", "region", *Region.__dataclass_fields__), regions)


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write these columns of the rows, and leave out the others."""
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _settings(model: Detector, job: Job) -> dict[str, Any]:
    """Return everything besides the images that the figures of a run depend on.

    `max_memory` is one of these only where it may decide which images are cut into tiles; otherwise a resumed run may
    allow more, for images that were refused.
    """
    calibration = required_calibration(model)
    class_id = checked_group_ids(model, job.class_id, 1)
    memory_decides = isinstance(model.encoder, Backbone) and not model.encoder.is_local
    digest = hashlib.sha256((model.config.to_json() + tensor_hash(model.state_dict())).encode())
    for tensor in calibration.tensors().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return {
        "hgad_fast": VERSION,
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
    """The file `scores.jsonl` in the output folder: the settings, then a line for each finished image.

    Ranks other than 0 write to `scores-rank<n>.jsonl` while they score.
    """

    def __init__(self, output: Path, settings: dict[str, Any], rank: int) -> None:
        self.output, self.settings, self.rank = output, settings, rank
        self.path = output / (f"scores-rank{rank}.jsonl" if rank else "scores.jsonl")

    def read(self, tasks: Sequence[Task]) -> dict[Task, Record]:
        """Return the records of those tasks that the journals of all ranks hold, in the order of the tasks.

        Raises:
            ValueError: a journal was written with other settings, or is damaged.
        """
        rows: dict[Any, dict[str, Any]] = {}
        for path in sorted(self.output.glob("scores*.jsonl")):
            settings, *entries = _whole_lines(path)
            if settings != self.settings:
                differing = ", ".join(key for key in self.settings if settings.get(key) != self.settings[key])
                raise ValueError(
                    f"{path} was written with another {differing}: give what it was written with, another --output, or "
                    "start anew without --resume"
                )
            rows |= {(entry["name"], *entry["state"]): entry["row"] for entry in entries}
        task_rows = {task: rows.get((task.name, *(task.state or ()))) for task in tasks}
        return {task: Record(task, row) for task, row in task_rows.items() if row and row["file"] == str(task.file)}

    def start(self, records: Sequence[Record]) -> None:
        """Begin the journal anew, with these records; rank 0 deletes the journals of the other ranks."""
        with replacing(self.path) as temporary:
            temporary.write_text("".join(map(_line, [self.settings, *map(_entry, records)])))
        if self.rank == 0:
            for path in self.output.glob("scores-rank*.jsonl"):
                path.unlink()

    def append(self, record: Record) -> None:
        """Add the line of a record."""
        with open(self.path, "a") as file:
            file.write(_line(_entry(record)))


def _entry(record: Record) -> dict[str, Any]:
    """Return a record as the journal holds it."""
    return {"name": record.task.name, "state": record.task.state, "row": record.row}


def _line(entry: dict[str, Any]) -> str:
    """Return an entry, or the settings, as a line of the journal."""
    return json.dumps(entry) + "\n"


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a journal, without one that was cut off while it was written."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): start anew without --resume") from error


# ---------------------------------------------------------------------------------------------- ranks


class Ranks:
    """The processes that `torchrun` started, or this process alone."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    def __enter__(self) -> Ranks:
        if self.size > 1:
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))  # a rank may work long
        return self

    def __exit__(self, *_: object) -> None:
        if self.size > 1:
            torch.distributed.destroy_process_group()

    def wait(self) -> None:
        """Wait until all ranks have called this."""
        if self.size > 1:
            torch.distributed.barrier()

    def gather(self, items: list[Any]) -> list[Any]:
        """Return the items of all ranks in the order in which they were shared out; on ranks other than 0 nothing."""
        parts: list[Any] = [None] * self.size
        torch.distributed.gather_object(items, parts if self.rank == 0 else None)
        if self.rank:
            return []
        return [parts[i % self.size][i // self.size] for i in range(sum(map(len, parts)))]
