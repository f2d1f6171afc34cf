"""Past runs seen by a monitor: the tables, the verdict, and the command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from hgad_fast import Monitor
from hgad_fast.cli import app
from hgad_fast.evaluation.monitoring import course


def write_table(path: Path, rows: Sequence[tuple[str, str, object]]) -> Path:
    """Write a table with the columns that matter, and one that does not."""
    lines = [f"{file},{name},0.5,{value}" for file, name, value in rows]
    path.write_text("\n".join(["file,class,score,p_value", *lines]) + "\n", encoding="utf-8")
    return path


def rows_of(values: Sequence[object], first: int = 0, name: str = "tire") -> list[tuple[str, str, object]]:
    return [(f"frames/{first + i:04}.png", name, value) for i, value in enumerate(values)]


@pytest.fixture
def unchanged(tmp_path: Path) -> Path:
    values = np.random.default_rng(0).integers(1, 51, 120) / 50
    return write_table(tmp_path / "monday.csv", rows_of(values.tolist()))


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    return write_table(tmp_path / "tuesday.csv", rows_of([1 / 50] * 30, first=120))


def test_it_is_what_the_monitor_says(unchanged: Path, changed: Path) -> None:
    past = course([unchanged, changed])
    monitor = Monitor(references={"tire": 49})
    state = monitor.update(past.p_values, "tire")
    assert past.state == state and past.evidence[-1] == monitor.evidence
    assert len(past.files) == len(past.p_values) == len(past.evidence) == 150
    assert state.found_at is not None and 120 <= state.found_at < 150


def test_the_command_says_when_and_how(unchanged: Path, changed: Path, tmp_path: Path) -> None:
    drawing = tmp_path / "drift.png"
    result = CliRunner().invoke(app, ["monitor", str(unchanged), str(changed), "--output", str(drawing)])
    assert result.exit_code == 0, result.output
    assert "CHANGED: scores are higher since about image 1" in result.output and "frames/01" in result.output
    assert f"drawn: {drawing}" in result.output
    with Image.open(drawing) as image:
        assert image.size == (1080, 600) and len(image.convert("RGB").getcolors(10**6) or ()) > 100
    result = CliRunner().invoke(app, ["monitor", str(unchanged)])
    assert result.exit_code == 0 and "no change found" in result.output and "120 images" in result.output


def test_json_has_the_state_and_the_classes(unchanged: Path, changed: Path) -> None:
    result = CliRunner().invoke(app, ["monitor", str(unchanged), str(changed), "--json", "--alpha", "0.001"])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["changed"] is True and figures["direction"] == "higher" and figures["alpha"] == 0.001
    assert figures["found_at_file"] == f"frames/{figures['found_at']:04}.png"
    assert figures["classes"]["tire"]["images"] == 150 and figures["skipped"] == 0


def test_a_table_is_not_drawn_over(unchanged: Path) -> None:
    content = unchanged.read_bytes()
    result = CliRunner().invoke(app, ["monitor", str(unchanged), "-o", str(unchanged)])
    assert result.exit_code == 1 and "a table to be read: name an image to draw" in result.output
    assert unchanged.read_bytes() == content
    result = CliRunner().invoke(app, ["monitor", str(unchanged), "-o", str(unchanged.with_suffix(".xyz"))])
    assert result.exit_code == 1 and "xyz" in result.output and not unchanged.with_suffix(".xyz").exists()


def test_frames_of_a_camera_are_named_by_their_number(tmp_path: Path) -> None:
    (tmp_path / "frames.csv").write_text("frame,class,p_value\n7,tire,0.5\n8,tire,0.25\n")
    (tmp_path / "plain.csv").write_text("class,p_value\ntire,0.5\n")
    past = course([tmp_path / "frames.csv", tmp_path / "plain.csv"])
    assert past.files == ["7", "8", f"{tmp_path / 'plain.csv'}:2"]


def test_rows_without_a_p_value_are_counted(tmp_path: Path) -> None:
    table = write_table(tmp_path / "scores.csv", rows_of(["", 0.5, "", 0.25]))
    past = course([table])
    assert past.skipped == 2 and past.files == ["frames/0001.png", "frames/0003.png"]
    assert "left out: 2 rows" in past.table()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,score\na.png,1\n", "scores.csv: no column class, p_value"),
        ("file,class,p_value\na.png,tire,high\n", "scores.csv:2: p_value is 'high'"),
        ("file,class,p_value\na.png,tire,0.5\nb.png,tire,nan\n", "scores.csv:3: p_value is 'nan'"),
        ("file,class,p_value\na.png,tire,1.5\n", "scores.csv:2: p_value is '1.5'"),
        ("file,class,p_value\na.png,tire,\n", "there is no p-value in .*hgad-fast calibrate"),
        ("", "no column class, p_value"),
    ],
)
def test_tables_that_are_none_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "scores.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        course([tmp_path / "scores.csv"])
    result = CliRunner().invoke(app, ["monitor", str(tmp_path / "scores.csv")])
    assert result.exit_code == 1 and "Traceback" not in result.output


def test_a_missing_table_and_a_wrong_alpha_are_errors(unchanged: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["monitor", str(tmp_path / "none.csv")])
    assert result.exit_code == 1 and "none.csv" in result.output
    result = CliRunner().invoke(app, ["monitor", str(unchanged), "--alpha", "2"])
    assert result.exit_code == 1 and "--alpha is 2.0" in result.output
