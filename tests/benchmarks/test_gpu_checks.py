"""The checks and figures of `make gpu` on the definitions: they pass, and find what is planted."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from compilation import Compiler, Request

from benchmarks import gpu_checks, gpu_figures, tf32
from hgad_fast import ops
from hgad_fast.bench import cases, measure
from hgad_fast.evaluation import metrics

CPU = torch.device("cpu")
SMALL = gpu_checks.SIZES[1]


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


def test_an_error_that_is_no_number_fails_and_is_written() -> None:
    check = gpu_checks.worst("x", 1e-3, [torch.tensor([math.nan])], [torch.ones(1, dtype=torch.float64)])
    assert not check.passed and check.document() == {
        "name": "x",
        "error": None,
        "allowed": 1e-3,
        "note": "",
        "passed": False,
    }


@pytest.mark.parametrize(
    ("operation", "check"),
    [
        ("affine_coupling", gpu_checks.check_coupling),
        ("affine_coupling_backward", gpu_checks.check_coupling),
        ("mixture_terms", gpu_checks.check_mixture),
        ("mixture_terms_backward", gpu_checks.check_mixture),
        ("mixture_scores", gpu_checks.check_scores),
        ("code_statistics", gpu_checks.check_codes),
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
    names["code_statistics"] = 2
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
    assert not all(check.passed for check in gpu_checks.check_scores(SMALL, CPU))


def test_a_code_that_is_not_the_nearest_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = ops.nearest_code, SMALL.classes * SMALL.centres

    def wrong(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        indices = real(x, codes)
        indices[3] = (indices[3] + 1) % count
        return indices

    monkeypatch.setattr(ops, "nearest_code", wrong)
    assert [check.passed for check in gpu_checks.check_codes(SMALL, CPU)] == [True, *[False, True, True] * 2]


def test_a_wrong_distance_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ops.place_distances

    def wrong(*args: torch.Tensor) -> torch.Tensor:
        distances = real(*args)
        distances[len(distances) // 2] *= 1 + 1e-3
        return distances

    wrong.reference = real.reference  # type: ignore[attr-defined]
    assert all(check.passed for check in gpu_checks.check_distances(SMALL, CPU))
    monkeypatch.setattr(ops, "place_distances", wrong)
    assert [check.passed for check in gpu_checks.check_distances(SMALL, CPU)] == [True, *[False] * 6]


def test_runs_that_differ_in_one_bit_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = ops.mixture_losses, []

    def unsteady(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        calls.append(1)
        losses = real(*args, **kwargs)
        if len(calls) == 3:
            losses["L_e"] = losses["L_e"] + torch.finfo(torch.float32).eps * losses["L_e"].detach().abs().clamp(min=1)
        return losses

    monkeypatch.setattr(ops, "mixture_losses", unsteady)
    first, *others = gpu_checks.check_determinism(cases.QUICK, CPU)
    assert first.error == 1 and not first.passed and others and all(other.passed for other in others)


def test_tf32_emulations_and_the_verdict_on_a_product() -> None:
    ulp = 2.0**-10
    x = torch.tensor([1 + 0.49 * ulp, 1 + 0.5 * ulp, 1 + 0.99 * ulp, -1 - 0.75 * ulp, 1 + ulp])
    assert tf32.truncated(x).tolist() == [1, 1, 1, -1, 1 + ulp]
    assert tf32.rounded(x).tolist() == [1, 1 + ulp, 1 + ulp, -1 - ulp, 1 + ulp]
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


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("precision", "kind"), [("tf32", "rounded"), ("fp32", "exact")])
def test_the_product_of_a_flow_has_the_operands_of_its_precision(precision: str, kind: str, trained: bool) -> None:
    a, b = torch.randn(2, tf32.SIDE, tf32.SIDE)
    actual = tf32.deviations(tf32.product_of_a_flow(a, b, trained, precision), a, b)
    assert min(actual, key=actual.__getitem__) == kind and actual[kind] < gpu_checks.ROUNDED / 10
    assert all(error > 3 * gpu_checks.ROUNDED for other, error in actual.items() if other != kind)


@pytest.mark.parametrize(("differing", "error"), [(None, 0), (1, 1)])
def test_a_run_that_differs_from_the_first_in_one_bit_is_found(
    differing: int | None, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = ops.flow, []

    def unsteady(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        z, log_det = real(*args, **kwargs)
        if len(calls) == differing:
            z.view(torch.int32)[-1, -1] ^= 1
        calls.append(1)
        return z, log_det

    monkeypatch.setattr(ops, "flow", unsteady)
    _, alike = gpu_checks.check_many_runs(cases.QUICK, CPU, runs=3)
    assert len(calls) == 3 and alike.error == error


def test_the_kernels_pass_with_far_centres(interpreted: Any) -> None:
    assert ops.path(torch.zeros(1)) == "triton"
    assert [str(check) for check in gpu_checks.check_far_centres(SMALL, CPU) if not check.passed] == []


def test_far_centres_need_more_than_one_piece_of_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    size = gpu_checks.SIZES[0]
    assert all(check.passed for check in gpu_checks.check_far_centres(size, CPU))
    real = ops.mixture_scores

    def wrong(z: torch.Tensor, log_det: torch.Tensor, mu: torch.Tensor, *others: Any) -> ops.MixtureScores:
        scores = real(z, log_det, mu, *others)
        own = mu[scores.best_class]
        lost = (tf32.rounded(z) * tf32.rounded(own)).sum(1) - (z * own).sum(1)
        return scores._replace(log_density=scores.log_density + lost)

    wrong.reference = real.reference  # type: ignore[attr-defined]
    monkeypatch.setattr(ops, "mixture_scores", wrong)
    assert [check.passed for check in gpu_checks.check_far_centres(size, CPU)] == [True, False]


def test_ceilings_are_those_of_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = []

    def once(work: Any, device: torch.device) -> float:
        factors.extend(work.args)  # of a product two, of a copy its source
        return 1.0

    monkeypatch.setattr(measure, "seconds", once)
    precisions = cases.precisions(CPU)
    measure.measure_ceiling.__wrapped__(CPU, precisions)
    assert len(factors) == 10 + 20 * len(precisions)
    assert all(factor.std() > 0.9 and factor[0].ne(factor[1]).float().mean() > 0.9 for factor in factors[::10])
