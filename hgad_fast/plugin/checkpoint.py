"""What a checkpoint of lightning holds of a model, beside its tensors: plain data, so that it is loaded safely."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .. import methods
from ..models.detector import Detector
from ..scoring.stored import stored_calibration

FORMAT = "hgad_fast lightning 1"
KEY = "hgad_fast"  # in the checkpoint
ASKED = ("meta_epochs", "sub_epochs", "batch_size", "precision")  # fields that a training may change


def stored(detector: Detector, asked: Any, seen_size: tuple[int, int] | None) -> dict[str, Any]:
    """Return what `restored` takes.

    Args:
        detector: the model.
        asked: its configuration as the user asked for it.
        seen_size: (h, w) at which its training images are seen, if they have one in common.
    """
    calibration = detector.calibration
    return {
        "format": FORMAT,
        "method": detector.config.method,
        "config": detector.config.to_json(),
        "asked": {name: getattr(asked, name) for name in ASKED if hasattr(asked, name)},
        "seen_size": seen_size,
        "calibration": None if calibration is None else {**calibration.tensors()},
        "calibration_settings": None if calibration is None else calibration.settings(),
    }


def restored(content: Mapping[str, Any], method: str) -> tuple[Detector, Any, tuple[int, int] | None]:
    """Return the detector that a checkpoint holds, without its tensors, and the other arguments of `stored`.

    Raises:
        ValueError: it holds none of this method.
    """
    if content.get("format") != FORMAT or content.get("method") != method:
        found = f"a model of the method {content['method']!r}" if "method" in content else "none of hgad_fast"
        raise ValueError(f"the checkpoint holds {found}, and the model is one of the method {method!r}")
    model_class = methods.METHODS[method]
    config = model_class.config_class.from_fields(json.loads(content["config"]))
    detector = model_class(config.replace(backbone_weights=None))  # they are among the tensors
    detector.config = detector.config.replace(backbone_weights=config.backbone_weights)
    if content["calibration"] is not None:
        detector.calibration = stored_calibration(
            content["calibration"],
            content["calibration_settings"],
            groups=len(detector.groups),
            levels=detector.density_levels,
            parts=detector.density_parts,
            fusion=detector.fusion,
        )
    seen_size = content["seen_size"]
    return detector, detector.config.replace(**content["asked"]), None if seen_size is None else tuple(seen_size)
