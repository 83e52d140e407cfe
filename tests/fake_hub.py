"""A Hugging Face hub of one process: repositories in memory, and the few requests that an upload makes.

It answers as the hub does (huggingface.co/docs/hub/api and git-lfs's batch API), and keeps what it was sent.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_test"


@dataclass
class FakeHub:
    """`repos`: id -> path -> content; `private`: the ids of private ones; `members`: who the token may write for.

    `messages` are those of the commits, `refused` makes the card's metadata invalid, `lost` breaks every upload.
    """

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    members: tuple[str, ...] = ("anna",)
    messages: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    refused: str = ""
    lost: bool = False
    url: str = ""

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Any]:
        """(status, JSON) of one request."""
        if path.startswith("/objects/"):
            if self.lost:
                return 400, {"error": "the disk is full"}
            self.objects[path.rpartition("/")[2]] = body
            return 200, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return (400, {"errors": [{"message": self.refused}]}) if self.refused else (200, {"warnings": []})
        if path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(body)["objects"]
            upload = [{**one, "actions": {"upload": {"href": f"{self.url}/objects/{one['oid']}"}}} for one in asked]
            return 200, {"transfer": "basic", "objects": upload}
        repo = "/".join(path.split("/")[3:5])
        if path.endswith("/preupload/main"):
            return 200, {"files": [self._mode(one) for one in json.loads(body)["files"]]}
        if path.endswith("/commit/main"):
            return self._commit(repo, body)
        if repo not in self.repos:
            return 404, {"error": "Repository not found"}
        files = [{"rfilename": name} for name in self.repos[repo]]
        return 200, {"id": repo, "private": repo in self.private, "siblings": files}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        repo = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] not in self.members:
            return 403, {"error": f'You don\'t have the rights to create a model under the namespace "{repo}"'}
        if repo in self.repos:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{repo}"}
        self.repos[repo] = {}
        if asked.get("visibility") == "private" or asked.get("private"):
            self.private.add(repo)
        return 200, {"url": f"{self.url}/{repo}", "id": repo}

    @staticmethod
    def _mode(file: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def _commit(self, repo: str, body: bytes) -> tuple[int, Any]:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                self.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.repos[repo][value["path"]] = self.objects[value["oid"]]
        return 200, {"commitUrl": f"{self.url}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40}


@contextmanager
def running(hub: FakeHub) -> Iterator[FakeHub]:
    """The hub at `hub.url` while the block lasts."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _respond(self) -> None:
            body = self._body()
            status, answer = hub.answer(self.command, self.path.partition("?")[0], body, self.headers["authorization"])
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Type", "application/json")
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = _respond

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, *_: object) -> None:
            """Requests are not printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
