"""The site that `make docs` has built: links, public names, and how pages look in a browser without a network."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import chromium
import links
import pytest
import typer
from waiting import eventually

import hgad_fast
from hgad_fast import cli, ops

ROOT = Path(__file__).parents[2]
SITE = ROOT / "site"
PAGES = sorted(SITE.rglob("*.html"))
PHONE = 400  # pixels


@pytest.fixture
def browser() -> Iterator[chromium.Browser]:
    if chromium.executable() is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI installs Chromium, but there is none on PATH")
        pytest.skip("there is no Chromium on PATH to look at the site with")
    with chromium.open_browser() as opened:
        yield opened


def test_every_page_is_built() -> None:
    sources = {file.relative_to(ROOT / "docs") for file in (ROOT / "docs").rglob("*.md")}
    assert {file.with_suffix(".html") for file in sources} <= {file.relative_to(SITE) for file in PAGES}


def test_links_lead_somewhere_and_nothing_is_loaded_from_elsewhere() -> None:
    assert links.problems(SITE) == []


def test_every_public_name_and_command_is_described() -> None:
    content = (SITE / "objects.inv").read_bytes().split(b"\n", 4)[4]
    described = {tuple(line.split()[:2]) for line in zlib.decompress(content).decode().splitlines()}
    for module in (hgad_fast, ops):
        public = [name for name in module.__all__ if callable(getattr(module, name))]
        kinds = ("py:class", "py:function")
        missing = [
            name for name in public if not any((f"{module.__name__}.{name}", kind) in described for kind in kinds)
        ]
        assert not missing, f"docs/api/ lacks {', '.join(missing)} of {module.__name__}"
    page = (SITE / "command-line.html").read_text()
    commands = list(typer.main.get_command(cli.app).commands)
    assert commands and [name for name in commands if f'id="hgad-fast-{name}"' not in page] == []


def test_pages_fit_a_telephone_and_need_no_network(browser: chromium.Browser) -> None:
    too_wide = []
    for page in PAGES:
        browser.open(page, width=PHONE)
        # The window itself never scrolls sideways: what is too wide would be cut off, or scroll with its whole page.
        width = browser.evaluate("document.querySelector('.content').scrollWidth")
        if width > PHONE:
            too_wide.append(f"{page.relative_to(SITE)}: {width} px")
    assert too_wide == []
    assert [address for address in browser.requests if not address.startswith(("file:", "data:"))] == []
    assert browser.messages == []


def test_colours_follow_the_reader(browser: chromium.Browser) -> None:
    backgrounds = set()
    for dark in (False, True):
        browser.open(SITE / "index.html", width=PHONE, dark=dark)
        backgrounds.add(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(backgrounds) == 2


def test_the_search_works_without_a_server(browser: chromium.Browser) -> None:
    browser.open(SITE / "search.html", width=PHONE)
    browser.evaluate("Search.performSearch('false_alarm_rate')")
    eventually(lambda: browser.evaluate("document.querySelectorAll('#search-results li a').length") > 0)
