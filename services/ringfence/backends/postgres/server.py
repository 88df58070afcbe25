"""Ringfence's own connections to PostgreSQL servers, and what their errors mean. No error quotes what was sent."""

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
"""An asyncpg connection. The package has no types of its own."""
_MODES: Final[tuple[SslMode, ...]] = ("disable", "prefer", "require", "verify-ca", "verify-full")
_PARAMETERS: Final = frozenset({"sslmode", "sslrootcert", "host"})
_CONNECT_S: Final = 3.0
"""How long a connection may take, and the wait for a free one."""
_IDLE_S: Final = 60.0
_POOL: Final = 8
_TRIES: Final = 5
_LIMITS: Final = {
    "lock_timeout": "2s",  # a statement that waits for a table lets everybody else wait behind it
    "statement_timeout": "10s",
    "idle_in_transaction_session_timeout": "5s",  # of a process that died, on a machine that did not answer any more
}

_AGAIN: Final = frozenset({"XX000", "40001", "40P01", "55P03"})
"""Somebody else changed the same rights at the same time ("tuple concurrently updated"), or had a lock."""
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
"""What is wrong with one credential, and not with the server."""


@dataclass(frozen=True, slots=True)
class PostgresLogin:
    """Where and as whom Ringfence works: `postgresql://user:password@host:port/database?sslmode=...`."""

    host: str
    port: int
    user: str
    password: str
    database: str
    sslmode: SslMode
    root_certificate: str | None

    @classmethod
    def parse(cls, url: str) -> PostgresLogin:
        """Raises ValueError, which quotes no value."""
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
        host = query.get("host") or parts.hostname
        if parts.scheme not in ("postgresql", "postgres") or not host or not parts.username:
            raise ValueError("it is no postgresql://user:password@host:port/database")
        if unknown := set(query) - _PARAMETERS:
            raise ValueError(f"it has {', '.join(sorted(map(ascii, unknown)))}, which is not known here")
        # Whoever is in between could talk a connection out of TLS, and then out of the password.
        asked = query.get("sslmode") or ("prefer" if _is_local(host) else "verify-full")
        sslmode = next((mode for mode in _MODES if mode == asked), None)
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
        """What asyncpg is told. Raises OSError for a certificate that is not there."""
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
    """One server, as the broker's rights name it: a pool of connections for each database that is worked in."""

    def __init__(self, target_id: str, url: str) -> None:
        """Raises AccessError."""
        self.target_id = target_id
        try:
            self.login = PostgresLogin.parse(url)
            self._tls = self.login.tls()
        except (ValueError, OSError) as error:
            said = str(error) if type(error) is ValueError else "its root certificate cannot be read"
            raise AccessError(f"the rights at target {target_id} are wrong: {said}") from None
        self._pools: dict[str, Any] = {}

    async def run(self, database: str, work: Callable[[Connection], Awaitable[T]]) -> T:
        """What `work` returns, which may be done more than once. Raises TargetError, TargetRefusedError."""
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
                    raise self._meant(error, database) from None
                continue
            except (OSError, asyncpg.InterfaceError) as error:  # a TimeoutError too
                lost += 1
                problem = self._silent(error)
            if lost > 1:
                raise problem from None
            await self._pools[database].expire_connections()  # the others have died with it, likely

    async def close(self) -> None:
        """Disconnect, once what is under way is done."""
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
                # Nothing that an agent may have made is ever found by its bare name.
                server_settings={"search_path": "", "application_name": "ringfence", **_LIMITS},
            )
        return self._pools[database]

    def _silent(self, error: Exception) -> TargetError:
        return TargetError(f"target {self.target_id} does not answer ({type(error).__name__})")

    def _meant(self, error: asyncpg.PostgresError, database: str) -> TargetError | TargetRefusedError:
        state = str(error.sqlstate)
        why = _NOT_THIS.get(state)
        if state.startswith("28") and database != self.login.database:  # which agents choose
            why = "its role for Ringfence may not log in to this database"
        if why is not None:
            return TargetRefusedError(f"target {self.target_id} refuses: {why} ({state})")
        return TargetError(f"target {self.target_id} refuses ({state} {type(error).__name__})")


async def _keep(connection: Connection) -> None:
    """Nothing is set on a connection that would have to be set back."""


def _is_local(host: str) -> bool:
    """A socket or the loopback: nobody is in between."""
    return host.startswith("/") or host in ("localhost", "127.0.0.1", "::1")


# SCRAM-SHA-256 (RFC 5802, RFC 7677), the part of it that a server keeps.

ITERATIONS = 4096
"""What RFC 7677 asks for at least. Passwords here are random: more would only cost time."""


def verifier(password: str, *, salt: bytes | None = None) -> str:
    """What a server needs to check a password and cannot log in with, as PostgreSQL writes it.

    `password` is ASCII, which SASLprep leaves as it is. `salt` is random where not given.
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
