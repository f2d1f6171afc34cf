"""The demo's data are what they claim to be: disjoint, subtle, repeatable; and its weights are EfficientNet-Lite0's."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
import rounding
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

import hgad_fast
from hgad_fast import GaussianModel, HGADModel, demo
from hgad_fast.data import datasets
from hgad_fast.data.masks import read_mask
from hgad_fast.features import packaged
from hgad_fast.features.backbone import Backbone

MARGIN = 8  # pixels of a photograph that no crop of two regions comes nearer than


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return demo.write_data(tmp_path_factory.mktemp("demo"))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def columns_of(crop: np.ndarray, photograph: np.ndarray) -> tuple[int, int]:
    """Columns [left, right) of the place in the photograph that the crop, or its mirror image, was cut from."""
    height, width = crop.shape
    for candidate in (crop, crop[:, ::-1]):
        top, left = divmod(photograph.tobytes().find(candidate[0].tobytes()), photograph.shape[1])
        if top >= 0 and np.array_equal(photograph[top : top + height, left : left + width], candidate):
            return left, left + width
    raise AssertionError("the crop is not a piece of the photograph")


def test_photographs_are_those_of_scikit_image() -> None:
    import skimage.data

    for name in demo.PHOTOGRAPHS:
        np.testing.assert_array_equal(np.round(demo.photograph(name) * 255), getattr(skimage.data, name)())


def test_training_calibration_and_test_crops_share_no_pixel(folders: tuple[Path, Path]) -> None:
    dataset, calibration = folders
    for name in demo.PHOTOGRAPHS:
        photograph = np.round(demo.photograph(name) * 255).astype(np.uint8)
        used = []
        for folder in (dataset / name / "train" / "good", calibration / name, dataset / name / "test" / "good"):
            columns = np.array([columns_of(pixels(path), photograph) for path in sorted(folder.iterdir())])
            used.append((int(columns[:, 0].min()), int(columns[:, 1].max())))
        for (_, right), (left, _) in itertools.pairwise(sorted(used)):
            assert left - right >= MARGIN


def test_regions_keep_the_margin() -> None:
    regions = sorted(demo.REGIONS.values())
    assert all(right.left - left.right >= MARGIN for left, right in itertools.pairwise(regions))
    assert regions[0].left >= 0
    assert regions[-1].right <= demo.photograph("brick").shape[1]


def test_folders_are_found_as_a_dataset_and_its_calibration_images(folders: tuple[Path, Path]) -> None:
    dataset, calibration = map(datasets.discover, folders)
    assert dataset.class_names == calibration.class_names == demo.PHOTOGRAPHS
    for k in range(len(demo.PHOTOGRAPHS)):
        assert sum(s.class_id == k for s in dataset.train) == demo.COUNTS["train"]
        assert sum(s.class_id == k for s in calibration.train) == demo.COUNTS["calibration"]
        of_class = [s for s in dataset.test if s.class_id == k]
        assert sum(not s.is_anomalous for s in of_class) == demo.COUNTS["test"]
        for defect in demo.DEFECTS:
            masks = [s.mask for s in of_class if s.defect == defect]
            assert len(masks) == demo.DEFECTS_EACH
            assert all(mask is not None and 0.005 < read_mask(mask).float().mean() < 0.15 for mask in masks)


@pytest.mark.parametrize("kind", demo.DEFECTS)
def test_a_defect_changes_the_crop_where_its_mask_is_and_nowhere_far_from_it(kind: str) -> None:
    from scipy.ndimage import binary_dilation

    rng = np.random.default_rng(1)
    for _ in range(20):
        crop, other = (demo.random_crop(demo.photograph(n), demo.REGIONS["test"], rng) for n in ("gravel", "brick"))
        image, mask = demo.draw_defect(kind, crop, other, rng)
        change = np.abs(image - crop)
        assert (change[mask] > 1 / 255).mean() > 0.8
        assert change[~binary_dilation(mask, iterations=8)].max() < 1 / 255
        assert image.min() >= 0
        assert image.max() <= 1


def test_pixel_intensity_does_not_give_the_defects_away(folders: tuple[Path, Path]) -> None:
    root = folders[0]
    for name in demo.PHOTOGRAPHS:
        train = np.stack([pixels(path) for path in sorted((root / name / "train" / "good").iterdir())]).astype(float)
        test = datasets.discover(root / name).test
        masks = np.stack([np.zeros(train.shape[1:]) if s.mask is None else pixels(s.mask) > 0 for s in test])
        images = np.stack([pixels(s.path) for s in test])
        for mean in (train.mean(), train.mean(0)):
            assert roc_auc_score(masks.ravel(), np.abs(images - mean).ravel()) < 0.75


def test_the_seed_decides_the_data(folders: tuple[Path, Path], tmp_path: Path) -> None:
    def digest(root: Path) -> str:
        files = sorted(path for path in root.rglob("*.png"))
        return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()

    same, other = demo.write_data(tmp_path / "same"), demo.write_data(tmp_path / "other", seed=1)
    assert [digest(root) for root in same] == [digest(root) for root in folders]
    assert digest(other[0]) != digest(folders[0])


def test_weights_classify_a_known_image() -> None:
    import skimage.data
    import timm

    net = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    net.load_state_dict(packaged.lite0_state_dict(), strict=True)
    cat = torch.from_numpy(skimage.data.chelsea()).permute(2, 0, 1)[None, :, :, 75:375].float() / 255
    cat = torch.nn.functional.interpolate(cat, (224, 224), mode="bicubic", antialias=True, align_corners=False)
    with torch.no_grad():
        probability = net((cat - 0.5) / 0.5).softmax(1)[0]
    tabby, tiger_cat, egyptian_cat = 281, 282, 285  # of ImageNet's 1000 classes
    assert probability[[tabby, tiger_cat, egyptian_cat]].sum() > 0.5


def test_weights_file_gives_the_backbone_those_weights_and_their_normalisation(tmp_path: Path) -> None:
    import timm

    backbone = Backbone(demo.config(demo.write_weights(tmp_path / "lite0.safetensors")))
    assert backbone.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    assert backbone.std.flatten().tolist() == [0.5, 0.5, 0.5]
    whole = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    whole.load_state_dict(packaged.lite0_state_dict(), strict=True)
    image = torch.rand(1, 3, 128, 128)

    @torch.no_grad()
    def features(whole: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
        x = whole.bn1(whole.conv_stem(image))
        for stage in whole.blocks[:5]:  # stride 16 ends after the fifth stage
            x = stage(x)
        return x

    rounding.assert_close(backbone(image)[0], features, whole, image)


def test_both_methods_are_fitted_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In little: few crops at half their size, and a single pass."""
    monkeypatch.setattr(demo, "COUNTS", {"test": 2, "calibration": 19, "train": 4})
    monkeypatch.setattr(demo, "DEFECTS_EACH", 1)
    said: list[str] = []
    settings = {"img_size": 64, "msk_size": 32, "coupling_layers": 1, "meta_epochs": 1, "sub_epochs": 1}
    outcome = demo.run(tmp_path, say=said.append, **settings)
    assert outcome.model == tmp_path / "model.safetensors"
    assert outcome.gaussian.model == tmp_path / "gaussian.safetensors"
    hgad, gaussian = (hgad_fast.load(result.model) for result in (outcome, outcome.gaussian))
    assert isinstance(hgad, HGADModel) and isinstance(gaussian, GaussianModel)
    assert gaussian.config.img_size == 64 and gaussian.config.msk_size == 32 and gaussian.calibration is not None
    names = {f"{name}_{kind}.png" for name in demo.PHOTOGRAPHS for kind in ("good", *demo.DEFECTS)}
    text = "\n".join(said)
    for result in (outcome, outcome.gaussian):
        assert {path.name for path in result.overlays.iterdir()} == names
        assert str(result.model) in text and str(result.overlays) in text and result.evaluation.table() in text
        assert result.evaluation.n_normal == 6 and result.evaluation.n_anomalous == 12
    assert outcome.evaluation.table() != outcome.gaussian.evaluation.table()
    with Image.open(outcome.sheet) as image:
        assert image.width > 2000 and np.asarray(image.convert("L")).std() > 10
