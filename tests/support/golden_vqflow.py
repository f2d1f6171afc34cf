"""The golden files of VQ-Flow: values that the official modules computed on a CPU, with their inputs and parameters."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from golden import FOLDER
from torch import Tensor, nn

from hgad_fast import VQFlowConfig, VQFlowModel
from hgad_fast.modules.convolutional_flow import ConvolutionalBlock, FusionFlow
from hgad_fast.ops import Condition


class VQFlowGolden:
    """A golden file: its arrays as tensors by their names."""

    def __init__(self, name: str) -> None:
        self.arrays = np.load(FOLDER / f"vqflow_dev_{name}.npz")

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(self.arrays[key])

    def __contains__(self, key: str) -> bool:
        return key in self.arrays.files

    def below(self, prefix: str) -> dict[str, Tensor]:
        """Return the values whose names begin with the prefix, by the rest of their names."""
        return {key.removeprefix(prefix): self[key] for key in self.arrays.files if key.startswith(prefix)}


def state_and_config(name: str = "full_state", **settings: Any) -> tuple[VQFlowGolden, VQFlowConfig]:
    """Return a golden state, and the official configuration of its model."""
    golden = VQFlowGolden(name)
    sizes = json.loads(str(VQFlowGolden("full_state").arrays["config_json"]))
    config = VQFlowConfig.official(
        backbone_arch=None,
        feature_dims=tuple(sizes["channels"]),
        coupling_layers=tuple(sizes["blocks"]),
        n_prototypes=sizes["k_cpc"],
        n_patterns=sizes["k_cspc"],
        prototype_dim=sizes["dim_cpc"],
        pos_embed_dim=sizes["c_pos"],
        img_size=sizes["input"][0],
        msk_size=sizes["input"][0],
        batch_size=sizes["B"],
        **settings,
    )
    return golden, config


def official_model(name: str = "full_state", dtype: torch.dtype = torch.float64, **settings: Any) -> VQFlowModel:
    """Return the model of a golden state, in a dtype."""
    golden, config = state_and_config(name, **settings)
    model = VQFlowModel(config)
    model.load_official_checkpoint(golden.below("state/"))
    return model.to(dtype)


def free_condition(values: Tensor) -> Condition:
    """Return a condition whose dense form is (B, C, h, w) values: a code for each pixel.

    Its prototype has no channels. The gradient goes to the values, as to a condition that is not quantised.
    """
    batch, channels, h, w = values.shape
    codes = values.detach().permute(0, 2, 3, 1).reshape(-1, channels)
    indices = torch.arange(len(codes)).view(batch, h, w)
    return Condition(indices, codes, values.new_zeros(batch, 0), None, False, values)


def golden_block(golden: VQFlowGolden, dtype: torch.dtype) -> ConvolutionalBlock:
    """Return the block of a golden file."""
    state = golden.below("state/")
    block = ConvolutionalBlock(golden["x"].shape[1], golden["cond"].shape[1])
    own = {name: tensor for name, tensor in state.items() if not name.startswith("w_perm")}
    block.load_state_dict(own | {"permutation": golden["perm_index"]})
    return block.to(dtype)


def golden_fusion(golden: VQFlowGolden, dtype: torch.dtype) -> FusionFlow:
    """Return the fusion flow of a golden file."""
    prefix = "state/module_list.3."
    flow = FusionFlow([golden[f"x{level}"].shape[1] for level in range(3)], golden["cond"].shape[1])
    permutations = {f"permutation_{level}": golden[f"perm_level{level}"] for level in range(3)}
    flow.load_state_dict(golden.below(prefix) | permutations)
    return flow.to(dtype)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of a module's parameters by their names."""
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest expected value."""
    difference = (actual.detach().double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max().clamp(min=torch.finfo(torch.float64).tiny))
