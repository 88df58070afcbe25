"""What docs/containers.md says of reaching the services of docker-compose.yml, on processes with the same settings.

Only what names a place inside the containers is replaced: hosts, folders and ports.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringfence.cli.commands.dev import client_settings
from ringfence.client.admin.administrator import Administrator
from ringfence.client.agent.agent import Agent
from ringfence.dev.processes import LOOPBACK, free_port
from ringfence.dev.stack import Stack, StackOptions
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.api import GATEWAY_PORT
from ringfence.messages.base import Permission
from ringfence.messages.registry import BackendSettings, RequestRule, VerbFloor
from ringfence.model.identity.spiffe_ids import spiffe_id
from tests.brokers import RedisServer
from tests.brokers.secured import Authority
from tests.conftest import Kafka
from tests.support.compose import COMPOSE_FILE, ROOT, environment_of, loaded
from tests.support.stack import WITHIN_S

PAGE = (ROOT / "docs/containers.md").read_text()
NOTES = [Permission(target="files", verbs=("read",), resources=("notes/*",))]


class Compose:
    """The services, each with its settings of both files; `folder` is where Compose would run."""

    def __init__(self, kafka: Kafka, redis: RedisServer, folder: Path) -> None:
        mark = f"reach{uuid.uuid4().hex[:6]}"
        self.folder = folder
        self.port = free_port()
        """The gateway's TLS port."""
        self.target = free_port()
        (folder / ".ringfence/gateway").mkdir(parents=True)
        outside = {"RINGFENCE_TRUST_ROOT": "x" * 43}
        gateway = environment_of("gateway", outside, tls=True)
        self.stack = Stack(
            StackOptions(
                folder / ".ringfence",
                kafka=kafka.bootstrap,
                embedded_broker=kafka.embedded,
                redis_url=redis.url,
                topic_prefix=mark,
                redis_prefix=mark,
                environment={
                    name: self.here(value)
                    for name, value in gateway.items()
                    if name.startswith("RINGFENCE_GATEWAY_") and name != "RINGFENCE_GATEWAY_ISSUER"
                },
            )
        )

    def here(self, value: str) -> str:
        """A setting of the containers, as it is on this machine."""
        (mount,) = (
            one for one in loaded(COMPOSE_FILE)["services"]["gateway"]["volumes"] if isinstance(one, dict)
        )
        places = {
            mount["target"]: str(self.folder / ".ringfence/gateway"),
            "/var/lib/ringfence/": f"{self.folder}/.ringfence/",
            "/run/secrets/gateway-seal-key": f"{self.folder}/.ringfence/keys/gateway-seal.json",
            "0.0.0.0": LOOPBACK,
            str(GATEWAY_PORT): str(self.port),
        }
        for inside, outside in places.items():
            value = value.replace(inside, outside)
        return value

    def documented(self, beginning: str) -> list[str]:
        """The command of the page that begins so."""
        (command,) = re.findall(rf"^\$ ({re.escape(beginning)}.*)$", PAGE, re.MULTILINE)
        return shlex.split(self.here(command))

    def run(
        self, argv: list[str], environment: dict[str, str] | None = None, *, folder: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        plain = {name: value for name, value in os.environ.items() if not name.startswith("RINGFENCE_")}
        return subprocess.run(
            argv, cwd=folder or self.folder, env=plain | (environment or {}), capture_output=True, text=True,
            timeout=WITHIN_S * 5, check=False,
        )  # fmt: skip


@pytest.fixture(scope="module")
def compose(
    kafka: Kafka, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Compose]:
    made = Compose(kafka, redis_server, tmp_path_factory.mktemp("reach"))
    tls = made.folder / ".ringfence/gateway/tls"
    tls.mkdir()
    file = Authority(tmp_path_factory.mktemp("authority")).issue("gateway", "localhost", "gateway")
    for name in ("cert.pem", "key.pem"):  # the page's own command makes them in a test below
        (tls / name).write_bytes(file.read_bytes())
    with made.stack:
        yield made


def as_cli(compose: Compose, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command with the settings of the service `cli`. Only hosts and names of this test are replaced."""
    own = compose.stack.environment()
    given = environment_of("cli", {"RINGFENCE_TRUST_ROOT": own["RINGFENCE_TRUST_ROOT"]})
    shared = {
        "RINGFENCE_TOPIC_PREFIX",
        "RINGFENCE_REDIS_PREFIX",
        "RINGFENCE_PARTITIONS",
        "RINGFENCE_EMBEDDED_BROKER",
    }
    replaced = {name: value for name, value in own.items() if name in given or name in shared}
    assert given.keys() - replaced.keys() == {"RINGFENCE_HTTP"}, (
        "each other one is a place, or says who is believed"
    )
    empty = compose.folder / "empty"  # as the folder is in which the image runs
    empty.mkdir(exist_ok=True)
    argv = [sys.executable, "-m", "ringfence.cli.main", *command]
    return compose.run(argv, given | replaced, folder=empty)


def test_the_doctor_finds_nothing_wrong_from_inside(compose: Compose) -> None:
    (line,) = re.findall(r"^\$ docker compose run --rm cli (doctor)$", PAGE, re.MULTILINE)
    done = as_cli(compose, line, "--json")
    findings = {one["what"]: one["verdict"] for one in json.loads(done.stdout)["findings"]}
    assert done.returncode == 0, done.stdout
    assert {findings[name] for name in ("Kafka", "Redis", "trust bundle in force", "gateway")} == {"good"}
    assert (findings["keys"], findings["Kafka, replicas"]) == ("unknown", "unknown")


def test_redis_is_compared_with_kafka_from_inside(compose: Compose) -> None:
    (line,) = re.findall(r"^\$ docker compose run --rm cli (rebuild .*)$", PAGE, re.MULTILINE)
    done = as_cli(compose, *line.split())
    assert (done.returncode, done.stdout) == (0, "Redis holds what Kafka knows\n"), done.stderr


async def serve_notes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A target that answers everything with what it was asked for."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    bearer = "a token" if "authorization: bearer " in head.lower() else "nothing"
    body = f"{head.partition(' HTTP')[0]} with {bearer}"
    writer.write(
        f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()
    )
    await writer.drain()
    writer.close()


async def organisation(compose: Compose) -> str:
    """The target `files`, and the agent `reader` with a task for it, as docs/gateway.md makes them. The task's id."""
    settings, folder = client_settings(compose.stack.environment()), compose.folder
    domain = settings.trust_domain
    reader = SigningKey.generate(spiffe_id(domain, "agent", "reader"))
    reader.save(folder / "reader.json")
    maria = SigningKey.generate(spiffe_id(domain, "user", "maria"))
    olga = compose.stack.trust.user_key(compose.stack.options.operator)
    async with Administrator.connect(olga, settings) as administrator:
        await administrator.set_target(
            "files", description="a file server", verbs=[VerbFloor(verb="read")],
            backend=BackendSettings.model_validate({"kind": "jwt", "url": f"http://{LOOPBACK}:{compose.target}"}),
            requests=[RequestRule(method="GET", path="/notes/{name}", verb="read", resource="notes/{name}")],
        )  # fmt: skip
        await administrator.set_user(
            "maria", name="Maria", keys=[maria], roles=["sponsor"], entitlements=NOTES
        )
    async with Administrator.connect(maria, settings) as administrator:
        await administrator.register_agent("reader", description="reads notes", keys=[reader], ceiling=NOTES)
        return await administrator.assign_task("reader", purpose="read notes", scope=NOTES, ends_in_s=1800)


@pytest.mark.tools
async def test_an_agent_reaches_its_target_by_the_socket_and_by_tls(
    compose: Compose,
) -> None:
    server = await asyncio.start_server(serve_notes, LOOPBACK, compose.target)
    settings = client_settings(compose.stack.environment())
    for beginning in ("mkdir -p -m 700", "openssl req"):
        done = compose.run(compose.documented(beginning))
        assert done.returncode == 0, done.stderr
    assert compose.stack.child("gateway").stop() == 0
    compose.stack.start_service("gateway")
    await asyncio.to_thread(compose.stack.wait_ready, ["gateway"])
    try:
        task = await organisation(compose)
        async with Agent.connect(compose.folder / "reader.json", settings) as agent:
            await agent.request(
                task=task, target="files", verbs=["read"], resources=["notes/*"], reason="look", delivery="gateway",
                timeout_s=WITHIN_S,
            )  # fmt: skip
        path = compose.folder / f".ringfence/gateway/tasks/{task}.sock"
        async with asyncio.timeout(WITHIN_S):
            while not path.is_socket():
                await asyncio.sleep(0.05)
        assert path.stat().st_mode & 0o777 == 0o600
        assert (compose.folder / ".ringfence/gateway/ca.pem").exists()

        async def answer(argv: list[str], environment: dict[str, str] | None = None) -> str:
            done = await asyncio.to_thread(compose.run, argv, environment)
            assert done.returncode == 0, done.stderr
            return done.stdout

        curl = [part.replace("TASK", task) for part in compose.documented("curl --unix-socket")]
        async with asyncio.timeout(WITHIN_S):
            while "GET /notes/today with a token" not in await answer(
                ["curl", "--no-progress-meter", *curl[1:]]
            ):
                await asyncio.sleep(0.05)  # it has not read the lease yet

        connect = [part.replace("TASK", task) for part in compose.documented("ringfence gateway connect")]
        through = ["--", "curl", "--no-progress-meter", f"http://{LOOPBACK}:{compose.target}/notes/today"]
        told = await answer([sys.executable, "-m", "ringfence.cli.main", *connect[1:], *through])
        assert told == "GET /notes/today with a token"

        (program,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
        program = compose.here(program).replace('task="TASK"', f"task={task!r}")
        told = await answer([sys.executable, "-c", program], compose.stack.environment())
        assert told == "200 GET /notes/today with a token\n"

        # Between the containers, the name of the service leads to it.
        program = program.replace("https://localhost:", "https://gateway:")
        resolved = f"""
import socket
found = socket.getaddrinfo
def find(host, *more, **how):
    return found({LOOPBACK!r} if host in ("gateway", b"gateway") else host, *more, **how)
socket.getaddrinfo = find
"""
        told = await answer([sys.executable, "-c", resolved + program], compose.stack.environment())
        assert told == "200 GET /notes/today with a token\n"
    finally:
        server.close()
        await server.wait_closed()
