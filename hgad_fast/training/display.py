"""Progress of a training run: bars on the terminal, or lines in a log."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from ..terminal import Count, heartbeat, printable, say


class Display:
    """Progress and messages on stderr.

    Args:
        enabled: show how far the training is; None: bars if stderr is a terminal, else a line every few seconds.
    """

    def __init__(self, enabled: bool | None) -> None:
        self.enabled = enabled is not False
        self.bars = enabled is True or (enabled is None and sys.stderr.isatty())
        self.bar: Any = None
        self.count = Count("starting")
        self._open = ExitStack()

    def __enter__(self) -> Display:
        if self.bars:
            from rich.console import Console, Group
            from rich.live import Live
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
            from rich.text import Text

            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=16),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}"),
            )
            self.losses = Text()  # on a line of its own: terminals may have no more than 80 columns
            self.live = self._open.enter_context(Live(Group(self.bar, self.losses), console=Console(stderr=True)))
        elif self.enabled:
            self._open.enter_context(heartbeat(lambda: self.count.line()))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def track(self, items: Sequence[Any], title: str) -> Iterable[Any]:
        """Return the items, and show how far the loop over them is while they are iterated over."""
        if not self.enabled:
            return items
        if self.bar is None:
            return self._counted(items, title)
        return self._tracked(items, self.bar.add_task(title, total=len(items), detail=""))

    def _tracked(self, items: Sequence[Any], task: Any) -> Iterator[Any]:
        for item in items:
            yield item
            self.bar.advance(task)

    def _counted(self, items: Sequence[Any], title: str) -> Iterator[Any]:
        self.count = Count(title, len(items))
        for item in items:
            yield item
            self.count.done += 1

    def report_bad(self, error: Exception) -> None:
        """Say that a file was skipped, even where no progress is shown."""
        say(f"skipped {error}")

    def say(self, text: str) -> None:
        """Say above the bars what is done now; in a log the next line says so, if it takes that long."""
        self.count = Count(text)
        if self.bar is not None:
            self.live.console.print(printable(text), markup=False)

    def tell(self, text: str) -> None:
        """Print a line, above the bars if they are shown."""
        if self.bar is None:
            say(text)
        else:
            self.say(text)

    def start(self, steps: int, done: int) -> None:
        """Show how many of the training's steps are made; `done` were made by an earlier run."""
        self.count = Count("training, steps", steps, done)
        if self.bar is not None:
            self.training = self.bar.add_task("training", total=steps, completed=done, detail="")

    def advance(self, steps: int, losses: dict[str, Tensor], rate: float, speed: float, meta_epoch: int) -> None:
        """Advance by steps, and show the last step's loss terms and learning rate, and images per second."""
        self.count.done += steps
        if self.bar is None:
            return
        self.losses.plain = "  ".join(f"{name} {float(value):.3f}" for name, value in losses.items())
        detail = f"lr {rate:.1e}  {speed:.0f} images/s"
        self.bar.update(self.training, advance=steps, detail=detail, description=f"meta-epoch {meta_epoch}")
