"""Processes that train one model together: what they exchange, and how long each waits for the others."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ANSWER_WITHIN = timedelta(seconds=45)  # longest wait in a step, where all do the same work at the same time
PATIENCE = timedelta(days=7)  # and between passes, where the first process may write, calibrate or run callbacks


class LostProcessError(RuntimeError):
    """Another process of this training ended, or did not answer in time."""


@dataclass(frozen=True)
class Processes:
    """This process among those that train together. The first one shows progress, writes and calibrates for all."""

    rank: int = 0
    count: int = 1
    patient: Any = None  # a process group of all with a long timeout; on the CPU, so that a GPU's queue goes on

    @property
    def is_first(self) -> bool:
        """True for the process of rank 0, also where it trains alone."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum values over the processes, in place, and return them."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def from_first(self, value: Any) -> Any:
        """Return the value that the first process passed; those of the others are ignored."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.patient)
        return values[0]

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors, in place, by those that the first process has."""
        if self.count > 1:
            self.wait()  # one may have more to do before this
            with torch.no_grad():
                for tensor in tensors:
                    value = tensor.contiguous()
                    dist.broadcast(value, src=0)
                    tensor.copy_(value)

    def wait(self) -> None:
        """Wait until all processes get here, however long that takes; if one ends meanwhile, an error is raised."""
        if self.count > 1:
            dist.barrier(group=self.patient)


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """Yield the processes of `torch.distributed` where it is initialised, those of torchrun, or this process alone.

    Processes that torchrun started have the environment variables RANK and WORLD_SIZE; for them the process group (NCCL
    for a model on a GPU, else Gloo) is made here, and destroyed in the end. Where several processes train together on
    GPUs, the model's device becomes the current one of its process, and remains it: NCCL works on that.

    Raises:
        LostProcessError: another process ended or hangs. Gloo reports at once that a process ended; one that hangs is
            given `ANSWER_WITHIN` in a step (with a process group of the caller's, that group's own timeout).
    """
    callers_group = dist.is_available() and dist.is_initialized()
    if callers_group:
        count = dist.get_world_size()
    else:
        count = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if count == 1 or not dist.is_available():
        yield Processes()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        if not callers_group:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=ANSWER_WITHIN)
        yield Processes(dist.get_rank(), count, dist.new_group(backend="gloo", timeout=PATIENCE))
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():  # Gloo's have no class
            raise
        raise LostProcessError(
            f"one of the {count} processes of this training ended, or did not answer for {ANSWER_WITHIN.seconds} s; "
            f"its own output says why. Go on from the last checkpoint with resume. ({error})"
        ) from error
    finally:
        if not callers_group and dist.is_initialized():
            dist.destroy_process_group()
