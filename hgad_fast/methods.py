"""The registry of the methods of detection, and reading of model files.

A model class is registered when it is defined (`register`), so that scoring, reports and the command line can load any
model without knowing the classes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .environment import plain_torch

FORMAT = "hgad_fast 1"

DEFAULT = "hgad"  # the method where none is named; of presets of one name, its own

METHODS: dict[str, Any] = {}
"""The model classes by the names of their methods, in the order of their definition."""

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
    metadata, state = read_model_file(Path(path))
    method = method_of(metadata)
    if method not in METHODS:
        raise ValueError(f"{path} holds a model of the method {method!r}; this version knows {', '.join(METHODS)}")
    return METHODS[method].from_file(path, metadata, state, device)


def method_of(metadata: dict[str, str]) -> str:
    """Return the name of the method of a model file; the earliest files name none, and hold HGAD models."""
    return metadata.get("method", "hgad")


def read_model_file(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata and the tensors of a model file.

    Raises:
        ValueError: there is no such file, or it is damaged or of another format.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"there is no model file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error})") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} is in format {metadata.get('format')!r}, this version of hgad_fast reads {FORMAT!r}; a checkpoint "
            "of an official code is read by load_official_checkpoint of the model's class"
        )
    return metadata, state


def describe_file(model: Any, path: Path) -> dict[str, Any]:
    """Return what a model file holds, for people."""
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
