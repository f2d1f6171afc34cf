"""inputs.py: every form of an image is the same tensor, and what is none is refused with the remedy."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hgad_fast.data import images
from hgad_fast.scoring.inputs import as_images

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 6, 9, 3), dtype=np.uint8)
GREY = PIXELS[..., 0]
DEEP = np.random.default_rng(1).integers(0, 4096, (6, 9, 3), dtype=np.uint16)


def one(image: object, *args: int) -> Tensor:
    (tensor,) = as_images(image, *args)
    assert tensor.dtype == torch.float32 and tensor.shape == (3, 6, 9)
    return tensor


def test_forms_of_an_image_are_one_tensor() -> None:
    expected = torch.from_numpy(PIXELS[0]).permute(2, 0, 1) / 255
    for form in (
        PIXELS[0],
        PIXELS[0].astype(np.float64) / 255,
        PIXELS[:1],
        torch.from_numpy(PIXELS[0]).permute(2, 0, 1),
        expected,
        Image.fromarray(PIXELS[0]),
    ):
        torch.testing.assert_close(one(form), expected, rtol=0, atol=1e-7)
    grey = torch.from_numpy(GREY[0]).expand(3, -1, -1) / 255
    for form in (GREY[0], GREY[0][..., None], GREY[:1, ..., None], Image.fromarray(GREY[0])):
        assert one(form).equal(grey)


def test_the_white_level_counts_for_all_16_bit_forms(tmp_path: Path) -> None:
    expected = torch.from_numpy(DEEP.astype(np.float32)).permute(2, 0, 1) / 4095
    grey = expected[:1].expand(3, -1, -1)
    assert one(DEEP, 4095).equal(expected)
    assert one(torch.from_numpy(DEEP).permute(2, 0, 1), 4095).equal(expected)
    Image.fromarray(DEEP[..., 0]).save(tmp_path / "a.png")
    for form in (DEEP[..., 0], tmp_path / "a.png", str(tmp_path), Image.open(tmp_path / "a.png")):
        assert one(form, 4095).equal(grey)
    assert one(PIXELS[0], 4095).equal(one(PIXELS[0]))  # of 8 bits
    for form in (DEEP, tmp_path / "a.png"):
        with pytest.raises(ValueError, match=r"and white_level is 1023: .*--set white_level=4095"):
            one(form, 1023)


def test_dark_16_bit_images_are_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "said", set())
    with pytest.warns(UserWarning, match="16-bit values reach .*almost black; .*--set white_level=4095") as caught:
        for _ in range(3):
            one(DEEP)
    assert len(caught) == 1


FLOATS = torch.full((3, 8, 8), 0.5)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (FLOATS + 1, r"run from 1.5 to 1.5; they must lie in \[0, 1\] \(clip them\)"),
        (FLOATS - 1, r"from -0.5 to -0.5; .*do not normalise, the model does"),
        (FLOATS * 400, r"from 200 to 200; .*divide by 255"),
        (FLOATS * 8000, r"from 4000 to 4000; .*divide by the value of white"),
        (np.full((8, 8, 3), 255.0), r"from 255 to 255; .*divide by 255"),
        (np.full((8, 8), np.nan), r"64 pixels of an image are NaN; .*\[0, 1\]: find the origin"),
        (FLOATS * math.nan, "64 pixels of an image are NaN"),
        (FLOATS * math.inf, "from inf to inf"),
        (
            torch.zeros(3, 8, 8, dtype=torch.int64),
            "tensor is torch.int64; pass floats .* or unsigned integers of 8 or 16",
        ),
        (torch.zeros(1, 8, 8), r"shape \(1, 8, 8\); expected .*repeat grey"),
        (torch.zeros(2, 4, 8, 8), r"shape \(2, 4, 8, 8\); expected .*drop alpha: x\[..., :3, :, :\]"),
        (torch.zeros(8, 9, 3), r"shape \(8, 9, 3\); expected .*channels come last: .movedim\(-1, -3\)"),
        (torch.zeros(8, 8), r"shape \(8, 8\); expected"),
        (torch.zeros(3, 0, 8), r"shape \(3, 0, 8\); expected"),
        (np.zeros((3, 8, 9)), r"shape \(3, 8, 9\); expected .*channels come first: np.moveaxis\(image, -3, -1\)"),
        (np.zeros((8, 9, 4), np.uint8), r"shape \(8, 9, 4\); expected .*drop alpha: image\[..., :3\]"),
        (np.zeros((8, 9, 2), np.uint8), r"shape \(8, 9, 2\); expected"),
        (np.zeros((0, 0), np.uint8), r"shape \(0, 0\); expected .*; it is empty"),
        (np.zeros((0, 9, 3), np.uint8), r"shape \(0, 9, 3\); expected .*; it is empty"),
        (np.zeros(()), r"shape \(\); expected"),
        (np.zeros((8, 8, 3), np.int32), r"array is int32; pass unsigned integers .*image.astype\(np.uint8\)"),
        (np.zeros((8, 8), bool), r"array is bool; .*image.astype\(np.float32\)"),
        (np.zeros((8, 8), np.complex64), "array is complex64; .*numbers are needed"),
        (np.full((8, 8), 200, np.uint32), r"uint32 of values to 200, .*image.astype\(np.uint8\)"),
        (np.full((8, 8), 4000, np.uint64), r"uint64 of values to 4000, .*image.astype\(np.uint16\)"),
        (b"\x89PNG", "cannot score a bytes; decode a file's content first"),
        (bytearray(b"\x89PNG"), "cannot score a bytearray; decode"),
        ({"a": FLOATS}, r"cannot score a dict; pass its images: list\(images.values\(\)\)"),
        (None, "cannot score a NoneType; .*cv2.imread gives None"),
        (3.5, "cannot score a float; pass tensors, arrays, PIL images, or paths"),
    ],
)
def test_what_is_no_image_is_refused_with_the_remedy(image: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(as_images(image))


def test_a_folder_says_what_it_leaves_out(tmp_path: Path) -> None:
    for name in ("test/dent/0.png", "ground_truth/dent/0_mask.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.fromarray(GREY[0]).save(tmp_path / name)
    (tmp_path / "a.heic").write_bytes(b"")
    with pytest.warns(UserWarning) as caught:
        one(tmp_path)
    assert ["1 masks" in str(caught[0].message), "passed over: 1 .heic" in str(caught[1].message)] == [True, True]


def test_the_order_of_channels_is_said() -> None:
    assert "cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)" in (as_images.__doc__ or "")
