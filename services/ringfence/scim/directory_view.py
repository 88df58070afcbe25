"""The users and groups of one provisioner, read from the verified records. The service keeps nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from ringfence.kernel.base.errors import UnavailableError
from ringfence.messages.registry import Delegation, GroupLink, UserRecord
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.records.provisioning import is_of
from ringfence.scim.resources import group_id


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
        """The records of all users of this provisioner."""
        for entry in self._directory.entries("user"):
            record = cast(UserRecord, entry.record)
            if is_of(record.state, self.id):
                yield record

    def members(self, group: str) -> list[UserRecord]:
        """The members of a group."""
        return [one for one in self.all() if one.state.provisioned and group in one.state.provisioned.groups]

    def links(self) -> tuple[GroupLink, ...]:
        """The groups that the directory has created. Raises UnavailableError."""
        return self.provisioner().state.linked

    def link(self, id: str) -> GroupLink | None:
        """A group by its SCIM id; None if there is none. Raises UnavailableError."""
        return next((one for one in self.links() if group_id(self.id, one.group) == id), None)
