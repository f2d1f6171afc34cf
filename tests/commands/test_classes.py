"""`hgad-fast add-class` and `hgad-fast absorb`, as their users meet them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import small_detectors
import torch
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from hgad_fast import load
from hgad_fast.cli import app


def hgad(*args: Any) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def write(folder: Path, images: torch.Tensor) -> Path:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray((image * 255).round().byte().movedim(0, -1).numpy()).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model of each method, images of a new class, and of those that the models know."""
    work = tmp_path_factory.mktemp("work")
    for method in ("gaussian", "hgad", "vqflow"):
        changes = {} if method == "vqflow" else {"calibration_fraction": 0.3}
        getattr(small_detectors, method)(**changes).save(work / f"{method}.safetensors")
    images = small_detectors.images_of_classes(36, seed=3)
    write(work / "neu" / "good", (1 - images[1::3]) ** 4)
    for k in range(3):
        write(work / "known" / f"class {k}" / "test" / "good", images[k::3][:4])
        write(work / "known" / f"class {k}" / "train" / "good", images[k::3][4:])
    return work


@pytest.mark.parametrize("method", ["gaussian", "hgad"])
def test_a_class_is_added(method, work, tmp_path):
    model, output = work / f"{method}.safetensors", tmp_path / "new.safetensors"
    arguments = ("add-class", model, "neu", work / "neu" / "good", "-o", output, "--device", "cpu")
    result = hgad(*arguments, "--check", work / "known")
    assert result.exit_code == 0, result.output
    grown = load(output)
    assert grown.class_names == ("class 0", "class 1", "class 2", "neu")
    lines = result.stdout.splitlines()
    assert lines[0] == "neu: fitted to 6 images, 6 held out for the threshold"
    assert lines[3] == "the other classes, before > after:" and len(lines) == 9
    assert lines[-1] == f"model: {output}"
    plain = json.loads(hgad(*arguments, "--json").stdout)
    assert plain["check"] is None and plain["threshold"] == pytest.approx(grown.calibration.threshold(3))
    before = output.read_bytes()
    again = hgad("add-class", output, "neu", work / "neu" / "good", "-o", output)
    assert again.exit_code == 1 and "absorb more normal images of it (hgad-fast absorb)" in again.stderr
    assert output.read_bytes() == before


@pytest.mark.parametrize("method", ["gaussian", "hgad", "vqflow"])
def test_images_are_absorbed(method, work, tmp_path):
    output = tmp_path / "new.safetensors"
    arguments = ("absorb", work / f"{method}.safetensors", "class 1", work / "known" / "class 1", "-o", output)
    result = hgad(*arguments)
    assert result.exit_code == 0, result.output
    absorbed = json.loads(hgad(*arguments, "--json").stdout)
    assert absorbed["images"] == 8 and absorbed["learned"] == (method == "gaussian")
    assert result.stdout.splitlines()[0].startswith("absorbed 8 images of class 1: ")
    first, second = load(work / f"{method}.safetensors"), load(output)
    assert len(second.calibration.scores) == len(first.calibration.scores) + (0 if absorbed["learned"] else 8)


def test_errors_name_the_remedy(work, tmp_path):
    output = tmp_path / "new.safetensors"
    for arguments, message in (
        (
            ("add-class", "vqflow", "neu", "neu/good"),
            "no class can be added. Absorb normal images of the new product (",
        ),
        (("add-class", "gaussian", "neu", "nowhere"), "nowhere: no such file or folder"),
        (("add-class", "gaussian", "neu", "known"), "images of 3 classes"),
        (
            ("absorb", "gaussian", "neu", "neu/good"),
            "is unknown; the model knows 'class 0', 'class 1', 'class 2'. A new",
        ),
    ):
        command, method, name, folder, *options = arguments
        result = hgad(command, work / f"{method}.safetensors", name, work / folder, "-o", output, *options)
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
        assert message in result.stderr and "model.a" not in result.stderr
    assert not output.exists()
    assert f"--output is {tmp_path}, a folder" in hgad("absorb", "a", "b", "c", "-o", tmp_path).stderr
