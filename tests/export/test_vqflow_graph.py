"""The graph of VQ-Flow gives the densities of the model, for every switch of the configuration that they depend on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import exported
import pytest
import torch
from exported import CLOSE
from small_vqflow import DIMS, RAW, class_features, labels, small_model, stirred
from torch import Tensor, nn

from hgad_fast import VQFlowModel
from hgad_fast.features.backbone import FeatureMaps
from hgad_fast.features.extract import FeatureSet
from hgad_fast.models.vqflow import VQFlowDensities
from hgad_fast.modules.codebook import Codebook
from hgad_fast.modules.convolutional_graph import Table

SIZES = [(side, side) for side in RAW]


@torch.no_grad()
def ready(sides: tuple[int, ...] = RAW, calibrated: bool = False, **changes: Any) -> VQFlowModel:
    """Return a model whose codes lie on features of these sides, and whose weights are not those of the start."""
    model = stirred(small_model(**changes)).eval()
    levels = model.prepare(features_for(model, 24, seed=1, sides=sides))
    conditions = model.conditions
    vectors = conditions.semantic_vectors(levels[-1])
    conditions.cpc_quantizer.seed(vectors, seed=0)
    prototypes, _ = conditions.prototypes(vectors)
    for (pixels, _), codebook in zip(
        conditions.pattern_vectors(levels, prototypes), conditions.cspc_quantizers, strict=True
    ):
        assert isinstance(codebook, Codebook)
        codebook.seed(pixels.flatten(0, 1), seed=0)
    if calibrated:
        model.calibrate(FeatureSet.from_levels(levels, labels(24)), false_alarm_rate=0.25)
    return model


def features_for(model: VQFlowModel, n: int = 3, seed: int = 5, sides: tuple[int, ...] = RAW) -> list[Tensor]:
    """Return features of n images for the levels of a model, which may be those of others without some channels."""
    levels = class_features(n, seed=seed, sides=sides)
    if len(model.feature_dims) == 2:
        levels = [levels[0], levels[-1]]
    return [level[:, :channels] for level, channels in zip(levels, model.feature_dims, strict=True)]


def densities_of(model: VQFlowModel, levels: list[Tensor], group_ids: Tensor | None = None) -> VQFlowDensities:
    densities = model.densities(FeatureMaps.of(model.prepare(levels)), group_ids)
    assert isinstance(densities, VQFlowDensities)
    return densities


def assert_same_densities(actual: VQFlowDensities, expected: VQFlowDensities) -> None:
    assert actual.group_ids.dtype == torch.int64 and torch.equal(actual.group_ids, expected.group_ids)
    assert actual.neg_entropy == []
    for name in ("logps", "latent_logps"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), **CLOSE)


@torch.no_grad()
def evaluated(graph: nn.Module, levels: list[Tensor], group_ids: Tensor | None = None) -> VQFlowDensities:
    return graph.eval()(levels, group_ids)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"quantize_type": "naive"},
        {"concat_pos": False},
        {"quantize_type": "naive", "concat_pos": False},
        {"pool_type": "max"},
        {"pool_type": "none"},
        {"score_density": "latent"},
        {"score_norm": "image_max"},
        {"prior_std": "signed"},
        {"hidden_channels": None},
        {"hidden_channels": 7, "clamp_alpha": 0.7},
        {"coupling_layers": (1, 1, 4)},
        {"n_prototypes": 1},
        {"n_prototypes": 20, "n_patterns": 40},
        {"feature_dims": (4, 6, 8, 9)},
        {"feature_levels": 2, "feature_dims": (4, 10), "coupling_layers": (1,)},
    ],
    ids=str,
)
def test_it_gives_the_densities(changes):
    model = ready(**changes)
    levels = features_for(model)
    graph = model.density_graph([(x.shape[2], x.shape[3]) for x in levels])
    expected = densities_of(model, levels)
    assert_same_densities(evaluated(graph, levels), expected)
    for i in range(3):
        single = [x[i : i + 1] for x in levels]
        assert_same_densities(evaluated(graph, single), densities_of(model, single))


@pytest.mark.parametrize("pool_type", ["avg", "max", "none"])
@pytest.mark.parametrize("sides", [(17, 11, 6, 3), (5, 3, 1, 1), (5, 6, 6, 3), (1, 1, 1, 1)], ids=str)
def test_maps_are_of_any_sizes_that_fit(sides, pool_type):
    """A map of a single pixel has no neighbour at all, and the mean of a coarser map's cells is over any number."""
    if pool_type == "none":
        sides = tuple(sides[-1] * (n // sides[-1]) for n in sides)
    model = ready(sides, pool_type=pool_type)
    levels = class_features(3, seed=5, sides=sides)
    graph = model.density_graph([(side, side) for side in sides])
    assert_same_densities(evaluated(graph, levels), densities_of(model, levels))


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="have the sizes 8 x 8, 4 x 4, 2 x 2, 3 x 3; VQ-Flow takes squares"):
        small_model().density_graph([(16, 16), (8, 8), (4, 4), (3, 3)])
    with pytest.raises(ValueError, match="have the sizes 8 x 4, 4 x 4, 2 x 2, 2 x 2; VQ-Flow takes squares"):
        small_model().density_graph([(16, 8), (8, 8), (4, 4), (2, 2)])


@pytest.mark.parametrize(("channel", "group"), [(0, None), (3, None), (0, 2)])
def test_a_top_level_that_overflows_in_the_semantic_networks_gives_no_number(channel, group):
    """Codes are finite whatever chooses them: what follows would look sound."""
    model, levels = ready(), class_features(3, seed=5)
    levels[-1][1, channel] = 3e38
    with torch.no_grad():
        for network in (model.conditions.semantic_mlp[0], model.conditions.semantic_encoder[0]):
            network.weight[:, channel] = 4.0
    ids = None if group is None else torch.full((3,), group)
    expected = densities_of(model, levels, ids)
    actual = evaluated(model.density_graph(SIZES, group), levels)
    for name in ("logps", "latent_logps"):
        for level, right in zip(getattr(actual, name), getattr(expected, name), strict=True):
            assert right[1].isnan().all() and right[::2].isfinite().all()
            torch.testing.assert_close(level, right, equal_nan=True, **CLOSE)


@pytest.mark.parametrize("changes", [{}, {"quantize_type": "naive"}, {"concat_pos": False}], ids=str)
def test_prototypes_are_fixed_or_given(changes):
    model = ready(**changes)
    levels = class_features(6, seed=5)
    inferred = densities_of(model, levels).group_ids
    assert len(inferred.unique()) > 1
    for k in (0, 4):
        expected = densities_of(model, levels, torch.full((6,), k))
        graph = model.density_graph(SIZES, group=k)
        assert_same_densities(evaluated(graph, levels), expected)
        assert_same_densities(evaluated(graph, levels, torch.zeros(6, dtype=torch.int64)), expected)
    given = torch.tensor([3, -1, -1, 5, 0, -1])
    expected = densities_of(model, levels, torch.where(given < 0, inferred, given))
    assert_same_densities(evaluated(model.density_graph(SIZES), levels, given), expected)


def test_a_fixed_prototype_leaves_the_others_out():
    model = ready(n_prototypes=20)
    numbers = {group: sum(b.numel() for b in model.density_graph(SIZES, group).buffers()) for group in (None, 1)}
    assert numbers[None] - numbers[1] >= 19 * (2 * sum(DIMS[:3]) + model.config.prototype_dim)


def test_a_model_of_another_dtype_is_computed_in_float32():
    model = ready()
    levels = class_features(3, seed=5)
    graph = model.double().density_graph(SIZES)
    assert {x.dtype for x in (*graph.parameters(), *graph.buffers()) if x.is_floating_point()} == {torch.float32}
    assert_same_densities(evaluated(graph, levels), densities_of(model.float(), levels))


def test_making_it_changes_nothing():
    """Neither the model nor the next random number; and training the model on leaves the graph as it is."""
    model = ready().train()
    levels = class_features(3, seed=5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    graph = model.density_graph(SIZES).eval()
    assert torch.equal(torch.get_rng_state(), state) and all(module.training for module in model.modules())
    expected = evaluated(graph, levels)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        tensor.zero_()
    assert_same_densities(evaluated(graph, levels), expected)
    assert not any(parameter.requires_grad for parameter in graph.parameters())


def test_a_table_holds_the_smaller_of_product_and_factors():
    rows = torch.arange(12.0).view(6, 2)
    for n, m, numbers in ((1, 3, 27), (6, 3, 12 + 54)):  # m kernels of 2 channels: 9 m a row, and 18 m for all
        table = Table(rows[:n], torch.arange(m * 18.0).view(m, 2, 3, 3))
        assert sum(x.numel() for x in table.buffers()) == numbers
        product = table().unflatten(1, (3, 3, m))
        assert product.shape == (n, 3, 3, m)
        assert float(product[n - 1, 1, 2, 1]) == sum(
            float(rows[n - 1, d]) * (18 + 9 * d + 5)
            for d in range(2)  # the sixth tap of the second kernel
        )


@pytest.mark.parametrize("n_patterns", [32, 2000])
def test_it_is_smaller_than_the_model(n_patterns):
    """Tables take the place of most weights; where there are more patterns than channels, weights are kept."""
    model = ready(hidden_channels=None, prototype_dim=96, n_patterns=n_patterns)
    graph = model.density_graph(SIZES)
    weights = sum(parameter.numel() for parameter in model.parameters())
    codes = sum(level.embed.numel() for level in model.conditions.cspc_quantizers)
    numbers = sum(tensor.numel() for tensor in (*graph.parameters(), *graph.buffers()))
    assert numbers < (0.5 * weights if n_patterns == 32 else weights) + 2 * codes


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"n_patterns": 40}, {"class_input": True}),  # tables of both kinds
        ({"quantize_type": "naive", "pool_type": "none"}, {"class_id": 4}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:too few calibration images")
def test_a_file_gives_the_scores(changes: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    model = ready(calibrated=True, coupling_layers=(1, 1, 1), **changes)
    path = model.export(tmp_path / "model.onnx", size=SIZES, check=False, **options)
    given = torch.tensor([3, -1, 5])
    for count in (1, 3):
        levels = features_for(model, count)
        ids: Any = options.get("class_id")
        inputs = list(levels)
        if "class_input" in options:
            ids = torch.where(given < 0, model.score_features(features_for(model)).class_id, given)[:count]
            inputs.append(given[:count])
        outputs = exported.run_onnx(path, *inputs)
        expected = model.score_features(levels, ids)
        assert torch.equal(outputs["class_id"], expected.class_id)
        torch.testing.assert_close(outputs["anomaly_map"], expected.anomaly_map, **CLOSE)
        torch.testing.assert_close(outputs["score"], expected.image_score, **CLOSE)
        assert torch.equal(outputs["is_anomalous"], expected.is_anomalous)
    levels = features_for(model)
    levels[-1] = torch.full_like(levels[-1], 2e38)  # the mean of these finite numbers overflows
    with pytest.raises(ValueError, match="image 0 has no score"):
        model.score_features(levels, options.get("class_id"))
    outputs = exported.run_onnx(path, *levels, *([given] if "class_input" in options else []))
    assert outputs["score"].isinf().all() and outputs["is_anomalous"].all()
    assert not exported.FORBIDDEN & set(exported.operators(path))
    assert aligned_resizes(path) == []


def aligned_resizes(path: Path) -> list[str]:
    """Return the names of the operations that resize with aligned corners."""
    import onnx

    nodes = [node for node in onnx.load(str(path)).graph.node if node.op_type == "Resize"]
    return [node.name for node in nodes if any(attribute.s == b"align_corners" for attribute in node.attribute)]
