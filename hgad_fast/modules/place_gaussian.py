"""Gaussians of each group of images and each place of the feature map, in closed form from running sums.

The sums are of whole numbers: features are whitened and rounded to multiples of `STEP`, and additions of whole numbers
are exact. So a model depends on the images that it has seen, and on neither their order nor how they came in parts.

Symbols: G groups; P = h w places of a grid; d values that the anomaly map is made of; D >= d all values, of which the
others count for the image score alone.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..environment import one_thread
from ..ops import place_distances

STEP = 2.0**-8  # of a standard deviation, to which whitened features are rounded: its variance is 1e-6 of theirs
MAX_ASPECT = 1.05  # ratio of the aspect ratios of two grids whose places correspond
MIN_EIGENVALUE = 1e-6  # of the largest: directions of less variance are not stretched further
FIRST, BAND = 32, 64  # values of the first band, and of any other at most
CHUNK_BYTES = 2**24  # of products in float64 that exist at a time
ROUNDING = 1e-4  # of a log-determinant in float32, for each value

_SOLVING = threading.Lock()  # Gaussians are computed once, whichever thread asks first


class ExactSum:
    """A sum of tensors of one shape that is the same in any order: each is split into whole multiples of fixed steps.

    Values must be below 2^59 in magnitude; what is below 2^-61 is rounded.
    """

    STEPS = (2.0**20, 2.0**-20, 2.0**-60)  # each takes 40 bits, which leaves room for 2^23 summands

    def __init__(self) -> None:
        self._totals: list[Any] = [0] * len(self.STEPS)

    def add(self, x: Tensor) -> None:
        """Add a tensor of float64."""
        for i, step in enumerate(self.STEPS):
            multiples = (x / step).round()
            self._totals[i] = self._totals[i] + multiples.to(torch.int64)
            x = x - multiples * step

    def value(self) -> Tensor:
        """Return the sum in float64."""
        return sum(total.double() * step for total, step in zip(self._totals, self.STEPS, strict=True))


class Moments:
    """Exact running sums of features x (C,): how many there are, their sum, and that of their products x x^T."""

    def __init__(self) -> None:
        self.count = 0
        self._total, self._products = ExactSum(), ExactSum()

    def add(self, x: Tensor) -> None:
        """Add the features (N, C) of an image."""
        x = x.double().cpu()
        self.count += len(x)
        self._total.add(x.sum(0))
        self._products.add(x.T @ x)

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """Return the mean (C,) and the covariance (C, C) of what was added, in float64."""
        mean = self._total.value() / self.count
        return mean, self._products.value() / self.count - mean[:, None] * mean


class Whitening(nn.Module):
    """The linear map that makes joined stages of features uncorrelated, with a variance of 1.

    Each stage is divided by its standard deviation. Of the fine stages the `dim` principal components are taken, and of
    what the coarse stages have beyond that, which no linear function of those components tells, `coarse_dim`.

    Args:
        channels: of all stages.
        dim: principal components of the fine stages.
        coarse_dim: of the others.

    Attributes:
        mean: (C,), subtracted first.
        matrix: (C, D), then multiplied by.
    """

    mean: Tensor
    matrix: Tensor

    def __init__(self, channels: int, dim: int, coarse_dim: int) -> None:
        super().__init__()
        self.dim, self.coarse_dim = dim, coarse_dim
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("matrix", torch.zeros(channels, dim + coarse_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return the whitened values (N, D) of features (N, C)."""
        return (x.to(self.mean.dtype) - self.mean) @ self.matrix

    def fit(self, moments: Moments, stage_dims: Sequence[int], fine_stages: int) -> None:
        """Take the moments of features; `stage_dims` are the channels of each stage, `fine_stages` come first."""
        mean, covariance = moments.mean_and_covariance()
        ends = [sum(stage_dims[: i + 1]) for i in range(len(stage_dims))]
        scale = torch.ones_like(mean)
        for channels, end in zip(stage_dims, ends, strict=True):
            stage = slice(end - channels, end)
            # the variance of all values of the stage: within and between its channels
            variance = covariance.diagonal()[stage].mean() + mean[stage].var(unbiased=False)
            scale[stage] = variance.clamp(min=0).sqrt()
        scale = torch.where(scale > 0, scale, 1.0)
        covariance = covariance / (scale[:, None] * scale)
        fine = ends[fine_stages - 1]
        matrix = torch.zeros(len(mean), self.dim + self.coarse_dim, dtype=torch.float64)
        components = _whitening_components(covariance[:fine, :fine], self.dim)
        matrix[:fine, : self.dim] = components
        if self.coarse_dim:
            told = components.T @ covariance[:fine, fine:]  # (dim, coarse channels): what the fine stages tell of them
            rest = _whitening_components(covariance[fine:, fine:] - told.T @ told, self.coarse_dim)
            matrix[fine:, self.dim :] = rest
            matrix[:fine, self.dim :] = -components @ told @ rest
        self.mean.copy_(mean)
        self.matrix.copy_(matrix / scale[:, None])


def _whitening_components(covariance: Tensor, dim: int) -> Tensor:
    """Return the `dim` largest principal components (C, dim) of a covariance (C, C), scaled to a variance of 1."""
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0)[:dim], vectors.flip(1)[:, :dim]
    return vectors / values.clamp(min=max(MIN_EIGENVALUE * float(values[0]), 1e-12)).sqrt()


class Distances(NamedTuple):
    """Squared Mahalanobis distances (N, groups) of pixels to the Gaussians of their places."""

    fine: Tensor  # by the first d values
    total: Tensor  # by all


class PlaceGaussians(nn.Module):
    """A Gaussian N(mu_kp, Sigma_kp) of the whitened features of each group k at each place p of its grid.

    .. math:: \\Sigma_{kp} = (1 - s) S_{kp} + s \\frac{1}{P} \\sum_q S_{kq} + f I

    with the sample covariance S, `shrinkage` s and `floor` f. A group of a single image has no S: it takes the mean of
    those of the other groups.

    Row i of the inverse Cholesky factor of a covariance gives what value i adds to the squared distance. Rows are kept
    in `bands`, without most of the zeros right of the diagonal: there is a third less to read, and the distance by the
    first values, which is no larger than that by all, costs the first bands alone.

    Args:
        grids: (h, w) of each group.
        dim, coarse_dim: d and D - d.
        shrinkage, floor: s and f.

    Attributes:
        images: (G,) int64, how many each group has seen.
        bands: (first, end) of the values of each band; one of them ends with the d-th.
    """

    images: Tensor

    def __init__(
        self, grids: Sequence[tuple[int, int]], dim: int, coarse_dim: int, shrinkage: float, floor: float
    ) -> None:
        super().__init__()
        self.dim, self.width, self.shrinkage, self.floor = dim, dim + coarse_dim, shrinkage, floor
        self.grids = tuple(grids)
        self.distinct = tuple(dict.fromkeys(self.grids))
        self.members = [[k for k, grid in enumerate(self.grids) if grid == distinct] for distinct in self.distinct]
        first = min(FIRST, dim)
        self.bands = (0, first), *_parts(first, dim), *_parts(dim, self.width)
        self.register_buffer("images", torch.zeros(len(self.grids), dtype=torch.int64))
        for j, (h, w) in enumerate(self.distinct):
            shape = len(self.members[j]), h * w
            triangle = self.width * (self.width + 1) // 2
            self.register_buffer(f"totals_{j}", torch.zeros(*shape, self.width, dtype=torch.int64))
            self.register_buffer(f"products_{j}", torch.zeros(*shape, triangle, dtype=torch.int32))
            self.register_buffer(f"mean_{j}", torch.full((*shape, self.width), torch.nan), persistent=False)
            for band, (first, end) in enumerate(self.bands):  # by rows: so products with a single pixel are fastest
                rows = torch.full((*shape, end - first, end), torch.nan)
                self.register_buffer(f"band_{band}_{j}", rows, persistent=False)
            self.register_buffer(f"log_det_{j}", torch.full(shape, torch.nan), persistent=False)
            self.register_buffer(f"mean_log_det_{j}", torch.full(shape[:1], torch.nan), persistent=False)
            self.register_buffer(f"least_log_det_{j}", torch.full(shape, torch.nan), persistent=False)
        self.forget()

    # ---- the sums

    def add(self, group: int, y: Tensor, sign: int = 1) -> None:
        """Add whitened features (n, P, D) of images of a group, on the group's grid.

        With a `sign` of -1 images that were added before are taken out again: whole numbers leave no trace.

        Raises:
            ValueError: they are not finite, or so large that the sums would not be exact.
        """
        j, row = self.position(group)
        totals, products = self._sums(j)
        values = (y.double().cpu() / STEP).round()
        known = products[row].cpu().long()
        squares = sign * values.square().sum(0) + known[:, self._diagonal().cpu()].double()
        if not float(squares.max()) < 2**52:  # NaN is not
            raise ValueError(
                f"features are not finite, or beyond {2**26 * STEP:.0f} standard deviations of those trained on: the "
                "sums of the Gaussians would not be exact"
            )
        lower = torch.tril_indices(self.width, self.width)
        step = max(1, CHUNK_BYTES // (8 * self.width**2))
        sums = torch.empty(values.shape[1], products.shape[2], dtype=torch.int64)
        for start in range(0, values.shape[1], step):
            places = values[:, start : start + step].transpose(0, 1)  # (p, n, D)
            # Whole numbers below 2^53, in any order of additions: no product and no sum is rounded.
            sums[start : start + step] = sign * (places.mT @ places)[:, lower[0], lower[1]].to(torch.int64)
        sums += known
        if products.dtype == torch.int32 and int(sums.abs().max()) >= 2**31:
            products = products.long()
            setattr(self, f"products_{j}", products)
        products[row] = sums.to(products)
        totals[row] += sign * values.sum(0).to(totals)
        self.images[group] += sign * len(y)
        for k, count in enumerate(self.images.tolist()):
            if k == group or count < 2:  # a group of a single image depends on the others
                self._known[k] = 0

    def extended(self, grid: tuple[int, int]) -> PlaceGaussians:
        """Return Gaussians of one group more, the last, without images and on a grid; of the others it holds copies."""
        grids, coarse_dim = (*self.grids, grid), self.width - self.dim
        extended = PlaceGaussians(grids, self.dim, coarse_dim, self.shrinkage, self.floor)
        extended.to(self.get_buffer("mean_0"))
        for name, buffer in self.named_buffers():
            rows = getattr(extended, name).to(buffer.dtype)  # products may be int64
            rows[: len(buffer)] = buffer
            setattr(extended, name, rows)
        extended._known[: len(self.grids)] = self._known
        return extended

    def solve(self) -> None:
        """Compute all Gaussians from the sums."""
        self.forget()
        self.require(range(len(self.grids)))

    def forget(self) -> None:
        """Note that the Gaussians are not those of the sums: each is computed when it is next asked for."""
        self._known = [0] * len(self.grids)  # bands

    def require(self, groups: Sequence[int], first_band: bool = False) -> bool:
        """Compute the Gaussians of some groups that are not known yet, or what their first band tells of them.

        It is done on the CPU in one thread, so that they have the same bits wherever the model is, and in the same way
        whichever groups and bands are asked for first. They stay NaN where no group has the two images of a covariance.

        Returns:
            whether there were such groups.

        Raises:
            ValueError: the sums are those of no features.
        """
        bands = 1 if first_band else len(self.bands)
        if all(self._known[k] >= bands for k in groups):
            return False
        with one_thread(), _SOLVING:  # in this order: a caller may have the one thread already
            for k in groups:
                if self._known[k] >= bands:
                    continue
                if (shared := self._shared_covariance(k)) is not None:
                    self._solve(k, shared, first_band and len(self.bands) > 1)
                self._known[k] = bands
        return True

    def _shared_covariance(self, group: int) -> Tensor | None:
        """Return what the covariances (D, D) of a group are shrunk towards: the mean over its places.

        That of a group of one image is the mean of those of the others; None where there are none.
        """
        if int(self.images[group]) > 1:
            return self._mean_sample_covariance(group)
        others = [self._mean_sample_covariance(k) for k, count in enumerate(self.images.tolist()) if count > 1]
        return torch.stack(others).mean(0) if others else None

    def _solve(self, group: int, shared: Tensor, first_band: bool) -> None:
        """Compute the Gaussians of a group, or their first band alone and a bound of their log-determinants."""
        j, row = self.position(group)
        bands = self.bands[:1] if first_band else self.bands
        mean, log_det, least_log_det, mean_log_det = (
            getattr(self, f"{name}_{j}")[row] for name in ("mean", "log_det", "least_log_det", "mean_log_det")
        )
        with torch.no_grad(), torch.inference_mode(mean.is_inference()):
            mean.copy_(self._sums(j)[0][row].double() * (STEP / max(int(self.images[group]), 1)))
            step = max(1, CHUNK_BYTES // (8 * bands[-1][1] ** 2))
            for start in range(0, len(mean), step):
                part = slice(start, start + step)
                try:
                    inverse, log_dets = _inverse_factors(self._covariance(group, shared, part, bands[-1][1]), bands)
                except torch.linalg.LinAlgError as error:
                    raise ValueError("the model is damaged: its Gaussians are those of no features") from error
                for band, (first, end) in enumerate(bands):
                    getattr(self, f"band_{band}_{j}")[row, part] = inverse[:, first:end, :end]
                if first_band:
                    least_log_det[part] = log_dets + self._others_log_det(shared)
                else:
                    log_det[part] = log_dets
            if not first_band:
                mean_log_det.copy_(log_det.mean())

    def _others_log_det(self, shared: Tensor) -> Tensor:
        """Return the least that the values beyond the first band can add to a log-determinant.

        A covariance is no smaller than its part s shared + f I. So what is left of it, given the values of the first
        band, is no smaller than what is left of that.
        """
        least = self.shrinkage * shared + self.floor * torch.eye(self.width, dtype=torch.float64)
        first = self.bands[0][1]
        return torch.linalg.slogdet(least).logabsdet - torch.linalg.slogdet(least[:first, :first]).logabsdet

    def _covariance(self, group: int, shared: Tensor, places: slice, end: int) -> Tensor:
        """Return the covariances (p, end, end) of the first values of a group at some places, in float64."""
        j, row = self.position(group)
        totals, products = self._sums(j)
        count = int(self.images[group])
        total = totals[row, places, :end].cpu().double() * STEP
        shrunk = shared[:end, :end] * (self.shrinkage if count > 1 else 1.0)
        shrunk = shrunk + self.floor * torch.eye(end, dtype=torch.float64)
        if count < 2:
            return shrunk.expand(len(total), end, end)
        i = torch.arange(end)
        high, low = torch.maximum(i[:, None], i), torch.minimum(i[:, None], i)
        packed = products[row, places, : end * (end + 1) // 2].cpu()
        covariance = packed.index_select(1, (high * (high + 1) // 2 + low).flatten()).double().view(-1, end, end)
        weight = (1 - self.shrinkage) / (count - 1)
        covariance.baddbmm_(total[:, :, None], total[:, None], beta=weight * STEP**2, alpha=-weight / count)
        return covariance.add_(shrunk)

    def _mean_sample_covariance(self, group: int) -> Tensor:
        """Return the mean (D, D) over the places of the sample covariances of a group, without making those."""
        j, row = self.position(group)
        totals, products = self._sums(j)
        count, total = int(self.images[group]), totals[row].cpu().double() * STEP
        lower = torch.tril_indices(self.width, self.width)
        mean = total.new_empty(self.width, self.width)
        values = products[row].cpu().double().mean(0) * STEP**2
        mean[lower[0], lower[1]] = mean[lower[1], lower[0]] = values
        return (mean - total.T @ total / (count * len(total))) / (count - 1)

    def _sums(self, j: int) -> tuple[Tensor, Tensor]:
        return getattr(self, f"totals_{j}"), getattr(self, f"products_{j}")

    def _diagonal(self) -> Tensor:
        """Return the positions of squares among the products."""
        i = torch.arange(self.width, device=self.images.device)
        return i * (i + 3) // 2

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take the sums in the type that they are saved in; the Gaussians are computed when they are asked for."""
        for j in range(len(self.distinct)):
            saved = state_dict.get(f"{prefix}products_{j}")
            if saved is not None and saved.dtype == torch.int64:
                setattr(self, f"products_{j}", getattr(self, f"products_{j}").long())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._check_sums()
        self.forget()

    def _check_sums(self) -> None:
        """Raise a ValueError where squares of values would have to be negative."""
        for j, members in enumerate(self.members):
            totals, products = self._sums(j)
            counts = self.images[members].double()[:, None, None]
            squares, least = products[..., self._diagonal()] * counts, totals.double().square()
            if not (squares * (1 + 1e-9) >= least).all():
                raise ValueError(f"totals_{j} and products_{j} are the sums of no features")

    # ---- distances

    def position(self, group: int) -> tuple[int, int]:
        """Return the number j of a group's grid, and its row in the tables of that grid: of its `members`."""
        j = self.distinct.index(self.grids[group])
        return j, self.members[j].index(group)

    def distances(self, y: Tensor, size: tuple[int, int], group: int) -> Distances:
        """Return the squared distances (N, 1) of whitened features (N, D) of one image or several to a group's places.

        Args:
            y: of maps of `size`, image after image, row after row.
            size: (h, w); another grid than the group's takes the nearest places.
            group: of which `grid_fits` is true.
        """
        j, row = self.position(group)
        return self.added(self.added_by(band, y, size, j, row) for band in range(len(self.bands)))

    def all_distances(self, j: int, y: Tensor, size: tuple[int, int]) -> Distances:
        """Return what `distances` does for all groups of a grid, (N, groups), the `members` of j."""
        return self.added(self.added_by(band, y, size, j) for band in range(len(self.bands)))

    def added_by(self, band: int, y: Tensor, size: tuple[int, int], j: int, row: int | None = None) -> Tensor:
        """Return what the values of a band add to the squared distances: (N, groups) of a grid, or (N, 1) of one."""
        groups = slice(None) if row is None else slice(row, row + 1)
        self.require(self.members[j][groups], first_band=band == 0)
        mean, factor = getattr(self, f"mean_{j}")[groups], getattr(self, f"band_{band}_{j}")[groups]
        end = factor.shape[3]
        return place_distances(y[:, :end], self._places(j, y, size), mean[..., :end], factor.mT)

    def added(self, squares: Iterable[Tensor]) -> Distances:
        """Return the distances that all bands together make, of what each of them adds."""
        total: Any = 0
        for (_, end), added in zip(self.bands, squares, strict=True):
            total = total + added
            if end == self.dim:
                fine = total
        return Distances(fine, total)

    def _places(self, j: int, y: Tensor, size: tuple[int, int]) -> Tensor | None:
        """Return the place (N,) of each pixel of images of this size; None where they come in the places' order."""
        grid = self.distinct[j]
        return None if size == grid else places(size, grid, y.device).repeat(len(y) // math.prod(size))

    def log_dets(self, size: tuple[int, int], group: int) -> Tensor:
        """Return the log-determinants of the covariances of a group at the pixels (h w,) of a map."""
        self.require((group,))
        j, row = self.position(group)
        log_det = getattr(self, f"log_det_{j}")[row]
        return log_det[places(size, self.distinct[j], log_det.device)]

    def mean_log_det(self, size: tuple[int, int], group: int) -> float:
        """Return the mean of `log_dets` over the pixels."""
        self.require((group,))
        if size == self.grids[group]:
            j, row = self.position(group)
            return float(getattr(self, f"mean_log_det_{j}")[row])
        return float(self.log_dets(size, group).mean(dtype=torch.float64))

    def least_mean_log_det(self, size: tuple[int, int], group: int) -> float:
        """Return `mean_log_det`, or while only the first band of the group is known a lower bound of it."""
        self.require((group,), first_band=True)
        if self._known[group] == len(self.bands):
            return self.mean_log_det(size, group)
        j, row = self.position(group)
        least = getattr(self, f"least_log_det_{j}")[row]
        at_pixels = least[places(size, self.distinct[j], least.device)]
        return float(at_pixels.mean(dtype=torch.float64)) - ROUNDING * self.width


def evidence_of(mean_square: Any, mean_log_det: Any, width: int) -> Any:
    """Return the mean log-density over D of an image, but for what all groups have in common.

    Args:
        mean_square: the mean over its pixels of the squared distances to a group.
        mean_log_det: that of the log-determinants of the group's covariances.
        width: D.
    """
    return -(mean_square + mean_log_det) / (2 * width)


def _inverse_factors(covariance: Tensor, bands: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Return the inverses (p, D, D) of the Cholesky factors of covariances, and the log-determinants (p,) of these.

    They are computed band by band, mostly by products of matrices: so the rows of a band do not depend on later ones.
    """
    inverse, log_det = torch.zeros_like(covariance), covariance.new_zeros(len(covariance))
    for first, end in bands:
        known = inverse[:, :first, :first]
        told = covariance[:, first:end, :first] @ known.mT
        lower = torch.linalg.cholesky(covariance[:, first:end, first:end] - told @ told.mT)
        identity = torch.eye(end - first, dtype=covariance.dtype).expand_as(lower)
        own = torch.linalg.solve_triangular(lower, identity, upper=False)
        inverse[:, first:end, first:end] = own
        inverse[:, first:end, :first] = -own @ (told @ known)
        log_det += 2 * lower.diagonal(dim1=1, dim2=2).log().sum(1)
    return inverse, log_det


def _parts(first: int, end: int) -> list[tuple[int, int]]:
    """Return the (first, end) of parts of a range of about one length, which is at most `BAND`."""
    count = -(-(end - first) // BAND)
    ends = [first + (end - first) * i // max(count, 1) for i in range(count + 1)]
    return list(zip(ends, ends[1:], strict=False))


def grid_fits(size: tuple[int, int], grid: tuple[int, int]) -> bool:
    """Return whether places of a map and of a grid, (h, w) each, correspond: aspect ratios differ by 5% at most.

    The last row and column of a map may stand for a part of a cell only: it fits if any such part makes it so.
    """
    (h, w), (grid_h, grid_w) = size, grid
    too_wide = (w - 1) * grid_h >= MAX_ASPECT * h * grid_w
    too_high = (h - 1) * grid_w >= MAX_ASPECT * w * grid_h
    return size == grid or not too_wide and not too_high


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # whoever asks first: others may train with it
def places(size: tuple[int, int], grid: tuple[int, int], device: torch.device) -> Tensor:
    """Return the place (h w,) on a grid at the same relative position as each pixel of a map, int64."""
    rows, columns = (
        (2 * torch.arange(n, device=device) + 1) * cells // (2 * n) for n, cells in zip(size, grid, strict=True)
    )
    return (rows[:, None] * grid[1] + columns).flatten()
