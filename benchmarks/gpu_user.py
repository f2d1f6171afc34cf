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
from benchmarks.gpu_figures import RATE, Images, measured_step, official_training_times, three_levels
from benchmarks.gpu_findings import Check, Figure
from hgad_fast import GaussianConfig, HGADConfig, Scorer, VQFlowConfig
from hgad_fast.bench import cases, measure, timing
from hgad_fast.bench.cases import Size
from hgad_fast.bench.official import (
    OfficialLevel,
    dense_position,
    has_freia,
    official_loss,
    official_map,
    official_scores,
    smoothed_onehot,
)
from hgad_fast.bench.results import TOLERANCE
from hgad_fast.features.extract import FeatureSet
from hgad_fast.features.preprocess import batch_features, feature_maps, preprocess
from hgad_fast.methods import create
from hgad_fast.models.config import Config
from hgad_fast.models.hgad import HGADModel
from hgad_fast.scoring.calibration import Calibration, calibrate_on
from hgad_fast.scoring.score import score_images, score_prepared
from hgad_fast.training.processes import Processes
from hgad_fast.training.step import Step

WANTED = {"fp32": 5.0, "tf32": 3.0}  # times the images per second of the official loop


def over(name: str, ours: float | None, theirs: float | None, at_least: float = -math.inf) -> Figure:
    """Return ours over theirs; None where one of them could not be measured."""
    ratio = ours / theirs if ours and theirs else None
    return Figure(name, ratio, "x", "" if ratio else "one of them could not be measured", at_least=at_least)


def peer_precisions(device: torch.device) -> tuple[str, ...]:
    """Return the precisions in which the official code is timed, the one that it is fastest in first."""
    return ("tf32", "fp32") if device.type == "cuda" else ("fp32",)


def recommended(device: torch.device) -> str:
    """Return the precision that a user is to choose: on a CPU only some have instructions for bf16."""
    return "bf16" if device.type == "cuda" else "fp32"


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
        drop_in_step(size, device, precision)()


def first_scores(size: Size, device: torch.device) -> Iterator[Check]:
    """Score a batch and an image in every way in which they are timed."""
    yield kernels_run(torch.empty(0, device=device))
    for precision in dict.fromkeys((recommended(device), "fp32")):
        model = three_levels(size, device, precision).eval()
        calibrated(model, size)
        for images in (size.images, 1):
            features = [torch.stack(maps).to(device) for maps in zip(*Images(size).images[:images], strict=True)]
            for ids in (None, [0] * images):
                score = model.score_features(features, ids, throughput=True).image_score
                way = "label-free" if ids is None else "class given"
                name = f"scores that are no numbers, {precision}, {images} images, {way}"
                yield Check(name, float((~score.isfinite()).sum()), 0)
            model.score_features(features, [0] * images, "official", throughput=True)


# ---- training


def training_rates(size: Size, device: torch.device, images: int = 120, rounds: int = 10) -> Iterator[Figure]:
    """Yield images per second of `fit` in the recommended mode, of the official loop, and of that loop with our class.

    Three levels, from cached features of random numbers; the official loop finds its features on the device, and makes
    a step of one level after the other.
    """
    label = f"training, K={size.classes}"
    ours, *memory = fit_rate(label, size, device, images)
    yield from (ours, *memory)
    drawn = Images(size)
    eager = Step(three_levels(size, device, recommended(device), "reversible"), Processes())
    work = functools.partial(eager, drawn.images, drawn.labels, 2, RATE)
    yield from measured_step(f"{label}, ours in eager steps, reversible memory", work, size, device, rounds)
    del eager, work
    timing.release_memory(device)
    official: dict[str, float | None] = {}
    for precision in peer_precisions(device):
        time_of_step, *others = official_training_times(size, device, precision, compiled=False, rounds=rounds)
        yield from (time_of_step, *others)
        official[precision] = others[0].value if others else None
        name = f"{label}, ours as recommended, images per second over the official loop, eager {precision}"
        yield over(name, ours.value, official[precision], WANTED[precision])
        timing.release_memory(device)
    peer, *_ = peer_precisions(device)
    for precision in peer_precisions(device):  # fp32 is what the official arguments leave ours at
        step = drop_in_step(size, device, precision)
        name = f"{label}, official loop with our class, {precision}"
        time_of_step, *others = measured_step(name, step, size, device, rounds)
        yield from (time_of_step, *others)
        rate = others[0].value if others else None
        yield over(
            f"{name}, over the official class, {peer}", rate, official[peer], 2 if precision == peer else -math.inf
        )
        del step
        timing.release_memory(device)


def fit_rate(label: str, size: Size, device: torch.device, images: int) -> list[Figure]:
    """Train by `fit`: return images per second of stage 2, its first pass left out, and what memory it took at most.

    The recommended mode on CUDA: bf16, reversible memory, recorded steps.
    """
    drawn = Images(replace(size, images=images))
    levels = [torch.stack(maps) for maps in zip(*drawn.images, strict=True)]
    features = FeatureSet.from_levels(levels, torch.arange(images) % size.classes)
    model = three_levels(size, device, recommended(device), "reversible")
    model.config = model.config.replace(meta_epochs=3, sub_epochs=4, batch_size=size.images)
    if device.type == "cuda":
        timing.release_memory(device)
        torch.cuda.reset_peak_memory_stats(device)
    history = model.fit(
        features,
        calibration=features.subset(torch.arange(2 * size.classes) % images),
        false_alarm_rate=0.5,
        cuda_graphs=device.type == "cuda",
        progress=False,
    )
    rates = [record["images_per_second"] for record in history.records if record["stage"] == 2]
    how = f"{model.precision}, {model.memory}" + (", recorded" if device.type == "cuda" else "")
    name = f"{label}, ours as recommended ({how})"
    found = [Figure(f"{name}, images per second", statistics.median(rates[1:]), "1/s", f"fit on {images} images")]
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 1e9
        kept = sum(level.nbytes for level in levels) / 1e9
        note = f"model, optimizer, graphs, and the features ({kept:.2g} GB), which stay on the device"
        found.append(Figure(f"{name}, memory of the whole fit", peak, "GB", note))
    return found


def drop_in_step(size: Size, device: torch.device, precision: str) -> Callable[[], None]:
    """Return the official loop's calls of our class: a step of one level after the other, with dense positions."""
    model = three_levels(size, device, precision)
    drawn = Images(size)
    levels = []
    for (h, w), features in zip(drawn.maps, zip(*drawn.images, strict=True), strict=True):
        x = torch.stack(features).permute(0, 2, 3, 1).reshape(-1, size.channels).to(device)
        labels = drawn.labels[:, None, None].expand(-1, h, w).to(device)
        onehot = smoothed_onehot(labels.flatten(), size.classes, model.config.label_smoothing)
        levels.append((x, (labels, onehot), dense_position(size.position_dim, size.images, h, w).to(device)))

    def step() -> None:
        with cases.float32_products("tf32" if precision == "tf32" else "fp32"):
            for scale, (x, y, position) in enumerate(levels):
                loss = official_loss(model(x, y, position, scale=scale, epoch=2))
                model.optimizer.zero_grad()
                loss.backward()
                model.optimizer.step()

    return step


# ---- scoring beyond the backbone


def validation_times(size: Size, device: torch.device, rounds: int = 10) -> Iterator[Check | Figure]:
    """Time a batch of images from features to maps, three levels, and the official validation on the same device.

    The official procedure is told the class and normalises by the batch; ours is timed in that procedure, too, and the
    maps of both are compared.
    """
    features = [torch.stack(maps).to(device) for maps in zip(*Images(size).images, strict=True)]
    exact = three_levels(size, device).eval()
    with torch.no_grad():
        for delta in exact.mu_deltas:
            delta.mul_(0.1)  # as drawn, all centres but the main one have a share of nothing
    levels = [OfficialLevel.of(exact, level).eval() for level in range(len(features))]
    peer = "official" if has_freia() else "definition"
    label = f"scoring beyond the backbone, a batch of {size.images}, K={size.classes}"
    positions = [dense_position(size.position_dim, size.images, *maps.shape[2:]).to(device) for maps in features]
    official = functools.partial(official_validation, levels, features, positions, exact.config.msk_size)

    def rate(work: Callable[[], Any]) -> float:
        work()
        return size.images / statistics.median(timing.seconds(work, device) for _ in range(rounds))

    theirs: dict[str, float] = {}
    for precision in peer_precisions(device):
        with cases.float32_products(precision):
            theirs[precision] = rate(official)
            yield Figure(f"{label}, {peer} validation, {precision}, images per second", theirs[precision], "1/s")
            peak = timing.peak_memory(official, device) / 1e9
            yield Figure(f"{label}, {peer} validation, {precision}, memory", peak, "GB")
    right = official()  # in fp32, the last
    for precision in dict.fromkeys((recommended(device), "fp32")):
        model = copy_in(exact, precision)
        calibrated(model, size)
        ways: dict[str, Callable[[], Any]] = {
            "label-free": lambda model=model: model.score_features(features, throughput=True),
            "official procedure": lambda model=model: model.score_features(
                features, [0] * size.images, "official", throughput=True
            ),
        }
        error = measure.relative_error(ways["official procedure"]().anomaly_map.cpu(), right)
        yield Check(f"maps of the official procedure, {precision}", error, TOLERANCE[precision])
        for way, work in ways.items():
            mine = rate(work)
            yield Figure(f"{label}, ours, {way}, {precision}, images per second", mine, "1/s")
            for name, official_rate in theirs.items():
                title = f"{label}, ours, {way}, {precision}, over the {peer} validation, {name}"
                is_target = precision == recommended(device) and name == next(iter(theirs))
                yield over(title, mine, official_rate, 8 if is_target else -math.inf)
            yield Figure(f"{label}, ours, {way}, {precision}, memory", timing.peak_memory(work, device) / 1e9, "GB")


def copy_in(model: HGADModel, precision: str) -> HGADModel:
    """Return a copy of the model, with parameters of its own, that computes in this precision."""
    copied = HGADModel(model.config.replace(precision=precision)).to(model.device).eval()
    copied.load_state_dict(model.state_dict())
    return copied


def calibrated(model: HGADModel, size: Size) -> None:
    """Give a model a calibration that nothing was measured for: it takes as long as any."""
    ids = torch.arange(30 * size.classes) % size.classes
    zeros = torch.zeros(size.classes, model.config.feature_levels)
    model.calibration = Calibration(zeros, torch.linspace(0, 1, len(ids)), ids)


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
    yield from scoring_times(tiny(config) if small else config, device, given=True, **options)


METHODS = ("hgad, fast", "gaussian", "vqflow, small", "vqflow")


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
    yield from scoring_times(tiny(config) if small else config, device, name, seconds=0 if small else 1.5)


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


def scoring_times(
    config: Config, device: torch.device, name: str = "hgad", seconds: float = 3, given: bool = False
) -> Iterator[Figure]:
    """Time a fitted model on noise: a `Scorer` on single frames, then batches from pixels and from features.

    Args:
        config: of the model; the backbone's weights are random.
        device: where it scores.
        name: of the method, in the figures.
        seconds: about as long is each way timed.
        given: time batches of images whose group is given, too.
    """
    model = fitted(config, device)
    side, count = config.img_size, config.batch_size
    assert isinstance(side, int)
    label = f"scoring, {name}, {config.backbone_arch}, {side} px"
    megapixels = side * side / 1e6
    images = drawn_images(count, side)
    frame = (images[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    scorer = Scorer(model, frame_size=(side, side))

    def times(work: Callable[[], Any]) -> list[float]:
        """Return the seconds of each call, from 3 to 100 of them, the first two left out."""
        once = [timing.seconds(work, device) for _ in range(2)][-1]
        return [timing.seconds(work, device) for _ in range(min(max(int(seconds / once), 3), 100))]

    verdicts = 1e3 * np.array(times(lambda: scorer(frame).score))
    for percent in (50, 95):
        yield Figure(f"{label}, Scorer, p{percent}", float(np.percentile(verdicts, percent)), "ms")

    features = batch_features(model, list(images), config)
    backbone = statistics.median(times(lambda: batch_features(model, list(images), config)))
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


def drawn_images(count: int, side: int) -> Tensor:
    """Return noise (count, 3, side, side) in [0, 1]."""
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


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


def first_line(error: Exception) -> str:
    """Return what a note says of an error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
