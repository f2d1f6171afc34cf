"""What is said on the terminal, or into a log: lines in any encoding, warnings, and how far a long work is.

Nothing here imports torch, so that a first line can be said before that takes its seconds.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

EVERY = 10.0  # seconds between two lines about a work that goes on, where stderr is no terminal

_BETWEEN = (__package__, "contextlib", "torch", "concurrent", "threading")  # the user's line and a warning


def escape_unprintable() -> None:
    """Let stdout and stderr escape what their encoding lacks (a name in Japanese on cp1252), instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def printable(name: str | os.PathLike[str]) -> str:
    """Return a file's name as it can be printed, drawn and written in UTF-8; a name of ordinary characters as it is.

    What has no place in a line of text is escaped as Python writes it: bytes that are no UTF-8 (``\\xf6``), line ends
    and other control characters (``\\n``, ``\\x1b``), and the marks that turn the direction of writing (``\\u202e``).
    A backslash stays, as it is a part of paths on Windows.
    """
    return "".join(map(_escaped, os.fspath(name)))


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that Python could not decode (surrogateescape)
        return f"\\x{code - 0xDC00:02x}"
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in "\u200c\u200d":  # joiners
        return character.encode("unicode_escape").decode()
    return character


def say(text: str, file: TextIO | None = None) -> None:
    """Print text at once, on stderr by default; its lines stay lines, whatever else cannot be shown is escaped."""
    print("\n".join(map(printable, text.split("\n"))), file=file or sys.stderr, flush=True)


def warn_user(text: str) -> None:
    """Warn at the line of the user's program: that which called the package, by whatever decorators and threads."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


def duration(seconds: float) -> str:
    """Return a time as people say it: ``under 1 s``, ``40 s``, ``12 min``, ``3.5 h``, ``6 days``."""
    if seconds < 0.95:
        return "under 1 s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    if seconds < 59.5 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 47.5 * 3600:
        return f"{float(f'{seconds / 3600:.2g}'):g} h"
    return f"{seconds / 86400:.0f} days"


class Count:
    """How far a work is.

    Args:
        title: what is done, e.g. "scoring".
        total: of how many items; None: it cannot be counted.
        done: how many were done before, by an earlier run.
        clock: returns seconds.
    """

    def __init__(
        self, title: str, total: int | None = None, done: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.title, self.total, self.done, self.clock = title, total, done, clock
        self._started, self._done_before = clock(), done

    def line(self) -> str:
        """Return it in words: "scoring: 120 of 2000, 3 min left", or "loading m.safetensors: for 20 s now"."""
        seconds = self.clock() - self._started
        if self.total is None:
            return f"{self.title}: for {duration(seconds)} now"
        count = self.done - self._done_before
        left = f", {duration(seconds / count * (self.total - self.done))} left" if count else ""
        return f"{self.title}: {self.done} of {self.total}{left}"


@contextmanager
def heartbeat(line: Callable[[], str]) -> Iterator[None]:
    """While the block lasts, say every `EVERY` seconds what `line` returns, if stderr is no terminal."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(EVERY):
            say(line())

    thread = None if sys.stderr.isatty() else threading.Thread(target=beat, daemon=True, name="heartbeat")
    if thread is not None:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if thread is not None:
            thread.join()


@contextmanager
def working(title: str) -> Iterator[None]:
    """Say at once what is done in the block, and in a log every `EVERY` seconds that it goes on."""
    say(title)
    with heartbeat(Count(title).line):
        yield


@contextmanager
def progress(total: int, title: str) -> Iterator[Callable[[], None]]:
    """Show how far a loop is, and yield a function to call as each item is done.

    On a terminal that is a bar on stderr, in a log a line every `EVERY` seconds.
    """
    if not sys.stderr.isatty():
        count = Count(title, total)

        def advance() -> None:
            count.done += 1

        with heartbeat(count.line):
            yield advance
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    lines_too = sys.stdout.isatty()  # on the same terminal they go above the bar
    with Progress(console=Console(stderr=True), redirect_stdout=lines_too) as bar:
        task = bar.add_task(escape(printable(title)), total=total)
        yield lambda: bar.advance(task)


def tracked(items: Sequence[Any], title: str) -> Iterable[Any]:
    """Yield the items, and show how far the loop over them is; see `progress`."""
    with progress(len(items), title) as advance:
        for item in items:
            yield item
            advance()
