"""Features: what a picture becomes, once, and what of the user's own features is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from hgad_fast import HGADConfig, HGADModel, data
from hgad_fast.features import FeatureSet, feature_set


def levels(n: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, c, 3, 4, generator=generator) for c in (5, 6)]


def featureless(**changes) -> HGADModel:
    return HGADModel(
        HGADConfig(
            **{"backbone_arch": None, "feature_levels": 2, "feature_dims": (5, 6), "n_classes": 2}
            | {"coupling_layers": 1, "pos_embed_dim": 4}
            | changes
        )
    )


@pytest.fixture(scope="module")
def model() -> HGADModel:
    config = HGADConfig(
        backbone_arch="test_efficientnet",
        backbone_weights=None,
        n_classes=2,
        class_names=("ash", "oak"),
        feature_levels=2,
        out_indices=(2,),
        coupling_layers=1,
        pos_embed_dim=4,
        img_size=64,
    )
    return HGADModel(config)


@pytest.fixture
def woods(tmp_path) -> Path:
    generator = np.random.default_rng(0)
    for name, size in (("ash", (32, 48)), ("oak", (64, 64))):
        (tmp_path / name).mkdir()
        for i in range(2):
            noise = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / name / f"{i}.png")
    return tmp_path


def expected_features(model: HGADModel, file: Path) -> list[Tensor]:
    """hgad.md, section 1, by Pillow and timm alone."""
    picture = Image.open(file)
    short = min(picture.size)
    size = (64 * picture.width // short, 64 * picture.height // short)
    planes = [plane.convert("F").resize(size, Image.Resampling.LANCZOS) for plane in picture.split()]
    x = torch.from_numpy(np.stack([np.array(plane) for plane in planes])).clamp(0, 255) / 255
    statistics = model.encoder.net.pretrained_cfg
    x = (x - torch.tensor(statistics["mean"])[:, None, None]) / torch.tensor(statistics["std"])[:, None, None]
    half = F.interpolate(x[None], (size[1] // 2, size[0] // 2), mode="bilinear", align_corners=True)
    with torch.no_grad():
        return [model.encoder.net(x[None])[0][0], model.encoder.net(half)[0][0]]


@pytest.mark.parametrize("cache", ["ram", None])
def test_features_of_pictures(model, woods, cache):
    features = feature_set(model, woods, cache=cache)
    files = [woods / name / f"{i}.png" for name in ("ash", "oak") for i in range(2)]
    assert features.class_ids.tolist() == [0, 0, 1, 1]
    for image, file in zip(features.images, files, strict=True):
        for found, expected in zip(image, expected_features(model, file), strict=True):
            assert found.shape == expected.shape and found.permute(1, 2, 0).is_contiguous()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert features.images[0][0].shape != features.images[2][0].shape  # the whole picture, in its own proportions
    assert features.fingerprint == data.fingerprint(data.discover(woods).train, woods)


def test_cache_decides_when_features_are_computed(model, woods):
    calls = []
    hook = model.encoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        kept = feature_set(model, woods)
        assert len(calls) == 4
        assert [len(kept.images[i]) for i in (0, 1, 0)] == [2, 2, 2] and len(calls) == 4
        anew = feature_set(model, woods, cache=None)
        assert len(calls) == 4
        torch.testing.assert_close(anew.subset(torch.tensor([3])).images[0], kept.images[3], rtol=0, atol=0)
        assert len(calls) == 5
    finally:
        hook.remove()


def test_progress_advances_with_the_features(model, woods):
    """The wrapper sees each picture as it is done, not all of them at the end."""
    events = []
    hook = model.encoder.register_forward_hook(lambda *_: events.append("computed"))

    def progress(items, title):
        assert (len(items), title) == (4, "features")
        for item in items:
            yield item
            events.append("shown")

    try:
        assert len(feature_set(model, woods, progress=progress)) == 4
    finally:
        hook.remove()
    assert events == ["computed", "shown"] * 4


def test_pictures_that_cannot_be_decoded(model, woods):
    (woods / "ash" / "1.png").write_bytes(b"no picture")
    (woods / "oak" / "0.png").write_bytes((woods / "oak" / "1.png").read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"(?s)2 of 4 images.*ash/1\.png.*oak/0\.png"):
        feature_set(model, woods)
    reported = []
    features = feature_set(model, woods, skip_bad=True, on_bad=reported.append)
    assert features.class_ids.tolist() == [0, 1]
    assert [error.path for error in reported] == [woods / "ash" / "1.png", woods / "oak" / "0.png"]
    expected = expected_features(model, woods / "oak" / "1.png")
    torch.testing.assert_close(features.images[1], expected, rtol=1e-4, atol=1e-5)


def test_classes_of_the_folder_must_be_those_of_the_model(model, woods):
    (woods / "oak").rename(woods / "elm")
    with pytest.raises(ValueError, match="has the classes ash, elm; the model was made for ash, oak"):
        feature_set(model, woods)
    nameless = HGADModel(model.config.replace(class_names=None, n_classes=3))
    with pytest.raises(ValueError, match=r"has 2 classes \(ash, elm\), the model has n_classes=3"):
        feature_set(nameless, woods)


def test_pictures_need_a_backbone(woods):
    with pytest.raises(ValueError, match="no backbone"):
        feature_set(featureless(), woods, cache=None)


# ---- features that the user brings


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_maps_keep_their_values(dtype):
    given = [level.to(dtype).requires_grad_() for level in levels()]
    features = feature_set(featureless(), (given, [0, 1, 1]))
    assert features.class_ids.dtype == torch.int64 and features.class_ids.tolist() == [0, 1, 1]
    for i, image in enumerate(features.images):
        for ours, theirs in zip(image, given, strict=True):
            assert ours.dtype == torch.float32 and not ours.requires_grad
            assert torch.equal(ours, theirs[i].float())


def test_fingerprint_names_the_features():
    given, ids = levels(), torch.tensor([0, 1, 1])
    names = [FeatureSet.from_levels(given, ids).fingerprint]
    moved = [level.clone() for level in given]
    moved[1][2, 3, 1, 0] = torch.nextafter(moved[1][2, 3, 1, 0], torch.tensor(9.0))
    names.append(FeatureSet.from_levels(moved, ids).fingerprint)
    names.append(FeatureSet.from_levels(given, [0, 1, 0]).fingerprint)
    names.append(FeatureSet.from_levels([level.flip(0) for level in given], ids.flip(0)).fingerprint)
    names.append(FeatureSet.from_levels([level.reshape(3, -1, 2, 6) for level in given], ids).fingerprint)
    names += [FeatureSet.from_levels(given, ids).subset(torch.tensor(rows)).fingerprint for rows in ([0, 1], [0, 2])]
    assert len(set(names)) == len(names)

    strided = [level.transpose(2, 3).contiguous().transpose(2, 3) for level in given]
    assert FeatureSet.from_levels(strided, ids).fingerprint == names[0]
    images = [[level[i] for level in given] for i in range(3)]
    assert FeatureSet(images, ids).fingerprint == names[0]
    assert FeatureSet(images, ids, "chosen").fingerprint == "chosen"


def test_subset():
    features = FeatureSet.from_levels(levels(), [0, 1, 1]).subset(torch.tensor([2, 0]))
    assert features.class_ids.tolist() == [1, 0] and len(features) == 2
    assert torch.equal(features.images[0][1], levels()[1][2])
    assert torch.equal(features.images[1][0], levels()[0][0])


@pytest.mark.parametrize(
    "given, ids, message",
    [
        (levels(), [0, 1], "3 pictures and class ids"),
        (levels(), [0, 1, 2], "class ids run from 0 to 2; the model has n_classes=2"),
        (levels(), [-1, 0, 1], "class ids run from -1"),
        (levels()[:1], [0, 1, 1], "picture 0 has features"),
        (levels()[::-1], [0, 1, 1], r"picture 0 has features .*with C = \[5, 6\]"),
        ([levels()[0], levels(2)[1]], [0, 1, 1], "with one n; the shapes are"),
        (levels()[0], [0, 1, 1], "one .* tensor a level"),
        ([level[:, :, :0] for level in levels()], [0, 1, 1], "picture 0 has features"),
    ],
)
def test_features_that_do_not_fit(given, ids, message):
    with pytest.raises(ValueError, match=message):
        feature_set(featureless(), (given, ids))


def test_pictures_of_another_type_are_refused():
    images = [[level[0] for level in levels()], [level[1].double() for level in levels()]]
    with pytest.raises(ValueError, match="picture 1 has features .*float64.* float32"):
        feature_set(featureless(), FeatureSet(images, torch.tensor([0, 1])))


def test_a_model_without_class_names_takes_those_of_the_dataset(tmp_path: Path):
    for name in ("bolt", "nut"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(tmp_path / name / "0.png")
    model = HGADModel(
        HGADConfig(n_classes=2, backbone_arch="resnet10t", backbone_weights=None, out_indices=(2,), img_size=32)
    )
    feature_set(model, tmp_path)
    assert model.class_names == ("bolt", "nut")
