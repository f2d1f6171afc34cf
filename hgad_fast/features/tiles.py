"""Pictures too large for a network at once: tiles that give the features of the whole.

A tile is seen with a halo, the pixels around it that decide about its features, and only the features of its core are
kept. Padding and phase are those of the whole picture: a tile begins at a multiple of the network's stride, and ends a
multiple of it before the picture's end, so that every layer finds a size of the same remainder by its stride. Padding
in TensorFlow's way ("SAME") depends on that remainder, on the left and top too; other padding does not mind.
"""

from __future__ import annotations

import copy
import itertools
import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

STUDIED = 1024  # height and width of the picture on which a network's memory and reach are counted
MAX_CHANGE = 1e-6  # of features, relative, by pixels that do not matter


@dataclass(frozen=True)
class Footprint:
    """What a network takes for a picture, from running it on shapes alone (and, for `is_local`, on a small strip).

    Attributes:
        stride: pixels of a cell of the coarsest stage.
        halo: pixels on each side of a cell that its features can depend on, by kernels, strides and dilations; a
            multiple of `stride`.
        is_local: no pixel beyond the halo changes the features. False for what pools over the whole picture
            (squeeze-and-excitation, attention): its tiles differ from the whole.
        bytes_per_pixel: activations alive at the worst moment; 0 where they could not be counted.
    """

    stride: int
    halo: int
    is_local: bool
    bytes_per_pixel: float


@dataclass(frozen=True)
class Cut:
    """A tile along one axis: cells first to last (exclusive) of the coarsest stage, seen in pixels start to stop."""

    first: int
    last: int
    start: int
    stop: int


def shadow(net: nn.Module) -> nn.Module:
    """A copy without weights, on the meta device, which computes shapes."""
    tensors = itertools.chain(net.parameters(), net.buffers())
    return copy.deepcopy(net, {id(t): nn.Parameter(t.detach().to("meta"), requires_grad=False) for t in tensors})


@torch.no_grad()
def footprint(net: nn.Module, strides: list[int]) -> Footprint:
    """Of a network that returns stages of these strides; one that takes pictures of one size only has no halo."""
    stride = max(strides)
    reach = 0.0

    def look(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal reach
        if inputs[0].dim() == 4:
            reach += _reach(layer) * STUDIED / max(inputs[0].shape[2], 1)

    empty = shadow(net)
    for layer in empty.modules():
        if hasattr(layer, "kernel_size") and hasattr(layer, "stride"):
            layer.register_forward_pre_hook(look)
    try:
        with _Memory() as memory:
            stages = channels_first(net, empty(torch.empty(1, 3, STUDIED, STUDIED, device="meta")))
    except (AssertionError, RuntimeError):  # how networks tell what they do not take
        return Footprint(stride, 0, False, 0.0)
    halo = math.ceil(reach / stride) * stride
    if any(x.shape[2] < STUDIED // each for x, each in zip(stages, strides, strict=True)):
        halo *= 2  # layers without padding: all that a cell depends on lies on one side of it
    return Footprint(stride, halo, _is_local(net, stride, halo), memory.peak / STUDIED**2)


def _reach(layer: Any) -> int:
    """How many of its input's pixels a layer's output can lie away from what it depends on, on the worse side."""

    def number(value: Any) -> int:
        return max(value) if isinstance(value, (tuple, list)) else int(value)

    extent = (number(layer.kernel_size) - 1) * number(getattr(layer, "dilation", 1)) + 1
    return extent - 1 - max(extent - number(layer.stride), 0) // 2


def _is_local(net: nn.Module, stride: int, halo: int) -> bool:
    """Whether pixels further than the halo from a row of cells leave its features alone; seen on a strip of noise.

    A network that does not take the strip is not known to be local.
    """
    like = next(net.parameters())
    generator = torch.Generator().manual_seed(0)
    length, width = 2 * halo + 2 * stride, max(2 * stride, 64)
    one, other = (torch.randn(1, 3, length, width, generator=generator).to(like.device) for _ in range(2))
    border = halo + stride
    above, below = torch.cat([other[:, :, :border], one[:, :, border:]], 2), one.clone()
    below[:, :, border:] = 3 * other[:, :, border:]
    try:
        plain = channels_first(net, net(one))
        for changed, end in ((above, -1), (below, 0)):
            for x, y in zip(plain, channels_first(net, net(changed)), strict=True):
                x, y = x[:, :, end], y[:, :, end]
                if not (x - y).norm() <= MAX_CHANGE * x.norm():
                    return False
    except (AssertionError, RuntimeError):
        return False
    return True


def channels_first(net: Any, features: list[Tensor]) -> list[Tensor]:
    if getattr(net, "output_fmt", "NCHW") == "NHWC":
        return [x.permute(0, 3, 1, 2) for x in features]
    return features


class _Memory(TorchDispatchMode):
    """Counts the bytes of tensors alive, of all that operations return while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def cuts(length: int, cells: int, parts: int, stride: int, halo: int) -> list[Cut]:
    """Cut an axis of `length` pixels and `cells` cells in at most `parts` tiles of one extent, halo included.

    Memory freed by a tile fits the next one of its shape; the last tile sees more of what lies before its core.
    """
    repeated = 2 * halo + length % stride  # of each tile after the first: cores are whole cells
    extent = max(math.ceil((length + (parts - 1) * repeated) / parts), 2 * halo + 2 * stride)
    extent = min(extent + (length - extent) % stride, length)
    found: list[Cut] = []
    last = 0
    while last < cells:
        first, start = last, max(0, min(last * stride - halo, length - extent))
        stop = start + extent
        last = cells if stop == length else (stop - halo) // stride
        found.append(Cut(first, last, start, stop))
    return found


def tiling(
    size: tuple[int, int], cells: tuple[int, int], stride: int, halo: int, max_pixels: float
) -> tuple[list[Cut], list[Cut]]:
    """Cuts of height and width with the least work, none of their tiles of more than `max_pixels` with its halo.

    Where the halo alone is too much for that, tiles are as small as a core of twice the halo allows.
    """
    max_pixels = max(max_pixels, (4 * halo + 4 * stride) ** 2)
    best: tuple[float, list[Cut], list[Cut]] | None = None
    for rows, columns in _candidates(size, cells, stride, halo, max_pixels):
        work = sum(c.stop - c.start for c in rows) * sum(c.stop - c.start for c in columns)
        if best is None or work < best[0]:
            best = work, rows, columns
    assert best is not None
    return best[1:]


def _candidates(
    size: tuple[int, int], cells: tuple[int, int], stride: int, halo: int, max_pixels: float
) -> Iterator[tuple[list[Cut], list[Cut]]]:
    height, width = size
    for parts in range(1, cells[0] + 1):
        rows = cuts(height, cells[0], parts, stride, halo)
        wide = max_pixels / max(c.stop - c.start for c in rows)
        if wide >= width:
            yield rows, cuts(width, cells[1], 1, stride, halo)
            return  # more rows only repeat more of the halo
        repeated = 2 * halo + width % stride
        core = wide - repeated - stride  # pixels; a stride for the remainder that `cuts` may add
        if core >= stride:
            yield rows, cuts(width, cells[1], math.ceil((width - repeated) / core), stride, halo)
