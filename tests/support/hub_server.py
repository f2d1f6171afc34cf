"""A hub on this machine: as much of the model hub's API as its client needs to make a repository, commit and download.

It keeps everything in memory, answers errors as the hub does (status and ``X-Error-Code``), and records the requests.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

OWNER, READER = "token-of-the-owner", "token-of-a-reader"


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    messages: list[str] = field(default_factory=list)

    def commit_of(self, branch: str) -> str:
        files = self.branches[branch]
        return hashlib.sha1(repr([(name, hash_of(files[name])) for name in sorted(files)]).encode()).hexdigest()


@dataclass
class Hub:
    """What the server holds, and what it was asked for."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    status: int | None = None  # what every request is answered with; None: as it should be


def hash_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def answer(self, status: int, content: Any = None, error: str = "", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content if content is not None else {}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.handle_request()

    def do_GET(self) -> None:
        self.handle_request()

    def do_POST(self) -> None:
        self.handle_request()

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.hub.status is not None:
            self.answer(self.hub.status)
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self.create(json.loads(body), token)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(preupload|commit|branch)/(.+))?", path):
            self.change(found[1], found[2], found[3], body, token)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(found[1], found[2], found[3], token)
        else:
            self.answer(404)

    def create(self, wanted: dict[str, Any], token: str) -> None:
        name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
        if token != OWNER:
            self.answer(403 if token else 401, {"error": "not allowed"})
        elif name in self.hub.repositories:
            self.answer(409, {"url": f"{self.hub.url}/{name}"})
        else:
            private = wanted.get("private") or wanted.get("visibility") == "private"
            self.hub.repositories[name] = Repository(bool(private))
            self.answer(200, {"url": f"{self.hub.url}/{name}"})

    def change(self, name: str, action: str | None, branch: str, body: bytes, token: str) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and token != OWNER):
            self.answer(404 if token else 401, error="RepoNotFound")
        elif action is None:
            self.answer(200, {"id": name, "private": repository.private, "tags": []})
        elif token != OWNER:
            self.answer(403, {"error": "not allowed"})
        elif action == "branch":
            if branch in repository.branches:
                self.answer(409)
            else:
                repository.branches[branch] = dict(repository.branches["main"])
                self.answer(201)
        elif branch not in repository.branches:
            self.answer(404, error="RevisionNotFound")
        elif action == "preupload":
            files = json.loads(body)["files"]
            self.answer(
                200,
                {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]},
            )
        else:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    repository.messages.append(value["summary"])
                else:
                    repository.branches[branch][value["path"]] = base64.b64decode(value["content"])
            oid = repository.commit_of(branch)
            self.answer(200, {"commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"})

    def resolve(self, name: str, revision: str, file: str, token: str) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and token != OWNER):
            self.answer(404 if token else 401, error="RepoNotFound")
            return
        by_commit = {repository.commit_of(branch): branch for branch in repository.branches}
        branch = by_commit.get(revision, revision)
        if repository.gated and token != OWNER:
            self.answer(403 if token else 401, error="GatedRepo")
        elif branch not in repository.branches:
            self.answer(404, error="RevisionNotFound")
        elif file not in repository.branches[branch]:
            self.answer(404, error="EntryNotFound", X_Repo_Commit=repository.commit_of(branch))
        else:
            content = repository.branches[branch][file]
            self.answer(200, content, X_Repo_Commit=repository.commit_of(branch), ETag=f'"{hash_of(content)}"')


@contextmanager
def serving() -> Iterator[Hub]:
    """Serve an empty hub on loopback while the block lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
