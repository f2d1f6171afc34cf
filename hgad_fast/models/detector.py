"""Detector: what all methods of detection share, and the parts that each method fills in.

A method is a subclass that makes its parameters (`build`), says how it is trained (`objective` and the methods beside
it) and computes the densities of feature maps (`densities`). Everything else (features, training, calibration, maps,
scores, files, evaluation, reports, the command line) works through these parts, which `protocol.Detector` states as a
type.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..environment import plain_torch
from ..features.backbone import FeatureMaps
from ..features.composite import make_backbone
from ..features.extract import FeatureSet
from ..files import replacing, state_hash
from ..methods import FORMAT, method_of, read_model_file
from ..protocol import Densities, OfficialMaps, Progress
from ..scoring.calibration import Calibration, calibrate
from ..scoring.maps import official_maps
from ..scoring.result import ScoreResult
from ..scoring.score import score_features, score_images
from ..training.fit import History, fit
from ..training.schedule import warmed_up_cosine
from .config import Config, Settings

Model = TypeVar("Model", bound="Detector")


class Detector(nn.Module):
    """One anomaly detector for all classes, on the features of a frozen backbone.

    Args:
        config: the settings of the method.

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
        fusion: how the maps of several `Densities.parts` become one: their product, or "standardised", their sum with
            weights from the calibration, or one of them alone, by its name.
        loss_terms: title and explanation of each term that the objective reports, for reports.
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
    preparation: str = ""
    loss_terms: Mapping[str, tuple[str, str]] = {}
    stages: Mapping[int, str] = {}
    variant_options: ClassVar[tuple[str, ...]] = ()

    @plain_torch()
    def __init__(self, config: Any) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            self.encoder = make_backbone(config) if config.backbone_arch is not None else None
            if self.encoder is not None:
                if config.feature_dims not in (None, self.encoder.feature_dims):
                    raise ValueError(
                        f"{type(config).__name__}.feature_dims is {config.feature_dims}, but {config.backbone_arch} "
                        f"gives {self.encoder.feature_dims}; leave it None"
                    )
                config = config.replace(feature_dims=self.encoder.feature_dims)
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

    def save(self, path: str | os.PathLike[str], include_backbone: bool = True) -> None:
        """Write the model to one safetensors file; with the backbone included, loading needs no network.

        Without it (`include_backbone=False`) the file is small, and holds a hash that the backbone must match on
        loading. An encoder of the user's own, with ``backbone_arch=None``, is never included.
        """
        from safetensors.torch import save_file

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
            if not include_backbone:
                state = {name: tensor for name, tensor in state.items() if not name.startswith("encoder.")}
        if self.calibration is not None:
            state |= {f"calibration.{name}": tensor for name, tensor in self.calibration.tensors().items()}
            metadata["calibration"] = json.dumps(self.calibration.settings())
        state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
        with replacing(path) as temporary:
            save_file(state, temporary, metadata)

    @classmethod
    def load(cls: type[Model], path: str | os.PathLike[str], device: str | torch.device | None = None) -> Model:
        """Return a model of this method that `save` wrote; `hgad_fast.load` reads one of any method.

        Raises:
            ValueError: the file is missing, damaged, or of another format or method; or it was saved without its
                backbone, and that cannot be loaded or is not the one that the model was trained with.
        """
        return cls.from_file(path, *read_model_file(Path(path)), device)

    @classmethod
    @plain_torch()
    def from_file(
        cls: type[Model],
        path: str | os.PathLike[str],
        metadata: dict[str, str],
        state: dict[str, Tensor],
        device: str | torch.device | None = None,
    ) -> Model:
        """Return the model made from what `methods.read_model_file` read; see `load`."""
        if (method := method_of(metadata)) != cls.config_class.method:
            raise ValueError(
                f"{path} holds a model of the method {method!r}, and {cls.__name__} is of another: use hgad_fast.load"
            )
        config = cls.config_class.from_json(metadata["config"])
        left_out = metadata.get("backbone") == "left out"
        try:
            model = cls(config if left_out else config.replace(backbone_weights=None))
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{path} cannot be loaded{', as it was saved without its backbone' if left_out else ''}: {error}"
            ) from error
        model.config = model.config.replace(backbone_weights=config.backbone_weights)
        model.checkpoint = metadata.get("checkpoint", model.checkpoint)
        prefix = "calibration."
        calibration = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        weights = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
        own_weights = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if not (left_out and name.startswith("encoder."))
        }
        saved_shapes, expected_shapes = (
            {name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (weights, own_weights)
        )
        if saved_shapes != expected_shapes:
            misfit, _ = min(saved_shapes.items() ^ expected_shapes.items())
            raise ValueError(
                f"{path} does not fit its own configuration: {misfit} has shape {saved_shapes.get(misfit)} in it, "
                f"expected is {expected_shapes.get(misfit)}; it is damaged, or this version of timm has another "
                f"{config.backbone_arch}"
            )
        model.load_state_dict(weights, strict=False)
        if calibration:
            model.calibration = Calibration.from_tensors(calibration, **json.loads(metadata.get("calibration", "{}")))
        if left_out and model.encoder is not None and state_hash(model.encoder) != metadata["backbone_sha256"]:
            raise ValueError(
                f"{path} was saved without its backbone, and the {config.backbone_arch} at hand (backbone_weights="
                f"{config.backbone_weights!r}) has other weights than it was trained with; save with "
                "include_backbone=True, or provide the same weights"
            )
        return model.to(device) if device is not None else model


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
