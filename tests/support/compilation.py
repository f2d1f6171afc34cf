"""Ahead-of-time compilation in a process that never had Triton's interpreter.

The interpreter writes its own functions over those of `triton.language`, and leaves many of them there: in such a
process nothing compiles any more. So whatever a test compiles is asked of a `Compiler`.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple
from unittest import mock

import triton
import triton.language as tl
from kernel_modules import KERNELS, kernel_modules
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ROCM = "6.4"


class Request(NamedTuple):
    """A kernel to compile, in words that travel between processes."""

    module: str  # the stem of a file in kernels/, or the full name of a module
    kernel: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, int]
    target: str  # one of `TARGETS`


class Binary(NamedTuple):
    """The outcome of a `Request`."""

    machine_code: bytes | str  # a cubin, or AMD's assembly
    ptx: str  # empty for AMD
    shared: int  # bytes
    warps: int
    intermediate: str  # Triton's own, for GPUs


class Compiler:
    """A process of its own, which starts with the first request and lives until `close`."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn"))

    def compile(self, request: Request) -> Binary:
        """Compile a kernel there; what goes wrong there is raised here."""
        return self.call(compile_here, request)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what a function of a module returns there."""
        with mock.patch.dict(os.environ):  # the process begins in here, with this environment
            os.environ.pop("TRITON_INTERPRET", None)
            return self._pool.submit(function, *arguments).result()

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


def compile_here(request: Request) -> Binary:
    """Compile a kernel in this process."""
    target = TARGETS[request.target]
    if (KERNELS / f"{request.module}.py").exists():
        flavour = kernel_modules(interpret=False, hip=ROCM if target.backend == "hip" else None)
        module = getattr(flavour, request.module)
    else:
        module = importlib.import_module(request.module)
    kernel = getattr(module, request.kernel)
    source = ASTSource(kernel, request.signature, request.constants, request.attributes)
    binary = triton.compile(source, target=target, options=request.options)
    code = binary.asm["amdgcn" if target.backend == "hip" else "cubin"]
    metadata = binary.metadata
    return Binary(code, binary.asm.get("ptx", ""), metadata.shared, metadata.num_warps, binary.asm["ttgir"])


def overwritten_names() -> list[str]:
    """Return the names in `triton.language` of this process that hold something of the interpreter."""
    places = {"tl": tl, "tl.core": tl.core, "tl.math": tl.math, "tl.tensor": tl.tensor, "tl.dtype": tl.dtype}
    return [
        f"{place}.{name}"
        for place, holder in places.items()
        for name, member in vars(holder).items()
        if (getattr(member, "__module__", None) or "").startswith("triton.runtime.interpreter")
    ]
