"""Unified anomaly detection with hierarchical Gaussian mixture normalizing flows (HGAD, arXiv 2403.13349)."""

from .config import HGADConfig
from .model import HGADModel
from .score import ScoreResult
from .scorer import Scorer

__version__ = "0.1.0"
__all__ = ["HGADConfig", "HGADModel", "ScoreResult", "Scorer", "__version__"]
