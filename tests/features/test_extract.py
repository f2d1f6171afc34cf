"""Features: what an image becomes, once, and what of the user's own features is refused."""

from __future__ import annotations

import copy
import signal
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import rounding
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from hgad_fast import HGADConfig, HGADModel
from hgad_fast.data import datasets, images
from hgad_fast.features import extract, preprocess
from hgad_fast.features.extract import FeatureSet, feature_set
from hgad_fast.files import readable, replacing


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
    image = Image.open(file)
    short = min(image.size)
    size = (64 * image.width // short, 64 * image.height // short)
    planes = [plane.convert("F").resize(size, Image.Resampling.LANCZOS) for plane in image.split()]
    x = torch.from_numpy(np.stack([np.array(plane) for plane in planes])).clamp(0, 255) / 255
    statistics = model.encoder.net.pretrained_cfg
    x = (x - torch.tensor(statistics["mean"])[:, None, None]) / torch.tensor(statistics["std"])[:, None, None]
    half = F.interpolate(x[None], (size[1] // 2, size[0] // 2), mode="bilinear", align_corners=True)
    with torch.no_grad():
        return [model.encoder.net(x[None])[0][0], model.encoder.net(half)[0][0]]


@pytest.mark.parametrize("cache", ["ram", "disk", None])
def test_features_of_images(model, woods, cache, tmp_path_factory):
    features = feature_set(model, woods, cache=cache, cache_dir=tmp_path_factory.mktemp("cache"))
    files = [woods / name / f"{i}.png" for name in ("ash", "oak") for i in range(2)]
    assert features.class_ids.tolist() == [0, 0, 1, 1]
    for image, file in zip(features.images, files, strict=True):
        assert all(level.permute(1, 2, 0).is_contiguous() for level in image)
        rounding.assert_close(list(image), partial(expected_features, file=file), model)
    assert features.images[0][0].shape != features.images[2][0].shape  # the whole image, in its own proportions
    assert features.fingerprint == datasets.fingerprint(datasets.discover(woods).train, woods)


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
    """The wrapper sees each image as it is done, not all of them at the end."""
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


@pytest.mark.parametrize("cache", ["ram", "disk", None])
def test_images_that_cannot_be_decoded(model, woods, cache, tmp_path_factory):
    options = {"cache": cache, "cache_dir": tmp_path_factory.mktemp("cache")}
    (woods / "ash" / "1.png").write_bytes(b"no image")
    (woods / "oak" / "0.png").write_bytes((woods / "oak" / "1.png").read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"(?s)2 of 4 images.*ash/1\.png.*oak/0\.png"):
        feature_set(model, woods, **options)
    (woods / "oak" / "2.png").symlink_to(woods / "nowhere.png")
    with pytest.raises(ValueError, match=r"(?s)3 of 5 images.*ash/1\.png.*oak/0\.png.*oak/2\.png: No such file"):
        feature_set(model, woods, **options)
    reported = []
    features = feature_set(model, woods, skip_bad=True, on_bad=reported.append, **options)
    assert features.class_ids.tolist() == [0, 1]
    names = [error.path.relative_to(woods).as_posix() for error in reported]
    assert names == ["ash/1.png", "oak/0.png", "oak/2.png"]
    rounding.assert_close(list(features.images[1]), partial(expected_features, file=woods / "oak" / "1.png"), model)


def test_classes_of_the_folder_must_be_those_of_the_model(model, woods):
    (woods / "oak").rename(woods / "elm")
    with pytest.raises(ValueError, match="has the classes ash, elm; the model was made for ash, oak"):
        feature_set(model, woods)
    nameless = HGADModel(model.config.replace(class_names=None, n_classes=3))
    with pytest.raises(ValueError, match=r"has 2 classes \(ash, elm\), the model has n_classes=3"):
        feature_set(nameless, woods)


def test_images_need_a_backbone(woods):
    with pytest.raises(ValueError, match="no backbone"):
        feature_set(featureless(), woods, cache=None)


def test_an_image_that_the_backbone_cannot_take_is_named(model, woods, monkeypatch):
    monkeypatch.setattr(preprocess, "MAX_MEMORY", preprocess.working_set(model, model.config, (32, 48)))
    monkeypatch.setattr(preprocess, "ALWAYS_WHOLE", 64 * 64)
    Image.fromarray(np.zeros((10, 50, 3), np.uint8)).save(woods / "ash" / "2.png")
    with pytest.raises(ValueError, match=r"ash/2\.png: an image of 10 x 50 pixels .* max_memory is \d"):
        feature_set(model, woods)
    assert len(feature_set(model, woods, skip_bad=True)) == 4


# ---- the cache


@pytest.fixture
def computed(model, monkeypatch) -> list[Path]:
    """Return the files whose features are computed, in this order."""
    files, extractor = [], extract._Extractor
    original = extractor._seen_or_error
    monkeypatch.setattr(
        extractor, "_seen_or_error", lambda self, content, path: files.append(path) or original(self, content, path)
    )
    return files


@pytest.fixture
def on_disk(tmp_path_factory) -> dict:
    return {"cache": "disk", "cache_dir": tmp_path_factory.mktemp("cache")}


def assert_same_bits(actual: FeatureSet, expected: FeatureSet) -> None:
    assert actual.fingerprint == expected.fingerprint and torch.equal(actual.class_ids, expected.class_ids)
    for ours, theirs in zip(actual.images, expected.images, strict=True):
        for level, other in zip(ours, theirs, strict=True):
            assert level.dtype == torch.float32 and torch.equal(level, other)


def test_a_warm_cache_decodes_nothing(model, woods, on_disk, computed, monkeypatch):
    feature_set(model, woods, **on_disk)
    assert len(computed) == 4
    fresh = feature_set(model, woods)
    monkeypatch.setattr(extract, "read_image", lambda path, white_level: pytest.fail(f"{path} was decoded"))
    assert_same_bits(feature_set(model, woods, **on_disk), fresh)


def test_only_what_changed_is_computed(model, woods, on_disk, computed):
    feature_set(model, woods, **on_disk)
    computed.clear()
    (woods / "ash" / "0.png").rename(woods / "ash" / "first.png")
    (woods / "ash" / "1.png").unlink()
    Image.fromarray(np.full((32, 32, 3), 7, np.uint8)).save(woods / "oak" / "1.png")
    Image.fromarray(np.full((48, 32, 3), 8, np.uint8)).save(woods / "oak" / "2.png")
    actual = feature_set(model, woods, **on_disk)
    assert sorted(computed) == [woods / "oak" / "1.png", woods / "oak" / "2.png"]
    assert_same_bits(actual, feature_set(model, woods))


def test_equal_images_are_computed_once(model, woods, on_disk, computed):
    (woods / "oak" / "0.png").write_bytes((woods / "ash" / "0.png").read_bytes())
    actual = feature_set(model, woods, **on_disk)
    assert len(computed) == 3 and len(actual) == 4
    assert torch.equal(actual.images[0][1], actual.images[2][1])


@pytest.mark.parametrize(
    "changes", [{"img_size": 32}, {"center_crop": True}, {"out_indices": (1,)}, {"feature_levels": 1}, {"seed": 3}]
)
def test_other_features_are_not_taken(model, woods, on_disk, changes):
    """The seed gives the random backbone other weights."""
    feature_set(model, woods, **on_disk)
    other = HGADModel(model.config.replace(feature_dims=None, **changes))
    assert_same_bits(feature_set(other, woods, **on_disk), feature_set(other, woods))


def test_settings_that_features_do_not_depend_on_share_them(model, woods, on_disk, computed):
    feature_set(model, woods, **on_disk)
    other = HGADModel(model.config.replace(coupling_layers=2, lr=1.0, n_intra_centers=3))
    feature_set(other, woods, **on_disk)
    assert len(computed) == 4


@pytest.mark.parametrize("cache", ["ram", "disk", None])
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision(model, woods, cache, name, tmp_path_factory):
    """Rounded wherever they are kept, beside what scoring sees."""
    whole = feature_set(model, woods)
    half = feature_set(model, woods, cache=cache, cache_dir=tmp_path_factory.mktemp("cache"), cache_dtype=name)
    assert half.fingerprint != whole.fingerprint
    subset = half.subset(torch.tensor([3, 1]))
    for i, rounded, exact in zip([3, 1], subset.images, subset.exact, strict=True):
        for level in (0, 1):
            assert torch.equal(exact[level], whole.images[i][level])
            assert rounded[level].dtype == torch.float32 and rounded[level].permute(1, 2, 0).is_contiguous()
            assert torch.equal(rounded[level], whole.images[i][level].to(getattr(torch, name)).float())


def test_features_beyond_float16_are_told(model, woods):
    wild = copy.deepcopy(model)
    wild.encoder.register_forward_hook(lambda _, inputs, levels: [1e5 * level for level in levels])
    with pytest.raises(ValueError, match="beyond the range of float16; use cache_dtype='bfloat16'"):
        feature_set(wild, woods, cache_dtype="float16")
    feature_set(wild, woods, cache_dtype="bfloat16")


def test_the_size_is_told_before_anything_is_written(model, woods, on_disk):
    told = []

    def say(text):
        told.append(text)
        assert not list(on_disk["cache_dir"].glob("*/*"))

    feature_set(model, woods, say=say, **on_disk)
    (folder,) = on_disk["cache_dir"].iterdir()
    size = sum(level.nbytes for image in feature_set(model, woods).images for level in image)
    assert told[0].startswith(f"features of 4 images, about {readable(size)}, go to {folder} (") and len(told) == 1
    feature_set(model, woods, say=told.append, **on_disk)
    assert len(told) == 1
    feature_set(model, woods, say=told.append)
    assert told[1].endswith("go to memory")


@pytest.mark.parametrize("where", ["ram", "disk"])
def test_what_passes_the_limit_is_computed_anew(model, woods, where, on_disk, computed, monkeypatch):
    monkeypatch.setattr(extract, "SHARD_IMAGES", 2)
    whole = feature_set(model, woods)
    size = sum(level.nbytes for image in list(whole.images)[:2] for level in image) + 2000  # a shard has a header
    with pytest.warns(UserWarning, match=r"limit of .* is reached; the features of 2 images are computed anew"):
        some = feature_set(model, woods, **on_disk | {"cache": where}, cache_limit=size)
    assert_same_bits(some, whole)


def test_a_damaged_image_beyond_the_limit_is_found_too(model, woods, monkeypatch):
    monkeypatch.setattr(extract, "SHARD_IMAGES", 2)
    (woods / "oak" / "1.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="limit"), pytest.raises(ValueError, match=r"oak/1\.png"):
        feature_set(model, woods, cache_limit=10)


def test_an_image_that_changes_under_our_hands_is_not_cached(model, woods, on_disk, monkeypatch):
    read = images.read_image

    def read_old(path, white_level):
        image = read(path, white_level)
        if path.name == "1.png":
            with replacing(path) as changed:  # other threads may be reading it
                Image.fromarray(np.full((32, 32, 3), 7, np.uint8)).save(changed)
        return image

    monkeypatch.setattr(extract, "read_image", read_old)
    with pytest.raises(ValueError, match=r"ash/1\.png: the file was changed while it was read"):
        feature_set(model, woods, **on_disk)


FILL = """
import os, pathlib, signal, sys, time
from hgad_fast import HGADConfig, HGADModel
from hgad_fast.features import extract

role, root, cache_dir, config, computed = sys.argv[1], *map(pathlib.Path, sys.argv[2:4]), *sys.argv[4:]
extract.SHARD_IMAGES = 2
model = HGADModel(HGADConfig.from_json(config))
original = extract._Extractor.features

def wait_for(times, who):
    while not os.path.exists(computed) or open(computed).read().count(who) < times:
        time.sleep(0.01)

def features(self, seen):
    with open(computed, "a") as file:
        print(role, file=file)
    if role == "other":
        wait_for(3, "victim")
    elif open(computed).read().count(role) == 3:
        wait_for(1, "other")
        os.kill(os.getpid(), signal.SIGKILL)  # in the middle of its second shard
    return original(self, seen)

extract._Extractor.features = features
if role == "other":
    wait_for(1, "victim")
extract.feature_set(model, root, cache="disk", cache_dir=cache_dir)
"""


def test_processes_share_the_work_and_one_that_is_killed_harms_none(model, tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    for i in range(12):
        folder = tmp_path / "woods" / ("ash", "oak")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        noise = generator.integers(0, 256, (32 + 8 * (i % 3), 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    log, kept = tmp_path / "computed", tmp_path / "cache"
    processes = {}
    for role in ("other", "victim"):
        arguments = [role, tmp_path / "woods", kept, model.config.to_json(), log]
        processes[role] = subprocess.Popen([sys.executable, "-c", FILL, *map(str, arguments)])
    try:
        assert processes["victim"].wait(600) == -signal.SIGKILL
        assert processes["other"].wait(600) == 0
    finally:
        for process in processes.values():
            process.kill()
    assert log.read_text().split().count("other") == 10  # all but the victim's first shard
    expected = feature_set(model, tmp_path / "woods")
    monkeypatch.setattr(extract, "read_image", lambda path, white_level: pytest.fail(f"{path} was decoded"))
    assert_same_bits(feature_set(model, tmp_path / "woods", cache="disk", cache_dir=kept), expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cache": "disc"}, "cache is 'disc'; allowed are 'ram', 'disk' and None"),
        ({"cache": "disk"}, "cache='disk' needs a folder"),
        ({"cache_dtype": "half"}, "cache_dtype is 'half'; allowed are 'float32', 'float16', 'bfloat16'"),
        ({"cache_limit": "lots"}, "'lots' is no size"),
    ],
)
def test_options_that_cannot_be_meant(options, message):
    with pytest.raises(ValueError, match=message):
        feature_set(featureless(), (levels(), [0, 1, 1]), **options)


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
        (levels(), [0, 1], "3 images and class ids"),
        (levels(), [0, 1, 2], "class ids run from 0 to 2; the model has n_classes=2"),
        (levels(), [-1, 0, 1], "class ids run from -1"),
        (levels()[:1], [0, 1, 1], "image 0 has features"),
        (levels()[::-1], [0, 1, 1], r"image 0 has features .*with C = \[5, 6\]"),
        ([levels()[0], levels(2)[1]], [0, 1, 1], "with one n; the shapes are"),
        (levels()[0], [0, 1, 1], "one .* tensor a level"),
        ([level[:, :, :0] for level in levels()], [0, 1, 1], "image 0 has features"),
    ],
)
def test_features_that_do_not_fit(given, ids, message):
    with pytest.raises(ValueError, match=message):
        feature_set(featureless(), (given, ids))


def test_images_of_another_type_are_refused():
    images = [[level[0] for level in levels()], [level[1].double() for level in levels()]]
    with pytest.raises(ValueError, match="image 1 has features .*float64.* float32"):
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


class OwnEncoder(torch.nn.Module):
    """Contrast to grey in cells of 8 and 16 pixels."""

    def normalize(self, images: Tensor) -> Tensor:
        return images - 0.5

    def forward(self, images: Tensor) -> list[Tensor]:
        return [F.avg_pool2d(images, cell, ceil_mode=True) for cell in (8, 16)]


@pytest.mark.filterwarnings("ignore:too few")
def test_an_encoder_of_the_users_own_trains_and_is_put_back_after_loading(woods, tmp_path_factory):
    model = featureless(feature_dims=(3, 3), img_size=64, meta_epochs=1, sub_epochs=1)
    model.encoder = OwnEncoder()
    with pytest.raises(ValueError, match="encoder of your own .* cache='ram'"):
        model.fit(woods, cache="disk", cache_dir=woods / "cache", progress=False)
    run = tmp_path_factory.mktemp("run")
    model.fit(woods, output_dir=run, progress=False)
    loaded = HGADModel.load(run / "model.safetensors")
    loaded.encoder = OwnEncoder()
    file = woods / "ash" / "0.png"
    assert torch.equal(loaded.score(file).anomaly_map, model.score(file).anomaly_map)


# the white level of 16-bit images


@pytest.fixture
def cameras(tmp_path) -> Path:
    """Images of 12 bits in 16-bit words."""
    generator = np.random.default_rng(0)
    for i in range(2):
        (tmp_path / "ash").mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 4096, (32, 48), dtype=np.uint16)).save(tmp_path / f"ash/{i}.png")
    return tmp_path


def seeing_white_at(model: HGADModel, level: int) -> HGADModel:
    other = copy.copy(model)
    other.config = model.config.replace(white_level=level, n_classes=1, class_names=("ash",))
    return other


def test_a_white_level_that_images_suggest_is_warned_of_before_it_is_set(model, cameras, monkeypatch):
    monkeypatch.setattr(images, "said", set())
    with pytest.warns(UserWarning) as caught:
        dark = feature_set(seeing_white_at(model, 65535), cameras, cache=None)
        dark.images[0]
    assert ["--set white_level=4095" in str(warning.message) for warning in caught] == [True]  # of single images none
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bright = feature_set(seeing_white_at(model, 4095), cameras, cache=None)
    pixels = torch.from_numpy(np.array(Image.open(cameras / "ash/0.png")).astype(np.float32))
    for features, level in ((dark, 65535), (bright, 4095)):
        expected = preprocess.image_features(model, (pixels / level).repeat(3, 1, 1))
        for actual, right in zip(features.images[0], expected, strict=True):
            assert actual.equal(right[0])


def test_features_of_another_white_level_are_not_taken_from_a_cache(model, cameras, tmp_path_factory):
    options = {"cache": "disk", "cache_dir": tmp_path_factory.mktemp("cache")}
    at_4095, at_5000 = seeing_white_at(model, 4095), seeing_white_at(model, 5000)
    first, second = feature_set(at_4095, cameras, **options), feature_set(at_5000, cameras, **options)
    again = feature_set(at_4095, cameras, **options)
    assert not first.images[0][0].equal(second.images[0][0])
    assert first.images[0][0].equal(again.images[0][0])


def test_values_above_the_white_level_are_listed(model, cameras):
    with pytest.raises(ValueError, match="2 of 2 images cannot be used") as error:
        feature_set(seeing_white_at(model, 1023), cameras)
    assert str(error.value).count("and white_level is 1023: is this another camera?") == 2
