"""Unified visual anomaly detection, fast and exact: HGAD (arXiv 2403.13349), VQ-Flow (2409.00942), place Gaussians."""

from .importing import uncollected

with uncollected():
    from .environment import VERSION as __version__
    from .methods import load
    from .models.config import GaussianConfig, HGADConfig, VQFlowConfig
    from .models.gaussian import GaussianModel
    from .models.hgad import HGADModel
    from .models.vqflow import VQFlowModel
    from .scoring.result import ScoreResult
    from .scoring.scorer import Scorer

__all__ = [
    "GaussianConfig",
    "GaussianModel",
    "HGADConfig",
    "HGADModel",
    "ScoreResult",
    "Scorer",
    "VQFlowConfig",
    "VQFlowModel",
    "__version__",
    "load",
]
