"""`ringfence target add --template`: kinds of targets with their verbs filled in, each with a floor to start from."""

from __future__ import annotations

from dataclasses import dataclass

from ringfence.messages.registry import ApprovalClass


@dataclass(frozen=True, slots=True)
class Template:
    """What a target of one kind is made from. What the command names itself counts instead."""

    backend: str
    verbs: dict[str, ApprovalClass]
    """With the approval that no policy goes below: what changes something needs a person, what cannot be undone an
    operator."""


TEMPLATES: dict[str, Template] = {
    "postgres": Template(
        "postgres",
        {
            "read": "none",
            "select": "none",
            "usage": "sponsor",
            "write": "sponsor",
            "insert": "sponsor",
            "update": "sponsor",
            "delete": "sponsor",
            "temporary": "sponsor",
            "truncate": "operator",
            "create": "operator",
        },
    ),
    "redis": Template("redis", {"read": "none", "write": "sponsor"}),
    "ssh": Template(
        "ssh",
        {
            "read": "none",
            "write": "sponsor",
            "terminal": "sponsor",
            "shell": "operator",
            "forward": "operator",
        },
    ),
    # What is entered with a token: a role in a cloud, a cluster. Who may, may all that the role can.
    "federation": Template("jwt", {"assume": "sponsor"}),
}
"""By name. `docs/targets/` has a page for each."""
