"""Runs for tests: a runner of the trust bundle, what it says of a run, and the enrolment of the run's instance."""

from __future__ import annotations

import json
from typing import Any

from ringfence.kernel.base.ids import digest
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey, b64decode
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import KeyRecord
from ringfence.messages.enrolment import AttestationSelector, InstanceEnrolment, RunRef
from ringfence.messages.registry import AgentSetAttestation
from ringfence.messages.run import Run, RunLimits, RunStatus
from ringfence.messages.topics import RUN
from ringfence.messages.trust import ServiceIdentity, TrustBundle
from ringfence.model.identity.attestation import selector_id
from ringfence.model.identity.runners import enrolment_token, runner_issuer, runner_selector
from ringfence.model.records.instances import instance_id
from ringfence.model.records.runs import run_id_of
from tests.support.in_memory_registry import START_MS, TD, InMemoryRegistry

LIMITS = RunLimits(memory_bytes=2**31, cpu_millis=1000, pids=256)
LIFE_S = 1800


class Runners:
    """The runners `runner-1` and `runner-2` of an in-memory registry's trust bundle."""

    def __init__(self, ledger: InMemoryRegistry) -> None:
        self.ledger = ledger
        self.keys = {
            name: SigningKey.generate(f"spiffe://{TD}/service/{name}") for name in ("runner-1", "runner-2")
        }
        self.trust()

    def trust(self, *, version: int = 2, **ends_s: int) -> None:
        """Put a bundle with these runners in force; `ends_s`: when the key of one ended, by its name."""
        ledger, now_s = self.ledger, START_MS // 1000
        year_s = now_s + 365 * 86_400
        services = [
            ServiceIdentity(
                id=ledger.registry.id, roles=("registry",), keys=(ledger.registry.record(year_s),)
            ),
            *(
                ServiceIdentity(
                    id=key.id,
                    roles=("runner",),
                    keys=(key.record(ends_s.get(name.replace("-", "_"), year_s), now_s - 60),),
                )
                for name, key in self.keys.items()
            ),
        ]
        bundle = TrustBundle(
            iss=ledger.root.id, aud=TD, iat=now_s, exp=year_s, jti=f"bundle-{version}", version=version,
            services=tuple(services),
        )  # fmt: skip
        assert ledger.trust.load(sign(bundle, ledger.root, header_jwk=True), now_s)

    def admits(self, agent: str, name: str = "runner-1", **more: Any) -> AttestationSelector:
        """The agent's sponsor sam lets its runs by this runner act for it."""
        selector = runner_selector(TD, name, agent).model_copy(update=more)
        claims = self.ledger.claims(AgentSetAttestation, "sam", agent_id=agent, attestation=(selector,))
        self.ledger.give(claims)
        return selector

    def record(
        self, run: Run, by: SigningKey | None = None, *, key: str | None = None, partition: int = 0
    ) -> Received:
        """The record of a run as its topic has it, signed by its runner unless said otherwise."""
        signer = by or self.keys[run.iss.rpartition("/")[2]]
        received = self.ledger.received(RUN, key or run.run_id, sign(run, signer))
        return received._replace(partition=partition) if partition else received

    def tell(self, run: Run, by: SigningKey | None = None, *, key: str | None = None) -> None:
        """Hand a record of a run to the directory."""
        self.ledger.directory.on_records([self.record(run, by, key=key)])


class OneRun:
    """A run of an agent by `runner-1`, its instance's key, and its enrolment."""

    def __init__(
        self, runners: Runners, agent: str, task: str, *, nonce: str = "n1", runner: str = "runner-1"
    ) -> None:
        self.runners, self.agent, self.task, self.runner = runners, agent, task, runner
        self.by = runners.keys[runner]
        self.key = SigningKey.generate(f"spiffe://{TD}/agent/{agent}")
        self.nonce = nonce
        self.id = run_id_of(self.by.id, nonce=nonce)
        self.now_s = runners.ledger.clock.ms // 1000
        self.deadline_s = self.now_s + LIFE_S

    @property
    def ref(self) -> RunRef:
        return RunRef(run_id=self.id, task_id=self.task)

    def said(self, status: RunStatus, **fields: Any) -> Run:
        """What its runner says of it."""
        given: dict[str, Any] = {
            "iss": self.by.id, "aud": TD, "iat": self.now_s, "jti": f"{self.id}-{status}", "run_id": self.id,
            "nonce": self.nonce, "agent_id": self.agent, "task_id": self.task, "status": status,
            "key_thumbprint": None if status == "claimed" else self.key.kid, "deadline": self.deadline_s,
            "backend": "bubblewrap", "limits": LIMITS, "at_ms": self.now_s * 1000,
        }  # fmt: skip
        return Run(**{**given, **fields})

    def go(self, *statuses: RunStatus) -> None:
        """Its runner says these of it, one after the other."""
        for status in statuses:
            self.runners.tell(self.said(status))

    def token(self, **fields: Any) -> str:
        """The runner's token for the key made inside."""
        given: dict[str, Any] = {
            "agent_id": self.agent, "run": self.ref, "kid": self.key.kid, "now_s": self.now_s,
            "deadline_s": self.deadline_s,
        }  # fmt: skip
        return enrolment_token(self.by, TD, **{**given, **fields})

    def enrolment(self, selector: AttestationSelector, token: str | None = None, **fields: Any) -> str:
        """What an honest registry makes of it, but for what is named."""
        ledger, token = self.runners.ledger, token or self.token()
        token_digest = digest(token.rpartition(".")[0])
        given: dict[str, Any] = {
            "sub": self.key.id, "instance_id": instance_id(token_digest, self.key.kid),
            "key": KeyRecord(kid=self.key.kid, jwk=self.key.public, not_before=self.now_s - 60,
                             not_after=self.deadline_s),
            "issuer": runner_issuer(TD, self.runner), "subject": self.key.id, "selector": selector_id(selector),
            "claims": {"sub": self.key.id}, "token_digest": token_digest, "key_bound": True, "agent_revision": 1,
            "token": token, "run": self.ref,
        }  # fmt: skip
        claims = ledger.claims(InstanceEnrolment, "root", **{**given, **fields})
        return sign(claims.model_copy(update={"iss": ledger.registry.id}), ledger.registry)


def claims_of(token: str) -> dict[str, Any]:
    """The claims of a token, not verified."""
    found: dict[str, Any] = json.loads(b64decode(token.split(".")[1]))
    return found
