"""Who sends a request: what is believed, and to whom a handle in the wrong hands is attributed."""

from __future__ import annotations

from typing import Any

import pytest

from ringfence.client.agent.dpop import proof
from ringfence.client.resource_server.dpop_proofs import Nonces, ProofChecker, ProofsInMemory
from ringfence.gateway.contract import Attempt, PresentedIdentity
from ringfence.gateway.decision.sender import SenderAuthenticator
from ringfence.gateway.domain import Refusal, Sender
from ringfence.gateway.state.leases import LeaseTable
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.enrolment import InstanceRef
from ringfence.messages.lease import Lease
from ringfence.messages.registry import AgentRotateKey, AgentSuspend
from tests.support import leases
from tests.support.in_memory_registry import TD, InMemoryRegistry, permission
from tests.support.runs import OneRun, Runners

URL = "https://hub.example/a"


class Door:
    """Two agents, a lease of one of them, and what an agent sends."""

    def __init__(self, remembered: int = 1) -> None:
        self.ledger = InMemoryRegistry()
        self.table = LeaseTable(self.ledger.clock)
        self.nonces = Nonces()
        self.proofs = ProofChecker(
            nonces=self.nonces, clock=self.ledger.clock, memory=ProofsInMemory(remembered)
        )
        self.uses: list[tuple[str, str, str | None]] = []
        self.identifier = SenderAuthenticator(
            TD, self.ledger.directory, self.table, self.proofs, self.ledger.clock,
            lambda *use: self.uses.append(use),
        )  # fmt: skip
        self.ledger.organisation()
        give = self.ledger.give
        for agent in ("bot", "thief"):
            give(self.ledger.register("sam", agent, "sam", ceiling=(permission("**"),)))
        change = give(self.ledger.assign("uma", "bot"))
        assert change is not None
        self.task: str = change.state.task_id  # type: ignore[union-attr]
        self.lease = self.leased()

    def leased(self, **fields: Any) -> Lease:
        given = {
            "agent_id": "bot", "task_id": self.task, "delivery": "gateway", "key_thumbprint": None,
            "deadline": self.ledger.clock.ms // 1000 + 600, **fields,
        }  # fmt: skip
        lease = leases.lease(**given).claims
        self.table.apply(lease)
        return lease

    def key(self, agent: str = "bot") -> SigningKey:
        return self.ledger.key(agent, "agent")

    def proof(self, key: SigningKey | None = None, handle: str | None = None, **fields: Any) -> str:
        now_s = self.ledger.clock.ms // 1000
        given = {"now_s": now_s, "nonce": self.nonces.fresh(now_s), "method": "GET", "url": URL, **fields}
        return proof(key or self.key(), access_token=handle or self.lease.lease_id, **given)

    async def sender(self, method: str = "GET", **presented: Any) -> Sender | Refusal:
        attempt = Attempt(authority="hub.example", scheme="https", method=method, target="/a")
        return await self.identifier.authenticate(PresentedIdentity(**presented), attempt)

    async def shown(self, dpop: str | None, handle: str | None = None, **more: Any) -> Sender | Refusal:
        return await self.sender(
            **{"handle": handle or self.lease.lease_id, "proof": dpop, "htu": URL, **more}
        )


@pytest.fixture
def door() -> Door:
    return Door()


def code(found: Sender | Refusal) -> str:
    assert isinstance(found, Refusal), found
    assert found.status in (401, 403)
    return found.reasons[0].code


async def test_a_handle_with_a_proof_by_the_agents_key_names_the_lease_and_its_task(door: Door) -> None:
    found = await door.shown(door.proof())
    assert isinstance(found, Sender)
    assert (found.agent_id, found.task_id, found.lease_id) == ("bot", door.task, door.lease.lease_id)


async def test_a_handle_alone_counts_on_the_socket_of_its_task_and_nowhere_else(door: Door) -> None:
    assert code(await door.shown(None)) == "proof_missing"
    assert await door.sender(task_id=door.task) == Sender("bot", door.task)
    with_handle = await door.sender(task_id=door.task, handle=door.lease.lease_id)
    assert with_handle == Sender("bot", door.task, door.lease.lease_id)
    assert code(await door.sender(task_id="00000000-0000-5000-8000-000000000000")) == "task_unknown"


async def test_socket_of_a_run_that_has_ended_is_rejected(door: Door) -> None:
    runners = Runners(door.ledger)
    run = OneRun(runners, "bot", door.task)
    shown = {"task_id": door.task, "run_id": run.id}
    assert code(await door.sender(**shown)) == "run_ended"
    run.go("claimed")
    assert code(await door.sender(**shown)) == "run_ended"
    run.go("started")
    assert await door.sender(**shown) == Sender("bot", door.task, None, run.id)
    other = OneRun(runners, "thief", door.task, nonce="n2")
    other.go("claimed", "started")
    assert code(await door.sender(task_id=door.task, run_id=other.id)) == "run_mismatch"
    before_ms = door.ledger.clock.ms
    door.ledger.clock.ms = run.deadline_s * 1000
    assert code(await door.sender(**shown)) == "run_ended"
    door.ledger.clock.ms = before_ms
    run.go("ended")
    assert code(await door.sender(**shown)) == "run_ended"


async def test_request_without_credentials_has_no_sender(door: Door) -> None:
    assert code(await door.sender()) == "no_credentials"
    assert code(await door.shown(door.proof(), handle="x")) == "handle_malformed"
    assert code(await door.shown(door.proof(), htu=None)) == "proof_missing"
    unknown = "00000000-0000-5000-8000-000000000000"
    assert code(await door.shown(door.proof(handle=unknown), handle=unknown)) == "handle_unknown"


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "PUT"}, {"url": "https://hub.example/b"}, {"url": "https://other.example/a"}, {"now_s": 1},
        {"handle": "00000000-0000-5000-8000-000000000000"},
    ],
)  # fmt: skip
async def test_a_proof_is_for_one_request_and_handle(door: Door, wrong: dict[str, Any]) -> None:
    assert code(await door.shown(door.proof(**wrong))) == "invalid_dpop_proof"


async def test_a_proof_counts_once_and_has_this_gateways_nonce(door: Door) -> None:
    once = door.proof()
    assert isinstance(await door.shown(once), Sender)
    assert code(await door.shown(once)) == "invalid_dpop_proof"
    assert code(await door.shown(door.proof(nonce=None))) == "use_dpop_nonce"
    assert code(await door.shown(door.proof(nonce=Nonces().fresh(1)))) == "use_dpop_nonce"
    full = await door.shown(door.proof())
    assert isinstance(full, Refusal)
    assert (full.status, full.reasons[0].code) == (503, "proofs_full")


@pytest.mark.parametrize("dpop", ["", "x", "a.b.c", "e30.e30.e30", "x" * 9000])
async def test_malformed_proof_is_rejected(door: Door, dpop: str) -> None:
    assert code(await door.shown(dpop)) == "invalid_dpop_proof"


@pytest.mark.parametrize("nonce", [True, False])
async def test_a_stolen_handle_is_attributed_to_whose_key_it_came_with(door: Door, nonce: bool) -> None:
    more = {} if nonce else {"nonce": None}
    found = await door.shown(door.proof(door.key("thief"), **more))
    assert code(found) == "handle_other_agent"
    assert isinstance(found, Refusal)
    assert found.sender == Sender("thief", None, door.lease.lease_id)


async def test_forged_proof_is_not_attributed_to_its_key(door: Door) -> None:
    """With the thief's public key in its header, and somebody else's signature."""
    head, _, _ = door.proof(door.key("thief")).split(".")
    _, body, tail = door.proof().split(".")
    found = await door.shown(f"{head}.{body}.{tail}")
    assert code(found) == "invalid_dpop_proof"
    assert isinstance(found, Refusal)
    assert found.sender is None
    stranger = SigningKey.generate(f"spiffe://{TD}/agent/bot")
    found = await door.shown(door.proof(stranger))
    assert code(found) == "proof_by_stranger"


async def test_a_lease_is_bound_to_the_key_that_it_names(door: Door) -> None:
    bound = door.leased(key_thumbprint=door.key().kid)
    dpop = door.proof(handle=bound.lease_id)
    assert isinstance(await door.shown(dpop, handle=bound.lease_id), Sender)
    other = door.leased(key_thumbprint=door.key("thief").kid)
    found = await door.shown(door.proof(handle=other.lease_id, nonce=None), handle=other.lease_id)
    assert code(found) == "proof_other_key"


async def test_a_certificate_says_which_agent(door: Door) -> None:
    mine = f"spiffe://{TD}/agent/bot"
    assert await door.sender(certificate=mine) == Sender("bot")
    assert await door.sender(certificate=mine, handle=door.lease.lease_id) == Sender(
        "bot", None, door.lease.lease_id
    )
    for other in (
        f"spiffe://{TD}/user/sam",
        "spiffe://elsewhere/agent/bot",
        "bot",
        f"spiffe://{TD}/agent/a/b",
    ):
        assert code(await door.sender(certificate=other)) == "certificate_unknown"
    stolen = await door.sender(certificate=f"spiffe://{TD}/agent/thief", handle=door.lease.lease_id)
    assert code(stolen) == "handle_other_agent"
    assert isinstance(stolen, Refusal)
    assert stolen.sender == Sender("thief", None, door.lease.lease_id)


async def test_suspended_agent_is_still_identified(door: Door) -> None:
    door.ledger.give(door.ledger.claims(AgentSuspend, "sam", agent_id="bot", reason="x"))
    assert isinstance(await door.shown(door.proof()), Sender)


def instance(door: Door, key: SigningKey, **fields: Any) -> Lease:
    """A lease that a running instance asked for with a key of its own."""
    ref = InstanceRef(
        instance_id="3f1c7a52-9a0e-5c1b-8d2e-7a529a0e5c1b", issuer="https://x.example", subject="x", selector="0" * 64,
        not_after=door.ledger.clock.ms // 1000 + 300,
    )  # fmt: skip
    return door.leased(**{"key_thumbprint": key.kid, "instance": ref, **fields})


async def test_an_instance_is_told_by_the_key_that_it_enrolled(door: Door) -> None:
    key, another = (SigningKey.generate(f"spiffe://{TD}/agent/bot") for _ in range(2))
    lease = instance(door, key)
    handle = lease.lease_id
    found = await door.shown(door.proof(key, handle), handle, address="10.0.0.7")
    assert found == Sender("bot", door.task, handle, key_proved=True)
    assert door.uses == [("bot", key.kid, "10.0.0.7")]
    # Its key is good for what it asked for, and for nothing else of the agent.
    for by, shown, refusal in (
        (another, handle, "proof_by_stranger"),
        (door.key(), handle, "proof_other_key"),
        (key, door.lease.lease_id, "proof_by_stranger"),
    ):
        door.ledger.clock.ms += 61_000  # proofs are remembered for a minute
        assert code(await door.shown(door.proof(by, shown), shown)) == refusal
    door.ledger.clock.ms += 300_000
    assert code(await door.shown(door.proof(key, handle), handle)) == "proof_by_stranger"
    assert len(door.uses) == 1, "what is refused is no use"


async def test_a_record_that_has_an_instances_key_for_another_agent_takes_nothing_from_it(door: Door) -> None:
    """Public keys are no secret: an agent can be registered with one by somebody who does not have it."""
    key = SigningKey.generate(f"spiffe://{TD}/agent/bot")
    lease = instance(door, key)
    door.ledger.give(door.ledger.register("sam", "squatter", "sam", keys=(door.ledger.key_record(key),)))
    found = await door.shown(door.proof(key, lease.lease_id), lease.lease_id)
    assert found == Sender("bot", door.task, lease.lease_id, key_proved=True)


async def test_a_lease_of_no_instance_is_bound_to_keys_of_the_record(door: Door) -> None:
    key = SigningKey.generate(f"spiffe://{TD}/agent/bot")
    lease = instance(door, key, instance=None)
    assert code(await door.shown(door.proof(key, lease.lease_id), lease.lease_id)) == "proof_by_stranger"


@pytest.fixture
def busy() -> Door:
    """A door that remembers more than one proof."""
    return Door(remembered=10)


@pytest.mark.parametrize("compromised", [True, None])
async def test_a_proof_by_a_key_that_was_replaced_counts_no_more(
    busy: Door, compromised: bool | None
) -> None:
    door, new = busy, SigningKey.generate(busy.key().id)
    assert isinstance(await door.shown(door.proof()), Sender)
    door.ledger.give(
        door.ledger.claims(
            AgentRotateKey, "sam", agent_id="bot", key=door.ledger.key_record(new), compromised=compromised
        )
    )
    assert code(await door.shown(door.proof())) == "proof_by_stranger"
    assert isinstance(await door.shown(door.proof(new)), Sender)


async def test_within_the_overlap_each_lease_is_shown_with_its_own_key(busy: Door) -> None:
    door, new = busy, SigningKey.generate(busy.key().id)
    door.ledger.give(
        door.ledger.claims(
            AgentRotateKey, "sam", agent_id="bot", key=door.ledger.key_record(new), overlap_s=60
        )
    )
    old_id, new_id = "00000000-0000-4000-8000-00000000000a", "00000000-0000-4000-8000-00000000000b"
    door.leased(lease_id=old_id, key_thumbprint=door.key().kid)
    door.leased(lease_id=new_id, key_thumbprint=new.kid)
    assert isinstance(await door.shown(door.proof(handle=old_id), handle=old_id), Sender)
    assert isinstance(await door.shown(door.proof(new, handle=new_id), handle=new_id), Sender)
    assert code(await door.shown(door.proof(new, handle=old_id), handle=old_id)) == "proof_other_key"
    door.ledger.clock.ms += 60_000
    assert code(await door.shown(door.proof(handle=old_id), handle=old_id)) == "proof_by_stranger"
