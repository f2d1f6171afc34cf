"""Vector quantisation by definition: the nearest codes and their statistics, against float64 and additions in order."""

from __future__ import annotations

import numpy as np
import pytest
import rounding
import torch
from codes import SIZES, assert_nearest, draw, draw_near_ties, squared_distances, strided, sums_in_order
from golden import FOLDER
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hgad_fast import ops
from hgad_fast.bench.timing import peak_memory
from hgad_fast.ops import codebook

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
CPU = torch.device("cpu")


# the nearest code


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_nearest_code(sizes, dtype):
    x, codes = draw(*sizes, dtype)
    assert_nearest(ops.nearest_code(x, codes), x, codes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nearest_code_is_right_wherever_rounding_leaves_a_choice(dtype):
    x, codes = draw_near_ties(dtype=dtype)
    assert_nearest(ops.nearest_code(x, codes), x, codes)
    with pytest.raises(AssertionError, match="farther than the nearest"):  # of codes in half precision
        assert_nearest(ops.nearest_code(x, codes.bfloat16()), x, codes)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_nearest_code_at_every_magnitude(scale):
    x, codes = (scale * t for t in draw(70, 12, 9))
    assert_nearest(ops.nearest_code(x, codes), x, codes)


def test_nearest_code_of_rows_far_from_zero():
    """There the expansion cancels, and the bound grows with it."""
    x, codes = (1000 + t for t in draw(70, 12, 9))
    assert_nearest(ops.nearest_code(x, codes), x, codes)


@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 9), st.sampled_from(DTYPES), st.integers(0, 2**31))
def test_nearest_code_of_any_sizes(n, d, k, dtype, seed):
    torch.manual_seed(seed)
    x, codes = draw(n, d, k, dtype)
    assert_nearest(ops.nearest_code(x, codes), x, codes)


@pytest.mark.parametrize("name", ["fresh", "trained"])
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_nearest_code_is_golden(name, precision):
    """What the official quantiser found, in its two precisions."""
    with np.load(FOLDER / "vqflow_dev_quantize.npz") as golden:
        x, embed = (torch.from_numpy(golden[f"{name}/{key}"]) for key in ("x0", "state0/embed"))
        expected, distances, margin = (
            torch.from_numpy(golden[f"{name}/f64/eval/{key}"]) for key in ("ind", "sqdist", "min_margin")
        )
    x = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).to(precision)
    found = ops.nearest_code(x, embed.T)
    assert torch.equal(found.view_as(expected), expected)
    rounding.assert_close(distances, squared_distances, x, embed.T, precision=torch.float64)
    nearest = distances.topk(2, largest=False).values
    assert (nearest[:, 1] - nearest[:, 0]).min() == margin


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_of_equally_near_codes_wins(monkeypatch, dtype):
    """Whole numbers, so that nothing is rounded; also when the equals are far apart."""
    x = torch.randint(-3, 4, (40, 5)).to(dtype)
    codes = torch.randint(-1, 2, (30, 5)).float().repeat(3, 1)
    monkeypatch.setattr(codebook, "CHUNK_BYTES", 4000)
    assert torch.equal(ops.nearest_code(x, codes), squared_distances(x, codes).argmin(1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_codes_of_nan(dtype):
    """A row with NaN gets code 0; a code with NaN gets no row, and does not change what others get."""
    x, codes = draw(40, 5, 7, dtype)
    expected = ops.nearest_code(x, codes[1:])
    codes[0, 3] = torch.nan
    assert torch.equal(ops.nearest_code(x, codes), expected + 1)
    x[[3, 20], [1, 4]] = torch.nan
    expected[[3, 20]] = -1
    assert torch.equal(ops.nearest_code(x, codes), expected + 1)
    assert torch.equal(ops.nearest_code(x, codes * torch.nan), torch.zeros(40, dtype=torch.int64))
    x[7, 2], x[8, 1] = torch.inf, -torch.inf
    indices = ops.nearest_code(x, codes)
    assert 0 <= indices.min() and indices.max() < 7


@pytest.mark.parametrize("dtype", DTYPES)
def test_nearest_code_of_other_strides(dtype):
    x, codes = draw(50, 12, 9, dtype)
    for rows in strided(x).values():
        for table in strided(codes).values():
            assert_nearest(ops.nearest_code(rows, table), x, codes)


def test_nearest_code_of_nothing():
    assert ops.nearest_code(torch.zeros(0, 3), torch.zeros(2, 3)).shape == (0,)


def test_no_gradient():
    x, codes = (t.requires_grad_() for t in draw(20, 5, 7))
    indices = ops.nearest_code(x, codes)
    assert not indices.requires_grad and not any(t.requires_grad for t in ops.code_statistics(x, indices, 7))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_matrix_of_distances_never_exists(dtype):
    """A batch of VQ-Flow, all levels together, would need 104 MB for it in float32, and a float32 copy of x 117 MB."""
    x, codes = torch.randn(50_688, 576).to(dtype), torch.randn(576, 512).T
    assert peak_memory(lambda: ops.nearest_code(x, codes), CPU) < 10e6


def test_autocast_rounds_no_distance():
    x, codes = draw_near_ties()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_nearest(ops.nearest_code(x, codes), x, codes)


def test_chunks_change_nothing_but_rounding(monkeypatch):
    x, codes = draw_near_ties()
    for size in (1, 5000, 10**9):
        monkeypatch.setattr(codebook, "CHUNK_BYTES", size)
        assert_nearest(ops.nearest_code(x, codes), x, codes)


def test_both_compile_without_graph_breaks():
    x, codes = draw(20, 5, 7)

    def quantise(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        return ops.code_statistics(x, ops.nearest_code(x, codes), 7)

    compiled = torch.compile(quantise, fullgraph=True, backend="aot_eager")
    for value, right in zip(compiled(x, codes), quantise(x, codes), strict=True):
        assert torch.equal(value, right)


# statistics


def statistics(x: Tensor, indices: Tensor, K: int) -> tuple[Tensor, Tensor]:
    one_hot = torch.nn.functional.one_hot(indices, K).to(x.dtype)
    return one_hot.sum(0), one_hot.T @ x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_statistics_have_the_bits_of_additions_in_order(sizes, dtype):
    n, d, k = sizes
    x, indices = torch.randn(n, d).to(dtype), torch.randint(k, (n,))
    actual, expected = ops.code_statistics(x, indices, k), sums_in_order(x, indices, k)
    for value, right in zip(actual, expected, strict=True):
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(value, right)


@pytest.mark.parametrize("collapsed", [False, True])
def test_statistics(collapsed):
    """Against a one-hot product; also where one code owns all rows."""
    x, indices = torch.randn(3000, 12), torch.randint(1 if collapsed else 20, (3000,))
    rounding.assert_close(ops.code_statistics(x, indices, 20), lambda x: statistics(x, indices, 20), x)


def test_statistics_depend_on_the_order_within_a_code_only():
    """Codes may come in any order among each other, and memory in any strides: no bit changes."""
    x, indices = torch.randn(300, 12), torch.randint(7, (300,))
    expected = ops.code_statistics(x, indices, 7)
    by_code = indices.argsort(stable=True)
    variants = [(x[by_code], indices[by_code]), (x, indices)]
    variants += [(rows, indices) for rows in strided(x).values()]
    variants += [(x, indices.repeat_interleave(2)[::2])]
    for variant in variants:
        for value, right in zip(ops.code_statistics(*variant, 7), expected, strict=True):
            assert torch.equal(value, right)


def test_statistics_of_expanded_rows():
    row, indices = torch.randn(12), torch.randint(7, (300,))
    actual = ops.code_statistics(row.expand(300, 12), indices, 7)
    for value, right in zip(actual, ops.code_statistics(row.repeat(300, 1), indices, 7), strict=True):
        assert torch.equal(value, right)


def test_statistics_of_nan_stay_with_their_code():
    x, indices = torch.randn(30, 4), torch.arange(30) % 5
    x[7, 2] = torch.nan
    _, sums = ops.code_statistics(x, indices, 6)
    assert sums.isnan().nonzero().tolist() == [[2, 2]] and torch.equal(sums[5], torch.zeros(4))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_statistics_of_nothing(shape):
    indices = torch.zeros(shape[0], dtype=torch.int64)
    counts, sums = ops.code_statistics(torch.zeros(shape), indices, 3)
    assert counts.tolist() == [shape[0], 0, 0] and torch.equal(sums, torch.zeros(3, shape[1]))


def test_no_one_hot_matrix_exists():
    """For a batch of VQ-Flow, all levels together, it would have 208 MB in int64, and 104 MB in float32."""
    x, indices = torch.randn(50_688, 16), torch.randint(512, (50_688,))
    assert peak_memory(lambda: ops.code_statistics(x, indices, 512), CPU) < 5e6


# what does not fit


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_does_not_fit_is_refused(interpreted, backend):
    x, codes = torch.randn(6, 4), torch.randn(3, 4)
    indices = torch.tensor([0, 1, 2, 0, 1, 2])
    for arguments, message in (
        ((x, codes[:, :3]), r"x \(6, 4\) must be \(N, D\), and codes \(3, 3\) then \(K, D\)"),
        ((x[0], codes), r"x \(4,\) must be"),
        ((x, codes[0]), r"codes \(4,\) then"),
        ((x, codes[:0]), r"codes \(0, 4\) then \(K, D\), with at least one of each"),
        ((x[:, :0], codes[:, :0]), "with at least one of each"),
        ((x.long(), codes), "x is torch.int64; it must be of a floating-point type"),
        ((x, codes.long()), "codes is torch.int64"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.nearest_code(*arguments, backend=backend)
    for arguments, message in (
        ((x, indices[:5], 3), r"x \(6, 4\) must be \(N, D\), and indices \(5,\) then \(N,\)"),
        ((x[0], indices[:4], 3), r"x \(4,\) must be"),
        ((x.long(), indices, 3), "x is torch.int64"),
        ((x, indices.int(), 3), "indices are torch.int32; they must be torch.int64"),
        ((x, indices, 0), "K is 0; a codebook has at least one code"),
        ((x, indices, 2), "indices name a code 2; allowed are 0 to 1"),
        ((x, indices - 1, 3), "indices name a code -1; allowed are 0 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.code_statistics(*arguments, backend=backend)


def test_where_nobody_looks_indices_beyond_the_codes_count_as_the_nearest():
    x, indices = torch.randn(30, 4), torch.randint(-2, 6, (30,))
    actual = ops.code_statistics.reference(x, indices, 3)
    for value, right in zip(actual, ops.code_statistics(x, indices.clamp(0, 2), 3), strict=True):
        assert torch.equal(value, right)
