"""From feature maps to densities, anomaly maps and image scores.

A score depends on its image alone: on a CPU every image goes through backbone and flow by itself, large maps in chunks
of a fixed number of rows, so that it has the same bits in any company. ``throughput=True`` batches images instead, and
agrees to 1e-5.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import operator
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import data
from .backbone import ALWAYS_WHOLE, TILES, Backbone, FeatureMaps
from .files import byte_count, readable, replacing
from .interpolate import Between, between, bilinear
from .ops import SeparablePosition

if TYPE_CHECKING:
    from .config import HGADConfig
    from .model import HGADModel

CHUNK_PIXELS = 8192  # feature pixels that go through the flow together
BAND_PIXELS = 2**20  # of a map that are computed together
MAX_KEPT = 2**28  # bytes of densities that are kept until the class is known; beyond, the pixels are scored twice
BLUR_SIGMA = 4.0  # of the anomaly map, in pixels of the msk_size map (official)
MAX_MEMORY = 4 * 10**9  # bytes that scoring a picture may take where nothing is said of it


@dataclass
class ScoreResult:
    """What is known of B images: of `score_features` on the model's device, of `score_images` on the CPU.

    Attributes:
        anomaly_map: (B, h, w) float32, higher is more anomalous; a list of (h, w) where pictures differ in size.
        image_score: (B,) maximum of the map at `msk_size`.
        class_id: (B,) int64, given or inferred.
        p_value: (B,) float64, conformal p-value: the share of normal pictures, this one among them, that score at least
            as high, never below 1 / (n + 1) for n calibration pictures; NaN without any.
        is_anomalous: (B,) bool, image_score above `threshold`, which is p_value at most `false_alarm_rate`; False where
            there is no threshold.
        threshold: (B,) float64, image score above which an image (and map value above which a pixel) counts as
            anomalous; NaN without calibration pictures.
        false_alarm_rate: (B,) the rate that the threshold stands for: the wished one, or the lowest that the number of
            calibration pictures allows.
        logps: per level (B, h, w), log-density of the image's class divided by C, in nats per channel.
        neg_entropy: per level (B, h, w), negative entropy of the class posterior, in nats.
        sizes: (H, W) of each picture.
    """

    anomaly_map: Tensor | list[Tensor]
    image_score: Tensor
    class_id: Tensor
    p_value: Tensor
    is_anomalous: Tensor
    threshold: Tensor
    false_alarm_rate: Tensor
    logps: list[Tensor] | None = None
    neg_entropy: list[Tensor] | None = None
    sizes: list[tuple[int, int]] | None = None


@dataclass
class Densities:
    """Per level, (B, h, w) each: log-density of the image's class over C, and negative entropy. `class_id` is (B,)."""

    logps: list[Tensor]
    neg_entropy: list[Tensor]
    class_id: Tensor
    n_classes: int  # of the model; with one there is no entropy, and the likelihood alone makes the map

    def images(self) -> Iterator[Densities]:
        """Each image by itself."""
        for i in range(len(self.class_id)):
            logps, neg_entropy = ([x[i : i + 1] for x in levels] for levels in (self.logps, self.neg_entropy))
            yield Densities(logps, neg_entropy, self.class_id[i : i + 1], self.n_classes)


# ------------------------------------------------------------------------------------------------ features -> result


@torch.no_grad()
def score_features(
    model: HGADModel,
    features: Sequence[Tensor],
    class_ids: Any = None,
    normalization: str = "calibrated",
    map_size: int | tuple[int, int] | None = None,
    *,
    throughput: bool = False,
) -> ScoreResult:
    """Score feature maps.

    Args:
        model: the detector.
        features: one (B, C, h, w) a level.
        class_ids: class of each image (B,), one for all, or None: each image takes the class with the largest sum over
            the levels of the mean log-density over the pixels, divided by C.
        normalization: ``"calibrated"``: constants of the model, so that a score depends on its image alone.
            ``"official"``: the published procedure, maxima over the images passed (pass one class at a time); its
            scores have no threshold and no p-value.
        map_size: height and width of the returned map, default the size that scores are computed on: short side
            `msk_size` in the proportions of the feature map, or `msk_size` squared with ``"official"``.
        throughput: let images share batches.

    Raises:
        ValueError: features or class ids do not fit the model, or it is not calibrated and would have to be.
    """
    check_normalization(model, normalization)
    size = checked_map_size(map_size)
    features = _check_features(model, features)
    ids = check_class_ids(model.config, class_ids, len(features[0]))
    parts = densities(model, features, ids, throughput)
    maps = _maps(model, parts, normalization)
    class_id = torch.cat([part.class_id for part in parts])
    result = _judged(model, torch.stack([m.max() for m in maps]), class_id, normalization)
    result.anomaly_map = resample(torch.stack(maps), size)
    result.logps = [torch.cat(level) for level in zip(*(part.logps for part in parts), strict=True)]
    result.neg_entropy = [torch.cat(level) for level in zip(*(part.neg_entropy for part in parts), strict=True)]
    return result


def _maps(model: HGADModel, parts: Sequence[Densities], normalization: str) -> list[Tensor]:
    """The map of each image at the size that scores are computed on."""
    if normalization == "official":
        return list(official_maps(parts, model.config.msk_size))
    calibration = model.calibration
    assert calibration is not None
    return [m for part in parts for m in calibration.maps(part, model.config.msk_size)]


def _judged(model: HGADModel, scores: Tensor, class_id: Tensor, normalization: str) -> ScoreResult:
    """What follows from image scores and classes (B,): all of a `ScoreResult` but the maps."""
    if normalization == "official":
        p_value, threshold, rate = torch.full((3, len(scores)), math.nan, dtype=torch.float64)
        is_anomalous = torch.zeros(len(scores), dtype=torch.bool)
    else:
        assert model.calibration is not None
        p_value, is_anomalous, threshold, rate = model.calibration.judge(scores, class_id)
    return ScoreResult(
        anomaly_map=[],
        image_score=scores,
        class_id=class_id.to(scores.device),
        p_value=p_value.to(scores.device),
        is_anomalous=is_anomalous.to(scores.device),
        threshold=threshold.to(scores.device),
        false_alarm_rate=rate.to(scores.device),
    )


def check_normalization(model: HGADModel, normalization: str) -> None:
    if normalization not in ("calibrated", "official"):
        raise ValueError(f"normalization is {normalization!r}; allowed are 'calibrated' and 'official'")
    if normalization == "calibrated" and model.calibration is None:
        raise ValueError(
            "the model has no normalisation constants: train it with fit, call calibrate(normal pictures), or score "
            "with normalization='official'"
        )


def checked_map_size(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    try:
        height, width = map(operator.index, size if isinstance(size, Sequence) else (size, size))
    except (TypeError, ValueError):
        height = width = 0
    if height < 1 or width < 1:
        raise ValueError(f"map_size is {size!r}; pass (height, width), or one whole number for both, from 1 pixel")
    return height, width


def _check_features(model: HGADModel, features: Sequence[Tensor]) -> list[Tensor]:
    dims = model.feat_dims
    if isinstance(features, Tensor) or len(features) != len(dims):
        raise ValueError(f"features must be a list of {len(dims)} tensors (B, C, h, w), one for each level")
    for level, (x, channels) in enumerate(zip(features, dims, strict=True)):
        if x.dim() != 4 or x.shape[1] != channels or x.shape[0] != features[0].shape[0] or x.numel() == 0:
            raise ValueError(
                f"features[{level}] has shape {tuple(x.shape)}; expected (B, {channels}, h, w), none of them 0, and "
                "the same B for every level"
            )
        if not x.isfinite().all():
            raise ValueError(f"features[{level}] holds a NaN or an infinity; find its origin")
    return [x.to(model.device, torch.float32) for x in features]


def check_class_ids(config: HGADConfig, class_ids: Any, batch: int) -> Tensor | None:
    """Class ids (B,) from an id, a name, or a sequence of either; None stays None.

    Raises:
        ValueError: an unknown class, or another number of them than images.
    """
    if class_ids is None:
        return None
    if hasattr(class_ids, "tolist"):  # an array or tensor, perhaps of no dimension
        class_ids = class_ids.tolist()
    if isinstance(class_ids, str) or not isinstance(class_ids, Iterable):
        class_ids = [class_ids] * batch
    ids = []
    for value in class_ids:
        try:
            ids.append(config.names.index(value) if isinstance(value, str) else range(config.n_classes).index(value))
        except ValueError as error:
            known = f"{', '.join(config.names)} (0 to {config.n_classes - 1})"
            raise ValueError(f"class {value!r} is unknown; the model knows {known}") from error
    if len(ids) != batch:
        raise ValueError(f"{len(ids)} class ids for {batch} images")
    return torch.tensor(ids, dtype=torch.int64)


@torch.no_grad()
def densities(
    model: HGADModel, features: Sequence[Tensor], class_ids: Tensor | None, throughput: bool = False
) -> list[Densities]:
    """Log-densities and entropies of every pixel of (B, C, h, w) features: an image a part, unless `throughput`.

    What is computed part by part has the same bits in any company; kernels for several images add in another order.
    """
    together = max(1, CHUNK_PIXELS // max(x[0, 0].numel() for x in features)) if throughput else 1
    return [
        _densities(
            model,
            FeatureMaps.of([x[i : i + together] for x in features]),
            None if class_ids is None else class_ids[i : i + together],
        )
        for i in range(0, len(features[0]), together)
    ]


def _densities(model: HGADModel, features: FeatureMaps, class_ids: Tensor | None) -> Densities:
    """Of the pixels of a batch; only z of one chunk, and what is said of the pixels, exist at any time."""
    batch, classes, sizes = features.batch, model.config.n_classes, features.sizes
    logps, neg_entropy = ([torch.empty(batch, *size, device=model.device) for size in sizes] for _ in range(2))
    per_class: list[Tensor] = []
    if class_ids is None:
        if kept_bytes(sizes, classes, batch) <= MAX_KEPT:
            per_class = [torch.empty(batch, *size, classes, device=model.device) for size in sizes]
        evidence = torch.zeros(batch, classes, dtype=torch.float64, device=model.device)
        for level, at, density, entropy in _chunks(model, features, None):
            density = density / model.feat_dims[level]
            evidence += density.sum((1, 2), dtype=torch.float64) / math.prod(sizes[level])
            neg_entropy[level][at] = -entropy
            if per_class:
                per_class[level][at] = density
        class_ids = evidence.argmax(1).cpu()
    if per_class:
        rows = torch.arange(batch)
        return Densities([every[rows, ..., class_ids] for every in per_class], neg_entropy, class_ids, classes)
    for level, at, density, entropy in _chunks(model, features, class_ids):
        logps[level][at] = density / model.feat_dims[level]
        neg_entropy[level][at] = -entropy
    return Densities(logps, neg_entropy, class_ids, classes)


def kept_bytes(sizes: Sequence[tuple[int, int]], classes: int, batch: int = 1) -> int:
    """Of the densities of every class, for maps of these sizes."""
    return 4 * batch * classes * sum(h * w for h, w in sizes)


def _chunks(
    model: HGADModel, features: FeatureMaps, class_ids: Tensor | None
) -> Iterator[tuple[int, tuple[slice, ...], Tensor, Tensor]]:
    """The level of a chunk of pixels, where it lies in the map, its log-densities (B, r, c), without `class_ids` of
    every class (B, r, c, K), and its entropies (B, r, c).

    All chunks of a piece have one size, rows of pixels padded with zeros: products of another size round differently.
    """
    for level, top, left, x in features.pieces():
        flow, mixture = model.nfs[level], model.mixture
        position = flow.grid(*features.sizes[level], model.device)  # of the whole map, whatever the pieces
        batch, channels, height, width = x.shape
        columns = min(width, max(64, CHUNK_PIXELS // batch))  # products of fewer rows waste time
        rows = min(height, max(1, CHUNK_PIXELS // (batch * columns)))
        rows = math.ceil(height / math.ceil(height / rows))  # as many chunks, but less padding
        for i, j in itertools.product(range(0, height, rows), range(0, width, columns)):
            chunk = x[:, :, i : i + rows, j : j + columns]
            r, c = chunk.shape[2:]
            pixels = F.pad(chunk, (0, columns - c, 0, rows - r)).permute(0, 2, 3, 1).reshape(-1, channels)
            z, log_det = flow(pixels, position and _window(position, top + i, left + j, rows, columns))
            if class_ids is None:
                scores = mixture.scores(z, log_det, level, per_class=True)
                density, entropy = scores.class_log_density, scores.entropy
                assert density is not None
            else:
                density, entropy = mixture.own_scores(z, log_det, level, class_ids.to(z.device))
            at = slice(None), slice(top + i, top + i + r), slice(left + j, left + j + c)
            shape = batch, rows, columns
            yield level, at, density.view(*shape, *density.shape[1:])[:, :r, :c], entropy.view(shape)[:, :r, :c]


def _window(position: SeparablePosition, top: int, left: int, rows: int, columns: int) -> SeparablePosition:
    """The positions of a part of a map; what lies over the map's ends is padding, its position any."""

    def part(code: Tensor, start: int, length: int) -> Tensor:
        found = code[start : start + length]
        return F.pad(found, (0, 0, 0, length - len(found)))

    return SeparablePosition(part(position.column, left, columns), part(position.row, top, rows))


# ------------------------------------------------------------------------------------------------ maps


def official_maps(parts: Sequence[Densities], msk_size: int) -> Tensor:
    """The published maps (sum of B, msk, msk): everything is normalised by maxima over all images of all parts.

    Images of one part share a size of feature map; the parts need not.
    """
    likelihood = _official_factor([part.logps for part in parts], msk_size)
    if parts[0].n_classes == 1:
        return likelihood
    return likelihood * _official_factor([part.neg_entropy for part in parts], msk_size)


def _official_factor(parts: list[list[Tensor]], msk_size: int) -> Tensor:
    """From one (B, h, w) a level of each part."""
    maxima = [max(float(level.max()) for level in levels) for levels in zip(*parts, strict=True)]
    size = (msk_size, msk_size)
    totals = []
    for part in parts:
        levels = [upsample(torch.exp(level - top), size) for level, top in zip(part, maxima, strict=True)]
        totals.append(torch.stack(levels).sum(0))
    total = torch.cat(totals)
    return blur(total.max() - total)


def calibrated_maps(
    found: Densities, level_max: Tensor, msk_size: int, weights: Tensor | None = None, cells: int | None = None
) -> Tensor:
    """Maps (B, h, w), of the size of `map_grid`, that depend on each image alone.

    Likelihood S - sum_l min(1, exp(l - m_l)) times entropy S - sum_l exp(-H_l), each blurred; m_l is the largest
    log-density that normal pictures of the class reach at level l. Differences from 1 are taken by expm1: a posterior
    that is almost certain leaves entropies far below the rounding of 1. With `weights` (K, 2) of each class, of
    likelihood and entropy, the map is their weighted sum instead.
    """
    size = map_grid(found, msk_size, cells)
    maps = found.logps[0].new_empty(len(found.class_id), *size)
    write_calibrated(maps, found, level_max, size, weights)
    return maps


def map_grid(found: Densities, msk_size: int, cells: int | None = None) -> tuple[int, int]:
    """Height and width of the map that scores are computed on, in the proportions of the feature map.

    Its short side is msk_size, or, given how many `cells` of the feature map lie on msk_size, grows with the feature
    map: the blur then covers as much of a picture seen larger as of one seen at the model's own size.
    """
    h, w = found.logps[0].shape[1:]
    scale = msk_size / (cells or min(h, w))
    return max(round(h * scale), 1), max(round(w * scale), 1)


def write_calibrated(
    out: Tensor, found: Densities, level_max: Tensor, grid: tuple[int, int], weights: Tensor | None = None
) -> Tensor:
    """Fill `out` (B, H, W) with the maps of `calibrated_maps` on a grid, resampled, in bands along their long side.

    Whatever the map's size, little memory is needed beyond `out`, which may be a file mapped into memory. Bands are
    computed with what the blur takes from their neighbours: a pixel has the same bits in any band.

    Returns:
        the largest value of each map before resampling, (B,).
    """
    constants = level_max.to(found.logps[0].device)[found.class_id, :, None, None]
    factors = [[-torch.expm1((x - constants[:, i]).clamp(max=0)) for i, x in enumerate(found.logps)]]
    if found.n_classes > 1:
        factors.append([-torch.expm1(x) for x in found.neg_entropy])
    if grid[0] < grid[1]:
        factors, out, grid = [[x.mT for x in levels] for levels in factors], out.mT, grid[::-1]
    rows, columns = _onto((out.shape[1], out.shape[2]), grid, constants.device)
    band_rows, out_rows = max(1, BAND_PIXELS // grid[1]), max(1, BAND_PIXELS // out.shape[2])
    maxima, done = out.new_full((len(out),), -math.inf), 0
    kept = out.new_empty(len(out), 0, grid[1], device=constants.device)
    for top in range(0, grid[0], band_rows):
        bottom = min(top + band_rows, grid[0])
        bands = [_band(levels, grid, top, bottom) for levels in factors]
        if weights is None or len(bands) == 1:
            band = math.prod(bands[1:], start=bands[0])
        else:
            likelihood, entropy = weights.to(constants.device)[found.class_id].T[..., None, None]
            band = likelihood * bands[0] + entropy * bands[1]
        maxima = torch.maximum(maxima, band.amax((1, 2)).to(maxima))
        if out.shape[1:] == grid:
            out[:, top:bottom] = band
            continue
        band, top = torch.cat([kept, band], 1), top - kept.shape[1]
        ready = int((rows.second < bottom).sum())
        for start in range(done, ready, out_rows):
            stop = min(start + out_rows, ready)
            out[:, start:stop] = bilinear(band, rows.part(start, stop, top), columns)
        kept, done = band[:, -1:], ready
    return maxima


def _onto(size: tuple[int, int], grid: tuple[int, int], device: torch.device) -> tuple[Between, Between]:
    """Rows and columns of a map on a grid that is resampled to another size, pixel centres at half-integers."""
    rows, columns = (
        between(torch.arange(n, device=device), of, n, align_corners=False) for n, of in zip(size, grid, strict=True)
    )
    return rows, columns


def _band(levels: list[Tensor], grid: tuple[int, int], top: int, bottom: int) -> Tensor:
    """Rows top to bottom of a grid to which the levels (B, h, w) are enlarged, summed and blurred."""
    device = levels[0].device
    rows, columns = _mirrored(top, bottom, grid[0]).to(device), _mirrored(0, grid[1], grid[1]).to(device)
    total = sum(
        bilinear(
            level,
            between(rows, level.shape[1], grid[0], align_corners=True),
            between(columns, level.shape[2], grid[1], align_corners=True),
        )
        for level in levels
    )
    assert isinstance(total, Tensor)
    return _smooth(total, BLUR_SIGMA)


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear with aligned corners, as official: (B, h, w) -> (B, *size)."""
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=True)[:, 0]


def resample(maps: Tensor, size: tuple[int, int] | None) -> Tensor:
    """A finished map at another size, pixel centres at half-integers: (B, h, w) -> (B, *size)."""
    if size is None or size == maps.shape[1:]:
        return maps
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def blur(maps: Tensor, sigma: float = BLUR_SIGMA) -> Tensor:
    """Gaussian blur of (B, h, w), cut at 4 sigma, edges mirrored: scipy.ndimage.gaussian_filter on any device."""
    rows, columns = (_mirrored(0, n, n, sigma).to(maps.device) for n in maps.shape[1:])
    return _smooth(maps[:, rows[:, None], columns], sigma)


def _mirrored(start: int, stop: int, n: int, sigma: float = BLUR_SIGMA) -> Tensor:
    """Positions of an axis of n that a blur of positions start to stop takes, mirrored at its ends."""
    radius = _radius(sigma)
    reach = torch.arange(start - radius, stop + radius) % (2 * n)
    return torch.where(reach < n, reach, 2 * n - 1 - reach)


def _smooth(maps: Tensor, sigma: float) -> Tensor:
    """Weighted sums over the neighbourhoods that lie whole in (B, h, w); their order is the same in any part."""
    radius = _radius(sigma)
    kernel = torch.exp(-0.5 * (torch.arange(radius + 1, dtype=torch.float64) / sigma) ** 2)
    centre, *sides = (kernel / (2 * kernel.sum() - 1)).tolist()
    for axis in (1, 2):
        n = maps.shape[axis] - 2 * radius
        smooth = centre * maps.narrow(axis, radius, n)
        for distance, weight in enumerate(sides, 1):
            pair = maps.narrow(axis, radius - distance, n) + maps.narrow(axis, radius + distance, n)
            smooth.add_(pair, alpha=weight)
        maps = smooth
    return maps


def _radius(sigma: float) -> int:
    return int(4 * sigma + 0.5)


# ------------------------------------------------------------------------------------------------ pictures -> result


@torch.no_grad()
def score_images(
    model: HGADModel,
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
    """Score pictures; maps come back in each picture's own coordinates.

    Args:
        model: the detector.
        images: tensor (B, 3, H, W) or (3, H, W), floats in [0, 1]; array (B, H, W, 3), (H, W, 3) or (H, W), unsigned
            integers of their type's full range or floats in [0, 1]; a PIL image; a path, or a folder of pictures; or a
            sequence of those. All are held in memory, and so are the maps: score the pictures of a large folder one by
            one.
        class_ids: an id or name, one for each picture, or None: inferred.
        normalization: see `score_features`.
        map_size: size of the returned maps; default: each picture's own. ``"seen"``: the maps whose maxima the scores
            are, as they were computed; `laid` lays one over its picture later.
        throughput: let pictures of one size share batches of `config.batch_size`, or of as many as fit into
            `max_memory`; those that are cut into tiles go one by one.
        img_size: short side at which pictures are seen, or ``"native"``: as they are; default the model's. The map that
            scores are computed on grows along: its short side is `config.msk_size` at the model's own size, and twice
            that at twice the size. Calibrate at the same size, or thresholds do not fit.
        max_memory: bytes, or e.g. ``"1.5GB"``, that scoring a picture (or batch) may take beyond model, picture and
            map; default `MAX_MEMORY`. A picture that needs more is refused before anything is computed. It changes no
            bit of a result, unless it decides about `tiles`, or with `throughput` about the batches.
        tiles: what the backbone does with a large picture. ``"auto"``: cuts it where the tiles give the features of the
            whole; a network that pools over the whole picture cuts where the whole does not fit into `max_memory`, and
            warns. ``"always"`` and ``"never"`` say it themselves.
        map_path: a file (.npy, float32) to write the map of a single picture to; the map returned is that file, mapped
            into memory.

    With ``config.center_crop`` the map is 0 outside the square that the model sees.

    Raises:
        ValueError: no pictures, one that cannot be read or needs more than `max_memory`, values outside [0, 1], or
            arguments that do not fit.
    """
    check_normalization(model, normalization)
    size = map_size if map_size == "seen" else checked_map_size(map_size)
    limit = memory_bytes(max_memory)
    config, cells = seen_at(model, img_size)
    if tiles not in TILES:
        raise ValueError(f"tiles is {tiles!r}; allowed are {', '.join(map(repr, TILES))}")
    pictures = list(_pictures(images))
    if not pictures:
        raise ValueError("there are no images to score")
    if map_path is not None and (len(pictures) > 1 or Path(map_path).suffix != ".npy"):
        raise ValueError(f"map_path is {os.fspath(map_path)!r}: pass one picture, and a name that ends in .npy")
    ids = check_class_ids(config, class_ids, len(pictures))
    shapes = {(picture.shape[1], picture.shape[2]) for picture in pictures}
    cut = {shape: may_cut(model, config, shape, limit, tiles, ids is not None) for shape in shapes}
    together = {
        shape: _batch_size(model, config, shape, limit, cut[shape], ids is not None) if throughput else 1
        for shape in shapes
    }
    found: dict[int, Densities] = {}
    for batch in _same_size(pictures, together):
        some, first = None if ids is None else ids[batch], pictures[batch[0]]
        if len(batch) > 1:
            parts = densities(model, batch_features(model, [pictures[i] for i in batch], config), some, throughput)
            found |= zip(batch, (one for part in parts for one in part.images()), strict=True)
        else:
            features = feature_maps(model, prepare(first, config), cut[first.shape[1], first.shape[2]])
            found[batch[0]] = _densities(model, features, some)
    each = [found[i] for i in range(len(pictures))]
    if normalization == "official":
        fills = [_resampled(seen) for seen in official_maps(each, config.msk_size)]
    else:
        fills = _calibrated_fills(model, each, cells)
    maps, scores = [], []
    for fill, picture in zip(fills, pictures, strict=True):
        maps.append(_lay(fill, picture, config, size, map_path))
        scores.append(fill.score)
    result = _judged(model, torch.stack(scores), torch.cat([one.class_id for one in each]), normalization)
    for name in _VERDICTS:
        setattr(result, name, getattr(result, name).cpu())
    same = len({m.shape for m in maps}) == 1
    result.anomaly_map = maps[0][None] if len(maps) == 1 else torch.stack(maps) if same else maps
    result.sizes = [(picture.shape[1], picture.shape[2]) for picture in pictures]
    return result


def seen_at(model: HGADModel, img_size: int | str | None) -> tuple[HGADConfig, int | None]:
    """The configuration with another `img_size`, and cells of the feature map on `msk_size` of the map.

    None where the whole feature map lies on `msk_size`: at the model's own size, and where that is "native".
    """
    config, calibration = seeing(model, img_size).config, model.calibration
    if calibration is not None and calibration.img_size not in (None, config.img_size):
        warnings.warn(
            f"pictures are seen at img_size = {config.img_size}, the model is calibrated at {calibration.img_size}: "
            "scores are comparable with each other, thresholds and p-values mean little; "
            f"model.calibrate(normal pictures, img_size={config.img_size!r}), or hgad-fast calibrate, makes new ones",
            stacklevel=4,
        )
    return config, cells_on_map(model, config.img_size)


def seeing(model: HGADModel, img_size: int | str | None) -> HGADModel:
    """The model, with its weights, that sees pictures at another `img_size`; None: at its own."""
    if img_size is None or img_size == model.config.img_size:
        return model
    other = copy.copy(model)
    other.config = model.config.replace(img_size=img_size)
    return other


def cells_on_map(model: HGADModel, img_size: int | str) -> int | None:
    own = model.config.img_size
    if img_size == own or isinstance(own, str) or not isinstance(model.encoder, Backbone):
        return None
    return math.ceil(own / model.encoder.strides[0])


def feature_maps(model: HGADModel, seen: Tensor, cut: bool) -> FeatureMaps:
    """Features of a picture (3, h, w) as `prepare` gives it, in tiles where it is large and may be `cut`."""
    encoder = model.require_encoder()
    if not isinstance(encoder, Backbone):  # one of the user's own
        return FeatureMaps.of(encoder(encoder.normalize(seen[None].to(model.device))))
    return encoder.feature_maps(seen, cut)


def batch_features(model: HGADModel, pictures: list[Tensor], config: HGADConfig | None = None) -> list[Tensor]:
    """Features (B, C, h, w) of pictures (3, H, W) of one size, one tensor a level."""
    encoder = model.require_encoder()
    prepared = torch.stack([prepare(p, config or model.config) for p in pictures])
    normalised = encoder.normalize(prepared.to(model.device))
    return encoder(normalised, fast=True) if isinstance(encoder, Backbone) else encoder(normalised)


def picture_features(model: HGADModel, picture: Tensor) -> list[Tensor]:
    """Features (1, C, h, w) of a picture (3, H, W) in [0, 1], one tensor a level; those that it is scored by.

    Raises:
        ValueError: it needs more than `MAX_MEMORY`.
    """
    return seen_features(model, prepare(picture, model.config))


def seen_features(model: HGADModel, seen: Tensor) -> list[Tensor]:
    """`picture_features` of a picture (3, h, w) as `prepare` gives it."""
    config = model.config.replace(img_size="native", center_crop=False)
    return feature_maps(model, seen, may_cut(model, config, (seen.shape[1], seen.shape[2]))).whole()


def prepare(picture: Tensor, config: HGADConfig) -> Tensor:
    """A picture (3, H, W) at the size that the backbone sees: all of it, or the official centre crop."""
    fit = data.centre_crop if config.center_crop else data.whole_picture
    return fit(picture, config.img_size)


# ------------------------------------------------------------------------------------------------ memory


def memory_bytes(amount: int | str | None, name: str = "max_memory") -> int:
    """Bytes of `max_memory`: a number, or a string such as "900MB", "1.5GB" or "2GiB"; None is `MAX_MEMORY`.

    An error calls it `name`.
    """
    if amount is None:
        return MAX_MEMORY
    try:
        found = byte_count(amount) or 0
    except ValueError:
        found = 0
    if found < 1:
        raise ValueError(f"{name} is {amount!r}; pass bytes, or a size such as '900MB' or '1.5GB'")
    return found


def working_set(
    model: HGADModel, config: HGADConfig, shape: tuple[int, int], cut: bool = True, class_known: bool = False
) -> int:
    """Bytes that scoring a picture of (H, W) pixels takes at the worst moment, beyond model, picture and map.

    The sum of what is there all the time (the resized picture, what is said of the pixels, the densities of every class
    until it is known) and the most that one of the steps needs: backbone (activations of a tile), flow and mixture of a
    chunk, a band of the map.
    """
    encoder = model.require_encoder()
    assert isinstance(encoder, Backbone)
    seen = seen_shape(shape, config)
    passes = encoder.passes(*seen, cut)
    sizes = [stage for one in passes for stage in one.stages]
    always = 2**27 + 16 * sum(h * w for h, w in sizes)
    resized = data.centre_crop_geometry(*shape, config.img_size)[0] if config.center_crop else seen
    if resized != shape:
        always += 24 * math.prod(resized)
        always += 4 * (math.prod(shape) + max(shape[0] * resized[1], resized[0] * shape[1]))  # Pillow's, of a channel
    kept = kept_bytes(sizes, config.n_classes)
    if not class_known and kept <= MAX_KEPT:
        always += kept
    channels = max(model.feat_dims)
    hidden = 2 * (channels + config.pos_embed_dim)
    chunk = 4 * CHUNK_PIXELS * (3 * hidden + 8 * channels + 4 * config.n_classes)
    pieces = max(one.tile_pixels for one in passes) / encoder.strides[0] ** 2 * 4 * channels
    return int(always + max(encoder.working_set(*seen, cut), chunk + pieces, 48 * BAND_PIXELS))


def seen_shape(shape: tuple[int, int], config: HGADConfig) -> tuple[int, int]:
    """(h, w) at which `prepare` gives a picture of (H, W) pixels to the backbone."""
    if config.center_crop:
        side = min(shape) if isinstance(config.img_size, str) else config.img_size
        return side, side
    return data.whole_picture_size(*shape, config.img_size)


def may_cut(
    model: HGADModel,
    config: HGADConfig,
    shape: tuple[int, int],
    limit: int | None = None,
    tiles: str = "auto",
    class_known: bool = True,
) -> bool:
    """Whether the backbone may cut pictures of this size.

    Raises:
        ValueError: there is not the memory to score them.
    """
    encoder, limit = model.require_encoder(), limit or MAX_MEMORY
    seen = seen_shape(shape, config)
    if not isinstance(encoder, Backbone) or limit >= MAX_MEMORY and math.prod(seen) <= ALWAYS_WHOLE:
        return False
    needs = functools.partial(working_set, model, config, shape, class_known=class_known)
    is_local = encoder.is_local
    cut = tiles == "always" or tiles == "auto" and (is_local or needs(cut=False) > limit)
    if (needed := needs(cut=cut)) > limit:
        remedy = "a smaller img_size"
        if tiles == "never" and is_local:
            remedy += ", tiles='auto'"
        elif cut:
            remedy += ", or smaller tiles (hgad_fast.backbone.TILE_MEMORY)"
        raise ValueError(
            f"a picture of {shape[0]} x {shape[1]} pixels (height x width), seen at {seen[0]} x {seen[1]}, takes about "
            f"{_gigabytes(needed)} to score, and max_memory is {readable(limit)}: allow more, or choose {remedy}"
        )
    if cut and not is_local and max(len(one.rows) * len(one.columns) for one in encoder.passes(*seen)) > 1:
        warnings.warn(
            f"{encoder.arch} looks at the whole picture, so tiles of one of {seen[0]} x {seen[1]} pixels give other "
            f"features than the whole; tiles='never' and max_memory='{_gigabytes(needs(cut=False))}' score it whole",
            stacklevel=4,
        )
    return cut


def _gigabytes(amount: int) -> str:
    return f"{math.ceil(amount / 1e7) / 100:g} GB"


def _batch_size(
    model: HGADModel, config: HGADConfig, shape: tuple[int, int], limit: int, cut: bool, class_known: bool
) -> int:
    """How many pictures of (H, W) pixels share a batch; one where it may be `cut` into tiles.

    The working set of a batch is no more than the sum of those of its pictures.
    """
    if not isinstance(model.encoder, Backbone):
        return config.batch_size
    if cut and math.prod(seen_shape(shape, config)) > ALWAYS_WHOLE:
        return 1
    needed = working_set(model, config, shape, cut=False, class_known=class_known)
    return max(1, min(config.batch_size, limit // needed))


def _same_size(pictures: list[Tensor], together: dict[tuple[int, int], int]) -> Iterator[list[int]]:
    """Indices of pictures that share a batch: of each size so many."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for i, picture in enumerate(pictures):
        by_size.setdefault((picture.shape[1], picture.shape[2]), []).append(i)
    for size, ids in by_size.items():
        for i in range(0, len(ids), together[size]):
            yield ids[i : i + together[size]]


def _pictures(images: Any) -> Iterable[Tensor]:
    """Every accepted form of pictures, one (3, H, W) float32 tensor in [0, 1] on the CPU after the other."""
    if isinstance(images, (str, os.PathLike)):
        path = Path(images)
        for file in data.list_images(path) if path.is_dir() else [path]:
            yield data.read_image(file)
    elif isinstance(images, Tensor):
        yield from _tensors(images)
    elif hasattr(images, "getbands"):  # a PIL image
        yield data.from_pil(images)
    elif hasattr(images, "__array_interface__"):
        yield from _arrays(images)
    elif isinstance(images, Iterable):
        for image in images:
            yield from _pictures(image)
    else:
        raise ValueError(f"cannot score a {type(images).__name__}; pass tensors, arrays, PIL images, or paths")


def _tensors(images: Tensor) -> Iterable[Tensor]:
    if images.dim() not in (3, 4) or images.shape[-3] != 3 or 0 in images.shape[-2:]:
        raise ValueError(f"an image tensor has shape {tuple(images.shape)}; expected (B, 3, H, W) or (3, H, W)")
    if not images.is_floating_point():
        raise ValueError(
            f"an image tensor is {images.dtype}; pass floats in [0, 1] (divide 8-bit values by 255), or an array"
        )
    for picture in images.detach() if images.dim() == 4 else [images.detach()]:
        picture = picture.to("cpu", torch.float32)
        if not (picture.min() >= 0 and picture.max() <= 1):  # a NaN fails both
            raise ValueError(
                f"image values run from {float(picture.min()):.7g} to {float(picture.max()):.7g}; they must lie in "
                "[0, 1] (divide 8-bit values by 255; do not normalise, the model does)"
            )
        yield picture


def _arrays(images: Any) -> Iterable[Tensor]:
    import numpy as np

    array = np.asarray(images)
    if array.ndim == 2:
        array = np.broadcast_to(array[..., None], (*array.shape, 3))
    if array.ndim not in (3, 4) or array.shape[-1] != 3:
        raise ValueError(f"an image array has shape {array.shape}; expected (B, H, W, 3), (H, W, 3) or (H, W)")
    if array.dtype.kind not in "uf":
        raise ValueError(f"an image array is {array.dtype}; pass unsigned integers of full range, or floats in [0, 1]")
    for picture in array if array.ndim == 4 else [array]:
        chw = np.array(picture.transpose(2, 0, 1), np.float32, order="C")
        if array.dtype.kind == "u":
            chw /= np.float32(np.iinfo(array.dtype).max)
        yield from _tensors(torch.from_numpy(chw))


def _calibrated_fills(model: HGADModel, found: list[Densities], cells: int | None) -> list[_Fill]:
    calibration, msk_size = model.calibration, model.config.msk_size
    assert calibration is not None

    def write(one: Densities, out: Tensor) -> Tensor:
        grid = map_grid(one, msk_size, cells)
        return write_calibrated(out[None], one, calibration.level_max, grid, calibration.weights)[0]

    return [_Fill(functools.partial(write, one), map_grid(one, msk_size, cells)) for one in found]


def _resampled(seen: Tensor) -> _Fill:
    def write(out: Tensor) -> Tensor:
        rows, columns = _onto((out.shape[0], out.shape[1]), (seen.shape[0], seen.shape[1]), seen.device)
        step = max(1, BAND_PIXELS // out.shape[1])
        for start in range(0, len(out), step):
            out[start : start + step] = bilinear(seen, rows.part(start, start + step, 0), columns)
        return seen.max()

    return _Fill(write, (seen.shape[0], seen.shape[1]))


class _Fill:
    """Writes a map (H, W) at the size it is given; `score` is its largest value on its own `grid` (h, w)."""

    def __init__(self, write: Callable[[Tensor], Tensor], grid: tuple[int, int]) -> None:
        self.write, self.grid = write, grid

    def __call__(self, out: Tensor) -> None:
        self.score = self.write(out)


def laid(seen: Tensor, shape: tuple[int, int], config: HGADConfig, size: tuple[int, int] | None = None) -> Tensor:
    """A map that `score_images` gave with ``map_size="seen"``, laid over its picture: (H, W), or `size`.

    To rounding what it gives without. `shape` is the picture's, and `config` has the `img_size` that it was seen at.
    """
    return _filled(torch.empty(size or shape), _resampled(seen), shape, config)


def _lay(
    fill: _Fill,
    picture: Tensor,
    config: HGADConfig,
    size: tuple[int, int] | str | None,
    path: str | os.PathLike[str] | None = None,
) -> Tensor:
    """A map of what the model saw, laid over the whole picture, on the CPU or in a file: (H, W) or `size`."""
    import numpy as np

    height, width = picture.shape[1:]
    if isinstance(size, str):
        config, size = config.replace(center_crop=False), fill.grid
    shape = size or (height, width)
    if path is None:
        return _filled(torch.empty(shape), fill, (height, width), config)
    with replacing(path) as temporary:
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
        if hasattr(os, "posix_fallocate"):  # a disk that fills up under a mapped file would kill the process
            with open(temporary, "rb+") as file:
                os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
        _filled(torch.from_numpy(array), fill, (height, width), config)
        array.flush()
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def _filled(out: Tensor, fill: Callable[[Tensor], None], shape: tuple[int, int], config: HGADConfig) -> Tensor:
    """`out`, filled; a crop is laid where it was cut out of a picture of this shape, and the rest is 0."""
    if not config.center_crop:
        fill(out)
        return out
    (h, w), top, left = data.centre_crop_geometry(*shape, config.img_size)
    (side, _) = seen_shape(shape, config)
    out.zero_()
    fill(out[_span(top, side, out.shape[0] / h), _span(left, side, out.shape[1] / w)])
    return out


def _span(start: int, length: int, scale: float) -> slice:
    """Pixels start to start + length at another scale, at least one."""
    first = int(start * scale + 0.5)
    return slice(first, max(int((start + length) * scale + 0.5), first + 1))


_VERDICTS = ("image_score", "class_id", "p_value", "is_anomalous", "threshold", "false_alarm_rate")
