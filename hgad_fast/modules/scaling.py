"""Feature scaling: brings the features of a level to a common scale, by statistics of the training features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops.dispatch import in_float32

EIGENVALUE_FLOOR = 1e-4  # of the largest: noise in directions that hardly vary is not raised more than a hundredfold


class Moments:
    """Sums over the pixels of a level, in float64, from which mean and covariance follow.

    Args:
        covariance: whether those of the channels with each other are summed, too.
    """

    def __init__(self, covariance: bool) -> None:
        self._covariance = covariance
        self._count = 0
        self._origin: Tensor | None = None  # near the mean: sums around it lose nothing by cancellation
        self._sum: Tensor = torch.zeros(())
        self._products: Tensor = torch.zeros(())

    def add(self, features: Tensor) -> None:
        """Add the pixels of a map (C, h, w)."""
        pixels = features.detach().flatten(1).T.double()  # (h w, C)
        if self._origin is None:
            self._origin = pixels.mean(0)
            self._sum = torch.zeros_like(self._origin)
            self._products = torch.zeros_like(
                self._origin[:, None] * self._origin if self._covariance else self._origin
            )
        pixels = pixels - self._origin
        self._count += len(pixels)
        self._sum += pixels.sum(0)
        self._products += pixels.T @ pixels if self._covariance else pixels.square().sum(0)

    @property
    def mean(self) -> Tensor:
        """The mean of each channel, (C,)."""
        assert self._origin is not None
        return self._origin + self._sum / self._count

    @property
    def covariance(self) -> Tensor:
        """The covariance of the channels (C, C), or without it their variances (C,); over all pixels."""
        offset = self._sum / self._count
        return self._products / self._count - (offset[:, None] * offset if self._covariance else offset.square())


class StageScaling(nn.Module):
    """Divides features by the standard deviation of their stage, over its pixels and channels.

    Args:
        stages: channels of each stage that is joined in the level; one entry where none are.
    """

    scale: Tensor

    def __init__(self, stages: Sequence[int]) -> None:
        super().__init__()
        self.stages = tuple(stages)
        self.register_buffer("scale", torch.ones(sum(stages)))  # (C,), the factor of each channel

    def moments(self) -> Moments:
        """Return empty sums of the kind that `take` needs."""
        return Moments(covariance=False)

    @torch.no_grad()
    def take(self, moments: Moments) -> None:
        """Take the scale of each stage from the training features; that of a stage without variance stays one."""
        stages = zip(moments.mean.split(self.stages), moments.covariance.split(self.stages), strict=True)
        stds = torch.stack([(variance.mean() + mean.var(correction=0)).sqrt() for mean, variance in stages])
        factors = torch.where(stds > 0, 1 / stds, 1.0)
        self.scale.copy_(factors.repeat_interleave(torch.tensor(self.stages)))

    def forward(self, x: Tensor) -> Tensor:
        """Return features (N, C) divided by the standard deviations."""
        return x * self.scale


class Whitening(nn.Module):
    """Moves and turns features so that the training features have mean zero and the identity as covariance (PCA).

    All directions are kept; those of less than `EIGENVALUE_FLOOR` of the largest variance get less than variance one.

    Args:
        channels: C of the level.
    """

    mean: Tensor
    rotation: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("rotation", torch.eye(channels))  # (C, C), eigenvectors in columns, each scaled

    def moments(self) -> Moments:
        """Return empty sums of the kind that `take` needs."""
        return Moments(covariance=True)

    @torch.no_grad()
    def take(self, moments: Moments) -> None:
        """Take mean and rotation from the training features; without any variance the rotation stays as it is."""
        variances, directions = torch.linalg.eigh(moments.covariance)
        self.mean.copy_(moments.mean)
        if variances[-1] > 0:
            self.rotation.copy_(directions / variances.clamp(min=EIGENVALUE_FLOOR * variances[-1]).sqrt())

    def forward(self, x: Tensor) -> Tensor:
        """Return whitened features (N, C), the direction of the largest variance last."""
        return _turned(x, self.mean, self.rotation)


@in_float32
def _turned(x: Tensor, mean: Tensor, rotation: Tensor) -> Tensor:
    """Return (x - mean) rotation, (N, C)."""
    return (x - mean) @ rotation


def feature_scaling(kind: str, stages: Sequence[Sequence[int]]) -> nn.ModuleList:
    """Return the scaling of each level: none of them for ``"none"``, else `StageScaling` or `Whitening`.

    Args:
        kind: ``"none"``, ``"std"`` or ``"whiten"``.
        stages: for each level, the channels of the stages that are joined in it.
    """
    if kind == "none":
        return nn.ModuleList()
    return nn.ModuleList(StageScaling(level) if kind == "std" else Whitening(sum(level)) for level in stages)
