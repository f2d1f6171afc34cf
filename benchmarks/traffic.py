"""Launches, bytes and memory of the GPU path, counted without a GPU, and a model of the time that they take.

    python -m benchmarks.traffic

The library's own code runs on fake CUDA tensors, which have sizes and no values, and every operation and kernel that it
would start is counted. A launch moves each of its tensors between memory and chip once: a tensor that it reads several
times counts once (the rest comes from the cache), and one that it changes counts twice.

The model (`Launch.seconds`) takes the longer of two times for each launch: its bytes at `BYTES_PER_SECOND`, what a
copy reaches on an H100, and its products at the rate of tensor cores for their operands. Launches follow each other
without gaps, as in a recorded CUDA graph; started one by one, each takes the host some tens of microseconds, and the
host may be what a step waits for. Nothing here was measured on a GPU.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from hgad_fast import ops
from hgad_fast.features.backbone import FeatureMaps
from hgad_fast.models.config import HGADConfig
from hgad_fast.models.hgad import HGADModel, StageLoss
from hgad_fast.ops import SeparablePosition, dispatch
from hgad_fast.training.step import Group

BYTES_PER_SECOND = 3.0e12
FLOP_PER_SECOND = {"bf16": 790e12, "tf32": 395e12, "tf32x3": 130e12, "fp32": 60e12}
ALLOCATIONS = {"empty", "empty_strided", "new_empty", "new_empty_strided", "empty_like"}
NO_LAUNCH = {"device", "detach", "alias", "lift_fresh", "_unsafe_view", "_to_copy"}  # where memory is the same
WRITES_ONLY = {"fill_", "zero_", "copy_", "zeros", "zeros_like", "new_zeros", "ones", "full", "arange", "scalar_tensor"}
CHANGED = {  # what a kernel reads and writes; all else it does one of both with
    "_forward_kernel": {"log_det_ptr"},
    "_coupling_kernel": {"log_det_ptr"},
    "_coupling_backward_kernel": {"y2_ptr", "gy2_ptr"},
    "_hidden_backward_kernel": {"h_ptr", "gx1_ptr"},
    "_block_kernel": {"log_det_ptr"},
}


@dataclass(frozen=True)
class Launch:
    """One operation or kernel on the device."""

    name: str
    bytes: int
    flop: float
    operands: str  # of its products, a key of `FLOP_PER_SECOND`
    shapes: tuple[tuple[int, ...], ...]

    @property
    def seconds(self) -> float:
        """The modelled time."""
        return max(self.bytes / BYTES_PER_SECOND, self.flop / FLOP_PER_SECOND[self.operands])


@dataclass
class Traffic:
    """All launches of some work, and its memory."""

    launches: list[Launch] = field(default_factory=list)
    peak_bytes: int = 0  # most that was allocated at a time, beyond what there was before
    allocated: set[tuple[tuple[int, ...], torch.dtype]] = field(default_factory=set)

    def clear(self) -> None:
        """Forget what was counted so far."""
        self.launches.clear()
        self.peak_bytes = 0

    @property
    def bytes(self) -> int:
        return sum(launch.bytes for launch in self.launches)

    @property
    def seconds(self) -> float:
        """The modelled time."""
        return sum(launch.seconds for launch in self.launches)

    def of(self, *names: str) -> list[Launch]:
        """Return the launches whose name contains one of these."""
        return [launch for launch in self.launches if any(name in launch.name for name in names)]

    def __str__(self) -> str:
        """Return the totals, and the largest movers."""
        moved, times, count = Counter[str](), Counter[str](), Counter(launch.name for launch in self.launches)
        for launch in self.launches:
            moved[launch.name] += launch.bytes
            times[launch.name] += launch.seconds
        lines = [
            f"{len(self.launches)} launches, {self.bytes / 1e9:.3f} GB, {1e3 * self.seconds:.2f} ms modelled, "
            f"{self.peak_bytes / 1e6:.0f} MB at the peak"
        ]
        lines += [
            f"  {name:34} x{count[name]:4d} {size / 1e6:10.1f} MB {1e3 * times[name]:8.3f} ms"
            for name, size in moved.most_common(16)
        ]
        return "\n".join(lines)


class _Counter(TorchDispatchMode):
    """Notes operations on fake tensors; those of the library are looked into."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._before: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "hgad_fast":
            with self:
                return OPDEFS[f"hgad_fast::{func._opname}"]._init_fn(*args, **kwargs)
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if (func.is_view or name in NO_LAUNCH) and _same(args, out):
            return out
        self._note_memory(out)
        if name in ALLOCATIONS:
            return out
        read = [] if name in WRITES_ONLY else [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if name == "copy_":
            read = [args[1]]
        written = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if any(t.is_cuda for t in (*read, *written)):
            flop, operands = _products(name, args)
            self.add(name, sum(map(_bytes, read)) + sum(map(_bytes, written)), flop, operands, read)
        return out

    def add(self, name: str, size: int, flop: float, operands: str, tensors: list[Tensor]) -> None:
        shapes = tuple(tuple(t.shape) for t in tensors)
        self.traffic.launches.append(Launch(name, size, flop, operands, shapes))

    def _note_memory(self, out: Any) -> None:
        """Add new memory to what is alive, and forget what is not any more."""
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.is_cuda:
                storage = t.untyped_storage()
                if storage._cdata not in self._live and storage._cdata not in self._before:
                    self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                    self.traffic.allocated.add((tuple(t.shape), t.dtype))
        self._live = {key: (ref, size) for key, (ref, size) in self._live.items() if not ref.expired()}
        self.traffic.peak_bytes = max(self.traffic.peak_bytes, sum(size for _, size in self._live.values()))


def _same(args: Any, out: Any) -> bool:
    return not isinstance(out, Tensor) or out.untyped_storage()._cdata == args[0].untyped_storage()._cdata


def _bytes(t: Tensor) -> int:
    """Return the bytes of a tensor's elements; of an expanded one, those that are stored."""
    return math.prod(size for size, stride in zip(t.shape, t.stride(), strict=True) if stride) * t.element_size()


def _products(name: str, args: Any) -> tuple[float, str]:
    """Return the operations of a matrix product of torch, and its operands."""
    matrices = [t for t in args if isinstance(t, Tensor) and t.dim() >= 2]
    if name not in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "matmul") or len(matrices) < 2:
        return 0.0, "fp32"
    a, b = matrices[-2:]
    allowed = torch.backends.cuda.matmul.fp32_precision
    operands = "bf16" if a.dtype == torch.bfloat16 else "tf32" if allowed == "tf32" else "fp32"
    return 2.0 * a.numel() * b.shape[-1], operands


@contextmanager
def counted(blocks: int = 1, architecture: str = "sm_90") -> Iterator[tuple[Traffic, _Counter]]:
    """Yield what is counted, and a context in which fake CUDA tensors, made before in this one, are counted.

    Stacked parameters are of so many blocks, of which a launch reads one.
    """
    common = dispatch.kernels("common")
    traffic = Traffic()
    counter = _Counter(traffic)

    def run(self: JITFunction, *args: Any, grid: Any = None, warmup: Any = None, **kwargs: Any) -> None:
        bound = dict(zip(self.arg_names, args, strict=False)) | kwargs
        name = self.__name__
        size, tensors, matrices = 0, [], set()
        for parameter, value in bound.items():
            stacked = "k" in bound and (isinstance(value, TensorDescriptor) or parameter in ("b2_ptr", "shift_ptr"))
            value = value.base if isinstance(value, TensorDescriptor) else value
            if not isinstance(value, Tensor) or stacked and value.untyped_storage()._cdata in matrices:
                continue  # no tensor, or further pieces of the same matrix
            matrices.add(value.untyped_storage()._cdata if stacked else None)
            changed = parameter in CHANGED.get(name, ()) and not (parameter == "y2_ptr" and not bound["REBUILD"])
            size += (2 if changed else 1) * _bytes(value) // (blocks if stacked else 1)
            tensors.append(value)
        flop, operands = _kernel_products(name, bound)
        counter.add(name, size, flop, operands, tensors)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        stack.enter_context(mock.patch.object(common, "on", lambda device: nullcontext()))
        stack.enter_context(mock.patch.object(common, "architecture", lambda device: architecture))
        stack.enter_context(mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield traffic, counter


def _kernel_products(name: str, a: dict[str, Any]) -> tuple[float, str]:
    """Return the operations of a kernel's products, padding included, and their operands."""
    subnet = {"bf16": "bf16", "tf32": "tf32", "fp32": "tf32x3"}.get(a.get("PRECISION", ""), "tf32x3")
    if name in ("_coupling_kernel", "_coupling_backward_kernel", "_block_kernel"):
        n, half = len(a["log_det_ptr"] if "log_det_ptr" in a else a["glog_det_ptr"]), a["HALF_EDGES"][-1]
        flop = 2.0 * n * a["HIDDEN"] * (a["WIDTH"] + 2 * 16 * a["PIECES"] + 2 * half)
        if name == "_block_kernel":
            flop += 3 * 2.0 * n * a["FULL_EDGES"][-1] * a["K"]
        return flop, subnet
    if name == "_hidden_backward_kernel":
        return 2.0 * a["N"] * a["HIDDEN"] * 3 * a["HALF_EDGES"][-1], subnet
    if name in ("_rotate_kernel", "_unrotate_kernel"):
        rotations = 2 if a.get("z_ptr") is not None else 1
        return rotations * 3 * 2.0 * a["N"] * a["EDGES"][-1] * a["K"], "bf16"
    if name == "_nearest_kernel":
        products = 2 if a["ONE_PIECE"] else 3
        return products * 2.0 * a["N"] * a["D"] * a["PADDED_K"], "tf32"
    if name in ("_pixel_kernel", "_place_kernel"):  # as many pixels at one place as at another
        (K, P, D, M), N = a["factor_ptr"].shape, a["N"]
        if name == "_pixel_kernel":
            return 2.0 * N * K * D * M, "fp32"
        a_place = -(-N // P // a["BLOCK_N"]) * a["BLOCK_N"]
        return 2.0 * P * a_place * K * D * M, "tf32x3"
    if "z_ptr" in a and a["z_ptr"] is not None and "K" in a:  # the mixture
        n, channels = a["z_ptr"].shape
        columns = a["PADDED_K"] * a["SLOTS"] if name == "_scores_kernel" else a["J"]
        return (3 if "backward" in name else 1) * 2.0 * n * channels * columns, "tf32x3"
    return 0.0, "fp32"


def backward(loss: Tensor) -> None:
    """Call the functions of a loss's backward pass in order, as torch's engine would: that one asks for a real GPU."""
    order: list[Any] = []
    visited: set[Any] = set()

    def visit(node: Any) -> None:
        if node is not None and node not in visited:
            visited.add(node)
            for following, _ in node.next_functions:
                visit(following)
            order.append(node)

    visit(loss.grad_fn)
    gradients: dict[Any, dict[int, Tensor]] = {loss.grad_fn: {0: torch.ones_like(loss)}}
    with torch.no_grad():
        for node in reversed(order):
            given = gradients.pop(node, {})
            if "AccumulateGrad" in node.name():
                continue
            call = node if callable(node) else node.apply  # of an operation of the library
            outputs = call(*(given.get(i) for i in range(len(node._input_metadata))))
            del given
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            for (following, i), gradient in zip(node.next_functions, outputs, strict=False):
                if following is not None and gradient is not None:
                    slots = gradients.setdefault(following, {})
                    slots[i] = slots[i] + gradient if i in slots else gradient


def paper_model(precision: str, levels: int = 1, memory: str = "reversible") -> HGADModel:
    """Return the paper's model: C = 200, K = 15, M = 10, L = 12, P = 256."""
    config = HGADConfig(
        n_classes=15, n_intra_centers=10, backbone_arch=None, feature_levels=levels, feature_dims=(200,) * levels,
        coupling_layers=12, pos_embed_dim=256, precision=precision, memory=memory,
    )  # fmt: skip
    return HGADModel(config)


def on_fake_cuda(model: HGADModel) -> HGADModel:
    """Replace the parameters of a model by fake ones on a CUDA device."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, device="cuda"))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cuda")
    return model


def training_step(precision: str = "bf16", memory: str = "reversible", images: int = 8, side: int = 64) -> Traffic:
    """Count a step of one level, forward and backward, without the optimiser."""
    model = paper_model(precision, memory=memory)
    with counted(blocks=12) as (traffic, counter):
        loss = StageLoss(on_fake_cuda(model), 2)
        flow: Any = model.nfs[0]
        grid = SeparablePosition(torch.empty(side, 128, device="cuda"), torch.empty(side, 128, device="cuda"))
        x = torch.empty(images * side * side, 200, device="cuda")
        batch = [[Group(x, torch.empty(images, dtype=torch.int64, device="cuda"), side, side)]]
        with mock.patch.object(flow, "grid", lambda *_: grid), counter:  # positions are made once a run
            total, _ = loss(batch, [x.shape[0]])
            backward(total)
    return traffic


def mixture(images: int = 8, rows: int = 4096) -> Traffic:
    """Count the mixture's terms and their gradients, with labels per image."""
    with counted() as (traffic, counter):
        z = torch.empty(images * rows, 200, device="cuda")
        labels = torch.empty(images, dtype=torch.int64, device="cuda")
        shapes = (15, 200), (15, 9, 200), (15,), (15, 10)
        parameters = [torch.empty(shape, device="cuda") for shape in shapes]
        options = {"label_smoothing": 0.02, "stage": 2}
        with counter, torch.no_grad():
            terms = ops.mixture_terms(z, labels, *parameters, **options)
            ops.mixture_terms_backward(*terms, z, labels, *parameters, **options)
    return traffic


def codes(rows: int = 16 * 3168, channels: int = 576, codes: int = 512, dtype: torch.dtype = torch.float32) -> Traffic:
    """Count the search of nearest codes and their statistics: VQ-Flow's 16 images of 384 x 384, all levels."""
    with counted() as (traffic, counter):
        x = torch.empty(rows, channels, dtype=dtype, device="cuda")
        embed = torch.empty(channels, codes, device="cuda")
        with counter:
            ops.code_statistics(x, ops.nearest_code(x, embed.T), codes)
    return traffic


def distances(images: int, places: int = 256, classes: int = 5, dim: int = 128, columns: int = 128) -> Traffic:
    """Count the distances of maps of 16 x 16 pixels to the Gaussians of all places and classes."""
    with counted() as (traffic, counter):
        x = torch.empty(images * places, dim, device="cuda")
        place = torch.empty(images * places, dtype=torch.int64, device="cuda")
        mean = torch.empty(classes, places, dim, device="cuda")
        factor = torch.empty(classes, places, columns, dim, device="cuda").mT
        with counter:
            ops.place_distances(x, place, mean, factor)
    return traffic


def scoring(precision: str = "bf16", images: int = 1, side: int = 1000, known: bool = True) -> Traffic:
    """Count the densities of one level of images, of the class that is known, the parameters packed before."""
    model = paper_model(precision).eval()
    with counted(blocks=12) as (traffic, counter):
        on_fake_cuda(model)
        flow: Any = model.nfs[0]
        grid = SeparablePosition(torch.empty(side, 128, device="cuda"), torch.empty(side, 128, device="cuda"))
        maps = FeatureMaps.of([torch.empty(images, 200, side, side, device="cuda")])
        ids = torch.zeros(images, dtype=torch.int64) if known else None
        kept: dict[Any, Any] = {}

        def get(make: Callable[[], Any], kind: Any, tensors: Sequence[Tensor]) -> Any:
            """Keep what the block kernel's cache would keep; fake tensors do not count their changes."""
            key = kind, *map(id, tensors)
            if key not in kept:
                kept[key] = make()
            return kept[key]

        packed = mock.patch.object(dispatch.kernels("blocks"), "PACKED", SimpleNamespace(get=get))
        with torch.no_grad(), mock.patch.object(flow, "grid", lambda *_: grid), packed:
            with counter:
                model.densities(maps, ids)
                traffic.clear()
                model.densities(maps, ids)
    return traffic


if __name__ == "__main__":
    print("A training step, level of 8 x 64 x 64 pixels, bf16, reversible:", training_step())
    print("Nearest codes and their statistics, 16 images of 384 x 384 pixels, D = 576, K = 512:", codes())
    for images in (1, 8, 64):
        print(f"Distances of {images} maps of 256 places, D = M = 128, K = 5:", distances(images))
    print("Densities of a map of 1000 x 1000 pixels, bf16, class known:", scoring())
