"""The tolerances of tests/support/rounding.py: wide enough for float32 in any order, too narrow for a mistake."""

from __future__ import annotations

import pytest
import rounding
import torch
from torch import Tensor, nn

from hgad_fast.modules.flow import ConditionalFlow, sinusoidal_position


def chunked_sum(x: Tensor, parts: int) -> Tensor:
    total = torch.zeros((), dtype=x.dtype)
    for part in x.chunk(parts):
        total = total + part.sum()
    return total


@pytest.mark.parametrize("parts", [1, 7, 5000])
def test_a_sum_in_any_order_is_within_its_rounding(parts: int) -> None:
    x = torch.randn(5000) * 100
    rounding.assert_close(chunked_sum(x, parts), torch.sum, x)


def test_a_sum_without_one_term_of_a_thousand_is_refused() -> None:
    x = torch.rand(1000)
    with pytest.raises(AssertionError, match="rounding explains"):
        rounding.assert_close(x[1:].sum(), torch.sum, x)


def product(x: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor]:
    y = torch.tanh(layer(x))
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    return y, gradient


def test_values_and_gradients_of_a_layer_are_within_their_rounding_and_half_precision_is_not() -> None:
    x, layer = torch.randn(50, 64, requires_grad=True), nn.Linear(64, 32)
    rounding.assert_close(product(x, layer), product, x, layer)
    coarse = x.detach().bfloat16().float().requires_grad_()
    with pytest.raises(AssertionError, match=r"value\[0\]"):
        rounding.assert_close(product(coarse, layer), product, x, layer)


def test_cancellation_widens_the_tolerance_where_it_happens_and_only_there() -> None:
    def difference(x: Tensor) -> Tensor:
        return (x + 1) - 1

    x = torch.tensor([1e-6, 1.0])
    exact, tolerance = rounding.exact_and_tolerance(difference, x)
    assert torch.equal(exact, difference(x.double()))
    assert 1e-8 < tolerance[0] < 3e-6 and 1e-8 < tolerance[1] < 3e-6
    assert rounding.exact_and_tolerance(torch.exp, x)[1].max() < 4e-6 / 2**0.5
    rounding.assert_close(difference(x), difference, x)


def test_moving_numbers_has_no_error_but_a_last_digit() -> None:
    x = torch.randn(4, 6)
    _, tolerance = rounding.exact_and_tolerance(lambda x: torch.cat([x.T.flip(0), x.T]).max(0).values, x)
    assert (tolerance <= 1.2e-7 * x.abs().max() + 1e-37).all()


def test_what_is_not_a_number_where_it_should_be_is_refused() -> None:
    x = torch.ones(3)
    with pytest.raises(AssertionError, match="off by inf"):
        rounding.assert_close(torch.tensor([1.0, float("nan"), 1.0]), torch.sqrt, x)
    rounding.assert_close(torch.full((3,), -torch.inf), torch.log, torch.zeros(3))


def test_what_asks_for_float32_is_computed_in_float64() -> None:
    x = torch.rand(100)
    exact, _ = rounding.exact_and_tolerance(lambda x: x.float().to(torch.float32).sum(dtype=torch.float32), x)
    assert exact.item() == pytest.approx(x.double().sum().item(), rel=1e-15)


def test_a_view_shares_what_it_views_and_an_operation_in_place_is_disturbed() -> None:
    def viewed(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.unflatten(0, (2, -1)).movedim(0, 1), x

    x = torch.rand(6)
    _, (of_view, of_x) = rounding.exact_and_tolerance(viewed, x)
    assert max(of_view.max(), of_x.max()) < 1.2e-7 * x.max() + 1e-37
    _, in_place = rounding.exact_and_tolerance(lambda x: x.clone().mul_(3.0), x)
    assert (in_place > 2 * 1.2e-7 * x).all()


@pytest.mark.parametrize(("precision", "digits"), [("tf32", 11), ("bf16", 8)])
def test_operands_of_a_reduced_precision_may_be_rounded_to_it_and_no_coarser(precision: str, digits: int) -> None:
    flow, x = ConditionalFlow(8, 2, 0), torch.randn(40, 8)
    flow.precision = precision

    def z(flow: ConditionalFlow, x: Tensor) -> Tensor:
        with torch.no_grad():
            return flow(x)[0]

    rounding.assert_close(z(flow, x), z, flow, x)
    coarse = rounding.exact_and_tolerance(z, flow, x)[1].median()
    flow.precision = "fp32"
    fine = rounding.exact_and_tolerance(z, flow, x)[1].median()
    assert coarse > 2.0 ** (23 - digits) / 64 * fine


def test_computing_in_float64_leaves_nothing_behind() -> None:
    code = sinusoidal_position(3, 4, 8)
    with rounding.in_float64():
        flow = ConditionalFlow(8, 1, 8).double()
        z, _ = flow(torch.rand(12, 8), flow.grid(3, 4))
        assert z.dtype == sinusoidal_position(3, 4, 8).row.dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32 and torch.rand(1).float().dtype == torch.float32
    assert torch.equal(sinusoidal_position(3, 4, 8).row, code.row)


def test_disturbances_are_the_same_on_every_run() -> None:
    x = torch.rand(100)
    assert torch.equal(rounding.exact_and_tolerance(torch.sum, x)[1], rounding.exact_and_tolerance(torch.sum, x)[1])
