"""What each part of HGAD contributes: variants of one training, compared map by map (`hgad-fast ablate DATA`).

The likelihood map says where a pixel is improbable for its class. The entropy map says where the class is in doubt,
which only a model of several well-separated classes can tell: mutual information teaches it. Where a single Gaussian
maps all classes to one place (the "homogeneous mapping" of the paper), anomalous pixels land among the normal ones; the
histograms of log-density show by how much.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import data as pictures
from . import metrics, score
from .bench import environment
from .calibrate import Calibration, calibration_of, held_out_densities, largest
from .config import HGADConfig
from .evaluate import Features, mean, seen_mask, test_set, without_nan
from .features import FeatureSet, Progress, feature_set
from .files import replacing
from .model import HGADModel

VARIANTS: dict[str, dict[str, Any]] = {  # fields of the configuration that differ
    "single-gaussian": {"n_classes": 1, "class_names": ("all",), "n_intra_centers": 1, "loss_terms": ("L_g",)},
    "inter-class": {"n_intra_centers": 1, "loss_terms": ("L_g",)},
    "mutual-information": {"n_intra_centers": 1, "loss_terms": ("L_g", "L_mi", "L_e")},
    "hgad": {},
    "hgad-lambda2-1": {"lambda2": 1.0},
}
CENTRES = (1,)  # of a class, tried besides the configured number
MAPS = ("likelihood", "entropy", "product", "standardised")
SETTINGS = ("official", "class given", "class inferred")
SPLITS = 5  # of the held-out pictures, for the false-alarm rate
RATES = (0.05, 0.01)
STRIDE = 2  # of the pixels that the pixel AUROC looks at, in both directions


@dataclass(frozen=True)
class _Data:
    """What all variants share; `test` holds the features of each test picture."""

    dataset: pictures.Dataset
    train: FeatureSet
    held_out: FeatureSet
    test: list[list[Tensor]]


def run(
    data: pictures.Dataset | str,
    config: HGADConfig,
    output: str | Path,
    *,
    variants: Sequence[str] = tuple(VARIANTS),
    centres: Sequence[int] = CENTRES,
    training_pictures: int | None = None,
    features: FeatureSet | None = None,
    features_of: Features | None = None,
    device: str = "cpu",
    say: Callable[[str], None] = print,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train every variant on the same features and compare them on the test pictures.

    Written to `output`: the model and a histogram (``log-density.png``) of each variant in a folder of its own, and
    ``ablation.json``. A training that lies there already goes on where it stopped, or is not repeated.

    Args:
        data: a dataset with test pictures, or its root.
        config: what the variants have in common, with the dataset's classes.
        output: the folder, made if need be.
        variants: names of `VARIANTS`.
        centres: numbers of centres of a class that HGAD is trained with besides the configured one; its variants
            ``hgad-1-centre``, ``hgad-5-centres``, ...
        training_pictures: how many normal pictures of a class are trained on, drawn from ``config.seed``; the others
            calibrate. None: all but a tenth.
        features: features of all training pictures of the dataset, where they are at hand already.
        features_of: gives the features of a test picture, likewise.
        device: where to compute.
        say: told what comes next, and the table.
        progress: wraps the long loops over pictures, e.g. in a progress bar with the given title.

    Returns:
        What ``ablation.json`` holds: variant -> "figures" (setting -> map -> image and pixel AUROC, mean and per
        class), "confusion", "log_density_overlap" (of normal and anomalous pixels, by class and mean: 1 where the
        density cannot tell them apart, 0 where it does without fail) and "false_alarms". The settings are the official
        normalisation with the class given, and the calibrated one with the class given and inferred.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        ValueError: an unknown variant, centres below 1, a class without pictures to calibrate on, a dataset without
            test pictures, or a folder with the training of another configuration or of other pictures.
    """
    if unknown := [name for name in variants if name not in VARIANTS]:
        raise ValueError(f"there is no variant {unknown[0]!r}; there are {', '.join(VARIANTS)}")
    chosen = {name: config.replace(**VARIANTS[name]) for name in variants}
    chosen |= {f"hgad-{n}-centre{'s' * (n != 1)}": config.replace(n_intra_centers=n) for n in centres}
    progress = progress or (lambda items, title: items)
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("the ablation draws histograms, which need matplotlib: pip install 'hgad-fast[plot]'")
    base = HGADModel(config).to(device)
    dataset = test_set(base, data)
    say("features of the training pictures")
    normals = features or feature_set(base, dataset, progress=progress)
    rows, held_out = _drawn(normals.class_ids, base.class_names, training_pictures, config.seed)
    say("features of the test pictures")
    features_of = features_of or (lambda sample: score.picture_features(base, pictures.read_image(sample.path)))
    test = [list(features_of(sample)) for sample in progress(dataset.test, "test pictures")]
    shared = _Data(dataset, normals.subset(rows), normals.subset(held_out), test)
    found: dict[str, Any] = environment(torch.device(device))
    found |= {"config": json.loads(config.to_json()), "training_pictures": len(rows), "variants": {}}
    for name, its_config in chosen.items():
        folder = Path(output) / name
        model = _trained(its_config, shared, folder, device, say)
        say(f"{name}: comparing")
        found["variants"][name] = _compare(model, shared, folder, progress)
        with replacing(Path(output) / "ablation.json") as file:
            file.write_text(json.dumps(found, indent=2) + "\n")
    say(table(found))
    return found


def table(found: dict[str, Any]) -> str:
    """Mean image / pixel AUROC in percent, a row a variant and setting, a column a map."""
    lines = [f"{'mean AUROC in %, image / pixel':<38}" + "".join(f"{name:>16}" for name in MAPS)]
    for name, variant in found["variants"].items():
        for setting, maps in variant["figures"].items():
            cells = (maps[kind]["mean"] if kind in maps else None for kind in MAPS)
            texts = (" / ".join("-" if x is None else f"{100 * x:.1f}" for x in cell or [None]) for cell in cells)
            lines.append(f"{name + ', ' + setting:<38}" + "".join(f"{text:>16}" for text in texts))
    return "\n".join(lines)


def _drawn(class_ids: Tensor, names: Sequence[str], count: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on, `count` of each class, and the others."""
    generator = torch.Generator().manual_seed(seed)
    chosen: list[Tensor] = []
    others: list[Tensor] = []
    for k in class_ids.unique().tolist():
        members = (class_ids == k).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        n = len(members) - max(1, len(members) // 10) if count is None else count
        if not 0 < n < len(members):
            raise ValueError(
                f"class {names[k]!r} has {len(members)} training pictures, of which {n} cannot be trained on: at least "
                "one, and fewer than all, for the others calibrate"
            )
        chosen.append(members[:n])
        others.append(members[n:])
    return torch.cat(chosen).sort().values, torch.cat(others).sort().values


def _trained(config: HGADConfig, shared: _Data, folder: Path, device: str, say: Callable[[str], None]) -> HGADModel:
    say(f"{folder.name}: training")
    model = HGADModel(config.replace(calibration_fraction=0.0)).to(device)  # what calibrates is held out already
    model.fit(_known_as(model, shared.train), output_dir=folder, resume=True)
    return model


def _known_as(model: HGADModel, features: FeatureSet) -> FeatureSet:
    """The features with the classes that the model has: one for all, where it has one."""
    one = model.config.n_classes == 1
    return dataclasses.replace(features, class_ids=features.class_ids * 0) if one else features


def _compare(model: HGADModel, shared: _Data, folder: Path, progress: Progress) -> dict[str, Any]:
    dataset = shared.dataset
    held_out = held_out_densities(model, _known_as(model, shared.held_out), progress)
    ids = torch.tensor([sample.class_id for sample in dataset.test])
    own = ids * 0 if model.config.n_classes == 1 else ids
    tested = progress(list(zip(shared.test, own.tolist(), strict=True)), "densities of the test pictures")
    inferred, given = [], []
    for features, k in tested:
        inferred += score.densities(model, features, None)
        right = int(inferred[-1].class_id) == k
        given += inferred[-1:] if right else score.densities(model, features, torch.tensor([k]))
    model.calibration = _calibration(model, held_out, "standardised")
    classes = [(name, (ids == k).nonzero().flatten().tolist()) for k, name in enumerate(dataset.class_names)]
    classes = [(name, rows) for name, rows in classes if rows]
    figures: dict[str, dict[str, dict[str, Any]]] = {setting: {} for setting in SETTINGS}
    for name, rows in progress(classes, "maps of the test pictures"):
        samples = [dataset.test[i] for i in rows]
        for setting, densities in zip(SETTINGS, (given, given, inferred), strict=True):
            mine = [densities[i] for i in rows]
            maps = (_official if setting == "official" else _calibrated)(mine, model)
            for kind, values in maps.items():
                figures[setting].setdefault(kind, {})[name] = _aurocs(model, samples, values)
    for setting in SETTINGS:
        for rows_of_map in figures[setting].values():
            rows_of_map["mean"] = [mean(figures) for figures in zip(*rows_of_map.values(), strict=True)]
    names = [model.class_names[int(found.class_id)] for found in inferred]
    confusion = {
        name: {other: [names[i] for i in rows].count(other) for other in model.class_names} for name, rows in classes
    }
    found = {
        "figures": figures,
        "confusion": confusion,
        "log_density_overlap": _histogram(model, shared, given, folder / "log-density.png"),
        "false_alarms": _false_alarms(model, shared, held_out, inferred, progress),
    }
    return without_nan(found)


def _calibration(model: HGADModel, held_out: Sequence[score.Densities], fusion: str) -> Calibration:
    model.config = config = model.config.replace(fusion=fusion)
    level_max = largest(held_out, config.n_classes, config.feature_levels)
    return calibration_of(model, held_out, level_max, config.img_size)


def _likelihood(found: score.Densities) -> score.Densities:
    """As of a model of one class, whose map is the likelihood alone."""
    return dataclasses.replace(found, n_classes=1)


def _entropy(found: score.Densities) -> score.Densities:
    """The entropy in the place of the likelihood."""
    return dataclasses.replace(found, logps=found.neg_entropy, n_classes=1)


def _official(parts: list[score.Densities], model: HGADModel) -> dict[str, list[Tensor]]:
    size = model.config.msk_size
    maps = {"likelihood": score.official_maps([_likelihood(part) for part in parts], size)}
    if model.config.n_classes > 1:
        maps["entropy"] = score.official_maps([_entropy(part) for part in parts], size)
        maps["product"] = maps["likelihood"] * maps["entropy"]
    return {kind: list(values) for kind, values in maps.items()}


def _calibrated(parts: list[score.Densities], model: HGADModel) -> dict[str, list[Tensor]]:
    calibration, size = model.calibration, model.config.msk_size
    assert calibration is not None
    likelihood = [score.calibrated_maps(_likelihood(part), calibration.level_max, size)[0] for part in parts]
    if calibration.weights is None:  # one class
        return {"likelihood": likelihood}
    certain = torch.zeros_like(calibration.level_max)
    entropy = [score.calibrated_maps(_entropy(part), certain, size)[0] for part in parts]
    weights = [calibration.weights[int(part.class_id)] for part in parts]
    return {
        "likelihood": likelihood,
        "entropy": entropy,
        "product": [first * second for first, second in zip(likelihood, entropy, strict=True)],
        "standardised": [w[0] * a + w[1] * b for w, a, b in zip(weights, likelihood, entropy, strict=True)],
    }


def _aurocs(model: HGADModel, samples: list[pictures.Sample], maps: list[Tensor]) -> tuple[float, float]:
    """Image and pixel AUROC of one class, NaN where its test set cannot tell."""
    labels = [sample.is_anomalous for sample in samples]
    image = metrics.auroc([float(m.max()) for m in maps], labels) if 0 < sum(labels) < len(labels) else math.nan
    told = [(s, m.cpu()) for s, m in zip(samples, maps, strict=True) if s.mask or not s.is_anomalous]
    truth = torch.cat([seen_mask(model, s, m)[::STRIDE, ::STRIDE].flatten() for s, m in told])
    if truth.all() or not truth.any():
        return image, math.nan
    return image, metrics.auroc(torch.cat([m[::STRIDE, ::STRIDE].flatten() for _, m in told]), truth)


def _false_alarms(
    model: HGADModel,
    shared: _Data,
    held_out: Sequence[score.Densities],
    inferred: list[score.Densities],
    progress: Progress,
) -> dict[str, Any]:
    """Pictures called anomalous over several calibrations, each on a third of the held-out pictures of every class."""
    anomalous = torch.tensor([sample.is_anomalous for sample in shared.dataset.test])
    class_ids = torch.cat([found.class_id for found in inferred])
    held_out_ids = torch.cat([found.class_id for found in held_out])
    splits: list[dict[str, Any]] = []
    for seed in progress(range(SPLITS), "false alarms"):
        generator, rows = torch.Generator().manual_seed(seed), []
        for k in held_out_ids.unique().tolist():
            members = (held_out_ids == k).nonzero().flatten()
            chosen = torch.randperm(len(members), generator=generator)[: max(1, len(members) // 3)]
            rows += members[chosen].tolist()
        calibration = _calibration(model, [held_out[i] for i in sorted(rows)], "product")
        scores = torch.stack([calibration.maps(found, model.config.msk_size).max() for found in inferred])
        for rate in RATES:
            calibration.false_alarm_rate = rate
            _, flagged, _, attainable = calibration.judge(scores, class_ids)
            splits.append(
                {
                    "seed": seed,
                    "nominal": rate,
                    "attainable": mean(attainable[~anomalous].tolist()),
                    "calibration_pictures": len(calibration.scores),
                    "normal_pictures": int((~anomalous).sum()),
                    "false_alarms": int(flagged[~anomalous].sum()),
                    "recall": mean(flagged[anomalous].tolist()),
                }
            )
    pooled = {}
    for rate in RATES:
        mine = [split for split in splits if split["nominal"] == rate]
        alarms, pictures_seen = (sum(s[key] for s in mine) for key in ("false_alarms", "normal_pictures"))
        pooled[str(rate)] = {
            "false_alarm_rate": alarms / pictures_seen if pictures_seen else None,
            "recall": mean(s["recall"] for s in mine),
            "interval_95_of_one_split": _binomial(rate, mine[0]["normal_pictures"]),
        }
    return {"splits": splits, "pooled": pooled}


def _binomial(rate: float, n: int) -> list[float]:
    """Where 95% of the shares lie that n pictures give at a rate."""
    from scipy.stats import binom

    return [float(binom.ppf(q, n, rate)) / max(n, 1) for q in (0.025, 0.975)]


def _histogram(model: HGADModel, shared: _Data, given: list[score.Densities], path: Path) -> dict[str, float]:
    """Draw the log-density over C of normal and anomalous pixels of the finest level, a panel a class.

    Returns how much of the two distributions overlaps, by class and mean.
    """
    from matplotlib.figure import Figure

    names = shared.dataset.class_names
    overlap: dict[str, float] = {}
    figure = Figure(figsize=(3 * len(names), 2.6), layout="constrained")
    for k, (name, axes) in enumerate(zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True)):
        pixels: dict[bool, list[Tensor]] = {False: [], True: []}
        for sample, found in zip(shared.dataset.test, given, strict=True):
            if sample.class_id == k and (sample.mask or not sample.is_anomalous):
                density = found.logps[0][0].cpu()
                mask = seen_mask(model, sample, density)
                for is_anomalous, some in pixels.items():
                    some.append(density[mask == is_anomalous])
        both = {key: torch.cat(some).numpy() for key, some in pixels.items() if any(map(len, some))}
        edges = np.histogram_bin_edges(np.concatenate([np.empty(0), *both.values()]), bins=60)
        shares = []
        for is_anomalous, values in both.items():
            label = "anomalous" if is_anomalous else "normal"
            density, *_ = axes.hist(values, edges, density=True, histtype="stepfilled", alpha=0.5, label=label)
            shares.append(density * np.diff(edges))
        overlap[name] = float(np.minimum(*shares).sum()) if len(shares) == 2 else math.nan
        axes.set(title=name, xlabel="log-density / C", yticks=[])
    axes.legend()
    with replacing(path) as file:
        figure.savefig(file, dpi=100)
    return overlap | {"mean": mean(overlap.values())}
