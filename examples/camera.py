"""Score the frames of a camera, a video file or a stream: `python camera.py model.safetensors SOURCE [options]`.

SOURCE is the number of a camera (0), a video file, or the address of a stream (rtsp://...). One thread grabs frames,
another one scores them, in their order. Of a camera or stream the newest frame is scored, and those that came meanwhile
are dropped and counted; of a file every frame is scored, unless --drop plays it at its own pace as if it were a camera.
At the end, on Ctrl-C, and when the camera is lost, counts and times are printed. The exit code is 0 only if every frame
that was taken has a score. Needs OpenCV, and for overlays matplotlib: pip install 'hgad-fast[camera,plot]'
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import math
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hgad_fast import Monitor, Scorer
from hgad_fast.options import given_class, image_size, in_options, load_model
from hgad_fast.scoring.outputs import VERDICT, cell
from hgad_fast.scoring.pipeline import caption
from hgad_fast.scoring.plot import overlay
from hgad_fast.scoring.scorer import FrameScore
from hgad_fast.terminal import escape_unprintable, heartbeat, printable, say, warn_user

try:
    import cv2
except ModuleNotFoundError:
    sys.exit("camera.py needs OpenCV: pip install 'hgad-fast[camera]'")

PLACES = 2  # frames of a file that wait to be scored
BACKLOG = 4  # overlays that wait to be drawn
RETRY_EVERY = 1.0  # seconds between two attempts to open a lost camera
WAIT = 0.5  # seconds after which a thread that waits looks again whether it should end
TABLE, OVERLAYS = "frames.csv", "overlays"
COLUMNS = ("frame", "seconds", *VERDICT[1:], "latency_ms", "scoring_ms", "error")  # for the file, the frame
WINDOW = "hgad_fast"


class Frame(NamedTuple):
    """A grabbed frame.

    Attributes:
        number: its number in the source, from 0.
        seconds: when it was taken: in a file its time in the video, else that since the first frame.
        pixels: (H, W, 3) uint8, red first, or grey (H, W).
        grabbed: the time of `time.perf_counter` at which it was there.
    """

    number: int
    seconds: float
    pixels: np.ndarray
    grabbed: float


@dataclass(frozen=True)
class Outcome:
    """What is known of a frame after it was scored.

    Attributes:
        frame: the frame.
        verdict: its score; None: it has none, for the reason in `error`, and is not called normal.
        error: why there is no score.
        latency: seconds from the grabbed frame to its verdict, in which it may have waited for its turn.
        scoring: seconds of these that the scorer took.
    """

    frame: Frame
    verdict: FrameScore | None
    error: str
    latency: float
    scoring: float

    def figures(self) -> dict[str, Any]:
        """Return the figures by their `COLUMNS`."""
        return {
            "frame": self.frame.number,
            "seconds": round(self.frame.seconds, 4),
            **({} if self.verdict is None else self.verdict.figures()),
            "latency_ms": round(1e3 * self.latency, 3),
            "scoring_ms": round(1e3 * self.scoring, 3),
            "error": printable(self.error),
        }

    @property
    def is_alarm(self) -> bool:
        """True if the frame is anomalous, or has no score."""
        return self.verdict is None or self.verdict.is_anomalous


Sink = Callable[[Outcome], None]
"""What is done with each outcome, in the order of the frames."""


# ---------------------------------------------------------------------------------------------- frames


class Source:
    """A camera, a video file or a stream.

    Args:
        name: the number of a camera, a file, a device, or an address with "://".

    Raises:
        ValueError: there is no such source, or OpenCV cannot open it.
    """

    def __init__(self, name: str) -> None:
        path = Path(name)
        self.is_camera = name.isdecimal()
        self.is_file = not self.is_camera and path.is_file()
        self.title = f"camera {name}" if self.is_camera else printable(re.sub(r"//[^/@]*@", "//", name))  # no password
        if not (self.is_camera or self.is_file or "://" in name or path.is_char_device()):
            remedy = "hgad-fast score scores folders of images" if path.is_dir() else "is its name right?"
            raise ValueError(
                f"{self.title}: no such source. Give the number of a camera, a video file, or the address of a stream "
                f"({remedy})"
            )
        self._target: int | str = int(name) if self.is_camera else name
        self.capture: Any = None
        if not self.open():
            remedy = "is it plugged in, free, and allowed to be used?"
            if self.is_file:
                remedy = "is it a whole video file of a format that OpenCV reads?"
            raise ValueError(f"{self.title}: OpenCV cannot open it; {remedy}")

    def open(self) -> bool:
        """Open it, or open it again from its start, and return whether that worked."""
        self.close()
        self.capture = cv2.VideoCapture(self._target)
        if not self.is_file:
            self.capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # old frames are of no use; some cameras ignore it
        return self.capture.isOpened()

    def close(self) -> None:
        """Let others use it."""
        if self.capture is not None:
            self.capture.release()

    def frame_size(self) -> tuple[int, int]:
        """Return height and width of its first frame, which a file gives once more.

        Raises:
            ValueError: there is no frame.
        """
        is_there, pixels = self.capture.read()
        if not is_there:
            raise ValueError(f"{self.title}: it is open, and no frame can be read from it")
        if self.is_file:
            self.open()
        return pixels.shape[0], pixels.shape[1]


class LostCameraError(OSError):
    """A camera or stream gives no more frames."""


class Grabber:
    """A thread that grabs frames; iterating gives them in their order. A bounded number waits.

    Args:
        source: an opened source, which the thread closes in the end.
        every: of how many frames one is taken.
        drop: a frame that comes while another one waits takes its place, and a file is played at its own pace;
            otherwise the thread waits.
        retry: seconds for which a camera that fails is opened again and again.

    Attributes:
        dropped: frames that were taken, and gave way to newer ones.
        interruptions: how often a lost camera came back.
        note: what should be said of the source in the end.
    """

    def __init__(self, source: Source, *, every: int = 1, drop: bool = False, retry: float = 10.0) -> None:
        self.source, self.every, self.drop, self.retry = source, every, drop, retry
        self.dropped = self.interruptions = 0
        self.note = ""
        self._waiting: deque[Frame] = deque()
        self._places = 1 if drop else PLACES
        self._change = threading.Condition()
        self._stop = threading.Event()
        self._has_ended = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="grabber", daemon=True)  # OpenCV may wait for ever

    def __enter__(self) -> Grabber:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def __iter__(self) -> Iterator[Frame]:
        """Yield the frames; raise what has ended them, if it is an error."""
        while True:
            with self._change:
                while not self._waiting and not self._has_ended:
                    self._change.wait(WAIT)
                if not self._waiting:
                    break
                frame = self._waiting.popleft()
                self._change.notify()
            yield frame
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            for frame in self._frames():
                self._hand_over(frame)
        except Exception as error:
            self._error = error
        finally:
            self.source.close()
            with self._change:
                self._has_ended = True
                self._change.notify()

    def _hand_over(self, frame: Frame) -> None:
        with self._change:
            while len(self._waiting) == self._places:
                if self.drop:
                    self._waiting.popleft()
                    self.dropped += 1
                elif self._stop.is_set():
                    return
                else:
                    self._change.wait(WAIT)
            self._waiting.append(frame)
            self._change.notify()

    def _frames(self) -> Iterator[Frame]:
        """Grab frames until the file ends, the camera is lost, or the thread is to stop."""
        source, number = self.source, 0
        start = last = time.perf_counter()
        was_lost = False
        while not self._stop.is_set():
            is_taken = number % self.every == 0
            is_there, pixels = source.capture.read() if is_taken else (source.capture.grab(), None)
            now = time.perf_counter()
            if not is_there:
                if source.is_file:
                    promised = int(source.capture.get(cv2.CAP_PROP_FRAME_COUNT))
                    if number < promised:
                        self.note = (
                            f"{source.title}: it ends after {number} of the {promised} frames that it promises: it is "
                            "damaged, or the number is an estimate"
                        )
                    return
                if now - last > self.retry:
                    raise LostCameraError(f"{source.title}: lost, and not back within {self.retry:g} s")
                was_lost = True
                if not self._stop.wait(RETRY_EVERY):
                    source.open()
                continue
            self.interruptions += was_lost
            was_lost = False
            if number == 0:
                start = now
            last, seconds = now, now - start
            if source.is_file:
                seconds = source.capture.get(cv2.CAP_PROP_POS_MSEC) / 1e3
                if self.drop and seconds > now - start:
                    self._stop.wait(seconds - (now - start))
                    now = time.perf_counter()
            if is_taken:
                if pixels.ndim == 3:
                    pixels = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
                yield Frame(number, seconds, pixels, now)
            number += 1


# ---------------------------------------------------------------------------------------------- what comes out


class Times:
    """Quantiles of any number of times, to 1%, in bounded memory: counts in classes of 1%."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, seconds: float) -> None:
        self._counts[round(math.log(max(seconds, 1e-6), 1.01))] += 1

    def quantile(self, share: float) -> float:
        """Return the time, in seconds, that this share of all times does not exceed; NaN where there are none."""
        rank = math.ceil(share * self._counts.total())
        for exponent in sorted(self._counts):
            rank -= self._counts[exponent]
            if rank <= 0:
                return 1.01**exponent
        return math.nan


@dataclass
class Tally:
    """The counts of a run."""

    frames: int = 0
    alarms: int = 0
    without_verdict: int = 0
    without_score: int = 0
    latency: Times = field(default_factory=Times)
    scoring: Times = field(default_factory=Times)

    def __call__(self, outcome: Outcome) -> None:
        """Count a frame."""
        self.frames += 1
        self.latency.add(outcome.latency)
        self.scoring.add(outcome.scoring)
        if outcome.verdict is None:
            self.without_score += 1
        elif outcome.figures()["anomalous"] is None:
            self.without_verdict += 1
        else:
            self.alarms += outcome.verdict.is_anomalous

    def line(self, grabber: Grabber) -> str:
        """Return the counts in words."""
        counts = [f"{self.frames} frames", f"{grabber.dropped} dropped", f"{self.alarms} alarms"]
        counts += [f"{self.without_verdict} without a verdict"] if self.without_verdict else []
        counts += [f"{self.without_score} WITHOUT A SCORE"] if self.without_score else []
        counts += [f"{grabber.interruptions} interruptions"] if grabber.interruptions else []
        times = [
            f"{name} p50 {1e3 * times.quantile(0.5):.1f} ms, p95 {1e3 * times.quantile(0.95):.1f} ms"
            for name, times in (("latency", self.latency), ("of which scoring", self.scoring))
            if self.frames
        ]
        return "; ".join([", ".join(counts), *times])


@contextmanager
def table(folder: Path) -> Iterator[Sink]:
    """Yield a sink that writes frames.csv in a folder: the line of a frame is in the file as soon as it is scored."""
    with open(folder / TABLE, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)

        def write(outcome: Outcome) -> None:
            figures = outcome.figures()
            writer.writerow([cell(column, figures.get(column)) for column in COLUMNS])
            file.flush()

        yield write


class Overlays:
    """Draws overlays/frame-<number>.png of anomalous frames (or of all), in a thread of its own.

    `BACKLOG` of them may wait. With `leave_out` those beyond are left out, so that the newest frame need not wait;
    otherwise scoring waits. So are those beyond `most`, as a disk is not endless either.

    Attributes:
        left_out: how many.
    """

    def __init__(self, folder: Path, every_frame: bool, leave_out: bool, most: int) -> None:
        self.folder, self.every_frame, self.leave_out, self.most = folder, every_frame, leave_out, most
        self.left_out = self._count = 0
        self._waiting: deque[Future[Any]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="overlays")

    def __enter__(self) -> Overlays:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        while self._waiting:
            self._waiting.popleft().result()

    def __call__(self, outcome: Outcome) -> None:
        """Draw a frame, if it is one to be drawn."""
        if outcome.verdict is None or not (self.every_frame or outcome.is_alarm):
            return
        while self._waiting and (self._waiting[0].done() or len(self._waiting) == BACKLOG and not self.leave_out):
            self._waiting.popleft().result()
        if self._count == self.most or len(self._waiting) == BACKLOG:
            self.left_out += 1
            return
        self._count += 1
        self._waiting.append(self._pool.submit(self._draw, outcome.frame, outcome.verdict))

    def _draw(self, frame: Frame, verdict: FrameScore) -> None:
        image = np.moveaxis(frame.pixels, -1, 0) if frame.pixels.ndim == 3 else frame.pixels
        overlay(
            image / np.float32(255),
            verdict.anomaly_map.numpy(),
            verdict.threshold,
            path=self.folder / OVERLAYS / f"frame-{frame.number:08}.png",
            title=caption(verdict.figures()),
            note=f"frame {frame.number}, {frame.seconds:.2f} s",
        )


class Window:
    """Shows each frame, with its verdict and lines around what is above the threshold; the key q ends the loop.

    Raises:
        ValueError: this OpenCV has no windows, or there is no display.
    """

    def __init__(self) -> None:
        remedy = "leave out --window, and give --output FOLDER"
        if re.search(r"GUI:\s+NONE", cv2.getBuildInformation()):
            raise ValueError(
                "--window: this OpenCV is built without windows (opencv-python-headless); put opencv-python in its "
                f"place, or {remedy}"
            )
        if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            raise ValueError(f"--window: there is no display; {remedy}")  # some builds would abort the process
        cv2.namedWindow(WINDOW, cv2.WINDOW_NORMAL)

    def __call__(self, outcome: Outcome) -> None:
        """Show a frame."""
        cv2.imshow(WINDOW, drawn(outcome))
        if cv2.waitKey(1) & 0xFF == ord("q") or cv2.getWindowProperty(WINDOW, cv2.WND_PROP_VISIBLE) < 1:
            raise KeyboardInterrupt


def drawn(outcome: Outcome) -> np.ndarray:
    """Return a frame (H, W, 3) uint8 as OpenCV shows it, blue first, with its verdict and what is found."""
    pixels, verdict = outcome.frame.pixels, outcome.verdict
    shown = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR if pixels.ndim == 3 else cv2.COLOR_GRAY2BGR)
    colour = (0, 0, 255) if outcome.is_alarm else (0, 160, 0)
    if verdict is not None and verdict.is_anomalous:
        found = (verdict.anomaly_map.numpy() >= verdict.threshold).astype(np.uint8)
        outlines, _ = cv2.findContours(found, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(shown, outlines, -1, colour, 2)
    text = "no score" if verdict is None else caption(verdict.figures())
    text = text.encode("ascii", "replace").decode()  # OpenCV's letters are no others
    cv2.putText(shown, text, (8, 24), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (255, 255, 255), 4, cv2.LINE_AA)
    cv2.putText(shown, text, (8, 24), cv2.FONT_HERSHEY_SIMPLEX, 0.6, colour, 1, cv2.LINE_AA)
    return shown


def say_alarm(outcome: Outcome) -> None:
    """Print a line about a frame that is anomalous, or has no score."""
    if outcome.is_alarm:
        text = f"NO SCORE: {outcome.error}" if outcome.verdict is None else caption(outcome.verdict.figures())
        say(f"frame {outcome.frame.number}, {outcome.frame.seconds:.2f} s: {text}", sys.stdout)


class Drift:
    """Prints a line once frames are no longer like the images that the model was calibrated on."""

    def __init__(self, model: Any) -> None:
        self.monitor = Monitor.of(model)

    def __call__(self, outcome: Outcome) -> None:
        """Take the p-value of a frame; those without one tell nothing."""
        verdict = outcome.verdict
        if verdict is None or math.isnan(verdict.p_value) or self.monitor.state.changed:
            return
        state = self.monitor.update(verdict.p_value, verdict.class_name)
        if state.changed:
            count, whose = state.images - state.since, "" if state.group is None else f" of {printable(state.group)}"
            say(
                f"frame {outcome.frame.number}, {outcome.frame.seconds:.2f} s: CHANGED: in the last {count} scored "
                f"frames, about, scores{whose} are {state.direction}",
                sys.stdout,
            )


# ---------------------------------------------------------------------------------------------- the loop


def score_all(scorer: Scorer, frames: Iterable[Frame], sinks: Sequence[Sink]) -> None:
    """Score frame after frame, and hand each outcome to all sinks."""
    for frame in frames:
        verdict, error = None, ""
        start = time.perf_counter()
        try:
            verdict = scorer(frame.pixels)
        except (ValueError, torch.OutOfMemoryError) as problem:  # a score that is no number, or a frame of another size
            error = str(problem)
        end = time.perf_counter()
        outcome = Outcome(frame, verdict, error, end - frame.grabbed, end - start)
        for sink in sinks:
            sink(outcome)


def main(arguments: Sequence[str] | None = None, sinks: Sequence[Sink] = ()) -> int:
    """Run the program with further sinks, and return its exit code."""
    options = parsed(arguments)
    source = Source(options.source)
    frame_size = source.frame_size()
    windows = [Window()] if options.window else []
    say(f"loading {printable(options.model)}")
    model = load_model(options.model, options.device, options.false_alarm_rate)
    scorer = Scorer(
        model,
        class_id=given_class(options.class_name, model.groups),
        frame_size=frame_size,
        img_size=image_size(options.img_size),
    )
    if options.output is not None:
        prepare(options.output, options.overwrite)
    drop = options.drop or not source.is_file
    grabber = Grabber(source, every=options.every, drop=drop, retry=options.retry)
    tally, code, overlays = Tally(), 0, None
    try:
        with ExitStack() as stack:
            all_sinks: list[Sink] = [tally, say_alarm, *sinks]
            if options.monitor:
                all_sinks.append(Drift(model))
            if options.output is not None:
                all_sinks.append(stack.enter_context(table(options.output)))
                if importlib.util.find_spec("matplotlib") is None:
                    warn_user("overlays are left out, as they need matplotlib: pip install 'hgad-fast[plot]'")
                else:
                    overlays = Overlays(options.output, options.all, drop, options.max_overlays)
                    all_sinks.append(stack.enter_context(overlays))
            all_sinks += windows  # the last, as its key ends the loop
            with grabber, heartbeat(lambda: tally.line(grabber)):
                score_all(scorer, grabber, all_sinks)
    except KeyboardInterrupt:
        code = 130 if source.is_file else 0  # a file is not finished; a camera has no other end
    except LostCameraError as error:
        say(f"camera.py: {error}")
        code = 1
    finally:
        left_out = f"{overlays.left_out} overlays left out" if overlays and overlays.left_out else ""
        for note in filter(None, (grabber.note, left_out)):
            say(note)
        say(tally.line(grabber), sys.stdout)
    return code or int(tally.without_score > 0 or not tally.frames)


def prepare(folder: Path, overwrite: bool) -> None:
    """Make the output folder, and remove what an earlier run wrote into it, if it may be.

    Raises:
        ValueError: it holds a run, or overlays alone, and it is not said that they may be replaced.
    """
    for file in (folder / TABLE, *(folder / OVERLAYS).glob("frame-*.png")):
        if file.exists() and not overwrite:
            raise ValueError(f"{printable(file)} is of an earlier run; give --overwrite, or another --output")
        file.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        prog="camera.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model file (model.safetensors)")
    parser.add_argument("source", metavar="SOURCE", help="number of a camera, video file, or address of a stream")
    parser.add_argument("--class", dest="class_name", metavar="NAME", help="what the camera shows; default: inferred")
    parser.add_argument("--false-alarm-rate", type=float, metavar="RATE", help="judge at another rate than the model's")
    parser.add_argument("--img-size", metavar="[native|N]", help="short side at which frames are seen")
    parser.add_argument("--device", help="cpu, cuda, ...; default: cuda where there is a GPU")
    parser.add_argument("--every", type=_count, default=1, metavar="N", help="take one of N frames (default: 1)")
    parser.add_argument("--drop", action="store_true", help="play a file at its own pace, and drop frames")
    parser.add_argument("--retry", type=_seconds, default=10.0, metavar="S", help="wait for a lost camera (10 s)")
    parser.add_argument("--output", "-o", type=Path, metavar="FOLDER", help=f"write {TABLE} and overlays here")
    parser.add_argument("--all", action="store_true", help="overlays of all frames, not only of anomalous ones")
    parser.add_argument("--max-overlays", type=_count, default=10_000, metavar="N", help="no more than these (10000)")
    parser.add_argument("--overwrite", action="store_true", help="replace a run in FOLDER")
    parser.add_argument("--monitor", action="store_true", help="say if frames change; each must show another part")
    parser.add_argument("--window", action="store_true", help="show frames and verdicts; the key q ends it")
    return parser.parse_args(arguments)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def _seconds(text: str) -> float:
    if not text.replace(".", "", 1).isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return float(text)


if __name__ == "__main__":
    escape_unprintable()
    warnings.showwarning = lambda message, *_: say(f"camera.py: {in_options(str(message))}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a service is told to stop in this way
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"camera.py: {in_options(str(error))}")
