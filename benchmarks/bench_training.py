"""A training step, as `fit` takes it and as the official script drives the class."""

from __future__ import annotations

from collections.abc import Callable


def test_training(measured: Callable) -> None:
    measured("training")


def test_official_loop(measured: Callable) -> None:
    measured("official-loop")
