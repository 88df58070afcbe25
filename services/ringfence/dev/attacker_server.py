"""The attacker's server in `ringfence demo --runner`: it keeps whatever is sent to it.

`POST /collect` takes a body, and `GET /collected` returns all of them as a JSON array. It stands for a server anywhere
on the internet, and listens on loopback alone: nothing leaves this machine.
"""

from __future__ import annotations

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from ringfence.dev.processes import LOOPBACK

_MAX_BYTES: Final = 1024 * 1024


class AttackerServer(ThreadingHTTPServer):
    def __init__(self, port: int) -> None:
        super().__init__((LOOPBACK, port), _Handler)
        self.collected: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: AttackerServer

    def do_POST(self) -> None:
        length = min(int(self.headers.get("Content-Length", "0")), _MAX_BYTES)
        self.server.collected.append(self.rfile.read(length).decode(errors="replace"))
        self._answer({"thanks": True})

    def do_GET(self) -> None:
        self._answer(self.server.collected)

    def _answer(self, document: Any) -> None:
        body = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing: the log of the demo is no place for what was stolen."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ringfence.dev.attacker_server", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    AttackerServer(parser.parse_args().port).serve_forever()


if __name__ == "__main__":
    main()
