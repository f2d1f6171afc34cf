"""The server behind a real uvicorn on a loopback port, asked by a real client."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import weakref
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import small_detectors
import torch
import uvicorn
from example_modules import FOLDER, example
from PIL import Image
from waiting import eventually

from hgad_fast import GaussianModel

serve = example("serve")

SIZE = (64, 80)  # height and width of an image


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    small_detectors.gaussian(size=SIZE).save(path)
    return path


@pytest.fixture(scope="module")
def model(model_file: Path) -> GaussianModel:
    return GaussianModel.load(model_file)


@pytest.fixture(scope="module")
def settings(model_file: Path) -> Any:
    return serve.Settings(model_file, threads=torch.get_num_threads(), timeout=60)


@contextmanager
def serving(settings: Any) -> Iterator[httpx.Client]:
    """Run the server in a thread, and yield a client of it."""
    config = uvicorn.Config(serve.create_app(settings), port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            threading.Event().wait(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(60)


@pytest.fixture(scope="module")
def client(settings: Any) -> Iterator[httpx.Client]:
    with serving(settings) as client:
        yield client


def pixels(seed: int = 0, bits: int = 8) -> np.ndarray:
    (image,) = small_detectors.images_of_classes(1, seed, SIZE)
    full = 2**bits - 1
    return (full * image).round().permute(1, 2, 0).numpy().astype(np.uint8 if bits == 8 else np.uint16)


def content(seed: int = 0, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(seed)).save(file, **{"format": "PNG"} | options)
    return file.getvalue()


def assert_answers(answer: dict[str, Any], result: Any, model: GaussianModel) -> None:
    """Check that an answer is what the model gives for the file."""
    expected = {
        "class": model.groups[int(result.class_id)],
        "score": float(result.image_score),
        "threshold": float(result.threshold),
        "p_value": float(result.p_value),
        "anomalous": bool(result.is_anomalous),
        "false_alarm_rate": float(result.false_alarm_rate),
    }
    assert {name: answer[name] for name in expected} == expected
    _, height, width = result.anomaly_map.shape
    assert (answer["height"], answer["width"]) == (height, width)


# ---------------------------------------------------------------------------------------------- answers


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 3
    return exif


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", {}),
        ("a.jpg", {"format": "JPEG", "exif": turned()}),
        ("a.tif", {"format": "TIFF", "compression": "tiff_lzw"}),
        ("a.TGA", {"format": "TGA"}),  # which shows by its name alone what it is
    ],
)
def test_an_answer_is_what_the_model_gives_for_the_file(
    name: str, options: dict[str, Any], client: httpx.Client, model: GaussianModel, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(content(**options))
    answer = client.post("/score", files={"file": (f"../../{name}", file.read_bytes())})
    assert answer.status_code == 200, answer.text
    result = model.score(file)
    assert_answers(answer.json(), result, model)
    if not name.endswith("TGA"):
        assert client.post("/score", content=file.read_bytes()).json() == answer.json()


def test_grey_of_16_bits(client: httpx.Client, model: GaussianModel, tmp_path: Path) -> None:
    Image.fromarray(pixels(bits=16)[..., 0]).save(tmp_path / "grey.png")
    answer = client.post("/score", content=(tmp_path / "grey.png").read_bytes())
    assert_answers(answer.json(), model.score(tmp_path / "grey.png"), model)


@pytest.mark.parametrize("given", ["class 2", "2"])
def test_class_map_and_regions(given: str, client: httpx.Client, model: GaussianModel, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content(3))
    answer = client.post("/score", params={"class": given, "map": "png"}, content=content(3)).json()
    result = model.score(tmp_path / "a.png", 2)
    assert_answers(answer, result, model)
    with Image.open(io.BytesIO(base64.b64decode(answer["map"]))) as image:
        values = np.asarray(image)
    expected = result.anomaly_map[0].numpy()
    assert values.shape == SIZE and values.max() == 65535
    # half a step of 16 bits, and the rounding of float32 in value and scale
    assert np.abs(values * answer["map_scale"] - expected.clip(0)).max() <= answer["map_scale"] * (0.5 + 65535 * 2**-22)
    areas = [region["area"] for region in answer["regions"]]
    assert areas and sum(areas) == int((expected > answer["threshold"]).sum())


def test_model_and_health(client: httpx.Client, model: GaussianModel, model_file: Path) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    answer = client.get("/model")
    assert str(model_file.parent) not in answer.text
    described = answer.json()
    assert [group["name"] for group in described["groups"]] == list(model.groups)
    assert described["groups"][0]["threshold"] == pytest.approx(model.calibration.rates(model.groups)[0]["threshold"])
    assert described["method"] == "gaussian" and described["max_bytes"] == 20_000_000
    body = client.get("/openapi.json").json()["paths"]["/score"]["post"]["requestBody"]["content"]
    assert body.keys() == {"application/octet-stream", "multipart/form-data"}


def test_many_clients_get_their_own_answers(client: httpx.Client) -> None:
    images = [content(seed) for seed in range(6)]
    alone = [client.post("/score", content=image).json() for image in images]
    assert len({answer["score"] for answer in alone}) == len(images)

    def ask(i: int) -> dict[str, Any]:
        with httpx.Client(base_url=client.base_url, timeout=60) as own:
            return own.post("/score", content=images[i % 6]).json()

    with ThreadPoolExecutor(6) as pool:  # no more than there are places
        answers = list(pool.map(ask, range(18)))
    assert answers == [alone[i % 6] for i in range(18)]


# ---------------------------------------------------------------------------------------------- refusals


def bomb() -> bytes:
    """Return a PNG of some hundred bytes whose header claims 60000 x 60000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(60000))), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("request_", "status", "reason"),
    [
        ({"content": b""}, 415, "empty"),
        ({"content": b"no image at all"}, 415, "no image"),
        ({"content": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}, 415, "no image"),
        ({"content": content()[:-500]}, 422, "truncated"),
        ({"content": bomb()}, 422, "pixels"),
        ({"content": content(), "params": {"class": "zebra"}}, 422, "class 'zebra' is unknown"),
        ({"content": content(), "params": {"class": "9" * 5000}}, 422, "9' is unknown"),
        ({"content": content(), "params": {"map": "tiff"}}, 422, "'png'"),
        ({"content": content(), "params": {"klass": "class 1"}}, 422, "parameter 'klass'; allowed are class and map"),
        ({"files": {"other": b"x"}}, 422, "called 'file'"),
        ({"data": {"file": "/etc/passwd"}, "files": {"other": b""}}, 422, "called 'file'"),
        ({"files": [("file", b"x"), ("file", b"y")]}, 400, "Too many files"),
        ({"content": b"xx", "headers": {"content-type": "multipart/form-data"}}, 400, "boundary"),
        ({"content": b"xx", "headers": {"content-type": "multipart/form-data; boundary=b"}}, 400, "multipart"),
    ],
)
def test_what_is_wrong_is_said(request_: dict[str, Any], status: int, reason: str, client: httpx.Client) -> None:
    answer = client.post("/score", **request_)
    assert answer.status_code == status and reason in answer.text
    assert "hgad-fast-" not in answer.text and "Traceback" not in answer.text  # no name of a temporary file
    assert client.post("/score", content=content()).status_code == 200


def test_without_room_for_temporary_files_it_is_said(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those are of an image, and of a large form; what went wrong is for the server's log alone."""
    with serving(settings) as client:
        with monkeypatch.context() as patched:
            patched.setattr(serve.tempfile, "tempdir", str(tmp_path / "missing"))
            for request in ({"content": content()}, {"files": {"file": content() + bytes(2_000_000)}}):
                answer = client.post("/score", **request)
                assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
                assert answer.json() == {"detail": "no temporary file can be written"}
                assert str(tmp_path / "missing") in capsys.readouterr().err
        assert client.post("/score", content=content()).status_code == 200


def test_large_images_are_refused_by_their_header(settings: Any) -> None:
    with serving(replace(settings, max_pixels=SIZE[0] * SIZE[1] - 1)) as client:
        answer = client.post("/score", content=content())
        assert answer.status_code == 422 and "80 x 64 pixels" in answer.text


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("kind", ["raw", "chunked", "form"])
def test_bodies_beyond_the_limit_are_refused(kind: str, settings: Any) -> None:
    """The client hears it even if it sends on; nothing beyond the limit is kept."""
    image = content()

    def send(client: httpx.Client, data: bytes) -> httpx.Response:
        if kind == "form":
            return client.post("/score", files={"file": data})
        parts = (data[i : i + 4096] for i in range(0, len(data), 4096))
        return client.post("/score", content=data if kind == "raw" else parts)

    with serving(replace(settings, max_bytes=len(image) if kind != "form" else len(image) + 1000)) as client:
        assert send(client, image).status_code == 200
        for data in (image + bytes(1001), bytes(3_000_000)):
            answer = send(client, data)
            assert answer.status_code == 413 and "the body has more than" in answer.json()["detail"]
        assert send(client, image).status_code == 200


def test_a_score_that_is_no_number_is_no_verdict(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GaussianModel.load(settings.model)
    monkeypatch.setattr(serve, "load_model", lambda *_: model)
    with serving(settings) as client:
        monkeypatch.setattr(model, "densities", small_detectors.broken(model.densities))
        answer = client.post("/score", content=content())
        assert answer.status_code == 422 and "has no score" in answer.text and "anomalous" not in answer.json()


# ---------------------------------------------------------------------------------------------- limits


class Held:
    """Scoring that waits until it may go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go = threading.Semaphore(0), threading.Event()
        self.count = 0
        real = serve.scored

        def scored(*arguments: Any) -> Any:
            self.count += 1
            self.begun.release()
            assert self.go.wait(60)
            return real(*arguments)

        monkeypatch.setattr(serve, "scored", scored)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Held:
    return Held(monkeypatch)


@pytest.fixture
def out_of_time(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the time of a request be up once an image is being scored that is held: however fast the machine is."""
    in_time = serve.in_time
    of_body: list[float] = []

    async def decided(result: Any, deadline: float, status: int, what: str) -> Any:
        if status == 408:
            of_body.append(deadline)
        elif not held.go.is_set():
            assert deadline == of_body[-1]  # a request has one, from its beginning
            while not held.count:
                await asyncio.sleep(0.01)
            deadline = 0.0
        return await in_time(result, deadline, status, what)

    monkeypatch.setattr(serve, "in_time", decided)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the server read on for a minute: in a second, a slow machine may not send all that nobody wants."""
    monkeypatch.setattr(serve, "DISCARD", 60)


@pytest.mark.usefixtures("patient")
def test_when_all_places_are_taken_others_are_told_to_come_again(settings: Any, held: Held) -> None:
    with serving(replace(settings, places=1)) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, "/score", content=content())
        assert held.begun.acquire(timeout=60)
        with httpx.Client(base_url=client.base_url, timeout=60) as other:
            answer = other.post("/score", content=content())
            assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
            large = other.post("/score", content=bytes(3_000_000))
            assert large.status_code == 503
            assert other.get("/health").status_code == 200
        held.go.set()
        assert first.result(60).status_code == 200
        eventually(lambda: client.post("/score", content=content()).status_code == 200)


@pytest.mark.usefixtures("out_of_time")
def test_after_the_time_limit_work_that_was_begun_goes_on_and_other_work_is_given_up(
    settings: Any, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is given up keeps no image in memory, either, while the other work goes on."""
    bodies: list[weakref.ref[memoryview]] = []
    read = serve.Body.image

    async def image(body: Any) -> tuple[memoryview, str]:
        data, suffix = await read(body)
        view = memoryview(data)  # as bytes have no weak references
        bodies.append(weakref.ref(view))
        return view, suffix

    monkeypatch.setattr(serve.Body, "image", image)
    with serving(replace(settings, places=2)) as client:
        for _ in range(3):  # the second one and the third wait, and are given up
            assert client.post("/score", content=content()).status_code == 504
        assert held.count == 1
        eventually(lambda: [body() is not None for body in bodies] == [True, False, False])
        held.go.set()
        eventually(lambda: client.post("/score", content=content()).status_code == 200)
        assert held.count > 1


@pytest.mark.usefixtures("out_of_time")
def test_work_that_goes_on_keeps_its_place(settings: Any, held: Held) -> None:
    with serving(replace(settings, places=1)) as client:
        assert client.post("/score", content=content()).status_code == 504
        assert held.begun.acquire(timeout=60)
        assert client.post("/score", content=content()).status_code == 503
        held.go.set()
        eventually(lambda: client.post("/score", content=content()).status_code == 200)


def begun_request(client: httpx.Client, announced: int, body: bytes) -> socket.socket:
    """Send the beginning of a request."""
    connection = socket.create_connection((client.base_url.host, client.base_url.port), timeout=60)
    head = f"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: {announced}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def test_a_body_that_does_not_come_is_given_up(settings: Any) -> None:
    with serving(replace(settings, places=1, timeout=1.0)) as client:
        with begun_request(client, 1000, b"x") as connection:
            assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")
        eventually(lambda: client.post("/score", content=b"").status_code != 503)  # its place is free


def test_a_client_that_goes_away_leaves_its_place(settings: Any, caplog: pytest.LogCaptureFixture) -> None:
    with serving(replace(settings, places=1)) as client:
        with begun_request(client, 1000, b"x"):
            eventually(lambda: client.post("/score", content=b"").status_code == 503)
        eventually(lambda: client.post("/score", content=b"").status_code == 415)
    assert "Traceback" not in caplog.text


# ---------------------------------------------------------------------------------------------- the program


def test_settings_pass_through_the_environment(model_file: Path) -> None:
    given = serve.Settings(model_file, max_bytes=5, timeout=0.5, places=3, workers=2, false_alarm_rate=0.1)
    assert serve.Settings.from_environment(given.to_environment()) == given
    assert (
        serve.Settings.from_environment({"HGAD_FAST_MODEL": "m", "HGAD_FAST_MAX_BYTES": "3MB"}).max_bytes == 3_000_000
    )
    for variables, message in (
        ({}, "HGAD_FAST_MODEL is not set"),
        ({"HGAD_FAST_MODEL": "m", "HGAD_FAST_PLACES": "many"}, "HGAD_FAST_PLACES is 'many'"),
        ({"HGAD_FAST_MODEL": "m", "HGAD_FAST_TIMEOUT": "0"}, "timeout is 0.0"),
        ({"HGAD_FAST_MODEL": "m", "HGAD_FAST_THREADS": "-1"}, "threads is -1"),
        ({"HGAD_FAST_MODEL": "m", "HGAD_FAST_FALSE_ALARM_RATE": "2"}, "rate is 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            serve.Settings.from_environment(variables)


def test_workers_are_told_by_the_command_line_alone(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strays = {"device": "cuda", "false_alarm_rate": "0.5", "places": "1", "workers": "7"}
    for field in fields(serve.Settings):  # all of them, so that what the program sets goes when the test ends
        monkeypatch.setenv(serve.PREFIX + field.name.upper(), strays.get(field.name, ""))
    told = []
    monkeypatch.setattr(uvicorn, "run", lambda *_, **__: told.append(serve.Settings.from_environment()))
    monkeypatch.setattr(sys, "argv", ["serve.py", str(model_file), "--workers", "2"])
    serve.main()
    assert told == [serve.Settings(model_file, workers=2)]


def is_up(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", timeout=60).status_code == 200
    except httpx.ConnectError:
        return False


def test_the_program_serves_with_two_workers(model_file: Path, model: GaussianModel, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content())
    options = ["--port", "0", "--workers", "2", "--timeout", "60s", "--false-alarm-rate", "0.5"]
    command = [sys.executable, str(FOLDER / "serve.py"), str(model_file), *options]
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            address = next(found[0] for line in server.stderr if (found := re.search(r"http://127.0.0.1:\d+", line)))
            eventually(lambda: is_up(address))  # the address is there before the workers are
            answer = httpx.post(f"{address}/score", content=content(), timeout=60).json()
            server.send_signal(signal.SIGTERM)
            log = server.communicate(timeout=60)[1]
        finally:
            server.kill()
    assert answer["score"] == pytest.approx(float(model.score(tmp_path / "a.png").image_score), rel=1e-5)
    assert answer["anomalous"] == (answer["p_value"] <= 0.5) and "Traceback" not in log


def test_a_model_that_is_none_is_told_before_there_are_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_text("no model")
    monkeypatch.setattr(sys, "argv", ["serve.py", str(tmp_path / "model.safetensors"), "--workers", "2"])
    with pytest.raises(ValueError, match="model.safetensors"):
        serve.main()
    for option, value in (("--timeout", "soon"), ("--port", "99999"), ("--port", "-1"), ("--threads", "-1")):
        monkeypatch.setattr(sys, "argv", ["serve.py", "model.safetensors", option, value])
        with pytest.raises(ValueError, match=f"{option.strip('-')} is '?{value}"):
            serve.main()
