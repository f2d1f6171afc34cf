"""From feature maps to densities, anomaly maps and image scores.

A score depends on its image alone: on a CPU every image goes through backbone and flow by itself, large maps in chunks
of a fixed number of rows, so that it has the same bits in any company. ``throughput=True`` batches images instead, and
agrees to 1e-5.
"""

from __future__ import annotations

import itertools
import math
import operator
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import data
from .backbone import FeatureMap
from .interpolate import between, bilinear
from .ops import SeparablePosition

if TYPE_CHECKING:
    from .config import HGADConfig
    from .model import HGADModel

CHUNK_PIXELS = 8192  # feature pixels that go through the flow together
BAND_PIXELS = 2**20  # of a map that are computed together
MAX_KEPT = 2**28  # bytes of densities that are kept until the class is known; beyond, the pixels are scored twice
BLUR_SIGMA = 4.0  # of the anomaly map, in pixels of the msk_size map (official)
MAX_SEEN_PIXELS = 2**23  # of a picture at the size of the backbone (about 0.5 GB of memory a million in a small one)


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


@dataclass
class Densities:
    """Per level, (B, h, w) each: log-density of the image's class over C, and negative entropy. `class_id` is (B,)."""

    logps: list[Tensor]
    neg_entropy: list[Tensor]
    class_id: Tensor
    n_classes: int  # of the model; with one there is no entropy, and the likelihood alone makes the map


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
    size = _map_size(map_size)
    features = _check_features(model, features)
    ids = check_class_ids(model.config, class_ids, len(features[0]))
    parts = densities(model, features, ids, throughput)
    maps = _maps(model, parts, normalization)
    result = _judged(model, maps, parts, normalization)
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


def _judged(model: HGADModel, maps: list[Tensor], parts: Sequence[Densities], normalization: str) -> ScoreResult:
    """What follows from the maps: all of a `ScoreResult` but the maps themselves."""
    scores = torch.stack([m.max() for m in maps])
    class_id = torch.cat([part.class_id for part in parts])
    if normalization == "official":
        p_value, threshold, rate = torch.full((3, len(scores)), math.nan, dtype=torch.float64)
        is_anomalous = torch.zeros(len(scores), dtype=torch.bool)
    else:
        assert model.calibration is not None
        p_value, is_anomalous, threshold, rate = model.calibration.judge(scores, class_id)
    return ScoreResult(
        anomaly_map=maps,
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


def _map_size(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
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
    if isinstance(class_ids, (int, str)):
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
            [FeatureMap.of(x[i : i + together]) for x in features],
            None if class_ids is None else class_ids[i : i + together],
        )
        for i in range(0, len(features[0]), together)
    ]


def _densities(model: HGADModel, features: list[FeatureMap], class_ids: Tensor | None) -> Densities:
    """Of the pixels of a batch; only z of one chunk, and what is said of the pixels, exist at any time."""
    batch, classes = features[0].batch, model.config.n_classes
    neg_entropy = [torch.empty(batch, *level.size, device=model.device) for level in features]
    per_class = []
    if class_ids is None:
        evidence = torch.zeros(batch, classes, dtype=torch.float64, device=model.device)
        kept = 4 * batch * classes * sum(level.pixels for level in features) <= MAX_KEPT
        for level, x in enumerate(features):
            every = torch.empty(batch, *x.size, classes, device=model.device) if kept else None
            total = torch.zeros_like(evidence)
            for at, density, entropy in _chunks(model, level, x, None):
                density = density / model.feat_dims[level]
                total += density.sum((1, 2), dtype=torch.float64)
                neg_entropy[level][at] = -entropy
                if every is not None:
                    every[at] = density
            evidence += total / x.pixels
            if every is not None:
                per_class.append(every)
        class_ids = evidence.argmax(1).cpu()
    if per_class:
        rows = torch.arange(batch)
        return Densities([every[rows, ..., class_ids] for every in per_class], neg_entropy, class_ids, classes)
    logps = [torch.empty_like(level) for level in neg_entropy]
    for level, x in enumerate(features):
        for at, density, entropy in _chunks(model, level, x, class_ids):
            logps[level][at] = density / model.feat_dims[level]
            neg_entropy[level][at] = -entropy
    return Densities(logps, neg_entropy, class_ids, classes)


def _chunks(
    model: HGADModel, level: int, features: FeatureMap, class_ids: Tensor | None
) -> Iterator[tuple[tuple[slice, ...], Tensor, Tensor]]:
    """Where a chunk of pixels lies in the map, its log-densities (B, r, c), of every class (B, r, c, K) without
    `class_ids`, and its entropies (B, r, c).

    All chunks of a piece have one size, rows of pixels padded with zeros: products of another size round differently.
    """
    flow, mixture = model.nfs[level], model.mixture
    position = flow.grid(*features.size, model.device)  # of the whole map, whatever the pieces
    for top, left, x in features.pieces():
        batch, channels, height, width = x.shape
        columns = min(width, max(64, CHUNK_PIXELS // batch))  # products of fewer rows waste time
        rows = min(height, max(1, CHUNK_PIXELS // (batch * columns)))
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
            yield at, density.view(*shape, *density.shape[1:])[:, :r, :c], entropy.view(shape)[:, :r, :c]


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


def calibrated_maps(found: Densities, level_max: Tensor, msk_size: int, weights: Tensor | None = None) -> Tensor:
    """Maps (B, h, w), short side msk_size, that depend on each image alone.

    Likelihood S - sum_l min(1, exp(l - m_l)) times entropy S - sum_l exp(-H_l), each blurred; m_l is the largest
    log-density that normal pictures of the class reach at level l. Differences from 1 are taken by expm1: a posterior
    that is almost certain leaves entropies far below the rounding of 1. With `weights` (K, 2) of each class, of
    likelihood and entropy, the map is their weighted sum instead.
    """
    size = map_grid(found, msk_size)
    maps = found.logps[0].new_empty(len(found.class_id), *size)
    write_calibrated(maps, found, level_max, size, weights)
    return maps


def map_grid(found: Densities, msk_size: int) -> tuple[int, int]:
    """Height and width of the map that scores are computed on, in the proportions of the feature map."""
    h, w = found.logps[0].shape[1:]
    scale = msk_size / min(h, w)
    return round(h * scale), round(w * scale)


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
    rows, columns = (
        between(torch.arange(n), of, n, align_corners=False) for n, of in zip(out.shape[1:], grid, strict=True)
    )
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


def _band(levels: list[Tensor], grid: tuple[int, int], top: int, bottom: int) -> Tensor:
    """Rows top to bottom of a grid to which the levels (B, h, w) are enlarged, summed and blurred."""
    rows, columns = _mirrored(top, bottom, grid[0]), _mirrored(0, grid[1], grid[1])
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
    map_size: int | tuple[int, int] | None = None,
    throughput: bool = False,
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
        map_size: size of the returned maps; default: each picture's own.
        throughput: let pictures of one size share batches of `config.batch_size`.

    With ``config.center_crop`` the map is 0 outside the square that the model sees.

    Raises:
        ValueError: no pictures, one that cannot be read or is too long and thin, values outside [0, 1], or class ids
            that do not fit.
    """
    check_normalization(model, normalization)
    size = _map_size(map_size)
    pictures = list(_pictures(images))
    if not pictures:
        raise ValueError("there are no images to score")
    ids = check_class_ids(model.config, class_ids, len(pictures))
    batches = _same_size(pictures, model.config.batch_size) if throughput else [[i] for i in range(len(pictures))]
    parts: list[Densities] = []
    for batch in batches:
        features = batch_features(model, [pictures[i] for i in batch])
        parts += densities(model, features, None if ids is None else ids[batch], throughput)
    maps = _maps(model, parts, normalization)
    result = _judged(model, maps, parts, normalization)
    order = torch.tensor([i for batch in batches for i in batch]).argsort()
    for name in _VERDICTS:
        setattr(result, name, getattr(result, name).cpu()[order])
    laid = [_in_picture(maps[j], pictures[i], model.config, size) for i, j in enumerate(order.tolist())]
    result.anomaly_map = torch.stack(laid) if len({m.shape for m in laid}) == 1 else laid
    return result


def batch_features(model: HGADModel, pictures: list[Tensor]) -> list[Tensor]:
    """Features (B, C, h, w) of pictures (3, H, W) of one size, one tensor a level."""
    encoder = model.require_encoder()
    prepared = torch.stack([prepare(p, model.config) for p in pictures])
    return encoder(encoder.normalize(prepared.to(model.device)))


def picture_features(model: HGADModel, picture: Tensor) -> list[Tensor]:
    """Features (1, C, h, w) of a picture (3, H, W) in [0, 1], one tensor a level."""
    return batch_features(model, [picture])


def prepare(picture: Tensor, config: HGADConfig) -> Tensor:
    """A picture (3, H, W) at the size that the backbone sees: all of it, or the official centre crop.

    Raises:
        ValueError: the picture is so long and thin that it would have more than `MAX_SEEN_PIXELS`, and more than four
            squares of img_size.
    """
    height, width = picture.shape[1:]
    h, w = data.whole_picture_size(height, width, config.img_size)
    if h * w > max(MAX_SEEN_PIXELS, 4 * config.img_size**2):
        raise ValueError(
            f"a picture of {height} x {width} pixels (height x width) would have {h} x {w} with its short side at "
            f"img_size = {config.img_size}: cut it into tiles (hgad_fast.score.MAX_SEEN_PIXELS = {MAX_SEEN_PIXELS})"
        )
    fit = data.centre_crop if config.center_crop else data.whole_picture
    return fit(picture, config.img_size)


def _same_size(pictures: list[Tensor], batch_size: int) -> list[list[int]]:
    by_size: dict[torch.Size, list[int]] = {}
    for i, picture in enumerate(pictures):
        by_size.setdefault(picture.shape, []).append(i)
    return [ids[i : i + batch_size] for ids in by_size.values() for i in range(0, len(ids), batch_size)]


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
        array = np.repeat(array[..., None], 3, -1)
    if array.ndim not in (3, 4) or array.shape[-1] != 3:
        raise ValueError(f"an image array has shape {array.shape}; expected (B, H, W, 3), (H, W, 3) or (H, W)")
    if array.dtype.kind not in "uf":
        raise ValueError(f"an image array is {array.dtype}; pass unsigned integers of full range, or floats in [0, 1]")
    scale = np.float32(np.iinfo(array.dtype).max if array.dtype.kind == "u" else 1)
    for picture in array if array.ndim == 4 else [array]:
        chw = np.ascontiguousarray(picture.transpose(2, 0, 1), np.float32)
        yield from _tensors(torch.from_numpy(chw / scale))


def _in_picture(seen: Tensor, picture: Tensor, config: HGADConfig, size: tuple[int, int] | None) -> Tensor:
    """A map (h, w) of what the model saw, laid over the whole picture, on the CPU: (H, W) or `size`."""
    height, width = picture.shape[1:]
    seen = seen[None]
    if config.center_crop:
        (h, w), top, left = data.centre_crop_geometry(height, width, config.img_size)
        rows = _span(top, config.img_size, height / h)
        columns = _span(left, config.img_size, width / w)
        crop = resample(seen, (rows.stop - rows.start, columns.stop - columns.start))
        seen = crop.new_zeros(1, height, width)
        seen[:, rows, columns] = crop
    return resample(seen, size or (height, width))[0].cpu()


def _span(start: int, length: int, scale: float) -> slice:
    """Pixels start to start + length at another scale; halves go up, so that a span of one pixel is never empty."""
    return slice(int(start * scale + 0.5), int((start + length) * scale + 0.5))


_VERDICTS = ("image_score", "class_id", "p_value", "is_anomalous", "threshold", "false_alarm_rate")
