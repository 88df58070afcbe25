"""Provisioning of users: signs a provisioner's commands, and reconciles the users with a file.

A provisioner manages users within what an operator delegated to named groups. `plan` compares the records with the
file, and `carry_out` sends the commands.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ringfence.client.admin.command_client import Accepted, CommandClient
from ringfence.client.arguments import instances
from ringfence.client.errors import InvalidCallError, RefusedError, checked
from ringfence.kernel.base.errors import RingfenceError
from ringfence.messages.base import ExpiringClaims
from ringfence.messages.codes import Code
from ringfence.messages.registry import (
    Delegation,
    Entitlements,
    GroupLink,
    ProvisionerLink,
    Provisioning,
    UserDisable,
    UserSet,
    UserState,
)
from ringfence.model.records.provisioning import given_by, is_of

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
                if error.code != Code.TOO_EARLY:
                    raise
        return await super()._command(model, **fields)


_MAX_CONCURRENT_COMMANDS = 32
Kind = Literal["add", "change", "confirm", "disable"]


@dataclass(frozen=True, slots=True)
class FileUser:
    """A user as the file describes them."""

    name: str
    provisioning: Provisioning


@dataclass(frozen=True, slots=True)
class UserChange:
    """One user, and what to do: `confirm` where all is as it should be, and only the date is renewed."""

    kind: Kind
    user_id: str
    details: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SyncPlan:
    """The changes to make, by user id, and the problems that prevent them."""

    differences: tuple[UserChange, ...]
    problems: tuple[str, ...]
    active: int

    @property
    def leaving(self) -> int:
        """How many of them would be disabled."""
        return sum(one.kind == "disable" for one in self.differences)

    def check_leaving(self, percent: int) -> None:
        """A file that was cut short must not disable half a company: more than one user, and more than `percent`.

        Raises InvalidCallError.
        """
        if self.leaving > max(1, self.active * percent // 100):
            raise InvalidCallError(
                f"{self.leaving} of {self.active} active users are not in the file any more, which is more than "
                f"{percent} %. If they have all left, add --force; nothing was changed"
            )


async def delegation_of(provisioner: Provisioner) -> Delegation:
    """Return the delegation of this provisioner. Raises InvalidCallError if nothing is delegated."""
    entry = (await provisioner.directory()).user(provisioner.id)
    if entry is None or entry.state.delegation is None or entry.state.status != "active":
        raise InvalidCallError(
            f"{provisioner.id} is no provisioner: an operator makes it one with: ringfence provisioner set "
            f"{provisioner.id}; or name another key with --identity"
        )
    return entry.state.delegation


async def plan(provisioner: Provisioner, file_users: Mapping[str, FileUser]) -> SyncPlan:
    """Compare the records with the file. Raises InvalidCallError if nothing is delegated."""
    delegation = await delegation_of(provisioner)
    directory = await provisioner.directory()
    users = [entry.state for entry in directory.entries("user")]
    states = {state.user_id: state for state in users if isinstance(state, UserState)}
    own = {id: state for id, state in states.items() if is_of(state, provisioner.id)}
    problems: list[str] = []
    changes: list[UserChange] = []
    for user_id, one in sorted(file_users.items()):
        state = states.get(user_id)
        if problem := _problem(user_id, one, state, provisioner.id):
            problems.append(problem)
        else:
            changes.append(_difference(user_id, one, state, delegation))
    for user_id, state in sorted(own.items()):
        if user_id not in file_users and state.status == "active":
            changes.append(UserChange("disable", user_id, ("not in the file",)))
    active = sum(state.status == "active" for state in own.values())
    return SyncPlan(tuple(changes), tuple(problems), active)


async def carry_out(
    provisioner: Provisioner,
    file_users: Mapping[str, FileUser],
    sync_plan: SyncPlan,
    on_result: Callable[[UserChange, str | None], None],
) -> int:
    """Send the commands of a plan. Returns how many failed.

    `on_result` is called for each change, with its error or None.
    """
    delegation = await delegation_of(provisioner)
    limit, failed = asyncio.Semaphore(_MAX_CONCURRENT_COMMANDS), 0

    async def one(difference: UserChange) -> None:
        nonlocal failed
        async with limit:
            try:
                if difference.kind == "disable":
                    await provisioner.disable_user(difference.user_id, reason="not in the file any more")
                else:
                    user = file_users[difference.user_id]
                    await provisioner.set_user(
                        difference.user_id, delegation, user.provisioning, name=user.name
                    )
            except RingfenceError as error:
                failed += 1
                on_result(difference, f"{error.code}: {error}")
            else:
                on_result(difference, None)

    await asyncio.gather(*(one(difference) for difference in sync_plan.differences))
    return failed


def _problem(user_id: str, one: FileUser, state: UserState | None, provisioner_id: str) -> str | None:
    if state is None:
        return None
    if state.provisioned is None or state.provisioned.by != provisioner_id:
        return f"{user_id} does not come from {provisioner_id}: an operator made them, or they come from elsewhere"
    if state.provisioned.gone:
        return f"{user_id} left for good; whoever comes now is somebody else, and needs another id"
    if state.provisioned.blocked and one.provisioning.active:
        return (
            f"{user_id} was disabled by an operator; until an operator sets them again, write active: false"
        )
    return None


def _difference(user_id: str, one: FileUser, state: UserState | None, delegation: Delegation) -> UserChange:
    granted = given_by(delegation, one.provisioning.groups)
    if state is None:
        return UserChange(
            "add", user_id, (f"groups: {_comma_list(granted.groups)}", f"roles: {_comma_list(granted.roles)}")
        )
    before = state.provisioned or Provisioning()
    pairs: Sequence[tuple[str, str, str]] = (
        ("name", state.name, one.name),
        ("groups", _comma_list(before.groups), _comma_list(granted.groups)),
        ("roles", _comma_list(state.roles), _comma_list(granted.roles)),
        ("external_id", before.external_id or "none", one.provisioning.external_id or "none"),
        ("active", str(state.status == "active").lower(), str(one.provisioning.active).lower()),
    )
    details = [f"{what}: {old} -> {new}" for what, old, new in pairs if old != new]
    if state.entitlements.scope != granted.scope:
        details.append("entitlements: as the delegation has them now")
    return UserChange("change" if details else "confirm", user_id, tuple(details))


def _comma_list(words: Sequence[str]) -> str:
    return ", ".join(words) or "none"
