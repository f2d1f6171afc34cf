"""Dispatch of a fused operation to its definition in torch or to its Triton twin: the one place that decides.

An operation with a Triton twin in `hgad_fast.kernels` carries `@fused`: CUDA tensors (and, under
``TRITON_INTERPRET=1``, CPU tensors) take the kernel, all others the definition. ``backend="triton"|"torch"`` or the
environment variable ``HGAD_FAST_BACKEND`` overrule that; a forced backend that cannot run says why.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch")

_PRODUCTS = threading.RLock()  # the precision of float32 on CUDA is one setting for all threads


@functools.cache
def kernels(file: str) -> Any:
    """Return the kernel module `hgad_fast.kernels.<file>`; imported on first use, because Triton is slow to import."""
    return importlib.import_module(f"hgad_fast.kernels.{file}")


def path(x: Tensor, backend: str | None = None) -> str:
    """Return what computes a fused operation on a tensor like `x`: ``"triton"`` or ``"torch"``.

    Raises:
        ValueError: `backend` (or HGAD_FAST_BACKEND) is none of auto, triton, torch.
        RuntimeError: Triton is asked for and cannot run on this tensor.
    """
    choice = backend or os.environ.get("HGAD_FAST_BACKEND") or "auto"
    if choice not in BACKENDS:
        raise ValueError(f"backend is {choice!r}; allowed are {', '.join(BACKENDS)}")
    if choice == "torch":
        return "torch"
    if obstacle := _obstacle(x):
        if choice == "triton":
            raise RuntimeError(f"backend 'triton' cannot run: {obstacle}")
        return "torch"
    return "triton"


def _obstacle(x: Tensor) -> str | None:
    """Return why Triton cannot compute on `x`; None if it can."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"the kernels compute in float32, the tensor is {x.dtype}"
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensor is on {x.device}, and TRITON_INTERPRET=1 (Triton's interpreter) is not set"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton, Linux only)"
    return None


@contextmanager
def float32_products(device: torch.device, operands: str = "ieee") -> Iterator[None]:
    """Multiply and convolve float32 as such, or on CUDA with ``"tf32"`` operands, whatever the caller's settings are.

    Autocast is off meanwhile: it would round operands to half precision, and return half precision, without a word.
    One thread at a time is in this context on CUDA, where torch knows a single setting for all threads. Do not run a
    backward pass in it: autograd's thread may ask for it, too. What others multiply meanwhile is as exact.
    """
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False), float32_products(device, operands):
            yield
        return
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    settings = torch.backends.cuda.matmul, cudnn.conv
    with _PRODUCTS:
        before = [setting.fp32_precision for setting in settings]
        for setting in settings:
            setting.fp32_precision = operands
        try:
            yield
        finally:
            for setting, precision in zip(settings, before, strict=True):
                setting.fp32_precision = precision


def in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function of a tensor (or of a list of them) and more, to do its products as `float32_products`."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else next(iter(kwargs.values()))
        device = (first if isinstance(first, Tensor) else first[0]).device
        on_cpu = device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        if on_cpu or torch.compiler.is_compiling():  # nothing to do; a graph calls operators, which do it
            return function(*args, **kwargs)
        with float32_products(device):
            return function(*args, **kwargs)

    return wrapper


def fused(
    file: str, make: Callable[[Any], Any] | None = None, check: Callable[..., None] | None = None
) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a definition with its kernel, the function of the same name and signature in ``kernels/<file>.py``.

    Kernels return plain tuples; `make` turns one into the definition's named tuple. `check` gets the arguments first: a
    kernel would read outside a tensor of the wrong shape.

    A kernel knows nothing of autograd: where a gradient is wanted, `op.differentiable` (the operator that pairs the
    kernel with its backward, same arguments by position) runs it.
    """

    def decorate(reference: Callable[..., Any]) -> Any:
        @functools.wraps(reference)
        @in_float32
        def op(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
            if check:
                check(*args, **kwargs)
            if path(args[0], backend) == "torch":
                return reference(*args, **kwargs)
            wants_gradient = torch.is_grad_enabled() and any(
                isinstance(argument, Tensor) and argument.requires_grad for argument in args
            )
            if wants_gradient and public.differentiable is not None:
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                return public.differentiable(*bound.args, *bound.kwargs.values())
            results = getattr(kernels(file), reference.__name__)(*args, **kwargs)
            return make(results) if make else results

        signature = inspect.signature(reference)
        public: Any = op
        public.reference, public.kernel_file, public.differentiable = reference, file, None
        return public

    return decorate


def no_double_backward(ctx: Any, *gradients: Any) -> Any:
    """Raise, in the place of a second derivative, an error that names the functions that have one."""
    raise RuntimeError(
        "the fused operations of hgad_fast are differentiable once; for second derivatives use "
        "hgad_fast.ops.flow_definition and mixture_terms.reference"
    )
