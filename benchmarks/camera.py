"""A minute of video through examples/camera.py: `python -m benchmarks.camera ROOT`, some minutes on a CPU.

ROOT is a dataset, of which the test images of one class make the video: 640 x 480 pixels, 25 frames a second, each
image for 15 frames, moved by a pixel from one to the next; one image of ten is defective. The number of a frame stands
in its first rows, as squares of black and white. The preset "gaussian" is fitted to the class's training images in such
frames. Then the program runs in a process of its own, which looks at what comes out: which number is in the image of
which outcome, and how much memory the process has. It scores every frame; with --drop, played at its own pace, those
that it has time for.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import torch

from hgad_fast import GaussianConfig, GaussianModel
from hgad_fast.bench import measure
from hgad_fast.data.datasets import discover
from hgad_fast.data.images import read_image
from hgad_fast.files import replacing

PROGRAM = Path(__file__).parents[1] / "examples" / "camera.py"
WIDTH, HEIGHT, RATE = 640, 480, 25
SQUARE, BITS = 16, 12  # pixels of a square that is a bit of the frame's number
FRAMES_EACH = 15  # that show an image
WARM_UP = 100  # frames before the memory is looked at
EVERY = 25  # frames between two looks at the memory


def main() -> None:
    if sys.argv[1:2] == ["--watch"]:  # the process that is measured
        watch(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="ROOT", help="a dataset in the MVTec AD layout")
    parser.add_argument("--class", dest="class_name", default="bottle", help="whose images are shown (default: bottle)")
    parser.add_argument("--seconds", type=int, default=60, help="of the video (default: 60)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--output", type=Path, help="write the figures as JSON here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    record: dict[str, Any] = measure.about_run(torch.device("cpu"))
    record |= {"opencv": cv2.__version__, "dataset": options.root.name, "class": options.class_name}
    count = options.seconds * RATE
    record |= {"size": [HEIGHT, WIDTH], "frames_per_second": RATE, "frames_in": count}
    with tempfile.TemporaryDirectory() as folder:
        model, video = Path(folder, "model.safetensors"), Path(folder, "video.avi")
        fitted(options.root, options.class_name).save(model)
        write_video(video, options.root, options.class_name, count)
        for name, more in (("every frame", []), ("at its own pace", ["--drop"])):
            record[name] = run(model, video, Path(folder, name), options.threads, more)
            print(name, json.dumps(record[name], indent=2), flush=True)
    record["load_average"] = os.getloadavg()  # of all processes on the machine: times grow with it
    if options.output is not None:
        with replacing(options.output) as file:
            file.write_text(json.dumps(record, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------- the video


def frame_of(image: np.ndarray, number: int) -> np.ndarray:
    """Return a frame (H, W, 3) uint8 that shows an image (h, w, 3), moved by its number, with the number above it."""
    side = HEIGHT
    resized = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
    margin = (WIDTH - side) // 2
    frame = cv2.copyMakeBorder(resized, 0, 0, margin, WIDTH - side - margin, cv2.BORDER_REPLICATE)
    frame = np.roll(frame, number % 5 - 2, axis=1)
    for bit in range(BITS):
        frame[:SQUARE, bit * SQUARE : (bit + 1) * SQUARE] = 255 * (number >> bit & 1)
    return frame


def number_in(frame: np.ndarray) -> int:
    """Return the number that stands in a frame."""
    squares = frame[:SQUARE, : BITS * SQUARE].reshape(SQUARE, BITS, SQUARE, 3).mean((0, 2, 3))
    return sum(1 << bit for bit in range(BITS) if squares[bit] > 127)


def images_of(samples: Sequence[Any]) -> Iterator[np.ndarray]:
    """Yield images (h, w, 3) uint8, red first."""
    for sample in samples:
        yield (255 * read_image(sample.path)).round().byte().permute(1, 2, 0).numpy()


def fitted(root: Path, class_name: str) -> GaussianModel:
    """Return a place Gaussian fitted to the class's training images, as frames of random numbers show them."""
    dataset = discover(root)
    numbers = np.random.default_rng(0).integers(0, 1 << BITS, len(dataset.train))
    with tempfile.TemporaryDirectory() as folder:
        normal = Path(folder, class_name)
        normal.mkdir()
        samples = [sample for sample in dataset.train if dataset.class_names[sample.class_id] == class_name]
        for i, image in enumerate(images_of(samples)):
            cv2.imwrite(str(normal / f"{i:04}.png"), frame_of(image, int(numbers[i]))[..., ::-1])
        config = GaussianConfig.preset(
            "gaussian", n_classes=1, class_names=(class_name,), backbone_weights="packaged", dim=128, coarse_dim=64
        )
        model = GaussianModel(config)
        model.fit(folder, false_alarm_rate=0.05)
    return model


def write_video(path: Path, root: Path, class_name: str, count: int) -> None:
    """Write a video of the class's test images."""
    dataset = discover(root)
    samples = [sample for sample in dataset.test if dataset.class_names[sample.class_id] == class_name]
    normal, defective = (list(images_of([s for s in samples if s.is_anomalous == kind])) for kind in (False, True))
    shown = [(defective if i % 10 == 9 else normal) for i in range(-(-count // FRAMES_EACH))]
    images = [kind[i % len(kind)] for i, kind in enumerate(shown)]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), RATE, (WIDTH, HEIGHT))
    for number in range(count):
        writer.write(frame_of(images[number // FRAMES_EACH], number)[..., ::-1])
    writer.release()


# ---------------------------------------------------------------------------------------------- the run


def run(model: Path, video: Path, output: Path, threads: int, more: Sequence[str]) -> dict[str, Any]:
    """Return the figures of a run of the program with further options."""
    seen = output.with_suffix(".json")
    command = [sys.executable, "-m", "benchmarks.camera", "--watch", str(seen), str(threads)]
    command += [str(model), str(video), "--output", str(output), *more]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    figures = json.loads(seen.read_text())
    with open(output / "frames.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    numbers = [int(row["frame"]) for row in rows]
    for column in ("latency_ms", "scoring_ms"):
        values = [float(row[column]) for row in rows]
        p50, p95, longest = np.quantile(values, [0.5, 0.95, 1.0])
        figures[column] = {"p50": round(p50, 2), "p95": round(p95, 2), "longest": round(longest, 2)}
    memory = figures.pop("resident_bytes")
    return {
        "frames_scored": len(rows),
        "frames_dropped": numbers[-1] + 1 - len(rows),
        "alarms": sum(row["anomalous"] == "True" for row in rows),
        "without_score": sum(row["error"] != "" for row in rows),
        "overlays": len(list((output / "overlays").glob("*.png"))),
        "order_kept": figures.pop("numbers") == numbers == sorted(set(numbers)),
        "resident_megabytes": {
            "after_warm_up": round(memory[0] / 1e6, 1),
            "peak": round(max(memory) / 1e6, 1),
            "at_the_end": round(memory[-1] / 1e6, 1),
        },
        **figures,
    }


def watch(path: Path, threads: int, arguments: Sequence[str]) -> None:
    """Run the program, and write what its outcomes show to a file: numbers in the images, and the memory over time."""
    torch.set_num_threads(threads)
    spec = importlib.util.spec_from_file_location("camera", PROGRAM)
    assert spec is not None and spec.loader is not None
    sys.modules["camera"] = program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    process = psutil.Process()
    numbers: list[int] = []
    memory: list[int] = []
    ends: list[float] = []

    def look(outcome: Any) -> None:
        numbers.append(number_in(outcome.frame.pixels))
        ends.append(outcome.frame.grabbed + outcome.latency)
        if len(numbers) >= WARM_UP and len(numbers) % EVERY == 0:
            memory.append(process.memory_info().rss)

    code = program.main(arguments, [look])
    assert code == 0, code
    memory.append(process.memory_info().rss)
    seconds = ends[-1] - ends[0]
    path.write_text(json.dumps({"numbers": numbers, "resident_bytes": memory, "seconds": round(seconds, 1)}))


if __name__ == "__main__":
    main()
