"""The graph of place Gaussians gives what the model gives, in torch and in onnxruntime."""

from __future__ import annotations

import exported
import pytest
import torch
from exported import CLOSE
from small_gaussian import SIDES, class_features, feature_set, labels, small_model
from torch import Tensor, nn

from hgad_fast import GaussianConfig, GaussianModel
from hgad_fast.export.formats import Program, traced
from hgad_fast.export.graph import Plan
from hgad_fast.features.backbone import FeatureMaps
from hgad_fast.features.extract import FeatureSet
from hgad_fast.protocol import ProportionsError

WIDE, SAME_SHAPE = ((8, 16), (4, 8), (2, 4)), (14, 7, 3)


def sizes_of(levels: list[Tensor]) -> list[tuple[int, int]]:
    return [(x.shape[2], x.shape[3]) for x in levels]


def begun(model: GaussianModel, features: FeatureSet) -> GaussianModel:
    """Return the model with Gaussians of features, and without a calibration."""
    model.begin(features)
    model.finish(features)
    return model


def begun_small(**changes) -> GaussianModel:
    return begun(small_model(**changes), feature_set())


def values(densities) -> list[Tensor]:
    """Return all that densities hold, of each part, and what the map and the score are made of."""
    tensors = [densities.group_ids, *densities.logps, *densities.distances.values(), *densities.all_distances.values()]
    for scope in ("map", "all"):
        tensors += [level for part in densities.anomalies(torch.zeros(9, 1), scope) for level in part]
    for part in densities.parts:
        tensors += [level for levels in densities.alone(part).anomalies(torch.zeros(9, 1)) for level in levels]
    return tensors


def assert_is_the_model(model: GaussianModel, levels: list[Tensor], group: int | None = None) -> None:
    """Check the graph of features of these sizes for batches and for single images: of `group`, inferred, or given."""
    graph = model.density_graph(sizes_of(levels), group).eval()
    count = len(levels[0])
    inferred = model.densities(FeatureMaps.of(levels), None).group_ids
    others, every_second = inferred.roll(1), torch.arange(count) % 2 == 0
    asked_and_meant = [(None, inferred), (others, others)]
    asked_and_meant.append((torch.where(every_second, others, -1), torch.where(every_second, others, inferred)))
    if group is not None:
        asked_and_meant = [(asked, torch.full((count,), group)) for asked in (None, others)]
    for asked, meant in asked_and_meant:
        expected = model.densities(FeatureMaps.of(levels), meant)
        together = graph(levels, asked)
        assert list(together.distances) == list(together.all_distances) == list(expected.distances)
        for actual, right in zip(values(together), values(expected), strict=True):
            assert actual.dtype == right.dtype
            torch.testing.assert_close(actual, right, **CLOSE)
        for i in range(count):
            alone = graph([x[i : i + 1] for x in levels], None if asked is None else asked[i : i + 1])
            for actual, right in zip(values(alone), values(together), strict=True):
                torch.testing.assert_close(actual, right[i : i + 1], **CLOSE)


# ------------------------------------------------------------------------------------------------ groups and stages


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"map_stages": 1},
        {"map_stages": 1, "coarse_dim": 0},
        {"map_stages": 3},
        {"dim": 80, "coarse_dim": 40},
        {"grouping": "one"},
        {"grouping": "clusters", "n_clusters": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("n", [1, 3])
def test_it_is_the_model(changes, n):
    model, levels = begun_small(**changes), class_features(n, seed=2)
    assert_is_the_model(model, levels)
    assert_is_the_model(model, levels, len(model.groups) - 1)


def wide_features(n: int) -> list[Tensor]:
    """Return features with so many channels that there are several bands of fine and of coarse values."""
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(n, channels, side, side, generator=generator) for channels, side in ((120, 4), (90, 2))]


def test_several_bands():
    model = small_model(feature_dims=(120, 90), map_stages=1, dim=100, coarse_dim=70)
    begun(model, FeatureSet.from_levels(wide_features(24), labels(24)))
    assert [end for _, end in model.gaussians[0].bands] == [32, 66, 100, 135, 170]
    assert_is_the_model(model, wide_features(3))
    assert_is_the_model(model, wide_features(1), 2)


@pytest.mark.parametrize("sides", [SIDES, (7, 3, 2), (7, 5, 8), (16, 8, 3)], ids=str)
def test_levels_are_joined_whatever_their_sizes(sides):
    model = begun(small_model(), feature_set(sides=sides))
    assert_is_the_model(model, class_features(3, seed=2, sides=sides))


def test_several_backbones():
    config = GaussianConfig(
        n_classes=2,
        backbone_arch="test_efficientnet+test_vit",
        backbone_weights=None,
        feature_levels=2,
        out_indices=((1, 2, 3), ((0, 1), 2)),
        dim=12,
        coarse_dim=4,
        img_size=64,
        msk_size=16,
        calibration_fraction=0.0,
    )
    model = GaussianModel(config)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(16, 3, 64, 64, generator=generator)
    images[1::2] **= 3
    with torch.no_grad():
        levels = model.encoder(images)
    begun(model, FeatureSet.from_levels(levels, labels(16, 2)))
    few = [x[:3] for x in levels]
    assert len(few) == 2 and few[0].shape[2:] == few[1].shape[2:] == (4, 4)
    assert_is_the_model(model, few)
    assert_is_the_model(model, few, 1)


# ------------------------------------------------------------------------------------------------ sizes


def one_stage(n: int, side: int | tuple[int, int], seed: int = 0, classes: int = 3) -> list[Tensor]:
    return [class_features(n, classes, seed, (side, side, side))[1]]


def of_grids(*grids: tuple[int, int], **changes) -> GaussianModel:
    """Return a model of one stage whose classes have these grids."""
    model = small_model(n_classes=len(grids), feature_dims=(6,), map_stages=1, coarse_dim=0, **changes)
    images = [
        x
        for k, grid in enumerate(grids)
        for x in one_stage(12, grid, seed=k, classes=1)[0][:, :, : grid[0], : grid[1]].split(1)
    ]
    begun(model, FeatureSet([[x[0]] for x in images], torch.arange(len(grids)).repeat_interleave(12)))
    assert model.config.grids == tuple((grid,) for grid in grids)
    return model


@pytest.mark.parametrize("side", [2, 3, 4, 5, 8, 11], ids=str)
def test_other_sizes_take_the_nearest_places(side):
    model = of_grids((4, 4), (6, 6), (4, 4), (5, 5))
    levels = one_stage(3, side, seed=9)
    assert_is_the_model(model, levels)
    for group in range(4):
        assert_is_the_model(model, levels, group)


def test_several_stages_of_another_size():
    model = begun_small()
    assert_is_the_model(model, class_features(3, seed=2, sides=SAME_SHAPE))


def test_groups_of_other_proportions_are_not_inferred():
    model = of_grids((4, 4), (4, 8), (8, 8), (4, 8))
    for grid, fitting in (((4, 4), {0, 2}), ((4, 8), {1, 3}), ((8, 16), {1, 3})):
        levels = one_stage(6, grid, seed=4)
        graph = model.density_graph([grid])
        assert set(graph.levels[0].groups) == fitting
        assert_is_the_model(model, levels)
        given = torch.arange(4).repeat(2)[:6]
        densities = graph(levels, given)
        fits = torch.tensor([k in fitting for k in given.tolist()])
        assert torch.equal(densities.group_ids, given)
        for x in (*densities.logps, *densities.distances.values(), *densities.all_distances.values()):
            assert torch.equal(x.isfinite().all(2).all(1), fits)
            assert torch.equal(x.isnan().any(2).any(1), ~fits)


def test_groups_without_images_are_not_inferred():
    model = begun_small(grouping="clusters", n_clusters=4)
    levels = class_features(6, seed=2)
    likeliest = int(model.densities(FeatureMaps.of(levels), None).group_ids[0])
    for gaussians in model.gaussians:
        gaussians.images[likeliest] = 0
    assert_is_the_model(model, levels)
    assert likeliest not in model.density_graph(sizes_of(levels))(levels, None).group_ids.tolist()
    with pytest.raises(ProportionsError, match="the none that"):
        model.density_graph(sizes_of(levels), likeliest)


def test_sizes_that_do_not_fit_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="not fitted: call fit on normal images first"):
        small_model().density_graph([(8, 8), (4, 4), (2, 2)])
    model = of_grids((4, 4), (4, 8))
    for size, group in (((8, 4), None), ((4, 4), 1), ((4, 8), 0)):
        with pytest.raises(ProportionsError, match=r"by more than 5%.* crop or pad .* center_crop=True"):
            model.density_graph([size], group)


# ------------------------------------------------------------------------------------------------ what it holds


def numbers(graph: nn.Module) -> int:
    return sum(buffer.numel() for buffer in graph.buffers())


def test_it_holds_no_more_than_the_bands():
    model = begun_small()
    (gaussians,) = model.gaussians
    tables = [
        buffer.numel() for name, buffer in gaussians.named_buffers() if name.startswith(("band", "mean_0", "log_det"))
    ]
    small = sum(buffer.numel() for buffer in model.whitenings.buffers()) + 32
    sizes = [(8, 8), (4, 4), (2, 2)]
    assert numbers(model.density_graph(sizes)) <= sum(tables) + small
    assert numbers(model.density_graph(sizes, 1)) <= sum(tables) / 3 + small
    coarser = model.density_graph([(4, 4), (2, 2), (1, 1)], 1)  # places that no pixel is nearest to are left out
    assert numbers(coarser) <= sum(tables) / 12 + small


def test_it_does_not_change_with_the_model():
    model, levels = begun_small(), class_features(3, seed=2)
    graph = model.density_graph(sizes_of(levels))
    before = values(graph(levels, None))
    model.add(feature_set(12, seed=8))
    for tensor in (*model.buffers(), *model.parameters()):
        tensor.detach().zero_()
    for actual, right in zip(values(graph(levels, None)), before, strict=True):
        assert torch.equal(actual, right)


# ------------------------------------------------------------------------------------------------ exported


class Outputs(nn.Module):
    """The tensors of a graph's densities."""

    def __init__(self, graph: nn.Module, given: bool) -> None:
        super().__init__()
        self.densities, self.given = graph, given

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        levels = list(inputs[:-1] if self.given else inputs)
        return tuple(values(self.densities(levels, inputs[-1] if self.given else None)))


def cases():
    """Yield models, sides of features, the group that is fixed, and whether groups are given."""
    yield "levels that are joined", begun_small, SIDES, None, True
    yield "another size", begun_small, SAME_SHAPE, None, False
    yield "no coarse stages", lambda: begun_small(map_stages=3), SIDES, None, False
    yield "fixed", begun_small, SIDES, 1, False
    yield "one group", lambda: begun_small(grouping="one"), (7, 4, 3), None, False
    yield "one level, several grids", lambda: of_grids((4, 4), (6, 6), (4, 8)), (9,), None, True


@pytest.mark.parametrize(
    ("make", "sides", "group", "given"), [case[1:] for case in cases()], ids=[c[0] for c in cases()]
)
def test_it_is_the_same_in_other_runtimes(make, sides, group, given, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = make()
    levels = one_stage(3, sides[0]) if len(sides) == 1 else class_features(3, seed=2, sides=sides)
    graph = Outputs(model.density_graph(sizes_of(levels), group), given).eval()
    example = [torch.zeros_like(x) for x in levels] + [torch.zeros(3, dtype=torch.int64)] * given
    names = tuple(f"value_{i}" for i in range(len(graph(*example))))
    plan = Plan(tuple(sizes_of(levels)), None, model.config.img_size, names, group, given)
    program = traced(graph, plan, example)
    allowed = {"aten", "_operator", "builtins", "higher_order", "prim"}
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {name.split(".")[0] for name in called if not name.startswith("<")} <= allowed
    path = tmp_path / "model.onnx"
    Program("onnx", program, plan).save(path, "{}")
    operators = set(exported.operators(path))
    assert not operators & exported.FORBIDDEN and "Resize" not in operators
    module = program.module()
    for n in (1, 3):
        inputs, ids = [x[:n] for x in levels], torch.tensor([0, -1, len(model.groups) - 2])[:n]
        inferred = model.densities(FeatureMaps.of(inputs), None).group_ids
        meant = torch.where(ids < 0, inferred, ids) if given else inferred
        meant = meant if group is None else torch.full_like(ids, group)
        expected = model.densities(FeatureMaps.of(inputs), meant)
        inputs += [ids] if given else []
        for outputs in (module(*inputs), exported.run_onnx(path, *inputs).values()):
            for actual, right in zip(outputs, values(expected), strict=True):
                torch.testing.assert_close(actual, right, **CLOSE)
