"""Images too large for one go: memory, tiles, chunks and maps in files leave no trace in what is found."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from rounding import SAME_IN_FLOAT64

from hgad_fast import HGADConfig, HGADModel
from hgad_fast.features import backbone, preprocess
from hgad_fast.modules.flow import dense_position
from hgad_fast.scoring import maps, result
from hgad_fast.scoring.calibration import Calibration


def detector(arch: str = "test_resnet", **settings) -> HGADModel:
    """Return a model of images at their own resolution; its map has four pixels for a cell of the feature map."""
    settings = {"out_indices": (1,), "feature_levels": 2, "n_classes": 2, "img_size": 64, "msk_size": 64} | settings
    model = HGADModel(
        HGADConfig(
            backbone_arch=arch,
            backbone_weights=None,
            n_intra_centers=2,
            coupling_layers=2,
            pos_embed_dim=8,
            **settings,
        )
    )
    level_max = torch.zeros(model.config.n_classes, len(model.feat_dims))
    model.calibration = Calibration(level_max, torch.zeros(0), torch.zeros(0, dtype=torch.int64), img_size="native")
    return model


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Make tiles as small as the halo allows."""
    monkeypatch.setattr(backbone, "ALWAYS_WHOLE", 0)
    monkeypatch.setattr(preprocess, "ALWAYS_WHOLE", 0)
    monkeypatch.setattr(backbone, "TILE_MEMORY", 1)


def native(model: HGADModel, image, **options) -> result.ScoreResult:
    return model.score(image, img_size="native", **options)


def n_tiles(model: HGADModel, height: int, width: int) -> int:
    return max(len(one.rows) * len(one.columns) for one in model.encoder.passes(height, width))


def assert_close(values, expected):
    assert values.shape == expected.shape
    assert float((values - expected).abs().max()) <= SAME_IN_FLOAT64 * float(expected.abs().max())


# ------------------------------------------------------------------------------------------------ sizes and shapes


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1), (31, 2000), (5, 3), (97, 101), (333, 64), (401, 389)])
def test_images_of_any_size_have_the_map_of_the_whole(size):
    model, image = detector(), torch.rand(3, *size)
    tiled, whole = (native(model, image, tiles=tiles) for tiles in ("always", "never"))
    assert tiled.anomaly_map.shape == (1, *size) and tiled.anomaly_map.isfinite().all()
    assert n_tiles(model, *size) > 1 or min(size) < 100
    assert_close(tiled.anomaly_map, whole.anomaly_map)
    assert_close(tiled.image_score, whole.image_score)
    for map_size in ((7, 5), 300):
        resampled = native(model, image, map_size=map_size)
        assert resampled.anomaly_map.shape[1:] == (map_size if isinstance(map_size, tuple) else (300, 300))
        assert torch.equal(resampled.image_score, tiled.image_score)


def test_a_network_that_does_not_take_a_size_is_named():
    model = detector("hrnet_w18_small", out_indices=(2,), feature_levels=1)
    with pytest.raises(ValueError, match="hrnet_w18_small cannot take images of 67 x 61 pixels: .* Choose a backbone"):
        native(model, torch.rand(3, 67, 61))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("normalization", ["calibrated", "official"])
def test_several_stages_one_class_and_a_crop(normalization):
    model = detector(feature_mode="stages", out_indices=(0, 1, 2), feature_levels=3, n_classes=1)
    image = torch.rand(3, 353, 217)
    tiled, whole = (native(model, image, tiles=t, normalization=normalization) for t in ("always", "never"))
    assert n_tiles(model, 353, 217) > 1
    assert_close(tiled.anomaly_map, whole.anomaly_map)
    model.config = model.config.replace(center_crop=True)
    cropped = native(model, image, normalization=normalization).anomaly_map[0]
    alone = native(model, image[:, 68:285], normalization=normalization).anomaly_map[0]
    assert torch.equal(cropped[68:285], alone) and not cropped[:68].any() and not cropped[285:].any()
    small = native(model, image, normalization=normalization, map_size=(35, 22)).anomaly_map[0]
    assert small[7:28].all() and not small[:7].any() and not small[29:].any()


@pytest.mark.usefixtures("float64")
@torch.no_grad()
def test_the_position_of_a_tile_is_its_place_in_the_whole_map():
    model, image = detector(feature_levels=1), torch.rand(3, 353, 217)
    encoder = model.encoder
    assert n_tiles(model, 353, 217) > 1
    (actual,) = model.densities(encoder.feature_maps(image), torch.zeros(1, dtype=torch.int64)).logps
    (x,) = encoder(encoder.normalize(image[None]))
    _, channels, h, w = x.shape
    code = dense_position(model.nfs[0].grid(h, w))
    z, log_det = model.nfs[0](x.permute(0, 2, 3, 1).reshape(h * w, channels), code)
    density, _ = model.mixture.own_scores(z, log_det, 0, torch.zeros(1, dtype=torch.int64))
    assert_close(actual, density.view(1, h, w) / channels)


# ------------------------------------------------------------------------------------------------ memory


def test_max_memory_changes_no_bit():
    model, image = detector(), torch.rand(3, 401, 223)
    plain = native(model, image)
    needed = preprocess.working_set(model, model.config.replace(img_size="native"), (401, 223))
    for amount in (needed, "3GB", 10**15):
        result = native(model, image, max_memory=amount)
        for name in ("anomaly_map", "image_score", "class_id"):
            assert torch.equal(getattr(result, name), getattr(plain, name))
    with pytest.raises(ValueError, match="401 x 223 pixels .* takes about .* max_memory is .*: allow more, or choose"):
        native(model, image, max_memory=needed - 1)


def test_what_does_not_fit_is_refused_before_anything_is_computed(monkeypatch, tmp_path):
    model = detector()
    monkeypatch.setattr(type(model.encoder), "forward", None)
    monkeypatch.setattr(type(model.encoder), "feature_maps", None)
    images = [torch.rand(3, 32, 32), torch.rand(3, 4000, 4000)]
    with pytest.raises(ValueError, match="4000 x 4000 pixels .* max_memory is 400 MB"):
        native(model, images, max_memory="400MB", tiles="never")
    with pytest.raises(ValueError, match="4000 x 4000"):
        native(model, images[1], max_memory="400MB", tiles="never", map_path=tmp_path / "map.npy")
    assert not list(tmp_path.iterdir())


MEASURE = """
import torch
from hgad_fast import HGADConfig, HGADModel
from hgad_fast.bench.timing import peak_resident
from hgad_fast.features import preprocess
config = HGADConfig(n_classes=3, backbone_arch="tf_efficientnet_lite0", backbone_weights=None, img_size="native")
model = HGADModel(config)
model.score(torch.rand(3, 128, 128), normalization="official")
for size in ((1400, 1100), (1500, 2000)):
    image = torch.rand(3, *size)
    peak = peak_resident(lambda: model.score(image, 0, normalization="official", map_size=8))
    print(peak, preprocess.working_set(model, config, size, group_known=True))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is resident")
def test_what_is_resident_is_what_was_announced():
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        peak, announced = map(int, line.split())
        assert 0.5 * announced < peak <= announced


# ------------------------------------------------------------------------------------------------ maps in files


def test_a_map_in_a_file_is_the_map(tmp_path):
    model, image = detector(), torch.rand(3, 97, 141)
    path = tmp_path / "new" / "map.npy"
    for options in ({}, {"map_size": (50, 400)}, {"normalization": "official"}):
        written = native(model, image, map_path=path, **options)
        assert torch.equal(written.anomaly_map, native(model, image, **options).anomaly_map)
        assert [file.name for file in path.parent.iterdir()] == ["map.npy"]


def test_a_failure_leaves_the_earlier_map_alone(tmp_path, monkeypatch):
    model, path = detector(), tmp_path / "map.npy"
    before = native(model, torch.rand(3, 97, 141), map_path=path).anomaly_map.clone()
    content = path.read_bytes()

    def full(*arguments):
        raise OSError("no space left")

    for place, name in ((maps, "_band"), (HGADModel, "densities")):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
            patch.setattr(place, name, full)
            native(model, torch.rand(3, 97, 141), map_path=path)
        assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]
    assert before.shape == (1, 97, 141)


# ------------------------------------------------------------------------------------------------ the choice of tiles


def test_a_network_that_pools_over_the_whole_image_is_cut_only_for_want_of_memory(monkeypatch):
    monkeypatch.setattr(backbone, "TILE_MEMORY", 2e7)
    model, image = detector("mobilenetv3_small_050", out_indices=(2,), feature_levels=1), torch.rand(3, 1000, 3000)
    assert not model.encoder.is_local
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "there are no thresholds")
        whole = native(model, image, tiles="never")
        assert torch.equal(native(model, image).anomaly_map, whole.anomaly_map)
    enough = preprocess.working_set(model, model.config.replace(img_size="native"), (1000, 3000))
    for options in ({"max_memory": enough}, {"tiles": "always"}):
        with pytest.warns(UserWarning, match="looks at the whole image, so tiles .* tiles='never' and max_memory="):
            tiled = native(model, image, **options)
        assert not torch.equal(tiled.anomaly_map, whole.anomaly_map)
    with pytest.raises(ValueError, match="max_memory is"):
        native(model, image, max_memory=enough, tiles="never")


def test_a_local_network_is_cut_unless_told_otherwise(monkeypatch):
    model, image = detector(), torch.rand(3, 401, 223)
    seen = []
    pieces = type(model.encoder)._pieces
    monkeypatch.setattr(type(model.encoder), "_pieces", lambda self, *a: (seen.append(len(a[1])), pieces(self, *a))[1])
    auto = native(model, image)
    assert seen and torch.equal(auto.anomaly_map, native(model, image, tiles="always").anomaly_map)
    seen.clear()
    native(model, image, tiles="never")
    assert not seen
    with pytest.raises(ValueError, match="tiles is 'sometimes'; allowed are 'auto', 'always', 'never'"):
        native(model, image, tiles="sometimes")
