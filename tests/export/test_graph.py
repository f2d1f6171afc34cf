"""The graph of scoring gives what scoring gives, for every switch of the configuration that it depends on."""

from __future__ import annotations

import exported
import pytest
import torch
from exported import CLOSE, EPS

from hgad_fast import HGADModel
from hgad_fast.export.graph import OUTPUTS, ROUNDING, Judge, Plan, ScoringGraph
from hgad_fast.scoring.calibration import Calibration


def graph_of(model: HGADModel, sizes=exported.SIZES, **options) -> ScoringGraph:
    plan = Plan(tuple(sizes), None, model.config.img_size, **options)
    return ScoringGraph(model, plan, None).eval()


def outputs_of(graph: ScoringGraph, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return dict(zip(graph.plan.outputs, graph(*inputs), strict=True))


def assert_is_the_score(model, outputs, expected) -> None:
    assert torch.equal(outputs["class_id"], expected.class_id)
    known = model.calibration.scores
    apart = (expected.image_score[:, None] - known).abs().amin(1) > 2 * ROUNDING * known.abs().max()  # from all of them
    torch.testing.assert_close(outputs["anomaly_map"], expected.anomaly_map, **CLOSE)
    torch.testing.assert_close(outputs["score"], expected.image_score, **CLOSE)
    torch.testing.assert_close(outputs["threshold"].double(), expected.threshold, rtol=EPS, atol=0, equal_nan=True)
    torch.testing.assert_close(outputs["p_value"].double()[apart], expected.p_value[apart], rtol=EPS, atol=0)
    assert torch.equal(outputs["is_anomalous"][apart], expected.is_anomalous[apart])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fusion": "product"},
        {"fusion": "likelihood"},
        {"fusion": "entropy"},
        {"map_levels": 1},
        {"feature_scaling": "std"},
        {"feature_scaling": "whiten"},
        {"flow_arch": "flow_model"},
        {"n_classes": 1},
        {"n_intra_centers": 1},
        {"clamp_alpha": 0.5, "coupling_layers": 3},
        {"msk_size": 5},
    ],
    ids=str,
)
def test_it_is_the_score(changes):
    model = exported.on_features(**changes)
    levels = exported.features(5, seed=2)
    outputs = outputs_of(graph_of(model), *levels)
    assert_is_the_score(model, outputs, model.score_features(levels))
    assert outputs["anomaly_map"].dtype == outputs["p_value"].dtype == torch.float32
    assert outputs["class_id"].dtype == torch.int64 and outputs["is_anomalous"].dtype == torch.bool


@pytest.mark.parametrize("fusion", ["standardised", "product"])
def test_classes_are_fixed_or_given(fusion):
    model = exported.on_features(fusion=fusion)
    levels = exported.features(4, seed=2)
    for k in range(3):
        assert_is_the_score(model, outputs_of(graph_of(model, group=k), *levels), model.score_features(levels, k))
    given = torch.tensor([2, -1, 0, 1])
    ids = torch.where(given < 0, model.score_features(levels).class_id, given)
    graph = graph_of(model, class_input=True)
    assert graph.plan.inputs == ("features_0", "features_1", "given_class")
    assert_is_the_score(model, outputs_of(graph, *levels, given), model.score_features(levels, ids))


def test_a_fixed_class_leaves_the_others_out():
    model = exported.on_features(n_intra_centers=50)
    numbers = {group: sum(b.numel() for b in graph_of(model, group=group).buffers()) for group in (None, 1)}
    centres = sum(2 * 50 * channels for channels in exported.DIMS)  # of two classes
    assert numbers[None] - numbers[1] >= centres


@pytest.mark.parametrize("sizes", [exported.SIZES, ((5, 4), (3, 2))], ids=str)
@pytest.mark.parametrize("map_size", [None, (9, 9), (11, 23)], ids=str)
def test_outputs_and_maps_are_as_asked_for(sizes, map_size):
    model = exported.on_features()
    levels = exported.features(2, seed=2, sizes=sizes)
    graph = graph_of(model, sizes, outputs=("score", "anomaly_map"), map_size=map_size)
    outputs = outputs_of(graph, *levels)
    expected = model.score_features(levels, map_size=map_size)
    assert list(outputs) == ["score", "anomaly_map"]
    assert tuple(outputs["anomaly_map"].shape[1:]) == (map_size or graph.grid)
    torch.testing.assert_close(outputs["anomaly_map"], expected.anomaly_map, **CLOSE)
    torch.testing.assert_close(outputs["score"], expected.image_score, **CLOSE)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_never_normal(value):
    model = exported.on_features()
    levels = exported.features(3, seed=2)
    levels[1][1, 0, 0, 0] = value
    outputs = outputs_of(graph_of(model), *levels)
    assert outputs["score"].isfinite().tolist() == [True, False, True]
    assert outputs["score"][1] == torch.inf and outputs["is_anomalous"][1]
    assert outputs["p_value"][1] <= model.calibration.attained_rate(int(outputs["class_id"][1]))


def test_images_that_are_none_are_never_normal():
    model = exported.on_images()
    from hgad_fast.features.graph import image_graph

    encoder = image_graph(model.encoder, (64, 64)).eval()
    with torch.no_grad():
        sizes = tuple(tuple(x.shape[2:]) for x in encoder(torch.zeros(1, 3, 64, 64)))
    graph = ScoringGraph(model, Plan(sizes, (64, 64), 64), encoder)
    images = exported.images(3)
    images[1] *= 255
    images[2, 0, 5, 5] = torch.nan
    outputs = outputs_of(graph, images)
    assert outputs["score"].isinf().tolist() == [False, True, True]
    assert outputs["is_anomalous"].tolist()[1:] == [True, True]


def calibrations():
    scores = torch.tensor([0.5, 1.0, 1.0, 2.0, 3.0, 0.1, 0.2, 7.0, -1.0, -2.0, -3.0])
    ids = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 4, 4, 4])
    level_max = torch.zeros(5, 1)  # of group 3 nothing is known
    for rate in (0.01, 0.2, 0.5):
        for borrowing in (False, True):
            yield Calibration(level_max, scores, ids, rate, borrowing=borrowing)


@pytest.mark.parametrize("calibration", list(calibrations()), ids=lambda c: f"{c.false_alarm_rate}-{c.borrowing}")
def test_verdicts_are_those_of_the_calibration(calibration):
    """Scores that tie with those of calibration images, in whatever last bits, are judged as ties."""
    scores = torch.cat([calibration.scores, torch.tensor([-9.0, 1.5, 99.0])]).repeat_interleave(5)
    ids = torch.arange(5).repeat(len(scores) // 5)
    p_value, verdict, threshold, _ = calibration.judge(scores, ids)
    for moved in (scores, scores - 1e-6 * scores.abs(), scores + 1e-6 * scores.abs()):
        judged = Judge(calibration)(moved, ids)
        torch.testing.assert_close(judged["p_value"].double(), p_value, rtol=EPS, atol=0, equal_nan=True)
        torch.testing.assert_close(judged["threshold"].double(), threshold, rtol=EPS, atol=0, equal_nan=True)
        assert torch.equal(judged["is_anomalous"], verdict)


def test_the_names_of_the_outputs():
    assert OUTPUTS == ("anomaly_map", "score", "class_id", "p_value", "threshold", "is_anomalous")
