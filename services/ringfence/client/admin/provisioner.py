"""Signed commands of a provisioner: users within what an operator delegated to named groups."""

from __future__ import annotations

from collections.abc import Sequence

from ringfence.client.admin.command_client import Accepted, CommandClient
from ringfence.client.arguments import instances
from ringfence.client.connection import COMMAND_LIFE_S
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
from ringfence.messages.topics import REGISTRY_COMMAND
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
        stamp = self.connection.stamp(COMMAND_LIFE_S)
        with checked("the user"):
            command = UserSet(
                **stamp,
                user_id=user_id,
                name=name,
                roles=granted.roles,
                keys=(),
                entitlements=Entitlements(
                    scope=granted.scope,
                    source=delegation.source,
                    as_of=stamp["iat"] if as_of is None else as_of,
                ),
                provisioned=provisioning.model_copy(update={"groups": granted.groups}),
            )
        return await self._command(command, user_id)

    async def disable_user(self, user_id: str, *, reason: str, gone: bool = False) -> Accepted:
        """Disable a user. `gone`: they left for good, and their keys end."""
        with checked("the command"):
            command = UserDisable(
                **self.connection.stamp(COMMAND_LIFE_S), user_id=user_id, reason=reason, gone=gone
            )
        return await self._command(command, user_id)

    async def link_groups(self, groups: Sequence[GroupLink]) -> Accepted:
        """Set which of the delegated groups exist in the directory."""
        groups = instances("groups", groups, GroupLink, "[GroupLink(...)]")
        with checked("the groups"):
            command = ProvisionerLink(
                **self.connection.stamp(COMMAND_LIFE_S), provisioner_id=self.id, groups=groups
            )
        return await self._command(command, self.id)

    async def _command(self, command: ExpiringClaims, user_id: str) -> Accepted:
        for attempt in range(1, _TRIES + 1):
            try:
                return await self._outcomes.send(
                    REGISTRY_COMMAND, user_id, command, by="registry", timeout_s=self.timeout_s
                )
            except RefusedError as error:
                if error.code != "too_early" or attempt == _TRIES:
                    raise
            command = command.model_copy(update=self.connection.stamp(COMMAND_LIFE_S))
        raise AssertionError("not reached")
