"""Parameters of operations: what each stands for, its type, and an example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tools.references.openapi.operation import NUMBER, TEXT, Operation, Schema

_LEASE, _REQUEST, _TASK = (
    "5f0e4d5a-3b0e-5d0c-8a39-0c1a6c9f2b11",
    "8d7c2c6e-6f0b-5c37-9a55-6f3b0e0a4c21",
    "2f1c6f0e-8f0b-4d2c-9a57-3f1f4f0d9b1a",
)
_STREAM = "f67e39a0a4d34d56b3aa1bc4cff0069f"
_PATHS: Mapping[str, tuple[str, str]] = {
    "request_id": ("the id of a request", _REQUEST),
    "lease_id": ("the id of a lease", _LEASE),
    "target_id": ("the id of a target", "staging"),
    "agent_id": ("the id of an agent", "deploy-bot"),
    "grant_id": ("the id of a grant", _REQUEST),
    "proposal_id": ("the id of a proposal: the digest of its command", "9f2c41d07ab3" + "0" * 52),
    "credential_id": ("the id of a passkey, as its authenticator made it", "mNr0-Qq1W7cH3mFzqj1n2w"),
    "tree": ("the name of a chain: one for each partition of `audit`", "0"),
    "uid": ("`metadata.uid` of an event", "0b8e1f5c-52a7-5e36-a3a5-0a3a1f6a3a10"),
    "stream_id": ("the id of the stream", _STREAM),
    "name": ("the name of a file, with the digest of its content", "console-1a2b3c4d.css"),
    "kind": ("what is to be signed", "approve"),
    "path": ("the sealed address of one question", "v1.SEALED"),
}
_IDS: Mapping[str, tuple[str, str]] = {
    "users": ("the id of a user", "maria"),
    "agents": ("the id of an agent", "deploy-bot"),
    "targets": ("the id of a target", "staging"),
    "tasks": ("the id of a task", _TASK),
    "leases": ("the id of a lease", _LEASE),
    "runs": ("the id of a run, or of its order", _REQUEST),
    "trace": ("the id of a lease, request, task, agent, user or run", _LEASE),
    "requests": ("the id of a request, as `POST /v1/requests` answered it", _REQUEST),
    "approvals": ("the id of a request", _REQUEST),
    "offers": ("the sealed address of an offer", "v1.SEALED"),
    "ResourceTypes": ("the name of a type", "User"),
    "Schemas": ("the URN of a schema", "urn:ietf:params:scim:schemas:core:2.0:User"),
    "Users": ("the `id` of a user", "maria"),
    "Groups": ("the `id` of a group", "7b0e9f6a"),
}
"""What `{id}` stands for below each collection."""
_NUMBERS = {
    "limit", "since_ms", "until_ms", "short_s", "step_ms", "keys_within_s", "partition", "offset", "startIndex",
    "count", "from", "class",
}  # fmt: skip
_EXAMPLES: Mapping[str, Any] = {
    "ceiling": '[{"target":"staging","verbs":["read"],"resources":["env/*"]}]', "people": "maria,sam",
    "after": "deploy-bot", "agent": "deploy-bot", "all": "1", "assertion": "eyJhZCI6IlN6In0", "attributes": "userName,active",
    "before": "1767225600000.8f9e2c1a-7d3b-5c4e-9a21-0b6d5e4f3a2b", "beyond_limit": "1",
    "class": 3003, "code": "action.*", "count": 50, "ended": "1", "except": _REQUEST, "excludedAttributes": "members",
    "filter": 'userName eq "maria@acme.example"', "from": 1000, "id": _LEASE, "keys_ending": "1",
    "keys_within_s": 604800, "kind": "lease", "label": "zone=eu", "lease": _LEASE, "limit": 100, "look": "3f5a",
    "next": "/agents", "nonce": "n4bQgYhMfWWaL-qgxVrQFaO_TxsrC4Is0V1sFbDwCgg", "offset": 1042, "on_behalf_of": "maria", "orphans": "1", "overdue": "1", "page": "/agents",
    "parent": _TASK, "partition": 0, "records": "1", "request": _REQUEST, "resource": "env/web", "run": _REQUEST,
    "runner": "build-1", "severity": "medium", "short_s": 3600, "show": "mine", "since_ms": 1767225600000,
    "sortBy": "userName", "sortOrder": "ascending", "sponsor": "sam", "standing": "1", "startIndex": 1,
    "status": "active", "step_ms": 3600000, "stream_id": _STREAM, "target": "staging", "task": _TASK,
    "unreviewed": "1", "until_ms": 1767312000000, "unused": "1", "user": "maria", "verb": "deploy", "wait": "30s",
}  # fmt: skip


def parameters_of(operation: Operation) -> list[dict[str, Any]]:
    """The parameters of an operation. Raises LookupError where one has no meaning or no example here."""
    found: list[dict[str, Any]] = []
    for name in operation.path_parameters:
        collection = operation.path.partition(f"/{{{name}}}")[0].rpartition("/")[2]
        about, example = _IDS[collection] if name == "id" else _PATHS[name]
        found.append(_parameter(name, "path", about, example, required=True))
    for name, about in operation.query.items():
        required = name in operation.required
        found.append(_parameter(name, "query", about, _EXAMPLES[name], required=required))
    return found


def _parameter(name: str, place: str, about: str, example: Any, *, required: bool) -> dict[str, Any]:
    kind: Schema = NUMBER if name in _NUMBERS else TEXT
    return {
        "name": name, "in": place, "required": required, "description": about[0].upper() + about[1:] + ".",
        "schema": kind, "example": example,
    }  # fmt: skip
