"""Scoring of many image files: decoding, scoring and writing overlap, memory is bounded, and a run can be resumed.

The model works in the caller's thread, image by image in the order of the files; other threads decode the next images,
and find regions, draw and write for those that have been scored (mostly outside Python's global lock). So every score
has the bits that `model.score` gives for the file alone.

In the output folder the journal gains a line when all files about an image are complete. From it the tables are made at
the end, also after Ctrl-C, and a resumed run takes over its lines (`outputs`).

Under `torchrun` each rank scores its share of the files and keeps a journal of its own; rank 0 merges and reports.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import math
import os
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.images import ImageError, read_header, read_image
from ..environment import VERSION, plain_torch
from ..features.backbone import Backbone
from ..features.preprocess import memory_bytes, seeing
from ..files import printable, tensor_hash
from ..protocol import Detector
from .calibration import required_calibration
from .inputs import check_normalization, checked_group_ids
from .outputs import (
    Job,
    Journal,
    Record,
    Task,
    check_output,
    clear_output,
    file_names,
    require_all_given,
    write_map,
    write_tables,
)
from .plot import overlay
from .regions import find_regions
from .result import ScoreResult, finite
from .score import score_images

MAX_PIXELS_IN_FLIGHT = 2**25
"""Pixels of images that are decoded, scored or written at a time, some 16 bytes each; a larger image goes alone."""

MAX_FILES_IN_FLIGHT = 64


@plain_torch()
def score_files(
    model: Detector, files: Sequence[Path], job: Job, report: Callable[[Record], None] = lambda record: None
) -> list[Record]:
    """Score image files and return their records; see `Job` for what is written.

    A row has the keys of `outputs.FIGURES`, and `regions`: the fields of each `Region` above the threshold, the worst
    first. A file that cannot be read or scored has an error instead of a row, and the others are scored all the same.

    Args:
        model: the detector.
        files: the images.
        job: what to do with each.
        report: called with the records one by one, in the order of the files; under `torchrun` on rank 0, at the end.

    Returns:
        the records in the order of the files; under `torchrun` all of them on rank 0, and none on the others.

    Raises:
        ValueError: the model or the class cannot be used, the folder holds a run and `job` says neither to resume nor
            to overwrite it, or the run to resume had other settings or other images.
        OSError: a result cannot be written. As after Ctrl-C, the tables hold the images that were finished.
    """
    check_normalization(model, "calibrated")
    checked_group_ids(model, job.class_id, 1)
    tasks = [Task.of(file, name) for file, name in zip(files, file_names(files), strict=True)]
    with Ranks() as ranks:
        journal = (
            None
            if job.output is None
            else Journal(job.output, _settings(model, job), ranks.rank, [task.name for task in tasks])
        )
        finished = _resumed(model, journal, tasks, job, ranks) if journal is not None else {}
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
                write_tables(journal.output, journal.read(tasks).values())
            raise
        if ranks.size > 1:
            records = ranks.gather(records)
            for record in records:
                report(record)
        if journal is not None and ranks.rank == 0:
            journal.start([record for record in records if record.row is not None])
            write_tables(journal.output, records)
    return records


def _resumed(model: Detector, journal: Journal, tasks: Sequence[Task], job: Job, ranks: Ranks) -> dict[Task, Record]:
    """Return the records of the tasks that a resumed run has finished already, and start the journals of all ranks."""
    finished: dict[Task, Record] = {}
    if ranks.rank == 0:
        check_output(journal.output, job.resume, job.overwrite)
        if job.overwrite:
            clear_output(journal.output)
        require_all_given(journal.output, tasks)
    ranks.wait()
    if job.resume:
        groups = {printable(name): k for k, name in enumerate(model.groups)}
        finished = {
            task: replace(record, row=record.row | _rates(model, groups[record.row["class"]]))
            for task, record in journal.read(tasks).items()
            if record.row is not None and all(path.is_file() for path in job.paths(task.name).values())
        }
    ranks.wait()  # until all ranks have read the journals
    if ranks.rank == 0:
        clear_output(journal.output, keep=[task.name for task in finished])
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
                decoding.append(_Decoding(task, size, pool.submit(read_image, task.file, model.config.white_level)))
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
        except Exception as error:  # whatever it is, it costs this image only
            reason = f"{type(error).__name__}: {error}"
            errors[decoding.task] = ValueError(f"{printable(decoding.task.file)}: it cannot be read: {reason}")
    rows: dict[Task, tuple[dict[str, Any], Tensor]] = {}
    waiting = [list(images)] if images else []
    while waiting:
        tasks = waiting.pop()
        try:
            result = score_images(
                model, [images[task] for task in tasks], job.class_id, throughput=job.throughput, **job.options
            )
            rows |= {task: (_row(model, task, result, i), result.anomaly_map[i]) for i, task in enumerate(tasks)}
        except (ValueError, torch.OutOfMemoryError) as error:  # too long and thin, too large, or no number
            if len(tasks) > 1:
                waiting += [[task] for task in tasks]  # the others are scored all the same
            else:
                errors[tasks[0]] = ValueError(f"{printable(tasks[0].file)}: {error}")
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
    p_value, group = finite(result.p_value[i]), int(result.class_id[i])
    return {
        "file": printable(task.file),
        "class": printable(model.groups[group]),
        "score": float(result.image_score[i]),
        "threshold": finite(result.threshold[i]),
        "p_value": p_value,
        "anomalous": bool(result.is_anomalous[i]) if p_value is not None else None,
        **_rates(model, group),
    }


def _rates(model: Detector, group: int) -> dict[str, float | None]:
    """Return the false-alarm rate that was asked for, and the one that the threshold of a group attains."""
    calibration = required_calibration(model)
    return {
        "target_false_alarm_rate": calibration.false_alarm_rate,
        "false_alarm_rate": finite(calibration.attained_rate(group)),
    }


def _finished(task: Task, image: Tensor, row: dict[str, Any], anomaly_map: Tensor, job: Job) -> Record:
    """Find the regions of a scored image, write its overlay and map as the job says, and return its record.

    An overlay that cannot be drawn, for whatever reason, costs nothing but itself.
    """
    scores = anomaly_map.numpy()
    threshold = math.nan if row["threshold"] is None else row["threshold"]
    regions = find_regions(scores, threshold) if job.regions else []
    row["regions"] = [asdict(region) for region in regions]
    paths = job.paths(task.name)
    no_overlay = None
    if "overlay" in paths:
        words = {"title": caption(row), "note": row["file"]}
        try:
            overlay(image, scores, threshold, path=paths["overlay"], regions=regions, **words)
        except Exception as error:
            no_overlay = printable(f"{type(error).__name__}: {error}")
    if "map" in paths:
        scale = write_map(paths["map"], scores, job.maps)
        if scale is not None:
            row["map_scale"] = scale
    return Record(task, row, no_overlay=no_overlay)


def caption(row: Mapping[str, Any]) -> str:
    """Return what an overlay says of its image: verdict, class, score, threshold and p-value."""
    verdict = {True: "ANOMALOUS", False: "normal", None: "no verdict"}[row["anomalous"]]
    threshold = "no threshold" if row["threshold"] is None else f"threshold {row['threshold']:.4g}"
    p_value = "" if row["p_value"] is None else f", p-value {row['p_value']:.3g}"
    return f"{verdict}: score {row['score']:.4g}, {threshold}{p_value}, class {row['class']}"


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
            gc.collect()  # threads of what still refers to it would be there as Python ends, which may abort it

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
