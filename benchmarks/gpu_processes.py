"""The processes of `make gpu`: one a group, watched from here, where nothing touches the device.

A process that crashes, loses the device or waits for it for ever costs its own group. What all have found is written
anew whenever one has ended: at any moment the files hold what is known.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import triton_cache
from benchmarks.gpu_plan import FINISHED, TRITON_CACHE, Group, Run

ROOT = Path(__file__).resolve().parents[1]
LISTS = ("checks", "figures", "rows", "failures", "latencies")
LOG_BYTES = 2**19  # of a group's log; its end is kept
NO_TIME = "no time was left"
CACHE = "triton-cache"  # folder


@dataclass
class Ending:
    """How a group came out."""

    ended: str  # `FINISHED`, or what happened
    seconds: float
    passed: bool  # nothing wrong was found


@dataclass
class Report:
    """What the groups have found so far, in `<name>.json`; their logs are in `<name>.log` beside it."""

    folder: Path
    name: str
    about: dict[str, Any]
    groups: dict[str, Ending] = field(default_factory=dict)
    found: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {name: [] for name in LISTS})
    left_out: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)  # of the summary
    logs: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.left_out and all(each.passed and each.ended == FINISHED for each in self.groups.values())

    def add(self, group: str, ending: Ending, document: Mapping[str, Any], log: str) -> None:
        """Take in what a group has written, and name what it has not finished."""
        self.groups[group] = ending
        self.about = {**document.get("about", {}), **self.about}
        for name in LISTS:
            self.found[name] += [{"group": group} | each for each in document.get(name, ())]
        self.left_out += [f"{group}: {each}" for each in document.get("left_out", ())]
        unfinished = document.get("unfinished", [] if ending.ended == FINISHED else ["everything"])
        self.left_out += [f"{group}: {job} ({ending.ended})" for job in unfinished]
        self.lines += document.get("lines", ())
        self.logs.append(f"==== {group}: {ending.ended}, {ending.seconds:.0f} s\n{log}\n")

    def save(self) -> Path:
        """Write results and logs, and return the path of the results."""
        groups = {name: asdict(ending) for name, ending in self.groups.items()}
        document = self.about | {"groups": groups, **self.found, "left_out": self.left_out}
        with replacing(self.folder / f"{self.name}.log") as temporary:
            temporary.write_text("\n".join(self.logs))
        with replacing(path := self.folder / f"{self.name}.json") as temporary:
            temporary.write_text(json.dumps(document, indent=1) + "\n")
        return path

    def summary(self) -> str:
        """Return a short table: figures and failed checks, then how every group ended, then what was left out."""
        checks = self.found["checks"]
        passed = sum(check["passed"] for check in checks)
        endings = [f"{name}: {each.ended}, {each.seconds:.0f} s" for name, each in self.groups.items()]
        left_out = [f"left out: {each}" for each in self.left_out]
        wrong = [name for name, each in self.groups.items() if each.ended != FINISHED or not each.passed]
        targets = [figure for figure in self.found["figures"] if figure["has_target"]]
        reached = f", {sum(not each['misses'] for each in targets)} of {len(targets)} targets reached" * bool(targets)
        verdict = f"{passed} of {len(checks)} checks passed{reached}"
        return "\n".join(["", *self.lines, *endings, *left_out, verdict, *(f"to be explained: {n}" for n in wrong)])


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path, whose file replaces that of `path` when the block ends without an error.

    (`hgad_fast.files` has a stricter one; to import it takes torch.)
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    yield temporary
    os.replace(temporary, path)


class Child:
    """The process of a group. It writes its results to a JSON file, and all it says to a log."""

    def __init__(
        self, group: Group, command: Sequence[str], folder: Path, environment: Mapping[str, str], deadline: float
    ) -> None:
        self.group, self.deadline, self.started = group, deadline, time.monotonic()
        self.results, self.log = folder / f"{group.name}.json", folder / f"{group.name}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, str(self.results)],
                cwd=ROOT,
                env={**os.environ, **environment, **group.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=os.setpgrp,  # a group to kill, in our session: it does not outlive a command that is ended
            )

    def end(self) -> None:
        """End the process and all that it has started, whatever they wait for; its log says where it stood."""
        with suppress(ProcessLookupError):
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGUSR1)  # `faulthandler` of the child answers
                time.sleep(0.5)
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a process may hang in the driver, out of reach of signals
            self.process.wait(10)

    def report_to(self, report: Report, reason: str = "") -> None:
        """Report what the process has found, and how it ended: by itself, or for the reason given."""
        document = json.loads(self.results.read_text()) if self.results.exists() else {}
        ending = Ending(reason or _ending(self.process.poll()), time.monotonic() - self.started, False)
        if unfinished := document.get("unfinished"):
            ending.ended += f", in {unfinished[0]}"
        ending.passed = bool(document.get("passed"))
        report.add(self.group.name, ending, document, _end_of(self.log))
        report.save()
        print(f"-- {self.group.name}: {ending.ended}, {ending.seconds:.0f} s", flush=True)


def _ending(status: int | None) -> str:
    """Return what the exit status of a process says."""
    if status is None:
        return "cannot be killed"
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"ended with status {status}" if status else FINISHED


def _end_of(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(log.stat().st_size - LOG_BYTES, 0))
        return file.read().decode(errors="replace")


def carry_out(
    run: Run,
    report: Report,
    command: Callable[[Group], Sequence[str]],
    work: Path,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Run the groups in their order until the run's time is over.

    A group may take longer than its limit by what all that are still to come leave of the run's time.

    Args:
        run: what is to be done.
        report: takes in what is found.
        command: starts a group; it gets the path of its results as another argument.
        work: an existing folder for what the processes write; `CACHE` in it is the one of Triton that they share.
        clock: tells the seconds.
    """
    end = clock() + run.seconds
    cache = work / CACHE
    cache.mkdir(exist_ok=True)
    for number, phase in enumerate(run.phases):
        now = clock()
        if now >= end:
            for group in phase:
                report.groups[group.name] = Ending(NO_TIME, 0, False)
                report.left_out.append(f"{group.name}: everything ({NO_TIME})")
            report.save()
            continue
        needed = sum(max(group.seconds for group in each) for each in run.phases[number:])
        spare = max(end - now - needed, 0.0) if needed < math.inf else 0.0
        threads = str(max((os.cpu_count() or 1) // len(phase), 1))
        environment = {"OMP_NUM_THREADS": threads, **os.environ, "TRITON_CACHE_DIR": str(cache)}
        children: list[Child] = []
        try:
            for group in phase:
                deadline = min(end, now + group.seconds + spare)
                children.append(Child(group, command(group), work, environment, deadline))
            _watch(children, report, clock)
        finally:
            for child in children:  # there are some after an error, or when the run is ended from outside
                child.end()
                child.report_to(report, "stopped with the run")
        triton_cache.pack(cache, report.folder / TRITON_CACHE)


def _watch(children: list[Child], report: Report, clock: Callable[[], float]) -> None:
    """Wait until all have ended, end those that have no time left, and take each from the list when it has reported."""
    while children:
        for child in list(children):
            has_ended = child.process.poll() is not None
            if not has_ended and clock() < child.deadline:
                continue
            child.end()
            child.report_to(report, "" if has_ended else "timed out")
            children.remove(child)
        time.sleep(0.05)


def this_python(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu", *arguments]
