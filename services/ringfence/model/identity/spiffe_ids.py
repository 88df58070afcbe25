"""SPIFFE IDs of users, agents, targets and services: `spiffe://<trust-domain>/<kind>/<id>`."""

from __future__ import annotations

from typing import Literal

Kind = Literal["user", "agent", "target", "task", "service"]
SubjectKind = Literal["user", "agent", "target", "task"]
"""The kinds of subjects that the registry keeps records of."""


def spiffe_id(trust_domain: str, kind: Kind, id: str) -> str:
    return f"spiffe://{trust_domain}/{kind}/{id}"


def subject_of(trust_domain: str, spiffe: str, kind: Kind) -> str | None:
    """The id in a SPIFFE ID of this kind and trust domain; None for any other SPIFFE ID."""
    prefix = f"spiffe://{trust_domain}/{kind}/"
    id = spiffe.removeprefix(prefix)
    return id if spiffe.startswith(prefix) and id and "/" not in id else None
