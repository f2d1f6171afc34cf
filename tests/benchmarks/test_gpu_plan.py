"""`make gpu` without a GPU: its plans, processes that fail, what is kept, and all runs rehearsed on a CPU."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_figures, gpu_jobs, gpu_plan, gpu_processes, gpu_user, triton_cache
from benchmarks.gpu_findings import Check, Figure, LeftOut
from benchmarks.gpu_plan import CASES, FINISHED, GROUPS, RUNS, Group, Run
from hgad_fast import HGADConfig
from hgad_fast.bench import cases, results
from hgad_fast.bench.official import has_freia
from hgad_fast.scoring.score import score_images

ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def read(path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def commands(text: str) -> list[str]:
    """Return what of a plan is no comment."""
    return [line for line in text.splitlines() if not line.startswith("#")]


# The plan.


def test_every_group_has_jobs_and_is_in_one_run() -> None:
    planned = [group.name for run in RUNS.values() for group in run.groups]
    assert len(set(planned)) == len(planned)
    assert tuple(sorted(CASES)) == tuple(sorted(cases.CASES))
    for group in GROUPS:
        for device, small in ((CUDA, False), (CPU, True)):
            assert gpu_jobs.jobs(group, device, small)
        names = [job.name for job in gpu_jobs.jobs(group, CUDA)]
        assert len(set(names)) == len(names)
    timed = {job.name for case in CASES for job in gpu_jobs.jobs(f"case-{case}", CUDA)}
    assert timed == {f"{case}: {size}" for case in cases.CASES for size in cases.sizes(case, CUDA)}


def test_what_is_worth_most_comes_first_and_fits_the_time() -> None:
    """All phases have their time even if each takes all that it may."""
    assert gpu_plan.PLANS == {"kernels": ("1", "2"), "user": ("3", "4")}
    for runs in gpu_plan.PLANS.values():
        for run, seconds in zip(runs, (400, 270), strict=True):
            assert RUNS[run].seconds == seconds
            assert sum(max(group.seconds for group in phase) for phase in RUNS[run].phases) <= seconds - 15
    first, second = RUNS["1"], RUNS["2"]
    side_by_side, *others = first.phases
    assert [group.seconds for group in side_by_side] == [140] * 5
    assert [phase[0].name for phase in others] == ["training", "training-steps", "training-official", "million"]
    names = [group.name for group in second.groups]
    assert names == ["determinism", "convergence", "stages-2", "stages-3", "centres", "waits"]
    assert GROUPS["stages-3"].environment == {"HGAD_FAST_STAGES": "3"}
    assert all(len(phase) == 1 for run in RUNS.values() for phase in run.phases[run in (first, RUNS["3"]) :])
    assert "sanitizer" not in {group.name for run in RUNS.values() for group in run.groups}


def test_a_users_day_comes_first_beside_what_compiles_and_then_what_is_wanted_most() -> None:
    side_by_side, *others = RUNS["3"].phases
    assert [group.name for group in side_by_side] == [
        *("day-gaussian", "day-hgad", "day-vqflow", "commands-gaussian", "commands-hgad", "commands-vqflow"),
        *("first-steps", "first-official-steps", "first-scores"),
    ]
    assert all(group.environment == {"OMP_NUM_THREADS": "1"} for group in side_by_side)
    names = [phase[0].name for phase in others]
    assert names == ["user-training", "validation", "scorer", "largest-batch", "user-scoring"]
    few, many = (gpu_jobs.jobs(f"user-training{more}", CUDA) for more in ("", "-40-classes"))
    assert [job.name for job in few] == [job.name for job in many]
    assert [group.name for group in RUNS["4"].groups] == ["user-training-40-classes", "native", "methods"]
    assert GROUPS["methods"].seconds == 90


@pytest.mark.parametrize("plan", gpu_plan.PLANS)
def test_a_plan_is_two_short_commands_and_says_what_to_do_between_them(plan: str) -> None:
    runs = gpu_plan.PLANS[plan]
    text = gpu_plan.plan_text(plan, COMMIT, [name for name in GROUPS if name not in RUNS[runs[1]].groups])
    first, second = commands(text)
    for run, command in zip(runs, (first, second), strict=True):
        assert len(command) < 2000 and f"--run {run} " in command and f"--commit {COMMIT}" in command
        assert '--output "${OUT:?}"' in command and "--no-index --no-deps" in command
        subprocess.run(["bash", "-n", "-c", command], check=True)
    assert ("--triton-cache" in first) == (plan == "user") and "--triton-cache .triton-cache.tar.gz" in second
    assert "--also" not in first and "--also check-flow," in second
    comments = [line for line in text.splitlines() if line.startswith("#")]
    between = "\n".join(comments[4:])
    assert "cp triton-cache.tar.gz .triton-cache.tar.gz" in between and f"gpu-{runs[0]}-0123456789ab.json" in between
    option = "--plan" if plan == "kernels" else f"--plan {plan}"
    assert f"{option} --after gpu-{runs[0]}-0123456789ab.json" in between
    assert "Carry .whl and .triton-cache.tar.gz" in between
    assert "changes" not in text and "has changes" in gpu_plan.plan_text(plan, f"{COMMIT}-dirty")


def test_what_run_1_left_unexplained_joins_run_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    groups = {
        "training": {"ended": FINISHED, "seconds": 1, "passed": True},
        "million": {"ended": "timed out", "seconds": 1, "passed": True},
        "check-flow": {"ended": FINISHED, "seconds": 1, "passed": False},
    }
    (tmp_path / "r.json").write_text(json.dumps({"groups": groups}))
    assert gpu.main(["--plan", "--commit", COMMIT, "--after", str(tmp_path / "r.json")]) == 0
    assert commands(capsys.readouterr().out)[1].endswith("--also million,check-flow --seconds 485")  # 270 + 75 + 140
    chosen = gpu_plan.chosen_run("2", ["million", "waits", "million"])
    assert [group.name for group in chosen.groups] == [*(group.name for group in RUNS["2"].groups), "million"]
    assert [group.name for group in gpu_plan.chosen_run(None).groups] == [
        group.name for run in RUNS.values() for group in run.groups
    ]


def test_what_run_3_left_short_of_a_target_joins_run_4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("user-training", "scorer", "validation", "day-hgad")
    groups = {name: {"ended": FINISHED, "seconds": 1, "passed": name != "day-hgad"} for name in names}
    figures = [
        {"group": "user-training"} | Figure("a", 4.9, "x", at_least=5).document(),
        {"group": "scorer"} | Figure("b", 4.9, "ms", at_most=5).document(),
        {"group": "validation"} | Figure("c", None, "x", at_least=8).document(),
    ]
    (tmp_path / "r.json").write_text(json.dumps({"groups": groups, "figures": figures}))
    assert gpu.main(["--plan", "user", "--commit", COMMIT, "--after", str(tmp_path / "r.json")]) == 0
    assert commands(capsys.readouterr().out)[1].endswith(  # what failed, then what fell short
        "--also day-hgad,user-training,validation --seconds 520"
    )


def test_a_second_run_takes_no_longer_than_a_command_may() -> None:
    also = [group.name for group in RUNS["3"].groups]
    assert gpu_plan.command("4", COMMIT, also).endswith(" --seconds 570")
    assert "# Run 4, 570 s at most." in gpu_plan.plan_text("user", COMMIT, also)
    assert gpu_plan.command("4", COMMIT, ["native"]).endswith(" --also native --seconds 270")  # it is there already
    assert "--seconds" not in gpu_plan.command("4", COMMIT)


def test_results_of_another_plan_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"groups": {"day-hgad": {"ended": FINISHED, "seconds": 1, "passed": False}}}))
    for plan, after, words in (
        (["--plan"], path, "has no group of run 1; a plan goes on after its first run: --plan kernels after run 1, "),
        (["--plan", "user"], tmp_path / "none.json", "none.json"),
    ):
        with pytest.raises(SystemExit):
            gpu.main([*plan, "--commit", COMMIT, "--after", str(after)])
        assert words in capsys.readouterr().err


def test_a_figure_says_whether_it_reaches_its_target() -> None:
    for figure, misses in (
        (Figure("a", 3.0, "x", at_least=3), False),
        (Figure("a", 2.9, "x", at_least=3), True),
        (Figure("a", 5.1, "ms", at_most=5), True),
        (Figure("a", math.nan, "x", at_least=3), True),
        (Figure("a", None, "x", at_least=3), True),
        (Figure("a", None, "x"), False),
    ):
        assert figure.misses == figure.document()["misses"] == misses
        assert json.loads(json.dumps(figure.document(), allow_nan=False))
    assert str(Figure("a", 2.9, "x", "note", at_least=3)) == "figure a: 2.9 x (misses at least 3) note"
    assert str(Figure("a", 2.9, "ms", at_most=3)) == "figure a: 2.9 ms (reaches at most 3)"
    assert str(Figure("a", 2.9, "")) == "figure a: 2.9"


def test_a_group_that_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--only", "sanitiser"])
    assert "there is no group 'sanitiser'; there are check-flow, " in capsys.readouterr().err


# The processes. Those of these tests are carried out by this file.


def child(folder: Path) -> Callable[[Group], Sequence[str]]:
    return lambda group: [sys.executable, "-m", "tests.benchmarks.test_gpu_plan", str(folder), group.name]


def be_a_child(folder: Path, group: str, path: Path) -> int:
    """Find something, then do what the group is called."""

    def first() -> Any:
        yield Check("found", 1e-7, 1e-6)

    def second() -> Any:
        yield Figure("half of the second job", 1.5, "ms")
        (folder / f"{group} is here").touch()
        print(f"this is {group}", flush=True)
        if group == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if group == "hangs":
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
                signal.signal(number, signal.SIG_IGN)
            helper = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
            (folder / "helper").write_text(str(helper.pid))
            (folder / "hangs for ever").touch()
            while True:
                signal.pause()
        if group == "fails":
            raise RuntimeError("illegal memory access\nand so on")

    todo = [gpu_jobs.Job("first", first), gpu_jobs.Job("second", second), gpu_jobs.Job("third", first)]
    gpu_jobs.measure.about_run = lambda device: {"device": "a stub"}
    gpu_jobs.faulthandler.register(signal.SIGUSR1)
    return gpu_jobs.carry_out_jobs(todo, CPU, path)


class Clock:
    """Stands still until the file is there, and stands far ahead then."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __call__(self) -> float:
        return 1e6 if self.file.exists() else 0.0


def test_a_group_that_dies_or_hangs_costs_itself_alone(tmp_path: Path) -> None:
    """What was found before is kept, what was not done is named, and no process is left."""
    limits = {"dies": 1, "hangs": 1, "fails": 2e6, "works": 2e6}
    groups = {name: Group(name, seconds) for name, seconds in limits.items()}
    run = Run(2e6, ((groups["dies"],), (groups["hangs"],), (groups["fails"], groups["works"])))
    report = gpu_processes.Report(tmp_path / "out", "gpu-1-x", {"commit": "x"})
    (tmp_path / "work").mkdir()
    gpu_processes.carry_out(run, report, child(tmp_path), tmp_path / "work", Clock(tmp_path / "hangs for ever"))
    assert not report.passed

    written = read(tmp_path / "out" / "gpu-1-x.json")
    assert written["commit"] == "x" and written["device"] == "a stub"
    endings = {name: (group["ended"], group["passed"]) for name, group in written["groups"].items()}
    assert endings == {
        "dies": ("killed by SIGKILL, in second", True),
        "hangs": ("timed out, in second", True),
        "fails": (FINISHED, False),
        "works": (FINISHED, True),
    }
    assert sorted(written["left_out"]) == [
        f"{group}: {job} ({endings[group][0]})" for group in ("dies", "hangs") for job in ("second", "third")
    ]
    found = [(check["group"], check["name"], check["passed"]) for check in written["checks"]]
    assert {each for each in found if each[1] == "found"} == {(group, "found", True) for group in groups}
    assert [each for each in found if not each[2]] == [("fails", "second runs", False)]
    assert {figure["group"] for figure in written["figures"]} == set(groups)
    text = report.summary()
    assert "FAILED second runs" in text and "illegal memory access" in text and "to be explained: hangs" in text

    log = (tmp_path / "out" / "gpu-1-x.log").read_text()
    assert all(f"==== {group}: " in log and f"this is {group}" in log for group in groups)
    hung = log.partition("==== hangs")[2].partition("==== ")[0]
    assert "in second" in hung  # the function that waits
    assert not is_running(int((tmp_path / "helper").read_text()))
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [
        "gpu-1-x.json",
        "gpu-1-x.log",
        "triton-cache.tar.gz",
    ]


def is_running(pid: int) -> bool:
    """Return whether a process runs; one that has ended may wait for its parent to ask."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_when_the_time_is_up_the_groups_left_are_named_and_nothing_is_passed(tmp_path: Path) -> None:
    report = gpu_processes.Report(tmp_path / "out", "gpu-2-x", {})
    clock = iter([0.0, 5.0, 10.0]).__next__
    run = Run(4, ((Group("a", 1),), (Group("b", 1), Group("c", 1))))
    gpu_processes.carry_out(run, report, lambda group: pytest.fail(group.name), tmp_path, clock)
    assert not report.passed
    written = read(tmp_path / "out" / "gpu-2-x.json")
    assert written["left_out"] == [f"{name}: everything (no time was left)" for name in "abc"]
    assert {group["ended"] for group in written["groups"].values()} == {"no time was left"}


def test_time_that_no_group_needs_goes_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its limit, and what the rest of the run leaves; no less if the run is late."""
    deadlines: dict[str, float] = {}

    class Stub:
        def __init__(self, group: Group, command: Any, folder: Any, environment: Any, deadline: float) -> None:
            deadlines[group.name] = deadline

        def end(self) -> None: ...
        def report_to(self, report: Any, reason: str) -> None: ...

    monkeypatch.setattr(gpu_processes, "Child", Stub)
    monkeypatch.setattr(gpu_processes, "_watch", lambda *_: None)
    run = Run(100, ((Group("a", 30), Group("b", 20)), (Group("c", 40),), (Group("d", 20),)))
    report = gpu_processes.Report(tmp_path / "out", "gpu-4-x", {})
    for moments, expected in (
        ((0, 0, 10, 20), {"a": 40, "b": 30, "c": 80, "d": 100}),  # 10 left, then 30, then 60
        ((0, 0, 50, 90), {"a": 40, "b": 30, "c": 90, "d": 100}),
    ):
        gpu_processes.carry_out(run, report, lambda group: [], tmp_path, iter(map(float, moments)).__next__)
        assert deadlines == expected
    gpu_processes.carry_out(run.without_limits(), report, lambda group: [], tmp_path, lambda: 0.0)
    assert set(deadlines.values()) == {math.inf}


def test_a_process_that_says_nothing_is_no_success(tmp_path: Path) -> None:
    report = gpu_processes.Report(tmp_path / "out", "gpu-2-x", {})
    run = Run(1e6, ((Group("silent", 1e6),),))
    gpu_processes.carry_out(run, report, lambda group: [sys.executable, "-c", "raise SystemExit(7)"], tmp_path)
    assert not report.passed and report.left_out == ["silent: everything (ended with status 7)"]


def test_processes_are_ended_when_the_run_is(tmp_path: Path) -> None:
    def clock() -> float:
        if (tmp_path / "hangs for ever").exists():
            raise SystemExit(143)
        return 0.0

    report = gpu_processes.Report(tmp_path / "out", "gpu-2-x", {})
    with pytest.raises(SystemExit):
        gpu_processes.carry_out(Run(1e6, ((Group("hangs", 1e6),),)), report, child(tmp_path), tmp_path, clock)
    assert not is_running(int((tmp_path / "helper").read_text()))
    written = read(tmp_path / "out" / "gpu-2-x.json")
    assert written["groups"]["hangs"]["ended"] == "stopped with the run, in second" and len(written["checks"]) == 1


def test_an_error_costs_its_job_and_a_lost_device_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash() -> Any:
        raise RuntimeError("illegal memory access")

    todo = [gpu_jobs.Job("bad", crash), gpu_jobs.Job("good", lambda: [Check("good", 0, 0), LeftOut("x", "why")])]
    assert gpu_jobs.carry_out_jobs(todo, CPU, tmp_path / "r.json") == 0
    written = read(tmp_path / "r.json")
    assert [check["passed"] for check in written["checks"]] == [False, True] and written["unfinished"] == []
    assert written["left_out"] == ["x (why)"] and not written["passed"]
    monkeypatch.setattr(gpu_jobs, "_usable", lambda device: False)
    assert gpu_jobs.carry_out_jobs(todo, CPU, tmp_path / "r.json") == 1
    assert read(tmp_path / "r.json")["unfinished"] == ["bad", "good"]


def test_findings_of_every_kind_are_written_and_shown(tmp_path: Path) -> None:
    identity = ("flow", cases.QUICK, "a device", "hgad_fast", "triton", "fp32")
    found = [
        Figure("a", 1.25, "ms"),
        Figure("b", None, "ms", "why"),
        Figure("c", math.nan, "of 1"),
        results.Failure(*identity, "wrong: z deviates", is_wrong=True),
    ]
    gpu_jobs.carry_out_jobs([gpu_jobs.Job("all", lambda: found)], CPU, tmp_path / "r.json")
    written = read(tmp_path / "r.json")
    assert [figure["value"] for figure in written["figures"]] == [1.25, None, None]
    assert not written["passed"] and len(written["failures"]) == 1
    text = "\n".join(written["lines"])
    assert "figure a: 1.25 ms" in text and "figure b: - ms why" in text and "flow, hgad_fast" in text


# Triton's cache.

COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from benchmarks.tf32 import _dot_kernel
triton.knobs.cache.dir = sys.argv[1]
hits = []
triton.knobs.compilation.listener = lambda **about: hits.append(about["cache_hit"])
source = ASTSource(_dot_kernel, dict.fromkeys(("a_ptr", "b_ptr", "c_ptr"), "*fp32") | {"SIDE": "constexpr"}, {(3,): 16})
kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32))
print(hits, len(kernel.asm["cubin"]))
"""


def test_triton_finds_a_packed_cache_in_another_folder(tmp_path: Path) -> None:
    """It keeps absolute paths, and refuses a kernel of which one file is missing."""

    def compiled(folder: Path) -> str:
        command = [sys.executable, "-c", COMPILE, str(folder)]
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout

    first = compiled(tmp_path / "here")
    assert first.startswith("[False]")
    assert triton_cache.pack(tmp_path / "here", tmp_path / "out" / "cache.tar.gz") == 0
    (tmp_path / "here").rename(tmp_path / "gone")
    assert triton_cache.unpack(tmp_path / "out" / "cache.tar.gz", tmp_path / "there") > 0
    assert not list((tmp_path / "there").glob("*/*.ptx")) and list((tmp_path / "there").glob("*/*.cubin"))
    assert compiled(tmp_path / "there") == first.replace("False", "True")


def test_a_cache_that_is_too_large_is_packed_in_part(tmp_path: Path) -> None:
    for number in range(8):
        kernel = tmp_path / "cache" / f"kernel-{number}"
        kernel.mkdir(parents=True)
        (kernel / "k.cubin").write_bytes(os.urandom(10_000))
    target = tmp_path / "cache.tar.gz"
    assert triton_cache.pack(tmp_path / "cache", target, limit=50_000) == 4 and target.stat().st_size <= 50_000
    assert triton_cache.unpack(target, tmp_path / "there") == 4
    assert triton_cache.pack(tmp_path / "cache", target, limit=10) == 8
    assert [path.name for path in tmp_path.glob("*tar*")] == ["cache.tar.gz"]


# The rehearsal.


@pytest.mark.parametrize("run", ["1", "2"])
def test_both_commands_run_as_they_are_printed(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a CPU and on tiny sizes: every job passes and leaves its results in $OUT."""
    assert gpu.main(["--plan", "--device", "cpu", "--small", "--commit", f"{COMMIT}-dirty"]) == 0
    command = commands(capsys.readouterr().out)[int(run) - 1]
    assert len(command) < 2000
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr

    name = f"gpu-{run}-0123456789ab-dirty"
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [f"{name}.json", f"{name}.log", "triton-cache.tar.gz"]
    assert all(re.fullmatch("[A-Za-z0-9._-]+", file) for file in files)
    written = read(tmp_path / f"{name}.json")
    assert {name: group["ended"] for name, group in written["groups"].items()} == {
        group.name: FINISHED for group in RUNS[run].groups
    }
    assert written["commit"] == f"{COMMIT}-dirty" and written["left_out"] == written["failures"] == []
    assert {"device", "versions", "date", "notes"} <= written.keys()
    assert all(check["passed"] for check in written["checks"]) and len(written["checks"]) >= 10
    missing = [figure["name"] for figure in written["figures"] if figure["value"] is None]
    assert all("the device is busy" in name for name in missing)  # a CPU is none
    log = (tmp_path / f"{name}.log").read_text()
    assert all(f"-- {job.name}" in log for group in RUNS[run].groups for job in gpu_jobs.jobs(group.name, CPU, True))
    if run == "1":
        assert {row["case"] for row in written["rows"]} == {"training", "flow"}
        assert {figure["group"] for figure in written["figures"]} >= {"training-steps", "training-official", "million"}
    else:
        assert any("3 stages" in figure["name"] for figure in written["figures"])


ALIKE = ("user-training-40-classes", "commands-hgad", "commands-vqflow")  # what they do others do with other values
USER = [group.name for run in gpu_plan.PLANS["user"] for group in RUNS[run].groups if group.name not in ALIKE]


@pytest.mark.parametrize("group", ["compile", "scoring", "kernels", *USER])
def test_jobs_of_the_other_groups_run(group: str, tmp_path: Path) -> None:
    """Those of runs 3 and 4, and the rest, but for the cases, of which test_bench.py runs each, and what is `ALIKE`."""
    todo = gpu_jobs.jobs(group, CPU, small=True)
    assert gpu_jobs.carry_out_jobs(todo, CPU, tmp_path / "r.json") == 0
    written = read(tmp_path / "r.json")
    assert written["passed"] and written["unfinished"] == written["left_out"] == []
    missing = [figure["name"] for figure in written["figures"] if figure["value"] is None]
    assert all("the device is busy" in name for name in missing)  # a CPU is none
    assert len(written["figures"]) + len(written["checks"]) >= 2
    targets = [figure["name"] for figure in written["figures"] if figure["has_target"]]
    assert set(TARGETS.get(group, ())) <= set(targets) and (group in TARGETS) == bool(targets)


TARGETS = {
    "user-training": (
        "training, K=5, ours as recommended, images per second over the official loop, eager fp32",
        "training, K=5, official loop with our class, fp32, over the official class, fp32",
    ),
    "validation": (
        "scoring beyond the backbone, a batch of 2, K=5, ours, label-free, fp32, over the official validation, fp32",
    ),
    "scorer": ("Scorer, test_efficientnet, 64 px, verdict, class inferred, beyond the backbone, p50",),
    "largest-batch": ("largest batch in 16 GB, ours, bf16, over the official",),
}


def test_an_image_at_its_native_size_has_the_map_of_the_published_model() -> None:
    native = gpu_user.Native(CPU, small=True)
    config = gpu_user.tiny(HGADConfig(n_classes=15, backbone_weights=None))
    result = score_images(native.model, native.image, 0, img_size="native", map_size="seen")
    assert result.anomaly_map.shape[1:] == (config.msk_size * native.side // config.img_size,) * 2
    published = HGADConfig(n_classes=15)
    assert (published.img_size, published.msk_size) == (1024, 256)


def test_an_image_that_cannot_be_scored_whole_is_a_figure_without_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise RuntimeError("too many elements\nand so on")

    native = gpu_user.Native(CPU, small=True)
    monkeypatch.setattr(gpu_user, "score_images", refused)
    (figure,) = native.steps["whole, label-free"]()
    assert figure.value is None and figure.note == "RuntimeError: too many elements"


def test_a_fit_whose_recording_fails_is_a_failed_check_and_is_measured_without() -> None:
    """On a CPU recorded steps are refused."""
    rates = gpu_user.TrainingRates(cases.QUICK, CPU, images=6, rounds=1)
    rates.recorded = True
    check, rate = rates.steps["fit"]()
    assert isinstance(check, Check) and not check.passed and "cuda_graphs=True" in check.note
    assert isinstance(rate, Figure) and rate.value == rates.rates["ours"] and "recorded" not in rate.name


def test_a_side_that_was_not_measured_costs_the_ratio_alone() -> None:
    *measured, ratio = gpu_user.TrainingRates(cases.QUICK, CPU, images=6, rounds=1).steps["official loop, fp32"]()
    assert all(isinstance(figure, Figure) and figure.value for figure in measured)
    assert isinstance(ratio, Figure) and ratio.value is None and ratio.misses == has_freia()


def test_a_peer_that_is_not_official_has_no_target(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_there, name in ((True, "official"), (False, "definition")):
        monkeypatch.setattr(gpu_figures, "has_freia", lambda is_there=is_there: is_there)
        assert gpu_figures.peer_name() == name and gpu_user.over("a", 1.0, 1.0, 2).misses == is_there


def test_without_a_gpu_it_says_so_at_once() -> None:
    command = ["make", "--no-print-directory", "-s", "gpu", f"PYTHON={sys.executable}"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    said = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert result.returncode != 0 and result.stdout == ""
    assert said == ["benchmarks.gpu needs a CUDA GPU, and torch sees none here; `make bench` measures a CPU"]


if __name__ == "__main__":
    sys.exit(be_a_child(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])))
