"""Cost of training as it grows, for docs/scaling.md: `python -m benchmarks.scaling`, minutes on a CPU.

Bytes that a forward pass keeps for the backward one, per pixel, parameters not counted: from autograd's own records of
what it saves, and by the resident memory of a process. Errors of float32 gradients against float64, and of the inputs
that reversible memory rebuilds. A training step at several sizes against the official formulation; nothing else should
run meanwhile.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from torch import Tensor, nn

from hgad_fast.bench import cases, measure, official, results
from hgad_fast.bench.cases import HEADLINE, Size
from hgad_fast.ops import blocks as blocks_module
from hgad_fast.ops import subnet

CPU = torch.device("cpu")
SMALL = replace(HEADLINE, height=8, width=8)  # 512 pixels
TIMED = (
    HEADLINE,
    SMALL,
    replace(HEADLINE, height=32, width=32),
    *(replace(SMALL, blocks=blocks) for blocks in (6, 24, 48)),
    *(replace(SMALL, classes=classes) for classes in (200, 1000)),
)
KINDS = (("official", 0), ("standard", 0), ("reversible", 0), ("reversible", 4))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "scaling.json")
    parser.add_argument("--resident", nargs=4, help=argparse.SUPPRESS)  # kind, every, blocks, pixels a side
    options = parser.parse_args()
    if options.resident:
        kind, *numbers = options.resident
        print(resident_bytes_here(kind, *map(int, numbers)))
        return
    about = measure.about_run(CPU)
    outcomes: list[results.Outcome] = []
    found: dict[str, Any] = {"kept": [], "drift": [], "gradients": {}}

    def save(*lines: Any) -> None:
        results.save(outcomes, options.output, about, **found)
        print(*lines, sep="\n", flush=True)

    for size in TIMED:
        measured = measure.measure("training", size, CPU, seconds_in_all=8)
        outcomes += measured
        save(results.table(measured))
    for blocks in (12, 48):
        size = replace(HEADLINE, blocks=blocks)
        for kind, every in KINDS if blocks == 12 else KINDS[2:]:
            figures = {"recorded": kept_bytes(size, kind, every), "resident": resident_bytes(size, kind, every)}
            found["kept"].append({"blocks": blocks, "memory": kind, "checkpoint_every": every} | figures)
            save(found["kept"][-1])
        for every in (0, 12, 4):
            found["drift"].append({"blocks": blocks, "checkpoint_every": every, "relative": drift(blocks, every)})
            save(found["drift"][-1])
    found["gradients"] = gradient_errors()
    save(found["gradients"])
    found["processor"] = processor_seconds()
    save(found["processor"])


def forward(
    problem: cases.Problem, kind: str, every: int
) -> tuple[Callable[[], Tensor], Callable[[], dict[str, Tensor]]]:
    """Return what computes the loss of a training step of stage 2, and what its gradients, by their official names."""
    if kind == "official":
        level = problem.official
        arguments = problem.x, problem.labels, problem.onehot, problem.position
        return _with_gradients(lambda: official.official_loss(level(*arguments, stage=2)), level.flow, level.mixture)
    model = problem.model
    model.memory, model.checkpoint_every = kind, every
    flow, mixture = model.nfs[0], model.mixture
    grid = flow.grid(problem.size.height, problem.size.width)

    def loss() -> Tensor:
        z, log_det = flow(problem.x, grid)
        terms = mixture.losses(z, log_det, problem.image_labels, 0, stage=2, label_smoothing=problem.smoothing)
        return official.official_loss({name: term.mean() for name, term in terms.items()})

    return _with_gradients(loss, flow, mixture.level(0))


def _with_gradients(
    loss: Callable[[], Tensor], flow: nn.Module, mixture: Sequence[Tensor]
) -> tuple[Callable[[], Tensor], Callable[[], dict[str, Tensor]]]:
    def gradients() -> dict[str, Tensor]:
        for parameter in (*flow.parameters(), *mixture):
            parameter.grad = None
        loss().backward()
        of_mixture = {name: part.grad for name, part in zip(cases.MIXTURE, mixture, strict=True)}
        return official.named_gradients(flow) | of_mixture

    return loss, gradients


def kept_bytes(size: Size, kind: str, every: int) -> float:
    """Return the bytes a pixel that autograd keeps, by their growth with images: parameters do not count."""

    def kept(images: int) -> int:
        loss, _ = forward(cases.Problem(replace(size, images=images, height=8, width=8), CPU), kind, every)
        storages: dict[int, torch.UntypedStorage] = {}

        def note(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss()
        return sum(storage.nbytes() for storage in storages.values())

    return (kept(3) - kept(1)) / (2 * 64)


def resident_bytes(size: Size, kind: str, every: int) -> float:
    """Return the bytes a pixel by which a process grows in the forward pass, from two numbers of pixels."""

    def grown(side: int) -> int:
        words = [kind, str(every), str(size.blocks), str(side)]
        command = [sys.executable, "-m", "benchmarks.scaling", "--resident", *words]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is let go returns to the system at once
        return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    few, many = 8, 24
    return (grown(many) - grown(few)) / (HEADLINE.images * (many**2 - few**2))


def resident_bytes_here(kind: str, every: int, blocks: int, side: int) -> int:
    problem = cases.Problem(replace(HEADLINE, blocks=blocks, height=side, width=side), CPU)
    loss, _ = forward(problem, kind, every)
    loss().backward()  # what a process needs once
    gc.collect()
    before = psutil.Process().memory_info().rss
    alive = loss()
    gc.collect()
    after = psutil.Process().memory_info().rss
    del alive
    return after - before


def gradient_errors(size: Size = SMALL, seeds: int = 5) -> dict[str, Any]:
    """Return the Frobenius-relative errors of all gradients of a step in float32, and their medians over seeds."""
    errors: dict[str, list[float]] = {f"{kind}, checkpoint_every={every}": [] for kind, every in KINDS}
    for seed in range(seeds):
        problem = cases.Problem(size, CPU)
        problem.x = torch.randn(problem.x.shape, generator=torch.Generator().manual_seed(seed))
        exact = copy.copy(problem)
        exact.official = copy.deepcopy(problem.official).double()
        exact.x, exact.onehot, exact.position = (t.double() for t in (problem.x, problem.onehot, problem.position))
        right = forward(exact, "official", 0)[1]()
        for kind, every in KINDS:
            computed = forward(problem, kind, every)[1]()
            ours, theirs = (
                torch.cat([gradients[name].double().flatten() for name in right]) for gradients in (computed, right)
            )
            errors[f"{kind}, checkpoint_every={every}"].append(measure.relative_error(ours, theirs))
    medians = {name: statistics.median(values) for name, values in errors.items()}
    return {"pixels": size.pixels, "each": errors, "median": medians}


def processor_seconds(rounds: int = 15) -> dict[str, Any]:
    """Return the processor time of a step in one thread, which other work on the machine hardly changes, in turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    contenders = cases.training_case(cases.Problem(SMALL, CPU))
    taken: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for turn in range(-1, rounds):  # the first warms up
        for i in range(len(contenders)):
            contender = contenders[(i + turn) % len(contenders)]
            start = time.process_time()
            contender()
            if turn >= 0:
                taken[contender.name].append(time.process_time() - start)
    torch.set_num_threads(threads)
    peer = next(contender.name for contender in contenders if contender.is_peer)
    return {
        "pixels": SMALL.pixels,
        "seconds": {name: statistics.median(times) for name, times in taken.items()},
        "speedup": {
            name: statistics.median(theirs / ours for theirs, ours in zip(taken[peer], times, strict=True))
            for name, times in taken.items()
        },
    }


def drift(blocks: int, every: int) -> float:
    """Return the Frobenius-relative error of the rebuilt input of the first block, in float32."""
    problem = cases.Problem(replace(SMALL, images=1, blocks=blocks), CPU)
    loss, _ = forward(problem, "reversible", every)
    value, rebuilt = loss(), {}
    layers, backward = subnet.layers, blocks_module.affine_coupling_backward

    def seen_subnet(x1: Tensor, *rest: Any) -> Any:
        rebuilt["x1"] = x1.clone()
        return layers(x1, *rest)

    def seen_backward(*arguments: Any, **options: Any) -> Any:
        gradients = backward(*arguments, **options)
        rebuilt["x2"] = gradients[3].clone()
        return gradients

    with (
        mock.patch.object(subnet, "layers", seen_subnet),
        mock.patch.object(blocks_module, "affine_coupling_backward", seen_backward),
    ):
        value.backward()  # ends with the first block
    return measure.relative_error(torch.cat([rebuilt["x1"], rebuilt["x2"]], 1), problem.x)


if __name__ == "__main__":
    main()
