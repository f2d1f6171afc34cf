"""From features to anomaly maps."""

from __future__ import annotations

from collections.abc import Callable


def test_scoring(measured: Callable) -> None:
    measured("scoring")
