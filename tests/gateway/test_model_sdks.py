"""The official Python SDKs of OpenAI and Anthropic through the gateway, before a server that speaks both APIs."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from ringfence.backends.http import StaticSecrets
from ringfence.backends.secret_sources import TargetAccess
from ringfence.cli.commands.target_templates import TEMPLATES
from ringfence.dev.processes import free_port
from ringfence.gateway.decision.model_budget import Budgets
from ringfence.messages.registry import ModelLimits, VerbFloor
from tests.gateway.mcp_place import McpPlace, mcp_placed
from tests.gateway.model_server import respond
from tests.gateway.target import Target
from tests.support.in_memory_registry import permission

ROOT = Path(__file__).parents[2]
SECRET = "canary-of-the-provider"
OWN = "the-agents-own"
TEMPLATE = TEMPLATES["model"]
HEADERS: Mapping[str, dict[str, str]] = {
    "openai": {"kind": "http"},
    "anthropic": {"kind": "http", "auth": "header", "header": "x-api-key"},
}
WIDE = permission("**", verbs=tuple(TEMPLATE.verbs))
LEASE = permission("model/m-1", verbs=("generate",))
HELLO = [{"role": "user", "content": "Hello"}]
SEARCH = [{"type": "web_search"}]
CHAT = {"model": "m-1", "messages": HELLO}
MESSAGE = {"model": "m-1", "max_tokens": 9, "messages": HELLO}
WITHIN_S = 60


@dataclass
class ModelPlace:
    """The gateway before a server of both APIs, with agent `bot`, which may generate with `m-1`."""

    place: McpPlace
    server: Target
    provider: str
    url: str

    async def call(self, *calls: tuple[str, dict[str, Any]], retries: int = 0) -> list[dict[str, Any]]:
        """What the SDK returns or raises for each call."""
        process = await asyncio.create_subprocess_exec(
            str(_sdks() / "python"), str(Path(__file__).with_name("model_client.py")),
            self.provider, self.url, json.dumps(calls), str(retries),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env={"PATH": os.environ["PATH"]},
        )  # fmt: skip
        out, err = await asyncio.wait_for(process.communicate(), WITHIN_S)
        assert process.returncode == 0, err.decode()
        assert SECRET.encode() not in out + err
        return [json.loads(line) for line in out.splitlines()]

    def check_credential(self) -> None:
        """Each request that reached the server has the provider's key once, and none of the agent's own."""
        name, value = (
            ("authorization", f"Bearer {SECRET}") if self.provider == "openai" else ("x-api-key", SECRET)
        )
        for received in self.server.requests:
            assert received.values(name) == [value]
            assert OWN not in str(received.headers)


def _sdks() -> Path:
    done = subprocess.run(
        [ROOT / ".ci/model-sdks"], capture_output=True, text=True, check=False, timeout=500,
        env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@contextlib.asynccontextmanager
async def model_placed(
    provider: str,
    folder: Path,
    *leases: Any,
    server: Target | None = None,
    limits: ModelLimits | None = None,
    budgets: Budgets | None = None,
) -> AsyncIterator[ModelPlace]:
    """`server`: in the place of one that does not say what is used; `limits`: of the task; `budgets`: what they are
    counted by."""
    secret = folder / "key"
    secret.touch(mode=0o600)
    secret.write_text(SECRET)
    verbs = tuple(VerbFloor(verb=verb, floor=floor) for verb, floor in TEMPLATE.verbs.items())
    async with (
        (server or Target(respond=respond)).serving() as serving,
        mcp_placed(
            serving.port, folder, *(leases or (LEASE,)), rules=TEMPLATE.requests, verbs=verbs,
            settings=HEADERS[provider], wide=WIDE, limits=limits, budgets=budgets,
            secrets=StaticSecrets(TargetAccess({"staging": f"file:{secret}"})),
        ) as place,
    ):  # fmt: skip
        assert place.plane is not None
        port = free_port()
        await place.plane.listen("127.0.0.1", port, names=[f"localhost:{port}"])
        yield ModelPlace(place, serving, provider, f"http://localhost:{port}/staging")


@pytest.mark.tools
@pytest.mark.parametrize(
    ("provider", "method", "arguments"),
    [("openai", "chat.completions.create", CHAT), ("anthropic", "messages.create", MESSAGE)],
)
async def test_sdk_reaches_the_allowed_model_plain_and_streamed(
    tmp_path: Path, provider: str, method: str, arguments: dict[str, Any]
) -> None:
    async with model_placed(provider, tmp_path) as place:
        plain, streamed = await place.call((method, arguments), (method, {**arguments, "stream": True}))
        for answer in (plain, streamed):
            assert "Hello" in json.dumps(answer["answer"])
            assert "*****" in json.dumps(answer["answer"])
        assert isinstance(streamed["answer"], list)
        place.check_credential()
        assert [json.loads(one.body)["model"] for one in place.server.requests] == ["m-1", "m-1"]


@pytest.mark.tools
@pytest.mark.parametrize(
    ("provider", "calls"),
    [
        (
            "openai",
            [
                ("chat.completions.create", {**CHAT, "model": "m-2"}, "generate on model/m-2"),
                ("responses.create", {"model": "m-1", "input": "x", "tools": SEARCH}, "server-tools on model/m-1"),
                ("responses.create", {"model": "m-1", "input": "x", "background": True}, "server-tools on model/m-1"),
                ("chat.completions.create", {**CHAT, "extra_body": {"models": ["m-2"]}}, "server-tools on model/m-1"),
                ("chat.completions.create", {**CHAT, "extra_query": {"model": "m-2"}}, "a query may name another"),
                ("batches.list", {}, "batch on batches"),
                ("responses.retrieve", {"response_id": "resp-1"}, "does not say what this request does"),
            ],
        ),
        (
            "anthropic",
            [
                ("messages.create", {**MESSAGE, "model": "m-2"}, "generate on model/m-2"),
                (
                    "messages.create",
                    {**MESSAGE, "tools": [{"type": "web_search_20250305", "name": "web_search"}]},
                    "server-tools on model/m-1",
                ),
                (
                    "beta.messages.create",
                    {**MESSAGE, "mcp_servers": [{"type": "url", "url": "https://evil.example", "name": "x"}]},
                    "server-tools on model/m-1",
                ),
                ("messages.batches.list", {}, "batch on messages/batches"),
            ],
        ),
    ],
)  # fmt: skip
async def test_sdk_shows_why_a_request_is_refused(
    tmp_path: Path, provider: str, calls: list[tuple[str, dict[str, Any], str]]
) -> None:
    async with model_placed(provider, tmp_path) as place:
        answers = await place.call(*((method, arguments) for method, arguments, _ in calls))
        for answer, (method, _, text) in zip(answers, calls, strict=True):
            assert (answer.get("status"), answer.get("kind")) == (403, "PermissionDeniedError"), (
                method,
                answer,
            )
            assert text in answer["message"], answer
        assert place.server.requests == []


@pytest.mark.tools
async def test_sdk_uses_server_tools_with_a_lease_for_them(tmp_path: Path) -> None:
    lease = permission("model/m-1", verbs=("server-tools",))
    async with model_placed("anthropic", tmp_path, lease) as place:
        tools = [{"type": "web_search_20250305", "name": "web_search"}]
        allowed, denied = await place.call(
            ("messages.create", {**MESSAGE, "tools": tools}), ("messages.create", MESSAGE)
        )
        assert "answer" in allowed
        assert "generate on model/m-1" in denied["message"]
        place.check_credential()


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("provider", "path"), [("openai", "/v1/chat/completions"), ("anthropic", "/v1/messages")]
)
async def test_provider_key_replaces_the_agents_and_is_hidden_from_it(
    tmp_path: Path, provider: str, path: str
) -> None:
    own = {"Authorization": f"Bearer {OWN}"} | ({"X-Api-Key": OWN} if provider == "anthropic" else {})
    async with model_placed(provider, tmp_path) as place, httpx.AsyncClient() as http:
        answer = await http.post(f"{place.url}{path}", json=MESSAGE, headers=own)
        assert answer.status_code == 200
        assert "Hello" in answer.text
        assert SECRET not in answer.text
        assert len(place.server.requests) == 1
        place.check_credential()


BODY = json.dumps(CHAT).encode()


@pytest.mark.parametrize(
    ("headers", "body", "code"),
    [
        (JSON, BODY, None),
        (JSON, BODY.replace(b'"m-1"', b'"m-1", "model": "m-2"'), "model_request_invalid"),
        (JSON, BODY.replace(b'"m-1"', b'"m-1", "mod\\u0065l": "m-2"'), "model_request_invalid"),
        (JSON, b"\xef\xbb\xbf" + BODY, "model_request_invalid"),
        (JSON, BODY + BODY, "model_request_invalid"),
        (JSON, b"", "model_request_invalid"),
        (JSON, BODY.replace(b"m-1", b"../m-1"), "model_request_invalid"),
        (JSON, BODY.replace(b"Hello", b"x" * 1024 * 1024), "body_unseen"),
        ({**JSON, "Content-Encoding": "gzip"}, gzip.compress(BODY, mtime=0), "body_not_json"),
        ({"Content-Type": "text/plain"}, BODY, "body_not_json"),
        ({"Content-Type": "application/json; charset=utf-16"}, BODY, "body_not_json"),
        ({}, BODY, "body_not_json"),
    ],
    ids=[
        "valid", "two models", "escaped second model", "BOM", "two values", "empty", "dots in the name", "too long",
        "gzip", "text", "UTF-16", "no media type",
    ],
)  # fmt: skip
async def test_ambiguous_request_does_not_reach_the_server(
    tmp_path: Path, headers: dict[str, str], body: bytes, code: str | None
) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 50_000):
            yield body[start : start + 50_000]

    async with model_placed("openai", tmp_path) as place, httpx.AsyncClient() as http:
        for content in (body, chunks()):
            answer = await http.post(f"{place.url}/v1/chat/completions", content=content, headers=headers)
            assert (answer.status_code == 200) is (code is None), answer.text
            assert code is None or answer.json()["code"] == code
        assert [one.body for one in place.server.requests] == ([] if code else [BODY, BODY])
