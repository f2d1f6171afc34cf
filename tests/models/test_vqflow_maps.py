"""The published maps of VQ-Flow: golden values of the official code, and what follows from the definition."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import rounding
import torch

from hgad_fast.evaluation import metrics
from hgad_fast.models.vqflow_maps import SCORED_SHARE, official_maps, official_maps_of
from hgad_fast.protocol import Densities
from hgad_fast.scoring.maps import image_scores

SIZE = 64


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    """Return six random images: log-densities, maps, scores and figures; computed in float32, figures in float64."""
    with np.load(Path(__file__).parents[1] / "golden" / "vqflow_dev_post_metrics.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def logps(golden: dict[str, np.ndarray]) -> list[torch.Tensor]:
    return [torch.from_numpy(golden[f"logp{level}"]) for level in range(3)]


def maps_and_scores(logps: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    maps = official_maps(logps, SIZE)
    values = {f"map_{name}": published.maps for name, published in maps.items()}
    return values | {f"image_score_{name}": published.scores for name, published in maps.items()}


def test_maps_and_scores_are_those_of_the_official_code(
    golden: dict[str, np.ndarray], logps: list[torch.Tensor]
) -> None:
    """Both are in float32: each is as far from the definition in float64 as rounding explains."""
    exact, tolerance = rounding.exact_and_tolerance(maps_and_scores, logps)
    # 1 - exp(x), as the official code has it, rounds to the digits of 1.
    tolerance["map_mul"] = tolerance["map_mul"] + torch.finfo(torch.float32).eps
    tolerance["image_score_mul"] = tolerance["image_score_mul"] + torch.finfo(torch.float32).eps
    official = {name: golden[name] for name in exact}
    rounding.assert_within(official, exact, tolerance)
    rounding.assert_within(maps_and_scores(logps), exact, tolerance)


def test_figures_are_those_of_the_official_code(golden: dict[str, np.ndarray]) -> None:
    """Figures in percent, in float64, of the maps of the official code: counts of the same pixels, summed otherwise."""
    masks, labels = golden["gt_mask"][:, 0], golden["gt_label"]
    close = functools.partial(pytest.approx, rel=rounding.SAME_IN_FLOAT64)
    for name in ("mul", "add"):
        assert 100 * metrics.auroc(golden[f"image_score_{name}"], labels) == close(float(golden[f"det_auroc_{name}"]))
    assert 100 * metrics.auroc(golden["map_add"].ravel(), masks.ravel()) == close(float(golden["loc_auroc_add"]))
    assert 100 * metrics.pro_800(golden["map_mul"], masks) == close(float(golden["pro_mul"]))


def test_an_image_has_the_same_bits_whatever_the_others_are(logps: list[torch.Tensor]) -> None:
    together = official_maps(logps, SIZE)
    for i in range(6):
        alone = official_maps([level[i : i + 1] for level in logps], SIZE)
        for name, (maps, scores, description) in together.items():
            assert torch.equal(alone[name].maps[0], maps[i]) and torch.equal(alone[name].scores[0], scores[i])
            assert f"map '{name}'" in description and "largest 3 % of its pixels" in description


def test_batches_are_joined(logps: list[torch.Tensor]) -> None:
    together = official_maps(logps, SIZE)
    batches = [
        Densities([level[rows] for level in logps], [], torch.zeros(len(rows), dtype=torch.int64))
        for rows in ([0, 1], [2, 3, 4], [5])
    ]
    for name, (maps, scores, description) in official_maps_of(batches, SIZE).items():
        assert torch.equal(maps, together[name].maps) and torch.equal(scores, together[name].scores)
        assert description == together[name].description


def test_the_score_is_the_mean_of_the_largest_pixels() -> None:
    ranks = torch.randperm(400).view(1, 20, 20).float()
    assert image_scores(ranks, SCORED_SHARE).tolist() == [np.mean(range(388, 400))]  # 12 of 400
    assert image_scores(torch.tensor([[[1.0, 5.0]]]), SCORED_SHARE).tolist() == [5.0]  # at least one
    assert image_scores(torch.empty(0, 20, 20), SCORED_SHARE).shape == (0,)


def test_levels_without_any_contrast_give_maps_of_zeros() -> None:
    """But for the rounding of upsampling: two weights to an axis, which need not add up to 1, of values of up to 10."""
    rounding = 8 * torch.finfo(torch.float32).eps * 10
    for published in official_maps([torch.full((1, 4, 4), -3.0), torch.full((1, 2, 2), -7.0)], 8).values():
        assert 0 <= float(published.maps.min()) and float(published.maps.max()) <= rounding
        assert float(published.scores) <= rounding
