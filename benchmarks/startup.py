"""Cost of a start beyond torch: `python -m benchmarks.startup`.

Processor seconds, in processes of their own, of `import hgad_fast` and of `hgad-fast --help`, counted after torch has
been imported, and of the import of torch itself. The kinds take turns, each round starting with the next one, and the
median and the quartiles of the rounds are given. Which packages a start may load is tested in tests/test_packaging.py.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hgad_fast.bench import measure, timing
from hgad_fast.files import replacing

ROOT = Path(__file__).parents[1]
STARTS = {
    "import torch": ("", "import torch"),
    "import hgad_fast, after torch": ("import torch", "import hgad_fast"),
    "hgad-fast --help, after torch": (
        "import contextlib, io, sys, torch\nsys.argv = ['hgad-fast', '--help']",
        "from hgad_fast.cli import app\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): app()",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the figures as JSON here")
    parser.add_argument("--rounds", type=int, default=15, help="processes of each kind (default: 15)")
    arguments = parser.parse_args()
    figures: dict[str, Any] = measure.about_run(torch.device("cpu")) | {"rounds": arguments.rounds}
    figures["starts"] = compare(arguments.rounds)
    print(json.dumps(figures["starts"], indent=2))
    if arguments.output is not None:
        with replacing(arguments.output) as file:
            file.write_text(json.dumps(figures, indent=2) + "\n")


def compare(rounds: int) -> dict[str, dict[str, float]]:
    """Return the processor seconds of each kind of start, and the modules that it adds to those before it."""
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in STARTS}
    works = [functools.partial(lambda name: seen[name].append(start(*STARTS[name])), name) for name in STARTS]
    timing.alternate(works, 1 + rounds, torch.device("cpu"))  # the first fills the caches of files and bytecode
    figures = {}
    for name, processes in seen.items():
        seconds = np.array([process["seconds"] for process in processes[1:]])
        low, high = timing.quartiles(seconds)
        figures[name] = {
            "processor_seconds": float(np.median(seconds)),
            "lower_quartile": low,
            "upper_quartile": high,
            "modules": processes[-1]["modules"],
        }
    return figures


def start(before: str, statement: str) -> dict[str, float]:
    """Run a statement in a new process, after another that does not count; return what it cost there."""
    code = "\n".join(
        [
            "import json, sys, time",
            before,
            "modules, seconds = len(sys.modules), time.process_time()",
            statement,
            "seconds = time.process_time() - seconds",
            "print(json.dumps({'seconds': seconds, 'modules': len(sys.modules) - modules}))",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
