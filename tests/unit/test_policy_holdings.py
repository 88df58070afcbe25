"""What agents hold and used, as decisions, leases and refusals have it, in whatever order they come."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any, cast

import pytest

from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.ids import lease_id, message_id
from ringfence.kernel.crypto.jws import Signed, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import Permission
from ringfence.messages.codes import ReceivedCode
from ringfence.messages.credential import Coordinates, CredentialDecision, CredentialRequest
from ringfence.messages.lease import Lease, LeaseEpoch, LeaseStatus
from ringfence.messages.operations import ServiceEvent
from ringfence.messages.topics import LEASE, SERVICE_EVENT
from ringfence.messages.trust import ServiceIdentity, TrustBundle
from ringfence.model.leases.epochs import marker_key
from ringfence.model.leases.lifecycle import is_short_lived
from ringfence.model.leases.unverified_records import verify_lease
from ringfence.policy.agents.holdings import _REFUSED_KEPT, SLACK_S, Holdings
from ringfence.policy.agents.usage import DAY_S, WINDOW_DAYS
from ringfence.policy.domain import Case, Evaluation, RequestAllowed, refuse
from tests.support.in_memory_registry import FixedClock
from tools.schemas.examples import EXAMPLES

TD = "test.example"
NOW = 1_790_000_000
TTL_S = 300
AGENT = "deploy-bot"
TASK = "c1a5e6f0-1b2c-5d3e-8f40-e6f01b2c5d3e"
SCOPE = (Permission(target="platform", verbs=("read",), resources=("env/staging/web",)),)
OTHER = (Permission(target="platform", verbs=("deploy",), resources=("env/staging/web",)),)
ROOT = SigningKey.generate(f"spiffe://{TD}/root")
KEYS = {
    role: SigningKey.generate(f"spiffe://{TD}/service/{role}") for role in ("issuer", "revoker", "policy")
}
BOT = SigningKey.generate(f"spiffe://{TD}/agent/{AGENT}")


class Table(Holdings):
    """With short words for what comes in."""

    def __init__(self) -> None:
        trust = TrustStore(TD, ROOT.kid)
        services = tuple(
            ServiceIdentity(id=key.id, roles=(role,), keys=(key.record(NOW + 10**8),))  # type: ignore[arg-type]
            for role, key in KEYS.items()
        )
        bundle = TrustBundle(
            iss=ROOT.id, aud=TD, iat=NOW, exp=NOW + 10**8, jti="1", version=1, services=services
        )
        trust.load(sign(bundle, ROOT, header_jwk=True), NOW)
        self.clock = FixedClock(NOW * 1000)
        self.offsets = itertools.count()
        super().__init__(trust, self.clock)

    def request(self, jti: str, scope: tuple[Permission, ...] = SCOPE) -> CredentialRequest:
        example = cast(CredentialRequest, EXAMPLES[CredentialRequest])
        return example.model_copy(
            update={"iss": BOT.id, "aud": TD, "iat": NOW, "jti": jti, "scope": scope, "task_id": TASK}
        )

    def allow(self, jti: str, scope: tuple[Permission, ...] = SCOPE) -> str:
        """Judge a request; returns its id."""
        request = self.request(jti, scope)
        case = self.case(request)
        document = {"request": {"task_id": TASK, "scope": [p.model_dump(mode="json") for p in scope]}}
        self.record_evaluation(case, Evaluation(RequestAllowed(TTL_S), input=document))
        return case.request_id

    def case(self, request: CredentialRequest) -> Case:
        id = message_id(request.iss, request.jti)
        source = Coordinates(topic="t", partition=0, offset=0, appended_at_ms=NOW * 1000)
        return Case(Signed(request, sign(request, BOT)), id, AGENT, source, None)

    def publish(self, jti: str, scope: tuple[Permission, ...] = SCOPE, at_s: int = NOW) -> str:
        """An `allowed` decision is read; returns the id of its request."""
        request = self.request(jti, scope)
        example = cast(CredentialDecision, EXAMPLES[CredentialDecision])
        id = message_id(request.iss, request.jti)
        fields = {"request_id": id, "request": sign(request, BOT), "outcome": "allowed", "ttl_s": TTL_S}
        self.decided(example.model_copy(update=fields), AGENT, at_s * 1000)
        return id

    def lease(
        self,
        request_id: str,
        status: LeaseStatus,
        seq: int = 1,
        *,
        by: str = "issuer",
        key: str | None = None,
        scope: tuple[Permission, ...] = SCOPE,
        **fields: Any,
    ) -> None:
        """A record of the request's lease is read."""
        id = lease_id(request_id)
        given = {
            "iss": KEYS[by].id, "aud": TD, "iat": NOW, "jti": f"{id}.{seq}", "lease_id": id, "seq": seq,
            "status": status, "agent_id": AGENT, "task_id": TASK, "scope": scope, "deadline": NOW + TTL_S,
            "requested_at_ms": NOW * 1000, "target_id": "platform",
        }  # fmt: skip
        claims = cast(Lease, EXAMPLES[Lease]).model_copy(update={**given, **fields})
        self.on_leases([self.received(LEASE, key or id, sign(claims, KEYS[by]).encode())])

    def refuse(self, request_id: str, by: str = "issuer", **fields: Any) -> None:
        """An event of the issuer is read, that it refused."""
        given = {
            "iss": KEYS[by].id, "aud": TD, "iat": NOW, "jti": "e", "kind": "refused",
            "subject": "credential.decision", "request_id": request_id, "at_ms": NOW * 1000,
        }  # fmt: skip
        claims = ServiceEvent(**{**given, **fields})
        self.on_events([self.received(SERVICE_EVENT, by, sign(claims, KEYS[by]).encode())])

    def received(self, topic: Any, key: str, value: bytes) -> Received:
        return Received(topic, topic.name("t"), 0, next(self.offsets), self.clock.now_ms(), key, value)

    def ids(self, now_s: int | None = None, **more: Any) -> list[str]:
        """What is held now: the leases' ids."""
        now_s = self.clock.now_ms() // 1000 if now_s is None else now_s
        return [lease["lease_id"] for lease in self.held(AGENT, now_s, **more)]

    def verbs(self) -> set[tuple[str, str]]:
        return {(one.target, one.verb) for one in self.used(AGENT, self.clock.now_ms() // 1000)}


@pytest.fixture
def table() -> Table:
    return Table()


# --- held ---


def test_unknown_agent_holds_nothing(table: Table):
    assert table.held("nobody", NOW) == []
    assert table.used("nobody", NOW) == []


def test_allowed_request_is_held_at_once_except_against_itself(table: Table):
    request = table.allow("one")
    (held,) = table.held(AGENT, NOW)
    assert (held["lease_id"], held["task_id"]) == (lease_id(request), TASK)
    assert held["scope"] == [SCOPE[0].model_dump(mode="json")]
    assert held["deadline"] > NOW
    assert table.ids(but_for=request) == []


def test_reevaluated_denial_releases_an_unpublished_request(table: Table):
    request = table.allow("one")
    table.record_evaluation(table.case(table.request("one")), Evaluation(refuse(ReceivedCode("x"), "y")))
    assert table.ids() == []
    table.allow("one")
    assert table.publish("one") == request
    table.record_evaluation(table.case(table.request("one")), Evaluation(refuse(ReceivedCode("x"), "y")))
    assert table.ids() == [lease_id(request)]


def test_until_the_deadline_of_its_decision(table: Table):
    request = table.allow("one")
    table.publish("one", at_s=NOW + 5)
    assert table.held(AGENT, NOW)[0]["deadline"] == NOW + 5 + TTL_S
    assert table.ids(NOW + 5 + TTL_S - 1) == [lease_id(request)]
    assert table.ids(NOW + 5 + TTL_S) == []


def test_the_decision_of_another_replica_is_held(table: Table):
    request = table.publish("one")
    assert table.ids() == [lease_id(request)]
    assert table.publish("old", at_s=NOW - TTL_S - SLACK_S) != request
    assert table.ids() == [lease_id(request)]


ENDS: tuple[LeaseStatus, ...] = ("released", "revoked", "expired", "aborted")


@pytest.mark.parametrize("status", ENDS)
def test_ended_lease_is_not_held(table: Table, status: LeaseStatus):
    request = table.publish("one")
    table.lease(request, "active")
    table.lease(request, "ending", 2, by="revoker")
    assert table.ids() == [lease_id(request)]  # until its target has taken it back, it may still work
    table.lease(request, status, 3, by="revoker")
    assert table.ids() == []


def test_the_highest_record_counts_in_whatever_order_they_come():
    steps = [
        ("active", 1, "issuer"),
        ("ending", 2, "revoker"),
        ("released", 3, "revoker"),
        ("decision", 0, ""),
    ]
    for order in itertools.permutations(steps):
        table = Table()
        request = message_id(BOT.id, "one")
        for status, seq, by in order:
            if status == "decision":
                table.publish("one")
            else:
                table.lease(request, cast(LeaseStatus, status), seq, by=by)
        assert table.ids() == [], order


def test_an_end_that_came_after_its_epoch_was_over_ends_nothing(table: Table):
    request = table.publish("1")
    marker = LeaseEpoch(iss=KEYS["revoker"].id, aud=TD, iat=NOW, jti="m", epoch="2.bbbbbbbb", partition=0)
    value = sign(marker, KEYS["revoker"]).encode()
    table.on_leases([table.received(LEASE, marker_key(marker.epoch), value)])
    table.lease(request, "active")
    table.lease(request, "expired", 2, by="revoker", epoch="1.aaaaaaaa")
    assert table.ids() == [lease_id(request)]
    table.lease(request, "expired", 2, by="revoker", epoch="2.bbbbbbbb")
    assert table.ids() == []


def test_a_lease_without_a_known_decision_is_held(table: Table):
    request = message_id(BOT.id, "one")
    table.lease(request, "active")
    assert table.ids() == [lease_id(request)]
    table.lease(message_id(BOT.id, "two"), "active", deadline=NOW - SLACK_S)
    assert table.ids() == [lease_id(request)]


def test_records_of_unauthorised_signers_are_ignored(table: Table):
    request = table.publish("one")
    held = table.ids()
    table.lease(request, "released", 3, by="policy")
    table.lease(request, "released", 3, key=lease_id(message_id(BOT.id, "other")))
    table.lease(message_id(BOT.id, "two"), "active", by="policy")
    table.refuse(request, by="revoker")
    table.refuse(request, kind="replayed")
    table.refuse(request, subject="revocation.request")
    table.refuse(message_id(BOT.id, "two"))
    id = lease_id(request)
    for junk in (b"", b"x", b"a.b.c", b"a.e30.c", b"a.W10.c", b"a." + b"A" * 50 + b".c"):
        table.on_leases([table.received(LEASE, id, junk)])
        table.on_events([table.received(SERVICE_EVENT, "issuer", junk)])
    assert table.ids() == held == [id]
    assert table.verbs() == set()


def test_request_refused_by_the_issuer_is_not_held(table: Table):
    request = table.publish("one")
    table.refuse(request)
    assert table.ids() == []


def test_a_refusal_that_is_read_before_its_decision_counts(table: Table):
    request = message_id(BOT.id, "one")
    table.refuse(request)
    for number in range(_REFUSED_KEPT // 1000):  # not all of them, for the sake of time
        table.refuse(message_id(BOT.id, f"other {number}"))
    table.publish("one")
    assert table.ids() == []


def test_request_issued_after_a_refusal_is_held(table: Table):
    """The issuer refused, crashed, was given the decision again, and issued."""
    request = table.publish("one")
    table.refuse(request)
    table.lease(request, "active")
    assert table.ids() == [lease_id(request)]
    table.refuse(request)  # the same event once more
    assert table.ids() == [lease_id(request)]


def test_of_leases_that_are_alike_one_stands_for_all(table: Table):
    requests = [table.publish(f"r{number}") for number in range(50)]
    table.publish("another", OTHER)
    assert len(table.ids()) == 2
    for request in requests[1:]:
        table.lease(request, "released", 3, by="revoker")
    assert lease_id(requests[0]) in table.ids()
    table.lease(requests[0], "released", 3, by="revoker")
    assert len(table.ids()) == 1


def test_growth_of_holdings_is_visible_to_later_readers(table: Table):
    seen = [table.kinds(AGENT)]

    def grown() -> bool:
        seen.append(table.kinds(AGENT))
        return seen[-1] != seen[-2]

    table.publish("one")
    assert grown()
    table.publish("like it")
    assert not grown()
    table.publish("another", OTHER)
    assert grown()
    table.clock.ms += (TTL_S - SLACK_S) * 1000
    table.publish("later", at_s=table.clock.now_ms() // 1000)
    assert grown()  # by a clock that is ahead the first two were over


def test_expired_holdings_are_dropped(table: Table):
    for number in range(20):
        request = table.publish(f"r{number}")
        if number % 2:
            table.lease(request, "active")
            table.lease(request, "released", 3, by="revoker")
    table.clock.ms += (TTL_S + SLACK_S) * 1000
    table.on_leases([])
    assert (table._leases, table._ends) == ({}, [])
    table.clock.ms += WINDOW_DAYS * DAY_S * 1000
    table.on_leases([])
    assert table._holders == {}


# --- used ---


def test_active_lease_counts_as_use(table: Table):
    request = table.publish("one")
    assert table.verbs() == set()
    table.lease(request, "minting")
    assert table.verbs() == set()
    table.lease(request, "active", 2)
    assert table.verbs() == {("platform", "read")}


def test_aborted_minting_is_no_use(table: Table):
    request = table.publish("one")
    table.lease(request, "minting")
    table.lease(request, "aborted", 2)
    assert table.verbs() == set()


def test_of_what_ended_long_ago_its_last_record_is_enough(table: Table):
    """As compaction leaves it."""
    ago_s = 20 * DAY_S
    table.lease(
        message_id(BOT.id, "one"), "expired", 2, by="revoker", requested_at_ms=(NOW - ago_s) * 1000,
        deadline=NOW - ago_s + 60,
    )  # fmt: skip
    (used,) = table.used(AGENT, NOW)
    assert (used.first_s, used.last_s, used.days) == ((NOW - ago_s) // DAY_S * DAY_S,) * 2 + (1,)
    assert table.ids() == []


def test_lease_older_than_the_window_is_not_verified(table: Table, monkeypatch: pytest.MonkeyPatch):
    opened = count_opened(monkeypatch)
    ago_s = WINDOW_DAYS * DAY_S
    table.lease(
        message_id(BOT.id, "one"), "expired", 2, requested_at_ms=(NOW - ago_s) * 1000, deadline=NOW - ago_s
    )
    assert table.verbs() == set()
    assert opened == []


def test_records_are_verified_where_they_change_something_only(table: Table, monkeypatch: pytest.MonkeyPatch):
    opened = count_opened(monkeypatch)
    for number in range(10):
        request = table.publish(f"r{number}")
        table.lease(request, "active")
        table.clock.ms += (TTL_S + SLACK_S) * 1000
        table.lease(request, "expired", 2, by="revoker")
    assert len(opened) == 1  # the first use of the day
    request = table.publish("last", at_s=table.clock.now_ms() // 1000)
    deadline = table.clock.now_ms() // 1000 + TTL_S
    table.lease(request, "active", deadline=deadline)
    table.lease(request, "ending", 2, by="revoker", deadline=deadline)
    table.lease(request, "released", 3, by="revoker", deadline=deadline)
    assert len(opened) == 2  # and an end that comes before its time


def test_an_end_in_time_is_not_verified(table: Table, monkeypatch: pytest.MonkeyPatch):
    known, early = table.publish("known"), table.allow("early")
    table.lease(known, "active")
    opened = count_opened(monkeypatch)
    table.clock.ms += TTL_S * 1000
    for request in (known, message_id(BOT.id, "unknown")):
        table.lease(request, "expired", 2, by="revoker")
    assert opened == []
    assert table.ids() == [lease_id(early)], "until its decision is read it may be of a later one"
    table.lease(early, "expired", 2, by="revoker")
    assert table.ids() == []


def count_opened(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    opened: list[bytes] = []

    def counting(jws: Any, trust: TrustStore, clock: Clock, **more: Any) -> Lease:
        opened.append(jws)
        return verify_lease(jws, trust, clock, **more)

    monkeypatch.setattr("ringfence.policy.agents.holdings.verify_lease", counting)
    return opened


def test_a_version_for_each_change_of_one_agent(table: Table):
    seen = [table.version(AGENT)]
    request = table.allow("one")
    seen.append(table.version(AGENT))
    table.lease(request, "active")
    seen.append(table.version(AGENT))
    table.lease(request, "released", 3, by="revoker")
    seen.append(table.version(AGENT))
    assert len(set(seen)) == 4
    assert table.version("other") == 0


def test_endings_add_up_what_lives(table: Table):
    longer = table.publish("1")
    for jti in ("2", "3"):
        table.allow(jti)
    table.allow("4", OTHER)
    table.lease(table.publish("5", OTHER), "active", deadline=NOW + 7200, scope=OTHER)
    assert _added_up(table) == _counted(table)
    table.publish("2")  # which was held for longer until it was decided
    table.refuse(table.publish("3"))
    table.lease(longer, "revoked", 2)
    assert _added_up(table) == _counted(table)
    assert {(short, until_s) for _, short, until_s in _counted(table)} == {
        (True, NOW + TTL_S), (True, NOW + TTL_S + SLACK_S), (False, NOW + 7200)
    }  # fmt: skip
    table.clock.ms += (TTL_S + 1) * 1000
    assert _added_up(table) == _counted(table)
    table.clock.ms += 10_000_000
    table.on_leases([])
    assert (_added_up(table), table.held(AGENT, 0)) == ({}, [])


def _added_up(table: Table) -> Counter[tuple[str, bool, int]]:
    sums: Counter[tuple[str, bool, int]] = Counter()
    for ending in table.endings(AGENT, table.clock.now_ms() // 1000):
        sums[ending[:3]] += ending.leases
    return sums


def _counted(table: Table) -> Counter[tuple[str, bool, int]]:
    """The same, lease by lease."""
    live = table.live(AGENT, table.clock.now_ms() // 1000)
    return Counter((one.task_id, is_short_lived(one.since_s, one.until_s), one.until_s) for one in live)
