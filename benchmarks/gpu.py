"""Everything that needs a CUDA GPU, in one command: `make gpu`, or `python -m benchmarks.gpu`.

Correctness of every kernel and gradient against the float64 definitions first, then training, then a million pixels
scored, then what takes longer or matters less. The jobs stand in groups, each a process with a time limit (see
`gpu_plan.py` for the order, `gpu_jobs.py` for the jobs). Results, logs and Triton's cache go into the folder of
`--output`. The exit status is 0 if everything was done and nothing found wrong.

`--plan` prints the commands for a rented machine that is offline and has neither git nor FrEIA: two short runs, which
check and time the kernels. `--plan user` prints two others, which do and time what a user does.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

from benchmarks import gpu_plan, gpu_processes, triton_cache


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.plan:
        print(gpu_plan.plan_text(options.plan, commit(options), options.also, _of_the_device(options)))
        return 0
    if options.group:
        from benchmarks import gpu_jobs

        return gpu_jobs.carry_out(options.group, options.device, options.small, options.results)
    if options.device == "cuda" and not _sees_a_gpu():
        print("benchmarks.gpu needs a CUDA GPU, and torch sees none here; `make bench` measures a CPU", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that children are ended, too
    return carry_out(options)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").partition("\n")[0])
    plans = " or ".join(f"{name}, runs {' and '.join(runs)}" for name, runs in gpu_plan.PLANS.items())
    parser.add_argument(
        "--plan",
        nargs="?",
        const="kernels",
        choices=gpu_plan.PLANS,
        help=f"print two runs for a rented machine, and do nothing: {plans}",
    )
    parser.add_argument("--after", type=Path, help="with --plan: results of its first run, for what joins the second")
    parser.add_argument("--run", choices=gpu_plan.RUNS, help="one run of the plan (default: all)")
    parser.add_argument("--also", type=names, default=[], help="groups behind those of the run, with commas between")
    parser.add_argument("--only", type=names, default=[], help="these groups instead of a run, for instance sanitizer")
    parser.add_argument("--seconds", type=float, help="time for everything (default: that of the run)")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder (default: runs/gpu)")
    parser.add_argument("--commit", help="of the checkout, where git cannot tell")
    parser.add_argument("--triton-cache", type=Path, help="Triton's cache of an earlier run, as it was written there")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal on the definitions")
    parser.add_argument("--small", action="store_true", help="tiny sizes and no time limits, to try the machinery")
    parser.add_argument("--group", help=argparse.SUPPRESS)  # be the process of this group, and write to RESULTS
    parser.add_argument("results", type=Path, nargs="?", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        if options.plan and options.after:
            options.also += gpu_plan.unexplained(options.after, options.plan)
        options.chosen = gpu_plan.chosen_run(options.run, options.also, options.only)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return options


def carry_out(options: argparse.Namespace) -> int:
    """Run the groups, print what they find, and return the exit status."""
    run = options.chosen
    if options.seconds:
        run = run._replace(seconds=options.seconds)
    if options.small:
        run = run.without_limits()
    about = {"commit": commit(options), "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    name = gpu_plan.result_name("only" if options.only else options.run, about["commit"])
    report = gpu_processes.Report(options.output, name, about)
    print(f"results go to {report.save()}", flush=True)
    with tempfile.TemporaryDirectory(prefix="hgad-gpu-", ignore_cleanup_errors=True) as work:
        if options.triton_cache and options.triton_cache.exists():
            kernels = triton_cache.unpack(options.triton_cache, Path(work) / gpu_processes.CACHE)
            print(f"{kernels} entries from {options.triton_cache}", flush=True)
        elif options.triton_cache:
            print(f"there is no {options.triton_cache}: kernels are compiled anew", flush=True)
        device = _of_the_device(options).split()
        gpu_processes.carry_out(
            run, report, lambda group: gpu_processes.this_python("--group", group.name, *device), Path(work)
        )
    print(report.summary())
    return 0 if report.passed else 1


def commit(options: argparse.Namespace) -> str:
    if options.commit:
        return str(options.commit)
    from hgad_fast.environment import commit

    return commit() or "unknown"


def _of_the_device(options: argparse.Namespace) -> str:
    """Return the options that say on what device, and how large, as they stand in a command."""
    return (" --device cpu" if options.device == "cpu" else "") + (" --small" if options.small else "")


def _sees_a_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
