"""Parts of a resized map against `torch.nn.functional.interpolate` of the whole."""

from __future__ import annotations

import pytest
import torch
from rounding import SAME_IN_FLOAT64

from hgad_fast.features.interpolate import between, bilinear


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(
    ("size", "resized"),
    [((5, 7), (24, 35)), ((500, 497), (250, 248)), ((1, 9), (30, 1)), ((9, 9), (9, 9)), ((64, 3), (4000, 30))],
)
def test_it_is_torchs_interpolation(size, resized, align_corners):
    x = torch.randn(2, 3, *size)
    whole = torch.nn.functional.interpolate(x, resized, mode="bilinear", align_corners=align_corners)
    rows, columns = (
        between(torch.arange(m), n, m, align_corners=align_corners) for n, m in zip(size, resized, strict=True)
    )
    actual = bilinear(x, rows, columns)
    torch.testing.assert_close(actual, whole, rtol=SAME_IN_FLOAT64, atol=SAME_IN_FLOAT64)
    origin = int(rows.first[resized[0] // 2])
    part = bilinear(x[..., origin:, :], rows.part(resized[0] // 2, resized[0], origin), columns)
    assert torch.equal(part, actual[..., resized[0] // 2 :, :])
