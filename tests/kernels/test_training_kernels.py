"""The kernels of a flow in training, run by Triton's interpreter, against the definition with its rounded operands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import rounding
import torch
from drawn import Blocks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hgad_fast import ops
from hgad_fast.ops import blocks as blocks_module
from hgad_fast.ops import subnet

pytestmark = pytest.mark.usefixtures("nan_memory")

TRAINED = ops.Blocks._fields[:-1]
FORWARD = ("_coupling_kernel", "_rotate_kernel")
BACKWARD = ("_unrotate_kernel", "_coupling_backward_kernel", "_hidden_backward_kernel")
SIZES = {  # channels, positional channels, blocks, images, height, width; a patch has 4 rows of 16 pixels
    "three blocks, two images, a patch and a row": (29, 8, 3, 2, 5, 7),
    "patches cut at the right and below": (37, 8, 1, 2, 5, 17),
    "extents of several powers of two": (72, 4, 1, 1, 3, 5),
    "pieces of halves": (112, 4, 3, 1, 2, 3),
    "unconditional, pixels beyond a tile": (29, 0, 3, 1, 1, 70),
    "one pixel": (37, 4, 3, 1, 1, 1),
    "two channels": (2, 4, 3, 1, 3, 3),
}
MODES = [("bf16", "standard", 0), ("bf16", "reversible", 2)]  # precision, memory, checkpoint_every
MORE_MODES = [("bf16", "reversible", 0), ("tf32", "standard", 0), ("tf32", "reversible", 2)]


@pytest.fixture(autouse=True)
def rounded_as_in_the_kernels() -> Iterator[None]:
    with rounding.as_in_the_kernels():
        yield


class Case(NamedTuple):
    """Features, blocks, and the gradients of what a flow returns: one may be None."""

    drawn: Blocks
    gz: Tensor | None
    glog_det: Tensor | None

    @classmethod
    def draw(cls, *sizes: int) -> Case:
        drawn = Blocks.draw(*sizes)
        return cls(drawn, torch.randn(drawn.x.shape), torch.randn(len(drawn.x)))


def run(
    case: Case, precision: str, memory: str = "standard", every: int = 0, backend: str | None = None, times: int = 1
) -> dict[str, Tensor]:
    """Return what a flow returns and its gradients, by name, those of the last of `times` backward passes."""
    (x, position, blocks), gz, glog_det = case
    leaves = {"x": x} | {name: getattr(blocks, name) for name in TRAINED}
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    x, *trained = leaves.values()
    z, log_det = ops.flow(
        x, ops.Blocks(*trained, blocks.w_perm), position,
        clamp=1.3, precision=precision, memory=memory, checkpoint_every=every, backend=backend,
    )  # fmt: skip
    outputs, upstream = zip(*((y, gy) for y, gy in ((z, gz), (log_det, glog_det)) if gy is not None), strict=True)
    for _ in range(times):
        gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream, retain_graph=True)
    return {"z": z.detach(), "log_det": log_det.detach()} | {
        f"g{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)
    }


def assert_equal(actual: Any, expected: Any) -> None:
    """Check that trees of tensors are equal to the bit."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# the flow


def cases() -> list[Any]:
    """Return every size with the usual modes, and those with and without positions with all."""
    drawn = []
    for number, (name, sizes) in enumerate(SIZES.items()):
        for mode in MODES + (MORE_MODES if number in (0, 4) else []):
            drawn.append(pytest.param(sizes, mode, id=f"{name}, {' '.join(map(str, mode))}"))
    return drawn


@pytest.mark.parametrize(("sizes", "mode"), cases())
def test_flow_and_every_gradient(interpreted, launches, sizes, mode):
    case = Case.draw(*sizes)
    actual = run(case, *mode)
    launches.pop("_pack_kernel")
    assert launches == dict.fromkeys(FORWARD + BACKWARD, sizes[2])
    exact, tolerance = rounding.exact_and_tolerance(lambda case: run(case, *mode, backend="torch"), case)
    rounding.assert_within(actual, exact, tolerance)
    if mode[:2] == ("tf32", "reversible"):
        return  # last digits of what is rebuilt decide too often between two numbers in tf32
    # In float32 the definition rounds the same operands, but for one in hundreds that lies so near the middle of two
    # coarse numbers that a last digit decides. Operands rounded in another way would differ by the rounding itself.
    same = run(case, *mode, backend="torch")
    for name, value in actual.items():
        assert (value - same[name]).norm() < tolerance[name].norm() / rounding.MARGIN / 4, name


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_flow_does_round(interpreted, precision):
    case = Case.draw(29, 8, 3, 2, 5, 7)
    in_float32 = rounding.exact_and_tolerance(lambda case: run(case, "fp32", backend="torch"), case)
    with pytest.raises(AssertionError, match="rounding explains"):
        rounding.assert_within(run(case, precision), *in_float32)


@pytest.mark.parametrize("conditional", [True, False])
def test_flow_of_many_pixels_has_larger_patches(interpreted, monkeypatch, conditional):
    case = Case.draw(13, 4 if conditional else 0, 2, 1, 9, 17)
    exact, tolerance = rounding.exact_and_tolerance(lambda case: run(case, "bf16", backend="torch"), case)
    monkeypatch.setattr(interpreted.training, "FEW_PIXELS", 0)
    other = interpreted.common.Tile(128, 8, 1)
    monkeypatch.setitem(interpreted.common.TILES["subnet, bf16"], "interpreter", other)
    monkeypatch.setitem(interpreted.common.TILES["rotation"], "interpreter", other)
    rounding.assert_within(run(case, "bf16"), exact, tolerance)


def test_flow_of_strided_features_and_expanded_gradients(interpreted):
    """They are what `z.sum()` and `log_det.mean()` send back; a transposed one is what z.T sends."""
    drawn = Blocks.draw(24, 4, 2, 1, 3, 5)
    constant, buffer = torch.tensor(0.7), torch.full((15, 40), torch.nan)
    x = buffer[:, 5:29].copy_(drawn.x)
    strided = drawn._replace(x=x)
    for gz, glog_det, mode in (
        (constant.expand(15, 24), constant.expand(15), MODES[0]),
        (torch.randn(24, 15).T, torch.randn(30)[::2], MODES[1]),
        (torch.randn(15, 30)[:, 3:27], torch.randn(15), MODES[1]),
    ):
        expected = run(Case(drawn, gz.contiguous(), glog_det.contiguous()), *mode)
        assert_equal(run(Case(strided, gz, glog_det), *mode), expected)


@pytest.mark.parametrize("mode", MODES)
def test_flow_of_one_result(interpreted, mode):
    """A loss of z alone, or of the log-determinant alone, has a gradient of zero for the other."""
    case = Case.draw(13, 4, 2, 1, 3, 5)
    for name in ("gz", "glog_det"):
        zero = torch.zeros_like(getattr(case, name))
        assert_equal(run(case._replace(**{name: None}), *mode), run(case._replace(**{name: zero}), *mode))


@pytest.mark.parametrize("mode", MODES + MORE_MODES)
@pytest.mark.parametrize("position_dim", [0, 4])
def test_flow_of_nothing(interpreted, position_dim, mode):
    case = Case.draw(13, position_dim, 3, 0, 3, 5)
    results = run(case, *mode)
    assert results["z"].shape == results["gx"].shape == (0, 13) and results["log_det"].shape == (0,)
    for name in TRAINED:
        assert_equal(results[f"g{name}"], torch.zeros(getattr(case.drawn.blocks, name).shape))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channels", [13, 16])  # features that are padded, and features that are read where they lie
def test_nobodys_memory_is_written_to(interpreted, channels, mode):
    """A second backward pass finds what the first one found, and so does the caller."""
    case = Case.draw(channels, 4, 3, 1, 3, 5)
    before = [t.clone() for t in tree_leaves(case)]
    once = run(case, *mode)
    assert_equal(run(case, *mode, times=2), once)  # also to the bit what another run computes
    assert_equal(tree_leaves(case), before)


@pytest.mark.parametrize(("mode", "tensors"), [(MODES[0], 5), (("bf16", "reversible", 0), 0), (MODES[1], 2)])
def test_kept_memory(interpreted, mode, tensors):
    """Beside z: with standard memory (N, C) a block, the hidden layer is made again; else every second input."""
    precision, memory, every = mode
    x, position, blocks = Blocks.draw(24, 8, 5, 2, 5, 7)
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        z, _ = ops.flow(
            x.requires_grad_(), blocks, position, precision=precision, memory=memory, checkpoint_every=every
        )
    grown = [t for t in kept.values() if len(t) == len(x)]
    assert [t.shape for t in grown] == [x.shape] * (1 + tensors)
    assert z.data_ptr() in kept and x.data_ptr() not in kept


@pytest.mark.parametrize(("precision", "memory", "every"), MODES + MORE_MODES)
@pytest.mark.parametrize("position_dim", [0, 4])
def test_kept_tensors_have_the_shapes_that_a_compiler_is_told(interpreted, position_dim, precision, memory, every):
    x, conditions, blocks = Blocks.draw(13, position_dim, 3, 2, 3, 5).arguments()
    keep, training = memory == "standard", interpreted.training
    kept = training.flow_forward(x, conditions, blocks, 1.9, keep, 1 if keep else every, precision)[2]
    told = training.kept_like(x, conditions, blocks, keep, 1 if keep else every, precision)
    assert [(t.shape, t.stride(), t.dtype) for t in kept] == [(t.shape, t.stride(), t.dtype) for t in told]


class Made(TorchDispatchMode):
    """Notes the types of tensors that have as many numbers as the hidden layer, by their memory."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers, self.types = numbers, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.numel() >= self.numbers:
                self.types[tensor.untyped_storage().data_ptr()] = tensor.dtype
        return result


def test_the_hidden_layer_is_made_once_and_in_bfloat16(interpreted, monkeypatch):
    """At the paper's channels; nothing is run. The gradient of the hidden layer replaces it, and both are operands."""
    for module in (interpreted.training, interpreted.rotation, interpreted.packing):
        monkeypatch.setattr(module, "launch", lambda *args, **arguments: None)
    monkeypatch.setattr(interpreted.training, "_product", lambda *args: None)  # a CPU multiplies in float32
    x, conditions, blocks = Blocks.draw(200, 256, 2, 1, 64, 64).arguments()
    with Made(len(x) * blocks.w1.shape[1]) as made:
        z, log_det, kept = interpreted.training.flow_forward(x, conditions, blocks, 1.9, True, 1, "bf16")
        assert not made.types
        interpreted.training.flow_backward(z, log_det, z, kept, conditions, blocks, 1.9, True, 1, "bf16")
    assert list(made.types.values()) == [torch.bfloat16]


# one rotation


class Rotation(NamedTuple):
    """Rotations with gains, and a shift, of two blocks; features of more rows than a program takes."""

    matrix: Tensor
    gain: Tensor
    shift: Tensor
    x: Tensor
    gradient: Tensor

    @classmethod
    def draw(cls, channels: int) -> Rotation:
        matrix = torch.linalg.qr(torch.randn(2, channels, channels))[0]
        shapes = ((2, channels), (70, channels), (70, channels))
        return cls(matrix, 0.5 + torch.rand(2, channels), *map(torch.randn, shapes))

    def packed(self, packing: Any, **options: Any) -> Tensor:
        layout = packing.Layout(self.x.shape[1], 1)
        matrix = self.matrix.mT if options.get("scale_rows") else self.matrix
        return packing.pack(matrix, layout.full, layout.rotated, "bf16", pieces=2, scale=self.gain, **options)

    def shifts(self, packing: Any) -> Tensor:
        layout = packing.Layout(self.x.shape[1], 1)
        return packing.pack(self.shift[:, None], packing.Axis.plain(1, 1), layout.full, "fp32")


@pytest.mark.parametrize("channels", [2, 29, 112])
def test_rotate(interpreted, channels):
    def definition(drawn: Rotation) -> Tensor:
        return subnet.product(drawn.x, (drawn.matrix[1] * drawn.gain[1]).T, "bf16x3") + drawn.shift[1]

    drawn, packing = Rotation.draw(channels), interpreted.packing
    layout = packing.Layout(channels, 1)
    x, half = packing.spread(drawn.x, layout.C), layout.C // 2
    matrices, shifts, out = drawn.packed(packing), drawn.shifts(packing), torch.empty(70, layout.C)
    shared = interpreted.rotation.rotate_arguments(matrices, shifts, layout.full_edges)
    interpreted.rotation.rotate(x[:, :half], x[:, half:], 1, shared, out)
    rounding.assert_close(packing.gathered(out, channels), definition, drawn)
    interpreted.rotation.rotate(x[:, :half], x[:, half:], 1, shared, x)
    assert_equal(x, out)


@pytest.mark.parametrize("channels", [2, 29, 112])
def test_unrotate(interpreted, channels):
    def definition(drawn: Rotation) -> tuple[Tensor, ...]:
        matrix, gain = drawn.matrix[1], drawn.gain[1]
        u = subnet.product(drawn.x, matrix / gain, "bf16x3") - drawn.shift[1]
        gu = subnet.product(drawn.gradient, matrix * gain, "bf16x3")
        return u, gu, torch.stack([(gu * u).sum(0), gu.sum(0)])

    drawn, packing = Rotation.draw(channels), interpreted.packing
    layout = packing.Layout(channels, 1)
    inverses, transposed = (drawn.packed(packing, scale_rows=True, divide=divide) for divide in (True, False))
    programs = interpreted.rotation.rotation_programs(70, drawn.x.device)

    def unrotate(z: Tensor | None, gz: Tensor, u: Tensor, gu: Tensor) -> tuple[Tensor, ...]:
        sums = torch.empty(programs, 2, layout.full.size)
        shifts, edges = drawn.shifts(packing), layout.full_edges
        shared = interpreted.rotation.unrotate_arguments(inverses, shifts, transposed, edges)
        interpreted.rotation.unrotate(z, gz, 1, shared, u, gu, sums)
        return u, gu, sums.sum(0)[:, : layout.C]

    z, gz = packing.spread(drawn.x, layout.C), packing.spread(drawn.gradient, layout.C)
    result = unrotate(z, gz, *torch.empty(2, 70, layout.C))
    assert programs > 1
    rounding.assert_close(tuple(packing.gathered(t, channels) for t in result), definition, drawn)
    assert_equal(unrotate(None, gz, result[0], torch.empty(70, layout.C)), result)
    assert_equal(unrotate(z, gz, z, gz), result)


# packed parameters, and the launch


@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32"])
@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"in_rows": True}, {"scale": True}, {"scale": True, "scale_rows": True, "divide": True}],
    ids=lambda options: " ".join(options) or "as it is",
)
def test_pack(interpreted, precision, pieces, options):
    """More rows and columns than a program takes, transposed, in halves; zeros behind each."""
    packing = interpreted.packing
    rows, columns = packing.Axis.halves(37, 24, 56), packing.Axis.plain(70, 80)
    source = torch.randn(2, 70, 37).mT
    expected = source
    if options.get("scale"):
        scale = 0.5 + torch.rand(2, 37 if "scale_rows" in options else 70)
        options = options | {"scale": scale}
        expected = source / scale[:, :, None] if "divide" in options else source * scale[:, None]
    laid_out = torch.zeros(2, 56, 80)
    laid_out[:, :19, :70], laid_out[:, 24:42, :70] = expected[:, :19], expected[:, 19:]
    parts = []
    for _ in range(pieces):
        parts.append(subnet.operand(laid_out, precision))
        laid_out = laid_out - parts[-1]
    expected = torch.cat(parts, 2) if "in_rows" in options else torch.stack(parts, 1)
    actual = packing.pack(source, rows, columns, precision, pieces=pieces, **options)
    assert actual.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    assert_equal(actual.float(), expected)


def test_launch_names_the_tensor_that_does_not_fit(interpreted):
    drawn, packing = Rotation.draw(16), interpreted.packing
    good = {
        "x1": drawn.x[:, :8], "y2": drawn.x[:, 8:], "shifts": drawn.shifts(packing), "out": torch.empty(70, 16),
    }  # fmt: skip

    def rotate(shifts: Tensor, **arguments: Tensor) -> None:
        shared = interpreted.rotation.rotate_arguments(drawn.packed(packing), shifts, (0, 16))
        interpreted.rotation.rotate(k=1, shared=shared, **arguments)

    rotate(**good)
    for changed, message in (
        ({"y2": torch.empty(70, 8, device="meta")}, "y2 is on meta, other arguments are on cpu"),
        ({"x1": torch.randn(8, 70).T}, r"x1 has strides \(1, 70\); its rows must be contiguous"),
        ({"x1": torch.randn(70)}, r"x1 has strides \(1,\); its rows must be contiguous"),
        ({"shifts": torch.randn(2, 32)[:, ::2]}, r"shift has strides \(32, 2\); it must be contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            rotate(**good | changed)
    with pytest.raises(ValueError, match="_pack_kernel is given no tensor"):
        interpreted.common.launch(packing._pack_kernel, 1, source_ptr=None)


GPU_NAN = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # what a GPU's arithmetic gives


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
@pytest.mark.parametrize("name", ["x", "w1", "b1", "w2", "b2"])
def test_a_nan_stays_one(interpreted, precision, name):
    """Rounding to tf32 would make 0 of a GPU's NaN, and a maximum with 0 drop it."""
    drawn = Blocks.draw(12, 4, 1, 1, 3, 5)
    tensors = {"x": drawn.x, **drawn.blocks._asdict()}
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[3] = GPU_NAN
    blocks = ops.Blocks(*(tensors[field] for field in ops.Blocks._fields))
    x = tensors["x"].clone().requires_grad_()
    z, log_det = ops.flow(x, blocks, drawn.position, precision=precision)
    assert z.isnan().any()
    (gx,) = torch.autograd.grad(z.sum() + log_det.sum(), x)
    assert gx.isnan().any()
    assert subnet.operand(GPU_NAN.view(1), precision).isnan()


@pytest.mark.parametrize("name", ["b1", "w2", "b2", "global_scale", "global_offset"])
def test_parameters_of_other_shapes_are_refused(interpreted, name):
    """A kernel would read beyond them."""
    drawn = Blocks.draw(12, 4, 1, 1, 3, 5)
    blocks = drawn.blocks._replace(**{name: getattr(drawn.blocks, name)[..., :-1]})
    for x in (drawn.x, drawn.x.clone().requires_grad_()):
        with pytest.raises((ValueError, RuntimeError)):
            ops.flow(x, blocks, drawn.position, precision="bf16")


def test_very_long_maps_take_products_of_torch(interpreted, monkeypatch, launches):
    """One-hot codes of their rows and columns would be larger than the hidden layer."""
    drawn = Blocks.draw(12, 4, 1, 1, 3, 5)
    monkeypatch.setattr(blocks_module, "MAX_POSITIONS", 7)
    ops.flow(drawn.x.clone().requires_grad_(), drawn.blocks, drawn.position, precision="bf16")
    assert launches == {"_forward_kernel": 1}


@pytest.mark.parametrize(("channels", "position_dim"), [(3, 4), (2, 8), (40, 4)])
def test_gradients_have_the_strides_that_are_announced(interpreted, channels, position_dim):
    """Where the padding is cut off, too: a view would keep it in memory, and a compiler be wrong about it."""
    drawn = Blocks.draw(channels, position_dim, 2, 1, 3, 5)
    blocks = ops.Blocks(*(t.clone().requires_grad_(name != "w_perm") for name, t in drawn.blocks._asdict().items()))
    z, log_det = ops.flow(drawn.x, blocks, drawn.position, precision="bf16", memory="reversible")
    for gradient in torch.autograd.grad(z.sum() + log_det.sum(), blocks[:-1]):
        assert gradient.is_contiguous() and gradient.untyped_storage().nbytes() == gradient.nbytes
