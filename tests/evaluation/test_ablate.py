"""The ablation: its maps are what `evaluate` measures, its constants come from held-out normal images alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import rounding
import torch
from PIL import Image

import hgad_fast
from hgad_fast import GaussianConfig, GaussianModel, HGADConfig, HGADModel
from hgad_fast.data import datasets, images
from hgad_fast.evaluation import ablate
from hgad_fast.evaluation.evaluate import evaluate, seen_mask
from hgad_fast.features import preprocess
from hgad_fast.features.extract import feature_set
from hgad_fast.scoring import densities
from hgad_fast.scoring.calibration import held_out_densities
from hgad_fast.training import fit
from hgad_fast.training.checkpoint import MODEL


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two textures, one coarse, one fine; defects are white spots."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for k, name in enumerate(("coarse", "fine")):
        for folder, count in (("train/good", 10), ("test/good", 3), ("test/spot", 3)):
            for i in range(count):
                array = (
                    rng.integers(60, 190, (8 * (k + 1),) * 2).astype(np.uint8).repeat(6 - 3 * k, 0).repeat(6 - 3 * k, 1)
                )
                path = root / name / folder / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                if folder.endswith("spot"):
                    mask = np.zeros_like(array)
                    mask[10:25, 10 + i : 30] = 255
                    array = np.maximum(array, mask)
                    (root / name / "ground_truth/spot").mkdir(parents=True, exist_ok=True)
                    Image.fromarray(mask).save(root / name / "ground_truth/spot" / f"{i}_mask.png")
                Image.fromarray(array).save(path)
    return root


# Of an AUROC: the share of pairs, one normal and one anomalous, whose scores are so near each other that maps computed
# in another order may swap them. Scores spread over their own size, of which float32 keeps a few millionths.
SWAPPED = 1e-5
CONFIG = HGADConfig(
    n_classes=2,
    class_names=("coarse", "fine"),
    n_intra_centers=2,
    backbone_arch="test_efficientnet",
    backbone_weights=None,
    out_indices=(1,),
    feature_levels=2,
    coupling_layers=1,
    pos_embed_dim=8,
    img_size=64,
    msk_size=24,
    meta_epochs=3,
    sub_epochs=1,
    lr=0.01,
)


@pytest.fixture(scope="module")
def ablation(root, tmp_path_factory):
    output, patch = tmp_path_factory.mktemp("out"), pytest.MonkeyPatch()
    patch.setattr(ablate, "STRIDE", 1)
    said: list[str] = []
    variants = HGADModel.variants(CONFIG, ["place-gaussian", "single-gaussian", "hgad"], centres=())
    actual = ablate.run(root, CONFIG, output, variants=variants, training_images=6, say=said.append)
    patch.undo()
    return output, actual, said


def test_the_fusions_are_what_evaluate_measures(ablation, root):
    output, actual, said = ablation
    model = HGADModel.load(output / "hgad" / MODEL)
    normals = feature_set(model, datasets.discover(root))
    rows, others = ablate._drawn(normals.class_ids, model.class_names, 6, CONFIG.seed)
    assert sorted(torch.cat([rows, others]).tolist()) == list(range(20)) and len(rows) == 12
    with pytest.warns(UserWarning, match="too few"):
        model.calibrate(normals.subset(others))
    expected = evaluate(model, root, details=False)
    figures = actual["variants"]["hgad"]["figures"]
    for setting, protocol, fusion in (
        ("official", "official", "product"),
        ("class inferred", "honest", "standardised"),
    ):
        for name in ("coarse", "fine"):
            row = expected.figures[protocol][name]
            ours = figures[setting][fusion][name]
            assert ours == pytest.approx((row.image_auroc, row.pixel_auroc), abs=SWAPPED)
        mean = expected.mean(protocol)
        assert figures[setting][fusion]["mean"] == pytest.approx([mean.image_auroc, mean.pixel_auroc], abs=SWAPPED)
    confusion = actual["variants"]["hgad"]["confusion"]
    assert {k: {o: n for o, n in row.items() if n} for k, row in confusion.items()} == expected.confusion
    assert f"{100 * mean.image_auroc:.1f} / {100 * mean.pixel_auroc:.1f}" in said[-1]


def test_one_gaussian_has_the_likelihood_alone_and_knows_no_class(ablation):
    variant = ablation[1]["variants"]["single-gaussian"]
    assert all(list(maps) == ["likelihood"] for maps in variant["figures"].values())
    assert variant["figures"]["class given"] == variant["figures"]["class inferred"]
    assert variant["confusion"] == {"coarse": {"all": 6}, "fine": {"all": 6}}


def test_the_place_gaussian_models_the_features_of_the_flows(ablation, root):
    output, actual, _ = ablation
    hgad, gaussian = (hgad_fast.load(output / name / MODEL) for name in ("hgad", "place-gaussian"))
    assert isinstance(gaussian, GaussianModel) and gaussian.feature_dims == hgad.feature_dims
    normals = feature_set(hgad, datasets.discover(root))
    rows, others = ablate._drawn(normals.class_ids, hgad.class_names, 6, CONFIG.seed)
    again = GaussianModel(gaussian.config.replace(grids=None))
    with pytest.warns(UserWarning, match="too few"):
        again.fit(normals.subset(rows), calibration=normals.subset(others))
    assert all(torch.equal(x, gaussian.state_dict()[name]) for name, x in again.state_dict().items())

    def features_of(sample):
        return preprocess.image_features(hgad, images.read_image(sample.path))

    expected = evaluate(again, root, details=False, features_of=features_of)
    figures = actual["variants"]["place-gaussian"]["figures"]
    assert [list(maps) for maps in figures.values()] == [["likelihood"], *[["likelihood", "standardised"]] * 2]
    for setting, protocol, kind in (
        ("official", "official", "likelihood"),
        ("class inferred", "honest", "standardised"),
    ):
        for name in ("coarse", "fine"):
            row = expected.figures[protocol][name]
            assert figures[setting][kind][name] == pytest.approx((row.image_auroc, row.pixel_auroc), abs=SWAPPED)
    assert "place-gaussian, class inferred" in ablate.table(actual)


def test_features_of_the_place_gaussian():
    of_stages = {"feature_mode": "stages", "feature_levels": 3, "out_indices": (2, 3, 4)}

    def place_gaussian(**settings):
        before = torch.get_rng_state()
        variant = HGADModel.variants(CONFIG.replace(**settings), ["place-gaussian"], [])["place-gaussian"]
        assert torch.equal(torch.get_rng_state(), before)
        assert isinstance(variant, GaussianConfig) and variant.names == ("coarse", "fine")
        assert (variant.img_size, variant.msk_size) == (CONFIG.img_size, CONFIG.msk_size)
        return GaussianModel(variant)

    pyramid, stages = place_gaussian(), place_gaussian(**of_stages)
    assert pyramid.encoder is None and pyramid.config.map_stages == 1
    assert pyramid.feature_dims == HGADModel(CONFIG).feature_dims
    assert stages.encoder is None and stages.feature_dims == HGADModel(CONFIG.replace(**of_stages)).feature_dims
    assert stages.config.map_stages == 2  # strides 8 and 16, and not 32
    joined = place_gaussian(**of_stages | {"feature_mode": "joined", "feature_levels": 1})
    assert joined.encoder.stage_dims == (tuple(stages.feature_dims),) and joined.encoder.fine_stages == (2,)
    own = place_gaussian(backbone_arch=None, feature_levels=2, feature_dims=(8, 16))
    assert own.feature_dims == [8, 16] and own.config.map_stages is None


def test_variants_that_a_base_configuration_rules_out_are_left_out_or_made_possible():
    native = HGADModel.variants(CONFIG.replace(img_size="native"))
    assert "place-gaussian" in HGADModel.variants(CONFIG) and "place-gaussian" not in native
    with pytest.raises(ValueError, match=r"GaussianConfig\.img_size is 'native'"):
        HGADModel.variants(CONFIG.replace(img_size="native"), ["place-gaussian"])
    entropy = HGADModel.variants(CONFIG.replace(fusion="entropy"))
    assert entropy["hgad"].fusion == "entropy" and entropy["single-gaussian"].fusion == "likelihood"


def test_the_parts_of_several_backbones_are_compared_and_their_sum(root, tmp_path):
    config = CONFIG.replace(
        backbone_arch="test_efficientnet+test_resnet", feature_mode="joined", out_indices=((1, 2), (1, 2))
    )
    variants = HGADModel.variants(config, ["place-gaussian"], [])
    actual = ablate.run(root, config, tmp_path, variants=variants, training_images=6, say=lambda text: None)
    results = actual["variants"]["place-gaussian"]
    parts = ["test_efficientnet", "test_resnet"]
    assert list(results["figures"]["official"]) == [*parts, "sum"]
    assert list(results["figures"]["class inferred"]) == [*parts, "standardised"]
    figures = results["figures"]["official"]
    assert figures["test_efficientnet"] != figures["test_resnet"]
    assert results["false_alarms"]["splits"][0]["normal_images"] == 6


def test_each_map_is_the_one_that_score_makes(ablation, root):
    model = HGADModel.load(ablation[0] / "hgad" / MODEL)
    held_out = feature_set(model, datasets.discover(root)).subset(torch.tensor([0, 1, 2, 15, 16, 17]))
    normal = held_out_densities(model, held_out)
    levels = [level[None] for level in held_out.images[0]]
    (part,) = densities.densities(model, levels, None)
    expected = {}
    for fusion in ("product", "standardised"):
        model.calibration = ablate._calibration(model, normal, fusion)
        expected[fusion] = rounding.exact_and_tolerance(lambda model: model.score_features(levels).anomaly_map, model)
    maps = {kind: of_kind for kind, (of_kind, _) in ablate._calibrated([part], model).items()}
    for fusion, (exact, tolerance) in expected.items():
        rounding.assert_within(maps[fusion][0], exact[0], tolerance[0])


def test_overlap_of_the_log_densities(ablation, root):
    model = HGADModel.load(ablation[0] / "hgad" / MODEL)
    dataset = datasets.discover(root)
    actual = ablation[1]["variants"]["hgad"]["log_density_overlap"]
    for k, name in enumerate(dataset.class_names):
        normal, anomalous = [], []
        for sample in (s for s in dataset.test if s.class_id == k):
            features = preprocess.image_features(model, images.read_image(sample.path))
            (part,) = densities.densities(model, features, torch.tensor([k]))
            mask = seen_mask(model, sample, part.logps[0][0])
            normal.append(part.logps[0][0][~mask])
            anomalous.append(part.logps[0][0][mask])
        pair = [torch.cat(some).numpy() for some in (normal, anomalous)]
        edges = np.linspace(min(map(np.min, pair)), max(map(np.max, pair)), 61)
        shares = [np.histogram(values, edges)[0] / len(values) for values in pair]
        assert actual[name] == pytest.approx(np.minimum(*shares).sum(), abs=0.02)
    assert actual["mean"] == pytest.approx((actual["coarse"] + actual["fine"]) / 2) and 0 < actual["mean"] < 1


def test_other_numbers_of_centres_are_variants(root, tmp_path):
    config = CONFIG.replace(meta_epochs=1)
    actual = ablate.run(root, config, tmp_path, variants=HGADModel.variants(config, [], [3]), say=lambda text: None)
    assert list(actual["variants"]) == ["hgad-3-centres"]
    assert HGADModel.load(tmp_path / "hgad-3-centres" / MODEL).config.n_intra_centers == 3


def test_false_alarms_are_counted_over_splits(ablation):
    alarms = ablation[1]["variants"]["hgad"]["false_alarms"]
    assert len(alarms["splits"]) == ablate.SPLITS * len(ablate.RATES)
    for rate, pooled in alarms["pooled"].items():
        mine = [split for split in alarms["splits"] if str(split["nominal"]) == rate]
        assert {split["calibration_images"] for split in mine} == {2} and {s["normal_images"] for s in mine} == {6}
        assert pooled["false_alarm_rate"] == sum(split["false_alarms"] for split in mine) / (6 * ablate.SPLITS)
        assert pooled["recall"] == pytest.approx(np.mean([split["recall"] for split in mine]))
    assert ablate._binomial(0.05, 207) == [5 / 207, 17 / 207]


def test_what_is_written_is_used_again(ablation, root, monkeypatch):
    output, actual, _ = ablation
    assert json.loads((output / "ablation.json").read_text()) == json.loads(json.dumps(actual))
    for name in actual["variants"]:
        with Image.open(output / name / "log-density.png") as image:
            assert np.asarray(image.convert("L")).std() > 10
    monkeypatch.setattr(fit._Run, "_sub_epoch", lambda *a: pytest.fail("trained again"))
    monkeypatch.setattr(ablate, "STRIDE", 1)
    only = {"variants": HGADModel.variants(CONFIG, ["hgad"], []), "say": lambda text: None}
    again = ablate.run(root, CONFIG, output, training_images=6, **only)
    assert json.dumps(again["variants"]["hgad"]) == json.dumps(actual["variants"]["hgad"])
    with pytest.raises(ValueError, match="was trained on other images"):
        ablate.run(root, CONFIG, output, training_images=5, **only)


def test_without_masks_there_are_no_pixel_figures(root, tmp_path):
    dataset = datasets.discover(root)
    blind = dataclasses.replace(dataset, test=tuple(dataclasses.replace(s, mask=None) for s in dataset.test))
    config = CONFIG.replace(meta_epochs=1)
    variants = HGADModel.variants(config, ["inter-class"], [])
    actual = ablate.run(blind, config, tmp_path, variants=variants, say=lambda text: None)
    (image, pixel) = actual["variants"]["inter-class"]["figures"]["official"]["product"]["mean"]
    assert 0 <= image <= 1 and pixel is None
    assert "NaN" not in (tmp_path / "ablation.json").read_text() and "nan" not in ablate.table(actual)


def test_what_cannot_be(root, tmp_path):
    with pytest.raises(ValueError, match="there is no variant 'hgda'; there are place-gaussian, single-gaussian, "):
        HGADModel.variants(CONFIG, ["hgda"])
    for count in (10, 0, -5):
        with pytest.raises(ValueError, match=f"class 'coarse' has 10 training images, of which {count} cannot be"):
            ablate.run(root, CONFIG, tmp_path, training_images=count, say=lambda text: None)
    with pytest.raises(ValueError, match="n_intra_centers"):
        HGADModel.variants(CONFIG, centres=[5, 0])


def test_an_ablation_is_never_replaced_unasked(tmp_path: Path) -> None:
    """What it wrote is removed on request, and nothing else."""
    ablate.check_output(tmp_path / "none", False, False)
    written = ["hgad/model.safetensors", "hgad/log-density.png", "single-gaussian/checkpoint.pt", "ablation.json"]
    mine = ["hgad/notes.txt", "other/a.png"]
    for name in written + mine:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"holds an ablation \(hgad\): --resume keeps its trainings"):
        ablate.check_output(tmp_path, False, False)
    ablate.check_output(tmp_path, True, False)
    ablate.check_output(tmp_path, False, True)
    ablate.clear_output(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == mine
    ablate.check_output(tmp_path, False, False)


def test_the_table_has_a_legend() -> None:
    cells = {"mean": [0.9, 0.8]}
    figures = {"official": {"likelihood": cells, "product": cells}, "class inferred": {"likelihood": cells}}
    table = ablate.table({"variants": {"hgad": {"figures": figures}}})
    assert table.count("\n  official ") == table.count("\n  class inferred ") == table.count("\n  product ") == 1
    assert "\n  class given " not in table and "\n  standardised " not in table
    assert "\n  likelihood       the part of the density of that name alone" in table
