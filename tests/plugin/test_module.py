"""Models of this library as models of anomalib: fit, test, predict, checkpoints, and what is refused."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("anomalib")

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402
import small_plugin  # noqa: E402
import torch  # noqa: E402
from anomalib.callbacks import ModelCheckpoint, TilerConfigurationCallback  # noqa: E402
from anomalib.data import Folder, PredictDataset  # noqa: E402
from anomalib.deploy import ExportType, OpenVINOInferencer, TorchInferencer  # noqa: E402
from anomalib.metrics import AUPRO, AUROC, Evaluator  # noqa: E402
from anomalib.post_processing import PostProcessor  # noqa: E402
from anomalib.pre_processing import PreProcessor  # noqa: E402
from lightning.pytorch import Callback  # noqa: E402
from lightning.pytorch.callbacks import (  # noqa: E402
    EarlyStopping,
    StochasticWeightAveraging,
    WeightAveraging,
)
from small_plugin import BACKBONE, CLASSES, settings  # noqa: E402
from torch import Tensor  # noqa: E402
from torchvision.transforms.v2 import Compose, Normalize, RandomHorizontalFlip, Resize  # noqa: E402

from hgad_fast import anomalib as plugin  # noqa: E402
from hgad_fast import methods  # noqa: E402
from hgad_fast.data.images import read_image  # noqa: E402
from hgad_fast.evaluation import metrics  # noqa: E402
from hgad_fast.evaluation.evaluate import evaluate  # noqa: E402
from hgad_fast.features.backbone import Backbone  # noqa: E402
from hgad_fast.plugin.batch import MultiClassBatch  # noqa: E402
from hgad_fast.plugin.processing import View  # noqa: E402
from hgad_fast.plugin.schedule import scheduled  # noqa: E402
from hgad_fast.training.fit import NonFiniteLossError  # noqa: E402

NAMES = ("HGAD", "VQFlow", "PlaceGaussian")
EPOCHS = 2
MakeEngine = Callable[..., Any]

pytestmark = pytest.mark.filterwarnings("ignore")  # lightning's advice


def make_model(name: str = "HGAD", changes: dict[str, Any] | None = None, **arguments: Any) -> Any:
    """Return a small model, with some of its settings changed."""
    given = {"classes": CLASSES, **BACKBONE, "settings": settings(name, **changes or {}), "false_alarm_rate": 0.1}
    return getattr(plugin, name)(**given | arguments)


def make_data(root: Path, **arguments: Any) -> plugin.MultiClassFolder:
    return plugin.MultiClassFolder(root, **{"num_workers": 0, "train_batch_size": 8, **arguments})


def make_folder(root: Path, **arguments: Any) -> Folder:
    """Return the same images as a datamodule of anomalib's own, which knows no classes."""
    return Folder(
        name="three",
        root=root,
        normal_dir=[f"{name}/train/good" for name in CLASSES],
        abnormal_dir=[f"{name}/test/hole" for name in CLASSES],
        normal_test_dir=[f"{name}/test/good" for name in CLASSES],
        mask_dir=[f"{name}/ground_truth/hole" for name in CLASSES],
        **{"train_batch_size": 8, "eval_batch_size": 4, "num_workers": 0, **arguments},
    )


def test_files(root: Path) -> list[Path]:
    return sorted(root.glob("*/test/*/*.png"))


test_files.__test__ = False  # type: ignore[attr-defined]


def own_fit(name: str, root: Path, changes: dict[str, Any] | None = None) -> Any:
    """Return the model of the library, trained by the library itself as `make_model` is by the engine."""
    model_class = methods.METHODS[{"HGAD": "hgad", "VQFlow": "vqflow", "PlaceGaussian": "gaussian"}[name]]
    fields = settings(name, **{"meta_epochs": EPOCHS, "sub_epochs": 1, "batch_size": 8} | (changes or {}))
    config = model_class.config_class(
        n_classes=3,
        class_names=CLASSES,
        backbone_arch=BACKBONE["backbone"],
        img_size=BACKBONE["img_size"],
        **fields,
    )
    model = model_class(config)
    model.fit(root, false_alarm_rate=0.1, progress=False)
    return model


@pytest.fixture(scope="module")
def fitted(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Models of each kind that engines have fitted, and their checkpoints."""
    from anomalib.engine import Engine

    models = {}
    for name in NAMES:
        folder = tmp_path_factory.mktemp(name)
        engine = Engine(
            default_root_dir=folder,
            max_epochs=EPOCHS,
            accelerator="cpu",
            devices=1,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        model = make_model(name)
        engine.fit(model=model, datamodule=make_data(root))
        models[name] = model, Path(engine.best_model_path)
    return models


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("name", NAMES)
def test_the_engine_trains_what_the_library_trains(name: str, root: Path, fitted: dict[str, tuple[Any, Path]]) -> None:
    """Same features, seed and schedule: the same steps in the same order, to the last bit on one machine."""
    theirs, ours = fitted[name][0].detector, own_fit(name, root)
    state, expected = theirs.state_dict(), ours.state_dict()
    assert state.keys() == expected.keys()
    for key, tensor in state.items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-5, msg=key)
    if not theirs.closed_form:
        assert theirs.config == ours.config
    images = test_files(root)
    result, expected_result = theirs.score(images), ours.score(images)
    torch.testing.assert_close(result.image_score, expected_result.image_score, rtol=1e-4, atol=1e-4)
    assert torch.equal(result.class_id, expected_result.class_id)


def test_draws_of_pixels_and_several_passes_a_meta_epoch(root: Path, engine: MakeEngine) -> None:
    """Draws depend on the number of the step, and the schedule on that of the pass."""
    changes = {"pixels_per_step": 0.5, "meta_epochs": 2, "sub_epochs": 2, "clip_grad_norm": 1.0}
    model = make_model(changes=changes)
    engine(max_epochs=4).fit(model=model, datamodule=make_data(root))
    for ours, theirs in zip(own_fit("HGAD", root, changes).parameters(), model.detector.parameters(), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_the_backbone_sees_each_image_once(root: Path, engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    forward = Backbone.feature_maps
    monkeypatch.setattr(Backbone, "feature_maps", lambda self, *args: seen.append(1) or forward(self, *args))
    engine(max_epochs=3).fit(model=make_model(), datamodule=make_data(root))
    assert len(seen) == 3 * 20  # training and held-out images, validated in each epoch


def test_the_epochs_of_the_user(root: Path, engine: MakeEngine) -> None:
    """Those of the trainer are respected; without any, the method's own are taken, and not lightning's 1000."""
    changes = {"meta_epochs": 3, "sub_epochs": 2}
    for arguments, passes, shape in (
        ({"max_epochs": 1}, 1, (1, 1)),
        ({}, 6, (3, 2)),
        ({"max_epochs": 4}, 4, (2, 2)),
        ({"max_steps": 12, "max_epochs": None}, 3, (3, 1)),
    ):
        model = make_model(changes=changes)
        runner = engine(**arguments)
        runner.fit(model=model, datamodule=make_data(root))
        config = model.detector.config
        assert runner.trainer.current_epoch == passes and (config.meta_epochs, config.sub_epochs) == shape
        assert model.detector.calibration is not None
    with pytest.raises(ValueError, match="limit_train_batches is 0"):
        engine(max_epochs=1, limit_train_batches=0).fit(model=make_model(), datamodule=make_data(root))
    with pytest.raises(ValueError, match="max_epochs is -1"):
        engine(max_epochs=-1).fit(model=make_model(), datamodule=make_data(root))


def test_a_closed_form_takes_one_epoch(root: Path, engine: MakeEngine) -> None:
    for arguments in ({}, {"max_epochs": 5}):
        runner = engine(**arguments)
        runner.fit(model=make_model("PlaceGaussian"), datamodule=make_data(root))
        assert runner.trainer.current_epoch == 1 and Path(runner.best_model_path).is_file()


@pytest.mark.parametrize("name", ("HGAD", "VQFlow"))
def test_a_training_goes_on_from_a_checkpoint(name: str, root: Path, engine: MakeEngine, tmp_path: Path) -> None:
    whole, first, resumed = (make_model(name) for _ in range(3))
    every = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    engine(max_epochs=EPOCHS, callbacks=[every]).fit(model=first, datamodule=make_data(root))
    engine(max_epochs=EPOCHS).fit(model=whole, datamodule=make_data(root))
    engine(max_epochs=EPOCHS).fit(
        model=resumed, datamodule=make_data(root), ckpt_path=next(tmp_path.glob("epoch=0*.ckpt"))
    )
    for (key, tensor), expected in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-5, equal_nan=True, msg=key)


def test_callbacks_of_lightning(root: Path, engine: MakeEngine, tmp_path: Path) -> None:
    """A checkpoint is calibrated, whatever epoch it is of; the loss of held-out images can choose it."""

    class Worse(Callback):
        def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
            module.log("worse", float(trainer.current_epoch))

    best = ModelCheckpoint(dirpath=tmp_path, filename="best-{epoch}", monitor="worse", mode="min")
    by_loss = ModelCheckpoint(dirpath=tmp_path, filename="loss-{epoch}", monitor="val_loss", mode="min")
    runner = engine(max_epochs=4, callbacks=[Worse(), best, by_loss, EarlyStopping("worse", patience=2)])
    runner.fit(model=make_model(), datamodule=make_data(root))
    assert runner.trainer.current_epoch == 3  # stopped early
    assert "epoch=0" in best.best_model_path
    assert by_loss.best_model_score == min(runner.trainer.callback_metrics["val_loss"], by_loss.best_model_score)
    loaded = plugin.HGAD.load_from_checkpoint(best.best_model_path)
    assert loaded.detector.calibration is not None
    assert {"train_loss", "val_loss", "train_L_g"} <= runner.trainer.callback_metrics.keys()


@pytest.mark.parametrize("cache", ("ram", "disk", None))
def test_where_features_are_kept_changes_nothing(
    cache: str | None, root: Path, engine: MakeEngine, tmp_path: Path, fitted: dict[str, tuple[Any, Path]]
) -> None:
    model = make_model(cache=cache, cache_dir=str(tmp_path / "features") if cache == "disk" else None)
    engine(max_epochs=EPOCHS).fit(model=model, datamodule=make_data(root))
    for tensor, expected in zip(model.parameters(), fitted["HGAD"][0].parameters(), strict=True):
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-5)
    assert (tmp_path / "features").is_dir() == (cache == "disk")


def test_data_of_anomalib_with_classes_by_path(root: Path, engine: MakeEngine) -> None:
    """Of the training images of any datamodule some are held out; validation images of the test set are not used."""
    model = make_model()
    seen: list[str] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                seen.extend([*module._fitting.training.numbers, *module._fitting.held_out.numbers])

    runner = engine(max_epochs=1, callbacks=[Watch()])
    runner.fit(model=model, datamodule=make_folder(root))
    assert len(seen) == 3 * 20 and all("/train/good/" in path.replace(os.sep, "/") for path in seen)
    counts = torch.bincount(model.detector.calibration.class_ids).tolist()
    assert counts == [8, 8, 8]
    noted: list[Any] = []

    class Note(Callback):
        def on_test_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, *rest: Any) -> None:
            noted.extend(batch)

    (figures,) = engine(callbacks=[Note()]).test(model=model, datamodule=make_folder(root))
    assert noted and all(item.pred_class_name in CLASSES and 0 < item.p_value <= 1 for item in noted)
    assert {"image_AUROC", "pixel_AUROC"} <= figures.keys()


def test_augmented_images(root: Path, engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The features of their first draw are kept, with a warning; or the backbone sees each draw, also for a GPU."""
    seen: list[int] = []
    forward = Backbone.feature_maps
    monkeypatch.setattr(Backbone, "feature_maps", lambda self, *args: seen.append(1) or forward(self, *args))
    data = make_data(root, train_augmentations=RandomHorizontalFlip())
    with pytest.warns(UserWarning, match="augmented"):
        engine(max_epochs=2, limit_val_batches=0).fit(model=make_model(), datamodule=data)
    assert len(seen) == 36 + 24
    seen.clear()

    class Watch(Callback):
        fixed: bool

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            self.fixed = module._fitting.training.fixed  # what is not stays on no device

    watch = Watch()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*augmented")
        engine(max_epochs=2, limit_val_batches=0, callbacks=[watch]).fit(
            model=make_model(cache=None), datamodule=make_data(root, train_augmentations=RandomHorizontalFlip())
        )
    assert len(seen) >= 2 * 32 and not watch.fixed


@pytest.mark.parametrize(
    "arguments",
    (
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value", "precision": "bf16-mixed"},
        {"limit_train_batches": 2, "limit_val_batches": 0},
        {"val_check_interval": 0.5},
    ),
    ids=str,
)
def test_arguments_of_the_trainer(arguments: dict[str, Any], root: Path, engine: MakeEngine) -> None:
    model, runner = make_model(), engine(max_epochs=EPOCHS, **arguments)
    runner.fit(model=model, datamodule=make_data(root))
    batches = min(4, arguments.get("limit_train_batches", 4))
    steps = -(-batches // arguments.get("accumulate_grad_batches", 1))
    assert runner.trainer.global_step == EPOCHS * steps and model.detector.calibration is not None
    untouched = make_model().detector.state_dict()
    assert any(not torch.equal(tensor, untouched[key]) for key, tensor in model.detector.state_dict().items())


def test_workers(root: Path, engine: MakeEngine, fitted: dict[str, tuple[Any, Path]]) -> None:
    model = make_model()
    engine(max_epochs=EPOCHS).fit(model=model, datamodule=make_data(root, num_workers=2))
    for tensor, expected in zip(model.parameters(), fitted["HGAD"][0].parameters(), strict=True):
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-5)


def test_a_model_is_fitted_again(root: Path, engine: MakeEngine, tmp_path: Path) -> None:
    """By its own schedule, whatever that of the fit before was; with another engine, as this one counts on."""
    model = make_model(changes={"meta_epochs": 3, "sub_epochs": 2})
    runner = engine(max_epochs=1, callbacks=[ModelCheckpoint(dirpath=tmp_path, filename="first")])
    runner.fit(model=model, datamodule=make_data(root))
    with pytest.raises(ValueError, match="make a new Engine"):
        runner.fit(model=model, datamodule=make_data(root))
    engine(max_epochs=6).fit(model=model, datamodule=make_data(root))
    resumed = make_model(changes={"meta_epochs": 3, "sub_epochs": 2})
    engine(max_epochs=6).fit(model=resumed, datamodule=make_data(root), ckpt_path=tmp_path / "first.ckpt")
    for each in (model, resumed):
        assert (each.detector.config.meta_epochs, each.detector.config.sub_epochs) == (3, 2)


def test_callbacks_that_average_weights(root: Path, engine: MakeEngine) -> None:
    """The thresholds are those of the mean; and nothing resets the batch norms of the frozen backbone."""
    model = make_model()
    runner = engine(max_epochs=3, callbacks=[WeightAveraging()], limit_val_batches=0)
    runner.fit(model=model, datamodule=make_data(root))
    held_out = [Path(path) for path in make_data_set_up(root).val_data.samples.image_path]
    scores = model.detector.score(held_out, make_data_set_up(root).val_data.samples.gt_class.tolist()).image_score
    torch.testing.assert_close(scores.sort().values, model.detector.calibration.scores.sort().values)
    with pytest.raises(ValueError, match="StochasticWeightAveraging resets"):
        swa = StochasticWeightAveraging(1e-3, swa_epoch_start=1)
        engine(max_epochs=3, callbacks=[swa]).fit(model=make_model(), datamodule=make_data(root))


def make_data_set_up(root: Path) -> plugin.MultiClassFolder:
    data = make_data(root)
    data.setup()
    return data


@pytest.mark.parametrize("asked", ((3, 2), (5, 4), (11, 4), (25, 8)), ids=str)
def test_schedules(asked: tuple[int, int]) -> None:
    config = SimpleNamespace(meta_epochs=asked[0], sub_epochs=asked[1])
    assert scheduled(config, asked[0] * asked[1]) == {"meta_epochs": asked[0], "sub_epochs": asked[1]}
    for passes in range(1, 300):
        fields = scheduled(config, passes)
        meta_epochs, sub_epochs = fields["meta_epochs"], fields["sub_epochs"]
        assert meta_epochs <= asked[0] and (meta_epochs - 1) * sub_epochs < passes <= meta_epochs * sub_epochs
        assert passes > (sub_epochs - 1) * asked[0]  # of no more passes each than need be


def test_the_state_of_torch_changes_nothing(
    root: Path, engine: MakeEngine, fitted: dict[str, tuple[Any, Path]]
) -> None:
    """Features that are kept are those that are scored, whatever precision torch has been told to multiply in."""
    before = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.mkldnn.conv.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = torch.backends.mkldnn.conv.fp32_precision = "bf16"
    try:
        model = make_model()
        engine(max_epochs=EPOCHS).fit(model=model, datamodule=make_data(root))
    finally:
        torch.backends.mkldnn.matmul.fp32_precision, torch.backends.mkldnn.conv.fp32_precision = before
    scores, expected = (m.detector.calibration.scores for m in (model, fitted["HGAD"][0]))
    torch.testing.assert_close(scores, expected, rtol=0, atol=0)


def test_a_loss_that_is_no_number_stops_the_training(root: Path, engine: MakeEngine) -> None:
    model = make_model(changes={"lr": 1e30})
    with pytest.raises(NonFiniteLossError, match="Lower lr|lower lr"):
        engine(max_epochs=EPOCHS).fit(model=model, datamodule=make_data(root))


# ------------------------------------------------------------------------------------------------ scoring


def on_unit_scale(scores: Tensor, thresholds: Tensor, name: str) -> Tensor:
    """Return scores on anomalib's scale, in float64: by their quotient, or of a signed score by its distance."""
    if name == "PlaceGaussian":
        above = scores.double() - thresholds
        return torch.where(above > 0, (1 + above) / (2 + above), 1 / (2 - above))
    return scores.double() / (thresholds + scores.double())


@pytest.mark.parametrize("name", NAMES)
def test_predictions_are_those_of_the_library(
    name: str, root: Path, engine: MakeEngine, fitted: dict[str, tuple[Any, Path]]
) -> None:
    model, _ = fitted[name]
    batches = engine().predict(model=model, datamodule=make_data(root))
    assert [path for batch in batches for path in batch.image_path] == [str(path) for path in test_files(root)]
    for batch in batches:
        result = model.detector.score([Path(path) for path in batch.image_path], map_size="seen")
        expected = on_unit_scale(result.image_score, result.threshold, name)
        torch.testing.assert_close(batch.pred_score.double(), expected, rtol=0, atol=1e-6)
        assert torch.equal(batch.pred_label, result.is_anomalous)
        assert torch.equal(batch.pred_class, result.class_id) and torch.equal(batch.p_value, result.p_value)
        assert batch.pred_class_name == [model.detector.groups[k] for k in result.class_id]
        height, width = batch.image.shape[-2:]
        assert batch.anomaly_map.shape == batch.gt_mask.shape == (len(batch.image), height, width)
        expected_maps = on_unit_scale(torch.as_tensor(result.anomaly_map), result.threshold[:, None, None], name)
        torch.testing.assert_close(batch.anomaly_map.double(), expected_maps, rtol=0, atol=1e-6)
        (item, *_) = list(batch)
        assert item.p_value == batch.p_value[0] and item.pred_class_name == batch.pred_class_name[0]


def test_paths_and_loaders_of_others_are_predicted_with_classes(
    root: Path, engine: MakeEngine, fitted: dict[str, tuple[Any, Path]]
) -> None:
    model, _ = fitted["HGAD"]
    expected = engine().predict(model=model, datamodule=make_data(root, eval_batch_size=1))
    by_path = {batch.image_path[0]: batch for batch in expected}
    for data in ({"data_path": root / "steel" / "test"}, {"dataset": PredictDataset(root / "steel" / "test")}):
        batches = engine().predict(model=model, **data)
        assert len(batches) == 6
        for batch in batches:
            own = by_path[batch.image_path[0]]
            assert isinstance(batch, plugin.MultiClassBatch) and batch.pred_class_name == own.pred_class_name
            torch.testing.assert_close(batch.pred_score, own.pred_score, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_the_model(
    name: str, root: Path, engine: MakeEngine, fitted: dict[str, tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is loaded safely, also into a model of other settings; weights of the backbone need not be at hand."""
    model, checkpoint = fitted[name]
    images = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(1))
    expected = model.eval()(images)
    loaded = type(model).load_from_checkpoint(checkpoint, weights_only=True).eval()
    assert loaded.detector.config == model.detector.config
    for actual, wanted in zip(loaded(images), expected, strict=True):
        assert torch.equal(actual, wanted)
    blank = getattr(plugin, name)()
    before = engine().predict(model=model, datamodule=make_data(root))
    after = engine().predict(model=blank, datamodule=make_data(root), ckpt_path=checkpoint)
    for batch, wanted in zip(after, before, strict=True):
        assert torch.equal(batch.pred_score, wanted.pred_score) and batch.image_path == wanted.image_path


def test_a_checkpoint_of_another_model(
    root: Path, engine: MakeEngine, fitted: dict[str, tuple[Any, Path]], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="holds a model of the method 'hgad', and the model is one of"):
        engine().test(model=plugin.VQFlow(), datamodule=make_data(root), ckpt_path=fitted["HGAD"][1])
    content = torch.load(fitted["HGAD"][1], weights_only=True)
    del content["hgad_fast"]
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="none of hgad_fast"):
        plugin.HGAD.load_from_checkpoint(tmp_path / "other.ckpt")


def test_components_of_the_user(root: Path, engine: MakeEngine, fitted: dict[str, tuple[Any, Path]]) -> None:
    """Without a pre-processor the model resizes by itself, and without a post-processor scores are multiples."""
    own = fitted["HGAD"][0]
    bare = plugin.HGAD.from_detector(own.detector, pre_processor=False, post_processor=False, visualizer=False)
    for batch, expected in zip(
        engine().predict(model=bare, datamodule=make_data(root)),
        engine().predict(model=own, datamodule=make_data(root)),
        strict=True,
    ):
        assert batch.image.shape[-2:] == batch.anomaly_map.shape[-2:] == (48, 72) and batch.pred_label is None
        x = batch.pred_score
        torch.testing.assert_close(x / (1 + x), expected.pred_score, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="post_processor is a PostProcessor"):
        make_model(post_processor=PostProcessor())
    with pytest.raises(ValueError, match="takes a model of the method 'vqflow', and this is 'hgad'"):
        plugin.VQFlow.from_detector(own.detector)


def test_other_views_of_images_are_refused(root: Path, engine: MakeEngine, fitted: dict[str, tuple[Any, Path]]) -> None:
    """What a pre-processor does in testing alone, training and exported files would not do."""
    for pre_processor in (PreProcessor(Compose([Resize((32, 32)), Normalize([0.5] * 3, [0.5] * 3)])), "yes"):
        with pytest.raises(ValueError, match="pre_processor is a"):
            make_model(pre_processor=pre_processor)
    with pytest.raises(ValueError, match="pre_processor has View\\(img_size=24"):
        make_model(pre_processor=plugin.SeenPreProcessor(View(24)))
    assert make_model(pre_processor=plugin.SeenPreProcessor(View(32))).pre_processor.view == View(32)
    images = torch.rand(2, 3, 48, 72, generator=torch.Generator().manual_seed(1))
    model = fitted["HGAD"][0].eval()
    for wrong in (255 * images, images - 0.5, torch.full_like(images, math.nan)):
        with pytest.raises(ValueError, match="takes \\(3, H, W\\) in \\[0, 1\\]"):
            model(wrong)
    words = (255 * images).round().to(torch.uint8)
    assert torch.equal(model(words).pred_score, model(words.float() / 255).pred_score)
    model(images * (1 + 2**-20))  # by which torch's own resizing exceeds 1
    data = make_data(root, test_augmentations=Normalize([0.5] * 3, [0.5] * 3))
    with pytest.raises(ValueError, match="leave Normalize out"):
        engine().test(model=fitted["HGAD"][0], datamodule=data)


@pytest.mark.parametrize("name", NAMES)
def test_the_torch_inferencer(
    name: str,
    root: Path,
    engine: MakeEngine,
    fitted: dict[str, tuple[Any, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, _ = fitted[name]
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    path = engine().export(model=model, export_type=ExportType.TORCH, export_root=tmp_path)
    inferencer = TorchInferencer(path, device="cpu")
    for batch in engine().predict(model=model, datamodule=make_data(root)):
        for item in batch:
            result = inferencer.predict(item.image_path)
            torch.testing.assert_close(result.pred_score[0], item.pred_score, rtol=0, atol=1e-5)
            torch.testing.assert_close(result.anomaly_map[0], item.anomaly_map, rtol=0, atol=1e-5)
            assert bool(result.pred_label[0]) == bool(item.pred_label)


@pytest.mark.parametrize("name", NAMES)
def test_exported_files_predict_what_the_engine_predicts(
    name: str,
    root: Path,
    engine: MakeEngine,
    fitted: dict[str, tuple[Any, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ONNX by onnxruntime and OpenVINO by its inferencer, from image files of their own size: same verdicts."""
    model, _ = fitted[name]
    batches = engine().predict(model=model, datamodule=make_data(root))
    onnx = engine().export(model=model, export_type=ExportType.ONNX, export_root=tmp_path)
    xml = engine().export(model=model, export_type=ExportType.OPENVINO, export_root=tmp_path)
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    for batch in batches:
        images = np.stack([read_image(path).numpy() for path in batch.image_path])
        names = [output.name for output in session.get_outputs()]
        outputs = dict(zip(names, session.run(None, {"input": images}), strict=True))
        assert_predicts(outputs, batch)
    monkeypatch.chdir(tmp_path)  # the inferencer keeps a cache in the working folder
    inferencer = OpenVINOInferencer(xml, device="CPU", config={"INFERENCE_PRECISION_HINT": "f32"})
    for item in batches[0]:
        prediction = inferencer.predict(item.image_path)
        fields = ("pred_score", "pred_label", "anomaly_map", "pred_mask")
        outputs = {field: np.asarray(getattr(prediction, field)).reshape(1, -1) for field in fields}
        assert_predicts(outputs, MultiClassBatch.collate([item]))


def assert_predicts(outputs: dict[str, np.ndarray], batch: Any) -> None:
    """Check the outputs of an exported file against a batch of the engine."""
    for value, verdict in (("pred_score", "pred_label"), ("anomaly_map", "pred_mask")):
        expected = getattr(batch, value).flatten()
        torch.testing.assert_close(torch.from_numpy(outputs[value]).flatten(), expected, rtol=0, atol=1e-4)
        decided = (expected - 0.5).abs() > 1e-4
        same = torch.from_numpy(outputs[verdict]).flatten().bool() == getattr(batch, verdict).flatten().bool()
        assert bool(same[decided].all())


def test_the_scale_and_the_size_of_exported_files(
    root: Path, engine: MakeEngine, fitted: dict[str, tuple[Any, Path]], tmp_path: Path
) -> None:
    own = fitted["HGAD"][0]
    bare = plugin.HGAD.from_detector(own.detector, post_processor=False)
    path = bare.to_onnx(tmp_path / "bare", "bare", input_size=(48, 72), input_names=["image"])
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["pred_score", "anomaly_map"]
    assert session.get_inputs()[0].name == "image" and session.get_inputs()[0].shape[1:] == [3, 48, 72]
    with pytest.raises(ValueError, match="give input_size=") as error:  # it does not know the training images
        bare.to_onnx(tmp_path / "bare")
    assert "several sizes" in str(error.value)
    with pytest.raises(ValueError, match="opset 20"):
        own.to_onnx(tmp_path, opset_version=14)
    with pytest.raises(ValueError, match="do_constant_folding"):
        own.to_onnx(tmp_path, do_constant_folding=True)
    with pytest.raises(ValueError, match="the model is not trained"):
        make_model().to_onnx(tmp_path)


def test_figures_are_those_of_the_library(root: Path, engine: MakeEngine, fitted: dict[str, tuple[Any, Path]]) -> None:
    """anomalib's AUROC and AUPRO of what the engine scores are ours: of all images, and of each class by itself.

    Of a class they are those of an evaluation by the library, as far as all its images are taken for the same class:
    thresholds differ between classes, and so do the scales of their scores.
    """
    compared: list[str] = []
    for name in NAMES:
        model = type(fitted[name][0]).from_detector(fitted[name][0].detector, evaluator=anomalibs_metrics())
        evaluated = evaluate(model.detector, root, details=False).to_dict(details=False)["protocols"]["honest"]
        for folder in (root, *(root / name for name in CLASSES)):
            (theirs,) = engine().test(model=model, datamodule=make_data(folder))
            batches = engine().predict(model=model, datamodule=make_data(folder))
            labels, scores = (torch.cat([getattr(b, field) for b in batches]) for field in ("gt_label", "pred_score"))
            masks, maps = (torch.cat([getattr(b, field) for b in batches]) for field in ("gt_mask", "anomaly_map"))
            ours = {"image_AUROC": metrics.auroc(scores, labels)}
            pixels = metrics.pixel_metrics(maps.numpy(), masks.bool().numpy())
            ours |= {"pixel_AUROC": pixels["auroc"], "pixel_AUPRO": pixels["aupro_0.3"]}
            if folder != root and len(torch.cat([b.pred_class for b in batches]).unique()) == 1:
                compared.append(name)
                own = evaluated["classes"][folder.name]
                ours |= {"image_AUROC": own["image_auroc"], "pixel_AUROC": own["pixel_auroc"]}
                ours |= {"pixel_AUPRO": own["pixel_aupro_30"]}
            for figure, value in ours.items():
                assert theirs[figure] == pytest.approx(value, abs=1e-4), (name, folder.name, figure)
    assert compared.count("PlaceGaussian") == 3  # it takes no image for one of another class


def anomalibs_metrics() -> Evaluator:
    return Evaluator(
        test_metrics=[
            AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
            AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_"),
            AUPRO(fields=["anomaly_map", "gt_mask"], prefix="pixel_"),
        ]
    )


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("precision", ("64-true", "16-true", "bf16-true"))
def test_precision(precision: str, root: Path, engine: MakeEngine) -> None:
    with pytest.raises(ValueError, match="allows '32-true' and 'bf16-mixed'"):
        engine(precision=precision, max_epochs=1).fit(model=make_model(), datamodule=make_data(root))


def test_bf16_is_that_of_the_library(root: Path, engine: MakeEngine) -> None:
    model = make_model()
    engine(precision="bf16-mixed", max_epochs=1).fit(model=model, datamodule=make_data(root))
    assert model.detector.precision == "bf16" and all(p.dtype == torch.float32 for p in model.parameters())
    with pytest.raises(ValueError, match="VQFlow computes in float32, and allows '32-true'"):
        engine(precision="bf16-mixed", max_epochs=1).fit(model=make_model("VQFlow"), datamodule=make_data(root))


def test_tiles_point_to_native_sizes(root: Path, engine: MakeEngine) -> None:
    tiles = TilerConfigurationCallback(enable=True, tile_size=16, stride=16)
    with pytest.raises(ValueError, match="native"):
        engine(max_epochs=1, callbacks=[tiles]).fit(model=make_model(), datamodule=make_data(root))


def test_devices(root: Path) -> None:
    """Several are refused by name, and so are those that nobody has tried."""
    for device, world_size, message in (
        ("cpu", 2, "2 devices: HGAD is fitted on one here, devices=1"),
        ("mps", 1, "the accelerator is 'mps'; allowed are cpu and cuda"),
    ):
        model = make_model()
        strategy = SimpleNamespace(root_device=torch.device(device))
        model._trainer = SimpleNamespace(
            strategy=strategy, precision="32-true", world_size=world_size, datamodule=None, current_epoch=0
        )
        with pytest.raises(ValueError, match=message):
            model.setup("fit")


def test_classes(root: Path, engine: MakeEngine) -> None:
    model = make_model(classes=None)
    engine(max_epochs=1).fit(model=model, datamodule=make_data(root))
    assert model.class_names == CLASSES and list(model.hparams["classes"]) == list(CLASSES)
    for classes in (["a", "b", "c"], ["cloth", "steel"], ["steel", "cloth", "wood"]):
        with pytest.raises(ValueError, match="has the classes cloth, steel, wood, and the model"):
            engine(max_epochs=1).fit(model=make_model(classes=classes), datamodule=make_data(root))
    with pytest.raises(ValueError, match="classes is None"):
        engine(max_epochs=1).fit(model=make_model(classes=None), datamodule=make_folder(root))
    with pytest.raises(ValueError, match="no folder in this path has the name of a class"):
        engine(max_epochs=1).fit(model=make_model(classes=["a", "b", "c"]), datamodule=make_folder(root))
    with pytest.raises(ValueError, match="pass a sequence of names"):
        make_model(classes="cloth")


def test_the_class_in_a_path() -> None:
    model = plugin.HGAD(classes=["good", "train", "cloth"], **BACKBONE, settings=settings("HGAD"))
    for path, name in (
        ("/data/train/cloth/train/good/1.png", "cloth"),
        ("/good/test/bad/1.png", "good"),
        ("/x/train/test/good/1.png", "train"),
        ("/x/cloth/1.png", "cloth"),
    ):
        assert model.class_names[model.class_of(path)] == name, path


def test_arguments_that_cannot_be() -> None:
    for arguments, message in (
        ({"cache": "cloud"}, "cache is 'cloud'"),
        ({"cache": "disk"}, "give cache_dir"),
        ({"false_alarm_rate": 1.0}, "false_alarm_rate"),
        ({"preset": "unknown"}, "has no preset 'unknown'"),
        ({"settings": {"lr": -1.0}}, "lr"),
        ({"settings": {"learning_rate": 1.0}}, "learning_rate"),
    ):
        with pytest.raises(ValueError, match=message):
            plugin.HGAD(classes=["a"], **arguments)


def test_what_is_not_trained_does_not_score(root: Path, engine: MakeEngine) -> None:
    with pytest.raises(ValueError, match="the model is not trained"):
        engine().test(model=make_model(), datamodule=make_data(root))
    with pytest.raises(ValueError, match="classes are not known"):
        _ = plugin.HGAD().detector


def test_a_class_without_held_out_images(tmp_path: Path, engine: MakeEngine) -> None:
    root = small_plugin.write_dataset(tmp_path / "few", train=1)
    with pytest.raises(ValueError, match="held out"):
        engine(max_epochs=1).fit(model=make_model(), datamodule=make_data(root))


def test_disk_needs_files_as_they_are(root: Path, engine: MakeEngine, tmp_path: Path) -> None:
    model = make_model(cache="disk", cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match="take cache='ram'"):
        engine(max_epochs=1).fit(model=model, datamodule=make_folder(root))


def test_images_are_not_stretched_to_fit_into_a_batch(
    root: Path, tmp_path: Path, engine: MakeEngine, fitted: dict[str, tuple[Any, Path]]
) -> None:
    """As anomalib's own data do; MultiClassFolder begins a new batch."""
    for name, size in (("wide", (48, 72)), ("high", (72, 48))):
        small_plugin.write_dataset(tmp_path / name, size, train=2)
    loader = torch.utils.data.DataLoader(
        PredictDataset(tmp_path), batch_size=20, collate_fn=PredictDataset(tmp_path).collate_fn
    )
    with pytest.raises(ValueError, match="was stretched"):
        engine().predict(model=fitted["HGAD"][0], dataloaders=loader)
