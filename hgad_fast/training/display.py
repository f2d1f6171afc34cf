"""Progress of a training run on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor


class Display:
    """Progress bars and messages on stderr.

    Args:
        enabled: show bars; None: if stderr is a terminal.
    """

    def __init__(self, enabled: bool | None) -> None:
        self.enabled = sys.stderr.isatty() if enabled is None else enabled
        self.bar: Any = None

    def __enter__(self) -> Display:
        if self.enabled:
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
            self.live = Live(Group(self.bar, self.losses), console=Console(stderr=True))
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.live.stop()

    def track(self, items: Sequence[Any], title: str) -> Iterable[Any]:
        """Return the items, with a bar that advances while they are iterated over."""
        if self.bar is None:
            return items
        return self._tracked(items, self.bar.add_task(title, total=len(items), detail=""))

    def _tracked(self, items: Sequence[Any], task: Any) -> Iterator[Any]:
        for item in items:
            yield item
            self.bar.advance(task)

    def report_bad(self, error: Exception) -> None:
        """Print that a file was skipped, even where no bars are shown."""
        print(f"skipped {error}", file=sys.stderr)

    def say(self, text: str) -> None:
        """Print a line above the bars; nothing where none are shown."""
        if self.bar is not None:
            self.live.console.print(text)

    def tell(self, text: str) -> None:
        """Print a line, above the bars if they are shown."""
        if self.bar is None:
            print(text, file=sys.stderr)
        self.say(text)

    def start(self, steps: int, done: int) -> None:
        """Show the bar of the training's steps, of which `done` were made by an earlier run."""
        if self.bar is not None:
            self.training = self.bar.add_task("training", total=steps, completed=done, detail="")

    def advance(self, steps: int, losses: dict[str, Tensor], rate: float, speed: float, meta_epoch: int) -> None:
        """Advance the training's bar, and show the last step's loss terms and learning rate, and images per second."""
        if self.bar is None:
            return
        self.losses.plain = "  ".join(f"{name} {float(value):.3f}" for name, value in losses.items())
        detail = f"lr {rate:.1e}  {speed:.0f} images/s"
        self.bar.update(self.training, advance=steps, detail=detail, description=f"meta-epoch {meta_epoch}")
