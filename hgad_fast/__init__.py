"""Unified anomaly detection with hierarchical Gaussian mixture normalizing flows (HGAD, arXiv 2403.13349)."""

from .environment import VERSION as __version__
from .methods import load
from .models.config import HGADConfig
from .models.hgad import HGADModel
from .scoring.result import ScoreResult
from .scoring.scorer import Scorer

__all__ = ["HGADConfig", "HGADModel", "ScoreResult", "Scorer", "__version__", "load"]
