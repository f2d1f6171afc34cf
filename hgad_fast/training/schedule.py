"""The course of a training: the order of the images, and learning rates."""

from __future__ import annotations

import math

import torch

from ..protocol import Progress, Settings


def order_of_pass(images: int, seed: int, number: int) -> list[int]:
    """Return the numbers of the images in the order in which a pass takes them.

    It depends on nothing else than the seed and the number of the pass, from 0.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
    return torch.randperm(images, generator=generator).tolist()


def warmed_up_cosine(progress: Progress, config: Settings, warm_up_epochs: int) -> float:
    """Return the learning rate of a batch: it rises linearly in the first meta-epochs, and then falls as a cosine.

    The cosine, with eta = lr 0.1^3 and m the meta-epoch, is eta + (lr - eta) (1 + cos(pi m / meta_epochs)) / 2. The
    warm-up rises batch by batch from lr / 10 to the cosine's value at its end. With two meta-epochs of warm-up this is
    the official schedule of HGAD.

    Args:
        progress: the batch's place in the training.
        config: gives lr, meta_epochs and sub_epochs.
        warm_up_epochs: meta-epochs of warm-up.
    """
    floor = config.lr * 0.1**3

    def cosine(meta_epoch: int) -> float:
        return floor + (config.lr - floor) * (1 + math.cos(math.pi * meta_epoch / config.meta_epochs)) / 2

    if progress.meta_epoch >= warm_up_epochs:
        return cosine(progress.meta_epoch)
    start, end = config.lr / 10, cosine(warm_up_epochs)
    batches_done = (progress.meta_epoch * config.sub_epochs + progress.sub_epoch) * progress.batches + progress.batch
    return start + batches_done / (warm_up_epochs * config.sub_epochs * progress.batches) * (end - start)
