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
images as for many: with a small subset they weigh on ours. The checkpoints of all meta-epochs are counted, though
few are written.

Processor time, all threads and the official loader's workers together, stands beside wall time: with one thread
(OMP_NUM_THREADS=1) it hardly depends on what else the machine does.

The figures in `results/end-to-end.json` are of two cores and nothing else running, some five minutes a line:

    python -m benchmarks.end_to_end ROOT --backbone lite0 --images 250 --output benchmarks/results/end-to-end.json
    python -m benchmarks.end_to_end ROOT --backbone b6 --images 64 --output benchmarks/results/end-to-end.json

and once more each with `--precision bf16`, which is ours alone: the official procedure computes in float32.
"""

from __future__ import annotations

import argparse
import json
import resource
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
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32", help="of our flow's products")
    parser.add_argument("--output", type=Path, help="JSON file to add the figures to")
    arguments = parser.parse_args()
    dataset = datasets.discover(arguments.root)
    count = min(arguments.images, len(dataset.train))
    subset = replace(dataset, train=[dataset.train[i * len(dataset.train) // count] for i in range(count)])
    for backbone in arguments.backbone or BACKBONES:
        with tempfile.TemporaryDirectory() as folder:
            comparison = compare(backbone, subset, Path(folder), arguments.precision)
        name = backbone if arguments.precision == "fp32" else f"{backbone} {arguments.precision}"
        comparison |= {"dataset": dataset.root.name, "images": len(subset.train), "of": len(dataset.train)}
        print(json.dumps({name: comparison}, indent=2), flush=True)
        if arguments.output is not None:
            known = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
            with replacing(arguments.output) as file:
                file.write_text(json.dumps(known | {name: comparison}, indent=2) + "\n")


class Times:
    """Seconds of the passes of one contender, by stage: wall time, and processor time of those where it is known."""

    def __init__(self) -> None:
        self.wall: dict[int, list[float]] = defaultdict(list)
        self.processor: dict[int, list[float]] = defaultdict(list)

    def rounded(self) -> dict[str, dict[int, list[float]]]:
        return {
            name: {stage: [round(value, 2) for value in values] for stage, values in seconds.items()}
            for name, seconds in (("wall", self.wall), ("processor", self.processor))
        }


def compare(backbone: str, dataset: datasets.Dataset, folder: Path, precision: str = "fp32") -> dict[str, Any]:
    arch, meta_epochs, sub_epochs = BACKBONES[backbone]
    weights = str(demo.write_weights(folder / "lite0.safetensors")) if backbone == "lite0" else None
    ours, theirs = Times(), Times()
    checkpoints: list[float] = []  # wall seconds between two meta-epochs
    losses: dict[str, list[float]] = {}

    start = last = time.perf_counter(), time.process_time()
    config = HGADConfig(
        n_classes=len(dataset.class_names),
        class_names=dataset.class_names,
        backbone_arch=arch,
        backbone_weights=weights,
        img_size=256,
        center_crop=True,
        meta_epochs=WARM_UP_EPOCHS + MEASURED[0],
        sub_epochs=MEASURED[1],
        precision=precision,
    )
    model = HGADModel(config)
    rows, _ = split(
        torch.tensor([sample.class_id for sample in dataset.train]), config.calibration_fraction, config.seed
    )
    official = Official(model, [dataset.train[i] for i in rows])
    official_processor = 0.0

    def official_pass(record: dict[str, Any]) -> None:
        nonlocal last, official_processor
        wall, processor = time.perf_counter(), time.process_time()
        ours.wall[record["stage"]].append(record["seconds"])
        if record["sub_epoch"] > 0:  # else a checkpoint, or the making of the features, came in between
            ours.processor[record["stage"]].append(processor - last[1])
        elif record["meta_epoch"] > 0:
            checkpoints.append(wall - last[0] - record["seconds"])
        losses["hgad_fast"] = [sum(level.values()) for level in record["losses"]]
        losses["official"] = official.train(record["stage"], record["meta_epoch"], record["sub_epoch"])
        last = time.perf_counter(), time.process_time()
        theirs.wall[record["stage"]].append(last[0] - wall)
        theirs.processor[record["stage"]].append(last[1] - processor)
        official_processor += last[1] - processor

    model.fit(dataset, output_dir=folder / "run", callbacks=[official_pass])
    whole, whole_processor = time.perf_counter() - start[0], time.process_time() - start[1]
    decoding = official.end() / sum(map(len, theirs.wall.values()))
    theirs.processor = {stage: [value + decoding for value in values] for stage, values in theirs.processor.items()}

    passes = {1: WARM_UP_EPOCHS * sub_epochs, 2: (meta_epochs - WARM_UP_EPOCHS) * sub_epochs}
    more_checkpoints = statistics.median(checkpoints) * (meta_epochs - config.meta_epochs)
    without = whole - sum(map(sum, (*ours.wall.values(), *theirs.wall.values()))) + more_checkpoints
    own_passes = {stage: len(values) for stage, values in ours.wall.items()}
    without_processor = whole_processor - official_processor - _extrapolated(ours.processor, own_passes)
    seconds = {"hgad_fast": without + _extrapolated(ours.wall, passes), "official": _extrapolated(theirs.wall, passes)}
    processor_seconds = {  # a checkpoint takes no more of the processor than of the time
        "hgad_fast": without_processor + more_checkpoints + _extrapolated(ours.processor, passes),
        "official": _extrapolated(theirs.processor, passes),
    }
    return {
        "backbone": arch,
        "weights": "random" if weights is None else "ImageNet",
        "img_size": config.img_size,
        "precision of hgad_fast": precision,
        "passes": meta_epochs * sub_epochs,
        "seconds of passes, by stage": {"hgad_fast": ours.rounded(), "official": theirs.rounded()},
        "seconds of a checkpoint": round(statistics.median(checkpoints), 2),
        "seconds of fit without its passes": round(without, 2),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "speedup": round(seconds["official"] / seconds["hgad_fast"], 2),
        "processor seconds of fit without its passes": round(without_processor + more_checkpoints, 2),
        "processor seconds": {name: round(value, 1) for name, value in processor_seconds.items()},
        "speedup in processor time": round(processor_seconds["official"] / processor_seconds["hgad_fast"], 2),
        "sum of the loss terms in the last pass, by level": losses,
        **measure.about_run(torch.device("cpu")),
    }


def _extrapolated(seconds: dict[int, list[float]], passes: dict[int, int]) -> float:
    return sum(statistics.median(seconds[stage]) * count for stage, count in passes.items())


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

    def end(self) -> float:
        """Stop the loader's workers; return the processor seconds that they have taken."""
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        before = usage.ru_utime + usage.ru_stime
        del self.loader  # with its workers, which count among the children when they have ended
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime - before

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
