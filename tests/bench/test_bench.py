"""The official formulation against the golden files, and the measuring itself."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import rounding
import torch
from click.testing import Result
from golden import Golden, official_losses_and_gradients
from matplotlib.figure import Figure
from pretended import pretended_gpu
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from hgad_fast.bench import cases, latency, measure, official, results, timing
from hgad_fast.cli import app


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("name", ["small", "odd", "unconditional"])
def test_official_flow_is_golden(name: str, level: int) -> None:
    golden = Golden(name)
    recorded = golden[f"level{level}.z"], golden[f"level{level}.log_jac_det"]
    inputs = golden.official_flow(level), golden[f"level{level}.features"], golden.conditions(level)
    rounding.assert_close(recorded, lambda flow, x, condition: flow(x, condition), *inputs)


@pytest.mark.parametrize("name", ["small", "odd"])
def test_official_position_is_golden(name: str) -> None:
    golden = Golden(name)
    for level in range(2):
        recorded = golden[f"level{level}.pos_embed"]
        rounding.assert_close(recorded, lambda *size: official.official_position(*size), *recorded.shape)
    images = golden.config["B"]
    assert torch.equal(
        official.dense_position(len(recorded), images, *recorded.shape[1:]),
        official.official_position(*recorded.shape).flatten(1).t().repeat(images, 1),
    )


@pytest.mark.parametrize(("stage", "key"), [(1, "inter"), (2, "full")])
@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("name", ["small", "odd"])
def test_official_losses_and_gradients_are_golden(name: str, level: int, stage: int, key: str) -> None:
    golden = Golden(name)
    recorded = golden.below(f"level{level}.{key}.")
    rounding.assert_close(recorded, official_losses_and_gradients, *golden.official_inputs(level, stage))


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("name", ["small", "odd"])
def test_official_scores_are_golden(name: str, level: int) -> None:
    golden = Golden(name)
    prior = golden.prior(level)
    recorded = tuple(golden[f"score.level{level}.{kind}"].flatten() for kind in ("logps", "neg_entropy"))
    position = official.dense_position(golden.config["pos_embed_dim"], *golden[f"score.level{level}.logps"].shape)
    class_id = int(golden["score.class_id"])

    def scores(flow: torch.nn.Module, x: torch.Tensor, *mixture: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        of_class, negative_entropy = official.official_scores(*flow(x, [position]), *mixture, classes=[class_id])
        return of_class[:, 0], negative_entropy

    flow, x = golden.official_flow(level), golden[f"score.level{level}.features"]
    mixture = prior["mu"], prior["delta"], prior["phi_intra"]
    rounding.assert_close(recorded, scores, flow, x, *mixture)
    with torch.no_grad():
        of_every_class, _ = official.official_scores(*flow(x, [position]), *mixture)
        assert torch.equal(of_every_class[:, class_id], scores(flow, x, *mixture)[0])


@pytest.mark.parametrize("name", ["small", "odd"])
def test_official_maps_are_golden(name: str) -> None:
    golden = Golden(name)

    def maps(*levels: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        likelihood, entropy = (official.official_map(scores, int(golden["score.msk_size"])) for scores in levels)
        return likelihood, entropy, likelihood * entropy, (likelihood * entropy).flatten(1).amax(1)

    levels = [[golden[f"score.level{i}.{kind}"] for i in range(2)] for kind in ("logps", "neg_entropy")]
    recorded = tuple(golden[f"score.{part}"] for part in ("map_logp", "map_entropy", "map", "image"))
    rounding.assert_close(recorded, maps, *levels)


CPU = torch.device("cpu")
CUDA = torch.device("cuda")
TINY = cases.Size(images=2, height=3, width=4, channels=9, classes=3, centres=4, blocks=3, position_dim=8)
CEILING = results.Ceiling(1e5, {"fp32": 1e6, "tf32": 2e6, "bf16": 4e6})


def counted(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_flop_are_those_of_the_matrix_products() -> None:
    flow = official.official_flow(TINY.channels, TINY.position_dim, TINY.blocks)
    x = torch.randn(TINY.pixels, TINY.channels)
    position = official.dense_position(TINY.position_dim, TINY.images, TINY.height, TINY.width)

    def step() -> None:
        z, log_det = flow(x, [position])
        (z.sum() + log_det.sum()).backward()

    assert counted(lambda: flow(x, [position])) == cases.flow_flop(TINY, dense=True)
    assert counted(step) == cases.flow_flop(TINY, dense=True, backward=True)

    z, centres = torch.randn(TINY.pixels, TINY.channels).requires_grad_(), torch.randn(5, TINY.channels)
    centres.requires_grad_()
    distances = official.negative_half_squared_distances
    assert counted(lambda: distances(z, centres)) == cases.mixture_flop(TINY, 5)
    assert counted(lambda: distances(z, centres).sum().backward()) == cases.mixture_flop(TINY, 5, backward=True)

    for case in (cases.codes_case, cases.distances_case):
        ours, peer = case(cases.Problem(TINY, CPU))
        assert counted(ours) == ours.flop and counted(peer) == peer.flop


def test_peak_memory_is_what_is_alive_at_once() -> None:
    def work() -> None:
        first = torch.zeros(1000)
        second = torch.zeros(2000)
        del first
        third = torch.zeros(500)
        del second, third

    assert timing.peak_memory(work, CPU) == 4 * 3000


def contender(name: str, forward: Callable[[], dict[str, torch.Tensor]], **more: Any) -> cases.Contender:
    return cases.Contender(name, "torch", forward, flop=1, bytes=1, is_peer=name.startswith("official"), **more)


def returns(value: float, name: str = "z") -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: {name: torch.tensor([1.0, value])}


def out_of_memory() -> dict[str, torch.Tensor]:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 EiB.")


def compared(*contenders: cases.Contender, **options: Any) -> dict[str, results.Outcome]:
    actual = measure.compare("a case", TINY, list(contenders), CPU, CEILING, rounds=2, **options)
    assert [outcome.contender for outcome in actual] == [each.name for each in contenders]
    return {outcome.contender: outcome for outcome in actual}


def test_contenders_take_turns_and_none_always_goes_first() -> None:
    turns: list[str] = []

    def forward(name: str) -> dict[str, torch.Tensor]:
        turns.append(name)
        return {}

    contenders = [contender(name, partial(forward, name)) for name in "abc"]
    times = timing.alternate(contenders, 3, CPU)
    assert turns == list("abc") + list("bca") + list("cab")
    assert times.shape == (3, 3) and (times > 0).all()


def test_a_wrong_result_has_no_figures() -> None:
    runs: list[str] = []

    def wrong() -> dict[str, torch.Tensor]:
        runs.append("ours")
        return {"z": torch.tensor([1.0, 2.001])}

    outcomes = compared(contender("ours", wrong), contender("official", returns(2.0)))
    ours, official = outcomes.values()
    assert runs == ["ours"]
    assert isinstance(ours, results.Failure) and ours.is_wrong
    assert ours.reason == "wrong: z deviates by 4.5e-04 (allowed: 1e-04)"
    assert isinstance(official, results.Row) and official.speedups.keys() == {"official"}
    assert results.wrong_results(outcomes.values()) == [
        f"a case, ours ({TINY}): z deviates by 4.5e-04 (allowed: 1e-04)"
    ]
    assert "wrong: z deviates by 4.5e-04" in results.table(outcomes.values())


def test_what_is_allowed_depends_on_precision_quantity_and_side() -> None:
    def verdict(value: float, name: str = "z", **more: Any) -> Any:
        official = contender("official", returns(1.0, name))
        return measure.check([contender(more.pop("who", "ours"), returns(value, name), **more), official])

    assert isinstance(verdict(1.001)["ours"], str)
    assert verdict(1.001, precision="tf32")["ours"] == pytest.approx(0.001 / 2**0.5, rel=1e-3)
    assert isinstance(verdict(1.02, precision="tf32")["ours"], str)
    assert isinstance(verdict(1.02, precision="bf16")["ours"], float)
    assert isinstance(verdict(1.001, "gradient of z")["ours"], float)
    assert isinstance(verdict(math.nan, precision="bf16")["ours"], str)
    reference, peer = contender("official", returns(1.0)), contender("official, tf32", returns(2.0), precision="tf32")
    assert measure.check([reference, peer])["official, tf32"] == pytest.approx(0.5**0.5)  # stated, not judged
    peer = contender("official, tf32", returns(math.nan), precision="tf32")
    assert isinstance(measure.check([reference, peer])["official, tf32"], str)


def test_who_runs_out_of_memory_is_reported_and_the_others_are_timed() -> None:
    calls = []

    def at_last() -> dict[str, torch.Tensor]:  # the second run holds the optimizer's state
        calls.append(1)
        return out_of_memory() if len(calls) > 1 else returns(1.0)()

    outcomes = compared(
        contender("ours", returns(1.0)), contender("official", returns(1.0)), contender("official, tf32", at_last)
    )
    assert outcomes["official, tf32"].reason == "out of memory" and not outcomes["official, tf32"].is_wrong
    assert outcomes["ours"].speedups.keys() == {"official"}


def test_where_the_official_one_runs_out_of_memory_a_smaller_batch_says_what_is_right() -> None:
    def smaller(value: float) -> list[cases.Contender]:
        return [contender("ours", returns(value)), contender("official", returns(1.0))]

    big = contender("ours", returns(1.0)), contender("official", out_of_memory)
    outcomes = compared(*big, smaller=lambda: smaller(1.0))
    assert outcomes["official"].reason == "out of memory"
    assert isinstance(outcomes["ours"], results.Row) and outcomes["ours"].speedups == {}
    assert compared(*big, smaller=lambda: smaller(1.1))["ours"].is_wrong
    with pytest.raises(torch.OutOfMemoryError):
        compared(*big)


def test_a_peer_that_does_not_compile_is_reported() -> None:
    def refused() -> dict[str, torch.Tensor]:
        raise RuntimeError("backend='inductor' raised:\nand much more")

    ours, official = contender("ours", returns(1.0)), contender("official", returns(1.0))
    outcomes = compared(ours, official, contender("official, compiled", refused))
    assert outcomes["official, compiled"].reason == "does not run: backend='inductor' raised:"
    with pytest.raises(RuntimeError, match="inductor"):
        compared(contender("ours", refused), official)


def test_a_peer_s_precision_is_the_process_wide_one_while_it_runs() -> None:
    seen = []

    def forward() -> dict[str, torch.Tensor]:
        seen.append(torch.get_float32_matmul_precision())
        return {}

    contender("official, tf32", forward, precision="tf32")()
    contender("official", forward)()
    contender("ours", forward, precision="tf32")()
    assert seen == ["high", "highest", "highest"]
    assert torch.get_float32_matmul_precision() == "highest"


def test_rates_follow_from_the_stated_work(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def forward(value: float) -> dict[str, torch.Tensor]:
        now[0] += value
        return {"z": torch.ones(3)}

    slow, fast = partial(forward, 0.03), partial(forward, 0.01)
    contenders = [
        cases.Contender("ours", "torch", fast, flop=4000, bytes=100),
        cases.Contender("ours, tf32", "torch", fast, flop=4000, bytes=100, precision="tf32"),
        cases.Contender("official", "FrEIA", slow, flop=8000, bytes=100, is_peer=True),
    ]
    ours, in_tf32, official = measure.compare("a case", TINY, contenders, CPU, CEILING, rounds=5)
    assert ours.seconds == pytest.approx(0.01) and official.seconds == pytest.approx(0.03)
    assert ours.speedups["official"] == pytest.approx((3, 3, 3)) and official.speedups["official"] == (1, 1, 1)
    assert ours.images_per_second == pytest.approx(2 / ours.seconds)
    assert ours.pixels_per_second == pytest.approx(24 / ours.seconds)
    assert ours.flop_per_second == pytest.approx(4000 / ours.seconds)
    assert ours.ceiling_share == pytest.approx(0.004 / ours.seconds)  # 4 ms for the products, 1 ms for the bytes
    assert in_tf32.ceiling_share == pytest.approx(0.002 / in_tf32.seconds)
    assert ours.seconds_quartiles[0] <= ours.seconds <= ours.seconds_quartiles[1]


@pytest.fixture(params=["", "AMX"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The processor's instructions for bfloat16: what is timed follows from them, and here not from the machine's."""
    for module in (cases, measure):
        monkeypatch.setattr(module, "bfloat16_instructions", lambda: request.param)
    return request.param


OF_THE_FLOW = ("flow", "scoring", "training", "official-loop")


@pytest.mark.parametrize("case", cases.CASES)
def test_every_case_agrees_with_the_official_formulation(case: str, instructions: str) -> None:
    rows = measure.run([case], quick=True, device="cpu")
    peers = [row for row in rows if row.is_peer]
    assert peers[0].contender == "official" and peers[0].error == 0
    in_bf16 = ["official, bf16"] if instructions and case in OF_THE_FLOW else []
    assert [peer.contender for peer in peers[1:]] == in_bf16
    assert [row.precision == "bf16" for row in rows] == ["bf16" in row.contender for row in rows]
    assert any(row.precision == "bf16" and not row.is_peer for row in rows) == bool(in_bf16)
    for row in rows:
        if row is peers[0]:
            continue
        assert row.is_peer or row.path == "torch"
        assert row.error < (1e-4 if row.precision == "fp32" else 0.1)
        assert row.error > (0 if row.precision == "fp32" else 1e-5) or case == "codes"  # whose few rows may be added
        assert row.peak_bytes > 0 and row.rounds == 3  # in one order
        assert row.speedups.keys() == {peer.contender for peer in peers}
        assert row.ceiling.flop_per_second.keys() == {"fp32", *(["bf16"] if instructions else [])}


def test_a_step_is_timed_in_both_kinds_of_memory_and_precisions(instructions: str) -> None:
    ours = [each for each in cases.training_case(cases.Problem(TINY, CPU)) if not each.is_peer]
    names = ["hgad_fast", "hgad_fast, reversible"]
    assert [each.name for each in ours if each.precision == "fp32"] == names
    in_bf16 = [each for each in ours if each.precision == "bf16"]
    assert [each.name for each in in_bf16] == [f"{name}, bf16" for name in names if instructions]
    assert len({each.bytes for each in ours}) == 1 and len({each.flop for each in ours}) == 1


def test_the_record_names_the_processor_s_instructions(instructions: str) -> None:
    about = measure.about_run(CPU)
    assert about["bfloat16_instructions"] == instructions
    assert any("bf16 is left out" in note for note in about["notes"]) == (not instructions)


@pytest.mark.parametrize("case", ["flow", "training", "official-loop"])
def test_without_freia_the_definition_is_the_peer(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "FrEIA", None)
    notes: list[str] = []
    rows = measure.run([case], quick=True, device="cpu", progress=notes.append)
    assert [row.contender for row in rows if row.is_peer] == ["definition"] and rows[-1].is_peer
    assert rows[-1].path == "torch"
    assert all(0 < row.error < (1e-4 if row.precision == "fp32" else 0.1) for row in rows[:-1])
    assert "FrEIA is not installed" in notes[0] and "pip install 'hgad-fast[bench]'" in notes[0]


@pytest.mark.parametrize("case", cases.CASES)
def test_on_cuda_every_precision_is_right_too(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that a GPU will run, with the products' operands rounded by the definitions."""

    class LikeCuda(cases.Problem):
        def __init__(self, size: cases.Size, device: torch.device) -> None:
            super().__init__(size, device)
            self.precisions, self.peer_precisions = ("fp32", "tf32", "bf16"), ("fp32", "tf32")
            self.flow_peer_precisions = self.peer_precisions

    contenders = cases.CASES[case](LikeCuda(cases.QUICK, CPU))
    assert {each.precision for each in contenders if each.is_peer} <= {"fp32", "tf32"}
    if case in OF_THE_FLOW:
        assert {each.precision for each in contenders if not each.is_peer} == {"fp32", "tf32", "bf16"}
        assert {each.precision for each in contenders if each.is_peer} == {"fp32", "tf32"}
    verdicts = measure.check(contenders)
    assert len(verdicts) == len(contenders)
    assert all(isinstance(verdict, float) for verdict in verdicts.values()), verdicts


def test_latency_of_a_scorer_is_stated_with_the_share_of_the_backbone(tmp_path: Path) -> None:
    actual = measure.run(["latency"], quick=True, device="cpu", output=tmp_path / "r.json")
    assert [each.call for each in actual] == ["verdict, class given", "verdict, class inferred", "verdict and map"]
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["rows"] == [] and [each["p95"] for each in written["latencies"]] == [each.p95 for each in actual]
    for each in actual:
        assert each.frames == 5 and each.error == 0 and each.size == (96, 128) and each.img_size == 64
        assert 0 < each.p50 <= each.p95 and 0 < each.preparation and 0 < each.features
        assert each.beyond_backbone == each.p50 - each.features
        assert all(
            f"{1e3 * value:.2f}" in results.table(actual) for value in (each.p50, each.p95, each.beyond_backbone)
        )
    assert results.wrong_results(actual) == []
    (line,) = results.wrong_results([replace(actual[0], error=0.3)])
    assert line == "latency, verdict, class given: the score deviates by 3.0e-01"


def test_latencies_are_of_the_timed_frames_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The warm-up is left out, works take turns, and no more than is asked for is timed."""
    now, order = [0.0], []
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])

    def work(name: str, seconds: float) -> None:
        order.append(name)
        now[0] += 100 * seconds if len(order) <= 6 else seconds

    works = {"a": lambda frame: work("a", 1.0), "b": lambda frame: work("b", 2.0)}
    times = latency._alternate(works, [np.zeros(1)], CPU, seconds=20)
    assert times == {"a": [1.0] * 7, "b": [2.0] * 7} and order == ["a", "b"] * 10


def test_peers_are_compiled_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda forward: forward)
    rows = measure.run(["coupling"], quick=True, device="cpu", compiled=True)
    assert [row.contender for row in rows] == ["hgad_fast", "official", "official, compiled"]
    assert rows[0].speedups.keys() == {"official", "official, compiled"}


def test_without_a_compiler_nothing_is_compiled_and_a_note_says_so() -> None:
    notes: list[str] = []
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        rows = measure.run(["coupling"], quick=True, device="cpu", compiled=True, progress=notes.append)
    assert [row.contender for row in rows] == ["hgad_fast", "official"]
    assert any("no C++ compiler" in note for note in notes)
    assert not any("no C++ compiler" in note for note in measure.about_run(CPU)["notes"])


def test_the_peer_s_bfloat16_is_that_of_autocast(instructions: str) -> None:
    problem = cases.Problem(TINY, CPU)
    peers = {each.precision: each for each in cases.flow_case(problem) if each.is_peer}
    assert peers.keys() == ({"fp32", "bf16"} if instructions else {"fp32"})
    position = [problem.position]
    for precision, peer in peers.items():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            z, log_det = problem.official.flow(problem.x, position)
        results = peer()
        assert torch.equal(results["z"], z) and torch.equal(results["log_det"], log_det)


def test_scoring_in_parts_gives_the_maps_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer takes pixels in batches, as a million do not fit; here 24 pixels in batches of 7."""
    contenders = cases.scoring_case(cases.Problem(TINY, CPU))
    (whole,) = (each()["map"] for each in contenders if each.name == "official")
    monkeypatch.setattr(cases, "PEER_BATCH", 7)
    (parts,) = (each()["map"] for each in contenders if each.name == "official")
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_table_and_file_say_the_same(tmp_path: Path) -> None:
    rows = measure.run(["mixture"], quick=True, device="cpu", output=tmp_path / "named.json")
    text = results.table(rows)
    assert f"{1e3 * rows[0].seconds:.2f} (" in text and f"{rows[0].speedups['official'][0]:.2f} (" in text

    about = measure.about_run(CPU)
    path = results.save(rows, tmp_path / "results", about)
    written = json.loads(path.read_text())
    assert path.parent == tmp_path / "results" and path.stem.endswith(written["date"][:10])
    assert written["versions"]["torch"] == torch.__version__ and written["device"] == rows[0].device
    assert written == json.loads(json.dumps(results.document(rows, about)))
    assert [row["seconds"] for row in written["rows"]] == [row.seconds for row in rows]
    assert written["rows"][0]["size"]["channels"] == cases.QUICK.channels
    assert json.loads((tmp_path / "named.json").read_text())["rows"] == written["rows"]


def test_a_run_that_is_cut_leaves_what_it_has_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(problem: cases.Problem) -> list[cases.Contender]:
        raise KeyboardInterrupt

    monkeypatch.setitem(cases.CASES, "flow", cut)
    with pytest.raises(KeyboardInterrupt):
        measure.run(["coupling", "flow"], quick=True, device="cpu", output=tmp_path / "results.json")
    written = json.loads((tmp_path / "results.json").read_text())
    assert {row["case"] for row in written["rows"]} == {"coupling"}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_sizes_shrink_on_a_cpu() -> None:
    headline = cases.Size(images=8, height=16, width=16, channels=200, classes=15, centres=10, blocks=12)
    for case in cases.CASES:
        on_cpu, on_cuda = cases.sizes(case, CPU), cases.sizes(case, CUDA)
        if case == "distances":  # by place: a single image, and several
            assert [size.pixels for size in on_cpu] == [256, 2048] and len(set(on_cuda)) == len(on_cuda) > 0
            continue
        in_full = (*on_cpu[:-1], cases.MILLION_PIXELS) if case == "scoring" else on_cpu
        assert cases.sizes(case, CPU, whole=True) == in_full
        pixels = {"training": [2048, 2048], "scoring": [2048, 62_500]}.get(case, [2048])
        assert [size.pixels for size in on_cpu] == pixels
        assert on_cuda[0] == headline and {size.pixels for size in on_cuda} >= {2048, 8192, 32768}
        assert {size.channels for size in on_cuda} == {112, 200} and len(set(on_cuda)) == len(on_cuda)
    assert cases.sizes("training", CPU) == (headline, replace(headline, classes=200))
    assert 16 * cases.ONE_IMAGE_OF_THE_MILLION.pixels == cases.MILLION_PIXELS.pixels == 1_000_000
    assert {size.classes for size in cases.sizes("training", CUDA)} == {15, 40, 200}
    assert [size.classes for size in cases.sizes("scores", CUDA) if size.pixels == 1_000_000] == [15, 40]


def row(case: str, size: cases.Size, contender: str, seconds: float, flop: int, **more: Any) -> results.Row:
    """A row made up; the moved bytes are those of the pixels."""
    fields: dict[str, Any] = dict.fromkeys(results.Row.__dataclass_fields__, 0) | {
        "case": case,
        "size": size,
        "device": "a device",
        "contender": contender,
        "precision": "fp32",
        "is_peer": contender.startswith("official"),
        "seconds": seconds,
        "flop": flop,
        "bytes": 4 * size.pixels,
        "ceiling": CEILING,
    }
    return results.Row(**fields | more)


def test_roofline_draws_every_contender_at_the_work_that_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k))[1])
    big = replace(TINY, images=20)
    rows = [
        row("flow", TINY, "hgad_fast", 0.5, 1000),
        row("flow", TINY, "official", 2.0, 4000),
        row("flow", big, "hgad_fast", 4.0, 10_000, precision="bf16"),
        results.Failure("flow", big, "a device", "official", "FrEIA", "fp32", "out of memory"),
    ]
    path = results.plot(rows, tmp_path / "roof.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    small_panel, big_panel = figures[0].axes
    assert small_panel.get_title("left") == "24 pixels" and big_panel.get_title("left") == "240 pixels"

    def points(panel: Any) -> list[tuple[float, float]]:
        return [(*line.get_xdata(), *line.get_ydata()) for line in panel.lines if len(line.get_xdata()) == 1]

    assert points(small_panel) == [(1000 / 96, 2000.0), (1000 / 96, 500.0)]  # four times as fast, four times as high
    assert points(big_panel) == [(10_000 / 960, 2500.0)]
    roofs = [line.get_ydata().max() for line in small_panel.lines if len(line.get_xdata()) > 2]
    assert roofs == [1e6, 2e6, 4e6]
    with pytest.raises(ValueError, match="no measured rows"):
        results.plot(rows[-1:], tmp_path / "nothing.png")


def test_errors_name_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no benchmark 'speed'; allowed are coupling, flow, mixture"):
        measure.run(["speed"])
    monkeypatch.setitem(sys.modules, "FrEIA", None)
    with pytest.raises(ImportError, match=r"pip install 'hgad_fast\[bench\]'"):
        official.official_flow(4, 0, 1)


def hgad(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments), "--device", "cpu"])


def test_command_prints_a_table_and_writes_results_and_image(tmp_path: Path) -> None:
    result = hgad("coupling", "mixture", "--quick", "--output", tmp_path / "r.json", "--plot", tmp_path / "r.png")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("coupling on ") and "official / this" in result.stdout
    lines = ["loading torch", *(f"{case}: {cases.QUICK}" for case in ("coupling", "mixture"))]
    said = [line for line in result.stderr.splitlines() if not line.endswith(" s now")]  # every 10 s, on a slow machine
    assert said == lines
    assert {row["case"] for row in json.loads((tmp_path / "r.json").read_text())["rows"]} == {"coupling", "mixture"}
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"

    result = hgad("coupling", "--quick", "--json")
    written = json.loads(result.stdout)
    assert [row["contender"] for row in written["rows"]] == ["hgad_fast", "official"] and "commit" in written


def test_command_fails_on_a_wrong_result_and_an_unknown_case(monkeypatch: pytest.MonkeyPatch) -> None:
    contenders = [contender("ours", returns(2.0)), contender("official", returns(1.0))]
    monkeypatch.setitem(cases.CASES, "coupling", lambda problem: contenders)
    result = hgad("coupling", "--quick")
    assert result.exit_code == 1 and "wrong: z deviates by 7.1e-01" in result.stdout
    assert "hgad-fast: coupling, ours" in result.stderr
    result = hgad("speed")
    assert result.exit_code == 1 and "there is no benchmark 'speed'" in result.stderr
    assert all(case in hgad("--help").stdout for case in cases.CASES)


def test_the_recorded_step_is_ours(interpreted: SimpleNamespace) -> None:
    """On a pretended GPU it gives what the eager step gives: it starts where that one does."""
    size = replace(cases.QUICK, images=1, height=4, width=4, channels=8, blocks=1)
    with pretended_gpu(interpreted):
        contenders = {each.name: each for each in cases.training_case(cases.Problem(size, torch.device("cuda")))}
        eager, recorded = (contenders[name]() for name in ("hgad_fast, bf16", "hgad_fast, bf16, recorded"))
        assert eager.keys() == recorded.keys()
        for name, right in eager.items():
            torch.testing.assert_close(recorded[name].cpu(), right.cpu(), msg=name)
