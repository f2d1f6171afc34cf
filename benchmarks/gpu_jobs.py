"""The jobs of `make gpu` by groups, and the process that carries out those of one group.

Whatever a job finds is written at once, so that the end of the process, whenever it comes, loses nothing.
"""

from __future__ import annotations

import faulthandler
import functools
import json
import signal
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import gpu_checks, gpu_day, gpu_figures, gpu_user
from benchmarks.gpu_checks import SIZES
from benchmarks.gpu_findings import Check, Figure, LeftOut, first_line
from benchmarks.gpu_plan import CASES
from benchmarks.gpu_processes import replacing
from hgad_fast.bench import cases, measure, results
from hgad_fast.bench.cases import HEADLINE, LARGE, MILLION_PIXELS, QUICK, Size
from hgad_fast.bench.official import has_freia

Found = Check | Figure | LeftOut | results.Outcome
WITH_COMPILED_PEERS = (("training", LARGE), ("mixture", LARGE), ("flow", LARGE), ("training", HEADLINE))


class Job(NamedTuple):
    """A step of a group; it yields what it finds, as it finds it."""

    name: str
    run: Callable[[], Iterable[Found]]


def jobs(group: str, device: torch.device, small: bool = False) -> list[Job]:
    """Return the jobs of a group, the most important in front. `small` has tiny sizes, to try the machinery."""
    large, million, headline = (QUICK,) * 3 if small else (LARGE, MILLION_PIXELS, HEADLINE)
    sizes, rounds = (SIZES[1:2], 2) if small else (SIZES, 10)
    few, many, steps, frames, enlarged, limit = (2, 3, 4, 3, 2, 1) if small else (5, 200, 300, 50, 8, 8192)
    more_classes = replace(large, classes=3 if small else 40)
    images = 6 if small else 120
    both = (large, more_classes)

    def job(name: str, section: Callable[..., Iterable[Found]], *arguments: Any) -> Job:
        return Job(name, functools.partial(section, *arguments))

    def against_float64(*checks: Callable[..., Iterable[Found]], sizes: Iterable[Size] = sizes) -> list[Job]:
        return [
            job(f"{check.__name__.removeprefix('check_')} against float64, {_short(size)}", check, size, device)
            for size in sizes
            for check in checks
        ]

    def case(name: str, size: Size, compiled: bool = False) -> Job:
        peers = " with compiled peers" if compiled else ""
        return job(f"{name}{peers}: {size}", _measured, name, size, device, compiled, small)

    def kernels(name: str, size: Size) -> Job:
        return job(f"{name or 'all'} kernels alone, {size.pixels} pixels", gpu_figures.kernel_times, size, device, name)

    def training(size: Size) -> list[Job]:
        return [
            job(f"training steps, {precision}", gpu_figures.training_times, size, device, precision, rounds)
            for precision in ("bf16", "tf32", "fp32")
        ]

    def official_training(size: Size, compiled: bool = False) -> list[Job]:
        precisions = gpu_figures.peer_precisions(device)
        section = gpu_figures.official_training_times
        return [
            job(f"official steps, {precision}", section, size, device, precision, compiled, few)
            for precision in precisions[: 1 if compiled else None]
        ]

    def in_steps(steps: dict[str, Callable[[], Iterable[Found]]]) -> list[Job]:
        return [Job(*step) for step in steps.items()]

    def user_training(size: Size) -> list[Job]:
        return [
            job("FrEIA", _official_is_there),
            *in_steps(gpu_user.TrainingRates(size, device, images, rounds).steps),
            job("split of a step", gpu_figures.split_of_a_step, size, device, rounds),
            job("busy share", gpu_figures.waits_of_a_step, size, device),
        ]

    every_check = (gpu_checks.check_coupling, gpu_checks.check_mixture, gpu_checks.check_scores)
    every_check += (gpu_checks.check_codes, gpu_checks.check_distances, gpu_checks.check_flow, gpu_checks.check_blocks)
    stages = [
        *against_float64(gpu_checks.check_blocks, sizes=sizes[:2]),
        job("whole blocks, time", gpu_figures.block_times, million, device, few),
    ]
    groups: dict[str, list[Job]] = {
        "check-flow": against_float64(gpu_checks.check_flow),
        "check-blocks": against_float64(gpu_checks.check_blocks),
        "check-mixture": against_float64(gpu_checks.check_mixture),
        "check-scores": [
            *against_float64(gpu_checks.check_scores),
            *against_float64(gpu_checks.check_codes),
            *against_float64(gpu_checks.check_distances),
            job("operands of a tf32 product", gpu_checks.check_tf32, device),
        ],
        "check-coupling": [
            *against_float64(gpu_checks.check_coupling),
            job("recorded training steps", gpu_checks.check_steps, large, device),
        ],
        "training": [case("training", large)],
        "training-steps": training(large),
        "training-official": [job("FrEIA", _official_is_there), *official_training(large)],
        "million": [
            job("scoring: flow and mixture", gpu_figures.density_times, million, device, few),
            case("flow", million),
        ],
        "determinism": [
            job("whole blocks run after run", gpu_checks.check_many_runs, million, device, many),
            job("losses and gradients run after run", gpu_checks.check_determinism, replace(large, blocks=4), device),
        ],
        "convergence": [job("convergence", gpu_figures.convergence, headline, device, steps)],
        "stages-2": stages,
        "stages-3": stages,
        "centres": [
            job("far centres", gpu_checks.check_far_centres, sizes[0], device),
            kernels("mixture", large),
            kernels("mixture", million),
        ],
        "waits": [
            job("waits of the host", gpu_figures.waits_of_a_step, large, device),
            job("split of a step", gpu_figures.split_of_a_step, large, device, rounds),
        ],
        "compile": [job("torch.compile of a training step", gpu_checks.check_compile, QUICK, device)],
        "scoring": [job("features to map", gpu_figures.scoring_times, large, device, frames, enlarged)],
        "scorer": [job("Scorer", gpu_figures.scorer_times, device, small)],
        "kernels": [kernels("", large), kernels("coupling", million)],
        "largest-batch": [job("largest batch", gpu_figures.largest_batches, large, device, limit)],
        "training-40-classes": [*training(more_classes), *official_training(more_classes)],
        "training-compiled": official_training(large, compiled=True),
        "cases-compiled": [case(*each, compiled=True) for each in WITH_COMPILED_PEERS],
        **{f"day-{method}": in_steps(gpu_day.Day(method, device).steps) for method in gpu_day.METHODS},
        **{f"commands-{method}": in_steps(gpu_day.Commands(method, device).steps) for method in gpu_day.METHODS},
        "first-steps": [job(f"K={size.classes}", gpu_user.first_training_steps, size, device) for size in both],
        "first-official-steps": [
            job(f"K={size.classes}", gpu_user.first_official_steps, size, device) for size in both
        ],
        "first-scores": [job("scores", gpu_user.first_scores, large, device)],
        "user-training": user_training(large),
        "user-training-40-classes": user_training(more_classes),
        "validation": in_steps(gpu_user.ValidationTimes(large, device, rounds).steps),
        "user-scoring": [job("HGAD from pixels", gpu_user.hgad_scoring, device, small)],
        "native": in_steps(gpu_user.Native(device, small).steps),
        "methods": [job(name, gpu_user.method_scoring, name, device, small) for name in gpu_user.SCORED],
        "small-checks": against_float64(*every_check, sizes=SIZES[1:2]),
        "sanitizer": [job("compute-sanitizer", gpu_checks.check_memory)],
    }
    groups |= {f"case-{name}": [case(name, size) for size in cases.sizes(name, device, small)] for name in CASES}
    return groups[group]


def _short(size: Size) -> str:
    return f"{size.pixels} pixels, C={size.channels}, K={size.classes}, M={size.centres}"


def _measured(
    case: str, size: Size, device: torch.device, compiled: bool, small: bool
) -> Iterable[results.Outcome | Figure]:
    """Time a case, and first say what the device does at best, before the case heats it."""
    ceiling = measure.measure_ceiling(device, cases.precisions(device))
    yield Figure("a copy's bytes per second", ceiling.bytes_per_second / 1e9, "GB/s")
    for precision, rate in ceiling.flop_per_second.items():
        yield Figure(f"a product's operations per second, {precision}", rate / 1e12, "TFLOP/s")
    yield from measure.measure(case, size, device, compiled=compiled, rounds=3 if small else None, seconds_in_all=2)


def _official_is_there() -> Iterable[LeftOut]:
    if not has_freia():
        yield LeftOut("the official flow", "FrEIA is not installed; 'definition' is measured in its place")


@dataclass
class Findings:
    """What a group has found so far."""

    path: Path
    about: dict[str, Any]
    unfinished: list[str]
    checks: list[Check] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    outcomes: list[results.Outcome] = field(default_factory=list)

    def add(self, found: Found) -> None:
        for kind, known in ((Check, self.checks), (Figure, self.figures), (LeftOut, self.left_out)):
            if isinstance(found, kind):
                known.append(found)  # type: ignore[attr-defined]
                return
        self.outcomes.append(found)  # type: ignore[arg-type]

    def save(self) -> None:
        wrong = results.wrong_results(self.outcomes)
        failed = [str(check) for check in self.checks if not check.passed]
        document = {
            "about": self.about,
            "unfinished": self.unfinished,
            "checks": [check.document() for check in self.checks],
            "figures": [figure.document() for figure in self.figures],
            "left_out": [str(each) for each in self.left_out],
            "passed": not failed and not wrong,
            "lines": [*failed, *wrong, *map(str, self.figures), *_lines(self.outcomes)],
        }
        with replacing(self.path) as temporary:
            temporary.write_text(json.dumps(document | results.document(self.outcomes, {})))


def _lines(outcomes: Iterable[results.Outcome]) -> list[str]:
    """Return a line for each case and size."""
    lines = []
    for (case, size, _), block in results.grouped(outcomes).items():
        parts = []
        for outcome in block:
            if isinstance(outcome, results.Failure):
                parts.append(f"{outcome.contender}: {outcome.reason[:40]}")
                continue
            ratio = next(iter(outcome.speedups.values()), (float("nan"),))[0]
            gain = "" if outcome.is_peer else f" ({ratio:.1f}x, {outcome.ceiling_share:.0%} of ceiling)"
            parts.append(f"{outcome.contender} {1e3 * outcome.seconds:.2f} ms{gain}")
        lines.append(f"{case} {size.pixels} pixels C={size.channels} K={size.classes}: {'; '.join(parts)}")
    return lines


def carry_out(group: str, device_type: str, small: bool, path: Path) -> int:
    """Be the process of a group: carry out its jobs, and return the exit status."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # the parent asks where we stand before it kills us
    device = torch.device(device_type)
    return carry_out_jobs(jobs(group, device, small), device, path)


def carry_out_jobs(todo: list[Job], device: torch.device, path: Path) -> int:
    """Carry out jobs, and write each finding when there is one. An error ends its job, a lost device the process."""
    findings = Findings(path, measure.about_run(device), [job.name for job in todo])
    findings.save()
    for job in todo:
        print(f"-- {job.name}", flush=True)
        try:
            for found in job.run():
                findings.add(found)
                print(found, flush=True)
                findings.save()
        except Exception as error:  # a crash is a finding, and no reason to lose the other jobs
            traceback.print_exc()
            findings.add(Check(f"{job.name} runs", 1, 0, first_line(error)))
            findings.save()
            if not _usable(device):
                print("the device is lost to this process", flush=True)
                return 1
        findings.unfinished.remove(job.name)
        findings.save()
    return 0


def _usable(device: torch.device) -> bool:
    """Return whether the device still works for this process: some errors stay until it ends."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
