"""The processes that train one model together: what they tell each other, and how long one waits for another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ANSWER_WITHIN = timedelta(seconds=45)  # in a step, where all do the same work at the same time
PATIENCE = timedelta(days=7)  # between passes, where the first process may write, calibrate or run callbacks


class LostProcessError(RuntimeError):
    """Another process of this training ended, or did not answer in time."""


@dataclass(frozen=True)
class Processes:
    """This process among those that train together. The first one shows, writes and calibrates for all."""

    rank: int = 0
    count: int = 1
    patient: Any = None  # a group of all, for what may take its time; on the CPU, so that a GPU's queue goes on

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes, in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def from_first(self, value: Any) -> Any:
        """What the first process passed; the others' is ignored."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.patient)
        return values[0]

    def wait(self) -> None:
        """Until all are here, however long that takes; one that ends meanwhile is noticed."""
        if self.count > 1:
            dist.barrier(group=self.patient)


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """Those of `torch.distributed` where it is initialised, those that torchrun started, or this process alone.

    torchrun's are known by the environment variables RANK and WORLD_SIZE; for them the process group (NCCL for a model
    on a GPU, else Gloo) is made here, and destroyed in the end.

    Raises:
        LostProcessError: another process ended or hangs. Gloo tells of one that ended at once; one that hangs is given
            `ANSWER_WITHIN` in a step (with a process group of the caller's, that group's own time).
    """
    theirs = dist.is_available() and dist.is_initialized()
    count = dist.get_world_size() if theirs else int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if count == 1 or not dist.is_available():
        yield Processes()
        return
    try:
        if not theirs:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=ANSWER_WITHIN)
        yield Processes(dist.get_rank(), count, dist.new_group(backend="gloo", timeout=PATIENCE))
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        raise LostProcessError(
            f"one of the {count} processes of this training ended, or did not answer for {ANSWER_WITHIN.seconds} s; "
            f"its own output says why. Go on from the last checkpoint with resume. ({error})"
        ) from error
    finally:
        if not theirs and dist.is_initialized():
            dist.destroy_process_group()


def _is_lost_connection(error: RuntimeError) -> bool:
    """Gloo's errors have no class of their own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
