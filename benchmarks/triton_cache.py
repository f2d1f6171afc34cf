"""Triton's cache as one file, to be taken from machine to machine; to compile it all again takes minutes."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

LIMIT = 16 * 2**20  # bytes of a file that comes back from a machine
STEPS = (".source", ".ttir", ".ttgir", ".llir", ".ptx", ".amdgcn")  # on the way to the binary: nobody runs them
GROUP = "__grp__"  # begins the name of the file that lists the files of a kernel, by their absolute paths


def pack(folder: Path, target: Path, limit: int = LIMIT) -> int:
    """Write the cache as a tar; of one larger than the limit, a part. Return the number of kernels left out."""
    kernels = every = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}")
    while True:
        with tarfile.open(temporary, "w:gz", compresslevel=1) as tar:
            for kernel in kernels:
                for file in sorted(kernel.iterdir()):
                    if file.is_file() and file.suffix not in STEPS:
                        tar.add(file, f"{kernel.name}/{file.name}")
        if not kernels or temporary.stat().st_size <= limit:
            os.replace(temporary, target)
            return len(every) - len(kernels)
        kernels = kernels[: 3 * len(kernels) // 4]


def unpack(archive: Path, folder: Path) -> int:
    """Put a packed cache into a folder, where Triton finds it; return the number of its kernels."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    for listing in folder.glob(f"*/{GROUP}*"):
        names = json.loads(listing.read_text())["child_paths"]
        here = {name: str(listing.parent / name) for name in names if (listing.parent / name).exists()}
        listing.write_text(json.dumps({"child_paths": here}))
    return sum(1 for entry in folder.iterdir() if entry.is_dir())
