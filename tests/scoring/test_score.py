from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import rounding
import torch
from PIL import Image
from rounding import SAME_IN_FLOAT64
from scipy.ndimage import gaussian_filter, zoom
from scipy.special import logsumexp, softmax

from hgad_fast import HGADConfig, HGADModel, ops
from hgad_fast.data import images
from hgad_fast.features import preprocess
from hgad_fast.features.backbone import FeatureMaps
from hgad_fast.models import hgad
from hgad_fast.modules.flow import dense_position
from hgad_fast.scoring import densities, maps, score

SIZES = [(9, 13), (5, 7)]  # height and width of the feature maps of the two levels
VERDICTS = ("image_score", "class_id", "p_value", "is_anomalous", "threshold", "false_alarm_rate")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def detector(dims=(10, 7), n_classes=3, **settings) -> HGADModel:
    """A model on features, its parameters far from their initial values."""
    small = {"n_intra_centers": 3, "coupling_layers": 2, "pos_embed_dim": 8, "msk_size": 24}
    settings = small | {"fusion": "product"} | settings  # which the references here compute
    config = HGADConfig(
        n_classes=n_classes, backbone_arch=None, feature_dims=dims, feature_levels=len(dims), **settings
    )
    model = HGADModel(config)
    with torch.no_grad():
        for parameter in (*model.nfs.parameters(), *model.mixture.parameters()):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def random_features(count, dims=(10, 7), sizes=SIZES) -> list[torch.Tensor]:
    """Each image has an offset of its own, so that the images do not all take one class."""
    return [
        torch.randn(count, c, h, w) + 2 * torch.randn(count, c, 1, 1) for c, (h, w) in zip(dims, sizes, strict=True)
    ]


@pytest.fixture
def calibrated():
    model = detector()
    model.calibrate((random_features(12), [0, 1, 2] * 4), false_alarm_rate=0.25)
    return model


def definition(model, features):
    """Log-density / C of every class (B, h, w, K) and entropy (B, h, w) of each level, in float64, all N x K x M."""
    model = copy.deepcopy(model).double()
    levels = []
    for level, x in enumerate(features):
        batch, c, h, w = x.shape
        flow = model.nfs[level]
        grid = flow.grid(h, w)
        position = dense_position(grid, batch).double() if grid else None
        pixels = x.double().permute(0, 2, 3, 1).reshape(-1, c)
        z, log_det = (t.detach().numpy() for t in ops.flow_definition(pixels, flow.blocks, position))
        mu, delta, _, phi = (t.detach().numpy() for t in model.mixture.level(level))
        centres = np.concatenate([mu[:, None], mu[:, None] + delta], 1)
        distance = ((z[:, None, None] - centres) ** 2).sum(-1)
        log_w = phi - logsumexp(phi, 1, keepdims=True)
        density = (logsumexp(-distance / 2 + log_w, 2) + log_det[:, None] - c / 2 * math.log(2 * math.pi)) / c
        posterior = softmax(-distance[..., 0] / 2, 1)
        entropy = -np.where(posterior > 0, posterior * np.log(np.maximum(posterior, 1e-300)), 0).sum(1)
        levels.append((density.reshape(batch, h, w, -1), entropy.reshape(batch, h, w)))
    return levels


def enlarged(maps, size):
    """Bilinear, corners on corners."""
    for axis, n in zip((-2, -1), size, strict=True):
        at = np.linspace(0, maps.shape[axis] - 1, n)
        low = np.minimum(at.astype(int), max(maps.shape[axis] - 2, 0))
        high = np.minimum(low + 1, maps.shape[axis] - 1)
        share = (at - low).reshape((-1, 1) if axis == -2 else (-1,))
        maps = maps.take(low, axis) * (1 - share) + maps.take(high, axis) * share
    return maps


def official_factor(levels, size):
    """Section 5 of the procedure, for log-densities or negative entropies: one list (images) of maps a level."""
    top = [max(m.max() for m in images) for images in levels]
    total = sum(
        np.stack([enlarged(np.exp(m - t), (size, size)) for m in images]) for images, t in zip(levels, top, strict=True)
    )
    return np.stack([gaussian_filter(m, 4) for m in total.max() - total])


def calibrated_factor(levels, size):
    """Section 6: sum over the levels of 1 - exp(x), for x at most 0, (B, h, w) a level."""
    total = sum(enlarged(-np.expm1(np.minimum(x, 0)), size) for x in levels)
    return np.stack([gaussian_filter(m, 4) for m in total])


def of_class(density, ids):
    """(B, h, w) out of (B, h, w, K)."""
    return np.stack([d[..., k] for d, k in zip(density, ids, strict=True)])


def assert_close(values, expected):
    expected = np.asarray(expected)
    assert values.shape == expected.shape
    assert np.abs(np.asarray(values) - expected).max() <= SAME_IN_FLOAT64 * np.abs(expected).max()


# ------------------------------------------------------------------------------------------------ definitions


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("flow_arch", ["conditional_flow_model", "flow_model"])
def test_densities_and_the_inferred_class_are_the_definition(flow_arch):
    model, features = detector(flow_arch=flow_arch), random_features(6)
    levels = definition(model, features)
    evidence = sum(density.mean((1, 2)) for density, _ in levels)
    free = model.score_features(features, normalization="official")
    assert free.class_id.tolist() == evidence.argmax(1).tolist()
    assert len(set(free.class_id.tolist())) > 1  # or the comparison says little
    for ids in (free.class_id, torch.tensor([2, 2, 1, 1, 0, 0])):
        result = model.score_features(features, ids, "official")
        for actual, entropy, (density, h) in zip(result.logps, result.neg_entropy, levels, strict=True):
            assert_close(actual, of_class(density, ids.tolist()))
            assert_close(entropy, -h)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("sizes", [SIZES, [(8, 8), (4, 4)], [(1, 6), (1, 1)]])
def test_official_maps_are_the_published_procedure(sizes):
    model, features = detector(), random_features(4, sizes=sizes)
    levels = definition(model, features)
    expected = official_factor([d[..., 1] for d, _ in levels], 24) * official_factor([-h for _, h in levels], 24)
    result = model.score_features(features, 1, "official")
    assert_close(result.anomaly_map, expected)
    assert_close(result.image_score, expected.max((1, 2)))
    assert result.p_value.isnan().all() and result.threshold.isnan().all() and not result.is_anomalous.any()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("sizes, size", [(SIZES, (24, 35)), ([(6, 4), (3, 2)], (36, 24)), ([(1, 3), (1, 1)], (24, 72))])
def test_calibrated_maps_are_the_formula(sizes, size):
    model = detector()
    normal, ids = random_features(6, sizes=sizes), np.array([0, 1, 2, 0, 1, 2])
    with pytest.warns(UserWarning, match="too few"):
        model.calibrate((normal, ids.tolist()))
    top = [[density[ids == k][..., k].max() for k in range(3)] for density, _ in definition(model, normal)]
    features = random_features(4, sizes=sizes)
    result, levels = model.score_features(features), definition(model, features)
    ids = result.class_id.tolist()
    excess = [of_class(d - np.array(m), ids) for (d, _), m in zip(levels, top, strict=True)]
    expected = calibrated_factor(excess, size) * calibrated_factor([-h for _, h in levels], size)
    assert_close(result.anomaly_map, expected)
    assert_close(result.image_score, expected.max((1, 2)))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 40), (70, 33)])
def test_blur_is_scipys(shape):
    sharp = torch.rand(2, *shape, dtype=torch.float64)
    assert_close(maps.blur(sharp), np.stack([gaussian_filter(m, 4) for m in sharp.numpy()]))


@pytest.mark.usefixtures("float64")
def test_one_class_is_told_by_its_likelihood_alone():
    """Its posterior has no entropy, and the product of the two maps would be 0 everywhere."""
    model, normal, features = detector(n_classes=1), random_features(5), random_features(3)
    with pytest.warns(UserWarning, match="too few"):
        model.calibrate((normal, [0] * 5))
    logps = [d[..., 0] for d, _ in definition(model, features)]
    excess = [x - d.max() for x, (d, _) in zip(logps, definition(model, normal), strict=True)]
    assert_close(model.score_features(features).anomaly_map, calibrated_factor(excess, (24, 35)))
    assert_close(model.score_features(features, 0, "official").anomaly_map, official_factor(logps, 24))


@pytest.mark.usefixtures("float64")
@torch.no_grad()
def test_an_almost_certain_class_leaves_a_map():
    """exp(-H) rounds to 1 long before H is 0; the difference must not."""
    model, ids = detector(dims=(10,), coupling_layers=1), [0, 1, 2] * 3
    centres = 8 * torch.eye(3, 10)
    model.mixture.mus[0].copy_(centres)
    goal = centres[ids].repeat_interleave(9 * 13, 0) + 0.3 * torch.randn(9 * 9 * 13, 10)
    flow = model.nfs[0]
    features, _ = flow(goal, dense_position(flow.grid(9, 13), 9), rev=True)
    features = [features.view(9, 9, 13, 10).permute(0, 3, 1, 2)]
    with pytest.warns(UserWarning, match="too few"):
        model.calibrate((features, ids))
    ((density, entropy),) = definition(model, features)
    assert entropy.max() < 1e-9
    excess = of_class(density, ids)
    for k in range(3):
        excess[k::3] -= excess[k::3].max()
    expected = calibrated_factor([excess], (24, 35)) * calibrated_factor([-entropy], (24, 35))
    assert_close(model.score_features(features).anomaly_map, expected)


@pytest.mark.parametrize("normalization", ["calibrated", "official"])
def test_scores_in_float32_are_within_their_rounding(calibrated, normalization):
    def scores(model: HGADModel, features: list[torch.Tensor]) -> tuple:
        result = model.score_features(features, torch.tensor([0, 1, 2]), normalization)
        return result.logps, result.neg_entropy, result.anomaly_map, result.image_score

    features = random_features(3)
    rounding.assert_close(scores(calibrated, features), scores, calibrated, features)


# ------------------------------------------------------------------------------------------------ the image alone


def assert_same_bits(result, other, rows):
    for name in ("anomaly_map", *VERDICTS):
        assert torch.equal(getattr(result, name)[rows], getattr(other, name)), name
    for name in ("logps", "neg_entropy"):
        for level, other_level in zip(getattr(result, name) or [], getattr(other, name) or [], strict=True):
            assert torch.equal(level[rows], other_level), name


@pytest.mark.parametrize("threads, ids", [(1, None), (1, torch.tensor([2, 0, 0, 1])), (2, None)])
def test_features_alone_in_a_batch_and_in_any_order_have_the_same_bits(calibrated, threads, ids):
    torch.set_num_threads(threads)
    features = random_features(4)
    together = calibrated.score_features(features, ids)
    order = torch.tensor([3, 0, 2, 1])
    shuffled = [x[order].contiguous(memory_format=torch.channels_last) for x in features]
    assert_same_bits(together, calibrated.score_features(shuffled, None if ids is None else ids[order]), order)
    for i in range(4):
        alone = calibrated.score_features([x[i : i + 1] for x in features], None if ids is None else int(ids[i]))
        assert_same_bits(together, alone, slice(i, i + 1))


@pytest.mark.usefixtures("float64")
def test_throughput_agrees(calibrated):
    features = random_features(5)
    one, many = calibrated.score_features(features), calibrated.score_features(features, throughput=True)
    assert_close(many.anomaly_map, one.anomaly_map)
    assert_close(many.image_score, one.image_score)
    assert torch.equal(many.class_id, one.class_id)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("chunk", [1, 20, 40, 100])
@pytest.mark.parametrize("flow_arch", ["conditional_flow_model", "flow_model"])
def test_chunks_of_rows_leave_no_seam(monkeypatch, chunk, flow_arch):
    model = detector(flow_arch=flow_arch)
    model.calibrate((random_features(6), [0, 1, 2] * 2), false_alarm_rate=0.5)
    features = random_features(3)
    whole = model.score_features(features)
    monkeypatch.setattr(hgad, "chunk_pixels", lambda *_, **__: chunk)
    chunks = model.score_features(features)
    for name in ("logps", "neg_entropy"):
        for actual, expected in zip(getattr(chunks, name), getattr(whole, name), strict=True):
            assert_close(actual, expected)
    assert (chunks.anomaly_map - whole.anomaly_map).abs().max() < SAME_IN_FLOAT64
    alone = model.score_features([x[2:] for x in features])
    assert_same_bits(chunks, alone, slice(2, 3))
    batched = model.score_features(features, throughput=True)
    assert (batched.anomaly_map - whole.anomaly_map).abs().max() < SAME_IN_FLOAT64


@pytest.mark.usefixtures("float64")
def test_map_size_only_resamples(calibrated):
    features = random_features(3)
    plain = calibrated.score_features(features)
    for size in (50, (20, 70)):
        result = calibrated.score_features(features, map_size=size)
        height, width = (size, size) if isinstance(size, int) else size
        factors = height / 24, width / 35
        expected = [zoom(m, factors, order=1, mode="nearest", grid_mode=True) for m in plain.anomaly_map.numpy()]
        assert_close(result.anomaly_map, np.stack(expected))
        for name in VERDICTS:
            assert torch.equal(getattr(result, name), getattr(plain, name))


# ------------------------------------------------------------------------------------------------ in bounded memory


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("chunk", [64, 100, 8192])
def test_chunks_have_one_size_and_fit_together(monkeypatch, chunk):
    """Also where a row of pixels is longer than a chunk."""
    model, features = detector(dims=(6,)), random_features(1, (6,), [(5, 333)])
    whole = model.score_features(features, normalization="official")
    monkeypatch.setattr(hgad, "chunk_pixels", lambda *_, **__: chunk)
    rows = []
    flow = type(model.nfs[0]).forward
    monkeypatch.setattr(type(model.nfs[0]), "forward", lambda self, x, *a: (rows.append(len(x)), flow(self, x, *a))[1])
    chunks = model.score_features(features, normalization="official")
    assert len(set(rows)) == 1 and rows[0] <= max(chunk, 64)
    for name in ("logps", "neg_entropy"):
        assert frobenius(getattr(chunks, name)[0], getattr(whole, name)[0]) < SAME_IN_FLOAT64


def frobenius(actual, expected) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.usefixtures("float64")
def test_a_piece_of_a_map_has_the_position_that_it_has_in_the_whole(calibrated):
    features = random_features(1)
    (whole,) = densities.densities(calibrated, features, None)

    def pieces():
        for level, x in enumerate(features):
            for a, b, c, d in [(0, 3, 0, 5), (0, 3, 5, x.shape[3]), (3, x.shape[2], 0, x.shape[3])]:
                yield level, a, c, x[:, :, a:b, c:d]

    pieces = calibrated.densities(FeatureMaps(1, SIZES, pieces), None)
    assert torch.equal(pieces.group_ids, whole.group_ids)
    for name in ("logps", "neg_entropy"):
        for actual, expected in zip(getattr(pieces, name), getattr(whole, name), strict=True):
            assert frobenius(actual, expected) < SAME_IN_FLOAT64


def test_an_inferred_class_has_the_bits_of_a_given_one(calibrated, monkeypatch):
    """No matter if the densities of all classes are kept until it is known, or the pixels are scored again."""
    features = random_features(3)
    kept = calibrated.score_features(features)
    assert_same_bits(kept, calibrated.score_features(features, kept.class_id), slice(None))
    monkeypatch.setattr(hgad, "MAX_KEPT", 0)
    assert_same_bits(kept, calibrated.score_features(features), slice(None))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("size", [(24, 35), (7, 90), (61, 24), (24, 24)])
def test_bands_of_a_map_fit_together(calibrated, monkeypatch, size):
    monkeypatch.setattr(maps, "SMALL_MAP", 0)
    (actual,) = densities.densities(calibrated, random_features(1), None)
    level_max = calibrated.calibration.level_max
    for grid in [(24, 35), (35, 24), (24, 24)]:
        whole, bands = torch.empty(2, 1, *size)
        monkeypatch.setattr(maps, "BAND_PIXELS", 2**20)
        expected = maps.write_calibrated(whole, actual, level_max, grid)
        for pixels in (1, 50, 100):
            monkeypatch.setattr(maps, "BAND_PIXELS", pixels)
            maxima = maps.write_calibrated(bands.fill_(math.nan), actual, level_max, grid)
            assert torch.equal(maxima, expected) and torch.equal(bands, whole)
        on_grid = torch.empty(1, *grid)
        maps.write_calibrated(on_grid, actual, level_max, grid)
        assert torch.equal(maxima, on_grid.amax((1, 2)))
        assert frobenius(whole, maps.resample(on_grid, size)) < SAME_IN_FLOAT64


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("grid", [(24, 24), (24, 35), (41, 24), (3, 5)])
def test_small_maps_are_the_same_by_products_of_matrices(calibrated, monkeypatch, grid):
    (actual,) = densities.densities(calibrated, random_features(1), None)
    level_max = calibrated.calibration.level_max
    by_products, step_by_step = torch.empty(2, 1, *grid)
    maps.write_calibrated(by_products, actual, level_max, grid)
    monkeypatch.setattr(maps, "SMALL_MAP", 0)
    maps.write_calibrated(step_by_step, actual, level_max, grid)
    assert frobenius(by_products, step_by_step) < SAME_IN_FLOAT64


# ------------------------------------------------------------------------------------------------ images


@pytest.fixture(scope="module")
def camera():
    """A model on images: a small random backbone, a prior that knows grey images."""
    model = image_model()
    prime(model)
    return model


@pytest.fixture
def double_camera(float64):
    model = image_model()
    prime(model)
    return model.double()


def image_model(**settings) -> HGADModel:
    settings = {"n_classes": 2, "n_intra_centers": 1, "feature_levels": 2} | settings
    return HGADModel(
        HGADConfig(
            backbone_arch="test_efficientnet",
            backbone_weights=None,
            out_indices=(1,),
            coupling_layers=1,
            pos_embed_dim=8,
            img_size=64,
            msk_size=64,
            batch_size=2,
            **settings,
        )
    )


def grey_image(height, width) -> torch.Tensor:
    return (0.5 + 0.02 * torch.randn(3, height, width)).clamp(0, 1)


@torch.no_grad()
def prime(model) -> None:
    """Put the first centre of each level where grey images come to lie, and calibrate."""
    generator = torch.Generator().manual_seed(1)
    images = [(0.5 + 0.02 * torch.randn(3, 64, 64, generator=generator)).clamp(0, 1) for _ in range(8)]
    levels = [torch.cat(level) for level in zip(*(preprocess.image_features(model, p) for p in images), strict=True)]
    for level, x in enumerate(levels):
        batch, c, h, w = x.shape
        z, _ = model.nfs[level](x.permute(0, 2, 3, 1).reshape(-1, c), model.nfs[level].grid(h, w))
        model.mixture.mus[level].add_(z.mean(0))
    ids = [i % model.config.n_classes for i in range(8)]
    model.calibrate((levels, ids), false_alarm_rate=0.5)


def test_images_alone_in_a_batch_and_in_any_order_have_the_same_bits(camera):
    images = torch.rand(3, 3, 70, 90)
    together = camera.score(images)
    assert together.anomaly_map.shape == (3, 70, 90)
    order = [2, 0, 1]
    assert_same_bits(together, camera.score(images[order]), order)
    for i in range(3):
        assert_same_bits(together, camera.score(images[i]), slice(i, i + 1))
        given = camera.score(images, [1, 0, 1])
        assert_same_bits(given, camera.score(images[i], [1, 0, 1][i]), slice(i, i + 1))


def test_images_in_batches_have_the_maps_of_images_alone(double_camera):
    images = torch.rand(3, 3, 70, 90)
    alone, fast = (double_camera.score(images, throughput=throughput) for throughput in (False, True))
    assert_close(fast.anomaly_map, alone.anomaly_map)


@pytest.mark.filterwarnings("ignore:images are seen at")
def test_batches_keep_to_the_memory_allowed(double_camera, monkeypatch):
    """As many images as fit share a batch; those that are cut into tiles go one by one."""
    for module in (preprocess, score):
        monkeypatch.setattr(module, "ALWAYS_WHOLE", 80 * 80)
    sizes = [(70, 90), (70, 90), (100, 100), (70, 90), (100, 100)]
    images = [torch.rand(3, *size) for size in sizes]
    config = double_camera.config.replace(batch_size=8)
    monkeypatch.setattr(double_camera, "config", config)
    needed = preprocess.working_set(double_camera, config.replace(img_size="native"), sizes[0], cut=False)
    batches, look = [], preprocess.batch_features
    monkeypatch.setattr(
        score, "batch_features", lambda model, some, config: batches.append(len(some)) or look(model, some, config)
    )
    alone = double_camera.score(images, img_size="native")
    for limit, expected in ((2 * needed, [2]), (3 * needed, [3]), (needed + 2**20, [])):
        batches.clear()
        fast = double_camera.score(images, img_size="native", throughput=True, max_memory=limit)
        assert batches == expected
        assert_close(fast.image_score, alone.image_score)
        for actual, right in zip(fast.anomaly_map, alone.anomaly_map, strict=True):
            assert_close(actual, right)


def test_every_kind_of_input_gives_the_same(camera, tmp_path):
    pixels = np.random.randint(0, 256, (2, 40, 56, 3), np.uint8)
    paths = [tmp_path / f"{name}.png" for name in "ab"]
    for array, path in zip(pixels, paths, strict=True):
        Image.fromarray(array).save(path)
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    expected = camera.score(tensor)
    kinds = [
        pixels,
        pixels.astype(np.float32) / 255,
        (pixels.astype(np.uint16) * 257),
        list(pixels),
        tensor.double(),
        [Image.fromarray(array) for array in pixels],
        paths,
        [str(path) for path in paths],
        tmp_path,
        str(tmp_path),
        [tensor[0], paths[1]],
        (image for image in tensor),
        [tensor[:1], tensor[1:]],
    ]
    for kind in kinds:
        assert_same_bits(expected, camera.score(kind), slice(None))
    assert_same_bits(expected, camera.score(pixels[1]), slice(1, 2))
    assert_same_bits(expected, camera.score(paths[0]), slice(0, 1))

    grey = np.random.randint(0, 65536, (40, 56), np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert_same_bits(camera.score(grey), camera.score(tmp_path / "grey.png"), slice(None))


@pytest.mark.parametrize("throughput", [False, True])
def test_images_of_mixed_sizes(double_camera, throughput):
    images = [torch.rand(3, *size) for size in [(40, 40), (30, 50), (40, 40), (64, 33), (40, 40)]]
    result = double_camera.score(images, [0, 1, 1, 0, 1], throughput=throughput)
    assert result.class_id.tolist() == [0, 1, 1, 0, 1]
    for i, image in enumerate(images):
        alone = double_camera.score(image, int(result.class_id[i]))
        assert_close(result.anomaly_map[i], alone.anomaly_map[0])
        assert_close(result.image_score[i], alone.image_score[0])
    assert double_camera.score(images, map_size=20, throughput=throughput).anomaly_map.shape == (5, 20, 20)


def test_official_maps_of_images_of_mixed_sizes(double_camera):
    images = [torch.rand(3, *size) for size in [(40, 40), (64, 96)]]
    single = [double_camera.score_features(preprocess.image_features(double_camera, p), 1, "official") for p in images]
    logps, neg_entropy = (
        [[getattr(r, name)[level][0].numpy() for r in single] for level in range(2)]
        for name in ("logps", "neg_entropy")
    )
    expected = official_factor(logps, 64) * official_factor(neg_entropy, 64)
    result = double_camera.score(images, 1, normalization="official")
    assert_close(result.image_score, expected.max((1, 2)))
    assert_close(result.anomaly_map[0], zoom(expected[0], 40 / 64, order=1, mode="nearest", grid_mode=True))


def test_image_score_does_not_depend_on_map_size(camera):
    image = torch.rand(3, 50, 80)
    plain = camera.score(image)
    for size in (7, (100, 30)):
        result = camera.score(image, map_size=size)
        for name in VERDICTS:
            assert torch.equal(getattr(result, name), getattr(plain, name))
        assert result.anomaly_map.shape[1:] == ((size, size) if isinstance(size, int) else size)


class MeanColours(torch.nn.Module):
    """An encoder that sees where things are: contrast to grey, averaged over cells of 4 and 8 pixels."""

    def normalize(self, images):
        return (images - 0.5) * 20

    def forward(self, images):
        return [torch.nn.functional.avg_pool2d(images, stride, ceil_mode=True) for stride in (4, 8)]


@pytest.fixture(scope="module")
def spotter():
    """One class; whole images, or (`config.center_crop`) the official crop."""
    model = detector((3, 3), n_classes=1, img_size=64, msk_size=64, n_intra_centers=1)
    model.encoder = MeanColours()
    prime(model)
    return model


def with_blob(image, top, left):
    """A bright square, a fifth of the short side, its top left corner at these shares of height and width."""
    height, width = image.shape[1:]
    side = min(height, width) // 5
    y, x = round(top * height), round(left * width)
    image = image.clone()
    image[:, y : y + side, x : x + side] = 1.0
    return image, (y + side / 2, x + side / 2)


@pytest.mark.parametrize("size", [(320, 427), (600, 250), (250, 600)])
@pytest.mark.parametrize("place", [(0.15, 0.1), (0.45, 0.7), (0.7, 0.4)])
def test_a_defect_shows_where_it_is(spotter, size, place):
    clean = grey_image(*size)
    image, (y, x) = with_blob(clean, *place)
    actual, before = spotter.score(image), spotter.score(clean)
    assert actual.image_score > before.image_score
    assert actual.anomaly_map.shape == (1, *size)
    assert math.dist(peak(actual.anomaly_map - before.anomaly_map), (y, x)) < 0.1 * min(size)
    actual, before = (spotter.score(p, map_size=(100, 200)) for p in (image, clean))
    row, column = peak(actual.anomaly_map - before.anomaly_map)
    assert math.dist((row / 100 * size[0], column / 200 * size[1]), (y, x)) < 0.1 * min(size)


def peak(maps):
    """Row and column of the largest value of (1, h, w)."""
    return divmod(int(maps.argmax()), maps.shape[2])


@pytest.fixture
def cropping(spotter, monkeypatch):
    monkeypatch.setattr(spotter, "config", spotter.config.replace(center_crop=True))
    return spotter


@pytest.mark.parametrize("size", [(320, 427), (600, 250), (250, 250)])
def test_the_centre_crop_lies_where_it_was_cut(cropping, size):
    (h, w), top, left = images.centre_crop_geometry(*size, 64)
    rows = slice(round(top * size[0] / h), round((top + 64) * size[0] / h))
    columns = slice(round(left * size[1] / w), round((left + 64) * size[1] / w))
    clean = grey_image(*size)
    image, (y, x) = with_blob(clean, 0.45, 0.45)
    anomaly_map = cropping.score(image).anomaly_map[0]
    inside = torch.zeros(size, dtype=torch.bool)
    inside[rows, columns] = True
    assert (anomaly_map[~inside] == 0).all() and (anomaly_map[inside] > 0).all()
    assert math.dist(peak(anomaly_map[None] - cropping.score(clean).anomaly_map), (y, x)) < 0.1 * min(size)


def test_what_the_crop_leaves_out_does_not_count(cropping):
    image = grey_image(250, 600)
    assert_same_bits(cropping.score(image), cropping.score(with_blob(image, 0.5, 0.02)[0]), slice(None))


@pytest.mark.parametrize("size", [(320, 427), (600, 250), (1, 41), (33, 1), (64, 64)])
def test_maps_are_laid_out_in_the_coordinates_of_the_image(spotter, size):
    """A map whose values are positions in the image comes back as those positions."""
    for center_crop in (False, True):
        config = spotter.config.replace(center_crop=center_crop)
        (h, w), top, left = images.centre_crop_geometry(*size, 64) if center_crop else (size, 0, 0)
        seen = (64, 64) if center_crop else size
        for axis in (0, 1):
            at = ((top, left)[axis] + (np.arange(32) + 0.5) / 32 * seen[axis]) * size[axis] / (h, w)[axis]
            positions = np.broadcast_to(at[:, None] if axis == 0 else at, (32, 32))
            positions = torch.from_numpy(positions.astype(np.float32))
            laid = maps.lay(maps.resampled_fill(positions), size, config, None).numpy()
            assert laid.shape == size
            expected = np.indices(size)[axis] + 0.5
            inside = laid > 0
            extent = min(size) if center_crop else size[axis]
            # the outermost half pixel of the map is held constant; a crop is cut at whole pixels
            assert inside.any() and np.abs(laid - expected)[inside].max() <= 0.5 * extent / 32 + 1


@pytest.mark.parametrize("size", [(320, 427), (600, 250), (64, 64), (1, 41), (2000, 3)])
def test_an_image_may_be_seen_as_a_square(spotter, size, monkeypatch):
    """It has the score of the image that was stretched to the square before, and the map stretched back."""
    image = grey_image(*size) if min(size) > 3 else torch.rand(3, *size)
    stretched = images.resize_image(image, (64, 64))
    expected = spotter.score(stretched)
    monkeypatch.setattr(HGADConfig, "square", True)
    actual = spotter.score(image)
    assert actual.image_score.equal(expected.image_score) and actual.anomaly_map.shape == (1, *size)
    assert spotter.score(image, map_size="seen").anomaly_map.equal(
        spotter.score(stretched, map_size="seen").anomaly_map
    )
    assert spotter.score(image, map_size=(50, 70)).anomaly_map.equal(
        spotter.score(stretched, map_size=(50, 70)).anomaly_map
    )
    if size == (1, 41):  # one will do: it takes long
        several = spotter.score([image, image], throughput=True)
        rounding.assert_close(several.image_score[:1], lambda model: model.score(image).image_score, spotter)
    monkeypatch.setattr(spotter, "config", spotter.config.replace(center_crop=True))
    cropped = spotter.score(image)  # the centre crop takes precedence
    monkeypatch.setattr(HGADConfig, "square", False)
    assert cropped.anomaly_map.equal(spotter.score(image).anomaly_map)


def test_thin_images(spotter, cropping):
    for center_crop in (False, True):
        cropping.config = cropping.config.replace(center_crop=center_crop)
        for size in [(1, 1), (1, 41), (40, 1), (4, 400)]:
            result = spotter.score(torch.rand(3, *size))
            assert result.anomaly_map.shape == (1, *size)
            assert result.anomaly_map.isfinite().all() and result.anomaly_map.max() > 0


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "images, message",
    [
        (torch.full((3, 8, 8), 1.5), r"run from 1.5 to 1.5; .*\[0, 1\]"),
        (torch.zeros(0, 3, 8, 8), "no images"),
        (np.zeros((3, 8, 8)), r"shape \(3, 8, 8\); expected"),
        ([], "no images"),
        ("no such file.png", "no such file.png"),
        ([torch.zeros(3, 8, 8), None], "cannot score a NoneType"),
    ],
)
def test_what_is_no_image_is_named(camera, images, message):
    with pytest.raises(ValueError, match=message):
        camera.score(images)


def test_16_bit_images_are_divided_by_the_white_level(camera, tmp_path, monkeypatch):
    pixels = np.random.randint(0, 4096, (40, 56), np.uint16)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = camera.score(torch.from_numpy(pixels.astype(np.float32) / np.float32(4095)).expand(3, -1, -1))
    monkeypatch.setattr(camera, "config", camera.config.replace(white_level=4095))
    camera.save(tmp_path / "model.safetensors")
    for model in (camera, HGADModel.load(tmp_path / "model.safetensors")):
        for form in (pixels, tmp_path / "a.png"):
            assert_same_bits(expected, model.score(form), slice(None))
        with pytest.raises(ValueError, match="values reach 5000, and white_level is 4095"):
            model.score(pixels.clip(5000, 5000))


def test_empty_folder(camera, tmp_path):
    with pytest.raises(ValueError, match="no images"):
        camera.score(tmp_path)


@pytest.mark.parametrize(
    "ids, message",
    [
        ("chair", "class 'chair' is unknown; the model knows class 0, class 1, class 2 "),
        (3, "class 3 is unknown"),
        (-1, "class -1 is unknown"),
        ([0, "class 7"], "class 'class 7' is unknown"),
        ([0, 1.5], "class 1.5 is unknown"),
        (1.5, "class 1.5 is unknown"),
        ([0, None], "class None is unknown"),
        ([0, 1, 2], "3 class ids for 2 images"),
        ([], "0 class ids for 2 images"),
    ],
)
def test_class_ids_that_do_not_fit(calibrated, ids, message):
    with pytest.raises(ValueError, match=message):
        calibrated.score_features(random_features(2), ids)


@pytest.mark.parametrize(
    "ids",
    [1, "class 1", np.int64(1), torch.tensor(1), [1, 1], ["class 1", 1], np.array([1, 1]), torch.tensor([1, 1]),
     [np.int64(1), torch.tensor(1)], np.array(["class 1", "class 1"])],
    ids=repr,
)  # fmt: skip
def test_class_ids_in_every_form(calibrated, ids):
    assert calibrated.score_features(random_features(2), ids).class_id.tolist() == [1, 1]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x[:1], "list of 2 tensors"),
        (lambda x: x[0], "list of 2 tensors"),
        (lambda x: [x[0], x[1][:, :5]], r"features\[1\] has shape .*\(B, 7, h, w\)"),
        (lambda x: [x[0], x[1][:1]], r"features\[1\] has shape \(1, 7"),
        (lambda x: [x[0][:0], x[1][:0]], r"features\[0\] has shape \(0, 10"),
        (lambda x: [x[0][0], x[1][0]], r"features\[0\] has shape \(10, 9, 13\)"),
        (lambda x: [x[0], x[1] / 0], r"features\[1\] holds a NaN or an infinity"),
    ],
)
def test_features_that_do_not_fit(calibrated, change, message):
    with pytest.raises(ValueError, match=message):
        calibrated.score_features(change(random_features(2)))


@pytest.mark.parametrize("size", [0, -3, (0, 5), (5,), (5, 6, 7), 2.5, "big"])
def test_map_sizes_that_cannot_be(calibrated, camera, size):
    with pytest.raises(ValueError, match="map_size is"):
        calibrated.score_features(random_features(1), map_size=size)
    with pytest.raises(ValueError, match="map_size is"):
        camera.score(torch.rand(3, 8, 8), map_size=size)


def test_without_calibration_only_the_official_protocol():
    model, features = detector(), random_features(2)
    with pytest.raises(ValueError, match="no normalisation constants: train it with fit, call calibrate"):
        model.score_features(features)
    with pytest.raises(ValueError, match="no normalisation constants"):
        model.score(torch.rand(3, 8, 8))
    assert model.score_features(features, 0, "official").image_score.isfinite().all()
    with pytest.raises(ValueError, match="normalization is 'none'"):
        model.score_features(features, normalization="none")


def test_a_model_without_backbone_says_so(calibrated):
    with pytest.raises(ValueError, match="no backbone"):
        calibrated.score(torch.rand(3, 8, 8))
