"""Distances of pixels to the Gaussians of their places by definition: against one product a pixel in float64."""

from __future__ import annotations

import importlib
import itertools

import pytest
import rounding
import torch
from hypothesis import given
from hypothesis import strategies as st
from places import PLACES, SIZES, assert_right, draw, right, strided

from hgad_fast import ops
from hgad_fast.bench.timing import peak_memory

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
CPU = torch.device("cpu")
DEFINITION = importlib.import_module("hgad_fast.ops.place")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES.keys())
def test_distances(places, sizes, dtype):
    x, place, mean, factor = draw(places(sizes[1]), *sizes, dtype)
    for table in (factor, factor.mT.contiguous().mT):
        assert_right(ops.place_distances(x, place, mean, table), x, place, mean, table)


@pytest.mark.parametrize("which", ["x", "mean", "factor", "places"])
def test_an_error_of_a_ten_thousandth_is_found(which):
    """The tolerance is not what lets the tests pass."""
    inputs = dict(zip(("x", "places", "mean", "factor"), draw(PLACES["any"](7), 2, 7, 37, 5), strict=True))
    wrong = {name: tensor.clone() for name, tensor in inputs.items()}
    if which == "places":
        wrong[which][3] = (wrong[which][3] + 1) % 7
    else:
        wrong[which] *= 1.0001
    with pytest.raises(AssertionError, match="rounding explains"):
        assert_right(ops.place_distances(*wrong.values()), *inputs.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("places", ["one image", "images", "any"])
def test_other_strides(places, dtype):
    x, place, mean, factor = inputs = draw(PLACES[places](7), 2, 7, 20, 6, dtype)
    expected = rounding.exact_and_tolerance(right, *inputs, precision=torch.promote_types(dtype, torch.float32))
    for rows, means, table in itertools.product(*(strided(t).values() for t in (x, mean, factor))):
        rounding.assert_within(ops.place_distances(rows, place, means, table), *expected)


def test_first_variables_of_wider_tables():
    """As a place Gaussian reads them: views of mean and factor, whose matrices are not contiguous."""
    x, place, mean, factor = draw(torch.arange(9).repeat(2), 3, 9, 24, 24)
    for table in (factor, factor.mT.contiguous().mT):
        views = x[:, :16], place, mean[..., :16], table[..., :16, :16]
        assert_right(ops.place_distances(*views), *(view.clone() for view in views))


@pytest.mark.parametrize("size", [1, 700, 5000])
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES.keys())
def test_chunks(monkeypatch, places, size):
    monkeypatch.setattr(DEFINITION, "CHUNK_BYTES", size)
    x, place, mean, factor = draw(places(6), 2, 6, 11, 4)
    for table in strided(factor).values():
        assert_right(ops.place_distances(x, place, mean, table), x, place, mean, factor)


@given(
    st.lists(st.integers(0, 8), max_size=70),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)
def test_distances_of_any_places(places, K, d, m, dtype, seed):
    torch.manual_seed(seed)
    inputs = draw(torch.tensor(places, dtype=torch.int64), K, 9, d, m, dtype)
    assert_right(ops.place_distances(*inputs), *inputs)


def test_they_are_mahalanobis_distances():
    """Against a solution with the covariance itself."""
    x, place, mean, root = draw(torch.arange(5).repeat(2), 3, 5, 6, 6, torch.float64)
    covariance = root @ root.mT + torch.eye(6, dtype=torch.float64)
    factor = torch.linalg.inv(torch.linalg.cholesky(covariance)).mT
    offsets = x - mean[:, place]
    expected = (offsets * torch.linalg.solve(covariance[:, place], offsets)).sum(2).T
    torch.testing.assert_close(
        ops.place_distances(x, place, mean, factor), expected, rtol=rounding.SAME_IN_FLOAT64, atol=0
    )


@pytest.mark.parametrize("transposed", [False, True])
def test_parts_of_an_image(transposed):
    """Any pixels of it, in any order, for any classes, and with the tables of their places alone."""
    x, place, mean, factor = draw(torch.arange(64), 3, 64, 48, 48)
    factor = factor.mT.contiguous().mT if transposed else factor
    for some in (place[:1], place[5:20], place[::3], torch.randperm(64), place[[63, 0]]):
        for classes in (slice(None), slice(1, 2)):
            part = x[some], place[some], mean[classes], factor[classes]
            assert_right(ops.place_distances(*part), *part)
    tile = slice(16, 40)
    part = x[tile], place[:24], mean[:, tile], factor[:, tile]
    assert_right(ops.place_distances(*part), *part)


def test_pixels_that_are_not_finite():
    x, place, mean, factor = draw(torch.arange(6).repeat(3), 2, 6, 5, 5)
    expected = ops.place_distances(x, place, mean, factor)
    x[3, 2], x[7, 1], x[11, 4] = torch.nan, torch.inf, -torch.inf
    distances = ops.place_distances(x, place, mean, factor)
    bad = torch.zeros(18, dtype=torch.bool)
    bad[[3, 7, 11]] = True
    assert not distances[bad].isfinite().any() and torch.equal(distances[~bad], expected[~bad])


def test_no_gradient():
    x, place, mean, factor = draw(torch.arange(4), 2, 4, 5, 3)
    tracked = x.requires_grad_(), place, mean.requires_grad_(), factor.requires_grad_()
    assert not ops.place_distances(*tracked).requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("places", ["one image", "images", "any order"])
def test_memory(places, dtype):
    """A matrix for each pixel would take 134 MB, differences for each class 17 MB; a copy of the table takes 84 MB."""
    place = torch.arange(256).repeat(1 if places == "one image" else 8)
    place = place[torch.randperm(len(place))] if places == "any order" else place
    x, mean, factor = torch.randn(len(place), 128).to(dtype), torch.randn(8, 256, 128), torch.randn(8, 256, 128, 64)
    assert peak_memory(lambda: ops.place_distances(x, place, mean, factor), CPU) < 20e6


def test_it_compiles_without_graph_breaks():
    x, place, mean, factor = draw(PLACES["any"](7), 2, 7, 5, 3)

    def scores(x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        return ops.place_distances(x, place, mean, factor).amin(1)

    compiled = torch.compile(scores, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, place), scores(x, place))
    torch.library.opcheck(torch.ops.hgad_fast.place_distances, (x, place, mean, factor))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_does_not_fit_is_refused(interpreted, backend):
    x, place, mean, factor = torch.randn(4, 3), torch.arange(4), torch.randn(2, 4, 3), torch.randn(2, 4, 3, 2)
    for arguments, message in (
        ((x[0], place, mean, factor), r"x \(3,\) must be \(N, d\)"),
        ((x, place[:3], mean, factor), r"x \(4, 3\) must be \(N, d\), and place \(3,\) then \(N,\)"),
        ((x[:, :2], place, mean, factor), r"factor \(2, 4, 3, 2\) must be .* and x \(4, 2\)"),
        ((x, place, mean[:1], factor), r"mean \(1, 4, 3\)"),
        ((x, place, mean, factor[0]), r"factor \(4, 3, 2\) must be \(K, P, d, m\)"),
        ((x, place, mean, factor[..., :0]), "with at least one of each"),
        ((x.long(), place, mean, factor), "x is torch.int64; it must be of a floating-point type"),
        ((x, place, mean.int(), factor), "mean is torch.int32"),
        ((x, place, mean, factor.int()), "factor is torch.int32"),
        ((x, place.int(), mean, factor), "place is torch.int32; it must be torch.int64"),
        ((x, place + 1, mean, factor), "place has a 4; allowed are 0 to 3"),
        ((x, place - 1, mean, factor), "place has a -1; allowed are 0 to 3"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.place_distances(*arguments, backend=backend)


def test_where_nobody_looks_places_beyond_the_grid_count_as_the_nearest():
    x, place, mean, factor = draw(torch.randint(-2, 6, (30,)), 2, 4, 5, 3)
    actual = ops.place_distances.reference(x, place, mean, factor)
    assert torch.equal(actual, ops.place_distances(x, place.clamp(0, 3), mean, factor))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("images", [0, 1, 2, 17])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_pixels_in_the_order_of_their_places_need_none(sizes, images, dtype):
    x, place, mean, factor = draw(torch.arange(sizes[1]).repeat(images), *sizes, dtype)
    for table in (factor, factor.mT.contiguous().mT):
        actual = ops.place_distances(x, None, mean, table)
        assert torch.equal(actual, ops.place_distances(x, place, mean, table))
        assert_right(actual, x, place, mean, table)


def test_without_places_there_are_whole_images():
    x, place, mean, factor = draw(torch.arange(7).repeat(2), 2, 7, 5, 5)
    with pytest.raises(ValueError, match="13 pixels; without places they must be of images of 7 each"):
        ops.place_distances(x[:13], None, mean, factor)
    compiled = torch.compile(lambda x: ops.place_distances(x, None, mean, factor), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), ops.place_distances(x, place, mean, factor))
