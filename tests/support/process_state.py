"""What a test could leave behind in its process."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import numpy as np
import torch


def process_state() -> dict[str, Any]:
    """Return what tests could leave behind in their process."""
    return {
        "environment": {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"},
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


def umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
