"""Where features are kept: what was given comes back to the bit or not at all, whatever happens to disk or process."""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hgad_fast.features import cache
from hgad_fast.features.cache import CacheFull, DiskCache, MemoryCache
from hgad_fast.files import byte_count, readable

KEY = {"backbone": "b", "dtype": "torch.float32"}


def features(*names: str, dtype: torch.dtype = torch.float32) -> dict[str, list[torch.Tensor]]:
    """Two levels an image, of 120 and 36 values; the images differ."""
    actual = {}
    for name in names:
        generator = torch.Generator().manual_seed(int(name, 16))
        levels = (torch.randn(shape, generator=generator).to(dtype) for shape in ((4, 5, 6), (2, 3, 6)))
        actual[name] = list(levels)
    return actual


def assert_holds(kept: MemoryCache | DiskCache, *names: str, dtype: torch.dtype = torch.float32) -> None:
    for name, maps in features(*names, dtype=dtype).items():
        assert name in kept
        for actual, expected in zip(kept[name], maps, strict=True):
            assert actual.dtype == dtype and torch.equal(actual, expected)


def disk(root: Path, *names: str, limit: int | None = None, key: dict = KEY) -> DiskCache:
    """A cache that has looked for these images."""
    kept = DiskCache(root, "net", key, limit)
    kept.look_up(names)
    return kept


def shards(root: Path) -> list[Path]:
    return sorted(root.glob("*/*.features"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_features_come_back_to_the_bit(tmp_path, dtype):
    written = disk(tmp_path)
    written.add(features("a", "b", dtype=dtype))
    written.add(features("c", dtype=dtype))
    for kept in (written, disk(tmp_path, "a", "c")):
        assert_holds(kept, "a", "b", "c", dtype=dtype)
        assert "d" not in kept
    assert "b" not in disk(tmp_path, "c")  # a shard of which nothing is wanted stays closed


def test_features_are_mapped_and_survive_their_file(tmp_path):
    disk(tmp_path).add(features("a", "b"))
    kept = disk(tmp_path, "a")
    shards(tmp_path)[0].unlink()
    kept["a"][0].zero_()  # of this process alone
    assert_holds(kept, "b")


@pytest.mark.parametrize("changed", ["backbone", "dtype"])
def test_another_key_is_another_cache(tmp_path, changed):
    disk(tmp_path).add(features("a"))
    assert "a" not in disk(tmp_path, "a", key=KEY | {changed: "other"})
    foreign = disk(tmp_path, key=KEY | {changed: "other"})
    os.replace(shards(tmp_path)[0], foreign.folder / shards(tmp_path)[0].name)
    assert "a" not in disk(tmp_path, "a", key=KEY | {changed: "other"})


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_shard_is_not_read(tmp_path, keep):
    kept = disk(tmp_path)
    kept.add(features("a"))
    kept.add(features("b", "c"))
    path = kept._path("a")
    path.write_bytes(path.read_bytes()[:keep])
    again = disk(tmp_path, "a", "b", "c")
    assert "a" not in again and not path.exists()
    assert_holds(again, "b", "c")
    again.add(features("a"))
    assert_holds(disk(tmp_path, "a"), "a")


def test_a_shard_with_any_byte_changed_is_not_read(tmp_path):
    disk(tmp_path).add(features("a"))
    (path,) = shards(tmp_path)
    content = path.read_bytes()
    for i in range(0, len(content), 7):
        path.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        assert "a" not in disk(tmp_path, "a")
    path.write_bytes(content)
    assert "a" in disk(tmp_path, "a")


def test_a_foreign_file_is_not_read(tmp_path):
    kept = disk(tmp_path)
    save_file({"a.0": torch.ones(4, 5, 6)}, kept._path("a"))
    assert "a" not in disk(tmp_path, "a")


# ---- room


def test_memory_has_a_limit():
    kept = MemoryCache(3 * 4 * 156)
    kept.add(features("a", "b"))
    with pytest.raises(CacheFull, match="the cache limit of 1.87 kB is reached"):
        kept.add(features("c", "d"))
    kept.add(features("c"))
    assert_holds(kept, "a", "b", "c")
    assert "d" not in kept


def test_what_is_longest_unused_makes_room(tmp_path):
    for age, name in enumerate("abc"):
        kept = disk(tmp_path, key=KEY | {"backbone": name})
        kept.add(features(name))
        os.utime(kept._path(name), (1000 - age, 1000 - age))
    size = shards(tmp_path)[0].stat().st_size
    using = disk(tmp_path, "c", limit=3 * size + 100, key=KEY | {"backbone": "c"})  # c is the oldest, but needed
    using.add(features("d"))
    assert [len(disk(tmp_path, name, key=KEY | {"backbone": name})._shards) for name in "abc"] == [1, 0, 1]
    with pytest.raises(CacheFull, match="limit of .* is reached"):
        using.add(features("e", "f"))  # with two others in use
    assert len(shards(tmp_path)) == 3  # nothing was deleted in vain
    assert_holds(using, "c", "d")


def test_a_disk_is_not_filled_to_the_brim(tmp_path, monkeypatch):
    kept = disk(tmp_path)
    monkeypatch.setattr(cache, "SPARE_BYTES", cache.shutil.disk_usage(tmp_path).free - 100)
    with pytest.raises(CacheFull, match="has only .* left"):
        kept.add(features("a"))
    assert not shards(tmp_path)


def test_a_full_disk_leaves_no_half_of_a_shard(tmp_path):
    """The limit on a file's size stands for a disk that fills up."""
    kept = disk(tmp_path)
    kept.add(features("a"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(CacheFull, match=r"\.features cannot be written \(.*File too large"):
            kept.add(features("b", "c"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(os.listdir(kept.folder)) == [kept._path("a").name]
    assert_holds(disk(tmp_path, "a", "b"), "a")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_may_show_at_the_end(tmp_path, monkeypatch, code):
    def full(_):
        raise OSError(code, os.strerror(code))

    kept = disk(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CacheFull, match=os.strerror(code)):
        kept.add(features("a"))
    assert not os.listdir(kept.folder)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"the cache folder .*/file/net-.* cannot be made"):
        disk(tmp_path / "file")


# ---- processes


def holding(kept: DiskCache, names: list[str]) -> int:
    """A child process that claims these images until it is killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with kept.claim(names, wait=False) as mine:
            os.write(writer, b"y" if mine else b"n")
            signal.pause()
        os._exit(0)
    assert os.read(reader, 1) == b"y"
    return child


def test_a_claim_ends_with_its_process(tmp_path):
    kept = disk(tmp_path)
    child = holding(kept, ["a", "b"])
    try:
        with kept.claim(["a", "b"], wait=False) as mine:
            assert not mine
        with kept.claim(["b"], wait=False) as mine:
            assert mine
    finally:
        os.kill(child, signal.SIGKILL)
    with kept.claim(["a", "b"], wait=True) as mine:
        assert mine
    os.waitpid(child, 0)


def test_what_another_process_has_computed_is_there_after_the_claim(tmp_path):
    kept = disk(tmp_path, "a", "b")
    disk(tmp_path).add(features("a", "b"))
    with kept.claim(["a", "b"], wait=True) as mine:
        assert mine
        assert_holds(kept, "a", "b")


def test_what_a_killed_process_left_is_cleared(tmp_path):
    kept = disk(tmp_path)
    leftover = kept.folder / f".{kept._path('a').stem[:20]}-x1y2.features"
    leftover.write_bytes(b"half")
    assert "a" not in disk(tmp_path, "a")
    kept.add(features("a"))
    assert not leftover.exists()


def test_work_goes_on_where_files_cannot_be_locked(tmp_path):
    kept = disk(tmp_path)
    (kept.folder / "claims").mkdir()
    with kept.claim(["a"], wait=False) as mine:
        assert mine


# ---- sizes


@pytest.mark.parametrize(
    "text, size",
    [(None, None), (1500, 1500), ("1500", 1500), ("20GB", 20 * 10**9), ("1.5 TB", 1.5e12), ("2GiB", 2**31)]
    + [("300kb", 300_000), ("7M", 7_000_000), ("1e9", 10**9), (1e9, 10**9)],
)
def test_sizes_that_people_write(text, size):
    assert byte_count(text) == size


@pytest.mark.parametrize("text", ["", "GB", "20 gigabytes", "-1", "1.2.3GB", "1iB", "nan"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="is no size; write bytes, or e.g. 500MB"):
        byte_count(text)


@pytest.mark.parametrize(
    "size, text", [(0, "0 B"), (999, "999 B"), (1340, "1.34 kB"), (999_999, "1000 kB"), (2 * 10**10, "20 GB")]
)
def test_sizes_for_people(size, text):
    assert readable(size) == text
