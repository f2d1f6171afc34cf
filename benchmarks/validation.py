"""The official validation loop with our class in the place of the official one: `python -m benchmarks.validation`.

Images of 128 px, one in a batch, of a known class: features of three levels, and of each level the positional code, the
flow, and the two scores of each pixel, by the calls that the official script makes. Both classes have the same
parameters. They take turns, and the median processor time of one thread is given: of each level's part, and of the
whole loop with the backbone, which both share. Compiled code and parameters are in no cache when a part begins, because
what the loop does between two visits to it is done between them here, too.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hgad_fast import HGADConfig, HGADModel
from hgad_fast.bench import measure
from hgad_fast.bench.official import OfficialLevel, dense_position, intra_class_centres, official_scores
from hgad_fast.files import replacing

BACKBONES = ("tf_efficientnet_lite0", "tf_efficientnet_b6")
SIDE, CLASSES, CLASS = 128, 15, 3
Way = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]  # level, pixels (N, C), code (N, P) -> the scores (N,)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the figures as JSON here")
    parser.add_argument("--rounds", type=int, default=30, help="images that each class sees (default: 30)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    figures: dict[str, Any] = measure.about_run(torch.device("cpu")) | {"side": SIDE, "rounds": arguments.rounds}
    figures["validation"] = {backbone: compare(backbone, arguments.rounds) for backbone in BACKBONES}
    print(json.dumps(figures["validation"], indent=2))
    if arguments.output is not None:
        with replacing(arguments.output) as file:
            file.write_text(json.dumps(figures, indent=2) + "\n")


@torch.no_grad()
def compare(backbone: str, rounds: int) -> dict[str, Any]:
    """Return the processor seconds of both classes, and the largest relative deviation of a score."""
    settings: dict[str, Any] = {"backbone_arch": backbone, "backbone_weights": None, "img_size": SIDE}
    model = HGADModel(HGADConfig(n_classes=CLASSES, fusion="product", **settings)).eval()
    levels = [OfficialLevel.of(model, level).eval() for level in range(model.config.feature_levels)]
    for delta in (*model.mu_deltas, *(level.delta for level in levels)):
        delta.mul_(0.1)  # as drawn, all centres but the main one have a share of nothing
    ways = {"ours": our_way(model), "official": official_way(levels)}
    images = torch.randn(rounds + 3, 1, 3, SIDE, SIDE)
    taken: dict[str, list[list[float]]] = {name: [] for name in ways}
    error, sizes = 0.0, []
    for turn, image in enumerate(images):
        results = {}
        for name in sorted(ways, reverse=bool(turn % 2)):
            seconds, results[name], sizes = validate(model, ways[name], image)
            taken[name].append(seconds)
        for ours, official in zip(results["ours"], results["official"], strict=True):
            error = max(error, measure.relative_error(ours, official))
    medians = {name: np.median(np.array(seconds[3:]), 0) for name, seconds in taken.items()}  # three warm up
    parts = ["whole loop", *(f"level of {h} x {w}, C={c}" for h, w, c in sizes)]
    rows = {
        part: {"seconds": float(ours), "official_seconds": float(official), "times_faster": float(official / ours)}
        for part, ours, official in zip(parts, medians["ours"], medians["official"], strict=True)
    }
    return {"relative_error": error, "processor_time": rows}


def validate(model: HGADModel, way: Way, image: Tensor) -> tuple[list[float], list[Tensor], list[tuple[int, int, int]]]:
    """Return processor seconds, of the whole and of each level, the scores, and the levels' sizes (h, w, C)."""
    start = time.process_time()
    seconds, results, sizes = [], [], []
    for level, features in enumerate(model.require_encoder()(image)):
        before = time.process_time()
        _, channels, h, w = features.shape
        code = dense_position(model.config.pos_embed_dim, 1, h, w)
        results += way(level, features.permute(0, 2, 3, 1).reshape(-1, channels), code)
        sizes.append((h, w, channels))
        seconds.append(time.process_time() - before)
    return [time.process_time() - start, *seconds], results, sizes


def our_way(model: HGADModel) -> Way:
    """Return the official script's calls of our class."""

    def score(level: int, x: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
        channels = model.feat_dims[level]
        z, log_det = model.nfs[level](x, [code])
        mu = model.mus[level]
        centres = intra_class_centres(mu, model.mu_deltas[level])[[CLASS]].expand(len(z), -1, -1)
        log_weights = F.log_softmax(model.phi_intras[level], 1)[[CLASS]].expand(len(z), -1)
        log_density = model.get_logps(z, centres, log_weights, log_det, channels) / channels
        logits = -0.5 * model.calculate_distances_to_inter_class_centers(z, mu=mu)
        return log_density, (F.softmax(logits, 1) * F.log_softmax(logits, 1)).sum(1)

    return score


def official_way(levels: list[OfficialLevel]) -> Way:
    def score(level: int, x: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
        official = levels[level]
        z, log_det = official.flow(x, [code])
        of_class, negative_entropy = official_scores(
            z, log_det, official.mu, official.delta, official.phi_intra, classes=[CLASS]
        )
        return of_class[:, 0], negative_entropy

    return score


if __name__ == "__main__":
    main()
