"""Models as anomalib exports them: one graph from an image of any size to its fields, as `OpenVINOInferencer` runs it.

It consists of three parts: `resizing`, the graph of the library's own export, and `scale`.

Symbols: B images; H x W pixels, as they come; h x w pixels, as the model sees them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..environment import package_versions, plain_torch, require_float32
from ..export.check import TOLERANCES, drawn_images, reference_model
from ..export.contract import contract, text_of
from ..export.formats import Program, Run, any_batch, require_packages, runner, traced_for
from ..export.graph import ScoringGraph
from ..export.write import aside, in_turn, planned, put
from ..features.preprocess import preprocess, seeing, seen_shape
from ..protocol import Detector
from ..scoring.calibration import required_calibration
from ..scoring.inputs import check_normalization, checked_map_size
from ..scoring.rates import listed
from ..scoring.score import score_images
from ..terminal import warn_user
from . import scale
from .resizing import LARGEST_SIDE, Resizing, by

FORMAT = "hgad_fast anomalib graph 1"
SCORED = ("anomaly_map", "score", "threshold", "is_anomalous")  # outputs of the graph of scoring
CHECKED = ("score_multiple", "map_multiple")  # outputs that are compared, and not written
CHECKED_IMAGES = 2  # of each size

OUTPUT_NOTES = {
    "pred_score": ("float32", "how anomalous the image is; 1 also where it is none of the proportions or values due"),
    "pred_label": ("bool", "the verdict on the image: pred_score above the limit"),
    "anomaly_map": ("float32", "how anomalous each pixel is of what the model sees"),
    "pred_mask": ("bool", "the verdict on each of these pixels: anomaly_map above the limit"),
}

SCALES = {  # by whether scores are never below 0
    True: "multiples x = s / t of the threshold t of the group",
    False: "x = 1 + (s - t) above the threshold t of the group, 1 / (1 + (t - s)) below it",
}


class InferenceGraph(nn.Module):
    """Images (B, 3, H, W) float32 RGB in [0, 1] -> what anomalib's inferencers give of each, named by `outputs`.

    These are pred_score (B,), pred_label (B,) bool, anomaly_map (B, 1, h, w) and pred_mask (B, 1, h, w) bool, scores
    and maps on the `scale` of anomalib. The graph resizes the images itself, with Pillow's Lanczos filter, which is
    antialiased, so that they go in as they come from their files.

    An image whose values are not in [0, 1], or, where the graph takes any size, whose proportions are not those of
    what the model sees, has the score 1 and is anomalous: nothing is known of it that would make it normal.

    Args:
        detector: a calibrated model; the graph has copies of all that it needs.
        seen: h and w.
        input_size: H and W; None: any.
        image_sensitivity: between 0 and 1; an image is anomalous above 1 less this, on the scale from 0 to 1. With 0.5
            it is where its score is above the threshold of its class.
        pixel_sensitivity: the same for pixels.
        normalised: whether scores and maps are on the scale from 0 to 1; otherwise they are multiples of the threshold.
        thresholded: whether pred_label and pred_mask are among the outputs.

    Attributes:
        scoring: the graph of the library's own export.
        outputs: the names of the outputs.
        compared: whether scores (B,) and maps (B, 1, h, w) in multiples of the threshold are outputs, too (`CHECKED`).

    Raises:
        ValueError: the model is not calibrated, a class has no threshold, a sensitivity is none, or images of these
            sizes are not seen at `seen`.
    """

    def __init__(
        self,
        detector: Detector,
        *,
        seen: tuple[int, int],
        input_size: tuple[int, int] | None = None,
        image_sensitivity: float = 0.5,
        pixel_sensitivity: float = 0.5,
        normalised: bool = True,
        thresholded: bool = True,
    ) -> None:
        super().__init__()
        check_normalization(detector, "calibrated")
        size, whole = checked_map_size(seen, "seen"), checked_map_size(input_size, "input_size")
        assert size is not None
        self.normalised, self.thresholded, self.compared = normalised, thresholded, False
        self.from_zero = detector.scores_from_zero
        self.image_limit = _limit("image_sensitivity", image_sensitivity, normalised)
        self.pixel_limit = _limit("pixel_sensitivity", pixel_sensitivity, normalised)
        reference = reference_model(detector)
        self.config = seeing(reference, required_calibration(reference).img_size).config
        if (own := seen_shape(size, self.config)) != size:
            raise ValueError(
                f"seen is {by(size)}, and the model sees an image of that size at {by(own)}: give seen={own}"
            )
        self.resizing = Resizing(self.config, size, whole)
        plan, encoder = planned(reference, size, "image", SCORED, map_size=size)
        self.scoring = ScoringGraph(reference, plan, encoder).eval()
        known, thresholds = self.scoring.groups, self.scoring.judge.thresholds
        if silent := [detector.groups[k] for k in known if not math.isfinite(thresholds[k])]:
            raise ValueError(
                f"{listed(silent)}: no threshold, as there are no calibration images, and anomalib's scores are in "
                "multiples of it; calibrate the model on normal images of all classes"
            )
        if others := [name for k, name in enumerate(detector.groups) if k not in known]:
            warn_user(
                f"the graph knows nothing of {listed(others)}, whose images have other proportions than the {by(size)} "
                "of seen: export another one for them"
            )

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs, in their order."""
        names = tuple(OUTPUT_NOTES) if self.thresholded else ("pred_score", "anomaly_map")
        return names + CHECKED * (self.compared and self.normalised)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs, in the order of their names."""
        seen, valid = self.resizing(images)
        maps, scores, thresholds, are_anomalous = self.scoring(seen)
        scores = torch.where(valid, scores, math.inf)
        maps, pixel_thresholds = maps[:, None], thresholds[:, None, None, None]
        scores = scale.multiples(scores, thresholds, are_anomalous | ~valid, self.from_zero)
        maps = scale.multiples(maps, pixel_thresholds, ~(maps <= pixel_thresholds), self.from_zero)
        results = {"score_multiple": scores, "map_multiple": maps}
        if self.normalised:
            scores, maps = scale.to_unit(scores), scale.to_unit(maps)
        results |= {"pred_score": scores, "pred_label": scores > self.image_limit}
        results |= {"anomaly_map": maps, "pred_mask": maps > self.pixel_limit}
        return tuple(results[name] for name in self.outputs)


def _limit(name: str, sensitivity: float, normalised: bool) -> float:
    """Return the score above which something is anomalous with this sensitivity.

    Raises:
        ValueError: it is not between 0 and 1.
    """
    if not 0 < sensitivity < 1:
        raise ValueError(f"{name} is {sensitivity!r}; allowed: above 0 and below 1")
    return 1 - sensitivity if normalised else scale.to_multiple(1 - sensitivity)


# ------------------------------------------------------------------------------------------------ the file


class _Names(NamedTuple):
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@plain_torch()
@in_turn()
def write_onnx(
    detector: Detector,
    path: str | os.PathLike[str],
    *,
    input_name: str = "input",
    check: bool = True,
    **options: Any,
) -> Path:
    """Write the `InferenceGraph` of a model as an ONNX file, which takes batches of any number of images.

    What the file is for stands in its metadata, as JSON, under ``hgad_fast``: the model, its classes with their
    thresholds, sizes, versions, and how far the file was found from the model. Before the file is put in its place it
    is run by onnxruntime on drawn images, and compared with the model itself.

    Args:
        detector: a calibrated model; it stays as it is.
        path: the file; one that is there is replaced. Its folder is made. More than 1 GiB of weights are written beside
            it.
        input_name: the name of the input.
        check: whether the file is run and compared.
        options: those of `InferenceGraph`, of which `seen` is needed.

    Returns:
        the path.

    Raises:
        ValueError: the model is not calibrated, an argument does not fit, or the file differs from the model.
        ImportError: a package is missing; the message names the extra that brings it.
        OSError: the file cannot be written.
    """
    path = Path(path)
    require_packages("onnx", check)
    require_float32(detector)  # type: ignore[arg-type]
    detector = reference_model(detector)
    graph = InferenceGraph(detector, **options).eval()
    described = _described(detector, graph, input_name)
    written = len(graph.outputs)
    graph.compared = check
    with aside(path) as file:
        program = Program("onnx", _traced(graph), _Names((input_name,), graph.outputs))
        if check:
            program.save(file, text_of(described))
            described["check"] = _compared(detector, graph, runner("onnx", file))
            program.keep(written)
            for checked in file.parent.iterdir():
                checked.unlink()
        program.save(file, text_of(described))
        put(file, path)
    return path


def _traced(graph: InferenceGraph) -> Any:
    """Return the `torch.export.ExportedProgram` of a graph."""
    h, w = graph.resizing.seen
    axes = {0: any_batch()}
    if graph.resizing.input_size is None:
        axes |= {axis: torch.export.Dim(name, min=2, max=LARGEST_SIDE) for axis, name in ((2, "height"), (3, "width"))}
    # sizes of an example that differ from all others, lest they be taken for them
    example = torch.zeros(2, 3, *(graph.resizing.input_size or (2 * h + 3, 2 * w + 5)))
    return traced_for(graph, [example], (axes,))


def _described(detector: Detector, graph: InferenceGraph, input_name: str) -> dict[str, Any]:
    """Return what the metadata of a file say: the sidecar of the library's export, with the names of anomalib."""
    described = contract(detector, graph.scoring.plan, "onnx", "fp32", graph.scoring.groups)
    h, w = graph.resizing.seen
    height, width = graph.resizing.input_size or ("height", "width")
    shape = ["batch", 3, height, width]
    described |= {
        "format": FORMAT,
        "versions": described["versions"] | package_versions("anomalib"),
        "inputs": {input_name: {"shape": shape, "dtype": "float32", "channels": "RGB", "range": [0, 1]}},
        "resize": described["resize"] | {"note": "done in the graph: images go in at their own size"},
        "outputs": {
            name: {
                "shape": ["batch", *([1, h, w] if name in ("anomaly_map", "pred_mask") else [])],
                "dtype": OUTPUT_NOTES[name][0],
                "meaning": OUTPUT_NOTES[name][1],
            }
            for name in graph.outputs
        },
        "scale": SCALES[graph.from_zero] + (", and then x / (1 + x)" if graph.normalised else ""),
    }
    if graph.thresholded:
        described["limits"] = {"pred_label": graph.image_limit, "pred_mask": graph.pixel_limit}
    return described


def _compared(detector: Detector, graph: InferenceGraph, run: Run) -> dict[str, Any]:
    """Return how far what a file gives for drawn images is from what the model gives, as its metadata have it.

    Multiples of thresholds are compared, which say on which side of the threshold they are: those of images in units of
    themselves, or of the threshold where that is more, those of pixels in units of the largest of their map. The
    outputs follow from them, and are compared with what torch makes of the file's multiples.

    Raises:
        ValueError: they differ by more than the tolerance; it names the figures.
    """
    of_scores, of_maps = TOLERANCES["fp32"]
    differences: dict[str, list[Tensor]] = {"pred_score": [], "anomaly_map": []}
    for size in _drawn_sizes(graph):
        images = drawn_images(size, CHECKED_IMAGES)
        expected_scores, expected_maps = _expected(detector, graph, images)
        for i in [slice(0, 1), slice(1, 2), slice(0, CHECKED_IMAGES)]:
            outputs = dict(zip(graph.outputs, run([images[i]]), strict=True))
            scores, maps = (outputs[name] for name in _multiples(graph))
            of_image = (scores - expected_scores[i]).abs() / expected_scores[i].clamp(min=1)
            largest = expected_maps[i].amax((1, 2, 3), keepdim=True).clamp(min=1)
            differences["pred_score"].append(of_image.max())
            differences["anomaly_map"].append(((maps - expected_maps[i]).abs() / largest).max())
            if not _follow(graph, outputs):
                raise ValueError(
                    "pred_score, pred_label, anomaly_map or pred_mask of the file are not on its scale. It was not "
                    "written; report this, or write it all the same: check=False"
                )
    worst = {name: float(torch.stack(each).max()) for name, each in differences.items()}  # NaN, if one is
    allowed = {"pred_score": of_scores, "anomaly_map": of_maps}
    if wrong := [name for name, value in worst.items() if not value <= allowed[name]]:
        figures = "; ".join(f"{name} by {worst[name]:.2g} (allowed: {allowed[name]:.2g})" for name in wrong)
        raise ValueError(
            f"what the file gives for drawn images differs from what the model gives: {figures} of the threshold or "
            "of themselves. It was not written; report this, or write it all the same: check=False"
        )
    runtime = f"onnxruntime {package_versions('onnxruntime')['onnxruntime']}"
    return {name: float(f"{value:.2g}") for name, value in worst.items()} | {"tolerance": allowed, "runtime": runtime}


def _drawn_sizes(graph: InferenceGraph) -> Sequence[tuple[int, int]]:
    """Return sizes of images that the graph takes: one, or that which is seen and a larger one."""
    if graph.resizing.input_size is not None:
        return [graph.resizing.input_size]
    h, w = graph.resizing.seen
    return [(h, w), (3 * h // 2, 2 * w) if graph.resizing.any_proportions else (2 * h, 2 * w)]


def _expected(detector: Detector, graph: InferenceGraph, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the model gives for images: scores (B,) and maps (B, 1, h, w), in multiples of thresholds."""
    seen = torch.stack([preprocess(image, graph.config) for image in images])
    plan = graph.scoring.plan
    result = score_images(detector, seen, map_size=graph.resizing.seen, img_size=plan.img_size)
    assert isinstance(result.anomaly_map, Tensor)
    maps, thresholds = result.anomaly_map[:, None], result.threshold[:, None, None, None]
    scores = scale.multiples(result.image_score, result.threshold, result.is_anomalous, graph.from_zero)
    return scores, scale.multiples(maps, thresholds, maps > thresholds, graph.from_zero)


def _multiples(graph: InferenceGraph) -> tuple[str, ...]:
    """Return the names of the outputs that are scores and maps in multiples of thresholds."""
    return CHECKED if graph.normalised else ("pred_score", "anomaly_map")


def _follow(graph: InferenceGraph, outputs: dict[str, Tensor]) -> bool:
    """Return whether the outputs of a file follow from its multiples of thresholds, to rounding."""
    rounding = 4 * torch.finfo(torch.float32).eps
    of_scores, of_maps = (outputs[name] for name in _multiples(graph))
    for value, verdict, multiples, limit in (
        ("pred_score", "pred_label", of_scores, graph.image_limit),
        ("anomaly_map", "pred_mask", of_maps, graph.pixel_limit),
    ):
        expected = scale.to_unit(multiples) if graph.normalised else multiples
        if not ((outputs[value] - expected).abs() <= rounding * expected).all():
            return False
        if graph.thresholded and not torch.equal(outputs[verdict], outputs[value] > limit):
            return False
    return True
