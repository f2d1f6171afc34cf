"""Every line of Python and every command of the README, in its order, on small images with small models."""

from __future__ import annotations

import csv
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from hgad_fast import GaussianConfig, HGADConfig, HGADModel
from hgad_fast.cli import app

ROOT = Path(__file__).parents[1]
CLASSES = ("bottle", "grid", "tire")
SIZE = (80, 100)
TIMES_THINGS = "hgad-fast bench"  # tests/bench runs it
TINY_FLOW = {
    "backbone_weights": None,
    "coupling_layers": 2,
    "pos_embed_dim": 8,
    "meta_epochs": 1,
    "sub_epochs": 1,
    "img_size": 64,
    "msk_size": 64,
}


def blocks() -> list[tuple[str, str]]:
    """Return the language ("" for commands) and the text of each block of code."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def write_image(path: Path, class_id: int, seed: int, defect: bool = False) -> None:
    """Write stripes of a class's own direction and width, with a square where there is a defect."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    values = 128 + 60 * np.sin((x * (class_id + 1) + y * (3 - class_id)) / 6)
    values += np.random.default_rng(seed).normal(0, 12, SIZE)
    if defect:
        values[30:50, 40:60] = 250
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB").save(path)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folders that the README names, in the current folder."""
    for k, name in enumerate(CLASSES):
        root = tmp_path / "my_data" / name
        for i in range(12):
            write_image(root / "train" / "good" / f"{i}.png", k, i)
            write_image(tmp_path / "normal_images" / name / f"{i}.png", k, 100 + i)
        for i in range(2):
            write_image(root / "test" / "good" / f"{i}.png", k, 200 + i)
            write_image(root / "test" / "dent" / f"{i}.png", k, 300 + i, defect=True)
            mask = np.zeros(SIZE, np.uint8)
            mask[30:50, 40:60] = 255
            (root / "ground_truth" / "dent").mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(root / "ground_truth" / "dent" / f"{i}_mask.png")
    for i in range(12):
        write_image(tmp_path / "new_camera" / "bottle" / f"{i}.png", 0, 400 + i)
    for i in range(20):
        write_image(tmp_path / "caps" / f"{i}.png", 4, 600 + i)
        for k in range(2):
            write_image(tmp_path / "unsorted" / f"{2 * i + k}.png", k, 700 + i)
    for i in range(3):
        write_image(tmp_path / "false_alarms" / f"{i}.png", 4, 800 + i)
    for folder in ("new", "large", "check"):
        for i, name in enumerate("ab"):
            write_image(tmp_path / folder / f"{name}.png", i, 500 + i, defect=bool(i))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def small_presets(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Presets without a network, in sizes that take seconds, and a checkpoint such as the official code saves."""
    monkeypatch.setitem(GaussianConfig.presets, "gaussian", {"backbone_weights": "packaged", "img_size": 64})
    monkeypatch.setitem(HGADConfig.presets, "fast", HGADConfig.presets["fast"] | TINY_FLOW)
    sizes = TINY_FLOW | {"backbone_arch": "test_efficientnet", "out_indices": (1,), "feature_levels": 2}
    monkeypatch.setitem(HGADConfig.presets, "official", HGADConfig.presets["official"] | sizes)
    official = HGADModel(HGADConfig.preset("official", n_classes=len(CLASSES)))
    parts = {name: getattr(official, name).state_dict() for name in ("mus", "mu_deltas", "phi_inters", "phi_intras")}
    torch.save({"nfs": [flow.state_dict() for flow in official.nfs]} | parts, workspace / "official.pt")


@pytest.fixture
def camera(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An OpenCV whose camera shows three frames, channels blue first."""
    frames = [np.asarray(Image.open(path))[..., ::-1] for path in sorted((workspace / "new").glob("*.png"))]

    class VideoCapture:
        def __init__(self, number: int) -> None:
            self.frames = iter(frames)

        def read(self) -> tuple[bool, np.ndarray | None]:
            frame = next(self.frames, None)
            return frame is not None, frame

    cv2 = SimpleNamespace(VideoCapture=VideoCapture, COLOR_BGR2RGB=4, cvtColor=lambda frame, code: frame[..., ::-1])
    monkeypatch.setitem(sys.modules, "cv2", cv2)


def verdicts(table: str) -> list[dict[str, float]]:
    """Return score and verdict of each row of a table."""
    rows = csv.DictReader(table.splitlines())
    return [{"score": float(row["score"]), "anomalous": row["anomalous"] == "True"} for row in rows]


@pytest.mark.usefixtures("small_presets", "camera")
def test_every_line_runs(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands, programs, others = 0, 0, 0
    for language, text in blocks():
        if language == "python" and "anomalib" in text:
            others += 1  # tests/plugin/test_docs.py runs it, in an environment with anomalib
            continue
        if language == "python":
            exec(compile(text, "README.md", "exec"), {})
            programs += 1
            if programs == 1:
                shutil.rmtree(workspace / "run")  # the command line makes it again, and replaces no run unasked
            continue
        for line in filter(None, (line.partition(" #")[0].strip() for line in text.splitlines())):
            if line.startswith("hgad-fast ") and not line.startswith(TIMES_THINGS):
                result = CliRunner().invoke(app, shlex.split(line)[1:])
                assert result.exit_code == 0, f"{line}\n{result.output}"
                commands += 1
            elif line.startswith("python examples/"):
                program, *arguments = shlex.split(line.partition(" > ")[0])[1:]
                run = [sys.executable, str(ROOT / program), *arguments]
                table = subprocess.run(run, capture_output=True, text=True, check=True).stdout
                at_home = (workspace / "here" / "scores.csv").read_text()
                for own, other in zip(*map(verdicts, (table, at_home)), strict=True):
                    assert own == pytest.approx(other, rel=1e-4)
            else:
                assert line.startswith(("make ", "pip install ", "my_data/", TIMES_THINGS)), line
    assert (programs, commands, others) == (4, 19, 1)
    assert (workspace / "scores" / "scores.csv").read_text().count("\n") == 3
    assert "bottle" in capsys.readouterr().out  # the camera's verdict on the square
