"""The kernel modules in both flavours, for the tests and for the process that compiles (see compilation.py)."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


@functools.cache
def kernel_modules(interpret: bool, hip: str | None = None) -> SimpleNamespace:
    """Return the kernel modules for the interpreter or for the compiler; `hip` is the ROCm version they shall see."""
    # Triton chooses interpreter or compiler when it decorates a kernel: each flavour is a package of its own.
    package = ModuleType("kernels_" + ("interpreted" if interpret else "compiled") + ("_amd" if hip else ""))
    package.__path__ = [str(KERNELS)]
    sys.modules[package.__name__] = package
    environment = mock.patch.dict(os.environ, TRITON_INTERPRET=str(int(interpret)))
    with environment, mock.patch.object(torch.version, "hip", hip):
        modules = {
            path.stem: importlib.import_module(f"{package.__name__}.{path.stem}") for path in KERNELS.glob("*.py")
        }
    return SimpleNamespace(**modules)
