"""The conditional normalizing flow of one feature level: x (N, C) -> z (N, C) and its log-determinant."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .ops import SeparablePosition


class CouplingBlock(nn.Module):
    """Parameters of one block: a subnet, a global scale and offset, and a fixed random rotation.

    The names are those of the official checkpoints. `ops.flow` computes with them.
    """

    w_perm: Tensor

    def __init__(self, channels: int, position_dim: int) -> None:
        super().__init__()
        half = channels // 2
        width = channels - half + position_dim
        self.subnet = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, 2 * half))
        unit_gain = 2 * math.log(math.exp(5) - 1)  # 0.1 softplus(unit_gain) = 1 at sharpness 0.5
        self.global_scale = nn.Parameter(torch.full((1, channels), unit_gain))
        self.global_offset = nn.Parameter(torch.zeros(1, channels))
        rotation = _random_rotation(channels)
        self.register_buffer("w_perm", rotation)
        self.register_buffer("w_perm_inv", rotation.T.contiguous())

    def parameters_for_ops(self) -> ops.Block:
        first: Any = self.subnet[0]
        last: Any = self.subnet[2]
        return ops.Block(
            first.weight,
            first.bias,
            last.weight,
            last.bias,
            self.global_scale,
            self.global_offset,
            self.w_perm,
        )


def _random_rotation(channels: int) -> Tensor:
    """Uniformly distributed over SO(C): QR of a Gaussian matrix with a positive diagonal, determinant made 1."""
    q, r = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))
    q *= r.diagonal().sign()
    if torch.linalg.det(q) < 0:
        q[:, 0] *= -1
    return q.float()


class ConditionalFlow(nn.Module):
    """L coupling blocks, conditioned on the pixel's position (HGAD, section 3.1; FrEIA's all-in-one block).

    Args:
        channels: C of the level's features.
        coupling_layers: L.
        position_dim: P of the positional code, 0 for an unconditional flow.
        clamp: bound of the log-scales.

    Attributes:
        memory, checkpoint_every, precision: see `ops.flow`; may be set at any time.
    """

    def __init__(self, channels: int, coupling_layers: int, position_dim: int, clamp: float = 1.9) -> None:
        super().__init__()
        self.channels = channels
        self.position_dim = position_dim
        self.clamp = clamp
        self.memory = "auto"
        self.checkpoint_every = 0
        self.precision = "fp32"
        self.module_list = nn.ModuleList(CouplingBlock(channels, position_dim) for _ in range(coupling_layers))

    def forward(
        self, x: Tensor, condition: ops.Position | list[Tensor] = None, rev: bool = False
    ) -> tuple[Tensor, Tensor]:
        """z and log|det dz/dx|, or with `rev` x and log|det dx/dz|.

        Args:
            x: (N, C), row-major over (image, row, column).
            condition: a `SeparablePosition`, a dense code (N, P) or the official [code (N, P)]. A dense code that is
                the sinusoidal grid of a feature map (within 1e-6) is recognised and costs nothing; any other content
                is honoured as it is.
            rev: run the flow backwards.
        """
        return ops.flow(
            x,
            [block.parameters_for_ops() for block in self.module_list],  # type: ignore[operator]
            self.position(condition),
            clamp=self.clamp,
            inverse=rev,
            memory=self._resolve_memory(x),
            checkpoint_every=self.checkpoint_every,
            precision=self.precision,
        )

    def position(self, condition: ops.Position | list[Tensor]) -> ops.Position:
        """The condition in the cheapest form that is equal to it."""
        if isinstance(condition, SeparablePosition):
            return condition
        if isinstance(condition, (list, tuple)):
            condition = condition[0] if condition else None
        if condition is None or not self.position_dim:
            return None
        return recognise_position(condition) or condition

    def grid(self, h: int, w: int, device: torch.device | None = None) -> SeparablePosition | None:
        """The positions of an h x w map; None where the flow is unconditional."""
        return sinusoidal_position(h, w, self.position_dim, device) if self.position_dim else None

    def _resolve_memory(self, x: Tensor) -> str:
        if self.memory == "auto":
            return "reversible" if x.is_cuda else "standard"
        return self.memory


@functools.lru_cache(maxsize=64)
def sinusoidal_position(
    h: int, w: int, dim: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> SeparablePosition:
    """The 2-D sinusoidal code of an h x w map: sines and cosines of the column, then of the row.

    With D = dim / 2, channel 2i of a half is sin(p f_i) and channel 2i + 1 cos(p f_i), f_i = 1e4^(-2i / D).
    """
    half = dim // 2
    frequency = torch.exp(torch.arange(0.0, half, 2, device=device) * -(math.log(1e4) / half))

    def code(length: int) -> Tensor:
        angle = torch.arange(float(length), device=device)[:, None] * frequency
        return torch.stack([angle.sin(), angle.cos()], -1).flatten(1).to(dtype)

    return SeparablePosition(column=code(w), row=code(h))


def dense_position(position: SeparablePosition, batch: int = 1) -> Tensor:
    """The code of every pixel, shape (batch h w, P)."""
    (w, half), h = position.column.shape, position.row.shape[0]
    grid = torch.cat([position.column.expand(h, w, half), position.row[:, None].expand(h, w, half)], -1)
    return grid.flatten(0, 1).repeat(batch, 1)


def recognise_position(dense: Tensor, tolerance: float = 1e-6) -> SeparablePosition | None:
    """The separable form of a dense code (N, P) if it is the sinusoidal grid of equal maps, else None.

    Height and width are read off the code: the column's half returns to its start after w pixels, the row's after h
    rows. A code that wants a gradient is left alone.
    """
    n, dim = dense.shape
    if n == 0 or dim % 4 or dense.requires_grad:
        return None
    w = _period(dense[:, : dim // 2], tolerance)
    if n % w:
        return None
    h = _period(dense[::w, dim // 2 :], tolerance)
    if n % (h * w):
        return None
    position = sinusoidal_position(h, w, dim, dense.device, dense.dtype)
    maps = dense.view(-1, h, w, dim)
    columns, rows = maps[..., : dim // 2] - position.column, maps[..., dim // 2 :] - position.row[:, None]
    return position if max(columns.abs().max(), rows.abs().max()) <= tolerance else None


def _period(code: Tensor, tolerance: float) -> int:
    """Index at which the code first returns to its start; its length if it never does."""
    returns = ((code[1:] - code[0]).abs().amax(1) <= tolerance).nonzero()
    return int(returns[0]) + 1 if len(returns) else len(code)
