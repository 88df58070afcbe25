"""Which Kafka and which Redis the tests run against. What was asked for and cannot start fails the run."""

from __future__ import annotations

import atexit
import gc
import itertools
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from xdist.scheduler import LoadFileScheduling

from ringfence.dev.processes import StackError
from tests.brokers import KafkaServer, RedisServer, start_kafka, start_redis
from tests.support.servers.postgres import PostgresServer, server_programs
from tests.support.signals import handle_ignored
from tests.support.switches import switch_off
from tests.support.time_limits import TimeLimits, add_settings
from tests.support.world import World

KINDS = ("embedded", "apache", "docker")
_SWITCHES = (("--no-fast-path", "gateway", "fast_path", "fast_path_only"),)
"""By option: the service, the argument of its `build` that is False then, and the marker of tests about that path."""
_WAIT = ("integration", "e2e", "flows", "gateway", "chaos", "")
"""The folders of tests that wait for servers, those with the longest files first."""
ON_STACK = "tests/integration/stack/"
"""The folder of the tests that share one running stack."""
_APART = tuple(f"tests/integration/test_{name}.py" for name in ("kafka_restored", "kills", "rotation"))
"""Files whose tests take a minute and more, and share no fixture of their file: each test goes to whichever process is
free.
"""
_FIRST = (
    ON_STACK, "tests/integration/test_upgrade.py", *_APART,
    *(f"tests/runner/test_{name}" for name in ("fleet", "run_", "demo_runner")),
)  # fmt: skip
"""What takes long though it has few tests begins first, so that it is not left for one process at the end."""
BEFORE = "a4af09336638f72c39c76179413f192e0f3ff8ee"
"""The last commit that changed a format, from which an upgrade is tested. Nothing was released, so what older commits
wrote is read by nothing."""

# Python searches for unreachable cycles after every 700 new objects, which took a tenth of the processor time of a run.
gc.set_threshold(20_000, 10, 10)

# How long an example takes says how busy the machine is. No database: a test that was stopped for its time would be
# searched for a smaller example the next time, and take longer still.
hypothesis.settings.register_profile(
    "ringfence", deadline=None, database=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("ringfence")

# A second is much for an evaluation and little for a machine under load, and no test is about that second: those of
# a bundle that hangs say how long. For services in this process and for those that it starts.
os.environ.setdefault("RINGFENCE_POLICY_EVALUATION_TIMEOUT_MS", "30000")

# Tests answer for people within milliseconds, which no person does: what is found of it would stand in every story.
# Those of detection switch it on.
os.environ.setdefault("RINGFENCE_AUDIT_DETECT", "false")

# The personal settings file and the state of whoever runs the tests are not those of tests, nor of what they start.
_USER = tempfile.mkdtemp(prefix="ringfence-user-")
os.environ |= {"XDG_CONFIG_HOME": f"{_USER}/config", "XDG_STATE_HOME": f"{_USER}/state"}
atexit.register(shutil.rmtree, _USER, ignore_errors=True)


@dataclass(frozen=True)
class Kafka:
    """The broker of this run. `kind` is embedded, apache, docker or address."""

    kind: str
    server: KafkaServer

    @property
    def embedded(self) -> bool:
        """It answers an empty fetch at once: its consumers have to be paced."""
        return self.kind == "embedded"

    @property
    def bootstrap(self) -> str:
        return self.server.bootstrap

    def restart(self) -> None:
        """Raises StackError for a broker that was given by its address."""
        self.server.restart()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ringfence")
    group.addoption(
        "--kafka",
        default=os.environ.get("RINGFENCE_TEST_KAFKA") or "embedded",
        help="embedded (default), apache, docker or HOST:PORT; also RINGFENCE_TEST_KAFKA",
    )
    group.addoption(
        "--redis",
        default=os.environ.get("RINGFENCE_TEST_REDIS") or "embedded",
        help="embedded (default), docker or a redis:// URL; also RINGFENCE_TEST_REDIS",
    )
    group.addoption(
        "--opa",
        default=os.environ.get("RINGFENCE_TEST_OPA") or "",
        help="with a real OPA: build (the pinned one, once) or the path of an opa; also RINGFENCE_TEST_OPA",
    )
    group.addoption(
        "--postgres",
        default=os.environ.get("RINGFENCE_TEST_POSTGRES") or "",
        help="the folder with another PostgreSQL's programs than Debian's newest; also RINGFENCE_TEST_POSTGRES",
    )
    group.addoption(
        "--oci",
        default=os.environ.get("RINGFENCE_TEST_OCI") or "",
        help="sandboxes as containers too: podman (started for the run, as root); also RINGFENCE_TEST_OCI",
    )
    group.addoption(
        "--no-fast-path",
        action="store_true",
        help="gateways that tests build in this process have no fast path; tests marked `fast_path_only` are left out",
    )
    group.addoption(
        "--upgrade-from",
        default=os.environ.get("RINGFENCE_TEST_UPGRADE_FROM") or BEFORE,
        help="the commit of the version that is upgraded; also RINGFENCE_TEST_UPGRADE_FROM",
    )

    add_settings(parser)


class FilesAndStack(LoadFileScheduling):  # type: ignore[misc]
    """Gives the tests of a file to one process, and all tests on the one running stack: each stack costs a fifth of a
    core. The tests of files in `_APART` are given out one by one.
    """

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith(_APART):
            return nodeid
        return ON_STACK if nodeid.startswith(ON_STACK) else str(super()._split_scope(nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FilesAndStack | None:
    return FilesAndStack(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_configure(config: pytest.Config) -> None:
    handle_ignored()
    config.pluginmanager.register(TimeLimits(config), "ringfence-time-limits")
    for option, role, path, _ in _SWITCHES:
        if config.getoption(option):
            switch_off(role, path)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    markers = [marker for option, _, _, marker in _SWITCHES if config.getoption(option)]
    left_out = [item for item in items if any(item.get_closest_marker(marker) for marker in markers)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = _in_order([item for item in items if item not in left_out])


def _in_order(items: list[pytest.Item]) -> list[pytest.Item]:
    """By turns a file of tests that wait for servers and one of tests that compute: together they use the processors.

    The stack first, as one process has all of it; then the files with most tests. So no long file is left for the end.
    An upgrade has few tests that take minutes.
    """
    files: dict[str, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.nodeid.split("::", 1)[0], []).append(item)
    longest = sorted(
        files, key=lambda path: (not path.startswith(_FIRST), _WAIT.index(_suite(path)), -len(files[path]))
    )
    wait = [path for path in longest if _suite(path)]
    compute = [path for path in longest if not _suite(path)]
    turns = itertools.chain.from_iterable(itertools.zip_longest(wait, compute))
    return [item for path in turns if path is not None for item in files[path]]


def _suite(path: str) -> str:
    """The folder of tests that wait for servers; empty for those that compute."""
    return next((suite for suite in _WAIT if suite and path.startswith(f"tests/{suite}/")), "")


def pytest_collection_finish() -> None:
    """Modules and collected tests stay until the end: no search for cycles looks at them again."""
    gc.freeze()


@contextmanager
def needed(request: pytest.FixtureRequest) -> Iterator[None]:
    """What was asked for and cannot start fails the test that wants it, and ends the run: it says why, once."""
    try:
        yield
    except StackError as error:
        request.session.shouldfail = error.message
        pytest.fail(error.message, pytrace=False)


@pytest.fixture(scope="session")
def kafka(request: pytest.FixtureRequest) -> Iterator[Kafka]:
    """One broker for the whole run; give topics and groups names of their own. Restarting it disturbs
    others."""
    choice = request.config.getoption("--kafka")
    with tempfile.TemporaryDirectory(prefix="ringfence-kafka-") as folder:
        with needed(request):
            server = start_kafka(choice, Path(folder))
        yield Kafka(choice if choice in KINDS else "address", server)
        server.stop()


@pytest.fixture(scope="session")
def redis_server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """One Redis for the whole run; give keys a namespace of their own. Restarting it disturbs others."""
    choice = request.config.getoption("--redis")
    with tempfile.TemporaryDirectory(prefix="ringfence-redis-") as folder:
        with needed(request):
            server = start_redis(choice, Path(folder))
        yield server
        server.stop()


@pytest.fixture(scope="session")
def postgres_server(request: pytest.FixtureRequest) -> Iterator[PostgresServer]:
    """One PostgreSQL for the whole run; take databases of your own, and let PUBLIC connect to none of them."""
    with needed(request):
        server = PostgresServer(server_programs(request.config.getoption("--postgres")))
        server.start()
    yield server
    server.stop()


@pytest.fixture
async def world(kafka: Kafka, redis_server: RedisServer) -> AsyncIterator[World]:
    """An organisation of its own for one test: root, trust, topics, an operator. No service runs yet."""
    async with World.open(kafka.bootstrap, redis_server.url, paced=kafka.embedded) as world:
        yield world
