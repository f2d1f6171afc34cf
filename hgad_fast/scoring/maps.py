"""Anomaly maps from densities, of any size in little memory, and maps laid over the images they belong to."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.images import centre_crop_geometry
from ..features.backbone import Backbone
from ..features.interpolate import BAND_PIXELS, Between, between, bilinear, weights_of
from ..features.preprocess import AsItIs, ImageSettings, Seeing, seen_shape
from ..files import replacing
from ..ops.dispatch import in_float32
from ..protocol import Densities, Detector

SMALL_MAP = 2**18  # pixels of a map up to which resizing and blurring it are two products of matrices
BLUR_SIGMA = 4.0  # standard deviation of the blur, in pixels of a map of msk_size (official)


def official_maps(batches: Sequence[Densities], msk_size: int) -> Tensor:
    """Return the published maps (n, msk_size, msk_size) of all n images, normalised by maxima over all of them.

    The images of one batch share a size of feature map; other batches may have another.
    """
    maps = [_official_map([batch.parts[name] for batch in batches], msk_size) for name in batches[0].parts]
    return math.prod(maps[1:], start=maps[0])


def _official_map(batches: list[list[Tensor]], msk_size: int) -> Tensor:
    """Return the blurred maps (n, msk_size, msk_size) of one part of the densities, (B, h, w) per level and batch."""
    maxima = [max(float(level.max()) for level in levels) for levels in zip(*batches, strict=True)]
    size = (msk_size, msk_size)
    totals = []
    for batch in batches:
        levels = [upsample(torch.exp(level - maximum), size) for level, maximum in zip(batch, maxima, strict=True)]
        totals.append(torch.stack(levels).sum(0))
    total = torch.cat(totals)
    return blur(total.max() - total)


def calibrated_maps(
    densities: Densities,
    level_max: Tensor,
    msk_size: int,
    weights: Tensor | None = None,
    cells: int | None = None,
    scope: str = "map",
) -> Tensor:
    """Return anomaly maps (B, h, w), of the size of `map_grid`, each of which depends on its own image alone.

    Each part of the densities gives a map: the blurred sum of its anomalies at all levels (`Densities.anomalies`, of a
    `scope`). The maps are multiplied, or added with `weights` (G, parts) of the image's group.
    """
    grid = map_grid(densities, msk_size, cells)
    maps = densities.logps[0].new_empty(len(densities.group_ids), *grid)
    write_calibrated(maps, densities, level_max, grid, weights, scope=scope)
    return maps


def map_grid(densities: Densities, msk_size: int, cells: int | None = None) -> tuple[int, int]:
    """Return the height and width of the map that scores are computed on, in the proportions of the feature map.

    The short side is `msk_size`. With `cells`, that many cells of the feature map correspond to `msk_size` pixels, so
    that the map grows with the feature map: in an image seen at a larger size the blur then covers as much as at the
    model's own size.
    """
    h, w = densities.logps[0].shape[1:]
    scale = msk_size / (cells or min(h, w))
    return max(round(h * scale), 1), max(round(w * scale), 1)


def cells_on_map(model: Detector, img_size: int | str) -> int | None:
    """Return the `cells` of `map_grid` for images seen at `img_size`; None where the short side is always msk_size."""
    own_size = model.config.img_size
    if img_size == own_size or isinstance(own_size, str) or not isinstance(model.encoder, Backbone):
        return None
    return model.encoder.cells(own_size)


def image_scores(maps: Tensor, share: float = 0.0) -> Tensor:
    """Return the image scores (B,) of anomaly maps (B, h, w): the mean of the largest `share` of the pixels.

    With 0 it is the maximum, and at least one pixel counts. Each image is ranked by itself, so that its score has the
    same bits whatever the others are. A map that holds a NaN has a score of NaN.
    """
    count = int(share * maps[0].numel() + 1e-9) if len(maps) else 0  # 3% of 700 pixels are 21, whatever 0.03 rounds to
    if count <= 1:
        return maps.amax((1, 2))
    return torch.stack([anomaly_map.flatten().topk(count).values.mean() for anomaly_map in maps])


def write_calibrated(
    out: Tensor | None,
    densities: Densities,
    level_max: Tensor,
    grid: tuple[int, int],
    weights: Tensor | None = None,
    share: float = 0.0,
    scope: str = "map",
) -> Tensor:
    """Fill `out` (B, H, W) with the `calibrated_maps` on a grid, resampled to its size.

    This is done in bands along the long side, so that little memory is needed beyond `out`, which may be a file mapped
    into memory. A band is computed together with the neighbouring rows that the blur reaches: a pixel has the same bits
    whatever the bands are. With a `share` the whole grid is kept until its largest pixels are known.

    Args:
        out: what is filled; None: nothing, for the scores alone.
        densities: of B images.
        level_max, weights, share: as `Calibration` has them.
        grid: height and width of the map that scores are computed on.
        scope: of `Densities.anomalies`.

    Returns:
        the `image_scores` of the maps before resampling, (B,).
    """
    groups, device = densities.group_ids, densities.logps[0].device
    parts = densities.anomalies(level_max, scope)
    if grid[0] < grid[1]:
        parts, grid = [[x.mT for x in levels] for levels in parts], grid[::-1]
        out = None if out is None else out.mT
    height, width = grid if out is None else (out.shape[1], out.shape[2])
    same_grid = out is None or (height, width) == grid
    band_rows, out_rows = max(1, BAND_PIXELS // grid[1]), max(1, BAND_PIXELS // width)
    maxima = (densities.logps[0] if out is None else out).new_full((len(groups),), -math.inf)
    if not same_grid:
        rows, columns = _positions_on_grid((height, width), grid, device)
    done = 0  # rows of `out` that are written
    last_row = maxima.new_empty(
        len(groups), 0, grid[1], device=device
    )  # of the band before, for rows between two bands
    kept: list[Tensor] = []
    for top in range(0, grid[0], band_rows):
        bottom = min(top + band_rows, grid[0])
        bands = [_band(levels, grid, top, bottom) for levels in parts]
        if weights is not None:
            weighted = zip(weights.to(device)[groups].T[..., None, None], bands, strict=True)
            bands = [weight * band for weight, band in weighted]
            band = sum(bands[1:], start=bands[0])
        else:
            band = math.prod(bands[1:], start=bands[0])
        if share:
            kept.append(band)
        else:
            maxima = torch.maximum(maxima, band.amax((1, 2)).to(maxima))
        if out is None:
            continue
        if same_grid:
            out[:, top:bottom] = band
            continue
        band, top = torch.cat([last_row, band], 1), top - last_row.shape[1]
        ready = int((rows.second < bottom).sum())  # rows of `out` that need no later band
        for start in range(done, ready, out_rows):
            stop = min(start + out_rows, ready)
            out[:, start:stop] = bilinear(band, rows.part(start, stop, top), columns)
        last_row, done = band[:, -1:], ready
    return image_scores(torch.cat(kept, 1), share).to(maxima) if share else maxima


def _positions_on_grid(size: tuple[int, int], grid: tuple[int, int], device: torch.device) -> tuple[Between, Between]:
    """Return the positions of the rows and columns of a map on a grid, with pixel centres at half-integers."""
    rows, columns = (
        between(torch.arange(n, device=device), grid_n, n, align_corners=False)
        for n, grid_n in zip(size, grid, strict=True)
    )
    return rows, columns


def _band(levels: list[Tensor], grid: tuple[int, int], top: int, bottom: int) -> Tensor:
    """Return rows `top` to `bottom` of the blurred sum of the levels (B, h, w), each resized to the grid."""
    device = levels[0].device
    if math.prod(grid) <= SMALL_MAP:
        # image by image: of several, a product may be added up in another order
        images = [sum(resized_and_blurred(level[i], grid) for level in levels) for i in range(len(levels[0]))]
        return torch.stack(images)[:, top:bottom]
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


@in_float32
def resized_and_blurred(level: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return a level (h, w) resized to the grid and blurred, which along each axis is one linear map."""
    rows, columns = (blurred_axis(n, m, level.dtype, level.device) for n, m in zip(level.shape, grid, strict=True))
    return rows @ level @ columns.T


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # whoever asks first: others may train with it
def blurred_axis(n: int, resized: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the matrix (resized, n) that resizes an axis of n positions (bilinear, corners aligned) and blurs it."""
    positions = between(_mirrored(0, resized, resized), n, resized, align_corners=True)
    bilinear_weights = weights_of(positions, n)
    radius, (centre, *sides) = _radius(BLUR_SIGMA), _gaussian(BLUR_SIGMA)
    weights = [*reversed(sides), centre, *sides]
    matrix = sum(
        weight * bilinear_weights[offset : offset + resized]
        for offset, weight in zip(range(2 * radius + 1), weights, strict=True)
    )
    return matrix.to(device, dtype)  # type: ignore[union-attr]


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Upsample maps (B, h, w) to (B, *size), bilinear with aligned corners, as the official code does."""
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=True)[:, 0]


def resample(maps: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Resample anomaly maps (B, h, w) to (B, *size), pixel centres at half-integers; None leaves their size."""
    if size is None or size == maps.shape[1:]:
        return maps
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def blur(maps: Tensor, sigma: float = BLUR_SIGMA) -> Tensor:
    """Blur maps (B, h, w) with a Gaussian cut at 4 sigma, edges mirrored, as scipy.ndimage.gaussian_filter does."""
    rows, columns = (_mirrored(0, n, n, sigma).to(maps.device) for n in maps.shape[1:])
    return _smooth(maps[:, rows[:, None], columns], sigma)


def _mirrored(start: int, stop: int, n: int, sigma: float = BLUR_SIGMA) -> Tensor:
    """Return the positions that a blur of positions `start` to `stop` reads on an axis of n, mirrored at its ends."""
    radius = _radius(sigma)
    positions = torch.arange(start - radius, stop + radius) % (2 * n)
    return torch.where(positions < n, positions, 2 * n - 1 - positions)


def _smooth(maps: Tensor, sigma: float) -> Tensor:
    """Return the Gaussian sums over the neighbourhoods that lie wholly in (B, h, w).

    Every sum is taken in the same order, so that a pixel has the same bits whatever the part of a map.
    """
    radius, (centre, *sides) = _radius(sigma), _gaussian(sigma)
    for axis in (1, 2):
        n = maps.shape[axis] - 2 * radius
        smooth = centre * maps.narrow(axis, radius, n)
        for distance, weight in enumerate(sides, 1):
            pair = maps.narrow(axis, radius - distance, n) + maps.narrow(axis, radius + distance, n)
            smooth.add_(pair, alpha=weight)
        maps = smooth
    return maps


def _gaussian(sigma: float) -> list[float]:
    """Return the weights of the blur at distances from 0 on; all of them, of both sides, add up to 1."""
    kernel = torch.exp(-0.5 * (torch.arange(_radius(sigma) + 1, dtype=torch.float64) / sigma) ** 2)
    return (kernel / (2 * kernel.sum() - 1)).tolist()


def _radius(sigma: float) -> int:
    """Return the distance in pixels at which the Gaussian is cut: 4 sigma, rounded."""
    return int(4 * sigma + 0.5)


# ------------------------------------------------------------------------------------------------ over the image


class Fill:
    """A function that fills a tensor (H, W) of any size with the anomaly map of one image.

    Attributes:
        write: does so, and returns the image score.
        grid: (h, w) of the map that the score is computed on.
        score: the image score, in general the largest value on the grid; set by a call.
    """

    def __init__(self, write: Callable[[Tensor], Tensor], grid: tuple[int, int]) -> None:
        self.write, self.grid = write, grid

    def __call__(self, out: Tensor) -> None:
        """Fill `out` and set `score`."""
        self.score = self.write(out)


def resampled_fill(anomaly_map: Tensor, score: Tensor | None = None) -> Fill:
    """Return the `Fill` that resamples an anomaly map (h, w); `score`: the image score, default the map's maximum."""
    grid = anomaly_map.shape[0], anomaly_map.shape[1]

    def write(out: Tensor) -> Tensor:
        rows, columns = _positions_on_grid((out.shape[0], out.shape[1]), grid, anomaly_map.device)
        step = max(1, BAND_PIXELS // out.shape[1])
        for start in range(0, len(out), step):
            out[start : start + step] = bilinear(anomaly_map, rows.part(start, start + step, 0), columns)
        return anomaly_map.max() if score is None else score

    return Fill(write, grid)


def laid(
    seen_map: Tensor, shape: tuple[int, int], config: ImageSettings, size: tuple[int, int] | None = None
) -> Tensor:
    """Return a map that `score_images` gave with ``map_size="seen"``, laid over its image of `shape` (H, W).

    It has the image's shape, or `size`, and is to rounding the map that `score_images` gives at that size. `config`
    holds the `img_size` at which the image was seen.
    """
    return _filled(torch.empty(size or shape), resampled_fill(seen_map), shape, config)


def lay(
    fill: Fill,
    shape: tuple[int, int],
    config: ImageSettings,
    size: tuple[int, int] | str | None,
    path: str | os.PathLike[str] | None = None,
) -> Tensor:
    """Lay a map over its image of `shape` (H, W), and return it, on the CPU, or in the file `path`, mapped into memory.

    It has the image's shape, or `size`; with ``size="seen"`` that of the grid, over what the model sees of the image.
    The map of an image that is seen as a square is stretched back over the whole image.
    """
    seen: Seeing = config
    if isinstance(size, str):
        seen, size = AsItIs(), fill.grid
    out_shape = size or shape
    if path is None:
        return _filled(torch.empty(out_shape), fill, shape, seen)
    with replacing(path) as temporary:
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=out_shape)
        if hasattr(os, "posix_fallocate"):  # a disk that fills up under a mapped file would kill the process
            with open(temporary, "rb+") as file:
                os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
        _filled(torch.from_numpy(array), fill, shape, seen)
        array.flush()
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def _filled(out: Tensor, fill: Callable[[Tensor], None], shape: tuple[int, int], config: Seeing) -> Tensor:
    """Fill `out`, the map of an image of `shape`, and return it; with a centre crop it is 0 outside the crop."""
    if not config.center_crop:
        fill(out)
        return out
    (h, w), top, left = centre_crop_geometry(*shape, config.img_size)
    (side, _) = seen_shape(shape, config)
    out.zero_()
    fill(out[_span(top, side, out.shape[0] / h), _span(left, side, out.shape[1] / w)])
    return out


def _span(start: int, length: int, scale: float) -> slice:
    """Return the pixels `start` to `start + length` at another scale, at least one."""
    first = int(start * scale + 0.5)
    return slice(first, max(int((start + length) * scale + 0.5), first + 1))
