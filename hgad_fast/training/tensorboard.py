"""The history of a training in TensorBoard: ``model.fit(..., callbacks=[TensorBoard("runs/first")])``.

Needs `pip install hgad-fast[tensorboard]`. Other loggers take a callback of some lines: docs/logging.md.
"""

from __future__ import annotations

import importlib.util
import os
import weakref
from pathlib import Path
from typing import Any

FIGURES = {"lr": "learning rate", "stage": "stage", "seconds": "seconds", "images_per_second": "images per second"}


class TensorBoard:
    """A callback of `fit` that writes each record of the history as scalars, the number of the pass as their step.

    Scalars are the `FIGURES` of a pass, below "training/", and of each term of the loss its mean at each level, as
    "L_g/level 0": one chart for each term. A file is complete after each record. A training that is resumed goes on
    where its checkpoint is: passes that an interrupted run had already written after that, TensorBoard leaves out; so
    it does with all of an earlier training that wrote into the same folder. Methods in closed form have no history.

    Args:
        folder: where the event files go, for ``tensorboard --logdir``; made with the first record.

    Raises:
        ModuleNotFoundError: tensorboard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise ModuleNotFoundError(
                "TensorBoard needs tensorboard: pip install 'hgad-fast[tensorboard]'", name="tensorboard"
            )
        self.folder = Path(folder)
        self._writer: Any = None
        self._last = -1  # the pass that was written last
        self._close: Any = None

    def __call__(self, record: dict[str, Any]) -> None:
        """Write a record of the history.

        Raises:
            OSError: the event file cannot be written.
        """
        step = record["pass"]
        if self._writer is None or step <= self._last:  # the first record, or that of another training
            self._start(step)
        for name, title in FIGURES.items():
            self._writer.add_scalar(f"training/{title}", record[name], step)
        for level, losses in enumerate(record["losses"]):
            for term, value in losses.items():
                self._writer.add_scalar(f"{term}/level {level}", value, step)
        self._writer.flush()
        self._last = step

    def _start(self, step: int) -> None:
        """Begin an event file, whose first event tells TensorBoard to drop what others say of `step` and later ones."""
        from torch.utils.tensorboard import SummaryWriter

        self.close()
        self._writer = SummaryWriter(str(self.folder), purge_step=step)
        self._close = weakref.finalize(self, self._writer.close)  # ends the writer's thread when nobody calls `close`

    def close(self) -> None:
        """Close the event file; the next record begins another."""
        if self._close is not None:
            self._close()
        self._writer = self._close = None
