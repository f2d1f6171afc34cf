"""What `hgad-fast bench` and `benchmarks/` measure, and the official formulation they measure against.

The first half restates HGAD (arXiv 2403.13349) the way its official implementation computes it: flow blocks of FrEIA,
a dense positional code, every distance materialised. It is the baseline of each speed-up and the reference of the
contract tests. The second half times all contenders of a case in turn, in one process, once their results agree.

Work is counted from the sizes. `flop` are the operations of the matrix products and distances (a multiply-add is two, a
distance in C dimensions 2 C); for the coupling, which has neither, the elementwise operations (a function is one).
`bytes` is what no implementation can avoid to move: every input and parameter read once, every result written once. The
share of the ceiling is the time that the slower of the two would take at the rates of a copy and of a matrix product of
the same precision, measured in the same run, over the time measured.
"""

from __future__ import annotations

import copy
import functools
import gc
import importlib.util
import json
import math
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import latency, ops
from .files import replacing
from .flow import ConditionalFlow
from .latency import Latency

LOG_2PI = math.log(2 * math.pi)


def official_flow(channels: int, position_dim: int, blocks: int, clamp: float = 1.9) -> nn.Module:
    """The official flow of one level, `SequenceINN` of `AllInOneBlock`; unconditional if `position_dim` is 0.

    Call it as `flow(x, [position])` with x (N, C) and position (N, P); it returns z (N, C) and log_det (N,).
    Its state dict has the names of official checkpoints. Its rotations come from NumPy's global random state.

    Raises:
        ImportError: FrEIA is not installed.
    """
    try:
        from FrEIA import framework, modules
    except ImportError as error:
        raise ImportError(
            "the official formulation is built from FrEIA blocks: pip install 'hgad_fast[bench]'"
        ) from error

    def subnet(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, 2 * inputs), nn.ReLU(), nn.Linear(2 * inputs, outputs))

    flow = framework.SequenceINN(channels)
    condition: dict[str, Any] = {"cond": 0, "cond_shape": (position_dim,)} if position_dim else {}
    for _ in range(blocks):
        flow.append(
            modules.AllInOneBlock,
            **condition,
            subnet_constructor=subnet,
            affine_clamping=clamp,
            global_affine_init=1.0,
            global_affine_type="SOFTPLUS",
            permute_soft=True,
        )
    return flow


def official_position(position_dim: int, height: int, width: int) -> Tensor:
    """The sinusoidal code (P, h, w): columns in the first half of the channels, rows in the second."""
    half = position_dim // 2
    frequency = torch.exp(torch.arange(0, half, 2) * (-math.log(1e4) / half))
    column = torch.arange(width)[None, :] * frequency[:, None]
    row = torch.arange(height)[None, :] * frequency[:, None]
    code = torch.empty(position_dim, height, width)
    code[0:half:2] = column.sin()[:, None, :]
    code[1:half:2] = column.cos()[:, None, :]
    code[half::2] = row.sin()[:, :, None]
    code[half + 1 :: 2] = row.cos()[:, :, None]
    return code


def dense_position(position_dim: int, images: int, height: int, width: int) -> Tensor:
    """`official_position` repeated for every image, (images * h * w, P), as the official loop passes it."""
    code = official_position(position_dim, height, width)
    return code.expand(images, -1, -1, -1).permute(0, 2, 3, 1).reshape(-1, position_dim)


def smoothed_onehot(labels: Tensor, n_classes: int, smoothing: float) -> Tensor:
    """Uniformly smoothed targets (N, K) of labels (N,)."""
    return F.one_hot(labels, n_classes) * (1 - smoothing) + smoothing / n_classes


def negative_half_squared_distances(z: Tensor, centres: Tensor) -> Tensor:
    """-|z - c|^2 / 2 of z (N, C) to centres (R, C), (N, R), by the expansion of the square."""
    cross = z @ centres.t()
    return -0.5 * (z.square().sum(1, keepdim=True) - 2 * cross + centres.square().sum(1))


def log_density(z: Tensor, centres: Tensor, log_weights: Tensor, log_det: Tensor) -> Tensor:
    """Natural-log density (N,) of z (N, C) under mixtures of centres (N, M, C) and log_weights (N, M)."""
    distances = (z[:, None] - centres).square().sum(2)
    return torch.logsumexp(log_weights - 0.5 * distances, 1) + log_det - z.shape[1] / 2 * LOG_2PI


def intra_class_centres(mu: Tensor, delta: Tensor) -> Tensor:
    """Centres (K, M, C) from main centres mu (K, C) and offsets delta (K, M - 1, C)."""
    return torch.cat([mu[:, None], mu[:, None] + delta], 1)


def official_losses(
    z: Tensor,
    log_det: Tensor,
    labels: Tensor,
    onehot: Tensor,
    mu: Tensor,
    delta: Tensor,
    phi_inter: Tensor,
    phi_intra: Tensor,
    stage: int,
) -> dict[str, Tensor]:
    """The loss terms of the paper's section 3, means over pixels, with every distance materialised.

    Args:
        z, log_det: output of the flow, (N, C) and (N,).
        labels: class of each pixel, (N,) int64.
        onehot: target distribution over the classes, (N, K); exactly one entry of a row exceeds one half.
        mu, delta, phi_inter, phi_intra: parameters, (K, C), (K, M - 1, C), (K,), (K, M).
        stage: 1 leaves out the intra-class terms, 2 has all of them.
    """
    channels = z.shape[1]
    n_classes, n_centres = phi_intra.shape

    distances = negative_half_squared_distances(z, mu)
    log_prior = F.log_softmax(phi_inter, 0)
    log_joint = torch.logsumexp(distances + log_prior, 1)
    log_prior = log_prior.detach()
    log_posterior = F.log_softmax(distances + log_prior, 1)
    log_responsibility = F.log_softmax(distances, 1)
    terms = {
        "L_g": (-(log_joint + log_det) / channels).mean(),
        "L_mi": (onehot * (log_posterior - log_prior)).sum(1).mean(),
        "L_e": -(log_responsibility.exp() * log_responsibility).sum(1).mean(),
    }
    if stage == 1:
        return terms

    centres = intra_class_centres(mu.detach(), delta)
    log_weights = F.log_softmax(phi_intra, 1)[labels]
    to_every_centre = negative_half_squared_distances(z, centres.flatten(0, 1))
    to_own_centres = to_every_centre.view(-1, n_classes, n_centres)[onehot > 0.5]
    log_intra = torch.logsumexp(to_own_centres + log_weights, 1)
    terms["L_g_intra"] = (-(log_intra + log_det) / channels).mean()
    terms["L_z"] = -F.logsigmoid(log_density(z, centres[labels], log_weights, log_det) / channels).mean()
    return terms


def official_loss(terms: dict[str, Tensor], lambda1: float = 1.0, lambda2: float = 100.0) -> Tensor:
    """What is minimised: lambda1 L_g - lambda2 L_mi + L_e, plus the intra-class terms where there are any."""
    intra = (terms[name] for name in ("L_g_intra", "L_z") if name in terms)
    return lambda1 * terms["L_g"] - lambda2 * terms["L_mi"] + terms["L_e"] + sum(intra)


def official_scores(
    z: Tensor,
    log_det: Tensor,
    mu: Tensor,
    delta: Tensor,
    phi_intra: Tensor,
    classes: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """What pixels are scored by: log-density / C of each class (N, len(classes)), and negative entropy (N,).

    A column is what the official code computes when told that all images show the class; None is all classes.
    """
    centres = intra_class_centres(mu, delta)
    log_weights = F.log_softmax(phi_intra, 1)
    of_class = [
        log_density(z, centres[k].expand(len(z), -1, -1), log_weights[k].expand(len(z), -1), log_det)
        for k in (range(len(mu)) if classes is None else classes)
    ]
    log_responsibility = F.log_softmax(negative_half_squared_distances(z, mu), 1)
    negative_entropy = (log_responsibility.exp() * log_responsibility).sum(1)
    return torch.stack(of_class, 1) / z.shape[1], negative_entropy


def official_map(levels: list[Tensor], map_size: int) -> Tensor:
    """Map (B, s, s) from scores (B, h, w) of each level: one of `official_scores`, for images of one class.

    The product of the maps of the log-density and of the negative entropy is the published anomaly map.
    """
    from scipy.ndimage import gaussian_filter

    size = (map_size, map_size)
    total = torch.zeros(())
    for score in levels:
        normality = (score - score.max()).exp()[:, None]
        total = total + F.interpolate(normality, size, mode="bilinear", align_corners=True)[:, 0]
    return torch.stack(
        [torch.from_numpy(gaussian_filter(image.numpy(), sigma=4)) for image in (total.max() - total).cpu()]
    )


class DefinitionFlow(ConditionalFlow):
    """The flow as `ops.flow_definition` states it, called like `official_flow`: the peer where FrEIA is missing."""

    def forward(self, x: Tensor, condition: Any = None, rev: bool = False) -> tuple[Tensor, Tensor]:
        blocks = [block.parameters_for_ops() for block in self.module_list]  # type: ignore[operator]
        return ops.flow_definition(x, blocks, condition[0], clamp=self.clamp, inverse=rev)


def has_freia() -> bool:
    return importlib.util.find_spec("FrEIA") is not None


class OfficialLevel(nn.Module):
    """One level of the official model: its flow, and the parameters of its mixture."""

    def __init__(self, flow: nn.Module, mu: Tensor, delta: Tensor, phi_inter: Tensor, phi_intra: Tensor) -> None:
        super().__init__()
        self.flow = flow
        self.mu, self.delta = nn.Parameter(mu), nn.Parameter(delta)
        self.phi_inter, self.phi_intra = nn.Parameter(phi_inter), nn.Parameter(phi_intra)

    @classmethod
    def of(cls, model: Any, level: int = 0) -> OfficialLevel:
        """A copy of one level of an `HGADModel`, on its device; without FrEIA its flow is a `DefinitionFlow`."""
        config = model.config
        mixture = [part[level] for part in (model.mus, model.mu_deltas, model.phi_inters, model.phi_intras)]
        channels, layers, position_dim = mixture[0].shape[1], config.coupling_layers, config.pos_embed_dim
        if has_freia():
            flow = official_flow(channels, position_dim, layers, config.clamp_alpha)
        else:
            flow = DefinitionFlow(channels, layers, position_dim, config.clamp_alpha)
        flow.load_state_dict(model.nfs[level].state_dict())
        return cls(flow, *(part.detach().clone() for part in mixture)).to(mixture[0].device)

    @property
    def mixture(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.mu, self.delta, self.phi_inter, self.phi_intra

    def forward(self, x: Tensor, labels: Tensor, onehot: Tensor, position: Tensor, stage: int) -> dict[str, Tensor]:
        """Loss terms of features x (N, C); the other arguments as in `official_losses`, position (N, P)."""
        z, log_det = self.flow(x, [position])
        return official_losses(z, log_det, labels, onehot, *self.mixture, stage)

    def optimizer(self, lr: float = 2e-4) -> torch.optim.Adam:
        """Adam as published."""
        groups: list[dict[str, Any]] = [
            {"params": list(self.flow.parameters()), "weight_decay": 1e-4},
            {"params": [self.mu, self.delta]},
            {"params": [self.phi_inter, self.phi_intra]},
        ]
        return torch.optim.Adam(groups, lr=lr, betas=(0.95, 0.99))


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
MILLION_PIXELS = Size(images=16, height=250, width=250)
CUDA_SIZES = (
    HEADLINE,
    Size(height=32, width=32),
    LARGE,
    replace(LARGE, channels=112, classes=40),
    replace(LARGE, classes=200),
)


def sizes(case: str, device: torch.device, quick: bool = False) -> tuple[Size, ...]:
    """The workloads of a case.

    A GPU gets 2 048 to 32 768 pixels (8 images of 16 x 16 to 64 x 64), and all that keeps no activations a million too.
    A CPU gets the 2 048 only: a step of the official formulation takes it about a second there, and time grows with the
    pixels. What loops over the classes, scoring, has 40 of them there. `quick` tries the machinery; its figures mean
    nothing.
    """
    over_classes = case in ("scores", "scoring")
    if quick:
        return (QUICK,)
    if device.type == "cpu":
        return (MANY_CLASSES,) if over_classes else (HEADLINE,)
    if case in ("training", "official-loop"):
        return CUDA_SIZES
    if case == "coupling":  # knows no classes
        return (*CUDA_SIZES[:4], MILLION_PIXELS)
    more_classes = (replace(MILLION_PIXELS, classes=40),) if over_classes else ()
    return (*CUDA_SIZES, MILLION_PIXELS, *more_classes)


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
    """float32 matrix products of plain torch on CUDA in float32, or with tf32 operands if the precision is tf32."""
    # Not torch.backends.cuda.matmul.fp32_precision: torch.compile refuses to work after it (pytorch issue 166387).
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def flow_flop(size: Size, *, dense: bool, backward: bool = False) -> int:
    """Operations of a flow: per block the subnet's two products and the rotation; backward, the former twice.

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
    """Operations of so many distances a pixel; each costs as much again for the gradient of either side."""
    return 2 * size.pixels * size.channels * distances * (3 if backward else 1)


class Problem:
    """A seeded model, the official formulation with its parameters, and inputs, at one size on one device."""

    def __init__(self, size: Size, device: torch.device) -> None:
        from .config import HGADConfig
        from .model import HGADModel

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
        self.precisions = ("fp32", "tf32", "bf16") if device.type == "cuda" else ("fp32",)
        self.peer_precisions = self.precisions[:2]

        generator = self.generator()
        self.image_labels = torch.randint(size.classes, (size.images,), generator=generator, device=device)
        self.labels = self.image_labels.repeat_interleave(size.height * size.width)
        self.onehot = smoothed_onehot(self.labels, size.classes, self.smoothing)
        self.x = torch.randn(size.pixels, size.channels, generator=generator, device=device)
        self.position = dense_position(size.position_dim, size.images, size.height, size.width).to(device)

    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(0)

    def ours(self, precision: str = "fp32", memory: str = "auto") -> Any:
        """A copy of the model that computes in this way."""
        model = copy.deepcopy(self.model)
        model.precision, model.memory = precision, memory
        return model

    @torch.no_grad()
    def latent(self) -> tuple[Tensor, Tensor]:
        """z (N, C) and log_det (N,) of the inputs."""
        return self.official.flow(self.x, [self.position])

    def path(self) -> str:
        return ops.path(self.x)

    def parameter_bytes(self, module: nn.Module | None = None) -> int:
        tensors = self.official.mixture if module is None else tuple(module.parameters())
        return sum(tensor.nbytes for tensor in tensors)


def _named(name: str, precision: str) -> str:
    return name if precision == "fp32" else f"{name}, {precision}"


def coupling_case(problem: Problem) -> list[Contender]:
    """The affine coupling by itself, forward and backward; the official one as FrEIA's block has it, by autograd.

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
    if "bf16" in problem.precisions:
        variants.append(("hgad_fast, bf16 subnet", a.bfloat16()))
    return [
        *(Contender(name, problem.path(), functools.partial(ours, a), flop, moved(a)) for name, a in variants),
        Contender("official", "torch", official, flop, moved(a), backward, is_peer=True),
    ]


def flow_case(problem: Problem) -> list[Contender]:
    """Flow forward without gradients; ours with the separable code, and given the dense one.

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
    in_torch = [
        functools.partial(before_a_backward_pass, problem.ours(precision, "reversible").nfs[0])
        for precision in problem.precisions
        if precision == "bf16"
    ]
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
        *_peers(problem, functools.partial(results, official, [position]), peer_flop, with_position),
    ]


def mixture_case(problem: Problem) -> list[Contender]:
    """Loss terms of stage 2 and their gradients for z, log_det and the parameters."""
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
        *_peers(problem, official, peer_flop, moved, backward, name="official", path="torch"),
    ]


def scores_case(problem: Problem) -> list[Contender]:
    """Log-density of every pixel under every class, and the entropy of its class posterior."""
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
        # Its differences (N, M, C) need a batch of bounded size: 32 768 pixels are 8 images of 64 x 64.
        batches = zip(z.split(32768), log_det.split(32768), strict=True)
        parts = [official_scores(*batch, mu, delta, phi_intra) for batch in batches]
        of_class, negative_entropy = (torch.cat(part) for part in zip(*parts, strict=True))
        return {"log-density": of_class * size.channels, "entropy": -negative_entropy}

    centres = size.classes * size.centres
    peer_flop = mixture_flop(size, centres + size.classes)
    return [
        Contender("hgad_fast", problem.path(), ours, mixture_flop(size, centres), moved),
        *_peers(problem, official, peer_flop, moved, name="official", path="torch"),
    ]


def scoring_case(problem: Problem) -> list[Contender]:
    """Features of images of one known class to maps by the official procedure: flow, densities, maps.

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
        z, log_det = level.flow(x, [problem.position])
        scores = official_scores(z, log_det, level.mu, level.delta, level.phi_intra, classes=[0])
        by_density, by_entropy = (official_map([score.view(shape)], map_size) for score in scores)
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
        *_peers(problem, official, peer_flop, moved + problem.position.nbytes),
    ]


def training_case(problem: Problem) -> list[Contender]:
    """A step of stage 2 (forward, backward, Adam), ours from the parts that `fit` puts together."""
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
    """The same step with the arguments and the optimizer that the official training script uses."""
    size = problem.size
    labels = problem.labels.view(size.images, size.height, size.width)

    def forward(model: Any) -> Results:
        return model(problem.x, (labels, problem.onehot), problem.position, scale=0, epoch=2)

    return _steps(problem, forward, inputs=(problem.x, problem.labels, problem.onehot, problem.position))


def _steps(problem: Problem, forward: Callable[[Any], Results], inputs: Sequence[Tensor]) -> list[Contender]:
    """Our step from `inputs` at every precision, and with the kind of memory that "auto" does not take; the peers'.

    On CUDA ours in bf16 is there as a recorded graph, too; its memory was laid out when it was recorded.
    """
    size = problem.size
    flop = flow_flop(size, dense=False, backward=True)
    flop += mixture_flop(size, size.classes + size.centres, backward=True)
    variants = [(_named("hgad_fast", precision), precision, "auto") for precision in problem.precisions]
    if "bf16" in problem.precisions:  # "auto" is "reversible" on CUDA
        variants.append(("hgad_fast, bf16, standard memory", "bf16", "standard"))
    else:
        variants.append(("hgad_fast, reversible", "fp32", "reversible"))
    contenders = []
    for name, precision, memory in variants:
        model = problem.ours(precision, memory)
        finish, moved = _finish_step(inputs, model.nfs[0], model.mixture.level(0), model.optimizer)
        contender_forward = functools.partial(forward, model)
        contenders.append(Contender(name, problem.path(), contender_forward, flop, moved, finish, precision=precision))
    if problem.device.type == "cuda":
        model = problem.ours("bf16")
        finish, moved = _finish_step(inputs, model.nfs[0], model.mixture.level(0), model.optimizer)
        replay = functools.partial(_recorded_step, model, lambda: finish(forward(model)), [])
        contenders.append(Contender("hgad_fast, bf16, recorded", problem.path(), replay, flop, moved, precision="bf16"))

    peer_flop = flow_flop(size, dense=True, backward=True)
    peer_flop += mixture_flop(size, size.classes * (1 + size.centres) + size.centres, backward=True)
    peer_inputs = problem.x, problem.labels, problem.onehot, problem.position
    for precision in problem.peer_precisions:
        level = copy.deepcopy(problem.official)
        finish, moved = _finish_step(peer_inputs, level.flow, level.mixture, level.optimizer())
        peer_forward = functools.partial(level, *peer_inputs, stage=2)
        name = _named(problem.peer, precision)
        contenders.append(
            Contender(name, problem.peer_path, peer_forward, peer_flop, moved, finish, precision, is_peer=True)
        )
    return contenders


def _recorded_step(
    model: Any, step: Callable[[], Results], recorded: list[tuple[Callable[[], Any], Results]]
) -> Results:
    """Run the model's step as a CUDA graph, recorded at the first call; that call's step starts where others' do."""
    from .step import EAGER_STEPS, on_side_stream, record

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
    """What follows the forward pass of a step, and the bytes that no step can avoid to move."""
    parameters = dict(flow.named_parameters()) | dict(zip(MIXTURE, mixture, strict=True))
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}

    def finish(terms: Results) -> Results:
        optimizer.zero_grad()
        official_loss(terms).backward()
        optimizer.step()
        gradients = {name: parameter.grad for name, parameter in trained.items()}
        return terms | {f"gradient of {name}": grad for name, grad in gradients.items() if grad is not None}

    # The gradient is written, then Adam reads it, the parameter and two moments, and writes those three.
    return finish, sum(t.nbytes for t in inputs) + 8 * sum(parameter.nbytes for parameter in trained.values())


def _peers(
    problem: Problem,
    forward: Callable[[], Results],
    flop: int,
    moved: int,
    finish: Callable[[Results], Results] = lambda results: results,
    *,
    name: str | None = None,
    path: str | None = None,
) -> list[Contender]:
    """The peer at each of its precisions."""
    name, path = name or problem.peer, path or problem.peer_path
    return [
        Contender(_named(name, precision), path, forward, flop, moved, finish, precision, is_peer=True)
        for precision in problem.peer_precisions
    ]


CASES: dict[str, Callable[[Problem], list[Contender]]] = {
    "coupling": coupling_case,
    "flow": flow_case,
    "mixture": mixture_case,
    "scores": scores_case,
    "scoring": scoring_case,
    "training": training_case,
    "official-loop": official_loop_case,
}


@dataclass(frozen=True)
class Ceiling:
    """What the machine does at best, now: a large copy, and a large matrix product at each precision."""

    bytes_per_second: float
    flop_per_second: dict[str, float]


@dataclass(frozen=True)
class Row:
    """One contender at one size; medians and quartiles are over the rounds."""

    case: str
    size: Size
    device: str  # its name
    contender: str
    path: str
    precision: str
    is_peer: bool
    rounds: int
    seconds: float
    seconds_quartiles: tuple[float, float]
    images_per_second: float
    pixels_per_second: float
    flop: int
    bytes: int
    flop_per_second: float
    bytes_per_second: float
    ceiling: Ceiling
    ceiling_share: float
    peak_bytes: int  # beyond what was allocated before the work began
    speedups: dict[str, tuple[float, float, float]]  # peer's time / this time: median over the rounds, and quartiles
    error: float  # largest Frobenius-relative deviation of a result from the first peer's


@dataclass(frozen=True)
class Failure:
    """A contender that has no figures, and why: it ran out of memory, or its results are wrong."""

    case: str
    size: Size
    device: str  # its name
    contender: str
    path: str
    precision: str
    reason: str
    is_wrong: bool = False


Outcome = Row | Failure | Latency


def run(
    cases: Iterable[str] = (),
    quick: bool = False,
    *,
    device: str | torch.device | None = None,
    compiled: bool = False,
    output: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Outcome]:
    """Time cases against the official formulation, or where FrEIA is missing against the definition in plain torch.

    Args:
        cases: names from `CASES`, or "latency" (see `hgad_fast.latency`); all when empty.
        quick: tiny sizes and three rounds, to try the machinery.
        device: where; CUDA if there is one.
        compiled: the peers under `torch.compile` too.
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
    about = environment(where)
    for note in about["notes"]:
        progress(note)
    outcomes: list[Outcome] = []
    for name in names:
        for size in (None,) if name == "latency" else sizes(name, where, quick):
            progress(name if size is None else f"{name}: {size}")
            if size is None:
                outcomes += latency.measure(where, device_name(where), quick)
            else:
                outcomes += measure(name, size, where, compiled=compiled, rounds=3 if quick else None)
            if output is not None:
                save(outcomes, output, about)
    return outcomes


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
        found = CASES[case](problem)
        if compiled:  # built anew, since a training step changes its model
            found += [compile_contender(each) for each in CASES[case](problem) if each.is_peer]
        return found

    return compare(
        case,
        size,
        contenders(size),
        device,
        measure_ceiling(device),
        rounds=rounds,
        seconds_in_all=seconds_in_all,
        smaller=lambda: contenders(replace(size, images=1)),
    )


@functools.cache
def measure_ceiling(device: torch.device) -> Ceiling:
    """The best of ten copies (read and write counted) and of ten matrix products of each kind, once a process."""
    cuda = device.type == "cuda"

    def best(work: Callable[[], object]) -> float:
        return min(seconds(work, device) for _ in range(10))

    source = torch.ones(2**28 if cuda else 2**25, device=device)
    copied = 2 * source.nbytes / best(functools.partial(torch.empty_like(source).copy_, source))
    n = 8192 if cuda else 1024
    rates = {}
    for precision in ("fp32", "tf32", "bf16") if cuda else ("fp32",):
        a = torch.ones(n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
        with float32_products(precision):
            rates[precision] = 2 * n**3 / best(functools.partial(torch.mm, a, a))
    return Ceiling(copied, rates)


def compile_contender(contender: Contender) -> Contender:
    """The contender with its forward pass, hence its backward pass, under `torch.compile`."""
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


OUT_OF_MEMORY = "out of memory"
WRONG = "wrong: "
TOLERANCE = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 3e-2}
# A hidden unit within rounding of zero may pass the ReLU of one side and not of the other: of the 17 million in a
# step one or two do in float32, and each moves the gradient of its layer by some 5e-4 (float32 against float64 shows
# the same). With operands of fewer bits many do; the bounds are three times what was seen.
GRADIENT_TOLERANCE = {"fp32": 5e-3, "tf32": 3e-2, "bf16": 6e-2}


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
    """Of each contender the largest Frobenius-relative deviation of a result from the first peer's, or why it is out.

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
    """Frobenius norm of the difference over that of the expected; in float64, without a copy in it."""
    norm = functools.partial(torch.linalg.vector_norm, dtype=torch.float64)
    actual, expected = actual.detach(), expected.detach()
    return float(norm(actual - expected) / norm(expected).clamp(min=1e-30))


def wrong_results(outcomes: Iterable[Outcome]) -> list[str]:
    """A line for each contender whose results are wrong."""
    lines = []
    for outcome in outcomes:
        if isinstance(outcome, Latency):
            if not outcome.error <= TOLERANCE["fp32"]:
                lines.append(f"latency, {outcome.call}: the score deviates by {outcome.error:.1e}")
        elif isinstance(outcome, Failure) and outcome.is_wrong:
            reason = outcome.reason.removeprefix(WRONG)
            lines.append(f"{outcome.case}, {outcome.contender} ({outcome.size}): {reason}")
    return lines


def alternate(contenders: Sequence[Callable[[], object]], rounds: int, device: torch.device) -> np.ndarray:
    """Seconds (contender, round), NaN if out of memory. They take turns, each round starting with the next one."""
    times = np.empty((len(contenders), rounds))
    release_memory(device)
    for r in range(rounds):
        for i in range(len(contenders)):
            turn = (i + r) % len(contenders)
            try:
                times[turn, r] = seconds(contenders[turn], device)
            except torch.OutOfMemoryError:
                times[turn, r] = math.nan
    return times


def release_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of the work until the device has finished it."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quartiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [25, 75])
    return float(low), float(high)


def peak_memory(work: Callable[[], object], device: torch.device) -> int:
    """Bytes of tensors alive at the worst moment of the work, beyond those alive before it.

    On CUDA it is the allocator's own peak. On a CPU the profiler's record of every allocation and release is
    summed, which is exact and repeatable; the resident size depends on what the C library keeps. The scratch
    space that matrix libraries allocate for themselves is in neither.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with quiet_stderr(), torch.autograd.profiler.profile(use_kineto=False, profile_memory=True) as profile:
        work()
    assert profile.kineto_results is not None
    changes = [event.nbytes() for event in profile.kineto_results.events() if event.name() == "[memory]"]
    return max(0, int(np.cumsum(changes).max(initial=0)))


def peak_resident(work: Callable[[], object]) -> int:
    """Bytes of anonymous memory of this process at the worst moment of the work, beyond those before it (Linux).

    What the C library keeps and the scratch space of matrix libraries count; pages of mapped files, which the kernel
    may take back, do not. Looked at every few milliseconds.
    """
    before = peak = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return peak - before


def anonymous_bytes() -> int:
    """Resident memory of this process that no file backs.

    Raises:
        OSError: this system does not tell (Linux does).
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status names no RssAnon: this needs Linux 4.5 or later")


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """The profiler's library reports on its own start, and on missing GPUs, past Python's streams."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as sink:
            os.dup2(sink.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def table(outcomes: Iterable[Outcome]) -> str:
    """The outcomes as text, one block a case and size."""
    outcomes = list(outcomes)
    lines: list[str] = []
    for (case, size, device), block in grouped(outcomes).items():
        rows = [outcome for outcome in block if isinstance(outcome, Row)]
        heading = f"{case} on {device}: {size}"
        if rows:
            ceiling = rows[0].ceiling
            rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in ceiling.flop_per_second.items())
            heading += f"; {rows[0].rounds} rounds; copy {ceiling.bytes_per_second / 1e9:.1f} GB/s, "
            heading += f"matrix product {rates} GFLOP/s"
        columns = ["path", "ms (quartiles)", "images/s", "pixels/s", "GB/s", "GFLOP/s", "ceiling", "peak MiB", "error"]
        peers = list(rows[0].speedups) if rows else []
        cells = [["", *columns, *(f"{peer} / this" for peer in peers)]]
        cells += [[outcome.contender, *(_cells(outcome, peers))] for outcome in block]
        full = [line for line in cells if len(line) == len(cells[0])]
        widths = [max(map(len, column)) for column in zip(*full, strict=True)]
        widths[0] = max(len(line[0]) for line in cells)
        lines += ["", heading]
        for line in cells:
            name, *others = line
            aligned = (f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=False))
            lines.append("  " + "  ".join([f"{name:{widths[0]}}", *aligned]).rstrip())
    if frames := [outcome for outcome in outcomes if isinstance(outcome, Latency)]:
        lines += ["", latency.table(frames)]
    return "\n".join(lines[1:])


def grouped(outcomes: Iterable[Outcome]) -> dict[tuple[str, Size, str], list[Row | Failure]]:
    """Rows and failures by case, size and device, in their order."""
    groups: dict[tuple[str, Size, str], list[Row | Failure]] = {}
    for outcome in outcomes:
        if isinstance(outcome, Latency):
            continue
        groups.setdefault((outcome.case, outcome.size, outcome.device), []).append(outcome)
    return groups


def _cells(outcome: Row | Failure, peers: list[str]) -> list[str]:
    if isinstance(outcome, Failure):
        return [outcome.path, outcome.reason]
    low, high = (1e3 * quartile for quartile in outcome.seconds_quartiles)
    return [
        outcome.path,
        f"{1e3 * outcome.seconds:.2f} ({low:.2f}-{high:.2f})",
        f"{outcome.images_per_second:.1f}",
        f"{outcome.pixels_per_second:.0f}",
        f"{outcome.bytes_per_second / 1e9:.2f}",
        f"{outcome.flop_per_second / 1e9:.1f}",
        f"{outcome.ceiling_share:.0%}",
        f"{outcome.peak_bytes / 2**20:.1f}",
        f"{outcome.error:.0e}",
        *("{:.2f} ({:.2f}-{:.2f})".format(*outcome.speedups[peer]) for peer in peers),
    ]


def plot(outcomes: Iterable[Outcome], path: str | os.PathLike[str]) -> Path:
    """Write a roofline picture (PNG): what every contender attains, under what this machine can do.

    There is a panel for each number of pixels, with the first size of each case that has it. All contenders of a case
    stand over one another, at the least operations and bytes that one of them needs: their distance is the ratio of
    their times, and that to the roof what is left to gain.

    Raises:
        ValueError: there is no row to draw.
        ImportError: matplotlib is not installed.
    """
    blocks: dict[int, dict[str, list[Row]]] = {}
    for (case, size, _), block in grouped(outcomes).items():
        if rows := [outcome for outcome in block if isinstance(outcome, Row)]:
            blocks.setdefault(size.pixels, {}).setdefault(case, rows)
    if not blocks:
        raise ValueError("plot: there are no measured rows to draw")
    from matplotlib.figure import Figure

    columns = min(len(blocks), 2)
    lines = math.ceil(len(blocks) / columns)
    figure = Figure(figsize=(3 + 5.5 * columns, 1 + 4 * lines), dpi=120, facecolor="white", layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    every_row = [row for cases in blocks.values() for rows in cases.values() for row in rows]
    colours = {case: f"C{i}" for i, case in enumerate(dict.fromkeys(row.case for row in every_row))}
    for panel in panels[len(blocks) :]:
        panel.set_visible(False)
    for panel, pixels in zip(panels, sorted(blocks), strict=False):
        _draw_panel(panel, blocks[pixels], colours)
        panel.set_title(f"{pixels:,} pixels".replace(",", " "), loc="left", fontsize=10)
    _draw_roof(panels[: len(blocks)], every_row)
    figure.suptitle(f"Roofline of {every_row[0].device}")
    figure.supxlabel("operations per byte that has to be moved (FLOP/B)", fontsize=10)
    figure.supylabel("operations per second (FLOP/s)", fontsize=10)
    figure.legend(handles=_keys(every_row, colours), loc="outside right upper", frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    return Path(path)


_GREY = "#444444"
_SHAPES = {"fp32": "o", "tf32": "^", "bf16": "D", "compiled": "s"}


def _shape(row: Row) -> str:
    return "compiled" if row.contender.endswith("compiled") else row.precision


def _draw_panel(panel: Any, cases: dict[str, list[Row]], colours: dict[str, str]) -> None:
    for case, rows in cases.items():
        flop, moved = min(row.flop for row in rows), min(row.bytes for row in rows)
        rates = [flop / row.seconds for row in rows]
        panel.plot([flop / moved] * 2, [min(rates), max(rates)], color=colours[case], linewidth=0.8, alpha=0.6)
        for row, rate in zip(rows, rates, strict=True):
            face = "white" if row.is_peer else colours[case]
            style = {"markerfacecolor": face, "markeredgewidth": 1.5, "markersize": 7}
            panel.plot(flop / moved, rate, _SHAPES[_shape(row)], color=colours[case], zorder=3, **style)


def _draw_roof(panels: Any, rows: list[Row]) -> None:
    from matplotlib.ticker import EngFormatter

    ceiling = rows[0].ceiling
    knees = {name: rate / ceiling.bytes_per_second for name, rate in ceiling.flop_per_second.items()}
    intensities = [row.flop / row.bytes for row in rows] + list(knees.values())
    left, right = min(intensities) / 4, max(intensities) * 4
    x = np.array(sorted([left, *knees.values(), right]))
    for panel in panels:
        panel.set(xscale="log", yscale="log", xlim=(left, right))
        panel.yaxis.set_major_formatter(EngFormatter())
        panel.grid(which="major", color="#dddddd", linewidth=0.6)
        for rate in ceiling.flop_per_second.values():
            panel.plot(x, np.minimum(x * ceiling.bytes_per_second, rate), color=_GREY, linewidth=1.2, zorder=1)
    words: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "color": _GREY, "zorder": 2}
    for name, knee in knees.items():
        rate = ceiling.flop_per_second[name]
        panels[0].annotate(f"{name} product, {EngFormatter('FLOP/s', 0)(rate)}", (knee, rate), (14, 3), **words)
    copied = f"copy, {EngFormatter('B/s', 1)(ceiling.bytes_per_second)}"
    panels[0].annotate(copied, (left, left * ceiling.bytes_per_second), (8, -2), va="top", **words)


def _keys(rows: list[Row], colours: dict[str, str]) -> list[Any]:
    from matplotlib.lines import Line2D

    def key(label: str, marker: str, colour: str, face: str) -> Line2D:
        return Line2D([], [], linestyle="", marker=marker, color=colour, markerfacecolor=face, label=label)

    used = {_shape(row) for row in rows}
    ours, peer = key("hgad_fast", "o", _GREY, _GREY), key("official", "o", _GREY, "white")
    return [
        *(key(case, "s", colour, colour) for case, colour in colours.items()),
        *(ours, peer),
        *(key(name, marker, _GREY, "white") for name, marker in _SHAPES.items() if name in used and len(used) > 1),
    ]


def save(outcomes: Iterable[Outcome], path: str | os.PathLike[str], about: dict[str, Any], **more: Any) -> Path:
    """Write outcomes as JSON, and before them `about` (of `environment`) and anything more.

    `path` is a `.json` file, or a folder that gets `<device>-<date>.json`.
    """
    target = Path(path)
    if target.suffix != ".json":
        target /= f"{re.sub('[^a-z0-9]+', '-', about['device'].lower()).strip('-')}-{about['date'][:10]}.json"
    with replacing(target) as temporary:
        temporary.write_text(json.dumps(document(outcomes, about) | more, indent=1) + "\n")
    return target


def document(outcomes: Iterable[Outcome], about: dict[str, Any]) -> dict[str, Any]:
    """What `save` writes."""
    outcomes = list(outcomes)
    return about | {
        "rows": [asdict(outcome) for outcome in outcomes if isinstance(outcome, Row)],
        "failures": [asdict(outcome) for outcome in outcomes if isinstance(outcome, Failure)],
        "latencies": [asdict(outcome) for outcome in outcomes if isinstance(outcome, Latency)],
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions, commit and date of a run, and what the reader of its figures must know."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("hgad_fast", "triton", "numpy", "FrEIA"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    notes = []
    if not has_freia():
        notes.append(
            "FrEIA is not installed, so the official flow is left out: 'definition' is ours in plain torch "
            "(pip install 'hgad-fast[bench]')"
        )
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "notes": notes,
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """Commit of the checkout that this file stands in, `-dirty` if changed; None where it is installed."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
