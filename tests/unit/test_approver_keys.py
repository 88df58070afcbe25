"""Which keys count for an approval: by when they were added, on whose word, of which kind, and beside whom."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from ringfence.kernel.base.ids import digest
from ringfence.kernel.crypto.jws import Signed, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.approval import Approval, Grant
from ringfence.messages.credential import CredentialRequest, RequiredClass
from ringfence.messages.registry import FloorKey, TaskState, VerbFloor
from ringfence.model.lifecycle import WAIT_S, Giver, KeyOrigin
from ringfence.model.requests.approvals import check_approver_keys, unmet
from ringfence.model.requests.approver_keys import KeyRefused, check_key_floor, check_not_voucher
from ringfence.model.requests.facts import RequestContext, load_context
from ringfence.model.verdict import ALLOWED
from tests.support import user_keys
from tests.support.in_memory_registry import TD, InMemoryRegistry, permission
from tests.support.user_keys import add_key, end_key, new_key, new_passkey
from tests.support.verdicts import code_of
from tools.schemas.examples import EXAMPLES

WAIT_MS = WAIT_S * 1000
SCOPE = (permission("env/a"),)


class Office:
    """sam sponsors bot, which acts for uma; olga, otto and oscar are operators, suzy is a sponsor."""

    def __init__(self) -> None:
        self.ledger = ledger = InMemoryRegistry()
        ledger.organisation()
        ledger.give(ledger.user_set("olga", "oscar", ["operator"]))
        ledger.give(ledger.user_set("olga", "uma", entitlements=ledger.entitlements(permission("env/**"))))
        self.target()
        ledger.give(ledger.register("sam", "bot", "sam", ceiling=(permission("env/**"),)))
        terms = ledger.terms("bot", not_after=ledger.clock.ms // 1000 + 7 * 86_400)
        change = ledger.give(ledger.assign("uma", "bot", terms=terms))
        assert change is not None
        assert isinstance(change.state, TaskState)
        self.task = change.state.task_id

    def target(self, key: FloorKey | None = None) -> None:
        verbs = (VerbFloor(verb=SCOPE[0].verbs[0], floor="sponsor", key=key),)
        self.ledger.give(self.ledger.target_set("olga", SCOPE[0].target, verbs=verbs))

    def facts(self) -> RequestContext:
        claims = EXAMPLES[CredentialRequest].model_copy(
            update={"iss": f"spiffe://{TD}/agent/bot", "aud": TD, "task_id": self.task, "scope": SCOPE}
        )
        assert isinstance(claims, CredentialRequest)
        return load_context(
            self.ledger.directory, Signed(claims, sign(claims, self.ledger.key("bot", "agent")))
        )

    def approval(self, by: str, key: SigningKey | None = None) -> Signed[Any]:
        facts = self.facts()
        claims = self.ledger.claims(
            Approval, by, verdict="approved", request=facts.request.compact, request_id=facts.request_id,
            request_digest=digest(facts.request.compact), ttl_s=60, delivery="agent",
            revisions=facts.revisions("0" * 64),
        )  # fmt: skip
        return Signed(claims, sign(claims, key or self.ledger.key(by)))

    def grant(self, by: str, key: SigningKey | None = None) -> Signed[Any]:
        claims = self.ledger.claims(
            Grant, by, agent_id="bot", task_id=self.task, scope=SCOPE, count=1, ttl_s=60, delivery="agent",
            revisions=self.facts().revisions("0" * 64),
        )  # fmt: skip
        return Signed(claims, sign(claims, key or self.ledger.key(by)))

    def codes(self, *approvals: Signed[Any]) -> list[str | None]:
        found = check_approver_keys(
            approvals, self.ledger.directory, self.facts(), at_ms=self.ledger.clock.ms
        )
        return [code_of(one) for one in found]

    def problem(self, approval: Signed[Any]) -> KeyRefused:
        """Why the key of one approval does not count."""
        directory, at_ms = self.ledger.directory, self.ledger.clock.ms
        (found,) = check_approver_keys([approval], directory, self.facts(), at_ms=at_ms)
        assert isinstance(found, KeyRefused)
        return found

    def left(self, required: tuple[RequiredClass, ...], *approvals: Signed[Any]) -> tuple[RequiredClass, ...]:
        return unmet(required, approvals, self.ledger.directory, self.facts(), at_ms=self.ledger.clock.ms)


@pytest.fixture(name="office")
def office_of_all() -> Office:
    return Office()


def lent(office: Office, by: str, user: str, *, cosigned: str | None = None) -> SigningKey:
    key = new_key(user)
    office.ledger.give(add_key(office.ledger, by, user, key, cosigned=cosigned))
    return key


def test_a_lent_key_counts_a_day_later_and_not_a_moment_before(office: Office):
    key = lent(office, "olga", "sam")
    added_ms = office.ledger.directory.key_history("sam").origins[key.kid].added_ms
    for at_ms, code in ((added_ms + WAIT_MS - 1, "key_too_new"), (added_ms + WAIT_MS, None)):
        office.ledger.clock.ms = at_ms
        assert office.codes(office.approval("sam", key)) == [code]
        assert office.codes(office.grant("sam", key)) == [code]
        assert office.left(("sponsor",), office.approval("sam", key)) == (
            () if code is None else ("sponsor",)
        )
    assert office.codes(office.approval("sam")) == [None]


def test_the_remedy_is_named(office: Office):
    key = lent(office, "olga", "sam")
    since_ms = office.ledger.directory.key_history("sam").origins[key.kid].counts_from_ms
    said = office.problem(office.approval("sam", key)).reason.message
    assert f"key {key.kid} of sam was added by olga" in said
    assert "user endorse-key" in said
    assert f"{datetime.fromtimestamp(since_ms / 1000, UTC):%Y-%m-%d %H:%M:%SZ}" in said


def test_since_when_a_key_does_not_count_is_when_it_was_added(office: Office):
    """For the issuer, which asks whether policy could have known. What has no such moment is from the beginning on."""
    key = lent(office, "olga", "sam")
    added_ms = office.ledger.directory.key_history("sam").origins[key.kid].added_ms
    assert office.problem(office.approval("sam", key)).since_ms == added_ms
    assert office.problem(office.approval("sam", new_key("sam"))).since_ms == 0
    office.target("attested")
    assert office.problem(office.approval("sam")).since_ms == 0
    office.target()
    ended = office.approval("sam")
    office.ledger.give(end_key(office.ledger, "olga", "sam", office.ledger.key("sam").kid))
    assert office.problem(ended).since_ms == 0


def test_the_end_of_a_key_is_the_second_that_its_record_names(office: Office):
    approval = office.approval("sam")
    office.ledger.clock.ms = office.ledger.clock.ms // 1000 * 1000 + 400
    office.ledger.give(add_key(office.ledger, "sam", "sam", new_key("sam")))
    at_s = office.ledger.clock.ms // 1000
    office.ledger.give(end_key(office.ledger, "sam", "sam", office.ledger.key("sam").kid))
    for at_ms, code in (
        (at_s * 1000 - 1, None),
        (at_s * 1000, "key_ended"),
        (at_s * 1000 + 999, "key_ended"),
    ):
        office.ledger.clock.ms = at_ms
        assert office.codes(approval) == [code]


def test_user_with_an_unverifiable_record_approves_and_vouches_for_nothing(office: Office):
    key = lent(office, "olga", "sam")
    by_lent = office.approval("sam", key)
    by_suzy = office.approval("suzy")
    office.ledger.clock.ms += WAIT_MS
    assert office.codes(by_lent) == [None]
    for user in ("suzy", "olga"):
        entry = office.ledger.directory.user(user)
        assert entry is not None
        forged = entry.state.model_copy(update={"roles": ("sponsor", "operator", "auditor")})
        office.ledger.admit(office.ledger.sign_record(forged, entry.record.commands, entry.revision + 1))
        if user == "suzy":
            found = office.problem(by_suzy)
            assert (found.reason.code, found.since_ms) == ("record_untrusted", 0)
    # What olga's record says is a lie, so nobody knows whether her key was ended as compromised.
    directory = office.ledger.directory
    for giver, expected in (
        (Giver("olga", office.ledger.key("olga").kid, 0), True),
        (Giver("nobody", "any", 0), True),
        (Giver("otto", office.ledger.key("otto").kid, 0), False),
    ):
        resting = KeyOrigin(
            "kid", 0, giver.user_id, giver.kid, first=True, counts_from_ms=0, givers=frozenset({giver})
        )
        assert (directory.compromised_giver(resting) is not None) is expected


def test_voucher_of_a_key_does_not_approve_beside_it(office: Office):
    """As policy asks it when the voucher comes second."""
    key = lent(office, "olga", "sam", cosigned="otto")
    directory = office.ledger.directory
    by_lent, by_own = office.approval("sam", key), office.approval("suzy")
    for voucher in ("olga", "otto"):
        assert code_of(check_not_voucher(voucher, [by_own, by_lent], directory)) == "key_beside_voucher"
    assert check_not_voucher("oscar", [by_own, by_lent], directory) == ALLOWED
    assert check_not_voucher("sam", [by_lent], directory) == ALLOWED
    assert check_not_voucher("olga", [by_own], directory) == ALLOWED
    assert check_not_voucher("olga", [office.approval("sam", new_key("sam"))], directory) == ALLOWED


def test_a_key_file_is_no_attested_passkey_whatever_its_record_says(office: Office):
    office.target("attested")
    target = office.facts().target.state
    passkey = user_keys.record_of(new_passkey("sam")).model_copy(update={"attested": True})
    assert check_key_floor(passkey, target, office.facts().verbs) == ALLOWED
    for wrong in ({"use": None}, {"attested": None}, {"attested": False}):
        verdict = check_key_floor(passkey.model_copy(update=wrong), target, office.facts().verbs)
        assert code_of(verdict) == "key_not_attested"


def test_approval_signed_by_an_agent_is_rejected(office: Office):
    approval = office.approval("sam")
    claims = approval.claims.model_copy(update={"iss": f"spiffe://{TD}/agent/bot"})
    by_agent = Signed(claims, sign(claims, office.ledger.key("bot", "agent")))
    assert office.codes(by_agent) == ["key_unknown"]
    assert office.left(("sponsor",), by_agent) == ("sponsor",)


def test_lent_key_never_counts_beside_its_voucher_in_any_order(office: Office):
    key = lent(office, "olga", "sam", cosigned="otto")
    by_lent = office.approval("sam", key)
    required: tuple[RequiredClass, ...] = ("sponsor", "operator")
    for voucher in ("olga", "otto"):
        beside = office.approval(voucher)
        assert office.codes(by_lent, beside) == ["key_beside_voucher", None]
        assert office.codes(beside, by_lent) == [None, "key_beside_voucher"]
        assert office.codes(by_lent, office.grant(voucher)) == ["key_beside_voucher", None]
        assert office.left(required, by_lent, beside) == ("sponsor",)
    assert office.left(required, by_lent, office.approval("oscar")) == ()
    # A third operator does not help while a voucher is among them.
    assert office.left(required, by_lent, office.approval("oscar"), office.approval("olga")) == ("sponsor",)


def test_voucher_as_sponsor_or_user_blocks_approval_by_the_lent_key(office: Office):
    ledger = office.ledger
    ledger.give(ledger.user_set("olga", "sam", ["sponsor", "operator"]))
    key = lent(office, "sam", "suzy", cosigned="otto")
    assert office.codes(office.approval("suzy", key)) == ["key_beside_voucher"]
    assert office.codes(office.approval("suzy")) == [None]
    ledger.give(
        ledger.user_set("olga", "uma", ["operator"], entitlements=ledger.entitlements(permission("env/**")))
    )
    by_user = lent(office, "uma", "oscar", cosigned="otto")
    assert office.codes(office.approval("oscar", by_user)) == ["key_beside_voucher"]


def test_two_operators_of_break_glass_are_two(office: Office):
    """olga lends otto a key, and breaks glass as both."""
    two: tuple[RequiredClass, ...] = ("break_glass", "break_glass")
    key = lent(office, "olga", "otto", cosigned="oscar")
    assert office.left(two, office.approval("olga"), office.approval("otto", key)) == ("break_glass",)
    office.ledger.clock.ms += WAIT_MS
    assert office.left(two, office.approval("olga"), office.approval("otto", key)) == ("break_glass",)
    assert office.left(two, office.approval("olga"), office.approval("otto")) == ()


def test_keys_of_a_compromised_voucher_count_no_more_and_neither_do_theirs(office: Office):
    key = lent(office, "olga", "sam")
    child = new_key("sam")
    office.ledger.give(add_key(office.ledger, "sam", "sam", child), key)
    office.ledger.clock.ms += WAIT_MS
    assert office.codes(office.approval("sam", key), office.approval("sam", child)) == [None, None]
    kid, given_ms = (
        office.ledger.key("olga").kid,
        office.ledger.directory.key_history("sam").origins[key.kid].added_ms,
    )
    codes = ["key_voucher_compromised", "key_voucher_compromised"]
    for since_ms, expected in ((given_ms + 1, [None, None]), (given_ms, codes)):
        end = end_key(office.ledger, "otto", "olga", kid, compromised=True, since_ms=since_ms)
        office.ledger.give(end)
        assert office.codes(office.approval("sam", key), office.approval("sam", child)) == expected
    assert office.codes(office.approval("sam")) == [None]  # a first key stays


def test_an_approval_by_a_key_that_has_ended_counts_no_more(office: Office):
    approval = office.approval("sam")
    assert office.codes(approval) == [None]
    office.ledger.give(add_key(office.ledger, "sam", "sam", new_key("sam")))
    office.ledger.give(end_key(office.ledger, "sam", "sam", office.ledger.key("sam").kid))
    office.ledger.clock.ms += 1000
    assert office.codes(approval) == ["key_ended"]


@pytest.mark.parametrize("required", [("sponsor",), ("break_glass", "break_glass")])
def test_a_floor_takes_one_kind_of_key(office: Office, required: tuple[RequiredClass, ...]):
    ledger = office.ledger
    who = "sam" if required == ("sponsor",) else "olga"
    passkey, attested = new_passkey(who), new_passkey(who)
    ledger.give(add_key(ledger, "oscar", who, passkey))
    record = user_keys.record_of(attested).model_copy(update={"attested": True})
    ledger.give(add_key(ledger, "oscar", who, attested, key=record))
    ledger.clock.ms += WAIT_MS
    fits: dict[FloorKey | None, list[str | None]] = {
        None: [None, None, None],
        "attested": ["key_not_attested", "key_not_attested", None],
        "file": [None, "key_not_file", "key_not_file"],
    }
    for floor, codes in fits.items():
        office.target(floor)
        given = [office.approval(who, key) for key in (None, passkey, attested)]
        assert [office.codes(one)[0] for one in given] == codes
        for approval, code in zip(given, codes, strict=True):
            assert (len(office.left(required, approval)) < len(required)) is (code is None)
    # Another verb's floor demands nothing of this one.
    verbs = (VerbFloor(verb=SCOPE[0].verbs[0]), VerbFloor(verb="wipe", key="attested"))
    ledger.give(ledger.target_set("olga", SCOPE[0].target, verbs=verbs))
    assert office.codes(office.approval(who)) == [None]


def test_approval_by_an_unrecorded_key_is_rejected(office: Office):
    assert office.codes(office.approval("sam", new_key("sam"))) == ["key_unknown"]
    assert office.codes(office.approval("mallory")) == ["key_unknown"]
