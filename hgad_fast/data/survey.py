"""A survey of a dataset: what it holds and what looks wrong with it, before hours are spent on training or evaluation.

A finding is an error if it makes results or a training wrong, or a file useless:

- an image or a mask that cannot be opened (with `decode`: decoded to its last pixel);
- a mask of another size than its image, or a mask that marks no pixel;
- the same file content in two of the splits (training, validation, test), in two classes, or as normal and as defect.

It is a warning if less can be measured than the images would allow, or something may be a mistake:

- an image of a defect without a mask, a mask without an image, a mask that marks something in a normal image;
- a mask that covers most of its image (inverted?), or has more than two levels (noise, soft edges, or labels);
- 16-bit images that suggest another white level than 65535, or a mixture of images of 8 and of 16 bits;
- a class with few training images or with nothing to test on, images in `train` that are not used, the same content
  twice in one place.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from ..files import printable
from .datasets import Dataset, Sample
from .images import ImageError, open_regular, read_header, read_pixels
from .levels import depth_mixture, depths, has_16_bits, white_level_advice
from .listing import passed_over
from .masks import inspect_mask

FEW_TRAINING_IMAGES = 16
"""With fewer, the eight images that calibration holds out would be more than half of a class."""
_SHOWN = 5  # sizes, and findings of each kind, that a table lists

Place = TypeVar("Place")


@dataclass(frozen=True)
class Counts:
    """The numbers of images of one class; `with_mask` counts the anomalous test images that have a mask."""

    train: int
    validation: int
    test_normal: int
    test_anomalous: int
    with_mask: int


@dataclass(frozen=True)
class Finding:
    """Something that looks wrong: `kind` names the problem, `detail` says where it is and what to do."""

    kind: str
    detail: str
    is_error: bool


@dataclass(frozen=True)
class Survey:
    """What a dataset holds.

    Attributes:
        root, layout: those of the dataset.
        counts: by class name.
        images: the number of images of each "width x height mode" (`read_header`).
        findings: what looks wrong, errors first.
        passed_over: the number of files with each ending that are no images.
    """

    root: Path
    layout: str
    counts: dict[str, Counts]
    images: dict[str, int]
    findings: tuple[Finding, ...]
    passed_over: dict[str, int]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that are errors."""
        return tuple(finding for finding in self.findings if finding.is_error)

    def to_dict(self) -> dict[str, Any]:
        """Return everything in types that JSON has."""
        content = asdict(self)
        for name in ("counts", "passed_over"):
            content[name] = {printable(key): value for key, value in content[name].items()}
        return {**content, "root": printable(self.root), "findings": [asdict(finding) for finding in self.findings]}

    def table(self) -> str:
        """Return the counts, the sizes and the findings as text; of many findings of one kind, the first few."""
        titles = ("train", "validation", "test normal", "anomalous", "with mask")
        rows = {printable(name): tuple(vars(counts).values()) for name, counts in self.counts.items()}
        rows["all"] = tuple(map(sum, zip(*rows.values(), strict=True)))
        width = max(map(len, rows)) + 2
        lines = [f"{self.layout}: {printable(self.root)}", " " * width + "".join(f"{title:>13}" for title in titles)]
        lines += [f"{name:<{width}}" + "".join(f"{count:>13}" for count in row) for name, row in rows.items()]
        sizes = [f"{count} of {size}" for size, count in self.images.items()]
        rarer = f", and {len(sizes) - _SHOWN} rarer sizes" if len(sizes) > _SHOWN else ""
        lines.append(f"images: {', '.join(sizes[:_SHOWN])}{rarer}")
        lines += [passed_over(self.passed_over)] if self.passed_over else []
        for kind, group in groupby(self.findings, lambda finding: finding.kind):
            findings = list(group)
            lines.append(f"{'error' if findings[0].is_error else 'warning'}: {kind} ({len(findings)})")
            lines += [f"  {finding.detail}" for finding in findings[:_SHOWN]]
            if len(findings) > _SHOWN:
                lines.append(f"  ... and {len(findings) - _SHOWN} more; --json lists them all")
        return "\n".join(lines)


def survey(dataset: Dataset, *, decode: bool = False) -> Survey:
    """Count the images of `dataset` and look for what is wrong with its files.

    The headers of all images are read, all masks are decoded, and files of equal size are compared by content. With
    `decode` every image is decoded too, which finds truncated files and takes as long as reading them for a training.
    """
    splits = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    samples = [sample for split in splits.values() for sample in split]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # decoding releases the GIL
        inspected = list(pool.map(lambda sample: _inspect(sample, decode), samples))
    sizes = Counter(size for size, _ in inspected if size)
    findings = [finding for _, of_sample in inspected for finding in of_sample]
    findings += _duplicates(dataset, splits)
    findings += [
        Finding("defect without mask", f"{printable(sample.path)}: counts for image metrics only", False)
        for sample in dataset.test
        if sample.is_anomalous and sample.mask is None
    ]
    findings += [Finding("mask without image", printable(mask), False) for mask in dataset.stray_masks]
    findings += [
        Finding(
            "image that is not used",
            f"{printable(path)}: it lies beside the normal images of train; move it to them, or to test",
            False,
        )
        for path in dataset.unused
    ]
    findings += [Finding(kind, detail, False) for kind, detail in _of_normal_images(dataset)]
    of_16_bits = sum(count for size, count in sizes.items() if has_16_bits(size.split()[-1]))
    mixture = depth_mixture(of_16_bits, sizes.total() - of_16_bits)
    for kind, detail in (("white level", white_level_advice(depths(samples))), ("mixed depths", mixture)):
        findings += [Finding(kind, detail, False)] if detail else []
    counts = {name: _counts(k, splits) for k, name in enumerate(dataset.class_names)}
    findings += [finding for name, of_class in counts.items() for finding in _missing_images(name, of_class)]
    findings.sort(key=lambda finding: (not finding.is_error, finding.kind))  # the order within a kind stays
    return Survey(dataset.root, dataset.layout, counts, dict(sizes.most_common()), tuple(findings), dataset.passed_over)


def _inspect(sample: Sample, decode: bool) -> tuple[str | None, list[Finding]]:
    """Return size and mode of an image, None if it cannot be opened, and what is wrong with it and its mask."""
    try:
        height, width, mode = read_header(sample.path)
        if decode:
            height, width = read_pixels(sample.path).values.shape[:2]
    except ImageError as error:
        return None, [Finding("unreadable file", str(error), True)]
    findings = []
    if sample.mask is not None:
        try:
            inspected = inspect_mask(sample.mask)
            mask = inspected.marked
            findings += [Finding(kind, detail, False) for kind, detail in inspected.remarks.items()]
            if tuple(mask.shape) != (height, width) and tuple(mask.shape) != read_pixels(sample.path).values.shape[:2]:
                sizes = f"{mask.shape[1]} x {mask.shape[0]}, its image {width} x {height}"
                findings.append(
                    Finding(
                        "mask of another size", f"{printable(sample.mask)} is {sizes}: {printable(sample.path)}", True
                    )
                )
            if not mask.any():
                findings.append(
                    Finding("empty mask", f"{printable(sample.mask)}: draw the defect, or remove the mask", True)
                )
        except ImageError as error:
            findings.append(Finding("unreadable file", str(error), True))
    return f"{width} x {height} {mode}", findings


def _of_normal_images(dataset: Dataset) -> list[tuple[str, str]]:
    """Return kind and detail of each mask of a normal image that marks something; blank ones are published, too."""
    remarks = []
    for path in dataset.normal_masks:
        try:
            if count := int(inspect_mask(path).marked.sum()):
                detail = f"{printable(path)} marks {count} pixels and is ignored; remove it, or call the image a defect"
                remarks.append(("mask of a normal image", detail))
        except ImageError:
            continue  # it is ignored
    return remarks


def mask_warnings(dataset: Dataset) -> list[str]:
    """Return a line for each kind of doubt about the masks of the test images, with their number and the first one."""
    remarks: dict[str, list[str]] = defaultdict(list)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        inspected = pool.map(lambda sample: _inspect(sample, False)[1] if sample.mask else [], dataset.test)
        for finding in (finding for findings in inspected for finding in findings):
            remarks[finding.kind].append(finding.detail)
    for kind, detail in _of_normal_images(dataset):
        remarks[kind].append(detail)
    return [f"{kind}, {len(details)} of them, the first: {details[0]}" for kind, details in remarks.items()]


def _duplicates(dataset: Dataset, splits: dict[str, tuple[Sample, ...]]) -> Iterator[Finding]:
    """Yield a finding for each image whose file has the bytes of another one."""
    places = [(split, sample) for split, samples in splits.items() for sample in samples]
    for (first_split, first), *others in of_same_content(places, lambda place: place[1].path):
        for split, sample in others:
            pairs = [
                (first_split, split),
                (dataset.class_names[first.class_id], dataset.class_names[sample.class_id]),
                ("normal", "defect") if first.is_anomalous != sample.is_anomalous else ("", ""),
            ]
            differences = ", ".join(f"{this} and {that}" for this, that in pairs if this != that)
            detail = f"{printable(first.path)} and {printable(sample.path)}"
            if differences:
                yield Finding("same image in two places", f"{detail} ({differences}): remove one", True)
            else:
                yield Finding("same image twice", detail, False)


def of_same_content(places: Iterable[Place], path_of: Callable[[Place], Path]) -> Iterator[list[Place]]:
    """Yield those places together, two or more, whose files have the same bytes; only files of equal size are read."""
    for same_size in _grouped(places, lambda place: _size(path_of(place))):
        for same_start in _grouped(same_size, lambda place: _digest(path_of(place), 1 << 16)):
            yield from _grouped(same_start, lambda place: _digest(path_of(place)))


def _grouped(places: Iterable[Place], key: Callable[[Place], Any]) -> Iterator[list[Place]]:
    """Return the groups of two or more places with the same key; places whose key is None belong to no group."""
    groups: dict[Any, list[Place]] = defaultdict(list)
    for place in places:
        groups[key(place)].append(place)
    groups.pop(None, None)
    return (group for group in groups.values() if len(group) > 1)


def _size(path: Path) -> int | None:
    """Return the bytes of a file; None if it is empty or cannot be read."""
    try:
        return path.stat().st_size or None  # empty files are no copies of each other
    except OSError:
        return None  # reported as unreadable


def _digest(path: Path, size: int = -1) -> bytes | None:
    """Return a hash of the first `size` bytes, or of all; None if the file cannot be read."""
    try:
        with open_regular(path) as file:
            return hashlib.blake2b(file.read(size)).digest()
    except OSError:
        return None


def _counts(class_id: int, splits: dict[str, tuple[Sample, ...]]) -> Counts:
    """Return the counts of one class."""
    train, validation, test = (
        [sample for sample in samples if sample.class_id == class_id] for samples in splits.values()
    )
    anomalous = [sample for sample in test if sample.is_anomalous]
    with_mask = sum(sample.mask is not None for sample in anomalous)
    return Counts(len(train), len(validation), len(test) - len(anomalous), len(anomalous), with_mask)


def _missing_images(name: str, counts: Counts) -> Iterator[Finding]:
    """Yield what a class has too few images for."""
    if counts.train < FEW_TRAINING_IMAGES:
        yield Finding(
            "few training images", f"{printable(name)}: {counts.train}; calibration would hold half of them out", False
        )
    missing = [
        label for label, count in (("normal", counts.test_normal), ("anomalous", counts.test_anomalous)) if not count
    ]
    if missing:
        yield Finding("nothing to evaluate on", f"{printable(name)}: no {' and no '.join(missing)} test images", False)
