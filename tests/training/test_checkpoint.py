"""A checkpoint may be handed around: whatever is in one, it is refused by one line, or fits the run."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hgad_fast import HGADConfig, HGADModel
from hgad_fast.features.extract import FeatureSet
from hgad_fast.training.checkpoint import CHECKPOINT, read_checkpoint
from hgad_fast.training.step import make_optimizer

SETTINGS: dict[str, Any] = {"n_classes": 2, "backbone_arch": None, "feature_levels": 1, "feature_dims": (4,)}
SETTINGS |= {"coupling_layers": 1, "pos_embed_dim": 4, "n_intra_centers": 1, "meta_epochs": 1, "sub_epochs": 1}
ODD: tuple[Any, ...] = (None, "x", -1, 10**9, [], {}, {"a": 1}, [[1]], math.nan, torch.zeros(2), torch.zeros(0).bool())


def make_model() -> HGADModel:
    return HGADModel(HGADConfig(**SETTINGS, msk_size=8, calibration_fraction=0.0))


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what the checkpoint of a finished training holds."""
    folder = tmp_path_factory.mktemp("run")
    images = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    make_model().fit(FeatureSet.from_levels([images], torch.arange(6) % 2), output_dir=folder, progress=False)
    return torch.load(folder / CHECKPOINT, weights_only=True)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the keys that lead to each part of a state."""
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield (*at, key)
            yield from places(value[key], (*at, key))


def read(path: Path, identity: dict[str, str]) -> dict[str, Any]:
    """Read a checkpoint, and take its optimizer's state, as a run that resumes does."""
    model = make_model()
    optimizer = make_optimizer(model)
    state = read_checkpoint(path, model, optimizer, identity, lambda meta_epochs: {1} if meta_epochs else set())
    optimizer.load_state_dict(state["optimizer"])
    return state


def test_whatever_a_part_holds_the_checkpoint_is_refused_or_fits(state: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "odd.pt"
    torch.save(state, path)
    assert read(path, state["identity"])["meta_epoch"] == 1
    parts = list(places(state))
    assert len(parts) > 50
    refused = set()
    for number, at in enumerate(parts):
        odd = copy.deepcopy(state)
        parent = odd
        for key in at[:-1]:
            parent = parent[key]
        if (choice := number % (len(ODD) + 1)) == len(ODD):
            parent.pop(at[-1])
        else:
            parent[at[-1]] = ODD[choice]
        torch.save(odd, path)
        try:
            read(path, state["identity"])
        except ValueError as error:
            refused.add(at)
            assert str(error).startswith(str(path)) and "\n" not in str(error), error
    # Adam's options are those of the run, whatever the checkpoint says.
    kept = {at for at in parts if at[:2] == ("optimizer", "param_groups")}
    assert {*parts} - refused <= kept


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("meta_epoch", 2, "says that 2 of 1 meta-epochs are done; start anew without resume"),
        ("history", "{}", "holds no history of a training; start anew without resume"),
        ("history", "[", "odd.pt is no whole training checkpoint .*; start anew without"),
        ("random_state", torch.zeros(5, dtype=torch.uint8), "is no whole training checkpoint .*; start anew without"),
        ("model", None, r"holds no state dict \(a dict of tensors\)"),
    ],
)
def test_what_is_wrong_is_said(key: str, value: Any, message: str, state: dict[str, Any], tmp_path: Path) -> None:
    torch.save({**state, key: value}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "odd.pt", state["identity"])
