"""The benchmarks' fixture. Their rows are printed together at the end, and kept where `--save-results` asks for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hgad_fast.bench import measure, results

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OUTCOMES = pytest.StashKey[list[results.Outcome]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--save-results",
        nargs="?",
        const=str(Path(__file__).parent / "results"),
        metavar="PATH",
        help="keep the figures as JSON: in this file or folder, by default benchmarks/results/<device>-<date>.json",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[OUTCOMES] = []


@pytest.fixture
def measured(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """Return a function that times one of `cases.CASES`; a result unlike the official formulation's fails."""

    def run(case: str) -> None:
        outcomes = measure.run([case], device=DEVICE)
        pytestconfig.stash[OUTCOMES] += outcomes
        assert not results.wrong_results(outcomes)

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    outcomes = config.stash[OUTCOMES]
    if not outcomes:
        return
    about = measure.about_run(DEVICE)
    terminalreporter.section("against the official formulation")
    terminalreporter.line("\n".join([*about["notes"], results.table(outcomes)]))
    if path := config.getoption("--save-results"):
        terminalreporter.line(f"\nkept in {results.save(outcomes, path, about)}")
