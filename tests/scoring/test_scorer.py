"""A frame gets from a Scorer what `model.score` gives, in any form, from any thread."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rounding
import torch
from PIL import Image

from hgad_fast import HGADConfig, HGADModel, Scorer
from hgad_fast.scoring import maps
from hgad_fast.scoring.calibration import Calibration
from hgad_fast.scoring.scorer import FrameScore


@pytest.fixture(scope="module")
def model() -> HGADModel:
    config = HGADConfig(
        n_classes=2, class_names=("a", "b"), n_intra_centers=2, backbone_arch="test_efficientnet",
        backbone_weights=None, out_indices=(1,), img_size=40, msk_size=24, feature_levels=1, coupling_layers=2,
        pos_embed_dim=8, fusion="product",
    )  # fmt: skip
    model = HGADModel(config)
    model.calibration = Calibration(torch.full((2, 1), 3.0), torch.linspace(0.1, 0.5, 10), torch.arange(10) % 2, 0.2)
    return model


def assert_scored(result: FrameScore, model: HGADModel, frame: np.ndarray, *class_id: str, **options: Any) -> None:
    """Check score and map of a frame against `HGADModel.score`, within the rounding of both."""

    def scored(model: HGADModel) -> tuple[torch.Tensor, torch.Tensor]:
        expected = model.score(frame, *class_id, **options)
        return expected.image_score[0], expected.anomaly_map[0]

    rounding.assert_close((result.score, result.anomaly_map), scored, model)


def frames(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, 30, 50, 3), dtype=np.uint8))


def test_it_says_what_the_model_says(model: HGADModel, tmp_path: Path) -> None:
    model.save(tmp_path / "model.safetensors")
    scorer = Scorer(tmp_path / "model.safetensors", device="cpu", frame_size=(30, 50))
    (frame,) = frames(1)
    expected = model.score(frame)
    tensor = torch.from_numpy(frame).permute(2, 0, 1) / 255
    for form in (frame, frame.astype(np.uint16) * 257, frame / np.float32(255), tensor, Image.fromarray(frame)):
        actual = scorer(form)
        assert actual.p_value == float(expected.p_value) and actual.is_anomalous == bool(expected.is_anomalous)
        assert actual.class_name == model.class_names[int(expected.class_id)]
        assert_scored(actual, model, frame)
    inside = sum(region.area for region in actual.regions())
    assert inside == int((actual.anomaly_map.double() > actual.threshold).sum())


def test_figures_are_those_of_the_tables(model: HGADModel) -> None:
    (frame,) = frames(1)
    verdict = Scorer(model)(frame)
    assert verdict.figures() == {
        "class": verdict.class_name,
        "score": verdict.score,
        "threshold": verdict.threshold,
        "p_value": verdict.p_value,
        "anomalous": verdict.is_anomalous,
        "false_alarm_rate": verdict.false_alarm_rate,
    }
    without = replace(verdict, threshold=math.nan, p_value=math.nan, is_anomalous=False, false_alarm_rate=math.nan)
    unknown = {"threshold", "p_value", "anomalous", "false_alarm_rate"}
    assert {name for name, value in without.figures().items() if value is None} == unknown


def test_class_and_map_size_are_the_scorers(model: HGADModel) -> None:
    (frame,) = frames(1)
    for name in ("a", "b"):
        actual = Scorer(model, class_id=name, map_size=(6, 10))(frame)
        expected = model.score(frame, name, map_size=(6, 10))
        assert actual.class_name == name and actual.score == float(expected.image_score)
        assert_scored(actual, model, frame, name, map_size=(6, 10))
        given = Scorer(model, class_id="a", map_size=(6, 10))(frame, name)  # of this frame alone
        assert given.class_name == name and given.score == actual.score


def test_a_map_at_the_frames_size_is_made_only_when_it_is_asked_for(
    model: HGADModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer, (frame,) = Scorer(model), frames(1)
    made: list[tuple[int, int]] = []
    write = maps._filled
    monkeypatch.setattr(maps, "_filled", lambda out, *rest: made.append(tuple(out.shape)) or write(out, *rest))
    actual = scorer(frame)
    assert actual.is_anomalous in (False, True) and made == [(24, 41)]  # the grid that scores are computed on
    assert actual.anomaly_map is actual.anomaly_map and actual.anomaly_map.shape == actual.size == (30, 50)
    assert made == [(24, 41), (30, 50)]


@pytest.mark.parametrize("center_crop", [False, True])
@pytest.mark.parametrize("size", [(30, 50), (50, 30), (9, 70), (24, 41)])
def test_frames_of_any_size_have_the_map_of_the_model(
    model: HGADModel, center_crop: bool, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "config", model.config.replace(center_crop=center_crop))
    frame = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    for map_size in (None, (11, 7)):
        scorer = Scorer(model, frame_size=(30, 50), map_size=map_size)
        expected = model.score(frame, map_size=map_size)
        actual = scorer(frame)
        assert actual.score == float(expected.image_score)
        assert_scored(actual, model, frame, map_size=map_size)


def test_a_rate_of_its_own(model: HGADModel) -> None:
    (frame,) = frames(1)
    strict, lax = Scorer(model, false_alarm_rate=0.1), Scorer(model, false_alarm_rate=0.9)
    assert model.calibration is not None and model.calibration.false_alarm_rate == 0.2
    assert lax(frame).threshold < Scorer(model)(frame).threshold <= strict(frame).threshold
    assert lax(frame).score == strict(frame).score == float(model.score(frame).image_score)
    with pytest.raises(ValueError, match="false_alarm_rate is 1.5"):
        Scorer(model, false_alarm_rate=1.5)


@pytest.mark.filterwarnings("ignore:images are seen at")
def test_a_size_and_a_memory_of_its_own(model: HGADModel) -> None:
    (frame,) = frames(1)
    actual, expected = Scorer(model, img_size="native")(frame), model.score(frame, img_size="native")
    assert actual.score == float(expected.image_score)
    assert_scored(actual, model, frame, img_size="native")
    with pytest.raises(ValueError, match="an image of 30 x 50 pixels .* max_memory is 10 MB"):
        Scorer(model, frame_size=(30, 50), max_memory="10MB")
    with pytest.raises(ValueError, match="max_memory is 'lots'"):
        Scorer(model, max_memory="lots")
    with pytest.raises(ValueError, match="map_size is 0"):
        Scorer(model, map_size=0)


def test_threads_take_turns(model: HGADModel) -> None:
    scorer, many = Scorer(model), frames(12)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(scorer, many))
    assert [actual.score for actual in together] == [float(model.score(frame).image_score) for frame in many]


def test_mistakes_are_named_before_the_first_frame(model: HGADModel) -> None:
    with pytest.raises(ValueError, match="class 'c' is unknown"):
        Scorer(model, class_id="c")
    with pytest.raises(ValueError, match="2 frames at once"):
        Scorer(model)(np.zeros((2, 30, 50, 3), np.uint8))


def test_a_rate_that_cannot_be_had_is_told(model: HGADModel) -> None:
    (frame,) = frames(1)
    with pytest.warns(UserWarning, match="too few calibration images for a false-alarm rate of 1.0%"):
        scorer = Scorer(model, false_alarm_rate=0.01)
    result = scorer(frame)
    assert result.false_alarm_rate == scorer.model.calibration.attained_rate(result.class_id) > 0.01


@pytest.mark.parametrize("size", [64, "ab", (64,), (0, 64)])
def test_a_frame_size_that_is_none_is_refused(model: HGADModel, size: Any) -> None:
    with pytest.raises(ValueError, match="frame_size is"):
        Scorer(model, frame_size=size)
