"""What the tests of the models of anomalib have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_plugin import write_dataset


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of three classes whose images are wide."""
    return write_dataset(tmp_path_factory.mktemp("datasets") / "three")


@pytest.fixture
def engine(tmp_path: Path) -> Callable[..., Any]:
    """A function that makes an engine of anomalib on one CPU, without progress; it takes the trainer's arguments."""
    from anomalib.engine import Engine

    def make(**arguments: Any) -> Any:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path / "results"}
        return Engine(**{"accelerator": "cpu", "devices": 1, **quiet, **arguments})

    return make
