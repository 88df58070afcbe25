"""What is MariaDB's own: columns, names with wildcards, PUBLIC, TLS, locks, limits, and the drivers of agents."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import urlsplit

import mysql.connector
import pymysql
import pytest
import sqlalchemy

from ringfence.backends import MysqlBackend, TargetError, TargetRefusedError
from ringfence.client.agent.credentials import mysql_arguments
from ringfence.messages.base import Permission
from ringfence.messages.lease import Lease
from tests.backends.kinds import TARGET, MysqlKind, allow, lease, state
from tests.support.servers.mariadb import (
    BROKER,
    BROKER_SECRET,
    MariadbServer,
    MariadbTarget,
    connect,
    lives,
    may,
    query,
)
from tests.support.servers.postgres import documented


@pytest.fixture
def target(mysql_kind: MysqlKind) -> MariadbTarget:
    return mysql_kind.target


@pytest.fixture
async def backend(target: MariadbTarget) -> AsyncIterator[MysqlBackend]:
    backend = target.backend()
    yield backend
    await backend.close()


def wanting(*scope: Permission, **fields: Any) -> Lease:
    return lease("mysql", *scope, **fields)


READING = allow("read", "shop/a")


async def url_of(backend: MysqlBackend, one: Lease, **settings: Any) -> str:
    return (await backend.mint(one, state("mysql", **settings))).value


async def refused(backend: MysqlBackend, one: Lease, match: str) -> None:
    with pytest.raises(TargetRefusedError, match=match):
        await backend.mint(one, state("mysql"))
    assert one.lease_id not in await backend.existing(TARGET)


# --- no more, no less -------------------------------------------------------------------------------------------------


async def test_a_column_is_not_its_table(backend: MysqlBackend) -> None:
    one = wanting(allow("read", "shop/people/name"), allow("update", "shop/people/salary"))
    url = await url_of(backend, one)
    assert await may(url, "SELECT name FROM shop.people")
    assert await may(url, "UPDATE shop.people SET salary = 1")
    for beyond in (
        "SELECT salary FROM shop.people",
        "SELECT * FROM shop.people",
        "UPDATE shop.people SET name = 'x'",
        "INSERT INTO shop.people (name) VALUES ('x')",
        "DELETE FROM shop.people",
        "SELECT name FROM shop.people WHERE salary > 1",
    ):
        assert not await may(url, beyond), beyond
    await backend.undo(one.lease_id, target_id=TARGET)


async def test_underscore_in_the_name_of_a_database_is_no_wildcard(
    backend: MysqlBackend, target: MariadbTarget
) -> None:
    target.server.admin(f"GRANT SELECT ON `sh\\_p`.* TO {BROKER} WITH GRANT OPTION")
    one = wanting(allow("read", "sh_p/a"))
    url = await url_of(backend, one)
    assert await may(url, "SELECT * FROM sh_p.a")
    assert not await may(url, "SELECT * FROM shop.a")
    await backend.undo(one.lease_id, target_id=TARGET)


async def test_wildcards_stand_for_what_is_there_now(backend: MysqlBackend, target: MariadbTarget) -> None:
    target.server.admin("CREATE TABLE shop.log_1 (id int)", "CREATE TABLE shop.log_2 (id int)")
    one = wanting(allow("read", "shop/log_*"))
    url = await url_of(backend, one)
    target.server.admin("CREATE TABLE shop.log_3 (id int)")
    assert await may(url, "SELECT * FROM shop.log_1, shop.log_2")
    assert not await may(url, "SELECT * FROM shop.log_3")
    assert not await may(url, "SELECT * FROM shop.a")
    await backend.undo(one.lease_id, target_id=TARGET)
    target.server.admin("DROP TABLE shop.log_1, shop.log_2, shop.log_3")


@pytest.mark.parametrize(
    ("verb", "resource", "says"),
    [
        ("read", "shop/nothing", "means nothing"),
        ("read", "shop/no*", "means nothing"),
        ("read", "SHOP/a", "means nothing"),
        ("read", "shop/A", "means nothing"),
        ("read", "shop/a/nothing", "means nothing"),
        ("read", "nowhere/a", "means nothing"),
        ("read", "vault/a", "means nothing"),  # Ringfence's own user does not see it
        ("read", "shop/**x", "wildcard|\\*\\*"),
        ("delete", "shop/a/id", "a right on a table"),
        ("execute", "shop/all_secrets", "the verb"),
    ],
)
async def test_grant_that_would_be_inexact_is_refused(
    backend: MysqlBackend, verb: str, resource: str, says: str
) -> None:
    one = wanting(allow("read", "shop/a").model_copy(update={"verbs": (verb,), "resources": (resource,)}))
    await refused(backend, one, says)


async def test_right_that_the_broker_lacks_is_refused_whole(
    backend: MysqlBackend, target: MariadbTarget
) -> None:
    target.server.admin(f"GRANT SELECT ON vault.* TO {BROKER}")  # to read, not to give
    await refused(backend, wanting(READING, allow("read", "vault/a")), "may not give")
    target.server.admin(f"REVOKE SELECT ON vault.* FROM {BROKER}")
    assert not target.users()


@pytest.mark.parametrize(
    ("give", "take"),
    [
        ("GRANT SELECT ON shop.secrets TO PUBLIC", "REVOKE SELECT ON shop.secrets FROM PUBLIC"),
        ("GRANT PROCESS ON *.* TO PUBLIC", "REVOKE PROCESS ON *.* FROM PUBLIC"),
        ("CREATE USER ''@'%'; GRANT SELECT ON shop.* TO ''@'%'", "DROP USER ''@'%'"),
    ],
    ids=["table", "global", "anonymous"],
)
async def test_right_of_every_user_is_refused(
    backend: MysqlBackend, target: MariadbTarget, give: str, take: str
) -> None:
    target.server.admin(*give.split("; "))
    one = wanting(READING)
    try:
        await refused(backend, one, "every user has rights")
        await url_of(backend, one, public="accept")
    finally:
        target.server.admin(take)
    await backend.undo(one.lease_id, target_id=TARGET)
    await url_of(backend, one)
    await backend.undo(one.lease_id, target_id=TARGET)


# --- the end ----------------------------------------------------------------------------------------------------------


async def test_undone_while_it_works(backend: MysqlBackend) -> None:
    """An open transaction with locks, and a statement that runs."""
    one = wanting(allow(("read", "write"), "shop/b"))
    url = await url_of(backend, one)
    holding, running = connect(url), connect(url)
    holding.begin()
    holding.cursor().execute("SELECT * FROM shop.b FOR UPDATE")
    waiting = asyncio.create_task(asyncio.to_thread(running.cursor().execute, "SELECT SLEEP(60)"))
    await backend.undo(one.lease_id, target_id=TARGET)
    with pytest.raises(pymysql.err.MySQLError):
        await waiting
    assert not await lives(holding)


async def test_agent_that_holds_the_lock_of_its_lease_does_not_stop_the_end(backend: MysqlBackend) -> None:
    one = wanting(READING)
    connection = connect(await url_of(backend, one))
    with connection.cursor() as cursor:
        cursor.execute("SELECT GET_LOCK(%s, 0)", (backend.users_of(one.lease_id),))
        assert cursor.fetchall() == ((1,),)
    await backend.undo(one.lease_id, target_id=TARGET)
    assert not await lives(connection)
    assert one.lease_id not in await backend.existing(TARGET)


async def test_undo_ends_a_mint_that_is_still_at_work(backend: MysqlBackend, target: MariadbTarget) -> None:
    """An issuer was cut off, and the server has its connection still."""
    one = wanting(READING)
    issuer = pymysql.connect(
        host="127.0.0.1", port=target.server.port, user=BROKER, password=BROKER_SECRET, autocommit=True
    )
    issuer.cursor().execute("SELECT GET_LOCK(%s, 0)", (backend.users_of(one.lease_id),))
    await backend.undo(one.lease_id, target_id=TARGET)
    assert not await lives(issuer)


async def test_session_without_its_user_is_found_and_ended(
    backend: MysqlBackend, target: MariadbTarget
) -> None:
    """Its user was dropped, and the revoker died before it killed the session."""
    one = wanting(READING)
    url = await url_of(backend, one)
    connection = connect(url)
    target.server.admin(f"DROP USER `{urlsplit(url).username}`@`%`")
    assert await lives(connection)
    assert one.lease_id in await backend.existing(TARGET)
    await backend.undo(one.lease_id, target_id=TARGET)
    assert not await lives(connection)
    assert one.lease_id not in await backend.existing(TARGET)


async def test_new_password_of_the_agents_own_ends_with_the_lease_too(backend: MysqlBackend) -> None:
    one = wanting(READING)
    url = await url_of(backend, one)
    await asyncio.to_thread(query, url, "SET PASSWORD = PASSWORD('mine')")
    mine = url.replace(str(urlsplit(url).password), "mine")
    assert await may(mine, "SELECT id FROM shop.a")
    await backend.undo(one.lease_id, target_id=TARGET)
    assert not await may(mine, "SELECT id FROM shop.a")


# --- what agents get --------------------------------------------------------------------------------------------------


async def test_a_credential_has_so_many_sessions(backend: MysqlBackend) -> None:
    one = wanting(READING)
    url = await url_of(backend, one, connection_limit=2)
    with connect(url), connect(url), pytest.raises(pymysql.err.OperationalError, match="1226"):
        connect(url)
    await backend.undo(one.lease_id, target_id=TARGET)


async def test_credential_is_refused_from_another_host(backend: MysqlBackend) -> None:
    one = wanting(READING)
    assert not await may(await url_of(backend, one, host="192.0.2.%"), "SELECT id FROM shop.a")
    assert await may(await url_of(backend, one, host="127.0.0.%"), "SELECT id FROM shop.a")
    await backend.undo(one.lease_id, target_id=TARGET)
    assert not [name for name in await backend.existing(TARGET) if name == one.lease_id]


@pytest.fixture
def secret_of(target: MariadbTarget) -> Iterator[Any]:
    yield target.write_secret
    target.write_secret()


async def test_with_tls_where_the_server_has_it(target: MariadbTarget, secret_of: Any) -> None:
    root = target.server.root_certificate
    for query_, told in (
        ("", "require"),
        ("?sslmode=require", "require"),
        (f"?sslmode=verify-full&sslrootcert={root}", "verify-full"),
        ("?sslmode=disable", None),
    ):
        secret_of(query=query_)
        backend = target.backend()
        one = wanting(READING)
        url = await url_of(backend, one)
        assert urlsplit(url).query == (f"sslmode={told}" if told else "")
        plain = {**mysql_arguments(url.partition("?")[0]), "ssl_disabled": True}
        if told is None:
            pymysql.connect(**plain).close()
        else:
            with pytest.raises(pymysql.err.OperationalError, match="1045"):
                pymysql.connect(**plain)
        if told == "verify-full":
            with pytest.raises(pymysql.err.OperationalError, match="certificate"):
                connect(url)  # by the authorities of this machine
            connect(url, ssl_ca=str(root)).close()
        await backend.undo(one.lease_id, target_id=TARGET)
    secret_of(query="?sslmode=verify-full")  # by an authority that nobody here knows
    with pytest.raises(TargetError, match="does not answer"):
        await target.backend().existing(TARGET)


async def test_drivers_of_agents_take_what_a_credential_applies(backend: MysqlBackend) -> None:
    one = wanting(READING)
    given = mysql_arguments(await url_of(backend, one))
    assert given["database"] == "shop"
    statement = "SELECT note FROM a WHERE id = 1"

    def ask() -> Iterator[Any]:
        for module in (pymysql, mysql.connector):
            connection: Any = module.connect(**given)
            cursor = connection.cursor()
            cursor.execute(statement)
            yield cursor.fetchone()[0]
            connection.close()
        engine = sqlalchemy.create_engine("mysql+pymysql://", connect_args=given)
        with engine.connect() as connected:
            yield connected.execute(sqlalchemy.text(statement)).scalar_one()
        engine.dispose()

    assert await asyncio.to_thread(lambda: list(ask())) == ["one"] * 3
    await backend.undo(one.lease_id, target_id=TARGET)


# --- the document -----------------------------------------------------------------------------------------------------


def test_documented_commands_remove_the_broker(mariadb_server: MariadbServer, target: MariadbTarget) -> None:
    for heading in ("What Ringfence needs there", "How to take it away again"):
        mariadb_server.admin(*(one.replace("ringfence", "leaving") for one in documented(heading, "mysql")))
    for table in ("user", "db", "tables_priv", "columns_priv"):
        assert not mariadb_server.admin(f"SELECT * FROM mysql.{table} WHERE User = 'leaving'")
