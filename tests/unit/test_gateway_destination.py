"""Where a refused request was going: whatever its sender wrote, it is bounded, printable, and without secrets."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.gateway.contract import Attempt
from ringfence.gateway.events.spool import (
    destination_of,
    destination_of_line,
    printable_method,
    unparsed_line,
)
from ringfence.messages.operations import MAX_PATH_CHARS, Destination

HANDLE = "0b8a1a5c-9a3e-5d57-8a2b-4a8d2f7f5b11"
JWS = "eyJhbGciOiJFZERTQSJ9.eyJzdWIiOiJib3QifQ.c2lnbmF0dXJlLW9mLXRlc3Rz"


def at(target: str, authority: str | None = "hub.example", **fields: Any) -> Destination:
    return destination_of(Attempt(authority, "https", "GET", target, **fields), None, HANDLE)


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("/a/b%2Fc", "/a/b%2Fc"),
        ("/a?token=s3cret", "/a"),
        ("/a#s3cret?b", "/a"),
        ("/a\x1b[31m\xe9\n", "/a?[31m??"),
        (f"/use/{HANDLE}", "/use/[redacted]"),
        (f"/use/{HANDLE.upper()}/b", "/use/[redacted]/b"),
        (f"/use/{HANDLE.replace('-', '%2d')}", "[redacted]"),
        (f"/login/{JWS}", "/login/[redacted]"),
        (f"/login/{JWS.replace('.', '%2E')}", "[redacted]"),
        ("/hook/ghp_0123456789abcdefghij0123456789abcdef", "/hook/[redacted]"),
        ("/matrix;token=s3cret-value/b", "/matrix;token=[redacted]"),
        ("/https://me:s3cret@hub.example/", "/https://[redacted]@hub.example/"),
        ("/https://t0ken@hub.example/", "/https://[redacted]@hub.example/"),
        ("//me:s3cret@hub.example/a", "//[redacted]@hub.example/a"),
        ("/\\me:s3cret@hub.example/a", "/\\[redacted]@hub.example/a"),
        ("/%2F%2Fme:s3cret@hub.example/a", "[redacted]"),
        ("/@scope/package//1.0/@latest", "/@scope/package//1.0/@latest"),
        ("/" + "a" * MAX_PATH_CHARS, "/" + "a" * (MAX_PATH_CHARS - 4) + "..."),
        ("hub.example:443", None),
    ],
)
def test_a_path_is_kept_without_what_does_not_belong_there(target: str, path: str | None) -> None:
    assert at(target).path == path


@pytest.mark.parametrize(
    ("authority", "host", "port"),
    [
        ("hub.example", "hub.example", 443),
        ("HUB.example:8443", "hub.example", 8443),
        ("me:s3cret@hub.example:1", "hub.example", 1),
        ("me:s3cr@et@hub.example", "hub.example", 443),
        ("[2001:DB8::1]:8443", "2001:db8::1", 8443),
        ("[2001:db8::1]", "2001:db8::1", 443),
        ("hub.example:0", "hub.example", None),
        ("hub.example:99999", "hub.example", None),
        ("hub.example:8\u0664", "hub.example", None),
        ("h\x1b[31mub.example", "h??31mub.example", 443),
        ("a" * 300, "a" * 253, 443),
        ("me@", None, 443),
        ("hub.example/a?token=s3cret", "hub.example", 443),
        ("me:s3c/ret@hub.example:1", "hub.example", 1),
        ("2001:db8::1", "2001:db8::1", None),
    ],
)
def test_a_host_is_kept_without_user_information(authority: str, host: str | None, port: int | None) -> None:
    found = at("/", authority)
    assert (found.host, found.port) == (host, port)


def test_a_target_that_is_named_is_where_its_record_says() -> None:
    attempt = Attempt(None, "http", "GET", "/a", target_id="hub")
    assert destination_of(attempt, "https://hub.example:8443") == Destination(
        scheme="https", host="hub.example", port=8443, path="/a"
    )
    assert destination_of(attempt, None) == Destination(scheme="http", path="/hub/a")


@pytest.mark.parametrize(
    ("method", "target", "expected"),
    [
        (
            "GET",
            "http://me:s3cret@a.example/b?c",
            Destination(scheme="http", host="a.example", port=80, path="/b"),
        ),
        ("GET", "https://a.example?c", Destination(scheme="https", host="a.example", port=443, path="")),
        ("GET", "gopher://a.example:70/1", Destination(host="a.example", port=70, path="/1")),
        ("GET", "/a", Destination(scheme="http", host="said.example", port=80, path="/a")),
        ("CONNECT", "a.example:22", Destination(scheme="https", host="a.example", port=22)),
        ("OPTIONS", "*", Destination(scheme="http", host="said.example", port=80, path="*")),
        (
            "GET",
            "http://me:s3/cr?et@a.example:81/b?c",
            Destination(scheme="http", host="a.example", port=81, path="/b"),
        ),
        ("CONNECT", "me:s3/cret@a.example:22", Destination(scheme="https", host="a.example", port=22)),
        ("CONNECT", "a.example:22?token=s3cret", Destination(scheme="https", host="a.example", port=22)),
        ("connect", "me:s3cret@a.example:22", Destination(scheme="https", host="a.example", port=22)),
        ("GET", "me:s3cret@a:22", Destination(scheme="http", host="said.example", port=80, path="a:22")),
        ("GET", "http:/me:s3cret@a/b", Destination(scheme="http", host="said.example", port=80, path="a/b")),
    ],
)
def test_a_request_line_says_where_it_leads(method: str, target: str, expected: Destination) -> None:
    assert destination_of_line(method, target, "said.example", "http") == expected


@pytest.mark.parametrize(
    ("line", "method", "host", "path"),
    [
        (b"GET\thttp://me:s3cret@a.example/b?t0ken HTTP/1.1", "GET", "a.example", "/b"),
        (b"GET  http://me:s3cret@a.example/b?t0ken HTTP/1.1", "GET", "a.example", "/b"),
        (b"http://me:s3cret@a.example/b?t0ken", "http?", None, None),
        (b"GET?t0ken=s3cret /b HTTP/1.1", "GET?", "said.example", "/b"),
        (b"\x16\x03\x01\x02", "????", None, None),
        (b"me:s3cret@a.example /b", "me?", "said.example", "/b"),
    ],
)
def test_no_part_of_a_url_is_taken_for_a_method(
    line: bytes, method: str, host: str | None, path: str | None
) -> None:
    told, target, said = unparsed_line(line + b"\r\nHost: said.example\r\n")
    went = destination_of_line(told, target, said, "http") if target else Destination()
    assert (printable_method(told), went.host, went.path) == (method, host, path)


@given(st.binary(max_size=600), st.text(max_size=300))
def test_destination_is_bounded_and_printable_for_any_input(head: bytes, text: str) -> None:
    method, target, host = unparsed_line(head)
    for found in (
        destination_of_line(method, target, host, "https"),
        destination_of_line("GET", text, text, "http"),
        at(f"/{text}", text or None),
    ):
        shown = found.model_dump_json(exclude_none=True)
        assert shown.isascii()
        assert shown.isprintable()
        assert len(shown) < 800
    told = printable_method(method)
    assert told is None or (len(told) <= 32 and told.isascii() and told.isprintable())
