"""Damaged and hostile model files, made of a good one; run as a script, it tries many of them in little memory."""

from __future__ import annotations

import json
import math
import random
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

ROOM = 10**9  # bytes beyond those of the process, in which every file must be refused or scored
DTYPES = (
    torch.float8_e4m3fn,
    torch.float16,
    torch.float64,
    torch.bfloat16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
)
VALUES: tuple[Any, ...] = (10**9, 10**30, 10**5, 65536, 7, 1, 0, -1, 1.5, 1e308, math.nan, math.inf, True, None, "")
VALUES += ("mul", "all", "native", "hf-hub:a/b", "local-dir:/etc", "/etc/passwd", "resnet18+resnet18", "\ud800", {}, [])
VALUES += ([10**9], [2, 3], [[[8, 8]]] * 3, [[[10**9, 10**9]]] * 3, [None] * 3, ["a"] * 3, [[[[[]]]]], "x" * 100_000)
TEXTS = ("", "{", "[]", "null", "1", '"x"', "\x00", "{}", "[" * 100_000, '{"a": 1}', "1" * 10_000, "NaN", "included")


def parts(file: bytes) -> tuple[dict[str, Any], bytes]:
    """Return header and data of a safetensors file."""
    end = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:end]), file[end:]


def whole(header: Any, data: bytes) -> bytes:
    """Return the file of a header, which may lie, and data."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + data


def flipped(file: bytes, start: int, end: int, count: int, rng: random.Random) -> bytes:
    changed = bytearray(file)
    for _ in range(count):
        changed[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _bits(file: bytes, rng: random.Random) -> bytes:
    header_end = 8 + int.from_bytes(file[:8], "little")
    start, end = rng.choice([(0, 8), (8, header_end), (header_end, len(file)), (0, len(file))])
    return flipped(file, start, end, rng.choice([1, 1, 8, 200]), rng)


def _length(file: bytes, rng: random.Random) -> bytes:
    return rng.choice([file[: rng.randrange(len(file))], file + bytes(rng.randrange(1, 100)), file[8:], file * 2])


def _header(file: bytes, rng: random.Random) -> bytes:
    """The header says something else of a tensor than what there is."""
    header, data = parts(file)
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    match rng.randrange(6):
        case 0:
            entry["shape"] = rng.choice(
                [[10**18], [2**40, 2**40], [-1], [], entry["shape"][::-1], [0, *entry["shape"]]]
            )
        case 1:
            entry["dtype"] = rng.choice(["F64", "F16", "I8", "F8_E4M3", "C64", "X", 3])
        case 2:
            entry["data_offsets"] = rng.choice([[0, 0], [0, 2**60], [5, 1], [-1, 3], [1, 5], None])
        case 3:
            header["__metadata__"] = rng.choice([None, [], {"format": 3}, {}])
        case 4:
            header |= {f"{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}
        case _:
            text = json.dumps(header)
            return whole(text[:-1] + f', "{name}": {json.dumps(entry)}' + "}", data)
    return whole(header, data)


def _metadata(file: bytes, rng: random.Random) -> bytes:
    """A text of the metadata is another, or a field of what it holds is."""
    header, data = parts(file)
    metadata = header["__metadata__"]
    name = rng.choice([*metadata, "config", "config", "config", "calibration"])
    match rng.randrange(6):
        case 0:
            metadata.pop(name)
        case 1:
            metadata[name] = rng.choice(TEXTS)
        case _ if name in ("config", "calibration"):
            fields = json.loads(metadata[name])
            for _ in range(rng.choice([1, 1, 2])):
                field = rng.choice([*fields, "evil"])
                if rng.random() < 0.1:
                    fields.pop(field, None)
                else:
                    fields[field] = rng.choice(VALUES)
            metadata[name] = json.dumps(fields)
        case _:
            metadata[name] = metadata[name][::-1]
    return whole(header, data)


def _tensors(file: bytes, rng: random.Random) -> bytes:
    """A tensor is another one, in a file that is whole."""
    tensors: dict[str, Tensor] = safetensors.torch.load(file)
    own = [name for name in tensors if name.startswith("calibration.")]
    name = rng.choice([rng.choice(list(tensors)), rng.choice(own)])
    tensor = tensors[name]
    match rng.randrange(7):
        case 0:
            del tensors[name]
        case 1:
            tensors[rng.choice(["extra", "calibration.extra", "encoder.x", name + ".0"])] = torch.zeros(3)
        case 2:
            tensors[name] = rng.choice(
                [tensor.flatten()[1:], tensor[None], tensor.mT if tensor.dim() > 1 else tensor[None]]
            )
        case 3:
            tensors[name] = tensor.to(rng.choice(DTYPES))
        case 4:
            tensors[name] = torch.cat([tensor.reshape(-1)] * 2)
        case 5:
            other = rng.choice([each for each in tensors if tensors[each].shape == tensor.shape])
            tensors[name], tensors[other] = tensors[other], tensor
        case _:
            odd = (math.nan, math.inf, -math.inf, 1e30, -1e30, 0.0) if tensor.is_floating_point() else (-1, 2**30, 0)
            tensor = tensor.clone()
            tensor.view(-1)[rng.choice([slice(None), slice(0, 1), slice(-1, None)])] = rng.choice(odd)
            tensors[name] = tensor
    return safetensors.torch.save(
        {n: t.contiguous().clone() for n, t in tensors.items()}, parts(file)[0]["__metadata__"]
    )


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _bits,
    _length,
    _header,
    _metadata,
    _metadata,
    _tensors,
)


def outcome(path: Path, features: list[Tensor]) -> str:
    """Load a file, score with it and describe it; return "" where that works, else the message of the ValueError.

    Anything else that happens is an error of the test.
    """
    import hgad_fast
    from hgad_fast.files import printable
    from hgad_fast.methods import describe_file

    try:
        model = hgad_fast.load(path)
    except ValueError as error:
        assert printable(path) in str(error), str(error)[:500]
        message = str(error)
    else:
        try:
            assert not model.score_features(features).image_score.isnan().any()
            describe_file(path)
            return ""
        except ValueError as error:
            message = str(error)
    assert "\n" not in message and len(message) < 3000 and "alloc" not in message.lower(), message[:500]
    return message


def main(folder: Path, count: int) -> None:
    """Try `count` mutations of each ``<name>.good`` in the folder, whose features are ``<name>.features``."""
    import hgad_fast

    names = sorted(path.stem for path in folder.glob("*.good"))
    for name in names:  # what is made once, and kept
        hgad_fast.load(folder / f"{name}.good").score_features(torch.load(folder / f"{name}.features"))
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for name in names:
        good, features = (folder / f"{name}.good").read_bytes(), torch.load(folder / f"{name}.features")
        refused = 0
        for seed in range(count):
            rng = random.Random(f"{name} {seed}")
            path = folder / "mutated.safetensors"
            path.write_bytes(rng.choice(MUTATIONS)(good, rng))
            try:
                refused += bool(outcome(path, features))
            except BaseException:
                print(f"{name}, seed {seed}", file=sys.stderr)
                raise
        print(name, refused)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
