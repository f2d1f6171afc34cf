"""A training in anomalib: the steps that lightning asks for, on features that are kept.

It is the training of `hgad_fast.training.fit`: the same order of images, draws of pixels, losses and learning rates.
lightning does the rest: the loop, the optimizer's steps, checkpoints, loggers, callbacks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..environment import plain_torch
from ..files import printable
from ..models.detector import Detector
from ..protocol import Progress
from ..scoring.calibration import calibration_from, warn_of_shortcomings
from ..training.drawing import EVERY_PIXEL, Draw
from ..training.feeding import DeviceFeed, DeviceQueue, Feed, HostFeed, Selection
from ..training.fit import broken_parameter, diverged, recognition, require_every_class, warn_of_recognition
from .features import PathFeatures, computed


class Fitting:
    """What a training needs between its start and its end.

    Args:
        detector: trained in place.
        training: features that are trained on.
        held_out: features of normal images that are calibrated on.
        false_alarm_rate: the target of the thresholds.
        resumed: whether the training goes on from a checkpoint.

    Raises:
        ValueError: a class has no images, or none is held out.
    """

    def __init__(
        self, detector: Detector, training: PathFeatures, held_out: PathFeatures, false_alarm_rate: float, resumed: bool
    ) -> None:
        self.detector, self.training, self.held_out = detector, training, held_out
        self.false_alarm_rate = false_alarm_rate
        if len(training.features) == 0:
            raise ValueError("there are no training images")
        require_every_class(detector, training.features)
        counts = torch.bincount(held_out.features.class_ids, minlength=len(detector.groups)).tolist()
        without = [name for name, count in zip(detector.groups, counts, strict=False) if count == 0]
        if len(held_out.features) == 0 or (detector.groups_are_classes and without):
            raise ValueError(
                f"no normal images are held out of {', '.join(map(repr, without)) or 'the training images'}, and "
                "thresholds rest on them: give at least two images of each class, and a calibration_fraction above 0"
            )
        self.feed: Feed = HostFeed(detector.device)
        if detector.device.type == "cuda" and training.fixed:  # it keeps features on the device
            self.feed = DeviceFeed(DeviceQueue(detector.device))
        self._stage, self._objective = 0, nn.Module()
        self._validated: dict[str, list[Tensor]] = {}  # features of validation images that are not held out, by path
        self._calibrated_at: int | None = None
        with plain_torch():
            if not resumed:
                detector.begin(training.features)
                if detector.closed_form:
                    detector.finish(training.features)

    def loss(self, paths: Sequence[str], progress: Progress, step: int) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Return the loss of a batch, and each of its terms (levels,), by name.

        Args:
            paths: of its images. Those that are held out are left out; None is returned where all are.
            progress: the batch's place in the training.
            step: its number in the training, on which the draw of pixels depends.

        Raises:
            ValueError: an image is not among those that the training began with.
        """
        training, held_out = self.training.numbers, self.held_out.numbers
        if unknown := [path for path in paths if path not in training and path not in held_out]:
            raise ValueError(f"{printable(unknown[0])} was not among the training images when the training began")
        numbers = [training[path] for path in paths if path in training]
        if not numbers:
            return None
        config = self.detector.config
        draw = Draw(self.detector.pixels_per_step, config.seed, step)
        return self._loss(self.training, numbers, progress, draw, self.feed)

    @torch.no_grad()
    def held_out_loss(self, paths: Sequence[str], progress: Progress) -> Tensor | None:
        """Return the loss of held-out images, by their paths; None where one is not held out."""
        if any(path not in self.held_out.numbers for path in paths):
            return None
        numbers = [self.held_out.numbers[path] for path in paths]
        loss, _ = self._loss(self.held_out, numbers, progress, EVERY_PIXEL, HostFeed(self.detector.device))
        return loss

    @plain_torch()
    def _loss(
        self, of: PathFeatures, numbers: list[int], progress: Progress, draw: Draw, feed: Feed
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of images by their numbers, and its terms."""
        stage, _ = self.detector.schedule(progress)
        if stage != self._stage:
            self._stage, self._objective = stage, self.detector.objective(stage)
        images, labels = Selection(of.features.images, numbers), of.features.class_ids[numbers]
        (part,) = feed.parts(images, labels, 1, draw)
        pixels = [sum(group.pixels for group in groups) for groups in part.members]
        loss, terms = self._objective(part.batch(), pixels)
        names: Any = self._objective.terms
        return loss, dict(zip(names, terms.detach().unbind(1), strict=True))

    @plain_torch()
    @torch.no_grad()
    def features(self, paths: Sequence[str], images: Tensor, keep: bool) -> list[list[Tensor]]:
        """Return the features of validation images, (1, C, h, w) of each level.

        Args:
            paths: those of images that are held out are known; the features of others are computed, and kept.
            images: (B, 3, H, W) in [0, 1].
            keep: whether they are kept.
        """
        device, numbers = self.detector.device, self.held_out.numbers
        features = []
        for path, image in zip(paths, images, strict=True):
            levels = self._validated.get(path)
            if path in numbers:
                levels = self.held_out.features.images[numbers[path]]
            elif levels is None:
                levels = computed(self.detector, image, path)
                if keep:
                    self._validated[path] = levels
            features.append([level[None].to(device) for level in levels])
        return features

    @plain_torch()
    @torch.no_grad()
    def bring_up_to_date(self, step: int, again: bool = False) -> None:
        """Calibrate the model as it is after this number of steps, if that is not done yet, or `again`.

        Raises:
            NonFiniteLossError: a parameter is not finite.
        """
        if step == self._calibrated_at and not again:
            return
        detector = self.detector
        if name := broken_parameter(detector):
            raise diverged(f"parameter {name} is not finite after step {step}", detector.config.lr)
        was_training = [module for module in detector.modules() if module.training]
        detector.eval()
        try:
            if not detector.closed_form:
                detector.finish(self.training.features)
            detector.calibration = calibration_from(
                detector, self.held_out.features, self.false_alarm_rate, stand_in=self.training.features
            )
        finally:
            for module in was_training:
                module.training = True
        self._calibrated_at = step

    @plain_torch()
    @torch.no_grad()
    def end(self) -> None:
        """Give memory back, and warn of what users should know of thresholds and classes."""
        self.feed.clear()
        warn_of_shortcomings(self.detector)
        warn_of_recognition(recognition(self.detector, self.held_out.features))


def require_finite(terms: Mapping[str, Tensor], step: int, rate: float) -> None:
    """Raise a NonFiniteLossError where a term of the loss (levels,) of a step, or of one before it, is not finite.

    Args:
        terms: by their names.
        step: the number of the step.
        rate: the highest learning rate, for the message.
    """
    for name, values in terms.items():
        for level, value in enumerate(values.tolist()):
            if not math.isfinite(value):
                raise diverged(f"{name} of level {level} is {value} by step {step}", rate)
