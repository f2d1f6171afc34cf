"""Where the features of pictures are kept: in memory, or on disk in shards that later runs and other processes share.

A picture goes by the SHA-256 of its file's content, so that a changed picture is a new one, and a moved one is not. On
disk every way of making features has a folder of its own, with safetensors files of up to `SHARD_PICTURES` pictures in
it. A shard is written under another name first, checked to its last byte before it is used, mapped into memory, and
never changed. The folders may be deleted while nobody trains; what is missing is computed again.
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

from .files import readable, replacing
from .model import tensor_hash

FORMAT = "hgad_fast features 2"
SUFFIX = ".features"
SHARD_PICTURES = 64  # what a killed process loses at most, and the share of the work that a process takes at a time
SHARD_BYTES = 2**28  # fewer pictures where these would be more: they are held in memory until they are written
SPARE_BYTES = 2**30  # of a disk, left free: the training's own files need some room too

_SHARDS = f"[0-9a-f]*{SUFFIX}"  # no hidden ones, which are being written

Features = list[Tensor]  # of a picture: one (h, w, C) a level


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
        """Nothing is here that was not added."""

    @contextmanager
    def claim(self, contents: Sequence[str], wait: bool) -> Iterator[bool]:
        """No other process shares this memory."""
        yield True

    def add(self, features: Mapping[str, Features]) -> None:
        """Keep the features of some pictures, by content.

        Raises:
            CacheFull: they would pass the limit.
        """
        size = _size(features)
        if self.limit is not None and self._bytes + size > self.limit:
            raise CacheFull(f"the cache limit of {readable(self.limit)} is reached")
        self._kept |= features
        self._bytes += size


class DiskCache:
    """Features in a folder below `root`; all features below `root` together take at most `limit` bytes.

    At the limit, shards that this run does not need make room, those longest unused first.

    Args:
        root: made if need be.
        name: of the folder, for people; a digest of the key is appended.
        key: all that features depend on, but for the picture.
        limit: bytes, or None.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, root: Path, name: str, key: Mapping[str, Any], limit: int | None = None) -> None:
        self.root, self.limit = root, limit
        self.key = json.dumps({"format": FORMAT, **key}, sort_keys=True)
        self.folder = root / f"{name}-{_digest([self.key])[:12]}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"the cache folder {self.folder} cannot be made ({error}); give another cache_dir") from error
        self._shards: dict[str, _Shard] = {}  # by content

    def __str__(self) -> str:
        return f"{self.folder} ({readable(shutil.disk_usage(self.folder).free)} free)"

    def __contains__(self, content: str) -> bool:
        return content in self._shards

    def __getitem__(self, content: str) -> Features:
        return self._shards[content].features(content)

    def look_up(self, contents: Iterable[str]) -> None:
        """Take up the shards that hold any of these pictures and are whole; damaged ones are removed."""
        self._take(sorted(self.folder.glob(_SHARDS)), frozenset(contents))

    def _take(self, paths: Sequence[Path], wanted: frozenset[str]) -> None:
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
            for shard in pool.map(lambda path: self._open(path, wanted), paths):
                if shard is not None:
                    self._shards |= dict.fromkeys(shard.contents, shard)

    def _open(self, path: Path, wanted: frozenset[str]) -> _Shard | None:
        try:
            shard = _Shard(path)
            if not shard.contents & wanted:
                return None
            shard.require_whole(self.key)
        except OSError:
            return None  # not there any more, or not for this user
        except ValueError:
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):  # of another user
            os.utime(path)
        return shard

    @contextmanager
    def claim(self, contents: Sequence[str], wait: bool) -> Iterator[bool]:
        """Whether these pictures are this process's to compute: False while another one is at them, unless `wait`.

        What another process has computed in the meantime is there when the block begins. Claims end with the process.
        Where files cannot be locked, two processes may do the same work, and one shard replaces the other, its equal.
        """
        with ExitStack() as stack:
            mine = self._lock(contents, wait, stack)
            if mine:
                missing = [content for content in contents if content not in self]
                self._take([self._path(missing)], frozenset(missing))
            yield mine

    def _lock(self, contents: Sequence[str], wait: bool, stack: ExitStack) -> bool:
        try:
            import fcntl

            file = stack.enter_context(open(self.folder / "claims", "a"))
            how = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
            fcntl.lockf(file, how, 1, int(_digest(contents)[:15], 16))  # each claim is a byte of the file
        except BlockingIOError:
            return False
        except (ImportError, OSError):
            pass  # not on this system, or not in this folder
        return True

    def _path(self, contents: Iterable[str]) -> Path:
        return self.folder / f"{_digest(contents)[:32]}{SUFFIX}"

    def add(self, features: Mapping[str, Features]) -> None:
        """Write the features of some pictures, by content, as one shard.

        Raises:
            CacheFull: there is no room for them, or they cannot be written.
        """
        path = self._path(features)
        tensors = {f"{content}.{level}": x for content, maps in features.items() for level, x in enumerate(maps)}
        try:
            for leftover in self.folder.glob(f".{path.stem[:20]}-*"):  # of a process that was killed
                leftover.unlink()
            self._make_room(_size(features))
            _write_shard(path, tensors, self.key)
        except OSError as error:
            raise CacheFull(f"{path} cannot be written ({error})") from error
        self._take([path], frozenset(features))

    def _make_room(self, size: int) -> None:
        if self.limit is not None:
            found: list[tuple[float, int, Path]] = []
            for path in self.root.glob(f"*/{_SHARDS}"):
                with suppress(FileNotFoundError):  # another process makes room, too
                    found.append((path.stat().st_mtime, path.stat().st_size, path))
            mine = {shard.path for shard in self._shards.values()}
            others = sorted(shard for shard in found if shard[2] not in mine)
            excess = sum(taken for _, taken, _ in found) + size - self.limit
            if excess > sum(taken for _, taken, _ in others):
                raise CacheFull(f"the cache limit of {readable(self.limit)} is reached")
            for _, taken, path in others:
                if excess > 0:
                    path.unlink(missing_ok=True)
                    excess -= taken
        free = shutil.disk_usage(self.folder).free
        if free < size + SPARE_BYTES:
            raise CacheFull(f"the disk of {self.folder} has only {readable(free)} left")


class _Shard:
    """A safetensors file with the features of some pictures, mapped into memory.

    Attributes:
        path: where it is, or was: what is mapped stays there.
        contents: of the pictures.

    Raises:
        ValueError: it is none.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is no whole safetensors file ({error})") from error
        self._names = self._file.keys()
        self.contents = {name.partition(".")[0] for name in self._names}

    def require_whole(self, key: str) -> None:
        """Read it all; a ValueError if anything is not as it was written."""
        about = self._file.metadata() or {}
        found = {name: self._file.get_tensor(name) for name in self._names}
        if about.get("key") != key or about.get("sha256") != tensor_hash(found):
            raise ValueError(f"{self.path} is damaged")

    def features(self, content: str) -> Features:
        levels = len(self._names) // len(self.contents)
        return [self._file.get_tensor(f"{content}.{level}") for level in range(levels)]


def _write_shard(path: Path, tensors: dict[str, Tensor], key: str) -> None:
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
    return sum(level.nbytes for maps in features.values() for level in maps)
