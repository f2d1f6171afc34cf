"""GaussianModel: a Gaussian of each class and each place of the feature map, in closed form."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..environment import plain_torch
from ..features.backbone import Backbone, FeatureMaps
from ..features.extract import FeatureSet, feature_set
from ..features.joining import JoiningGraph, joined
from ..features.outline import Outline
from ..methods import register
from ..modules.place_gaussian import Distances, Moments, PlaceGaussians, Whitening, evidence_of, grid_fits, places
from ..modules.place_graph import PlaceGraph
from ..ops.dispatch import float32_products
from ..protocol import About, Densities, OfficialMaps, ProportionsError
from ..scoring.maps import resized_and_blurred
from ..terminal import warn_user
from .config import GaussianConfig
from .detector import Detector
from .gaussian_densities import LOG_2_PI, GaussianDensities, GaussianGraph, Joining

MOMENT_PIXELS = 2**16  # pixels, of all images together, that the whitening is made from
PIXELS_TOGETHER = 2**16  # pixels of images that are added to the sums together


@register
class GaussianModel(Detector):
    """One anomaly detector for all classes that is not trained: Gaussians of each class and place, in closed form.

    The stages of a backbone are joined on one grid and whitened. For each class and place of the grid a Gaussian is
    fitted: the mean of the place, and its covariance, shrunk towards the mean of those of the class (see
    `modules.place_gaussian`). The anomaly map is the Mahalanobis distance of each pixel by the stages that are not
    coarser than the grid, which say best where a defect is; the image score is the maximum of the map by all stages,
    which say best whether there is one. It is HGAD without coupling blocks, with one centre a class, a full covariance
    instead of the identity, and parameters that depend on the place. Of published methods PaDiM (arXiv 2011.08785) is
    next to it: that has one Gaussian a place, of channels drawn at random, and one model a class.

    Objects have to lie where those of the training images lie, as they do under a fixed camera; a texture may lie
    anyhow. An image of other proportions than the training images of every class is refused.

    Args:
        config: a `GaussianConfig`.

    Attributes:
        whitenings: of each level (a level for each backbone; what the user brings is one level).
        gaussians: `PlaceGaussians` of each level; empty before `fit`.
    """

    config_class = GaussianConfig
    config: GaussianConfig
    encoder: Backbone | None
    closed_form = True
    about = About(
        "place Gaussians: of each class and place of the feature map a Gaussian, in closed form",
        "Of each class and place it holds the sum of the features of the training images, the sum of their products, "
        "and the number of images (of a class with one image that is the features of this image); of all together the "
        "mean and the principal directions of the features.",
        (
            "Objects have to lie where those of the training images lie, as they do under a fixed camera; a texture "
            "may lie anyhow.",
            "An image of other proportions than the training images is refused.",
        ),
    )
    scores_from_zero = False

    def build(self) -> None:
        """Make the whitenings, and the Gaussians of a configuration that knows its grids."""
        config = self.config
        self.whitenings = nn.ModuleList(
            Whitening(sum(dims), min(config.dim, sum(dims[:fine])), min(config.coarse_dim, sum(dims[fine:])))
            for dims, fine in zip(self._stage_dims, self._fine_stages, strict=True)
        )
        self.gaussians = nn.ModuleList()
        if config.grids is not None:
            self._make_gaussians()

    def _make_gaussians(self) -> None:
        """Make Gaussians without images on the grids of the configuration."""
        config, grids_of_groups = self.config, self.config.grids
        assert grids_of_groups is not None
        self.gaussians = nn.ModuleList(
            PlaceGaussians(grids, whitening.dim, whitening.coarse_dim, config.shrinkage, config.floor)
            for grids, whitening in zip(zip(*grids_of_groups, strict=True), self._whitenings, strict=True)
        )

    # ---- levels and groups

    @property
    def _stage_dims(self) -> list[tuple[int, ...]]:
        """The channels of the stages of each level."""
        if isinstance(self.encoder, (Backbone, Outline)):
            return list(self.encoder.stage_dims)
        return [tuple(self.feature_dims)]

    @property
    def _fine_stages(self) -> list[int]:
        """The number of stages, from the first, that the map of each level is made of."""
        wanted, dims = self.config.map_stages, self._stage_dims
        if wanted is None:
            return list(getattr(self.encoder, "fine_stages", None) or [len(dims[0])])
        if wanted > min(map(len, dims)):
            raise ValueError(
                f"GaussianConfig.map_stages is {wanted}, and there are {min(map(len, dims))} stages (out_indices, or "
                "feature_dims without a backbone)"
            )
        return [wanted] * len(dims)

    @property
    def _whitenings(self) -> list[Whitening]:
        return list(cast(Any, self.whitenings))

    @property
    def _gaussians(self) -> list[PlaceGaussians]:
        return list(cast(Any, self.gaussians))

    @property
    def density_levels(self) -> int:
        """The levels that have Gaussians: one for each backbone."""
        return len(self.whitenings)

    @property
    def density_parts(self) -> int:
        """One for each backbone."""
        return len(self.whitenings)

    def make_ready(self) -> None:
        """Compute the Gaussians of all groups; else those of a group are when an image seems to be of it."""
        for gaussians in self._gaussians:
            gaussians.require(range(len(self.groups)))

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Raise a ValueError for numbers of images below 0."""
        for name, tensor in state.items():
            if name.endswith(".images") and (tensor < 0).any():
                raise ValueError(f"{name} holds a number of images below 0")

    @property
    def groups_are_classes(self) -> bool:  # type: ignore[override]
        """Whether each class has Gaussians of its own."""
        return self.config.grouping == "class"

    @property
    def groups(self) -> tuple[str, ...]:
        """The classes, or "all", or "cluster 0", "cluster 1", ..."""
        if self.config.grouping == "one":
            return ("all",)
        if self.config.grouping == "clusters":
            return tuple(f"cluster {k}" for k in range(self.config.n_clusters))
        return self.config.names

    def adopt_classes(self, names: tuple[str, ...], source: str) -> None:
        """Take over the class names of a dataset; without groups of classes they are for people alone."""
        if self.groups_are_classes:
            super().adopt_classes(names, source)
        elif not len(self.gaussians):
            self.config = self.config.replace(n_classes=len(names), class_names=names)

    @classmethod
    def likely_stages(cls, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> Any:
        """Return two stages a level, a fine and a coarse one, where both have as many values as they may."""
        dim, coarse_dim = config.dim, config.coarse_dim
        widths = [shapes.get(f"whitenings.{level}.matrix", ())[1:] for level in range(len(config.feature_dims or ()))]
        if config.map_stages is not None or not coarse_dim or any(width != (dim + coarse_dim,) for width in widths):
            return None
        return [((channels - coarse_dim, coarse_dim), 1) for channels in config.feature_dims]

    @property
    def fusion(self) -> str:
        """The maps of several backbones are added in units of the peaks of normal images."""
        return "standardised"

    @property
    def scored_on(self) -> str:
        """``"all"``: the image score is that of the map by all stages, where there are coarse ones; else ``"map"``."""
        return "all" if any(whitening.coarse_dim for whitening in self._whitenings) else "map"

    def describe(self) -> dict[str, Any]:
        """Return the sizes of the Gaussians, and how many images they know."""
        facts: dict[str, Any] = {}
        for level, (whitening, gaussians) in enumerate(zip(self._whitenings, self.gaussians, strict=False)):
            title = f"level {level}, " if len(self.gaussians) > 1 else ""
            facts[f"{title}dimensions"] = f"{whitening.dim}" + (
                f", {whitening.dim + whitening.coarse_dim} for the image score" if whitening.coarse_dim else ""
            )
            grids = ", ".join(f"{h} x {w}" for h, w in cast(PlaceGaussians, gaussians).distinct)
            facts[f"{title}places"] = grids
        if len(self.gaussians):
            counts = self._gaussians[0].images.tolist()
            facts["images a group"] = ", ".join(f"{n} {k}" for n, k in zip(self.groups, counts, strict=True))
        return facts

    # ---- fitting

    @torch.no_grad()
    def begin(self, feature_set: FeatureSet) -> None:
        """Fit the model to features of normal images, in closed form.

        The result has the same bits in whatever order the images come.

        Raises:
            ValueError: a class has fewer than 2 images, images of a group differ in their proportions, or features are
                not finite.
        """
        if self.groups_are_classes:
            counts = torch.bincount(feature_set.class_ids, minlength=self.config.n_classes).tolist()
            if few := [name for name, count in zip(self.groups, counts, strict=True) if count < 2]:
                raise ValueError(
                    f"class {few[0]!r} has fewer than 2 training images, beside those held out; a covariance takes 2: "
                    "give the class more images, leave it out, or pass the held-out ones as calibration="
                )
        sizes = self._fit_whitenings(feature_set)
        self.gaussians = nn.ModuleList()  # clusters are formed anew
        members = self._members(feature_set)
        if max(map(len, members)) < 2:
            raise ValueError(
                f"no group has 2 of the {len(feature_set)} training images, and a covariance takes 2: give more "
                "images, or fewer clusters"
            )
        self.config = self.config.replace(grids=self._grids(feature_set, sizes, members))
        self._make_gaussians()
        self.gaussians.to(self._whitenings[0].mean)
        self._add(feature_set, members)

    def finish(self, feature_set: FeatureSet) -> None:
        """Solve for the Gaussians; of several processes, all have the sums of the first by now."""
        self._solve()

    @plain_torch()
    @torch.no_grad()
    def add(self, data: Any, *, skip_bad: bool = False) -> None:
        """Add normal images to those that the Gaussians know. The whitening stays, and so do the thresholds.

        The result has the same bits in whatever order, and in whatever parts, images are added; of clusters it has as
        long as each image goes to the same one, which is the likeliest at the time. Afterwards `calibrate` on images
        that are in none of them. After an error the model is what it was.

        Args:
            data: as for `fit`.
            skip_bad: leave out images that cannot be decoded, with a warning, instead of stopping.

        Raises:
            ValueError: the model is not fitted; or as `begin`.
        """
        self._require_fitted()
        images = feature_set(cast(Any, self), data, skip_bad=skip_bad, on_bad=lambda error: warn_user(str(error)))
        before = self.gaussians
        try:
            self.take_images(images)
        except BaseException:
            self.gaussians = before
            raise

    @torch.no_grad()
    def take_images(self, feature_set: FeatureSet) -> bool:
        """Add normal images to the sums of their groups, in copies of these; return True.

        Raises:
            ValueError: the model is not fitted; images have other proportions than those of their group, or features
                are not finite.
        """
        self._require_fitted()
        self.gaussians = copy.deepcopy(self.gaussians)
        self._add(feature_set, self._members(feature_set))
        self.make_ready()
        return True

    @torch.no_grad()
    def grow(self, name: str, feature_set: FeatureSet) -> str:
        """Fit Gaussians of one class more. The whitening stays, and the others keep their bits.

        Raises:
            ValueError: the groups are not classes, the model is not fitted; or as `begin`.
        """
        if not self.groups_are_classes:
            raise ValueError(
                f"grouping is {self.config.grouping!r}: there are no Gaussians of single classes to add one to; absorb "
                "normal images of the new product (model.absorb, hgad-fast absorb), or fit with grouping='class'"
            )
        self._require_fitted()
        if len(feature_set) < 2:
            raise ValueError(
                f"class {name!r} has fewer than 2 training images, beside those held out; a covariance takes 2: give "
                "more images, or pass the held-out ones as calibration="
            )
        sizes = [
            tuple((x.shape[2], x.shape[3]) for x in self._joined([level[None] for level in levels]))
            for levels in feature_set.images
        ]
        grid = self._grid(name, feature_set, sizes, Counter(sizes))
        self.gaussians = nn.ModuleList(
            gaussians.extended(level_grid) for gaussians, level_grid in zip(self._gaussians, grid, strict=True)
        )
        members: list[list[int]] = [[] for _ in self.groups]
        self.config = self.config.with_class(name, grids=(*cast(Any, self.config.grids), grid))
        self._add(feature_set, [*members, list(range(len(feature_set)))])
        self.make_ready()
        return ""

    @contextmanager
    @torch.no_grad()
    def without(self, images: FeatureSet) -> Iterator[None]:
        """For the length of the block forget some of the images that the Gaussians know; the whitening stays.

        The Gaussians have the bits that they would have without those images, and afterwards those of before. Images
        that they do not know would spoil them.

        Raises:
            ValueError: the model is not fitted, or its groups are clusters, which do not note which images they have.
        """
        self._require_fitted()
        if self.config.grouping == "clusters":
            raise ValueError(
                "grouping is 'clusters': which images a cluster knows is not noted, so none can be left out"
            )
        members, before = self._members(images), self.gaussians
        self.gaussians = copy.deepcopy(before)
        try:
            self._add(images, members, sign=-1)
            yield
        finally:
            self.gaussians = before

    def _fit_whitenings(self, feature_set: FeatureSet) -> list[tuple[tuple[int, int], ...]]:
        """Fit the whitenings to a part of the pixels of each image; return the (h, w) of each image's levels."""
        quota = MOMENT_PIXELS / max(len(feature_set), 1)
        moments = [Moments() for _ in self.whitenings]
        sizes = []
        for i in range(len(feature_set)):
            maps = self._joined([level[None] for level in feature_set.images[i]])
            sizes.append(tuple((x.shape[2], x.shape[3]) for x in maps))
            for x, level_moments in zip(maps, moments, strict=True):
                if not x.isfinite().all():
                    raise ValueError(
                        f"{feature_set.name(i)} has a NaN or an infinity in its features: look at the image, or at the "
                        "weights of the backbone"
                    )
                step = max(1, int(math.sqrt(x[0, 0].numel() / quota)))
                first = [min(step, n) // 2 for n in x.shape[2:]]
                level_moments.add(x[0, :, first[0] :: step, first[1] :: step].flatten(1).T)
        for whitening, level_moments, dims, fine in zip(
            self._whitenings, moments, self._stage_dims, self._fine_stages, strict=True
        ):
            whitening.fit(level_moments, dims, fine)
        return sizes

    def _members(self, feature_set: FeatureSet) -> list[list[int]]:
        """Return the numbers of the images of each group."""
        if self.config.grouping == "one":
            return [list(range(len(feature_set)))]
        if self.groups_are_classes:
            ids = feature_set.class_ids
        elif len(self.gaussians):  # images that are added go where they are most likely
            ids = torch.cat(
                [
                    self.densities(FeatureMaps.of([x[None] for x in feature_set.images[i]]), None).group_ids
                    for i in range(len(feature_set))
                ]
            )
        else:
            ids = self._clusters(feature_set)
        return [(ids == k).nonzero().flatten().tolist() for k in range(len(self.groups))]

    def _clusters(self, feature_set: FeatureSet) -> Tensor:
        """Return the cluster (n,) of each image, by k-means of the means of its whitened features."""
        from sklearn.cluster import KMeans

        count = self.config.n_clusters
        if len(feature_set) < count:
            raise ValueError(
                f"GaussianConfig.n_clusters is {count}, and there are {len(feature_set)} training images; take fewer"
            )
        vectors = np.stack(
            [
                np.concatenate([y.mean(0).double().cpu().numpy() for y, _ in self._whitened_image(feature_set, i)])
                for i in range(len(feature_set))
            ]
        )
        order = np.lexsort(vectors.T)  # the seeding of k-means goes by the order of the images
        kmeans = KMeans(count, n_init=10, random_state=self.config.seed % 2**32)
        ids = np.empty(len(vectors), np.int64)
        ids[order] = kmeans.fit_predict(vectors[order])
        return torch.from_numpy(ids)

    def _grids(
        self, feature_set: FeatureSet, sizes: Sequence[tuple[tuple[int, int], ...]], members: list[list[int]]
    ) -> tuple[Any, ...]:
        """Return the `_grid` of each group; an empty cluster has that of all images."""
        of_groups = [Counter(sizes[i] for i in rows) for rows in members]
        everywhere = Counter(sizes)
        common = min(everywhere, key=lambda size: (-everywhere[size], size))
        return tuple(
            self._grid(name, feature_set, sizes, counts) if counts else common
            for name, counts in zip(self.groups, of_groups, strict=True)
        )

    def _grid(
        self,
        name: str,
        feature_set: FeatureSet,
        sizes: Sequence[tuple[tuple[int, int], ...]],
        counts: Counter[tuple[tuple[int, int], ...]],
    ) -> tuple[tuple[int, int], ...]:
        """Return the grid of each level of a group: the most frequent size of its images, and of equals the least.

        Args:
            name: of the group.
            feature_set, sizes: all images, and the (h, w) of the levels of each.
            counts: how many images of the group have each size.

        Raises:
            ValueError: an image of the group has other proportions.
        """
        grid = min(counts, key=lambda size: (-counts[size], size))
        for size in counts:
            misfits = [level for level, pair in enumerate(zip(size, grid, strict=True)) if not grid_fits(*pair)]
            if misfits:
                two = " and ".join(
                    f"{self._in_pixels(each[misfits[0]], misfits[0])} ({feature_set.name(sizes.index(each))})"
                    for each in (size, grid)
                )
                raise ProportionsError(
                    f"training images of {name!r} have {two}, height x width as they are seen: their "
                    "proportions differ by more than 5%, so that their places do not correspond. Give "
                    f"{'each class' if self.groups_are_classes else 'all'} images of one shape, or set "
                    "square=True or center_crop=True"
                )
        return grid

    def _add(self, feature_set: FeatureSet, members: list[list[int]], sign: int = 1) -> None:
        """Add images to the sums of their groups; with a `sign` of -1 take them out."""
        for k, rows in enumerate(members):
            together = max(1, PIXELS_TOGETHER // max(math.prod(gaussians.grids[k]) for gaussians in self._gaussians))
            for start in range(0, len(rows), together):
                images = [self._on_grid(feature_set, i, k) for i in rows[start : start + together]]
                for gaussians, level_images in zip(self._gaussians, zip(*images, strict=True), strict=True):
                    gaussians.add(k, torch.stack(level_images), sign)

    def _solve(self) -> None:
        for gaussians in self._gaussians:
            gaussians.solve()

    def _on_grid(self, feature_set: FeatureSet, i: int, group: int) -> list[Tensor]:
        """Return the whitened features (P, D) of each level of image i, on the grids of its group."""
        on_grids = []
        for level, (y, size) in enumerate(self._whitened_image(feature_set, i)):
            grid = self._gaussians[level].grids[group]
            if not grid_fits(size, grid):
                raise ProportionsError(f"{feature_set.name(i)}: {self._misfit(size, [group], level)}")
            on_grids.append(y if size == grid else y[places(grid, size, y.device)])
        return on_grids

    def _whitened_image(self, feature_set: FeatureSet, i: int) -> Iterator[tuple[Tensor, tuple[int, int]]]:
        """Yield the whitened features (h w, D) of each level of image i, and their (h, w)."""
        return self._whitened([level[None].to(self.device) for level in feature_set.images[i]])

    def _whitened(self, levels: Sequence[Tensor]) -> Iterator[tuple[Tensor, tuple[int, int]]]:
        """Yield the whitened features (B h w, D) of each level, image after image, and their (h, w)."""
        for x, whitening in zip(self._joined(levels), self._whitenings, strict=True):
            pixels = x.permute(0, 2, 3, 1).flatten(0, 2)
            with float32_products(self.device):
                y = whitening(pixels)
            yield y, (x.shape[2], x.shape[3])

    def _joined(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Return the levels (B, C, h, w): the encoder's, or one of what the user brings, joined on one grid."""
        joining = self._joining([(x.shape[2], x.shape[3]) for x in levels])
        return [joined(levels, *joining)] if joining else list(levels)

    def _joining(self, sizes: Sequence[tuple[int, int]]) -> Joining | None:
        """Return how levels of these (h, w) are joined: the arguments of `joined`; None: they are not."""
        if isinstance(self.encoder, Backbone) or len(sizes) == 1:
            return None
        return [1 / math.sqrt(h * w) for h, w in sizes], self._fine_stages[0] - 1

    def _require_fitted(self) -> None:
        """Raise a ValueError where there are no Gaussians yet."""
        if not len(self.gaussians):
            raise ValueError("the model is not fitted: call fit on normal images first")

    def _misfit(self, size: tuple[int, int], groups: Sequence[int], level: int = 0) -> str:
        """Return the error for a feature map whose places are not those of any of the groups."""
        gaussians = self._gaussians[level]
        fitted = {gaussians.grids[k] for k in groups if int(gaussians.images[k])}
        grids = ", ".join(self._in_pixels(grid, level) for grid in sorted(fitted)) or "none"
        subject = "an image seen at" if self._knows_pixels else "a feature map of"
        return (
            f"{subject} {self._in_pixels(size, level)} (height x width) has other proportions, by more than 5%, than "
            f"the {grids} that the model was fitted to, so that its places do not correspond: crop or pad the image to "
            "the shape of the training images, or train with center_crop=True"
        )

    @property
    def _knows_pixels(self) -> bool:
        """Whether the size of an image as it is seen follows, to a cell, from that of its feature map."""
        return type(self.encoder) is Backbone

    def _in_pixels(self, size: tuple[int, int], level: int) -> str:
        """Return the size of an image as it is seen, or where that is not known of its feature map."""
        if self.encoder is None or not self._knows_pixels:
            return f"{_times(size)} cells"
        stride = self.encoder.strides[level]
        return f"about {_times([n * stride for n in size])} pixels"

    # ---- scoring

    @torch.no_grad()
    def densities(self, maps: FeatureMaps, group_ids: Tensor | None) -> Densities:
        """Return the log-density of each pixel under its image's class, over D, and its Mahalanobis distances.

        Without `group_ids` an image takes the class with the largest sum over the levels of the mean log-density over
        the pixels, divided by D.

        Raises:
            ValueError: the maps have other proportions than the training images.
        """
        self._require_fitted()
        levels = list(self._whitened([x.to(self.device) for x in maps.whole()]))
        given = None if group_ids is None else sorted(set(group_ids.tolist()))
        wanted = self._fitting([size for _, size in levels], given)
        by_group: dict[int, list[Distances]] = {}
        if group_ids is None:
            infer = self._infer_one if maps.batch == 1 and self.device.type == "cpu" else self._infer
            group_ids, by_group = infer(levels, maps.batch, wanted)
        else:
            by_group = {k: [g.distances(y, size, k) for (y, size), g in self._by_level(levels)] for k in wanted}
        logps, distances, all_distances = [], {}, {}
        for level, ((_, size), gaussians) in enumerate(self._by_level(levels)):
            width = gaussians.width
            shape = maps.batch, *size
            of_image = [by_group[k][level] for k in group_ids.tolist()]
            fine, total = (
                torch.stack([x.view(shape)[i] for i, x in enumerate(squares)])
                for squares in zip(*of_image, strict=True)
            )
            log_dets = torch.stack([gaussians.log_dets(size, k).view(size) for k in group_ids.tolist()])
            name = self._part_names[level]
            distances[name] = fine.sqrt() - math.sqrt(gaussians.dim)
            all_distances[name] = total.sqrt() - math.sqrt(width)
            logps.append(-(total + log_dets + width * LOG_2_PI) / (2 * width))
        return GaussianDensities(logps, [], group_ids, distances, all_distances)

    def _fitting(self, sizes: Sequence[tuple[int, int]], given: Sequence[int] | None) -> list[int]:
        """Return the groups with images whose grids fit maps of these (h, w), one a level; or those given, if they do.

        Raises:
            ProportionsError: there are none, or one of those given is none of them.
        """
        fitting = [
            k
            for k in range(len(self.groups))
            if int(self._gaussians[0].images[k])
            and all(grid_fits(size, gaussians.grids[k]) for size, gaussians in self._by_level(sizes))
        ]
        if not fitting if given is None else not set(given) <= set(fitting):
            raise ProportionsError(self._misfit(sizes[0], range(len(self.groups)) if given is None else given))
        return fitting if given is None else list(given)

    def density_graph(self, sizes: Sequence[tuple[int, int]], group: int | None = None) -> nn.Module:
        """Return the densities of features of these sizes as plain operations; see `Detector`.

        Densities and distances of images that are given a group whose places do not correspond to theirs are NaN.

        Raises:
            ValueError: the model is not fitted, or the sizes are of other proportions than the training images.
        """
        self._require_fitted()
        joining = self._joining(sizes)
        on_grid = [sizes[joining[1]]] if joining else list(sizes)
        groups = self._fitting(on_grid, None if group is None else [group])
        levels = [
            PlaceGraph(whitening, gaussians, groups, size)
            for size, whitening, gaussians in zip(on_grid, self._whitenings, self._gaussians, strict=True)
        ]
        joining_graph = JoiningGraph(sizes, *joining) if joining else None
        return GaussianGraph(dict(zip(self._part_names, levels, strict=True)), joining_graph, group, len(self.groups))

    def _by_level(self, levels: Sequence[Any]) -> Iterator[tuple[Any, PlaceGaussians]]:
        return zip(levels, self._gaussians, strict=True)

    @property
    def _part_names(self) -> list[str]:
        """The names of the parts of the densities: where there are several, the backbones, numbered if two are one."""
        if len(self.whitenings) == 1:
            return ["likelihood"]
        names = str(self.config.backbone_arch).split("+")
        return names if len(set(names)) == len(names) else [f"{name} ({i})" for i, name in enumerate(names)]

    def _infer(
        self, levels: Sequence[tuple[Tensor, tuple[int, int]]], batch: int, fitting: list[int]
    ) -> tuple[Tensor, dict[int, list[Distances]]]:
        """Return the class of each image, (B,) on the CPU, and all distances to each class."""
        by_group: dict[int, list[Distances]] = {k: [] for k in fitting}
        evidence = torch.zeros(batch, len(fitting), dtype=torch.float64, device=self.device)
        for (y, size), gaussians in self._by_level(levels):
            for j, members in enumerate(gaussians.members):
                if not set(members) & set(fitting):
                    continue
                fine, total = gaussians.all_distances(j, y, size)
                for row, k in enumerate(members):
                    if k in by_group:
                        by_group[k].append(Distances(fine[:, row], total[:, row]))
            for column, k in enumerate(fitting):
                squares = by_group[k][-1].total.view(batch, -1)
                evidence[:, column] += evidence_of(
                    squares.mean(1, dtype=torch.float64), gaussians.mean_log_det(size, k), gaussians.width
                )
        return torch.tensor(fitting)[evidence.argmax(1).cpu()], by_group

    def _infer_one(
        self, levels: Sequence[tuple[Tensor, tuple[int, int]]], batch: int, fitting: list[int]
    ) -> tuple[Tensor, dict[int, list[Distances]]]:
        """Return what `_infer` does, but the distances to the winner alone, of a single image on a CPU.

        There, reading the Gaussians is what takes time. The distances by the first band of the values take little of
        it, and are no larger than those by all: by them a class seems likelier than it is. So the class that seems
        likeliest takes the next band, until it is one that has all. As a rule that is the first: classes differ most
        in the first principal components. Likewise the Gaussians of a class are computed when it first seems likeliest,
        and until then a lower bound of their log-determinants does.
        """
        added: dict[int, list[list[Tensor]]] = {k: [] for k in fitting}  # to the distances, at each level by each band
        first_means: dict[int, list[float]] = {k: [] for k in fitting}  # of these, at each level by the first band
        for (y, size), gaussians in self._by_level(levels):
            for j, members in enumerate(gaussians.members):
                if not set(members) & set(fitting):
                    continue
                squares = gaussians.added_by(0, y, size, j)
                means = squares.mean(0, dtype=torch.float64).tolist()
                for k, of_group, mean in zip(members, squares.split(1, 1), means, strict=True):
                    if k in added:
                        added[k].append([of_group])
                        first_means[k].append(mean)

        def by_first_bands(k: int) -> float:
            return sum(
                evidence_of(mean, gaussians.least_mean_log_det(size, k), gaussians.width)
                for mean, ((_, size), gaussians) in zip(first_means[k], self._by_level(levels), strict=True)
            )

        seeming = {k: by_first_bands(k) for k in fitting}  # evidence by the bands that were read
        while True:
            best = max(seeming, key=seeming.__getitem__)
            if any(gaussians.require((best,)) for gaussians in self._gaussians):
                seeming[best] = by_first_bands(best)
                continue
            by_level = list(zip(added[best], levels, self._gaussians, strict=True))
            unread = [level for level in by_level if len(level[0]) < len(level[2].bands)]
            if not unread:
                return torch.tensor([best]), {best: [gaussians.added(bands) for bands, _, gaussians in by_level]}
            for bands, (y, size), gaussians in unread:
                bands.append(gaussians.added_by(len(bands), y, size, *gaussians.position(best)))
                seeming[best] -= float(bands[-1].mean(dtype=torch.float64)) / (2 * gaussians.width)

    def official_maps(self, batches: Sequence[Densities]) -> dict[str, OfficialMaps]:
        """Return the maps of the distances and their scores with the class given and without calibration.

        Nothing was published: it is what the honest protocol does, but for the class and the weights of the maps.
        """
        size = (self.config.msk_size, self.config.msk_size)

        def maps_of(scope: str) -> Tensor:
            maps = []
            for batch in batches:
                levels = [level for (level,) in batch.anomalies(torch.empty(0), scope)]  # (B, h, w) of each backbone
                for image in zip(*levels, strict=True):
                    maps.append(torch.stack([resized_and_blurred(level, size) for level in image]).sum(0))
            return torch.stack(maps)

        shown = maps_of("map")
        scores = (shown if self.scored_on == "map" else maps_of(self.scored_on)).amax((1, 2))
        return {"": OfficialMaps(shown, scores, "Mahalanobis distances, not calibrated")}

    def scoring_bytes(self, sizes: Sequence[tuple[int, int]], group_known: bool) -> tuple[int, int]:
        """Return the bytes of the distances to each class, and those of the joined and the whitened features."""
        channels = max(sum(dims) for dims in self._stage_dims)
        width = max(whitening.dim + whitening.coarse_dim for whitening in self._whitenings)
        pixels = sum(h * w for h, w in sizes)
        return 8 * pixels * (1 if group_known else len(self.groups)), 4 * pixels * (2 * channels + 3 * width)


def _times(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))
