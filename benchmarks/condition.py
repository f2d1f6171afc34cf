"""Time of VQ-Flow's subnets, the condition convolved densely and by tables: `python -m benchmarks.condition`.

Scoring: the subnets of all blocks for one image of 384 x 384 at the published widths (arXiv 2409.00942). One block of
each level is timed, and its time is multiplied by the number of blocks, which all have the same shapes. Dense is a
convolution of [x1 ; condition], then LayerNorm, ReLU and the second convolution, in both memory formats; the condition
itself is given. Tables are a convolution of x1, look-ups in tables that were made before, and the same rest.

Training: a step of one block's subnet, forward and backward, with the gradients of all weights, x1, the prototype and
the pattern. The tables are made in it.

Contenders take turns, and must agree before they are timed. Nothing else should run meanwhile; beside every wall-clock
time stands the processor time of one thread, which other work on the machine hardly changes.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hgad_fast import ops
from hgad_fast.bench import measure, timing
from hgad_fast.files import replacing

CPU = torch.device("cpu")
AGREEMENT = 1e-5  # Frobenius-relative, of float32
CLOCKS = ("seconds", "processor_seconds")


class Size(NamedTuple):
    """The subnet of a level's blocks, and the maps that it sees."""

    channels: int  # C
    side: int
    blocks: int
    images: int = 1
    codes: int = 512
    prototypes: int = 32
    of_position: int = 64
    of_prototype: int = 512

    @property
    def passive(self) -> int:
        return self.channels - self.channels // 2

    @property
    def of_code(self) -> int:
        return self.of_position + self.of_prototype

    @property
    def hidden(self) -> int:
        return self.passive + self.of_code + self.of_prototype


PUBLISHED = (Size(128, 48, 2), Size(256, 24, 5), Size(512, 12, 8))
SMALL = tuple(Size(c, side, 1, 8, 64, 8, 16, 64) for c, side in ((24, 32), (40, 16), (112, 8)))
TRAINED = (*(size._replace(images=4) for size in PUBLISHED[1:]), PUBLISHED[2]._replace(images=16), *SMALL)
TINY = Size(6, 4, 2, 1, 8, 2, 4, 8)


class Subnet:
    """The two convolutions of a subnet with a LayerNorm and a ReLU between them, and inputs of it."""

    def __init__(self, size: Size) -> None:
        draw = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=draw) * scale

        self.size, m = size, size.hidden
        self.weight1, self.bias1 = normal(m, m, 3, 3, scale=(9 * m) ** -0.5), normal(m, scale=0.1)
        self.gain, self.shift = 1 + normal(m, scale=0.1), normal(m, scale=0.1)
        self.weight2 = normal(2 * (size.channels // 2), m, 3, 3, scale=(9 * m) ** -0.5)
        self.bias2 = normal(len(self.weight2), scale=0.1)
        self.x1 = normal(size.images, size.passive, size.side, size.side)
        self.known = normal(size.prototypes, size.of_prototype)
        self.ids = torch.randint(0, size.prototypes, (size.images,), generator=draw)
        indices = torch.randint(0, size.codes, (size.images, size.side, size.side), generator=draw)
        self.condition = ops.Condition(
            indices,
            normal(size.codes, size.of_code),
            self.known[self.ids],
            normal(size.of_position, size.side, size.side),
            residual=True,
            pattern=torch.zeros(size.images, size.of_code, size.side, size.side),
        )

    def rest(self, hidden: Tensor, weight2: Tensor) -> Tensor:
        """Return what follows the first convolution; LayerNorm acts on the channels of each pixel."""
        rows = F.layer_norm(hidden.permute(0, 2, 3, 1), self.gain.shape, self.gain, self.shift)
        return F.conv2d(rows.relu_().permute(0, 3, 1, 2), weight2, self.bias2, padding=1)

    def dense(self, memory_format: torch.memory_format) -> Callable[[], Tensor]:
        weight1, weight2, x1, condition = (
            tensor.to(memory_format=memory_format)
            for tensor in (self.weight1, self.weight2, self.x1, ops.dense_condition(self.condition))
        )
        return lambda: self.rest(F.conv2d(torch.cat([x1, condition], 1), weight1, self.bias1, padding=1), weight2)

    def by_tables(self) -> Callable[[], Tensor]:
        tables = self.tables()
        of_x1, weight2, x1 = (
            tensor.contiguous(memory_format=torch.channels_last)
            for tensor in (self.weight1[:, : self.size.passive], self.weight2, self.x1)
        )

        def subnet() -> Tensor:
            hidden = F.conv2d(x1, of_x1, padding=1)
            hidden += ops.convolve_tables(tables, self.condition.indices, self.ids)
            return self.rest(hidden, weight2)

        return subnet

    def tables(self) -> ops.ConditionTables:
        condition, side = self.condition, self.size.side
        weight = self.weight1[:, self.size.passive :]
        return ops.condition_tables(
            weight, condition.codes, self.known, condition.position, True, (side, side), self.bias1
        )

    def leaves(self) -> list[Tensor]:
        """Return what gets a gradient, and ask for it."""
        condition = self.condition
        assert condition.pattern is not None
        leaves = [self.weight1, self.bias1, self.gain, self.shift, self.weight2, self.bias2, self.x1]
        return [leaf.requires_grad_() for leaf in (*leaves, condition.prototype, condition.pattern)]

    def dense_step(self) -> list[Tensor]:
        hidden = F.conv2d(
            torch.cat([self.x1, ops.dense_condition(self.condition)], 1), self.weight1, self.bias1, padding=1
        )
        return self._gradients(hidden)

    def step_by_tables(self) -> list[Tensor]:
        of_x1, of_condition = self.weight1.split([self.size.passive, self.size.hidden - self.size.passive], 1)
        x1 = self.x1.contiguous(memory_format=torch.channels_last)
        hidden = F.conv2d(x1, of_x1, self.bias1, padding=1) + ops.condition_convolution(self.condition, of_condition)
        return self._gradients(hidden)

    def _gradients(self, hidden: Tensor) -> list[Tensor]:
        result = self.rest(hidden, self.weight2)
        return list(torch.autograd.grad(result.square().mean(), self.leaves()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the figures as JSON here")
    parser.add_argument("--rounds", type=int, default=15, help="of scoring; training takes a third")
    parser.add_argument("--quick", action="store_true", help="a tiny size, to try the machinery")
    arguments = parser.parse_args()
    published, trained = ((TINY,), (TINY,)) if arguments.quick else (PUBLISHED, TRAINED)
    record: dict[str, Any] = measure.about_run(CPU)
    record["threads"] = torch.get_num_threads()
    record["load_average_before"] = os.getloadavg()
    record["scoring"] = compare_scoring(published, arguments.rounds)
    record["training"] = [compare_training(size, max(1, arguments.rounds // 3)) for size in trained]
    record["load_average_after"] = os.getloadavg()
    if arguments.output is not None:
        with replacing(arguments.output) as file:
            file.write_text(json.dumps(record, indent=2) + "\n")


def compare_scoring(sizes: tuple[Size, ...], rounds: int) -> dict[str, Any]:
    """Return the seconds of a block's subnet a level, and of those of all blocks, against the faster dense."""
    levels = []
    for size in sizes:
        with torch.inference_mode():
            subnet = Subnet(size)
            contenders: dict[str, Callable[[], Any]] = {
                "dense": subnet.dense(torch.contiguous_format),
                "dense, channels last": subnet.dense(torch.channels_last),
                "tables": subnet.by_tables(),
            }
            times = time_in_turn(contenders, rounds)
            making = timing.alternate([subnet.tables], max(1, rounds // 3), CPU)
            rows = subnet.tables().rows
        levels.append(
            {
                **size._asdict(),
                "hidden": size.hidden,
                "of_a_block": times,
                "times_faster": {clock: faster_dense(times, clock) / times["tables"][clock] for clock in CLOCKS},
                "seconds_to_make_tables_of_a_block": float(np.median(making)),
                "table_bytes_of_a_block": rows.nbytes,
            }
        )
        print(json.dumps(levels[-1], indent=2), flush=True)
    of_all: dict[str, dict[str, float]] = {}
    for clock in CLOCKS:
        tables = sum(level["blocks"] * level["of_a_block"]["tables"][clock] for level in levels)
        dense = sum(level["blocks"] * faster_dense(level["of_a_block"], clock) for level in levels)
        of_all[clock] = {
            "dense, the faster format of each level": dense,
            "tables": tables,
            "times_faster": dense / tables,
        }
    found = {
        "levels": levels,
        "of_all_blocks": of_all,
        "seconds_to_make_all_tables": sum(x["blocks"] * x["seconds_to_make_tables_of_a_block"] for x in levels),
        "table_bytes": sum(x["blocks"] * x["table_bytes_of_a_block"] for x in levels),
    }
    print(json.dumps({key: value for key, value in found.items() if key != "levels"}, indent=2), flush=True)
    return found


def faster_dense(times: dict[str, dict[str, Any]], clock: str) -> float:
    return min(taken[clock] for name, taken in times.items() if name.startswith("dense"))


def compare_training(size: Size, rounds: int) -> dict[str, Any]:
    """Return the seconds of a training step of one subnet, and the memory that it takes."""
    subnet = Subnet(size)
    subnet.leaves()
    contenders = {"dense": subnet.dense_step, "tables": subnet.step_by_tables}
    times = time_in_turn(contenders, rounds)
    found = {
        **size._asdict(),
        "hidden": size.hidden,
        "of_a_step": times,
        "times_faster": {clock: times["dense"][clock] / times["tables"][clock] for clock in CLOCKS},
        "peak_bytes": {name: timing.peak_memory(work, CPU) for name, work in contenders.items()},
    }
    print(json.dumps(found, indent=2), flush=True)
    return found


def time_in_turn(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, Any]]:
    """Return each contender's median seconds with their quartiles, and its processor seconds in one thread.

    Raises:
        AssertionError: contenders give different results.
    """
    results = [work() for work in contenders.values()]  # they warm up, too
    first, *others = (result if isinstance(result, list) else [result] for result in results)
    for name, other in zip(list(contenders)[1:], others, strict=True):
        errors = [measure.relative_error(ours, theirs) for ours, theirs in zip(other, first, strict=True)]
        assert max(errors) <= AGREEMENT, f"{name} deviates by {errors}"
    taken = timing.alternate(list(contenders.values()), rounds, CPU)
    of_processor = processor_seconds(contenders, max(1, rounds // 3))
    return {
        name: {"seconds": float(np.median(row)), "quartiles": timing.quartiles(row), "processor_seconds": seconds}
        for (name, seconds), row in zip(of_processor.items(), taken, strict=True)
    }


def processor_seconds(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return each contender's median processor time in one thread."""
    threads = torch.get_num_threads()
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    torch.set_num_threads(1)
    try:
        for _ in range(rounds):
            for name, work in contenders.items():
                start = time.process_time()
                work()
                taken[name].append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    return {name: float(np.median(row)) for name, row in taken.items()}


if __name__ == "__main__":
    main()
