"""Widening commands that wait for a second person, as the registry's API lists them, verified before they are shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ringfence.client.errors import InvalidCallError
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import digest
from ringfence.kernel.crypto.jws import parse
from ringfence.messages.registry import AnyState, Command
from ringfence.model.identity.spiffe_ids import SubjectKind
from ringfence.model.lifecycle import CommandRefusedError, command_subject
from ringfence.model.records.directory import Directory


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
    now: AnyState | None
    """The subject by its verified record; None: there is none."""
    then: AnyState | None
    """The subject with the command; None: the command no longer fits the subject as it is now."""

    def changes(self) -> dict[str, tuple[Any, Any]]:
        """Return the fields of the subject that differ: each with its value now, and then.

        They are those of the state and not of the command, because what a command leaves out changes too: a target's
        delivery, whose directory a user comes from, the status of who was disabled.
        """
        now, then = state_as_json(self.now), state_as_json(self.then)
        names = dict.fromkeys((*now, *then))
        return {name: (now.get(name), then.get(name)) for name in names if now.get(name) != then.get(name)}


def state_as_json(state: AnyState | None) -> dict[str, Any]:
    """Return the fields of a state that are set; none if there is no such subject."""
    return state.model_dump(mode="json", exclude_none=True) if state is not None else {}


def read_proposal(directory: Directory, listed: Mapping[str, Any]) -> ProposedCommand:
    """Return a proposal of the registry's list, after the author's signature was verified by the records on Kafka.

    What it changes is taken from those records too, because the registry's API could show another state. Raises
    InvalidCallError if it does not verify: nobody should second it. Raises ChainError if the subject's record does not.
    """
    try:
        jws = parse(listed["command"])
        given = directory.chains.authorise(jws, listed["at_ms"])
    except (InvalidMessageError, KeyError, TypeError) as error:
        raise InvalidCallError(f"the registry lists a proposal that does not verify: {error}") from None
    kind, id = command_subject(given.claims, given.command_id)
    entry = directory.entry(kind, id)
    try:
        then = directory.chains.state_with(given)
    except CommandRefusedError:
        then = None
    return ProposedCommand(
        digest=digest(jws.signing_input),
        command=given.claims,
        author=given.actor.user_id or "root",
        kind=kind,
        id=id,
        revision=listed["revision"],
        now=entry.state if entry else None,
        then=then,
    )
