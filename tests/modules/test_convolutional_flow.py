"""VQ-Flow's flows are invertible, their log-determinants those of their Jacobians, and tables change nothing."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from rounding import SAME_IN_FLOAT64
from small_vqflow import class_features, small_model, stirred
from torch import Tensor, nn

from hgad_fast import VQFlowModel
from hgad_fast.modules.convolutional_flow import (
    MIN_STD,
    ConditionedConvolution,
    ConvolutionalBlock,
    ConvolutionalFlow,
    FusionFlow,
    Known,
    PrototypePrior,
)
from hgad_fast.ops import Condition

CONDITION_DIM = 5 + 4 + 4  # a code of 9 channels, of position and prototype, and the prototype


def condition(h: int, w: int, images: int = 2, codes: int = 6) -> Condition:
    """Return a random condition in float64."""
    return Condition(
        torch.randint(codes, (images, h, w)),
        torch.randn(codes, 9, dtype=torch.float64),
        torch.randn(images, 4, dtype=torch.float64),
        torch.randn(5, h, w, dtype=torch.float64),
        True,
    )


def shaken(module: nn.Module) -> nn.Module:
    """Return the module in float64 with parameters off their initial values."""
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return module


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=SAME_IN_FLOAT64, atol=SAME_IN_FLOAT64)


# ---- inverse and Jacobian


@pytest.mark.parametrize("channels", [2, 5, 6])
@pytest.mark.parametrize("kind", ["block", "flow"])
def test_a_flow_is_inverted(channels: int, kind: str) -> None:
    make = ConvolutionalBlock if kind == "block" else lambda *sizes: ConvolutionalFlow(*sizes, 3)
    flow, given = shaken(make(channels, CONDITION_DIM)), condition(4, 3)
    x = random(2, 4, 3, channels)
    z, log_det = flow(x, given)
    back, inverse_log_det = flow.inverse(z, given)
    assert z.shape == x.shape and log_det.shape == inverse_log_det.shape == (2, 4, 3)
    assert (z - x).abs().max() > 0.1
    assert_same(back, x)
    assert_same(inverse_log_det.sum((1, 2)), -log_det.sum((1, 2)))
    again, _ = flow(flow.inverse(x, given)[0], given)
    assert_same(again, x)


@pytest.mark.parametrize("channels", [5, 6])
@pytest.mark.parametrize("kind", ["block", "flow"])
def test_the_log_determinant_is_that_of_the_jacobian(channels: int, kind: str) -> None:
    make = ConvolutionalBlock if kind == "block" else lambda *sizes: ConvolutionalFlow(*sizes, 3)
    flow, given = shaken(make(channels, CONDITION_DIM)), condition(3, 2, images=1)
    x = random(1, 3, 2, channels)
    jacobian = torch.autograd.functional.jacobian(lambda x: flow(x, given)[0], x).view(x.numel(), -1)
    expected = torch.linalg.slogdet(jacobian).logabsdet
    assert expected.abs() > 0.1
    assert_same(flow(x, given)[1].sum(), expected)


def test_the_log_determinant_of_the_fusion_is_that_of_its_jacobian() -> None:
    """Over all levels together, each of which reads the others."""
    sizes = ((2, 4), (4, 2), (2, 2))  # channels and side of each level
    flow, given = shaken(FusionFlow([c for c, _ in sizes], CONDITION_DIM)), condition(2, 2, images=1)
    lengths = [c * side * side for c, side in sizes]

    def joined(values: Tensor) -> Tensor:
        maps = [part.view(1, side, side, c) for part, (c, side) in zip(values.split(lengths), sizes, strict=True)]
        return torch.cat([z.flatten() for z in flow(maps, given)[0]])

    values = random(sum(lengths))
    jacobian = torch.autograd.functional.jacobian(joined, values)
    assert all(part.abs().max() > 1e-3 for part in (jacobian[:32, 32:48], jacobian[32:48, :32], jacobian[48:, :32]))
    maps = [part.view(1, side, side, c) for part, (c, side) in zip(values.split(lengths), sizes, strict=True)]
    assert_same(sum(level.sum() for level in flow(maps, given)[1]), torch.linalg.slogdet(jacobian).logabsdet)


def make_model(**changes) -> VQFlowModel:
    """Return a model in float64 off its initial values, with codes that are vectors of its features."""
    settings = {"pool_type": "none", "n_patterns": 5, "n_prototypes": 3, "pos_embed_dim": 4} | changes
    model = stirred(small_model(**settings)).double().eval()
    with torch.no_grad():
        conditions = model.conditions
        levels = features(8)
        vectors = conditions.semantic_vectors(levels[-1])
        conditions.cpc_quantizer.seed(vectors, 0)
        prototype, _ = conditions.prototypes(conditions.semantic_vectors(levels[-1]))
        for book, (rows, _) in zip(
            conditions.cspc_quantizers, conditions.pattern_vectors(levels, prototype), strict=True
        ):
            book.seed(rows.flatten(0, 1), 0)
    return model


def features(n: int, sides: tuple[int, ...] = (4, 2, 2, 2)) -> list[Tensor]:
    return [level.double() for level in class_features(n, sides=sides)]


@pytest.mark.parametrize("changes", [{}, {"prior_std": "signed"}, {"concat_pos": False, "quantize_type": "naive"}])
def test_the_density_of_the_model_is_that_of_the_whole_jacobian(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str]
) -> None:
    """Standard normal in z, times the determinant of features -> z while codes are held fixed."""
    model = make_model(**changes)
    *levels, top = features(1)
    with torch.no_grad():
        density = model.log_density([*levels, top])
        fixed = model.conditions([*levels, top])
    lengths = [level.numel() for level in levels]

    def latents(values: Tensor) -> Tensor:
        maps = [part.view(level.shape) for part, level in zip(values.split(lengths), levels, strict=True)]
        return torch.cat([z.flatten() for z in model.latents([*maps, top]).z])

    values = torch.cat([level.flatten() for level in levels])
    monkeypatch.setattr(model.conditions, "forward", lambda *_: fixed)
    jacobian = torch.autograd.functional.jacobian(latents, values)
    z = latents(values)
    normal = -z.square().sum() / 2 - len(z) / 2 * math.log(2 * math.pi)
    assert_same(density[0], normal + torch.linalg.slogdet(jacobian).logabsdet)


def test_codes_do_not_change_with_a_small_change_of_the_features() -> None:
    """So the density above is one: z moves as the Jacobian at fixed codes says."""
    model = make_model()
    levels = features(3)
    moved = [level + 1e-9 * torch.randn_like(level) for level in levels]
    with torch.no_grad():
        one, other = model.conditions(levels), model.conditions(moved)
    for a, b in zip(one.levels, other.levels, strict=True):
        assert torch.equal(a.indices, b.indices)
    assert torch.equal(one.prototype, other.prototype)


def test_the_prior_begins_standard_and_takes_its_start_from_latents() -> None:
    prior = PrototypePrior(4, [3, 2]).double()
    mean, std = prior(random(5, 4), 0)
    assert (std - 1).abs().max() < 4 * torch.finfo(torch.float32).eps  # the bias is set in float32
    z = random(400, 2) * torch.tensor([3.0, 1e-3], dtype=torch.float64) + 7
    prior.start(1, z)
    mean, std = prior(random(5, 4), 1)
    assert_same(mean, z.mean(0).expand(5, -1))
    assert_same(std[:, 0], z.std(0)[0].expand(5))
    assert (std[:, 1] >= MIN_STD).all() and (std[:, 1] <= 2 * MIN_STD + SAME_IN_FLOAT64).all()


def test_the_prior_as_published_may_cross_zero_and_is_never_zero() -> None:
    prior = PrototypePrior(1, [1], "signed").double()
    with torch.no_grad():
        prior.std[0].weight.fill_(1.0)
        prior.std[0].bias.zero_()
    _, std = prior(torch.tensor([[-2.0], [0.0], [2.0]], dtype=torch.float64), 0)
    assert_same(std.flatten(), torch.tensor([4 + 1e-8, 1e-8, 4 + 1e-8], dtype=torch.float64).sqrt())


# ---- tables and batches


def gradients_of(model: VQFlowModel, by_tables: bool, levels: list[Tensor]) -> dict[str, Tensor]:
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, ConditionedConvolution):
            module.by_tables = by_tables
    inputs = [level.clone().requires_grad_() for level in levels]
    latents = model.latents(inputs)
    conditions = latents.conditions
    (latents.nll().mean() + conditions.prototype_loss + conditions.pattern_loss).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return found | {f"features {level}": x.grad for level, x in enumerate(inputs)} | dict(model.named_buffers())


@pytest.mark.parametrize("changes", [{}, {"concat_pos": False}, {"quantize_type": "naive"}])
def test_tables_and_the_dense_condition_give_the_same_gradients(changes: dict[str, str]) -> None:
    """Of all parameters and features, and the same statistics."""
    model, levels = make_model(**changes), features(5, (8, 4, 2, 2))
    by_tables, dense = (gradients_of(model, way, levels) for way in (True, False))
    assert by_tables.keys() == dense.keys()
    for name, expected in dense.items():
        assert expected is not None, name
        scale = float(expected.abs().max()) if expected.is_floating_point() and expected.numel() else 0.0
        torch.testing.assert_close(
            by_tables[name], expected, rtol=SAME_IN_FLOAT64, atol=SAME_IN_FLOAT64 * (1 + scale), msg=name
        )


@pytest.mark.parametrize("changes", [{}, {"concat_pos": False}, {"quantize_type": "naive"}])
def test_tables_for_scoring_give_what_a_training_computes(changes: dict[str, str]) -> None:
    model, levels = make_model(**changes), features(5, (8, 4, 2, 2))
    with torch.no_grad():
        plain, known = (model.latents(levels, known=way) for way in (False, True))
        again = model.latents(levels, known=True)
    for one, other in zip((*plain.z, *plain.log_det), (*known.z, *known.log_det), strict=True):
        assert_same(other, one)
    assert all(torch.equal(a, b) for a, b in zip(known.z, again.z, strict=True))


def test_an_image_alone_is_the_image_in_a_batch() -> None:
    """In evaluation mode."""
    model, levels = make_model(), features(5, (8, 4, 2, 2))
    with torch.no_grad():
        together = model.latents(levels)
        for i in range(5):
            alone = model.latents([level[i : i + 1] for level in levels])
            assert torch.equal(alone.conditions.prototype_ids, together.conditions.prototype_ids[i : i + 1])
            for level in range(3):
                assert_same(alone.z[level][0], together.z[level][i])
                assert_same(alone.log_det[level][0], together.log_det[level][i])
            assert_same(alone.nll()[0], together.nll()[i])


def test_tables_are_made_once_and_let_go_by_a_training() -> None:
    convolution = ConditionedConvolution(3, CONDITION_DIM, 7).double()
    given, x = condition(4, 4), random(2, 4, 4, 3)
    prototypes = given.prototype
    known = Known(prototypes, torch.arange(2), (prototypes,))
    with torch.no_grad():
        expected = convolution.convolve(x, given)
        assert_same(convolution.convolve(x, given, known), expected)
        first = convolution.tables(given, known)
        convolution.convolve(x, given, known)
        assert convolution.tables(given, known) is first
    convolution.convolve(x, given)
    assert convolution.tables(given, known) is not first


def test_tables_are_made_anew_after_every_change_of_the_codes() -> None:
    convolution, given, codebook = ConditionedConvolution(3, CONDITION_DIM, 7).double(), condition(4, 4), torch.ones(3)
    known = Known(given.prototype, torch.arange(2), (torch.zeros(2), codebook))
    first = convolution.tables(given, known)
    assert convolution.tables(given, known) is first
    codebook += 1
    second = convolution.tables(given, known)
    assert second is not first
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    torch.optim.Adam([parameter], fused=True).step()
    third = convolution.tables(given, known)
    assert third is not second and convolution.tables(given, known) is third
    with torch.inference_mode():
        uncounted = known._replace(codebooks=(torch.zeros(2),))
        assert convolution.tables(given, uncounted) is not convolution.tables(given, uncounted)
