"""Programs of torch.export elsewhere: in a process that never imports this library, and compiled ahead of time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import exported
import pytest
import torch

from hgad_fast.bench import measure
from hgad_fast.export.check import TOLERANCES
from hgad_fast.export.graph import OUTPUTS

RUN = """
import sys, torch
program, inputs, outputs = sys.argv[1:]
module = torch.export.load(program).module()
torch.save([list(module(*batch)) for batch in torch.load(inputs)], outputs)
assert "hgad_fast" not in sys.modules
"""
COMPILE_AND_RUN = """
import sys, torch
program, inputs, outputs = sys.argv[1:]
package = torch._inductor.aoti_compile_and_package(torch.export.load(program), package_path=program + ".aoti.pt2")
compiled = torch._inductor.aoti_load_package(package)
torch.save([list(compiled(*batch)) for batch in torch.load(inputs)], outputs)
assert "hgad_fast" not in sys.modules
"""


def elsewhere(code: str, program: Path, batches: list[list[torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """Return what a program makes of batches of inputs in a fresh process of this code, by the names of its outputs."""
    inputs, outputs = program.with_name("inputs.pt"), program.with_name("outputs.pt")
    torch.save(batches, inputs)
    command = [sys.executable, "-c", code, str(program), str(inputs), str(outputs)]
    done = subprocess.run(command, cwd=program.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [dict(zip(OUTPUTS, batch, strict=True)) for batch in torch.load(outputs)]


def assert_is_the_score(outputs, expected):
    of_score, of_map = TOLERANCES["fp32"]
    n = len(outputs["score"])
    scale = torch.maximum(expected.image_score, expected.threshold)[:n]
    assert ((outputs["score"] - expected.image_score[:n]).abs() <= of_score * scale).all()
    largest = expected.anomaly_map[:n].amax((1, 2), keepdim=True)
    assert ((outputs["anomaly_map"] - expected.anomaly_map[:n]).abs() <= of_map * largest).all()
    assert torch.equal(outputs["class_id"], expected.class_id[:n])
    assert torch.equal(outputs["is_anomalous"], expected.is_anomalous[:n])


def test_a_program_runs_without_this_library(tmp_path):
    model, images = exported.on_images(), exported.images(3)
    program = model.export(tmp_path / "model.pt2", check=False)
    expected = model.score(images, map_size=64)
    for outputs in elsewhere(RUN, program, [[images[:1]], [images]]):
        assert_is_the_score(outputs, expected)


def test_a_program_keeps_no_image(tmp_path):
    model, features = exported.on_features(), exported.features(3)
    program = model.export(tmp_path / "model.pt2", size=exported.SIZES)
    examples, _ = torch.export.load(program).example_inputs
    assert [x.shape[1:] for x in examples] == [x.shape[1:] for x in features]
    assert all(x.is_contiguous() and not x.any() for x in examples)  # compiled, a program takes strides like these


@pytest.mark.skipif(not measure.can_compile(torch.device("cpu")), reason="there is no C++ compiler")
def test_a_program_is_compiled_ahead_of_time(tmp_path):
    model, features = exported.on_features(coupling_layers=1, fusion="product"), exported.features(3)
    program = model.export(tmp_path / "model.pt2", size=exported.SIZES, check=False)
    expected = model.score_features(features)
    for outputs in elsewhere(COMPILE_AND_RUN, program, [[x[:1] for x in features], features]):
        assert_is_the_score(outputs, expected)
