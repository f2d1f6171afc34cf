"""What a model can learn after its training: a class more (`add_class`), and more normal images of one (`absorb`).

Both work on a copy that shares all modules with the model, and replace in it what changes. It becomes the model at the
end: after an error the model is what it was.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..data.datasets import Dataset, Sample, discover
from ..data.normals import are_files, normal_images
from ..environment import plain_torch, require_float32
from ..evaluation.evaluate import Evaluation, evaluate, mean, test_set, without_nan
from ..features.extract import FeatureSet, ShowProgress, feature_set
from ..features.preprocess import image_features, seeing
from ..files import printable
from ..protocol import Detector
from ..scoring.calibration import Calibration, calibration_from, held_out_densities, split, warn_of_shortcomings
from ..scoring.inputs import as_images
from ..scoring.maps import cells_on_map
from ..scoring.rates import enumerated, listed, percent
from ..terminal import warn_user
from ..training.fit import recognition, warn_of_recognition

FAR = 2.0  # times as far above the median of a class's normal images as the highest of them: hardly a normal image

Model = TypeVar("Model", bound=Detector)


@dataclass(frozen=True)
class ClassCheck:
    """What test images of a class that the model knew before show of the model before and after; NaN: cannot be told.

    Attributes:
        name: of the class.
        normal_images, images: how many there are, normal ones and all.
        false_alarms_before, false_alarms_after: normal images that raise an alarm.
        recognised_before, recognised_after: images, of all, whose class is inferred rightly.
        image_auroc_before, image_auroc_after, pixel_auroc_before, pixel_auroc_after: in [0, 1], honest protocol.
    """

    name: str
    normal_images: int
    images: int
    false_alarms_before: int
    false_alarms_after: int
    recognised_before: int
    recognised_after: int
    image_auroc_before: float
    image_auroc_after: float
    pixel_auroc_before: float
    pixel_auroc_after: float


@dataclass(frozen=True)
class AddedClass:
    """What `add_class` did.

    Attributes:
        name: of the class.
        fitted: number of images that it was fitted to.
        held_out: number of images that its threshold rests on, beside those of other classes where they are pooled.
        threshold: image score above which an image of the class is called anomalous; NaN: there is none.
        false_alarm_rate, attained_rate: what was asked for, and what the threshold attains.
        recognised, tried: held-out images that are taken for the class where it is inferred, and how many were tried.
        check: a row for each class of the dataset `check`; None: nothing was measured.
    """

    name: str
    fitted: int
    held_out: int
    threshold: float
    false_alarm_rate: float
    attained_rate: float
    recognised: int
    tried: int
    check: tuple[ClassCheck, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON takes them, NaN as None."""
        return without_nan(asdict(self))

    def lines(self) -> list[str]:
        """Return it for people."""
        name = printable(self.name)
        lines = [
            f"{name}: fitted to {_count(self.fitted)}, {self.held_out} held out for the threshold",
            f"threshold of {name}: none, so that no image of it is ever called anomalous"
            if math.isnan(self.threshold)
            else f"threshold of {name}: {self.threshold:.4g}; it attains {percent(self.attained_rate)}, "
            f"{percent(self.false_alarm_rate)} asked for",
            f"recognised: {self.recognised} of {self.tried} held-out images of {name} are taken for it",
        ]
        if self.check is None:
            return [*lines, "what the other classes lose was not measured: give images of them (check=, --check DATA)"]
        title = f"  {'class':<20} {'false alarms':>18} {'recognised':>18} {'image AUROC':>16} {'pixel AUROC':>16}"
        lines += ["the other classes, before > after:", title]
        for row in self.check:
            alarms = f"{row.false_alarms_before} > {row.false_alarms_after} of {row.normal_images}"
            recognised = f"{row.recognised_before} > {row.recognised_after} of {row.images}"
            aurocs = [
                "-" if math.isnan(before) else f"{100 * before:.1f} > {100 * after:.1f}"
                for before, after in (
                    (row.image_auroc_before, row.image_auroc_after),
                    (row.pixel_auroc_before, row.pixel_auroc_after),
                )
            ]
            lines.append(f"  {printable(row.name):<20} {alarms:>18} {recognised:>18} {aurocs[0]:>16} {aurocs[1]:>16}")
        return lines


@dataclass(frozen=True)
class Absorbed:
    """What `absorb` did. Where groups are not classes, thresholds are means over the groups of the images.

    Attributes:
        class_name: of the images.
        images: how many there were.
        learned: whether the model learned from them; otherwise the calibration alone took account of them.
        alarms_before, alarms_after: how many of them raised an alarm before, and raise one now.
        threshold_before, threshold_after: of the class.
        far: the images that score so far beyond the normal ones that they may show a defect.
    """

    class_name: str | None
    images: int
    learned: bool
    alarms_before: int
    alarms_after: int
    threshold_before: float
    threshold_after: float
    far: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON takes them, NaN as None."""
        return without_nan(asdict(self))

    def lines(self) -> list[str]:
        """Return it for people."""
        whose = f" of {printable(self.class_name)}" if self.class_name is not None else ""
        how = (
            "the model learned from them"
            if self.learned
            else "the calibration alone took account of them: the weights of this method stay, thresholds follow scores"
        )
        return [
            f"absorbed {_count(self.images)}{whose}: {how}",
            f"alarms among them: {self.alarms_before} before, {self.alarms_after} now",
            f"threshold: {self.threshold_before:.4g} before, {self.threshold_after:.4g} now",
        ]


@plain_torch()
@torch.no_grad()
def add_class(
    model: Model,
    name: str,
    images: Any,
    false_alarm_rate: float | None = None,
    *,
    calibration: Any = None,
    check: Any = None,
    skip_bad: bool = False,
    progress: ShowProgress | None = None,
) -> AddedClass:
    """Add a class to a trained model from normal images of it, without training.

    A place Gaussian is fitted to the images in closed form, on the whitening that the model has: the other classes keep
    the bits of their maps, scores and p-values, wherever an image is taken for the same class as before. HGAD keeps its
    flows, and takes centres fitted to the latents of the images: densities of the other classes change by rounding
    alone, but their entropy maps by a class more among those that a pixel may be of. All classes keep their thresholds,
    which may be too low where entropy maps count: `check` measures it.

    Args:
        model: a detector whose groups are the classes, calibrated; changed in place.
        name: of the new class.
        images: normal images of it: a folder (of images, or of the class in a layout of `data.datasets`), paths, or
            images in any form that `score` takes; a `FeatureSet`, whose class ids do not count; or for a model without
            a backbone a list of features (n, C, h, w) of each level.
        false_alarm_rate: that of the model, which all classes share; None: the same.
        calibration: other normal images of the class, in any of these forms, for its threshold; None holds out
            `config.calibration_fraction` of `images`, at least 8 and never more than half.
        check: a dataset, or its root, with images of the other classes to measure what they lose: its test images, or
            where it has none its normal images.
        skip_bad: leave out images that cannot be decoded, with a warning, instead of stopping.
        progress: wraps loops over images, e.g. in a progress bar with the given title.

    Raises:
        ValueError: the name is taken or none, the method cannot add a class, the model is not calibrated, or images or
            other arguments do not fit.
    """
    require_float32(cast(Any, model))
    if not model.groups_are_classes:  # the method says what to do instead, before time is spent on features
        model.grow(name, FeatureSet([], torch.empty(0, dtype=torch.int64)))
    known = _known_calibration(model)
    name = _new_name(model, name)
    if false_alarm_rate not in (None, known.false_alarm_rate):
        raise ValueError(
            f"false_alarm_rate is {false_alarm_rate}, and the classes of the model share one of "
            f"{known.false_alarm_rate}: leave it out. Another one moves the thresholds of all: set "
            "model.calibration.false_alarm_rate first"
        )
    tested = None if check is None else _check_set(model, check, name)
    grown, seen, group = _sharing(model), seeing(_sharing(model), known.img_size), len(model.groups)
    if calibration is None:
        features, as_calibrated = _features_of_both(grown, seen, images, group, skip_bad, progress)
    else:
        features = _features(grown, images, group, skip_bad, progress)
    fraction = model.config.calibration_fraction if calibration is None else 0.0
    rows, held_out_rows = split(features.class_ids, fraction, model.config.seed)
    training = features.subset(rows)
    if calibration is None and fraction and not len(held_out_rows):
        raise ValueError(
            f"class {name!r} has one image, and none can be held out for a threshold: give more images, or others as "
            "calibration="
        )
    if calibration is None:
        held_out = as_calibrated.subset(held_out_rows)
    else:
        held_out = _features(seen, calibration, group, skip_bad, progress)
    warning = grown.grow(name, training)
    extended = known.with_group(grown.density_parts)
    new = calibration_from(
        grown, held_out, known.false_alarm_rate, training, known.img_size, level_max=extended.level_max
    )
    grown.calibration = extended.renewed(new, [group])
    counts = recognition(grown, held_out)
    rows_of_check = None if tested is None else _checked(model, grown, tested, progress)
    vars(model).update(vars(grown))
    if warning:
        warn_user(warning)
    _warn_of_lost(rows_of_check or ())
    warn_of_shortcomings(model)
    warn_of_recognition(counts)
    right, tried = counts.get(name, (0, 0))
    return AddedClass(
        name,
        fitted=len(training),
        held_out=len(held_out),
        threshold=grown.calibration.threshold(group),
        false_alarm_rate=known.false_alarm_rate,
        attained_rate=grown.calibration.attained_rate(group),
        recognised=right,
        tried=tried,
        check=rows_of_check,
    )


@plain_torch()
@torch.no_grad()
def absorb(
    model: Model,
    class_name: str | None,
    images: Any,
    *,
    skip_bad: bool = False,
    progress: ShowProgress | None = None,
) -> Absorbed:
    """Take more normal images of a known class, such as false alarms, so that others like them raise none.

    A place Gaussian adds them to the sums of its class, which is exact: the class is what a fit to all images together,
    on the same whitening, gives. Its threshold stays. Other methods learn nothing: the scores of the images join those
    that the threshold of the class rests on, which follows them. The other classes keep the bits of their scores,
    thresholds and p-values. Never absorb an image of a defect; a warning names images that score far beyond the normal
    ones.

    Args:
        model: a calibrated detector; changed in place.
        class_name: the class of the images; where groups are not classes it has no effect, and may be None.
        images: normal images, as for `add_class`.
        skip_bad: leave out images that cannot be decoded, with a warning, instead of stopping.
        progress: wraps loops over images, e.g. in a progress bar with the given title.

    Raises:
        ValueError: the class is unknown, the model is not calibrated, or images do not fit.
    """
    require_float32(cast(Any, model))
    known = _known_calibration(model)
    group = _known_group(model, class_name)
    changed, seen = _sharing(model), seeing(_sharing(model), known.img_size)
    features, as_calibrated = _features_of_both(changed, seen, images, group, skip_bad, progress)
    scores, group_ids = _scores(changed, as_calibrated, known)
    if not scores.isfinite().all():
        i = int((~scores.isfinite()).nonzero()[0])
        raise ValueError(f"{features.name(i)} has the score {float(scores[i])}: it cannot be absorbed")
    _, alarms, thresholds, _ = known.judge(scores, group_ids)
    far = tuple(features.name(i) for i in _far(known, scores, group_ids))
    learned = changed.take_images(features)
    if learned:
        scores_after, group_ids_after = _scores(changed, as_calibrated, known)
    else:
        scores_after, group_ids_after = scores, group_ids
        changed.calibration = known.joined_by(scores, group_ids)
    _, alarms_after, thresholds_after, _ = changed.calibration.judge(scores_after, group_ids_after)
    vars(model).update(vars(changed))
    if far:
        warn_user(
            f"{len(far)} of {len(features)} absorbed images score more than {FAR:g} times as far above the median of "
            f"normal images as the highest of them ({enumerated(far)}): look at them, and if they show defects go back "
            "to the model before"
        )
    return Absorbed(
        class_name,
        images=len(features),
        learned=learned,
        alarms_before=int(alarms.sum()),
        alarms_after=int(alarms_after.sum()),
        threshold_before=mean(set(thresholds.tolist())),
        threshold_after=mean(set(thresholds_after.tolist())),
        far=far,
    )


def _count(images: int) -> str:
    return f"{images} image{'s' * (images != 1)}"


def _warn_of_lost(rows: Sequence[ClassCheck]) -> None:
    """Warn of classes whose images are recognised less often than before."""
    lost = [row for row in rows if row.recognised_after < row.recognised_before]
    if lost:
        counts = enumerated(
            [f"{row.name} {row.recognised_before} > {row.recognised_after} of {row.images}" for row in lost]
        )
        warn_user(
            f"images of other classes are taken for another one since the class was added (recognised: {counts}): tell "
            "the class when you score (class_ids, --class), or train anew with all classes"
        )


def _sharing(model: Model) -> Model:
    """Return a copy of a model that shares its modules; one that is replaced in the copy stays in the model."""
    other = copy.copy(model)
    for name in ("_modules", "_parameters", "_buffers"):
        vars(other)[name] = vars(model)[name].copy()
    return other


def _known_calibration(model: Detector) -> Calibration:
    if model.calibration is None:
        raise ValueError("the model is not calibrated: calibrate it first (model.calibrate, hgad-fast calibrate)")
    return model.calibration


def _new_name(model: Detector, name: Any) -> str:
    """Return the name of a new class, as datasets give it.

    Raises:
        ValueError: it is no name, or that of a class or group.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"name is {name!r}; allowed: a text that is not empty")
    if name != name.strip():
        raise ValueError(f"name is {name!r}, which begins or ends with a space")
    name = printable(name)
    if model.groups_are_classes and name in model.groups:
        raise ValueError(
            f"the model knows the class {name!r}: absorb more normal images of it (model.absorb, hgad-fast absorb), or "
            "give the new one another name"
        )
    return name


def _known_group(model: Detector, class_name: str | None) -> int:
    """Return the number of the group of a class; 0 where groups are not classes.

    Raises:
        ValueError: there is no such class.
    """
    names = model.groups if model.groups_are_classes else model.config.names
    if class_name is None and not model.groups_are_classes:
        return 0
    if class_name not in names:
        remedy = " A new one is added (model.add_class, hgad-fast add-class)" if model.groups_are_classes else ""
        raise ValueError(f"class {class_name!r} is unknown; the model knows {listed(names)}.{remedy}")
    return model.groups.index(class_name) if model.groups_are_classes else 0


def _features(model: Detector, images: Any, group: int, skip_bad: bool, progress: ShowProgress | None) -> FeatureSet:
    """Return the features of normal images of one group, in any form that `add_class` takes.

    Raises:
        ValueError: there are none, one cannot be read, or features do not fit the model.
    """
    if images == "":
        raise ValueError("images is an empty text; name the folder of the images (. is the current one)")
    images = list(images) if isinstance(images, Iterator) else images
    model = copy.copy(model)  # a dataset's class names are taken over, and those of a model may be made up
    data: Any
    if isinstance(images, FeatureSet):
        data = replace(images, class_ids=torch.zeros(len(images), dtype=torch.int64))
    elif are_files(images):
        files = normal_images(images)
        samples = tuple(Sample(file, 0) for file in files)
        data = Dataset(files[0].parent, model.config.names, samples, ())
    elif model.encoder is None:
        levels = list(images)
        data = levels, torch.zeros(len(levels[0]) if levels else 0, dtype=torch.int64)
    else:
        progress_of = progress or (lambda items, title: items)
        tensors = progress_of(list(as_images(images, model.config.white_level)), "features")
        maps = [[level[0].cpu() for level in image_features(model, image)] for image in tensors]
        data = FeatureSet(maps, torch.zeros(len(maps), dtype=torch.int64))
    features = feature_set(
        model, data, skip_bad=skip_bad, on_bad=lambda error: warn_user(str(error)), progress=progress
    )
    if not len(features):
        raise ValueError("there are no images; give normal images of the class")
    return replace(features, class_ids=torch.full((len(features),), group))


def _features_of_both(
    model: Detector, calibrated: Detector, images: Any, group: int, skip_bad: bool, progress: ShowProgress | None
) -> tuple[FeatureSet, FeatureSet]:
    """Return the `_features` of a model, and those at the size of its calibration, which mostly are the same.

    Raises:
        ValueError: as by `_features`; or the sizes differ, and `images` are features.
    """
    sizes = [each.config.img_size for each in (model, calibrated)]
    if sizes[0] == sizes[1]:
        features = _features(model, images, group, skip_bad, progress)
        return features, features
    if isinstance(images, FeatureSet):
        raise ValueError(
            f"images are features at one size, and the model, trained at img_size={sizes[0]!r}, was calibrated at "
            f"{sizes[1]!r}: give the images themselves, so that they are seen at both"
        )
    images = list(images) if isinstance(images, Iterator) else images  # which is gone through twice
    first, second = (_features(each, images, group, skip_bad, progress) for each in (model, calibrated))
    return first, second


def _scores(model: Detector, features: FeatureSet, calibration: Calibration) -> tuple[Tensor, Tensor]:
    """Return the image scores and the groups, (n,) each, of features, each under its own class where groups are."""
    cells = cells_on_map(model, calibration.img_size or model.config.img_size)
    images = held_out_densities(model, features)
    scores = [calibration.scores_alone(image, model.config.msk_size, cells).float().cpu() for image in images]
    return torch.cat(scores), torch.cat([image.group_ids for image in images])


def _far(calibration: Calibration, scores: Tensor, group_ids: Tensor) -> list[int]:
    """Return which scores are more than `FAR` times as far above the median of their group's as the highest of them."""
    far = []
    for i, (score, k) in enumerate(zip(scores.tolist(), group_ids.tolist(), strict=True)):
        reference = calibration.reference(k)
        if len(reference):
            median = float(reference.median())
            if score - median > FAR * (float(reference[-1]) - median):
                far.append(i)
    return far


def _check_set(model: Detector, check: Any, name: str) -> Dataset:
    """Return the dataset of known classes to check a model on, the normal images as its test images where it has none.

    Raises:
        ValueError: there are no images, or of classes that the model does not know.
    """
    dataset = check if isinstance(check, Dataset) else discover(check)
    known = [each for each in dataset.class_names if each in model.groups]
    others = [each for each in dataset.class_names if each not in known and each != name]  # the new one may be there
    if others and known:
        warn_user(f"the check leaves out {listed(others)}: the model does not know them")
    ids = {dataset.class_names.index(each): k for k, each in enumerate(known)}
    tested = tuple(
        replace(sample, class_id=ids[sample.class_id])
        for sample in dataset.test or dataset.train
        if sample.class_id in ids
    )
    if known:
        dataset = replace(dataset, class_names=tuple(known))
    return test_set(model, replace(dataset, train=(), test=tested))


def _checked(
    before: Detector, after: Detector, dataset: Dataset, progress: ShowProgress | None
) -> tuple[ClassCheck, ...]:
    """Return what the test images of each class show of two models."""
    size = before.calibration.img_size
    first, second = (
        evaluate(model, dataset, img_size=size, details=False, progress=progress) for model in (before, after)
    )
    return tuple(_class_check(name, first, second) for name in first.figures["honest"])


def _class_check(name: str, before: Evaluation, after: Evaluation) -> ClassCheck:
    values: dict[str, Any] = {}
    for when, evaluation in (("before", before), ("after", after)):
        images = [image for image in evaluation.images["honest"] if image.class_name == name]
        normal = [image for image in images if not image.is_anomalous]
        figures = evaluation.figures["honest"][name]
        values |= {
            f"false_alarms_{when}": sum(bool(image.is_flagged) for image in normal),
            f"recognised_{when}": sum(image.inferred_class == name for image in images),
            f"image_auroc_{when}": figures.image_auroc,
            f"pixel_auroc_{when}": figures.pixel_auroc,
        }
    return ClassCheck(name, len(normal), len(images), **values)
