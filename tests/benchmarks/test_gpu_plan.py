"""`make gpu` without a GPU: its order, its budget, its file, and its checks as a dry run on the definitions."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compilation import Compiler, Request

from benchmarks import gpu, gpu_figures, tf32
from hgad_fast import ops
from hgad_fast.bench import cases, measure, results
from hgad_fast.evaluation import metrics
from hgad_fast.ops.blocks import _operand

ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = gpu.SIZES[1]
HOURS = 1e5  # seconds that no machine needs


def report() -> gpu.Report:
    return gpu.Report(measure.about_run(CPU))


def read(path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


class Clock:
    """Moves only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_correctness_comes_first_then_ceilings_then_what_matters_most() -> None:
    names = [job.name for job in gpu.plan(CUDA)]
    assert len(set(names)) == len(names)
    ceilings = names.index("ceilings")
    checks, benchmarks = names[:ceilings], names[ceilings + 1 :]
    for kind in ("coupling", "mixture", "scores", "flow"):
        assert sum(name.startswith(f"{kind} against float64") for name in checks) == len(gpu.SIZES)
    assert checks[-3:] == ["bitwise determinism", "torch.compile of a training step", "operands of a tf32 product"]

    assert benchmarks[:2] == [f"training: {cases.LARGE}", f"mixture: {cases.MILLION_PIXELS}"]
    assert benchmarks[len(gpu.FIRST)] == "training, all ways"
    everything = {f"{case}: {size}" for case in cases.CASES for size in cases.sizes(case, CUDA)}
    assert everything <= set(benchmarks)
    compiled = [i for i, name in enumerate(benchmarks) if "compiled" in name]
    assert min(compiled) > max(benchmarks.index(name) for name in everything)
    assert len(compiled) == 1 + len(gpu.COMPILED)


def test_no_job_begins_after_the_time_is_up_and_the_file_says_which(tmp_path: Path) -> None:
    clock, seen = Clock(), []

    def taking(seconds: float, name: str) -> gpu.Job:
        def run() -> list[gpu.Check]:
            seen.append((name, read(tmp_path / "r.json")["checks"]))
            clock.now += seconds
            return [gpu.Check(name, 0, 0)]

        return gpu.Job(name, run)

    actual = report()
    gpu.carry_out([taking(200, "a"), taking(200, "b"), taking(1, "c")], actual, tmp_path / "r.json", 400, clock)
    assert [name for name, _ in seen] == ["a", "b"]
    assert [[check["name"] for check in checks] for _, checks in seen] == [[], ["a"]]  # written after each job
    written = read(tmp_path / "r.json")
    assert [check["name"] for check in written["checks"]] == ["a", "b"] and written["left_out"] == ["c"]
    assert actual.passed and "no time was left for 1: c" in gpu.summary(actual)


def test_a_job_in_progress_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The alarm is set for what is left of the time; here it comes at once, and the clock says so."""
    clock, alarms = Clock(), []
    monkeypatch.setattr(gpu.signal, "setitimer", lambda timer, seconds: alarms.append((timer, seconds)))

    def endless() -> list[gpu.Check]:
        clock.now += alarms[-1][1]
        while True:
            try:
                signal.raise_signal(signal.SIGALRM)
            except Exception:  # what a library might do
                pass

    actual, before = report(), signal.getsignal(signal.SIGALRM)
    jobs = [gpu.Job("short", list, 100), gpu.Job("endless", endless), gpu.Job("next", list)]
    gpu.carry_out(jobs, actual, tmp_path / "r.json", 250, clock)
    assert alarms == [(signal.ITIMER_REAL, seconds) for seconds in (100, 0, 250, 0)]
    assert read(tmp_path / "r.json")["left_out"] == ["endless", "next"]
    assert signal.getsignal(signal.SIGALRM) == before


def test_a_job_that_takes_too_long_leaves_the_others_their_time(tmp_path: Path) -> None:
    """Here the alarm is the system's."""

    def endless() -> list[gpu.Check]:
        while True:
            signal.pause()

    actual = report()
    jobs = [gpu.Job("endless", endless, 0.2), gpu.Job("next", lambda: [gpu.Check("next", 0, 0)])]
    gpu.carry_out(jobs, actual, tmp_path / "r.json", HOURS, Clock())
    assert actual.left_out == ["endless"] and [check.name for check in actual.checks] == ["next"]
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_figures_are_written_and_shown_also_those_that_are_none(tmp_path: Path) -> None:
    actual = report()
    actual.add([gpu.Figure("a", 1.25, "ms"), gpu.Figure("b", None, "ms", "why"), gpu.Figure("c", math.nan, "of 1")])
    figures = read(actual.save(tmp_path / "r.json"))["figures"]
    assert [figure["value"] for figure in figures] == [1.25, None, None] and figures[1]["note"] == "why"
    text = gpu.summary(actual)
    assert "figure a: 1.25 ms" in text and "figure b: - ms why" in text


@pytest.mark.parametrize("right", [0, 1, 2, 7, 37, 64])
def test_the_largest_batch_is_found_to_a_sixteenth(right: int) -> None:
    tried = []

    def fits(count: int) -> bool:
        tried.append(count)
        return count <= right

    assert right - max(right // 16, 1) < gpu_figures.largest(fits, 1000) <= right
    assert len(tried) <= 12
    assert gpu_figures.largest(lambda count: True, 100) == 64


def test_auroc_is_that_of_the_library() -> None:
    scores, positive = torch.randn(99), torch.rand(99) > 0.7
    assert gpu_figures.share_in_order(scores, positive) == pytest.approx(metrics.auroc(scores, positive))


def test_waits_and_idle_time_are_read_from_a_profile() -> None:
    step = gpu_figures.STEP
    events = [
        (step, 0.0, 10.0, False),
        (step, 1.0, 30.0, True),  # its span on the device, no work
        ("cudaLaunchKernel", 1.0, 2.0, False),
        ("cudaStreamSynchronize", 3.0, 9.0, False),
        ("cudaDeviceSynchronize", 11.0, 40.0, False),  # after the step
        *(("kernel", begin, end, True) for begin, end in ((2.0, 4.0), (3.0, 6.0), (8.0, 12.0))),
    ]
    assert gpu_figures.host_waits(events) == ["cudaStreamSynchronize"]
    assert gpu_figures.busy_share(events) == pytest.approx(0.8)
    assert math.isnan(gpu_figures.busy_share(events[:1]))


def test_a_crash_fails_the_run_and_spares_the_other_jobs(tmp_path: Path) -> None:
    def crash() -> list[gpu.Check]:
        raise RuntimeError("illegal memory access\nand so on")

    actual = report()
    jobs = [gpu.Job("bad", crash), gpu.Job("good", lambda: [gpu.Check("good", 1e-7, 1e-6)])]
    gpu.carry_out(jobs, actual, tmp_path / "r.json", HOURS)
    bad, good = read(tmp_path / "r.json")["checks"]
    assert not bad["passed"] and bad["note"] == "RuntimeError: illegal memory access" and good["passed"]
    assert not actual.passed and "FAILED bad runs" in gpu.summary(actual)


def test_an_error_that_is_no_number_fails_and_is_written(tmp_path: Path) -> None:
    check = gpu.worst("x", 1e-3, [torch.tensor([math.nan])], [torch.ones(1, dtype=torch.float64)])
    assert not check.passed
    actual = report()
    actual.add([check])
    assert read(actual.save(tmp_path / "r.json"))["checks"][0]["error"] is None


def test_a_wrong_benchmark_fails_the_run_and_a_repeated_one_is_replaced() -> None:
    actual = report()
    wrong = results.Failure(
        "flow", SMALL, "a device", "hgad_fast", "triton", "fp32", "wrong: z deviates", is_wrong=True
    )
    actual.add([wrong])
    assert not actual.passed and "flow, hgad_fast" in gpu.summary(actual)
    actual.add([replace(wrong, reason="out of memory", is_wrong=False)])
    assert actual.passed and len(actual.outcomes) == 1 and "out of memory" in gpu.summary(actual)


def test_dry_run_of_the_whole_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every check passes on the definitions, and benchmarks leave their rows (test_bench.py runs each of them)."""
    monkeypatch.setattr(cases, "CASES", {name: cases.CASES[name] for name in ("coupling", "training")})
    actual = report()
    gpu.carry_out(gpu.plan(CPU, quick=True), actual, tmp_path / "results", HOURS)
    assert not actual.left_out
    assert [str(check) for check in actual.checks if not check.passed] == []
    (path,) = (tmp_path / "results").iterdir()
    written = read(path)
    assert {row["case"] for row in written["rows"]} == set(cases.CASES) and written["failures"] == []
    assert {"device", "versions", "commit", "date"} <= written.keys()
    figures = {figure["name"]: figure["value"] for figure in written["figures"]}
    missing = [name for name, value in figures.items() if value is None]
    assert len(figures) > 40 and missing == [name for name in figures if "the device is busy" in name]  # a CPU is none
    text = gpu.summary(actual)
    assert f"{len(actual.checks)} of {len(actual.checks)} checks passed" in text and "x, " in text
    assert str(path) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("operation", "check"),
    [
        ("affine_coupling", gpu.check_coupling),
        ("affine_coupling_backward", gpu.check_coupling),
        ("mixture_terms", gpu.check_mixture),
        ("mixture_terms_backward", gpu.check_mixture),
        ("mixture_scores", gpu.check_scores),
    ],
)
def test_checks_find_a_small_error_in_every_result(operation: str, check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = getattr(ops, operation)

    def off(which: int) -> Any:
        def wrong(*args: Any, **kwargs: Any) -> Any:
            results = list(real(*args, **kwargs))
            if torch.is_tensor(results[which]) and results[which].is_floating_point():
                results[which] = results[which] * (1 + 1e-2)
            return ops.MixtureScores(*results) if operation == "mixture_scores" else tuple(results)

        wrong.reference = real.reference  # type: ignore[attr-defined]
        return wrong

    size = replace(SMALL, height=3, width=3)
    assert all(each.passed for each in check(size, CPU))
    names = {"affine_coupling": 2, "affine_coupling_backward": 4, "mixture_terms": 4, "mixture_terms_backward": 5}
    for which in range(names.get(operation, 6)):
        if operation == "mixture_scores" and which == 1:
            continue  # best_class, below
        with monkeypatch.context() as patch:
            patch.setattr(ops, operation, off(which))
            assert not all(each.passed for each in check(size, CPU)), which


def test_a_wrong_best_class_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ops.mixture_scores

    def wrong(*args: Any, **kwargs: Any) -> ops.MixtureScores:
        scores = real(*args, **kwargs)
        return scores._replace(best_class=(scores.best_class + 1) % SMALL.classes)

    wrong.reference = real.reference  # type: ignore[attr-defined]
    monkeypatch.setattr(ops, "mixture_scores", wrong)
    assert not all(check.passed for check in gpu.check_scores(SMALL, CPU))


def test_runs_that_differ_in_one_bit_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = ops.mixture_losses, []

    def unsteady(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        calls.append(1)
        losses = real(*args, **kwargs)
        if len(calls) == 3:
            losses["L_e"] = losses["L_e"] + torch.finfo(torch.float32).eps * losses["L_e"].detach().abs().clamp(min=1)
        return losses

    monkeypatch.setattr(ops, "mixture_losses", unsteady)
    first, second = gpu.check_determinism(cases.QUICK, CPU)
    assert first.error == 1 and not first.passed and second.passed


def test_tf32_emulations_and_the_verdict_on_a_product() -> None:
    ulp = 2.0**-10
    x = torch.tensor([1 + 0.49 * ulp, 1 + 0.5 * ulp, 1 + 0.99 * ulp, -1 - 0.75 * ulp, 1 + ulp])
    assert tf32.truncated(x).tolist() == [1, 1, 1, -1, 1 + ulp]
    assert tf32.rounded(x).tolist() == [1, 1 + ulp, 1 + ulp, -1 - ulp, 1 + ulp]
    assert torch.equal(tf32.rounded(x), _operand(x, "tf32"))
    a, b = torch.randn(2, tf32.SIDE, tf32.SIDE)
    for kind, prepare in (("truncated", tf32.truncated), ("rounded", tf32.rounded), ("exact", torch.clone)):
        actual = tf32.deviations(prepare(a) @ prepare(b), a, b)
        last_digits = tf32.SIDE**0.5 * torch.finfo(torch.float32).eps  # of sums of SIDE terms
        assert min(actual, key=actual.__getitem__) == kind and actual[kind] < last_digits
        assert all(error > 1e-4 for other, error in actual.items() if other != kind)


def test_tf32_kernel_compiles_for_a_tensor_core(compiler: Compiler) -> None:
    signature = dict.fromkeys(("a_ptr", "b_ptr", "c_ptr"), "*fp32") | {"SIDE": "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(3)}
    request = Request("benchmarks.tf32", "_dot_kernel", signature, {(3,): tf32.SIDE}, aligned, {}, "sm_90")
    assert "tf32" in compiler.compile(request).ptx


def test_without_a_gpu_it_says_so_at_once() -> None:
    command = ["make", "--no-print-directory", "-s", "gpu", f"PYTHON={sys.executable}"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    said = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert result.returncode != 0 and result.stdout == ""
    assert said == ["benchmarks.gpu needs a CUDA GPU, and torch sees none here; `make bench` measures a CPU"]
