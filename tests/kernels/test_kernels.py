"""The kernels, run by Triton's interpreter, against float64 definitions written from the equations of the paper."""

from __future__ import annotations

import inspect
import math
from functools import partial
from typing import NamedTuple

import pytest
import rounding
import torch
from drawn import BLOCKS, Blocks
from golden import CENTRES, Golden, official_losses_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hgad_fast import ops
from hgad_fast.modules.flow import dense_position

pytestmark = [
    pytest.mark.usefixtures("nan_memory"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),  # NumPy, on the log of an impossible event
]


# affine coupling


def coupling_definition(x2: Tensor, a: Tensor, clamp: float, inverse: bool = False) -> tuple[Tensor, Tensor]:
    a_s, a_t = a.double().chunk(2, dim=1)
    s, t = clamp * torch.tanh(0.1 * a_s), 0.1 * a_t
    if inverse:
        return (x2.double() - t) * torch.exp(-s), -s.sum(1)
    return x2.double() * torch.exp(s) + t, s.sum(1)


COUPLING_SIZES = [(37, 19), (1, 1), (16, 16), (33, 100), (5, 300), (3, 1024)]  # the last take several channel blocks


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("n", "c2"), COUPLING_SIZES)
def test_coupling(interpreted, n, c2, inverse):
    x2, a = torch.randn(n, c2), 10 * torch.randn(n, 2 * c2)
    result = interpreted.coupling.affine_coupling(x2, a, 1.7, inverse=inverse)
    rounding.assert_close(result, coupling_definition, x2, a, 1.7, inverse)


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 2.2, 2.6, 40.0])  # tanh changes form at 2.5
def test_coupling_scale_is_accurate_at_every_magnitude(interpreted, scale):
    a = torch.cat([scale * (1 + 0.1 * torch.rand(8, 9)), torch.zeros(8, 9)], dim=1)
    result = interpreted.coupling.affine_coupling(torch.ones(8, 9), a)
    rounding.assert_close(result, coupling_definition, torch.ones(8, 9), a, 1.9)


@pytest.mark.parametrize(("n", "c2"), COUPLING_SIZES)
def test_coupling_backward(interpreted, n, c2):
    x2, a = torch.randn(n, c2), 5 * torch.randn(n, 2 * c2)
    gy2, glog_det = torch.randn(n, c2), torch.randn(n)
    check_coupling_backward(interpreted, x2, a, gy2, glog_det)


def test_coupling_backward_of_expanded_gradients(interpreted):
    x2, a = torch.randn(37, 19), 5 * torch.randn(37, 38)
    constant = torch.tensor(0.7)
    check_coupling_backward(interpreted, x2, a, constant.expand(37, 19), constant.expand(37))
    check_coupling_backward(interpreted, x2, a, torch.randn(19, 37).T, torch.randn(74)[::2])


def coupling_backward_definition(gy2: Tensor, glog_det: Tensor, y2: Tensor, a: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of x2, a and a's bias by automatic differentiation, and x2, which is rebuilt from y2."""
    with torch.enable_grad():
        x2 = coupling_definition(y2, a, 1.9, inverse=True)[0].detach().requires_grad_()
        a = a.detach().clone().requires_grad_()
        gx2, ga = torch.autograd.grad(coupling_definition(x2, a, 1.9), (x2, a), (gy2, glog_det))
    return gx2, ga, ga.sum(0), x2


def check_coupling_backward(interpreted, x2, a, gy2, glog_det):
    y2 = coupling_definition(x2, a, 1.9)[0].float()
    result = interpreted.coupling.affine_coupling_backward(gy2, glog_det, y2, a)
    rounding.assert_close(tuple(result), coupling_backward_definition, gy2, glog_det, y2, a)


def test_coupling_of_bfloat16_subnet_output(interpreted):
    """A bfloat16 `a` is read exactly; its gradient alone is rounded to bfloat16."""
    x2, a = torch.randn(37, 19), (5 * torch.randn(37, 38)).bfloat16()
    y2, log_det = interpreted.coupling.affine_coupling(x2, a)
    rounding.assert_close((y2, log_det), coupling_definition, x2, a, 1.9)

    gy2, glog_det = torch.randn(37, 19), torch.randn(37)
    gx2, ga, gb, rebuilt = interpreted.coupling.affine_coupling_backward(gy2, glog_det, y2, a)
    in_float32 = interpreted.coupling.affine_coupling_backward(gy2, glog_det, y2, a.float())
    assert ga.dtype == torch.bfloat16
    one_ulp = 2**-7 * in_float32[1].abs()  # the interpreter truncates where a GPU rounds
    assert ((ga.float() - in_float32[1]).abs() <= one_ulp).all()
    for value, expected_value in zip((gx2, gb, rebuilt), in_float32[:1] + in_float32[2:], strict=True):
        assert torch.equal(value, expected_value)


def test_coupling_undoes_itself(interpreted):
    x2, a = torch.randn(37, 19), 10 * torch.randn(37, 38)
    y2, log_det = interpreted.coupling.affine_coupling(x2, a)
    back, inverse_log_det = interpreted.coupling.affine_coupling(y2, a, inverse=True)

    def forward_and_back(x2: Tensor, a: Tensor) -> Tensor:
        return coupling_definition(coupling_definition(x2, a, 1.9)[0], a, 1.9, inverse=True)[0]

    rounding.assert_close(back, forward_and_back, x2, a)
    assert torch.equal(log_det + inverse_log_det, torch.zeros(37))


def test_coupling_reads_and_writes_column_slices_in_place(interpreted):
    """The flow may keep [x1 | x2] in one buffer: the coupling replaces x2 there and leaves the rest alone."""
    n, c1, c2 = 21, 13, 11
    a = torch.randn(n, 2 * c2 + 5)[:, 2 : 2 + 2 * c2]
    buffer, log_det = torch.randn(n, c1 + c2 + 4), torch.randn(n)
    before, log_det_before = buffer.clone(), log_det.clone()
    x2 = buffer[:, c1 : c1 + c2]
    interpreted.coupling.affine_coupling_into(x2, a, 1.9, inverse=False, out=x2, log_det=log_det)
    y2, sums = interpreted.coupling.affine_coupling(before[:, c1 : c1 + c2].contiguous(), a.contiguous())
    assert torch.equal(x2, y2)
    rounding.assert_close(log_det, torch.add, log_det_before, sums)
    assert torch.equal(buffer[:, :c1], before[:, :c1])
    assert torch.equal(buffer[:, c1 + c2 :], before[:, c1 + c2 :])

    gbuffer, glog_det = torch.randn(n, c1 + c2 + 4), torch.randn(n)
    gbefore = gbuffer.clone()
    gy2 = gbuffer[:, c1 : c1 + c2]
    expected = interpreted.coupling.affine_coupling_backward(gy2.clone(), glog_det, x2.clone(), a)
    ga, gb = interpreted.coupling.affine_coupling_backward_into(gy2, glog_det, x2, a, 1.9, gx2=gy2, x2=x2)
    for value, expected_value in zip((gy2, ga, gb, x2), expected, strict=True):
        assert torch.equal(value, expected_value)
    for now, then in ((buffer, before), (gbuffer, gbefore)):
        assert torch.equal(now[:, :c1], then[:, :c1]) and torch.equal(now[:, c1 + c2 :], then[:, c1 + c2 :])


@pytest.mark.parametrize(("n", "c2"), [(0, 19), (7, 0)])
def test_coupling_of_nothing(interpreted, n, c2):
    x2, a = torch.randn(n, c2), torch.randn(n, 2 * c2)
    y2, log_det = interpreted.coupling.affine_coupling(x2, a)
    assert y2.shape == (n, c2) and torch.equal(log_det, torch.zeros(n))
    gx2, ga, gb, rebuilt = interpreted.coupling.affine_coupling_backward(x2, log_det, y2, a)
    assert gx2.shape == rebuilt.shape == (n, c2) and ga.shape == (n, 2 * c2)
    assert torch.equal(gb, torch.zeros(2 * c2))


# whole coupling blocks


@pytest.mark.parametrize("sizes", BLOCKS.values(), ids=BLOCKS.keys())
def test_coupling_blocks(interpreted, sizes):
    drawn = Blocks.draw(*sizes)
    before = drawn.x.clone()
    drawn.check(interpreted.blocks.coupling_blocks(*drawn.arguments(), 1.3, precision="fp32"), 1.3)
    assert torch.equal(drawn.x, before)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("sizes", list(BLOCKS.values())[:4], ids=list(BLOCKS)[:4])
def test_coupling_blocks_round_the_operands_that_the_definition_rounds(interpreted, sizes, precision):
    drawn = Blocks.draw(*sizes)
    result = interpreted.blocks.coupling_blocks(*drawn.arguments(), precision=precision)
    drawn.check(result, precision=precision)
    with pytest.raises(AssertionError, match="rounding explains"):
        drawn.check(result)  # it did round
    # In float32 the definition rounds the same operands, but for one in hundreds that lies so near the middle of two
    # coarse numbers that a last digit decides. Operands rounded in another way would differ by the rounding itself.
    same = ops.coupling_blocks.reference(*drawn.arguments(), precision=precision)
    _, tolerance = drawn.exact_and_tolerance(precision=precision)
    for value, expected, allowed in zip(result, same, tolerance, strict=True):
        assert (value - expected).norm() < allowed.norm() / rounding.MARGIN / 4


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
@pytest.mark.parametrize("channels", [60, 63, 123, 127, 190])
def test_coupling_blocks_of_channels_that_need_little_padding_or_none(interpreted, channels, precision):
    """Padding by nothing keeps the strides of what is padded: a rotation was read transposed."""
    drawn = Blocks.draw(channels, 4, 1, 1, 3, 5)
    drawn.check(interpreted.blocks.coupling_blocks(*drawn.arguments(), precision=precision), precision=precision)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # 1 - 2 / inf is right
@pytest.mark.parametrize("scale", [0.0, 1e-8, 1e10])
def test_coupling_blocks_of_extreme_features(interpreted, scale):
    """The subnets' outputs grow with the features, but tanh bounds the scales: nothing overflows."""
    drawn = Blocks.draw(22, 4, 2, 1, 3, 5)
    drawn = drawn._replace(x=scale * drawn.x)
    for precision in ("fp32", "bf16"):
        result = interpreted.blocks.coupling_blocks(*drawn.arguments(), 5.0, precision=precision)
        drawn.check(result, 5.0, precision)


@pytest.mark.parametrize("conditional", [True, False])
def test_coupling_blocks_of_many_pixels_have_larger_patches(interpreted, monkeypatch, conditional):
    drawn = Blocks.draw(13, 4 if conditional else 0, 2, 1, 9, 17)
    small = interpreted.blocks.coupling_blocks(*drawn.arguments(), precision="fp32")
    monkeypatch.setattr(interpreted.blocks, "FEW_PIXELS", 0)
    large = interpreted.blocks.coupling_blocks(*drawn.arguments(), precision="fp32")
    for result in (small, large):
        drawn.check(result)


def test_coupling_blocks_of_strided_features_and_of_parameters_that_learn(interpreted):
    drawn = Blocks.draw(13, 4, 1, 1, 3, 5)
    buffer = torch.full((15, 20), torch.nan)
    buffer[:, 5:18] = drawn.x
    blocks = ops.Blocks(*(t.clone().requires_grad_() for t in drawn.blocks))
    expected = interpreted.blocks.coupling_blocks(*drawn.arguments(), precision="bf16")
    actual = interpreted.blocks.coupling_blocks(
        *drawn._replace(x=buffer[:, 5:18], blocks=blocks).arguments(), precision="bf16"
    )
    for value, expected_value in zip(actual, expected, strict=True):
        assert torch.equal(value, expected_value) and not value.requires_grad


@pytest.mark.parametrize("position_dim", [0, 4])
def test_coupling_blocks_of_nothing(interpreted, position_dim):
    drawn = Blocks.draw(13, position_dim, 2, 0, 3, 5)
    z, log_det = interpreted.blocks.coupling_blocks(*drawn.arguments(), precision="bf16")
    assert z.shape == (0, 13) and log_det.shape == (0,)


def test_coupling_blocks_refuse_a_dense_code(interpreted):
    x, _, parameters = Blocks.draw(13, 4, 1, 1, 3, 5).arguments()
    with pytest.raises(ValueError, match="separable position or none"):
        interpreted.blocks.coupling_blocks(x, [torch.zeros(15, 4)], parameters)


@pytest.mark.parametrize("channels", [1, 4, 12, 16, 17, 29, 37, 100, 112, 200])
def test_extents_are_powers_of_two_that_waste_less_than_sixteen(compiled, channels):
    edges = compiled.packing.edges(channels)
    assert edges[0] == 0 and channels <= edges[-1] < channels + 16
    for begin, end in zip(edges, edges[1:], strict=False):
        assert end - begin >= 16 and (end - begin) & (end - begin - 1) == 0


def test_flow_takes_whole_blocks_where_nobody_wants_a_gradient(interpreted, launches):
    drawn = Blocks.draw(29, 8, 2, 1, 5, 7)

    def flow(precision: str, **changes) -> tuple[Tensor, Tensor]:
        given = drawn._replace(**changes)
        launches.clear()
        result = ops.flow(given.x, given.blocks, given.position, precision=precision)
        launches.pop("_pack_kernel", None)
        return result

    drawn.check(flow("bf16"), precision="bf16")
    assert launches == {"_block_kernel": 2}
    assert ops.flow_path(drawn.x, drawn.position, "bf16") == "triton, whole blocks"

    flow("bf16", x=drawn.x.clone().requires_grad_())
    assert launches == {"_coupling_kernel": 2, "_rotate_kernel": 2}
    with torch.no_grad():
        flow("bf16", x=drawn.x.clone().requires_grad_())
    assert launches == {"_block_kernel": 2}
    flow("tf32")
    assert launches == {"_coupling_kernel": 2, "_rotate_kernel": 2}
    flow("fp32")
    assert launches == {"_forward_kernel": 2}
    dense = dense_position(drawn.position)
    flow("bf16", position=dense)
    assert launches == {"_forward_kernel": 2} and ops.flow_path(drawn.x, dense, "bf16") == "triton"
    assert ops.flow_path(torch.zeros(4, 201), None, "bf16") == "triton"
    assert ops.flow_path(drawn.x, drawn.position, "bf16", backend="torch") == "torch"


# hierarchical mixture: training terms


class Mixture(NamedTuple):
    """Parameters, with labels and pixels drawn around them so that every class and centre has weight."""

    z: Tensor
    labels: Tensor
    mu: Tensor
    delta: Tensor
    phi_inter: Tensor
    phi_intra: Tensor

    @classmethod
    def draw(cls, channels: int, classes: int, centres: int, labels: Tensor, pixels: int) -> Mixture:
        mu, delta = 0.5 * torch.randn(classes, channels), 0.3 * torch.randn(classes, centres - 1, channels)
        z = mu[labels.repeat_interleave(pixels // max(len(labels), 1))] + torch.randn(pixels, channels)
        return cls(z, labels, mu, delta, torch.randn(classes), torch.randn(classes, centres))

    def double(self) -> Mixture:
        return Mixture(*(t.double() if t.is_floating_point() else t for t in self))


def mixture_definition(mixture: Mixture, label_smoothing: float, stage: int) -> tuple[Tensor, ...]:
    """A, H, I and B from explicit differences to every centre; what is a constant in a term is detached."""
    z, labels, mu, delta, phi_inter, phi_intra = mixture
    labels = labels.repeat_interleave(len(z) // len(labels))
    log_pi, log_w = phi_inter.log_softmax(0), phi_intra.log_softmax(1)
    d = -0.5 * (z[:, None] - mu).square().sum(2)
    p = d.softmax(1)
    target = torch.full_like(d, label_smoothing / len(mu))
    target[torch.arange(len(z)), labels] += 1 - label_smoothing
    centres = mu.detach()[:, None] + torch.cat([torch.zeros_like(mu[:, None]), delta], 1)
    e = -0.5 * (z[:, None] - centres[labels]).square().sum(2)
    return (
        (d + log_pi).logsumexp(1),
        torch.special.entr(p).sum(1),
        (target * d).sum(1) - (d + log_pi.detach()).logsumexp(1),
        (e + log_w[labels]).logsumexp(1) if stage == 2 else z.new_empty(0),
    )


def mixture_terms_and_gradients(mixture: Mixture, gterms: list[Tensor], **options) -> tuple[Tensor, ...]:
    """Return the four terms, then the gradients of z and every parameter, by the definition."""
    leaves = [leaf.detach().requires_grad_() for leaf in (mixture.z, *mixture[2:])]
    with torch.enable_grad():
        terms = mixture_definition(Mixture(leaves[0], mixture.labels, *leaves[1:]), **options)
        loss = sum((g.to(term.dtype) * term).sum() for g, term in zip(gterms, terms, strict=True))
    return *(t.detach() for t in terms), *torch.autograd.grad(loss, leaves, materialize_grads=True)


def mixture_operations(mixture: Mixture, gterms: list[Tensor], **options) -> tuple[Tensor, ...]:
    """Return the same by the operations in torch, which expand the squares as the kernels do."""
    terms = ops.mixture_terms.reference(*mixture, **options)
    return *terms, *ops.mixture_terms_backward.reference(*gterms, *mixture, **options)


def check_mixture_terms(interpreted, mixture: Mixture, gterms: list[Tensor] | None = None, stage: int = 2) -> None:
    """Check the four terms and the gradients of z and every parameter against the definition."""
    options = {"label_smoothing": 0.05, "stage": stage}
    terms = interpreted.mixture.mixture_terms(*mixture, **options)
    gterms = gterms or [torch.randn(len(term)) for term in terms]
    gradients = interpreted.mixture.mixture_terms_backward(*gterms, *mixture, **options)
    expected = mixture_terms_and_gradients(mixture.double(), [g.double() for g in gterms], **options)
    _, tolerance = rounding.exact_and_tolerance(partial(mixture_operations, **options), mixture, gterms)
    rounding.assert_within((*terms, *gradients), expected, tolerance)


MIXTURES = {  # channels, classes, centres, labels, pixels
    "one class an image": (37, 5, 4, torch.tensor([3, 1]), 150),
    "one class a pixel, one class absent": (29, 4, 3, torch.tensor([0, 3, 1]).repeat(60)[:170], 170),
    "images of less than a tile": (12, 3, 2, torch.tensor([2, 0, 0, 1]), 20),
    "one pixel": (2, 2, 1, torch.tensor([1]), 1),
    "one class, one centre": (29, 1, 1, torch.tensor([0]), 70),
    "one channel": (1, 3, 2, torch.tensor([1]), 9),
    "more classes than a block": (23, 70, 3, torch.tensor([69, 2]), 66),
    "a block of classes and centres": (11, 62, 3, torch.tensor([61]), 17),
    "more centres than a block": (16, 2, 70, torch.tensor([1]), 33),
}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("sizes", MIXTURES.values(), ids=MIXTURES.keys())
def test_mixture_terms(interpreted, sizes, stage):
    check_mixture_terms(interpreted, Mixture.draw(*sizes), stage=stage)


def test_mixture_terms_of_strided_pixels_and_expanded_gradients(interpreted):
    mixture = Mixture.draw(37, 5, 4, torch.tensor([3, 1]), 40)
    buffer = torch.full((40, 48), torch.nan)
    buffer[:, 3:40] = mixture.z
    constant = torch.tensor(0.3).expand(40)
    check_mixture_terms(
        interpreted, mixture._replace(z=buffer[:, 3:40]), [constant, -constant, torch.randn(80)[::2], constant]
    )
    check_mixture_terms(interpreted, transposed(mixture))


def transposed(mixture: Mixture) -> Mixture:
    """Return the same values, in memory the other way round."""
    return Mixture(*(t.mT.contiguous().mT if t.dim() > 1 else t for t in mixture))


@pytest.mark.parametrize("classes", [5, 66])
def test_mixture_terms_far_from_the_origin(interpreted, classes):
    """The place of the centres does not matter: the error stays that of the distances."""
    mixture = Mixture.draw(12, classes, 2, torch.tensor([3, 1]), 40)
    shift = 1024.0  # rounds z and mu, before either side sees them
    check_mixture_terms(interpreted, mixture._replace(z=mixture.z + shift, mu=mixture.mu + shift))


def test_mixture_terms_of_impossible_events(interpreted):
    """Weights of zero are no NaN: neither one class's, nor one centre's, nor those of all centres of a class."""
    mixture = Mixture.draw(13, 4, 3, torch.tensor([0, 1, 2, 3]), 20)
    mixture.phi_inter[2] = mixture.phi_intra[1, 2] = -torch.inf
    check_mixture_terms(interpreted, mixture)

    mixture.phi_intra[3] = -torch.inf
    gterms = [torch.randn(20) for _ in range(4)]
    options = {"label_smoothing": 0.05, "stage": 2}
    own = interpreted.mixture.mixture_terms(*mixture, **options)[3]
    assert torch.equal(own[15:], torch.full((5,), -torch.inf)) and torch.isfinite(own[:15]).all()
    gradients = interpreted.mixture.mixture_terms_backward(*gterms, *mixture, **options)
    definition = partial(ops.mixture_terms_backward.reference, **options)
    rounding.assert_close(tuple(gradients), lambda *inputs: tuple(definition(*inputs)), *gterms, *mixture)

    mixture.phi_inter[:] = -torch.inf
    lse, entropy, information, _ = interpreted.mixture.mixture_terms(*mixture, **options)
    assert (lse == -torch.inf).all() and (information == torch.inf).all() and torch.isfinite(entropy).all()
    for gradient in interpreted.mixture.mixture_terms_backward(*gterms, *mixture, **options):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("stage", [1, 2])
def test_mixture_terms_form_offsets_where_a_table_would_be_large(interpreted, monkeypatch, stage):
    monkeypatch.setattr(interpreted.centres, "MAX_TABLE", 0)
    check_mixture_terms(interpreted, Mixture.draw(37, 5, 4, torch.tensor([3, 1]), 70), stage=stage)
    check_mixture_terms(interpreted, Mixture.draw(5, 63, 3, torch.tensor([62]), 9), stage=stage)


@pytest.fixture
def split(interpreted, monkeypatch) -> None:
    """Products of tf32 pieces, as NVIDIA's cards compute them; the interpreter adds what they leave out."""
    monkeypatch.setattr(interpreted.centres, "FLOAT32", "tf32x3")
    for module in (interpreted.centres, interpreted.mixture):
        monkeypatch.setattr(module, "SPLIT", True)


@pytest.mark.usefixtures("split")
def test_mixture_of_split_factors(interpreted):
    """Pieces are tf32, and their products, without those of the small ones, are as exact as float32."""
    mixture = Mixture.draw(37, 5, 4, torch.tensor([3, 1]), 70)
    check_mixture_terms(interpreted, mixture)
    check_mixture_terms(interpreted, mixture._replace(z=mixture.z + 1024, mu=mixture.mu + 1024))
    check_mixture_scores(interpreted, mixture, torch.randn(70))
    offsets = interpreted.centres.Offsets.prepare(*mixture[2:], 2)
    for table in (offsets.table, offsets.turned, interpreted.centres.Centres.prepare(*mixture[2:]).table):
        assert table.isfinite().all() and not (table.view(torch.int32) & 0x1FFF).any()
    o = mixture.mu - mixture.mu[:, None]
    assert ((offsets.table.sum(0)[:, :5, :37] - o).abs() <= 2.0**-22 * o.abs()).all()
    assert torch.equal(offsets.table.mT, offsets.turned)


@pytest.mark.parametrize("labels", [[7, -2], [7, 0, -2, 1] * 5], ids=["per image", "per pixel"])
def test_labels_beyond_the_classes_count_as_the_nearest(interpreted, labels):
    """On a GPU nobody can look at them in time: at least nothing outside of a table is read."""
    mixture = Mixture.draw(13, 4, 3, torch.zeros(1, dtype=torch.int64), 20)._replace(labels=torch.tensor(labels))
    near = mixture._replace(labels=mixture.labels.clamp(0, 3))
    options = {"label_smoothing": 0.05, "stage": 2}
    gterms = [torch.randn(20) for _ in range(4)]
    for function in (
        lambda m: interpreted.mixture.mixture_terms(*m, **options),
        lambda m: interpreted.mixture.mixture_terms_backward(*gterms, *m, **options),
    ):
        for actual, expected in zip(function(mixture), function(near), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("stage", [1, 2])
def test_launches_of_the_mixture(interpreted, launches, stage):
    mixture = Mixture.draw(13, 4, 3, torch.tensor([0, 3]), 20)
    options = {"label_smoothing": 0.05, "stage": stage}
    terms = interpreted.mixture.mixture_terms(*mixture, **options)
    interpreted.mixture.mixture_terms_backward(*terms, *mixture, **options)
    kernels = {"_prepare_terms_kernel": 2, "_terms_kernel": 1, "_terms_backward_kernel": 1, "_reduce_kernel": 1}
    assert launches == kernels


def test_mixture_gradients_are_the_same_to_the_bit(interpreted):
    mixture = Mixture.draw(13, 4, 3, torch.arange(300) % 4, 300)
    gterms = [torch.randn(300) for _ in range(4)]
    options = {"label_smoothing": 0.05, "stage": 2}
    first, second = (interpreted.mixture.mixture_terms_backward(*gterms, *mixture, **options) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_mixture_terms_of_nothing(interpreted):
    mixture = Mixture.draw(13, 4, 3, torch.zeros(0, dtype=torch.int64), 0)
    options = {"label_smoothing": 0.05, "stage": 2}
    terms = interpreted.mixture.mixture_terms(*mixture, **options)
    assert [len(term) for term in terms] == [0, 0, 0, 0]
    gradients = interpreted.mixture.mixture_terms_backward(*terms, *mixture, **options)
    for gradient, value in zip(gradients, (mixture.z, *mixture[2:]), strict=True):
        assert torch.equal(gradient, torch.zeros_like(value))


class Allocations(TorchDispatchMode):
    """Keeps every tensor that is made, so that their total bounds the peak from above."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return result

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


@pytest.mark.parametrize("labels", [torch.arange(8), torch.arange(32768) % 40], ids=["per image", "per pixel"])
def test_memory_of_the_prior(compiled, monkeypatch, labels):
    """Forward and backward need less than 64 MiB beyond z and its gradient at the paper's size; nothing is run."""

    for module in (compiled.centres, compiled.mixture):
        monkeypatch.setattr(module, "launch", lambda *args, **kwargs: None)
    shapes = ((40, 200), (40, 9, 200), (40,), (40, 10))
    mixture = Mixture(torch.zeros(32768, 200), labels, *map(torch.zeros, shapes))
    options = {"label_smoothing": 0.02, "stage": 2}
    with Allocations() as made:
        terms = compiled.mixture.mixture_terms(*mixture, **options)
        gradients = compiled.mixture.mixture_terms_backward(*terms, *mixture, **options)
    assert made.bytes - gradients[0].nbytes < 64 * 2**20


def mixture_losses_and_gradients(
    z: Tensor, log_det: Tensor, labels: Tensor, parameters: list[Tensor], backend: str = "auto", **options
) -> dict[str, Tensor]:
    """Return the means of the loss terms, their total, and its gradients for the mixture's parameters, by name."""
    losses = ops.mixture_losses(z, log_det, labels, *parameters, backend=backend, **options)
    terms = {term: value.mean() for term, value in losses.items()}
    terms["loss"] = sum({"L_mi": -100.0}.get(term, 1.0) * value for term, value in terms.items())
    terms["loss"].backward()
    gradients = {f"grad.{name}": part.grad for name, part in zip(CENTRES, parameters, strict=True)}
    return terms | {name: gradient for name, gradient in gradients.items() if gradient is not None}


@pytest.mark.parametrize("stage", ["inter", "full"])
@pytest.mark.parametrize("name", ["small", "odd"])
def test_mixture_losses_are_golden(interpreted, name, stage):
    """The official losses of a level, and their gradients for the mixture's parameters, through the kernels."""
    golden = Golden(name)
    options = {"label_smoothing": golden.config["label_smoothing"], "stage": 1 if stage == "inter" else 2}
    parameters = [golden[f"{part}.0"].requires_grad_() for part in CENTRES]
    inputs = golden["level0.z"], golden["level0.log_jac_det"], golden["labels"], parameters
    exact, tolerance = rounding.exact_and_tolerance(partial(mixture_losses_and_gradients, **options), *inputs)
    recorded = golden.below(f"level0.{stage}.")
    assert set(exact) == {name for name in recorded if not name.startswith(("grad.nfs", "grad.features"))}
    rounding.assert_within(mixture_losses_and_gradients(*inputs, backend="triton", **options), exact, tolerance)
    # z was rounded to float32 on the way into the file: the golden values carry the rounding of the whole computation.
    _, tolerance = rounding.exact_and_tolerance(
        official_losses_and_gradients, *golden.official_inputs(0, options["stage"])
    )
    recorded, tolerance = ({name: values[name] for name in exact} for values in (recorded, tolerance))
    rounding.assert_within(recorded, exact, tolerance)


# hierarchical mixture: scores


def scores_definition(mixture: Mixture, log_det: Tensor) -> tuple[Tensor, ...]:
    """log p_k (N, K), the full mixture's log-density and the entropy of the class posterior, by differences."""
    z, _, mu, delta, phi_inter, phi_intra = mixture
    centres = mu[:, None] + torch.cat([torch.zeros_like(mu[:, None]), delta], 1)
    e = -0.5 * (z[:, None, None] - centres).square().sum(3)
    constant = log_det[:, None] - 0.5 * z.shape[1] * math.log(2 * math.pi)
    log_p = (e + ops.log_weights(phi_intra)).logsumexp(2) + constant
    return log_p, (log_p + ops.log_weights(phi_inter)).logsumexp(1), torch.special.entr(e[..., 0].softmax(1)).sum(1)


def mixture_scores_operation(mixture: Mixture, log_det: Tensor) -> tuple[Tensor, ...]:
    """Return log p_k, the full mixture's log-density and the entropy by the operation in torch."""
    scores = ops.mixture_scores.reference(mixture.z, log_det, *mixture[2:], mixture.labels, per_class=True)
    return scores.class_log_density, scores.log_density, scores.entropy


def check_mixture_scores(interpreted, mixture: Mixture, log_det: Tensor) -> None:
    log_density, best_class, best, own, entropy, per_class = interpreted.mixture.mixture_scores(
        mixture.z, log_det, *mixture[2:], mixture.labels, per_class=True
    )
    log_p, expected, expected_entropy = scores_definition(mixture.double(), log_det.double())
    _, tolerance = rounding.exact_and_tolerance(mixture_scores_operation, mixture, log_det)
    rounding.assert_within((per_class, log_density, entropy), (log_p, expected, expected_entropy), tolerance)
    assert torch.equal(best_class, log_p.argmax(1))
    assert torch.equal(best, per_class.amax(1))
    labels = mixture.labels.repeat_interleave(len(log_p) // len(mixture.labels))
    assert torch.equal(own, per_class.gather(1, labels[:, None]).squeeze(1))


@pytest.mark.parametrize("sizes", MIXTURES.values(), ids=MIXTURES.keys())
def test_mixture_scores(interpreted, sizes):
    mixture = Mixture.draw(*sizes)
    check_mixture_scores(interpreted, mixture, torch.randn(len(mixture.z)))


def test_mixture_scores_of_impossible_events(interpreted):
    mixture = Mixture.draw(13, 6, 3, torch.arange(6), 18)
    mixture.phi_inter[2] = mixture.phi_intra[1, 2] = -torch.inf
    mixture.phi_intra[3] = -torch.inf
    check_mixture_scores(interpreted, mixture, torch.randn(18))


def test_mixture_scores_of_strided_pixels_without_labels(interpreted):
    mixture = Mixture.draw(13, 6, 3, torch.arange(6), 18)
    buffer = torch.full((18, 20), torch.nan)
    buffer[:, 5:18] = mixture.z
    log_det = torch.randn(36)[::2]
    scores = interpreted.mixture.mixture_scores(buffer[:, 5:18], log_det, *mixture[2:])
    expected = interpreted.mixture.mixture_scores(mixture.z, log_det, *mixture[2:], mixture.labels, per_class=True)
    for i in (0, 1, 2, 4):
        assert torch.equal(scores[i], expected[i])
    assert scores[3] is None and scores[5] is None
    for value, expected_value in zip(
        interpreted.mixture.mixture_scores(transposed(mixture).z, log_det, *transposed(mixture)[2:]),
        scores,
        strict=True,
    ):
        assert value is None or torch.equal(value, expected_value)


def test_mixture_scores_prefer_the_first_of_equal_classes(interpreted):
    mu = torch.randint(-2, 3, (1, 13)).float().repeat(9, 1)  # 9 classes alike; whole numbers, so that no product rounds
    z, weights = torch.randint(-2, 3, (12, 13)).float(), torch.zeros(9)
    _, best_class, _, _, entropy, _ = interpreted.mixture.mixture_scores(
        z, torch.zeros(12), mu, torch.zeros(9, 0, 13), weights, weights[:, None]
    )
    assert torch.equal(best_class, torch.zeros(12, dtype=torch.int64))
    rounding.assert_close(entropy, lambda logits: torch.special.entr(logits.softmax(1)).sum(1), torch.zeros(12, 9))


def test_tables_of_centres_are_kept_while_nothing_changes(interpreted, launches, monkeypatch):
    """The cache itself is tested in test_packed_parameters.py."""
    monkeypatch.setattr(interpreted.mixture, "PACKED", interpreted.cache.Cache(4))
    mixture, log_det = Mixture.draw(13, 4, 3, torch.tensor([0]), 6), torch.randn(6)
    parameters = [torch.nn.Parameter(t) for t in mixture[2:]]

    @torch.no_grad()
    def is_made_anew() -> bool:
        """Score, check the result, and tell whether the tables were made for it."""
        launches.clear()
        density = interpreted.mixture.mixture_scores(mixture.z, log_det, *parameters)[0]
        made = launches.get("_prepare_scores_kernel", 0) == 1
        copies = [t.detach().clone() for t in parameters]
        assert torch.equal(density, interpreted.mixture.mixture_scores(mixture.z, log_det, *copies)[0])
        return made

    assert is_made_anew() and not is_made_anew()
    for parameter in parameters:
        with torch.no_grad():
            parameter += 1
        assert is_made_anew() and not is_made_anew()


def test_mixture_scores_of_nothing(interpreted):
    mixture = Mixture.draw(13, 4, 3, torch.zeros(0, dtype=torch.int64), 0)
    scores = interpreted.mixture.mixture_scores(mixture.z, torch.zeros(0), *mixture[2:], per_class=True)
    assert [None if s is None else tuple(s.shape) for s in scores] == [(0,), (0,), (0,), None, (0,), (0, 4)]


# the definitions themselves, and the surface


@pytest.mark.parametrize(
    "name",
    [
        "affine_coupling",
        "affine_coupling_backward",
        "coupling_blocks",
        "mixture_terms",
        "mixture_terms_backward",
        "mixture_scores",
        "nearest_code",
        "code_statistics",
        "place_distances",
    ],
)
def test_kernel_and_definition_have_one_signature(interpreted, name):
    definition = getattr(ops, name)
    kernel = getattr(getattr(interpreted, definition.kernel_file), name)
    assert inspect.signature(kernel).parameters == inspect.signature(definition.reference).parameters


def log_sum_exp(values: list[float]) -> float:
    peak = max(values)
    return peak + math.log(sum(math.exp(value - peak) for value in values))


def half_distance(x: Tensor, y: Tensor) -> float:
    return -0.5 * sum((a - b) ** 2 for a, b in zip(x.tolist(), y.tolist(), strict=True))


@st.composite
def mixtures(draw) -> Mixture:
    channels, classes, centres = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    images, pixels = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    labels = torch.randint(classes, (images if draw(st.booleans()) else images * pixels,))
    mixture = Mixture.draw(channels, classes, centres, labels, images * pixels)
    spread = draw(st.floats(0.0, 5.0))
    return mixture._replace(mu=spread * mixture.mu, delta=spread * mixture.delta).double()


@settings(max_examples=40, deadline=None)
@given(mixture=mixtures(), smoothing=st.floats(0.0, 0.5))
def test_mixture_definitions_match_loops(mixture, smoothing):
    z, labels, mu, delta, phi_inter, phi_intra = mixture
    K, M = phi_intra.shape
    terms = ops.mixture_terms.reference(*mixture, label_smoothing=smoothing, stage=2)
    log_det = torch.randn(len(z), dtype=torch.float64)
    scores = ops.mixture_scores.reference(z, log_det, *mixture[2:], labels, per_class=True)
    for n in range(len(z)):
        y = int(labels[n * len(labels) // len(z)])
        d = [half_distance(z[n], mu[k]) for k in range(K)]
        log_pi = [float(phi_inter[k]) - log_sum_exp(phi_inter.tolist()) for k in range(K)]
        p = [math.exp(value - log_sum_exp(d)) for value in d]
        entropy = -sum(value * math.log(value) for value in p if value > 0)
        lse = log_sum_exp([d[k] + log_pi[k] for k in range(K)])
        target = [smoothing / K + (1 - smoothing if k == y else 0) for k in range(K)]
        log_p = []
        for k in range(K):
            log_w = [float(value) - log_sum_exp(phi_intra[k].tolist()) for value in phi_intra[k]]
            centres = [mu[k]] + [mu[k] + delta[k, m] for m in range(M - 1)]
            log_p.append(log_sum_exp([log_w[m] + half_distance(z[n], centres[m]) for m in range(M)]))
        information = sum(target[k] * (d[k] - lse) for k in range(K))
        for term, expected in zip(terms, (lse, entropy, information, log_p[y]), strict=True):
            assert float(term[n]) == pytest.approx(expected, rel=1e-10, abs=1e-10)

        constant = float(log_det[n]) - 0.5 * z.shape[1] * math.log(2 * math.pi)
        full = log_sum_exp([log_p[k] + log_pi[k] for k in range(K)])
        expected = (full + constant, max(log_p) + constant, log_p[y] + constant, entropy)
        actual = (scores.log_density, scores.best_log_density, scores.own_log_density, scores.entropy)
        for score, value in zip(actual, expected, strict=True):
            assert float(score[n]) == pytest.approx(value, rel=1e-10, abs=1e-10)
        assert log_p[int(scores.best_class[n])] == pytest.approx(max(log_p), rel=1e-10)
        assert scores.class_log_density[n].tolist() == pytest.approx([v + constant for v in log_p], rel=1e-10)
