"""The operations of `hgad_fast.ops` by themselves."""

from __future__ import annotations

from collections.abc import Callable


def test_coupling(measure: Callable) -> None:
    measure("coupling")


def test_flow(measure: Callable) -> None:
    measure("flow")


def test_mixture(measure: Callable) -> None:
    measure("mixture")


def test_scores(measure: Callable) -> None:
    measure("scores")
