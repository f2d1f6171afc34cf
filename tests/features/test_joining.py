"""Stages of a network: groups of layers, joined on one grid, of several networks, and transformers at any size."""

from __future__ import annotations

import json
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from rounding import SAME_IN_FLOAT64
from torch import Tensor

import hgad_fast
from hgad_fast import HGADConfig, HGADModel
from hgad_fast.features import backbone, joining, preprocess, tiles
from hgad_fast.features.backbone import Backbone
from hgad_fast.features.composite import CompositeBackbone, make_backbone
from hgad_fast.features.extract import _Extractor
from hgad_fast.scoring.maps import cells_on_map

VIT = {"backbone_arch": "test_vit", "out_indices": ((0, 1), (2, 3))}
BOTH = {
    "backbone_arch": "test_efficientnet+test_vit",
    "feature_levels": 2,
    "out_indices": ((1, 2, 3), ((0, 1), 2)),
}


def config(**settings) -> HGADConfig:
    """Settings with joined stages, by default those of strides 8, 16 and 32 of a small network."""
    return HGADConfig(
        **{
            "backbone_arch": "test_efficientnet",
            "backbone_weights": None,
            "feature_mode": "joined",
            "feature_levels": 1,
            "out_indices": (2, 3, 4),
            "img_size": 64,
            "msk_size": 64,
            "n_classes": 2,
            "coupling_layers": 1,
            "pos_embed_dim": 4,
        }
        | settings
    )


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=SAME_IN_FLOAT64, atol=SAME_IN_FLOAT64)


# ---------------------------------------------------------------------------------------------------- joined


def cell_means(x: Tensor, h: int, w: int) -> Tensor:
    """Means over the rows i H / h to (i + 1) H / h, rounded outwards, and the columns likewise."""
    rows, columns = x.shape[2:]
    return torch.stack(
        [
            torch.stack(
                [
                    x[:, :, i * rows // h : -(-(i + 1) * rows // h), j * columns // w : -(-(j + 1) * columns // w)]
                    .mean((2, 3))
                    for j in range(w)
                ],
                -1,
            )
            for i in range(h)
        ],
        -2,
    )  # fmt: skip


def interpolated(x: Tensor, h: int, w: int) -> Tensor:
    """Bilinear interpolation at the centres of cells, by matrices along each axis."""

    def matrix(n: int, resized: int) -> Tensor:
        at = ((torch.arange(resized) + 0.5) * n / resized - 0.5).clamp(0, n - 1)
        return (1 - (at[:, None] - torch.arange(n)).abs()).clamp(min=0)

    return matrix(x.shape[2], h) @ x @ matrix(x.shape[3], w).T


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("size", [(64, 96), (100, 76)])
@pytest.mark.parametrize(("grid_stride", "grid"), [(16, 1), (12, 0), (1, 0), (24, 1), (25, 2), (1000, 2)])
def test_joined_stages_are_those_of_one_pass_on_one_grid(size, grid_stride, grid):
    encoder = Backbone(config(grid_stride=grid_stride))
    images = torch.randn(2, 3, *size)
    stages = encoder.net(images)
    assert encoder.net.feature_info.reduction() == [8, 16, 32]
    h, w = stages[grid].shape[2:]
    expected = torch.cat(
        [
            x if stage == grid else cell_means(x, h, w) if stage < grid else interpolated(x, h, w)
            for stage, x in enumerate(stages)
        ],
        1,
    )
    (actual,) = encoder(images)
    assert_same(actual, expected)
    assert encoder.stage_dims == (tuple(x.shape[1] for x in stages),)
    assert encoder.feature_dims == (sum(encoder.stage_dims[0]),) and encoder.fine_stages == (grid + 1,)
    assert encoder.strides == [8 << grid]
    assert encoder.feature_values(*size) == actual[0].numel()
    (image_pass,) = encoder.passes(*size)
    assert image_pass.levels == [(h, w)]


@pytest.mark.parametrize(
    ("settings", "dims"),
    [
        ({"feature_mode": "image_pyramid", "feature_levels": 2, "out_indices": (2,)}, ((32,), (32,))),
        ({"feature_mode": "stages", "feature_levels": 2, "out_indices": (1, 2)}, ((24,), (32,))),
        ({"out_indices": (1, 2)}, ((24, 32),)),
    ],
)
def test_channels_of_the_stages_of_each_level_are_told(settings, dims):
    assert Backbone(config(**settings)).stage_dims == dims


def three_by_two(monkeypatch) -> None:
    """Cut every image in three by two tiles."""
    monkeypatch.setattr(backbone, "ALWAYS_WHOLE", 0)
    monkeypatch.setattr(preprocess, "ALWAYS_WHOLE", 0)

    def tiling(size, cells, stride, halo, max_pixels):
        return tiles.cuts(size[0], cells[0], 3, stride, halo), tiles.cuts(size[1], cells[1], 2, stride, halo)

    monkeypatch.setattr(tiles, "tiling", tiling)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("out_indices", [(1, 2), (0, 1, 2), ((1,), 2)])
def test_tiles_of_joined_stages_are_the_whole(monkeypatch, out_indices):
    encoder = Backbone(config(backbone_arch="resnet18", out_indices=out_indices))
    three_by_two(monkeypatch)
    image = torch.rand(3, 489, 91)
    (image_pass,) = encoder.passes(489, 91)
    assert encoder.is_local and len(image_pass.rows) > 1
    maps = encoder.feature_maps(image)
    (level,) = maps.whole()
    assert maps.sizes == [level.shape[2:]]
    assert [piece[:3] for piece in maps.pieces()] == [(0, 0, 0)]
    assert_same(level, encoder(encoder.normalize(image[None]))[0])


def test_stages_in_tiles_are_joined_to_the_bit_as_they_are_whole():
    generator = torch.Generator().manual_seed(0)
    stages = [torch.randn(1, c, n, n + 3, generator=generator) for c, n in ((5, 31), (7, 16), (9, 8))]
    whole = joining.joined(stages, [8, 16, 32], 1)
    other_layout = [x.contiguous(memory_format=torch.channels_last) for x in stages]
    assert torch.equal(joining.joined(other_layout, [8, 16, 32], 1), whole)


@pytest.mark.parametrize(
    "sizes",
    [
        ((64, 32), (32, 16), (16, 8)),
        ((63, 31), (32, 16), (16, 8)),
        ((7, 9), (3, 3), (2, 1)),
        ((5, 5), (5, 5), (5, 5)),
        ((9, 8), (3, 8), (1, 8)),
        ((13, 11), (64, 100), (3, 7)),
    ],
)
@pytest.mark.parametrize("grid", [0, 1, 2])
def test_a_graph_joins_stages_as_well(sizes, grid):
    """Where the interpolation reads, up to 64 positions from the start, differs by some roundings of a coordinate."""
    generator = torch.Generator().manual_seed(0)
    stages = [torch.randn(2, c, *size, generator=generator) for c, size in zip((3, 4, 5), sizes, strict=True)]
    actual = joining.JoiningGraph(sizes, [8, 16, 32], grid)(stages)
    close = 16 * 64 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(actual, joining.joined(stages, [8, 16, 32], grid), rtol=close, atol=close)


def test_memory_counts_the_stages_that_are_joined():
    size = (2048, 2048)
    joined = Backbone(config(out_indices=(0, 1, 2), grid_stride=8))
    stages = Backbone(config(feature_mode="stages", out_indices=(0, 1, 2), feature_levels=3))
    held = sum(4 * channels * (2048 // stride) ** 2 for channels, stride in zip((16, 24, 32), (2, 4, 8), strict=True))
    assert joined.stage_strides == [2, 4, 8] and joined.stage_channels == [16, 24, 32]
    assert joined.working_set(*size) >= stages.working_set(*size) + held


def test_the_grid_is_part_of_the_key_of_cached_features_where_stages_are_joined():
    def key(**settings) -> dict:
        return _Extractor(HGADModel(config(**settings)), torch.float32).key()

    joined = key()
    assert joined["grid_stride"] == 16 and key(grid_stride=8) != joined
    assert key(out_indices=((2,), 3, 4)) != joined
    assert json.dumps(key(out_indices=((2,), 3, 4)))
    stages = {"feature_mode": "stages", "feature_levels": 3}
    assert key(**stages, grid_stride=8) == key(**stages)
    assert key(**stages).keys() == joined.keys() - {"grid_stride"}  # caches of earlier versions stay


def test_cells_are_those_of_the_grid():
    assert cells_on_map(HGADModel(config(img_size=100)), 200) == 7
    assert cells_on_map(HGADModel(config(img_size=100, grid_stride=32)), 200) == 4
    assert cells_on_map(HGADModel(config(**VIT, img_size=100)), 200) == 6  # 96 pixels


# ---------------------------------------------------------------------------------------------------- groups


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("mode", ["stages", "joined"])
def test_layers_of_a_group_are_averaged_and_normalised(mode):
    whole = timm.create_model("test_vit", pretrained=False, dynamic_img_size=True).eval()
    encoder = Backbone(config(**VIT, feature_mode=mode, feature_levels=2 if mode == "stages" else 1))
    encoder.net.model.load_state_dict(whole.state_dict(), strict=False)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        layers = whole.forward_intermediates(images, indices=[0, 1, 2, 3], intermediates_only=True, norm=False)
    means = [(layers[i] + layers[i + 1]) / 2 for i in (0, 2)]
    expected = [x / x.square().sum(1, keepdim=True).sqrt() for x in means]
    features = encoder(images)
    if mode == "joined":
        (joined,) = features
        assert encoder.stage_dims == ((64, 64),) and encoder.fine_stages == (2,)
        features = list(joined.split(64, dim=1))
    for actual, x in zip(features, expected, strict=True):
        assert_same(actual, x)


def test_a_group_is_of_layers_of_one_size():
    with pytest.raises(ValueError, match=r"out_indices: the layers \(1, 2\) of test_efficientnet .*: 24, 32; group"):
        Backbone(config(out_indices=((1, 2), 3)))
    with pytest.raises(ValueError, match=r"out_indices: the layers \(0, 1\) of resnet18 .* stride differ: 2, 4"):
        Backbone(config(backbone_arch="resnet18", out_indices=((0, 1), 3)))


def test_features_of_a_group_do_not_depend_on_the_batch():
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(3, 96, 5, 7, generator=generator) for _ in range(2)]
    (together,) = joining.stages_of(layers, ((0, 1),))
    for i in range(3):
        (alone,) = joining.stages_of([x[i : i + 1] for x in layers], ((0, 1),))
        assert torch.equal(alone[0], together[i])


# ---------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feature_levels": 2}, r"feature_levels is 2; allowed: 1 with feature_mode='joined'"),
        ({"grid_stride": 0}, r"grid_stride is 0; allowed: a whole number from 1"),
        ({"out_indices": ((2, 3), (3, 4))}, r"out_indices is .*; allowed: a tuple of whole numbers in increasing"),
        ({"out_indices": (2, (), 4)}, r"out_indices is .*; allowed: a tuple of whole numbers in increasing"),
        ({"out_indices": ((2, (3,)), 4)}, r"out_indices is .*; allowed: a tuple of whole numbers in increasing"),
        ({"out_indices": ((2, 3),), "feature_mode": "image_pyramid"}, r"out_indices is .*; allowed: one stage"),
        ({"out_indices": ((2, 3),), "feature_mode": "stages", "feature_levels": 2}, "out_indices is .* as many stages"),
        (BOTH | {"feature_levels": 1}, r"feature_levels is 1; allowed: 2 with feature_mode='joined'"),
        (BOTH | {"feature_mode": "stages"}, r"feature_mode is 'stages'; allowed: 'joined' with several backbones"),
        (BOTH | {"out_indices": (1, 2)}, r"out_indices is \(1, 2\); allowed: 2 tuples, one for each backbone"),
        (BOTH | {"out_indices": ((1, 2),)}, r"out_indices is .*; allowed: 2 tuples, one for each backbone"),
        (BOTH | {"backbone_weights": "a.pth"}, r"backbone_weights is 'a.pth'; allowed: .* one for each backbone"),
        (BOTH | {"backbone_weights": "a.pth+"}, r"backbone_weights is 'a.pth\+'; allowed: .* one for each backbone"),
        (BOTH | {"backbone_arch": "test_vit+"}, r"backbone_arch is 'test_vit\+'; allowed: a timm model, or several"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=rf"^HGADConfig\.{message}"):
        config(**settings)


@pytest.mark.parametrize("settings", [{"grid_stride": 8}, VIT, BOTH])
def test_settings_survive_json(settings):
    assert HGADConfig.from_json(config(**settings).to_json()) == config(**settings)


# ---------------------------------------------------------------------------------------------------- any size


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("size", "resized"), [((64, 96), (64, 96)), ((71, 72), (64, 80)), ((90, 5), (96, 16)), ((160, 160), (160, 160))]
)
def test_a_transformer_sees_the_nearest_multiples_of_its_patch(size, resized):
    encoder = Backbone(config(**VIT, feature_mode="stages", feature_levels=2))
    images = torch.randn(1, 3, *size)
    features = encoder(images)
    expected = encoder(F.interpolate(images, resized, mode="bilinear", align_corners=True))
    assert [x.shape[2:] for x in features] == [(resized[0] // 16, resized[1] // 16)] * 2
    for actual, x in zip(features, expected, strict=True):
        assert_same(actual, x)
    assert encoder.feature_values(*size) == sum(x.numel() for x in features)


@pytest.mark.usefixtures("float64")
def test_a_transformer_at_the_size_of_its_weights_is_timms():
    torch.manual_seed(0)
    net = timm.create_model("test_vit", pretrained=False, features_only=True, out_indices=(1,)).eval()
    encoder = Backbone(config(backbone_arch="test_vit", out_indices=(1,)))
    encoder.net.load_state_dict(net.state_dict())  # the size of its position embedding too
    images = torch.randn(1, 3, 160, 160)
    assert_same(encoder(images)[0], net(images)[0])


@pytest.mark.parametrize("arch", ["test_vit", "test_vit3"])
def test_tiles_of_a_transformer_say_that_they_differ(monkeypatch, arch):
    """Untrained attention, too, whose share in the features can be below all rounding."""
    model = HGADModel(config(backbone_arch=arch, out_indices=(1,), img_size="native"))
    assert not model.encoder.is_local
    three_by_two(monkeypatch)
    with pytest.warns(UserWarning, match=f"{arch} looks at the whole image, so tiles"):
        assert preprocess.may_cut(model, model.config, (200, 200), tiles="always")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not preprocess.may_cut(model, model.config, (200, 200))


# ---------------------------------------------------------------------------------------------------- several


@pytest.mark.usefixtures("float64")
def test_each_of_several_backbones_gives_one_level():
    encoder = make_backbone(config(**BOTH))
    assert isinstance(encoder, CompositeBackbone)
    image = torch.rand(3, 70, 93)
    first, second = encoder.members
    statistics = zip(encoder.members, ((0.485, 0.229), (0.5, 0.5)), strict=True)
    assert all(float(member.mean[0]) == mean and float(member.std[0]) == std for member, (mean, std) in statistics)
    expected = [*first((image[None] - first.mean) / first.std), *second((image[None] - second.mean) / second.std)]
    assert encoder.feature_dims == (104, 128) and encoder.stage_dims == ((24, 32, 48), (64, 64))
    assert encoder.fine_stages == (*first.fine_stages, *second.fine_stages)
    assert encoder.strides == [16, 16] and encoder.cells(70) == 5
    maps = encoder.feature_maps(image, cut=False)
    assert maps.sizes == [x.shape[2:] for x in expected]
    assert encoder.feature_values(70, 93) == sum(x.numel() for x in expected)
    for levels in (encoder(encoder.normalize(image[None])), maps.whole()):
        for actual, x in zip(levels, expected, strict=True):
            assert_same(actual, x)


@pytest.mark.usefixtures("float64")
def test_tiles_of_several_local_backbones_are_the_whole(monkeypatch):
    out_indices = ((1, 2), (0, 1))
    encoder = make_backbone(config(backbone_arch="resnet18+test_resnet", feature_levels=2, out_indices=out_indices))
    whole = encoder.feature_maps(image := torch.rand(3, 489, 91), cut=False).whole()
    three_by_two(monkeypatch)
    assert encoder.is_local and all(len(image_pass.rows) > 1 for image_pass in encoder.passes(489, 91))
    assert encoder.working_set(489, 91) == max(member.working_set(489, 91) for member in encoder.members)
    for actual, x in zip(encoder.feature_maps(image).whole(), whole, strict=True):
        assert_same(actual, x)


@pytest.mark.parametrize("include_backbone", [True, False])
@pytest.mark.parametrize("settings", [{}, VIT, BOTH])
def test_a_model_is_loaded_as_it_was_saved(settings, include_backbone, tmp_path):
    model = HGADModel(config(**settings))
    model.save(tmp_path / "model.safetensors", include_backbone=include_backbone)
    loaded = hgad_fast.load(tmp_path / "model.safetensors")
    assert loaded.config == model.config
    image = torch.rand(1, 3, 70, 93)
    features, expected = (m.encoder(m.encoder.normalize(image)) for m in (loaded, model))
    assert all(torch.equal(x, y) for x, y in zip(features, expected, strict=True))


def test_each_of_several_backbones_has_weights_of_its_own(tmp_path):
    torch.manual_seed(1)
    files = []
    for arch in ("test_efficientnet", "test_vit"):
        files.append(str(tmp_path / f"{arch}.pth"))
        torch.save(timm.create_model(arch, pretrained=False).state_dict(), files[-1])
    encoder = make_backbone(config(**BOTH, backbone_weights="+".join(files)))
    for member, file in zip(encoder.members, files, strict=True):
        state = torch.load(file, weights_only=True)
        for name, tensor in member.net.state_dict().items():
            assert torch.equal(tensor, state[name.removeprefix("model.")]), name
    with pytest.raises(ValueError, match=r"test_efficientnet.pth does not hold weights of 'test_vit'"):
        make_backbone(config(**BOTH, backbone_weights=f"{files[0]}+{files[0]}"))
