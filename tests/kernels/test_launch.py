"""What stands in front of every kernel: the device, the strides, and the choices by architecture."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode


class Kernel:
    """Stands in for a Triton kernel: notes how it is launched, and on which device."""

    __name__ = "kernel"
    arg_names = ["x_ptr", "y_ptr", "N", "X_STRIDE"]

    def __init__(self) -> None:
        self.launches: list[tuple[Any, torch.device | None, dict[str, Any]]] = []
        self.current: torch.device | None = None

    def __getitem__(self, grid: Any) -> Any:
        return lambda **arguments: self.launches.append((grid, self.current, arguments))


@pytest.fixture
def kernel(monkeypatch):
    """A kernel that knows which device is the current one."""
    kernel = Kernel()

    @contextmanager
    def device(which: torch.device):
        before, kernel.current = kernel.current, which
        yield
        kernel.current = before

    monkeypatch.setattr(torch.cuda, "device", device)
    return kernel


@pytest.mark.parametrize("index", [0, 1])
def test_a_kernel_runs_on_the_device_of_its_tensors(compiled, kernel, index):
    with FakeTensorMode():
        x, y = (torch.empty(4, 3, device=f"cuda:{index}") for _ in range(2))
    compiled.common.launch(kernel, 7, warps=2, stages=3, x_ptr=x, y_ptr=y, N=4)
    ((grid, device, arguments),) = kernel.launches
    assert grid == (7,) and device == torch.device("cuda", index) and kernel.current is None
    assert arguments["num_warps"] == 2 and arguments["num_stages"] == 3


def test_all_public_functions_launch_on_the_device_of_their_tensors(compiled, monkeypatch):
    """They do it through `launch`: nowhere else in kernels/ is a kernel started."""
    seen = []

    @contextmanager
    def device(which: torch.device):
        seen.append(which)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(compiled.common, "architecture", lambda device: "sm_90")
    monkeypatch.setattr("triton.runtime.jit.JITFunction.run", lambda *args, **kwargs: seen.append("run"))
    with FakeTensorMode():
        x2, a = torch.empty(64, 8, device="cuda:1"), torch.empty(64, 16, device="cuda:1")
        compiled.coupling.affine_coupling(x2, a)
        codes, indices = torch.empty(8, 5, device="cuda:1").T, torch.empty(64, dtype=torch.int64, device="cuda:1")
        compiled.codebook.nearest_code(x2, codes)
        compiled.codebook.code_statistics(x2, indices, 5)
        for places in (64, 8):
            tables = torch.empty(2, places, 8, device="cuda:1"), torch.empty(2, places, 8, 8, device="cuda:1")
            compiled.place.place_distances(x2, indices, *tables)
    assert seen == [torch.device("cuda:1"), "run"] * 6


def test_row_strides_are_filled_in(compiled, kernel):
    wide = torch.empty(4, 10)
    compiled.common.launch(kernel, 1, x_ptr=wide[:, 2:5], y_ptr=torch.empty(4, 3), N=4)
    assert kernel.launches[0][2]["X_STRIDE"] == 10
    compiled.common.launch(kernel, 1, x_ptr=None, y_ptr=torch.empty(4, 3), N=4)
    assert kernel.launches[1][2]["X_STRIDE"] == 0


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.empty(3, 4).T, torch.empty(4, 3), r"x has strides \(1, 4\); its rows must be contiguous"),
        (torch.empty(4, 3), torch.empty(4, 6)[:, :3], r"y has strides \(6, 1\); it must be contiguous"),
        (torch.empty(4, 3), torch.empty(4, 3, device="meta"), "y is on meta, other arguments are on cpu"),
        (None, None, "kernel is given no tensor"),
    ],
)
def test_what_a_kernel_cannot_read_is_refused(compiled, kernel, x, y, message):
    with pytest.raises(ValueError, match=message):
        compiled.common.launch(kernel, 1, x_ptr=x, y_ptr=y, N=4)
    assert kernel.launches == []


@pytest.mark.parametrize("name", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "hip"])
def test_every_kernel_has_a_tile_on_every_architecture(compiled, monkeypatch, name):
    monkeypatch.setattr(compiled.common, "architecture", lambda device: name)
    for kernel in compiled.common.TILES:
        tile = compiled.common.tile_of(kernel, torch.device("cuda"))
        assert tile.pixels == 16 * tile.warps and tile.stages >= 1


def test_without_the_compilers_fence_loops_of_pointers_are_not_pipelined(compiled, monkeypatch):
    common, cuda = compiled.common, torch.device("cuda")
    for fenced, pointers in ((False, 1), (True, 3)):
        monkeypatch.setattr(common, "FENCED", fenced)
        monkeypatch.setattr(common, "architecture", lambda device: "sm_90")
        assert common.stages(cuda) == pointers and common.stages(cuda, tiles=True) == 3
        monkeypatch.setattr(common, "architecture", lambda device: "sm_80")
        assert common.stages(cuda) == 2


def test_stages_may_be_set_from_outside(compiled, monkeypatch):
    monkeypatch.setenv("HGAD_FAST_STAGES", "2")
    monkeypatch.setattr(compiled.common, "architecture", lambda device: "sm_90")
    assert compiled.common.tile_of("blocks", torch.device("cuda")).stages == 2
