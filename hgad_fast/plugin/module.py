"""The models of this library as models of anomalib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from anomalib import LearningType
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from .. import methods
from ..files import printable
from ..models.detector import Detector
from ..scoring.calibration import check_false_alarm_rate, split
from ..scoring.result import ScoreResult
from ..scoring.score import score_prepared
from ..training.display import Display
from ..training.fit import FETCH_EVERY
from ..training.step import exactly, make_optimizer
from .batch import MultiClassBatch
from .checkpoint import KEY, restored, stored
from .classes import class_in
from .data import MultiClassDataset, MultiClassFolder
from .exporting import common_size, export_options
from .features import Keeping, PathFeatures, path_features
from .graph import write_onnx
from .predictor import Predictor, joined, paths_of, require_proportions
from .processing import SeenPreProcessor, ThresholdPostProcessor, View
from .schedule import MethodSchedule, passes_of, progress_at, scheduled
from .training import Fitting, require_finite

DEVICES = ("cpu", "cuda")
PRECISIONS = ("32-true", "bf16-mixed")


class DetectorModule(AnomalibModule):
    """A model of this library in anomalib: one model for all classes.

    Each epoch is a pass over the training images. The schedule of the method follows the number of epochs of the
    trainer; where that is not given, it is the method's own. The backbone is frozen and sees each image once, before
    the first step: its features are kept, by the path of the image.

    Thresholds are those of the library: they rest on normal images that are held out of the training images, never on
    test images, and there is one for each class, for a target false-alarm rate. Scores are in (0, 1), 0.5 is the
    threshold of every class.

    Attributes:
        detector: the model of the library, e.g. to save it: ``model.detector.save("model.safetensors")``.
    """

    method: ClassVar[str]

    def __init__(
        self,
        classes: Sequence[str] | None = None,
        preset: str | None = None,
        backbone: str | None = None,
        backbone_weights: str | None = None,
        img_size: int | str | None = None,
        settings: dict[str, Any] | None = None,
        false_alarm_rate: float = 0.01,
        seed: int = 0,
        cache: str | None = "ram",
        cache_dir: str | None = None,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Any = True,
        visualizer: Any = True,
    ) -> None:
        """Make a model.

        Args:
            classes: the names of the classes. The class of a training image is what a `MultiClassFolder` says, or else
                the name in its path: that of the folder before train or test, or the innermost one that is the name of
                a class. None: those of the data that the model is fitted to.
            preset: a preset of the method (`hgad-fast presets` lists them); None: the method's defaults.
            backbone: a model of timm; None: that of the preset.
            backbone_weights: ``"pretrained"`` (timm's hub), ``"packaged"``, or a file; None: those of the preset.
            img_size: short side at which images are seen, in pixels, or ``"native"``; None: that of the preset.
            settings: further fields of the method's configuration, such as ``{"coupling_layers": 8}``.
            false_alarm_rate: target false-alarm rate, the share of normal images that may be called anomalous.
            seed: of initial weights, order and split.
            cache: where features are kept: ``"ram"``, ``"disk"`` (of a `MultiClassFolder`), or None: they are computed
                in each epoch.
            cache_dir: the folder of ``"disk"``, which `hgad-fast train` may use, too.
            pre_processor: True, or False: images are resized in the model alone, and not by the workers that read them.
            post_processor: True, False (scores are multiples of the threshold), or a `ThresholdPostProcessor`.
            evaluator: as in any model of anomalib.
            visualizer: as in any model of anomalib.

        Raises:
            ValueError: an argument has a value that cannot work.
        """
        if isinstance(post_processor, PostProcessor) and not isinstance(post_processor, ThresholdPostProcessor):
            raise ValueError(
                f"post_processor is a {type(post_processor).__name__}, which would learn thresholds from validation, "
                "and the model has its own: take hgad_fast.anomalib.ThresholdPostProcessor; it has sensitivities, too"
            )
        if not isinstance(pre_processor, (bool, SeenPreProcessor)):
            raise ValueError(
                f"pre_processor is a {type(pre_processor).__name__}; the model sees images as the library does, in "
                "training, scoring and export alike: leave it True, and set img_size, or in settings center_crop"
            )
        if cache not in ("ram", "disk", None):
            raise ValueError(f"cache is {cache!r}; allowed are 'ram', 'disk' and None")
        if cache == "disk" and cache_dir is None:
            raise ValueError("cache='disk' needs a folder: give cache_dir")
        check_false_alarm_rate(false_alarm_rate)
        if isinstance(classes, str):
            raise ValueError(f"classes is {classes!r}; pass a sequence of names, such as [{classes!r}]")
        super().__init__(
            pre_processor=False,  # it needs the configuration
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        given = {"backbone_arch": backbone, "backbone_weights": backbone_weights, "img_size": img_size}
        self._fields = {name: value for name, value in given.items() if value is not None}
        self._fields |= {"seed": seed, **(settings or {})}
        self._preset, self._cache, self._cache_dir = preset, cache, cache_dir
        self.false_alarm_rate = false_alarm_rate
        self.model = Predictor()
        self.seen_size: tuple[int, int] | None = None  # of the training images, where they have one in common
        self._class_ids: dict[str, int] = {}  # of the images of a `MultiClassFolder`, by their paths
        self._fitting: Fitting | None = None
        self._sanity_steps = 0  # those of the trainer
        self._asked = self._configured(tuple(classes) if classes is not None else ("any",))
        self._has_classes = classes is not None
        view = View.of(self._asked)
        if isinstance(pre_processor, SeenPreProcessor) and pre_processor.view != view:
            raise ValueError(f"pre_processor has {pre_processor.view}, and the model {view}: set img_size or settings")
        if pre_processor is not False:
            self.pre_processor = SeenPreProcessor(view)

    @classmethod
    def from_detector(cls, detector: Any, **options: Any) -> DetectorModule:
        """Return a model of the library as a model of anomalib, to test, to predict or to export with it.

        Args:
            detector: a model of the library, of this method.
            options: pre_processor, post_processor, evaluator, visualizer.

        Raises:
            ValueError: it is of another method.
        """
        if not isinstance(detector, Detector) or detector.config.method != cls.method:
            what = detector.config.method if isinstance(detector, Detector) else type(detector).__name__
            raise ValueError(f"{cls.__name__} takes a model of the method {cls.method!r}, and this is {what!r}")
        model = cls(classes=detector.class_names, **options)
        model._asked = detector.config
        model._take(detector)
        return model

    @property
    def detector(self) -> Any:
        """The model of the library; it is made when it is first needed.

        Raises:
            ValueError: the classes are not known yet.
        """
        if self.model.detector is None:
            if not self._has_classes:
                raise ValueError("the classes are not known before the model is fitted: pass classes=[...]")
            self._take(methods.METHODS[self.method](self._asked))
        return self.model.detector

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes; empty before they are known."""
        return self.detector.class_names if self._has_classes else ()

    @property
    def own_batch_size(self) -> int:
        """The number of images of a training batch that the configuration asks for."""
        return self._asked.batch_size

    def _configured(self, classes: tuple[str, ...]) -> Any:
        """Return the configuration for these classes."""
        config_class = methods.METHODS[self.method].config_class
        fields = self._fields | {"n_classes": len(classes), "class_names": classes}
        return config_class.from_fields(fields) if self._preset is None else config_class.preset(self._preset, **fields)

    def _take(self, detector: Detector) -> None:
        """Take over a detector, and see images as it does."""
        self.model.detector = detector.to(self.device)
        self._has_classes = True
        if isinstance(self.pre_processor, SeenPreProcessor):
            self.pre_processor.view = View.of(detector.config)

    # ---- what anomalib asks for

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """None: anomalib would set them over those that the user gave."""
        return {}

    @property
    def learning_type(self) -> LearningType:
        """Of normal images alone."""
        return LearningType.ONE_CLASS

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> SeenPreProcessor:
        """Return a pre-processor that shows images at the short side of `image_size`, in their proportions.

        Raises:
            ValueError: there is no size.
        """
        if image_size is None:
            raise ValueError("image_size is None: a model makes the pre-processor of its own img_size by itself")
        return SeenPreProcessor(View(min(image_size)))

    def configure_post_processor(self) -> ThresholdPostProcessor:
        """Return the post-processor with the threshold at 0.5."""
        return ThresholdPostProcessor()

    @property
    def trainer(self) -> Any:
        """The trainer that the model is attached to."""
        return LightningModule.trainer.fget(self)

    @trainer.setter
    def trainer(self, trainer: Any) -> None:
        """Attach a trainer. One that is to fit the model, and has no limit, gets the method's own number of epochs.

        lightning would take 1000 for it a moment later, and these could not be told from 1000 that were asked for.
        """
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            loop = trainer.fit_loop
            if loop.max_epochs is None and trainer.max_steps == -1:
                closed_form = methods.METHODS[self.method].closed_form
                loop.max_epochs = 1 if closed_form else passes_of(self._asked)
        LightningModule.trainer.fset(self, trainer)

    def configure_callbacks(self) -> Any:
        """Return the callbacks of the model; its parameters are there before any callback is set up to train them.

        Raises:
            ValueError: neither the model nor the data say which classes there are.
        """
        if self.trainer.state.fn == TrainerFn.FITTING:
            if not self._has_classes:
                self._take_classes(self.trainer.datamodule)
            _ = self.detector
        return super().configure_callbacks()

    def _take_classes(self, datamodule: Any) -> None:
        """Take the classes of the data, or the one category of a datamodule of anomalib."""
        names = getattr(datamodule, "class_names", None) or (getattr(datamodule, "category", ""),)
        if not all(names):
            raise ValueError(f"classes is None, and {type(datamodule).__name__} names none: pass classes=[...]")
        self._asked = self._configured(tuple(names))
        self._has_classes = True
        self.hparams["classes"] = list(names)

    def setup(self, stage: str) -> None:
        """Check what the trainer is asked for, and that data and model are of the same classes.

        Raises:
            ValueError: precision or devices are not possible, or the data are of other classes.
        """
        trainer = self.trainer
        self._let_go()  # of what a training has left that ended in an error
        device = trainer.strategy.root_device.type
        if device not in DEVICES:
            raise ValueError(f"the accelerator is {device!r}; allowed are cpu and cuda (--trainer.accelerator cpu)")
        precision = str(trainer.precision)
        if precision not in PRECISIONS or (precision == "bf16-mixed" and self.method != "hgad"):
            allowed = "'32-true' and 'bf16-mixed'" if self.method == "hgad" else "'32-true'"
            raise ValueError(
                f"precision is {precision!r}; {type(self).__name__} computes in float32, and allows {allowed} "
                "(--trainer.precision)"
            )
        if stage != "fit":
            return
        if trainer.world_size > 1:
            raise ValueError(
                f"{trainer.world_size} devices: {type(self).__name__} is fitted on one here, devices=1 "
                "(--trainer.devices 1); the library trains on several: torchrun --nproc-per-node N -m hgad_fast train"
            )
        if any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks):
            raise ValueError(
                "StochasticWeightAveraging resets the statistics of batch norms, those of the backbone too, which is "
                "frozen: take lightning's WeightAveraging or EMAWeightAveraging"
            )
        if trainer.current_epoch:
            raise ValueError("this Engine has fitted before, and goes on counting its epochs: make a new Engine()")
        self._sanity_steps, trainer.num_sanity_val_steps = trainer.num_sanity_val_steps, 0  # nothing to validate yet
        datamodule = trainer.datamodule
        if isinstance(datamodule, MultiClassFolder):
            datamodule.train_data.needs_images = False  # workers read the first batches before `on_train_start`
            for subset in (datamodule.train_data, datamodule.val_data):
                self._class_ids |= subset.class_ids
            if self.class_names != datamodule.class_names:
                root, names = printable(str(datamodule.dataset.root)), ", ".join(datamodule.class_names)
                raise ValueError(
                    f"{root} has the classes {names}, and the model "
                    f"{', '.join(self.class_names)}; pass classes=data.class_names, in its order"
                )

    def on_fit_start(self) -> None:
        """Take over the precision of the trainer."""
        if self.method == "hgad":
            mixed = str(self.trainer.precision) == "bf16-mixed"
            self.detector.precision = "bf16" if mixed else self._asked.precision

    def configure_optimizers(self) -> Any:
        """Return Adam as the method has it, with its learning rates; None where it has a closed form.

        Raises:
            ValueError: the number of epochs has no end.
        """
        trainer, detector = self.trainer, self.detector
        if detector.closed_form:
            return None
        trainer.fit_loop.setup_data()  # lightning counts the batches of an epoch there
        if trainer.num_training_batches in (0, float("inf")):  # the latter where lightning has not looked
            raise ValueError("there are no training batches: limit_train_batches is 0, or there are too few images")
        steps = trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("max_epochs is -1: the learning rate falls towards an end; give max_epochs or max_steps")
        steps_of_pass = -(-trainer.num_training_batches // trainer.accumulate_grad_batches)
        schedule_fields = scheduled(self._asked, -(-steps // steps_of_pass))
        batch_size = getattr(trainer.train_dataloader, "batch_size", None)
        if batch_size is None:
            batch_size = getattr(getattr(trainer.train_dataloader, "batch_sampler", None), "batch_size", None)
        detector.config = detector.config.replace(**schedule_fields, batch_size=batch_size or self.own_batch_size)
        if detector.config.accumulate > 1:
            raise ValueError(
                f"accumulate is {detector.config.accumulate}: in anomalib the trainer accumulates batches; leave it 1, "
                "and give accumulate_grad_batches (--trainer.accumulate_grad_batches)"
            )
        optimizer = make_optimizer(detector)
        schedule = MethodSchedule(optimizer, detector, steps_of_pass)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ---- training

    def on_train_start(self) -> None:
        """Take the features of all images, and what the method takes from them before the first step."""
        trainer, detector = self.trainer, self.detector
        loader = trainer.train_dataloader
        if not hasattr(loader, "dataset"):
            raise ValueError(f"the training images come as a {type(loader).__name__}; pass one DataLoader of a dataset")
        dataset = loader.dataset
        if isinstance(dataset, MultiClassDataset):
            detector.config = detector.config.replace(white_level=dataset.white_level)
        with Display(None if self._shows_progress else False) as display:
            workers = loader.num_workers
            keeping = Keeping(self._cache, self._cache_dir, workers, display.track, display.say)
            training = path_features(detector, dataset, self.class_of, keeping)
            separate = self._held_out_dataset()
            if separate is not None:
                held_out = path_features(detector, separate, self.class_of, keeping)
            else:
                training, held_out = self._divided(training)
            if detector.closed_form:
                display.say("fitting")
            self._fitting = Fitting(detector, training, held_out, self.false_alarm_rate, trainer.global_step > 0)
        self.seen_size = common_size(training.numbers, detector.config)
        if isinstance(dataset, MultiClassDataset):
            dataset.needs_images = False
        detector.train()

    @property
    def _shows_progress(self) -> bool:
        return self.trainer.progress_bar_callback is not None and self.trainer.is_global_zero

    def _held_out_dataset(self) -> MultiClassDataset | None:
        """Return the validation images, if they are normal images of a `MultiClassFolder`; None where they are not."""
        loaders = self.trainer.val_dataloaders
        loaders = loaders if isinstance(loaders, (list, tuple)) else [loaders]
        datasets = [getattr(self.trainer.datamodule, "val_data", None)]
        datasets += [getattr(loader, "dataset", None) for loader in loaders]
        for dataset in datasets:
            if isinstance(dataset, MultiClassDataset) and len(dataset) and not dataset.has_anomalous:
                return dataset
        return None

    def _divided(self, images: PathFeatures) -> tuple[PathFeatures, PathFeatures]:
        """Return the images that are trained on, and those that are held out."""
        config = self.detector.config
        rows, held_out = split(images.features.class_ids, config.calibration_fraction, config.seed)
        return images.subset(rows), images.subset(held_out)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Return the loss of a batch, by the features of its images; None where all of them are held out."""
        if self.detector.closed_form:
            return torch.zeros((), device=self.device, requires_grad=True)
        trainer, fitting = self.trainer, self._required_fitting()
        batches = trainer.num_training_batches
        progress = progress_at(self.detector.config, self.current_epoch, batch_idx, batches)
        step = self.current_epoch * batches + batch_idx
        outcome = fitting.loss(paths_of(batch), progress, step)
        if outcome is None:
            return None
        loss, terms = outcome
        if step % FETCH_EVERY == 0 or batch_idx == batches - 1 or self.device.type == "cpu":
            require_finite(terms, step, self.detector.config.lr)
        size = len(batch.image_path)
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, prog_bar=True, batch_size=size)
        named = {f"train_{name}": of_levels.mean() for name, of_levels in terms.items()}
        self.log_dict(named, on_step=False, on_epoch=True, batch_size=size)
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients, rounded as the loss was."""
        with exactly(loss.device.type):
            loss.backward(*args, **kwargs)

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients as the trainer is told to, or else as the method does (``clip_grad_norm``)."""
        everything = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = self.detector.config.clip_grad_norm
        if gradient_clip_val and gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(everything, gradient_clip_val)
        elif gradient_clip_val:
            nn.utils.clip_grad_norm_(everything, gradient_clip_val)
        elif norm is not None:
            for parameters in self.detector.clip_groups():
                nn.utils.clip_grad_norm_(parameters, norm)

    def on_train_epoch_end(self) -> None:
        """Stop after the first epoch where there is a closed form."""
        if self.detector.closed_form:
            self.trainer.should_stop = True

    def on_train_end(self) -> None:
        """Calibrate the trained model."""
        # callbacks may have put other weights in, such as means over the steps
        self._required_fitting().bring_up_to_date(self.trainer.global_step, again=not self.detector.closed_form)
        self._required_fitting().end()
        self.detector.eval()

    def teardown(self, stage: str) -> None:
        """Let go of features, and give images back to the datasets."""
        self._let_go()
        if stage == "fit":
            self.trainer.num_sanity_val_steps = self._sanity_steps
        dataset = getattr(self.trainer.train_dataloader, "dataset", None)
        if isinstance(dataset, MultiClassDataset):
            dataset.needs_images = True

    def _let_go(self) -> None:
        if self._fitting is not None:
            self._fitting.feed.clear()
        self._fitting = None

    def _required_fitting(self) -> Fitting:
        assert self._fitting is not None, "lightning calls on_train_start first"
        return self._fitting

    def class_of(self, path: str) -> int:
        """Return the number of the class of an image.

        Args:
            path: as batches have it in `image_path`.

        Raises:
            ValueError: the path does not tell.
        """
        if path in self._class_ids:
            return self._class_ids[path]
        return class_in(path, self.class_names)

    # ---- scoring

    def on_validation_epoch_start(self) -> None:
        """Calibrate the model as it is in the midst of a training."""
        if self._fitting is not None:
            self._fitting.bring_up_to_date(self.trainer.global_step)

    def validation_step(self, batch: Any, batch_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Score a batch; in a training by the features of the held-out images, and with their loss, `val_loss`."""
        fitting, paths = self._fitting, paths_of(batch)
        if fitting is None or (self.detector.config.center_crop and self.pre_processor is None):
            return self._predicted(batch, self._scored(batch))
        if not self.detector.closed_form:
            number = min(self.current_epoch, passes_of(self.detector.config) - 1)
            loss = fitting.held_out_loss(paths, progress_at(self.detector.config, number, 0, 1))
            if loss is not None:
                self.log("val_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(paths))
        require_proportions(batch, self.detector.config)
        height, width = batch.image.shape[-2:]
        features = fitting.features(paths, batch.image, keep=self._cache is not None)
        results = [score_prepared(self.detector, levels, map_size=(height, width)) for levels in features]
        return self._predicted(batch, joined(results))

    def test_step(self, batch: Any, batch_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Score a batch."""
        return self._predicted(batch, self._scored(batch))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Return a batch with its scores."""
        return self._predicted(batch, self._scored(batch))

    def _scored(self, batch: Any) -> ScoreResult:
        """Return the result of a batch."""
        require_proportions(batch, self.detector.config)
        return self.model.score(batch.image)

    def _predicted(self, batch: Any, result: ScoreResult) -> Any:
        """Write scores, maps, classes and p-values into a batch, and return it."""
        batch = MultiClassBatch.of(batch)
        batch.update(**self.model.in_multiples(result)._asdict())
        batch.pred_class = result.class_id.to(self.device)
        batch.pred_class_name = [self.detector.groups[k] for k in result.class_id.tolist()]
        batch.p_value = result.p_value.to(self.device)
        return batch

    # ---- files

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Path:
        """Write the model as an ONNX file, of the library's own graph, and return its path; see `graph.write_onnx`.

        It takes batches of any number of images, and resizes them itself. `to_openvino` goes this way, too.

        Args:
            export_root: the file is `weights/onnx/<model_file_name>.onnx` in this folder.
            model_file_name: see there.
            input_size: H and W of the images that go in; None: any, of the proportions of the training images.
            kwargs: `input_names`, a name; `opset_version`, which is 20; and `check` of `graph.write_onnx`.

        Raises:
            ValueError: the model is not trained, an argument does not fit, or the file differs from the model.
        """
        detector = self.model.calibrated
        options = export_options(self.detector.config, self.post_processor, self.seen_size, input_size, kwargs)
        return write_onnx(detector, Path(export_root) / "weights" / "onnx" / f"{model_file_name}.onnx", **options)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write configuration and calibration into a checkpoint; the model is calibrated as it is."""
        super().on_save_checkpoint(checkpoint)
        if self._fitting is not None:
            self._fitting.bring_up_to_date(self.trainer.global_step)
        checkpoint[KEY] = stored(self.detector, self._asked, self.seen_size)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the detector that a checkpoint holds, whose tensors come after this.

        Raises:
            ValueError: the checkpoint is of another model.
        """
        super().on_load_checkpoint(checkpoint)
        detector, self._asked, self.seen_size = restored(checkpoint.get(KEY) or {}, self.method)
        self._take(detector)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_fitting": None, "_class_ids": {}}


class HGAD(DetectorModule):
    """HGAD (arXiv 2403.13349): normalizing flows with a hierarchical Gaussian mixture; see `DetectorModule`."""

    method = "hgad"


class VQFlow(DetectorModule):
    """VQ-Flow (arXiv 2409.00942): flows on quantised prototypes and patterns; see `DetectorModule`."""

    method = "vqflow"


class PlaceGaussian(DetectorModule):
    """A Gaussian for each place of each class, in closed form: there is one epoch; see `DetectorModule`."""

    method = "gaussian"
