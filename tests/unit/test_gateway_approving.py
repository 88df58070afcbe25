"""An action that waits for a person goes on by a signature over exactly that question, once; by nothing else."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ringfence.gateway.contract import Attempt, Headers, PresentedIdentity, Verdict
from ringfence.gateway.decision.approval_questions import OpenQuestions, digest_of_headers
from ringfence.gateway.decision.approvals import Approvals
from ringfence.gateway.decision.gate import DecisionGate, DecisionLog, DecisionSettings, DecisionSteps
from ringfence.gateway.decision.model_budget import ModelMeters
from ringfence.gateway.decision.targets import Targets
from ringfence.gateway.domain import ApprovalRequired, Refusal, Sender, refuse, stale_view
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.base.ids import digest
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import Outbound
from ringfence.messages.approval import ActionApproval, ActionRequest
from ringfence.messages.codes import Code, ReceivedCode
from ringfence.messages.operations import ActionDecided
from ringfence.messages.registry import (
    ActionClass,
    AgentSetCeiling,
    BackendSettings,
    RequestRule,
    UserDisable,
)
from ringfence.messages.topics import APPROVAL_RESPONSE
from ringfence.model.verdict import ALLOWED, Allowed, Refused
from ringfence.testing.services import InMemoryBudgets
from tests.gateway.recorder import PlayedRecorder
from tests.support.in_memory_registry import TD
from tests.support.switches import build_options
from tests.unit.test_gateway_domain import WIDE, Place

RULES = (
    RequestRule(method="GET", path="/{path*}", verb="read", resource="{path*}"),
    RequestRule(method="POST", path="/{path*}", verb="read", resource="{path*}"),
)
BUNDLE = "a" * 64
HEADERS = (("content-type", "text/plain"), ("x-note", "hello"))
WITHIN_S = 10


class Sent:
    """A request that is still there, and its body."""

    def __init__(self, body: bytes | None = b"x") -> None:
        self.body = body
        self.told: Callable[[], None] | None = None

    async def read_body(self) -> bytes | None:
        return self.body

    def on_disconnect(self, told: Callable[[], None]) -> Callable[[], None]:
        self.told = told
        return lambda: None


class Gateway(PlayedRecorder):
    """The decision core with real records, leases, questions and signatures; Kafka and the bundle are played."""

    def __init__(self, *, wait_s: float = WITHIN_S, per_agent: int = 3, in_total: int = 5) -> None:
        self.place = Place()
        self.ledger = ledger = self.place.ledger
        targets = Targets(ledger.directory)
        backend = BackendSettings.model_validate({"kind": "jwt", "url": "https://hub.example"})
        ledger.give(ledger.target_set("olga", "staging", backend=backend, requests=RULES))
        self.key = SigningKey.generate(f"spiffe://{TD}/service/gateway")
        self.sent: list[tuple[str, str]] = []
        self.asked = asyncio.Event()
        self.kafka = True
        self.problem: str | None = None
        self.refused: list[str] = []
        self.events: list[ActionDecided] = []
        self.wants: ActionClass | None = "sponsor"
        self.denies: Refusal | None = None
        self.when_it_goes_on: Callable[[], None] = lambda: None
        self.equips: Callable[[], None] = lambda: None
        self._times = 0
        self.table, self.directory = self.place.table, ledger.directory
        self._jtis = itertools.count()
        runtime = SimpleNamespace(
            key=self.key, clock=ledger.clock, publisher=self, event=self.event,
            settings=SimpleNamespace(trust_domain=TD, grace_s=5.0), tables_caught_up=self.caught_up,
        )  # fmt: skip
        self.questions = OpenQuestions(per_agent=per_agent, in_total=in_total)
        self.approvals = Approvals(
            cast(Any, runtime), self.directory, self.table, self.questions, wait_s=wait_s, life_s=60
        )
        played = cast(Any, self)
        self.gate = DecisionGate(
            played,
            DecisionSteps(played, targets, played, self.approvals, played, ModelMeters(InMemoryBudgets())),
            DecisionLog(self.key.id, played, played),
            DecisionSettings(10**9, **build_options("gateway")),
            clock=ledger.clock,
            key=lambda: self.key,
        )

    # view, identifier, evaluator, recorder, and what a runtime does
    def stale(self) -> str | None:
        return self.problem

    def check_freshness(self) -> Allowed | Refused:
        return Refused(stale_view(self.problem)) if self.problem else ALLOWED

    def nonce(self) -> str:
        return "fresh"

    async def authenticate(self, presented: PresentedIdentity, attempt: Attempt) -> Sender:
        return Sender("bot", self.place.task)

    async def answer(self, *args: Any, **kwargs: Any) -> Allowed | Refusal | ApprovalRequired:
        self._times += 1
        if self._times > 1:
            self.when_it_goes_on()
        if self.denies is not None:
            return self.denies
        return ApprovalRequired(self.wants, BUNDLE) if self.wants is not None else ALLOWED

    async def headers(self, lease: Any, target: Any) -> dict[str, str]:
        self.equips()
        return {"Authorization": "Bearer x"}

    def record(self, event: ActionDecided) -> None:
        self.events.append(event)

    async def caught_up(self, timeout_s: float) -> bool:
        return True

    async def send(self, topic: Any, type: str, record: Outbound, **more: Any) -> Any:
        if not self.kafka:
            raise UnavailableError("no broker")
        self.sent.append((record.key, str(record.value)))
        self.asked.set()
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    async def event(self, kind: str, subject: str, **more: Any) -> None:
        self.refused += [reason.code for reason in more["reasons"]]

    # what a test does
    def attempt(self, method: str = "GET", target: str = "/env/staging/web", **fields: Any) -> Attempt:
        given = {"headers": lambda: HEADERS, "sent_by_gateway": True, **fields}
        return Attempt("hub.example", "https", method, target, **given)

    @asynccontextmanager
    async def waiting(
        self, attempt: Attempt | None = None, sent: Sent | None = None
    ) -> AsyncIterator[asyncio.Task[Verdict]]:
        """A request that waits; the question about it has been asked."""
        self.asked.clear()
        decided = asyncio.create_task(
            self.gate.decide(PresentedIdentity(), attempt or self.attempt(), holdable=sent or Sent())
        )
        try:
            async with asyncio.timeout(WITHIN_S):
                await self.asked.wait()
                while not any(question.waiting for question in self.questions):
                    await asyncio.sleep(0)
            yield decided
        finally:
            decided.cancel()
            with suppress(asyncio.CancelledError):
                await decided

    def claims(self, compact: str | None = None, **fields: Any) -> ActionApproval:
        compact = compact or self.sent[-1][1]
        now_s = self.ledger.clock.ms // 1000
        return ActionApproval.model_validate({
            "iss": self.ledger.key("sam").id, "aud": TD, "iat": now_s, "exp": now_s + 300,
            "jti": f"a{next(self._jtis)}", "verdict": "approved", "agent_id": "bot", "request": compact,
            "request_digest": digest(compact), **fields,
        })  # fmt: skip

    async def said(
        self, claims: ActionApproval | None = None, by: SigningKey | None = None, key: str = "bot",
        at_ms: int | None = None,
    ) -> None:  # fmt: skip
        """Somebody answers, and the gateway has looked at it."""
        compact = sign(claims or self.claims(), by or self.ledger.key("sam"))
        self.approvals.on_records([self.ledger.received(APPROVAL_RESPONSE, key, compact, at_ms)])
        for task in list(self.approvals._tasks):
            await task

    async def still_waits(self, decided: asyncio.Task[Verdict]) -> bool:
        for _ in range(20):
            await asyncio.sleep(0)
        return not decided.done()


@pytest.fixture
async def gateway() -> Gateway:
    return Gateway()


async def code(decided: asyncio.Task[Verdict]) -> str:
    async with asyncio.timeout(WITHIN_S):
        verdict = await decided
    assert not verdict.allowed
    return verdict.reasons[0].code


async def test_exactly_what_would_go_on_is_asked_and_goes_on_with_a_yes(gateway: Gateway) -> None:
    post = gateway.attempt("POST", "/env/staging/web?a=%2f")
    async with gateway.waiting(post, Sent(b"do it")) as decided:
        ((key, compact),) = gateway.sent
        asked = parse(compact).unverified_claims(ActionRequest)
        assert key == "sam"
        assert (asked.method, asked.url) == ("POST", "https://hub.example/env/staging/web?a=%2f")
        assert (asked.body_digest, asked.body_bytes) == (hashlib.sha256(b"do it").hexdigest(), 5)
        assert (asked.agent_id, asked.lease_id) == ("bot", gateway.place.lease.lease_id)
        assert (asked.required, asked.revisions.policy) == ("sponsor", BUNDLE)
        assert len(asked.jti) >= 43
        assert await gateway.still_waits(decided)
        await gateway.said()
        verdict = await decided
    assert verdict.allowed
    assert verdict.lease == gateway.place.lease
    (event,) = gateway.events
    assert event.asked is not None
    assert (event.allowed, event.asked.by, event.asked.request_digest) == (True, "sam", digest(compact))


@pytest.mark.parametrize(
    ("fields", "by", "key", "code"),
    [
        ({"request_digest": "0" * 64}, "sam", "bot", "request_unknown"),
        ({"request": "e30.e30.e30"}, "sam", "bot", "approval_other_request"),
        ({}, "suzy", "bot", "not_approver"),
        ({}, "olga", "bot", "not_approver"),
        ({}, "uma", "bot", "not_approver"),
        ({}, "sam", "thief", "key_unexpected"),
        ({"agent_id": "thief"}, "sam", "bot", "key_unexpected"),
        ({"aud": "other.example"}, "sam", "bot", None),
        ({"only_at": "night"}, "sam", "bot", "approval_not_understood"),
    ],
)
async def test_answer_that_does_not_match_the_question_is_ignored(
    gateway: Gateway, fields: dict[str, Any], by: str, key: str, code: str | None
) -> None:
    async with gateway.waiting() as decided:
        signer = gateway.ledger.key(by)
        await gateway.said(gateway.claims(**{"iss": signer.id, **fields}), signer, key)
        assert await gateway.still_waits(decided)
        assert gateway.refused == ([code] if code else [])
        await gateway.said()
        assert (await decided).allowed, "and the right one counts all the same"


async def test_neither_the_agent_nor_a_stranger_nor_a_service_can_say_yes(gateway: Gateway) -> None:
    ledger = gateway.ledger
    async with gateway.waiting() as decided:
        for by in (ledger.key("bot", "agent"), gateway.key, SigningKey.generate(ledger.key("sam").id)):
            await gateway.said(gateway.claims(iss=by.id), by)
            await gateway.said(gateway.claims(iss=ledger.key("sam").id), by)
        assert await gateway.still_waits(decided)


@pytest.mark.parametrize("late_ms", [60_000, 61_000])
async def test_an_answer_after_the_end_counts_for_nothing(gateway: Gateway, late_ms: int) -> None:
    async with gateway.waiting() as decided:
        gateway.ledger.clock.ms += late_ms
        await gateway.said()
        assert gateway.refused == ["approval_expired"]
        assert await gateway.still_waits(decided)


async def test_an_answer_whose_own_time_is_over_counts_for_nothing(gateway: Gateway) -> None:
    async with gateway.waiting() as decided:
        claims = gateway.claims(exp=gateway.ledger.clock.ms // 1000 + 5)
        await gateway.said(claims, at_ms=gateway.ledger.clock.ms + 5000)
        assert await gateway.still_waits(decided)


async def test_a_yes_counts_once_and_for_the_very_same_request_alone() -> None:
    gateway = Gateway(per_agent=9, in_total=9)
    async with gateway.waiting(sent=Sent(b"one")) as first:
        yes = gateway.claims()
        async with gateway.waiting(sent=Sent(b"two")) as other:
            await gateway.said(yes)
            assert (await first).allowed
            assert await gateway.still_waits(other)
            await gateway.said(yes)
            assert gateway.refused == ["approval_replayed"]
            assert await gateway.still_waits(other)
        async with gateway.waiting(sent=Sent(b"one")) as again:
            assert len(gateway.sent) == 3, "the same again is asked anew"
            await gateway.said(yes)
            assert await gateway.still_waits(again)
        for url in ("/env/staging/api", "/env/staging/web?x=1"):
            async with gateway.waiting(gateway.attempt(target=url), Sent(b"one")) as elsewhere:
                await gateway.said(yes)
                assert await gateway.still_waits(elsewhere)


async def test_another_gateways_question_is_not_this_ones(gateway: Gateway) -> None:
    other = Gateway()
    async with gateway.waiting() as decided, other.waiting():
        (_, compact), by = other.sent[-1], gateway.ledger.key("sam")
        await gateway.said(gateway.claims(compact), by)
        ours = parse(gateway.sent[-1][1]).unverified_claims(ActionRequest)
        theirs = sign(ours.model_copy(update={"jti": "x" * 43}), gateway.key)
        await gateway.said(gateway.claims(theirs), by)
        assert gateway.refused == ["request_unknown"] * 2, "whoever answered is told"
        assert await gateway.still_waits(decided)


async def test_a_no_is_the_answer_to_the_same_request_until_its_end(gateway: Gateway) -> None:
    async with gateway.waiting() as decided:
        await gateway.said(gateway.claims(verdict="denied", comment="not on a Friday"))
        assert await code(decided) == "approval_denied"
    verdict = await gateway.gate.decide(PresentedIdentity(), gateway.attempt(), holdable=Sent())
    assert (verdict.status, verdict.reasons[0].code) == (403, "approval_denied")
    assert "not on a Friday" in verdict.reasons[0].message
    assert len(gateway.sent) == 1, "who said no is not asked the same again"
    await gateway.said()
    assert gateway.refused == ["already_decided"]
    assert gateway.events[-1].asked is not None
    assert gateway.events[-1].asked.by == "sam"


async def test_repeated_request_after_a_timeout_gets_the_late_answer() -> None:
    gateway = Gateway(wait_s=0.01)
    verdict = await gateway.gate.decide(PresentedIdentity(), gateway.attempt(), holdable=Sent())
    assert (verdict.status, verdict.reasons[0].code) == (403, "approval_pending")
    assert "send exactly the same request again" in verdict.reasons[0].message
    await gateway.said()
    other = await gateway.gate.decide(PresentedIdentity(), gateway.attempt(), holdable=Sent(b"another body"))
    assert other.reasons[0].code == "approval_pending"
    assert (await gateway.gate.decide(PresentedIdentity(), gateway.attempt(), holdable=Sent())).allowed
    again = await gateway.gate.decide(PresentedIdentity(), gateway.attempt(), holdable=Sent())
    assert again.reasons[0].code == "approval_pending", "once"
    gateway.ledger.clock.ms += 60_000
    await gateway.gate.decide(PresentedIdentity(), gateway.attempt(), holdable=Sent())
    assert len(gateway.sent) == 4, "what nobody answered in time is asked anew"


async def test_a_yes_that_nobody_fetched_in_time_is_worth_nothing() -> None:
    gateway = Gateway(wait_s=0.01)
    await gateway.gate.decide(PresentedIdentity(), gateway.attempt(), holdable=Sent())
    await gateway.said(gateway.claims(exp=gateway.ledger.clock.ms // 1000 + 10))
    gateway.ledger.clock.ms += 10_000
    assert not (await gateway.gate.decide(PresentedIdentity(), gateway.attempt(), holdable=Sent())).allowed


@pytest.mark.parametrize("how", ["cut", "deadline", "stale", "suspended"])
async def test_change_during_a_hold_denies_at_once(gateway: Gateway, how: str) -> None:
    lease = gateway.place.lease
    async with gateway.waiting() as decided:
        if how == "cut":
            gateway.table.revoke(lease.lease_id, gateway.ledger.clock.ms)
        elif how == "suspended":
            gateway.table.fence("agent:bot", gateway.ledger.clock.ms, revocation_id="an order")
        elif how == "deadline":
            gateway.ledger.clock.ms = lease.deadline * 1000
            gateway.table.sweep()
        else:
            gateway.problem = "old"
            gateway.table.end_all_watched()
        expected = {"deadline": "lease_ended", "stale": "stale_view"}.get(how, "lease_cut")
        assert await code(decided) == expected


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("cut", "lease_cut"),
        ("stale", "stale_view"),
        ("denied", "too_late"),
        ("another class", "approval_stale"),
    ],
)
async def test_approved_request_is_decided_again_before_forwarding(
    gateway: Gateway, how: str, why: str
) -> None:
    def change() -> None:
        if how == "cut":
            gateway.table.revoke(gateway.place.lease.lease_id, gateway.ledger.clock.ms)
        elif how == "stale":
            gateway.problem = "old"
        elif how == "another class":
            gateway.wants = "operator"
        else:
            gateway.denies = refuse(ReceivedCode("too_late"), "not at night")

    gateway.when_it_goes_on = change
    async with gateway.waiting() as decided:
        await gateway.said()
        assert await code(decided) == why
    assert [event.allowed for event in gateway.events] == [False]


async def test_a_sponsor_who_is_replaced_while_it_waits_cannot_say_yes(gateway: Gateway) -> None:
    ledger = gateway.ledger
    async with gateway.waiting() as decided:
        ledger.give(ledger.transfer("olga", "bot", "suzy"))
        await gateway.said()
        assert gateway.refused == ["approval_stale"]
        assert await code(decided) == "approval_stale"
    async with gateway.waiting() as decided:
        assert gateway.sent[-1][0] == "suzy"
        await gateway.said()
        assert gateway.refused[-1] == "not_approver"
        suzy = ledger.key("suzy")
        await gateway.said(gateway.claims(iss=suzy.id), suzy)
        assert (await decided).allowed


async def test_a_yes_over_older_records_counts_for_nothing(gateway: Gateway) -> None:
    ledger = gateway.ledger
    async with gateway.waiting() as decided:
        ledger.give(ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=(WIDE, WIDE)))
        await gateway.said()
        assert await code(decided) == "approval_stale"


async def test_approver_disabled_after_the_approval_makes_it_stale(gateway: Gateway) -> None:
    ledger = gateway.ledger
    gateway.wants, otto = "operator", ledger.key("otto")
    disable = ledger.claims(UserDisable, "olga", user_id="otto", reason="left")
    gateway.when_it_goes_on = lambda: cast(None, ledger.give(disable))
    async with gateway.waiting() as decided:
        await gateway.said(gateway.claims(iss=otto.id), otto)
        assert await code(decided) == "approval_stale"


async def test_change_while_fetching_the_credential_makes_the_approval_stale(gateway: Gateway) -> None:
    ledger = gateway.ledger
    change = ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=(WIDE, WIDE))
    gateway.equips = lambda: cast(None, ledger.give(change))
    async with gateway.waiting() as decided:
        await gateway.said()
        assert await code(decided) == "approval_stale"


async def test_a_yes_whose_time_ends_while_the_credential_is_fetched_is_worth_nothing(
    gateway: Gateway,
) -> None:
    def later() -> None:
        gateway.ledger.clock.ms += 60_000

    gateway.equips = later
    async with gateway.waiting() as decided:
        await gateway.said()
        assert await code(decided) == "approval_timeout"


async def test_a_yes_is_not_used_up_by_what_cannot_go_on(gateway: Gateway) -> None:
    def away() -> None:
        raise UnavailableError("the credential is not here yet")

    gateway.equips = away
    async with gateway.waiting() as decided:
        await gateway.said()
        assert await code(decided) == "unavailable"
    gateway.equips = lambda: None
    assert (await gateway.gate.decide(PresentedIdentity(), gateway.attempt(), holdable=Sent())).allowed
    assert len(gateway.sent) == 1


async def test_the_same_is_shown_once_and_a_yes_lets_one_of_them_go_on(gateway: Gateway) -> None:
    async with gateway.waiting() as first:
        second = asyncio.create_task(
            gateway.gate.decide(PresentedIdentity(), gateway.attempt(), holdable=Sent())
        )
        assert await gateway.still_waits(second)
        assert len(gateway.sent) == 1
        await gateway.said()
        async with asyncio.timeout(WITHIN_S):
            verdicts = [await first, await second]
    assert sorted(verdict.allowed for verdict in verdicts) == [False, True]
    (lost,) = [verdict for verdict in verdicts if not verdict.allowed]
    assert lost.reasons[0].code == "approval_used"


async def test_one_agent_floods_nobody() -> None:
    gateway = Gateway(wait_s=0.01, per_agent=3, in_total=5)
    codes = []
    for number in range(5):
        verdict = await gateway.gate.decide(
            PresentedIdentity(), gateway.attempt(target=f"/env/staging/{number}"), holdable=Sent()
        )
        codes.append((verdict.status, verdict.reasons[0].code))
    assert codes == [(403, "approval_pending")] * 3 + [(429, "approvals_pending_limit")] * 2
    assert len(gateway.sent) == 3
    for _, compact in gateway.sent:
        await gateway.said(gateway.claims(compact, verdict="denied"))
    more = await gateway.gate.decide(
        PresentedIdentity(), gateway.attempt(target="/env/staging/9"), holdable=Sent()
    )
    assert more.status == 429, "a no makes no room for the next question"
    gateway.ledger.clock.ms += 60_000
    more = await gateway.gate.decide(
        PresentedIdentity(), gateway.attempt(target="/env/staging/9"), holdable=Sent()
    )
    assert more.reasons[0].code == "approval_pending"


async def test_and_so_many_may_wait_and_no_more(gateway: Gateway) -> None:
    async with gateway.waiting() as first:
        others = [
            asyncio.create_task(gateway.gate.decide(PresentedIdentity(), gateway.attempt(), holdable=Sent()))
            for _ in range(4)
        ]
        assert await gateway.still_waits(first)
        assert [one.result().status for one in others if one.done()] == [429, 429]
        await gateway.said()
        async with asyncio.timeout(WITHIN_S):
            verdicts = [await one for one in (first, *others)]
    assert sum(verdict.allowed for verdict in verdicts) == 1


async def test_hold_with_the_whole_body_needs_no_connection(gateway: Gateway) -> None:
    decided = asyncio.create_task(
        gateway.gate.decide(PresentedIdentity(), gateway.attempt("POST", body=b"all of it"))
    )
    assert await gateway.still_waits(decided)
    await gateway.said()
    async with asyncio.timeout(WITHIN_S):
        assert (await decided).allowed


async def test_without_its_body_nobody_is_asked(gateway: Gateway) -> None:
    for patient in (None, Sent(None)):
        verdict = await gateway.gate.decide(PresentedIdentity(), gateway.attempt(), holdable=patient)
        assert (verdict.status, verdict.reasons[0].code) == (413, "body_unseen")
    large = Sent(b"x" * (2**20 + 1))
    assert (await gateway.gate.decide(PresentedIdentity(), gateway.attempt(), holdable=large)).status == 413
    odd = gateway.attempt(target="/env/staging/web?\udcff")
    assert (await gateway.gate.decide(PresentedIdentity(), odd, holdable=Sent())).reasons[
        0
    ].code == "action_unshowable"
    assert gateway.sent == []


@pytest.mark.parametrize(
    "others",
    [
        (("content-type", "text/html"), ("x-note", "hello")),
        (("x-note", "hello"), ("content-type", "text/plain")),
        (("content-type", "text/plain"), ("x-note", "hello"), ("x-note", "hello")),
        (("content-type", "text/plain"),),
        (("content-type", "text/plain"), ("content-encoding", "gzip"), ("x-note", "hello")),
        (("content-type", "text/plain"), ("x-note", "bye")),
    ],
)
async def test_a_yes_lets_no_other_headers_go_on(others: Headers) -> None:
    gateway = Gateway(wait_s=0.01)

    async def decide(headers: Headers, body: bytes = b"x") -> Verdict:
        put = gateway.attempt("POST", headers=lambda: headers)
        return await gateway.gate.decide(PresentedIdentity(), put, holdable=Sent(body))

    assert not (await decide(HEADERS)).allowed
    await gateway.said()
    verdict = await decide(others)
    assert verdict.reasons[0].code == "approval_pending"
    assert len(gateway.sent) == 2, "it is another question"
    verdict = await decide(HEADERS)
    assert verdict.allowed
    assert verdict.headers == HEADERS, "what was approved is what goes on"
    first, second = (parse(compact).unverified_claims(ActionRequest) for _, compact in gateway.sent)
    assert first.headers_digest == digest_of_headers(HEADERS)
    assert second.headers_digest == digest_of_headers(others)


async def test_an_exact_retry_finds_its_question_whatever_traces_it() -> None:
    gateway = Gateway(wait_s=0.01)

    async def decide(number: int) -> Verdict:
        moving = (("traceparent", f"00-{number}"), ("date", str(number)), ("x-request-id", str(number)))
        sent = gateway.attempt(headers=lambda: (*moving, *HEADERS))
        return await gateway.gate.decide(PresentedIdentity(), sent, holdable=Sent())

    assert (await decide(1)).reasons[0].code == "approval_pending"
    await gateway.said()
    verdict = await decide(2)
    assert verdict.allowed
    assert verdict.headers == HEADERS
    assert len(gateway.sent) == 1


async def test_the_question_shows_no_value_that_may_be_a_secret(gateway: Gateway) -> None:
    headers = (("content-type", "text/plain"), ("cookie", "s3cret"))
    async with gateway.waiting(gateway.attempt(headers=lambda: headers)):
        ((_, compact),) = gateway.sent
    asked = parse(compact).unverified_claims(ActionRequest)
    assert [(one.name, one.value) for one in asked.headers or ()] == [
        ("content-type", "text/plain"), ("cookie", None),
    ]  # fmt: skip
    assert "s3cret" not in asked.model_dump_json()


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        (Code.HEADERS_UNSEEN, {"headers": None}),
        (Code.HEADERS_UNSEEN, {"headers": lambda: (("traceparent", "1"),), "sent_by_gateway": False}),
        (Code.ACTION_UNSHOWABLE, {"headers": lambda: (("destination", "/\xe9"),)}),
    ],
)
async def test_request_that_cannot_be_shown_whole_is_denied(
    gateway: Gateway, code: Code, shown: dict[str, Any]
) -> None:
    attempt = gateway.attempt("POST", body=b"x", **shown)
    verdict = await gateway.gate.decide(PresentedIdentity(), attempt)
    assert (verdict.status, verdict.reasons[0].code) == (403, code)
    assert gateway.sent == []
    gateway.wants = None
    assert (await gateway.gate.decide(PresentedIdentity(), attempt)).allowed, (
        "where nobody is asked it goes on"
    )


async def test_client_that_left_is_denied_as_client_gone(gateway: Gateway) -> None:
    sent = Sent()
    async with gateway.waiting(sent=sent) as decided:
        assert sent.told is not None
        sent.told()
        assert await code(decided) == "client_gone"


async def test_without_kafka_nobody_is_asked_and_nothing_is_left(gateway: Gateway) -> None:
    gateway.kafka = False
    verdict = await gateway.gate.decide(PresentedIdentity(), gateway.attempt(), holdable=Sent())
    assert (verdict.status, verdict.reasons[0].code) == (503, "approval_unavailable")
    assert len(gateway.questions) == 0
    gateway.kafka = True
    async with gateway.waiting() as decided:
        await gateway.said()
        assert (await decided).allowed


async def test_malformed_answers_are_skipped(gateway: Gateway) -> None:
    async with gateway.waiting() as decided:
        for value in (b"", b"{}", b"a.b.c", b"x" * 70_000, b"\xff"):
            record = gateway.ledger.received(APPROVAL_RESPONSE, "bot", value)
            gateway.approvals.on_records([record])
        await gateway.said()
        assert (await decided).allowed
