"""The core as data planes see it: always a verdict, always recorded, and never one that a cut has overtaken."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, cast

import pytest

from ringfence.gateway.contract import (
    Attempt,
    Gate,
    McpHeaders,
    PresentedIdentity,
    RateCheck,
    RpcErrorReply,
    Verdict,
)
from ringfence.gateway.dataplane.denials import denial_answer
from ringfence.gateway.dataplane.exchange import cut_error
from ringfence.gateway.decision.evaluator import NO_ANSWER, CachedAnswer
from ringfence.gateway.decision.gate import DecisionGate, DecisionLog, DecisionSettings, DecisionSteps
from ringfence.gateway.decision.mcp import BindingTable
from ringfence.gateway.decision.model_budget import Budgets, ModelMeters
from ringfence.gateway.decision.targets import Targets
from ringfence.gateway.domain import ApprovalRequired, Refusal, Sender, refuse, stale_view
from ringfence.gateway.events.recorder import RefusalCounts
from ringfence.gateway.events.spool import SpoolFullError
from ringfence.kernel.base.errors import UnavailableError
from ringfence.messages.codes import Code, ReceivedCode
from ringfence.messages.operations import ActionDecided, Destination
from ringfence.messages.registry import (
    AgentSuspend,
    BackendSettings,
    GitRule,
    McpRule,
    ModelRule,
    RequestRule,
    VerbFloor,
)
from ringfence.model.verdict import ALLOWED, Allowed, Refused, refused
from ringfence.testing.services import InMemoryBudgets
from tests.gateway.recorder import PlayedRecorder
from tests.support.switches import build_options, is_on
from tests.support.unknown_field_cases import as_before
from tests.unit.test_gateway_domain import GATEWAY_KEY, Place

RULES = (
    RequestRule(method="GET", path="/{path*}", verb="read", resource="{path*}"),
    RequestRule(
        method="POST", path="/r", verb="read", resource="env/staging/web", body={"event": ("COMMENT",)}
    ),
)


GATEWAY = "spiffe://acme.example/service/gateway"


class Parts(PlayedRecorder):
    """The core with a real table, records and map; what asks others is played."""

    def __init__(self, budgets: Budgets | None = None) -> None:
        self.place = Place()
        ledger = self.place.ledger
        self.targets = Targets(ledger.directory)
        backend = BackendSettings.model_validate({"kind": "jwt", "url": "https://hub.example"})
        ledger.give(ledger.target_set("olga", "staging", backend=backend, requests=RULES))
        self.table, self.directory = self.place.table, ledger.directory
        self.problem: str | None = None
        self.events: list[ActionDecided] = []
        self.meanwhile: Callable[[], None] = lambda: None
        self.refuses: Refusal | ApprovalRequired | Exception | None = None
        self.equips: Callable[[], None] = lambda: None
        self.full = False
        played = cast(Any, self)
        self.counted = RefusalCounts(self.record, ledger.clock, gateway=GATEWAY)
        self.gate: Gate = DecisionGate(
            played,
            DecisionSteps(
                played, self.targets, played, played, played, ModelMeters(budgets or InMemoryBudgets())
            ),
            DecisionLog("spiffe://acme.example/service/gateway", played, self.counted),
            DecisionSettings(10**9, **build_options("gateway")),
            clock=ledger.clock,
            key=lambda: GATEWAY_KEY,
        )

    # view
    def stale(self) -> str | None:
        return self.problem

    def check_freshness(self) -> Allowed | Refused:
        if self.problem == "halted":
            return refused(Code.REVOKER_HALTED, "a revoker has halted")
        return Refused(stale_view(self.problem)) if self.problem else ALLOWED

    check_view = check_freshness

    # identifier
    def nonce(self) -> str:
        return "fresh"

    async def authenticate(self, presented: PresentedIdentity, attempt: Attempt) -> Sender | Refusal:
        if presented.handle == "none":
            reason = self.refuses
            assert isinstance(reason, Refusal)
            return reason
        return Sender("bot", self.place.task)

    def without_proof(self, presented: PresentedIdentity) -> Sender | None:
        return None if presented.handle == "none" else Sender("bot", self.place.task)

    # evaluator
    def is_valid(self, *args: Any) -> bool:
        return self.refuses is None

    def cached_answer(self, *args: Any) -> CachedAnswer:
        return NO_ANSWER

    async def answer(self, *args: Any, **kwargs: Any) -> Allowed | Refusal | ApprovalRequired:
        self.meanwhile()
        if isinstance(self.refuses, Exception):
            raise self.refuses
        return self.refuses if self.refuses is not None else ALLOWED

    # injector
    def cached_headers(self, lease: Any, target: Any) -> dict[str, str]:
        self.equips()
        return {"Authorization": "Bearer x"}

    async def headers(self, lease: Any, target: Any) -> dict[str, str]:
        self.equips()
        return {"Authorization": "Bearer x"}

    # recorder
    def record(self, event: ActionDecided) -> None:
        if self.full:
            raise SpoolFullError("full")
        self.events.append(event)


def attempt(method: str = "GET", target: str = "/env/staging/web", **fields: Any) -> Attempt:
    return Attempt(**{
        "authority": "hub.example", "scheme": "https", "method": method, "target": target, **fields,
    })  # fmt: skip


@pytest.fixture
def parts() -> Parts:
    return Parts()


async def test_allowed_action_uses_the_injected_lease(parts: Parts) -> None:
    verdict = await parts.gate.decide(PresentedIdentity(), attempt(label="pr"))
    assert (verdict.allowed, verdict.status, verdict.lease) == (True, 200, parts.place.lease)
    assert (verdict.task_id, verdict.nonce) == (parts.place.task, "fresh")
    assert await parts.gate.headers_to_inject(verdict) == {"Authorization": "Bearer x"}
    (event,) = parts.events
    assert (event.action_id, event.allowed, event.label) == (verdict.action_id, True, "pr")
    assert event.latency_us is not None
    assert event.request_digest is not None


def admits(agent_id: str) -> Allowed | Refused:
    return ALLOWED


def allowed_at_once(
    parts: Parts, presented: PresentedIdentity, attempt: Attempt, admits: RateCheck = admits
) -> tuple[Verdict, Mapping[str, str]] | None:
    standing = parts.gate.cached_allowance(presented, attempt)
    allowed = standing.allow(admits, lambda kept: None) if standing is not None else None
    return (standing.verdict(*allowed), allowed[1]) if standing is not None and allowed is not None else None


@pytest.mark.fast_path_only(reason="compares cached decisions with those that are made step by step")
async def test_cached_allowance_equals_a_full_decision(parts: Parts) -> None:
    decided = await parts.gate.decide(PresentedIdentity(), attempt(label="pr"))
    allowed = allowed_at_once(parts, PresentedIdentity(task_id=parts.place.task), attempt(label="pr"))
    assert allowed is not None
    verdict, injected = allowed
    assert dataclasses.replace(verdict, action_id=decided.action_id, nonce="fresh") == decided
    assert injected == await parts.gate.headers_to_inject(verdict) == {"Authorization": "Bearer x"}
    one, other = (event.model_dump(exclude={"action_id", "latency_us"}) for event in parts.events)
    assert one == other
    assert parts.events[1].action_id == verdict.action_id


@pytest.mark.fast_path_only(reason="compares cached decisions with those that are made step by step")
@pytest.mark.parametrize(
    "change",
    [
        lambda parts: setattr(parts, "problem", "old"),
        lambda parts: setattr(parts, "refuses", refuse(Code.POLICY_DENIED, "no")),
        lambda parts: parts.table.revoke(parts.place.lease.lease_id, parts.place.ledger.clock.ms),
        lambda parts: parts.table.fence(
            "agent:bot", parts.place.lease.requested_at_ms, revocation_id="an order"
        ),
        lambda parts: setattr(
            parts,
            "equips",
            lambda: parts.table.revoke(parts.place.lease.lease_id, parts.place.ledger.clock.ms),
        ),
        lambda parts: parts.place.ledger.give(
            parts.place.ledger.claims(AgentSuspend, "sam", agent_id="bot", reason="r")
        ),
        lambda parts: setattr(parts.place.ledger.clock, "ms", parts.place.lease.deadline * 1000),
    ],
)
async def test_doubtful_change_invalidates_a_cached_allowance(
    parts: Parts, change: Callable[[Parts], object]
) -> None:
    standing = parts.gate.cached_allowance(PresentedIdentity(), attempt())
    assert standing is not None
    assert standing.allow(admits, lambda kept: None) is not None
    change(parts)
    assert standing.allow(admits, lambda kept: None) is None, "whoever kept it has to ask"
    assert allowed_at_once(parts, PresentedIdentity(), attempt()) is None
    assert len(parts.events) == 1, "nothing was decided"
    assert not (await parts.gate.decide(PresentedIdentity(), attempt())).allowed


@pytest.mark.fast_path_only(reason="compares cached decisions with those that are made step by step")
async def test_changed_record_or_lease_makes_a_new_cached_allowance(parts: Parts) -> None:
    standing = parts.gate.cached_allowance(PresentedIdentity(), attempt())
    assert standing is not None
    assert parts.gate.cached_allowance(PresentedIdentity(), attempt()) is standing
    parts.place.leased(agent_id="thief", act=("thief",))
    assert standing.is_valid()
    other = parts.place.leased()
    assert not standing.is_valid()
    found = parts.gate.cached_allowance(PresentedIdentity(), attempt())
    assert found is not None
    parts.table.revoke(found.lease.lease_id, parts.place.ledger.clock.ms)
    assert not found.is_valid()
    found = parts.gate.cached_allowance(PresentedIdentity(), attempt())
    assert found is not None
    assert {found.lease.lease_id, standing.lease.lease_id} <= {other.lease_id, parts.place.lease.lease_id}
    assert found.is_valid()


async def test_only_allowed_actions_are_decided_from_the_cache(parts: Parts) -> None:
    def full(agent_id: str) -> Refused:
        return refused(Code.TOO_MANY_REQUESTS, "wait")

    def broken() -> None:
        raise UnavailableError("the issuer has none")

    assert allowed_at_once(parts, PresentedIdentity(handle="none"), attempt()) is None
    assert allowed_at_once(parts, PresentedIdentity(), attempt(method="PUT")) is None
    assert allowed_at_once(parts, PresentedIdentity(), attempt(authority="other.example")) is None
    assert allowed_at_once(parts, PresentedIdentity(), attempt(method="POST", target="/r")) is None
    assert allowed_at_once(parts, PresentedIdentity(), attempt(), full) is None
    parts.equips = broken
    assert allowed_at_once(parts, PresentedIdentity(), attempt()) is None
    assert parts.events == []


async def test_a_step_without_a_result_allows_nothing(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Types forbid it. Should it happen all the same, it is no permission."""

    async def no_result(*args: Any, **kwargs: Any) -> None:
        return None

    monkeypatch.setattr(parts, "answer", no_result)
    verdict = await parts.gate.decide(PresentedIdentity(), attempt())
    assert (verdict.allowed, verdict.injected) == (False, None)
    assert [event.allowed for event in parts.events] == [False]
    with pytest.raises(UnavailableError):
        await parts.gate.headers_to_inject(verdict)


async def test_a_cut_while_the_bundle_is_asked_overtakes_the_answer(parts: Parts) -> None:
    parts.meanwhile = lambda: parts.table.revoke(parts.place.lease.lease_id, parts.place.ledger.clock.ms)
    verdict = await parts.gate.decide(PresentedIdentity(), attempt())
    assert (verdict.allowed, verdict.reasons[0].code) == (False, "lease_cut")
    with pytest.raises(UnavailableError):
        await parts.gate.headers_to_inject(verdict)


@pytest.mark.parametrize(("problem", "code"), [("old", "stale_view"), ("halted", "revoker_halted")])
async def test_an_old_view_and_a_halted_revoker_decide_inject_and_keep_open_nothing(
    parts: Parts, problem: str, code: str
) -> None:
    allowed = await parts.gate.decide(PresentedIdentity(), attempt())
    parts.problem = problem
    verdict = await parts.gate.decide(PresentedIdentity(), attempt())
    assert (verdict.status, verdict.reasons[0].code, verdict.retry_after_s) == (503, code, 5)
    with pytest.raises(UnavailableError) as refuse:
        await parts.gate.headers_to_inject(allowed)
    assert refuse.value.code == code
    assert cut_error(parts.gate.check_view()).code == code
    told: list[int] = []
    parts.gate.on_lease_end(parts.place.lease.lease_id, lambda: told.append(1))
    assert told == [1]
    parts.problem = None
    parts.gate.on_lease_end(parts.place.lease.lease_id, lambda: told.append(2))
    assert told == [1]


async def test_without_its_credential_it_is_denied_and_recorded_so(parts: Parts) -> None:
    def lacking() -> None:
        raise UnavailableError("the issuer has none")

    parts.equips = lacking
    verdict = await parts.gate.decide(PresentedIdentity(), attempt())
    assert (verdict.allowed, verdict.status, verdict.retry_after_s) == (False, 503, 5)
    (event,) = parts.events
    assert (event.allowed, event.reasons[0].code, event.verb) == (False, "unavailable", "read")
    with pytest.raises(UnavailableError):
        await parts.gate.headers_to_inject(verdict)


async def test_lease_ended_during_credential_fetch_is_recorded_as_denied(parts: Parts) -> None:
    def old() -> None:
        parts.problem = "old"

    parts.equips = old
    verdict = await parts.gate.decide(PresentedIdentity(), attempt())
    assert (verdict.status, verdict.reasons[0].code) == (503, "stale_view")
    parts.problem = None
    parts.equips = lambda: parts.table.revoke(parts.place.lease.lease_id, parts.place.ledger.clock.ms)
    verdict = await parts.gate.decide(PresentedIdentity(), attempt())
    assert (verdict.status, verdict.reasons[0].code) == (403, "lease_cut")
    assert [event.allowed for event in parts.events] == [False, False]


async def test_a_cut_after_the_decision_leaves_nothing_to_inject(parts: Parts) -> None:
    verdict = await parts.gate.decide(PresentedIdentity(), attempt())
    assert "Bearer" not in repr(verdict)
    parts.table.revoke(parts.place.lease.lease_id, parts.place.ledger.clock.ms)
    with pytest.raises(UnavailableError) as refuse:
        await parts.gate.headers_to_inject(verdict)
    assert refuse.value.code == "lease_cut"


async def test_a_plane_is_asked_for_its_limits_before_anything_is_recorded(parts: Parts) -> None:
    asked: list[str] = []
    many = refused(Code.TOO_MANY_REQUESTS, "too many")

    def admits(agent_id: str) -> Allowed | Refused:
        asked.append(agent_id)
        return many if len(asked) > 1 else ALLOWED

    assert (await parts.gate.decide(PresentedIdentity(), attempt(), admits)).allowed
    verdict = await parts.gate.decide(PresentedIdentity(), attempt(), admits)
    assert (verdict.allowed, verdict.status, verdict.reasons, verdict.retry_after_s) == (
        False,
        429,
        (many.reason,),
        5,
    )
    assert [(event.allowed, event.agent_id) for event in parts.events] == [
        (True, "bot"),
        (False, "bot"),
    ]
    parts.refuses = refuse(Code.NO_CREDENTIALS, "say who you are", status=401)
    await parts.gate.decide(PresentedIdentity(handle="none"), attempt(), admits)
    assert asked == ["bot", "bot"], "nobody is asked about for whom nobody stands"


async def test_a_flood_with_bad_credentials_is_told_of_once_a_second_and_whole(parts: Parts) -> None:
    def others(code: str, lease_id: str) -> Refusal:
        return refuse(ReceivedCode(code), "x", status=401, sender=Sender("thief", None, lease_id))

    answers = []
    for lease_id in ("L1", "L2"):
        parts.refuses = others("handle_other_agent", lease_id)
        answers += [
            await parts.gate.decide(PresentedIdentity(handle="none"), attempt(label="pr")) for _ in range(100)
        ]
    parts.refuses = refuse(Code.PROOF_MISSING, "x", status=401)
    answers += [await parts.gate.decide(PresentedIdentity(handle="none"), attempt("PUT")) for _ in range(50)]
    assert {one.status for one in answers} == {401}
    assert [(one.agent_id, one.lease_id, one.method, one.count) for one in parts.events] == [
        ("thief", "L1", "GET", None), ("thief", "L2", "GET", None), (None, None, "PUT", None),
    ]  # fmt: skip
    first, *_ = parts.events
    assert (first.target_id, first.label, first.request_digest is not None) == ("staging", "pr", True)
    parts.counted.flush()
    told = parts.events[3:]
    assert [
        (one.agent_id, one.lease_id, one.target_id, one.label, one.reasons[0].code, one.access, one.count)
        for one in told
    ] == [
        ("thief", "L1", "staging", "pr", "handle_other_agent", "read", 99),
        ("thief", "L2", "staging", "pr", "handle_other_agent", "read", 99),
        (None, None, "staging", None, "proof_missing", "write", 49),
    ]
    assert {one.action_id for one in answers} == {one.action_id for one in parts.events}, "each is found"


async def test_so_is_one_while_nothing_can_be_decided_or_of_too_many(parts: Parts) -> None:
    many = refused(Code.TOO_MANY_REQUESTS, "wait")
    parts.full = True
    for _ in range(10):
        assert (await parts.gate.decide(PresentedIdentity(), attempt(), lambda agent_id: many)).status == 429
    parts.problem = "old"
    for _ in range(10):
        verdict = await parts.gate.decide(PresentedIdentity(), attempt())
        assert verdict.reasons[0].code == "stale_view", "what is refused anyway needs no room"
    parts.full = False
    parts.counted.flush()
    assert [(one.reasons[0].code, one.count) for one in parts.events] == [
        ("too_many_requests", 10), ("stale_view", 10),
    ]  # fmt: skip


async def test_internal_error_denies_and_is_recorded(parts: Parts) -> None:
    parts.refuses = RuntimeError("boom, with a secret")
    verdict = await parts.gate.decide(PresentedIdentity(), attempt())
    assert (verdict.allowed, verdict.status, verdict.reasons[0].code) == (False, 503, "undecided")
    assert "secret" not in verdict.reasons[0].message
    assert [event.allowed for event in parts.events] == [False]


FORM = b'{"event": "COMMENT", "x": "&event=APPROVE&"}'
"""JSON that a target may read as a form."""
BY_ID = attempt(authority=None, target_id="staging", sent_by_gateway=True)


def move_target_nowhere(parts: Parts) -> None:
    parts.place.ledger.give(parts.place.ledger.target_set("olga", "staging", requests=RULES))


def add_repositories(parts: Parts) -> None:
    rule = RequestRule(
        method="GIT", path="/{repo*}", verb="read", resource="{repo*}", git=GitRule(operation="fetch")
    )
    state = parts.place.target()
    parts.place.ledger.give(
        parts.place.ledger.target_set("olga", "staging", backend=state.backend, requests=(*RULES, rule))
    )


def add_model_endpoint(parts: Parts) -> None:
    rule = RequestRule(
        method="POST", path="/m", verb="read", resource="{model*}", model=ModelRule(api="openai")
    )
    state = parts.place.target()
    parts.place.ledger.give(
        parts.place.ledger.target_set("olga", "staging", backend=state.backend, requests=(*RULES, rule))
    )


@pytest.mark.parametrize(
    ("code", "status", "change", "asked"),
    [
        (Code.UNDECIDED, 503, lambda parts: setattr(parts, "refuses", RuntimeError("boom")), attempt()),
        (Code.SPOOL_FULL, 503, lambda parts: setattr(parts, "full", True), attempt()),
        (Code.BODY_NOT_JSON, 403, lambda parts: None, attempt("POST", "/r", body=FORM)),
        (
            Code.MODEL_REQUEST_INVALID,
            403,
            add_model_endpoint,
            attempt("POST", "/m", body=b'{"model": "a", "model": "b"}', json=True),
        ),
        (Code.GIT_NEEDS_PLANE, 403, add_repositories, attempt("POST", "/o/n/git-upload-pack")),
        (Code.TARGET_NOWHERE, 503, move_target_nowhere, BY_ID),
    ],
)
async def test_request_is_denied(
    parts: Parts, code: Code, status: int, change: Callable[[Parts], None], asked: Attempt
) -> None:
    change(parts)
    verdict = await parts.gate.decide(PresentedIdentity(), asked)
    assert (verdict.allowed, verdict.status, verdict.injected) == (False, status, None)
    assert [reason.code for reason in verdict.reasons] == [code]


async def test_unrecordable_request_has_no_lease(parts: Parts) -> None:
    parts.full = True
    assert (await parts.gate.decide(PresentedIdentity(), attempt())).lease is None


async def test_nonce_challenge_is_no_decision(parts: Parts) -> None:
    parts.refuses = refuse(Code.USE_DPOP_NONCE, "x", status=401)
    verdict = await parts.gate.decide(PresentedIdentity(handle="none"), attempt())
    assert (verdict.status, verdict.nonce) == (401, "fresh")
    assert parts.events == []
    parts.refuses = refuse(Code.HANDLE_OTHER_AGENT, "x", sender=Sender("thief", None, "L"))
    await parts.gate.decide(PresentedIdentity(handle="none"), attempt())
    (event,) = parts.events
    assert (event.agent_id, event.lease_id) == ("thief", "L")


async def test_mcp_is_not_spoken_where_nobody_sees_the_answers(parts: Parts) -> None:
    ledger = parts.place.ledger
    backend = BackendSettings.model_validate({"kind": "jwt", "url": "https://hub.example"})
    pinging = RequestRule(
        method="MCP", path="/mcp", mcp=McpRule(method="ping"), verb="read", resource="env/staging/web"
    )
    ledger.give(ledger.target_set("olga", "staging", backend=backend, requests=(pinging,)))
    ping = attempt("POST", "/mcp", body=b'{"jsonrpc":"2.0","id":1,"method":"ping"}')
    refuse = await parts.gate.decide(PresentedIdentity(), ping)
    assert (refuse.allowed, refuse.reasons[0].code) == (False, "mcp_needs_plane")
    shown = dataclasses.replace(ping, mcp_headers=McpHeaders(content_type="application/json"))
    assert (await parts.gate.decide(PresentedIdentity(), shown)).allowed
    parts.problem = "the view is old"
    late = await parts.gate.decide(PresentedIdentity(), shown)
    assert (late.status, late.rpc) == (503, RpcErrorReply(1)), (
        "it is told to the request, though nobody came to reading that"
    )
    status, headers, said = denial_answer(late)
    assert (status, headers["Content-Type"], json.loads(said)["error"]["code"]) == (
        200,
        "application/json",
        503,
    )
    unknown = dataclasses.replace(late, status=401)
    assert denial_answer(unknown)[0] == 401, "who sends it is shown to the transport"


def test_a_lease_has_so_many_sessions_and_no_more() -> None:
    sessions = BindingTable()
    for number in range(300):
        assert sessions.open("repos", f"s{number}", "a")
    assert sessions.open("repos", "other", "b")
    assert sessions.lease_of("repos", "s0") is None
    assert sessions.lease_of("repos", "s299") == "a"
    assert sessions.lease_of("elsewhere", "s299") is None
    assert not sessions.open("repos", "s299", "b")
    for wrong in ("", "a b", "a\n", "é", "x" * 257):
        assert not sessions.open("repos", wrong, "a")
    sessions.end("a")
    assert (sessions.lease_of("repos", "s299"), sessions.lease_of("repos", "other")) == (None, "b")


async def test_a_body_that_decides_must_be_seen(parts: Parts) -> None:
    post = attempt("POST", "/r")
    assert parts.gate.reads_body(post)
    assert not parts.gate.reads_body(attempt())
    assert not parts.gate.reads_body(attempt(authority="elsewhere.example"))
    verdict = await parts.gate.decide(PresentedIdentity(), post)
    assert (verdict.status, verdict.reasons[0].code) == (413, "body_unseen")
    large = b'{"event": "COMMENT", "x": "' + b"x" * 2**20 + b'"}'
    verdict = await parts.gate.decide(PresentedIdentity(), attempt("POST", "/r", body=large))
    assert verdict.reasons[0].code == "body_unseen"
    verdict = await parts.gate.decide(
        PresentedIdentity(), attempt("POST", "/r", body=b'{"event": "COMMENT"}', json=True)
    )
    assert verdict.allowed
    for odd in (b"", b"[]", b'{"event": "COMMENT", "event": "x"}'):
        verdict = await parts.gate.decide(PresentedIdentity(), attempt("POST", "/r", body=odd, json=True))
        assert (verdict.status, verdict.reasons[0].code) == (403, "request_unmapped"), odd
    digests = {event.request_digest for event in parts.events}
    assert len(digests) == len(parts.events), "each was another request"


async def test_upstream_comes_from_the_target_record(parts: Parts) -> None:
    target = parts.place.target()
    assert parts.gate.upstream(target) == "https://hub.example"
    with pytest.raises(UnavailableError, match="--setting url"):
        parts.gate.upstream(parts.place.target("other"))


async def test_target_without_an_upstream_is_recorded_as_denied(parts: Parts) -> None:
    ledger = parts.place.ledger
    ledger.give(ledger.target_set("olga", "staging", requests=RULES))
    by_id = attempt(authority=None, target_id="staging", sent_by_gateway=True)
    verdict = await parts.gate.decide(PresentedIdentity(), by_id)
    assert (verdict.allowed, verdict.status, verdict.reasons[0].code) == (False, 503, "target_nowhere")
    assert "--setting url" in verdict.reasons[0].message
    verdict = await parts.gate.decide(PresentedIdentity(), dataclasses.replace(by_id, sent_by_gateway=False))
    assert verdict.allowed, "a proxy knows where its target is"
    assert [event.allowed for event in parts.events] == [False, True]


@pytest.mark.parametrize(
    ("message", "access"),
    [
        ('"id": 1, "method": "tools/list"', "read"),
        ('"method": "notifications/initialized"', "read"),
        ('"id": 1, "method": "tools/call", "params": {"name": "look"}', "read"),
        ('"id": 1, "method": "tools/call", "params": {"name": "drop"}', "write"),
        ('"id": 1, "method": "tools/call", "params": {"name": "unknown"}', "write"),
        ('"id": 1, "method": "logging/setLevel", "params": {"level": "info"}', "write"),
        ('"id": 1, "result": {}', "write"),
        ('"id": 1', "write"),
    ],
)
async def test_a_message_is_a_read_where_it_or_the_map_says_so(
    parts: Parts, message: str, access: str
) -> None:
    ledger = parts.place.ledger
    backend = BackendSettings.model_validate({"kind": "jwt", "url": "https://hub.example"})
    rules = [
        RequestRule(method="MCP", path="/mcp", mcp=McpRule(method=method, name=name), verb=verb, resource="a")
        for method, name, verb in (("tools/call", "look", "read"), ("tools/call", "drop", "drop"))
    ]
    verbs = (VerbFloor(verb="read"), VerbFloor(verb="drop"))
    ledger.give(ledger.target_set("olga", "staging", backend=backend, verbs=verbs, requests=tuple(rules)))
    body = f'{{"jsonrpc": "2.0", {message}}}'.encode()
    carried = McpHeaders(content_type="application/json")
    await parts.gate.decide(PresentedIdentity(), attempt("POST", "/mcp", body=body, mcp_headers=carried))
    assert [event.access for event in parts.events] == [access]


async def test_method_and_label_of_a_stranger_are_sanitised_in_events(parts: Parts) -> None:
    await parts.gate.decide(PresentedIdentity(), attempt("G\nET", "/\udcff", label="a b\n"))
    (event,) = parts.events
    assert (event.method, event.label, event.allowed) == ("G?ET", None, False)
    assert event.destination == Destination(scheme="https", host="hub.example", port=443, path="/?")


async def test_request_rule_that_is_not_understood_denies(parts: Parts) -> None:
    """Neither way lets it pass, though the rule after it would."""
    assert (await parts.gate.decide(PresentedIdentity(), attempt())).allowed
    at_once = allowed_at_once(parts, PresentedIdentity(), attempt())
    assert (at_once is not None) is is_on("gateway", "fast_path")
    rule = RequestRule(method="GET", path="/env/{name*}", verb="read", resource="env/{name*}")
    limited = rule.model_copy(update={"headers": ["x-dry"]})
    ping = McpRule(method="ping").model_copy(update={"within_s": 1})
    spoken = RequestRule(method="MCP", path="/mcp", verb="read", resource="x", mcp=ping)
    ledger = parts.place.ledger
    before = parts.targets.find(attempt())
    assert not isinstance(before, Refusal)
    rules = (limited, spoken, *RULES)
    as_before(ledger, ledger.target_set("olga", "staging", backend=before.state.backend, requests=rules))
    assert allowed_at_once(parts, PresentedIdentity(), attempt()) is None
    verdict = await parts.gate.decide(PresentedIdentity(), attempt())
    assert (verdict.status, verdict.reasons[0].code) == (403, "rule_not_understood")
    assert "headers; upgrade the gateway, or have an operator set the target" in verdict.reasons[0].message
    body = b'{"jsonrpc": "2.0", "id": 1, "method": "ping"}'
    posted = attempt("POST", "/mcp", body=body, mcp_headers=McpHeaders(content_type="application/json"))
    verdict = await parts.gate.decide(PresentedIdentity(), posted)
    assert (verdict.status, verdict.reasons[0].code) == (403, "rule_not_understood")
    assert parts.events[-1].reasons[0].code == "rule_not_understood"


@pytest.mark.parametrize(
    ("method", "target", "code"),
    [("GET", "/elsewhere/a?token=s3cret#x", "request_unmapped"), ("GET", "/env/prod/web?a", "beyond_lease")],
)
async def test_a_denial_says_where_it_was_going(parts: Parts, method: str, target: str, code: str) -> None:
    await parts.gate.decide(PresentedIdentity(), attempt(method, target))
    await parts.gate.decide(PresentedIdentity(), attempt(method, target, authority=None, target_id="staging"))
    parts.refuses = refuse(Code.PROOF_MISSING, "no proof")
    await parts.gate.decide(PresentedIdentity(handle="none"), attempt(method, target))
    path = target.partition("?")[0]
    expected = Destination(scheme="https", host="hub.example", port=443, path=path)
    assert [event.destination for event in parts.events] == [expected] * 3
    assert [event.method for event in parts.events] == [method] * 3
    assert code in [reason.code for reason in parts.events[0].reasons]


async def test_an_unknown_destination_is_told_and_an_allowed_one_is_not(parts: Parts) -> None:
    await parts.gate.decide(PresentedIdentity(), attempt("PUT", "/v1/charges", authority="api.example:8443"))
    await parts.gate.decide(
        PresentedIdentity(), attempt("PUT", "/v1/charges", authority=None, target_id="nothing")
    )
    await parts.gate.decide(
        PresentedIdentity(), attempt("CONNECT", "api.example:443", authority="api.example")
    )
    assert (await parts.gate.decide(PresentedIdentity(), attempt())).allowed
    first, second, connect, allowed = parts.events
    assert first.destination == Destination(scheme="https", host="api.example", port=8443, path="/v1/charges")
    assert second.destination == Destination(scheme="https", path="/nothing/v1/charges")
    assert connect.destination == Destination(scheme="https", host="api.example", port=443)
    assert {one.reasons[0].code for one in (first, second, connect)} == {"target_unknown"}
    assert (first.access, connect.access, connect.method) == ("write", None, "CONNECT")
    assert allowed.destination is None
