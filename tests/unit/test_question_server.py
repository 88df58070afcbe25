"""The server on the loopback interface answers the sign page alone, and takes one answer that verifies."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
import pytest

from ringfence.client.errors import InvalidCallError
from ringfence.client.passkeys.questions import MAX_ANSWER_BYTES, NotSignedError, QuestionServer

ORIGIN = "http://localhost:8711"
QUESTION = b'{"user":"sam"}'


def accept(answer: Mapping[str, Any]) -> str:
    if answer.get("answer") != "signed":
        raise InvalidCallError("that is something else")
    return "verified"


@pytest.fixture
async def server() -> AsyncIterator[QuestionServer[str]]:
    async with QuestionServer(ORIGIN, accept) as made:
        made.ask(QUESTION)
        yield made


async def send(
    server: QuestionServer[str],
    method: str = "GET",
    content: bytes | None = None,
    path: str = "",
    **headers: str,
) -> httpx.Response:
    sent = {"Origin": ORIGIN, "Content-Type": "text/plain", **headers}
    async with httpx.AsyncClient(trust_env=False) as http:
        return await http.request(
            method,
            path or server.url,
            content=content,
            headers={name: value for name, value in sent.items() if value},
        )


async def test_the_page_gets_the_question_and_hands_over_the_answer(server: QuestionServer[str]):
    got = await send(server)
    assert (got.status_code, got.content) == (200, QUESTION)
    assert got.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert "no-store" in got.headers["Cache-Control"]
    assert (await send(server, "POST", b'{"answer":"signed"}')).status_code == 200
    assert await server.answer(1) == "verified"
    # Once.
    assert (await send(server)).status_code == 410
    assert (await send(server, "POST", b'{"answer":"signed"}')).status_code == 410


async def test_invalid_answer_is_refused_and_the_server_waits_on(server: QuestionServer[str]):
    for wrong, status in (
        (b'{"answer":"other"}', 422),
        (b"[]", 400),
        (b'{"answer":"signed","answer":"signed"}', 400),
        (b"", 400),
        (b'{"answer":"' + b"x" * MAX_ANSWER_BYTES + b'"}', 413),
    ):
        answer = await send(server, "POST", wrong)
        assert answer.status_code == status, wrong[:40]
        assert answer.json()["message"]
    assert (await send(server, "POST", b'{"answer":"signed"}')).status_code == 200


async def test_refusal_on_the_sign_page_ends_the_wait(server: QuestionServer[str]):
    assert (await send(server, "POST", b'{"refused":true}')).status_code == 200
    with pytest.raises(NotSignedError, match="refused on the sign page"):
        await server.answer(1)


async def test_without_an_answer_the_wait_ends(server: QuestionServer[str]):
    with pytest.raises(NotSignedError, match="ask again"):
        await server.answer(0.01)


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": f"{ORIGIN}.evil.example"},
        {"Host": "evil.example"},
        {"Host": "localhost"},
    ],
    ids=str,
)
async def test_another_page_gets_nothing(server: QuestionServer[str], method: str, headers: dict[str, str]):
    answer = await send(server, method, b'{"answer":"signed"}' if method == "POST" else None, **headers)
    assert answer.status_code == 404
    assert QUESTION not in answer.content
    assert "Access-Control-Allow-Origin" not in answer.headers
    assert (await send(server)).status_code == 200, "it counted as an answer"


async def test_another_path_gets_what_another_page_gets(server: QuestionServer[str]):
    base = server.url.rpartition("/")[0]
    known = await send(server, Origin="https://evil.example")
    for path in ("/", "/x", server.url.removeprefix(base) + "x", server.url.removeprefix(base)[:-1]):
        answer = await send(server, path=base + path)
        assert (answer.status_code, answer.content) == (known.status_code, known.content)


async def test_other_methods_do_nothing(server: QuestionServer[str]):
    for method in ("PUT", "DELETE", "HEAD"):
        assert (await send(server, method)).status_code == 405
    preflight = await send(server, "OPTIONS")
    assert (preflight.status_code, preflight.headers["Access-Control-Allow-Private-Network"]) == (204, "true")


async def test_the_path_cannot_be_guessed():
    async with QuestionServer(ORIGIN, accept) as first, QuestionServer(ORIGIN, accept) as second:
        paths = {one.url.rpartition("/")[2] for one in (first, second)}
        assert len(paths) == 2
        assert all(len(path) >= 43 for path in paths)  # 256 bits
        assert first.url.startswith("http://127.0.0.1:")
