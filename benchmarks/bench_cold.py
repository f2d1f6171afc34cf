"""What a command takes in a process of its own: at most the limits of `cold.py`."""

from __future__ import annotations

import cold


def test_commands_keep_to_their_limits() -> None:
    figures = cold.compare(rounds=3)
    print(figures)
    for kind, seconds in figures.items():
        limit = cold.LIMITS.get(kind.partition(" ")[0])
        assert limit is None or seconds["least"] <= limit, (kind, seconds, figures["import torch"])
