"""The main line under load: credentials a second at saturation, latency at 100/s, CPU a credential by process; and what
approvals cost, by a key file and by a passkey.

A credential counts when its request was signed and verified, decided, leased in Redis, on Kafka, sealed, opened and
verified by the agent; the rate at saturation counts until the audit topic has the issue of the last one.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from bench.machine import cpu_s, percentile
from bench.stack import running
from ringfence.client.admin.administrator import Administrator
from ringfence.client.agent.agent import Agent
from ringfence.client.approvals.sponsor import Sponsor
from ringfence.client.settings import ClientSettings
from ringfence.dev.organisation import PLATFORM, READ_ALL, assign_first_task, key_of, seed
from ringfence.dev.stack import Stack
from ringfence.kernel.crypto.jws import parse, sign, verify
from ringfence.kernel.crypto.keys import SigningKey, public_key
from ringfence.kernel.crypto.webauthn import PasskeyKey, VerificationKey
from ringfence.kernel.kafka.record import Received, partition_number
from ringfence.kernel.kafka.table_reader import Follower
from ringfence.messages.registry import KeyPossession, TaskEnd, UserInvite
from ringfence.messages.topics import AUDIT
from ringfence.messages.trust import Origin
from tests.support.passkeys import SoftwarePasskey

Agents = list[tuple[Agent, str]]
"""With the task of each."""
_ISSUED = b'"event_code":"credential.issued"'
AGENTS = 4
"""One in each partition: so few that two fell into one would have it carry all, and each read the other's replies."""
IN_FLIGHT = 384
"""With half as many a sixth of the processors is idle: all wait together for what is on its way."""
SATURATION_S = 15
SILENCE_S = 30
RATE = 100
RATE_S = 20
ALONE, APPROVALS, APPROVALS_IN_FLIGHT = 60, 400, 16
VERIFICATIONS = 1000
WARM_UP = {"embedded": 0, "apache": 4000}
"""So many credentials first: for its first minute a Java machine compiles more than it does."""


class _Audited:
    """Counts the issues that the audit topic has told of."""

    def __init__(self, settings: ClientSettings) -> None:
        self.count = 0
        # Seldom: it shares the process of the load client, and must not be what is measured.
        self._follower = Follower(settings, [AUDIT], self._on_records, since_ms=None, linger_ms=100)

    async def __aenter__(self) -> _Audited:
        await self._follower.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._follower.stop()

    def _on_records(self, records: Sequence[Received]) -> None:
        self.count += sum(_ISSUED in record.value for record in records)

    async def until(self, count: int) -> None:
        """Return when it has told of so many. A broker that keeps little may have dropped what was not read in time."""
        heard, seen = time.perf_counter(), self.count
        while self.count < count:
            await asyncio.sleep(0.01)
            if self.count > seen:
                heard, seen = time.perf_counter(), self.count
            elif time.perf_counter() - heard > SILENCE_S:
                raise SystemExit(f"audit told of {seen} of {count} issues and then of none for {SILENCE_S} s")


async def request(agent: Agent, task: str) -> float:
    """Ask for a credential and have it. Returns how long that took, in ms."""
    start = time.perf_counter()
    await agent.request(
        task=task, target=PLATFORM, verbs=["read"], resources=["env/staging/web"], reason="bench", ttl_s=3600
    )
    return (time.perf_counter() - start) * 1000


@contextlib.asynccontextmanager
async def agents_of(stack: Stack, settings: ClientSettings) -> AsyncIterator[Agents]:
    """Agents that may ask for credentials, each with its task."""
    await seed(stack.trust, settings, stack.options.operator)
    domain = settings.trust_domain
    agents: Agents = []
    async with Administrator.connect(key_of(stack.trust, domain, "user", "sam"), settings) as sam:
        for id in _ids(stack.options.partitions):
            key = key_of(stack.trust, domain, "agent", id)
            await sam.register_agent(id, description="load", keys=[key], ceiling=[READ_ALL])
            task = await sam.assign_task(id, purpose="load", scope=[READ_ALL], ends_in_s=80_000)
            agent = Agent.connect(key, settings)
            await agent.start()
            agents.append((agent, task))
    try:
        await asyncio.gather(*(request(*agents[n % AGENTS]) for n in range(200)))  # warm up
        yield agents
    finally:
        for agent, _ in agents:
            await agent.close()


def _ids(partitions: int) -> list[str]:
    """Those of the agents, spread evenly over the partitions."""
    free = [number % partitions for number in range(AGENTS)]
    ids: list[str] = []
    for number in itertools.count():
        partition = partition_number(f"bench-{number}".encode(), partitions)
        if partition in free:
            free.remove(partition)
            ids.append(f"bench-{number}")
        if not free:
            break
    return ids


async def _measure(stack: Stack, settings: ClientSettings, pids: dict[str, int], warm_up: int) -> None:
    async with agents_of(stack, settings) as agents, _Audited(settings) as audited:
        await _warm_up(agents, warm_up)
        await audited.until(warm_up)
        # First, as the embedded broker answers later every other second, as long as it takes to write what it holds.
        await audited.until(warm_up + await _at_a_rate(agents))
        await _saturate(agents, audited, pids | {"client": os.getpid()})
    await _approvals(stack, settings, pids)


async def _warm_up(agents: Agents, count: int) -> None:
    numbers = iter(range(count))

    async def worker() -> None:
        for number in numbers:
            await request(*agents[number % AGENTS])

    await asyncio.gather(*(worker() for _ in range(IN_FLIGHT)))
    gc.collect()
    gc.freeze()  # as services do: what the load client holds is not to be searched while latency is taken


async def _saturate(agents: Agents, audited: _Audited, pids: dict[str, int]) -> None:
    stop_at = time.perf_counter() + SATURATION_S
    told, count = audited.count, 0

    async def worker(number: int) -> None:
        nonlocal count
        while time.perf_counter() < stop_at:
            await request(*agents[number % AGENTS])
            count += 1

    before, start = cpu_s(pids), time.perf_counter()
    await asyncio.gather(*(worker(number) for number in range(IN_FLIGHT)))
    issued_s = time.perf_counter() - start
    await audited.until(told + count)
    audited_s = time.perf_counter() - start
    after = cpu_s(pids)
    print(f"saturation, {IN_FLIGHT} in flight: {count} credentials, {count / issued_s:.0f}/s issued, "
          f"{count / audited_s:.0f}/s issued and audited")  # fmt: skip
    each = {name: (after[name] - before[name]) / count * 1e6 for name in pids}
    print("CPU µs a credential: " + ", ".join(f"{name} {each[name]:.0f}" for name in each))
    print(f"  policy + issuer + audit: {each['policy'] + each['issuer'] + each['audit']:.0f} µs")


async def _at_a_rate(agents: Agents) -> int:
    """Returns how many credentials were issued."""
    latencies: list[float] = []
    late: list[float] = []
    pending: set[asyncio.Task[None]] = set()

    async def one(number: int, due: float) -> None:
        late.append((time.perf_counter() - due) * 1000)
        latencies.append(await request(*agents[number % AGENTS]))

    start = time.perf_counter()
    for number in itertools.count():
        due = start + number / RATE
        if due > start + RATE_S:
            break
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        task = asyncio.create_task(one(number, due))
        pending.add(task)
        task.add_done_callback(pending.discard)
    await asyncio.gather(*pending)
    print(
        f"at {RATE}/s, request to opened credential: p50 {percentile(latencies, 0.5):.1f} ms, "
        f"p99 {percentile(latencies, 0.99):.1f} ms, max {max(latencies):.1f} ms ({len(latencies)} requests)\n"
        # What it adds to each, should the load client not keep up. Its timers are of whole milliseconds.
        f"  the load client asked late by p50 {percentile(late, 0.5):.1f} ms, p99 {percentile(late, 0.99):.1f} ms"
    )
    return len(latencies)


async def _approvals(stack: Stack, settings: ClientSettings, pids: dict[str, int]) -> None:
    """Print what a credential costs that its sponsor approves, by a key file and by a passkey."""
    domain = settings.trust_domain
    task = await assign_first_task(stack.trust, settings)
    file = key_of(stack.trust, domain, "user", "sam")
    passkey = SoftwarePasskey.make(file.id, origin=stack.origins["sign"])
    async with Administrator.connect(file, settings) as sam:
        invitation = UserInvite(**sam.connection.stamp(300), user_id="sam")
        possession = KeyPossession(
            **sam.connection.stamp(300), user_id="sam", jwk=passkey.public, invitation=invitation.jti
        )
        await sam.add_user_key(
            "sam", passkey.record(int(time.time()) + 86_400),
            invitation=sign(invitation, file), possession=sign(possession, passkey),
        )  # fmt: skip
    async with Agent.connect(key_of(stack.trust, domain, "agent", "deploy-bot"), settings) as bot:
        for in_flight, count in ((1, ALONE), (APPROVALS_IN_FLIGHT, APPROVALS)):
            await _ask(bot, task, "read", "without an approval", in_flight, count, pids)
            async with _approving(file, settings):
                await _ask(bot, task, "deploy", "approved by a key file", in_flight, count, pids)
        for name, key in (("a passkey", passkey), ("a key file", file), ("a passkey", passkey)):
            async with _approving(key, settings):
                await _ask(bot, task, "deploy", f"approved by {name}", APPROVALS_IN_FLIGHT, APPROVALS, pids)
    await _verification(file, passkey, stack)


@contextlib.asynccontextmanager
async def _approving(key: SigningKey, settings: ClientSettings) -> AsyncIterator[None]:
    """A sponsor who approves each request at once."""
    seen: set[str] = set()

    async def approve() -> None:
        async for pending in sponsor.watch():
            if pending.request_id not in seen:
                seen.add(pending.request_id)
                await sponsor.approve(pending)

    async with Sponsor.connect(key, settings) as sponsor:
        approving = asyncio.create_task(approve())
        try:
            yield
        finally:
            approving.cancel()


async def _ask(
    bot: Agent, task: str, verb: str, name: str, in_flight: int, count: int, pids: dict[str, int]
) -> None:
    """Ask for `count` credentials, and print how long each took and what it cost."""
    latencies: list[float] = []
    numbers = iter(range(count))

    async def ask() -> None:
        for _ in numbers:
            start = time.perf_counter()
            await bot.request(
                task=task, target=PLATFORM, verbs=[verb], resources=["env/staging/web"], reason="bench",
                ttl_s=60, timeout_s=60,
            )  # fmt: skip
            latencies.append((time.perf_counter() - start) * 1000)

    before, start = cpu_s(pids), time.perf_counter()
    await asyncio.gather(*(ask() for _ in range(in_flight)))
    rate, after = count / (time.perf_counter() - start), cpu_s(pids)
    each = {role: (after[role] - before[role]) / count * 1e6 for role in ("policy", "issuer", "audit")}
    print(
        f"{name}, {in_flight} in flight, {rate:.0f}/s: request to credential p50 {percentile(latencies, 0.5):.1f} ms, "
        f"p99 {percentile(latencies, 0.99):.1f} ms; CPU µs a credential: "
        + ", ".join(f"{role} {cost:.0f}" for role, cost in each.items())
    )


async def _verification(file: SigningKey, passkey: SoftwarePasskey, stack: Stack) -> None:
    """Print what one signature costs a verifier, and how large it is."""
    now_s = int(time.time())
    fields: dict[str, Any] = {
        "iss": file.id,
        "aud": stack.options.trust_domain,
        "iat": now_s,
        "exp": now_s + 300,
        "jti": "bench",
    }
    claims = TaskEnd(**fields, task_id=str(uuid.uuid4()), reason="bench")
    origins = (Origin(origin=stack.origins["sign"], use="sign", not_before=0),)
    found = PasskeyKey.of(passkey.record(now_s + 300), origins, now_s)
    keys: dict[str, tuple[SigningKey, VerificationKey | None]] = {
        "a key file": (file, public_key(file.public)), "a passkey": (passkey, found),
    }  # fmt: skip
    for name, (signer, key) in keys.items():
        jws = parse(sign(claims, signer))
        took_us = float("inf")
        for _ in range(10):  # the best of them: others have the machine meanwhile
            start = time.perf_counter()
            for _ in range(VERIFICATIONS):
                verify(jws, TaskEnd, lambda iss, kid, key=key: key, audience=claims.aud)  # type: ignore[misc]
            took_us = min(took_us, (time.perf_counter() - start) / VERIFICATIONS * 1e6)
        print(
            f"a signature by {name}: {took_us:.0f} µs to verify, {len(jws.compact.rpartition('.')[2])} bytes"
        )


def run(kafka: str) -> None:
    """Print the numbers on this broker: `embedded` or `apache`."""
    import uvloop

    with running(kafka) as (stack, settings, pids):
        uvloop.run(_measure(stack, settings, pids, WARM_UP[kafka]))
