"""A class added to a trained model, and normal images absorbed, on a dataset: what it costs against a training on all.

    python -m benchmarks.new_class ROOT --models FOLDER --output FILE

ROOT is a dataset in the MVTec AD layout; weights come from an installed package (extra [demo]). The centre square of
each image is seen.

Place Gaussian: each class in turn comes as the last. A model of the others takes it by `add_class`, and its figures are
compared with those of a model of all classes at once, which is fitted to the same images and calibrated on the same
ones. Scores, maps and p-values of the test images of the others are compared to the bit with those before.

Absorbing, place Gaussian: normal test images of each class are changed in brightness. Ten of them are absorbed, and
the alarms among the others are counted before and after, with the figures of the test images that were not absorbed;
and once more with cross-fitted scores of the absorbed images among those that the threshold rests on.

HGAD: models of all classes, and of all but the last, are trained with a part of the passes of the preset "fast", or
read from FOLDER if they were. The last class is added to the latter, with the likelihood map alone, as in the preset,
and with the standardised sum of likelihood and entropy map.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hgad_fast import GaussianConfig, GaussianModel, HGADConfig, HGADModel, load
from hgad_fast.bench import measure
from hgad_fast.data import datasets
from hgad_fast.data.images import read_image
from hgad_fast.evaluation.evaluate import evaluate
from hgad_fast.evaluation.metrics import auroc
from hgad_fast.features.extract import FeatureSet, feature_set
from hgad_fast.features.preprocess import image_features
from hgad_fast.files import replacing
from hgad_fast.scoring.calibration import held_out_densities, split
from hgad_fast.scoring.score import score_prepared

RATE = 0.05
FIGURES = ("image_auroc", "pixel_auroc", "pixel_aupro_30")
ABSORBED, FOLDS = 10, 5
BRIGHTNESS = (0.5, 1.6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="the dataset")
    parser.add_argument("--parts", nargs="+", default=["gaussian", "absorb", "hgad", "hgad_standardised"])
    parser.add_argument("--models", type=Path, help="keep the trained models here")
    parser.add_argument("--cache-dir", type=Path, help="keep features here, for another run")
    parser.add_argument("--sub-epochs", type=int, default=2, help="passes of a round of HGAD's training")
    parser.add_argument("--output", type=Path, help="write the figures as JSON here, after every part")
    arguments = parser.parse_args()
    dataset = datasets.discover(arguments.root)
    record: dict[str, Any] = {"dataset": arguments.root.name} | measure.about_run(torch.device("cpu"))
    if arguments.output is not None and arguments.output.is_file():
        record = json.loads(arguments.output.read_text()) | record
    parts = {"gaussian": on_gaussian, "absorb": absorbing, "hgad": on_hgad}
    parts["hgad_standardised"] = functools.partial(on_hgad, fusion="standardised")
    for name in arguments.parts:
        record[name] = {"commit": record["commit"], **parts[name](dataset, arguments)}
        if arguments.output is not None:
            with replacing(arguments.output) as file:
                file.write_text(json.dumps(record, indent=2) + "\n")


def cached(arguments: argparse.Namespace) -> dict[str, Any]:
    return {} if arguments.cache_dir is None else {"cache": "disk", "cache_dir": arguments.cache_dir}


def of_classes(features: FeatureSet, classes: Sequence[int]) -> FeatureSet:
    """Return the images of some classes, which are numbered anew in this order."""
    rows = torch.cat([(features.class_ids == k).nonzero().flatten() for k in classes])
    subset = features.subset(rows)
    return replace(subset, class_ids=torch.tensor([classes.index(k) for k in subset.class_ids.tolist()]))


def gaussian_of(names: Sequence[str]) -> GaussianModel:
    return GaussianModel(
        GaussianConfig.preset(
            "gaussian",
            n_classes=len(names),
            class_names=tuple(names),
            backbone_weights="packaged",
            center_crop=True,
        )
    )


def test_features(model: Any, dataset: Any) -> dict[Path, list[Tensor]]:
    return {sample.path: image_features(model, read_image(sample.path)) for sample in dataset.test}


def figures_of(model: Any, dataset: Any, tests: dict[Path, list[Tensor]]) -> dict[str, Any]:
    """Return the figures of each class, and false alarms and recognised images, under the honest protocol."""
    evaluation = evaluate(model, dataset, details=False, features_of=lambda sample: tests[sample.path])
    rows = {}
    for name, figures in evaluation.figures["honest"].items():
        images = [image for image in evaluation.images["honest"] if image.class_name == name]
        normal = [image for image in images if not image.is_anomalous]
        rows[name] = {figure: round(getattr(figures, figure), 5) for figure in FIGURES} | {
            "false_alarms": sum(bool(image.is_flagged) for image in normal),
            "normal_images": len(normal),
            "defects_found": sum(bool(image.is_flagged) for image in images if image.is_anomalous),
            "defects": len(images) - len(normal),
            "recognised": sum(image.inferred_class == name for image in images),
            "images": len(images),
        }
    return rows


def on_gaussian(dataset: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    names = dataset.class_names
    together = gaussian_of(names)
    features = feature_set(together, dataset, **cached(arguments))
    tests = test_features(together, dataset)
    rows, held_out_rows = split(features.class_ids, together.config.calibration_fraction, together.config.seed)
    training, held_out = features.subset(rows), features.subset(held_out_rows)
    together.fit(training, calibration=held_out, false_alarm_rate=RATE)
    at_once = figures_of(together, dataset, tests)
    record: dict[str, Any] = {"at_once": at_once, "added": {}}
    for k, name in enumerate(names):
        others = [j for j in range(len(names)) if j != k]
        model = gaussian_of([names[j] for j in others])
        model.fit(of_classes(training, others), calibration=of_classes(held_out, others), false_alarm_rate=RATE)
        before = copy.deepcopy(model)
        start = time.perf_counter()
        added = model.add_class(name, of_classes(training, [k]), calibration=of_classes(held_out, [k]))
        seconds = time.perf_counter() - start
        figures = figures_of(model, dataset, tests)
        bits = same_bits(before, model, [s for s in dataset.test if s.class_id != k], names, tests)
        row = {
            "seconds_on_features": round(seconds, 2),
            **added.to_dict(),
            "figures": figures[name],
            "at_once": at_once[name],
            "points": points(figures[name], at_once[name]),
            "points_of_the_others": {names[j]: points(figures[names[j]], at_once[names[j]]) for j in others},
            "bits_of_the_others": bits,
        }
        record["added"][name] = row
        print(name, row["points"], bits, f"{seconds:.2f} s", flush=True)
    return record


def points(figures: dict[str, Any], at_once: dict[str, Any]) -> dict[str, float]:
    """Return the differences of figures, in percentage points."""
    return {figure: round(100 * (figures[figure] - at_once[figure]), 3) for figure in FIGURES}


def same_bits(
    before: Any, after: Any, samples: Sequence[Any], names: Sequence[str], tests: dict[Path, list[Tensor]]
) -> dict[str, int]:
    """Return how many test images have the same maps, scores, p-values and verdicts to the bit in two models."""
    counts = {"images": len(samples), "given_same": 0, "inferred_same_class": 0, "inferred_same": 0}

    def same(*class_ids: Tensor | None) -> tuple[bool, bool]:
        first, second = (
            score_prepared(model, tests[sample.path], ids)
            for model, ids in zip((before, after), class_ids, strict=True)
        )
        equal = all(
            torch.equal(getattr(first, field), getattr(second, field))
            for field in ("anomaly_map", "image_score", "p_value", "threshold", "is_anomalous")
        )
        return bool(first.class_id == second.class_id), equal

    for sample in samples:
        ids = [torch.tensor([model.groups.index(names[sample.class_id])]) for model in (before, after)]
        counts["given_same"] += same(*ids)[1]
        same_class, equal = same(None, None)
        counts["inferred_same_class"] += same_class
        counts["inferred_same"] += same_class and equal
    return counts


def absorbing(dataset: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    names = dataset.class_names
    fitted = gaussian_of(names)
    fitted.fit(feature_set(fitted, dataset, **cached(arguments)), false_alarm_rate=RATE)
    record: dict[str, Any] = {}
    for factor in BRIGHTNESS:
        for k, name in enumerate(names):
            tests = [sample for sample in dataset.test if sample.class_id == k]
            changed = {
                sample.path: image_features(fitted, (read_image(sample.path) * factor).clamp(0, 1)) for sample in tests
            }
            plain = {sample.path: image_features(fitted, read_image(sample.path)) for sample in tests}
            normal = [sample.path for sample in tests if not sample.is_anomalous]
            absorbed = normal[:: max(1, len(normal) // ABSORBED)][:ABSORBED]
            rest = [sample for sample in tests if sample.path not in absorbed]
            images = set_of([changed[path] for path in absorbed], k)
            row = {"before": state_of(fitted, rest, plain, changed, k)}
            for title, cross_fitted in (("absorbed", False), ("absorbed_cross_fitted", True)):
                model = copy.deepcopy(fitted)
                report = model.absorb(name, images)
                if cross_fitted:
                    scores = cross_fitted_scores(fitted, images)
                    model.calibration = model.calibration.joined_by(scores, images.class_ids)
                row[title] = {"report": report.to_dict()} | state_of(model, rest, plain, changed, k)
            defects = set_of([plain[sample.path] for sample in rest if sample.is_anomalous], k)
            row["defects_that_absorbing_would_warn_of"] = len(copy.deepcopy(fitted).absorb(name, defects).far)
            record[f"{name}, brightness {factor}"] = row
            print(name, factor, json.dumps(row), flush=True)
    return record


def set_of(images: Sequence[Sequence[Tensor]], k: int) -> FeatureSet:
    return FeatureSet([[level[0] for level in levels] for levels in images], torch.full((len(images),), k))


def cross_fitted_scores(model: GaussianModel, images: FeatureSet) -> Tensor:
    """Return the scores of absorbed images by Gaussians that know the others, but not those of their own fold."""
    scores = torch.zeros(len(images))
    for fold in range(FOLDS):
        inside = torch.arange(len(images)) % FOLDS == fold
        other = copy.deepcopy(model)
        other.take_images(images.subset((~inside).nonzero().flatten()))
        scores[inside] = scores_of(other, images.subset(inside.nonzero().flatten()))
    return scores


def scores_of(model: Any, images: FeatureSet) -> Tensor:
    """Return the image scores, the class given."""
    densities = held_out_densities(model, images)
    return torch.cat([model.calibration.scores_alone(image, model.config.msk_size) for image in densities])


def state_of(model: Any, rest: Sequence[Any], plain: dict[Path, Any], changed: dict[Path, Any], k: int) -> dict:
    """Return AUROC, alarms and defects found of test images as they are and changed, the class given."""
    labels = [sample.is_anomalous for sample in rest]
    row: dict[str, Any] = {"threshold": round(model.calibration.threshold(k), 4)}
    for title, features in (("as_they_are", plain), ("changed", changed)):
        scores = scores_of(model, set_of([features[sample.path] for sample in rest], k))
        flags = (scores > model.calibration.threshold(k)).tolist()
        row[title] = {
            "image_auroc": round(auroc(scores.numpy(), labels), 5),
            "false_alarms": sum(flag for flag, label in zip(flags, labels, strict=True) if not label),
            "normal_images": labels.count(False),
            "defects_found": sum(flag for flag, label in zip(flags, labels, strict=True) if label),
            "defects": labels.count(True),
        }
    return row


def on_hgad(dataset: Any, arguments: argparse.Namespace, fusion: str = "likelihood") -> dict[str, Any]:
    names, last = dataset.class_names, len(dataset.class_names) - 1

    def first(count: int) -> Any:
        """Return the dataset of the first classes."""
        train, test = (tuple(s for s in samples if s.class_id < count) for samples in (dataset.train, dataset.test))
        return replace(dataset, class_names=names[:count], train=train, test=test)

    data = {"others": first(last), "at_once": dataset}
    record: dict[str, Any] = {"sub_epochs": arguments.sub_epochs, "fusion": fusion, "last": names[-1]}
    record["training_seconds"] = {}
    models: dict[str, HGADModel] = {}
    for title, trained_on in data.items():
        file = arguments.models and arguments.models / f"hgad-{title}-{arguments.sub_epochs}.safetensors"
        if file and file.is_file():
            models[title] = load(file)
            continue
        fields: dict[str, Any] = {"backbone_weights": "packaged", "center_crop": True}
        fields |= {"n_classes": len(trained_on.class_names), "class_names": trained_on.class_names}
        model = HGADModel(HGADConfig.preset("fast", **fields, sub_epochs=arguments.sub_epochs))
        start = time.perf_counter()
        model.fit(trained_on, false_alarm_rate=RATE, **cached(arguments))
        record["training_seconds"][title] = round(time.perf_counter() - start)
        models[title] = model
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            model.save(file)
    tests = test_features(models["at_once"], dataset)
    new = feature_set(models["at_once"], replace(dataset, train=tuple(s for s in dataset.train if s.class_id == last)))
    for title, model in models.items():
        if model.fusion != fusion:  # its calibration has other weights
            model.config = model.config.replace(fusion=fusion)
            train = data[title].train
            ids = torch.tensor([sample.class_id for sample in train])
            _, held_out = split(ids, model.config.calibration_fraction, model.config.seed)
            model.calibrate(replace(data[title], train=tuple(train[i] for i in held_out)), false_alarm_rate=RATE)
        record[title] = figures_of(model, data[title], tests)
    grown = models["others"]
    start = time.perf_counter()
    added = grown.add_class(names[-1], new)
    record["seconds_on_features"] = round(time.perf_counter() - start, 1)
    record |= {"report": added.to_dict(), "grown": figures_of(grown, dataset, tests)}
    print(fusion, json.dumps(record), flush=True)
    return record


if __name__ == "__main__":
    main()
