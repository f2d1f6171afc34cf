"""Weights stored in half precision, and computed with in float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

SMALLEST = 1024  # numbers of a tensor that is worth it, and no exporter folds
FINITE = torch.finfo(torch.float16).max


class _Half(nn.Module):
    """float16 in memory, float32 for all who ask."""

    def forward(self, stored: Tensor) -> Tensor:
        """Return the weights in float32."""
        return stored.float()


def halved(graph: nn.Module) -> None:
    """Store the float32 weights of a graph in float16, in place, but for small ones and those beyond its range."""
    for module in list(graph.modules()):
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in tensors:
            fits = tensor.dtype == torch.float32 and tensor.numel() >= SMALLEST and float(tensor.abs().max()) <= FINITE
            if fits:
                delattr(module, name)
                module.register_buffer(name, tensor.detach().half())
                parametrize.register_parametrization(module, name, _Half(), unsafe=True)
