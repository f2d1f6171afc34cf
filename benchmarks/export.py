"""Exported files beside their models: `python -m benchmarks.export MODEL [MODEL ...] --images FOLDER --output JSON`.

FOLDER is a dataset, of which the test images are taken, or any folder of images; of more than `--count` images those
at even distances. Each model is exported as ONNX and as a program of torch.export, with weights in float32 and in
float16, once for each size at which it sees the images. Everything runs in one thread.

- bytes: of the file for the most frequent size. `over parameters` compares it with all numbers of the model's state
  (parameters and buffers, integers too, of the backbone and of the detector) and of its calibration, at 4 bytes each,
  or 2 in fp16.
- against the model: `model.score` of each image alone, in float32. As in `hgad_fast.export.check`, scores differ by a
  part of the score or of the threshold, whichever is larger, and maps by a part of their largest value; the largest
  difference of all images is given, and how many classes (or prototypes) and verdicts differ.
- against single images: what the file gives for batches of 7 and of 64 images against what it gives for one.
- milliseconds: processor time of an image of the size that goes in, medians over rounds in which contenders take
  turns. A `Scorer` gets 8-bit frames, and computes the map when asked for it; the files get floating-point images, and
  always give maps.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import hgad_fast
from benchmarks import verdict
from hgad_fast.bench import measure
from hgad_fast.data.datasets import DatasetError, discover
from hgad_fast.data.images import read_image
from hgad_fast.data.listing import images_to_score
from hgad_fast.environment import package_versions
from hgad_fast.export.check import reference_model
from hgad_fast.export.graph import OUTPUTS
from hgad_fast.features.preprocess import preprocess, seeing
from hgad_fast.files import replacing
from hgad_fast.protocol import Detector
from hgad_fast.scoring.calibration import required_calibration
from hgad_fast.scoring.result import ScoreResult
from hgad_fast.scoring.score import score_images
from hgad_fast.scoring.scorer import Scorer

FILES = (("onnx", "fp32"), ("onnx", "fp16"), ("torch", "fp32"), ("torch", "fp16"))
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
BATCHES = (7, 64)
Run = Callable[[Tensor], dict[str, np.ndarray]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="a model file, calibrated")
    parser.add_argument("--images", type=Path, required=True, help="a dataset, or a folder of images")
    parser.add_argument("--count", type=int, default=200, help="images to compare on (default: 200)")
    parser.add_argument("--rounds", type=int, default=30, help="timed images of each contender (default: 30)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = measure.about_run(torch.device("cpu"))
    record["versions"] |= package_versions("timm", *verdict.ONNX)
    record["rounds"] = arguments.rounds
    paths = chosen(arguments.images, arguments.count)
    record["models"] = []
    for path in arguments.models:
        record["models"].append({"model": path.parent.name, **of_model(path, paths, arguments.rounds)})
        print(json.dumps(record["models"][-1], indent=2), flush=True)
        if arguments.output is not None:
            with replacing(arguments.output) as file:
                file.write_text(json.dumps(record, indent=2) + "\n")


def chosen(folder: Path, count: int) -> list[Path]:
    """Return the test images of a dataset, or the images of a folder; of more than `count` those at even distances."""
    try:
        paths = [sample.path for sample in discover(folder).test]
    except DatasetError:
        paths = []
    paths = paths or images_to_score([folder])[0]
    return [paths[i * len(paths) // count] for i in range(count)] if len(paths) > count else paths


def of_model(path: Path, paths: Sequence[Path], rounds: int) -> dict[str, Any]:
    """Return sizes, differences and times of all files of a model."""
    model: Any = hgad_fast.load(path)
    model = reference_model(model)
    by_size = seen_images(model, paths)
    frequent = max(by_size, key=lambda size: len(by_size[size]))
    numbers = [*model.state_dict().values(), *required_calibration(model).tensors().values()]
    count = sum(x.numel() for x in numbers)
    figures: dict[str, Any] = {
        "method": model.config.method,
        "fusion": model.fusion,
        "groups": len(model.groups),
        "images": {f"{h} x {w}": len(images) for (h, w), images in by_size.items()},
        "parameters": {"count": count, "bytes at 4 each": 4 * count},
        "files": {},
    }
    timed: dict[str, Run] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, precision in FILES:
            differences = []
            for size, images in by_size.items():
                file = Path(folder, f"model{SUFFIXES[kind]}")
                model.export(file, size=size, precision=precision, check=False)
                run = runner(file)
                differences.append(compared(run, images, expected_of(model, images)))
                if size == frequent:
                    of_file = {"bytes": file.stat().st_size}
                    timed[f"{kind} {precision}"] = run
            of_file["over parameters"] = of_file["bytes"] / (count * {"fp32": 4, "fp16": 2}[precision])
            figures["files"][f"{kind} {precision}"] = of_file | {
                name: merged([each[name] for each in differences]) for name in differences[0]
            }
        figures["milliseconds"] = times = timed_on(model, timed, by_size[frequent][0], rounds)
    of = {name: times[name]["median"] for name in times}
    figures["over Scorer"] = {name: of[name] / of["Scorer"] for name in timed}
    figures["over Scorer with the map"] = {name: of[name] / of["Scorer, map"] for name in timed}
    return figures


def seen_images(model: Detector, paths: Sequence[Path]) -> dict[tuple[int, int], Tensor]:
    """Return the images (n, 3, H, W) as the model sees them, by their H and W."""
    config = seeing(model, required_calibration(model).img_size).config
    by_size: dict[tuple[int, int], list[Tensor]] = {}
    for path in paths:
        image = preprocess(read_image(path, config.white_level), config)
        by_size.setdefault((image.shape[1], image.shape[2]), []).append(image)
    return {size: torch.stack(images) for size, images in by_size.items()}


def expected_of(model: Detector, images: Tensor) -> ScoreResult:
    """Return what the model gives for images, each alone."""
    size = (images.shape[2], images.shape[3])
    return score_images(model, images, map_size=size, img_size=required_calibration(model).img_size)


def runner(path: Path) -> Run:
    """Return a function that runs a file in one thread: images -> outputs by name."""
    if path.suffix == ".onnx":
        session = verdict.onnx_session(path)
        return lambda images: dict(zip(OUTPUTS, session.run(None, {"image": images.numpy()}), strict=True))
    module = torch.export.load(str(path)).module()

    def run(images: Tensor) -> dict[str, np.ndarray]:
        with torch.no_grad():
            return {name: x.numpy() for name, x in zip(OUTPUTS, module(images), strict=True)}

    return run


def compared(run: Run, images: Tensor, expected: ScoreResult) -> dict[str, Any]:
    """Return how far what a file gives is from what the model gives, and for batches from what it gives for one."""
    singles = [run(image[None]) for image in images]
    outputs = {name: np.concatenate([single[name] for single in singles]) for name in OUTPUTS}
    scores, thresholds = expected.image_score.numpy(), expected.threshold.numpy()
    own = {"score": scores, "anomaly_map": torch.as_tensor(expected.anomaly_map).numpy()}
    scale = np.maximum(np.abs(scores), np.nan_to_num(np.abs(thresholds)))
    against_model = differences(outputs, own, scale) | {
        "classes": int((outputs["class_id"] != expected.class_id.numpy()).sum()),
        "verdicts": int((outputs["is_anomalous"] != expected.is_anomalous.numpy()).sum()),
    }
    against_singles = {}
    for batch in BATCHES:
        wanted = torch.arange(batch) % len(images)
        expected_singles = {name: outputs[name][wanted] for name in own}
        against_singles[f"of {batch}"] = differences(run(images[wanted]), expected_singles, scale[wanted])
    return {"against the model": against_model, "against single images": against_singles}


def differences(outputs: dict[str, np.ndarray], expected: dict[str, np.ndarray], scale: np.ndarray) -> dict[str, float]:
    """Return the largest differences of scores, over `scale`, and of maps: themselves, and over the largest value."""
    of_scores = np.abs(outputs["score"].astype(float) - expected["score"]) / scale
    of_maps = np.abs(outputs["anomaly_map"] - expected["anomaly_map"]).max((1, 2))
    over_largest = of_maps / np.abs(expected["anomaly_map"]).max((1, 2))
    return {"score": float(of_scores.max()), "map": float(over_largest.max()), "map, absolute": float(of_maps.max())}


def merged(figures: Sequence[Any]) -> Any:
    """Return one of several figures: the sum of counts, the largest of others, in dictionaries by name."""
    if isinstance(figures[0], dict):
        return {name: merged([each[name] for each in figures]) for name in figures[0]}
    return sum(figures) if isinstance(figures[0], int) else max(figures, key=lambda x: (math.isnan(x), x))


def timed_on(model: Detector, runs: dict[str, Run], image: Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """Return the processor time of an image (3, H, W) in all files, and of a frame of its size in a `Scorer`."""
    frame = (255 * image).round().byte().permute(1, 2, 0).contiguous().numpy()
    scorer = Scorer(model, img_size=required_calibration(model).img_size)
    calls: dict[str, Callable[[], Any]] = {
        "Scorer": lambda: scorer(frame),
        "Scorer, map": lambda: scorer(frame).anomaly_map,
    }
    images = image[None].contiguous()
    return verdict.compare(calls | {name: lambda run=run: run(images) for name, run in runs.items()}, rounds)


if __name__ == "__main__":
    main()
