"""VQFlowModel: flows conditioned on vector-quantised prototypes and patterns (VQ-Flow, arXiv 2409.00942)."""

from __future__ import annotations

import copy
import math
import re
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..features.backbone import Backbone, FeatureMaps
from ..features.extract import FeatureSet
from ..methods import register
from ..modules.codebook import SEED_ROWS, Codebook
from ..modules.conditions import ConditionMaps, Conditions
from ..modules.convolutional_flow import (
    ConvolutionalFlow,
    FusionFlow,
    Known,
    PrototypePrior,
    channels_last,
)
from ..modules.convolutional_graph import ConditionGraph, FlowGraph, FusionGraph, PriorGraph, condition_values
from ..modules.groups import group_numbers
from ..modules.synchronised import exchanging, process_count
from ..ops.dispatch import float32_products
from ..protocol import About, Densities, OfficialMaps, Progress
from ..training.schedule import warmed_up_cosine
from ..training.step import Batch
from .config import VQFlowConfig
from .detector import Detector, varied
from .vqflow_maps import official_maps_of
from .vqflow_official import official_state

SEED_BATCHES = 10  # whose features the codes are seeded from
OFFICIAL_WARM_UP = 10  # passes
PERMUTATION = re.compile(r"^(parallel_flows|fusion_flow)\..*permutation(_\d+)?$")  # a tensor that is one


# The variants of an ablation, by the fields of the configuration that differ: each has one fault of the official code.
VARIANTS: dict[str, dict[str, Any]] = {
    "vqflow": {},
    "random-codes": {"vq_init": "randn0", "vq_revive": False},
    "no-prior-logdet": {"prior_logdet": False, "prior_std": "signed"},
    "summed-likelihood": {"nll_reduction": "sum"},
    "latents-alone": {"score_density": "latent"},
    "image-maxima": {"score_norm": "image_max", "score_density": "latent"},
}


class Latents(NamedTuple):
    """What the flows make of B images.

    Attributes:
        z: (B, h, w, C) of each level, standard normal where the images are normal.
        log_det: (B, h, w) of each level, each pixel's part of the log-determinant of the flows.
        prior_log_std: (B,) of each level, the sum over its pixels and channels of the logarithm of the prior's standard
            deviation: the log-determinant of the standardisation is its negative.
        conditions: prototypes, patterns and their commitment.
    """

    z: list[Tensor]
    log_det: list[Tensor]
    prior_log_std: list[Tensor]
    conditions: ConditionMaps

    def nll(self, with_prior: bool = True) -> Tensor:
        """Return the negative log-density of each image but for its constant (C h w / 2) log 2 pi, (B,), in nats.

        Args:
            with_prior: include the prior's standard deviation. The official loss leaves it out, and so can fall
                without bound.
        """
        half_squares = sum(z.square().sum((1, 2, 3)) / 2 for z in self.z)
        log_det = sum(level.sum((1, 2)) for level in self.log_det)
        total = half_squares - log_det
        if with_prior:
            total = total + sum(self.prior_log_std)
        assert isinstance(total, Tensor)
        return total

    @property
    def dims(self) -> int:
        """The number of values that an image has in all levels, over which a density may be averaged."""
        return sum(z[0].numel() for z in self.z)


@dataclass
class VQFlowDensities(Densities):
    """Densities with those that the published maps are made of.

    Attributes:
        latent_logps: per level (B, h, w), the mean over the channels of -z^2 / 2, without the log-determinant.
    """

    latent_logps: list[Tensor] = field(default_factory=list)

    def images(self) -> Iterator[Densities]:
        """Yield the densities of one image after the other, with B = 1."""
        for i, image in enumerate(super().images()):
            latent_logps = [level[i : i + 1] for level in self.latent_logps]
            yield VQFlowDensities(image.logps, image.neg_entropy, image.group_ids, latent_logps)


@register
class VQFlowModel(Detector):
    """One anomaly detector for all products without their labels: VQ-Flow, with the faults of its official code mended.

    Every image takes the nearest of K_p prototypes, every pixel the nearest of K_s patterns; flows of three levels,
    conditioned on both, map the features to a Gaussian whose mean and standard deviation follow from the prototype, and
    a fusion flow joins the levels. Thresholds are kept for prototypes, so that no class is needed. docs/vqflow.md says
    what differs from the official code and why.

    Args:
        config: a `VQFlowConfig`.

    Attributes:
        conditions: semantic networks and codebooks.
        parallel_flows: the flow of each level.
        prior: means and standard deviations by prototype.
        fusion_flow: joins the levels.
        prototype_images: (K_p, n_classes) int64, the training images of each prototype by their labels, after `fit`.
    """

    config_class = VQFlowConfig
    config: VQFlowConfig
    encoder: Backbone | None
    groups_are_classes = False
    pointwise = False
    about = About(
        "VQ-Flow: flows conditioned on prototypes and patterns that the images form by themselves (arXiv 2409.00942)",
        "It holds the weights of the flows, prototypes and patterns, which are running means of what networks make of "
        "features, and how many training images of each class every prototype has.",
        ("Thresholds are those of prototypes: products that share a prototype share its threshold.",),
    )
    loss_terms = {
        "L_nll": ("Negative log-density", "How surprising the normal images are, in nats per value; it should fall."),
        "L_prototype": ("Distance to the prototypes", "Of the images' semantic vectors; small is good."),
        "L_pattern": ("Distance to the patterns", "Of the pixels' vectors, summed over the levels; small is good."),
        "prototypes": ("Prototypes in use", "exp of the entropy of their shares; it should not fall to 1."),
        "patterns": ("Patterns in use", "The same of a level's patterns, on average; it should not fall to 1."),
    }
    prototype_images: Tensor

    def build(self) -> None:
        """Make networks, codebooks and flows."""
        config, dims = self.config, self.feature_dims
        *flow_dims, _ = dims
        if odd := [c for c in flow_dims if c % 2]:
            raise ValueError(
                f"a feature level has {odd[0]} channels; the fusion flow halves them, so choose a backbone_arch and "
                "out_indices with even numbers"
            )
        self.conditions = Conditions(
            dims,
            config.n_prototypes,
            config.n_patterns,
            config.prototype_dim,
            config.pos_embed_dim if config.concat_pos else 0,
            config.quantize_type == "residual",
            config.vq_revive,
        )
        condition_dim = self.conditions.condition_dim
        self.parallel_flows = nn.ModuleList(
            ConvolutionalFlow(c, condition_dim, blocks, config.hidden_channels, config.clamp_alpha)
            for c, blocks in zip(flow_dims, config.coupling_layers, strict=True)
        )
        self.prior = PrototypePrior(config.prototype_dim, flow_dims, config.prior_std)
        self.fusion_flow = FusionFlow(flow_dims, condition_dim, config.clamp_alpha)
        size = config.n_prototypes, config.n_classes
        self.register_buffer("prototype_images", torch.zeros(size, dtype=torch.int64))

    # ---- groups

    @property
    def groups(self) -> tuple[str, ...]:
        """The prototypes, "prototype 0", "prototype 1", ..."""
        return tuple(f"prototype {k}" for k in range(self.config.n_prototypes))

    @property
    def density_levels(self) -> int:
        """The levels that have a flow: all but the top level."""
        return len(self.feature_dims) - 1

    @property
    def preparation(self) -> str:  # type: ignore[override]
        """The pooling of the features; empty without."""
        return "" if self.config.pool_type == "none" else f"{self.config.pool_type}-pooled"

    def adopt_classes(self, names: tuple[str, ...], source: str) -> None:
        """Take over the class names of the dataset that is trained on: prototypes are described by them, no more.

        A trained model keeps its own, whatever it is calibrated on.
        """
        if not self.prototype_images.any():
            self.config = self.config.replace(n_classes=len(names), class_names=names)
            size = self.config.n_prototypes, self.config.n_classes
            self.prototype_images = self.prototype_images.new_zeros(size)

    def describe(self) -> dict[str, Any]:
        """Return the sizes of the model, and which images its prototypes hold."""
        config = self.config
        facts = {
            "coupling layers": ", ".join(map(str, config.coupling_layers)),
            "patterns a level": config.n_patterns,
            "prototypes": config.n_prototypes,
        }
        counts = self.prototype_images.cpu()
        if int(counts.sum()):
            used = counts.sum(1) > 0
            facts["prototypes in use"] = f"{int(used.sum())} of {config.n_prototypes}"
            facts["images a prototype"] = ", ".join(
                f"{k}: {int(counts[k].sum())} {_largest_class(counts[k], self.class_names)}"
                for k in used.nonzero().flatten().tolist()
            )
            facts["purity"] = f"{self.purity:.1%} of the training images are of their prototype's largest class"
        return facts

    @property
    def purity(self) -> float:
        """Return the share of the training images that are of their prototype's largest class; NaN before `fit`."""
        counts = self.prototype_images
        total = int(counts.sum())
        return int(counts.amax(1).sum()) / total if total else math.nan

    # ---- features

    def prepare(self, features: list[Tensor]) -> list[Tensor]:
        """Return the features with all levels but the top one pooled, 3 x 3 with stride 2.

        Zeros around the map count in the mean, as published. A model in float64 pools in float64.
        """
        features = [x.to(torch.promote_types(x.dtype, self.prior.dtype)) for x in features]
        return _pooled(features, self.config.pool_type)

    def _checked(self, levels: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return features (B, C, h, w) of each level in the model's dtype.

        Raises:
            ValueError: their sizes do not fit each other.
        """
        self._check_sizes([(x.shape[2], x.shape[3]) for x in levels])
        dtype = self.prior.dtype
        return [x.to(dtype) for x in levels]

    def _check_sizes(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Raise a ValueError where the sizes of prepared features do not fit each other."""
        side = sizes[-1][0]
        if any(h != w or h % side for h, w in sizes):
            remedy = "" if self.config.pool_type == "none" else "; pool_type='none' leaves the finer levels as they are"
            raise ValueError(
                f"the prepared feature maps have the sizes {', '.join(f'{h} x {w}' for h, w in sizes)}; VQ-Flow takes "
                f"squares, each as large as the top level's or a multiple of it{remedy}"
            )

    def _prepared_sizes(self, sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return the sizes of features of these sizes after `prepare`."""
        if self.config.pool_type == "none":
            return list(sizes)
        return [*((-(-h // 2), -(-w // 2)) for h, w in sizes[:-1]), sizes[-1]]

    # ---- the model

    def latents(self, levels: Sequence[Tensor], prototype_ids: Tensor | None = None, known: bool = False) -> Latents:
        """Return what the flows make of prepared features (B, C, h, w) of each level, the top level last.

        In training mode the codebooks and batch norms learn from them.

        Args:
            levels: the features.
            prototype_ids: (B,) int64, the images' prototypes; None: the nearest ones.
            known: keep tables of the codes for the next call; for scoring, without gradients.
        """
        with float32_products(self.device):
            return self._latents(self._checked(levels), prototype_ids, known)

    def _latents(self, levels: Sequence[Tensor], prototype_ids: Tensor | None, known: bool) -> Latents:
        """Return what `latents` does, of features that are checked."""
        conditions = self.conditions(levels, prototype_ids)
        tables = self._known(conditions) if known else None
        standardised, log_dets, log_stds = [], [], []
        for level, (z, log_det) in enumerate(self._parallel(levels, conditions, tables)):
            mean, std = self.prior(conditions.prototype, level)
            standardised.append((z - mean[:, None, None]) / std[:, None, None])
            log_dets.append(log_det)
            log_stds.append(std.log().sum(1) * math.prod(z.shape[1:3]))
        fused, fusion_log_dets = self.fusion_flow(standardised, conditions.levels[-1], tables)
        if known:
            fused = [z + conditions.validity[:, None, None, None] for z in fused]
        log_dets = [a + b for a, b in zip(log_dets, fusion_log_dets, strict=True)]
        return Latents(fused, log_dets, log_stds, conditions)

    def _parallel(
        self, levels: Sequence[Tensor], conditions: ConditionMaps, known: Known | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what the flow of each level makes of it: z (B, h, w, C) and log-determinants (B, h, w)."""
        for flow, x, condition in zip(self.parallel_flows, levels[:-1], conditions.levels[:-1], strict=True):
            yield flow(channels_last(x), condition, known)

    def _known(self, conditions: ConditionMaps) -> Known:
        """Return the prototypes for which tables are kept."""
        books = [self.conditions.cpc_quantizer, *self.conditions.cspc_quantizers]
        codebooks = tuple(book.embed for book in books if isinstance(book, Codebook))
        return Known(self.conditions.cpc_quantizer.codes(), conditions.prototype_ids, codebooks)

    # ---- training

    @torch.no_grad()
    def begin(self, feature_set: FeatureSet) -> None:
        """Take the start from the first batches: the codes (``vq_init="kmeans"``), and the prior (``"softplus"``).

        Codes are placed on vectors spread by k-means++, the prototypes first, on which the patterns depend. The prior
        gets the mean and standard deviation of each channel of the latents, as the features of a backbone are far from
        standard normal. Batch norms are in training mode, as in the first steps; their statistics stay as they were.

        Raises:
            ValueError: there is one image only, images have several sizes, or features are not finite.
        """
        if len(feature_set) < 2:
            raise ValueError("VQ-Flow needs at least 2 training images: its batch norms compare those of a batch")
        with float32_products(self.device):
            self._begin(feature_set)

    def _begin(self, feature_set: FeatureSet) -> None:
        """Do what `begin` does."""
        config = self.config
        conditions = copy.deepcopy(self.conditions).train()
        codebooks = [module for module in conditions.modules() if isinstance(module, Codebook)]
        for codebook in codebooks:
            codebook.eval()
        order = torch.randperm(len(feature_set), generator=torch.Generator().manual_seed(config.seed)).tolist()
        size = min(config.batch_size, len(order))
        batches = [order[i : i + size] for i in range(0, len(order) - size + 1, size)][:SEED_BATCHES]

        def features(numbers: list[int]) -> Sequence[Tensor]:
            images = [feature_set.images[i] for i in numbers]
            for i, image in zip(numbers, images, strict=True):
                for level, x in enumerate(image):
                    if not x.isfinite().all():
                        raise ValueError(
                            f"{feature_set.name(i)} has a NaN or an infinity in its features of level {level}: look at "
                            "the image, or at the weights of the backbone"
                        )
            by_level = list(zip(*images, strict=True))
            for maps in by_level:
                _require_one_size((x.shape[1], x.shape[2]) for x in maps)
            return self._checked([torch.stack(maps).to(self.device) for maps in by_level])

        if config.vq_init == "kmeans":
            vectors = [conditions.semantic_vectors(features(numbers)[-1]) for numbers in batches]
            conditions.cpc_quantizer.seed(torch.cat(vectors), config.seed)
            places: list[list[Tensor]] = [[] for _ in self.feature_dims]
            for numbers in batches:
                levels = features(numbers)
                prototype, _ = conditions.prototypes(conditions.semantic_vectors(levels[-1]))
                for level, (pixels, _) in enumerate(conditions.pattern_vectors(levels, prototype)):
                    rows = pixels.flatten(0, 1)
                    places[level].append(rows[:: max(1, len(rows) * len(batches) // SEED_ROWS)])
            for quantizer, rows_of_batches in zip(conditions.cspc_quantizers, places, strict=True):
                assert isinstance(quantizer, Codebook)
                quantizer.seed(torch.cat(rows_of_batches), config.seed)
            own = [module for module in self.conditions.modules() if isinstance(module, Codebook)]
            for codebook, seeded in zip(own, codebooks, strict=True):
                codebook.load_state_dict(seeded.state_dict())
        if config.prior_std == "softplus":
            latents: list[list[Tensor]] = [[] for _ in self.parallel_flows]
            for numbers in batches:
                levels = features(numbers)
                for level, (z, _) in enumerate(self._parallel(levels, conditions(levels))):
                    latents[level].append(z.flatten(0, 2))
            for level, z_of_batches in enumerate(latents):
                self.prior.start(level, torch.cat(z_of_batches))

    def objective(self, stage: int) -> nn.Module:
        """Return the loss: negative log-density and commitment."""
        return VQFlowLoss(self)

    def schedule(self, progress: Progress) -> tuple[int, float]:
        """Return stage 1, and the rate: a warm-up over a tenth of the training and then a cosine, or the official one.

        The official rate rises over the first 11 passes from a tenth, and then stays (``lr_schedule="constant"``).
        """
        config = self.config
        if config.lr_schedule == "constant":
            passes = progress.meta_epoch * config.sub_epochs + progress.sub_epoch
            return 1, config.lr * (0.1 + 0.09 * min(passes, OFFICIAL_WARM_UP))
        return 1, warmed_up_cosine(progress, config, min(max(1, config.meta_epochs // 10), config.meta_epochs - 1))

    @torch.no_grad()
    def finish(self, feature_set: FeatureSet) -> None:
        """Count the training images of each prototype, by their labels where these are among the classes."""
        self.prototype_images.zero_()
        with _evaluating(self), float32_products(self.device):
            for i in range(len(feature_set)):
                top = feature_set.images[i][-1][None].to(self.device)
                _, chosen = self.conditions.prototypes(self.conditions.semantic_vectors(top))
                label = int(feature_set.class_ids[i])
                if 0 <= label < self.config.n_classes:
                    self.prototype_images[chosen.indices[0, 0], label] += 1

    @classmethod
    def variants(cls, config: VQFlowConfig, names: Sequence[str] | None = None) -> dict[str, VQFlowConfig]:
        """Return the configurations that an ablation compares: some of `VARIANTS`, or all of them.

        Raises:
            ValueError: an unknown name.
        """
        return varied(config, VARIANTS, names)

    # ---- scoring

    @torch.no_grad()
    def densities(self, maps: FeatureMaps, group_ids: Tensor | None) -> Densities:
        """Return each pixel's part of the log-density at each level, over C, with that of the fused latents alone.

        The part is -||z||^2 / 2 and, but for ``score_density="latent"`` (as published), the pixel's share of the flows'
        log-determinant. What all pixels of a prototype and level have in common is left out (log 2 pi, the prior's
        standard deviation): the calibration would take it away again. With ``score_norm="image_max"`` each image's
        largest value is subtracted, as published: scores are then relative to the image's own best place.
        """
        with _evaluating(self):
            z, log_dets, _, conditions = self.latents(maps.whole(), group_ids, known=True)
        return _densities(self.config, z, log_dets, conditions.prototype_ids.cpu())

    def density_graph(self, sizes: Sequence[tuple[int, int]], group: int | None = None) -> nn.Module:
        """Return the densities of features of these sizes as plain operations, in float32; see `Detector`."""
        sizes = self._prepared_sizes(sizes)
        self._check_sizes(sizes)
        return VQFlowGraph(self, sizes, group)

    @property
    def score_share(self) -> float:
        """The share of a map's pixels whose mean is the image score, of the configuration."""
        return self.config.score_share

    def official_maps(self, batches: Sequence[Densities]) -> dict[str, OfficialMaps]:
        """Return the published maps and scores, each image by itself; the first is that of ``config.map``."""
        latent = [replace(batch, logps=cast(VQFlowDensities, batch).latent_logps) for batch in batches]
        maps = official_maps_of(latent, self.config.msk_size)
        return {name: maps[name] for name in sorted(maps, key=lambda name: name != self.config.map)}

    @property
    def official_aupro(self) -> str:
        """How AUPRO is computed under the official protocols: ``config.pro``."""
        return self.config.pro

    @torch.no_grad()
    def log_density(self, features: Sequence[Tensor]) -> Tensor:
        """Return the log-density of prepared features (B, C, h, w) of each level, given their codes, (B,), in nats.

        It is that of all pixels of all levels but the top one, which has none (paper, section on the prior; the
        constant and the prior's standard deviation included).
        """
        with _evaluating(self):
            latents = self.latents([x.to(self.device) for x in features], known=True)
        return -latents.nll() - latents.dims / 2 * math.log(2 * math.pi)

    def scoring_bytes(self, sizes: Sequence[tuple[int, int]], group_known: bool) -> tuple[int, int]:
        """Return the memory that the densities of an image take: nothing is held, and the largest step is a subnet.

        Tables of the codes, which stay, are counted to the model.
        """
        width = self.conditions.condition_dim
        pooled = self._prepared_sizes(sizes)
        maps = 4 * sum(c * h * w for c, (h, w) in zip(self.feature_dims, pooled, strict=True))
        subnets = [
            4 * h * w * (4 * (self.config.hidden_channels or c + width) + 4 * c)
            for c, (h, w) in zip(self.feature_dims, pooled, strict=True)
        ]
        return 0, 3 * maps + max(subnets)

    # ---- files

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Raise a ValueError for a permutation that is none, and for numbers of images below 0."""
        for name, tensor in state.items():
            if PERMUTATION.search(name) and not torch.equal(tensor.sort().values, torch.arange(len(tensor))):
                raise ValueError(f"{name} is no permutation")
        if (state["prototype_images"] < 0).any():
            raise ValueError("prototype_images holds a number of images below 0")

    def load_official_checkpoint(self, checkpoint: Any) -> None:
        """Take the weights of a checkpoint of the official code.

        Calibration and `prototype_images`, which belong to the weights before, are forgotten.

        Args:
            checkpoint: its path, or what it holds: a state dict for each named sub-module ("parallel_flows", ...), or
                one with these names as prefixes. It is read with ``weights_only=True``.

        Raises:
            ValueError: it is missing or damaged, or does not fit the configuration; or two levels with a flow have the
                same number of channels, so that it is ambiguous (see `vqflow_official.official_state`).
        """
        state = official_state(checkpoint, self.state_dict())
        self.load_state_dict(state, strict=False)
        self.prototype_images.zero_()
        self.calibration = None


class VQFlowGraph(nn.Module):
    """What `VQFlowModel.prepare` and `densities` compute, of features of fixed sizes; see `Detector.density_graph`.

    Args:
        model: the model.
        sizes: (h, w) of the prepared features of each level.
        group: the prototype of all images; None: inferred, or given with them.
    """

    groups: Tensor

    @torch.no_grad()
    def __init__(self, model: VQFlowModel, sizes: Sequence[tuple[int, int]], group: int | None) -> None:
        super().__init__()
        self.config = model.config
        self.register_buffer("groups", group_numbers(group, model.config.n_prototypes))
        parts: list[Any] = [
            copy.deepcopy(part).cpu().float().eval().requires_grad_(False)
            for part in (model.conditions, model.parallel_flows, model.prior, model.fusion_flow)
        ]
        conditions, flows, prior, fusion_flow = parts
        values = condition_values(conditions, sizes, group)
        self.conditions = ConditionGraph(conditions, values, group)
        levels = list(zip(flows, values, strict=False))
        self.flows = nn.ModuleList(FlowGraph(flow, of_level) for flow, of_level in levels)
        self.priors = nn.ModuleList(PriorGraph(prior, i, values[i].prototypes) for i in range(len(levels)))
        self.fusion_flow = FusionGraph(fusion_flow, values[-1], [h for h, _ in sizes[:-1]])

    def forward(self, levels: Sequence[Tensor], group_ids: Tensor | None) -> Densities:
        """Return the densities of features (B, C, h, w) of each level under the given prototypes, or those inferred."""
        levels = _pooled(levels, self.config.pool_type)
        conditions, prototype_ids, validity = self.conditions(levels, group_ids)
        standardised, log_dets = [], []
        for i, x in enumerate(levels[:-1]):
            z, log_det = self.flows[i](x, conditions[i])
            standardised.append(self.priors[i](z, conditions[i].prototypes))
            log_dets.append(log_det)
        fused, fusion_log_dets = self.fusion_flow(standardised, conditions[-1])
        log_dets = [a + b for a, b in zip(log_dets, fusion_log_dets, strict=True)]
        z_of_levels = [channels_last(z) + validity[:, None, None, None] for z in fused]
        return _densities(self.config, z_of_levels, log_dets, prototype_ids)


class VQFlowLoss(nn.Module):
    """The loss of a training: mean negative log-density of the images, and commitment of vectors to their codes.

    Its parameters are those of the model, and it has no buffers: codebooks and batch norms are alike in all processes,
    as they learn from all batches.
    """

    terms = tuple(VQFlowModel.loss_terms)

    def __init__(self, model: VQFlowModel) -> None:
        super().__init__()
        self.trained = nn.ParameterList(parameter for parameter in model.parameters() if parameter.requires_grad)
        self.model = (model,)  # not a submodule

    def forward(self, batch: Batch, pixels: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Return this process's part of the loss, and its terms (1, terms)."""
        (model,) = self.model
        config = model.config
        levels = []
        for groups in batch:
            _require_one_size((group.height, group.width) for group in groups)
            ((x, _, h, w, _),) = groups
            levels.append(x.view(-1, h, w, x.shape[1]).permute(0, 3, 1, 2))
        top, (_, _, h, w, _) = levels[-1], batch[-1][0]
        images = pixels[-1] / (h * w)  # of all processes
        with exchanging():
            latents = model.latents(levels)
            processes = process_count()
        conditions = latents.conditions
        nll = latents.nll(config.prior_logdet).sum() / images
        reported_nll = nll.detach() / latents.dims
        if config.nll_reduction == "per_dim":
            nll = nll / latents.dims
        loss = nll + config.commitment * (conditions.prototype_loss + conditions.pattern_loss)
        books = model.conditions
        patterns = torch.stack([book.perplexity() for book in books.cspc_quantizers]).mean()  # type: ignore[operator]
        in_use = torch.stack([books.cpc_quantizer.perplexity(), patterns]) / processes
        terms = [reported_nll, conditions.prototype_loss.detach(), conditions.pattern_loss.detach(), *in_use]
        return loss, torch.stack([term.to(top.dtype) for term in terms])[None]


def _pooled(features: Sequence[Tensor], kind: str) -> list[Tensor]:
    """Return features (B, C, h, w) with all levels but the last one pooled as `VQFlowConfig.pool_type` says."""
    *fine, top = features
    if kind == "none":
        return [*fine, top]
    pool = F.avg_pool2d if kind == "avg" else F.max_pool2d
    return [*(pool(x, 3, 2, 1) for x in fine), top]


def _densities(
    config: VQFlowConfig, z: Sequence[Tensor], log_dets: Sequence[Tensor], prototype_ids: Tensor
) -> VQFlowDensities:
    """Return the densities of latents z (B, h, w, C) of each level with their log-determinants (B, h, w)."""
    latent_logps = [-level.square().mean(-1) / 2 for level in z]
    logps = latent_logps
    if config.score_density == "full":
        logps = [a + b / level.shape[-1] for a, b, level in zip(latent_logps, log_dets, z, strict=True)]
    if config.score_norm == "image_max":
        logps = [level - level.amax((1, 2), keepdim=True) for level in logps]
    return VQFlowDensities(logps, [], prototype_ids, latent_logps)


@contextmanager
def _evaluating(model: VQFlowModel) -> Iterator[None]:
    """Put the model in evaluation mode: neither batch norms nor codebooks learn from what is scored.

    When the last of the threads that score leaves, every part has the mode that it had.
    """
    with _mode_lock:
        evaluated = _evaluated.setdefault(model.conditions, _Evaluated())  # copies of a model share this part
        evaluated.calls += 1
        evaluated.training += [module for module in model.modules() if module.training]
        if evaluated.training:
            model.eval()
    try:
        yield
    finally:
        with _mode_lock:
            evaluated.calls -= 1
            if not evaluated.calls:
                del _evaluated[model.conditions]
                for module in evaluated.training:
                    module.training = True


@dataclass
class _Evaluated:
    """How many calls have put a model in evaluation mode, and the parts that were in training mode before."""

    calls: int = 0
    training: list[nn.Module] = field(default_factory=list)


_mode_lock = threading.Lock()
_evaluated: weakref.WeakKeyDictionary[nn.Module, _Evaluated] = weakref.WeakKeyDictionary()


def _require_one_size(sizes: Iterable[tuple[int, int]]) -> None:
    """Raise a ValueError where the maps of one level, given by their sizes, differ in size."""
    different = sorted(set(sizes))
    if len(different) > 1:
        listed = ", ".join(f"{h} x {w}" for h, w in different)
        raise ValueError(f"feature maps of one level have the sizes {listed}; VQ-Flow takes images of one size")


def _largest_class(counts: Tensor, names: Sequence[str]) -> str:
    """Return the most frequent class of a prototype, of counts (classes,), with its share, in brackets."""
    return f"({names[int(counts.argmax())]} {int(counts.max()) / int(counts.sum()):.0%})"
