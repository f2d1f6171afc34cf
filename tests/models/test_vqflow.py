"""VQFlowModel: its settings, official checkpoints, its file, and the scores of features and images."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_vqflow import (
    DIMS,
    SMALL,
    assert_same_scores,
    assert_same_state,
    class_features,
    labels,
    small_config,
    small_model,
    stirred,
)
from torch import Tensor, nn

import hgad_fast
from hgad_fast import HGADModel, Scorer, VQFlowConfig, VQFlowModel
from hgad_fast.data.images import read_image
from hgad_fast.features.backbone import FeatureMaps
from hgad_fast.models.vqflow_maps import official_maps
from hgad_fast.training.processes import Processes
from hgad_fast.training.step import Step

few = pytest.mark.filterwarnings("ignore:too few calibration images")

# ---------------------------------------------------------------------------------------------------- settings

NEITHER_NUMBER_NOR_NAME = (b"3", {}, object(), math.nan, math.inf, np.array([1, 2]))
BAD = {
    **dict.fromkeys(("n_prototypes", "n_patterns", "prototype_dim"), (None, "3", 0, -1, 2.0, True, (3,))),
    **dict.fromkeys(("concat_pos", "prior_logdet", "vq_revive"), (None, "False", 0, 1)),
    **dict.fromkeys(
        ("quantize_type", "pool_type", "prior_std", "vq_init", "nll_reduction", "lr_schedule", "score_norm", "map"),
        (None, "", "Mul", 3, True, ("avg",)),
    ),
    "score_density": (None, "", "Full", True),
    "score_share": (-0.1, 1.1, None, "0.03", True),
    "pro": (None, "", "official", True),
    "feature_levels": (None, 0, 1, 2.0),
    "feature_mode": ("image_pyramid", None, 3),
    "img_size": ("native", None, 0, -32, 33, 100, 64.0),
    "batch_size": (1, 0, None, 2.0),
    "accumulate": (2, 0, None),
    "pos_embed_dim": (0, -4, 2, 6, 4.0, None, True),
    "coupling_layers": (None, 3, (1, 2), (1, 2, 3, 4), (1, 0, 1), (1, 2.0, 1), (1, True, 1), "123"),
    "hidden_channels": (0, -1, 2.0, "8", True),
    "clamp_alpha": (0, -1, "1", None, True),
    "commitment": (-1, -1e-9, "1", None, True),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in (*values, *NEITHER_NUMBER_NOR_NAME)]
)
def test_a_bad_value_is_named_with_what_is_allowed(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^VQFlowConfig\.{name} is .+; allowed: .+") as error:
        VQFlowConfig(**{name: value})
    if isinstance(value, (str, int, float)):
        assert repr(value) in str(error.value)


def test_every_field_of_its_own_is_tried() -> None:
    of_the_class = {"method", "square", "img_sizes", "presets", "preset_notes", "without_effect"}
    own = VQFlowConfig.__annotations__.keys() - of_the_class
    inherited = {"backbone_arch", "out_indices", "msk_size", "lr", "meta_epochs", "sub_epochs", "clip_grad_norm"}
    assert own - inherited <= BAD.keys()


def test_the_defaults_are_the_published_sizes() -> None:
    config = VQFlowConfig()
    assert (config.n_prototypes, config.n_patterns, config.prototype_dim, config.pos_embed_dim) == (32, 512, 512, 64)
    assert config.coupling_layers == (2, 5, 8) and config.img_size == config.msk_size == 384
    assert VQFlowConfig(clamp_alpha=2, commitment=0) == VQFlowConfig(clamp_alpha=2.0, commitment=0.0)


def test_the_official_procedure_differs_in_what_the_documentation_says() -> None:
    official, own = VQFlowConfig.official(), VQFlowConfig()
    different = {f.name for f in dataclasses.fields(own) if getattr(official, f.name) != getattr(own, f.name)}
    assert different <= VQFlowConfig.presets["official"].keys()
    assert {"prior_logdet", "prior_std", "vq_init", "vq_revive", "nll_reduction", "score_norm", "pro"} <= different
    assert VQFlowConfig.official(n_prototypes=4).n_prototypes == 4
    assert VQFlowConfig.official(n_prototypes=4) == VQFlowConfig.preset("official", n_prototypes=4)
    assert VQFlowConfig.official(vq_init="kmeans").vq_init == "kmeans"
    with pytest.raises(ValueError, match="VQFlowConfig has no field 'layers'"):
        VQFlowConfig.official(layers=3)


def test_presets_are_by_name() -> None:
    assert VQFlowConfig.preset("small").backbone_arch == "tf_efficientnet_lite0"
    assert VQFlowConfig.preset("small", lr=1).lr == 1.0
    with pytest.raises(ValueError, match="VQFlowConfig has no preset 'large'; there are: official, small"):
        VQFlowConfig.preset("large")


@pytest.mark.parametrize("config", [VQFlowConfig(), VQFlowConfig.official(), small_config(class_names=("ä", "b", "c"))])
def test_json_round_trip(config: VQFlowConfig) -> None:
    again = VQFlowConfig.from_json(config.to_json())
    assert again == config and type(again.coupling_layers) is tuple
    assert again.to_json() == config.to_json()


def test_what_a_resumed_run_may_have_otherwise() -> None:
    config = VQFlowConfig()
    assert config.identity() == config.replace(backbone_weights="a.pth").identity()
    for scoring in ({"map": "add"}, {"pro": "official800"}, {"score_share": 0}, {"score_norm": "image_max"}):
        assert config.identity() == config.replace(**scoring).identity()
    for change in ({"n_patterns": 8}, {"vq_revive": False}, {"commitment": 2}, {"pool_type": "max"}):
        assert config.identity() != config.replace(**change).identity()
    assert json.loads(config.identity())["coupling_layers"] == [2, 5, 8]


def test_odd_channels_are_refused_but_for_the_top_level() -> None:
    with pytest.raises(ValueError, match="a feature level has 7 channels; the fusion flow halves them"):
        small_model(feature_dims=(4, 7, 8, 10))
    assert small_model(feature_dims=(4, 6, 8, 9)).feature_dims == [4, 6, 8, 9]


@pytest.mark.parametrize("sides", [(16, 8, 4, 3), (16, 9, 4, 2), (6, 4, 2, 4)])
def test_maps_that_do_not_fit_each_other_are_refused(sides: tuple[int, ...]) -> None:
    model = small_model(pool_type="none")
    with pytest.raises(ValueError, match="VQ-Flow takes squares, each as large as the top level's") as error:
        model.score_features(class_features(2, sides=sides), normalization="official")
    assert ", ".join(f"{side} x {side}" for side in sides) in str(error.value)


def test_maps_that_are_no_squares_are_refused() -> None:
    levels = [F.pad(level, (0, 2)) for level in class_features(2)]
    with pytest.raises(ValueError, match=r"8 x 9, .*VQ-Flow takes squares"):
        small_model().score_features(levels, normalization="official")


def test_the_seed_alone_decides_the_weights() -> None:
    torch.manual_seed(1)
    first, state = small_model(seed=5).state_dict(), torch.get_rng_state()
    torch.rand(7)
    again = small_model(seed=5).state_dict()
    assert_same_state(first, again)
    assert not torch.equal(small_model(seed=6).state_dict()["fusion_flow.permutation_2"], torch.arange(8))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------------------------------------- official files


def official_checkpoint(model: VQFlowModel, order: tuple[int, ...] = (0, 1, 2)) -> dict[str, Any]:
    """Return the model as the official code saves it: sub-modules, an optimizer, and permutations in any order."""
    parts: dict[str, Any] = {"optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]}, "epoch": 3}
    for name, tensor in model.state_dict().items():
        if name == "prototype_images" or name.endswith(".updates"):
            continue
        name = name.removeprefix("conditions.")
        name = re.sub(r"^prior\.mean\.(\d)\.", r"sigma_mu_generators.\1.sigma.", name)
        name = re.sub(r"^prior\.std\.(\d)\.", r"sigma_mu_generators.\1.mu.", name)
        if match := re.match(r"fusion_flow\.permutation_(\d)", name):
            name = f"fusion_flow.module_list.{order[int(match[1])]}.perm"
            parts.setdefault("fusion_flow", {})[f"{name}_inv".removeprefix("fusion_flow.")] = tensor.argsort()
        else:
            name = re.sub(r"^fusion_flow\.(?!module_list)", "fusion_flow.module_list.3.", name)
        if name.endswith(".permutation"):
            name = name.replace("permutation", "w_perm")
            tensor = F.one_hot(tensor, len(tensor)).float()[:, :, None, None]
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[f"{rest}_inv"] = tensor.transpose(0, 1)
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor.clone()
    return parts


def flat(parts: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{part}.{name}": tensor
        for part, tensors in parts.items()
        if part not in ("optimizer", "epoch")
        for name, tensor in tensors.items()
    }


def without_own(model: VQFlowModel) -> dict[str, Tensor]:
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name != "prototype_images" and not name.endswith(".updates")
    }


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("form", ["file", "parts", "flat"])
def test_an_official_checkpoint_is_read(tmp_path: Path, order: tuple[int, ...], form: str) -> None:
    source, model = stirred(small_model(seed=1)), small_model(seed=2)
    checkpoint: Any = official_checkpoint(source, order)
    if form == "flat":
        checkpoint = flat(checkpoint)
    elif form == "file":
        torch.save(checkpoint, tmp_path / "official.pt")
        checkpoint = tmp_path / "official.pt"
    levels = class_features(2)
    before = model.eval().score_features(levels, normalization="official")
    model.load_official_checkpoint(checkpoint)
    assert_same_state(without_own(model), without_own(source))
    after = model.score_features(levels, normalization="official")
    assert_same_scores(after, source.score_features(levels, normalization="official"))
    assert not torch.equal(after.anomaly_map, before.anomaly_map)


@few
def test_what_belongs_to_the_weights_before_is_forgotten() -> None:
    model = small_model(meta_epochs=1)
    model.fit((class_features(), labels()))
    assert model.calibration is not None and int(model.prototype_images.sum()) == 12
    model.load_official_checkpoint(official_checkpoint(small_model(seed=1)))
    assert model.calibration is None and int(model.prototype_images.sum()) == 0


def changed(name: str, value: Any) -> dict[str, Any]:
    checkpoint = flat(official_checkpoint(small_model(seed=1)))
    if value is None:
        del checkpoint[name]
    else:
        checkpoint[name] = value(checkpoint.get(name))
    return checkpoint


def spoilt(tensor: Tensor) -> Tensor:
    tensor.view(-1)[0] = torch.nan
    return tensor


def doubled(tensor: Tensor) -> Tensor:
    """A matrix with two columns alike."""
    tensor[0] = tensor[1]
    return tensor


W_PERM = "parallel_flows.1.module_list.0.w_perm"
PERM = "fusion_flow.module_list.1.perm"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("cpc_quantizer.embed", None, r"1 tensors are missing \(first: conditions\.cpc_quantizer\.embed\)"),
        (PERM, None, r"1 tensors are missing \(first: fusion_flow\.permutation_1\)"),
        ("upsamplers.9.1.weight", lambda _: torch.zeros(2), r"1 unknown \(first: conditions\.upsamplers\.9\.1\.weight"),
        ("sigma_mu_generators.0.mu.bias", lambda x: x[:-1], r"prior\.std\.0\.bias is \(3,\) in it, and \(4,\) here"),
        ("cpc_quantizer.embed", spoilt, r": cpc_quantizer\.embed holds a NaN or an infinity"),
        ("cpc_quantizer.embed", lambda x: x.numpy(), r"cpc_quantizer\.embed is a ndarray, and no tensor"),
        (W_PERM, lambda x: 0.5 * x, "module_list.0.w_perm is no permutation matrix"),
        (W_PERM, doubled, "module_list.0.w_perm is no permutation matrix"),
        (W_PERM, spoilt, "module_list.0.w_perm holds a NaN or an infinity"),
        (W_PERM, lambda x: x.to_sparse(), "module_list.0.w_perm is no tensor of plain numbers"),
        (W_PERM, lambda x: x[:-1], "module_list.0.w_perm is no permutation matrix"),
        (W_PERM, lambda x: x.sum(), "module_list.0.w_perm is no permutation matrix"),
        (W_PERM, lambda x: torch.eye(5)[:, :, None, None], r"permutation is \(5,\) in it, and \(6,\) here"),
        (PERM, lambda x: torch.zeros_like(x), "module_list.1.perm is no permutation"),
        (PERM, lambda x: x[:-1].argsort().argsort(), r"module_list\.1\.perm"),
        (PERM, lambda x: x[0], "module_list.1.perm is no permutation"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(name: str, value: Any, message: str) -> None:
    model = small_model()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.load_official_checkpoint(changed(name, value))
    assert_same_state(model.state_dict(), before)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    model = small_model()
    with pytest.raises(ValueError, match="there is no checkpoint .*nowhere"):
        model.load_official_checkpoint(tmp_path / "nowhere.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(ValueError, match="text.pt cannot be read as a checkpoint"):
        model.load_official_checkpoint(str(tmp_path / "text.pt"))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="list.pt holds a list, and no checkpoint"):
        model.load_official_checkpoint(tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(ValueError, match=r"empty\.pt does not fit this model: \d+ tensors are missing"):
        model.load_official_checkpoint(tmp_path / "empty.pt")


def test_levels_with_as_many_channels_are_ambiguous_in_an_official_checkpoint() -> None:
    model = small_model(feature_dims=(4, 6, 6, 10))
    with pytest.raises(ValueError, match="of the channels of its levels, 4, 6, 6, two are equal, and then nothing"):
        model.load_official_checkpoint(official_checkpoint(small_model(feature_dims=(4, 6, 6, 10), seed=1)))
    assert small_model(feature_dims=(4, 6, 8, 8)).load_official_checkpoint(
        official_checkpoint(small_model(feature_dims=(4, 6, 8, 8), seed=1))
    ) is None  # fmt: skip


# ---------------------------------------------------------------------------------------------------- scores


# A bias in front of a batch norm has no gradient but rounding.
NO_GRADIENT = re.compile(r"(semantic_mlp|semantic_encoder|feature_mlps\.\d)\.[03]\.bias$")


@pytest.fixture(scope="module")
def trained() -> VQFlowModel:
    """Return a trained model, with thresholds."""
    model = small_model(meta_epochs=2)
    model.fit((class_features(18), labels(18)), calibration=(class_features(24, seed=3), labels(24)))
    return model


pytestmark = few


@pytest.mark.parametrize("kind", ["mul", "add"])
@pytest.mark.parametrize("density", ["full", "latent"])
def test_official_maps_and_scores_are_those_of_the_configuration(trained: VQFlowModel, kind: str, density: str) -> None:
    """They are made of the latents alone, whatever the calibrated ones are made of."""
    model = VQFlowModel(trained.config.replace(map=kind, score_norm="image_max", score_density=density)).eval()
    model.load_state_dict(trained.state_dict())
    levels = class_features(4, seed=5)
    result = model.score_features(levels, normalization="official")
    single = latents_one_by_one(model, levels)
    expected = official_maps([-z.square().mean(-1) / 2 for z, _ in single], model.config.msk_size)[kind]
    for logps, (z, log_det) in zip(result.logps, single, strict=True):
        full = -z.square().mean(-1) / 2 + (log_det / z.shape[-1] if density == "full" else 0)
        torch.testing.assert_close(logps, full - full.amax((1, 2), keepdim=True), rtol=1e-4, atol=1e-4)
    assert torch.equal(result.anomaly_map, expected.maps) and torch.equal(result.image_score, expected.scores)
    assert result.p_value.isnan().all() and result.threshold.isnan().all() and not result.is_anomalous.any()
    assert list(model.official_maps([model_densities(model, levels)]))[0] == kind


def latents_one_by_one(model: VQFlowModel, levels: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return z and log-determinants of each level."""
    with torch.no_grad():
        single = [
            model.latents(model.prepare([level[i : i + 1] for level in levels]), known=True)
            for i in range(len(levels[0]))
        ]
    return [
        (torch.cat([latents.z[level] for latents in single]), torch.cat([latents.log_det[level] for latents in single]))
        for level in range(3)
    ]


def model_densities(model: VQFlowModel, levels: list[Tensor]) -> Any:
    return model.densities(hgad_fast.features.backbone.FeatureMaps.of(model.prepare(levels)), None)


def test_defects_stand_out_and_normal_images_do_not(trained: VQFlowModel) -> None:
    levels = class_features(12, seed=5)
    result = trained.score_features(levels)
    defective = [level.clone() for level in levels]
    for level in defective:
        level[:, :, : level.shape[2] // 2, : level.shape[3] // 2] *= -1.5
    worse = trained.score_features(defective)
    assert worse.image_score.min() > result.image_score.max()
    assert worse.is_anomalous.all() and result.p_value.isfinite().all()
    assert result.anomaly_map.shape == (12, 16, 16) and result.neg_entropy == []
    assert len(result.logps) == 3


def test_scores_do_not_depend_on_company(trained: VQFlowModel) -> None:
    levels = class_features(5, seed=5)
    together = trained.score_features(levels)
    for i in range(5):
        alone = trained.score_features([level[i : i + 1] for level in levels])
        for name in ("anomaly_map", "image_score", "class_id", "p_value", "threshold"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[i]), name


def test_a_prototype_is_given_by_number_or_name_and_changes_the_densities(trained: VQFlowModel) -> None:
    levels = class_features(3, seed=5)
    inferred = trained.score_features(levels)
    same = trained.score_features(levels, inferred.class_id)
    assert_same_scores(same, inferred)
    other = [(int(k) + 1) % 6 for k in inferred.class_id]
    given = trained.score_features(levels, other)
    assert given.class_id.tolist() == other
    named = trained.score_features(levels, [f"prototype {k}" for k in other])
    assert_same_scores(named, given)
    assert all(not torch.equal(a, b) for a, b in zip(given.logps, inferred.logps, strict=True))
    one = trained.score_features(levels, "prototype 2")
    assert one.class_id.tolist() == [2, 2, 2]
    # in training code, too, and without tables
    with torch.no_grad():
        for i, k in enumerate(other):
            single = trained.prepare([level[i : i + 1] for level in levels])
            latents = trained.latents(single, torch.tensor([k]))
            for level, (z, log_det) in enumerate(zip(latents.z, latents.log_det, strict=True)):
                expected = -z[0].square().mean(-1) / 2 + log_det[0] / z.shape[-1]
                torch.testing.assert_close(given.logps[level][i], expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"class 'prototype 6' is unknown; the model knows prototype 0, .*\(0 to 5\)"):
        trained.score_features(levels, "prototype 6")
    with pytest.raises(ValueError, match="class 6 is unknown"):
        trained.score_features(levels, 6)


@pytest.mark.parametrize(
    "name",
    [
        "fusion_flow.subnet_1.conv_t.0.bias",
        "parallel_flows.1.module_list.0.subnet.conv1.bias",
        "prior.std.2.bias",
        "conditions.semantic_mlp.0.bias",
        "conditions.semantic_encoder.0.bias",
        "conditions.upsamplers.0.1.bias",
        "conditions.feature_mlps.3.0.bias",
    ],
)
def test_a_score_that_is_no_number_is_never_normal(trained: VQFlowModel, name: str) -> None:
    """Latents are clamped, and codes are finite whatever chose them: a weight that is broken shows nevertheless."""
    broken = VQFlowModel(trained.config).eval()
    broken.load_state_dict(trained.state_dict())
    broken.calibration = trained.calibration
    with torch.no_grad():
        broken.get_parameter(name).fill_(torch.nan)
    with pytest.raises(ValueError, match="has no score"):
        broken.score_features(class_features(2, seed=5))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_top_level_that_is_not_finite_is_no_number_either(trained: VQFlowModel, value: float) -> None:
    """It only chooses codes, which are finite whatever chose them; the other images keep their bits."""
    levels = trained.prepare(class_features(2, seed=5))
    whole = trained.densities(FeatureMaps.of(levels), None)
    levels[-1] = levels[-1].clone()
    levels[-1][0, 0, 0, 0] = value
    broken = trained.densities(FeatureMaps.of(levels), None)
    for level, expected in zip(broken.logps, whole.logps, strict=True):
        assert level[0].isnan().all() and torch.equal(level[1], expected[1])
    assert trained.log_density(levels).isnan().tolist() == [True, *[False] * (len(levels[0]) - 1)]


def test_features_that_do_not_fit_are_refused(trained: VQFlowModel) -> None:
    levels = class_features(2)
    with pytest.raises(ValueError, match=r"features must be a list of 4 tensors"):
        trained.score_features(levels[:3])
    with pytest.raises(ValueError, match=r"features\[1\] has shape \(2, 5, 8, 8\); expected \(B, 6, h, w\)"):
        trained.score_features([levels[0], levels[1][:, :5], *levels[2:]])
    levels[2][0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"features\[2\] holds a NaN or an infinity"):
        trained.score_features(levels)


@pytest.mark.parametrize(
    "changes",
    [
        {"concat_pos": False},
        {"quantize_type": "naive"},
        {"quantize_type": "naive", "concat_pos": False},
        {"pool_type": "max"},
        {"pool_type": "none"},
        {"prior_std": "signed", "vq_init": "randn0"},
        {"hidden_channels": None, "nll_reduction": "sum", "clip_grad_norm": None, "prior_logdet": False},
        {"feature_levels": 2, "feature_dims": (4, 10), "coupling_layers": (1,)},
    ],
)
def test_every_variant_trains_a_step_and_scores(changes: dict[str, Any]) -> None:
    model = small_model(meta_epochs=1, sub_epochs=1, batch_size=12, **changes)
    levels = class_features()
    if len(model.feature_dims) == 2:
        levels = [levels[0], levels[3]]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.fit((levels, labels()))
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        assert NO_GRADIENT.search(name) or not torch.equal(parameter, before[name]), name
    result = model.score_features(levels)
    assert result.image_score.isfinite().all() and result.anomaly_map.shape == (12, 16, 16)
    assert len(result.logps) == model.density_levels == len(levels) - 1
    assert model.preparation == {"none": "", "max": "max-pooled"}.get(model.config.pool_type, "avg-pooled")


def test_pooling_counts_the_zeros_around_the_map() -> None:
    levels = [torch.ones(1, c, side, side) for c, side in zip(DIMS, (16, 8, 4, 2), strict=True)]
    average, largest, none = (small_model(pool_type=kind).prepare(levels) for kind in ("avg", "max", "none"))
    assert [level.shape[2] for level in average] == [level.shape[2] for level in largest] == [8, 4, 2, 2]
    corner, edge, inside = average[0][0, 0, 0, 0], average[0][0, 0, 0, 1], average[0][0, 0, 1, 1]
    assert [float(x) for x in (corner, edge, inside)] == pytest.approx([4 / 9, 2 / 3, 1])
    assert torch.equal(largest[0], torch.ones(1, 4, 8, 8)) and none[0] is levels[0]
    assert average[3] is levels[3]


# ---------------------------------------------------------------------------------------------------- classes, purity


def test_class_names_are_those_that_were_trained_on() -> None:
    model = small_model(class_names=("a", "b", "c"))
    model.adopt_classes(("ash", "oak"), "woods")
    assert model.config.class_names == ("ash", "oak") and model.config.n_classes == 2
    assert model.prototype_images.shape == (6, 2)
    model.prototype_images[3, 1] = 7  # trained
    model.adopt_classes(("cable", "nut", "tile"), "others")  # they calibrate, or are scored
    assert model.config.class_names == ("ash", "oak") and model.prototype_images[3].tolist() == [0, 7]
    assert model.groups == tuple(f"prototype {k}" for k in range(6))


def test_it_is_described_with_what_its_prototypes_hold() -> None:
    model = small_model(class_names=("ash", "oak", "yew"))
    assert math.isnan(model.purity)
    facts = model.describe()
    assert facts == {"coupling layers": "1, 2, 1", "patterns a level": 8, "prototypes": 6}
    model.prototype_images[1] = torch.tensor([3, 1, 0])
    model.prototype_images[4] = torch.tensor([0, 0, 4])
    assert model.purity == 7 / 8
    facts = model.describe()
    assert facts["prototypes in use"] == "2 of 6"
    assert facts["images a prototype"] == "1: 4 (ash 75%), 4: 4 (yew 100%)"
    assert facts["purity"].startswith("87.5% of the training images")


# ---------------------------------------------------------------------------------------------------- files


def test_a_saved_model_is_the_same_model(trained: VQFlowModel, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    trained.save(path)
    levels = class_features(4, seed=5)
    for loaded in (VQFlowModel.load(path, device="cpu"), hgad_fast.load(path)):
        assert type(loaded) is VQFlowModel and loaded.config == trained.config
        assert_same_state(loaded.state_dict(), trained.state_dict())
        assert torch.equal(loaded.prototype_images, trained.prototype_images) and loaded.purity == trained.purity
        assert_same_state(loaded.calibration.tensors(), trained.calibration.tensors())
        assert_same_scores(loaded.score_features(levels), trained.score_features(levels))
        official = (m.score_features(levels, normalization="official") for m in (loaded, trained))
        assert_same_scores(*official)
    with pytest.raises(ValueError, match="holds a model of the method 'vqflow', and HGADModel is of another"):
        HGADModel.load(path)


# ---------------------------------------------------------------------------------------------------- images


def image_config(**changes: Any) -> VQFlowConfig:
    backbone = {"backbone_arch": "test_efficientnet", "backbone_weights": None, "feature_dims": None}
    return VQFlowConfig(**SMALL | backbone | {"out_indices": (1, 2, 3, 4), "meta_epochs": 1, "sub_epochs": 1} | changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of images of two sizes."""
    root, random = tmp_path_factory.mktemp("woods"), np.random.default_rng(0)
    for name, level in (("ash", 60), ("oak", 180)):
        folder = root / name / "train" / "good"
        folder.mkdir(parents=True)
        for i in range(8):
            pixels = level + random.normal(0, 20, (50 + 10 * (i % 2), 70, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def seeing(root: Path) -> VQFlowModel:
    """Return a model that was trained on images."""
    model = VQFlowModel(image_config(calibration_fraction=0.3))
    model.fit(root)
    return model


def test_images_are_scored_as_their_features(seeing: VQFlowModel, root: Path) -> None:
    assert seeing.config.class_names == ("ash", "oak") and int(seeing.prototype_images.sum()) > 0
    assert seeing.feature_dims == [24, 32, 48, 64]
    files = sorted((root / "oak" / "train" / "good").glob("*.png"))[:2]
    result = seeing.score(files)
    assert [tuple(m.shape) for m in result.anomaly_map] == [(50, 70), (60, 70)]
    square = torch.rand(2, 3, 64, 64)
    features = [
        seeing.encoder(seeing.encoder.normalize(image[None]), fast=True) for image in square
    ]  # each by itself, as scoring does
    levels = [torch.cat(level) for level in zip(*features, strict=True)]
    assert torch.equal(seeing.score_features(levels).image_score, seeing.score(square).image_score)
    official = seeing.score(square, normalization="official", map_size="seen")
    expected = seeing.score_features(levels, normalization="official")
    assert torch.equal(official.image_score, expected.image_score)
    together = seeing.score(square, throughput=True)
    torch.testing.assert_close(together.image_score, seeing.score(square).image_score, rtol=1e-3, atol=1e-4)


def test_a_scorer_scores_what_the_model_does(seeing: VQFlowModel, root: Path, tmp_path: Path) -> None:
    seeing.save(tmp_path / "model.safetensors")
    scorer = Scorer(tmp_path / "model.safetensors", frame_size=(50, 70))
    for file in sorted(root.rglob("*.png"))[:2]:
        frame, result = scorer(read_image(file)), seeing.score(file)
        assert frame.score == float(result.image_score) and frame.class_id == int(result.class_id)
        assert frame.class_name == f"prototype {frame.class_id}"
        assert frame.anomaly_map.shape == result.anomaly_map.shape[1:]
    fixed = Scorer(seeing, class_id="prototype 3")
    assert fixed(read_image(file)).class_id == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tiles": "always"}, "tiles is 'always': the method 'vqflow' looks at a feature map as a whole"),
        ({"img_size": 96}, "img_size is 96: the method 'vqflow' looks at a feature map as a whole"),
        ({"img_size": "native"}, "img_size is 'native': the method 'vqflow'"),
    ],
)
def test_what_takes_pixels_one_by_one_is_refused(seeing: VQFlowModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        seeing.score(torch.rand(3, 64, 64), **options)


class OwnEncoder(nn.Module):
    """Four stages of a network that the user brings."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4, 4)
        self.stages = nn.ModuleList(nn.Conv2d(a, b, 2, 2) for a, b in zip(DIMS[:-1], DIMS[1:], strict=True))

    def normalize(self, images: Tensor) -> Tensor:
        return images - 0.5

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [self.stem(images)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps


def test_an_encoder_of_the_users_own(root: Path) -> None:
    model = small_model(meta_epochs=1, sub_epochs=1)
    model.encoder = OwnEncoder().eval().requires_grad_(False)
    model.fit(root, calibration=root)
    image = torch.rand(3, 64, 64)
    result = model.score(image)
    with torch.no_grad():
        features = model.encoder(model.encoder.normalize(image[None]))
    assert torch.equal(result.image_score, model.score_features(features).image_score)
    before = {name: tensor.clone() for name, tensor in model.encoder.state_dict().items()}
    levels = model.prepare(class_features())
    Step(model, Processes())([[level[i] for level in levels] for i in range(6)], labels(6), 1, 1e-2)
    assert_same_state(model.encoder.state_dict(), before)


def test_variants_of_an_ablation_have_one_fault_each() -> None:
    config = small_config()
    variants = VQFlowModel.variants(config)
    assert variants["vqflow"] == config and list(VQFlowModel.variants(config, ["random-codes"])) == ["random-codes"]
    assert variants["random-codes"].vq_init == "randn0" and not variants["no-prior-logdet"].prior_logdet
    with pytest.raises(ValueError, match=r"there is no variant 'none'; there are vqflow, random-codes, "):
        VQFlowModel.variants(config, ["none"])


def test_images_have_their_scores_under_autocast_too(seeing: VQFlowModel, root: Path) -> None:
    """The backbone of a score is as exact as the rest; of images alone, in a batch, and in a training."""
    images = torch.rand(2, 3, 64, 64)
    expected = seeing.score(images), seeing.score(images, throughput=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual = seeing.score(images), seeing.score(images, throughput=True)
        trained = VQFlowModel(image_config(calibration_fraction=0.3))
        trained.fit(root)
    for one, other in zip(actual, expected, strict=True):
        assert_same_scores(one, other)
    assert_same_state(trained.state_dict(), seeing.state_dict())


def test_many_prototypes_are_not_listed_one_by_one() -> None:
    model = small_model(n_prototypes=12)
    with pytest.raises(ValueError, match=r"knows prototype 0, prototype 1, \.\.\., prototype 11 \(0 to 11\)"):
        model.score_features(class_features(2), 12, normalization="official")
