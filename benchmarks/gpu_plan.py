"""The order of `make gpu`: which groups of jobs there are, in which runs, after how long each is given up.

A group has a process of its own. What the jobs are stands in `gpu_jobs.py`; here is nothing that needs torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple


class Group(NamedTuple):
    """Jobs that share a process: a crash or an endless wait costs them alone."""

    name: str
    seconds: float  # after which its process is killed
    environment: Mapping[str, str] = MappingProxyType({})


class Run(NamedTuple):
    """Groups in phases, one phase after the other. The groups of one phase run side by side: they time nothing."""

    seconds: float
    phases: tuple[tuple[Group, ...], ...]

    @property
    def groups(self) -> tuple[Group, ...]:
        return tuple(group for phase in self.phases for group in phase)

    def without_limits(self) -> Run:
        """Return the run for a machine whose speed nobody knows."""
        return Run(math.inf, tuple(tuple(group._replace(seconds=math.inf) for group in each) for each in self.phases))


FINISHED = "finished"  # how a group ends if nothing happens
TRITON_CACHE = "triton-cache.tar.gz"  # among the results
WHEELS, CARRIED_CACHE = ".whl", f".{TRITON_CACHE}"  # in the checkout, ignored by git


COMMAND_SECONDS = 570.0  # that a run may take: a command on a rented machine has 10 minutes


def _alone(*groups: Group) -> tuple[tuple[Group, ...], ...]:
    return tuple((group,) for group in groups)


CASES = ("training", "flow", "mixture", "scores", "codes", "distances", "scoring", "official-loop", "coupling")

RUNS = {
    # Correctness, compiling side by side; then the two figures that are wanted most.
    "1": Run(
        400,
        (
            tuple(
                Group(name, 140)
                for name in ("check-flow", "check-blocks", "check-mixture", "check-scores", "check-coupling")
            ),
            *_alone(
                Group("training", 70),
                Group("training-steps", 60),
                Group("training-official", 40),
                Group("million", 75),
            ),
        ),
    ),
    # What takes many repetitions, with the kernels that run 1 compiled.
    "2": Run(
        270,
        _alone(
            Group("determinism", 60),
            Group("convergence", 60),
            Group("stages-2", 30, {"HGAD_FAST_STAGES": "2"}),
            Group("stages-3", 30, {"HGAD_FAST_STAGES": "3"}),
            Group("centres", 35),
            Group("waits", 40),
        ),
    ),
    # What a user feels. First a day with each method, while others compile; then what is wanted most.
    "3": Run(
        400,
        (
            tuple(
                Group(name, 120, {"OMP_NUM_THREADS": "1"})  # as many threads as groups
                for name in (
                    *("day-gaussian", "day-hgad", "day-vqflow"),
                    *("commands-gaussian", "commands-hgad", "commands-vqflow"),
                    *("first-steps", "first-official-steps", "first-scores"),
                )
            ),
            *_alone(
                Group("user-training", 90),
                Group("validation", 40),
                Group("scorer", 50),
                Group("largest-batch", 40),
                Group("user-scoring", 45),
            ),
        ),
    ),
    # More of it, with the kernels that run 3 compiled; time is left for what run 3 leaves to be explained or mended.
    "4": Run(
        270,
        _alone(
            Group("user-training-40-classes", 75),
            Group("native", 90),
            Group("methods", 90),
        ),
    ),
    "rest": Run(
        1500,
        _alone(
            Group("compile", 90),
            Group("scoring", 60),
            Group("kernels", 60),
            *(Group(f"case-{case}", 150) for case in CASES),
            Group("training-40-classes", 90),
            Group("training-compiled", 150),
            Group("cases-compiled", 240),
        ),
    ),
}
PLANS = {"kernels": ("1", "2"), "user": ("3", "4")}  # pairs of runs, with time between them to mend what failed
ON_REQUEST = (Group("small-checks", 80), Group("sanitizer", 180))
GROUPS = {group.name: group for group in (*(group for run in RUNS.values() for group in run.groups), *ON_REQUEST)}


def chosen_run(name: str | None, also: Sequence[str] = (), only: Sequence[str] = ()) -> Run:
    """Return a run of the plan, or all in order, with the groups of `also` behind; or a run of the groups of `only`.

    Raises:
        ValueError: there is no group of such a name.
    """
    for each in (*also, *only):
        if each not in GROUPS:
            raise ValueError(f"there is no group {each!r}; there are {', '.join(GROUPS)}")
    if only:
        groups = [GROUPS[each] for each in only]
        return Run(sum(group.seconds for group in groups) + 30, _alone(*groups))
    runs = [RUNS[name]] if name else list(RUNS.values())
    there = {group.name for run in runs for group in run.groups}
    more = _alone(*(GROUPS[each] for each in dict.fromkeys(also) if each not in there))
    return Run(sum(run.seconds for run in runs), sum((run.phases for run in runs), ()) + more)


def unexplained(results: Path, plan: str) -> list[str]:
    """Return the groups of a result file that did not finish or found something wrong, and behind them those that found
    a figure below its target.

    Args:
        results: of the first run of a plan.
        plan: its name in `PLANS`.

    Raises:
        ValueError: they are of none of the groups of that run.
    """
    document: dict[str, Any] = json.loads(results.read_text())
    groups: dict[str, Any] = document["groups"]
    first = PLANS[plan][0]
    if groups and not {group.name for group in RUNS[first].groups} & groups.keys():
        known = ", ".join(f"--plan {name} after run {runs[0]}" for name, runs in PLANS.items())
        raise ValueError(f"--after {results} has no group of run {first}; a plan goes on after its first run: {known}")
    failed = [name for name, group in groups.items() if group["ended"] != FINISHED or not group["passed"]]
    missing = {figure["group"] for figure in document.get("figures", ()) if figure.get("misses")}
    return failed + [name for name in groups if name in missing and name not in failed]


def result_name(run: str | None, commit: str) -> str:
    """Return the name of a run's files, without suffix: with the commit, shortened, `dirty` if it was changed."""
    digits, *dirty = commit.split("-")
    return "-".join(["gpu", run or "all", digits[:12], *dirty])


def command(run: str, commit: str, also: Sequence[str] = (), more: str = "") -> str:
    """Return the shell command of a run, for the repository's root on a machine without git; $OUT is where to write."""
    python = "${PYTHON:-python3}"
    cache = f" --triton-cache {CARRIED_CACHE}" if run != "1" else ""
    others = f" --also {','.join(also)} --seconds {_seconds(run, also):.0f}" if also else ""
    return (
        f'site=$(mktemp -d); {python} -m pip install -q --no-index --no-deps --no-compile --target "$site" '
        f"{WHEELS}/*.whl || echo 'There is no wheel of FrEIA here.'; "
        f'PYTHONPATH="$site${{PYTHONPATH:+:$PYTHONPATH}}" PYTHONUNBUFFERED=1 {python} -m benchmarks.gpu '
        f'--run {run} --output "${{OUT:?}}" --commit {commit}{cache}{others}{more}'
    )


def _seconds(run: str, also: Sequence[str]) -> float:
    """Return the time of a run with the groups of `also` behind its own, as far as a command may take as long."""
    groups = {group.name for group in RUNS[run].groups}
    more = sum(GROUPS[name].seconds for name in dict.fromkeys(also) if name not in groups)
    return min(RUNS[run].seconds + more, COMMAND_SECONDS)


def plan_text(plan: str, commit: str, also: Sequence[str] = (), more: str = "") -> str:
    """Return the two runs of a plan as shell commands, and in comments what to do before and between them."""
    first, second = PLANS[plan]
    limits = {run: f"{_seconds(run, names):.0f} s at most" for run, names in ((first, ()), (second, also))}
    result, another = result_name(first, commit), "" if plan == "kernels" else f" {plan}"
    cache = "" if first == "1" else f", and {CARRIED_CACHE} if an earlier run of these kernels left one"
    changed = (
        ["# The working tree has changes: commit first, so that the results have a commit."] if "-" in commit else []
    )
    return "\n".join(
        [
            *changed,
            "# Before, here: bring FrEIA along, which a machine with a GPU has not.",
            f"#   pip wheel --no-deps --wheel-dir {WHEELS} FrEIA==0.2",
            f"#   printf '/%s\\n' {WHEELS}/ {CARRIED_CACHE} >> .git/info/exclude",
            f"# Run {first}, {limits[first]}. Carry {WHEELS}{cache}. In the repository's root there, with $OUT an "
            "empty folder:",
            command(first, commit, (), more),
            f"# Between, here: what lay in $OUT is {result}.json and .log, and {TRITON_CACHE}.",
            f"#   cp {TRITON_CACHE} {CARRIED_CACHE}",
            f"#   python -m benchmarks.gpu --plan{another} --after {result}.json",
            f"# prints run {second} with the groups behind it that run {first} left unexplained, or short of a target.",
            f"# Run {second}, {limits[second]}. Carry {WHEELS} and {CARRIED_CACHE}:",
            command(second, commit, also, more),
        ]
    )
