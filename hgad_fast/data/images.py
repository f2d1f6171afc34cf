"""Image files as float tensors, upright and in [0, 1], and brought to the size of the model."""

from __future__ import annotations

import errno
import io
import math
import os
import random
import stat
import struct
import sys
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..files import printable
from ..terminal import warn_user

if TYPE_CHECKING:
    import PIL.Image
    import PIL.ImageFile

MAX_IMAGE_PIXELS = 2**29
"""More pixels than these are refused as a decompression bomb: 23170 x 23170, 6.4 GB as a float32 tensor."""

WHITE_LEVEL = 65535
"""The value of white in 16-bit words, unless a camera of fewer bits wrote them."""

CAMERA_LEVELS = (255, 1023, 4095, 16383)
"""The largest values of cameras of 8, 10, 12 and 14 bits."""

# Pillow would otherwise try every format it knows, and hand PostScript in a file named .png to Ghostscript. Those that
# it knows at once come first.
_FORMATS = ("PNG", "JPEG", "BMP", "PPM", "GIF", "DIB", "TIFF", "WEBP", "JPEG2000")
_FORMATS_BY_SUFFIX = {".tga": "TGA", ".avif": "AVIF"}  # files of the first show by nothing else what they are

_SAFE_PIXELS = 2**26  # 268 MB in Pillow: so many are tried to decode, whatever the size of the file
_JPEG_PIXELS = 512  # that a byte of a JPEG can hold at most: a bit for a block of 64
_DEFLATE, _LZW = 1032, 2731  # bytes of pixels that a byte of a file can hold at most; WebP and others know no bound
_RATIOS = {"PNG": _DEFLATE, "GIF": _LZW, "PPM": 1}
_TIFF_RATIOS = {"raw": 1, "packbits": 64, "tiff_lzw": _LZW, "tiff_adobe_deflate": _DEFLATE, "tiff_deflate": _DEFLATE}

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
_PNG_PASSES = (  # of an interlaced image: the first column and row, and the steps to the next
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2),
)  # fmt: skip
_BLOCK = 1 << 16  # bytes that are read and inflated at a time

said: set[str] = set()  # what `warn_once` has said


class ImageError(ValueError):
    """The image file `path` cannot be used, for `reason`."""

    def __init__(self, path: Path, reason: str):
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{printable(self.path)}: {self.reason}"


@dataclass(frozen=True)
class Pixels:
    """The values of an upright image as its file has them.

    Attributes:
        values: grey (H, W) or colour (H, W, 3); uint8, uint16 (or 32 bits in its range), or float32 in [0, 1].
        alpha: (H, W) uint8, or None where there is none.
        palette: (H, W) uint8, the indices from which `values` were looked up, or None.
        lossy: how it was compressed, as far as the file tells: "JPEG"; "lossy" (WebP, JPEG 2000, both by their
            headers); "perhaps" (formats that do not tell); "" without loss.
    """

    values: np.ndarray
    alpha: np.ndarray | None = None
    palette: np.ndarray | None = None
    lossy: str = ""

    def tensor(self, white_level: int = WHITE_LEVEL, name: str = "an image") -> Tensor:
        """Return the image as (3, H, W) float32 in [0, 1]; `white_level` is the value of white in 16-bit words.

        A warning calls the image by `name`.

        Raises:
            ValueError: a 16-bit value is above the white level.
        """
        values = self.values
        if values.dtype == np.uint16:
            check_white_level(values, white_level, name)
            values = values.astype(np.float32)
            values /= np.float32(white_level)
        if values.ndim == 2:
            tensor = torch.from_numpy(np.array(values)).to(torch.float32).repeat(3, 1, 1)
        else:
            tensor = torch.from_numpy(np.array(values.transpose(2, 0, 1), order="C")).to(torch.float32)
        return tensor.div_(255) if values.dtype == np.uint8 else tensor


def check_white_level(values: np.ndarray, white_level: int, name: str = "an image") -> None:
    """Raise a ValueError if a 16-bit value is above the white level; warn, once a process, if all are far below it."""
    peak = int(values.max(initial=0))
    suggested = suggested_white_level(peak)
    if peak > white_level:
        raise ValueError(
            f"16-bit values reach {peak}, and white_level is {white_level}: is this another camera? Scale its values, "
            f"or train with white_level={suggested} (--set white_level={suggested})"
        )
    if white_level == WHITE_LEVEL and 0 < peak <= 4095:
        warn_once(
            "dark",
            f"{name}: 16-bit values reach {peak}, and white is taken as {WHITE_LEVEL}, so that it is almost black; if "
            f"it is of a camera of fewer bits, train with white_level={suggested} (--set white_level={suggested})",
        )


def suggested_white_level(peak: int) -> int:
    """Return the white level that images whose largest 16-bit value is `peak` suggest: of `CAMERA_LEVELS`, or 65535."""
    return next((level for level in CAMERA_LEVELS if peak <= level), WHITE_LEVEL)


def warn_once(subject: str, message: str) -> None:
    """Warn, once per process for each subject."""
    if subject not in said:
        take_as_said(subject)
        warn_user(message)


def take_as_said(subject: str) -> None:
    """Let `warn_once` be silent about a subject."""
    said.add(subject)


def read_image(path: str | os.PathLike[str], white_level: int = WHITE_LEVEL) -> Tensor:
    """Read an image file as (3, H, W) float32 in [0, 1], upright, red first, its values converted as by `from_pil`.

    Of a file with several pages the first is read. Colour of 16 bits in PNG and TIFF keeps them all; in other formats
    it is cut to 8, with one warning per process. A JPEG that lacks nothing but its end marker is read, which is known
    of baseline JPEGs of one scan without restart markers.

    Args:
        path: the file.
        white_level: the value of white in 16-bit words: 4095 for those of a camera of 12 bits.

    Raises:
        ImageError: the file is missing, in an unknown format, damaged or truncated anywhere, its values are refused by
            `from_pil`, it has more than `MAX_IMAGE_PIXELS` pixels or takes more memory than there is, or it is a pipe,
            a socket or a device.
    """
    path = Path(path)
    try:
        pixels = read_pixels(path)
        with within_memory(path, pixels.values.shape[:2]):
            return pixels.tensor(white_level, printable(path))
    except ImageError:
        raise
    except ValueError as error:
        raise ImageError(path, str(error)) from error


def read_pixels(path: str | os.PathLike[str], *, for_mask: bool = False) -> Pixels:
    """Read an image file as `Pixels`, with alpha and the indices of a palette only `for_mask`.

    Raises:
        ImageError: as `read_image`, except for the white level.
    """
    path = Path(path)
    with _opened(path) as image:
        _require_bytes(image, path.stat().st_size)
        if bits_of_colour(image) == 16:
            if (pixels := _colour_of_16_bits(path, image)) is not None:
                if image.format == "PNG":
                    _require_rows(path)
                return pixels
            warn_once(
                "colour",
                f"{printable(path)} has 16 bits a colour, of which the upper 8 are read; so for all such files",
            )
        whole: PIL.Image.Image | None = image
        try:
            image.load()
        except OSError:
            if image.format not in ("JPEG", "MPO") or (whole := _without_end_marker(path.read_bytes())) is None:
                raise
        assert whole is not None
        if image.format == "PNG" and (image.info.get("interlace") or _ends_black(image)):
            _require_rows(path)
        return replace(_pixels(whole, for_mask), lossy=_loss(path, image) if for_mask else "")


def _require_bytes(image: PIL.Image.Image, size: int) -> None:
    """Raise a ValueError if a file of `size` bytes cannot hold as many pixels as its header claims.

    Pillow takes the memory of all pixels before it decodes the first.
    """
    ratio = _RATIOS.get(image.format or "")
    compression = image.info.get("compression", "raw")
    if image.format == "TIFF":
        ratio = _TIFF_RATIOS.get(compression)
    elif image.format in ("BMP", "DIB") and compression in (0, 3):  # the others are of run lengths
        ratio = 1
    pixels = image.width * image.height
    bits = 1 if image.mode in ("1", "L", "P", "LA", "PA") else 12  # of a pixel, at least
    most = math.inf if ratio is None else 8 * ratio * size // bits
    if image.format in ("JPEG", "MPO"):
        most = _JPEG_PIXELS * size
    if pixels > most and (ratio == 1 or pixels > _SAFE_PIXELS):
        raise ValueError(f"damaged or truncated: {size} bytes cannot hold {image.width} x {image.height} pixels")


def _loss(path: Path, image: PIL.Image.Image) -> str:
    """Return how an image was compressed, as `Pixels.lossy` says it."""
    if image.format in ("JPEG", "MPO") or image.info.get("compression") in ("jpeg", "tiff_jpeg"):
        return "JPEG"
    if image.format == "AVIF":
        return "perhaps"
    if image.format not in ("WEBP", "JPEG2000"):
        return ""
    content = path.read_bytes()
    if image.format == "WEBP":  # the chunk of the first frame's pixels
        lossy, lossless = content.find(b"VP8 "), content.find(b"VP8L")
        return "lossy" if lossy >= 0 and (lossless < 0 or lossy < lossless) else ""
    style = content.find(b"\xff\x52", content.find(b"\xff\x4f\xff\x51") + 4)  # COD, which says which wavelet it is
    reversible = style < 0 or content[style + 13 : style + 14] == b"\x01"
    return "perhaps" if reversible else "lossy"  # a reversible wavelet may have been cut short


def _ends_black(image: PIL.Image.Image) -> bool:
    """Return whether the last row of a decoded image is zero, as Pillow leaves rows that its file does not have."""
    return not np.asarray(image.crop((0, image.height - 1, image.width, image.height))).any()


def _require_rows(path: Path) -> None:
    """Raise a ValueError if a PNG's compressed data end before its last row, which Pillow takes for black."""
    with open_regular(path) as file:
        file.seek(len(_PNG_SIGNATURE))
        missing, decompressor = 0, zlib.decompressobj()
        kind = b""
        while len(head := file.read(8)) == 8:
            length, before, kind = int.from_bytes(head[:4], "big"), kind, head[4:]
            if kind == b"IHDR":
                missing = _png_bytes(file.read(length))
            elif kind == b"IDAT":
                while length and missing > 0:
                    block = file.read(min(length, _BLOCK))
                    if not block:
                        break
                    length -= len(block)
                    missing -= _inflated(decompressor, block, missing)
                if missing <= 0:
                    return
                file.seek(length, os.SEEK_CUR)
            elif before == b"IDAT":  # Pillow reads no further
                break
            else:
                file.seek(length, os.SEEK_CUR)
            file.seek(4, os.SEEK_CUR)  # the checksum
    raise ValueError(f"truncated: its rows end early, {missing} bytes of pixels are missing")


def _inflated(decompressor: Any, block: bytes, most: int) -> int:
    """Return to how many bytes a block inflates, counted in parts and up to `most`."""
    count = 0
    while block and count < most and not decompressor.eof:
        part = decompressor.decompress(block, _BLOCK)
        block = decompressor.unconsumed_tail
        count += len(part)
    return count


def _png_bytes(header: bytes) -> int:
    """Return the bytes of all rows, each with its filter's, that the header of a PNG demands."""
    width, height, bits, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header[:13])
    pixel_bits = bits * _PNG_CHANNELS[colour]
    total = 0
    for left, top, step_x, step_y in _PNG_PASSES if interlaced else ((0, 0, 1, 1),):
        columns, rows = -((left - width) // step_x), -((top - height) // step_y)
        if columns > 0 and rows > 0:
            total += rows * (1 + (columns * pixel_bits + 7) // 8)
    return total


def bits_of_colour(image: PIL.Image.Image) -> int:
    """Return 16 for an image of 16 bits a colour, which must not be decoded yet, and 8 for any other.

    Only the decoder that Pillow chose tells: Pillow's mode is RGB for 8 and for 16 bits.
    """
    bits = getattr(image, "tag_v2", {}).get(258, ())  # of each sample of a TIFF, whose planes may lie apart
    raw_modes = "".join(str(tile[3]) for tile in getattr(image, "tile", []))  # "RGB;16B", or ("RGBA;16L", ...)
    colour = image.mode.startswith("RGB") or image.mode in ("LA", "CMYK")
    return 16 if colour and (";16" in raw_modes or isinstance(bits, tuple) and 16 in bits) else 8


def _colour_of_16_bits(path: Path, image: PIL.Image.Image) -> Pixels | None:
    """Return the upright image with colours, or with grey beside alpha, of 16 bits; None where Pillow has 8 only.

    Pillow's images of colour have 8 bits, and of 16 it takes the upper byte. So the file is decoded twice, the second
    time as if its bytes were in the other order. Of alpha the upper byte is enough.
    """
    from PIL import ImageOps

    if getattr(image, "tag_v2", {}).get(284) == 2:
        raise ValueError("16-bit colour in separate planes; store the colours of a pixel side by side (planar: contig)")
    with _opened(path) as other:
        raw_modes = {tile[3][0] if isinstance(tile[3], tuple) else tile[3] for tile in other.tile}
        raw_mode = str(raw_modes.pop()) if len(raw_modes) == 1 else ""
        if raw_mode == "LA;16B" and image.mode == "RGBA":  # the four bytes of grey and alpha, as four colours
            other.tile = [_with_raw_mode(tile, "RGBA") for tile in other.tile]
            channels = np.asarray(ImageOps.exif_transpose(other))
            return Pixels(channels[..., 0].astype(np.uint16) << 8 | channels[..., 1], channels[..., 2])
        name, _, order = raw_mode.rpartition(";16")
        if name not in ("RGB", "RGBA", "RGBX") or order not in ("B", "L", "N"):
            return None
        big = order == "B" or order == "N" and sys.byteorder == "big"
        other.tile = [_with_raw_mode(tile, f"{name};16{'L' if big else 'B'}") for tile in other.tile]
        upper, lower = (np.asarray(ImageOps.exif_transpose(half)) for half in (image, other))
        colours = upper[..., :3].astype(np.uint16) << 8 | lower[..., :3]
        return Pixels(colours, upper[..., 3] if name == "RGBA" else None)


def _with_raw_mode(tile: Any, raw_mode: str) -> Any:
    """Return one of Pillow's tiles (decoder, extents, offset, arguments) with another first argument."""
    changed = (raw_mode, *tile[3][1:]) if isinstance(tile[3], tuple) else raw_mode
    return tile._replace(args=changed) if hasattr(tile, "_replace") else (*tile[:3], changed)


_bits = random.Random(0)
_CONTINUATIONS = [
    b"",
    *(bytes([32 * first + _bits.randrange(31), *(_bits.randrange(255) for _ in range(255))]) for first in range(8)),
]


def _without_end_marker(content: bytes) -> PIL.Image.Image | None:
    """Return the image of a JPEG that lacks its end marker, if all of its pixels are there; None if that is unknown.

    Whatever bits follow, the pixels of a complete scan are the same; where a part is missing, the bits that follow
    stand for it. Each of the continuations, which begin with all triples of bits, leaves a missing block as it was with
    a probability of a quarter at most, as a block is two codes or more. That says nothing of further scans, nor of what
    follows a restart marker.
    """
    from PIL import Image

    if not _is_one_scan(content):
        return None
    content = content.rstrip(b"\xff")  # the first byte of the marker may be there
    first: PIL.Image.Image | None = None
    for following in _CONTINUATIONS:
        with Image.open(io.BytesIO(content + following + b"\xff\xd9"), formats=("JPEG",)) as image:
            image.load()
            if first is None:
                first = image.copy()
            elif image.tobytes() != first.tobytes():
                return None
    return first


def _is_one_scan(content: bytes) -> bool:
    """Return whether a JPEG is sequential (SOF0, SOF1), of one scan of all components, without restart intervals."""
    components, at = 0, 2
    while at + 4 <= len(content) and content[at] == 0xFF:
        marker, length = content[at + 1], int.from_bytes(content[at + 2 : at + 4], "big")
        body = content[at + 4 : at + 2 + length]
        if marker == 0xDA:
            return components > 0 and body[:1] == bytes([components])
        if marker in (0xC0, 0xC1):
            components = body[5] if len(body) > 5 else 0
        elif 0xC2 <= marker <= 0xCF and marker not in (0xC4, 0xC8) or marker == 0xDD and any(body):
            return False
        at += 2 + length
    return False


def read_header(path: str | os.PathLike[str]) -> tuple[int, int, str]:
    """Return height, width and mode of an image file, without decoding its pixels.

    Height and width are those of the upright image, unless the orientation stands behind the pixels or only in XMP. The
    mode is Pillow's, with ``;16`` where that has 8 bits a colour and the file has 16.

    Raises:
        ImageError: as in `read_image`, but not for damage within the pixels.
    """
    with _opened(Path(path)) as image:
        width, height = image.size
        if "exif" in image.info and image.getexif().get(0x0112, 1) >= 5:  # TIFFs have none: Pillow turns their size
            width, height = height, width
        return height, width, image.mode + (";16" if bits_of_colour(image) == 16 else "")


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read its bytes. A pipe, a socket or a device, which may never end, is an OSError."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # of a folder, `open` says so itself
        raise OSError(errno.EINVAL, "no regular file, but a pipe, a socket or a device; give a file", str(path))
    return open(path, "rb")


@contextmanager
def within_memory(path: Path, size: tuple[int, int] | None = None) -> Iterator[None]:
    """Turn a failure to allocate memory inside the block into an ImageError; `size` is (height, width), if known."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        text = str(error)
        pillow = isinstance(error, OSError) and (error.errno == errno.ENOMEM or "out of memory" in text)
        torch_ = isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in text or "bad_alloc" in text)
        if not (isinstance(error, MemoryError) or pillow or torch_):
            raise
        what = "it takes" if size is None else f"{size[1]} x {size[0]} pixels take"
        raise ImageError(
            path, f"{what} more memory than there is; cut the image into tiles, or free some memory"
        ) from error


@contextmanager
def _opened(path: Path) -> Iterator[PIL.ImageFile.ImageFile]:
    """Yield the opened image, not decoded yet; an error inside the block becomes an ImageError."""
    from PIL import Image, UnidentifiedImageError

    formats: tuple[str, ...] = _FORMATS
    if further := _FORMATS_BY_SUFFIX.get(path.suffix.lower()):
        Image.init()
        formats += (further,) if further in Image.OPEN else ()
    try:
        # By file name Pillow would map uncompressed grey TIFFs into memory, and scramble those to be rotated.
        with (
            _unlimited_pixels(),
            within_memory(path),
            open_regular(path) as file,
            Image.open(file, formats=formats) as image,
        ):
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise ValueError(
                    f"{image.width} x {image.height} pixels, more than hgad_fast.data.images.MAX_IMAGE_PIXELS = "
                    f"{MAX_IMAGE_PIXELS}: cut it into tiles, unless it is a decompression bomb"
                )
            with within_memory(path, (image.height, image.width)):
                yield image
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        reason = f"no image, or a truncated or damaged one; read are {', '.join(formats)}"
        if path.stat().st_size == 0:
            reason = "the file is empty"
        raise ImageError(path, reason) from error
    except OSError as error:
        raise ImageError(path, error.strerror or str(error)) from error
    except Exception as error:  # on a damaged file Pillow raises anything from SyntaxError to struct.error
        raise ImageError(path, str(error) or type(error).__name__) from error


def from_pil(image: PIL.Image.Image, white_level: int = WHITE_LEVEL) -> Tensor:
    """Convert a Pillow image of any mode to (3, H, W) float32 in [0, 1], red first, rotated as its EXIF says.

    - 8 bits per channel are divided by 255. Grey is repeated over the channels, a palette is looked up.
    - 16-bit grey is divided by `white_level`, by default its whole range: 12-bit values in 16-bit words stay dark then.
    - Colour has 8 bits in Pillow's images; `read_image` reads 16-bit colour from files.
    - 32-bit integers must lie in 0..65535 and count as 16-bit. Floats must lie in [0, 1] and are kept.
    - Alpha is dropped, as `convert("RGB")` does: a pixel is what the camera wrote. Some leave the fourth byte of their
      32-bit pixels zero, so that compositing would blank the image.
    - CMYK is converted without colour management; embedded ICC profiles are not applied.

    Raises:
        ValueError: values are outside these ranges or above the white level, or the image is a 16-bit TIFF whose white
            is zero.
    """
    return _pixels(image).tensor(white_level)


def _pixels(image: PIL.Image.Image, for_mask: bool = False) -> Pixels:
    """Return the upright values of a Pillow image; see `read_pixels`."""
    from PIL import ImageOps

    white_is_zero = getattr(image, "tag_v2", {}).get(262) == 0  # the TIFF tag PhotometricInterpretation
    if white_is_zero and image.mode.startswith("I;16"):
        raise ValueError("16-bit TIFF whose white is zero, which Pillow reads inverted; store black as zero")
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        return Pixels(_within(np.array(image), 1.0))
    if image.mode.startswith("I"):
        return Pixels(_within(np.array(image), 65535.0).astype(np.uint16))
    alpha = palette = None
    if for_mask:
        if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
            alpha = np.asarray(image.convert("RGBA").getchannel("A"))
        palette = np.asarray(image) if image.mode == "P" else None
    image.info.pop("transparency", None)  # or Pillow warns that RGB has no room for the alpha of a palette
    return Pixels(np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB")), alpha, palette)


def _within(values: np.ndarray, upper: float) -> np.ndarray:
    """Return the values if they are in [0, upper]; a ValueError otherwise."""
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= upper):  # a NaN fails both
        raise ValueError(
            f"{values.dtype} grey values from {low:g} to {high:g} are not in [0, {upper:g}]; "
            "store 16-bit integers, or floats in [0, 1]"
        )
    return values


_decoding_lock = threading.Lock()
_decoding = 0  # threads inside `_unlimited_pixels`
_pillow_limit: int | None = None


@contextmanager
def _unlimited_pixels() -> Iterator[None]:
    """Lift Pillow's process-wide limit on pixels, and its warnings below it, while any thread is in the block.

    Line-scan and microscope images are beyond that limit; `MAX_IMAGE_PIXELS` takes its place.
    """
    from PIL import Image

    global _decoding, _pillow_limit
    with _decoding_lock:
        if _decoding == 0:
            _pillow_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _decoding += 1
    try:
        yield
    finally:
        with _decoding_lock:
            _decoding -= 1
            if _decoding == 0:
                Image.MAX_IMAGE_PIXELS = _pillow_limit


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resample an image (C, H, W) float to `size` (h, w) by Pillow's Lanczos filter, as float32 in [0, 1].

    Channels are resampled as floats: 8-bit, 16-bit and computed images take one path, without rounding. The filter's
    overshoot at edges is clipped. An image that has this size already is returned as it is.
    """
    from PIL import Image

    if tuple(image.shape[-2:]) == tuple(size):
        return image
    height, width = size
    resized = [
        np.array(Image.fromarray(plane).resize((width, height), Image.Resampling.LANCZOS))  # copies one plane at a time
        for plane in image.detach().to("cpu", torch.float32).numpy()
    ]
    return torch.from_numpy(np.stack(resized)).clamp_(0, 1).to(image.device)


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Resample a mask (H, W) bool to `size` (h, w) by Pillow's nearest neighbour."""
    from PIL import Image

    height, width = size
    image = Image.fromarray(mask.to("cpu", torch.uint8).numpy())
    resized = np.array(image.resize((width, height), Image.Resampling.NEAREST))
    return torch.from_numpy(resized).to(mask.device, torch.bool)


def whole_image(image: Tensor, img_size: int | str, square: bool = False) -> Tensor:
    """Resize a whole image (3, H, W) float or mask (H, W) bool to `whole_image_size`."""
    height, width = image.shape[-2:]
    return _resize(image, whole_image_size(height, width, img_size, square))


def whole_image_size(height: int, width: int, img_size: int | str, square: bool = False) -> tuple[int, int]:
    """Return the (h, w) of `whole_image`: the short side is `img_size`, the long one keeps the proportions, rounded.

    With ``"native"`` it is the size of the image itself. With `square` both sides are the short one, whatever the
    proportions.
    """
    short = min(height, width)
    side = _side(short, img_size)
    if square:
        return side, side
    return round(side * height / short), round(side * width / short)


def centre_crop(image: Tensor, img_size: int | str) -> Tensor:
    """Resize an image (3, H, W) float or a mask (H, W) bool, and cut a square of side `img_size` from its centre.

    This is the official protocol: the short side is resized to `img_size`, then the centre is cut out, as by
    torchvision's Resize and CenterCrop. With ``"native"`` the side of the square is the image's short side.
    """
    height, width = image.shape[-2:]
    size, top, left = centre_crop_geometry(height, width, img_size)
    side = _side(min(height, width), img_size)
    return _resize(image, size)[..., top : top + side, left : left + side].contiguous()


def centre_crop_geometry(height: int, width: int, img_size: int | str) -> tuple[tuple[int, int], int, int]:
    """Return the (h, w) to which `centre_crop` resizes an image, and the top and left of the crop in it."""
    short = min(height, width)
    side = _side(short, img_size)
    h, w = side * height // short, side * width // short
    return (h, w), round((h - side) / 2), round((w - side) / 2)


def _side(short: int, img_size: int | str) -> int:
    """Return the short side after resizing: `img_size`, or with ``"native"`` the image's own."""
    return short if isinstance(img_size, str) else img_size


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resample an image, or a mask, which is bool."""
    return resize_mask(image, size) if image.dtype == torch.bool else resize_image(image, size)
