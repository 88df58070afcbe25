"""Writes `v1.json`: records and signed messages as the code of before unknown fields were refused made them.

Run once, by that code; README.md says how. The code of today refuses most of these commands.
"""

from __future__ import annotations

import json
import sys
import uuid
from pathlib import Path
from typing import Any

from ringfence.kernel.jws import parse
from ringfence.messages.approval import Approval, Grant, GrantWithdraw
from ringfence.messages.credential import CredentialRequest, Revisions
from ringfence.messages.instances import AttestationSelector
from ringfence.messages.keys import KeyRecord
from ringfence.messages.lease import RevocationRequest, Selector
from ringfence.messages.registry import (
    AgentActivate,
    AgentDecommission,
    AgentResume,
    AgentRotateKey,
    AgentSetAttestation,
    AgentSetCeiling,
    AgentSuspend,
    AgentTransfer,
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
    TaskDelegate,
    TaskEnd,
    UserDisable,
    VerbFloor,
)
from tests.ledger import START_MS, TD, Ledger, permission

NOT_YET = {"added_in_2030": {"unless": ["it is Friday"]}}
"""A field that no version has."""
WIDE = permission("env/**", verbs=("read", "deploy"))
ISSUER = "https://token.actions.example"


class Keeper(Ledger):
    """An honest registry of before, which writes down every record."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[dict[str, Any]] = []

    def admit(self, compact: str, reader: Any = None) -> str | None:
        problem = super().admit(compact, reader)
        assert problem is None, problem
        kind = parse(compact).header.typ.removeprefix("ringfence.").removesuffix("+jwt")
        self.records.append({"kind": kind, "appended_at_ms": self.clock.ms, "jws": compact})
        return problem


def write(file: Path) -> None:
    """Make an organisation with every command, each with unknown fields where it could have them."""
    keeper = Keeper()
    keeper.organisation()
    users(keeper)
    targets(keeper)
    agents(keeper)
    task_id = tasks(keeper)
    entries = {subject(one["jws"]): None for one in keeper.records}
    document = {
        "trust_domain": TD,
        "root_kid": keeper.root.kid,
        "now_s": START_MS // 1000,
        "bundle": keeper.trust.compact.decode(),
        "records": keeper.records,
        "states": [state(keeper, kind, id) for kind, id in entries],
        "messages": messages(keeper, task_id),
        "end_ms": keeper.clock.ms,
    }
    file.write_text(json.dumps(document, indent=1) + "\n")


def subject(compact: str) -> tuple[str, str]:
    kind, _, id = json.loads(parse(compact).payload)["sub"].removeprefix(f"spiffe://{TD}/").partition("/")
    return kind, id


def state(keeper: Keeper, kind: Any, id: str) -> dict[str, Any]:
    entry = keeper.directory.entry(kind, id)
    assert entry is not None
    dump = entry.state.model_dump(mode="json", exclude_none=True)
    return {"kind": kind, "id": id, "revision": entry.revision, "state": dump}


def more(message: Any, **fields: Any) -> Any:
    """The same, with fields that no version knows."""
    return type(message).model_validate_json(json.dumps({**json.loads(message.model_dump_json()), **fields}))


def users(keeper: Keeper) -> None:
    give = keeper.give
    give(more(keeper.user_set("olga", "vera", ["sponsor"]), **NOT_YET))
    limited = more(keeper.entitlements(WIDE), only_on=["Friday"])
    give(keeper.user_set("olga", "uma", entitlements=keeper.entitlements(WIDE)))
    give(keeper.user_set("olga", "ulla", entitlements=limited))
    key: KeyRecord = more(keeper.key_record(keeper.key("kurt")), **NOT_YET)
    give(keeper.user_set("olga", "kurt", keys=(key,)))
    give(keeper.claims(UserDisable, "olga", user_id="kurt", reason="left", **NOT_YET))
    keeper.key("hr")
    group = more(GroupDelegation(group="dev", scope=(WIDE,)), only_in="Berlin")
    delegation = Delegation(source="hr", groups=(group, GroupDelegation(group="ops")))
    record = keeper.key_record(keeper.key("hr"))
    give(
        keeper.claims(
            ProvisionerSet, "olga", provisioner_id="hr", name="HR", keys=(record,), delegation=delegation
        )
    )
    links = (GroupLink(group="dev", external_id="42"),)
    give(keeper.claims(ProvisionerLink, "hr", provisioner_id="hr", groups=links, **NOT_YET))
    entitlements = keeper.entitlements(WIDE).model_copy(update={"source": "hr"})
    said = more(Provisioning(groups=("dev",)), **NOT_YET)
    give(keeper.user_set("hr", "dora", keys=(), entitlements=entitlements, provisioned=said))


def targets(keeper: Keeper) -> None:
    verbs = (VerbFloor(verb="read"), more(VerbFloor(verb="deploy"), asks="sponsor"))
    rules = (
        more(RequestRule(method="GET", path="/env/{name}", verb="read", resource="env/{name}"), headers=["X-Dry"]),
        RequestRule(method="GET", path="/{path*}", verb="read", resource="{path*}"),
        RequestRule(
            method="MCP", path="/mcp", verb="read", resource="tool/get",
            mcp=more(McpRule(method="tools/call", name="get"), **NOT_YET),
        ),
        RequestRule(method="MCP", path="/mcp", mcp=McpRule(method="tools/call"), verb="read", resource="tools"),
    )  # fmt: skip
    backend = BackendSettings.model_validate({"kind": "jwt", "url": "https://staging.example"})
    keeper.give(
        more(keeper.target_set("olga", "staging", verbs=verbs, requests=rules, backend=backend), **NOT_YET)
    )
    keeper.give(keeper.target_set("olga", "plain", verbs=(VerbFloor(verb="read", floor="sponsor"),)))
    keeper.give(keeper.target_set("olga", "gone"))
    keeper.give(keeper.claims(TargetRemove, "olga", target_id="gone", reason="moved", **NOT_YET))


def agents(keeper: Keeper) -> None:
    give = keeper.give
    plain = AttestationSelector(issuer=ISSUER, claims={"sub": "repo:acme/deploy:ref:refs/heads/main"})
    limited = more(
        AttestationSelector(issuer=ISSUER, claims={"sub": "repo:acme/other"}), **{"key-bound": True}
    )
    give(more(keeper.register("sam", "bot", "sam", ceiling=(WIDE,), attestation=(plain, limited)), **NOT_YET))
    give(keeper.claims(AgentTransfer, "sam", agent_id="bot", sponsor="suzy"))
    give(keeper.register("olga", "orphan", "vera", ceiling=(WIDE,), inactive=True))
    give(keeper.claims(AgentActivate, "vera", agent_id="orphan", **NOT_YET))
    give(keeper.claims(AgentTransfer, "olga", agent_id="orphan", sponsor="sam", **NOT_YET))
    give(keeper.claims(AgentSetCeiling, "sam", agent_id="orphan", ceiling=(), **NOT_YET))
    give(keeper.claims(AgentSetAttestation, "sam", agent_id="orphan", attestation=(limited,)))
    give(keeper.claims(AgentSuspend, "sam", agent_id="orphan", reason="look", **NOT_YET))
    give(keeper.claims(AgentResume, "sam", agent_id="orphan", reason="looked", **NOT_YET))
    key = keeper.key_record(keeper.key("orphan-2", "agent"))
    give(keeper.claims(AgentRotateKey, "sam", agent_id="orphan", key=key, compromized=True))
    give(keeper.register("sam", "helper", "sam", ceiling=(WIDE,)))
    give(keeper.register("sam", "over", "sam"))
    give(keeper.claims(AgentDecommission, "sam", agent_id="over", reason="over", **NOT_YET))


def tasks(keeper: Keeper) -> str:
    terms = more(keeper.terms("bot", scope=(WIDE,)), **NOT_YET)
    change = keeper.give(keeper.assign("uma", "bot", terms=terms))
    assert change is not None
    task_id: str = change.state.task_id  # type: ignore[union-attr]
    consent = keeper.consent("uma", terms, **NOT_YET)
    change = keeper.give(
        keeper.assign("vera", "bot", terms=terms, on_behalf_of="uma", consent=consent, **NOT_YET)
    )
    assert change is not None
    ended: str = change.state.task_id  # type: ignore[union-attr]
    part = keeper.terms("helper", scope=(WIDE,), not_after=terms.not_after)
    keeper.give(keeper.claims(TaskDelegate, "agent/bot", parent=task_id, terms=part, **NOT_YET))
    keeper.give(keeper.claims(TaskEnd, "uma", task_id=ended, reason="done", **NOT_YET))
    return task_id


def messages(keeper: Keeper, task_id: str) -> list[dict[str, Any]]:
    """Signed messages that are no commands: a grant, an approval, a request and an order, each with unknown fields."""
    revisions = Revisions(agent=2, user=2, task=1, target=1, policy="0" * 64)
    scope = (permission("env/staging/*", verbs=("read",)),)
    grant = more(
        keeper.claims(
            Grant, "suzy", agent_id="bot", task_id=task_id, scope=scope, count=3, ttl_s=300, delivery="agent",
            revisions=revisions,
        ),
        only_at="night",
    )  # fmt: skip
    reply_key = {"kty": "OKP", "crv": "X25519", "x": "hSDwCYkwp1R0i33ctD73Wg2_Og0mOBr066SpjqqbTmo"}
    request = keeper.claims(
        CredentialRequest, "agent/bot", task_id=task_id, scope=scope, ttl_s=300, reason="test", reply_key=reply_key,
        most_uses=1,
    )  # fmt: skip
    compact = keeper.signed(request)
    approval = keeper.claims(
        Approval, "suzy", verdict="approved", request=compact, request_id=str(uuid.UUID(int=0)),
        request_digest="0" * 64, ttl_s=300, delivery="agent", revisions=revisions, only_at="night",
    )  # fmt: skip
    order = keeper.claims(
        RevocationRequest,
        "olga",
        kind="revocation",
        reason="test",
        selector=more(Selector(agent_id="bot"), **NOT_YET),
    )
    withdrawal = keeper.claims(
        GrantWithdraw, "suzy", grant_id=str(uuid.UUID(int=0)), reason="test", **NOT_YET
    )
    return [
        {"typ": one.typ, "appended_at_ms": keeper.clock.ms, "jws": keeper.signed(one)}
        for one in (grant, request, approval, order, withdrawal)
    ]


if __name__ == "__main__":
    write(Path(sys.argv[1]))
