"""Text in drawings, in any script: each character in the first font at hand that has it, or else escaped.

The first font is matplotlib's own DejaVu Sans; the others are those that matplotlib finds on the machine.
"""

from __future__ import annotations

import functools
import itertools
import os
from typing import TYPE_CHECKING

from ..files import printable

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

DPI = 120
PREFERRED = ("Noto Sans", "Source Han", "IPA", "Takao", "WenQuanYi", "Yu Gothic", "Microsoft", "Hiragino", "PingFang")
"""What the names of fonts begin with that are tried before others."""

STAND_INS = ("Last Resort", "LastResort", ".LastResort", "Unicode BMP Fallback", "Adobe Blank", "Adobe NotDef")
"""What the names of fonts begin with that have a box, or nothing, for every character."""


@functools.cache
def font_of(points: float, bold: bool, path: str | None = None) -> FreeTypeFont:
    """Return a font at a size in points: matplotlib's DejaVu Sans, or that of a file."""
    import matplotlib
    from PIL import ImageFont

    if path is None:
        file = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
        path = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", file)
    return ImageFont.truetype(path, points * DPI / 72)


class Lettering:
    """Lines of text at a size in points.

    Args:
        points: the size.
        bold: in bold letters, where the first font has the characters.
    """

    def __init__(self, points: float, bold: bool = False) -> None:
        self.points, self.bold = points, bold

    def width(self, line: str) -> float:
        """Return the width of a line in pixels."""
        return sum(font.getlength(text) for font, text in self._runs(line))

    def shortened(self, line: str, width: float, cut: str = "start") -> str:
        """Return the longest line without its "start" or "end" that is at most `width` pixels wide."""
        kept, too_many = 0, len(line)
        while kept + 1 < too_many:
            count = (kept + too_many) // 2
            fits = self.width(_cut(line, count, cut)) <= width
            kept, too_many = (count, too_many) if fits else (kept, count)
        return _cut(line, kept, cut)

    def write(self, draw: ImageDraw, place: tuple[float, float], line: str, colour: str) -> None:
        """Draw a line, whose baseline begins at a place (x, y)."""
        x, y = place
        for font, text in self._runs(line):
            draw.text((x, y), text, fill=colour, font=font, anchor="ls", direction=_direction())
            x += font.getlength(text)

    def _runs(self, line: str) -> list[tuple[FreeTypeFont, str]]:
        """Return the parts of a line that have one font each."""
        shown = "".join(map(_drawable, printable(line)))
        return [
            (font_of(self.points, self.bold, path), "".join(characters))
            for path, characters in itertools.groupby(shown, _font_with)
        ]


@functools.cache
def _direction() -> str | None:
    """Return the direction of lines, in which words may run from right to left; None where Pillow knows none."""
    from PIL import features

    return "ltr" if features.check("raqm") else None


def _cut(line: str, count: int, cut: str) -> str:
    """Return `count` characters of a line, and an ellipsis where its "start" or "end" was."""
    return f"{line[:count]}\u2026" if cut == "end" else f"\u2026{line[len(line) - count :]}"


def drawable(line: str) -> str:
    """Return a line as matplotlib's own font can draw it: what that font lacks is escaped."""
    own = _characters(None)
    return "".join(c if ord(c) in own else c.encode("unicode_escape").decode() for c in printable(line))


def _drawable(character: str) -> str:
    """Return a character, or where no font has it its number as Python writes it, such as ``\\u90e8``."""
    if _font_with(character) is None and ord(character) not in _characters(None):
        return character.encode("unicode_escape").decode()
    return character


@functools.lru_cache(4096)
def _font_with(character: str) -> str | None:
    """Return the file of the first font that has a character; None: the one of matplotlib's own, or no font."""
    if ord(character) in _characters(None):
        return None
    return next((path for path in _fonts() if ord(character) in _characters(path)), None)


@functools.cache
def _fonts() -> tuple[str, ...]:
    """Return the files of the fonts at hand that can be drawn at any size."""
    from matplotlib import font_manager

    fonts = [font for font in font_manager.fontManager.ttflist if not font.name.startswith(STAND_INS)]
    ordered = sorted(
        fonts, key=lambda font: (not font.name.startswith(PREFERRED), font.style, abs(_weight(font) - 400))
    )
    return tuple(dict.fromkeys(font.fname for font in ordered))


def _weight(font: object) -> int:
    """Return the weight of one of matplotlib's fonts as a number; 400 is that of common letters."""
    weight = getattr(font, "weight", 400)
    return weight if isinstance(weight, int) else 700 if "bold" in str(weight) else 400


@functools.cache
def _characters(path: str | None) -> frozenset[int]:
    """Return the characters of a font that Pillow can draw; none where it cannot read the file or change its size."""
    from matplotlib.ft2font import FT2Font

    try:
        font = font_of(10, False, path)
        return frozenset(FT2Font(font.path).get_charmap())
    except (OSError, RuntimeError, ValueError, UnicodeError):
        return frozenset()
