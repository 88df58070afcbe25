"""Who must approve a request, in words."""

from __future__ import annotations

from ringfence.messages.credential import RequiredClass

_APPROVERS: dict[RequiredClass, str] = {
    "none": "nobody",
    "sponsor": "the agent's sponsor",
    "second_person": "a second person (a sponsor who is neither the agent's nor the user it acts for)",
    "operator": "an operator (neither the agent's sponsor nor the user it acts for)",
    "break_glass": "two operators (neither the agent's sponsor nor the user it acts for)",
}


def describe_approvers(required: tuple[RequiredClass, ...]) -> str:
    """Return a text for people: who must give these approvals."""
    return " and ".join(_APPROVERS[c] for c in dict.fromkeys(required)) or "a person"
