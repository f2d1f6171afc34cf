"""A training step of all levels at once: a batch to the device, forward, backward, optimizer.

Nothing in it waits for a GPU: sizes are known on the host, features and labels come from pinned memory, and losses stay
on the device. So the host runs ahead, and a step whose shapes have been seen before can be recorded as a CUDA graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .config import LOSS_TERMS
from .official import make_optimizer
from .processes import Processes

if TYPE_CHECKING:
    from .model import HGADModel

Result = TypeVar("Result")
STAGE_2 = LOSS_TERMS[3:]
EAGER_STEPS = 3  # of a shape before it is recorded: kernels are compiled, optimizer state and memory pools exist
MAX_GRAPHS = 4  # each holds a step's memory; pictures of many sizes would hardly meet the same shapes again


def stage_terms(stage: int) -> tuple[str, ...]:
    return LOSS_TERMS if stage == 2 else LOSS_TERMS[:3]


class Group(NamedTuple):
    """The pictures of one size at one level."""

    x: Tensor  # (n h w, C)
    labels: Tensor  # (n,)
    height: int
    width: int

    def to(self, device: torch.device) -> Group:
        return self._replace(x=self.x.to(device, non_blocking=True), labels=self.labels.to(device, non_blocking=True))


Batch = list[list[Group]]  # groups of each level


def gather(images: Sequence[list[Tensor]], labels: Tensor, *, pinned: bool = False) -> Batch:
    """Maps (C, h, w) of each picture and level as a batch on the host, those of one size together."""
    levels: Batch = []
    for maps in zip(*images, strict=True):
        by_size: dict[tuple[int, int], list[int]] = {}
        for i, features in enumerate(maps):
            by_size.setdefault((features.shape[1], features.shape[2]), []).append(i)
        groups = []
        for (h, w), members in by_size.items():
            x, y = torch.cat([maps[i].permute(1, 2, 0).flatten(0, 1) for i in members]), labels[members]
            groups.append(Group(x.pin_memory(), y.pin_memory(), h, w) if pinned else Group(x, y, h, w))
        levels.append(groups)
    return levels


class StageLoss(nn.Module):
    """The loss of a batch in one stage. Registered are the parameters that have a gradient in that stage, and nothing
    else: DistributedDataParallel waits for each of them, and would send buffers around in every step."""

    def __init__(self, model: HGADModel, stage: int) -> None:
        super().__init__()
        mixture = model.mixture
        self.flows = tuple(model.nfs)
        self.trained = nn.ParameterList([*model.nfs.parameters(), *mixture.mus, *mixture.phi_inters])
        if stage == 2:
            self.trained.extend([*mixture.mu_deltas, *mixture.phi_intras])
        self.pixel_losses = mixture.losses
        self.config, self.stage = model.config, stage

    def forward(self, batch: Batch, pixels: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """The loss, and its terms (S, terms): sums over the batch's pixels, divided by those of each level (S)."""
        config, names = self.config, stage_terms(self.stage)
        weights = dict.fromkeys(LOSS_TERMS, 1.0) | {"L_g": config.lambda1, "L_mi": -config.lambda2}
        total: Any = 0.0
        reported = []
        for level, (groups, count) in enumerate(zip(batch, pixels, strict=True)):
            flow: Any = self.flows[level]
            sums: dict[str, Tensor] = {}
            for x, labels, h, w in groups:
                z, log_det = flow(x, flow.grid(h, w, x.device))
                losses = self.pixel_losses(
                    z, log_det, labels, level, stage=self.stage, label_smoothing=config.label_smoothing
                )
                for name, term in losses.items():
                    sums[name] = sums[name] + term.sum() if name in sums else term.sum()
            terms = {name: term / count for name, term in sums.items()}
            total = total + sum(weights[name] * terms[name] for name in names if name in config.loss_terms)
            reported.append(torch.stack([terms[name].detach() for name in names]))
        return total, torch.stack(reported)


class _Recorded(NamedTuple):
    """A step that runs again on whatever lies in its memory."""

    batches: list[Batch]
    replay: Callable[[], Any]
    terms: Tensor


class Step:
    """Makes the steps of a training. The levels share no parameter: one backward pass and one optimizer serve all.

    Each process takes its share of the pictures; the gradient is that of the mean over the pixels of all of them. With
    `accumulate` that share is worked off in so many parts, which gives the same gradient in less memory. With
    `clip_grad_norm` the gradient of each level is scaled down to that norm where it is longer: a level is trained as it
    would be by itself.

    Args:
        model: trained in place.
        processes: who shares the batches.
        graphs: record steps as CUDA graphs.
    """

    def __init__(self, model: HGADModel, processes: Processes, graphs: bool = False) -> None:
        if graphs and model.device.type != "cuda":
            raise ValueError(f"cuda_graphs=True needs the model on a CUDA device; it is on {model.device}")
        if graphs and processes.count > 1:
            raise ValueError("cuda_graphs=True works in one process; leave it out where several train together")
        self.model, self.config, self.processes, self.graphs = model, model.config, processes, graphs
        self.optimizer = make_optimizer(model)
        if graphs:  # a recorded step reads its rate from the device
            for group in self.optimizer.param_groups:
                group |= {"capturable": True, "lr": torch.tensor(group["lr"], device=model.device)}
        self.levels = [[*flow.parameters(), *model.mixture.level(level)] for level, flow in enumerate(model.nfs)]
        self._stage = 0
        self._seen: Counter[Any] = Counter()
        self._recorded: dict[Any, _Recorded] = {}

    def __call__(self, images: Sequence[list[Tensor]], labels: Tensor, stage: int, rate: float) -> Tensor:
        """One step on this process's pictures.

        Args:
            images: one (C, h, w) tensor a level of each picture, on the CPU.
            labels: their classes (n,), on the CPU.
            stage: 1 or 2.
            rate: learning rate.

        Returns:
            This process's part of the loss terms, (S, terms): the sum over the processes is the mean over all pixels.
        """
        if stage != self._stage:
            self._stage, self._loss = stage, self._stage_loss(stage)
        for group in self.optimizer.param_groups:
            if self.graphs:
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        parts = min(self.config.accumulate, len(images))
        bounds = [len(images) * part // parts for part in range(parts + 1)]
        pinned = self.model.device.type == "cuda"
        batches = (
            gather(images[start:stop], labels[start:stop], pinned=pinned)
            for start, stop in zip(bounds, bounds[1:], strict=False)
        )
        pixels = [sum(features.shape[1] * features.shape[2] for features in maps) for maps in zip(*images, strict=True)]
        if self.graphs:
            return self._graphed(list(batches), pixels)
        return self._advance((_to(batch, self.model.device) for batch in batches), parts, self._all_pixels(pixels))

    def _stage_loss(self, stage: int) -> nn.Module:
        loss = StageLoss(self.model, stage)
        if self.processes.count == 1:
            return loss
        return DistributedDataParallel(loss, gradient_as_bucket_view=True)

    def _all_pixels(self, pixels: list[int]) -> Sequence[Any]:
        """Of all processes: their pictures may differ in size."""
        if self.processes.count == 1:
            return pixels
        mine = torch.tensor(pixels, dtype=torch.float64)
        mine = mine.pin_memory() if self.model.device.type == "cuda" else mine
        return self.processes.sum(mine.to(self.model.device, non_blocking=True)).float().unbind()

    def _advance(self, batches: Iterator[Batch], parts: int, pixels: Sequence[Any]) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        reported: Any = 0.0
        for part, batch in enumerate(batches, 1):
            exchanges = part == parts or not isinstance(self._loss, DistributedDataParallel)
            with nullcontext() if exchanges else self._loss.no_sync():  # type: ignore[operator]
                loss, terms = self._loss(batch, pixels)
                # DistributedDataParallel takes the mean over the processes, and the loss is a sum over them.
                (loss * self.processes.count if self.processes.count > 1 else loss).backward()
            reported = reported + terms
        if self.config.clip_grad_norm is not None:
            for parameters in self.levels:
                nn.utils.clip_grad_norm_(parameters, self.config.clip_grad_norm)
        self.optimizer.step()
        return reported

    def _graphed(self, batches: list[Batch], pixels: list[int]) -> Tensor:
        """The step as a recorded one, if its shapes are those of one; see `EAGER_STEPS` and `MAX_GRAPHS`."""
        shapes = [[(*group.x.shape, group.height, group.width) for group in _groups(batch)] for batch in batches]
        key = str((self._stage, shapes))
        self._seen[key] += 1
        if key not in self._recorded:
            device_batches = [_to(batch, self.model.device) for batch in batches]

            def work() -> Tensor:
                return self._advance(iter(device_batches), len(batches), pixels)

            if self._seen[key] <= EAGER_STEPS or len(self._recorded) == MAX_GRAPHS:
                return on_side_stream(work)
            self._recorded[key] = _Recorded(device_batches, *record(work))
        recorded = self._recorded[key]
        for fixed, batch in zip(recorded.batches, batches, strict=True):
            for there, here in zip(_groups(fixed), _groups(batch), strict=True):
                there.x.copy_(here.x, non_blocking=True)
                there.labels.copy_(here.labels, non_blocking=True)
        recorded.replay()
        return recorded.terms.clone()  # the next replay overwrites them


def _to(batch: Batch, device: torch.device) -> Batch:
    return [[group.to(device) for group in groups] for groups in batch]


def _groups(batch: Batch) -> Iterator[Group]:
    return (group for groups in batch for group in groups)


def on_side_stream(work: Callable[[], Result]) -> Result:
    """Steps before the recording must not run on the default stream, which cannot be recorded."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = work()
    torch.cuda.current_stream().wait_stream(stream)
    return found


def record(work: Callable[[], Result]) -> tuple[Callable[[], Any], Result]:
    """What runs the work's kernels again, and where its result will lie then. Recording itself runs none of them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph.replay, result
