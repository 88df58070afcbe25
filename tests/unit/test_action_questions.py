"""How a single action that waits is shown, with its headers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ringfence.cli.shared.approval_views import action_as_json, print_action
from ringfence.client.approvals.action_approvals import ActionHeader, PendingAction


def pending(**fields: Any) -> PendingAction:
    given: dict[str, Any] = {
        "request_id": "ce60feae-3234-5dd0-beed-97e0618d5a55", "digest": "a" * 64,
        "gateway": "spiffe://a.example/service/gateway",
        "agent": "bot", "agent_description": "a bot", "sponsor": "sam",
        "task_id": "t", "purpose": "p", "on_behalf_of": "maria",
        "target": "hub", "target_description": "the hub", "lease_id": "l",
        "verb": "merge", "resource": "r", "method": "PUT",
        "url": "https://hub.example/r", "body_digest": "b" * 64, "body_bytes": 1,
        "headers_digest": "c" * 64, "headers": (),
        "required": "sponsor", "mine": True, "asked_at": 1, "expires_at": 2, "request": "x.y.z",
    }  # fmt: skip
    return PendingAction(**{**given, **fields})


def test_headers_are_shown_and_those_without_a_value_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    one = pending(
        headers=(ActionHeader("content-type", "text/x\u202e"), ActionHeader("cookie", None))
    )  # fmt: skip
    print_action(one)
    shown = capsys.readouterr().out
    assert "content-type: text/x\u2039U+202E\u203a" in shown
    assert "values not shown: cookie" in shown
    assert "c" * 64 in shown.replace("\n", "")
    said = json.loads(json.dumps(action_as_json(one)))
    assert said["headers"][1] == {"name": "cookie", "value": None}
    assert said["headers_digest"] == "c" * 64
