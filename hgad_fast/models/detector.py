"""HGADModel: the parts put together, and how they are saved and loaded."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .backbone import Backbone
from .calibrate import Calibration
from .calibrate import calibrate as calibrate_model
from .config import HGADConfig
from .files import replacing
from .flow import ConditionalFlow
from .mixture import HierarchicalMixture
from .official import OfficialSurface, config_from_args
from .score import ScoreResult, score_features, score_images

if TYPE_CHECKING:
    from .train import History

FORMAT = "hgad_fast 1"


class HGADModel(OfficialSurface):
    """One anomaly detector for all classes: hierarchical Gaussian mixture normalizing flows on frozen features.

    Args:
        config: an `HGADConfig`, or the official code's ``argparse.Namespace`` (unknown fields are tolerated; the model
            moves to ``args.device`` where there is one).

    Attributes:
        config: the settings, with `feature_dims` filled in.
        encoder: the frozen backbone, or None (``backbone_arch=None``).
        nfs: the flow of each level.
        mixture: the centres and weights of all levels.
        calibration: what `score` knows of normal pictures, or None before `fit` or `calibrate`.
        checkpoint: which state of the training this is: "last", or how it was chosen.

    Weights are initialised from ``config.seed`` alone; the global random state is left as it was.
    """

    encoder: Backbone | None

    def __init__(self, config: HGADConfig | argparse.Namespace | None = None) -> None:
        super().__init__()
        device = None
        if isinstance(config, argparse.Namespace):
            device = getattr(config, "device", None)
            config = config_from_args(config)
        config = config or HGADConfig()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            self.encoder = Backbone(config) if config.backbone_arch is not None else None
            if self.encoder is not None:
                if config.feature_dims not in (None, self.encoder.feature_dims):
                    raise ValueError(
                        f"HGADConfig.feature_dims is {config.feature_dims}, but {config.backbone_arch} gives "
                        f"{self.encoder.feature_dims}; leave it None"
                    )
                config = config.replace(feature_dims=self.encoder.feature_dims)
            dims = config.feature_dims
            assert dims is not None
            position_dim = config.pos_embed_dim if config.conditional else 0
            self.nfs = nn.ModuleList(
                ConditionalFlow(c, config.coupling_layers, position_dim, config.clamp_alpha) for c in dims
            )
            self.mixture = HierarchicalMixture(dims, config.n_classes, config.n_intra_centers)
        self.config = config
        self.calibration: Calibration | None = None
        self.checkpoint = "last"
        self.memory = config.memory
        self.checkpoint_every = config.checkpoint_every
        self.precision = config.precision
        if device is not None:
            self.to(device)

    @property
    def device(self) -> torch.device:
        return self.mixture.mus[0].device

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.config.names

    @property
    def memory(self) -> str:
        """How the flows remember their activations: auto, standard or reversible. May be set at any time."""
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

    def require_encoder(self) -> Backbone:
        if self.encoder is None:
            raise ValueError("this model has no backbone (backbone_arch=None): use score_features and fit on features")
        return self.encoder

    def fit(self, data: Any, **options: Any) -> History:
        """Train on normal pictures, calibrate on held-out ones; see `hgad_fast.train.fit` for the arguments."""
        from .train import fit

        return fit(self, data, **options)

    def calibrate(self, data: Any, **options: Any) -> None:
        """Set normalisation constants and thresholds from normal pictures; see `hgad_fast.calibrate.calibrate`."""
        calibrate_model(self, data, **options)

    def score(self, images: Any, class_ids: Any = None, **options: Any) -> ScoreResult:
        """Anomaly maps and scores of pictures; see `hgad_fast.score.score_images` for the arguments."""
        return score_images(self, images, class_ids, **options)

    def score_features(
        self,
        features: Sequence[Tensor],
        class_ids: Any = None,
        normalization: str = "calibrated",
        map_size: int | tuple[int, int] | None = None,
        **options: Any,
    ) -> ScoreResult:
        """Anomaly maps and scores of feature maps; see `hgad_fast.score.score_features` for the arguments."""
        return score_features(self, features, class_ids, normalization, map_size, **options)

    def save(self, path: str | os.PathLike[str], include_backbone: bool = True) -> None:
        """Write the model to one safetensors file; with the backbone inside, loading needs no network.

        Without it (`include_backbone=False`) the file is small, and holds a hash that the backbone must match on
        loading. An encoder of the user's own, put in the place of ``backbone_arch=None``, is never inside.
        """
        from safetensors.torch import save_file

        state = self.state_dict()
        metadata = {
            "format": FORMAT,
            "config": self.config.to_json(),
            "class_names": json.dumps(self.class_names),
            "checkpoint": self.checkpoint,
        }
        if self.encoder is not None:
            include_backbone = include_backbone and self.config.backbone_arch is not None
            metadata["backbone_sha256"] = state_hash(self.encoder)
            metadata["backbone"] = "included" if include_backbone else "left out"
            if not include_backbone:
                state = {k: v for k, v in state.items() if not k.startswith("encoder.")}
        if self.calibration is not None:
            state |= {f"calibration.{k}": v for k, v in self.calibration.tensors().items()}
            metadata["calibration"] = json.dumps(self.calibration.settings())
        with replacing(path) as temporary:
            save_file({k: v.detach().cpu().contiguous().clone() for k, v in state.items()}, temporary, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | torch.device | None = None) -> HGADModel:
        """Read a model that `save` wrote.

        Raises:
            ValueError: the file is missing, damaged, of another format, or the backbone that it was saved without is
                not to be had, or is another one than the model was trained with.
        """
        metadata, state = _read(Path(path))
        config = HGADConfig.from_json(metadata["config"])
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
        calibration = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        weights = {k: v for k, v in state.items() if not k.startswith(prefix)}
        wanted = {k: v for k, v in model.state_dict().items() if not (left_out and k.startswith("encoder."))}
        found, expected = ({k: tuple(v.shape) for k, v in tensors.items()} for tensors in (weights, wanted))
        if found != expected:
            odd, _ = min(found.items() ^ expected.items())
            raise ValueError(
                f"{path} does not fit its own configuration: {odd} has shape {found.get(odd)} in it, expected is "
                f"{expected.get(odd)}; it is damaged, or this version of timm has another {config.backbone_arch}"
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


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"there is no model file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error})") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} is in format {metadata.get('format')!r}, this version of hgad_fast reads {FORMAT!r}; a checkpoint "
            "of the official code is read by HGADModel(...).load_official_checkpoint(path)"
        )
    return metadata, state


def state_hash(module: nn.Module) -> str:
    """`tensor_hash` of a module's parameters and buffers."""
    return tensor_hash(module.state_dict())


def tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names, shapes, types and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
