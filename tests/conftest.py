"""What every test shares: an order, a seed, a clean process, NaN-filled fresh memory, the kernels in both flavours."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import hypothesis
import numpy as np
import pytest
import rounding
import torch
import triton.language as tl
from compilation import ROCM, Compiler
from kernel_modules import kernel_modules
from order import shuffled
from process_state import changes, process_state
from torch._dynamo import trace_rules
from triton.runtime.interpreter import GridExecutor, InterpretedFunction

from hgad_fast.ops import dispatch

collect_ignore = ["site"]  # of what `make docs` has built

# The same examples in every run, and no limit on the time that one takes or that is needed to draw it.
hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", metavar="SEED", help="run the tests in an order drawn with this seed, any text")


def pytest_report_header(config: pytest.Config) -> str | None:
    seed = config.getoption("--shuffle")
    return None if seed is None else f"shuffled: --shuffle={seed}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (seed := config.getoption("--shuffle")) is not None:
        items[:] = shuffled(items, seed)


@pytest.fixture(autouse=True)
def clean_process() -> Iterator[None]:
    """Fail a test that leaves the process in another state than it was: the next test would begin with it."""
    before = process_state()
    yield
    left = changes(before, process_state())
    assert not left, f"left behind (before, after): {left}"


@pytest.fixture(autouse=True)
def seed() -> None:
    begin_at_the_seed()


def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> None:
    """Seed fixtures that outlive a test, too: they are made before `seed`, and after whatever test came first."""
    if fixturedef.scope != "function":
        begin_at_the_seed()


def begin_at_the_seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def float64() -> Iterator[None]:
    """Compute in float64 what asks for float32: what is the same by two ways is the same there, on any processor."""
    with rounding.in_float64():
        yield


@pytest.fixture
def nan_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` returns NaN (in integer types the least value): an element that no kernel wrote shows."""
    trace_rules.get_torch_obj_rule_map()  # made once for all compilations: it must know the real function
    empty = torch.empty

    def filled(*args, **kwargs) -> torch.Tensor:
        memory = empty(*args, **kwargs)
        return memory.fill_(float("nan") if memory.is_floating_point() else torch.iinfo(memory.dtype).min)

    monkeypatch.setattr(torch, "empty", filled)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Yield the kernel modules on Triton's interpreter; meanwhile CPU tensors take the kernels in ops too."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name in ("sum", "max"):  # Triton's own kernels, decorated when it was imported, without the flag
        monkeypatch.setattr(tl, name, InterpretedFunction(getattr(tl, name).fn))
    modules = kernel_modules(interpret=True)
    for name, module in vars(modules).items():  # those that ops may have imported before are for the compiler
        monkeypatch.setitem(sys.modules, f"hgad_fast.kernels.{name}", module)
    dispatch.kernels.cache_clear()
    yield modules
    dispatch.kernels.cache_clear()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Return a count of the launches of each kernel on the interpreter, by name."""
    counts: dict[str, int] = {}
    launch = GridExecutor.__call__

    def counted(self, *args, **kwargs):
        counts[self.fn.__name__] = counts.get(self.fn.__name__, 0) + 1
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    return counts


@pytest.fixture(scope="session")
def compiled() -> SimpleNamespace:
    """Return the kernel modules as an NVIDIA GPU gets them, to call and look at: `compiler` compiles."""
    return kernel_modules(interpret=False)


@pytest.fixture(scope="session")
def compiled_for_amd() -> SimpleNamespace:
    """Return the kernel modules as an AMD GPU gets them."""
    return kernel_modules(interpret=False, hip=ROCM)


@pytest.fixture(scope="session")
def compiler() -> Iterator[Compiler]:
    """Yield a process that compiles kernels; after Triton's interpreter has run in this one, nothing would compile."""
    compiler = Compiler()
    yield compiler
    compiler.close()
