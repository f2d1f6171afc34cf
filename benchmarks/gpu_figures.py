"""Figures of `make gpu` beside the cases: kernels on the device alone, training and scoring as a whole.

Each function is a job of the run, and yields figures as it has them. On a CPU it runs too, on small sizes, so that the
tests can hold it to its word.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_findings import Figure, LeftOut
from hgad_fast import environment, ops
from hgad_fast.bench import cases, latency, measure, timing
from hgad_fast.bench.cases import Size
from hgad_fast.bench.official import has_freia, official_loss, official_scores, smoothed_onehot
from hgad_fast.bench.results import OUT_OF_MEMORY
from hgad_fast.features.extract import feature_set
from hgad_fast.models.config import HGADConfig
from hgad_fast.models.hgad import HGADModel, StageLoss
from hgad_fast.scoring.calibration import calibrate_on
from hgad_fast.scoring.scorer import Scorer
from hgad_fast.training.processes import Processes
from hgad_fast.training.step import EAGER_STEPS, Group, Step, gather, on_side_stream, record

L2_BYTES = 256e6  # several times what the largest second-level caches hold
MEMORY_LIMIT = 16e9
RATE = 1e-4
BACKBONE_ALONE = "from normalised images on the device to features, without the copy to it"
EVERYTHING = "memory, everything counted"  # the allocator's peak: what was there before the work, too


def peer_name() -> str:
    """Return what the peer is called: without FrEIA the flow is our definition of it."""
    return "official" if has_freia() else "definition"


def peer_precisions(device: torch.device) -> tuple[str, ...]:
    """Return the precisions in which the official code is timed, the one that it is fastest in first."""
    return ("tf32", "fp32") if device.type == "cuda" else ("fp32",)


def recommended(device: torch.device) -> str:
    """Return the precision that a user is to choose: on a CPU only some have instructions for bf16."""
    return "bf16" if device.type == "cuda" else "fp32"


# ---- kernels on the device alone


def device_seconds(works: Sequence[Callable[[], Any]], device: torch.device, repeats: int = 10) -> float:
    """Return the median time of one of the works, which differ in their inputs, without what the host adds.

    On CUDA all of them make one graph, which is run again: each finds its inputs in memory, not in the cache.
    """
    if device.type != "cuda":
        return statistics.median(timing.seconds(work, device) for work in works)
    for work in works:
        on_side_stream(work)
    replay, _ = record(lambda: [work() for work in works])
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(repeats + 1):
        begin.record()
        replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(works))
    return statistics.median(times[1:])


def kernel_times(size: Size, device: torch.device, kind: str = "") -> Iterator[Figure]:
    """Time each kernel whose name begins with the kind; its rate, of the bytes it must move, is a share of a copy's."""
    n, half = size.pixels, size.channels // 2
    problem = cases.Problem(size, device)
    mixture, labels = [t.detach() for t in problem.official.mixture], problem.image_labels
    options = {"label_smoothing": problem.smoothing, "stage": 2}
    normal = functools.partial(torch.randn, generator=problem.generator(), device=device)

    def coupling() -> tuple[Tensor, ...]:
        return normal(n, half), normal(n, 2 * half), normal(n), normal(n, half)

    def prior() -> tuple[Tensor, ...]:
        z = normal(n, size.channels)
        return z, *ops.mixture_terms(z, labels, *mixture, **options), normal(n)

    kernels: dict[str, tuple[Callable[[], Any], Callable[..., Any], int]] = {
        "coupling, forward": (coupling, lambda x2, a, *_: ops.affine_coupling(x2, a), 4 * n * (4 * half + 1)),
        "coupling, backward": (
            coupling,
            lambda y2, a, glog_det, gy2: ops.affine_coupling_backward(gy2, glog_det, y2, a),
            4 * n * (8 * half + 1),  # with the rebuilt x2
        ),
        "mixture terms": (
            prior,
            lambda z, *_: ops.mixture_terms(z, labels, *mixture, **options),
            4 * n * (size.channels + 4),
        ),
        "mixture terms, backward": (
            prior,
            lambda z, *rest: ops.mixture_terms_backward(*rest[:4], z, labels, *mixture, **options),
            4 * n * (2 * size.channels + 4),
        ),
        "mixture scores": (
            prior,
            lambda z, *rest: ops.mixture_scores(z, rest[4], *mixture),
            4 * n * (size.channels + 6),
        ),
    }
    rate = measure.measure_ceiling(device, cases.precisions(device)).bytes_per_second
    for name, (draw, kernel, moved) in kernels.items():
        if not name.startswith(kind):
            continue
        copies = min(max(math.ceil(L2_BYTES / moved), 2), 16) if device.type == "cuda" else 2
        works = [functools.partial(kernel, *draw()) for _ in range(copies)]
        taken = device_seconds(works, device)
        label = f"{name}, {n} pixels, C={size.channels}, K={size.classes}"
        yield Figure(label, 1e3 * taken, "ms", "on the device alone, inputs rotated")
        yield Figure(f"{label}, of a copy's bytes per second", moved / taken / rate, "of 1")
        del works
        timing.release_memory(device)


def density_times(size: Size, device: torch.device, rounds: int = 5) -> Iterator[Figure]:
    """Time flow and all densities for scoring, against the official formulation in batches of 32 768 pixels."""
    problem = cases.Problem(size, device)
    mixture = [t.detach() for t in problem.official.mixture]
    grid = problem.model.nfs[0].grid(size.height, size.width, device)
    label = f"flow and mixture, {size.pixels} pixels, {size.classes * size.centres} centres"
    flop = cases.flow_flop(size, dense=False) + cases.mixture_flop(size, size.classes * size.centres)

    @torch.no_grad()
    def ours(flow: Any) -> Tensor:
        return ops.mixture_scores(*flow(problem.x, grid), *mixture).log_density

    @torch.no_grad()
    def official(precision: str) -> list[Any]:
        mu, delta, _, phi_intra = mixture
        with cases.float32_products(precision):
            return [
                official_scores(*problem.official.flow(x, [position]), mu, delta, phi_intra)
                for x, position in zip(problem.x.split(32768), problem.position.split(32768), strict=True)
            ]

    def taken(work: Callable[[], Any]) -> float:
        work()
        return statistics.median(timing.seconds(work, device) for _ in range(rounds))

    our_times: dict[str, float] = {}
    for precision in reversed(problem.precisions):  # the fastest first: it is wanted most
        our_times[precision] = mine = taken(functools.partial(ours, problem.ours(precision).nfs[0]))
        yield Figure(f"{label}, ours, {precision}", 1e3 * mine, "ms")
        share = flop / mine / measure.measure_ceiling(device, cases.precisions(device)).flop_per_second[precision]
        yield Figure(f"{label}, ours, {precision}, of a product's operations per second", share, "of 1")
    for peer in problem.peer_precisions:
        theirs = taken(functools.partial(official, peer))
        yield Figure(f"{label}, {problem.peer}, {peer}", 1e3 * theirs, "ms")
        for precision, mine in our_times.items():
            yield Figure(f"{label}, {problem.peer}, {peer}, over ours, {precision}", theirs / mine, "x")


def block_times(size: Size, device: torch.device, rounds: int = 5) -> Iterator[Figure]:
    """Time the flow without gradients in bf16, whole blocks on CUDA, with the stages that HGAD_FAST_STAGES asks for."""
    problem = cases.Problem(replace(size, images=1), device)
    flow: Any = problem.ours("bf16").nfs[0]
    grid = flow.grid(size.height, size.width, device)
    x = torch.randn(size.pixels, size.channels, generator=problem.generator(), device=device)

    @torch.no_grad()
    def work() -> None:
        flow(x, grid)

    work()
    taken = statistics.median(timing.seconds(work, device) for _ in range(rounds))
    stages = os.environ.get("HGAD_FAST_STAGES", "the usual")
    label = f"flow in whole blocks, {size.pixels} pixels, bf16, {stages} stages"
    yield Figure(label, 1e3 * taken, "ms", f"path: {ops.flow_path(x, grid, 'bf16')}")


# ---- training


class Images:
    """Return features of a batch of images at three levels, as the cache holds them."""

    def __init__(self, size: Size) -> None:
        self.maps = [(max(size.height >> level, 1), max(size.width >> level, 1)) for level in range(3)]
        self.generator = torch.Generator().manual_seed(0)
        self.images = [
            [torch.randn(size.channels, h, w, generator=self.generator) for h, w in self.maps]
            for _ in range(size.images)
        ]
        self.labels = torch.randint(size.classes, (size.images,), generator=self.generator)
        self.pixels = [size.images * h * w for h, w in self.maps]


def three_levels(size: Size, device: torch.device, precision: str = "fp32", memory: str = "auto") -> HGADModel:
    config = HGADConfig(
        n_classes=size.classes,
        n_intra_centers=size.centres,
        backbone_arch=None,
        feature_levels=3,
        feature_dims=(size.channels,) * 3,
        coupling_layers=size.blocks,
        pos_embed_dim=size.position_dim,
        precision=precision,
        memory=memory,
    )
    return HGADModel(config).to(device)


def _graph_choices(device: torch.device) -> tuple[bool, ...]:
    return (False, True) if device.type == "cuda" else (False,)


def measured_step(label: str, work: Callable[[], Any], size: Size, device: torch.device, rounds: int) -> list[Figure]:
    """Return time, images per second and memory of a step; out of memory is a result too."""
    try:
        for _ in range(EAGER_STEPS + 2):  # the last of them was recorded, where steps are
            work()
        taken = statistics.median(timing.seconds(work, device) for _ in range(rounds))
        peak = timing.peak_memory(work, device)
        everything = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    except torch.OutOfMemoryError:
        return [Figure(f"{label}, time of a step", None, "ms", OUT_OF_MEMORY)]
    finally:
        timing.release_memory(device)
    found = [
        Figure(f"{label}, time of a step", 1e3 * taken, "ms"),
        Figure(f"{label}, images per second", size.images / taken, "1/s"),
        Figure(f"{label}, memory beyond model and optimizer", peak / 1e9, "GB"),
    ]
    if everything is not None:
        found.append(Figure(f"{label}, {EVERYTHING}", everything / 1e9, "GB"))
    return found


def training_times(size: Size, device: torch.device, precision: str, rounds: int = 10) -> Iterator[Figure]:
    """Time steps of three levels from features in memory, as `fit` makes them, in every way it can."""
    images = Images(size)
    for memory in ops.MEMORY_MODES:
        for graph in _graph_choices(device):
            step = Step(three_levels(size, device, precision, memory), Processes(), graph)
            work = functools.partial(step, images.images, images.labels, 2, RATE)
            label = f"training, K={size.classes}, {precision}, {memory}, {'recorded' if graph else 'eager'}"
            measured = measured_step(label, work, size, device, rounds)
            yield from measured[:2] if graph else measured  # a recorded step's memory was laid out before
            del step, work


def official_training_times(
    size: Size, device: torch.device, precision: str, compiled: bool, rounds: int = 5
) -> Iterator[Figure]:
    """Time the official formulation, one level after the other; features lie on the device already."""
    problems = [cases.Problem(replace(size, height=h, width=w), device) for h, w in Images(size).maps]
    levels = []
    for problem in problems:
        (peer,) = (each for each in cases.training_case(problem) if each.is_peer and each.precision == precision)
        levels.append(measure.compile_contender(peer) if compiled else peer)
    label = f"training, K={size.classes}, {problems[0].peer}, {precision}, {'compiled' if compiled else 'eager'}"
    work = functools.partial(_one_after_the_other, levels)
    try:
        yield from measured_step(label, work, size, device, rounds)
    except RuntimeError as error:  # torch.compile, most likely: the official formulation's affair
        if not compiled:
            raise
        yield Figure(f"{label}, time of a step", None, "ms", str(error).strip().partition("\n")[0])


def _one_after_the_other(levels: Iterable[cases.Contender]) -> None:
    for level in levels:
        level()


def split_of_a_step(size: Size, device: torch.device, rounds: int = 10) -> list[Figure]:
    """Split the time of an eager step into its parts, as the device sees it; the loader takes the host's time."""
    images = Images(size)
    step = Step(three_levels(size, device, recommended(device)), Processes())
    model, pinned = step.model, device.type == "cuda"
    parts: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        watch = Stopwatch(device)
        batch = gather(images.images, images.labels, pinned=pinned)
        watch.lap("loader")
        batch = [[group.to(device) for group in groups] for groups in batch]
        watch.lap("copy to the device")
        total: Any = 0.0
        for level, ((group,), count) in enumerate(zip(batch, images.pixels, strict=True)):
            flow: Any = model.nfs[level]
            z, log_det = flow(group.x, flow.grid(group.height, group.width, group.x.device))
            watch.lap("flow forward")
            terms = model.mixture.losses(
                z, log_det, group.labels, level, stage=2, label_smoothing=model.config.label_smoothing
            )
            total = total + official_loss({name: term.sum() / count for name, term in terms.items()})
            watch.lap("prior forward")
        step.optimizer.zero_grad()
        total.backward()
        watch.lap("backward")
        step.optimizer.step()
        watch.lap("optimizer")
        for name, seconds in watch.seconds().items() if turn else ():
            parts.setdefault(name, []).append(seconds)
    label = f"training, K={size.classes}, {model.config.precision}, eager"
    return [Figure(f"{label}, {name}", 1e3 * statistics.median(times), "ms") for name, times in parts.items()]


class Stopwatch:
    """Laps on the device: on CUDA between events in its stream, so that nothing waits until the end."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        timing.synchronise(device)
        self.names: list[str] = []
        self.marks = [self._mark()]

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, name: str) -> None:
        self.names.append(name)
        self.marks.append(self._mark())

    def seconds(self) -> dict[str, float]:
        """Return the seconds by name; laps of one name add up."""
        timing.synchronise(self.device)
        taken: dict[str, float] = {}
        for name, begin, end in zip(self.names, self.marks, self.marks[1:], strict=False):
            lap = begin.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - begin
            taken[name] = taken.get(name, 0.0) + lap
        return taken


def waits_of_a_step(size: Size, device: torch.device, steps: int = 5) -> Iterator[Figure]:
    """Profile steps: calls in which the host waits for the device, and the share of time that the device is busy."""
    from torch.profiler import ProfilerActivity, profile, record_function

    images = Images(size)
    cuda = device.type == "cuda"
    for graph in _graph_choices(device):
        step = Step(three_levels(size, device, recommended(device)), Processes(), graph)
        work = functools.partial(step, images.images, images.labels, 2, RATE)
        for _ in range(EAGER_STEPS + 2):
            work()
        timing.synchronise(device)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with timing.quiet_stderr(), profile(activities=activities) as profiled:
            for _ in range(steps):
                with record_function(STEP):
                    work()
            timing.synchronise(device)
        events = [
            (event.name, event.time_range.start, event.time_range.end, "CUDA" in str(event.device_type))
            for event in profiled.events()
            if event.name == STEP or not event.is_user_annotation  # those span what lies between kernels, too
        ]
        label = f"training, K={size.classes}, {'recorded' if graph else 'eager'}"
        waits = host_waits(events)
        note = ", ".join(sorted(set(waits)))
        yield Figure(f"{label}, waits of the host inside {steps} steps", len(waits), "calls", note)
        yield Figure(f"{label}, share of the time in which the device is busy", busy_share(events), "of 1")
        del step, work
        timing.release_memory(device)


STEP = "hgad step"
Event = tuple[str, float, float, bool]  # name, begin, end, on the device


def host_waits(events: Iterable[Event]) -> list[str]:
    """Return the runtime's calls, inside steps on the host, that return when the device has come so far."""
    events = list(events)
    steps = [(begin, end) for name, begin, end, on_device in events if name == STEP and not on_device]
    return [
        name
        for name, begin, _, on_device in events
        if not on_device
        and ("Synchronize" in name or name == "cudaMemcpy")
        and any(start <= begin <= stop for start, stop in steps)
    ]


def busy_share(events: Iterable[Event]) -> float:
    """Return the busy share of the time from the device's first work to its last; NaN where it did none."""
    work = sorted((begin, end) for name, begin, end, on_device in events if on_device and name != STEP)
    if not work:
        return math.nan
    busy, until = 0.0, work[0][0]
    for begin, end in work:
        busy += max(end - max(begin, until), 0.0)
        until = max(until, end)
    return busy / (until - work[0][0])


def largest_batches(size: Size, device: torch.device, limit: int = 8192) -> Iterator[Figure]:
    """Find how many images fit in a step of 16 GB, everything counted, within a 16th; the target comes first."""
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf
    label = "largest batch in 16 GB"
    counts: dict[str, int] = {}
    peer = peer_name()
    steps = {"ours, bf16": _our_step, peer: _official_step, "ours, fp32": _our_step}
    for name, make in steps.items():
        step = make(size, device, name.rpartition(" ")[2])
        if device.type == "cuda":
            timing.release_memory(device)
            torch.cuda.set_per_process_memory_fraction(min(1.0, MEMORY_LIMIT / total), device)
        try:
            counts[name] = largest(functools.partial(_fits, step, device), limit)
        finally:
            if device.type == "cuda":
                torch.cuda.set_per_process_memory_fraction(1.0, device)
        yield Figure(f"{label}, {name}", counts[name], "images")
        if name == peer:
            ratio = counts["ours, bf16"] / max(counts[peer], 1)
            target = 7 if peer == "official" else -math.inf
            yield Figure(f"{label}, ours, bf16, over the {peer}", ratio, "x", at_least=target)
        del step
        timing.release_memory(device)


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest count that fits, within a 16th; 0 if none does."""
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    while high <= limit and high - low > max(low // 16, 1):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _fits(step: Callable[[int], Any], device: torch.device, images: int) -> bool:
    try:
        step(images)
        timing.synchronise(device)
    except torch.OutOfMemoryError:
        return False
    finally:
        timing.release_memory(device)
    return True


def _our_step(size: Size, device: torch.device, precision: str) -> Callable[[int], Any]:
    model = three_levels(size, device, precision, "reversible")
    loss, optimizer, maps = (
        StageLoss(model, 2),
        Step(model, Processes()).optimizer,
        Images(replace(size, images=1)).maps,
    )

    def step(images: int) -> None:
        labels = torch.zeros(images, dtype=torch.int64, device=device)
        batch = [[Group(torch.randn(images * h * w, size.channels, device=device), labels, h, w)] for h, w in maps]
        optimizer.zero_grad()
        loss(batch, [images * h * w for h, w in maps])[0].backward()
        optimizer.step()

    return step


def _official_step(size: Size, device: torch.device, _: str) -> Callable[[int], Any]:
    """Return the first level, by far the largest; the official loop has one in memory at a time."""
    problem = cases.Problem(replace(size, images=1), device)
    level, optimizer = problem.official, problem.official.optimizer()

    def step(images: int) -> None:
        n = images * size.height * size.width
        labels = torch.zeros(n, dtype=torch.int64, device=device)
        onehot = smoothed_onehot(labels, size.classes, problem.smoothing)
        optimizer.zero_grad()
        x = torch.randn(n, size.channels, device=device)
        official_loss(level(x, labels, onehot, problem.position.repeat(images, 1), stage=2)).backward()
        optimizer.step()

    return step


def convergence(size: Size, device: torch.device, steps: int = 300) -> Iterator[Figure]:
    """Yield last loss and AUROC of shifted pixels in held-out images, of one training in every precision.

    Features of a class vary about a mean and along a few directions of their own; a defect is a patch moved away.
    """
    generator = torch.Generator().manual_seed(0)
    normal = functools.partial(torch.randn, generator=generator)
    means, directions = 2 * normal(size.classes, size.channels), normal(size.classes, 4, size.channels)
    h, w = size.height, size.width

    def draw(labels: Tensor) -> Tensor:
        weights = normal(len(labels), h * w, 4)
        return means[labels][:, None] + weights @ directions[labels] + 0.5 * normal(len(labels), h * w, size.channels)

    batches = [torch.randint(size.classes, (size.images,), generator=generator) for _ in range(8)]
    training = [(draw(labels).flatten(0, 1), labels) for labels in batches]
    held_out_labels = torch.arange(size.classes)
    held_out = draw(held_out_labels)
    defects = torch.zeros(size.classes, h, w)
    defects[:, : max(h // 3, 1), : max(w // 3, 1)] = 1
    held_out = held_out + defects.flatten(1)[..., None] * 0.6 * normal(size.channels)
    first = cases.Problem(size, device)
    results: dict[str, tuple[float, float]] = {}
    for precision in ops.PRECISIONS:
        model = first.ours(precision, "reversible")
        flow, optimizer = model.nfs[0], model.optimizer
        grid = flow.grid(h, w, device)
        losses = []
        for i in range(steps):
            x, labels = (t.to(device) for t in training[i % len(training)])
            stage = 1 if i < steps // 4 else 2
            terms = model.mixture.losses(
                *flow(x, grid), labels, 0, stage=stage, label_smoothing=model.config.label_smoothing
            )
            loss = official_loss({name: term.mean() for name, term in terms.items()})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        with torch.no_grad():
            z, log_det = flow(held_out.flatten(0, 1).to(device), grid)
            density, _ = model.mixture.own_scores(z, log_det, 0, held_out_labels.to(device))
        auroc = 100 * share_in_order(-density.cpu(), defects.flatten() > 0)
        results[precision] = last_loss, _ = float(torch.stack(losses[-len(training) :]).mean()), auroc
        exact_loss, exact_auroc = results["fp32"]  # the first
        off = f"{abs(last_loss / exact_loss - 1):.2%} from fp32"
        yield Figure(f"after {steps} steps, loss, {precision}", last_loss, "", off)
        points = f"{auroc - exact_auroc:+.2f} points from fp32"
        yield Figure(f"after {steps} steps, AUROC, {precision}", auroc, "%", points)


def share_in_order(scores: Tensor, is_positive: Tensor) -> float:
    """Return the AUROC of scores without ties; a machine with a GPU need not have scikit-learn."""
    ranks = scores.argsort().argsort()[is_positive] + 1
    positive, negative = int(is_positive.sum()), int((~is_positive).sum())
    return float(ranks.sum() - positive * (positive + 1) // 2) / (positive * negative)


# ---- scoring


def scoring_times(size: Size, device: torch.device, frames: int = 50, enlarged: int = 8) -> Iterator[Figure]:
    """Time the way from features to a verdict, label-free and calibrated, at the usual and at an enlarged size."""
    model = three_levels(size, device, recommended(device)).eval()
    calibrate_on_noise(model, size)
    for name, factor, count in (("an image", 1, frames), (f"an image {enlarged} times as wide", enlarged, 3)):
        maps = [(h * factor, w * factor) for h, w in Images(replace(size, images=1)).maps]
        features = [torch.randn(1, size.channels, h, w, device=device) for h, w in maps]
        work = functools.partial(model.score_features, features)
        label = f"features to map, {name}"
        yield from _latency(label, work, device, count)
        yield Figure(f"{label}, memory", timing.peak_memory(work, device) / 1e9, "GB")


def calibrate_on_noise(model: HGADModel, size: Size) -> None:
    """Give a model a calibration that fits nothing, on an image of each class: it takes as long as any."""
    images = Images(replace(size, images=max(size.classes, 2)))
    levels = [torch.stack(maps) for maps in zip(*images.images, strict=True)]
    ids = torch.arange(len(levels[0])) % size.classes
    calibrate_on(model, feature_set(model, (levels, ids)), false_alarm_rate=0.5)


def _latency(label: str, work: Callable[[], Any], device: torch.device, count: int) -> list[Figure]:
    for _ in range(3):
        work()
    times = 1e3 * np.array([timing.seconds(work, device) for _ in range(count)])
    return [Figure(f"{label}, p{p}", float(np.percentile(times, p)), "ms") for p in (50, 95)]


def scorer_times(device: torch.device, small: bool = False) -> Iterator[Figure | LeftOut]:
    """Time a frame from pixels to verdict, with a backbone of random weights, and the share beside the backbone."""
    if importlib.util.find_spec("timm") is None:
        yield LeftOut("Scorer", "timm is not installed; see features to map")
        return
    backbone, side = ("test_efficientnet", 64) if small else ("tf_efficientnet_b6", 1024)
    settings: dict[str, Any] = {"precision": recommended(device), "backbone_arch": backbone}
    if small:
        settings |= {"out_indices": (1,), "coupling_layers": 2, "pos_embed_dim": 8}
    model = latency.model_for(side, device, **settings)
    device_name = environment.device_name(device)
    label = f"Scorer, {backbone}, {side} px"
    encoder: Any = model.require_encoder()
    normalised = encoder.normalize(drawn_images(1, side).to(device))
    rounds = 3 if small else 50
    for _ in range(3):
        encoder(normalised, fast=True)
    alone = statistics.median(timing.seconds(lambda: encoder(normalised, fast=True), device) for _ in range(rounds))
    yield Figure(f"{label}, backbone", 1e3 * alone, "ms", BACKBONE_ALONE)
    for times_of_call in latency.of_model(model, (side, side), device_name, seconds=0 if small else 8):
        call = f"{label}, {times_of_call.call}"
        beyond = times_of_call.p50 - alone
        times = {"p50": times_of_call.p50, "p95": times_of_call.p95, "beyond the backbone, p50": beyond}
        for name, seconds in times.items():
            is_target = name.startswith("beyond") and times_of_call.call.startswith("verdict, ")
            yield Figure(f"{call}, {name}", 1e3 * seconds, "ms", at_most=5 if is_target else math.inf)
        yield Figure(f"{call}, share of the backbone", alone / times_of_call.p50, "of the p50")
    scorer = Scorer(model, frame_size=(side, side))
    frame = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    yield from frame_memory(label, lambda: scorer(frame).score, device)


def frame_memory(label: str, work: Callable[[], Any], device: torch.device) -> Iterator[Figure]:
    """Yield what memory a frame takes at most; what a `Scorer` keeps between frames is in the second figure alone."""
    work()
    yield Figure(f"{label}, memory beyond model and Scorer", timing.peak_memory(work, device) / 1e9, "GB")
    if device.type == "cuda":
        yield Figure(f"{label}, {EVERYTHING}", torch.cuda.max_memory_allocated(device) / 1e9, "GB")


def drawn_images(count: int, side: int) -> Tensor:
    """Return noise (count, 3, side, side) in [0, 1]."""
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))
