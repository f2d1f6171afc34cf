"""Statistics over the batches of all processes that train together: sums with gradients, and batch normalization."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

_exchanging: ContextVar[bool] = ContextVar("exchanging", default=False)


@contextmanager
def exchanging() -> Iterator[None]:
    """Let what is computed in this context use statistics over all processes, where there are several.

    All of them must do the same in it. Outside, each process is by itself, as in scoring.
    """
    token = _exchanging.set(True)
    try:
        yield
    finally:
        _exchanging.reset(token)


def process_count() -> int:
    """Return how many processes exchange statistics in the current context; 1 outside of `exchanging`."""
    return dist.get_world_size() if _exchanging.get() and dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """Return the number of this process among those of `process_count`."""
    return dist.get_rank() if process_count() > 1 else 0


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def summed(x: Tensor) -> Tensor:
    """Return the sum of a tensor over the processes, differentiable: the gradient is the sum of all gradients."""
    return _Sum.apply(x) if process_count() > 1 else x


class BatchNorm(_BatchNorm):
    """Batch normalization (Ioffe and Szegedy, 2015) of (B, C) or (B, C, h, w), over the batches of all processes.

    In one process it is that of torch; `torch.nn.SyncBatchNorm` does the same for several, but on GPUs alone. The state
    dict is that of torch's modules.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 4):
            raise ValueError(f"batch normalization takes (B, C) or (B, C, h, w), and not {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised tensor; in training mode with the statistics of the batch, which are noted."""
        if not self.training or process_count() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        axes = [axis for axis in range(input.dim()) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(input.dim())]
        own_count = input.numel() // input.shape[1]
        total = summed(torch.cat([input.sum(axes), input.new_tensor([float(own_count)])]))
        count = total[-1].detach()
        mean = total[:-1] / count
        centred = input - mean.view(shape)
        variance = summed(centred.square().sum(axes)) / count
        with torch.no_grad():
            assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        normalised = centred * torch.rsqrt(variance + self.eps).view(shape)
        return normalised * self.weight.view(shape) + self.bias.view(shape)
