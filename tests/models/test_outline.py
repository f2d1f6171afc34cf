"""A model file is described without its network, as with it, unless the network in it is not the one that was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from hgad_fast import GaussianConfig, GaussianModel, HGADConfig, HGADModel
from hgad_fast.features.extract import FeatureSet
from hgad_fast.features.outline import stages_in
from hgad_fast.methods import describe_file
from hgad_fast.models import detector

SMALL: dict[str, Any] = {"n_classes": 2, "img_size": 64, "msk_size": 24, "backbone_weights": None}
HGAD = {"n_intra_centers": 2, "coupling_layers": 2, "pos_embed_dim": 8, "backbone_arch": "test_efficientnet"}
JOINED = {"feature_mode": "joined", "backbone_arch": "test_efficientnet", "out_indices": (1, 2, 3), "grid_stride": 8}
TWO = JOINED | {
    "backbone_arch": "test_efficientnet+test_resnet",
    "out_indices": ((1, 2, 3), (1, 2)),
    "feature_levels": 2,
}


def hgad(**settings: Any) -> HGADModel:
    return HGADModel(HGADConfig(**SMALL | HGAD | settings))


def gaussian(**settings: Any) -> GaussianModel:
    model = GaussianModel(GaussianConfig(**SMALL | JOINED | settings))
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(16, c, 3, 4, generator=generator) for c in model.feature_dims]
    images = FeatureSet.from_levels(levels, torch.arange(16) % 2)
    model.begin(images)
    model.finish(images)
    return model


MODELS = {
    "pyramid": lambda: hgad(feature_levels=2, out_indices=(1,)),
    "joined, scaled": lambda: hgad(**JOINED, feature_levels=1, feature_scaling="std"),
    "gaussian": lambda: gaussian(dim=5, coarse_dim=4),
    "more values than channels": lambda: gaussian(dim=500, coarse_dim=400),
    "no coarse values": lambda: gaussian(coarse_dim=0),
    "stages of the map": lambda: gaussian(dim=5, coarse_dim=4, map_stages=1),
    "two backbones": lambda: gaussian(**TWO, dim=5, coarse_dim=4),
}


def changed(path: Path, tensors: dict[str, torch.Tensor | None], **metadata: str | None) -> Path:
    """Write a file again with other tensors and texts, None for those to leave out."""
    with safetensors.safe_open(path, "pt") as file:
        texts = {name: text for name, text in (file.metadata() | metadata).items() if text is not None}
        state = {name: file.get_tensor(name) for name in file.keys()} | tensors  # noqa: SIM118 (no mapping)
    kept = {name: tensor for name, tensor in state.items() if tensor is not None}
    safetensors.torch.save_file(kept, path, texts)
    return path


def with_the_network(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    with monkeypatch.context() as patch:
        patch.setattr(detector.Detector, "_outline", lambda *_: None)
        return describe_file(path)


def without_the_network(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    with monkeypatch.context() as patch:
        patch.setattr(detector, "make_backbone", lambda _: pytest.fail("a network was made"))
        return describe_file(path)


@pytest.mark.parametrize("name", MODELS)
def test_a_description_needs_no_network(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = MODELS[name](), tmp_path / "model.safetensors"
    model.save(path)
    expected = with_the_network(path, monkeypatch)
    assert expected["backbone"] == model.config.backbone_arch
    assert without_the_network(path, monkeypatch) == expected
    older = describe_file(changed(path, {}, stages=None))
    assert older == expected | {"size": older["size"]}


@pytest.mark.parametrize("name", ["pyramid", "gaussian"])
def test_nor_does_that_of_a_file_of_an_earlier_version(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    MODELS[name]().save(path)
    changed(path, {}, stages=None)
    assert without_the_network(path, monkeypatch) == with_the_network(path, monkeypatch)


def test_nor_does_that_of_a_file_without_its_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    hgad(feature_levels=2, out_indices=(1,)).save(path, include_backbone=False)
    assert without_the_network(path, monkeypatch)["backbone"] == "test_efficientnet"


def test_another_network_than_the_one_saved_is_looked_at(tmp_path: Path) -> None:
    model, path = gaussian(), tmp_path / "model.safetensors"
    name = next(name for name in model.state_dict() if name.endswith("conv_stem.weight"))
    model.save(path)
    expected = describe_file(path)
    changed(path, {name: model.state_dict()[name] + 1}, stages=None)
    assert describe_file(path)["dimensions"] == expected["dimensions"]
    changed(path, {name: model.state_dict()[name][1:]})
    with pytest.raises(ValueError, match=f"model.safetensors does not fit its own configuration: {name}"):
        describe_file(path)
    model.save(path)
    with pytest.raises(ValueError, match=f"model.safetensors does not fit its own configuration: {name}"):
        describe_file(changed(path, {name: None}))


@pytest.mark.parametrize("told", [[[[3, 5], 1]], [[[3, 4], 3]], [[[3, 4], 0]], [[[7.0], 1]], [[7]], [], [[[[7]], 1]]])
def test_stages_that_cannot_be_are_none(told: Any) -> None:
    assert stages_in(told, (7,)) is None
    assert stages_in([[[3, 4], 1]], (7,)) == [((3, 4), 1)]
