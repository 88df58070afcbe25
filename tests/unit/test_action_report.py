"""What is counted of the actions that were audited, who may see it, and what the report adds up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import httpx
import orjson
import pytest

from ringfence.audit.api import AuditApi
from ringfence.audit.index.filters import (
    action_groups,
    blocked_over_time,
    path_prefix,
    unknown_destinations,
)
from ringfence.audit.index.store import SqliteIndex, Viewer
from ringfence.cli.commands.gateway import _print_action_report
from ringfence.client.errors import ApiError
from ringfence.client.reports.action_report import (
    MAX_DESTINATIONS,
    MAX_LABELS,
    OTHER_LABELS,
    ActionReport,
    action_report,
    is_injected,
)
from ringfence.client.reports.read_api import ReadApi
from ringfence.client.settings import ClientSettings
from ringfence.kernel.base.api_errors import CursorLostError
from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.http import application
from ringfence.messages.credential import Reason
from ringfence.messages.topics import AUDIT
from ringfence.model.records.api_access import Authenticator
from tests.support.audit_fixtures import TD, AuditFixtures

ALWAYS = (0, 2**53)
BEYOND = (Reason(code="beyond_scope", message="the task does not allow it"),)
CUT = (Reason(code="lease_cut", message="it was revoked"), *BEYOND)


async def indexed(*actions: dict[str, Any], office: AuditFixtures | None = None) -> SqliteIndex:
    """An index of actions, a second apart from the first at 1,000 ms on, and of what else audit tells of."""
    office = office or AuditFixtures()
    events = await office.audit(*office.staff())
    told = await office.audit(*(office.action(**fields) for fields in actions))
    for number, event in enumerate(told, 1):
        event["time"] = number * 1000
    index = SqliteIndex(None)
    index.add([
        Received(AUDIT, "ringfence.audit.v1", 0, offset, event["time"], "k", orjson.dumps(event))
        for offset, event in enumerate([*told, *events])
    ])  # fmt: skip
    return index


def report(groups: Iterable[dict[str, Any]]) -> dict[str, Any]:
    made = ActionReport(0, 1)
    made.add(groups)
    return made.as_json()


def whole(
    index: SqliteIndex, viewer: Viewer | None = None, limit: int = 100, **filters: str
) -> dict[str, Any]:
    """The report over all pages."""
    made, after = ActionReport(0, 1), None
    while True:
        page = index.actions(viewer, ALWAYS, after, limit, **filters)
        made.add(action_groups(page.events))
        after = page.cursor
        if after is None:
            return made.as_json()


async def test_blocked_allowed_and_observed_actions_are_counted_apart() -> None:
    index = await indexed(
        {"allowed": True, "access": "read"},
        {"allowed": True, "access": "write"},
        {"allowed": False, "access": "read", "reasons": BEYOND},
        {"allowed": False, "access": "write", "reasons": CUT, "label": "injected"},
        {"allowed": False, "access": "write", "reasons": CUT, "observed": True, "label": "injected/web"},
        {"allowed": True, "access": "read", "label": "injected"},
    )
    said = whole(index)
    assert said["allowed"] == {"total": 3, "read": 2, "write": 1, "injected": 1}
    assert said["blocked"] == {"total": 3, "read": 1, "write": 2, "injected": 2}
    assert said["observed"] == {"total": 1, "read": 0, "write": 1, "injected": 1}
    assert said["by_reason"] == {"lease_cut": 2, "beyond_scope": 1}, "the first reason counts, and once"
    assert [(row["reason"], row["access"], row["blocked"], row["observed"]) for row in said["blocked_rows"]] == [
        ("lease_cut", "write", 2, 1), ("beyond_scope", "read", 1, 0),
    ]  # fmt: skip
    labels = {one["label"]: one["blocked"]["total"] for one in said["by_label"]}
    assert labels == {"injected": 1, "injected/web": 1}


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
async def test_pages_add_up_whatever_their_size(limit: int) -> None:
    index = await indexed(*({"allowed": False, "reasons": BEYOND, "access": "read"} for _ in range(6)))
    assert whole(index, limit=limit)["blocked"]["read"] == 6


async def test_only_the_span_that_was_asked_for_counts() -> None:
    index = await indexed(*({"allowed": True} for _ in range(5)))
    assert len(index.actions(None, (2000, 4000), None, 100).events) == 3
    assert index.actions(None, (6000, 9000), None, 100).looked_at_ms is None


async def test_sponsors_see_their_agents_and_nobody_elses() -> None:
    index = await indexed(
        {"allowed": False, "reasons": BEYOND},
        {"allowed": False, "reasons": BEYOND, "agent_id": "other-bot"},
        {"allowed": False, "reasons": BEYOND, "agent_id": None, "task_id": None},
    )
    assert whole(index)["blocked"]["total"] == 3
    assert whole(index, Viewer("sam", ("deploy-bot",)), limit=1)["blocked"]["total"] == 1
    other = whole(index, Viewer("petra", ("other-bot",)), limit=1)
    assert [one["agent"] for one in other["by_agent"]] == ["other-bot"]
    assert whole(index, Viewer("mallory", ()))["blocked"]["total"] == 0


async def test_filters_count_one_agent_or_target() -> None:
    index = await indexed(
        {"allowed": True},
        {"allowed": True, "agent_id": "other-bot"},
        {"allowed": True, "target_id": "hub"},
    )
    assert whole(index, agent="deploy-bot", limit=1)["allowed"]["total"] == 2
    assert whole(index, agent="deploy-bot", target="hub", limit=1)["allowed"]["total"] == 1


async def test_a_cursor_of_another_index_is_refused() -> None:
    cursor = (await indexed({"allowed": True})).actions(None, ALWAYS, None, 1).cursor
    again = await indexed({"allowed": True})
    for lost in (cursor, "x", "1.2"):
        with pytest.raises(CursorLostError):
            again.actions(None, ALWAYS, lost, 1)


def test_labels_are_what_senders_say_and_do_not_grow_without_bound() -> None:
    group = {"agent": "a", "target": "t", "outcome": "denied", "access": "read", "reason": "x", "count": 1}
    said = report({**group, "label": f"injected/{number}"} for number in range(MAX_LABELS + 50))
    assert len(said["by_label"]) == MAX_LABELS + 1
    assert said["by_label"][-1]["label"] == OTHER_LABELS
    assert said["by_label"][-1]["blocked"]["total"] == 50
    assert said["blocked"]["injected"] == MAX_LABELS + 50


def test_action_with_an_unknown_outcome_counts_as_blocked() -> None:
    group = {"agent": None, "target": None, "access": None, "reason": None, "label": None, "count": 2}
    said = report([{**group, "outcome": None}])
    assert said["blocked"] == {"total": 2, "read": 0, "write": 0, "injected": 0}


@pytest.mark.parametrize(
    ("label", "so"),
    [
        ("injected", True),
        ("injected/mail", True),
        ("injectedly", False),
        ("x/injected", False),
        (None, False),
    ],
)
def test_injected_label_is_recognised_by_its_prefix(label: str | None, so: bool) -> None:
    assert is_injected(label) is so


# --- over HTTP ---


class Place:
    """Audit's HTTP over an index, as sam asks it."""

    def __init__(self, office: AuditFixtures, index: SqliteIndex) -> None:
        self.complete = True
        self.index = index
        clock = SystemClock()
        authenticator = Authenticator(office.directory, "audit", clock)
        routes = AuditApi(index, office.directory, clock, authenticator, lambda: self.complete).routes()
        self.api = ReadApi(office.key("user", "sam"), ClientSettings(trust_domain=TD))
        self.api._http = httpx.AsyncClient(transport=httpx.ASGITransport(application(routes, [])))

    async def report(self, **filters: str) -> tuple[dict[str, Any], list[float]]:
        shares: list[float] = []
        async with self.api:
            made = await action_report(self.api, 0, shares.append, **filters)
        return made.as_json(), shares


async def placed(count: int) -> Place:
    office = AuditFixtures()
    return Place(
        office, await indexed(*({"allowed": True, "access": "read"} for _ in range(count)), office=office)
    )


async def test_long_reads_go_page_by_page_and_say_how_far_they_are() -> None:
    said, shares = await (await placed(2500)).report(agent="deploy-bot")
    assert said["allowed"]["read"] == 2500
    assert len(shares) == 3
    assert shares == sorted(shares)
    assert (shares[0] > 0, shares[-1]) == (True, 1.0)


async def test_an_index_that_is_being_built_counts_nothing() -> None:
    place = await placed(1)
    place.complete = False
    with pytest.raises(ApiError, match="would be too little") as error:
        await place.report()
    assert error.value.status == 503


async def test_invalid_action_query_is_refused() -> None:
    place = await placed(1)
    async with place.api as api:
        for query in ({"since_ms": "x"}, {"until_ms": str(10**17)}, {"limit": "1001"}, {"after": "x"}):
            with pytest.raises(ApiError) as error:
                await api.get("audit", "actions", **query)
            assert error.value.status == 400


def test_answer_to_an_action_is_not_counted_as_an_action() -> None:
    words = {"agent": "bot", "target": "repos", "outcome": "allowed", "access": "write", "label": None}
    decided = {"unmapped": words}
    answered = {"unmapped": {"agent": "bot", "target": "repos", "answer": "tool_error"}}
    assert action_groups([decided, answered, decided]) == [{**words, "reason": None, "count": 2}]


def test_an_event_that_tells_of_several_counts_as_many() -> None:
    words = {"agent": None, "target": None, "outcome": "denied", "access": None, "label": None}
    one = {"unmapped": words, "status_code": "malformed_http"}
    assert action_groups([one, {**one, "count": 999}]) == [
        {**words, "reason": "malformed_http", "count": 1000}
    ]


# --- where it was going -----------------------------------------------------------------------------------------------


def went(
    host: str, path: str = "/v1/charges/7", code: str = "target_unknown", **words: Any
) -> dict[str, Any]:
    destination = {"scheme": "https", "host": host, "port": 443, "path": path}
    return {
        "status_code": code,
        "unmapped": {"outcome": "denied", "method": "POST", "destination": destination, **words},
    }  # fmt: skip


def test_unknown_destinations_are_counted_by_the_first_segments_of_their_paths() -> None:
    found = unknown_destinations([
        went("api.example"), went("api.example", "/v1/charges/8"), {**went("api.example"), "count": 5},
        went("hub.example", "/repos", "request_unmapped", target="hub"),
        went("api.example", code="beyond_scope", target="hub"), went("api.example", outcome="allowed"),
        went("other.example", code="no_credentials"), went("hub.example", code="no_credentials", target="hub"),
        {"status_code": "target_unknown", "unmapped": {"outcome": "denied"}},
    ])  # fmt: skip
    assert [(one["host"], one["path"], one["target"], one["count"]) for one in found] == [
        ("api.example", "/v1/charges/*", None, 7), ("hub.example", "/repos", "hub", 1),
        ("other.example", "/v1/charges/*", None, 1),
    ]  # fmt: skip
    assert (found[0]["scheme"], found[0]["port"], found[0]["method"]) == ("https", 443, "POST")


@pytest.mark.parametrize(
    "reason", ["no_credentials", "proof_missing", "handle_unknown", "invalid_dpop_proof"]
)
def test_unidentified_sender_of_an_unknown_destination_is_counted(reason: str) -> None:
    """As with a CONNECT, with which no proof comes."""
    (found,) = unknown_destinations([
        went("other.example", code=reason, method="CONNECT"), went("hub.example", code=reason, target="hub"),
    ])  # fmt: skip
    assert (found["host"], found["method"], found["count"]) == ("other.example", "CONNECT", 1)


def test_connect_is_shown_as_neither_read_nor_write(capsys: pytest.CaptureFixture[str]) -> None:
    events = [went("api.example", method="CONNECT", agent="bot", target=None)]
    made = ActionReport(0, 1)
    made.add(action_groups([{**events[0], "count": 7}]), unknown_destinations(events))
    _print_action_report(made, "7d")
    said = capsys.readouterr().out
    assert "7 (0 reads, 0 writes, 7 neither) blocked" in said
    heads, line, *_ = (one.split() for one in said.splitlines() if one.split()[:1] in (["agent"], ["bot"]))
    assert heads[-3:] == ["neither", "observed", "injected"]
    assert line == ["bot", "unknown", "0", "0", "0", "0", "7"]
    (where,) = (one.split() for one in said.splitlines() if "api.example" in one)
    assert where == ["https", "api.example", "443", "CONNECT", "/v1/charges/*", "1"]


@pytest.mark.parametrize(
    ("path", "prefix"),
    [("/", "/"), ("/a", "/a"), ("/a/b", "/a/b"), ("/a/b/", "/a/b/*"), ("/a/b/c/d", "/a/b/*"), ("", "")],
)
def test_a_prefix_has_two_segments(path: str, prefix: str) -> None:
    assert path_prefix(path) == prefix


def test_a_million_destinations_fill_no_memory_and_hide_no_frequent_one() -> None:
    made = ActionReport(0, 1)
    for page in range(25):
        events = [went(f"host-{page}-{number}.example") for number in range(999)]
        made.add((), unknown_destinations([*events, went("often.example")]))
    assert len(made.destinations) <= MAX_DESTINATIONS
    said = made.as_json()
    assert said["unknown_destinations"][0] == {
        "scheme": "https", "host": "often.example", "port": 443, "method": "POST", "path": "/v1/charges/*",
        "target": None, "count": 25,
    }  # fmt: skip
    assert len(said["unknown_destinations"]) == 100
    counts = sum(one["count"] for one in said["unknown_destinations"])
    assert counts + said["unknown_destinations_left_out"] == 25_000


def test_blocked_actions_are_counted_by_steps_of_time() -> None:
    def event(at_ms: int, access: str, outcome: str = "denied", **more: Any) -> dict[str, Any]:
        return {"time": at_ms, "unmapped": {"outcome": outcome, "access": access}, **more}

    events = [
        event(1000, "read"), event(1999, "read", count=3), event(2000, "write"), event(2500, "read", "allowed"),
        event(2600, "read", "observed"), {"time": 2700, "unmapped": {"answer": "result", "outcome": "denied"}},
    ]  # fmt: skip
    counted = {
        (one["at_ms"], one["access"]): one["count"]
        for one in blocked_over_time(events, since_ms=0, step_ms=1000)
    }
    assert counted == {(1000, "read"): 4, (2000, "write"): 1, (2000, "read"): 1}
