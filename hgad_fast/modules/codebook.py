"""A codebook of vector quantisation, learnt by moving averages (VQ-VAE, arXiv 1711.00937; VQ-Flow, 2409.00942)."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .. import ops
from .synchronised import process_count, process_rank, summed

DECAY = 0.99  # of the moving averages
EPSILON = 1e-5  # added to the counts, so that an unused code is no division by zero
DEAD_BELOW = 0.02  # of the mean usage: codes below it are dead, and are revived
SEED_ROWS = 16384  # vectors that codes are seeded from; more cost time and change little


class Quantised(NamedTuple):
    """What a codebook makes of vectors.

    Attributes:
        indices: (B, P) int64, the nearest code of each vector.
        codes: (K, D), the codes as they were before the vectors changed them.
        commitment: this process's part of the mean over all B P D elements of the squared distance to the code, ().
    """

    indices: Tensor
    codes: Tensor
    commitment: Tensor


class Codebook(nn.Module):
    """K codes of D channels, each the moving average of the vectors that are nearest to it.

    In training mode `forward` counts the vectors of each code, sums them up, and moves the averages. The state dict has
    the official names: ``embed`` (D, K), the codes; ``cluster_size`` (K,) and ``embed_avg`` (D, K), the averages of
    counts and sums. Beside them, ``updates`` counts the batches.

    Args:
        dim: D.
        size: K.
        revive: in each batch, move codes that are hardly used to vectors of the batch, with their averages. Without it
            a code that is far from all vectors stays unused for ever.
    """

    embed: Tensor
    embed_avg: Tensor
    cluster_size: Tensor
    updates: Tensor

    def __init__(self, dim: int, size: int, revive: bool = True) -> None:
        super().__init__()
        self.revive = revive
        codes = torch.randn(dim, size)
        self.register_buffer("embed", codes)
        self.register_buffer("cluster_size", torch.zeros(size))
        self.register_buffer("embed_avg", codes.clone())
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @property
    def size(self) -> int:
        """K, the number of codes."""
        return self.cluster_size.shape[0]

    def codes(self) -> Tensor:
        """Return a copy of the codes, (K, D), that later batches leave as it is."""
        return self.embed.t().clone(memory_format=torch.contiguous_format)

    def forward(self, x: Tensor) -> Quantised:
        """Return the nearest codes of vectors (B, P, D), of P places in B images; learn from them in training mode."""
        codes, rows = self.codes(), x.reshape(-1, x.shape[-1])
        indices = ops.nearest_code(rows.detach(), codes)
        distance = (rows - codes[indices]).square().sum()
        if self.training:
            total = self._learn(x.detach(), indices)
        else:
            total = x.new_tensor(float(len(rows)))
        return Quantised(indices.view(x.shape[:-1]), codes, distance / (total * x.shape[-1]))

    @torch.no_grad()
    def seed(self, vectors: Tensor, seed: int) -> None:
        """Place the codes on vectors (N, D), spread by k-means++ (Arthur and Vassilvitskii, 2007), with counts of 1.

        Where there are fewer different vectors than codes, the rest of the codes repeats some of them.
        """
        from sklearn.cluster import kmeans_plusplus

        points = vectors.detach().cpu().double().numpy()
        random = np.random.RandomState(seed % 2**32)
        if len(points) > SEED_ROWS:
            points = points[np.sort(random.choice(len(points), SEED_ROWS, replace=False))]
        count = min(self.size, len(np.unique(points, axis=0)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numerical ones, of points that are equal
            _, chosen = kmeans_plusplus(points, count, random_state=random)
        chosen = np.concatenate([chosen, random.choice(len(points), self.size - count)]).astype(np.int64)
        codes = torch.from_numpy(points[chosen]).to(self.embed)
        self.embed.copy_(codes.t())
        self.embed_avg.copy_(codes.t())
        self.cluster_size.fill_(1.0)

    def perplexity(self) -> Tensor:
        """Return how many codes are in use: exp of the entropy of their shares, between 1 and K, ()."""
        shares = self.cluster_size / self.cluster_size.sum().clamp(min=torch.finfo(self.cluster_size.dtype).tiny)
        return torch.exp(-torch.xlogy(shares, shares).sum())

    @torch.no_grad()
    def _learn(self, x: Tensor, indices: Tensor) -> Tensor:
        """Learn from vectors (B, P, D) with their nearest codes, and return B P of all processes, ()."""
        rows = x.reshape(-1, x.shape[-1])
        counts, sums = ops.code_statistics(rows, indices, self.size)
        statistics = summed(torch.cat([sums, counts[:, None]], 1))
        counts, sums = statistics[:, -1], statistics[:, :-1]
        self.cluster_size.lerp_(counts.to(self.cluster_size), 1 - DECAY)
        self.embed_avg.lerp_(sums.t().to(self.embed_avg), 1 - DECAY)
        total = self.cluster_size.sum()
        smoothed = total * (self.cluster_size + EPSILON) / (total + self.size * EPSILON)
        self.embed.copy_(self.embed_avg / smoothed)
        self.updates.add_(1)
        if self.revive:
            self._revive(x, counts.sum())
        return counts.sum().to(x.dtype)

    def _revive(self, x: Tensor, total: Tensor) -> None:
        """Move dead codes to vectors of x (B, P, D), with their averages; `total` is B P of all processes.

        The vectors are drawn by a hash of the code and of the number of batches, from those of all processes, which
        have every n-th image each: so a resumed run, or one of other processes, draws the same, and the host waits for
        nothing.
        """
        processes, places = process_count(), x.shape[1]
        codes = torch.arange(self.size, device=x.device)
        drawn = (codes * 1_000_003 + self.updates) * 2_654_435_761 % 2**32
        drawn = (drawn ^ (drawn >> 15)) * 2_246_822_519 % 2**32 % total.to(torch.int64)
        image, place = drawn // places, drawn % places
        row = (image // processes * places + place).clamp(max=math.prod(x.shape[:2]) - 1)
        own = image % processes == process_rank()
        vectors = summed(x.reshape(-1, x.shape[-1])[row] * own[:, None]).t()
        dead = self.cluster_size < DEAD_BELOW * self.cluster_size.mean()
        self.embed.copy_(torch.where(dead, vectors, self.embed))
        self.embed_avg.copy_(torch.where(dead, vectors, self.embed_avg))
        self.cluster_size.masked_fill_(dead, 1.0)
