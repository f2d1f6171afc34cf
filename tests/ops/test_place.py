"""Distances of pixels to the Gaussians of their places by definition: against one product a pixel in float64."""

from __future__ import annotations

import importlib
import itertools

import pytest
import rounding
import torch
from hypothesis import given
from hypothesis import strategies as st
from places import PLACES, SIZES, draw, right, strided

from hgad_fast import ops
from hgad_fast.bench.timing import peak_memory

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
CPU = torch.device("cpu")
DEFINITION = importlib.import_module("hgad_fast.ops.place")


def assert_right(distances: torch.Tensor, place: torch.Tensor, *tensors: torch.Tensor) -> None:
    x, mean, factor = tensors
    precision = torch.promote_types(x.dtype, torch.float32)
    assert distances.dtype == precision and not distances.requires_grad
    rounding.assert_close(distances, lambda *t: right(place, *t), x, mean, factor, precision=precision)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES.keys())
def test_distances(places, sizes, dtype):
    place = places(sizes[1])
    x, mean, factor = draw(*sizes, place, dtype)
    for table in (factor, factor.mT.contiguous().mT):
        assert_right(ops.place_distances(x, place, mean, table), place, x, mean, table)


@pytest.mark.parametrize("which", ["x", "mean", "factor", "places"])
def test_an_error_of_a_ten_thousandth_is_found(which):
    """The tolerance is not what lets the tests pass."""
    place = PLACES["any"](7)
    tensors = dict(zip(("x", "mean", "factor"), draw(2, 7, 37, 5, place), strict=True))
    wrong, elsewhere = dict(tensors), place.clone()
    if which == "places":
        elsewhere[3] = (elsewhere[3] + 1) % 7
    else:
        wrong[which] = 1.0001 * tensors[which]
    with pytest.raises(AssertionError, match="rounding explains"):
        assert_right(
            ops.place_distances(wrong["x"], elsewhere, wrong["mean"], wrong["factor"]), place, *tensors.values()
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("places", ["one image", "images", "any"])
def test_other_strides(places, dtype):
    place = PLACES[places](7)
    x, mean, factor = draw(2, 7, 20, 6, place, dtype)
    stretched = torch.full((2 * len(x), 20), torch.nan, dtype=dtype)
    stretched[::2] = x
    of_x = [x, x.T.contiguous().T, stretched[::2]]
    for rows, means, table in itertools.product(of_x, strided(mean).values(), strided(factor).values()):
        assert_right(ops.place_distances(rows, place, means, table), place, x, mean, factor)


def test_first_variables_of_wider_tables():
    """As a place Gaussian reads them: views of mean and factor, whose matrices are not contiguous."""
    place = torch.arange(9).repeat(2)
    x, mean, factor = draw(3, 9, 24, 24, place)
    for table in (factor, factor.mT.contiguous().mT):
        views = x[:, :16], mean[..., :16], table[..., :16, :16]
        assert_right(ops.place_distances(views[0], place, *views[1:]), place, *(view.clone() for view in views))


@pytest.mark.parametrize("size", [1, 700, 5000])
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES.keys())
def test_chunks(monkeypatch, places, size):
    monkeypatch.setattr(DEFINITION, "CHUNK_BYTES", size)
    place = places(6)
    x, mean, factor = draw(2, 6, 11, 4, place)
    for table in strided(factor).values():
        assert_right(ops.place_distances(x, place, mean, table), place, x, mean, factor)


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
    place = torch.tensor(places, dtype=torch.int64)
    tensors = draw(K, 9, d, m, place, dtype)
    assert_right(ops.place_distances(tensors[0], place, *tensors[1:]), place, *tensors)


def test_they_are_mahalanobis_distances():
    """Against a solution with the covariance itself."""
    place = torch.arange(5).repeat(2)
    x, mean, root = (t.double() for t in draw(3, 5, 6, 6, place))
    covariance = root @ root.mT + torch.eye(6)
    factor = torch.linalg.inv(torch.linalg.cholesky(covariance)).mT
    offsets = x - mean[:, place]
    expected = (offsets * torch.linalg.solve(covariance[:, place], offsets)).sum(2).T
    torch.testing.assert_close(
        ops.place_distances(x, place, mean, factor), expected, rtol=rounding.SAME_IN_FLOAT64, atol=0
    )


@pytest.mark.parametrize("transposed", [False, True])
def test_parts_of_an_image(transposed):
    """Any pixels of it, in any order, for any classes, and with the tables of their places alone."""
    place = torch.arange(64)
    x, mean, factor = draw(3, 64, 48, 48, place)
    factor = factor.mT.contiguous().mT if transposed else factor
    for some in (place[:1], place[5:20], place[::3], torch.randperm(64), place[[63, 0]]):
        for classes in (slice(None), slice(1, 2)):
            part = x[some], mean[classes], factor[classes]
            assert_right(ops.place_distances(part[0], place[some], *part[1:]), place[some], *part)
    tile = slice(16, 40)
    part = x[tile], mean[:, tile], factor[:, tile]
    assert_right(ops.place_distances(part[0], place[:24], *part[1:]), place[:24], *part)


def test_pixels_that_are_not_finite():
    place = torch.arange(6).repeat(3)
    x, mean, factor = draw(2, 6, 5, 5, place)
    expected = ops.place_distances(x, place, mean, factor)
    x[3, 2], x[7, 1], x[11, 4] = torch.nan, torch.inf, -torch.inf
    distances = ops.place_distances(x, place, mean, factor)
    bad = torch.zeros(18, dtype=torch.bool)
    bad[[3, 7, 11]] = True
    assert not distances[bad].isfinite().any() and torch.equal(distances[~bad], expected[~bad])


def test_no_gradient():
    place = torch.arange(4)
    tensors = [t.requires_grad_() for t in draw(2, 4, 5, 3, place)]
    assert not ops.place_distances(tensors[0], place, *tensors[1:]).requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("places", ["one image", "images", "any order"])
def test_memory(places, dtype):
    """A matrix for each pixel would take 134 MB, differences for each class 17 MB; a copy of the table takes 84 MB."""
    place = torch.arange(256).repeat(1 if places == "one image" else 8)
    place = place[torch.randperm(len(place))] if places == "any order" else place
    x, mean, factor = torch.randn(len(place), 128).to(dtype), torch.randn(8, 256, 128), torch.randn(8, 256, 128, 64)
    assert peak_memory(lambda: ops.place_distances(x, place, mean, factor), CPU) < 20e6


def test_it_compiles_without_graph_breaks():
    place = PLACES["any"](7)
    x, mean, factor = draw(2, 7, 5, 3, place)

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
    place = torch.randint(-2, 6, (30,))
    x, mean, factor = draw(2, 4, 5, 3, place)
    actual = ops.place_distances.reference(x, place, mean, factor)
    assert torch.equal(actual, ops.place_distances(x, place.clamp(0, 3), mean, factor))
