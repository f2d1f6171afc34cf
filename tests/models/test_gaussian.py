"""GaussianModel through the library: fits, groups, maps, scores, files, and other sizes and orders of images."""

import dataclasses
import math

import numpy as np
import pytest
import rounding
import torch
from PIL import Image
from small_gaussian import SIDES, class_features, feature_set, fitted, labels, small_model
from small_vqflow import assert_same_scores, assert_same_state

from hgad_fast import GaussianConfig, GaussianModel, Scorer, load
from hgad_fast.evaluation.evaluate import evaluate
from hgad_fast.evaluation.report import write_report
from hgad_fast.features.backbone import FeatureMaps
from hgad_fast.features.composite import CompositeBackbone, make_backbone
from hgad_fast.features.extract import FeatureSet
from hgad_fast.features.joining import joined
from hgad_fast.models import gaussian
from hgad_fast.modules import place_gaussian
from hgad_fast.scoring.densities import densities
from hgad_fast.scoring.maps import blur, upsample

GROUPINGS = ({"grouping": "class"}, {"grouping": "one"}, {"grouping": "clusters", "n_clusters": 4})


def reordered(features: FeatureSet, seed: int) -> FeatureSet:
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    return FeatureSet([features.images[i] for i in order.tolist()], features.class_ids[order])


# ------------------------------------------------------------------------------------------------ fitting


@pytest.mark.parametrize("grouping", GROUPINGS, ids=lambda grouping: grouping["grouping"])
def test_a_model_does_not_depend_on_the_order_of_its_images(grouping):
    features = feature_set()
    model = small_model(**grouping)
    model.fit(features, calibration=feature_set(30, seed=1))
    scores = model.score_features(class_features(6, seed=2))
    for seed in range(3):
        other = small_model(**grouping)
        other.fit(reordered(features, seed), calibration=feature_set(30, seed=1))
        if grouping["grouping"] == "clusters":  # the clusters are the same, whatever their numbers
            assert torch.equal(other.score_features(class_features(6, seed=2)).anomaly_map, scores.anomaly_map)
            continue
        assert_same_state(model.state_dict(), other.state_dict())
        assert_same_scores(other.score_features(class_features(6, seed=2)), scores)


def test_images_may_be_added_in_any_order_and_in_any_parts():
    more = feature_set(24, seed=5)
    models = []
    for parts in ([more], [reordered(more, 3)], [more.subset(torch.arange(9, 24)), more.subset(torch.arange(9))]):
        model = fitted()
        for part in parts:
            model.add(part)
        models.append(model)
    assert models[0].gaussians[0].images.tolist() == [20, 20, 20]
    for other in models[1:]:
        assert_same_state(models[0].state_dict(), other.state_dict())
        assert_same_scores(
            models[0].score_features(class_features(4, seed=9)), other.score_features(class_features(4, seed=9))
        )


def test_added_images_count_like_those_of_the_fit():
    """With one whitening, the Gaussians of two parts are those of all images together."""
    together, apart = small_model(), small_model()
    features, more = feature_set(), feature_set(24, seed=5)
    apart.fit(features, calibration=feature_set(30, seed=1))
    apart.add(more)
    images = [*(features.images[i] for i in range(36)), *(more.images[i] for i in range(24))]
    together.fit(features, calibration=feature_set(30, seed=1))
    everything = FeatureSet(images, torch.cat([features.class_ids, more.class_ids]))
    for gaussians in together.gaussians:
        for name, buffer in gaussians.named_buffers():
            if name.startswith(("images", "totals", "products")):
                buffer.zero_()
    together.add(everything)
    assert_same_state(together.state_dict(), apart.state_dict())


@pytest.mark.parametrize("grouping", GROUPINGS[:2], ids=lambda grouping: grouping["grouping"])
def test_images_may_be_left_out_for_a_while(grouping):
    """Blocks may lie in each other; the sums are those of the images that stay, and at the end those of before."""
    features = feature_set()
    model = small_model(**grouping)
    model.begin(features)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def distances() -> list[torch.Tensor]:
        group_ids = labels(3).clamp(max=len(model.groups) - 1)
        images = densities(model, class_features(3, seed=2), group_ids)
        return [image.all_distances["likelihood"] for image in images]

    of_all = distances()
    with model.without(features.subset(torch.arange(0, 5))):
        with model.without(features.subset(torch.arange(20, 31))):
            of_few = distances()
            state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert int(model.gaussians[0].images.sum()) == 31
    assert_same_state(before, model.state_dict())
    assert all(map(torch.equal, distances(), of_all))
    for buffer_name, buffer in model.gaussians[0].named_buffers():
        if buffer_name.startswith(("images", "totals", "products")):
            buffer.zero_()
    rest = torch.cat([torch.arange(5, 20), torch.arange(31, 36)])
    with torch.no_grad():
        model._add(features.subset(rest), model._members(features.subset(rest)))
    assert_same_state(state, model.state_dict())
    assert all(map(torch.equal, distances(), of_few)) and not any(map(torch.equal, of_all, of_few))


def test_images_come_back_after_an_error_and_clusters_leave_none_out():
    features = feature_set()
    model = small_model()
    with pytest.raises(ValueError, match="the model is not fitted"), model.without(features):
        pass
    model.begin(features)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(KeyError), model.without(features.subset(torch.arange(7))):
        raise KeyError
    assert_same_state(before, model.state_dict())
    broken = FeatureSet([[level.clone() for level in features.images[i]] for i in range(7)], features.class_ids[:7])
    broken.images[6][0][0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"), model.without(broken):
        pass
    assert_same_state(before, model.state_dict())
    clusters = small_model(**GROUPINGS[2])
    clusters.begin(features)
    with pytest.raises(ValueError, match="none can be left out"), clusters.without(features):
        pass


def test_a_class_needs_two_images_and_features_are_finite():
    features = feature_set(7)
    model = small_model()
    with pytest.raises(ValueError, match="'class 1' has fewer than 2 training images, beside"):
        model.fit(FeatureSet([features.images[i] for i in (0, 1, 2, 3, 5, 6)], torch.tensor([0, 1, 2, 0, 2, 0])))
    features.images[4][1][0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="image 4 has a NaN"):
        small_model().fit(features, calibration=feature_set(30, seed=1))
    with pytest.raises(ValueError, match="call fit on normal images first"):
        small_model().densities(FeatureMaps.of(class_features(1)), None)


@pytest.mark.parametrize("sides", [SIDES, ((8, 16), (4, 8), (2, 4))], ids=["same shape", "another shape"])
@pytest.mark.parametrize("grouping", GROUPINGS, ids=lambda grouping: grouping["grouping"])
def test_a_second_fit_is_that_of_a_fresh_model(grouping, sides):
    """Nothing of the first is left: clusters are formed anew, on the grid of the new images."""
    again, fresh = fitted(**grouping), small_model(**grouping)
    features, held_out = (feature_set(n, seed=seed, sides=sides) for n, seed in ((33, 7), (30, 8)))
    for model in (again, fresh):
        model.fit(features, calibration=held_out, false_alarm_rate=0.2)
    assert again.config == fresh.config
    assert_same_state(again.state_dict(), fresh.state_dict())
    levels = class_features(6, seed=2, sides=sides)
    assert_same_scores(again.score_features(levels), fresh.score_features(levels))


@pytest.mark.parametrize(
    ("n", "grouping"),
    [(1, {"grouping": "one"}), (2, {"grouping": "clusters", "n_clusters": 2})],
    ids=["one image", "an image a cluster"],
)
def test_groups_of_single_images_are_refused(n, grouping):
    model = small_model(**grouping)
    with pytest.raises(ValueError, match=rf"no group has 2 of the {n} training images, .* give more images"):
        model.fit(feature_set(n), calibration=feature_set(30, seed=1))
    assert not len(model.gaussians)
    model.fit(feature_set(12), calibration=feature_set(30, seed=1), false_alarm_rate=0.2)
    assert model.score_features(class_features(6, seed=2)).anomaly_map.isfinite().all()


@pytest.mark.parametrize("grouping", GROUPINGS, ids=lambda grouping: grouping["grouping"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [("NaN", "not finite"), ("another shape", "other proportions")],
    ids=["NaN", "another shape"],
)
def test_an_addition_that_fails_leaves_the_model_as_it_was(monkeypatch, grouping, wrong, message):
    monkeypatch.setattr(gaussian, "PIXELS_TOGETHER", 1)  # image by image: it is the last one that fails
    model, levels = fitted(**grouping), class_features(6, seed=2)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, scores = model.config, model.score_features(levels)
    more = feature_set(24, seed=5)
    if wrong == "NaN":
        more.images[-1][1][0, 2, 3] = math.nan
    else:
        more.images[-1] = feature_set(3, sides=((8, 16), (4, 8), (2, 4))).images[-1]
    with pytest.raises(ValueError, match=message):
        model.add(more)
    assert model.config == config
    assert_same_state(model.state_dict(), state)
    assert_same_scores(model.score_features(levels), scores)
    good, other = more.subset(torch.arange(23)), fitted(**grouping)
    for each in (model, other):  # and it goes on as if nothing had been
        each.add(good)
    assert_same_state(model.state_dict(), other.state_dict())


def test_settings_that_cannot_work_are_named():
    for field, value in (("dim", 0), ("coarse_dim", -1), ("shrinkage", 1.5), ("floor", 0), ("grouping", "pairs")):
        with pytest.raises(ValueError, match=f"GaussianConfig.{field} is "):
            small_model(**{field: value})
    with pytest.raises(ValueError, match="map_stages is 4, and there are 3 stages"):
        small_model(map_stages=4)
    with pytest.raises(ValueError, match="n_clusters is 40, and there are 36 training images"):
        small_model(grouping="clusters", n_clusters=40).fit(feature_set())


# ------------------------------------------------------------------------------------------------ scoring


def naive(model: GaussianModel, levels: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return evidence (classes,) and distances by fine and by all stages (classes, places) of one image, in float64."""
    (whitening,), (gaussians,) = model.whitenings, model.gaussians
    x = joined(levels, [1 / level.shape[-1] for level in levels], 1)[0].flatten(1).T.double()
    y = (x - whitening.mean.double()) @ whitening.matrix.double()
    fine, total, evidence = [], [], []
    for k in range(len(model.groups)):
        row = gaussians.members[0].index(k)
        lower = torch.tril_indices(gaussians.width, gaussians.width)
        n = int(gaussians.images[k])
        sums = gaussians.totals_0[row].double() * place_gaussian.STEP
        squares = torch.zeros(len(sums), gaussians.width, gaussians.width).double()
        squares[:, lower[0], lower[1]] = gaussians.products_0[row].double() * place_gaussian.STEP**2
        squares[:, lower[1], lower[0]] = gaussians.products_0[row].double() * place_gaussian.STEP**2
        own = (squares - torch.einsum("pi,pj->pij", sums, sums) / n) / (n - 1)
        covariance = 0.5 * own + 0.5 * own.mean(0) + 0.02 * torch.eye(gaussians.width).double()
        e = y - sums / n
        d = gaussians.dim
        fine.append((e[:, :d] * torch.linalg.solve(covariance[:, :d, :d], e[:, :d])).sum(1).sqrt())
        total.append((e * torch.linalg.solve(covariance, e)).sum(1).sqrt())
        log_density = -(total[-1] ** 2 + torch.logdet(covariance) + gaussians.width * math.log(2 * math.pi)) / 2
        evidence.append(log_density.mean() / gaussians.width)
    return {"fine": torch.stack(fine), "total": torch.stack(total), "evidence": torch.stack(evidence)}


@pytest.mark.usefixtures("float64")
def test_class_map_and_score_are_those_of_the_definition():
    model = fitted().double()
    calibration = model.calibration
    assert calibration.scored_on == "all" and calibration.weights.shape == calibration.score_weights.shape == (3, 1)
    for i in range(9):
        levels = [level[i : i + 1].double() for level in class_features(9, seed=3, noise=0.8)]
        expected = naive(model, levels)
        (image,) = densities(model, levels, None)
        k = int(expected["evidence"].argmax())
        assert int(image.group_ids) == k
        torch.testing.assert_close(image.logps[0].mean(), expected["evidence"][k], rtol=1e-7, atol=1e-9)
        maps, scores = calibration.maps(image, 16)
        shown, scored = (
            blur(upsample((expected[name][k] - math.sqrt(width)).view(1, 4, 4), (16, 16)))
            for name, width in (("fine", 6), ("total", 9))
        )
        torch.testing.assert_close(maps, calibration.weights[k, 0].double() * shown, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(scores, calibration.score_weights[k].double() * scored.max(), rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("sides", [SIDES, (4, 2, 1)], ids=["16 places", "4 places"])
@pytest.mark.parametrize("first, band", [(1, 1), (1, 9), (2, 3), (32, 64)])  # of 6 values of the map, and 3 others
def test_the_class_found_band_by_band_is_the_class_of_all_values(monkeypatch, sides, first, band):
    """Among classes of different spread, near to each other, for any bands, and with its distances."""
    monkeypatch.setattr(place_gaussian, "FIRST", first)
    monkeypatch.setattr(place_gaussian, "BAND", band)
    model = small_model()
    model.begin(features := feature_set(noise=1.5, sides=sides))
    model.finish(features)
    model.double()
    chosen = set()
    for seed in range(30):
        drawn = class_features(3, seed=seed, noise=0.2 + seed / 10, sides=sides)
        levels = [level[seed % 3 : seed % 3 + 1].double() for level in drawn]
        whitened = list(model._whitened(levels))
        expected, of_all = model._infer(whitened, 1, [0, 1, 2])
        k = int(expected)
        actual, by_group = model._infer_one(whitened, 1, [0, 1, 2])
        assert actual.tolist() == [k]
        for distances, right in zip(by_group[k], of_all[k], strict=True):
            for squares, right_squares in zip(distances, right, strict=True):
                torch.testing.assert_close(
                    squares.flatten(), right_squares.flatten(), rtol=rounding.SAME_IN_FLOAT64, atol=0
                )
        chosen.add(k)
    assert len(chosen) > 1  # the images are not all alike


def test_a_model_that_is_loaded_in_inference_mode_is_like_any_other(tmp_path):
    model = fitted()
    model.save(tmp_path / "model.safetensors")
    with torch.inference_mode():
        loaded = load(tmp_path / "model.safetensors")
        scores = loaded.score_features(class_features(6, seed=4))
    assert not any(tensor.is_inference() for tensor in loaded.state_dict().values())
    assert_same_scores(scores, model.score_features(class_features(6, seed=4)))
    loaded.add(feature_set(seed=9))


def test_a_model_that_is_loaded_computes_the_gaussians_that_it_needs(tmp_path):
    model = fitted()
    model.save(tmp_path / "model.safetensors")
    levels = class_features(6, seed=4)
    expected = model.score_features(levels)
    loaded = load(tmp_path / "model.safetensors")
    (gaussians,) = loaded.gaussians
    assert gaussians.mean_0.isnan().all()
    loaded.densities(FeatureMaps.of([level[:1] for level in levels]), torch.tensor([1]))
    assert gaussians.mean_0.isfinite().all(2).all(1).tolist() == [False, True, False]
    assert_same_scores(loaded.score_features(levels), expected)
    loaded.load_state_dict(model.state_dict())
    loaded.make_ready()
    assert not gaussians.require(range(3))
    assert_same_scores(loaded.score_features(levels), expected)


def test_a_file_with_sums_of_no_features_is_refused(tmp_path):
    model = fitted()
    model.gaussians[0].products_0[1, 2, 0] = 0  # of squares
    model.save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: totals_0 and products_0 are the sums of no"):
        load(tmp_path / "model.safetensors")
    model = fitted()
    model.gaussians[0].products_0[1, 2, 1] = 10**9  # of the first value and the second
    model.gaussians[0].forget()
    with pytest.raises(ValueError, match="the model is damaged"):
        model.make_ready()


def test_images_of_few_places_are_scored_one_by_one():
    sides = (4, 2, 1)
    model = small_model()
    held_out = feature_set(30, seed=1, noise=1.5, sides=sides)
    model.fit(feature_set(noise=1.5, sides=sides), calibration=held_out, false_alarm_rate=0.2)
    assert model.config.grids == (((2, 2),),) * 3
    levels = class_features(30, seed=3, noise=1.5, sides=sides)
    together = model.score_features(levels, throughput=True)
    for i in range(30):
        assert int(model.score_features([level[i : i + 1] for level in levels]).class_id) == int(together.class_id[i])
    assert len(set(together.class_id.tolist())) == 3


def test_an_inferred_class_has_the_bits_of_a_given_one_and_an_image_those_of_no_other():
    model = fitted()
    levels = class_features(6, seed=4)
    inferred = model.score_features(levels)
    assert_same_scores(inferred, model.score_features(levels, inferred.class_id))
    for i in range(6):
        alone = model.score_features([level[i : i + 1] for level in levels])
        assert torch.equal(alone.anomaly_map[0], inferred.anomaly_map[i])
        assert torch.equal(alone.image_score[0], inferred.image_score[i])
    together = model.score_features(levels, throughput=True)
    torch.testing.assert_close(together.image_score, inferred.image_score, rtol=1e-5, atol=1e-5)


def test_defects_score_higher_and_are_found_where_they_are():
    model = fitted()
    normal, defective = class_features(30, seed=6), class_features(30, seed=6)
    defective[1][:, :, 1, 2] += 25
    good, bad = model.score_features(normal), model.score_features(defective)
    assert (bad.image_score > good.image_score).all() and bad.is_anomalous.all()
    assert good.is_anomalous.float().mean() < 0.5  # the rate is 0.2
    peaks = bad.anomaly_map.flatten(1).argmax(1)
    assert ((peaks // 16 - 5).abs() <= 3).all() and ((peaks % 16 - 10).abs() <= 3).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("group", [None, 0])
def test_a_score_that_is_no_number_is_an_alarm(value, group):
    model = fitted()
    levels = class_features(1, seed=7)
    levels[1][0, 2, 1, 1] = value
    image = model.densities(FeatureMaps.of(levels), None if group is None else torch.tensor([group]))
    maps, scores = model.calibration.maps(image, 16)
    p_value, is_anomalous, threshold, _ = model.calibration.judge(scores, image.group_ids)
    assert not scores.isfinite().any() and is_anomalous.all() and threshold.isfinite().all()
    with pytest.raises(ValueError, match="holds a NaN or an infinity"):
        model.score_features(levels)


def test_the_official_protocol_has_the_class_given_and_no_calibration():
    model = fitted()
    model.calibration = None
    result = model.score_features(class_features(6, seed=4), labels(6), normalization="official")
    assert result.anomaly_map.shape == (6, 16, 16) and result.image_score.isfinite().all()
    with pytest.raises(ValueError, match="calibrat"):
        model.score_features(class_features(6, seed=4))


def test_without_coarse_stages_the_score_is_that_of_the_map():
    model = fitted(map_stages=3)
    assert model.scored_on == "map" and model.calibration.score_weights is None
    result = model.score_features(class_features(6, seed=4))
    assert torch.equal(result.image_score, result.anomaly_map.amax((1, 2)))


@pytest.mark.parametrize("grouping", GROUPINGS[1:], ids=lambda grouping: grouping["grouping"])
def test_groups_without_labels(grouping):
    model = fitted(**grouping)
    assert not model.groups_are_classes and len(model.groups) == (1 if grouping["grouping"] == "one" else 4)
    defective = class_features(30, seed=6)
    defective[1][:, :, 1, 2] += 9
    good, bad = (model.score_features(levels) for levels in (class_features(30, seed=6), defective))
    assert (bad.image_score > good.image_score).float().mean() > 0.9
    model.add(feature_set(12, seed=8))
    assert int(model.gaussians[0].images.sum()) == 48


# ------------------------------------------------------------------------------------------------ other sizes


def test_another_size_takes_the_places_at_the_same_relative_position():
    one_stage = {"feature_dims": (6,), "map_stages": 1, "coarse_dim": 0}
    model = small_model(**one_stage)
    features, held_out = (FeatureSet.from_levels(class_features(36, seed=s)[1:2], labels(36)) for s in (0, 1))
    model.fit(features, calibration=held_out)
    level = class_features(4, seed=4)[1]
    larger = level.repeat_interleave(2, 2).repeat_interleave(2, 3)
    own, other = (model.densities(FeatureMaps.of([x]), labels(4)) for x in (level, larger))
    assert other.logps[0].shape == (4, 8, 8)
    repeated = own.distances["likelihood"].repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(other.distances["likelihood"], repeated, rtol=1e-4, atol=1e-4)
    assert model.score_features([larger]).class_id.tolist() == model.score_features([level]).class_id.tolist()


def test_other_proportions_are_refused_with_the_reason():
    model = fitted()
    wide = class_features(3, seed=4, sides=((8, 16), (4, 8), (2, 4)))
    for ids in (None, 0):
        with pytest.raises(ValueError, match=r"feature map of 4 x 8 cells .* by more than 5%.*4 x 4.*center_crop=True"):
            model.score_features(wide, ids)
    with pytest.raises(ValueError, match=r"training images of 'class 0' have .* proportions differ"):
        images = [*feature_set().images, *FeatureSet.from_levels(wide, labels(3)).images]
        small_model().fit(FeatureSet(images, torch.cat([labels(36), labels(3)])), calibration=feature_set(30, seed=1))


def test_classes_may_have_grids_of_their_own():
    square, wide = (
        feature_set(36),
        FeatureSet.from_levels(class_features(36, sides=((8, 16), (4, 8), (2, 4))), labels(36)),
    )
    rows = [(square if k != 1 else wide).images[i] for i, k in enumerate(labels(36).tolist())]
    model = small_model()
    model.fit(FeatureSet(rows, labels(36)), calibration=FeatureSet(rows, labels(36)), false_alarm_rate=0.2)
    assert model.config.grids == (((4, 4),), ((4, 8),), ((4, 4),))
    for i in range(6):
        levels = [level[None] for level in rows[i]]
        assert int(model.score_features(levels).class_id) == i % 3
    assert set(model.score_features([level[None] for level in square.images[1]]).class_id.tolist()) <= {0, 2}


def test_images_of_several_sizes_of_one_shape_are_fitted_together():
    larger = class_features(6, seed=9, sides=(16, 8, 4))
    images = [*feature_set().images, *FeatureSet.from_levels(larger, labels(6)).images]
    model = small_model()
    model.fit(FeatureSet(images, torch.cat([labels(36), labels(6)])), calibration=feature_set(30, seed=1))
    assert model.config.grids[0] == ((4, 4),) and model.gaussians[0].images.tolist() == [14, 14, 14]


# ------------------------------------------------------------------------------------------------ files and images


@pytest.mark.parametrize("grouping", GROUPINGS, ids=lambda grouping: grouping["grouping"])
def test_a_saved_model_scores_to_the_bit_and_goes_on(grouping, tmp_path):
    model = fitted(**grouping)
    model.save(tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    assert type(loaded) is GaussianModel and loaded.config == model.config
    assert_same_state(model.state_dict(), loaded.state_dict())
    levels = class_features(6, seed=4)
    assert_same_scores(model.score_features(levels), loaded.score_features(levels))
    for each in (model, loaded):
        each.add(feature_set(12, seed=8))
    assert_same_state(model.state_dict(), loaded.state_dict())


def made_dataset(folder, height=64, width=64):
    """Write a dataset of two products under a fixed camera, each with its own pattern, and defects; return its root."""
    rng = np.random.default_rng(0)
    for k, name in enumerate(("bolt", "nut")):
        pattern = rng.integers(60, 200, (height // 8, width // 8, 3)).repeat(8, 0).repeat(8, 1)
        counts = {"train/good": 24, "test/good": 6, "test/spot": 6}
        for kind, count in counts.items():
            for i in range(count):
                image = pattern + rng.normal(0, 4, pattern.shape)
                mask = np.zeros((height, width), np.uint8)
                if kind.endswith("spot"):
                    image[20:36, 24:40] = 255 * (1 - k)
                    mask[20:36, 24:40] = 255
                    target = folder / name / "ground_truth/spot" / f"{i:03}_mask.png"
                    target.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(mask).save(target)
                target = folder / name / kind / f"{i:03}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(target)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return made_dataset(tmp_path_factory.mktemp("data"))


def image_config(**changes):
    return GaussianConfig(
        **{
            "n_classes": 2,
            "backbone_arch": "test_efficientnet",
            "backbone_weights": None,
            "out_indices": (1, 2, 3, 4),
            "grid_stride": 8,
            "img_size": 64,
            "msk_size": 64,
            "dim": 16,
            "coarse_dim": 8,
        }
        | changes
    )


def test_it_works_on_images_with_everything_else_of_the_library(root, tmp_path):
    model = GaussianModel(image_config())
    history = model.fit(root, output_dir=tmp_path, false_alarm_rate=0.12, resume=True)
    assert history.records == [] and (tmp_path / "model.safetensors").is_file()
    assert not list(tmp_path.glob("checkpoint*"))
    evaluation = evaluate(model, root)
    assert evaluation.mean("honest").image_auroc > 0.95 and evaluation.mean("honest").pixel_auroc > 0.9
    assert evaluation.inferred_class_accuracy == 1
    assert "Mahalanobis" in evaluation.table()
    write_report(tmp_path, root)
    scorer = Scorer(tmp_path / "model.safetensors", frame_size=(64, 64))
    image = root / "nut/test/spot/000.png"
    with Image.open(image) as opened:
        frame = np.asarray(opened)
    verdict, result = scorer(frame), model.score(image)
    assert verdict.class_name == "nut" and verdict.is_anomalous and verdict.score == float(result.image_score)
    assert model.score(image, img_size=128).anomaly_map.shape == (1, 64, 64)
    with pytest.raises(ValueError, match="other proportions"):
        model.score(torch.rand(3, 64, 100))
    again = GaussianModel(image_config())
    again.fit(root, output_dir=tmp_path, false_alarm_rate=0.12, resume=True)
    assert_same_state(model.state_dict(), again.state_dict())
    model.calibrate(root, false_alarm_rate=0.2)
    assert model.calibration.false_alarm_rate == 0.2


def test_a_scorer_needs_no_frame_size_where_images_are_not_square(tmp_path):
    root = made_dataset(tmp_path, 48, 64)
    model = GaussianModel(image_config(img_size=48))
    model.fit(root, false_alarm_rate=0.12)
    assert model.config.grids == (((6, 8),),) * 2
    image = root / "bolt/test/spot/000.png"
    with Image.open(image) as opened:
        frame = np.asarray(opened)
    expected = model.score(image)
    for options in ({}, {"frame_size": (48, 64)}):
        verdict = Scorer(model, **options)(frame)
        assert verdict.class_name == "bolt" and verdict.is_anomalous and verdict.size == (48, 64)
        assert verdict.score == float(expected.image_score)
    with pytest.raises(ValueError, match="other proportions"):
        Scorer(model, frame_size=(64, 64))


def test_images_of_several_proportions_as_squares(root, tmp_path):
    for number, image in enumerate(sorted((root / "nut/train/good").iterdir())):
        target = tmp_path / "nut/train/good" / image.name
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(image) as opened:
            opened.resize((64, 64 + 32 * (number % 2))).save(target)
    settings = {"n_classes": 1, "calibration_fraction": 0.3}
    with pytest.raises(ValueError, match=r"proportions differ by more than 5%.* or set square=True or center_crop"):
        GaussianModel(image_config(**settings)).fit(tmp_path)
    model = GaussianModel(image_config(**settings, square=True))
    model.fit(tmp_path, false_alarm_rate=0.3)
    model.save(tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    assert again.config == model.config and again.config.square and again.config.grids == (((8, 8),),)
    tall = torch.rand(3, 100, 64)
    result = model.score(tall)
    assert torch.equal(again.score(tall).anomaly_map, result.anomaly_map) and result.anomaly_map.shape[1:] == (100, 64)


def test_two_backbones_have_gaussians_each_and_maps_in_one_unit(root, tmp_path):
    arch = "test_efficientnet+test_resnet"
    config = image_config(backbone_arch=arch, feature_levels=2, out_indices=((2, 3), (2, 3)))
    model = GaussianModel(config)
    model.fit(root, false_alarm_rate=0.12)
    assert len(model.gaussians) == 2 and model.calibration.weights.shape == (2, 2)
    image = root / "bolt/test/spot/000.png"
    result = model.score(image)
    assert result.is_anomalous.all()
    (part,) = [model.densities(FeatureMaps.of(model.encoder(model.encoder.normalize(torch.rand(1, 3, 64, 64)))), None)]
    assert list(part.parts) == ["test_efficientnet", "test_resnet"]
    model.save(tmp_path / "model.safetensors")
    assert torch.equal(load(tmp_path / "model.safetensors").score(image).image_score, result.image_score)


def test_one_backbone_twice_has_two_parts(root, tmp_path):
    arch = "test_efficientnet"
    both = image_config(backbone_arch=f"{arch}+{arch}", feature_levels=2, out_indices=((1, 2), (3, 4)))
    model = GaussianModel(both)
    model.fit(root, false_alarm_rate=0.12)
    assert model.calibration.weights.shape == (2, 2) and (model.calibration.weights > 0).all()
    levels = model.encoder(model.encoder.normalize(torch.rand(2, 3, 64, 64)))
    image = model.densities(FeatureMaps.of(levels), None)
    assert list(image.parts) == [f"{arch} (0)", f"{arch} (1)"]
    for part, logps in zip(image.parts, image.logps, strict=True):
        assert image.parts[part] == [logps] and list(image.alone(part).parts) == [part]
    one, other = image.distances.values()
    assert one.shape != other.shape  # each on its own grid
    result = model.score(root / "bolt/test/spot/000.png")
    assert result.is_anomalous.all()
    model.save(tmp_path / "model.safetensors")
    assert_same_scores(load(tmp_path / "model.safetensors").score(root / "bolt/test/spot/000.png"), result)


def test_distances_are_added_where_no_image_is_held_out(root):
    """Both are negative where an image is normal, and a product of them would be positive."""
    arch = "test_efficientnet+test_resnet"
    settings = {"backbone_arch": arch, "feature_levels": 2, "out_indices": ((2, 3), (2, 3))}
    model = GaussianModel(image_config(calibration_fraction=0.0, **settings))
    model.fit(root)
    assert not len(model.calibration.scores)
    images = [root / "bolt/test/good/000.png", root / "bolt/test/spot/000.png", root / "nut/test/good/000.png"]
    without = [model.score(image) for image in images]
    model.calibrate(root, false_alarm_rate=0.2)  # on the images that it was fitted to
    assert len(model.calibration.scores) == 48
    for image, result in zip(images, without, strict=True):
        calibrated = model.score(image)
        assert torch.equal(result.anomaly_map, calibrated.anomaly_map)
        assert torch.equal(result.image_score, calibrated.image_score)
        assert (result.anomaly_map < 0).any()


def test_cells_of_two_backbones_are_those_of_the_first_on_which_maps_depend():
    """At another size of the images, the map grows with its cells."""
    archs, out_indices = ("test_efficientnet", "test_resnet"), ((3,), (1,))
    grids = []
    for order in (1, -1):
        encoder = make_backbone(
            image_config(backbone_arch="+".join(archs[::order]), feature_levels=2, out_indices=out_indices[::order])
        )
        assert isinstance(encoder, CompositeBackbone)
        for length in (64, 70, 128):
            first, second = encoder(torch.rand(1, 3, length, length))
            assert encoder.cells(length) == encoder.members[0].cells(length) == first.shape[2]
            assert encoder.members[1].cells(length) == second.shape[2] != first.shape[2]
        grids.append(first.shape[2])
    assert grids[0] != grids[1]


def test_callers_settings_change_nothing():
    features, held_out, levels = feature_set(), feature_set(30, seed=1), class_features(4, seed=4)
    expected = fitted().score_features(levels)
    for context in (torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.no_grad()):
        model = small_model()
        with context:
            model.fit(features, calibration=held_out, false_alarm_rate=0.2)
            assert_same_scores(model.score_features(levels), expected)


def test_presets_are_valid_and_resumed_runs_need_not_share_what_has_no_effect():
    for name in GaussianConfig.presets:
        config = GaussianConfig.preset(name, n_classes=2)
        assert GaussianConfig.from_json(config.to_json()) == config
    assert dataclasses.replace(config, lr=1.0).identity() == config.identity()
    assert small_model(dim=7).config.replace(grids=None).identity() != small_model().config.identity()


def test_sides_of_the_stages_say_which_grid_is_taken():
    model = fitted()
    assert model.config.grids == (((SIDES[1],) * 2,),) * 3
