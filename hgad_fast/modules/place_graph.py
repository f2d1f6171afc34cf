"""Distances to the Gaussians of the places of a map as plain operations of one size, for other runtimes to run.

The factors are stored as they are computed, in bands without most of the zeros right of the diagonal, and multiplied by
the pixels of their place: those of all images together. Groups follow one another, so that no more than the offsets to
one group are in memory.

Symbols: B images of h x w pixels; P places of a grid; C channels; d values that the anomaly map is made of; D >= d all
values; K groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..features.graph import constant
from .place_gaussian import Distances, PlaceGaussians, Whitening, evidence_of, places


class GridGraph(nn.Module):
    """Whitened features (h w, B, D) -> squared distances to the Gaussians of groups of one grid.

    Where the grid is not that of the map, pixels are put together by their nearest places, and places that are nearest
    to none are left out.

    Args:
        gaussians: those of the level, computed for the groups.
        j: the number of the grid.
        groups: some of its members.
        size: (h, w) of the maps.
    """

    order: Tensor
    back: Tensor

    def __init__(self, gaussians: PlaceGaussians, j: int, groups: Sequence[int], size: tuple[int, int]) -> None:
        super().__init__()
        self.groups, self.dim = tuple(groups), gaussians.dim
        self.ends = [end for _, end in gaussians.bands]
        place = places(size, gaussians.distinct[j], torch.device("cpu"))
        used, in_used, counts = place.unique(return_inverse=True, return_counts=True)
        self.together = int(counts.max())  # pixels of a place; one with fewer is filled up with pixel 0
        self.sorts = size != gaussians.distinct[j]
        if self.sorts:
            by_place = in_used.argsort(stable=True)
            rank = torch.empty_like(place)
            rank[by_place] = torch.arange(len(place)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
            back = in_used * self.together + rank
            order = torch.zeros(len(used) * self.together, dtype=torch.int64)
            order[back] = torch.arange(len(place))
            self.register_buffer("order", order)
            self.register_buffer("back", back)
        for k in self.groups:
            row = gaussians.position(k)[1]
            mean = getattr(gaussians, f"mean_{j}")[row].cpu()[used]
            self.register_buffer(f"mean_{k}", constant(mean[:, None]))
            for band in range(len(self.ends)):
                factor = getattr(gaussians, f"band_{band}_{j}")[row].cpu()
                self.register_buffer(f"band_{band}_{k}", constant((factor[used] if self.sorts else factor).mT))

    def forward(self, y: Tensor) -> list[Distances]:
        """Return the distances (h w, B) to each group."""
        together = y
        if self.sorts:
            together = y.index_select(0, self.order).reshape(-1, self.together * y.shape[1], y.shape[2])
        return [Distances(*(self._by_pixel(each, y) for each in self._distances(together, k))) for k in self.groups]

    def _distances(self, y: Tensor, group: int) -> Distances:
        """Return the distances (P, n) to a group of the features (P, n, D) of n pixels a place."""
        offsets = y - getattr(self, f"mean_{group}")
        squares: list[Tensor] = []  # by the values up to the end of each band
        for band, end in enumerate(self.ends):
            added = (offsets[..., :end] @ getattr(self, f"band_{band}_{group}")).square().sum(2)
            squares.append(squares[-1] + added if squares else added)
        return Distances(squares[self.ends.index(self.dim)], squares[-1])

    def _by_pixel(self, squares: Tensor, y: Tensor) -> Tensor:
        """Return distances (P, n) in the order of the pixels (h w, B) of the map."""
        return squares.reshape(-1, y.shape[1]).index_select(0, self.back) if self.sorts else squares


class PlaceGraph(nn.Module):
    """Features (B, C, h, w) of a level -> squared distances to the Gaussians of some groups.

    Args:
        whitening: of the level.
        gaussians: of the level; those of the groups are computed where they are not known.
        groups: numbers of groups, in the order in which the distances to them are returned.
        size: (h, w) of the maps, which the grids of all groups fit.

    Attributes:
        log_dets: (K, h w), those of the covariances at the pixels.
        mean_log_dets: (K,), their means.
    """

    mean: Tensor
    matrix: Tensor
    log_dets: Tensor
    mean_log_dets: Tensor

    def __init__(
        self, whitening: Whitening, gaussians: PlaceGaussians, groups: Sequence[int], size: tuple[int, int]
    ) -> None:
        super().__init__()
        gaussians.require(groups)
        self.groups, self.dim, self.width = tuple(groups), gaussians.dim, gaussians.width
        of_grids = [[k for k in groups if k in members] for members in gaussians.members]
        self.grids = nn.ModuleList(GridGraph(gaussians, j, each, size) for j, each in enumerate(of_grids) if each)
        mean_log_dets = torch.tensor([gaussians.mean_log_det(size, k) for k in groups], dtype=torch.float64)
        for name, tensor in (
            ("mean", whitening.mean),
            ("matrix", whitening.matrix),
            ("log_dets", torch.stack([gaussians.log_dets(size, k) for k in groups])),
            ("mean_log_dets", mean_log_dets),
        ):
            self.register_buffer(name, constant(tensor))

    def forward(self, x: Tensor) -> Distances:
        """Return the distances (K, h w, B) to each of the groups."""
        y = (self.matrix.T @ (x.flatten(2) - self.mean[:, None])).permute(2, 0, 1)  # (h w, B, D)
        by_group: dict[int, Distances] = {}
        for grid in self.grids:
            by_group |= dict(zip(grid.groups, grid(y), strict=True))  # type: ignore[arg-type]
        fine, total = zip(*(by_group[k] for k in self.groups), strict=True)
        stacked = torch.stack(total)
        return Distances(torch.stack(fine) if self.dim < self.width else stacked, stacked)

    def evidence(self, total: Tensor) -> Tensor:
        """Return the mean log-density of images under each group over D, (K, B), but for what groups have in common.

        Args:
            total: (K, h w, B), of `forward`.
        """
        return evidence_of(total.mean(1), self.mean_log_dets[:, None], self.width)
