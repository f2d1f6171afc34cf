"""Detector: what all methods of detection share, and the parts that each method fills in.

A method is a subclass that makes its parameters (`build`), says how it is trained (`objective` and the methods beside
it) and computes the densities of feature maps (`densities`). Everything else (features, training, calibration, maps,
scores, files, evaluation, reports, the command line) works through these parts, which `protocol.Detector` states as a
type.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..environment import one_thread, plain_torch, without_memory
from ..export.write import export
from ..features.backbone import Backbone, FeatureMaps
from ..features.composite import make_backbone
from ..features.extract import FeatureSet
from ..features.outline import Outline, stages_in
from ..files import state_hash
from ..methods import FORMAT, METHODS, ModelFile, opened, write_model_file
from ..protocol import About, Densities, OfficialMaps, Progress
from ..scoring.calibration import Calibration, calibrate
from ..scoring.maps import official_maps
from ..scoring.result import ScoreResult
from ..scoring.score import score_features, score_images
from ..scoring.stored import stored_calibration
from ..training.fit import History, fit
from ..training.schedule import warmed_up_cosine
from .config import Config, Settings
from .hub import OnHub

if TYPE_CHECKING:
    from .classes import Absorbed, AddedClass

CALIBRATION, ENCODER = "calibration.", "encoder."  # before the names of their tensors in a model file

MAX_CALIBRATION = 10**7  # numbers in the calibration of a model file

Model = TypeVar("Model", bound="Detector")


class Detector(OnHub, nn.Module):
    """One anomaly detector for all classes, on the features of a frozen backbone.

    Args:
        config: the settings of the method.
        encoder: the backbone of the configuration, where it exists already; None: it is made.

    Attributes:
        config: the settings, with `feature_dims` filled in.
        encoder: the frozen backbone, or None (``backbone_arch=None``).
        calibration: the statistics of normal images that `score` uses, or None before `fit` or `calibrate`.
        checkpoint: the state of the training that this is: "last", or how it was chosen.
        groups: names of the groups of images that have a threshold each: the classes, or those that a method forms.
        groups_are_classes: whether the groups are the classes of the training images, so that the class of an image can
            be given instead of inferred.
        pointwise: whether pixels are independent of each other, given their position. Only then can maps be processed
            in chunks and tiles, images be scored at another size than the trained one, and batches be accumulated.
        preparation: name of what `prepare` does; empty where features stay as the encoder gives them. It is part of
            the name under which features are cached.
        closed_form: whether `begin` fits the model, so that no step is made.
        scores_from_zero: whether maps and scores are never below 0, so that multiples of a threshold have a meaning.
        fusion: how the maps of several `Densities.parts` become one: their product, or "standardised", their sum with
            weights from the calibration, or one of them alone, by its name.
        loss_terms: title and explanation of each term that the objective reports, for reports.
        about: what the model card says of the method.
        stages: what a stage of the training does, by its number from 2 on, for reports.
        variant_options: names of what `variants` takes beyond the names of some of them.

    Weights are initialised from ``config.seed`` alone; the global random state is left as it was.
    """

    config_class: ClassVar[type[Config]]
    config: Any
    encoder: Any
    groups_are_classes: bool = True
    pointwise: bool = True
    closed_form: bool = False
    scores_from_zero: bool = True
    preparation: str = ""
    about: About = About(
        "a method of its own", "Nobody has written down what a model file holds of the training images."
    )
    loss_terms: Mapping[str, tuple[str, str]] = {}
    stages: Mapping[int, str] = {}
    variant_options: ClassVar[tuple[str, ...]] = ()

    @plain_torch()
    def __init__(self, config: Any, encoder: nn.Module | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            if encoder is None and config.backbone_arch is not None:
                encoder = make_backbone(config)
            self.encoder = encoder
            if self.encoder is not None:
                if config.feature_dims not in (None, self.encoder.feature_dims):
                    raise ValueError(
                        f"{type(config).__name__}.feature_dims is {config.feature_dims}, but {config.backbone_arch} "
                        f"gives {self.encoder.feature_dims}; leave it None"
                    )
                config = config.replace(
                    feature_dims=self.encoder.feature_dims,
                    backbone_arch=self.encoder.arch,
                    backbone_weights=self.encoder.weights,
                )
            self.config = config
            self.calibration: Calibration | None = None
            self.checkpoint = "last"
            self.build()

    # ---- what a method fills in

    def build(self) -> None:
        """Make the parameters and buffers. The random state is that of the seed, and `config` is complete."""
        raise NotImplementedError

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups of images that have a threshold each; the classes of the configuration by default."""
        return self.config.names

    @property
    def fusion(self) -> str:
        """The rule that makes one map of several parts: ``"product"``, ``"standardised"``, or the name of a part."""
        return "product"

    def prepare(self, features: list[Tensor]) -> list[Tensor]:
        """Return features (B, C, h, w) of each level as they are cached, trained on and scored; see `preparation`."""
        return features

    def begin(self, feature_set: FeatureSet) -> None:
        """Take what the method needs from the training features, once before the first step; nothing by default.

        Of processes that train together each calls it; afterwards all take what the first one has come to.
        """

    def finish(self, feature_set: FeatureSet) -> None:
        """Note what the method tells of the training features, once after the last step; nothing by default.

        Likewise, each process calls it.
        """

    def grow(self, name: str, feature_set: FeatureSet) -> str:
        """Take one class more, the last, from the features of its normal images; `config` grows with it.

        What the model shares with others is replaced, and not changed: `add_class` calls this on a copy that shares all
        modules, which becomes the model if nothing fails.

        Returns:
            what users are warned of when the class has been added; empty: nothing.

        Raises:
            ValueError: the method cannot; the message says what to do instead.
        """
        raise ValueError(
            f"the method {self.config.method!r} forms its groups of images by itself, and learns them in training: no "
            "class can be added. Absorb normal images of the new product (model.absorb, hgad-fast absorb), which moves "
            "thresholds alone; calibrate anew with images of all products (model.calibrate, hgad-fast calibrate); or "
            "train anew with the new product"
        )

    def take_images(self, feature_set: FeatureSet) -> bool:
        """Learn from more normal images of known groups, where the method can; like `grow`, it changes nothing shared.

        Returns:
            whether it did; by default it cannot, and the calibration alone can take account of the images.
        """
        return False

    def objective(self, stage: int) -> nn.Module:
        """Return the module whose value is minimised in a stage of the training.

        It is called with a batch (`training.step.Batch`) and the number of pixels of each level in the batches of all
        processes, and returns the loss and the terms that are reported, (rows, terms), one row per level: this batch's
        part of the mean over all those pixels. Its attribute ``terms`` names the columns, and its parameters are those
        that have a gradient in this stage, and no others.
        """
        raise NotImplementedError

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the groups of parameters, with their options, that Adam is made with; one of all by default."""
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad]}]

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """Return the groups of parameters whose gradients are clipped together (``clip_grad_norm``); one by default."""
        return [[parameter for parameter in self.parameters() if parameter.requires_grad]]

    def schedule(self, progress: Progress) -> tuple[int, float]:
        """Return the stage (1, 2, ...), the same throughout a sub-epoch, and the learning rate of a step.

        By default there is one stage, and the rate falls as a cosine.
        """
        return 1, warmed_up_cosine(progress, self.config, warm_up_epochs=0)

    def densities(self, maps: FeatureMaps, group_ids: Tensor | None) -> Densities:
        """Return the densities of the pixels of prepared features.

        Args:
            maps: of B images. A method that is not pointwise takes `FeatureMaps.whole`.
            group_ids: the group of each image, (B,) int64 on the CPU; None: inferred.
        """
        raise NotImplementedError

    def density_graph(self, sizes: Sequence[tuple[int, int]], group: int | None = None) -> nn.Module:
        """Return what `prepare` and `densities` do, of features of fixed sizes, as a module that can be exported.

        It takes the features (B, C, h, w) of each level, for any B, and the groups of the images, (B,) int64, -1 where
        they are to be inferred, or None: all are. It returns `Densities` whose `group_ids` are a tensor of the graph,
        too. It consists of plain operations of torch in float32, without values that the host would have to look at,
        and holds copies of its own, on the CPU, of all that it needs. Its buffer `groups` (int64) holds the
        numbers of the groups that images can be of: the one that is fixed, or all that images of these sizes can be of.

        Args:
            sizes: (h, w) of the features of each level, as the encoder gives them.
            group: the group of all images; those given with the features do not count then, and what belongs to other
                groups alone is left out.

        Raises:
            ValueError: the method has no such graph, or cannot score features of these sizes.
        """
        raise ValueError(f"models of the method {self.config.method!r} cannot be exported")

    def in_float32(self) -> Detector:
        """Return the model, or where it computes in less than float32 a copy that does not."""
        return self

    @property
    def score_share(self) -> float:
        """Share of the pixels of a calibrated map, the largest ones, whose mean is the image score; 0: their maximum.

        It becomes part of the calibration.
        """
        return 0.0

    @property
    def scored_on(self) -> str:
        """The scope of `Densities.anomalies` whose map the image score is computed on; by default the anomaly map's.

        It becomes part of the calibration.
        """
        return "map"

    @property
    def official_aupro(self) -> str:
        """How AUPRO 30 % is computed under the official protocols.

        ``"exact"``, or ``"official800"``: by 800 thresholds, as some official codes do (`evaluation.metrics.pro_800`).
        """
        return "exact"

    def official_maps(self, batches: Sequence[Densities]) -> dict[str, OfficialMaps]:
        """Return maps and scores as published, by the names of the procedures, of all n images of one class.

        The first procedure is what scoring with ``normalization="official"``, the protocol "official" of an evaluation
        and `evaluation.evaluate.BestCheckpoint` use. Each further one has a protocol "official <name>" of its own. By
        default there is one, without a name: `scoring.maps.official_maps`, and their maxima as scores.

        Args:
            batches: the densities of the images. Those of one batch share a size of feature map.
        """
        maps = official_maps(batches, self.config.msk_size)
        return {"": OfficialMaps(maps, maps.amax((1, 2)))}

    def scoring_bytes(self, sizes: Sequence[tuple[int, int]], group_known: bool) -> tuple[int, int]:
        """Return the memory that `densities` takes, beyond features and result, for an image with maps of these sizes.

        Returns:
            the bytes that are held until the group is known, and those of the largest step.
        """
        return 0, 12 * sum(c * h * w for c, (h, w) in zip(self.feature_dims, sizes, strict=True))

    def describe(self) -> dict[str, Any]:
        """Return the method's own settings, by title, for `hgad-fast info`; none by default."""
        return {}

    @classmethod
    def likely_stages(cls, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> Any:
        """Return the stages of the backbone, as `Outline` takes them, of a file of these shapes that lists none.

        None where they cannot be told. By default each level is one: no tensor depends on more.
        """
        return [((channels,), 1) for channels in config.feature_dims or ()]

    @classmethod
    def variants(cls, config: Any, names: Sequence[str] | None = None) -> dict[str, Any]:
        """Return the configurations, by name, that an ablation of the method compares; the given one by default.

        Args:
            config: what they have in common.
            names: some of them; None: all.

        Raises:
            ValueError: an unknown name.
        """
        if unknown := [name for name in names or () if name != config.method]:
            raise ValueError(f"there is no variant {unknown[0]!r}; the method has one, {config.method}")
        return {config.method: config}

    @property
    def pixels_per_step(self) -> int | float | None:
        """How many pixels of each image, at each level, a step draws, or what share; None, as by default: all.

        Only a pointwise method may leave some out.
        """
        return None

    def convert_checkpoint(self, state: dict[str, Any]) -> dict[str, Any] | None:
        """Return the state of a checkpoint of an older format in the current one; None where that is not possible."""
        return None

    def make_ready(self) -> None:
        """Compute what the first image to be scored would have to wait for; nothing by default."""

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Raise a ValueError where tensors of a model file are none that the method can work with; none by default.

        Their names, shapes and types are the model's, and all numbers in them are finite.
        """

    # ---- what all of them have

    @property
    def device(self) -> torch.device:
        """The device of the parameters and buffers."""
        return next(itertools.chain(self.parameters(), self.buffers())).device

    @property
    def feature_dims(self) -> list[int]:
        """Channels of each level."""
        return list(self.config.feature_dims)

    @property
    def density_levels(self) -> int:
        """Number of levels of `Densities.logps`; by default that of the features."""
        return len(self.feature_dims)

    @property
    def density_parts(self) -> int:
        """Number of `Densities.parts`; by default one, the likelihood."""
        return 1

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names, made up where none are known."""
        return self.config.names

    def adopt_classes(self, names: tuple[str, ...], source: str) -> None:
        """Take over the class names of a dataset, called `source` in errors; the model's made-up names give way.

        Raises:
            ValueError: the model was made for other classes.
        """
        if not self.groups_are_classes:
            return
        config = self.config
        if config.class_names is not None and config.class_names != names:
            raise ValueError(
                f"{source} has the classes {', '.join(names)}; the model was made for {', '.join(config.class_names)}"
            )
        if len(names) != config.n_classes:
            raise ValueError(
                f"{source} has {len(names)} classes ({', '.join(names)}), the model has n_classes={config.n_classes}"
            )
        self.config = config.replace(class_names=names)

    def require_encoder(self) -> nn.Module:
        """Return the encoder.

        Raises:
            ValueError: the model has none.
        """
        if self.encoder is None:
            raise ValueError("this model has no backbone (backbone_arch=None): use score_features and fit on features")
        return self.encoder

    def fit(self, data: Any, **options: Any) -> History:
        """Train on normal images, calibrate on held-out ones; see `hgad_fast.training.fit.fit` for the arguments."""
        return fit(self, data, **options)

    def calibrate(self, data: Any, **options: Any) -> tuple[str, ...]:
        """Set normalisation constants and thresholds from normal images; see `scoring.calibration.calibrate`."""
        return calibrate(self, data, **options)

    def add_class(self, name: str, images: Any, false_alarm_rate: float | None = None, **options: Any) -> AddedClass:
        """Add a class from normal images of it; see `models.classes.add_class` for the arguments."""
        from .classes import add_class  # brings the evaluation, which most programs do without

        return add_class(self, name, images, false_alarm_rate, **options)

    def absorb(self, class_name: str | None, images: Any, **options: Any) -> Absorbed:
        """Take more normal images of a known class; see `models.classes.absorb` for the arguments."""
        from .classes import absorb

        return absorb(self, class_name, images, **options)

    def score(self, images: Any, class_ids: Any = None, **options: Any) -> ScoreResult:
        """Return anomaly maps and scores of images; see `scoring.score.score_images` for the arguments.

        Images are RGB: frames of OpenCV are BGR, and take ``cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)`` first.
        """
        if "class_id" in options:
            raise ValueError("class_id is no argument of score: it is class_ids, one id or name, or one for each image")
        return score_images(self, images, class_ids, **options)

    def score_features(
        self,
        features: Sequence[Tensor],
        class_ids: Any = None,
        normalization: str = "calibrated",
        map_size: int | tuple[int, int] | None = None,
        **options: Any,
    ) -> ScoreResult:
        """Return anomaly maps and scores of feature maps; see `scoring.score.score_features` for the arguments."""
        return score_features(self, features, class_ids, normalization, map_size, **options)

    def export(self, path: str | os.PathLike[str], format: str | None = None, **options: Any) -> Path:
        """Write scoring as an ONNX file or a `torch.export` program; see `hgad_fast.export.write.export`."""
        return export(self, path, format, **options)

    def save(self, path: str | os.PathLike[str], include_backbone: bool = True) -> None:
        """Write the model to one safetensors file; with the backbone included, loading needs no network.

        Without it (`include_backbone=False`) the file is small, and holds a hash that the backbone must match on
        loading. An encoder of the user's own, with ``backbone_arch=None``, is never included. The same model gives the
        same bytes.
        """
        state = self.state_dict()
        metadata = {
            "format": FORMAT,
            "method": self.config.method,
            "config": self.config.to_json(),
            "class_names": json.dumps(self.class_names),
            "checkpoint": self.checkpoint,
        }
        if self.encoder is not None:
            include_backbone = include_backbone and self.config.backbone_arch is not None
            metadata["backbone_sha256"] = state_hash(self.encoder)
            metadata["backbone"] = "included" if include_backbone else "left out"
            if isinstance(self.encoder, Backbone):
                stages = zip(self.encoder.stage_dims, self.encoder.fine_stages, strict=True)
                metadata["stages"] = json.dumps(list(stages))
            if not include_backbone:
                state = {name: tensor for name, tensor in state.items() if not name.startswith("encoder.")}
        if self.calibration is not None:
            state |= {f"{CALIBRATION}{name}": tensor for name, tensor in self.calibration.tensors().items()}
            metadata["calibration"] = json.dumps(self.calibration.settings())
        write_model_file(path, state, metadata)

    @classmethod
    def load(cls: type[Model], path: str | os.PathLike[str], device: str | torch.device | None = None) -> Model:
        """Return a model of this method that `save` wrote; `hgad_fast.load` reads one of any method.

        A file may come from anywhere: what is in it is checked, and nothing that it names is opened or fetched. But one
        that was saved without its backbone says by `backbone_arch` and `backbone_weights` where that comes from.

        Raises:
            ValueError: the file is missing, damaged, or of another format or method; or it was saved without its
                backbone, and that cannot be loaded or is not the one that the model was trained with.
        """
        with opened(path) as file:
            return cls.from_file(file, device)

    @classmethod
    @plain_torch()
    @one_thread()
    def from_file(
        cls: type[Model], file: ModelFile, device: str | torch.device | None = None, *, outline: bool = False
    ) -> Model:
        """Return the model in a file that `methods.opened` has opened; see `load`.

        Args:
            file: the file.
            device: the device of the model; None: the CPU.
            outline: with an `Outline` in the backbone's place, if the file tells enough of that and it is the one that
                was saved: to describe the model.
        """
        if file.method != cls.config_class.method:
            raise file.error(
                f"holds a model of the method {file.method!r}, and {cls.__name__} is of another: use hgad_fast.load"
                + (f", or {METHODS[file.method].__name__}" if file.method in METHODS else "")
            )
        config = cls._config_in(file)
        left_out = file.metadata.get("backbone") == "left out"
        try:
            with without_memory():
                model = cls(config.replace(backbone_weights=None), cls._outline(file, config) if outline else None)
        except Exception as error:  # timm and torch raise many kinds for settings that do not fit each other
            raise file.error(f"cannot be loaded: its configuration gives no model ({error})") from error
        model.config = model.config.replace(backbone_weights=config.backbone_weights)
        model.checkpoint = file.metadata.get("checkpoint", model.checkpoint)
        outlined = isinstance(model.encoder, Outline)
        expected = {
            name: tensor for name, tensor in model.state_dict().items() if not (left_out and name.startswith(ENCODER))
        }
        others = (CALIBRATION, ENCODER) if outlined else (CALIBRATION,)
        saved_shapes = {name: shape for name, shape in file.shapes.items() if not name.startswith(others)}
        expected_shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
        if saved_shapes != expected_shapes:
            misfit, _ = min(saved_shapes.items() ^ expected_shapes.items())
            timm = f", or this version of timm has another {config.backbone_arch}" if model.encoder is not None else ""
            raise file.error(
                f"does not fit its own configuration: {misfit} has shape {saved_shapes.get(misfit)} in it, expected is "
                f"{expected_shapes.get(misfit)}; it is damaged{timm}"
            )
        for name, tensor in expected.items():
            file.require_type(name, tensor.dtype)
        calibration = _calibration_in(file, model)
        if model.encoder is not None and not outlined:
            model._complete_encoder(file, expected, left_out)
        model._take(file, {name: file.tensor(name) for name in expected})
        model.calibration = calibration
        return model.to(device) if device is not None else model

    @classmethod
    def _config_in(cls, file: ModelFile) -> Config:
        """Return the configuration in a model file, after checking all texts in it but those of the calibration.

        Raises:
            ValueError: one of them cannot be, or the file has too few tensors for the configuration.
        """
        fields = file.json("config", dict)
        try:
            config = cls.config_class.from_fields(cls.config_class.added | fields)
        except (ValueError, RecursionError) as error:
            raise file.error(f"is damaged, or of another version of hgad_fast: in its configuration {error}") from error
        if "class_names" in file.metadata and file.json("class_names", list) != list(config.names):
            raise file.error("is damaged: the class names in its metadata are not those of its configuration")
        allowed = {"backbone": ("included", "left out")}
        for name, values in allowed.items():
            if (value := file.metadata.get(name, values[0])) not in values:
                raise file.error(f"is damaged: {name!r} in its metadata is {value!r}; allowed: {' or '.join(values)}")
        if ":" in str(config.backbone_arch):
            raise file.error(
                f"names the backbone_arch {config.backbone_arch!r}; a model file may name architectures of timm alone, "
                "and nothing to be fetched"
            )
        if len(file.shapes) < config.least_tensors:
            raise file.error(
                f"does not fit its own configuration: it holds {len(file.shapes)} tensors, and a model of this "
                f"configuration has {config.least_tensors} or more; it is damaged"
            )
        return config

    @classmethod
    def _outline(cls, file: ModelFile, config: Config) -> Outline | None:
        """Return an outline of the backbone; None where a file tells too little, or holds another than was saved."""
        if config.backbone_arch is None:
            return None
        if file.metadata.get("backbone") != "left out" and file.hash(ENCODER) != file.metadata.get("backbone_sha256"):
            return None
        told = file.json("stages", list) if "stages" in file.metadata else cls.likely_stages(config, file.shapes)
        stages = stages_in(told, config.feature_dims)
        return Outline(config, stages) if stages is not None else None

    def _complete_encoder(self, file: ModelFile, saved: Collection[str], left_out: bool) -> None:
        """Make the backbone anew, with memory, if it has tensors that are not saved.

        Raises:
            ValueError: it was left out of the file, and is not to be had.
        """
        # What is computed when a network is made, and not saved, exists only in one that is made with memory.
        if left_out or any(ENCODER + name not in saved for name, _ in self.encoder.named_buffers()):
            self.encoder = self._encoder_again(file, left_out)

    def _take(self, file: ModelFile, state: dict[str, Tensor]) -> None:
        """Take the tensors of a file, of which the model, made without memory, has the shapes.

        Raises:
            ValueError: a method cannot work with them.
        """
        for name, buffer in list(self.named_buffers()):
            if buffer.is_meta and name not in state:  # computed from the others
                module, _, own_name = name.rpartition(".")
                empty = torch.full(buffer.shape, torch.nan, dtype=torch.float32, device="cpu")
                self.get_submodule(module)._buffers[own_name] = empty
        try:
            self.check_state(state)
            self.load_state_dict(state, strict=False, assign=True)
        except (ValueError, RuntimeError) as error:
            raise file.error(f"is damaged: {error}") from error

    def _encoder_again(self, file: ModelFile, left_out: bool) -> nn.Module:
        """Return the backbone of the configuration, made with memory; without weights if the file holds them.

        Raises:
            ValueError: they were left out of the file, and are not to be had or not those of the training.
        """
        config = self.config
        try:
            with torch.random.fork_rng(devices=[]):
                encoder = make_backbone(config if left_out else config.replace(backbone_weights=None))
        except (ValueError, OSError) as error:
            raise file.error(
                f"cannot be loaded{', as it was saved without its backbone' if left_out else ''}: {error}"
            ) from error
        if left_out and state_hash(encoder) != file.metadata.get("backbone_sha256"):
            raise file.error(
                f"was saved without its backbone, and the {config.backbone_arch} at hand (backbone_weights="
                f"{config.backbone_weights!r}) has other weights than it was trained with; save with "
                "include_backbone=True, or provide the same weights"
            )
        return encoder


def _calibration_in(file: ModelFile, model: Detector) -> Calibration | None:
    """Return the calibration in a model file; None where there is none.

    Raises:
        ValueError: it is not whole, or does not fit the model.
    """
    names = [name for name in file.shapes if name.startswith(CALIBRATION)]
    if not names and "calibration" not in file.metadata:
        return None
    settings = file.json("calibration", dict) if "calibration" in file.metadata else {}
    if (numbers := sum(math.prod(file.shapes[name]) for name in names)) > MAX_CALIBRATION:
        raise file.error(f"is damaged: its calibration holds {numbers} numbers; {MAX_CALIBRATION} are allowed")
    tensors = {name.removeprefix(CALIBRATION): file.tensor(name, None) for name in names}
    try:
        return stored_calibration(
            tensors,
            settings,
            groups=len(model.groups),
            levels=model.density_levels,
            parts=model.density_parts,
            fusion=model.fusion,
        )
    except ValueError as error:
        raise file.error(f"is damaged: in its calibration {error}") from error


def varied(
    config: Settings, variants: Mapping[str, Mapping[str, Any]], names: Sequence[str] | None
) -> dict[str, Settings]:
    """Return configurations by the names of variants, which are given by the fields that differ.

    Args:
        config: what they have in common.
        variants: the fields of each.
        names: some of them; None: all.

    Raises:
        ValueError: an unknown name.
    """
    names = tuple(variants) if names is None else names
    if unknown := [name for name in names if name not in variants]:
        raise ValueError(f"there is no variant {unknown[0]!r}; there are {', '.join(variants)}")
    return {name: config.replace(**variants[name]) for name in names}
