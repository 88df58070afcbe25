"""What the report on gateways counts: actions, and each of them once."""

from __future__ import annotations

from ringfence.audit.actions import counted


def test_what_came_of_an_action_is_not_another_one() -> None:
    words = {"agent": "bot", "target": "repos", "outcome": "allowed", "access": "write", "label": None}
    decided = {"unmapped": words}
    answered = {"unmapped": {"agent": "bot", "target": "repos", "answer": "tool_error"}}
    assert counted([decided, answered, decided]) == [{**words, "reason": None, "count": 2}]
