"""Each service starts by the very command, and under the very names of settings, that docker-compose.yml gives it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from ringfence.client.admin.trust_setup import ON_DEMAND, SERVICE_ROLES, make_trust
from ringfence.dev.processes import free_port, spawn
from ringfence.dev.stack import Stack, StackOptions, readiness
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.service.bearer_tokens import new_token
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support.compose import COMPOSE_FILE, environment_of, loaded
from tests.support.lost_redis import declare_complete
from tests.support.old_trust import without_signals

READY_WITHIN_S = 60


@pytest.fixture(scope="module")
def prepared(
    kafka: Kafka, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    """Topics and trust, but no services. Redis is complete: each starts alone, with no revoker to see to it."""
    mark = f"compose{uuid.uuid4().hex[:6]}"
    options = StackOptions(
        tmp_path_factory.mktemp("compose"),
        kafka=kafka.bootstrap,
        embedded_broker=kafka.embedded,
        redis_url=redis_server.url,
        topic_prefix=mark,
        redis_prefix=mark,
        services=(),
    )
    with Stack(options) as stack:
        asyncio.run(declare_complete(stack.settings()))
        yield stack


def of_an_operator(stack: Stack) -> dict[str, str]:
    """The files that services need which not everybody runs, by the names of their settings."""
    folder = stack.options.state
    provisioner = folder / "provisioner.json"
    if not provisioner.exists():
        SigningKey.generate(f"spiffe://{stack.options.trust_domain}/user/acme").save(provisioner)
    (folder / "receivers.toml").write_text(
        '[[receiver]]\nname = "billing"\naudience = "https://billing.example"\ntargets = ["*"]\n'
    )
    (folder / "tokens").write_text(new_token("billing")[1] + "\n")
    (folder / "tokens").chmod(0o600)
    return {
        "RINGFENCE_SCIM_PROVISIONER": str(provisioner),
        "RINGFENCE_SCIM_TOKENS": str(folder / "tokens"),
        "RINGFENCE_SIGNALS_RECEIVERS": str(folder / "receivers.toml"),
        "RINGFENCE_SIGNALS_TOKENS": str(folder / "tokens"),
    }


def healthy(check: list[str], port: int) -> bool:
    """What the health check of Compose says of a service on this port."""
    kind, python, *code = check
    assert (kind, python) == ("CMD", "python")
    argv = [sys.executable, *(part.replace(":8080/", f":{port}/") for part in code)]
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0


@contextmanager
def started(prepared: Stack, name: str, **more: str) -> Iterator[int]:
    """A service by its command in Compose, once it is ready, on the port that this yields. It ends in good order."""
    service = loaded(COMPOSE_FILE)["services"][name]
    given = environment_of(name, {"RINGFENCE_TRUST_ROOT": prepared.trust.fingerprint()})
    port = free_port()
    (prepared.options.state / "gateway").mkdir(exist_ok=True)
    assert given.keys() >= {"RINGFENCE_HTTP", "RINGFENCE_KEY_FILE", "RINGFENCE_KAFKA"}
    assert name == "console" or "RINGFENCE_REDIS_URL" in given
    # Only what names a place inside the containers is replaced by the same thing here.
    places = {
        **prepared.environment(),
        "RINGFENCE_HTTP": f"127.0.0.1:{port}",
        "RINGFENCE_GATEWAY_SPOOL": str(prepared.options.state / "spool"),
        "RINGFENCE_GATEWAY_SOCKETS": str(prepared.options.state / "gateway/tasks"),
        "RINGFENCE_GATEWAY_CA_FILE": str(prepared.options.state / "gateway/ca.pem"),
        **{
            key: str(prepared.trust.service_key(value.rpartition("/")[2].removesuffix("-key")))
            for key, value in given.items()
            if value.startswith("/run/secrets/")
        },
        **{key: file for key, file in of_an_operator(prepared).items() if key in given},
    }
    plain = {key: value for key, value in os.environ.items() if not key.startswith("RINGFENCE_")}
    child = spawn(
        name,
        [sys.executable, "-m", "ringfence.cli.main", *service["command"]],
        env={**plain, **given, **places, **more},
        cwd=prepared.options.state,
        log_path=prepared.options.state / "logs" / f"{name}.log",
    )
    try:
        child.wait_until(lambda: readiness(port) is None, READY_WITHIN_S, "was ready")
        assert healthy(service["healthcheck"]["test"], port)
        assert not healthy(service["healthcheck"]["test"], free_port()), "where nobody answers"
        yield port
    finally:
        grace_s = float(service["stop_grace_period"].removesuffix("s"))
        assert child.stop(grace_s) == 0, f"{name} did not drain in good order: {child.log_tail()}"


@pytest.mark.parametrize("name", [*SERVICE_ROLES, *(name for name in ON_DEMAND if name != "console")])
def test_a_service_starts_by_the_command_of_compose(prepared: Stack, name: str) -> None:
    with started(prepared, name):
        pass


def test_the_console_starts_by_the_command_of_compose(prepared: Stack) -> None:
    """It has the trust bundle from the registry, with the origin where people sign in."""
    with started(prepared, "registry") as port:
        here = {
            "RINGFENCE_REGISTRY_URL": f"http://127.0.0.1:{port}",
            "RINGFENCE_CONSOLE_ORIGIN": prepared.origins["session"],
        }
        with started(prepared, "console", **here):
            pass


def test_a_stack_on_an_older_trust_folder_starts_a_service_that_is_younger(
    kafka: Kafka, redis_server: RedisServer, tmp_path: Path
) -> None:
    mark = f"older{uuid.uuid4().hex[:6]}"
    options = StackOptions(
        tmp_path,
        kafka=kafka.bootstrap,
        embedded_broker=kafka.embedded,
        redis_url=redis_server.url,
        topic_prefix=mark,
        redis_prefix=mark,
        services=("signals",),
    )
    stack = Stack(options)
    make_trust(stack.trust, options.trust_domain, options.operator)
    without_signals(stack.trust)
    options.environment = {
        key: file for key, file in of_an_operator(stack).items() if key.startswith("RINGFENCE_SIGNALS")
    }
    with stack:
        about = httpx.get(f"{stack.url('signals')}/.well-known/ssf-configuration").json()
        assert about["issuer"] == stack.url("signals")
        (key,) = httpx.get(about["jwks_uri"]).json()["keys"]
        assert key["kid"] == SigningKey.load(stack.trust.service_key("signals")).kid
