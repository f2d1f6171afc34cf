"""Tolerances that follow from a computation's own rounding, and not from what one processor gave.

A result in float32 differs from the exact one by what the rounding of every operation on the way adds up to, and that
depends on the order of sums, on fused multiplications and on the processor's library of functions. Monte-Carlo
arithmetic (Parker, "Monte Carlo arithmetic", 1997) measures how much it can be: the definition is computed in float64
several times, and the result of every operation is disturbed at random by as much as the precision under test may
round it. The spread of the results is the error that this computation has on any machine. It is large where the
computation cancels or divides by small numbers, and as small as the last digit where it does not.

The disturbance of one operation is
- nothing, where it only moves, selects or compares numbers (`EXACT`);
- a unit in the last place, relative to the result, for everything that acts on elements;
- u sqrt(n) times the sum of the absolute values of the terms, for sums of n terms (`SUMS`): the probabilistic bound of
  Higham and Mary, "A new approach to probabilistic rounding error analysis", 2019, for any order of summation;
- a unit in the last place of its precision, for an operand that the library rounds to bfloat16 or tf32;
- a unit in the last place of the largest input, for logarithms of sums of exponentials (`LOG_SUMS`), and of the largest
  entry of the matrix, for factorisations, which are backward stable (`FACTORISATIONS`).

Trainings, and everything else that two ways must make the same, are compared in float64 throughout (`in_float64`).
Bounds written down elsewhere are for what no processor changes: given numbers, counts, float64 statistics, pixels and
the steps of 8 and 16 bits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_map, tree_unflatten

from hgad_fast import environment
from hgad_fast.features import extract
from hgad_fast.modules.flow import sinusoidal_position
from hgad_fast.ops import blocks, subnet

MARGIN = 8  # standard deviations: a million elements stay within 5, and a deviation is estimated from few samples
SAMPLES = 8
# Relative. Rounding in float64 stays below it although trainings amplify it a million times; a mistake in what is
# computed is as large as in float32. Tests that compare float64 with float64 by such bounds depend on no processor.
SAME_IN_FLOAT64 = 1e-9
PRECISIONS = {torch.float32: torch.finfo(torch.float32).eps, torch.float64: torch.finfo(torch.float64).eps}
OPERANDS = {"bf16": torch.finfo(torch.bfloat16).eps, "tf32": 2.0**-10, "bf16x3": 2.0**-16}  # of products

EXACT = {
    "_reshape_alias", "_to_copy", "_unsafe_index", "_unsafe_view", "abs", "alias", "amax", "amin", "arange", "argmax",
    "argmin", "argsort", "as_strided", "bernoulli", "bitwise_and", "bitwise_not", "bitwise_or", "cat", "ceil",
    "clamp", "clamp_max", "clamp_min", "clone", "constant_pad_nd", "copy", "detach", "diag_embed", "diagonal",
    "diagonal_copy", "embedding", "empty", "empty_like", "empty_strided", "eq", "expand", "eye", "fill", "flip",
    "floor", "full", "full_like", "gather", "ge", "gt", "index", "index_copy", "index_fill", "index_select",
    "isfinite", "isinf", "isnan", "le", "lift_fresh", "logical_and", "logical_not", "logical_or", "lt", "masked_fill",
    "masked_scatter", "masked_select", "max", "max_pool2d_with_indices", "max_pool2d_with_indices_backward",
    "maximum", "min", "minimum", "ne", "neg", "new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros",
    "nonzero", "normal", "one_hot", "ones", "ones_like", "permute", "rand", "randn", "randperm", "reflection_pad2d",
    "relu", "repeat", "replication_pad2d", "resize", "roll", "round", "scalar_tensor", "scatter", "select",
    "select_backward", "select_scatter", "set", "sgn", "sign", "slice", "slice_backward", "slice_scatter", "sort",
    "split", "split_with_sizes", "squeeze", "stack", "t", "threshold_backward", "topk", "transpose", "tril", "triu",
    "unbind", "unfold", "unfold_backward", "uniform", "unsqueeze", "upsample_nearest2d", "view", "where", "zero",
    "zeros", "zeros_like",
}  # fmt: skip
SUMS = {
    "_adaptive_avg_pool2d", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "addbmm", "addmm", "addmv",
    "avg_pool2d", "avg_pool2d_backward", "baddbmm", "bmm", "convolution", "convolution_backward", "cumsum", "dot",
    "embedding_dense_backward", "index_add", "index_put", "index_reduce", "linear", "linear_backward", "mean", "mm",
    "mv", "nansum", "scatter_add", "scatter_reduce", "sum", "trace", "upsample_bicubic2d", "upsample_bilinear2d",
    "upsample_bilinear2d_backward",
}  # fmt: skip
LOG_SUMS = {"_log_softmax", "logaddexp", "logcumsumexp", "logsumexp"}
FACTORISATIONS = {
    "_linalg_det", "_linalg_slogdet", "_linalg_solve_ex", "_linalg_svd", "cholesky_solve", "linalg_cholesky_ex",
    "linalg_householder_product", "linalg_inv_ex", "linalg_lu", "linalg_lu_factor_ex", "linalg_matrix_exp",
    "linalg_qr", "linalg_solve_triangular", "lu_unpack",
}  # fmt: skip


def assert_close(actual: Any, function: Callable[..., Any], *inputs: Any, precision: torch.dtype = torch.float32):
    """Check that `actual` is what rounding at the precision can make of `function(*inputs)`, element by element.

    Args:
        actual: the values under test: a tensor, an array, a number or a tree of them, as `function` returns it.
        function: the definition. It is computed in float64, whatever dtype it asks for, and may take gradients.
        inputs: its arguments: tensors, modules or trees of them, whose values are exact. Each run gets copies.
        precision: dtype in which `actual` was computed.

    Raises:
        AssertionError: names the element that lies farthest out, with its error and the error that is allowed.
    """
    assert_within(actual, *exact_and_tolerance(function, *inputs, precision=precision))


def assert_within(actual: Any, exact: Any, tolerance: Any) -> None:
    """Check that `actual` is as near to `exact` as `tolerance` says; both come from `exact_and_tolerance`."""
    if isinstance(exact, dict):
        assert set(actual) == set(exact), f"{sorted(actual)} is compared with {sorted(exact)}"
        actual, exact, tolerance = ({key: values[key] for key in exact} for values in (actual, exact, tolerance))
    leaves, structure = tree_flatten(actual)
    paths, exact_structure = tree_flatten_with_path(exact)
    assert structure == exact_structure, f"{structure} is compared with {exact_structure}"
    for value, (path, right), allowed in zip(leaves, paths, tree_flatten(tolerance)[0], strict=True):
        value, name = torch.as_tensor(value).detach(), f"value{keystr(path)}"
        assert value.shape == right.shape, f"{name} has the shape {tuple(value.shape)}, expected {tuple(right.shape)}"
        if not value.numel():
            continue
        error = (value.double() - right).abs()
        error = torch.where((value == right) | (value.isnan() & right.isnan()), 0, error).nan_to_num(math.inf)
        excess = torch.where(error > 0, error / allowed, 0)
        worst = int(excess.argmax())
        index = tuple(int(j) for j in torch.unravel_index(torch.tensor(worst), right.shape))
        assert excess.flatten()[worst] <= 1, (
            f"{name} at {index} is {value.flatten()[worst]:.9g} where the definition in float64 gives "
            f"{right.flatten()[worst]:.9g}: off by {error.flatten()[worst]:.3g}, "
            f"rounding explains {allowed.flatten()[worst]:.3g}"
        )


def exact_and_tolerance(
    function: Callable[..., Any], *inputs: Any, precision: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """Return the float64 result of `function(*inputs)`, and the error of each element that rounding explains."""
    eps = PRECISIONS[precision]
    exact = _run(function, inputs, _Rounding(0.0, 0))
    leaves, structure = tree_flatten(exact)
    squares = [torch.zeros_like(x) for x in leaves]
    for seed in range(SAMPLES):
        disturbed, _ = tree_flatten(_run(function, inputs, _Rounding(eps, seed)))
        for square, x, y in zip(squares, leaves, disturbed, strict=True):
            square += torch.where(x == y, 0, x - y).nan_to_num(0.0) ** 2  # nothing is known where one is infinite
    tiny = torch.finfo(precision).tiny
    tolerance = [
        MARGIN * (square / SAMPLES).sqrt() + eps * x.abs().nan_to_num(0.0, 0.0) + tiny
        for square, x in zip(squares, leaves, strict=True)
    ]
    return exact, tree_unflatten(tolerance, structure)


def _run(function: Callable[..., Any], inputs: Any, rounding: _Rounding) -> Any:
    arguments = tree_map(_doubled, inputs)
    with _computing(rounding):
        result = function(*arguments)
    return tree_map(lambda x: torch.as_tensor(x).detach().double().clone(), result)


@contextmanager
def in_float64() -> Iterator[None]:
    """Compute in float64 what asks for float32; models are `double()` already.

    Two ways of computing the same, a whole training long, agree there to `SAME_IN_FLOAT64`, on any processor.
    """
    with _computing(_Rounding(0.0, 0)):
        yield


@contextmanager
def as_in_the_kernels() -> Iterator[None]:
    """Let a flow's definition round as kernels do: factors of rotations, and gh where it is summed; no results."""
    original = subnet.first_layer_gradients

    def first_layer_gradients(gh: Tensor, x1: Tensor, conditions: list[Tensor], precision: str, *out: Tensor) -> None:
        original(subnet.operand(gh, precision), x1, conditions, precision, *out)

    with (
        mock.patch.object(subnet, "first_layer_gradients", first_layer_gradients),
        mock.patch.object(blocks, "ROTATION", "bf16x3"),
        mock.patch.object(subnet, "result", lambda y, precision: y),
        mock.patch.object(subnet, "bfloat16_instructions", lambda: ""),
    ):
        yield


@contextmanager
def _computing(rounding: _Rounding) -> Iterator[None]:
    default = torch.get_default_dtype()
    sinusoidal_position.cache_clear()  # codes are made anew, rounded like everything else, and not kept for others
    torch.set_default_dtype(torch.float64)
    try:
        with (
            mock.patch.object(subnet, "operand", rounding.operand),
            mock.patch.object(torch, "load", _read(torch.load)),
            mock.patch.object(environment, "FLOAT", torch.float64),
            mock.patch.object(extract, "FEATURES", (torch.float32, torch.float64)),
            rounding,
        ):
            yield
    finally:
        torch.set_default_dtype(default)
        sinusoidal_position.cache_clear()


def _read(load: Callable[..., Any]) -> Callable[..., Any]:
    """Return torch.load as it is without a mode: it fills storages that a mode has not seen."""

    def read(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return load(*args, **kwargs)

    return read


def _doubled(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    if isinstance(value, Tensor):
        copied = value.detach().clone()
        return copied.double().requires_grad_(value.requires_grad) if value.is_floating_point() else copied
    return value


class _Rounding(TorchDispatchMode):
    """Computes in float64 what asks for float32, and disturbs the result of every operation by `eps`."""

    def __init__(self, eps: float, seed: int) -> None:
        super().__init__()
        self.eps = eps
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {key: _widened(value) for key, value in (kwargs or {}).items()}
        mutable = func._schema.is_mutable
        args = tree_map(lambda x: x if mutable and isinstance(x, Tensor) else _widened(x), args)
        if func.namespace == "hgad_fast":  # an operation of the library: what it consists of is disturbed
            with self:
                return OPDEFS[f"hgad_fast::{func._opname}"]._init_fn(*args, **kwargs)
        name = func.overloadpacket.__name__.removesuffix("_")
        if not self.eps or name in EXACT or func.is_view:
            return func(*args, **kwargs)
        if name in FACTORISATIONS:
            args = tree_map(self._disturbed_matrix, args)
        scales = self._scales(func, name, args, kwargs)
        result = func(*args, **kwargs)
        for i, written in enumerate(self._written(func, args, kwargs, result)):
            self._disturb(written, scales[i] if i < len(scales) else written.abs())
        return result

    def operand(self, x: Tensor, precision: str) -> Tensor:
        """Return a product's operand, disturbed by the unit in the last place of its precision; see `operand`."""
        if precision == "fp32" or not self.eps:
            return x
        return x + OPERANDS[precision] * x.abs() * self._noise(x.shape)

    def _noise(self, shape: torch.Size) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64) * 2 - 1

    def _scales(self, func: Any, name: str, args: Any, kwargs: Any) -> list[Tensor]:
        """Return what each result is rounded relative to; nothing, where that is the result itself."""
        if name in SUMS:
            magnitudes, options = tree_map(lambda x: x.abs() if _is_real(x) else x, (args, kwargs))
            results = [x for x in tree_flatten(func(*magnitudes, **options))[0] if _is_real(x)]
            return [x.abs() * max(1.0, math.sqrt(_terms(name, args, x)) / 2) for x in results]
        if name in LOG_SUMS:
            finite = [x[x.isfinite()] for x in tree_flatten((args, kwargs))[0] if _is_real(x)]
            return [torch.cat([x.flatten() for x in finite] + [torch.ones(1)]).abs().max()]
        return []

    def _written(self, func: Any, args: Any, kwargs: Any, result: Any) -> list[Tensor]:
        """Return the tensors that an operation wrote: those it was given to write to, or its results."""
        arguments = func._schema.arguments
        given = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
        written = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write and a.name in given]
        tensors = [given[name] for name in written] if written else result
        return [x for x in tree_flatten(tensors)[0] if _is_real(x)]

    def _disturb(self, value: Tensor, scale: Tensor) -> None:
        scale = torch.where(value.isfinite(), scale, 0).nan_to_num(0.0, 0.0, 0.0)
        value.add_((self.eps * scale * self._noise(value.shape)).to(value.dtype))

    def _disturbed_matrix(self, value: Any) -> Any:
        if not _is_real(value):
            return value
        value = value.clone()
        self._disturb(value, value.abs().max() if value.numel() else value.abs())
        return value


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.dtype is torch.float32 else value
    return torch.float64 if value is torch.float32 else value


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _terms(name: str, args: Any, result: Tensor) -> int:
    """Return how many terms an element of a sum has at most."""
    sizes = [x.numel() for x in tree_flatten(args)[0] if _is_real(x)]
    if name in ("mm", "bmm", "mv", "dot"):
        return args[0].shape[-1]
    if name in ("addmm", "baddbmm", "addmv"):
        return args[1].shape[-1] + 1
    if name == "convolution":
        return args[1][0].numel() + 1
    if name.startswith("_upsample") or name.startswith("upsample"):
        return 16
    return max(1, max(sizes) // max(1, result.numel()))
