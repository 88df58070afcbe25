"""The usage report: what audit sums of answers of language models, and what `ringfence usage` prints of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import orjson
import pytest

from ringfence.audit.index.filters import usage_groups
from ringfence.audit.index.store import SqliteIndex, Viewer
from ringfence.cli.main import main
from ringfence.client.reports.model_usage_report import ModelUsageReport, model_usage_report
from ringfence.client.reports.read_api import ReadApi
from ringfence.kernel.kafka.record import Received
from ringfence.messages.operations import ModelUsage
from ringfence.messages.topics import AUDIT
from tests.support.audit_fixtures import AuditFixtures

DAY_MS = 24 * 3600 * 1000
ALWAYS = (0, 2**53)
STATED = ModelUsage(input_tokens=30, output_tokens=70, tokens=100, counted="usage")
ZERO = ModelUsage(input_tokens=0, output_tokens=0, tokens=40, counted="estimate")
CUT = ModelUsage(tokens=500, counted="reservation")
REFUSED = ModelUsage(tokens=0, counted="nothing")


async def indexed(office: AuditFixtures, *answers: dict[str, Any]) -> SqliteIndex:
    """An index of answers, a day apart from the second day on, and of what audit knows of the agent."""
    events = await office.audit(*office.staff())
    told = await office.audit(*(office.answer(resource="model/gpt-5", **fields) for fields in answers))
    for number, event in enumerate(told, 1):
        event["time"] = number * DAY_MS
    index = SqliteIndex(None)
    index.add([
        Received(AUDIT, "ringfence.audit.v1", 0, offset, event["time"], "k", orjson.dumps(event))
        for offset, event in enumerate([*told, *events])
    ])  # fmt: skip
    return index


def report(
    index: SqliteIndex, viewer: Viewer | None = None, limit: int = 100, **filters: str
) -> ModelUsageReport:
    """The report over all pages."""
    made, after = ModelUsageReport(0, 1), None
    while True:
        page = index.model_answers(viewer, ALWAYS, after, limit, **filters)
        made.add(usage_groups(page.events))
        after = page.cursor
        if after is None:
            return made


@pytest.mark.parametrize("limit", [1, 100])
async def test_usage_is_summed_by_day_agent_task_and_model(limit: int) -> None:
    office = AuditFixtures()
    index = await indexed(office, {"usage": STATED}, {"usage": ZERO}, {"usage": CUT}, {"usage": REFUSED}, {})
    made = report(index, limit=limit)
    assert dict(made.sums()) == {
        "requests": 4, "tokens": 640, "input_tokens": 30, "output_tokens": 70, "not_stated": 2,
    }  # fmt: skip
    rows = made.as_json()["rows"]
    assert [(row["day"], row["requests"], row["tokens"]) for row in rows] == [
        ("1970-01-05", 1, 0), ("1970-01-04", 1, 500), ("1970-01-03", 1, 40), ("1970-01-02", 1, 100),
    ]  # fmt: skip
    assert {(row["agent"], row["task"], row["target"], row["model"]) for row in rows} == {
        ("deploy-bot", office.task, "staging", "gpt-5")
    }


async def test_filters_and_viewer_leave_out_what_is_anothers() -> None:
    office = AuditFixtures()
    index = await indexed(office, {"usage": STATED}, {"usage": STATED, "agent_id": "other", "task_id": None})
    assert report(index).sums()["requests"] == 2
    assert report(index, agent="other").sums()["requests"] == 1
    assert report(index, task=office.task).sums()["requests"] == 1
    assert report(index, Viewer("nobody", ())).sums()["requests"] == 0
    assert report(index, Viewer("nobody", ("other",))).sums()["requests"] == 1


def test_forged_usage_is_left_out_and_breaks_no_report() -> None:
    def event(usage: Any, time: int = 0, **fields: Any) -> dict[str, Any]:
        return {"time": time, "unmapped": {"usage": usage, **fields}}

    groups = usage_groups([
        event("many"), event({"tokens": "x"}), event({"tokens": 1, "input_tokens": True}), event(None),
        event({"tokens": 5}, -(2**63), resource=7), event({"tokens": 6}, 2**63 - 1),
    ])  # fmt: skip
    assert [(one["day"], one["tokens"]) for one in groups] == [("1970-01-01", 5), ("9999-12-31", 6)]


async def test_understated_usage_is_an_alert_of_audit() -> None:
    office = AuditFixtures()
    lying, honest, cut = await office.audit(*(office.answer(usage=one) for one in (ZERO, STATED, CUT)))
    assert lying["metadata"]["event_code"] == "model.usage_understated"
    assert (lying["severity"], lying["is_alert"]) == ("Medium", True)
    assert "40 tokens are counted, though it says 0" in lying["message"]
    assert honest["metadata"]["event_code"] == cut["metadata"]["event_code"] == "action.answered"
    assert honest["unmapped"]["usage"] == {
        "input_tokens": 30, "output_tokens": 70, "tokens": 100, "counted": "usage",
    }  # fmt: skip


class Pages(ReadApi):
    """Audit, which answers in two pages."""

    def __init__(self, *_: Any) -> None:
        self.asked: list[dict[str, Any]] = []

    async def __aenter__(self) -> Pages:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def model_usage(self, **query: Any) -> Any:
        self.asked.append(query)
        first = query.get("after") is None
        group = {
            "day": "2026-12-03", "agent": "bot", "task": "11111111-1111-5111-8111-111111111111", "target": "llm",
            "model": "gpt-5" if first else "claude", "requests": 2, "tokens": 150, "input_tokens": 50,
            "output_tokens": 100, "not_stated": 0,
        }  # fmt: skip
        return {"groups": [group], "until_ms": 9, "looked_at_ms": [1, 5], "after": "next" if first else None}


async def test_report_that_may_not_read_all_pages_says_so() -> None:
    made = await model_usage_report(Pages(), 1, lambda _: None, most_pages=1)
    assert (made.sums()["tokens"], made.complete) == (150, False)


async def test_report_reads_all_pages_of_the_same_period() -> None:
    api = Pages()
    made = await model_usage_report(api, 1, lambda _: None, agent="bot")
    assert made.sums()["tokens"] == 300
    assert [(one["since_ms"], one.get("until_ms"), one["agent"]) for one in api.asked] == [
        (1, None, "bot"), (1, 9, "bot"),
    ]  # fmt: skip


@pytest.mark.parametrize("as_json", [True, False])
def test_command_prints_rows_and_their_sum(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, as_json: bool
) -> None:
    monkeypatch.setattr("ringfence.cli.commands.usage.ReadApi", Pages)
    main(["--identity", str(tmp_path / "key.json"), "usage", *(["--json"] if as_json else [])])
    said = capsys.readouterr().out
    if as_json:
        document = json.loads(said)
        assert (document["tokens"], document["requests"], len(document["rows"])) == (300, 4, 2)
    else:
        assert "300 tokens in 4 requests" in said
        assert "gpt-5" in said
