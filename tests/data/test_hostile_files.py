"""What lies in a folder of images and is no sound image: it is refused by name, and costs neither time nor memory."""

from __future__ import annotations

import os
import struct
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hgad_fast.data import images, masks
from hgad_fast.data.datasets import DatasetError, content_hash, discover
from hgad_fast.data.images import ImageError, read_header, read_image
from hgad_fast.data.masks import read_mask
from hgad_fast.data.survey import survey
from hgad_fast.scoring import pipeline


def draw(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(1, 256, (8, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    for i in range(2):
        draw(tmp_path / f"set/w/train/good/{i}.png", i)
    pipe, link = tmp_path / "set/w/train/good/pipe.png", tmp_path / "set/w/train/good/link.png"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link, Path(os.devnull)):
        for read in (read_image, read_mask, read_header):
            with pytest.raises(ImageError, match="no regular file, but a pipe, a socket or a device") as caught:
                read(path)
            assert caught.value.path == path
        assert content_hash(path) == ""
    os.mkfifo(tmp_path / "list.csv")
    with pytest.raises(DatasetError, match=r"list\.csv: no such CSV file"):
        discover(tmp_path / "list.csv")
    found = [finding.detail for finding in survey(discover(tmp_path / "set")).findings]
    assert {str(path) for path in (pipe, link) if any(f"{path}: no regular file" in text for text in found)} == {
        *(str(link), str(pipe)),
    }


ALLOCATION = (
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    OSError("out of memory error when reading image file"),
)


@pytest.mark.parametrize("error", ALLOCATION)
def test_an_image_for_which_there_is_no_memory_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    path = draw(tmp_path / "a.png")
    for module, name, read in (
        (Image.Image, "convert", read_image),
        (images.Pixels, "tensor", read_image),
        (masks, "_levels", read_mask),
        (torch, "from_numpy", read_mask),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fail)
            with pytest.raises(ImageError, match=r"a\.png: 9 x 8 pixels take more memory than there is"):
                read(path)


PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def black_below(width: int, height: int, bits: int, colour: int, interlaced: bool, value: int) -> list[bytes]:
    """The rows of a PNG of one value, black in the lower half of each pass, each row behind the byte of its filter."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    rows: list[bytes] = []
    for x, y, dx, dy in PASSES if interlaced else ((0, 0, 1, 1),):
        columns, count = len(range(x, width, dx)), len(range(y, height, dy))
        if columns:
            length = (columns * bits * channels + 7) // 8
            rows += [b"\0" + bytes([value if 2 * i < count - 1 else 0]) * length for i in range(count)]
    return rows


def png(width: int, height: int, bits: int, colour: int, interlaced: bool, rows: bytes, parts: int = 1) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    content = b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    )
    if colour == 3:
        content += chunk(b"PLTE", bytes(range(48)))
    data = zlib.compress(rows)
    size = -(-len(data) // parts)
    content += b"".join(chunk(b"IDAT", data[i : i + size]) for i in range(0, len(data), size))
    return content + chunk(b"tEXt", b"a\0b") + chunk(b"IEND", b"")


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(
    ("bits", "colour"),
    [(1, 0), (2, 0), (8, 0), (16, 0), (8, 2), (16, 2), (4, 3), (8, 3), (8, 4), (16, 4), (8, 6), (16, 6)],
)
def test_a_png_whose_rows_end_early_is_refused_and_one_that_ends_black_is_not(
    tmp_path: Path, bits: int, colour: int, interlaced: bool
) -> None:
    """Pillow leaves rows black that lie behind a whole row which is the last of the file."""
    path = tmp_path / "a.png"
    for width, height in ((13, 9), (8, 8), (1, 6), (5, 1), (300, 120)):
        header = (width, height, bits, colour, interlaced)
        rows = black_below(*header, value=0 if colour == 3 else 255)
        whole = b"".join(rows)
        for parts, further in ((1, b""), (3, b""), (2, b"more")):
            path.write_bytes(png(*header, whole + further, parts))
            assert read_image(path).shape == (3, height, width)
        for kept in {len(rows) - 1, len(rows) // 2} - {0}:
            rest = b"".join(rows[:kept])
            path.write_bytes(png(*header, rest))
            with pytest.raises(ImageError, match=f"truncated: its rows end early, {len(whole) - len(rest)} bytes"):
                read_image(path)


def test_an_animated_png_is_judged_by_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("L", (20, 10), level) for level in (0, 9, 0)]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "a.png").max() == 0


def test_whatever_goes_wrong_in_decoding_costs_its_image_alone(tmp_path: Path) -> None:
    task = pipeline.Task.of(draw(tmp_path / "a.png"), "a")
    decoded: Future[torch.Tensor] = Future()
    decoded.set_exception(RuntimeError("no such luck"))
    with ThreadPoolExecutor(1) as pool:
        batch = [pipeline._Decoding(task, (8, 9), decoded)]
        (future,) = pipeline._score_batch(None, batch, pipeline.Job(), pool)  # type: ignore[arg-type]
    record = future.result()
    assert record.row is None
    assert str(record.error) == f"{task.file}: it cannot be read: RuntimeError: no such luck"
