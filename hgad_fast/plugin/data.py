"""Datasets in the layouts of `hgad_fast.data.datasets`, all of their classes in one, for anomalib.

Classes reach a model in the batches (`MultiClassBatch.gt_class`) and by the paths of images
(`MultiClassDataset.class_ids`). Nothing is stretched to fit into a batch: a batch holds images of one size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pandas
import torch
from anomalib import TaskType
from anomalib.data import AnomalibDataModule
from anomalib.data.datasets import AnomalibDataset
from anomalib.data.utils import LabelName, Split
from torch.utils.data import BatchSampler, DataLoader, Sampler, SequentialSampler
from torchvision.transforms.v2 import Compose, Resize, Transform
from torchvision.tv_tensors import Image, Mask

from ..data.datasets import Dataset, Sample, discover
from ..data.images import WHITE_LEVEL, ImageError, read_header, read_image
from ..data.masks import read_mask
from ..features.preprocess import seen_shape
from ..files import printable
from ..scoring.calibration import split
from ..training.schedule import order_of_pass
from .batch import MultiClassBatch, MultiClassItem
from .processing import SeenResize

BATCH_SIZE = 8  # images, where nothing else is said
MOST_WORKERS = 4  # processes that read images, unless the user asks for more


class MultiClassDataset(AnomalibDataset):
    """Images of all classes of a dataset, in its order.

    `samples` has a row an image: `image_path`, `split`, `label` and `label_index` ("normal", 0; "anomalous", 1),
    `mask_path` ("" where there is none; a folder where a mask has parts), `class_name`, `gt_class` (its number) and
    `defect`.

    Args:
        dataset: says where the images lie, and of which classes they are.
        listed: the images of it that this is made of.
        split: the name of their split: train, val or test.
        white_level: the value of white in 16-bit images.
        augmentations: applied to each image, and to its mask with it.

    Attributes:
        root: the folder of the dataset.
        class_names: names of all its classes, by their numbers.
        white_level: as given.
        needs_images: False gives items without pixels, an image (3, 1, 1) and a mask (1, 1) of zeros, and reads no
            file: a model sets it once it has all that it needs of the images. Each set-up of the datamodule sets it to
            True again.
    """

    def __init__(
        self,
        dataset: Dataset,
        listed: Sequence[Sample],
        split: str,
        white_level: int = WHITE_LEVEL,
        augmentations: Transform | None = None,
    ) -> None:
        super().__init__(augmentations=augmentations)
        self.root, self.class_names, self.white_level = dataset.root, dataset.class_names, white_level
        self.needs_images = True
        columns = {
            "image_path": [str(image.path) for image in listed],
            "split": split,
            "label": ["anomalous" if image.is_anomalous else "normal" for image in listed],
            "label_index": [int(LabelName.ABNORMAL if image.is_anomalous else LabelName.NORMAL) for image in listed],
            "mask_path": [str(image.mask or "") for image in listed],
            "class_name": [dataset.class_names[image.class_id] for image in listed],
            "gt_class": [image.class_id for image in listed],
            "defect": [image.defect for image in listed],
        }
        samples = pandas.DataFrame(columns)
        samples.attrs["task"] = (
            TaskType.SEGMENTATION if any(image.mask for image in dataset.test) else TaskType.CLASSIFICATION
        )
        self.samples = samples

    @property
    def samples(self) -> pandas.DataFrame:
        """A row an image; see the class."""
        return super().samples

    @samples.setter
    def samples(self, samples: pandas.DataFrame) -> None:
        AnomalibDataset.samples.fset(self, samples)  # checks them, and sorts them by path
        self._samples = samples.reset_index(drop=True)

    @property
    def class_ids(self) -> dict[str, int]:
        """The numbers of the images' classes, by `image_path` as batches have it."""
        return dict(zip(self.samples["image_path"], map(int, self.samples["gt_class"]), strict=True))

    @property
    def collate_fn(self) -> Callable[[list[MultiClassItem]], MultiClassBatch]:
        """What makes a batch of items, which have one size."""
        return MultiClassBatch.collate

    def __getitem__(self, index: int) -> MultiClassItem:
        """Return an image with its mask, label and class.

        A normal image has a mask of zeros, an anomalous one without a mask None, as all images of a dataset without
        masks. The image is (3, H, W) float32 in [0, 1], the mask (H, W), until augmentations change them.

        Raises:
            ImageError: image or mask cannot be read, or their sizes differ.
        """
        row = self.samples.iloc[index]
        has_mask = self._has_mask(row["label_index"], row["mask_path"])
        if self.needs_images:
            image, mask = self._read(row, has_mask)
        else:
            image, mask = torch.zeros(3, 1, 1), torch.zeros(1, 1, dtype=torch.bool) if has_mask else None
        return MultiClassItem(
            image=image,
            gt_mask=mask,
            gt_label=torch.tensor(int(row["label_index"])),
            gt_class=torch.tensor(int(row["gt_class"])),
            image_path=row["image_path"],
            mask_path=row["mask_path"] or None,
        )

    def batch_keys(self) -> list[Hashable]:
        """Return a key of each image; those of one key can be stacked, unless augmentations draw sizes by chance.

        It is the size at which the image is seen, by the header of its file, and whether there is a mask.
        """
        sizes: Iterable[tuple[int, int]]
        if not self.needs_images:
            sizes = [(1, 1)] * len(self)
        elif (side := _fixed_size(self.augmentations)) is not None:
            sizes = [side] * len(self)
        else:
            sizes = (read_header(path)[:2] for path in self.samples["image_path"])
            if isinstance(self.augmentations, SeenResize):
                view = self.augmentations.view
                sizes = (seen_shape(size, view) for size in sizes)
        have_masks = map(self._has_mask, self.samples["label_index"], self.samples["mask_path"])
        return list(zip(sizes, have_masks, strict=True))

    def _has_mask(self, label_index: int, mask_path: str) -> bool:
        """Return whether an image has a mask, of zeros if it is normal."""
        return self.task == TaskType.SEGMENTATION and (label_index == LabelName.NORMAL or mask_path != "")

    def _read(self, row: pandas.Series, has_mask: bool) -> tuple[Image, Mask | None]:
        """Return an image and its mask, augmented."""
        image, mask = Image(read_image(row["image_path"], self.white_level)), None
        if has_mask:
            size = tuple(image.shape[1:])
            marked = read_mask(row["mask_path"]) if row["mask_path"] else torch.zeros(size, dtype=torch.bool)
            if marked.shape != size:
                raise ImageError(
                    Path(row["mask_path"]),
                    f"the mask has (height, width) {tuple(marked.shape)}, its image {size}; draw it on "
                    f"{printable(row['image_path'])}",
                )
            mask = Mask(marked.to(torch.uint8))
        if self.augmentations is None:
            return image, mask
        return self.augmentations(image, mask) if mask is not None else (self.augmentations(image), None)


def _fixed_size(augmentations: Transform | None) -> tuple[int, int] | None:
    """Return the (h, w) that augmentations give every image; None where it depends on the image."""
    last: Any = augmentations.transforms[-1] if isinstance(augmentations, Compose) else augmentations
    return tuple(last.size) if type(last) is Resize and len(last.size or ()) == 2 else None


class PassOrder(Sampler[int]):
    """The order of the images in each pass: that of `hgad_fast.training.fit` with the same seed.

    Args:
        images: their number.
        seed: what the order of every pass depends on.
        epoch: the pass, from 0; lightning sets those that follow.
    """

    def __init__(self, images: int, seed: int, epoch: int = 0) -> None:
        self.images, self.seed, self.epoch = images, seed, epoch

    def set_epoch(self, epoch: int) -> None:
        """Set the pass whose order is to be given next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(order_of_pass(self.images, self.seed, self.epoch))

    def __len__(self) -> int:
        return self.images


class StackableBatches(BatchSampler):
    """Batches of images in their order; one ends early where the next image cannot be stacked with those in it.

    Args:
        sampler: gives the numbers of images, and has their `MultiClassDataset` as torch's samplers do.
        batch_size: the most images of a batch.
        drop_last: has no effect, as images are tested or predicted; lightning sets it.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, drop_last: bool = False) -> None:
        super().__init__(sampler, batch_size, drop_last)

    @cached_property
    def _keys(self) -> list[Hashable]:
        sampler: Any = self.sampler
        dataset = sampler.data_source if hasattr(sampler, "data_source") else sampler.dataset
        return dataset.batch_keys()

    def __iter__(self) -> Iterator[list[int]]:
        for _, images in groupby(self.sampler, self._keys.__getitem__):
            while batch := list(islice(images, self.batch_size)):
                yield batch

    def __len__(self) -> int:
        return sum(1 for _ in self)


class MultiClassFolder(AnomalibDataModule):
    """All classes of a dataset in one, for one model: MVTec AD, VisA, Real-IAD, a CSV file and others.

    The layouts are those of `hgad_fast.data.datasets`. A share of the normal training images of each class is held out
    as validation set, on which our models calibrate their thresholds; test images are never a part of it. A validation
    set that a dataset publishes is not used.

    With the same seed, `calibration_fraction` and batch size, images come in the order of `hgad_fast.training.fit`, and
    the same ones are held out. In each pass the last, incomplete batch is left out. In evaluation a batch is shorter
    than `eval_batch_size` where the next image is seen at another size.

    Args:
        root: the folder of a dataset or of one class of it, or a CSV file; several of them in a list, or in a string
            with `+` between them; or a `hgad_fast.data.datasets.Dataset`.
        train_batch_size: images of a training batch, or all images where there are fewer; None: as many as the model
            that is trained asks for (its `batch_size`), and 8 of a model that does not say.
        eval_batch_size: most images of a batch in validation, test and prediction.
        num_workers: processes that read images; None: one a core, but four at most.
        calibration_fraction: share of the training images held out, at least 8 images per class and never more than
            half; 0: none.
        seed: of the order of the training images and of the choice of those held out.
        white_level: the value of white in 16-bit images; 4095 for a camera of 12 bits.
        name: the folder of results; by default the name of the root folder.
        train_augmentations: applied to training images. A model that keeps features keeps those of the augmented
            images.
        val_augmentations: applied to the images that are held out.
        test_augmentations: applied to test images, and to their masks.
        augmentations: for those of the three that are not given.

    Attributes:
        dataset: what lies at the root.
        class_names: names of its classes, by their numbers.

    Raises:
        ValueError: an argument is not allowed, the root holds no dataset (`DatasetError`), or an image is listed for
            two classes.
    """

    def __init__(
        self,
        root: str | Path | list[str | Path] | Dataset,
        train_batch_size: int | None = None,
        eval_batch_size: int = 8,
        num_workers: int | None = None,
        calibration_fraction: float = 0.1,
        seed: int = 0,
        white_level: int = WHITE_LEVEL,
        name: str | None = None,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
    ) -> None:
        for argument, size in (("train_batch_size", train_batch_size), ("eval_batch_size", eval_batch_size)):
            if size is not None and size < 1:
                raise ValueError(f"{argument} is {size}; allowed: whole numbers from 1 on")
        if not 0 <= calibration_fraction < 1:
            raise ValueError(f"calibration_fraction is {calibration_fraction}; allowed: numbers in [0, 1)")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed is {seed}; allowed: whole numbers from 0 below 2**63")
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=min(MOST_WORKERS, os.cpu_count() or 1) if num_workers is None else num_workers,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            seed=seed,
        )
        self.root, self.calibration_fraction, self.white_level = root, calibration_fraction, white_level
        self.dataset = discover(root)
        self.class_names = self.dataset.class_names
        self._name = _folder_name(self.dataset.root) if name is None else _required_component(name)
        _require_one_class_each(self.dataset)

    @property
    def name(self) -> str:
        """The folder of results."""
        return self._name

    def setup(self, stage: str | None = None) -> None:
        """Make the three sets, or keep those that are made, and let all of them read images."""
        super().setup(stage)
        for subset in (self.train_data, self.val_data, self.test_data):
            subset.needs_images = True

    def _setup(self, _stage: str | None = None) -> None:
        images = self.dataset.train
        class_ids = torch.tensor([image.class_id for image in images], dtype=torch.int64)
        trained, held_out = split(class_ids, self.calibration_fraction, self.seed)
        self.train_data = self._subset([images[i] for i in trained.tolist()], Split.TRAIN)
        self.val_data = self._subset([images[i] for i in held_out.tolist()], Split.VAL)
        self.test_data = self._subset(self.dataset.test, Split.TEST)

    def _subset(self, listed: Sequence[Sample], part: Split) -> MultiClassDataset:
        return MultiClassDataset(self.dataset, listed, part.value, self.white_level)

    def _create_test_split(self) -> None:
        """Leave the test set as the dataset has it."""

    def _create_val_split(self) -> None:
        """Leave the validation set as it is: what was held out."""

    def train_dataloader(self) -> DataLoader:
        """Return the batches of training images, in the order of the pass that lightning names."""
        # workers may ask for the first batches of a resumed training before lightning names the pass
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        count = len(self.train_data)
        return DataLoader(
            self.train_data,
            batch_size=min(self._train_batch_size(), count),
            sampler=PassOrder(count, self.seed, epoch),
            drop_last=True,
            num_workers=self.num_workers,
            collate_fn=self.external_collate_fn or self.train_data.collate_fn,
        )

    def _train_batch_size(self) -> int:
        """Return the number of images of a training batch."""
        if self.train_batch_size is not None:
            return self.train_batch_size
        return getattr(getattr(self.trainer, "lightning_module", None), "own_batch_size", BATCH_SIZE)

    def val_dataloader(self) -> DataLoader:
        """Return the batches of held-out normal images."""
        return self._evaluated(self.val_data)

    def test_dataloader(self) -> DataLoader:
        """Return the batches of test images.

        Raises:
            ValueError: there are none.
        """
        if not len(self.test_data):
            raise ValueError(
                f"{printable(self.dataset.root)} has no test images; put them into <class>/test/good and "
                "<class>/test/<defect>"
            )
        return self._evaluated(self.test_data)

    def _evaluated(self, subset: MultiClassDataset) -> DataLoader:
        return DataLoader(
            subset,
            batch_sampler=StackableBatches(SequentialSampler(subset), self.eval_batch_size),
            num_workers=self.num_workers,
            collate_fn=self.external_collate_fn or subset.collate_fn,
        )


def _folder_name(root: Path) -> str:
    """Return the name of a folder, without what has no place in a name of results."""
    name = printable(os.path.basename(os.path.abspath(root))).replace("\\", "_")
    return name or "dataset"


def _required_component(name: str) -> str:
    """Return a name that is one component of a path; a ValueError if it is not."""
    if name in ("", ".", "..") or "/" in name or "\\" in name or printable(name) != name:
        raise ValueError(f"name is {printable(name)!r}; allowed: the name of a folder, without / and \\")
    return name


def _require_one_class_each(dataset: Dataset) -> None:
    """Raise a ValueError if an image is listed for two classes: a model finds its class by its path."""
    known: dict[Path, int] = {}
    for image in (*dataset.train, *dataset.test):
        if known.setdefault(image.path, image.class_id) != image.class_id:
            names = [dataset.class_names[k] for k in (known[image.path], image.class_id)]
            raise ValueError(
                f"{printable(image.path)} is listed for two classes, {names[0]} and {names[1]}; list it for one"
            )
