"""What anomalib's users export gives what the model gives, of images of any size, in onnxruntime and in OpenVINO."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import exported
import numpy as np
import pytest
import small_detectors
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("anomalib")
openvino = pytest.importorskip("openvino")

from anomalib.deploy import OpenVINOInferencer  # noqa: E402

from hgad_fast.features.preprocess import preprocess  # noqa: E402
from hgad_fast.plugin import graph as graph_module  # noqa: E402
from hgad_fast.plugin.graph import InferenceGraph, write_onnx  # noqa: E402
from hgad_fast.plugin.scale import multiples, to_unit  # noqa: E402

OUTPUTS = ("pred_score", "pred_label", "anomaly_map", "pred_mask")
F32 = {"INFERENCE_PRECISION_HINT": "f32"}
CLOSE = {"rtol": 0.0, "atol": 1e-4}  # of scores and maps on the scale from 0 to 1, as docs promise for other runtimes
# A model, the size at which it sees images, and sizes of images that it sees so.
CASES: dict[str, Any] = {
    "likelihood": (lambda: small_detectors.hgad(fusion="likelihood"), (64, 64), [(64, 64), (150, 150), (41, 41)]),
    "standardised": (lambda: small_detectors.hgad(fusion="standardised"), (64, 96), [(64, 96), (99, 149), (40, 60)]),
    "crop": (lambda: small_detectors.hgad(center_crop=True), (64, 64), [(64, 64), (97, 150), (70, 51)]),
    "vqflow": (small_detectors.vqflow, (64, 64), [(64, 64), (97, 150), (70, 51)]),
    "gaussian": (lambda: small_detectors.gaussian((64, 96)), (64, 96), [(64, 96), (99, 149), (40, 60)]),
}


class Case(NamedTuple):
    detector: Any
    seen: tuple[int, int]
    sizes: list[tuple[int, int]]
    path: Path
    compiled: Any  # the file in OpenVINO


@pytest.fixture(scope="module", params=list(CASES))
def case(request, tmp_path_factory) -> Case:
    """Return a model, and the file that takes images of any size."""
    make, seen, sizes = CASES[request.param]
    detector = make()
    path = write_onnx(detector, tmp_path_factory.mktemp(request.param) / "model.onnx", seen=seen)
    compiled = openvino.Core().compile_model(openvino.convert_model(path), "CPU", F32)
    return Case(detector, seen, sizes, path, compiled)


@pytest.fixture(scope="module")
def detector() -> Any:
    return small_detectors.hgad()


def run_openvino(compiled: Any, images: Tensor) -> dict[str, Tensor]:
    results = compiled(images.numpy())
    return {name: torch.from_numpy(results[name].copy()) for name in OUTPUTS}


def expected_of(detector: Any, images: Tensor, seen: tuple[int, int]) -> dict[str, Tensor]:
    """Return what the model gives of images, on the scale of anomalib."""
    result = detector.score(images)
    resized = torch.stack([preprocess(image, detector.config) for image in images])
    maps = detector.score(resized, map_size=seen).anomaly_map[:, None]
    thresholds, from_zero = result.threshold[:, None, None, None], detector.scores_from_zero
    return {
        "pred_score": to_unit(multiples(result.image_score, result.threshold, result.is_anomalous, from_zero)),
        "pred_label": result.is_anomalous,
        "anomaly_map": to_unit(multiples(maps, thresholds, maps > thresholds, from_zero)),
        "pred_mask": maps > thresholds,
    }


def assert_same(outputs: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check outputs against others: verdicts are the same where scores are not as close to 0.5 as they are compared."""
    assert tuple(outputs) == OUTPUTS
    for value, verdict in (OUTPUTS[:2], OUTPUTS[2:]):
        assert outputs[value].dtype == torch.float32 and outputs[verdict].dtype == torch.bool
        torch.testing.assert_close(outputs[value], expected[value], **CLOSE)
        apart = (expected[value] - 0.5).abs() > CLOSE["atol"]
        assert torch.equal(outputs[verdict][apart], expected[verdict][apart])


def images_to_score(size: tuple[int, int], seed: int = 7) -> Tensor:
    """Return three images, the second with a defect."""
    images = small_detectors.images_of_classes(3, seed, size)
    images[1, :, size[0] // 4 : size[0] // 2, size[1] // 4 : size[1] // 2] = torch.tensor([1.0, 0.0, 0.0])[
        :, None, None
    ]
    return images


def test_a_file_gives_what_the_model_gives(case):
    verdicts = []
    for i, size in enumerate(case.sizes):
        images = images_to_score(size, seed=7 + i)
        expected = expected_of(case.detector, images, case.seen)
        for count in (1, 3):
            some = {name: x[:count] for name, x in expected.items()}
            assert_same(exported.run_onnx(case.path, images[:count]), some)
            assert_same(run_openvino(case.compiled, images[:count]), some)
        assert expected["anomaly_map"].shape == (3, 1, *case.seen)
        verdicts += (expected["pred_label"] & ((expected["pred_score"] - 0.5).abs() > 1e-4)).tolist()
    assert True in verdicts and False in verdicts
    assert not exported.FORBIDDEN & set(exported.operators(case.path))


def test_what_the_model_does_not_see_is_never_normal(case):
    h, w = case.sizes[1]
    images = small_detectors.images_of_classes(3, size=(h, w))
    images[1] *= 255
    images[2, 0, 5, 5] = torch.nan
    for outputs in (exported.run_onnx(case.path, images), run_openvino(case.compiled, images)):
        assert outputs["pred_score"][1:].tolist() == [1, 1] and outputs["pred_label"][1:].all()
        assert outputs["pred_score"][0] < 1
    config = case.detector.config
    images = small_detectors.images_of_classes(2, size=(64, 128))
    for outputs in (exported.run_onnx(case.path, images), run_openvino(case.compiled, images)):
        if config.center_crop or config.square:
            assert (outputs["pred_score"] < 1).all()
        else:
            assert outputs["pred_score"].tolist() == [1, 1] and outputs["pred_label"].all()


@pytest.mark.parametrize("case", ["standardised", "gaussian"], indirect=True)
def test_the_inferencer_of_anomalib_reads_image_files(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it makes a folder where it is
    h, w = case.sizes[1]
    pixels = np.random.default_rng(3).integers(0, 256, (h, w, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("image.png")
    openvino.save_model(openvino.convert_model(case.path), "model.xml", compress_to_fp16=False)
    expected = expected_of(case.detector, torch.from_numpy(pixels).movedim(2, 0)[None] / 255, case.seen)
    prediction = OpenVINOInferencer("model.xml", "CPU", F32).predict("image.png")
    assert_same(
        {name: torch.from_numpy(getattr(prediction, name)).view_as(expected[name]) for name in OUTPUTS}, expected
    )


def test_a_file_of_one_size(detector, tmp_path):
    """It has the matrices of that size, or none where images are seen as they are."""
    options: dict[str, Any] = {"thresholded": False, "normalised": False, "input_name": "frame"}
    products = []
    for input_size in ((64, 64), (81, 81)):
        path = tmp_path / str(input_size) / "model.onnx"
        assert write_onnx(detector, path, seen=(64, 64), input_size=input_size, **options) == path
        assert [each.name for each in path.parent.iterdir()] == ["model.onnx"]
        images = small_detectors.images_of_classes(3, size=input_size)
        outputs, result = exported.run_onnx(path, images), detector.score(images)
        assert list(outputs) == ["pred_score", "anomaly_map"]
        expected = result.image_score / result.threshold
        torch.testing.assert_close(outputs["pred_score"].double(), expected, rtol=1e-4, atol=0)
        metadata = metadata_of(path)
        assert metadata["inputs"]["frame"]["shape"] == ["batch", 3, *input_size]
        assert "limits" not in metadata and metadata["scale"] == "multiples x = s / t of the threshold t of the group"
        products.append(exported.operators(path)["MatMul"])
    assert products[1] == products[0] + 2


def metadata_of(path: Path) -> dict[str, Any]:
    import onnx

    (entry,) = onnx.load(str(path)).metadata_props
    assert entry.key == "hgad_fast"
    return json.loads(entry.value)


def test_a_file_says_what_it_is(case):
    metadata, calibration = metadata_of(case.path), case.detector.calibration
    h, w = case.seen
    assert metadata["format"] == "hgad_fast anomalib graph 1" and metadata["versions"]["anomalib"]
    assert metadata["inputs"] == {
        "input": {"shape": ["batch", 3, "height", "width"], "dtype": "float32", "channels": "RGB", "range": [0, 1]}
    }
    assert metadata["outputs"]["pred_mask"] == metadata["outputs"]["pred_mask"] | {
        "shape": ["batch", 1, h, w],
        "dtype": "bool",
    }
    assert tuple(metadata["outputs"]) == OUTPUTS and metadata["limits"] == {"pred_label": 0.5, "pred_mask": 0.5}
    assert [each["name"] for each in metadata["groups"]] == list(case.detector.groups)
    assert metadata["groups"][0]["threshold"] == calibration.threshold(0)
    assert metadata["target_false_alarm_rate"] == 0.25
    assert 0 <= metadata["check"]["pred_score"] <= metadata["check"]["tolerance"]["pred_score"]
    assert str(Path(graph_module.__file__).parents[2]).encode() not in case.path.read_bytes()


# ------------------------------------------------------------------------------------------------ the graph in torch


@torch.no_grad()
def outputs_of(graph: InferenceGraph, images: Tensor) -> dict[str, Tensor]:
    return dict(zip(graph.outputs, graph.eval()(images), strict=True))


@pytest.mark.parametrize("normalised", [True, False])
def test_sensitivities_move_the_limits(detector, normalised):
    images = small_detectors.images_of_classes(6)
    units = expected_of(detector, images, (64, 64))
    image_limit, pixel_limit = (float(units[name].median()) + 1e-4 for name in ("pred_score", "anomaly_map"))
    sensitivities = {"image_sensitivity": 1 - image_limit, "pixel_sensitivity": 1 - pixel_limit}
    outputs = outputs_of(InferenceGraph(detector, seen=(64, 64), normalised=normalised, **sensitivities), images)
    apart = (units["anomaly_map"] - pixel_limit).abs() > 1e-4
    assert torch.equal(outputs["pred_label"], units["pred_score"] > image_limit)
    assert torch.equal(outputs["pred_mask"][apart], (units["anomaly_map"] > pixel_limit)[apart])
    if not normalised:
        outputs |= {name: to_unit(outputs[name]) for name in ("pred_score", "anomaly_map")}
    for name in ("pred_score", "anomaly_map"):
        torch.testing.assert_close(outputs[name], units[name], **CLOSE)


def test_a_file_that_differs_is_refused(detector):
    graph = InferenceGraph(detector, seen=(64, 64)).eval()
    graph.compared = True

    def run(inputs: Any, changed: str = "", by: float = 0.0) -> list[Tensor]:
        outputs = outputs_of(graph, inputs[0])
        if changed:
            outputs[changed] = outputs[changed] * (1 + by)
        if math.isnan(by):  # on the scale from 0 to 1 it is 1
            outputs["pred_score"], outputs["anomaly_map"] = (to_unit(outputs[name]) for name in graph_module.CHECKED)
            outputs["pred_label"], outputs["pred_mask"] = outputs["pred_score"] > 0.5, outputs["anomaly_map"] > 0.5
        return list(outputs.values())

    figures = graph_module._compared(detector, graph, run)
    assert figures["pred_score"] <= 1e-5 and figures["anomaly_map"] <= 1e-5
    for output, name in zip(graph_module.CHECKED, ("pred_score", "anomaly_map"), strict=True):
        with pytest.raises(ValueError, match=f"differs from what the model gives: {name} by nan"):
            graph_module._compared(detector, graph, lambda inputs, o=output: run(inputs, o, math.nan))
        for wrong in (output, name):
            with pytest.raises(ValueError, match=r"not on its scale.* report this, .* check=False"):
                graph_module._compared(detector, graph, lambda inputs, o=wrong: run(inputs, o, 1e-2))
    other = small_detectors.hgad(fusion="entropy")
    with pytest.raises(ValueError, match=r"differs from what the model gives: pred_score by .*\(allowed: 5e-05\)"):
        graph_module._compared(other, graph, run)


def test_what_does_not_fit_is_refused_with_the_remedy(detector):
    with pytest.raises(ValueError, match="image_sensitivity is 1.5; allowed: above 0 and below 1"):
        InferenceGraph(detector, seen=(64, 64), image_sensitivity=1.5)
    with pytest.raises(ValueError, match="pixel_sensitivity is 0; allowed: above 0 and below 1"):
        InferenceGraph(detector, seen=(64, 64), pixel_sensitivity=0)
    with pytest.raises(ValueError, match=r"seen is 32 x 48, .* of that size at 64 x 96: give seen=\(64, 96\)"):
        InferenceGraph(detector, seen=(32, 48))
    with pytest.raises(ValueError, match="input_size is 64 x 90: .* at 64 x 90, and .* at 64 x 64"):
        InferenceGraph(detector, seen=(64, 64), input_size=(64, 90))
    with pytest.raises(ValueError, match="no normalisation constants"):
        uncalibrated = small_detectors.hgad()
        uncalibrated.calibration = None
        InferenceGraph(uncalibrated, seen=(64, 64))


def test_groups_without_thresholds_are_refused():
    silent = small_detectors.hgad()
    silent.calibration.scores, silent.calibration.class_ids = silent.calibration.scores[:0], torch.zeros(0).long()
    with pytest.raises(ValueError, match="no threshold, .* calibrate the model on normal images of all classes"):
        InferenceGraph(silent, seen=(64, 64))


def test_places_of_other_proportions_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="other proportions"):
        InferenceGraph(small_detectors.gaussian(), seen=(64, 96))
