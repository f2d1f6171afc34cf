"""Figures of `make gpu` that a user feels: trainings as `fit` makes them, and images scored, by every method.

As in `gpu_figures.py` each function is a job of a run, and runs on a CPU too, on small sizes.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_checks import kernels_run
from benchmarks.gpu_figures import (
    BACKBONE_ALONE,
    EVERYTHING,
    RATE,
    Images,
    calibrate_on_noise,
    drawn_images,
    frame_memory,
    measured_step,
    official_training_times,
    peer_name,
    peer_precisions,
    recommended,
    three_levels,
)
from benchmarks.gpu_findings import Check, Figure, first_line
from hgad_fast import GaussianConfig, HGADConfig, Scorer, VQFlowConfig
from hgad_fast.bench import cases, measure, timing
from hgad_fast.bench.cases import Size
from hgad_fast.bench.official import (
    OfficialLevel,
    dense_position,
    official_loss,
    official_map,
    official_scores,
    smoothed_onehot,
)
from hgad_fast.features.extract import FeatureSet
from hgad_fast.features.preprocess import batch_features, feature_maps, preprocess
from hgad_fast.methods import create
from hgad_fast.models.config import Config
from hgad_fast.models.hgad import HGADModel
from hgad_fast.scoring.calibration import calibrate_on
from hgad_fast.scoring.score import score_images, score_prepared
from hgad_fast.training.processes import Processes
from hgad_fast.training.step import Step

OFFICIAL_MAPS = {"fp32": 1e-5, "bf16": 2e-3}  # about ten times the errors that were seen
WANTED = {"fp32": 5.0, "tf32": 3.0}  # times the images per second of the official loop


def over(name: str, ours: float | None, theirs: float | None, at_least: float = -math.inf) -> Figure:
    """Return ours over the peer's; None where one of them could not be measured. No other peer has a target."""
    ratio = ours / theirs if ours and theirs else None
    note = "" if ratio else "one of them could not be measured"
    return Figure(name, ratio, "x", note, at_least=at_least if peer_name() == "official" else -math.inf)


# ---- before anything is timed


def first_training_steps(size: Size, device: torch.device) -> Iterator[Check]:
    """Make a step of each stage in the recommended mode, so that its kernels are compiled."""
    drawn = Images(size)
    step = Step(three_levels(size, device, recommended(device), "reversible"), Processes())
    yield kernels_run(torch.empty(0, device=device))
    losses = torch.stack([step(drawn.images, drawn.labels, stage, RATE).isfinite().all() for stage in (1, 2)])
    yield Check(f"steps whose losses are no numbers, K={size.classes}", float((~losses).sum()), 0)


def first_official_steps(size: Size, device: torch.device) -> Iterator[Check]:
    """Make a step of the official loop with our class in every precision in which it is timed."""
    yield kernels_run(torch.empty(0, device=device))
    for precision in peer_precisions(device):
        losses = torch.stack(drop_in_step(size, device, precision)())
        name = f"losses of the official loop with our class that are no numbers, K={size.classes}, {precision}"
        yield Check(name, float((~losses.isfinite()).sum()), 0)


def first_scores(size: Size, device: torch.device) -> Iterator[Check]:
    """Score a batch and an image in every way in which they are timed."""
    yield kernels_run(torch.empty(0, device=device))
    for precision in dict.fromkeys((recommended(device), "fp32")):
        model = three_levels(size, device, precision).eval()
        calibrate_on_noise(model, size)
        for images in (size.images, 1):
            features = [torch.stack(maps).to(device) for maps in zip(*Images(size).images[:images], strict=True)]
            for ids in (None, [0] * images):
                score = model.score_features(features, ids, throughput=True).image_score
                way = "label-free" if ids is None else "class given"
                name = f"scores that are no numbers, {precision}, {images} images, {way}"
                yield Check(name, float((~score.isfinite()).sum()), 0)
            model.score_features(features, [0] * images, "official", throughput=True)


# ---- training


class TrainingRates:
    """Steps that measure images per second of `fit` in the recommended mode, of the official loop, and of that loop
    with our class; a ratio is yielded by the step that measures its second side.

    Three levels, from cached features of random numbers; the official loop finds its features on the device, and makes
    a step of one level after the other.
    """

    def __init__(self, size: Size, device: torch.device, images: int = 120, rounds: int = 10) -> None:
        self.size, self.device, self.images, self.rounds = size, device, images, rounds
        self.recorded = device.type == "cuda"
        self.label = f"training, K={size.classes}"
        self.rates: dict[str, float | None] = {}
        self.steps: dict[str, Callable[[], Iterator[Check | Figure]]] = {"fit": self.fit}
        for name, step in (("official loop", self.official), ("our class in the official loop", self.drop_in)):
            self.steps |= {f"{name}, {each}": functools.partial(step, each) for each in peer_precisions(device)}
        self.steps["eager steps"] = self.eager

    def fit(self) -> Iterator[Check | Figure]:
        """Train by `fit`, and without recorded steps where these fail."""
        for recorded in dict.fromkeys((self.recorded, False)):
            try:
                ours, *memory = self.fit_rate(recorded)
            except Exception as error:  # whatever it is, a fit without recorded steps may work
                if not recorded:
                    raise
                yield Check(f"{self.label}, a fit of recorded steps runs", 1, 0, first_line(error))
            else:
                self.rates["ours"] = ours.value
                yield from (ours, *memory)
                return

    def fit_rate(self, recorded: bool) -> list[Figure]:
        """Train by `fit`: return images per second of stage 2, its first pass left out, and what memory it took."""
        drawn = Images(replace(self.size, images=self.images))
        levels = [torch.stack(maps) for maps in zip(*drawn.images, strict=True)]
        features = FeatureSet.from_levels(levels, torch.arange(self.images) % self.size.classes)
        model = three_levels(self.size, self.device, recommended(self.device), "reversible")
        model.config = model.config.replace(meta_epochs=3, sub_epochs=4, batch_size=self.size.images)
        if self.device.type == "cuda":
            timing.release_memory(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        history = model.fit(
            features,
            calibration=features.subset(torch.arange(2 * self.size.classes) % self.images),
            false_alarm_rate=0.5,
            cuda_graphs=recorded,
            progress=False,
        )
        rates = [record["images_per_second"] for record in history.records if record["stage"] == 2]
        how = f"{model.precision}, {model.memory}" + (", recorded" if recorded else "")
        name = f"{self.label}, ours as recommended ({how})"
        note = f"fit on {self.images} images"
        found = [Figure(f"{name}, images per second", statistics.median(rates[1:]), "1/s", note)]
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 1e9
            kept = sum(level.nbytes for level in levels) / 1e9
            note = f"the whole fit: model, optimizer, graphs, and features ({kept:.2g} GB), which stay on the device"
            found.append(Figure(f"{name}, {EVERYTHING}", peak, "GB", note))
        return found

    def official(self, precision: str) -> Iterator[Figure]:
        measured = list(official_training_times(self.size, self.device, precision, compiled=False, rounds=self.rounds))
        yield from measured
        rate = self.rates[f"official, {precision}"] = rate_among(measured)
        name = f"{self.label}, ours as recommended, images per second over the {peer_name()} loop, eager {precision}"
        yield over(name, self.rates.get("ours"), rate, WANTED[precision])
        timing.release_memory(self.device)

    def drop_in(self, precision: str) -> Iterator[Figure]:
        """Time the official loop with our class; fp32 is what the official arguments leave ours at."""
        peer, *_ = peer_precisions(self.device)
        name = f"{self.label}, official loop with our class, {precision}"
        step = drop_in_step(self.size, self.device, precision)
        measured = measured_step(name, step, self.size, self.device, self.rounds)
        yield from measured
        title = f"{name}, over the {peer_name()} class, {peer}"
        target = 2 if precision == peer else -math.inf
        yield over(title, rate_among(measured), self.rates.get(f"official, {peer}"), target)
        del step
        timing.release_memory(self.device)

    def eager(self) -> Iterator[Figure]:
        drawn = Images(self.size)
        step = Step(three_levels(self.size, self.device, recommended(self.device), "reversible"), Processes())
        work = functools.partial(step, drawn.images, drawn.labels, 2, RATE)
        name = f"{self.label}, ours in eager steps, reversible memory"
        yield from measured_step(name, work, self.size, self.device, self.rounds)


def rate_among(measured: Sequence[Figure]) -> float | None:
    """Return the images per second among the figures of a step; None where it did not fit in memory."""
    return next((figure.value for figure in measured if figure.unit == "1/s"), None)


def drop_in_step(size: Size, device: torch.device, precision: str) -> Callable[[], list[Tensor]]:
    """Return the official loop's calls of our class: a step of one level after the other, with dense positions.

    The step returns the loss of each level.
    """
    model = three_levels(size, device, precision)
    drawn = Images(size)
    levels = []
    for (h, w), features in zip(drawn.maps, zip(*drawn.images, strict=True), strict=True):
        x = torch.stack(features).permute(0, 2, 3, 1).reshape(-1, size.channels).to(device)
        labels = drawn.labels[:, None, None].expand(-1, h, w).to(device)
        onehot = smoothed_onehot(labels.flatten(), size.classes, model.config.label_smoothing)
        levels.append((x, (labels, onehot), dense_position(size.position_dim, size.images, h, w).to(device)))

    def step() -> list[Tensor]:
        losses = []
        with cases.float32_products("tf32" if precision == "tf32" else "fp32"):
            for scale, (x, y, position) in enumerate(levels):
                loss = official_loss(model(x, y, position, scale=scale, epoch=2))
                model.optimizer.zero_grad()
                loss.backward()
                model.optimizer.step()
                losses.append(loss.detach())
        return losses

    return step


# ---- scoring beyond the backbone


class ValidationTimes:
    """Steps that time a batch of images from features to maps, three levels, and the official validation.

    The official procedure is told the class and normalises by the batch; ours is timed in that procedure, too, and the
    maps of both are compared.
    """

    def __init__(self, size: Size, device: torch.device, rounds: int = 10) -> None:
        self.size, self.device, self.rounds = size, device, rounds
        self.label = f"scoring beyond the backbone, a batch of {size.images}, K={size.classes}"
        self.official_rates: dict[str, float] = {}
        self.steps: dict[str, Callable[[], Iterator[Check | Figure]]] = {
            f"official validation, {each}": functools.partial(self.official, each) for each in peer_precisions(device)
        }
        for each in dict.fromkeys((recommended(device), "fp32")):
            self.steps[f"ours, {each}"] = functools.partial(self.ours, each)

    @functools.cached_property
    def features(self) -> list[Tensor]:
        """(B, C, h, w) of each level, on the device."""
        return [torch.stack(maps).to(self.device) for maps in zip(*Images(self.size).images, strict=True)]

    @functools.cached_property
    def exact(self) -> HGADModel:
        """The model in fp32, its centres near enough to each other that all of them have a share."""
        model = three_levels(self.size, self.device).eval()
        with torch.no_grad():
            for delta in model.mu_deltas:
                delta.mul_(0.1)
        return model

    @functools.cached_property
    def validation(self) -> Callable[[], Tensor]:
        """The published validation: it returns maps, see `official_validation`."""
        levels = [OfficialLevel.of(self.exact, level).eval() for level in range(len(self.features))]
        code = functools.partial(dense_position, self.size.position_dim, self.size.images)
        positions = [code(*maps.shape[2:]).to(self.device) for maps in self.features]
        return functools.partial(official_validation, levels, self.features, positions, self.exact.config.msk_size)

    def rate(self, work: Callable[[], Any]) -> float:
        """Return images per second."""
        work()
        return self.size.images / statistics.median(timing.seconds(work, self.device) for _ in range(self.rounds))

    def official(self, precision: str) -> Iterator[Figure]:
        name = f"{self.label}, {peer_name()} validation, {precision}"
        with cases.float32_products(precision):
            rate = self.official_rates[precision] = self.rate(self.validation)
            yield Figure(f"{name}, images per second", rate, "1/s")
            yield Figure(f"{name}, memory", timing.peak_memory(self.validation, self.device) / 1e9, "GB")

    def ours(self, precision: str) -> Iterator[Check | Figure]:
        features = self.features
        model = copy_in(self.exact, precision)
        calibrate_on_noise(model, self.size)
        ways: dict[str, Callable[[], Any]] = {
            "label-free": lambda: model.score_features(features, throughput=True),
            "official procedure": lambda: model.score_features(
                features, [0] * self.size.images, "official", throughput=True
            ),
        }
        with cases.float32_products("fp32"):
            right = self.validation()
        error = measure.relative_error(ways["official procedure"]().anomaly_map.cpu(), right)
        yield Check(f"maps of the official procedure, {precision}", error, OFFICIAL_MAPS[precision])
        peers = peer_precisions(self.device)
        for way, work in ways.items():
            mine = self.rate(work)
            name = f"{self.label}, ours, {way}, {precision}"
            yield Figure(f"{name}, images per second", mine, "1/s")
            for peer in peers:
                target = 8 if precision == recommended(self.device) and peer == peers[0] else -math.inf
                title = f"{name}, over the {peer_name()} validation, {peer}"
                yield over(title, mine, self.official_rates.get(peer), target)
            yield Figure(f"{name}, memory", timing.peak_memory(work, self.device) / 1e9, "GB")


def copy_in(model: HGADModel, precision: str) -> HGADModel:
    """Return a copy of the model, with parameters of its own, that computes in this precision."""
    copied = HGADModel(model.config.replace(precision=precision)).to(model.device).eval()
    copied.load_state_dict(model.state_dict())
    return copied


@torch.no_grad()
def official_validation(
    levels: Sequence[OfficialLevel], features: Sequence[Tensor], positions: Sequence[Tensor], map_size: int
) -> Tensor:
    """Return the published maps (B, s, s) of images of class 0, on the CPU.

    Args:
        levels: the official model.
        features: (B, C, h, w) of each level.
        positions: the code of all pixels (N, P) of each level.
        map_size: s.
    """
    scores = []
    for level, maps, position in zip(levels, features, positions, strict=True):
        images, channels, h, w = maps.shape
        z, log_det = level.flow(maps.permute(0, 2, 3, 1).reshape(-1, channels), [position])
        of_level = official_scores(z, log_det, level.mu, level.delta, level.phi_intra, classes=[0])
        scores.append([each.float().view(images, h, w) for each in of_level])
    by_density, by_entropy = (official_map(list(kind), map_size) for kind in zip(*scores, strict=True))
    return by_density * by_entropy


# ---- scoring from pixels


def hgad_scoring(device: torch.device, small: bool = False) -> Iterator[Figure]:
    """Time the published HGAD at 1024 pixels, batches of 8, on a backbone of random weights."""
    config = HGADConfig(n_classes=15, backbone_weights=None, precision=recommended(device))
    options: dict[str, Any] = {"seconds": 0} if small else {}
    yield from pixel_times(tiny(config) if small else config, device, given=True, **options)


SCORED = ("gaussian", "vqflow", "hgad, fast", "vqflow, small")  # the presets of `method_scoring`


def method_scoring(name: str, device: torch.device, small: bool = False) -> Iterator[Figure]:
    """Time one of the methods, side by side: three on the same backbone at 256 pixels, and the published VQ-Flow."""
    common: dict[str, Any] = {"n_classes": 15, "backbone_weights": None}
    configs: dict[str, Callable[[], Config]] = {
        "hgad, fast": lambda: HGADConfig.preset("fast", **common, precision=recommended(device)),
        "gaussian": lambda: GaussianConfig.preset("gaussian", **common),
        "vqflow, small": lambda: VQFlowConfig.preset("small", **common),
        "vqflow": lambda: VQFlowConfig(**common),
    }
    config = configs[name]()
    config = tiny(config) if small else config
    yield from pixel_times(config, device, name, seconds=0 if small else 1.5, frames=True)


def tiny(config: Config) -> Config:
    """Return the configuration for a backbone and images that a CPU takes milliseconds for, to try the machinery."""
    stages = {"hgad": (1,), "gaussian": (1, 2, 3), "vqflow": (1, 2, 3, 4)}[config.method]
    changes: dict[str, Any] = {"n_classes": 2, "backbone_arch": "test_efficientnet", "img_size": 64, "msk_size": 32}
    changes |= {"out_indices": stages, "batch_size": 2}
    if config.method == "hgad":
        changes |= {"feature_mode": "image_pyramid", "feature_levels": 2, "coupling_layers": 2, "pos_embed_dim": 8}
    if config.method == "vqflow":
        changes |= {"coupling_layers": (1, 1, 1), "n_prototypes": 4, "n_patterns": 8, "prototype_dim": 8}
    return config.replace(**changes)


def pixel_times(
    config: Config,
    device: torch.device,
    name: str = "hgad",
    seconds: float = 3,
    given: bool = False,
    frames: bool = False,
) -> Iterator[Figure]:
    """Time a fitted model on noise, in batches from pixels and from features.

    Args:
        config: of the model; the backbone's weights are random.
        device: where it scores.
        name: of the method, in the figures.
        seconds: about as long is each way timed.
        given: time batches of images whose group is given, too.
        frames: time a `Scorer` on single frames, too, before the batches.
    """
    model = fitted(config, device)
    side, count = config.img_size, config.batch_size
    assert isinstance(side, int)
    label = f"scoring, {name}, {config.backbone_arch}, {side} px"
    megapixels = side * side / 1e6
    images = drawn_images(count, side)

    def times(work: Callable[[], Any]) -> list[float]:
        """Return the seconds of each call, from 3 to 100 of them, the first two left out."""
        once = [timing.seconds(work, device) for _ in range(2)][-1]
        return [timing.seconds(work, device) for _ in range(min(max(int(seconds / once), 3), 100))]

    if frames:
        scorer = Scorer(model, frame_size=(side, side))
        frame = (images[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)

        def verdict() -> float:
            return scorer(frame).score

        verdicts = 1e3 * np.array(times(verdict))
        for percent in (50, 95):
            yield Figure(f"{label}, Scorer, p{percent}", float(np.percentile(verdicts, percent)), "ms")
        yield from frame_memory(f"{label}, Scorer", verdict, device)

    features = batch_features(model, list(images), config)
    encoder = model.require_encoder()
    normalised = encoder.normalize(torch.stack([preprocess(image, config) for image in images]).to(device))
    backbone = statistics.median(times(lambda: encoder(normalised, fast=True)))
    yield Figure(f"{label}, batches of {count}, backbone", 1e3 * backbone, "ms", BACKBONE_ALONE)
    ids_by_way: dict[str, Any] = {"label-free": None}
    if given:
        ids_by_way["class given"] = score_prepared(model, features, throughput=True).class_id.cpu()
    for way, ids in ids_by_way.items():
        ways: dict[str, Callable[[], Any]] = {
            "from pixels": functools.partial(model.score, images, ids, throughput=True),
            "from features": functools.partial(score_prepared, model, features, ids, throughput=True),
        }
        for source, work in ways.items():
            taken = statistics.median(times(work))
            title = f"{label}, batches of {count}, {way}, calibrated, {source}"
            yield Figure(f"{title}, images per second", count / taken, "1/s")
            yield Figure(f"{title}, megapixels per second", count * megapixels / taken, "MP/s")
            yield Figure(f"{title}, memory", timing.peak_memory(work, device) / 1e9, "GB")
            if source == "from pixels":
                yield Figure(f"{title}, share of the backbone", backbone / taken, "of 1")


def fitted(config: Config, device: torch.device) -> Any:
    """Return a model on a device that scores as a trained one: what data decide is fitted to noise, and calibrated."""
    model: Any = create(config).to(device)
    assert isinstance(config.img_size, int)
    images = drawn_images(2 * config.n_classes, config.img_size)
    batches = [batch_features(model, list(part), config) for part in images.split(config.batch_size)]
    levels = [torch.cat(parts).cpu() for parts in zip(*batches, strict=True)]
    features = FeatureSet.from_levels(levels, torch.arange(len(images)) % config.n_classes)
    if model.closed_form:
        model.fit(features, calibration=features, false_alarm_rate=0.5, progress=False)
        return model
    model.begin(features)
    model.eval()
    calibrate_on(model, features, false_alarm_rate=0.5)
    return model


class Native:
    """Steps that time one image at its native size by the published HGAD: in tiles, as it comes, and as a whole.

    The backbone looks at the whole image, so that tiles have features of their own. The model is fitted at a small size
    and then sees images as the published one does: the map's side is `msk_size` times the image's over `img_size`.
    """

    def __init__(self, device: torch.device, small: bool = False) -> None:
        self.device, self.small, self.side = device, small, 256 if small else 8192
        self.label = f"scoring, hgad, an image of {self.side} x {self.side}"
        in_tiles = {"tiles": "always"}
        self.steps: dict[str, Callable[[], Iterator[Figure]]] = {
            "in tiles, label-free": functools.partial(self.from_pixels, "in tiles, label-free", None, **in_tiles),
            "from features": self.from_features,
            "in tiles, class given": functools.partial(self.from_pixels, "in tiles, class given", 0, **in_tiles),
            "whole, label-free": self.whole,  # the last: what goes wrong here may cost the device
        }

    @functools.cached_property
    def model(self) -> HGADModel:
        config = HGADConfig(n_classes=15, backbone_weights=None, precision=recommended(self.device))
        config = tiny(config) if self.small else config
        model: HGADModel = fitted(config.replace(img_size=32 if self.small else 256), self.device)
        model.config = model.config.replace(img_size=config.img_size)
        assert model.calibration is not None
        model.calibration.img_size = "native"
        return model

    @functools.cached_property
    def image(self) -> Tensor:
        return drawn_images(1, self.side)[0]

    def pieces(self, cut: bool) -> Any:
        """Return the feature maps of the image, which are computed as they are asked for."""
        return feature_maps(self.model, preprocess(self.image, self.model.config.replace(img_size="native")), cut)

    def timed(self, way: str, work: Callable[[], Any], backbone: Callable[[], Any] | None = None) -> Iterator[Figure]:
        peak = timing.peak_memory(work, self.device) / 1e9  # this call warms up, too
        taken = statistics.median(timing.seconds(work, self.device) for _ in range(3))
        yield Figure(f"{self.label}, {way}, time", taken, "s")
        yield Figure(f"{self.label}, {way}, megapixels per second", self.side**2 / 1e6 / taken, "MP/s")
        yield Figure(f"{self.label}, {way}, memory", peak, "GB", "beyond model and image")
        if backbone is not None:
            alone = statistics.median(timing.seconds(backbone, self.device) for _ in range(3))
            yield Figure(f"{self.label}, {way}, backbone", alone, "s", "with the copy of the image to the device")
            yield Figure(f"{self.label}, {way}, share of the backbone", alone / taken, "of 1")
        timing.release_memory(self.device)

    def from_features(self) -> Iterator[Figure]:
        """Time the way from features on the device to a map of `msk_size`."""
        work = functools.partial(self.model.score_features, self.pieces(cut=True).whole())
        yield from self.timed("label-free, from features", work)

    def from_pixels(self, way: str, class_id: int | None, **options: Any) -> Iterator[Figure]:
        work = functools.partial(score_images, self.model, self.image, class_id, img_size="native", **options)
        cut = options["tiles"] == "always"
        yield from self.timed(way, work, lambda: deque(self.pieces(cut).pieces(), maxlen=0))

    def whole(self) -> Iterator[Figure]:
        """Time the image without tiles, where its memory and the indices of the operations allow it."""
        way = "whole, label-free"
        try:
            yield from self.from_pixels(way, None, tiles="never", max_memory="128GB")
        except (RuntimeError, ValueError) as error:  # no memory, tensors of more than 2**31 elements, or refused
            yield Figure(f"{self.label}, {way}, time", None, "s", first_line(error))
