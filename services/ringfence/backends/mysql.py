"""Backend for MariaDB (10.6 or newer) and MySQL: a user for each credential, dropped with its lease, and then its
sessions are killed.

The servers have no transactions for users and grants, so the order keeps the lease exact: the user is created without
any right and with a hash of its password, then each right is granted, and the password leaves this process only if all
were. A user has one password, so a second mint for the same lease creates one more user.

A mint holds an advisory lock of its lease (`GET_LOCK`) while it works. To undo a lease first kills the session that
holds it, if it is one of Ringfence's own: what a dead issuer had sent creates no user afterwards.

PyMySQL blocks, so each statement runs in a thread. A cancelled call shuts its connection down, and sends no more.

No error quotes what was sent.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import secrets
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, ClassVar, Final, Literal, NamedTuple
from urllib.parse import quote
from uuid import UUID

from ringfence.backends.database import (
    DatabaseLogin,
    PrivilegeRequest,
    Privileges,
    agent_address,
    agent_sslmode,
    agent_url,
    requests_of,
)
from ringfence.backends.http import ConnectionCache
from ringfence.backends.secret_sources import TargetAccess
from ringfence.backends.target_settings import (
    InexactError,
    TargetError,
    TargetRefusedError,
    problem_of,
    settings_of,
)
from ringfence.messages.base import Permission
from ringfence.messages.credential import Credential
from ringfence.messages.lease import Lease
from ringfence.messages.registry import TargetState
from ringfence.model.target_settings import MysqlSettings

RIGHTS: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    "read": {"table": ("SELECT",), "column": ("SELECT",)},
    "write": {"table": ("INSERT", "UPDATE", "DELETE"), "column": ("INSERT", "UPDATE")},
    "select": {"table": ("SELECT",), "column": ("SELECT",)},
    "insert": {"table": ("INSERT",), "column": ("INSERT",)},
    "update": {"table": ("UPDATE",), "column": ("UPDATE",)},
    "delete": {"table": ("DELETE",)},
}
"""The server's privileges by verb and kind of object."""
_KNOWN: Final = Privileges(RIGHTS, {"table": 2, "column": 3}, 64, len, "characters", "database/table")
MAX_RIGHTS: Final = 2000
"""Each object takes one statement."""
_SYSTEM: Final = frozenset({"information_schema", "mysql", "performance_schema", "sys"})

_USER: Final = re.compile(r"rf[A-Za-z0-9_-]{30}")
"""MySQL's names of users have at most 32 characters."""
_LEASE_CHARACTERS: Final = 22
_CONNECT_S: Final = 3
_ANSWER_S: Final = 10
_KILLED_WITHIN_S: Final = 5.0
_SESSION: Final = (
    # A lock on a table makes everybody else wait behind it; the session of a process that died must end.
    "SET SESSION lock_wait_timeout = 2, wait_timeout = 20, sql_mode = ''"
    # Else MariaDB would create, without a password, a user that was dropped in between.
    " /*M! , sql_mode = 'NO_AUTO_CREATE_USER' */"
)
_NO_SUCH_GRANT: Final = 1141
_NO_SUCH_THREAD: Final = 1094
_NOT_THIS: Final = {
    1044: "its user for Ringfence may not give these rights",
    1142: "its user for Ringfence may not give these rights",
    1143: "its user for Ringfence may not give these rights",
    1054: "a column went away meanwhile",
    1146: "a table went away meanwhile",
}
"""Errors that concern one credential and not the server's health."""
_CLIENT_ERRORS: Final = range(2000, 3000)
"""Errors of the connection."""


class Grant(NamedTuple):
    """Privileges on one table, or on columns of it: `SELECT (id)`."""

    database: str
    table: str
    privileges: tuple[str, ...]

    def statement(self, account: str) -> str:
        """Return the SQL. `account`: the user, as SQL."""
        return f"GRANT {', '.join(self.privileges)} ON TABLE {quoted(self.database)}.{quoted(self.table)} TO {account}"


def plan(scope: Iterable[Permission]) -> tuple[PrivilegeRequest, ...]:
    """Parse a scope without access to a server. Raises InexactError."""
    requests = requests_of(scope, _KNOWN)
    for request in requests:
        if request.glob.segments[0].lower() in _SYSTEM:
            raise InexactError(f"{request}: the databases of the server itself are in no lease")
    return requests


def grants(
    requests: Iterable[PrivilegeRequest],
    tables: Sequence[tuple[str, str]],
    columns: Sequence[tuple[str, str, str]],
) -> list[Grant]:
    """Return the grants that requests mean on the objects that exist.

    `tables` are pairs of database and table, `columns` have a name more. Raises InexactError if a request matches
    nothing that exists, or more than `MAX_RIGHTS`.
    """
    found: dict[tuple[str, str], dict[str, None]] = {}
    for request in requests:
        matching = list(_privileges(request, tables, columns))
        if not matching:
            raise InexactError(f"{request} means nothing that is there now")
        for database, table, privilege in matching:
            found.setdefault((database, table), {})[privilege] = None
        if sum(map(len, found.values())) > MAX_RIGHTS:
            raise InexactError(f"the scope means more than {MAX_RIGHTS} rights: ask for less at a time")
    return [Grant(database, table, tuple(privileges)) for (database, table), privileges in found.items()]


def _privileges(
    request: PrivilegeRequest,
    tables: Sequence[tuple[str, str]],
    columns: Sequence[tuple[str, str, str]],
) -> Iterator[tuple[str, str, str]]:
    whole = {table for table in tables if request.rights("table") and request.covers(*table)}
    for database, table in sorted(whole):
        for privilege in request.rights("table"):
            yield database, table, privilege
    for database, table, column in columns if request.wants_columns else ():
        if (database, table) not in whole and request.covers(database, table, column):
            for privilege in request.rights("column"):
                yield database, table, f"{privilege} ({quoted(column)})"


def quoted(name: str) -> str:
    """Return a name as a quoted SQL identifier, whatever it contains."""
    return "`" + name.replace("`", "``") + "`"


def password_hash(password: str) -> str:
    """Return what the plug-in `mysql_native_password` stores: SHA-1 twice. The server checks a password by it."""
    return "*" + hashlib.sha1(hashlib.sha1(password.encode("ascii")).digest()).hexdigest().upper()  # noqa: S324


# --- the server -------------------------------------------------------------------------------------------------------


class _Server:
    def __init__(self, target_id: str, url: str) -> None:
        """Raises AccessError if the URL is unusable."""
        self.target_id = target_id
        self.login = DatabaseLogin.of_target(target_id, url, ("mysql", "mariadb"), 3306)

    @asynccontextmanager
    async def session(self) -> AsyncIterator[_Session]:
        """A connection for one call. Raises TargetError."""
        session = await asyncio.to_thread(_Session, self)
        try:
            yield session
        except asyncio.CancelledError:
            session.shut()
            raise
        finally:
            await asyncio.shield(asyncio.to_thread(session.close))

    async def close(self) -> None:
        """Do nothing: each call has a connection of its own."""


class _Session:
    """One connection, in which one statement runs at a time."""

    def __init__(self, server: _Server) -> None:
        """Connect, which blocks. Raises TargetError."""
        import pymysql

        self._server, login = server, server.login
        tls = login.tls()
        with self._errors():
            if login.host.startswith("/"):
                stream = socket.socket(socket.AF_UNIX)
                stream.settimeout(_CONNECT_S)
                stream.connect(login.host)
            else:
                stream = socket.create_connection((login.host, login.port), _CONNECT_S)
            # TLS takes the socket over: this one shuts the same connection down.
            self._handle = stream.dup()
            stream.settimeout(None)
            self._connection: Any = pymysql.connect(
                host=login.host, user=login.user, password=login.password, database=login.database or None,
                charset="utf8mb4", autocommit=True, init_command=_SESSION, connect_timeout=_CONNECT_S,
                read_timeout=_ANSWER_S, write_timeout=_ANSWER_S, defer_connect=True,
                **({"ssl": tls} if isinstance(tls, ssl.SSLContext) else {"ssl_disabled": tls is None}),
            )  # fmt: skip
            self._connection.connect(stream)

    async def rows(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """Run a statement, and return its rows. Raises TargetError, TargetRefusedError."""
        return await asyncio.to_thread(self._rows, statement, values)

    def _rows(self, statement: str, values: tuple[object, ...]) -> list[tuple[Any, ...]]:
        with self._errors(), self._connection.cursor() as cursor:
            cursor.execute(statement, values or None)
            return list(cursor.fetchall())

    def literal(self, text: str) -> str:
        return str(self._connection.escape(text))

    def shut(self) -> None:
        """End it under a statement that runs."""
        with suppress(OSError):
            self._handle.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._handle.close()
        with suppress(Exception):
            self._connection.close()

    def _errors(self) -> _Translated:
        return _Translated(self._server.target_id)


class _Translated:
    """A context in which the driver's errors become those of targets."""

    def __init__(self, target_id: str) -> None:
        self._target_id = target_id

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        import pymysql

        if not isinstance(error, OSError | EOFError | pymysql.err.MySQLError):
            return
        code = error.args[0] if isinstance(error, pymysql.err.MySQLError) and error.args else 0
        if not isinstance(code, int) or code == 0 or code in _CLIENT_ERRORS:
            raise TargetError(f"target {self._target_id} does not answer ({type(error).__name__})") from None
        if code in _NOT_THIS:
            raise TargetRefusedError(
                f"target {self._target_id} refuses: {_NOT_THIS[code]} ({code})"
            ) from None
        raise _AnsweredError(
            f"target {self._target_id} refuses ({code} {type(error).__name__})", code
        ) from None


class _AnsweredError(TargetError):
    """Raised when the server answered with an error that is not about one credential."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.number = code


# --- the backend ------------------------------------------------------------------------------------------------------


class MysqlBackend:
    """Mints users whose password only the agent knows: the server receives its hash."""

    kind: ClassVar[str] = "mysql"
    enforced_by: ClassVar[Literal["target", "gateway"]] = "target"
    own_expiry: ClassVar[Literal["all", "logins", "none"]] = "none"
    stateless: ClassVar[bool] = False

    def __init__(self, trust_domain: str, access: TargetAccess) -> None:
        self._prefix = "rf" + _text(hashlib.sha256(trust_domain.encode()).digest())[:5]
        self._access = access
        self._servers = ConnectionCache(access, _Server)

    def users_of(self, lease_id: str) -> str:
        """Return the prefix of the names of all users of a lease.

        It also separates trust domains that share a server.
        """
        return self._prefix + _text(UUID(lease_id).bytes)

    def revocability(self, target: TargetState) -> Literal["instant", "session", "ttl"]:
        """Return `session`: open sessions are ended too."""
        return "session"

    def problem(self, lease: Lease, target: TargetState) -> str | None:
        """Return the reason why exactly this credential cannot be made, as far as it shows without the server, or
        None.
        """
        return problem_of(plan, lease.scope, target, MysqlSettings, self._access)

    async def mint(self, lease: Lease, target: TargetState) -> Credential:
        """Create a user with a new password, and return its URL.

        A second call for the same lease creates one more user.

        Raises TargetError, TargetRefusedError, AccessError, TargetSettingsError.
        """
        settings = settings_of(target, MysqlSettings)
        server = await self._servers.at(lease.target_id)
        address = agent_address(server.target_id, server.login, settings)
        lease_users = self.users_of(lease.lease_id)
        user, password = lease_users + _text(secrets.token_bytes(3))[:3], secrets.token_urlsafe(32)
        try:
            requests = plan(lease.scope)
            async with server.session() as session:
                encrypted = await _is_encrypted(session)
                sslmode = agent_sslmode(server.login, settings, encrypted=encrypted)
                if await session.rows("SELECT GET_LOCK(%s, 5)", lease_users) != [(1,)]:
                    raise TargetRefusedError(f"another credential of lease {lease.lease_id} is being made")
                wanted = await _resolved(session, requests)
                await _check_public(session, settings)
                account = f"{session.literal(user)}@{session.literal(settings.host)}"
                tls = "NONE" if sslmode in (None, "disable", "prefer") else "SSL"
                await session.rows(
                    f"CREATE USER {account} IDENTIFIED WITH mysql_native_password AS '{password_hash(password)}'"
                    f" REQUIRE {tls} WITH MAX_USER_CONNECTIONS {settings.connection_limit}"
                )
                try:
                    for grant in wanted:
                        await session.rows(grant.statement(account))
                except TargetRefusedError:
                    await session.rows(f"DROP USER IF EXISTS {account}")
                    raise
        except InexactError as error:
            raise TargetRefusedError(str(error)) from None
        databases = {grant.database for grant in wanted}
        database = databases.pop() if len(databases) == 1 else ""
        return Credential(
            kind=self.kind,
            value=agent_url("mysql", quote(user), password, address, database, sslmode),
            expires_at=lease.deadline,
        )

    async def undo(self, lease_id: str, *, target_id: str) -> None:
        """Drop the users of a lease, then kill their sessions.

        Raises TargetError, TargetRefusedError, AccessError.
        """
        server = await self._servers.at(target_id)
        prefix = self.users_of(lease_id)
        async with server.session() as session:

            async def mints(sessions: list[tuple[int, str]]) -> list[int]:
                holder = (await session.rows("SELECT IS_USED_LOCK(%s)", prefix))[0][0]
                # An agent could take the lock, and would hinder nothing but a further mint of its own lease.
                return [number for number, user in sessions if number == holder and user == server.login.user]

            async def logins(sessions: list[tuple[int, str]]) -> list[int]:
                return [number for number, user in sessions if user.startswith(prefix)]

            await _kill(session, mints)
            for user, host in await _users(session, prefix):
                await session.rows(f"DROP USER IF EXISTS {session.literal(user)}@{session.literal(host)}")
            await _kill(session, logins)

    async def existing(self, target_id: str) -> frozenset[str]:
        """Return the leases that have a user or a session at the target. Raises TargetError, AccessError."""
        server = await self._servers.at(target_id)
        async with server.session() as session:
            names = {user for user, _ in await _users(session, self._prefix)}
            names |= {user for _, user in await _sessions(session) if user.startswith(self._prefix)}
        return frozenset(lease_of(name) for name in names if _USER.fullmatch(name))

    standing = existing

    async def close(self) -> None:
        await self._servers.close()


def _text(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).decode("ascii").rstrip("=")


def lease_of(user: str) -> str:
    """Return the id of the lease that a user is for, by the user's name."""
    return str(UUID(bytes=base64.urlsafe_b64decode(user[7 : 7 + _LEASE_CHARACTERS] + "==")))


async def _is_encrypted(session: _Session) -> bool:
    return any(value for _, value in await session.rows("SHOW SESSION STATUS LIKE 'Ssl_cipher'"))


async def _resolved(session: _Session, requests: Sequence[PrivilegeRequest]) -> list[Grant]:
    """Return the grants that the requests mean, on the objects that exist now. Raises InexactError."""
    databases = sorted({request.glob.segments[0] for request in requests})
    places = f"WHERE TABLE_SCHEMA IN ({', '.join(['%s'] * len(databases))})"
    # The server compares names without case; those of the catalogue alone are meant.
    tables = await session.rows(
        f"SELECT TABLE_SCHEMA, TABLE_NAME FROM information_schema.TABLES {places}",  # noqa: S608 - placeholders
        *databases,
    )
    columns: list[tuple[Any, ...]] = []
    if any(request.wants_columns for request in requests):
        columns = await session.rows(
            f"SELECT TABLE_SCHEMA, TABLE_NAME, COLUMN_NAME FROM information_schema.COLUMNS {places}",  # noqa: S608
            *databases,
        )
    return grants(requests, [(one[0], one[1]) for one in tables], [(*one[:2], one[2]) for one in columns])


async def _check_public(session: _Session, settings: MysqlSettings) -> None:
    """Raise InexactError if each user has rights: by the role PUBLIC, an anonymous user, or mandatory roles."""
    if settings.public == "accept":
        return
    try:
        public = [row[0] for row in await session.rows("SHOW GRANTS FOR PUBLIC")]
    except _AnsweredError as error:  # before MariaDB 10.11 there is no such role, and none in MySQL
        if error.number != _NO_SUCH_GRANT:
            raise
        public = []
    anonymous = await session.rows("SELECT Db FROM mysql.db WHERE User = ''")
    mandatory = [row[1] for row in await session.rows("SHOW GLOBAL VARIABLES LIKE 'mandatory_roles'")]
    if any(not grant.startswith("GRANT USAGE ") for grant in public) or anonymous or any(mandatory):
        raise InexactError(
            "every user has rights here, by PUBLIC, an anonymous user or mandatory roles, which are beyond the scope; "
            "ask an operator to revoke them"
        )


async def _users(session: _Session, prefix: str) -> list[tuple[str, str]]:
    """Return name and host of the users with this name prefix."""
    found = await session.rows("SELECT User, Host FROM mysql.user WHERE LEFT(User, 2) = 'rf'")
    return [
        (user, host) for user, host in map(_texts, found) if user.startswith(prefix) and _USER.fullmatch(user)
    ]


async def _sessions(session: _Session) -> list[tuple[int, str]]:
    """Return number and user of all sessions of the server."""
    return [(int(row[0]), _texts(row[1:2])[0]) for row in await session.rows("SHOW PROCESSLIST")]


def _texts(row: Iterable[Any]) -> tuple[str, ...]:
    return tuple(one.decode("utf-8", "replace") if isinstance(one, bytes) else str(one) for one in row)


async def _kill(session: _Session, choice: Callable[[list[tuple[int, str]]], Any]) -> None:
    """End the sessions of a choice, and wait until they are gone. Raises TargetError if they stay."""
    delay_s = 0.001
    while True:
        sessions = await _sessions(session)
        chosen = await choice(sessions)
        # One that logs in at this moment has no name yet.
        if not chosen and (delay_s > 0.1 or all(user != "unauthenticated user" for _, user in sessions)):
            return
        for number in chosen:
            try:
                await session.rows(f"KILL {number}")
            except _AnsweredError as error:
                if error.number != _NO_SUCH_THREAD:
                    raise
        if delay_s > _KILLED_WITHIN_S:
            raise TargetError("sessions at the target do not end; the next try looks again")
        await asyncio.sleep(delay_s)
        delay_s *= 2
