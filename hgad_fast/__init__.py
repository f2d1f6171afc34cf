"""Unified visual anomaly detection: HGAD (arXiv 2403.13349) and VQ-Flow (arXiv 2409.00942), fast and exact."""

from .environment import VERSION as __version__
from .methods import load
from .models.config import HGADConfig, VQFlowConfig
from .models.hgad import HGADModel
from .models.vqflow import VQFlowModel
from .scoring.result import ScoreResult
from .scoring.scorer import Scorer

__all__ = ["HGADConfig", "HGADModel", "ScoreResult", "Scorer", "VQFlowConfig", "VQFlowModel", "__version__", "load"]
