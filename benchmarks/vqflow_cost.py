"""What VQ-Flow costs here, at its published sizes and in the preset "small": `python -m benchmarks.vqflow_cost`.

Features are drawn at random: the backbone is not timed. Each setting runs in a process of its own, whose peak memory is
recorded: parameters, gradients and Adam's moments are in that of a training, and the tables of the codes in that of
scoring. Seconds are medians of several rounds.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hgad_fast import VQFlowConfig, VQFlowModel
from hgad_fast.bench import measure
from hgad_fast.features.backbone import FeatureMaps
from hgad_fast.files import replacing
from hgad_fast.training.processes import Processes
from hgad_fast.training.step import Step

# Channels of the backbone's stages, and the side of the pooled map of the finest one.
SIZES = {"published": ((128, 256, 512, 1024), 48), "small": ((24, 40, 112, 320), 32)}
BATCHES = {"published": (2, 4), "small": (16, 32)}  # of a training step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the figures as JSON here")
    parser.add_argument("--one", nargs=3, metavar=("PRESET", "WORK", "BATCH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        preset, work, batch = arguments.one
        print(json.dumps(one(preset, work, int(batch), arguments.rounds)))
        return
    record: dict[str, Any] = measure.about_run(torch.device("cpu"))
    record["presets"] = {preset: of_preset(preset, arguments.rounds) for preset in SIZES}
    print(json.dumps(record["presets"], indent=2))
    if arguments.output is not None:
        with replacing(arguments.output) as file:
            file.write_text(json.dumps(record, indent=2) + "\n")


def of_preset(preset: str, rounds: int) -> dict[str, Any]:
    """Return the costs of a preset."""

    def run(work: str, batch: int) -> dict[str, Any]:
        command = [sys.executable, "-m", "benchmarks.vqflow_cost", "--rounds", str(rounds)]
        done = subprocess.run([*command, "--one", preset, work, str(batch)], check=True, capture_output=True, text=True)
        return json.loads(done.stdout.splitlines()[-1])

    few, many = (run("training", batch) for batch in BATCHES[preset])
    images = BATCHES[preset][1] - BATCHES[preset][0]
    return {
        "parameters": few["parameters"],
        "training_seconds_an_image": many["seconds_an_image"],
        "training_peak_mb": {BATCHES[preset][0]: few["peak_mb"], BATCHES[preset][1]: many["peak_mb"]},
        "training_mb_an_image": (many["peak_mb"] - few["peak_mb"]) / images,
        **{f"scoring_{name}": value for name, value in run("scoring", 1).items() if name != "parameters"},
    }


def one(preset: str, work: str, batch: int, rounds: int) -> dict[str, Any]:
    """Return the costs of one kind of work in this process."""
    dims, side = SIZES[preset]
    config = VQFlowConfig() if preset == "published" else VQFlowConfig.preset(preset)
    config = config.replace(backbone_arch=None, feature_dims=dims, batch_size=batch if batch > 1 else 2)
    model = VQFlowModel(config)
    sides = (side, side // 2, side // 4, side // 4)
    maps = [torch.randn(batch, c, s, s) for c, s in zip(dims, sides, strict=True)]
    seconds = []
    if work == "training":
        step, images = Step(model.train(), Processes()), [[level[i] for level in maps] for i in range(batch)]
        labels = torch.zeros(batch, dtype=torch.int64)
        for _ in range(rounds + 1):
            start = time.perf_counter()
            step(images, labels, 1, 1e-4)
            seconds.append((time.perf_counter() - start) / batch)
    else:
        model.eval()
        for _ in range(rounds + 1):
            start = time.perf_counter()
            model.densities(FeatureMaps.of(maps), None)
            seconds.append(time.perf_counter() - start)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "first_seconds": seconds[0],  # with what is made once
        "seconds_an_image": median(seconds[1:]),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


if __name__ == "__main__":
    main()
