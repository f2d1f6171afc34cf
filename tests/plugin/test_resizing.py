"""Images are resized in a graph as Pillow resizes them, whatever their sizes, or said to be seen at another size."""

from __future__ import annotations

from itertools import product

import pytest
import torch

pytest.importorskip("anomalib")

from hgad_fast.data.images import resize_image  # noqa: E402
from hgad_fast.features.preprocess import AsItIs, preprocess, seen_shape  # noqa: E402
from hgad_fast.plugin.resizing import Resizing, floored, half, lanczos  # noqa: E402

EPS = torch.finfo(torch.float32).eps
# Pillow adds up in float64. Here weights are rounded, by about an eps in all of a row, and so are products and their
# sums, along both axes; sizes of weights add up to 1.5 at most in a row, to 2.3 in both.
CLOSE = {"rtol": 0.0, "atol": 10 * EPS}


def noise(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Return an image (3, H, W) whose pixels are 0, 1 or between."""
    return (2 * torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) - 0.5).clamp(0, 1)


@pytest.mark.parametrize("size", [(2, 3), (31, 64), (64, 31), (64, 64), (96, 160), (257, 90), (65, 1000)], ids=str)
@pytest.mark.parametrize("resized", [(64, 64), (63, 97), (17, 5)], ids=str)
def test_it_is_the_filter_of_pillow(size, resized):
    image = noise(*size)
    for dtype in (torch.float32, torch.float64):
        rows, columns = (lanczos(n, m, 0, m, dtype).float() for n, m in zip(size, resized, strict=True))
        torch.testing.assert_close((rows @ image @ columns.T).clamp(0, 1), resize_image(image, resized), **CLOSE)


def test_large_sides_lose_no_precision():
    """Positions are whole numbers: in float32 those of an image of 30,000 pixels would be off by 1e-3."""
    for n, m in ((30_000, 64), (29_999, 61)):
        torch.testing.assert_close(
            lanczos(n, m, 0, m, torch.float32).double(), lanczos(n, m, 0, m, torch.float64), rtol=0, atol=EPS / 100
        )


def test_an_axis_of_this_size_is_left_as_it_is():
    assert torch.equal(lanczos(37, 37, 0, 37, torch.float32), torch.eye(37))
    resizing = Resizing(AsItIs(img_size=32), (32, 48), (32, 48))
    assert resizing.rows is None and resizing.columns is None
    image = noise(32, 48)
    assert torch.equal(resizing(image[None])[0][0], image)


@pytest.mark.parametrize("view", [{}, {"center_crop": True}, {"square": True}], ids=str)
@pytest.mark.parametrize("side", [16, 23])
def test_images_are_seen_as_the_model_sees_them(view, side):
    config = AsItIs(side, **view)
    for size in ((16, 16), (23, 23), (20, 33), (47, 31), (5, 9), (64, 21), (21, 64)):
        image, seen = noise(*size), seen_shape(size, config)
        for input_size in (size, None):
            resized, valid = Resizing(config, seen, input_size)(image.expand(2, -1, -1, -1))
            assert valid.tolist() == [True, True]
            for each in resized:
                torch.testing.assert_close(each, preprocess(image, config), **CLOSE)


def test_a_crop_at_native_size_is_cut():
    config = AsItIs(center_crop=True)
    image = noise(21, 40)
    resized, _ = Resizing(config, (21, 21), (21, 40))(image[None])
    assert torch.equal(resized[0], preprocess(image, config))


def test_whole_numbers_are_divided_exactly():
    """Float32 has 24 bits: quotients of larger numbers are rounded, and so are those just below a whole number."""
    generator = torch.Generator().manual_seed(0)
    divisors = torch.randint(1, 2**15, (10_000,), generator=generator)
    for n in (64 * divisors, 1021 * divisors - 1, torch.randint(2**25, (10_000,), generator=generator)):
        assert torch.equal(floored(n, divisors), n // divisors)
    numbers = torch.arange(1000)
    assert half(numbers).tolist() == [round(n / 2) for n in range(1000)]


@pytest.mark.parametrize("side", [7, 8])
def test_proportions_are_told_to_the_pixel(side):
    """Rounding goes to even numbers where a side lies between two pixels."""
    images = {size: torch.zeros(1, 3, *size) for size in product(range(4, 30, 3), repeat=2)}
    for size, image in images.items():
        h, w = seen_shape(size, AsItIs(side))
        for seen in ((h, w), (h + 1, w), (h, w + 1), (h - 1, w), (h, w - 1)):
            if min(seen) == side:
                _, valid = Resizing(AsItIs(side), seen, None)(image)
                assert bool(valid) == (seen == (h, w)), (size, seen)


@pytest.mark.parametrize("input_size", [(40, 40), (20, 20), None], ids=str)
@pytest.mark.parametrize("value", [-0.1, 1.1, 255.0, torch.inf, -torch.inf, torch.nan])
def test_what_is_no_image_is_told(input_size, value):
    images = noise(*(input_size or (30, 30))).repeat(2, 1, 1, 1)
    images[1, 2, 3, 4] = value
    _, valid = Resizing(AsItIs(20), (20, 20), input_size)(images)
    assert valid.tolist() == [True, False]


def test_sizes_that_do_not_fit_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"input_size is 40 x 60: .* at 20 x 30, .* at 20 x 20; .* or seen=\(20, 30\)"):
        Resizing(AsItIs(20), (20, 20), (40, 60))
    with pytest.raises(ValueError, match=r"img_size='native'.* give the \(height, width\) of the images as input_size"):
        Resizing(AsItIs(), (40, 60), None)
