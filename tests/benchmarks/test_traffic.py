"""Budgets of the GPU path, counted without a GPU: launches, bytes, memory and modelled time at the paper's size."""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks import traffic
from benchmarks.traffic import Traffic

PIXELS, BLOCKS, UNITS = 8 * 64 * 64, 12, 712


@functools.cache
def step(precision: str = "bf16", images: int = 8) -> Traffic:
    return traffic.training_step(precision, images=images)


@functools.cache
def scoring(known: bool = True) -> Traffic:
    return traffic.scoring(known=known)


def within(value: float, budget: float, counted: Traffic) -> None:
    """Check a figure; where it is too large, show what moves most."""
    assert value <= budget, f"{value:.4g} > {budget:.4g}\n{counted}"


def test_bytes_of_a_pixel_and_block():
    """All of the step is counted, with the mixture and the losses."""
    within(step().bytes / PIXELS / BLOCKS, 20e3, step())


def test_no_hidden_layer_in_float32():
    assert ((PIXELS, UNITS), torch.bfloat16) in step().allocated  # the same code sees the others
    assert not any(dtype == torch.float32 and {PIXELS, UNITS} <= {*shape} for shape, dtype in step().allocated)


def test_launches_of_a_step():
    within(len(step().launches), 160, step())


def test_launches_of_the_mixture():
    mixture = traffic.mixture()
    within(len(mixture.launches), 6, mixture)


@pytest.mark.parametrize("known", [True, False])
def test_scoring_of_a_million_pixels(known):
    """Each block reads and writes the features, and the mixture reads them; it returns K densities if none is known."""
    within(len(scoring(known).launches), 60, scoring(known))
    features = 4 * 200 * 10**6
    outputs = 4 * 10**6 * (4 if known else 15 + 4)
    parameters = 4 * (BLOCKS * (UNITS * 356 + UNITS * 200 + 200 * 200) + 15 * 10 * 200)
    within(scoring(known).bytes, 1.3 * ((2 * BLOCKS + 1) * features + outputs + parameters), scoring(known))


def test_modelled_time_of_a_step():
    within(1e3 * step().seconds, 4.5, step())


def test_memory_of_a_step():
    """What a pixel adds to the peak: the packed parameters and gradients do not grow with the pixels."""
    within((step(images=16).peak_bytes - step().peak_bytes) / PIXELS, 6e3, step())


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_both_precisions_take_the_kernels_of_training(precision):
    names = {launch.name for launch in step(precision).launches}
    assert {"_coupling_kernel", "_rotate_kernel", "_unrotate_kernel", "_coupling_backward_kernel"} <= names
    assert "_forward_kernel" not in names


def test_float32_takes_the_products_of_torch():
    names = {launch.name for launch in step("fp32").launches}
    assert "_forward_kernel" in names and "_coupling_kernel" not in names
    assert {launch.operands for launch in step("fp32").of("mm")} == {"fp32"}


def test_products_of_the_weights_gradients_have_the_operands_asked_for():
    for precision in ("bf16", "tf32"):
        products = [launch for launch in step(precision).of("mm") if PIXELS in launch.shapes[0]]
        assert len(products) == 2 * BLOCKS and {launch.operands for launch in products} == {precision}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_the_nearest_code(dtype):
    """Rows once, codes once to be split and once as pieces, an index a row; nothing of N K anywhere."""
    N, D, K = 16 * 3168, 576, 512
    counted = traffic.codes(N, D, K, dtype)
    (prepared,), (search,) = counted.of("_prepare_codes_kernel"), counted.of("_nearest_kernel")
    tables = 2 * 4 * K * D + 4 * K
    assert prepared.bytes == 4 * K * D + tables
    assert search.bytes == dtype.itemsize * N * D + tables + 8 * N
    products = 3 if dtype == torch.float32 else 2  # of pieces
    assert search.flop == products * 2 * N * K * D and search.operands == "tf32"
    within(max(torch.Size(shape).numel() for shape, _ in counted.allocated), max(N, 2 * K * D), counted)
    within(counted.peak_bytes, 5 * 8 * N + 2 * tables, counted)  # indices, clamped and sorted; the sort's order


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_the_statistics(dtype):
    """The rows once, their codes and order, and the sums; around it small launches."""
    N, D, K = 16 * 3168, 576, 512
    counted = traffic.codes(N, D, K, dtype)
    (sums,) = counted.of("_sum_kernel")
    assert sums.bytes == dtype.itemsize * N * D + 8 * N + 8 * (K + 1) + 4 * K * D
    within(len(counted.launches), 9, counted)
    within(counted.bytes, 1.1 * (2 * dtype.itemsize * N * D), counted)


@pytest.mark.parametrize("images", [1, 8, 32, 64])
def test_bytes_of_the_distances_to_gaussians(images):
    """Every matrix is read once for all images of a batch; sorting the pixels by their places is small beside it."""
    P, K, D = 256, 5, 128
    N, matrices = images * P, 4 * K * P * D * D
    counted = traffic.distances(images)
    (kernel,) = counted.of("_pixel_kernel", "_place_kernel")
    of_pixels = 4 * N * D + 8 * N + 4 * N * K
    of_edges = 0 if images == 1 else 8 * (P + 1)
    assert kernel.bytes == matrices + 4 * K * P * D + of_pixels + of_edges
    rows = images if images == 1 else -(-images // 16) * 16
    assert kernel.flop == 2 * rows * P * K * D * D and kernel.operands == ("fp32" if images == 1 else "tf32x3")
    assert kernel.seconds == kernel.bytes / traffic.BYTES_PER_SECOND or images > 32
    within(len(counted.launches), 1 if images == 1 else 6, counted)
    within(counted.bytes, 1.05 * kernel.bytes, counted)
    within(counted.peak_bytes, 8 * (6 * N + P) + 4 * N * K, counted)  # places, clamped and sorted; the sort's order


def test_the_counter_counts():
    """A product, a sum in place and a view of known sizes."""
    with traffic.counted() as (counted, counter):
        a, b = torch.empty(30, 40, device="cuda"), torch.empty(40, 50, device="cuda")
        with counter:
            c = (a @ b).T
            c += 1
    assert [launch.name for launch in counted.launches] == ["mm", "add_"]
    product, addition = counted.launches
    assert product.bytes == 4 * (30 * 40 + 40 * 50 + 30 * 50) and product.flop == 2 * 30 * 40 * 50
    assert addition.bytes == 2 * 4 * 30 * 50
    assert counted.peak_bytes == 4 * 30 * 50
    assert product.seconds == product.bytes / traffic.BYTES_PER_SECOND
