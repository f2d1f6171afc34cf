"""Which value is white in 16-bit images: cameras of 10, 12 and 14 bits write their values into 16-bit words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from ..terminal import warn_user
from .datasets import Sample
from .images import WHITE_LEVEL, ImageError, read_header, read_pixels, suggested_white_level, take_as_said

SAMPLED = 20  # images of a class that are looked at


@dataclass(frozen=True)
class Depths:
    """How many of some images have 16 bits and how many fewer (or floats), and the largest value of the former."""

    of_16_bits: int
    others: int
    peak: int

    @property
    def white_level(self) -> int:
        """The white level that the 16-bit images suggest: 65535 if there are none, or they are black."""
        return suggested_white_level(self.peak) if self.peak else WHITE_LEVEL


def depths(samples: Sequence[Sample]) -> Depths:
    """Look at up to `SAMPLED` images of each class, evenly spread; those of 16 bits are decoded."""
    counts, peak = {True: 0, False: 0}, 0
    in_order = sorted(samples, key=lambda sample: sample.class_id)
    for _, group in groupby(in_order, lambda sample: sample.class_id):
        of_class = list(group)
        count = min(SAMPLED, len(of_class))
        for sample in (of_class[i * len(of_class) // count] for i in range(count)):
            try:
                is_deep = has_16_bits(read_header(sample.path)[2])
                if is_deep and (values := read_pixels(sample.path).values).dtype == np.uint16:
                    peak = max(peak, int(values.max()))
            except ImageError:
                continue  # reading them all reports it
            counts[is_deep] += 1
    return Depths(counts[True], counts[False], peak)


def white_level_advice(found: Depths) -> str:
    """Return which white level the images suggest, and how to set it; "" where it is the usual one."""
    if found.white_level == WHITE_LEVEL:
        return ""
    bits = found.white_level.bit_length()
    return (
        f"16-bit images reach {found.peak} (in {found.of_16_bits} that were looked at), as those of a camera of {bits} "
        f"bits: --set white_level={found.white_level}, or white_level={found.white_level} in the configuration; "
        f"otherwise white is {WHITE_LEVEL}, and they are almost black"
    )


def warn_of_white_level(samples: Sequence[Sample], white_level: int) -> None:
    """Warn if `white_level` is the usual one and the images suggest another, or have 8 and 16 bits in a mixture."""
    found = depths(samples)
    if white_level == WHITE_LEVEL and (advice := white_level_advice(found)):
        warn_user(advice)
        take_as_said("dark")  # which would be said of a single image
    if mixture := depth_mixture(found.of_16_bits, found.others):
        warn_user(mixture)


def has_16_bits(mode: str) -> bool:
    """Return whether images of a mode, as `read_header` gives it, have values of 16 bits."""
    return "16" in mode or mode == "I"


def depth_mixture(of_16_bits: int, others: int) -> str:
    """Return that so many images have 16 bits and so many others fewer; "" where one of them is 0."""
    if not (of_16_bits and others):
        return ""
    return (
        f"{of_16_bits} images have 16 bits and {others} fewer: make sure that white is the same in both, 255 in 8 bits "
        "and white_level in 16"
    )
