"""Every kind of event that audit writes is valid OCSF, and has no attribute that OCSF does not know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ocsf_json_schema import get_ocsf_schema

from ringfence.audit.events import kinds, ocsf, registry
from ringfence.kernel.kafka.record import Received
from ringfence.messages.audit import OCSF_VERSION, AuditEvent
from ringfence.messages.registry import COMMANDS
from ringfence.messages.topics import ALL
from ringfence.model.audit_log.chain import Source
from tests.support.audit_fixtures import AuditFixtures, steps
from tests.support.audit_records import every_record
from tests.support.ocsf import LATER_VERSION, problems
from tests.support.trail import TOKEN

AUDITED = {
    "trust", "registry.command", "user", "agent", "target", "task", "credential.request", "credential.decision",
    "approval.request", "approval.response", "credential.reply", "lease", "revocation.request", "revocation.ack",
    "service.event", "dead-letter", "action", "run.order", "run",
}  # fmt: skip


@pytest.fixture(scope="module")
async def told() -> dict[str, tuple[Received, dict[str, Any]]]:
    """One record of everything, and the event that it became."""
    office = AuditFixtures()
    records = every_record(office)
    return {name: (record, await office.event(record)) for name, record in records.items()}


@pytest.mark.parametrize("version", [OCSF_VERSION, LATER_VERSION])
async def test_every_event_is_valid_and_has_no_unknown_attribute(told, version) -> None:
    wrong = {name: found for name, (_, event) in told.items() if (found := problems(event, version))}
    assert not wrong, json.dumps(wrong, indent=1)


async def test_the_schema_is_strict(told) -> None:
    """The test above can fail: unknown, missing and mistyped attributes are each a problem."""
    _, event = told["released 0 credential.request"]
    assert problems({**event, "lease": "x"})
    assert problems({name: value for name, value in event.items() if name != "user"})
    assert problems({**event, "severity_id": 7})
    assert problems({**event, "actor": {"user": {"name": "x", "nickname": "y"}}})
    assert problems({**event, "metadata": {**event["metadata"], "profiles": []}}), (
        "action_id needs its profile"
    )


async def test_every_event_is_what_the_contract_says(told) -> None:
    for name, (record, event) in told.items():
        AuditEvent.model_validate_json(json.dumps(event))
        assert event["time"] == record.appended_at_ms, name
        assert event["metadata"]["uid"] == Source(record.topic_name, record.partition, record.offset).uid
        assert event["metadata"]["version"] == OCSF_VERSION
        assert event["type_uid"] == event["class_uid"] * 100 + event["activity_id"]
        assert event["unmapped"]["source"] == {
            "topic": record.topic_name, "partition": record.partition, "offset": record.offset,
        }  # fmt: skip
        assert "verified" in event["unmapped"], name
        assert event["message"].strip(), name


async def test_a_record_of_the_registry_names_the_command_inside_it_as_verified(told) -> None:
    kinds_of_records = (registry.DONE, registry.CREATED, registry.COMPROMISED)
    typs = {kind.code: typ for table in kinds_of_records for typ, kind in table.items()}
    records = [event for _, event in told.values() if event["metadata"]["event_code"] in typs]
    assert records
    for event in records:
        assert event["unmapped"]["verified"]["embedded"] == [typs[event["metadata"]["event_code"]]]


async def test_requests_that_were_counted_together_say_so(told) -> None:
    _, event = told["action that were never decided"]
    assert (event["count"], event["status"]) == (999, "Failure")
    assert event["message"].startswith("deploy-bot was kept from 999 requests")
    assert "count" not in told["action denied"][1]


async def test_destination_of_a_denied_request_is_in_ocsf_fields(told) -> None:
    _, event = told["action to a host that is no target"]
    assert event["http_request"]["url"] == {
        "scheme": "https", "hostname": "api.example", "port": 8443, "path": "/v1/charges",
    }  # fmt: skip
    assert event["dst_endpoint"] == {"hostname": "api.example", "port": 8443}
    assert event["unmapped"]["destination"] == {
        "scheme": "https", "host": "api.example", "port": 8443, "path": "/v1/charges",
    }  # fmt: skip
    assert " at api.example:8443: " in event["message"]
    _, event = told["action to an address that is no target"]
    assert event["http_request"] == {"http_method": "CONNECT"}, "it has no path"
    assert event["dst_endpoint"] == {"ip": "2001:db8::1", "port": 443}
    assert "access" not in event["unmapped"]
    _, event = told["action to a page at an address"]
    assert event["http_request"]["url"] == {
        "scheme": "http",
        "hostname": "192.0.2.7",
        "port": 80,
        "path": "/a",
    }
    assert event["dst_endpoint"] == {"ip": "192.0.2.7", "port": 80}
    _, event = told["action to what is no host"]
    assert event["http_request"] == {"url": {"port": 80, "path": "/?/[redacted]"}}
    assert "dst_endpoint" not in event
    assert event["unmapped"]["destination"] == {
        "host": "h??31mub_.example", "port": 80, "path": "/?/[redacted]",
    }  # fmt: skip
    assert event["unmapped"]["method"] == "G?T"
    assert "dst_endpoint" not in told["action denied"][1]


async def test_unreadable_action_keeps_its_whole_method(told) -> None:
    _, event = told["action that could not be read"]
    assert (event["activity_name"], event["http_request"]["http_method"]) == ("Call", "POST")


async def test_a_question_is_told_with_the_digest_of_its_headers(told) -> None:
    assert told["action asked about"][1]["unmapped"]["headers_digest"] == "cd" * 32


async def test_names_and_numbers_agree_with_the_schema(told) -> None:
    """Captions (activity_name, severity, ...) are those of the schema, wherever it has one for the number."""
    schema = get_ocsf_schema(version=OCSF_VERSION)
    classes = {cls["uid"]: cls for cls in schema["classes"].values()}
    for name, (_, event) in told.items():
        cls = classes[event["class_uid"]]
        assert (event["class_name"], event["category_name"]) == (cls["caption"], cls["category_name"])
        assert event["category_uid"] == cls["category_uid"]
        for number, caption in (
            ("activity_id", "activity_name"), ("severity_id", "severity"), ("status_id", "status"),
            ("action_id", "action"),
        ):  # fmt: skip
            if number in event and event[number] != 99:
                known = cls["attributes"][number]["enum"][str(event[number])]["caption"]
                assert event[caption] == known, (name, number)


async def test_every_topic_and_every_kind_of_event_is_covered(told) -> None:
    assert {record.topic.what for record, _ in told.values()} == AUDITED
    later = {"audit.intake"}
    assert {topic.what for topic in ALL if "audit" in topic.read_by} - later <= AUDITED
    declared = {
        one.code
        for module in (kinds, registry)
        for value in vars(module).values()
        for one in (value.values() if isinstance(value, dict) else [value])
        if isinstance(one, ocsf.EventKind)
    }
    made = set(steps([event for _, event in told.values()]))
    assert made == declared
    assert {command.typ for command in COMMANDS} <= made


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [s for item in value.values() for s in strings(item)]
    if isinstance(value, list):
        return [s for item in value for s in strings(item)]
    return [value] if isinstance(value, str) else []


async def test_no_signature_token_or_sealed_text_is_in_any_event(told) -> None:
    for name, (record, event) in told.items():
        text = json.dumps(event)
        assert not TOKEN.search(text), name
        parts = record.value.decode("ascii", "replace").split(".")
        for part in parts:
            assert len(part) < 20 or part not in text, name
        assert not [s for s in strings(event) if s.count(".") >= 2 and len(s) > 120 and " " not in s], name


async def test_the_page_lists_every_step_as_it_is(told) -> None:
    """docs/audit.md is what a SIEM's rules are written from."""
    page = (Path(__file__).parents[2] / "docs" / "audit.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if "` | 300" in line or "` | 2004" in line or "` | 6003" in line
    ]
    listed: dict[str, list[list[str]]] = {}
    for _, code, *rest in rows:
        listed.setdefault(code.strip("`"), []).append(rest)
    for name, (_, event) in told.items():
        code = event["metadata"]["event_code"]
        said = [
            row
            for row in listed.get(code, [])
            if row[0] == str(event["class_uid"])
            and (event["activity_name"] in row[1] or "that of the command" in row[1])
            and event["status"] == row[2]
            and event["severity"] + ("*" if event.get("is_alert") else "") in row[3]
        ]
        assert said, f"{name}: {code} is not listed as it is"
    assert set(listed) == set(steps([event for _, event in told.values()]))
    words = {word for _, event in told.values() for word in event["unmapped"]}
    described = page.partition("## Ringfence's own fields")[2].partition("## The steps")[0]
    assert not {word for word in words if f"`{word}`" not in described}
