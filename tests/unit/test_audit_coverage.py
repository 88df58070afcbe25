"""What leads back to a human, what does not, and what stands: over real events of audit in its real index."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from ringfence.audit.index.coverage import count_actions, count_leases, load_basis, went_through
from ringfence.audit.index.store import Viewer
from ringfence.client.reports.access_report import Coverage, Ratio
from ringfence.kernel.base.api_errors import CursorLostError
from ringfence.kernel.kafka.record import Received
from ringfence.messages.lease import Lease
from ringfence.messages.topics import AUDIT, LEASE, TASK
from tests.support.audit_fixtures import Story
from tests.unit.test_audit_trace import MARIA, SAM, STRANGER, Desk

EVER = (0, 2**53)
HOUR_S = 3600


class Counter(Desk):
    """A desk that counts."""

    def is_user(self, user_id: str) -> bool:
        return self.office.directory.user(user_id) is not None

    def leases(
        self, viewer: Viewer | None = None, *, later_s: float = 0, short_s: int = HOUR_S
    ) -> dict[str, Any]:
        events = self.index.issued(viewer, EVER, None, 100).events
        found = load_basis(self.index, [event["unmapped"]["lease"] for event in events])
        now_s = self.office.now_ms / 1000 + later_s
        return count_leases(events, found, self.is_user, now_s=now_s, short_s=short_s)

    def actions(self, viewer: Viewer | None = None) -> dict[str, Any]:
        events = went_through(self.index.actions(viewer, EVER, None, 100).events)
        found = load_basis(self.index, [event["unmapped"].get("lease") or "" for event in events])
        return count_actions(events, found, self.is_user)

    def write(self, event: dict[str, Any]) -> None:
        """An event as somebody put it onto `audit`."""
        self._taken += 1
        value = orjson.dumps(event)
        self.index.add([Received(AUDIT, "ringfence.audit.v1", 0, 10**6 + self._taken, 1, "k", value)])


@pytest.fixture
async def desk() -> Counter:
    desk = Counter()
    await desk.file(*desk.staff)
    return desk


def why(counts: dict[str, Any], listed: str = "against") -> list[str]:
    return [one["code"] for one in counts[listed]]


async def without(desk: Counter, what: Received, story: Story) -> None:
    await desk.file(*(record for record in story.all if record is not what))


# --- leases -----------------------------------------------------------------------------------------------------------


async def test_a_credential_of_a_task_leads_back_to_its_human(desk: Counter):
    await desk.credential("released")
    await desk.credential("revoked", approved=False)
    counts = desk.leases()
    assert {name: counts[name] for name in ("total", "traced", "both", "standing")} == {
        "total": 2, "traced": 2, "both": 2, "standing": 0,
    }  # fmt: skip
    assert (counts["against"], counts["standing_leases"]) == ([], [])


async def test_a_lease_without_its_decision_counts_against(desk: Counter):
    story = desk.office.credential()
    await without(desk, story.allowed, story)
    counts = desk.leases()
    assert (counts["total"], counts["traced"], why(counts)) == (1, 0, ["decision_missing"])
    assert counts["against"][0]["lease"] == story.lease_id


async def test_a_decision_on_another_request_is_not_that_of_a_lease(desk: Counter):
    story = desk.office.credential()
    story.all[story.all.index(story.active)] = desk.office.signed(
        LEASE, other_decision(desk, story), desk.office.key("service", "issuer"), key=story.lease_id
    )
    await desk.file(*story.all)
    assert why(desk.leases()) == ["decision_differs"]


def other_decision(desk: Counter, story: Story) -> Lease:
    signed = desk.office.verifier.by_service(story.active, Lease, "issuer").claims
    return signed.model_copy(update={"decision_digest": "0" * 64})


async def test_a_decision_around_a_forged_request_does_not_lead_to_its_agent(desk: Counter):
    story = desk.office.credential()
    header, payload, _ = story.request_jws.split(".")
    forged = ".".join((header, payload, "A" * 86))
    story.common["request"] = forged
    allowed = story.decision("allowed")
    signed = desk.office.verifier.by_service(story.active, Lease, "issuer").claims
    (event,) = await desk.file(allowed)
    changes = {
        "decision_id": event["unmapped"]["decision"],
        "decision_digest": event["unmapped"]["decision_digest"],
    }
    lease = signed.model_copy(update=changes)
    await desk.file(
        desk.office.signed(LEASE, lease, desk.office.key("service", "issuer"), key=story.lease_id)
    )
    assert why(desk.leases()) == ["request_unverified"]


async def test_a_lease_whose_task_nobody_assigned_counts_against_and_stands():
    desk = Counter()
    staff = [record for record in desk.staff if record.topic is not TASK]
    await desk.file(*staff)
    await desk.credential()
    counts = desk.leases()
    assert (why(counts), why(counts, "standing_leases")) == (["task_missing"], ["standing"])
    assert (counts["short_lived"], counts["task_bound"], counts["standing"]) == (1, 0, 1)


async def test_a_lease_for_another_human_than_its_task_counts_against(desk: Counter):
    story = desk.office.credential()
    issuer = desk.office.key("service", "issuer")
    signed = desk.office.verifier.by_service(story.active, Lease, "issuer").claims
    lease = signed.model_copy(update={"on_behalf_of": "sam"})
    story.all[story.all.index(story.active)] = desk.office.signed(LEASE, lease, issuer, key=story.lease_id)
    await desk.file(*story.all)
    assert why(desk.leases()) == ["task_differs"]


async def test_a_human_of_whom_there_is_no_record_is_none(desk: Counter):
    await desk.credential()
    events = desk.index.issued(None, EVER, None, 100).events
    found = load_basis(desk.index, [event["unmapped"]["lease"] for event in events])
    counts = count_leases(events, found, lambda user: user != "maria", now_s=0, short_s=HOUR_S)
    assert why(counts) == ["human_unknown"]


async def test_lease_longer_than_the_short_limit_counts_as_standing(desk: Counter):
    await desk.credential()
    counts = desk.leases(short_s=60)
    assert (counts["traced"], counts["short_lived"], counts["task_bound"], counts["standing"]) == (1, 0, 1, 1)
    assert "it lives 3" in counts["standing_leases"][0]["why"]


async def test_lease_without_a_known_end_is_standing_past_its_deadline(desk: Counter):
    story = desk.office.credential()
    await without(desk, story.ended, story)
    assert desk.leases()["standing"] == 0
    counts = desk.leases(later_s=HOUR_S)
    assert (counts["standing"], counts["standing_leases"][0]["why"]) == (1, "its end is not known")
    await desk.file(story.ended)
    assert desk.leases(later_s=HOUR_S)["standing"] == 0


async def test_republished_lease_record_is_counted_once(desk: Counter):
    story = await desk.credential()
    (issued,) = desk.index.issued(None, EVER, None, 100).events
    again = {**issued, "time": issued["time"] + 5, "metadata": {**issued["metadata"], "uid": "again"}}
    desk.write(again)
    assert len(desk.index.issued(None, EVER, None, 100).events) == 2
    assert (desk.leases()["total"], desk.leases()["traced"]) == (1, 1)
    assert story.lease_id == issued["unmapped"]["lease"]


async def test_an_event_that_audit_did_not_write_counts_against_and_stops_nothing(desk: Counter):
    await desk.credential()
    (issued,) = desk.index.issued(None, EVER, None, 100).events
    for number, words in enumerate(({"lease": "x"}, {"lease": "y", "verified": [], "deadline": "soon"})):
        desk.write(
            {**issued, "metadata": {**issued["metadata"], "uid": f"made-up-{number}"}, "unmapped": words}
        )
    counts = desk.leases()
    assert (counts["total"], counts["traced"], why(counts)) == (3, 1, ["unreadable"] * 2)


# --- actions ----------------------------------------------------------------------------------------------------------


async def test_an_action_leads_back_where_its_lease_does(desk: Counter):
    story = await desk.credential()
    await desk.file(desk.office.action(lease_id=story.lease_id))
    await desk.file(desk.office.answer(lease_id=story.lease_id))
    await desk.file(desk.office.action(lease_id=story.lease_id, allowed=False))
    counts = desk.actions()
    assert (counts["total"], counts["traced"], counts["against"]) == (1, 1, [])


async def test_an_action_by_no_lease_of_its_agent_counts_against(desk: Counter):
    story = await desk.credential()
    await desk.file(
        desk.office.action(allowed=False, observed=True),
        desk.office.action(lease_id=str(story.request_id)),
        desk.office.action(lease_id=story.lease_id, agent_id="other-bot"),
    )
    counts = desk.actions()
    assert (counts["total"], counts["traced"]) == (3, 0)
    assert why(counts) == ["no_lease", "lease_unknown", "other_agent"]


async def test_an_action_after_the_deadline_of_its_lease_counts_against(desk: Counter):
    story = await desk.credential()
    desk.office.now_ms += HOUR_S * 1000
    await desk.file(desk.office.action(lease_id=story.lease_id))
    assert why(desk.actions()) == ["after_end"]


# --- who sees it, and in which span -----------------------------------------------------------------------------------


async def test_each_counts_what_concerns_them(desk: Counter):
    story = await desk.credential()
    await desk.file(desk.office.action(lease_id=story.lease_id))
    for viewer, count in ((None, 1), (SAM, 1), (MARIA, 1), (STRANGER, 0)):
        assert (desk.leases(viewer)["total"], desk.actions(viewer)["total"]) == (count, count)


async def test_a_span_is_counted_in_pages_and_nothing_twice(desk: Counter):
    stories = [await desk.credential() for _ in range(5)]
    found, after = [], None
    while True:
        page = desk.index.issued(None, (0, stories[3].active.appended_at_ms), after, 2)
        found += [event["unmapped"]["lease"] for event in page.events]
        after = page.cursor
        if after is None:
            break
    assert found == [story.lease_id for story in stories[:4]]
    since = (stories[4].active.appended_at_ms, 2**53)
    assert len(desk.index.issued(None, since, None, 10).events) == 1
    with pytest.raises(CursorLostError):
        desk.index.issued(None, EVER, "other.1.1", 10)


# --- shares -----------------------------------------------------------------------------------------------------------


def test_a_share_of_nothing_is_none_and_almost_all_is_not_all():
    assert Ratio(0, 0).percent() is None
    assert Ratio(9999, 10_000).percent() == 99.9
    assert Ratio(3, 3).percent() == 100


def test_pages_add_up_and_only_so_many_are_listed():
    report = Coverage(0, 1, HOUR_S)
    page: dict[str, Any] = {
        "total": 4, "traced": 2, "short_lived": 3, "task_bound": 4, "both": 3, "standing": 1,
        "against": [{"code": "a"}, {"code": "b"}], "standing_leases": [{"code": "standing"}],
        "agents": {"bot": True, "": False},
    }  # fmt: skip
    report.add("leases", page, 3)
    report.add("leases", page, 3)
    report.add("actions", {"total": 1, "traced": 1, "against": [], "agents": {"bot": True}}, 3)
    shares = report.shares
    assert (shares["leases_traced"], shares["actions_traced"]) == (Ratio(4, 8), Ratio(1, 1))
    assert shares["leases_short_lived_and_task_bound"] == Ratio(6, 8)
    assert shares["agents_known"] == Ratio(1, 2)
    assert (len(report.not_traced), len(report.standing), report.as_json()["standing_privileges"]) == (
        3,
        2,
        2,
    )
    assert report.as_json()["agents_sponsored"] is None
