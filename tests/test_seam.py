"""The seam: a second method of a few lines gets everything that the library offers, without a line of it elsewhere."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import rounding
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

import hgad_fast
from hgad_fast import HGADConfig, HGADModel, Scorer, methods
from hgad_fast.cli import app
from hgad_fast.data.images import centre_crop, read_image, resize_image, resize_mask
from hgad_fast.evaluation import ablate
from hgad_fast.evaluation.evaluate import BestCheckpoint, evaluate
from hgad_fast.features.backbone import FeatureMaps
from hgad_fast.features.extract import feature_set
from hgad_fast.features.preprocess import image_features, preprocess, seen_shape, working_set
from hgad_fast.models.config import Config
from hgad_fast.models.detector import Detector
from hgad_fast.models.vqflow_maps import official_maps_of
from hgad_fast.protocol import Densities, OfficialMaps
from hgad_fast.scoring.densities import densities
from hgad_fast.scoring.pipeline import Job, score_files
from hgad_fast.training.fit import NonFiniteLossError

pytestmark = pytest.mark.filterwarnings("ignore:too few calibration images")


@dataclasses.dataclass(kw_only=True)
class ToyConfig(Config):
    method: ClassVar[str] = "toy"
    projections: int = 4


class ToyLoss(nn.Module):
    terms = ("distance",)

    def __init__(self, model: ToyModel) -> None:
        super().__init__()
        self.centre, self.projection = model.centre, model.projection

    def forward(self, batch: list, pixels: list[int]) -> tuple[Tensor, Tensor]:
        (groups,), (count,) = batch, pixels
        loss = sum((group.x @ self.projection - self.centre).square().sum() for group in groups) / count
        return loss, loss.detach().view(1, 1)


class ToyModel(Detector):
    """A fixed Gaussian on random projections of blurred features; its groups are images of low and high features."""

    config_class = ToyConfig
    groups = ("low", "high")
    groups_are_classes = False
    pointwise = False
    preparation = "blurred"

    def build(self) -> None:
        self.register_buffer("projection", torch.randn(*self.feature_dims, self.config.projections))
        self.centre = nn.Parameter(torch.zeros(self.config.projections))

    def prepare(self, features: list[Tensor]) -> list[Tensor]:
        return [F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) for x in features]

    def objective(self, stage: int) -> nn.Module:
        return ToyLoss(self)

    def densities(self, maps: FeatureMaps, group_ids: Tensor | None) -> Densities:
        (x,) = maps.whole()
        distance = (x.movedim(1, 3) @ self.projection - self.centre).square().sum(3)
        around = F.avg_pool2d(distance, 3, 1, 1, count_include_pad=False)  # not pointwise
        high = x.mean((1, 2, 3)) > 0
        return Densities([-around / 2 / x.shape[1]], [], high.long().cpu() if group_ids is None else group_ids)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(methods.METHODS, "toy", ToyModel)
    monkeypatch.setitem(methods.METHODS, "grid", GridModel)


def config(**settings) -> ToyConfig:
    backbone = {
        "backbone_arch": "test_efficientnet",
        "backbone_weights": None,
        "out_indices": (1,),
        "feature_levels": 1,
    }
    size = {"img_size": 48, "msk_size": 32, "meta_epochs": 2, "sub_epochs": 2, "lr": 0.1, "batch_size": 4}
    return ToyConfig(2, **backbone | size | settings)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, each with darker and brighter images; the defective ones have a checkered patch."""
    root, rng = tmp_path_factory.mktemp("toys"), np.random.default_rng(0)
    for name in ("ball", "cube"):
        for folder, count in (("train/good", 16), ("test/good", 3), ("test/patch", 3)):
            for i in range(count):
                pixels = np.full((48, 56, 3), 60 + 120 * (i % 2)) + rng.normal(0, 4, (48, 56, 3))
                if "patch" in folder:
                    pixels[16:32, 16:32] = 255 * (np.indices((16, 16)).sum(0) % 4 < 2)[..., None]  # a checkerboard
                    mask = np.zeros((48, 56), np.uint8)
                    mask[16:32, 16:32] = 255
                    path = root / name / "ground_truth" / "patch" / f"{i}_mask.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(mask).save(path)
                path = root / name / folder / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished training."""
    folder = tmp_path_factory.mktemp("run")
    ToyModel(config()).fit(root, output_dir=folder, false_alarm_rate=0.2)
    return folder


@pytest.fixture
def model(run: Path) -> ToyModel:
    return hgad_fast.load(run / "model.safetensors")


def test_it_trains_and_resumes_to_the_bit(root: Path, run: Path, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(record: dict) -> None:
        if (record["meta_epoch"], record["sub_epoch"]) == (1, 0):
            raise Killed

    with pytest.raises(Killed):
        ToyModel(config()).fit(root, output_dir=tmp_path, callbacks=[kill])
    resumed = ToyModel(config())
    history = resumed.fit(root, output_dir=tmp_path, resume=True, false_alarm_rate=0.2)
    whole = hgad_fast.load(run / "model.safetensors")
    assert torch.equal(resumed.centre, whole.centre) and float(whole.centre.detach().abs().min()) > 0
    losses = [record["losses"][0]["distance"] for record in history.records]
    assert len(losses) == 4 and losses[-1] < losses[0]
    with pytest.raises(ValueError, match="another configuration: projections 4 -> 3"):
        ToyModel(config(projections=3)).fit(root, output_dir=tmp_path, resume=True)


def test_a_checkpoint_of_another_method_is_refused_by_name(root: Path, tmp_path: Path) -> None:
    settings = {"backbone_arch": None, "feature_levels": 1, "feature_dims": (5,), "meta_epochs": 1, "sub_epochs": 1}
    features = [torch.randn(6, 5, 3, 4)], [0, 1] * 3
    HGADModel(HGADConfig(2, coupling_layers=1, pos_embed_dim=8, **settings)).fit(features, output_dir=tmp_path)
    with pytest.raises(ValueError, match="is of a training of hgad, and this model is one of toy"):
        ToyModel(ToyConfig(2, **settings)).fit(features, output_dir=tmp_path, resume=True)


def test_a_loss_that_is_no_number_is_named(root: Path) -> None:
    model = ToyModel(config())
    with torch.no_grad():
        model.centre.fill_(torch.nan)
    with pytest.raises(NonFiniteLossError, match="distance of level 0 is nan at step 0"):
        model.fit(root)


def test_its_file_opens_by_any_name_but_another_method_s(model: ToyModel, run: Path, tmp_path: Path) -> None:
    assert type(model) is ToyModel and model.config == ToyModel.load(run / "model.safetensors").config
    assert model.config.class_names is None  # groups of its own: the dataset's classes are none of its business
    with pytest.raises(ValueError, match=r"holds a model of the method 'toy', and HGADModel is of another"):
        HGADModel.load(run / "model.safetensors")
    methods.METHODS.pop("toy")
    with pytest.raises(ValueError, match="holds a model of the method 'toy'; this version knows gaussian, hgad"):
        hgad_fast.load(run / "model.safetensors")


def test_thresholds_are_kept_for_its_groups(model: ToyModel, root: Path) -> None:
    calibration = model.calibration
    assert calibration.level_max.shape == (2, 1) and calibration.weights is None
    assert set(calibration.class_ids.tolist()) == {0, 1}
    result = model.score(sorted((root / "ball" / "test" / "good").glob("*.png")))
    dark, bright, *others = result.class_id.tolist()
    assert others == [dark] and {dark, bright} == {0, 1}
    assert result.p_value.isfinite().all() and result.neg_entropy is None
    given = model.score(root / "ball" / "test" / "good" / "0.png", "high")
    assert given.class_id.tolist() == [1]
    with pytest.raises(ValueError, match=r"class 'ball' is unknown; the model knows low, high \(0 to 1\)"):
        model.score(root / "ball" / "test" / "good" / "0.png", "ball")
    before = calibration.scores.clone()
    model.calibrate(root, false_alarm_rate=0.1)
    assert len(model.calibration.scores) == 32 > len(before)


def test_a_group_with_few_images_borrows_from_the_others(model: ToyModel, tmp_path: Path) -> None:
    """An image of a group without any is judged: what nothing is known of is not normal for that."""
    levels = [torch.rand(4, *model.feature_dims, 5, 6) + 1]  # all of them high
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the group is unused, and nobody need know
        model.calibrate((levels, [0, 1, 0, 1]), false_alarm_rate=0.3)
    assert model.calibration.class_ids.tolist() == [1, 1, 1, 1] and model.calibration.borrowers == [0]
    assert torch.equal(model.calibration.level_max[0], model.calibration.level_max[1])
    with pytest.warns(UserWarning, match="too few calibration images: 1 of 2 groups have fewer than 3 of them and"):
        model.calibrate(([torch.cat([levels[0], -levels[0][:2]])], [0] * 6), false_alarm_rate=0.3)
    model.calibrate((levels, [0, 1, 0, 1]), false_alarm_rate=0.3)
    unlike = model.score_features([-5 * levels[0]])
    assert unlike.class_id.tolist() == [0] * 4 and unlike.p_value.tolist() == [1 / 5] * 4
    assert unlike.is_anomalous.all() and unlike.threshold.isfinite().all()
    assert model.score_features(levels, [0] * 4).image_score.equal(model.score_features(levels).image_score)
    model.save(tmp_path / "model.safetensors")
    assert hgad_fast.load(tmp_path / "model.safetensors").calibration.borrowers == [0]


def test_what_is_borrowed_are_the_largest_constants(model: ToyModel) -> None:
    levels = torch.rand(6, *model.feature_dims, 5, 6) + 1
    levels[4:] = -levels[4:] / 10  # two low ones are too few, and closer to the centre
    model.calibrate(([levels], [0, 1] * 3), false_alarm_rate=0.3)
    assert model.calibration.counts == [2, 4]
    high = max(float(level.max()) for level in model.score_features([levels[:4]]).logps)
    low = max(float(level.max()) for level in model.score_features([levels[4:]]).logps)
    assert model.calibration.level_max.flatten().tolist() == [max(low, high), high]


def test_features_are_prepared_wherever_they_come_from(model: ToyModel, root: Path, tmp_path: Path) -> None:
    """From images, from features that the user brings, one by one or in batches, from memory or from disk."""
    image = read_image(root / "cube" / "test" / "patch" / "0.png")
    expected = model.score(image)
    raw = model.encoder(model.encoder.normalize(image[None]), fast=True)
    assert torch.equal(model.score_features(raw).image_score, expected.image_score)
    (prepared,) = image_features(model, image)
    assert torch.equal(prepared, model.prepare(raw)[0]) and not torch.equal(prepared, raw[0])
    several = model.score(torch.stack([image, image.flip(2), image]), throughput=True)
    assert several.image_score[0] == several.image_score[2]
    rounding.assert_close(several.image_score[:1], lambda model: model.score(image).image_score, model)
    kept = feature_set(model, root, cache="disk", cache_dir=tmp_path)
    for one, other in zip(kept.images, feature_set(model, root).images, strict=True):
        assert torch.equal(one[0], other[0])
    model.preparation = "blurred otherwise"  # features of another preparation are others
    feature_set(model, root, cache="disk", cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_it_is_scored_by_a_scorer_and_the_pipeline(model: ToyModel, root: Path, run: Path, tmp_path: Path) -> None:
    files = sorted((root / "ball" / "test").rglob("*.png"))
    scorer = Scorer(run / "model.safetensors", frame_size=(48, 56))
    records = score_files(model, files, Job(output=tmp_path))
    for file, record in zip(files, records, strict=True):
        frame, result = scorer(read_image(file)), model.score(file)
        assert frame.score == record.row["score"] == float(result.image_score)
        assert frame.class_name == record.row["class"] == model.groups[int(result.class_id)]
    image = read_image(files[0])
    rounding.assert_close(scorer(image).anomaly_map, lambda model: model.score(image).anomaly_map[0], model)
    assert (tmp_path / "scores.csv").read_text().count("\n") == len(files) + 1


def test_it_is_evaluated_and_reported(model: ToyModel, root: Path, run: Path, tmp_path: Path) -> None:
    evaluation = evaluate(model, root)
    assert set(evaluation.figures["honest"]) == {"ball", "cube"}
    assert evaluation.mean("honest").image_auroc == 1 and evaluation.mean("honest").pixel_auroc > 0.9
    assert set(evaluation.confusion["ball"]) == {"low", "high"} and np.isnan(evaluation.inferred_class_accuracy)
    assert "inferred class" not in evaluation.table() and "class given" not in evaluation.table()
    assert type(evaluation).from_dict(json.loads(json.dumps(evaluation.to_dict()))).confusion == evaluation.confusion
    done = CliRunner().invoke(app, ["report", str(run), "--data", str(root), "-o", str(tmp_path / "r.html")])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "r.html").read_text()
    assert "it tells 2 groups of them apart" in page and "distance" in page and "second stage" not in page


def test_it_is_ablated(root: Path, tmp_path: Path) -> None:
    variants = {"few": config(projections=2), "many": config(projections=8)}
    actual = ablate.run(root, config(), tmp_path, variants=variants, training_images=12, say=lambda text: None)
    for variant in actual["variants"].values():
        assert variant["figures"].keys() == {"official", "class inferred"}
        assert variant["figures"]["class inferred"].keys() == {"likelihood"}
        assert variant["figures"]["class inferred"]["likelihood"]["mean"][0] == 1


def test_it_is_trained_and_described_by_its_name(root: Path, tmp_path: Path) -> None:
    settings = {"backbone_arch": "test_efficientnet", "out_indices": [1], "feature_levels": 1, "img_size": 48}
    settings |= {"msk_size": 32, "meta_epochs": 1, "sub_epochs": 1}
    options = [part for name, value in settings.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    command = ["train", str(root), "--method", "toy", "--weights", "random", "-o", str(tmp_path / "run"), *options]
    done = CliRunner().invoke(app, [*command, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    shown = CliRunner().invoke(app, ["info", str(tmp_path / "run" / "model.safetensors")]).stdout
    assert "toy" in shown and "groups" in shown and "low, high" in shown
    done = CliRunner().invoke(app, ["train", str(root), "--method", "none"])
    assert done.exit_code == 1 and "--method is 'none'; allowed are gaussian, hgad, vqflow, toy" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tiles": "always"}, "tiles is 'always': the method 'toy' looks at a feature map as a whole"),
        ({"img_size": 96}, "img_size is 96: the method 'toy' looks at a feature map as a whole"),
        ({"img_size": "native"}, "img_size is 'native': the method 'toy'"),
    ],
)
def test_what_takes_pixels_one_by_one_is_refused_with_the_reason(model: ToyModel, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.score(torch.rand(3, 48, 48), **options)


def test_a_batch_is_not_worked_off_in_parts(root: Path) -> None:
    with pytest.raises(ValueError, match="accumulate is 2: the method 'toy' looks at a batch as a whole"):
        ToyModel(config(accumulate=2)).fit(root)


def test_gradients_are_clipped_together(root: Path) -> None:
    free, clipped = ToyModel(config()), ToyModel(config(clip_grad_norm=1e-3))
    for model in (free, clipped):
        model.fit(root)
    assert not torch.equal(free.centre, clipped.centre)


# ------------------------------------------------------------------------------------------------ another toy


@dataclasses.dataclass(kw_only=True)
class GridConfig(Config):
    method: ClassVar[str] = "grid"
    square: ClassVar[bool] = True


class GridModel(ToyModel):
    """Like the toy, but of squares, with four levels of features and two of densities, and two published procedures.

    Its groups are the brightness of an image, in twenty steps of which most are empty.
    """

    config_class = GridConfig
    groups = tuple(f"prototype {k}" for k in range(20))
    official_aupro = "official800"

    def build(self) -> None:
        self.centre = nn.Parameter(torch.zeros(self.feature_dims[0]))
        self.projection = nn.Parameter(torch.eye(self.feature_dims[0]), requires_grad=False)

    @property
    def density_levels(self) -> int:
        return 2

    def objective(self, stage: int) -> nn.Module:
        loss = ToyLoss(self)
        return FirstLevel(loss)

    def densities(self, maps: FeatureMaps, group_ids: Tensor | None) -> Densities:
        first, second, *_ = maps.whole()
        distances = [(first.movedim(1, 3) - self.centre).square().mean(3), second.square().mean(1)]
        if group_ids is None:
            group_ids = (first.mean((1, 2, 3)).sigmoid() * 20).long().clamp(0, 19).cpu()
        return Densities([-distance / 2 for distance in distances], [], group_ids)

    def official_maps(self, batches: Sequence[Densities]) -> dict[str, OfficialMaps]:
        return official_maps_of(batches, self.config.img_size)


class FirstLevel(nn.Module):
    terms = ToyLoss.terms

    def __init__(self, loss: ToyLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, batch: list, pixels: list[int]) -> tuple[Tensor, Tensor]:
        loss, terms = self.loss(batch[:1], pixels[:1])
        return loss, terms.expand(4, 1)


def grid_config(**settings) -> GridConfig:
    backbone = {"backbone_arch": "test_efficientnet", "backbone_weights": None, "feature_mode": "stages"}
    backbone |= {"out_indices": (0, 1, 2, 3), "feature_levels": 4}
    size = {"img_size": 64, "msk_size": 32, "meta_epochs": 1, "sub_epochs": 2, "lr": 0.1, "batch_size": 4}
    return GridConfig(2, **backbone | size | settings)


@pytest.fixture(scope="module")
def grid_run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished training of the second toy, with the checkpoint that is best on the test set."""
    folder, model = tmp_path_factory.mktemp("grid"), GridModel(grid_config())
    best = BestCheckpoint(model, root, folder / "best.safetensors")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setitem(methods.METHODS, "grid", GridModel)
        model.fit(root, output_dir=folder, callbacks=[best], false_alarm_rate=0.2)
        assert best.best == best._auroc(methods.load(folder / "best.safetensors"))
    return folder


@pytest.fixture
def grid(grid_run: Path) -> GridModel:
    return hgad_fast.load(grid_run / "model.safetensors")


def test_levels_that_only_condition_others_have_no_constants(grid: GridModel, root: Path) -> None:
    assert grid.feature_dims == [16, 24, 32, 48] and grid.calibration.level_max.shape == (20, 2)
    assert grid.calibration.level_max.isfinite().all()
    result = grid.score(root / "ball" / "test" / "good")
    assert result.p_value.isfinite().all() and result.threshold.isfinite().all()


def test_its_images_are_squares(grid: GridModel, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A map is stretched back over the whole image, from a Scorer too; features on disk are not those of others."""
    image = read_image(root / "ball" / "test" / "patch" / "1.png")
    wide = resize_image(image, (48, 200))
    assert preprocess(image, grid.config).shape == (3, 64, 64) == preprocess(wide, grid.config).shape
    assert seen_shape((48, 200), grid.config) == (64, 64)
    result = grid.score(wide)
    assert result.anomaly_map.shape == (1, 48, 200)
    peak = divmod(int(result.anomaly_map.argmax()), 200)
    assert 16 <= peak[0] < 32 and 16 / 56 * 200 <= peak[1] < 32 / 56 * 200  # where the patch is
    scorer = Scorer(grid, frame_size=(48, 200))
    frame = scorer(wide)
    assert frame.score == float(result.image_score) and frame.anomaly_map.shape == (48, 200)
    rounding.assert_close(frame.anomaly_map, lambda model: model.score(wide).anomaly_map[0], grid)
    seen = grid.score(wide, map_size="seen").anomaly_map
    assert seen.shape == (1, 32, 32)
    feature_set(grid, root, cache="disk", cache_dir=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(GridConfig, "square", False)
        assert seen_shape((48, 200), grid.config) == (64, 267)
        feature_set(grid, root, cache="disk", cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    cropped = grid.config.replace(center_crop=True)
    assert preprocess(wide, cropped).equal(centre_crop(wide, 64)) and not preprocess(wide, grid.config).equal(
        preprocess(wide, cropped)
    )


@pytest.mark.parametrize("size", [(1, 1), (1, 41), (40, 1), (1, 70_000), (9000, 2), (64, 64)])
def test_images_of_any_size_become_squares(grid: GridModel, size: tuple[int, int]) -> None:
    image = torch.rand(3, *size)
    for normalization in ("calibrated", "official"):
        result = grid.score(image, normalization=normalization)
        assert result.anomaly_map.shape == (1, *size) and result.anomaly_map.isfinite().all()
    assert working_set(grid, grid.config, size, cut=False) > working_set(grid, grid.config, (64, 64), cut=False) or (
        size == (64, 64)
    )
    mask = torch.zeros(size, dtype=torch.bool)
    mask[size[0] // 2 :, size[1] // 2 :] = True
    seen = preprocess(mask, grid.config)
    assert seen.dtype == torch.bool and seen.shape == (64, 64) and seen.equal(resize_mask(mask, (64, 64)))


def test_all_its_published_procedures_are_evaluated(
    grid: GridModel, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = evaluate(grid, root)
    assert list(evaluation.figures) == ["official", "official add", "honest"]
    sample = sorted((root / "cube" / "test" / "patch").glob("*.png"))[0]
    maps = official_maps_of([densities(grid, image_features(grid, read_image(sample)), None)[0]], 64)
    for protocol, name in (("official", "mul"), ("official add", "add")):
        (scored,) = (image for image in evaluation.images[protocol] if image.path == str(sample.relative_to(root)))
        assert scored.score == float(maps[name].scores)
        assert f"{protocol} protocol: map '{name}' (" in evaluation.table()
        assert "AUPRO 30 % by 800 thresholds" in evaluation.descriptions[protocol]
        pooled = evaluation.pooled[protocol]
        assert "pixel_aupro_5" in pooled.intervals and "pixel_aupro_30" not in pooled.intervals
    assert "pixel_aupro_30" in evaluation.pooled["honest"].intervals and "honest" not in evaluation.descriptions
    official = grid.score(sample, normalization="official")
    assert float(official.image_score) == float(maps["mul"].scores) < float(official.anomaly_map.max())
    rounding.assert_close(
        official.anomaly_map, lambda model: model.score(sample, normalization="official").anomaly_map, grid
    )
    features = image_features(grid, read_image(sample))
    monkeypatch.setattr(GridModel, "prepare", Detector.prepare)  # these are prepared already
    assert grid.score_features(features, normalization="official").image_score.equal(maps["mul"].scores)


def test_800_thresholds_stand_where_they_are_asked_for(
    grid: GridModel, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = evaluate(grid, root, details=False)
    monkeypatch.setattr(GridModel, "official_aupro", "by hand")
    with pytest.raises(ValueError, match="official_aupro is 'by hand'; allowed are 'exact', 'official800'"):
        evaluate(grid, root, details=False)
    monkeypatch.setattr(GridModel, "official_aupro", "exact")
    exact = evaluate(grid, root, details=False)
    assert exact.figures["honest"] == asked.figures["honest"]
    for protocol in ("official", "official add"):
        assert "800" not in exact.descriptions[protocol]
        one, other = (evaluation.pooled[protocol] for evaluation in (exact, asked))
        assert dataclasses.replace(one, pixel_aupro_30=0.0) == dataclasses.replace(other, pixel_aupro_30=0.0)
        assert one.pixel_aupro_30 != other.pixel_aupro_30


def test_groups_are_shown_with_their_purity(grid: GridModel, root: Path, grid_run: Path, tmp_path: Path) -> None:
    evaluation = evaluate(grid, root)
    groups = [image.inferred_class for image in evaluation.images["honest"]]
    sizes = {name: sum(row.values()) for name, row in evaluation.groups.items()}
    assert sizes == {name: groups.count(name) for name in set(groups)}
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    assert evaluation.purity == sum(max(row.values()) for row in evaluation.groups.values()) / 12
    assert f"purity {100 * evaluation.purity:.1f}%" in evaluation.table() and f"images a group: {next(iter(sizes))} "
    content = json.loads(json.dumps(evaluation.to_dict()))
    assert content["purity"] == evaluation.purity and content["groups"] == evaluation.groups
    again = type(evaluation).from_dict(content)
    assert again == evaluation and again.table() == evaluation.table()
    for part in content["protocols"].values():  # as it was written before
        part.pop("description", None)
    del content["groups"], content["purity"]
    assert type(evaluation).from_dict(content).purity == evaluation.purity
    for _ in range(2):  # computed, and from the evaluation that is kept
        done = CliRunner().invoke(app, ["report", str(grid_run), "--data", str(root), "-o", str(tmp_path / "r.html")])
        assert done.exit_code == 0, done.output
    page = (tmp_path / "r.html").read_text()
    assert '<h2 id="groups">Groups</h2>' in page and f"The test images fall to {len(sizes)} of them" in page
    assert "Three protocols stand side by side" in page and "official add protocol, all classes together" in page
    assert "map &#39;mul&#39;" in page and "told the class" not in page and ", borrows</td>" in page
    assert "of the group prototype" in page and "What the threshold of each group rests on" in page


def test_the_commands_take_it(grid_run: Path, root: Path, tmp_path: Path) -> None:
    model, image = str(grid_run / "model.safetensors"), str(root / "ball" / "test" / "good" / "0.png")

    def run(*command: str) -> Any:
        return CliRunner().invoke(app, list(command), env={"COLUMNS": "200"})

    shown = run("info", model)
    assert (
        "square, side 64" in shown.stdout
        and "20 of its own: prototype 0, prototype 1, ..., prototype 19" in shown.stdout
    )
    assert re.search(r"(normal|ANOMALOUS) +prototype \d+ +.*0\.png", run("score", model, image).stdout)
    assert "official add protocol" in run("eval", model, str(root)).stdout
    assert run("calibrate", model, str(root), "-o", str(tmp_path / "model.safetensors")).exit_code == 0
    assert "gaussian, hgad, vqflow" in run("train", "--help").output
    done = run("ablate", str(root), "--method", "grid", "--centres", "5")
    assert done.exit_code == 1 and "--centres is '5', and models of the method 'grid' have no centres" in done.stderr
    done = run("ablate", str(root), "--method", "grid", "--variant", "none")
    assert done.exit_code == 1 and "there is no variant 'none'; the method has one, grid" in done.stderr
    for options, message in (
        (("--tiles", "always"), "tiles is 'always': the method 'grid' looks at a feature map as a whole"),
        (("--img-size", "96"), "--img-size is 96: the method 'grid' looks at a feature map as a whole"),
        (("--img-size", "native"), "--img-size is 'native': the method 'grid'"),
    ):
        done = run("score", model, image, *options)
        assert done.exit_code == 1 and message in done.stderr


def test_it_is_ablated_by_its_first_procedure(root: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual = ablate.run(root, grid_config(), tmp_path, training_images=12, say=lambda text: None)
        model = hgad_fast.load(tmp_path / "grid" / "model.safetensors")
    expected = evaluate(model, root, details=False).mean("official")
    figures = actual["variants"]["grid"]["figures"]
    assert figures["official"]["likelihood"]["mean"][0] == expected.image_auroc
    assert figures.keys() == {"official", "class inferred"}
    image = densities(model, image_features(model, read_image(root / "cube" / "test" / "patch" / "0.png")), None)
    (maps, scores), (published, *_) = ablate._official(image, model)["likelihood"], model.official_maps(image).values()
    assert torch.equal(torch.stack(maps), published.maps) and scores == published.scores.tolist()
