"""Permissions and scopes in messages. `ringfence.model.scope.scope` defines their meaning."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ringfence.messages.base import Message, TargetId, Verb

PERMISSION_TYPE = "urn:ringfence:permission"
"""The `type` of a permission in `authorization_details` (RFC 9396)."""

Glob = Annotated[str, Field(min_length=1, max_length=512)]


class Permission(Message):
    """What may be done: verbs on resources (globs over the target's own names) at one target."""

    target: TargetId
    verbs: Annotated[tuple[Verb, ...], Field(min_length=1, max_length=64)]
    resources: Annotated[tuple[Glob, ...], Field(min_length=1, max_length=64)]


Scope = Annotated[tuple[Permission, ...], Field(max_length=64)]
"""A list of permissions. Together they allow what any of them allows."""
