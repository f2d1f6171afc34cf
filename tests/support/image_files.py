"""Image files of kinds that Pillow does not write, made by their specifications."""

from __future__ import annotations

import struct
import zlib

import numpy as np


def png(width: int, height: int, bits: int, colour_type: int, rows: bytes) -> bytes:
    """Return a PNG of these rows, each behind the number of its filter."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(
    samples: np.ndarray, byte_order: str, *, planar: int = 1, orientation: int = 1, deflated: bool = False
) -> bytes:
    """Return a TIFF of 16-bit samples (H, W, 3 or 4); deflated it has one plane."""
    height, width, channels = samples.shape
    stored = samples if planar == 1 else samples.transpose(2, 0, 1)
    data = stored.astype(f"{byte_order}u2").tobytes()
    data = zlib.compress(data) if deflated else data
    strips = 1 if planar == 1 else channels
    values = [
        (256, 4, [width]),
        (257, 4, [height]),
        (258, 3, [16] * channels),
        (259, 3, [8 if deflated else 1]),
        (262, 3, [2]),
    ]
    values += [(273, 4, [8 + i * len(data) // strips for i in range(strips)]), (274, 3, [orientation])]
    values += [(277, 3, [channels]), (278, 4, [height]), (279, 4, [len(data) // strips] * strips), (284, 3, [planar])]
    values += [(338, 3, [2])] if channels == 4 else []
    content, entries = bytearray(8 + len(data)), b""
    content[8:] = data
    for tag, kind, numbers in values:
        packed = struct.pack(f"{byte_order}{len(numbers)}{'_..HI'[kind]}", *numbers)
        field = packed.ljust(4, b"\0")
        if len(packed) > 4:
            field = struct.pack(f"{byte_order}I", len(content))
            content += packed
        entries += struct.pack(f"{byte_order}HHI", tag, kind, len(numbers)) + field
    magic = b"II*\0" if byte_order == "<" else b"MM\0*"
    content[:8] = magic + struct.pack(f"{byte_order}I", len(content))
    return bytes(content + struct.pack(f"{byte_order}H", len(values)) + entries + bytes(4))


def in_rows(samples: np.ndarray) -> bytes:
    """Return samples (H, W, C) of 16 bits as rows of a PNG, each relative to the pixel before (filter 1).

    So the decoder must know how many bytes a pixel has.
    """
    rows = samples.astype(">u2").reshape(len(samples), -1).view(np.uint8)
    pixel = 2 * samples.shape[2]
    return b"".join(b"\1" + (row - np.r_[np.zeros(pixel, np.uint8), row[:-pixel]]).tobytes() for row in rows)


def with_alpha(samples: np.ndarray) -> np.ndarray:
    """Return colours (H, W, C) beside a constant alpha."""
    return np.concatenate([samples, np.full_like(samples[..., :1], 777)], -1)
