"""The kernels of the Gaussians of places on Triton's interpreter, against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from gaussians import SIZES, assert_distances, draw, strided

from hgad_fast import ops

pytestmark = pytest.mark.usefixtures("nan_memory")

DTYPES = (torch.float32, torch.bfloat16)
ONE_IMAGE, IMAGES = SIZES["a pixel a place"], SIZES["many pixels a place"]  # a kernel each


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_distances(interpreted, sizes, dtype):
    inputs = draw(*sizes, dtype)
    assert_distances(interpreted.place.place_distances(*inputs), *inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_distances_of_any_sizes(interpreted, dtype):
    limits = 40, 9, 4, 50, 50
    for sizes in zip(*(torch.randint(1, limit, (15,)).tolist() for limit in limits), strict=True):
        inputs = draw(*sizes, dtype)
        assert_distances(interpreted.place.place_distances(*inputs), *inputs)


@pytest.mark.parametrize("sizes", [ONE_IMAGE, IMAGES])
@pytest.mark.parametrize("tables", [torch.bfloat16, torch.float64])
def test_tables_of_other_types_are_read_in_float32(interpreted, sizes, tables):
    x, place, mean, factor = draw(*sizes, tables=tables)
    assert_distances(interpreted.place.place_distances(x, place, mean, factor), x, place, mean.float(), factor.float())


@pytest.mark.parametrize("sizes", [ONE_IMAGE, IMAGES])
def test_less_than_float32_would_show(interpreted, sizes):
    x, place, mean, factor = draw(*sizes)
    coarse = ((factor.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)  # tf32, as tensor cores read it
    actual = interpreted.place.place_distances(x, place, mean, coarse)
    with pytest.raises(AssertionError):
        assert_distances(actual, x, place, mean, factor)


@pytest.mark.parametrize("images", [1, 2, 16, 17, 40])
def test_distances_of_images(interpreted, launches, images):
    """All places in order, image after image: one pixel of a place is multiplied by itself, several together."""
    x, _, mean, factor = draw(images * 6, 6, 2, 20, 20)
    place = torch.arange(6).repeat(images)
    assert_distances(interpreted.place.place_distances(x, place, mean, factor), x, place, mean, factor)
    assert launches == {"_pixel_kernel" if images == 1 else "_place_kernel": 1}


@pytest.mark.parametrize("sizes", [ONE_IMAGE, IMAGES])
def test_distances_of_pixels_that_are_all_at_one_place(interpreted, sizes):
    x, place, mean, factor = draw(*sizes)
    place.fill_(2)
    assert_distances(interpreted.place.place_distances(x, place, mean, factor), x, place, mean, factor)


@pytest.mark.parametrize("sizes", [ONE_IMAGE, IMAGES])
def test_a_pixel_of_a_single_image_has_the_same_bits_in_any_company(interpreted, sizes):
    """Pixels of a place are rows of one product; which row, and what the others hold, changes no bit."""
    x, place, mean, factor = draw(*sizes)
    actual, order = interpreted.place.place_distances(x, place, mean, factor), torch.randperm(len(x))
    assert torch.equal(interpreted.place.place_distances(x[order], place[order], mean, factor), actual[order])


@pytest.mark.parametrize("sizes", [ONE_IMAGE, IMAGES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_distances_of_other_strides(interpreted, sizes, dtype):
    x, place, mean, factor = inputs = draw(*sizes, dtype)
    expected = interpreted.place.place_distances(*inputs)
    assert_distances(expected, *inputs)
    for i in (0, 2, 3):
        for name, view in strided(inputs[i]).items():
            changed = *inputs[:i], view, *inputs[i + 1 :]
            assert torch.equal(interpreted.place.place_distances(*changed), expected), (i, name)
    every_second = place.repeat_interleave(2)[::2]
    assert torch.equal(interpreted.place.place_distances(x, every_second, mean, factor), expected)


@pytest.mark.parametrize("sizes", [ONE_IMAGE, IMAGES])
def test_offsets_of_64_bits(interpreted, monkeypatch, sizes):
    inputs = x, place, mean, factor = draw(*sizes)
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
@pytest.mark.parametrize("sizes", [ONE_IMAGE, IMAGES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_with_its_pixel_and_its_class(interpreted, sizes, dtype):
    x, place, mean, factor = draw(*sizes, dtype)
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


@pytest.mark.parametrize("sizes", [ONE_IMAGE, IMAGES])
def test_places_beyond_the_last_count_as_the_nearest(interpreted, sizes):
    """On a GPU nobody can look at them in time: at least nothing outside of a table is read."""
    x, place, mean, factor = draw(*sizes)
    place[:4] = torch.tensor([-1, -(2**40), mean.shape[1], 2**40])
    actual = interpreted.place.place_distances(x, place, mean, factor)
    assert_distances(actual, x, place.clamp(0, mean.shape[1] - 1), mean, factor)


def test_distances_of_nothing(interpreted, launches):
    _, _, mean, factor = draw(*ONE_IMAGE)
    actual = interpreted.place.place_distances(torch.zeros(0, 20), torch.zeros(0, dtype=torch.int64), mean, factor)
    assert actual.shape == (0, 3) and actual.dtype == torch.float32 and launches == {}


def test_operations_take_the_kernels(interpreted, launches):
    for sizes, kernel in ((ONE_IMAGE, "_pixel_kernel"), (IMAGES, "_place_kernel")):
        launches.clear()
        x, place, mean, factor = draw(*sizes)
        tracked = (t.requires_grad_() for t in (x.clone(), mean.clone(), factor.clone()))
        actual = ops.place_distances(next(tracked), place, *tracked)
        assert launches == {kernel: 1}
        assert_distances(actual, x, place, mean, factor)
