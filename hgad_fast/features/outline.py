"""What is known of a backbone without its network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .backbone import BackboneSettings

Stages = tuple[tuple[int, ...], int]  # of a level: their channels, and how many, from the first, are fine


class Outline(nn.Module):
    """A backbone's place in a model that is described and computes nothing; the attributes are those of `Backbone`."""

    def __init__(self, config: BackboneSettings, stages: Sequence[Stages]) -> None:
        super().__init__()
        self.arch, self.weights = config.backbone_arch, config.backbone_weights
        self.stage_dims = tuple(dims for dims, _ in stages)
        self.fine_stages = tuple(fine for _, fine in stages)
        self.feature_dims = tuple(map(sum, self.stage_dims))


def stages_in(value: Any, feature_dims: Sequence[int] | None) -> list[Stages] | None:
    """Return the stages of levels with these channels that a JSON value lists; None where it does not."""
    try:
        stages = [(tuple(dims), fine) for dims, fine in value]
        right = all(all(type(n) is int and n > 0 for n in (*dims, fine)) and fine <= len(dims) for dims, fine in stages)
        return stages if right and [sum(dims) for dims, _ in stages] == list(feature_dims or ()) else None
    except (TypeError, ValueError):
        return None
