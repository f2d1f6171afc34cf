"""Training on cached features by the method's schedule, with checkpoints from which a run resumes bit for bit."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..data.datasets import Dataset
from ..environment import plain_torch, require_float32, versions
from ..features.extract import FeatureSet, feature_set
from ..files import replacing
from ..protocol import Detector, Progress
from ..scoring.calibration import calibration_from, check_false_alarm_rate, split, warn_of_shortcomings
from ..scoring.densities import densities
from ..terminal import warn_user
from .checkpoint import (
    CHECKPOINT,
    FEATURES,
    METRICS,
    MODEL,
    RUN,
    read_checkpoint,
    run_identity,
    save_checkpoint,
    trained_tensors,
    writing,
)
from .display import Display
from .feeding import Selection
from .processes import joined
from .schedule import order_of_pass
from .step import Step

RECOGNITION_IMAGES = 200  # held-out images, at most, whose class is inferred to see whether it is recognised
RECOGNISED = 0.9  # share of them below which the class should be given

FETCH_EVERY = 20  # steps between two fetches of the losses from a GPU: a fetch waits for the device


class NonFiniteLossError(RuntimeError):
    """A loss became NaN or infinite; the message names step (from 0), level and term (or parameter)."""


def diverged(problem: str, rate: float) -> NonFiniteLossError:
    """Return the error that names a problem, and what can be done at this learning rate."""
    return NonFiniteLossError(f"{problem}. Lower lr ({rate}), or look for images with broken features.")


def broken_parameter(model: Detector) -> str | None:
    """Return the name of the first trained parameter that is not finite; None: all are."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            return name
    return None


@dataclass
class History:
    """The course of a training run, and what its model does with the images that were held out.

    Attributes:
        records: one per sub-epoch, a pass over the data, as written to ``metrics.jsonl``: "pass" (from 0, of all that
            the training has), "meta_epoch", "sub_epoch", "stage", "lr" (of the last step), "images_per_second",
            "seconds", and "losses": for each level the means of the terms, by name.
        recognition: by classes, the number of held-out images whose class is inferred rightly, and of all that were
            tried, at most `RECOGNITION_IMAGES` together; empty where there is nothing to infer.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    recognition: dict[str, tuple[int, int]] = field(default_factory=dict)


@plain_torch()
@torch.enable_grad()
def fit(
    model: Detector,
    data: Any,
    *,
    calibration: Any = None,
    resume: str | os.PathLike[str] | bool | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    cache: str | None = "ram",
    cache_dir: str | os.PathLike[str] | None = None,
    cache_dtype: str = "float32",
    cache_limit: int | str | None = None,
    callbacks: Sequence[Callable[[dict[str, Any]], None]] = (),
    false_alarm_rate: float = 0.01,
    skip_bad: bool = False,
    progress: bool | None = None,
    cuda_graphs: bool = False,
) -> History:
    """Train a model on normal images, then calibrate it on held-out ones.

    A method that has a closed form (`Detector.closed_form`) takes no steps: there is no checkpoint to resume from, and
    the history is empty.

    It computes as in a fresh process, whatever the caller's state of torch is (`environment.plain_torch`).

    Batches of `batch_size` (or of all images, where there are fewer) depend on the configuration's seed alone: the
    global random state is neither used nor changed.

    Processes that torchrun started, or that have initialised `torch.distributed`, train one model together if each
    calls this with a model of the same configuration, on a device of its own, and the same data. They divide each batch
    among them, so that the steps are those of one process, up to rounding. The first one shows progress, calls the
    callbacks, calibrates and writes; in the end all have the same model and history.

    Args:
        model: the detector; trained in place. Its backbone is not changed.
        data: a dataset root, a `Dataset`, a `FeatureSet`, or (one (n, C, h, w) tensor per level, n class ids).
        calibration: normal images to calibrate on, in any of these forms; None holds out `calibration_fraction` of
            the data, at least 8 images per class and never more than half.
        resume: a checkpoint to resume from, or True for the one in `output_dir` if there is one. It must come from the
            same data, backbone and configuration; the result is bit for bit that of an uninterrupted run. For the sake
            of callbacks, torch's global random state becomes that of the checkpoint too.
        output_dir: where ``checkpoint.pt`` (at the start and after every meta-epoch), ``metrics.jsonl`` and in the end
            ``run.json`` (the root of the data, images of each class, versions, the day) and ``model.safetensors`` are
            written; None writes nothing.
        cache: where features are kept between passes: ``"ram"``; ``"disk"``, where later runs and other processes can
            use them too; or None to compute them anew in every pass. The result is the same bit for bit. Beside that, a
            GPU keeps those trained on where they take a third of its free memory at most (`training.feeding`).
        cache_dir: folder of the cache on disk, ``output_dir/features`` by default. Give one to share it between runs:
            it may serve any models and datasets.
        cache_dtype: ``"float32"``, or ``"float16"`` or ``"bfloat16"`` for features of half the size, wherever they are
            kept. Only the features trained on are rounded; calibration uses exact ones, as scoring does. The loss in
            AUROC was below 0.1 points where it was measured (docs/scaling.md).
        cache_limit: bytes, or a size such as ``"20GB"``, that features in memory, or all of `cache_dir`, may take; see
            `features.extract.feature_set`. Features beyond it are computed anew in every pass.
        callbacks: called with each record of the history.
        false_alarm_rate: target false-alarm rate, the share of normal images that the thresholds may call anomalous.
        skip_bad: leave out images that cannot be decoded, and report them, instead of stopping.
        progress: show a bar on stderr; None: if that is a terminal, and else say every 10 s how far the training is.
        cuda_graphs: record steps as CUDA graphs, which saves a launch for each kernel; for one process, and images of
            few sizes: four shapes of a batch in each stage. The gain has not been measured.

    Returns:
        The history, one record per sub-epoch.

    Raises:
        ValueError: the data or the checkpoint do not fit the model, a class has no images, or the method does not allow
            a setting.
        OSError: a file cannot be written; the one that it would have replaced is left as it was.
        NonFiniteLossError: a loss became NaN or infinite; the last checkpoint is left as it was.
        LostProcessError: another of the processes that train together ended, or does not answer.
    """
    check_false_alarm_rate(false_alarm_rate)
    require_float32(cast(nn.Module, model))
    if model.config.accumulate > 1 and not model.pointwise:
        raise ValueError(
            f"accumulate is {model.config.accumulate}: the method {model.config.method!r} looks at a batch as a whole, "
            "so it cannot be processed in parts; leave it 1"
        )
    with joined(model.device) as processes, Display(progress if processes.is_first else False) as display:
        output = None if output_dir is None else Path(output_dir).absolute()
        folder = _writable(output) if output and processes.is_first else None

        def features_of(images: Any, dtype: str) -> FeatureSet:
            return feature_set(
                model,
                images,
                cache=cache,
                cache_dir=cache_dir or (output and output / FEATURES),
                cache_dtype=dtype,
                cache_limit=cache_limit,
                skip_bad=skip_bad,
                on_bad=display.report_bad if processes.is_first else None,
                progress=display.track,
                say=display.tell if cache == "disk" and processes.is_first else display.say,
            )

        features = features_of(data, cache_dtype)
        if len(features) == 0:
            raise ValueError("there are no training images")
        fraction = model.config.calibration_fraction if calibration is None else 0.0
        rows, held_out_rows = split(features.class_ids, fraction, model.config.seed)
        held_out = features.subset(held_out_rows) if calibration is None else features_of(calibration, "float32")
        require_every_class(model, features, held_out)
        training = features.subset(rows)
        history = History()
        if model.closed_form:
            display.say("fitting")
            model.begin(training)
            processes.share(trained_tensors(model).values())
            model.finish(training)
        else:
            run = _Run(model, training, folder, callbacks, display, Step(model, processes, cuda_graphs))
            run.resume(resume)
            run.train()
            history = run.history
        if processes.is_first:
            display.say("calibrating")
            model.calibration = calibration_from(model, held_out, false_alarm_rate, stand_in=training)
            history.recognition = recognition(model, held_out)
        model.calibration, history.recognition = processes.from_first((model.calibration, history.recognition))
        if folder is not None:
            with writing(folder / RUN), replacing(folder / RUN) as file:
                file.write_text(json.dumps(_record(model, data, training, held_out)) + "\n", encoding="utf-8")
            with writing(folder / MODEL):
                model.save(folder / MODEL)
        if processes.is_first:
            warn_of_shortcomings(model)  # at the end: the model is kept where warnings are errors
            warn_of_recognition(history.recognition)
    return history


def _record(model: Detector, data: Any, training: FeatureSet, held_out: FeatureSet) -> dict[str, Any]:
    """Return what ``run.json`` says of a training: where the data lie, images of each class, versions, the day."""
    root = (data.source or data.root) if isinstance(data, Dataset) else data
    names = dict(enumerate(model.config.names))
    counts = {
        part: Counter(names.get(k, f"class {k}") for k in features.class_ids.tolist())
        for part, features in (("trained_on", training), ("held_out", held_out))
    }
    return {
        "data": os.path.abspath(root) if isinstance(root, (str, os.PathLike)) else None,
        **counts,
        "versions": versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def recognition(model: Detector, held_out: FeatureSet) -> dict[str, tuple[int, int]]:
    """Return, by classes, how many held-out images are taken for their own class where it is inferred, and of how many.

    Of many images `RECOGNITION_IMAGES`, spread over all, are tried. It is empty for a single class, and where a method
    forms groups by itself.
    """
    if not model.groups_are_classes or len(model.groups) < 2:
        return {}
    images = held_out.images if held_out.exact is None else held_out.exact
    counts: dict[str, tuple[int, int]] = {}
    for i in range(0, len(held_out), -(-len(held_out) // RECOGNITION_IMAGES)) if len(held_out) else ():
        (inferred,) = densities(model, [level[None].to(model.device) for level in images[i]], None)
        k = int(held_out.class_ids[i])
        right, tried = counts.get(model.groups[k], (0, 0))
        counts[model.groups[k]] = right + int(inferred.group_ids == k), tried + 1
    return counts


def warn_of_recognition(counts: dict[str, tuple[int, int]]) -> None:
    """Warn where too few held-out images are taken for their own class."""
    right, tried = (sum(pair[i] for pair in counts.values()) for i in range(2))
    if right < RECOGNISED * tried:
        worst = sorted(counts, key=lambda name: counts[name][0] / counts[name][1])[:3]
        examples = ", ".join(f"{name} {counts[name][0]} of {counts[name][1]}" for name in worst)
        warn_user(
            f"the class of {right} of {tried} held-out images is recognised ({examples}): tell it when you score "
            "(class_ids, --class), as an image that is taken for another class is judged by that class, or train on "
            "more images of each class"
        )


def require_every_class(model: Detector, *sets: FeatureSet) -> None:
    """Raise a ValueError where a class has no images: calibration needs some, and would fail only after training."""
    present = torch.cat([features.class_ids for features in sets]).unique().tolist()
    missing = [name for k, name in enumerate(model.groups) if k not in present]
    if missing and model.groups_are_classes:
        raise ValueError(f"there are no images of {', '.join(map(repr, missing))}; add some, or leave the class out")


def _writable(folder: Path) -> Path:
    """Return the folder, made if need be; if it cannot be written to, this fails before time is spent on features."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    return folder


class _Run:
    """One training run: the state that a checkpoint holds, and the loop that advances it."""

    def __init__(
        self,
        model: Detector,
        features: FeatureSet,
        output_dir: Path | None,
        callbacks: Sequence[Callable[[dict[str, Any]], None]],
        display: Display,
        step: Step,
    ) -> None:
        self.model = model
        self.config = model.config
        self.features = features
        self.output_dir = output_dir
        self.callbacks = callbacks
        self.display = display
        self.step, self.optimizer, self.processes = step, step.optimizer, step.processes
        self.batch_size = min(self.config.batch_size, len(features))
        if self.batch_size < self.processes.count:
            raise ValueError(
                f"{self.processes.count} processes share batches of {self.batch_size} images, and some get none; "
                f"start fewer, or raise batch_size (it is {self.config.batch_size})"
            )
        self.batches = len(features) // self.batch_size  # the last, incomplete one is dropped
        self.meta_epoch = 0
        self.history = History()
        self.identity = run_identity(model, features.fingerprint)
        if self.processes.from_first(self.identity) != self.identity:
            raise ValueError(
                f"process {self.processes.rank} has other data, settings or backbone weights than process 0; give all "
                "the same"
            )

    def train(self) -> None:
        """Train from the current meta-epoch to the last one."""
        if self.meta_epoch == 0:
            self.model.begin(self.features)
            self.processes.share(trained_tensors(self.model).values())  # last digits may differ, and choose other codes
        self.model.train()
        passes = self.config.meta_epochs * self.config.sub_epochs
        self.display.start(passes * self.batches, self.meta_epoch * self.config.sub_epochs * self.batches)
        try:
            for meta_epoch in range(self.meta_epoch, self.config.meta_epochs):
                for sub_epoch in range(self.config.sub_epochs):
                    self.processes.wait()  # for what the first one does between passes
                    record = self._sub_epoch(meta_epoch, sub_epoch)
                    self.history.records.append(record)
                    self._log(record)
                    for callback in self.callbacks if self.processes.is_first else ():
                        callback(record)
                self._require_finite_parameters(meta_epoch)
                self.meta_epoch = meta_epoch + 1
                self._save_checkpoint()
        finally:
            self.step.feed.clear()  # what follows may need the memory, and no thread is to read on
        self.model.eval()
        self.model.finish(self.features)

    def _sub_epoch(self, meta_epoch: int, sub_epoch: int) -> dict[str, Any]:
        """Train on every batch once, and return the record of this pass."""
        start = time.perf_counter()
        passes = meta_epoch * self.config.sub_epochs + sub_epoch
        pending: list[Tensor] = []  # losses that are still on the device
        fetched: list[Tensor] = []
        fetch_every = FETCH_EVERY if self.model.device.type == "cuda" else 1
        stage, rate = 1, 0.0
        self.step.number = passes * self.batches
        shares = [indices[self.processes.rank :: self.processes.count] for indices in self._batches(passes)]
        inputs = [(Selection(self.features.images, share), self.features.class_ids[share]) for share in shares]
        for batch, (images, labels) in enumerate(inputs):
            stage, rate = self.model.schedule(Progress(meta_epoch, sub_epoch, batch, self.batches))
            following = inputs[batch + 1] if batch + 1 < len(inputs) else None
            pending.append(self.step(images, labels, stage, rate, following))
            if len(pending) == fetch_every or batch == self.batches - 1:
                losses = self.processes.sum(torch.stack(pending)).cpu()
                self._require_finite(losses, passes * self.batches + batch + 1 - len(pending))
                fetched.append(losses)
                pending.clear()
                speed = (batch + 1) * self.batch_size / (time.perf_counter() - start)
                last_losses = dict(zip(self.step.terms, losses[-1].mean(0), strict=True))
                self.display.advance(len(losses), last_losses, rate, speed, meta_epoch)
        seconds = time.perf_counter() - start
        mean_losses = torch.cat(fetched).mean(0)
        return {
            "pass": passes,
            "meta_epoch": meta_epoch,
            "sub_epoch": sub_epoch,
            "stage": stage,
            "lr": rate,
            "images_per_second": round(self.batches * self.batch_size / seconds, 2),
            "seconds": round(seconds, 3),
            "losses": [dict(zip(self.step.terms, map(float, level), strict=True)) for level in mean_losses],
        }

    def _batches(self, passes: int) -> Iterator[list[int]]:
        """Yield each batch's image numbers in a pass."""
        order = order_of_pass(len(self.features), self.config.seed, passes)
        for batch in range(self.batches):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size]

    def _require_finite(self, losses: Tensor, first_step: int) -> None:
        """Raise a NonFiniteLossError where one of the losses (steps, levels, terms) is not finite."""
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            step, level, term = bad[0].tolist()
            value = float(losses[step, level, term])
            raise self._diverged(f"{self.step.terms[term]} of level {level} is {value} at step {first_step + step}")

    def _require_finite_parameters(self, meta_epoch: int) -> None:
        """Raise a NonFiniteLossError where a parameter is not finite, so that no such state is saved.

        The last step can make it so, and the loss of that step, computed before it, does not show this.
        """
        if name := broken_parameter(self.model):
            step = (meta_epoch + 1) * self.config.sub_epochs * self.batches - 1
            raise self._diverged(f"parameter {name} is not finite after step {step}")

    def _diverged(self, problem: str) -> NonFiniteLossError:
        """Return the error that names the problem, the last checkpoint, and what can be done."""
        last_good = f"; the last good checkpoint is {self.output_dir / CHECKPOINT}" if self.output_dir else ""
        return diverged(f"{problem}{last_good}", self.config.lr)

    # ---- files

    def resume(self, resume: str | os.PathLike[str] | bool | None) -> None:
        """Restore the state of a checkpoint, or start anew. The first process reads and writes for all."""
        state = self._read_checkpoint(resume) if resume and self.processes.is_first else None
        state = self.processes.from_first(state)
        if state is not None:
            self._restore(state)
        if self.output_dir is None:
            return
        for name in (CHECKPOINT, METRICS, MODEL, RUN):  # what a killed run left half-written
            for leftover in self.output_dir.glob(f".{Path(name).stem}-*{Path(name).suffix}"):
                leftover.unlink()
        with writing(self.output_dir / METRICS), replacing(self.output_dir / METRICS) as file:
            file.write_text("".join(json.dumps(record) + "\n" for record in self.history.records))
        self._save_checkpoint()  # so that a run that ends in its first meta-epoch can be resumed, too

    def _read_checkpoint(self, resume: str | os.PathLike[str] | bool) -> dict[str, Any] | None:
        """Return the state to resume from; None if `resume` is True and there is none yet."""
        if not isinstance(resume, bool):
            path = Path(resume)
        elif self.output_dir is None:
            raise ValueError("resume=True needs output_dir, where the checkpoint is")
        else:
            path = self.output_dir / CHECKPOINT
            if not path.is_file():
                return None
        return read_checkpoint(path, self.model, self.optimizer, self.identity, self._stages_in)

    def _stages_in(self, meta_epochs: int) -> set[int]:
        """Return the stages that occur in the first `meta_epochs` meta-epochs."""
        return {
            self.model.schedule(Progress(meta_epoch, sub_epoch, 0, self.batches))[0]
            for meta_epoch in range(meta_epochs)
            for sub_epoch in range(self.config.sub_epochs)
        }

    def _log(self, record: dict[str, Any]) -> None:
        if self.output_dir is not None:
            with writing(self.output_dir / METRICS), open(self.output_dir / METRICS, "a") as file:
                file.write(json.dumps(record) + "\n")

    def _save_checkpoint(self) -> None:
        if self.output_dir is not None:
            state = {
                "identity": self.identity,
                "meta_epoch": self.meta_epoch,
                "history": json.dumps(self.history.records),
                "model": trained_tensors(self.model),
                "optimizer": self.optimizer.state_dict(),
                "random_state": torch.get_rng_state(),
            }
            save_checkpoint(self.output_dir / CHECKPOINT, state)

    def _restore(self, state: dict[str, Any]) -> None:
        options = [
            {name: value for name, value in group.items() if name != "params"} for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own_options in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own_options)  # the checkpoint may come from another kind of device
        self.model.load_state_dict(state["model"], strict=False)  # the backbone is not in it
        torch.set_rng_state(state["random_state"])
        self.meta_epoch = state["meta_epoch"]
        self.history.records = json.loads(state["history"])
