from __future__ import annotations

import copy
import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.metrics import auc, roc_auc_score

from hgad_fast import HGADConfig, HGADModel
from hgad_fast.data import datasets, images
from hgad_fast.data.masks import read_mask
from hgad_fast.evaluation import metrics
from hgad_fast.evaluation.evaluate import FIGURES, BestCheckpoint, Evaluation, evaluate
from hgad_fast.features import preprocess
from hgad_fast.models.detector import Detector

NAMES = ("washer", "bolt", "nut", "screw")  # of the model; the dataset has three of them, in another order
SIZES = [(48, 48), (40, 60), (70, 48)]  # height and width of the images of each class
MSK = 24


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three classes: one whole, one with a defect that has no mask, one without defects."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)

    def image(k, i, defect=None):
        h, w = SIZES[i % 3]
        array = rng.integers(60 * k, 60 * k + 70, (h, w, 3)).astype(np.uint8)
        mask = np.zeros((h, w), np.uint8)
        if defect:
            mask[h // 4 : h // 2, w // 3 : w // 2 + i] = 255
            array[mask > 0] = rng.integers(0, 256, (int((mask > 0).sum()), 3))
        return array, mask

    for k, name in enumerate(("bolt", "nut", "washer")):
        for i in range(3):
            write(root / name / "train" / "good" / f"{i}.png", image(k, i)[0])
            write(root / name / "test" / "good" / f"{i}.png", image(k, i)[0])
        for i in range(3) if name != "washer" else ():
            array, mask = image(k, i, "hole")
            write(root / name / "test" / "hole" / f"{i}.png", array)
            if not (name == "nut" and i == 1):
                write(root / name / "ground_truth" / "hole" / f"{i}_mask.png", mask)
    return root


@pytest.fixture(scope="module")
def model(root):
    model = HGADModel(
        HGADConfig(
            n_classes=4,
            class_names=NAMES,
            n_intra_centers=2,
            backbone_arch="test_efficientnet",
            backbone_weights=None,
            out_indices=(1,),
            feature_levels=2,
            coupling_layers=1,
            pos_embed_dim=8,
            img_size=64,
            msk_size=MSK,
        )
    )
    good = [images.read_image(s.path) for s in datasets.discover(root).train if s.path.stem != "1"]
    crops = [image[:, :40, :40] for image in good] + [torch.rand(3, 40, 40) for _ in range(3)]
    levels = [torch.cat(level) for level in zip(*(preprocess.image_features(model, p) for p in crops), strict=True)]
    ids = torch.tensor([1, 1, 2, 2, 0, 0, 3, 3, 3])
    with torch.no_grad():  # bolts and nuts are known; a washer is taken for one of them
        for level, x in enumerate(levels):
            n, c, h, w = x.shape
            z, _ = model.nfs[level](x.permute(0, 2, 3, 1).reshape(-1, c), model.nfs[level].grid(h, w))
            by_image = z.view(n, h * w, c).mean(1)
            model.mixture.mu_deltas[level].mul_(0.01)
            model.mixture.mus[level].mul_(0.1).add_(by_image[ids == 2].mean(0))
            for k in (1, 2):
                model.mixture.mus[level][k] = by_image[ids == k].mean(0)
    with pytest.warns(UserWarning, match="too few"):
        model.calibrate((levels, ids), false_alarm_rate=0.3)
    return model


def by_hand(model, root, center_crop=False):
    """Both protocols, class by class, from densities, with NumPy, SciPy, Pillow and scikit-learn."""
    figures, right, flagged = {"official": {}, "honest": {}}, [], {False: [], True: []}
    samples = datasets.discover(root).test
    for k, name in enumerate(datasets.discover(root).class_names):
        mine = [sample for sample in samples if sample.class_id == k]
        features = [preprocess.image_features(model, images.read_image(sample.path)) for sample in mine]
        given = [model.score_features(f, NAMES.index(name), "official") for f in features]
        factors = []
        for kind in ("logps", "neg_entropy"):
            total = 0
            for level in range(2):
                maps = [getattr(result, kind)[level] for result in given]
                top = max(m.max() for m in maps)
                larger = [
                    torch.nn.functional.interpolate(
                        (m - top).exp()[None], (MSK, MSK), mode="bilinear", align_corners=True
                    )[0, 0]
                    for m in maps
                ]
                total = total + torch.stack(larger).double().numpy()
            factors.append(np.stack([gaussian_filter(m, 4) for m in total.max() - total]))
        free = [model.score_features(f) for f in features]
        right += [int(result.class_id) == NAMES.index(name) for result in free]
        for sample, result in zip(mine, free, strict=True):
            flagged[sample.is_anomalous].append(bool(result.is_anomalous))
        protocols = {
            "official": list(factors[0] * factors[1]),
            "honest": [result.anomaly_map[0].numpy() for result in free],
        }
        labels = [sample.is_anomalous for sample in mine]
        for protocol, maps in protocols.items():
            pixels = []
            for sample, m in zip(mine, maps, strict=True):
                if sample.is_anomalous and sample.mask is None:
                    continue
                mask = np.zeros(m.shape, bool)
                if sample.mask is not None:
                    drawn = Image.open(sample.mask)
                    w, h = drawn.size
                    short = min(w, h)
                    if center_crop:
                        drawn = drawn.resize((64 * w // short, 64 * h // short), Image.Resampling.NEAREST)
                        left, top = round((drawn.width - 64) / 2), round((drawn.height - 64) / 2)
                        drawn = drawn.crop((left, top, left + 64, top + 64))
                    else:
                        drawn = drawn.resize((round(64 * w / short), round(64 * h / short)), Image.Resampling.NEAREST)
                    mask = np.array(drawn.resize(m.shape[::-1], Image.Resampling.NEAREST)) > 0
                pixels.append((mask.ravel(), m.ravel()))
            if any(labels):
                truth, values = (np.concatenate(part) for part in zip(*pixels, strict=True))
                figures[protocol][name] = (
                    roc_auc_score(labels, [m.max() for m in maps]),
                    roc_auc_score(truth, values),
                )
            else:
                figures[protocol][name] = (math.nan, math.nan)
    return figures, right, flagged


@pytest.mark.parametrize("center_crop", [False, True])
def test_both_protocols_equal_an_independent_computation(model, root, monkeypatch, center_crop):
    monkeypatch.setattr(model, "config", model.config.replace(center_crop=center_crop))
    seen = []

    def progress(samples, title):
        for sample in samples:
            seen.append(sample)
            yield sample

    result = evaluate(model, root, details=False, progress=progress)
    figures, right, flagged = by_hand(model, root, center_crop)
    assert len(seen) == 15
    assert list(result.figures) == ["official", "honest"]
    for protocol, expected in figures.items():
        actual = result.figures[protocol]
        assert list(actual) == ["bolt", "nut", "washer"]
        for name, (image, pixel) in expected.items():
            assert actual[name].image_auroc == pytest.approx(image, abs=1e-9, nan_ok=True)
            assert actual[name].pixel_auroc == pytest.approx(pixel, abs=1e-4, nan_ok=True)
        mean = result.mean(protocol)
        assert mean.image_auroc == pytest.approx(np.nanmean([image for image, _ in expected.values()]))
        assert mean.pixel_auroc == pytest.approx(np.nanmean([pixel for _, pixel in expected.values()]), abs=1e-4)
    assert 0 < np.mean(right) < 1  # both ways of choosing the class are at work
    assert result.inferred_class_accuracy == pytest.approx(np.mean(right))
    assert result.false_alarm_rate == pytest.approx(np.mean(flagged[False]))
    assert result.recall == pytest.approx(np.mean(flagged[True]))
    assert (result.n_normal, result.n_anomalous) == (9, 6)


@pytest.fixture(scope="module")
def whole(model, root):
    return evaluate(model, root)


def test_each_figure_is_that_of_metrics(whole, model, root):
    """Per class and pooled, from the maps that `score` gives under the honest protocol."""
    scores, labels, maps, masks = {}, {}, {}, {}
    dataset = datasets.discover(root)
    for sample in dataset.test:
        actual = model.score_features(preprocess.image_features(model, images.read_image(sample.path)))
        name = dataset.class_names[sample.class_id]
        scores.setdefault(name, []).append(float(actual.image_score))
        labels.setdefault(name, []).append(sample.is_anomalous)
        if sample.mask or not sample.is_anomalous:
            maps.setdefault(name, []).append(actual.anomaly_map[0])
            mask = torch.zeros(maps[name][-1].shape, dtype=torch.bool)
            if sample.mask:
                seen = images.whole_image(read_mask(sample.mask), model.config.img_size)
                mask = images.resize_mask(seen, tuple(mask.shape))
            masks.setdefault(name, []).append(mask)
    for name in (None, *dataset.class_names):
        row = whole.pooled["honest"] if name is None else whole.figures["honest"][name]
        mine = [sum(by.values(), []) if name is None else by[name] for by in (scores, labels, maps, masks)]
        if name == "washer":
            assert all(math.isnan(getattr(row, figure)) for figure in FIGURES)
            assert not row.intervals and not row.curves
            continue
        image, pixel = metrics.image_metrics(*mine[:2]), metrics.pixel_metrics(*mine[2:])
        expected = [*image.values(), *pixel.values()]
        np.testing.assert_allclose([getattr(row, figure) for figure in FIGURES], expected, rtol=1e-6)
        assert set(row.intervals) == set(FIGURES)
        for figure, (low, high) in row.intervals.items():
            assert 0 <= low <= high <= 1 and low - 0.01 < getattr(row, figure) < high + 0.01, figure
        assert set(row.curves) == {"image_roc", "image_pr", "pixel_roc", "pixel_pr", "pixel_pro"}
        x, y = row.curves["pixel_roc"]
        assert auc(x, y) == pytest.approx(row.pixel_auroc, abs=1e-3)


def test_every_image_is_on_record(whole, model, root):
    samples = {sample.path.relative_to(root).as_posix(): sample for sample in datasets.discover(root).test}
    for protocol in ("official", "honest"):
        assert {image.path for image in whole.images[protocol]} == samples.keys()
    for image in whole.images["honest"]:
        sample, actual = samples[image.path], model.score(root / image.path)
        assert (image.defect, image.is_anomalous) == (sample.defect, sample.is_anomalous)
        assert image.inferred_class == NAMES[int(actual.class_id)]
        assert image.score == float(actual.image_score)
        assert (image.p_value, image.threshold) == (float(actual.p_value), float(actual.threshold))
        assert image.is_flagged == bool(actual.is_anomalous)
    assert all(image.is_flagged is image.threshold is None for image in whole.images["official"])
    counted = sum(n for row in whole.confusion.values() for n in row.values())
    assert counted == len(samples)
    assert sum(row.get(name, 0) for name, row in whole.confusion.items()) / counted == whole.inferred_class_accuracy


def test_json_gives_back_everything(whole):
    text = json.dumps(whole.to_dict(), allow_nan=False)
    read = Evaluation.from_dict(json.loads(text))
    assert json.dumps(read.to_dict(), allow_nan=False) == text
    assert read.images == whole.images and read.checkpoints == {"official": "last", "honest": "last"}
    brief = whole.to_dict(details=False)
    assert "images" not in brief and "curves" not in brief["protocols"]["honest"]["classes"]["bolt"]
    assert brief["protocols"]["official"]["classes"]["washer"]["image_auroc"] is None
    assert brief["recall"] == whole.recall


def test_table_says_protocol_checkpoint_and_all_figures(whole):
    table = whole.table()
    assert "nan" not in table.lower()
    for protocol, block in zip(("official", "honest"), table.split("\n\n"), strict=False):
        head, names, *rows = block.splitlines()
        assert head.startswith(f"{protocol} protocol: class ") and head.endswith("checkpoint: last")
        assert len(names.split()) == len(FIGURES)
        actual = {row.split()[0]: row.split()[1:] for row in rows}
        assert list(actual) == ["bolt", "nut", "washer", "mean", "pooled"]
        expected = {**whole.figures[protocol], "mean": whole.mean(protocol), "pooled": whole.pooled[protocol]}
        for name, row in expected.items():
            figures = [getattr(row, figure) for figure in FIGURES]
            assert actual[name] == ["-" if math.isnan(figure) else f"{100 * figure:.1f}" for figure in figures]


def test_another_checkpoint_may_give_the_official_figures(whole, model, root):
    other = copy.deepcopy(model)
    other.calibration, other.checkpoint = None, "best of 3"
    with torch.no_grad():
        for mu in other.mixture.mus:
            mu.neg_()
    both, alone = (evaluate(m, root, official=other, details=False) for m in (model, other))
    assert both.checkpoints == {"official": "best of 3", "honest": "last"}
    assert both.figures["official"] == alone.figures["official"] != whole.figures["official"]
    assert both.images["honest"] == whole.images["honest"]
    assert both.mean("honest") == whole.mean("honest")


def test_without_calibration_there_is_the_official_protocol_alone(whole, model, root, monkeypatch):
    monkeypatch.setattr(model, "calibration", None)
    result = evaluate(model, root)
    assert list(result.figures) == ["official"]
    assert json.dumps(result.to_dict()["protocols"]) == json.dumps(
        {"official": whole.to_dict()["protocols"]["official"]}
    )
    assert math.isnan(result.recall) and math.isnan(result.false_alarm_rate)
    assert result.inferred_class_accuracy == whole.inferred_class_accuracy
    assert "thresholds" not in result.table() and "nan" not in result.table()


def test_a_class_without_threshold_counts_in_neither_share(model, root, monkeypatch):
    full = model.calibration
    kept = full.class_ids != NAMES.index("bolt")
    partial = type(full)(full.level_max, full.scores[kept], full.class_ids[kept], full.false_alarm_rate)
    monkeypatch.setattr(model, "calibration", partial)
    flagged = {False: [], True: []}
    for sample in datasets.discover(root).test:
        actual = model.score(sample.path)
        if not actual.threshold.isnan():
            flagged[sample.is_anomalous].append(bool(actual.is_anomalous))
    result = evaluate(model, root, details=False)
    assert 0 < len(flagged[False]) < 9
    assert result.false_alarm_rate == pytest.approx(np.mean(flagged[False]))
    if flagged[True]:
        assert result.recall == pytest.approx(np.mean(flagged[True]))


def test_the_best_checkpoint_on_the_test_set_is_kept(model, root, tmp_path):
    dataset, path = datasets.discover(root), tmp_path / "best.safetensors"
    names = dataset.class_names
    trained = HGADModel(model.config.replace(n_classes=3, class_names=names, lr=0.02, meta_epochs=4, sub_epochs=2))
    best, seen = BestCheckpoint(trained, dataset, path), []

    def follow(record):
        if record["sub_epoch"] == 1:
            actual = evaluate(trained, dataset, details=False)
            seen.append((actual.mean("official").image_auroc, actual.checkpoints["official"]))

    trained.fit(dataset, callbacks=[best, follow], cache="ram")
    values = [auroc for auroc, _ in seen]
    assert len(set(values)) > 1 and {name for _, name in seen} == {"last"}  # it says which state only in its own file
    kept = HGADModel.load(path)
    assert kept.checkpoint == f"best on the test set (mean image AUROC), meta-epoch {int(np.argmax(values))}"
    assert kept.calibration is None
    actual = evaluate(trained, root, official=kept, details=False)
    assert actual.mean("official").image_auroc == best.best == max(values)
    assert kept.checkpoint in actual.table()
    assert BestCheckpoint(trained, root, path, resume=True).best == max(values)
    assert BestCheckpoint(trained, root, path).best == -math.inf


def test_no_checkpoint_is_best_without_defects(model, root, tmp_path):
    dataset = datasets.discover(root)
    normal = dataclasses.replace(dataset, test=[sample for sample in dataset.test if not sample.is_anomalous])
    with pytest.raises(ValueError, match="no class with both normal and anomalous test images"):
        BestCheckpoint(model, normal, tmp_path / "best.safetensors")


def test_datasets_that_do_not_fit(model, root, tmp_path):
    array = np.zeros((8, 8, 3), np.uint8)
    write(tmp_path / "unknown" / "rivet" / "train" / "good" / "0.png", array)
    with pytest.raises(ValueError, match="classes the model does not know: rivet"):
        evaluate(model, tmp_path / "unknown")
    write(tmp_path / "untested" / "bolt" / "train" / "good" / "0.png", array)
    with pytest.raises(ValueError, match="no test images; put them into"):
        evaluate(model, tmp_path / "untested")


def test_a_method_that_knows_classes_may_have_several_procedures(model, root, monkeypatch):
    """Of three, two without a description; AUPRO by 800 thresholds is said even where the maps are the usual ones."""

    def official_maps(self, batches):
        (usual,) = Detector.official_maps(self, batches).values()
        twice = usual._replace(maps=2 * usual.maps, scores=2 * usual.scores)
        return {"once": usual, "twice": twice, "said": twice._replace(description="maps twice as high")}

    monkeypatch.setattr(HGADModel, "official_maps", official_maps)
    table = evaluate(model, root, details=False).table()
    assert "official protocol: class given, maps normalised over the test set of the class, checkpoint: last" in table
    assert "official twice protocol: class given, maps normalised over the test set of the class" in table
    assert "official said protocol: class given, maps twice as high, checkpoint: last" in table
    assert "honest protocol: class inferred, each score from its image alone" in table
    monkeypatch.setattr(HGADModel, "official_aupro", "official800")
    result = evaluate(model, root, details=False)
    assert "of the class, AUPRO 30 % by 800 thresholds as in the official code, checkpoint" in result.table()
    assert list(result.figures) == ["official", "official twice", "official said", "honest"]
    assert Evaluation.from_dict(result.to_dict()).table() == result.table()
    once, twice = result.figures["official"]["bolt"], result.figures["official twice"]["bolt"]
    assert once.pixel_aupro_30 == twice.pixel_aupro_30  # doubling changes no order, and thresholds double too


def test_masks_that_look_like_a_mistake_are_warned_of(model, root, tmp_path):
    shutil.copytree(root / "bolt", tmp_path / "bolt")
    for path in (tmp_path / "bolt/ground_truth/hole").iterdir():
        write(path, 255 - np.asarray(Image.open(path)))
    with pytest.warns(
        UserWarning, match="mask that covers most of its image, 3 of them, the first: .*0_mask.png marks"
    ):
        evaluate(model, tmp_path, details=False)
