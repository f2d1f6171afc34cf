"""What lies in a folder of images and is no sound image: it is refused by name, and costs neither time nor memory."""

from __future__ import annotations

import os
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
