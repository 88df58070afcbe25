"""What a person is shown before they sign: nothing that an agent wrote looks like anything else than what it wrote."""

from __future__ import annotations

import time
import unicodedata
from dataclasses import replace
from typing import Any, cast

import pytest

from ringfence.cli.shared.approval_views import as_json, print_question
from ringfence.client.approvals.history_comparison import (
    Comparison,
    PastAnswer,
    PendingApproval,
    RequestGroup,
    compare,
    group_equivalent,
)
from ringfence.messages.base import Permission
from ringfence.messages.credential import Reason, Revisions
from tests.support.world import Scope, scope

WEB = scope("staging", ["deploy"], ["env/staging/web"])
ALL = scope("staging", ["deploy"], ["env/**"])
REVISIONS = Revisions(agent=1, user=1, task=1, target=1, policy="f" * 64)
ONE = PendingApproval(
    request_id="5b0a4d7e-6c0f-5d39-9b5e-0a4d7e6c0f5d",
    digest="9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    agent="deploy-bot", agent_description="deploys builds", sponsor="sam", task_id="t", purpose="release 41",
    on_behalf_of="maria", target="staging", target_description="the staging platform", scope=WEB,
    reason="build 421", requested_ttl_s=300, requested_at=1, ttl_s=300, delivery="agent", required=("sponsor",),
    mine=("sponsor",), expires_at=int(time.time()) + 600, revisions=REVISIONS,
    why_asked=(Reason(code="floor", message="staging wants it"),), request="a.b.c",
)  # fmt: skip
USUAL = Comparison(3, 0, ())
HOSTILE = (
    "\x1b[2J\x1b[1;1H\x1b]8;;https://evil.example\x07click\x1b]8;;\x07",  # clears the screen, writes a link
    "fine\rneeds        nobody",  # writes over the line
    "fine\nneeds        nobody\nanswer until  never",  # makes up rows
    "\u202egnigats ot ylno\u202c",  # turns the direction
    "\u2066\u200b\u2069\ufeff",  # nothing that one could see
    "[red]approve[/red] :thumbs_up:",  # markup
    "\x9b31m\x84\u2028\u2029",  # C1 controls, other line ends
)


def shown(group: RequestGroup, comparison: Comparison, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    print_question(group, comparison)
    return capsys.readouterr().out


def rows(text: str) -> list[str]:
    """What stands at the beginnings of the rows, where names stand."""
    return [
        line.strip("│ ").split("  ")[0]
        for line in text.splitlines()
        if line.startswith("│ ") and line[2] != " "
    ]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_stays_in_its_place(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    plain = shown(RequestGroup((ONE,)), USUAL, capsys)
    hostile = replace(
        ONE, reason=text, purpose=text, agent_description=text, target_description=text,
        why_asked=(Reason(code="policy", message=text),),
        scope=(Permission(target="staging", verbs=("deploy",), resources=(f"env/{text}"[:512],)),),
    )  # fmt: skip
    told = shown(RequestGroup((hostile,)), compare(hostile.scope, 300, "agent", ()), capsys)
    bad = {c for c in told if c != "\n" and unicodedata.category(c) in {"Cc", "Cf", "Zl", "Zp"}}
    assert bad == set()
    assert rows(told) == rows(plain)
    # Nor does it begin a line of its own beside the names.
    beside = [line.strip("│ ") for line in told.splitlines()]
    assert not [line for line in beside if line.startswith("needs") and "nobody" in line]
    if "[red]" in text:
        assert "[red]approve[/red] :thumbs_up:" in told


def test_similar_requests_are_shown_once_with_each_digest(capsys: pytest.CaptureFixture[str]) -> None:
    others = [replace(ONE, request_id=f"id-{n}", digest=f"{n}" * 64, reason=f"build {n}") for n in range(2)]
    text = shown(RequestGroup((ONE, *others)), USUAL, capsys)
    assert "and 2 alike" in text
    assert "3 credentials" in text
    assert "as usual: 3 times approved" in text
    for one in (ONE, *others):
        assert one.digest in text
        assert one.reason in text
    document = as_json(RequestGroup((ONE, *others)), USUAL)
    assert [one["request_id"] for one in document["alike"]] == [ONE.request_id, "id-0", "id-1"]


def test_alike_is_what_would_come_to_the_same() -> None:
    both = scope("staging", ["deploy", "read"], ["a", "b"])
    same = scope("staging", ["read", "deploy"], ["b", "a", "a"])
    base = replace(ONE, scope=both)
    (group,) = group_equivalent(
        [base, replace(base, request_id="2", scope=same, reason="other words", requested_at=2)]
    )
    assert group.first is base
    assert group.reasons == ("build 421", "other words")
    others: list[dict[str, Any]] = [
        {"scope": WEB}, {"ttl_s": 301}, {"delivery": "gateway"}, {"task_id": "u"}, {"agent": "other-bot"},
        {"required": ("operator",)}, {"revisions": REVISIONS.model_copy(update={"agent": 2})},
    ]  # fmt: skip
    for other in others:
        assert len(group_equivalent([base, replace(base, **other)])) == 2


def past(wanted: Scope = WEB, **fields: Any) -> PastAnswer:
    given: dict[str, Any] = {
        "verdict": "approved",
        "request_id": "x",
        "scope": wanted,
        "ttl_s": 300,
        "delivery": "agent",
    }
    return PastAnswer(**{**given, **fields})


@pytest.mark.parametrize(
    ("wanted", "fields", "known", "codes"),
    [
        (WEB, {}, [past(), past()], []),
        (WEB, {}, [], ["first"]),
        (WEB, {}, [past(verdict="denied")], ["first", "denied"]),
        (scope("production", ["deploy"], ["x"]), {}, [past()], ["target"]),
        (scope("staging", ["wipe"], ["env/staging/web"]), {}, [past()], ["verbs"]),
        (ALL, {}, [past()], ["resources"]),
        (scope("staging", ["deploy", "wipe"], ["env/**"]), {}, [past()], ["verbs", "resources"]),
        (WEB, {}, [past(scope("staging", ["deploy", "read"], ["env/*/*"]))], []),
        (WEB, {"ttl_s": 301}, [past()], ["ttl"]),
        (WEB, {"delivery": "gateway"}, [past()], ["delivery"]),
        (WEB, {}, [past(), past(verdict="denied", scope=ALL)], ["denied"]),
        (ALL, {}, [past(scope("staging", ["deploy"], ["**"])), past(verdict="denied")], []),
    ],
)  # fmt: skip
def test_unusual_request_is_marked_with_its_differences(
    wanted: Scope, fields: dict[str, Any], known: list[PastAnswer], codes: list[str]
) -> None:
    terms = {"ttl_s": 300, "delivery": "agent", **fields}
    found = compare(wanted, terms["ttl_s"], cast(Any, terms["delivery"]), known)
    assert [one.code for one in found.differences] == codes
    assert found.approved == sum(one.verdict == "approved" for one in known)
