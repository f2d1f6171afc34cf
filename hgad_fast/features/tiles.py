"""Tiles of images that are too large for a network at once; they give the features of the whole image.

A tile is a core and a halo, the pixels around the core on which its features depend; only the features of the core are
kept. Padding and phase are those of the whole image: a tile begins at a multiple of the network's stride, and ends a
multiple of it before the image's end, so that at every layer its size has the same remainder, divided by the layer's
stride, as that of the image. TensorFlow's padding ("SAME") depends on that remainder, on the left and top too; other
padding does not.
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

STUDIED = 1024  # largest height and width of the image on which a network's memory and reach are counted
MAX_CHANGE = 1e-6  # relative change of features that pixels without influence may cause


@dataclass(frozen=True)
class Footprint:
    """The memory and the surroundings that a network needs, found on shapes alone (`is_local`: on a small strip).

    Attributes:
        stride: pixels of a cell of the coarsest stage.
        halo: pixels on each side of a cell that its features can depend on, by kernels, strides and dilations; a
            multiple of `stride`.
        is_local: no pixel beyond the halo changes the features. False for networks that pool over the whole image
            (squeeze-and-excitation, attention): their tiles differ from the whole.
        bytes_per_pixel: activations alive at the worst moment, in bytes per pixel of the image; 0 where they could not
            be counted.
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
    """Copy a network without its weights to the meta device, where it computes shapes alone."""
    tensors = itertools.chain(net.parameters(), net.buffers())
    return copy.deepcopy(net, {id(t): nn.Parameter(t.detach().to("meta"), requires_grad=False) for t in tensors})


@torch.no_grad()
def footprint(net: nn.Module, strides: list[int], maybe_local: bool = True) -> Footprint:
    """Return the footprint of a network that returns stages of these strides; without `maybe_local` it is not local.

    A network that takes images of one size only has no halo, is not local, and its bytes are 0.
    """
    stride = max(strides)
    side = STUDIED // stride * stride
    reach = 0.0

    def add_reach(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal reach
        if inputs[0].dim() == 4:
            reach += _reach(layer) * side / max(inputs[0].shape[2], 1)

    shadow_net = shadow(net)
    for layer in shadow_net.modules():
        if hasattr(layer, "kernel_size") and hasattr(layer, "stride"):
            layer.register_forward_pre_hook(add_reach)
    try:
        with _Memory() as memory:
            stages = channels_first(net, shadow_net(torch.empty(1, 3, side, side, device="meta")))
    except (AssertionError, RuntimeError):  # networks refuse a size by one of these
        return Footprint(stride, 0, False, 0.0)
    halo = math.ceil(reach / stride) * stride
    if any(x.shape[2] < side // stage_stride for x, stage_stride in zip(stages, strides, strict=True)):
        halo *= 2  # layers without padding: all that a cell depends on lies on one side of it
    is_local = maybe_local and _is_local(net, stride, halo)
    return Footprint(stride, halo, is_local, memory.peak / side**2)


def _reach(layer: Any) -> int:
    """Return how far, in pixels of its input, a layer's output can be from what it depends on, on the worse side."""

    def largest(value: Any) -> int:
        return max(value) if isinstance(value, (tuple, list)) else int(value)

    extent = (largest(layer.kernel_size) - 1) * largest(getattr(layer, "dilation", 1)) + 1
    return extent - 1 - max(extent - largest(layer.stride), 0) // 2


def _is_local(net: nn.Module, stride: int, halo: int) -> bool:
    """Return whether pixels further than the halo from a row of cells leave its features as they are.

    It is tried on a strip of noise. A network that does not take the strip is not known to be local: False.
    """
    device = next(net.parameters()).device
    generator = torch.Generator().manual_seed(0)
    length, width = 2 * halo + 2 * stride, max(2, math.ceil(64 / stride)) * stride
    strip, noise = (torch.randn(1, 3, length, width, generator=generator).to(device) for _ in range(2))
    border = halo + stride
    changed_above = torch.cat([noise[:, :, :border], strip[:, :, border:]], 2)
    changed_below = torch.cat([strip[:, :, :border], 3 * noise[:, :, border:]], 2)
    try:
        features = channels_first(net, net(strip))
        for changed, row in ((changed_above, -1), (changed_below, 0)):
            for x, y in zip(features, channels_first(net, net(changed)), strict=True):
                x, y = x[:, :, row], y[:, :, row]
                if not (x - y).norm() <= MAX_CHANGE * x.norm():  # NaN is not local
                    return False
    except (AssertionError, RuntimeError):
        return False
    return True


def channels_first(net: Any, features: list[Tensor]) -> list[Tensor]:
    """Return the features of a network as (B, C, h, w), in whichever order it gives them."""
    if getattr(net, "output_fmt", "NCHW") == "NHWC":
        return [x.permute(0, 3, 1, 2) for x in features]
    return features


class _Memory(TorchDispatchMode):
    """A count of the bytes of the tensors alive, among those that operations return while it is active."""

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
    """Cut an axis of `length` pixels and `cells` cells into at most `parts` tiles of one extent, halo included.

    The extent is the same so that memory freed by a tile fits the next one; the last tile sees more than the halo of
    what lies before its core.
    """
    repeated = 2 * halo + length % stride  # pixels that each tile after the first repeats, as cores are whole cells
    extent = max(math.ceil((length + (parts - 1) * repeated) / parts), 2 * halo + 2 * stride)
    extent = min(extent + (length - extent) % stride, length)
    axis: list[Cut] = []
    last = 0
    while last < cells:
        first, start = last, max(0, min(last * stride - halo, length - extent))
        stop = start + extent
        last = cells if stop == length else (stop - halo) // stride
        axis.append(Cut(first, last, start, stop))
    return axis


def tiling(
    size: tuple[int, int], cells: tuple[int, int], stride: int, halo: int, max_pixels: float
) -> tuple[list[Cut], list[Cut]]:
    """Return the cuts of height and width with the least work and tiles of at most `max_pixels`, halo included.

    Where the halo alone takes more than that, tiles are as small as a core of twice the halo allows.
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
    """Yield cuts of height and width for each number of rows, with as few columns as `max_pixels` allows."""
    height, width = size
    for n_rows in range(1, cells[0] + 1):
        rows = cuts(height, cells[0], n_rows, stride, halo)
        max_width = max_pixels / max(c.stop - c.start for c in rows)
        if max_width >= width:
            yield rows, cuts(width, cells[1], 1, stride, halo)
            return  # more rows only repeat more of the halo
        repeated = 2 * halo + width % stride
        core = max_width - repeated - stride  # pixels; a stride for the remainder that `cuts` may add
        if core >= stride:
            yield rows, cuts(width, cells[1], math.ceil((width - repeated) / core), stride, halo)
