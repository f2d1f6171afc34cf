"""What anomalib's export of a model asks for, as `graph.write_onnx` takes it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..data.images import ImageError, read_header
from ..export.contract import OPSET
from ..features.preprocess import Seeing, seen_shape
from .processing import ThresholdPostProcessor


def export_options(
    config: Seeing,
    post_processor: Any,
    seen_size: tuple[int, int] | None,
    input_size: tuple[int, int] | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Return the arguments of `graph.write_onnx`.

    Args:
        config: of the model.
        post_processor: gives the scale of the outputs; None: multiples of thresholds.
        seen_size: (h, w) at which the training images are seen, if they have one in common.
        input_size: H and W of the images that go in; None: any.
        options: those of `torch.onnx.export` that the user gave.

    Raises:
        ValueError: an argument does not fit.
    """
    names = options.get("input_names", ("input",))
    if isinstance(names, str) or len(names) != 1:
        raise ValueError(f"input_names is {names!r}; pass one name in a list, such as ['input']")
    if options.get("opset_version", OPSET) != OPSET:
        raise ValueError(f"opset_version is {options['opset_version']}: the graph is in opset {OPSET}; leave it out")
    if unknown := [name for name in options if name not in ("input_names", "opset_version", "check")]:
        raise ValueError(f"{', '.join(unknown)}: no such argument; allowed are input_names and check")
    return {
        "seen": _seen_by_graph(config, seen_size, input_size),
        "input_size": input_size,
        "input_name": names[0],
        "check": options.get("check", True),
        **_scale_of(post_processor),
    }


def _seen_by_graph(
    config: Seeing, seen_size: tuple[int, int] | None, input_size: tuple[int, int] | None
) -> tuple[int, int]:
    """Return the (h, w) at which a graph of fixed size sees images.

    Raises:
        ValueError: the training images have several, and nothing says which of them it is to be.
    """
    if input_size is not None:
        return seen_shape(input_size, config)
    if seen_size is not None:
        return seen_size
    if isinstance(config.img_size, str) or not (config.square or config.center_crop):
        raise ValueError(
            "input_size is None, and the training images are seen at several sizes, or none is known: give "
            "input_size=(height, width) of the images that will go in (--input_size), and export a file for each "
            "proportion"
        )
    return config.img_size, config.img_size


def _scale_of(post_processor: Any) -> dict[str, Any]:
    """Return the scale of a post-processor."""
    if post_processor is None:
        return {"normalised": False, "thresholded": False}
    if not isinstance(post_processor, ThresholdPostProcessor):
        raise ValueError(
            f"the post-processor is a {type(post_processor).__name__}, which the graph does not know: export with a "
            "ThresholdPostProcessor, or without one (post_processor=False)"
        )
    return {
        "image_sensitivity": post_processor.image_sensitivity,
        "pixel_sensitivity": post_processor.pixel_sensitivity,
        "normalised": post_processor.enable_normalization,
        "thresholded": post_processor.enable_thresholding,
    }


def common_size(paths: Iterable[str], config: Any) -> tuple[int, int] | None:
    """Return the (h, w) at which images are seen, by the headers of their files; None where they differ."""
    try:
        sizes = {seen_shape(read_header(path)[:2], config) for path in paths}
    except ImageError:
        return None
    return sizes.pop() if len(sizes) == 1 else None
