"""What a directory asks for, carried out: commands of the provisioner, one request after the other.

Every change is a command that the registry and all readers hold against the delegation; nothing is kept here.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence

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
from ringfence.kernel.crypto.jws import explain
from ringfence.messages.registry import Delegation, GroupLink, Provisioned, Provisioning, UserRecord
from ringfence.model.records.provisioning import given_by
from ringfence.scim.directory_view import DirectoryView
from ringfence.scim.resources import Group, User, group_resource, name_of, said_of, user_resource

_AT_ONCE = 32
"""So many commands are under way together: those about different users do not wait for each other."""


class ProvisioningWriter:
    """Changes users and groups. Each method raises SCIMException; RefusedError and others of the client."""

    def __init__(
        self,
        people: DirectoryView,
        provisioner: Provisioner,
        caught_up: Callable[[], Awaitable[None]],
        mail_domain: str | None,
    ) -> None:
        """`caught_up` returns once the table holds what the registry has answered for."""
        self._people = people
        self._provisioner = provisioner
        self._caught_up = caught_up
        self._mail_domain = mail_domain
        self._lock = asyncio.Lock()

    # --- users ---

    async def create_user(self, user: User) -> UserRecord:
        """A user who was not there."""
        async with self._lock:
            delegation = self._people.delegation()
            said = _provisioning_of(user, ())
            self._check_free(said.user_name or "", besides=None)
            user_id = self._new_id(said.user_name or "")
            return await self._set(user_id, delegation, said)

    async def replace_user(self, user_id: str, user: User) -> UserRecord:
        """A user as they are described anew; their groups stay."""
        async with self._lock:
            return await self._change(self.user(user_id), user)

    async def patch_user(self, user_id: str, patch: PatchOp[User]) -> UserRecord:
        """A user with some attributes changed."""
        async with self._lock:
            record = self.user(user_id)
            user = user_resource(record, "", self._people.id)
            patch.patch(user)
            return await self._change(record, user)

    async def delete_user(self, user_id: str) -> None:
        """A user left for good: their keys end, and nobody else is ever given their id."""
        async with self._lock:
            self.user(user_id)
            await self._provisioner.disable_user(user_id, reason="deleted by the directory", gone=True)
            await self._caught_up()

    def user(self, user_id: str) -> UserRecord:
        """The record of a user who comes from here. Raises NotFoundException."""
        record = self._people.own(user_id)
        if record is None:
            raise NotFoundException(detail=f"no user {user_id[:80]} comes from here")
        return record

    async def restate(self, record: UserRecord, as_of: int | None = None) -> None:
        """Say again what the directory said of a user, with what the delegation gives for it now."""
        async with self._lock:
            now = self._people.own(record.state.user_id)
            if now is None or now.revision != record.revision:
                return  # somebody has just said it
            await self._set(
                now.state.user_id,
                self._people.delegation(),
                _previous_provisioning(now),
                as_of,
                name=now.state.name,
            )

    async def _change(self, record: UserRecord, user: User) -> UserRecord:
        before = _previous_provisioning(record)
        said = _provisioning_of(user, before.groups)
        if (said.user_name or "").lower() != (before.user_name or "").lower():
            self._check_free(said.user_name or "", besides=record.state.user_id)
        user_id = record.state.user_id
        if before.active and said == before.model_copy(update={"active": False}):
            await self._provisioner.disable_user(user_id, reason="no longer active, says the directory")
            await self._caught_up()
            return self.user(user_id)
        return await self._set(user_id, self._people.delegation(), said)

    async def _set(
        self,
        user_id: str,
        delegation: Delegation,
        said: Provisioning,
        as_of: int | None = None,
        name: str | None = None,
    ) -> UserRecord:
        await self._provisioner.set_user(
            user_id, delegation, said, name=name or name_of(said, user_id), as_of=as_of
        )
        await self._caught_up()
        return self.user(user_id)

    def _check_free(self, user_name: str, besides: str | None) -> None:
        """RFC 7643, 4.1.1: a user name is unique, and its case does not count."""
        for record in self._people.all():
            said = record.state.provisioned
            if (
                record.state.user_id != besides
                and said
                and (said.user_name or "").lower() == user_name.lower()
            ):
                raise UniquenessException(detail=f"{user_name} is there already, as {record.state.user_id}")

    def _new_id(self, user_name: str) -> str:
        def is_gone(user_id: str) -> bool:
            record = self._people.record(user_id)
            said = record.state.provisioned if record else None
            return said is not None and said.by == self._people.id and said.gone

        user_id = free_id(user_name, self._mail_domain, is_gone)
        if user_id is None:
            raise InvalidValueException(detail="userName has no letter or digit that an id could be made of")
        if self._people.record(user_id) is not None:
            raise UniquenessException(
                detail=f"{user_id} is a user who does not come from here; an operator who wants them to has to make "
                "room under another id"
            )
        return user_id

    # --- groups ---

    async def create_group(self, group: Group) -> GroupLink:
        """A delegated group that the directory now tells of."""
        async with self._lock:
            name, links = group.display_name or "", self._people.links()
            if name not in {one.group for one in self._people.delegation().groups}:
                raise ForbiddenException(
                    detail=f"the group {name[:80]!r} is not delegated: it could give nothing. An operator adds it: "
                    f"ringfence provisioner set {self._people.id}"
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
        """A group as it is described anew."""
        async with self._lock:
            return await self._change_group(self.group(id), group)

    async def patch_group(self, id: str, patch: PatchOp[Group]) -> GroupLink:
        """A group with some attributes or members changed."""
        async with self._lock:
            link = self.group(id)
            members = self._people.members(link.group)
            group = group_resource(self._people.provisioner(), link.group, link.external_id, members, "")
            patch.patch(group)
            return await self._change_group(link, group)

    async def delete_group(self, id: str) -> None:
        """The group gives nobody anything any more; its members stay users."""
        async with self._lock:
            link = self.group(id)
            await self._set_members(link.group, frozenset())
            await self._provisioner.link_groups([one for one in self._people.links() if one != link])
            await self._caught_up()

    def group(self, id: str) -> GroupLink:
        """A group that the directory has told of. Raises NotFoundException."""
        link = self._people.link(id)
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
            links = [changed if one == link else one for one in self._people.links()]
            await self._provisioner.link_groups(links)
            await self._caught_up()
        await self._set_members(link.group, members)
        return changed

    def _member_ids(self, group: Group) -> frozenset[str]:
        ids = frozenset(one.value for one in group.members or () if one.value)
        if unknown := sorted(id for id in ids if self._people.own(id) is None):
            raise InvalidValueException(detail=f"{unknown[0][:80]} is no user who comes from here")
        return ids

    async def _set_members(self, group: str, wanted: Iterable[str]) -> None:
        delegation, wanted_ids = self._people.delegation(), frozenset(wanted)
        before = {one.state.user_id: one for one in self._people.members(group)}
        joining = [one for id in sorted(wanted_ids - before.keys()) if (one := self._people.own(id))]
        leaving = [before[id] for id in sorted(before.keys() - wanted_ids)]
        changes = [(one, (*_previous_provisioning(one).groups, group)) for one in joining]
        changes += [
            (one, tuple(g for g in _previous_provisioning(one).groups if g != group)) for one in leaving
        ]
        at_once = asyncio.Semaphore(_AT_ONCE)

        async def change(record: UserRecord, groups: Sequence[str]) -> None:
            said = _previous_provisioning(record).model_copy(update={"groups": tuple(groups)})
            async with at_once:
                await self._provisioner.set_user(
                    record.state.user_id, delegation, said, name=record.state.name
                )

        # What fails of many is told, and the rest is done all the same: the directory asks for all of it again.
        results = await asyncio.gather(*(change(*one) for one in changes), return_exceptions=True)
        await self._caught_up()
        for result in results:
            if isinstance(result, BaseException):
                raise result


def differs(record: UserRecord, delegation: Delegation) -> bool:
    """Whether a user has something else than the delegation now gives their groups."""
    said, state = record.state.provisioned, record.state
    given = given_by(delegation, said.groups if said else ())
    return (state.roles, state.entitlements.scope) != (given.roles, given.scope)


def _provisioning_of(user: User, groups: Sequence[str]) -> Provisioning:
    try:
        return said_of(user, groups)
    except ValidationError as error:
        raise InvalidValueException(detail=explain(error)) from None


def _previous_provisioning(record: UserRecord) -> Provisioning:
    """What the directory last said of a user. Whether an operator lets them is another matter."""
    provisioned = record.state.provisioned
    fields = dict(provisioned) if isinstance(provisioned, Provisioned) else {}
    return Provisioning(**{name: fields[name] for name in Provisioning.model_fields if name in fields})


# From the name that a directory gives a user to the id that Ringfence knows them by. Pure.

_IN_AN_ID = re.compile(r"[a-z0-9]")
_NOT_IN_AN_ID = re.compile(r"[^a-z0-9._-]+")
_LONGEST = 58
"""Of 63: there is room for a number behind it."""


def ids_for(user_name: str, mail_domain: str | None) -> Iterator[str]:
    """Ids for a user name, the best first: `maria@example.com` is `maria-at-example.com`, or `maria` in its own domain.

    Empty where nothing of the name can be in an id.
    """
    text = user_name.strip().lower()
    if not _IN_AN_ID.search(text):
        return
    if mail_domain:
        text = text.removesuffix(f"@{mail_domain}")
    id = _NOT_IN_AN_ID.sub("-", text.replace("@", "-at-")).strip("._-")[:_LONGEST]
    if id:
        yield id
        yield from (f"{id}-{number}" for number in range(2, 1000))


def free_id(user_name: str, mail_domain: str | None, is_gone: Callable[[str], bool]) -> str | None:
    """The first id that nobody had who left for good: who comes later under the same name is somebody else."""
    return next((id for id in ids_for(user_name, mail_domain) if not is_gone(id)), None)
