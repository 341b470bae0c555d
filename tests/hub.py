"""A model hub on this machine: folders served as repositories, the way huggingface_hub asks for them.

http://127.0.0.1:PORT/<owner>/<name>/resolve/<revision>/<file>      /api/models/<owner>/<name>/...
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """`folder` holds <owner>/<name>; `gated` are repositories that nobody may read; `asked`
    what was asked for."""

    daemon_threads = True

    def __init__(self, folder: Path, *, gated: tuple[str, ...]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.gated = folder, gated
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def answer(self, *, body: bool) -> None:
        path = urlsplit(self.path).path
        self.server.asked.append(path)
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        owner, name, *rest = parts[2:] if api else parts
        repository = self.server.folder / owner / name
        if f"{owner}/{name}" in self.server.gated:
            self.send(403, b"", body=body, headers={"X-Error-Code": "GatedRepo"})
        elif not repository.is_dir():
            self.send(401, b"", body=body, headers={"X-Error-Code": "RepoNotFound"})
        elif api:
            self.send_about(repository, rest, body=body)
        else:
            assert rest[0] == "resolve", path
            self.send_file(repository / "/".join(rest[2:]), body=body)

    def send_about(self, repository: Path, rest: list[str], *, body: bool) -> None:
        files = sorted(
            path.relative_to(repository).as_posix() for path in repository.rglob("*") if path.is_file()
        )
        if rest[:1] == ["tree"]:
            under = "/".join(rest[2:])
            told: object = [self.entry(repository, file) for file in files if file.startswith(under)]
            if under and not told:
                return self.send(404, b"", body=body, headers={"X-Error-Code": "EntryNotFound"})
        else:
            told = {
                "id": f"{repository.parent.name}/{repository.name}",
                "sha": COMMIT,
                "siblings": [{"rfilename": file} for file in files],
            }
        return self.send(
            200, json.dumps(told).encode(), body=body, headers={"Content-Type": "application/json"}
        )

    @staticmethod
    def entry(repository: Path, file: str) -> dict[str, object]:
        data = (repository / file).read_bytes()
        return {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def send_file(self, file: Path, *, body: bool) -> None:
        if not file.is_file():
            return self.send(
                404, b"", body=body, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            )
        data = file.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        return self.send(200, data, body=body, headers=headers)

    def send(self, code: int, data: bytes, *, body: bool, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@contextlib.contextmanager
def serving(folder: Path, *, gated: tuple[str, ...]) -> Iterator[Hub]:
    """A hub with the repositories in `folder`."""
    with Hub(folder, gated=gated) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()
