"""Normal images that a trained model takes: sums or calibration, what the other classes keep, and what is refused."""

import copy

import exported
import pytest
import small_detectors
import torch
from exported import on_features
from small_gaussian import class_features, feature_set, fitted, small_model
from small_vqflow import assert_same_scores, assert_same_state

from hgad_fast.features.extract import FeatureSet
from hgad_fast.scoring.score import score_prepared

pytestmark = pytest.mark.filterwarnings("ignore:too few calibration images", "ignore:.* absorbed images score")


def brighter(n: int, seed: int, shift: float = 1.5) -> FeatureSet:
    """Return n images of class 1 whose features are shifted."""
    levels = class_features(3 * n, seed=seed)
    return FeatureSet.from_levels([x[1::3] + shift for x in levels], torch.ones(n, dtype=torch.int64))


def levels_of(features: FeatureSet) -> list[torch.Tensor]:
    return [torch.stack(level) for level in zip(*features.images, strict=True)]


# ------------------------------------------------------------------------------------------------ place Gaussian


def test_a_place_gaussian_learns_what_add_teaches_it():
    absorbing, adding = fitted(), fitted()
    more = feature_set(24, seed=5)
    for k in range(3):
        absorbed = absorbing.absorb(f"class {k}", more.subset((more.class_ids == k).nonzero().flatten()))
        assert absorbed.learned and absorbed.images == 8
        assert absorbed.threshold_before == absorbed.threshold_after == adding.calibration.threshold(k)
    adding.add(more)
    assert_same_state(absorbing.state_dict(), adding.state_dict())
    assert absorbing.calibration is not None
    levels = class_features(6, seed=9)
    assert_same_scores(absorbing.score_features(levels), adding.score_features(levels))


def test_false_alarms_that_were_absorbed_raise_none_and_others_like_them_fewer():
    model = fitted()
    alarms, others = brighter(12, seed=5), brighter(30, seed=6)
    before = model.score_features(levels_of(others), 1).is_anomalous.sum()
    absorbed = model.absorb("class 1", alarms)
    assert absorbed.alarms_before >= 11 and absorbed.alarms_after == 0
    after = model.score_features(levels_of(others), 1).is_anomalous.sum()
    assert before >= 28 and after <= 10
    assert f"alarms among them: {absorbed.alarms_before} before, 0 now" in absorbed.lines()


@pytest.mark.parametrize("throughput", [False, True], ids=["singly", "in batches"])
def test_the_other_classes_keep_every_bit(throughput):
    model, levels = fitted(), class_features(12, seed=3)
    given = [model.score_features(levels, k, throughput=throughput) for k in range(3)]
    inferred = model.score_features(levels, throughput=throughput)
    model.absorb("class 1", brighter(12, seed=5, shift=0.5))
    for k in (0, 2):
        assert_same_scores(model.score_features(levels, k, throughput=throughput), given[k])
    assert not torch.equal(model.score_features(levels, 1).image_score, given[1].image_score)
    again, others = model.score_features(levels, throughput=throughput), torch.arange(12) % 3 != 1
    assert torch.equal(again.class_id, inferred.class_id)
    for name in ("anomaly_map", "image_score", "p_value", "threshold", "is_anomalous"):
        assert torch.equal(getattr(again, name)[others], getattr(inferred, name)[others]), name


@pytest.mark.parametrize("grouping", [{"grouping": "one"}, {"grouping": "clusters", "n_clusters": 4}], ids=str)
def test_groups_of_several_classes_take_images_where_they_are_likeliest(grouping):
    absorbing, adding = fitted(**grouping), fitted(**grouping)
    more = feature_set(12, seed=5)
    assert absorbing.absorb(None, more).class_name is None
    adding.add(more)
    assert_same_state(absorbing.state_dict(), adding.state_dict())
    absorbing.absorb("class 1", more)
    with pytest.raises(ValueError, match="class 'class 7' is unknown"):
        absorbing.absorb("class 7", more)


def test_images_far_beyond_the_normal_ones_are_named():
    model = fitted()
    images = brighter(3, seed=5, shift=0.0)
    images.images[1][0][:, 2:6, 2:6] += 30.0
    with pytest.warns(UserWarning, match=r"1 of 3 absorbed images score more than 2 times as far .* \(image 1\): look"):
        absorbed = model.absorb("class 1", images)
    assert absorbed.far == ("image 1",)


# ------------------------------------------------------------------------------------------------ the calibration alone


@pytest.mark.parametrize("rate", [0.2, 0.05], ids=["a threshold of its own", "a pooled threshold"])
def test_hgad_moves_the_threshold_of_the_class_alone(rate):
    model = on_features()
    model.calibration.false_alarm_rate = rate
    before, levels = copy.deepcopy(model), exported.features(12, seed=4)
    images = [1.6 * x[1::3] for x in exported.features(18, seed=8)]
    absorbed = model.absorb("class 1", images)
    scores = before.score_features(images, 1)
    assert not absorbed.learned and "calibration alone" in absorbed.lines()[0] and "6 images" in absorbed.lines()[0]
    assert absorbed.alarms_before == int(scores.is_anomalous.sum()) > 3
    assert absorbed.alarms_after == int(model.score_features(images, 1).is_anomalous.sum()) < absorbed.alarms_before
    assert absorbed.threshold_after == model.calibration.threshold(1) > absorbed.threshold_before
    assert_same_state(before.state_dict(), model.state_dict())
    own = model.calibration.scores[model.calibration.class_ids == 1]
    assert torch.equal(own[-6:], scores.image_score) and len(own) == 14
    for k in (0, 2):
        assert_same_scores(model.score_features(levels, k), before.score_features(levels, k))
    maps = [each.score_features(levels, 1).anomaly_map for each in (before, model)]
    assert torch.equal(*maps)


def test_vqflow_moves_thresholds_alone(tmp_path):
    model = small_detectors.vqflow()
    features = small_detectors.feature_set(model, 9, seed=5)
    before = copy.deepcopy(model)
    absorbed = model.absorb(None, features)
    assert not absorbed.learned and absorbed.images == 9
    scored = [score_prepared(before, [level[None] for level in features.images[i]]) for i in range(len(features))]
    scores = torch.cat([result.image_score for result in scored])
    assert torch.equal(model.calibration.scores, torch.cat([before.calibration.scores, scores]))
    assert absorbed.alarms_before == sum(int(result.is_anomalous) for result in scored)
    assert_same_state(before.state_dict(), model.state_dict())
    model.save(tmp_path / "absorbed.safetensors")
    loaded = type(model).load(tmp_path / "absorbed.safetensors")
    assert torch.equal(loaded.calibration.scores, model.calibration.scores)


# ------------------------------------------------------------------------------------------------ refusals


def test_refusals_leave_the_model_as_it_was():
    model = fitted()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gaussians, calibration = model.gaussians, model.calibration
    broken = brighter(3, seed=5)
    broken.images[2][1][0, 2, 3] = float("nan")
    for name, images, message in (
        (
            "class 9",
            brighter(3, seed=5),
            r"'class 9' is unknown; the model knows .* added \(model.add_class, hgad-fast",
        ),
        (None, brighter(3, seed=5), "class None is unknown"),
        ("class 1", feature_set(3, sides=((8, 16), (4, 8), (2, 4))), "other proportions"),
        ("class 1", broken, "image 2"),
        ("class 1", [], "there are no images"),
    ):
        with pytest.raises(ValueError, match=message):
            model.absorb(name, images)
        assert_same_state(model.state_dict(), state)
        assert model.gaussians is gaussians and model.calibration is calibration
    with pytest.raises(ValueError, match=r"class 'nothing' is unknown; the model knows .*\.$"):
        small_detectors.vqflow().absorb("nothing", broken)  # whose groups are no classes that one could add
    with pytest.raises(ValueError, match="the model is not calibrated"):
        small_model().absorb("class 1", broken)


def test_an_interrupt_leaves_the_model_as_it_was(monkeypatch):
    for model, images in ((fitted(), brighter(3, seed=5)), (on_features(), [x[1::3] for x in exported.features(9)])):
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        calibration = model.calibration

        take = type(model).take_images

        def interrupted(detector, features, take=take):
            take(detector, features)
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(type(model), "take_images", interrupted)
            with pytest.raises(KeyboardInterrupt):
                model.absorb("class 1", images)
        assert_same_state(model.state_dict(), state)
        assert model.calibration is calibration
