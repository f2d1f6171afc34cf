"""Recorded steps on a pretended GPU, with kernels on the interpreter: they are eager ones, and nothing waits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import exported
import pytest
import small_vqflow
import torch
from pretended import pretended_gpu
from torch import Tensor

from hgad_fast import HGADConfig, HGADModel
from hgad_fast.training import step
from hgad_fast.training.processes import Processes
from hgad_fast.training.step import EAGER_STEPS, Step

STEPS = EAGER_STEPS + 2  # the last two are replays of the one that is recorded
# Sums are rounded otherwise where a convolution's output lies otherwise in memory, and Adam turns what that does to a
# gradient near 0 into a step of the rate. A step that is left out, or of another batch, is a fifth of the way or more.
OF_THE_WAY = 0.01


def hgad() -> tuple[Any, list[Tensor]]:
    settings = {"backbone_arch": None, "feature_levels": 2, "feature_dims": exported.DIMS, "coupling_layers": 2}
    return exported.stirred(HGADModel(HGADConfig(**exported.SMALL | settings))), exported.features(2 * STEPS)


def vqflow() -> tuple[Any, list[Tensor]]:
    model = small_vqflow.stirred(small_vqflow.small_model())
    levels = small_vqflow.class_features(2 * STEPS)
    return model, model.prepare(levels)


@pytest.mark.parametrize("make", [hgad, vqflow])
def test_recorded_steps_are_eager_ones_and_nothing_waits(
    make: Any, interpreted: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for eager_steps in (STEPS, EAGER_STEPS):  # the first time nothing is recorded
        monkeypatch.setattr(step, "EAGER_STEPS", eager_steps)
        model, levels = make()
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        with pretended_gpu(interpreted) as waits:
            training = Step(model.to("cuda").train(), Processes(), graphs=True)
            terms = []
            waits.clear()
            for batch in range(STEPS):
                images = [[level[i] for level in levels] for i in (2 * batch, 2 * batch + 1)]
                terms.append(training(images, torch.tensor([0, 1]), 2, 1e-3))
            assert waits == {
                "synchronize": STEPS - 1
            }  # with the copy of the last images, whose pinned memory is filled
            assert len(training._recorded) == (eager_steps < STEPS)
            after = torch.cat([p.detach().flatten().cpu() for p in model.parameters()])
            results.append((torch.stack(terms).cpu(), after - before))
    (eager_terms, eager), (terms, recorded) = results
    changes = (eager_terms[1:] - eager_terms[:-1]).norm()
    assert changes > 0 and (terms - eager_terms).norm() <= OF_THE_WAY * changes
    assert eager.norm() > 0 and (recorded - eager).norm() <= OF_THE_WAY * eager.norm()
