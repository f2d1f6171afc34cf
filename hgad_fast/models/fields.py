"""The fields of configurations: plain forms and kinds of their values, and how a command line gives and lists them."""

from __future__ import annotations

import dataclasses
import inspect
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


def field_table(base: type[Any], methods: Sequence[type[Any]]) -> str:
    """Return `fields_by_method` as a table for people."""
    lines = ["--set FIELD=VALUE, where VALUE is JSON (null, true, [1, 2], 0.5) or a word; fields with their defaults:"]
    for title, rows in fields_by_method(base, methods):
        lines += ["", title, *(f"  {name:<20} {default:<24} {meaning}" for name, default, meaning in rows)]
    return "\n".join(lines)


def fields_by_method(base: type[Any], methods: Sequence[type[Any]]) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Return the fields of configurations: for "every method" and for each by its name, those with their meanings.

    Args:
        base: the configuration that all methods share.
        methods: those of the methods, of which fields are listed that `base` lacks or has another default for.

    Returns:
        titles, and for each (name, default as JSON, meaning) of its fields.
    """
    shared = {name: default for name, default, _ in _described(base)}
    parts = [("every method", _described(base))]
    for config in methods:
        own = [row for row in _described(config) if row[0] not in shared or row[1] != shared[row[0]]]
        parts.append((config.method, own))
    return parts


def _described(config: type[Any]) -> list[tuple[str, str, str]]:
    """Return name, default and meaning of each field; a field that is defined anew may keep its meaning."""
    meanings: dict[str, str] = {}
    for owner in reversed(config.__mro__):
        for name, hint in inspect.get_annotations(owner, eval_str=True).items():
            if hasattr(hint, "__metadata__"):
                meanings[name] = hint.__metadata__[0]
    return [
        (field.name, json.dumps(field.default), meanings.get(field.name, "")) for field in dataclasses.fields(config)
    ]
