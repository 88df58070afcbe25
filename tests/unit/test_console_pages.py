"""What pages of the console show of long texts, and how streams learn that a page would look different."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from ringfence.client.errors import ApiError
from ringfence.console.page_templates import PageDigests, beginning, digest_of, render
from ringfence.console.views.page import Page
from ringfence.console.views.pages import proposals, task
from ringfence.messages.base import Permission
from ringfence.messages.registry import AgentSetCeiling
from tests.support.in_memory_registry import InMemoryRegistry, permission

RESOURCES = [f"{'ж' * 500}/{number}" for number in range(60)]
LONG: list[dict[str, Any]] = [{"target": "platform", "verbs": ["read"], "resources": RESOURCES}]


def test_list_shows_the_beginning_of_a_long_scope() -> None:
    assert [len(one["resources"]) for one in beginning(LONG)] == [1]
    many = [{"target": "platform", "verbs": ["read"], "resources": [f"env/{n}"]} for n in range(60)] + LONG
    assert beginning(many) == [*many[:60], {**LONG[0], "resources": RESOURCES[:1]}]
    message = Permission(target="platform", verbs=("read",), resources=("env/0",))
    assert beginning([message]) == [message.model_dump() | {"resources": ["env/0"]}]
    assert beginning([]) == []


async def test_streams_of_one_page_share_a_look() -> None:
    looks = 0
    answered = asyncio.Event()

    async def make() -> Page:
        nonlocal looks
        looks += 1
        await answered.wait()
        return Page("leases.html", "Leases", {"leases": [{"id": str(looks)}]})

    digests = PageDigests(refresh_ms=3_600_000)
    streams = [asyncio.create_task(digests.current(("sam", "/leases"), make)) for _ in range(5)]
    other = asyncio.create_task(digests.current(("petra", "/leases"), make))
    await asyncio.sleep(0)
    answered.set()
    assert len(set(await asyncio.gather(*streams))) == 1
    await other
    assert looks == 2, "people do not share what services answer"


async def test_page_is_looked_at_anew_after_the_interval_and_after_an_error() -> None:
    made = iter([Page("a.html", "A", {"n": 1}), Page("a.html", "A", {"n": 1}), Page("a.html", "A", {"n": 2})])

    async def make() -> Page:
        page = next(made, None)
        if page is None:
            raise ApiError("gone", status=404)
        return page

    digests = PageDigests(refresh_ms=0)
    first, second, third = [await digests.current(("sam", "/a"), make) for _ in range(3)]
    assert first == second != third
    with pytest.raises(ApiError):
        await digests.current(("sam", "/a"), make)


def test_digest_is_of_all_that_services_answered() -> None:
    page = Page("a.html", "A", {"scope": [Permission(target="t", verbs=("v",), resources=("ж",))]})
    again = Page("a.html", "A", {"scope": [Permission(target="t", verbs=("v",), resources=("ж",))]})
    assert digest_of(page) == digest_of(again) != digest_of(Page("a.html", "A", {"scope": []}))


_COMMAND = InMemoryRegistry().claims(
    AgentSetCeiling, "olga", agent_id="bot", ceiling=(permission("env/web", "env/db", verbs=("read",)),)
)


class ProposalReads:
    """What the registry would list, and policy say."""

    def __init__(self, status: int = 200) -> None:
        self.status = status

    async def usage(self, agent: str) -> dict[str, Any]:
        if self.status != 200:
            raise ApiError("no such agent", status=self.status)
        held = {"target": "staging", "verbs": ["read", "deploy"], "resources": ["env/web"]}
        return {"ceiling": [held], "never_used": [{"target": "staging", "verb": "read"}]}

    async def proposals(self) -> list[dict[str, Any]]:
        common = {
            "status": "open",
            "typ": "agent.set-ceiling",
            "author": "olga",
            "at_ms": 1,
            "ends_at_ms": 2000,
        }
        return [
            {
                **common,
                "id": "a" * 64,
                "subject": "agent <b>x</b>",
                "may_second": ["oona"],
                "command": InMemoryRegistry().signed(_COMMAND),
            },
            {
                **common,
                "id": "b" * 64,
                "typ": "user.set",
                "subject": "user uma",
                "may_second": ["oona", "otto"],
            },
        ]


async def test_proposals_that_a_person_may_second_come_first_with_the_command() -> None:
    view: Any = SimpleNamespace(reads=ProposalReads(), session=SimpleNamespace(user_id="otto"))
    page = await proposals(view)
    assert [one["mine"] for one in page.values["proposals"]] == [True, False]
    html = render(
        page.template, title=page.title, section=page.section, sections={}, session=None, is_live=False, notice="",
        trust_domain="acme.example", **page.values,
    )  # fmt: skip
    assert html.count('action="/sign/second"') == 1
    assert f'action="/sign/second">\n    <input type="hidden" name="id" value="{"b" * 64}"' in html
    assert "/sign/withdraw-proposal" not in html, "these are another author's"
    assert f"ringfence proposal show {'a' * 12}" in html
    assert "<b>x</b>" not in html
    assert page.values["proposals"][0]["ceiling"] is None
    ceiling = page.values["proposals"][1]["ceiling"]
    assert ceiling["whole"] == _COMMAND.ceiling
    assert ceiling["new"] == (permission("env/db", verbs=("read",)),)
    assert ceiling["unused"] == [{"target": "staging", "verb": "read"}]
    assert html.count("env/web") == 1, "the whole ceiling"
    assert html.count("env/db") == 2, "and what is new of it"
    assert "read at staging" in html


async def test_author_of_proposals_has_a_button_to_withdraw_each() -> None:
    view: Any = SimpleNamespace(reads=ProposalReads(), session=SimpleNamespace(user_id="olga"))
    page = await proposals(view)
    html = render(
        page.template, title=page.title, section=page.section, sections={}, session=None, is_live=False, notice="",
        trust_domain="acme.example", **page.values,
    )  # fmt: skip
    assert html.count('action="/sign/withdraw-proposal"') == 2
    assert "/sign/second" not in html


async def test_proposed_ceiling_of_an_agent_that_a_person_may_not_see_is_marked_so() -> None:
    view: Any = SimpleNamespace(reads=ProposalReads(404), session=SimpleNamespace(user_id="otto"))
    ceiling = (await proposals(view)).values["proposals"][1]["ceiling"]
    assert ceiling == {"whole": _COMMAND.ceiling, "limits": None, "new": None, "unused": None}


class TaskReads:
    """A task with limits, and what audit says of its models."""

    def __init__(self, *, away: bool = False) -> None:
        self.away = away

    async def record(self, kind: str, id: str) -> dict[str, Any]:
        state = {
            "task_id": id, "agent_id": "bot", "purpose": "summarise", "scope": [], "not_after": 2_000_000_000,
            "on_behalf_of": "uma", "assigned_by": "uma", "status": "active", "act": None,
            "limits": {"tokens": 1000, "requests": 9},
        }  # fmt: skip
        return {"id": id, "revision": 1, "state": state}

    async def records(self, kind: str, **_: Any) -> list[Any]:
        return []

    async def leases(self, **_: Any) -> dict[str, Any]:
        return {"leases": [], "more": False}

    async def model_usage(self, **_: Any) -> dict[str, Any]:
        if self.away:
            raise ApiError("audit is away", status=503)
        group = {
            "day": "2026-12-03", "agent": "bot", "task": "t", "target": "llm", "model": "<b>gpt", "requests": 2,
            "tokens": 150, "input_tokens": 50, "output_tokens": 100, "not_stated": 0,
        }  # fmt: skip
        return {"groups": [group], "until_ms": 9, "looked_at_ms": [1, 5], "after": None}


@pytest.mark.parametrize("away", [False, True])
async def test_task_page_has_the_usage_of_models_against_its_limits(away: bool) -> None:
    view: Any = SimpleNamespace(
        reads=TaskReads(away=away), id="11111111-1111-5111-8111-111111111111", now_ms=10**12
    )
    page = await task(view)
    html = render(
        page.template, title=page.title, section=page.section, sections={}, session=None, is_live=False, notice="",
        trust_domain="acme.example", **page.values,
    )  # fmt: skip
    assert "1000 tokens, 9 requests" in html
    assert "<b>gpt" not in html
    if away:
        assert "Audit does not say now" in html
    else:
        assert "150 of 1000 tokens, 2 of 9 requests" in html
        assert "150 tokens, 2 requests" in html


async def test_task_without_language_models_costs_no_scan_of_audit() -> None:
    reads = TaskReads()
    record = await reads.record("task", "t")
    record["state"] |= {
        "limits": None,
        "scope": [{"target": "shop", "verbs": ["read"], "resources": ["path/**"]}],
    }
    asked = list[str]()

    async def no_models(kind: str, id: str) -> dict[str, Any]:
        return record

    async def model_usage(**_: Any) -> dict[str, Any]:
        asked.append("audit")
        return {"groups": [], "until_ms": 9, "looked_at_ms": [1, 5], "after": None}

    reads.record, reads.model_usage = no_models, model_usage  # type: ignore[method-assign]
    view: Any = SimpleNamespace(reads=reads, id="t", now_ms=10**12)
    assert (await task(view)).costly is False
    assert asked == []
    record["state"]["scope"][0]["resources"] = ["model/gpt-5"]
    assert (await task(view)).costly is True
    assert asked == ["audit"]
