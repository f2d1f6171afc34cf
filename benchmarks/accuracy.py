"""AUROC of a short training under the official protocol, over several seeds: `python -m benchmarks.accuracy ROOT`.

ROOT is a dataset in the MVTec AD layout. The setting is a small one that a CPU can run: `tf_efficientnet_lite0`
(ImageNet weights from the [demo] extra), short side 256, centre crop, maps at 256, 16 meta-epochs of 1 sub-epoch,
batch 8, every training image used, maps normalised class by class over the test set. With
`--cache-dtype float16 --memory reversible` it is the training that takes least memory, to compare with the default.
With `--preset fast` it is that preset, with a tenth of the normal images held out, so that both protocols are reported.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from hgad_fast import HGADConfig, HGADModel, demo
from hgad_fast.bench import measure
from hgad_fast.data import datasets
from hgad_fast.data.images import read_image
from hgad_fast.evaluation.evaluate import evaluate
from hgad_fast.features.extract import FeatureSet, feature_set
from hgad_fast.features.preprocess import image_features
from hgad_fast.files import replacing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="the dataset")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--meta-epochs", type=int, default=16)
    parser.add_argument("--preset", help="of HGADConfig, instead of --meta-epochs and the official procedure")
    parser.add_argument("--cache-dtype", default="float32", help="precision of the features trained on")
    parser.add_argument("--memory", default="standard", help="of the flows: standard or reversible")
    parser.add_argument("--precision", default="fp32", help="of the subnets' products: fp32, tf32 or bf16")
    parser.add_argument("--output", type=Path, help="write the figures as JSON here, after every seed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(arguments, Path(folder))


def run(arguments: argparse.Namespace, folder: Path) -> None:
    root, output = arguments.root, arguments.output
    dataset = datasets.discover(root)
    weights = demo.write_weights(folder / "lite0.safetensors")
    record: dict[str, Any] = {"dataset": root.name, "meta_epochs": arguments.meta_epochs}
    record |= {"cache_dtype": arguments.cache_dtype, "memory": arguments.memory}
    record |= {"precision": arguments.precision, "seeds": {}}
    record |= measure.about_run(torch.device("cpu"))
    common: dict[str, Any] = {
        "n_classes": len(dataset.class_names),
        "class_names": dataset.class_names,
        "backbone_weights": str(weights),
        "center_crop": True,
        "memory": arguments.memory,
        "precision": arguments.precision,
    }
    if arguments.preset is not None:
        del record["meta_epochs"]
        record["preset"] = arguments.preset
        config = HGADConfig.preset(arguments.preset, **common)
    else:
        config = HGADConfig(
            **common,
            backbone_arch="tf_efficientnet_lite0",
            img_size=256,
            msk_size=256,
            meta_epochs=arguments.meta_epochs,
            sub_epochs=1,
            calibration_fraction=0.0,
        )
    features: FeatureSet | None = None
    tests: dict[Path, list[torch.Tensor]] = {}
    for seed in arguments.seeds:
        model = HGADModel(config.replace(seed=seed))
        if features is None:  # the backbone is the same for every seed
            started = time.perf_counter()
            features = feature_set(model, dataset, cache_dtype=arguments.cache_dtype)
            record["features_seconds"] = round(time.perf_counter() - started)
            tests = {sample.path: image_features(model, read_image(sample.path)) for sample in dataset.test}
        start = time.perf_counter()
        model.fit(features, output_dir=folder / f"seed{seed}")
        seconds = time.perf_counter() - start
        evaluation = evaluate(model, dataset, details=False, features_of=lambda sample, of=tests: of[sample.path])
        print(f"seed {seed}, trained in {seconds:.0f} s\n{evaluation.table()}\n", flush=True)
        record["seeds"][seed] = {"training_seconds": round(seconds), **evaluation.to_dict(details=False)}
        if output is not None:
            with replacing(output) as file:
                file.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
