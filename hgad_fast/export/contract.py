"""The sidecar of an exported file: all that a program needs to know to use it, as JSON.

`examples/onnx_score.py` reads it. It says how an image is read and resized before it goes in, what comes out, and what
was checked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from typing import Any

import torch

from ..environment import VERSION, package_versions
from ..files import tensor_hash
from ..protocol import Detector
from ..scoring.calibration import required_calibration
from .graph import GIVEN_CLASS, IMAGE, Plan

FORMAT = "hgad_fast export 1"
KEY = "hgad_fast"  # of the sidecar's text in the metadata of an ONNX file
OPSET = 20

OUTPUT_NOTES = {
    "anomaly_map": ("float32", "how anomalous each pixel is; above the threshold it counts as anomalous"),
    "score": ("float32", "how anomalous the image is; infinite where it is no image in [0, 1], or overflows"),
    "class_id": ("int64", "the number of the group, given or inferred"),
    "p_value": ("float32", "(1 + m) / (n + 1): m of n calibration images of the group score as high; NaN without any"),
    "threshold": ("float32", "of the group: a higher score is anomalous; NaN: none, no image is ever anomalous"),
    "is_anomalous": ("bool", "the verdict: score above threshold, by more than the rounding of a runtime"),
}

RUNTIMES = {
    "onnxruntime": "as it is; other execution providers than the CPU's may round otherwise",
    "openvino": {
        "INFERENCE_PRECISION_HINT": "f32",
        "note": "set this hint: on processors with bfloat16 instructions OpenVINO takes bf16 by default, and scores "
        "move by percents",
    },
    "tensorrt": "not tried",
}


def contract(model: Detector, plan: Plan, kind: str, precision: str, groups: Collection[int]) -> dict[str, Any]:
    """Return the sidecar of a model that is exported by a plan.

    Args:
        model: a calibrated model.
        plan: what the graph was made for.
        kind: ``"onnx"`` or ``"torch"``.
        precision: in which the weights are stored.
        groups: the numbers of those that images can be of.
    """
    config, calibration = model.config, required_calibration(model)
    tensors = model.state_dict() | {f"calibration.{name}": x for name, x in calibration.tensors().items()}
    runtime: dict[str, Any] = {"kind": kind}
    if kind == "onnx":
        runtime |= {"opset": OPSET, "runtimes": RUNTIMES}
    rows = calibration.rates(model.groups)
    return {
        "format": FORMAT,
        **runtime,
        "model": {
            "method": config.method,
            "sha256": tensor_hash(tensors),
            "checkpoint": model.checkpoint,
            "config": json.loads(config.identity()),
        },
        "versions": {
            "hgad_fast": VERSION,
            "torch": torch.__version__,
            **package_versions("timm", "onnx", "onnxscript"),
        },
        "inputs": _inputs(model, plan),
        **({} if plan.size is None else {"resize": _resize(config, plan), "white_level": config.white_level}),
        "outputs": {
            name: {"shape": _shape(name, plan), "dtype": OUTPUT_NOTES[name][0], "meaning": OUTPUT_NOTES[name][1]}
            for name in plan.outputs
        },
        "group": None if plan.group is None else model.groups[plan.group],
        "groups": [
            {
                "name": row["group"],
                "threshold": _number(row["threshold"]),
                "false_alarm_rate": _number(row["attained"]),
                "calibration_images": row["reference"],
                "in_file": k in groups,
            }
            for k, row in enumerate(rows)
        ],
        "target_false_alarm_rate": calibration.false_alarm_rate,
        "precision": precision,
        "check": None,  # until the file is compared with the model
    }


def text_of(sidecar: dict[str, Any]) -> str:
    """Return a sidecar as JSON that every reader takes: without NaN, in ASCII."""
    return json.dumps(sidecar, indent=2, allow_nan=False) + "\n"


def _inputs(model: Detector, plan: Plan) -> dict[str, Any]:
    """Return what goes in, by the names of the inputs."""
    inputs: dict[str, Any] = {}
    for name in plan.inputs:
        if name == IMAGE:
            assert plan.size is not None
            inputs[name] = {"shape": ["batch", 3, *plan.size], "dtype": "float32", "channels": "RGB", "range": [0, 1]}
        elif name == GIVEN_CLASS:
            meaning = f"the group of each image, 0 to {len(model.groups) - 1}; -1: inferred"
            inputs[name] = {"shape": ["batch"], "dtype": "int64", "meaning": meaning}
        else:
            level = len(inputs)
            shape = ["batch", model.feature_dims[level], *plan.sizes[level]]
            inputs[name] = {"shape": shape, "dtype": "float32"}
    return inputs


def _resize(config: Any, plan: Plan) -> dict[str, Any]:
    """Return how an image becomes one of the size that goes in."""
    assert plan.size is not None
    rule = "short side"
    if config.center_crop:
        rule = "centre crop"
    elif config.square:
        rule = "square"
    elif isinstance(plan.img_size, str):
        rule = "native"
    height, width = plan.size
    return {
        "rule": rule,
        "img_size": plan.img_size,
        "height": height,
        "width": width,
        "filter": "Lanczos",
        "antialias": True,
        "clip": [0, 1],
        "note": "Pillow's LANCZOS on each channel in floating point; bilinear resizing moves scores by percents",
    }


def _shape(name: str, plan: Plan) -> list[Any]:
    """Return the shape of an output."""
    if name != "anomaly_map":
        return ["batch"]
    assert plan.map_size is not None
    return ["batch", *plan.map_size]


def _number(value: float) -> float | None:
    """Return a number that JSON can hold; None for a NaN or an infinity."""
    return value if math.isfinite(value) else None
