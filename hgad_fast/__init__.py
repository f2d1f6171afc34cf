"""Unified visual anomaly detection, fast and exact: HGAD (arXiv 2403.13349), VQ-Flow (2409.00942), place Gaussians.

The names below are imported when they are first used, torch with them: the command line says what it does before that.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .importing import uncollected

if TYPE_CHECKING:
    from .environment import VERSION as __version__
    from .methods import load
    from .models.config import GaussianConfig, HGADConfig, VQFlowConfig
    from .models.gaussian import GaussianModel
    from .models.hgad import HGADModel
    from .models.vqflow import VQFlowModel
    from .scoring.monitor import Monitor
    from .scoring.result import ScoreResult
    from .scoring.scorer import Scorer

__all__ = [
    "GaussianConfig",
    "GaussianModel",
    "HGADConfig",
    "HGADModel",
    "Monitor",
    "ScoreResult",
    "Scorer",
    "VQFlowConfig",
    "VQFlowModel",
    "__version__",
    "load",
]

_HOMES = {
    "GaussianConfig": "models.config",
    "GaussianModel": "models.gaussian",
    "HGADConfig": "models.config",
    "HGADModel": "models.hgad",
    "Monitor": "scoring.monitor",
    "ScoreResult": "scoring.result",
    "Scorer": "scoring.scorer",
    "VQFlowConfig": "models.config",
    "VQFlowModel": "models.vqflow",
    "load": "methods",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module(".environment", __name__).VERSION
    if name.startswith("_"):  # what Python and tools ask any module for; __main__ would run the command line
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        with uncollected():
            module = importlib.import_module(f".{_HOMES.get(name, name)}", __name__)
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise  # of another package that is missing
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    value = getattr(module, name) if name in _HOMES else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
