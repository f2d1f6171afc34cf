"""Every setting is checked where it is made, and survives JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from hgad_fast import GaussianConfig, HGADConfig, VQFlowConfig
from hgad_fast.models.config import Config
from hgad_fast.models.fields import field_table

COUNTS = (
    "n_classes",
    "n_intra_centers",
    "feature_levels",
    "coupling_layers",
    "img_size",
    "msk_size",
    "meta_epochs",
    "sub_epochs",
    "batch_size",
    "pos_embed_dim",
    "grid_stride",
)
NUMBERS = ("clamp_alpha", "lambda1", "lambda2", "label_smoothing", "lr", "calibration_fraction")
CHOICES = ("flow_arch", "fusion", "feature_scaling", "feature_mode", "precision", "memory")
NEITHER_NUMBER_NOR_NAME = (
    b"3",
    {},
    {3},
    object(),
    math.nan,
    math.inf,
    -math.inf,
    True,
    np.bool_(True),
    np.array([1, 2]),
)

BAD = {
    **dict.fromkeys(COUNTS, (None, "3", 0, -1, 2.0, np.float32(3), (3,))),
    **dict.fromkeys(NUMBERS, (None, "1", -1, -1e-9, 10**400, -(10**400), (1.0,), 1j)),
    **dict.fromkeys(CHOICES, (None, "", "FP32", 3, ("auto",))),
    "seed": (None, "0", -1, 2**63, 0.0, (0,)),
    "accumulate": (None, "2", 0, -1, 2.0, 9, (2,)),
    "clip_grad_norm": ("1", 0, -1, 10**400, (1.0,), 1j),
    "pixels_per_step": ("64", 0, -1, 64.0, (64,), 0.0, 1.0, -0.5),
    "map_levels": ("1", 0, -1, 4, 1.0, (1,)),
    "checkpoint_every": (None, "0", -1, 4.0, (4,)),
    "white_level": (None, "4095", 0, -1, 65536, 4095.0, (4095,)),
    "center_crop": (None, "False", 0, 1, 1.0),
    "class_names": (3, "abc", (), ("a", "b"), ("a", "b", "b"), ("a", "b", 3), ("a", "b", ["c"]), ("a", "b", "")),
    "backbone_arch": ("", 3, ("tf_efficientnet_b6",)),
    "backbone_weights": ("", 3, ("w.pth",)),
    "feature_dims": (3, "8", (), (8, 8), (8, 8, 1), (8, 8, 8.0), (8, 8, "8"), (8, 8, True), (8, 8, -8)),
    "loss_terms": (None, "L_g", (), ("L_mi",), ("L_mi", "L_g"), ("L_g", "L_g"), ("L_g", "loss")),
    "out_indices": (None, 3, "3", (), ("3",), (3.0,), (True,), ((3,),), (2, 3)),
}
BAD["pos_embed_dim"] += (2, 6)
BAD["label_smoothing"] += (1, 1.5)
BAD["calibration_fraction"] += (1, 1.5)
BAD["lr"] += (0,)
BAD["clamp_alpha"] += (0,)


def bad_settings() -> list:
    assert BAD.keys() == {field.name for field in dataclasses.fields(HGADConfig)}
    settings = []
    for name, values in BAD.items():
        for value in (*values, *NEITHER_NUMBER_NOR_NAME):
            if not (name == "center_crop" and isinstance(value, (bool, np.bool_))):
                settings.append(pytest.param(name, value, id=f"{name}-{str(value)[:20]}"))
    return settings


@pytest.mark.parametrize(("name", "value"), bad_settings())
def test_a_bad_value_is_named_with_what_is_allowed(name, value):
    others = {"n_classes": 3} if name == "class_names" else {}
    with pytest.raises(ValueError, match=rf"^HGADConfig\.{name} is .+; allowed: .+") as error:
        HGADConfig(**{name: value}, **others)
    if isinstance(value, (str, int, float)):
        assert repr(value) in str(error.value)


@pytest.mark.parametrize("indices", [(3, 1), (3, 3), (-1, -2), (-1, 1)])
def test_stages_out_of_order_are_refused(indices):
    # timm lists the channels in the order asked for, but returns the maps in the order of the network
    with pytest.raises(ValueError, match=r"HGADConfig\.out_indices .* increasing order"):
        HGADConfig(feature_mode="stages", feature_levels=2, out_indices=indices)


def test_fields_that_must_fit_each_other():
    with pytest.raises(ValueError, match=r"HGADConfig\.out_indices is \(1, 2\); allowed: one stage"):
        HGADConfig(out_indices=(1, 2))
    with pytest.raises(ValueError, match=r"HGADConfig\.out_indices is \(1, 2\); allowed: as many stages as"):
        HGADConfig(feature_mode="stages", out_indices=(1, 2))
    with pytest.raises(ValueError, match=r"HGADConfig\.feature_dims is None; allowed: .* backbone_arch is None"):
        HGADConfig(backbone_arch=None)
    HGADConfig(feature_mode="stages", out_indices=(1, 2), feature_levels=2)
    HGADConfig(backbone_arch=None, feature_dims=(8, 16, 24), out_indices=(1, 2))


def test_numpy_values_lists_and_paths_are_taken_as_plain_ones():
    config = HGADConfig(
        n_classes=np.int64(2),
        class_names=np.array(["a", "b"]),
        feature_dims=[np.int32(8), np.uint8(16)],
        feature_levels=2,
        out_indices=range(3, 4),
        lr=np.float64(1e-3),
        lambda2=100,
        center_crop=np.bool_(True),
        backbone_weights=Path("weights.pth"),
        precision=np.str_("tf32"),
    )
    assert config.n_classes == 2 and type(config.n_classes) is int
    assert config.class_names == ("a", "b") and all(type(name) is str for name in config.class_names)
    assert config.feature_dims == (8, 16) and all(type(c) is int for c in config.feature_dims)
    assert config.out_indices == (3,)
    assert (config.lr, config.lambda2) == (1e-3, 100.0) and type(config.lr) is type(config.lambda2) is float
    assert config.center_crop is True
    assert config.backbone_weights == "weights.pth"
    assert config.precision == "tf32"


def test_json_round_trip():
    config = HGADConfig(
        n_classes=2,
        class_names=["Schraube ä", 'a "b"'],
        feature_dims=[8, 8, 8],
        lr=np.float32(2e-4),
        lambda1=1,
        seed=2**63 - 1,
        calibration_fraction=1 / 3,
        memory="reversible",
    )
    assert HGADConfig.from_json(config.to_json()) == config
    assert HGADConfig.from_json(HGADConfig().to_json()) == HGADConfig()
    assert HGADConfig(lambda1=1).to_json() == HGADConfig(lambda1=1.0).to_json()
    assert json.loads(config.to_json())["class_names"] == ["Schraube ä", 'a "b"']


def test_fields_that_were_added_are_in_json_where_they_differ():
    """So that files of before them are the files of today: they compare and hash alike."""
    added = {"grid_stride": 8, "white_level": 4095, "feature_scaling": "std", "pixels_per_step": 0.5, "map_levels": 2}
    assert HGADConfig.added.keys() == added.keys()
    assert not json.loads(HGADConfig().to_json()).keys() & added.keys()
    config = HGADConfig(**added)
    assert {name: json.loads(config.to_json())[name] for name in added} == added
    assert HGADConfig.from_json(config.to_json()) == config
    assert config.identity() != HGADConfig().identity()
    assert HGADConfig(map_levels=2).identity() == HGADConfig().identity()  # scoring alone reads it


def test_presets():
    official = HGADConfig.preset("official", n_classes=5)
    assert official == HGADConfig(n_classes=5, fusion="product", center_crop=True)
    assert HGADConfig().fusion == "standardised"
    fast = HGADConfig.preset("fast", seed=3)
    assert (fast.seed, fast.pixels_per_step, fast.feature_scaling, fast.coupling_layers) == (3, 0.25, "std", 8)
    assert fast.replace(lr=2e-3).lr == 2e-3
    with pytest.raises(ValueError, match="HGADConfig has no preset 'slow'; there are: official, fast"):
        HGADConfig.preset("slow")


def test_one_class_has_no_entropy_map():
    for fusion in ("product", "standardised", "likelihood"):
        HGADConfig(n_classes=1, fusion=fusion)
    HGADConfig(n_classes=2, fusion="entropy")
    with pytest.raises(
        ValueError, match="fusion is 'entropy'; allowed: another one with n_classes=1: the posterior of one"
    ):
        HGADConfig(n_classes=1, fusion="entropy")


@pytest.mark.parametrize(
    ("config", "slip", "near"),
    [(HGADConfig, "image_size", "img_size"), (GaussianConfig, "gruping", "grouping"), (VQFlowConfig, "LR", None)],
)
def test_a_slip_of_the_pen_gets_the_field_that_is_near(config, slip, near):
    with pytest.raises(ValueError, match=f"{config.__name__} has no field {slip!r}; it has n_classes, ") as error:
        config.from_fields({slip: 3})
    assert str(error.value).endswith(f". Did you mean {near!r}?" if near else "pro")


def test_values_beyond_all_measure_are_refused_before_anything_is_made():
    for config, field, value in (
        (HGADConfig, "n_classes", 10**9),
        (HGADConfig, "msk_size", 65537),
        (HGADConfig, "coupling_layers", 10**6),
        (VQFlowConfig, "n_patterns", 10**7),
        (GaussianConfig, "coarse_dim", 100_000),
    ):
        with pytest.raises(
            ValueError, match=rf"{config.__name__}\.{field} is {value}; allowed: a whole number from \d to"
        ):
            config(**{field: value})
    long = "x" * 10**6
    with pytest.raises(ValueError, match=r"HGADConfig\.fusion is 'xxx.* \.\.\. x+'; allowed: 'product'") as error:
        HGADConfig(fusion=long)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("grids", [3, ((4, 4),) * 3, (((4, 4),),), (((4, 0),),) * 3, (((4, 4), (4, 4)),) * 3])
def test_grids_of_other_groups_are_refused(grids):
    settings = {"n_classes": 3, "backbone_arch": None, "feature_dims": (4,)}
    GaussianConfig(**settings, grids=(((4, 5),),) * 3)
    GaussianConfig(**settings, grouping="one", grids=[[[4, 5]]])
    with pytest.raises(
        ValueError, match=r"GaussianConfig\.grids is .*; allowed: for each of 3 groups \(grouping='class'"
    ):
        GaussianConfig(**settings, grids=grids)


def test_squares_are_a_setting_of_the_gaussian_alone():
    """Files of before it are the files of today."""
    assert not GaussianConfig().square and "square" not in json.loads(GaussianConfig().to_json())
    config = GaussianConfig(square=np.bool_(True))
    assert config.square is True and GaussianConfig.from_json(config.to_json()) == config
    assert config.identity() != GaussianConfig().identity()
    for value in (None, "True", 1):
        with pytest.raises(ValueError, match=r"GaussianConfig\.square is .*; allowed: True or False"):
            GaussianConfig(square=value)
    assert not HGADConfig().square and VQFlowConfig().square
    for other in (HGADConfig, VQFlowConfig):
        with pytest.raises(ValueError, match="has no field 'square'"):
            other.from_fields({"square": True})


def test_every_field_is_listed_with_its_default_and_its_meaning():
    configs = (HGADConfig, VQFlowConfig, GaussianConfig)
    shared, *own = field_table(Config, configs).split("\n\n")[1:]
    for part, config in zip(own, configs, strict=True):
        title, *lines = part.splitlines()
        assert title == config.method
        listed = {line.split()[0]: line for line in (*shared.splitlines()[1:], *lines)}
        for field in dataclasses.fields(config):
            _, default, meaning = re.fullmatch(r"  (\S+) +(\[.*?\]|\".*?\"|\S+) +(\S.*)", listed[field.name]).groups()
            assert json.loads(default) == json.loads(json.dumps(field.default)) and len(meaning) > 5


def test_replace_checks_again_and_leaves_the_original():
    config = HGADConfig()
    assert config.replace(precision="bf16").precision == "bf16"
    assert config.precision == "fp32"
    with pytest.raises(ValueError, match=r"HGADConfig\.precision is 'fp16'"):
        config.replace(precision="fp16")


def test_class_names_are_made_up_where_none_are_given():
    assert HGADConfig(n_classes=2).names == ("class 0", "class 1")
    assert HGADConfig(n_classes=2, class_names=["nut", "bolt"]).names == ("nut", "bolt")
