"""What is installed, and what importing it costs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hgad_fast import GaussianConfig, GaussianModel, HGADConfig, HGADModel
from hgad_fast.features.extract import FeatureSet

ROOT = Path(__file__).parents[1]
TYPER = {"typer", "rich", "click", "colorama", "markdown_it", "mdurl", "pygments", "annotated_doc", "shellingham"}
IMPORT = "from hgad_fast import HGADModel, load"
HELP = """
import sys
sys.argv = ["hgad-fast", "--help"]
from hgad_fast.cli import app
try: app()
except SystemExit: pass
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("hgad_fast", "kernels"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(built), "."]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    (file,) = built.glob("hgad_fast-*.whl")
    return zipfile.ZipFile(file)


def test_wheel_holds_every_module_once_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    modules = {file.relative_to(ROOT).as_posix() for file in (ROOT / "hgad_fast").rglob("*.py")}
    modules -= {name for name in modules if name.startswith("hgad_fast/kernels/")}  # of Pythons that follow the link
    kernels = {f"hgad_fast/kernels/{file.name}" for file in (ROOT / "kernels").glob("*.py")}
    installed = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert kernels
    assert sorted(installed) == sorted(modules | kernels | {"hgad_fast/py.typed", "hgad_fast/evaluation/report.html"})


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    def read(name: str) -> str:
        (path,) = (entry for entry in wheel.namelist() if entry.endswith(f".dist-info/{name}"))
        return wheel.read(path).decode()

    metadata = read("METADATA").splitlines()
    assert "Name: hgad-fast" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert [line for line in metadata if line.startswith("Requires-Dist: triton")] == [
        'Requires-Dist: triton>=3.6; sys_platform == "linux"'
    ]
    assert "hgad-fast = hgad_fast.cli:app" in read("entry_points.txt")
    assert "Apache License" in read("licenses/LICENSE")


def test_installed_wheel_finds_its_kernels_and_leaves_the_name_kernels_alone(
    wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    wheel.extractall(tmp_path)
    code = (
        "import hgad_fast.kernels.coupling as c, importlib.util as u\n"
        "print(c.__file__); print(u.find_spec('kernels') is None)"
    )
    file, free = run_python(code, path=tmp_path, cwd=tmp_path).splitlines()
    assert Path(file) == tmp_path / "hgad_fast" / "kernels" / "coupling.py"
    assert free == "True"


def test_version_is_the_packages_version(wheel: zipfile.ZipFile) -> None:
    version = run_python("import hgad_fast; print(hgad_fast.__version__)").strip()
    assert Path(str(wheel.filename)).name.startswith(f"hgad_fast-{version}-")


@pytest.mark.parametrize(("statement", "allowed"), [(IMPORT, set()), (HELP, TYPER)], ids=["import", "help"])
def test_start_loads_little_beyond_torch(statement: str, allowed: set[str]) -> None:
    """benchmarks/startup.py says what that costs in time."""
    loaded = "sorted(set(sys.modules) - before)"
    code = f"import sys, torch\nbefore = set(sys.modules)\n{statement}\nimport json; print(json.dumps({loaded}))"
    modules = json.loads(run_python(code).splitlines()[-1])
    packages = {name.partition(".")[0] for name in modules} - sys.stdlib_module_names
    assert packages - allowed <= {"hgad_fast", "numpy", "torch"}
    rooms = {name.split(".")[1] for name in modules if name.startswith("hgad_fast.")}
    assert ("ops" in rooms) == (statement == IMPORT) and not rooms & {"bench", "demo", "evaluation", "kernels"}
    assert not [name for name in modules if name.startswith(("torch._dynamo", "torch._inductor", "torch.distributed."))]


COMMANDS = """
import json, runpy, sys, torch
before = set(sys.modules)
def run(*arguments):
    sys.argv = ["hgad-fast", *arguments]
    try: runpy.run_module("hgad_fast", run_name="__main__")
    except SystemExit as end: assert not end.code
    print(json.dumps(sorted(set(sys.modules) - before)))
run("info", MODEL)
run("score", MODEL, IMAGE)
"""


@pytest.mark.parametrize("method", ["gaussian", "hgad"])
def test_info_and_score_load_what_they_need(method: str, tmp_path: Path) -> None:
    """benchmarks/cold.py says what they cost in time."""
    settings: dict[str, Any] = {"backbone_arch": "test_efficientnet", "backbone_weights": None, "out_indices": (1, 2)}
    settings |= {"feature_mode": "joined", "img_size": 64, "msk_size": 24, "n_classes": 2}
    model: Any
    if method == "gaussian":
        model = GaussianModel(GaussianConfig(dim=4, coarse_dim=2, **settings))
    else:
        model = HGADModel(HGADConfig(feature_levels=1, coupling_layers=2, pos_embed_dim=8, **settings))
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(24, model.feature_dims[0], 8, 8, generator=generator)]
    images = FeatureSet.from_levels(levels, torch.arange(24) % 2)
    if method == "gaussian":
        model.fit(images, calibration=images, false_alarm_rate=0.2)
    else:
        model.calibrate(images, false_alarm_rate=0.2)
    model.save(tmp_path / "model.safetensors")
    Image.new("RGB", (64, 64), "grey").save(tmp_path / "image.png")
    code = COMMANDS.replace("MODEL", repr(str(tmp_path / "model.safetensors")))
    lines = run_python(code.replace("IMAGE", repr(str(tmp_path / "image.png")))).splitlines()
    info, score = (json.loads(line) for line in lines if line.startswith("["))
    unwanted = ("sklearn", "scipy", "pandas", "matplotlib", "hgad_fast.bench", "hgad_fast.demo")
    unwanted += ("sympy", "triton", "torch._dynamo", "torch._inductor")
    assert "timm" in score and not [name for name in score if name.startswith(unwanted)]
    unwanted += ("timm", "torchvision", "huggingface_hub", "hgad_fast.kernels")
    assert "safetensors" in info and not [name for name in info if name.startswith(unwanted)]


def test_works_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; sys.modules['triton.language'] = None\n"
        "import torch; from hgad_fast import ops\n"
        "y, log_det = ops.affine_coupling(torch.ones(3, 2), torch.zeros(3, 4))\n"
        "assert torch.equal(y, torch.ones(3, 2)) and torch.equal(log_det, torch.zeros(3))\n"
        "try: ops.affine_coupling(torch.ones(3, 2), torch.zeros(3, 4), backend='triton')\n"
        "except RuntimeError as error: print(error)\n"
    )
    assert "riton" in run_python(code)


def run_python(code: str, path: Path = ROOT, cwd: Path | None = None) -> str:
    environment = os.environ | {"PYTHONPATH": str(path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, env=environment, check=True, capture_output=True, text=True).stdout
