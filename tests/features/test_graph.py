"""Backbones as graphs compute what scoring computes of images, whatever they are made of, in other runtimes, too."""

from __future__ import annotations

from pathlib import Path

import exported
import pytest
import rounding
import torch
from rounding import SAME_IN_FLOAT64
from torch import Tensor, nn

from hgad_fast import HGADConfig
from hgad_fast.export.formats import Program, traced
from hgad_fast.export.graph import Plan
from hgad_fast.features.backbone import Backbone
from hgad_fast.features.composite import CompositeBackbone, make_backbone
from hgad_fast.features.graph import image_graph

CNN, VIT = {"backbone_arch": "test_efficientnet"}, {"backbone_arch": "test_vit"}
JOINED = {"feature_mode": "joined", "feature_levels": 1}
COMPOSITE = JOINED | {
    "backbone_arch": "test_efficientnet+test_vit",
    "feature_levels": 2,
    "out_indices": ((1, 2, 3), ((0, 1), 2)),
}


def backbone(**settings) -> Backbone:
    return make_backbone(HGADConfig(backbone_weights=None, n_classes=2, **settings))


class Own(nn.Module):
    """An encoder as a user may write one: two levels, of which the first is as fine as the image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, stride=2)

    def normalize(self, images: Tensor) -> Tensor:
        return (images - 0.4) / 0.2

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.first(images)
        return [x, self.second(x.relu())]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("settings", "size"),
    [
        (CNN | {"feature_levels": 3, "out_indices": (1,)}, (65, 83)),
        (CNN | {"feature_mode": "stages", "feature_levels": 3, "out_indices": (1, 2, 3)}, (65, 83)),
        (CNN | JOINED | {"out_indices": (2, 3, 4)}, (64, 96)),  # on a grid of 4 x 6 they are 8 x 12, 4 x 6 and 2 x 3,
        (CNN | JOINED | {"out_indices": (2, 3, 4)}, (72, 104)),  # and on one of 5 x 7 they are 9 x 13, 5 x 7 and 3 x 4
        (VIT | {"feature_levels": 2, "out_indices": (1,)}, (96, 64)),
        (VIT | {"feature_mode": "stages", "feature_levels": 2, "out_indices": (0, 2)}, (70, 120)),
        (VIT | JOINED | {"out_indices": ((0, 1), (2, 3))}, (48, 112)),
        (COMPOSITE, (64, 64)),
        (COMPOSITE, (72, 104)),
    ],
    ids=[
        "pyramid",
        "stages",
        "joined, whole windows",
        "joined, parts of windows",
        "transformer, pyramid",
        "transformer, resized",
        "transformer, averaged",
        "composite",
        "composite, not square",
    ],
)
def test_it_computes_what_scoring_computes(settings, size):
    encoder = backbone(**settings)
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        levels = image_graph(encoder, size).eval()(images)
        expected = encoder(encoder.normalize(images), fast=True)
    assert len(levels) == len(expected) == len(encoder.feature_dims)
    torch.testing.assert_close(levels, expected, rtol=SAME_IN_FLOAT64, atol=SAME_IN_FLOAT64)


def test_a_position_embedding_is_resampled_once_for_all():
    encoder = backbone(**VIT, **JOINED, out_indices=((0, 1), (2, 3)))
    own = encoder.net.model.pos_embed
    before = own.clone()
    (net,) = image_graph(encoder, (48, 112)).nets
    assert net.model.pos_embed.shape[1] - own.shape[1] == (48 // 16) * (112 // 16) - own_patches(encoder)
    assert encoder.net.model.pos_embed is own and torch.equal(own, before) and encoder.net.model.dynamic_img_size


def own_patches(encoder: Backbone) -> int:
    """Return how many patches the images have that a transformer's position embedding is for."""
    return encoder.net.model.patch_embed.num_patches


@pytest.mark.usefixtures("float64")
def test_an_encoder_of_the_users_own():
    encoder = Own()
    images = torch.rand(2, 3, 20, 31)
    graph = image_graph(encoder, (20, 31))
    with torch.no_grad():
        expected = encoder(encoder.normalize(images))
        assert all(parameter.requires_grad for parameter in encoder.parameters())
        for parameter in encoder.parameters():
            parameter.zero_()  # the graph has weights of its own
        levels = graph(images)
    assert not any(parameter.requires_grad for parameter in graph.parameters())
    torch.testing.assert_close(levels, expected, rtol=SAME_IN_FLOAT64, atol=SAME_IN_FLOAT64)


@pytest.mark.parametrize("settings", [COMPOSITE, CNN | {"feature_levels": 2, "out_indices": (1,)}], ids=["a+b", "one"])
def test_making_it_leaves_the_backbone_as_it_was(settings):
    encoder = backbone(**settings)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    graph = image_graph(encoder, (64, 80))
    own = {tensor.data_ptr() for tensor in (*encoder.parameters(), *encoder.buffers())}
    assert not own & {tensor.data_ptr() for tensor in (*graph.parameters(), *graph.buffers())}
    assert encoder.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


class Levels(nn.Module):
    """The levels of a graph as a tuple, of the arguments that the library's exporter passes."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.levels = graph

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.levels(*inputs))


def test_a_composite_with_a_transformer_as_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    size = (72, 104)
    encoder = backbone(**COMPOSITE)
    assert isinstance(encoder, CompositeBackbone)
    plan = Plan(sizes=(), size=size, img_size=72, outputs=("first", "second"))
    program = traced(Levels(image_graph(encoder, size)).eval(), plan, [torch.zeros(2, 3, *size)])
    path = tmp_path / "backbone.onnx"
    Program("onnx", program, plan).save(path, "{}")
    assert not exported.FORBIDDEN & set(exported.operators(path))
    images = torch.rand(3, 3, *size)
    exact, tolerance = rounding.exact_and_tolerance(lambda encoder, x: encoder(encoder.normalize(x)), encoder, images)
    for n in (1, 3):
        levels = list(exported.run_onnx(path, images[:n]).values())
        rounding.assert_within(levels, [x[:n] for x in exact], [x[:n] for x in tolerance])
