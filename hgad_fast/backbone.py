"""The frozen feature extractor: picture (B, 3, H, W) -> one feature map (B, C, h, w) a level."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import HGADConfig


@dataclass(frozen=True)
class FeatureMap:
    """Features (B, C, h, w) of one level, whole or piece by piece.

    Attributes:
        batch, size: B and (h, w).
        pieces: gives top, left and features (B, C, rows, columns) of each piece; may be called again.
    """

    batch: int
    size: tuple[int, int]
    pieces: Callable[[], Iterable[tuple[int, int, Tensor]]]

    @classmethod
    def of(cls, features: Tensor) -> FeatureMap:
        batch, _, h, w = features.shape
        return cls(batch, (h, w), lambda: [(0, 0, features)])

    @property
    def pixels(self) -> int:
        return math.prod(self.size)


class Backbone(nn.Module):
    """A timm model, frozen and always in eval mode.

    With ``feature_mode="image_pyramid"`` level s is one stage of the picture at (H >> s, W >> s) (bilinear, aligned
    corners, as official); with ``"stages"`` the levels are several stages of one pass.

    Attributes:
        mean, std: the channel statistics that the weights expect, (3, 1, 1), from timm's configuration of the model;
            saved with the weights.
        feature_dims: channels of each level.

    Raises:
        ValueError: the architecture is unknown, or the weights' file does not fit it.
        ConnectionError: the weights are to come from the hub, and it cannot be reached.
    """

    mean: Tensor
    std: Tensor
    net: Any

    def __init__(self, config: HGADConfig) -> None:
        super().__init__()
        self.arch = config.backbone_arch
        self.levels = config.feature_levels
        self.mode = config.feature_mode
        self.net = _create(config)
        stages = self.net.feature_info.channels()
        self.feature_dims = tuple(stages * self.levels if self.mode == "image_pyramid" else stages)
        statistics = self.net.pretrained_cfg
        for name, default in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            values = torch.tensor(statistics.get(name, default)).view(3, 1, 1)
            self.register_buffer(name, values)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Backbone:
        return super().train(False)

    def normalize(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1] as the backbone's weights expect them."""
        return (images - self.mean) / self.std

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Features of normalised pictures (B, 3, H, W): one (B, C, h, w) a level.

        Raises:
            ValueError: the architecture takes pictures of one size only, and not of this one.
        """
        if self.mode == "stages":
            return self._stages(images)
        h, w = images.shape[-2:]
        features = []
        for level in range(self.levels):
            size = max(h >> level, 1), max(w >> level, 1)
            resized = F.interpolate(images, size, mode="bilinear", align_corners=True) if level else images
            features += self._stages(resized)
        return features

    def feature_values(self, height: int, width: int) -> int:
        """How many numbers the features of a picture are, about: its sides over timm's strides, rounded up."""
        about = self.net.feature_info
        stages = list(zip(about.channels(), about.reduction(), strict=True))
        return sum(
            channels * math.ceil((height >> level) / stride) * math.ceil((width >> level) / stride)
            for level in range(self.levels if self.mode == "image_pyramid" else 1)
            for channels, stride in stages
        )

    def _stages(self, images: Tensor) -> list[Tensor]:
        try:
            features = self.net(images)
        except AssertionError as error:  # how transformers of a fixed size refuse another one
            h, w = images.shape[-2:]
            raise ValueError(
                f"{self.arch} cannot take pictures of {h} x {w} pixels: {error}. Choose a backbone_arch that takes any "
                "size, such as a convolutional network, or feature_mode='stages' with center_crop=True and its size as "
                "img_size."
            ) from error
        if getattr(self.net, "output_fmt", "NCHW") == "NHWC":
            return [x.permute(0, 3, 1, 2) for x in features]
        return features


def _create(config: HGADConfig) -> nn.Module:
    import timm

    arch, weights = config.backbone_arch, config.backbone_weights
    assert arch is not None
    if not timm.is_model(arch):
        close = ", ".join(difflib.get_close_matches(arch, timm.list_models(), n=5))
        raise ValueError(
            f"HGADConfig.backbone_arch is {arch!r}, which this timm ({timm.__version__}) does not know"
            + (f"; close to it: {close}" if close else "")
        )
    pretrained = weights == "pretrained"
    state = read_state_dict(Path(weights)) if weights is not None and not pretrained else None
    try:
        if pretrained:
            _try_hub(arch)
        net = timm.create_model(arch, pretrained=pretrained, features_only=True, out_indices=config.out_indices)
    except (RuntimeError, AttributeError, AssertionError, IndexError, TypeError) as error:
        raise ValueError(
            f"timm cannot make HGADConfig.backbone_arch = {arch!r} with out_indices = {config.out_indices} and "
            f"backbone_weights = {weights!r}: {error}"
        ) from error
    except Exception as error:  # timm lets errors of several network libraries through
        if not pretrained:
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConnectionError(
            f"the pretrained weights of {arch!r} could not be had from timm's hub ({reason}). Either download them on "
            "a machine with a network and pass the file as backbone_weights, or pass backbone_weights=None for random "
            "weights."
        ) from error
    if state is not None:
        _load_weights(net, state, config)
    return net


def _try_hub(arch: str) -> None:
    """Ask the hub once for weights that are not in its cache: timm would retry for a minute before it gave up."""
    import huggingface_hub as hub
    import timm
    from huggingface_hub.utils import HfHubHTTPError

    source = timm.get_pretrained_cfg(arch)
    if source is None or not source.hf_hub_id:
        return  # nothing on this hub, or nothing at all: timm knows what to do, or to say
    names = [source.hf_hub_filename or "model.safetensors", "pytorch_model.bin"]
    if any(hub.try_to_load_from_cache(source.hf_hub_id, name) for name in names):
        return
    with suppress(HfHubHTTPError):  # an answer, if only that there is no file of this name
        hub.get_hf_file_metadata(hub.hf_hub_url(source.hf_hub_id, names[0]))


def _load_weights(net: nn.Module, state: dict[str, Tensor], config: HGADConfig) -> None:
    """Load a state dict of the whole classifier or of the feature extractor alone."""
    wanted = net.state_dict()
    found = {_extractor_name(k, wanted): v for k, v in state.items()}
    missing = [k for k in wanted if k not in found and not k.endswith("num_batches_tracked")]
    misfits = [k for k in wanted if k in found and found[k].shape != wanted[k].shape]
    if missing or misfits:
        raise ValueError(
            f"{config.backbone_weights} does not hold weights of {config.backbone_arch!r}: {len(missing)} tensors "
            f"missing{f' (first: {missing[0]})' if missing else ''}, {len(misfits)} of another shape"
            f"{f' (first: {misfits[0]})' if misfits else ''}. Check backbone_arch, backbone_weights and out_indices."
        )
    net.load_state_dict({k: found.get(k, wanted[k]) for k in wanted})


def _extractor_name(name: str, wanted: Collection[str]) -> str:
    """What timm's feature extractors make of a classifier's "stages.0.x": that, "stages_0.x" or "model.stages.0.x"."""
    candidates = (name, name.replace(".", "_", 1), f"model.{name}")
    return next((candidate for candidate in candidates if candidate in wanted), name)


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """A state dict from a safetensors or PyTorch file; nothing in the file is executed.

    Raises:
        ValueError: the file is missing, unreadable, or holds something else.
    """
    if not file.is_file():
        raise ValueError(f"backbone_weights: there is no file {file}")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise many kinds for a damaged file
        reason = str(error).partition("\n")[0]
        raise ValueError(f"backbone_weights: {file} cannot be read as a state dict ({reason})") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"backbone_weights: {file} holds no state dict (a dict of tensors)")
    return {k.removeprefix("module."): v for k, v in state.items()}
