"""`model.export` writes files that give the scores of the model, says what they are, and refuses what would not fit."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import exported
import numpy as np
import pytest
import small_detectors
import torch
from exported import CLOSE, EPS
from process_state import changes, process_state

from hgad_fast import HGADModel, load
from hgad_fast.data.images import read_image
from hgad_fast.export import check, formats, write
from hgad_fast.export.contract import contract
from hgad_fast.export.graph import OUTPUTS, Judge, Plan, ScoringGraph


@pytest.fixture(scope="module")
def of_images(tmp_path_factory):
    """Return a model with a backbone, and what it is exported to: ONNX, a torch program, ONNX of half precision."""
    model, folder = exported.on_images(pos_embed_dim=64), tmp_path_factory.mktemp("exported")
    paths = [model.export(folder / "model.onnx"), model.export(folder / "model.pt2")]
    return model, *paths, model.export(folder / "half.onnx", precision="fp16")


@pytest.fixture(scope="module")
def on_features():
    return exported.on_features()


SIZE = list(exported.SIZES)


def graph_of(model: HGADModel) -> ScoringGraph:
    return ScoringGraph(model, Plan(exported.SIZES, None, model.config.img_size), None).eval()


def run_torch(path: Path, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return dict(zip(OUTPUTS, torch.export.load(path).module()(*inputs), strict=True))


@pytest.mark.parametrize("kind", ["onnx", "torch"])
@pytest.mark.parametrize("count", [1, 5])
def test_a_file_gives_what_the_model_gives(of_images, kind, count):
    model, onnx, program, _ = of_images
    images = exported.images(count, seed=3)
    outputs = exported.run_onnx(onnx, images) if kind == "onnx" else run_torch(program, images)
    expected = model.score(images)
    assert list(outputs) == list(OUTPUTS)
    assert outputs["anomaly_map"].shape == (count, 64, 64)
    torch.testing.assert_close(outputs["anomaly_map"], expected.anomaly_map, **CLOSE)
    torch.testing.assert_close(outputs["score"], expected.image_score, **CLOSE)
    torch.testing.assert_close(outputs["threshold"].double(), expected.threshold, rtol=EPS, atol=0)
    assert torch.equal(outputs["class_id"], expected.class_id)
    assert torch.equal(outputs["is_anomalous"], expected.is_anomalous)


def test_an_onnx_file_is_plain(of_images):
    _, onnx, _, half = of_images
    for path in (onnx, half):
        assert not exported.FORBIDDEN & set(exported.operators(path))
    text = onnx.read_bytes()
    assert str(Path(write.__file__).parents[1]).encode() not in text  # nothing of the machine that wrote it


def test_positions_stay_apart(tmp_path):
    """Of columns and rows there are tables in the file; one of all pixels would be several times the weights."""
    model = exported.on_features(msk_size=60)
    sizes = [(40, 50), (20, 25)]
    path = model.export(tmp_path / "large.onnx", size=sizes)
    numbers = sum(math.prod(tensor.shape) for tensor in model.state_dict().values())
    matrices = 4 * sum(n * m for size in sizes for n, m in zip(size, (60, 75), strict=True))
    tables = 4 * 2 * sum(sum(size) * 2 * (c - c // 2 + 8) for size, c in zip(sizes, exported.DIMS, strict=True))
    operations = 120_000  # bytes, names included
    assert path.stat().st_size < 4 * numbers + matrices + tables + operations


def test_the_sidecar_says_all(of_images):
    model, onnx, program, half = of_images
    import onnx as onnx_package

    sidecar = exported.sidecar_of(onnx)
    (entry,) = onnx_package.load(str(onnx)).metadata_props
    assert entry.key == "hgad_fast" and json.loads(entry.value) == sidecar
    extra = {"hgad_fast.json": ""}
    torch.export.load(program, extra_files=extra)
    assert json.loads(extra["hgad_fast.json"]) == exported.sidecar_of(program)
    assert sidecar["format"] == "hgad_fast export 1" and sidecar["kind"] == "onnx" and sidecar["opset"] == 20
    assert sidecar["inputs"]["image"] == {
        "shape": ["batch", 3, 64, 64],
        "dtype": "float32",
        "channels": "RGB",
        "range": [0, 1],
    }
    resize = sidecar["resize"]
    assert (resize["rule"], resize["img_size"], resize["filter"], resize["antialias"]) == (
        "short side",
        64,
        "Lanczos",
        True,
    )
    assert list(sidecar["outputs"]) == list(OUTPUTS)
    assert sidecar["outputs"]["anomaly_map"]["shape"] == ["batch", 64, 64]
    assert [group["name"] for group in sidecar["groups"]] == list(model.groups)
    for k, group in enumerate(sidecar["groups"]):
        assert group["threshold"] == model.calibration.threshold(k)
        assert group["false_alarm_rate"] == model.calibration.attained_rate(k)
    assert sidecar["target_false_alarm_rate"] == 0.25 and sidecar["model"]["method"] == "hgad"
    assert sidecar["runtimes"]["openvino"]["INFERENCE_PRECISION_HINT"] == "f32"
    assert sidecar["check"]["images"] == check.IMAGES and sidecar["check"]["score"] <= 2e-5
    assert exported.sidecar_of(half)["precision"] == "fp16"
    assert half.stat().st_size < onnx.stat().st_size


def test_the_hash_is_that_of_weights_and_calibration():
    def identity(model: HGADModel) -> str:
        plan = Plan(exported.SIZES, None, model.config.img_size, outputs=("score",))
        return contract(model, plan, "torch", "fp32", range(3))["model"]["sha256"]

    model = exported.on_features()
    first = identity(model)
    assert first == identity(exported.on_features())
    with torch.no_grad():
        model.mixture.mus[0][0, 0] += 1e-3
    assert first != identity(model)
    model = exported.on_features()
    model.calibration = replace(model.calibration, scores=model.calibration.scores + 1e-3)
    assert first != identity(model)


def test_the_graph_of_a_loaded_model_is_the_same(on_features, tmp_path):
    on_features.save(tmp_path / "model.safetensors")
    own, loaded = graph_of(on_features), graph_of(load(tmp_path / "model.safetensors"))
    assert own.state_dict().keys() == loaded.state_dict().keys()
    for name, tensor in own.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    levels = exported.features(2)
    with torch.no_grad():
        assert all(map(torch.equal, own(*levels), loaded(*levels)))


def test_classes_that_are_given(on_features, tmp_path):
    levels, given = exported.features(4, seed=2), torch.tensor([1, -1, 0, 1])
    ids = torch.where(given < 0, on_features.score_features(levels).class_id, given)
    expected = on_features.score_features(levels, ids)
    path = on_features.export(tmp_path / "given.onnx", size=SIZE, class_input=True, outputs=("score", "class_id"))
    outputs = exported.run_onnx(path, *levels, given)
    assert torch.equal(outputs["class_id"], expected.class_id)
    torch.testing.assert_close(outputs["score"], expected.image_score, **CLOSE)
    assert list(exported.sidecar_of(path)["inputs"]) == ["features_0", "features_1", "given_class"]


def test_maps_of_a_size(on_features, tmp_path):
    path = on_features.export(tmp_path / "maps.pt2", size=[(5, 4), (3, 2)], map_size=(8, 20))
    levels = exported.features(1, sizes=[(5, 4), (3, 2)])
    result = run_torch(path, *levels)["anomaly_map"]
    assert exported.sidecar_of(path)["outputs"]["anomaly_map"]["shape"] == ["batch", *result.shape[1:]]
    torch.testing.assert_close(result, on_features.score_features(levels, map_size=(8, 20)).anomaly_map, **CLOSE)


def test_calibration_images_are_judged_as_at_home(tmp_path):
    """A threshold is the score of one of them, with which that image ties, whatever a runtime rounds."""
    model = exported.on_features(n_classes=1)
    levels = exported.features(24, seed=1)  # what it is calibrated on
    expected = model.score_features(levels)
    path = model.export(tmp_path / "model.onnx", size=SIZE)
    assert torch.equal(exported.run_onnx(path, *levels)["is_anomalous"], expected.is_anomalous)
    assert (expected.image_score.double() == expected.threshold).any()


def test_a_model_of_less_precision_is_exported_in_float32(tmp_path):
    model = exported.on_features()
    levels = exported.features(3, seed=2)
    expected = model.score_features(levels)
    model.precision = "bf16"
    path = model.export(tmp_path / "model.pt2", size=SIZE)
    assert model.precision == "bf16"
    torch.testing.assert_close(run_torch(path, *levels)["score"], expected.image_score, **CLOSE)


def test_half_precision_leaves_the_judge_as_it_is(tmp_path):
    """Thresholds and p-values are those of the calibration, in numbers enough to be worth halving."""
    model = exported.on_features(n_intra_centers=100)
    scores = torch.linspace(5, 20, 1500)
    model.calibration = replace(model.calibration, scores=scores, class_ids=torch.arange(1500) % 3)
    path = model.export(tmp_path / "model.pt2", size=SIZE, precision="fp16", check=False)
    outputs = run_torch(path, *exported.features(24, seed=1))
    judged = Judge(model.calibration)(outputs["score"], outputs["class_id"])
    for name, expected in judged.items():
        assert torch.equal(outputs[name], expected), name
    exact = graph_of(model).state_dict()
    stored = torch.export.load(path).state_dict
    assert sum(x.nbytes for x in stored.values()) < sum(x.nbytes for x in exact.values())
    assert len(outputs["p_value"].unique()) > 12


def test_features_of_a_backbone(tmp_path):
    model = exported.on_images()
    path = model.export(tmp_path / "features.pt2", inputs="features")
    with torch.no_grad():
        levels = model.encoder(model.encoder.normalize(exported.images(2)), fast=True)
    torch.testing.assert_close(run_torch(path, *levels)["score"], model.score_features(levels).image_score, **CLOSE)
    assert "resize" not in exported.sidecar_of(path)


def test_images_that_are_not_square(tmp_path):
    model = exported.on_images()
    path = model.export(tmp_path / "wide.pt2", size=(64, 80))
    images = exported.images(2, size=(64, 80))
    torch.testing.assert_close(run_torch(path, images)["score"], model.score(images).image_score, **CLOSE)
    assert exported.sidecar_of(path)["resize"]["width"] == 80


# ------------------------------------------------------------------------------------------------ the process


@pytest.fixture
def unusual_process() -> Iterator[None]:
    """Have another default dtype, number of threads and list of filters than Python and torch begin with."""
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.filterwarnings("default", "a filter of the user's", ResourceWarning)
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(threads + 1)
        yield
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)


def state_of(model: HGADModel) -> list[object]:
    """Return what a model is apart from its numbers: precision, modes, and what is to be trained."""
    modes = [module.training for module in model.modules()]
    return [model.precision, modes, [parameter.requires_grad for parameter in model.parameters()]]


def test_an_export_changes_nothing_else(tmp_path, request):
    model = exported.on_features().train()
    request.getfixturevalue("unusual_process")
    numbers = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state, process, filters = state_of(model), process_state(), list(warnings.filters)
    drawn = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    model.export(tmp_path / "model.onnx", size=SIZE)
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert (random.getstate(), repr(np.random.get_state())) == drawn[1:]
    assert not changes(process, process_state()) and list(warnings.filters) == filters
    assert state_of(model) == state and model.state_dict().keys() == numbers.keys()
    assert all(torch.equal(tensor, numbers[name]) for name, tensor in model.state_dict().items())


def test_two_exports_at_once(on_features, tmp_path):
    levels, given = exported.features(4, seed=2), torch.tensor([1, 2, 0, 1])
    jobs = {"given.pt2": {"class_input": True}, "fixed.onnx": {"class_id": "class 2"}}
    with ThreadPoolExecutor(len(jobs)) as pool:
        results = [
            pool.submit(on_features.export, tmp_path / name, size=SIZE, check=False, **options)
            for name, options in jobs.items()
        ]
    of_given, of_fixed = (result.result() for result in results)
    assert exported.sidecar_of(of_given)["group"] is None and exported.sidecar_of(of_fixed)["group"] == "class 2"
    for outputs, ids in (
        (run_torch(of_given, *levels, given), given),
        (exported.run_onnx(of_fixed, *levels), torch.full((4,), 2)),
    ):
        expected = on_features.score_features(levels, ids)
        assert torch.equal(outputs["class_id"], ids)
        torch.testing.assert_close(outputs["score"], expected.image_score, **CLOSE)
        torch.testing.assert_close(outputs["anomaly_map"], expected.anomaly_map, **CLOSE)


# ------------------------------------------------------------------------------------------------ the check


@pytest.mark.parametrize(
    ("name", "change", "figure"),
    [
        ("score", lambda x: x * (1 + 1e-4), r"score by 0\.00"),
        ("score", lambda x: x + torch.nan, r"score by nan"),
        ("anomaly_map", lambda x: x + 1e-2 * x.amax(), r"anomaly_map by 0\.0"),
        ("class_id", lambda x: (x + 1) % 3, r"class_id by [1-7]"),
        ("p_value", lambda x: x * 0, r"p_value by [1-7]"),
        ("threshold", lambda x: x + 9, r"threshold by "),
        ("is_anomalous", lambda x: ~x, r"is_anomalous by [1-7]"),
    ],
    ids=["score", "nan", "map", "class", "p-value", "threshold", "verdict"],
)
def test_the_check_names_what_differs(on_features, name, change, figure):
    graph = graph_of(on_features)

    @torch.no_grad()
    def run(inputs):
        outputs = dict(zip(OUTPUTS, graph(*inputs), strict=True))
        return list((outputs | {name: change(outputs[name])}).values())

    inputs = check.drawn_features(on_features, graph.plan)
    with pytest.raises(ValueError, match=figure):
        check.compared(on_features, graph.plan, graph.groups, run, inputs, "fp32")


def test_a_file_that_differs_is_not_kept(on_features, tmp_path, monkeypatch):
    def wrong(kind, path):
        run = formats.runner(kind, path)
        return lambda inputs: [x + 1 if x.is_floating_point() else x for x in run(inputs)]

    path = tmp_path / "model.pt2"
    path.write_bytes(b"the file before")
    monkeypatch.setattr(write, "runner", wrong)
    with pytest.raises(ValueError, match="differs from what the model gives"):
        on_features.export(path, size=SIZE)
    assert path.read_bytes() == b"the file before" and list(tmp_path.iterdir()) == [path]


def test_nothing_is_left_half_written(on_features, tmp_path, monkeypatch):
    path = on_features.export(tmp_path / "model.pt2", size=SIZE)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(OSError, match="No space left"):
        on_features.export(path, size=SIZE)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_large_weights_lie_beside_the_file(on_features, tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    levels = exported.features(2)
    expected = on_features.score_features(levels).image_score
    monkeypatch.setattr(formats, "LARGEST_FILE", 1000)
    on_features.export(path, size=SIZE, outputs=("score",))
    (weights,) = tmp_path.glob("model.onnx.*.data")
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.json", weights.name}
    assert path.stat().st_size < weights.stat().st_size + 100_000
    torch.testing.assert_close(exported.run_onnx(path, *levels)["score"], expected, **CLOSE)
    monkeypatch.undo()
    on_features.export(path, size=SIZE, outputs=("score",), check=False)
    assert not weights.exists()
    torch.testing.assert_close(exported.run_onnx(path, *levels)["score"], expected, **CLOSE)


def test_images_to_check_on(tmp_path):
    from PIL import Image

    model = exported.on_images()
    for i, image in enumerate(exported.images(3, size=(90, 90))):
        pixels = (image.permute(1, 2, 0) * 255).byte().numpy()
        Image.fromarray(pixels[: 90 if i else 60]).save(tmp_path / f"{i}.png")
    with pytest.warns(UserWarning, match="1 of 3 images"):
        path = model.export(tmp_path / "model.pt2", check_images=tmp_path)
    assert exported.sidecar_of(path)["check"]["images"] == 2
    assert read_image(tmp_path / "0.png").shape == (3, 60, 90)
    with pytest.raises(ValueError, match=r"no image of check_images .* \(64, 96\)"):
        model.export(tmp_path / "model.pt2", size=(64, 96), check_images=tmp_path / "1.png")


def test_drawn_images_are_images():
    for size in ((1, 1), (7, 300), (64, 64)):
        drawn = check.drawn_images(size)
        assert drawn.shape == (check.IMAGES, 3, *size) and 0 <= drawn.min() and drawn.max() <= 1
    assert torch.equal(drawn, check.drawn_images((64, 64)))


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("model", {}, "says no format"),
        ("model.onnx", {"format": "tflite"}, "format is 'tflite'; allowed are onnx, torch"),
        ("model.onnx", {"format": "torch"}, "change one of them"),
        ("model.pt2", {"size": None}, "features go in whose sizes"),
        ("model.pt2", {"size": [(3, 3)]}, "each of the 2 levels"),
        ("model.pt2", {"size": (6, 5)}, "each of the 2 levels"),
        ("model.pt2", {"size": [(3, 3), (0, 3)]}, "size is"),
        ("model.pt2", {"inputs": "image"}, "no backbone"),
        ("model.pt2", {"inputs": "video"}, "allowed are 'image' and 'features'"),
        ("model.pt2", {"outputs": ()}, "outputs is"),
        ("model.pt2", {"outputs": ("score", "score")}, "each once"),
        ("model.pt2", {"outputs": "heat"}, "allowed are some of anomaly_map"),
        ("model.pt2", {"class_id": "bottle"}, "class 'bottle' is unknown"),
        ("model.pt2", {"class_id": 1, "class_input": True}, "choose one of them"),
        ("model.pt2", {"map_size": 0}, "map_size is 0"),
        ("model.pt2", {"precision": "int8"}, "allowed are fp32, fp16"),
        ("model.pt2", {"check": False, "check_images": "x"}, "leave one of them out"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(on_features, tmp_path, name, options, message):
    with pytest.raises(ValueError, match=message):
        on_features.export(tmp_path / name, **{"size": SIZE} | options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({}, (65, 80), "calibrated for images with a short side of 64"),
        ({}, "64", "size is '64'"),
        ({"center_crop": True}, (64, 80), "sees squares"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(tmp_path, changes, size, message):
    with pytest.raises(ValueError, match=message):
        exported.on_images(**changes).export(tmp_path / "model.pt2", size=size)


def test_a_model_without_calibration_is_refused(on_features, tmp_path):
    model = exported.on_features()
    model.calibration = None
    with pytest.raises(ValueError, match="normalisation constants"):
        model.export(tmp_path / "model.onnx", size=SIZE)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_a_pipe_is_not_replaced(on_features, tmp_path):
    path = tmp_path / "model.onnx"
    os.mkfifo(path)
    with pytest.raises(ValueError, match="is no file, but a pipe"):
        on_features.export(path, size=SIZE)
    assert path.is_fifo()


def test_a_full_disk_is_an_error_that_names_the_file(on_features, tmp_path, monkeypatch):
    path = tmp_path / "model.pt2"

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left") as raised:
        on_features.export(path, size=SIZE)
    assert raised.value.filename == str(path) and not list(tmp_path.iterdir())


def test_a_folder_is_no_file(on_features, tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        on_features.export(tmp_path, size=SIZE)


@pytest.mark.parametrize(("missing", "remedy"), [("onnxscript", "export"), ("onnxruntime", "--no-check")])
def test_missing_packages_are_named(on_features, tmp_path, monkeypatch, missing, remedy):
    find = formats.importlib.util.find_spec
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(ImportError, match=rf"{missing}.*{remedy}"):
        on_features.export(tmp_path / "model.onnx", size=SIZE)


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2"])
def test_place_gaussians_on_images_of_any_number(name, tmp_path):
    """Their densities are transposed on the way; torch 2.11 does not trace that for any number as it lies in memory."""
    path = small_detectors.gaussian().export(tmp_path / name)
    assert exported.sidecar_of(path)["check"]["images"] > 1
