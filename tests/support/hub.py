"""A hub on the loopback: the requests of huggingface_hub that pushing and pulling make."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class FakeHub:
    """What the hub holds and what it was asked.

    Attributes:
        address: Of the server.
        repositories: Files by repository.
        sizes: Sizes that it tells in place of the true ones, by file.
        requests: Methods and paths, in order.
        refuse: Status that every writing request is answered with; 0: none.
        answers: Answers to requests that begin with a path, by the path: a status and a body.
        public: Repositories that it tells are public; of others it tells nothing.
    """

    address: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    refuse: int = 0
    answers: dict[str, tuple[int, Any]] = field(default_factory=dict)
    public: set[str] = field(default_factory=set)

    def sha(self, repository: str) -> str:
        """The commit of a repository's present files."""
        digest = hashlib.sha1(repository.encode(), usedforsecurity=False)
        for name, data in sorted(self.repositories[repository].items()):
            digest.update(name.encode() + b"\0" + data)
        return digest.hexdigest()


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Runs a hub without repositories."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, value: Any = None, **headers: str) -> None:
            body = value if isinstance(value, bytes) else json.dumps(value or {}).encode()
            self.send_response(status)
            for name, text in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), text)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            for begin, (status, value) in hub.answers.items():
                if path.startswith(begin):
                    self.answer(status, value)
                    return
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                self.tell(f"{parts[2]}/{parts[3]}", parts[5] if len(parts) > 4 else None)
            elif len(parts) >= 5 and parts[2] == "resolve":
                self.give(f"{parts[0]}/{parts[1]}", parts[3], "/".join(parts[4:]))
            else:
                self.answer(404)

        do_HEAD = do_GET  # noqa: N815

        def tell(self, repository: str, revision: str | None) -> None:
            if repository not in hub.repositories:
                self.answer(404, X_Error_Code="RepoNotFound")
                return
            if revision not in (None, "main", hub.sha(repository)):
                self.answer(404, X_Error_Code="RevisionNotFound")
                return
            siblings = [
                {"rfilename": name, "size": hub.sizes.get(name, len(data))}
                for name, data in hub.repositories[repository].items()
            ]
            told = {"private": False} if repository in hub.public else {}
            facts = {"id": repository, "sha": hub.sha(repository), "siblings": siblings}
            self.answer(200, {**facts, **told})

        def give(self, repository: str, revision: str, name: str) -> None:
            files = hub.repositories.get(repository, {})
            if name not in files or revision not in ("main", hub.sha(repository)):
                self.answer(404, X_Error_Code="EntryNotFound")
                return
            tag = hashlib.sha256(files[name]).hexdigest()
            self.answer(200, files[name], ETag=f'"{tag}"', X_Repo_Commit=hub.sha(repository))

        def do_POST(self) -> None:
            path, body = unquote(urlsplit(self.path).path), self.body()
            hub.requests.append(f"POST {path}")
            parts = path.strip("/").split("/")
            if hub.refuse and path != "/api/validate-yaml":
                self.answer(hub.refuse)
            elif path == "/api/validate-yaml":
                self.answer(200, {"warnings": [], "errors": []})
            elif path == "/api/repos/create":
                order = json.loads(body)
                name = f"{order.get('organization', 'me')}/{order['name']}"
                hub.repositories.setdefault(name, {})
                self.answer(200, {"url": f"{hub.address}/{name}", "id": name, "name": name})
            elif parts[4:5] == ["preupload"]:
                files = [
                    {"path": item["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for item in json.loads(body)["files"]
                ]
                self.answer(200, {"files": files})
            elif parts[4:5] == ["commit"]:
                self.commit(f"{parts[2]}/{parts[3]}", body)
            else:
                self.answer(404)

        def commit(self, repository: str, body: bytes) -> None:
            lines = [json.loads(line) for line in body.splitlines()]
            parent = next(
                line["value"].get("parentCommit") for line in lines if line["key"] == "header"
            )
            if parent != hub.sha(repository):
                self.answer(412, {"error": "somebody else wrote first"})
                return
            for line in lines:
                if line["key"] == "file":
                    data = base64.b64decode(line["value"]["content"])
                    hub.repositories[repository][line["value"]["path"]] = data
            sha = hub.sha(repository)
            url = f"{hub.address}/{repository}/commit/{sha}"
            self.answer(200, {"commitUrl": url, "commitOid": sha, "success": True})

    return Handler
