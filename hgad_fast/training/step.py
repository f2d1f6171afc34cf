"""A training step of all levels at once: a batch to the device, forward, backward, optimizer.

Nothing in it waits for a GPU: sizes are known on the host, features and labels come from pinned memory, and losses stay
on the device. So the host can run ahead, and a step whose shapes were seen before can be recorded as a CUDA graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import ops
from ..protocol import Detector
from .drawing import Draw
from .feeding import Batch, DeviceFeed, DeviceQueue, Feed, HostFeed, Part
from .feeding import Group as Group  # for callers that make a batch themselves
from .feeding import gather as gather
from .processes import Processes

Result = TypeVar("Result")
Images = tuple[Sequence[list[Tensor]], Tensor]  # one (C, h, w) tensor per level of each image, and the labels (n,)
EAGER_STEPS = 3  # of each shape before one is recorded: they compile kernels, make optimizer state and memory pools
MAX_GRAPHS = 4  # of a stage: with images of many sizes, the same shapes would hardly come again


def check_labels(labels: Tensor, model: Detector) -> None:
    """Raise a ValueError where the classes (n,) of images, on the CPU, are not among those of the model.

    Nothing behind it looks at them again: a kernel takes them as positions in its tables.
    """
    ids, classes = labels.numpy(), len(model.groups)
    outside = ids[(ids < 0) | (ids >= classes)]
    if model.groups_are_classes and len(outside):
        raise ValueError(f"class id {outside[0]} is out of range: the model's classes have the ids 0 to {classes - 1}")


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
    With `pixels_per_step` the pixels are those that are drawn for the step, and nothing is computed of the others.

    Args:
        model: trained in place.
        processes: those that share the batches.
        graphs: record steps as CUDA graphs.

    Attributes:
        number: that of the next step in the training, from 0, on which its draw of pixels depends.
        terms: the names of what the objective of the last step reports.

    Raises:
        ValueError: the model's device, the number of processes or the backend of the operations does not allow graphs,
            or the method no draw.
    """

    def __init__(self, model: Detector, processes: Processes, graphs: bool = False) -> None:
        if graphs and model.device.type != "cuda":
            raise ValueError(f"cuda_graphs=True needs the model on a CUDA device; it is on {model.device}")
        if graphs and processes.count > 1:
            raise ValueError("cuda_graphs=True works in one process; leave it out where several train together")
        _, parameter = next(model.named_parameters())
        if graphs and parameter.is_cuda and ops.path(parameter) == "torch":
            raise ValueError(
                "cuda_graphs=True records Triton's kernels, and the definitions in torch compute here, which wait for "
                "the device: install Triton, unset HGAD_FAST_BACKEND, or leave cuda_graphs out"
            )
        if model.pixels_per_step is not None and not model.pointwise:
            raise ValueError(
                f"pixels_per_step is {model.pixels_per_step}: the method {model.config.method!r} looks at a map as a "
                "whole, so no pixels can be left out; leave it None"
            )
        self.model, self.config, self.processes, self.graphs = model, model.config, processes, graphs
        self.feed: Feed = HostFeed(model.device)
        if model.device.type == "cuda":
            self.feed = DeviceFeed(DeviceQueue(model.device))
        self.optimizer = make_optimizer(model)
        if graphs:  # a recorded step reads its rate from the device
            for group in self.optimizer.param_groups:
                group |= {"capturable": True, "lr": torch.tensor(group["lr"], device=model.device)}
        self.clip_groups = model.clip_groups()
        self.terms: tuple[str, ...] = ()
        self.number = 0
        self._stage = 0
        self._seen: Counter[Any] = Counter()
        self._recorded: dict[Any, _Recorded] = {}
        self._pool: Any = None  # the memory of all recorded steps: no two of them run at the same time

    def __call__(
        self, images: Sequence[list[Tensor]], labels: Tensor, stage: int, rate: float, following: Images | None = None
    ) -> Tensor:
        """Make one step on this process's images.

        Args:
            images: one (C, h, w) tensor per level of each image, on the CPU. A `feeding.Selection` may stay on the
                device, so that it need not be copied again.
            labels: their classes (n,), on the CPU.
            stage: number of the stage, from 1.
            rate: learning rate.
            following: images and labels that the next call is given, the same objects: while this step is computed,
                they are read, or brought to the device. None: not known yet.

        Returns:
            This process's part of the loss terms, (rows, terms): summed over the processes, the mean over all pixels.

        Raises:
            ValueError: a label is not the number of a class.
        """
        check_labels(labels, self.model)
        with on_device(self.model.device):
            terms = self._step(images, labels, stage, rate, following)
        self.number += 1
        return terms

    def _step(
        self, images: Sequence[list[Tensor]], labels: Tensor, stage: int, rate: float, following: Images | None
    ) -> Tensor:
        """Make one step, as `__call__` does, while the model's device is the current one."""
        if stage != self._stage:
            self._drop_graphs()
            self._stage, self._loss = stage, self._stage_loss(stage)
        for group in self.optimizer.param_groups:
            if self.graphs:
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        parts = self.feed.parts(images, labels, self._parts(images), self._draw(self.number))
        if not self.feed.runs_on:
            self._prefetch(following)
        levels = range(len(parts[0].members))
        pixels = [sum(group.pixels for part in parts for group in part.members[level]) for level in levels]
        if self.graphs:
            terms = self._graphed(parts, pixels)
        else:
            terms = self._advance((part.batch() for part in parts), len(parts), self._all_pixels(pixels))
        if self.feed.runs_on:
            self._prefetch(following)
        return terms

    def _prefetch(self, following: Images | None) -> None:
        """Let the feed begin with what the next step is given."""
        if following is not None:
            images, labels = following
            self.feed.prefetch(images, labels, self._parts(images), self._draw(self.number + 1))

    def _parts(self, images: Sequence[list[Tensor]]) -> int:
        """Return in how many parts these images are processed."""
        return min(self.config.accumulate, len(images))

    def _draw(self, number: int) -> Draw:
        """Return the draw of pixels of the step of this number."""
        return Draw(self.model.pixels_per_step, self.config.seed, number)

    def _stage_loss(self, stage: int) -> nn.Module:
        """Return the objective of a stage, and note the terms that it reports."""
        loss = self.model.objective(stage)
        self.terms = tuple(loss.terms)  # type: ignore[arg-type]
        if self.processes.count == 1:
            return loss
        return DistributedDataParallel(loss, gradient_as_bucket_view=True)

    def _drop_graphs(self) -> None:
        """Forget the recorded steps, which hold memory and no other stage can use, so that new ones are recorded."""
        if self._recorded:
            torch.cuda.synchronize(self.model.device)  # one of them may still run
        self._recorded.clear()
        self._seen.clear()
        self._pool = None  # a pool whose graphs are all gone takes no others

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
                loss = loss * self.processes.count if self.processes.count > 1 else loss
                with exactly(loss.device.type):
                    loss.backward()
            reported = reported + terms
        if self.config.clip_grad_norm is not None:
            for parameters in self.clip_groups:
                nn.utils.clip_grad_norm_(parameters, self.config.clip_grad_norm)
        self.optimizer.step()
        return reported

    def _graphed(self, parts: Sequence[Part], pixels: list[int]) -> Tensor:
        """Make the step by replaying a recorded one of its shapes, which is recorded first where there is none yet.

        The first `EAGER_STEPS` of its shapes are made without, and so are all once `MAX_GRAPHS` others are recorded.
        """
        shapes = [[(len(group.numbers), *group[1:4]) for group in groups] for part in parts for groups in part.members]
        key = str((len(parts), shapes))
        self._seen[key] += 1
        if key in self._recorded:
            recorded = self._recorded[key]
            for part, recorded_batch in zip(parts, recorded.batches, strict=True):
                part.fill(recorded_batch)
        else:
            batches = [part.batch() for part in parts]

            def work() -> Tensor:
                return self._advance(iter(batches), len(batches), pixels)

            if self._seen[key] <= EAGER_STEPS or len(self._recorded) == MAX_GRAPHS:
                return on_side_stream(work)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            recorded = self._recorded[key] = _Recorded(batches, *record(work, self._pool))
        recorded.replay()
        # A replay changes parameters behind torch's back; what is kept of them for scoring goes by their versions.
        changed = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.autograd.graph.increment_version([*changed, *self.model.buffers()])
        return recorded.terms.clone()  # the next replay overwrites them


@contextmanager
def exactly(device_type: str) -> Iterator[None]:
    """Let a backward pass round as the forward pass did: without autocast, and without tf32 in convolutions."""
    cudnn: Any = torch.backends.cudnn
    before = cudnn.conv.fp32_precision
    if device_type == "cuda":
        cudnn.conv.fp32_precision = "ieee"
    enabled = torch.is_autocast_enabled(device_type)
    try:
        with torch.autocast(device_type, enabled=False) if enabled else nullcontext():
            yield
    finally:
        if device_type == "cuda":
            cudnn.conv.fp32_precision = before


def on_device(device: torch.device | None) -> AbstractContextManager[Any]:
    """Return a context in which `device` is the current one: streams, events and graphs are made there.

    A device other than a GPU, or None, changes nothing.
    """
    return nullcontext() if device is None or device.type != "cuda" else torch.cuda.device(device)


_side_streams: dict[int, torch.cuda.Stream] = {}  # by device; each stream has a pool of memory of its own


def side_stream() -> torch.cuda.Stream:
    """Return the side stream of the current device, always the same: new ones would multiply the reserved memory."""
    device = torch.cuda.current_device()
    if device not in _side_streams:
        _side_streams[device] = torch.cuda.Stream()
    return _side_streams[device]


def on_side_stream(work: Callable[[], Result], device: torch.device | None = None) -> Result:
    """Do work on a side stream, as the steps before a recording must: the default stream cannot be recorded.

    Args:
        work: what is done.
        device: the GPU whose side stream is taken; None: the current one.
    """
    with on_device(device):
        stream = side_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = work()
        torch.cuda.current_stream().wait_stream(stream)
    return result


def record(
    work: Callable[[], Result], pool: Any = None, device: torch.device | None = None
) -> tuple[Callable[[], Any], Result]:
    """Record the work's kernels without running them; return a function that runs them, and the result it fills.

    Args:
        work: what is recorded, on the side stream of the device.
        pool: memory shared with other recordings (`torch.cuda.graph_pool_handle`), of which one runs at a time, and
            none reads what another wrote except its result; None: memory of its own.
        device: the GPU that the work runs on; None: the current one.
    """
    with on_device(device):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=side_stream()):
            result = work()
    return graph.replay, result
