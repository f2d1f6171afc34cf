"""Checks of `make gpu` that follow a user's first day: each method is trained on a device, scored with and lived with.

Images are made up, backbones tiny and of random weights. What a device computes is compared with what a CPU computes
with the same model file from the same features. (From pixels a GPU's features differ by more than rounding: it
convolves with tf32 operands, as torch does by default.)
"""

from __future__ import annotations

import copy
import functools
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.gpu_checks import FORWARD
from benchmarks.gpu_findings import Check, Figure
from hgad_fast import GaussianConfig, HGADConfig, Monitor, Scorer, VQFlowConfig, load
from hgad_fast.bench.measure import relative_error
from hgad_fast.bench.results import TOLERANCE
from hgad_fast.data.datasets import discover
from hgad_fast.data.images import read_image
from hgad_fast.evaluation.evaluate import FIGURES, evaluate
from hgad_fast.features.preprocess import image_features
from hgad_fast.methods import create
from hgad_fast.models.config import Config
from hgad_fast.scoring.result import ScoreResult
from hgad_fast.scoring.score import score_images, score_prepared

CLASSES = ("bolts", "nuts", "rings")
NEW_CLASS = "washers"
TESTS = 8  # images of each class and kind
SIDE = 64  # of images, and of what a backbone sees
AGREES = 1e-5  # of scores by two ways on one device, as `score(throughput=True)` says
SECONDS = 60  # that a command may take
MARGIN = 4  # times what a result is moved by features and parameters that are off by as much as an operation may be
DRAWS = 3  # of such features and parameters
# Of what eager steps in fp32 change. On a CPU parameters that begin 5e-6 off end 1e-4 of that way off, and bf16 6e-3; a
# step of HGAD's is a 32nd.
OF_THE_WAY = {"fp32": 1e-2, "bf16": 3e-2}
METHODS = ("gaussian", "hgad", "vqflow")
_TINY: dict[str, Any] = {
    "n_classes": len(CLASSES),
    "class_names": CLASSES,
    "backbone_arch": "test_efficientnet",
    "backbone_weights": None,
    "img_size": SIDE,
    "msk_size": 32,
    "batch_size": 6,
    "sub_epochs": 1,
}
CONFIGS: dict[str, Callable[[], Config]] = {
    "gaussian": lambda: GaussianConfig(**_TINY, out_indices=(1, 2, 3), dim=16, coarse_dim=8),
    "hgad": lambda: HGADConfig(
        **_TINY,
        feature_levels=2,
        out_indices=(1,),
        coupling_layers=3,
        pos_embed_dim=16,
        n_intra_centers=4,
        meta_epochs=4,
        lambda2=1.0,
    ),
    "vqflow": lambda: VQFlowConfig(
        **_TINY,
        out_indices=(1, 2, 3, 4),
        coupling_layers=(1, 2, 1),
        n_prototypes=4,
        n_patterns=8,
        prototype_dim=8,
        pos_embed_dim=8,
        meta_epochs=2,
    ),
}


def write_images(root: Path, images: int = 2 * TESTS, seed: int = 0, classes: tuple[str, ...] = CLASSES) -> Path:
    """Write a made-up dataset in the MVTec AD layout: so many training images a class, half as many normal
    test images, and as many of defects: squares that are much brighter, with their masks.
    """
    rng = np.random.default_rng(seed)

    def write(path: Path, pixels: np.ndarray) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * pixels.clip(0, 1)).astype(np.uint8)).save(path)

    for name in classes:
        texture = np.random.default_rng(list(name.encode())).uniform(0.2, 0.6, (SIDE // 8, SIDE // 8, 3))
        pattern = texture.repeat(8, 0).repeat(8, 1)
        for kind, count in (("train/good", images), ("test/good", images // 2), ("test/spot", images // 2)):
            for i in range(count):
                image, mask = pattern + rng.normal(0, 0.05, pattern.shape), np.zeros((SIDE, SIDE))
                if kind == "test/spot":
                    top, left = rng.integers(0, SIDE - 16, 2)
                    mask[top : top + 16, left : left + 16] = 1
                    image += 0.35 * mask[..., None]
                    write(root / name / "ground_truth/spot" / f"{i:03}_mask.png", mask)
                write(root / name / kind / f"{i:03}.png", image)
    return root


Step = Callable[[], Iterator[Check | Figure]]


def named(steps: dict[str, Step]) -> dict[str, Step]:
    """Return the steps with what each finds named after it: a summary says no more than the names."""

    def run(name: str, step: Step) -> Iterator[Check | Figure]:
        yield from (replace(found, name=f"{name}: {found.name}") for found in step())

    return {name: functools.partial(run, name, step) for name, step in steps.items()}


class Day:
    """The steps of a user's day with one method on one device; each is a job, and yields what it finds.

    The model of all steps but the first is the one that was trained on the device; if that failed, one that is trained
    on the CPU, so that the other steps tell what they can.

    Args:
        method: its name.
        device: where the user works.
    """

    def __init__(self, method: str, device: torch.device) -> None:
        self.method, self.device, self.config = method, device, CONFIGS[method]()

    @functools.cached_property
    def _temporary(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="hgad-day-", ignore_cleanup_errors=True)

    @functools.cached_property
    def folder(self) -> Path:
        """A folder that goes with this object."""
        return Path(self._temporary.name)

    def close(self) -> None:
        """Remove the folder with all that was written."""
        self._temporary.cleanup()

    @functools.cached_property
    def data(self) -> Path:
        """The root of the dataset that is trained on."""
        return write_images(self.folder / "data")

    @functools.cached_property
    def others(self) -> Path:
        """The root of other images of the same classes."""
        return write_images(self.folder / "others", 12, seed=1)

    @functools.cached_property
    def tests(self) -> list[Path]:
        """The test images of `data`."""
        return [Path(sample.path) for sample in discover(self.data).test]

    @property
    def file(self) -> Path:
        """The model of this day."""
        return self.folder / "model.safetensors"

    @property
    def steps(self) -> dict[str, Step]:
        """The steps by name, in their order."""
        steps: dict[str, Step] = {"train": self.train}
        if self.method != "gaussian":  # which takes no steps
            steps["train in recorded steps"] = self.train_recorded
        steps |= {
            "score": self.score,
            "calibrate": self.calibrate,
            "save and load": self.save_and_load,
            "Scorer": self.camera,
            "Monitor": self.monitor,
            "evaluate": self.evaluate,
            "absorb": self.absorb,
        }
        if self.method != "vqflow":  # whose groups are no classes
            steps["add a class"] = self.add_class
        return named({f"{self.method}, {name}": step for name, step in steps.items()})

    def fitted(self, device: torch.device, config: Config | None = None, **options: Any) -> tuple[Any, Any]:
        """Return a model that is trained on a device, and its history."""
        torch.manual_seed(0)
        model: Any = create(config or self.config).to(device)
        return model, model.fit(self.data, false_alarm_rate=0.2, progress=False, **options)

    def model(self, device: torch.device) -> Any:
        """Return the model of this day on a device, read anew."""
        if not self.file.exists():
            self.fitted(torch.device("cpu"))[0].save(self.file)
        return load(self.file, device=device)

    def train(self) -> Iterator[Check]:
        model, history = self.fitted(self.device)
        yield Check("the model stays on its device", elsewhere(model, self.device), 0, "tensors elsewhere")
        losses = [value for record in history.records for level in record["losses"] for value in level.values()]
        yield Check("losses that are no numbers", sum(not math.isfinite(value) for value in losses), 0)
        model.save(self.file)

    def train_recorded(self) -> Iterator[Check]:
        """Train in recorded steps (on a CPU in eager ones), HGAD also in bf16 and reversible memory, and check that
        they change the parameters as eager steps in fp32 do.

        What the steps of a training change is what its parameters are beyond those of one with next to no rate: some
        begin at what the data say.
        """

        def trained(**changes: Any) -> tuple[Any, Tensor]:
            recorded = changes.pop("recorded", False)
            model, _ = self.fitted(self.device, self.config.replace(**changes), cuda_graphs=recorded)
            return model, torch.cat([parameter.detach().flatten().cpu() for parameter in model.parameters()])

        recorded = self.device.type == "cuda"
        _, start = trained(lr=1e-12)
        _, expected = trained()
        model, ours = trained(recorded=recorded)
        yield Check("what recorded steps change", relative_error(ours - start, expected - start), OF_THE_WAY["fp32"])
        if self.method == "hgad":
            model, ours = trained(recorded=recorded, precision="bf16", memory="reversible")
            error = relative_error(ours - start, expected - start)
            yield Check("what recorded steps in bf16 change", error, OF_THE_WAY["bf16"])
        yield Check("the model stays on its device", elsewhere(model, self.device), 0, "tensors elsewhere")

    def images(self) -> list[Tensor]:
        """Return some test images of every class (3, H, W), normal and defective ones in turn."""
        return [read_image(path) for path in self.tests[::TESTS]]

    def score(self) -> Iterator[Check | Figure]:
        here, there = self.model(torch.device("cpu")), self.model(self.device)
        images = self.images()
        yield from scores_alike("as trained", there, here, images)
        ours, right = (score_images(model, images).image_score for model in (there, here))
        yield Figure("scores from pixels, off those of a CPU", relative_error(ours, right), "of 1")
        features = features_of(there, images)
        together, alone = (score_prepared(there, features, throughput=way).image_score for way in (True, False))
        yield Check("batches score as single images", relative_error(together, alone), AGREES)
        paths = [str(path) for path in self.tests[:4]]
        together, alone = (there.score(paths, throughput=way).image_score for way in (True, False))
        yield Figure("batches from pixels, off single images", relative_error(together, alone), "of 1")

    def calibrate(self) -> Iterator[Check]:
        model = self.model(self.device)
        model.calibrate(self.others, false_alarm_rate=0.25)
        yield from scores_alike("calibrated anew", model, self.as_saved(model), self.images())

    def save_and_load(self) -> Iterator[Check]:
        model = self.model(self.device)
        here = self.as_saved(model)
        here.save(self.folder / "again.safetensors")
        back = load(self.folder / "again.safetensors", device=self.device)
        states = [each.state_dict() for each in (model, here, back)]
        differing = sum(not torch.equal(states[0][name].cpu(), s[name].cpu()) for s in states[1:] for name in states[0])
        yield Check("from the device onto a CPU and back", differing, 0, "tensors that differ")
        yield Check("it is on its device again", elsewhere(back, self.device), 0, "tensors elsewhere")
        first, second = (score_images(each, self.images()).image_score for each in (model, back))
        yield Check("its scores are the same", relative_error(second, first), AGREES)

    def camera(self) -> Iterator[Check]:
        """Check that a `Scorer` gives the verdicts and maps that `score` gives."""
        model = self.model(self.device)
        scorer = Scorer(self.file, device=self.device, frame_size=(SIDE, SIDE))
        images = self.images()[:4]
        result = model.score(images)
        frames = [scorer((255 * image.permute(1, 2, 0).numpy()).round().astype(np.uint8)) for image in images]
        scores = torch.tensor([frame.score for frame in frames])
        yield Check("scores of frames", relative_error(scores, result.image_score), AGREES)
        maps = torch.stack([frame.anomaly_map for frame in frames])
        yield Check("maps of frames", relative_error(maps, result.anomaly_map), AGREES)
        verdicts = torch.tensor([frame.is_anomalous for frame in frames])
        yield Check("verdicts of frames that differ", float((verdicts != result.is_anomalous).sum()), 0)

    def monitor(self) -> Iterator[Check]:
        """Check that a `Monitor` takes p-values and groups as they lie on the device."""
        model = self.model(self.device)
        result = score_prepared(model, features_of(model, self.images()))
        states = []
        for p_values, groups in ((result.p_value, result.class_id), (result.p_value.cpu(), result.class_id.cpu())):
            states.append(Monitor.of(model).update(p_values, groups))
        yield Check("states that differ", float(states[0] != states[1]), 0)
        yield Check("images missed", abs(states[0].images - len(result.p_value)), 0)

    def evaluate(self) -> Iterator[Check]:
        """Check the figures of an evaluation: from the features of the device, with those of a CPU."""
        there, here = self.model(self.device), self.model(torch.device("cpu"))
        seen = {path: [level.cpu() for level in image_features(there, read_image(path))] for path in self.tests}
        ours = evaluate(there, self.data, details=False)
        right = evaluate(here, self.data, details=False, features_of=lambda sample: seen[sample.path])
        for protocol in right.figures:
            pairs = [[getattr(each.mean(protocol), name) for name in FIGURES] for each in (ours, right)]
            error = float(np.abs(np.diff(pairs, axis=0)).max())
            yield Check(f"{protocol} protocol", error if math.isfinite(error) else math.inf, 1e-3)

    def absorb(self) -> Iterator[Check]:
        model = self.model(self.device)
        model.absorb(CLASSES[0], self.others / CLASSES[0] / "train/good")
        yield from scores_alike("after more images of a class", model, self.as_saved(model), self.images())

    def add_class(self) -> Iterator[Check]:
        write_images(self.folder / "new", 16, seed=2, classes=(NEW_CLASS,))
        model = self.model(self.device)
        model.add_class(NEW_CLASS, self.folder / "new" / NEW_CLASS / "train/good")
        yield Check("it stays on its device", elsewhere(model, self.device), 0, "tensors elsewhere")
        tests = sorted((self.folder / "new" / NEW_CLASS / "test").rglob("*.png"))
        images = [*self.images(), *map(read_image, tests[::4])]
        yield from scores_alike("with a class more", model, self.as_saved(model), images)

    def as_saved(self, model: Any) -> Any:
        """Save the model, and return what is read from the file, on the CPU."""
        path = self.folder / "changed.safetensors"
        model.save(path)
        return load(path, device="cpu")


def elsewhere(model: Any, device: torch.device) -> int:
    """Return how many tensors of the model are not on this kind of device."""
    return sum(tensor.device.type != device.type for tensor in model.state_dict().values())


def features_of(model: Any, images: list[Tensor]) -> list[Tensor]:
    """Return the features (n, C, h, w) of images, one tensor per level, on the model's device, as it scores them."""
    return list(map(torch.cat, zip(*(image_features(model, image) for image in images), strict=True)))


def scores_alike(label: str, there: Any, here: Any, images: list[Tensor]) -> Iterator[Check]:
    """Check features, maps, scores, groups and verdicts of images on a device with those that a CPU computes.

    Args:
        label: of the checks.
        there: the model on the device.
        here: the same one on the CPU.
        images: (3, H, W) each.
    """
    features = features_of(there, images)
    on_cpu = features_of(here, images)
    error = max(relative_error(ours.cpu(), right) for ours, right in zip(features, on_cpu, strict=True))
    yield Check(f"{label}: features", error, TOLERANCE["tf32"], "a GPU convolves with tf32 operands")
    same = [level.cpu() for level in features]
    moved_inputs = [nearly(here, same, seed) for seed in range(DRAWS)]
    inferred = score_prepared(here, same).class_id
    for way, ids in (("label-free", None), ("group given", inferred)):
        expected = score_prepared(here, same, ids)
        moved = [score_prepared(model, off, ids) for model, off in moved_inputs]
        yield from alike(f"{label}, {way}", score_prepared(there, features, ids), expected, moved)
        from_pixels = score_images(there, images, ids, map_size="seen")
        yield from alike(f"{label}, {way}, from pixels", from_pixels, expected, moved)


def nearly(model: Any, features: list[Tensor], seed: int) -> tuple[Any, list[Tensor]]:
    """Return a copy of the model, and features, of which each tensor is off by `FORWARD` times its Frobenius norm."""
    generator = torch.Generator().manual_seed(seed)

    def off(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=generator)
        return tensor + FORWARD * tensor.norm() / noise.norm().clamp(min=1e-30) * noise

    moved = copy.deepcopy(model)
    state = {name: tensor for name, tensor in moved.state_dict().items() if not name.startswith("encoder.")}
    floats = {name: off(tensor) for name, tensor in state.items() if tensor.is_floating_point() and tensor.numel()}
    moved.load_state_dict(floats, strict=False)
    return moved, [off(level) for level in features]


def alike(label: str, ours: ScoreResult, right: ScoreResult, moved: list[ScoreResult]) -> Iterator[Check]:
    """Check a result with the right one, and allow for what results from features and parameters that are nearly so.

    Densities and entropies are compared less the mean of all, which is many times what an image adds to it. Groups and
    verdicts count where none of these results has another one.
    """
    parts: dict[str, Callable[[ScoreResult], Tensor]] = {"maps": _map, "scores": _score}
    for name, attribute in (("log-densities", "logps"), ("entropies", "neg_entropy")):
        if getattr(ours, attribute):
            parts[name] = functools.partial(_beyond_the_mean, attribute)
    for name, part in parts.items():
        allowed = MARGIN * max(relative_error(part(each), part(right)) for each in moved)
        yield Check(f"{label}: {name}", relative_error(part(ours), part(right)), max(allowed, FORWARD))
    for name in ("class_id", "is_anomalous"):
        expected = getattr(right, name)
        sure = torch.stack([getattr(each, name) == expected for each in moved]).all(0)
        differing = int(((getattr(ours, name).cpu() != expected) & sure).sum())
        what = "groups" if name == "class_id" else "verdicts"
        yield Check(f"{label}: {what} that differ", differing, 0, f"of {int(sure.sum())} images")


def _map(result: ScoreResult) -> Tensor:
    assert isinstance(result.anomaly_map, Tensor)
    return result.anomaly_map.cpu()


def _score(result: ScoreResult) -> Tensor:
    return result.image_score.cpu()


def _beyond_the_mean(attribute: str, result: ScoreResult) -> Tensor:
    values = torch.cat([level.cpu().double().flatten() for level in getattr(result, attribute)])
    return values - values.mean()


# ---- the command line


class Commands:
    """The commands of a user's day, each a process of its own; see `Day` for the arguments."""

    def __init__(self, method: str, device: torch.device) -> None:
        self.day = Day(method, device)
        self.method, self.device = method, device

    @property
    def model(self) -> Path:
        """The model that is trained."""
        return self.day.folder / "run" / "model.safetensors"

    @property
    def steps(self) -> dict[str, Step]:
        """The steps by name, in their order."""
        steps: dict[str, Step] = {"train": self.train, "score": self.score, "eval": self.evaluate}
        return named({f"hgad-fast {name}, {self.method}": step for name, step in steps.items()})

    def train(self) -> Iterator[Check]:
        config = self.day.folder / "config.json"
        config.write_text(CONFIGS[self.method]().to_json())
        options = ["--method", self.method, "--config", config, "--false-alarm-rate", "0.2"]
        self._printed("train", self.day.data, "-o", self.model.parent, *options)
        yield Check("models missing", float(not self.model.exists()), 0)

    def score(self) -> Iterator[Check]:
        images = self.day.data / CLASSES[0] / "test"
        rows = json.loads(self._printed("score", self.model, images, "-o", self.day.folder / "scores", "--json"))
        model = load(self.model, device=self.device)
        expected = torch.stack([model.score(row["file"]).image_score[0] for row in rows])
        scores = torch.tensor([row["score"] for row in rows])
        yield Check("scores, off those of the library", relative_error(scores, expected), AGREES, f"{len(rows)} images")

    def evaluate(self) -> Iterator[Check]:
        figures = json.loads(self._printed("eval", self.model, self.day.data, "--json"))
        right = evaluate(load(self.model, device=self.device), self.day.data, details=False).to_dict(details=False)
        differing = sum(figures["protocols"][name]["mean"] != part["mean"] for name, part in right["protocols"].items())
        yield Check("protocols with other figures than the library's", differing, 0)

    def _printed(self, *arguments: Any) -> str:
        """Run a command, and return what it prints.

        Raises:
            RuntimeError: it failed, or did not end; the message has the end of what it said.
        """
        with tempfile.TemporaryFile("w+") as said:  # a file has what was said before a process is killed
            try:
                ended = subprocess.run(
                    [sys.executable, "-m", "hgad_fast", *map(str, arguments), "--device", self.device.type],
                    cwd=Path(__file__).parents[1],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=said,
                    text=True,
                    timeout=SECONDS,
                )
                outcome = f"exit status {ended.returncode}" if ended.returncode else ""
            except subprocess.TimeoutExpired:
                outcome = f"no end after {SECONDS} s"
            said.seek(0)
            text = said.read()
        print(text)
        if outcome:
            raise RuntimeError(f"{outcome}: {text.strip()[-300:]}".replace("\n", "; "))
        return ended.stdout
