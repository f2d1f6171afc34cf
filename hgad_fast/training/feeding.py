"""Feeding a training: how feature maps of images on the host become batches on the model's device.

On a CPU the maps of a part are gathered when its turn comes (`HostFeed`): of the pixels, those alone that are drawn for
the step. Each map is copied once, from the cache into the batch, and widened on the way. A thread does so for the next
step while the current one is computed, which then does not wait for a disk. A GPU is fed in three ways at once
(`DeviceFeed`), so that neither it nor the host waits for the other:

- Maps are copied as they lie into one persistent buffer of pinned memory, and from there to one of the same size on the
  device; the device transposes and widens them.
- The next batch is copied on a stream of its own while the current step runs.
- Where the features of all training images fit into `RESIDENT_SHARE` of the free memory, they stay on the device after
  their first upload, and later passes copy nothing from the host. So maps are uploaded whole, and the pixels that are
  drawn for a step are gathered on the device.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..features.extract import in_cache, kept
from .drawing import EVERY_PIXEL, Draw, Drawn

RESIDENT_SHARE = 1 / 3  # of the device's free memory, measured once, after the first step has taken what it needs
ALIGNMENT = 256  # bytes: where the maps of a group begin in a buffer


class Group(NamedTuple):
    """The images of one size at one level."""

    x: Tensor  # (n h w, C), or of the pixels that were drawn (n r c, C)
    labels: Tensor  # (n,)
    height: int
    width: int
    drawn: Drawn | None = None  # rows (r,) and columns (c,) of each map; None: all

    def to(self, device: torch.device) -> Group:
        """Return the group with its tensors on a device; the host does not wait for the copy."""
        x, labels = (tensor.to(device, non_blocking=True) for tensor in (self.x, self.labels))
        drawn = self.drawn and Drawn(*(tensor.to(device, non_blocking=True) for tensor in self.drawn))
        return self._replace(x=x, labels=labels, drawn=drawn)


Batch = list[list[Group]]  # the groups of each level
Size = tuple[int, int, int]  # C, h, w


class Members(NamedTuple):
    """The images of a part that form a group at one level, before the group is made."""

    numbers: list[int]  # of the images in the part
    channels: int
    height: int
    width: int
    drawn: Drawn | None  # the pixels of each map that take part, on the CPU; None: all

    @property
    def pixels(self) -> int:
        """Pixels of all these images that take part."""
        rows, columns = map(len, self.drawn) if self.drawn else (self.height, self.width)
        return len(self.numbers) * rows * columns


def members(images: Sequence[Sequence[Size]], draw: Draw) -> list[list[Members]]:
    """Return the groups that images form at each level, one for each size of map, in the order of their appearance.

    Args:
        images: the sizes of the maps of each image, one per level.
        draw: the pixels that take part.
    """
    levels = []
    for level, sizes in enumerate(zip(*images, strict=True)):
        by_size: dict[tuple[int, int], Members] = {}
        for number, (channels, height, width) in enumerate(sizes):
            if (height, width) not in by_size:
                by_size[height, width] = Members([], channels, height, width, draw.at(level, height, width))
            by_size[height, width].numbers.append(number)
        levels.append(list(by_size.values()))
    return levels


def gather(
    images: Sequence[list[Tensor]],
    labels: Tensor,
    *,
    pinned: bool = False,
    groups: Sequence[Sequence[Members]] | None = None,
) -> Batch:
    """Return the feature maps of images as a batch on the host; those of one level and size form one group.

    Pixels are in float32, or in float64 where a map is.

    Args:
        images: one (C, h, w) tensor per level of each image.
        labels: their classes (n,).
        pinned: put the batch in pinned memory.
        groups: those of each level; None: `members` of all pixels.
    """
    batch: Batch = []
    for maps, level_groups in zip(zip(*images, strict=True), groups or _members_of(images, EVERY_PIXEL), strict=True):
        batch.append([])
        for group in level_groups:
            dtype = functools.reduce(torch.promote_types, (maps[i].dtype for i in group.numbers), torch.float32)
            x = torch.empty(group.pixels, group.channels, dtype=dtype, pin_memory=pinned)
            for rows, i in zip(x.chunk(len(group.numbers)), group.numbers, strict=True):
                pixels = maps[i].permute(1, 2, 0)
                pixels = group.drawn.of(pixels) if group.drawn else pixels
                rows.view(pixels.shape).copy_(pixels)
            group_labels = labels[group.numbers]
            group_labels = group_labels.pin_memory() if pinned else group_labels
            batch[-1].append(Group(x, group_labels, group.height, group.width, group.drawn))
    return batch


def _members_of(images: Sequence[list[Tensor]], draw: Draw) -> list[list[Members]]:
    """Return the groups that images on the host form at each level; see `members`."""
    return members([[_size(features) for features in maps] for maps in images], draw)


def _size(features: Tensor) -> Size:
    channels, height, width = features.shape
    return channels, height, width


class Selection(Sequence[list[Tensor]]):
    """Some images of a training set, by their numbers in it; their maps are taken when they are asked for.

    Args:
        source: all images, one (C, h, w) tensor per level of each; what stays on a device is known by its number here.
        numbers: those of the selected images.
    """

    def __init__(self, source: Sequence[list[Tensor]], numbers: Sequence[int]) -> None:
        self.source, self.numbers = source, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: Any) -> Any:
        return self.source[self.numbers[i]]

    def kept(self, i: int) -> list[Tensor]:
        """Return the maps of image `i` of the selection in the precision that they are cached in."""
        return kept(self.source, self.numbers[i])

    def in_cache(self) -> bool:
        """Return whether all maps lie in a cache, so that a thread may read them and none has to be computed."""
        return all(in_cache(self.source, number) for number in self.numbers)


class Part(Protocol):
    """A part of a batch, which is made on the model's device when its turn comes."""

    members: list[list[Members]]  # the groups of each level

    def batch(self) -> Batch:
        """Return it as a new batch on the device."""

    def fill(self, batch: Batch) -> None:
        """Overwrite a batch of the same shapes with it."""


class Feed(Protocol):
    """The way from images on the host to parts of a batch.

    Attributes:
        runs_on: whether a step is still computed when the call that makes it has returned. Then `prefetch` is called
            after it; else before, with the parts of the step at hand.
    """

    runs_on: bool

    def parts(
        self, images: Sequence[list[Tensor]], labels: Tensor, count: int, draw: Draw = EVERY_PIXEL
    ) -> Sequence[Part]:
        """Return images with their labels (n,), both on the CPU, as `count` parts, to be used in this order."""

    def prefetch(self, images: Sequence[list[Tensor]], labels: Tensor, count: int, draw: Draw = EVERY_PIXEL) -> None:
        """Begin to bring to the device what the next call of `parts` is given, the same objects."""

    def clear(self) -> None:
        """Give all memory back."""


def bounds(images: int, count: int) -> Iterator[slice]:
    """Yield which of the images each of `count` parts takes."""
    edges = [images * part // count for part in range(count + 1)]
    yield from map(slice, edges, edges[1:])


class HostFeed:
    """Gathers each part on the host when its turn comes, and reads the first part of the next step ahead.

    Args:
        device: where the model is: the CPU, or a device that nothing is known about here.

    Attributes:
        ahead: what is read ahead, or None.
    """

    runs_on = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ahead: _Ahead | None = None

    def parts(
        self, images: Sequence[list[Tensor]], labels: Tensor, count: int, draw: Draw = EVERY_PIXEL
    ) -> list[HostPart]:
        """Return images with their labels (n,) as `count` parts."""
        ahead, self.ahead = self.ahead, None
        if ahead is not None and ahead.is_of(images, labels, count, draw):
            return ahead.parts()
        return _host_parts(images, labels, count, draw, self.device)

    def prefetch(self, images: Sequence[list[Tensor]], labels: Tensor, count: int, draw: Draw = EVERY_PIXEL) -> None:
        """Begin to read the maps of the next step from a cache, and to gather its first part.

        Maps that are elsewhere are left for the step: to compute them, a thread would take its processors, and what
        users bring is not for other threads.
        """
        self.clear()
        if isinstance(images, Selection) and images.in_cache():
            self.ahead = _Ahead(images, labels, count, draw, self.device)

    def clear(self) -> None:
        """Give back what was read ahead."""
        if self.ahead is not None:
            self.ahead.thread.join()
            self.ahead = None


class _Ahead:
    """The parts of a step that a thread reads, and what it was asked for; an error comes up where they are used."""

    def __init__(
        self, images: Sequence[list[Tensor]], labels: Tensor, count: int, draw: Draw, device: torch.device
    ) -> None:
        self.asked = images, labels, count, draw
        self._device = device
        self._parts: list[HostPart] = []
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._read, name="features of the next step", daemon=True)
        self.thread.start()

    def is_of(self, images: Sequence[list[Tensor]], labels: Tensor, count: int, draw: Draw) -> bool:
        """Return whether these images and labels, the same objects, are what was read."""
        same = images is self.asked[0] and labels is self.asked[1]
        return same and (count, draw) == self.asked[2:]

    def parts(self) -> list[HostPart]:
        """Return the parts, once they are read."""
        self.thread.join()
        if self._error is not None:
            raise self._error
        return self._parts

    def _read(self) -> None:
        try:
            self._parts = _host_parts(*self.asked, self._device)
            self._parts[0].gather()
        except BaseException as error:
            self._error = error


def _host_parts(
    images: Sequence[list[Tensor]], labels: Tensor, count: int, draw: Draw, device: torch.device
) -> list[HostPart]:
    """Return images with their labels (n,) as `count` parts; each is taken from the cache, or computed, once."""
    maps = [images.kept(i) if isinstance(images, Selection) else images[i] for i in range(len(images))]
    return [HostPart(maps[part], labels[part], device, draw) for part in bounds(len(maps), count)]


class HostPart:
    """A part that `HostFeed` gathers."""

    def __init__(
        self, images: Sequence[list[Tensor]], labels: Tensor, device: torch.device, draw: Draw = EVERY_PIXEL
    ) -> None:
        self.images, self.labels, self.device = images, labels, device
        self.members = _members_of(images, draw)
        self._gathered: Batch | None = None

    def gather(self) -> None:
        """Gather the batch that is asked for next."""
        self._gathered = gather(self.images, self.labels, groups=self.members)

    def batch(self) -> Batch:
        """Return it as a new batch."""
        if self._gathered is None:
            self.gather()
        batch, self._gathered = self._gathered, None
        assert batch is not None
        return [[group.to(self.device) for group in groups] for groups in batch]

    def fill(self, batch: Batch) -> None:
        """Overwrite a batch of the same shapes with it."""
        for targets, groups in zip(batch, self.batch(), strict=True):
            for target, group in zip(targets, groups, strict=True):
                target.x.copy_(group.x)
                target.labels.copy_(group.labels)
                for drawn, own_drawn in zip(target.drawn or (), group.drawn or (), strict=True):
                    drawn.copy_(own_drawn)


class DeviceQueue:
    """What a GPU does for a feed: memory, copies on a stream of their own, and the order in which things happen.

    The consumer's stream is the one that is current when a method is called.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()

    def allocate(self, size: int) -> tuple[Tensor, Tensor]:
        """Return `size` bytes of pinned memory, and as many of the device's, for copies."""
        pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        with torch.cuda.stream(self._stream):
            return pinned, torch.empty(size, dtype=torch.uint8, device=self.device)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return memory of the device for the consumer's stream."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def upload(self, values: Tensor) -> Tensor:
        """Return a few values of the host on the device, for the consumer's stream; the host does not wait."""
        return values.pin_memory().to(self.device, non_blocking=True)

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Queue the copy of pinned memory to the device's, after an event if one is given; return the event of its end.

        The host does not wait.
        """
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait(self, event: Any) -> None:
        """Let what is queued on the consumer's stream from now on begin after an event; the host does not wait."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def mark_read(self, memory: Tensor) -> Any:
        """Return the event at which all that is queued on the consumer's stream has read the memory from `allocate`."""
        stream = torch.cuda.current_stream(self.device)
        memory.record_stream(stream)
        return stream.record_event()

    def finish(self, event: Any) -> None:
        """Let the host wait for an event."""
        event.synchronize()

    def free_memory(self) -> int:
        """Return the free bytes of the device."""
        return torch.cuda.mem_get_info(self.device)[0]


class _Resident(NamedTuple):
    """An image on the device, as it was uploaded, but with the channels of a pixel side by side."""

    levels: list[Tensor]  # (h w, C) each, in the precision that its maps came in
    label: Tensor  # (1,)
    sizes: list[Size]


class _Block(NamedTuple):
    """The maps of some images, of one size at one level, in a buffer of bytes."""

    start: int
    shape: tuple[int, int, int, int]  # n, C, h, w
    dtype: torch.dtype
    channels_last: bool  # as caches have them; else the pixels of a channel lie side by side

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape) * self.dtype.itemsize

    def maps(self, buffer: Tensor) -> Tensor:
        """Return its memory as (n, C, h, w)."""
        n, channels, height, width = self.shape
        flat = buffer[self.start : self.end].view(self.dtype)
        if self.channels_last:
            return flat.view(n, height, width, channels).permute(0, 3, 1, 2)
        return flat.view(self.shape)


class _Staged(NamedTuple):
    """What of a part is on its way through the buffer."""

    part: DevicePart
    levels: list[list[tuple[Members, _Block]]]
    labels: _Block
    copied: Any  # the event of the end of the copy to the device


class DeviceFeed:
    """Feeds a GPU; see the top of this file.

    One part at a time is in the buffer, pinned and on the device. A part may be written there when the host knows that
    the copy of the one before has ended; its own copy begins when the device has read the one before.

    Images of a `Selection` stay on the device if all of its source fit into `RESIDENT_SHARE` of the memory that is free
    after the first step; that is judged by the images of the first batch. Where images have many sizes, some may be
    left over when that share is used up: they are copied each time.
    """

    runs_on = True

    def __init__(self, queue: DeviceQueue) -> None:
        self.queue = queue
        self._forget()

    def _forget(self) -> None:
        self._buffer: tuple[Tensor, Tensor] | None = None  # pinned, and on the device
        self._copied: Any = None  # the event of the last copy out of the pinned buffer
        self._read: Any = None  # the event at which the device has read its own
        self._staged: _Staged | None = None
        self.ahead: tuple[Any, Tensor, Draw, list[DevicePart]] | None = None  # images, ... of the next batch
        self._source: Any = None
        self._resident: dict[int, _Resident] = {}
        self._resident_bytes = 0
        self._budget: float | None = None  # bytes that may stay on the device; None: not decided yet

    def parts(
        self, images: Sequence[list[Tensor]], labels: Tensor, count: int, draw: Draw = EVERY_PIXEL
    ) -> list[DevicePart]:
        """Return images with their labels (n,), both on the CPU, as `count` parts, to be used in this order."""
        ahead, self.ahead = self.ahead, None
        if ahead is not None and ahead[0] is images and ahead[1] is labels:
            _, _, drawn_ahead, parts = ahead
            if (drawn_ahead, len(parts)) == (draw, count):
                return parts
        return self._new_parts(images, labels, count, draw)

    def prefetch(self, images: Sequence[list[Tensor]], labels: Tensor, count: int, draw: Draw = EVERY_PIXEL) -> None:
        """Bring the first part of the next batch on its way to the device; the next call of `parts` gets it."""
        parts = self._new_parts(images, labels, count, draw)
        self._stage(parts[0])
        self.ahead = images, labels, draw, parts

    def clear(self) -> None:
        """Give all memory back."""
        if self._copied is not None:
            self.queue.finish(self._copied)
        self._forget()

    def _new_parts(self, images: Sequence[list[Tensor]], labels: Tensor, count: int, draw: Draw) -> list[DevicePart]:
        numbers: Sequence[int | None] = [None] * len(images)
        taken: list[_Resident | list[Tensor]] = []
        if isinstance(images, Selection):
            self._decide(images.source)
            numbers = images.numbers
            taken += [self._resident.get(number) or images.kept(i) for i, number in enumerate(images.numbers)]
        else:
            taken += images
        return [DevicePart(self, taken[part], numbers[part], labels[part], draw) for part in bounds(len(images), count)]

    def _decide(self, source: Sequence[list[Tensor]]) -> None:
        """Decide how much may stay on the device, once for a training set: when its first images have been used."""
        if source is not self._source:
            self._source, self._resident, self._resident_bytes, self._budget = source, {}, 0, None
        if self._budget is None and self._resident:
            self._budget = RESIDENT_SHARE * (self.queue.free_memory() + self._resident_bytes)
            if self._resident_bytes / len(self._resident) * len(source) > self._budget:
                self._resident, self._resident_bytes, self._budget = {}, 0, 0.0

    @torch.no_grad()
    def _stage(self, part: DevicePart) -> None:
        """Write what of a part is not on the device yet into the buffer, and queue its copy."""
        maps = {i: image for i, image in enumerate(part.images) if not isinstance(image, _Resident)}
        if not maps:
            return
        end = 0

        def block(shape: tuple[int, int, int, int], dtype: torch.dtype, channels_last: bool = False) -> _Block:
            nonlocal end
            new = _Block(-(-end // ALIGNMENT) * ALIGNMENT, shape, dtype, channels_last)
            end = new.end
            return new

        levels: list[list[tuple[Members, _Block]]] = []
        for level, groups in enumerate(part.members):
            blocks = []
            for group in groups:
                if numbers := [i for i in group.numbers if i in maps]:
                    first = maps[numbers[0]][level]
                    dtype = first.dtype
                    for i in numbers:
                        dtype = torch.promote_types(dtype, maps[i][level].dtype)
                    shape = len(numbers), group.channels, group.height, group.width
                    channels_last = first.permute(1, 2, 0).is_contiguous()
                    blocks.append((group._replace(numbers=numbers), block(shape, dtype, channels_last)))
            levels.append(blocks)
        labels = block((len(maps), 1, 1, 1), torch.int64)
        if self._copied is not None:
            self.queue.finish(self._copied)
        if self._buffer is None or len(self._buffer[0]) < end:
            self._buffer, self._read = self.queue.allocate(end), None
        pinned, memory = self._buffer
        for level, level_blocks in enumerate(levels):
            for group, group_block in level_blocks:
                for target, i in zip(group_block.maps(pinned), group.numbers, strict=True):
                    target.copy_(maps[i][level])
        labels.maps(pinned).view(-1).copy_(part.labels[list(maps)])
        self._copied = self.queue.copy(memory[:end], pinned[:end], self._read)
        self._staged = _Staged(part, levels, labels, self._copied)

    def images_of(self, part: DevicePart) -> list[_Resident]:
        """Return the images of a part on the device. What comes from the buffer is valid until `release`."""
        if self._staged is None or self._staged.part is not part:
            self._stage(part)
        images: list[Any] = list(part.images)
        if self._staged is None or self._staged.part is not part:
            return images  # all of them are on the device already
        assert self._buffer is not None
        memory = self._buffer[1]
        self.queue.wait(self._staged.copied)
        staged = [i for i, image in enumerate(images) if not isinstance(image, _Resident)]
        labels = self._staged.labels.maps(memory).view(-1, 1)
        for label, i in zip(labels, staged, strict=True):
            images[i] = _Resident([], label, [_size(x) for x in images[i]])
        for blocks in self._staged.levels:
            for group, block in blocks:
                pixels = block.maps(memory).permute(0, 2, 3, 1).flatten(1, 2)  # (n, h w, C)
                for rows, i in zip(pixels, group.numbers, strict=True):
                    images[i].levels.append(rows)
        self._keep(part, staged, images)
        return images

    def _keep(self, part: DevicePart, staged: list[int], images: list[_Resident]) -> None:
        """Replace images in the buffer by copies that stay on the device, where these may stay."""
        size = sum(rows.nbytes for i in staged for rows in (*images[i].levels, images[i].label))
        if None in part.numbers or (self._budget is not None and self._resident_bytes + size > self._budget):
            return
        for i in staged:
            levels = [rows.clone(memory_format=torch.contiguous_format) for rows in images[i].levels]
            images[i] = _Resident(levels, images[i].label.clone(), images[i].sizes)
            self._resident[part.numbers[i]] = images[i]  # type: ignore[index]
        self._resident_bytes += size

    def release(self, part: DevicePart) -> None:
        """Let the buffer take another part, when what is queued on the consumer's stream has read this one."""
        if self._staged is not None and self._staged.part is part:
            assert self._buffer is not None
            self._read = self.queue.mark_read(self._buffer[1])
            self._staged = None


class DevicePart:
    """A part that `DeviceFeed` brings to the device."""

    def __init__(
        self,
        feed: DeviceFeed,
        images: Sequence[_Resident | list[Tensor]],
        numbers: Sequence[int | None],
        labels: Tensor,
        draw: Draw,
    ) -> None:
        self.feed, self.images, self.numbers, self.labels = feed, images, numbers, labels
        sizes = [
            image.sizes if isinstance(image, _Resident) else [_size(features) for features in image] for image in images
        ]
        self.members = members(sizes, draw)

    def batch(self) -> Batch:
        """Return it as a new batch, in float32 unless the maps are wider."""
        images = self.feed.images_of(self)
        batch: Batch = []
        for level, groups in enumerate(self.members):
            batch.append([])
            for group in groups:
                dtype = torch.float32
                for i in group.numbers:
                    dtype = torch.promote_types(dtype, images[i].levels[level].dtype)
                x = self.feed.queue.empty((group.pixels, group.channels), dtype)
                labels = self.feed.queue.empty((len(group.numbers),), torch.int64)
                drawn = group.drawn and Drawn(*(self.feed.queue.empty((len(i),), torch.int64) for i in group.drawn))
                batch[-1].append(Group(x, labels, group.height, group.width, drawn))
        self._write(images, batch)
        return batch

    def fill(self, batch: Batch) -> None:
        """Overwrite a batch of the same shapes with it."""
        self._write(self.feed.images_of(self), batch)

    def _write(self, images: list[_Resident], batch: Batch) -> None:
        for level, (groups, targets) in enumerate(zip(self.members, batch, strict=True)):
            for group, target in zip(groups, targets, strict=True):
                pixels = [images[i].levels[level] for i in group.numbers]
                if group.drawn and target.drawn:
                    for indices, own_indices in zip(target.drawn, group.drawn, strict=True):
                        indices.copy_(self.feed.queue.upload(own_indices))
                    pixels = [target.drawn.of(rows.view(group.height, group.width, -1)) for rows in pixels]
                torch.cat(pixels, out=target.x)
                torch.cat([images[i].label for i in group.numbers], out=target.labels)
        self.feed.release(self)
