"""Groups of unsorted images, and defects among training images: `python -m benchmarks.curation ROOT --output FILE`.

The training images of all classes of a dataset lie in one folder, as links with names drawn at random, and
`hgad_fast.curation.clusters` groups them with K = auto: all classes, all but one, and each class alone. The purity is
the share of images whose class has most of their group. Beside it is what k-means of whitened features finds.

Then defects of the test images are mixed into the training images of each class, so that they are 5% of them, drawn
with a seed, and `hgad_fast.curation.suspects` ranks them: which share of the defects is among the first 5% and 10%?
`detected` are the classes whose defects the trained detector finds: with an image AUROC above 0.85 by a record of
`benchmarks.gaussian`. What FILE holds already is not computed again, so that a run may be cut; `commit` stands beside
each figure, and the environment is that of the last run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hgad_fast import GaussianConfig
from hgad_fast.bench import measure
from hgad_fast.curation.clusters import _best_groups, cluster
from hgad_fast.curation.source import features_of, model_of
from hgad_fast.curation.suspects import suspects
from hgad_fast.data.datasets import Dataset, Sample, discover
from hgad_fast.files import replacing

MIXED = 0.05  # share of defects among the training images
FIRST = (0.05, 0.1)  # shares of the ranking
DETECTED = 0.85  # least image AUROC
RECORD = Path(__file__).parent / "results" / "inspection5-gaussian.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="the dataset")
    parser.add_argument("--seeds", type=int, default=3, help="draws of defects for each class (default: 3)")
    parser.add_argument("--parts", nargs="+", default=["clusters", "suspects"], choices=["clusters", "suspects"])
    parser.add_argument("--detector", type=Path, default=RECORD, help="record of benchmarks.gaussian on the dataset")
    parser.add_argument("--cache-dir", type=Path, help="keep features here, for another run")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write, or to go on with")
    arguments = parser.parse_args()
    dataset = discover(arguments.root)
    known = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    about = measure.about_run(torch.device("cpu"))
    record: dict[str, Any] = {
        "dataset": arguments.root.name,
        **about,
        "clusters": known.get("clusters", {}),
        "suspects": known.get("suspects", {}),
        "summary": {},
    }
    cache = {} if arguments.cache_dir is None else {"cache": "disk", "cache_dir": arguments.cache_dir}

    def save() -> None:
        record["summary"] = summary(record, arguments.detector)
        with replacing(arguments.output) as file:
            file.write_text(json.dumps(record, indent=2) + "\n")

    count = len(dataset.class_names)
    sets = [tuple(range(count))] + [(k,) for k in range(count)]
    sets += list(itertools.combinations(range(count), count - 1)) if count > 2 else []
    for chosen in sets if "clusters" in arguments.parts else []:
        name = ", ".join(dataset.class_names[k] for k in chosen)
        if name not in record["clusters"]:
            record["clusters"][name] = groups(dataset, chosen, cache) | {"commit": about["commit"]}
            print(name, record["clusters"][name], flush=True)
            save()
    for seed, k in itertools.product(range(arguments.seeds), range(count)) if "suspects" in arguments.parts else []:
        of_class = record["suspects"].setdefault(dataset.class_names[k], {})
        if f"seed {seed}" not in of_class:
            of_class[f"seed {seed}"] = mixed(dataset, k, seed, cache) | {"commit": about["commit"]}
            print(dataset.class_names[k], seed, of_class[f"seed {seed}"], flush=True)
            save()
    save()
    print(json.dumps(record["summary"], indent=2))


def groups(dataset: Dataset, chosen: Sequence[int], cache: dict[str, Any]) -> dict[str, Any]:
    """Return how the training images of some classes are grouped, which lie in one folder under drawn names."""
    samples = [sample for sample in dataset.train if sample.class_id in chosen]
    names = np.random.default_rng(0).permutation(len(samples))
    classes = {f"{name:05}{sample.path.suffix}": sample.class_id for name, sample in zip(names, samples, strict=True)}
    with tempfile.TemporaryDirectory() as folder:
        for name, sample in zip(classes, samples, strict=True):
            os.symlink(sample.path.resolve(), Path(folder, name))
        start = time.perf_counter()
        found = cluster(folder, config=config(), **cache)
        seconds = time.perf_counter() - start
    labels = {path.name: number for number, group in enumerate(found.groups) for path in group}
    result: dict[str, Any] = {
        "images": len(samples),
        "groups": [len(group) for group in found.groups],
        "purity": purity([labels[name] for name in classes], list(classes.values())),
        "silhouettes": {k: round(value, 4) for k, value in found.silhouettes.items()},
        "seconds": round(seconds, 1),
        "features_were_cached": bool(cache),
    }
    if len(chosen) == len(dataset.class_names):
        result["whitened"] = whitened(dataset, cache)
    return result


def whitened(dataset: Dataset, cache: dict[str, Any]) -> dict[str, Any]:
    """Return what the same rule finds by the means of features that are whitened, all components with a variance of 1.

    It takes the K of the largest silhouette, whether that is reasonable or not.
    """
    model = model_of(config(), None)
    samples, features = features_of(model, dataset.root, dataset.train, None, cache)
    model._fit_whitenings(features)
    (whitening,) = model.whitenings
    means = torch.stack([features.images[i][0].mean((1, 2)) for i in range(len(features))])
    vectors = whitening(means).double().numpy()
    _, silhouettes = _best_groups(vectors)
    return {"silhouettes": {k: round(value, 4) for k, value in silhouettes.items()}}


def mixed(dataset: Dataset, class_id: int, seed: int, cache: dict[str, Any]) -> dict[str, Any]:
    """Return which share of the defects mixed into the training images of a class is among the first of the ranking."""
    normal = [sample for sample in dataset.train if sample.class_id == class_id]
    defects = [sample for sample in dataset.test if sample.class_id == class_id and sample.is_anomalous]
    count = round(len(normal) * MIXED / (1 - MIXED))
    drawn = np.random.default_rng(seed).choice(len(defects), count, replace=False)
    wrong = {defects[i].path for i in drawn}
    train = (*normal, *(Sample(path, class_id) for path in sorted(wrong)))
    one_class = replace(
        dataset,
        class_names=(dataset.class_names[class_id],),
        train=tuple(replace(sample, class_id=0) for sample in train),
        test=(),
        validation=(),
    )
    start = time.perf_counter()
    ranking = suspects(one_class, config=config(), **cache)
    places = [row.rank for row in ranking.rows if row.path in wrong]
    shares = {
        f"in_first_{share:.0%}": float(np.mean(np.array(places) <= math.ceil(share * len(train)))) for share in FIRST
    }
    return {
        "images": len(train),
        "defects": count,
        **{name: round(share, 4) for name, share in shares.items()},
        "seconds": round(time.perf_counter() - start, 1),
        "features_were_cached": bool(cache),
    }


def summary(record: dict[str, Any], detector: Path) -> dict[str, Any]:
    """Return the figures of all classes together."""
    of_detector = json.loads(detector.read_text())["presets"]["gaussian"]["protocols"]["honest"]["classes"]
    aurocs = {name: of_detector[name]["image_auroc"] for name in record["suspects"]}
    detected = [name for name, auroc in aurocs.items() if auroc > DETECTED]
    means: dict[str, Any] = {}
    for share in FIRST:
        key = f"in_first_{share:.0%}"
        by_class = {name: np.mean([run[key] for run in runs.values()]) for name, runs in record["suspects"].items()}
        means[key] = {name: round(float(mean), 4) for name, mean in by_class.items()}
        if detected:
            means[key]["mean of detected"] = round(float(np.mean([by_class[name] for name in detected])), 4)
            means[key]["mean of all"] = round(float(np.mean(list(by_class.values()))), 4)
    return {
        "image_auroc": {name: round(auroc, 4) for name, auroc in aurocs.items()},
        "detected": detected,
        **means,
    }


def purity(groups: Sequence[int], classes: Sequence[int]) -> float:
    """Return the share of images whose class has most images of their group."""
    members = Counter(zip(groups, classes, strict=True))
    most = {group: max(count for (own, _), count in members.items() if own == group) for group in set(groups)}
    return round(sum(most.values()) / len(groups), 4)


def config() -> GaussianConfig:
    return GaussianConfig.preset("gaussian", backbone_weights="packaged")


if __name__ == "__main__":
    main()
