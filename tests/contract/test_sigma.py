"""The Sigma rules in `deploy/siem/sigma`: read by pySigma, and run over events that audit made, as SQL.

Each rule has a story that it fires on, and one next to it on which it must not.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from sigma.backends.sqlite.sqlite import sqliteBackend
from sigma.collection import SigmaCollection
from sigma.correlations import SigmaCorrelationRule
from sigma.rule import SigmaDetectionItem, SigmaRule
from sigma.validation import SigmaValidator
from sigma.validators.core import validators

from ringfence.messages.credential import Reason
from tests.support.audit_fixtures import steps
from tests.support.detector import Watch, other
from tests.unit.test_detections import glass, lived, refused

FOLDER = Path(__file__).parents[2] / "deploy" / "siem" / "sigma"
# These fetch what they check tags against from the network.
FETCHING = {"attacktag", "d3_fendtag"}
Events = list[dict[str, Any]]


@cache
def collection() -> SigmaCollection:
    return SigmaCollection.load_ruleset([FOLDER])


@cache
def queries() -> dict[str, str]:
    """The SQL of each rule that is to be told of, by its title: those that only others refer to are none."""
    backend = sqliteBackend(timestamp_field="time", timestamp_format="unix_ms")
    found = {}
    for rule in collection().rules:
        sql = (
            backend.convert_correlation_rule(rule)
            if isinstance(rule, SigmaCorrelationRule)
            else backend.convert_rule(rule)
        )
        if rule.level is not None and rule.level.name != "INFORMATIONAL":
            (found[rule.title],) = sql
    return found


def flat(value: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    """The fields of an event as SIEMs flatten them: what stands in a list is all values of one field."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from flat(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for inner in value:
            yield from flat(inner, path)
    else:
        yield path, value


def columns(event: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, value in flat(event):
        row[name] = f"{row[name]}\n{value}" if name in row else value
    return row


def matches(title: str, events: Sequence[dict[str, Any]]) -> int:
    """How many rows a rule finds among these events."""
    rows = [columns(event) for event in events]
    names = sorted({name.lower(): name for row in rows for name in row}.values())
    needed = {"metadata.event_code", "unmapped.reasons.side", "unmapped.agent", "unmapped.request", "is_alert",
              "status_code", "class_uid", "time"}  # fmt: skip
    names += sorted(needed - set(names))
    with sqlite3.connect(":memory:") as db:
        db.execute(f"CREATE TABLE logs ({', '.join(map(json.dumps, names))})")
        db.executemany(
            f"INSERT INTO logs VALUES ({', '.join('?' * len(names))})",
            [[row.get(name) for name in names] for row in rows],
        )
        return len(db.execute(queries()[title]).fetchall())


# --- stories: events on which a rule fires, and others next to them on which it must not ------------------------------


async def beyond_user(watch: Watch) -> tuple[Events, Events]:
    return [await refused(watch)], [await refused(watch, "task"), await refused(watch, "ceiling:deploy-bot")]


async def burst(watch: Watch) -> tuple[Events, Events]:
    one = await refused(watch, "task")

    def every(ms: int, count: int, from_ms: int = 0, **words: Any) -> Events:
        return [other(one, one["time"] + from_ms + n * ms, **words) for n in range(count)]

    of_two_agents = [*every(100, 12, 600_000), *every(100, 12, 600_000, agent="other-bot")]
    return every(100, 20), [*every(5000, 40), *of_two_agents]


async def quick_approval(watch: Watch) -> tuple[Events, Events]:
    _, events = await lived(watch)
    asked, given = events["approval.requested"], events["approval.given"]
    read = other(given, asked["time"] + 20_000)
    of_another = other(given, asked["time"] + 500, request="another")
    return [asked, other(given, asked["time"] + 500)], [asked, read, of_another]


async def shared(watch: Watch) -> tuple[Events, Events]:
    async def said(code: str) -> dict[str, Any]:
        why = (Reason(code=code, message="two at once"),)
        record = watch.office.service_event("finding", "x", "policy", reasons=why, agent_id="deploy-bot")
        return await watch.event(record)

    return [await said("key_shared"), await said("key_taken"), await said("token_replayed")], [
        await said("key_ending"), await said("revocation_overdue"),
    ]  # fmt: skip


async def overdue(watch: Watch) -> tuple[Events, Events]:
    apart, (_, told) = await shared(watch)
    return [told], apart


async def break_glass(watch: Watch) -> tuple[Events, Events]:
    _, used = await glass(watch)
    _, events = await lived(watch)
    return [used], list(events.values())


async def findings(watch: Watch) -> tuple[Events, Events]:
    _, used = await glass(watch)
    _, events = await lived(watch, approved=False)
    watch.follow(await refused(watch), used)
    found = [*await watch.told(), *await watch.told(25 * 3600)]
    assert steps(found) == ["detection.beyond_user", "detection.unreviewed"]
    quiet = {**found[0], "metadata": {**found[0]["metadata"], "event_code": "detection.first_use"}}
    del quiet["is_alert"]
    return found, [quiet, used, *events.values()]


STORIES: dict[str, Callable[[Watch], Awaitable[tuple[Events, Events]]]] = {
    "An Agent Asked For What Its User May Not Do": beyond_user,
    "A Burst Of Denials Of One Agent": burst,
    "An Approval Faster Than A Human Reads": quick_approval,
    "One Key In Two Places": shared,
    "A Revocation Is Overdue": overdue,
    "Break Glass Was Used": break_glass,
    "Ringfence Found Something On Its Own Trail": findings,
}


def test_every_rule_is_one_and_has_its_stories() -> None:
    assert set(queries()) == set(STORIES)
    assert not collection().errors


def test_pysigma_has_nothing_against_them() -> None:
    checks = [check for name, check in validators.items() if name not in FETCHING]
    every: Any = collection().rules  # correlations are checked as well, whatever the signature says
    found = SigmaValidator(checks).validate_rules(iter(every))
    assert not found, [str(issue) for issue in found]


@pytest.mark.parametrize("title", STORIES)
async def test_sigma_rule_fires_on_its_story_only(title: str) -> None:
    watch = Watch()
    fires, quiet = await STORIES[title](watch)
    assert matches(title, fires) >= 1
    assert matches(title, quiet) == 0


async def test_each_event_of_a_single_event_rule_is_found() -> None:
    fires, _ = await shared(Watch())
    assert matches("One Key In Two Places", fires) == 3


async def test_rules_name_only_fields_that_events_have() -> None:
    known = {"time"}
    for story in STORIES.values():
        known |= {name for event in (await story(Watch()))[0] for name in columns(event)}
    for rule in collection().rules:
        if isinstance(rule, SigmaRule):
            used = {
                item.field
                for one in rule.detection.detections.values()
                for item in one.detection_items
                if isinstance(item, SigmaDetectionItem)
            }
            assert used, rule.title
            assert used <= known, rule.title
        else:
            assert set(rule.group_by or ()) <= known, rule.title
