"""Limits of a task at language models: the official SDKs of both providers through the gateway, and what it counts."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from ringfence.gateway.decision.model_usage import OUTPUT_TOKENS
from ringfence.kernel.base.errors import UnavailableError
from ringfence.messages.operations import ModelUsage
from ringfence.messages.registry import ModelLimits
from ringfence.model.lease_store import Budget
from ringfence.testing.services import InMemoryBudgets
from tests.gateway.target import Received, Target
from tests.gateway.test_blocked import until
from tests.gateway.test_model_sdks import CHAT, MESSAGE, ModelPlace, model_placed

TEXT = "word " * 400
"""2,000 bytes, which are 500 tokens by the estimate."""
RESPONSE = {"model": "m-1", "input": "Hello", "max_output_tokens": 9}
METHODS = {
    "chat": ("openai", "chat.completions.create", {**CHAT, "max_tokens": 9}),
    "responses": ("openai", "responses.create", RESPONSE),
    "messages": ("anthropic", "messages.create", MESSAGE),
}
LIMITS = ModelLimits(tokens=10_000, requests=5)


class Server(Target):
    """A server of both APIs, whose answers say that they used `usage` tokens; None: they do not say."""

    def __init__(self, usage: tuple[int, int] | None = (30, 700), *, cut: bool = False) -> None:
        super().__init__(respond=self._answer, hangs_up=cut)
        self.usage = usage
        self.cut = cut
        """Whether streams end in the middle."""
        self.status = b"200 OK"

    @property
    def last(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.requests[-1].body)
        return document

    def _answer(self, received: Received) -> bytes:
        document = json.loads(received.body)
        shape = received.target.partition("?")[0].rpartition("/")[2]
        events = getattr(self, f"_{shape}")(document.get("stream"))
        if not document.get("stream"):
            return self._sent(b"application/json", json.dumps(events[0]).encode())
        parts = [f"event: {one['type']}\r\n" if "type" in one else "" for one in events]
        stream = "".join(
            f"{line}data: {json.dumps(one)}\r\n\r\n" for line, one in zip(parts, events, strict=True)
        )
        return self._sent(b"text/event-stream", stream.encode() + b"data: [DONE]\n\n")

    def _sent(self, media: bytes, body: bytes) -> bytes:
        whole = b"Content-Type: %b\r\nContent-Length: %d\r\n\r\n%b" % (media, len(body), body)
        answer = b"HTTP/1.1 %b\r\n%b" % (self.status, whole)
        return answer[: -len(body) // 2] if self.cut else answer

    def _counted(self, given: str, output: str) -> dict[str, Any]:
        return {} if self.usage is None else {"usage": dict(zip((given, output), self.usage, strict=True))}

    def _completions(self, stream: bool | None) -> list[dict[str, Any]]:
        usage = self._counted("prompt_tokens", "completion_tokens")
        whole = {"id": "c", "created": 1, "model": "m-1"}
        message = {"role": "assistant", "content": TEXT}
        if not stream:
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            return [{**whole, "object": "chat.completion", "choices": [choice], **usage}]
        chunk = {**whole, "object": "chat.completion.chunk"}
        choice = {"index": 0, "delta": message, "finish_reason": "stop"}
        return [{**chunk, "choices": [choice], "usage": None}, {**chunk, "choices": [], **usage}]

    def _responses(self, stream: bool | None) -> list[dict[str, Any]]:
        content = {"type": "output_text", "text": TEXT, "annotations": []}
        item = {
            "id": "i",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [content],
        }
        usage = self._counted("input_tokens", "output_tokens")
        whole = {"id": "r", "object": "response", "created_at": 1, "model": "m-1", "output": [item], **usage}
        place = {"item_id": "i", "output_index": 0, "content_index": 0, "logprobs": []}
        delta = {"type": "response.output_text.delta", "sequence_number": 1, **place, "delta": TEXT}
        done = {"type": "response.completed", "sequence_number": 2, "response": whole}
        return [delta, done] if stream else [whole]

    def _messages(self, stream: bool | None) -> list[dict[str, Any]]:
        whole = {"id": "m", "type": "message", "role": "assistant", "model": "m-1", "stop_sequence": None}
        usage = self._counted("input_tokens", "output_tokens")
        if not stream:
            return [
                {**whole, "content": [{"type": "text", "text": TEXT}], "stop_reason": "end_turn", **usage}
            ]
        began = (
            {"usage": {**usage["usage"], "output_tokens": min(1, usage["usage"]["output_tokens"])}}
            if usage
            else {}
        )
        end = {"usage": {"output_tokens": usage["usage"]["output_tokens"]}} if usage else {}
        return [
            {"type": "message_start", "message": {**whole, "content": [], "stop_reason": None, **began}},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": TEXT}},
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}, **end},
            {"type": "message_stop"},
        ]


def used(place: ModelPlace) -> tuple[int, int]:
    """What the task has used or reserved: tokens and requests."""
    task, budgets = place.place.place.task, place.place.budgets
    assert isinstance(budgets, InMemoryBudgets)
    return budgets.used[task, "tokens"], budgets.used[task, "requests"]


async def recorded(place: ModelPlace, count: int = 1) -> list[ModelUsage]:
    await until(lambda: len(place.place.answers) >= count)
    return [one.usage for one in place.place.answers if one.usage is not None]


@pytest.mark.tools
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("shape", METHODS)
async def test_task_pays_the_usage_that_the_answer_says(tmp_path: Path, shape: str, stream: bool) -> None:
    provider, method, arguments = METHODS[shape]
    server = Server()
    async with model_placed(provider, tmp_path, server=server, limits=LIMITS) as place:
        (answer,) = await place.call((method, {**arguments, "stream": stream}))
        assert "word" in json.dumps(answer["answer"])
        expected = ModelUsage(input_tokens=30, output_tokens=700, tokens=730, counted="usage")
        assert await recorded(place) == [expected]
        await until(lambda: used(place) == (730, 1))
        if shape == "chat" and stream:
            assert server.last["stream_options"] == {"include_usage": True}


@pytest.mark.tools
@pytest.mark.parametrize("shape", METHODS)
async def test_stream_that_is_cut_pays_the_reservation(tmp_path: Path, shape: str) -> None:
    provider, method, arguments = METHODS[shape]
    async with model_placed(provider, tmp_path, server=Server(cut=True), limits=LIMITS) as place:
        await place.call((method, {**arguments, "stream": True}))
        (usage,) = await recorded(place)
        assert (usage.counted, usage.output_tokens in (None, 1)) == ("reservation", True)
        assert place.place.answers[0].answer == "none"
        assert used(place) == (usage.tokens, 1)


@pytest.mark.tools
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("shape", METHODS)
async def test_answer_without_usage_pays_the_reservation(tmp_path: Path, shape: str, stream: bool) -> None:
    provider, method, arguments = METHODS[shape]
    arguments = {**arguments, **{name: 900 for name in arguments if name.startswith("max_")}}
    async with model_placed(provider, tmp_path, server=Server(None), limits=LIMITS) as place:
        await place.call((method, {**arguments, "stream": stream}))
        (usage,) = await recorded(place)
        assert (usage.counted, usage.input_tokens) == ("reservation", None)
        assert 900 < usage.tokens < 1000
        assert used(place) == (usage.tokens, 1)


@pytest.mark.tools
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("shape", METHODS)
async def test_lying_usage_of_zero_pays_the_estimate(tmp_path: Path, shape: str, stream: bool) -> None:
    provider, method, arguments = METHODS[shape]
    async with model_placed(provider, tmp_path, server=Server((0, 0)), limits=LIMITS) as place:
        await place.call((method, {**arguments, "stream": stream}))
        (usage,) = await recorded(place)
        assert (usage.input_tokens, usage.output_tokens, usage.counted) == (0, 0, "estimate")
        assert 500 <= usage.tokens < 520
        await until(lambda: used(place) == (usage.tokens, 1))


@pytest.mark.tools
@pytest.mark.parametrize(
    ("limits", "text"),
    [(ModelLimits(tokens=1500), "730 of 1500 tokens"), (ModelLimits(requests=1), "1 of 1 requests")],
    ids=["tokens", "requests"],
)
@pytest.mark.parametrize("shape", METHODS)
async def test_sdk_shows_a_spent_budget_and_does_not_try_again(
    tmp_path: Path, shape: str, limits: ModelLimits, text: str
) -> None:
    provider, method, arguments = METHODS[shape]
    arguments = {**arguments, **{name: 900 for name in arguments if name.startswith("max_")}}
    async with model_placed(provider, tmp_path, server=Server(), limits=limits) as place:
        first, second = await place.call((method, arguments), (method, arguments), retries=2)
        assert "answer" in first
        assert (second["status"], second["kind"]) == (403, "PermissionDeniedError")
        assert "budget_spent" in second["message"]
        assert text in second["message"]
        assert "have another task assigned" in second["message"]
        assert place.place.codes == ["budget_spent"]
        assert len(place.server.requests) == 1


async def post(place: ModelPlace, **changes: Any) -> httpx.Response:
    async with httpx.AsyncClient(timeout=20) as http:
        return await http.post(f"{place.url}/v1/chat/completions", json={**CHAT, **changes})


async def test_two_requests_in_flight_cannot_exceed_the_limit_together(tmp_path: Path) -> None:
    server = Server()
    server.answers = asyncio.Event()
    async with model_placed("openai", tmp_path, server=server, limits=ModelLimits(tokens=1500)) as place:
        first = asyncio.create_task(post(place, max_completion_tokens=1000))
        await until(lambda: len(server.requests) == 1)
        second = await post(place, max_completion_tokens=1000)
        assert second.json()["code"] == "budget_spent"
        server.answers.set()
        assert (await first).status_code == 200
        await until(lambda: used(place) == (730, 1))
        assert (await post(place, max_completion_tokens=700)).status_code == 200


async def test_output_limit_is_set_where_the_request_has_none_and_counts_for_each_choice(
    tmp_path: Path,
) -> None:
    limits = ModelLimits(tokens=2 * OUTPUT_TOKENS + 100)
    server = Server(None)
    async with model_placed("openai", tmp_path, server=server, limits=limits) as place:
        assert (await post(place, n=3)).json()["code"] == "budget_spent"
        assert (await post(place, n=2, max_tokens=None, metadata={"é": "ü"})).status_code == 200
        assert server.last == {
            **CHAT, "n": 2, "max_tokens": None, "max_completion_tokens": OUTPUT_TOKENS, "metadata": {"é": "ü"},
        }  # fmt: skip
        assert used(place)[0] >= 2 * OUTPUT_TOKENS


@pytest.mark.parametrize("number", [0, -1, 1.5, "9", True, 10**16])
async def test_limit_that_is_no_number_is_refused(tmp_path: Path, number: Any) -> None:
    server = Server()
    async with model_placed("openai", tmp_path, server=server, limits=LIMITS) as place:
        for name in ("max_tokens", "max_completion_tokens", "n"):
            assert (await post(place, **{name: number})).json()["code"] == "model_request_invalid"
        assert used(place) == (0, 0)
        assert server.requests == []


async def test_request_that_the_provider_refuses_pays_no_tokens(tmp_path: Path) -> None:
    server = Server()
    async with model_placed("openai", tmp_path, server=server, limits=LIMITS) as place:
        server.status = b"429 Too Many Requests"
        assert (await post(place)).status_code == 429
        assert await recorded(place) == [ModelUsage(tokens=0, counted="nothing")]
        await until(lambda: used(place) == (0, 1))


async def test_task_without_limits_sends_its_request_unchanged_and_its_usage_is_recorded(
    tmp_path: Path,
) -> None:
    server = Server()
    async with model_placed("openai", tmp_path, server=server) as place:
        body = json.dumps({**CHAT, "stream": True, "max_tokens": "many"}).encode()
        async with httpx.AsyncClient() as http:
            url, headers = f"{place.url}/v1/chat/completions", {"Content-Type": "application/json"}
            assert (await http.post(url, content=body, headers=headers)).status_code == 200
            assert server.requests[-1].body == body
            assert (await http.post(url, json=CHAT)).status_code == 200
        assert [one.tokens for one in await recorded(place)] == [730]
        assert used(place) == (0, 0)


class Failing:
    """Budgets in a Redis that is away, or has lost them."""

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome

    async def reserve(self, budget: Budget, tokens: int) -> Any:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    async def settle(self, budget: Budget, *, tokens: int, requests: int) -> None:
        raise UnavailableError("Redis is away")


@pytest.mark.parametrize(
    ("outcome", "status", "code"),
    [(UnavailableError("Redis is away"), 503, "unavailable"), ("lost", 403, "budget_lost")],
    ids=["away", "lost"],
)
async def test_task_with_a_limit_is_denied_where_what_it_used_is_not_known(
    tmp_path: Path, outcome: Any, status: int, code: str
) -> None:
    server = Server()
    async with model_placed(
        "openai", tmp_path, server=server, limits=LIMITS, budgets=Failing(outcome)
    ) as place:
        answer = await post(place)
        assert (answer.status_code, answer.json()["code"]) == (status, code)
        assert server.requests == []


async def test_task_without_a_limit_needs_no_redis(tmp_path: Path) -> None:
    away = Failing(UnavailableError("Redis is away"))
    async with model_placed("openai", tmp_path, server=Server(), budgets=away) as place:
        assert (await post(place)).status_code == 200
