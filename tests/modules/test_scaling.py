"""Feature scaling: its statistics against float64, and what it does to features, scores and files."""

from __future__ import annotations

import pytest
import rounding
import torch
from rounding import SAME_IN_FLOAT64
from torch import Tensor

import hgad_fast
from hgad_fast import HGADConfig, HGADModel
from hgad_fast.features.extract import FeatureSet
from hgad_fast.modules.scaling import EIGENVALUE_FLOOR, StageScaling, Whitening, feature_scaling

DIMS = (7, 5)
SIZES = ((4, 6), (3, 3), (5, 2), (4, 6), (6, 6), (4, 5))


def make_model(**changes) -> HGADModel:
    settings = {"feature_levels": 2, "feature_dims": DIMS, "n_classes": 2, "n_intra_centers": 3, "coupling_layers": 2}
    settings |= {"backbone_arch": None, "pos_embed_dim": 8, "msk_size": 16, "meta_epochs": 3, "sub_epochs": 1}
    return HGADModel(HGADConfig(**settings | {"batch_size": 6, "lr": 1e-3} | changes))


def make_data() -> FeatureSet:
    """Features with a mean far from zero, and channels of several scales that depend on each other."""
    generator = torch.Generator().manual_seed(0)
    mixing = [torch.randn(c, c, generator=generator) * torch.logspace(-0.5, 0.5, c) for c in DIMS]
    images = [
        [100 + torch.einsum("ij,jhw->ihw", m, torch.randn(len(m), h, w, generator=generator)) for m in mixing]
        for h, w in SIZES * 4
    ]
    return FeatureSet(images, torch.arange(len(images)) % 2)


def pixels(data: FeatureSet, level: int) -> Tensor:
    """All pixels of a level, (N, C) in float64."""
    return torch.cat([maps[level].double().flatten(1).T for maps in data.images])


@pytest.mark.parametrize("stages", [(7,), (3, 4), (1, 1, 5)])
def test_the_scale_of_a_stage_is_its_standard_deviation(stages):
    data = make_data()
    scaling = StageScaling(stages).double()
    moments = scaling.moments()
    for maps in data.images:
        moments.add(maps[0])
    scaling.take(moments)
    x = pixels(data, 0)
    expected = torch.cat([part / part.std(correction=0) for part in x.split(stages, 1)], 1)
    torch.testing.assert_close(scaling(x), expected, rtol=SAME_IN_FLOAT64, atol=0)


def test_whitened_features_have_the_identity_as_covariance():
    data = make_data()
    model = make_model(feature_scaling="whiten").double()
    model.begin(data)
    for level in range(2):
        x = model.scaled(pixels(data, level), level)
        torch.testing.assert_close(x.mean(0), torch.zeros_like(x[0]), rtol=0, atol=SAME_IN_FLOAT64)
        torch.testing.assert_close(
            torch.cov(x.T, correction=0), torch.eye(DIMS[level], dtype=x.dtype), rtol=0, atol=SAME_IN_FLOAT64
        )


def test_directions_that_do_not_vary_are_floored():
    """One that does not vary at all, and one that varies less than the floor, in any turned position."""
    generator = torch.Generator().manual_seed(3)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q
    latent = torch.randn(4, 50, 40, generator=generator, dtype=torch.float64)
    latent = torch.linalg.qr((latent.flatten(1) - latent.flatten(1).mean(1, keepdim=True)).T).Q.T.view(4, 50, 40)
    features = torch.einsum("ij,jhw->ihw", turn, latent * 2000**0.5 * torch.tensor([0, 1e-3, 1, 10]).view(-1, 1, 1))
    whitening = Whitening(4).double()
    moments = whitening.moments()
    moments.add(features)
    whitening.take(moments)
    variances = torch.cov(whitening(features.flatten(1).T).T, correction=0)
    expected = torch.diag(torch.tensor([0, 1e-6 / (EIGENVALUE_FLOOR * 100), 1, 1], dtype=torch.float64))
    torch.testing.assert_close(variances, expected, rtol=0, atol=SAME_IN_FLOAT64)


@pytest.mark.parametrize("kind", ["std", "whiten"])
def test_constant_features_are_left_as_they_are_in_scale(kind):
    (scaling,) = feature_scaling(kind, [(4,)])
    moments = scaling.moments()
    moments.add(torch.full((4, 3, 3), 2.0))
    scaling.take(moments)
    x = torch.randn(5, 4)
    assert torch.equal(scaling(x), x if kind == "std" else x - 2)


@pytest.mark.parametrize("kind", ["std", "whiten"])
def test_features_that_are_not_finite_are_named(kind):
    data = make_data()
    data.images[3][1][2, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="image 3 has a NaN or an infinity in its features of lev"):
        make_model(feature_scaling=kind).begin(data)


@pytest.mark.filterwarnings("ignore:too few calibration images")
@pytest.mark.parametrize("kind", ["std", "whiten"])
def test_training_and_scores_are_those_of_features_scaled_before(kind):
    data = make_data()
    model, plain = make_model(feature_scaling=kind).double(), make_model().double()
    with rounding.in_float64():
        data = FeatureSet([[x.double() for x in maps] for maps in data.images], data.class_ids)
        model.begin(data)

        def scaled(maps: list[Tensor]) -> list[Tensor]:
            return [model.scaled(x.flatten(1).T, level).T.reshape(x.shape) for level, x in enumerate(maps)]

        before = FeatureSet([scaled(maps) for maps in data.images], data.class_ids)
        losses = [
            one.fit(features, calibration=features).records[-1]["losses"]
            for one, features in ((model, data), (plain, before))
        ]
        results = [
            one.score_features([x[None] for x in features.images[0]])
            for one, features in ((model, data), (plain, before))
        ]
    for ours, theirs in zip(*losses, strict=True):
        assert ours == pytest.approx(theirs, rel=SAME_IN_FLOAT64)
    for name in ("anomaly_map", "image_score"):
        ours, theirs = (getattr(result, name) for result in results)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0, msg=name)  # maps are kept in float32
    for ours, theirs in zip(results[0].logps, results[1].logps, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=SAME_IN_FLOAT64, atol=SAME_IN_FLOAT64)


@pytest.mark.filterwarnings("ignore:too few calibration images")
@pytest.mark.parametrize("kind", ["std", "whiten"])
def test_scores_do_not_depend_on_the_batch_and_files_keep_them(kind, tmp_path):
    data = make_data()
    model = make_model(feature_scaling=kind)
    model.fit(data, calibration=data)
    model.save(tmp_path / "model.safetensors")
    loaded = hgad_fast.load(tmp_path / "model.safetensors")
    own = {name for name in model.state_dict() if name.startswith("scaling.")}
    assert own == {
        f"scaling.{level}.{name}"
        for level in (0, 1)
        for name in (("scale",) if kind == "std" else ("mean", "rotation"))
    }
    levels = [torch.randn(5, c, 6, 4) * 10 + 100 for c in DIMS]
    together = model.score_features(levels)
    for i in range(5):
        for one in (model, loaded):
            alone = one.score_features([x[i : i + 1] for x in levels])
            assert torch.equal(alone.anomaly_map[0], together.anomaly_map[i])
            assert torch.equal(alone.image_score[0], together.image_score[i])


def test_without_scaling_the_state_dict_is_the_official_one():
    """No entry is added, so that files of before and official checkpoints fit; and features are taken as they are."""
    model = make_model()
    assert not any(name.startswith("scaling") for name in model.state_dict())
    x = torch.randn(3, DIMS[0])
    assert model.scaled(x, 0) is x


@pytest.mark.parametrize("kind", ["std", "whiten"])
def test_the_official_surface_scales_too(kind):
    model, plain = make_model(feature_scaling=kind), make_model()
    plain.load_state_dict(model.state_dict(), strict=False)
    model.begin(make_data())
    x, labels = pixels(make_data(), 0)[:48].float(), torch.zeros(2, 4, 6, dtype=torch.int64)
    ours, theirs = model(x, (labels, None), epoch=3), plain(model.scaled(x, 0), (labels, None), epoch=3)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_joined_stages_are_scaled_each_by_itself():
    settings = {"backbone_arch": "test_efficientnet", "backbone_weights": None, "n_classes": 1, "img_size": 64}
    settings |= {"feature_mode": "joined", "feature_levels": 1, "out_indices": (1, 2, 3), "feature_scaling": "std"}
    model = HGADModel(HGADConfig(**settings, coupling_layers=1, pos_embed_dim=8))
    (stages,) = model.encoder.stage_dims
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(c, 4, 5, generator=generator) * 10**i for i, c in enumerate(stages)]
    model.begin(FeatureSet([[torch.cat(maps)]], torch.zeros(1, dtype=torch.int64)))
    for part, raw in zip(model.scaling[0].scale.double().split(stages), maps, strict=True):
        exact = 1 / raw.double().std(correction=0)
        torch.testing.assert_close(
            part, exact.float().double().expand(len(part)), rtol=2 * torch.finfo(torch.float32).eps, atol=0
        )
