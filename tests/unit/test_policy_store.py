"""The memory of policy: what it believes of its own decisions, in which order, and when it forgets."""

from __future__ import annotations

import time
from typing import Any, cast

import pytest

from ringfence.kernel.base.ids import digest, message_id
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.messages.approval import Approval
from ringfence.messages.credential import Coordinates, CredentialDecision, CredentialRequest, Outcome
from ringfence.messages.topics import CREDENTIAL_DECISION
from ringfence.messages.trust import ServiceIdentity, TrustBundle
from ringfence.policy.decision_log import KEEP_MS, MAX_AGE_MS, DecisionLog, RecordPosition
from tools.schemas.examples import EXAMPLES

TD = "test.example"
NOW = int(time.time())
NOW_MS = NOW * 1000
ROOT = SigningKey.generate(f"spiffe://{TD}/root")
POLICY = SigningKey.generate(f"spiffe://{TD}/service/policy")
ISSUER = SigningKey.generate(f"spiffe://{TD}/service/issuer")
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
BOT = SigningKey.generate(f"spiffe://{TD}/agent/deploy-bot")
SAM = SigningKey.generate(f"spiffe://{TD}/user/sam")


def claims(iss: SigningKey, jti: str = "x", **more: Any) -> dict[str, Any]:
    return {"iss": iss.id, "aud": TD, "iat": NOW, "jti": jti, **more}


@pytest.fixture
def memory() -> DecisionLog:
    trust = TrustStore(TD, ROOT.kid)
    services = tuple(
        ServiceIdentity(id=key.id, roles=(role,), keys=(key.record(NOW + 10**6),))  # type: ignore[arg-type]
        for key, role in ((POLICY, "policy"), (ISSUER, "issuer"))
    )
    bundle = TrustBundle(**claims(ROOT, exp=NOW + 10**6), version=1, services=services)
    trust.load(sign(bundle, ROOT, header_jwk=True), NOW)
    return DecisionLog(trust)


def request(jti: str = "one", exp: int = NOW + 60) -> CredentialRequest:
    example = cast(CredentialRequest, EXAMPLES[CredentialRequest])
    return example.model_copy(update=claims(BOT, jti, exp=exp))


def approval(jti: str = "yes") -> str:
    return sign(cast(Approval, EXAMPLES[Approval]).model_copy(update=claims(SAM, jti, exp=NOW + 60)), SAM)


def decision(of: CredentialRequest, outcome: Outcome, offset: int = 7, **more: Any) -> CredentialDecision:
    fields: dict[str, Any] = {
        "request_id": message_id(of.iss, of.jti),
        "request": sign(of, BOT),
        "source": Coordinates(topic="t", partition=1, offset=offset, appended_at_ms=NOW_MS),
        "outcome": outcome,
        "delivery": "agent",
    }
    if outcome == "approval_required":
        fields["expires_at"] = NOW + 3600
    return CredentialDecision(**claims(POLICY, f"{outcome} {offset}"), **{**fields, **more})


def record(of: CredentialDecision, offset: int, by: SigningKey = POLICY, at_ms: int = NOW_MS) -> Received:
    headers = (("traceparent", TRACEPARENT.encode()),)
    return Received(
        CREDENTIAL_DECISION, "decisions", 1, offset, at_ms, "deploy-bot", sign(of, by).encode(), headers
    )


async def test_decisions_are_known_after_a_restart(memory: DecisionLog):
    one, two, three = request("one"), request("two"), request("three")
    given = approval()
    waiting = decision(two, "approval_required", 8, approvals=(given,))
    memory.on_records([record(decision(one, "allowed"), 0), record(waiting, 1)])
    memory.on_records([record(decision(three, "denied", 9), 2)])
    assert memory.unready()
    await memory.settle()
    assert memory.unready() is None
    allowed = memory.get(message_id(BOT.id, "one"))
    assert allowed is not None
    assert (allowed.outcome, allowed.at, allowed.agent_id, allowed.jws) == (
        "allowed",
        (1, 7),
        "deploy-bot",
        None,
    )
    pending = memory.get(message_id(BOT.id, "two"))
    assert pending is not None
    assert (pending.pending, pending.traceparent) == (waiting, TRACEPARENT)
    assert pending.approvals == {message_id(SAM.id, "yes"): (digest(given), None)}
    assert list(memory.pending()) == [pending]
    assert memory.waiting() == {pending.agent_id: 1}
    denied = memory.get(message_id(BOT.id, "three"))
    assert denied is not None
    assert denied.jws is not None  # its reply may have to be sent again


async def test_the_texts_of_the_last_denials_are_kept_and_who_was_denied_stays_known(
    memory: DecisionLog, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ringfence.policy.decision_log.MOST_DENIALS", 2)
    await memory.settle()
    requests = [request(f"number {number}") for number in range(4)]
    for number, one in enumerate(requests):
        memory.on_records([record(decision(one, "denied", number), number)])
    known = [memory.get(message_id(one.iss, one.jti)) for one in requests]
    assert [one and (one.outcome, one.jws is None) for one in known] == [
        ("denied", True), ("denied", True), ("denied", False), ("denied", False),
    ]  # fmt: skip


async def test_the_last_request_of_which_something_is_known(memory: DecisionLog):
    await memory.settle()
    assert memory.reached(1) == -1
    memory.on_records([record(decision(request("one"), "denied", 7), 0)])
    assert (memory.reached(0), memory.reached(1)) == (-1, 7)
    memory.claim("two", "deploy-bot", RecordPosition(1, 9), at_ms=NOW_MS, exp=NOW + 60)
    memory.claim("three", "deploy-bot", RecordPosition(1, 8), at_ms=NOW_MS, exp=NOW + 60)
    assert memory.reached(1) == 9


async def test_a_redelivery_is_where_it_was_and_a_replay_elsewhere(memory: DecisionLog):
    await memory.settle()
    one = request()
    id = message_id(one.iss, one.jti)
    first = memory.claim(id, "deploy-bot", RecordPosition(1, 7), at_ms=NOW_MS, exp=one.exp)
    assert (first.at, first.outcome) == ((1, 7), None)
    again = memory.claim(id, "deploy-bot", RecordPosition(1, 9), at_ms=NOW_MS, exp=one.exp)
    assert again is first
    # Another replica decided on the record at 9: what it published says which one counts.
    memory.on_records([record(decision(one, "allowed", 9), 0)])
    assert first.at == (1, 9)


async def test_the_first_final_decision_stands_whoever_is_heard_first(memory: DecisionLog):
    await memory.settle()
    one = request()
    id = message_id(one.iss, one.jti)
    memory.on_records([record(decision(one, "approval_required"), 2)])
    mine = decision(one, "allowed")
    assert memory.keep(mine, sign(mine, POLICY), RecordPosition(1, 5), NOW_MS, None).outcome == "allowed"
    memory.on_records([record(decision(one, "approval_required"), 3)])  # late news: it waited
    assert [*memory.pending()] == []
    assert not memory.waiting()
    memory.on_records([record(decision(one, "denied"), 4)])  # another replica was quicker by one offset
    memory.on_records([record(mine, 5), record(decision(one, "allowed"), 6)])
    known = memory.get(id)
    assert known is not None
    assert (known.outcome, known.decided_at) == ("denied", (1, 4))


async def test_only_policy_is_believed(memory: DecisionLog):
    await memory.settle()
    one = request()
    memory.on_records([record(decision(one, "allowed"), 0, by=ISSUER)])
    junk = Received(CREDENTIAL_DECISION, "decisions", 1, 1, NOW_MS, None, b"\x00junk", ())
    memory.on_records([junk, record(decision(one, "denied"), 2, by=BOT)])
    assert memory.get(message_id(one.iss, one.jti)) is None


async def test_junk_at_the_start_is_not_believed_either(memory: DecisionLog):
    one, two = request("one"), request("two")
    junk = Received(CREDENTIAL_DECISION, "decisions", 1, 0, NOW_MS, None, b"\x00junk", ())
    memory.on_records(
        [junk, record(decision(one, "allowed"), 1, by=ISSUER), record(decision(two, "allowed"), 2)]
    )
    await memory.settle()
    assert memory.get(message_id(one.iss, one.jti)) is None
    assert memory.get(message_id(two.iss, two.jti)) is not None


async def test_decisions_are_forgotten_by_topic_time_not_by_the_clock(memory: DecisionLog):
    """Whatever the last batch before a crash decided is known after it, however long the service was down."""
    await memory.settle()
    long_ago = NOW_MS - 20 * 3600 * 1000
    old, later = request("old", exp=long_ago // 1000 + 60), request("later", exp=long_ago // 1000 + 120)
    memory.on_records([record(decision(old, "allowed"), 0, at_ms=long_ago)])
    memory.on_records([record(decision(later, "allowed", 8), 1, at_ms=long_ago + 1000)])
    assert memory.get(message_id(BOT.id, "old")) is not None
    after = request("after")
    memory.on_records([record(decision(after, "allowed", 9), 2, at_ms=long_ago + 60_000 + KEEP_MS + 1)])
    assert memory.get(message_id(BOT.id, "old")) is None
    assert memory.get(message_id(BOT.id, "later")) is not None


async def test_pending_request_is_kept_until_it_expires(memory: DecisionLog):
    await memory.settle()
    one = request("one", exp=NOW + 60)
    memory.on_records([record(decision(one, "approval_required", expires_at=NOW + 80_000), 0)])
    memory.on_records([record(decision(request("two"), "allowed", 8), 1, at_ms=NOW_MS + 70_000_000)])
    assert len([*memory.pending()]) == 1
    assert list(memory.waiting().values()) == [1]
    late = NOW_MS + 80_000_000 + MAX_AGE_MS + KEEP_MS + 1
    memory.on_records([record(decision(request("three"), "allowed", 9), 2, at_ms=late)])
    assert [*memory.pending()] == []
    assert not memory.waiting()


async def test_expired_decisions_are_dropped_unverified_at_start(
    memory: DecisionLog, monkeypatch: pytest.MonkeyPatch
):
    verified: list[float] = []
    find = TrustStore.finder

    def counted(self: TrustStore, *roles: Any, at_s: float) -> Any:
        verified.append(at_s)
        return find(self, *roles, at_s=at_s)

    monkeypatch.setattr(TrustStore, "finder", counted)
    early = NOW_MS - 3 * 3600 * 1000
    old = request("old", exp=early // 1000)
    memory.on_records([record(decision(old, "allowed"), 0, at_ms=early)])
    memory.on_records([record(decision(request("new"), "allowed", 8), 1)])
    await memory.settle()
    assert memory.get(message_id(BOT.id, "old")) is None
    assert memory.get(message_id(BOT.id, "new")) is not None
    assert len(verified) == 1
