"""A real MariaDB for tests: a temporary data folder of its own, on loopback with TLS, and the broker's rights in it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pymysql

from ringfence.backends import MysqlBackend
from ringfence.client.agent.credentials import mysql_arguments
from ringfence.dev.processes import LOOPBACK, Child, StackError, free_port, spawn
from tests.support.servers.postgres import certificates, documented
from tests.support.servers.redis_target import Placed

_START_S = 60.0
_AS_ROOT = ["--user=root"] if os.geteuid() == 0 else []
_PROGRAMS = "/usr/sbin:/usr/bin"
_REFUSALS = (1044, 1045, 1142, 1143, 1227, 1370, 1698, 3159)
"""Errors that say that somebody may not do this, or not log in."""


class MariadbServer:
    """One server and its data, which go with `stop`. `log` holds every statement that the server was sent."""

    def __init__(self) -> None:
        self.port = 0
        self.folder = Path()
        self._child: Child | None = None

    @property
    def log(self) -> Path:
        return self.folder / "general.log"

    @property
    def root_certificate(self) -> Path:
        return self.folder / "root.pem"

    def start(self) -> None:
        """Return once it answers. Raises StackError."""
        self.folder = Path(tempfile.mkdtemp(prefix="ringfence-mariadb-"))
        certificates(self.folder)
        made = subprocess.run(
            [_program("mariadb-install-db"), "--no-defaults", f"--datadir={self.folder / 'data'}",
             "--auth-root-authentication-method=normal", "--skip-test-db", *_AS_ROOT],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        if made.returncode:
            raise StackError(f"mariadb-install-db failed: {made.stdout.decode(errors='replace')}")
        self.launch()
        self.admin("DELETE FROM mysql.global_priv WHERE User = ''", "FLUSH PRIVILEGES")

    def launch(self) -> None:
        """Start it on the data that there is, on the port that it had."""
        self.port = self.port or free_port()
        self._child = spawn(
            "mariadbd",
            [_program("mariadbd"), "--no-defaults", f"--datadir={self.folder / 'data'}", f"--port={self.port}",
             f"--bind-address={LOOPBACK}", f"--socket={self.folder / 'socket'}", "--skip-name-resolve",
             "--general-log", f"--general-log-file={self.log}", "--innodb-flush-log-at-trx-commit=0",
             f"--ssl-cert={self.folder / 'server.pem'}", f"--ssl-key={self.folder / 'server.key'}", *_AS_ROOT],
            log_path=self.folder / "server.log",
        )  # fmt: skip
        try:
            self._child.wait_until(self._answers, _START_S, f"takes connections on port {self.port}")
        except BaseException:
            self._child.kill()
            raise

    def halt(self) -> None:
        """End it; its data stay."""
        if self._child is not None and self._child.alive:
            os.kill(self._child.pid, signal.SIGTERM)
            if self._child.wait(20.0) is None:
                self._child.kill()

    def stop(self) -> None:
        """End it and delete its data."""
        self.halt()
        shutil.rmtree(self.folder, ignore_errors=True)

    def admin(self, *statements: str) -> list[tuple[Any, ...]]:
        """What the last of these statements gives to the superuser, who logs in by the socket."""
        connection: Any = pymysql.connect(
            unix_socket=str(self.folder / "socket"), user="root", autocommit=True
        )
        with connection:
            return _rows(connection, statements)

    def _answers(self) -> bool:
        try:
            return bool(self.admin("SELECT 1"))
        except pymysql.err.MySQLError:
            return False


def _program(name: str) -> str:
    found = shutil.which(name, path=_PROGRAMS)
    if found is None:
        raise StackError(f"{name} is not here: apt-get install mariadb-server.")
    return found


def _rows(connection: Any, statements: Sequence[str]) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    with connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)
            rows = list(cursor.fetchall())
    return rows


# --- a target in it ---------------------------------------------------------------------------------------------------

BROKER = "ringfence"
BROKER_SECRET = "broker-secret"


class MariadbTarget(Placed):
    """A server with a database `shop`. Agents reach it at `address`."""

    def __init__(self, target_id: str, server: MariadbServer, folder: Path) -> None:
        super().__init__(target_id, folder)
        self.server = server

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self.server.port}"

    def backend(self, trust_domain: str = "test.example") -> MysqlBackend:
        return MysqlBackend(trust_domain, self.access())

    def write_secret(self, address: str | None = None, query: str = "") -> None:
        """Name the server, or another address, as the place where Ringfence works."""
        self.place(f"mysql://{BROKER}:{quote(BROKER_SECRET)}@{address or self.address}/{query}\n")

    def users(self) -> set[str]:
        """The names of all users that Ringfence made, whichever trust domain's."""
        return {row[0] for row in self.server.admin("SELECT User FROM mysql.user WHERE LEFT(User, 2) = 'rf'")}

    def make(self, statements: Sequence[str]) -> None:
        """What is in the server, and what the document says that the broker needs."""
        setting_up = documented("What Ringfence needs there", "mysql")
        self.server.admin(
            *statements, *(one.replace("a long random password", BROKER_SECRET) for one in setting_up)
        )
        self.write_secret()


def connect(url: str, **options: Any) -> Any:
    """A connection as the holder of a credential."""
    return pymysql.connect(**mysql_arguments(url), autocommit=True, connect_timeout=30, **options)


def query(url: str, *statements: str) -> list[tuple[Any, ...]]:
    """What the last of these statements gives to the holder of a credential. Raises what the server says."""
    with connect(url) as connection:
        return _rows(connection, statements or ("SELECT 1",))


async def may(url: str, *statements: str) -> bool:
    """Whether the holder of a credential may do this. Other errors than a refusal fail the test."""
    try:
        await asyncio.to_thread(query, url, *statements)
    except pymysql.err.MySQLError as error:
        if error.args[0] not in _REFUSALS:
            raise
        return False
    return True


async def lives(connection: Any) -> bool:
    """Whether an open session is still there."""
    try:
        await asyncio.to_thread(_rows, connection, ["SELECT 1"])
    except (pymysql.err.MySQLError, OSError):
        return False
    return True
