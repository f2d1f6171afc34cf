"""VQ-Flow on a dataset, and what its mended faults are worth: `python -m benchmarks.vqflow ROOT`.

ROOT is a dataset in the MVTec AD layout. The preset "small" (`tf_efficientnet_lite0` with the ImageNet weights of the
[demo] extra) is trained for each seed and evaluated under both protocols. With `--official` the same sizes are trained
once by the official procedure, from the same start. Of each training are recorded: figures, seconds, prototypes in use
and their purity, and the mean log-density per value of held-out normal images (with the prior's determinant and its
constant, whatever was trained).
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from hgad_fast import VQFlowConfig, VQFlowModel, demo
from hgad_fast.bench import measure
from hgad_fast.data import datasets
from hgad_fast.data.images import read_image
from hgad_fast.evaluation.evaluate import evaluate
from hgad_fast.features.extract import feature_set
from hgad_fast.features.preprocess import image_features
from hgad_fast.files import replacing
from hgad_fast.models.fields import assignment
from hgad_fast.scoring.calibration import split


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="the dataset")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--official", action="store_true", help="also train by the official procedure, with seed 0")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="other fields of the configuration")
    parser.add_argument("--output", type=Path, help="write the figures as JSON here, after every training")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(arguments, Path(folder))


def run(arguments: argparse.Namespace, folder: Path) -> None:
    dataset = datasets.discover(arguments.root)
    changes = dict(assignment(text) for text in arguments.set)
    common = {
        "n_classes": len(dataset.class_names),
        "class_names": dataset.class_names,
        "backbone_weights": str(demo.write_weights(folder / "lite0.safetensors")),
        **changes,
    }
    small = VQFlowConfig.presets["small"]
    configs = {f"seed {seed}": VQFlowConfig.preset("small", **common | {"seed": seed}) for seed in arguments.seeds}
    if arguments.official:
        configs["official, seed 0"] = VQFlowConfig.official(**small | common | {"seed": 0})
    record: dict[str, Any] = {"dataset": arguments.root.name, "preset": "small", "changes": changes, "trainings": {}}
    record |= measure.about_run(torch.device("cpu"))
    first = VQFlowModel(next(iter(configs.values())))  # its backbone is that of every training
    features = feature_set(first, dataset)
    of_tests = {sample.path: image_features(first, read_image(sample.path)) for sample in dataset.test}
    for name, config in configs.items():
        model = VQFlowModel(config)
        start = time.perf_counter()
        history = model.fit(features)
        seconds = time.perf_counter() - start
        evaluation = evaluate(model, dataset, details=False, features_of=lambda sample: of_tests[sample.path])
        _, held_out = split(features.class_ids, config.calibration_fraction, config.seed)
        images = [features.images[i] for i in held_out.tolist()]
        densities = [float(model.log_density([level[None] for level in image])) for image in images]
        values = sum(level.numel() for level in images[0][:-1])
        record["trainings"][name] = {
            "training_seconds": round(seconds),
            "prototypes_in_use": int((model.prototype_images.sum(1) > 0).sum()),
            "purity": model.purity,
            "held_out_log_density_per_value": sum(densities) / len(densities) / values,
            "losses": [record["losses"][0] for record in history.records],
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            **evaluation.to_dict(details=False),
        }
        print(f"{name}, trained in {seconds:.0f} s\n{evaluation.table()}", flush=True)
        shown = ("prototypes_in_use", "purity", "held_out_log_density_per_value", "peak_memory_mb")
        print("\n".join(f"{key}: {record['trainings'][name][key]:.4g}" for key in shown), "\n", flush=True)
        if arguments.output is not None:
            with replacing(arguments.output) as file:
                file.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
