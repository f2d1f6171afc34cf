"""images.py: every image here is drawn by the test, so that what must be read is known to the value."""

from __future__ import annotations

import io
import pickle
import random
import struct
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import in_rows, png, tiff, with_alpha
from PIL import Image, ImageFile
from torch import Tensor
from torchvision import transforms

from hgad_fast.data import images
from hgad_fast.data.images import (
    ImageError,
    centre_crop,
    from_pil,
    read_header,
    read_image,
    resize_image,
    resize_mask,
    whole_image,
    whole_image_size,
)
from hgad_fast.data.listing import list_images
from hgad_fast.data.masks import read_mask

GREY8 = np.array([[0, 1, 127], [128, 254, 255]], np.uint8)
GREY16 = np.array([[0, 1, 255], [256, 40000, 65535]], np.uint16)
COLOUR = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 14
NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def draw(path: Path, pixels: np.ndarray = GREY8, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def write(path: Path, content: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def assert_grey(image: Tensor, expected: np.ndarray) -> None:
    assert image.dtype == torch.float32 and image.is_contiguous()
    np.testing.assert_array_equal(image.numpy(), np.stack([expected.astype(np.float32)] * 3))


def assert_colour(image: Tensor, expected: np.ndarray) -> None:
    assert image.dtype == torch.float32 and image.is_contiguous()
    channels = np.stack([expected[..., c] for c in range(3)])
    np.testing.assert_array_equal(image.numpy(), channels.astype(np.float32) / np.float32(255))


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.PGM"])
def test_grey_of_8_bits(tmp_path: Path, name: str) -> None:
    assert_grey(read_image(draw(tmp_path / name)), GREY8.astype(np.float32) / np.float32(255))


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff", "a.ppm", "a.webp"])
def test_colour(tmp_path: Path, name: str) -> None:
    options = {"lossless": True} if name.endswith("webp") else {}
    assert_colour(read_image(draw(tmp_path / name, COLOUR, **options)), COLOUR)


def test_jpeg(tmp_path: Path) -> None:
    flat = np.broadcast_to(np.array([200, 30, 90], np.uint8), (16, 24, 3))
    image = read_image(draw(tmp_path / "a.jpg", flat, quality=100))
    assert image.shape == (3, 16, 24)
    np.testing.assert_allclose(image[:, 8, 8].numpy() * 255, [200, 30, 90], atol=2)


@pytest.mark.parametrize(
    ("name", "pixels", "options"),
    [
        ("a.png", GREY16, {}),
        ("a.tif", GREY16, {}),
        ("a.tif", GREY16, {"compression": "tiff_lzw"}),
        ("a.tif", GREY16.astype(">u2"), {}),
        ("a.tif", GREY16.astype(np.int32), {}),
    ],
    ids=["png", "tiff", "lzw", "big-endian", "int32"],
)
def test_grey_of_16_bits_is_scaled(tmp_path: Path, name: str, pixels: np.ndarray, options: dict) -> None:
    image = read_image(draw(tmp_path / name, pixels, **options))
    assert_grey(image, GREY16.astype(np.float32) / np.float32(65535))


def test_grey_of_12_bits_in_a_pgm_is_scaled_by_its_own_maximum(tmp_path: Path) -> None:
    levels = np.array([[0, 1024, 4095]], ">u2")
    image = read_image(write(tmp_path / "a.pgm", b"P5 3 1 4095\n" + levels.tobytes()))
    np.testing.assert_allclose(image[0].numpy(), levels / 4095.0, atol=1 / 65535)


UPRIGHT = {  # what a viewer shows for each EXIF orientation of the stored pixels
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}

COLOUR16 = np.array([[[0, 255, 256], [511, 40000, 65535]], [[9, 4095, 3], [1, 2, 60000]]], np.uint16)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.png", png(2, 2, 16, 2, in_rows(COLOUR16))),
        ("a.png", png(2, 2, 16, 6, in_rows(with_alpha(COLOUR16)))),
        ("a.tif", tiff(COLOUR16, "<")),
        ("a.tif", tiff(COLOUR16, ">")),
        ("a.tif", tiff(with_alpha(COLOUR16), "<")),
    ],
    ids=["png", "png, alpha", "tiff", "tiff, big-endian", "tiff, alpha"],
)
@pytest.mark.filterwarnings("error")
def test_colour_of_16_bits_is_kept(tmp_path: Path, name: str, content: bytes) -> None:
    path = write(tmp_path / name, content)
    expected = torch.from_numpy(COLOUR16.astype(np.float32)).permute(2, 0, 1) / 65535
    assert read_image(path).equal(expected) and read_image(path).is_contiguous()
    assert read_header(path)[2] in ("RGB;16", "RGBA;16")
    with pytest.raises(ImageError, match="reach 65535, and white_level is 4095"):
        read_image(path, 4095)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_colour_of_16_bits_is_turned_upright(tmp_path: Path, orientation: int) -> None:
    path = write(tmp_path / "a.tif", tiff(COLOUR16[:1], "<", orientation=orientation))
    expected = UPRIGHT[orientation](COLOUR16[:1]).astype(np.float32) / np.float32(65535)
    np.testing.assert_array_equal(read_image(path).permute(1, 2, 0).numpy(), expected)


def test_grey_of_16_bits_beside_alpha(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", png(3, 2, 16, 4, in_rows(with_alpha(GREY16[..., None]))))
    assert_grey(read_image(path), GREY16.astype(np.float32) / np.float32(65535))


def test_colour_of_16_bits_in_planes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="separate planes; store the colours of a pixel side by side"):
        read_image(write(tmp_path / "a.tif", tiff(COLOUR16, "<", planar=2)))


def test_white_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setattr(images, "said", set())
    levels = np.array([[0, 16, 2000], [4094, 4095, 7]], np.uint16)
    path = draw(tmp_path / "a.png", levels)
    assert_grey(read_image(path, 4095), levels.astype(np.float32) / np.float32(4095))
    assert_grey(read_image(draw(tmp_path / "8.png"), 4095), GREY8.astype(np.float32) / np.float32(255))
    assert not recwarn
    for _ in range(2):
        assert_grey(read_image(path), levels.astype(np.float32) / np.float32(65535))
    (warning,) = recwarn  # of all images one
    assert "values reach 4095" in str(warning.message) and "--set white_level=4095" in str(warning.message)
    with pytest.raises(
        ImageError, match="values reach 4095, and white_level is 1023: .*--set white_level=4095"
    ) as error:
        read_image(path, 1023)
    assert error.value.path == path


@pytest.mark.parametrize(
    ("peak", "level"),
    [(200, 255), (1000, 1023), (1024, 4095), (4095, 4095), (16000, 16383), (16384, 65535), (65535, 65535)],
)
def test_white_level_that_a_value_suggests(peak: int, level: int) -> None:
    assert images.suggested_white_level(peak) == level


def test_floats_in_the_unit_interval_are_kept(tmp_path: Path) -> None:
    values = np.array([[0.0, 1e-4, 0.5], [0.25, 0.999, 1.0]], np.float32)
    assert_grey(read_image(draw(tmp_path / "a.tif", values)), values)


def test_one_bit(tmp_path: Path) -> None:
    bits = np.array([[True, False, True], [False, False, True]])
    assert_grey(read_image(draw(tmp_path / "a.png", bits)), bits)


@pytest.mark.parametrize("transparency", [None, 1, bytes([0, 128, 255])])
@pytest.mark.filterwarnings("error")
def test_palette(tmp_path: Path, transparency: int | bytes | None) -> None:
    colours = np.array([[10, 20, 30], [250, 0, 99], [1, 2, 3]], np.uint8)
    indices = np.array([[2, 1, 0], [0, 0, 1]], np.uint8)
    image = Image.new("P", (3, 2))
    image.putpalette(colours.tobytes())
    image.putdata(indices.ravel().tolist())
    image.save(tmp_path / "a.png", **({} if transparency is None else {"transparency": transparency}))
    assert_colour(read_image(tmp_path / "a.png"), colours[indices])


def test_alpha_is_dropped(tmp_path: Path) -> None:
    alpha = np.array([[0, 128, 255], [0, 0, 1]], np.uint8)[..., None]
    assert_colour(read_image(draw(tmp_path / "a.png", np.concatenate([COLOUR, alpha], -1))), COLOUR)
    grey = read_image(draw(tmp_path / "b.png", np.concatenate([GREY8[..., None], alpha], -1)))
    assert_grey(grey, GREY8.astype(np.float32) / np.float32(255))


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])  # Pillow writes CMYK JPEGs as Adobe does, inverted
def test_cmyk(tmp_path: Path, name: str) -> None:
    Image.new("CMYK", (16, 16), (255, 51, 0, 0)).save(tmp_path / name)
    image = read_image(tmp_path / name)
    np.testing.assert_allclose(image[:, 5, 5].numpy() * 255, [0, 204, 255], atol=3)


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
def test_exif_orientation(tmp_path: Path, orientation: int, name: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"exif": exif} | ({"lossless": True} if name.endswith("webp") else {})
    assert_colour(read_image(draw(tmp_path / name, COLOUR, **options)), UPRIGHT[orientation](COLOUR))


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("options", [{}, {"compression": "tiff_lzw"}], ids=["raw", "lzw"])
@pytest.mark.parametrize(("pixels", "full"), [(GREY8, 255), (GREY16, 65535)], ids=["8", "16"])
def test_exif_orientation_of_grey_tiff(
    tmp_path: Path, orientation: int, options: dict, pixels: np.ndarray, full: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = read_image(draw(tmp_path / "a.tif", pixels, exif=exif, **options))
    assert_grey(image, UPRIGHT[orientation](pixels).astype(np.float32) / np.float32(full))


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(
    ("name", "pixels", "mode"),
    [("a.png", COLOUR, "RGB"), ("a.jpg", COLOUR, "RGB"), ("a.webp", COLOUR, "RGB"), ("a.tif", GREY16, "I;16")],
)
def test_header_says_what_decoding_will_find(
    tmp_path: Path, orientation: int, name: str, pixels: np.ndarray, mode: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = draw(tmp_path / name, pixels, exif=exif)
    assert read_header(path) == (*read_image(path).shape[1:], mode)


def test_header_is_read_without_the_pixels(tmp_path: Path) -> None:
    path = draw(tmp_path / "a.png", NOISE)
    path.write_bytes(path.read_bytes()[:2000])
    assert read_header(path) == (40, 60, "RGB")
    with pytest.raises(ImageError, match="truncated"):
        read_image(path)
    with pytest.raises(ImageError, match="the file is empty"):
        read_header(write(path))


def test_from_pil_leaves_the_image_as_it_is() -> None:
    image = Image.fromarray(COLOUR)
    image.info["transparency"] = (0, 14, 28)
    image.getexif()[0x0112] = 6
    assert_colour(from_pil(image), UPRIGHT[6](COLOUR))
    assert image.size == (3, 2) and image.info["transparency"] == (0, 14, 28)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", {}),
        ("a.jpg", {}),
        ("a.bmp", {}),
        ("a.tif", {}),
        ("a.tif", {"compression": "tiff_lzw"}),
        ("a.webp", {}),
        ("a.ppm", {}),
    ],
)
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.97])
@pytest.mark.filterwarnings("ignore:Truncated File Read", "ignore:Corrupt EXIF data")
def test_truncated_file(tmp_path: Path, name: str, options: dict, kept: float) -> None:
    path = draw(tmp_path / name, NOISE, **options)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ImageError) as error:
        read_image(path)
    assert error.value.path == path and str(error.value) == f"{path}: {error.value.reason}"
    assert len(error.value.reason) > 10


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"not an image at all", "no image, or a truncated or damaged one; read are PNG, JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "no image"),
        (b"\xd7\xcd\xc6\x9a" + bytes(40), "no image"),
        (png(0, 0, 8, 0, b""), "no image"),
        (png(60000, 60000, 8, 0, b"\0"), "60000 x 60000 pixels, more than .*MAX_IMAGE_PIXELS = 536870912"),
    ],
    ids=["empty", "text", "postscript", "metafile", "zero size", "bomb"],
)
def test_file_that_is_no_image(tmp_path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason) as error:
        read_image(write(tmp_path / "a.png", content))
    assert error.value.path == tmp_path / "a.png"


def test_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="No such file"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(ImageError, match="directory"):
        read_image(tmp_path)


@pytest.mark.parametrize(
    ("pixels", "options", "reason"),
    [
        (np.array([[0.0, 1.5]], np.float32), {}, r"float32 grey values from 0 to 1.5 are not in \[0, 1\]"),
        (np.array([[-0.1, 1.0]], np.float32), {}, r"from -0.1 to 1 are not in \[0, 1\]"),
        (np.array([[0.0, np.nan]], np.float32), {}, "from nan to nan"),
        (np.array([[0, 65536]], np.int32), {}, r"int32 grey values from 0 to 65536 are not in \[0, 65535\]"),
        (np.array([[-1, 5]], np.int32), {}, "from -1 to 5"),
        (GREY16, {"tiffinfo": {262: 0}}, "white is zero"),
    ],
)
def test_values_without_a_scale_are_refused(tmp_path: Path, pixels: np.ndarray, options: dict, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        read_image(draw(tmp_path / "a.tif", pixels, **options))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["a.png", "a.tif"])  # Pillow looks at its limit again as it loads a TIFF
def test_large_images_pass_pillows_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = draw(tmp_path / name, NOISE)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with ThreadPoolExecutor(4) as pool:
        for image in pool.map(read_image, [path] * 40):
            assert_colour(image, NOISE)
    assert Image.MAX_IMAGE_PIXELS == 100
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 2399)
    with pytest.raises(ImageError, match="60 x 40 pixels"):
        read_image(path)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_image_error_survives_another_process() -> None:
    error = pickle.loads(pickle.dumps(ImageError(Path("a.png"), "it is broken")))
    assert (error.path, error.reason, str(error)) == (Path("a.png"), "it is broken", "a.png: it is broken")


# what cameras leave out, and what damage makes of files


def jpeg(pixels: np.ndarray, **options) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", **options)
    return content.getvalue()


@pytest.mark.parametrize(
    "pixels", [NOISE, NOISE[..., 0], np.full((64, 80, 3), 90, np.uint8)], ids=["rgb", "grey", "flat"]
)
@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"quality": 100, "subsampling": 0}])
def test_a_jpeg_that_lacks_its_end_marker_alone_is_read(tmp_path: Path, pixels: np.ndarray, options: dict) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = jpeg(pixels, exif=exif, **options)
    expected = read_image(write(tmp_path / "a.jpg", whole))
    for missing in (1, 2):
        assert read_image(write(tmp_path / "b.jpg", whole[:-missing])).equal(expected)


@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"quality": 100, "subsampling": 0}])
def test_a_jpeg_that_lacks_pixels_is_refused(tmp_path: Path, options: dict) -> None:
    flat_below = NOISE.copy()
    flat_below[8:] = 90  # what a decoder makes of missing blocks: they go on as the last one
    for pixels in (NOISE, flat_below):
        whole = jpeg(pixels, **options)
        start = whole.index(b"\xff\xda") + 14
        for end in np.linspace(start, len(whole) - 4, 12).astype(int):
            with pytest.raises(ImageError, match="truncated"):
                read_image(write(tmp_path / "a.jpg", whole[:end]))


@pytest.mark.parametrize("options", [{"progressive": True}, {"restart_marker_blocks": 2}])
def test_a_jpeg_whose_missing_parts_would_not_show_is_refused(tmp_path: Path, options: dict) -> None:
    with pytest.raises(ImageError, match="truncated"):
        read_image(write(tmp_path / "a.jpg", jpeg(NOISE, **options)[:-2]))


@pytest.mark.parametrize(
    ("suffix", "kind", "exact"),
    [
        *((suffix, "JPEG", False) for suffix in (".jpe", ".jfif", ".JIF", ".mpo")),
        *((suffix, "JPEG2000", True) for suffix in (".jp2", ".j2k", ".JPX")),
        *((suffix, "PPM", True) for suffix in (".pnm", ".ppm")),
        *((".gif", "GIF", True), (".dib", "DIB", True), (".tga", "TGA", True), (".apng", "PNG", True)),
        (".avif", "AVIF", False),
    ],
)
def test_endings_that_are_read(tmp_path: Path, suffix: str, kind: str, exact: bool) -> None:
    Image.init()
    if kind not in Image.SAVE:
        return  # this Pillow lacks the codec
    pixels = NOISE[:8, :8] if exact else np.full((16, 16, 3), (200, 30, 90), np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"a{suffix}", format=kind)
    (path,) = list_images(tmp_path)
    np.testing.assert_allclose(read_image(path) * 255, pixels.transpose(2, 0, 1), atol=0.001 if exact else 3)


SOUND = {
    "png": [png(60, 40, 8, 2, b"".join(b"\0" + row.tobytes() for row in NOISE)), png(2, 2, 16, 2, in_rows(COLOUR16))],
    "jpg": [jpeg(NOISE), jpeg(NOISE)[:-2], jpeg(NOISE, progressive=True)],
    "tif": [tiff(NOISE.astype(np.uint16), "<"), tiff(NOISE.astype(np.uint16), ">")],
    "bmp": [],
}


def mutated(content: bytes, draw_from: random.Random) -> bytes:
    """A file with a fault: flipped bits, an end that is missing, bytes put in, or a header that claims too much."""
    changed, fault = bytearray(content), draw_from.randrange(4)
    if fault == 0:
        for _ in range(draw_from.randrange(1, 9)):
            changed[draw_from.randrange(len(changed))] ^= 1 << draw_from.randrange(8)
    elif fault == 1:
        del changed[draw_from.randrange(len(changed)) :]
    elif fault == 2:
        at = draw_from.randrange(len(changed))
        changed[at:at] = draw_from.randbytes(draw_from.randrange(1, 200))
    else:
        at = draw_from.randrange(40)
        number = draw_from.choice([0, 22000, 30000, 2**16, 2**31 - 1, 2**32 - 1])
        changed[at : at + 4] = number.to_bytes(4, draw_from.choice(["little", "big"]))
        if content.startswith(b"\x89PNG"):
            changed[29:33] = struct.pack(">I", zlib.crc32(changed[12:29]))
    return bytes(changed)


@pytest.mark.parametrize("suffix", SOUND)
@pytest.mark.filterwarnings("ignore")
def test_of_damaged_files_each_is_an_image_or_an_error_that_names_it(tmp_path: Path, suffix: str) -> None:
    contents = list(SOUND[suffix])
    for options in {"bmp": [{}], "tif": [{}, {"compression": "tiff_lzw"}, {"compression": "jpeg"}]}.get(suffix, []):
        contents.append(draw(tmp_path / f"sound.{suffix}", NOISE, **options).read_bytes())
    draw_from, outcomes = random.Random(suffix), set()
    for i in range(75):
        path = write(tmp_path / f"{i}.{suffix}", mutated(contents[i % len(contents)], draw_from))
        for read in (read_header, read_image, read_mask):
            try:
                read(path)
                outcomes.add("an image")
            except ImageError as error:
                assert error.path == path and str(error).startswith(f"{path}: ") and error.reason
                outcomes.add("an error")
    assert outcomes == {"an image", "an error"}


def claiming(content: bytes, side: int) -> bytes:
    """The PNG, JPEG or BMP with a header of side x side pixels."""
    changed = bytearray(content)
    if content.startswith(b"\x89PNG"):
        changed[16:24] = struct.pack(">II", side, side)
        changed[29:33] = struct.pack(">I", zlib.crc32(changed[12:29]))
    elif content.startswith(b"BM"):
        changed[18:26] = struct.pack("<II", side, side)
    else:
        at = content.index(b"\xff\xc0") + 5
        changed[at : at + 4] = struct.pack(">HH", side, side)
    return bytes(changed)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp"])
def test_a_header_that_claims_more_pixels_than_the_file_can_hold_takes_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Nothing is decoded then, for which Pillow would take the memory of all pixels."""
    path = write(tmp_path / name, claiming(draw(tmp_path / name, NOISE).read_bytes(), 22000))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("was decoded"))
    with pytest.raises(ImageError, match="bytes cannot hold 22000 x 22000 pixels"):
        read_image(path)


@pytest.mark.parametrize("shape", [(2000, 1500), (2000, 1500, 3)])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", {}),
        *(("a.tif", {"compression": f"tiff_{name}"}) for name in ("adobe_deflate", "lzw")),
        *(("a.jpg", options) for options in ({}, {"optimize": True}, {"progressive": True}, {"subsampling": 2})),
        *((("a.webp"), {"lossless": lossless}) for lossless in (False, True)),
        ("a.gif", {}),
    ],
)
def test_a_small_file_may_hold_many_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(images, "_SAFE_PIXELS", 1000)
    path = draw(tmp_path / name, np.full(shape, 255, np.uint8), **options)
    assert path.stat().st_size < 2000 * 1500 / 30
    assert read_header(path)[:2] == read_mask(path).shape == shape[:2]


def test_names_that_no_terminal_shows_are_escaped_in_errors(tmp_path: Path) -> None:
    error = ImageError(tmp_path / "a\udcf6\n.png", "it is broken")
    assert str(error) == f"{tmp_path}/a\\xf6\\n.png: it is broken"


# geometry


# Of values in [0, 1]: Pillow sums in float64 and rounds to float32 once an axis; the weights of an axis, whose absolute
# values add up to 1.5 at most, pass the first rounding on, and the weights' own last digits come on top.
TWO_PASSES = 8 * np.finfo(np.float32).eps


def lanczos(n: int, m: int) -> np.ndarray:
    """(m, n) weights that resample n values to m: Lanczos with three lobes, widened when it shrinks."""
    scale = n / m
    centres = (np.arange(m)[:, None] + 0.5) * scale
    distance = (np.arange(n) + 0.5 - centres) / max(scale, 1)
    weights = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("size", [(20, 17), (40, 61), (93, 120), (1, 1)])
def test_resize_image_is_lanczos_in_float(size: tuple[int, int]) -> None:
    image = torch.rand(3, 40, 60)
    exact = lanczos(40, size[0]) @ image.double().numpy() @ lanczos(60, size[1]).T
    resized = resize_image(image, size)
    assert resized.dtype == torch.float32
    np.testing.assert_allclose(resized.numpy(), exact.clip(0, 1), atol=TWO_PASSES)


def test_overshoot_is_clipped() -> None:
    step = (torch.arange(16) < 8).float().expand(3, 16, 16)
    exact = lanczos(16, 24) @ step[0, 0].double().numpy()
    assert exact.max() > 1.05 and exact.min() < -0.05
    resized = resize_image(step, (16, 24))[0, 0]
    assert resized.max() == 1 and resized.min() == 0


def test_resize_image_copies_one_channel_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[weakref.ref] = []
    fromarray = Image.fromarray

    def watched(plane: np.ndarray) -> Image.Image:
        assert not any(copy() for copy in copies)
        copies.append(weakref.ref(image := fromarray(plane)))
        return image

    monkeypatch.setattr(Image, "fromarray", watched)
    assert resize_image(torch.rand(3, 9, 7), (4, 5)).shape == (3, 4, 5) and len(copies) == 3


def test_resize_image_keeps_more_than_8_bits() -> None:
    ramp = torch.linspace(0.4, 0.4 + 1 / 255, 64).expand(3, 8, 64)
    resized = resize_image(ramp, (4, 32))
    assert resized[0, 0].unique().numel() == 32
    np.testing.assert_allclose(resized[0, 0, 3:-3], ramp[0, 0].reshape(32, 2).mean(1)[3:-3], atol=TWO_PASSES)


def test_resizing_to_the_same_size_is_the_identity() -> None:
    image = torch.rand(3, 5, 9)
    assert resize_image(image, (5, 9)) is image
    assert whole_image(image, 5) is image


def test_resize_mask_is_nearest() -> None:
    mask = torch.rand(40, 60) > 0.5
    for h, w in ((24, 20), (96, 120), (40, 60)):  # none of which puts a sample on the edge of two pixels
        rows = ((np.arange(h) + 0.5) * 40 / h).astype(int)
        columns = ((np.arange(w) + 0.5) * 60 / w).astype(int)
        resized = resize_mask(mask, (h, w))
        assert resized.dtype == torch.bool
        np.testing.assert_array_equal(resized.numpy(), mask.numpy()[rows][:, columns])


@pytest.mark.parametrize(
    ("size", "img_size", "expected"),
    [
        ((320, 427), 256, (256, 342)),
        ((600, 800), 256, (256, 341)),
        ((1240, 500), 256, (635, 256)),
        ((257, 999), 256, (256, 995)),
        ((100, 100), 1024, (1024, 1024)),
        ((1, 100), 8, (8, 800)),
        ((3, 4), 1, (1, 1)),
    ],
)
def test_whole_image_keeps_the_aspect(size: tuple[int, int], img_size: int, expected: tuple[int, int]) -> None:
    assert whole_image_size(*size, img_size) == expected
    image = torch.rand(3, *size)
    torch.testing.assert_close(whole_image(image, img_size), resize_image(image, expected), rtol=0, atol=0)
    mask = image[0] > 0.5
    assert torch.equal(whole_image(mask, img_size), resize_mask(mask, expected))


@pytest.mark.parametrize("size", [(320, 427), (1, 100), (20_000, 1), (8, 8)])
def test_a_whole_image_may_become_a_square(size: tuple[int, int]) -> None:
    image = torch.rand(3, *size)
    assert whole_image_size(*size, 8, square=True) == (8, 8)
    assert torch.equal(whole_image(image, 8, square=True), resize_image(image, (8, 8)))
    mask = image[0] > 0.5
    assert torch.equal(whole_image(mask, 8, square=True), resize_mask(mask, (8, 8)))
    assert whole_image_size(*size, "native", square=True) == (min(size), min(size))


@pytest.mark.parametrize("size", [(320, 427), (600, 800), (1240, 500), (257, 999), (64, 64), (999, 257)])
@pytest.mark.parametrize("img_size", [256, 255, 77])
def test_centre_crop_is_that_of_torchvision(size: tuple[int, int], img_size: int) -> None:
    def official(image: Image.Image, filter: transforms.InterpolationMode) -> np.ndarray:
        steps = [transforms.Resize(img_size, filter), transforms.CenterCrop(img_size)]
        return np.asarray(transforms.Compose(steps)(image))

    image = torch.rand(3, *size)
    cropped = centre_crop(image, img_size)
    assert cropped.is_contiguous()
    for channel, plane in zip(cropped.numpy(), image.numpy(), strict=True):
        expected = official(Image.fromarray(plane), transforms.InterpolationMode.LANCZOS)
        np.testing.assert_array_equal(channel, expected.clip(0, 1))

    mask = image[0] > 0.5
    expected = official(Image.fromarray(mask.numpy().astype(np.uint8)), transforms.InterpolationMode.NEAREST)
    np.testing.assert_array_equal(centre_crop(mask, img_size).numpy(), expected.astype(bool))


def test_centre_crop_of_8_bits_is_the_official_one_to_its_rounding() -> None:
    rows, columns = np.mgrid[:320, :427]
    waves = [127 + 90 * np.sin(rows / 40 + c) * np.cos(columns / 50) for c in range(3)]
    pixels = np.stack(waves, -1).astype(np.uint8)
    steps = [transforms.Resize(256, transforms.InterpolationMode.LANCZOS), transforms.CenterCrop(256)]
    official = transforms.ToTensor()(transforms.Compose(steps)(Image.fromarray(pixels)))
    cropped = centre_crop(from_pil(Image.fromarray(pixels)), 256)
    # each of Pillow's two passes rounds by half a level, and the second spreads the error of the first
    spread = np.abs(lanczos(320, 256)).sum(1).max()
    assert (cropped - official).abs().max() * 255 <= 0.5 * spread + 0.5 + 0.01
