"""HGADModel: hierarchical Gaussian mixture normalizing flows (HGAD, arXiv 2403.13349) as a detector."""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..environment import bfloat16_instructions
from ..features.backbone import Backbone, FeatureMaps
from ..features.composite import make_backbone
from ..features.extract import FeatureSet
from ..methods import register
from ..modules.flow import OFFICIAL_NAMES, ConditionalFlow
from ..modules.flow_graph import LevelGraph
from ..modules.groups import group_numbers, groups_of_images, one_group
from ..modules.mixture import HierarchicalMixture, fitted_centres
from ..modules.scaling import feature_scaling
from ..ops import Blocks, SeparablePosition, flow_path
from ..protocol import About, Densities, Progress
from ..scoring.densities import chunk_pixels
from ..scoring.result import ScoreResult
from ..terminal import warn_user
from ..training.schedule import warmed_up_cosine
from ..training.step import Batch
from .config import LOSS_TERMS, Config, GaussianConfig, HGADConfig
from .detector import Detector, varied
from .official import OfficialSurface, config_from_args

WARM_UP_EPOCHS = 2  # meta-epochs of rising learning rate; also those of stage 1
STAGE_2 = LOSS_TERMS[3:]
LATENT_PIXELS = 2**16  # pixels, of all images together, that the centres of a class are fitted to
MAX_KEPT = 2**28  # bytes of densities that are kept until the class is known; beyond it, the pixels are scored twice

# The variants of an ablation, by the fields of the configuration that differ. The likelihood map says where a pixel is
# improbable for its class, the entropy map where the class is in doubt, which only a model of several well-separated
# classes can tell: mutual information teaches it. Where a single Gaussian maps all classes to one place (the
# "homogeneous mapping" of the paper), anomalous pixels land among the normal ones.
VARIANTS: dict[str, dict[str, Any]] = {
    "place-gaussian": {},  # see `place_gaussian_on`
    "single-gaussian": {
        **{"n_classes": 1, "class_names": ("all",), "n_intra_centers": 1, "loss_terms": ("L_g",)},
        "fusion": "likelihood",  # there is no other map
    },
    "inter-class": {"n_intra_centers": 1, "loss_terms": ("L_g",)},
    "mutual-information": {"n_intra_centers": 1, "loss_terms": ("L_g", "L_mi", "L_e")},
    "hgad": {},
    "hgad-lambda2-1": {"lambda2": 1.0},
}


@dataclass
class HGADDensities(Densities):
    """Densities of which some levels alone make the anomaly map.

    Attributes:
        map_levels: how many of the levels, from the first, do; None: all.
    """

    map_levels: int | None = None

    def anomalies(self, level_max: Tensor, scope: str = "map") -> list[list[Tensor]]:
        """Return what `Densities.anomalies` does: of the levels of the map, or with ``scope="all"`` of all."""
        parts = super().anomalies(level_max)
        return parts if scope == "all" else [levels[: self.map_levels] for levels in parts]


@register
class HGADModel(OfficialSurface, Detector):
    """One anomaly detector for all classes: hierarchical Gaussian mixture normalizing flows on frozen features.

    Args:
        config: an `HGADConfig`, or the official code's ``argparse.Namespace`` (unknown fields are tolerated; the model
            moves to ``args.device`` where there is one).

    Attributes:
        config: the settings, with `feature_dims` filled in.
        encoder: the frozen backbone, or None (``backbone_arch=None``).
        nfs: the flow of each level.
        mixture: the centres and weights of all levels.
        scaling: what brings the features of each level to scale; empty with ``feature_scaling="none"``. Densities are
            those of the scaled features, in training and scoring alike. Those of the features themselves differ by a
            constant of the level, the log-determinant of the scaling, on which neither calibrated maps nor classes
            depend; of the losses L_z alone does.
        calibration: the statistics of normal images that `score` uses, or None before `fit` or `calibrate`.
        checkpoint: the state of the training that this is: "last", or how it was chosen.

    Weights are initialised from ``config.seed`` alone; the global random state is left as it was.
    """

    config_class = HGADConfig
    config: HGADConfig
    encoder: Backbone | None
    about = About(
        "HGAD: normalizing flows to a mixture of Gaussians, several for each class (arXiv 2403.13349)",
        "It holds the weights of the flows, the centres of the mixture and, where features are scaled, means and "
        "deviations of the features of all training images together.",
    )
    loss_terms = {
        "L_g": ("Likelihood, all classes", "How surprising the normal images are; it should fall."),
        "L_mi": ("Mutual information", "How well the classes keep apart; it should rise."),
        "L_e": ("Entropy", "How unsure the class of a pixel is; small is good."),
        "L_g_intra": (
            "Likelihood, own class",
            "How surprising the normal images are to their own class; it should fall.",
        ),
        "L_z": ("Log-density, own class", "The same on the scale of the anomaly map; it should fall."),
    }
    stages = {2: "which also learns the centres within each class"}
    variant_options = ("centres",)

    def __init__(self, config: HGADConfig | argparse.Namespace | None = None, encoder: nn.Module | None = None) -> None:
        device = None
        if isinstance(config, argparse.Namespace):
            device = getattr(config, "device", None)
            config = config_from_args(config)
        super().__init__(config or HGADConfig(), encoder)
        self.memory = self.config.memory
        self.checkpoint_every = self.config.checkpoint_every
        self.precision = self.config.precision
        if device is not None:
            self.to(device)

    def build(self) -> None:
        """Make a flow for each level, and the mixture."""
        config, dims = self.config, self.feature_dims
        position_dim = config.pos_embed_dim if config.conditional else 0
        self.nfs = nn.ModuleList(
            ConditionalFlow(channels, config.coupling_layers, position_dim, config.clamp_alpha) for channels in dims
        )
        self.mixture = HierarchicalMixture(dims, config.n_classes, config.n_intra_centers)
        stages = getattr(self.encoder, "stage_dims", None) or [(channels,) for channels in dims]
        self.scaling = feature_scaling(config.feature_scaling, stages)

    @property
    def device(self) -> torch.device:
        """The device of the mixture."""
        return self.mixture.mus[0].device

    @property
    def memory(self) -> str:
        """Memory mode of the flows: auto, standard (activations are kept) or reversible. May be set at any time."""
        return self.nfs[0].memory

    @memory.setter
    def memory(self, memory: str) -> None:
        self.config = self.config.replace(memory=memory)
        for flow in self.nfs:
            flow.memory = memory

    @property
    def checkpoint_every(self) -> int:
        """Blocks from one kept input to the next when memory is reversible; 0: none. May be set at any time."""
        return self.nfs[0].checkpoint_every

    @checkpoint_every.setter
    def checkpoint_every(self, blocks: int) -> None:
        self.config = self.config.replace(checkpoint_every=blocks)
        for flow in self.nfs:
            flow.checkpoint_every = self.config.checkpoint_every

    @property
    def precision(self) -> str:
        """Operand precision of the subnets' products: fp32, tf32 or bf16. May be set at any time."""
        return self.nfs[0].precision

    @precision.setter
    def precision(self, precision: str) -> None:
        self.config = self.config.replace(precision=precision)
        for flow in self.nfs:
            flow.precision = precision

    @property
    def fusion(self) -> str:
        """The rule of the configuration that makes one map of likelihood and entropy map."""
        return self.config.fusion

    @property
    def density_parts(self) -> int:
        """Likelihood and entropy; one class has no entropy."""
        return 2 if self.config.n_classes > 1 else 1

    @property
    def scored_on(self) -> str:
        """``"all"`` levels, where some alone make the map (``config.map_levels``); else ``"map"``."""
        return "map" if self.config.map_levels in (None, len(self.nfs)) else "all"

    def describe(self) -> dict[str, Any]:
        """Return the sizes of the flows and of the mixture."""
        config = self.config
        precision = config.precision
        if precision == "bf16" and not bfloat16_instructions():
            precision += ", emulated on this machine's CPU: slower there than fp32"
        return {
            "coupling layers": config.coupling_layers,
            "centres per class": config.n_intra_centers,
            "precision": precision,
        }

    def _warn_of_emulation(self) -> None:
        """Warn where products of bfloat16 numbers are asked for that the processor does not have."""
        if self.precision == "bf16" and self.device.type == "cpu" and not bfloat16_instructions():
            warn_user(
                "precision is bf16, and this processor has no instructions for it: they are emulated, which is slower "
                "than fp32; choose it by model.precision = 'fp32', or for a training --set precision=fp32"
            )

    # ---- training

    @property
    def pixels_per_step(self) -> int | float | None:
        """That of the configuration."""
        return self.config.pixels_per_step

    def begin(self, feature_set: FeatureSet) -> None:
        """Take the scaling of the features from them, where there is one.

        Raises:
            ValueError: a feature is not finite.
        """
        self._warn_of_emulation()
        if not self.scaling:
            return
        scaling: Any = self.scaling
        moments = [level_scaling.moments() for level_scaling in scaling]
        for i, maps in enumerate(feature_set.images):
            for level, (level_moments, features) in enumerate(zip(moments, maps, strict=True)):
                if not features.isfinite().all():
                    raise ValueError(
                        f"{feature_set.name(i)} has a NaN or an infinity in its features of level {level}: look at the "
                        "image, or at the weights of the backbone"
                    )
                level_moments.add(features)
        for level_scaling, level_moments in zip(scaling, moments, strict=True):
            level_scaling.take(level_moments)

    def scaled(self, x: Tensor, level: int) -> Tensor:
        """Return features (N, C) of a level as its flow takes them; see `feature_scaling`."""
        return self.scaling[level](x) if self.scaling else x

    @torch.no_grad()
    def grow(self, name: str, feature_set: FeatureSet) -> str:
        """Fit the centres of one class more to the latents of its images. The flows stay.

        Raises:
            ValueError: the only class so far was calibrated without an entropy map, and is to have one now.
        """
        config = self.config
        if config.n_classes == 1 and config.fusion != "likelihood":
            raise ValueError(
                f"the model knows one class, whose maps are made without entropy; with fusion={config.fusion!r} a "
                "second class would change them, and no threshold would hold. Train anew with both classes, or set "
                "model.config = model.config.replace(fusion='likelihood'), calibrate, and add the class then"
            )
        quota = LATENT_PIXELS / len(feature_set)
        latents: list[list[Tensor]] = [[] for _ in self.nfs]
        for maps in feature_set.images:
            for level, x in enumerate(maps):
                channels, height, width = x.shape
                step = max(1, int(math.sqrt(height * width / quota)))
                rows, columns = (slice(min(step, n) // 2, None, step) for n in (height, width))
                flow: Any = self.nfs[level]
                position = flow.grid(height, width, self.device)
                if position is not None:
                    position = SeparablePosition(position.column[columns], position.row[rows])
                pixels = x[:, rows, columns].to(self.device).flatten(1).T.contiguous()
                latents[level].append(flow(self.scaled(pixels, level), position)[0].cpu())
        centres = [fitted_centres(torch.cat(z), config.n_intra_centers, config.seed) for z in latents]
        self.mixture = self.mixture.extended(centres)
        self.config = config.with_class(name)
        self._optimizer = None  # of other parameters
        warning = (
            f"the flows were not trained on images of {name!r}: it may be recognised, and yet far fewer of its defects "
            "be found than after a training with it, and images of the other classes may be taken for it; look at what "
            "check= (--check DATA) says, and try images of defects, before relying on it (docs/new-products.md)"
        )
        if config.fusion != "likelihood":
            warning += (
                ". The entropy maps of the other classes have changed, so that they may raise more false alarms: "
                "calibrate anew (model.calibrate, hgad-fast calibrate)"
            )
        return warning

    def objective(self, stage: int) -> nn.Module:
        """Return the loss of a stage."""
        return StageLoss(self, stage)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return Adam's groups as published: betas (0.95, 0.99), L2 decay of 1e-4 on the flows, none on the mixture.

        The official code gives the centres three times the rate, and its schedule overwrites that at once: all groups
        share one rate here.
        """
        mixture = self.mixture
        flows = [parameter for parameter in self.nfs.parameters() if parameter.requires_grad]
        groups = [
            {"params": flows, "weight_decay": 1e-4},
            {"params": [*mixture.mus, *mixture.mu_deltas], "weight_decay": 0.0},
            {"params": [*mixture.phi_inters, *mixture.phi_intras], "weight_decay": 0.0},
        ]
        return [group | {"betas": (0.95, 0.99)} for group in groups]

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """Return one group per level: levels share no parameter, and each is trained as it would be alone."""
        return [[*flow.parameters(), *self.mixture.level(level)] for level, flow in enumerate(self.nfs)]

    def schedule(self, progress: Progress) -> tuple[int, float]:
        """Return stage and rate of the official schedule: two meta-epochs of warm-up in stage 1, then stage 2.

        Without loss terms of stage 2 all is stage 1. The rate falls as a cosine after the warm-up.
        """
        has_stage_2 = set(STAGE_2) & set(self.config.loss_terms)
        stage = 2 if progress.meta_epoch >= WARM_UP_EPOCHS and has_stage_2 else 1
        return stage, warmed_up_cosine(progress, self.config, WARM_UP_EPOCHS)

    def convert_checkpoint(self, state: dict[str, Any]) -> dict[str, Any] | None:
        """Return the state of a checkpoint of format 2, with Adam's moments of all blocks stacked; of others None."""
        if state.get("format") != "hgad_fast training 2":
            return None
        optimizer = state["optimizer"]
        flows, centres, weights = optimizer["param_groups"]
        flow_moments, centre_moments, weight_moments = (
            [optimizer["state"].get(number, {}) for number in group["params"]] for group in (flows, centres, weights)
        )
        # A block's own parameters came before those of its subnet; OFFICIAL_NAMES has them in this order.
        order = [field for field in OFFICIAL_NAMES.values() if field != "w_perm"]
        level_size = self.config.coupling_layers * len(order)
        stacked_moments: list[dict[str, Tensor]] = []
        for level in range(len(self.nfs)):
            level_moments = flow_moments[level * level_size : (level + 1) * level_size]
            for field in Blocks._fields[:-1]:
                block_moments = level_moments[order.index(field) :: len(order)]  # one of each block
                stacked_moments.append(
                    {
                        name: moment if name == "step" else torch.stack([moments[name] for moments in block_moments])
                        for name, moment in block_moments[0].items()
                    }
                )
        numbers = itertools.count()
        group_moments = (flows, stacked_moments), (centres, centre_moments), (weights, weight_moments)
        groups = [{**group, "params": [next(numbers) for _ in moments]} for group, moments in group_moments]
        all_moments = [*stacked_moments, *centre_moments, *weight_moments]
        stepped = {number: moments for number, moments in enumerate(all_moments) if moments}
        return {**state, "optimizer": {"state": stepped, "param_groups": groups}}

    @classmethod
    def variants(
        cls, config: HGADConfig, names: Sequence[str] | None = None, centres: Sequence[int] = (1,)
    ) -> dict[str, Config]:
        """Return the configurations that an ablation compares.

        Args:
            config: what they have in common.
            names: some of `VARIANTS`; None: all, but for "place-gaussian" where images are seen at their native sizes.
            centres: numbers of centres of a class for further variants of HGAD, which are called ``hgad-1-centre``,
                ``hgad-5-centres``, ...

        Raises:
            ValueError: an unknown name, or a number below 1.
        """
        if names is None:
            names = [name for name in VARIANTS if name != "place-gaussian" or config.img_size != "native"]
        chosen: dict[str, Config] = {**varied(config, VARIANTS, names)}
        if "place-gaussian" in chosen:
            chosen["place-gaussian"] = place_gaussian_on(config)
        return chosen | {f"hgad-{n}-centre{'s' * (n != 1)}": config.replace(n_intra_centers=n) for n in centres}

    # ---- scoring

    def score_features(
        self,
        features: Sequence[Tensor],
        class_ids: Any = None,
        normalization: str = "calibrated",
        map_size: int | tuple[int, int] | None = None,
        **options: Any,
    ) -> ScoreResult:
        """Return what `Detector.score_features` does, with an entropy of 0 where there is one class only."""
        result = super().score_features(features, class_ids, normalization, map_size, **options)
        if not result.neg_entropy:  # of one class: its posterior is certain
            result.neg_entropy = [torch.zeros_like(logps) for logps in result.logps or ()]
        return result

    def densities(self, maps: FeatureMaps, group_ids: Tensor | None) -> Densities:
        """Return the log-density of each pixel under its image's class, over C, and the classes' negative entropy.

        Without `group_ids` an image takes the class with the largest sum over the levels of the mean log-density over
        the pixels, divided by C; over the levels of the map alone, where `config.map_levels` tells them: coarse ones
        know less well what a broken object is. At any time z exists of one chunk only. A model of one class has no
        entropy: the likelihood alone makes its map.
        """
        self._warn_of_emulation()
        batch, classes, sizes = maps.batch, self.config.n_classes, maps.sizes
        logps, neg_entropy = ([torch.empty(batch, *size, device=self.device) for size in sizes] for _ in range(2))
        per_class: list[Tensor] = []
        if group_ids is None:
            if kept_bytes(sizes, classes, batch) <= MAX_KEPT:
                per_class = [torch.empty(batch, *size, classes, device=self.device) for size in sizes]
            evidence = torch.zeros(batch, classes, dtype=torch.float64, device=self.device)
            for level, region, density, entropy in self._chunks(maps, None):
                density = density / self.feature_dims[level]
                if level < (self.config.map_levels or len(sizes)):
                    evidence += density.sum((1, 2), dtype=torch.float64) / math.prod(sizes[level])
                neg_entropy[level][region] = -entropy
                if per_class:
                    per_class[level][region] = density
            group_ids = evidence.argmax(1).cpu()
        if per_class:
            images = torch.arange(batch)
            logps = [level_densities[images, ..., group_ids] for level_densities in per_class]
        else:
            for level, region, density, entropy in self._chunks(maps, group_ids):
                logps[level][region] = density / self.feature_dims[level]
                neg_entropy[level][region] = -entropy
        neg_entropy = neg_entropy if classes > 1 else []
        return HGADDensities(logps, neg_entropy, group_ids, self.config.map_levels)

    def density_graph(self, sizes: Sequence[tuple[int, int]], group: int | None = None) -> nn.Module:
        """Return the densities of features of these sizes as plain operations, in float32; see `Detector`."""
        return HGADGraph(self, sizes, group)

    def in_float32(self) -> HGADModel:
        """Return the model, or where its `precision` is another than fp32 a copy with that."""
        if self.precision == "fp32":
            return self
        exact = copy.deepcopy(self)
        exact.precision = "fp32"
        return exact

    def _chunks(
        self, maps: FeatureMaps, class_ids: Tensor | None
    ) -> Iterator[tuple[int, tuple[slice, ...], Tensor, Tensor]]:
        """Yield each chunk's level, its region of the map, and log-densities and entropies (B, r, c) of its pixels.

        Without `class_ids` the log-densities are those of every class, (B, r, c, K). All chunks of a piece have one
        size, rows of pixels padded with zeros: products of another size round differently.
        """
        for level, top, left, x in maps.pieces():
            flow: Any = self.nfs[level]
            position = flow.grid(*maps.sizes[level], self.device)  # of the whole map, whatever the pieces
            batch, channels, height, width = x.shape
            pixels_together = self._chunk_pixels(channels)
            columns = min(width, max(64, pixels_together // batch))  # products of fewer rows waste time
            rows = min(height, max(1, pixels_together // (batch * columns)))
            rows = math.ceil(height / math.ceil(height / rows))  # as many chunks, but less padding
            for i, j in itertools.product(range(0, height, rows), range(0, width, columns)):
                chunk = x[:, :, i : i + rows, j : j + columns]
                r, c = chunk.shape[2:]
                if (r, c) != (rows, columns):
                    chunk = F.pad(chunk, (0, columns - c, 0, rows - r))
                pixels = chunk.permute(0, 2, 3, 1).reshape(-1, channels)
                pixels = self.scaled(pixels, level)
                z, log_det = flow(pixels, position and _window(position, top + i, left + j, rows, columns))
                if class_ids is None:
                    scores = self.mixture.scores(z, log_det, level, per_class=True)
                    density, entropy = scores.class_log_density, scores.entropy
                    assert density is not None
                else:
                    density, entropy = self.mixture.own_scores(z, log_det, level, class_ids.to(z.device))
                region = slice(None), slice(top + i, top + i + r), slice(left + j, left + j + c)
                shape = batch, rows, columns
                yield level, region, density.view(*shape, *density.shape[1:])[:, :r, :c], entropy.view(shape)[:, :r, :c]

    def _chunk_pixels(self, channels: int) -> int:
        """Return how many pixels of this many channels are scored together."""
        on_gpu = self.device.type == "cuda"
        return chunk_pixels(self.device, hidden=not (on_gpu and self._hidden_stays_on_chip(channels)))

    def _hidden_stays_on_chip(self, channels: int) -> bool:
        """Return whether kernels of whole blocks score pixels of this many channels."""
        return flow_path(torch.empty(0, channels, device=self.device), None, self.precision) == "triton, whole blocks"

    def scoring_bytes(self, sizes: Sequence[tuple[int, int]], group_known: bool) -> tuple[int, int]:
        """Return the bytes of the densities of every class, where they are kept, and those of a chunk."""
        config, channels = self.config, max(self.feature_dims)
        kept = kept_bytes(sizes, config.n_classes)
        pixels = self._chunk_pixels(channels)
        hidden = 2 * (channels + config.pos_embed_dim)
        if self.device.type == "cuda":  # a chunk is no larger than a map there; on a CPU it hardly matters
            pixels = min(pixels, max(h * w for h, w in sizes))
            hidden = 0 if self._hidden_stays_on_chip(channels) else hidden
        copies = 8 + 2 * bool(self.scaling)
        chunk = 4 * pixels * (3 * hidden + copies * channels + 4 * config.n_classes)
        return kept if not group_known and kept <= MAX_KEPT else 0, chunk


class HGADGraph(nn.Module):
    """What `HGADModel.densities` computes, of features of fixed sizes; see `Detector.density_graph`."""

    groups: Tensor

    def __init__(self, model: HGADModel, sizes: Sequence[tuple[int, int]], group: int | None) -> None:
        super().__init__()
        flows: Any = model.nfs
        self.levels = nn.ModuleList(
            LevelGraph(flow, model.mixture.level(level), size, group)
            for level, (flow, size) in enumerate(zip(flows, sizes, strict=True))
        )
        self.scaling = copy.deepcopy(model.scaling).cpu()
        self.register_buffer("groups", group_numbers(group, model.config.n_classes))
        self.several, self.group, self.map_levels = model.config.n_classes > 1, group, model.config.map_levels

    def forward(self, levels: Sequence[Tensor], group_ids: Tensor | None) -> Densities:
        """Return the densities of features (B, C, h, w) of each level under the given classes, or those inferred."""
        densities, entropies = [], []
        for i, x in enumerate(levels):
            pixels = x.flatten(2).transpose(1, 2)  # (B, h w, C)
            density, entropy = self.levels[i](self.scaling[i](pixels) if self.scaling else pixels)
            densities.append(density.unflatten(1, x.shape[2:]) / x.shape[1])
            entropies.append(entropy.unflatten(1, x.shape[2:]))
        if self.group is not None:
            group_ids = one_group(densities[0], self.group)
            logps = [density.squeeze(3) for density in densities]
        else:
            evidence = [density.mean((1, 2)) for density in densities[: self.map_levels]]
            group_ids = groups_of_images(torch.stack(evidence).sum(0).argmax(1), group_ids)
            rows = group_ids[:, None, None, None]
            logps = [density.gather(3, rows.expand(-1, *density.shape[1:3], 1)).squeeze(3) for density in densities]
        return HGADDensities(
            logps, [-entropy for entropy in entropies] if self.several else [], group_ids, self.map_levels
        )


def kept_bytes(sizes: Sequence[tuple[int, int]], classes: int, batch: int = 1) -> int:
    """Return the bytes of the densities of every class, for maps of these sizes."""
    return 4 * batch * classes * sum(h * w for h, w in sizes)


@functools.lru_cache(maxsize=64)  # what is made of positions is kept as long as they are (see `coupling_blocks`)
@torch.inference_mode(False)  # whoever asks first: others may train with it
def _window(position: SeparablePosition, top: int, left: int, rows: int, columns: int) -> SeparablePosition:
    """Return the positions of a part of a map; beyond the map's edges, where pixels are padding, they are zeros."""
    if (top, left, rows, columns) == (0, 0, len(position.row), len(position.column)):
        return position

    def part(code: Tensor, start: int, length: int) -> Tensor:
        inside = code[start : start + length]
        return F.pad(inside, (0, 0, 0, length - len(inside)))

    return SeparablePosition(part(position.column, left, columns), part(position.row, top, rows))


class StageLoss(nn.Module):
    """The loss of a batch in one stage; see `Detector.objective`.

    It registers the parameters that have a gradient in that stage, and nothing else: DistributedDataParallel waits for
    each of them, and would send buffers around in every step.
    """

    def __init__(self, model: HGADModel, stage: int) -> None:
        super().__init__()
        mixture = model.mixture
        self.terms = LOSS_TERMS if stage == 2 else LOSS_TERMS[:3]
        self.flows = tuple(model.nfs)
        self.scaled = model.scaled
        self.trained = nn.ParameterList([*model.nfs.parameters(), *mixture.mus, *mixture.phi_inters])
        if stage == 2:
            self.trained.extend([*mixture.mu_deltas, *mixture.phi_intras])
        self.pixel_losses = mixture.losses
        self.config, self.stage = model.config, stage
        self._weight: Tensor | None = None

    def forward(self, batch: Batch, pixels: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Return the loss, and its terms (S, terms): sums over the batch's pixels, divided by `pixels` (S)."""
        config = self.config
        weights = dict.fromkeys(LOSS_TERMS, 1.0) | {"L_g": config.lambda1, "L_mi": -config.lambda2}
        used = [name for name in self.terms if name in config.loss_terms]
        losses, reported = [], []
        for level, (groups, count) in enumerate(zip(batch, pixels, strict=True)):
            flow: Any = self.flows[level]
            sums: dict[str, Tensor] = {}
            for x, labels, h, w, drawn in groups:
                position = flow.grid(h, w, x.device)
                if drawn is not None and position is not None:
                    position = SeparablePosition(position.column[drawn.columns], position.row[drawn.rows])
                z, log_det = flow(self.scaled(x, level), position)
                terms = self.pixel_losses(
                    z, log_det, labels, level, stage=self.stage, label_smoothing=config.label_smoothing
                )
                for name, term in terms.items():
                    sums[name] = sums[name] + term.sum() if name in sums else term.sum()
            losses.append(torch.stack([sums[name] for name in used]) / count)
            if len(used) == len(self.terms):
                reported.append(losses[-1].detach())
            else:
                reported.append(torch.stack([sums[name].detach() for name in self.terms]) / count)
        weight = self._on_device([weights[name] for name in used], losses[0])
        return (torch.stack(losses) * weight).sum(), torch.stack(reported)

    def _on_device(self, weights: list[float], like: Tensor) -> Tensor:
        """Return the weights as a tensor, which is made once: a copy to the device in each step would cost a launch."""
        if self._weight is None or self._weight.device != like.device or self._weight.dtype != like.dtype:
            self._weight = torch.tensor(weights, dtype=like.dtype, device=like.device)
        return self._weight


def place_gaussian_on(config: HGADConfig) -> GaussianConfig:
    """Return the settings of Gaussians of each class and place on the very features that a flow of `config` models.

    Stages that are joined stay what they are. Other levels are joined on the grid on which `Backbone` would join them,
    as features that the user brings, so that such a model has no backbone: it scores features. All else is the default
    of `GaussianConfig`, no field of which was chosen for the features at hand.

    Raises:
        ValueError: images are seen at their native sizes, so that their places do not correspond.
    """
    shared = ("n_classes", "class_names", "img_size", "msk_size", "center_crop", "calibration_fraction", "seed")
    fields: dict[str, Any] = {name: getattr(config, name) for name in shared}
    if config.backbone_arch is None:
        return GaussianConfig(**fields, backbone_arch=None, feature_dims=config.feature_dims)
    if config.feature_mode == "joined":
        of_features = ("backbone_arch", "backbone_weights", "out_indices", "grid_stride", "feature_levels")
        return GaussianConfig(**fields, **{name: getattr(config, name) for name in of_features})
    with torch.random.fork_rng(devices=[]):
        backbone = make_backbone(config.replace(backbone_weights=None))  # for its channels and strides
    fine_stages = sum(stride <= backbone.stage_strides[backbone.grid] for stride in backbone.stage_strides)
    return GaussianConfig(**fields, backbone_arch=None, feature_dims=backbone.feature_dims, map_stages=fine_stages)
