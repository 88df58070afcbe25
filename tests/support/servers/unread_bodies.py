"""Python's `http.server` in HTTP/1.1 as its page shows it: handlers that read no body.

The bytes of a body that was left unread are the next request on that connection, and are executed.
"""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Executed:
    """Where the server listens, and what it did."""

    port: int = 0
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of each request that it executed."""
    options: list[str | None] = field(default_factory=list)
    """The `Connection` of each of them."""
    ended: int = 0
    """The number of connections after which nothing is executed any more."""


@contextlib.contextmanager
def serving_unread_bodies(certificate: Path | None = None) -> Iterator[Executed]:
    """The server, until the end. `certificate`: with its key, if it speaks TLS."""
    executed = Executed()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _execute(self) -> None:
            executed.requests.append((self.command, self.path))
            executed.options.append(self.headers.get("Connection"))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = do_OPTIONS = do_TRACE = do_DELETE = do_POST = do_PROPFIND = _execute

        def finish(self) -> None:
            super().finish()
            executed.ended += 1

        def log_message(self, format: str, *args: object) -> None:
            """No log."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if certificate is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    executed.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield executed
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
