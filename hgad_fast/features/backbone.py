"""The frozen feature extractor: images (B, 3, H, W) -> one feature map (B, C, h, w) per level."""

from __future__ import annotations

import ctypes
import difflib
import functools
import itertools
import math
import operator
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..environment import one_thread, require_float32
from ..files import printable, read_torch_file, require_tensors
from ..importing import uncollected
from . import joining, tiles
from .hub import IN_A_PACKAGE, OWN_WEIGHTS, PREFIXES, ask_hub, reaching_hub, without_hub
from .interpolate import between, bilinear
from .packaged import PACKAGED, packaged_state_dict
from .streamlined import streamlined

TILE_MEMORY = 1000 * 2**20
"""Bytes that the backbone may take for a tile: a constant, so that the tiles depend on the image's size alone."""
ALWAYS_WHOLE = 2**20  # pixels of an image up to which it is never cut
TILES = ("auto", "always", "never")
_libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None


class BackboneSettings(Protocol):
    """The fields of a configuration that define the backbone."""

    backbone_arch: str | None
    backbone_weights: str | None
    feature_levels: int
    feature_mode: str
    out_indices: joining.OutIndices
    grid_stride: int


@dataclass(frozen=True)
class FeatureMaps:
    """Features of all levels, whole or piece by piece.

    Attributes:
        batch, sizes: B, and (h, w) of each level.
        pieces: returns level, top, left and features (B, C, rows, columns) of each piece; may be called repeatedly.
    """

    batch: int
    sizes: list[tuple[int, int]]
    pieces: Callable[[], Iterable[tuple[int, int, int, Tensor]]]

    @classmethod
    def of(cls, levels: Sequence[Tensor]) -> FeatureMaps:
        """Wrap features that are computed already, one (B, C, h, w) per level."""
        sizes = [(x.shape[2], x.shape[3]) for x in levels]
        return cls(len(levels[0]), sizes, lambda: ((level, 0, 0, x) for level, x in enumerate(levels)))

    def whole(self) -> list[Tensor]:
        """Return the features as one (B, C, h, w) per level."""
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
    """One pass of the network over an image.

    Attributes:
        size: to which the image is resized.
        stages: (h, w) of the network's stages.
        levels: (h, w) of the levels that are made of them.
        rows, columns: the tiles.
        whole: True if the features of all tiles come in one piece, as stages are joined on the whole map.
    """

    size: tuple[int, int]
    stages: list[tuple[int, int]]
    levels: list[tuple[int, int]]
    rows: list[tiles.Cut]
    columns: list[tiles.Cut]
    whole: bool

    @property
    def tile_pixels(self) -> int:
        """Pixels of the largest tile, halo included."""
        return max(c.stop - c.start for c in self.rows) * max(c.stop - c.start for c in self.columns)


class Backbone(nn.Module):
    """A timm model, frozen and always in eval mode.

    With ``feature_mode="image_pyramid"`` level s is one stage of the image at (H >> s, W >> s) (bilinear, aligned
    corners, as official); with ``"stages"`` the levels are several stages of one pass; with ``"joined"`` the stages of
    one pass are one level: see `joining.joined`. A stage is a layer of the network or the mean of several: see
    `joining.stages_of`.

    A transformer takes images of any size where timm lets it (the position embedding is resampled): they are resized to
    the nearest multiples of its patch, at least one (bilinear, aligned corners, as the pyramid).

    Attributes:
        arch, weights: `backbone_arch` and `backbone_weights` of the configuration; of a model of the hub what
            `hub.without_hub` makes of them.
        mean, std: the channel statistics that the weights expect, (3, 1, 1), from timm's configuration of the model;
            saved with the weights.
        feature_dims: channels of each level.
        stage_dims: channels of the stages that are joined in each level, in their order; one where none are joined.
        fine_stages: how many of these, from the first, are not coarser than the level's grid.

    Raises:
        ValueError: the architecture is unknown, or the weights' file does not fit it.
        ConnectionError: the weights are to come from the hub, and it cannot be reached.
    """

    mean: Tensor
    std: Tensor
    net: Any

    def __init__(self, config: BackboneSettings) -> None:
        super().__init__()
        assert config.backbone_arch is not None
        self.arch, self.weights = without_hub(config.backbone_arch, config.backbone_weights)
        self.mode = config.feature_mode
        self.pyramid_levels = config.feature_levels if self.mode == "image_pyramid" else 1
        self.out_indices = config.out_indices
        self.net, self.multiple = _create(config, self.arch, self.weights)
        self.stage_channels = self._by_stage(self.net.feature_info.channels(), "channels")
        self.stage_strides = self._by_stage(self.net.feature_info.reduction(), "stride")
        self.grid = joining.grid_of(self.stage_strides, config.grid_stride)
        if self.mode == "joined":
            self.stage_dims: tuple[tuple[int, ...], ...] = (tuple(self.stage_channels),)
        else:
            self.stage_dims = tuple((channels,) for channels in self.stage_channels * self.pyramid_levels)
        self.feature_dims = tuple(map(sum, self.stage_dims))
        fine_stages = sum(stride <= self.stage_strides[self.grid] for stride in self.stage_strides)
        self.fine_stages = (fine_stages,) if self.mode == "joined" else (1,) * len(self.stage_dims)
        statistics = self.net.pretrained_cfg
        for name, default in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            values = torch.tensor(statistics.get(name, default)).view(3, 1, 1)
            self.register_buffer(name, values)
        self._made_fast: tuple[_Weights, _Fast] | None = None
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Backbone:
        """Stay in eval mode, whatever `mode` is."""
        return super().train(False)

    def normalize(self, images: Tensor) -> Tensor:
        """Normalise images in [0, 1] as the backbone's weights expect them."""
        return (images - self.mean) / self.std

    @torch.no_grad()
    def forward(self, images: Tensor, *, fast: bool = False) -> list[Tensor]:
        """Return the features of normalised images (B, 3, H, W): one (B, C, h, w) per level.

        Args:
            images: the images.
            fast: take half the time and less memory, as `fit` and `score` do; see `streamlined`. Without it the
                features are timm's to the bit.

        Raises:
            ValueError: the architecture takes images of one size only, and not of this one.
        """
        net = self._fast().net if fast else self.net
        if fast:
            images = images.contiguous(memory_format=torch.channels_last)  # to be resized in half the time, too
        features = []
        for size in self.pass_sizes(*images.shape[2:]):
            resized = images
            if size != images.shape[2:]:
                resized = F.interpolate(images, size, mode="bilinear", align_corners=True)
            features += self._levels(self._stages(resized, net))
        return features

    def feature_values(self, height: int, width: int) -> int:
        """Return about how many values the features of an image have: its sides over timm's strides are rounded up."""
        dims = self.feature_dims[: len(self.strides)]
        return sum(
            channels * math.ceil(h / stride) * math.ceil(w / stride)
            for h, w in self.pass_sizes(height, width)
            for channels, stride in zip(dims, self.strides, strict=True)
        )

    def cells(self, length: int) -> int:
        """Return how many cells the finest level has along `length` pixels; timm's strides are rounded up."""
        return math.ceil(self.pass_sizes(length, length)[0][0] / self.strides[0])

    def feature_maps(self, image: Tensor, cut: bool = True) -> FeatureMaps:
        """Return the features of an image (3, H, W) in [0, 1], with `cut` in tiles if it is large: see `passes`."""
        if not cut or image[0].numel() <= ALWAYS_WHOLE:
            return FeatureMaps.of(self(self.normalize(image[None].to(self.mean.device)), fast=True))
        passes = self.passes(*image.shape[1:])
        sizes = [size for image_pass in passes for size in image_pass.levels]
        return FeatureMaps(1, sizes, functools.partial(self._pieces, image, passes))

    def passes(self, height: int, width: int, cut: bool = True) -> list[Pass]:
        """Plan the passes over an image of this size, in tiles of at most `TILE_MEMORY`, or whole without `cut`.

        A network that looks at the whole image gets a halo of at most a quarter of a tile, as none would be enough.
        """
        fast = self._fast()
        footprint = fast.footprint
        passes = []
        for size in self.pass_sizes(height, width):
            with torch.no_grad():
                features = self._stages(torch.empty(1, 3, *size, device="meta"), fast.shadow)
            stages = [(x.shape[2], x.shape[3]) for x in features]
            cells = min(stages)
            max_pixels = math.inf
            if cut and footprint.bytes_per_pixel:
                max_pixels = max(TILE_MEMORY / footprint.bytes_per_pixel, ALWAYS_WHOLE)
            halo = footprint.halo
            if not footprint.is_local and max_pixels < math.inf:
                halo = min(halo, int(math.sqrt(max_pixels) / 4 / footprint.stride) * footprint.stride)
            rows, columns = tiles.tiling(size, cells, footprint.stride, halo, max_pixels)
            joined = self.mode == "joined"
            passes.append(Pass(size, stages, [stages[self.grid]] if joined else stages, rows, columns, joined))
        return passes

    @property
    def footprint(self) -> tiles.Footprint:
        """The memory and the surroundings that the network needs."""
        return self._fast().footprint

    @property
    def is_local(self) -> bool:
        """True if tiles give the features of the whole image."""
        return self.footprint.is_local

    @property
    def strides(self) -> list[int]:
        """The stride of each level of a pass: pixels per cell."""
        return [self.stage_strides[self.grid]] if self.mode == "joined" else self.stage_strides

    def working_set(self, height: int, width: int, cut: bool = True) -> int:
        """Return about how many bytes it takes to compute the features of an image, beyond the image.

        The features of one tile are counted, not those of the whole image, except where stages are joined: that needs
        all of each stage, and as much as the level has for stages on its grid.
        """
        bytes_per_pixel = self.footprint.bytes_per_pixel + 36  # the tile in float32, normalised, with channels last
        needed = 0.0
        for image_pass in self.passes(height, width, cut):
            tile = bytes_per_pixel * image_pass.tile_pixels
            if image_pass.whole:
                stages = zip(self.stage_channels, image_pass.stages, strict=True)
                level = self.feature_dims[0] * math.prod(image_pass.levels[0])
                tile = max(tile, 8.0 * level) + 4 * sum(channels * h * w for channels, (h, w) in stages)
            needed = max(needed, tile)
        return int(needed)

    def pass_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Return the sizes of the images that the network sees, one for each pass."""

        def side(length: int, level: int) -> int:
            multiples = ((length >> level) + self.multiple // 2) // self.multiple  # the nearest, of two the larger one
            return max(multiples, 1) * self.multiple

        return [(side(height, level), side(width, level)) for level in range(self.pyramid_levels)]

    def _by_stage(self, values: Sequence[int], name: str) -> list[int]:
        """Return a property of the network's layers for each stage.

        Raises:
            ValueError: the layers of a group differ in it.
        """
        stages = joining.by_stage(values, self.out_indices)
        for group, entry in zip(stages, self.out_indices, strict=True):
            if len(set(group)) > 1:
                raise ValueError(
                    f"out_indices: the layers {entry} of {self.arch} cannot be averaged, as their {name} differ: "
                    f"{', '.join(map(str, group))}; group layers of one size only"
                )
        return [group[0] for group in stages]

    def _levels(self, stages: list[Tensor]) -> list[Tensor]:
        """Return the levels (B, C, h, w) that the stages of a pass make."""
        return [joining.joined(stages, self.stage_strides, self.grid)] if self.mode == "joined" else stages

    @torch.no_grad()
    def _pieces(self, image: Tensor, passes: list[Pass]) -> Iterator[tuple[int, int, int, Tensor]]:
        """Yield the `FeatureMaps.pieces` of an image: tile by tile, or whole where stages are joined."""
        if self.mode != "joined":
            yield from self._stage_pieces(image, passes)
            return
        stages = FeatureMaps(1, passes[0].stages, functools.partial(self._stage_pieces, image, passes)).whole()
        yield 0, 0, 0, joining.joined(stages, self.stage_strides, self.grid)

    @torch.no_grad()
    def _stage_pieces(self, image: Tensor, passes: list[Pass]) -> Iterator[tuple[int, int, int, Tensor]]:
        """Yield the pieces of the stages of all passes, tile by tile."""
        fast = self._fast()
        for i, image_pass in enumerate(passes):
            for rows, columns in itertools.product(image_pass.rows, image_pass.columns):
                tile = self.normalize(_part(image, image_pass.size, rows, columns).to(self.mean.device))
                features = self._stages(tile[None], fast.net)
                for j, (x, size, stride) in enumerate(
                    zip(features, image_pass.stages, self.stage_strides, strict=True)
                ):
                    scale = fast.footprint.stride // stride  # cells of this stage per cell of the coarsest one
                    (top, bottom), (left, right) = (
                        (c.first * scale, n if c is cuts[-1] else c.last * scale)
                        for c, cuts, n in ((rows, image_pass.rows, size[0]), (columns, image_pass.columns, size[1]))
                    )
                    tile_top, tile_left = rows.start // stride, columns.start // stride
                    core = x[:, :, top - tile_top : bottom - tile_top, left - tile_left : right - tile_left]
                    yield i * len(image_pass.stages) + j, top, left, core
                _trim()

    def _fast(self) -> _Fast:
        """Return the network as it is run on images, made anew when its weights have changed or moved."""
        if self._made_fast is None or not self._made_fast[0].unchanged():
            require_float32(self)
            # a network with positions depends on where a tile lies, if only by very little as long as it is untrained
            self._made_fast = _Weights(self.net), _Fast(self.net, maybe_local=self.multiple == 1)
        return self._made_fast[1]

    def _stages(self, images: Tensor, net: nn.Module) -> list[Tensor]:
        """Return the features that a form of the network gives, (B, C, h, w) of each stage.

        Raises:
            ValueError: the network does not take images of this size.
        """
        exact: AbstractContextManager[Any] = nullcontext()
        if net is not self.net:
            images = images.contiguous(memory_format=torch.channels_last)
            if images.device.type != "meta" and torch.is_autocast_enabled(images.device.type):
                exact = torch.autocast(images.device.type, enabled=False)  # features are float32 whoever asks for them
        try:
            with exact:
                features = net(images)
        except (AssertionError, RuntimeError) as error:  # networks refuse a size by one of these
            if isinstance(error, RuntimeError) and images.device.type != "meta":
                self._stages(images.to("meta"), self._fast().shadow)  # a ValueError if it is the size
                raise  # memory or the device
            h, w = images.shape[-2:]
            raise ValueError(
                f"{self.arch} cannot take images of {h} x {w} pixels: {error}. Choose a backbone_arch that takes any "
                "size, such as a convolutional network, or feature_mode='stages' with center_crop=True and its size as "
                "img_size."
            ) from error
        return joining.stages_of(tiles.channels_first(self.net, features), self.out_indices)


def _trim() -> None:
    """Return freed memory to the system: glibc keeps what is fragmented, and would take more with every tile."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


_version = operator.attrgetter("_version")


class _Weights:
    """The tensors of a network as they were when this was made, by place and version.

    Each image pays for the comparison. So the modules' dictionaries are looked through as they are, and by functions
    that need no line of Python for a tensor: to walk the modules anew takes twenty times as long.
    """

    def __init__(self, net: nn.Module) -> None:
        modules = list(net.modules())
        groups: list[Any] = [(module._modules, module._parameters, module._buffers) for module in modules]
        self._groups = [group for of_module in groups for group in of_module if group]
        self._kept = self._members()  # alive, so that no other object can have their identity
        self._placed = [tensor for tensor in self._kept if isinstance(tensor, Tensor)]
        self._versioned = [tensor for tensor in self._placed if not tensor.is_inference()]
        self._state = self._read()

    def unchanged(self) -> bool:
        """Return whether the network still has these tensors, and none of them was written to or moved."""
        return self._state == self._read()

    def _members(self) -> list[Any]:
        return list(itertools.chain.from_iterable(map(dict.values, self._groups)))

    def _read(self) -> tuple[list[int], list[int], list[int]]:
        identities = list(map(id, self._members()))
        return identities, list(map(Tensor.data_ptr, self._placed)), list(map(_version, self._versioned))


class _Fast:
    """A network made for inference, with its shadow and its footprint, which are made when first asked for."""

    def __init__(self, net: Any, maybe_local: bool) -> None:
        self.strides, self.maybe_local = net.feature_info.reduction(), maybe_local
        with one_thread():
            self.net = streamlined(net)

    @functools.cached_property
    def shadow(self) -> nn.Module:
        return tiles.shadow(self.net)

    @functools.cached_property
    def footprint(self) -> tiles.Footprint:
        with one_thread():
            return tiles.footprint(self.net, self.strides, self.maybe_local)


def _part(image: Tensor, size: tuple[int, int], rows: tiles.Cut, columns: tiles.Cut) -> Tensor:
    """Return a tile of an image (3, H, W) that is resized to `size`, without resizing the rest."""
    if size == image.shape[1:]:
        return image[:, rows.start : rows.stop, columns.start : columns.stop]
    positions = [
        between(torch.arange(c.start, c.stop, device=image.device), n, resized, align_corners=True)
        for c, n, resized in zip((rows, columns), image.shape[1:], size, strict=True)
    ]
    return bilinear(image, *positions)


def _create(config: BackboneSettings, arch: str, weights: str | None) -> tuple[Any, int]:
    """Return timm's feature extractor with its weights, and the pixels that its images' sides are multiples of.

    These are 1 where the network takes any size, or one of its own only; see `Backbone` for the errors.
    """
    with uncollected():
        import timm

    if not timm.is_model(arch):
        similar = ", ".join(difflib.get_close_matches(arch, timm.list_models(), n=5))
        raise ValueError(
            f"{type(config).__name__}.backbone_arch is {arch!r}, which this timm ({timm.__version__}) does not know"
            + (f"; close to it: {similar}" if similar else "; models of its hub are written hf-hub:owner/name")
        )
    from_hub = weights is not None and weights.startswith(PREFIXES)
    pretrained = weights == "pretrained" or from_hub
    state = None
    if weights == "packaged":
        state = packaged_state_dict(arch)
    elif weights is not None and not pretrained:
        state = read_state_dict(Path(weights))
    make: Callable[..., Any] = functools.partial(
        timm.create_model,
        str(weights) if from_hub else arch,
        pretrained=pretrained,
        features_only=True,
        out_indices=joining.layers_of(config.out_indices),
    )
    multiple = 1
    try:
        if pretrained:
            _ask_hub(arch, str(weights) if from_hub else None)
        try:
            net = make(dynamic_img_size=True)  # at the size of its weights, to which they fit
            multiple = max(net.feature_info.reduction())
        except TypeError:  # timm has no such option for this architecture
            net = make()
    except (RuntimeError, AttributeError, AssertionError, IndexError, TypeError) as error:
        raise ValueError(
            f"timm cannot make {type(config).__name__}.backbone_arch = {arch!r} with out_indices = "
            f"{config.out_indices} and backbone_weights = {weights!r}: {error}"
        ) from error
    except Exception:
        if not pretrained:
            raise
        failure = f"the pretrained weights of {arch!r} could not be had from timm's hub"
        with reaching_hub(failure, IN_A_PACKAGE if arch in PACKAGED else OWN_WEIGHTS):
            raise
    if state is not None:
        _load_weights(net, state, config)
    return net, multiple


def _ask_hub(arch: str, weights: str | None) -> None:
    """Ask the hub for the pretrained weights of an architecture, or for those of a model of the hub."""
    with uncollected():
        import timm

    if weights is not None:
        ask_hub(weights.partition(":")[2], "model.safetensors", "pytorch_model.bin")
        return
    source = timm.get_pretrained_cfg(arch)
    if source is not None and source.hf_hub_id:  # else timm knows what to do, or raises the error
        ask_hub(source.hf_hub_id, source.hf_hub_filename or "model.safetensors", "pytorch_model.bin")


def _load_weights(net: nn.Module, state: dict[str, Tensor], config: BackboneSettings) -> None:
    """Load a state dict of the whole classifier or of the feature extractor alone; a ValueError if it does not fit."""
    expected = net.state_dict()
    given = {_extractor_name(name, expected): tensor for name, tensor in state.items()}
    missing = [name for name in expected if name not in given and not name.endswith("num_batches_tracked")]
    misfits = [name for name in expected if name in given and given[name].shape != expected[name].shape]
    if missing or misfits:
        raise ValueError(
            f"{config.backbone_weights} does not hold weights of {config.backbone_arch!r}: {len(missing)} tensors "
            f"missing{f' (first: {missing[0]})' if missing else ''}, {len(misfits)} of another shape"
            f"{f' (first: {misfits[0]})' if misfits else ''}. Check backbone_arch, backbone_weights and out_indices."
        )
    net.load_state_dict({name: given.get(name, expected[name]) for name in expected})


def _extractor_name(name: str, expected: Collection[str]) -> str:
    """Return a classifier's name in an extractor: "stages.0.x" stays, or is "stages_0.x" or "model.stages.0.x"."""
    candidates = (name, name.replace(".", "_", 1), f"model.{name}")
    return next((candidate for candidate in candidates if candidate in expected), name)


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """Read a state dict from a safetensors or PyTorch file; nothing in the file is executed.

    Raises:
        ValueError: the file is missing, unreadable, or holds something else.
    """
    if not file.is_file():
        known = ("pretrained", "packaged", "random")
        near = difflib.get_close_matches(file.name, known, n=1)
        raise ValueError(
            f"backbone_weights: there is no file {printable(file)}"
            + (f"; did you mean {near[0]!r}" if near else "")
            + ". Allowed are 'pretrained', 'packaged', 'random' (in Python None), or a file with a state dict"
        )
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(file)
        else:
            state = read_torch_file(file, "state dict")
    except Exception as error:  # safetensors raises kinds of its own
        reason = str(error).partition("\n")[0]
        raise ValueError(f"backbone_weights: {printable(file)} cannot be read as a state dict ({reason})") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    require_tensors(f"backbone_weights: {printable(file)}", state)
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}
