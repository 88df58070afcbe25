"""What an export holds, read again by readers that know nothing of Ringfence."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from typing import Any

import orjson
import pytest

from ringfence.client.exports import COLUMNS, Format, writer_of
from ringfence.messages.credential import Reason
from ringfence.messages.topics import REGISTRY_COMMAND
from tests.support.audit_fixtures import AuditFixtures


@pytest.fixture
async def events() -> list[dict[str, Any]]:
    """Of each class one at least."""
    office = AuditFixtures()
    found: list[dict[str, Any]] = [*await office.audit(*office.staff())]
    found += await office.audit(*office.credential("released").all)
    beyond = (Reason(code="beyond_scope", message="the task does not allow it"),)
    found += await office.audit(
        office.action(allowed=True, method="GET", access="read"),
        office.action(allowed=False, reasons=beyond),
        office.received(REGISTRY_COMMAND, b"x"),
    )
    return found


def written(format: Format, events: list[dict[str, Any]], pages: int = 2) -> bytes:
    """An export of these events, in some pages."""
    file = io.BytesIO()
    writer = writer_of(format, file)
    lines = [orjson.dumps(event).decode() for event in events]
    step = max(len(lines) // pages, 1)
    for start in range(0, len(lines), step):
        writer.page(lines[start : start + step])
    return file.getvalue()


def text(cell: str) -> str | None:
    return cell.removeprefix("'") or None


async def test_ocsf_is_what_stands_on_the_topic(events: list[dict[str, Any]]) -> None:
    lines = written("ocsf", events).splitlines()
    assert [hashlib.sha256(line).digest() for line in lines] == [
        hashlib.sha256(orjson.dumps(event)).digest() for event in events
    ]
    file = io.BytesIO()
    writer_of("ocsf", file).page(['{"time": 1,\n "metadata": {}}'])
    assert [json.loads(line) for line in file.getvalue().splitlines()] == [{"time": 1, "metadata": {}}]


async def test_csv_has_a_row_an_event_and_no_formula(events: list[dict[str, Any]]) -> None:
    for number, start in enumerate("=+-@\t\r\n＝"):
        events[number]["message"] = f"{start}HYPERLINK(1)"
    events[8]["message"] = "  =1+1"
    events[9]["message"] = 'plain, "quoted"\nand on two lines'
    rows = list(csv.DictReader(io.StringIO(written("csv", events).decode(), newline="")))
    assert len(rows) == len(events)
    for row, event in zip(rows, events, strict=True):
        assert list(row) == [column.name for column in COLUMNS]
        assert (row["uid"], row["event_code"]) == (event["metadata"]["uid"], event["metadata"]["event_code"])
        assert text(row["message"]) == event["message"]
        assert int(row["time_ms"]) == event["time"]
        assert (row["lease"] or None) == event["unmapped"].get("lease")
        assert int(row["source_offset"]) == event["unmapped"]["source"]["offset"]
        for cell in row.values():
            assert not cell.lstrip(" ").startswith(("=", "+", "-", "@", "\t", "\r", "\n", "＝")), cell
    assert rows[9]["message"] == events[9]["message"]


HOSTILE = (
    "plain;=cmd|' /C calc'!A0",
    "a\t=1+1",
    "a|@SUM(1)",
    "a, -5",
    "two\n=lines",
    "two\r\n +lines",
    'quotes;"=1+1"',
    'quotes;""  "=1+1"',
    "; \u00a0\u3000=1",
    "\ufeff=1",
    "\u200b\x01\x7f=1",
    "a;\u202e=1",
    "a\t\u2066\u180e\u061c=1",
    "\x00=1",
    ";\n=1",
    "\n;\t|,=1",
    "\u2028=1",
    "\x85=1",
    "；；＝1;＝1",
    "x;﹦1;⁺1;−1",
    '"=1',
    "''=1;=2",
)
BEGINS = re.compile(
    r"[\s\"\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]*[=+\-@＝＋－＠﹦﹢﹣﹫⁼⁺⁻₌₊₋−]"
)


def read_as(text: str, separator: str) -> list[str]:
    """Cells as a program reads them that splits there: one that knows quotes, and one that does not."""
    strict = [cell for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator) for cell in row]
    return [*strict, *re.split(rf"[{re.escape(separator)}\r\n\v\f\x1c-\x1e\x85\u2028\u2029]", text)]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("said", HOSTILE)
async def test_no_cell_is_a_formula_wherever_a_program_splits(
    events: list[dict[str, Any]], separator: str, said: str
) -> None:
    events[0]["message"] = said
    made = written("csv", events[:1]).decode()
    assert [cell for cell in read_as(made, separator) if BEGINS.match(cell)] == []
    (row,) = csv.DictReader(io.StringIO(made, newline=""))
    assert row["message"].replace("'", "") == said.replace("'", "")


@pytest.mark.parametrize("said", ["a=b; c-d, user@example.com", "1 - 2 = 3", "x;y\tz", "it's -fine"])
async def test_text_without_a_formula_is_unchanged_in_csv(events: list[dict[str, Any]], said: str) -> None:
    events[0]["message"] = said
    (row,) = csv.DictReader(io.StringIO(written("csv", events[:1]).decode(), newline=""))
    assert row["message"] == said


async def test_a_csv_that_is_gone_on_with_has_one_header(events: list[dict[str, Any]]) -> None:
    file = io.BytesIO()
    writer_of("csv", file)
    writer_of("csv", file, resumed=True).page([orjson.dumps(events[0]).decode()])
    (row,) = csv.DictReader(io.StringIO(file.getvalue().decode(), newline=""))
    assert row["uid"] == events[0]["metadata"]["uid"]


@pytest.mark.parametrize("format", ["ocsf", "csv"])
def test_empty_export_is_a_complete_file(format: Format) -> None:
    made = written(format, [])
    if format == "csv":
        assert list(csv.reader(io.StringIO(made.decode()))) == [[column.name for column in COLUMNS]]
    else:
        assert made == b""


async def test_csv_leaves_out_values_of_the_wrong_type(events: list[dict[str, Any]]) -> None:
    words = {"agent": 7, "deadline": "soon", "chain": "no", "source": {"offset": 1.5}}
    odd = {**events[0], "time": 2**60, "is_alert": "yes", "unmapped": {**events[0]["unmapped"], **words}}
    (row,) = csv.DictReader(io.StringIO(written("csv", [odd]).decode(), newline=""))
    names = ("agent", "deadline", "chain_seq", "source_offset", "is_alert")
    assert [row[name] for name in names] == [""] * len(names)
    assert row["time"].startswith("9999-")
