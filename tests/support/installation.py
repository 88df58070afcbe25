"""An installation whose services, people and agents use one `ringfence` program: processes and the command line.

It stands in a folder, as `docs/operators` has it: keys in `.ringfence`, Kafka and Redis elsewhere.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import httpx

from ringfence.client.admin.trust_setup import TrustFolder
from ringfence.dev.processes import LOOPBACK, Child, free_port, spawn
from ringfence.dev.stack import readiness
from ringfence.kernel.base.settings import BusSettings
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.kafka.range_reader import Stretches
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import Topic
from ringfence.messages.lease import TERMINAL, Lease
from ringfence.messages.topics import LEASE
from tests.brokers import RedisServer
from tests.conftest import Kafka

STOPPED = ("gateway", "registry", "policy", "issuer", "revoker", "audit")
"""In this order: what takes in work first, then what ends leases, and audit last, which tells of all of them."""
STARTED = STOPPED[::-1]
"""Audit first, and what ends leases before what makes more of them."""
WITHIN_S = 60.0


class Program(Protocol):
    """A version of Ringfence."""

    @property
    def name(self) -> str: ...

    @property
    def program(self) -> str: ...


class _ThisClone(NamedTuple):
    name: str
    program: str


THIS_CLONE = _ThisClone("clone", str(Path(sys.executable).with_name("ringfence")))


class Installation:
    """What stays as programs and servers change: topics, keys in Redis, a trust folder, ports."""

    def __init__(
        self, version: Program, folder: Path, *, kafka: str, embedded_broker: bool, redis_url: str
    ) -> None:
        self.version = version
        self.folder = folder
        self.trust = TrustFolder(folder / ".ringfence")
        self._children: dict[str, Child] = {}
        self._ports = {name: free_port() for name in STOPPED}
        self._door = free_port()
        mark = f"in{uuid.uuid4().hex[:8]}"
        self._shared = {
            "RINGFENCE_CONFIG": os.devnull,
            "RINGFENCE_KAFKA": kafka,
            "RINGFENCE_EMBEDDED_BROKER": str(embedded_broker).lower(),
            "RINGFENCE_REDIS_URL": redis_url,
            "RINGFENCE_REDIS_PREFIX": mark,
            "RINGFENCE_TOPIC_PREFIX": mark,
            "RINGFENCE_TRUST_DOMAIN": "acme.example",
            "RINGFENCE_PARTITIONS": "2",
            "RINGFENCE_REPLICATION": "1",
            **{f"RINGFENCE_{name.upper()}_URL": self.url(name) for name in STOPPED},
        }
        self.settings = BusSettings(
            kafka=kafka, embedded_broker=embedded_broker, topic_prefix=mark, trust_domain="acme.example"
        )

    @property
    def redis_prefix(self) -> str:
        return self._shared["RINGFENCE_REDIS_PREFIX"]

    def url(self, name: str) -> str:
        """The HTTP of a service."""
        return f"http://{LOOPBACK}:{self._ports[name]}"

    def change(self, **settings: str) -> None:
        """Settings of everybody from now on, by their names without `RINGFENCE_`."""
        self._shared |= {f"RINGFENCE_{name.upper()}": value for name, value in settings.items()}
        if "kafka" in settings:
            self.settings = self.settings.model_copy(update={"kafka": settings["kafka"]})

    # --- the command line ---

    def environment(self, who: str | None = None) -> dict[str, str]:
        """The environment of a shell in the folder; `who` is whose key file its commands use."""
        others = {
            name: value
            for name, value in os.environ.items()
            if name != "PYTHONPATH" and not name.startswith("RINGFENCE_")
        }
        path = f"{Path(self.version.program).parent}:{others['PATH']}"
        identity = {"RINGFENCE_IDENTITY": str(self.identity(who))} if who else {}
        return {**others, **_of_tests(), **self._shared, **identity, "PATH": path}

    def run(self, *words: str, who: str | None = None) -> subprocess.CompletedProcess[str]:
        """`ringfence` of the version that is installed."""
        return subprocess.run(
            [self.version.program, "--json", *words],
            capture_output=True, text=True, check=False, cwd=self.folder, env=self.environment(who), timeout=120,
        )  # fmt: skip

    def say(self, *words: str, who: str | None = None) -> Any:
        """What it prints. Fails where it does not end well."""
        done = self.run(*words, who=who)
        assert done.returncode == 0, f"{self.version.name}: {' '.join(words)}: {done.stdout}{done.stderr}"
        return json.loads(done.stdout) if done.stdout.strip() else None

    def identity(self, who: str) -> Path:
        """The key file of a person or an agent."""
        return self.trust.user_key("olga") if who == "olga" else self.folder / f"{who}.json"

    # --- the life of an installation ---

    def make(self) -> None:
        """As `docs/operations.md` has the first start."""
        self.say("init", "--operator", "olga")
        self._shared["RINGFENCE_TRUST_ROOT"] = self.trust.fingerprint()
        self.say("topics", "apply")
        self.say("init", "--operator", "olga", "--publish")

    def start(self, *names: str, settings: Mapping[str, str] | None = None) -> None:
        """These services (all where none is named), in this order, and return when all are ready."""
        names = names or STARTED
        for name in names:
            self.launch(name, settings)
        for name in names:
            self.await_ready(name)

    def launch(self, name: str, settings: Mapping[str, str] | None = None) -> Child:
        """Start a service, and do not wait. `settings` has further ones, by their whole names."""
        own = {
            "RINGFENCE_HTTP": f"{LOOPBACK}:{self._ports[name]}",
            "RINGFENCE_INSTANCE": name,
            "RINGFENCE_GATEWAY_LISTEN": f"{LOOPBACK}:{self._door}",
            "RINGFENCE_GATEWAY_SOCKETS": str(self.folder / ".ringfence" / "tasks"),
            "RINGFENCE_GATEWAY_CA_FILE": str(self.folder / ".ringfence" / "gateway-ca.pem"),
            "RINGFENCE_KEY_DIR": str(self.folder / ".ringfence" / "keys"),
        }
        self._children[name] = spawn(
            name,
            [self.version.program, "serve", name],
            env={**self.environment(), **own, **(settings or {})},
            log_path=self.log(name),
        )
        return self._children[name]

    def log(self, name: str) -> Path:
        """What a service of the present version has said."""
        return self.folder / f"{self.version.name}-{name}.log"

    def await_ready(self, name: str) -> None:
        self._children[name].wait_until(
            lambda: self.unready(name) is None, WITHIN_S, "was ready", why=partial(self.unready, name)
        )

    def unready(self, name: str) -> str | None:
        """Why a service is not ready; None if it is."""
        return readiness(self._ports[name])

    def text(self, name: str, path: str) -> str:
        """What the HTTP of a service answers."""
        return httpx.get(f"{self.url(name)}{path}", timeout=10, trust_env=False).text

    def stop(self, *names: str, kill: Sequence[str] = ()) -> None:
        """One service after the other, all where none is named; each ends well, but for those that are killed."""
        for name in names or STOPPED:
            child = self._children.pop(name)
            if name in kill:
                child.kill()
                continue
            child.terminate()
            assert child.wait(WITHIN_S) == 0, f"{name} did not end well: {child.log_tail(20)}"

    def end(self) -> None:
        for child in self._children.values():
            child.kill()

    # --- what is there ---

    async def records(self, topic: Topic[Any]) -> list[Received]:
        """All that stands on a topic."""
        async with Stretches(self.settings) as kafka:
            return [record async for record in kafka.whole(topic)]

    async def ends(self, lease: str) -> list[tuple[Received, Lease]]:
        """The records by which a lease ended."""
        found = [
            (record, parse(record.value).unverified_claims(Lease))
            for record in await self.records(LEASE)
            if record.key == lease and record.value
        ]
        return [(record, claims) for record, claims in found if claims.status in TERMINAL]

    def leases(self) -> set[str]:
        """Those that live, as the operator sees them."""
        return {one["id"] for one in self.say("lease", "list", who="olga")["leases"]}


@contextmanager
def installed(kafka: Kafka, redis_server: RedisServer, folder: Path) -> Iterator[Installation]:
    """A running installation of this clone, on a broker and a Redis that are there."""
    made = Installation(
        THIS_CLONE, folder, kafka=kafka.bootstrap, embedded_broker=kafka.embedded, redis_url=redis_server.url
    )  # fmt: skip
    try:
        made.make()
        made.start()
        yield made
    finally:
        made.end()


def _of_tests() -> dict[str, str]:
    """What `tests/conftest.py` sets for all services."""
    names = ("RINGFENCE_POLICY_EVALUATION_TIMEOUT_MS", "RINGFENCE_AUDIT_DETECT")
    return {name: os.environ[name] for name in names if name in os.environ}


def organise(here: Installation) -> str:
    """sam sponsors bot, which may read the shop's environments, and has a task. Returns the task."""
    allow = "shop:read:env/**"
    here.say(
        "target", "add", "shop", "--description", "a shop", "--verb", "read", "--backend", "jwt",
        "--new-key", str(here.identity("shop")), who="olga",
    )  # fmt: skip
    here.say(
        "user", "add", "sam", "--name", "Sam", "--role", "sponsor", "--allow", allow,
        "--new-key", str(here.identity("sam")), who="olga",
    )  # fmt: skip
    here.say(
        "agent", "register", "bot", "--description", "a bot", "--allow", allow,
        "--new-key", str(here.identity("bot")), who="sam",
    )  # fmt: skip
    assigned = here.say(
        "task", "assign", "bot", "--purpose", "a test", "--allow", allow, "--for", "1h", who="sam"
    )
    task: str = assigned["task_id"]
    return task


def lease(here: Installation, task: str, ttl: str) -> str:
    """A new one."""
    id: str = request(here, task, ttl)["lease_id"]
    return id


def request(here: Installation, task: str, ttl: str) -> Any:
    """What the command prints for a new lease: its id and its credential among others."""
    return here.say(
        "request", "--task", task, "--reason", "to look", "--allow", "shop:read:env/staging", "--ttl", ttl, who="bot"
    )  # fmt: skip
