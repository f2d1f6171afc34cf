"""The fused operations against the equations of the paper, in float64 and by definition."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import rounding
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import SAME_IN_FLOAT64
from torch import Tensor

from benchmarks import scaling
from hgad_fast import ops
from hgad_fast.modules.flow import ConditionalFlow, dense_position, sinusoidal_position
from hgad_fast.ops import blocks as blocks_module
from hgad_fast.ops import dispatch, subnet
from hgad_fast.ops import mixture as mixture_module

F64 = torch.float64
CLAMP = 1.9


def make_blocks(channels: int, position_dim: int, layers: int, dtype: torch.dtype = F64) -> list[ops.Block]:
    """Blocks far from their initialisation, so that every term counts."""
    passive, active = channels - channels // 2, channels // 2
    hidden = 2 * (passive + position_dim)
    blocks = []
    for _ in range(layers):
        rotation = torch.linalg.qr(torch.randn(channels, channels, dtype=F64))[0].to(dtype)
        parameters = (
            torch.randn(hidden, passive + position_dim, dtype=dtype) / math.sqrt(passive + position_dim),
            torch.randn(hidden, dtype=dtype),
            torch.randn(2 * active, hidden, dtype=dtype) * (5 / math.sqrt(hidden)),
            torch.randn(2 * active, dtype=dtype),
            10 + torch.randn(1, channels, dtype=dtype),
            torch.randn(1, channels, dtype=dtype),
        )
        blocks.append(ops.Block(*(p.requires_grad_() for p in parameters), rotation))
    return blocks


def leaves_of(blocks: list[ops.Block]) -> list[Tensor]:
    return [tensor for block in blocks for tensor in block[:6]]


def make_mixture(classes: int, centres: int, channels: int, spread: float = 2.0) -> list[Tensor]:
    shapes = ((classes, channels), (classes, centres - 1, channels), (classes,), (classes, centres))
    scales = (spread, 1.0, 1.0, 1.0)
    return [(s * torch.randn(shape, dtype=F64)).requires_grad_() for shape, s in zip(shapes, scales, strict=True)]


def naive_terms(z: Tensor, labels: Tensor, mu: Tensor, delta: Tensor, phi_inter: Tensor, phi_intra: Tensor, e: float):
    """A, H, I, B of the paper by explicit distances; what is constant where, is detached."""
    d = -0.5 * (z[:, None] - mu).square().sum(-1)
    log_pi = phi_inter.log_softmax(0)
    target = torch.full_like(d, e / len(mu)).scatter_add(1, labels[:, None], torch.full_like(d[:, :1], 1 - e))
    log_p = d.log_softmax(1)
    constant = log_pi.detach()
    information = (target * ((d + constant).log_softmax(1) - constant)).sum(1)
    own = mu.detach()[labels][:, None] + torch.cat([torch.zeros_like(mu)[:, None], delta], 1)[labels]
    log_w = phi_intra.log_softmax(1)[labels]
    intra = (log_w - 0.5 * (z[:, None] - own).square().sum(-1)).logsumexp(1)
    return (d + log_pi).logsumexp(1), -(log_p.exp() * log_p).sum(1), information, intra


# ---- affine coupling


def test_affine_coupling_is_the_equation_and_its_inverse():
    x2, a = torch.randn(11, 3, dtype=F64), 4 * torch.randn(11, 6, dtype=F64)
    y2, log_det = ops.affine_coupling(x2, a, CLAMP)
    s = CLAMP * torch.tanh(0.1 * a[:, :3])
    torch.testing.assert_close(y2, x2 * s.exp() + 0.1 * a[:, 3:])
    torch.testing.assert_close(log_det, s.sum(1))
    back, inverse_log_det = ops.affine_coupling(y2, a, CLAMP, inverse=True)
    torch.testing.assert_close(back, x2)
    torch.testing.assert_close(inverse_log_det, -log_det)


def test_affine_coupling_gradcheck():
    x2 = torch.randn(5, 3, dtype=F64, requires_grad=True)
    a = torch.randn(5, 6, dtype=F64, requires_grad=True)
    for inverse in (False, True):
        assert torch.autograd.gradcheck(lambda x, a, i=inverse: ops.affine_coupling(x, a, CLAMP, inverse=i), (x2, a))


def test_affine_coupling_backward_equals_autograd():
    x2 = torch.randn(9, 4, dtype=F64, requires_grad=True)
    a = (3 * torch.randn(9, 8, dtype=F64)).requires_grad_()
    y2, log_det = ops.affine_coupling(x2, a, CLAMP)
    gy2, glog_det = torch.randn_like(y2), torch.randn_like(log_det)
    expected = torch.autograd.grad((y2, log_det), (x2, a), (gy2, glog_det))
    gx2, ga, gb, rebuilt = ops.affine_coupling_backward(gy2, glog_det, y2.detach(), a.detach(), CLAMP)
    torch.testing.assert_close((gx2, ga), expected)
    torch.testing.assert_close(gb, expected[1].sum(0))
    torch.testing.assert_close(rebuilt, x2.detach())


# ---- flow

POSITIONS = ("separable", "dense", "none")


def make_position(kind: str, images: int, h: int, w: int, dim: int) -> ops.Position:
    if kind == "separable":
        return sinusoidal_position(h, w, dim, dtype=F64)
    return torch.randn(images * h * w, dim, dtype=F64, requires_grad=True) if kind == "dense" else None


def dot(u: list[float], v: list[float]) -> float:
    return sum(a * b for a, b in zip(u, v, strict=True))


def flow_by_loops(x: list[float], blocks: list[ops.Block], position: list[float]) -> tuple[list[float], float]:
    """z and log-determinant of one pixel, number by number."""
    log_det = 0.0
    for block in blocks:
        w1, b1, w2, b2, scale, offset, rotation = (tensor.tolist() for tensor in block)
        active = len(x) // 2
        passive = len(x) - active
        seen = x[:passive] + position
        hidden = [max(0.0, b + dot(row, seen)) for row, b in zip(w1, b1, strict=True)]
        a = [b + dot(row, hidden) for row, b in zip(w2, b2, strict=True)]
        s = [CLAMP * math.tanh(0.1 * a[i]) for i in range(active)]
        moved = x[:passive] + [x[passive + i] * math.exp(s[i]) + 0.1 * a[active + i] for i in range(active)]
        gain = [0.2 * math.log(1 + math.exp(g / 2)) for g in scale[0]]
        scaled = [v * g + o for v, g, o in zip(moved, gain, offset[0], strict=True)]
        x = [dot(row, scaled) for row in rotation]
        log_det += sum(s) + sum(map(math.log, gain))
    return x, log_det


@settings(max_examples=25, deadline=None)
@given(
    channels=st.integers(2, 6),
    layers=st.integers(1, 3),
    h=st.integers(1, 3),
    w=st.integers(1, 3),
    images=st.integers(1, 2),
    conditional=st.booleans(),
    spread=st.floats(0.0, 10.0),
    seed=st.integers(0, 2**31),
)
def test_flow_matches_loops(channels, layers, h, w, images, conditional, spread, seed):
    torch.manual_seed(seed)
    blocks = [ops.Block(*(t.detach() for t in block)) for block in make_blocks(channels, 4 * conditional, layers)]
    position = sinusoidal_position(h, w, 4, dtype=F64) if conditional else None
    x = spread * torch.randn(images * h * w, channels, dtype=F64)
    z, log_det = ops.flow(x, blocks, position)
    for n in range(len(x)):
        row, column = n // w % h, n % w
        code = [*position.column[column].tolist(), *position.row[row].tolist()] if position else []
        expected_z, expected_log_det = flow_by_loops(x[n].tolist(), blocks, code)
        assert z[n].tolist() == pytest.approx(expected_z, rel=1e-10, abs=1e-10)
        assert float(log_det[n]) == pytest.approx(expected_log_det, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize(
    ("memory", "every"), [("standard", 0), ("reversible", 0), ("reversible", 1), ("reversible", 2)]
)
@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("channels", [2, 7, 10])
def test_flow_and_every_gradient_equal_the_definition(channels: int, kind: str, memory: str, every: int):
    images, h, w, dim = 3, 2, 5, 8 if kind != "none" else 0
    blocks = make_blocks(channels, dim, layers=5)
    position = make_position(kind, images, h, w, dim)
    x = torch.randn(images * h * w, channels, dtype=F64, requires_grad=True)
    leaves = [x, *leaves_of(blocks), *([position] if kind == "dense" else [])]
    result = ops.flow(x, blocks, position, clamp=CLAMP, memory=memory, checkpoint_every=every)
    expected = ops.flow_definition(x, blocks, position, clamp=CLAMP)
    upstream = [torch.randn_like(t) for t in expected]
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    gradients = torch.autograd.grad(result, leaves, upstream)
    for actual, expected_gradient in zip(gradients, torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(actual, expected_gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("memory", ops.MEMORY_MODES)
def test_flow_gradcheck(memory: str):
    blocks = make_blocks(5, 4, layers=2)
    position = make_position("dense", 1, 2, 2, 4)
    x = torch.randn(4, 5, dtype=F64, requires_grad=True)

    def run(x, position, *leaves):
        rebuilt = [ops.Block(*leaves[6 * k : 6 * k + 6], block.w_perm) for k, block in enumerate(blocks)]
        return ops.flow(x, rebuilt, position, clamp=CLAMP, memory=memory)

    assert torch.autograd.gradcheck(run, (x, position, *leaves_of(blocks)))


@pytest.mark.parametrize(
    ("layers", "every", "inputs"), [(7, 0, 0), (7, 1, 6), (7, 3, 2), (7, 6, 1), (7, 7, 0), (1, 1, 0)]
)
def test_reversible_memory_keeps_the_output_and_every_kth_input(layers: int, every: int, inputs: int):
    """They are all that grows with the pixels; x is the caller's, and let go."""
    blocks, kept = make_blocks(6, 8, layers), {}
    x, position = torch.randn(2 * 35, 6, dtype=F64), sinusoidal_position(5, 7, 8, dtype=F64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        z, _ = ops.flow(x, blocks, position, memory="reversible", checkpoint_every=every)
    grown = [t for t in kept.values() if len(t) == len(x)]
    assert len(grown) == 1 + inputs and z.data_ptr() in kept and x.data_ptr() not in kept


@pytest.mark.parametrize("every", [0, 12, 1])
def test_drift_of_rebuilt_inputs_is_bounded(every: int, monkeypatch):
    """48 blocks in float32, with the official sizes' channels: what the backward pass takes for x against x itself."""
    flow = ConditionalFlow(200, 48, 0).requires_grad_(False)
    flow.memory, flow.checkpoint_every = "reversible", every
    x, rebuilt = torch.randn(16, 200), {}
    layers, backward = subnet.layers, ops.affine_coupling_backward

    def seen_subnet(x1, *rest):
        rebuilt["x1"] = x1.clone()
        return layers(x1, *rest)

    def seen_backward(*args, **options):
        result = backward(*args, **options)
        rebuilt["x2"] = result[3].clone()
        return result

    with monkeypatch.context() as patched:
        z, log_det = flow.requires_grad_()(x)
        patched.setattr(subnet, "layers", seen_subnet)
        patched.setattr(blocks_module, "affine_coupling_backward", seen_backward)
        (0.5 * z.square().sum() - log_det.sum()).backward()  # ends with the first block
    back = torch.cat([rebuilt["x1"], rebuilt["x2"]], 1)
    assert not torch.equal(back, x)

    def there_and_back(blocks: ops.Blocks, x: Tensor) -> Tensor:
        """Return the input of the blocks up to the first that is kept, from their output."""
        first = [ops.Block(*(part.detach() for part in block)) for block in blocks.each()[: every or 48]]
        return ops.flow_definition(ops.flow_definition(x, first)[0], first, inverse=True)[0]

    rounding.assert_close(back, there_and_back, flow.requires_grad_(False).blocks, x)


def test_float32_gradients_are_about_as_exact_as_the_official_ones():
    """In a whole step at the official channels and depth, what is rebuilt included; medians over five seeds."""
    errors = scaling.gradient_errors(replace(scaling.SMALL, images=2, height=4, width=4, position_dim=16))["median"]
    official = errors.pop("official, checkpoint_every=0")
    assert 0 < official < 1e-5
    # Both are rounding errors of the same size, near 6e-7; a mistake in what is rebuilt would be a thousand times that.
    assert len(errors) == 3 and max(errors.values()) <= 8 * official


def test_flow_gradients_of_one_output_or_of_parameters_alone():
    blocks, x = make_blocks(6, 0, layers=2), torch.randn(8, 6, dtype=F64)
    for pick in (0, 1):
        actual = torch.autograd.grad(ops.flow(x, blocks, clamp=CLAMP)[pick].sum(), leaves_of(blocks), allow_unused=True)
        expected = torch.autograd.grad(
            ops.flow_definition(x, blocks, clamp=CLAMP)[pick].sum(), leaves_of(blocks), allow_unused=True
        )
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", POSITIONS)
def test_inverse_undoes_the_flow(kind: str):
    dim = 8 if kind != "none" else 0
    blocks, position = make_blocks(9, dim, layers=4), make_position(kind, 2, 3, 4, dim)
    x = torch.randn(24, 9, dtype=F64)
    z, log_det = ops.flow(x, blocks, position, clamp=CLAMP)
    back, inverse_log_det = ops.flow(z, blocks, position, clamp=CLAMP, inverse=True)
    torch.testing.assert_close(back, x, rtol=SAME_IN_FLOAT64, atol=SAME_IN_FLOAT64)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=SAME_IN_FLOAT64, atol=SAME_IN_FLOAT64)


def test_log_determinant_is_slogdet_of_the_jacobian():
    blocks, x = make_blocks(7, 0, layers=3), torch.randn(4, 7, dtype=F64)
    _, log_det = ops.flow(x, blocks, clamp=CLAMP)
    for row, value in zip(x, log_det, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda r: ops.flow(r[None], blocks, clamp=CLAMP)[0][0], row)
        torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, value.detach(), rtol=1e-9, atol=1e-9)


def test_separable_position_equals_the_dense_code():
    blocks = make_blocks(6, 12, layers=2)
    position = sinusoidal_position(3, 5, 12, dtype=F64)
    x = torch.randn(30, 6, dtype=F64)
    separable = ops.flow(x, blocks, position, clamp=CLAMP)
    dense = ops.flow(x, blocks, dense_position(position, batch=2), clamp=CLAMP)
    torch.testing.assert_close(separable, dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("precision", "instructions"), [("tf32", ""), ("bf16", ""), ("bf16", "AMX")])
@pytest.mark.parametrize("memory", ops.MEMORY_MODES)
def test_reduced_precision_rounds_the_subnets_alone(precision: str, instructions: str, memory: str, monkeypatch):
    """Values and gradients are those of float64 but for the rounding of operands; in full precision they are not.

    Processors with and without instructions for bfloat16 compute the same in two ways, which both run on any of them.
    """
    monkeypatch.setattr(subnet, "bfloat16_instructions", lambda: instructions)
    blocks = [ops.Block(*(part.detach() for part in block)) for block in make_blocks(12, 8, 3, torch.float32)]
    x, position = torch.randn(16, 12), sinusoidal_position(4, 4, 8)

    def run(x: Tensor, position: ops.SeparablePosition, blocks: list[ops.Block], precision: str = precision):
        leaves = [leaf.requires_grad_() for leaf in leaves_of(blocks)]
        z, log_det = ops.flow(x, blocks, position, clamp=CLAMP, precision=precision, memory=memory)
        return z, log_det, *torch.autograd.grad(z.square().sum() + log_det.sum(), leaves)

    result = run(x, position, blocks)
    rounding.assert_close(result, run, x, position, blocks)
    with pytest.raises(AssertionError, match="rounding explains"):
        rounding.assert_close(result, partial(run, precision="fp32"), x, position, blocks)


@pytest.mark.parametrize(("instructions", "dtype"), [("", torch.float32), ("AVX512_BF16", torch.bfloat16)])
def test_hidden_layers_are_kept_in_the_precision_of_the_products(instructions, dtype, monkeypatch):
    monkeypatch.setattr(subnet, "bfloat16_instructions", lambda: instructions)
    blocks = ops.Blocks.stack(make_blocks(6, 8, 2, torch.float32))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        ops.flow(torch.randn(12, 6), blocks, sinusoidal_position(3, 4, 8), precision="bf16")
    hidden = blocks.w1.shape[1]
    assert [t.dtype for t in kept if t.shape == (12, hidden)] == [dtype] * 2


@pytest.mark.parametrize("width", [8, 0])
def test_bfloat16_products_with_a_dense_position_and_with_none(width: int, monkeypatch):
    monkeypatch.setattr(subnet, "bfloat16_instructions", lambda: "AMX")
    blocks = [ops.Block(*(part.detach() for part in block)) for block in make_blocks(12, width, 2, torch.float32)]
    x, position = torch.randn(9, 12), torch.randn(9, width) if width else None

    def z(x: Tensor, position: Tensor | None, blocks: list[ops.Block]) -> tuple[Tensor, Tensor]:
        return ops.flow(x, blocks, position, clamp=CLAMP, precision="bf16")

    rounding.assert_close(z(x, position, blocks), z, x, position, blocks)


def test_relu_on_the_bits_of_bfloat16_is_relu():
    """For each of the numbers that there are, infinities and NaNs among them; so is the mask of the gradient."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    h, expected = subnet.relu_(numbers.clone()), numbers.float().relu()
    torch.testing.assert_close(h.float(), expected, rtol=0, atol=0, equal_nan=True)
    usual = ~numbers.isnan()
    gh = subnet.masked_(torch.full_like(numbers, -2), h)
    assert gh[usual].equal(torch.where(numbers[usual] > 0, -2.0, 0.0).bfloat16())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_made_of_parameters_is_made_once_until_one_changes(precision: str, monkeypatch):
    made, gain_of = [], subnet.gain_of
    monkeypatch.setattr(subnet, "gain_of", lambda scale: (made.append(1), gain_of(scale))[1])
    blocks = ops.Blocks.stack(
        [ops.Block._make(p.detach() for p in block) for block in make_blocks(6, 8, 2, torch.float32)]
    )
    x, position = torch.randn(12, 6), sinusoidal_position(3, 4, 8)

    def z() -> Tensor:
        return ops.flow(x, blocks, position, precision=precision)[0]

    before = z()
    assert z().equal(before) and len(made) == 1
    for name, parameter in blocks._asdict().items():
        parameter.mul_(1.5)
        after = z()
        assert not after.equal(before), f"{name} changed, and z did not"
        before = after
    assert len(made) == 1 + len(blocks)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_written_to_weights_in_any_way_is_seen(precision: str):
    """Averages of weights are kept through `data`, which counts no change."""
    blocks = ops.Blocks.stack([ops.Block._make(p.detach() for p in b) for b in make_blocks(6, 8, 2, torch.float32)])
    x, position = torch.randn(12, 6), sinusoidal_position(3, 4, 8)

    def z(parameters: ops.Blocks) -> Tensor:
        return ops.flow(x, parameters, position, precision=precision)[0]

    ways = (lambda p: p.data.mul_(1.5), lambda p: p.data.copy_(p.data * 0.5), lambda p: p.numpy().__imul__(3.0))
    z(blocks)
    for way in ways:
        for parameter in blocks:
            way(parameter)
            torch.testing.assert_close(z(blocks), z(ops.Blocks._make(p.clone() for p in blocks)), rtol=0, atol=0)


def test_what_is_written_to_rows_of_weights_is_seen():
    """However large the tensors are: to a hidden unit of one block, and to one centre of each class."""
    flow, x = ConditionalFlow(40, 2, 64).requires_grad_(False), torch.randn(6, 40)
    grid = flow.grid(2, 3)
    flow(x, grid)
    flow.w2.data[1, 3].mul_(2)
    torch.testing.assert_close(flow(x, grid)[0], ops.flow(x, ops.Blocks._make(p.clone() for p in flow.blocks), grid)[0])
    mixture = [p.detach().float() for p in make_mixture(20, 12, 64)]
    z, log_det = torch.randn(5, 64), torch.zeros(5)
    ops.mixture_scores(z, log_det, *mixture)
    mixture[1].data[:, 3] = mixture[0] * 0.5
    expected = ops.mixture_scores(z, log_det, *(p.clone() for p in mixture)).log_density
    torch.testing.assert_close(ops.mixture_scores(z, log_det, *mixture).log_density, expected, rtol=0, atol=0)


@pytest.mark.parametrize("position", ["separable", "none"])
def test_no_pixels(position: str):
    blocks = ops.Blocks.stack(make_blocks(6, 8 if position == "separable" else 0, 2, torch.float32))
    code = sinusoidal_position(3, 4, 8) if position == "separable" else None
    for x in (torch.randn(0, 6), torch.randn(0, 6, requires_grad=True)):
        z, log_det = ops.flow(x, ops.Blocks._make(p.detach() for p in blocks), code)
        assert z.shape == (0, 6) and log_det.shape == (0,)


def test_tf32_rounds_to_nearest():
    x = torch.tensor([1.0, 1 + 2.0**-11, 1 + 3 * 2.0**-12, -1 - 3 * 2.0**-12, 1 + 2.0**-10])
    rounded = subnet.operand(x, "tf32")
    assert rounded.tolist() == [1.0, 1 + 2.0**-10, 1 + 2.0**-10, -1 - 2.0**-10, 1 + 2.0**-10]


@pytest.mark.parametrize("rows", [0, 1])
def test_flow_of_hardly_any_pixels(rows: int):
    blocks, x = make_blocks(4, 0, layers=2), torch.randn(rows, 4, dtype=F64, requires_grad=True)
    z, log_det = ops.flow(x, blocks, clamp=CLAMP)
    assert z.shape == (rows, 4) and log_det.shape == (rows,)
    (gx,) = torch.autograd.grad(z.sum() + log_det.sum(), x)
    assert gx.shape == x.shape


def test_flow_names_what_does_not_fit():
    blocks = make_blocks(6, 8, layers=1)
    x = torch.randn(12, 6, dtype=F64)
    with pytest.raises(ValueError, match=r"x has shape \(12, 5\); this flow takes \(N, 6\)"):
        ops.flow(x[:, :5], blocks)
    with pytest.raises(ValueError, match=r"12 pixels of this flow need \(12, 8\)"):
        ops.flow(x, blocks)
    with pytest.raises(ValueError, match="separable position"):
        ops.flow(x, blocks, sinusoidal_position(5, 5, 8, dtype=F64))
    with pytest.raises(ValueError, match="memory is 'small'"):
        ops.flow(x, blocks, memory="small")
    for blocks_apart in (-1, 1.5):
        with pytest.raises(ValueError, match=f"checkpoint_every is {blocks_apart}; allowed is a whole number from 0"):
            ops.flow(x, blocks, memory="reversible", checkpoint_every=blocks_apart)
    with pytest.raises(ValueError, match="precision is 'fp8'"):
        ops.flow(x, blocks, precision="fp8")


# ---- mixture

LABELS = {
    "per image": lambda n, k: torch.tensor([k - 1, 0, k - 1]),
    "per pixel": lambda n, k: torch.randint(0, k, (n,)),
    "one class": lambda n, k: torch.zeros(n, dtype=torch.int64),
}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
@pytest.mark.parametrize(("classes", "centres", "channels"), [(4, 3, 7), (1, 1, 5), (9, 1, 4), (2, 5, 3)])
def test_mixture_losses_and_gradients_are_the_equations(labels, classes, centres, channels, stage):
    n, e = 18, 0.07
    z, log_det = torch.randn(n, channels, dtype=F64, requires_grad=True), torch.randn(n, dtype=F64)
    parameters = make_mixture(classes, centres, channels)
    labels = labels(n, classes)
    pixel_labels = labels.repeat_interleave(n // len(labels))
    lse, entropy, information, own = naive_terms(z, pixel_labels, *parameters, e)
    expected = {"L_g": -(lse + log_det) / channels, "L_mi": information, "L_e": entropy}
    if stage == 2:
        expected["L_g_intra"] = -(own + log_det) / channels
        expected["L_z"] = -F.logsigmoid((own + log_det) / channels - 0.5 * math.log(2 * math.pi))
    actual = ops.mixture_losses(z, log_det, labels, *parameters, label_smoothing=e, stage=stage)
    assert actual.keys() == expected.keys()
    upstream = {name: torch.randn(n, dtype=F64) for name in expected}
    leaves = [z, *parameters]
    gradients = [
        torch.autograd.grad(list(terms.values()), leaves, list(upstream.values()), allow_unused=True)
        for terms in (actual, expected)
    ]
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-10, atol=1e-10)
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("stage", [1, 2])
def test_mixture_losses_gradcheck(stage: int):
    z = torch.randn(6, 4, dtype=F64, requires_grad=True)
    log_det = torch.randn(6, dtype=F64, requires_grad=True)
    mu, delta, phi_inter, phi_intra = make_mixture(3, 2, 4)
    labels = torch.tensor([2, 0])

    def run(z, log_det, delta, phi_intra):  # mu and phi_inter are constants in some terms, on purpose
        terms = ops.mixture_losses(z, log_det, labels, mu, delta, phi_inter, phi_intra, stage=stage)
        return tuple(terms.values())

    assert torch.autograd.gradcheck(run, (z, log_det, delta.detach(), phi_intra.detach()))
    if stage == 2:
        assert torch.autograd.gradcheck(run, (z.detach(), log_det, delta, phi_intra))


def test_soft_targets_replace_the_smoothed_label():
    z, log_det = torch.randn(10, 6, dtype=F64), torch.zeros(10, dtype=F64)
    parameters, labels = make_mixture(5, 2, 6), torch.randint(0, 5, (10,))
    targets = torch.rand(10, 5, dtype=F64).softmax(1)
    d = -0.5 * (z[:, None] - parameters[0]).square().sum(-1)
    log_pi = parameters[2].log_softmax(0)
    expected = (targets * ((d + log_pi).log_softmax(1) - log_pi)).sum(1)
    actual = ops.mixture_losses(z, log_det, labels, *parameters, targets=targets)["L_mi"]
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_far_centres_do_not_cancel():
    """Own-class centring keeps float32 accuracy where |z|^2 - 2 z mu + |mu|^2 has lost it."""
    classes, channels, n = 4, 64, 50
    mu = 160 * F.normalize(torch.randn(classes, channels, dtype=F64), dim=1)
    labels = torch.randint(0, classes, (n,))
    z = mu[labels] + torch.randn(n, channels, dtype=F64)
    z, mu = z.float(), mu.float()  # the same numbers for both
    parameters = (mu, torch.randn(classes, 2, channels), torch.randn(classes), torch.randn(classes, 3))
    lse, entropy, information, own = ops.mixture_terms(z, labels, *parameters, label_smoothing=0.02, stage=2)
    exact, tolerance = rounding.exact_and_tolerance(naive_terms, z, labels, *parameters, 0.02)
    # By explicit differences nothing cancels. The centres are 160 from their mean: in units of the squares that are
    # expanded around it, float32 leaves C additions of 160^2 their last digits.
    expanded = channels**0.5 * 160**2 * torch.finfo(torch.float32).eps
    rounding.assert_within((lse, entropy, information, own), exact, tuple(allowed + expanded for allowed in tolerance))
    rounding.assert_within(own, exact[3], tolerance[3])  # around its own class


def test_minus_infinite_weights_stay_out():
    z = torch.randn(6, 3, dtype=F64)
    mu, delta, phi_inter, phi_intra = (p.detach() for p in make_mixture(3, 2, 3))
    phi_intra[1], phi_intra[2, 0], phi_inter[2] = -math.inf, -math.inf, -math.inf
    labels = torch.tensor([0, 1, 2])
    lse, entropy, information, own = ops.mixture_terms(
        z, labels, mu, delta, phi_inter, phi_intra, label_smoothing=0.0, stage=2
    )
    assert lse.isfinite().all() and entropy.isfinite().all() and information.isfinite().all()
    assert own[2:4].eq(-math.inf).all()
    torch.testing.assert_close(own[4:], -0.5 * (z[4:] - mu[2] - delta[2, 0]).square().sum(1))


def test_mixture_scores_are_the_densities():
    n, classes, centres, channels = 20, 5, 4, 6
    z, log_det = torch.randn(n, channels, dtype=F64), torch.randn(n, dtype=F64)
    mu, delta, phi_inter, phi_intra = (p.detach() for p in make_mixture(classes, centres, channels))
    labels = torch.randint(0, classes, (n,))
    all_centres = torch.cat([mu[:, None], mu[:, None] + delta], 1)
    e = -0.5 * (z[:, None, None] - all_centres).square().sum(-1) + phi_intra.log_softmax(1)
    per_class = e.logsumexp(2) + log_det[:, None] - 0.5 * channels * math.log(2 * math.pi)
    scores = ops.mixture_scores(z, log_det, mu, delta, phi_inter, phi_intra, labels, per_class=True)
    torch.testing.assert_close(scores.class_log_density, per_class)
    torch.testing.assert_close(scores.log_density, (per_class + phi_inter.log_softmax(0)).logsumexp(1))
    torch.testing.assert_close(scores.best_log_density, per_class.amax(1))
    assert torch.equal(scores.best_class, per_class.argmax(1))
    torch.testing.assert_close(scores.own_log_density, per_class[torch.arange(n), labels])
    d = -0.5 * (z[:, None] - mu).square().sum(-1)
    torch.testing.assert_close(scores.entropy, torch.distributions.Categorical(logits=d).entropy())
    bare = ops.mixture_scores(z, log_det, mu, delta, phi_inter, phi_intra)
    assert bare.own_log_density is None and bare.class_log_density is None
    per_image = ops.mixture_scores(z, log_det, mu, delta, phi_inter, phi_intra, torch.tensor([3, 1]))
    torch.testing.assert_close(per_image.own_log_density[10:], per_class[10:, 1])


@pytest.mark.parametrize("n", [0, 5, 40])
def test_own_class_scores_are_those_of_all_classes(n, monkeypatch):
    """In chunks too, of pixels and of classes; with the bits of the other way where the rows are of one class."""
    z, log_det = torch.randn(n, 6), torch.randn(n)
    mixture = [p.detach().float() for p in make_mixture(5, 4, 6)]
    labels = torch.randint(0, 5, (n,))
    whole = ops.mixture_scores(z, log_det, *mixture, labels)
    monkeypatch.setattr(mixture_module, "SCORE_ROWS", 16)
    monkeypatch.setattr(mixture_module, "CENTRES_TOGETHER", 8)
    for rows in (labels, torch.full((min(n, 1),), 2)):
        every = ops.mixture_scores(z, log_det, *mixture, rows)
        density, entropy = ops.own_class_scores(z, log_det, *mixture, rows)
        torch.testing.assert_close(density, every.own_log_density)
        torch.testing.assert_close(entropy, whole.entropy)
    assert torch.equal(density, every.own_log_density) and torch.equal(entropy, every.entropy)


@pytest.mark.parametrize("changed", range(4))
def test_scores_follow_the_parameters(changed):
    """What is made of them is kept; it is made anew when one is written to."""
    z, log_det, labels = torch.randn(9, 6), torch.randn(9), torch.tensor([2])
    mixture = [p.detach().float() for p in make_mixture(5, 4, 6)]
    ops.mixture_scores(z, log_det, *mixture), ops.own_class_scores(z, log_det, *mixture, labels)
    mixture[changed] += torch.randn_like(mixture[changed])
    anew = [p.clone() for p in mixture]
    every = zip(ops.mixture_scores(z, log_det, *mixture)[:3], ops.mixture_scores(z, log_det, *anew)[:3], strict=True)
    own = ops.own_class_scores(z, log_det, *mixture, labels), ops.own_class_scores(z, log_det, *anew, labels)
    assert all(torch.equal(kept, made) for kept, made in [*every, *zip(*own, strict=True)])


def test_own_class_scores_of_the_kernel(interpreted):
    z, log_det, labels = torch.randn(20, 6), torch.randn(20), torch.tensor([3, 1])
    mixture = [p.detach().float() for p in make_mixture(5, 4, 6)]
    actual = ops.own_class_scores(z, log_det, *mixture, labels, backend="triton")
    torch.testing.assert_close(actual, ops.own_class_scores(z, log_det, *mixture, labels, backend="torch"))


def test_ties_go_to_the_lowest_class():
    mu = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    scores = ops.mixture_scores(
        torch.tensor([[1.0, 0.0], [0.0, 3.0]]),
        torch.zeros(2),
        mu,
        mu.new_zeros(3, 0, 2),
        mu.new_zeros(3),
        mu.new_zeros(3, 1),
    )
    assert scores.best_class.tolist() == [0, 0]


def test_mixture_names_what_does_not_fit():
    z, log_det = torch.randn(6, 4), torch.zeros(6)
    parameters = [p.float() for p in make_mixture(3, 2, 4)]
    with pytest.raises(ValueError, match=r"log_det has shape \(5,\)"):
        ops.mixture_losses(z, log_det[:5], torch.zeros(6, dtype=torch.int64), *parameters)
    with pytest.raises(ValueError, match=r"mu has shape"):
        ops.mixture_losses(z[:, :3], log_det, torch.zeros(6, dtype=torch.int64), *parameters)
    with pytest.raises(ValueError, match="labels are torch.float32"):
        ops.mixture_losses(z, log_det, torch.zeros(6), *parameters)
    with pytest.raises(ValueError, match=r"mu has shape"):
        ops.mixture_scores(z[:, :3], log_det, *parameters)
    with pytest.raises(ValueError, match="labels are torch.int32"):
        ops.mixture_scores(z, log_det, *parameters, torch.zeros(6, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"log_det has shape \(5,\)"):
        ops.own_class_scores(z, log_det[:5], *parameters, torch.zeros(6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x2 \(6, 4\) must be \(N, C2\), and a \(6, 4\) then \(N, 2 C2\)"):
        ops.affine_coupling(z, z)
    with pytest.raises(ValueError, match="one for each of the 6 pixels"):
        ops.mixture_losses(z, log_det, torch.zeros(4, dtype=torch.int64), *parameters)


@pytest.mark.parametrize("labels", [[3, 0], [0, -1], [0, 1, 2, 3, 0, 1]])
def test_labels_that_name_no_class_are_refused(labels):
    z, log_det, labels = torch.randn(6, 4), torch.zeros(6), torch.tensor(labels)
    parameters = [p.float() for p in make_mixture(3, 2, 4)]
    options = {"label_smoothing": 0.02, "stage": 2}
    compiled = torch.compile(ops.mixture_losses, fullgraph=True, backend="aot_eager")
    for refuse in (
        lambda: ops.mixture_losses(z, log_det, labels, *parameters),
        lambda: ops.mixture_terms(z, labels, *parameters, **options),
        lambda: ops.mixture_scores(z, log_det, *parameters, labels),
        lambda: ops.own_class_scores(z, log_det, *parameters, labels),
        lambda: compiled(z, log_det, labels, *parameters),
    ):
        with pytest.raises(ValueError, match=r"labels name a class (3|-1); allowed are 0 to 2"):
            refuse()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_the_mixtures_kernels_would_read_beyond_is_refused(interpreted, backend):
    z, labels, mu, delta = (
        torch.randn(30, 7),
        torch.zeros(30, dtype=torch.int64),
        torch.randn(3, 7),
        torch.randn(3, 2, 7),
    )
    good = {
        "z": z,
        "labels": labels,
        "mu": mu,
        "delta": delta,
        "phi_inter": torch.randn(3),
        "phi_intra": torch.randn(3, 3),
    }
    upstream = [torch.randn(30) for _ in range(4)]
    options = {"label_smoothing": 0.0, "stage": 2, "backend": backend}
    for changed, message in (
        ({"delta": delta[:1]}, "delta has shape"),
        ({"mu": torch.randn(3, 5)}, "mu has shape"),
        ({"labels": labels[:7]}, "one for each of the 30 pixels"),
        ({"labels": labels[:0]}, "one for each of the 30 pixels"),
        ({"labels": labels.int()}, "labels are torch.int32"),
        ({"labels": labels - 1}, "labels name a class -1; allowed are 0 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.mixture_terms(*(good | changed).values(), **options)
        with pytest.raises(ValueError, match=message):
            ops.mixture_terms_backward(*upstream, *(good | changed).values(), **options)
    with pytest.raises(ValueError, match=r"gown has shape \(4,\); for 30 pixels it must be \(30,\)"):
        ops.mixture_terms_backward(*upstream[:3], upstream[3][:4], *good.values(), **options)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_the_kernel_of_blocks_would_read_beyond_is_refused(interpreted, backend):
    blocks, conditions = (
        ops.Blocks.stack(make_blocks(12, 4, layers=1, dtype=torch.float32)),
        [*sinusoidal_position(3, 5, 4)],
    )
    x = torch.randn(15, 12)
    for arguments in ((x[:13], conditions), (x[:, :10], conditions), (x, [])):
        with pytest.raises(ValueError):
            ops.coupling_blocks(*arguments, blocks, backend=backend)


# ---- operators


def test_operators_keep_their_contract():
    """Schema, fake tensors, autograd registration and AOT dispatch, as torch.library checks them."""
    blocks = make_blocks(5, 4, layers=2, dtype=torch.float32)
    conditions = list(sinusoidal_position(2, 3, 4))
    parameters = [stacked.detach().requires_grad_() for stacked in ops.Blocks.stack(blocks)]
    x = torch.randn(6, 5, requires_grad=True)
    for keep, every in ((True, 1), (False, 0), (False, 1)):
        torch.library.opcheck(blocks_module._flow_forward, (x, conditions, parameters, CLAMP, keep, every, "fp32", ""))
    detached = [stacked.detach() for stacked in parameters]
    torch.library.opcheck(blocks_module._flow_inference, (x.detach(), conditions, detached, CLAMP, "bf16", ""))
    z, labels = torch.randn(6, 4, requires_grad=True), torch.tensor([1, 0])
    mixture = [p.detach().float().requires_grad_() for p in make_mixture(3, 2, 4)]
    for stage in (1, 2):
        torch.library.opcheck(mixture_module._mixture_forward, (z, labels, *mixture, 0.02, stage, ""))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_of_the_mixture_are_laid_out_as_announced(interpreted, stage, backend):
    """Contiguous, whatever the layout of the inputs is: compiled graphs rely on the strides of the fake."""
    buffer, labels = torch.randn(6, 9), torch.tensor([1, 0])
    mixture = [p.detach().float() for p in make_mixture(3, 3, 4)]
    turned = [p.mT.contiguous().mT if p.dim() > 1 else p for p in mixture]
    gterms = [torch.randn(6) for _ in range(3)] + [torch.randn(6 if stage == 2 else 0)]
    for z, parameters in ((buffer[:, 2:6], mixture), (buffer[:, :4].T.contiguous().T, turned)):
        arguments = gterms, z, labels, *parameters, 0.02, stage, backend
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(mixture_module._mixture_backward, arguments, test_utils=checks)


@pytest.mark.parametrize(("keep", "every"), [(True, 1), (False, 1)])
def test_the_kernels_of_training_keep_the_operators_contract(interpreted, keep, every):
    """What they keep for the backward pass has the shapes, dtypes and strides that fake tensors are promised."""
    conditions = list(sinusoidal_position(1, 3, 4))
    blocks = ops.Blocks.stack(make_blocks(5, 4, layers=2, dtype=torch.float32))
    parameters = [stacked.detach().requires_grad_() for stacked in blocks]
    x = torch.randn(3, 8)[:, :5].requires_grad_()
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (x, conditions, parameters, CLAMP, keep, every, "bf16", "")
    torch.library.opcheck(blocks_module._flow_forward, arguments, test_utils=utils)


def test_a_training_step_compiles_without_graph_breaks():
    blocks = make_blocks(6, 8, layers=2, dtype=torch.float32)
    position, labels = sinusoidal_position(2, 3, 8), torch.tensor([1, 0])
    mixture = [p.detach().float().requires_grad_() for p in make_mixture(3, 2, 6)]
    x = torch.randn(12, 6)

    def loss() -> Tensor:
        z, log_det = ops.flow(x, blocks, position, clamp=CLAMP)
        return sum(term.mean() for term in ops.mixture_losses(z, log_det, labels, *mixture).values())

    leaves = [*leaves_of(blocks), *mixture]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(), leaves), torch.autograd.grad(loss(), leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_double_backward_says_what_to_do():
    blocks, x = make_blocks(4, 0, layers=1), torch.randn(3, 4, dtype=F64, requires_grad=True)
    (gx,) = torch.autograd.grad(ops.flow(x, blocks)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gx.sum().backward()


# ---- dispatch


def test_definitions_serve_the_cpu_and_a_forced_kernel_says_why_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("HGAD_FAST_BACKEND", raising=False)
    x2, a = torch.randn(3, 2), torch.randn(3, 4)
    assert ops.path(x2) == "torch"
    with pytest.raises(RuntimeError, match="tensor is on cpu"):
        ops.affine_coupling(x2, a, backend="triton")
    monkeypatch.setenv("HGAD_FAST_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="tensor is on cpu"):
        ops.affine_coupling(x2, a)
    torch.testing.assert_close(
        ops.affine_coupling(x2, a, backend="torch"), ops.affine_coupling.reference(x2, a), rtol=0, atol=0
    )
    monkeypatch.setenv("HGAD_FAST_BACKEND", "cuda")
    with pytest.raises(ValueError, match="backend is 'cuda'; allowed are auto, triton, torch"):
        ops.path(x2)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ops.path(x2, "auto") == "triton"
    assert ops.path(x2.double(), "auto") == "torch"


def test_operations_take_the_interpreter_whatever_was_imported_before(request: pytest.FixtureRequest):
    compiled = dispatch.kernels("coupling")
    interpreted = request.getfixturevalue("interpreted")
    assert dispatch.kernels("coupling") is interpreted.coupling is not compiled
    x2, a = torch.randn(5, 3), torch.randn(5, 6)
    y, log_det = ops.affine_coupling(x2, a, CLAMP, backend="triton")
    expected, expected_log_det = ops.affine_coupling.reference(x2, a, CLAMP)
    assert y.shape == expected.shape and log_det.shape == expected_log_det.shape
    rounding.assert_close((y, log_det), ops.affine_coupling.reference, x2, a, CLAMP)


def test_kernels_pass_gradients_on(interpreted):
    """A kernel called by itself has no autograd: where a gradient is wanted, its operator must take over."""

    def coupling(x2: Tensor, a: Tensor, inverse: bool) -> tuple[Tensor, ...]:
        results = ops.affine_coupling(x2, a, CLAMP, inverse=inverse, backend=backend)
        return torch.autograd.grad(sum(t.square().sum() for t in results), (x2, a))

    def mixture(z: Tensor, labels: Tensor, parameters: list[Tensor]) -> tuple[Tensor, ...]:
        terms = ops.mixture_terms(z, labels, *parameters, label_smoothing=0.1, stage=2, backend=backend)
        return torch.autograd.grad(sum(term.sum() for term in terms), (z, *parameters))

    x2, a = torch.randn(5, 3, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    z, labels = torch.randn(6, 4, requires_grad=True), torch.tensor([1, 0])
    parameters = [p.detach().float().requires_grad_() for p in make_mixture(3, 2, 4)]
    for function, inputs in (
        (coupling, (x2, a, False)),
        (coupling, (x2, a, True)),
        (mixture, (z, labels, parameters)),
    ):
        backend = "torch"
        exact, tolerance = rounding.exact_and_tolerance(function, *inputs)
        backend = "triton"
        rounding.assert_within(function(*inputs), exact, tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inverse", [False, True])
def test_a_coupling_in_half_precision_rounds_its_result_alone(dtype, inverse):
    x2, a = torch.randn(50, 30).to(dtype), torch.randn(50, 60).to(dtype)
    y2, log_det = ops.affine_coupling(x2, a, inverse=inverse)
    exact_y2, exact_log_det = ops.affine_coupling(x2.double(), a.double(), inverse=inverse)
    assert y2.dtype == dtype and log_det.dtype == torch.float32
    torch.testing.assert_close(y2.double(), exact_y2, rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(log_det.double(), exact_log_det, rtol=0, atol=1e-5)


def test_without_memory_a_flow_has_shapes():
    blocks = ops.Blocks._make(p.detach().to("meta") for p in ops.Blocks.stack(make_blocks(6, 8, 2, torch.float32)))
    position = ops.SeparablePosition(*(code.to("meta") for code in sinusoidal_position(3, 4, 8)))
    z, log_det = ops.flow(torch.randn(12, 6, device="meta"), blocks, position)
    assert z.is_meta and z.shape == (12, 6) and log_det.shape == (12,)
