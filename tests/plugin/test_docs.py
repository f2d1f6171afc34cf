"""docs/anomalib.md and the README: examples with anomalib run, and command lines parse."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("anomalib")

import small_plugin  # noqa: E402
from anomalib.cli import AnomalibCLI  # noqa: E402

from hgad_fast import GaussianConfig, HGADConfig  # noqa: E402

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "anomalib.md").read_text()

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def my_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the data of the document."""
    monkeypatch.chdir(tmp_path)
    return small_plugin.write_dataset(tmp_path / "my_data", train=6, test=1)


def test_the_example_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer pixels."""
    monkeypatch.setitem(GaussianConfig.presets, "gaussian", {"img_size": 64, "msk_size": 64})
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert "MultiClassFolder" in example and "engine.fit" in example
    exec(compile(example, "docs/anomalib.md", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert printed.count("my_data/cloth/test") == 2 and "mean/pixel_AUPRO" in printed
    assert list(Path("results").rglob("*.xml")) and Path("model.safetensors").is_file()


def test_the_readme_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its preset, with a backbone of random weights and fewer pixels."""
    tiny = {"backbone_arch": "test_efficientnet", "backbone_weights": None, "out_indices": (1, 2), "img_size": 32}
    monkeypatch.setitem(HGADConfig.presets, "fast", HGADConfig.presets["fast"] | tiny | {"meta_epochs": 1})
    readme = (DOCS.parent / "README.md").read_text()
    (example,) = (text for text in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "anomalib" in text)
    exec(compile(example.replace(', backbone_weights="packaged"', ""), "README.md", "exec"), {"__name__": "__main__"})
    assert list(Path("results").rglob("*.ckpt"))


def test_the_command_lines_parse() -> None:
    lines = [line for line in TEXT.replace("\\\n", " ").splitlines() if line.startswith("anomalib ")]
    assert len(lines) == 2
    for line in lines:
        cli = AnomalibCLI(shlex.split(line, comments=True)[1:], run=False)
        assert type(cli.model).__name__ == "HGAD"
