"""The files of a training run, and the checkpoint from which it resumes bit for bit."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import printable, read_torch_file, replacing, require_tensors, state_hash
from ..protocol import Detector

FORMAT = "hgad_fast training 3"
CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
MODEL = "model.safetensors"
BEST = "best.safetensors"  # see `evaluation.evaluate.BestCheckpoint`
FEATURES = "features"
REMEDY = "; start anew without resume, or resume from a copy that is whole"
RUN = "run.json"  # {"data": folder of the images or null, ...}, read by the report and the model card


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn any error of the body into an OSError that names the file, as torch and safetensors do not."""
    try:
        yield
    except Exception as error:
        raise OSError(
            f"{printable(path)} cannot be written ({error}); free some space or choose another output_dir, and go on "
            "with resume"
        ) from error


def run_identity(model: Detector, data_fingerprint: str) -> dict[str, str]:
    """Return what a checkpoint and the run that resumes it must share; weights are compared by value, not by path."""
    return {
        "data": data_fingerprint,
        "backbone": "" if model.encoder is None else state_hash(model.encoder),
        "method": model.config.method,
        "config": model.config.identity(),
    }


def trained_tensors(model: Detector) -> dict[str, Tensor]:
    """Return the model's tensors without those of the backbone, which do not change."""
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("encoder.")}


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write the state of a training run; an earlier file is replaced only once the new one is complete."""
    with writing(path), replacing(path) as file:
        torch.save({"format": FORMAT, **state}, file)


def read_checkpoint(
    path: Path,
    model: Detector,
    optimizer: torch.optim.Optimizer,
    identity: dict[str, str],
    stages_in: Callable[[int], set[int]],
) -> dict[str, Any]:
    """Return the state in a checkpoint, after checking that all of it fits the run.

    Args:
        path: the checkpoint.
        model, optimizer, identity: those of the run that resumes.
        stages_in: returns the stages that occur in the first n meta-epochs, given n.

    Raises:
        ValueError: the file is missing, damaged, from another run, or does not fit the model or its optimizer.
    """
    name = printable(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {name}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"{damaged} is damaged")
    except Exception as error:  # a truncated or foreign file can raise many kinds
        raise ValueError(f"{name} cannot be read as a training checkpoint ({error}){REMEDY}") from error
    try:
        state = read_torch_file(path, "training checkpoint")
    except ValueError as error:
        raise ValueError(f"{error}{REMEDY}") from error
    try:
        return _checked(name, state, model, optimizer, identity, stages_in)
    except (json.JSONDecodeError, LookupError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise ValueError(f"{name} is no whole training checkpoint ({error!r}){REMEDY}") from error


def _checked(
    path: str,
    state: Any,
    model: Detector,
    optimizer: torch.optim.Optimizer,
    identity: dict[str, str],
    stages_in: Callable[[int], set[int]],
) -> dict[str, Any]:
    """Return the state in a checkpoint in the current format, checked as `read_checkpoint` says."""
    if not isinstance(state, dict) or not isinstance(state.get("identity"), dict):
        raise ValueError(f"{path} is no training checkpoint of this version of hgad_fast")
    saved_identity = state["identity"]
    if (method := saved_identity.get("method", "hgad")) != identity["method"]:
        raise ValueError(f"{path} is of a training of {method}, and this model is one of {identity['method']}")
    # What has no effect today may have had its own value in a file of before, or none.
    old, new = (
        model.config.added | json.loads(each["config"]) | model.config.without_effect
        for each in (saved_identity, identity)
    )
    if old != new:
        fields = [field for field in {**old, **new} if old.get(field) != new.get(field)]
        changed = [f"{field} {old.get(field)!r} -> {new.get(field)!r}" for field in fields]
        raise ValueError(f"{path} was trained with another configuration: {', '.join(changed)}")
    if saved_identity["backbone"] != identity["backbone"]:
        raise ValueError(f"{path} was trained with other backbone weights; start anew, or give it the same")
    if saved_identity["data"] != identity["data"]:
        raise ValueError(
            f"{path} was trained on other images than these, or held out others, or with features of another "
            "precision (cache_dtype); start anew, or give it the same"
        )
    state = _in_current_format(path, model, state)
    meta_epoch, records = state["meta_epoch"], json.loads(state["history"])
    if not isinstance(meta_epoch, int) or not 0 <= meta_epoch <= model.config.meta_epochs:
        raise ValueError(f"{path} says that {meta_epoch!r} of {model.config.meta_epochs} meta-epochs are done{REMEDY}")
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path} holds no history of a training{REMEDY}")
    torch.Generator().set_state(state["random_state"])  # an error here, and not when half is restored
    require_tensors(path, state["model"])
    expected_shapes, saved_shapes = (
        {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for tensors in (trained_tensors(model), state["model"])
    )
    if saved_shapes != expected_shapes:
        misfit, _ = min(expected_shapes.items() ^ saved_shapes.items())
        raise ValueError(f"{path} lacks the model's tensor {misfit}, or holds another in its place")
    _check_optimizer(path, model, optimizer, state, stages_in(state["meta_epoch"]))
    return state


def _in_current_format(path: str, model: Detector, state: dict[str, Any]) -> dict[str, Any]:
    """Return the state, converted if an older version wrote it."""
    try:
        converted = state if state.get("format") == FORMAT else model.convert_checkpoint(state)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path}, of the format {state['format']!r}, does not fit this optimizer: it lacks moments, or holds "
            f"others ({error!r})"
        ) from error
    if converted is None:
        raise ValueError(f"{path} is no training checkpoint of this version of hgad_fast")
    return converted


def _check_optimizer(
    path: str, model: Detector, optimizer: torch.optim.Optimizer, state: dict[str, Any], stages: set[int]
) -> None:
    """Raise a ValueError unless the state holds the moments of exactly the parameters that Adam has stepped.

    Adam has stepped those of the stages trained so far. torch would silently start missing moments anew.
    """
    saved, own = state["optimizer"], optimizer.state_dict()
    groups = saved["param_groups"]
    if not isinstance(groups, list) or [group["params"] for group in groups] != [
        group["params"] for group in own["param_groups"]
    ]:
        raise ValueError(f"{path} does not fit this optimizer: it has other parameters")
    names = {parameter: name for name, parameter in model.named_parameters()}
    stepped = {parameter for stage in stages for parameter in model.objective(stage).parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(parameters):
        expected_shapes: dict[str, tuple[int, ...]] = {}
        if parameter in stepped:
            expected_shapes = {"step": (), "exp_avg": tuple(parameter.shape), "exp_avg_sq": tuple(parameter.shape)}
        moments = saved["state"].get(number, {})
        if {moment: tuple(tensor.shape) for moment, tensor in moments.items()} != expected_shapes:
            raise ValueError(
                f"{path} does not fit this optimizer: it lacks moments of {names[parameter]}, or holds others"
            )
