"""The operations of `hgad_fast.ops` by themselves."""

from __future__ import annotations

from collections.abc import Callable


def test_coupling(measured: Callable) -> None:
    measured("coupling")


def test_flow(measured: Callable) -> None:
    measured("flow")


def test_mixture(measured: Callable) -> None:
    measured("mixture")


def test_scores(measured: Callable) -> None:
    measured("scores")


def test_codes(measured: Callable) -> None:
    measured("codes")


def test_distances(measured: Callable) -> None:
    measured("distances")
