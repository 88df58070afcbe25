"""`ringfence adopt` with a password of `.pgpass`: after it an agent reads one table by roles of its leases."""

from __future__ import annotations

import shlex
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from ringfence.backends.postgres.backend import verifier
from tests.backends import story
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support.adopter import PROGRAM, Adopter
from tests.support.servers.postgres import BROKER, BROKER_SECRET, PostgresServer, PostgresTarget, query
from tests.support.stack import RunningStack

MADE = (
    "CREATE SCHEMA shop",
    'CREATE TABLE shop."Orders" (id int)',
    'INSERT INTO shop."Orders" VALUES (421)',
    "CREATE TABLE shop.salaries (id int)",
)
APP_PASSWORD = r"app:pass\word"


@pytest.fixture(scope="module")
async def running(kafka: Kafka, redis_server: RedisServer) -> AsyncIterator[RunningStack]:
    async with story.running(kafka, redis_server, "adopt", {}) as (realm, _):
        yield realm


@pytest.fixture
async def database(postgres_server: PostgresServer, tmp_path: Path) -> PostgresTarget:
    name = f"adopt_{uuid.uuid4().hex[:8]}"
    target = PostgresTarget(f"db-{name[-8:]}", postgres_server, tmp_path, name)
    await target.make(MADE)
    return target


@pytest.fixture
async def adopter(running: RunningStack, tmp_path: Path) -> Adopter:
    return await Adopter(running.stack, tmp_path, uuid.uuid4().hex[:8]).make()


def words_of(adopter: Adopter, target: PostgresTarget, user: str) -> tuple[str, ...]:
    return (
        ".pgpass", "--target", target.target_id, "--url", f"postgresql://{user}@{target.address}/{target.database}",
        "--field", f"127.0.0.1.{target.database}.{user}", "--agent", adopter.agent,
        "--allow", f"{target.target_id}:read:{target.database}/shop/Orders",
    )  # fmt: skip


def pgpass_of(adopter: Adopter, target: PostgresTarget, user: str, password: str) -> tuple[Path, str]:
    """A file with two entries and a comment, and its text."""
    host, _, port = target.address.partition(":")
    entry = password.replace("\\", r"\\").replace(":", r"\:")
    others = "# of the shop\nother.example:5432:*:me:another-password\n"
    text = f"{others}  {host}:{port}:{target.database}:{user}:{entry} \n"
    file = adopter.folder / ".pgpass"
    file.write_text(text)
    file.chmod(0o600)
    adopter.secrets += [password, entry, "another-password"]
    return file, text.replace(f":{entry} \n", ":replaced-by-ringfence \n")


async def psql(
    adopter: Adopter, target: PostgresTarget, printed: str, statement: str, status: int = 0
) -> str:
    """What an agent's `psql` prints, started as adopt said."""
    launch = next(line for line in printed.splitlines() if line.endswith(" COMMAND"))
    words = shlex.split(launch.removesuffix(" COMMAND"))
    words = [part for word in words for part in (PROGRAM if word == "ringfence" else (word,))]
    program = str(target.server.programs / "psql")
    return await adopter.run(*words, program, "--no-psqlrc", "-Atc", statement, status=status)


@pytest.mark.timeout(300)
async def test_password_of_a_role_that_makes_roles_becomes_ringfences_own(
    adopter: Adopter, database: PostgresTarget
) -> None:
    file, after = pgpass_of(adopter, database, BROKER, BROKER_SECRET)
    before = file.read_text()
    printed = await adopter.adopt(*words_of(adopter, database, BROKER))
    assert 'SELECT FROM "shop"."Orders" LIMIT 1: allowed' in printed
    assert "pg_authid LIMIT 1: refused by the server" in printed
    assert file.read_text() == after
    assert adopter.place(database.target_id).read_text().startswith(f"postgresql://{BROKER}:{BROKER_SECRET}@")
    assert "421\n" in await psql(adopter, database, printed, 'SELECT id FROM shop."Orders"')
    denied = await psql(adopter, database, printed, "SELECT id FROM shop.salaries", status=1)
    assert "permission denied" in denied

    refused = await adopter.adopt("--target", database.target_id, "--finish", status=1)
    assert "still has the credential" in refused
    await adopter.adopt("--target", database.target_id, "--undo")
    assert file.read_text() == before
    assert not adopter.place(database.target_id).exists()


@pytest.mark.timeout(300)
async def test_url_in_the_place_stays_and_the_exposed_password_goes(
    adopter: Adopter, database: PostgresTarget
) -> None:
    async with database.server.admin() as admin:
        await admin.execute(f"CREATE ROLE app_{adopter.mark} LOGIN PASSWORD '{verifier(APP_PASSWORD)}'")
    file, after = pgpass_of(adopter, database, f"app_{adopter.mark}", APP_PASSWORD)
    place = adopter.place(database.target_id)
    url = f"postgresql://{BROKER}:{BROKER_SECRET}@{database.address}/{database.database}"
    place.write_text(url)
    place.chmod(0o600)
    printed = await adopter.adopt(*words_of(adopter, database, f"app_{adopter.mark}"))
    assert place.read_text() == url
    assert file.read_text() == after
    assert "421\n" in await psql(adopter, database, printed, 'SELECT id FROM shop."Orders"')
    why = "one developer, one machine"
    await adopter.adopt("--target", database.target_id, "--finish", "--accept-agent-can-read", why)
    assert not adopter.state()


@pytest.mark.timeout(300)
async def test_role_that_makes_no_roles_stops_at_the_trial(
    adopter: Adopter, database: PostgresTarget
) -> None:
    async with database.server.admin() as admin:
        await admin.execute(f"CREATE ROLE app_{adopter.mark} LOGIN PASSWORD '{verifier(APP_PASSWORD)}'")
        await admin.execute(f"GRANT CONNECT ON DATABASE {database.database} TO app_{adopter.mark}")
    file, _ = pgpass_of(adopter, database, f"app_{adopter.mark}", APP_PASSWORD)
    before = file.read_text()
    printed = await adopter.adopt(*words_of(adopter, database, f"app_{adopter.mark}"), status=1)
    assert "stopped at: trial" in printed
    assert file.read_text() == before
    place = adopter.place(database.target_id).read_text()
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await query(place, "CREATE ROLE another")


@pytest.mark.parametrize("url", ["postgresql://app:secret@db/shop", "postgresql://app@db", "https://db/shop"])
async def test_url_of_another_form_is_refused(adopter: Adopter, database: PostgresTarget, url: str) -> None:
    pgpass_of(adopter, database, BROKER, BROKER_SECRET)
    words = (
        word if not word.startswith("postgresql:") else url for word in words_of(adopter, database, BROKER)
    )
    assert "postgresql://USER@HOST/DATABASE, without the password" in await adopter.adopt(*words, status=1)
