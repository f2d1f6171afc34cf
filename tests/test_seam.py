"""The seam: a second method of a few lines gets everything that the library offers, without a line of it elsewhere."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import ClassVar

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
from hgad_fast.data.images import read_image
from hgad_fast.evaluation import ablate
from hgad_fast.evaluation.evaluate import evaluate
from hgad_fast.features.backbone import FeatureMaps
from hgad_fast.features.extract import feature_set
from hgad_fast.features.preprocess import image_features
from hgad_fast.models.config import Config
from hgad_fast.models.detector import Detector
from hgad_fast.protocol import Densities
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
    with pytest.raises(ValueError, match="holds a model of the method 'toy'; this version knows hgad"):
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
    with pytest.warns(UserWarning, match="too few calibration images: 1 of 2 groups have fewer than 3 of them and"):
        model.calibrate((levels, [0, 1, 0, 1]), false_alarm_rate=0.3)
    assert model.calibration.class_ids.tolist() == [1, 1, 1, 1] and model.calibration.borrowers == [0]
    assert torch.equal(model.calibration.level_max[0], model.calibration.level_max[1])
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
    assert done.exit_code == 1 and "--method is 'none'; allowed are hgad, vqflow, toy" in done.stderr


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
