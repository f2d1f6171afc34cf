"""The walk over links finds what is wrong with them, and nothing else."""

from __future__ import annotations

from pathlib import Path

import links
import pytest

GOOD = """
<link rel="stylesheet" href="a%20style.css?v=1"><img src="images/a.png" srcset="images/a.png 1x"><p id="here">
<a href="#here"></a><a href="#"></a><a href="below/other.html#there"></a><a href="https://example.org/a">elsewhere</a>
<img src="data:image/png;base64,AA=="><a href="mailto:a@example.org"></a>
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    for name, text in {
        "index.html": GOOD,
        "below/other.html": '<a name="there" href="../index.html#here"></a>',
        "a style.css": "body { background: url('images/a.png') }",
        "images/a.png": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_nothing_is_wrong_with_what_leads_somewhere(site: Path) -> None:
    assert links.problems(site) == []
    assert links.external(site) == {"https://example.org/a": ["index.html"]}


@pytest.mark.parametrize(
    ("html", "problem"),
    [
        ('<a href="none.html">', "page.html: there is no none.html"),
        ('<a href="images">', "page.html: there is no images"),
        ('<a href="../index.html">', "page.html: there is no ../index.html"),
        ('<a href="index.html#none">', "page.html: index.html#none names no anchor of that page"),
        ('<meta name="none"><a href="#none">', "page.html: #none names no anchor of that page"),
        ('<a href="/index.html">', "page.html: /index.html depends on where the site lies"),
        ('<img src="images/b.png">', "page.html: there is no images/b.png"),
        ('<img srcset="images/a.png 1x, images/b.png 2x">', "page.html: there is no images/b.png"),
        ('<script src="https://example.org/a.js">', "page.html loads https://example.org/a.js from another host"),
        ('<script src="//example.org/a.js">', "page.html loads //example.org/a.js from another host"),
        ('<link rel="preload" href="http://a.org/b">', "page.html loads http://a.org/b from another host"),
        ('<p style="background: url(http://a.org/b)">', "page.html loads http://a.org/b from another host"),
    ],
)
def test_what_is_wrong_is_told(html: str, problem: str, site: Path) -> None:
    (site / "page.html").write_text(html)
    assert links.problems(site) == [problem]


@pytest.mark.parametrize("style", ["@import 'http://a.org/b.css';", 'p { src: url( "http://a.org/b.css" ) }'])
def test_styles_load_nothing_from_elsewhere(style: str, site: Path) -> None:
    (site / "a.css").write_text(style)
    assert links.problems(site) == ["a.css loads http://a.org/b.css from another host"]
