"""Distances to the Gaussians of places by definition, against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from gaussians import SIZES, assert_distances, draw, strided
from hypothesis import given
from hypothesis import strategies as st

from hgad_fast import ops
from hgad_fast.bench.timing import peak_memory
from hgad_fast.ops import place as places

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
SMALL = 40, 6, 3, 12, 9
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_distances(sizes, dtype):
    inputs = draw(*sizes, dtype)
    assert_distances(ops.place_distances(*inputs), *inputs)


@given(
    st.tuples(*(st.integers(low, high) for low, high in ((0, 40), (1, 9), (1, 3), (1, 20), (1, 20)))),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)
def test_distances_of_any_sizes(sizes, dtype, seed):
    torch.manual_seed(seed)
    inputs = draw(*sizes, dtype)
    assert_distances(ops.place_distances(*inputs), *inputs)


@pytest.mark.parametrize("images", [1, 2, 9])
@pytest.mark.parametrize("chunk", [1, 2000, 4 << 20])
@pytest.mark.parametrize("by_rows", [False, True])
def test_distances_of_images(monkeypatch, images, chunk, by_rows):
    """All places in order, image after image, with matrices stored either way, and chunks of any size."""
    monkeypatch.setattr(places, "CHUNK_BYTES", chunk)
    x, _, mean, factor = draw(images * 6, 6, 2, 12, 9)
    factor = factor.mT.contiguous().mT if by_rows else factor
    place = torch.arange(6).repeat(images)
    assert_distances(ops.place_distances(x, place, mean, factor), x, place, mean, factor)


@pytest.mark.parametrize("chunk", [1, 2000, 4 << 20])
def test_distances_of_uneven_places(monkeypatch, chunk):
    """From none to 90 pixels a place, in any order; chunks split places, and join them."""
    monkeypatch.setattr(places, "CHUNK_BYTES", chunk)
    counts = [0, 90, 1, 1, 0, 4, 5, 17, 2, 0]
    place = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    place = place[torch.randperm(len(place))]
    x, _, mean, factor = draw(len(place), len(counts), 2, 12, 9)
    assert_distances(ops.place_distances(x, place, mean, factor), x, place, mean, factor)


def test_less_than_float32_would_show():
    x, place, mean, factor = draw(*SMALL)
    with pytest.raises(AssertionError):
        assert_distances(ops.place_distances(x, place, mean, factor.bfloat16()), x, place, mean, factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tables", [torch.bfloat16, torch.float32, torch.float64])
def test_the_pixels_say_in_what_precision(dtype, tables):
    x, place, mean, factor = draw(*SMALL, dtype, tables)
    actual = ops.place_distances(x, place, mean, factor)
    assert_distances(actual, x, place, mean.to(dtype), factor.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_distances_of_other_strides(dtype):
    x, place, mean, factor = inputs = draw(*SMALL, dtype)
    for i in (0, 2, 3):
        for view in strided(inputs[i]).values():
            changed = *inputs[:i], view, *inputs[i + 1 :]
            assert_distances(ops.place_distances(*changed), *inputs)
    expanded = factor[:1, :1].expand_as(factor)
    assert_distances(ops.place_distances(x, place, mean, expanded), x, place, mean, expanded)
    every_second = place.repeat_interleave(2)[::2]
    assert_distances(ops.place_distances(x, every_second, mean, factor), *inputs)


def test_distances_of_some_of_the_channels():
    """A Gaussian of the first channels takes views of what is there of all."""
    x, place, mean, factor = draw(*SMALL)
    x, mean, factor = x[:, :7], mean[..., :7], factor[:, :, :7, :5]
    assert_distances(ops.place_distances(x, place, mean, factor), x, place, mean, factor)


def test_a_pixel_alone_at_its_place_has_the_same_bits_in_any_company():
    x, _, mean, factor = draw(12, 12, 3, 20, 20)
    place = torch.randperm(12)
    expected, some = ops.place_distances(x, place, mean, factor), torch.randperm(12)[:7]
    assert torch.equal(ops.place_distances(x[some], place[some], mean, factor), expected[some])
    assert torch.equal(ops.place_distances(x, place, mean[1:], factor[1:]), expected[:, 1:])


def test_what_is_not_finite_stays_with_its_pixel_and_its_class():
    x, place, mean, factor = draw(*SMALL)
    expected = ops.place_distances(x, place, mean, factor)
    x[2, 3], x[5, 1] = torch.nan, torch.inf
    actual = ops.place_distances(x, place, mean, factor)
    assert actual[2].isnan().all() and not actual[5].isfinite().any()
    others = torch.ones(len(x), dtype=torch.bool)
    others[[2, 5]] = False
    assert torch.equal(actual[others], expected[others])
    mean[1, 0, 4], factor[1, 2, 1, 0] = torch.nan, torch.nan
    actual, hit = ops.place_distances(x, place, mean, factor), (place == 0) | (place == 2)
    assert hit.any() and actual[hit, 1].isnan().all()
    assert torch.equal(actual[others, 0], expected[others, 0])
    assert torch.equal(actual[others & ~hit, 1], expected[others & ~hit, 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_distances_of_nothing(dtype):
    x, place, mean, factor = draw(0, 6, 3, 12, 9, dtype)
    assert_distances(ops.place_distances(x, place, mean, factor), x, place, mean, factor)


def test_no_gradient():
    x, place, mean, factor = draw(*SMALL)
    assert not ops.place_distances(x.requires_grad_(), place, mean.requires_grad_(), factor).requires_grad


def test_autocast_rounds_no_distance():
    inputs = draw(*SMALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = ops.place_distances(*inputs)
    assert_distances(actual, *inputs)


@pytest.mark.parametrize("images", [1, 64])
def test_no_pixel_has_a_matrix_of_its_own(images):
    """For 64 images these would take 134 MB, and the matrices of a single class in float64 4 MB."""
    x, _, mean, factor = draw(images * 32, 32, 4, 128, 128)
    place = torch.arange(32).repeat(images)
    assert peak_memory(lambda: ops.place_distances(x, place, mean, factor), CPU) < 1.5 * places.CHUNK_BYTES


def test_it_compiles_without_graph_breaks():
    inputs = draw(*SMALL)

    def twice(*inputs: torch.Tensor) -> torch.Tensor:
        return 2 * ops.place_distances(*inputs)

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), twice(*inputs))


def test_the_compiler_is_told_the_right_sizes_and_strides():
    torch.library.opcheck(torch.ops.hgad_fast.place_distances.default, draw(*SMALL))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_does_not_fit_is_refused(interpreted, backend):
    x, place, mean, factor = draw(6, 3, 2, 4, 5)
    for arguments, message in (
        ((x[0], place, mean, factor), r"x \(4,\) must be \(N, D\), and place \(6,\) then \(N,\)"),
        ((x, place[:5], mean, factor), r"x \(6, 4\) must be \(N, D\), and place \(5,\) then"),
        ((x, place, mean[0], factor), r"mean \(3, 4\) must be \(K, P, D\)"),
        ((x[:, :3], place, mean, factor), r"mean \(2, 3, 4\) must be \(K, P, D\) with D = 3 as in x \(6, 3\)"),
        ((x, place, mean[:0], factor[:0]), "at least one of each"),
        ((x, place, mean[:, :0], factor[:, :0]), "at least one of each"),
        ((x, place, mean, factor[0]), r"factor \(3, 4, 5\) must be \(K, P, D, M\)"),
        ((x, place, mean, factor[:, :2]), r"factor \(2, 2, 4, 5\) must be \(K, P, D, M\) with K, P, D of mean"),
        ((x, place, mean, factor[..., :0]), "at least one column"),
        ((x.long(), place, mean, factor), "x is torch.int64; it must be of a floating-point type"),
        ((x, place, mean.long(), factor), "mean is torch.int64"),
        ((x, place, mean, factor.long()), "factor is torch.int64"),
        ((x, place.int(), mean, factor), "place is torch.int32; it must be torch.int64"),
        ((x, place + 3, mean, factor), "place names a place [3-5]; allowed are 0 to 2"),
        ((x, place - 3, mean, factor), "place names a place -[1-3]; allowed are 0 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.place_distances(*arguments, backend=backend)


def test_where_nobody_looks_places_beyond_the_last_count_as_the_nearest():
    x, place, mean, factor = draw(*SMALL)
    place[:4] = torch.tensor([-1, -(2**40), mean.shape[1], 2**40])
    actual = ops.place_distances.reference(x, place, mean, factor)
    assert_distances(actual, x, place.clamp(0, mean.shape[1] - 1), mean, factor)
