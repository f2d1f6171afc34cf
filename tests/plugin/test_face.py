"""`hgad_fast.anomalib` with anomalib and without: what it offers, and what the library imports by itself."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

LAZY = ("anomalib", "lightning", "openvino", "pandas", "hgad_fast.plugin")
WITHOUT = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "anomalib" else found(name, *rest)
"""
FOLDER = """
import importlib.machinery, importlib.util
found = importlib.util.find_spec
namespace = importlib.machinery.PathFinder.find_spec("anomalib", ["."])
importlib.util.find_spec = lambda name, *rest: namespace if name == "anomalib" else found(name, *rest)
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_the_library_does_not_import_it() -> None:
    program = "import sys, hgad_fast; from hgad_fast import HGADModel, load; from hgad_fast import cli\n"
    outcome = run(program + f"print([name for name in {LAZY} if name in sys.modules])")
    assert outcome.stdout == "[]\n", outcome.stderr


@pytest.mark.parametrize("folder", (False, True))
def test_without_anomalib_the_error_names_the_extra(
    folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there is a folder of that name, which Python takes for a package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    Path("anomalib").mkdir()
    hidden = FOLDER if folder else WITHOUT
    for line in ("import hgad_fast.anomalib", "from hgad_fast.anomalib import HGAD"):
        outcome = run(hidden + line)
        last = outcome.stderr.strip().splitlines()[-1]
        assert last == (
            "ModuleNotFoundError: hgad_fast.anomalib needs anomalib, which is not installed: "
            "pip install 'hgad-fast[anomalib]'"
        )


@pytest.mark.skipif(find_spec("anomalib") is None, reason="anomalib is not installed")
def test_what_it_offers() -> None:
    names = ["HGAD", "VQFlow", "PlaceGaussian", "MultiClassFolder", "ClassMetrics"]
    program = f"from hgad_fast import anomalib; print(set({names}) <= set(anomalib.__all__) <= set(dir(anomalib)))"
    outcome = run(program)
    assert outcome.stdout == "True\n", outcome.stderr
