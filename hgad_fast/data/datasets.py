"""Datasets in their published layouts: which images they hold, of which class, normal or not, with which masks.

The layout is recognised by the folders and files on disk. Class names are free, and classes in several of the folder
layouts may lie side by side. Images and masks may have any of the `IMAGE_SUFFIXES`, and a mask need not have its
image's.

    MVTec AD      <class>/train/good/*  test/good/*  test/<defect>/*  ground_truth/<defect>/*
                  also MPDD, VisA prepared for one class (VisA_pytorch/1cls), and a dataset of your own
    MVTec LOCO    as MVTec AD, with validation/good/*, and several masks per image: ground_truth/<defect>/<image>/*
    MVTec AD 2    <class>/train/good/*  validation/good/*  test_public/{good,bad}/*  test_public/ground_truth/bad/*
    BTAD          <class>/train/ok/*  test/{ok,ko}/*  ground_truth/ko/*
    MVTec 3D-AD   <class>/{train,validation}/good/rgb/*  test/{good,<defect>}/rgb/*  test/<defect>/gt/*
    VisA          split_csv/1cls.csv, and the files that it names: <class>/Data/Images/*, <class>/Data/Masks/*
    Real-IAD      realiad_jsons/<class>.json, and the files that it names, below realiad_<size>/<class>
    CSV           a file with the columns path, class, split, label and, where there are masks, mask
    normals       <class>/*, normal images only

In the folder layouts a mask has the name of its image, with or without `_mask`: `000.png` has `000_mask.png` or
`000.bmp`. Where there is no such file, all masks in the folder `000` are parts of the mask. The masks of normal images,
and test images without published labels (MVTec AD 2's `test_private`), are ignored.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..files import printable
from .images import WHITE_LEVEL, ImageError, open_regular, read_image
from .listing import IMAGE_SUFFIXES, endings, files_below, folders_below, is_image, list_images, passed_over, visible
from .masks import read_mask

GOOD = "good"
_NORMAL_LABELS = ("good", "normal", "ok", "0")
_NORMAL_FOLDERS = ("good", "normal", "normals", "ok")
_LIST_FOLDERS = ("split_csv", "realiad_jsons", "1cls")  # that the root of a dataset has, with lists or classes
_NOT_A_CLASS = ("ground_truth", "__MACOSX", "@eaDir")


class DatasetError(ValueError):
    """A dataset that cannot be used as it lies on disk; the message says where, and what to do about it."""


@dataclass(frozen=True)
class Sample:
    """An image of class `class_id`; `defect` is "good" if it is normal.

    `mask` is the file of its mask, or a folder with the parts of the mask; None if it has no mask.
    """

    path: Path
    class_id: int
    defect: str = GOOD
    mask: Path | None = None

    @property
    def is_anomalous(self) -> bool:
        """True if the image shows a defect."""
        return self.defect != GOOD


@dataclass(frozen=True)
class Dataset:
    """The images under `root`, sorted by class and path; `class_id` indexes `class_names`.

    `train` and `validation` are all normal; `validation` is empty where a dataset publishes none. It is used only on
    request: `model.fit(dataset, calibration=dataclasses.replace(dataset, train=dataset.validation))` trains on all of
    `train` and calibrates on `validation`. `layout` names the layouts of the dataset.
    `source` is the list that names the images, where there is one that is not found from `root`.

    What lies there and is not used: `stray_masks` are mask files that belong to none of the images,
    `normal_masks` those of normal images, `unused` images that lie in a folder of training images beside the normal
    ones, and `passed_over` the endings of files that are no images, each with the number of files.
    """

    root: Path
    class_names: tuple[str, ...]
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]
    validation: tuple[Sample, ...] = ()
    layout: str = "MVTec AD"
    stray_masks: tuple[Path, ...] = ()
    normal_masks: tuple[Path, ...] = ()
    unused: tuple[Path, ...] = ()
    passed_over: dict[str, int] = field(default_factory=dict, hash=False)
    source: Path | None = None


Root = str | os.PathLike[str] | Dataset


def are_roots(data: Any) -> bool:
    """Return whether `discover` may take something: a root, or several of them."""
    roots = data if isinstance(data, (tuple, list)) else [data]
    return bool(roots) and all(isinstance(root, (str, os.PathLike, Dataset)) for root in roots)


def discover(root: Root | Sequence[Root]) -> Dataset:
    """Return the dataset at `root`, in one of the layouts of this module; for several roots, their `union`.

    Classes are sorted by name, images by class and path. What cannot be shown of a folder's name is escaped in that of
    its class (`files.printable`). Below the folders that a layout names, files may lie in
    subfolders, the same for an image and its mask. The folder of normal images in `train` may be called good, normal,
    normals or ok, in small or capital letters. In CSV files a relative path starts at the folder of the file, and may
    have backslashes; `split` is train, validation or test, and the labels good, normal, ok and 0 stand for normal
    images, any other label for a defect. Hidden files, files with none of the `IMAGE_SUFFIXES`, and links to a folder
    above are ignored. Files are listed, not opened: `check_images` and `hgad_fast.data.survey` check that they can be
    decoded.

    Args:
        root: the folder of a dataset or of one class of it, or a CSV file; several of them in a list, or in a string
            or path with `+` between them. For Real-IAD the largest images and the multi-view lists are taken; give
            `realiad_256`, or another folder of lists such as `realiad_jsons_sv`, to take others.

    Raises:
        DatasetError: a folder or file is missing, a class has no training images, the place of an image does not say
            whether it is normal, the masks of a defect fit none of its images, or a list cannot be read.
    """
    dataset = _discovered(root)
    names = tuple(map(printable, dataset.class_names))
    return dataset if names == dataset.class_names else replace(dataset, class_names=names)


def _discovered(root: Root | Sequence[Root]) -> Dataset:
    """Return what `discover` does, its classes named as the folders are, even where such names cannot be shown."""
    if isinstance(root, Dataset):
        return root
    if isinstance(root, Sequence) and not isinstance(root, str):
        return union([discover(member) for member in root])
    path = Path(root)
    if "+" in os.fspath(path) and not path.exists():
        return discover(os.fspath(path).split("+"))
    if path.is_file() and path.suffix.lower() == ".csv":
        return _csv_dataset(path)
    if not path.is_dir():
        kind = "no such folder"
        if path.suffix.lower() == ".csv":
            kind = "no such CSV file"
        elif path.is_file():
            kind = f"{'an image' if is_image(path) else 'a file'}, and no dataset"
        raise DatasetError(f"{printable(path)}: {kind}; give the folder that holds one folder a class, or a CSV file")
    if (path / "split_csv").is_dir() or any((folder / "Data" / "Images").is_dir() for folder in _folders(path)):
        return _visa_dataset(path)
    if parts := _realiad_parts(path):
        return _realiad_dataset(*parts)
    if (path / "1cls").is_dir():
        return discover(path / "1cls")  # VisA's own preparation makes it, beside its splits for other tasks
    return _folder_dataset(path)


def is_dataset(folder: Path) -> bool:
    """Return whether a folder, or a folder in it, holds a dataset in a layout that says which images are normal."""
    return any(
        _layout(place) is not None or _holds_classes(place) or _realiad_parts(place) is not None
        for place in (folder, *_folders(folder))
    )


def dataset_folders(folder: Path) -> list[Path]:
    """Return the outermost folders, `folder` or below it, that `discover` should take as they are.

    Each is, or looks like, a class or a dataset in a layout that says which images are normal; where it does not,
    `discover` raises an error, and its images are not to be taken for normal.
    """
    found: list[Path] = []
    for place in folders_below(folder):
        ignored = place != folder and not set(_NOT_A_CLASS).isdisjoint(place.relative_to(folder).parts)
        if ignored or not set(found).isdisjoint(place.parents):
            continue
        marked = any((place / name).is_dir() for name in (*_LIST_FOLDERS, "Data/Images/Anomaly"))
        if marked or _layout(place) or _realiad_parts(place):
            found.append(place)
    return found


def notes_on(dataset: Dataset) -> list[str]:
    """Return a line for each kind of files that lie in the dataset's folders and are not used: what, and how many."""
    notes = [passed_over(dataset.passed_over)] if dataset.passed_over else []
    if dataset.unused:
        places = dict.fromkeys(printable(path.parent) for path in dataset.unused)
        notes.append(
            f"not used: {len(dataset.unused)} images in {', '.join(list(places)[:3])}, beside the normal ones; "
            "move them to these, or to test"
        )
    return notes


def union(datasets: Sequence[Dataset]) -> Dataset:
    """Join several datasets into one, with the classes of each in turn.

    A class name that more than one of them has is prefixed with the name of its dataset's folder: `mvtec-bottle`. The
    root is the innermost folder that contains them all.

    Raises:
        ValueError: there are no datasets, or class names cannot be told apart even with the prefix.
    """
    if len(datasets) < 2:
        if not datasets:
            raise ValueError("a union of no datasets: give at least one")
        return datasets[0]
    counts = Counter(name for dataset in datasets for name in dataset.class_names)
    names: list[str] = []
    splits: dict[str, list[Sample]] = {"train": [], "test": [], "validation": []}
    for dataset in datasets:
        for split, samples in splits.items():
            samples += (
                replace(  # with absolute paths, as the common root is absolute, too
                    sample,
                    path=Path(os.path.abspath(sample.path)),
                    class_id=sample.class_id + len(names),
                    mask=sample.mask and Path(os.path.abspath(sample.mask)),
                )
                for sample in getattr(dataset, split)
            )
        folder = os.path.basename(os.path.abspath(dataset.root))
        names += (f"{folder}-{name}" if counts[name] > 1 else name for name in dataset.class_names)
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"two of the datasets have a class {repeated[0]!r}: rename the folder of one of them")
    root = Path(os.path.commonpath([os.path.abspath(dataset.root) for dataset in datasets]))
    layouts = " + ".join(dict.fromkeys(dataset.layout for dataset in datasets))
    unused: dict[str, Any] = {
        name: tuple(path for dataset in datasets for path in getattr(dataset, name))
        for name in ("stray_masks", "normal_masks", "unused")
    }
    others: Counter[str] = Counter()
    for dataset in datasets:
        others.update(dataset.passed_over)
    train, test, validation = map(tuple, splits.values())
    return Dataset(root, tuple(names), train, test, validation, layouts, **unused, passed_over=dict(others))


@dataclass(frozen=True)
class _Layout:
    """A folder layout: where the images and masks of a class lie below its folder.

    Images lie in one folder per kind, which is normal or a defect. `marks` are folders that only this layout has.
    """

    name: str
    marks: tuple[str, ...]
    normal: str = GOOD  # the name of the folders of normal images
    test: str = "test"
    masks: str = "ground_truth"
    image_folder: str = ""  # below the folder of each kind, in `test`, `train` and `validation`
    masks_of_kind: str = ""  # below the folder of each kind, in `masks`


_LAYOUTS = (  # the first one with a mark on disk is taken
    _Layout("MVTec 3D-AD", ("train/good/rgb", "train/good/xyz"), masks="test", image_folder="rgb", masks_of_kind="gt"),
    _Layout("MVTec AD 2", ("test_public",), test="test_public", masks="test_public/ground_truth"),
    _Layout("BTAD", ("train/ok",), normal="ok"),
    _Layout("MVTec AD", ("train", "test")),
)


def _layout(folder: Path) -> _Layout | None:
    """Return the layout of the class in `folder`; None if it is in none of the folder layouts."""
    return next((layout for layout in _LAYOUTS if any((folder / mark).is_dir() for mark in layout.marks)), None)


def _folder_dataset(root: Path) -> Dataset:
    """Return the dataset of one class folder, of a folder of them, or of a folder with normal images by class."""
    if layout := _layout(root):
        return _classes_dataset(root, {root: layout})
    folders = _folders(root)
    classes = {folder: layout for folder in folders if (layout := _layout(folder))}
    if classes:
        for folder in folders:
            if folder not in classes and list_images(folder):
                raise DatasetError(f"{printable(folder)}: images, but no train/{GOOD}; add it, or move the folder away")
        return _classes_dataset(root, classes)
    if datasets := [folder for folder in folders if _holds_classes(folder)]:
        or_all = f", or all of them: {printable('+'.join(map(str, datasets)))}" if len(datasets) > 1 else ""
        raise DatasetError(
            f"{printable(root)}: no classes, but folders of classes; give {printable(datasets[0])}{or_all}"
        )
    return _normals_dataset(root, folders)


def _holds_classes(folder: Path) -> bool:
    """Return whether `folder` looks like the root of a dataset, by its lists or by the folders of its classes."""
    return any((folder / name).is_dir() for name in _LIST_FOLDERS) or any(map(_layout, _folders(folder)))


def _folders(root: Path) -> list[Path]:
    """Return the visible folders in `root`, without those that are known to be no class."""
    return [entry for entry in visible(root) if entry.is_dir() and entry.name not in _NOT_A_CLASS]


def _classes_dataset(root: Path, classes: dict[Path, _Layout]) -> Dataset:
    train: list[Sample] = []
    validation: list[Sample] = []
    test: list[Sample] = []
    masks = _UnusedMasks([], [])
    unused: list[Path] = []
    others: Counter[str] = Counter()
    for class_id, (folder, layout) in enumerate(classes.items()):
        layout = replace(layout, normal=_normal_folder(folder / "train", layout.normal))
        test_folder, mask_folder = folder / layout.test, folder / layout.masks
        train += _normals(folder / "train" / layout.normal / layout.image_folder, class_id)
        unused += _besides(folder / "train", layout.normal)
        if (folder / "validation").is_dir():
            normal = _normal_folder(folder / "validation", layout.normal)
            validation += _normals(folder / "validation" / normal / layout.image_folder, class_id, "validation")
        for entry in visible(test_folder) if test_folder.is_dir() else []:
            if not entry.is_dir():
                _require_no_image(entry, layout)
            elif entry.name not in _NOT_A_CLASS:
                test += _test_samples(folder, entry, layout, class_id, masks)
        for masks_of_kind in _folders(mask_folder) if mask_folder.is_dir() else []:
            if not (test_folder / masks_of_kind.name).is_dir():
                masks.stray.extend(list_images(masks_of_kind))
        others.update(endings(files_below(folder)))
    # abspath names the class of `discover(".")`, and leaves the names of linked folders as they are
    names = tuple(os.path.basename(os.path.abspath(folder)) for folder in classes)
    layouts = " + ".join(dict.fromkeys(layout.name for layout in classes.values()))
    return Dataset(
        root,
        names,
        tuple(train),
        tuple(test),
        tuple(validation),
        layouts,
        tuple(masks.stray),
        tuple(masks.of_normal),
        tuple(unused),
        dict(others),
    )


@dataclass
class _UnusedMasks:
    """Masks that belong to no image, and those of normal images."""

    stray: list[Path]
    of_normal: list[Path]


def _normal_folder(folder: Path, usual: str) -> str:
    """Return the name of the folder of normal images in `folder`: the usual one, or the one that means the same."""
    if (folder / usual).is_dir() or not folder.is_dir():
        return usual
    names = [entry.name for entry in visible(folder) if entry.is_dir() and entry.name.lower() in _NORMAL_FOLDERS]
    if len(names) > 1:
        raise DatasetError(
            f"{printable(folder)}: {' and '.join(map(printable, names))}; put all normal images into {usual}"
        )
    return names[0] if names else usual


def _besides(folder: Path, normal: str) -> list[Path]:
    """Return the images in `folder` that do not lie in its folder of normal images."""
    entries = [entry for entry in visible(folder) if entry.name != normal]
    return [file for entry in entries for file in (list_images(entry) if entry.is_dir() else [entry]) if is_image(file)]


def _normals_dataset(root: Path, classes: list[Path]) -> Dataset:
    """Return a dataset of training images alone, which lie directly in the folders of their classes."""
    if not classes:
        raise DatasetError(
            f"{printable(root)}: no class folders; put the normal images into {printable(root / '<class>')}"
        )
    if root / GOOD in classes:
        place = printable(root / "<class>" / "train" / GOOD)
        raise DatasetError(f"{printable(root / GOOD)}: this is no class; move it to {place}")
    train: list[Sample] = []
    others: Counter[str] = Counter()
    for class_id, folder in enumerate(classes):
        samples = _normals(folder, class_id)
        for sample in samples:
            if sample.path.parent != folder:
                raise DatasetError(
                    f"{printable(sample.path.parent)}: nothing says whether these images are normal; "
                    f"put normal ones directly into {printable(folder)}, or into {printable(folder / 'train' / GOOD)}"
                )
        train += samples
        others.update(endings(files_below(folder)))
    names = tuple(folder.name for folder in classes)
    return Dataset(root, names, tuple(train), (), layout="normals", passed_over=dict(others))


def _normals(folder: Path, class_id: int, split: str = "training") -> list[Sample]:
    """Return the normal images below `folder`; a DatasetError where there are none."""
    images = list_images(folder) if folder.is_dir() else []
    if not images:
        text = f"no {split} images; put normal ones here ({' '.join(IMAGE_SUFFIXES)})"
        if folder.is_dir() and (line := passed_over(endings(files_below(folder)))):
            text += f"; {line}"
        above = folder.parent
        has_kinds = above.name in ("train", "validation") and above.is_dir()
        if has_kinds and (elsewhere := _besides(above, folder.name)):
            places = dict.fromkeys(printable(file.parent) for file in elsewhere)
            text += f"; {len(elsewhere)} images lie in {', '.join(list(places)[:3])}: move those that are normal"
        raise DatasetError(f"{printable(folder)}: {text}")
    return [Sample(path, class_id) for path in images]


def _require_no_image(entry: Path, layout: _Layout) -> None:
    """Raise a DatasetError if `entry`, which lies in the test folder itself, is an image: its kind is unknown."""
    if is_image(entry):
        normal, defect = (entry.parent / kind / layout.image_folder for kind in (layout.normal, "<defect>"))
        raise DatasetError(
            f"{printable(entry)}: nothing says whether this image is normal; move it to {printable(normal)} or "
            f"{printable(defect)}"
        )


def _test_samples(
    class_folder: Path, folder: Path, layout: _Layout, class_id: int, unused: _UnusedMasks
) -> list[Sample]:
    """Return the test images of one kind, normal or a defect, which lie in `folder`; add masks that are not used."""
    defect = GOOD if folder.name.lower() == layout.normal.lower() else folder.name
    if defect != GOOD and defect.lower() in _NORMAL_LABELS:
        place = printable(folder.with_name(layout.normal))
        raise DatasetError(f"{printable(folder)}: is this a defect? Normal images belong into {place}")
    if layout.image_folder and not (folder / layout.image_folder).is_dir():
        raise DatasetError(
            f"{printable(folder / layout.image_folder)}: no such folder; put the images of {folder.name!r} here"
        )
    images = list_images(folder / layout.image_folder)
    mask_folder = class_folder / layout.masks / folder.name / layout.masks_of_kind
    masks = _masks(mask_folder) if mask_folder.is_dir() else {}
    if defect == GOOD:
        unused.of_normal.extend(dict.fromkeys(masks.values()))
        masks = {}
    folders_of_parts = {mask.parent.relative_to(mask_folder): mask.parent for mask in masks.values()}
    samples = []
    for image in images:
        key = image.relative_to(folder / layout.image_folder).with_suffix("")
        samples.append(Sample(image, class_id, defect, masks.get(key, folders_of_parts.get(key))))
    used = {sample.mask for sample in samples}
    if masks and samples and used == {None}:
        raise DatasetError(
            f"{printable(mask_folder)}: no mask fits an image of {printable(folder)}; that of "
            f"{printable(images[0].name)} is {printable(images[0].stem)}_mask.png"
        )
    unused.stray.extend(mask for mask in dict.fromkeys(masks.values()) if used.isdisjoint((mask, mask.parent)))
    return samples


def _masks(folder: Path) -> dict[Path, Path]:
    """Return masks by the relative path of their image without its suffix; `<stem>_mask` goes before `<stem>`."""
    masks: dict[Path, Path] = {}
    for path in list_images(folder):
        key = path.relative_to(folder).with_suffix("")
        masks.setdefault(key, path)
        if key.name.endswith("_mask"):
            masks[key.with_name(key.name.removesuffix("_mask"))] = path
    return masks


@dataclass(frozen=True)
class _Row:
    """An image as a list names it; `line` is its place in the list, for error messages."""

    line: str
    path: Path
    class_name: str
    split: str
    label: str
    mask: Path | None


_BACKSLASHES = " (backslashes are a part of names here; neither is there a file with / in their place)"


def _listed_path(folder: Path, name: str) -> Path:
    """Return the path that a list in `folder` names, which may have been written with the backslashes of Windows."""
    path = folder / name  # an absolute path stays as it is
    if "\\" in name and not path.exists():
        slashed = folder / name.replace("\\", "/")
        return slashed if slashed.exists() else path
    return path


def _listed_dataset(source: Path, root: Path, layout: str, rows: Iterable[_Row]) -> Dataset:
    """Return the dataset of the images that the rows of `source` name."""
    rows = sorted(rows, key=lambda row: (row.class_name, row.path))
    if not rows:
        raise DatasetError(f"{printable(source)}: names no images")
    names = tuple(dict.fromkeys(row.class_name for row in rows))
    splits: dict[str, list[Sample]] = {"train": [], "validation": [], "test": []}
    for row in rows:
        image = printable(row.path)
        if row.split not in splits:
            raise DatasetError(f"{row.line}: the split is {row.split!r}; allowed are {', '.join(splits)}")
        if not row.class_name or not row.label:
            raise DatasetError(f"{row.line}: {'label' if row.class_name else 'class'} is empty; say what {image} is")
        defect = GOOD if row.label.lower() in _NORMAL_LABELS else row.label
        if defect != GOOD and row.split != "test":
            raise DatasetError(f"{row.line}: {image} is labelled {defect!r}, and {row.split} holds normal images only")
        mask = None if defect == GOOD else row.mask
        splits[row.split].append(Sample(row.path, names.index(row.class_name), defect, mask))
    files = [file for row in rows for file in (row.path, row.mask) if file is not None]
    if missing := [file for file in dict.fromkeys(files) if not file.is_file()]:
        raise DatasetError(
            f"{printable(source)}: {len(missing)} of the {len(files)} files that it names do not exist; "
            f"add them, or take them off the list. The first: {printable(missing[0])}"
            + (_BACKSLASHES if "\\" in str(missing[0]) and os.sep == "/" else "")
        )
    trained_ids = {sample.class_id for sample in splits["train"]}
    if untrained := [name for k, name in enumerate(names) if k not in trained_ids]:
        raise DatasetError(
            f"{printable(source)}: no training images of {', '.join(map(printable, untrained))}; name some normal ones"
        )
    train, validation, test = map(tuple, splits.values())
    normal_masks = tuple(row.mask for row in rows if row.mask is not None and row.label.lower() in _NORMAL_LABELS)
    return Dataset(root, names, train, test, validation, layout, normal_masks=normal_masks)


def _csv_dataset(path: Path) -> Dataset:
    rows: list[_Row] = []
    for line, row in csv_rows(path, ("path", "class", "split", "label")):
        image = _listed_path(path.parent, row["path"])
        mask = _listed_path(path.parent, row["mask"]) if row.get("mask") else None
        rows.append(_Row(line, image, row["class"], row["split"], row["label"], mask))
    return replace(_listed_dataset(path, path.parent, "CSV", rows), source=path)


def _visa_dataset(root: Path) -> Dataset:
    path = root / "split_csv" / "1cls.csv"
    if not path.is_file():
        raise DatasetError(
            f"{printable(path)}: no such file; it comes with VisA and says which images are for training"
        )
    rows: list[_Row] = []
    for line, row in csv_rows(path, ("object", "split", "label", "image", "mask")):
        mask = _listed_path(root, row["mask"]) if row["mask"] else None
        rows.append(_Row(line, _listed_path(root, row["image"]), row["object"], row["split"], row["label"], mask))
    dataset = _listed_dataset(path, root, "VisA", rows)
    mask_folders = [root / name / "Data" / "Masks" for name in dataset.class_names]
    used = {sample.mask for sample in dataset.test}
    stray = [file for folder in mask_folders if folder.is_dir() for file in list_images(folder) if file not in used]
    return replace(dataset, stray_masks=tuple(stray))


def csv_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the place, "<path>:<line>", and the cells of each row of a CSV file, in UTF-8 with commas or semicolons."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            delimiter = ";" if header.count(";") > header.count(",") else ","
            file.seek(0)
            reader = csv.DictReader(file, delimiter=delimiter, restval="", skipinitialspace=True)
            if missing := [column for column in columns if column not in (reader.fieldnames or ())]:
                raise DatasetError(
                    f"{printable(path)}: no column {', '.join(missing)}; the first line must name {','.join(columns)}"
                )
            for row in reader:
                yield (
                    f"{printable(path)}:{reader.line_num}",
                    {name: value.strip() for name, value in row.items() if name},
                )
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{printable(path)}: no CSV file in UTF-8: {error}") from error


def _realiad_parts(root: Path) -> tuple[Path, Path, Path] | None:
    """Return the folders of Real-IAD, of its lists and of its images; None if `root` is none of the three."""
    candidates = [*reversed(root.parents[:2]), root] if root.name.startswith("realiad_") else [root]
    base = next((folder for folder in candidates if (folder / "realiad_jsons").is_dir()), None)
    if base is None:
        return None
    lists = root if root.name.startswith("realiad_jsons") else base / "realiad_jsons"
    if (lists / "realiad_jsons").is_dir():  # the folder holds one folder per variant of the lists
        lists = lists / "realiad_jsons"
    sizes = {folder: size[1] for folder in _folders(base) if (size := re.fullmatch(r"realiad_(\d+|raw)", folder.name))}
    if not sizes:
        place = printable(base / "realiad_1024")
        raise DatasetError(f"{place}: no such folder; put Real-IAD's images here, or those of a size")
    largest = max(sizes, key=lambda folder: float(sizes[folder].replace("raw", "inf")))
    return base, lists, root if root in sizes else largest


def _realiad_dataset(root: Path, lists: Path, image_root: Path) -> Dataset:
    rows: list[_Row] = []
    for path in sorted(lists.glob("*.json")):
        try:
            with open_regular(path) as file:
                listed = json.loads(file.read().decode("utf-8"))
            first_image, prefix = listed["train"][0]["image_path"], listed.get("meta", {}).get("prefix", "")
            bases = [image_root / path.stem, image_root / prefix, root / prefix]
            base = next((folder for folder in bases if (folder / first_image).is_file()), bases[0])
            for split in ("train", "test"):
                for i, item in enumerate(listed[split]):
                    line, image = f"{printable(path)}: {split}[{i}]", base / item["image_path"]
                    mask = base / item["mask_path"] if item.get("mask_path") else None
                    rows.append(_Row(line, image, path.stem, split, str(item["anomaly_class"]), mask))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise DatasetError(
                f"{printable(path)}: no list as Real-IAD has them ({type(error).__name__}: {error})"
            ) from error
    return _listed_dataset(lists, root, "Real-IAD", rows)


def check_images(
    samples: Sequence[Sample], *, skip_bad: bool = False, white_level: int = WHITE_LEVEL
) -> tuple[tuple[Sample, ...], tuple[ImageError, ...]]:
    """Decode every image and mask; return the sound samples in their order, and what is wrong with the others.

    A mask must have the size of its image, and 16-bit values be no larger than `white_level`. Files are decoded to
    their last pixel, since a header says nothing about a truncated file. Damage inside a JPEG stream that decodes
    without an error goes unseen.

    Raises:
        DatasetError: files cannot be used, each with its reason; with `skip_bad` only if a class has no others.
    """
    # Decoding releases the GIL. Few threads: each holds one decoded image, which may be of gigabytes.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        faults = list(pool.map(lambda sample: _fault(sample, white_level), samples))
    sound = tuple(sample for sample, fault in zip(samples, faults, strict=True) if fault is None)
    errors = tuple(fault for fault in faults if fault is not None)
    listing = "".join(f"\n  {error}" for error in errors)
    if errors and not skip_bad:
        raise DatasetError(
            f"{len(errors)} of {len(samples)} images cannot be used; replace or remove them, "
            f"or go on without them (--skip-bad, skip_bad=True):{listing}"
        )
    if lost := {sample.class_id for sample in samples} - {sample.class_id for sample in sound}:
        raise DatasetError(f"class {min(lost)} has no image that can be used; replace these:{listing}")
    return sound, errors


def _fault(sample: Sample, white_level: int) -> ImageError | None:
    """Return why an image or its mask cannot be used; None if both can."""
    try:
        image = read_image(sample.path, white_level)
        if sample.mask is not None and (mask := read_mask(sample.mask)).shape != image.shape[1:]:
            sizes = f"(height, width) {tuple(mask.shape)}, its image {tuple(image.shape[1:])}"
            raise ImageError(sample.mask, f"the mask has {sizes}; draw it on {printable(sample.path)}")
    except ImageError as error:
        return error
    return None


def content_hashes(samples: Sequence[Sample]) -> list[str]:
    """Return the SHA-256, in hexadecimal, of each image file's content; "" for one that cannot be read."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # reading and hashing release the GIL
        return list(pool.map(lambda sample: content_hash(sample.path), samples))


def content_hash(path: Path) -> str:
    """Return a hash as in `content_hashes`, of one file; for a folder of masks, one hash of all of them."""
    try:
        if path.is_dir():
            return hashlib.sha256("".join(map(content_hash, list_images(path))).encode()).hexdigest()
        with open_regular(path) as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
    except OSError:
        return ""


def fingerprint(samples: Sequence[Sample], root: str | os.PathLike[str], contents: Sequence[str] | None = None) -> str:
    """Return one SHA-256, in hexadecimal, of the samples in order: class, path relative to `root` and file content.

    It is the same for a copy of the dataset elsewhere, and differs for the same samples in another order. `contents`
    are the samples' `content_hashes`, if they are known already.
    """
    digest = hashlib.sha256()
    for sample, content in zip(samples, contents or content_hashes(samples), strict=True):
        path = Path(os.path.relpath(sample.path, root)).as_posix()
        # no path holds a NUL, and a content has 64 digits: other samples hash other bytes
        digest.update(f"{sample.class_id} {path}\0{content}".encode(errors="surrogateescape"))
    return digest.hexdigest()
