"""Files that are never seen half-written, sizes in bytes as people write them, hashes."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from .terminal import printable as printable

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`, whose file replaces that of `path` when the block ends without an error.

    The folder is made if need be. The temporary name keeps the suffix, from which many writers take the format.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem[:20]}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's files are private
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # that of a full disk names no file
        if error.filename is not None:
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def byte_count(size: int | str | None) -> int | None:
    """Return the number of bytes in a size such as ``20GB`` (10^9 each), ``20GiB`` (2^30) or ``1e9``; None stays None.

    Raises:
        ValueError: `size` is no size.
    """
    if size is None:
        return None
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kMGT]?i?)B?\s*", str(size), re.IGNORECASE)
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    try:
        if match is None:
            raise ValueError
        return int(float(match[1]) * units[match[2].lower()])
    except (ValueError, KeyError):
        raise ValueError(f"{size!r} is no size; write bytes, or e.g. 500MB, 20GB, 1.5TB") from None


def readable(size: float) -> str:
    """Return a number of bytes as people write it: 1.3 GB."""
    unit = max((unit for unit in ("", "k", "M", "G", "T") if _UNITS[unit] <= size), key=_UNITS.__getitem__, default="")
    return f"{float(f'{size / _UNITS[unit]:.3g}'):g} {unit}B"


def state_hash(module: nn.Module) -> str:
    """Return the `tensor_hash` of a module's parameters and buffers."""
    return tensor_hash(module.state_dict())


def tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of names, shapes, types and values, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
