"""Checks of `make gpu`: kernels and gradients against float64, runs against each other, and what tensor cores round.

On CUDA they take the kernels (a check says so if not); on a CPU they run on the definitions, for a dry run.
"""

from __future__ import annotations

import copy
import functools
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_figures
from benchmarks.gpu_findings import Check, LeftOut
from hgad_fast import ops
from hgad_fast.bench import cases, official
from hgad_fast.bench.cases import Size
from hgad_fast.bench.measure import relative_error
from hgad_fast.bench.results import GRADIENT_TOLERANCE, TOLERANCE
from hgad_fast.training.processes import Processes
from hgad_fast.training.step import Step

# Frobenius-relative, against float64. Products of float32 accuracy (tf32x3, or float32 itself) are bound more loosely
# than in tests/kernels/test_kernels.py: tensor cores sum in an order and with a rounding of their own.
FORWARD, BACKWARD = 5e-6, 2e-5
# Against the same rounding of operands on a CPU. A hidden unit that another order of sums leaves on the other side of
# the middle between two bfloat16 numbers takes the other one: 1e-4 was seen. Results rounded, too, are off by 2e-3.
ROUNDED_OPERANDS = {
    "tf32": (TOLERANCE["fp32"], GRADIENT_TOLERANCE["fp32"]),
    "bf16": (5e-4, 2 * GRADIENT_TOLERANCE["fp32"]),
}
BFLOAT16 = 4e-3  # of a result that is returned in bfloat16
ROUNDED = 5e-5  # from the product of rounded operands, rotations in bf16x3 counted; that of truncated ones is 3e-4 away

SIZES = (
    Size(images=2, height=12, width=12, channels=200, classes=15, centres=10, blocks=2, position_dim=256),
    Size(images=2, height=5, width=7, channels=37, classes=5, centres=4, blocks=2, position_dim=8),
    Size(images=2, height=12, width=12, channels=112, classes=40, centres=10, blocks=2, position_dim=16),
    Size(images=3, height=9, width=11, channels=24, classes=70, centres=3, blocks=2, position_dim=16),
    Size(images=1, height=1, width=1, channels=2, classes=1, centres=1, blocks=1, position_dim=4),
)


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


def check_codes(size: Size, device: torch.device) -> list[Check]:
    """Check the distances of the codes that are found, and every bit of the statistics against a CPU's."""
    draw, count = Draw(device), size.classes * size.centres
    codes = draw.normal(size.channels, count).T  # as state dicts have them
    checks = [kernels_run(codes)]
    for dtype in (torch.float32, torch.bfloat16):
        name = f"codes, {str(dtype).removeprefix('torch.')}"
        x = draw.normal(size.pixels, size.channels).to(dtype)
        found = ops.nearest_code(x, codes)
        distances = torch.cdist(*double(x, codes))
        chosen = distances.gather(1, found[:, None]).squeeze(1)  # equally near codes may change places
        checks.append(worst(f"{name}, distance of the nearest", FORWARD, [chosen], [distances.amin(1)]))
        owners = draw.labels(size.pixels, count)
        expected = ops.code_statistics.reference(x.cpu(), owners.cpu(), count)
        for backend in ("auto", "torch"):
            actual = ops.code_statistics(x, owners, count, backend=backend)
            differing = sum(float((a.cpu() != e).sum()) for a, e in zip(actual, expected, strict=True))
            checks.append(Check(f"{name}, elements of the statistics that differ, backend {backend}", differing, 0))
    return checks


def check_distances(size: Size, device: torch.device) -> list[Check]:
    """Check the distances to Gaussians of places: one pixel of each, several, and any number of any."""
    draw, places, classes = Draw(device), size.height * size.width, min(size.classes, 3)
    mean = draw.normal(classes, places, size.channels)
    factor = draw.normal(classes, places, size.channels, size.channels).mT  # stored by rows, as those of a model are
    checks = [kernels_run(mean)]
    for images in (1, 2, 20):
        x = draw.normal(images * places, size.channels)
        in_order = torch.arange(places, device=device).repeat(images)
        for name, place in (("in order", in_order), ("at random", draw.labels(len(x), places))):
            computed = ops.place_distances(x, place, mean, factor)
            expected = ops.place_distances.reference(*double(x, place, mean, factor))
            checks.append(worst(f"distances, {images} pixels a place, {name}", FORWARD, [computed], [expected]))
    return checks


def check_far_centres(size: Size, device: torch.device, distance: float = 100) -> Iterator[Check]:
    """Check terms and scores of pixels near one of many centres far apart, where one piece of tf32 would not do.

    Pixels lie a few units from a centre, and centres `distance` from the origin: what is summed up is far larger than
    what is left of it.
    """
    draw = Draw(device)
    mu, delta, phi_inter, phi_intra = draw.mixture(size)
    mixture = distance * mu, delta, phi_inter, phi_intra
    y = draw.labels(size.images, size.classes)
    z = mixture[0][y].repeat_interleave(size.height * size.width, 0)
    z, log_det = z + draw.normal(*z.shape) * size.channels**-0.5, draw.normal(size.pixels)
    options = {"label_smoothing": 0.02, "stage": 2}
    terms = ops.mixture_terms(z, y, *mixture, **options)
    expected_terms = ops.mixture_terms.reference(*double(z, y, *mixture), **options)
    yield worst("mixture terms, far centres", TOLERANCE["fp32"], terms, expected_terms)
    scores = ops.mixture_scores(z, log_det, *mixture)
    expected = ops.mixture_scores.reference(*double(z, log_det, *mixture))
    yield worst("mixture scores, far centres", TOLERANCE["fp32"], [scores.log_density], [expected.log_density])


def trained_flow(size: Size, draw: Draw) -> Any:
    """Return a flow as if trained: a fresh log-determinant is nearly zero, and would be nothing but its error."""
    flow = cases.Problem(size, draw.device).model.nfs[0]
    with torch.no_grad():
        flow.global_scale.add_(draw.normal(*flow.global_scale.shape))
        flow.global_offset.copy_(draw.normal(*flow.global_offset.shape))
        flow.w2.mul_(5)
    return flow


def check_flow(size: Size, device: torch.device) -> list[Check]:
    """Check a flow: float32 against float64, tf32 and bf16 operands against the same rounding on a CPU.

    In bf16 that is for a GPU the definition: `flow` rounds on a CPU the results of products, too.
    """
    draw = Draw(device)
    flow = trained_flow(size, draw)
    x, gz, glog_det = (
        draw.normal(size.pixels, size.channels),
        draw.normal(size.pixels, size.channels),
        draw.normal(size.pixels),
    )

    def results(
        compute: Callable[..., tuple[Tensor, Tensor]], device: torch.device, dtype: torch.dtype, **options: str
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return z and log_det, and the gradients of x and the parameters."""
        model = copy.deepcopy(flow).to(device, dtype)
        grid = ops.SeparablePosition(*(t.to(dtype) for t in flow.grid(size.height, size.width, device)))
        leaf = x.detach().to(device, dtype).requires_grad_()
        outputs = compute(leaf, model.blocks, grid, **options)
        upstream = gz.to(device, dtype), glog_det.to(device, dtype)
        return [t.detach() for t in outputs], list(torch.autograd.grad(outputs, [leaf, *model.parameters()], upstream))

    cpu = torch.device("cpu")
    exact = results(ops.flow_definition, device, torch.float64)
    on_cpu = functools.partial(ops.flow, backend="torch")
    rounded = {
        "tf32": results(on_cpu, cpu, torch.float32, precision="tf32"),
        "bf16": results(ops.flow_definition if device.type == "cuda" else on_cpu, cpu, torch.float32, precision="bf16"),
    }
    checks = [kernels_run(x)]
    for precision in ops.PRECISIONS:
        for memory in ops.MEMORY_MODES:
            options = {"precision": precision, "memory": memory}
            expected = rounded.get(precision, exact)
            forward, backward = ROUNDED_OPERANDS.get(precision, (FORWARD, BACKWARD))
            computed = results(ops.flow, device, torch.float32, **options)
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


def check_many_runs(size: Size, device: torch.device, runs: int = 200) -> list[Check]:
    """Check that whole blocks give the same bits run after run: a product begun before its copies are there shows.

    Inputs of so many pixels keep every multiprocessor busy, which small ones do not.
    """
    flow = trained_flow(replace(size, images=1), Draw(device))
    flow.precision = "bf16"
    grid = flow.grid(size.height, size.width, device)
    x = torch.randn(size.pixels, size.channels, generator=torch.Generator(device).manual_seed(0), device=device)
    with torch.no_grad():
        first = flow(x, grid)
        differing = sum(
            not all(torch.equal(a, b) for a, b in zip(first, flow(x, grid), strict=True)) for _ in range(runs - 1)
        )
    path = ops.flow_path(x, grid, "bf16")
    return [
        Check("whole blocks run", float(x.is_cuda and path != "triton, whole blocks"), 0, f"path: {path}"),
        Check(f"{runs} runs of whole blocks alike, {size.pixels} pixels", differing, 0, "runs that differ"),
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


def check_tf32(device: torch.device) -> Iterator[Check]:
    """Check that tensor cores truncate float32 operands to tf32, and that our rounding beforehand prevents it."""
    from benchmarks import tf32

    draw = Draw(device)
    a, b = draw.normal(tf32.SIDE, tf32.SIDE), draw.normal(tf32.SIDE, tf32.SIDE)
    for trained in (False, True):
        deviations = tf32.deviations(tf32.product_of_a_flow(a, b, trained), a, b)
        closest = min(deviations, key=lambda name: deviations[name])
        name = f"the flow's tf32 products have rounded operands, {'with' if trained else 'without'} gradients"
        yield Check(name, deviations["rounded"], ROUNDED, f"they come out {closest}")
    if device.type != "cuda":  # no tensor cores
        return
    bare = tf32.deviations(tf32.dot(a, b), a, b)
    kind = min(bare, key=lambda name: bare[name])
    note = f"operands as they are come out {kind} (" + ", ".join(f"{k} {v:.1e}" for k, v in bare.items()) + ")"
    prepared = tf32.deviations(tf32.dot(tf32.rounded(a), tf32.rounded(b)), a, b)["rounded"]
    yield Check("a tf32 product is one of truncated, rounded, exact operands", bare[kind], FORWARD, note)
    yield Check("rounded operands stay rounded in Triton's tf32 product", prepared, FORWARD)


def check_memory(seconds: float = 170) -> Iterator[Check | LeftOut]:
    """Check under compute-sanitizer (CUDA toolkit) that nothing goes out of bounds or races in shared memory."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        yield LeftOut("compute-sanitizer", "is not installed")
        return
    for tool in ("memcheck", "racecheck"):
        with tempfile.TemporaryDirectory() as folder:
            program = [sys.executable, "-m", "benchmarks.gpu", "--group", "small-checks", f"{folder}/results.json"]
            try:
                ended = subprocess.run(
                    [sanitizer, "--tool", tool, "--error-exitcode", "9", *program],
                    cwd=Path(__file__).parents[1],
                    env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # each tensor has bounds of its own
                    capture_output=True,
                    text=True,
                    timeout=seconds / 2,
                )
            except subprocess.TimeoutExpired:
                yield LeftOut(tool, "took too long; nothing was found until then")
                continue
        print(ended.stdout, ended.stderr, sep="\n")
        last = (ended.stdout.strip() or ended.stderr.strip()).rpartition("\n")[2]
        yield Check(tool, float(ended.returncode != 0), 0, last)


def kernels_run(x: Tensor) -> Check:
    """Check that on CUDA the kernels are what runs."""
    path = ops.path(x)
    return Check("the kernels run", float(x.is_cuda and path != "triton"), 0, f"path: {path}")
