"""What every test shares: a seed, NaN-filled fresh memory, and the kernels in both flavours."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import GridExecutor, InterpretedFunction

KERNELS = Path(__file__).resolve().parents[1] / "kernels"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def nan_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` returns NaN (in integer types the least value): an element that no kernel wrote shows."""
    empty = torch.empty

    def filled(*args, **kwargs) -> torch.Tensor:
        memory = empty(*args, **kwargs)
        return memory.fill_(float("nan") if memory.is_floating_point() else torch.iinfo(memory.dtype).min)

    monkeypatch.setattr(torch, "empty", filled)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The kernel modules on Triton's interpreter; meanwhile CPU tensors take the kernels in ops too."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name in ("sum", "max"):  # Triton's own kernels, decorated when it was imported, without the flag
        monkeypatch.setattr(tl, name, InterpretedFunction(getattr(tl, name).fn))
    return kernels(interpret=True)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each kernel has been launched on the interpreter, by name."""
    counts: dict[str, int] = {}
    launch = GridExecutor.__call__

    def counted(self, *args, **kwargs):
        counts[self.fn.__name__] = counts.get(self.fn.__name__, 0) + 1
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    return counts


@pytest.fixture(scope="session")
def compiled() -> SimpleNamespace:
    """The kernel modules as an NVIDIA GPU gets them."""
    return kernels(interpret=False)


@pytest.fixture(scope="session")
def compiled_for_amd() -> SimpleNamespace:
    """The kernel modules as an AMD GPU gets them."""
    with mock.patch.object(torch.version, "hip", "6.4"):
        return kernels(interpret=False, flavour="amd")


@functools.cache
def kernels(interpret: bool, flavour: str = "") -> SimpleNamespace:
    # Triton chooses interpreter or compiler when it decorates a kernel: each flavour is an import of its own.
    modules = {}
    with mock.patch.dict(os.environ, TRITON_INTERPRET=str(int(interpret))):
        for path in sorted(KERNELS.glob("*.py")):
            name = f"{path.stem}_{'interpreted' if interpret else 'compiled'}{flavour}"
            spec = importlib.util.spec_from_file_location(name, path)
            modules[path.stem] = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(modules[path.stem])
    return SimpleNamespace(**modules)
