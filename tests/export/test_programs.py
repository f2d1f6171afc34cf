"""Programs of torch.export elsewhere: in a process that never imports this library, and compiled ahead of time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import exported
import torch

from hgad_fast.bench import measure
from hgad_fast.export.check import TOLERANCES
from hgad_fast.export.graph import OUTPUTS

RUN = """
import sys, torch
program, inputs, outputs, compiler = sys.argv[1:]
batches = torch.load(inputs)
forms = [torch.export.load(program).module()]
if compiler == "True":
    package = torch._inductor.aoti_compile_and_package(torch.export.load(program), package_path=program + ".aoti.pt2")
    forms.append(torch._inductor.aoti_load_package(package))
torch.save([list(form(*batch)) for form in forms for batch in batches], outputs)
assert not {"hgad_fast", "timm"} & set(sys.modules)
"""


def elsewhere(program: Path, batches: list[list[torch.Tensor]], compiler: bool) -> list[dict[str, torch.Tensor]]:
    """Return what a program makes of batches of inputs in a fresh process, by the names of its outputs.

    With a compiler they come twice: of the program as it is, and compiled ahead of time.
    """
    inputs, outputs = program.with_name("inputs.pt"), program.with_name("outputs.pt")
    torch.save(batches, inputs)
    command = [sys.executable, "-c", RUN, str(program), str(inputs), str(outputs), str(compiler)]
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
    """As it is, and compiled ahead of time where there is a C++ compiler."""
    model, images = exported.on_images(coupling_layers=1, fusion="product"), exported.images(3)
    program = model.export(tmp_path / "model.pt2", check=False)
    expected, compiler = model.score(images, map_size=64), measure.can_compile(torch.device("cpu"))
    results = elsewhere(program, [[images[:1]], [images]], compiler)
    assert [len(outputs["score"]) for outputs in results] == [1, 3] * (1 + compiler)
    for outputs in results:
        assert_is_the_score(outputs, expected)


def test_a_program_keeps_no_image(tmp_path):
    model, features = exported.on_features(), exported.features(3)
    program = model.export(tmp_path / "model.pt2", size=exported.SIZES)
    examples, _ = torch.export.load(program).example_inputs
    assert [x.shape[1:] for x in examples] == [x.shape[1:] for x in features]
    assert all(x.is_contiguous() and not x.any() for x in examples)  # compiled, a program takes strides like these
