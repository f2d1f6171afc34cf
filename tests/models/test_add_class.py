"""A class added to a trained model: what the others keep to the bit, what the new one gets, and what is refused."""

import copy
import math
import warnings
from pathlib import Path

import exported
import numpy as np
import pytest
import small_detectors
import small_vqflow
import torch
from exported import on_features
from PIL import Image
from small_gaussian import class_features, feature_set, small_model
from small_vqflow import assert_same_state

from hgad_fast import GaussianModel, HGADModel, load
from hgad_fast.features.extract import FeatureSet
from hgad_fast.scoring.result import ScoreResult

pytestmark = pytest.mark.filterwarnings(
    "ignore:too few calibration images", "ignore:the class of ", "ignore:.* has no threshold", "ignore:the flows were"
)

FIELDS = ("anomaly_map", "image_score", "class_id", "p_value", "threshold", "false_alarm_rate", "is_anomalous")


def of_classes(features: FeatureSet, *classes: int) -> FeatureSet:
    return features.subset(torch.isin(features.class_ids, torch.tensor(classes)).nonzero().flatten())


def gaussian_of(classes: int, rate: float = 0.2, calibrated_on: int = 60, **changes) -> GaussianModel:
    """Return a place Gaussian of the first classes of three."""
    model, known = small_model(n_classes=classes, **changes), range(classes)
    held_out = of_classes(feature_set(calibrated_on, seed=1), *known)
    model.fit(of_classes(feature_set(48), *known), calibration=held_out, false_alarm_rate=rate)
    return model


def grown_gaussian(classes: int = 2, **options) -> tuple[GaussianModel, GaussianModel]:
    """Return a model of some classes, and a copy of it that has taken the next."""
    before = gaussian_of(classes, **options)
    after = copy.deepcopy(before)
    held_out = of_classes(feature_set(60, seed=1), classes)
    after.add_class("new", of_classes(feature_set(48), classes), calibration=held_out)
    return before, after


def part(result: ScoreResult, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: getattr(result, name)[rows].nan_to_num(-7.0) for name in FIELDS}


def assert_same_rows(first: ScoreResult, second: ScoreResult, rows: torch.Tensor) -> None:
    assert rows.any()
    for (name, one), other in zip(part(first, rows).items(), part(second, rows).values(), strict=True):
        assert torch.equal(one, other), name


def state_of(model) -> tuple:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, model.config, model.calibration


def assert_unchanged(model, state: tuple) -> None:
    assert_same_state(model.state_dict(), state[0])
    assert model.config == state[1] and model.calibration is state[2]


# ------------------------------------------------------------------------------------------------ place Gaussian


@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("rate", [0.2, 0.03], ids=["thresholds of their own", "pooled thresholds"])
@pytest.mark.parametrize("throughput", [False, True], ids=["singly", "in batches"])
def test_the_other_classes_keep_every_bit(classes, rate, throughput):
    """With the class given, and inferred wherever the class inferred is the same; pooled thresholds stay, too."""
    before, after = grown_gaussian(classes, rate=rate)
    levels = class_features(12, seed=3)
    for k in range(classes):
        one, other = (model.score_features(levels, k, throughput=throughput) for model in (before, after))
        assert_same_rows(one, other, torch.ones(12, dtype=torch.bool))
        for logps, same in zip(one.logps, other.logps, strict=True):
            assert torch.equal(logps, same)
    one, other = (model.score_features(levels, throughput=throughput) for model in (before, after))
    own = torch.arange(12) % 3 < classes
    assert torch.equal(other.class_id, (torch.arange(12) % 3).clamp(max=classes))
    assert_same_rows(one, other, own)


def test_the_new_class_is_that_of_sums_on_the_same_whitening():
    """Its sums are those of its images; the whitening is that of the others, and its threshold that of its images."""
    before, after = grown_gaussian()
    images = of_classes(feature_set(48), 2)
    assert after.gaussians[0].images.tolist() == [16, 16, 16]
    total = sum((y.double() / 2**-8).round().long() for i in range(16) for y, _ in after._whitened_image(images, i))
    assert torch.equal(after.gaussians[0].totals_0[2], total)
    for name, tensor in before.state_dict().items():
        if name.startswith("whitenings"):
            assert torch.equal(tensor, after.state_dict()[name])
    again = gaussian_of(2)
    again.add_class("new", images, calibration=of_classes(feature_set(60, seed=1), 2))
    assert_same_state(again.state_dict(), after.state_dict())
    held_out = after.score_features([x[2::3] for x in class_features(60, seed=1)], 2)
    assert torch.equal(after.calibration.scores[after.calibration.class_ids == 2], held_out.image_score)
    assert float(held_out.is_anomalous.float().mean()) <= 0.2


def test_the_report_says_what_was_done():
    model = gaussian_of(2)
    added = model.add_class("new", of_classes(feature_set(96), 2), calibration=of_classes(feature_set(60, seed=1), 2))
    assert (added.name, added.fitted, added.held_out, added.check) == ("new", 32, 20, None)
    assert added.threshold == model.calibration.threshold(2)
    assert (added.false_alarm_rate, added.attained_rate) == (0.2, pytest.approx(4 / 21))
    assert (added.recognised, added.tried) == (20, 20)
    assert model.class_names == ("class 0", "class 1", "new") and model.config.n_classes == 3
    assert "was not measured: give images of them (check=, --check DATA)" in added.lines()[-1]
    assert added.to_dict()["check"] is None


@pytest.mark.parametrize(("fraction", "images", "held_out"), [(0.0, 48, 0), (0.1, 48, 8), (0.4, 96, 13), (0.1, 30, 5)])
def test_images_are_held_out_as_in_fit(fraction, images, held_out):
    """At least 8 and never more than half; with a fraction of 0 none, and there is no threshold."""
    model = gaussian_of(2, calibration_fraction=fraction)
    added = model.add_class("new", of_classes(feature_set(images, seed=8), 2))
    assert (added.fitted, added.held_out) == (images // 3 - held_out, held_out)
    assert math.isnan(added.threshold) == (held_out == 0)


def test_a_class_of_other_proportions():
    """It has a grid of its own, as in `fit`; each class is inferred among those whose places correspond."""
    model, wide = gaussian_of(2), ((8, 16), (4, 8), (2, 4))
    before = model.score_features(class_features(6, seed=3))
    images = of_classes(feature_set(48, sides=wide), 2)
    model.add_class("wide", images, calibration=of_classes(feature_set(60, seed=1, sides=wide), 2))
    assert model.config.grids == (((4, 4),), ((4, 4),), ((4, 8),))
    after = model.score_features(class_features(6, seed=3))
    assert_same_rows(before, after, torch.ones(6, dtype=torch.bool))
    assert model.score_features(class_features(6, seed=3, sides=wide)).class_id.tolist() == [2] * 6
    mixed = FeatureSet([*(images.images[i] for i in range(3)), *feature_set(3).images], torch.zeros(6))
    with pytest.raises(ValueError, match="training images of 'mixed' have .* proportions differ"):
        model.add_class("mixed", mixed, calibration=images)


def test_a_second_class_follows_the_first(tmp_path):
    """What was pooled for the classes before is kept by each addition, in a file too."""
    model = gaussian_of(1, rate=0.03)
    thresholds = []
    for k in (1, 2):
        held_out = of_classes(feature_set(60, seed=1), k)
        model.add_class(f"class {k}", of_classes(feature_set(48), k), calibration=held_out)
        thresholds.append([model.calibration.threshold(j) for j in range(k)])
    assert thresholds[1][: len(thresholds[0])] == thresholds[0]
    levels = class_features(9, seed=3)
    assert model.score_features(levels).class_id.tolist() == [0, 1, 2] * 3
    model.save(tmp_path / "grown.safetensors")
    loaded = load(tmp_path / "grown.safetensors")
    assert loaded.config == model.config
    small_vqflow.assert_same_scores(loaded.score_features(levels), model.score_features(levels))
    grown = [each.calibration for each in (model, loaded)]
    for each in (model, loaded):
        each.add_class("class 3", of_classes(feature_set(48), 1), calibration=of_classes(feature_set(60, seed=1), 1))
    assert [grown[0].threshold(k) for k in range(3)] == [loaded.calibration.threshold(k) for k in range(3)]


# ------------------------------------------------------------------------------------------------ HGAD


def new_features(n: int, seed: int = 0) -> list[torch.Tensor]:
    """Return features far from those of the known classes, (n, C, h, w) a level."""
    return [-x[::3] for x in exported.features(3 * n, seed=seed)]


@pytest.mark.parametrize("changes", [{}, {"fusion": "likelihood"}, {"map_levels": 1}], ids=str)
def test_hgad_takes_centres_and_keeps_its_flows(changes, tmp_path):
    before = on_features(**changes)
    after = copy.deepcopy(before)
    added = after.add_class("new", new_features(20), calibration=new_features(20, seed=7))
    assert (added.fitted, added.held_out, added.tried) == (20, 20, 20) and added.recognised > 15
    for name, tensor in before.state_dict().items():
        grown = after.state_dict()[name]
        assert torch.equal(grown[: len(tensor)] if name.startswith("mixture") else grown, tensor), name
    for level in range(2):  # relative weights stay, and the new class has the mean one
        first, second = (model.mixture.phi_inters[level].detach().softmax(0) for model in (before, after))
        assert torch.allclose(second[:3] / second[:3].sum(), first) and float(second[3]) == pytest.approx(1 / 4)
    levels = exported.features(9, seed=4)
    one, other = (model.score_features(levels, torch.arange(9) % 3) for model in (before, after))
    for first, second in zip(one.logps, other.logps, strict=True):  # by rounding: all centres are centred
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    if changes.get("fusion") == "likelihood":
        torch.testing.assert_close(one.anomaly_map, other.anomaly_map, rtol=1e-4, atol=1e-4)
    assert torch.equal(one.threshold, other.threshold)
    after.save(tmp_path / "grown.safetensors")
    loaded = HGADModel.load(tmp_path / "grown.safetensors")
    assert loaded.class_names == after.class_names
    small_vqflow.assert_same_scores(loaded.score_features(levels), after.score_features(levels))


def test_hgad_warns_that_its_flows_do_not_know_the_class():
    known = "the flows were not trained on images of 'new': .* far fewer of its defects"
    with pytest.warns(UserWarning, match=f"{known}.* entropy maps of the other classes have changed"):
        on_features().add_class("new", new_features(20))
    with pytest.warns(UserWarning, match=f"{known}.*relying on it \\(docs/new-products.md\\)$"):
        on_features(fusion="likelihood").add_class("new", new_features(20))


def test_hgad_takes_no_class_without_a_threshold():
    model = on_features(calibration_fraction=0.1)
    state = state_of(model)
    with pytest.raises(ValueError, match="class 'new' has one image, and none can be held out for a threshold"):
        model.add_class("new", new_features(1))
    assert_unchanged(model, state)


def test_a_check_that_shows_a_loss_warns(root, tmp_path):
    """Classes whose images are taken for the new one are named, and those of the check that the model does not know."""
    (tmp_path / "stranger").symlink_to(root / "Größe")
    for k in range(3):
        (tmp_path / f"class {k}").symlink_to(root / f"class {k}")
    with pytest.warns(UserWarning) as told:
        images = root / "class 0" / "train" / "good"
        added = small_detectors.gaussian().add_class("copy", images, check=tmp_path)
    assert [row.name for row in added.check] == ["class 0", "class 1", "class 2"]
    texts = [str(each.message) for each in told]
    assert any(text.startswith("the check leaves out 'stranger'") for text in texts)
    lost = added.check[0]
    assert lost.recognised_after < lost.recognised_before
    counts = f"class 0 {lost.recognised_before} > {lost.recognised_after} of {lost.images}"
    assert any("taken for another one" in text and counts in text for text in texts)


def test_hgad_of_one_class():
    """Its second class brings an entropy map: thresholds hold only where the likelihood alone makes the map."""
    with pytest.raises(ValueError, match="knows one class, whose maps are made without entropy; with fusion='standard"):
        on_features(n_classes=1).add_class("new", new_features(20))
    for changes in ({}, {"map_levels": 1}):
        model = on_features(n_classes=1, fusion="likelihood", **changes)
        levels = exported.features(6, seed=4)
        before = model.score_features(levels, 0)
        model.add_class("new", new_features(20))
        after = model.score_features(levels, 0)
        torch.testing.assert_close(before.anomaly_map, after.anomaly_map, rtol=1e-4, atol=1e-4)
        assert torch.equal(before.threshold, after.threshold) and model.density_parts == 2


def test_the_official_optimiser_is_of_the_new_centres():
    model = on_features()
    before = model.optimizer
    model.add_class("new", new_features(20))
    assert model.optimizer is not before
    assert [p.shape[0] for p in model.optimizer.param_groups[1]["params"]] == [4] * 4


# ------------------------------------------------------------------------------------------------ images, and refusals


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dataset of the classes of `small_detectors`, with defects, and of a new one in inverse colours."""
    root = tmp_path_factory.mktemp("data")
    images = small_detectors.images_of_classes(45, seed=3)
    for k, name in enumerate(("class 0", "class 1", "class 2", "Größe")):
        of_class = images[k % 3 :: 3] if k < 3 else (1 - images[1::3]) ** 4
        for i, image in enumerate(of_class):
            place = root / name / ("train/good" if i < 10 else "test/good" if i < 13 else "test/hole")
            place.mkdir(parents=True, exist_ok=True)
            if i >= 13:
                image, mask = image.clone(), np.zeros((64, 64), np.uint8)
                image[:, 16:48, 16:48], mask[16:48, 16:48] = 0.5, 255
                masks = root / name / "ground_truth" / "hole"
                masks.mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(masks / f"{i:02}_mask.png")
            Image.fromarray((image * 255).round().byte().movedim(0, -1).numpy()).save(place / f"{i:02}.png")
    return root


@pytest.mark.parametrize("method", ["gaussian", "hgad"])
def test_images_come_in_any_form(method, root):
    """A folder of images, the folder of the class in a dataset, paths, images in memory: all give the same model."""
    model = getattr(small_detectors, method)(calibration_fraction=0.1)
    folder = root / "Größe" / "train" / "good"
    files = sorted(folder.iterdir())
    states = []
    for images in (folder, root / "Größe", str(folder), files, [np.asarray(Image.open(file)) for file in files]):
        grown = copy.deepcopy(model)
        added = grown.add_class("Größe", images)
        assert (added.fitted, added.held_out) == (5, 5) and grown.class_names[-1] == "Größe"
        states.append({**grown.state_dict(), **grown.calibration.tensors()})
    for state in states[1:]:
        assert_same_state(states[0], state)
    held_out = grown.score(folder, "Größe").image_score
    assert held_out.isfinite().all() and len(held_out) == 10


@pytest.mark.parametrize("method", ["gaussian", "hgad"])
def test_what_the_others_lose_is_measured(method, root):
    """The check counts what `score` says before and after; images of the new class in the dataset are left out."""
    model = getattr(small_detectors, method)()
    before = copy.deepcopy(model)
    added = model.add_class("Größe", root / "Größe", check=root)
    assert [row.name for row in added.check] == ["class 0", "class 1", "class 2"]
    for row in added.check:
        folder = root / row.name / "test"
        assert (row.normal_images, row.images) == (3, 5)
        for each, alarms, recognised in (
            (before, row.false_alarms_before, row.recognised_before),
            (model, row.false_alarms_after, row.recognised_after),
        ):
            assert alarms == int(each.score(folder / "good").is_anomalous.sum())
            everything = torch.cat([each.score(folder / kind).class_id for kind in ("good", "hole")])
            assert recognised == int((everything == model.groups.index(row.name)).sum())
        assert 0 <= row.image_auroc_after <= 1 and 0 <= row.pixel_auroc_before <= 1
    assert len(added.lines()) == 8 and len(added.to_dict()["check"]) == 3
    assert f"{added.check[0].false_alarms_before} > {added.check[0].false_alarms_after} of 3" in added.lines()[5]


def test_a_check_on_normal_images_alone(root, tmp_path):
    for k in range(3):
        (tmp_path / f"class {k}").symlink_to(root / f"class {k}" / "test" / "good")
    added = small_detectors.gaussian().add_class("new", root / "Größe", check=tmp_path)
    assert [(row.normal_images, row.images) for row in added.check] == [(3, 3)] * 3
    assert math.isnan(added.check[0].image_auroc_before) and added.lines()[-1].split()[-2:] == ["-", "-"]
    assert added.to_dict()["check"][0]["image_auroc_before"] is None


def test_a_model_calibrated_at_another_size(root):
    """The new class is fitted at the model's own size, and its threshold is of the size of the others' thresholds."""
    model = small_detectors.hgad()
    model.calibrate([root / f"class {k}" for k in range(3)], img_size=96, false_alarm_rate=0.25)
    files = sorted((root / "Größe/train/good").iterdir())
    added = model.add_class("Größe", files[:5], calibration=files[5:], check=root)
    assert model.calibration.img_size == 96
    alarms = [model.score(root / f"class {k}" / "test" / "good", img_size=96).is_anomalous.sum() for k in range(3)]
    assert [row.false_alarms_after for row in added.check] == list(map(int, alarms))
    expected = model.score(files[5:], "Größe", img_size=96).image_score
    assert torch.equal(model.calibration.scores[model.calibration.class_ids == 3], expected)
    features = FeatureSet(
        [[level.squeeze(0) for level in model.encoder(torch.zeros(1, 3, 64, 64))]] * 4, torch.zeros(4)
    )
    for change in (lambda: model.add_class("new", features), lambda: model.absorb("Größe", features)):
        with pytest.raises(ValueError, match="images are features at one size.*was calibrated at 96: give the images"):
            change()
    assert model.add_class("new", map(str, files)).fitted == len(files) - added.held_out


def test_refusals_leave_the_model_as_it_was(root, tmp_path):
    model = small_detectors.gaussian()
    state = state_of(model)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    for i in range(3):
        (tmp_path / "broken" / f"{i}.png").write_bytes(b"no image")
    new = root / "Größe"
    for arguments, options, message in (
        (("class 1", new), {}, r"knows the class 'class 1': absorb more normal images of it \(model.absorb"),
        (("", new), {}, "name is ''; allowed: a text that is not empty"),
        ((3, new), {}, "name is 3; allowed"),
        (("new", new, 0.1), {}, "false_alarm_rate is 0.1, and the classes of the model share one of 0.25"),
        (("new", tmp_path / "nowhere"), {}, "nowhere: no such file or folder"),
        (("new", tmp_path / "empty"), {}, "empty: no images; put normal images"),
        (("new", tmp_path / "broken"), {}, "3 of 3 images cannot be used"),
        (("new", root), {}, r"images of 4 classes \(Größe, class 0, .*\); give the folder of one"),
        (("new", new / "test"), {}, "good: this is no class; move it to"),
        (("new", []), {}, "there are no images"),
        (("new", ""), {}, "images is an empty text"),
        (("new ", new), {}, "name is 'new ', which begins or ends with a space"),
        (
            ("new", sorted((new / "train/good").iterdir())[:1]),
            {},
            "'new' has fewer than 2 training images",
        ),
        (("new", new), {"calibration": tmp_path / "empty"}, "empty: no images"),
        (("new", new), {"check": tmp_path / "empty"}, "no class folders"),
        (("new", feature_set()), {}, "image 0 has features"),
        (("new", 7), {}, "cannot score a int"),
    ):
        with pytest.raises(ValueError, match=message):
            model.add_class(*arguments, **options)
        assert_unchanged(model, state)
    model.calibration = None
    with pytest.raises(
        ValueError, match=r"not calibrated: calibrate it first \(model.calibrate, hgad-fast calibrate\)"
    ):
        model.add_class("new", new)


def test_an_error_at_the_end_leaves_the_model_as_it_was(root, monkeypatch):
    for model in (small_detectors.gaussian(), small_detectors.hgad()):
        state = state_of(model)
        with monkeypatch.context() as patched:
            patched.setattr("hgad_fast.models.classes.recognition", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError), warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                model.add_class("new", root / "Größe")
        assert not told  # of a class that there is not
        assert_unchanged(model, state)
        model.add_class("new", root / "Größe")


def test_bad_images_are_left_out_on_request(root, tmp_path):
    files = sorted((root / "Größe/train/good").iterdir())
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    with pytest.warns(UserWarning, match="bad.png"):
        added = small_detectors.gaussian().add_class("new", [*files, bad], skip_bad=True)
    assert added.fitted + added.held_out == len(files)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: small_model(grouping="one"), "grouping is 'one': there are no Gaussians of single classes .* absorb"),
        (lambda: small_model(grouping="clusters", n_clusters=3), "grouping is 'clusters'.* absorb normal images"),
    ],
    ids=["one", "clusters"],
)
def test_groups_that_are_no_classes(model, message):
    model = model()
    model.fit(feature_set(), calibration=feature_set(30, seed=1), false_alarm_rate=0.2)
    with pytest.raises(ValueError, match=message):
        model.add_class("new", feature_set(12))


def test_vqflow_names_the_remedies():
    model = small_detectors.vqflow()
    with pytest.raises(
        ValueError, match=r"forms its groups of images by itself.* Absorb .* calibrate anew .* train anew"
    ):
        model.add_class("new", small_detectors.feature_set(model, 4, seed=5))
