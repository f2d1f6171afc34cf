"""Stand-ins for a GPU: torch.cuda that runs nothing and records what is asked of it, and a queue that copies late."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hgad_fast.training import step


class FakeCuda:
    """The streams, events and graphs of two GPUs; `calls` has what was asked for, in order, each with its device."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.device = 0
        self.current: dict[int, Any] = {0: "default 0", 1: "default 1"}
        self.streams = self.pools = 0

    def names(self) -> dict[str, Any]:
        """Return the stand-ins by the names that they have in torch.cuda."""
        return {
            "CUDAGraph": self.graph_class,
            "Stream": self.stream_class,
            "current_device": lambda: self.device,
            "current_stream": lambda device=None: self.stream_of(self.index(device)),
            "device": self.on_device,
            "graph": self.recording,
            "graph_pool_handle": self.pool,
            "mem_get_info": lambda device: self.note("mem_get_info", str(device)) or (300, 1000),
            "set_device": lambda device: self.note("set_device", str(device)),
            "stream": self.on_stream,
            "synchronize": lambda device=None: self.note("synchronize", self.index(device)),
        }

    def note(self, *call: Any) -> None:
        self.calls.append(call)

    def index(self, device: Any) -> int:
        return self.device if device is None else torch.device(device).index

    @contextmanager
    def on_device(self, device: Any) -> Iterator[None]:
        before, self.device = self.device, self.index(device)
        yield
        self.device = before

    def stream_class(self) -> SimpleNamespace:
        self.streams += 1
        self.note("new stream", self.device)
        return self.stream_named(f"side {self.device}", self.device)

    def stream_of(self, device: int) -> SimpleNamespace:
        return self.stream_named(self.current[device], device)

    def stream_named(self, name: str, device: int) -> SimpleNamespace:
        def record_event() -> SimpleNamespace:
            self.note("event", name)
            return SimpleNamespace(name=name, synchronize=lambda: self.note("host waits", name))

        return SimpleNamespace(
            name=name,
            index=device,
            record_event=record_event,
            wait_event=lambda event: self.note("wait", name, event.name),
            wait_stream=lambda other: self.note("wait", name, other.name),
        )

    @contextmanager
    def on_stream(self, stream: Any) -> Iterator[None]:
        before, self.current[stream.index] = self.current[stream.index], stream.name
        with self.on_device(torch.device("cuda", stream.index)):
            yield
        self.current[stream.index] = before

    def graph_class(self) -> SimpleNamespace:
        self.note("new graph", self.device)
        return SimpleNamespace(replay=lambda: self.note("replay", self.device))

    @contextmanager
    def recording(self, graph: Any, pool: Any = None, stream: Any = None) -> Iterator[None]:
        self.note("record", pool, stream.name)
        with self.on_stream(stream):
            yield

    def pool(self) -> str:
        self.pools += 1
        return f"pool {self.pools}"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Return the recorder; torch.cuda asks it as long as the test runs."""
    fake = FakeCuda()
    for name, stand_in in fake.names().items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(step, "_side_streams", {})
    return fake


class LateQueue:
    """A device's queue that copies as late as it may: when something waits for the copy.

    It fails where memory is overwritten that is still to be copied or read. The device's is full of NaN before it is
    copied to, and again when it has been read, so that what is used too early or too late shows. `calls` has what was
    asked for, in order; an event is known by its number.
    """

    def __init__(self, free: int = 10**9) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.free, self.events = free, 0
        self.read: int | None = None  # the event at which the device's memory was read last
        self.pending: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # target, source, and what the source had then

    def event(self) -> int:
        self.events += 1
        return self.events

    def named(self, name: str) -> list[tuple[Any, ...]]:
        """Return the calls of this name."""
        return [call for call in self.calls if call[0] == name]

    def allocate(self, size: int) -> tuple[Tensor, Tensor]:
        self.calls.append(("allocate", size))
        self.read = None
        return torch.full((size,), 255, dtype=torch.uint8), torch.full((size,), 255, dtype=torch.uint8)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def upload(self, values: Tensor) -> Tensor:
        return values.clone()

    def copy(self, target: Tensor, source: Tensor, after: int | None) -> int:
        assert after == self.read, "a copy may overwrite what the device has not read yet"
        event = self.event()
        self.calls.append(("copy", len(source), after, event))
        self.pending[event] = target, source, source.clone()
        return event

    def reach(self, event: int) -> None:
        """Do the copies up to an event."""
        for earlier in [number for number in self.pending if number <= event]:
            target, source, queued = self.pending.pop(earlier)
            assert torch.equal(source, queued), "pinned memory was overwritten before it was copied"
            target.copy_(source)

    def wait(self, event: int) -> None:
        self.calls.append(("wait", event))
        self.reach(event)

    def finish(self, event: int) -> None:
        self.calls.append(("finish", event))
        self.reach(event)

    def mark_read(self, memory: Tensor) -> int:
        memory.fill_(255)
        self.read = self.event()
        self.calls.append(("read", self.read))
        return self.read

    def free_memory(self) -> int:
        self.calls.append(("free memory",))
        return self.free


@pytest.fixture
def queue() -> LateQueue:
    return LateQueue()
