"""Writes a model's scoring as a file that runs without this library: ONNX, or a program of `torch.export`."""

from __future__ import annotations

import errno
import os
import re
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..environment import package_versions, plain_torch, require_float32
from ..features.backbone import Backbone
from ..features.graph import image_graph
from ..features.preprocess import preprocess, seeing
from ..files import printable, replacing
from ..protocol import Detector, ProportionsError
from ..scoring.calibration import required_calibration
from ..scoring.inputs import as_images, check_normalization, checked_group_ids, checked_map_size
from ..scoring.rates import listed
from ..terminal import warn_user
from .check import compared, drawn_features, drawn_images, reference_model
from .contract import contract, text_of
from .formats import Program, halved, require_packages, runner, traced
from .graph import OUTPUTS, Plan, ScoringGraph

SUFFIXES = {".onnx": "onnx", ".pt2": "torch"}
PRECISIONS = ("fp32", "fp16")


_EXPORTING = threading.Lock()


@contextmanager
def in_turn() -> Iterator[None]:
    """Let exports of several threads wait for each other: what torch patches to trace a program is the process's."""
    with _EXPORTING:
        yield


@plain_torch()
@in_turn()
def export(
    model: Detector,
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    size: int | Sequence[Any] | None = None,
    inputs: str | None = None,
    outputs: Sequence[str] = OUTPUTS,
    class_id: int | str | None = None,
    class_input: bool = False,
    map_size: int | tuple[int, int] | str | None = None,
    precision: str = "fp32",
    check: bool = True,
    check_images: Any = None,
) -> Path:
    """Write scoring as a graph of fixed size, and beside it, as ``<path>.json``, the sidecar that says how to use it.

    The graph takes images as the model sees them, already resized, and gives for each the anomaly map, score, class,
    p-value, threshold and verdict of `score`, to rounding (`graph.ScoringGraph`). It consists of plain operations and
    takes batches of any number of images. It computes in float32, whatever the model's `precision`. Thresholds are
    those of the model's calibration, at its `false_alarm_rate` and its `img_size`.

    Before the file is put in its place it is run, and compared with the model.

    Exports of several threads take turns. No other thread should run any module of torch meanwhile: to trace a program,
    torch patches modules for all threads.

    Args:
        model: a calibrated model; it stays as it is.
        path: the file; a file that is there is replaced.
        format: ``"onnx"`` or ``"torch"`` (a program of `torch.export`); None: by the name, .onnx or .pt2.
        size: height and width of the images as the model sees them, or one number for both; default: a square of the
            short side at which it sees them. Without a backbone of the library: (h, w) of the features of each level.
        inputs: ``"image"``, or ``"features"``, one for each level, of a backbone of the user's own; default: images,
            if the model has an encoder.
        outputs: some of `graph.OUTPUTS`, in the order that they are to have.
        class_id: id or name of the class of all images, for a camera that shows one product: nothing of other classes
            is in the file that does not count for this one. None: inferred for each image.
        class_input: whether there is one input more, ``given_class`` (B,) int64, the class of each image, or a
            negative number: inferred. A class whose images have other proportions than those that go in has an
            infinite score.
        map_size: height and width of the anomaly map, or one number for both; default: those of the image that goes in.
            ``"seen"``: those of the grid that scores are computed on, which is the default with features as inputs.
        precision: of the weights in the file: ``"fp32"``, or ``"fp16"``, in half the size. Arithmetic is float32.
        check: whether the file is run and compared.
        check_images: images to compare on, in any form that `score` takes, seen at `size`; default: drawn ones.

    Returns:
        the path.

    Raises:
        ValueError: the model is not calibrated, an argument does not fit, or the file differs from the model.
        ImportError: a package is missing; the message names the extra that brings it.
        OSError: the file cannot be written.
    """
    path = Path(path)
    kind = _kind(path, format)
    check_normalization(model, "calibrated")
    require_float32(model)  # type: ignore[arg-type]
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; allowed are {', '.join(PRECISIONS)}")
    if check_images is not None and not check:
        raise ValueError("check_images are given, and check=False (--no-check) compares nothing: leave one of them out")
    require_packages(kind, check)
    reference = reference_model(model)
    plan, encoder = planned(reference, size, inputs, outputs, class_id, class_input, map_size)
    graph = _graph(reference, plan, encoder)
    described = replace(plan, map_size=plan.map_size or graph.grid)
    examples = _examples(reference, plan, check_images if check else None)
    if precision == "fp16":  # but not what scores are compared with
        for part in filter(None, (graph.encoder, graph.densities)):
            halved(part)
    # A torch program keeps its example, and is compiled for its strides: no image of the user's, and no view.
    example = [torch.zeros(2, *x.shape[1:]) for x in examples]
    example += [torch.zeros(2, dtype=torch.int64)] * class_input
    with aside(path) as file:
        program = Program(kind, traced(graph, plan, example), plan)
        sidecar = contract(model, described, kind, precision, graph.groups)
        if check:
            program.save(file, text_of(sidecar))
            figures = compared(reference, described, graph.groups, runner(kind, file), examples, precision)
            runtime = "onnxruntime" if kind == "onnx" else "torch"
            figures["runtime"] = f"{runtime} {package_versions(runtime)[runtime]}"
            sidecar["check"] = figures
            for checked in file.parent.iterdir():  # the program stays, and gets a sidecar with these figures
                checked.unlink()
        program.save(file, text_of(sidecar))
        put(file, path, text_of(sidecar))
    return path


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Yield the path of a file of this name in a temporary folder beside it, in which it is written to be `put`.

    An OSError inside the block names the file that was to be written, and no temporary one, or none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name[:20]}-", dir=path.parent) as folder:
            yield Path(folder, path.name)
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error


def _kind(path: Path, format: str | None) -> str:
    """Return the format of a file.

    Raises:
        ValueError: there is no such format, or the name does not say which, or it is a folder.
    """
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "no file, but a pipe, a socket or a device"
        raise ValueError(f"{printable(path)} is {what}: give the name of a file, such as model.onnx")
    if format is None:
        format = SUFFIXES.get(path.suffix.lower())
        if format is None:
            raise ValueError(
                f"{printable(path)} says no format: let it end in .onnx or .pt2, or pass format='onnx' or 'torch'"
            )
    if format not in SUFFIXES.values():
        raise ValueError(f"format is {format!r}; allowed are {', '.join(SUFFIXES.values())}")
    if SUFFIXES.get(path.suffix.lower(), format) != format:
        raise ValueError(f"format is {format!r}, and {printable(path)} ends in {path.suffix}: change one of them")
    return format


def planned(
    model: Detector,
    size: int | Sequence[Any] | None = None,
    inputs: str | None = None,
    outputs: Sequence[str] = OUTPUTS,
    class_id: int | str | None = None,
    class_input: bool = False,
    map_size: int | tuple[int, int] | str | None = None,
) -> tuple[Plan, nn.Module | None]:
    """Return the plan of a graph, and the encoder as it will be in it.

    Args:
        model: a calibrated model, on the CPU and in float32.
        size, inputs, outputs, class_id, class_input, map_size: see `export`.

    Raises:
        ValueError: an argument does not fit the model.
    """
    outputs = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    if not outputs or len(set(outputs)) < len(outputs) or not set(outputs) <= set(OUTPUTS):
        raise ValueError(f"outputs is {outputs!r}; allowed are some of {', '.join(OUTPUTS)}, each once")
    if class_id is not None and class_input:
        raise ValueError("class_id is given for all images, and class_input lets each have its own: choose one of them")
    if inputs not in (None, "image", "features"):
        raise ValueError(f"inputs is {inputs!r}; allowed are 'image' and 'features'")
    if inputs == "image":
        model.require_encoder()
    group_ids = checked_group_ids(model, class_id, 1)
    group = None if group_ids is None else int(group_ids)
    calibrated_at = required_calibration(model).img_size
    img_size = model.config.img_size if calibrated_at is None else calibrated_at
    takes_images = model.encoder is not None and inputs != "features"
    encoder = None
    seen: tuple[int, int] | None = None
    if takes_images:
        seen = _seen_size(model, size, img_size)
        encoder = image_graph(model.require_encoder(), seen).eval()
        with torch.no_grad():
            sizes = tuple((x.shape[2], x.shape[3]) for x in encoder(torch.zeros(1, 3, *seen)))
    elif isinstance(model.encoder, Backbone):
        passes = model.encoder.passes(*_seen_size(model, size, img_size), cut=False)
        sizes = tuple(level for image_pass in passes for level in image_pass.levels)
    else:
        sizes = _level_sizes(model, size)
    map_shape = None if map_size == "seen" else checked_map_size(map_size)
    if map_size is None and takes_images:
        map_shape = seen
    plan = Plan(sizes, seen, img_size, outputs, group, class_input, map_shape)
    return plan, encoder


def _graph(model: Detector, plan: Plan, encoder: nn.Module | None) -> ScoringGraph:
    """Return the graph of a plan, and warn of classes whose images have other proportions than those that go in.

    Raises:
        ValueError: the method has no graph, or no class has these proportions.
    """
    try:
        graph = ScoringGraph(model, plan, encoder).eval()
    except ProportionsError as error:
        raise ProportionsError(
            f"{error}; or give the size at which the model sees them: size=(height, width) (--size HxW)"
        ) from error
    if plan.group is None and len(graph.groups) < len(model.groups):
        others = [name for k, name in enumerate(model.groups) if k not in graph.groups]
        warn_user(
            f"the file knows nothing of {listed(others)}, whose images have other proportions than those that go in, "
            f"{plan.size or plan.sizes[0]}: export another file for them, with their size (--size HxW)"
        )
    return graph


def _seen_size(model: Detector, size: int | Sequence[Any] | None, img_size: int | str) -> tuple[int, int]:
    """Return the height and width at which images are seen.

    Raises:
        ValueError: they are not said, or not those at which the model is calibrated.
    """
    config = model.config
    if size is None:
        if isinstance(img_size, str):
            raise ValueError("the model sees images at their own sizes: say which by size=(height, width) (--size HxW)")
        return img_size, img_size
    height, width = checked_map_size(size, "size") or (0, 0)
    if (config.center_crop or config.square) and height != width:
        raise ValueError(f"size is {height} x {width}, and the model sees squares: give one number")
    if not isinstance(img_size, str) and min(height, width) != img_size:
        raise ValueError(
            f"size is {height} x {width}, and the model is calibrated for images with a short side of {img_size} "
            "pixels; thresholds would not fit. Give a size with that short side, or calibrate the model at another "
            f"(model.calibrate(..., img_size={min(height, width)}), hgad-fast calibrate --img-size)"
        )
    return height, width


def _level_sizes(model: Detector, size: Any) -> tuple[tuple[int, int], ...]:
    """Return the (h, w) of the features of each level, of a model whose features the user brings.

    Raises:
        ValueError: they are not given, one pair for each level.
    """
    count = len(model.feature_dims)
    pairs = isinstance(size, Sequence) and all(isinstance(each, Sequence) and len(each) == 2 for each in size)
    if not pairs or len(size) != count:
        raise ValueError(
            f"size is {size!r}: features go in whose sizes only you know; pass the height and width of each of the "
            f"{count} levels, size=[(h, w), ...] (--size HxW,HxW,...)"
        )
    return tuple(checked_map_size(each, "size") or (0, 0) for each in size)


def _examples(model: Detector, plan: Plan, check_images: Any) -> list[Tensor]:
    """Return images (n, 3, H, W), or the features of n images, to trace and to compare with.

    Raises:
        ValueError: images are seen at another size than that of the plan, or there are none.
    """
    if check_images is None:
        return drawn_features(model, plan) if plan.size is None else [drawn_images(plan.size)]
    config = seeing(model, plan.img_size).config
    images = [preprocess(image, config) for image in as_images(check_images, config.white_level)]
    fitting = [image for image in images if plan.size is None or tuple(image.shape[1:]) == plan.size]
    if not fitting:
        raise ValueError(f"no image of check_images (--check-images) is seen at the size of the file, {plan.size}")
    if len(fitting) < len(images):
        warn_user(f"{len(images) - len(fitting)} of {len(images)} images to check are seen at other sizes: left out")
    stacked = torch.stack(fitting)
    if plan.size is not None:
        return [stacked]
    encoder: Any = model.require_encoder()
    with torch.no_grad():
        features = [encoder(encoder.normalize(image[None])) for image in stacked]
    return [torch.cat(levels) for levels in zip(*features, strict=True)]


def put(file: Path, path: Path, sidecar: str | None = None) -> None:
    """Put a file, its sidecar, and weights beside it in their places, whole; earlier weights of this name go.

    Args:
        file: of `aside`.
        path: where it is to be.
        sidecar: the text of its sidecar; None: it has none.
    """
    weights = [each.name for each in file.parent.iterdir() if each != file]
    for name in weights:
        os.replace(file.with_name(name), path.with_name(name))
    if sidecar is not None:
        with replacing(path.with_name(f"{path.name}.json")) as temporary:
            temporary.write_text(sidecar, encoding="ascii")
    with file.open("rb+") as written:
        os.fsync(written.fileno())
    os.replace(file, path)
    of_this_name = re.compile(rf"{re.escape(path.name)}\.[0-9a-f]{{8}}\.data")
    for other in path.parent.iterdir():
        if of_this_name.fullmatch(other.name) and other.name not in weights:
            other.unlink()
