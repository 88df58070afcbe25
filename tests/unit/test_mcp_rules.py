"""Which message of MCP is which verb: read strictly, decided by tool and arguments, and nothing where in doubt."""

from __future__ import annotations

import json
import string
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.kernel.base.strict_json import case_folded
from ringfence.messages.registry import McpRule, RequestRule
from ringfence.model.http_targets import (
    MAX_BODY_BYTES,
    Action,
    RequestMap,
    RequestMapError,
)
from ringfence.model.mcp.messages import McpMessageError, read_message
from ringfence.model.scope.globs import parse_name


def rule(
    method: str, verb: str, resource: str, name: str | None = None, **arguments: tuple[str, ...]
) -> RequestRule:
    mcp = McpRule(method=method, name=name, arguments=arguments or None)
    return RequestRule(method="MCP", path="/mcp", mcp=mcp, verb=verb, resource=resource)


MAP = RequestMap(
    [
        RequestRule(method="GET", path="/mcp", verb="connect", resource="server"),
        RequestRule(method="POST", path="/{all*}", verb="anything", resource="{all*}"),
        rule("initialize", "connect", "server"),
        rule("notifications/*", "connect", "server"),
        rule("tools/list", "connect", "server"),
        rule("tools/call", "read", "repo/{arguments.repo}", "get_{what}"),
        rule("tools/call", "plan", "repo/{arguments.repo}", "push", dry_run=("true",)),
        rule("tools/call", "push", "repo/{arguments.repo}", "push"),
        rule("tools/call", "once", "server", "repeat", times=("1",)),
        rule("tools/call", "repeat", "server", "repeat"),
        rule("tools/call", "release", "server", "deploy", to=("prod", "live")),
        rule("tools/call", "deploy", "server", "deploy"),
        rule("tools/call", "clear-all", "server", "clear", folder=("null",)),
        rule("tools/call", "clear", "server", "clear"),
        rule("tools/call", "write", "file/{arguments.path*}", "write_file"),
        rule("tools/call", "close", "issue/{arguments.number}", "close_issue"),
        rule("resources/read", "read", "notes/{path*}", "note:///{path*}"),
        rule("prompts/get", "read", "prompt/{name}", "{name}"),
        rule("response", "respond", "server"),
    ]
)


def body(method: str | None = None, id: Any = 1, **more: Any) -> bytes:
    said = {"jsonrpc": "2.0", "id": id, "method": method, **more}
    return json.dumps({key: value for key, value in said.items() if value is not None}).encode()


def call(tool: str, **arguments: Any) -> bytes:
    return body("tools/call", params={"name": tool, "arguments": arguments})


def decided(posted: bytes, target: str = "/mcp") -> Action | None:
    return MAP.action("POST", target, posted)


@pytest.mark.parametrize(
    ("posted", "verb", "resource"),
    [
        (body("initialize", params={"capabilities": {}}), "connect", "server"),
        (body("notifications/initialized", id=None), "connect", "server"),
        (body("tools/list"), "connect", "server"),
        (call("get_issue", repo="a"), "read", "repo/a"),
        (call("push", repo="a", dry_run=True), "plan", "repo/a"),
        (call("push", repo="a", dry_run=False), "push", "repo/a"),
        (call("push", repo="a"), "push", "repo/a"),
        (call("repeat", times=1), "once", "server"),
        (call("repeat", times=2), "repeat", "server"),
        (call("deploy", to="prod"), "release", "server"),
        (call("deploy", to="test"), "deploy", "server"),
        (call("deploy"), "deploy", "server"),
        (call("clear"), "clear-all", "server"),
        (call("clear", folder=None), "clear-all", "server"),
        (call("clear", folder="a"), "clear", "server"),
        (call("clear", folder=["a"]), "clear", "server"),
        (call("write_file", path="a/b/c.txt"), "write", "file/a/b/c.txt"),
        (call("close_issue", number=7), "close", "issue/7"),
        (body("resources/read", params={"uri": "note:///a/b"}), "read", "notes/a/b"),
        (body("prompts/get", params={"name": "review"}), "read", "prompt/review"),
        (body(result={}), "respond", "server"),
        (b"  " + body("tools/list") + b"\n", "connect", "server"),
    ],
)
def test_the_first_rule_that_matches_counts(posted: bytes, verb: str, resource: str) -> None:
    assert decided(posted) == Action(verb, resource)
    assert MAP.mcp_action("/mcp", read_message(posted)) == Action(verb, resource)


@pytest.mark.parametrize(
    "posted",
    [
        call("delete_repo", repo="a"),
        call("GET_issue", repo="a"),
        call("get_", repo="a"),
        call("get_issue"),
        call("get_issue", repo=None),
        call("get_issue", repo=["a"]),
        call("get_issue", repo=True),
        call("get_issue", repo=1.5),
        call("get_issue", repo="a/b"),
        call("get_issue", repo=".."),
        call("get_issue", repo="a%2fb"),
        call("get_issue", repo="a\\b"),
        call("get_issue", repo=""),
        call("get_issue", repo="*"),
        call("get_issue", Repo="a"),
        call("push", repo="a", Dry_Run=True),
        call("push", repo="a", dry_run=None),
        call("get_issue", repo=2**53),
        call("get_issue", repo=-(2**53)),
        call("write_file", path="/etc/passwd"),
        call("write_file", path="a/../b"),
        call("write_file", path="a//b"),
        body("resources/read", params={"uri": "note:///../b"}),
        body("resources/read", params={"uri": "file:///a"}),
        body("resources/list"),
        body("sampling/createMessage"),
        body("tools/call"),
        body("tools/call", params={"name": 7}),
        body("tools/call", params={"name": "get_issue", "arguments": []}),
        body("tools/call", params={"name": "get_issue", "Name": "push", "arguments": {"repo": "a"}}),
        body(
            "tools/call",
            params={"name": "get_issue", "arguments": {"repo": "a"}, "cursor": "x", "Cursor": "y"},
        ),
        call("get_issue", repo="a", REPO="b"),
        body("tools/call", params={"Name": "get_issue", "arguments": {"repo": "a"}}),
        body("tools/call", id=None, params={"name": "get_issue", "arguments": {"repo": "a"}}),
        body("notifications/initialized"),
        body("response"),
        body(result={}, error={}),
        body("tools/list", result={}),
        body("tools/list", id=True),
        body("tools/list", id=1.5),
        body("tools/list", Method="tools/call"),
        b'{"jsonrpc":"2.0","id":null,"method":"tools/list"}',
        b'{"id":1,"method":"tools/list"}',
        b'{"jsonrpc":"2.0","id":1,"method":"tools/list","method":"x"}',
        b"[" + body("tools/list") + b"]",
        b"[]",
        b"{",
        b"",
        b"\xef\xbb\xbf" + body("tools/list"),
        b"\x1f\x8b\x08\x00",
        body("tools/list").decode().encode("utf-16"),
    ],
)
def test_doubtful_call_is_no_verb(posted: bytes) -> None:
    assert decided(posted) is None


@pytest.mark.parametrize("dry_run", ["true", "True", 1, 1.0, "1", "yes", [True], None, "", 0, "false", {}])
def test_value_of_another_type_than_the_condition_is_refused(dry_run: Any) -> None:
    assert decided(call("push", repo="a", dry_run=dry_run)) is None


@pytest.mark.parametrize("times", [True, "1", 1.0, [1], None, 1.5, "one", 2**53, -(2**53), 10**40])
def test_value_beside_a_number_is_refused(times: Any) -> None:
    assert decided(call("repeat", times=times)) is None


@pytest.mark.parametrize(
    "to",
    ["PROD", "Prod", " prod", "prod\n", "l\u0131ve", "LIVE", ["prod"], [["prod"]], 7, True, None, {"a": 1}],
)
def test_value_that_lenient_readers_take_for_the_wanted_text_is_refused(to: Any) -> None:
    assert decided(call("deploy", to=to)) is None


@pytest.mark.parametrize("folder", ["", "null", "NULL", "none", [], {}, False, 0, [None], [""]])
def test_value_that_lenient_readers_take_for_null_is_refused(folder: Any) -> None:
    assert decided(call("clear", folder=folder)) is None


@pytest.mark.parametrize("to", ["prod", "test"])
def test_uncertain_condition_refuses_whatever_the_others_say(to: str) -> None:
    first = rule("tools/call", "release", "server", "deploy", to=("prod",), force=("true",))
    both = RequestMap([first, rule("tools/call", "deploy", "server", "deploy")])
    for arguments in ({"to": to, "force": "true"}, {"force": "true", "to": to}):
        assert both.action("POST", "/mcp", call("deploy", **arguments)) is None


def test_numbers_beyond_2_to_the_53_are_refused_in_resources_only_where_decided() -> None:
    assert decided(call("close_issue", number=2**53 - 1)) == Action("close", f"issue/{2**53 - 1}")
    assert decided(call("close_issue", number=2**53)) is None
    assert decided(call("close_issue", number=2**53 + 1)) is None
    assert decided(call("close_issue", number=7, other=2**60)) == Action("close", "issue/7")


def _equal_ignoring_case(letter: str, ascii_letter: str) -> bool:
    """As readers compare that know one upper and one lower case of each character, such as Java."""
    simple = unicodedata.normalize("NFD", letter.lower())[0] if letter == "\u0130" else letter.lower()
    return ascii_letter.upper() in (letter.upper(), simple.upper()) or ascii_letter in (letter, simple)


def test_every_letter_that_equals_an_ascii_letter_without_case_is_folded_to_it() -> None:
    found = set()
    for letter in map(chr, range(0x20000)):
        for ascii_letter in string.ascii_lowercase:
            if _equal_ignoring_case(letter, ascii_letter):
                found.add(letter)
                assert case_folded(letter) == ascii_letter
    assert found == {*string.ascii_letters, "\u0130", "\u0131", "\u017f", "\u212a"}


@pytest.mark.parametrize("twin", ["ur\u0131", "ur\u0130", "URI", "\u0055ri"])
def test_member_that_differs_from_a_protocol_member_by_case_alone_is_refused(twin: str) -> None:
    posted = body("resources/read", params={"uri": "note:///a", twin: "note:///secret"})
    with pytest.raises(McpMessageError) as refused:
        read_message(posted)
    assert refused.value.code == "mcp_invalid"


@pytest.mark.parametrize("twin", ["argument\u017f", "argumentS", "ta\u017f\u212aId", "context\u0130"])
def test_dotless_i_long_s_and_kelvin_sign_are_case_variants(twin: str) -> None:
    plain = case_folded(twin)
    posted = body("tools/call", params={"name": "get_issue", "arguments": {"repo": "a", plain: 1, twin: 2}})
    assert decided(posted) is None


def test_no_rule_of_another_kind_lets_a_message_pass() -> None:
    assert MAP.action("POST", "/elsewhere", b"x") == Action("anything", "elsewhere")
    assert decided(call("delete_repo", repo="a")) is None
    assert MAP.action("POST", "/mcp", None) is None
    assert MAP.action("POST", "/MCP", body("tools/list")) is None, "for some servers that is the same"
    assert MAP.action("POST", "/%6dcp", body("tools/list")) == Action("connect", "server")
    assert MAP.reads_body("POST", "/mcp")
    assert MAP.action("MCP", "/mcp", body("tools/list")) is None
    assert MAP.action("GET", "/mcp") == Action("connect", "server")
    assert not MAP.speaks_mcp("/mcp/")
    assert MAP.action("POST", "/mcp?x#y", body("tools/list")) is None


@pytest.mark.parametrize(
    ("posted", "code"),
    [
        (b"[]", "mcp_batch"),
        (b" [" + body("tools/list") + b"]", "mcp_batch"),
        (b"{", "mcp_unreadable"),
        (b'{"a":1,"a":1}', "mcp_unreadable"),
        (body("tools/list", x=1), "mcp_invalid"),
        (body("tools/call", params={"name": ""}), "mcp_invalid"),
    ],
)
def test_why_a_message_is_refused(posted: bytes, code: str) -> None:
    with pytest.raises(McpMessageError) as refused:
        read_message(posted)
    assert refused.value.code == code


def test_unparsable_message_is_not_quoted() -> None:
    with pytest.raises(McpMessageError) as refused:
        read_message(b'{"token": "s3cret-value" oops')
    assert "s3cret" not in refused.value.message


@pytest.mark.parametrize(
    ("tool", "offered"),
    [
        ("get_issue", [Action("read", "repo/*")]),
        ("push", [Action("plan", "repo/*"), Action("push", "repo/*")]),
        ("write_file", [Action("write", "file/**")]),
        ("delete_repo", []),
    ],
)
def test_tool_offers_list_its_possible_actions(tool: str, offered: list[Action]) -> None:
    assert list(MAP.mcp_offers("/mcp", "tools/call", tool)) == offered


@pytest.mark.parametrize(
    "wrong",
    [
        rule("tools/list", "x", "x", "name"),
        rule("tools/list", "x", "{arguments.a}"),
        rule("tools/list", "x", "x", a=("b",)),
        rule("tools/call", "x", "{unknown}", "a"),
        rule("tools/call", "x", "x/{arguments.a*}/y", "a"),
        rule("tools/call", "x", "x", "a_{Wrong}"),
        rule("tools/call", "x", "x", "a_{b*}_c"),
        rule("tools/call", "x", "x", "get_*"),
        rule("tools/call", "x", "x", "{a}{b}{c}"),
        RequestRule(method="POST", path="/mcp", mcp=McpRule(method="ping"), verb="x", resource="x"),
        RequestRule(method="MCP", path="/mcp", verb="x", resource="x"),
        RequestRule(
            method="MCP", path="/{a}", mcp=McpRule(method="tools/call", name="{a}"), verb="x", resource="x"
        ),
        RequestRule(
            method="MCP", path="/mcp", mcp=McpRule(method="ping"), body={"a": ("b",)}, verb="x", resource="x"
        ),
        RequestRule(method="POST", path="/mcp", verb="x", resource="{arguments.a}"),
    ],
)
def test_a_rule_without_a_meaning_is_refused(wrong: RequestRule) -> None:
    with pytest.raises(RequestMapError):
        RequestMap([wrong])


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=8)
    | st.sampled_from(["a", "..", "a/b", "%2e", "*"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
_ARGUMENTS = st.dictionaries(
    st.sampled_from(["repo", "Repo", "path", "dry_run", "number"]), _VALUES, max_size=4
)
_TOOLS = st.sampled_from(["get_issue", "push", "write_file", "close_issue"]) | st.text(max_size=12)


@given(tool=_TOOLS, arguments=_ARGUMENTS)
def test_called_tool_is_one_offered_resource_or_denied(tool: str, arguments: dict[str, Any]) -> None:
    found = decided(call(tool, **arguments))
    if found is None:
        return
    parse_name(found.resource)
    offers = MAP.mcp_offers("/mcp", "tools/call", tool)
    assert found.verb in {offer.verb for offer in offers}, "what can be called is among what is offered"
    assert found.resource.split("/")[0] in ("repo", "file", "issue")
    if found.verb == "plan":
        assert arguments["dry_run"] is True
    if found.verb in ("read", "plan", "push"):
        assert found.resource == f"repo/{arguments['repo']}"


@given(st.binary(max_size=200) | _VALUES.map(lambda value: json.dumps(value).encode()))
def test_arbitrary_post_is_no_verb(posted: bytes) -> None:
    assert decided(posted) is None


# --- several endpoints ------------------------------------------------------------------------------------------------


def at(path: str, verb: str, name: str, resource: str = "server", **more: Any) -> RequestRule:
    mcp = McpRule(method="tools/call", name=name, **more)
    return RequestRule(method="MCP", path=path, mcp=mcp, verb=verb, resource=resource)


TWO = RequestMap(
    [
        at("/Api/{team}/one", "first", "push", "team/{team}"),
        at("/Api/{team}/two", "second", "push", "team/{team}"),
        at("/Api/{team}/two", "third", "push"),
        at("/Api/{team}/two", "pull", "pull_{what}", "{what}/{arguments.repo}"),
        RequestRule(method="POST", path="/{all*}", verb="anything", resource="x"),
        RequestRule(method="GET", path="/{all*}", verb="look", resource="x"),
    ]
)


def test_each_endpoint_has_rules_of_its_own() -> None:
    assert TWO.action("POST", "/Api/a/one", call("push")) == Action("first", "team/a")
    assert TWO.action("POST", "/Api/a/two", call("push")) == Action("second", "team/a")
    assert TWO.action("POST", "/Api/a/one", call("pull_x", repo="y")) is None
    assert TWO.mcp_offers("/Api/a/one", "tools/call", "push") == (Action("first", "team/a"),)
    assert TWO.mcp_offers("/Api/a/two", "tools/call", "push") == (Action("second", "team/a"),)
    assert TWO.mcp_offers("/Api/a/one", "tools/call", "pull_x") == ()
    assert TWO.mcp_offers("/elsewhere", "tools/call", "push") == ()
    assert TWO.mcp_action("/elsewhere", read_message(call("push"))) is None
    assert TWO.mcp_action("/Api/a/one#", read_message(call("push"))) is None


def test_path_similar_to_an_mcp_endpoint_is_no_other_request() -> None:
    for target in ("/api/a/one", "/API/a/ONE", "/Api/A/Two"):
        assert TWO.action("POST", target, call("push")) is None
        assert TWO.action("GET", target) == Action("look", "x")
    assert TWO.action("POST", "/api/a/three", call("push")) == Action("anything", "x")


def test_mcp_endpoint_is_matched_exactly() -> None:
    assert TWO.speaks_mcp("/Api/a/one")
    assert TWO.speaks_mcp("/Api/a/one?session=1")
    for target in ("/Api/a/one/", "/Api/a", "/Api/../Api/a/one", "/api/a/one"):
        assert not TWO.speaks_mcp(target)
    assert TWO.speaks_mcp("/Api/a/one?".ljust(8192, "x"))
    assert not TWO.speaks_mcp("/Api/a/one?".ljust(8193, "x"))
    assert TWO.reads_body("POST", "/Api/a/one")
    assert not TWO.reads_body("GET", "/Api/a/one")


@pytest.mark.parametrize(("length", "verb"), [(MAX_BODY_BYTES, "first"), (MAX_BODY_BYTES + 1, None)])
def test_so_long_is_a_message_at_most(length: int, verb: str | None) -> None:
    found = TWO.action("POST", "/Api/a/one", call("push").ljust(length))
    assert (found.verb if found else None) == verb
    assert TWO.action("POST", "/Api/a/one") is None
    assert TWO.action("POST", "/Api/a/one", b"") is None


@pytest.mark.parametrize("name", ["..", ".", "a/b", "a%2e", "a;b", "", "a\\b"])
def test_a_name_that_is_no_segment_is_neither_done_nor_offered(name: str) -> None:
    assert TWO.action("POST", "/Api/a/two", call(f"pull_{name}", repo="y")) is None
    assert TWO.mcp_offers("/Api/a/two", "tools/call", f"pull_{name}") == ()
    assert TWO.mcp_offers("/Api/a/two", "tools/call", "pull_x") == (Action("pull", "x/*"),)


def test_a_name_that_no_resource_can_have_is_not_offered() -> None:
    assert TWO.mcp_offers("/Api/a/two", "tools/call", "pull_" + "x" * 600) == ()


@pytest.mark.parametrize(
    "resource", ["x/{arguments.a*}", "{arguments.a*}", "{arguments.a}/{arguments.b}", "x-{arguments.a}/y"]
)
def test_arguments_stand_where_a_resource_has_room_for_them(resource: str) -> None:
    assert RequestMap([at("/mcp", "v", "t", resource)]).speaks_mcp("/mcp")


@pytest.mark.parametrize("resource", ["x{arguments.a*}", "{arguments.a*}/y", "x/{arguments.a*}y"])
def test_several_segments_stand_alone_at_the_end(resource: str) -> None:
    with pytest.raises(RequestMapError, match="the last one"):
        RequestMap([at("/mcp", "v", "t", resource)])


def test_arguments_are_those_of_a_message_that_has_some() -> None:
    with pytest.raises(RequestMapError, match="no arguments"):
        RequestMap([rule("tools/list", "x", "{arguments.a}")])
    with pytest.raises(RequestMapError, match="no arguments"):
        RequestMap([RequestRule(method="POST", path="/mcp", verb="x", resource="{arguments.a}")])


def test_a_rule_for_messages_has_no_condition_on_the_query() -> None:
    with pytest.raises(RequestMapError, match="arguments alone"):
        RequestMap([at("/mcp", "v", "t").model_copy(update={"query": {"a": ("b",)}})])


def test_invalid_mcp_rule_is_refused_by_field() -> None:
    with pytest.raises(RequestMapError, match=r"\bname\b"):
        RequestMap([rule("tools/list", "x", "x", "name")])
