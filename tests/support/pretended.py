"""A CUDA device that is not there: its tensors say that they lie on it, and lie in the CPU's memory.

Whatever would run on the device is computed by torch's CPU kernels, and kernels of ours by Triton's interpreter. So the
library can take all its branches for a GPU from end to end, on any machine, with real values. Found are: tensors of two
devices in one operation, values read on the host without a copy, in a recorded graph what cannot be recorded, and what
makes the host wait.
Not found is what only hardware shows: rounding, races, memory, speed. There is one device, "cuda:0"; streams and events
order nothing, as everything is done at once.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # it looks at the functions of torch.cuda when it is imported, which must be torch's
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from hgad_fast.models.hgad import _window
from hgad_fast.modules.flow import sinusoidal_position
from hgad_fast.modules.place_gaussian import places
from hgad_fast.scoring.maps import blurred_axis
from hgad_fast.training import step

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
WAITING = {
    "aten::_local_scalar_dense": "item",
    "aten::masked_select": "masked_select",
    "aten::nonzero": "nonzero",
    "aten::repeat_interleave": "repeat_interleave",
    "aten::_unique2": "unique",
    "aten::unique_consecutive": "unique",
    "aten::unique_dim": "unique",
}
MAKING = (torch.tensor, torch.as_tensor, torch.scalar_tensor)
MOVING = (Tensor.to, Tensor.cpu, Tensor.cuda)
KEPT = (_window, blurred_axis, places, sinusoidal_position)  # functions that keep tensors, by their device
FREE_BYTES = 10**10


class Pretended(Tensor):
    """A tensor on the device; `values` has what it holds, in the CPU's memory.

    torch itself takes it for a tensor on the CPU, as its autograd would ask for a driver otherwise.
    """

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> Pretended:
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset()}
        tensor = Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device=CPU, **layout)
        tensor.values = values
        return tensor

    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Pretended({self.values!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            with torch.no_grad():
                copied = self.detach().clone()
            memo[id(self)] = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.values.__reduce_ex__(protocol)  # a file holds it as a tensor on the CPU

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def get_device(self) -> int:
        return 0

    def tolist(self) -> Any:
        _wait("tolist")
        return self.values.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, *_: Any) -> Any:
        return self.numpy()

    def record_stream(self, stream: Any) -> None:
        pass

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


# ---- operations


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Carry out an operation of torch, or of the library, on tensors of which some may lie on the device."""
    name = func._schema.name
    if name in OPDEFS:  # the library's: in Python, so that its branches for the device are taken
        with _Operations():
            return OPDEFS[name]._init_fn(*args, **kwargs)
    maybe_view = not func._schema.is_mutable and any(value.alias_info for value in func._schema.returns)
    if maybe_view and func._can_decompose():  # such as `to`, into a view or a copy
        with _Operations():
            return func.decompose(*args, **kwargs)
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    kwargs = kwargs | ({"pin_memory": False} if kwargs.get("pin_memory") else {})
    target = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    in_backward = torch._C._current_graph_task_id() != -1
    of_device = all(isinstance(t, Pretended) for t in tensors) and (in_backward or _Functions.on_device)
    if of_device and target in (None, CPU) and any(argument.name == "device" for argument in func._schema.arguments):
        target = GPU  # for tensors on the device, which torch believes to be on the CPU
    if target is not None:
        kwargs["device"] = CPU if target.type == "cuda" else target
    on_device = target.type == "cuda" if target is not None else any(isinstance(t, Pretended) for t in tensors)
    if target is None and on_device and name != "aten::copy_" and not in_backward:
        _require_one_device(name, args, tensors)
    if on_device:
        _count_waits(name, args, kwargs)
    args_and_kwargs = tree_map(_values, (args, kwargs))
    if _recording is not None and on_device:
        result = _record(_recording, func, *args_and_kwargs)
    else:
        result = _carry_out(func, *args_and_kwargs)
    if func._schema.is_mutable:  # an operation in place returns the tensors that it was given
        given = {id(_values(t)): t for t in tensors}
        return tree_map(lambda t: given.get(id(t)) if isinstance(t, Tensor) else t, result)
    return tree_map(lambda t: Pretended(t) if isinstance(t, Tensor) else t, result) if on_device else result


def _count_waits(name: str, args: Any, kwargs: dict[str, Any]) -> None:
    """Count an operation that makes the host wait: for a number, for how much there is, or for a copy."""
    if name in WAITING or name in INDEXING and _is_mask(args[1]):
        _wait(WAITING.get(name, "an index by a mask"))
    if name == "aten::copy_" and args[0].is_cuda != args[1].is_cuda:
        if not (args[2] if len(args) > 2 else kwargs.get("non_blocking")):
            _wait("a copy between the devices")


def _is_mask(indices: Any) -> bool:
    return any(isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8) for t in indices)


def _values(value: Any) -> Any:
    return value.values if isinstance(value, Pretended) else value


def _require_one_device(name: str, args: Any, tensors: list[Tensor]) -> None:
    """Raise as torch does, where tensors lie on two devices; numbers, and indices on the CPU, may be there."""
    others = [t for t in tensors if not isinstance(t, Pretended) and t.dim()]
    if name in INDEXING and isinstance(args[0], Pretended):
        others = []
    if others:
        shapes = ", ".join(f"{'cuda:0' if isinstance(t, Pretended) else 'cpu'} {tuple(t.shape)}" for t in tensors)
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {shapes}")


def _carry_out(func: Any, args: Any, kwargs: Any) -> Any:
    name = func._schema.name
    if _has_result_type(func):  # torch has it on a GPU only
        product = torch.matmul(*(t.to(args[2]) for t in args[:2]))
        return kwargs["out"].copy_(product) if "out" in kwargs else product
    result = func(*args, **kwargs)
    if name == "aten::convolution_backward" and result[1] is not None:
        weight = torch.empty_strided(args[2].shape, args[2].stride(), dtype=result[1].dtype)
        return result[0], weight.copy_(result[1]), result[2]  # or autograd would copy it unseen
    return result


def _has_result_type(func: Any) -> bool:
    return func._schema.name in ("aten::mm", "aten::bmm") and func._overloadname.startswith("dtype")


def _record(graph: list[Callable[[], Any]], func: Any, args: Any, kwargs: Any) -> Any:
    """Return an operation's result without carrying it out: there is nothing in it before the first replay."""
    returned = [value.alias_info for value in func._schema.returns]
    if func._schema.is_mutable:
        assert all(returned), f"{func} both changes tensors and makes some"
        graph.append(functools.partial(_carry_out, func, args, kwargs))
        values = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        changed = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        results = tuple(values[name] for name in changed if values.get(name) is not None)
        return None if not returned else results[0] if len(returned) == 1 else results
    if any(returned) or func._schema.name in ("aten::_unsafe_view", "aten::sym_size"):
        return func(*args, **kwargs)  # views
    if _has_result_type(func):
        shapes = torch.empty((*args[0].shape[:-1], args[1].shape[-1]), dtype=args[2], device="meta")
    elif func._schema.name == "aten::_embedding_bag":  # which makes less on a CPU than it does without memory
        shapes = func(*args, **kwargs)
    else:
        in_shapes = tree_map(_shape, args), tree_map(_shape, kwargs)
        shapes = func(*in_shapes[0], **in_shapes[1])
    made = tree_map(_of_shape, shapes)

    def again() -> None:
        results = tree_leaves(_carry_out(func, args, kwargs))
        for old, new in zip(tree_leaves(made), results, strict=True):
            if isinstance(old, Tensor):
                old.copy_(new)

    graph.append(again)
    return made


def _shape(value: Any) -> Any:
    """Return a tensor without memory for one with, and torch's device of such tensors for any."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return torch.device("meta") if isinstance(value, torch.device) else value


def _of_shape(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    tensor = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    return tensor.fill_(torch.nan if tensor.is_floating_point() else 0)


class _Operations(TorchDispatchMode):
    """Sees operations without a tensor on the device, such as those that make one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


# ---- copies between the devices


class _Functions(TorchFunctionMode):
    """Sees what torch does before it comes to operations: copies to a device, and devices without a number."""

    on_device = False  # a function of tensors on the device is running

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in MAKING and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return _moved(func(*args, **kwargs), device)
        if func is Tensor.to:
            return _to(*args, **kwargs)
        if func in MOVING:
            return _moved(args[0], CPU if func is Tensor.cpu else GPU)
        if func is torch.device:
            return func(*args, **kwargs)
        args, kwargs = tuple(map(_numbered, args)), {name: _numbered(value) for name, value in kwargs.items()}
        before = _Functions.on_device
        _Functions.on_device = any(isinstance(value, Pretended) for value in tree_leaves((args, kwargs)))
        try:
            return func(*args, **kwargs)
        finally:
            _Functions.on_device = before


def _numbered(value: Any) -> Any:
    return GPU if isinstance(value, (str, torch.device)) and str(value) == "cuda" else value


def _to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Do what `Tensor.to` does, in each of its forms."""
    for value in args:
        if isinstance(value, Tensor):
            kwargs |= {"device": value.device, "dtype": value.dtype}
        elif isinstance(value, torch.dtype):
            kwargs["dtype"] = value
        elif isinstance(value, (str, torch.device)):
            kwargs["device"] = value
    dtype, device = kwargs.get("dtype") or x.dtype, kwargs.get("device")
    options = {name: kwargs[name] for name in ("memory_format",) if kwargs.get(name)}
    if dtype != x.dtype or options or kwargs.get("copy"):
        x = torch.ops.aten._to_copy(x, dtype=dtype, **options)
    return x if device is None else _moved(x, device)


def _moved(x: Tensor, device: Any) -> Tensor:
    """Return a tensor on a device: itself if it is there."""
    device = torch.device(device)
    if x.device.type == device.type:
        return x
    return _Copy.apply(x, device) if {x.device.type, device.type} == {"cpu", "cuda"} else Tensor.to(x, device)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, device: torch.device) -> Tensor:
        ctx.before = x.device
        if device.type == "cpu":
            _wait("a copy to the host")
        _forbid_while_recording("a copy to the device")
        copied = _values(x.detach()).clone()
        return Pretended(copied) if device.type == "cuda" else copied

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _Copy.forward(SimpleNamespace(), gradient, ctx.before), None


class _Generator(torch.Generator):
    """A generator whose numbers are the CPU's."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls, CPU)


# ---- streams, events and graphs


_recording: list[Callable[[], Any]] | None = None
_waits: Counter[str] = Counter()


def _wait(what: str) -> None:
    """Count what makes the host wait for the device.

    Raises:
        RuntimeError: a graph is being recorded.
    """
    _forbid_while_recording(what)
    _waits[what] += 1


def _forbid_while_recording(what: str) -> None:
    if _recording is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing: {what}")


class _Stream:
    """A stream, or an event, that orders nothing."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> _Stream:
        return _Stream()

    def is_capturing(self) -> bool:
        return _recording is not None

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 1.0

    def wait(self, *_: Any) -> None:
        """Let the device wait, which is done already."""

    record = wait_event = wait_stream = wait

    def synchronize(self) -> None:
        _wait("synchronize")


class _Graph:
    """A recorded graph: its operations, in order."""

    def __init__(self) -> None:
        self.work: list[Callable[[], Any]] = []

    @torch.no_grad()
    def replay(self) -> None:
        for work in self.work:
            work()


@contextlib.contextmanager
def _graph(graph: _Graph, **_: Any) -> Iterator[None]:
    global _recording
    _recording = graph.work
    try:
        yield
    finally:
        _recording = None


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _nowhere(*_: Any, **__: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _module_to(to: Callable[..., Any]) -> Callable[..., Any]:
    """Return `nn.Module.to` for a module's tensors: it asks torch where a tensor is."""

    def module_to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if args and isinstance(args[0], Tensor):
            args = args[0].device, args[0].dtype
        return to(self, *map(_numbered, args), **{name: _numbered(value) for name, value in kwargs.items()})

    return module_to


def _grouped(group: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function by which gradients are grouped for optimizers: it asks torch where they are."""

    def grouped(tensorlists: Any, with_indices: bool = False) -> Any:
        groups = group(tensorlists, with_indices)
        return {(of_group[0][0][0].device, dtype): of_group for (_, dtype), of_group in groups.items()}

    return grouped


@contextlib.contextmanager
def pretended_gpu(interpreted: SimpleNamespace | None = None) -> Iterator[Counter[str]]:
    """Pretend that there is a GPU, and yield a count of what makes the host wait for it.

    Args:
        interpreted: the kernel modules that run on it; None: the definitions do.
    """
    stand_ins: dict[str, Any] = {
        "CUDAGraph": _Graph,
        "Event": _Stream,
        "Stream": _Stream,
        "_lazy_init": _nothing,
        "current_device": lambda: 0,
        "current_stream": _Stream,
        "device": _nowhere,
        "device_count": lambda: 1,
        "empty_cache": _nothing,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "a pretended GPU",
        "get_device_properties": lambda device=None: SimpleNamespace(total_memory=FREE_BYTES),
        "graph": _graph,
        "graph_pool_handle": lambda: (0, 0),
        "is_available": lambda: True,
        "is_current_stream_capturing": lambda: _recording is not None,
        "is_initialized": lambda: True,
        "manual_seed_all": _nothing,
        "max_memory_allocated": lambda device=None: 0,
        "mem_get_info": lambda device=None: (FREE_BYTES, FREE_BYTES),
        "memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": _nothing,
        "set_device": _nothing,
        "set_per_process_memory_fraction": _nothing,
        "stream": _nowhere,
        "synchronize": lambda device=None: _wait("synchronize"),
    }
    overwriting = torch.__future__.get_overwrite_module_params_on_conversion()
    with contextlib.ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        stack.enter_context(mock.patch.object(torch.accelerator, "current_stream", _Stream))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        stack.enter_context(mock.patch.object(nn.Module, "to", _module_to(nn.Module.to)))
        for name in ("torch.optim.optimizer", "torch.nn.utils.clip_grad"):
            module = importlib.import_module(name)
            group = _grouped(module._group_tensors_by_device_and_dtype)
            stack.enter_context(mock.patch.object(module, "_group_tensors_by_device_and_dtype", group))
        stack.enter_context(mock.patch.object(Tensor, "pin_memory", lambda x, *_: x))
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwriting)
        if interpreted is None:
            stack.enter_context(mock.patch.dict("os.environ", HGAD_FAST_BACKEND="torch"))
        else:
            stack.enter_context(_launching_on_the_cpu(interpreted))
        stack.enter_context(mock.patch.dict(step._side_streams, clear=True))
        for kept in KEPT:  # by device: tensors of a GPU that is there are no tensors of this one
            kept.cache_clear()
            stack.callback(kept.cache_clear)
        stack.enter_context(_Operations())
        stack.enter_context(_Functions())
        _waits.clear()
        yield _waits


@contextlib.contextmanager
def _launching_on_the_cpu(interpreted: SimpleNamespace) -> Iterator[None]:
    """Let kernels be launched on what tensors on the device hold."""
    launch = interpreted.common.launch

    def launch_on_values(kernel: Any, programs: Any, **arguments: Any) -> None:
        devices = {t.device.type for t in arguments.values() if isinstance(t, Tensor)}
        if len(devices) > 1:
            raise ValueError(f"{kernel.fn.__name__} is given tensors on {' and '.join(sorted(devices))}")
        values = {name: _values(value) for name, value in arguments.items()}

        def work() -> None:
            launch(kernel, programs, **values)

        work() if _recording is None else _recording.append(work)

    with contextlib.ExitStack() as stack:
        for module in vars(interpreted).values():
            if getattr(module, "launch", None) is launch:
                stack.enter_context(mock.patch.object(module, "launch", launch_on_values))
        stack.enter_context(mock.patch.object(interpreted.common, "architecture", lambda device: "interpreter"))
        yield
