"""Checkpoints of VQ-Flow's official code, in the names and forms of this library."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Official names -> ours. The official module "sigma" gives the mean of the prior, and "mu" its standard deviation.
RENAMED = (
    (r"^(semantic_encoder|semantic_mlp|upsamplers|feature_mlps|cspc_quantizers|cpc_quantizer)\.", r"conditions.\1."),
    (r"^sigma_mu_generators\.(\d+)\.sigma\.", r"prior.mean.\1."),
    (r"^sigma_mu_generators\.(\d+)\.mu\.", r"prior.std.\1."),
    (r"^fusion_flow\.module_list\.3\.", "fusion_flow."),
    (r"\.w_perm$", ".permutation"),
)
PARTS: tuple[str, ...] = ("parallel_flows", "fusion_flow", "sigma_mu_generators", "semantic_encoder", "semantic_mlp")
PARTS += ("upsamplers", "feature_mlps", "cspc_quantizers", "cpc_quantizer")
OWN = re.compile(r"^encoder\.|^prototype_images$|\.updates$|num_batches_tracked$")  # what they may lack


def official_state(checkpoint: str | os.PathLike[str] | Mapping[str, Any], own: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the state of an official checkpoint under the names of this library.

    Args:
        checkpoint: its path, a dict of state dicts by the names of the sub-modules, or one state dict of all.
        own: the state dict of the model that it is for.

    Raises:
        ValueError: it is missing or damaged, or does not fit the model.
    """
    source = "the checkpoint" if isinstance(checkpoint, Mapping) else os.fspath(checkpoint)
    given = dict(checkpoint) if isinstance(checkpoint, Mapping) else _read(Path(checkpoint))
    tensors: dict[str, Tensor] = {}
    for part in PARTS:
        if isinstance(given.get(part), Mapping):
            tensors |= {f"{part}.{name}": tensor for name, tensor in given[part].items()}
        tensors |= {name: tensor for name, tensor in given.items() if name.startswith(f"{part}.")}
    state: dict[str, Tensor] = {}
    channels = {
        tensor.shape[0]: name for name, tensor in own.items() if re.match(r"fusion_flow\.permutation_\d+$", name)
    }
    for name, tensor in tensors.items():
        if name.endswith(("w_perm_inv", "perm_inv")):
            continue
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        if re.match(r"fusion_flow\.module_list\.\d+\.perm$", name):  # in an order that differs from run to run
            name = channels.get(len(tensor), name)
        elif name.endswith(".permutation"):
            tensor = _permutation(name, tensor, source)
        state[name] = tensor
    missing = [name for name in own if name not in state and not OWN.search(name)]
    unknown = [name for name in state if name not in own]
    if missing or unknown:
        raise ValueError(
            f"{source} does not fit this model: {len(missing)} tensors are missing"
            f"{f' (first: {missing[0]})' if missing else ''}, {len(unknown)} unknown"
            f"{f' (first: {unknown[0]})' if unknown else ''}; check coupling_layers, feature_dims, quantize_type and "
            "concat_pos"
        )
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{source} does not fit this model: {name} is {tuple(tensor.shape)} in it, and "
                f"{tuple(own[name].shape)} here"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{source}: {name} holds a NaN or an infinity")
    return state


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file can raise many kinds
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} cannot be read as a checkpoint ({reason})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, and no checkpoint")
    return content


def _permutation(name: str, one_hot: Tensor, source: str) -> Tensor:
    """Return the permutation that a one-hot matrix (C, C, 1, 1) applies: output i is input permutation[i]."""
    matrix = one_hot.flatten(1) if one_hot.dim() > 1 else one_hot[None]
    indices = matrix.argmax(1)
    exact = matrix.shape == (len(indices), len(indices)) and bool(
        (torch.zeros_like(matrix).scatter_(1, indices[:, None], 1.0) == matrix).all()
    )
    if not exact or len(indices.unique()) != len(indices):
        raise ValueError(f"{source}: {name.replace('permutation', 'w_perm')} is no permutation matrix")
    return indices
