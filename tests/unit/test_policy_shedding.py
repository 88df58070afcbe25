"""More is asked than can even be refused: some are served all the same, and the others hear of it while they wait."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.jws import Signed, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import Received
from ringfence.messages.credential import Coordinates, CredentialRequest
from ringfence.messages.topics import CREDENTIAL_REQUEST
from ringfence.policy.domain import Case, RequestRefused
from ringfence.policy.incoming.admission import LOOKED_AT, SHARE, TOLD_NO, AdmissionControl, AdmissionLimits
from ringfence.policy.incoming.load_shedding import BacklogMonitor, ShedRequests, Stage
from tools.schemas.examples import EXAMPLES

WAIT_S = 40
START = 1_800_000_000_000 - 1_800_000_000_000 % 60_000
BOT = SigningKey.generate("spiffe://test.example/agent/bot")
REQUEST = cast(CredentialRequest, EXAMPLES[CredentialRequest])


def record(
    key: str = "bot", at_ms: int = START, partition: int = 0, offset: int = 0, value: bytes = b"x"
) -> Received:
    return Received(CREDENTIAL_REQUEST, "requests", partition, offset, at_ms, key, value, ())


def case(of: Received) -> Case:
    place = Coordinates(
        topic="requests", partition=of.partition, offset=of.offset, appended_at_ms=of.appended_at_ms
    )
    return Case(Signed(REQUEST, "a.b.c"), "5b0a4d7e-6c0f-5d39-9b5e-0a4d7e6c0f5d", of.key or "", place, None)


def gatekeeper(agent: int = 0, wait_s: int = WAIT_S) -> AdmissionControl:
    directory = SimpleNamespace(agent=lambda _: SimpleNamespace(state=SimpleNamespace(sponsor="sam")))
    return AdmissionControl(cast(Any, directory), AdmissionLimits(agent, 0, wait_s))


def fate(gate: AdmissionControl, of: Received, now_ms: int) -> str:
    if gate.should_shed(of, now_ms):
        return "let go"
    admission = gate.admit(case(of), now_ms)
    return admission.reasons[0].code if isinstance(admission, RequestRefused) else "served"


# --- how far behind ---


@pytest.mark.parametrize(
    ("ages_s", "last"),
    [
        ((40,), Stage.SERVED),
        ((40.001,), Stage.SHARED),
        ((41, 39, 20, 10.001), Stage.SHARED),
        ((41, 10), Stage.SERVED),
        ((41, 10, 39), Stage.SERVED),
        ((80,), Stage.SHARED),
        ((80.001,), Stage.UNANSWERED),
        ((81, 79, 41, 11), Stage.UNANSWERED),
        ((81, 10), Stage.SERVED),
    ],
)
def test_backlog_stays_in_its_stage_until_it_has_caught_up(ages_s: tuple[float, ...], last: Stage):
    backlog = BacklogMonitor(WAIT_S)
    stages = [backlog.observe(0, START, START + int(age_s * 1000)) for age_s in ages_s]
    assert stages[-1] is backlog.stage(0) is last


def test_each_partition_has_a_backlog_of_its_own():
    backlog = BacklogMonitor(WAIT_S)
    assert [backlog.observe(n, START, START + 50_000 * n) for n in range(3)] == list(Stage)
    assert [backlog.stage(n) for n in range(4)] == [*Stage, Stage.SERVED]


def test_without_limit_nothing_is_too_old():
    backlog = BacklogMonitor(0)
    assert backlog.observe(0, START, START + 10**9) is Stage.SERVED
    assert backlog.warning(START + 10**9) is None


def test_shedding_is_reported_while_requests_are_dropped():
    gate, now_ms = gatekeeper(), START + 50_000
    assert gate.behind(now_ms) is None
    gate.should_shed(record(), now_ms)
    assert "waited for 50 s" in (gate.behind(now_ms) or "")
    assert gate.behind(now_ms + 10_000) is None  # nothing comes any more
    gate.should_shed(record(at_ms=now_ms), now_ms)
    assert gate.behind(now_ms) is None


# --- who hears of it ---


def test_backlog_gives_each_agent_a_share_of_refusals():
    gate, now_ms = gatekeeper(), START + 50_000
    fates = [fate(gate, record(), now_ms) for _ in range(SHARE + 2)]
    assert fates == ["overloaded"] * SHARE + ["let go"] * 2
    assert fate(gate, record("other"), now_ms) == "overloaded"
    assert (
        fate(gate, record(at_ms=START + 60_000), START + 101_000) == "overloaded"
    )  # asked in the next minute


@pytest.mark.parametrize(("limit", "told"), [(3, TOLD_NO), (TOLD_NO + 1, TOLD_NO + 1)])
def test_agent_over_its_rate_gets_a_bounded_number_of_refusals(limit: int, told: int):
    gate = gatekeeper(agent=limit)
    fates = [fate(gate, record(), START) for _ in range(limit + told + 2)]
    assert fates == ["served"] * limit + ["rate_limited"] * told + ["let go"] * 2
    assert fate(gate, record(at_ms=START + 60_000), START + 60_000) == "served"


def test_records_of_others_under_an_agents_key_use_up_nothing():
    gate, now_ms = gatekeeper(agent=3), START + 50_000
    assert not any(gate.should_shed(record(), now_ms) for _ in range(1000))  # none was verified
    assert fate(gate, record(), now_ms) == "overloaded"


def test_few_are_answered_who_waited_for_so_long_that_hardly_anybody_waits_any_more():
    gate = gatekeeper()
    fates = [fate(gate, record(f"a{n}"), START + 81_000) for n in range(LOOKED_AT + 1)]
    assert fates == ["overloaded"] * LOOKED_AT + ["let go"]
    assert fate(gate, record("b", partition=1), START + 81_000) == "overloaded"
    assert fate(gate, record("b", at_ms=START + 59_999), START + 82_000) == "let go"
    assert fate(gate, record("c", at_ms=START + 72_000), START + 82_000) == "served"


FLOOD_MS = 240_000
ANSWER_MS, GLANCE_MS = 50, 2.5


def flooded(gate: AdmissionControl) -> list[tuple[str, int, float, str]]:
    """One agent asks five times as often as can be answered, another every four seconds, for a minute longer.

    A queue, in virtual time, where an answer costs the same whatever it says. Returns who asked, when, when it was
    over, and what came of it.
    """
    queue = [("flood", at_ms) for at_ms in range(0, FLOOD_MS, ANSWER_MS // 5)]
    queue += [("honest", at_ms) for at_ms in range(1, FLOOD_MS + 60_000, 4000)]
    done, now_ms = [], 0.0
    for who, at_ms in sorted(queue, key=lambda one: one[1]):
        now_ms = max(now_ms, at_ms)
        became = fate(gate, record(who, START + at_ms), START + int(now_ms))
        now_ms += GLANCE_MS if became == "let go" else ANSWER_MS
        done.append((who, at_ms, now_ms, became))
    return done


def test_five_times_as_much_as_can_be_answered():
    done = flooded(gatekeeper())
    counts = Counter((who, became) for who, _, _, became in done)
    assert max(over_ms - at_ms for _, at_ms, over_ms, _ in done) < 2 * WAIT_S * 1000
    assert counts["flood", "served"] * ANSWER_MS > 0.6 * FLOOD_MS
    assert counts["honest", "let go"] == 0
    assert counts["honest", "served"] > 2 * counts["honest", "overloaded"]
    after = [
        (became, over_ms - at_ms) for _, at_ms, over_ms, became in done if at_ms > FLOOD_MS + WAIT_S * 1000
    ]
    assert after == [("served", ANSWER_MS)] * len(after)
    assert after


def test_agent_at_its_limit_does_not_delay_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "ringfence.policy.incoming.admission.TOLD_NO", 100
    )  # only 20 answers a second can be had here
    done = flooded(gatekeeper(agent=100))
    assert {became for who, _, _, became in done if who == "honest"} == {"served"}
    assert max(over_ms - at_ms for who, at_ms, over_ms, _ in done if who == "honest") < WAIT_S * 1000 / 2


# --- what is counted ---


class Runtime:
    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.broken = False

    async def event(self, kind: str, subject: str, **fields: Any) -> None:
        if self.broken:
            raise OSError("Kafka is away")
        self.events.append({"kind": kind, "subject": subject, **fields})


class Decisions(dict[str, object]):
    """The memory of policy, as far as it tells what is known up to offset 10."""

    def reached(self, partition: int) -> int:
        return 10 if partition == 0 else -1


def let_go(*known: str) -> tuple[ShedRequests, Runtime]:
    runtime = Runtime()
    return ShedRequests(cast(Any, runtime), cast(Any, Decisions.fromkeys(known, "something"))), runtime


async def test_shed_requests_are_reported_by_number_and_offsets():
    counted, runtime = let_go()
    for offset, key in enumerate(["bot", "other", "bot", "bot"]):
        counted.count(record(key, offset=offset))
    counted.count(record("third", partition=1, offset=7))
    await counted.report()
    first, second = runtime.events
    assert (first["kind"], first["subject"], first["source"].offset) == ("finding", "credential.request", 3)
    (reason,) = first["reasons"]
    assert reason.code == "requests_shed"
    assert "4 requests between offsets 0 and 3 of partition 0" in reason.message
    assert "bot (3), other (1)" in reason.message
    assert second["source"].partition == 1
    await counted.report()
    assert len(runtime.events) == 2


async def test_failed_shedding_report_is_sent_later():
    counted, runtime = let_go()
    counted.count(record(offset=1))
    runtime.broken = True
    with pytest.raises(OSError, match="away"):
        await counted.report()
    await counted.close()
    runtime.broken = False
    counted.count(record(offset=2))
    await counted.close()
    assert [event["source"].offset for event in runtime.events] == [1, 2]


async def test_a_batch_that_comes_again_is_counted_once():
    counted, runtime = let_go()
    for offset in (4, 5, 4, 5, 6):
        counted.count(record(offset=offset))
    await counted.report()
    assert runtime.events[0]["reasons"][0].message.startswith("3 requests")


async def test_a_thousand_keys_that_strangers_chose_are_told_apart_and_no_more():
    counted, runtime = let_go()
    for offset in range(3000):
        counted.count(record(f"key-{offset}", offset=offset))
    assert len(counted._tallies[0].keys) == 1000
    await counted.report()
    assert runtime.events[0]["reasons"][0].message.startswith("3000 requests")


def test_request_taken_in_before_is_known():
    claims = REQUEST.model_copy(update={"iss": BOT.id, "jti": "one"})
    signed = record(value=sign(claims, BOT).encode())
    counted, _ = let_go(message_id(BOT.id, "one"))
    assert counted.is_known(signed)
    assert counted.is_known(record(value=signed.value, offset=10))
    assert not counted.is_known(record(value=signed.value, offset=11))  # nothing was taken in so far
    assert not let_go()[0].is_known(signed)
    assert not any(counted.is_known(record(value=value)) for value in (b"", b"a.b.c", b"\xff" * 90))
