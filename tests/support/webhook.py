"""A webhook that keeps what it is told, and can be dead, slow or refuse."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SECRET = "/services/T000/S3CRET"


class Webhook:
    """On loopback, until the block ends."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.status, self.drips = 200, False
        webhook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                webhook.messages.append(json.loads(body) | {"path": self.path, "type": self.headers["Content-Type"]})
                with contextlib.suppress(OSError):
                    while webhook.drips:  # a header that never ends, a byte at a time
                        self.wfile.write(b"H")
                        time.sleep(0.05)
                    self.send_response(webhook.status)
                    self.end_headers()
                    self.wfile.write(b"ok")

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}{SECRET}"

    @property
    def texts(self) -> list[str]:
        """What it was told."""
        return [message["text"] for message in self.messages]


@contextlib.contextmanager
def webhook_here() -> Iterator[Webhook]:
    """A webhook that answers until the block ends."""
    webhook = Webhook()
    threading.Thread(target=webhook.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield webhook
    finally:
        webhook.drips = False
        webhook.server.shutdown()
        webhook.server.server_close()
