"""Why the issuer refuses what policy allowed, a row for each code: one thing in a valid decision is another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final

import pytest

from ringfence.issuer.limits import GrantKeeper, LeaseLimits, LeaseLimitValues
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.approval import Grant
from ringfence.messages.base import PublicJwk
from ringfence.messages.codes import Code
from ringfence.messages.registry import AgentSetCeiling, BackendSettings, VerbFloor
from ringfence.model.requests.approvals import append_time_of
from tests.support.benches.decision_bench import DEPLOY, EVERYTHING, READ, WIPE, DecisionBench
from tests.support.in_memory_registry import TD, FixedClock
from tests.support.passkeys import SoftwarePasskey
from tests.support.verdicts import refusal_code

PASSKEY: Final = SoftwarePasskey.make(f"spiffe://{TD}/user/sam")
DAY_MS: Final = 86_400_000
Ask = Callable[[DecisionBench], Any]
"""Returns the verdict about a decision, or the reasons why there is no lease."""


def asked(bench: DecisionBench, **fields: Any) -> Any:
    """The verdict about a decision on another request."""
    return bench.weigh(bench.decision(bench.request(**fields)))


def approved(bench: DecisionBench, **fields: Any) -> Any:
    """The verdict about a decision with an approval by sam."""
    request = bench.request(scope=(DEPLOY,))
    return bench.weigh(bench.decision(request, approvals=(bench.approval(request, **fields),)))


def granted(bench: DecisionBench, request: dict[str, Any] | None = None, **fields: Any) -> Any:
    """The verdict about a decision with a grant by sam."""
    wanted = bench.request(**{"scope": (DEPLOY,), **(request or {})})
    return bench.weigh(bench.decision(wanted, grants=(bench.grant(**fields),)))


def at_target(bench: DecisionBench, target: str, **scope: Any) -> Any:
    """The verdict about a decision on a request for another target."""
    entry = bench.ledger.directory.target(target)
    assert entry is not None
    wanted = bench.request(scope=(READ.model_copy(update={"target": target, **scope}),))
    return bench.weigh(bench.decision(wanted, revisions=bench.revisions(target=entry.revision)))


class Store:
    """The counts of a lease store: each agent has one lease, each grant is used up."""

    async def count(self, marks: Sequence[str]) -> dict[str, int]:
        return dict.fromkeys(marks, 1)

    async def use_grant(self, grant_id: str, lease_id: str, *, limit: int) -> bool:
        return False


STORE: Final[Any] = Store()


class Grants:
    """The table of grants, all of which were withdrawn or none."""

    def __init__(self, *, withdrawn: bool) -> None:
        self.withdrawn = withdrawn

    def is_withdrawn(self, grant: Grant, *, sponsor: str, on_behalf_of: str) -> bool:
        return self.withdrawn


def admitted(gate: LeaseLimits | GrantKeeper, *args: Any) -> Any:
    (verdict,) = asyncio.run(gate.admit(*args))
    return verdict


def limited(bench: DecisionBench, limits: LeaseLimitValues) -> Any:
    """The verdict of the limits, an hour after the decision."""
    decision = bench.decision()
    clock = FixedClock(decision.at.appended_at_ms + 3_600_000)
    return admitted(LeaseLimits(STORE, clock, limits), [decision], [bench.issued(decision)])


def kept(bench: DecisionBench, *, withdrawn: bool) -> Any:
    """The last verdict about a lease that rests on a grant, which is used up."""

    async def caught_up(patience_s: float) -> bool:
        return True

    table: Any = Grants(withdrawn=withdrawn)
    return admitted(GrantKeeper(table, STORE, caught_up, 0), [granted(bench)])


REFUSALS: Final[dict[Code, Ask]] = {
    # The request
    Code.SOURCE_LATER: lambda b: b.weigh(b.decision(at_ms=b.now_ms - 1001)),
    Code.NOT_A_JWS: lambda b: b.weigh(request="no JWS"),
    Code.KEY_UNKNOWN: lambda b: b.weigh(
        b.decision(b.request(SigningKey.generate(b.ledger.key("bot", "agent").id)))
    ),
    Code.AUD_UNEXPECTED: lambda b: b.weigh(b.decision(b.request(aud="other.example"), revisions=None)),
    Code.EXPIRED: lambda b: asked(b, exp=b.now_ms // 1000 - 1),
    Code.REQUEST_MISMATCH: lambda b: b.weigh(request_id=message_id(b.ledger.key("bot", "agent").id, "other")),
    Code.REQUEST_TOO_OLD: lambda b: b.weigh(
        b.decision(at_ms=b.now_ms + 8 * DAY_MS, iat=(b.now_ms + 8 * DAY_MS) // 1000)
    ),
    Code.SEVERAL_TARGETS: lambda b: asked(b, scope=(READ, READ.model_copy(update={"target": "other"}))),
    Code.VERB_UNKNOWN: lambda b: at_target(b, "database", verbs=("deploy",)),
    Code.BEYOND_SCOPE: lambda b: at_target(b, "elsewhere"),
    Code.RECORD_UNTRUSTED: lambda b: b.weigh(b.decision(revisions=None), b.without("olga")),
    Code.VERB_NOT_UNDERSTOOD: lambda b: at_target(b, "limited"),
    # The decision and its terms
    Code.DECISION_TOO_OLD: lambda b: b.weigh(iat=b.now_ms // 1000 - 3600),
    Code.DECISION_INCOMPLETE: lambda b: b.weigh(ttl_s=None),
    Code.TTL_TOO_LONG: lambda b: b.weigh(ttl_s=601),
    Code.DELIVERY_CHANGED: lambda b: b.weigh(delivery="gateway"),
    Code.REPLY_KEY_INVALID: lambda b: asked(b, reply_key=PublicJwk(kty="OKP", crv="X25519", x="A" * 43)),
    Code.BACKEND_UNKNOWN: lambda b: at_target(b, "database"),
    Code.DELIVERY_GATEWAY_ONLY: lambda b: at_target(b, "hub"),
    # Approvals
    Code.APPROVAL_LACKING: lambda b: b.weigh(required=("operator",)),
    Code.APPROVAL_INVALID: lambda b: approved(b, key=SigningKey.generate(b.ledger.key("sam").id)),
    Code.APPROVAL_OTHER_REQUEST: lambda b: approved(b, request_digest="0" * 64),
    Code.APPROVAL_DENIED: lambda b: approved(b, verdict="denied"),
    Code.APPROVAL_OTHER_TERMS: lambda b: approved(b, ttl_s=60),
    Code.APPROVAL_NOT_UNDERSTOOD: lambda b: approved(b, only_once=True),
    Code.APPROVAL_EXPIRED: lambda b: approved(b, iat=b.now_ms // 1000 - 900, exp=b.now_ms // 1000 - 600),
    Code.APPROVAL_STALE: lambda b: approved(b, revisions=b.revisions(policy="q" * 64)),
    Code.APPEND_TIME_UNKNOWN: lambda b: append_time_of(
        b.decision().claims, b.approval(b.request(), key=PASSKEY)
    ),
    # Grants
    Code.GRANT_NOT_UNDERSTOOD: lambda b: granted(b, only_once=True),
    Code.GRANT_TOO_LONG: lambda b: granted(b, exp=b.now_ms // 1000 + 30 * 86_400),
    Code.GRANT_OTHER_TASK: lambda b: granted(b, agent_id="other"),
    Code.GRANT_BREAKS_NO_GLASS: lambda b: granted(b, {"break_glass": True}),
    Code.GRANT_OTHER_SCOPE: lambda b: granted(b, scope=(WIPE,)),
    Code.GRANT_OTHER_TERMS: lambda b: granted(b, ttl_s=599),
    Code.GRANT_ENDED: lambda b: granted(b, iat=b.now_ms // 1000 - 100, exp=b.now_ms // 1000),
    Code.GRANT_STALE: lambda b: granted(b, revisions=b.revisions(policy="q" * 64)),
    Code.GRANT_WITHDRAWN: lambda b: kept(b, withdrawn=True),
    Code.GRANT_USED_UP: lambda b: kept(b, withdrawn=False),
    # The lease
    Code.TOO_MANY_LEASES: lambda b: limited(b, LeaseLimitValues(agent_leases=1, sponsor_leases=0, wait_s=0)),
    Code.OVERLOADED: lambda b: limited(b, LeaseLimitValues(agent_leases=0, sponsor_leases=0, wait_s=5)),
}


@pytest.fixture(scope="module")
def bench() -> DecisionBench:
    """A verdict changes nothing, so all rows share it."""
    bench = DecisionBench()
    ledger, verbs = bench.ledger, (VerbFloor(verb="read"),)
    everywhere = tuple(
        EVERYTHING.model_copy(update={"target": target})
        for target in ("staging", "database", "hub", "limited")
    )
    ledger.give(ledger.user_set("olga", "uma", entitlements=ledger.entitlements(*everywhere)))
    for target, kind in (("database", "postgres"), ("hub", "static"), ("elsewhere", "jwt")):
        ledger.give(ledger.target_set("olga", target, verbs=verbs, backend=BackendSettings(kind=kind)))
    limited = (VerbFloor.model_validate({"verb": "read", "only_once": True}),)
    ledger.give_as_before(ledger.target_set("olga", "limited", verbs=limited))
    ledger.give(ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=everywhere))
    bench.task = bench.made(
        ledger.assign(
            "uma", "bot", terms=ledger.terms("bot", scope=everywhere, not_after=bench.now_ms // 1000 + 7200)
        )
    )
    return bench


@pytest.mark.parametrize(("code", "ask"), REFUSALS.items(), ids=REFUSALS)
def test_decision_is_refused(code: Code, ask: Ask, bench: DecisionBench) -> None:
    bench.issued()
    assert refusal_code(lambda: ask(bench)) == code
