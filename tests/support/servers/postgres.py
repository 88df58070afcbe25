"""A real PostgreSQL for tests: a temporary cluster of its own, on loopback with TLS, and the broker's rights in it."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ringfence.backends import PostgresBackend
from ringfence.backends.postgres.backend import verifier
from ringfence.dev.processes import LOOPBACK, Child, StackError, free_port, spawn
from tests.support.servers.redis_target import Placed

DEBIAN = Path("/usr/lib/postgresql")
_START_S = 30.0
_READY = b"database system is ready to accept connections"


def server_programs(choice: str = "") -> Path:
    """The folder with `initdb` and `postgres`: the one given, else of Debian's newest. Raises StackError."""
    if choice:
        folders = [Path(choice)]
    else:
        folders = sorted(DEBIAN.glob("*/bin"), key=lambda folder: int(folder.parent.name), reverse=True)
    for folder in folders:
        if (folder / "initdb").is_file() and (folder / "postgres").is_file():
            return folder
    where = choice or f"{DEBIAN}/*/bin"
    raise StackError(f"PostgreSQL is not in {where}: apt-get install postgresql, or name it with --postgres.")


class PostgresServer:
    """One server and its cluster, which go with `stop`. The superuser logs in by the socket, everybody else by TCP.

    `log` holds every statement that the server was sent.
    """

    def __init__(self, programs: Path) -> None:
        self.port = 0
        self.programs = programs
        self._child: Child | None = None
        self._started = 0
        self._folder = Path()
        self._user = _unprivileged()
        built = subprocess.run(
            [programs / "pg_config", "--configure"], stdout=subprocess.PIPE, text=True, check=True
        )
        self.has_tls = "openssl" in built.stdout
        """Some wheels with other versions are built without."""

    @property
    def folder(self) -> Path:
        """Everything of the server's."""
        return self._folder

    @property
    def log(self) -> Path:
        return self._folder / "server.log"

    @property
    def root_certificate(self) -> Path:
        return self._folder / "root.pem"

    def start(self) -> None:
        """Return once it answers. Raises StackError."""
        self._folder = Path(tempfile.mkdtemp(prefix="ringfence-postgres-"))
        certificates(self._folder)
        self._own(self._folder, *self._folder.iterdir())
        made = subprocess.run(
            [
                *self._as_user, str(self.programs / "initdb"), "--pgdata", str(self._folder / "data"),
                "--username", "postgres", "--encoding", "UTF8", "--locale", "C.UTF-8", "--no-sync",
                "--auth-local", "trust", "--auth-host", "scram-sha-256",
            ],
            cwd=self._folder, env=_ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        if made.returncode:
            raise StackError(f"initdb failed: {made.stdout.decode(errors='replace')}")
        self.launch()

    def launch(self) -> None:
        """Start it on the cluster that there is, on the port that it had."""
        self.port = self.port or free_port()
        self._started = self.log.read_bytes().count(_READY) if self.log.exists() else 0
        options = {
            "listen_addresses": LOOPBACK,
            "port": str(self.port),
            "unix_socket_directories": str(self._folder),
            "fsync": "off",
            "log_statement": "all",
            "log_min_messages": "debug1",
            "log_line_prefix": "%m %u@%d ",
        }
        if self.has_tls:
            files = {"cert": self._folder / "server.pem", "key": self._folder / "server.key"}
            options |= {"ssl": "on"} | {f"ssl_{what}_file": str(file) for what, file in files.items()}
        settings = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        argv = [*self._as_user, str(self.programs / "postgres"), "-D", str(self._folder / "data"), *settings]
        self._child = spawn("postgres", argv, log_path=self.log, env=_ENVIRONMENT, cwd=self._folder)
        try:
            self._child.wait_until(self._answers, _START_S, f"takes connections on port {self.port}")
        except BaseException:
            self._child.kill()
            raise

    def halt(self) -> None:
        """End it; the cluster stays."""
        if self._child is not None and self._child.alive:
            os.kill(self._child.pid, signal.SIGINT)  # "fast": it does not wait until everybody has gone
            if self._child.wait(10.0) is None:
                self._child.kill()

    def stop(self) -> None:
        """End it and delete its cluster."""
        self.halt()
        shutil.rmtree(self._folder, ignore_errors=True)

    @contextlib.asynccontextmanager
    async def admin(self, database: str = "postgres") -> AsyncIterator[Any]:
        """The superuser."""
        connection = await asyncpg.connect(
            host=str(self._folder), port=self.port, user="postgres", database=database
        )
        try:
            yield connection
        finally:
            await connection.close()

    @property
    def _as_user(self) -> list[str]:
        # PostgreSQL refuses to run as root. The signal that ends it with its parent would be lost with the change.
        if self._user is None:
            return []
        uid, gid = self._user
        return [
            "setpriv",
            "--reuid",
            str(uid),
            "--regid",
            str(gid),
            "--clear-groups",
            "--pdeathsig",
            "keep",
            "--",
        ]

    def _own(self, *paths: Path) -> None:
        if self._user is not None:
            for path in paths:
                os.chown(path, *self._user)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(self._folder / f".s.PGSQL.{self.port}"))
            return self.log.read_bytes().count(_READY) > self._started
        return False


_ENVIRONMENT = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C.UTF-8", "TZ": "UTC"}


def _unprivileged() -> tuple[int, int] | None:
    """Whom the server runs as; None for whoever runs the tests, where that is not root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return entry.pw_uid, entry.pw_gid
    raise StackError("PostgreSQL cannot run as root, and there is no user postgres or nobody here.")


def certificates(folder: Path) -> None:
    """A certificate for the loopback that is its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names: list[x509.GeneralName] = [
        x509.DNSName("localhost"),
        x509.IPAddress(ipaddress.ip_address(LOOPBACK)),
    ]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    (folder / "root.pem").write_bytes(pem)
    (folder / "server.pem").write_bytes(pem)
    (folder / "server.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    (folder / "server.key").chmod(0o600)


# --- a target in it ---------------------------------------------------------------------------------------------------

BROKER = "ringfence_broker"
BROKER_SECRET = "broker-secret"
PAGES = Path(__file__).parents[3] / "docs" / "targets"
"""What is set up here is what they say."""


def documented(heading: str, page: str = "postgres") -> list[str]:
    """The SQL statements below a heading of a target's page."""
    text = (PAGES / f"{page}.md").read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    blocks = [block.partition("```")[0] for block in text.split("```sql\n")[1:]]
    lines = [line.partition("--")[0].rstrip() for line in "\n".join(blocks).splitlines()]
    return [statement.strip() for statement in "\n".join(lines).split(";") if statement.strip()]


class PostgresTarget(Placed):
    """One database of a server, with a schema `shop`. Agents reach it at `address`."""

    def __init__(self, target_id: str, server: PostgresServer, folder: Path, database: str) -> None:
        super().__init__(target_id, folder)
        self.server = server
        self.database = database

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self.server.port}"

    def backend(self, trust_domain: str = "test.example") -> PostgresBackend:
        return PostgresBackend(trust_domain, self.access())

    def write_secret(self, address: str | None = None, query: str = "") -> None:
        """Name the server, or another address, as the place where Ringfence works."""
        where = f"{address or self.address}/{quote(self.database, safe='')}{query}"
        self.place(f"postgresql://{BROKER}:{BROKER_SECRET}@{where}\n")

    @contextlib.asynccontextmanager
    async def admin(self) -> AsyncIterator[Any]:
        """The superuser, in this database."""
        async with self.server.admin(self.database) as connection:
            yield connection

    async def roles(self) -> set[str]:
        """The names of all roles that Ringfence made, whichever trust domain's."""
        async with self.server.admin() as admin:
            rows = await admin.fetch("SELECT rolname FROM pg_roles WHERE starts_with(rolname, 'ringfence_')")
        return {row["rolname"] for row in rows} - {BROKER}

    async def make(self, statements: Sequence[str]) -> None:
        """The database, what is in it, and what the document says that the broker needs."""
        async with self.server.admin() as admin:
            await admin.execute(f'CREATE DATABASE "{self.database}"')
        async with self.admin() as admin:
            known = await admin.fetchval("SELECT count(*) FROM pg_roles WHERE rolname = $1", BROKER)
            for statement in [*statements, *documented("What Ringfence needs there")]:
                if not (known and statement.startswith("CREATE ROLE")):
                    await admin.execute(_named(statement, self.database))
        self.write_secret()


def _named(statement: str, database: str) -> str:
    # A verifier instead of the password: the server's log holds every statement.
    password = verifier(BROKER_SECRET)
    return statement.replace("'a long random password'", f"'{password}'").replace(
        "DATABASE shop ", f'DATABASE "{database}" '
    )


async def query(url: str, *statements: str, root: Path | None = None) -> list[Any]:
    """What the last of these statements gives to the holder of a credential. Raises what the server says."""
    connection = await asyncpg.connect(url, timeout=30)
    try:
        rows: list[Any] = []
        for statement in statements or ("SELECT 1",):
            rows = [tuple(row) for row in await connection.fetch(statement)]
        return rows
    finally:
        await connection.close(timeout=30)


async def may(url: str, *statements: str) -> bool:
    """Whether the holder of a credential may do this. Other errors than a refusal fail the test."""
    try:
        await query(url, *statements)
    except (
        asyncpg.InsufficientPrivilegeError,
        asyncpg.InvalidAuthorizationSpecificationError,
        asyncpg.InvalidPasswordError,
    ):
        return False
    return True


async def lives(connection: Any) -> bool:
    """Whether an open session is still there."""
    try:
        async with asyncio.timeout(60):
            await connection.fetchval("SELECT 1")
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
        return False
    except asyncpg.InternalClientError:
        return False  # what the driver makes of the server's farewell where that comes between two statements
    return True
