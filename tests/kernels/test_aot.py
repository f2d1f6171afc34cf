"""The static gate: every kernel compiles for every supported GPU and stays inside its budget. No GPU is needed.

What is compiled is what the public functions launch: they are called with the launches recorded in place of run, so
tile sizes, strides and precision are theirs. Budgets are read from machine code: registers spilled to local memory,
shared memory, the matrix instruction, and the width of the loads. A spill inside a loop around matrix instructions
costs time in every iteration, so none is allowed there; a handful elsewhere moves with the Triton release.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import networkx
import pytest
import torch
import triton
from compilation import TARGETS, Binary, Compiler, Request, overwritten_names
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from hgad_fast.modules.flow import ConditionalFlow

SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}  # bytes a thread block
MATRIX_INSTRUCTION = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}
SCALARS = {int: "i32", float: "fp32"}


class Budget(NamedTuple):
    """Upper bounds on `Figures`."""

    shared: int  # bytes
    registers: int = 255
    matrix: int = 1  # so many matrix instructions must appear
    narrow_loads: int = 0  # outside loops; of values that each row or column has one of
    blocks: int = 1  # so many thread blocks must fit on a multiprocessor of sm_90
    few_rows: bool = False  # 16 or 32 to a product: on all of NVIDIA's cards the instruction of a single warp
    concessions: dict[str, dict[str, int]] = {}  # bounds of single targets; without one, no spill is allowed


# What is allowed beyond the budgets, by target; without a concession no spill is. Ampere has neither a memory for sums
# nor one that copies tiles by itself: their registers, and the addresses, are a program's own, and a tile of 16 rows
# is read in pieces of 4 bytes. Its loops spill a value or two for each of some 300 instructions. Blackwell and Hopper
# spill a few in front of the loops and behind them, which a program goes through once. AMD has 512 registers a thread;
# with more than 256, one wavefront runs on a SIMD instead of two.
AMPERE = {"spills": 64, "loop_spills": 32, "narrow_loads": 16, "loop_narrow_loads": 8}
TRAINING = {"sm_80": AMPERE, "sm_90": {"spills": 8}, "sm_100": {"spills": 40}, "gfx942": {"registers": 352}}
# AMD's assembly does not say where a value is spilled: four are, in a program of some thousand instructions.
COUPLING_BACKWARD = {**TRAINING, "gfx942": {"registers": 352, "spills": 16, "loop_spills": 16}}
TF32 = {**TRAINING, "sm_80": {**AMPERE, "spills": 80, "loop_spills": 48}}  # operands twice as wide
ROTATION = {**TRAINING, "sm_80": {**AMPERE, "spills": 144}}
BLOCKS = {**TRAINING, "sm_80": {**AMPERE, "spills": 160}, "gfx942": {"registers": 288}}  # 3.8: 96 and 260
# A mean of 32 channels has one for each thread of a warp.
MEANS = {target: {"narrow_loads": 1, "loop_narrow_loads": 1} for target in ("sm_80", "sm_90", "sm_100")}
MEANS["sm_90"]["narrow_loads"] = 2  # in front of three stages

BUDGETS = {  # of each kernel that a call launches
    "coupling": {
        # A log-determinant of 4 bytes for each row.
        "_forward_kernel": Budget(4 << 10, 56, 0, narrow_loads=4, concessions={"sm_100": {"registers": 60}}),  # 3.6: 59
        "_backward_kernel": Budget(4 << 10, 96, 0, narrow_loads=4),
    },
    "coupling, bfloat16": {
        "_forward_kernel": Budget(8 << 10, 64, 0, narrow_loads=4),
        "_backward_kernel": Budget(8 << 10, 128, 0, narrow_loads=4),
    },
    "mixture, 15 classes": {  # loads of 4 bytes: weights, gradients and log-determinants, one of each a row or column
        "_prepare_terms_kernel": Budget(4 << 10, matrix=0, narrow_loads=16),
        "_terms_kernel": Budget(72 << 10, blocks=3),
        "_terms_backward_kernel": Budget(56 << 10, narrow_loads=16, blocks=2),
        "_reduce_kernel": Budget(4 << 10, matrix=0, narrow_loads=16),
        "_prepare_scores_kernel": Budget(4 << 10, matrix=0, narrow_loads=16),
        "_scores_kernel": Budget(72 << 10, narrow_loads=4, blocks=2),
    },
    "mixture, 40 classes": {
        "_terms_kernel": Budget(96 << 10, blocks=2),
        "_terms_backward_kernel": Budget(112 << 10, narrow_loads=16),
        "_scores_kernel": Budget(72 << 10, narrow_loads=4, blocks=2),
    },
    "codes": {
        "_prepare_codes_kernel": Budget(8 << 10, matrix=0, narrow_loads=16),
        "_nearest_kernel": Budget(76 << 10, 176, narrow_loads=1, blocks=2),
        "_sum_kernel": Budget(0, 96, 0),
    },
    "codes, few rows": {"_nearest_kernel": Budget(64 << 10, 176, narrow_loads=1, blocks=3)},
    "codes, bfloat16": {
        "_nearest_kernel": Budget(76 << 10, 176, narrow_loads=1, blocks=2),
        "_sum_kernel": Budget(0, 96, 0),
    },
    "places, one image": {"_pixel_kernel": Budget(1 << 10, 96, 0, blocks=5)},
    "places, 8 images": {"_place_kernel": Budget(56 << 10, 168, few_rows=True, blocks=3, concessions=MEANS)},
    "places, 64 images": {"_place_kernel": Budget(40 << 10, 168, few_rows=True, blocks=3, concessions=MEANS)},
    "blocks": {"_block_kernel": Budget(128 << 10, matrix=30, narrow_loads=4, concessions=BLOCKS)},
    "blocks, few pixels": {"_block_kernel": Budget(104 << 10, matrix=30, narrow_loads=4, blocks=2, concessions=BLOCKS)},
    "training, bf16": {
        "_coupling_kernel": Budget(128 << 10, matrix=20, narrow_loads=4, concessions=TRAINING),
        "_rotate_kernel": Budget(128 << 10, matrix=30, narrow_loads=4, concessions=ROTATION),
        "_unrotate_kernel": Budget(128 << 10, matrix=60, narrow_loads=4, concessions=ROTATION),
        "_coupling_backward_kernel": Budget(128 << 10, matrix=20, narrow_loads=8, concessions=COUPLING_BACKWARD),
        "_hidden_backward_kernel": Budget(160 << 10, matrix=20, narrow_loads=4, concessions=TRAINING),
    },
    "training, tf32": {
        "_coupling_kernel": Budget(192 << 10, matrix=20, narrow_loads=4, concessions=TF32),
        "_coupling_backward_kernel": Budget(192 << 10, matrix=20, narrow_loads=8, concessions=TF32),
        "_hidden_backward_kernel": Budget(216 << 10, matrix=20, narrow_loads=4, concessions=TF32),
    },
    "training, bf16, few pixels": {
        "_coupling_kernel": Budget(104 << 10, matrix=20, narrow_loads=4, blocks=2, concessions=TRAINING),
        "_coupling_backward_kernel": Budget(104 << 10, matrix=20, narrow_loads=8, blocks=2, concessions=TRAINING),
        "_hidden_backward_kernel": Budget(108 << 10, matrix=20, narrow_loads=4, blocks=2, concessions=TRAINING),
    },
}


def call_coupling(kernels: SimpleNamespace, C: int, dtype: torch.dtype) -> None:
    x, a, log_det = torch.zeros(32, C), torch.zeros(32, 2 * (C // 2), dtype=dtype), torch.zeros(32)
    x2 = x[:, C - C // 2 :]
    kernels.coupling.affine_coupling(x2, a)
    kernels.coupling.affine_coupling_backward(x2, log_det, x2, a)


def call_mixture(kernels: SimpleNamespace, C: int, K: int, M: int, labels: torch.Tensor, stage: int = 2) -> None:
    z, log_det = torch.zeros(128, C), torch.zeros(128)
    parameters = torch.zeros(K, C), torch.zeros(K, M - 1, C), torch.zeros(K), torch.zeros(K, M)
    terms = kernels.mixture.mixture_terms(z, labels, *parameters, label_smoothing=0.02, stage=stage)
    kernels.mixture.mixture_terms_backward(*terms, z, labels, *parameters, label_smoothing=0.02, stage=stage)
    kernels.mixture.mixture_scores(z, log_det, *parameters, labels, per_class=True)


def call_codes(kernels: SimpleNamespace, N: int, D: int, K: int, dtype: torch.dtype = torch.float32) -> None:
    x, codes = torch.zeros(N, D, dtype=dtype), torch.zeros(D, K).T  # as a state dict holds them
    kernels.codebook.code_statistics(x, kernels.codebook.nearest_code(x, codes).zero_(), K)


def call_places(
    kernels: SimpleNamespace, images: int, D: int, M: int, P: int = 256, K: int = 5, by_rows: bool = True
) -> None:
    x, place, mean = torch.empty(images * P, D), torch.arange(P).repeat(images), torch.empty(K, P, D)
    factor = torch.empty(K, P, M, D).mT if by_rows else torch.empty(K, P, D, M)
    kernels.place.place_distances(x, place, mean, factor)


def call_blocks(kernels: SimpleNamespace, C: int, pixels: int, P: int = 256) -> None:
    flow = ConditionalFlow(C, 1, P)
    conditions = flow.grid(16, pixels // 16) or []
    kernels.blocks.coupling_blocks(torch.zeros(pixels, C), list(conditions), flow.blocks, precision="bf16")


def call_training(kernels: SimpleNamespace, C: int, precision: str, pixels: int, P: int = 256) -> None:
    flow = ConditionalFlow(C, 1, P).requires_grad_(False)
    x, conditions = torch.zeros(pixels, C), list(flow.grid(16, pixels // 16) or [])
    arguments = conditions, list(flow.blocks), 1.9
    z, log_det, saved = kernels.training.flow_forward(x, *arguments, False, 0, precision)
    kernels.training.flow_backward(z, log_det, z, saved, *arguments, False, 0, precision)


IMAGES, PIXELS = torch.zeros(2, dtype=torch.int64), torch.zeros(128, dtype=torch.int64)
CALLS = {
    "coupling": lambda kernels: call_coupling(kernels, 200, torch.float32),
    "coupling, bfloat16": lambda kernels: call_coupling(kernels, 200, torch.bfloat16),
    "mixture, 15 classes": lambda kernels: call_mixture(kernels, 200, 15, 10, IMAGES),
    "mixture, 40 classes": lambda kernels: call_mixture(kernels, 200, 40, 10, IMAGES),
    "codes": lambda kernels: call_codes(kernels, 16384, 576, 512),
    "codes, few rows": lambda kernels: call_codes(kernels, 4096, 576, 512),
    "codes, bfloat16": lambda kernels: call_codes(kernels, 16384, 576, 512, torch.bfloat16),
    "places, one image": lambda kernels: call_places(kernels, 1, 128, 128),
    "places, 8 images": lambda kernels: call_places(kernels, 8, 128, 128),
    "places, 64 images": lambda kernels: call_places(kernels, 64, 192, 64),
    "blocks": lambda kernels: call_blocks(kernels, 200, 16384),
    "blocks, few pixels": lambda kernels: call_blocks(kernels, 200, 4096),
    "training, bf16": lambda kernels: call_training(kernels, 200, "bf16", 16384),
    "training, tf32": lambda kernels: call_training(kernels, 200, "tf32", 16384),
    "training, bf16, few pixels": lambda kernels: call_training(kernels, 200, "bf16", 4096),
    "training, odd channels": lambda kernels: call_training(kernels, 37, "bf16", 16384),
    "training, unconditional": lambda kernels: call_training(kernels, 40, "bf16", 16384, P=0),
    "blocks, odd channels": lambda kernels: call_blocks(kernels, 37, 16384),
    "blocks, unconditional": lambda kernels: call_blocks(kernels, 40, 16384, P=0),
    "codes, odd channels": lambda kernels: call_codes(kernels, 16384, 37, 7),
    "codes, few": lambda kernels: call_codes(kernels, 16, 512, 32),
    "codes, one of one channel": lambda kernels: call_codes(kernels, 70, 1, 1),
    "places, odd channels, one image": lambda kernels: call_places(kernels, 1, 37, 19, by_rows=False),
    "places, odd channels, 3 images": lambda kernels: call_places(kernels, 3, 37, 19, by_rows=False),
    "places, one channel": lambda kernels: call_places(kernels, 3, 1, 1, 1, 1),
    "coupling, odd channels": lambda kernels: call_coupling(kernels, 37, torch.float32),
    "mixture, odd channels": lambda kernels: call_mixture(kernels, 201, 3, 2, IMAGES),
    "mixture, one class, one centre": lambda kernels: call_mixture(kernels, 37, 1, 1, IMAGES),
    "mixture, many classes, labels per pixel": lambda kernels: call_mixture(kernels, 40, 70, 2, PIXELS),
    "mixture, large table": lambda kernels: call_mixture(kernels, 200, 200, 10, IMAGES),
    "mixture, stage 1": lambda kernels: call_mixture(kernels, 40, 15, 10, IMAGES, stage=1),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("call", "kernel"), [(call, kernel) for call in BUDGETS for kernel in BUDGETS[call]])
def test_budget(compiler, compiled, compiled_for_amd, call, kernel, target):
    budget = BUDGETS[call][kernel]
    launches = launches_of(call, compiled_for_amd if target == "gfx942" else compiled, target)
    instruction = MATRIX_INSTRUCTION["sm_80" if budget.few_rows and target != "gfx942" else target]
    figures = compile_for(compiler, target, launches[kernel], instruction)
    bounds = {
        "registers": budget.registers,
        "spills": 0,
        "loop_spills": 0,
        "shared": min(budget.shared, SHARED_LIMIT[target]),
    }
    if target != "gfx942":
        bounds |= {"narrow_loads": budget.narrow_loads, "loop_narrow_loads": 0}
    if target == "sm_90":
        bounds["loop_barriers"] = 0
    bounds |= budget.concessions.get(target, {})
    for name, bound in bounds.items():
        figure = getattr(figures, name)
        assert figure <= bound, f"{kernel} ({call}) on {target}: {name} {figure} > {bound}"
    assert figures.matrix >= budget.matrix, f"{kernel} ({call}) on {target}: {figures.matrix} {instruction}"
    assert figures.wide_loads > 0, f"{kernel} ({call}) on {target}: no load of 8 or 16 bytes"
    if target == "sm_90":
        assert figures.blocks >= budget.blocks, f"{kernel} ({call}): {figures.blocks} blocks on a multiprocessor"


@pytest.mark.parametrize("call", CALLS)
def test_what_is_copied_behind_a_threads_back_is_fenced(compiler, compiled, call):
    """Without a fence, a matrix instruction may read what an asynchronous copy has not yet made visible to it.

    Triton 3.6 leaves the fence out. Copies of the memory accelerator are ordered without one, and what goes through
    registers is fenced by all releases.
    """
    for name, launch in launches_of(call, compiled, "sm_90").items():
        code = compile_for(compiler, "sm_90", launch).intermediate
        origin: dict[str, str] = {}  # of each view of shared memory: the allocation
        for view, source in re.findall(r"(%\w+) = ttg\.memdesc_\w+ (%[\w#]+)", code):
            origin[view] = origin.get(source, source)
        copied = {origin.get(view, view) for view in re.findall(r"async_copy_global_to_local %[\w#]+, (%\w+)", code)}
        read = {
            origin.get(view, view)
            for operands in re.findall(r"ttng\.warp_group_dot (%[\w#]+, %[\w#]+)", code)
            for view in operands.split(", ")
        }
        assert not copied & read or "ttng.fence_async_shared" in code, f"{name} ({call})"


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("call", [call for call in CALLS if call not in BUDGETS])
def test_unusual_sizes_compile(compiler, compiled, compiled_for_amd, call, target):
    for name, launch in launches_of(call, compiled_for_amd if target == "gfx942" else compiled, target).items():
        figures = compile_for(compiler, target, launch)
        assert figures.shared <= SHARED_LIMIT[target], f"{name} ({call}) on {target}: {figures.shared} B shared"


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # NumPy, on the log of an impossible event
def test_the_process_that_compiles_never_had_the_interpreter(compiler, interpreted, monkeypatch):
    """Here the kernels run on the interpreter, which shows in `triton.language`; there it does not."""
    during, set_grid_dim = [], interpreter.interpreter_builder.set_grid_dim

    def look(*grid: int) -> None:
        during.append(overwritten_names())
        set_grid_dim(*grid)

    monkeypatch.setattr(interpreter.interpreter_builder, "set_grid_dim", look)
    CALLS["mixture, one class, one centre"](interpreted)
    assert len(during) >= 3 and all({"tl.load", "tl.dot", "tl.core.reduce"} <= {*names} for names in during)
    assert compiler.call(overwritten_names) == []
    assert compiler.call(os.getenv, "TRITON_INTERPRET") is None
    assert compiler.call(os.getpid) != os.getpid()


class Launch(NamedTuple):
    """One recorded kernel launch."""

    module: str  # of kernels/
    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]


def launches_of(call: str, kernels: SimpleNamespace, target: str) -> dict[str, Launch]:
    """Return what a call launches on a target, by kernel (the last launch of each)."""
    launches = {}

    class Recorder:
        def __init__(self, module: str, kernel: JITFunction) -> None:
            self.module, self.kernel, self.arg_names = module, kernel, kernel.arg_names

        def __getitem__(self, grid):
            def record(*args, **kwargs):
                arguments = dict(zip(self.kernel.arg_names, args, strict=False))
                arguments |= {name: kwargs.pop(name) for name in self.kernel.arg_names if name in kwargs}
                launches[self.kernel.__name__] = Launch(self.module, self.kernel, arguments, kwargs)

            return record

    with ExitStack() as stack:
        architecture = "hip" if target == "gfx942" else target
        stack.enter_context(mock.patch.object(kernels.common, "architecture", lambda device: architecture))
        for stem, module in vars(kernels).items():
            for name, kernel in vars(module).items():
                if isinstance(kernel, JITFunction) and name.endswith("_kernel"):
                    stack.enter_context(mock.patch.object(module, name, Recorder(stem, kernel)))
        CALLS[call](kernels)
    return launches


class Figures(NamedTuple):
    """The cost of a compiled kernel."""

    registers: int
    spills: int  # loads and stores of local memory
    loop_spills: int  # those in innermost loops around matrix instructions
    shared: int  # bytes
    matrix: int  # instructions
    narrow_loads: int  # of at most 4 bytes a thread
    loop_narrow_loads: int  # those in innermost loops around matrix instructions
    wide_loads: int
    loop_barriers: int  # MEMBAR there: a wait for all of memory, where operands are put in shared memory by hand
    blocks: int  # that fit on a multiprocessor of sm_90
    intermediate: str = ""  # Triton's last code before machine code is made


def compile_for(compiler: Compiler, target: str, launch: Launch, matrix: str | None = None) -> Figures:
    """Compile as the JIT would for these arguments on `target`, with pointers aligned to 16 bytes.

    `matrix` is the instruction of its products: `MATRIX_INSTRUCTION`, unless given.
    """
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            shape = ", ".join(map(str, value.block_shape))
            signature[parameter.name] = f"tensordesc<{POINTERS[value.base.dtype].removeprefix('*')}[{shape}]>"
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = SCALARS[type(value)]
    name = launch.kernel.__name__
    binary = compiler.compile(Request(launch.module, name, signature, constants, attributes, launch.options, target))
    return (_amd_figures if target == "gfx942" else _nvidia_figures)(binary, matrix or MATRIX_INSTRUCTION[target])


def _nvidia_figures(binary: Binary, matrix: str) -> Figures:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.machine_code)
        file.flush()
        usage, sass = (
            subprocess.run([CUOBJDUMP, option, file.name], check=True, capture_output=True, text=True).stdout
            for option in ("-res-usage", "-sass")
        )
    code = {int(address, 16): text for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)}
    lines = list(code.values())
    spill = re.compile(r"\b(LDL|STL)\b")
    loops = _innermost_loops(code, matrix)
    inside = [instruction for body in loops for instruction in body]
    registers, warps = int(re.search(r"REG:(\d+)", usage)[1]), binary.warps
    return Figures(
        registers=registers,
        spills=_count(spill, lines),
        loop_spills=_count(spill, inside),
        shared=binary.shared,
        matrix=_count(matrix, lines),
        narrow_loads=_loads(lines, wide=False) - _loads(inside, wide=False),
        loop_narrow_loads=_loads(inside, wide=False),
        wide_loads=_loads(lines, wide=True),
        loop_barriers=_count("MEMBAR", inside),
        # Registers are allotted to a warp by 256; each block takes 1 KB of shared memory for itself.
        blocks=min(65536 // (-(-registers * 32 // 256) * 256 * warps), 64 // warps, 233_472 // (binary.shared + 1024)),
        intermediate=binary.intermediate,
    )


def _loads(instructions: list[str], *, wide: bool) -> int:
    """Count the loads from global memory of 8 or 16 bytes a thread, or those of less."""
    loads = [opcode for opcode in map(_opcode, instructions) if re.match(r"(LDG|LDGSTS)\.E", opcode)]
    return sum(wide == bool(re.search(r"\.(64|128)(\.|$)", opcode)) for opcode in loads)


def _opcode(instruction: str) -> str:
    """Return the opcode with its modifiers: operands tell nothing of a width, ``[R12.64]`` is an address of 64 bits."""
    return re.match(r"(?:@!?\w+ )?(\S+)", instruction)[1]


def _innermost_loops(code: dict[int, str], matrix: str) -> list[list[str]]:
    """Return the innermost loop bodies with matrix instructions.

    A jump back makes a loop only where its target cannot be got round. Blackwell's waits for a product spin behind all
    other code and jump back to where they were wanted: no loop, for the way to there need not lead through the spin.
    """
    flow = networkx.DiGraph()
    addresses = list(code)
    for address, following in zip(addresses, addresses[1:], strict=False):
        jump = re.match(r"(@\S+ )?(?:EXIT|RET|BRA(\.U)? .*?(0x[0-9a-f]+))", code[address])
        if jump and jump[3]:
            flow.add_edge(address, int(jump[3], 16))
        if not jump or jump[1] or jump[2]:
            flow.add_edge(address, following)
    dominators = networkx.immediate_dominators(flow, addresses[0]) | {addresses[0]: None}

    def cannot_be_got_round(target: int, address: int | None) -> bool:
        while address not in (target, None):
            address = dominators.get(address)
        return address == target

    loops = []
    for address, target in flow.edges:
        if target <= address and cannot_be_got_round(target, address):
            inside = networkx.subgraph_view(flow, filter_node=lambda at, target=target: at != target)
            body = {target, address} | (networkx.ancestors(inside, address) if address != target else set())
            if _count(matrix, [code[at] for at in body]):
                loops.append(body)
    return [[code[at] for at in body] for body in loops if not any(other < body for other in loops)]


def _amd_figures(binary: Binary, matrix: str) -> Figures:
    text = binary.machine_code
    spills, scratch = (
        int(re.search(rf"\.{field}:\s+(\d+)", text)[1]) for field in ("vgpr_spill_count", "private_segment_fixed_size")
    )
    loads = re.findall(r"(?:global|buffer)_load_\w+", text)
    wide = [load for load in loads if re.search(r"x[234]$", load)]
    return Figures(
        registers=int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1]),
        spills=max(spills, scratch),
        loop_spills=spills,  # the assembly does not say where: any counts
        shared=binary.shared,
        matrix=_count(matrix, text.splitlines()),
        narrow_loads=len(loads) - len(wide),
        loop_narrow_loads=0,  # not told apart either
        wide_loads=len(wide),
        loop_barriers=0,
        blocks=1,
    )


def _count(pattern: str | re.Pattern, lines: list[str]) -> int:
    return sum(1 for line in lines if re.search(pattern, line))
