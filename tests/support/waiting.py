"""Waiting for another thread or process, in looks instead of seconds: a slow machine gets more time."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest


def eventually(condition: Callable[[], object]) -> None:
    """Wait until a condition holds, for 6000 looks at most, which take a minute or longer."""
    for _ in range(6000):
        if condition():
            return
        threading.Event().wait(0.01)
    pytest.fail("it did not come about")
