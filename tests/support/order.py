"""The order of the tests under `--shuffle`."""

from __future__ import annotations

import random

import pytest


def shuffled(items: list[pytest.Item], seed: str) -> list[pytest.Item]:
    """Return the tests in an order that depends on the seed and on the tests alone.

    They are mixed across files, classes and functions. Those of one file that use a fixture of the whole file, or of a
    class, stay together, in an order of their own: elsewhere pytest would make that fixture anew for each of them.
    """
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        groups.setdefault(item.nodeid if (shared := shared_fixtures(item)) is None else shared, []).append(item)
    chance = random.Random(seed)
    for group in groups.values():
        chance.shuffle(group)
    order = list(groups.values())
    chance.shuffle(order)
    return [item for group in order for item in group]


def shared_fixtures(item: pytest.Item) -> str | None:
    """Return the file of a test that uses a fixture of its file, class or folder; None for any other."""
    definitions = item._fixtureinfo.name2fixturedefs.values()
    scopes = {definition.scope for used in definitions for definition in used}
    return item.nodeid.partition("::")[0] if scopes & {"class", "module", "package"} else None
