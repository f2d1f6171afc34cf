"""How often `Monitor` reports a change where there is none, and how soon where there is one, on a dataset.

    python -m benchmarks.drift ROOT --output FILE

ROOT is a dataset in the MVTec AD layout; weights come from an installed package (extra [demo]). The place Gaussian is
fitted and calibrated on several divisions of the training images, and scores the normal test images as they are and
changed, under their own class. A run of a camera is drawn from these images with replacement.

"exchangeable": calibration scores and a run of 10 000 are both drawn from the scores of all normal images that were not
trained on, smoothed by a normal kernel so that none is twice: by construction nothing has changed. "as they are": the
normal test images, by the p-values that the calibrated model gives them: how far a monitor can be trusted where
calibration and test images are as alike as they are in practice. Delays are numbers of changed images until the change
is found: from the first image of a run on, or after 1000 unchanged ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.stats import binom, ks_2samp
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from hgad_fast import GaussianConfig, GaussianModel, Monitor
from hgad_fast.bench import measure
from hgad_fast.data.datasets import discover
from hgad_fast.data.images import read_image
from hgad_fast.features.extract import feature_set
from hgad_fast.features.preprocess import preprocess, seen_features
from hgad_fast.files import replacing
from hgad_fast.scoring.densities import densities

ALPHA = 0.01
UNCHANGED = 10_000  # images of a run in which nothing changes
BEFORE = 1000  # unchanged images before a change
LONGEST = 2000  # changed images, after which a change is missed

Values = NDArray[np.float64]


def blurred(image: Tensor, sigma: float) -> Tensor:
    return gaussian_blur(image, [2 * int(3 * sigma) + 1] * 2, [sigma, sigma])


def shifted(image: Tensor, pixels: int) -> Tensor:
    return F.pad(image[None], (pixels,) * 4, mode="reflect")[0][:, : image.shape[1], : image.shape[2]]


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {  # of an image (3, h, w) in [0, 1] as the backbone sees it
    "brightness +10%": lambda image: (1.1 * image).clamp(max=1),
    "brightness +25%": lambda image: (1.25 * image).clamp(max=1),
    "brightness -25%": lambda image: 0.75 * image,
    "blur, sigma 1 pixel": lambda image: blurred(image, 1.0),
    "blur, sigma 2 pixels": lambda image: blurred(image, 2.0),
    "shift, 4 pixels": lambda image: shifted(image, 4),
    "shift, 16 pixels": lambda image: shifted(image, 16),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="the dataset")
    parser.add_argument("--splits", type=int, default=5, help="divisions into training and calibration images")
    parser.add_argument("--runs", type=int, default=40, help="runs of each division")
    parser.add_argument("--output", type=Path, help="write the figures as JSON here")
    arguments = parser.parse_args()
    splits = scored(arguments.root, arguments.splits)
    generator = np.random.default_rng(0)
    record = {
        "dataset": arguments.root.name,
        **measure.about_run(torch.device("cpu")),
        "alpha": ALPHA,
        "unchanged_images": UNCHANGED,
        "exchangeable": exchangeable(splits, arguments.runs, generator),
        "as_they_are": as_they_are(splits, arguments.runs, generator),
        "delays": delays(splits, max(arguments.runs // 4, 1), generator),
    }
    print(json.dumps(record, indent=2))
    if arguments.output is not None:
        with replacing(arguments.output) as file:
            file.write_text(json.dumps(record, indent=2) + "\n")


@torch.no_grad()
def scored(root: Path, splits: int) -> list[dict[str, Any]]:
    """Return the calibration scores of each division, and scores and p-values of images as they are and changed."""
    dataset = discover(root)
    config = GaussianConfig.preset(
        "gaussian",
        n_classes=len(dataset.class_names),
        class_names=dataset.class_names,
        backbone_weights="packaged",
        center_crop=True,
    )
    model = GaussianModel(config)
    training = feature_set(model, dataset)
    normal = [sample for sample in dataset.test if not sample.is_anomalous]
    own = torch.tensor([sample.class_id for sample in normal])
    seen = [preprocess(read_image(sample.path), model.config) for sample in normal]
    kinds = {"unchanged": [seen_features(model, image) for image in seen]}
    for name, change in CHANGES.items():
        kinds[name] = [seen_features(model, change(image)) for image in seen]
    results = []
    for seed in range(splits):
        split = GaussianModel(config.replace(seed=seed), encoder=model.encoder)
        split.fit(training)
        calibration = split.calibration
        assert calibration is not None
        result: dict[str, Any] = {
            "calibration": (calibration.scores.double().numpy(), calibration.class_ids.numpy()),
            "names": dataset.class_names,
            "model": split,
        }
        classes = dict.fromkeys(kinds, own) | {"another class": (own + 1) % config.n_classes}
        for name, ids in classes.items():
            features = kinds.get(name, kinds["unchanged"])
            scores = torch.cat(
                [
                    calibration.scores_alone(densities(split, levels, ids[i : i + 1])[0], config.msk_size)
                    for i, levels in enumerate(features)
                ]
            )
            p_values = calibration.judge(scores, ids)[0]
            result[name] = scores.double().numpy(), p_values.numpy(), ids.numpy()
        results.append(result)
        print(f"division {seed}", flush=True)
    return results


def exchangeable(splits: list[dict[str, Any]], runs: int, generator: np.random.Generator) -> dict[str, Any]:
    """Return how many monitors report a change where calibration and run are drawn from the same scores."""
    alarms, count = 0, 0
    for split in splits:
        scores, ids = split["calibration"]
        test_scores, _, test_ids = split["unchanged"]
        for _ in range(runs):
            k = int(generator.integers(len(split["names"])))
            population = np.concatenate([scores[ids == k], test_scores[test_ids == k]])
            n = int((ids == k).sum())
            width = population.std() * len(population) ** -0.2
            drawn = generator.choice(population, n + UNCHANGED) + width * generator.standard_normal(n + UNCHANGED)
            above = n - np.searchsorted(np.sort(drawn[:n]), drawn[n:])
            alarms += run((1 + above) / (n + 1), None, Monitor(ALPHA, references=n)).changed
            count += 1
    return {"runs": count, "alarms": alarms, "at_most_by_chance": int(binom.ppf(0.975, count, ALPHA))}


def as_they_are(splits: list[dict[str, Any]], runs: int, generator: np.random.Generator) -> dict[str, Any]:
    """Return how many monitors report a change of normal test images, of all classes mixed and of each."""
    alarms: dict[str, int] = {}
    differences: dict[str, list[float]] = {}
    for split in splits:
        scores, p_values, ids = split["unchanged"]
        calibration, calibration_ids = split["calibration"]
        for k, name in ((None, "all classes"), *enumerate(split["names"])):
            rows = np.arange(len(ids)) if k is None else np.flatnonzero(ids == k)
            for _ in range(max(runs // 4, 1)):
                drawn = generator.choice(rows, UNCHANGED)
                alarms[name] = (
                    alarms.get(name, 0) + run(p_values[drawn], ids[drawn], Monitor.of(split["model"], ALPHA)).changed
                )
            if k is not None:
                test = ks_2samp(calibration[calibration_ids == k], scores[rows])
                differences.setdefault(name, []).append(float(test.pvalue))
    return {
        "runs_each": len(splits) * max(runs // 4, 1),
        "alarms": alarms,
        "kolmogorov_smirnov_p_of_calibration_and_test": differences,
    }


def delays(splits: list[dict[str, Any]], runs: int, generator: np.random.Generator) -> dict[str, Any]:
    """Return after how many changed images a change is found: the median, the slowest, and how often it is missed."""
    changes = [name for name in splits[0] if name not in ("calibration", "names", "model", "unchanged")]
    figures: dict[str, Any] = {}
    for name in [*changes, "another class, one image in five"]:
        mixed = name.endswith("one image in five")
        for title, before in (("from the start", 0), (f"after {BEFORE} images", BEFORE)):
            found: list[int] = []
            early = 0
            for split in splits:
                _, p_values, ids = split["unchanged"]
                _, changed_p, changed_ids = split["another class" if mixed else name]
                for _ in range(runs):
                    first = generator.integers(len(p_values), size=before)
                    then = generator.integers(len(changed_p), size=LONGEST)
                    is_changed = generator.random(LONGEST) < (0.2 if mixed else 1)
                    later_p = np.where(is_changed, changed_p[then], p_values[then])
                    later_ids = np.where(is_changed, changed_ids[then], ids[then])
                    p_of_run = np.concatenate([p_values[first], later_p])
                    ids_of_run = np.concatenate([ids[first], later_ids])
                    state = run(p_of_run, ids_of_run, Monitor.of(split["model"], ALPHA))
                    if state.found_at is not None and state.found_at < before:
                        early += 1
                    else:
                        found.append(LONGEST if state.found_at is None else state.found_at - before + 1)
            seen = [delay for delay in found if delay < LONGEST]
            figures.setdefault(name, {})[title] = {
                "runs": len(found),
                "median": statistics.median(found) if len(seen) > len(found) / 2 else None,
                "ninth_decile": sorted(found)[int(0.9 * len(found))] if len(seen) > 0.9 * len(found) else None,
                "missed": len(found) - len(seen),
                "alarms_before": early,
            }
        print(name, figures[name], flush=True)
    return figures


def run(p_values: Values, ids: NDArray[np.int64] | None, monitor: Monitor) -> Any:
    """Return the state of a monitor when it reports a change, or at the end."""
    for start in range(0, len(p_values), 50):
        part = slice(start, start + 50)
        if monitor.update(p_values[part], None if ids is None else ids[part]).changed:
            break
    return monitor.state


if __name__ == "__main__":
    main()
