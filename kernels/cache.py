"""What is made of parameters once, and kept while they do not change: packed weights, positions, centres."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

Made = TypeVar("Made")
WHOLE = 2**13  # values of a tensor up to which all are compared
SAMPLED = 64  # of a larger one, one of so many values of each row


class _Kept(NamedTuple):
    """What was made of some tensors."""

    references: list[weakref.ref[Tensor]]
    storages: list[StorageWeakRef]
    samples: list[Tensor]
    made: Any

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether these are the tensors, unchanged."""
        same = all(reference() is t for reference, t in zip(self.references, tensors, strict=True))
        return same and all(map(torch.equal, self.samples, _samples(tensors)))


def _samples(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of some values of each tensor; none of a GPU's, for which the host would have to wait."""
    chosen = [t.detach() for t in tensors if t.device.type == "cpu"]
    return [t[..., ::SAMPLED].clone() if t.numel() > WHOLE else t.clone() for t in chosen]


class Cache:
    """What was last made of some tensors, for as long as they live unchanged."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._lock = threading.Lock()
        self._kept: OrderedDict[Any, _Kept] = OrderedDict()
        self._emptied = 0

    def get(self, make: Callable[[], Made], kind: tuple[Any, ...], tensors: Sequence[Tensor]) -> Made:
        """Return what `make` makes of the tensors, made anew if one is another one or was written to since.

        Nothing is kept while a CUDA graph is recorded, which has to make it at each replay, nor of tensors that do not
        count their changes (those of inference mode). Writes through `tensor.data`, or by a recorded graph, are not
        counted either; a new `tensor.data` is seen by its memory, whose place no other takes while it is referred to.
        On a CPU a sample of each row's values is compared, too: what is written to a tensor or to rows of it, as
        averages of weights or the centres of a class are, is seen whatever the way. A few single values may not be.
        """
        recording = tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()
        if recording or any(type(t) not in _PLAIN or t.is_inference() for t in tensors):
            return make()
        references = [weakref.ref(t) for t in tensors]
        storages = [StorageWeakRef(t.untyped_storage()) for t in tensors]
        key = (
            kind,
            _stream(tensors[0].device),
            *((id(t), t._version, t.data_ptr(), s.cdata) for t, s in zip(tensors, storages, strict=True)),
        )
        with self._lock:
            emptied = self._emptied
            found = self._kept.pop(key, None)
            if found and found.is_of(tensors):
                self._kept[key] = found
                return found.made
        samples = _samples(tensors)
        made = make()
        with self._lock:
            if emptied == self._emptied:  # else a tensor may have been written to meanwhile
                self._kept[key] = _Kept(references, storages, samples, made)
            for other, kept in list(self._kept.items()):  # what nobody can ask for again
                if any(reference() is None for reference in kept.references):
                    del self._kept[other]
            while len(self._kept) > self.size:
                self._kept.popitem(last=False)
        return made

    def empty(self) -> None:
        """Forget everything."""
        with self._lock:
            self._kept.clear()
            self._emptied += 1


def _stream(device: torch.device) -> int | None:
    """Return the stream on which something is made: on another one, it might not be ready."""
    is_running = device.type == "cuda" and torch.cuda.is_initialized()
    return torch.cuda.current_stream(device).cuda_stream if is_running else None


_PLAIN = (Tensor, torch.nn.Parameter)  # subclasses may have no memory, or keep their values elsewhere
PACKED = Cache(size=32)  # the levels of a few models, and maps of a few sizes
register_optimizer_step_post_hook(lambda *_: PACKED.empty())  # torch does not count what fused optimizers write
