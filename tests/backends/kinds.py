"""What the conformance suite has to know of each kind of backend: its real server, and what can be done there.

A permission of the suite is about one of a few things: `a`, which is read, `b`, which is read and written, and
whatever else there is at the target, which no lease allows. What is done with them is an act, in the target's words.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar, cast
from urllib.parse import quote, urlsplit

import asyncpg
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError

from ringfence.backends import (
    Backend,
    HttpBackend,
    JwtBackend,
    MysqlBackend,
    PostgresBackend,
    RedisBackend,
    SshBackend,
    TargetAccess,
    TargetRefusedError,
    TokenKey,
    TokenKeys,
)
from ringfence.backends.mysql import lease_of
from ringfence.backends.ssh.certificates import private_text, public_text
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.base import Permission
from ringfence.messages.credential import Credential
from ringfence.messages.lease import Lease
from ringfence.messages.registry import BackendSettings, TargetRecord, TargetState
from ringfence.model.scope.globs import parse_glob
from tests.backends.gated import SECRET, Gated
from tests.support.servers import mariadb, postgres, ssh
from tests.support.servers.mariadb import MariadbTarget
from tests.support.servers.postgres import PostgresTarget
from tests.support.servers.redis_target import ValkeyTarget
from tests.support.servers.ssh import SshTarget
from tools.schemas.examples import EXAMPLES

TARGET = "thing"
Act = tuple[str, ...]


@dataclass(frozen=True)
class Odd:
    """A name that somebody may hope to inject something with: what it is, as a resource, and what reads it alone."""

    resource: str
    read: Act


class Kind(Protocol):
    """One kind of backend, with a real server."""

    name: ClassVar[str]
    read_a: Act
    write_a: Act
    read_b: Act
    write_b: Act
    beyond: Sequence[Act]
    """What a lease that reads `a`, and reads and writes `b`, does not allow."""
    odd: Sequence[Odd]
    unsayable: Sequence[str]
    """Resources that are refused before anything is made."""

    def backend(self, trust_domain: str = "test.example", access: TargetAccess | None = None) -> Backend:
        """A backend as issuer and revoker have it, with Ringfence's own rights."""
        ...

    def resource(self, thing: str) -> str:
        """The resource that `a` or `b` is."""
        ...

    async def may(self, value: str, act: Act) -> bool:
        """What the target itself says. Whatever is neither yes nor a refusal fails the test."""
        ...

    def session(self, value: str) -> Any:
        """A context with an open session, which `lives` tells of."""
        ...

    def alone(self) -> AbstractAsyncContextManager[None]:
        """A context in which all of Ringfence is gone that runs in the suite; what enforces leases goes on."""
        ...

    async def names(self) -> set[str]:
        """All that stands at the target for any lease, as the target's own administrator sees it."""
        ...

    def secret_of(self, value: str) -> str:
        """The part of a credential that nobody else may know."""
        ...

    def said(self) -> bytes:
        """Everything that the server wrote down of what it was told."""
        ...


def allow(verbs: str | tuple[str, ...], *resources: str) -> Permission:
    """A permission at the target of the suite."""
    verbs = (verbs,) if isinstance(verbs, str) else verbs
    return Permission(target=TARGET, verbs=verbs, resources=resources)


def lease(kind: str, *scope: Permission, **fields: Any) -> Lease:
    """A lease of its own, good for ten minutes unless told otherwise."""
    now = int(time.time())
    given = {
        "lease_id": str(uuid.uuid4()),
        "target_id": TARGET,
        "backend": kind,
        "scope": scope,
        "iat": now,
        "deadline": now + 600,
    }
    return cast(Lease, EXAMPLES[Lease]).model_copy(update=given | fields)


def state(kind: str, **settings: Any) -> TargetState:
    """The record of the suite's target."""
    example = cast(TargetRecord, EXAMPLES[TargetRecord]).state
    needed = {"url": "https://api.example"} if kind == "http" else {}
    backend = BackendSettings.model_validate({"kind": kind, **needed, **settings})
    return example.model_copy(update={"target_id": TARGET, "backend": backend})


class Stateful(Kind, Protocol):
    """A kind that leaves something at its target, where Ringfence has rights of its own."""

    def write_secret(self, address: str | None = None) -> None:
        """Name the server, or another address, as the place where Ringfence works."""
        ...

    @property
    def address(self) -> str: ...

    @property
    def secret_file(self) -> Path: ...

    def wrong_secrets(self) -> dict[str, str]:
        """URLs with `wrong-secret` in them, by what is wrong."""
        ...

    forgets: ClassVar[bool]
    """Whether a restart of the server ends credentials."""

    async def restart(self) -> None:
        """End the server and start it again, with what it has."""
        ...


# --- jwt --------------------------------------------------------------------------------------------------------------


class JwtKind:
    """The target is a resource server that knows the issuer's key, and asks nobody."""

    name: ClassVar[str] = "jwt"
    read_a: Act = ("read", "a")
    write_a: Act = ("write", "a")
    read_b: Act = ("read", "b")
    write_b: Act = ("write", "b")
    beyond: Sequence[Act] = (("read", "c"), ("read", "a/b"), ("deploy", "a"), ("read", "*"))
    odd: Sequence[Odd] = tuple(
        Odd(name, ("read", name)) for name in ('a"b', "o'brien", "é", "日本", "$1", "a b", "n" * 200)
    )
    unsayable: Sequence[str] = ()

    def __init__(self) -> None:
        key = TokenKey(SigningKey.generate("spiffe://test.example/service/issuer"))
        self._keys = TokenKeys([key])
        self._public = jwt.PyJWK.from_dict(key.jwk())

    def backend(self, trust_domain: str = "test.example", access: TargetAccess | None = None) -> Backend:
        return JwtBackend(trust_domain, "https://issuer.test.example", self._keys)

    def resource(self, thing: str) -> str:
        return thing

    async def may(self, value: str, act: Act) -> bool:
        audience = f"spiffe://test.example/target/{TARGET}"
        try:
            claims = jwt.decode(value, self._public, algorithms=["ES256"], audience=audience)
        except jwt.ExpiredSignatureError:
            return False
        verb, resource = act
        return any(
            verb in detail["verbs"]
            and any(parse_glob(glob).matches(resource) for glob in detail["resources"])
            for detail in claims["authorization_details"]
        )

    @asynccontextmanager
    async def session(self, value: str) -> AsyncIterator[Any]:
        yield value

    def alone(self) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    async def names(self) -> set[str]:
        return set()

    def secret_of(self, value: str) -> str:
        return value

    def said(self) -> bytes:
        return b""


# --- http -------------------------------------------------------------------------------------------------------------


class HttpKind:
    """The target is an API with a static key, which knows no scopes: what is asked of a target here, its gateway does.

    What agents have of a lease is its handle.
    """

    name: ClassVar[str] = "http"
    read_a: Act = ("GET", "/a")
    write_a: Act = ("PUT", "/a")
    read_b: Act = ("GET", "/b")
    write_b: Act = ("PUT", "/b")
    beyond: Sequence[Act] = (
        ("GET", "/c"), ("GET", "/a/b"), ("GET", "/"), ("GET", "/A"), ("DELETE", "/b"), ("POST", "/a"), ("PATCH", "/a"),
        ("OPTIONS", "/a"), ("TRACE", "/a"), ("get", "/a"), ("GETX", "/a"), ("GET", "/a/"), ("GET", "//a"),
        ("GET", "/a;x"), ("GET", "/a%2Fb"), ("GET", "/a%252Fb"), ("GET", "/a%00"), ("GET", "/a%0A"), ("GET", "/a%20"),
        ("GET", "/a%0D%0AX-Admin:%20yes"), ("GET", "/a%5C"), ("GET", "/a%"), ("GET", "/%FF"), ("GET", "/\xe9"),
        ("GET", "/a%C2%A0"), ("GET", "/%EF%BD%81"), ("GET", "/*"), ("GET", "/**"), ("GET", "/%2A"),
        ("GET", "/a", "X-HTTP-Method-Override: PUT"), ("GET", "/a", "X-Original-URL: /c"),
        ("GET", "/a", "Transfer-Encoding: chunked", "Content-Length: 3"),
    )  # fmt: skip
    odd: Sequence[Odd] = tuple(
        Odd(f"path/{name}", ("GET", f"/{quote(name, safe='')}"))
        for name in (
            'we"ird', "o'brien", "é", "日本", "a b", "$1", "UPPER", "a,b", "a:read", "<a>", "a&b", "a=b", "a+b", "path",
            "a) or (b", "n" * 200,
        )
    )  # fmt: skip
    unsayable: Sequence[str] = (
        "path/a\nb", "path/a\r\nX-Admin: yes", "path/a\x00b", "path/a%0Ab", "path/a\\b", "path/a;b", "path/{path}",
        "path/../b", "path/a\N{NO-BREAK SPACE}", "path/e\N{COMBINING ACUTE ACCENT}", "path//a",
        "path/\N{FULLWIDTH LATIN SMALL LETTER A}", "/a", "path/a#b", "path/[ab]",
    )  # fmt: skip

    def __init__(self, gated: Gated) -> None:
        self._gated = gated
        self._handles: dict[str, asyncio.Task[str]] = {}

    def backend(self, trust_domain: str = "test.example", access: TargetAccess | None = None) -> Backend:
        return _Enforced(self._gated, self._handles)

    def resource(self, thing: str) -> str:
        return f"path/{thing}"

    async def may(self, value: str, act: Act) -> bool:
        return await self._gated.may(value, act)

    def session(self, value: str) -> Any:
        return self._gated.session(value, "/a")

    def alone(self) -> AbstractAsyncContextManager[None]:
        return self._gated.alone()

    async def names(self) -> set[str]:
        return set()

    def secret_of(self, value: str) -> str:
        return SECRET

    def said(self) -> bytes:
        return b""


class _Enforced(HttpBackend):
    """The backend together with those who enforce its leases: what is made is a lease, for which nothing is minted."""

    def __init__(self, gated: Gated, handles: dict[str, asyncio.Task[str]]) -> None:
        self._gated = gated
        self._handles = handles
        """By the suite's own lease: of the issuer's, which has its id, and is made once."""

    async def mint(self, lease: Lease, target: TargetState) -> Credential:
        with pytest.raises(TargetRefusedError):
            await super().mint(lease, target)
        if lease.lease_id not in self._handles:
            ttl_s = max(1, lease.deadline - int(time.time()))
            made = self._gated.leased(lease.scope, ttl_s)
            self._handles[lease.lease_id] = asyncio.create_task(made)
        handle = await self._handles[lease.lease_id]
        return Credential(kind="http", value=handle, expires_at=lease.deadline)

    async def undo(self, lease_id: str, *, target_id: str) -> None:
        await super().undo(lease_id, target_id=target_id)
        known = self._handles.pop(lease_id, None)
        await self._gated.cut(await known if known is not None else lease_id)


# --- redis ------------------------------------------------------------------------------------------------------------


class _Target(Protocol):
    """A real server of tests."""

    @property
    def address(self) -> str: ...

    @property
    def secret_file(self) -> Path: ...

    def write_secret(self, address: str | None = None) -> None: ...


T = TypeVar("T", bound=_Target)


class _AtTarget(Generic[T]):
    """What has its rights at a real server in a file."""

    def __init__(self, target: T) -> None:
        self.target = target

    def write_secret(self, address: str | None = None) -> None:
        self.target.write_secret(address)

    def alone(self) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    @property
    def address(self) -> str:
        return self.target.address

    @property
    def secret_file(self) -> Path:
        return self.target.secret_file


class RedisKind(_AtTarget[ValkeyTarget]):
    """A Valkey server."""

    name: ClassVar[str] = "redis"
    forgets: ClassVar[bool] = True
    read_a: Act = ("GET", "a")
    write_a: Act = ("SET", "a", "x")
    read_b: Act = ("GET", "b")
    write_b: Act = ("SET", "b", "x")
    beyond: Sequence[Act] = (
        ("GET", "other"), ("GET", "ab"), ("KEYS", "*"), ("SCAN", "0"), ("DBSIZE",), ("RANDOMKEY",),
        ("SELECT", "1"), ("MOVE", "b", "1"), ("COPY", "b", "b2", "DB", "1"), ("SORT", "b", "GET", "other"),
        ("EVAL", "return 1", "0"), ("FLUSHDB",), ("CONFIG", "GET", "*"), ("ACL", "WHOAMI"), ("CLIENT", "LIST"),
        ("PUBLISH", "b", "x"), ("SUBSCRIBE", "b"), ("RENAME", "b", "other"), ("MGET", "b", "other"),
    )  # fmt: skip
    odd: Sequence[Odd] = tuple(
        Odd(name, ("GET", name)) for name in ("é", "日本", "$1", "~x", "&x", "+@all", "n" * 300)
    )
    unsayable: Sequence[str] = (
        "a b",
        "a'b",
        'a"b',
        "a) +@all (~x",
        "a ~* +@all",
        "a\nb",
        "a\r\nACL SETUSER x on",
        "a*",
    )

    def backend(self, trust_domain: str = "test.example", access: TargetAccess | None = None) -> Backend:
        return RedisBackend(trust_domain, access or self.target.access())

    def resource(self, thing: str) -> str:
        return thing

    async def may(self, value: str, act: Act) -> bool:
        client: Any = Redis.from_url(value)
        try:
            await client.execute_command(*act)
        except (NoPermissionError, AuthenticationError):
            return False
        finally:
            await client.aclose()
        return True

    @asynccontextmanager
    async def session(self, value: str) -> AsyncIterator[Any]:
        client: Any = Redis.from_url(value, single_connection_client=True)
        await client.execute_command("PING")

        async def lives() -> bool:
            try:
                await client.execute_command("PING")
            except (RedisError, OSError):
                return False
            return True

        try:
            yield lives
        finally:
            await client.aclose()

    async def names(self) -> set[str]:
        return await self.target.users()

    def secret_of(self, value: str) -> str:
        return str(urlsplit(value).password)

    def said(self) -> bytes:
        return b"".join(path.read_bytes() for path in self.target.folder.rglob("*.log"))

    def wrong_secrets(self) -> dict[str, str]:
        return {
            "password": f"redis://broker:wrong-secret@{self.address}/0",
            "address": "redis://broker:wrong-secret@127.0.0.1:1/0",
            "no url": "wrong-secret",
            "another database": f"redis://broker:wrong-secret@{self.address}/3",
        }

    async def restart(self) -> None:
        """Its users are gone then: it has no file for them."""
        await asyncio.to_thread(self.target.server.restart)
        await self.target.allow_broker()


# --- postgres ---------------------------------------------------------------------------------------------------------

TABLES = (
    "CREATE SCHEMA shop",
    "CREATE TABLE shop.a (id int, note text)",
    "CREATE TABLE shop.b (id int, note text)",
    "CREATE TABLE shop.secrets (id int, note text)",
    "CREATE TABLE shop.people (id int, name text, salary int)",
    "CREATE SEQUENCE shop.numbers",
    "CREATE VIEW shop.names AS SELECT name FROM shop.people",
    "INSERT INTO shop.a VALUES (1, 'one')",
    "INSERT INTO shop.b VALUES (1, 'one')",
    "INSERT INTO shop.secrets VALUES (1, 'canary')",
    "INSERT INTO shop.people VALUES (1, 'maria', 1000)",
    "CREATE SCHEMA vault",
    "CREATE TABLE vault.a (id int)",
)
ODD_TABLES = (
    'we"ird', 'a" TO PUBLIC --', 'a", shop."secrets', "o'brien", "é", "日本", "UPPER", "a b", "$1", "select", "x.y",
    "pg_temp", "a, shop.secrets", "PUBLIC", "n" * 63, "é" * 31,
)  # fmt: skip


def _select(table: str) -> Act:
    quoted = table.replace('"', '""')
    return (f'SELECT * FROM shop."{quoted}"',)


_BEYOND = (
    "SELECT * FROM shop.secrets",
    "SELECT * FROM vault.a",
    "SELECT * FROM shop.a, shop.secrets",
    "TABLE shop.people",
    "SELECT * FROM shop.names",
    "SELECT nextval('shop.numbers')",
    "UPDATE shop.a SET note = 'y'",
    "DELETE FROM shop.a",
    "TRUNCATE shop.b",
    "DROP TABLE shop.b",
    "ALTER TABLE shop.b ADD COLUMN x int",
    "CREATE TABLE shop.c (id int)",
    "CREATE TABLE public.c (id int)",
    "CREATE TEMPORARY TABLE c (id int)",
    "CREATE SCHEMA c",
    "CREATE DATABASE c",
    "CREATE ROLE c",
    "CREATE EXTENSION dblink",
    "CREATE INDEX ON shop.b (id)",
    "CREATE POLICY p ON shop.b USING (true)",
    "ALTER SYSTEM SET log_statement = 'none'",
    "ALTER ROLE CURRENT_USER VALID UNTIL 'infinity'",
    "ALTER ROLE CURRENT_USER CONNECTION LIMIT 100",
    "ALTER ROLE CURRENT_USER CREATEROLE",
    "SET ROLE ringfence_broker",
    "SET ROLE postgres",
    "SET SESSION AUTHORIZATION postgres",
    "GRANT ringfence_broker TO CURRENT_USER",
    "GRANT SELECT ON shop.secrets TO CURRENT_USER",
    "COPY shop.a TO PROGRAM 'cat'",
    "COPY shop.a FROM '/etc/passwd'",
    "SELECT pg_read_file('/etc/passwd')",
    "SELECT pg_ls_dir('/')",
    "SELECT * FROM pg_authid",
    "SELECT lo_import('/etc/passwd')",
    "SELECT pg_reload_conf()",
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'postgres'",
)


class PostgresKind(_AtTarget[PostgresTarget]):
    """A PostgreSQL server, in one database of it."""

    name: ClassVar[str] = "postgres"
    forgets: ClassVar[bool] = False
    read_a: Act = ("SELECT id FROM shop.a",)
    write_a: Act = ("INSERT INTO shop.a VALUES (2, 'x')",)
    read_b: Act = ("SELECT * FROM shop.b",)
    write_b: Act = (
        "INSERT INTO shop.b VALUES (2, 'x')",
        "UPDATE shop.b SET note = 'y' WHERE id = 2",
        "DELETE FROM shop.b WHERE id = 2",
    )
    beyond: Sequence[Act] = (
        *((statement,) for statement in _BEYOND),
        ("BEGIN", "LOCK TABLE shop.secrets"),
        ("BEGIN", "LOCK TABLE shop.a IN EXCLUSIVE MODE"),
    )
    odd: Sequence[Odd] = tuple(Odd(f"shop/shop/{name}", _select(name)) for name in ODD_TABLES)
    unsayable: Sequence[str] = (
        "**", "*/shop/a", 'shop/shop/a"; DROP TABLE shop.b', "shop/shop/a\nb", "shop/shop/a\x00b",
        "shop/shop/" + "n" * 64, "shop/shop/" + "é" * 32, "shop/shop/a/b/c", "s" * 64 + "/shop/a",
    )  # fmt: skip

    def backend(self, trust_domain: str = "test.example", access: TargetAccess | None = None) -> Backend:
        return PostgresBackend(trust_domain, access or self.target.access())

    def resource(self, thing: str) -> str:
        return f"shop/shop/{thing}"

    async def may(self, value: str, act: Act) -> bool:
        return await postgres.may(value, *act)

    @asynccontextmanager
    async def session(self, value: str) -> AsyncIterator[Any]:
        connection = await asyncpg.connect(value, timeout=30)
        try:
            yield lambda: postgres.lives(connection)
        finally:
            connection.terminate()

    async def names(self) -> set[str]:
        return await self.target.roles()

    def secret_of(self, value: str) -> str:
        return str(urlsplit(value).password)

    def said(self) -> bytes:
        return self.target.server.log.read_bytes()

    def wrong_secrets(self) -> dict[str, str]:
        login = f"postgresql://{quote(postgres.BROKER)}:wrong-secret"
        return {
            "password": f"{login}@{self.address}/shop",
            "address": f"{login}@127.0.0.1:1/shop",
            "no url": "wrong-secret",
            "another database": f"{login}@{self.address}/nowhere",
            "an option": f"{login}@{self.address}/shop?options=wrong-secret",
            "a certificate": f"{login}@{self.address}/shop?sslmode=verify-full&sslrootcert=/nowhere",
        }

    async def restart(self) -> None:
        server = self.target.server
        await asyncio.to_thread(server.halt)
        await asyncio.to_thread(server.launch)


# --- mysql ------------------------------------------------------------------------------------------------------------

MYSQL_TABLES = (
    "CREATE DATABASE shop",
    "CREATE TABLE shop.a (id int, note text)",
    "CREATE TABLE shop.b (id int, note text)",
    "CREATE TABLE shop.secrets (id int, note text)",
    "CREATE TABLE shop.people (id int, name text, salary int)",
    "CREATE VIEW shop.names AS SELECT name FROM shop.people",
    "CREATE PROCEDURE shop.all_secrets() SELECT * FROM shop.secrets",
    "INSERT INTO shop.a VALUES (1, 'one')",
    "INSERT INTO shop.b VALUES (1, 'one')",
    "INSERT INTO shop.secrets VALUES (1, 'canary')",
    "INSERT INTO shop.people VALUES (1, 'maria', 1000)",
    "CREATE DATABASE vault",
    "CREATE TABLE vault.a (id int)",
    "CREATE DATABASE `sh_p`",
    "CREATE TABLE `sh_p`.a (id int)",
)
MYSQL_ODD = (
    'we"ird', "a` TO PUBLIC --", "a`, shop.`secrets", "o'brien", "é", "日本", "UPPER", "a b", "$1", "select", "x.y",
    "PUBLIC", "n" * 64, "é" * 30, "_", "s_crets",
)  # fmt: skip
_MYSQL_BEYOND = (
    "SELECT * FROM shop.secrets",
    "SELECT * FROM vault.a",
    "SELECT * FROM shop.a, shop.secrets",
    "SELECT * FROM shop.people",
    "SELECT * FROM shop.names",
    "CALL shop.all_secrets()",
    "UPDATE shop.a SET note = 'y'",
    "DELETE FROM shop.a",
    "TRUNCATE shop.b",
    "DROP TABLE shop.b",
    "ALTER TABLE shop.b ADD COLUMN x int",
    "CREATE TABLE shop.c (id int)",
    "CREATE TEMPORARY TABLE shop.c (id int)",
    "CREATE DATABASE c",
    "CREATE USER c",
    "CREATE VIEW shop.c AS SELECT * FROM shop.a",
    "CREATE TRIGGER shop.t BEFORE INSERT ON shop.b FOR EACH ROW SET NEW.id = 1",
    "CREATE FUNCTION shop.f() RETURNS int RETURN 1",
    "CREATE INDEX i ON shop.b (id)",
    "LOCK TABLES shop.b WRITE",
    "SET GLOBAL general_log = 0",
    "SELECT * FROM mysql.global_priv",
    "SELECT * FROM mysql.user",
    "GRANT SELECT ON shop.secrets TO CURRENT_USER",
    "GRANT SELECT ON shop.a TO root@localhost",
    "SELECT * FROM shop.a INTO OUTFILE '/tmp/x'",
    "LOAD DATA INFILE '/etc/passwd' INTO TABLE shop.b",
    "SHUTDOWN",
    "FLUSH PRIVILEGES",
    "ALTER USER CURRENT_USER WITH MAX_USER_CONNECTIONS 0",
    "DROP USER CURRENT_USER",
)


def _mysql_select(table: str) -> Act:
    quoted = table.replace("`", "``")
    return (f"SELECT * FROM shop.`{quoted}`",)


class MysqlKind(_AtTarget[MariadbTarget]):
    """A MariaDB server."""

    name: ClassVar[str] = "mysql"
    forgets: ClassVar[bool] = False
    read_a: Act = ("SELECT id FROM shop.a",)
    write_a: Act = ("INSERT INTO shop.a VALUES (2, 'x')",)
    read_b: Act = ("SELECT * FROM shop.b",)
    write_b: Act = (
        "INSERT INTO shop.b VALUES (2, 'x')",
        "UPDATE shop.b SET note = 'y'",
        "DELETE FROM shop.b",
    )
    beyond: Sequence[Act] = tuple((statement,) for statement in _MYSQL_BEYOND)
    odd: Sequence[Odd] = tuple(Odd(f"shop/{name}", _mysql_select(name)) for name in MYSQL_ODD)
    unsayable: Sequence[str] = (
        "**", "*/a", "shop", "shop/a`; DROP TABLE shop.b", "shop/a\nb", "shop/a\x00b", "shop/" + "n" * 65,
        "shop/a/b/c", "s" * 65 + "/a", "mysql/user", "MySQL/user", "sys/**", "information_schema/TABLES",
    )  # fmt: skip

    def backend(self, trust_domain: str = "test.example", access: TargetAccess | None = None) -> Backend:
        return MysqlBackend(trust_domain, access or self.target.access())

    def resource(self, thing: str) -> str:
        return f"shop/{thing}"

    async def may(self, value: str, act: Act) -> bool:
        return await mariadb.may(value, *act)

    @asynccontextmanager
    async def session(self, value: str) -> AsyncIterator[Any]:
        connection = await asyncio.to_thread(mariadb.connect, value)
        try:
            yield lambda: mariadb.lives(connection)
        finally:
            if connection.open:
                connection.close()

    async def names(self) -> set[str]:
        """With the lease of each, which its name has in another form."""
        users = await asyncio.to_thread(self.target.users)
        return {f"{user} {lease_of(user)}" for user in users}

    def secret_of(self, value: str) -> str:
        return str(urlsplit(value).password)

    def said(self) -> bytes:
        return self.target.server.log.read_bytes()

    def wrong_secrets(self) -> dict[str, str]:
        login = f"mysql://{mariadb.BROKER}:wrong-secret"
        return {
            "password": f"{login}@{self.address}/",
            "address": f"{login}@127.0.0.1:1/",
            "no url": "wrong-secret",
            "a database that is not there": f"{login}@{self.address}/nowhere",
            "an option": f"{login}@{self.address}/?options=wrong-secret",
            "a certificate": f"{login}@{self.address}/?sslmode=verify-full&sslrootcert=/nowhere",
        }

    async def restart(self) -> None:
        server = self.target.server
        await asyncio.to_thread(server.halt)
        await asyncio.to_thread(server.launch)


# --- ssh --------------------------------------------------------------------------------------------------------------

ODD_COMMANDS = ("A", "a.b", "a-", "read", "n" * 64)
_CAT = ["/bin/cat"]
SSH_USERS: dict[str, Any] = {
    "deploy": {
        "read": dict.fromkeys(("a", "b", "secrets", *ODD_COMMANDS), _CAT),
        "write": dict.fromkeys(("a", "b", "secrets"), _CAT),
        "may": ["shell", "terminal", "forward"],
    },
    "other": {"read": {"a": _CAT}},
}
"""Commands that say what they are told: what they do is none of the suite's business, only whether they run."""


class SshKind(_AtTarget[SshTarget]):
    """An OpenSSH server. An act is options for its client, and what the client asks for."""

    name: ClassVar[str] = "ssh"
    forgets: ClassVar[bool] = False
    read_a: Act = ("read a",)
    write_a: Act = ("write a",)
    read_b: Act = ("read b",)
    write_b: Act = ("write b",)
    beyond: Sequence[Act] = (
        ("read secrets",), ("write secrets",), ("read nothing",), ("read ab",), ("read",), ("a",), ("read  a",),
        ("read a; cat",), ("read a\ncat",), ("$(cat)",), ("/bin/cat",), ("cat",), ("",), ("-s", "sftp"),
        ("-tt", "read a"), ("-W", "127.0.0.1:1", ""), ("-oExitOnForwardFailure=yes", "-R", "0:127.0.0.1:1", "read a"),
        ("-l", "other", "read a"), ("-l", "ringfence-broker", "serve"), ("-l", "root", "read a"),
    )  # fmt: skip
    odd: Sequence[Odd] = tuple(Odd(f"deploy/{name}", (f"read {name}",)) for name in ODD_COMMANDS)
    unsayable: Sequence[str] = (
        "**", "*/a", "deploy", "deploy/a/b", "deploy/a b", "deploy/a;cat", "deploy/$1", "deploy/a'b", 'deploy/a"b',
        "deploy/a\nb", "deploy/é", "deploy/-a", "deploy/a,b", "deploy/a:b", "deploy/" + "n" * 65, "Deploy/a",
        "de ploy/a", "deploy,root/a", "ringfence:deploy/a", "dé/a", "n" * 33 + "/a", "-l/a",
    )  # fmt: skip

    def backend(self, trust_domain: str = "test.example", access: TargetAccess | None = None) -> Backend:
        return SshBackend(trust_domain, access or self.target.access())

    def resource(self, thing: str) -> str:
        return f"deploy/{thing}"

    async def may(self, value: str, act: Act) -> bool:
        return await ssh.may(value, *act)

    @asynccontextmanager
    async def session(self, value: str) -> AsyncIterator[Any]:
        async with ssh.client(value) as client, client.open(command="read a") as session:
            assert await ssh.lives(session), "it could not be opened"
            yield lambda: ssh.lives(session)

    async def names(self) -> set[str]:
        return self.target.names()

    def secret_of(self, value: str) -> str:
        """The line of the key that has most of it; those before are the same in every key, or public."""
        return str(json.loads(value)["private_key"]).splitlines()[4]

    def said(self) -> bytes:
        files = (path for path in self.target.server.folder.rglob("*") if path.is_file())
        return b"".join(path.read_bytes() for path in files)

    def wrong_secrets(self) -> dict[str, str]:
        server = self.target.server
        there, key, signs = (
            f"ssh://{ssh.BROKER}@{self.address}",
            f"{server.host_key}-wrong-secret",
            server.authority,
        )
        other = SshCa()
        return {
            "password": f"{there}\n{key}\n{other.private}",
            "address": f"ssh://{ssh.BROKER}@127.0.0.1:1\n{key}\n{signs}",
            "another host": f"{there}\n{other.public} wrong-secret\n{signs}",
            "another user": f"ssh://deploy@{self.address}\n{key}\n{signs}",
            "no url": "wrong-secret",
            "no port": f"{there}wrong-secret\n{key}\n{signs}",
            "more in it": f"ssh://{ssh.BROKER}:wrong-secret@{self.address}\n{key}\n{signs}",
            "no host key": f"{there}\n{signs}",
            "no key there": f"{there}\nssh-ed25519 wrong-secret\n{signs}",
            "no authority": f"{there}\n{key}\n-----BEGIN wrong-secret",
        }

    async def restart(self) -> None:
        server = self.target.server
        await asyncio.to_thread(server.halt)
        await asyncio.to_thread(server.launch)


class SshCa:
    """Somebody else's key."""

    def __init__(self) -> None:
        key = Ed25519PrivateKey.generate()
        self.private, self.public = private_text(key), public_text(key.public_key())
