"""What proxies ask, and what they are told: 200, 401 or 403, and nothing else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import httpx
import pytest

from ringfence.gateway.contract import (
    Attempt,
    BlockedRequest,
    Gate,
    HoldableRequest,
    PresentedIdentity,
    Verdict,
)
from ringfence.gateway.proxies import PROBLEM, READERS, ProxyAuth, WaitingProxy
from ringfence.kernel.base.errors import UnavailableError
from ringfence.messages.credential import Reason
from ringfence.messages.operations import Destination

ID = "d9428888-122b-51e1-b85c-61cd3cbb3210"
ALLOWED = Verdict(ID, allowed=True, status=200)
FORWARDED = [
    ("X-Forwarded-Method", "PUT"), ("X-Forwarded-Uri", "/a%2Fb?x=%20y"), ("X-Forwarded-Host", "hub.example:8443"),
    ("X-Forwarded-Proto", "https"),
]  # fmt: skip
ENVOY = [("Host", "hub.example"), ("X-Forwarded-Proto", "https")]


class Played:
    """A gate that says what it is told to, and remembers what it was asked."""

    def __init__(self) -> None:
        self.verdict: Verdict | Exception = ALLOWED
        self.inject: Mapping[str, str] | Exception = {"Authorization": "Bearer x"}
        self.asked: list[tuple[PresentedIdentity, Attempt]] = []
        self.blocked: list[BlockedRequest] = []

    async def decide(
        self, presented: PresentedIdentity, attempt: Attempt, *, holdable: HoldableRequest
    ) -> Verdict:
        self.asked.append((presented, attempt))
        if isinstance(self.verdict, Exception):
            raise self.verdict
        return self.verdict

    async def headers_to_inject(self, verdict: Verdict) -> Mapping[str, str]:
        if isinstance(self.inject, Exception):
            raise self.inject
        return self.inject

    async def ask(
        self, path: str, headers: list[tuple[str, str]], method: str = "GET", **fields: Any
    ) -> httpx.Response:
        transport = httpx.ASGITransport(ProxyAuth(cast(Gate, self), READERS, self.blocked.append))
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
            return await http.request(method, path, headers=headers, **fields)


@pytest.fixture
def played() -> Played:
    return Played()


@pytest.mark.parametrize(
    ("path", "headers", "went"),
    [
        ("/authz/fwd/hub?odd", FORWARDED, ("hub.example", 8443, "/a%2Fb")),
        ("/authz/envoy-target/hub/a?b", [*ENVOY, ENVOY[1]], ("hub.example", 443, "/a")),
        ("/authz/envoy/a", [ENVOY[0]], ("hub.example", 443, "/a")),
    ],
)  # fmt: skip
async def test_a_question_that_is_not_clear_is_recorded_with_where_it_was_going(
    played: Played, path: str, headers: list[tuple[str, str]], went: tuple[str, int, str]
) -> None:
    await played.ask(path, headers, method="PUT")
    (blocked,) = played.blocked
    host, port, path = went
    assert (blocked.code, blocked.method) == ("question_invalid", "PUT")
    assert blocked.destination == Destination(scheme="https", host=host, port=port, path=path)


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "TRACE", "DELETE", "PROPFIND"])
@pytest.mark.parametrize("chunked", [False, True])
async def test_question_with_body_that_a_target_may_execute_is_denied(
    played: Played, method: str, chunked: bool
) -> None:
    told = [("X-Forwarded-Method", method), *FORWARDED[1:]]
    for path, headers, by in (
        ("/authz/fwd/hub?body=whole", told, "GET"),
        ("/authz/fwd/hub", told, "GET"),
        ("/authz/envoy-target/hub/a", ENVOY, method),
    ):
        answer = await played.ask(path, headers, by, content=_pieces() if chunked else b"x")
        assert (answer.status_code, json.loads(answer.headers[PROBLEM])["code"]) == (403, "body_refused")
        assert (played.blocked[-1].code, played.blocked[-1].method) == ("body_refused", method)
    assert played.asked == []
    for headers in ([], [("Content-Length", "0")]):
        assert (await played.ask("/authz/fwd/hub", [*told, *headers])).status_code == 200


async def _pieces() -> AsyncIterator[bytes]:
    yield b"x"


async def test_headers_count_as_seen_only_where_the_configuration_promises_all(played: Played) -> None:
    sent = [
        *FORWARDED, ("Authorization", "DPoP LEASE"), ("DPoP", "p"), ("X-Ringfence-Label", "pr"), ("X_Note", "2"),
        ("Content-Type", "text/plain"), ("X-Note", "1"), ("X-Note", "2"), ("Traceparent", "t"),
    ]  # fmt: skip
    await played.ask("/authz/fwd/hub?body=whole", sent)
    await played.ask("/authz/envoy-target/hub/a", [*ENVOY, *sent[4:]])
    assert [attempt.headers for _, attempt in played.asked] == [None, None]
    await played.ask("/authz/fwd/hub?body=whole&headers=whole", sent)
    headers = played.asked[-1][1].headers
    assert headers is not None
    told = headers()
    assert told is not None
    assert [one for one in told if one[0] not in ("accept", "accept-encoding", "user-agent")] == [
        ("x-note", "2"), ("content-type", "text/plain"), ("x-note", "1"), ("x-note", "2"), ("traceparent", "t"),
    ]  # fmt: skip
    assert "accept-encoding" in dict(told), "the proxy forwards it"
    for query in ("headers=whole", "headers=whole&body=whole", "body=whole&headers=some"):
        answer = await played.ask(f"/authz/fwd/hub?{query}", sent)
        assert (answer.status_code, answer.json()["code"]) == (403, "question_invalid")


async def test_forwardable_headers_are_hashed_whatever_their_prefix(played: Played) -> None:
    others = [
        ("X-Forwarded-User", "root"),
        ("x_forwarded_prefix", "/p"),
        ("Proxy-Note", "1"),
        ("X-Ringfence-X", "2"),
    ]
    own = [("X-Forwarded-For", "10.0.0.1"), ("Proxy-Connection", "close"), ("X-Ringfence-Handle", "LEASE")]
    await played.ask("/authz/fwd/hub?body=whole&headers=whole", [*FORWARDED, *others, *own])
    headers = played.asked[-1][1].headers
    assert headers is not None
    told = [one for one in headers() or () if one[0] not in ("accept", "accept-encoding", "user-agent")]
    assert told == [(name.lower().replace("_", "-"), value) for name, value in others]


@pytest.mark.parametrize(
    ("connection", "seen"),
    [
        (["close"], True),
        (["keep-alive, X-Gone"], True),
        (["Destination"], False),
        (["close, x_note"], False),
        (["close", " DESTINATION\t, close"], False),
    ],
)
async def test_headers_named_in_connection_prevent_a_hold(
    played: Played, connection: list[str], seen: bool
) -> None:
    named = [("Connection", one) for one in connection]
    sent = [*FORWARDED, ("Destination", "/b"), ("X-Note", "1"), *named]
    await played.ask("/authz/fwd/hub?body=whole&headers=whole", sent)
    headers = played.asked[-1][1].headers
    assert headers is not None
    assert (headers() is not None) == seen


async def test_a_proxy_tells_of_the_request_as_it_came(played: Played) -> None:
    shown = [("Authorization", "DPoP LEASE"), ("DPoP", "a.b.c"), ("X-Ringfence-Label", "pr-7")]
    answer = await played.ask("/authz/fwd", FORWARDED + shown)
    assert (answer.status_code, answer.headers["authorization"]) == (200, "Bearer x")
    presented, attempt = played.asked[0]
    assert {"dpop", "x-ringfence-label"} <= presented.header_names
    assert "authorization" not in presented.header_names
    presented = replace(presented, header_names=frozenset())
    assert presented == PresentedIdentity(handle="LEASE", proof="a.b.c", htu="https://hub.example:8443/a%2Fb")
    assert attempt == Attempt(
        authority="hub.example:8443", scheme="https", method="PUT", target="/a%2Fb?x=%20y", label="pr-7"
    )
    await played.ask("/authz/fwd/hub", FORWARDED)
    assert (played.asked[1][1].target_id, played.asked[1][1].authority) == ("hub", None)
    assert played.asked[1][0].handle is None


@pytest.mark.parametrize("authorization", ["Bearer x", "Basic x", "DPoPx", ""])
async def test_only_a_dpop_handle_is_one(played: Played, authorization: str) -> None:
    await played.ask("/authz/fwd", [*FORWARDED, ("Authorization", authorization)])
    assert played.asked[0][0].handle is None


def without(name: str) -> list[tuple[str, str]]:
    return [one for one in FORWARDED if one[0] != name]


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        *(("/authz/fwd", without(name)) for name, _ in FORWARDED),
        *(("/authz/fwd", [*FORWARDED, one]) for one in FORWARDED),
        ("/authz/fwd", [*FORWARDED, ("Authorization", "DPoP A"), ("Authorization", "DPoP B")]),
        ("/authz/fwd", [*FORWARDED, ("DPoP", "a"), ("DPoP", "b")]),
        ("/authz/fwd", [*without("X-Forwarded-Proto"), ("X-Forwarded-Proto", "https, http")]),
        ("/authz/fwd", [*without("X-Forwarded-Uri"), ("X-Forwarded-Uri", "https://hub.example/")]),
        ("/authz/fwdx", FORWARDED),
        ("/authz/fwd/hub?body=none", FORWARDED),
        ("/authz/fwd/hub?body=whole&x", FORWARDED),
        ("/authz/envoy", ENVOY),
        ("/authz/envoys/a", ENVOY),
        ("/authz/envoy-target/hub", ENVOY),
        ("/authz/envoy-target//a", ENVOY),
        ("/", FORWARDED),
        ("/healthz", FORWARDED),
        ("/healthz", [*FORWARDED, ("Host", "hub.example/authz/fwd?")]),
        ("/authz/envoy/a", [("Host", "hub.example")]),
        ("/authz/envoy/a", [*ENVOY, ("x-envoy-auth-partial-body", "true")]),
        ("/authz/envoy/a", [*ENVOY, ("DPoP", "a"), ("DPoP", "b")]),
    ],
)
async def test_incomplete_or_ambiguous_question_is_denied_undecided(
    played: Played, path: str, headers: list[tuple[str, str]]
) -> None:
    answer = await played.ask(path, headers)
    assert answer.status_code == 403
    assert played.asked == []
    assert "authorization" not in answer.headers


async def test_envoy_shows_the_request_itself_and_its_body(played: Played) -> None:
    shown = [("Authorization", "DPoP LEASE"), ("x-envoy-auth-partial-body", "false")]
    path = "/authz/envoy/a%2Fb//c?x=%20y"
    await played.ask(path, ENVOY + shown, method="PATCH", content=b'{"a": 1}')
    presented, attempt = played.asked[0]
    assert attempt == Attempt(
        authority="hub.example", scheme="https", method="PATCH", target="/a%2Fb//c?x=%20y", body=b'{"a": 1}'
    )
    assert (presented.handle, presented.htu) == ("LEASE", "https://hub.example/a%2Fb//c")
    await played.ask("/authz/envoy/a", ENVOY, method="POST", content=b"unseen")
    assert played.asked[1][1].body is None
    await played.ask("/authz/envoy/a", ENVOY + shown, method="POST", content=b"x" * (2**20 + 1))
    assert played.asked[2][1].body is None


async def test_authorization_is_always_set_and_never_the_agents_own(played: Played) -> None:
    played.inject = {"X-Api-Key": "s"}
    answer = await played.ask("/authz/fwd", [*FORWARDED, ("Authorization", "DPoP LEASE")])
    assert (answer.headers["authorization"], answer.headers["x-api-key"]) == ("none", "s")
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("status", [401, 403, 413, 429, 503])
async def test_every_no_is_401_or_403(played: Played, status: int) -> None:
    why = Reason(code="some_code", message="some reason")
    played.verdict = Verdict(ID, allowed=False, status=status, reasons=(why,), nonce="n")
    answer = await played.ask("/authz/fwd", FORWARDED)
    assert answer.status_code == (401 if status == 401 else 403)
    assert answer.json()["code"] == "some_code"
    assert answer.headers["dpop-nonce"] == "n"
    assert "authorization" not in answer.headers


@pytest.mark.parametrize("size", [1, 1000])
async def test_the_problem_stands_in_a_header_too_that_every_proxy_takes(played: Played, size: int) -> None:
    reasons = tuple(Reason(code=f"code_{number}", message="é" * size) for number in range(20))
    played.verdict = Verdict(ID, allowed=False, status=403, reasons=reasons)
    answer = await played.ask("/authz/fwd", FORWARDED)
    assert len(answer.json()["reasons"]) == 20
    short = answer.headers["x-ringfence-problem"]
    assert short.isascii()
    assert len(short) <= 2048
    assert {"code", "status", "title", "type", "instance"} <= set(json.loads(short))
    assert json.loads(short)["code"] == "code_0"
    answer = await played.ask("/authz/nothing", FORWARDED)
    assert json.loads(answer.headers["x-ringfence-problem"]) == answer.json()


async def test_a_body_is_seen_where_the_configuration_says_that_it_is_whole(played: Played) -> None:
    for path, size in (
        ("/authz/fwd", 1),
        ("/authz/fwd/hub?body=whole", 1),
        ("/authz/fwd?body=whole", 2**20 + 1),
    ):
        await played.ask(path, FORWARDED, content=b"x" * size)
    assert [attempt.body for _, attempt in played.asked] == [None, b"x", None]


async def test_envoy_may_say_which_target_it_stands_before(played: Played) -> None:
    await played.ask("/authz/envoy-target/hub/a%2Fb?x", ENVOY)
    attempt = played.asked[0][1]
    assert (attempt.target_id, attempt.authority, attempt.target) == ("hub", None, "/a%2Fb?x")


@pytest.mark.parametrize("spoil", ["decide", "inject", "unavailable"])
async def test_internal_error_denies_without_details(played: Played, spoil: str) -> None:
    def set_up() -> dict[str, Callable[[], None]]:
        return {
            "decide": lambda: setattr(played, "verdict", RuntimeError("secret")),
            "inject": lambda: setattr(played, "inject", RuntimeError("secret")),
            "unavailable": lambda: setattr(played, "inject", UnavailableError("no credential now")),
        }

    set_up()[spoil]()
    answer = await played.ask("/authz/fwd", FORWARDED)
    assert answer.status_code == 403
    assert "secret" not in answer.text
    assert "authorization" not in answer.headers


async def test_a_proxy_that_hangs_up_is_gone() -> None:
    messages = [{"type": "http.request"}, {"type": "http.disconnect"}]
    gone = asyncio.Event()

    async def receive() -> Any:
        return messages.pop(0)

    WaitingProxy(receive).on_disconnect(gone.set)
    async with asyncio.timeout(10):
        await gone.wait()
    assert await WaitingProxy(receive).read_body() is None


async def test_a_proxy_that_was_answered_is_watched_no_more() -> None:
    leaves, gone = asyncio.Event(), asyncio.Event()

    async def receive() -> Any:
        await leaves.wait()
        return {"type": "http.disconnect"}

    unsubscribe = WaitingProxy(receive).on_disconnect(gone.set)
    await asyncio.sleep(0)
    unsubscribe()
    leaves.set()
    await asyncio.gather(
        *(one for one in asyncio.all_tasks() if one.get_name() == "proxy that waits"), return_exceptions=True
    )
    assert not gone.is_set()
