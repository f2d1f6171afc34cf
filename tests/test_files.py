"""Names of files as they can be shown, and files that are written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hgad_fast.files import printable, replacing


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a/b c.png", "a/b c.png"),
        (Path("Größe/部品.png"), str(Path("Größe/部品.png"))),
        (os.fsdecode(b"Gr\xf6\xdfe.png"), r"Gr\xf6\xdfe.png"),
        ("two\nlines\r\x1b[31m.png", r"two\nlines\r\x1b[31m.png"),
        ("gpj.\u202etxt\u2028.png", r"gpj.\u202etxt\u2028.png"),
        ("می\u200cروم.png", "می\u200cروم.png"),
        (r"C:\parts\new.png", r"C:\parts\new.png"),
        ("\ud800.png", r"\ud800.png"),
    ],
)
def test_a_name_is_shown_in_one_line_of_utf8(name: str | Path, shown: str) -> None:
    assert printable(name) == shown
    shown.encode()


def test_a_new_file_has_the_permissions_of_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so without a change of the umask, which is that of all threads."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("changes the umask"))
    (tmp_path / "plain").touch()
    with replacing(tmp_path / "new") as file:
        file.write_text("content")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert {path.name for path in tmp_path.iterdir()} == {"new", "plain"}
