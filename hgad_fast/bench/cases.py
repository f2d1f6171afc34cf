"""The cases that are timed: workloads, contenders, and the work that each has to do.

Work is counted from the sizes. `flop` are the operations of the matrix products and distances (a multiply-add is two, a
distance in C dimensions 2 C); for the coupling, which has neither, the elementwise operations (a function is one).
`bytes` is what no implementation can avoid to move: every input and parameter read once, every result written once.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..environment import bfloat16_instructions
from ..models.config import HGADConfig
from ..models.hgad import HGADModel
from ..training.step import EAGER_STEPS, on_side_stream, record
from .official import (
    OfficialLevel,
    dense_position,
    has_freia,
    named_gradients,
    official_loss,
    official_losses,
    official_map,
    official_scores,
    smoothed_onehot,
)


@dataclass(frozen=True)
class Size:
    """A workload: a batch of feature maps (images, height, width, channels), and the model that takes it."""

    images: int = 8
    height: int = 16
    width: int = 16
    channels: int = 200
    classes: int = 15
    centres: int = 10
    blocks: int = 12
    position_dim: int = 256

    @property
    def pixels(self) -> int:
        return self.images * self.height * self.width

    def __str__(self) -> str:
        return (
            f"{self.images} images of {self.height} x {self.width}, C={self.channels}, K={self.classes}, "
            f"M={self.centres}, L={self.blocks}, P={self.position_dim}"
        )


HEADLINE = Size()
MANY_CLASSES = Size(classes=40)
QUICK = Size(images=2, height=8, width=8, channels=24, classes=5, centres=3, blocks=2, position_dim=16)
LARGE = Size(height=64, width=64)
HEADLINE_OF_MANY_CLASSES = Size(classes=200)
MILLION_PIXELS = Size(images=16, height=250, width=250)
ONE_IMAGE_OF_THE_MILLION = replace(MILLION_PIXELS, images=1)
PLACES = Size(images=1, channels=128, classes=5)
PEER_BATCH = 32768  # pixels, 8 images of 64 x 64: its activations and differences (N, M, C) need a bounded batch
CUDA_SIZES = (
    HEADLINE,
    Size(height=32, width=32),
    LARGE,
    replace(LARGE, channels=112, classes=40),
    replace(LARGE, classes=200),
)


def sizes(case: str, device: torch.device, quick: bool = False, whole: bool = False) -> tuple[Size, ...]:
    """Return the workloads of a case.

    A GPU gets 2 048 to 32 768 pixels (8 images of 16 x 16 to 64 x 64), and all that keeps no activations a million too.
    A CPU gets the 2 048 only: a step of the official formulation takes it about a second there, and time grows with the
    pixels. A step has 15 classes and 200 there, and what loops over the classes, scoring, has 40. Scoring a million
    pixels takes a CPU minutes a time: it gets one of its 16 images, and all of them if `whole`; both sides take image
    by image, so that the time of one is a sixteenth of that of all. What has a matrix for each place and class takes
    256 places and 5 classes, of one image and of several. `quick` tries the machinery; its figures mean nothing.
    """
    over_classes = case in ("scores", "scoring")
    if quick:
        return (QUICK,)
    if case == "distances":
        counts = (1, 8) if device.type == "cpu" else (1, 8, 64)
        return tuple(replace(PLACES, images=images) for images in counts)
    if device.type == "cpu":
        if case == "scoring":
            return MANY_CLASSES, MILLION_PIXELS if whole else ONE_IMAGE_OF_THE_MILLION
        if case == "training":
            return HEADLINE, HEADLINE_OF_MANY_CLASSES
        return (MANY_CLASSES,) if over_classes else (HEADLINE,)
    if case in ("training", "official-loop"):
        return CUDA_SIZES
    if case == "coupling":  # knows no classes
        return (*CUDA_SIZES[:4], MILLION_PIXELS)
    more_classes = (replace(MILLION_PIXELS, classes=40),) if over_classes else ()
    return (*CUDA_SIZES, MILLION_PIXELS, *more_classes)


def precisions(device: torch.device) -> tuple[str, ...]:
    """Return the operands of matrix products that a device has instructions for."""
    if device.type == "cuda":
        return "fp32", "tf32", "bf16"
    return ("fp32", "bf16") if bfloat16_instructions() else ("fp32",)


Results = dict[str, Tensor]
MIXTURE = ("mu", "delta", "phi_inter", "phi_intra")


@dataclass(frozen=True)
class Contender:
    """One way to do the work of a case. Equal names of two contenders' results are equal quantities.

    A peer is what ours is compared with. The first peer of a case computes in float32, and says what is right.
    """

    name: str
    path: str  # who computes: triton, torch or FrEIA
    forward: Callable[[], Results]  # what torch.compile gets
    flop: int
    bytes: int
    finish: Callable[[Results], Results] = lambda results: results  # backward pass and optimizer
    precision: str = "fp32"  # operands of the matrix products: fp32, tf32 or bf16
    is_peer: bool = False

    def __call__(self) -> Results:
        with float32_products(self.precision if self.is_peer else "fp32"):  # ours sets what it needs
            return self.finish(self.forward())


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Compute float32 matrix products of plain torch on CUDA in float32, or with tf32 operands if asked for tf32."""
    # Not torch.backends.cuda.matmul.fp32_precision: torch.compile refuses to work after it (pytorch issue 166387).
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def flow_flop(size: Size, *, dense: bool, backward: bool = False) -> int:
    """Count the operations of a flow: per block the subnet's two products and the rotation; backward, the former twice.

    The position's share of the first product costs next to nothing when it is separable. The features need no
    gradient, so the first block's subnet computes none for its inputs.
    """
    passive, active = size.channels - size.channels // 2, size.channels // 2
    hidden = 2 * (passive + size.position_dim)
    first = hidden * (passive + size.position_dim if dense else passive)
    second, rotation = 2 * active * hidden, size.channels**2
    multiply_adds = size.blocks * (first + second + rotation)
    if backward:
        multiply_adds += size.blocks * (2 * first + 2 * second + rotation) - first
    return 2 * size.pixels * multiply_adds


def mixture_flop(size: Size, distances: int, *, backward: bool = False) -> int:
    """Count the operations of so many distances a pixel; the gradient of either side costs as much again."""
    return 2 * size.pixels * size.channels * distances * (3 if backward else 1)


class Problem:
    """A seeded model, the official formulation with its parameters, and inputs, at one size on one device."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size, self.device = size, device
        config = HGADConfig(
            n_classes=size.classes,
            n_intra_centers=size.centres,
            backbone_arch=None,
            feature_levels=1,
            feature_dims=(size.channels,),
            coupling_layers=size.blocks,
            pos_embed_dim=size.position_dim,
        )
        self.smoothing = config.label_smoothing
        self.model = HGADModel(config).to(device)
        with torch.no_grad():  # offsets as drawn lie so far out that their centres have a share of exp(-C / 2)
            self.model.mu_deltas[0].mul_(0.1)
        self.official = OfficialLevel.of(self.model)
        self.peer, self.peer_path = ("official", "FrEIA") if has_freia() else ("definition", "torch")
        self.precisions = precisions(device)
        self.peer_precisions = tuple(each for each in self.precisions if each != "bf16")
        # On a CPU there is no tf32, and what the official flow can do besides float32 is autocast, which the definition
        # of our operations does not follow.
        by_autocast = device.type == "cpu" and self.peer == "official"
        self.flow_peer_precisions = self.precisions if by_autocast else self.peer_precisions

        generator = self.generator()
        self.image_labels = torch.randint(size.classes, (size.images,), generator=generator, device=device)
        self.labels = self.image_labels.repeat_interleave(size.height * size.width)
        self.onehot = smoothed_onehot(self.labels, size.classes, self.smoothing)
        self.x = torch.randn(size.pixels, size.channels, generator=generator, device=device)
        self.position = dense_position(size.position_dim, size.images, size.height, size.width).to(device)

    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(0)

    def ours(self, precision: str = "fp32", memory: str = "auto") -> Any:
        """Return a copy of the model that computes in this way."""
        model = copy.deepcopy(self.model)
        model.precision, model.memory = precision, memory
        return model

    @torch.no_grad()
    def latent(self) -> tuple[Tensor, Tensor]:
        """Return z (N, C) and log_det (N,) of the inputs."""
        return self.official.flow(self.x, [self.position])

    def path(self) -> str:
        return ops.path(self.x)

    def parameter_bytes(self, module: nn.Module | None = None) -> int:
        tensors = self.official.mixture if module is None else tuple(module.parameters())
        return sum(tensor.nbytes for tensor in tensors)


def _named(name: str, precision: str) -> str:
    return name if precision == "fp32" else f"{name}, {precision}"


def coupling_case(problem: Problem) -> list[Contender]:
    """Time the affine coupling by itself, forward and backward; the official one as FrEIA's block has it, by autograd.

    On CUDA ours is timed with a subnet's output in bfloat16 too, which halves what is read of it.
    """
    size = problem.size
    half = size.channels // 2
    normal = functools.partial(torch.randn, generator=problem.generator(), device=problem.device)
    x2, gy2, glog_det = normal(size.pixels, half), normal(size.pixels, half), normal(size.pixels)
    a = normal(size.pixels, 2 * half).bfloat16().float()  # the same numbers in either type
    leaves = x2.clone().requires_grad_(), a.clone().requires_grad_()
    clamp = problem.model.config.clamp_alpha

    def ours(a: Tensor) -> Results:
        y2, log_det = ops.affine_coupling(x2, a, clamp)
        gx2, ga, _, _ = ops.affine_coupling_backward(gy2, glog_det, y2, a, clamp)
        return {"y2": y2, "log_det": log_det, "gradient of x2": gx2, "gradient of a": ga}

    def official() -> Results:
        x2, a = leaves
        a = 0.1 * a
        s = clamp * torch.tanh(a[:, :half])
        return {"y2": x2 * torch.exp(s) + a[:, half:], "log_det": s.sum(1)}

    def backward(results: Results) -> Results:
        gx2, ga = torch.autograd.grad(tuple(results.values()), leaves, (gy2, glog_det))
        return results | {"gradient of x2": gx2, "gradient of a": ga}

    def moved(a: Tensor) -> int:
        # Forward reads x2 and a and writes y2; backward reads gy2, y2 and a and writes gx2 and ga.
        return 5 * x2.nbytes + 3 * a.nbytes + 2 * glog_det.nbytes

    flop = (8 + 15) * size.pixels * half
    variants = [("hgad_fast", a)]
    if "tf32" in problem.precisions:  # CUDA
        variants.append(("hgad_fast, bf16 subnet", a.bfloat16()))
    return [
        *(Contender(name, problem.path(), functools.partial(ours, a), flop, moved(a)) for name, a in variants),
        Contender("official", "torch", official, flop, moved(a), backward, is_peer=True),
    ]


def flow_case(problem: Problem) -> list[Contender]:
    """Time the flow without gradients; ours with the separable code, and given the dense one.

    On CUDA the forward pass of training in bf16 stands beside it: what whole blocks in one kernel gain.
    """
    size, x, position = problem.size, problem.x, problem.position
    official = problem.official.flow
    grid = problem.model.nfs[0].grid(size.height, size.width, x.device)
    moved = 2 * x.nbytes + 4 * size.pixels + problem.parameter_bytes(official)
    with_position = moved + position.nbytes

    @torch.no_grad()
    def results(network: nn.Module, condition: Any) -> Results:
        z, log_det = network(x, condition)
        return {"z": z, "log_det": log_det}

    def ours(precision: str, condition: Any) -> Callable[[], Results]:
        return functools.partial(results, problem.ours(precision).nfs[0], condition)

    def before_a_backward_pass(network: nn.Module) -> Results:
        z, log_det = network(x.detach().requires_grad_(), grid)
        return {"z": z.detach(), "log_det": log_det.detach()}

    flop, peer_flop = flow_flop(size, dense=False), flow_flop(size, dense=True)
    paths = {precision: ops.flow_path(x, grid, precision) for precision in problem.precisions}
    in_torch = []
    if "tf32" in problem.precisions:  # CUDA
        in_torch.append(functools.partial(before_a_backward_pass, problem.ours("bf16", "reversible").nfs[0]))
    return [
        *(
            Contender(_named("hgad_fast", precision), path, ours(precision, grid), flop, moved, precision=precision)
            for precision, path in paths.items()
        ),
        *(
            Contender("hgad_fast, bf16, products in torch", problem.path(), work, flop, moved, precision="bf16")
            for work in in_torch
        ),
        Contender("hgad_fast, dense code", problem.path(), ours("fp32", [position]), flop, with_position),
        *_flow_peers(problem, functools.partial(results, official, [position]), peer_flop, with_position),
    ]


def mixture_case(problem: Problem) -> list[Contender]:
    """Time the loss terms of stage 2 and their gradients for z, log_det and the parameters."""
    size, mixture = problem.size, problem.official.mixture
    z, log_det = (tensor.requires_grad_() for tensor in problem.latent())
    inputs = {"z": z, "log_det": log_det}
    inputs |= dict(zip(MIXTURE, mixture, strict=True))
    moved = 2 * (z.nbytes + log_det.nbytes + problem.parameter_bytes())

    def ours() -> Results:
        terms = ops.mixture_losses(
            z, log_det, problem.image_labels, *mixture, label_smoothing=problem.smoothing, stage=2
        )
        return {name: term.mean() for name, term in terms.items()}

    def official() -> Results:
        return official_losses(z, log_det, problem.labels, problem.onehot, *mixture, stage=2)

    def backward(terms: Results) -> Results:
        gradients = torch.autograd.grad(official_loss(terms), list(inputs.values()))
        return terms | {f"gradient of {name}": grad for name, grad in zip(inputs, gradients, strict=True)}

    flop = mixture_flop(size, size.classes + size.centres, backward=True)
    peer_flop = mixture_flop(size, size.classes * (1 + size.centres) + size.centres, backward=True)
    return [
        Contender("hgad_fast", problem.path(), ours, flop, moved, backward),
        *_peers(problem, official, peer_flop, moved, backward),
    ]


def scores_case(problem: Problem) -> list[Contender]:
    """Time the log-density of every pixel under every class, and the entropy of its class posterior."""
    size = problem.size
    z, log_det = problem.latent()
    mu, delta, phi_inter, phi_intra = problem.official.mixture
    moved = z.nbytes + log_det.nbytes + problem.parameter_bytes() + 4 * size.pixels * (size.classes + 1)

    @torch.no_grad()
    def ours() -> Results:
        scores = ops.mixture_scores(z, log_det, mu, delta, phi_inter, phi_intra, per_class=True)
        return {"log-density": scores.class_log_density, "entropy": scores.entropy}

    @torch.no_grad()
    def official() -> Results:
        batches = zip(z.split(PEER_BATCH), log_det.split(PEER_BATCH), strict=True)
        parts = [official_scores(*batch, mu, delta, phi_intra) for batch in batches]
        of_class, negative_entropy = (torch.cat(part) for part in zip(*parts, strict=True))
        return {"log-density": of_class * size.channels, "entropy": -negative_entropy}

    centres = size.classes * size.centres
    peer_flop = mixture_flop(size, centres + size.classes)
    return [
        Contender("hgad_fast", problem.path(), ours, mixture_flop(size, centres), moved),
        *_peers(problem, official, peer_flop, moved),
    ]


def codes_case(problem: Problem) -> list[Contender]:
    """Time the search of the nearest codes and their statistics: how many rows each has, and the sum of these.

    There are as many codes as classes have centres together. The rows lie around codes, so that no rounding moves one
    to another. The official formulation, VQ-Flow's, makes the matrix of all distances, then a one-hot matrix of the
    assignment, and multiplies the rows with it.
    """
    size = problem.size
    generator, count = problem.generator(), size.classes * size.centres
    embed = torch.randn(size.channels, count, generator=generator, device=problem.device)  # as state dicts have it
    noise = torch.randn(size.pixels, size.channels, generator=generator, device=problem.device)
    owner = torch.randint(count, (size.pixels,), generator=generator, device=problem.device)
    x = noise.mul_(0.5).add_(embed.T[owner])
    moved = x.nbytes + 2 * embed.nbytes + 4 * count

    def ours() -> Results:
        counts, sums = ops.code_statistics(x, ops.nearest_code(x, embed.T), count)
        return {"counts": counts, "sums": sums}

    def official() -> Results:
        distances = x.square().sum(1, keepdim=True) - 2 * x @ embed + embed.square().sum(0)
        one_hot = nn.functional.one_hot(distances.argmin(1), count).to(x.dtype)
        return {"counts": one_hot.sum(0), "sums": one_hot.T @ x}

    flop = mixture_flop(size, count)
    return [
        Contender("hgad_fast", problem.path(), ours, flop, moved),
        *_peers(problem, official, 2 * flop, moved),
    ]


def distances_case(problem: Problem) -> list[Contender]:
    """Time the distances of pixels to each class's Gaussian of their place, of which a map has one a pixel.

    What it is compared with gathers a matrix for each pixel, class after class.
    """
    size = problem.size
    generator, places = problem.generator(), size.height * size.width
    normal = functools.partial(torch.randn, generator=generator, device=problem.device)
    mean = normal(size.classes, places, size.channels)
    factor = normal(size.classes, places, size.channels, size.channels).mul_(size.channels**-0.5).mT  # stored by rows
    place = torch.arange(places, device=problem.device).repeat(size.images)
    moved = problem.x.nbytes + place.nbytes + mean.nbytes + factor.nbytes + 4 * size.pixels * size.classes

    def ours() -> Results:
        return {"distances": ops.place_distances(problem.x, place, mean, factor)}

    def gathered() -> Results:
        offsets = (problem.x - means[place] for means in mean)
        lengths = [
            torch.einsum("nd,ndm->nm", offset, factors[place]).square().sum(1)
            for offset, factors in zip(offsets, factor, strict=True)
        ]
        return {"distances": torch.stack(lengths, 1)}

    flop = mixture_flop(size, size.classes * size.channels)
    return [
        Contender("hgad_fast", problem.path(), ours, flop, moved),
        *_peers(problem, gathered, flop, moved),
    ]


def scoring_case(problem: Problem) -> list[Contender]:
    """Time the way from features of images of one known class to maps by the official procedure.

    Ours by default takes image by image, so that a score has the same bits in any company.
    """
    size, level = problem.size, problem.official
    shape = (size.images, size.height, size.width)
    features = problem.x.view(*shape, -1).permute(0, 3, 1, 2).contiguous()
    class_ids = torch.zeros(size.images, dtype=torch.int64)
    map_size = problem.model.config.msk_size

    def ours(precision: str, throughput: bool) -> Callable[[], Results]:
        model = problem.ours(precision)

        def score() -> Results:
            result = model.score_features([features], class_ids, "official", throughput=throughput)
            return {"map": result.anomaly_map}

        return score

    @torch.no_grad()
    def official() -> Results:
        x = features.permute(0, 2, 3, 1).reshape(size.pixels, -1)
        parts = []
        for batch, position in zip(x.split(PEER_BATCH), problem.position.split(PEER_BATCH), strict=True):
            z, log_det = level.flow(batch, [position])
            parts.append(official_scores(z, log_det, level.mu, level.delta, level.phi_intra, classes=[0]))
        scores = (torch.cat(part).float().view(shape) for part in zip(*parts, strict=True))
        by_density, by_entropy = (official_map([score], map_size) for score in scores)
        return {"map": by_density * by_entropy}

    distances = mixture_flop(size, size.classes + size.centres)
    flop, peer_flop = (flow_flop(size, dense=dense) + distances for dense in (False, True))
    moved = problem.x.nbytes + problem.parameter_bytes(level) + 4 * size.images * map_size**2
    path = problem.path()
    batched = (
        Contender(
            _named("hgad_fast, batched", precision), path, ours(precision, True), flop, moved, precision=precision
        )
        for precision in problem.precisions
    )
    return [
        Contender("hgad_fast, image by image", path, ours("fp32", False), flop, moved),
        *batched,
        *_flow_peers(problem, official, peer_flop, moved + problem.position.nbytes),
    ]


def training_case(problem: Problem) -> list[Contender]:
    """Time a step of stage 2 (forward, backward, Adam), ours from the parts that `fit` puts together."""
    size, x = problem.size, problem.x
    grid = problem.model.nfs[0].grid(size.height, size.width, x.device)

    def forward(model: Any) -> Results:
        z, log_det = model.nfs[0](x, grid)
        terms = model.mixture.losses(
            z, log_det, problem.image_labels, 0, stage=2, label_smoothing=model.config.label_smoothing
        )
        return {name: term.mean() for name, term in terms.items()}

    return _steps(problem, forward, inputs=(x, problem.image_labels))


def official_loop_case(problem: Problem) -> list[Contender]:
    """Time the same step with the arguments and the optimizer that the official training script uses."""
    size = problem.size
    labels = problem.labels.view(size.images, size.height, size.width)

    def forward(model: Any) -> Results:
        return model(problem.x, (labels, problem.onehot), problem.position, scale=0, epoch=2)

    inputs = problem.x, problem.labels, problem.onehot, problem.position
    return _steps(problem, forward, inputs, recordable=False)  # what a dense position holds is looked at on the host


def _steps(
    problem: Problem, forward: Callable[[Any], Results], inputs: Sequence[Tensor], recordable: bool = True
) -> list[Contender]:
    """Return our step from `inputs` at every precision, in either memory, and the peers'.

    In the memory that "auto" does not take it is there at every precision on a CPU, and in bf16 on CUDA.
    On CUDA ours in bf16 is there as a recorded graph, too, if it is `recordable`; its memory was laid out then.
    """
    size = problem.size
    flop = flow_flop(size, dense=False, backward=True)
    flop += mixture_flop(size, size.classes + size.centres, backward=True)
    variants = [(_named("hgad_fast", precision), precision, "auto") for precision in problem.precisions]
    if problem.device.type == "cuda":  # "auto" is "reversible" there
        variants.append(("hgad_fast, bf16, standard memory", "bf16", "standard"))
    else:
        variants += [(_named("hgad_fast, reversible", each), each, "reversible") for each in problem.precisions]
    contenders = []
    for name, precision, memory in variants:
        model = problem.ours(precision, memory)
        finish, moved = _finish_step(inputs, model.nfs[0], model.mixture.level(0), model.optimizer)
        contender_forward = functools.partial(forward, model)
        contenders.append(Contender(name, problem.path(), contender_forward, flop, moved, finish, precision=precision))
    if problem.device.type == "cuda" and recordable:
        model = problem.ours("bf16")
        finish, moved = _finish_step(inputs, model.nfs[0], model.mixture.level(0), model.optimizer)
        replay = functools.partial(_recorded_step, model, forward, finish, [])
        contenders.append(Contender("hgad_fast, bf16, recorded", problem.path(), replay, flop, moved, precision="bf16"))

    peer_flop = flow_flop(size, dense=True, backward=True)
    peer_flop += mixture_flop(size, size.classes * (1 + size.centres) + size.centres, backward=True)
    peer_inputs = problem.x, problem.labels, problem.onehot, problem.position
    for precision in problem.flow_peer_precisions:
        level = copy.deepcopy(problem.official)
        finish, moved = _finish_step(peer_inputs, level.flow, level.mixture, level.optimizer())
        peer_forward = _in_precision(precision, functools.partial(level, *peer_inputs, stage=2))
        name = _named(problem.peer, precision)
        contenders.append(
            Contender(name, problem.peer_path, peer_forward, peer_flop, moved, finish, precision, is_peer=True)
        )
    return contenders


def _recorded_step(
    model: Any,
    forward: Callable[[Any], Results],
    finish: Callable[[Results], Results],
    recorded: list[tuple[Callable[[], Any], Results]],
) -> Results:
    """Run the model's step as a CUDA graph, recorded at the first call; that call's step starts where others' do."""

    def step() -> Results:
        return finish(forward(model))

    if not recorded:
        state = copy.deepcopy(model.state_dict())
        for group in model.optimizer.param_groups:
            group["capturable"] = True
        for _ in range(EAGER_STEPS):
            on_side_stream(step)
        recorded.append(record(step))
        model.load_state_dict(state)  # in place, where the graph finds it
        for moments in model.optimizer.state.values():
            for moment in moments.values():
                moment.zero_()
    replay, results = recorded[0]
    replay()
    return results


def _finish_step(
    inputs: Sequence[Tensor], flow: nn.Module, mixture: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> tuple[Callable[[Results], Results], int]:
    """Return what follows the forward pass of a step, and the bytes that no step can avoid to move."""

    def finish(terms: Results) -> Results:
        optimizer.zero_grad()
        official_loss(terms).backward()
        optimizer.step()
        gradients = named_gradients(flow) | {name: part.grad for name, part in zip(MIXTURE, mixture, strict=True)}
        return terms | {f"gradient of {name}": grad for name, grad in gradients.items() if grad is not None}

    trained = [p for p in (*flow.parameters(), *mixture) if p.requires_grad]
    # The gradient is written, then Adam reads it, the parameter and two moments, and writes those three.
    return finish, sum(t.nbytes for t in inputs) + 8 * sum(parameter.nbytes for parameter in trained)


def _in_precision(precision: str, forward: Callable[[], Results]) -> Callable[[], Results]:
    """Return a peer's forward pass; for bf16, which a CPU has, under autocast."""
    return torch.autocast("cpu", torch.bfloat16)(forward) if precision == "bf16" else forward


def _flow_peers(problem: Problem, forward: Callable[[], Results], flop: int, moved: int) -> list[Contender]:
    """Return the official flow at each of its precisions."""
    return [
        Contender(
            _named(problem.peer, precision),
            problem.peer_path,
            _in_precision(precision, forward),
            flop,
            moved,
            precision=precision,
            is_peer=True,
        )
        for precision in problem.flow_peer_precisions
    ]


def _peers(
    problem: Problem,
    forward: Callable[[], Results],
    flop: int,
    moved: int,
    finish: Callable[[Results], Results] = lambda results: results,
) -> list[Contender]:
    """Return the official formulation of an operation, in plain torch, at each of its precisions."""
    return [
        Contender(_named("official", precision), "torch", forward, flop, moved, finish, precision, is_peer=True)
        for precision in problem.peer_precisions
    ]


CASES: dict[str, Callable[[Problem], list[Contender]]] = {
    "coupling": coupling_case,
    "flow": flow_case,
    "mixture": mixture_case,
    "scores": scores_case,
    "codes": codes_case,
    "distances": distances_case,
    "scoring": scoring_case,
    "training": training_case,
    "official-loop": official_loop_case,
}
