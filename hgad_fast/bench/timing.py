"""Time and memory of a piece of work."""

from __future__ import annotations

import gc
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch


def alternate(contenders: Sequence[Callable[[], object]], rounds: int, device: torch.device) -> np.ndarray:
    """Return seconds (contender, round), NaN if out of memory; they take turns, each round starting with the next."""
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
    """Return the wall-clock time of the work until the device has finished it."""
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
    """Return the bytes of tensors alive at the worst moment of the work, beyond those alive before it.

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
    """Return the bytes of this process's anonymous memory at the worst moment of the work, beyond those before (Linux).

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
    """Return the resident memory of this process that no file backs.

    Raises:
        OSError: this system does not tell (Linux does).
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status names no RssAnon: this needs Linux 4.5 or later")


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Silence the profiler's library, which reports its start and missing GPUs past Python's streams."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as sink:
            os.dup2(sink.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
