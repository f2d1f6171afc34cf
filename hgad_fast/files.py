"""Files that are never seen half-written, sizes in bytes as people write them, hashes."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .terminal import printable as printable

_PLAIN = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool}  # types of plain numbers
_PLAIN |= {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64}
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`, whose file replaces that of `path` when the block ends without an error.

    The folder is made if need be. The temporary name keeps the suffix, from which many writers take the format.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem[:20]}-{secrets.token_hex(4)}{path.suffix}")
    temporary.touch(exist_ok=False)
    mode = stat.S_IMODE(temporary.stat().st_mode)  # the permissions of any new file
    try:
        yield temporary
        temporary.chmod(mode)  # some writers make a file of their own, which is private
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # that of a full disk names no file
        if error.filename is not None:
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_torch_file(path: str | os.PathLike[str], what: str) -> Any:
    """Return what a file that `torch.save` wrote holds, on the CPU; nothing in it is executed.

    Args:
        path: the file.
        what: what it should be, for errors.

    Raises:
        ValueError: there is no such file, or it cannot be read.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no {what} {printable(path)}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file can raise many kinds
        raise ValueError(
            f"{printable(path)} cannot be read as a {what}: it is no whole file of torch.save, or holds more than "
            f"tensors and plain values ({type(error).__name__})"
        ) from error


def require_tensors(source: str, tensors: Any) -> None:
    """Raise a ValueError unless `tensors`, read from `source`, is a dict of ordinary tensors of finite numbers."""
    if not isinstance(tensors, Mapping):
        raise ValueError(f"{source} holds no state dict (a dict of tensors), but a {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise ValueError(f"{source} holds a tensor that is called {name!r}; names are texts")
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{source}: {name} is a {type(tensor).__name__}, and no tensor")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in _PLAIN:
            raise ValueError(f"{source}: {name} is no tensor of plain numbers")
        if not tensor.isfinite().all():
            raise ValueError(f"{source}: {name} holds a NaN or an infinity")


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


def file_hash(path: str | os.PathLike[str]) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


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
