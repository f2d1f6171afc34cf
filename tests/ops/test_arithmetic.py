"""The operations compute in float32 whatever the caller's autocast, thread or precision switch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS

from hgad_fast import ops
from hgad_fast.modules.flow import ConditionalFlow
from hgad_fast.modules.mixture import HierarchicalMixture
from hgad_fast.ops import blocks, dispatch, subnet

CUDA = torch.device("cuda")


def drawn() -> tuple[ConditionalFlow, HierarchicalMixture, Tensor, Tensor]:
    flow, mixture = ConditionalFlow(12, 2, 8), HierarchicalMixture([12], 3, 2)
    return flow, mixture, torch.randn(2 * 3 * 4, 12), torch.tensor([0, 2])


def results(name: str, context: Any) -> list[Tensor]:
    """Return what an operation returns in a context, and its gradients where it has some."""
    with context:
        outputs, x = outputs_and_input(name)
    return outputs + ([*torch.autograd.grad(sum(t.sum() for t in outputs), x)] if outputs[0].requires_grad else [])


def outputs_and_input(name: str) -> tuple[list[Tensor], Tensor]:
    """Return what an operation returns, and what it was given."""
    torch.manual_seed(0)
    flow, mixture, x, labels = drawn()
    grid, log_det, level = flow.grid(3, 4), torch.randn(24), mixture.level(0)
    if name == "scores":
        return [t for t in mixture.scores(x, log_det, 0, labels, per_class=True) if t is not None], x
    if name == "own scores":
        return list(mixture.own_scores(x, log_det, 0, labels)), x
    if name == "inverse":
        return list(flow(x.requires_grad_(), grid, rev=True)), x
    computations: dict[str, Callable[[], list[Tensor]]] = {
        "flow": lambda: list(flow(x, grid)),
        "flow, definition": lambda: list(ops.flow_definition(x, flow.blocks, grid)),
        "losses": lambda: list(mixture.losses(x, log_det, labels, 0, stage=2, label_smoothing=0.02).values()),
        "terms": lambda: list(ops.mixture_terms(x, labels, *level, label_smoothing=0.02, stage=2)),
        "terms, definition": lambda: list(
            ops.mixture_terms.reference(x, labels, *level, label_smoothing=0.02, stage=2)
        ),
        "coupling": lambda: list(ops.affine_coupling(x, torch.cat([x, x], 1))),
    }
    x.requires_grad_()
    return computations[name](), x


@pytest.mark.parametrize(
    "name", ["flow", "flow, definition", "inverse", "losses", "terms", "scores", "own scores", "coupling"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(name, dtype):
    """Around a definition of scores it would cost 0.6 nat, and around `flow` it would raise."""
    expected = results(name, nullcontext())
    actual = results(name, torch.autocast("cpu", dtype=dtype))
    for value, right in zip(actual, expected, strict=True):
        assert value.dtype == right.dtype and torch.equal(value, right)


def test_a_training_step_under_autocast():
    """Also where the backward pass alone is inside."""
    torch.manual_seed(0)
    flow, _, x, _ = drawn()
    gradients = []
    for enabled in (False, True):
        z, log_det = flow(x, flow.grid(3, 4))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            gradients.append(torch.autograd.grad(z.square().sum() + log_det.sum(), list(flow.parameters())))
    for value, right in zip(*gradients, strict=True):
        assert torch.equal(value, right)


@pytest.fixture
def switch(monkeypatch) -> Any:
    """Stand in for torch's switch of float32 products on CUDA."""

    class Switch:
        fp32_precision = "none"

    monkeypatch.setattr(torch.backends.cuda, "matmul", Switch())
    return torch.backends.cuda.matmul


def test_products_are_exact_whatever_the_switch_says_and_it_is_put_back(switch):
    """So are convolutions, which have a switch of their own."""
    switch.fp32_precision = "tf32"
    convolutions, before = torch.backends.cudnn.conv, torch.backends.cudnn.conv.fp32_precision
    with dispatch.float32_products(CUDA):
        assert switch.fp32_precision == convolutions.fp32_precision == "ieee"
        with dispatch.float32_products(CUDA, "tf32"):
            assert switch.fp32_precision == "tf32"
        assert switch.fp32_precision == "ieee"
    assert switch.fp32_precision == "tf32" and convolutions.fp32_precision == before
    with pytest.raises(ZeroDivisionError), dispatch.float32_products(CUDA):
        raise ZeroDivisionError
    assert switch.fp32_precision == "tf32"


def test_threads_do_not_change_each_others_products(switch):
    """Two threads with other operands: each sees its own from begin to end, and the first setting comes back."""
    inside, seen, order = threading.Barrier(2), [], []

    def work(operands: str) -> None:
        inside.wait()
        with dispatch.float32_products(CUDA, operands):
            for _ in range(200):
                seen.append(switch.fp32_precision == operands)
                order.append(operands)

    threads = [threading.Thread(target=work, args=(operands,)) for operands in ("ieee", "tf32")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(seen) and len(seen) == 400
    assert order in (["ieee"] * 200 + ["tf32"] * 200, ["tf32"] * 200 + ["ieee"] * 200)
    assert switch.fp32_precision == "none"


def test_small_products_of_a_flow_are_exact_too(switch, monkeypatch):
    """All products of a float32 flow are done with the switch at ieee: those of positions and offsets, too."""
    switch.fp32_precision = "tf32"
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "hgad_fast":  # look into the library's own operations
                with self:
                    return OPDEFS[f"hgad_fast::{func._opname}"]._init_fn(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm", "matmul"):
                seen.append(switch.fp32_precision)
            return func(*args, **(kwargs or {}))

    scope = dispatch.float32_products
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cpu")  # there is something to do, then
    for module in (dispatch, blocks, subnet):  # as on CUDA
        monkeypatch.setattr(module, "float32_products", lambda device, operands="ieee": scope(CUDA, operands))
    flow, _, x, _ = drawn()
    z, log_det = flow(x, flow.grid(3, 4))
    with Watch():
        ops.flow(x, flow.blocks, flow.grid(3, 4))
        torch.autograd.grad(z.sum() + log_det.sum(), list(flow.parameters()))
    assert seen and set(seen) == {"ieee"}


def test_arguments_may_be_given_by_name():
    flow, mixture, x, labels = drawn()
    grid, names = flow.grid(3, 4), ("mu", "delta", "phi_inter", "phi_intra")
    by_name = ops.flow_definition(x=x, blocks=flow.blocks, position=grid)
    assert torch.equal(by_name[0], ops.flow_definition(x, flow.blocks, grid)[0])
    parameters = dict(zip(names, mixture.level(0), strict=True))
    losses = ops.mixture_losses(z=x, log_det=torch.zeros(24), labels=labels, **parameters)
    assert torch.equal(losses["L_g"], ops.mixture_losses(x, torch.zeros(24), labels, *mixture.level(0))["L_g"])
    ops.own_class_scores(z=x, log_det=torch.zeros(24), labels=labels, **parameters)


def test_definitions_compile_in_one_graph_where_products_have_to_be_set(monkeypatch):
    """As on CUDA, where a lock guards the setting, which a graph cannot hold: its operators do."""
    flow, mixture, x, labels = drawn()
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: True)

    def terms(x: Tensor) -> Tensor:
        return ops.mixture_losses(x, x.sum(1), labels, *mixture.level(0))["L_g"]

    compiled = torch.compile(terms, fullgraph=True, backend="eager")
    monkeypatch.undo()
    assert torch.equal(compiled(x), terms(x))
