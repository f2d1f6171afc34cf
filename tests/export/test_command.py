"""`hgad-fast export` writes what `model.export` writes, and says what it did."""

from __future__ import annotations

import json
from pathlib import Path

import exported
import pytest
from click.testing import Result
from typer.testing import CliRunner

from hgad_fast.cli import app


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "model.safetensors"
    exported.on_images().save(path)
    return path


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, args)])


def test_it_says_what_it_wrote(saved, tmp_path):
    path = tmp_path / "model.pt2"
    result = run(saved, "-o", path)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"torch: {path} (") and lines[0].endswith(" MB)")
    assert lines[1] == f"sidecar: {path}.json"
    assert lines[2] == "input image: batch x 3 x 64 x 64"
    assert lines[3] == "outputs: anomaly_map, score, class_id, p_value, threshold, is_anomalous"
    assert lines[4].startswith("checked on 4 images in torch ")


def test_its_options_are_the_arguments(saved, tmp_path):
    path = tmp_path / "model.file"
    options = ["--format", "torch", "--size", "64x80", "--outputs", "score, anomaly_map", "--class", "1", "--no-check"]
    options += ["--map-size", "20x30"]
    result = run(saved, "-o", path, *options, "--precision", "fp16", "--false-alarm-rate", "0.5", "--json")
    assert result.exit_code == 0, result.output
    sidecar = json.loads(result.stdout)
    assert sidecar == exported.sidecar_of(path)
    assert sidecar["inputs"]["image"]["shape"] == ["batch", 3, 64, 80] and sidecar["group"] == "class 1"
    assert list(sidecar["outputs"]) == ["score", "anomaly_map"] and sidecar["check"] is None
    assert sidecar["precision"] == "fp16" and sidecar["target_false_alarm_rate"] == 0.5
    assert sidecar["outputs"]["anomaly_map"]["shape"] == ["batch", 20, 30]
    path = tmp_path / "model.pt2"
    result = run(saved, "-o", path, "--class-input", "--map-size", "seen", "--inputs", "features", "--no-check")
    assert "not checked (--no-check)" in result.stdout and "input features_0: batch x " in result.stdout
    assert "input given_class: batch\n" in result.stdout
    assert exported.sidecar_of(path)["outputs"]["anomaly_map"]["shape"] == ["batch", 32, 32]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "big"], "--size is 'big'; give one number, or height and width, such as 256x320"),
        (["--size", "65"], "a short side of 64 pixels"),
        (["--class", "bottle"], "class 'bottle' is unknown"),
        (["--outputs", "heat"], "allowed are some of anomaly_map"),
        (["--check-images", "nowhere"], "nowhere"),
    ],
    ids=str,
)
def test_errors_are_one_line(saved, tmp_path, options, message):
    result = run(saved, "-o", tmp_path / "model.pt2", *options)
    assert result.exit_code == 1 and result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith(("loading", "writing"))]
    assert line.startswith("hgad-fast: ") and message in line
    assert not list(tmp_path.iterdir())
