"""Imports of large packages: without a search for garbage among what they make, and without what is never used."""

from __future__ import annotations

import functools
import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any


@contextmanager
def uncollected() -> Iterator[None]:
    """Import modules while Python's collector of garbage rests, as it looks through all of them again and again.

    Of torch that is a tenth of the time, of timm a third.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def dynamo_deferred() -> Iterator[None]:
    """Import timm and torchvision without torch._dynamo, more than half of their time; scoring does not compile.

    While they are imported they take of it a decorator, `disable`, and a function, `is_compile_supported`. Both get
    stand-ins that call the real ones when they are called; whatever else is asked for brings the real torch._dynamo at
    once. Afterwards the next import brings it. Only for a process of ours, the command line's: another thread that
    imports torch._dynamo meanwhile would see the stand-ins.
    """
    if "torch._dynamo" in sys.modules:
        yield
        return
    for stand_in in (
        _StandIn("torch._dynamo", disable=_disable),
        _StandIn("torch._dynamo.utils", is_compile_supported=_is_compile_supported),
    ):
        sys.modules[stand_in.__name__] = stand_in
    try:
        yield
    finally:
        _remove_stand_ins()


class _StandIn(ModuleType):
    """A module with some functions, which for anything else becomes the real one."""

    def __init__(self, name: str, **functions: Callable[..., Any]) -> None:
        super().__init__(name)
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> Any:
        is_package = self.__name__ == "torch._dynamo"
        if name.startswith("__") and not (is_package and name == "__path__"):  # `inspect` asks all modules for __file__
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(_real(self.__name__), name)


def _remove_stand_ins() -> None:
    for name in ("torch._dynamo", "torch._dynamo.utils"):
        if isinstance(sys.modules.get(name), _StandIn):
            del sys.modules[name]


def _real(name: str) -> Any:
    _remove_stand_ins()
    return importlib.import_module(name)


def _disable(function: Any = None, recursive: bool = True, **options: Any) -> Any:
    from torch._compile import _disable_dynamo  # torch's own form of `disable` that waits for the first call

    if function is None:
        return functools.partial(_disable, recursive=recursive, **options)
    if isinstance(function, FunctionType) and options.keys() <= {"reason"}:  # else `_disable_dynamo` asks, at a call
        return _disable_dynamo(function, recursive)
    return _real("torch._dynamo").disable(function, recursive, **options)


def _is_compile_supported(device_type: Any) -> Any:
    return _real("torch._dynamo.utils").is_compile_supported(device_type)
