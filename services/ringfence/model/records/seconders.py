"""Who may second a proposed command, by the records of a directory: for lists, notices and warnings, which decide
nothing. The second signature itself is judged when it comes. And who is alone behind several users.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.jws import parse
from ringfence.messages.registry import AgentRegister, AgentTransfer, EmbeddedCommand
from ringfence.model.lifecycle import (
    Actor,
    Person,
    Signatures,
    check_second,
    command_subject,
    hold_of,
    sponsors_of,
)
from ringfence.model.records.command_chain import ChainError, unverified_command
from ringfence.model.records.directory import Directory
from ringfence.model.verdict import Allowed


def seconders(directory: Directory, command: EmbeddedCommand, now_ms: int) -> list[str]:
    """Return the ids of the users who may second a proposed command at `now_ms`, sorted; none if it does not verify."""
    try:
        given = directory.chains.authorise(parse(command.jws), command.appended_at_ms)
        entry = directory.entry(*command_subject(given.claims, given.command_id))
    except (InvalidMessageError, ChainError):
        return []
    before = [unverified_command(one) for one in entry.record.commands] if entry else []
    named = {one.sponsor for one in before if isinstance(one, AgentRegister | AgentTransfer)}
    sponsors = sponsors_of((), given.claims) | named

    def may(person: Person) -> bool:
        both = Signatures(given.signatures.author, now_ms, person, command.appended_at_ms)
        return isinstance(check_second(given.claims, both, sponsors), Allowed)

    return [user_id for user_id, people in _candidates(directory, now_ms) if any(map(may, people))]


def independent_operators(directory: Directory, now_ms: int) -> int:
    """Return how many operators have a live key at `now_ms`, of whom no two rest on one person's word."""
    taken: set[str] = set()
    count = 0
    for user_id, people in _candidates(directory, now_ms):
        if not people or not people[0].actor.is_operator or people[0].actor.hold is not None:
            continue
        behind = {user_id, *people[0].provenance.people(now_ms)}
        if taken.isdisjoint(behind):
            taken |= behind
            count += 1
    return count


def sole_givers(directory: Directory, user_ids: Iterable[str], now_ms: int) -> frozenset[str]:
    """Return the ids of the people by whose word alone all of these users have what they have at `now_ms`.

    Each of the users is that person, or rests on their word without an independent second person, at any depth. Nobody
    is found for one user who rests on themself, and for users whose record does not verify.
    """
    users = set(user_ids)
    try:
        behind = [{one, *directory.chains.provenance_at(one, now_ms).alone()} for one in users]
    except ChainError:
        return frozenset()
    common = frozenset(set.intersection(*behind)) if behind else frozenset()
    return common - users if len(users) == 1 else common


def _candidates(directory: Directory, now_ms: int) -> Iterator[tuple[str, list[Person]]]:
    """Yield active operators and sponsors, each once for each of their live keys."""
    for user_id in directory.users_with("operator", "sponsor"):
        try:
            entry = directory.user(user_id)
            provenance = directory.chains.provenance_at(user_id, now_ms)
        except ChainError:
            continue
        if entry is None or entry.state.status != "active":
            continue
        user = entry.state
        yield (
            user_id,
            [
                Person(
                    Actor(
                        user_id,
                        frozenset(user.roles),
                        kid=key.kid,
                        by_passkey=key.use == "webauthn",
                        hold=hold_of(user),
                    ),
                    provenance,
                )
                for key in user.keys
                if key.not_before * 1000 <= now_ms < key.not_after * 1000
            ],
        )
