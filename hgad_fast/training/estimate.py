"""What a training will take, said before it starts: seconds by part, and memory, measured in a few seconds on the spot.

Each part is timed as it will be run, on few and small images first: works grow until the next would take longer than
`BUDGET`, and what is left is extrapolated linearly. Nothing of the model changes, nor of the random state.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import methods
from ..data.datasets import Dataset, content_hash, discover
from ..data.images import read_header, read_image
from ..features.backbone import Backbone
from ..features.extract import DTYPES, FeatureSet, cached_contents
from ..features.preprocess import preprocess, seen_features, seen_shape
from ..files import byte_count, readable
from ..protocol import Detector, Progress
from ..scoring.calibration import calibration_of, held_out_densities, largest_densities, split
from ..terminal import duration
from .checkpoint import trained_tensors
from .drawing import pixel_count
from .processes import Processes
from .step import Step

BUDGET = 0.7  # seconds that one measurement may take, about; the first and smallest of each part may take longer
SMALLEST_SIDE = 128  # pixels of the short side of the smallest image that a backbone is timed on
SAMPLED = 16  # images whose sizes are looked at, and which are looked for in a cache on disk
FITTING = 5  # times the size of what a closed form leaves, held while it is solved for in float64: 4 to 6 were measured
LONG = 3600  # seconds from which a quicker preset is named where there is no GPU

Clock = Callable[[], float]
Work = Callable[[], Any]


@dataclass(frozen=True)
class Estimate:
    """What a training takes.

    Attributes:
        seconds: by part, in the order of the training; "steps" are those that are left to be made.
        steps: their number.
        memory: bytes of main memory by part at the worst moment.
        device_memory: the same of a GPU; empty without one.
    """

    seconds: dict[str, float]
    steps: int
    memory: dict[str, int]
    device_memory: dict[str, int]

    @property
    def total_seconds(self) -> float:
        """The time of all parts."""
        return sum(self.seconds.values())

    @property
    def memory_bytes(self) -> int:
        """The main memory of all parts."""
        return sum(self.memory.values())

    def line(self, device: str) -> str:
        """Return the estimate as a line for people; `device` says what it was made on."""
        parts = []
        for name, seconds in self.seconds.items():
            title = f"{self.steps:,} steps".replace(",", " ") if name == "steps" else name
            parts.append(f"{title} {duration(seconds)}")
        needed = f"{readable(_rounded(self.memory_bytes))} of memory"
        if self.device_memory:
            needed += f", {readable(_rounded(sum(self.device_memory.values())))} of the GPU's"
        total = f"about {duration(self.total_seconds)}".replace("about under", "under")
        return f"{total} on {device} ({', '.join(parts)}), {needed}"


@dataclass(frozen=True)
class Plan:
    """How `fit` is going to be called, as far as that changes what it takes.

    Attributes:
        calibration, cache, cache_dir, cache_dtype, cache_limit: see `training.fit.fit`.
        meta_epochs_done: those that a resumed run does not make again.
        tested_images: test images that are scored after each meta-epoch, as `BestCheckpoint` does.
        processes: how many train together.
    """

    calibration: Any = None
    cache: str | None = "ram"
    cache_dir: str | os.PathLike[str] | None = None
    cache_dtype: str = "float32"
    cache_limit: int | str | None = None
    meta_epochs_done: int = 0
    tested_images: int = 0
    processes: int = 1


class _Rung(NamedTuple):
    """A work of a size on which time depends linearly."""

    size: float
    work: Work


class _Probe(NamedTuple):
    """An image of some size, as the backbone sees it, and its features (1, C, h, w) of each level."""

    pixels: int
    maps: list[Tensor]


def announce(model: Detector, data: Dataset, plan: Plan, clock: Clock = time.perf_counter) -> list[str]:
    """Return what a user should know before a training starts: its `Estimate`, and where it is long a quicker preset.

    A preset is named where there is no GPU and the training takes more than `LONG` seconds. What cannot be estimated is
    left out: a training never fails because of this.
    """
    try:
        estimated = estimate(model, data, plan, clock)
    except Exception:  # whatever is wrong, the training itself says it better
        return []
    lines = [estimated.line(_device_text(model.device))]
    if estimated.total_seconds > LONG and model.device.type == "cpu" and not torch.cuda.is_available():
        lines += _quicker(model, data, plan, estimated, clock)
    return lines


def _quicker(model: Detector, data: Dataset, plan: Plan, estimated: Estimate, clock: Clock) -> list[str]:
    """Return a line that names the first preset for machines without a GPU that takes a quarter of the time at most."""
    candidates = [
        (name, owner)
        for name, owner in methods.presets()
        if name in owner.preset_notes and owner.preset_notes[name].without_gpu
    ]
    candidates.sort(key=lambda candidate: not methods.METHODS[candidate[1].method].closed_form)
    for name, owner in candidates:
        choice = f"--preset {name}" + (
            f" --method {owner.method}" if owner is not methods.config_class(None, name) else ""
        )
        classes = {"n_classes": len(data.class_names), "class_names": data.class_names}
        try:  # the weights change nothing of the time, and may not be at hand
            quick = methods.create(owner.preset(name, backbone_weights=None, **classes))
            seconds = estimate(quick, data, dataclasses.replace(plan, meta_epochs_done=0), clock).total_seconds
        except Exception:
            return [f"without a GPU, {choice} is done in minutes; hgad-fast presets says what it needs and reaches"]
        if seconds < estimated.total_seconds / 4:
            return [
                f"without a GPU, {choice} takes about {duration(seconds)} on these images; hgad-fast presets says what "
                "it needs and reaches"
            ]
    return []


@torch.inference_mode(False)
@torch.enable_grad()
def estimate(model: Detector, data: Dataset, plan: Plan | None = None, clock: Clock = time.perf_counter) -> Estimate:
    """Return what `fit` takes for a model on the training images of a dataset.

    Args:
        model: the detector, with an encoder, on the device that it will be trained on. It stays as it is.
        data: the dataset.
        plan: how `fit` is going to be called; None: with its defaults.
        clock: returns the time in seconds.

    Raises:
        ValueError: there are no training images, or one cannot be read or used, or their classes are not the model's.
        RuntimeError: memory, or the method on these images.
    """
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the training repeats them
        return _Measurement(model, data, plan or Plan(), clock).estimate()


class _Measurement:
    """The measurements behind an estimate."""

    def __init__(self, model: Detector, data: Dataset, plan: Plan, clock: Clock) -> None:
        self.model, self.data, self.plan, self.clock = model, data, plan, clock
        self.config = model.config
        self.process_bytes = process_bytes()
        if model.groups_are_classes and self.config.class_names not in (None, data.class_names):
            raise ValueError("the model is of other classes than the dataset")
        self.calibration = None if plan.calibration is None else discover(plan.calibration)
        step = max(1, len(data.train) // SAMPLED)
        self.sample = [sample.path for sample in data.train[::step]][:SAMPLED]
        shapes = [seen_shape(read_header(path)[:2], self.config) for path in self.sample]
        self.pixels = sum(map(math.prod, shapes)) / len(shapes)  # of an image as the backbone sees it
        self.shape = max(shapes, key=math.prod)
        class_ids = torch.tensor([sample.class_id for sample in data.train])
        fraction = self.config.calibration_fraction if self.calibration is None else 0.0
        trained, held_out = split(class_ids, fraction, self.config.seed)
        self.trained = len(trained)
        self.calibrated = len(held_out) if self.calibration is None else len(self.calibration.train)
        self.batch_size = min(self.config.batch_size, self.trained)

    def estimate(self) -> Estimate:
        """Return the estimate."""
        decoding, backbone, probes = self._features()
        values = _values(probes[-1]) * self.pixels / probes[-1].pixels
        stored, known = self._stored(values)
        meta_epochs = max(0, self.config.meta_epochs - self.plan.meta_epochs_done)
        passes = 0 if self.model.closed_form else meta_epochs * self.config.sub_epochs
        steps = passes * (self.trained // self.batch_size)
        images = self.trained + self.calibrated
        anew = decoding + backbone
        seconds = {"features": images * (1 - known) * (decoding + stored * backbone)}
        stand_in = self._stand_in()
        kept = 0.0
        if self.model.closed_form:
            probes = probes[:1]  # what is fitted to one size of map scores no other
            seconds["fitting"] = self._fit(stand_in, probes[0], values) + 2 * self.trained * (1 - stored) * anew
        elif steps:
            seconds_of_step, kept = self._step(stand_in, probes)
            seconds["steps"] = steps * seconds_of_step + passes * self.trained * (1 - stored) * anew
        density = self._density(stand_in, probes, values)
        rounded = self.calibration is None and self.plan.cache_dtype != "float32"  # calibration takes exact features
        seconds["calibration"] = self.calibrated * (density + (anew if rounded else (1 - stored) * anew))
        if self.plan.tested_images:
            seconds["testing"] = meta_epochs * self.plan.tested_images * (anew + density)
        return Estimate(seconds, steps, *self._memory(stand_in, probes[0], values, stored, kept))

    # ---- features

    def _features(self) -> tuple[float, float, list[_Probe]]:
        """Return the seconds of reading an image and of its features, and the features of images of growing size."""
        path = self.sample[len(self.sample) // 2]
        image = read_image(path, self.config.white_level)

        def read() -> None:
            content_hash(path)
            preprocess(read_image(path, self.config.white_level), self.config)

        reading = self._timed(read, warm=True)
        seen = preprocess(image, self.config)
        probes: list[_Probe] = []
        rungs = []
        for shape in _growing((seen.shape[1], seen.shape[2])):
            reduced = seen if shape == seen.shape[1:] else F.interpolate(seen[None], shape, mode="area")[0]

            def work(reduced: Tensor = reduced) -> None:
                maps = seen_features(self.model, reduced)
                if not probes or probes[-1].pixels != reduced[0].numel():
                    probes.append(_Probe(reduced[0].numel(), maps))

            rungs.append(_Rung(reduced[0].numel(), work))
        rungs[0].work()  # makes the network that images go through (`features.streamlined.streamlined`)
        backbone = self._climb(rungs, self.pixels)
        workers = min(4, os.cpu_count() or 1)  # as many threads read ahead (`features.extract`)
        return reading / workers, backbone, probes

    def _stored(self, values: float) -> tuple[float, float]:
        """Return which share of the features the cache holds, and which of them are there already."""
        plan = self.plan
        if plan.cache is None:
            return 0.0, 0.0
        limit = byte_count(plan.cache_limit)
        size = (self.trained + self.calibrated) * values * DTYPES[plan.cache_dtype].itemsize
        stored = 1.0 if limit is None else min(1.0, limit / size)
        if plan.cache != "disk" or plan.cache_dir is None:
            return stored, 0.0
        if not isinstance(self.model.encoder, Backbone):
            return stored, 0.0  # `feature_set` refuses it
        contents = cached_contents(self.model, plan.cache_dir, plan.cache_dtype)
        known = sum(content_hash(path) in contents for path in self.sample) if contents else 0
        return stored, known / len(self.sample)

    # ---- steps

    def _stand_in(self) -> Any:
        """Return a copy of the model to be trained and scored with; it has the encoder in common with the model."""
        return copy.deepcopy(self.model, {id(self.model.encoder): self.model.encoder})

    def _step(self, stand_in: Any, probes: Sequence[_Probe]) -> tuple[float, float]:
        """Return the seconds of a training step, and the bytes that one keeps for its backward pass."""
        share = math.ceil(self.batch_size / self.plan.processes)
        drawn = self.model.pixels_per_step
        _set_mode(stand_in, training=True)
        step = Step(stand_in, Processes())
        stage = self._usual_stage(stand_in)
        weights = {tensor.untyped_storage().data_ptr() for tensor in stand_in.state_dict().values()}
        few = min(2, share)
        chosen = [(probe, few) for probe in probes] + ([(probes[-1], share)] if share > few else [])
        kept: list[tuple[float, float]] = []  # size, bytes
        rungs = []
        for probe, count in chosen:
            images = [_varied(probe.maps, seed) for seed in range(count)]
            labels = torch.arange(count) % len(self.data.class_names)
            size = count * _drawn_values(probe.maps, drawn, 1.0)

            def work(images: list[list[Tensor]] = images, labels: Tensor = labels, size: float = size) -> None:
                saved: dict[int, int] = {}

                def note(tensor: Tensor) -> Tensor:
                    storage = tensor.untyped_storage()
                    if storage.data_ptr() not in weights:
                        saved[storage.data_ptr()] = storage.nbytes()
                    return tensor

                with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                    step(images, labels, stage, self.config.lr)
                kept.append((size, sum(saved.values())))

            rungs.append(_Rung(size, work))
        full = share * _drawn_values(probes[-1].maps, drawn, self.pixels / probes[-1].pixels)
        seconds = self._climb(rungs, full)
        size, saved_bytes = kept[-1]
        return seconds, saved_bytes * full / size / self.config.accumulate

    def _usual_stage(self, model: Any) -> int:
        """Return the stage of most passes that are left."""
        batches = self.trained // self.batch_size
        left = range(min(self.plan.meta_epochs_done, self.config.meta_epochs - 1), self.config.meta_epochs)
        stages = Counter(model.schedule(Progress(meta_epoch, 0, 0, batches))[0] for meta_epoch in left)
        return int(stages.most_common(1)[0][0])

    def _fit(self, stand_in: Any, probe: _Probe, values: float) -> float:
        """Fit the stand-in in closed form to images like that of the probe; return the seconds for all images.

        They are taken to grow with the places of a map, a part of them with the images too.
        """
        classes = max(len(self.data.class_names), len(stand_in.groups))
        if classes > self.trained:
            raise ValueError(f"there are {self.trained} images for {classes} groups")  # training would not start
        few = 2 * classes  # a covariance takes 2 images
        more = min(8 * classes, max(3 * classes, self.trained))
        seconds = []
        for count in (few, more):
            images = [_varied(probe.maps, seed) for seed in range(count)]
            features = FeatureSet(images, torch.arange(count) % len(self.data.class_names), "estimate")
            start = self.clock()
            stand_in.begin(features)
            stand_in.finish(features)
            seconds.append(self.clock() - start)
        of_an_image = max(seconds[1] - seconds[0], 0.0) / (more - few)
        return (seconds[0] + of_an_image * max(self.trained - few, 0)) * values / _values(probe)

    # ---- calibration

    def _density(self, stand_in: Any, probes: Sequence[_Probe], values: float) -> float:
        """Return the seconds of an image's densities and maps; 0 where an untrained model has none."""
        _set_mode(stand_in, training=False)
        rungs = []
        for probe in probes:
            features = FeatureSet([[level[0] for level in probe.maps]], torch.tensor([0]), "estimate")

            def work(features: FeatureSet = features) -> None:
                images = held_out_densities(stand_in, features)
                level_max = largest_densities(stand_in, images)
                calibration_of(stand_in, images, level_max, self.config.img_size)

            rungs.append(_Rung(_values(probe), work))
        try:
            return self._climb(rungs, values)
        except (ValueError, RuntimeError, AssertionError):
            return 0.0

    # ---- memory

    def _memory(
        self, stand_in: Any, probe: _Probe, values: float, stored: float, kept: float
    ) -> tuple[dict[str, int], dict[str, int]]:
        """Return the bytes by part, of main memory and of the GPU's.

        Args:
            stand_in: the model after training; one in closed form has grown, by so much for each place of a map.
            probe: what such a one was fitted to.
            values: of an image's features.
            stored: share of the features that are cached.
            kept: bytes for the backward pass of a step.
        """
        images = self.trained + self.calibrated
        size = values * stored * images * DTYPES[self.plan.cache_dtype].itemsize
        in_memory = size if self.plan.cache == "ram" else 0
        parameters = sum(p.nbytes for p in stand_in.parameters() if p.requires_grad)
        training = int(kept) + 3 * parameters  # gradients and Adam's two moments
        encoder = self.model.encoder
        backbone = encoder.working_set(*self.shape) if isinstance(encoder, Backbone) else 0
        memory = {"process": self.process_bytes, "features": int(in_memory)}
        trained, untrained = (
            sum(tensor.nbytes for tensor in trained_tensors(model).values()) for model in (stand_in, self.model)
        )
        grown = int((trained - untrained) * values / _values(probe))
        if self.model.closed_form:
            training = FITTING * grown
        work = {"work": max(training, backbone)}  # the backbone is done when the steps begin
        if self.model.device.type != "cuda":
            return memory | {"model": grown} | work, {}
        frozen = sum(tensor.nbytes for tensor in encoder.state_dict().values())
        return memory, {"model": untrained + frozen + grown} | work

    # ---- time

    def _timed(self, work: Work, warm: bool) -> float:
        """Return the seconds of a work, the mean of a few attempts, of fewer where they are long.

        With `warm` the first attempt counts only if it was so long that a second one would be too much.
        """
        attempts: list[float] = []
        for attempt in range(4):
            start = self.clock()
            work()
            if self.model.device.type == "cuda":
                torch.cuda.synchronize(self.model.device)
            taken = self.clock() - start
            if attempt or not warm or taken > 4 * BUDGET:
                attempts.append(taken)
                if sum(attempts) > BUDGET / 4:
                    break
        return sum(attempts) / len(attempts)

    def _climb(self, rungs: Sequence[_Rung], full: float) -> float:
        """Return the seconds of a work of the size `full`, given works of growing size, which are timed one by one."""
        points: list[tuple[float, float]] = []
        for size, work in rungs:
            if points and points[-1][1] * size / points[-1][0] > BUDGET:
                break
            points.append((size, self._timed(work, warm=not points or self.model.device.type == "cuda")))
        return extrapolated(points, full)


def extrapolated(points: Sequence[tuple[float, float]], size: float) -> float:
    """Return the seconds of a work of this size, given sizes, increasing, and seconds of smaller ones.

    They lie on the line through the last two points. Constant costs are taken to be at most half of the last one, as
    two works that take about as long, by chance or for being small, say nothing of larger ones. Of a smaller work than
    the last one, and of a single point, they are proportional to the size.
    """
    last_size, last_seconds = points[-1]
    proportional = last_seconds / last_size
    if len(points) == 1 or size <= last_size:
        return size * proportional
    first_size, first_seconds = points[-2]
    slope = (last_seconds - first_seconds) / (last_size - first_size) if last_size > first_size else proportional
    return last_seconds + max(slope, proportional / 2) * (size - last_size)


def process_bytes() -> int:
    """Return the bytes of main memory that this process takes now; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def meta_epochs_done(checkpoint: Path) -> int:
    """Return how many meta-epochs the run that left a checkpoint has made; 0 where there is none that can be read."""
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        return int(state["meta_epoch"])
    except Exception:  # resuming names what is wrong with it
        return 0


def _set_mode(stand_in: Any, training: bool) -> None:
    """Put all of a stand-in in training mode, or out of it, except for the encoder, which is the model's own."""
    for name, part in stand_in.named_children():
        if name != "encoder":
            part.train(training)


def _growing(shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Return sizes (h, w) that double up to `shape`, the first with a short side of about `SMALLEST_SIDE`.

    The sides of those below `shape` are multiples of 32, as some methods ask for.
    """
    shapes = [shape]
    while min(shapes[0]) >= 2 * SMALLEST_SIDE:
        half = tuple(max(SMALLEST_SIDE, round(side / 64) * 32) for side in shapes[0])
        shapes.insert(0, (half[0], half[1]))
    return shapes


def _values(probe: _Probe) -> float:
    return sum(level.numel() for level in probe.maps)


def _drawn_values(maps: Sequence[Tensor], drawn: int | float | None, scale: float) -> float:
    """Return the values of an image that a step looks at.

    Args:
        maps: features (1, C, h, w) of each level.
        drawn: pixels of a level, as `pixels_per_step` has them.
        scale: how many times the pixels of these maps the image has.
    """
    return sum(level.shape[1] * pixel_count(drawn, round(level[0, 0].numel() * scale)) for level in maps)


def _varied(maps: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Return the features (C, h, w) of an image that is like the one of the maps (1, C, h, w), but not the same."""
    generator = torch.Generator().manual_seed(seed)
    varied = []
    for level in maps:
        x = level[0].float().cpu()
        noise = torch.randn(x.shape[1:], generator=generator)
        varied.append((x * (1 + 0.2 * noise)).permute(1, 2, 0).contiguous().permute(2, 0, 1))
    return varied


def _rounded(size: float) -> float:
    """Return a number of bytes with two digits that count: an estimate knows no more."""
    return float(f"{size:.2g}")


def _device_text(device: torch.device) -> str:
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"{threads} CPU thread{'s' * (threads != 1)}"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
