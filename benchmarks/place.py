"""Time of distances to the Gaussians of places over that of their matrix products: `python -m benchmarks.place`.

Maps of 16 x 16 pixels, 5 classes, matrices stored by rows as those of a model are. The products are `torch.bmm` of the
same matrices and of pixels that are less their means already, in the faster of two ways to write them; distances find
out which pixels share a place, subtract the means, square and add up. Contenders take turns in one process. `ratio` is
the median of those of the rounds. Where other work keeps the processors busy, two threads wait for each other at every
operation, and the ratio counts operations; `ratio_of_least`, of the shortest times, suffers less from it.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hgad_fast import ops
from hgad_fast.bench import measure, timing
from hgad_fast.files import replacing

CPU = torch.device("cpu")
AGREEMENT = 1e-5  # Frobenius-relative, of float32
PLACES, CLASSES = 256, 5
SIZES = ((128, 128), (192, 64))  # D, M


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the figures as JSON here")
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    record: dict[str, Any] = measure.about_run(CPU)
    record |= {"places": PLACES, "classes": CLASSES, "rounds": arguments.rounds}
    record["load_average_before"] = os.getloadavg()
    record["rows"] = []
    threads_before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for dim, columns in SIZES:
            for images in (1, 8):
                times = compare(dim, columns, images, arguments.rounds)
                record["rows"].append({"dim": dim, "columns": columns, "images": images, "threads": threads, **times})
                print(json.dumps(record["rows"][-1]), flush=True)
    torch.set_num_threads(threads_before)
    record["load_average_after"] = os.getloadavg()
    if arguments.output is not None:
        with replacing(arguments.output) as file:
            file.write_text(json.dumps(record, indent=2) + "\n")


@torch.inference_mode()
def compare(dim: int, columns: int, images: int, rounds: int) -> dict[str, Any]:
    """Return the seconds of the distances and of the products alone, and the ratio.

    Raises:
        AssertionError: they do not belong together.
    """
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(images * PLACES, dim, generator=draw)
    place = torch.arange(PLACES).repeat(images)
    mean = torch.randn(CLASSES, PLACES, dim, generator=draw)
    factor = torch.randn(CLASSES, PLACES, columns, dim, generator=draw).mT
    offsets = [(x.view(images, PLACES, dim) - mean[k]).transpose(0, 1).contiguous() for k in range(CLASSES)]

    def pixels_first() -> list[Tensor]:
        return [torch.bmm(offsets[k], factor[k]) for k in range(CLASSES)]

    def matrices_first() -> list[Tensor]:
        return [torch.bmm(factor[k].mT, offsets[k].mT).mT for k in range(CLASSES)]

    def distances() -> Tensor:
        return ops.place_distances(x, place, mean, factor)

    contenders: list[Callable[[], Any]] = [distances, pixels_first, matrices_first]
    computed, *products = (work() for work in contenders)
    for product in products:
        expected = torch.stack([each.square().sum(2).T.flatten() for each in product], 1)
        error = measure.relative_error(computed, expected)
        assert error <= AGREEMENT, f"distances deviate by {error}"
    taken = timing.alternate(contenders, rounds, CPU)
    medians = np.median(taken, axis=1)
    faster = 1 + int(np.argmin(medians[1:]))
    ratios = taken[0] / taken[faster]
    return {
        "seconds": float(medians[0]),
        "seconds_of_products": float(medians[faster]),
        "products": contenders[faster].__name__,
        "ratio": float(np.median(ratios)),
        "ratio_quartiles": timing.quartiles(ratios),
        "least_seconds": float(taken[0].min()),
        "least_seconds_of_products": float(taken[1:].min()),
        "ratio_of_least": float(taken[0].min() / taken[1:].min()),
    }


if __name__ == "__main__":
    main()
