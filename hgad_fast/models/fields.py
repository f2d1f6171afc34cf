"""The values of a configuration's fields: their plain forms, their kinds, and how they come from a command line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

LONGEST_SHOWN = 500  # characters of a value in an error message


def plain(value: Any) -> Any:
    """Return `value` in plain Python types: NumPy's numbers as Python's, paths as strings, sequences as tuples."""
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return tuple(map(plain, value))
    return value


def assignment(text: str) -> tuple[str, Any]:
    """Return a field and its value from FIELD=VALUE, as a command line has it: the value is JSON, or a bare word.

    Raises:
        ValueError: there is no equals sign.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text!r} is no assignment; write --set FIELD=VALUE")
    try:
        return name.strip(), json.loads(value)
    except json.JSONDecodeError:
        return name.strip(), value


def is_indices(value: Any) -> bool:
    """Return whether `value` tells the stages of a backbone: layers and groups of layers, all in increasing order."""
    if not isinstance(value, tuple) or () in (value, *value):
        return False
    layers = [layer for entry in value for layer in (entry if isinstance(entry, tuple) else (entry,))]
    return all(map(is_int, layers)) and layers == sorted(set(layers)) and (layers[0] >= 0 or layers[-1] < 0)


def is_int(value: Any) -> bool:
    """Return whether `value` is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return whether `value` is a finite number; a whole one that is too large for a float is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_count(value: Any, most: int) -> bool:
    """Return whether `value` is a whole number from 1 to `most`."""
    return is_int(value) and 1 <= value <= most


def shown(value: Any) -> str:
    """Return a value as an error message shows it: as Python writes it, but for the middle of a long one."""
    text = repr(value)
    half = LONGEST_SHOWN // 2
    return text if len(text) <= LONGEST_SHOWN else f"{text[:half]} ... {text[-half:]}"
