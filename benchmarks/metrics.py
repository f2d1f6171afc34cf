"""Time and memory of the pixel metrics: `python -m benchmarks.metrics`.

Time: AUROC and AUPRO of 200 maps of 256 x 256, against the customary procedure in one process: scikit-learn's AUROC
over all pixels, and an AUPRO of 800 even thresholds at each of which the regions are labelled anew. In the time given
for it, `pixel_metrics` also works out average precision, F1max and a second AUPRO.

Memory: all pixel metrics of 100 maps of 2048 x 2048, memory-mapped, in a process of its own. Counted is its anonymous
memory, at the most and less what it was before the first call: the pages of mapped files are the kernel's to take back.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from hgad_fast.bench import measure, timing
from hgad_fast.evaluation import metrics
from hgad_fast.files import replacing

Arrays = Sequence[np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the figures as JSON here")
    parser.add_argument(
        "--every", type=int, default=1, help="time the customary AUPRO on every n-th of its thresholds, times n"
    )
    parser.add_argument("--quick", action="store_true", help="few small maps, to try the machinery")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)  # what the process of its own is started with
    arguments = parser.parse_args()
    if arguments.memory_of is not None:
        print(json.dumps(measure_memory(arguments.memory_of)))
        return
    time_of, memory_of = ((10, 64), (5, 256)) if arguments.quick else ((200, 256), (100, 2048))
    record: dict[str, Any] = measure.about_run(torch.device("cpu"))
    record["time"] = compare_times(*time_of, arguments.every)
    print(json.dumps(record["time"], indent=2), flush=True)
    record["memory"] = memory_in_a_process(*memory_of)
    print(json.dumps(record["memory"], indent=2))
    if arguments.output is not None:
        with replacing(arguments.output) as file:
            file.write_text(json.dumps(record, indent=2) + "\n")


def compare_times(n: int, size: int, every: int, rounds: int = 5) -> dict[str, Any]:
    from sklearn.metrics import roc_auc_score

    maps, masks = smooth_maps(n, size)
    metrics.pixel_metrics(maps[:1], masks[:1])  # imports
    ours, figures = _best(lambda: metrics.pixel_metrics(maps, masks), rounds)
    labels, scores = np.concatenate(masks, axis=None), np.concatenate(maps, axis=None)
    of_auroc, auroc = _best(lambda: roc_auc_score(labels, scores), 1)
    of_aupro, aupro = _best(lambda: aupro_800(maps, masks, every), 1)
    of_aupro *= every  # what a threshold costs does not depend on it
    return {
        "maps": n,
        "size": size,
        "pixel_metrics_seconds": ours,
        "pixel_metrics_auroc": figures["auroc"],
        "pixel_metrics_aupro": figures["aupro_0.3"],
        "customary_auroc_seconds": of_auroc,
        "customary_auroc": auroc,
        "customary_aupro_seconds": of_aupro,
        "customary_aupro_timed_on_every": every,
        "customary_aupro": aupro,
        "times_faster": (of_auroc + of_aupro) / ours,
    }


def _best(work: Callable[[], Any], rounds: int) -> tuple[float, Any]:
    """Return the least seconds of some rounds, and the result."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def aupro_800(maps: Arrays, masks: Arrays, every: int = 1) -> float:
    """Return the customary AUPRO: 800 even thresholds, regions labelled anew at each, rates up to 0.3 rescaled.

    Of the thresholds only every `every`-th is visited.
    """
    low, high = min(m.min() for m in maps), max(m.max() for m in maps)
    n_normal = sum(np.count_nonzero(mask == 0) for mask in masks)
    rates, overlaps = [], []
    for threshold in np.arange(low, high, (high - low) / 800)[::every]:
        false, overlap = 0, []
        for map_, mask in zip(maps, masks, strict=True):
            alarms = map_ >= threshold
            labelled, n = ndimage.label(mask, np.ones((3, 3)))
            if n:
                counts = np.bincount(labelled[alarms], minlength=n + 1)
                overlap.append(counts[1:] / np.bincount(labelled.ravel())[1:])
            false += np.count_nonzero(alarms & (mask == 0))
        rates.append(false / n_normal)
        overlaps.append(np.concatenate(overlap).mean())
    x, y = np.array(rates), np.array(overlaps)
    x, y = x[x < 0.3], y[x < 0.3]
    x = (x - x.min()) / (x.max() - x.min())
    return float(((y[:-1] + y[1:]) / 2 * (x[:-1] - x[1:])).sum())


def smooth_maps(n: int, size: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Draw blurred noise, higher within the masks: up to three rectangles each, none in every fourth."""
    rng = np.random.default_rng(0)
    masks = [_rectangles(rng, size, 0 if i % 4 == 3 else 1 + i % 3) for i in range(n)]
    noise = [ndimage.gaussian_filter(rng.standard_normal(mask.shape, np.float32), 4) for mask in masks]
    return [m / m.std() + 1.5 * mask.astype(np.float32) for m, mask in zip(noise, masks, strict=True)], masks


def _rectangles(rng: np.random.Generator, size: int, count: int) -> np.ndarray:
    mask = np.zeros((size, size), bool)
    for _ in range(count):
        top, left = rng.integers(0, size - size // 4, 2)
        height, width = rng.integers(1, size // 4, 2)
        mask[top : top + height, left : left + width] = True
    return mask


def memory_in_a_process(n: int, size: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        shape, rng = (n, size, size), np.random.default_rng(0)
        maps = np.lib.format.open_memmap(Path(folder, "maps.npy"), "w+", np.float32, shape)
        masks = np.lib.format.open_memmap(Path(folder, "masks.npy"), "w+", bool, shape)
        for i in range(n):
            masks[i] = _rectangles(rng, size, 0 if i % 4 == 3 else 1 + i % 3)
            maps[i] = rng.standard_normal((size, size), np.float32) + 1.5 * masks[i]
        maps.flush()
        masks.flush()
        command = [sys.executable, "-m", "benchmarks.metrics", "--memory-of", folder]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return {"maps": n, "size": size, "map_bytes": maps.nbytes, **json.loads(done.stdout)}


def measure_memory(folder: Path) -> dict[str, Any]:
    maps, masks = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("maps", "masks"))
    small = np.eye(8, dtype=np.float32)
    metrics.pixel_metrics([small], [small])  # imports
    before, start = timing.anonymous_bytes(), time.perf_counter()
    peak = timing.peak_resident(lambda: metrics.pixel_metrics(maps, masks))
    seconds = time.perf_counter() - start
    return {
        "anomalous_pixels": int(sum(np.count_nonzero(mask) for mask in masks)),
        "bytes_before": before,
        "peak_bytes": before + peak,
        "peak_bytes_of_the_metrics": peak,
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
