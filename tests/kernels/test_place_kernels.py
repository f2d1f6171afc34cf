"""The kernels of the Gaussians of places on Triton's interpreter, against the formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import rounding
import torch
from places import PLACES, SIZES, assert_right, draw, right, strided
from torch import Tensor

from hgad_fast import ops

pytestmark = pytest.mark.usefixtures("nan_memory")

DTYPES = (torch.float32, torch.bfloat16)
SIZE = SIZES["as many columns as channels"]
ONE_IMAGE, IMAGES = PLACES["one image in another order"], PLACES["few in most places, many in one"]  # a kernel each
each_kernel = pytest.mark.parametrize("places", [ONE_IMAGE, IMAGES], ids=["one image", "images"])


def drawn(places: Callable[[int], Tensor], **options: Any) -> tuple[Tensor, ...]:
    return draw(places(SIZE[1]), *SIZE, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES.keys())
def test_distances(interpreted, places, sizes, dtype):
    inputs = draw(places(sizes[1]), *sizes, dtype)
    assert_right(interpreted.place.place_distances(*inputs), *inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_distances_of_any_sizes(interpreted, dtype):
    limits = 40, 4, 9, 50, 50
    for N, *sizes in zip(*(torch.randint(1, limit, (15,)).tolist() for limit in limits), strict=True):
        inputs = draw(torch.randint(sizes[1], (N,)), *sizes, dtype)
        assert_right(interpreted.place.place_distances(*inputs), *inputs)


@each_kernel
@pytest.mark.parametrize("tables", [torch.bfloat16, torch.float64])
def test_tables_of_other_types_are_read_in_float32(interpreted, places, tables):
    x, place, mean, factor = drawn(places, tables=tables)
    assert_right(interpreted.place.place_distances(x, place, mean, factor), x, place, mean.float(), factor.float())


@each_kernel
def test_less_than_float32_would_show(interpreted, places):
    x, place, mean, factor = drawn(places)
    coarse = ((factor.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)  # tf32, as tensor cores read it
    actual = interpreted.place.place_distances(x, place, mean, coarse)
    with pytest.raises(AssertionError, match="rounding explains"):
        assert_right(actual, x, place, mean, factor)


@pytest.mark.parametrize("images", [1, 2, 16, 17, 40])
def test_distances_of_images(interpreted, launches, images):
    """All places in order, image after image: one pixel of a place is multiplied by itself, several together."""
    inputs = draw(torch.arange(6).repeat(images), 2, 6, 20, 20)
    assert_right(interpreted.place.place_distances(*inputs), *inputs)
    assert launches == {"_pixel_kernel" if images == 1 else "_place_kernel": 1}


@each_kernel
def test_distances_of_pixels_that_are_all_at_one_place(interpreted, places):
    x, place, mean, factor = drawn(places)
    place.fill_(2)
    assert_right(interpreted.place.place_distances(x, place, mean, factor), x, place, mean, factor)


def test_a_pixel_of_a_single_image_has_the_same_bits_in_any_company(interpreted):
    """A program has one pixel: neither the order of the others, nor what they are, nor how many, changes a bit."""
    x, place, mean, factor = drawn(ONE_IMAGE)
    actual, order = interpreted.place.place_distances(x, place, mean, factor), torch.randperm(len(x))
    for some in (order, order[:5], order[:1]):
        assert torch.equal(interpreted.place.place_distances(x[some], place[some], mean, factor), actual[some])


def test_pixels_of_images_differ_in_another_order_by_rounding_alone(interpreted):
    """Pixels of a place are rows of one product, whose library may compute one row otherwise than another."""
    x, place, mean, factor = drawn(IMAGES)
    exact, tolerance = rounding.exact_and_tolerance(right, x, place, mean, factor)
    for order in (torch.arange(len(x)), torch.randperm(len(x)), torch.arange(len(x)).flip(0)):
        actual = interpreted.place.place_distances(x[order], place[order], mean, factor)
        rounding.assert_within(actual, exact[order], tolerance[order])


@each_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_distances_of_other_strides(interpreted, places, dtype):
    x, place, mean, factor = inputs = drawn(places, dtype=dtype)
    expected = interpreted.place.place_distances(*inputs)
    assert_right(expected, *inputs)
    for i in (0, 2, 3):
        for name, view in strided(inputs[i]).items():
            changed = *inputs[:i], view, *inputs[i + 1 :]
            assert torch.equal(interpreted.place.place_distances(*changed), expected), (i, name)
    every_second = place.repeat_interleave(2)[::2]
    assert torch.equal(interpreted.place.place_distances(x, every_second, mean, factor), expected)


@each_kernel
def test_offsets_of_64_bits(interpreted, monkeypatch, places):
    inputs = x, place, mean, factor = drawn(places)
    expected, wide, launch = interpreted.place.place_distances(*inputs), [], interpreted.place.launch

    def widened(*args, **arguments):
        wide.append(arguments["WIDE"])
        launch(*args, **arguments | {"WIDE": True})

    monkeypatch.setattr(interpreted.place, "launch", widened)
    assert torch.equal(interpreted.place.place_distances(*inputs), expected) and wide == [False]
    monkeypatch.setattr(interpreted.place, "launch", lambda *args, **arguments: wide.append(arguments["WIDE"]))
    apart = torch.empty_strided(mean.shape, (0, 0, 2**31 // (mean.shape[2] - 1) + 1), device="meta")
    interpreted.place.place_distances(x, place, apart, factor)
    apart = torch.empty_strided(factor.shape, (0, 0, 1, 2**31 // (factor.shape[3] - 1) + 1), device="meta")
    interpreted.place.place_distances(x, place, mean, apart)
    assert wide == [False, True, True]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, on infinity less infinity
@each_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_with_its_pixel_and_its_class(interpreted, places, dtype):
    x, place, mean, factor = drawn(places, dtype=dtype)
    expected = interpreted.place.place_distances(x, place, mean, factor)
    x[2, 3], x[5, 1], x[7, 0] = torch.nan, torch.inf, -torch.inf
    actual = interpreted.place.place_distances(x, place, mean, factor)
    assert actual[2].isnan().all() and not actual[[5, 7]].isfinite().any()
    others = torch.ones(len(x), dtype=torch.bool)
    others[[2, 5, 7]] = False
    assert torch.equal(actual[others], expected[others])
    defined = ops.place_distances.reference(x, place, mean, factor)
    assert torch.equal(actual.isfinite(), defined.isfinite())
    mean[1, 0, 4], factor[1, 2, 1, 0] = torch.nan, torch.nan
    actual = interpreted.place.place_distances(x, place, mean, factor)
    hit = (place == 0) | (place == 2)
    assert actual[hit, 1].isnan().all() and hit.any()
    assert torch.equal(actual[others, 0], expected[others, 0])
    assert torch.equal(actual[others & ~hit, 1], expected[others & ~hit, 1])


@each_kernel
def test_places_beyond_the_last_count_as_the_nearest(interpreted, places):
    """On a GPU nobody can look at them in time: at least nothing outside of a table is read."""
    x, place, mean, factor = drawn(places)
    place[:4] = torch.tensor([-1, -(2**40), mean.shape[1], 2**40])
    actual = interpreted.place.place_distances(x, place, mean, factor)
    assert_right(actual, x, place.clamp(0, mean.shape[1] - 1), mean, factor)


def test_distances_of_nothing(interpreted, launches):
    _, _, mean, factor = drawn(ONE_IMAGE)
    actual = interpreted.place.place_distances(torch.zeros(0, 20), torch.zeros(0, dtype=torch.int64), mean, factor)
    assert actual.shape == (0, 3) and actual.dtype == torch.float32 and launches == {}


def test_operations_take_the_kernels(interpreted, launches):
    for places, kernel in ((ONE_IMAGE, "_pixel_kernel"), (IMAGES, "_place_kernel")):
        launches.clear()
        x, place, mean, factor = drawn(places)
        tracked = (t.requires_grad_() for t in (x.clone(), mean.clone(), factor.clone()))
        actual = ops.place_distances(next(tracked), place, *tracked)
        assert launches == {kernel: 1}
        assert_right(actual, x, place, mean, factor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("images", [0, 1, 2, 17])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_pixels_in_the_order_of_their_places_need_none(interpreted, sizes, images, dtype):
    x, place, mean, factor = draw(torch.arange(sizes[1]).repeat(images), *sizes, dtype)
    actual = interpreted.place.place_distances(x, None, mean, factor)
    assert torch.equal(actual, interpreted.place.place_distances(x, place, mean, factor))
    of_a_band = torch.cat([mean, mean], 2)[:, :, : mean.shape[2]]  # Gaussians in several bands give such means
    assert torch.equal(actual, interpreted.place.place_distances(x, None, of_a_band, factor))
    assert_right(actual, x, place, mean, factor)
