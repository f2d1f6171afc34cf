"""The user's day of `make gpu`, on a CPU: its checks find what is planted, and a step that fails costs itself."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended import pretended_gpu

from benchmarks import gpu_day, gpu_jobs
from benchmarks.gpu_findings import Check
from hgad_fast.data.images import read_image
from hgad_fast.scoring.score import score_prepared

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def day() -> Iterator[gpu_day.Day]:
    day = gpu_day.Day("gaussian", CPU)
    assert all(check.passed for check in day.train())
    yield day
    day.close()


def failed(checks: Iterator[Any]) -> list[str]:
    return [check.name for check in checks if isinstance(check, Check) and not check.passed]


def test_scores_of_another_model_are_found(day: gpu_day.Day) -> None:
    """Of one whose densities differ all but the features differ; of one with another backbone the features, too."""
    here, images = day.model(CPU), day.images()
    assert failed(gpu_day.scores_alike("x", day.model(CPU), here, images)) == []
    changed = copy.deepcopy(here)
    changed.config = changed.config.replace(floor=1.001 * changed.config.floor)
    state = {name: t * 1.001 for name, t in here.state_dict().items() if name.startswith("whitenings.")}
    changed.load_state_dict(state, strict=False)
    names = failed(gpu_day.scores_alike("x", changed, here, images))
    ways = [f"x, {way}{source}" for way in ("label-free", "group given") for source in ("", ", from pixels")]
    assert {f"{way}: maps" for way in ways} <= set(names) and "x: features" not in names
    with torch.no_grad():
        next(changed.encoder.parameters()).mul_(1.5)
    assert "x: features" in failed(gpu_day.scores_alike("x", changed, here, images))


@pytest.mark.parametrize("part", ["anomaly_map", "image_score", "class_id", "is_anomalous"])
def test_every_part_of_a_result_is_compared(part: str, day: gpu_day.Day) -> None:
    model = day.model(CPU)
    features = gpu_day.features_of(model, day.images())
    right = score_prepared(model, features)
    assert failed(gpu_day.alike("x", right, right, [right])) == []
    wrong = copy.deepcopy(right)
    values = getattr(wrong, part)
    setattr(
        wrong,
        part,
        ~values if values.dtype == torch.bool else values * 1.01 if values.is_floating_point() else 1 - values,
    )
    names = {"anomaly_map": "maps", "image_score": "scores", "class_id": "groups", "is_anomalous": "verdicts"}
    (name,) = failed(gpu_day.alike("x", wrong, right, [right]))
    assert name.startswith(f"x: {names[part]}")
    if not values.is_floating_point():  # rounding alone decides about them
        assert failed(gpu_day.alike("x", wrong, right, [wrong])) == []


def test_a_flow_in_fewer_bits_is_found() -> None:
    """Its maps are off by little more than rounding, its densities by more."""
    day = gpu_day.Day("hgad", CPU)
    here, there, images = day.model(CPU), day.model(CPU), day.images()
    assert failed(gpu_day.scores_alike("x", there, here, images)) == []
    there.precision = "bf16"
    names = failed(gpu_day.scores_alike("x", there, here, images))
    parts = {"log-densities", "entropies"}
    assert {f"x, {way}: {part}" for way in ("label-free", "group given") for part in parts} <= set(names)
    day.close()


@pytest.mark.parametrize("method", ["hgad", "vqflow"])
def test_a_recorded_training_that_takes_no_steps_is_found(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    day = gpu_day.Day(method, CPU)
    assert failed(day.train_recorded()) == []
    fitted, trainings = day.fitted, iter(range(4))

    def lame(device: Any, config: Any, **options: Any) -> Any:
        return fitted(device, config.replace(lr=1e-12) if next(trainings) > 1 else config, **options)

    monkeypatch.setattr(day, "fitted", lame)
    wrong = ["what recorded steps change", "what recorded steps in bf16 change"]
    assert failed(day.train_recorded()) == wrong[: 2 if method == "hgad" else 1]
    day.close()


def test_a_step_that_fails_leaves_the_others_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    day = gpu_day.Day("gaussian", CPU)
    real = day.fitted

    def out_of_order(device: Any, *args: Any, **options: Any) -> Any:
        if device is day.device:
            raise RuntimeError("no kernel image is available")
        return real(device, *args, **options)

    day.device = torch.device("cpu", 0)  # a device of its own, as far as Python sees
    monkeypatch.setattr(day, "fitted", out_of_order)
    todo = [gpu_jobs.Job(name, day.steps[name]) for name in ("gaussian, train", "gaussian, Monitor")]
    assert gpu_jobs.carry_out_jobs(todo, CPU, tmp_path / "r.json") == 0
    found = {check["name"]: check["passed"] for check in json.loads((tmp_path / "r.json").read_text())["checks"]}
    names = [f"gaussian, Monitor: {name}" for name in ("states that differ", "images missed")]
    assert found == {"gaussian, train runs": False} | dict.fromkeys(names, True)
    day.close()


def test_tensors_on_another_device_are_counted(day: gpu_day.Day) -> None:
    model = day.model(CPU)
    assert gpu_day.elsewhere(model, CPU) == 0
    assert gpu_day.elsewhere(model, CUDA) == len(model.state_dict())


def test_a_command_that_fails_says_why() -> None:
    commands = gpu_day.Commands("gaussian", CPU)
    with pytest.raises(RuntimeError, match=r"exit status 1: .*model\.safetensors"):
        next(commands.steps["hgad-fast eval, gaussian"]())
    commands.day.close()


def test_a_command_that_does_not_end_says_where_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\necho 'reading weights' >&2\nexec sleep 600\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(gpu_day.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(gpu_day, "SECONDS", 1)
    commands = gpu_day.Commands("gaussian", CPU)
    with pytest.raises(RuntimeError, match="no end after 1 s: reading weights"):
        next(commands.steps["hgad-fast eval, gaussian"]())
    commands.day.close()


def test_made_up_defects_lie_in_their_masks(day: gpu_day.Day) -> None:
    root = day.data / "nuts"
    good, spot = (read_image(root / f"test/{kind}/000.png") for kind in ("good", "spot"))
    mask = read_image(root / "ground_truth/spot/000_mask.png")[0] > 0.5
    assert int(mask.sum()) == 16 * 16
    brighter = (spot - good).mean(0)
    assert brighter[mask].mean() > 0.2 and abs(float(brighter[~mask].mean())) < 0.02


# ---- on a pretended GPU: nothing lies on another device than it should. Recorded steps are in tests/training.

SHORT = ("train", "save and load", "Scorer", "evaluate")  # of the flows, whose scores take a second


@pytest.mark.parametrize("method", gpu_day.METHODS)
def test_a_day_on_a_gpu(method: str) -> None:
    with pretended_gpu():
        day = gpu_day.Day(method, CUDA)
        steps = {name.partition(", ")[2]: step for name, step in day.steps.items()}
        steps.pop("train in recorded steps", None)
        for name in steps if method == "gaussian" else SHORT:
            assert failed(steps[name]()) == [], name
        assert day.model(CUDA).device.type == "cuda"
        day.close()
