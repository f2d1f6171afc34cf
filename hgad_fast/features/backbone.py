"""The frozen feature extractor: picture (B, 3, H, W) -> one feature map (B, C, h, w) a level."""

from __future__ import annotations

import copy
import ctypes
import difflib
import functools
import itertools
import math
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import tiles
from .config import HGADConfig
from .interpolate import between, bilinear

TILE_MEMORY = 1000 * 2**20
"""Bytes that the backbone may take for a tile. It fixes the tiles, so that they depend on the picture's size alone."""
ALWAYS_WHOLE = 2**20  # pixels of a picture that is not worth cutting
TILES = ("auto", "always", "never")
_libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class FeatureMaps:
    """Features of all levels, whole or piece by piece.

    Attributes:
        batch, sizes: B, and (h, w) of each level.
        pieces: gives level, top, left and features (B, C, rows, columns) of each piece; may be called again.
    """

    batch: int
    sizes: list[tuple[int, int]]
    pieces: Callable[[], Iterable[tuple[int, int, int, Tensor]]]

    @classmethod
    def of(cls, levels: Sequence[Tensor]) -> FeatureMaps:
        """From one (B, C, h, w) a level."""
        sizes = [(x.shape[2], x.shape[3]) for x in levels]
        return cls(len(levels[0]), sizes, lambda: ((level, 0, 0, x) for level, x in enumerate(levels)))

    def whole(self) -> list[Tensor]:
        """One (B, C, h, w) a level."""
        levels: dict[int, Tensor] = {}
        for level, top, left, x in self.pieces():
            size = self.sizes[level]
            if x.shape[2:] == size:
                levels[level] = x
                continue
            whole = levels.setdefault(level, x.new_empty(*x.shape[:2], *size))
            whole[:, :, top : top + x.shape[2], left : left + x.shape[3]] = x
        return [levels[level] for level in range(len(self.sizes))]


@dataclass(frozen=True)
class Pass:
    """How the network goes over a picture: at which size, in which tiles, and what size its stages have."""

    size: tuple[int, int]
    stages: list[tuple[int, int]]
    rows: list[tiles.Cut]
    columns: list[tiles.Cut]

    @property
    def tile_pixels(self) -> int:
        """Of the largest tile, halo included."""
        return max(c.stop - c.start for c in self.rows) * max(c.stop - c.start for c in self.columns)


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
        self._made_fast: tuple[Any, _Fast] | None = None
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Backbone:
        return super().train(False)

    def normalize(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1] as the backbone's weights expect them."""
        return (images - self.mean) / self.std

    @torch.no_grad()
    def forward(self, images: Tensor, *, fast: bool = False) -> list[Tensor]:
        """Features of normalised pictures (B, 3, H, W): one (B, C, h, w) a level.

        Args:
            images: the pictures.
            fast: in half the time and less memory; see `streamlined`. So `fit` and `score` see them; without it they
                are timm's to the bit.

        Raises:
            ValueError: the architecture takes pictures of one size only, and not of this one.
        """
        net = self._fast().net if fast else self.net
        features = []
        for size in self._sizes(*images.shape[2:]):
            resized = images
            if size != images.shape[2:]:
                resized = F.interpolate(images, size, mode="bilinear", align_corners=True)
            features += self._stages(resized, net)
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

    def feature_maps(self, picture: Tensor, cut: bool = True) -> FeatureMaps:
        """Features of a picture (3, H, W) in [0, 1], with `cut` in tiles where it is large: see `passes`."""
        if not cut or picture[0].numel() <= ALWAYS_WHOLE:
            return FeatureMaps.of(self(self.normalize(picture[None].to(self.mean.device)), fast=True))
        plan = self.passes(*picture.shape[1:])
        sizes = [size for one in plan for size in one.stages]
        return FeatureMaps(1, sizes, functools.partial(self._pieces, picture, plan))

    def passes(self, height: int, width: int, cut: bool = True) -> list[Pass]:
        """Those over a picture of this size, in tiles of at most `TILE_MEMORY`, or whole without `cut`.

        The halo of a network that looks at the whole picture is no more than a quarter of a tile: no halo would do.
        """
        fast = self._fast()
        about, empty = fast.footprint, fast.shadow
        plan = []
        for size in self._sizes(height, width):
            with torch.no_grad():
                found = self._stages(torch.empty(1, 3, *size, device="meta"), empty)
            stages = [(x.shape[2], x.shape[3]) for x in found]
            cells = min(stages)
            limit = math.inf
            if cut and about.bytes_per_pixel:
                limit = max(TILE_MEMORY / about.bytes_per_pixel, ALWAYS_WHOLE)
            halo = about.halo
            if not about.is_local and limit < math.inf:
                halo = min(halo, int(math.sqrt(limit) / 4 / about.stride) * about.stride)
            rows, columns = tiles.tiling(size, cells, about.stride, halo, limit)
            plan.append(Pass(size, stages, rows, columns))
        return plan

    @property
    def footprint(self) -> tiles.Footprint:
        """What the network takes for a picture."""
        return self._fast().footprint

    @property
    def is_local(self) -> bool:
        """Whether tiles give the features of the whole picture."""
        return self.footprint.is_local

    @property
    def strides(self) -> list[int]:
        """Pixels of a cell of each stage."""
        return self.net.feature_info.reduction()

    def working_set(self, height: int, width: int, cut: bool = True) -> int:
        """Bytes that the features of a picture of this size need beyond it, about, those of one tile counted."""
        each = self.footprint.bytes_per_pixel + 36  # the tile in float32, normalised, with channels last
        return int(max(each * one.tile_pixels for one in self.passes(height, width, cut)))

    def _sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Of the pictures that the network sees."""
        levels = self.levels if self.mode == "image_pyramid" else 1
        return [(max(height >> level, 1), max(width >> level, 1)) for level in range(levels)]

    @torch.no_grad()
    def _pieces(self, picture: Tensor, plan: list[Pass]) -> Iterator[tuple[int, int, int, Tensor]]:
        fast = self._fast()
        for i, one in enumerate(plan):
            for rows, columns in itertools.product(one.rows, one.columns):
                tile = self.normalize(_part(picture, one.size, rows, columns).to(self.mean.device))
                found = self._stages(tile[None], fast.net)
                for j, (x, size, stride) in enumerate(zip(found, one.stages, self.strides, strict=True)):
                    finer = fast.footprint.stride // stride
                    (top, bottom), (left, right) = (
                        (c.first * finer, n if c is cuts[-1] else c.last * finer)
                        for c, cuts, n in ((rows, one.rows, size[0]), (columns, one.columns, size[1]))
                    )
                    above, before = rows.start // stride, columns.start // stride
                    core = x[:, :, top - above : bottom - above, left - before : right - before]
                    yield i * len(one.stages) + j, top, left, core
                _trim()

    def _fast(self) -> _Fast:
        """The network as it is run on pictures, made anew when its weights have changed or moved."""
        weights = tuple((t.data_ptr(), t._version) for t in (*self.net.parameters(), *self.net.buffers()))
        if self._made_fast is None or self._made_fast[0] != weights:
            self._made_fast = weights, _Fast(self.net)
        return self._made_fast[1]

    def _stages(self, images: Tensor, net: nn.Module) -> list[Tensor]:
        if net is not self.net:
            images = images.contiguous(memory_format=torch.channels_last)
        try:
            features = net(images)
        except (AssertionError, RuntimeError) as error:  # how networks refuse a size
            if isinstance(error, RuntimeError) and images.device.type != "meta":
                self._stages(images.to("meta"), self._fast().shadow)  # not the size, but memory or the device?
                raise
            h, w = images.shape[-2:]
            raise ValueError(
                f"{self.arch} cannot take pictures of {h} x {w} pixels: {error}. Choose a backbone_arch that takes any "
                "size, such as a convolutional network, or feature_mode='stages' with center_crop=True and its size as "
                "img_size."
            ) from error
        return tiles.channels_first(self.net, features)


def _trim() -> None:
    """Give memory that was freed back to the system: glibc keeps what lies in pieces, and would grow tile by tile."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


class _Fast:
    """A network made for inference, and what it takes; the latter is found when first asked for."""

    def __init__(self, net: Any) -> None:
        self.strides = net.feature_info.reduction()
        self.net = streamlined(net)

    @functools.cached_property
    def shadow(self) -> nn.Module:
        return tiles.shadow(self.net)

    @functools.cached_property
    def footprint(self) -> tiles.Footprint:
        return tiles.footprint(self.net, self.strides)


@torch.no_grad()
def streamlined(net: Any) -> nn.Module:
    """A copy that gives the features of a timm network, to rounding, in half the time and less memory.

    Batch norms become part of the convolutions whose output they take, and stages after the last one wanted are left
    out. On noise, its error against float64 must be like that of the network as it is, or that is copied; so it is for
    one that takes pictures of one size only.
    """
    plain = copy.deepcopy(net).to(memory_format=torch.channels_last)
    fast = copy.deepcopy(plain)
    *path, last = net.feature_info.module_name()[-1].split(".")
    with suppress(AttributeError):
        parent = fast.get_submodule(".".join(path))
        if isinstance(parent, nn.Sequential) and path and last.isdecimal():
            del parent[int(last) + 1 :]
    noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(next(net.parameters()))
    try:
        _fold_batch_norms(fast)
        exact = copy.deepcopy(net).double()(noise.double())
        for x, as_it_is, reference in zip(fast(noise), plain(noise), exact, strict=True):
            if not (x - reference).norm() <= 4 * (as_it_is - reference).norm() + 1e-6 * reference.norm():
                return plain
    except (AssertionError, RuntimeError):
        return plain
    return fast


def _fold_batch_norms(net: nn.Module) -> None:
    empty = tiles.shadow(net)
    names = {layer: name for name, layer in empty.named_modules()}
    made: list[tuple[Tensor, str]] = []  # holds on to the outputs: none may take the identity of another
    pairs: list[tuple[str, str]] = []

    def norm(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        pairs.extend((conv, names[layer]) for output, conv in made if output is inputs[0])

    for layer in empty.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda layer, _, output: made.append((output, names[layer])))
        elif isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(norm)
    empty(torch.empty(1, 3, 64, 64, device="meta"))
    for conv_name, norm_name in pairs:
        conv, batch_norm = net.get_submodule(conv_name), net.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d) and isinstance(batch_norm, nn.BatchNorm2d)
        mean, variance = batch_norm.running_mean, batch_norm.running_var
        weights = conv.weight, conv.bias, mean, variance, batch_norm.eps, batch_norm.weight, batch_norm.bias
        conv.weight, conv.bias = nn.utils.fuse_conv_bn_weights(*weights)  # type: ignore[arg-type]
        net.set_submodule(norm_name, getattr(batch_norm, "act", nn.Identity()))  # timm's norms hold an activation


def _part(picture: Tensor, size: tuple[int, int], rows: tiles.Cut, columns: tiles.Cut) -> Tensor:
    """A tile of a picture (3, H, W) resized to `size`."""
    if size == picture.shape[1:]:
        return picture[:, rows.start : rows.stop, columns.start : columns.stop]
    at = [
        between(torch.arange(c.start, c.stop, device=picture.device), n, resized, align_corners=True)
        for c, n, resized in zip((rows, columns), picture.shape[1:], size, strict=True)
    ]
    return bilinear(picture, *at)


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
