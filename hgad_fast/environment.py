"""The environment of a run: what its figures depend on, and the state of torch, on which they do not depend."""

from __future__ import annotations

import functools
import itertools
import platform
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

VERSION = "0.1.0"

FLOAT = torch.float32  # in which everything is computed

_NUMPY_ERRORS: Any = {"divide": "warn", "over": "warn", "under": "ignore", "invalid": "warn"}
_backends: Any = torch.backends
_lock = threading.Lock()
_THREADS = threading.RLock()  # their number is one setting for the whole process
_device: ContextVar[str] = ContextVar("device", default="cpu")  # of tensors in `plain_torch`
_inside = 0  # calls in `plain_torch`, of all threads
_restore: list[Callable[[], Any]] = []  # what the last of them sets back


@contextmanager
def without_memory() -> Iterator[None]:
    """Make tensors without memory (on torch's device "meta"), within `plain_torch`, too: a model of them has shapes."""
    token = _device.set("meta")
    try:
        with _WithoutDraws(), torch.device("meta"):
            yield
    finally:
        _device.reset(token)


class _WithoutDraws(TorchFunctionMode):
    """Draws no normal values for tensors without memory, which have none.

    torch would do so in Python, and import its compiler and sympy for it, in a second.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn and torch.device(kwargs.get("device", "cpu")).type == "meta":
            kwargs.pop("generator", None)
            return torch.empty(*args, **kwargs)
        if func in (nn.init.normal_, Tensor.normal_):
            tensor = kwargs["tensor"] if "tensor" in kwargs else args[0]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


@contextmanager
def plain_torch() -> Iterator[None]:
    """Compute as in a fresh process, whatever state the caller has put torch and NumPy in; a decorator, too.

    Autocast and inference mode are off (where gradients are wanted or not, say so inside), tensors are made on the CPU
    where no device is given, and NumPy's floating-point errors are none. This is the state of the calling thread. The
    default dtype and the precision of float32 products and convolutions are settings of the process: other threads
    find torch's defaults meanwhile, and the caller's are restored when the last thread leaves. On CUDA convolutions of
    the backbone have torch's default, "tf32"; `ops.dispatch.float32_products` sets what else is computed there.

    What remains is rounding: the number of threads, deterministic algorithms and the choice of library (oneDNN, cuDNN)
    may change the order of sums.
    """
    with ExitStack() as stack:
        stack.callback(_release_settings)
        _hold_settings()
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for device in ("cpu", "cuda", "xpu", "mps"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != _device.get():
            stack.enter_context(torch.device(_device.get()))
        if np.geterr() != _NUMPY_ERRORS:
            stack.enter_context(np.errstate(**_NUMPY_ERRORS))
        yield


def require_float32(module: nn.Module) -> None:
    """Raise a ValueError where parameters or buffers are of another precision than that which is computed in.

    Of a detector the encoder is left out: it is looked at when it is made fast.
    """
    children = [child for name, child in module.named_children() if name != "encoder"]
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    for child in children:
        tensors += itertools.chain(child.parameters(), child.buffers())
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dtype != FLOAT:
            raise ValueError(
                f"the model's weights are {str(tensor.dtype).removeprefix('torch.')}, and it computes in float32: load "
                "the model again, and leave out half(), bfloat16(), double() and to(dtype)"
            )


def _hold_settings() -> None:
    """Set what is one setting for all threads, where it is another than torch's default."""
    global _inside
    with _lock:
        _inside += 1
        if (dtype := torch.get_default_dtype()) != FLOAT:
            _restore.append(functools.partial(torch.set_default_dtype, dtype))
            torch.set_default_dtype(FLOAT)
        products = [(_backends.mkldnn, "matmul", "ieee"), (_backends.mkldnn, "conv", "ieee")]
        if torch.cuda.is_initialized():
            products += [(_backends.cuda, "matmul", "ieee"), (_backends.cudnn, "conv", "tf32")]
        for backend, name, wanted in products:
            setting = getattr(backend, name)
            found = setting.fp32_precision
            if found not in (wanted, "none"):
                _restore.append(functools.partial(setattr, setting, "fp32_precision", found))
                setting.fp32_precision = wanted


def _release_settings() -> None:
    """Set them back, if no other call needs them."""
    global _inside
    with _lock:
        _inside -= 1
        if not _inside:
            while _restore:
                _restore.pop()()


def environment(device: torch.device) -> dict[str, Any]:
    """Return device, threads, versions, commit and date of a run, in types that JSON has."""
    packages = package_versions("hgad_fast", "triton", "numpy", "FrEIA")
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: version or "not installed" for name, version in packages.items()},
        },
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on the CPU without torch's other threads: on many small tensors they wait most of the time, busily."""
    with _THREADS:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


@functools.cache
def bfloat16_instructions() -> str:
    """Return the name of this processor's instructions that multiply bfloat16 numbers; empty if it has none."""
    capabilities = torch.cpu.get_capabilities()
    names = {"amx_bf16": "AMX", "avx512_bf16": "AVX512_BF16", "bf16": "BF16"}  # the last: ARM's
    found = [name for key, name in names.items() if capabilities.get(key)]
    return found[0] if found and torch.backends.mkldnn.is_available() else ""


def package_versions(*packages: str) -> dict[str, str | None]:
    """Return the version of each package, None where it is not installed."""
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def versions() -> dict[str, str]:
    """Return the versions of Python, of this library and of the packages that scores depend on."""
    packages = package_versions("torch", "triton", "timm", "numpy", "scikit-learn", "scipy")
    known = {"hgad_fast": VERSION, "python": platform.python_version()}
    return known | {name: version or "not installed" for name, version in packages.items()}


def device_name(device: torch.device) -> str:
    """Return the name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """Return the commit of the checkout with this file, `-dirty` if changed; None without a checkout or without git."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
