"""Signed commands of a provisioner: users within what an operator delegated to named groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ringfence.client.admin.command_client import Accepted, CommandClient
from ringfence.client.arguments import instances
from ringfence.client.errors import RefusedError, checked
from ringfence.messages.base import ExpiringClaims
from ringfence.messages.registry import (
    Delegation,
    Entitlements,
    GroupLink,
    ProvisionerLink,
    Provisioning,
    UserDisable,
    UserSet,
)
from ringfence.model.records.provisioning import given_by

_TRIES = 3
"""A command sent while its signer's record changes is refused as `too_early`, and repeated."""


class Provisioner(CommandClient):
    """The key of an identity provider that users come from, connected."""

    async def set_user(
        self,
        user_id: str,
        delegation: Delegation,
        provisioning: Provisioning,
        *,
        name: str,
        as_of: int | None = None,
    ) -> Accepted:
        """Create or replace a user, with all that the delegation grants to the groups in `provisioning`.

        `as_of`: when the directory said so, in seconds since 1970 (None: now).
        """
        granted = given_by(delegation, provisioning.groups)
        as_of = self.connection.clock.now_ms() // 1000 if as_of is None else as_of
        with checked("the user"):
            entitlements = Entitlements(scope=granted.scope, source=delegation.source, as_of=as_of)
        return await self._command(
            UserSet,
            user_id=user_id,
            name=name,
            roles=granted.roles,
            keys=(),
            entitlements=entitlements,
            provisioned=provisioning.model_copy(update={"groups": granted.groups}),
        )

    async def disable_user(self, user_id: str, *, reason: str, gone: bool = False) -> Accepted:
        """Disable a user. `gone`: they left for good, and their keys end."""
        return await self._command(UserDisable, user_id=user_id, reason=reason, gone=gone)

    async def link_groups(self, groups: Sequence[GroupLink]) -> Accepted:
        """Set which of the delegated groups exist in the directory."""
        groups = instances("groups", groups, GroupLink, "[GroupLink(...)]")
        return await self._command(ProvisionerLink, provisioner_id=self.id, groups=groups)

    async def _command(self, model: type[ExpiringClaims], **fields: Any) -> Accepted:
        for _ in range(_TRIES - 1):
            try:
                return await super()._command(model, **fields)
            except RefusedError as error:
                if error.code != "too_early":
                    raise
        return await super()._command(model, **fields)
