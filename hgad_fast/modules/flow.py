"""The conditional normalizing flow of one feature level: x (N, C) -> z (N, C) and its log-determinant."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import Block, Blocks, SeparablePosition

OFFICIAL_NAMES = {
    "global_scale": "global_scale",
    "global_offset": "global_offset",
    "w_perm": "w_perm",
    "subnet.0.weight": "w1",
    "subnet.0.bias": "b1",
    "subnet.2.weight": "w2",
    "subnet.2.bias": "b2",
}
"""The entries of a block in a state dict, those of its subnet last, and the fields of `ops.Block` that they hold."""
FEW_PRODUCTS = 2**22  # of a dense code with a flow's weights: a CPU does them in the time that recognising it takes
INVERSE = "w_perm_inv"  # one more entry: the transposed rotation, whose values are not read from a state dict


def _initial_block(channels: int, position_dim: int) -> Block:
    """Return a block initialised as in the official code: PyTorch's linear layers, gain 1, a random rotation."""
    half = channels // 2
    width = channels - half + position_dim
    first, last = nn.Linear(width, 2 * width), nn.Linear(2 * width, 2 * half)
    return Block(
        w1=first.weight.detach(),
        b1=first.bias.detach(),
        w2=last.weight.detach(),
        b2=last.bias.detach(),
        global_scale=torch.full((1, channels), 2 * math.log(math.exp(5) - 1)),  # gain = 0.1 softplus (beta 0.5) = 1
        global_offset=torch.zeros(1, channels),
        w_perm=_random_rotation(channels),
    )


def _random_rotation(channels: int) -> Tensor:
    """Return a uniform draw from SO(C): Q of a Gaussian matrix's QR, made unique by diag(R) > 0, with determinant 1."""
    draws = torch.randn(channels, channels, dtype=torch.float64)
    if draws.is_meta:  # shapes alone are wanted; of decompositions torch has them after importing its compiler
        return draws.float()
    q, r = torch.linalg.qr(draws)
    q *= r.diagonal().sign()
    q[:, 0] *= torch.linalg.det(q).sign()
    return q.float()


class ConditionalFlow(nn.Module):
    """L coupling blocks, conditioned on the pixel's position (HGAD, section 3.1; FrEIA's all-in-one block).

    The parameters are those of `ops.Blocks`, stacked over the blocks. The state dict has the official names, block by
    block (``module_list.{k}.subnet.0.weight``, ...), so that this class and the official code read each other's
    checkpoints.

    Args:
        channels: C of the level's features.
        coupling_layers: L.
        position_dim: P of the positional code; 0 makes the flow unconditional.
        clamp: bound of the log-scales.

    Attributes:
        memory, checkpoint_every, precision: see `ops.flow`; may be set at any time.
    """

    w_perm: Tensor

    def __init__(self, channels: int, coupling_layers: int, position_dim: int, clamp: float = 1.9) -> None:
        super().__init__()
        self.channels = channels
        self.position_dim = position_dim
        self.clamp = clamp
        self.memory = "auto"
        self.checkpoint_every = 0
        self.precision = "fp32"
        first = _initial_block(channels, position_dim)
        if first.w1.is_meta:  # shapes alone are wanted
            blocks = Blocks._make(tensor.new_empty(coupling_layers, *tensor.shape) for tensor in first)
        else:
            others = (_initial_block(channels, position_dim) for _ in range(coupling_layers - 1))
            blocks = Blocks.stack([first, *others])
        *trained, w_perm = blocks
        self.w1, self.b1, self.w2, self.b2, self.global_scale, self.global_offset = map(nn.Parameter, trained)
        self.register_buffer("w_perm", w_perm)

    @property
    def blocks(self) -> Blocks:
        """The parameters of all blocks, as the operations take them."""
        return Blocks._make(getattr(self, name) for name in Blocks._fields)

    def forward(
        self, x: Tensor, condition: ops.Position | list[Tensor] = None, rev: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return z (N, C) and log|det dz/dx| (N,), or with `rev` x and log|det dx/dz|.

        Args:
            x: (N, C), row-major over (image, row, column); z with `rev`. Half precision, as autocast makes features, is
                computed in float32.
            condition: a `SeparablePosition`, a dense code (N, P), or as in the official code a list [code (N, P)]. A
                dense code that is the sinusoidal grid of a feature map (within 1e-6) is recognised, and computed as
                cheaply as a `SeparablePosition`; any other code is used as it is, and on a CPU that of few pixels.
            rev: run the flow backwards.
        """
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        position = self._given(condition)
        if isinstance(position, Tensor) and (position.is_cuda or position.numel() * self.b1.numel() >= FEW_PRODUCTS):
            position = recognise_position(position) or position
        memory = self.memory
        if memory == "auto":
            memory = "reversible" if x.is_cuda else "standard"
        return ops.flow(
            x,
            self.blocks,
            position,
            clamp=self.clamp,
            inverse=rev,
            memory=memory,
            checkpoint_every=self.checkpoint_every,
            precision=self.precision,
        )

    def position(self, condition: ops.Position | list[Tensor]) -> ops.Position:
        """Return a condition as a `SeparablePosition` if it is one; None where it is None or the flow unconditional."""
        position = self._given(condition)
        return (recognise_position(position) or position) if isinstance(position, Tensor) else position

    def _given(self, condition: ops.Position | list[Tensor]) -> ops.Position:
        """Return a condition without the list around it; None for a dense code of an unconditional flow."""
        if isinstance(condition, SeparablePosition):
            return condition
        if isinstance(condition, (list, tuple)):
            condition = condition[0] if condition else None
        return condition if self.position_dim else None

    def grid(self, h: int, w: int, device: torch.device | None = None) -> SeparablePosition | None:
        """Return the positions of an h x w map; None where the flow is unconditional."""
        return sinusoidal_position(h, w, self.position_dim, device, self.w1.dtype) if self.position_dim else None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, tensor in official_names(self.blocks).items():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        expected = {prefix + name: tensor for name, tensor in official_names(self.blocks).items()}
        fitting = {}
        for name, own in expected.items():
            saved = state_dict.get(name)
            if saved is None:
                if strict:
                    missing_keys.append(name)
            elif not isinstance(saved, Tensor):
                error_msgs.append(f"{name} is of type {type(saved).__name__}; it must be a tensor")
            elif saved.shape != own.shape:
                error_msgs.append(
                    f"size mismatch for {name}: the shape in the state is {tuple(saved.shape)}, "
                    f"and {tuple(own.shape)} in this model"
                )
            else:
                fitting[name] = saved
        if strict:
            unexpected_keys += [name for name in state_dict if name.startswith(prefix) and name not in expected]
        with torch.no_grad():
            if local_metadata.get("assign_to_params_buffers") and len(fitting) == len(expected):
                self._take({name.removeprefix(prefix): saved for name, saved in fitting.items()})
                return
            for name, saved in fitting.items():
                if not name.endswith(INVERSE):
                    expected[name].copy_(saved)  # a view of the stacked parameter

    def _take(self, state: Mapping[str, Tensor]) -> None:
        """Replace the parameters by those of a whole state: on its device and in its dtype, as `assign=True` asks."""
        for official, field in OFFICIAL_NAMES.items():
            stacked = torch.stack([state[f"module_list.{k}.{official}"] for k in range(len(self.w1))])
            own = getattr(self, field)
            if isinstance(own, nn.Parameter):
                setattr(self, field, nn.Parameter(stacked, requires_grad=own.requires_grad))
            else:
                setattr(self, field, stacked.mT.contiguous().mT)  # the layout of `Blocks.stack`


def official_names(blocks: Blocks) -> dict[str, Tensor]:
    """Return the entries of a flow's state dict under their official names, as views of the stacked parameters."""
    state = {}
    for k in range(len(blocks.w1)):
        for official, field in OFFICIAL_NAMES.items():
            state[f"module_list.{k}.{official}"] = getattr(blocks, field)[k]
        state[f"module_list.{k}.{INVERSE}"] = blocks.w_perm[k].mT
    return state


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # what scoring asks for first is kept, and a training saves it for its backward pass
def sinusoidal_position(
    h: int, w: int, dim: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> SeparablePosition:
    """Return the 2-D sinusoidal code of an h x w map: sines and cosines of the column, then of the row.

    With D = dim / 2, channel 2i of a half is sin(p f_i) and channel 2i + 1 cos(p f_i), f_i = 1e4^(-2i / D).
    """
    half = dim // 2
    frequency = torch.exp(torch.arange(0.0, half, 2, device=device) * -(math.log(1e4) / half))

    def code(length: int) -> Tensor:
        angle = torch.arange(float(length), device=device)[:, None] * frequency
        return torch.stack([angle.sin(), angle.cos()], -1).flatten(1).to(dtype)

    return SeparablePosition(column=code(w), row=code(h))


def dense_position(position: SeparablePosition, batch: int = 1) -> Tensor:
    """Return the code of every pixel of `batch` maps, (batch h w, P)."""
    (w, half), h = position.column.shape, position.row.shape[0]
    grid = torch.cat([position.column.expand(h, w, half), position.row[:, None].expand(h, w, half)], -1)
    return grid.flatten(0, 1).repeat(batch, 1)


def recognise_position(dense: Tensor, tolerance: float = 1e-6) -> SeparablePosition | None:
    """Return the separable form of a dense code (N, P) if it is the sinusoidal grid of maps of one size, else None.

    Every value must lie within the tolerance of the grid's. A code that requires a gradient is never recognised.
    """
    n, dim = dense.shape
    if n == 0 or dim == 0 or dim % 4 or dense.requires_grad:
        return None
    half = dim // 2
    # The first channel of a half is the sine of the column or row in radians, which of whole numbers (below 1e6) is
    # zero for 0 alone: N / w pixels lie in a first column and N / h in a first row.
    in_first_column, in_first_row = (dense[:, ::half].abs() <= tolerance).sum(0).tolist()
    if not in_first_column or not in_first_row or n % in_first_column or n % in_first_row:
        return None
    h, w = n // in_first_row, n // in_first_column
    if n % (h * w):
        return None
    position = sinusoidal_position(h, w, dim, dense.device, dense.dtype)
    difference = dense.view(-1, h, w, dim).clone()
    difference[..., :half].sub_(position.column)
    difference[..., half:].sub_(position.row[:, None])
    return position if difference.abs_().amax() <= tolerance else None
