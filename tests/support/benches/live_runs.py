"""Runs on real Kafka: what their runners say of them, and the enrolment of their instances."""

from __future__ import annotations

import time
import uuid
from typing import Any

from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.credential import Coordinates
from ringfence.messages.enrolment import RunRef
from ringfence.messages.run import Run, RunStatus
from ringfence.messages.topics import RUN
from ringfence.messages.trust import ServiceIdentity
from ringfence.model.identity.runners import enrolment_token, runner_selector
from ringfence.model.records.runs import run_id_of
from tests.support.benches.attestation_bench import AttestationBench
from tests.support.runs import LIMITS
from tests.support.world import DAY_S, Party, Scope, World, scope

RUNNER, OTHER = "runner", "runner-2"
READ = scope("staging", ("read",), ("env/**",))
KEYS: dict[str, SigningKey] = {}


async def add_runner(world: World) -> None:
    """The next trust bundle has a second runner."""
    key = KEYS[OTHER] = SigningKey.generate(f"spiffe://{world.td}/service/{OTHER}")
    KEYS[RUNNER] = world.key("runner")
    record = key.record(int(time.time()) + 30 * DAY_S)
    bundle = world.make_bundle(3)
    another = ServiceIdentity(id=key.id, roles=("runner",), keys=(record,))
    bundle = bundle.model_copy(update={"services": (*bundle.services, another)})
    world.trust.load(sign(bundle, world.root.key, header_jwk=True), time.time())
    await world.publish_trust(bundle)


class LiveRun:
    """A run, as its runner sees it. It is the source of tokens for the SDK inside, as its sandbox will be."""

    def __init__(self, yard: AttestationBench, agent: Party, task: str, runner: str = RUNNER) -> None:
        self.world, self.agent, self.task, self.key = yard.world, agent, task, KEYS[runner]
        self.nonce = uuid.uuid4().hex
        self.id = run_id_of(self.key.id, nonce=self.nonce)
        self.deadline = int(time.time()) + 1800
        self.kid: str | None = None
        self.starts = True

    async def token(self, bound_audience: str) -> str:
        self.kid = bound_audience.rpartition("/")[2]
        if self.starts:
            await self.say("claimed")
            await self.say("started")
        ref = RunRef(run_id=self.id, task_id=self.task)
        return enrolment_token(
            self.key,
            self.world.td,
            self.agent.name,
            ref,
            self.kid,
            now_s=int(time.time()),
            deadline_s=self.deadline,
        )

    def said(self, status: RunStatus, **fields: Any) -> Run:
        given: dict[str, Any] = {
            "iss": self.key.id, "aud": self.world.td, "iat": int(time.time()), "jti": str(uuid.uuid4()),
            "run_id": self.id, "nonce": self.nonce, "agent_id": self.agent.name, "task_id": self.task,
            "status": status, "key_thumbprint": None if status == "claimed" else self.kid or "none",
            "deadline": self.deadline, "backend": "bubblewrap", "limits": LIMITS, "at_ms": int(time.time() * 1000),
        }  # fmt: skip
        return Run(**{**given, **fields})

    async def say(self, status: RunStatus, by: SigningKey | None = None, **fields: Any) -> Coordinates:
        return await self.world.send(RUN, self.id, sign(self.said(status, **fields), by or self.key))


async def agent_of(
    yard: AttestationBench, runner: str = RUNNER, ceiling: Scope = READ, *, has_key: bool = False
) -> Party:
    """An agent whose runs by this runner are its instances; without a key of its own if not `has_key`."""
    name = f"bot-{uuid.uuid4().hex[:8]}"
    selector = runner_selector(yard.world.td, runner, name)
    keys: dict[str, Any] = {} if has_key else {"keys": ()}
    return await yard.world.agent(name, yard.sam, ceiling, attestation=(selector,), **keys)
