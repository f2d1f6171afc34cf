"""Features of normal images for training and calibration, computed once per image by the frozen backbone."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.datasets import (
    Dataset,
    Sample,
    are_roots,
    check_images,
    content_hash,
    content_hashes,
    discover,
    fingerprint,
)
from ..data.images import WHITE_LEVEL, ImageError, read_header, read_image
from ..data.levels import warn_of_white_level
from ..files import byte_count, printable, readable, state_hash
from ..terminal import warn_user
from .backbone import Backbone
from .cache import (
    SHARD_BYTES,
    SHARD_IMAGES,
    CacheFull,
    DiskCache,
    Features,
    MemoryCache,
    cache_folder,
    known_contents,
)
from .preprocess import FeatureSource, may_cut, preprocess, seen_features, seen_shape

FEATURES = (torch.float32,)  # the precision of features as models take them
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Cache = MemoryCache | DiskCache
ShowProgress = Callable[[Sequence[Any], str], Iterable[Any]]  # wraps a loop, e.g. in a bar with the given title
Report = Callable[[str, ImageError], None]  # called with the content hash of an image and what is wrong with it


@dataclass
class FeatureSet:
    """Features of n normal images, prepared for the method (see `Detector.prepare`) and ready for training.

    Attributes:
        images: for each image a list of one (C, h, w) float32 tensor per level; images may differ in size.
        class_ids: (n,) int64.
        fingerprint: identifies the data, so that training is not resumed on other data; made from the data if empty.
        exact: the features as `score` computes them, for calibration, if those in `images` are rounded; else None.
    """

    images: Sequence[list[Tensor]]
    class_ids: Tensor
    fingerprint: str = ""
    exact: Sequence[list[Tensor]] | None = None

    def __post_init__(self) -> None:
        self.class_ids = torch.as_tensor(self.class_ids, dtype=torch.int64).cpu()
        if self.class_ids.shape != (len(self.images),):
            raise ValueError(f"{len(self.images)} images and class ids of shape {tuple(self.class_ids.shape)}")
        self.fingerprint = self.fingerprint or _fingerprint(self.images, self.class_ids)

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def from_levels(cls, levels: Sequence[Tensor], class_ids: Tensor | Sequence[int]) -> FeatureSet:
        """Return the set of features that are given as one (n, C, h, w) tensor per level.

        Raises:
            ValueError: the tensors have other shapes, or there is not one class id for each image.
        """
        shapes = [tuple(getattr(level, "shape", ())) for level in levels]
        if any(len(shape) != 4 or shape[0] != shapes[0][0] for shape in shapes):
            raise ValueError(f"features must be one (n, C, h, w) tensor a level with one n; the shapes are {shapes}")
        images = [[channels_last(level) for level in image] for image in zip(*levels, strict=True)]
        return cls(images, torch.as_tensor(class_ids))

    def name(self, i: int) -> str:
        """Return what errors call image `i`: its file, or its number among the features that were given."""
        images = self.images
        while isinstance(images, _Selected):
            i, images = images.indices[i], images.items
        return printable(images.files[i][1]) if isinstance(images, _Images) else f"image {i}"

    def subset(self, indices: Tensor) -> FeatureSet:
        """Return the set of the images at `indices`, in this order."""
        fingerprint = hashlib.sha256(self.fingerprint.encode() + indices.numpy().tobytes()).hexdigest()
        positions = indices.tolist()
        exact = None if self.exact is None else _Selected(self.exact, positions)
        return FeatureSet(_Selected(self.images, positions), self.class_ids[indices], fingerprint, exact)


def _fingerprint(images: Sequence[list[Tensor]], class_ids: Tensor) -> str:
    """Return the SHA-256, in hexadecimal, of class ids and features."""
    digest = hashlib.sha256(class_ids.numpy().tobytes())
    for image in images:
        for level in image:
            digest.update(f"{tuple(level.shape)} {level.dtype}".encode())
            pixels = level.detach().cpu().movedim(0, -1).contiguous()  # a view of what channels_last made
            digest.update(pixels.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _Selected(Sequence[list[Tensor]]):
    """The items of a sequence at `indices`; each is taken when it is asked for."""

    def __init__(self, items: Sequence[list[Tensor]], indices: list[int]) -> None:
        self.items, self.indices = items, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: Any) -> Any:
        return self.items[self.indices[i]]

    def kept(self, i: int) -> list[Tensor]:
        """Return what `kept` does of the item at `i`."""
        return kept(self.items, self.indices[i])


def kept(images: Sequence[list[Tensor]], i: int) -> list[Tensor]:
    """Return the maps (C, h, w) of image `i` in the precision that they are cached in; float32 where none is."""
    return images.kept(i) if isinstance(images, (_Selected, _Images)) else images[i]


def in_cache(images: Sequence[list[Tensor]], i: int) -> bool:
    """Return whether the maps of image `i` lie in a cache, which any thread may read."""
    if isinstance(images, _Selected):
        return in_cache(images.items, images.indices[i])
    return isinstance(images, _Images) and images.cache is not None and images.files[i][0] in images.cache


def channels_last(features: Tensor) -> Tensor:
    """Return a map (C, h, w) in float32, with the channels of a pixel side by side: (h * w, C) is a view of it."""
    return features.detach().float().permute(1, 2, 0).contiguous().permute(2, 0, 1)


def feature_set(
    model: FeatureSource,
    data: Any,
    *,
    cache: str | None = "ram",
    cache_dir: str | os.PathLike[str] | None = None,
    cache_dtype: str = "float32",
    cache_limit: int | str | None = None,
    skip_bad: bool = False,
    on_bad: Callable[[ImageError], None] | None = None,
    progress: ShowProgress | None = None,
    say: Callable[[str], None] | None = None,
) -> FeatureSet:
    """Return the features of normal images, which are given as image files or as features.

    Images are decoded and go through the backbone once; of those whose features are in the cache already, the files
    are hashed, no more. Each image goes by itself, so that its features have the bits that `score` computes.

    Args:
        model: gives the backbone, the preprocessing and the classes; takes the dataset's class names if it has none.
        data: a `FeatureSet`, a `Dataset` or the root of one (its training images), or a pair (one (n, C, h, w) tensor
            per level, n class ids).
        cache: ``"ram"`` keeps the features of images in memory, ``"disk"`` in `cache_dir`, from which later runs and
            other processes take them too; None computes the features of an image each time they are needed.
        cache_dir: folder of ``"disk"``. It may serve any models and datasets, and be deleted while nobody trains.
        cache_dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``: the precision of the features, whether they are
            kept or not. In half precision they take half of the room; `FeatureSet.exact` has them unrounded.
        cache_limit: bytes, or a size such as ``"20GB"``, that the features in memory, or all in `cache_dir`, may take.
            To stay below it, features in `cache_dir` that this run does not need are deleted, those longest unused
            first. Features that still do not fit, or find the disk full, are computed each time they are needed; a
            warning says so.
        skip_bad: leave out images that cannot be decoded, and report each to `on_bad`, instead of raising an error that
            lists them all.
        on_bad: called with the error of each image that is left out.
        progress: wraps the loop over the images, e.g. in a progress bar with the given title.
        say: called with a text that says how large the features will be, before they are written.

    Raises:
        ValueError: an argument has a value that is not allowed, the classes or the features' shapes are not those of
            the model, images cannot be decoded, or features do not fit into float16.
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
        levels, class_ids = data
        if model.preparation:
            levels = model.prepare([torch.as_tensor(level) for level in levels])
        return _checked(model, FeatureSet.from_levels(levels, class_ids))
    extractor = _Extractor(model, DTYPES[cache_dtype])
    if cache == "disk" and not isinstance(extractor.encoder, Backbone):
        raise ValueError(
            "cache='disk' tells features by the name and weights of a timm backbone, which an encoder of your own does "
            "not have; take cache='ram'"
        )
    if not are_roots(data):
        raise ValueError(
            f"data is a {type(data).__name__}; pass a dataset (a folder with a folder for each class, a CSV file, a "
            "Dataset, or several of these), a FeatureSet, or a pair of features, one (n, C, h, w) tensor a level, and "
            "n class ids. Images alone are no dataset: put their files into a folder, <class>/train/good"
        )
    dataset = data if isinstance(data, Dataset) else discover(data)
    model.adopt_classes(dataset.class_names, str(dataset.root))
    warn_of_white_level(dataset.train, model.config.white_level)
    store: Cache | None = None
    if cache == "ram":
        store = MemoryCache(limit)
    elif cache_dir is not None and cache == "disk":
        store = DiskCache(Path(cache_dir).absolute(), extractor.name, extractor.key(), limit)

    contents = content_hashes(dataset.train)
    files = {content: sample.path for content, sample in zip(contents, dataset.train, strict=True)}
    errors: dict[str, ImageError] = {}  # by content

    def report(content: str, error: ImageError) -> None:
        if not skip_bad:
            check_images(dataset.train, white_level=model.config.white_level)  # raises an error that lists them all
            raise error
        errors[content] = error

    if store is not None:
        store.look_up(files)
        _fill(store, extractor, files, report, progress or (lambda items, title: items), say or (lambda text: None))
    uncached = {
        content: path
        for content, path in files.items()
        if content not in errors and (store is None or content not in store)
    }
    # their features are computed later, but damaged files are reported now
    for content, seen in zip(uncached, extractor.seen_ahead(uncached), strict=True):
        if isinstance(seen, ImageError):
            report(content, seen)

    sound: dict[Sample, str] = {}  # the content of each sample
    for sample, content in zip(dataset.train, contents, strict=True):
        if content not in errors:
            sound[sample] = content
        elif on_bad is not None:
            on_bad(ImageError(sample.path, errors[content].reason))
    sound_files = [(content, sample.path) for sample, content in sound.items()]
    class_ids = torch.tensor([sample.class_id for sample in sound], dtype=torch.int64)
    data_fingerprint = fingerprint(list(sound), dataset.root, list(sound.values()))
    if cache_dtype == "float32":
        return FeatureSet(_Images(extractor, sound_files, store), class_ids, data_fingerprint)
    exact = _Images(_Extractor(model, torch.float32), sound_files, None)
    return FeatureSet(_Images(extractor, sound_files, store), class_ids, f"{data_fingerprint} {cache_dtype}", exact)


def _fill(
    cache: Cache,
    extractor: _Extractor,
    files: Mapping[str, Path],
    report: Report,
    progress: ShowProgress,
    say: Callable[[str], None],
) -> None:
    """Add to the cache the features that it lacks of the files, given by content; processes share the work."""
    missing = {content for content in files if content not in cache}
    if not missing:
        return
    size = sum(extractor.size(files[content]) for content in missing)
    size_text = f", about {readable(size)}," if size else ""
    say(f"features of {len(missing)} images{size_text} go to {cache}")
    group_size = max(1, min(SHARD_IMAGES, SHARD_BYTES * len(missing) // max(size, 1)))
    # a power of two: other processes, which lack other images, should arrive at the same groups
    group_size = 2 ** (group_size.bit_length() - 1)
    contents = list(files)
    groups = deque((contents[i : i + group_size], False) for i in range(0, len(contents), group_size))
    ticks = iter(progress(sorted(missing), "features"))
    next(ticks)  # starts the display; each further one tells it that an image is done
    try:
        while groups:
            group, wait = groups.popleft()
            if missing.isdisjoint(group):
                continue
            with cache.claim(group, wait) as claimed:
                if claimed:
                    lacking = [content for content in group if content in missing]
                    _fill_group(cache, extractor, lacking, files, report, ticks)
                else:  # another process is at work on it: wait for that only when all other groups are done
                    groups.append((group, True))
    except CacheFull as error:
        remaining = sum(content not in cache for content in missing)
        warn_user(
            f"{error}; the features of {remaining} images are computed anew each time they are needed, which is slow. "
            "Give the cache more room, or cache_dtype='float16', and start again"
        )


def _fill_group(
    cache: Cache,
    extractor: _Extractor,
    group: Sequence[str],
    files: Mapping[str, Path],
    report: Report,
    ticks: Iterator[Any],
) -> None:
    """Add the features of a claimed group to the cache, with one of the `ticks` per image."""
    missing = [content for content in group if content not in cache]  # another process may have come first
    images = extractor.seen_ahead({content: files[content] for content in missing})
    features: dict[str, Features] = {}
    for content in group:
        if content not in cache:
            seen = next(images)
            if isinstance(seen, ImageError):
                report(content, seen)
            else:
                features[content] = extractor.features(seen)
        next(ticks, None)
    if features:
        cache.add(features)


class _Images(Sequence[list[Tensor]]):
    """Features of image files (content, path): from the cache, or computed each time they are asked for."""

    def __init__(self, extractor: _Extractor, files: Sequence[tuple[str, Path]], cache: Cache | None) -> None:
        self.extractor, self.files, self.cache = extractor, files, cache

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: Any) -> Any:
        return [level.float() for level in self.kept(i)]

    def kept(self, i: int) -> list[Tensor]:
        """Return the maps (C, h, w) of image `i` in the precision of the cache."""
        content, path = self.files[i]
        if self.cache is not None and content in self.cache:
            features = self.cache[content]
        else:
            features = self.extractor.features(self.extractor.seen(path))
        return [level.permute(2, 0, 1) for level in features]


def cached_contents(model: FeatureSource, cache_dir: str | os.PathLike[str], cache_dtype: str) -> set[str]:
    """Return the contents of all images whose features, as this model has them, are in a cache on disk."""
    extractor = _Extractor(model, DTYPES[cache_dtype])
    return known_contents(cache_folder(Path(cache_dir), extractor.name, extractor.key()))


class _Extractor:
    """The way from image files to their features in one precision, each image by itself."""

    def __init__(self, model: FeatureSource, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self.encoder = model.require_encoder()

    @property
    def name(self) -> str:
        """What people call the features."""
        return f"{self.model.config.backbone_arch}-{self.model.config.img_size}-{str(self.dtype).partition('.')[2]}"

    def key(self) -> dict[str, Any]:
        """Return all that the features depend on, except the image."""
        config = self.model.config
        fields = ("backbone_arch", "feature_mode", "feature_levels", "out_indices", "img_size", "center_crop")
        key = {name: getattr(config, name) for name in fields} | {
            "backbone": state_hash(self.encoder),  # with mean and std
            "device": self.model.device.type,  # each type of device rounds in its own way
            "dtype": str(self.dtype),
        }
        if config.white_level != WHITE_LEVEL:
            key["white_level"] = config.white_level
        if self.model.preparation:
            key["preparation"] = self.model.preparation
        if config.square:
            key["square"] = True
        if config.feature_mode == "joined":
            key["grid_stride"] = config.grid_stride
        return key

    def seen(self, path: Path) -> Tensor:
        """Read an image (3, h, w) as the backbone sees it, except for the normalisation.

        Raises:
            ImageError: the file cannot be read, or scoring the image would take too much memory.
        """
        try:
            image = read_image(path, self.model.config.white_level)
            may_cut(self.model, self.model.config, (image.shape[1], image.shape[2]))  # for its errors and warnings
            return preprocess(image, self.model.config)
        except ImageError:
            raise
        except ValueError as error:
            raise ImageError(path, str(error)) from error

    def seen_ahead(self, files: Mapping[str, Path]) -> Iterator[Tensor | ImageError]:
        """Yield each file, given by content, as `seen` returns it, or its error; threads read a few files ahead."""
        workers = min(4, os.cpu_count() or 1)  # few: each holds one decoded image, which may be of gigabytes
        pending: deque[Future[Tensor | ImageError]] = deque()
        with ThreadPoolExecutor(workers) as pool:
            for content, path in files.items():
                pending.append(pool.submit(self._seen_or_error, content, path))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def _seen_or_error(self, content: str, path: Path) -> Tensor | ImageError:
        """Return what `seen` returns, or an ImageError: that of `seen`, or that the file has changed meanwhile."""
        try:
            seen = self.seen(path)
        except ImageError as error:
            return error
        if content_hash(path) != content:
            return ImageError(path, "the file was changed while it was read; start again")
        return seen

    def features(self, seen: Tensor) -> Features:
        """Return the features (h, w, C) of an image (3, h, w) from `seen`, one tensor per level, on the CPU.

        Raises:
            ValueError: they are beyond the range of float16.
        """
        levels = seen_features(self.model, seen)
        features = [level[0].permute(1, 2, 0).to(self.dtype).contiguous().cpu() for level in levels]
        if self.dtype == torch.float16 and not all(level.isfinite().all() for level in features):
            raise ValueError("the backbone's features are beyond the range of float16; use cache_dtype='bfloat16'")
        return features

    def size(self, path: Path) -> int:
        """Return about how many bytes the features of a file take; 0 for a user's own encoder, or a damaged file."""
        if not isinstance(self.encoder, Backbone):
            return 0
        try:
            height, width, _ = read_header(path)
        except ImageError:
            return 0
        height, width = seen_shape((height, width), self.model.config)
        return self.encoder.feature_values(height, width) * self.dtype.itemsize


def _checked(model: FeatureSource, features: FeatureSet) -> FeatureSet:
    """Return the features if they fit the model; raise a ValueError otherwise."""
    dims = model.feature_dims
    for i, levels in enumerate(features.images):
        if [level.shape[0] for level in levels] != dims or any(
            level.dim() != 3 or level.dtype not in FEATURES or level.numel() == 0 for level in levels
        ):
            shapes = [(*level.shape, level.dtype) for level in levels]
            raise ValueError(
                f"image {i} has features {shapes}; the model takes one float32 (C, h, w) a level, with C = {dims}"
            )
    ids, classes = features.class_ids, len(model.groups)
    if model.groups_are_classes and len(ids) and not (ids.min() >= 0 and ids.max() < classes):
        raise ValueError(f"class ids run from {ids.min()} to {ids.max()}; the model has n_classes={classes}")
    return features
