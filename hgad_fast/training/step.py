"""A training step of all levels at once: a batch to the device, forward, backward, optimizer.

Nothing in it waits for a GPU: sizes are known on the host, features and labels come from pinned memory, and losses stay
on the device. So the host can run ahead, and a step whose shapes were seen before can be recorded as a CUDA graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..protocol import Detector
from .processes import Processes

Result = TypeVar("Result")
EAGER_STEPS = 3  # of each shape before one is recorded: they compile kernels, make optimizer state and memory pools
MAX_GRAPHS = 4  # each holds a step's memory; with images of many sizes, the same shapes would hardly come again


class Group(NamedTuple):
    """The images of one size at one level."""

    x: Tensor  # (n h w, C)
    labels: Tensor  # (n,)
    height: int
    width: int

    def to(self, device: torch.device) -> Group:
        """Return the group with its tensors on a device; the host does not wait for the copy."""
        return self._replace(x=self.x.to(device, non_blocking=True), labels=self.labels.to(device, non_blocking=True))


Batch = list[list[Group]]  # the groups of each level


def gather(images: Sequence[list[Tensor]], labels: Tensor, *, pinned: bool = False) -> Batch:
    """Return the feature maps of images as a batch on the host; those of one level and size form one group.

    Args:
        images: one (C, h, w) tensor per level of each image.
        labels: their classes (n,).
        pinned: put the batch in pinned memory.
    """
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


def make_optimizer(model: Detector) -> torch.optim.Adam:
    """Return the Adam optimizer of a training run, over the method's groups of parameters."""
    return torch.optim.Adam(model.parameter_groups(), lr=model.config.lr, fused=True)


class _Recorded(NamedTuple):
    """A step recorded as a CUDA graph: it runs again on what its batches then hold."""

    batches: list[Batch]
    replay: Callable[[], Any]
    terms: Tensor  # overwritten by each replay


class Step:
    """Makes the steps of a training: one backward pass and one optimizer for all levels.

    Each process takes its share of the images; the gradient is that of the mean over the pixels of all of them. With
    `accumulate` that share is processed in that many parts, which gives the same gradient in less memory. With
    `clip_grad_norm` the gradient of each of the method's clip groups is scaled down to that norm where it is longer.

    Args:
        model: trained in place.
        processes: those that share the batches.
        graphs: record steps as CUDA graphs.
    """

    def __init__(self, model: Detector, processes: Processes, graphs: bool = False) -> None:
        if graphs and model.device.type != "cuda":
            raise ValueError(f"cuda_graphs=True needs the model on a CUDA device; it is on {model.device}")
        if graphs and processes.count > 1:
            raise ValueError("cuda_graphs=True works in one process; leave it out where several train together")
        self.model, self.config, self.processes, self.graphs = model, model.config, processes, graphs
        self.optimizer = make_optimizer(model)
        if graphs:  # a recorded step reads its rate from the device
            for group in self.optimizer.param_groups:
                group |= {"capturable": True, "lr": torch.tensor(group["lr"], device=model.device)}
        self.clip_groups = model.clip_groups()
        self.terms: tuple[str, ...] = ()  # the names of what the objective of the last step reports
        self._stage = 0
        self._seen: Counter[Any] = Counter()
        self._recorded: dict[Any, _Recorded] = {}

    def __call__(self, images: Sequence[list[Tensor]], labels: Tensor, stage: int, rate: float) -> Tensor:
        """Make one step on this process's images.

        Args:
            images: one (C, h, w) tensor per level of each image, on the CPU.
            labels: their classes (n,), on the CPU.
            stage: number of the stage, from 1.
            rate: learning rate.

        Returns:
            This process's part of the loss terms, (rows, terms): summed over the processes, the mean over all pixels.
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
        device_batches = (_on_device(batch, self.model.device) for batch in batches)
        return self._advance(device_batches, parts, self._all_pixels(pixels))

    def _stage_loss(self, stage: int) -> nn.Module:
        """Return the objective of a stage, and note the terms that it reports."""
        loss = self.model.objective(stage)
        self.terms = tuple(loss.terms)  # type: ignore[arg-type]
        if self.processes.count == 1:
            return loss
        return DistributedDataParallel(loss, gradient_as_bucket_view=True)

    def _all_pixels(self, pixels: list[int]) -> Sequence[Any]:
        """Return the pixels of each level in the images of all processes, which may differ in size."""
        if self.processes.count == 1:
            return pixels
        own_pixels = torch.tensor(pixels, dtype=torch.float64)
        own_pixels = own_pixels.pin_memory() if self.model.device.type == "cuda" else own_pixels
        return self.processes.sum(own_pixels.to(self.model.device, non_blocking=True)).float().unbind()

    def _advance(self, batches: Iterator[Batch], parts: int, pixels: Sequence[Any]) -> Tensor:
        """Add up the gradients of the `parts` batches, step the optimizer, and return the loss terms."""
        self.optimizer.zero_grad(set_to_none=True)
        reported: Any = 0.0
        for part, batch in enumerate(batches, 1):
            exchanged = part == parts or not isinstance(self._loss, DistributedDataParallel)
            with nullcontext() if exchanged else self._loss.no_sync():  # type: ignore[operator]
                loss, terms = self._loss(batch, pixels)
                # DistributedDataParallel takes the mean over the processes, and the loss is a sum over them.
                (loss * self.processes.count if self.processes.count > 1 else loss).backward()
            reported = reported + terms
        if self.config.clip_grad_norm is not None:
            for parameters in self.clip_groups:
                nn.utils.clip_grad_norm_(parameters, self.config.clip_grad_norm)
        self.optimizer.step()
        return reported

    def _graphed(self, batches: list[Batch], pixels: list[int]) -> Tensor:
        """Make the step by replaying a recorded one of its shapes, which is recorded first where there is none yet.

        The first `EAGER_STEPS` of its shapes are made without, and so are all once `MAX_GRAPHS` others are recorded.
        """
        shapes = [[(*group.x.shape, group.height, group.width) for group in _groups(batch)] for batch in batches]
        key = str((self._stage, shapes))
        self._seen[key] += 1
        if key not in self._recorded:
            device_batches = [_on_device(batch, self.model.device) for batch in batches]

            def work() -> Tensor:
                return self._advance(iter(device_batches), len(batches), pixels)

            if self._seen[key] <= EAGER_STEPS or len(self._recorded) == MAX_GRAPHS:
                return on_side_stream(work)
            self._recorded[key] = _Recorded(device_batches, *record(work))
        recorded = self._recorded[key]
        for recorded_batch, batch in zip(recorded.batches, batches, strict=True):
            for target, source in zip(_groups(recorded_batch), _groups(batch), strict=True):
                target.x.copy_(source.x, non_blocking=True)
                target.labels.copy_(source.labels, non_blocking=True)
        recorded.replay()
        return recorded.terms.clone()  # the next replay overwrites them


def _on_device(batch: Batch, device: torch.device) -> Batch:
    return [[group.to(device) for group in groups] for groups in batch]


def _groups(batch: Batch) -> Iterator[Group]:
    return (group for groups in batch for group in groups)


def on_side_stream(work: Callable[[], Result]) -> Result:
    """Do work on a side stream, as the steps before a recording must: the default stream cannot be recorded."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = work()
    torch.cuda.current_stream().wait_stream(stream)
    return result


def record(work: Callable[[], Result]) -> tuple[Callable[[], Any], Result]:
    """Record the work's kernels without running them; return a function that runs them, and the result it fills."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph.replay, result
