"""The order of the tests, and what none may leave to the next."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from itertools import groupby
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from order import shuffled
from process_state import changes, process_state


def stand_ins(name: str, *scopes: str) -> list[SimpleNamespace]:
    """Return twenty cases of a test whose fixtures have these scopes, with as much of a test as an order looks at."""
    fixtures = {scope: [SimpleNamespace(scope=scope)] for scope in ("session", "function", *scopes)}
    info = SimpleNamespace(name2fixturedefs=fixtures)
    return [SimpleNamespace(nodeid=f"{name}[{i}]", _fixtureinfo=info) for i in range(20)]


def test_an_order_follows_from_its_seed_and_mixes_files_but_for_tests_that_share_a_fixture() -> None:
    alone = [*stand_ins("a.py::test_a"), *stand_ins("b.py::test_b"), *stand_ins("c.py::test_c")]
    sharing = [test.nodeid for test in stand_ins("c.py::test_d", "module")]
    orders = {}
    for seed in ("0", "1", "2fd"):
        order, again = (
            [test.nodeid for test in shuffled(alone + stand_ins("c.py::test_d", "module"), seed)] for _ in "ab"
        )
        assert order == again and sorted(order) == sorted(sharing + [test.nodeid for test in alone])
        first = min(map(order.index, sharing))
        assert set(order[first : first + 20]) == set(sharing) and order[first : first + 20] != sharing
        files = [name.partition("::")[0] for name in order]
        assert len(list(groupby(files))) > 20
        orders[seed] = order
    assert len({tuple(order) for order in orders.values()}) == 3


def test_every_kind_of_leftover_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    def leave(change: Callable[[], object], undo: Callable[[], object]) -> set[str]:
        before = process_state()
        change()
        left = changes(before, process_state())
        undo()
        assert process_state() == before
        return set(left)

    here, threads, alarm = os.getcwd(), torch.get_num_threads(), signal.getsignal(signal.SIGALRM)
    assert leave(lambda: os.environ.update(HGAD_LEFT="1"), lambda: os.environ.pop("HGAD_LEFT")) == {
        "environment, HGAD_LEFT"
    }
    assert leave(lambda: os.chdir(tmp_path), lambda: os.chdir(here)) == {"folder"}
    assert leave(lambda: sys.path.append("left"), lambda: sys.path.remove("left")) == {"search path"}
    assert leave(lambda: torch.set_num_threads(threads + 1), lambda: torch.set_num_threads(threads)) == {"threads"}
    precision = torch.set_float32_matmul_precision
    assert leave(lambda: precision("high"), lambda: precision("highest")) == {"float32 products"}
    dtype = torch.set_default_dtype
    assert leave(lambda: dtype(torch.float64), lambda: dtype(torch.float32)) == {"default dtype"}
    assert leave(lambda: torch.set_grad_enabled(False), lambda: torch.set_grad_enabled(True)) == {"gradients"}
    ignored = signal.SIG_IGN
    assert leave(lambda: signal.signal(signal.SIGALRM, ignored), lambda: signal.signal(signal.SIGALRM, alarm)) == {
        "signals"
    }
    errors = np.geterr()
    assert leave(lambda: np.seterr(all="ignore"), lambda: np.seterr(**errors)) == {"NumPy's errors"}
