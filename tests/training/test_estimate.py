"""What a training will take: said before, from works that are timed by a clock of the test's own, and with no trace."""

from __future__ import annotations

import copy
import dataclasses
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hgad_fast import GaussianConfig, GaussianModel, HGADConfig, HGADModel, VQFlowConfig, VQFlowModel
from hgad_fast.data.datasets import Dataset, discover
from hgad_fast.methods import presets
from hgad_fast.training import estimate as estimating
from hgad_fast.training.checkpoint import CHECKPOINT
from hgad_fast.training.estimate import (
    Estimate,
    Plan,
    announce,
    duration,
    estimate,
    extrapolated,
    meta_epochs_done,
)
from hgad_fast.training.step import Step
from tests.support.process_state import changes, process_state

CLASSES = ("left", "right")
COMMON: dict[str, Any] = {
    "n_classes": 2,
    "class_names": CLASSES,
    "backbone_arch": "test_efficientnet",
    "backbone_weights": None,
    "img_size": 64,
    "msk_size": 32,
}
HGAD = HGADConfig(
    **COMMON,
    feature_levels=2,
    out_indices=(1,),
    coupling_layers=2,
    n_intra_centers=2,
    pos_embed_dim=8,
    meta_epochs=4,
    sub_epochs=2,
    batch_size=4,
    calibration_fraction=0.2,
)
VQFLOW = VQFlowConfig(
    **COMMON,
    out_indices=(1, 2, 3, 4),
    n_prototypes=3,
    n_patterns=4,
    prototype_dim=8,
    pos_embed_dim=4,
    coupling_layers=(1, 1, 1),
    hidden_channels=8,
    meta_epochs=2,
    sub_epochs=2,
    batch_size=4,
)
GAUSSIAN = GaussianConfig(**COMMON, out_indices=(1, 2), dim=8, coarse_dim=0)
MODELS = {"hgad": (HGADModel, HGAD), "vqflow": (VQFlowModel, VQFLOW), "gaussian": (GaussianModel, GAUSSIAN)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Return 12 normal images of each of two classes."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name in CLASSES:
        (root / name / "train" / "good").mkdir(parents=True)
        for i in range(12):
            Image.fromarray(rng.integers(0, 256, (72, 64, 3), np.uint8)).save(
                root / name / "train/good" / f"{i:02}.png"
            )
    return discover(root)


def ticking() -> Any:
    """Return a clock by which every work takes a second."""
    ticks = count()
    return lambda: float(next(ticks))


def made(method: str, **fields: Any) -> Any:
    model_class, config = MODELS[method]
    return model_class(config.replace(**fields))


@pytest.mark.parametrize("method", MODELS)
def test_nothing_changes(method: str, data: Dataset) -> None:
    model = made(method)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, modes = copy.deepcopy(model.config), [part.training for part in model.modules()]
    process, random = process_state(), torch.get_rng_state()
    with torch.no_grad():  # the caller's mode is no matter
        estimate(model, data)
    assert changes(process, process_state()) == {} and torch.equal(random, torch.get_rng_state())
    assert (model.config, [part.training for part in model.modules()]) == (config, modes)
    assert all(parameter.grad is None for parameter in model.parameters()) and model.calibration is None
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("method", "parts"), [("hgad", "steps"), ("vqflow", "steps"), ("gaussian", "fitting")])
def test_every_part_has_its_time_and_memory(method: str, parts: str, data: Dataset) -> None:
    actual = estimate(made(method), data)
    assert list(actual.seconds) == ["features", parts, "calibration"]
    assert all(seconds > 0 for seconds in actual.seconds.values())
    assert actual.total_seconds == sum(actual.seconds.values()) and actual.device_memory == {}
    assert actual.memory_bytes == sum(actual.memory.values()) and actual.memory["work"] > 0


@pytest.mark.parametrize("method", MODELS)
def test_steps_and_features_are_those_of_the_training(
    method: str, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(method)
    expected = estimate(model, data)
    steps, step = [], Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda *args: steps.append(1) or step(*args))
    sizes = []
    monkeypatch.setattr(
        "hgad_fast.features.cache.MemoryCache.add",
        lambda self, features: (
            self._kept.update(features),
            sizes.extend(level.nbytes for maps in features.values() for level in maps),
        ),
    )
    model.fit(data, progress=False)
    assert expected.steps == len(steps)
    assert expected.memory["features"] == sum(sizes)


def test_more_work_takes_longer_in_proportion(data: Dataset) -> None:
    """By a clock that gives each work a second, the time of steps goes by their number alone."""

    def steps_of(plan: Plan | None = None, **fields: Any) -> tuple[int, float]:
        result = estimate(made("hgad", **fields), data, plan, ticking())
        return result.steps, result.seconds["steps"]

    (steps, seconds), (twice, longer) = steps_of(), steps_of(meta_epochs=8)
    assert twice == 2 * steps and longer == pytest.approx(2 * seconds)
    left, shorter = steps_of(Plan(meta_epochs_done=3))
    assert left == steps / 4 and shorter == pytest.approx(seconds / 4)
    assert "steps" not in estimate(made("hgad"), data, Plan(meta_epochs_done=4)).seconds
    assert steps_of(batch_size=2)[0] == 2 * steps


def test_features_that_are_not_kept_are_paid_for_in_every_pass(data: Dataset) -> None:
    model = made("hgad")
    kept, anew = (estimate(model, data, Plan(cache=cache), ticking()) for cache in ("ram", None))
    assert anew.memory["features"] == 0 < kept.memory["features"]
    images = len(data.train)
    passes = HGAD.meta_epochs * HGAD.sub_epochs
    trained = anew.steps / passes * HGAD.batch_size
    an_image = kept.seconds["features"] / images  # read, and seen by the backbone
    assert anew.seconds["steps"] - kept.seconds["steps"] == pytest.approx(trained * passes * an_image, rel=0.3)
    some = estimate(model, data, Plan(cache_limit=kept.memory["features"] // 2), ticking())
    assert kept.seconds["steps"] < some.seconds["steps"] < anew.seconds["steps"]
    assert some.memory["features"] == pytest.approx(kept.memory["features"] / 2, abs=1)
    half = estimate(model, data, Plan(cache_dtype="float16"), ticking())
    assert half.memory["features"] == kept.memory["features"] / 2
    assert half.seconds["calibration"] > kept.seconds["calibration"]  # of exact features


def test_features_on_disk_from_an_earlier_run_cost_nothing(data: Dataset, tmp_path: Path) -> None:
    model = made("hgad", meta_epochs=1, sub_epochs=1)
    plan = Plan(cache="disk", cache_dir=tmp_path)
    assert estimate(model, data, plan).seconds["features"] > 0
    model.fit(data, cache="disk", cache_dir=tmp_path, progress=False)
    again = estimate(model, data, plan)
    assert again.seconds["features"] == 0 and again.memory["features"] == 0
    other = made("hgad", meta_epochs=1, sub_epochs=1, center_crop=not model.config.center_crop)
    assert estimate(other, data, plan).seconds["features"] > 0  # those of whole images are no use to it


def test_testing_counts(data: Dataset) -> None:
    model = made("hgad")
    tested = estimate(model, data, Plan(tested_images=5), ticking())
    alone = estimate(model, data, Plan(), ticking())
    assert tested.seconds["testing"] > 0 and "testing" not in alone.seconds


def test_processes_share_the_images_of_a_step(data: Dataset) -> None:
    """What a step keeps for its backward pass is divided among them, and so is its time; parameters are not."""
    model = made("hgad", batch_size=16)
    alone, shared = (estimate(model, data, Plan(processes=n), ticking()) for n in (1, 4))
    parameters = 3 * sum(p.nbytes for p in model.parameters() if p.requires_grad)  # with gradients and Adam's moments
    kept, kept_by_each = (each.memory["work"] - parameters for each in (alone, shared))
    assert kept == pytest.approx(4 * kept_by_each) and kept_by_each > 0
    assert shared.steps == alone.steps and alone.seconds["steps"] == pytest.approx(4 * shared.seconds["steps"])


def test_calibration_images_of_their_own_are_not_held_out(data: Dataset) -> None:
    own = estimate(made("hgad"), data, Plan(calibration=data.root), ticking())
    assert own.steps == HGAD.meta_epochs * HGAD.sub_epochs * (len(data.train) // HGAD.batch_size)


def test_a_checkpoint_says_what_is_done(data: Dataset, tmp_path: Path) -> None:
    assert meta_epochs_done(tmp_path / CHECKPOINT) == 0
    made("hgad", meta_epochs=3, sub_epochs=1).fit(data, output_dir=tmp_path, progress=False)
    assert meta_epochs_done(tmp_path / CHECKPOINT) == 3
    (tmp_path / CHECKPOINT).write_bytes(b"no checkpoint")
    assert meta_epochs_done(tmp_path / CHECKPOINT) == 0


@pytest.mark.parametrize(
    ("points", "size", "expected"),
    [
        ([(2.0, 3.0)], 8.0, 12.0),  # in proportion
        ([(2.0, 3.0), (4.0, 5.0)], 8.0, 9.0),  # on the line, with a constant cost of 1
        ([(2.0, 3.0), (4.0, 8.0)], 8.0, 18.0),  # steeper than in proportion
        ([(2.0, 3.0), (4.0, 3.0)], 8.0, 4.5),  # noise: at most half is constant
        ([(2.0, 3.0), (4.0, 5.0)], 2.0, 2.5),
    ],
)
def test_larger_works_are_extrapolated(points: list[tuple[float, float]], size: float, expected: float) -> None:
    assert extrapolated(points, size) == pytest.approx(expected)
    assert extrapolated(points, 2 * size) > extrapolated(points, size)


def test_times_are_said_as_people_say_them() -> None:
    texts = {0.2: "under 1 s", 1.2: "1 s", 59.4: "59 s", 61: "1 min", 720: "12 min", 3600: "1 h", 12700: "3.5 h"}
    texts |= {100_000: "28 h", 520_000: "6 days"}
    assert {seconds: duration(seconds) for seconds in texts} == texts


def test_the_line() -> None:
    told = Estimate(
        {"features": 61.0, "steps": 610.0, "calibration": 20.0}, 3200, {"process": 10**9, "work": 10**8}, {}
    )
    expected = "about 12 min on 2 CPU threads (features 1 min, 3 200 steps 10 min, calibration 20 s), 1.1 GB of memory"
    assert told.line("2 CPU threads") == expected
    assert (
        dataclasses.replace(told, device_memory={"model": 10**9})
        .line("a GPU")
        .endswith("1.1 GB of memory, 1 GB of the GPU's")
    )


def test_a_training_never_fails_because_of_its_estimate(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = dataclasses.replace(data, train=())
    assert announce(made("hgad"), damaged, Plan()) == []
    (line,) = announce(made("hgad"), data, Plan())
    assert line.startswith(("about ", "under ")) and "steps" in line and line.endswith("of memory")


def test_a_quicker_preset_is_named_where_there_is_no_gpu(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    hours = Estimate({"steps": 7200.0}, 100, {}, {})
    minutes = Estimate({"fitting": 120.0}, 0, {}, {})
    model = made("hgad")
    quick: list[Any] = []

    def answer(asked: Any, *_: Any) -> Estimate:
        quick.append(asked) if asked is not model else None
        return hours if asked is model else minutes

    monkeypatch.setattr(estimating, "estimate", answer)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _, line = announce(model, data, Plan())
    assert line.startswith("without a GPU, --preset gaussian takes about 2 min on these images; hgad-fast presets")
    assert [asked.config.method for asked in quick] == ["gaussian"] and quick[0].config.class_names == CLASSES

    minutes = hours  # none is quicker
    assert len(announce(model, data, Plan())) == 1

    def broken(asked: Any, *_: Any) -> Estimate:
        if asked is model:
            return hours
        raise RuntimeError("no memory")

    monkeypatch.setattr(estimating, "estimate", broken)
    assert "--preset gaussian is done in minutes" in announce(model, data, Plan())[1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert len(announce(model, data, Plan())) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    hours = Estimate({"steps": 3000.0}, 100, {}, {})
    assert len(announce(model, data, Plan())) == 1


def test_every_preset_says_what_it_needs() -> None:
    for name, owner in presets():
        note = owner.preset_notes[name]
        assert note.weights and note.needs and note.reaches, (owner.method, name)
    assert all(owner.preset_notes.keys() == owner.presets.keys() for _, owner in presets())
