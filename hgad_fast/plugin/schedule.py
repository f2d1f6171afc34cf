"""The schedule of a method in a training by lightning, whose epochs are passes over the images."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from ..models.detector import Detector
from ..protocol import Progress


def passes_of(config: Any) -> int:
    """Return how many passes over the images a configuration asks for."""
    return config.meta_epochs * config.sub_epochs


def scheduled(asked: Any, passes: int) -> dict[str, int]:
    """Return the fields of the schedule of a configuration, changed for another number of passes.

    There are at most as many meta-epochs as it asks for, each of as few passes as that allows.
    """
    sub_epochs = math.ceil(passes / min(passes, asked.meta_epochs))
    return {"meta_epochs": math.ceil(passes / sub_epochs), "sub_epochs": sub_epochs}


def progress_at(config: Any, number: int, batch: int, batches: int) -> Progress:
    """Return the progress at a batch of `batches` in the pass of a number, from 0."""
    meta_epoch, sub_epoch = divmod(number, config.sub_epochs)
    return Progress(meta_epoch, sub_epoch, batch, batches)


class MethodSchedule(LRScheduler):
    """The learning rates of a method, step by step.

    Args:
        optimizer: whose rates are set.
        detector: of the method; its configuration has the numbers of meta-epochs and sub-epochs.
        steps: in a pass.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, detector: Detector, steps: int) -> None:
        self._detector, self._steps = detector, steps
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Return the rate of the next step, the same for all groups of parameters."""
        number, batch = divmod(self.last_epoch, self._steps)
        _, rate = self._detector.schedule(progress_at(self._detector.config, number, batch, self._steps))
        return [rate for _ in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return the number of the step, as plain data."""
        return {"last_epoch": self.last_epoch, "_step_count": self._step_count}
