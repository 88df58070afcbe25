"""A field that may limit something is never ignored: refused where it is set, and read for the narrower meaning."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from ringfence.cli.commands.provisioner import read_delegation
from ringfence.cli.main import main
from ringfence.cli.shared.arguments import parse_permission, parse_scope
from ringfence.cli.shared.attestation import parse_selectors, show_selector
from ringfence.cli.shared.records import print_record
from ringfence.cli.shared.yaml_files import YamlFileError
from ringfence.client.connection import Connection
from ringfence.client.errors import InvalidCallError
from ringfence.client.settings import ClientSettings
from ringfence.gateway.domain import Refusal
from ringfence.issuer import domain as issuer_domain
from ringfence.issuer.domain import Decision, Issue, Terms, weigh
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.jws import Signed, parse, sign, sign_payload
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.approval import ActionApproval, Approval, Grant
from ringfence.messages.base import PublicJwk
from ringfence.messages.credential import Coordinates, CredentialDecision, CredentialRequest
from ringfence.messages.enrolment import AttestationSelector, InstanceEnrolment, InstanceRef
from ringfence.messages.lease import RevocationRequest, Selector
from ringfence.messages.registry import (
    COMMANDS,
    AgentActivate,
    AgentDecommission,
    AgentRenewKey,
    AgentReportReuse,
    AgentResume,
    AgentRotateKey,
    AgentSetAttestation,
    AgentSetCeiling,
    AgentSuspend,
    BackendSettings,
    Delegation,
    GroupDelegation,
    GroupLink,
    McpRule,
    ProvisionerLink,
    ProvisionerSet,
    Provisioning,
    RequestRule,
    TargetRemove,
    TargetSet,
    TaskDelegate,
    TaskEnd,
    UserDisable,
    UserReviewCompromise,
    VerbFloor,
)
from ringfence.messages.topics import REGISTRY_COMMAND, REVOCATION_REQUEST
from ringfence.messages.trust import OidcIssuer
from ringfence.model.http_targets import Action, RequestMap
from ringfence.model.identity.attestation import matching, selector_id
from ringfence.model.leases.lifecycle import selector_key_of
from ringfence.model.lifecycle import CommandRefusedError, command_subject
from ringfence.model.mcp.messages import read_message
from ringfence.model.records.instances import EnrolmentError, check_ref, instance_id, open_enrolment
from ringfence.model.records.provisioning import given_by
from ringfence.model.requests.approvals import check_approval, check_understood
from ringfence.model.requests.facts import load_context, violations
from ringfence.model.requests.grants import check_grant
from ringfence.model.scope.scope import missing
from ringfence.model.unknown_fields import NOT_UNDERSTOOD, describe_unknown, is_understood, unknown_fields
from ringfence.model.verdict import ALLOWED
from ringfence.registry.domain import only_reduces
from tests.support import user_keys
from tests.support.in_memory_registry import TD, InMemoryRegistry, permission
from tests.support.unknown_field_cases import NAME, as_before, planted
from tests.support.verdicts import code_of
from tests.unit.test_gateway_domain import Place
from tests.unit.test_id_token_consent import trusting
from tests.unit.test_requests import AGE_S, AS_OF, WANTED, facts
from tools.schemas.examples import EXAMPLES

WIDE = permission("env/**", verbs=("read", "deploy"))
ISSUER = "https://token.actions.example"

# --- they are found, and named ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", EXAMPLES, ids=lambda model: model.__name__)
def test_each_is_found_wherever_it_stands(model: Any) -> None:
    example = EXAMPLES[model]
    assert is_understood(example)
    assert unknown_fields(example) == ()
    for one in planted(example):
        assert not is_understood(one)
        (found,) = unknown_fields(one)
        assert found.name == NAME


def target_set(**fields: Any) -> TargetSet:
    document = {
        "iss": "spiffe://t.example/user/olga", "aud": "t.example", "iat": 1, "exp": 2, "jti": "1",
        "target_id": "platform", "description": "a target", "backend": {"kind": "jwt", "url": "https://x.example"},
        "verbs": [{"verb": "deploy"}], **fields,
    }  # fmt: skip
    return TargetSet.model_validate_json(json.dumps(document))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"verbs": [{"verb": "deploy", "asks": "sponsor"}]},
            'unknown field "asks" in target platform, verbs.deploy: did you mean "ask"?',
        ),
        ({"max-ttl-s": 60}, 'unknown field "max-ttl-s" in target platform: did you mean "max_ttl_s"?'),
        (
            {"requests": [{"method": "GET", "path": "/a", "verb": "deploy", "resource": "a", "headers": {}}]},
            'unknown field "headers" in target platform, requests.1 (GET /a): it may limit something',
        ),
        (
            {
                "requests": [
                    {
                        "method": "MCP", "path": "/a", "verb": "deploy", "resource": "a",
                        "mcp": {"method": "tools/call", "argument": {"a": ["b"]}},
                    }
                ]
            },
            'unknown field "argument" in target platform, requests.1 (MCP /a).mcp: did you mean "arguments"?',
        ),
        ({"\x1b[2J": 1}, 'unknown field "‹U+001B›[2J" in target platform'),
        ({"x" * 5000: 1}, f'unknown field "{"x" * 77}..." in target platform'),
        ({"backend": {"kind": "jwt", "anything": 1}}, ""),
        ({"nbf": 1}, ""),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)  # fmt: skip
def test_unknown_field_is_named_with_its_place_and_the_nearest_name(
    fields: dict[str, Any], said: str
) -> None:
    found = unknown_fields(target_set(**fields))
    assert bool(found) is bool(said)
    assert not said or describe_unknown(found, "target platform").startswith(said)


def test_of_very_many_a_few_are_named() -> None:
    found = unknown_fields(target_set(**{f"x{number}": 1 for number in range(1000)}))
    assert len(describe_unknown(found, "target platform")) < 2048
    assert describe_unknown(found, "target platform").endswith("and 995 more")


# --- where it is set --------------------------------------------------------------------------------------------------


def commands(ledger: InMemoryRegistry) -> Iterable[Any]:
    """One of each command, each valid after those before it."""
    claims = ledger.claims
    yield ledger.user_set("olga", "uma", entitlements=ledger.entitlements(WIDE))
    group = GroupDelegation(group="dev", scope=(WIDE,))
    delegation = Delegation(source="hr", groups=(group,))
    keys = (ledger.key_record(ledger.key("hr")),)
    yield claims(ProvisionerSet, "olga", provisioner_id="hr", name="HR", keys=keys, delegation=delegation)
    yield claims(ProvisionerLink, "hr", provisioner_id="hr", groups=(GroupLink(group="dev"),))
    entitlements = ledger.entitlements(WIDE).model_copy(update={"source": "hr"})
    said = Provisioning(groups=("dev",))
    yield ledger.user_set("hr", "dora", keys=(), entitlements=entitlements, provisioned=said)
    new = user_keys.new_key("sam")
    yield user_keys.add_key(ledger, "olga", "sam", new)
    yield user_keys.end_key(ledger, "sam", "sam", new.kid)
    rules = (
        RequestRule(method="GET", path="/{path*}", verb="read", resource="{path*}"),
        RequestRule(
            method="MCP", path="/m", verb="read", resource="x", mcp=McpRule(method="tools/call", name="a")
        ),
    )
    verbs = (VerbFloor(verb="read"), VerbFloor(verb="deploy", floor="sponsor"))
    backend = BackendSettings(kind="jwt")
    yield ledger.target_set("olga", "staging", verbs=verbs, requests=rules, backend=backend)
    selector = AttestationSelector(issuer=ISSUER, claims={"sub": "repo:acme/deploy"})
    yield ledger.register("sam", "bot", "sam", ceiling=(WIDE,), attestation=(selector,), inactive=True)
    yield claims(AgentActivate, "sam", agent_id="bot")
    yield claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=(WIDE, permission("a")))
    yield claims(
        AgentSetAttestation,
        "sam",
        agent_id="bot",
        attestation=(selector.model_copy(update={"key_bound": True}),),
    )
    yield ledger.register("sam", "renewer", "sam")
    renewed = ledger.key("renewer", "agent")
    yield claims(
        AgentRenewKey, "sam", iss=renewed.id, agent_id="renewer", key=SigningKey.generate(renewed.id).public
    )
    ledger.clock.ms += 400_000
    again = claims(AgentRenewKey, "sam", iss=renewed.id, agent_id="renewer", key=ledger.key("other").public)
    yield claims(
        AgentReportReuse, "sam", iss=ledger.policy.id, agent_id="renewer", message=sign(again, renewed)
    )
    key = ledger.key_record(ledger.key("bot-2", "agent"))
    yield claims(AgentRotateKey, "sam", agent_id="bot", key=key, overlap_s=60)
    yield claims(AgentSuspend, "sam", agent_id="bot", reason="look")
    yield claims(AgentResume, "sam", agent_id="bot", reason="looked")
    yield ledger.register("sam", "helper", "sam", ceiling=(WIDE,))
    terms = ledger.terms("bot", scope=(WIDE,))
    first = ledger.assign("uma", "bot", terms=terms)
    yield first
    task = ledger.directory.chains.authorise(parse(ledger.signed(first)), ledger.clock.ms).command_id
    part = ledger.terms("helper", scope=(WIDE,), not_after=terms.not_after)
    yield claims(TaskDelegate, "agent/bot", parent=task, terms=part)
    yield claims(TaskEnd, "uma", task_id=task, reason="done")
    yield claims(TargetRemove, "olga", target_id="staging", reason="moved")
    yield ledger.transfer("olga", "helper", "suzy")
    yield claims(AgentDecommission, "olga", agent_id="helper", reason="over")
    yield claims(UserDisable, "olga", user_id="dora", reason="left")
    yield user_keys.end_key(ledger, "olga", "otto", ledger.key("otto").kid, compromised=True)
    otto = ledger.directory.user("otto")
    assert otto is not None
    (report,) = otto.state.holds
    yield ledger.claims(
        UserReviewCompromise, "root", user_id="otto", report=report.report, report_digest=report.report_digest,
        outcome="lift", reason="found",
    )  # fmt: skip


def test_the_registry_takes_no_command_that_gives_with_one_and_every_command_that_takes_away() -> None:
    ledger, kinds = InMemoryRegistry(), set()
    ledger.organisation()
    for command in commands(ledger):
        kinds.add(type(command))
        if only_reduces(command):
            ledger.give(next(planted(command)))
            continue
        for one in planted(command):
            with pytest.raises(CommandRefusedError) as caught:
                ledger.give(one, passing_ms=0)
            # A permission is looked at by itself, in records too.
            assert caught.value.code in ("unknown_field", "scope_invalid"), command.typ
            assert f'unknown field "{NAME}"' in str(caught.value)
            if caught.value.code == "unknown_field":
                kind, id = command_subject(command, message_id(command.iss, command.jti))
                assert f'"{NAME}" in {kind} {id}' in str(caught.value)
        assert ledger.give(command) is not None, command.typ
    assert kinds == set(COMMANDS)


def test_a_consent_with_one_hands_over_no_agent() -> None:
    ledger = InMemoryRegistry()
    ledger.organisation()
    ledger.give(ledger.register("sam", "bot", "sam"))
    limited = ledger.transfer_consent("suzy", "bot", only_for_a_week=True)
    with pytest.raises(CommandRefusedError, match='unknown field "only_for_a_week" in the consent') as caught:
        ledger.give(ledger.transfer("sam", "bot", "suzy", consent=limited))
    assert caught.value.code == "unknown_field"
    assert ledger.give(ledger.transfer("sam", "bot", "suzy")) is not None


def test_a_consent_with_one_is_none_for_a_new_task() -> None:
    ledger = InMemoryRegistry()
    ledger.organisation()
    ledger.give(ledger.target_set("olga", "staging"))
    ledger.give(ledger.register("sam", "bot", "sam", ceiling=(WIDE,)))
    terms = ledger.terms("bot")
    limited = ledger.consent("uma", terms, only_once=True)
    with pytest.raises(CommandRefusedError, match='unknown field "only_once" in the consent') as caught:
        ledger.give(ledger.assign("sam", "bot", terms=terms, on_behalf_of="uma", consent=limited))
    assert caught.value.code == "unknown_field"
    consent = ledger.consent("uma", terms)
    assert ledger.give(ledger.assign("sam", "bot", terms=terms, on_behalf_of="uma", consent=consent))


def test_unknown_field_is_not_reported_to_an_unentitled_sender() -> None:
    """Whoever may not give the command is told so, and not which fields there are."""
    ledger = InMemoryRegistry()
    ledger.organisation()
    with pytest.raises(CommandRefusedError) as caught:
        ledger.give(next(planted(ledger.target_set("sam", "staging"))))
    assert caught.value.code == "not_operator"


def test_of_a_delegation_that_is_not_understood_a_provisioner_gives_nothing_new() -> None:
    ledger = InMemoryRegistry()
    ledger.organisation()
    delegated_to_hr(
        ledger, GroupDelegation(group="dev", scope=(WIDE,)).model_copy(update={"only_in": "Berlin"})
    )
    entitlements = ledger.entitlements(WIDE).model_copy(update={"source": "hr"})
    said = Provisioning(groups=("dev",))
    with pytest.raises(
        CommandRefusedError, match=r'unknown field "only_in" in what is delegated to hr, groups\.dev'
    ):
        ledger.give(ledger.user_set("hr", "dora", keys=(), entitlements=entitlements, provisioned=said))
    nothing = ledger.entitlements().model_copy(update={"source": "hr"})
    assert ledger.give(ledger.user_set("hr", "dora", keys=(), entitlements=nothing, provisioned=said))


def delegated_to_hr(ledger: InMemoryRegistry, *groups: GroupDelegation) -> None:
    delegation = Delegation(source="hr", groups=groups)
    keys = (ledger.key_record(ledger.key("hr")),)
    as_before(
        ledger,
        ledger.claims(
            ProvisionerSet, "olga", provisioner_id="hr", name="HR", keys=keys, delegation=delegation
        ),
    )


def test_a_group_with_one_gives_no_role_and_every_other_group_does() -> None:
    ledger = InMemoryRegistry()
    ledger.organisation()
    limited = GroupDelegation(group="leads", roles=("sponsor",)).model_copy(update={"only_in": "Berlin"})
    delegated_to_hr(ledger, limited, GroupDelegation(group="chiefs", roles=("sponsor",)))
    nothing = ledger.entitlements().model_copy(update={"source": "hr"})

    def sponsor(group: str) -> Any:
        said = Provisioning(groups=(group,))
        return ledger.user_set("hr", group, ["sponsor"], keys=(), entitlements=nothing, provisioned=said)

    with pytest.raises(CommandRefusedError, match='unknown field "only_in" in what is delegated to hr'):
        ledger.give(sponsor("leads"))
    assert ledger.give(sponsor("chiefs"))


@pytest.mark.parametrize(
    ("part", "what"),
    [
        ("invitation", "the invitation"),
        ("possession", "the possession"),
        ("endorsement", "the co-signature"),
    ],
)
def test_no_key_is_added_by_an_invitation_possession_or_co_signature_with_one(part: str, what: str) -> None:
    ledger = InMemoryRegistry()
    ledger.organisation()
    new = user_keys.new_key("sam")
    limits: dict[str, dict[str, Any]] = {part: {NAME: "of this month"}}
    invited = user_keys.invitation(ledger, "olga", "sam", **limits.get("invitation", {}))
    possessed = user_keys.possession(ledger, new, "sam", invited, **limits.get("possession", {}))
    endorsed = user_keys.endorsement(
        ledger, "otto", "sam", new.kid, possessed, **limits.get("endorsement", {})
    )
    with pytest.raises(CommandRefusedError, match=f'unknown field "{NAME}" in {what}: ') as caught:
        ledger.give(
            user_keys.add_key(
                ledger, "olga", "sam", new, invitation=invited, possession=possessed, endorsement=endorsed
            )
        )
    assert caught.value.code == "unknown_field"
    assert ledger.give(user_keys.add_key(ledger, "olga", "sam", new, cosigned="otto"))


async def test_the_sdk_signs_no_command_with_one(tmp_path: Path) -> None:
    """Nothing is connected: what has one does not come as far as Kafka."""
    connection = Connection(
        SigningKey.generate("spiffe://acme.example/user/olga"),
        ClientSettings(trust_domain="acme.example", trust_root="x" * 43),
    )
    command = target_set(verbs=[{"verb": "deploy", "asks": "sponsor"}])
    with pytest.raises(
        InvalidCallError,
        match=re.escape('unknown field "asks" in target platform, verbs.deploy: did you mean "ask"?'),
    ):
        await connection.publish(REGISTRY_COMMAND, "platform", command)
    order = RevocationRequest(
        iss="spiffe://acme.example/user/olga", aud="acme.example", iat=1, jti="1", kind="revocation", reason="x",
        selector=Selector(all=True).model_copy(update={NAME: 1}),
    )  # fmt: skip
    with pytest.raises(Exception) as caught:  # it is let through, to a Kafka that is not there
        await connection.publish(REVOCATION_REQUEST, "all", order)
    assert not isinstance(caught.value, InvalidCallError)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            {"issuer": ISSUER, "claims": {"sub": "a"}, "key-bound": True},
            f'unknown field "key-bound" in the selector for {ISSUER}: did you mean "key_bound"?',
        ),
        (
            {"issuer": ISSUER, "claims": {"sub": "a"}, "audience": "b"},
            f'unknown field "audience" in the selector for {ISSUER}: it may limit something',
        ),
    ],
)
def test_the_command_line_names_it_in_a_selector(tmp_path: Path, text: dict[str, Any], said: str) -> None:
    file = tmp_path / "selectors.json"
    file.write_text(json.dumps([text]))
    for option in (json.dumps(text), f"@{file}"):
        with pytest.raises(typer.BadParameter, match=re.escape(said)):
            parse_selectors([option])


def test_the_command_line_names_it_in_a_permission() -> None:
    text = '{"target": "staging", "verbs": ["deploy"], "resources": ["a"], "resource": ["b"]}'
    with pytest.raises(
        typer.BadParameter, match=r'unknown field "resource" in .*: did you mean "resources"\?'
    ):
        parse_permission(text)


def test_the_command_line_takes_nothing_that_is_said_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last would count, and what the first limits would be lost."""
    one = '"issuer": "https://a.example", "claims": {"sub": "a"}'
    (tmp_path / "selectors.json").write_text(f'[{{{one}, "max_life_s": 60, "max_life_s": 3600}}]')
    (tmp_path / "scope.json").write_text(
        '[{"target": "a", "verbs": ["read"], "verbs": ["go"], "resources": ["a"]}]'
    )
    for selector in (
        "https://a.example sub=a sub=repo:*", "https://a.example sub=a life=60s life=1h",
        f'{{{one}, "claims": {{"sub": "repo:*"}}}}', f"@{tmp_path}/selectors.json",
    ):  # fmt: skip
        with pytest.raises(typer.BadParameter, match="twice"):
            parse_selectors([selector])
    for text in (
        '{"target": "a", "verbs": ["read"], "resources": ["a"], "resources": ["**"]}', f"@{tmp_path}/scope.json"
    ):  # fmt: skip
        with pytest.raises(typer.BadParameter, match="twice"):
            parse_scope([text])
    add = ("target", "add", "a", "--description", "x", "--backend", "jwt")
    for options in (
        ("--verb", "deploy=sponsor", "--verb", "deploy"),
        ("--verb", "deploy", "--ask", "deploy=operator", "--ask", "deploy=sponsor"),
        ("--verb", "read", "--request", "GET /a read a query:m=1 query:m=2"),
        ("--verb", "read", "--request", "MCP /a read a message:tools/call=x argument:m=1 argument:m=2"),
        ("--verb", "read", "--setting", "url=https://a.example", "--setting", "url=https://b.example"),
    ):
        assert main([*add, *options]) == 2
        assert "is there twice" in " ".join(capsys.readouterr().err.replace("│", " ").split())


# --- where it is read: nothing becomes possible by it -----------------------------------------------------------------

MCP_RULES: dict[str, dict[str, Any]] = {
    "plan": {"method": "tools/call", "name": "push", "arguments": {"dry": ("true",)}},
    "push": {"method": "tools/call", "name": "push"},
    "call": {"method": "tools/call", "name": "{tool*}"},
    "say": {"method": "notifications/*"},
}
RULES = (
    RequestRule(method="GET", path="/envs/{name}", verb="read", resource="env/{name}"),
    RequestRule(method="GET", path="/{all*}", verb="list", resource="{all*}"),
    RequestRule(method="POST", path="/runs", verb="dry-run", resource="runs", query={"dry": ("1",)}),
    RequestRule(method="POST", path="/runs", verb="comment", resource="runs", body={"event": ("COMMENT",)}),
    RequestRule(method="POST", path="/runs", verb="run", resource="runs"),
    RequestRule(method="POST", path="/{all*}", verb="post", resource="{all*}"),
    RequestRule(method="GET", path="/mcp", verb="connect", resource="server"),
    *(
        RequestRule(method="MCP", path="/mcp", verb=verb, resource="server", mcp=McpRule(**mcp))
        for verb, mcp in MCP_RULES.items()
    ),
)
PLANTED_RULES = tuple((rule, tuple(planted(rule))) for rule in RULES)


def posted(tool: str, **arguments: Any) -> bytes:
    params = {"name": tool, "arguments": arguments}
    return json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}).encode()


REQUESTS = (
    ("GET", "/envs/a", None), ("GET", "/b", None), ("GET", "/mcp", None), ("POST", "/runs?dry=1", b""),
    ("POST", "/runs?dry=2", b"{}"), ("POST", "/runs", b'{"event": "COMMENT"}'), ("POST", "/runs", b'{"event": "A"}'),
    ("POST", "/runs", b"x"), ("POST", "/other", b""), ("POST", "/mcp", posted("push", dry=True)),
    ("POST", "/mcp", posted("push")), ("POST", "/mcp", posted("pull")),
    ("POST", "/mcp", b'{"jsonrpc": "2.0", "method": "notifications/x"}'),
)  # fmt: skip


def decided(rules: Iterable[RequestRule]) -> list[Action | None]:
    """What a map says of each of the requests; None where nobody is allowed it."""
    map = RequestMap(tuple(rules))
    return [map.action(method, target, body) for method, target, body in REQUESTS]


@given(st.lists(st.tuples(st.sampled_from(PLANTED_RULES), st.integers(0, 3)), min_size=1, max_size=8))
def test_no_request_comes_under_another_rule_by_it(chosen: list[tuple[Any, int]]) -> None:
    """The number says which of the rules has a field that is unknown, and where: 0, none."""
    plain = [rule for (rule, _), _ in chosen]
    limited = [(rule, *others)[min(where, len(others))] for (rule, others), where in chosen]
    before, after = decided(plain), decided(limited)
    assert all(now in (then, None) for then, now in zip(before, after, strict=True))
    both = RequestMap(plain), RequestMap(limited)
    for tool in ("push", "pull"):
        could, can = (set(map.mcp_offers("/mcp", "tools/call", tool)) for map in both)
        assert can <= could


def test_a_tool_that_is_not_understood_is_offered_to_nobody() -> None:
    plan, push, call = RULES[7:10]
    limited = push.model_copy(update={NAME: 1})
    assert RequestMap([push, call]).mcp_offers("/mcp", "tools/call", "push") == (Action("push", "server"),)
    assert RequestMap([limited, call]).mcp_offers("/mcp", "tools/call", "push") == ()
    assert RequestMap([plan, limited]).mcp_offers("/mcp", "tools/call", "push") == (Action("plan", "server"),)
    assert RequestMap([limited, call]).mcp_offers("/mcp", "tools/call", "pull") == (Action("call", "server"),)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.method} {rule.verb}")
def test_the_rule_denies_just_what_its_known_conditions_fit(rule: RequestRule) -> None:
    weaker = [RULES[1], RULES[5], RULES[9], RULES[10]]
    alone, plain = decided([rule]), decided([rule, *weaker])
    assert any(alone)
    for limited in planted(rule):
        for own, then, now in zip(alone, plain, decided([limited, *weaker]), strict=True):
            assert now == (None if then == own else then)


def test_the_denial_says_which_field_and_what_to_do() -> None:
    limited = RULES[0].model_copy(update={"headers": {"x": ["y"]}, "\x1b": 1})
    map = RequestMap([limited, RULES[10].model_copy(update={NAME: 1}), *RULES])
    assert map.action("GET", "/envs/a") is None
    assert map.not_understood("GET", "/envs/a") == (
        "the rule for GET /envs/{name} has a field that is not known here, and may limit it: headers, ‹U+001B›; "
        "upgrade the gateway, or have an operator set the target without that field"
    )
    notified = b'{"jsonrpc": "2.0", "method": "notifications/x"}'
    assert NAME in (map.not_understood("POST", "/mcp", notified) or "")
    assert map.mcp_action("/mcp", read_message(notified)) is None
    assert map.not_understood("GET", "/other") is None
    assert map.not_understood("DELETE", "/envs/a") is None
    assert RequestMap(RULES).not_understood("GET", "/envs/a") is None


def test_a_verb_with_one_is_given_to_nobody_whatever_its_floor() -> None:
    plain = facts()
    for floor in ("none", "sponsor", "operator"):
        for limited in planted(VerbFloor(verb="read", floor=cast(Any, floor))):
            verbs = (limited, VerbFloor(verb="deploy"))
            entry = replace(plain.target, state=plain.target.state.model_copy(update={"verbs": verbs}))
            (reason,) = violations(replace(plain, target=entry), AS_OF, AGE_S)
            assert (reason.code, reason.permission, reason.side) == ("verb_not_understood", WANTED, "target")
            assert NAME in reason.message
            other = WANTED.model_copy(update={"verbs": ("deploy",)})
            codes = {one.code for one in violations(replace(facts(other), target=entry), AS_OF, AGE_S)}
            assert "verb_not_understood" not in codes


def test_an_action_of_such_a_verb_is_denied_at_the_gateway() -> None:
    place = Place()
    assert place.codes() == set()
    as_before(
        place.ledger,
        place.ledger.target_set("olga", "staging", verbs=tuple(planted(VerbFloor(verb="read")))),
    )
    assert place.codes() == {"verb_not_understood"}
    assert isinstance(place.weigh(), Refusal)


def test_a_request_with_one_is_held_to_the_same_limits() -> None:
    """A newer agent may say more of its wish. Only in the scope, which is compared, such a field counts."""
    given = facts()
    assert violations(given, AS_OF, AGE_S) == ()
    for one in planted(given.request.claims):
        found = violations(replace(given, request=Signed(one, "")), AS_OF, AGE_S)
        expected = {"scope_invalid"} if one.scope[0].model_extra else set()
        assert {reason.code for reason in found} == expected


def test_entitlements_with_one_count_for_nothing() -> None:
    given = facts()
    for one in planted(given.user.state.entitlements):
        state = given.user.state.model_copy(update={"entitlements": one})
        reasons = violations(replace(given, user=replace(given.user, state=state)), AS_OF, AGE_S)
        assert [reason.side for reason in reasons] == [f"entitlements:{state.user_id}"]


def test_a_permission_with_one_is_held_by_nobody_and_covers_nothing() -> None:
    for one in planted(WIDE):
        assert missing((WIDE,), (one,)) == (WIDE,)
        assert missing((one,), (WIDE,)) == (one,)
        assert missing((WIDE,), (one, WIDE)) == ()


def test_a_selector_with_one_lets_nobody_in_and_nobody_stay() -> None:
    claims = {"sub": "repo:acme/deploy"}
    selector = AttestationSelector(issuer=ISSUER, claims=claims)
    assert matching((selector,), ISSUER, claims)
    agent = facts().agent.state
    for one in planted(selector):
        assert matching((one,), ISSUER, claims) is None
        assert matching((one, selector), ISSUER, claims) == (selector, claims)
        ref = InstanceRef(
            instance_id="3f1c7a52-9a0e-5c1b-8d2e-7a529a0e5c1b", issuer=ISSUER, subject="s",
            selector=selector_id(one), not_after=1,
        )  # fmt: skip
        verdict = check_ref(ref, agent.model_copy(update={"attestation": (one,)}))
        assert code_of(verdict) == "instance_void"


def test_a_delegation_with_one_gives_nothing() -> None:
    group = GroupDelegation(group="dev", roles=("sponsor",), scope=(WIDE,))
    delegation = Delegation(source="hr", groups=(group, GroupDelegation(group="ops", roles=("auditor",))))
    whole = given_by(delegation, ("dev", "ops"))
    for one in planted(delegation):
        part = given_by(one, ("dev", "ops"))
        assert set(part.groups) < set(whole.groups)
        assert set(part.roles) <= set(whole.roles)


def test_a_grant_with_one_opens_nothing() -> None:
    given, example = facts(), cast(Grant, EXAMPLES[Grant])
    revisions = given.revisions("0" * 64)
    grant = example.model_copy(
        update={
            "agent_id": given.agent.state.agent_id, "task_id": given.task.state.task_id, "scope": (WANTED,),
            "revisions": revisions,
        }
    )  # fmt: skip
    terms: dict[str, Any] = {
        "at_ms": grant.iat * 1000, "ttl_s": grant.ttl_s, "delivery": grant.delivery, "revisions": revisions,
    }  # fmt: skip
    assert check_grant(grant, given, **terms) == ALLOWED
    places = list(planted(grant))
    assert len(places) == 3
    for one in places:
        assert code_of(check_grant(one, given, **terms)) == "grant_not_understood"


def test_a_yes_with_one_counts_for_nothing_and_a_no_counts() -> None:
    given, example = facts(), cast(Approval, EXAMPLES[Approval])
    revisions = given.revisions("0" * 64)
    approval = example.model_copy(
        update={
            "request": given.request.compact, "request_digest": given.request.digest, "revisions": revisions,
            "verdict": "approved",
        }
    )  # fmt: skip
    terms: dict[str, Any] = {
        "at_ms": approval.iat * 1000, "ttl_s": approval.ttl_s, "delivery": approval.delivery, "revisions": revisions,
    }  # fmt: skip
    assert check_approval(Signed(approval, ""), given, **terms) == ALLOWED
    for one in planted(approval):
        assert code_of(check_approval(Signed(one, ""), given, **terms)) == "approval_not_understood"
    action = cast(ActionApproval, EXAMPLES[ActionApproval])
    for one in planted(action):
        assert code_of(check_understood(one.model_copy(update={"verdict": "approved"}))) in NOT_UNDERSTOOD
        assert check_understood(one.model_copy(update={"verdict": "denied"})) == ALLOWED


@pytest.mark.parametrize(
    "selector", [Selector(agent_id="bot"), Selector(all=True), Selector(target_id="t")], ids=str
)
def test_an_order_with_one_stops_no_less(selector: Selector) -> None:
    order = {
        "iss": "spiffe://acme.example/user/olga", "aud": "acme.example", "iat": 1, "jti": "1", "kind": "revocation",
        "reason": "x", "selector": {**selector.model_dump(exclude_none=True), "only_if": "idle"}, NAME: 1,
    }  # fmt: skip
    key = SigningKey.generate("spiffe://acme.example/user/olga")
    read = parse(sign_payload(RevocationRequest, json.dumps(order).encode(), key)).unverified_claims(
        RevocationRequest
    )
    assert read.selector is not None
    assert selector_key_of(read.selector) == selector_key_of(selector)


def test_an_instance_of_an_issuer_that_the_bundle_limits_in_a_way_that_is_not_known_is_none() -> None:
    ledger = InMemoryRegistry()
    key = SigningKey.generate(f"spiffe://{TD}/agent/bot")
    now_s = ledger.clock.ms // 1000
    enrolment = ledger.claims(
        InstanceEnrolment, "root", sub=key.id, instance_id=instance_id("0" * 64, key.kid), key=key.record(now_s + 600),
        issuer=ISSUER, subject="s", selector="0" * 64, claims={}, token_digest="0" * 64, agent_revision=1,
    ).model_copy(update={"iss": ledger.registry.id})  # fmt: skip
    compact = sign(enrolment, ledger.registry)
    plain = OidcIssuer(issuer=ISSUER, uses=("instances",), discovery=True)
    trusting(ledger, plain)
    assert open_enrolment(compact, ledger.trust, now_s) == enrolment
    for limited in planted(plain):
        trusting(ledger, limited)
        with pytest.raises(EnrolmentError, match=NAME) as caught:
            open_enrolment(compact, ledger.trust, now_s)
        assert caught.value.code == "issuer_not_understood"


def test_the_command_line_names_it_in_a_delegation(tmp_path: Path) -> None:
    file = tmp_path / "delegation.yaml"
    file.write_text("source: hr\ngroups:\n  dev:\n    role: [auditor]\n    only-in: Berlin\nsources: hr\n")
    with pytest.raises(YamlFileError) as caught:
        read_delegation(file)
    assert str(caught.value).splitlines() == [
        f"{file}:4: group dev has no 'role': did you mean 'roles'?",
        f"{file}:5: group dev has no 'only-in'",
        f"{file}:6: the file has no 'sources': did you mean 'source'?",
    ]


def test_unknown_limiting_field_is_shown_with_its_effect(
    capsys: pytest.CaptureFixture[str],
) -> None:
    verb = VerbFloor(verb="deploy", floor="sponsor").model_copy(update={"asks": "sponsor"})
    state = {
        "target_id": "staging", "description": "a target", "backend": {"kind": "jwt"}, "status": "active", "keys": [],
        "verbs": [{"verb": "read"}, verb.model_dump()], "max_ttl_s": 60,
        "requests": [{"method": "GET", "path": "/a", "verb": "read", "resource": "a", "headers": 1}],
    }  # fmt: skip
    print_record("target", {"id": "staging", "revision": 1, "state": state})
    said = " ".join(capsys.readouterr().out.split())
    assert "read, deploy (sponsor; to nobody, as asks is not known here)" in said
    assert "GET /a is denied, as headers is not known here" in said
    selector = AttestationSelector(issuer=ISSUER, claims={"sub": "a"})
    assert show_selector(selector).endswith("life=3600s")
    assert show_selector(next(planted(selector))).endswith(f"(lets nobody in, as {NAME} is not known here)")


# --- and the issuer looks for itself ----------------------------------------------------------------------------------


def refusal(place: Place, request: CredentialRequest) -> tuple[set[str], bool]:
    """What the issuer has against a decision of policy that allows a request, and whether it is a finding."""
    ledger = place.ledger
    compact = ledger.signed(request)
    at = Coordinates(topic="t", partition=0, offset=1, appended_at_ms=ledger.clock.ms)
    id = message_id(request.iss, request.jti)
    facts = load_context(ledger.directory, Signed(request, compact), id)
    decision = ledger.claims(
        CredentialDecision, "root", request_id=id, request=compact, source=at, outcome="allowed", ttl_s=60,
        delivery="agent", revisions=facts.revisions("0" * 64),
    )  # fmt: skip
    terms = Terms(f"spiffe://{TD}/service/issuer", TD, 10**9, ("jwt",))
    found = weigh(Decision(Signed(decision, "x.y.z"), at), ledger.directory, terms)
    if isinstance(found, Issue):
        return set(), False
    assert isinstance(found, issuer_domain.Refusal)
    return {reason.code for reason in found.reasons}, found.finding


def wish(place: Place, verb: str = "read") -> CredentialRequest:
    key = {"kty": "OKP", "crv": "X25519", "x": "hSDwCYkwp1R0i33ctD73Wg2_Og0mOBr066SpjqqbTmo"}
    return place.ledger.claims(
        CredentialRequest, "agent/bot", task_id=place.task, ttl_s=60, reason="test",
        reply_key=PublicJwk(**cast(Any, key)), scope=(permission("env/staging/web", verbs=(verb,)),),
    )  # fmt: skip


def test_the_issuer_refuses_what_policy_allowed_and_calls_it_no_finding() -> None:
    """A policy of another version may know the field: it is no lie."""
    place = Place()
    assert refusal(place, wish(place)) == (set(), False)
    for one in planted(wish(place)):
        codes, finding = refusal(place, one)
        assert codes == ({"scope_invalid"} if one.scope[0].model_extra else set())
        assert finding is bool(one.scope[0].model_extra)
    as_before(
        place.ledger,
        place.ledger.target_set(
            "olga", "staging", verbs=(next(planted(VerbFloor(verb="read"))), VerbFloor(verb="deploy"))
        ),
    )
    assert refusal(place, wish(place, "deploy")) == (set(), False)
    assert refusal(place, wish(place)) == ({"verb_not_understood"}, False)
    both = wish(place).model_copy(update={"scope": (permission("env/a", verbs=("read", "deploy")),)})
    assert refusal(place, both) == ({"verb_not_understood"}, False)
