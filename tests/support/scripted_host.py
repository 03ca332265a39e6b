"""A web host whose every answer a test can script."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest


@dataclass
class Act:
    """How a host treats one request; a plain answer where nothing is said."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    """With `status`: sent in place of the file."""
    drop_after: int | None = None
    """Close the connection after so many bytes of the body."""
    stall_after: int | None = None
    """Send so many bytes of the body, then nothing."""
    ignore_range: bool = False
    shift: int = 0
    """A wrong server: answers a Range with bytes from elsewhere, and says so."""


class Host:
    """A web host with files in memory that does, request by request, what its script says."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str | None] = {}
        self.script: dict[str, deque[Act]] = {}
        self.requests: list[tuple[str, str | None, str | None]] = []
        """(target, Range, If-Range) of every request."""
        self.sent: dict[str, int] = {}
        """Bytes of bodies sent, by path."""
        self.over = threading.Event()
        self.length_told = True
        self.bytes_per_s: float | None = None
        host = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                host.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # clients that are killed
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"

    def put(self, path: str, content: bytes, *acts: Act, etag: str | None = '"one"') -> str:
        """Serve a file, after these acts plainly; its address."""
        self.files[path], self.etags[path], self.script[path] = content, etag, deque(acts)
        return self.address + path

    def ranges(self) -> list[str | None]:
        """The Range of each request, in order."""
        return [asked for _, asked, _ in self.requests]

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = urlsplit(request.path).path
        asked, condition = request.headers.get("Range"), request.headers.get("If-Range")
        self.requests.append((request.path, asked, condition))
        acts = self.script.get(path)
        act = acts.popleft() if acts else Act()
        if act.status is not None or path not in self.files:
            return self._send(request, act.status or 404, act.headers, act.body, Act())
        content, etag = self.files[path], self.etags[path]
        headers = {"Content-Type": "application/octet-stream", **({"ETag": etag} if etag else {}), **act.headers}
        start = 0
        if asked and not act.ignore_range and condition in (None, etag):
            start = int(asked.removeprefix("bytes=").rstrip("-")) + act.shift
            if start >= len(content):
                return self._send(request, 416, {"Content-Range": f"bytes */{len(content)}"}, b"", Act())
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(request, 206 if "Content-Range" in headers else 200, headers, content[start:], act)

    def _send(
        self, request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes, act: Act
    ) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        if self.length_told or status not in (200, 206):
            request.send_header("Content-Length", str(len(body)))
        else:
            request.send_header("Connection", "close")
            request.close_connection = True
        request.end_headers()
        end = min(value for value in (len(body), act.drop_after, act.stall_after) if value is not None)
        step = int(self.bytes_per_s / 50) if self.bytes_per_s else 1 << 20
        for begin in range(0, end, step):
            piece = body[begin : min(begin + step, end)]
            request.wfile.write(piece)
            path = urlsplit(request.path).path
            self.sent[path] = self.sent.get(path, 0) + len(piece)
            if self.bytes_per_s and self.over.wait(0.02):
                return
        if end == act.stall_after:
            self.over.wait(60)
        if end < len(body):
            request.close_connection = True


@pytest.fixture
def host() -> Iterator[Host]:
    """A host on the loopback whose every answer a test can script."""
    host = Host()
    thread = threading.Thread(target=host.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield host
    host.over.set()
    host.server.shutdown()
    host.server.server_close()


@pytest.fixture(scope="session")
def act() -> type[Act]:
    """How a host treats one request: `act(status=503)`, `act(drop_after=1000)`, ..."""
    return Act
