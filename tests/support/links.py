"""The links of a folder of HTML: where they lead, what they miss, and what a page would load from another host.

    python tests/support/links.py site

lists the links to other hosts, each with the pages that have it, after `make docs`.
"""

from __future__ import annotations

import functools
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

_ADDRESSES = {"href", "src", "poster", "data"}
_LOADED = {"stylesheet", "icon", "preload", "modulepreload", "prefetch", "preconnect", "dns-prefetch", "manifest"}


class Link(NamedTuple):
    """A link of a page: its address, and whether the page loads what is there by itself."""

    address: str
    is_loaded: bool


class Page(HTMLParser):
    """The links and the anchors of an HTML file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[Link] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors.update(values[name] for name in ("id", "name") if name in values and (name == "id" or tag == "a"))
        is_loaded = tag != "a" and (tag != "link" or bool(_LOADED & set(values.get("rel", "").split())))
        self.links += [Link(value, is_loaded) for name, value in values.items() if name in _ADDRESSES]
        if "srcset" in values:
            self.links += [Link(part.split()[0], True) for part in values["srcset"].split(",")]
        self.links += [Link(address, True) for address in _in_styles(values.get("style", ""))]


def problems(folder: Path) -> list[str]:
    """Return what is wrong with the links of a folder of HTML: one line each, none if all is well.

    Every link to a file leads to one below the folder, and, where it names an anchor, to one of that page; no page or
    stylesheet loads anything from another host.
    """
    page_of = functools.cache(Page)
    lines = []
    for path, link in _links(folder):
        where, target = path.relative_to(folder), urlsplit(link.address)
        if target.scheme in ("http", "https") or target.netloc:
            if link.is_loaded:
                lines.append(f"{where} loads {link.address} from another host")
            continue
        if target.scheme:  # data:, mailto:
            continue
        if target.path.startswith("/"):
            lines.append(f"{where}: {link.address} depends on where the site lies")
            continue
        file = (path.parent / unquote(target.path)).resolve() if target.path else path
        if not file.is_relative_to(folder.resolve()) or not file.is_file():
            lines.append(f"{where}: there is no {link.address}")
        elif target.fragment and file.suffix == ".html" and unquote(target.fragment) not in page_of(file).anchors:
            lines.append(f"{where}: {link.address} names no anchor of that page")
    return lines


def external(folder: Path) -> dict[str, list[str]]:
    """Return the addresses on other hosts that pages link to, each with the names of these pages."""
    pages: dict[str, set[str]] = defaultdict(set)
    for path, link in _links(folder):
        if urlsplit(link.address).netloc:
            pages[link.address].add(str(path.relative_to(folder)))
    return {address: sorted(names) for address, names in sorted(pages.items())}


def _links(folder: Path) -> Iterator[tuple[Path, Link]]:
    for path in sorted(folder.rglob("*.html")):
        yield from ((path, link) for link in Page(path).links)
    for path in sorted(folder.rglob("*.css")):
        yield from ((path, Link(address, True)) for address in _in_styles(path.read_text(encoding="utf-8")))


def _in_styles(text: str) -> list[str]:
    return re.findall(r"""url\(\s*["']?([^"')]+)""", text) + re.findall(r"""@import\s+["']([^"']+)""", text)


if __name__ == "__main__":
    for address, names in external(Path(sys.argv[1])).items():
        print(address, *names, sep="\n    ")
