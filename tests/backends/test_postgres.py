"""What is PostgreSQL's own: columns, schemas, PUBLIC, what a lease's role made, TLS, limits."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest

from ringfence.backends import PostgresBackend, TargetRefusedError
from ringfence.backends.postgres import privileges
from ringfence.backends.postgres.backend import LOCK
from ringfence.dev.processes import LOOPBACK
from ringfence.messages.base import Permission
from ringfence.messages.lease import Lease
from ringfence.messages.registry import TargetState
from tests.backends.kinds import TARGET, PostgresKind, allow, lease, state
from tests.support.servers.postgres import (
    BROKER,
    BROKER_SECRET,
    PostgresServer,
    PostgresTarget,
    documented,
    lives,
    may,
    query,
)


@pytest.fixture
async def target(postgres_kind: PostgresKind) -> PostgresTarget:
    return postgres_kind.target


@pytest.fixture
async def backend(target: PostgresTarget) -> AsyncIterator[PostgresBackend]:
    backend = target.backend()
    yield backend
    await backend.close()


def of(**settings: Any) -> TargetState:
    return state("postgres", **settings)


def wanting(*scope: Permission, **fields: Any) -> Lease:
    return lease("postgres", *scope, **fields)


async def url_of(backend: PostgresBackend, one: Lease, **settings: Any) -> str:
    return (await backend.mint(one, of(**settings))).value


async def refused(backend: PostgresBackend, one: Lease, match: str, **settings: Any) -> None:
    with pytest.raises(TargetRefusedError, match=match):
        await backend.mint(one, of(**settings))
    assert one.lease_id not in await backend.standing(TARGET)


# --- columns, schemas, wildcards --------------------------------------------------------------------------------------


async def test_a_column_is_not_its_table(backend: PostgresBackend) -> None:
    one = wanting(allow("read", "shop/shop/people/name"), allow("update", "shop/shop/people/salary"))
    url = await url_of(backend, one)
    assert await may(url, "SELECT name FROM shop.people")
    assert await may(url, "UPDATE shop.people SET salary = 1")
    for beyond in (
        "SELECT salary FROM shop.people",
        "SELECT * FROM shop.people",
        "SELECT people FROM shop.people",
        "UPDATE shop.people SET name = 'x'",
        "INSERT INTO shop.people (name) VALUES ('x')",
        "DELETE FROM shop.people",
        "SELECT name FROM shop.people WHERE salary > 1",
    ):
        assert not await may(url, beyond), beyond
    await backend.undo(one.lease_id, target_id=TARGET)


async def test_all_columns_are_each_of_them_and_still_not_the_table(backend: PostgresBackend) -> None:
    one = wanting(allow("write", "shop/shop/b/*"))
    url = await url_of(backend, one)
    assert await may(url, "INSERT INTO shop.b (id, note) VALUES (7, 'x')")
    assert not await may(url, "DELETE FROM shop.b")
    await backend.undo(one.lease_id, target_id=TARGET)


async def test_a_view_is_read_by_its_name_and_a_sequence_too(backend: PostgresBackend) -> None:
    one = wanting(allow("read", "shop/shop/names"), allow("usage", "shop/shop/numbers"))
    url = await url_of(backend, one)
    assert await may(url, "SELECT * FROM shop.names")
    assert await may(url, "SELECT nextval('shop.numbers')")
    assert not await may(url, "SELECT name FROM shop.people")
    assert not await may(url, "SELECT setval('shop.numbers', 1)")
    await backend.undo(one.lease_id, target_id=TARGET)


async def test_wildcards_stand_for_what_is_there_now(
    backend: PostgresBackend, target: PostgresTarget
) -> None:
    async with target.admin() as admin:
        await admin.execute("CREATE TABLE shop.log_1 (id int); CREATE TABLE shop.log_2 (id int)")
        await admin.execute(f"GRANT SELECT ON shop.log_1, shop.log_2 TO {BROKER} WITH GRANT OPTION")
        one = wanting(allow("read", "shop/shop/log_*"))
        url = await url_of(backend, one)
        await admin.execute("CREATE TABLE shop.log_3 (id int)")
        assert await may(url, "SELECT * FROM shop.log_1, shop.log_2")
        assert not await may(url, "SELECT * FROM shop.log_3")
        assert not await may(url, "SELECT * FROM shop.a")
        await backend.undo(one.lease_id, target_id=TARGET)
        await admin.execute("DROP TABLE shop.log_1, shop.log_2, shop.log_3")


@pytest.mark.parametrize(
    ("verb", "resource"),
    [
        ("read", "shop/shop/nothing"),
        ("read", "shop/shop/no*"),
        ("read", "shop/SHOP/a"),
        ("read", "shop/shop/A"),
        ("read", "shop/shop/a/nothing"),
        ("read", "shop/pg_catalog/pg_authid"),
        ("read", "shop/information_schema/tables"),
        ("usage", "shop/shop/a"),
        ("delete", "shop/shop/numbers"),
        ("read", "nowhere/shop/a"),
        ("read", "template0/shop/a"),
    ],
)
async def test_missing_relation_is_refused(backend: PostgresBackend, verb: str, resource: str) -> None:
    await refused(backend, wanting(allow(verb, resource)), r"means nothing|no such database|refuses")


async def test_a_database_that_ringfence_may_not_log_in_to_is_no_fault_of_the_server(
    backend: PostgresBackend, postgres_server: PostgresServer
) -> None:
    """Agents choose the database: what they choose never has the target left alone."""
    rules = postgres_server.folder / "data" / "pg_hba.conf"
    before = rules.read_text()
    rules.write_text(f"host template1 all all reject\n{before}")
    async with postgres_server.admin() as admin:
        await admin.execute("SELECT pg_reload_conf()")
        one = wanting(allow("read", "template1/shop/a"))
        async with asyncio.timeout(60):
            while (
                True
            ):  # until the server has read it: before, Ringfence's role has no right to connect there
                with pytest.raises(TargetRefusedError) as refusal:
                    await backend.mint(one, of())
                if "(28000)" in str(refusal.value):
                    break
                await asyncio.sleep(0.05)
        rules.write_text(before)
        await admin.execute("SELECT pg_reload_conf()")


@pytest.mark.parametrize(
    ("verb", "resource", "says"),
    [
        ("delete", "shop/shop/a/id", "a right on a table"),
        ("create", "shop/shop/a", "a right on a schema"),
        ("temporary", "shop/shop", "a right on a database"),
        ("write", "shop/shop", "a right on a"),
        ("all", "shop/shop/a", "verb"),
    ],
)
def test_verb_that_does_not_fit_is_refused_with_the_reason(
    backend: PostgresBackend, verb: str, resource: str, says: str
) -> None:
    assert says in (backend.problem(wanting(allow(verb, resource)), of()) or "")


def test_a_lease_is_for_one_database(backend: PostgresBackend) -> None:
    two = wanting(allow("read", "shop/shop/a", "other/shop/a"))
    assert "one database" in (backend.problem(two, of()) or "")


# --- no more, no less -------------------------------------------------------------------------------------------------


async def test_right_that_the_broker_lacks_is_refused_whole(backend: PostgresBackend) -> None:
    await refused(backend, wanting(allow("read", "shop/vault/a")), r"may not give")
    await refused(backend, wanting(allow("truncate", "shop/shop/a")), r"may not give")
    await refused(backend, wanting(allow(("read", "truncate"), "shop/shop/a")), r"may not give")
    await refused(backend, wanting(allow("read", "shop/shop/**", "shop/vault/**")), r"may not give")


@pytest.mark.parametrize(
    ("give", "take", "says"),
    [
        ("GRANT SELECT ON shop.secrets TO PUBLIC", "", "select 'shop/secrets'"),
        ("GRANT UPDATE (note) ON shop.a TO PUBLIC", "", "update 'shop/a/note'"),
        ("GRANT USAGE ON shop.numbers TO PUBLIC", "", "usage 'shop/numbers'"),
        ("GRANT CREATE ON SCHEMA public TO PUBLIC", "", "create in schema"),
        ("GRANT TEMPORARY ON DATABASE shop TO PUBLIC", "", "temporary"),
        ("GRANT CONNECT ON DATABASE postgres TO PUBLIC", "", "connect to"),
        (
            "CREATE FUNCTION shop.all_secrets() RETURNS SETOF shop.secrets SECURITY DEFINER LANGUAGE sql "
            "AS 'SELECT * FROM shop.secrets'",
            "DROP FUNCTION shop.all_secrets",
            "execute, with the rights of another, 'shop/all_secrets'",
        ),
    ],
)
async def test_public_right_beyond_the_scope_is_refused(
    backend: PostgresBackend, target: PostgresTarget, give: str, take: str, says: str
) -> None:
    one = wanting(allow("read", "shop/shop/a"))
    async with target.admin() as admin:
        await admin.execute(give)
        try:
            await refused(backend, one, says)
            await url_of(backend, one, public="accept")
            await backend.undo(one.lease_id, target_id=TARGET)
        finally:
            await admin.execute(take or give.replace("GRANT", "REVOKE").replace(" TO ", " FROM "))
    await url_of(backend, one)
    await backend.undo(one.lease_id, target_id=TARGET)


async def test_public_right_within_the_scope_is_accepted(
    backend: PostgresBackend, target: PostgresTarget
) -> None:
    one = wanting(allow("read", "shop/shop/a"))
    async with target.admin() as admin:
        await admin.execute("GRANT SELECT ON shop.a TO PUBLIC")
        await url_of(backend, one)
        await backend.undo(one.lease_id, target_id=TARGET)
        assert await admin.fetchval("SELECT has_table_privilege('public', 'shop.a', 'SELECT')")
        await admin.execute("REVOKE SELECT ON shop.a FROM PUBLIC")


async def test_a_grant_of_the_agents_own_gives_nobody_anything(
    backend: PostgresBackend, target: PostgresTarget
) -> None:
    one = wanting(allow("read", "shop/shop/a"))
    url = await url_of(backend, one)
    await query(url, "GRANT SELECT ON shop.a TO PUBLIC")  # PostgreSQL only warns
    async with target.admin() as admin:
        assert not await admin.fetchval("SELECT has_table_privilege('public', 'shop.a', 'SELECT')")
    await backend.undo(one.lease_id, target_id=TARGET)


async def test_while_others_change_the_same_rights(backend: PostgresBackend, target: PostgresTarget) -> None:
    done = asyncio.Event()

    async def meddle() -> None:
        async with target.admin() as admin:
            while not done.is_set():
                for change in ("GRANT SELECT ON shop.a TO", "REVOKE SELECT ON shop.a FROM"):
                    with contextlib.suppress(asyncpg.InternalServerError):  # "tuple concurrently updated"
                        await admin.execute(f"{change} pg_monitor")

    meddler = asyncio.create_task(meddle())
    try:
        for _ in range(15):
            one = wanting(allow("read", "shop/shop/a"))
            url = await url_of(backend, one)
            assert await may(url, "SELECT id FROM shop.a")
            await backend.undo(one.lease_id, target_id=TARGET)
    finally:
        done.set()
        await meddler


# --- what the lease's role made ---------------------------------------------------------------------------------------


@pytest.fixture
async def making(target: PostgresTarget) -> AsyncIterator[Any]:
    """A schema in which Ringfence may let others create."""
    async with target.admin() as admin:
        await admin.execute("CREATE SCHEMA work")
        await admin.execute(f"GRANT USAGE, CREATE ON SCHEMA work TO {BROKER} WITH GRANT OPTION")
        yield admin
        await admin.execute("DROP SCHEMA work CASCADE")


MADE = (
    "CREATE TABLE work.made (id int)",
    "CREATE FUNCTION work.f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE TYPE work.t AS (x int)",
    "GRANT ALL ON work.made TO PUBLIC",
    "ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO PUBLIC",
    "SELECT lo_create(0)",
)


async def test_objects_made_by_a_lease_are_removed_with_it(backend: PostgresBackend, making: Any) -> None:
    one = wanting(allow(("read", "create"), "shop/work"))
    await query(await url_of(backend, one), *MADE)
    assert await making.fetchval("SELECT to_regclass('work.made')") is not None
    await backend.undo(one.lease_id, target_id=TARGET)
    assert await making.fetchval("SELECT to_regclass('work.made')") is None
    assert await making.fetchval("SELECT count(*) FROM pg_largeobject_metadata") == 0
    assert one.lease_id not in await backend.standing(TARGET)


async def test_objects_made_by_a_lease_are_kept_if_the_target_says_so(
    backend: PostgresBackend, making: Any
) -> None:
    one = wanting(allow("create", "shop/work"))
    await query(await url_of(backend, one, owned="keep"), *MADE[:3])
    await backend.undo(one.lease_id, target_id=TARGET)
    owner = "SELECT relowner::regrole::text FROM pg_class WHERE oid = 'work.made'::regclass"
    assert await making.fetchval(owner) == BROKER
    assert one.lease_id not in await backend.standing(TARGET)


async def test_objects_of_others_on_lease_objects_are_kept(backend: PostgresBackend, making: Any) -> None:
    one = wanting(allow("create", "shop/work"))
    await query(await url_of(backend, one), *MADE[:1])
    await making.execute("CREATE VIEW work.theirs AS SELECT * FROM work.made")
    await backend.undo(one.lease_id, target_id=TARGET)
    assert await making.fetchval("SELECT count(*) FROM work.theirs") == 0
    assert one.lease_id not in await backend.standing(TARGET)


async def test_undone_while_it_works(backend: PostgresBackend, target: PostgresTarget) -> None:
    """An open transaction with locks, a statement that runs, and one that has not begun."""
    one = wanting(allow(("read", "write"), "shop/shop/b"))
    url = await url_of(backend, one)
    holding, running = await asyncpg.connect(url), await asyncpg.connect(url)
    await holding.execute("BEGIN; LOCK TABLE shop.b IN EXCLUSIVE MODE")
    waiting = asyncio.create_task(running.execute("SELECT pg_sleep(60)"))
    await backend.undo(one.lease_id, target_id=TARGET)
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
        await waiting
    assert not await lives(holding)
    async with target.admin() as admin:
        count = "SELECT count(*) FROM pg_stat_activity WHERE starts_with(usename, 'ringfence_b26')"
        assert await admin.fetchval(count) == 0


async def test_the_undo_waits_for_what_is_being_made(
    backend: PostgresBackend, target: PostgresTarget
) -> None:
    """An issuer was cut off; the server has its statements and commits in a moment."""
    one = wanting(allow("read", "shop/shop/a"))
    issuer = await asyncpg.connect(
        host=LOOPBACK, port=target.server.port, user=BROKER, password=BROKER_SECRET, database=target.database
    )
    made = issuer.transaction()
    await made.start()
    await issuer.fetch(privileges.HERE, LOCK)
    await issuer.execute(f'CREATE ROLE "{backend.roles_of(one.lease_id)}abcdef_d" LOGIN')
    undoing = asyncio.create_task(backend.undo(one.lease_id, target_id=TARGET))
    async with target.admin() as admin, asyncio.timeout(60):
        waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        while not undoing.done() and not await admin.fetchval(waits):
            await asyncio.sleep(0.01)
    await made.commit()
    await issuer.close()
    await undoing
    assert one.lease_id not in await backend.standing(TARGET)


# --- what agents get --------------------------------------------------------------------------------------------------


async def test_a_credential_has_so_many_sessions_and_so_much_time(backend: PostgresBackend) -> None:
    one = wanting(allow("read", "shop/shop/a"))
    url = await url_of(backend, one, connection_limit=2, statement_timeout_s=7)
    open_ones = [await asyncpg.connect(url), await asyncpg.connect(url)]
    with pytest.raises(asyncpg.TooManyConnectionsError):
        await asyncpg.connect(url)
    assert await open_ones[0].fetchval("SHOW statement_timeout") == "7s"
    await backend.undo(one.lease_id, target_id=TARGET)
    for connection in open_ones:
        connection.terminate()


async def test_a_new_password_of_the_agents_own_ends_with_the_lease_too(backend: PostgresBackend) -> None:
    one = wanting(allow("read", "shop/shop/a"))
    url = await url_of(backend, one)
    await query(url, "ALTER ROLE CURRENT_USER PASSWORD 'mine'")
    mine = url.replace(str(urlsplit(url).password), "mine")
    assert await may(mine, "SELECT id FROM shop.a")
    await backend.undo(one.lease_id, target_id=TARGET)
    assert not await may(mine, "SELECT id FROM shop.a")


async def test_with_tls_where_the_server_has_it(
    target: PostgresTarget, postgres_server: PostgresServer
) -> None:
    if not postgres_server.has_tls:
        pytest.skip("this server was built without TLS")
    root = postgres_server.root_certificate
    for query_, told in (
        ("", "require"),
        ("?sslmode=require", "require"),
        (f"?sslmode=verify-full&sslrootcert={root}", "verify-full"),
        ("?sslmode=disable", None),
    ):
        target.write_secret(query=query_)
        backend = target.backend()
        one = wanting(allow("read", "shop/shop/a"))
        url = await url_of(backend, one)
        assert urlsplit(url).query == (f"sslmode={told}" if told else "")
        async with target.admin() as admin:
            encrypted = (
                "SELECT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE usename = $1 LIMIT 1"
            )
            assert await admin.fetchval(encrypted, BROKER) == (told is not None)
        await backend.undo(one.lease_id, target_id=TARGET)
        await backend.close()
    target.write_secret(query="?sslmode=verify-full")  # by an authority that nobody here knows
    backend = target.backend()
    with pytest.raises(Exception, match="does not answer"):
        await backend.standing(TARGET)
    await backend.close()
    target.write_secret()


async def test_names_in_the_url_are_quoted(
    postgres_server: PostgresServer, target: PostgresTarget, tmp_path: Any
) -> None:
    odd = PostgresTarget("thing", postgres_server, tmp_path, 'odd-"-&')
    async with postgres_server.admin() as admin:
        await admin.execute('CREATE DATABASE "odd-""-&"')
        await admin.execute('REVOKE ALL ON DATABASE "odd-""-&" FROM PUBLIC')
        await admin.execute(f'GRANT CONNECT ON DATABASE "odd-""-&" TO {BROKER} WITH GRANT OPTION')
    odd.write_secret()
    backend = odd.backend()
    one = wanting(allow("read", 'odd-"-&'))
    url = await url_of(backend, one)
    assert await query(url, "SELECT current_database()") == [('odd-"-&',)]
    await backend.undo(one.lease_id, target_id=TARGET)
    await backend.close()
    async with postgres_server.admin() as admin:
        await admin.execute('DROP DATABASE "odd-""-&"')


async def test_role_ends_no_later_than_the_lease(backend: PostgresBackend, target: PostgresTarget) -> None:
    one = wanting(allow("read", "shop/shop/a"), deadline=int(time.time()) + 1234)
    url = await url_of(backend, one)
    async with target.admin() as admin:
        until = await admin.fetchval(
            "SELECT extract(epoch FROM rolvaliduntil) FROM pg_roles WHERE rolname = $1",
            urlsplit(url).username,
        )
    assert int(until) == one.deadline
    await backend.undo(one.lease_id, target_id=TARGET)


# --- the document -----------------------------------------------------------------------------------------------------


async def test_documented_commands_remove_the_broker_role(
    own_postgres_server: PostgresServer, tmp_path: Any
) -> None:
    """On a server of its own: the role is one for all databases of a server."""
    target = PostgresTarget("thing", own_postgres_server, tmp_path, "shop")
    await target.make(["CREATE SCHEMA shop", "CREATE TABLE shop.a (id int)"])
    backend = target.backend()
    one = wanting(allow("read", "shop/shop/a"))
    assert await may(await url_of(backend, one), "SELECT * FROM shop.a")
    await backend.undo(one.lease_id, target_id=TARGET)
    await backend.close()
    async with target.admin() as admin:
        for statement in documented("How to take it away again"):
            await admin.execute(statement)
        assert await admin.fetchval("SELECT count(*) FROM pg_roles WHERE rolname = $1", BROKER) == 0
        acls = await admin.fetch("SELECT relacl::text FROM pg_class WHERE relname = 'a'")
        assert BROKER not in str(acls)
