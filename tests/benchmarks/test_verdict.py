"""The benchmark of verdicts: its graph is what the library computes, and its profile knows products from the rest."""

from __future__ import annotations

import pytest
import torch

from benchmarks import scoring_graph, verdict
from hgad_fast.scoring.scorer import Scorer

SMALL = {
    "backbone_arch": "test_efficientnet",
    "out_indices": (1,),
    "n_classes": 3,
    "n_intra_centers": 2,
    "coupling_layers": 2,
    "pos_embed_dim": 8,
    "img_size": 64,
    "msk_size": 32,
}


@pytest.mark.parametrize("changes", [{}, {"fusion": "product"}, {"flow_arch": "flow_model"}], ids=str)
def test_the_graph_is_the_score(changes):
    model = verdict.calibrated_model(**(SMALL | changes))
    graph = scoring_graph.ScoringGraph(model, (64, 64))
    for image in torch.rand(2, 3, 64, 64):
        expected = model.score(image, map_size="seen")
        with torch.no_grad():
            anomaly_map, score, class_id = graph(image[None])
        assert int(class_id) == int(expected.class_id)
        torch.testing.assert_close(anomaly_map, expected.anomaly_map[0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(score, expected.image_score[0], rtol=1e-3, atol=1e-4)


def test_a_profile_counts_products_and_convolutions():
    frame = torch.randint(256, (64, 64, 3)).byte().numpy()
    text, share = verdict.profile(Scorer(verdict.calibrated_model(**SMALL)), frame, rounds=1)
    assert 0 < share < 1 and "conv" in text and "aten::addmm" in text


def test_scores_that_differ_by_more_than_rounding_are_no_comparison():
    verdict.agree(2.0, 2.0001)
    for other in (2.1, float("nan")):
        with pytest.raises(RuntimeError, match=r"the graph gives the score"):
            verdict.agree(2.0, other)
