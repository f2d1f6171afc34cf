"""Small models to export, and what exported files give."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hgad_fast import HGADConfig, HGADModel
from hgad_fast.features.extract import FeatureSet

DIMS, SIZES = (6, 7), ((6, 5), (3, 3))
SMALL: dict[str, Any] = {"n_classes": 3, "n_intra_centers": 2, "coupling_layers": 2, "pos_embed_dim": 8, "msk_size": 16}
BACKBONE: dict[str, Any] = {"backbone_arch": "test_efficientnet", "backbone_weights": None, "out_indices": (1,)}
ON_IMAGES = SMALL | BACKBONE | {"img_size": 64, "msk_size": 32}
EPS = torch.finfo(torch.float32).eps
# A graph and the model compute the same values in another order of sums. Two orders of n products differ by about
# sqrt(n) roundings of the sum of the products' sizes (Higham and Mary, see rounding.py). Here n is at most 200, and
# that sum about twice as large as the value: 30 roundings. A value goes through about ten sums in a row: two in each
# of up to four subnets, and those that whiten, resize and blur.
CLOSE = {"rtol": 300 * EPS, "atol": 300 * EPS}
FORBIDDEN = {"GatherND", "ScatterND", "NonZero", "Loop", "Scan", "If", "ReduceLogSumExp"}  # TensorRT's stumbling blocks


def features(
    n: int, seed: int = 0, dims: Sequence[int] = DIMS, sizes: Sequence[tuple[int, int]] = SIZES
) -> list[Tensor]:
    """Return features of n images, (n, C, h, w) of each level; image i is of class i % 3."""
    generator = torch.Generator().manual_seed(seed)
    levels = []
    for channels, size in zip(dims, sizes, strict=True):
        of_class = torch.randn(3, channels, 1, 1, generator=torch.Generator().manual_seed(channels))
        levels.append(of_class[torch.arange(n) % 3] + 0.3 * torch.randn(n, channels, *size, generator=generator))
    return levels


def stirred(model: HGADModel) -> HGADModel:
    """Move parameters off their initial values, at which much is 0 or 1."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("encoder."):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def on_features(**changes: Any) -> HGADModel:
    """Return a calibrated HGAD on features that the user brings."""
    model = stirred(
        HGADModel(HGADConfig(**SMALL | {"backbone_arch": None, "feature_levels": 2, "feature_dims": DIMS} | changes))
    )
    held_out = features(24, seed=1)
    class_ids = torch.arange(24) % 3 if model.config.n_classes == 3 else torch.zeros(24, dtype=torch.int64)
    model.begin(FeatureSet.from_levels(held_out, class_ids))
    model.calibrate(FeatureSet.from_levels(held_out, class_ids), false_alarm_rate=0.2)
    return model


def on_images(**changes: Any) -> HGADModel:
    """Return a calibrated HGAD with a backbone of random weights, for images of 64 x 64 pixels."""
    model = stirred(HGADModel(HGADConfig(**ON_IMAGES | changes)))
    encoder: Any = model.encoder
    levels = [encoder(encoder.normalize(image[None]), fast=True) for image in images(12, seed=1)]
    held_out = FeatureSet.from_levels(list(map(torch.cat, zip(*levels, strict=True))), torch.arange(12) % 3)
    model.calibrate(held_out, false_alarm_rate=0.25)
    return model


def images(n: int, seed: int = 0, size: tuple[int, int] = (64, 64)) -> Tensor:
    """Return n images (n, 3, H, W) in [0, 1]."""
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def sidecar_of(path: Path) -> dict[str, Any]:
    return json.loads(path.with_name(f"{path.name}.json").read_text())


def run_onnx(path: Path, *inputs: Tensor) -> dict[str, Tensor]:
    """Return what onnxruntime makes of inputs in their order, by the names of the outputs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    arrays = {each.name: x.numpy() for each, x in zip(session.get_inputs(), inputs, strict=True)}
    names = [each.name for each in session.get_outputs()]
    return {name: torch.from_numpy(array) for name, array in zip(names, session.run(None, arrays), strict=True)}


def operators(path: Path) -> Counter[str]:
    """Return the operators of an ONNX file, which are all of the standard, with their numbers."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    assert {each.domain for each in model.opset_import} == {""} and not model.functions
    return Counter(node.op_type for node in model.graph.node)
