"""Several processes train the model that one would, over loopback; when one is lost, the others say so and end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rounding import SAME_IN_FLOAT64

from hgad_fast import HGADConfig, HGADModel
from hgad_fast.features.extract import FeatureSet
from hgad_fast.training import display, fit
from hgad_fast.training.checkpoint import CHECKPOINT, METRICS, MODEL, RUN
from hgad_fast.training.processes import Processes, joined
from hgad_fast.training.step import Step

ROOT = Path(__file__).parents[2]
SCRIPT = """
    import os, signal, sys, warnings
    from pathlib import Path
    import torch
    import rounding
    from hgad_fast import HGADConfig, HGADModel
    from hgad_fast.training import step
    from hgad_fast.features.extract import FeatureSet

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # so few calibration images
    folder, case, rank = Path(sys.argv[1]), sys.argv[2], int(os.environ.get("RANK", 0))
    sizes, generator = [(3, 4), (2, 5), (4, 4)], torch.Generator().manual_seed(0)
    images = [[torch.randn(c, *sizes[i % 3], generator=generator) for c in (8, 7)] for i in range(12)]
    data = FeatureSet(images, torch.arange(12) % 2)
    model = HGADModel(HGADConfig(
        n_classes=2, n_intra_centers=3, backbone_arch=None, feature_levels=2, feature_dims=(8, 7), coupling_layers=2,
        pos_embed_dim=8, msk_size=16, meta_epochs=5, sub_epochs=2, batch_size=6, lr=1e-3,
        accumulate=2 if rank and case in ('train', 'drawn') else 1,
        **{"pixels_per_step": 6, "feature_scaling": "whiten"} if case == "drawn" else {},
    )).double()
    if case == "killed" and rank:
        steps, call = [], step.Step.__call__

        def dying(*arguments):
            steps.append(1)
            if len(steps) == 11:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments)

        step.Step.__call__ = dying
    seen = []
    try:
        with rounding.in_float64():
            history = model.fit(data, calibration=data, output_dir=folder / "run", callbacks=[seen.append], resume=True)
    except (RuntimeError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    assert not torch.distributed.is_initialized()
    losses = [record["losses"] for record in history.records]
    found = {"model": model.state_dict(), "calibration": model.calibration.tensors(), "losses": losses}
    torch.save(found | {"seen": len(seen)}, folder / f"{case} {rank}.pt")
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(folder: Path, case: str, processes: int) -> list[subprocess.Popen]:
    """Start processes as torchrun would, without its launcher."""
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    if processes > 1:
        environment |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder), case]
    return [
        subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(processes)
    ]


def outcomes(running: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """Return the exit code of each, and of one that failed the last line of stderr.

    One that succeeds may have said how far it was. A process that hangs raises after ten minutes.
    """
    try:
        codes = [process.wait(timeout=600) for process in running]
        lines = [process.stderr.read().strip().rpartition("\n")[2] for process in running]
        return [(code, line if code else "") for code, line in zip(codes, lines, strict=True)]
    finally:
        for process in running:
            process.kill()


@pytest.mark.parametrize("case", ["train", "drawn"])
def test_two_processes_train_what_one_does(tmp_path, case):
    """20 steps, maps of several sizes, three images for either process, which one takes in two parts.

    Also where a part of the pixels is drawn in each step.
    """
    single, pair = tmp_path / "single", tmp_path / "pair"
    single.mkdir()
    pair.mkdir()
    assert outcomes([*start(single, case, 1), *start(pair, case, 2)]) == [(0, "")] * 3
    expected = torch.load(single / f"{case} 0.pt")
    actual = [torch.load(pair / f"{case} {rank}.pt") for rank in (0, 1)]
    for rank in (0, 1):
        for name, tensor in expected["model"].items():
            torch.testing.assert_close(
                actual[rank]["model"][name], tensor, rtol=SAME_IN_FLOAT64, atol=SAME_IN_FLOAT64, msg=name
            )
            assert torch.equal(actual[rank]["model"][name], actual[0]["model"][name])
        for ours, theirs in zip(actual[rank]["losses"], expected["losses"], strict=True):
            for level, right in zip(ours, theirs, strict=True):
                assert level == pytest.approx(right, rel=SAME_IN_FLOAT64)
        for name, tensor in expected["calibration"].items():
            torch.testing.assert_close(
                actual[rank]["calibration"][name], tensor, rtol=SAME_IN_FLOAT64, atol=SAME_IN_FLOAT64
            )
    assert [one["seen"] for one in (expected, *actual)] == [10, 10, 0]  # callbacks are the first process's
    assert sorted(os.listdir(pair / "run")) == sorted([CHECKPOINT, METRICS, MODEL, RUN])
    assert len((pair / "run" / METRICS).read_text().splitlines()) == 10
    saved = HGADModel.load(pair / "run" / MODEL).state_dict()
    assert all(torch.equal(tensor, actual[0]["model"][name].float()) for name, tensor in saved.items())


def test_a_process_that_dies_ends_the_other_with_a_message(tmp_path):
    """Killed in the sixth pass; both go on from the checkpoint afterwards."""
    running = start(tmp_path, "killed", 2)
    first, second = outcomes(running)
    assert second[0] == -signal.SIGKILL
    message = "LostProcessError: one of the 2 processes of this training ended, or did not answer for 45 s"
    assert first[0] == 1 and first[1].startswith(message)
    assert outcomes(start(tmp_path, "resumed", 2)) == [(0, "")] * 2
    seen = [torch.load(tmp_path / f"resumed {rank}.pt")["seen"] for rank in (0, 1)]
    assert seen == [6, 0]  # two meta-epochs of five were kept
    passes = [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    assert [(p["meta_epoch"], p["sub_epoch"]) for p in passes] == [divmod(i, 2) for i in range(10)]


def test_what_processes_cannot_share():
    """Told by the process concerned before anything is trained; here it is the second of two, without the first."""

    class Second(Processes):
        def from_first(self, identity):
            return identity | {"data": "other"}

    model = HGADModel(HGADConfig(backbone_arch=None, feature_levels=1, feature_dims=(4,), n_classes=1, batch_size=1))
    data = FeatureSet.from_levels([torch.randn(3, 4, 2, 2)], [0, 0, 0])
    options = data, None, (), display.Display(False), Step(model, Second(rank=1, count=2))
    with pytest.raises(ValueError, match="2 processes share batches of 1 images, and some get none; start fewer, or"):
        fit._Run(model, *options)
    model.config = model.config.replace(batch_size=2)
    with pytest.raises(ValueError, match="process 1 has other data, settings or backbone weights than process 0"):
        fit._Run(model, *options)


@pytest.mark.parametrize("callers_group", [False, True])
def test_the_device_of_the_model_is_current_before_nccl_starts(monkeypatch, cuda, callers_group):
    calls = {"init_process_group": None, "new_group": "patient", "destroy_process_group": None}
    calls |= {"get_rank": 1, "get_world_size": 2}
    for name, result in calls.items():

        def call(*args, name=name, result=result, **kwargs):
            cuda.note(name, *args)
            return result

        monkeypatch.setattr(torch.distributed, name, call)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: callers_group)
    if not callers_group:
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
    with joined(torch.device("cuda:1")) as processes:
        assert (processes.rank, processes.count, processes.patient) == (1, 2, "patient")
    asked = [call for call in cuda.calls if call[0] in ("set_device", "init_process_group", "new_group")]
    started = [] if callers_group else [("init_process_group", "nccl")]
    assert asked == [("set_device", "cuda:1"), *started, ("new_group",)]


def test_a_process_alone_leaves_the_current_device(cuda, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with joined(torch.device("cuda:1")) as processes:
        assert processes.count == 1
    with joined(torch.device("cpu")):
        assert cuda.calls == []


def test_torchrun_and_the_command_line(tmp_path):
    generator = np.random.default_rng(0)
    for name in ("ash", "oak"):
        folder = tmp_path / "woods" / name
        folder.mkdir(parents=True)
        for i in range(4):
            Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    settings = ["feature_levels=1", "out_indices=[2]", "coupling_layers=1", "pos_embed_dim=8", "img_size=32"]
    settings += ["meta_epochs=1", "sub_epochs=1", "batch_size=4", "msk_size=16", "calibration_fraction=0"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "hgad_fast"]
    command += ["train", str(tmp_path / "woods"), "-o", str(tmp_path / "run"), "--backbone", "test_efficientnet"]
    command += ["--weights", "random", "--device", "cpu", *(word for text in settings for word in ("--set", text))]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if "model" in line and "next" not in line] == [
        f"model: {tmp_path / 'run' / MODEL}"
    ]
    assert sorted(os.listdir(tmp_path / "run")) == sorted([CHECKPOINT, METRICS, MODEL, RUN])
