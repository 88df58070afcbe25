"""The headers that a person approves are the headers that go on: nothing else of the agent's, in no other form."""

from __future__ import annotations

import struct
from hashlib import sha256

import pytest

from ringfence.gateway.contract import Attempt, Headers
from ringfence.gateway.dataplane.headers import forwarded_headers, request_head
from ringfence.gateway.dataplane.request_reader import ListenerContext, read_request
from ringfence.gateway.decision.approval_questions import (
    DROPPED,
    MAX_SHOWN_CHARS,
    MAX_VALUE_CHARS,
    digest_of_headers,
    headers_to_approve,
    shown_to_approver,
    unshowable_reason,
)
from ringfence.kernel.http1.head import RequestHead, parse_request
from ringfence.messages.approval import MAX_HEADER_NAME_CHARS, MAX_HEADERS
from ringfence.messages.registry import BackendSettings, TargetState

INJECTED = {"Authorization": "Bearer of-the-target"}


def head(*lines: str, first: str = "PUT /a HTTP/1.1") -> RequestHead:
    return parse_request(
        "".join(f"{line}\r\n" for line in (first, "Host: hub.example", *lines)).encode("latin-1")
    )


def target(**backend: str) -> TargetState:
    return TargetState(
        target_id="hub", description="a hub", verbs=(), status="active", requests=(), max_ttl_s=600, keys=(),
        backend=BackendSettings.model_validate({"kind": "jwt", **backend}),
    )  # fmt: skip


def attempt(headers: Headers, *, sent_by_gateway: bool = True) -> Attempt:
    return Attempt(
        "hub.example", "https", "PUT", "/a", headers=lambda: headers, sent_by_gateway=sent_by_gateway
    )  # fmt: skip


def forwarded(request: RequestHead, approved: Headers) -> list[str]:
    upgrade = ("upgrade", "websocket") in approved
    raw = request_head(request, "/a", "hub.example", INJECTED, length=3, upgrade=upgrade, approved=approved)
    return raw.decode("latin-1").split("\r\n")[1:-2]


def test_forwarded_headers_keep_their_order_and_leave_out_hop_headers() -> None:
    request = head(
        "Content-Type: text/plain", "X_Note:  one ", "Connection: keep-alive, X-Hop", "X-Hop: 1", "TE: trailers",
        "Authorization: DPoP 0b8a1a5c-9a3e-5d57-8a2b-4a8d2f7f5b11", "DPoP: a.b.c", "X-Ringfence-Label: pr",
        "X-Forwarded-For: 10.0.0.1", "Proxy-Authorization: Basic eDo=", "Accept-Encoding: gzip", "A-IM: feed",
        "Content-Length: 3", "X-Note: two", "X-Note: \xe9\ttab", "Keep_Alive: 5",
    )  # fmt: skip
    assert forwarded_headers(request, upgrade=False) == (
        ("content-type", "text/plain"), ("x-note", "one"), ("x-note", "two"), ("x-note", "\xe9\ttab"),
    )  # fmt: skip


def test_forwarded_headers_are_the_hashed_ones_and_the_credential() -> None:
    request = head("X_Note:  one ", "Content-Type: text/plain", "Date: today", "X-Note: \xe9")
    approved = headers_to_approve(attempt(forwarded_headers(request, upgrade=False)), target())
    assert approved == (("x-note", "one"), ("content-type", "text/plain"), ("x-note", "\xe9"))
    assert forwarded(request, approved) == [
        "Host: hub.example", "x-note: one", "content-type: text/plain", "x-note: \xe9", "Accept-Encoding: identity",
        "Authorization: Bearer of-the-target", "Content-Length: 3",
    ]  # fmt: skip


def test_per_attempt_headers_are_neither_hashed_nor_forwarded() -> None:
    lines = [f"{name.title()}: 1" for name in sorted(DROPPED)] + ["X_Request_Id: 2", "X-Note: 1"]
    approved = headers_to_approve(attempt(forwarded_headers(head(*lines), upgrade=False)), target())
    assert approved == (("x-note", "1"),)
    assert forwarded(head(*lines), approved)[1] == "x-note: 1"
    assert {"traceparent", "tracestate", "baggage", "date", "x-request-id"} == DROPPED


@pytest.mark.parametrize("name", ["X-Api-Key", "x_api_key"])
def test_the_header_of_the_credential_is_the_gateways_own(name: str) -> None:
    takes_key = target(kind="http", url="https://hub.example", auth="header", header="X-Api-Key")
    sent = forwarded_headers(head(f"{name}: mine", "X-Note: 1"), upgrade=False)
    assert headers_to_approve(attempt(sent), takes_key) == (("x-note", "1"),)
    assert headers_to_approve(attempt(sent), target()) == (("x-api-key", "mine"), ("x-note", "1"))


def test_an_upgrade_is_approved_as_one() -> None:
    lines = ("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13")
    upgrade = ("Connection: Upgrade", "Upgrade: websocket")
    first = "GET /a HTTP/1.1"
    found = {}
    for name, request in (
        ("tunnel", head(*lines, *upgrade, first=first)),
        ("plain", head(*lines, first=first)),
    ):
        _, made = read_request(
            request,
            ListenerContext("somebody", "https", own_authorities=None, task_id="task"),
            lambda _: True,
        )
        assert made.headers is not None
        found[name] = made.headers() or ()
    assert found["tunnel"] == (*found["plain"], ("upgrade", "websocket"))
    assert digest_of_headers(found["tunnel"]) != digest_of_headers(found["plain"])
    sent = forwarded(head(*lines, *upgrade, first=first), found["tunnel"])
    assert [line for line in sent if "pgrade" in line] == ["Connection: Upgrade", "Upgrade: websocket"]


def test_a_proxy_may_forward_what_it_shows() -> None:
    for name in DROPPED:
        assert headers_to_approve(attempt(((name, "1"),), sent_by_gateway=False), target()) is None
    sent = (("x-note", "1"),)
    assert headers_to_approve(attempt(sent, sent_by_gateway=False), target()) == sent
    assert headers_to_approve(Attempt("hub.example", "https", "PUT", "/a"), target()) is None


def test_the_digest_is_over_names_and_values_with_their_lengths() -> None:
    def part(raw: bytes) -> bytes:
        return struct.pack(">I", len(raw)) + raw

    expected = sha256(part(b"a") + part(b"\xe9") + part(b"b") + part(b"")).hexdigest()
    assert digest_of_headers((("a", "\xe9"), ("b", ""))) == expected


@pytest.mark.parametrize(
    "other",
    [
        (),
        (("a", "1"),),
        (("b", "2"), ("a", "1")),
        (("a", "1"), ("b", "2"), ("b", "2")),
        (("a", "1"), ("b", "2 ")),
        (("a", "1"), ("b", ""), ("2", "")),
        (("a1", ""), ("b", "2")),
        (("a", "1b2"),),
        (("a", "2"), ("b", "1")),
    ],
)
def test_other_headers_have_another_digest(other: Headers) -> None:
    assert digest_of_headers(other) != digest_of_headers((("a", "1"), ("b", "2")))


def test_a_person_sees_values_of_the_list_and_names_of_the_others() -> None:
    headers = (
        ("content-type", "application/json"), ("cookie", "s3cret"), ("x-api-key", "s3cret"), ("destination", "/b"),
        ("x-gitlab-token", "s3cret"), ("x-amz-security-token", "s3cret"),
    )  # fmt: skip
    told = shown_to_approver(headers)
    assert [one.name for one in told] == [name for name, _ in headers]
    assert [one.value for one in told] == ["application/json", None, None, "/b", None, None]


@pytest.mark.parametrize(
    "headers",
    [
        (("content-type", "text/\xe9"),),
        (("destination", "/b\ttab"),),
        (("destination", "x" * (MAX_VALUE_CHARS + 1)),),
        tuple((f"x-{number:0200}", "") for number in range(MAX_SHOWN_CHARS // 200)),
        tuple((f"x-{number}", "") for number in range(MAX_HEADERS + 1)),
        (("x" * (MAX_HEADER_NAME_CHARS + 1), ""),),
    ],
)
def test_unshowable_headers_cannot_be_approved(headers: Headers) -> None:
    assert unshowable_reason(headers) is not None


def test_longest_showable_headers_can_be_approved() -> None:
    assert unshowable_reason((("content-type", "x" * MAX_VALUE_CHARS), ("x-note", "\xe9" * 9000))) is None
    many = tuple((f"x-{number:0{MAX_HEADER_NAME_CHARS - 2}}", "") for number in range(30))
    for headers in (many, tuple((f"x-{number}", "") for number in range(MAX_HEADERS))):
        assert unshowable_reason(headers) is None
        assert len(shown_to_approver(headers)) == len(headers)
