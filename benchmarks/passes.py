"""Does the flow catch up with the place Gaussian, and when? `python -m benchmarks.passes ROOT --output FILE`.

ROOT is a dataset in the MVTec AD layout. HGAD (preset "fast") is trained on some normal images of each class, the
others calibrate, and every so many passes over the images it is calibrated and its maps are compared with the masks:
class inferred, each image alone, all pixels of the maps, by fusion, class and mean. The place Gaussian on the same
images stands beside it. Meta-epochs are as long as those of the preset, as are the warm-up and stage 1, which they
measure. The rate falls over all the passes (as a cosine), so that a row in the middle is no training of that length.
Features are computed once.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hgad_fast import GaussianConfig, GaussianModel, HGADConfig, HGADModel
from hgad_fast.bench import measure
from hgad_fast.data import datasets
from hgad_fast.data.images import read_image
from hgad_fast.evaluation import metrics
from hgad_fast.evaluation.evaluate import mean, seen_mask
from hgad_fast.features.extract import feature_set
from hgad_fast.features.preprocess import image_features
from hgad_fast.files import replacing
from hgad_fast.models.fields import assignment
from hgad_fast.scoring.calibration import calibration_of, held_out_densities, largest_densities
from hgad_fast.scoring.densities import densities

FUSIONS = ("standardised", "likelihood", "entropy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="the dataset")
    parser.add_argument("--passes", type=int, default=600)
    parser.add_argument("--every", type=int, default=50, help="passes from one comparison to the next")
    parser.add_argument("--training-images", type=int, default=80, help="of each class; the others calibrate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="fast", help="what this training is called in the file")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="other fields of HGADConfig")
    parser.add_argument("--gaussian", action="store_true", help="the place Gaussian too, on its own features")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file; trainings in it already stay")
    arguments = parser.parse_args()
    run(arguments)


def run(arguments: argparse.Namespace) -> None:
    dataset = datasets.discover(arguments.root)
    changes = dict(assignment(text) for text in arguments.set)
    common: dict[str, Any] = {
        "n_classes": len(dataset.class_names),
        "class_names": dataset.class_names,
        "backbone_weights": "packaged",
        "center_crop": True,
        "calibration_fraction": 0.0,
        "seed": arguments.seed,
    }
    config = HGADConfig.preset("fast", **common | changes)
    config = config.replace(meta_epochs=math.ceil(arguments.passes / config.sub_epochs))
    contenders: dict[str, Any] = {arguments.name: HGADModel(config)}
    if arguments.gaussian:
        contenders["place Gaussian"] = GaussianModel(GaussianConfig.preset("gaussian", **common))
    for name, model in contenders.items():
        follow(name, model, dataset, arguments)


def follow(name: str, model: Any, dataset: datasets.Dataset, arguments: argparse.Namespace) -> None:
    """Train a model, compare it every so many passes, and save the rows."""
    normals = feature_set(model, dataset)
    tests = [image_features(model, read_image(sample.path)) for sample in dataset.test]
    train, others = drawn(normals.class_ids, arguments.training_images, arguments.seed)
    held_out = normals.subset(others)
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()

    def compare(passes: int, spent: float) -> None:
        row = {"passes": passes, "training_seconds": round(spent, 1), **figures(model, dataset, held_out, tests)}
        rows.append(row)
        print(name, passes, f"{spent:.0f} s", json.dumps(row["mean"]), flush=True)
        save(arguments, name, model, rows)

    def after_pass(record: dict[str, Any]) -> None:
        nonlocal started
        passes = record["meta_epoch"] * model.config.sub_epochs + record["sub_epoch"] + 1
        if passes % arguments.every == 0:
            spent = time.perf_counter() - started
            model.eval()
            compare(passes, spent)
            model.train()
            started = time.perf_counter() - spent  # comparing does not count

    model.fit(normals.subset(train), calibration=held_out, callbacks=[after_pass])
    if not rows:
        compare(0, time.perf_counter() - started)


def drawn(class_ids: torch.Tensor, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of `count` images of each class, and those of the others."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(class_ids), dtype=torch.bool)
    for k in class_ids.unique().tolist():
        members = (class_ids == k).nonzero().flatten()
        chosen[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return chosen.nonzero().flatten(), (~chosen).nonzero().flatten()


@torch.no_grad()
def figures(model: Any, dataset: Any, held_out: Any, tests: Sequence[Any]) -> dict[str, Any]:
    """Return image AUROC, pixel AUROC and AUPRO@0.3 by fusion, mean and by class."""
    normal = held_out_densities(model, held_out)
    level_max = largest_densities(model, normal)
    scored = [densities(model, features, None)[0] for features in tests]
    right = mean(int(image.group_ids) == sample.class_id for image, sample in zip(scored, dataset.test, strict=True))
    by_fusion: dict[str, Any] = {}
    for fusion in FUSIONS if len(normal[0].parts) > 1 else ("standardised",):
        calibration = calibration_of(model, normal, level_max, model.config.img_size, fusion)
        by_class = {}
        for k, name in enumerate(dataset.class_names):
            rows = [i for i, sample in enumerate(dataset.test) if sample.class_id == k]
            samples = [dataset.test[i] for i in rows]
            maps, scores = zip(*(calibration.maps(scored[i], model.config.msk_size) for i in rows), strict=True)
            labels = [sample.is_anomalous for sample in samples]
            with_masks = [
                (anomaly_map[0].numpy(), seen_mask(model, sample, anomaly_map[0]).numpy())
                for sample, anomaly_map in zip(samples, maps, strict=True)
                if sample.mask or not sample.is_anomalous
            ]
            pixels = metrics.pixel_metrics(*zip(*with_masks, strict=True), limits=(0.3,))
            by_class[name] = [
                metrics.auroc(torch.cat(scores).tolist(), labels),
                pixels["auroc"],
                pixels["aupro_0.3"],
            ]
        by_fusion[fusion] = by_class | {"mean": [mean(column) for column in zip(*by_class.values(), strict=True)]}
    return {
        "mean": {fusion: [round(100 * x, 1) for x in by_class["mean"]] for fusion, by_class in by_fusion.items()},
        "inferred_class_right": right,
        "figures": by_fusion,
    }


def save(arguments: argparse.Namespace, name: str, model: Any, rows: list[dict[str, Any]]) -> None:
    """Write the rows of a training beside those of others that are in the file already."""
    content: dict[str, Any] = {"dataset": arguments.root.name, "columns": ["image AUROC", "pixel AUROC", "AUPRO@0.3"]}
    if arguments.output.exists():
        content = json.loads(arguments.output.read_text())
    about = measure.about_run(torch.device("cpu")) | {"config": json.loads(model.config.to_json())}
    content.setdefault("trainings", {})[name] = {
        **about,
        "training_images_a_class": arguments.training_images,
        "rows": rows,
    }
    with replacing(arguments.output) as file:
        file.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
