"""What an agent is told that may not do what it asked for."""

from __future__ import annotations

import json
import shlex
from typing import Any, cast

import pytest

from ringfence.cli.shared.arguments import parse_scope
from ringfence.gateway.contract import Verdict
from ringfence.gateway.dataplane.denials import (
    denial_answer,
    denial_headers,
    how_to_ask,
    problem_body,
    problem_details,
)
from ringfence.messages.base import Permission
from ringfence.messages.credential import Reason
from ringfence.messages.registry import TargetRecord
from ringfence.model.http_targets import Action
from tools.schemas.examples import EXAMPLES

TARGET = cast(TargetRecord, EXAMPLES[TargetRecord]).state
ID = "d9428888-122b-51e1-b85c-61cd3cbb3210"
WANTED = Permission(target=TARGET.target_id, verbs=("read",), resources=("env/a",))
LACK = Reason(code="beyond_lease", message="no live lease allows it", permission=WANTED, side="lease")


def verdict(*reasons: Reason, status: int = 403, **fields: Any) -> Verdict:
    return Verdict(ID, allowed=False, status=status, reasons=reasons or (LACK,), **fields)


def test_the_first_reason_is_the_problems_and_all_are_there() -> None:
    other = Reason(code="agent_suspended", message="agent bot is suspended")
    body = problem_details(verdict(LACK, other))
    assert body["type"] == "urn:ringfence:problem:beyond_lease"
    assert (body["title"], body["status"], body["code"]) == ("Forbidden", 403, "beyond_lease")
    assert body["instance"] == f"urn:uuid:{ID}"
    assert body["permission"] == {"target": TARGET.target_id, "verbs": ["read"], "resources": ["env/a"]}
    assert [reason["code"] for reason in body["reasons"]] == ["beyond_lease", "agent_suspended"]
    assert json.loads(problem_body(verdict(LACK, other))) == body
    assert "reasons" not in problem_details(verdict(LACK))


@pytest.mark.parametrize("resource", ["env/a", "env/it's", "a,b", "x:y", "a b", "$(id)"])
def test_suggested_command_asks_for_exactly_the_missing_permission(resource: str) -> None:
    told = how_to_ask(verdict(target=TARGET, action=Action("read", resource), task_id="T"))
    assert told is not None
    words = shlex.split(told)
    assert words[:2] == ["ringfence", "request"]
    assert words[words.index("--task") + 1] == "T"
    assert words[words.index("--delivery") + 1] == "gateway"
    (wanted,) = parse_scope([words[words.index("--allow") + 1]])
    assert (wanted.target, wanted.verbs, wanted.resources) == (TARGET.target_id, ("read",), (resource,))


def test_request_that_would_be_denied_is_not_suggested() -> None:
    beyond = Reason(code="beyond_scope", message="task does not allow it", permission=WANTED, side="task")
    known: dict[str, Any] = {"target": TARGET, "action": Action("read", "env/a")}
    assert how_to_ask(verdict(LACK, beyond, **known)) is None
    assert how_to_ask(verdict(Reason(code="target_unknown", message="x"))) is None


def test_the_head_says_what_a_client_can_do() -> None:
    said = denial_headers(verdict(Reason(code="use_dpop_nonce", message="x"), status=401, nonce="n"))
    assert said["DPoP-Nonce"] == "n"
    assert 'error="use_dpop_nonce"' in said["WWW-Authenticate"]
    other = denial_headers(verdict(Reason(code="handle_unknown", message="x"), status=401))
    assert 'error="invalid_token"' in other["WWW-Authenticate"]
    later = denial_headers(verdict(Reason(code="stale_view", message="x"), status=503, retry_after_s=5))
    assert (later["Retry-After"], later["Cache-Control"]) == ("5", "no-store")
    assert "WWW-Authenticate" not in later
    status, said, body = denial_answer(
        verdict(Reason(code="use_dpop_nonce", message="x"), status=401, nonce="n")
    )
    assert (status, said["DPoP-Nonce"], json.loads(body)["code"]) == (401, "n", "use_dpop_nonce")
    assert "Cache-Control" not in said
