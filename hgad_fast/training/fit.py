"""Training: features once, the official schedule, a checkpoint after every meta-epoch, resume to the bit."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .calibrate import calibrate_on, split
from .config import LOSS_TERMS, HGADConfig
from .data import Dataset
from .features import FeatureSet, feature_set
from .files import replacing
from .model import HGADModel, state_hash
from .processes import joined
from .step import STAGE_2, Step, stage_terms

WARM_UP_EPOCHS = 2  # meta-epochs of rising learning rate; also those of stage 1
FORMAT = "hgad_fast training 2"
CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
MODEL = "model.safetensors"
BEST = "best.safetensors"  # see `evaluate.BestCheckpoint`
FEATURES = "features"
RUN = "run.json"  # {"data": where the pictures lay}, for the report
FETCH_EVERY = 20  # steps between looks at the losses on a GPU: a look waits for the device


class NonFiniteLossError(RuntimeError):
    """A loss became NaN or infinite; the message names step (from 0), level and term (or parameter)."""


@dataclass
class History:
    """What happened in training: one record a sub-epoch, as written to ``metrics.jsonl``."""

    records: list[dict[str, Any]] = field(default_factory=list)


def learning_rate(config: HGADConfig, meta_epoch: int, sub_epoch: int, batch: int, batches: int) -> float:
    """Cosine over the meta-epochs, warmed up linearly over the batches of the first two (official).

    With eta = lr 0.1^3: eta + (lr - eta) (1 + cos(pi m / meta_epochs)) / 2; the warm-up starts at lr / 10.
    """
    floor = config.lr * 0.1**3

    def cosine(epoch: int) -> float:
        return floor + (config.lr - floor) * (1 + math.cos(math.pi * epoch / config.meta_epochs)) / 2

    if meta_epoch >= WARM_UP_EPOCHS:
        return cosine(meta_epoch)
    start, end = config.lr / 10, cosine(WARM_UP_EPOCHS)
    done = (meta_epoch * config.sub_epochs + sub_epoch) * batches + batch
    return start + done / (WARM_UP_EPOCHS * config.sub_epochs * batches) * (end - start)


def fit(
    model: HGADModel,
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
    """Train a model on normal pictures, then calibrate it on those held out.

    Batches of `batch_size` (or of all pictures, where there are fewer) are drawn from the configuration's seed alone:
    the global random state is neither used nor changed.

    Processes that torchrun started, or that have initialised `torch.distributed`, train one model together if each
    calls this with a model of the same configuration, on a device of its own, and the same data. They share out each
    batch, so that the steps are those of one process, up to rounding. The first one shows progress, calls the
    callbacks, calibrates and writes; in the end all have the same model and history.

    Args:
        model: the detector; trained in place. Its backbone is not changed.
        data: a dataset root, a `data.Dataset`, a `FeatureSet`, or (one (n, C, h, w) tensor a level, n class ids).
        calibration: normal pictures to calibrate on, in any of these forms; None holds out `calibration_fraction` of
            the data, at least 8 pictures a class and never more than half.
        resume: a checkpoint to go on from, or True for the one in `output_dir` if there is one. It must come from the
            same data, backbone and configuration; the result is bit for bit that of an uninterrupted run. For the sake
            of callbacks, torch's global random state becomes that of the checkpoint too.
        output_dir: where ``checkpoint.pt`` (at the start and after every meta-epoch), ``metrics.jsonl`` and in the end
            ``run.json`` (the root of the data) and ``model.safetensors`` are written; None writes nothing.
        cache: where features are kept between passes: ``"ram"``; ``"disk"``, from where later runs and other processes
            take them too; or None to compute them anew in every pass. The result is the same bit for bit.
        cache_dir: folder of the cache on disk, ``output_dir/features`` by default. Give one to share it between runs:
            it may serve any models and datasets.
        cache_dtype: ``"float32"``, or ``"float16"`` or ``"bfloat16"`` for features in half the room, wherever they are
            kept. What is rounded are the features trained on; the calibration sees exact ones, as scoring does. What it
            costs in AUROC was below 0.1 points where it was measured (docs/scaling.md).
        cache_limit: bytes, or a size such as ``"20GB"``, that features in memory, or all of `cache_dir`, may take; see
            `features.feature_set`. Those beyond it are computed anew in every pass.
        callbacks: called with each record of the history.
        false_alarm_rate: share of normal pictures that the thresholds may call anomalous.
        skip_bad: go on without pictures that cannot be decoded, and report them, instead of stopping.
        progress: show a progress bar; None: if stderr is a terminal.
        cuda_graphs: record steps as CUDA graphs, which saves a launch for each kernel; for one process, and pictures of
            few sizes. What it gains has not been measured.

    Returns:
        The history, one record a sub-epoch.

    Raises:
        ValueError: the data or the checkpoint do not fit the model, or a class has no pictures.
        OSError: a file cannot be written; the one that it would have replaced is left as it was.
        NonFiniteLossError: a loss became NaN or infinite; the last checkpoint is left as it was.
        LostProcessError: another of several processes ended, or does not answer.
    """
    if not 0 < false_alarm_rate < 1:
        raise ValueError(f"false_alarm_rate is {false_alarm_rate}; allowed: above 0 and below 1")
    with joined(model.device) as processes, _Display(progress if processes.is_first else False) as display:
        output = None if output_dir is None else Path(output_dir).absolute()
        folder = _writable(output) if output and processes.is_first else None

        def features_of(pictures: Any, dtype: str) -> FeatureSet:
            return feature_set(
                model,
                pictures,
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
            raise ValueError("there are no training pictures")
        fraction = model.config.calibration_fraction if calibration is None else 0.0
        rows, held_out_rows = split(features.class_ids, fraction, model.config.seed)
        held_out = features.subset(held_out_rows) if calibration is None else features_of(calibration, "float32")
        _require_every_class(model, features, held_out)
        run = _Run(model, features.subset(rows), folder, callbacks, display, Step(model, processes, cuda_graphs))
        run.resume(resume)
        run.train()
        if processes.is_first:
            display.say("calibrating")
            calibrate_on(model, held_out, false_alarm_rate, stand_in=run.features)
        model.calibration = processes.from_first(model.calibration)
        if folder is not None:
            with _writing(folder / RUN), replacing(folder / RUN) as file:
                root = data.root if isinstance(data, Dataset) else data
                known = isinstance(root, (str, os.PathLike))
                file.write_text(json.dumps({"data": os.path.abspath(root) if known else None}) + "\n")
            with _writing(folder / MODEL):
                model.save(folder / MODEL)
    return run.history


def _require_every_class(model: HGADModel, *sets: FeatureSet) -> None:
    """Calibration needs pictures of every class; better said before the training than after it."""
    found = torch.cat([features.class_ids for features in sets]).unique().tolist()
    if missing := [name for k, name in enumerate(model.class_names) if k not in found]:
        raise ValueError(f"there are no pictures of {', '.join(map(repr, missing))}; add some, or leave the class out")


def _writable(folder: Path) -> Path:
    """The folder, made if need be; where it cannot be written to, no time is lost on features first."""
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    return folder


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Name the file where writing fails; torch and safetensors raise errors of their own, and do not name it."""
    try:
        yield
    except Exception as error:
        raise OSError(
            f"{path} cannot be written ({error}); free some space or choose another output_dir, and go on with resume"
        ) from error


class _Run:
    """One training run: the state that a checkpoint holds, and the loop that advances it."""

    def __init__(
        self,
        model: HGADModel,
        features: FeatureSet,
        output_dir: Path | None,
        callbacks: Sequence[Callable[[dict[str, Any]], None]],
        display: _Display,
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
                f"{self.processes.count} processes share batches of {self.batch_size} pictures, and some get none; "
                f"start fewer, or raise batch_size (it is {self.config.batch_size})"
            )
        self.batches = len(features) // self.batch_size  # the last, incomplete one is dropped
        self.meta_epoch = 0
        self.history = History()
        self.identity = self._identity()
        if self.processes.from_first(self.identity) != self.identity:
            raise ValueError(
                f"process {self.processes.rank} has other data, settings or backbone weights than process 0; give all "
                "the same"
            )

    def train(self) -> None:
        self.model.train()
        self.display.start(self.config.meta_epochs * self.config.sub_epochs * self.batches, self.meta_epoch, self)
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
        self.model.eval()

    def _sub_epoch(self, meta_epoch: int, sub_epoch: int) -> dict[str, Any]:
        start = time.perf_counter()
        stage = self._stage(meta_epoch)
        passes = meta_epoch * self.config.sub_epochs + sub_epoch
        pending: list[Tensor] = []  # losses that still lie on the device
        fetched: list[Tensor] = []
        fetch_every = FETCH_EVERY if self.model.device.type == "cuda" else 1
        rate = 0.0
        for batch, indices in enumerate(self._batches(passes)):
            rate = learning_rate(self.config, meta_epoch, sub_epoch, batch, self.batches)
            share = indices[self.processes.rank :: self.processes.count]
            images, labels = [self.features.images[i] for i in share], self.features.class_ids[share]
            pending.append(self.step(images, labels, stage, rate))
            if len(pending) == fetch_every or batch == self.batches - 1:
                losses = self.processes.sum(torch.stack(pending)).cpu()
                first = passes * self.batches + batch + 1 - len(pending)
                self._require_finite(losses, first, stage)
                fetched.append(losses)
                pending.clear()
                seconds = time.perf_counter() - start
                self.display.advance(len(losses), losses[-1], rate, (batch + 1) * self.batch_size / seconds, meta_epoch)
        seconds = time.perf_counter() - start
        mean = torch.cat(fetched).mean(0)
        return {
            "meta_epoch": meta_epoch,
            "sub_epoch": sub_epoch,
            "stage": stage,
            "lr": rate,
            "images_per_second": round(self.batches * self.batch_size / seconds, 2),
            "seconds": round(seconds, 3),
            "losses": [dict(zip(stage_terms(stage), map(float, level), strict=True)) for level in mean],
        }

    def _stage(self, meta_epoch: int) -> int:
        return 2 if meta_epoch >= WARM_UP_EPOCHS and set(STAGE_2) & set(self.config.loss_terms) else 1

    def _batches(self, passes: int) -> Iterator[list[int]]:
        """Batches of the given pass over the data; the order depends on the seed and the pass alone."""
        generator = torch.Generator().manual_seed((self.config.seed * 1_000_003 + passes) % 2**63)
        order = torch.randperm(len(self.features), generator=generator).tolist()
        for batch in range(self.batches):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size]

    def _require_finite(self, losses: Tensor, first_step: int, stage: int) -> None:
        """Losses (steps, S, terms) must be finite."""
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            step, level, term = bad[0].tolist()
            value = float(losses[step, level, term])
            raise self._diverged(f"{stage_terms(stage)[term]} of level {level} is {value} at step {first_step + step}")

    def _require_finite_parameters(self, meta_epoch: int) -> None:
        """The last step may break what its loss, taken before it, does not show; such a state is not worth keeping."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not parameter.isfinite().all():
                step = (meta_epoch + 1) * self.config.sub_epochs * self.batches - 1
                raise self._diverged(f"parameter {name} is not finite after step {step}")

    def _diverged(self, what: str) -> NonFiniteLossError:
        where = f"; the last good checkpoint is {self.output_dir / CHECKPOINT}" if self.output_dir else ""
        return NonFiniteLossError(
            f"{what}{where}. Lower lr ({self.config.lr}), or look for pictures with broken features."
        )

    # ---- files

    def resume(self, resume: str | os.PathLike[str] | bool | None) -> None:
        """Take the state of a checkpoint, or start the metrics anew. The first process reads and writes for all."""
        state = None
        if resume and self.processes.is_first:
            state = self._read_checkpoint(resume)
        state = self.processes.from_first(state)
        if state is not None:
            self._restore(state)
        if self.output_dir is None:
            return
        for name in (CHECKPOINT, METRICS, MODEL, RUN):  # what a killed run left half-written
            for leftover in self.output_dir.glob(f".{Path(name).stem}-*{Path(name).suffix}"):
                leftover.unlink()
        with _writing(self.output_dir / METRICS), replacing(self.output_dir / METRICS) as file:
            file.write_text("".join(json.dumps(record) + "\n" for record in self.history.records))
        self._save_checkpoint()  # so that a run that ends in its first meta-epoch can be resumed, too

    def _log(self, record: dict[str, Any]) -> None:
        if self.output_dir is not None:
            with _writing(self.output_dir / METRICS), open(self.output_dir / METRICS, "a") as file:
                file.write(json.dumps(record) + "\n")

    def _identity(self) -> dict[str, str]:
        """What a checkpoint must share with the run that goes on from it; weights count by value, not by path.

        How much memory a step takes, and how many processes share it, may change: only the last bits depend on that.
        """
        encoder = self.model.encoder
        return {
            "data": self.features.fingerprint,
            "backbone": "" if encoder is None else state_hash(encoder),
            "config": self.config.replace(
                memory="auto", checkpoint_every=0, accumulate=1, backbone_weights=None
            ).to_json(),
        }

    def _trained(self) -> dict[str, Tensor]:
        """The model's tensors without the backbone's, which do not change."""
        return {k: v for k, v in self.model.state_dict().items() if not k.startswith("encoder.")}

    def _save_checkpoint(self) -> None:
        if self.output_dir is None:
            return
        state = {
            "format": FORMAT,
            "identity": self.identity,
            "meta_epoch": self.meta_epoch,
            "history": json.dumps(self.history.records),
            "model": self._trained(),
            "optimizer": self.optimizer.state_dict(),
            "random_state": torch.get_rng_state(),
        }
        with _writing(self.output_dir / CHECKPOINT), replacing(self.output_dir / CHECKPOINT) as file:
            torch.save(state, file)

    def _read_checkpoint(self, resume: str | os.PathLike[str] | bool) -> dict[str, Any] | None:
        """The state in it, once all of it is known to fit; None if there is nothing to go on from."""
        if isinstance(resume, bool):
            if self.output_dir is None:
                raise ValueError("resume=True needs output_dir, where the checkpoint is")
            path = self.output_dir / CHECKPOINT
            if not path.is_file():
                return None
        else:
            path = Path(resume)
        if not path.is_file():
            raise ValueError(f"there is no checkpoint {path}")
        try:
            with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
                if (damaged := archive.testzip()) is not None:
                    raise ValueError(f"{damaged} is damaged")
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a truncated or foreign file can raise many kinds
            raise ValueError(f"{path} cannot be read as a training checkpoint: {error}") from error
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError(f"{path} is no training checkpoint of this version of hgad_fast")
        theirs = state["identity"]
        if theirs["config"] != self.identity["config"]:
            old, new = json.loads(theirs["config"]), json.loads(self.identity["config"])
            changed = [f"{k} {old.get(k)!r} -> {new.get(k)!r}" for k in new if old.get(k) != new.get(k)]
            raise ValueError(f"{path} was trained with another configuration: {', '.join(changed)}")
        if theirs["backbone"] != self.identity["backbone"]:
            raise ValueError(f"{path} was trained with other backbone weights; start anew, or give it the same")
        if theirs["data"] != self.identity["data"]:
            raise ValueError(
                f"{path} was trained on other pictures than these, or held out others, or with features of another "
                "precision (cache_dtype); start anew, or give it the same"
            )
        mine = self._trained()
        misfits = [k for k in mine.keys() | state["model"].keys() if _shape(mine, k) != _shape(state["model"], k)]
        if misfits:
            raise ValueError(f"{path} lacks the model's tensor {min(misfits)}, or holds another in its place")
        self._check_optimizer(path, state)
        return state

    def _check_optimizer(self, path: Path, state: dict[str, Any]) -> None:
        """Adam must hold the moments of all that was ever stepped; torch would start missing ones anew, in silence."""
        theirs, ours = state["optimizer"], self.optimizer.state_dict()
        if [g.get("params") for g in theirs["param_groups"]] != [g["params"] for g in ours["param_groups"]]:
            raise ValueError(f"{path} does not fit this optimizer: it has other parameters")
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        in_stage_2_only = {*self.model.mu_deltas, *self.model.phi_intras}
        last_stage = self._stage(state["meta_epoch"] - 1)
        for i, parameter in enumerate(p for group in self.optimizer.param_groups for p in group["params"]):
            expected: dict[str, tuple[int, ...]] = {}
            if state["meta_epoch"] and (last_stage == 2 or parameter not in in_stage_2_only):
                expected = {"step": (), "exp_avg": tuple(parameter.shape), "exp_avg_sq": tuple(parameter.shape)}
            if {name: tuple(moment.shape) for name, moment in theirs["state"].get(i, {}).items()} != expected:
                raise ValueError(
                    f"{path} does not fit this optimizer: it lacks moments of {names[parameter]}, or holds others"
                )

    def _restore(self, state: dict[str, Any]) -> None:
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, ours in zip(self.optimizer.param_groups, options, strict=True):
            group.update(ours)  # the checkpoint may come from another kind of device
        self.model.load_state_dict(state["model"], strict=False)  # the backbone is not in it
        torch.set_rng_state(state["random_state"])
        self.meta_epoch = state["meta_epoch"]
        self.history.records = json.loads(state["history"])


def _shape(state: dict[str, Tensor], key: str) -> tuple[int, ...] | None:
    return tuple(state[key].shape) if key in state else None


class _Display:
    """Progress on the terminal; silent where there is none."""

    def __init__(self, enabled: bool | None) -> None:
        self.enabled = sys.stderr.isatty() if enabled is None else enabled
        self.bar: Any = None

    def __enter__(self) -> _Display:
        if self.enabled:
            from rich.console import Console, Group
            from rich.live import Live
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
            from rich.text import Text

            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=16),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}"),
            )
            self.losses = Text()  # on a line of its own: terminals may have no more than 80 columns
            self.live = Live(Group(self.bar, self.losses), console=Console(stderr=True))
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.live.stop()

    def track(self, items: Sequence[Any], title: str) -> Iterable[Any]:
        if self.bar is None:
            return items
        return self._tracked(items, self.bar.add_task(title, total=len(items), detail=""))

    def _tracked(self, items: Sequence[Any], task: Any) -> Iterator[Any]:
        for item in items:
            yield item
            self.bar.advance(task)

    def report_bad(self, error: Exception) -> None:
        print(f"skipped {error}", file=sys.stderr)

    def say(self, text: str) -> None:
        if self.bar is not None:
            self.live.console.print(text)

    def tell(self, text: str) -> None:
        """`say` it where there is no terminal, too."""
        if self.bar is None:
            print(text, file=sys.stderr)
        self.say(text)

    def start(self, steps: int, meta_epoch: int, run: _Run) -> None:
        if self.bar is not None:
            done = meta_epoch * run.config.sub_epochs * run.batches
            self.training = self.bar.add_task("training", total=steps, completed=done, detail="")

    def advance(self, steps: int, losses: Tensor, rate: float, images_per_second: float, meta_epoch: int) -> None:
        """Show the loss terms of the last step, mean over the levels."""
        if self.bar is None:
            return
        terms = zip(LOSS_TERMS, losses.mean(0).tolist(), strict=False)
        self.losses.plain = "  ".join(f"{name} {value:.3f}" for name, value in terms)
        detail = f"lr {rate:.1e}  {images_per_second:.0f} images/s"
        self.bar.update(self.training, advance=steps, detail=detail, description=f"meta-epoch {meta_epoch}")
