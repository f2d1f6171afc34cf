"""What a test could leave behind in its process."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import numpy as np
import torch

# By pytest, the test that runs; by torch, where its compiler keeps files; by scikit-learn, how OpenMP is to start.
WRITTEN_BY_OTHERS = {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"}
WRITTEN_BY_OTHERS |= {"KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"}


def process_state() -> dict[str, Any]:
    """Return what tests could leave behind in their process, by names."""
    environment = {f"environment, {name}": value for name, value in os.environ.items() if name not in WRITTEN_BY_OTHERS}
    return environment | {
        "folder": os.getcwd(),
        "search path": list(sys.path),
        "umask": umask(),
        "signals": {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)},
        "alarm": signal.getitimer(signal.ITIMER_REAL)[0] > 0,
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "float32 products": torch.get_float32_matmul_precision(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "processes": torch.distributed.is_initialized(),
        "hip": torch.version.hip,
        "NumPy's errors": np.geterr(),
    }


def changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what differs between two states: of each name the value before and after, None where it had none."""
    pairs = {name: (before.get(name), after.get(name)) for name in before | after}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
