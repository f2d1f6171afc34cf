"""Models of this library in anomalib, and data of many classes for them: `pip install 'hgad-fast[anomalib]'`.

    from anomalib.engine import Engine
    from hgad_fast.anomalib import HGAD, MultiClassFolder

    data = MultiClassFolder("datasets/MVTecAD")
    model = HGAD(classes=data.class_names, preset="fast")
    engine = Engine()
    engine.fit(model=model, datamodule=data)
    engine.test(model=model, datamodule=data)

`docs/anomalib.md` tells the rest.
"""

from __future__ import annotations

import importlib.util

if getattr(importlib.util.find_spec("anomalib"), "origin", None) is None:  # a mere folder of that name has none
    raise ModuleNotFoundError(
        "hgad_fast.anomalib needs anomalib, which is not installed: pip install 'hgad-fast[anomalib]'", name="anomalib"
    )

from .plugin.batch import MultiClassBatch, MultiClassItem
from .plugin.class_metrics import ClassMetrics
from .plugin.data import MultiClassFolder
from .plugin.module import HGAD, DetectorModule, PlaceGaussian, VQFlow
from .plugin.processing import SeenPreProcessor, ThresholdPostProcessor

__all__ = [
    "ClassMetrics",
    "DetectorModule",
    "HGAD",
    "MultiClassBatch",
    "MultiClassFolder",
    "MultiClassItem",
    "PlaceGaussian",
    "SeenPreProcessor",
    "ThresholdPostProcessor",
    "VQFlow",
]
