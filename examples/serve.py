"""A server that scores images: `python serve.py model.safetensors`; one image in, JSON out.

    curl --data-binary @part.png 'http://127.0.0.1:8000/score?class=bottle'
    curl --form file=@part.png 'http://127.0.0.1:8000/score?map=png'

GET /model says which classes there are, GET /health that the server is up. There is no password, so by default only
this machine is served. `uvicorn --app-dir examples --factory serve:app` takes its settings from the environment
(HGAD_FAST_MODEL, ...). Needs: pip install 'hgad-fast[serve]'
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import os
import re
import sys
import tempfile
import threading
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from hgad_fast import Scorer, __version__
from hgad_fast.data.images import ImageError, read_header, read_image
from hgad_fast.files import byte_count, readable
from hgad_fast.methods import describe_file
from hgad_fast.options import given_class, in_options, load_model, require_rate, usable_device
from hgad_fast.scoring.calibration import rate_table
from hgad_fast.scoring.inputs import checked_group_ids
from hgad_fast.scoring.outputs import in_16_bits
from hgad_fast.scoring.result import finite
from hgad_fast.terminal import escape_unprintable, printable, say

try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Query, Request
    from PIL import Image, UnidentifiedImageError
    from starlette.datastructures import UploadFile
except ModuleNotFoundError as error:
    sys.exit(f"serve.py needs {error.name}: pip install 'hgad-fast[serve]'")

DISCARD = 1.0  # seconds for which the rest of a body is read that nobody wants
STARTING = 120  # seconds without a sign of life before a worker is replaced, as one that imports torch gives none
PREFIX = "HGAD_FAST_"  # of the settings in the environment
SUFFIX = re.compile(r"\.[a-z0-9]{1,5}", re.IGNORECASE)  # of a client's file name; TGA and AVIF show by nothing else


@dataclass(frozen=True)
class Settings:
    """What the server is told; in the environment by the same names in capitals, after `PREFIX`.

    Attributes:
        model: path of the model file.
        max_bytes: of a request's body.
        max_pixels: of an image; by its header, before memory is taken for it.
        timeout: seconds for a request, from its first byte to its answer.
        places: requests that are read, wait or are scored at a time; a further one is told to come again.
        threads: of torch in a worker; 0: those that it takes by itself, divided by the workers.
        workers: processes that serve, each with a model of its own.
        false_alarm_rate: another rate than the model's own.
        device: cpu, cuda, ...; None: cuda where there is a GPU.
    """

    model: Path
    max_bytes: int = 20_000_000
    max_pixels: int = 2**25
    timeout: float = 10.0
    places: int = 8
    threads: int = 0
    workers: int = 1
    false_alarm_rate: float | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        require_rate(self.false_alarm_rate)
        for name in ("max_bytes", "max_pixels", "timeout", "places", "workers"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be above 0")
        if self.threads < 0:
            raise ValueError(f"threads is {self.threads}; it must be 0 (those of torch divided by the workers) or more")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Return the settings that the environment holds.

        Raises:
            ValueError: the model is missing, or a setting is no number.
        """
        numbers: dict[str, Callable[[str], Any]] = {"max_bytes": byte_count, "model": Path, "device": str}
        numbers |= dict.fromkeys(("timeout", "false_alarm_rate"), float)
        values = {}
        for name in (field.name for field in fields(cls)):
            if text := environment.get(variable := PREFIX + name.upper()):
                try:
                    values[name] = numbers.get(name, int)(text)
                except ValueError as error:
                    raise ValueError(f"{variable} is {text!r}: {error}") from error
        if "model" not in values:
            raise ValueError(f"{PREFIX}MODEL is not set: the path of the model file")
        return cls(**values)

    def to_environment(self) -> dict[str, str]:
        """Return the variables from which `from_environment` makes the same settings, whatever they were before."""
        return {PREFIX + name.upper(): "" if value is None else str(value) for name, value in asdict(self).items()}


def app() -> FastAPI:
    """Return the server that the environment describes, for `uvicorn --factory`."""
    return create_app(Settings.from_environment())


def create_app(settings: Settings) -> FastAPI:
    """Return the server: its model is loaded, and warm.

    Raises:
        ValueError: the model or a setting cannot be used.
    """
    torch.set_num_threads(settings.threads or max(1, torch.get_num_threads() // settings.workers))
    scorer = Scorer(load_model(settings.model, settings.device, settings.false_alarm_rate))
    pool = ThreadPoolExecutor(1, thread_name_prefix="scorer")  # one image at a time takes all cores already
    places = threading.BoundedSemaphore(settings.places)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        pool.shutdown(wait=False, cancel_futures=True)

    server = FastAPI(title="hgad_fast", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)

    @server.get("/health")
    async def health() -> dict[str, str]:
        """Say that this worker has its model and answers, be it busy or not."""
        return {"status": "ok"}

    @server.get("/model")
    async def model() -> dict[str, Any]:
        """Describe the model: its classes with their thresholds and rates, and the limits of a request."""
        detector: Any = scorer.model
        return {
            "hgad_fast": __version__,
            "method": detector.config.method,
            "groups_are_classes": detector.groups_are_classes,
            "groups": [
                {
                    "name": printable(row["group"]),
                    "threshold": finite(row["threshold"]),
                    "calibration_images": row["images"],
                    "target_false_alarm_rate": row["target"],
                    "false_alarm_rate": finite(row["attained"]),
                }
                for row in rate_table(detector)
            ],
            "max_bytes": settings.max_bytes,
            "max_pixels": settings.max_pixels,
            "timeout": settings.timeout,
        }

    @server.post("/score", openapi_extra={"requestBody": REQUEST_BODY})
    async def score(
        request: Request,
        class_name: Annotated[str | None, Query(alias="class", description="class of the image; else inferred")] = None,
        map_format: Annotated[Literal["png"] | None, Query(alias="map", description="add the anomaly map")] = None,
    ) -> dict[str, Any]:
        """Score the image that is the body, or the file of a form."""
        deadline = asyncio.get_running_loop().time() + settings.timeout
        body = Body(request, settings.max_bytes)
        try:
            if unknown := set(request.query_params) - {"class", "map"}:
                raise HTTPException(422, f"there is no parameter {sorted(unknown)[0]!r}; allowed are class and map")
            class_id = class_of(class_name, scorer)
            if not places.acquire(blocking=False):
                raise HTTPException(503, "busy: all places are taken; come again", {"Retry-After": "1"})
            try:
                image = [await in_time(body.image(), deadline, 408, "no whole body came")]
                work = pool.submit(lambda: scored(scorer, *image.pop(), class_id, map_format, settings.max_pixels))
            except BaseException:
                places.release()
                raise
        except HTTPException:
            await body.discard()
            raise

        def leave(_: Future[Any]) -> None:
            image.clear()  # of work that is given up, which stays in the pool's queue
            places.release()

        work.add_done_callback(leave)  # what is being scored keeps its place after a timeout
        return await in_time(asyncio.wrap_future(work), deadline, 504, "the image was not scored")

    return server


REQUEST_BODY = {
    "required": True,
    "content": {
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file"],
                "properties": {"file": {"type": "string", "format": "binary"}},
            }
        },
    },
}


async def in_time(result: Awaitable[Any], deadline: float, status: int, what: str) -> Any:
    """Return what is awaited; raise an HTTPException with this status if that takes until the deadline.

    Work that no thread has begun is given up then; a thread that computes goes on, and its result is lost.
    """
    try:
        return await asyncio.wait_for(result, max(0.0, deadline - asyncio.get_running_loop().time()))
    except asyncio.TimeoutError as error:
        raise HTTPException(status, f"{what} in time") from error


@contextlib.contextmanager
def temporary_files() -> Iterator[None]:
    """Raise an HTTPException (503) where the block fails to write a file, as the disk is full or there is no folder."""
    try:
        yield
    except OSError as error:
        say(f"serve.py: {printable(str(error))}")
        raise HTTPException(503, "no temporary file can be written", {"Retry-After": "1"}) from error


def class_of(name: str | None, scorer: Scorer) -> int | str | None:
    """Return the class that a request gives; raise an HTTPException (422) for one that the model does not know."""
    class_id = given_class(name, scorer.model.groups)
    try:
        checked_group_ids(scorer.model, class_id, 1)
    except ValueError as error:
        raise HTTPException(422, str(error)) from error
    return class_id


class Body:
    """The body of a request, of `max_bytes` at most."""

    def __init__(self, request: Request, max_bytes: int) -> None:
        self._request, self._max_bytes = request, max_bytes
        self._count = 0
        self._has_ended = False

    async def image(self) -> tuple[bytes, str]:
        """Return the image that comes, and the ending of its file's name, if it has one.

        Raises:
            HTTPException: the body is too large (413, and read no further), the client went away (400), it is a form
                without a file (422), or one that no temporary file can be written for (503).
        """
        request = Request(self._request.scope, self._receive)
        length = request.headers.get("content-length", "")
        self._require_room(int(length) if length.isdecimal() else 0)
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            return await request.body(), ""
        with temporary_files():  # large forms are kept in one
            async with request.form(max_files=1, max_fields=8) as form:
                file = form.get("file")
                if not isinstance(file, UploadFile):
                    raise HTTPException(422, "the form has no file that is called 'file'")
                suffix = SUFFIX.fullmatch(Path(file.filename or "").suffix)
                return await file.read(), suffix[0] if suffix else ""

    async def _receive(self) -> Any:
        message = await self._request.receive()
        self._count += len(message.get("body", b""))
        self._has_ended = not message.get("more_body", False)
        self._require_room(self._count)
        if message["type"] == "http.disconnect":
            raise HTTPException(400, "the client went away")
        return message

    def _require_room(self, count: int) -> None:
        """Raise an HTTPException (413) for a body of more than `max_bytes`."""
        if count > self._max_bytes:
            raise HTTPException(413, f"the body has more than {readable(self._max_bytes)}")

    async def discard(self) -> None:
        """Read on for a second and keep nothing: a client that still sends may not hear the answer otherwise."""

        async def read() -> None:
            while not self._has_ended:
                self._has_ended = not (await self._request.receive()).get("more_body", False)

        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(read(), DISCARD)


def scored(
    scorer: Scorer, content: bytes, suffix: str, class_id: int | str | None, map_format: str | None, max_pixels: int
) -> dict[str, Any]:
    """Return the answer about the content of an image file, read as `model.score` reads files.

    Raises:
        HTTPException: it is no image (415), or one that cannot be read or scored (422), or not now (503).
    """
    with temporary_files(), tempfile.TemporaryDirectory(prefix="hgad-fast-") as folder:
        file = Path(folder, f"image{suffix}")
        file.write_bytes(content)
        try:
            height, width, _ = read_header(file)
            if height * width > max_pixels:
                raise HTTPException(422, f"{width} x {height} pixels; {max_pixels} are allowed")
            image = read_image(file, scorer.model.config.white_level)
        except ImageError as error:
            is_image = content and not isinstance(error.__cause__, UnidentifiedImageError)
            raise HTTPException(422 if is_image else 415, error.reason) from error
    try:
        verdict = scorer(image, class_id)
    except ValueError as error:  # its proportions, its size, or a score that is no number
        raise HTTPException(422, str(error)) from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise HTTPException(503, "out of memory", {"Retry-After": "1"}) from error
    height, width = verdict.size
    answer = verdict.figures() | {"height": height, "width": width, "regions": list(map(asdict, verdict.regions()))}
    if map_format is not None:
        values, scale = in_16_bits(verdict.anomaly_map.numpy())
        file = io.BytesIO()
        Image.fromarray(values).save(file, format="PNG")
        answer |= {"map": base64.b64encode(file.getvalue()).decode("ascii"), "map_scale": scale}
    return answer


def main() -> None:
    settings, host, port = parsed()
    describe_file(settings.model)  # what cannot be used is told here, and not by every worker
    usable_device(settings.device)
    if not host.startswith("127.") and host not in ("localhost", "::1"):
        say(f"serve.py: anybody who reaches {host} can use it: there is no password and no encryption")
    if settings.workers == 1:
        uvicorn.run(create_app(settings), host=host, port=port)
    else:
        os.environ.update(settings.to_environment())
        folder = str(Path(__file__).parent)
        uvicorn.run(
            "serve:app",
            factory=True,
            app_dir=folder,
            host=host,
            port=port,
            workers=settings.workers,
            timeout_worker_healthcheck=STARTING,
        )


def parsed() -> tuple[Settings, str, int]:
    """Return settings, host and port of the command line."""
    parser = argparse.ArgumentParser(
        prog="serve.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model file (model.safetensors)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=1, help="processes, each with a model of its own")
    parser.add_argument("--threads", type=int, default=0, help="of torch in a worker (default: its own / workers)")
    parser.add_argument("--max-bytes", default="20MB", metavar="SIZE", help="of a request (default: 20MB)")
    parser.add_argument("--max-pixels", type=int, default=2**25, metavar="N", help="of an image (default: 2**25)")
    parser.add_argument("--timeout", default="10s", metavar="S", help="seconds for a request (default: 10s)")
    parser.add_argument("--places", type=int, default=8, metavar="N", help="requests at a time, others are told: busy")
    parser.add_argument("--false-alarm-rate", type=float, metavar="RATE", help="judge at another rate than the model's")
    parser.add_argument("--device", help="cpu, cuda, ...; default: cuda where there is a GPU")
    options = vars(parser.parse_args())
    host, port = options.pop("host"), options.pop("port")
    if not 0 <= port <= 65535:
        raise ValueError(f"--port is {port}; allowed: 0 (a free one) to 65535")
    try:
        options["timeout"] = float(options["timeout"].removesuffix("s"))
    except ValueError:
        raise ValueError(f"--timeout is {options['timeout']!r}; write seconds, such as 10s") from None
    options["max_bytes"] = byte_count(options["max_bytes"])
    return Settings(**options), host, port


if __name__ == "__main__":
    escape_unprintable()
    warnings.showwarning = lambda message, *_: say(f"serve.py: {in_options(str(message))}")
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"serve.py: {in_options(str(error))}")
