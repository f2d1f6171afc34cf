"""The runner of `hgad-fast bench` and `benchmarks/`: it compares contenders and times those that are right, in turn.

The share of the ceiling is the time that the slower of a contender's bytes and operations would take, at the rates of a
copy and of a matrix product of the same precision measured in the same run, over the time measured.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..environment import bfloat16_instructions, device_name, environment
from . import latency
from .cases import (
    CASES,
    MILLION_PIXELS,
    ONE_IMAGE_OF_THE_MILLION,
    Contender,
    Problem,
    Results,
    Size,
    float32_products,
    precisions,
    sizes,
)
from .official import has_freia
from .results import (
    GRADIENT_TOLERANCE,
    OUT_OF_MEMORY,
    TOLERANCE,
    WRONG,
    Ceiling,
    Failure,
    Outcome,
    Row,
    save,
)
from .timing import alternate, peak_memory, quartiles, release_memory, seconds


def run(
    cases: Iterable[str] = (),
    quick: bool = False,
    *,
    device: str | torch.device | None = None,
    compiled: bool = False,
    whole: bool = False,
    output: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Outcome]:
    """Time cases against the official formulation, or where FrEIA is missing against the definition in plain torch.

    Args:
        cases: names from `CASES`, or "latency" (see `hgad_fast.bench.latency`); all when empty.
        quick: tiny sizes and three rounds, to try the machinery.
        device: where; CUDA if there is one.
        compiled: the peers under `torch.compile` too; on a CPU where there is a C++ compiler.
        whole: on a CPU score all of the million pixels, once a contender, and not a sixteenth of them.
        output: JSON file, or a folder for `<device>-<date>.json`. It is written anew after each case and size, so
            that a run that is cut leaves what it has measured.
        progress: receives a line before each case and size.

    Raises:
        ValueError: a case has an unknown name.
    """
    allowed = (*CASES, "latency")
    names = tuple(cases) or allowed
    if unknown := [name for name in names if name not in allowed]:
        raise ValueError(f"there is no benchmark {unknown[0]!r}; allowed are {', '.join(allowed)}")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    about = about_run(where, compiled)
    compiled = compiled and can_compile(where)
    for note in about["notes"]:
        progress(note)
    outcomes: list[Outcome] = []
    for name in names:
        for size in (None,) if name == "latency" else sizes(name, where, quick, whole):
            progress(name if size is None else f"{name}: {size}")
            if size is None:
                outcomes += latency.measure(where, device_name(where), quick)
            else:
                rounds = 3 if quick or (name, size) == ("scoring", ONE_IMAGE_OF_THE_MILLION) else None
                if where.type == "cpu" and size == MILLION_PIXELS:  # minutes each
                    rounds = 1
                outcomes += measure(name, size, where, compiled=compiled, rounds=rounds)
            if output is not None:
                save(outcomes, output, about)
    return outcomes


def about_run(device: torch.device, compiled: bool = False) -> dict[str, Any]:
    """Return the `environment` of a run, and what the reader of its figures must know.

    Args:
        compiled: peers are to run under `torch.compile`, too.
    """
    notes = []
    if not has_freia():
        notes.append(
            "FrEIA is not installed, so the official flow is left out: 'definition' is ours in plain torch "
            "(pip install 'hgad-fast[bench]')"
        )
    about = environment(device)
    if device.type == "cpu":
        about["bfloat16_instructions"] = bfloat16_instructions()
        if not about["bfloat16_instructions"]:
            notes.append("this processor has no instructions for bfloat16 products, so that bf16 is left out")
    if compiled and not can_compile(device):
        notes.append("there is no C++ compiler, so that the official formulation is not timed under torch.compile")
    return about | {"notes": notes}


def can_compile(device: torch.device) -> bool:
    """Return False for a CPU where torch.compile does not find the C++ compiler that it needs."""
    if device.type != "cpu":
        return True
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError:
        return False
    return True


def measure(
    case: str,
    size: Size,
    device: torch.device,
    *,
    compiled: bool = False,
    rounds: int | None = None,
    seconds_in_all: float = 8,
) -> list[Outcome]:
    """Check and time one case at one size; see `run` and `compare`."""

    def contenders(size: Size) -> list[Contender]:
        problem = Problem(size, device)
        fresh = CASES[case](problem)
        if compiled:  # built anew, since a training step changes its model
            fresh += [compile_contender(each) for each in CASES[case](problem) if each.is_peer]
        return fresh

    return compare(
        case,
        size,
        contenders(size),
        device,
        measure_ceiling(device, precisions(device)),
        rounds=rounds,
        seconds_in_all=seconds_in_all,
        smaller=lambda: contenders(replace(size, images=1)),
    )


@functools.cache
def measure_ceiling(device: torch.device, operands: tuple[str, ...]) -> Ceiling:
    """Measure the best of ten copies (read and write counted) and of ten products of each kind, once a process.

    `operands` are the kinds: see `cases.precisions`.

    Numbers are random: constant ones switch fewer transistors, and run faster than those of any use.
    """
    cuda = device.type == "cuda"
    normal = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)

    def best(work: Callable[[], object]) -> float:
        return min(seconds(work, device) for _ in range(10))

    source = normal(2**28 if cuda else 2**25)
    copied = 2 * source.nbytes / best(functools.partial(torch.empty_like(source).copy_, source))
    n = 8192 if cuda else 1024
    rates = {}
    for precision in operands:
        a = normal(n, n, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
        with float32_products(precision):
            rates[precision] = 2 * n**3 / best(functools.partial(torch.mm, a, a))
    return Ceiling(copied, rates)


def compile_contender(contender: Contender) -> Contender:
    """Return the contender with its forward pass, hence its backward pass, under `torch.compile`."""
    return replace(contender, name=f"{contender.name}, compiled", forward=torch.compile(contender.forward))


def compare(
    case: str,
    size: Size,
    contenders: list[Contender],
    device: torch.device,
    ceiling: Ceiling,
    *,
    rounds: int | None = None,
    seconds_in_all: float = 8,
    smaller: Callable[[], list[Contender]] | None = None,
) -> list[Outcome]:
    """Check every contender against the first peer, then time those that are right in turn.

    Args:
        rounds: how often each is timed; None for about `seconds_in_all`, at least 5 and at most 50.
        smaller: the same contenders with fewer images. They are checked instead where the first peer runs out of
            memory, so that the others can be timed nevertheless.
    """
    verdicts = _checked(contenders, device, smaller)
    fit = [contender for contender in contenders if isinstance(verdicts[contender.name], float)]
    # The second run of each ends the warm-up: optimizer state and memory pools exist, and it tells how long a round is.
    once = alternate(fit, 1, device)
    fit = [contender for contender, taken in zip(fit, once[:, 0], strict=True) if np.isfinite(taken)]
    rounds = rounds or min(50, max(5, round(seconds_in_all / max(float(np.nansum(once)), 1e-9))))
    times = dict(zip((contender.name for contender in fit), alternate(fit, rounds, device), strict=True))
    times = {name: taken for name, taken in times.items() if np.isfinite(taken).all()}
    peers = {each.name: times[each.name] for each in fit if each.is_peer and each.name in times}

    outcomes: list[Outcome] = []
    for contender in contenders:
        identity = (case, size, device_name(device), contender.name, contender.path, contender.precision)
        verdict = verdicts[contender.name]
        if isinstance(verdict, str):
            outcomes.append(Failure(*identity, verdict, is_wrong=verdict.startswith(WRONG)))
            continue
        if contender.name not in times:
            outcomes.append(Failure(*identity, OUT_OF_MEMORY))
            continue
        taken = times[contender.name]
        median = float(np.median(taken))
        flop_ceiling = ceiling.flop_per_second[contender.precision]
        floor = max(contender.bytes / ceiling.bytes_per_second, contender.flop / flop_ceiling)
        outcomes.append(
            Row(
                *identity,
                is_peer=contender.is_peer,
                rounds=rounds,
                seconds=median,
                seconds_quartiles=quartiles(taken),
                images_per_second=size.images / median,
                pixels_per_second=size.pixels / median,
                flop=contender.flop,
                bytes=contender.bytes,
                flop_per_second=contender.flop / median,
                bytes_per_second=contender.bytes / median,
                ceiling=ceiling,
                ceiling_share=floor / median,
                peak_bytes=peak_memory(contender, device),
                speedups={name: (float(np.median(t / taken)), *quartiles(t / taken)) for name, t in peers.items()},
                error=verdict,
            )
        )
    return outcomes


def _checked(
    contenders: list[Contender], device: torch.device, smaller: Callable[[], list[Contender]] | None
) -> dict[str, float | str]:
    try:
        return check(contenders)
    except torch.OutOfMemoryError:
        if smaller is None:
            raise
    release_memory(device)
    verdicts = check(smaller())
    return verdicts | {_first_peer(contenders).name: OUT_OF_MEMORY}


def _first_peer(contenders: list[Contender]) -> Contender:
    return next(contender for contender in contenders if contender.is_peer)


def check(contenders: list[Contender]) -> dict[str, float | str]:
    """Return each contender's largest Frobenius-relative deviation from the first peer, or why it is out.

    Of a peer in tf32 the deviation is stated and not judged: what it loses is the official formulation's affair.

    Raises:
        torch.OutOfMemoryError: the first peer runs out of memory.
    """
    reference = _first_peer(contenders)
    expected = {quantity: result.detach() for quantity, result in reference().items()}
    return {
        contender.name: 0.0 if contender is reference else _verdict(contender, expected) for contender in contenders
    }


def _verdict(contender: Contender, expected: Results) -> float | str:
    try:
        results = contender()
    except torch.OutOfMemoryError:
        return OUT_OF_MEMORY
    except RuntimeError as error:
        if not contender.is_peer:
            raise
        return f"does not run: {str(error).strip().partition(chr(10))[0]}"  # torch.compile, most likely
    worst = 0.0
    for quantity, right in expected.items():
        tolerance = GRADIENT_TOLERANCE if quantity.startswith("gradient") else TOLERANCE
        judged = not contender.is_peer or contender.precision == "fp32"
        allowed = tolerance[contender.precision] if judged else math.inf
        deviation = relative_error(results[quantity].to(right.device), right)
        if not deviation <= allowed:
            return f"{WRONG}{quantity} deviates by {deviation:.1e} (allowed: {allowed:.0e})"
        worst = max(worst, deviation)
    return worst


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the Frobenius norm of the difference over that of the expected; in float64, without a copy in it."""
    norm = functools.partial(torch.linalg.vector_norm, dtype=torch.float64)
    actual, expected = actual.detach(), expected.detach()
    return float(norm(actual - expected) / norm(expected).clamp(min=1e-30))
