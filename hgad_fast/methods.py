"""The registry of the methods of detection, and model files.

A model class is registered when it is defined (`register`), so that scoring, reports and the command line can load any
model without knowing the classes.

A model file may come from anywhere. Nothing in it is executed, and nothing that it names is opened or fetched, as long
as it holds the weights of the backbone. Its header is read first, and compared with the configuration in it, before
anything is made that is as large as the file says.
"""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .data.images import WHITE_LEVEL
from .environment import plain_torch
from .files import printable, replacing, tensor_hash

FORMAT = "hgad_fast 1"
FLOATS = ("F32", "F64", "F16", "BF16")  # what numbers may be saved as; they are computed with in float32
LONGEST_ERROR = 2000  # characters
LARGEST_HEADER = 2**24  # bytes: names of 50,000 classes, or of 100,000 tensors
INTEGERS: dict[torch.dtype, tuple[str, ...]] = {
    torch.int64: ("I64",),
    torch.int32: ("I32", "I64"),  # sums that have outgrown 32 bits
    torch.bool: ("BOOL",),
    torch.uint8: ("U8",),
}

DEFAULT = "hgad"  # the method where none is named; of presets of one name, its own

DEFINED_IN = ("gaussian", "hgad", "vqflow")  # modules of `models` with the names of their methods


class _Methods(MutableMapping[str, Any]):
    """The model classes by the names of their methods; they are defined when one is first looked for."""

    def __init__(self) -> None:
        self._classes: dict[str, Any] = {}

    def _defined(self) -> dict[str, Any]:
        for module in DEFINED_IN:
            importlib.import_module(f".models.{module}", __package__)
        return {name: self._classes[name] for name in (*DEFINED_IN, *self._classes)}

    def __getitem__(self, name: str) -> Any:
        return self._defined()[name]

    def __setitem__(self, name: str, model_class: Any) -> None:
        self._classes[name] = model_class

    def __delitem__(self, name: str) -> None:
        del self._classes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._defined())

    def __len__(self) -> int:
        return len(self._defined())


METHODS = _Methods()
"""The model classes by the names of their methods."""

ModelClass = TypeVar("ModelClass", bound=type)


def register(model_class: ModelClass) -> ModelClass:
    """Register a subclass of `models.detector.Detector` under the method's name in its configuration."""
    METHODS[model_class.config_class.method] = model_class  # type: ignore[attr-defined]
    return model_class


def presets() -> list[tuple[str, Any]]:
    """Return the presets of all methods, the default one first: each name with the configuration class that has it."""
    names = sorted(METHODS, key=lambda name: name != DEFAULT)
    classes = [METHODS[name].config_class for name in names]
    return [(preset, owner) for owner in classes for preset in owner.presets]


def config_class(name: str | None = None, preset: str | None = None) -> Any:
    """Return the configuration class of a method.

    Args:
        name: the method; None: the first of `presets` that has the preset, and without a preset the default one.
        preset: a preset that the method must have.

    Raises:
        ValueError: there is no such method, it does not have the preset, or no method does.
    """
    if name is not None and name not in METHODS:
        raise ValueError(f"--method is {name!r}; allowed are {', '.join(METHODS)}")
    if preset is None:
        return METHODS[name or DEFAULT].config_class
    owners = [owner for known, owner in presets() if known == preset]
    if not owners:
        raise ValueError(f"--preset is {preset!r}; allowed are {preset_names()}")
    if name is None:
        return owners[0]
    chosen = METHODS[name].config_class
    if chosen not in owners:
        raise ValueError(
            f"--preset is {preset!r}, which is one of {' and '.join(owner.method for owner in owners)}, and --method "
            f"is {name!r}: leave --method out, or take one of {name} ({', '.join(chosen.presets) or 'it has none'})"
        )
    return chosen


def preset_names() -> str:
    """Return the presets by their methods, for people: ``official, fast (hgad); official, small (vqflow)``."""
    owners = dict.fromkeys(owner for _, owner in presets())
    return "; ".join(f"{', '.join(owner.presets)} ({owner.method})" for owner in owners)


def describe_presets() -> list[dict[str, Any]]:
    """Return what is known of each preset: its name, method, backbone and image size, and its `PresetNote`."""
    rows = []
    for name, owner in presets():
        config, note = owner.preset(name), owner.preset_notes.get(name)
        size = f"{config.img_size} px" if isinstance(config.img_size, int) else config.img_size
        rows.append(
            {
                "preset": name,
                "method": owner.method,
                "backbone": f"{config.backbone_arch}, {size}",
                "weights": note and note.weights,
                "needs": note and note.needs,
                "reaches": note and note.reaches,
            }
        )
    return rows


def create(config: Any) -> Any:
    """Return an untrained model of the method that a configuration belongs to."""
    return METHODS[config.method](config)


@plain_torch()
def load(path: str | os.PathLike[str], device: str | torch.device | None = None) -> Any:
    """Return a model of any method that `save` wrote.

    Args:
        path: the file.
        device: the device of the model; None: the CPU.

    Raises:
        ValueError: the file is missing, damaged, of another format or of an unknown method, or does not fit the
            backbone at hand; see `models.detector.Detector.load`.
    """
    with opened(path) as file:
        return _class_of(file).from_file(file, device)


def _class_of(file: ModelFile) -> Any:
    """Return the model class of a file."""
    if file.method not in METHODS:
        raise file.error(f"holds a model of the method {file.method!r}; this version knows {', '.join(METHODS)}")
    return METHODS[file.method]


class ModelFile:
    """A model file that is open: what its header says, and the tensors, which are read one by one.

    Attributes:
        path: for error messages.
        metadata: texts by name.
        shapes: those of the tensors, by their names.
        method: the name of the method; the earliest files name none, and hold HGAD models.
    """

    def __init__(self, path: str | os.PathLike[str], handle: Any) -> None:
        self.path = printable(path)
        self.metadata: dict[str, str] = handle.metadata() or {}
        self.method = self.metadata.get("method", "hgad")
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
        self.shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
        self._types = {name: each.get_dtype() for name, each in slices.items()}
        self._handle = handle

    def error(self, text: str) -> ValueError:
        """Return an error that names the file, in one line, whatever of the file the text quotes."""
        text = " ".join(text.split())
        half = LONGEST_ERROR // 2
        return ValueError(f"{self.path} {text if len(text) <= LONGEST_ERROR else f'{text[:half]} ... {text[-half:]}'}")

    def json(self, name: str, kind: type) -> Any:
        """Return what a text of the metadata holds as JSON.

        Raises:
            ValueError: there is no such text, or it is no JSON of this kind.
        """
        try:
            value = json.loads(self.metadata[name])
        except KeyError:
            raise self.error(f"is no whole model file: its metadata lack {name!r}") from None
        except (ValueError, RecursionError) as error:
            raise self.error(f"is damaged: {name!r} in its metadata is no JSON ({error})") from error
        if not isinstance(value, kind):
            raise self.error(f"is damaged: {name!r} in its metadata is a {type(value).__name__}, no {kind.__name__}")
        return value

    def hash(self, prefix: str) -> str:
        """Return the `tensor_hash` of the tensors whose names begin with `prefix`, by the rest of their names."""
        names = [name for name in self.shapes if name.startswith(prefix)]
        try:
            return tensor_hash({name.removeprefix(prefix): self._handle.get_tensor(name) for name in names})
        except Exception as error:  # of many kinds, where the header lies
            raise self.error(f"is damaged: its tensors cannot be read ({error})") from error

    def require_type(self, name: str, dtype: torch.dtype) -> None:
        """Raise a ValueError where a tensor is of a type that does not do for `dtype`."""
        allowed = FLOATS if dtype.is_floating_point else INTEGERS.get(dtype, ())
        if self._types[name] not in allowed:
            raise self.error(
                f"is damaged: the tensor {name} is of type {self._types[name]}; allowed: {', '.join(allowed)}"
            )

    def tensor(self, name: str, dtype: torch.dtype | None = torch.float32) -> Tensor:
        """Return a tensor, in memory of its own; numbers in `dtype`, or with None in that of the file.

        Raises:
            ValueError: it cannot be read, is of a type that cannot be computed with, or a number in it is not finite.
        """
        try:
            mapped = self._handle.get_tensor(name)
            tensor = mapped.to(dtype, copy=True) if dtype and mapped.is_floating_point() else mapped.clone()
        except Exception as error:  # of many kinds, where the header lies
            raise self.error(f"is damaged: its tensor {name} cannot be read ({error})") from error
        if tensor.is_floating_point():
            self.require_type(name, tensor.dtype)  # of 8 bits torch computes nothing
        if tensor.is_floating_point() and tensor.numel():
            if not all(math.isfinite(bound) for bound in torch.stack(tensor.aminmax()).tolist()):  # in one pass
                raise self.error(f"is damaged: its tensor {name} holds a NaN or an infinity")
        return tensor


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[ModelFile]:
    """Open a model file.

    Raises:
        ValueError: there is no such file, or it is damaged or of another format.
    """
    from safetensors import safe_open

    if not Path(path).is_file():
        raise ValueError(f"there is no model file {printable(path)}")
    try:
        with open(path, "rb") as start:
            size = int.from_bytes(start.read(8), "little")
        if size > LARGEST_HEADER:
            raise ValueError(f"header too large: {size} bytes; {LARGEST_HEADER} at most")
        handle = safe_open(path, framework="pt")
        file = ModelFile(path, handle)
    except Exception as error:  # of many kinds: no permission, no header, ...
        raise ValueError(f"{printable(path)} is no whole safetensors file ({error})") from error
    with handle:
        if file.metadata.get("format") != FORMAT:
            raise file.error(
                f"is in format {file.metadata.get('format')!r}, this version of hgad_fast reads {FORMAT!r}; a "
                "checkpoint of an official code is read by load_official_checkpoint of the model's class"
            )
        yield file


def write_model_file(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a model file; the same tensors and texts give the same bytes."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file(
            {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()},
            temporary,
            dict(metadata),
        )
        # safetensors orders the tensors, but writes the metadata in an order that differs from run to run.
        with temporary.open("rb+") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            file.seek(8)
            file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length))


def describe_file(path: Path) -> dict[str, Any]:
    """Return what a model file holds, for people.

    Its backbone is not made, unless it is another than the one that was saved.

    Raises:
        ValueError: as `load`; but a backbone that was left out of the file need not be at hand.
    """
    with opened(path) as file:
        model = _class_of(file).from_file(file, outline=True)
    config, calibration = model.config, model.calibration
    side = "square, side" if config.square else "short side"
    size = f"{side} {config.img_size}" if isinstance(config.img_size, int) else config.img_size
    return {
        "model file": str(path),
        "size": f"{path.stat().st_size / 1e6:.1f} MB",
        "method": config.method,
        **_groups(model),
        "backbone": config.backbone_arch,
        "feature channels": ", ".join(map(str, model.feature_dims)),
        **model.describe(),
        **({"white level": config.white_level} if config.white_level != WHITE_LEVEL else {}),
        "image size": size + (", centre crop" if config.center_crop else ""),
        **({"calibration": "none"} if calibration is None else calibration.describe(model.groups)),
        **({"note": note} if calibration is not None and (note := calibration.shortcomings(model.groups)) else {}),
    }


def _groups(model: Any) -> dict[str, str]:
    """Return the names of a model's classes, or of the groups that it forms, of which there may be many."""
    names = model.groups
    if model.groups_are_classes:
        return {"classes": ", ".join(names)}
    shown = names if len(names) <= 8 else (*names[:2], "...", names[-1])
    return {"groups": f"{len(names)} of its own: {', '.join(shown)}"}
