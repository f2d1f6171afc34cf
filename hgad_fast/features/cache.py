"""Caches of features: in memory, or on disk in shards that later runs and other processes share.

An image is identified by the SHA-256 of its file's content, here called its content, so that a changed image is a new
one, and a moved one is not. On disk every way of making features has a folder of its own, with shards in it:
safetensors files of up to `SHARD_IMAGES` images. A shard is written under another name first, checked to its last byte
before it is used, mapped into memory, and never changed. The folders may be deleted while nobody trains; features that
are missing are computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import printable, readable, replacing, tensor_hash

FORMAT = "hgad_fast features 2"
SUFFIX = ".features"
SHARD_IMAGES = 64  # images that a process takes on at a time, and that it loses at most when it is killed
SHARD_BYTES = 2**28  # about the most that a shard takes, by fewer images: it is held in memory until it is written
SPARE_BYTES = 2**30  # left free on a disk: the training's own files need some room too

_SHARDS = f"[0-9a-f]*{SUFFIX}"  # no hidden files, which are still being written

Features = list[Tensor]  # of an image: one (h, w, C) per level


class CacheFull(Exception):
    """No more features can be kept; the message says why."""


class MemoryCache:
    """Features in the memory of this process, in at most `limit` bytes."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self._kept: dict[str, Features] = {}
        self._bytes = 0

    def __str__(self) -> str:
        return "memory"

    def __contains__(self, content: str) -> bool:
        return content in self._kept

    def __getitem__(self, content: str) -> Features:
        return self._kept[content]

    def look_up(self, contents: Iterable[str]) -> None:
        """Do nothing: there are no features in memory but those that were added."""

    @contextmanager
    def claim(self, contents: Sequence[str], wait: bool) -> Iterator[bool]:
        """Yield True: no other process shares this memory."""
        yield True

    def add(self, features: Mapping[str, Features]) -> None:
        """Keep the features of images, given by content.

        Raises:
            CacheFull: they would exceed the limit.
        """
        size = _size(features)
        if self.limit is not None and self._bytes + size > self.limit:
            raise CacheFull(f"the cache limit of {readable(self.limit)} is reached")
        self._kept |= features
        self._bytes += size


class DiskCache:
    """Features in a folder below `root`; all features below `root` together take at most `limit` bytes.

    At the limit, shards that this run does not need are deleted, those longest unused first.

    Args:
        root: the folder below which each key has its own; made if need be.
        name: what the folder is called, for people; a digest of the key is appended.
        key: all that the features depend on, except the image.
        limit: bytes, or None for no limit.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, root: Path, name: str, key: Mapping[str, Any], limit: int | None = None) -> None:
        self.root, self.limit = root, limit
        self.key = _text(key)
        self.folder = cache_folder(root, name, key)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"the cache folder {printable(self.folder)} cannot be made ({error}); give another cache_dir"
            ) from error
        self._shards: dict[str, _Shard] = {}  # by content

    def __str__(self) -> str:
        return f"{self.folder} ({readable(shutil.disk_usage(self.folder).free)} free)"

    def __contains__(self, content: str) -> bool:
        return content in self._shards

    def __getitem__(self, content: str) -> Features:
        return self._shards[content].features(content)

    def look_up(self, contents: Iterable[str]) -> None:
        """Open the shards that hold any of these images and are whole; remove those of them that are damaged."""
        self._add_shards(sorted(self.folder.glob(_SHARDS)), frozenset(contents))

    def _add_shards(self, paths: Sequence[Path], contents: frozenset[str]) -> None:
        """Open the shards at `paths`, as `look_up` does."""
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
            for shard in pool.map(lambda path: self._open(path, contents), paths):
                if shard is not None:
                    self._shards |= dict.fromkeys(shard.contents, shard)

    def _open(self, path: Path, contents: frozenset[str]) -> _Shard | None:
        """Return the shard, marked as used; None if it holds none of these images or cannot be read."""
        try:
            shard = _Shard(path)
            if not shard.contents & contents:
                return None
            shard.require_whole(self.key)
        except OSError:
            return None  # deleted meanwhile, or not for this user to read
        except ValueError:
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):  # it may be another user's
            os.utime(path)
        return shard

    @contextmanager
    def claim(self, contents: Sequence[str], wait: bool) -> Iterator[bool]:
        """Yield whether this process may compute these images: False if another one is at work on them.

        With `wait` it waits for the other one, and yields True. When the block begins, the cache holds what another
        process has computed in the meantime. A claim ends with the block, or with the process. Where files cannot be
        locked, two processes may do the same work, and one shard replaces the other, its equal.
        """
        with ExitStack() as stack:
            claimed = self._lock(contents, wait, stack)
            if claimed:
                missing = [content for content in contents if content not in self]
                self._add_shards([self._path(missing)], frozenset(missing))
            yield claimed

    def _lock(self, contents: Sequence[str], wait: bool, stack: ExitStack) -> bool:
        """Lock these images until the stack is closed; return False if another process has locked them."""
        try:
            import fcntl

            file = stack.enter_context(open(self.folder / "claims", "a"))
            mode = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
            fcntl.lockf(file, mode, 1, int(_digest(contents)[:15], 16))  # each claim is a byte of the file
        except BlockingIOError:
            return False
        except (ImportError, OSError):
            pass  # files cannot be locked on this system, or in this folder
        return True

    def _path(self, contents: Iterable[str]) -> Path:
        """Return the path of the shard of exactly these images, in this order."""
        return self.folder / f"{_digest(contents)[:32]}{SUFFIX}"

    def add(self, features: Mapping[str, Features]) -> None:
        """Write the features of images, given by content, as one shard.

        Raises:
            CacheFull: there is no room for them, or they cannot be written.
        """
        path = self._path(features)
        tensors = {f"{content}.{level}": x for content, maps in features.items() for level, x in enumerate(maps)}
        try:
            for leftover in self.folder.glob(f".{path.stem[:20]}-*"):  # half-written by a process that was killed
                leftover.unlink()
            self._make_room(_size(features))
            _write_shard(path, tensors, self.key)
        except OSError as error:
            raise CacheFull(f"{printable(path)} cannot be written ({error})") from error
        self._add_shards([path], frozenset(features))

    def _make_room(self, size: int) -> None:
        """Delete unused shards so that `size` bytes more keep to the limit; raise CacheFull if there is no room."""
        if self.limit is not None:
            shards: list[tuple[float, int, Path]] = []  # time of last use, bytes, path
            for path in self.root.glob(f"*/{_SHARDS}"):
                with suppress(FileNotFoundError):  # another process makes room, too
                    shards.append((path.stat().st_mtime, path.stat().st_size, path))
            used = {shard.path for shard in self._shards.values()}
            unused = sorted(shard for shard in shards if shard[2] not in used)
            excess = sum(shard_size for _, shard_size, _ in shards) + size - self.limit
            if excess > sum(shard_size for _, shard_size, _ in unused):
                raise CacheFull(f"the cache limit of {readable(self.limit)} is reached")
            for _, shard_size, path in unused:
                if excess > 0:
                    path.unlink(missing_ok=True)
                    excess -= shard_size
        free = shutil.disk_usage(self.folder).free
        if free < size + SPARE_BYTES:
            raise CacheFull(f"the disk of {printable(self.folder)} has only {readable(free)} left")


class _Shard:
    """A safetensors file with the features of images, mapped into memory.

    Attributes:
        path: where the file is, or was: what is mapped outlives it.
        contents: the contents of the images.

    Raises:
        ValueError: it is no safetensors file.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{printable(path)} is no whole safetensors file ({error})") from error
        self._names = self._file.keys()
        self.contents = {name.partition(".")[0] for name in self._names}

    def require_whole(self, key: str) -> None:
        """Read it all; raise a ValueError if anything is not as it was written."""
        metadata = self._file.metadata() or {}
        tensors = {name: self._file.get_tensor(name) for name in self._names}
        if metadata.get("key") != key or metadata.get("sha256") != tensor_hash(tensors):
            raise ValueError(f"{self.path} is damaged")

    def features(self, content: str) -> Features:
        """Return the features of one image."""
        levels = len(self._names) // len(self.contents)
        return [self._file.get_tensor(f"{content}.{level}") for level in range(levels)]


def _write_shard(path: Path, tensors: dict[str, Tensor], key: str) -> None:
    """Write what `_Shard` reads; raise an OSError if that fails."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, {"key": key, "sha256": tensor_hash(tensors)})
        except SafetensorError as error:  # a full disk is one, too
            raise OSError(str(error)) from error


def _digest(contents: Iterable[str]) -> str:
    return hashlib.sha256(" ".join(contents).encode()).hexdigest()


def _size(features: Mapping[str, Features]) -> int:
    """Return the bytes of features."""
    return sum(level.nbytes for maps in features.values() for level in maps)


def cache_folder(root: Path, name: str, key: Mapping[str, Any]) -> Path:
    """Return the folder below `root` in which a `DiskCache` keeps the features of a key."""
    return root / f"{name}-{_digest([_text(key)])[:12]}"


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps({"format": FORMAT, **key}, sort_keys=True)


def known_contents(folder: Path) -> set[str]:
    """Return the contents of all images of which a `cache_folder`, which need not exist, holds features.

    Its shards are not read, so that some may turn out to be damaged.
    """
    contents: set[str] = set()
    for path in folder.glob(_SHARDS):
        with suppress(OSError, ValueError):
            contents |= _Shard(path).contents
    return contents
