"""Backend for PostgreSQL (14 or newer): a role for each credential, dropped with its lease, together with its sessions.

One transaction creates the role and grants what the scope says on existing objects; `privileges.py` defines what the
verbs mean. Then it asks the server two things: has the role all of these rights, and does PUBLIC, which every role
belongs to, give anything beyond them? If the rights are not exact, the transaction is rolled back.

A role has one password. So a second mint for the same lease creates one more role with the same rights; all roles named
after a lease belong to it. `VALID UNTIL` ends logins at the deadline even if Ringfence is down. Sessions end when the
lease is undone.

Connection pools of Ringfence to PostgreSQL servers, and the mapping of their errors.

No error quotes what was sent.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, TypeVar
from uuid import UUID

from ringfence.backends.database import DatabaseLogin, agent_address, agent_sslmode, agent_url
from ringfence.backends.http import ConnectionCache
from ringfence.backends.postgres import privileges as queries
from ringfence.backends.postgres.privileges import (
    PrivilegePlan,
    Relation,
    RelationColumn,
    Right,
    grants,
    plan,
    quoted,
    rights,
)
from ringfence.backends.secret_sources import TargetAccess
from ringfence.backends.target_settings import (
    InexactError,
    TargetError,
    TargetRefusedError,
    problem_of,
    settings_of,
)
from ringfence.kernel.base.clock import utc_datetime
from ringfence.messages.credential import Credential
from ringfence.messages.lease import Lease
from ringfence.messages.registry import TargetState
from ringfence.model.target_settings import Owned, PostgresSettings

if TYPE_CHECKING:
    import asyncpg

T = TypeVar("T")
Connection = Any
"""An asyncpg connection. The package ships no types."""
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


class PostgresServer:
    """One server, with a connection pool for each database in use."""

    def __init__(self, target_id: str, url: str) -> None:
        """Raises AccessError if the URL is unusable."""
        self.target_id = target_id
        login = DatabaseLogin.of_target(target_id, url, ("postgresql", "postgres"), 5432)
        self.login = login if login.database else replace(login, database="postgres")
        self._tls = self.login.tls() or False
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


log = logging.getLogger(__name__)


_NAME: Final = re.compile(r"ringfence_[0-9a-f]{10}_[0-9a-f]{32}_[0-9a-f]{6}_[dk]")
_OWNED: Final[dict[str, Owned]] = {"d": "drop", "k": "keep"}
LOCK: Final = 0x72696E6766656E63
"""The key of the advisory lock. Two concurrent changes of the rights on one object would fail for one of them."""
_END_WITHIN_S: Final = 2.0
"""How long a session may take to end after it was told to."""
_DEPENDENT: Final = "2BP01"


class PostgresBackend:
    """Mints roles whose password only the agent knows: the server receives the SCRAM verifier."""

    kind: ClassVar[str] = "postgres"
    enforced_by: ClassVar[Literal["target", "gateway"]] = "target"
    own_expiry: ClassVar[Literal["all", "logins", "none"]] = "logins"
    stateless: ClassVar[bool] = False

    def __init__(self, trust_domain: str, access: TargetAccess) -> None:
        # At most 63 bytes with the suffix, and only characters without a meaning in any pattern.
        self._prefix = f"ringfence_{hashlib.sha256(trust_domain.encode()).hexdigest()[:10]}_"
        self._access = access
        self._servers = ConnectionCache(access, PostgresServer)

    def roles_of(self, lease_id: str) -> str:
        """Return the prefix of the names of all roles of a lease.

        It also separates trust domains that share a server.
        """
        return f"{self._prefix}{UUID(lease_id).hex}_"

    def revocability(self, target: TargetState) -> Literal["instant", "session", "ttl"]:
        """Return `session`: open sessions are ended too."""
        return "session"

    def problem(self, lease: Lease, target: TargetState) -> str | None:
        """Return the reason why exactly this credential cannot be made, as far as it shows without the server, or
        None.
        """
        return problem_of(plan, lease.scope, target, PostgresSettings, self._access)

    async def mint(self, lease: Lease, target: TargetState) -> Credential:
        """Create a role with a new password, and return its URL.

        A second call for the same lease creates one more role.

        Raises TargetError, TargetRefusedError, AccessError, TargetSettingsError.
        """
        settings = settings_of(target, PostgresSettings)
        server = await self._servers.at(lease.target_id)
        address = agent_address(server.target_id, server.login, settings)
        letter = next(letter for letter, owned in _OWNED.items() if owned == settings.owned)
        role, password = (
            f"{self.roles_of(lease.lease_id)}{secrets.token_hex(3)}_{letter}",
            secrets.token_urlsafe(32),
        )
        secret = verifier(password)

        async def make(connection: Connection) -> bool:
            async with connection.transaction():
                return await _make(connection, role, secret, privileges, lease.deadline, settings)

        try:
            privileges = plan(lease.scope)
            encrypted = await server.run(privileges.database, make)
        except InexactError as error:
            raise TargetRefusedError(str(error)) from None
        sslmode = agent_sslmode(server.login, settings, encrypted=encrypted)
        return Credential(
            kind=self.kind,
            value=agent_url("postgresql", role, password, address, privileges.database, sslmode),
            expires_at=lease.deadline,
        )

    async def undo(self, lease_id: str, *, target_id: str) -> None:
        """Lock out the roles of a lease, end their sessions, revoke their rights, drop what they own, and drop the
        roles.

        Raises TargetError, TargetRefusedError, AccessError.
        """
        server = await self._servers.at(target_id)
        own = server.login.database
        for oid, role, databases in await server.run(
            own, partial(_roles_after_lock, prefix=self.roles_of(lease_id))
        ):
            await server.run(own, partial(_lock_out, role=role, oid=oid))
            for database in databases:
                await server.run(database, partial(_disown, role=role))
            await server.run(own, partial(_drop, role=role, oid=oid))

    async def existing(self, target_id: str) -> frozenset[str]:
        """Return the leases that have a role at the target. Raises TargetError, AccessError."""
        server = await self._servers.at(target_id)
        roles = await server.run(server.login.database, partial(_roles_with_prefix, prefix=self._prefix))
        return frozenset(str(UUID(role.removeprefix(self._prefix)[:32])) for _, role, _ in roles)

    standing = existing

    async def close(self) -> None:
        await self._servers.close()


# --- making -----------------------------------------------------------------------------------------------------------


async def _make(
    connection: Connection,
    role: str,
    secret: str,
    privileges: PrivilegePlan,
    deadline_s: int,
    settings: PostgresSettings,
) -> bool:
    """Create a role with exactly the planned rights.

    Returns whether the connection is encrypted. Raises InexactError.
    """
    here = await connection.fetchrow(queries.HERE, LOCK)
    if here["name"] != privileges.database:  # a proxy in between may rename databases
        raise InexactError(f"there is no database {privileges.database!a}")
    granted = await _resolved(connection, privileges, here["oid"])
    until = utc_datetime(deadline_s).strftime("%Y-%m-%d %H:%M:%S+00")
    statements = [
        f"CREATE ROLE {quoted(role)} LOGIN CONNECTION LIMIT {settings.connection_limit}"
        f" PASSWORD '{secret}' VALID UNTIL '{until}'",
        f"ALTER ROLE {quoted(role)} SET statement_timeout = '{settings.statement_timeout_s}s'",
        *grants(role, privileges.database, granted),
    ]
    await connection.execute("; ".join(statements))
    await _check(connection, role, granted, settings)
    return bool(here["encrypted"])


async def _resolved(connection: Connection, privileges: PrivilegePlan, database_oid: int) -> list[Right]:
    """Return the rights that the plan means, on the objects that exist now."""
    schemas = [
        (row["oid"], row["name"]) for row in await connection.fetch(queries.SCHEMAS, privileges.schemas)
    ]
    rows = await connection.fetch(queries.RELATIONS, privileges.schemas, privileges.relations)
    relations = {
        row["oid"]: Relation(row["oid"], row["schema"], row["name"], row["sequence"]) for row in rows
    }
    columns: list[RelationColumn] = []
    if any(request.wants_columns for request in privileges.requests):
        fetched = await connection.fetch(queries.COLUMNS, list(relations))
        columns = [RelationColumn(relations[row["relation"]], row["number"], row["name"]) for row in fetched]
    return rights(privileges, database_oid, schemas, list(relations.values()), columns)


async def _check(
    connection: Connection, role: str, granted: Sequence[Right], settings: PostgresSettings
) -> None:
    """Raise InexactError if the role has fewer rights than granted, or more through PUBLIC."""
    arguments = (
        [right.level for right in granted],
        [right.oid for right in granted],
        [right.column for right in granted],
        [right.right for right in granted],
    )
    # GRANT gives what the grantor may give, and only warns about the rest.
    missing_right = await connection.fetchval(queries.LACKING, role, *arguments)
    if missing_right is not None:
        right = granted[missing_right - 1]
        what = "/".join(filter(None, (right.schema, right.table, right.column_name))) or "the database"
        raise InexactError(f"Ringfence's own role may not give {right.right} on {what!a}; ask an operator")
    if settings.public == "refuse":
        beyond = await connection.fetchrow(queries.BEYOND, *arguments)
        if beyond is not None:
            raise InexactError(
                f"every role may {beyond['may']} {beyond['what']!a}, which is beyond the scope; ask an operator "
                "to revoke it from PUBLIC"
            )


# --- undoing ----------------------------------------------------------------------------------------------------------


async def _roles_with_prefix(connection: Connection, prefix: str) -> list[tuple[int, str, list[str]]]:
    """Return the roles with this name prefix, and the databases in which they own something or have rights."""
    rows = await connection.fetch(queries.ROLES, prefix)
    return [(row["oid"], row["name"], row["databases"]) for row in rows if _NAME.fullmatch(row["name"])]


async def _roles_after_lock(connection: Connection, prefix: str) -> list[tuple[int, str, list[str]]]:
    """Return the same, after every role being created in this database is visible.

    The process that created a role may have died before it received the result.
    """
    async with connection.transaction():
        await connection.execute(f"SELECT pg_catalog.pg_advisory_xact_lock({LOCK})")
        return await _roles_with_prefix(connection, prefix)


async def _lock_out(connection: Connection, role: str, oid: int) -> None:
    try:
        # Only now does Ringfence's own role become a member of it, to end its sessions and to drop what it owns.
        # As a member of every live role, it would make the server check each of them at every GRANT.
        await connection.execute(f"ALTER ROLE {quoted(role)} NOLOGIN; GRANT {quoted(role)} TO CURRENT_USER")
    except Exception as error:
        if not _is_gone(error):
            raise
    await _end_sessions(connection, oid)


async def _end_sessions(connection: Connection, oid: int) -> None:
    """Wait for a short time until the sessions are gone. A stuck session keeps no rights once the role is dropped."""
    # The server's own wait checks only once in 100 ms.
    delay_s = 0.001
    while delay_s < _END_WITHIN_S and await connection.fetch(queries.TERMINATE, oid):
        await asyncio.sleep(delay_s)
        delay_s *= 2


async def _disown(connection: Connection, role: str) -> None:
    """Revoke everything that a role has, and drop everything that it owns, in this database."""
    name = quoted(role)
    drop = f"DROP OWNED BY {name}"
    keep = f"REASSIGN OWNED BY {name} TO CURRENT_USER; {drop}"
    try:
        if _OWNED[role[-1]] == "keep":
            await _locked(connection, keep)
            return
        try:
            await _locked(connection, drop)
        except Exception as error:
            if getattr(error, "sqlstate", "") != _DEPENDENT:
                raise
            # Another role's objects depend on it: they are not taken away.
            log.warning("what role %s made is kept: others depend on it", role)
            await _locked(connection, keep)
    except Exception as error:
        if not _is_gone(error):
            raise


async def _locked(connection: Connection, statements: str) -> None:
    await connection.execute(f"SELECT pg_catalog.pg_advisory_xact_lock({LOCK}); {statements}")


async def _drop(connection: Connection, role: str, oid: int) -> None:
    await connection.execute(f"DROP ROLE IF EXISTS {quoted(role)}")
    await _end_sessions(connection, oid)  # a session that was logging in during the lockout


def _is_gone(error: Exception) -> bool:
    # undefined_object: another process undoes it concurrently
    return getattr(error, "sqlstate", "") == "42704"
