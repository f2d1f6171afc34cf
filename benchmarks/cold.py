"""Processor time of a command in a process of its own: `python -m benchmarks.cold`.

The commands are `hgad-fast info MODEL` and `hgad-fast score MODEL IMAGE`, of an HGAD model of the preset `fast` and of
a place Gaussian of the preset `gaussian`, of five classes, whose backbones have random weights. Counted are the seconds
of all processors, user and system, from the start of Python to the end of the process, with files in the system's cache
and as many threads as torch takes by itself. The kinds take turns, and the least of the rounds is given: what else runs
on a machine adds to the others. `import torch` alone, which every command has to do, stands beside them.

`LIMITS` are what the commands may take on the machine of benchmarks/results/cold.json; `pytest benchmarks` checks them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hgad_fast import GaussianConfig, GaussianModel, HGADConfig, HGADModel
from hgad_fast.bench import measure
from hgad_fast.features.extract import FeatureSet
from hgad_fast.files import replacing

ROOT = Path(__file__).parents[1]
LIMITS = {"info": 2.5, "score": 4.0}  # seconds
CLASSES, SIDE = 5, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the figures as JSON here")
    parser.add_argument("--rounds", type=int, default=10, help="processes of each kind (default: 10)")
    parser.add_argument("--model", type=Path, help="a model file to measure instead")
    arguments = parser.parse_args()
    figures: dict[str, Any] = measure.about_run(torch.device("cpu"))
    figures |= {"rounds": arguments.rounds, "limits": LIMITS}
    figures["processor_seconds"] = compare(arguments.rounds, arguments.model)
    print(json.dumps(figures["processor_seconds"], indent=2))
    if arguments.output is not None:
        with replacing(arguments.output) as file:
            file.write_text(json.dumps(figures, indent=2) + "\n")


def compare(rounds: int, model: Path | None = None) -> dict[str, dict[str, float]]:
    """Return the least and the median processor seconds of each kind of process, by its name."""
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "image.png")
        pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
        Image.fromarray(pixels).save(image)
        models = {"gaussian": gaussian, "fast": fast} if model is None else {}
        files = {name: Path(folder, f"{name}.safetensors") for name in models} if model is None else {"model": model}
        for name, make in models.items():
            make().save(files[name])
        kinds = {"import torch": ["-c", "import torch"]}
        for name, file in files.items():
            kinds[f"info {name}"] = ["-m", "hgad_fast", "info", str(file)]
            kinds[f"score {name}"] = ["-m", "hgad_fast", "score", str(file), str(image)]
        seconds = [{kind: processor_seconds(command) for kind, command in kinds.items()} for _ in range(1 + rounds)]
    figures = {}
    for kind in kinds:
        of_kind = [each[kind] for each in seconds[1:]]  # the first fills the caches of files and bytecode
        figures[kind] = {"least": min(of_kind), "median": float(np.median(of_kind))}
    return figures


def processor_seconds(arguments: list[str]) -> float:
    """Run Python with these arguments; return the processor seconds of that process and of its children."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def drawn(channels: list[int], images: int, seed: int) -> FeatureSet:
    """Return features of noise, around a mean of each class."""
    generator = torch.Generator().manual_seed(seed)
    class_ids = torch.arange(images) % CLASSES
    levels = []
    for c in channels:
        means = torch.randn(CLASSES, c, 1, 1, generator=torch.Generator().manual_seed(c))
        levels.append(means[class_ids] + torch.randn(images, c, SIDE, SIDE, generator=generator))
    return FeatureSet.from_levels(levels, class_ids)


def gaussian() -> GaussianModel:
    model = GaussianModel(GaussianConfig.preset("gaussian", n_classes=CLASSES, backbone_weights=None))
    model.fit(drawn(model.feature_dims, 100, 0), calibration=drawn(model.feature_dims, 20, 1))
    return model


def fast() -> HGADModel:
    model = HGADModel(HGADConfig.preset("fast", n_classes=CLASSES, backbone_weights=None))
    model.calibrate(drawn(model.feature_dims, 20, 1))
    return model


if __name__ == "__main__":
    main()
