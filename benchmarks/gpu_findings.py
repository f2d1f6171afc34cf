"""What the jobs of `make gpu` find: checks, figures, and what was left out."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """An error that must not exceed what is allowed."""

    name: str
    error: float
    allowed: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed

    def __str__(self) -> str:
        verdict = "ok    " if self.passed else "FAILED"
        return f"{verdict} {self.name}: {self.error:.1e} (allowed: {self.allowed:.0e}) {self.note}".rstrip()

    def document(self) -> dict[str, Any]:
        return asdict(self) | {"error": _finite(self.error), "passed": self.passed}


@dataclass(frozen=True)
class Figure:
    """A measured value."""

    name: str
    value: float | None  # None: could not be measured, the note says why
    unit: str
    note: str = ""

    def __str__(self) -> str:
        value = "-" if self.value is None else f"{self.value:.4g}"
        return f"figure {self.name}: {value} {self.unit} {self.note}".rstrip()

    def document(self) -> dict[str, Any]:
        return asdict(self) | {"value": _finite(self.value)}


@dataclass(frozen=True)
class LeftOut:
    """What was to be measured or checked, and was not."""

    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.name} ({self.why})"


def _finite(value: float | None) -> float | None:
    """Return the value, None for infinity and NaN, which JSON has not."""
    return value if value is not None and math.isfinite(value) else None
