"""Approvals by keys that somebody else added, and by the kind of key that a target demands."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from ringfence.kernel.base.ids import digest
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.approval import Grant
from ringfence.messages.registry import VerbFloor
from tests.support.benches.decision_bench import DEPLOY, DecisionBench, passkey_of_sam
from tests.support.passkeys import SoftwarePasskey
from tests.support.user_keys import add_key, end_key, new_key


@pytest.fixture
def bench() -> DecisionBench:
    return DecisionBench()


@pytest.fixture
def passkey(bench: DecisionBench) -> SoftwarePasskey:
    return passkey_of_sam(bench)


def test_a_key_that_waits_opens_nothing_by_approval_or_grant(bench: DecisionBench) -> None:
    """Honest policy may have decided before it knew of the key; never after."""
    lent = new_key("sam")
    bench.ledger.give(add_key(bench.ledger, "olga", "sam", lent))
    added_ms = bench.ledger.directory.key_history("sam").origins[lent.kid].added_ms
    request = bench.request(scope=(DEPLOY,))
    for source_ms, finding in ((added_ms, False), (added_ms + 1, True)):
        decision = bench.decision(
            request, source_ms=source_ms, approvals=(bench.approval(request, key=lent),)
        )
        assert bench.refused(decision) == (["key_too_new"], finding)
    before = bench.revisions(target=0)
    decision = bench.decision(request, approvals=(bench.approval(request, key=lent),), revisions=before)
    assert bench.refused(decision) == (["key_too_new"], False), "records changed, so policy saw others"
    grant = sign(parse(bench.grant()).unverified_claims(Grant), lent)
    assert bench.refused(bench.decision(request, grants=(grant,))) == (["key_too_new"], True)
    assert bench.issued(bench.decision(request, approvals=(bench.approval(request),))).lease.scope == (
        DEPLOY,
    )


def test_a_key_whose_voucher_was_compromised_since_is_no_fault_of_policys(bench: DecisionBench) -> None:
    lent = new_key("sam")
    bench.ledger.give(add_key(bench.ledger, "otto", "sam", lent, cosigned="olga"))
    request = bench.request(scope=(DEPLOY,))
    how: dict[str, Any] = {"approvals": (bench.approval(request, key=lent),)}
    assert bench.issued(bench.decision(request, **how)).lease.scope == (DEPLOY,)
    kid = bench.ledger.key("otto").kid
    bench.ledger.give(end_key(bench.ledger, "otto", "otto", kid, compromised=True))
    assert bench.refused(bench.decision(request, **how)) == (["key_voucher_compromised"], False)


def test_a_floor_for_a_kind_of_key_holds_whatever_policy_says(
    bench: DecisionBench, passkey: SoftwarePasskey
) -> None:
    kinds: tuple[tuple[Literal["attested", "file"], SigningKey], ...] = (
        ("attested", passkey), ("attested", bench.ledger.key("sam")), ("file", passkey),
    )  # fmt: skip
    for kind, key in kinds:
        bench.set_target(verbs=(VerbFloor(verb="read"), VerbFloor(verb="deploy", floor="sponsor", key=kind)))
        request = bench.request(scope=(DEPLOY,))
        approval = bench.approval(request, key=key)
        times = {digest(approval): bench.now_ms} if key is passkey else None
        decision = bench.decision(request, approvals=(approval,), answers_at_ms=times)
        assert bench.refused(decision) == ([f"key_not_{kind}"], True)
