"""The kernels of vector quantisation on Triton's interpreter, against float64 and bit by bit against the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from codes import SIZES, assert_nearest, draw, draw_near_ties, squared_distances, strided, sums_in_order
from golden import FOLDER

from hgad_fast import ops

pytestmark = pytest.mark.usefixtures("nan_memory")

DTYPES = (torch.float32, torch.bfloat16)


# the nearest code


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_nearest_code(interpreted, sizes, dtype):
    x, codes = draw(*sizes, dtype)
    assert_nearest(interpreted.codebook.nearest_code(x, codes), x, codes)


@pytest.fixture
def split(interpreted, monkeypatch) -> None:
    """Products of tf32 pieces, as NVIDIA's cards compute them; the interpreter adds what they leave out."""
    monkeypatch.setattr(interpreted.centres, "FLOAT32", "tf32x3")
    for module in (interpreted.centres, interpreted.codebook):
        monkeypatch.setattr(module, "SPLIT", True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pieces", [1, 2])
def test_nearest_code_is_right_wherever_rounding_leaves_a_choice(interpreted, request, pieces, dtype):
    if pieces == 2:
        request.getfixturevalue("split")
    x, codes = draw_near_ties(dtype=dtype)
    assert_nearest(interpreted.codebook.nearest_code(x, codes), x, codes)


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("piece", [0, 1])
def test_every_piece_of_the_codes_counts(interpreted, monkeypatch, piece):
    x, codes = draw_near_ties()
    prepare = interpreted.codebook.Codebook.prepare

    def lossy(codes: torch.Tensor):
        codebook = prepare(codes)
        codebook.table[piece] = 0
        return codebook

    monkeypatch.setattr(interpreted.codebook.Codebook, "prepare", lossy)
    with pytest.raises(AssertionError, match="farther than the nearest"):
        assert_nearest(interpreted.codebook.nearest_code(x, codes), x, codes)


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_nearest_code_of_split_factors(interpreted, sizes, dtype):
    """Pieces are tf32, and their products, without those of the small ones, are as exact as float32."""
    x, codes = draw(*sizes, dtype)
    assert_nearest(interpreted.codebook.nearest_code(x, codes), x, codes)
    table = interpreted.codebook.Codebook.prepare(codes).table
    assert table.shape[0] == 2 and not (table.view(torch.int32) & 0x1FFF).any()
    pieces = table.sum(0)[: len(codes), : codes.shape[1]]
    assert ((pieces - codes).abs() <= 2.0**-22 * codes.abs()).all()


def test_nearest_code_of_many_rows_has_larger_tiles(interpreted, monkeypatch):
    x, codes = draw(150, 37, 70)
    monkeypatch.setattr(interpreted.codebook, "FEW_PIXELS", 0)
    monkeypatch.setitem(interpreted.common.TILES["codes"], "interpreter", interpreted.common.TILES["codes"]["sm_90"])
    assert_nearest(interpreted.codebook.nearest_code(x, codes), x, codes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nearest_code_of_any_sizes(interpreted, dtype):
    for n, d, k in zip(*(torch.randint(1, size, (20,)).tolist() for size in (40, 40, 90)), strict=True):
        x, codes = draw(n, d, k, dtype)
        assert_nearest(interpreted.codebook.nearest_code(x, codes), x, codes)


@pytest.mark.parametrize("name", ["fresh", "trained"])
def test_nearest_code_is_golden(interpreted, name):
    x, embed, expected = golden(name)
    found = interpreted.codebook.nearest_code(x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]), embed.T)
    assert torch.equal(found.view_as(expected), expected)


def golden(name: str) -> list[torch.Tensor]:
    with np.load(FOLDER / "vqflow_dev_quantize.npz") as arrays:
        keys = "x0", "state0/embed", "f32/eval/ind"
        return [torch.from_numpy(arrays[f"{name}/{key}"]) for key in keys]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("copies", [2, 5])  # equals in one block of codes, and in several
def test_the_first_of_equally_near_codes_wins(interpreted, dtype, copies):
    x = torch.randint(-3, 4, (40, 5)).to(dtype)
    codes = torch.randint(-1, 2, (30, 5)).float().repeat(copies, 1)
    assert torch.equal(interpreted.codebook.nearest_code(x, codes), squared_distances(x, codes).argmin(1))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, on infinity less infinity
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_codes_of_nan_are_treated_as_by_the_definition(interpreted, dtype):
    x, codes = draw(40, 5, 70, dtype)
    codes[[0, 66], [3, 1]] = torch.nan
    x[[3, 20], [1, 4]] = torch.nan
    indices = interpreted.codebook.nearest_code(x, codes)
    assert torch.equal(indices, ops.nearest_code.reference(x, codes)) and not indices[[3, 20]].any()
    assert torch.equal(interpreted.codebook.nearest_code(x, codes * torch.nan), torch.zeros(40, dtype=torch.int64))
    x[7, 2], x[8, 1] = torch.inf, -torch.inf
    indices = interpreted.codebook.nearest_code(x, codes)
    assert 0 <= indices.min() and indices.max() < 70


@pytest.mark.parametrize("dtype", DTYPES)
def test_nearest_code_of_other_strides(interpreted, dtype):
    x, codes = draw(50, 12, 9, dtype)
    expected = interpreted.codebook.nearest_code(x, codes)
    assert_nearest(expected, x, codes)
    for rows in strided(x).values():
        for table in strided(codes).values():
            assert torch.equal(interpreted.codebook.nearest_code(rows, table), expected)


def test_nearest_code_of_nothing(interpreted, launches):
    assert interpreted.codebook.nearest_code(torch.zeros(0, 3), torch.zeros(2, 3)).shape == (0,)
    assert launches == {}


def test_more_codes_than_offsets_reach_are_refused(interpreted):
    with pytest.raises(ValueError, match="4194304 codes of 1000 channels are more than"):
        interpreted.codebook.nearest_code(torch.zeros(1, 1000), torch.zeros(1, 1).expand(2**22, 1000))


def test_codes_that_moved_are_seen(interpreted, launches):
    """A codebook learns in place, as the columns of a buffer (D, K), also where nobody counts its changes."""
    x, codes = draw(20, 5, 7)
    embed = codes.T.clone()
    for _ in range(2):
        launches.clear()
        assert torch.equal(interpreted.codebook.nearest_code(x, embed.T), ops.nearest_code.reference(x, embed.T))
        assert launches == {"_prepare_codes_kernel": 1, "_nearest_kernel": 1}
        embed.data.mul_(-1)


def test_operations_take_the_kernels(interpreted, launches):
    x, codes = (t.requires_grad_() for t in draw(20, 5, 7))
    indices = ops.nearest_code(x, codes)
    counts, sums = ops.code_statistics(x, indices, 7)
    assert launches == {"_prepare_codes_kernel": 1, "_nearest_kernel": 1, "_sum_kernel": 1}
    assert not indices.requires_grad and not counts.requires_grad and not sums.requires_grad
    assert_nearest(indices, x.detach(), codes.detach())


# statistics


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_statistics_have_the_bits_of_additions_in_order(interpreted, sizes, dtype):
    n, d, k = sizes
    x, indices = torch.randn(n, d).to(dtype), torch.randint(k, (n,))
    actual, expected = interpreted.codebook.code_statistics(x, indices, k), sums_in_order(x, indices, k)
    for value, right, defined in zip(actual, expected, ops.code_statistics.reference(x, indices, k), strict=True):
        assert value.dtype == torch.float32
        assert torch.equal(value, right) and torch.equal(value, defined)


@pytest.mark.parametrize("rows", [15, 16, 17, 400])  # a program takes 16 at a time
def test_statistics_of_a_code_that_owns_all_rows(interpreted, rows):
    x, indices = torch.randn(rows, 300), torch.full((rows,), 2)
    actual = interpreted.codebook.code_statistics(x, indices, 4)
    for value, right in zip(actual, sums_in_order(x, indices, 4), strict=True):
        assert torch.equal(value, right)


def test_statistics_of_other_strides(interpreted):
    x, indices = torch.randn(100, 12), torch.randint(7, (100,))
    expected = sums_in_order(x, indices, 7)
    variants = [*strided(x).values(), x]
    for rows in variants:
        actual = interpreted.codebook.code_statistics(rows, indices.repeat_interleave(2)[::2], 7)
        for value, right in zip(actual, expected, strict=True):
            assert torch.equal(value, right)


def test_statistics_of_nan_stay_with_their_code(interpreted):
    x, indices = torch.randn(30, 4), torch.arange(30) % 5
    x[7, 2] = torch.nan
    _, sums = interpreted.codebook.code_statistics(x, indices, 6)
    assert sums.isnan().nonzero().tolist() == [[2, 2]] and torch.equal(sums[5], torch.zeros(4))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_statistics_of_nothing(interpreted, shape):
    indices = torch.zeros(shape[0], dtype=torch.int64)
    counts, sums = interpreted.codebook.code_statistics(torch.zeros(shape), indices, 3)
    assert counts.tolist() == [shape[0], 0, 0] and torch.equal(sums, torch.zeros(3, shape[1]))


def test_indices_beyond_the_codes_count_as_the_nearest(interpreted):
    """On a GPU nobody can look at them in time: at least nothing outside of a table is read or written."""
    x, indices = torch.randn(30, 4), torch.randint(-2, 6, (30,))
    actual = interpreted.codebook.code_statistics(x, indices, 3)
    for value, right in zip(actual, sums_in_order(x, indices.clamp(0, 2), 3), strict=True):
        assert torch.equal(value, right)
