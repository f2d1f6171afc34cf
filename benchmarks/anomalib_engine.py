"""Models of anomalib and ours by anomalib's Engine, on the same images: `python -m benchmarks.anomalib_engine ROOT`.

Each contender is fitted and tested as users of anomalib do it: `Engine.fit`, then `Engine.test` on all test images,
with anomalib's metrics in its Evaluator, fed by its post-processor. What is said of a class is computed from the images
of that class, and means are taken over the classes. `benchmarks.peers` compares detectors on equal terms instead:
the same crop, our metrics, costs measured one by one.

- `padim` and `patchcore` are one model for all classes: the datamodule Folder with a list of folders.
- `padim-each` and `patchcore-each` are one model a class: as many fits and files, which are added up, and an image is
  given to the model of its class, which therefore has to be known.
- `place-gaussian` and `hgad-fast` are ours, one model for all classes, by MultiClassFolder; they infer the class.

All have the backbone `tf_efficientnet_lite0` with the weights of `hgad_fast.demo.write_weights`. anomalib's defaults
are left alone (PatchCore: nine neighbours; batches of 32; images stretched to a square, antialiased) except for what
has to be set:

- the layers, of strides 8 and 16, PaDiM's number of features (all of them), for which it has no default with this
  backbone, and PatchCore's share of patches that are kept, for which see `benchmarks.peers`;
- mean and deviation of the images: those of the weights, and not ImageNet's;
- workers of the data loaders (none, so that all contenders have the same cores) and the visualizer (off).

Ours see images in proportions, 256 pixels on the short side, and have their presets. Their maps are resized to the
square of anomalib's before figures of pixels are computed, so that these stand on the same pixels and masks.

A verdict on an image is that of the threshold which a contender has out of the box. anomalib's post-processor takes the
one with the best F1 score on the validation set, and that consists of test images: of all with `same_as_test`, the
default of its datamodules in the MVTec AD layout, or of a half of them with `from_test`, Folder's own default, which
leaves the other half to test on. Ours are calibrated on normal training images that are held out, a tenth of them.

Fitting time is that of `Engine.fit`, from image files to thresholds: `validation_seconds` of it are the validations,
which set the thresholds, one an epoch. The size of a model is that of what `Engine.export` writes for torch.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.peers import (
    BACKBONE,
    CHANNELS,
    CPU,
    LARGE_BUFFERS,
    LAYERS,
    REPOSITORY,
    SEED,
    SIDE,
    chosen_images,
    give_weights,
    report,
)
from hgad_fast.data import datasets
from hgad_fast.data.datasets import GOOD, Dataset
from hgad_fast.data.masks import read_mask
from hgad_fast.environment import environment, package_versions

STAGES = (2, 3)  # of the backbone, that anomalib's models read: strides 8 and 16
OUR_PRESETS = {"PlaceGaussian": "gaussian", "HGAD": "fast"}
FIGURES = {
    "image AUROC": "image_AUROC",
    "F1": "image_F1Score",
    "pixel AUROC": "pixel_AUROC",
    "AUPRO@0.3": "pixel_AUPRO",
}
COUNTS = ("normal", "false_alarms", "anomalous", "misses")  # of test images and their verdicts
VALIDATION = {  # how images that thresholds are taken from are called in the table, by the split
    "same_as_test": "test images, all",
    "from_test": "test images, half",
    "held out of training": "held-out normal images",
}
KEPT_APART = ("commit", "date", "contenders")  # what may differ between a record and an earlier one of its setting
SUMS = ("validation_images", "fit_seconds", "validation_seconds", "test_seconds", "model_bytes", "checkpoint_bytes")


@dataclass(frozen=True)
class Contender:
    """A model of anomalib or of ours by its name there, and whether each class has one of its own."""

    model: str
    each: bool = False

    @property
    def is_ours(self) -> bool:
        return self.model in OUR_PRESETS


CONTENDERS = {
    "padim": Contender("Padim"),
    "padim-each": Contender("Padim", each=True),
    "patchcore": Contender("Patchcore"),
    "patchcore-each": Contender("Patchcore", each=True),
    "place-gaussian": Contender("PlaceGaussian"),
    "hgad-fast": Contender("HGAD"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="the dataset, in any layout that the library reads, with masks")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--weights", type=Path, help="of the backbone; default: those of the [demo] extra")
    parser.add_argument("--training-images", type=int, default=80, help="of each class, evenly spread; 0: all")
    parser.add_argument("--limit", type=int, help="test images of each class, normal and anomalous ones each")
    parser.add_argument("--coreset", type=float, default=0.01, help="share of the patches that PatchCore keeps")
    parser.add_argument("--validation", choices=("same_as_test", "from_test"), default="same_as_test")
    parser.add_argument("--epochs", type=int, help="of HGAD; default: those of its preset")
    parser.add_argument("--output", type=Path, help="write the figures as JSON here")
    parser.add_argument("--keep", action="store_true", help="contenders that the file --output has of this setting")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)  # contender, folder
    options = parser.parse_args(words)
    if options.child:
        warnings.simplefilter("ignore")
        for logger in ("lightning.pytorch", "anomalib"):
            logging.getLogger(logger).setLevel(logging.ERROR)
        name, folder = options.child
        (Path(folder) / f"{name}.json").write_text(json.dumps(outcome_of(name, Path(folder), options)))
        return
    if importlib.util.find_spec("anomalib") is None:
        raise ModuleNotFoundError(
            "anomalib is not installed, whose Engine this runs; pip install 'hgad-fast[anomalib]'"
        )
    report(options, words, run, table)


def run(options: argparse.Namespace, words: Sequence[str], folder: Path) -> dict[str, Any]:
    """Fit and test every contender in a process of its own, one after the other; return the record."""
    dataset = chosen_images(options)
    write_images(dataset, folder / "images")
    record: dict[str, Any] = environment(CPU)
    record["versions"] |= package_versions("anomalib", "lightning", "timm", "torchvision")
    record |= {
        "dataset": options.root.name,
        "classes": list(dataset.class_names),
        "training_images": len(dataset.train),
        "training_images_a_class": options.training_images or "all",
        "test_images": len(dataset.test),
        "side": SIDE,
        "coreset": options.coreset,
        "validation": options.validation,
        "epochs": options.epochs,
        "contenders": {},
    }
    if options.keep and options.output is not None and options.output.exists():
        record["contenders"] = kept(json.loads(options.output.read_text()), record, options.output)
    for name in options.contenders:
        if name in record["contenders"]:
            continue
        command = [sys.executable, "-m", "benchmarks.anomalib_engine", *words, "--child", name, str(folder)]
        search_path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        variables = os.environ | {"PYTHONPATH": search_path}
        if CONTENDERS[name].model == "Patchcore":
            variables |= LARGE_BUFFERS
        subprocess.run(command, env=variables, check=True, stdout=sys.stderr)
        outcome = json.loads((folder / f"{name}.json").read_text())
        record["contenders"][name] = outcome
        print(f"{name}: fitted in {outcome['fit_seconds']:.1f} s", file=sys.stderr, flush=True)
    return record


def kept(earlier: dict[str, Any], record: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the contenders of an earlier record, read from `file`, which has the setting of this one.

    Raises:
        ValueError: it has another setting.
    """
    differing = [name for name in record if name not in KEPT_APART and earlier.get(name) != record[name]]
    if differing:
        raise ValueError(
            f"{file} has other values of {', '.join(differing)}: give another --output, or leave out --keep"
        )
    return earlier["contenders"]


def write_images(dataset: Dataset, root: Path) -> None:
    """Write the images of a dataset in the MVTec AD layout: the files as they are, and the masks as 0 and 255.

    Raises:
        ValueError: an anomalous image has no mask, which anomalib's datamodule Folder would take for another's.
    """
    for split, samples in (("train", dataset.train), ("test", dataset.test)):
        for i, sample in enumerate(samples):
            folder = root / dataset.class_names[sample.class_id]
            path = folder / split / sample.defect / f"{i:05d}{sample.path.suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(sample.path, path)
            if sample.is_anomalous:
                if sample.mask is None:
                    raise ValueError(
                        f"{sample.path} has no mask; give each anomalous image one, as anomalib's Folder needs them"
                    )
                mask_path = folder / "ground_truth" / sample.defect / f"{i:05d}_mask.png"
                mask_path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(read_mask(sample.mask).numpy()).save(mask_path)


def outcome_of(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Fit and test a contender on the images under `folder`/images; return its figures, costs and settings."""
    contender, root = CONTENDERS[name], folder / "images"
    class_names = datasets.discover(root).class_names
    trials = [
        trial(contender, classes, root, folder / name / str(i), options)
        for i, classes in enumerate([(each,) for each in class_names] if contender.each else [class_names])
    ]
    by_class = {class_name: figures for each in trials for class_name, figures in each["by_class"].items()}
    outcome: dict[str, Any] = {"models": len(trials), "mean": means(by_class), "by_class": by_class}
    outcome |= {count: sum(figures[count] for figures in by_class.values()) for count in COUNTS}
    outcome |= {name: sum(each[name] for each in trials) for name in SUMS}
    if not contender.each:
        outcome["pooled"] = trials[0]["pooled"]
    outcome["validation"] = "held out of training" if contender.is_ours else options.validation
    return outcome | {"settings": trials[0]["settings"]}


def means(by_class: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the mean over the classes of each of `FIGURES`."""
    return {figure: sum(of[figure] for of in by_class.values()) / len(by_class) for figure in FIGURES.values()}


def trial(
    contender: Contender, classes: tuple[str, ...], root: Path, folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Fit a model to classes of the dataset in `root` and test it on them; what Engine writes goes to `folder`."""
    from anomalib.deploy import ExportType
    from anomalib.engine import Engine

    from benchmarks.anomalib_figures import ClassFigures, Stopwatch

    # the order of training images and of PaDiM's features, PatchCore's first patch and signs of its projection
    torch.manual_seed(SEED)
    np.random.seed(SEED)  # the rest of the projection, which scikit-learn draws
    figures, stopwatch = ClassFigures(datasets.discover(root), classes, SIDE), Stopwatch()
    if contender.is_ours:
        model, data, settings = ours(contender.model, root, figures, options)
    else:
        model, settings = peer(contender.model, figures, options)
        data = folders(root, classes, options.validation)
    engine = Engine(
        callbacks=[stopwatch],
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=options.epochs if contender.model == "HGAD" else None,
    )
    start = time.perf_counter()
    engine.fit(model=model, datamodule=data)
    fitted = time.perf_counter()
    checkpoint_bytes = Path(engine.best_model_path).stat().st_size
    # before the test, of which the evaluator keeps all maps
    exported = engine.export(model=model, export_type=ExportType.TORCH, export_root=folder / "exported")
    model_bytes = exported.stat().st_size
    start_of_test = time.perf_counter()
    [pooled] = engine.test(model=model, datamodule=data, verbose=False)
    test_seconds = time.perf_counter() - start_of_test
    return {
        "by_class": figures.by_class(),
        "pooled": dict(pooled),
        "fit_seconds": fitted - start,
        "validation_seconds": stopwatch.seconds,
        "test_seconds": test_seconds,
        "model_bytes": model_bytes,
        "checkpoint_bytes": checkpoint_bytes,
        "validation_images": len(data.val_data),
        "settings": settings | {"epochs": engine.trainer.max_epochs},
    }


def peer(kind: str, evaluator: Any, options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Return anomalib's model "Padim" or "Patchcore" with our weights, and its settings."""
    from anomalib import models
    from anomalib.pre_processing import PreProcessor
    from torchvision.transforms.v2 import Compose, Normalize, Resize

    settings: dict[str, Any] = {"backbone": BACKBONE, "layers": [LAYERS[stage] for stage in STAGES]}
    if kind == "Padim":
        settings["n_features"] = sum(CHANNELS[stage] for stage in STAGES)
    else:
        settings["coreset_sampling_ratio"] = options.coreset
    common = {"pre_trained": False, "evaluator": evaluator, "visualizer": False}
    model = getattr(models, kind)(**settings, **common)
    mean, std = give_weights(model.model, options.weights)
    model.pre_processor = PreProcessor(Compose([Resize((SIDE, SIDE), antialias=True), Normalize(mean, std)]))
    return model, settings | {"mean": mean, "std": std, "seed": SEED}


def folders(root: Path, classes: Iterable[str], validation: str) -> Any:
    """Return anomalib's datamodule of the images of these classes, which are in the MVTec AD layout."""
    from anomalib.data import Folder

    defects = [
        (class_name, path.name)
        for class_name in classes
        for path in sorted((root / class_name / "test").iterdir())
        if path.name != GOOD
    ]
    return Folder(
        name="chosen",
        root=root,
        normal_dir=[f"{class_name}/train/{GOOD}" for class_name in classes],
        normal_test_dir=[f"{class_name}/test/{GOOD}" for class_name in classes],
        abnormal_dir=[f"{class_name}/test/{defect}" for class_name, defect in defects],
        mask_dir=[f"{class_name}/ground_truth/{defect}" for class_name, defect in defects],
        val_split_mode=validation,
        num_workers=0,
        seed=SEED,
    )


def ours(kind: str, root: Path, evaluator: Any, options: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """Return our model "PlaceGaussian" or "HGAD", its datamodule, and its settings."""
    from hgad_fast import anomalib

    settings: dict[str, Any] = {"preset": OUR_PRESETS[kind], "backbone": BACKBONE, "img_size": SIDE, "seed": SEED}
    weights = str(options.weights)
    model = getattr(anomalib, kind)(**settings, backbone_weights=weights, evaluator=evaluator, visualizer=False)
    data = anomalib.MultiClassFolder(root, num_workers=0)
    return model, data, settings | {"false_alarm_rate": model.false_alarm_rate}


def table(record: Mapping[str, Any]) -> str:
    """Return the record as Markdown: a table of the means, one of the classes, and a line on the setting."""
    contenders: Mapping[str, Mapping[str, Any]] = record["contenders"]
    heads = ("model", "files", *FIGURES, "false alarms", "misses", "threshold from", "fit, s", "size, MB")
    rows = [heads, ("---", "---:", *("---:" for _ in FIGURES), "---:", "---:", "---", "---:", "---:")]
    for name, of in contenders.items():
        rows.append(
            (
                name,
                str(of["models"]),
                *percent(of["mean"], FIGURES.values()),
                f"{of['false_alarms']} of {of['normal']}",
                f"{of['misses']} of {of['anomalous']}",
                f"{of['validation_images']} {VALIDATION[of['validation']]}",
                f"{of['fit_seconds']:.0f}",
                f"{of['model_bytes'] / 1e6:.0f}",
            )
        )
    class_names = record["classes"]
    class_rows = [("image AUROC / AUPRO@0.3", *class_names), ("---", *("---:" for _ in class_names))]
    for name, of in contenders.items():
        cells = (" / ".join(percent(of["by_class"][each], ("image_AUROC", "pixel_AUPRO"))) for each in class_names)
        class_rows.append((name, *cells))
    setting = f"{record['training_images']} training and {record['test_images']} test images of {record['dataset']}, "
    setting += f"{len(class_names)} classes, {record['device']}, threads: {record['threads']}"
    return "\n\n".join((markdown(rows), markdown(class_rows), setting))


def percent(figures: Mapping[str, float], names: Iterable[str]) -> list[str]:
    """Return figures in percent, with one decimal."""
    return [f"{100 * figures[name]:.1f}" for name in names]


def markdown(rows: Iterable[Sequence[str]]) -> str:
    """Return rows of cells as the lines of a table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
