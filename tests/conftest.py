"""What every test shares: a seed, NaN-filled fresh memory, and the kernels in both flavours."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton.language as tl
from compilation import ROCM, Compiler
from kernel_modules import kernel_modules
from triton.runtime.interpreter import GridExecutor, InterpretedFunction


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
    """Return the kernel modules on Triton's interpreter; meanwhile CPU tensors take the kernels in ops too."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name in ("sum", "max"):  # Triton's own kernels, decorated when it was imported, without the flag
        monkeypatch.setattr(tl, name, InterpretedFunction(getattr(tl, name).fn))
    return kernel_modules(interpret=True)


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
    """Return the kernel modules as an NVIDIA GPU gets them, to call and to look at: what compiles them is `compiler`."""
    return kernel_modules(interpret=False)


@pytest.fixture(scope="session")
def compiled_for_amd() -> SimpleNamespace:
    """Return the kernel modules as an AMD GPU gets them."""
    return kernel_modules(interpret=False, hip=ROCM)


@pytest.fixture(scope="session")
def compiler() -> Iterator[Compiler]:
    """Yield a process that compiles kernels: this one may have used Triton's interpreter, after which nothing compiles."""
    compiler = Compiler()
    yield compiler
    compiler.close()
