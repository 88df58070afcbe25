"""Why programs for people refuse a file, a form or an argument, a row for each code: scan, console, sign page, CLI."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from ringfence.cli.adopt.files import credentials_in
from ringfence.cli.shared.yaml_files import YamlFile
from ringfence.client.agent.credentials import IssuedCredential
from ringfence.client.agent.replies import PendingRequest
from ringfence.console.questions import MAX_PATH_CHARS, Draft, Question, Questions, terms_digest
from ringfence.console.security import SealedValues
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.mcp_server.agent_tools import MAX_OPEN, AgentTools, OpenRequests
from ringfence.messages.codes import Code
from ringfence.messages.registry import AgentSuspend
from ringfence.policy.notifications.webhook import parse_webhook
from ringfence.rego.bundle import load_bundle
from ringfence.scan.external_scanners import adapters
from ringfence.scan.reports import load_baseline
from ringfence.scan.scanner import Scanner, ScanOptions
from ringfence.sign_page.build import PageConfig
from tests.support.in_memory_registry import FixedClock
from tests.support.verdicts import refusal_code

MISSING: Final = Path("/nonexistent/ringfence")
TASK: Final = "0c6f2f2e-55a3-5f0e-8f4e-2f2e55a35f0e"
NO_SUCH: Final = "00000000-0000-5000-8000-000000000000"
NOTHING: Final[Any] = None
"""A part that no row reaches."""
KEY: Final = SigningKey.generate("spiffe://acme.example/service/console")
ORIGIN: Final = "https://sign.acme.example"


QUESTIONS: Final = Questions(SealedValues(lambda: KEY), NOTHING, FixedClock(), "acme.example", NOTHING)


def question(title: str = "Suspend agent bot") -> Question:
    """A question of the console about the suspension of an agent."""
    draft = suspension("it behaves oddly")
    return Question(
        "suspend",
        {},
        "sam",
        "a.b.c",
        "c",
        terms_digest(draft.claims),
        title,
        "bot",
        asked_at=0,
        back="/agents",
    )


def suspension(reason: str) -> Draft:
    claims = AgentSuspend(**QUESTIONS.stamp("sam", 1), agent_id="bot", reason=reason)
    return Draft("Suspend agent bot", claims, "bot", {})


def page(**changed: Any) -> PageConfig:
    given: dict[str, Any] = {
        "trust_domain": "acme.example",
        "trust_root": "x",
        "rp_id": "acme.example",
        "origin": ORIGIN,
    }
    return PageConfig(**{**given, **changed})


async def starts(requests: int) -> None:
    """Send requests that have no answer yet."""

    async def ask(on_pending: Callable[[PendingRequest], None]) -> IssuedCredential:
        return await asyncio.Future()

    opened = OpenRequests()
    for _ in range(requests):
        opened.start(TASK, "a test", ask)


def tool(name: str, **arguments: Any) -> object:
    """Call a tool of the MCP server of an agent, which is for one task."""
    answer = asyncio.run(AgentTools(NOTHING, TASK).call(name, arguments))
    return answer.content["error"]["code"]


REFUSALS: Final[dict[Code, Callable[[], object]]] = {
    Code.FILE_INVALID: lambda: YamlFile(MISSING),
    Code.BUNDLE_INVALID: lambda: load_bundle(MISSING),
    Code.ADOPT_STOPPED: lambda: list(credentials_in(MISSING, NOTHING)),
    Code.SCAN_BASELINE_INVALID: lambda: load_baseline(MISSING),
    Code.SCAN_SCANNER_MISSING: lambda: adapters(["other"]),
    Code.SIGN_PAGE_FAILED: lambda: page(rp_id="other.example"),
    Code.SCAN_PATH_INVALID: lambda: Scanner(ScanOptions((MISSING,)), NOTHING)._open_root(MISSING),
    Code.WRONG_FORM: lambda: QUESTIONS.path_of(question(secrets.token_hex(MAX_PATH_CHARS))),
    Code.WRONG_ANSWER: lambda: asyncio.run(QUESTIONS.answer(question(), AgentSuspend, "", None)),
    Code.QUESTION_CHANGED: lambda: QUESTIONS.document(question(), suspension("another"), "http://x"),
    Code.TOOL_UNKNOWN: lambda: tool("other"),
    Code.REQUEST_UNKNOWN: lambda: OpenRequests().find("r1"),
    Code.REQUESTS_LIMIT: lambda: asyncio.run(starts(MAX_OPEN + 1)),
    Code.TASK_OTHER: lambda: AgentTools(NOTHING, TASK)._task(NO_SUCH),
    Code.WEBHOOK_INVALID: lambda: parse_webhook("https://hook.acme.example"),
}


@pytest.mark.parametrize(("code", "ask"), REFUSALS.items(), ids=REFUSALS)
def test_input_is_refused(code: Code, ask: Callable[[], object]) -> None:
    assert page().rp_id == "acme.example"
    assert refusal_code(ask) == code
