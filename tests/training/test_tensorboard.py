"""The event files that the callback writes, read back by TensorBoard's own reader."""

from __future__ import annotations

import gc
import importlib.util
import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_vqflow import class_features, labels, small_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hgad_fast.training.tensorboard import TensorBoard

DOCS = Path(__file__).parents[2] / "docs"
Scalars = dict[str, list[tuple[int, float]]]
FIGURES = {"learning rate": "lr", "stage": "stage", "seconds": "seconds", "images per second": "images_per_second"}

pytestmark = pytest.mark.filterwarnings("ignore:there are no thresholds")


def scalars(folder: Path) -> Scalars:
    """Return the steps and values of each scalar that TensorBoard shows of a folder."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def expected(records: list[dict[str, Any]]) -> Scalars:
    of_passes = {f"training/{title}": [(r["pass"], r[name]) for r in records] for title, name in FIGURES.items()}
    return of_passes | {
        f"{term}/level {level}": [(r["pass"], r["losses"][level][term]) for r in records]
        for level, losses in enumerate(records[0]["losses"])
        for term in losses
    }


def assert_shown(folder: Path, records: list[dict[str, Any]]) -> None:
    shown, wanted = scalars(folder), expected(records)
    assert shown.keys() == wanted.keys()
    for tag, points in wanted.items():
        assert [step for step, _ in shown[tag]] == [step for step, _ in points]
        # event files hold float32
        assert [value for _, value in shown[tag]] == pytest.approx([value for _, value in points], rel=2**-23)


def trained(folder: Path, *callbacks: Any, **options: Any) -> list[dict[str, Any]]:
    model = small_model(meta_epochs=2, sub_epochs=2)
    return model.fit((class_features(), labels()), output_dir=folder, callbacks=callbacks, **options).records


class StoppedError(Exception):
    pass


def test_every_record_is_shown_and_a_resumed_training_has_no_step_twice(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path / "events")

    def stop(record: dict[str, Any]) -> None:
        seen.append(record)
        assert_shown(tmp_path / "events", seen)  # what is written so far is complete
        if record["pass"] == 2:
            raise StoppedError

    seen: list[dict[str, Any]] = []
    with pytest.raises(StoppedError):
        trained(tmp_path / "run", board, stop)
    assert [record["pass"] for record in seen] == [0, 1, 2]
    records = trained(tmp_path / "run", TensorBoard(tmp_path / "events"), resume=True)  # from pass 2
    assert [record["pass"] for record in records] == [0, 1, 2, 3]
    assert len(list((tmp_path / "events").iterdir())) == 2
    assert_shown(tmp_path / "events", records)


def test_a_second_training_takes_the_place_of_the_first(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path / "events")
    trained(tmp_path / "first", board)
    records = trained(tmp_path / "second", board)
    assert_shown(tmp_path / "events", records)


def test_the_writers_thread_ends_with_the_callback(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    closed, dropped = TensorBoard(tmp_path / "a"), TensorBoard(tmp_path / "b")
    record = {"pass": 0, "lr": 0.1, "stage": 1, "seconds": 1.0, "images_per_second": 2.0, "losses": [{"term": 3.0}]}
    closed(record)
    dropped(record)
    assert len(set(threading.enumerate()) - before) == 2
    closed.close()
    closed.close()
    del dropped
    gc.collect()
    assert set(threading.enumerate()) - before == set()
    assert_shown(tmp_path / "a", [record])
    assert_shown(tmp_path / "b", [record])


def test_the_missing_package_and_its_extra_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    with pytest.raises(ModuleNotFoundError, match=r"hgad-fast\[tensorboard\]"):
        TensorBoard(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_the_recipes_of_the_docs_log_every_pass(package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    logged: list[tuple[int, dict[str, float]]] = []

    def log(values: dict[str, float], step: int) -> None:
        logged.append((step, values))

    run = SimpleNamespace(log=log)
    stand_in = SimpleNamespace(init=lambda **_: run, start_run=lambda **_: run, log_metrics=log)
    monkeypatch.setitem(sys.modules, package, stand_in)
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / "logging.md").read_text(), re.MULTILINE | re.DOTALL)
    (recipe,) = (block for block in blocks if f"import {package}" in block)
    names: dict[str, Any] = {}
    exec(compile(recipe, "logging.md", "exec"), names)
    records = trained(tmp_path, names["log"])
    of_passes = {tag.removeprefix("training/"): points for tag, points in expected(records).items()}
    of_passes["lr"] = of_passes.pop("learning rate")
    del of_passes["images per second"]
    assert logged == [(step, {tag: points[step][1] for tag, points in of_passes.items()}) for step in range(4)]
