"""Withdrawals of requests beside requests: which come first in a batch, and what becomes of a flood of them."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ringfence.kernel.base.errors import InvalidMessageError, UnavailableError
from ringfence.kernel.crypto.jws import Signed, parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import Received
from ringfence.messages.codes import Code
from ringfence.messages.credential import CredentialRequest, RequestWithdraw
from ringfence.messages.topics import CREDENTIAL_REQUEST
from ringfence.model.verdict import ALLOWED, Verdict, refused
from ringfence.policy.incoming.admission import (
    TOLD_NO,
    AdmissionControl,
    AdmissionLimits,
    is_request_withdrawal,
)
from ringfence.policy.incoming.credential_requests import WithdrawalHandler, requests_then_withdrawals
from tools.schemas.examples import EXAMPLES

BOT = SigningKey.generate("spiffe://acme.example/agent/bot")
WAITS = "11111111-1111-4111-8111-111111111111"
NOW_MS = 1_800_000_000_000


def record(of: type[Any], offset: int = 0, at_ms: int = NOW_MS, **fields: Any) -> Received:
    claims = EXAMPLES[of].model_copy(update={"iss": BOT.id, "aud": "acme.example", **fields})
    value = sign(cast(Any, claims), BOT).encode()
    return Received(CREDENTIAL_REQUEST, "requests", 0, offset, at_ms, "bot", value, ())


def asked(offset: int = 0) -> Received:
    return record(CredentialRequest, offset)


def withdrawn(offset: int = 0, request_id: str = WAITS, at_ms: int = NOW_MS) -> Received:
    return record(RequestWithdraw, offset, at_ms, request_id=request_id)


def test_a_withdrawal_is_known_by_its_typ() -> None:
    assert is_request_withdrawal(withdrawn())
    assert not is_request_withdrawal(asked())
    for garbage in (b"", b"a.b.c", b"\xff" * 90):
        assert not is_request_withdrawal(Received(CREDENTIAL_REQUEST, "r", 0, 0, 0, "bot", garbage, ()))


# --- within one batch ---


class Batches:
    """What was handled, in order; and dead letters that note what they got."""

    def __init__(self) -> None:
        self.seen: list[object] = []
        self.dead: list[int] = []
        self.fails: Exception | None = None
        self.handle = requests_then_withdrawals(
            self._request, self._withdrawal, self._received, cast(Any, self)
        )

    async def _request(self, record: Received) -> None:
        self.seen.append(("request", record.offset))
        if self.fails:
            raise self.fails

    async def _withdrawal(self, record: Received) -> None:
        self.seen.append(("withdrawal", record.offset))
        if self.fails:
            raise self.fails

    def _received(self, batch: Sequence[Received]) -> None:
        self.seen.append([one.offset for one in batch])

    async def send(self, record: Received, error: InvalidMessageError) -> None:
        self.dead.append(record.offset)

    async def enqueue(self, record: Received, error: InvalidMessageError) -> Any:
        return self.send(record, error)


async def test_withdrawals_come_after_the_requests_of_their_batch_in_order() -> None:
    batches = Batches()
    await batches.handle([withdrawn(0), asked(1), withdrawn(2), asked(3)])
    assert batches.seen == [
        ("request", 1), ("request", 3), [0, 2], ("withdrawal", 0), ("withdrawal", 2),
    ]  # fmt: skip
    batches.seen.clear()
    await batches.handle([asked(4)])
    assert batches.seen == [("request", 4)]


async def test_withdrawals_wait_for_undecided_requests_of_the_batch() -> None:
    batches = Batches()
    batches.fails = UnavailableError("Kafka is away")
    with pytest.raises(UnavailableError):
        await batches.handle([asked(0), withdrawn(1)])
    assert batches.seen == [("request", 0)]


async def test_invalid_records_of_both_kinds_go_to_the_dead_letters() -> None:
    batches = Batches()
    batches.fails = InvalidMessageError("no", code=Code.NOT_A_JWS)
    await batches.handle([withdrawn(0), asked(1), withdrawn(2)])
    assert sorted(batches.dead) == [0, 1, 2]


# --- a flood of them ---


class Flood:
    """A handler whose policy refuses every withdrawal, except of the one request that waits."""

    def __init__(self, now_ms: int = NOW_MS) -> None:
        self.shed: list[int] = []
        self.withdrawn: list[str] = []
        self.events: list[dict[str, Any]] = []
        runtime = SimpleNamespace(clock=SimpleNamespace(now_ms=lambda: now_ms), event_soon=self._event)
        decisions = {WAITS: SimpleNamespace(pending="a decision")}
        directory = SimpleNamespace(agent=lambda _: None)
        self.gate = AdmissionControl(cast(Any, directory), AdmissionLimits(3, 0, 40))
        self._handler = WithdrawalHandler(
            cast(Any, runtime), cast(Any, directory), cast(Any, self), self.gate, cast(Any, self),
            cast(Any, decisions), cast(Any, self),
        )  # fmt: skip
        self.handle = self._handler.handle

    async def request_withdrawal(self, record: Received) -> tuple[Signed[RequestWithdraw], None]:
        jws = parse(record.value)
        return Signed(jws.unverified_claims(RequestWithdraw), jws.compact), None

    async def withdraw(self, withdrawal: Signed[RequestWithdraw], agent_id: str, record: Received) -> Verdict:
        if withdrawal.claims.request_id != WAITS:
            return refused(Code.REQUEST_UNKNOWN, "no")
        self.withdrawn.append(agent_id)
        return ALLOWED

    def count(self, record: Received) -> None:
        self.shed.append(record.offset)

    async def _event(self, kind: str, subject: str, **fields: Any) -> Any:
        self.events.append({"kind": kind, "subject": subject, **fields})
        return None


async def test_flood_of_void_withdrawals_is_shed() -> None:
    flood = Flood()
    for offset in range(TOLD_NO + 5):
        await flood.handle(withdrawn(offset, f"22222222-2222-4222-8222-{offset:012d}"))
    assert (len(flood.events), len(flood.shed)) == (TOLD_NO, 5)
    assert {(event["kind"], event["subject"]) for event in flood.events} == {("refused", "request.withdraw")}
    # What waits can be withdrawn all the same: people are waiting to be asked about something else.
    await flood.handle(withdrawn(TOLD_NO + 5))
    assert flood.withdrawn == ["bot"]


async def test_backlog_handles_withdrawals_of_pending_requests_only() -> None:
    flood = Flood(now_ms=NOW_MS + 100_000)
    for offset in range(TOLD_NO + 1):
        await flood.handle(withdrawn(offset, f"22222222-2222-4222-8222-{offset:012d}"))
    assert flood.shed
    await flood.handle(withdrawn(TOLD_NO + 1))
    assert flood.withdrawn == ["bot"]


async def test_an_effective_withdrawal_is_told_by_its_decision_alone() -> None:
    flood = Flood()
    assert await flood.handle(withdrawn()) is None
    assert (flood.withdrawn, flood.events) == (["bot"], [])
