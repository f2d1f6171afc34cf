"""The densities of pixels under Gaussians of their places, and the graph of plain operations that computes them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..features.joining import JoiningGraph
from ..modules.groups import groups_of_images, one_group
from ..modules.place_graph import PlaceGraph
from ..protocol import Densities

LOG_2_PI = math.log(2 * math.pi)
Joining = tuple[list[float], int]  # strides, to a factor, and the index of the grid's level; see `features.joining`


@dataclass
class GaussianDensities(Densities):
    """Densities with the distances that maps and scores are made of.

    Attributes:
        distances: by the names of the parts (B, h, w), the Mahalanobis distance to the Gaussian of the place by the
            d values that the map is made of, less sqrt(d), which is what it is for normal features on average: so maps
            of all classes have about the same level where nothing is wrong.
        all_distances: the same by all D values.
    """

    multipliable: ClassVar[bool] = False

    distances: dict[str, Tensor] = field(default_factory=dict)
    all_distances: dict[str, Tensor] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, list[Tensor]]:
        """The log-densities by the names of the parts: one for each backbone."""
        return {name: [logps] for name, logps in zip(self.distances, self.logps, strict=True)}

    def alone(self, part: str) -> Densities:
        """Return densities whose map is that of a single one of the `parts`."""
        distances, all_distances = ({part: each[part]} for each in (self.distances, self.all_distances))
        return replace(self, logps=self.parts[part], distances=distances, all_distances=all_distances)

    def anomalies(self, level_max: Tensor, scope: str = "map") -> list[list[Tensor]]:
        """Return the distances (B, h, w) of each part: those of the map, or with ``scope="all"`` those by all stages.

        A distance needs no constant of normal images: it is in units of their spread at its place.
        """
        return [[distance] for distance in (self.all_distances if scope == "all" else self.distances).values()]

    def images(self) -> Iterator[Densities]:
        """Yield the densities of one image after the other, with B = 1."""
        for i in range(len(self.group_ids)):
            yield GaussianDensities(
                [logps[i : i + 1] for logps in self.logps],
                [],
                self.group_ids[i : i + 1],
                {name: distance[i : i + 1] for name, distance in self.distances.items()},
                {name: distance[i : i + 1] for name, distance in self.all_distances.items()},
            )


class GaussianGraph(nn.Module):
    """What `GaussianModel.densities` computes, of features of fixed sizes; see `Detector.density_graph`.

    Args:
        levels: the distances to the groups that maps of these sizes fit, by the names of the parts.
        joining: joins the levels of features on one grid; None: they are not joined.
        group: the group of all images, the only one of the levels; None: inferred, or given with the features.
        group_count: of the model.
    """

    groups: Tensor
    columns: Tensor
    misfits: Tensor | None

    def __init__(
        self, levels: Mapping[str, PlaceGraph], joining: JoiningGraph | None, group: int | None, group_count: int
    ) -> None:
        super().__init__()
        self.names, self.levels = list(levels), nn.ModuleList(levels.values())
        self.joining, self.group = joining, group
        groups = torch.tensor(next(iter(levels.values())).groups)
        self.register_buffer("groups", groups)
        self.register_buffer("columns", torch.zeros(group_count, dtype=torch.int64))  # of the groups of the levels
        self.columns[groups] = torch.arange(len(groups))
        misfits = torch.full((group_count,), math.nan).index_fill(0, groups, 0.0)
        self.register_buffer("misfits", misfits if group is None and misfits.isnan().any() else None)

    def forward(self, levels: Sequence[Tensor], group_ids: Tensor | None) -> Densities:
        """Return the densities of features (B, C, h, w) of each level under the given groups, or those inferred."""
        if self.joining:
            levels = [self.joining(levels)]
        graphs: Any = list(self.levels)
        of_groups = [graph(x) for graph, x in zip(graphs, levels, strict=True)]
        if self.group is not None:
            group_ids = one_group(levels[0], self.group)
        else:
            evidence = [graph.evidence(total) for graph, (_, total) in zip(graphs, of_groups, strict=True)]
            inferred = self.groups.index_select(0, torch.stack(evidence).sum(0).argmax(0))
            group_ids = groups_of_images(inferred, group_ids)
        column = self.columns.index_select(0, group_ids)
        logps, distances, all_distances = [], {}, {}
        for name, graph, x, of_level in zip(self.names, graphs, levels, of_groups, strict=True):
            fine, total = (self._own(squares, column).T.contiguous() for squares in of_level)
            if self.misfits is not None:
                misfit = self.misfits.index_select(0, group_ids)[:, None]
                fine, total = fine + misfit, total + misfit
            log_dets = graph.log_dets.index_select(0, column)
            distances[name] = (fine.sqrt() - math.sqrt(graph.dim)).unflatten(1, x.shape[2:])
            all_distances[name] = (total.sqrt() - math.sqrt(graph.width)).unflatten(1, x.shape[2:])
            logps.append((total + log_dets + graph.width * LOG_2_PI).unflatten(1, x.shape[2:]) / (-2 * graph.width))
        return GaussianDensities(logps, [], group_ids, distances, all_distances)

    def _own(self, squares: Tensor, column: Tensor) -> Tensor:
        """Return of distances (K, h w, B) to all groups those to the group of each image, (h w, B)."""
        if len(squares) == 1:
            return squares[0]
        return squares.gather(0, column.expand(1, squares.shape[1], -1))[0]
