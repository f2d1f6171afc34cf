"""The conditions of VQ-Flow's flows: a prototype for each image, and patterns for its pixels (arXiv 2409.00942).

Symbols: B images; D_p channels of a prototype; D_e of the position code; D_s of a pattern; K_p prototypes; K_s patterns
of a level. The levels are those that have a flow, from the finest on, and last the top level, which only conditions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import Condition
from .codebook import Codebook, Quantised
from .flow import dense_position, sinusoidal_position
from .synchronised import BatchNorm


class ConditionMaps(NamedTuple):
    """The conditions of B images.

    Attributes:
        levels: the condition of each level's flow, and last that of the fusion flow.
        prototype: (B, D_p), the code of each image's prototype; the gradient goes to the image's semantic vector.
        prototype_ids: (B,) int64.
        prototype_loss, pattern_loss: commitment of the vectors to their codes, (); the patterns' is the sum over the
            levels.
        validity: (B,), 0, or NaN where a vector of the image is not finite. A code is finite even then, and what
            follows from it would look sound.
    """

    levels: list[Condition]
    prototype: Tensor
    prototype_ids: Tensor
    prototype_loss: Tensor
    pattern_loss: Tensor
    validity: Tensor


class Conditions(nn.Module):
    """What VQ-Flow's flows are conditioned on: the Conceptual Prototype Codebook and the Concept-Specific Patterns.

    A semantic vector, made of the top level, chooses the image's prototype. At each level a pixel's feature, together
    with the upsampled semantic map, less what prototype and position say already (`residual`), chooses its pattern. So
    a condition takes finitely many values, and is as good as constant around an image: the flow of the same features
    remains a density.

    Args:
        channels: C of each level, the top level last.
        prototypes, patterns: K_p and K_s.
        prototype_dim: D_p.
        position_dim: D_e; 0: without position.
        residual: patterns describe what prototype and position do not; False ("naive"): they describe everything.
        revive: see `Codebook`.

    The names in the state dict are the official ones.
    """

    def __init__(
        self,
        channels: Sequence[int],
        prototypes: int,
        patterns: int,
        prototype_dim: int,
        position_dim: int,
        residual: bool = True,
        revive: bool = True,
    ) -> None:
        super().__init__()
        self.position_dim, self.residual = position_dim, residual
        self.pattern_dim = position_dim + prototype_dim
        width = self.pattern_dim if residual else prototype_dim  # of the features that become patterns
        *flow_levels, top = channels
        self.semantic_encoder = nn.Sequential(nn.Conv2d(top, width, 1), BatchNorm(width), nn.ReLU())
        self.semantic_mlp = nn.Sequential(
            nn.Linear(top, prototype_dim),
            BatchNorm(prototype_dim),
            nn.ReLU(),
            nn.Linear(prototype_dim, prototype_dim),
            BatchNorm(prototype_dim),
            nn.ReLU(),
        )
        self.upsamplers = nn.ModuleList(
            nn.Sequential(nn.Identity(), nn.Conv2d(width, width, 1)) for _ in flow_levels
        )  # the upsampling itself, whose place in the official state dict is 0, follows from the sizes
        self.feature_mlps = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(dim, width, 1),
                BatchNorm(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 1),
                BatchNorm(width),
                nn.ReLU(),
            )
            for dim in channels
        )
        self.cpc_quantizer = Codebook(prototype_dim, prototypes, revive)
        self.cspc_quantizers = nn.ModuleList(Codebook(self.pattern_dim, patterns, revive) for _ in channels)

    @property
    def condition_dim(self) -> int:
        """Channels of a condition: a pattern and the prototype."""
        return self.pattern_dim + self.cpc_quantizer.embed.shape[0]

    def forward(self, levels: Sequence[Tensor], prototype_ids: Tensor | None = None) -> ConditionMaps:
        """Return the conditions of features (B, C, h, w) of each level, the top level last.

        Args:
            levels: the features.
            prototype_ids: (B,) int64, the prototypes of the images; None: the nearest ones.
        """
        semantic_vectors = self.semantic_vectors(levels[-1])
        prototype, chosen = self.prototypes(semantic_vectors, prototype_ids)
        conditions, losses = [], []
        validity = (semantic_vectors.detach() * 0).sum(1)
        for level, (vectors, gradient_to) in enumerate(self.pattern_vectors(levels, prototype)):
            codebook = self.cspc_quantizers[level]
            assert isinstance(codebook, Codebook)
            h, w = levels[level].shape[2:]
            quantised = codebook(vectors)
            conditions.append(
                Condition(
                    quantised.indices.view(-1, h, w),
                    quantised.codes,
                    prototype,
                    self.position(h, w, vectors) if self.residual else None,
                    self.residual,
                    gradient_to if torch.is_grad_enabled() else None,
                )
            )
            losses.append(quantised.commitment)
            validity = validity + (vectors.detach() * 0).sum((1, 2))
        ids = chosen.indices.view(-1)
        return ConditionMaps(conditions, prototype, ids, chosen.commitment, torch.stack(losses).sum(), validity)

    def semantic_vectors(self, top: Tensor) -> Tensor:
        """Return the semantic vectors (B, D_p) of features (B, C, h, w) of the top level."""
        return self.semantic_mlp(top.mean((2, 3)))

    def prototypes(self, vectors: Tensor, prototype_ids: Tensor | None = None) -> tuple[Tensor, Quantised]:
        """Return the prototypes (B, D_p) of images, with a straight-through gradient, and what chose them.

        Args:
            vectors: semantic vectors (B, D_p).
            prototype_ids: (B,) int64, the images' prototypes; None: the nearest ones.
        """
        chosen = self.cpc_quantizer(vectors[:, None])
        if prototype_ids is not None:
            chosen = chosen._replace(indices=prototype_ids.to(vectors.device)[:, None])
        nearest = chosen.codes[chosen.indices[:, 0]]
        if not torch.is_grad_enabled():
            return nearest, chosen
        return nearest + (vectors - vectors.detach()), chosen  # to the bit the code, where the other order rounds

    def pattern_vectors(self, levels: Sequence[Tensor], prototype: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return for each level the vectors (B, h w, D_s) that patterns are chosen by, and the map behind them.

        The condition's gradient goes to that map, (B, D_s, h, w).
        """
        result = []
        for features in self.pattern_features(levels):
            h, w = features.shape[2:]
            result.append(self.pixel_vectors(features, self.position(h, w, features), prototype))
        return result

    def pattern_features(self, levels: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield what the networks make of each level (B, C, h, w) and the top level: a map (B, D_s or D_p, h, w)."""
        semantic_map = self.semantic_encoder(levels[-1])
        for level, x in enumerate(levels):
            features = self.feature_mlps[level](x)
            if level < len(self.upsamplers):
                size = x.shape[2:]
                upsampled = semantic_map
                if size != semantic_map.shape[2:]:
                    upsampled = F.interpolate(semantic_map, size, mode="bilinear", align_corners=False)
                features = features + self.upsamplers[level](upsampled)
            yield features

    def pixel_vectors(self, features: Tensor, position: Tensor | None, prototype: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vectors (B, h w, D_s) that the patterns of a level are chosen by, and the map behind them.

        Args:
            features: of `pattern_features`.
            position: the code of each pixel, (D_e, h, w), of `position`.
            prototype: (B, D_p), those of the images.
        """
        batch, _, h, w = features.shape
        if self.residual:
            known = prototype[:, None].expand(-1, h * w, -1)
            if position is not None:
                known = torch.cat([position.flatten(1).t().expand(batch, -1, -1), known], 2)
            return features.flatten(2).transpose(1, 2) - known, features
        if position is not None:
            features = torch.cat([features, position.expand(batch, -1, -1, -1)], 1)
        return features.flatten(2).transpose(1, 2), features

    def position(self, h: int, w: int, like: Tensor) -> Tensor | None:
        """Return the position code (D_e, h, w), columns first; None without position."""
        if not self.position_dim:
            return None
        code = dense_position(sinusoidal_position(h, w, self.position_dim, like.device))
        return code.to(like.dtype).t().reshape(self.position_dim, h, w)
