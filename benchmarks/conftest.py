"""The benchmarks' fixture. Their rows are printed together at the end, and kept where `--save-results` asks for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hgad_fast import bench

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OUTCOMES = pytest.StashKey[list[bench.Outcome]]()


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
def measure(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """Times one of `bench.CASES`; a result unlike the official formulation's fails."""

    def measure(case: str) -> None:
        outcomes = bench.run([case], device=DEVICE)
        pytestconfig.stash[OUTCOMES] += outcomes
        assert not bench.wrong_results(outcomes)

    return measure


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    outcomes = config.stash[OUTCOMES]
    if not outcomes:
        return
    about = bench.environment(DEVICE)
    terminalreporter.section("against the official formulation")
    terminalreporter.line("\n".join([*about["notes"], bench.table(outcomes)]))
    if path := config.getoption("--save-results"):
        terminalreporter.line(f"\nkept in {bench.save(outcomes, path, about)}")
