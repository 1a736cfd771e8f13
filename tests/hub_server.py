"""A small hub: an HTTP server on 127.0.0.1 that speaks the routes of huggingface.co which a download takes."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "1234567890" * 4


class Hub:
    """files["org/repo"][name] = content; what is to go wrong is set on it, what was asked is in `asked`."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.lies: dict[str, bytes] = {}  # other content of as many bytes, for the name
        self.breaks: list[int] = []  # after so many bytes, the next answers end
        self.asked: list[str] = []
        self.url = ""

    def gets(self) -> list[str]:
        return [line for line in self.asked if line.startswith("GET /") and "/api/" not in line]


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = unquote(self.path.partition("?")[0])
            hub.asked.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                repo, revision = found[1], found[2] or "main"
                if self.known(repo, revision):
                    siblings = [{"rfilename": name} for name in hub.files[repo]]
                    self.reply(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())
            elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                if self.known(found[1], found[2]):
                    self.file(found[1], found[3])
            else:
                self.refuse(404, "EntryNotFound")

        def known(self, repo: str, revision: str) -> bool:
            if repo not in hub.files:
                self.refuse(404, "RepoNotFound")
            elif revision not in ("main", COMMIT):
                self.refuse(404, "RevisionNotFound")
            else:
                return True
            return False

        def file(self, repo: str, name: str) -> None:
            if repo in hub.gated:
                return self.refuse(403, "GatedRepo")
            if name not in hub.files[repo]:
                return self.refuse(404, "EntryNotFound")
            right = hub.files[repo][name]
            content = hub.lies.get(name, right)
            large = name.endswith((".safetensors", ".bin", ".ckpt"))  # as LFS: its ETag is the sha256
            tag = hashlib.sha256(right).hexdigest() if large else hashlib.sha1(right).hexdigest()
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"', "Accept-Ranges": "bytes"}
            if large:
                headers |= {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(content))}
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if "Range" in self.headers else 0
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.reply(206 if start else 200, content[start:], headers)

        def refuse(self, status: int, code: str) -> None:
            self.reply(status, b"", {"X-Error-Code": code, "X-Error-Message": "no"})

        def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if hub.breaks and "/resolve/" in self.path:
                body = body[:hub.breaks.pop(0)]
                self.close_connection = True
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
