"""What stands before and behind a model in anomalib: images as the model sees them, and scores on anomalib's scale."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import Resize

from ..export.graph import SLACK
from ..features.preprocess import Seeing, preprocess
from ..files import printable
from .scale import to_multiple, to_unit

THRESHOLD = 1.0  # of scores in multiples of it


@dataclass(frozen=True)
class View:
    """How a model sees images: the fields of `features.preprocess.Seeing`."""

    img_size: int | str
    center_crop: bool = False
    square: bool = False

    @classmethod
    def of(cls, config: Seeing) -> View:
        """Return the view of a configuration."""
        return cls(config.img_size, config.center_crop, config.square)


def checked(image: Tensor, name: str) -> Tensor:
    """Return an image (3, H, W) as float32 in [0, 1].

    Resizing by torch goes beyond [0, 1] by its rounding, and is cut back.

    Raises:
        ValueError: it is no image in [0, 1]; `name` says which.
    """
    image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    low, high = (float(value) for value in image.aminmax())
    if image.dim() != 3 or image.shape[0] != 3 or not (-SLACK <= low and high <= 1 + SLACK):
        raise ValueError(
            f"{printable(name)}: the image has shape {tuple(image.shape)} and values from {low:.4g} to {high:.4g}; the "
            "model takes (3, H, W) in [0, 1], and normalises by itself: leave Normalize out of augmentations"
        )
    return image if 0 <= low and high <= 1 else image.clamp(0, 1)


class SeenResize(Resize):
    """Resizes images, and masks with them, as the library does: antialiased, by Pillow's Lanczos filter.

    It is a `Resize`, so that anomalib's datamodules find it, and have their workers apply it to each image. An image
    that is seen at its own size stays as it is. Images are (..., 3, H, W) floats in [0, 1], masks (..., H, W).

    Args:
        view: how images are seen.

    Raises, where it is used:
        ValueError: an image has values beyond [0, 1], which resizing would clip.
    """

    def __init__(self, view: View) -> None:
        super().__init__(size=1, antialias=True)
        self.view = view

    @property
    def view(self) -> View:
        """How images are seen."""
        return self._view

    @view.setter
    def view(self, view: View) -> None:
        self._view = view
        self.size = [view.img_size] if isinstance(view.img_size, int) else []  # what anomalib looks at

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Return an image or a mask as it is seen; anything else as it is."""
        if not isinstance(inpt, Tensor):
            return inpt
        if isinstance(inpt, tv_tensors.Mask):
            planes = inpt.as_subclass(Tensor)
            flat = planes.reshape(-1, *planes.shape[-2:])
            seen = torch.stack([preprocess(plane.bool(), self.view) for plane in flat])
            return tv_tensors.wrap(seen.to(planes.dtype).reshape(*planes.shape[:-2], *seen.shape[-2:]), like=inpt)
        images = inpt.as_subclass(Tensor)
        flat = images.reshape(-1, *images.shape[-3:])
        seen = torch.stack([preprocess(checked(image, "an image"), self.view) for image in flat])
        seen = seen.reshape(*images.shape[:-2], *seen.shape[-2:])
        return tv_tensors.wrap(seen, like=inpt) if isinstance(inpt, tv_tensors.Image) else seen


class SeenPreProcessor(PreProcessor):
    """Shows images to a model as the library does, in training, testing and exported models alike.

    anomalib's own pre-processor leaves antialiasing out of exported models; this one does not.

    Args:
        view: how images are seen.
    """

    def __init__(self, view: View) -> None:
        super().__init__()
        self.transform = self.export_transform = SeenResize(view)

    @property
    def view(self) -> View:
        """How images are seen. Datasets that have taken over the transform see them so, too, when it is set."""
        return self.transform.view

    @view.setter
    def view(self, view: View) -> None:
        self.transform.view = view

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Leave a batch as it is: a training step takes the features of its images, which are kept."""

    def checkpoint_config(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"view": asdict(self.view)}

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Take what `checkpoint_config` returned."""
        self.view = View(**config["view"])


class ThresholdPostProcessor(PostProcessor):
    """Brings scores and maps, in multiples of the threshold of their class, to (0, 1), where 0.5 is the threshold.

    Thresholds come from the held-out normal images that the model is calibrated on: nothing is learnt from validation.

    Args:
        enable_normalization: False leaves multiples of the threshold as they are.
        enable_thresholding: whether labels and masks are made.
        image_sensitivity: in (0, 1). Images above 1 - image_sensitivity are anomalous; with 0.5 above their threshold.
        pixel_sensitivity: likewise of pixels.

    Raises:
        ValueError: a sensitivity is not in (0, 1).
    """

    def __init__(
        self,
        enable_normalization: bool = True,
        enable_thresholding: bool = True,
        image_sensitivity: float = 0.5,
        pixel_sensitivity: float = 0.5,
    ) -> None:
        for name, value in (("image_sensitivity", image_sensitivity), ("pixel_sensitivity", pixel_sensitivity)):
            if not 0 < value < 1:
                raise ValueError(f"{name} is {value}; allowed: above 0 and below 1")
        super().__init__(
            enable_normalization=enable_normalization,
            enable_thresholding=enable_thresholding,
            image_sensitivity=image_sensitivity,
            pixel_sensitivity=pixel_sensitivity,
        )

    @property
    def image_threshold(self) -> Tensor:
        """The threshold of image scores as the model gives them, (): they are in multiples of it."""
        return torch.tensor(THRESHOLD)

    @property
    def pixel_threshold(self) -> Tensor:
        """The threshold of pixels as the model gives them, ()."""
        return torch.tensor(THRESHOLD)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Learn nothing."""

    def on_validation_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """Learn nothing."""

    @staticmethod
    def _normalize(preds: Tensor | None, *statistics: Any) -> Tensor | None:
        return None if preds is None else to_unit(preds)

    @property
    def normalized_image_threshold(self) -> Tensor:
        """The score above which an image is anomalous, ()."""
        return self._threshold(self.image_sensitivity)

    @property
    def normalized_pixel_threshold(self) -> Tensor:
        """The value above which a pixel is anomalous, ()."""
        return self._threshold(self.pixel_sensitivity)

    def _threshold(self, sensitivity: float) -> Tensor:
        threshold = 1 - sensitivity
        return torch.tensor(threshold if self.enable_normalization else to_multiple(threshold))
