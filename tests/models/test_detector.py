"""HGADModel: what it is made of, and that a file of it is whole, safe and the same model again."""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

import hgad_fast
from hgad_fast import HGADConfig, HGADModel
from hgad_fast.features.extract import FeatureSet

ROOT = Path(__file__).resolve().parents[2]


def config(**settings) -> HGADConfig:
    """Two levels of features that the user brings."""
    small = {"n_classes": 3, "class_names": ("a", "b", "c"), "n_intra_centers": 2, "coupling_layers": 2, "msk_size": 24}
    own = {"backbone_arch": None, "feature_dims": (12, 9), "feature_levels": 2, "pos_embed_dim": 8}
    return HGADConfig(**{**small, **own, **settings})


def with_backbone(**settings) -> HGADConfig:
    return config(
        **{
            "backbone_arch": "test_efficientnet",
            "backbone_weights": None,
            "feature_dims": None,
            "out_indices": (1,),
            "img_size": 64,
            **settings,
        }
    )


def feature_levels(n: int = 9, dims: tuple[int, ...] = (12, 9), seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, c, 8 >> s, 10 >> s, generator=generator) for s, c in enumerate(dims)]


def calibrated(model: HGADModel) -> HGADModel:
    """Parameters moved off their initial values, and thresholds from a few random images."""
    with torch.no_grad():
        for parameter in [*model.nfs.parameters(), *model.mixture.parameters()]:
            parameter += 0.02 * torch.randn_like(parameter)
    labels = torch.arange(9) % 3
    model.calibrate(FeatureSet.from_levels(feature_levels(dims=tuple(model.feat_dims)), labels), false_alarm_rate=0.2)
    return model


def assert_same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


def assert_scores_alike(first, second) -> None:
    for name in ("anomaly_map", "image_score", "class_id", "p_value", "is_anomalous", "threshold", "false_alarm_rate"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


# ---------------------------------------------------------------------------------------------------- initial weights


def test_the_seed_alone_decides_the_weights():
    torch.manual_seed(1)
    first = HGADModel(with_backbone(seed=5)).state_dict()
    torch.manual_seed(2)
    torch.rand(7)
    assert_same_bits(HGADModel(with_backbone(seed=5)).state_dict(), first)
    other = HGADModel(with_backbone(seed=6)).state_dict()
    assert not torch.equal(other["nfs.0.module_list.0.w_perm"], first["nfs.0.module_list.0.w_perm"])
    assert not torch.equal(other["encoder.net.conv_stem.weight"], first["encoder.net.conv_stem.weight"])


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    HGADModel(with_backbone())
    assert torch.equal(torch.get_rng_state(), before)


def test_more_classes_than_channels_start_apart_and_learn_apart():
    classes, channels = 300, 112
    model = HGADModel(
        config(n_classes=classes, class_names=None, feature_levels=1, feature_dims=(channels,), label_smoothing=0.0)
    )
    centres = model.mus[0].detach()
    distances = torch.cdist(centres, centres) + torch.eye(classes) * 1e9
    assert float(distances.min()) > 2
    labels = torch.arange(classes)
    x = torch.randn(classes, channels)

    def mutual_information() -> float:
        return model(x, (labels, None), torch.zeros(classes, 8), 0, 0)["L_mi"].item()

    start = mutual_information()
    optimizer = torch.optim.SGD([*model.nfs.parameters(), *model.mixture.parameters()], lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        losses = model(x, (labels, None), torch.zeros(classes, 8), 0, 0)
        (losses["L_g"] - 100 * losses["L_mi"] + losses["L_e"]).backward()
        gradient = model.mus[0].grad
        assert float(gradient.norm(dim=1).min()) > 0
        assert float(torch.pdist(gradient).min()) > 0  # every class is pulled its own way
        optimizer.step()
    assert mutual_information() > start + 0.1


def test_feature_dims_that_are_not_the_backbones_are_refused():
    with pytest.raises(ValueError, match=r"feature_dims is \(8, 8\), but test_efficientnet gives \(24, 24\)"):
        HGADModel(with_backbone(feature_dims=(8, 8)))


def test_the_official_namespace_with_fields_of_its_own():
    args = argparse.Namespace(
        n_classes=2,
        class_to_idx={"nut": 1, "bolt": 0},
        dataset="mvtec",
        gpu="0",
        lr_decay_epochs=[50, 75],
        device=torch.device("cpu"),
        backbone_arch="test_efficientnet",
        backbone_weights=None,
        out_indices=[1],
        coupling_layers=1,
        pos_embed_dim=4,
    )
    model = HGADModel(args)
    assert model.class_names == ("bolt", "nut")
    assert model.config.out_indices == (1,) and model.feat_dims == [24, 24, 24]
    args.device = "meta"
    assert {parameter.device.type for parameter in HGADModel(args).parameters()} == {"meta"}
    args.lr = -1
    with pytest.raises(ValueError, match=r"HGADConfig\.lr is -1"):
        HGADModel(args)


@pytest.mark.parametrize(
    ("name", "values"),
    [("memory", ("standard", "reversible")), ("precision", ("tf32", "bf16")), ("checkpoint_every", (3, 4))],
)
def test_memory_and_precision_may_be_set_at_any_time(name, values, tmp_path):
    model = HGADModel(config())
    for value in values:
        setattr(model, name, value)
        assert [getattr(flow, name) for flow in model.nfs] == [value, value]
        assert getattr(model.config, name) == value
    model.save(tmp_path / "m.safetensors")
    assert getattr(HGADModel.load(tmp_path / "m.safetensors"), name) == values[-1]
    with pytest.raises(ValueError, match=rf"HGADConfig\.{name} is 'fast'; allowed: "):
        setattr(model, name, "fast")
    assert getattr(model, name) == values[-1]


def test_a_model_without_backbone_says_what_it_cannot_do():
    model = calibrated(HGADModel(config()))
    with pytest.raises(ValueError, match=r"no backbone \(backbone_arch=None\): use score_features"):
        model.score(torch.rand(1, 3, 64, 64))


# ---------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("make", [config, with_backbone])
def test_a_saved_model_is_the_same_model(make, tmp_path):
    model = calibrated(HGADModel(make(seed=3, lr=1e-3)))
    model.save(tmp_path / "new" / "model.safetensors")
    loaded = HGADModel.load(tmp_path / "new" / "model.safetensors", device="cpu")
    assert_same_bits(loaded.state_dict(), model.state_dict())
    assert loaded.config == model.config
    assert loaded.class_names == ("a", "b", "c")
    assert loaded.calibration.false_alarm_rate == 0.2
    assert_same_bits(loaded.calibration.tensors(), model.calibration.tensors())
    features = feature_levels(4, tuple(model.feat_dims), seed=1)
    assert_scores_alike(loaded.score_features(features), model.score_features(features))
    if model.encoder is not None:
        images = torch.rand(2, 3, 70, 64)
        assert_scores_alike(loaded.score(images), model.score(images))


def test_an_uncalibrated_model_is_saved_too(tmp_path):
    HGADModel(config()).save(tmp_path / "m.safetensors")
    assert HGADModel.load(tmp_path / "m.safetensors").calibration is None


def test_the_file_is_safetensors_with_everything_in_its_metadata(tmp_path):
    calibrated(HGADModel(with_backbone())).save(tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        metadata, names = file.metadata(), set(file.keys())
    assert metadata["format"] == "hgad_fast 1"
    assert json.loads(metadata["class_names"]) == ["a", "b", "c"]
    assert json.loads(metadata["config"])["coupling_layers"] == 2
    assert {"encoder.mean", "encoder.std", "nfs.1.module_list.0.w_perm", "calibration.scores"} <= names


def test_loading_and_scoring_need_no_network(tmp_path):
    model = calibrated(HGADModel(with_backbone()))
    model.config = model.config.replace(backbone_weights="pretrained")  # as if its weights came from the hub
    model.save(tmp_path / "m.safetensors")
    script = """
import socket, sys
def refuse(*_, **__): raise SystemExit("touches the network")
socket.socket.connect = socket.getaddrinfo = refuse
import torch
from hgad_fast import HGADModel
model = HGADModel.load(sys.argv[1])
assert model.config.backbone_weights == "pretrained"
print(float(model.score(torch.full((1, 3, 64, 64), 0.3)).image_score))
"""
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "m.safetensors")], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == pytest.approx(float(model.score(torch.full((1, 3, 64, 64), 0.3)).image_score), rel=1e-5)


def backbone_file(path: Path, seed: int) -> Path:
    net = HGADModel(with_backbone(seed=seed)).encoder.net
    safetensors.torch.save_file(net.state_dict(), path)
    return path


def test_without_its_backbone_the_same_weights_are_demanded(tmp_path):
    weights = backbone_file(tmp_path / "backbone.safetensors", seed=8)
    model = calibrated(HGADModel(with_backbone(backbone_weights=weights)))
    path = tmp_path / "small.safetensors"
    model.save(path, include_backbone=False)
    model.save(tmp_path / "whole.safetensors")
    assert path.stat().st_size < (tmp_path / "whole.safetensors").stat().st_size - 200_000
    images = torch.rand(2, 3, 64, 64)
    assert_scores_alike(HGADModel.load(path).score(images), model.score(images))

    backbone_file(weights, seed=9)
    with pytest.raises(ValueError, match=r"small\.safetensors .*other weights .*include_backbone=True"):
        HGADModel.load(path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"small\.safetensors cannot be loaded, as .*without its backbone.*no file"):
        HGADModel.load(path)
    assert_scores_alike(HGADModel.load(tmp_path / "whole.safetensors").score(images), model.score(images))


def saved(tmp_path: Path) -> Path:
    path = tmp_path / "m.safetensors"
    calibrated(HGADModel(config())).save(path)
    return path


def rewrite(path: Path, change) -> None:
    """Save the file again after `change(metadata, tensors)`."""
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(metadata, tensors)
    safetensors.torch.save_file(tensors, path, metadata)


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_a_truncated_file_is_named(keep, tmp_path):
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"m\.safetensors is no whole safetensors file"):
        HGADModel.load(path)


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(ValueError, match=f"there is no model file {path}"):
            HGADModel.load(path)


def test_a_file_of_something_else_is_named(tmp_path):
    safetensors.torch.save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors is in format None.*load_official_checkpoint"):
        HGADModel.load(tmp_path / "other.safetensors")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt is no whole safetensors file"):
        HGADModel.load(tmp_path / "other.pt")


def test_a_file_of_another_version_is_named(tmp_path):
    path = saved(tmp_path)
    rewrite(path, lambda metadata, _: metadata.update(format="hgad_fast 99"))
    with pytest.raises(ValueError, match=r"m\.safetensors is in format 'hgad_fast 99', this version .* 'hgad_fast 1'"):
        HGADModel.load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("mixture.mus.0"),
        lambda tensors: tensors.update({"mixture.mus.7": torch.zeros(2)}),
        lambda tensors: tensors.update({"mixture.mus.0": torch.zeros(3, 11)}),
    ],
)
def test_tensors_that_do_not_fit_the_configuration_are_named(change, tmp_path):
    path = saved(tmp_path)
    rewrite(path, lambda _, tensors: change(tensors))
    with pytest.raises(ValueError, match=r"m\.safetensors does not fit its own configuration: mixture\.mus\.[07] "):
        HGADModel.load(path)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(error, tmp_path, monkeypatch):
    path = saved(tmp_path)
    before = path.read_bytes()

    def half(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(type(error)):
        HGADModel(config(seed=1)).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_saved_file_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / "other").touch()
    assert saved(tmp_path).stat().st_mode == (tmp_path / "other").stat().st_mode


def test_nothing_unpickles():
    for path in Path(hgad_fast.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "dill", "joblib", "cloudpickle"}, path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(node), path
