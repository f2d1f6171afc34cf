"""What the kernels share: the launch, the choices by architecture, and small pieces of arithmetic.

Every kernel is started by `launch`, with keyword arguments. A parameter `X_STRIDE` is the row stride of the tensor given
as `x_ptr`, and `launch` fills it in; a tensor without such a parameter has to be contiguous.
"""

from __future__ import annotations

import functools
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter multiplies float32 only
HIP = bool(torch.version.hip)
FLOAT32 = "ieee" if HIP or triton.knobs.runtime.interpret else "tf32x3"
"""How a product on tensor cores has the accuracy of float32; AMD multiplies float32 as it is."""
FENCED = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)
"""Whether Triton separates asynchronous copies to shared memory from the matrix instructions that read them.

Releases up to 3.6, and some of 3.7, leave the fence out (triton-lang/triton issue 9610). There, loops on Hopper and Blackwell are not
pipelined: operands pass through registers, and these stores are fenced.
"""

# Stages of a pipelined loop: how many iterations ahead its loads are started. Hopper starts a product before the last
# one has ended, so that with two stages a copy is awaited as soon as it is started. Consumer cards (8.6, 8.9, 12.x)
# have 99 KB of shared memory a multiprocessor, too little for three. AMD's 64 KB suffice for one.
STAGES = {"sm_80": 2, "sm_86": 2, "sm_89": 2, "sm_90": 3, "sm_100": 2, "sm_103": 2, "sm_120": 2, "hip": 1}


@functools.cache
def architecture(device: torch.device) -> str:
    """Return what a device computes with: ``"sm_90"``, ..., ``"hip"``, or ``"interpreter"`` for a CPU."""
    if device.type != "cuda":
        return "interpreter"
    if HIP:
        return "hip"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def stages(device: torch.device) -> int:
    """Return the stages of a pipelined loop on a device; the environment variable HGAD_FAST_STAGES overrules it."""
    if override := os.environ.get("HGAD_FAST_STAGES"):
        return int(override)
    name = architecture(device)
    if not FENCED and name in ("sm_90", "sm_100", "sm_103"):
        return 1
    return STAGES.get(name, 2)


def launch(
    kernel: Any, programs: int | tuple[int, ...], *, warps: int = 4, stages: int = 1, **arguments: Any
) -> None:
    """Start a kernel on the device of its tensors, whatever the current device is.

    Args:
        kernel: a Triton kernel.
        programs: its grid.
        warps, stages: Triton's options.
        arguments: the kernel's arguments by name. Row strides (`X_STRIDE` for `x_ptr`) are filled in.

    Raises:
        ValueError: tensors lie on different devices, or a tensor has strides that the kernel does not take.
    """
    device = None
    for name, value in tuple(arguments.items()):
        if not isinstance(value, Tensor):
            continue
        if device not in (None, value.device):
            raise ValueError(f"{name.removesuffix('_ptr')} is on {value.device}, other arguments are on {device}")
        device = value.device
        stride = f"{name.removesuffix('_ptr').upper()}_STRIDE"
        if stride in kernel.arg_names:
            if value.dim() != 2 or value.stride(1) != 1 and value.shape[1] > 1:
                raise ValueError(f"{name.removesuffix('_ptr')} has strides {value.stride()}; its rows must be contiguous")
            arguments[stride] = value.stride(0)
        elif not value.is_contiguous():
            raise ValueError(f"{name.removesuffix('_ptr')} has strides {value.stride()}; it must be contiguous")
    if device is None:
        raise ValueError(f"{kernel.__name__} is given no tensor")
    grid = (programs,) if isinstance(programs, int) else programs
    with on(device):
        kernel[grid](**arguments, num_warps=warps, num_stages=stages)


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
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def to_tf32(x):
    """Round x to the nearest tf32; tensor cores would truncate, which is biased."""
    return ((x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)


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
def multiply(x, w_ptr, k, sums, STRIDE: tl.constexpr, EDGES: tl.constexpr, DOT: tl.constexpr):
    """Add x W^T to sums, columns k of W, rows by their edges."""
    new = ()
    for i in tl.static_range(len(EDGES) - 1):
        c = tl.arange(EDGES[i], EDGES[i + 1])
        w = load(w_ptr + c[:, None] * STRIDE + k[None, :])
        new += (tl.dot(x, tl.trans(w), sums[i], input_precision=DOT),)  # type: ignore[assignment]
    return new
