"""Widening commands that wait for a second person, as the registry's API lists them, verified before they are shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ringfence.client.errors import InvalidCallError
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import digest
from ringfence.kernel.crypto.jws import parse
from ringfence.messages.registry import Command
from ringfence.model.identity.spiffe_ids import SubjectKind
from ringfence.model.lifecycle import command_subject
from ringfence.model.records.directory import Directory

_ENVELOPE = frozenset({"iss", "aud", "iat", "exp", "jti", "revision"})


@dataclass(frozen=True, slots=True)
class ProposedCommand:
    """A widening command whose author's signature was verified."""

    digest: str
    command: Command
    author: str
    """The user who signed it."""
    kind: SubjectKind
    id: str
    """The subject that it changes."""
    revision: int
    """Of the subject's record, when it was proposed. 0: there was none."""

    def changes(self, state: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Return the fields that differ: each with its value now, and the one that the command gives.

        `state`: that of the subject's record, as JSON; empty if there is none.
        """
        wanted = self.command.model_dump(mode="json", exclude=set(_ENVELOPE), exclude_none=True)
        return {name: (state.get(name), value) for name, value in wanted.items() if state.get(name) != value}


def read_proposal(directory: Directory, listed: Mapping[str, Any]) -> ProposedCommand:
    """Return a proposal of the registry's list, after the author's signature was verified by the records on Kafka.

    Raises InvalidCallError if it does not verify: nobody should second it.
    """
    try:
        jws = parse(listed["command"])
        given = directory.chains.authorise(jws, listed["at_ms"])
    except (InvalidMessageError, KeyError, TypeError) as error:
        raise InvalidCallError(f"the registry lists a proposal that does not verify: {error}") from None
    kind, id = command_subject(given.claims, given.command_id)
    author = given.actor.user_id or "root"
    return ProposedCommand(digest(jws.signing_input), given.claims, author, kind, id, listed["revision"])
