"""The commands of docs/ are ones that the command line takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from hgad_fast.cli import app
from hgad_fast.options import configuration

DOCS = Path(__file__).parents[1] / "docs"
COMMANDS = re.findall(r"^hgad-fast .*$", "\n".join(p.read_text() for p in sorted(DOCS.glob("*.md"))), re.MULTILINE)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse_and_their_settings_are_fields(line):
    name, *arguments = shlex.split(line, comments=True)[1:]
    context = typer.main.get_command(app).commands[name].make_context(name, arguments)
    method, preset = context.params.get("method"), context.params.get("preset")
    assignments = context.params.get("set_")
    configuration(method, preset, ("a", "b", "c"), None, assignments, None, None)


@pytest.mark.parametrize("page", sorted([*DOCS.glob("*.md"), DOCS.parent / "README.md"]), ids=lambda page: page.name)
def test_no_page_has_a_gap_to_be_filled(page):
    """A word in capitals alone on its line is where somebody meant to put a figure."""
    assert re.findall(r"^[A-Z]{4,}$", page.read_text(), re.MULTILINE) == []


def test_there_are_commands():
    assert len(COMMANDS) >= 10
