"""Features of the frozen backbone, computed once a picture."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import data as pictures
from . import images, score
from .backbone import Backbone
from .cache import SHARD_BYTES, SHARD_PICTURES, CacheFull, DiskCache, Features, MemoryCache
from .files import byte_count, readable
from .model import state_hash

if TYPE_CHECKING:
    from .model import HGADModel

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Cache = MemoryCache | DiskCache
Progress = Callable[[Sequence[Any], str], Iterable[Any]]  # wraps a loop, e.g. in a bar with the given title
Report = Callable[[str, pictures.ImageError], None]  # told the content of a picture, and what is wrong with it


@dataclass
class FeatureSet:
    """Features of n normal pictures, ready for training.

    Attributes:
        images: for each picture a list of one (C, h, w) float32 tensor a level; pictures may differ in size.
        class_ids: (n,) int64.
        fingerprint: names the data, so that training is not resumed on other data; made from them where it is empty.
        exact: like `images`, but as `score` computes them, where those have been rounded; calibration takes these.
    """

    images: Sequence[list[Tensor]]
    class_ids: Tensor
    fingerprint: str = ""
    exact: Sequence[list[Tensor]] | None = None

    def __post_init__(self) -> None:
        self.class_ids = torch.as_tensor(self.class_ids, dtype=torch.int64).cpu()
        if self.class_ids.shape != (len(self.images),):
            raise ValueError(f"{len(self.images)} pictures and class ids of shape {tuple(self.class_ids.shape)}")
        self.fingerprint = self.fingerprint or _fingerprint(self.images, self.class_ids)

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def from_levels(cls, levels: Sequence[Tensor], class_ids: Tensor | Sequence[int]) -> FeatureSet:
        """From one (n, C, h, w) tensor a level."""
        shapes = [tuple(getattr(level, "shape", ())) for level in levels]
        if any(len(shape) != 4 or shape[0] != shapes[0][0] for shape in shapes):
            raise ValueError(f"features must be one (n, C, h, w) tensor a level with one n; the shapes are {shapes}")
        images = [[channels_last(level) for level in image] for image in zip(*levels, strict=True)]
        return cls(images, torch.as_tensor(class_ids))

    def subset(self, indices: Tensor) -> FeatureSet:
        """Some of the pictures, in the order of `indices`."""
        fingerprint = hashlib.sha256(self.fingerprint.encode() + indices.numpy().tobytes()).hexdigest()
        images, exact = (
            None if sequence is None else _Selected(sequence, indices.tolist())
            for sequence in (self.images, self.exact)
        )
        assert images is not None
        return FeatureSet(images, self.class_ids[indices], fingerprint, exact)


def _fingerprint(images: Sequence[list[Tensor]], class_ids: Tensor) -> str:
    digest = hashlib.sha256(class_ids.numpy().tobytes())
    for image in images:
        for level in image:
            digest.update(f"{tuple(level.shape)} {level.dtype}".encode())
            pixels = level.detach().cpu().movedim(0, -1).contiguous()  # a view of what channels_last made
            digest.update(pixels.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _Selected(Sequence[list[Tensor]]):
    """Some items of a sequence; none is touched before it is asked for."""

    def __init__(self, items: Sequence[list[Tensor]], indices: list[int]) -> None:
        self.items, self.indices = items, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: Any) -> Any:
        return self.items[self.indices[i]]


def channels_last(features: Tensor) -> Tensor:
    """A map (C, h, w) in float32 whose pixels are contiguous, so that its rows of pixels are a view."""
    return features.detach().float().permute(1, 2, 0).contiguous().permute(2, 0, 1)


def feature_set(
    model: HGADModel,
    data: Any,
    *,
    cache: str | None = "ram",
    cache_dir: str | os.PathLike[str] | None = None,
    cache_dtype: str = "float32",
    cache_limit: int | str | None = None,
    skip_bad: bool = False,
    on_bad: Callable[[pictures.ImageError], None] | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> FeatureSet:
    """Features of normal pictures, in whatever form they come.

    Pictures are decoded and go through the backbone once, unless their features are in the cache already; of those the
    files' content is hashed, no more. Each goes by itself, so that its features have the bits that `score` sees.

    Args:
        model: gives the backbone, the preprocessing and the classes; takes the dataset's class names if it has none.
        data: a `FeatureSet`, a `data.Dataset` or the root of one (its training pictures), or a pair (one (n, C, h, w)
            tensor a level, n class ids).
        cache: ``"ram"`` keeps the features of pictures in memory, ``"disk"`` in `cache_dir`, from which later runs and
            other processes take them too; None computes those of a picture each time they are needed.
        cache_dir: folder of ``"disk"``. It may serve any models and datasets, and be deleted while nobody trains.
        cache_dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``: the precision of the features, whether and wherever
            they are kept. With half of it they take half of the room; `FeatureSet.exact` has them unrounded.
        cache_limit: bytes, or a size such as ``"20GB"``, which the features in memory, or all in `cache_dir`, may take.
            To stay below it, features in `cache_dir` that this run does not need are deleted, those longest unused
            first. What still does not fit, or finds the disk full, is computed each time it is needed; a warning
            says so.
        skip_bad: leave out pictures that cannot be decoded, and report each to `on_bad`, instead of an error that lists
            them all.
        on_bad: told of each picture that is left out.
        progress: wraps the loop over the pictures, e.g. in a progress bar with the given title.
        say: told how large the features will be, before they are written.

    Raises:
        ValueError: the classes or the features' shapes are not those of the model; pictures cannot be decoded.
        OSError: there is no folder `cache_dir`, and it cannot be made.
    """
    if cache not in ("ram", "disk", None):
        raise ValueError(f"cache is {cache!r}; allowed are 'ram', 'disk' and None")
    if cache == "disk" and cache_dir is None:
        raise ValueError("cache='disk' needs a folder: give cache_dir, or to fit an output_dir")
    if cache_dtype not in DTYPES:
        raise ValueError(f"cache_dtype is {cache_dtype!r}; allowed are {', '.join(map(repr, DTYPES))}")
    limit = byte_count(cache_limit)
    if isinstance(data, FeatureSet):
        return _checked(model, data)
    if isinstance(data, (tuple, list)) and len(data) == 2:
        return _checked(model, FeatureSet.from_levels(*data))
    extractor = _Extractor(model, DTYPES[cache_dtype])
    if cache == "disk" and not isinstance(extractor.encoder, Backbone):
        raise ValueError(
            "cache='disk' tells features by the name and weights of a timm backbone, which an encoder of your own does "
            "not have; take cache='ram'"
        )
    dataset = data if isinstance(data, pictures.Dataset) else pictures.discover(data)
    _take_classes(model, dataset)
    store: Cache | None = None
    if cache == "ram":
        store = MemoryCache(limit)
    elif cache_dir is not None and cache == "disk":
        name = f"{model.config.backbone_arch}-{model.config.img_size}-{cache_dtype}"
        store = DiskCache(Path(cache_dir).absolute(), name, extractor.key(), limit)

    contents = pictures.content_hashes(dataset.train)
    files = {content: sample.path for content, sample in zip(contents, dataset.train, strict=True)}
    bad: dict[str, pictures.ImageError] = {}

    def report(content: str, error: pictures.ImageError) -> None:
        if not skip_bad:
            pictures.check_images(dataset.train)  # raises an error that lists them all
            raise error
        bad[content] = error

    if store is not None:
        store.look_up(files)
        _fill(store, extractor, files, report, progress or (lambda items, title: items), say or (lambda text: None))
    unkept = {c: path for c, path in files.items() if c not in bad and (store is None or c not in store)}
    for content, seen in zip(unkept, extractor.seen_ahead(unkept), strict=True):
        if isinstance(seen, pictures.ImageError):
            report(content, seen)

    sound: dict[pictures.Sample, str] = {}
    for sample, content in zip(dataset.train, contents, strict=True):
        if content not in bad:
            sound[sample] = content
        elif on_bad is not None:
            on_bad(pictures.ImageError(sample.path, bad[content].reason))
    found = [(content, sample.path) for sample, content in sound.items()]
    class_ids = torch.tensor([sample.class_id for sample in sound], dtype=torch.int64)
    fingerprint = pictures.fingerprint(list(sound), dataset.root, list(sound.values()))
    if cache_dtype == "float32":
        return FeatureSet(_Pictures(extractor, found, store), class_ids, fingerprint)
    exact = _Pictures(_Extractor(model, torch.float32), found, None)
    return FeatureSet(_Pictures(extractor, found, store), class_ids, f"{fingerprint} {cache_dtype}", exact)


def _take_classes(model: HGADModel, dataset: pictures.Dataset) -> None:
    """The classes of model and dataset must be the same; made-up names of the model give way."""
    if model.config.class_names is not None and model.config.class_names != dataset.class_names:
        raise ValueError(
            f"{dataset.root} has the classes {', '.join(dataset.class_names)}; the model was made for "
            f"{', '.join(model.config.class_names)}"
        )
    if len(dataset.class_names) != model.config.n_classes:
        raise ValueError(
            f"{dataset.root} has {len(dataset.class_names)} classes ({', '.join(dataset.class_names)}), the model has "
            f"n_classes={model.config.n_classes}"
        )
    model.config = model.config.replace(class_names=dataset.class_names)


def _fill(
    cache: Cache,
    extractor: _Extractor,
    files: Mapping[str, Path],
    report: Report,
    progress: Progress,
    say: Callable[[str], None],
) -> None:
    """Put into the cache what it lacks of the features of files, by content; processes share the work."""
    missing = {content for content in files if content not in cache}
    if not missing:
        return
    size = sum(extractor.size(files[content]) for content in missing)
    about = f", about {readable(size)}," if size else ""
    say(f"features of {len(missing)} pictures{about} go to {cache}")
    together = max(1, min(SHARD_PICTURES, SHARD_BYTES * len(missing) // max(size, 1)))
    together = 2 ** (together.bit_length() - 1)  # other processes, which miss others, should come to the same groups
    contents = list(files)
    groups = deque((contents[i : i + together], False) for i in range(0, len(contents), together))
    done = iter(progress(sorted(missing), "features"))
    next(done)
    try:
        while groups:
            group, wait = groups.popleft()
            if missing.isdisjoint(group):
                continue
            with cache.claim(group, wait) as mine:
                if mine:
                    _fill_group(cache, extractor, [c for c in group if c in missing], files, report, done)
                else:
                    groups.append((group, True))
    except CacheFull as full:
        rest = sum(content not in cache for content in missing)
        warnings.warn(
            f"{full}; the features of {rest} pictures are computed anew each time they are needed, which is slow. Give "
            "the cache more room, or cache_dtype='float16', and start again",
            stacklevel=3,
        )


def _fill_group(
    cache: Cache,
    extractor: _Extractor,
    group: Sequence[str],
    files: Mapping[str, Path],
    report: Report,
    done: Iterator[Any],
) -> None:
    wanted = [content for content in group if content not in cache]  # another process may have come first
    ahead = extractor.seen_ahead({content: files[content] for content in wanted})
    found: dict[str, Features] = {}
    for content in group:
        if content not in cache:
            seen = next(ahead)
            if isinstance(seen, pictures.ImageError):
                report(content, seen)
            else:
                found[content] = extractor.features(seen)
        next(done, None)
    if found:
        cache.add(found)


class _Pictures(Sequence[list[Tensor]]):
    """Features of picture files (content, path): from the cache, or computed each time they are asked for."""

    def __init__(self, extractor: _Extractor, files: Sequence[tuple[str, Path]], cache: Cache | None) -> None:
        self.extractor, self.files, self.cache = extractor, files, cache

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: Any) -> Any:
        content, path = self.files[i]
        if self.cache is not None and content in self.cache:
            features = self.cache[content]
        else:
            features = self.extractor.features(self.extractor.seen(path))
        return [level.float().permute(2, 0, 1) for level in features]


class _Extractor:
    """Makes features of picture files, each by itself."""

    def __init__(self, model: HGADModel, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self.encoder = model.require_encoder()

    def key(self) -> dict[str, Any]:
        """All that the features depend on, but for the picture."""
        config = self.model.config
        fields = ("backbone_arch", "feature_mode", "feature_levels", "out_indices", "img_size", "center_crop")
        return {name: getattr(config, name) for name in fields} | {
            "backbone": state_hash(self.encoder),  # with mean and std
            "device": self.model.device.type,  # another one rounds otherwise
            "dtype": str(self.dtype),
        }

    def seen(self, path: Path) -> Tensor:
        """The picture (3, h, w) as the backbone sees it, but for the normalisation.

        Raises:
            ImageError: it cannot be had.
        """
        try:
            picture = pictures.read_image(path)
            score.may_cut(self.model, self.model.config, (picture.shape[1], picture.shape[2]))  # or says why not
            return score.prepare(picture, self.model.config)
        except pictures.ImageError:
            raise
        except ValueError as error:
            raise pictures.ImageError(path, str(error)) from error

    def seen_ahead(self, files: Mapping[str, Path]) -> Iterator[Tensor | pictures.ImageError]:
        """`seen` of each file, or what is wrong with it, a few of them ahead, in threads."""
        workers = min(4, os.cpu_count() or 1)  # few: each holds one decoded picture, which may be of gigabytes
        waiting: deque[Future[Tensor | pictures.ImageError]] = deque()
        with ThreadPoolExecutor(workers) as pool:
            for content, path in files.items():
                waiting.append(pool.submit(self._seen_or_error, content, path))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _seen_or_error(self, content: str, path: Path) -> Tensor | pictures.ImageError:
        try:
            seen = self.seen(path)
        except pictures.ImageError as error:
            return error
        if pictures.content_hash(path) != content:
            return pictures.ImageError(path, "the file was changed while it was read; start again")
        return seen

    def features(self, seen: Tensor) -> Features:
        """Features (h, w, C) of a picture (3, h, w), one tensor a level, on the CPU.

        Raises:
            ValueError: they are beyond the range of float16.
        """
        levels = score.seen_features(self.model, seen)
        features = [level[0].permute(1, 2, 0).to(self.dtype).contiguous().cpu() for level in levels]
        if self.dtype == torch.float16 and not all(level.isfinite().all() for level in features):
            raise ValueError("the backbone's features are beyond the range of float16; use cache_dtype='bfloat16'")
        return features

    def size(self, path: Path) -> int:
        """How many bytes the features take, about; 0 if not known: of a user's own encoder, or a damaged file."""
        if not isinstance(self.encoder, Backbone):
            return 0
        try:
            height, width, _ = images.read_header(path)
        except pictures.ImageError:
            return 0
        height, width = score.seen_shape((height, width), self.model.config)
        return self.encoder.feature_values(height, width) * self.dtype.itemsize


def _checked(model: HGADModel, features: FeatureSet) -> FeatureSet:
    dims = model.feat_dims
    for i, levels in enumerate(features.images):
        if [level.shape[0] for level in levels] != dims or any(
            level.dim() != 3 or level.dtype != torch.float32 or level.numel() == 0 for level in levels
        ):
            found = [(*level.shape, level.dtype) for level in levels]
            raise ValueError(
                f"picture {i} has features {found}; the model takes one float32 (C, h, w) a level, with C = {dims}"
            )
    ids = features.class_ids
    if len(ids) and not (ids.min() >= 0 and ids.max() < model.config.n_classes):
        raise ValueError(
            f"class ids run from {ids.min()} to {ids.max()}; the model has n_classes={model.config.n_classes}"
        )
    return features
