"""Which request is which verb: the first rule that matches, and nothing where two readers might not agree."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.messages.registry import RequestRule
from ringfence.model.http_targets import (
    MAX_BODY_BYTES,
    Action,
    RequestMap,
    RequestMapError,
)
from ringfence.model.scope.globs import parse_name


def rule(method: str, path: str, verb: str, resource: str = "x", **conditions: Any) -> RequestRule:
    return RequestRule(method=method, path=path, verb=verb, resource=resource, **conditions)


MAP = RequestMap(
    [
        rule("GET", "/", "list", "envs"),
        rule("GET", "/envs/{name}", "read", "env/{name}"),
        rule("PUT", "/files/.ci/{path*}", "ci", "files/.ci/{path*}"),
        rule("PUT", "/files/{path*}", "write", "files/{path*}"),
        rule("POST", "/envs/{name}/runs", "dry-run", "env/{name}", query={"dry": ("1", "true")}),
        rule("POST", "/envs/{name}/runs", "run", "env/{name}"),
        rule("POST", "/reviews", "comment", "reviews", body={"event": ("COMMENT", "ASK")}),
        rule("POST", "/reviews", "approve", "reviews"),
    ]
)


@pytest.mark.parametrize(
    ("method", "target", "verb", "resource"),
    [
        ("GET", "/", "list", "envs"),
        ("GET", "/?page=2", "list", "envs"),
        ("GET", "/envs/staging", "read", "env/staging"),
        ("GET", "/envs/st%61ging", "read", "env/staging"),
        ("GET", "/envs/%C3%A9", "read", "env/é"),
        ("GET", "/envs/a%20b", "read", "env/a b"),
        ("PUT", "/files/a", "write", "files/a"),
        ("PUT", "/files/a/b/c.txt", "write", "files/a/b/c.txt"),
        ("PUT", "/files/.ci/run.yml", "ci", "files/.ci/run.yml"),
        ("PUT", "/files/%2eci/run.yml", "ci", "files/.ci/run.yml"),
        ("PUT", "/files/a/.ci/run.yml", "write", "files/a/.ci/run.yml"),
        ("PUT", "/files/.ci", "write", "files/.ci"),
        ("POST", "/envs/a/runs?dry=1", "dry-run", "env/a"),
        ("POST", "/envs/a/runs?x=y&dry=true", "dry-run", "env/a"),
        ("POST", "/envs/a/runs?dry=0", "run", "env/a"),
        ("POST", "/envs/a/runs", "run", "env/a"),
    ],
)
def test_the_first_rule_that_matches_counts(method: str, target: str, verb: str, resource: str) -> None:
    assert MAP.action(method, target) == Action(verb, resource)


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("get", "/"), ("HEAD", "/"), ("DELETE", "/envs/staging"), ("GET", ""), ("GET", "*"), ("GET", "envs/a"),
        ("GET", "http://elsewhere/envs/a"), ("GET", "//envs/a"), ("GET", "/envs//a"), ("GET", "/envs/"),
        ("GET", "/envs/a/"), ("GET", "/envs/a/b"), ("GET", "/Envs/a"), ("GET", "/envs/."), ("GET", "/envs/.."),
        ("GET", "/envs/%2e"), ("GET", "/envs/%2E%2e"), ("GET", "/x/../envs/a"), ("GET", "/envs/a%2Fb"),
        ("GET", "/envs/a%5Cb"), ("GET", "/envs/a\\b"), ("GET", "/envs/a;x=1"), ("GET", "/envs/a%3Bx"),
        ("GET", "/envs/%2561"), ("GET", "/envs/%"), ("GET", "/envs/%zz"), ("GET", "/envs/%00"), ("GET", "/envs/%0a"),
        ("GET", "/envs/%C0%AE"), ("GET", "/envs/%FF"), ("GET", "/envs/é"), ("GET", "/envs/a b"),
        ("GET", "/envs/a#b"), ("GET", "/envs/a?x#b"), ("GET", "/envs/*"), ("GET", "/envs/%2A"),
        ("GET", "/envs/%7Bx%7D"),
        ("GET", "/envs/%EF%BC%8E"), ("GET", "/envs/%E2%80%8B"), ("GET", "/envs/%20a"),
        ("PUT", "/files" + "/a" * 256),
        ("GET", "/envs/" + "a" * 600), ("GET", "/envs/" + "a/" * 9000), ("PUT", "/files"), ("PUT", "/files/"),
        ("PUT", "/files/a/../.ci/run.yml"), ("PUT", "/files/.ci%2Frun.yml"), ("PUT", "/files/./.ci/run.yml"),
        ("POST", "/envs/a/runs?dry=1&dry=0"), ("POST", "/envs/a/runs?dry=1;x"), ("POST", "/envs/a/runs?dry=+1"),
        ("POST", "/envs/a/runs?dry=%"), ("POST", "/envs/a/runs?dry=%FF"),
        ("POST", "/envs/a/runs?Dry=1"), ("POST", "/envs/a/runs?dry[]=1"), ("POST", "/envs/a/runs?dry=2&Dry=1"),
        ("POST", "/envs/a/runs?dry=TRUE"), ("POST", "/envs/a/runs?dry=yes"), ("POST", "/envs/a/runs?dry=%201"),
        ("POST", "/envs/a/runs?dry=01"), ("POST", "/envs/a/runs?dry=1.0"),
    ],
)  # fmt: skip
def test_unmatched_or_ambiguous_request_is_no_verb(method: str, target: str) -> None:
    assert MAP.action(method, target) is None


@pytest.mark.parametrize(
    ("body", "verb"),
    [
        (b'{"event": "COMMENT"}', "comment"),
        (b'{"x": [1, {"event": "APPROVE"}], "event": "ASK"}', "comment"),
        (b'{"event": "\\u0043OMMENT"}', "comment"),
        (b'{"event": "APPROVE"}', "approve"),
        (b"{}", "approve"),
    ],
)
def test_the_weaker_verb_has_to_be_shown(body: bytes, verb: str) -> None:
    assert MAP.action("POST", "/reviews", body) == Action(verb, "reviews")


@pytest.mark.parametrize(
    "body",
    [
        None, b"", b"event=COMMENT", b'"COMMENT"', b'["COMMENT"]', b'{"event": "COMMENT"', b"\xff\xfe",
        b'{"event": "APPROVE", "event": "COMMENT"}', b'{"event": "COMMENT", "event": "COMMENT"}',
        b'{"event": "COMMENT", "x": {"a": 1, "a": 2}}', rb'{"event": "COMMENT", "x": "\ud800"}',
        b'{"event": "COMMENT", "x": NaN}', '{"event": "COMMENT"}'.encode("utf-16"),
        b"\xef\xbb\xbf" + b'{"event": "COMMENT"}', b'{"event": "COMMENT"} {}', b"[" * 200_000,
        b'{"event": "COMMENT", "x": "' + b"a" * MAX_BODY_BYTES + b'"}',
        b'{"event": "comment"}', b'{"event": ["COMMENT"]}', b'{"event": null}', b'{"event": 1}', b'{"event": true}',
        b'{"event": "COMMENT "}', b'{"event": {"a": "COMMENT"}}', b'{"Event": "COMMENT"}', '{"event": "aſk"}'.encode(),
    ],
)  # fmt: skip
def test_a_body_that_cannot_be_read_for_certain_is_no_verb(body: bytes | None) -> None:
    """It does not fall through to the next rule: what was not seen is no proof of the stronger verb either."""
    assert MAP.action("POST", "/reviews", body) is None


@pytest.mark.parametrize(
    "other",
    ["Event", "EVENT", "\u0065vent ", "event\\u0000x", "e_vent", "e-vent", "event[]", "event.", "ev\u1e9ent"],
)
def test_field_name_that_a_lax_reader_confuses_is_no_verb(other: str) -> None:
    """Go takes `Event` for `event`, protobuf `dry_run` for `dryRun`: of two the last one counts there."""
    body = f'{{"event": "COMMENT", "{other}": "APPROVE"}}'.encode()
    expected = Action("comment", "reviews") if "\u1e9e" in other else None
    assert MAP.action("POST", "/reviews", body) == expected


@pytest.mark.parametrize(
    "query",
    [
        "dry=1&Dry=0", "dry=1&DRY=0", "dry=1&dry[]=0", "dry=1&dry[x]=0", "dry[]=0&dry=1", "dry=1&dry%5B%5D=0",
        "dry=1&dry%00x=0", "dry=1&%20dry=0", "dry=1&d.ry=0", "dry=1&d_ry=0",
    ],
)  # fmt: skip
def test_so_is_a_parameter_that_pollutes_another(query: str) -> None:
    assert MAP.action("POST", f"/envs/a/runs?{query}") is None
    assert MAP.action("POST", "/envs/a/runs?dry=1&dryer=0&x[dry]=0") == Action("dry-run", "env/a")


@pytest.mark.parametrize(
    "query",
    [
        "_method=DELETE", "x=1&_method=PUT", "x=1;_method=PUT", "_METHOD=put", "%5fmethod=DELETE", "%5F%6Dethod=x",
        "_method[]=DELETE", "+_method=x", ".method=DELETE", "%20_method=x", "_method%00=x", "_method",
        "X-HTTP-Method-Override=PUT",
    ],
)  # fmt: skip
def test_method_override_in_the_query_is_no_verb(query: str) -> None:
    assert MAP.action("POST", f"/envs/a/runs?{query}") is None
    assert MAP.action("GET", f"/envs/a?{query}") == Action("read", "env/a"), (
        "of a POST alone others make another"
    )


@pytest.mark.parametrize(
    "query", ["method=card", "x=_method", "my_method=1", "payment-method=x", "%", "&&=", "x=%5f"]
)
def test_query_that_only_resembles_an_override_is_allowed(query: str) -> None:
    assert RequestMap([rule("POST", "/x", "write")]).action("POST", f"/x?{query}") == Action("write", "x")


@pytest.mark.parametrize(
    ("path", "resource", "says"),
    [
        ("envs", "x", "begins with '/'"),
        ("//a", "x", "neither a segment"),
        ("/a//b", "x", "neither a segment"),
        ("/a/", "x", "neither a segment"),
        ("/a/..", "x", "neither a segment"),
        ("/a%20b", "x", "neither a segment"),
        ("/a?b", "x", "neither a segment"),
        ("/a/x{name}", "x", "neither a segment"),
        ("/a/*", "x", "neither a segment"),
        ("/{a}/{a}", "x", "a name of its own"),
        ("/{}", "x", "a name of its own"),
        ("/{A}", "x", "a name of its own"),
        ("/{rest*}/a", "x", "nothing can stand after {rest*}"),
        ("/{rest*}/{more*}", "x", "nothing can stand after"),
        ("/{name}", "env/{other}", "uses {other}"),
        ("/{name*}", "env/{name}", "uses {name}"),
        ("/{name}", "env/{name*}", "uses {name*}"),
        ("/a", "/x", "is none"),
        ("/a", "x/*", "is none"),
        ("/a", "x%", "is none"),
    ],
)
def test_a_rule_without_a_meaning_is_named(path: str, resource: str, says: str) -> None:
    with pytest.raises(RequestMapError) as refused:
        RequestMap([rule("GET", path, "read", resource)])
    assert says in str(refused.value)
    assert path in str(refused.value)


def test_empty_request_map_allows_nothing() -> None:
    assert RequestMap([]).action("GET", "/") is None


_TRICKY = st.text(st.sampled_from(list("/.%2eEfF5cC;?#&=\\ abci{}*\x00é")), max_size=40)


@given(st.sampled_from(["GET", "PUT", "POST"]), _TRICKY, st.none() | st.binary(max_size=40))
def test_any_matched_request_has_a_valid_resource(method: str, tail: str, body: bytes | None) -> None:
    for target in (tail, f"/{tail}", f"/files/{tail}", f"/envs/{tail}"):
        action = MAP.action(method, target, body)
        if action is not None:
            assert parse_name(action.resource).is_name
            assert ".." not in action.resource.split("/")
            inside = action.resource.startswith("files/.ci/")
            assert (action.verb == "ci") == inside, "no spelling of the path reaches it by another verb"


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=5)))
def test_stronger_verb_needs_an_unambiguous_body(members: dict[str, str]) -> None:
    action = MAP.action("POST", "/reviews", json.dumps(members).encode())
    assert ((action and action.verb) == "comment") <= (members.get("event") in ("COMMENT", "ASK"))


@pytest.mark.parametrize(
    ("method", "target", "reads"),
    [
        ("POST", "/reviews", True),
        ("POST", "/reviews?x=1", True),
        ("POST", "/envs/a/runs", False),
        ("GET", "/reviews", False),
        ("POST", "/nothing", False),
        ("POST", "//reviews", False),
        ("POST", "/reviews#x", False),
        ("POST", "/" + "x" * 9000, False),
    ],
)
def test_whether_the_body_must_be_seen_first(method: str, target: str, reads: bool) -> None:
    assert MAP.reads_body(method, target) is reads


def test_a_rule_before_that_looks_at_no_body_decides_without_one() -> None:
    rules = [
        rule("POST", "/x", "dry-run", query={"dry": ("1",)}),
        rule("POST", "/x", "comment", body={"event": ("COMMENT",)}),
        rule("POST", "/x", "approve"),
    ]
    map = RequestMap(rules)
    assert not map.reads_body("POST", "/x?dry=1")
    assert map.action("POST", "/x?dry=1") == Action("dry-run", "x")
    assert map.reads_body("POST", "/x")
    assert map.reads_body("POST", "/x?dry=2")
    assert not map.reads_body("POST", "/x?dry=1&dry=2"), "it is no verb, whatever its body says"
    assert map.action("POST", "/x?dry=1&dry=2", b'{"event": "COMMENT"}') is None


# --- limits, and what lies just beyond --------------------------------------------------------------------------------

PLAIN = RequestMap(
    [
        rule("POST", "/x", "write"),
        rule("GET", "/deep/{path*}", "dig"),
        rule("POST", "/find", "find", query={"q": ("a=b", "")}),
        rule("POST", "/find", "other"),
    ]
)


@pytest.mark.parametrize(("length", "verb"), [(8192, "list"), (8193, None)])
def test_a_target_has_so_many_characters_at_most(length: int, verb: str | None) -> None:
    found = MAP.action("GET", "/?".ljust(length, "x"))
    assert (found.verb if found else None) == verb
    target = "/reviews?".ljust(length, "x")
    assert MAP.reads_body("POST", target) == bool(verb)
    assert (MAP.action("POST", target, b'{"event": "ASK"}') is not None) == bool(verb)


@pytest.mark.parametrize(("depth", "verb"), [(254, "dig"), (255, "dig"), (256, None)])
@pytest.mark.parametrize("segment", ["a", "%61"])
def test_a_path_has_so_many_segments_at_most(depth: int, verb: str | None, segment: str) -> None:
    found = PLAIN.action("GET", "/deep" + f"/{segment}" * depth)
    assert (found.verb if found else None) == verb


@pytest.mark.parametrize(("length", "verb"), [(MAX_BODY_BYTES, "comment"), (MAX_BODY_BYTES + 1, None)])
def test_so_much_of_a_body_is_looked_at(length: int, verb: str | None) -> None:
    assert MAX_BODY_BYTES == 1_048_576
    found = MAP.action("POST", "/reviews", b'{"event": "COMMENT"}'.ljust(length))
    assert (found.verb if found else None) == verb


@pytest.mark.parametrize(
    "path", ["/deep/%2e", "/deep/%2e%2e/x", "/deep/./x", "/deep/..", "xdeep/a", "deep/a", ""]
)
def test_no_rule_takes_a_path_that_leads_elsewhere(path: str) -> None:
    assert PLAIN.action("GET", path) is None
    assert PLAIN.action("GET", "/deep/.a") == Action("dig", "x")


@pytest.mark.parametrize(
    "query",
    [
        "_method=DELETE", "%5fm%65thod=DELETE", "%5f%6d%65%74%68%6f%64=x", "+_method=x", "++_method=x", " _method=x",
        "x-http-method=PUT", "X-Method-Override=PUT", "x-http-method-override=PUT", "_method[=x",
    ],
)  # fmt: skip
def test_a_parameter_that_makes_it_another_method_is_seen_where_no_rule_looks_at_the_query(
    query: str,
) -> None:
    assert PLAIN.action("POST", f"/x?{query}") is None


@pytest.mark.parametrize("query", ["_method+=x", "a=_method", "methods=1", "%5fmethods=x"])
def test_others_are_none_of_those(query: str) -> None:
    assert PLAIN.action("POST", f"/x?{query}") == Action("write", "x")


@pytest.mark.parametrize(
    ("query", "verb"),
    [("?q=a=b", "find"), ("?q=a", "other"), ("?q=", "find"), ("?q", "find"), ("", "other"), ("?", "other")],
)
def test_a_value_begins_after_the_first_sign(query: str, verb: str) -> None:
    assert PLAIN.action("POST", f"/find{query}") == Action(verb, "x")


def test_a_body_need_not_be_seen_where_the_target_is_none() -> None:
    assert MAP.reads_body("POST", "/reviews?x=1")
    for target in ("/reviews?x#y", "/reviews#", "/reviews/..", "/elsewhere"):
        assert not MAP.reads_body("POST", target)


def test_invalid_request_map_is_refused_with_its_code() -> None:
    for path in ("/a/./b", "/a/../b"):
        with pytest.raises(RequestMapError, match="neither a segment") as refused:
            RequestMap([rule("GET", path, "read")])
        assert refused.value.code == "request_map_invalid"
