"""The kernel modules in both flavours, for the tests and for the process that compiles (see compilation.py)."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


@functools.cache
def kernel_modules(interpret: bool, hip: str | None = None) -> SimpleNamespace:
    """Return the kernel modules for the interpreter or for the compiler; `hip` is the ROCm version they shall see."""
    # Triton chooses interpreter or compiler when it decorates a kernel: each flavour is an import of its own.
    modules = {}
    flavour = ("interpreted" if interpret else "compiled") + ("_amd" if hip else "")
    environment = mock.patch.dict(os.environ, TRITON_INTERPRET=str(int(interpret)))
    with environment, mock.patch.object(torch.version, "hip", hip):
        for path in sorted(KERNELS.glob("*.py")):
            name = f"{path.stem}_{flavour}"
            spec = importlib.util.spec_from_file_location(name, path)
            modules[path.stem] = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(modules[path.stem])
    return SimpleNamespace(**modules)
