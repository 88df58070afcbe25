"""Whose revocation counts: of whoever was entitled when it was appended, or later, whatever comes after it."""

from __future__ import annotations

from typing import Any

import pytest

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.kafka.record import Received
from ringfence.messages.lease import Lease, RevocationRequest, Selector
from ringfence.messages.registry import UserDisable
from ringfence.messages.topics import REVOCATION_REQUEST
from ringfence.model.leases.revocations import objection, verify_revocation
from tests.support import leases
from tests.support.in_memory_registry import InMemoryRegistry, permission

BOT = "bot"


class Organisation(InMemoryRegistry):
    """olga and otto are operators; sam sponsors the bot, and suzy does not."""

    def __init__(self) -> None:
        super().__init__()
        self.organisation()
        self.give(self.target_set("olga", "staging"))
        self.give(self.register("sam", BOT, "sam", ceiling=(permission("env/**"),)))
        self.lease: Lease = leases.lease(agent_id=BOT, sponsor="sam", on_behalf_of="adam").claims

    def transferred(self, to: str) -> None:
        entry = self.directory.agent(BOT)
        assert entry is not None
        self.give(self.transfer(entry.state.sponsor, BOT, to))

    def revocation(self, by: str, **fields: Any) -> Received:
        given = {"kind": "revocation", "reason": "a test", "lease_id": self.lease.lease_id, **fields}
        claims = self.claims(RevocationRequest, by, **given)
        record = self.received(REVOCATION_REQUEST, BOT, sign(claims, self.key(by)))
        self.clock.ms += 1000
        return record

    def counts(self, record: Received) -> bool:
        """For a reader that reads it now."""
        revocation = verify_revocation(record, self.directory, self.trust)
        reason = objection(revocation, self.lease, self.directory)
        assert reason is None or reason.code == "not_entitled"
        return reason is None


@pytest.fixture
def organisation() -> Organisation:
    return Organisation()


ONE_LEASE: dict[str, Any] = {}
ALL_OF_THE_AGENT = {"lease_id": None, "selector": Selector(agent_id=BOT)}


@pytest.mark.parametrize("what", [ONE_LEASE, ALL_OF_THE_AGENT], ids=["a lease", "an agent"])
def test_a_sponsors_revocation_counts_after_a_transfer_too(
    organisation: Organisation, what: dict[str, Any]
) -> None:
    """A gateway that acknowledged it may start again after the transfer, and a slow revoker may read it then."""
    before = organisation.revocation("sam", **what)
    organisation.transferred("suzy")
    assert organisation.counts(before)
    organisation.transferred("sam")
    organisation.transferred("suzy")
    assert organisation.counts(before)


@pytest.mark.parametrize("what", [ONE_LEASE, ALL_OF_THE_AGENT], ids=["a lease", "an agent"])
def test_after_a_transfer_the_former_sponsor_revokes_nothing(
    organisation: Organisation, what: dict[str, Any]
) -> None:
    organisation.transferred("suzy")
    assert not organisation.counts(organisation.revocation("sam", **what))
    assert organisation.counts(organisation.revocation("suzy", **what))


def test_a_revocation_that_arrives_before_the_transfer_to_its_signer_counts(
    organisation: Organisation,
) -> None:
    """Topics have no common order: the transfer may have been accepted first, for all that the signer knows."""
    early = organisation.revocation("suzy")
    assert not organisation.counts(early)
    organisation.transferred("suzy")
    assert organisation.counts(early)
    organisation.transferred("sam")
    assert organisation.counts(early), "what counted once counts for every reader"


@pytest.mark.parametrize("change", ["disabled", "no operator any more"])
def test_an_operators_revocation_outlives_the_operators_role(organisation: Organisation, change: str) -> None:
    before = organisation.revocation("otto", lease_id=None, selector=Selector(all=True))
    if change == "disabled":
        organisation.give(organisation.claims(UserDisable, "olga", user_id="otto", reason="left"))
        with pytest.raises(InvalidMessageError):
            organisation.counts(organisation.revocation("otto", lease_id=None, selector=Selector(all=True)))
    else:
        organisation.give(organisation.user_set("olga", "otto", ["auditor"]))
        assert not organisation.counts(
            organisation.revocation("otto", lease_id=None, selector=Selector(all=True))
        )
    assert organisation.counts(before)


def test_who_never_answered_for_it_revokes_nothing(organisation: Organisation) -> None:
    assert not organisation.counts(organisation.revocation("uma"))
    assert not organisation.counts(organisation.revocation("suzy"))
