"""Checkpoints of VQ-Flow's official code, in the names and forms of this library."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..files import printable, read_torch_file, require_tensors

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

    The permutations of the fusion flow lie in it in an order that differs from run to run, and are told apart by their
    numbers of channels. Where two levels have the same number, nothing tells which is whose, and it is refused: a
    permutation of another level would give other densities without a word.

    Raises:
        ValueError: it is missing or damaged, or does not fit the model, or two levels have the same number of channels.
    """
    source = "the checkpoint" if isinstance(checkpoint, Mapping) else printable(checkpoint)
    given = checkpoint if isinstance(checkpoint, Mapping) else read_torch_file(checkpoint, "checkpoint")
    if not isinstance(given, Mapping):
        raise ValueError(f"{source} holds a {type(given).__name__}, and no checkpoint")
    tensors: dict[str, Tensor] = {}
    for part in PARTS:
        if isinstance(given.get(part), Mapping):
            tensors |= {f"{part}.{name}": tensor for name, tensor in given[part].items()}
        tensors |= {name: tensor for name, tensor in given.items() if str(name).startswith(f"{part}.")}
    require_tensors(source, tensors)
    state: dict[str, Tensor] = {}
    fused = [name for name in own if re.match(r"fusion_flow\.permutation_\d+$", name)]
    channels = {own[name].shape[0]: name for name in fused}
    if len(channels) < len(fused):
        raise ValueError(
            f"{source} cannot be read into this model: of the channels of its levels, "
            f"{', '.join(str(own[name].shape[0]) for name in fused)}, two are equal, and then nothing in an official "
            "checkpoint tells which permutation of the fusion flow belongs to which level"
        )
    for name, tensor in tensors.items():
        if name.endswith(("w_perm_inv", "perm_inv")):
            continue
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        if re.match(r"fusion_flow\.module_list\.\d+\.perm$", name):  # in an order that differs from run to run
            if tensor.dim() != 1 or not torch.equal(tensor.sort().values, torch.arange(len(tensor)).to(tensor)):
                raise ValueError(f"{source}: {name} is no permutation")
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
    return state


def _permutation(name: str, one_hot: Tensor, source: str) -> Tensor:
    """Return the permutation that a one-hot matrix (C, C, 1, 1) applies: output i is input permutation[i]."""
    if one_hot.dim() > 1 and one_hot.numel() == len(one_hot) ** 2:
        matrix = one_hot.flatten(1)
        indices = matrix.argmax(1)
        exact = torch.equal(torch.zeros_like(matrix).scatter_(1, indices[:, None], 1.0), matrix)
        if exact and len(indices.unique()) == len(indices):
            return indices
    raise ValueError(f"{source}: {name.replace('permutation', 'w_perm')} is no permutation matrix")
