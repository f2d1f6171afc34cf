"""plugin/data.py: all classes of a dataset as a datamodule of anomalib."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("anomalib")

import torch
from anomalib.data import AnomalibDataModule
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import CenterCrop, Compose, RandomHorizontalFlip, Resize

from hgad_fast.data.datasets import DatasetError, discover
from hgad_fast.data.images import ImageError, read_image
from hgad_fast.data.masks import read_mask
from hgad_fast.plugin import data as data_module
from hgad_fast.plugin.batch import MultiClassBatch, MultiClassItem
from hgad_fast.plugin.data import MultiClassDataset, MultiClassFolder
from hgad_fast.plugin.module import HGAD
from hgad_fast.plugin.processing import SeenResize, View
from hgad_fast.scoring.calibration import split
from hgad_fast.training.schedule import order_of_pass

SIZES = {"cloth": [(32, 32)], "steel": [(32, 48), (48, 32), (48, 32)]}  # (height, width) of the images, in turn


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def draw(root: Path, name: str, sizes: list[tuple[int, int]], test: bool = True) -> None:
    """Make a class of 5 training images, 3 normal ones for the test and 3 with a hole, whose mask is the last's folder.

    The second hole has no mask.
    """
    rng = np.random.default_rng(len(name))

    def image(i: int) -> np.ndarray:
        return rng.integers(0, 256, (*sizes[i % len(sizes)], 3), dtype=np.uint8)

    for i in range(5):
        write(root / name / "train" / "good" / f"{i}.png", image(i))
    for i in range(3) if test else ():
        write(root / name / "test" / "good" / f"{i}.png", image(i))
        write(root / name / "test" / "hole" / f"{i}.png", image(i))
        mask = np.zeros(sizes[i % len(sizes)], np.uint8)
        mask[4:9, 3:7] = 255
        masks = root / name / "ground_truth" / "hole"
        if i == 0:
            write(masks / "0_mask.png", mask)
        elif i == 2:
            write(masks / "2" / "a.png", mask)
            write(masks / "2" / "b.png", mask[::-1].copy())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes: images of one size, and of two."""
    root = tmp_path_factory.mktemp("data") / "three"
    for name, sizes in SIZES.items():
        draw(root, name, sizes)
    return root


def folder(root: Any, **options: Any) -> MultiClassFolder:
    data = MultiClassFolder(root, **{"num_workers": 0, "train_batch_size": 2, **options})
    data.setup()
    return data


class Model(LightningModule):
    """A model that notes the paths of its batches, and has the pre-processor that is asked for."""

    def __init__(self, transform: Any = None) -> None:
        super().__init__()
        self.pre_processor = SimpleNamespace(transform=transform)
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list[list[str]]] = {"train": [], "val": [], "test": []}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: MultiClassBatch, number: int) -> torch.Tensor:
        self.seen["train"].append(batch.image_path)
        return self.weight * batch.image.mean()

    def validation_step(self, batch: MultiClassBatch, number: int) -> None:
        self.seen["val"].append(batch.image_path)

    def test_step(self, batch: MultiClassBatch, number: int) -> None:
        self.seen["test"].append(batch.image_path)

    def predict_step(self, batch: MultiClassBatch, number: int) -> MultiClassBatch:
        return batch


def trainer(**options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(**{"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, **quiet, **options})


def paths(samples: Any) -> list[str]:
    return [str(sample.path) for sample in samples]


# ---- which images, of which class, in which order


def test_sets_are_those_of_the_library(root: Path) -> None:
    data, dataset = folder(root, calibration_fraction=0.4, seed=3), discover(root)
    class_ids = torch.tensor([sample.class_id for sample in dataset.train])
    rows = split(class_ids, 0.4, 3)
    assert data.class_names == ("cloth", "steel") and data.name == "three" and data.category == ""
    for subset, numbers in zip((data.train_data, data.val_data), rows, strict=True):
        assert subset.samples["image_path"].tolist() == paths(dataset.train[i] for i in numbers.tolist())
        assert not subset.has_anomalous
    assert data.test_data.samples["image_path"].tolist() == paths(dataset.test)
    assert data.test_data.samples["gt_class"].tolist() == [sample.class_id for sample in dataset.test]
    assert data.test_data.samples["defect"].tolist() == [sample.defect for sample in dataset.test]
    assert data.test_data.class_ids == {str(sample.path): sample.class_id for sample in dataset.test}
    assert data.task == data.val_data.task == "segmentation"


def test_order_is_that_of_the_dataset_and_not_of_paths(tmp_path: Path) -> None:
    for name in ("z", "a"):
        draw(tmp_path / name, f"class_{name}", [(32, 32)])
    data = folder([tmp_path / "z", tmp_path / "a"])
    assert data.class_names == ("class_z", "class_a")
    names = data.test_data.samples["class_name"].tolist()
    assert names == ["class_z"] * 6 + ["class_a"] * 6
    assert data.test_data.subsample([7, 2]).samples["class_name"].tolist() == ["class_a", "class_z"]
    assert data.test_data.subsample([7, 2]).task == "segmentation"
    assert folder(f"{tmp_path / 'z'}+{tmp_path / 'a'}").class_names == data.class_names


def test_a_csv_file_without_masks(root: Path, tmp_path: Path) -> None:
    rows = ["path,class,split,label"]
    rows += [f"{root}/cloth/train/good/{i}.png,cloth,train,good" for i in range(4)]
    rows += [f"{root}/cloth/test/good/0.png,cloth,test,good", f"{root}/cloth/test/hole/0.png,cloth,test,hole"]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    data = folder(tmp_path / "list.csv")
    assert data.task == "classification" and data.name == tmp_path.name
    batch = next(iter(data.test_dataloader()))
    assert batch.gt_mask is None and batch.mask_path is None and batch.gt_label.tolist() == [False, True]


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_are_those_of_fit(root: Path, tmp_path: Path, workers: int) -> None:
    """In each epoch, and in a training that is resumed; the last, incomplete batch is left out."""
    model = Model(Resize((32, 32)))
    run = trainer(max_epochs=3)
    run.fit(model, folder(root, train_batch_size=4, seed=5, num_workers=workers))
    listed = run.datamodule.train_data.samples["image_path"].tolist()
    assert len(listed) == 6
    orders = [order_of_pass(6, 5, epoch)[:4] for epoch in range(3)]
    assert model.seen["train"] == [[listed[i] for i in order] for order in orders]

    begun = trainer(max_epochs=1)
    begun.fit(Model(Resize((32, 32))), folder(root, train_batch_size=4, seed=5, num_workers=workers))
    begun.save_checkpoint(tmp_path / "begun.ckpt")
    resumed = Model(Resize((32, 32)))
    data = folder(root, train_batch_size=4, seed=5, num_workers=workers)
    trainer(max_epochs=3).fit(resumed, data, ckpt_path=tmp_path / "begun.ckpt")
    assert resumed.seen["train"] == model.seen["train"][1:]


def test_small_data_make_one_batch(root: Path) -> None:
    data = folder(root / "cloth", train_batch_size=100)
    (batch,) = data.train_dataloader()
    assert len(batch) == len(data.train_data) == 3


# ---- items


def test_items(root: Path) -> None:
    data = folder(root)
    for i, sample in enumerate(data.dataset.test):
        item = data.test_data[i]
        assert isinstance(item, MultiClassItem) and item.image_path == str(sample.path)
        assert item.image.dtype == torch.float32 and torch.equal(item.image, read_image(sample.path))
        assert item.gt_label.item() is sample.is_anomalous and item.gt_class.item() == sample.class_id
        assert item.mask_path == (None if sample.mask is None else str(sample.mask))
        if sample.is_anomalous and sample.mask is None:
            assert item.gt_mask is None
        else:
            mask = torch.zeros(item.image.shape[1:]) if sample.mask is None else read_mask(sample.mask)
            assert item.gt_mask.dtype == torch.bool and torch.equal(item.gt_mask, mask.bool())
    parts = [sample.mask.is_dir() for sample in data.dataset.test if sample.mask]
    assert any(parts) and not all(parts)


def test_augmentations_reach_image_and_mask(root: Path) -> None:
    flip = RandomHorizontalFlip(p=1)
    plain, flipped = folder(root), folder(root, test_augmentations=flip)
    assert flipped.train_data.augmentations is None
    for i in range(len(plain.test_data)):
        item, other = plain.test_data[i], flipped.test_data[i]
        assert torch.equal(other.image, item.image.flip(-1))
        assert (item.gt_mask is None) is (other.gt_mask is None)
        assert item.gt_mask is None or torch.equal(other.gt_mask, item.gt_mask.flip(-1))


def test_white_level(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "train" / "good" / "0.png", np.full((8, 8), 4095, np.uint16))
    assert folder(tmp_path, white_level=4095).train_data[0].image.unique().tolist() == [1.0]


def test_a_mask_of_another_size(tmp_path: Path) -> None:
    draw(tmp_path, "cloth", [(32, 32)])
    write(tmp_path / "cloth" / "ground_truth" / "hole" / "0_mask.png", np.ones((16, 32), np.uint8))
    data = folder(tmp_path)
    with pytest.raises(
        ImageError, match=r"0_mask.png: the mask has \(height, width\) \(16, 32\), its image \(32, 32\)"
    ):
        list(data.test_data)


def test_items_without_pixels_read_no_file(tmp_path: Path) -> None:
    draw(tmp_path, "cloth", [(32, 32), (40, 32)])
    data = folder(tmp_path, eval_batch_size=4)
    for subset in (data.train_data, data.test_data):
        subset.needs_images = False
    for file in tmp_path.rglob("*.png"):
        file.write_bytes(b"")
    batch = next(iter(data.train_dataloader()))
    assert batch.image.shape == (2, 3, 1, 1) and batch.gt_mask.shape == (2, 1, 1) and not batch.gt_mask.any()
    lengths = [(len(batch), batch.gt_mask is not None) for batch in data.test_dataloader()]
    assert lengths == [(4, True), (1, False), (1, True)]  # three good, three with a hole
    data.setup("fit")
    assert data.train_data.needs_images and data.test_data.needs_images


# ---- batches for evaluation


def batches(data: MultiClassFolder) -> list[tuple[list[int], tuple[int, ...]]]:
    """Return the numbers of the images in each batch of the test set, and their size."""
    numbers = {path: i for i, path in enumerate(data.test_data.samples["image_path"])}
    return [([numbers[path] for path in batch.image_path], batch.image.shape[2:]) for batch in data.test_dataloader()]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_batches_keep_the_order_and_hold_one_size(root: Path, batch_size: int) -> None:
    data = folder(root, eval_batch_size=batch_size)
    parts = batches(data)
    assert [i for numbers, _ in parts for i in numbers] == list(range(12))
    assert len(parts) == len(data.test_dataloader())
    for numbers, size in parts:
        assert len(numbers) <= batch_size
        assert all(data.test_data[i].image.shape[1:] == size for i in numbers)
    if batch_size == 8:  # of each class three good ones and three with a hole, of which the second has no mask
        expected = [[0, 1, 2, 3], [4], [5], [6], [7, 8], [9], [10], [11]]
        assert [numbers for numbers, _ in parts] == expected


def test_batches_of_masks(root: Path) -> None:
    for batch in folder(root).test_dataloader():
        if batch.gt_mask is None:
            assert [Path(path).parts[-2:] for path in batch.image_path] == [("hole", "1.png")]
        else:
            assert batch.gt_mask.shape == (len(batch), *batch.image.shape[2:])
            assert batch.mask_path is None or len(batch.mask_path) == len(batch)


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (SeenResize(View(16)), [[0, 1, 2, 3], [4], [5], [6], [7, 8], [9], [10], [11]]),
        (SeenResize(View(16, square=True)), [[0, 1, 2, 3], [4], [5, 6, 7, 8, 9], [10], [11]]),
        (SeenResize(View(16, center_crop=True)), [[0, 1, 2, 3], [4], [5, 6, 7, 8, 9], [10], [11]]),
        (Resize((16, 24)), [[0, 1, 2, 3], [4], [5, 6, 7, 8, 9], [10], [11]]),
        (Compose([CenterCrop(32), Resize((16, 24))]), [[0, 1, 2, 3], [4], [5, 6, 7, 8, 9], [10], [11]]),
        (Resize(16), [[0, 1, 2, 3], [4], [5], [6], [7, 8], [9], [10], [11]]),
    ],
    ids=["proportions", "square", "centre crop", "fixed", "crop and fixed", "short side"],
)
def test_batches_of_images_as_a_model_sees_them(root: Path, transform: Any, expected: list[list[int]]) -> None:
    """anomalib's datamodule finds the model's resize, and the size that it gives decides on the batches."""
    data, model = MultiClassFolder(root, num_workers=0), Model(transform)
    trainer().test(model, data, verbose=False)
    listed = data.test_data.samples["image_path"].tolist()
    assert model.seen["test"] == [[listed[i] for i in numbers] for numbers in expected]
    assert [numbers for numbers, _ in batches(data)] == expected


def test_no_header_is_read_where_one_size_is_sure(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "read_header", None)
    assert len(folder(root, augmentations=Resize((16, 16)), eval_batch_size=12).val_dataloader()) == 1


def test_images_of_two_sizes_are_not_stretched(root: Path) -> None:
    data = folder(root)
    with pytest.raises(ValueError, match=r"0.png is seen at 32 x 48 pixels .*1.png at 48 x 32, .*batches of 1 image"):
        next(iter(DataLoader(data.test_data, batch_size=2, sampler=[6, 7], collate_fn=data.test_data.collate_fn)))
    with pytest.raises(ValueError, match=r"0.png has a mask and .*1.png none"):
        MultiClassBatch.collate([data.test_data[3], data.test_data[4]])
    with pytest.raises(ValueError, match=r"0.png has a mask and .*1.png none"):
        MultiClassBatch.collate([data.test_data[4], data.test_data[3]])


def test_paths_of_masks_in_a_batch(root: Path) -> None:
    data = folder(root)
    for numbers in ([0, 3], [3, 0]):
        batch = MultiClassBatch.collate([data.test_data[i] for i in numbers])
        assert [Path(path).name for path in batch.mask_path] == ["" if i == 0 else "0_mask.png" for i in numbers]
        assert [item.mask_path is None for item in batch] == [i == 0 for i in numbers]


# ---- in lightning


def test_validation_and_prediction(root: Path) -> None:
    """Held-out images are validated on, test images predicted, each once and in order; nothing is warned of."""
    data, model = MultiClassFolder(root, num_workers=0, eval_batch_size=3), Model(SeenResize(View(16)))
    run = trainer(max_epochs=1, num_sanity_val_steps=0)
    run.fit(model, MultiClassFolder(root / "cloth", num_workers=0))
    run.validate(model, data, verbose=False)
    held_out = data.val_data.samples["image_path"].tolist()
    assert [path for batch in model.seen["val"][-len(data.val_dataloader()) :] for path in batch] == held_out
    assert all("train" in Path(path).parts for batch in model.seen["val"] for path in batch)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*batch sampler.*")
        predictions = run.predict(model, data)
        by_hand = run.predict(model, data.test_dataloader())
    for predicted in (predictions, by_hand):
        assert [path for batch in predicted for path in batch.image_path] == paths(data.dataset.test)
        assert all(isinstance(batch, MultiClassBatch) for batch in predicted)


def test_nothing_held_out(root: Path) -> None:
    data, model = folder(root, calibration_fraction=0), Model(Resize((8, 8)))
    assert len(data.val_data) == 0 and len(data.train_data) == len(data.dataset.train)
    trainer(max_epochs=1).fit(model, data)
    assert model.seen["val"] == [] and model.seen["train"]


def test_normal_images_alone(tmp_path: Path) -> None:
    draw(tmp_path, "cloth", [(32, 32)], test=False)
    (tmp_path / "cloth" / "train" / "good").rename(tmp_path / "normal")
    for part in ("cloth/train", "cloth"):
        (tmp_path / part).rmdir()
    data, model = folder(tmp_path), Model()
    trainer(max_epochs=1).fit(model, data)
    assert model.seen["train"] and data.class_names == ("normal",)
    for loader in (data.test_dataloader, data.predict_dataloader):
        with pytest.raises(ValueError, match="has no test images; put them into <class>/test/good"):
            loader()


def test_workers(root: Path) -> None:
    options = {"eval_batch_size": 4, "augmentations": SeenResize(View(16, square=True))}
    loaders = (folder(root, num_workers=workers, **options).test_dataloader() for workers in (0, 2))
    for batch, other in zip(*loaders, strict=True):
        assert isinstance(other, MultiClassBatch) and batch.image_path == other.image_path
        assert torch.equal(batch.image, other.image) and torch.equal(batch.gt_class, other.gt_class)
        assert batch.gt_mask is other.gt_mask is None or torch.equal(batch.gt_mask, other.gt_mask)


@pytest.mark.parametrize("cache", ["ram", None])
def test_a_model_that_keeps_features(root: Path, cache: str | None) -> None:
    """Its training batches hold images of two sizes and no pixels, also where features are computed in each epoch."""
    fields = {"out_indices": (1,), "coupling_layers": 2, "pos_embed_dim": 8, "n_intra_centers": 2}
    backbone = {"backbone": "test_efficientnet", "img_size": 32}
    parameters = []
    # the first keeps the features of files, the second takes those of augmented items
    for workers, augmentation in ((0, None), (2, RandomHorizontalFlip(p=0))):
        data = MultiClassFolder(root, num_workers=workers, train_batch_size=4, train_augmentations=augmentation)
        settings = {"backbone_weights": None, **fields}
        model = HGAD(classes=data.class_names, cache=cache, settings=settings, visualizer=False, **backbone)
        trainer(max_epochs=2, limit_val_batches=0).fit(model, data)
        parameters.append(torch.cat([value.flatten() for value in model.detector.parameters()]))
    assert torch.equal(*parameters)


def test_pickling(root: Path) -> None:
    data = pickle.loads(pickle.dumps(folder(root)))
    assert data.test_data.samples.equals(folder(root).test_data.samples) and data.test_data.task == "segmentation"
    assert torch.equal(data.test_data[0].image, folder(root).test_data[0].image)


def test_a_collate_function_of_the_users_own(root: Path) -> None:
    data = folder(root, augmentations=Resize((8, 8)))
    data.external_collate_fn = list
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert isinstance(next(iter(loader)), list)


# ---- the command line, and mistakes


def test_command_line(root: Path) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(AnomalibDataModule, "data")
    arguments = [
        "--data",
        "hgad_fast.plugin.data.MultiClassFolder",
        "--data.root",
        str(root / "cloth"),
        "--data.seed=7",
    ]
    arguments += ["--data.test_augmentations", "torchvision.transforms.v2.CenterCrop"]
    arguments += ["--data.test_augmentations.size", "8"]
    data = parser.instantiate_classes(parser.parse_args(arguments)).data
    assert isinstance(data, MultiClassFolder) and data.class_names == ("cloth",) and data.seed == 7
    assert data.num_workers in range(1, 5) and isinstance(data.test_augmentations, CenterCrop)
    several = ["--data", "hgad_fast.plugin.data.MultiClassFolder", f"--data.root=[{root}/cloth, {root}/steel]"]
    assert parser.instantiate_classes(parser.parse_args(several)).data.class_names == ("cloth", "steel")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_batch_size": 0}, "train_batch_size is 0; allowed: whole numbers from 1"),
        ({"eval_batch_size": -1}, "eval_batch_size is -1"),
        ({"calibration_fraction": 1.0}, r"calibration_fraction is 1.0; allowed: numbers in \[0, 1\)"),
        ({"seed": -1}, "seed is -1; allowed"),
        ({"name": "a/b"}, "name is 'a/b'; allowed: the name of a folder"),
        ({"name": ".."}, r"name is '\.\.'"),
    ],
)
def test_arguments_that_are_not_allowed(root: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiClassFolder(root, **options)


def test_names_of_results(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    assert MultiClassFolder(".").name == "three"
    assert MultiClassFolder(root / "cloth", name="mine").name == "mine"
    assert MultiClassFolder(discover(root)).name == "three"


def test_a_root_without_a_dataset(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such folder"):
        MultiClassFolder(tmp_path / "nothing")


def test_an_image_of_two_classes(root: Path, tmp_path: Path) -> None:
    rows = [f"{root}/cloth/train/good/{i}.png,{name},train,good" for i in (0, 1) for name in ("cloth", "linen")]
    (tmp_path / "list.csv").write_text("\n".join(["path,class,split,label", *rows]))
    with pytest.raises(ValueError, match="0.png is listed for two classes, cloth and linen"):
        MultiClassFolder(tmp_path / "list.csv")


def test_the_dataset_by_itself(root: Path) -> None:
    dataset = discover(root)
    subset = MultiClassDataset(dataset, dataset.test[:2], "test", augmentations=CenterCrop(8))
    assert len(subset) == 2 and subset[1].image.shape == (3, 8, 8)
    assert (subset.root, subset.class_names, subset.white_level) == (root, dataset.class_names, 65535)
