"""Why policy refuses a request or a grant before and beside its bundle, a row for each code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import pytest

from ringfence.kernel.crypto.claims import ExpiredError
from ringfence.kernel.crypto.jws import Signed, parse
from ringfence.kernel.kafka.record import Received
from ringfence.messages.approval import Grant, GrantWithdraw
from ringfence.messages.codes import Code
from ringfence.messages.credential import Coordinates, CredentialRequest
from ringfence.messages.topics import APPROVAL_RESPONSE
from ringfence.model.requests.facts import load_context
from ringfence.model.requests.grants import MOST_OF_ONE, GrantTable, id_of
from ringfence.model.verdict import ALLOWED
from ringfence.policy.api.authzen import _AuthzenRequest, parse_question
from ringfence.policy.decisions.responder import _too_large
from ringfence.policy.domain import Case, RequestAllowed, rule
from ringfence.policy.incoming.admission import AdmissionControl, AdmissionLimits
from ringfence.policy.incoming.grants import GrantHandler
from ringfence.rego.engine import PolicyResult
from tests.support.benches.decision_bench import DEPLOY, DecisionBench
from tests.support.in_memory_registry import TD
from tests.support.verdicts import refusal_code

NOTHING: Final[Any] = None
"""A part that no row reaches."""
NO_SUCH: Final = "00000000-0000-5000-8000-000000000000"
LATE: Final = ExpiredError("reached the broker after its exp")


class Policy:
    """The decisions of policy about requests of bot, and about grants that sam gives it."""

    def __init__(self) -> None:
        self.bench = bench = DecisionBench()
        self.directory = bench.ledger.directory
        self.table = GrantTable(self.directory, TD)
        self.handler = GrantHandler(
            NOTHING, self.directory, NOTHING, self.table, lambda: "p" * 64, NOTHING, NOTHING
        )
        self.given = self.signed(bench.grant())
        self.table.keep(self.given, 0, 0, bench.now_ms)

    def signed(self, compact: str) -> Signed[Grant]:
        return Signed(parse(compact).unverified_claims(Grant), compact)

    def record(self, grant: Signed[Grant], key: str) -> Received:
        return self.bench.ledger.received(APPROVAL_RESPONSE, key, grant.compact)

    def grants(
        self, by: str = "sam", *, late: ExpiredError | None = None, key: str = "bot", **fields: Any
    ) -> object:
        """Check a grant."""
        grant = self.signed(self.bench.grant(by, **fields))
        return self.handler._check_grant(grant, late, self.record(grant, key))

    def keeps(self, grant: Signed[Grant]) -> object:
        return self.handler._keep(grant, self.record(grant, "bot"))

    def withdraws(self, by: str, grant_id: str) -> object:
        claims = self.bench.ledger.claims(GrantWithdraw, by, grant_id=grant_id, agent_id="bot", reason="x")
        return self.handler._check_withdrawal(claims)

    def full_table(self) -> object:
        """Keep one grant more than a person may give."""
        for number in range(MOST_OF_ONE):
            grant = self.given.claims.model_copy(
                update={"jti": f"g{number}", "iss": f"spiffe://{TD}/user/otto"}
            )
            self.table.keep(Signed(grant, ""), 0, number, self.bench.now_ms)
        return self.keeps(self.signed(self.bench.grant("otto")))

    def request(self, **fields: Any) -> tuple[Signed[CredentialRequest], str]:
        decision = self.bench.decision(self.bench.request(**fields))
        jws = decision.claims.request
        return Signed(parse(jws).unverified_claims(CredentialRequest), jws), decision.claims.request_id

    def rules(self, *, ttl_s: int = 600, allow: bool = True, **fields: Any) -> object:
        """Rule on a request, given what the bundle says."""
        signed, id = self.request(**fields)
        facts = load_context(self.directory, signed, id)
        return rule(facts, (), PolicyResult(allow, (), (), ttl_s), (), self.directory, self.bench.now_ms)

    def admits(self, *, waited_s: int = 0, asked: int = 0) -> object:
        """Admit a request of an agent that may ask once a minute."""
        control = AdmissionControl(self.directory, AdmissionLimits(1, 0, 60))
        signed, id = self.request()
        at_ms = self.bench.now_ms
        source = Coordinates(topic="credential.request", partition=0, offset=0, appended_at_ms=at_ms)
        case = Case(signed, id, "bot", source, None)
        for _ in range(asked):
            control.admit(case, at_ms)
        return control.admit(case, at_ms + waited_s * 1000)


REFUSALS: Final[dict[Code, Callable[[Policy], object]]] = {
    # Requests
    Code.OVERLOADED: lambda policy: policy.admits(waited_s=61),
    Code.RATE_LIMITED: lambda policy: policy.admits(asked=1),
    Code.POLICY_DENIED: lambda policy: policy.rules(allow=False),
    Code.POLICY_INVALID: lambda policy: policy.rules(ttl_s=0),
    Code.BREAK_GLASS_NOT_NEEDED: lambda policy: policy.rules(break_glass=True),
    Code.TTL_SHORTENED: lambda policy: policy.rules(ttl_s=60),
    Code.DECISION_TOO_LARGE: lambda policy: _too_large(policy.bench.decision().claims),
    Code.QUESTION_INVALID: lambda policy: parse_question(_AuthzenRequest, {}),
    # Grants
    Code.NOT_A_PERSON: lambda policy: policy.grants(iss=f"spiffe://{TD}/agent/bot"),
    Code.KEY_UNEXPECTED: lambda policy: policy.grants(key="other"),
    Code.EXPIRED: lambda policy: policy.grants(late=LATE),
    Code.GRANT_NOT_UNDERSTOOD: lambda policy: policy.grants(only_once=True),
    Code.GRANT_TOO_LONG: lambda policy: policy.grants(exp=policy.bench.now_ms // 1000 + 30 * 86_400),
    Code.SEVERAL_TARGETS: lambda policy: policy.grants(
        scope=(DEPLOY, DEPLOY.model_copy(update={"target": "other"}))
    ),
    Code.SCOPE_INVALID: lambda policy: policy.grants(
        scope=(DEPLOY.model_copy(update={"resources": ("a//b",)}),)
    ),
    Code.AGENT_UNKNOWN: lambda policy: policy.grants(agent_id="nobody", key="nobody"),
    Code.TASK_UNKNOWN: lambda policy: policy.grants(task_id=NO_SUCH),
    Code.TARGET_UNKNOWN: lambda policy: policy.grants(scope=(DEPLOY.model_copy(update={"target": "other"}),)),
    Code.TASK_OTHER_AGENT: lambda policy: policy.grants(agent_id="other", key="other"),
    Code.NOT_APPROVER: lambda policy: policy.grants("uma"),
    Code.GRANT_STALE: lambda policy: policy.grants(revisions=policy.bench.revisions(policy="q" * 64)),
    Code.GRANT_REPLAYED: lambda policy: policy.keeps(policy.given),
    Code.GRANTS_TOO_MANY: lambda policy: policy.full_table(),
    Code.GRANT_UNKNOWN: lambda policy: policy.withdraws("sam", NO_SUCH),
    Code.NOT_CONCERNED: lambda policy: policy.withdraws("adam", id_of(policy.given.claims)),
}


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy()


@pytest.mark.parametrize(("code", "ask"), REFUSALS.items(), ids=REFUSALS)
def test_request_or_grant_is_refused(code: Code, ask: Callable[[Policy], object], policy: Policy) -> None:
    assert refusal_code(lambda: ask(policy)) == code


def test_the_same_without_the_change_is_accepted(policy: Policy) -> None:
    assert policy.grants() == ALLOWED
    assert policy.withdraws("sam", id_of(policy.given.claims)) == ALLOWED
    assert policy.admits() == ALLOWED
    assert policy.rules() == RequestAllowed(600)
