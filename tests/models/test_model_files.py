"""Model files are untrusted input: whatever is in one, it is a working model or one error that names file and field."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mutations
import pytest
import safetensors.torch
import small_gaussian
import small_vqflow
import timm
import torch
from torch import Tensor

import hgad_fast
from hgad_fast import GaussianModel, HGADConfig, HGADModel, VQFlowModel
from hgad_fast.features.extract import FeatureSet

ROOT = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = {"n_classes": 3, "class_names": ("a", "b", "c"), "n_intra_centers": 2, "coupling_layers": 2}
SMALL |= {"msk_size": 24, "feature_levels": 2, "pos_embed_dim": 8}
BACKBONE = {"backbone_weights": None, "out_indices": (1,), "img_size": 64}
METHODS = ("hgad", "gaussian", "vqflow")


def hgad() -> tuple[HGADModel, list[Tensor]]:
    model = HGADModel(HGADConfig(**SMALL, backbone_arch=None, feature_dims=(12, 9)))
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(9, c, 8 >> s, 10 >> s, generator=generator) for s, c in enumerate((12, 9))]
    model.calibrate(FeatureSet.from_levels(levels, torch.arange(9) % 3), false_alarm_rate=0.2)
    return model, levels


def gaussian() -> tuple[GaussianModel, list[Tensor]]:
    return small_gaussian.fitted(), small_gaussian.class_features(3)


def vqflow() -> tuple[VQFlowModel, list[Tensor]]:
    model, levels = small_vqflow.small_model(meta_epochs=1, sub_epochs=1), small_vqflow.class_features(12)
    images = FeatureSet.from_levels(levels, small_vqflow.labels(12))
    model.fit(images, calibration=images, false_alarm_rate=0.2)
    return model, levels


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model of each method, and features that it scores."""
    folder = tmp_path_factory.mktemp("good")
    for name, make in zip(METHODS, (hgad, gaussian, vqflow), strict=True):
        model, levels = make()
        model.save(folder / f"{name}.good")
        torch.save([level[:2].clone() for level in levels], folder / f"{name}.features")
    return folder


def changed(
    good: Path,
    method: str,
    tmp_path: Path,
    config: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Write a model file with other fields of the configuration or the calibration, or other texts of the metadata."""
    header, data = mutations.parts((good / f"{method}.good").read_bytes())
    metadata = header["__metadata__"]
    for name, fields in (("config", config), ("calibration", calibration)):
        if fields is not None:
            metadata[name] = json.dumps(json.loads(metadata[name]) | fields)
    metadata |= texts or {}
    path = tmp_path / "changed.safetensors"
    path.write_bytes(mutations.whole(header, data))
    return path


def refused(path: Path, features: list[Tensor] | None = None) -> str:
    return mutations.outcome(path, features or [])


def test_300_damaged_files_are_refused_or_work_within_1_gb(good: Path) -> None:
    """In a process of its own, in which larger allocations fail, and would be errors of another kind."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", mutations.__file__, good, "100"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    counts = dict(line.split() for line in run.stdout.splitlines())
    assert counts.keys() == {*METHODS} and all(50 < int(count) < 100 for count in counts.values())  # others work


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        *(("hgad", name, 10**9) for name in ("n_classes", "n_intra_centers", "coupling_layers", "feature_levels")),
        *(("hgad", name, 10**9) for name in ("pos_embed_dim", "msk_size", "img_size", "batch_size", "meta_epochs")),
        *(("hgad", "feature_dims", value) for value in ([10**9, 9], [12, 65537], [12] * 10**5)),
        *(("vqflow", name, 10**9) for name in ("n_prototypes", "n_patterns", "prototype_dim", "hidden_channels")),
        ("vqflow", "coupling_layers", [10**9, 1, 1]),
        *(("gaussian", name, 10**9) for name in ("dim", "coarse_dim", "n_clusters", "map_stages")),
        *(("gaussian", "grids", value) for value in ([[[10**9, 1]]] * 3, [[[4, 4]]], [[[4, 4]]] * 4, 3, [[4, 4]] * 3)),
        ("gaussian", "grids", [[[4, 4], [4, 4]]] * 3),
    ],
)
def test_a_field_beyond_all_measure_is_named(method: str, field: str, value: Any, good: Path, tmp_path: Path) -> None:
    assert f".{field} is " in refused(changed(good, method, tmp_path, {field: value}))


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("hgad", {"n_classes": 100_000, "class_names": None}),
        ("hgad", {"n_intra_centers": 100_000}),
        ("hgad", {"coupling_layers": 128}),
        ("hgad", {"pos_embed_dim": 65536}),
        ("vqflow", {"n_patterns": 100_000, "prototype_dim": 65536}),
        ("vqflow", {"coupling_layers": [128, 128, 128]}),
        ("gaussian", {"grids": [[[65536, 65536]]] * 3}),
        ("gaussian", {"grids": [[[i, 1]] for i in range(1, 60_001)], "n_classes": 60_000, "class_names": None}),
    ],
)
def test_a_model_that_is_larger_than_its_file_is_never_made(
    method: str, fields: dict[str, Any], good: Path, tmp_path: Path
) -> None:
    texts = {}
    if "n_classes" in fields:
        texts["class_names"] = json.dumps([f"class {k}" for k in range(fields["n_classes"])])
    assert "does not fit its own configuration" in refused(changed(good, method, tmp_path, fields, texts=texts))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"false_alarm_rate": 0}, "false_alarm_rate is '0'; allowed: a number above 0 and below 1"),
        ({"false_alarm_rate": "0.1"}, "false_alarm_rate is '0.1'"),
        ({"img_size": -1}, "img_size is '-1'"),
        ({"borrowing": 1}, "borrowing is '1'"),
        ({"share": 1.5}, "share is '1.5'"),
        ({"scored_on": "mask"}, "scored_on is 'mask'"),
        ({"unheard": 1}, "'unheard' is unknown"),
    ],
)
def test_a_setting_of_the_calibration_is_named(fields: Any, named: str, good: Path, tmp_path: Path) -> None:
    message = refused(changed(good, "hgad", tmp_path, calibration=fields))
    assert f"changed.safetensors is damaged: in its calibration {named}" in message


@pytest.mark.parametrize(
    ("method", "name", "value", "named"),
    [
        ("hgad", "calibration.class_ids", torch.full((9,), 3), "class_ids holds a number that is none of the 3 groups"),
        ("hgad", "calibration.class_ids", torch.tensor(0), r"scores has shape (9,); expected is (1,)"),
        ("hgad", "calibration.class_ids", torch.zeros(9), "class_ids is of type torch.float32; it must be int64"),
        ("hgad", "calibration.level_max", torch.zeros(3, 1), "level_max has shape (3, 1); expected is (3, 2)"),
        ("hgad", "calibration.weights", torch.full((3, 2), -1.0), "weights holds a number below 0"),
        (
            "hgad",
            "calibration.scores",
            torch.zeros(9, dtype=torch.float8_e5m2),
            "calibration.scores is of type F8_E5M2",
        ),
        ("hgad", "calibration.weights", None, "the tensor weights is missing"),
        ("hgad", "calibration.scores", None, "the tensor scores is missing"),
        ("hgad", "calibration.more", torch.zeros(2), "'more' is unknown"),
        ("gaussian", "calibration.score_weights", None, "the tensor score_weights is missing"),
        ("hgad", "mixture.mus.0", torch.full((3, 12), torch.nan), "tensor mixture.mus.0 holds a NaN or an infinity"),
        ("hgad", "mixture.mus.0", torch.zeros(3, 12).int(), "the tensor mixture.mus.0 is of type I32"),
        (
            "hgad",
            "mixture.mus.0",
            torch.full((3, 12), 1e300, dtype=torch.float64),
            "tensor mixture.mus.0 holds a NaN or an inf",
        ),
        ("gaussian", "gaussians.0.images", torch.full((3,), -1), "gaussians.0.images holds a number of images below 0"),
        ("gaussian", "gaussians.0.images", torch.zeros(3), "tensor gaussians.0.images is of type F32; allowed: I64"),
        ("vqflow", "fusion_flow.permutation_0", torch.zeros(4).long(), "fusion_flow.permutation_0 is no permutation"),
        ("vqflow", "prototype_images", torch.full((6, 3), -1), "prototype_images holds a number of images below 0"),
    ],
)
def test_a_tensor_is_named(method: str, name: str, value: Any, named: str, good: Path, tmp_path: Path) -> None:
    file = (good / f"{method}.good").read_bytes()
    tensors = safetensors.torch.load(file)
    tensors.pop(name, None)
    if value is not None:
        tensors[name] = value
    path = tmp_path / "changed.safetensors"
    safetensors.torch.save_file(tensors, path, mutations.parts(file)[0]["__metadata__"])
    assert named in refused(path)


def test_what_a_renewed_calibration_keeps_is_exact_and_in_order(tmp_path: Path) -> None:
    model, _ = hgad()
    scores = torch.tensor([1 / 3, 2 / 3, 1.0, 0.1], dtype=torch.float64)
    model.calibration.pooled_scores, model.calibration.pooled_ids = scores, torch.tensor([0, 0, 0, 2])
    model.save(tmp_path / "m.safetensors")
    assert torch.equal(hgad_fast.load(tmp_path / "m.safetensors").calibration.pooled_scores, scores)
    model.calibration.pooled_ids = torch.zeros(4, dtype=torch.int64)
    model.save(tmp_path / "m.safetensors")
    assert "in its calibration pooled_scores do not ascend in group 0" in refused(tmp_path / "m.safetensors")
    model.calibration.pooled_ids = None
    model.save(tmp_path / "m.safetensors")
    assert "one of the tensors pooled_scores and pooled_ids is missing" in refused(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("config", "[1]", "'config' in its metadata is a list, no dict"),
        ("config", "[" * 10**5, "'config' in its metadata is no JSON"),
        ("class_names", '["a", "b", "d"]', "the class names in its metadata are not those of its configuration"),
        ("backbone", "elsewhere", "'backbone' in its metadata is 'elsewhere'; allowed: included or left out"),
        ("method", "x", "holds a model of the method 'x'; this version knows "),
        ("calibration", "3", "'calibration' in its metadata is a int, no dict"),
    ],
)
def test_a_text_of_the_metadata_is_named(name: str, text: str, named: str, good: Path, tmp_path: Path) -> None:
    assert named in refused(changed(good, "hgad", tmp_path, texts={name: text}))


def test_a_header_as_large_as_no_model_has_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    path.write_bytes((50 * 10**6).to_bytes(8, "little") + b"{}")
    assert "large.safetensors is no whole safetensors file (header too large: 50000000 bytes; " in refused(path)


def test_what_is_no_model_file_is_named(tmp_path: Path, good: Path) -> None:
    text, cut = tmp_path / "text.txt", tmp_path / "cut.safetensors"
    text.write_text("root:x:0:0:root:/root:/bin/bash\n" * 10)
    cut.write_bytes((good / "hgad.good").read_bytes()[:-100])
    for path in (text, cut):
        assert f"{path} is no whole safetensors file (" in refused(path)
    for path in (tmp_path, tmp_path / "none", tmp_path / "new\nline"):
        assert "there is no model file " in refused(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nfs": 3}, "nfs is no list"),
        ({"nfs": [3, 4]}, r"holds no state dict \(a dict of tensors\), but a int"),
        ({"nfs": [{3: torch.zeros(2)}]}, "holds a tensor that is called 3"),
        ({"mus": [torch.zeros(2)]}, r"holds no state dict \(a dict of tensors\), but a list"),
        ({"mus": {"0": [0.0]}}, "0 is a list, and no tensor"),
        ({"mus": {"0": torch.full((3, 12), torch.nan)}}, "0 holds a NaN or an infinity"),
        ({"mus": {"0": torch.zeros(3, 12).to_sparse()}}, "0 is no tensor of plain numbers"),
        ({"mus": {"0": torch.zeros(3, 12, dtype=torch.float8_e4m3fn)}}, "0 is no tensor of plain numbers"),
        ({"mus": {"9": torch.zeros(3, 12)}}, "does not fit this model"),
    ],
)
def test_an_official_checkpoint_of_something_else_is_named(changes: Any, message: str, tmp_path: Path) -> None:
    content = {"nfs": [], "mus": {}, "mu_deltas": {}, "phi_inters": {}, "phi_intras": {}} | changes
    torch.save(content, tmp_path / "official.pt")
    with pytest.raises(ValueError, match=rf"official\.pt.* {message}"):
        HGADModel(HGADConfig(**SMALL, backbone_arch=None, feature_dims=(12, 9))).load_official_checkpoint(
            tmp_path / "official.pt"
        )
    (tmp_path / "cut.pt").write_bytes((tmp_path / "official.pt").read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"cut\.pt cannot be read as a PyTorch checkpoint"):
        hgad()[0].load_official_checkpoint(tmp_path / "cut.pt")


# ---------------------------------------------------------------------------------------------------- backbones


def with_backbone(arch: str = "test_efficientnet", **settings: Any) -> HGADModel:
    return HGADModel(HGADConfig(**SMALL | BACKBONE | {"backbone_arch": arch} | settings))


@pytest.mark.parametrize("arch", ["hf-hub:a/b", "hf_hub:a/b", "local-dir:/etc", "resnet18+hf-hub:a/b"])
def test_a_file_cannot_ask_for_anything_to_be_fetched(arch: str, tmp_path: Path, monkeypatch) -> None:
    with_backbone().save(tmp_path / "hgad.good")
    fields: dict[str, Any] = {"backbone_arch": arch, "backbone_weights": "pretrained"}
    if "+" in arch:
        fields |= {"feature_mode": "joined", "out_indices": [[1], [1]]}

    def fetch(*_: Any, **__: Any) -> None:
        raise AssertionError("something is fetched")

    for name in ("load_model_config_from_hf", "load_model_config_from_path"):
        monkeypatch.setattr(timm.models._factory, name, fetch)
    for backbone in ("included", "left out"):
        path = changed(tmp_path, "hgad", tmp_path, fields, texts={"backbone": backbone})
        assert f"names the backbone_arch {arch!r}; a model file may name architectures of timm alone" in refused(path)


def test_weights_that_a_file_names_are_not_opened(tmp_path: Path) -> None:
    model = with_backbone()
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    model.config = model.config.replace(backbone_weights=tmp_path / "weights.pth")
    model.save(tmp_path / "m.safetensors")
    loaded = hgad_fast.load(tmp_path / "m.safetensors")
    assert loaded.config == model.config
    images = torch.rand(1, 3, 64, 64)
    assert all(map(torch.equal, loaded.encoder(images), model.encoder(images)))


def test_what_a_network_computes_when_it_is_made_is_there_after_loading(tmp_path: Path) -> None:
    model = with_backbone("test_coatnet", feature_levels=1, out_indices=(4,))
    assert {name for name, _ in model.encoder.named_buffers()} - {*model.encoder.state_dict()}  # not in the file
    model.save(tmp_path / "m.safetensors")
    images = torch.rand(1, 3, 160, 160)
    assert all(map(torch.equal, hgad_fast.load(tmp_path / "m.safetensors").encoder(images), model.encoder(images)))


def test_a_loaded_model_is_float32_whatever_the_default_dtype(good: Path) -> None:
    features = torch.load(good / "gaussian.features")
    expected = hgad_fast.load(good / "gaussian.good").score_features(features).image_score
    torch.set_default_dtype(torch.float64)
    try:
        loaded = hgad_fast.load(good / "gaussian.good")
    finally:
        torch.set_default_dtype(torch.float32)
    assert {buffer.dtype for buffer in loaded.buffers()} == {torch.float32, torch.int64, torch.int32}
    assert torch.equal(loaded.score_features(features).image_score, expected)


# ---------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("method", METHODS)
def test_the_same_model_gives_the_same_bytes(method: str, good: Path, tmp_path: Path) -> None:
    file = (good / f"{method}.good").read_bytes()
    model = hgad_fast.load(good / f"{method}.good")
    for _ in range(3):
        model.save(tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == file
    header, data = mutations.parts(file)
    assert list(header["__metadata__"]) == sorted(header["__metadata__"])  # as in any other process
    entries = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    assert entries == sorted(entries) and entries[-1][1] == len(data)
