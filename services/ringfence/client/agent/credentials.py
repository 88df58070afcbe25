"""Credential classes of the SDK, one for each kind: apply a credential, wipe it, and pass it to a program.

`apply()` returns what the usual client library of the kind takes. No credential renews itself. A kind of a
third-party backend has no class here: only its value is known. A program gets a credential in environment variables
that programs of its kind read. What it only reads from files is written with mode 0600 to a folder that is deleted
when the program ends.

The files that OpenSSH's client needs: key, certificate and host keys, in a temporary folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import parse_qsl, unquote, urlsplit

from ringfence.client.agent.dpop import proof
from ringfence.client.errors import CredentialOverError, CredentialUseError, InvalidCallError
from ringfence.client.settings import ClientSettings
from ringfence.kernel.base.clock import Clock, SystemClock
from ringfence.kernel.base.private_files import open_private
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.tracing.api import trace_id
from ringfence.messages.base import Scope
from ringfence.messages.credential import Delivery

if TYPE_CHECKING:
    import httpx

_SSH_CONFIG = """\
Host {target}
    HostName {host}
    Port {port}
    User {user}
    HostKeyAlias {target}
    IdentityFile "{folder}/key"
    CertificateFile "{folder}/key-cert.pub"
    IdentitiesOnly yes
    IdentityAgent none
    UserKnownHostsFile "{folder}/known_hosts"
    GlobalKnownHostsFile none
    StrictHostKeyChecking yes
    PreferredAuthentications publickey
    BatchMode yes
"""


@contextlib.contextmanager
def ssh_client(value: str, target: str) -> Iterator[list[str]]:
    """Yield `ssh -F FILE`, in which the host has the target's id. The files are deleted at the end of the block."""
    with _private_folder() as folder:
        yield ["ssh", "-F", str(ssh_files(value, target, folder))]


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    # In memory where the machine offers that, so that no secret is ever on a disk.
    memory = os.environ.get("XDG_RUNTIME_DIR", "")
    folder_of = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="ringfence-", dir=folder_of) as folder:
        yield Path(folder)


def _write_private(file: Path, text: str) -> None:
    with os.fdopen(open_private(file, os.O_WRONLY | os.O_EXCL), "w") as opened:
        opened.write(text)


def ssh_files(value: str, target: str, folder: Path) -> Path:
    """Write the files of an SSH credential to `folder`. Returns the config file for `ssh -F`."""
    credential = json.loads(value)
    url = urlsplit(credential["url"])
    known_hosts = "".join(f"{target} {key}\n" for key in credential["host_keys"])
    config = _SSH_CONFIG.format(
        target=target,
        host=url.hostname,
        port=url.port or 22,
        user=url.username,
        folder=str(folder).replace("%", "%%"),
    )
    for name, text in (
        ("key", credential["private_key"]),
        ("key-cert.pub", credential["certificate"] + "\n"),
        ("known_hosts", known_hosts),
        ("config", config),
    ):
        _write_private(folder / name, text)
    return folder / "config"


class Secret:
    """A text that can be wiped. Copies that were read from it stay in memory as long as somebody refers to them."""

    __slots__ = ("_data",)

    def __init__(self, text: str) -> None:
        self._data: bytearray | None = bytearray(text, "utf-8")

    @property
    def wiped(self) -> bool:
        return self._data is None

    def reveal(self) -> str:
        """The text. Raises CredentialOverError once it was wiped."""
        if self._data is None:
            raise CredentialOverError("the credential was wiped when its block ended; ask for a new one")
        return self._data.decode("utf-8")

    def wipe(self) -> None:
        """Overwrite it. Idempotent."""
        if self._data is not None:
            self._data[:] = bytes(len(self._data))
            self._data = None

    def __repr__(self) -> str:
        return "Secret()"


@dataclass(frozen=True, slots=True)
class IssuedCredential:
    """A credential that policy allowed and the issuer made. `repr` does not show its value.

    As a context manager it is wiped at the end of the block, but not released: `Agent.credential` does both.
    """

    lease_id: str
    request_id: str
    kind: str
    """The backend that made it, e.g. `jwt`."""
    secret: Secret = field(repr=False)
    token_type: str | None
    expires_at: int
    """Seconds since 1970, UTC. From then on its target refuses it."""
    target: str
    scope: Scope
    task_id: str
    agent_id: str
    sponsor: str
    on_behalf_of: str
    delivery: Delivery
    traceparent: str | None = field(default=None, repr=False)
    """The W3C trace context of the request, to which decision, issue and end belong, too."""
    key: SigningKey | None = field(default=None, repr=False)
    """The agent's key. A DPoP-bound credential (`token_type` is DPoP) is valid only with proofs by it."""
    clock: Clock = field(default=SystemClock(), repr=False, compare=False)
    """What tells whether it has expired, and dates proofs."""

    @property
    def trace_id(self) -> str | None:
        """The W3C trace id of the request; None if there is no trace."""
        return trace_id(self.traceparent)

    @property
    def value(self) -> str:
        """The secret itself. Raises CredentialOverError once it was wiped."""
        return self.secret.reveal()

    def apply(self) -> Any:
        """What the usual library of its kind takes; the value where the kind is unknown.

        Raises CredentialOverError if it was wiped or has expired: it is not renewed implicitly.
        """
        return self.usable()

    def usable(self) -> str:
        """The value. Raises CredentialOverError if it was wiped or has expired."""
        if self.clock.now_ms() >= self.expires_at * 1000:
            raise CredentialOverError(f"the time of lease {self.lease_id} is over; ask for a new credential")
        return self.value

    def headers(self, method: str | None = None, url: str | None = None) -> dict[str, str]:
        """The HTTP headers that present it: `Authorization` (RFC 6750), and `DPoP` (RFC 9449) where it is bound to a
        key.

        A proof is for one request, the one that `method` and `url` name. Use `auth` for servers that demand nonces.

        Raises InvalidCallError if a proof is needed and they are missing, CredentialOverError once it was wiped.
        """
        headers = {"Authorization": f"{self.token_type or 'Bearer'} {self.value}"}
        if self.token_type == "DPoP":  # noqa: S105 - RFC 9449
            if method is None or url is None:
                raise InvalidCallError(
                    f"the credential for {self.target} is bound to the agent's key: name method and URL of the "
                    "request, as in headers('GET', url), or use auth()"
                )
            headers["DPoP"] = proof(
                self._bound_to(), method, url,
                access_token=self.value, now_s=self.clock.now_ms() // 1000,
            )  # fmt: skip
        return headers

    def auth(self) -> httpx.Auth:
        """For httpx: `client.put(url, auth=credential.auth())`. Reuse the object for all requests: it remembers nonces.

        A request after expiry raises CredentialOverError and is not sent. A 401 is passed to the caller.
        """
        from ringfence.client.agent.httpx_auth import BearerAuth, DpopAuth, WhileUsable

        if self.token_type == "DPoP":  # noqa: S105 - RFC 9449
            return WhileUsable(self.usable, DpopAuth(self.value, self._bound_to(), clock=self.clock))
        return WhileUsable(self.usable, BearerAuth(self.value))

    def _bound_to(self) -> SigningKey:
        if self.key is None:
            raise InvalidCallError("the key that the credential is bound to is not known here")
        return self.key

    def wipe(self) -> None:
        """Forget the value. It stays valid at its target until it is released or expires."""
        self.secret.wipe()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.wipe()


class TokenCredential(IssuedCredential):
    """An access token, kind `jwt`."""

    __slots__ = ()

    def apply(self) -> httpx.Auth:
        """For httpx: `httpx.AsyncClient(auth=credential.apply())`; the same as `auth`."""
        return self.auth()


class PostgresCredential(IssuedCredential):
    """A temporary login at a PostgreSQL server, kind `postgres`."""

    __slots__ = ()

    def apply(self) -> str:
        """The DSN: `await asyncpg.connect(credential.apply())`, `psycopg.connect(credential.apply())`."""
        return self.usable()

    def headers(self, method: str | None = None, url: str | None = None) -> dict[str, str]:
        raise CredentialUseError("a login for PostgreSQL is no HTTP header; apply() gives its DSN")

    def auth(self) -> httpx.Auth:
        raise CredentialUseError("a login for PostgreSQL is no HTTP header; apply() gives its DSN")


class MysqlCredential(IssuedCredential):
    """A temporary login at a MariaDB or MySQL server, kind `mysql`."""

    __slots__ = ()

    def apply(self) -> dict[str, Any]:
        """The arguments of `pymysql.connect(**credential.apply())`, and of `mysql.connector.connect`."""
        return mysql_arguments(self.usable())

    def headers(self, method: str | None = None, url: str | None = None) -> dict[str, str]:
        raise CredentialUseError(
            "a login for MySQL is no HTTP header; apply() gives the arguments of connect"
        )

    def auth(self) -> httpx.Auth:
        raise CredentialUseError(
            "a login for MySQL is no HTTP header; apply() gives the arguments of connect"
        )


def mysql_arguments(value: str) -> dict[str, Any]:
    """Return the arguments that PyMySQL and MySQL Connector have in common, for a credential of kind `mysql`."""
    url = urlsplit(value)
    sslmode = dict(parse_qsl(url.query)).get("sslmode")
    arguments: dict[str, Any] = {
        "host": url.hostname, "port": url.port or 3306, "user": unquote(url.username or ""),
        "password": unquote(url.password or ""), "database": unquote(url.path.removeprefix("/")) or None,
    }  # fmt: skip
    if sslmode in ("verify-ca", "verify-full"):
        arguments |= {"ssl_verify_cert": True, "ssl_verify_identity": sslmode == "verify-full"}
    return arguments


class RedisCredential(IssuedCredential):
    """A temporary user at a Valkey or Redis server, kind `redis`."""

    __slots__ = ()

    def apply(self) -> str:
        """The URL: `redis.asyncio.Redis.from_url(credential.apply())`."""
        return self.usable()

    def headers(self, method: str | None = None, url: str | None = None) -> dict[str, str]:
        raise CredentialUseError("a login for Redis is no HTTP header; apply() gives its URL")

    def auth(self) -> httpx.Auth:
        raise CredentialUseError("a login for Redis is no HTTP header; apply() gives its URL")


class SshCredential(IssuedCredential):
    """A temporary key and certificate for a host with an OpenSSH server, kind `ssh`."""

    __slots__ = ()

    def apply(self) -> AbstractContextManager[list[str]]:
        """`ssh -F FILE` as a list, in a block that the files last for. The host has the target's id.

        `with credential.apply() as ssh: subprocess.run([*ssh, credential.target, "uptime"])`
        """
        return ssh_client(self.usable(), self.target)

    def headers(self, method: str | None = None, url: str | None = None) -> dict[str, str]:
        raise CredentialUseError("a certificate for SSH is no HTTP header; apply() gives the command")

    def auth(self) -> httpx.Auth:
        raise CredentialUseError("a certificate for SSH is no HTTP header; apply() gives the command")


class GatewayCredential(IssuedCredential):
    """A lease of any kind whose credential the gateway injects. The agent holds its handle, which is no secret."""

    __slots__ = ()

    @property
    def handle(self) -> str:
        """The lease id, by which the gateway finds the credential."""
        return self.lease_id

    @property
    def value(self) -> str:
        raise CredentialUseError(
            "the credential went to the gateway, not to the agent: send the request through the gateway"
        )

    def usable(self) -> str:
        """The handle. Raises CredentialOverError if the lease has expired."""
        if self.clock.now_ms() >= self.expires_at * 1000:
            raise CredentialOverError(f"the time of lease {self.lease_id} is over; ask for a new one")
        return self.handle

    def apply(self) -> httpx.Auth:
        """The same as `auth`. Requests through the task's socket do not need it. Raises CredentialOverError."""
        self.usable()
        return self.auth()

    def headers(self, method: str | None = None, url: str | None = None) -> dict[str, str]:
        raise CredentialUseError(
            "the gateway demands a nonce of its own in each proof: use auth(), or the socket of the task"
        )

    def auth(self) -> httpx.Auth:
        """For httpx, with the gateway's URL: sends the handle with a DPoP proof by the agent's key."""
        from ringfence.client.agent.httpx_auth import DpopAuth, WhileUsable

        return WhileUsable(self.usable, DpopAuth(self.handle, self._bound_to(), clock=self.clock))


CLASSES: Mapping[str, type[IssuedCredential]] = {
    "jwt": TokenCredential,
    "mysql": MysqlCredential,
    "postgres": PostgresCredential,
    "redis": RedisCredential,
    "ssh": SshCredential,
}
"""By kind: every kind in `CREDENTIAL_KINDS` that is delivered to agents."""


def class_of(kind: str, delivery: Delivery) -> type[IssuedCredential]:
    """The SDK class for a credential of this kind and delivery."""
    return GatewayCredential if delivery == "gateway" else CLASSES.get(kind, IssuedCredential)


_IDENTITIES = re.compile(
    r"RINGFENCE_(?!KAFKA_)(IDENTITY|AGENT|ATTEST|RUN_INSTANCE|\w*KEY_(FILES?|DIR)|\w*TOKENS?(_FILE)?)",
    re.IGNORECASE,
)
"""The settings that name a key, a token or an identity, but for those of the connection to Kafka."""


def own_environment(
    inherited: Mapping[str, str],
    settings: ClientSettings,
    key: Path | None,
    attest: str | None,
    agent_id: str | None,
) -> dict[str, str]:
    """Return the environment for a command of an agent: `inherited`, with no identity but the agent's own.

    `key`, `attest` and `agent_id` are those of `Agent.connect`, whose choice this follows.
    """
    own: dict[str, Any]
    if key is None and attest is None and settings.run_instance is not None:
        own = {"RUN_INSTANCE": settings.run_instance, "AGENT": agent_id or settings.agent}
    elif key is None and (attest or settings.attest):
        own = {
            "ATTEST": attest or settings.attest,
            "AGENT": agent_id or settings.agent,
            "ATTEST_KEY_FILE": settings.attest_key_file,
        }
    else:
        file = key or settings.identity
        own = {"IDENTITY": file and file.absolute()}
    kept = {name: value for name, value in inherited.items() if not _IDENTITIES.fullmatch(name)}
    return kept | {f"RINGFENCE_{name}": str(value) for name, value in own.items() if value is not None}


@contextlib.contextmanager
def applied(credential: IssuedCredential) -> Iterator[dict[str, str]]:
    """Environment variables for one command, valid inside the block.

    `ssh`: `RINGFENCE_SSH_CONFIG`, a file for `ssh -F` in which the host has the target's id, and variables that make
        git and rsync use it. `mysql`: `MYSQL_HOME`, a folder with a `my.cnf` that the clients `mariadb`, `mysql` and
        `mysqldump` read. Any other kind: see `environment`.
    """
    if credential.kind == "mysql" and not isinstance(credential, GatewayCredential):
        with _private_folder() as folder:
            _write_private(folder / "my.cnf", _option_file(credential.value))
            yield environment(credential) | {"MYSQL_HOME": str(folder)}
        return
    if credential.kind != "ssh" or isinstance(credential, GatewayCredential):
        yield environment(credential)
        return
    with ssh_client(credential.value, credential.target) as use:
        use_it = shlex.join(use)
        yield {"RINGFENCE_SSH_CONFIG": use[-1], "GIT_SSH_COMMAND": use_it, "RSYNC_RSH": use_it}


def environment(credential: IssuedCredential) -> dict[str, str]:
    """Environment variables for one command, by the credential's kind.

    `postgres`: what libpq reads (psql, psycopg, asyncpg, JDBC wrappers and others), and `DATABASE_URL`. `mysql`:
        `DATABASE_URL`. `redis`: `REDIS_URL`. Any other kind: the value, e.g. the access token, in
        `RINGFENCE_CREDENTIAL`. A gateway lease of any kind: its handle in `RINGFENCE_LEASE`.
    """
    if isinstance(credential, GatewayCredential):
        return {"RINGFENCE_LEASE": credential.handle}
    return VARIABLES.get(credential.kind, _value)(credential.value)


def _value(value: str) -> dict[str, str]:
    return {"RINGFENCE_CREDENTIAL": value}


def _libpq(value: str) -> dict[str, str]:
    url = urlsplit(value)
    variables = {
        "PGHOST": url.hostname,
        "PGPORT": str(url.port) if url.port else None,
        "PGUSER": unquote(url.username or ""),
        "PGPASSWORD": unquote(url.password or ""),
        "PGDATABASE": unquote(url.path.removeprefix("/")),
        "PGSSLMODE": dict(parse_qsl(url.query)).get("sslmode"),
        "DATABASE_URL": value,
    }
    return {name: text for name, text in variables.items() if text}


_OPTIONS: Mapping[str, str] = {
    "require": "loose-ssl\nloose-ssl-mode = REQUIRED\n",
    "verify-ca": "loose-ssl\nloose-ssl-mode = VERIFY_CA\n",
    "verify-full": "loose-ssl-verify-server-cert\nloose-ssl-mode = VERIFY_IDENTITY\n",
}
"""By sslmode, the options of the clients of MariaDB and of MySQL. Each skips those of the other."""


def _option_file(value: str) -> str:
    login = mysql_arguments(value)
    lines = "".join(f"{name} = {login[name]}\n" for name in ("host", "port", "user", "password"))
    sslmode = dict(parse_qsl(urlsplit(value).query)).get("sslmode", "")
    database = f'[mysql]\ndatabase = "{login["database"]}"\n' if login["database"] else ""
    return f"[client]\n{lines}protocol = tcp\n{_OPTIONS.get(sslmode, '')}{database}"


def _mysql(value: str) -> dict[str, str]:
    return {"DATABASE_URL": value}


def _redis(value: str) -> dict[str, str]:
    return {"REDIS_URL": value}


VARIABLES: Mapping[str, Callable[[str], dict[str, str]]] = {
    "jwt": _value,
    "mysql": _mysql,
    "postgres": _libpq,
    "redis": _redis,
    "ssh": _value,
}
"""By kind, the function that makes the variables: every kind in `CREDENTIAL_KINDS` that is delivered to agents."""
