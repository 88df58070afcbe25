"""Order of rules with conditions: a request that does not meet them needs the stronger verb."""

from __future__ import annotations

from typing import Any

import pytest

from ringfence.cli.commands.target_templates import TEMPLATES
from ringfence.cli.main import main
from ringfence.messages.registry import Condition, McpRule, RequestRule, VerbFloor
from ringfence.model.http_targets import RequestMap, RequestMapError

FORCE: Condition = {"force": ("true",)}
VERBS = (
    VerbFloor(verb="read"),
    VerbFloor(verb="push", floor="sponsor"),
    VerbFloor(verb="pull", floor="sponsor"),
    VerbFloor(verb="watch", ask="sponsor"),
    VerbFloor(verb="force", floor="operator"),
    VerbFloor(verb="burn", floor="operator", ask="operator"),
)


def call(
    verb: str, name: str | None = "push", path: str = "/mcp", arguments: Condition | None = None
) -> RequestRule:
    mcp = McpRule(method="tools/call", name=name, arguments=arguments)
    return RequestRule(method="MCP", path=path, mcp=mcp, verb=verb, resource="server")


def post(verb: str, path: str, **conditions: Any) -> RequestRule:
    return RequestRule(method="POST", path=path, verb=verb, resource="x", **conditions)


@pytest.mark.parametrize(
    ("weaker", "stronger"),
    [
        ("read", "push"), ("read", "watch"), ("push", "force"), ("force", "burn"), ("push", "push"), ("push", "burn"),
        ("push", "no-verb-of-it"),
    ],
)  # fmt: skip
def test_condition_on_the_weaker_verb_is_accepted(weaker: str, stronger: str) -> None:
    RequestMap([call(weaker, arguments=FORCE), call(stronger)]).check_order(VERBS)
    RequestMap([post(weaker, "/x", query=FORCE), post(stronger, "/x")]).check_order(VERBS)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("force", "push"), ("push", "read"), ("burn", "force"), ("push", "pull"), ("watch", "push"), ("push", "watch"),
        ("watch", "force"), ("no-verb-of-it", "burn"),
    ],
)  # fmt: skip
def test_condition_on_a_verb_that_is_not_the_weaker_one_is_refused(first: str, second: str) -> None:
    for rules in (
        [call(first, arguments=FORCE), call(second)],
        [post(first, "/x", query=FORCE), post(second, "/x")],
        [post(first, "/x", body=FORCE), post("burn", "/y"), post(second, "/x", query=FORCE)],
    ):
        with pytest.raises(RequestMapError, match=f"verb {second}") as refused:
            RequestMap(rules).check_order(VERBS)
        assert refused.value.code == "request_map_invalid"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (call("force", arguments=FORCE), call("push", "{tool*}")),
        (call("force", arguments=FORCE), call("push", None)),
        (call("force", None, arguments=FORCE), call("push")),
        (call("force", "get_{what}", arguments=FORCE), call("push", "get_issue")),
        (call("force", "get_{what}", arguments=FORCE), call("push", "{any}_issue")),
        (call("force", path="/{team}/mcp", arguments=FORCE), call("push", path="/a/{end*}")),
        (post("force", "/x/{a}", query=FORCE), post("push", "/{a}/x")),
        (post("force", "/x/{a*}", query=FORCE), post("push", "/{a}/x/y")),
        (post("force", "/{a*}", query=FORCE), post("push", "/x/{b*}")),
    ],
)
def test_rule_that_may_match_the_same_request_is_looked_at(first: RequestRule, second: RequestRule) -> None:
    with pytest.raises(RequestMapError, match="verb push"):
        RequestMap([first, second]).check_order(VERBS)
    RequestMap([second, first]).check_order(VERBS)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (call("force", arguments=FORCE), call("push", "pull")),
        (call("force", "get_{what}", arguments=FORCE), call("push", "set_{what}")),
        (call("force", "{what}_a", arguments=FORCE), call("push", "{what}_b")),
        (call("force", arguments=FORCE), call("push", path="/other")),
        (call("force", arguments=FORCE), call("push", arguments={"force": ("false", "null")})),
        (post("force", "/x", query=FORCE), post("push", "/x/{a*}")),
        (post("force", "/x/{a}", query=FORCE), post("push", "/x/{a}/b")),
        (post("force", "/{a*}", query=FORCE), post("push", "/")),
        (post("force", "/x", query=FORCE), RequestRule(method="PUT", path="/x", verb="push", resource="x")),
        (post("force", "/x", query=FORCE), post("push", "/x", query={"force": ("0",), "b": ("1",)})),
    ],
)
def test_rule_that_takes_no_request_of_the_condition_is_not(first: RequestRule, second: RequestRule) -> None:
    RequestMap([first, second]).check_order(VERBS)


@pytest.mark.parametrize("covering", [call("burn"), call("burn", None), call("burn", "{tool*}")])
def test_rules_after_one_that_takes_all_the_rest_do_not_matter(covering: RequestRule) -> None:
    RequestMap([call("force", arguments=FORCE), covering, call("push", "{tool*}")]).check_order(VERBS)
    partly = call("read", arguments={"force": ("false",)})
    with pytest.raises(RequestMapError, match="of the verb force need the verb push"):
        RequestMap([call("force", arguments=FORCE), partly, call("push", "{tool*}")]).check_order(VERBS)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_have_the_right_order(name: str) -> None:
    verbs = [VerbFloor(verb=verb, floor=floor) for verb, floor in TEMPLATES[name].verbs.items()]
    RequestMap(TEMPLATES[name].requests).check_order(verbs)


def test_target_add_refuses_a_condition_on_the_stronger_verb(capsys: pytest.CaptureFixture[str]) -> None:
    add = ["target", "add", "a", "--description", "x", "--template", "mcp", "--backend", "jwt"]
    add += ["--verb", "force=operator", "--request"]
    assert main([*add, "MCP /mcp force server message:tools/call=push argument:force=true"]) == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "verb call" in said
    assert "weaker verb" in said
