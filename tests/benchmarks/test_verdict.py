"""The benchmark of verdicts: every contender runs, and its profile knows products from the rest."""

from __future__ import annotations

import exported
import pytest
import torch

from benchmarks import verdict
from hgad_fast.export.check import TOLERANCES
from hgad_fast.export.graph import OUTPUTS
from hgad_fast.scoring.scorer import Scorer


@pytest.fixture(name="frame")
def frame_fixture():
    return torch.randint(256, (64, 64, 3)).byte().numpy()


def test_onnxruntime_and_the_scorer_are_timed_on_the_same_frame(frame):
    for package in verdict.ONNX:
        pytest.importorskip(package)
    calls = verdict.contenders(frame, with_onnx=True, **exported.ON_IMAGES)
    own, outputs = calls["verdict"](), calls["onnxruntime"]()
    score = float(outputs[OUTPUTS.index("score")][0])
    assert score == pytest.approx(own.score, abs=TOLERANCES["fp32"][0] * max(abs(own.score), abs(own.threshold)))
    for features, others in zip(calls["backbone"]().whole(), calls["onnxruntime, backbone"](), strict=True):
        torch.testing.assert_close(features, torch.from_numpy(others), rtol=1e-4, atol=1e-4)
    assert verdict.compare({"onnxruntime": calls["onnxruntime"]}, rounds=1)["onnxruntime"]["least"] > 0


def test_a_profile_counts_products_and_convolutions(frame):
    text, share = verdict.profile(Scorer(verdict.calibrated_model(**exported.ON_IMAGES)), frame, rounds=1)
    assert 0 < share < 1 and "conv" in text and "aten::addmm" in text
