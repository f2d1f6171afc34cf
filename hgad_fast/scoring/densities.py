"""The densities of images from their feature maps, image by image or several images at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..data.images import ImageError
from ..features.backbone import FeatureMaps
from ..protocol import Densities, Detector, ProportionsError

CHUNK_PIXELS = 8192  # feature pixels whose densities are computed together: on a CPU they stay in its cache
CUDA_CHUNK_PIXELS = 2**19  # on a GPU that has to be kept busy, and where every launch costs; 1.7 GB at 200 channels
CUDA_CHUNK_PIXELS_WITH_HIDDEN = 2**17  # where the hidden layer, seven times the size of the features, is in memory


def chunk_pixels(device: torch.device, hidden: bool = True) -> int:
    """Return how many feature pixels' densities are computed together; `hidden`: the hidden layers are in memory."""
    if device.type != "cuda":
        return CHUNK_PIXELS
    return CUDA_CHUNK_PIXELS_WITH_HIDDEN if hidden else CUDA_CHUNK_PIXELS


@torch.no_grad()
def densities(
    model: Detector, features: Sequence[Tensor], group_ids: Tensor | None, throughput: bool = False
) -> list[Densities]:
    """Return the densities of prepared features (B, C, h, w) of each level: one item per image, or per batch of them.

    Batches are formed with `throughput` only: an image computed alone has the same bits whatever the other images are,
    while sums over the pixels of several images are taken in another order.
    """
    pixels = max(x[0, 0].numel() for x in features)
    batch_size = max(1, chunk_pixels(model.device) // pixels) if throughput else 1
    return [
        model.densities(
            FeatureMaps.of([x[i : i + batch_size] for x in features]),
            None if group_ids is None else group_ids[i : i + batch_size],
        )
        for i in range(0, len(features[0]), batch_size)
    ]


@contextmanager
def naming(image_name: Callable[[], str]) -> Iterator[None]:
    """Put the name of an image, if it has one, before the error that it causes."""
    try:
        yield
    except ImageError:
        raise  # it names its file
    except ValueError as error:
        if not (name := image_name()):
            raise
        kind = ProportionsError if isinstance(error, ProportionsError) else ValueError
        raise kind(f"{name}: {error}") from error
