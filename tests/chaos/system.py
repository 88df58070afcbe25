"""All that is under test: broker, Redis, and every service as a process of its own behind links of its own."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import httpx

from ringfence.cli.commands.dev import client_settings
from ringfence.client.admin.trust_setup import make_trust, publish_trust
from ringfence.client.settings import ClientSettings
from ringfence.dev.kafka import EmbeddedKafka
from ringfence.dev.processes import LOOPBACK, Child, Patience, StackError, port_is_free, spawn
from ringfence.dev.stack import Stack, StackOptions
from ringfence.kernel.kafka.topics_admin import TopicsAdmin
from ringfence.messages.base import ServiceRole
from tests.brokers.apache import ApacheKafka
from tests.chaos.proxy import Link
from tests.chaos.service import set_ahead
from tests.chaos.target import TARGET, target_behind
from tests.chaos.upstream import upstream
from tests.chaos.valkey import ChaosValkey, join
from tests.support.http_client import plain_client
from tests.support.servers.redis_target import ValkeyTarget

Way = Literal["redis", "kafka", "target"]
Links = dict[tuple[Way, str], Link]
"""Where connections can be cut: to a single Redis and to the broker at each service, else at the server."""
REPLICAS: dict[ServiceRole, int] = {
    "registry": 1,
    "policy": 1,
    "issuer": 2,
    "revoker": 2,
    "audit": 2,
    "gateway": 2,
}
"""Two of those that share their work, so that one takes over from the other."""
CUT_LISTENER, GATEWAY = "gateway-1", "gateway-2"
"""The first says of every lease whether it would forward; the second is a whole one, with a target behind it."""
READY_WITHIN_S = 90.0
SERVICES = tuple((f"{role}-{n}", role) for role, count in REPLICAS.items() for n in range(1, count + 1))
REDIS, NODES, KAFKA = "redis", ("node-1", "node-2", "node-3"), "kafka"
_SUPERVISE_S = 0.5
_END_WITHIN_S = 5.0
_BROKER_WITHIN_S = 120.0
"""Java comes up slowly where everything else does, too: 53 s were seen at a load of 36 on two cores."""

Broker = EmbeddedKafka | ApacheKafka


@dataclass
class Instance:
    """One service process, which may be restarted under its name any number of times."""

    name: str
    role: ServiceRole
    environment: dict[str, str]
    folder: Path
    url: str
    child: Child | None = None
    wanted: bool = False
    """It should be running: if it is not, it has ended by itself."""
    crashes: list[str] = field(default_factory=list)
    """What it said last, each time that it ended by itself."""

    @property
    def clock(self) -> Path:
        return self.folder / f"{self.name}.clock"

    def start(self) -> None:
        """Start it, and do not wait until it is ready."""
        set_ahead(self.clock, 0)
        self.child = spawn(
            self.name,
            [sys.executable, "-m", "tests.chaos.service", self.role, str(self.clock)],
            env=self.environment,
            log_path=self.folder / "logs" / f"{self.name}.log",
        )
        self.wanted = True

    def kill(self) -> None:
        self.wanted = False
        if self.child is not None:
            self.child.kill()

    def signal(self, signum: signal.Signals) -> None:
        if self.child is not None and self.child.alive:
            os.kill(self.child.pid, signum)

    @property
    def door(self) -> str:
        """Where agents come in, of the gateway."""
        return f"http://{self.environment['RINGFENCE_GATEWAY_LISTEN']}"

    async def unready(self) -> str | None:
        """Why it is not ready, or None."""
        if self.child is not None and not self.child.alive:
            return f"{self.name} ended with status {self.child.returncode}: {self.child.log_tail(3)}"
        try:
            async with plain_client(timeout=3) as http:
                answer = await http.get(f"{self.url}/readyz")
        except httpx.HTTPError as error:
            return f"{self.name} does not answer ({type(error).__name__})"
        return None if answer.status_code == 200 else f"{self.name}: {answer.text}"


@dataclass
class System:
    """Everything together. Made by `running`."""

    stack: Stack
    broker: Broker
    redis: dict[str, ChaosValkey]
    """By name: one server, or the nodes of a cluster."""
    target: ValkeyTarget
    hub: str
    """The URL of the target behind the gateway."""
    links: Links
    instances: dict[str, Instance]

    def of(self, role: ServiceRole) -> list[Instance]:
        return [one for one in self.instances.values() if one.role == role]

    def settings(self) -> ClientSettings:
        """What the harness itself connects with: no fault is between it and the broker, but those of the broker."""
        return client_settings(self.stack.environment())

    async def ready(self, within_s: float = READY_WITHIN_S) -> None:
        """Return once every service is ready. Raises AssertionError that says which is not, and why."""
        patience = Patience(within_s, self._pids)
        while True:
            why = [reason for one in self.instances.values() if (reason := await one.unready())]
            if not why:
                return
            if patience.over:
                break
            await asyncio.sleep(0.2)
        why += [
            f"{one.name} ended by itself: {one.crashes[-1]}" for one in self.instances.values() if one.crashes
        ]
        raise AssertionError(f"not ready within {patience.spent}: {'; '.join(why)}")

    def _pids(self) -> list[int]:
        children = [*self.servers().values(), *(one.child for one in self.instances.values())]
        return [os.getpid(), *(child.pid for child in children if child is not None)]

    async def first_ready(self) -> None:
        """`ready`, where nothing is wrong yet: what ends by itself now would end again."""
        ready = asyncio.create_task(self.ready())
        while not ready.done():
            await asyncio.wait({ready}, timeout=_SUPERVISE_S)
            for one in self.instances.values():
                if one.child is not None and not one.child.alive:
                    ready.cancel()
                    raise AssertionError(await one.unready())
        await ready

    def servers(self) -> dict[str, Child | None]:
        """What services stand on, by the names that faults have for it."""
        redis = {name: server.child for name, server in self.redis.items()}
        return {KAFKA: self.broker.child, TARGET: self.target.server.child, **redis}

    async def stand(self, struck: Callable[[str], bool]) -> None:
        """Raise StackError once a server is not there that no fault has hold of; else for ever.

        Nobody starts it again: without it nothing would come to its end, however long it was waited for.
        """
        while True:
            for name, child in self.servers().items():
                if not struck(name) and (child is None or not child.alive):
                    why = f" with status {child.returncode}: {child.log_tail(3)}" if child is not None else ""
                    raise StackError(f"{name} ended by itself{why}")
            await asyncio.sleep(_SUPERVISE_S)

    async def supervise(self) -> None:
        """Start again what ended by itself, as whoever runs services for real does, and remember it. For ever."""
        while True:
            for one in self.instances.values():
                if one.wanted and one.child is not None and not one.child.alive:
                    one.crashes.append(f"status {one.child.returncode}: {one.child.log_tail(3)}")
                    one.start()
            await asyncio.sleep(_SUPERVISE_S)


class _Base(Stack):
    """Trust and topics; the services are started elsewhere."""

    async def _prepare(self) -> None:
        settings = self.settings()
        async with TopicsAdmin(settings) as admin:
            await admin.apply()  # nothing is thrown away: the checker reads it all
        await publish_trust(self.trust, settings, self.options.operator, self.options.operator.title())


@asynccontextmanager
async def running(
    folder: Path, kafka: Literal["apache", "embedded"], *, cluster: bool = False
) -> AsyncIterator[System]:
    """Start everything; end everything. `cluster`: the leases are in a Valkey cluster of three.

    Raises StackError where something cannot start.
    """
    async with AsyncExitStack() as stack:
        links = await _links(stack, apache=kafka == "apache", cluster=cluster)
        redis = await _redis(stack, folder, links, cluster=cluster)
        target = await stack.enter_async_context(target_behind(links["target", TARGET], folder))
        hub = await stack.enter_async_context(upstream())
        broker: Broker
        if kafka == "apache":
            ways = [link for (way, _), link in links.items() if way == "kafka"]
            more = {link.upstream: f"{LOOPBACK}:{link.port}" for link in ways}
            broker = ApacheKafka(folder, more=more, answers_within_s=_BROKER_WITHIN_S)
        else:
            broker = EmbeddedKafka(folder / "kafka", log_path=folder / "logs" / "kafka.log")
        await _start(stack, broker)
        base = _Base(
            StackOptions(
                folder, kafka=broker.bootstrap, embedded_broker=kafka == "embedded", redis_url="elsewhere", services=()
            )
        )  # fmt: skip
        gateways = [name for name, role in SERVICES if role == "gateway"]
        make_trust(base.trust, base.options.trust_domain, base.options.operator, gateways=gateways)
        await asyncio.to_thread(base.start)
        instances = _instances(base, folder, links, target)
        stack.push_async_callback(asyncio.to_thread, _end, list(instances.values()))
        for one in instances.values():
            one.start()
        system = System(base, broker, redis, target, hub, links, instances)
        await system.first_ready()
        yield system


async def _start(stack: AsyncExitStack, server: ChaosValkey | Broker) -> None:
    await asyncio.to_thread(server.start)
    stack.push_async_callback(asyncio.to_thread, server.stop)


async def _links(stack: AsyncExitStack, *, apache: bool, cluster: bool) -> Links:
    """All links, none of which leads anywhere yet, but to the broker: it will listen where they lead to.

    The nodes of a cluster, and the embedded broker, tell every client the same address.
    """
    ports = _free_ports()
    wanted: list[tuple[Way, str]] = [("target", TARGET)]
    wanted += [("kafka", name) for name, _ in SERVICES if apache]
    if cluster:
        wanted += [("redis", node) for node in NODES]
    else:
        wanted += [("redis", name) for name, role in SERVICES if role in ("issuer", "revoker")]
    links = {name: Link(" to ".join(reversed(name)), next(ports), next(ports)) for name in wanted}
    for link in links.values():
        await stack.enter_async_context(link)
    return links


def _free_ports() -> Iterator[int]:
    """Different ones. Nobody listens on some of them for a while: below those that `free_port` gives to others."""
    while True:
        port = random.randint(12_000, 19_999)
        if port not in _given and port_is_free(port):
            _given.add(port)
            yield port


_given: set[int] = set()


async def _redis(
    stack: AsyncExitStack, folder: Path, links: Links, *, cluster: bool
) -> dict[str, ChaosValkey]:
    ways = {name: link for (way, name), link in links.items() if way == "redis"}
    if not cluster:
        server = ChaosValkey(folder, REDIS)
        await _start(stack, server)
        server.lead(list(ways.values()))
        return {REDIS: server}
    nodes = {name: ChaosValkey(folder, name, announced=link.port) for name, link in ways.items()}
    for name, node in nodes.items():
        await _start(stack, node)
        node.lead([ways[name]])
    await join(list(nodes.values()))
    return nodes


def _redis_url(links: Links, name: str) -> str:
    """Of a service: by its own link, or by those of all nodes. Others than issuers and revokers need none."""
    if ("redis", NODES[0]) in links:
        nodes = ",".join(f"{LOOPBACK}:{links['redis', node].port}" for node in NODES)
        return f"redis+cluster://{nodes}"
    link = links.get(("redis", name))
    return f"redis://{LOOPBACK}:{link.port}/0" if link else "redis://nowhere"


def _instances(base: Stack, folder: Path, links: Links, target: ValkeyTarget) -> dict[str, Instance]:
    ports = _free_ports()
    urls = {name: f"http://{LOOPBACK}:{next(ports)}" for name, _ in SERVICES}
    instances = {}
    for name, role in SERVICES:
        kafka = links.get(("kafka", name))
        environment = {
            **os.environ,
            **base.environment(),
            "RINGFENCE_CONFIG": os.devnull,
            "RINGFENCE_HTTP": urls[name].removeprefix("http://"),
            "RINGFENCE_INSTANCE": name,
            "RINGFENCE_KEY_FILE": str(base.trust.service_key(name if role == "gateway" else role)),
            "RINGFENCE_KEY_DIR": str(base.trust.path / "keys"),
            "RINGFENCE_ISSUER_URL": urls["issuer-1"],
            "RINGFENCE_REDIS_URL": _redis_url(links, name),
            "RINGFENCE_BACKENDS_ACCESS": json.dumps(target.places()),
        }
        if kafka is not None:
            environment["RINGFENCE_KAFKA"] = f"{LOOPBACK}:{kafka.port}"
        if name == GATEWAY:
            environment["RINGFENCE_GATEWAY_LISTEN"] = f"{LOOPBACK}:{next(ports)}"
            environment["RINGFENCE_GATEWAY_SPOOL"] = str(folder / "spool")
        instances[name] = Instance(name, role, environment, folder, urls[name])
    return instances


def _end(instances: Sequence[Instance]) -> None:
    """All side by side: what waits for a broker that is gone is not waited for one after the other."""
    until_s = time.monotonic() + _END_WITHIN_S
    for one in instances:
        one.wanted = False
        one.signal(signal.SIGCONT)
        if one.child is not None:
            one.child.terminate()
    for one in instances:
        if one.child is not None:
            one.child.stop(max(0.0, until_s - time.monotonic()))
