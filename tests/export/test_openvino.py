"""OpenVINO, where it is installed: with the hint of the sidecar an exported file gives what the model gives."""

from __future__ import annotations

import exported
import pytest
import torch

from hgad_fast.export.check import TOLERANCES
from hgad_fast.export.graph import OUTPUTS

openvino = pytest.importorskip("openvino")


@pytest.mark.parametrize("fusion", ["standardised", "product"])
def test_it_gives_what_the_model_gives(tmp_path, fusion):
    model = exported.on_images(fusion=fusion)
    path = model.export(tmp_path / "model.onnx")
    hint = exported.sidecar_of(path)["runtimes"]["openvino"]["INFERENCE_PRECISION_HINT"]
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": hint})
    images = exported.images(5)
    expected = model.score(images, map_size=64)
    of_score, of_map = TOLERANCES["fp32"]
    for batch in (images[:1], images):
        results = compiled(batch.numpy())
        outputs = {name: torch.from_numpy(results[name].copy()) for name in OUTPUTS}
        n = len(batch)
        scale = torch.maximum(expected.image_score, expected.threshold)[:n]
        assert ((outputs["score"] - expected.image_score[:n]).abs() <= of_score * scale).all()
        largest = expected.anomaly_map[:n].amax((1, 2), keepdim=True)
        assert ((outputs["anomaly_map"] - expected.anomaly_map[:n]).abs() <= of_map * largest).all()
        assert torch.equal(outputs["class_id"], expected.class_id[:n])
        assert torch.equal(outputs["is_anomalous"].bool(), expected.is_anomalous[:n])
