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
    """A measured value, and what it is to be at least or at most, where something was set before it was measured."""

    name: str
    value: float | None  # None: could not be measured, the note says why
    unit: str
    note: str = ""
    at_least: float = -math.inf
    at_most: float = math.inf

    @property
    def has_target(self) -> bool:
        return self.at_least > -math.inf or self.at_most < math.inf

    @property
    def misses(self) -> bool:
        """Whether there is a target, and the value does not reach it, or is none."""
        return self.has_target and not (self.value is not None and self.at_least <= self.value <= self.at_most)

    def __str__(self) -> str:
        value = "-" if self.value is None else f"{self.value:.4g}"
        wanted = [
            f"{words} {bound:g}"
            for words, bound in (("at least", self.at_least), ("at most", self.at_most))
            if math.isfinite(bound)
        ]
        target = f"({'misses' if self.misses else 'reaches'} {', '.join(wanted)})" if wanted else ""
        return " ".join(filter(None, [f"figure {self.name}: {value}", self.unit, target, self.note]))

    def document(self) -> dict[str, Any]:
        finite = {name: _finite(getattr(self, name)) for name in ("value", "at_least", "at_most")}
        return asdict(self) | finite | {"has_target": self.has_target, "misses": self.misses}


@dataclass(frozen=True)
class LeftOut:
    """What was to be measured or checked, and was not."""

    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.name} ({self.why})"


def first_line(error: Exception) -> str:
    """Return what a note says of an error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _finite(value: float | None) -> float | None:
    """Return the value, None for infinity and NaN, which JSON has not."""
    return value if value is not None and math.isfinite(value) else None
