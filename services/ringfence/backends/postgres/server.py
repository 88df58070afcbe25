"""Connection pools of Ringfence to PostgreSQL servers, and the mapping of their errors.

No error quotes what was sent.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from ringfence.backends.secret_sources import AccessError
from ringfence.backends.target_settings import TargetError, TargetRefusedError
from ringfence.model.target_settings import SslMode

if TYPE_CHECKING:
    import asyncpg

T = TypeVar("T")
Connection = Any
"""An asyncpg connection. The package ships no types."""
_MODES: Final[tuple[SslMode, ...]] = ("disable", "prefer", "require", "verify-ca", "verify-full")
_PARAMETERS: Final = frozenset({"sslmode", "sslrootcert", "host"})
_CONNECT_S: Final = 3.0
"""The limit for opening a connection, and for waiting for a free one."""
_IDLE_S: Final = 60.0
_POOL: Final = 8
_TRIES: Final = 5
_LIMITS: Final = {
    "lock_timeout": "2s",  # a statement that waits for a table makes everybody else wait behind it
    "statement_timeout": "10s",
    "idle_in_transaction_session_timeout": "5s",  # locks of a process that died, on a machine that no longer answers
}

_AGAIN: Final = frozenset({"XX000", "40001", "40P01", "55P03"})
"""SQLSTATE codes to retry: another session changed the same rights ("tuple concurrently updated") or held a lock."""
_NOT_THIS: Final = {
    "42501": "its role for Ringfence may not give these rights",
    "0LP01": "its role for Ringfence may not give these rights",
    "3D000": "it has no such database",
    "42P01": "a table went away meanwhile",
    "55000": "it takes no connections to this database",
    "3F000": "a schema went away meanwhile",
    "42703": "a column went away meanwhile",
    "54000": "an object there has all the grants that PostgreSQL can keep for one",
}
"""SQLSTATE codes that concern one credential and not the server's health."""


@dataclass(frozen=True, slots=True)
class PostgresLogin:
    """Ringfence's own login: `postgresql://user:password@host:port/database?sslmode=...`."""

    host: str
    port: int
    user: str
    password: str
    database: str
    sslmode: SslMode
    root_certificate: str | None

    @classmethod
    def parse(cls, url: str) -> PostgresLogin:
        """Parse a URL. Raises ValueError, which quotes no value."""
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
        host = query.get("host") or parts.hostname
        if parts.scheme not in ("postgresql", "postgres") or not host or not parts.username:
            raise ValueError("it is no postgresql://user:password@host:port/database")
        if unknown := set(query) - _PARAMETERS:
            raise ValueError(f"it has {', '.join(sorted(map(ascii, unknown)))}, which is not known here")
        # An attacker in between could downgrade a connection from TLS, and then obtain the password.
        ssl_mode = query.get("sslmode") or ("prefer" if _is_local(host) else "verify-full")
        sslmode = next((mode for mode in _MODES if mode == ssl_mode), None)
        if sslmode is None:
            raise ValueError(f"its sslmode is none of {', '.join(_MODES)}")
        return cls(
            host,
            parts.port or 5432,
            unquote(parts.username),
            unquote(parts.password or ""),
            unquote(parts.path.removeprefix("/")) or "postgres",
            sslmode,
            query.get("sslrootcert"),
        )

    def tls(self) -> ssl.SSLContext | Literal["prefer"] | bool:
        """Return the `ssl` argument for asyncpg. Raises OSError for a missing certificate file."""
        if self.sslmode == "disable" or self.host.startswith("/"):
            return False
        if self.sslmode == "prefer":
            return "prefer"
        context = ssl.create_default_context(cafile=self.root_certificate)
        context.check_hostname = self.sslmode == "verify-full"
        if self.sslmode == "require":
            context.verify_mode = ssl.CERT_NONE
        return context


class PostgresServer:
    """One server, with a connection pool for each database in use."""

    def __init__(self, target_id: str, url: str) -> None:
        """Raises AccessError if the URL is unusable."""
        self.target_id = target_id
        try:
            self.login = PostgresLogin.parse(url)
            self._tls = self.login.tls()
        except (ValueError, OSError) as error:
            reason = str(error) if type(error) is ValueError else "its root certificate cannot be read"
            raise AccessError(f"the rights at target {target_id} are wrong: {reason}") from None
        self._pools: dict[str, Any] = {}

    async def run(self, database: str, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Run `work` and return its result. `work` may run more than once. Raises TargetError, TargetRefusedError."""
        import asyncpg

        conflicts = lost = 0
        while True:
            try:
                async with (await self._pool(database)).acquire(timeout=_CONNECT_S) as connection:
                    return await work(connection)
            except asyncpg.PostgresConnectionError as error:
                lost += 1
                problem = self._silent(error)
            except asyncpg.PostgresError as error:
                conflicts += 1
                if error.sqlstate not in _AGAIN or conflicts == _TRIES:
                    raise self._translate_error(error, database) from None
                continue
            except (OSError, asyncpg.InterfaceError) as error:  # a TimeoutError too
                lost += 1
                problem = self._silent(error)
            if lost > 1:
                raise problem from None
            await self._pools[database].expire_connections()  # the others have probably died with it

    async def close(self) -> None:
        """Disconnect after running calls have ended."""
        for database in list(self._pools):
            pool = self._pools.pop(database)
            await pool.close()

    async def _pool(self, database: str) -> Any:
        import asyncpg

        if database not in self._pools:
            login = self.login
            self._pools[database] = await asyncpg.create_pool(
                host=login.host,
                port=login.port,
                user=login.user,
                password=login.password,
                database=database,
                ssl=self._tls,
                timeout=_CONNECT_S,
                min_size=0,
                max_size=_POOL,
                max_inactive_connection_lifetime=_IDLE_S,
                reset=_keep,
                # No object that an agent may have made is found by its unqualified name.
                server_settings={"search_path": "", "application_name": "ringfence", **_LIMITS},
            )
        return self._pools[database]

    def _silent(self, error: Exception) -> TargetError:
        return TargetError(f"target {self.target_id} does not answer ({type(error).__name__})")

    def _translate_error(
        self, error: asyncpg.PostgresError, database: str
    ) -> TargetError | TargetRefusedError:
        state = str(error.sqlstate)
        reason = _NOT_THIS.get(state)
        if state.startswith("28") and database != self.login.database:  # agents choose them
            reason = "its role for Ringfence may not log in to this database"
        if reason is not None:
            return TargetRefusedError(f"target {self.target_id} refuses: {reason} ({state})")
        return TargetError(f"target {self.target_id} refuses ({state} {type(error).__name__})")


async def _keep(connection: Connection) -> None:
    """Do nothing on return to the pool: no call leaves session state behind that would need a reset."""


def _is_local(host: str) -> bool:
    """Return whether the host is a socket or the loopback, where nobody can listen in between."""
    return host.startswith("/") or host in ("localhost", "127.0.0.1", "::1")


# SCRAM-SHA-256 (RFC 5802, RFC 7677): the part that a server stores.

ITERATIONS = 4096
"""The minimum of RFC 7677. Passwords here are random, so more iterations would only cost time."""


def verifier(password: str, *, salt: bytes | None = None) -> str:
    """Return the SCRAM verifier of a password, in PostgreSQL's format. It can check a password, but not log in.

    `password` is ASCII, which SASLprep leaves unchanged. `salt` is random by default.
    """
    salt = secrets.token_bytes(16) if salt is None else salt
    salted = hashlib.pbkdf2_hmac("sha256", password.encode("ascii"), salt, ITERATIONS)
    stored_key = hashlib.sha256(_hmac(salted, b"Client Key")).digest()
    server_key = _hmac(salted, b"Server Key")
    return f"SCRAM-SHA-256${ITERATIONS}:{_text(salt)}${_text(stored_key)}:{_text(server_key)}"


def _hmac(key: bytes, text: bytes) -> bytes:
    return hmac.digest(key, text, "sha256")


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")
