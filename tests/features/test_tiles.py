"""Tiles of an image against the whole: features, maps, geometry, and who looks at the whole image."""

from __future__ import annotations

import copy
import itertools

import pytest
import timm
import torch
from rounding import SAME_IN_FLOAT64
from timm.layers import Conv2dSame

from hgad_fast import HGADConfig
from hgad_fast.features import backbone, tiles
from hgad_fast.features.backbone import Backbone
from hgad_fast.features.streamlined import _SelfPadding, streamlined


def small_tiles(monkeypatch, arch: str, **settings) -> Backbone:
    """A backbone that cuts every image in three by two tiles."""
    settings = {"out_indices": (3,), "feature_levels": 2} | settings
    encoder = Backbone(HGADConfig(backbone_arch=arch, backbone_weights=None, **settings))
    with torch.no_grad():
        for module in encoder.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    monkeypatch.setattr(backbone, "ALWAYS_WHOLE", 0)

    def three_by_two(size, cells, stride, halo, max_pixels):
        return tiles.cuts(size[0], cells[0], 3, stride, halo), tiles.cuts(size[1], cells[1], 2, stride, halo)

    monkeypatch.setattr(tiles, "tiling", three_by_two)
    return encoder


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("size", [(512, 96), (500, 80), (497, 61), (40, 501)])
def test_tiles_of_lite0_are_the_whole(monkeypatch, size):
    """At sizes of every parity, at the borders of the image too: its padding depends on the parity."""
    encoder = small_tiles(monkeypatch, "tf_efficientnet_lite0")
    image = torch.rand(3, *size)
    plan = encoder.passes(*size)
    assert len(plan[0].rows) * len(plan[0].columns) > 1
    for actual, whole in zip(encoder.feature_maps(image).whole(), encoder(encoder.normalize(image[None])), strict=True):
        assert actual.shape == whole.shape
        assert float((actual - whole).norm() / whole.norm()) < SAME_IN_FLOAT64
        assert float((actual - whole).abs().max() / whole.abs().max()) < SAME_IN_FLOAT64


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("arch", "settings"),
    [
        ("resnet18", {}),
        ("test_convnext", {"out_indices": (1,)}),
        ("test_mambaout", {"out_indices": (1,)}),
        ("resnet18", {"feature_mode": "stages", "out_indices": (1, 2)}),
        ("inception_v3", {"out_indices": (1,)}),  # without padding: a stage has fewer cells than strides
    ],
)
def test_tiles_of_other_networks_are_the_whole(monkeypatch, arch, settings):
    encoder = small_tiles(monkeypatch, arch, **settings)
    image = torch.rand(3, 489, 91)
    assert encoder.is_local and len(encoder.passes(489, 91)[0].rows) > 1
    for actual, whole in zip(encoder.feature_maps(image).whole(), encoder(encoder.normalize(image[None])), strict=True):
        assert float((actual - whole).norm() / whole.norm()) < SAME_IN_FLOAT64


@pytest.mark.parametrize(
    ("arch", "index", "is_local"),
    [("mobilenetv3_small_050", 3, False), ("test_vit", 1, False), ("test_resnet", 1, True), ("test_convnext", 1, True)],
)
def test_who_looks_at_the_whole_image_is_found_out(arch, index, is_local):
    net = timm.create_model(arch, pretrained=False, features_only=True, out_indices=(index,)).eval()
    assert tiles.footprint(net, net.feature_info.reduction()).is_local is is_local


class Mixer(torch.nn.Module):
    """Names the kernel of the convolution inside, as some of timm's modules do."""

    kernel_size = 5

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 5, padding=2)

    def forward(self, x):
        return [self.conv(x)]


def test_a_module_that_only_names_a_kernel_has_no_reach_of_its_own():
    actual = tiles.footprint(Mixer(), [1])
    assert actual.halo == 2 and actual.is_local


@pytest.mark.parametrize("length", range(1, 200, 13))
@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_cuts_keep_padding_and_phase(length, parts):
    stride, halo = 8, 16
    cells = -(-length // stride)
    actual = tiles.cuts(length, cells, parts, stride, halo)
    assert [c.first for c in actual[1:]] == [c.last for c in actual[:-1]]
    assert actual[0].first == actual[0].start == 0 and actual[-1].last == cells and actual[-1].stop == length
    for c in actual:
        assert c.start % stride == 0 and (length - c.stop) % stride == 0
        assert c.start <= max(0, c.first * stride - halo) and c.stop >= min(c.last * stride + halo, length)
    assert len({c.stop - c.start for c in actual}) == 1 and len(actual) <= parts


@pytest.mark.parametrize("size", [(8000, 8000), (16001, 3000), (31, 20000), (999, 7777)])
@pytest.mark.parametrize("halo", [0, 192, 512])
def test_tiles_keep_to_their_size_and_repeat_little(size, halo):
    cells = -(-size[0] // 16), -(-size[1] // 16)
    rows, columns = tiles.tiling(size, cells, 16, halo, 4e6)
    (height,), (width,) = ({c.stop - c.start for c in axis} for axis in (rows, columns))
    assert height * width <= max(4e6, (4 * halo + 64) ** 2)
    repeated = len(rows) * height * len(columns) * width / (size[0] * size[1])
    assert repeated < {0: 1.1, 192: 1.5, 512: 4.2}[halo]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("arch", "size"),
    [
        ("tf_efficientnet_lite0", (64, 64)),  # TensorFlow's padding depends on the remainders of height and width
        ("tf_efficientnet_lite0", (61, 66)),
        ("tf_efficientnet_lite0", (96, 83)),
        ("test_resnet", (96, 83)),
        ("test_efficientnet", (96, 83)),
        ("test_convnext", (96, 83)),
    ],
)
def test_a_streamlined_network_gives_the_same_features(arch, size):
    net = timm.create_model(arch, pretrained=False, features_only=True, out_indices=(1,)).eval()
    fast = streamlined(net)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        for actual, expected in zip(fast(images), net(images), strict=True):
            assert float((actual - expected).norm() / expected.norm()) < SAME_IN_FLOAT64
    assert not [module for module in fast.modules() if type(module).__name__ == "Conv2dSame"]
    norms = [module for module in fast.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert not norms and len(list(fast.modules())) <= len(list(net.modules()))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kernel", [(2, 3), (5, 4)])
@pytest.mark.parametrize("stride", [1, (2, 3)])
def test_a_convolution_pads_its_weights_as_timm_pads_the_input(kernel, stride):
    conv = Conv2dSame(4, 6, kernel, stride, groups=2)
    padded = copy.deepcopy(conv)
    padded.__class__ = _SelfPadding
    with torch.no_grad():
        for size in itertools.product(range(5, 12), repeat=2):
            images = torch.randn(1, 4, *size)
            torch.testing.assert_close(padded(images), conv(images))


def in_place(net):
    net.load_state_dict({k: 2 * v if v.is_floating_point() else v for k, v in net.state_dict().items()})


def as_data(net):
    for parameter in net.parameters():
        parameter.data = 2 * parameter.data


def as_new_tensors(net):
    for module in net.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(2 * parameter.detach()))


def as_new_modules(net):
    for name, child in list(net.named_children()):
        setattr(net, name, copy.deepcopy(child))
    as_data(net)


OTHER_TENSORS = [as_data, as_new_tensors, as_new_modules]  # PyTorch counts no changes in place of inference tensors


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "change, inference",
    [(change, False) for change in [in_place, *OTHER_TENSORS]] + [(change, True) for change in OTHER_TENSORS],
)
def test_new_weights_are_noticed(monkeypatch, change, inference):
    with torch.inference_mode(inference):
        encoder = small_tiles(monkeypatch, "test_resnet", out_indices=(1,))
    images = torch.randn(1, 3, 64, 64)
    before = encoder(images)[0]
    made = encoder._fast()
    assert encoder._fast() is made
    change(encoder.net)
    after = encoder(images)[0]
    assert not torch.equal(before, after)
    with torch.no_grad():
        expected = encoder.net(images)[0]
    assert float((after - expected).norm() / after.norm()) < SAME_IN_FLOAT64
