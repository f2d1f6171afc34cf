"""The camera loop on video files, and on cameras that give what a test says."""

from __future__ import annotations

import csv
import os
import re
import runpy
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import small_detectors
from example_modules import FOLDER, example
from PIL import Image

from hgad_fast import GaussianModel, Scorer
from hgad_fast.scoring import plot

camera = example("camera")

SIZE = (64, 80)  # height and width of a frame
FRAMES = 12


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    small_detectors.gaussian(size=SIZE).save(path)
    return path


@pytest.fixture
def model(model_file: Path) -> GaussianModel:
    return GaussianModel.load(model_file)


def drawn_frames(count: int = FRAMES) -> list[np.ndarray]:
    """Return frames (H, W, 3) uint8 as OpenCV has them, blue first; a part of them is defective."""
    frames = []
    for i, image in enumerate(small_detectors.images_of_classes(count, seed=5, size=SIZE)):
        if i % 4 == 1:
            image[:, 20:40, 20:40] = image.new_tensor([1.0, 0.0, 0.0])[:, None, None]
        frames.append(np.ascontiguousarray((255 * image).round().byte().permute(1, 2, 0).numpy()[..., ::-1]))
    return frames


def write_video(path: Path, frames: list[np.ndarray], rate: float = 25) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), rate, SIZE[::-1])
    for frame in frames:
        writer.write(frame)
    writer.release()
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "line ä.avi", drawn_frames())


def decoded(path: Path) -> list[np.ndarray]:
    """Return the frames of a video, red first."""
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (pair := capture.read())[0]:
        frames.append(cv2.cvtColor(pair[1], cv2.COLOR_BGR2RGB))
    return frames


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "frames.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Camera:
    """OpenCV's capture of a live camera: each opening gives frames in turns, and then fails or waits for an event."""

    def __init__(self, *openings: list[np.ndarray], until: threading.Event | None = None) -> None:
        self.openings, self.until = list(openings), until
        self.frames: Iterator[np.ndarray] = iter(())
        self.has_given_all = threading.Event()
        self.is_gone = False
        self.released = 0

    def __call__(self, target: int | str) -> Camera:
        self.is_gone = not self.openings
        self.frames = iter([] if self.is_gone else self.openings.pop(0))
        return self

    def isOpened(self) -> bool:
        return True

    def read(self) -> tuple[bool, np.ndarray | None]:
        frame = next(self.frames, None)
        if frame is None:
            self.has_given_all.set()
            if self.until is not None:
                self.until.wait(60)
        return frame is not None, frame

    def grab(self) -> bool:
        return self.read()[0]

    def get(self, _: int) -> float:
        return 0.0

    def set(self, *_: float) -> bool:
        return False

    def release(self) -> None:
        self.released += 1


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Camera]:
    """Return a function that puts a live camera in the place of OpenCV's."""
    monkeypatch.setattr(camera, "RETRY_EVERY", 0.01)

    def plugged(*openings: list[np.ndarray], until: threading.Event | None = None) -> Camera:
        capture = Camera(*openings, until=until)
        monkeypatch.setattr(cv2, "VideoCapture", capture)
        return capture

    return plugged


# ---------------------------------------------------------------------------------------------- files


def test_every_frame_of_a_file_is_scored_in_order_as_the_model_scores_it(
    model_file: Path, model: GaussianModel, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert camera.main([str(model_file), str(video), "--output", str(tmp_path / "out")]) == 0
    rows = table(tmp_path / "out")
    assert [int(row["frame"]) for row in rows] == list(range(FRAMES))
    assert [float(row["seconds"]) for row in rows] == pytest.approx([i / 25 for i in range(FRAMES)])
    anomalous = []
    for row, frame in zip(rows, decoded(video), strict=True):
        expected = model.score(frame)
        assert float(row["score"]) == float(expected.image_score)
        assert row["class"] == model.groups[int(expected.class_id)] and row["error"] == ""
        assert row["anomalous"] == str(bool(expected.is_anomalous))
        assert float(row["latency_ms"]) >= float(row["scoring_ms"]) > 0
        anomalous += [int(row["frame"])] * bool(expected.is_anomalous)
    assert 0 < len(anomalous) < FRAMES
    overlays = sorted((tmp_path / "out" / "overlays").iterdir())
    assert [int(re.findall(r"\d+", file.name)[0]) for file in overlays] == anomalous
    with Image.open(overlays[0]) as image:
        image.load()
    printed = capsys.readouterr().out
    assert [int(n) for n in re.findall(r"^frame (\d+), .*ANOMALOUS", printed, re.MULTILINE)] == anomalous
    assert f"{FRAMES} frames, 0 dropped, {len(anomalous)} alarms; latency p50" in printed


def test_options_of_a_file(model_file: Path, model: GaussianModel, video: Path, tmp_path: Path) -> None:
    name, out = model.groups[1], ["--output", str(tmp_path)]
    assert camera.main([str(model_file), str(video), "--every", "3", "--class", name, "--all", *out]) == 0
    rows = table(tmp_path)
    assert [int(row["frame"]) for row in rows] == [0, 3, 6, 9] and {row["class"] for row in rows} == {name}
    earlier = sorted(tmp_path.rglob("*.*"))
    assert len(list((tmp_path / "overlays").iterdir())) == 4
    with pytest.raises(ValueError, match="frames.csv is of an earlier run; give --overwrite"):
        camera.main([str(model_file), str(video), *out])
    for wrong in (["--class", "zebra"], ["--img-size", "large"], ["--device", "abacus"]):
        with pytest.raises(ValueError, match=wrong[1]):
            camera.main([str(model_file), str(video), "--overwrite", *wrong, *out])
    assert sorted(tmp_path.rglob("*.*")) == earlier
    (tmp_path / "frames.csv").unlink()
    with pytest.raises(ValueError, match="frame-00000000.png is of an earlier run; give --overwrite"):
        camera.main([str(model_file), str(video), *out])
    assert len(list((tmp_path / "overlays").iterdir())) == 4
    more = ["--overwrite", "--all", "--max-overlays", "1", "--false-alarm-rate", "0.5"]
    assert camera.main([str(model_file), str(video), *more, *out]) == 0
    assert len(table(tmp_path)) == FRAMES and len(list((tmp_path / "overlays").iterdir())) == 1
    judged = [float(row["p_value"]) <= 0.5 for row in table(tmp_path)]
    assert [row["anomalous"] == "True" for row in table(tmp_path)] == judged


def test_a_file_at_its_own_pace_drops_frames_and_counts_them(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first frame is held until the grabber has grabbed the last one."""
    path = write_video(tmp_path / "fast.avi", drawn_frames(), rate=1000)

    def hold(outcome: Any) -> None:
        for thread in threading.enumerate():
            if thread.name == "grabber":
                thread.join(60)

    assert camera.main([str(model_file), str(path), "--drop", "--output", str(tmp_path)], [hold]) == 0
    numbers = [int(row["frame"]) for row in table(tmp_path)]
    assert numbers in ([numbers[0], FRAMES - 1], [FRAMES - 1])
    assert f"{len(numbers)} frames, {FRAMES - len(numbers)} dropped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.avi", "no such source"),
        (".", "hgad-fast score scores folders"),
        ("text.avi", "whole video file"),
        ("empty.avi", "whole video file"),
    ],
)
def test_bad_sources_are_named(
    source: str, message: str, model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.avi").write_text("no video")
    (tmp_path / "empty.avi").touch()
    with pytest.raises(ValueError, match=message):
        camera.main([str(model_file), source])


def test_the_program_ends_with_a_message_and_exit_code_1(
    model_file: Path, video: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["camera.py", str(model_file), str(video), "--class", "zebra"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(FOLDER / "camera.py"), run_name="__main__")
    assert str(end.value.code).startswith("camera.py: class 'zebra' is unknown")  # a text, so the exit code is 1
    assert "Traceback" not in capsys.readouterr().err


def test_a_video_without_frames(model_file: Path, live: Callable[..., Camera]) -> None:
    live([])
    with pytest.raises(ValueError, match="camera 0: it is open, and no frame"):
        camera.main([str(model_file), "0"])


def test_a_file_that_ends_early_is_told(model_file: Path, video: Path, tmp_path: Path, capsys: Any) -> None:
    content = bytearray(video.read_bytes())
    length = content.index(b"strh") + 8 + 32  # of the stream in frames, in its AVISTREAMHEADER
    assert content[length : length + 4] == struct.pack("<I", FRAMES)
    content[length : length + 4] = struct.pack("<I", FRAMES + 8)
    (tmp_path / "cut.avi").write_bytes(content)
    assert camera.main([str(model_file), str(tmp_path / "cut.avi"), "--output", str(tmp_path / "out")]) == 0
    assert len(table(tmp_path / "out")) == FRAMES
    assert f"cut.avi: it ends after {FRAMES} of the {FRAMES + 8} frames that it promises" in capsys.readouterr().err
    assert camera.main([str(model_file), str(video)]) == 0
    assert "promises" not in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- live cameras


def test_of_a_camera_the_newest_frame_is_taken(live: Callable[..., Camera]) -> None:
    until = threading.Event()
    capture = live(drawn_frames(), until=until)
    grabber = camera.Grabber(camera.Source("0"), drop=True, retry=0)
    with grabber:
        assert capture.has_given_all.wait(60)
        frames = iter(grabber)
        frame = next(frames)
        assert frame.number == FRAMES - 1 and grabber.dropped == FRAMES - 1
        assert np.array_equal(frame.pixels, drawn_frames()[-1][..., ::-1])  # red first
        until.set()
        with pytest.raises(camera.LostCameraError, match="camera 0: lost"):
            next(frames)
    assert capture.released


def test_of_a_file_no_frame_is_dropped_and_few_wait(video: Path) -> None:
    grabber = camera.Grabber(camera.Source(str(video)))
    with grabber:
        seen = []
        for frame in grabber:
            assert len(grabber._waiting) <= camera.PLACES
            seen.append(frame.number)
    assert seen == list(range(FRAMES)) and grabber.dropped == 0


def test_a_loop_that_ends_early_ends_the_grabber(video: Path) -> None:
    with camera.Grabber(camera.Source(str(video))) as grabber:
        next(iter(grabber))
    grabber._thread.join(60)
    assert not grabber._thread.is_alive()


def test_a_lost_camera_is_opened_again_and_one_that_stays_lost_ends_the_loop(
    model_file: Path,
    live: Callable[..., Camera],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    frames = drawn_frames()
    capture = live(frames[:3], [], frames[3:5])
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + 1000 * capture.is_gone)
    monkeypatch.setattr(camera, "time", clock)
    code = camera.main([str(model_file), "0", "--retry", "600", "--output", str(tmp_path)])
    printed = capsys.readouterr()
    assert code == 1 and "camera 0: lost, and not back within 600 s" in printed.err
    numbers = [int(row["frame"]) for row in table(tmp_path)]
    assert numbers == sorted(set(numbers)) and numbers[-1] == 3  # the first frame of all gave its size alone
    dropped = int(re.findall(r"(\d+) dropped", printed.out)[0])
    assert len(numbers) + dropped == 4 and "1 interruptions" in printed.out


def test_a_frame_without_a_score_is_never_normal(
    model_file: Path, model: GaussianModel, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(camera, "load_model", lambda *_: model)

    def break_it(outcome: Any) -> None:
        if outcome.frame.number == 2:
            monkeypatch.setattr(model, "densities", small_detectors.broken(model.densities))

    assert camera.main([str(model_file), str(video), "--output", str(tmp_path)], [break_it]) == 1
    rows = table(tmp_path)
    assert len(rows) == FRAMES
    assert all(row["error"] == "" for row in rows[:3])
    for row in rows[3:]:
        assert "has no score" in row["error"] and row["anomalous"] == row["score"] == row["p_value"] == ""
    printed = capsys.readouterr().out
    assert f"{FRAMES - 3} WITHOUT A SCORE" in printed and printed.count("NO SCORE") == FRAMES - 3


def test_a_model_without_thresholds_gives_no_verdict(
    model_file: Path, model: GaussianModel, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    calibration = model.calibration
    calibration.scores, calibration.class_ids = calibration.scores[:0], calibration.class_ids[:0]
    monkeypatch.setattr(camera, "load_model", lambda *_: model)
    with pytest.warns(UserWarning, match="no threshold"):
        assert camera.main([str(model_file), str(video), "--output", str(tmp_path)]) == 0
    assert {row["anomalous"] for row in table(tmp_path)} == {""}
    assert f"0 alarms, {FRAMES} without a verdict" in capsys.readouterr().out


@pytest.mark.parametrize(("kind", "expected"), [("file", 130), ("camera", 0)])
def test_ctrl_c_ends_the_loop_with_its_figures(
    kind: str, expected: int, model_file: Path, video: Path, tmp_path: Path, live: Callable[..., Camera], capsys: Any
) -> None:
    if kind == "camera":
        live(drawn_frames())

    def interrupt(outcome: Any) -> None:
        raise KeyboardInterrupt

    source = "0" if kind == "camera" else str(video)
    assert camera.main([str(model_file), source, "--output", str(tmp_path)], [interrupt]) == expected
    assert "1 frames" in capsys.readouterr().out
    assert [thread for thread in threading.enumerate() if thread.name in ("grabber", "heartbeat")] == []


def test_sigterm_ends_the_program_as_ctrl_c_does(model_file: Path, tmp_path: Path) -> None:
    path = write_video(tmp_path / "slow.avi", drawn_frames(4), rate=0.02)  # the second frame comes after 50 s
    command = [sys.executable, str(FOLDER / "camera.py"), str(model_file), str(path), "--drop", "--output"]
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent)}
    out = tmp_path / "out"
    with subprocess.Popen([*command, str(out)], env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            while process.poll() is None and not ((out / "frames.csv").exists() and table(out)):
                threading.Event().wait(0.05)
            process.send_signal(signal.SIGTERM)
            printed, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130 and "1 frames, 0 dropped" in printed
    assert len(table(out)) == 1


# ---------------------------------------------------------------------------------------------- what comes out


def test_overlays_that_wait_are_few(
    model_file: Path, model: GaussianModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a camera, those beyond the backlog are left out."""
    go = threading.Event()
    drawn: list[int] = []

    def draw(self: Any, frame: Any, verdict: Any) -> None:
        go.wait(60)
        drawn.append(frame.number)

    monkeypatch.setattr(camera.Overlays, "_draw", draw)
    verdict = camera.Scorer(model)(drawn_frames(1)[0])
    with camera.Overlays(tmp_path, every_frame=True, leave_out=True, most=100) as overlays:
        for number in range(10):
            frame = camera.Frame(number, 0.0, drawn_frames(1)[0], 0.0)
            overlays(camera.Outcome(frame, verdict, "", 0.0, 0.0))
        assert overlays.left_out == 10 - camera.BACKLOG
        go.set()
    assert drawn == list(range(camera.BACKLOG))


def test_an_overlay_that_cannot_be_written_ends_the_loop(
    model_file: Path, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(camera, "overlay", full)
    with pytest.raises(OSError, match="No space left"):
        camera.main([str(model_file), str(video), "--output", str(tmp_path)])
    assert "frames, 0 dropped" in capsys.readouterr().out


def test_without_matplotlib_there_are_no_overlays(
    model_file: Path, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = camera.importlib.util.find_spec
    monkeypatch.setattr(camera.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.warns(UserWarning, match=r"hgad-fast\[plot\]"):
        assert camera.main([str(model_file), str(video), "--output", str(tmp_path)]) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["frames.csv"]


def test_the_window_shows_what_is_found_until_its_key(
    model_file: Path, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[np.ndarray] = []
    monkeypatch.setattr(cv2, "getBuildInformation", lambda: "  GUI:   QT5")
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "namedWindow", lambda *_: None)
    monkeypatch.setattr(cv2, "imshow", lambda name, image: shown.append(image))
    monkeypatch.setattr(cv2, "waitKey", lambda _: ord("q") if len(shown) == 2 else -1)
    monkeypatch.setattr(cv2, "getWindowProperty", lambda *_: 1.0)
    assert camera.main([str(model_file), str(video), "--window", "--output", str(tmp_path)]) == 130
    assert [row["frame"] for row in table(tmp_path)] == ["0", "1"]  # all that were shown
    assert [file.name for file in (tmp_path / "overlays").iterdir()] == ["frame-00000001.png"]
    normal, anomalous = shown  # by the drawing of the frames
    below = slice(40, None)  # the verdict
    assert np.array_equal(normal[below], decoded(video)[0][below, :, ::-1])  # blue first, as OpenCV shows it
    red = (anomalous[below] == [0, 0, 255]).all(-1)
    assert red.any() and np.array_equal(anomalous[below][~red], decoded(video)[1][below, :, ::-1][~red])


@pytest.mark.parametrize(
    ("build", "display", "message"),
    [("  GUI:   NONE", ":0", "opencv-python-headless"), ("  GUI:  QT5", "", "no display")],
)
def test_where_there_is_no_window_it_is_said_at_once(
    build: str, display: str, message: str, model_file: Path, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cv2, "getBuildInformation", lambda: build)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(ValueError, match=message):
        camera.main([str(model_file), str(video), "--window"])


def test_grey_frames(model: GaussianModel, tmp_path: Path) -> None:
    frame = camera.Frame(7, 0.5, drawn_frames(1)[0][..., 0], 0.0)
    verdict = camera.Scorer(model, false_alarm_rate=0.9)(frame.pixels)
    outcome = camera.Outcome(frame, verdict, "", 0.0, 0.0)
    assert camera.drawn(outcome).shape == (*SIZE, 3)
    with camera.Overlays(tmp_path, every_frame=True, leave_out=False, most=1) as overlays:
        overlays(outcome)
    assert (tmp_path / "overlays" / "frame-00000007.png").is_file()
    assert camera.overlay is plot.overlay


def test_quantiles_of_times() -> None:
    times = camera.Times()
    assert np.isnan(times.quantile(0.5))
    values = np.random.default_rng(0).lognormal(-3, 1, 1000)
    for value in values:
        times.add(float(value))
    for share in (0.05, 0.5, 0.95, 1.0):
        expected = float(np.quantile(values, share, method="inverted_cdf"))
        assert times.quantile(share) == pytest.approx(expected, rel=0.006)  # half a class of 1%


def test_no_password_is_printed(monkeypatch: pytest.MonkeyPatch, live: Callable[..., Camera]) -> None:
    monkeypatch.setattr(Camera, "isOpened", lambda self: False)
    live([])
    with pytest.raises(ValueError, match="rtsp://host/stream: OpenCV cannot open it") as caught:
        camera.Source("rtsp://user:secret@host/stream")
    assert "secret" not in str(caught.value)


def test_a_change_of_the_frames_is_said_once(model: GaussianModel, capsys: pytest.CaptureFixture[str]) -> None:
    """Frames that all have a defect are a change, as many normal ones none; one without a score tells nothing."""
    frames = [np.ascontiguousarray(frame[..., ::-1]) for frame in drawn_frames(160)]
    for defective, expected in ((False, 0), (True, 1)):
        shown = [frame for i, frame in enumerate(frames) if (i % 4 == 1) == defective][:40]
        camera.score_all(
            Scorer(model), [camera.Frame(i, i, frame, 0.0) for i, frame in enumerate(shown)], [camera.Drift(model)]
        )
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == expected and all(
            re.fullmatch(r"frame \d+, .* s: CHANGED: .* scores.* are higher", line) for line in lines
        )
    drift = camera.Drift(model)
    drift(camera.Outcome(camera.Frame(0, 0.0, frames[0], 0.0), None, "no number", 0.0, 0.0))
    assert drift.monitor.state.images == 0


def test_the_monitor_knows_on_how_many_images_p_values_rest(model: GaussianModel) -> None:
    """A class that rests on none is left out, as its frames have no p-values."""
    of_all = camera.Drift(model).monitor.references  # 12 images of 3 classes in turns
    assert {name: of_all[name] for name in model.groups} == dict.fromkeys(model.groups, 4)
    calibration = model.calibration
    others = calibration.class_ids != 0
    calibration.scores, calibration.class_ids = calibration.scores[others], calibration.class_ids[others]
    drift = camera.Drift(model)
    assert model.groups[0] not in drift.monitor.references and drift.monitor.references[model.groups[1]] == 4
    frame = camera.Frame(0, 0.0, drawn_frames(1)[0], 0.0)
    with pytest.warns(UserWarning, match="no threshold"):
        for class_id in range(3):
            camera.score_all(Scorer(model, class_id=class_id), [frame], [drift])
    assert drift.monitor.state.images == 2


def test_the_monitor_is_an_option(model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    defective = write_video(tmp_path / "line.avi", [frame for i, frame in enumerate(drawn_frames(160)) if i % 4 == 1])
    for options, expected in (([], 0), (["--monitor"], 1)):
        assert camera.main([str(model_file), str(defective), *options]) == 0
        assert capsys.readouterr().out.count("CHANGED") == expected
