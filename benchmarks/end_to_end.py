"""Wall time from the start to the saved model, over the official procedure: `python -m benchmarks.end_to_end ROOT`.

ROOT is a dataset in the MVTec AD layout. Ours is `fit`: features once, then passes over them, calibration, model file.
The official procedure decodes every image and runs the backbone in every pass, builds the dense positional code for
every batch and level, and takes the levels one after the other, each with a backward pass and an optimizer step of its
own; its flow is made of FrEIA's blocks, its prior of every distance. After each pass of ours comes one of the official
procedure, in the same process, at the same learning rates. Both train on the same images; those that `fit` holds out
for its thresholds, and calibrates on, count for ours alone.

`lite0` is tf_efficientnet_lite0 for 16 passes, `b6` tf_efficientnet_b6 with random weights for 200 passes. Images are
a subset, the same for both, and passes are some of those: time is linear in both, as every batch is like every other,
and every pass like every other of its stage. So the wanted time is what `fit` takes without its passes (extraction,
calibration, files), plus the median pass of each stage times the number of such passes. Files take as long for a few
images as for many: with a small subset they weigh on ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hgad_fast import HGADConfig, HGADModel, demo
from hgad_fast.bench import measure, official
from hgad_fast.data import datasets
from hgad_fast.files import replacing
from hgad_fast.models.hgad import WARM_UP_EPOCHS
from hgad_fast.protocol import Progress
from hgad_fast.scoring.calibration import split
from hgad_fast.training.schedule import warmed_up_cosine

BACKBONES = {"lite0": ("tf_efficientnet_lite0", 16, 1), "b6": ("tf_efficientnet_b6", 25, 8)}  # meta-, sub-epochs
MEASURED = 2, 2  # meta-epochs of stage 2, sub-epochs of each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="the dataset")
    parser.add_argument("--backbone", choices=BACKBONES, action="append", help="default: both")
    parser.add_argument("--images", type=int, default=120, help="of the training images, evenly spread")
    parser.add_argument("--output", type=Path, help="JSON file to add the figures to")
    arguments = parser.parse_args()
    dataset = datasets.discover(arguments.root)
    step = max(1, len(dataset.train) // arguments.images)
    subset = replace(dataset, train=dataset.train[::step])
    for backbone in arguments.backbone or BACKBONES:
        with tempfile.TemporaryDirectory() as folder:
            comparison = compare(backbone, subset, Path(folder))
        comparison |= {"dataset": dataset.root.name, "images": len(subset.train), "of": len(dataset.train)}
        print(json.dumps({backbone: comparison}, indent=2), flush=True)
        if arguments.output is not None:
            known = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
            with replacing(arguments.output) as file:
                file.write_text(json.dumps(known | {backbone: comparison}, indent=2) + "\n")


def compare(backbone: str, dataset: datasets.Dataset, folder: Path) -> dict[str, Any]:
    arch, meta_epochs, sub_epochs = BACKBONES[backbone]
    weights = str(demo.write_weights(folder / "lite0.safetensors")) if backbone == "lite0" else None
    official_seconds: dict[int, list[float]] = defaultdict(list)
    our_seconds: dict[int, list[float]] = defaultdict(list)
    losses: dict[str, list[float]] = {}

    start = time.perf_counter()
    config = HGADConfig(
        n_classes=len(dataset.class_names),
        class_names=dataset.class_names,
        backbone_arch=arch,
        backbone_weights=weights,
        img_size=256,
        center_crop=True,
        meta_epochs=WARM_UP_EPOCHS + MEASURED[0],
        sub_epochs=MEASURED[1],
    )
    model = HGADModel(config)
    making = time.perf_counter() - start
    rows, _ = split(
        torch.tensor([sample.class_id for sample in dataset.train]), config.calibration_fraction, config.seed
    )
    official = Official(model, [dataset.train[i] for i in rows])

    def official_pass(record: dict[str, Any]) -> None:
        start = time.perf_counter()
        losses["hgad_fast"] = [sum(level.values()) for level in record["losses"]]
        losses["official"] = official.train(record["stage"], record["meta_epoch"], record["sub_epoch"])
        official_seconds[record["stage"]].append(time.perf_counter() - start)
        our_seconds[record["stage"]].append(record["seconds"])

    start = time.perf_counter()
    model.fit(dataset, output_dir=folder / "run", callbacks=[official_pass])
    whole = time.perf_counter() - start
    passes = {1: WARM_UP_EPOCHS * sub_epochs, 2: (meta_epochs - WARM_UP_EPOCHS) * sub_epochs}
    ours_without = making + whole - sum(map(sum, (*our_seconds.values(), *official_seconds.values())))
    ours = ours_without + _extrapolated(our_seconds, passes)
    theirs = _extrapolated(official_seconds, passes)
    return {
        "backbone": arch,
        "weights": "random" if weights is None else "ImageNet",
        "img_size": config.img_size,
        "passes": meta_epochs * sub_epochs,
        "seconds of passes, by stage": {"hgad_fast": _rounded(our_seconds), "official": _rounded(official_seconds)},
        "seconds of fit without its passes": round(ours_without, 2),
        "seconds": {"hgad_fast": round(ours, 1), "official": round(theirs, 1)},
        "speedup": round(theirs / ours, 2),
        "sum of the loss terms in the last pass, by level": losses,
        **measure.about_run(torch.device("cpu")),
    }


def _extrapolated(seconds: dict[int, list[float]], passes: dict[int, int]) -> float:
    return sum(statistics.median(seconds[stage]) * count for stage, count in passes.items())


def _rounded(seconds: dict[int, list[float]]) -> dict[int, list[float]]:
    return {stage: [round(value, 2) for value in values] for stage, values in seconds.items()}


class Official:
    """The official training loop, with the parameters that a model of ours starts from."""

    def __init__(self, model: HGADModel, samples: list[datasets.Sample]) -> None:
        self.config, self.encoder = model.config, model.require_encoder()
        self.levels = [official.OfficialLevel.of(model, level) for level in range(self.config.feature_levels)]
        self.optimizers = [level.optimizer() for level in self.levels]
        self.loader = DataLoader(
            _Images(samples, self.config.img_size, self.encoder.mean, self.encoder.std),
            batch_size=self.config.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=2,
            persistent_workers=True,
        )

    def train(self, stage: int, meta_epoch: int, sub_epoch: int) -> list[float]:
        """Make one pass; return the mean of the sum of the loss terms of each level."""
        totals = [0.0] * len(self.levels)
        for batch, (images, labels) in enumerate(self.loader):
            rate = warmed_up_cosine(
                Progress(meta_epoch, sub_epoch, batch, len(self.loader)), self.config, WARM_UP_EPOCHS
            )
            with torch.no_grad():
                features = self.encoder(images)
            for i, total in enumerate(self._step_levels(features, labels, stage, rate)):
                totals[i] += total / len(self.loader)
        return totals

    def _step_levels(self, features: list[Tensor], labels: Tensor, stage: int, rate: float) -> Iterator[float]:
        config = self.config
        for level, optimizer, x in zip(self.levels, self.optimizers, features, strict=True):
            batch, channels, h, w = x.shape
            position = official.dense_position(config.pos_embed_dim, batch, h, w)
            pixel_labels = labels.repeat_interleave(h * w)
            onehot = official.smoothed_onehot(pixel_labels, config.n_classes, config.label_smoothing)
            terms = level(x.permute(0, 2, 3, 1).reshape(-1, channels), pixel_labels, onehot, position, stage)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            official.official_loss(terms, config.lambda1, config.lambda2).backward()
            optimizer.step()
            yield sum(float(term.detach()) for term in terms.values())


class _Images(torch.utils.data.Dataset):
    """Return training images, prepared by torchvision as the official code does, and their classes."""

    def __init__(self, samples: list[datasets.Sample], img_size: int, mean: Tensor, std: Tensor) -> None:
        from torchvision import transforms as T

        self.samples = samples
        self.transform = T.Compose(
            [
                T.Resize(img_size, T.InterpolationMode.LANCZOS),
                T.CenterCrop(img_size),
                T.ToTensor(),
                T.Normalize(mean.flatten().tolist(), std.flatten().tolist()),
            ]
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.open(self.samples[i].path).convert("RGB")), self.samples[i].class_id


if __name__ == "__main__":
    main()
