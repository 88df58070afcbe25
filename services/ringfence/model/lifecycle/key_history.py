"""Where keys of people and agents come from: who gave each key, and since when it counts for approvals. Pure.

All of it follows from the commands that the user's record embeds, and no state stores it
(ADR 0074). The first key of a user counts at once. A key that somebody else adds later counts for approvals, grants and
reviews only after `WAIT_S`, so that the user can end it first; or at once, if a second operator co-signed it. A key
that the user adds by a key of their own counts as that one does.

Two relations are kept apart. *Vouchers* are people: they decide who may approve beside a key, and first keys have none.
*Givers* are keys: each key has them, first ones and agents' too. They decide what ends with a compromised key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final, NamedTuple

from ringfence.messages.codes import Code
from ringfence.messages.registry import AgentState, UserState
from ringfence.model.verdict import ALLOWED, Refused, Verdict, refused

WAIT_S: Final = 24 * 3600
"""How long a key that somebody else added does not count for approvals. A constant: no setting shortens it."""


class Giver(NamedTuple):
    """A key of a user that gave another key, or co-signed it."""

    user_id: str
    kid: str
    at_ms: int
    """The append time of the command in which it gave its word."""


@dataclass(frozen=True, slots=True)
class KeyOrigin:
    """Where one key of a user or an agent comes from."""

    kid: str
    added_ms: int
    """The append time of the command that gave it to the user; of the last one, if it had ended in between."""
    by: str | None
    """The id of the user who signed that command; None: the root."""
    by_kid: str
    """The key that signed that command."""
    first: bool
    """Whether it is the first key of a user, or any key of an agent."""
    counts_from_ms: int
    """Since when it counts for approvals, grants and reviews."""
    endorsed_by: str | None = None
    """The second operator who co-signed it."""
    vouchers: frozenset[str] = frozenset()
    """The ids of all others on whose word the key rests: who added it, who co-signed it, and on whose word *their* keys
    rest; also those from before it ended and was added again. Empty for the first keys of a user."""
    givers: frozenset[Giver] = frozenset()
    """All keys on which this one rests: those that gave or co-signed it, those that gave *them*, and so on; also from
    before it ended and was added again. Empty where the root gave it."""
    adders: frozenset[str] = frozenset()
    """All keys that ever added it, also before it ended and was added again: whoever had one of them may have this.
    Only the root's where the root gave it."""
    again: bool = False
    """Whether it had ended, and was added again."""


@dataclass(frozen=True, slots=True)
class SignerKey:
    """The key that signed a command."""

    user_id: str | None
    """None: the root, or an agent."""
    kid: str
    origin: KeyOrigin | None = None
    """None for the root and for provisioners."""


@dataclass(frozen=True, slots=True)
class KeyProof:
    """What a `user.add-key` command embeds, verified."""

    invitation_id: str
    """The UUIDv5 of the invitation's (`iss`, `jti`). It counts once."""
    endorser: SignerKey | None = None
    """The second operator, whose co-signature counts."""


_NO_ORIGINS: Final[Mapping[str, KeyOrigin]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class KeyHistory:
    """The origins of all keys that a user has or had, as of one command."""

    origins: Mapping[str, KeyOrigin] = field(default_factory=lambda: _NO_ORIGINS)
    invitations: frozenset[str] = frozenset()
    """The ids of the invitations that were used."""

    def added_again_ms(self, kid: str) -> int:
        """Return the append time of the command that gave a key back after it had ended; 0 where none did."""
        origin = self.origins.get(kid)
        return origin.added_ms if origin is not None and origin.again else 0

    def added_by(self, kid: str) -> frozenset[str]:
        """Return the keys that the user ever added with `kid`, and with keys that those added, and so on.

        A key stays among them if it ends and another adds it again: two keys could otherwise add each other, and rest
        on nothing else.
        """
        found: set[str] = set()
        todo = [kid]
        while todo:
            parent = todo.pop()
            children = {
                one.kid
                for one in self.origins.values()
                if parent in one.adders and one.kid not in found and one.kid != kid
            }
            found |= children
            todo += children
        return frozenset(found)

    def after(
        self,
        before: UserState | AgentState | None,
        state: UserState | AgentState,
        *,
        at_ms: int,
        signer: SignerKey,
        proof: KeyProof | None = None,
        second: SignerKey | None = None,
    ) -> KeyHistory:
        """Return the history after a command that made `state` of `before`.

        Args:
            at_ms: the append time of the command.
            signer: the key that signed it.
            proof: what it embeds, if it is a `user.add-key`.
            second: the key that seconded it.
        """
        at_s = at_ms // 1000
        live = [key for key in state.keys if key.not_after > at_s]
        had = {key.kid for key in before.keys if key.not_after > at_s} if before else set()
        given = [key.kid for key in live if key.kid not in had]  # of a `user.add-key` there is one
        # A command that lists a key again brings an object of its own. All others keep that of the state before.
        kept = {id(key) for key in before.keys} if before else set()
        of_root = [key.kid for key in live if id(key) not in kept] if signer.user_id is None else []
        if not given and not of_root:
            return self
        if isinstance(state, AgentState):
            parent = self.origins.get(signer.kid)  # an agent that renews its key
            new = {
                kid: replace(parent, kid=kid, added_ms=at_ms, by_kid=signer.kid, counts_from_ms=at_ms)
                if parent
                else _given(kid, (signer, None, second), at_ms=at_ms, first=True)
                for kid in given
            }
            return KeyHistory(MappingProxyType({**self.origins, **new}))
        first = not self.origins
        endorser = proof.endorser if proof else None
        vouching = (signer, endorser, second)
        new = {kid: _origin(kid, state.user_id, vouching, at_ms=at_ms, first=first) for kid in given}
        if not first:
            new = {kid: self._added_again(origin) for kid, origin in new.items()}
        for kid in of_root:  # whatever it rested on before
            origin = new.get(kid) or self.origins[kid]
            new[kid] = replace(origin, givers=frozenset(), adders=frozenset({signer.kid}))
        used = self.invitations | {proof.invitation_id} if proof else self.invitations
        return KeyHistory(MappingProxyType({**self.origins, **new}), used)

    def _added_again(self, origin: KeyOrigin) -> KeyOrigin:
        """Return `origin` with what a key rested on before it ended: whoever could use it then still can."""
        former = self.origins.get(origin.kid)
        if former is None:
            return replace(origin, adders=frozenset({origin.by_kid}))
        return replace(
            origin,
            adders=former.adders | {origin.by_kid},
            again=True,
            vouchers=former.vouchers | origin.vouchers,
            givers=former.givers | origin.givers,
        )


NO_HISTORY: Final = KeyHistory()


_Vouching = tuple[SignerKey, SignerKey | None, SignerKey | None]
"""The key that signed a command, the one that co-signed the new key, and the one that seconded the command."""


def _given(kid: str, vouching: _Vouching, *, at_ms: int, first: bool) -> KeyOrigin:
    """Return the origin of a key that counts at once and has no vouchers."""
    signer = vouching[0]
    givers: set[Giver] = set()
    for one in vouching if signer.user_id else ():  # what the root gave rests on no other key
        if one is not None and one.user_id is not None:
            givers.add(Giver(one.user_id, one.kid, at_ms))
            givers |= one.origin.givers if one.origin else frozenset()
    return KeyOrigin(
        kid, at_ms, signer.user_id, signer.kid, first=first, counts_from_ms=at_ms, givers=frozenset(givers)
    )


def _origin(kid: str, user_id: str, vouching: _Vouching, *, at_ms: int, first: bool) -> KeyOrigin:
    plain = _given(kid, vouching, at_ms=at_ms, first=first)
    signer, endorser, _ = vouching
    if first:
        return plain
    inherited = signer.origin
    if signer.user_id == user_id:
        if inherited is None:
            return plain
        return replace(
            plain, counts_from_ms=max(at_ms, inherited.counts_from_ms), vouchers=inherited.vouchers
        )
    known = [one for one in vouching if one is not None]
    people = {one.user_id for one in known if one.user_id} | {
        person for one in known if one.origin for person in one.origin.vouchers
    }
    return replace(
        plain,
        counts_from_ms=at_ms if endorser else at_ms + WAIT_S * 1000,
        endorsed_by=endorser.user_id if endorser else None,
        vouchers=frozenset(people - {user_id}),
    )


def check_endorsement(user_id: str, signer: SignerKey, endorser: SignerKey, at_ms: int) -> Verdict:
    """Check that a second operator's signature under a new key of `user_id` counts at `at_ms`.

    Neither of the two may rest on the word of the other, nor on the user's: one person could otherwise be both.
    """
    if endorser.user_id in (user_id, signer.user_id):
        return _not_apart(
            f"{endorser.user_id} is nobody else: it takes a second operator, who is not {user_id} either"
        )
    for one, others in ((signer, {endorser.user_id}), (endorser, {signer.user_id})):
        origin = one.origin
        if origin is None:
            continue
        if origin.counts_from_ms > at_ms:
            return _not_apart(
                f"the key of {one.user_id} was added by somebody else, and does not count for approvals yet"
            )
        if origin.vouchers & (others | {user_id}):
            return _not_apart(
                f"the key of {one.user_id} rests on the word of another of the two, or of {user_id}"
            )
    return ALLOWED


def _not_apart(why: str) -> Refused:
    return refused(Code.ENDORSEMENT_NOT_APART, f"the co-signature does not count: {why}")
