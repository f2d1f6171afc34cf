"""What is said on the terminal and into logs, and messages in the words of the command line."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from hgad_fast import terminal
from hgad_fast.environment import plain_torch
from hgad_fast.options import in_options
from hgad_fast.terminal import Count, heartbeat, progress, say, tracked

ROOT = Path(__file__).parents[1]


class Log(io.TextIOWrapper):
    """A stream into which the other side can wait for a text."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)
        self.written = threading.Condition()

    def write(self, text: str) -> int:
        with self.written:
            count = super().write(text)
            self.written.notify_all()
        return count

    def text(self) -> str:
        return self.buffer.getvalue().decode(self.encoding)

    def wait_for(self, text: str) -> None:
        with self.written:
            assert self.written.wait_for(lambda: text in self.text(), timeout=60), self.text()


def logged(monkeypatch: pytest.MonkeyPatch) -> Log:
    """Return a log that takes the place of stdout and stderr (in a fixture, pytest would take that place again)."""
    log = Log("cp1252")
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(sys, "stdout", log)
    return log


def test_lines_stay_lines_in_any_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    log = logged(monkeypatch)
    terminal.escape_unprintable()
    say("Größe \udcf6\x1b[31m\nin 部品")
    assert log.text() == "Größe \\xf6\\x1b[31m\nin \\u90e8\\u54c1\n"


def test_how_far_a_work_is() -> None:
    now = 0.0
    count, uncounted = (Count("scoring", total, done, lambda: now) for total, done in ((2000, 100), (None, 0)))
    assert count.line() == "scoring: 100 of 2000"
    now, count.done = 60.0, 700
    assert count.line() == "scoring: 700 of 2000, 2 min left"  # 600 took a minute
    assert uncounted.line() == "scoring: for 1 min now"


def test_a_log_shows_that_a_work_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    log = logged(monkeypatch)
    monkeypatch.setattr(terminal, "EVERY", 0.001)
    with terminal.working("loading m"):
        assert log.text().startswith("loading m\n")
        log.wait_for("loading m: for under 1 s now\n")
    for number in tracked(range(3), "scoring"):
        log.wait_for(f"scoring: {number} of 3")
    with heartbeat(lambda: "still at it"):
        log.wait_for("still at it\n")
    before = log.text()
    assert not any(thread.name == "heartbeat" for thread in threading.enumerate())
    assert log.text() == before


def test_a_quick_work_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    log = logged(monkeypatch)
    with progress(2, "scoring") as advance:
        advance()
    assert log.text() == ""


def test_a_terminal_has_a_bar_with_the_title_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    log = logged(monkeypatch)
    monkeypatch.setattr(log, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for _ in tracked(range(3), "scoring [red]"):
        pass
    assert "scoring [red]" in log.text() and "100%" in log.text()


def test_a_warning_is_of_the_users_line() -> None:
    """Whatever decorators of other packages, and whatever calls within this one, lie between."""
    names: dict[str, Any] = {"__name__": "hgad_fast.inner", "no_grad": torch.no_grad, "plain_torch": plain_torch}
    names["warn_user"] = terminal.warn_user
    exec("@plain_torch()\n@no_grad()\ndef outer(): inner()\ndef inner(): warn_user('look')", names)
    with pytest.warns(UserWarning, match="look") as caught:
        names["outer"]()
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("pass backbone_weights=None for random weights", "pass --weights random for random weights"),
        ("pass backbone_weights=None for random weights (--weights random).", "pass --weights random."),
        ("pass the file as backbone_weights (--weights FILE), or", "pass the file as --weights FILE, or"),
        ("HGADConfig.backbone_weights: there is no file a", "--weights: there is no file a"),
        ("give the cache more room, or cache_dtype='float16'", "give the cache more room, or --cache-dtype float16"),
        ("(--skip-bad, skip_bad=True): x", "(--skip-bad): x"),
        ("false_alarm_rate is 2", "--false-alarm-rate is 2"),
        ("choose another output_dir", "choose another --output"),
        ("/data/output_dir/skip_bad.png is no image", "/data/output_dir/skip_bad.png is no image"),
        ("HGADConfig.img_size is 'big'", "HGADConfig.img_size is 'big'"),
    ],
)
def test_messages_speak_of_options(message: str, shown: str) -> None:
    assert in_options(message) == shown


def test_the_command_line_is_there_before_torch() -> None:
    """So that it can say what it does, before an import that takes seconds."""
    code = "import sys, hgad_fast.cli; print([name for name in ('torch', 'timm', 'numpy') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


def test_names_of_the_package_are_there_when_asked_for() -> None:
    code = "import hgad_fast; hgad_fast.ops.flow, hgad_fast.__version__; print(len(hgad_fast.methods.METHODS))"
    code += "; from hgad_fast import *; HGADModel, load, Scorer; hgad_fast.nothing"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "3\n"
    assert done.stderr.splitlines()[-1] == "AttributeError: module 'hgad_fast' has no attribute 'nothing'"
