"""Everything that needs a CUDA GPU, in one command: `make gpu`, or `python -m benchmarks.gpu`.

Correctness of every kernel and gradient against the float64 definitions first, then bitwise determinism, torch.compile
and what the tensor cores do to tf32 operands, then the benchmarks of `hgad_fast.bench`, those that matter most in
front. The result file is written anew after each step, and the last step is cut when the time is up: at any moment it
holds all that is known. A job may be cut, too, so that none takes the others' time. Needs the checkout, torch, Triton
and the light dependencies of the package; with FrEIA the official flow is a peer too, with timm a backbone.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import gpu_figures
from benchmarks.gpu_figures import Figure
from hgad_fast import ops
from hgad_fast.bench import cases, measure, official, results
from hgad_fast.bench.cases import HEADLINE, LARGE, MILLION_PIXELS, Size
from hgad_fast.bench.measure import relative_error
from hgad_fast.bench.results import GRADIENT_TOLERANCE, TOLERANCE
from hgad_fast.training.processes import Processes
from hgad_fast.training.step import Step

# Frobenius-relative, against float64. Products of float32 accuracy (tf32x3, or float32 itself) are bound more loosely
# than in tests/kernels/test_kernels.py: tensor cores sum in an order and with a rounding of their own.
FORWARD, BACKWARD = 5e-6, 2e-5
BFLOAT16 = 4e-3  # of a result that is returned in bfloat16

SIZES = (
    Size(images=1, height=1, width=1, channels=2, classes=1, centres=1, blocks=1, position_dim=4),
    Size(images=2, height=5, width=7, channels=37, classes=5, centres=4, blocks=2, position_dim=8),
    Size(images=3, height=9, width=11, channels=24, classes=70, centres=3, blocks=2, position_dim=16),
    Size(images=2, height=12, width=12, channels=112, classes=15, centres=10, blocks=2, position_dim=16),
    Size(images=2, height=12, width=12, channels=200, classes=40, centres=10, blocks=2, position_dim=16),
)
FIRST = (
    ("training", LARGE),
    ("mixture", MILLION_PIXELS),
    ("coupling", MILLION_PIXELS),
    ("scores", MILLION_PIXELS),
    ("flow", LARGE),
    ("scoring", LARGE),
    ("training", HEADLINE),
    ("official-loop", LARGE),
)
COMPILED = (("training", LARGE), ("mixture", LARGE), ("flow", LARGE), ("training", HEADLINE))


@dataclass(frozen=True)
class Check:
    """An error that must not exceed what is allowed."""

    name: str
    error: float
    allowed: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed

    def __str__(self) -> str:
        verdict = "ok    " if self.passed else "FAILED"
        return f"{verdict} {self.name}: {self.error:.1e} (allowed: {self.allowed:.0e}) {self.note}".rstrip()


Found = Check | Figure | results.Outcome


class Job(NamedTuple):
    """A step of the run, and the function that carries it out."""

    name: str
    run: Callable[[], list[Found]]
    seconds: float = math.inf  # after which it is cut


@dataclass
class Report:
    """The results so far."""

    about: dict[str, Any]
    checks: list[Check] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    outcomes: list[results.Outcome] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks) and not results.wrong_results(self.outcomes)

    def add(self, outcomes: list[Found]) -> None:
        """Take in the outcomes of a job; a case and size that was measured before is replaced."""
        self.checks += [each for each in outcomes if isinstance(each, Check)]
        self.figures += [each for each in outcomes if isinstance(each, Figure)]
        timed = [each for each in outcomes if not isinstance(each, (Check, Figure))]
        known = results.grouped(self.outcomes) | results.grouped(timed)
        self.outcomes = [outcome for block in known.values() for outcome in block]

    def save(self, path: Path) -> Path:
        checks: list[dict[str, Any]] = [asdict(check) | {"passed": check.passed} for check in self.checks]
        for check in checks:
            check["error"] = check["error"] if math.isfinite(check["error"]) else None  # JSON has no infinity
        figures = [asdict(figure) for figure in self.figures]
        for figure in figures:
            figure["value"] = figure["value"] if math.isfinite(figure["value"] or 0) else None
        return results.save(self.outcomes, path, self.about, checks=checks, figures=figures, left_out=self.left_out)


class TimeIsUp(BaseException):
    """The time is over; no Exception, so that no handler of those takes it for an error of its own."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=9, help="time for everything (default: 9)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "results",
        help="JSON file, or a folder for <device>-<date>.json (default: benchmarks/results)",
    )
    parser.add_argument("--only", default="", help="jobs whose name contains this (default: all)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA GPU, and torch sees none here; `make bench` measures a CPU", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    report = Report(measure.about_run(device))
    jobs = [job for job in plan(device) if options.only in job.name]
    carry_out(jobs, report, options.output, 60 * options.minutes)
    print(summary(report))
    return 0 if report.passed else 1


def carry_out(
    jobs: list[Job], report: Report, output: Path, seconds: float, clock: Callable[[], float] = time.monotonic
) -> None:
    """Run the jobs until the seconds are over, and write the report after each. What is missing is named in it."""
    deadline = clock() + seconds
    path = report.save(output)
    print(f"{report.about['device']}: results go to {path}", *report.about["notes"], sep="\n", flush=True)
    for job in jobs:
        if (left := deadline - clock()) <= 0:
            report.left_out.append(job.name)
            continue
        print(f"-- {job.name}", flush=True)
        try:
            with cut_after(min(left, job.seconds)):
                outcomes = job.run()
        except TimeIsUp:
            report.left_out.append(job.name)
            continue
        except Exception as error:  # a crash is a finding, and no reason to lose the other jobs
            note = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            outcomes = [Check(f"{job.name} runs", 1, 0, note)]
        report.add(outcomes)
        for each in outcomes:
            if isinstance(each, (Check, Figure)):
                print(each, flush=True)
        report.save(path)
    report.save(path)


@contextmanager
def cut_after(seconds: float) -> Iterator[None]:
    """Raise `TimeIsUp` in the block once the seconds are over."""

    def stop(*_: Any) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def plan(device: torch.device, quick: bool = False) -> list[Job]:
    """Return every job, in order. `quick` has tiny sizes throughout, to try the machinery."""
    jobs = []
    for size in SIZES[1:2] if quick else SIZES:
        label = f"{size.pixels} pixels, C={size.channels}, K={size.classes}, M={size.centres}"
        for check in (check_coupling, check_mixture, check_scores, check_flow, check_blocks):
            name = check.__name__.removeprefix("check_")
            jobs.append(Job(f"{name} against float64, {label}", lambda check=check, size=size: check(size, device)))
    alike = cases.QUICK if quick else replace(LARGE, blocks=4)
    steps = cases.QUICK if quick else LARGE
    jobs += [
        Job("training steps of three levels", lambda: check_steps(steps, device)),
        Job("bitwise determinism", lambda: check_determinism(alike, device)),
        Job("torch.compile of a training step", lambda: check_compile(cases.QUICK, device)),
    ]
    if device.type == "cuda":
        jobs.append(Job("operands of a tf32 product", lambda: check_tf32(device)))
    jobs.append(Job("ceilings", lambda: [ceiling_check(device)]))
    first, last = figure_jobs(device, quick)
    if device.type == "cuda":
        last.insert(0, Job("compute-sanitizer", check_memory, 90))
    benchmarks, foremost = benchmark_jobs(device, quick), 0 if quick else len(FIRST)
    return jobs + benchmarks[:foremost] + first + benchmarks[foremost:] + last


def figure_jobs(device: torch.device, quick: bool = False) -> tuple[list[Job], list[Job]]:
    """Return the sections of gpu_figures.py: those that matter most, and those for the end, if time is left."""
    large, million, small = (cases.QUICK,) * 3 if quick else (LARGE, MILLION_PIXELS, HEADLINE)
    more_classes = replace(large, classes=40)
    steps = 4 if quick else 300

    def job(name: str, seconds: float, section: Callable[..., list[Figure]], *arguments: Any) -> Job:
        return Job(name, lambda: [*section(*arguments)], math.inf if quick else seconds)

    frames, enlarged, limit = (3, 2, 1) if quick else (50, 8, 8192)
    first = [
        job("training, all ways", 45, gpu_figures.training_times, large, device),
        job("training, official", 25, gpu_figures.official_training_times, large, device, False),
        job("scoring: flow and mixture", 40, gpu_figures.density_times, million, device),
        job("kernels alone, a million pixels", 30, gpu_figures.kernel_times, million, device),
        job("scoring: features to map", 30, gpu_figures.scoring_times, large, device, frames, enlarged),
        job("training, split of the time", 15, gpu_figures.split_of_a_step, large, device),
        job("training, waits", 25, gpu_figures.waits_of_a_step, large, device),
        job("convergence", 60, gpu_figures.convergence, small, device, steps),
        job("largest batch", 45, gpu_figures.largest_batches, large, device, limit),
    ]
    if quick:
        return first, []
    last = [
        job("scoring: Scorer", 45, gpu_figures.scorer_times, device),
        job("kernels alone", 20, gpu_figures.kernel_times, large, device),
        job("training with 40 classes, all ways", 40, gpu_figures.training_times, more_classes, device),
        job("training with 40 classes, official", 20, gpu_figures.official_training_times, more_classes, device, False),
        job("training, official compiled", 120, gpu_figures.official_training_times, large, device, True),
    ]
    return first, last


def benchmark_jobs(device: torch.device, quick: bool = False) -> list[Job]:
    """Return the timings, the most important in front; `torch.compile` of the peers is slow, and comes last."""
    everything = [(case, size) for case in cases.CASES for size in cases.sizes(case, device, quick)]
    first = [] if quick else list(FIRST)
    measured = [(*each, False) for each in dict.fromkeys(first + everything)]
    compiled = [] if quick else [(*each, True) for each in COMPILED]

    def job(case: str, size: Size, compile_peers: bool) -> Job:
        def run() -> list[Found]:
            rounds = 3 if quick else None
            return [*measure.measure(case, size, device, compiled=compile_peers, rounds=rounds, seconds_in_all=2)]

        return Job(f"{case}{' with compiled peers' if compile_peers else ''}: {size}", run)

    return [job(*each) for each in measured + compiled]


def ceiling_check(device: torch.device) -> Check:
    """Measure the ceilings, before anything heats the device."""
    ceiling = measure.measure_ceiling(device)
    rates = ", ".join(f"{name} {rate / 1e12:.1f} TFLOP/s" for name, rate in ceiling.flop_per_second.items())
    return Check("ceilings", 0, 0, f"copy {ceiling.bytes_per_second / 1e9:.0f} GB/s, {rates}")


def summary(report: Report) -> str:
    """Return the short table: failed checks, then a line for each case and size."""
    lines = ["", *(str(check) for check in report.checks if not check.passed), *results.wrong_results(report.outcomes)]
    lines += map(str, report.figures)
    for (case, size, _), block in results.grouped(report.outcomes).items():
        parts = []
        for outcome in block:
            if isinstance(outcome, results.Failure):
                parts.append(f"{outcome.contender}: {outcome.reason[:40]}")
                continue
            ratio = next(iter(outcome.speedups.values()), (math.nan,))[0]
            gain = "" if outcome.is_peer else f" ({ratio:.1f}x, {outcome.ceiling_share:.0%} of ceiling)"
            parts.append(f"{outcome.contender} {1e3 * outcome.seconds:.2f} ms{gain}")
        lines.append(f"{case} {size.pixels} pixels C={size.channels} K={size.classes}: {'; '.join(parts)}")
    passed = sum(check.passed for check in report.checks)
    lines.append(f"{passed} of {len(report.checks)} checks passed")
    if report.left_out:
        lines.append(f"no time was left for {len(report.left_out)}: {'; '.join(report.left_out)}")
    return "\n".join(lines)


# What follows takes the kernels on CUDA (a check says so if not) and the definitions on a CPU, for a dry run.


class Draw:
    """Draw seeded normal tensors on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device)

    def labels(self, n: int, classes: int) -> Tensor:
        return torch.randint(classes, (n,), generator=self.generator).to(self.device)

    def mixture(self, size: Size) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw mu, delta, phi_inter, phi_intra; distances of a few units, so that every class and centre has weight."""
        shape = size.classes, size.centres - 1, size.channels
        mu = self.normal(size.classes, size.channels) * size.channels**-0.5
        delta = self.normal(*shape) * size.channels**-0.5
        return mu, delta, self.normal(size.classes), self.normal(size.classes, size.centres)


def double(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double() if t.is_floating_point() else t for t in tensors]


def worst(name: str, allowed: float, actual: Any, expected: Any) -> Check:
    """Return the largest of the relative errors."""
    errors = [relative_error(a.double(), e) for a, e in zip(actual, expected, strict=True)]
    return Check(name, max(error if math.isfinite(error) else math.inf for error in errors), allowed)


def check_coupling(size: Size, device: torch.device) -> list[Check]:
    draw, half = Draw(device), size.channels // 2
    x2, gy2, glog_det = draw.normal(size.pixels, half), draw.normal(size.pixels, half), draw.normal(size.pixels)
    checks = [kernels_run(x2)]
    for dtype in (torch.float32, torch.bfloat16):
        name = f"coupling, {str(dtype).removeprefix('torch.')} subnet"
        a = (5 * draw.normal(size.pixels, 2 * half)).to(dtype)
        leaves = [t.requires_grad_() for t in double(x2, a)]
        expected = ops.affine_coupling.reference(*leaves)
        y2, log_det = ops.affine_coupling(x2, a)
        checks.append(worst(name, FORWARD, (y2, log_det), expected))
        back, _ = ops.affine_coupling(y2, a, inverse=True)
        checks.append(worst(f"{name}, inverse", BACKWARD, [back], double(x2)))
        expected_gx2, expected_ga = torch.autograd.grad(expected, leaves, double(gy2, glog_det))
        gx2, ga, gb, rebuilt = ops.affine_coupling_backward(gy2, glog_det, y2, a)
        expected_gradients = expected_gx2, expected_ga.sum(0), x2.double()
        checks.append(worst(f"{name}, backward", BACKWARD, (gx2, gb, rebuilt), expected_gradients))
        allowed = BACKWARD if dtype == torch.float32 else BFLOAT16
        checks.append(worst(f"{name}, gradient of a", allowed, [ga], [expected_ga]))
    return checks


def check_mixture(size: Size, device: torch.device) -> list[Check]:
    draw = Draw(device)
    z, mixture = draw.normal(size.pixels, size.channels), draw.mixture(size)
    checks = [kernels_run(z)]
    for per, labels in (("image", size.images), ("pixel", size.pixels)):
        y = draw.labels(labels, size.classes)
        for stage in (1, 2):
            name = f"mixture terms, stage {stage}, a label {per}"
            options = {"label_smoothing": 0.02, "stage": stage}
            leaves = [t.requires_grad_() for t in double(z, *mixture)]
            expected = ops.mixture_terms.reference(leaves[0], y, *leaves[1:], **options)
            terms = ops.mixture_terms(z, y, *mixture, **options)
            used = 4 if stage == 2 else 3
            checks.append(worst(name, FORWARD, terms[:used], expected[:used]))
            upstream = [draw.normal(len(term)) for term in terms]
            expected_gradients = torch.autograd.grad(
                expected[:used], leaves, double(*upstream[:used]), materialize_grads=True, allow_unused=True
            )
            gradients = ops.mixture_terms_backward(*upstream, z, y, *mixture, **options)
            checks.append(worst(f"{name}, backward", BACKWARD, gradients, expected_gradients))
    return checks


def check_scores(size: Size, device: torch.device) -> list[Check]:
    draw = Draw(device)
    z, log_det, mixture = draw.normal(size.pixels, size.channels), draw.normal(size.pixels), draw.mixture(size)
    y = draw.labels(size.images, size.classes)
    computed = ops.mixture_scores(z, log_det, *mixture, y, per_class=True)
    expected = ops.mixture_scores.reference(*double(z, log_det, *mixture), y, per_class=True)
    ours, right = computed._asdict(), expected._asdict()
    best_class = ours.pop("best_class")
    del right["best_class"]
    chosen = expected.class_log_density.gather(1, best_class[:, None]).squeeze(1)  # equal classes may change places
    return [
        kernels_run(z),
        worst("mixture scores", FORWARD, ours.values(), right.values()),
        worst("mixture scores, density of the best class", FORWARD, [chosen], [expected.best_log_density]),
    ]


def trained_flow(size: Size, draw: Draw) -> Any:
    """Return a flow as if trained: a fresh log-determinant is nearly zero, and would be nothing but its error."""
    flow = cases.Problem(size, draw.device).model.nfs[0]
    with torch.no_grad():
        flow.global_scale.add_(draw.normal(*flow.global_scale.shape))
        flow.global_offset.copy_(draw.normal(*flow.global_offset.shape))
        flow.w2.mul_(5)
    return flow


def check_flow(size: Size, device: torch.device) -> list[Check]:
    """Check a flow: float32 against float64, tf32 and bf16 operands against the same rounding on a CPU."""
    draw = Draw(device)
    flow = trained_flow(size, draw)
    x, gz, glog_det = (
        draw.normal(size.pixels, size.channels),
        draw.normal(size.pixels, size.channels),
        draw.normal(size.pixels),
    )

    def results(device: torch.device, dtype: torch.dtype, **options: str) -> tuple[list[Tensor], list[Tensor]]:
        """Return z and log_det, and the gradients of x and the parameters."""
        model = copy.deepcopy(flow).to(device, dtype)
        grid = ops.SeparablePosition(*(t.to(dtype) for t in flow.grid(size.height, size.width, device)))
        leaf = x.detach().to(device, dtype).requires_grad_()
        outputs = (
            ops.flow(leaf, model.blocks, grid, **options) if options else ops.flow_definition(leaf, model.blocks, grid)
        )
        upstream = gz.to(device, dtype), glog_det.to(device, dtype)
        return [t.detach() for t in outputs], list(torch.autograd.grad(outputs, [leaf, *model.parameters()], upstream))

    exact = results(device, torch.float64)
    checks = [kernels_run(x)]
    for precision in ops.PRECISIONS:
        for memory in ops.MEMORY_MODES:
            options = {"precision": precision, "memory": memory}
            expected, forward, backward = exact, FORWARD, BACKWARD
            if precision != "fp32":
                expected = results(torch.device("cpu"), torch.float32, backend="torch", **options)
                forward, backward = TOLERANCE["fp32"], GRADIENT_TOLERANCE["fp32"]
            computed = results(device, torch.float32, **options)
            name = f"flow, {precision}, {memory} memory"
            for part, allowed, ours, theirs in zip(
                ("", ", backward"), (forward, backward), computed, expected, strict=True
            ):
                checks.append(worst(f"{name}{part}", allowed, ours, [t.to(device, torch.float64) for t in theirs]))
    return checks


def check_blocks(size: Size, device: torch.device, runs: int = 5) -> list[Check]:
    """Check the flow in whole blocks, without gradients: against the same rounding on a CPU, and run after run.

    Threads of a block read what others have parked: a missing barrier would show as runs that differ.
    """
    draw = Draw(device)
    flow = trained_flow(size, draw)
    x, grid = draw.normal(size.pixels, size.channels), flow.grid(size.height, size.width, device)
    flow.precision = "bf16"
    with torch.no_grad():
        expected = copy.deepcopy(flow).cpu()(x.cpu(), flow.grid(size.height, size.width))
        outputs = [flow(x, grid) for _ in range(runs)]
    path = ops.flow_path(x, grid, "bf16")
    differing = sum(not torch.equal(a, b) for again in outputs[1:] for a, b in zip(outputs[0], again, strict=True))
    return [
        Check("whole blocks run", float(x.is_cuda and path != "triton, whole blocks"), 0, f"path: {path}"),
        worst("flow without gradients, bf16", 1e-3, outputs[0], [t.to(device, torch.float64) for t in expected]),
        Check(f"{runs} runs of whole blocks alike", differing, 0, "tensors that differ"),
    ]


def check_determinism(size: Size, device: torch.device, runs: int = 5) -> list[Check]:
    """Check that losses, gradients and scores of several runs agree to the bit, for labels of both kinds."""
    problem = cases.Problem(size, device)
    flow, mixture = problem.model.nfs[0], problem.model.mixture
    grid = flow.grid(size.height, size.width, device)
    parameters = [*flow.parameters(), *mixture.level(0)]

    def once(labels: Tensor, precision: str) -> list[Tensor]:
        flow.precision = precision
        z, log_det = flow(problem.x, grid)
        terms = mixture.losses(z, log_det, labels, 0, stage=2, label_smoothing=problem.smoothing)
        loss = official.official_loss({name: term.mean() for name, term in terms.items()})
        scores = mixture.scores(z.detach(), log_det.detach(), 0, labels, per_class=True)
        return [z, log_det, *terms.values(), *torch.autograd.grad(loss, parameters), *scores]

    checks = []
    for precision in problem.precisions:
        for per, labels in (("image", problem.image_labels), ("pixel", problem.labels.flip(0).contiguous())):
            first = once(labels, precision)
            differing = sum(
                not torch.equal(a, b)
                for _ in range(runs - 1)
                for a, b in zip(first, once(labels, precision), strict=True)
            )
            checks.append(Check(f"{runs} runs alike, {precision}, a label {per}", differing, 0, "tensors that differ"))
    return checks


def check_steps(size: Size, device: torch.device, steps: int = 8) -> list[Check]:
    """Check that recorded steps of three levels, as `fit` makes them, have the losses of eager ones."""
    images = gpu_figures.Images(size)
    model = gpu_figures.three_levels(size, device)
    losses = []
    for graph in (False, True) if device.type == "cuda" else (False, False):
        step = Step(copy.deepcopy(model), Processes(), graph)
        losses.append(torch.stack([step(images.images, images.labels, 2, 1e-4) for _ in range(steps)]))
    return [worst("recorded training steps of three levels", BACKWARD, losses[1:], double(losses[0]))]


def check_compile(size: Size, device: torch.device) -> list[Check]:
    """Check that a step under `torch.compile(fullgraph=True)` gives the eager one's losses and gradients."""
    problem = cases.Problem(size, device)
    flow, mixture = problem.model.nfs[0], problem.model.mixture
    grid = flow.grid(size.height, size.width, device)
    parameters = [*flow.parameters(), *mixture.level(0)]

    def forward() -> Tensor:
        z, log_det = flow(problem.x, grid)
        terms = mixture.losses(z, log_det, problem.image_labels, 0, stage=2, label_smoothing=problem.smoothing)
        return official.official_loss({name: term.mean() for name, term in terms.items()})

    backend = "inductor" if device.type == "cuda" else "aot_eager"  # inductor would need a C++ compiler on a CPU
    compiled = torch.compile(forward, fullgraph=True, backend=backend)
    eager_loss, loss = forward(), compiled()
    eager_gradients, gradients = (torch.autograd.grad(each, parameters) for each in (eager_loss, loss))
    return [
        worst("compiled loss equals eager", FORWARD, [loss], [eager_loss.double()]),
        worst("compiled gradients equal eager", BACKWARD, gradients, double(*eager_gradients)),
    ]


def check_tf32(device: torch.device) -> list[Check]:
    """Check that tensor cores truncate float32 operands to tf32, and that our rounding beforehand prevents it."""
    from benchmarks import tf32

    draw = Draw(device)
    a, b = draw.normal(tf32.SIDE, tf32.SIDE), draw.normal(tf32.SIDE, tf32.SIDE)
    bare = tf32.deviations(tf32.dot(a, b), a, b)
    kind = min(bare, key=lambda name: bare[name])
    note = f"operands as they are come out {kind} (" + ", ".join(f"{k} {v:.1e}" for k, v in bare.items()) + ")"
    prepared = tf32.deviations(tf32.dot(tf32.rounded(a), tf32.rounded(b)), a, b)["rounded"]
    in_flow = tf32.deviations(ops._product(a, b, "tf32"), a, b)["rounded"]
    return [
        Check("a tf32 product is one of truncated, rounded, exact operands", bare[kind], FORWARD, note),
        Check("rounded operands stay rounded in Triton's tf32 product", prepared, FORWARD),
        Check("the flow's tf32 product has rounded operands", in_flow, FORWARD),
    ]


def check_memory(seconds: float = 80) -> list[Check]:
    """Check under compute-sanitizer (CUDA toolkit) that nothing goes out of bounds or races in shared memory."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        return [Check("compute-sanitizer", 0, 0, "is not installed: nothing was checked")]
    checks = []
    for tool in ("memcheck", "racecheck"):
        with tempfile.TemporaryDirectory() as folder:
            program = [sys.executable, "-m", "benchmarks.gpu", "--only", "against float64, 70 pixels"]
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *program, "--output", f"{folder}/r.json"]
            try:
                ended = subprocess.run(
                    command,
                    cwd=Path(__file__).parents[1],
                    env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # each tensor has bounds of its own
                    capture_output=True,
                    text=True,
                    timeout=seconds / 2,
                )
            except subprocess.TimeoutExpired:
                checks.append(Check(tool, 0, 0, "took too long: nothing was found until then"))
                continue
        last = (ended.stdout.strip() or ended.stderr.strip()).rpartition("\n")[2]
        checks.append(Check(tool, float(ended.returncode == 9), 0, last))
    return checks


def kernels_run(x: Tensor) -> Check:
    """Check that on CUDA the kernels are what runs."""
    path = ops.path(x)
    return Check("the kernels run", float(x.is_cuda and path != "triton"), 0, f"path: {path}")


if __name__ == "__main__":
    sys.exit(main())
