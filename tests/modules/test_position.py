"""A dense positional code is recognised as the sinusoidal grid of maps of one size if it is one, and else never."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hgad_fast.bench import official
from hgad_fast.modules import flow as flows
from hgad_fast.modules.flow import ConditionalFlow, dense_position, recognise_position, sinusoidal_position

SIZES = [(1, 1, 3), (1, 6, 1), (6, 1, 4), (3, 7, 1), (7, 3, 2), (2, 8, 2), (4, 4, 1), (23, 356, 1), (356, 23, 1)]


@pytest.mark.parametrize("dim", [4, 12])
@pytest.mark.parametrize(("h", "w", "images"), SIZES)
def test_grids_are_recognised_whatever_their_memory_and_dtype(h: int, w: int, images: int, dim: int) -> None:
    """Beyond 355 columns the sine of the column comes near to zero again."""
    grid = official.dense_position(dim, images, h, w)
    near = grid + 0.8e-6 * (1 - 2 * torch.rand_like(grid))
    for dense in (grid, grid.contiguous(), near, grid.double()):
        before = dense.clone()
        position = recognise_position(dense)
        assert position is not None and (len(position.row), len(position.column)) == (h, w)
        assert position is sinusoidal_position(h, w, dim, dense.device, dense.dtype)
        assert torch.equal(dense, before)


def other_value(code: Tensor, place: tuple[int, int], value: float) -> Tensor:
    code = code.clone()
    code[place] = value
    return code


def others(h: int, w: int, images: int, dim: int) -> dict[str, Tensor]:
    """Codes (N, dim) that are no grid, most of them in a single value."""
    grid = dense_position(sinusoidal_position(h, w, dim), images)
    n = len(grid)
    places = {"first": (0, 0), "last": (n - 1, dim - 1), "last sine": (n - 1, dim // 2), "middle": (n // 2, 1)}
    spoilt = {
        f"{value} in the {name}": other_value(grid, place, value)
        for name, place in places.items()
        for value in (math.nan, math.inf, 0.5)
    }
    off = other_value(grid, (n - 1, dim - 1), float(grid[-1, -1]) + 2e-6)
    return spoilt | {
        "shifted": grid.roll(1, 0),
        "off in one value": off,
        "rows first": grid.roll(dim // 2, 1),
        "reversed": grid.flip(0),
        "zero": torch.zeros_like(grid),
        "a part of a map": grid[:-1],
        "the rest of a map": grid[1:],
        "maps of two sizes": torch.cat([grid, dense_position(sinusoidal_position(w, h, dim))]),
        "learned": grid.clone().requires_grad_(),
    }


@pytest.mark.parametrize(("h", "w", "images"), [(3, 7, 1), (4, 6, 3)])
@pytest.mark.parametrize("kind", others(2, 3, 1, 8))
def test_nothing_else_is(kind: str, h: int, w: int, images: int) -> None:
    assert recognise_position(others(h, w, images, 8)[kind]) is None


@pytest.mark.parametrize("shape", [(0, 8), (5, 0), (6, 6)])
def test_codes_of_no_grid_s_shape(shape: tuple[int, int]) -> None:
    assert recognise_position(torch.zeros(shape)) is None


def test_what_was_recognised_before_changes_nothing() -> None:
    """Codes of equal shape, of maps of other sizes: each as if it were the first one."""
    codes = {size: official.dense_position(8, 1, *size) for size in [(2, 6), (6, 2), (3, 4), (12, 1), (1, 12)]}
    for order in (list(codes), list(reversed(codes))):
        for h, w in order:
            position = recognise_position(codes[h, w])
            assert position is not None and (len(position.row), len(position.column)) == (h, w)


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("few", [True, False])
def test_a_recognised_code_and_one_multiplied_as_it_is_give_the_same(
    few: bool, conditional: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gradients and without, forward and back; the dense code of an unconditional flow is not looked at."""
    asked = []

    def recognised(dense: Tensor) -> flows.SeparablePosition | None:
        asked.append(len(dense))
        return recognise_position(dense)

    monkeypatch.setattr(flows, "FEW_PRODUCTS", math.inf if few else 0)
    monkeypatch.setattr(flows, "recognise_position", recognised)
    flow = ConditionalFlow(6, 2, 8 if conditional else 0).double()
    x, code = torch.randn(30, 6, dtype=torch.float64), official.dense_position(8, 2, 3, 5).double()
    goal = [flow(x, sinusoidal_position(3, 5, 8, dtype=torch.float64) if conditional else None)]
    assert not asked
    with torch.no_grad():
        actual = [flow(x, [code])]
        back, _ = flow(actual[0][0], code, rev=True)
    assert len(asked) == (0 if few or not conditional else 2)
    actual.append(flow(x, code))
    for z, log_det in actual:
        torch.testing.assert_close(z, goal[0][0], rtol=0, atol=1e-6)
        torch.testing.assert_close(log_det, goal[0][1], rtol=0, atol=1e-6)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-6)
