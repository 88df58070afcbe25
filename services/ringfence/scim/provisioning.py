"""Carries out SCIM changes as signed provisioner commands, and reads the users and groups of one provisioner.

Commands are sent one request at a time. The registry and all readers check each against the delegation. Users and
groups come from the verified records: the service keeps nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

from pydantic import ValidationError
from scim2_models import (
    ForbiddenException,
    InvalidValueException,
    MutabilityException,
    NotFoundException,
    PatchOp,
    UniquenessException,
)

from ringfence.client.admin.provisioner import Provisioner
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import RingfenceError, UnavailableError
from ringfence.kernel.base.retry import run_periodically
from ringfence.kernel.base.validation_problems import explain
from ringfence.messages.registry import Delegation, GroupLink, Provisioned, Provisioning, UserRecord
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.records.provisioning import given_by, is_of
from ringfence.scim.resources import (
    Group,
    User,
    display_name_of,
    group_id,
    group_resource,
    to_provisioning,
    user_resource,
)
from ringfence.scim.settings import ScimSettings

log = logging.getLogger(__name__)


class DirectoryView:
    """A view of the local directory for one provisioner."""

    def __init__(self, directory: Directory, provisioner_id: str) -> None:
        self._directory = directory
        self.id = provisioner_id

    def provisioner(self) -> UserRecord:
        """The provisioner's own record. Raises UnavailableError if no operator delegates anything to it."""
        record = self.record(self.id)
        if record is None or record.state.delegation is None:
            raise UnavailableError(
                f"no operator delegated anything to {self.id} yet: ringfence provisioner set {self.id}"
            )
        if record.state.status != "active":
            raise UnavailableError(f"an operator disabled the provisioner {self.id}")
        return record

    def delegation(self) -> Delegation:
        """What the provisioner may grant. Raises UnavailableError."""
        return cast(Delegation, self.provisioner().state.delegation)

    def record(self, user_id: str) -> UserRecord | None:
        """The verified record of any user; None if there is none, or it does not verify."""
        try:
            entry = self._directory.user(user_id)
        except ChainError:
            return None
        return cast(UserRecord, entry.record) if entry else None

    def provisioned_user(self, user_id: str) -> UserRecord | None:
        """The record of a user of this provisioner who has not left for good; None otherwise."""
        record = self.record(user_id)
        return record if record is not None and is_of(record.state, self.id) else None

    def all(self) -> Iterator[UserRecord]:
        for entry in self._directory.entries("user"):
            record = cast(UserRecord, entry.record)
            if is_of(record.state, self.id):
                yield record

    def members(self, group: str) -> list[UserRecord]:
        return [one for one in self.all() if one.state.provisioned and group in one.state.provisioned.groups]

    def links(self) -> tuple[GroupLink, ...]:
        """The groups that the directory has created. Raises UnavailableError."""
        return self.provisioner().state.linked

    def link(self, id: str) -> GroupLink | None:
        """A group by its SCIM id; None if there is none. Raises UnavailableError."""
        return next((one for one in self.links() if group_id(self.id, one.group) == id), None)


_MAX_CONCURRENT_COMMANDS = 32
"""The most commands for different users that run at the same time."""


class ProvisioningWriter:
    """Changes users and groups. Methods raise SCIMException, and RefusedError and others of the client."""

    def __init__(
        self,
        view: DirectoryView,
        provisioner: Provisioner,
        caught_up: Callable[[], Awaitable[None]],
        mail_domain: str | None,
    ) -> None:
        """`caught_up` waits until the local table has everything that the registry has accepted."""
        self._view = view
        self._provisioner = provisioner
        self._caught_up = caught_up
        self._mail_domain = mail_domain
        self._lock = asyncio.Lock()

    # --- users ---

    async def create_user(self, user: User) -> UserRecord:
        async with self._lock:
            delegation = self._view.delegation()
            provisioning = _parse_user(user, ())
            self._check_free(provisioning.user_name or "", besides=None)
            user_id = self._allocate_id(provisioning.user_name or "")
            return await self._set(user_id, delegation, provisioning)

    async def replace_user(self, user_id: str, user: User) -> UserRecord:
        """Replace a user's attributes; their groups stay."""
        async with self._lock:
            return await self._change(self.user(user_id), user)

    async def patch_user(self, user_id: str, patch: PatchOp[User]) -> UserRecord:
        async with self._lock:
            record = self.user(user_id)
            user = user_resource(record, "", self._view.id)
            patch.patch(user)
            return await self._change(record, user)

    async def delete_user(self, user_id: str) -> None:
        """Delete a user: their keys end, and nobody else ever gets their id."""
        async with self._lock:
            self.user(user_id)
            await self._provisioner.disable_user(user_id, reason="deleted by the directory", gone=True)
            await self._caught_up()

    def user(self, user_id: str) -> UserRecord:
        """The record of a user of this provisioner. Raises NotFoundException."""
        record = self._view.provisioned_user(user_id)
        if record is None:
            raise NotFoundException(detail=f"no user {user_id[:80]} comes from here")
        return record

    async def reprovision(self, record: UserRecord, as_of: int | None = None) -> None:
        """Send a user's last provisioning again, with what the delegation grants for it now."""
        async with self._lock:
            now = self._view.provisioned_user(record.state.user_id)
            if now is None or now.revision != record.revision:
                return  # somebody has just said it
            await self._set(
                now.state.user_id,
                self._view.delegation(),
                _previous_provisioning(now),
                as_of,
                name=now.state.name,
            )

    async def _change(self, record: UserRecord, user: User) -> UserRecord:
        before = _previous_provisioning(record)
        provisioning = _parse_user(user, before.groups)
        if (provisioning.user_name or "").lower() != (before.user_name or "").lower():
            self._check_free(provisioning.user_name or "", besides=record.state.user_id)
        user_id = record.state.user_id
        if before.active and provisioning == before.model_copy(update={"active": False}):
            await self._provisioner.disable_user(user_id, reason="no longer active, says the directory")
            await self._caught_up()
            return self.user(user_id)
        return await self._set(user_id, self._view.delegation(), provisioning)

    async def _set(
        self,
        user_id: str,
        delegation: Delegation,
        provisioning: Provisioning,
        as_of: int | None = None,
        name: str | None = None,
    ) -> UserRecord:
        await self._provisioner.set_user(
            user_id,
            delegation,
            provisioning,
            name=name or display_name_of(provisioning, user_id),
            as_of=as_of,
        )
        await self._caught_up()
        return self.user(user_id)

    def _check_free(self, user_name: str, besides: str | None) -> None:
        """A user name is unique, case-insensitively (RFC 7643, 4.1.1)."""
        for record in self._view.all():
            provisioning = record.state.provisioned
            if (
                record.state.user_id != besides
                and provisioning
                and (provisioning.user_name or "").lower() == user_name.lower()
            ):
                raise UniquenessException(detail=f"{user_name} is there already, as {record.state.user_id}")

    def _allocate_id(self, user_name: str) -> str:
        def is_retired(user_id: str) -> bool:
            record = self._view.record(user_id)
            provisioning = record.state.provisioned if record else None
            return provisioning is not None and provisioning.by == self._view.id and provisioning.gone

        user_id = free_id(user_name, self._mail_domain, is_retired)
        if user_id is None:
            raise InvalidValueException(detail="userName has no letter or digit that an id could be made of")
        if self._view.record(user_id) is not None:
            raise UniquenessException(
                detail=f"{user_id} is a user who does not come from here; an operator who wants them to has to make "
                "room under another id"
            )
        return user_id

    # --- groups ---

    async def create_group(self, group: Group) -> GroupLink:
        async with self._lock:
            name, links = group.display_name or "", self._view.links()
            if name not in {one.group for one in self._view.delegation().groups}:
                raise ForbiddenException(
                    detail=f"the group {name[:80]!r} is not delegated: it could give nothing. An operator adds it: "
                    f"ringfence provisioner set {self._view.id}"
                )
            if any(one.group == name for one in links):
                raise UniquenessException(detail=f"the group {name[:80]!r} is there already")
            members = self._member_ids(group)
            link = GroupLink(group=name, external_id=group.external_id)
            await self._provisioner.link_groups((*links, link))
            await self._caught_up()
            await self._set_members(name, members)
            return link

    async def replace_group(self, id: str, group: Group) -> GroupLink:
        async with self._lock:
            return await self._change_group(self.group(id), group)

    async def patch_group(self, id: str, patch: PatchOp[Group]) -> GroupLink:
        """Change some attributes or members of a group."""
        async with self._lock:
            link = self.group(id)
            members = self._view.members(link.group)
            group = group_resource(self._view.provisioner(), link.group, link.external_id, members, "")
            patch.patch(group)
            return await self._change_group(link, group)

    async def delete_group(self, id: str) -> None:
        """Delete a group: it grants nothing any more. Its members stay users."""
        async with self._lock:
            link = self.group(id)
            await self._set_members(link.group, frozenset())
            await self._provisioner.link_groups([one for one in self._view.links() if one != link])
            await self._caught_up()

    def group(self, id: str) -> GroupLink:
        """A group that the directory has created. Raises NotFoundException."""
        link = self._view.link(id)
        if link is None:
            raise NotFoundException(detail=f"there is no group {id[:80]}")
        return link

    async def _change_group(self, link: GroupLink, group: Group) -> GroupLink:
        if group.display_name != link.group:
            raise MutabilityException(
                detail=f"{link.group!r} is what an operator delegated: a group by another name is another group",
                attribute="displayName",
            )
        members = self._member_ids(group)
        changed = link.model_copy(update={"external_id": group.external_id})
        if changed != link:
            links = [changed if one == link else one for one in self._view.links()]
            await self._provisioner.link_groups(links)
            await self._caught_up()
        await self._set_members(link.group, members)
        return changed

    def _member_ids(self, group: Group) -> frozenset[str]:
        ids = frozenset(one.value for one in group.members or () if one.value)
        if unknown := sorted(id for id in ids if self._view.provisioned_user(id) is None):
            raise InvalidValueException(detail=f"{unknown[0][:80]} is no user who comes from here")
        return ids

    async def _set_members(self, group: str, members: Iterable[str]) -> None:
        delegation, wanted_ids = self._view.delegation(), frozenset(members)
        before = {one.state.user_id: one for one in self._view.members(group)}
        joining = [
            one for id in sorted(wanted_ids - before.keys()) if (one := self._view.provisioned_user(id))
        ]
        leaving = [before[id] for id in sorted(before.keys() - wanted_ids)]
        changes = [(one, (*_previous_provisioning(one).groups, group)) for one in joining]
        changes += [
            (one, tuple(g for g in _previous_provisioning(one).groups if g != group)) for one in leaving
        ]
        limit = asyncio.Semaphore(_MAX_CONCURRENT_COMMANDS)

        async def change(record: UserRecord, groups: Sequence[str]) -> None:
            provisioning = _previous_provisioning(record).model_copy(update={"groups": tuple(groups)})
            async with limit:
                await self._provisioner.set_user(
                    record.state.user_id, delegation, provisioning, name=record.state.name
                )

        # What fails of many is told, and the rest is done all the same: the directory asks for all of it again.
        results = await asyncio.gather(*(change(*one) for one in changes), return_exceptions=True)
        await self._caught_up()
        for result in results:
            if isinstance(result, BaseException):
                raise result


def differs_from_delegation(record: UserRecord, delegation: Delegation) -> bool:
    """Whether a user's roles or entitlements differ from what the delegation now grants their groups."""
    provisioning, state = record.state.provisioned, record.state
    granted = given_by(delegation, provisioning.groups if provisioning else ())
    return (state.roles, state.entitlements.scope) != (granted.roles, granted.scope)


def _parse_user(user: User, groups: Sequence[str]) -> Provisioning:
    try:
        return to_provisioning(user, groups)
    except ValidationError as error:
        raise InvalidValueException(detail=explain(error)) from None


def _previous_provisioning(record: UserRecord) -> Provisioning:
    """The last provisioning of a user by the directory. It says nothing about a block by an operator."""
    provisioned = record.state.provisioned
    fields = dict(provisioned) if isinstance(provisioned, Provisioned) else {}
    return Provisioning(**{name: fields[name] for name in Provisioning.model_fields if name in fields})


# From the name that a directory gives a user to the id that Ringfence knows them by. Pure.

_ID_CHARACTER = re.compile(r"[a-z0-9]")
_NON_ID_CHARACTERS = re.compile(r"[^a-z0-9._-]+")
_MAX_ID_LENGTH = 58
"""Of 63 characters: there is room for a number at the end."""


def ids_for(user_name: str, mail_domain: str | None) -> Iterator[str]:
    """Candidate ids for a user name, best first: `maria@example.com` gives `maria-at-example.com`, or `maria` in its
    own domain.

    Empty where no character of the name may be in an id.
    """
    text = user_name.strip().lower()
    if not _ID_CHARACTER.search(text):
        return
    if mail_domain:
        text = text.removesuffix(f"@{mail_domain}")
    id = _NON_ID_CHARACTERS.sub("-", text.replace("@", "-at-")).strip("._-")[:_MAX_ID_LENGTH]
    if id:
        yield id
        yield from (f"{id}-{number}" for number in range(2, 1000))


def free_id(user_name: str, mail_domain: str | None, is_retired: Callable[[str], bool]) -> str | None:
    """The first candidate id that no departed user had: a later user of the same name is another person."""
    return next((id for id in ids_for(user_name, mail_domain) if not is_retired(id)), None)


@dataclass(slots=True, eq=False)
class EntitlementRefresh:
    """Refreshes users' entitlements from the delegation periodically.

    If an operator changed the delegation, every user gets what it grants now. Entitlements expire with age. A directory
    reports changes only, so while it calls, its silence about a user means that nothing changed, and the entitlements
    are confirmed. If it no longer calls, nothing is confirmed, and they expire.
    """

    view: DirectoryView
    writer: ProvisioningWriter
    settings: ScimSettings
    clock: Clock
    _last_request_s: int = field(init=False, default=0)

    def note_request(self) -> None:
        """Record an authenticated call of the directory."""
        self._last_request_s = self.clock.now_ms() // 1000

    async def run(self) -> None:
        """Refresh every `check_s` seconds, for ever."""
        await run_periodically(
            self.settings.check_s, self.refresh, "users could not be confirmed this time", log,
            expected=(RingfenceError, OSError), at_once=True,
        )  # fmt: skip

    async def refresh(self) -> int:
        """Reprovision the users that need it. Returns how many."""
        try:
            delegation = self.view.delegation()
        except UnavailableError:
            return 0
        now_s, refreshed = self.clock.now_ms() // 1000, 0
        for record in list(self.view.all()):
            as_of = self._as_of(record, delegation, now_s)
            if as_of is None:
                continue
            try:
                await self.writer.reprovision(record, as_of)
                refreshed += 1
            except RingfenceError as error:  # a user whose command fails does not stop the others
                log.warning("user %s could not be confirmed: %s", record.state.user_id, error)
        return refreshed

    def _as_of(self, record: UserRecord, delegation: Delegation, now_s: int) -> int | None:
        """The `as_of` to reprovision a user with; None where nothing is due, or an operator disabled them."""
        if record.state.provisioned is not None and record.state.provisioned.blocked:
            return None
        if differs_from_delegation(record, delegation):
            # The delegation is another, and that is all that is known: what was of then stays of then.
            return record.state.entitlements.as_of
        return self._last_request_s if self._is_due(record, now_s) else None

    def _is_due(self, record: UserRecord, now_s: int) -> bool:
        if record.state.status != "active" or now_s - self._last_request_s > self.settings.heard_s:
            return False
        return self._last_request_s - record.state.entitlements.as_of > self.settings.confirm_s
