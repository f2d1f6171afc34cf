"""The table-gather convolution of a quantised condition against the dense convolution, in float64 and by definition."""

from __future__ import annotations

import random
from typing import Any

import pytest
import rounding
import torch
import torch.nn.functional as F
from torch import Tensor

from hgad_fast import ops
from hgad_fast.ops import condition as condition_module

F64 = torch.float64
BASES = ("position and prototype", "prototype", "nothing")
SHAPES = [  # images, height, width, codes, output channels, taps a side
    (3, 5, 7, 6, 5, 3),
    (2, 4, 4, 1, 3, 3),  # one code
    (1, 6, 5, 40, 4, 3),  # more codes than pixels
    (2, 1, 6, 4, 3, 3),  # both borders at once
    (2, 6, 1, 4, 3, 3),
    (1, 1, 1, 3, 2, 3),
    (2, 2, 3, 5, 1, 3),
    (2, 4, 3, 5, 3, 1),
    (2, 3, 6, 5, 3, 5),
]


def make(
    base: str, images: int, height: int, width: int, codes: int, outputs: int, kernel: int, dtype: torch.dtype = F64
) -> tuple[ops.Condition, Tensor]:
    """A condition and a weight, all of which ask for a gradient; three quarters of the codes occur at the most."""
    d_p, d_e = 3, 4
    d_s = {"position and prototype": d_e + d_p, "prototype": d_p, "nothing": 5}[base]
    drawn = torch.randint(0, codes, (images, height, width))
    condition = ops.Condition(
        indices=drawn - drawn // 4,
        codes=torch.randn(codes, d_s, dtype=dtype, requires_grad=True),
        prototype=torch.randn(images, d_p, dtype=dtype, requires_grad=True),
        position=torch.randn(d_e, height, width, dtype=dtype, requires_grad=True) if d_s == d_e + d_p else None,
        residual=base != "nothing",
        pattern=torch.randn(images, d_s, height, width, dtype=dtype, requires_grad=True),
    )
    return condition, torch.randn(outputs, d_s + d_p, kernel, kernel, dtype=dtype, requires_grad=True)


def by_loops(condition: ops.Condition) -> Tensor:
    """The condition's values, pixel by pixel."""
    images, height, width = condition.indices.shape
    columns = []
    for b in range(images):
        for y in range(height):
            for x in range(width):
                p, value = condition.prototype[b], condition.codes[condition.indices[b, y, x]]
                if condition.residual:
                    at = () if condition.position is None else (condition.position[:, y, x],)
                    value = value + torch.cat([*at, p])
                columns.append(torch.cat([value, p]))
    return torch.stack(columns).view(images, height, width, -1).permute(0, 3, 1, 2)


def result_and_gradients(function: Any, condition: ops.Condition, weight: Tensor, upstream: Tensor) -> list[Tensor]:
    """The result, and the gradients of the weight, the prototype and the pattern."""
    result = function(condition, weight)
    wanted = (weight, condition.prototype, condition.pattern)
    return [result, *torch.autograd.grad(result, wanted, upstream)]


def assert_same(actual: list[Tensor], expected: list[Tensor], bound: float = 1e-12) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.shape == theirs.shape
        assert float((ours - theirs).detach().abs().max()) <= bound * float(theirs.detach().abs().max())


# ---- the dense condition


@pytest.mark.parametrize("base", BASES)
def test_dense_condition_is_base_and_code_and_prototype(base):
    condition, _ = make(base, *SHAPES[0])
    assert torch.equal(ops.dense_condition(condition), by_loops(condition))
    without = ops.dense_condition(condition._replace(pattern=None))
    assert torch.equal(ops.dense_condition(condition), without)


@pytest.mark.parametrize("base", BASES)
def test_dense_condition_passes_the_gradient_straight_through(base):
    """All of the pattern's gradient reaches the pattern; the prototype gets that of its own copy alone."""
    condition, _ = make(base, *SHAPES[0])
    value = ops.dense_condition(condition)
    upstream = torch.randn_like(value)
    leaves = (condition.pattern, condition.prototype, condition.codes, condition.position)
    asked = [leaf for leaf in leaves if leaf is not None]
    gpattern, gprototype, *others = torch.autograd.grad(value, asked, upstream, allow_unused=True)
    d_s = condition.codes.shape[1]
    assert torch.equal(gpattern, upstream[:, :d_s])
    torch.testing.assert_close(gprototype, upstream[:, d_s:].sum((2, 3)))
    assert others == [None] * len(others)


# ---- the convolution


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("base", BASES)
def test_the_tables_give_the_dense_convolution_and_its_gradients(base, shape):
    condition, weight = make(base, *shape)
    result = ops.condition_convolution(condition, weight)
    expected = F.conv2d(by_loops(condition), weight, padding=weight.shape[-1] // 2)
    assert_same([result], [expected])
    upstream = torch.randn_like(result)
    reference = ops.condition_convolution.reference
    assert_same(
        result_and_gradients(ops.condition_convolution, condition, weight, upstream),
        result_and_gradients(reference, condition, weight, upstream),
    )


def test_the_tables_give_the_dense_convolution_at_random_sizes():
    draw = random.Random(0)
    for _ in range(60):
        shape = (draw.randint(1, 3), draw.randint(1, 6), draw.randint(1, 6), draw.randint(1, 9), draw.randint(1, 4))
        condition, weight = make(draw.choice(BASES), *shape, draw.choice([1, 3, 5]))
        upstream = torch.randn(shape[0], shape[4], *shape[1:3], dtype=F64)
        assert_same(
            result_and_gradients(ops.condition_convolution, condition, weight, upstream),
            result_and_gradients(ops.condition_convolution.reference, condition, weight, upstream),
        )


@pytest.mark.parametrize("base", BASES)
def test_codes_and_position_get_no_gradient(base):
    condition, weight = make(base, *SHAPES[0])
    leaves = [leaf for leaf in (condition.codes, condition.position) if leaf is not None]
    ops.condition_convolution(condition, weight).sum().backward(inputs=[*leaves, weight, condition.pattern])
    assert all(leaf.grad is None for leaf in leaves)
    assert weight.grad is not None and condition.pattern.grad is not None


@pytest.mark.parametrize("base", BASES)
def test_gradcheck_of_the_weight(base):
    """The prototype and the pattern have straight-through gradients, which are no derivatives."""
    condition, weight = make(base, 2, 3, 4, 5, 2, 3)
    assert torch.autograd.gradcheck(lambda w: ops.condition_convolution(condition, w), (weight,))


def test_gradcheck_of_the_prototype_where_it_is_no_part_of_the_pattern():
    condition, weight = make("nothing", 2, 3, 4, 5, 2, 3)
    assert torch.autograd.gradcheck(
        lambda p: ops.condition_convolution(condition._replace(prototype=p), weight), (condition.prototype,)
    )


@pytest.mark.parametrize("base", BASES)
def test_float32_is_as_near_as_rounding_allows(base):
    condition, weight = make(base, 2, 5, 4, 6, 3, 3, torch.float32)
    upstream = torch.randn(2, 3, 5, 4)
    actual = result_and_gradients(ops.condition_convolution, condition, weight, upstream)

    def definition(weight: Tensor, upstream: Tensor, indices: Tensor, *parts: Tensor) -> list[Tensor]:
        codes, prototype, pattern, *position = parts
        condition = ops.Condition(indices, codes, prototype, position[0] if position else None, residual, pattern)
        return result_and_gradients(ops.condition_convolution.reference, condition, weight, upstream)

    residual = condition.residual
    position = () if condition.position is None else (condition.position,)
    parts = (condition.codes, condition.prototype, condition.pattern, *position)
    rounding.assert_close(actual, definition, weight, upstream, condition.indices, *parts)


def strided(x: Tensor) -> Tensor:
    """The same values, every other element of a larger tensor and in another order of dimensions."""
    backwards = tuple(reversed(range(x.dim())))
    larger = torch.zeros(*(2 * size for size in reversed(x.shape)), dtype=x.dtype)
    view = larger[tuple(slice(None, None, 2) for _ in x.shape)].permute(backwards)
    view.copy_(x.detach())
    return view.requires_grad_(x.requires_grad)


@pytest.mark.parametrize("base", BASES)
def test_any_layout_of_inputs_and_gradients(base):
    condition, weight = make(base, *SHAPES[0])
    upstream = torch.randn(3, 5, 5, 7, dtype=F64)
    expected = result_and_gradients(ops.condition_convolution.reference, condition, weight, upstream)
    odd = condition._make(strided(x) if isinstance(x, Tensor) else x for x in condition)
    assert not odd.codes.is_contiguous()
    assert_same(result_and_gradients(ops.condition_convolution, odd, strided(weight), strided(upstream)), expected)
    ones = torch.ones((), dtype=F64).expand_as(upstream)
    assert_same(
        result_and_gradients(ops.condition_convolution, condition, weight, ones),
        result_and_gradients(ops.condition_convolution.reference, condition, weight, ones),
    )


def test_a_pattern_is_read_for_its_gradient_only():
    condition, weight = make(BASES[0], *SHAPES[0])
    expected = ops.condition_convolution(condition._replace(pattern=None), weight)
    wild = torch.full_like(condition.pattern, torch.nan)
    assert torch.equal(ops.condition_convolution(condition._replace(pattern=wild), weight), expected)
    frozen = condition._replace(pattern=condition.pattern.detach(), prototype=condition.prototype.detach())
    (gweight,) = torch.autograd.grad(ops.condition_convolution(frozen, weight).sum(), weight)
    (expected_gweight,) = torch.autograd.grad(ops.condition_convolution(condition, weight).sum(), weight)
    assert torch.equal(gweight, expected_gweight)


def test_position_is_read_only_as_a_base():
    condition, weight = make("nothing", *SHAPES[0])
    given = condition._replace(position=torch.randn(4, 5, 7, dtype=F64))
    for function in (ops.condition_convolution, ops.condition_convolution.reference):
        assert torch.equal(function(given, weight), function(condition, weight))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    condition, weight = make(BASES[0], *SHAPES[0])
    expected = ops.condition_convolution(condition, weight)
    with mode():
        result = ops.condition_convolution(condition, weight)
    assert torch.equal(result, expected) and not result.requires_grad


def test_the_result_is_channels_last_and_gradients_repeat():
    condition, weight = make(BASES[0], *SHAPES[0])
    result = ops.condition_convolution(condition, weight)
    assert result.is_contiguous(memory_format=torch.channels_last)
    upstream = torch.randn_like(result)
    once, again = (result_and_gradients(ops.condition_convolution, condition, weight, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_no_copy_of_the_weight_and_no_table_is_kept():
    condition, weight = make(BASES[0], 1, 2, 2, 6, 64, 3)
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        ops.condition_convolution(condition, weight)
    large = [tensor for tensor in kept if tensor.numel() >= 9 * 64]
    assert large and all(tensor.data_ptr() == weight.data_ptr() for tensor in large)


@pytest.mark.parametrize("base", BASES)
def test_a_step_is_one_graph(base):
    condition, weight = make(base, *SHAPES[0])
    compiled = torch.compile(ops.condition_convolution, fullgraph=True, backend="aot_eager")
    upstream = torch.randn(3, 5, 5, 7, dtype=F64)
    assert_same(
        result_and_gradients(compiled, condition, weight, upstream),
        result_and_gradients(ops.condition_convolution, condition, weight, upstream),
    )


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("base", BASES)
def test_the_operator_keeps_its_promises(base, kernel):
    condition, weight = make(base, 2, 4, 3, 5, 3, kernel)
    codes, prototype = condition.codes.detach(), condition.prototype
    windows = None if condition.position is None else torch.randn(4 * kernel**2, 12, dtype=F64)
    bias = torch.randn(3, dtype=F64, requires_grad=True)
    arguments = (weight, codes, prototype, windows, bias, condition.residual)
    torch.library.opcheck(condition_module._condition_rows, arguments)
    gradient = torch.randn_like(condition_module._condition_rows(*arguments))
    for wanted in (True, False):
        tensors = [x.detach() if isinstance(x, Tensor) else x for x in (gradient, weight, codes, prototype, windows)]
        arguments = (*tensors, condition.residual, wanted, wanted)
        torch.library.opcheck(condition_module._condition_rows_backward, arguments)


def test_there_is_no_second_derivative():
    condition, weight = make(BASES[0], *SHAPES[0])
    result = ops.condition_convolution(condition, weight)
    (gradient,) = torch.autograd.grad(result.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


# ---- tables made once


def tables_of(base: str, prototypes: int, dtype: torch.dtype = F64) -> tuple[ops.Condition, Tensor, Tensor, Tensor]:
    """A condition of three images, its weight, all prototypes, and which of them each image has."""
    condition, weight = make(base, *SHAPES[0], dtype)
    known, ids = torch.randn(prototypes, 3, dtype=dtype), torch.randint(0, prototypes, (3,))
    return condition._replace(prototype=known[ids]), weight, known, ids


@pytest.mark.parametrize("prototypes", [1, 4])
@pytest.mark.parametrize("base", BASES)
def test_tables_made_once_give_the_same(base, prototypes):
    condition, weight, known, ids = tables_of(base, prototypes)
    tables = ops.condition_tables(weight, condition.codes, known, condition.position, condition.residual, (5, 7))
    assert_same([ops.convolve_tables(tables, condition.indices, ids)], [ops.condition_convolution(condition, weight)])


@pytest.mark.parametrize("base", BASES)
def test_tables_take_a_bias(base):
    condition, weight, known, ids = tables_of(base, 2)
    bias = torch.randn(len(weight), dtype=F64, requires_grad=True)
    tables = ops.condition_tables(weight, condition.codes, known, condition.position, condition.residual, (5, 7), bias)
    actual = ops.convolve_tables(tables, condition.indices, ids)
    expected = F.conv2d(ops.dense_condition(condition), weight, bias, padding=1)
    assert_same([actual], [expected])
    upstream = torch.randn_like(actual)
    assert_same(*(torch.autograd.grad(result, (weight, bias), upstream) for result in (actual, expected)))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("base", BASES)
def test_an_image_has_the_same_bits_in_any_company(base, dtype):
    condition, weight, known, ids = tables_of(base, 4, dtype)
    tables = ops.condition_tables(weight, condition.codes, known, condition.position, condition.residual, (5, 7))
    together = ops.convolve_tables(tables, condition.indices, ids)
    for b in range(3):
        assert torch.equal(ops.convolve_tables(tables, condition.indices[b : b + 1], ids[b : b + 1])[0], together[b])


def test_tables_are_as_small_as_said():
    """k k rows a code, sixteen a prototype and one a pixel: what the memory of a block is."""
    condition, weight, known, _ = tables_of(BASES[0], 4)
    tables = ops.condition_tables(weight, condition.codes, known, condition.position, True, (5, 7))
    assert tables.rows.shape == (9 * (6 + 1) + 16 * 4 + 5 * 7, 5)


# ---- what does not fit


@pytest.mark.parametrize(
    "change, message",
    [
        ({"indices": torch.zeros(5, 7, dtype=torch.int64)}, r"indices \(5, 7\) must be \(B, H, W\)"),
        ({"indices": torch.zeros(3, 5, 7, dtype=torch.int32)}, "indices must be int64"),
        ({"indices": torch.full((3, 5, 7), 6)}, "indices reach from 6 to 6; allowed are 0 to 5"),
        ({"indices": torch.full((3, 5, 7), -1)}, "indices reach from -1 to -1"),
        ({"codes": torch.randn(6, 8, dtype=F64)}, "have 8 channels; their base has 7"),
        ({"codes": torch.randn(0, 7, dtype=F64)}, r"codes \(0, 7\) must be \(K, D_s\)"),
        ({"prototype": torch.randn(2, 3, dtype=F64)}, r"prototype \(2, 3\) must be \(B, D_p\), here with B = 3"),
        ({"prototype": torch.randn(3, dtype=F64)}, r"prototypes \(3,\) must be"),
        ({"position": torch.randn(4, 7, 5, dtype=F64)}, r"position \(4, 7, 5\) must be \(D_e, H, W\)"),
        ({"position": None}, "have 7 channels; their base has 3"),
        ({"pattern": torch.randn(3, 6, 5, 7, dtype=F64)}, r"pattern \(3, 6, 5, 7\) must be \(B, D_s, H, W\)"),
    ],
)
def test_conditions_that_do_not_fit(change, message):
    condition, weight = make(BASES[0], *SHAPES[0])
    wrong = condition._replace(**change)
    with pytest.raises(ValueError, match=message):
        ops.condition_convolution(wrong, weight)
    with pytest.raises(ValueError, match=message):
        ops.dense_condition(wrong)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((5, 9, 3, 3), "reads 9 channels; the condition has 10"),
        ((5, 10, 2, 2), "with k odd"),
        ((5, 10, 3, 1), "with k odd"),
        ((5, 10), "with k odd"),
    ],
)
def test_weights_that_do_not_fit(shape, message):
    condition, _ = make(BASES[0], *SHAPES[0])
    with pytest.raises(ValueError, match=message):
        ops.condition_convolution(condition, torch.randn(shape, dtype=F64))


def test_tables_that_do_not_fit():
    condition, weight, known, ids = tables_of(BASES[0], 4)
    arguments = (weight, condition.codes, known, condition.position, True)
    with pytest.raises(ValueError, match=r"here with \(H, W\) = \(7, 5\)"):
        ops.condition_tables(*arguments, (7, 5))
    with pytest.raises(ValueError, match=r"bias \(4,\) must be \(m,\), here \(5,\)"):
        ops.condition_tables(*arguments, (5, 7), torch.zeros(4, dtype=F64))
    tables = ops.condition_tables(*arguments, (5, 7))
    with pytest.raises(ValueError, match=r"indices \(3, 7, 5\) must be \(B, H, W\), here with \(H, W\) = \(5, 7\)"):
        ops.convolve_tables(tables, condition.indices.mT, ids)
    with pytest.raises(ValueError, match=r"prototype_ids \(2,\) must be \(B,\), here \(3,\)"):
        ops.convolve_tables(tables, condition.indices, ids[:2])
    with pytest.raises(ValueError, match="prototype_ids reach from 4 to 4; allowed are 0 to 3"):
        ops.convolve_tables(tables, condition.indices, torch.full((3,), 4))
    with pytest.raises(ValueError, match="indices reach from 6 to 6; allowed are 0 to 5"):
        ops.convolve_tables(tables, torch.full_like(condition.indices, 6), ids)
