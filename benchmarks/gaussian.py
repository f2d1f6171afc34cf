"""The place Gaussian on a dataset: figures, fitting time, and false alarms over several calibrations.

    python -m benchmarks.gaussian ROOT --presets gaussian gaussian-dinov2 --output FILE

ROOT is a dataset in the MVTec AD layout; weights come from installed packages (extras [demo] and [dinov2]). For each
preset the model is fitted and evaluated once, under both protocols. Then, for each seed, other normal images are held
out for calibration, the model is fitted to the rest, and the normal test images above the threshold are counted; the
centre square of each image is seen. Where there is one backbone, the time to the verdict of a `Scorer` is taken,
alternating with the times of the bare network: as this library runs it, and as timm does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import betabinom, binom

from hgad_fast import GaussianConfig, GaussianModel, Scorer
from hgad_fast.bench import measure
from hgad_fast.data import datasets
from hgad_fast.data.images import read_image
from hgad_fast.evaluation.evaluate import evaluate
from hgad_fast.features.composite import CompositeBackbone
from hgad_fast.features.extract import feature_set
from hgad_fast.features.preprocess import image_features, preprocess
from hgad_fast.features.streamlined import streamlined
from hgad_fast.files import replacing
from hgad_fast.models.fields import assignment
from hgad_fast.scoring.densities import densities

RATES = (0.05, 0.01)
TIMED_IMAGES, TIMED_ROUNDS = 60, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="the dataset")
    parser.add_argument("--presets", nargs="+", default=list(GaussianConfig.presets))
    parser.add_argument("--splits", type=int, default=5, help="calibrations whose false alarms are counted")
    parser.add_argument("--cache-dir", type=Path, help="keep features here, for another run")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="other fields of the configuration")
    parser.add_argument("--output", type=Path, help="write the figures as JSON here, after every preset")
    arguments = parser.parse_args()
    dataset = datasets.discover(arguments.root)
    changes = dict(assignment(text) for text in arguments.set)
    record: dict[str, Any] = {"dataset": arguments.root.name, "changes": changes, "presets": {}}
    record |= measure.about_run(torch.device("cpu"))
    for preset in arguments.presets:
        record["presets"][preset] = run(preset, dataset, changes, arguments)
        if arguments.output is not None:
            with replacing(arguments.output) as file:
                file.write_text(json.dumps(record, indent=2) + "\n")


def run(preset: str, dataset: Any, changes: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of a preset."""
    common: dict[str, Any] = {
        "n_classes": len(dataset.class_names),
        "class_names": dataset.class_names,
        "backbone_weights": "packaged",
        "center_crop": True,
        **changes,
    }
    model = GaussianModel(GaussianConfig.preset(preset, **common))
    start = time.perf_counter()
    cache = {} if arguments.cache_dir is None else {"cache": "disk", "cache_dir": arguments.cache_dir}
    features = feature_set(model, dataset, **cache)
    extraction_seconds = time.perf_counter() - start
    tests = {sample.path: image_features(model, read_image(sample.path)) for sample in dataset.test}
    start = time.perf_counter()
    model.fit(features, false_alarm_rate=RATES[0])
    fit_seconds = time.perf_counter() - start
    evaluation = evaluate(model, dataset, details=False, features_of=lambda sample: tests[sample.path])
    print(f"{preset}: features {extraction_seconds:.0f} s, fitted and calibrated in {fit_seconds:.1f} s")
    print(evaluation.table(), flush=True)
    normal = [sample for sample in dataset.test if not sample.is_anomalous]
    alarms = []
    for seed in range(arguments.splits):
        split = GaussianModel(model.config.replace(seed=seed, grids=None)) if seed else model
        if seed:
            split.fit(features, false_alarm_rate=RATES[0])
        calibration = split.calibration
        assert calibration is not None
        images = [densities(split, tests[sample.path], None)[0] for sample in normal]
        scores = torch.cat([calibration.scores_alone(image, split.config.msk_size) for image in images])
        groups = torch.cat([image.group_ids for image in images])
        for rate in RATES:
            calibration.false_alarm_rate = rate
            _, is_anomalous, _, attainable = calibration.judge(scores, groups)
            alarms.append(
                {
                    "seed": seed,
                    "rate": rate,
                    "attainable": float(attainable.mean()),
                    "calibration_images": len(calibration.scores),
                    "normal_images": len(normal),
                    "false_alarms": int(is_anomalous.sum()),
                    "binomial_interval_95": [int(binom.ppf(q, len(normal), rate)) for q in (0.025, 0.975)],
                    "interval_95_with_calibration": expected_alarms(calibration, groups, rate),
                }
            )
            print(alarms[-1], flush=True)
    times = None if isinstance(model.encoder, CompositeBackbone) else verdict_times(model, dataset.test)
    print(f"verdict: {times}", flush=True)
    return {
        "verdict": times,
        "extraction_seconds": round(extraction_seconds, 1),
        "features_were_cached": bool(cache),
        "fit_seconds": round(fit_seconds, 2),
        "training_images": len(features),
        "false_alarms": alarms,
        **evaluation.to_dict(details=False),
    }


@torch.no_grad()
def verdict_times(model: GaussianModel, samples: Sequence[Any]) -> dict[str, Any]:
    """Return the median times of a verdict and of the backbone, in milliseconds, of images from all over the test set.

    An image is in memory already, as the backbone sees it.
    """
    backbone: Any = model.encoder
    fast = streamlined(backbone.net)
    images = [preprocess(read_image(s.path), model.config) for s in samples[:: max(1, len(samples) // TIMED_IMAGES)]]
    scorer = Scorer(model, frame_size=(images[0].shape[1], images[0].shape[2]))
    times: dict[str, list[float]] = {"backbone": [], "verdict": [], "timm": []}
    for image in images * (1 + TIMED_ROUNDS):
        x = backbone.normalize(image[None])
        for name, function, argument in (
            ("backbone", fast, x.contiguous(memory_format=torch.channels_last)),
            ("verdict", scorer, image),
            ("timm", backbone.net, x),
        ):
            start = time.perf_counter()
            function(argument)
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(each[len(images) :]) for name, each in times.items()}
    return {
        "images": len(images),
        "threads": torch.get_num_threads(),
        **{f"{name}_ms": round(1e3 * seconds, 2) for name, seconds in medians.items()},
        "verdict_over_backbone": round(medians["verdict"] / medians["backbone"], 2),
        "verdict_over_timm": round(medians["verdict"] / medians["timm"], 2),
    }


def expected_alarms(calibration: Any, groups: torch.Tensor, rate: float) -> list[int]:
    """Return the 95% interval of the number of false alarms, with the chance in the draw of calibration images.

    A threshold is exceeded by a share of new images that follows a beta distribution, as it is one of n scores in
    order: so the alarms among the images of a group are beta-binomial. Groups are independent.
    """
    chances = np.ones(1)
    for k in groups.unique().tolist():
        n, images = len(calibration._reference(k)), int((groups == k).sum())
        alarms = max(1, int(rate * (n + 1) + 1e-9))  # that n + 1 normal images may raise
        chances = np.convolve(chances, betabinom.pmf(np.arange(images + 1), images, alarms, n + 1 - alarms))
    cumulated = chances.cumsum()
    return [int((cumulated < quantile).sum()) for quantile in (0.025, 0.975)]


if __name__ == "__main__":
    main()
