"""What the kernels share: the launch, the choices by architecture, and small pieces of arithmetic.

Every kernel is started by `launch`, with keyword arguments. A parameter `X_STRIDE` is the row stride of the tensor
given as `x_ptr`, and `launch` fills it in. A tensor without such a parameter, or `x_strides`, has to be contiguous.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter multiplies float32 only
HIP = bool(torch.version.hip)
FLOAT32 = "ieee" if HIP or triton.knobs.runtime.interpret else "tf32x3"
"""How a product on tensor cores has the accuracy of float32; AMD multiplies float32 as it is."""
FENCED = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)
"""Whether Triton separates asynchronous copies to shared memory from the matrix instructions that read them.

Releases up to 3.6, and some of 3.7, leave the fence out (triton-lang/triton issue 9610). There, a loop on Hopper or
Blackwell that copies operands through pointers is not pipelined: they pass through registers, and these stores are
fenced. Tiles that the memory accelerator copies (`tile`) need no fence.
"""


class Tile(NamedTuple):
    """The pixels and warps of a program, and the stages of its loops: how many iterations ahead loads are started."""

    pixels: int
    warps: int
    stages: int


# Tiles by kernel and architecture; what is not named here takes "other", consumer cards among them, which have 99 KB of
# shared memory a multiprocessor. 16 pixels a warp are what a matrix instruction of a warp takes on all of them; more
# warps read the weights fewer times, and their sums fill the registers. Hopper starts a product before the last one
# has ended: with two stages it would wait for a copy as soon as it is started. AMD's 64 KB suffice for one.
TILES = {
    "subnet, bf16": {
        "sm_80": Tile(128, 8, 2),
        "sm_90": Tile(128, 8, 3),
        "sm_100": Tile(128, 8, 2),
        "hip": Tile(128, 8, 1),
        "other": Tile(64, 4, 2),
    },
    # A whole block rotates, too. Blackwell keeps sums in a memory of 512 columns for 128 pixels, or twice as many for
    # half the pixels: the 208 of a rotation fit once, and a pipelined loop holds three of them.
    "blocks": {
        "sm_80": Tile(128, 8, 2),
        "sm_90": Tile(128, 8, 3),
        "hip": Tile(128, 8, 1),
        "other": Tile(64, 4, 2),
    },
    # Half the pixels keep twice the processors busy; operands of four bytes leave no room for more.
    "subnet, bf16, few pixels": {"sm_90": Tile(64, 4, 3), "hip": Tile(64, 4, 1), "other": Tile(64, 4, 2)},
    "subnet, tf32": {
        "sm_80": Tile(64, 4, 2),
        "sm_90": Tile(64, 4, 3),
        "sm_100": Tile(64, 4, 2),
        "other": Tile(64, 4, 1),
    },
    "codes": {
        "sm_80": Tile(128, 8, 2),
        "sm_90": Tile(128, 8, 3),
        "sm_100": Tile(128, 8, 2),
        "hip": Tile(128, 8, 1),
        "other": Tile(64, 4, 2),
    },
    "codes, few rows": {"sm_90": Tile(64, 4, 3), "hip": Tile(64, 4, 1), "other": Tile(64, 4, 2)},
    "rotation": {  # as for whole blocks
        "sm_90": Tile(128, 8, 3),
        "hip": Tile(64, 4, 1),
        "other": Tile(64, 4, 2),
    },
}
FEW_PIXELS = 8192  # up to so many, programs take half as many
STAGES = {"sm_90": 3, "hip": 1}  # of loops whose tiles do not depend on the architecture; 2 elsewhere


@functools.cache
def architecture(device: torch.device) -> str:
    """Return what a device computes with: ``"sm_90"``, ..., ``"hip"``, or ``"interpreter"`` for a CPU."""
    if device.type != "cuda":
        return "interpreter"
    if HIP:
        return "hip"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def accelerated(device: torch.device) -> bool:
    """Return whether a device has an accelerator that copies tiles of matrices to shared memory, as `tile` reads them.

    It takes no registers for addresses, and its copies are ordered before the products that read them without a fence
    (a fence waits for all of a thread block's memory traffic, in every iteration of a loop).
    """
    return architecture(device) in ("sm_90", "sm_100", "sm_103")


def stages(device: torch.device, *, tiles: bool = False) -> int:
    """Return the stages of a pipelined loop on a device; the environment variable HGAD_FAST_STAGES overrules it.

    Args:
        device: where the loop runs.
        tiles: the loop reads the operands of its products by `tile` only, or they have too few rows for the matrix
            instructions that read shared memory themselves, and pass through registers.
    """
    return _stages(device, STAGES.get(architecture(device), 2), tiles)


def tile_of(kernel: str, device: torch.device) -> Tile:
    """Return the tile of a kernel whose loops read the operands of their products by `tile` only."""
    by_architecture, name = TILES[kernel], architecture(device)
    name = "sm_100" if name == "sm_103" else name
    chosen = by_architecture.get(name, by_architecture["other"])
    return chosen._replace(stages=_stages(device, chosen.stages, tiles=True))


def _stages(device: torch.device, chosen: int, tiles: bool) -> int:
    """Return the stages of a loop: those chosen, unless the environment says otherwise, or the compiler is unsafe."""
    if not FENCED and not tiles and accelerated(device):
        return 1
    override = os.environ.get("HGAD_FAST_STAGES")
    return int(override) if override else chosen


def tiled(matrix: Tensor, rows: int, columns: int) -> Tensor | TensorDescriptor:
    """Return a matrix (contiguous, the columns last) as the argument of a kernel that reads tiles of it by `tile`.

    The rows of its leading axes follow each other.
    """
    matrix = matrix.view(-1, matrix.shape[-1])
    if not accelerated(matrix.device):
        return matrix
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def pieces(
    name: str, matrix: Tensor, edges: tuple[int, ...], columns: int, *, transposed: bool = False
) -> dict[str, Any]:
    """Return a matrix as four arguments, by tiles of the rows (or with `transposed` columns) from edge to edge.

    They are called `name_a` to `name_d`; None where there are fewer pieces. (A tuple of descriptors would be
    one argument, but Triton 3.6 does not launch it.)
    """
    sizes = [end - begin for begin, end in zip(edges, edges[1:], strict=False)]
    assert len(sizes) <= 4, f"{name} has more pieces than a kernel takes: {edges}"
    tiles = [tiled(matrix, columns, size) if transposed else tiled(matrix, size, columns) for size in sizes]
    return {f"{name}_{letter}": tiles[i] if i < len(tiles) else None for i, letter in enumerate("abcd")}


def launch(
    kernel: Any,
    programs: int | tuple[int, ...],
    *,
    warps: int = 4,
    stages: int = 1,
    registers: Mapping[str, int] | None = None,
    **arguments: Any,
) -> None:
    """Start a kernel on the device of its tensors, whatever the current device is.

    Args:
        kernel: a Triton kernel.
        programs: its grid.
        warps, stages: Triton's options.
        registers: at most so many a thread, by `architecture`.
        arguments: the kernel's arguments by name. Row strides (`X_STRIDE` for `x_ptr`) are filled in.

    Raises:
        ValueError: tensors lie on different devices, or a tensor has strides that the kernel does not take.
    """
    device = None
    strides, any_strides = _strided(tuple(kernel.arg_names))
    for parameter, (stride, name) in strides.items():
        value = arguments[parameter]
        arguments[stride] = 0 if value is None else value.stride(0)
        if value is not None and (value.dim() != 2 or value.stride(1) != 1 and value.shape[1] > 1):
            raise ValueError(f"{name} has strides {value.stride()}; its rows must be contiguous")
    for parameter, value in arguments.items():
        value = value.base if isinstance(value, TensorDescriptor) else value
        if not isinstance(value, Tensor):
            continue
        if device is None:
            device = value.device
        elif device != value.device:
            raise ValueError(f"{parameter.removesuffix('_ptr')} is on {value.device}, other arguments are on {device}")
        if parameter not in any_strides and not value.is_contiguous():
            raise ValueError(f"{parameter.removesuffix('_ptr')} has strides {value.stride()}; it must be contiguous")
    if device is None:
        raise ValueError(f"{kernel.__name__} is given no tensor")
    grid = (programs,) if isinstance(programs, int) else programs
    limit = registers.get(architecture(device)) if registers else None
    options = {"num_warps": warps, "num_stages": stages} | ({"maxnreg": limit} if limit else {})
    with on(device):
        kernel[grid](**arguments, **options)


@functools.cache
def _strided(parameters: tuple[str, ...]) -> tuple[dict[str, tuple[str, str]], frozenset[str]]:
    """Return the tensors whose row strides a kernel takes, with the names of both, and all tensors of any strides."""
    names = [parameter.removesuffix("_STRIDE").lower() for parameter in parameters if parameter.endswith("_STRIDE")]
    strides = {f"{name}_ptr": (f"{name.upper()}_STRIDE", name) for name in names}
    others = {f"{parameter.removesuffix('_strides')}_ptr" for parameter in parameters if parameter.endswith("_strides")}
    return strides, frozenset(strides) | others


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which a CUDA device is the current one; Triton launches there, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def rows(t: Tensor) -> Tensor:
    """Return `t` (N, C) if its rows are contiguous (those of a column slice are), else a copy."""
    return t if t.stride(1) == 1 and t.stride(0) >= t.shape[1] else t.contiguous()


@triton.jit
def tanh(u):
    """Return tanh to float32 accuracy: near 0, where a fresh flow has its scales, the exponential form cancels."""
    v = u * u
    series = u * (1.0 + v * (-1.0 / 3 + v * (2.0 / 15 + v * (-17.0 / 315 + v * (62.0 / 2835)))))
    return tl.where(v < 0.0625, series, 1.0 - 2.0 / (1.0 + tl.exp(2.0 * u)))


@triton.jit
def to_bfloat16(x):
    """Round x to the nearest bfloat16; under the interpreter to a float32 of that value."""
    if INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.where(x == x, rounded, x)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def to_tf32(x):
    """Round x to the nearest tf32; tensor cores would truncate, which is biased."""
    rounded = ((x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)  # a GPU's NaN is 0x7FFFFFFF, which would become 0


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """Return x as an operand of a product."""
    if PRECISION == "bf16":
        return to_bfloat16(x)
    elif PRECISION == "tf32":
        return to_tf32(x)
    else:
        return x


@triton.jit
def load(at, mask=None):
    """Return operands that are stored rounded, as a product takes them."""
    x = tl.load(at, mask=mask, other=None if mask is None else 0.0)
    return x.to(tl.float32) if INTERPRETED else x


@triton.jit
def zeros(BLOCK_N: tl.constexpr, EDGES: tl.constexpr):
    """Return a tuple of zeros (BLOCK_N, EDGES[i + 1] - EDGES[i])."""
    sums = ()
    for i in tl.static_range(len(EDGES) - 1):
        sums += (tl.full((BLOCK_N, EDGES[i + 1] - EDGES[i]), 0.0, tl.float32),)  # type: ignore[assignment]
    return sums


@triton.jit
def tile(matrix, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr, TILED: tl.constexpr):
    """Return a tile of what `tiled` returned, a descriptor with TILED, else a pointer to rows of STRIDE elements."""
    if TILED:
        return matrix.load([row, column])
    else:
        r = row + tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        return load(matrix + r[:, None] * STRIDE + c[None, :])


@triton.jit
def multiply(
    x, matrix, row, column, sums,
    STRIDE: tl.constexpr, EDGES: tl.constexpr, COLUMNS: tl.constexpr, DOT: tl.constexpr, TILED: tl.constexpr,
):  # fmt: skip
    """Add x W^T to sums: COLUMNS columns of W, and its rows from edge to edge, with an item of `matrix` for each."""
    new = ()
    for i in tl.static_range(len(EDGES) - 1):
        w = tile(matrix[i], row + EDGES[i], column, EDGES[i + 1] - EDGES[i], COLUMNS, STRIDE, TILED)
        new += (tl.dot(x, tl.trans(w), sums[i], input_precision=DOT),)  # type: ignore[assignment]
    return new
