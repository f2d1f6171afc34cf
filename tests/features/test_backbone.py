"""The frozen backbone: its normalisation, image pyramid, stages and weights."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import rounding
import timm
import torch
from rounding import SAME_IN_FLOAT64
from torch import Tensor

from hgad_fast import HGADConfig, HGADModel
from hgad_fast.features.backbone import Backbone

ARCHS = ("test_efficientnet", "test_resnet", "test_convnext", "test_vit", "test_mambaout")


def config(arch: str = "test_efficientnet", **settings) -> HGADConfig:
    return HGADConfig(**{"backbone_arch": arch, "backbone_weights": None, "out_indices": (1,)} | settings)


def classifier(arch: str = "test_efficientnet", seed: int = 1) -> torch.nn.Module:
    """A whole timm model whose every tensor, statistics of batch norms too, is random."""
    torch.manual_seed(seed)
    model = timm.create_model(arch, pretrained=False).eval()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.02, 0.3)
    return model


def bilinear_aligned(image: np.ndarray, h: int, w: int) -> np.ndarray:
    """(3, H, W) -> (3, h, w): the corner pixels of both grids lie on one another."""
    rows, columns = np.linspace(0, image.shape[1] - 1, h), np.linspace(0, image.shape[2] - 1, w)
    y, x = np.minimum(rows.astype(int), image.shape[1] - 2), np.minimum(columns.astype(int), image.shape[2] - 2)
    v, u = (rows - y)[:, None], (columns - x)[None]
    upper = image[:, y][:, :, x] * (1 - u) + image[:, y][:, :, x + 1] * u
    lower = image[:, y + 1][:, :, x] * (1 - u) + image[:, y + 1][:, :, x + 1] * u
    return upper * (1 - v) + lower * v


# ---------------------------------------------------------------------------------------------------- images in


@pytest.mark.parametrize(
    ("arch", "mean", "std"),
    [
        ("test_efficientnet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("test_resnet", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("tf_efficientnet_lite0", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ],
)
def test_normalisation_is_that_of_timms_configuration(arch, mean, std):
    images = torch.rand(2, 3, 5, 7)

    def definition(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)

    result = Backbone(config(arch)).normalize(images)
    rounding.assert_close(result, definition, images, torch.tensor(mean), torch.tensor(std))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("size", [(64, 64), (65, 83), (97, 51)])
def test_image_pyramid_is_the_official_one(size):
    height, width = size
    backbone = Backbone(config(feature_levels=3))
    images = torch.randn(2, 3, height, width)
    features = backbone(images)
    assert len(features) == 3
    for level, actual in enumerate(features):
        h, w = height >> level, width >> level
        resized = torch.from_numpy(np.stack([bilinear_aligned(image, h, w) for image in images.double().numpy()]))
        expected = backbone.net(resized)[0]
        assert actual.shape == expected.shape and actual.shape[1] == backbone.feature_dims[level]
        torch.testing.assert_close(actual, expected, rtol=SAME_IN_FLOAT64, atol=SAME_IN_FLOAT64)


@pytest.mark.usefixtures("float64")
def test_stages_are_those_of_one_pass():
    whole = classifier("test_resnet")
    backbone = Backbone(config("test_resnet", feature_mode="stages", feature_levels=3, out_indices=(1, 2, 3)))
    backbone.net.load_state_dict(whole.state_dict(), strict=False)
    images = torch.randn(2, 3, 65, 83)
    with torch.no_grad():
        x = whole.act1(whole.bn1(whole.conv1(images)))
        x = whole.maxpool(x)
        expected = []
        for layer in (whole.layer1, whole.layer2, whole.layer3):
            x = layer(x)
            expected.append(x)
    features = backbone(images)
    assert backbone.feature_dims == tuple(x.shape[1] for x in expected)
    torch.testing.assert_close(features, expected, rtol=SAME_IN_FLOAT64, atol=SAME_IN_FLOAT64)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("mode", ["image_pyramid", "stages"])
def test_the_number_of_feature_values_is_known_beforehand(arch, mode):
    indices = (1,) if mode == "image_pyramid" else (0, 1)
    backbone = Backbone(config(arch, feature_mode=mode, feature_levels=2, out_indices=indices))
    features = backbone(torch.zeros(1, 3, 160, 160))
    assert backbone.feature_values(160, 160) == sum(level.numel() for level in features)


@pytest.mark.usefixtures("float64")
def test_an_architecture_that_keeps_channels_last_gives_channels_first():
    backbone = Backbone(config("test_mambaout", feature_levels=1))
    images = torch.randn(1, 3, 64, 96)
    (features,) = backbone(images)
    assert features.shape == (1, backbone.feature_dims[0], 8, 12)
    torch.testing.assert_close(
        features, backbone.net(images)[0].movedim(-1, 1), rtol=SAME_IN_FLOAT64, atol=SAME_IN_FLOAT64
    )


def test_an_architecture_of_fixed_size_says_so():
    backbone = Backbone(config("test_vit_relpos", feature_levels=2))
    with pytest.raises(ValueError, match=r"test_vit_relpos cannot take images of 80 x 80 pixels: .*backbone_arch"):
        backbone(torch.randn(1, 3, 160, 160))


def test_it_is_frozen_for_good():
    model = HGADModel(config(n_classes=2, coupling_layers=1, pos_embed_dim=4, feature_levels=2))
    encoder = model.encoder
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    assert any("running_mean" in name for name in before)
    model.train()
    features = encoder(torch.rand(4, 3, 64, 64, requires_grad=True))
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not any(x.requires_grad for x in features)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# ---------------------------------------------------------------------------------------------------- weights


def write(state: dict, path) -> str:
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save(state, path)
    return str(path)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("arch", ARCHS)
def test_weights_of_a_whole_classifier(arch, tmp_path):
    whole = classifier(arch)
    backbone = Backbone(config(arch, feature_levels=1, backbone_weights=write(whole.state_dict(), tmp_path / "w.pth")))
    expected = whole.state_dict()
    taken = backbone.net.state_dict()
    assert taken
    for name, tensor in taken.items():
        original = name.removeprefix("model.")
        original = original if original in expected else original.replace("_", ".", 1)
        assert torch.equal(tensor, expected[original]), name
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        (features,) = whole.forward_intermediates(images, indices=[1], intermediates_only=True, norm=False)
    torch.testing.assert_close(backbone(images)[0], features, rtol=SAME_IN_FLOAT64, atol=SAME_IN_FLOAT64)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_weights_of_the_extractor_alone_in_any_format(suffix, tmp_path):
    source = Backbone(config("test_convnext", feature_levels=1, seed=0))
    source.net.load_state_dict({k: torch.rand_like(v) for k, v in source.net.state_dict().items()})
    file = write(source.net.state_dict(), tmp_path / f"weights{suffix}")
    loaded = Backbone(config("test_convnext", feature_levels=1, backbone_weights=file))
    assert loaded.net.state_dict().keys() == source.net.state_dict().keys()
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(loaded(images), source(images), rtol=0, atol=0)


@pytest.mark.parametrize("wrap", [lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
def test_weights_of_a_training_checkpoint(wrap, tmp_path):
    state = {f"module.{k}": v for k, v in classifier().state_dict().items()}
    file = write(wrap(state), tmp_path / "checkpoint.pt")
    loaded = Backbone(config(backbone_weights=file)).net.state_dict()
    assert torch.equal(loaded["conv_stem.weight"], state["module.conv_stem.weight"])


def test_weights_of_another_architecture_are_refused(tmp_path):
    file = write(classifier("test_resnet").state_dict(), tmp_path / "resnet.safetensors")
    with pytest.raises(
        ValueError, match=r"resnet\.safetensors .*'test_efficientnet': \d+ tensors missing \(first: conv"
    ):
        Backbone(config(backbone_weights=file))
    state = classifier().state_dict()
    state["conv_stem.weight"] = state["conv_stem.weight"][:-1].clone()
    file = write(state, tmp_path / "narrow.pth")
    with pytest.raises(ValueError, match=r"narrow\.pth .* 0 tensors missing, 1 of another shape \(first: conv_stem"):
        Backbone(config(backbone_weights=file))


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_missing_damaged_or_foreign_file_is_named(name, tmp_path):
    file = tmp_path / name
    for content, reason in (
        (None, "there is no file"),
        (b"", "cannot be read as a state dict"),
        (b"<html>not found</html>", "cannot be read as a state dict"),
        (b"half", "cannot be read as a state dict"),
    ):
        if content == b"half":
            write(classifier().state_dict(), file)
            content = file.read_bytes()[:-5000]
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"backbone_weights: .*{name}") as error:
            Backbone(config(backbone_weights=file))
        assert reason in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(ValueError, match=r"backbone_weights: there is no file .*folder\.pth"):
        Backbone(config(backbone_weights=tmp_path / "folder.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth holds no state dict"):
        Backbone(config(backbone_weights=tmp_path / "list.pth"))


class Bomb:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("save", [torch.save, lambda value, file: file.write_bytes(pickle.dumps(value, protocol=2))])
def test_nothing_in_a_weights_file_is_executed(save, tmp_path):
    save({"conv_stem.weight": Bomb(tmp_path / "executed")}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match=r"bomb\.pth cannot be read as a state dict"):
        Backbone(config(backbone_weights=tmp_path / "bomb.pth"))
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------------------------------------- names and the hub


def test_an_unknown_architecture_is_named_with_its_neighbours():
    with pytest.raises(
        ValueError, match=r"HGADConfig\.backbone_arch is 'resnet5O'.*does not know; close to it: .*resnet50"
    ):
        Backbone(config("resnet5O"))
    with pytest.raises(ValueError, match=r"'test_resnet\.nobodys'.* [Ii]nvalid pretrained tag"):
        Backbone(config("test_resnet.nobodys"))


@pytest.mark.parametrize("arch", ["test_efficientnet", "test_resnet", "test_vit"])
def test_impossible_stages_are_named(arch):
    with pytest.raises(ValueError, match=rf"{arch}' with out_indices = \(17,\)"):
        Backbone(config(arch, out_indices=(17,)))


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """No name resolves, nothing connects; an empty cache of the hub; and nobody sleeps to try again."""
    attempts = []

    def refuse(*args, **_):
        attempts.append(args)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits {seconds} s for an unreachable hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return attempts


def test_an_unreachable_hub_names_the_model_and_both_remedies_at_once(no_network, caplog):
    with caplog.at_level(logging.WARNING), pytest.raises(ConnectionError) as error:
        HGADModel(config("test_resnet", backbone_weights="pretrained"))
    message = str(error.value)
    assert "'test_resnet'" in message and "\n" not in message
    assert "pass the file as backbone_weights" in message and "backbone_weights=None" in message
    assert len(no_network) <= 2
    assert not caplog.records


def put_into_hub_cache(folder: Path, repository: str, config: dict | None = None) -> dict[str, torch.Tensor]:
    """Put weights of a test_resnet into the hub's cache, and a configuration; return the weights."""
    folder = folder / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    state = classifier("test_resnet").state_dict()
    write(state, folder / "snapshots" / ("0" * 40) / "model.safetensors")
    if config is not None:
        (folder / "snapshots" / ("0" * 40) / "config.json").write_text(json.dumps(config))
    return state


def assert_weights(backbone: Backbone, state: dict[str, torch.Tensor]) -> None:
    for name, tensor in backbone.net.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("prefix", ["", "hf-hub:timm/", "hf_hub:timm/"])
def test_weights_in_the_hubs_cache_need_no_network(prefix, no_network, tmp_path):
    state = put_into_hub_cache(tmp_path, timm.get_pretrained_cfg("test_resnet").hf_hub_id)
    backbone = Backbone(config(f"{prefix}test_resnet", backbone_weights="pretrained"))
    assert_weights(backbone, state)
    assert (backbone.arch, backbone.weights) == ("test_resnet", "pretrained")


def test_a_model_of_the_hub_is_one_of_its_architecture_and_loads_without_the_hub(no_network, tmp_path):
    pretrained = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "num_classes": 1000, "input_size": [3, 160, 160]}
    hub_config = {"architecture": "test_resnet", "num_classes": 1000, "pretrained_cfg": pretrained}
    state = put_into_hub_cache(tmp_path, "owner/own-resnet", hub_config)
    model = HGADModel(config("hf_hub:owner/own-resnet", backbone_weights="pretrained"))
    assert (model.config.backbone_arch, model.config.backbone_weights) == ("test_resnet", "hf-hub:owner/own-resnet")
    assert_weights(model.encoder, state)
    torch.testing.assert_close(model.encoder.mean.flatten(), torch.tensor(pretrained["mean"]))
    model.save(tmp_path / "whole.safetensors")
    model.save(tmp_path / "small.safetensors", include_backbone=False)
    assert_weights(HGADModel.load(tmp_path / "small.safetensors").encoder, state)
    shutil.rmtree(tmp_path / "hub")
    no_network.clear()
    loaded = HGADModel.load(tmp_path / "whole.safetensors")
    assert_weights(loaded.encoder, state)
    assert torch.equal(loaded.encoder.mean, model.encoder.mean) and loaded.config == model.config
    assert not no_network
    with pytest.raises(ValueError, match=r"small\.safetensors cannot be loaded, as it was saved without its backbone"):
        HGADModel.load(tmp_path / "small.safetensors")


def test_a_model_of_the_hub_with_options_of_its_own_is_refused(no_network, tmp_path):
    hub_config = {"architecture": "test_resnet", "pretrained_cfg": {}, "model_args": {"output_stride": 16}}
    put_into_hub_cache(tmp_path, "owner/odd", hub_config)
    with pytest.raises(ValueError, match=r"'hf-hub:owner/odd', a model with options of its own \(output_stride\)"):
        Backbone(config("hf-hub:owner/odd", backbone_weights="pretrained"))
    with pytest.raises(ConnectionError, match="'hf-hub:owner/none' could not be had .* by timm's name"):
        Backbone(config("hf-hub:owner/none", backbone_weights="pretrained"))


def test_a_slip_of_the_pen_in_the_weights_is_told_from_a_file():
    with pytest.raises(ValueError, match="no file packged; did you mean 'packaged'. Allowed are 'pretrained', 'packag"):
        Backbone(config(backbone_weights="packged"))
