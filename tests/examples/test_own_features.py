"""The example of features of one's own does what it says."""

from __future__ import annotations

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_own_features_find_the_broken_pattern() -> None:
    assert runpy.run_path(str(EXAMPLES / "own_features.py"))["main"]() > 0.9
