"""Processor time of a `Scorer` verdict against onnxruntime on the same graph: `python -m benchmarks.verdict`.

The model is HGAD of default settings on tf_efficientnet_lite0 (three levels, 12 coupling layers) for 15 classes of 10
centres, and sees a grey-value image of 256 x 256 pixels. Weights are random: time does not depend on them. Everything
runs in one thread; contenders take turns, and medians of the processor time are given, with the least.

- verdict: a frame in, score and class out, the class inferred or given, in float32 and with precision="bf16";
- backbone: its features alone, in torch;
- onnxruntime: the file of `model.export`, from a float image of the size that goes in to all of its outputs, and the
  backbone of that file alone, up to the features.

Where onnx, onnxruntime and onnxscript are missing, the rest is measured, and a note says how to install them.

`--profile FILE` writes the time of a verdict by operation, and the share of matrix products and convolutions. A
profiler slows down what takes many short operations more than what takes a few long ones.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hgad_fast import HGADConfig, HGADModel
from hgad_fast.bench import measure
from hgad_fast.environment import package_versions
from hgad_fast.features.extract import FeatureSet
from hgad_fast.features.graph import BackboneGraph
from hgad_fast.files import replacing
from hgad_fast.scoring.scorer import Scorer

SIDE, CLASSES, CENTRES = 256, 15, 10
ONNX = ("onnx", "onnxruntime", "onnxscript")
PRODUCTS = ("aten::conv2d", "aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the figures as JSON here")
    parser.add_argument("--profile", type=Path, help="write the time by operation as text here")
    parser.add_argument("--rounds", type=int, default=50, help="verdicts of each contender (default: 50)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = measure.about_run(torch.device("cpu"))
    figures["versions"] |= package_versions("timm", *ONNX)
    if missing := [name for name in ONNX if importlib.util.find_spec(name) is None]:
        figures["notes"].append(f"onnxruntime is left out: pip install {' '.join(missing)}")
        print(figures["notes"][-1], file=sys.stderr)
    frame = torch.randint(256, (SIDE, SIDE, 3), generator=torch.Generator().manual_seed(1)).byte().numpy()
    figures["milliseconds"] = compare(contenders(frame, with_onnx=not missing), arguments.rounds)
    if not missing:
        of = figures["milliseconds"]
        figures["over onnxruntime"] = {
            name: of[name]["median"] / of["onnxruntime"]["median"] for name in of if name.startswith("verdict")
        }
        figures["over onnxruntime"]["backbone"] = of["backbone"]["median"] / of["onnxruntime, backbone"]["median"]
    text, figures["share of products and convolutions"] = profile(Scorer(calibrated_model()), frame)
    print(json.dumps({name: value for name, value in figures.items() if name != "notes"}, indent=2))
    for path, content in ((arguments.output, json.dumps(figures, indent=2) + "\n"), (arguments.profile, text)):
        if path is not None:
            with replacing(path) as file:
                file.write_text(content)


def calibrated_model(**settings: Any) -> HGADModel:
    """Return a model of random weights, calibrated on noise."""
    config = {"backbone_arch": "tf_efficientnet_lite0", "backbone_weights": None, "img_size": SIDE}
    config |= {"n_classes": CLASSES, "n_intra_centers": CENTRES}
    model = HGADModel(HGADConfig(**(config | settings)))
    class_ids = torch.arange(2 * model.config.n_classes) % model.config.n_classes
    encoder: Any = model.encoder
    side = model.config.img_size
    noise = torch.rand(len(class_ids), 3, side, side, generator=torch.Generator().manual_seed(0))
    images = [encoder(encoder.normalize(image[None]), fast=True) for image in noise]
    model.calibrate(FeatureSet.from_levels(list(map(torch.cat, zip(*images, strict=True))), class_ids))
    return model


def contenders(frame: np.ndarray, with_onnx: bool, **settings: Any) -> dict[str, Callable[[], Any]]:
    """Return what is timed, by name, for models of these settings."""
    image = torch.from_numpy(frame).permute(2, 0, 1) / 255
    model, rounded = calibrated_model(**settings), calibrated_model(**(settings | {"precision": "bf16"}))
    encoder: Any = model.encoder
    scorers = {
        "verdict": Scorer(model),
        "verdict, class given": Scorer(model, class_id=0),
        "verdict, bf16": Scorer(rounded),
        "verdict, class given, bf16": Scorer(rounded, class_id=0),
    }
    calls: dict[str, Callable[[], Any]] = {name: lambda s=scorer: s(frame) for name, scorer in scorers.items()}
    calls["backbone"] = lambda: encoder.feature_maps(image)
    if with_onnx:
        with tempfile.TemporaryDirectory() as folder:
            whole, backbone = Path(folder, "whole.onnx"), Path(folder, "backbone.onnx")
            model.export(whole, size=tuple(image.shape[1:]))
            write_backbone(model, image[None], backbone)
            sessions = {"onnxruntime": onnx_session(whole), "onnxruntime, backbone": onnx_session(backbone)}
        inputs = {"image": image[None].numpy()}
        calls |= {name: lambda s=session: s.run(None, inputs) for name, session in sessions.items()}
    return calls


def write_backbone(model: HGADModel, images: Tensor, path: Path) -> None:
    """Write the backbone alone as ONNX, for images (1, 3, H, W)."""
    encoder: Any = model.encoder
    graph = BackboneGraph(encoder, (images.shape[2], images.shape[3])).eval()
    with torch.no_grad():
        program = torch.onnx.export(graph, (images,), dynamo=True, input_names=["image"], verbose=False)
    assert program is not None
    program.save(path)


def onnx_session(path: Path) -> Any:
    """Return onnxruntime's session of a file, of one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def compare(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Return the median and the least processor time of each call in milliseconds; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(3 + rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if i >= 3:  # the first ones allocate
                times[name].append(1e3 * (time.process_time() - start))
    return {name: {"median": float(np.median(ms)), "least": min(ms)} for name, ms in times.items()}


def profile(scorer: Scorer, frame: np.ndarray, rounds: int = 20) -> tuple[str, float]:
    """Return the time of a verdict by operation, as text, and the share of matrix products and convolutions."""
    for _ in range(3):
        scorer(frame)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        with torch.profiler.record_function("verdict"):
            for _ in range(rounds):
                scorer(frame)
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    by_name = {event.key: event.cpu_time_total for event in events}
    share = sum(by_name.get(name, 0.0) for name in PRODUCTS) / by_name["verdict"]
    lines = [
        f"A verdict of {SIDE} x {SIDE} pixels, one thread, {rounds} of them profiled: python -m benchmarks.verdict",
        f"Matrix products and convolutions ({', '.join(PRODUCTS)}): {share:.1%} of the time",
        "",
        f"{'self ms':>8}{'share':>8}{'calls':>8}  operation (verdict: Python)",
    ]
    for event in events[:25]:
        own = event.self_cpu_time_total
        lines.append(f"{own / 1e3 / rounds:8.3f}{own / by_name['verdict']:8.1%}{event.count / rounds:8g}  {event.key}")
    return "\n".join(lines) + "\n", share


if __name__ == "__main__":
    main()
