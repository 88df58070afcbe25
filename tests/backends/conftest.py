"""The real servers of the suite: Valkey, PostgreSQL, MariaDB, sshd, OpenBao. What cannot start fails the run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from ringfence.backends import BackendContext, built_in
from ringfence.model.target_settings import CREDENTIAL_KINDS
from tests.backends.gated import gated
from tests.backends.kinds import (
    MYSQL_ODD,
    MYSQL_TABLES,
    ODD_TABLES,
    SSH_USERS,
    TABLES,
    TARGET,
    HttpKind,
    JwtKind,
    Kind,
    MysqlKind,
    PostgresKind,
    RedisKind,
    SshKind,
    Stateful,
)
from tests.brokers import RedisServer
from tests.conftest import Kafka, needed
from tests.support.servers.mariadb import MariadbServer, MariadbTarget
from tests.support.servers.openbao import Vault, running_vault
from tests.support.servers.postgres import PostgresServer, PostgresTarget
from tests.support.servers.redis_target import valkey_target
from tests.support.servers.ssh import SshServer, SshTarget


@pytest.fixture(scope="package")
def jwt_kind() -> JwtKind:
    return JwtKind()


@pytest.fixture(scope="package")
async def redis_kind(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RedisKind]:
    async with valkey_target(TARGET, tmp_path_factory.mktemp("valkey")) as target:
        yield RedisKind(target)


@pytest.fixture(scope="package")
async def postgres_kind(
    postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> PostgresKind:
    target = PostgresTarget(TARGET, postgres_server, tmp_path_factory.mktemp("postgres"), "shop")
    quoted = [name.replace('"', '""') for name in ODD_TABLES]
    await target.make([*TABLES, *(f'CREATE TABLE shop."{name}" (id int)' for name in quoted)])
    return PostgresKind(target)


@pytest.fixture(scope="package")
def mariadb_server(request: pytest.FixtureRequest) -> Iterator[MariadbServer]:
    """One MariaDB for all tests of backends."""
    server = MariadbServer()
    with needed(request):
        server.start()
    yield server
    server.stop()


@pytest.fixture(scope="package")
def mysql_kind(mariadb_server: MariadbServer, tmp_path_factory: pytest.TempPathFactory) -> MysqlKind:
    target = MariadbTarget(TARGET, mariadb_server, tmp_path_factory.mktemp("mariadb"))
    quoted = [name.replace("`", "``") for name in MYSQL_ODD]
    target.make([*MYSQL_TABLES, *(f"CREATE TABLE shop.`{name}` (id int)" for name in quoted)])
    return MysqlKind(target)


@pytest.fixture
def own_postgres_server(postgres_server: PostgresServer) -> Iterator[PostgresServer]:
    """A server for one test, in which the broker's role and the database `shop` are that test's."""
    server = PostgresServer(postgres_server.programs)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="package")
def ssh_server(request: pytest.FixtureRequest) -> Iterator[SshServer]:
    """One sshd for all tests of backends."""
    with needed(request):
        server = SshServer(SSH_USERS)
        server.start()
    yield server
    server.stop()


@pytest.fixture(scope="package")
def ssh_kind(ssh_server: SshServer, tmp_path_factory: pytest.TempPathFactory) -> SshKind:
    target = SshTarget(TARGET, ssh_server, tmp_path_factory.mktemp("ssh"))
    target.write_secret()
    return SshKind(target)


@pytest.fixture(scope="package")
def vault(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vault]:
    with needed(request), running_vault(tmp_path_factory.mktemp("bao")) as vault:
        yield vault


@pytest.fixture(scope="package")
async def http_kind(
    kafka: Kafka, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[HttpKind]:
    # Its grace is long: what ends with the rest of Ringfence gone is to end by its own deadline.
    async with gated(kafka, redis_server, tmp_path_factory.mktemp("http"), TARGET, grace_s=600) as stage:
        yield HttpKind(stage)


BY_THE_TARGET = tuple(name for name, kind in CREDENTIAL_KINDS.items() if kind.handed_out)
BY_THE_GATEWAY = tuple(name for name, kind in CREDENTIAL_KINDS.items() if not kind.handed_out)
"""Those that declare `enforced_by = gateway`: an agent has nothing to show to the target, so it goes through that."""


@pytest.fixture(scope="package", params=[*BY_THE_TARGET, *BY_THE_GATEWAY])
def kind(request: pytest.FixtureRequest) -> Kind:
    """Every kind there is: the fixture `<name>_kind` makes it."""
    made: Kind = request.getfixturevalue(f"{request.param}_kind")
    return made


STATEFUL = tuple(
    name
    for name, one in built_in(BackendContext("test.example", "https://issuer.test")).items()
    if not one.stateless
)


@pytest.fixture(scope="package", params=STATEFUL)
def stateful(request: pytest.FixtureRequest) -> Stateful:
    """Every kind that leaves something at its target."""
    made: Stateful = request.getfixturevalue(f"{request.param}_kind")
    return made
