"""Anomaly maps and scores of images, or of their feature maps.

The score of an image depends on that image alone: backbone and densities are computed for one image at a time, large
maps in chunks of a fixed number of rows, so that on a CPU it has the same bits whatever the other images are.
``throughput=True`` batches images instead, and agrees to 1e-5.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..data.listing import images_to_score
from ..environment import plain_torch, require_float32
from ..features.backbone import ALWAYS_WHOLE, TILES, Backbone
from ..features.preprocess import (
    batch_features,
    feature_maps,
    may_cut,
    memory_bytes,
    preprocess,
    seeing,
    seen_shape,
    working_set,
)
from ..files import printable
from ..protocol import Densities, Detector, OfficialMaps, Settings
from ..terminal import warn_user
from .calibration import numbers, required_calibration
from .densities import densities, naming
from .inputs import as_images, check_normalization, checked_features, checked_group_ids, checked_map_size
from .maps import cells_on_map, lay, resample, resampled_fill
from .result import ScoreResult, judged


@plain_torch()
@torch.no_grad()
def score_features(
    model: Detector,
    features: Sequence[Tensor],
    class_ids: Any = None,
    normalization: str = "calibrated",
    map_size: int | tuple[int, int] | None = None,
    *,
    throughput: bool = False,
) -> ScoreResult:
    """Return the anomaly maps and scores of feature maps.

    Args:
        model: the detector.
        features: one (B, C, h, w) tensor per level, as the encoder gives them.
        class_ids: class of each image (B,), one for all, or None: inferred (by HGAD as the class with the largest sum
            over the levels of the mean log-density over the pixels, divided by C).
        normalization: ``"calibrated"``: constants of the model, so that a score depends on its image alone.
            ``"official"``: the published procedure (`Detector.official_maps`), by HGAD with maxima over the images
            passed (pass one class at a time); its scores have no threshold and no p-value.
        map_size: height and width of the returned maps; default: those that scores are computed on, with `msk_size` as
            the short side and the proportions of the feature map, or with ``"official"`` `msk_size` for both.
        throughput: let images share batches.

    Raises:
        ValueError: features or class ids do not fit the model, or a model that has to be calibrated is not.
    """
    check_normalization(model, normalization)
    require_float32(cast(nn.Module, model))
    size = checked_map_size(map_size)
    features = checked_features(model, features)
    ids = checked_group_ids(model, class_ids, len(features[0]))
    return score_prepared(model, model.prepare(features), ids, normalization, size, throughput=throughput)


@plain_torch()
@torch.no_grad()
def score_prepared(
    model: Detector,
    features: list[Tensor],
    group_ids: Tensor | None = None,
    normalization: str = "calibrated",
    map_size: tuple[int, int] | None = None,
    *,
    throughput: bool = False,
) -> ScoreResult:
    """Return what `score_features` does, of features that are prepared (`Detector.prepare`), as they are kept.

    Args:
        model: the detector.
        features: one (B, C, h, w) tensor per level, on the model's device.
        group_ids: (B,) int64 on the CPU; None: inferred.
        normalization, throughput: see `score_features`.
        map_size: (H, W) of the returned maps; default: those that scores are computed on.
    """
    batches = densities(model, features, group_ids, throughput)
    if normalization == "official":
        published = first_official(model, batches)
        maps, scores = published.maps, _published_scores(published, batches)
    else:
        calibration = required_calibration(model)
        scored = [calibration.maps(batch, model.config.msk_size) for batch in batches]
        maps, scores = (torch.cat(tensors) for tensors in zip(*scored, strict=True))
    group_ids = torch.cat([batch.group_ids for batch in batches])
    result = judged(model, scores, group_ids, normalization)
    result.anomaly_map = resample(maps, map_size)
    result.logps = [torch.cat(level) for level in zip(*(batch.logps for batch in batches), strict=True)]
    result.neg_entropy = [torch.cat(level) for level in zip(*(batch.neg_entropy for batch in batches), strict=True)]
    return result


@plain_torch()
@torch.no_grad()
def score_images(
    model: Detector,
    images: Any,
    class_ids: Any = None,
    *,
    normalization: str = "calibrated",
    map_size: int | tuple[int, int] | str | None = None,
    throughput: bool = False,
    img_size: int | str | None = None,
    max_memory: int | str | None = None,
    tiles: str = "auto",
    map_path: str | os.PathLike[str] | None = None,
) -> ScoreResult:
    """Return the anomaly maps and scores of images, each map in the coordinates of its image.

    Args:
        model: the detector.
        images: in RGB: tensor (B, 3, H, W) or (3, H, W), floats in [0, 1]; array (B, H, W, 3), (H, W, 3) or (H, W),
            unsigned integers of their type's full range or floats in [0, 1]; a PIL image; a path, or a folder of
            images; or a sequence of those. OpenCV's frames are BGR, and would be scored as other images without a
            word: ``frame = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)`` first. All images are held in memory, and so are
            the maps: score the images of a large folder one by one.
        class_ids: an id or name, one for each image, or None: inferred.
        normalization: see `score_features`.
        map_size: height and width of the returned maps; default: each image's own. ``"seen"``: the maps that the scores
            are computed on, of what the model sees of an image; `laid` can lay them over their images later.
        throughput: let images of one size share batches of `config.batch_size`, or of as many as fit into
            `max_memory`; those that are cut into tiles go one by one.
        img_size: short side at which images are seen, or ``"native"``: as they are; default the model's. The map that
            scores are computed on grows with it: its short side is `config.msk_size` at the model's own size, and twice
            that at twice the size. Calibrate at the same size, or thresholds do not fit.
        max_memory: bytes, or e.g. ``"1.5GB"``, that scoring an image (or batch) may take beyond model, image and
            map; default `MAX_MEMORY`. An image that needs more is refused before anything is computed. It changes no
            bit of a result, unless it decides about `tiles`, or with `throughput` about the batches.
        tiles: whether the backbone cuts a large image into tiles. ``"auto"``: it does where the tiles give the features
            of the whole image; a network that pools over the whole image is given tiles, with a warning, only if the
            whole does not fit into `max_memory`. ``"always"``, ``"never"``: it does or does not, in any case.
        map_path: a file (.npy, float32) to write the map of a single image to; the map returned is that file, mapped
            into memory.

    With ``config.center_crop`` the map is 0 outside the square that the model sees. Where a method sees images as
    squares (``config.square``), the map is stretched back over the whole image.

    Raises:
        ValueError: there are no images, one cannot be read, has values outside [0, 1] or needs more than `max_memory`,
            or arguments do not fit.
    """
    check_normalization(model, normalization)
    require_float32(cast(nn.Module, model))
    size = map_size if map_size == "seen" else checked_map_size(map_size)
    limit = memory_bytes(max_memory)
    config, cells = seen_at(model, img_size)
    if tiles not in TILES:
        raise ValueError(f"tiles is {tiles!r}; allowed are {', '.join(map(repr, TILES))}")
    image_tensors = list(as_images(images, config.white_level))
    if not image_tensors:
        raise ValueError("there are no images to score")
    if map_path is not None and (len(image_tensors) > 1 or Path(map_path).suffix != ".npy"):
        raise ValueError(f"map_path is {os.fspath(map_path)!r}: pass one image, and a name that ends in .npy")
    ids = checked_group_ids(model, class_ids, len(image_tensors))
    sizes = [(image.shape[1], image.shape[2]) for image in image_tensors]
    name = functools.partial(_image_name, images, len(sizes))
    cut = {}
    for i, shape in enumerate(sizes):
        if shape not in cut:
            with naming(functools.partial(name, i)):
                cut[shape] = may_cut(model, config, shape, limit, tiles, ids is not None)
    batch_sizes = {
        shape: _batch_size(model, config, shape, limit, cut[shape], ids is not None) if throughput else 1
        for shape in set(sizes)
    }
    by_index: dict[int, Densities] = {}
    for indices in _same_size(sizes, batch_sizes):
        batch_ids, first = None if ids is None else ids[indices], indices[0]
        with naming(functools.partial(name, first)):
            if len(indices) > 1:
                features = batch_features(model, [image_tensors[i] for i in indices], config)
                batches = densities(model, features, batch_ids, throughput)
                by_index |= zip(indices, (image for batch in batches for image in batch.images()), strict=True)
            else:
                image_maps = feature_maps(model, preprocess(image_tensors[first], config), cut[sizes[first]])
                by_index[first] = model.densities(image_maps, batch_ids)
    image_densities = [by_index[i] for i in range(len(image_tensors))]
    if normalization == "official":
        published = first_official(model, image_densities)
        official_scores = _published_scores(published, image_densities)
        fills = [resampled_fill(*image) for image in zip(published.maps, official_scores, strict=True)]
    else:
        calibration = required_calibration(model)
        fills = [calibration.fill(image, config.msk_size, cells) for image in image_densities]
    laid_maps = [lay(fill, shape, config, size, map_path) for fill, shape in zip(fills, sizes, strict=True)]
    scores = torch.stack([fill.score for fill in fills])
    group_ids = torch.cat([image.group_ids for image in image_densities])
    result = judged(model, scores, group_ids, normalization, lambda i: name(i) or "the image").cpu()
    same_size = len({laid_map.shape for laid_map in laid_maps}) == 1
    if len(laid_maps) == 1:
        result.anomaly_map = laid_maps[0][None]  # a map in a file stays there
    else:
        result.anomaly_map = torch.stack(laid_maps) if same_size else laid_maps
    result.sizes = sizes
    return result


def _image_name(images: Any, count: int, i: int) -> str:
    """Return what errors call image `i` of `count`: its file, or its number; empty for one image that is no file."""
    if isinstance(images, (str, os.PathLike)):
        path = Path(images)
        return printable(images_to_score([path])[0][i] if path.is_dir() else path)
    if isinstance(images, Sequence) and len(images) == count and isinstance(images[i], (str, os.PathLike)):
        return printable(images[i])
    return f"image {i}" if count > 1 else ""


def _published_scores(published: OfficialMaps, batches: Sequence[Densities]) -> Tensor:
    """Return the scores (n,) of published maps, NaN where a map holds what is no number.

    Where densities do, the maxima that all maps are normalised by do, too: then it is NaN for those images alone.
    """
    ones = torch.cat([numbers(torch.ones(len(batch.group_ids)), batch) for batch in batches])
    if ones.isnan().any():
        return ones
    return published.scores.where(published.maps.isfinite().flatten(1).all(1), math.nan)


def first_official(model: Detector, batches: Sequence[Densities]) -> OfficialMaps:
    """Return the maps and scores of the first of a method's published procedures."""
    return next(iter(model.official_maps(batches).values()))


def seen_at(model: Detector, img_size: int | str | None) -> tuple[Settings, int | None]:
    """Return the configuration with another `img_size`, and its `cells_on_map`.

    It warns of a model that is calibrated at another size.
    """
    config, calibration = seeing(model, img_size).config, model.calibration
    if calibration is not None and calibration.img_size not in (None, config.img_size):
        warn_user(
            f"images are seen at img_size = {config.img_size}, the model is calibrated at {calibration.img_size}: "
            "scores are comparable with each other, thresholds and p-values mean little; "
            f"model.calibrate(normal images, img_size={config.img_size!r}), or hgad-fast calibrate, makes new ones"
        )
    return config, cells_on_map(model, config.img_size)


def _batch_size(
    model: Detector, config: Settings, shape: tuple[int, int], limit: int, cut: bool, group_known: bool
) -> int:
    """Return the number of images of (H, W) pixels that share a batch; 1 where they may be `cut` into tiles.

    Otherwise it is as many as fit into `limit`: the working set of a batch is at most the sum of its images' own.
    """
    if not isinstance(model.encoder, Backbone):
        return config.batch_size
    if cut and math.prod(seen_shape(shape, config)) > ALWAYS_WHOLE:
        return 1
    needed = working_set(model, config, shape, cut=False, group_known=group_known)
    return max(1, min(config.batch_size, limit // needed))


def _same_size(sizes: list[tuple[int, int]], batch_sizes: dict[tuple[int, int], int]) -> Iterator[list[int]]:
    """Yield the indices of images of one size that share a batch; `batch_sizes` holds how many, for each size."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for i, size in enumerate(sizes):
        by_size.setdefault(size, []).append(i)
    for size, indices in by_size.items():
        batch_size = batch_sizes[size]
        for start in range(0, len(indices), batch_size):
            yield indices[start : start + batch_size]
