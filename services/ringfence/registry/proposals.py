"""Proposals: widening commands that wait for a second person, and what becomes of each (ADR 0102).

The topic `proposal` holds them, so that a replica that takes over knows them. A proposal changes no record. The second
signature is judged like a command of its own; then the proposed command is decided again, as of that moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ringfence.kernel.base.clock import utc_text
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import derived_id, digest, message_id
from ringfence.kernel.crypto.jws import UnverifiedJws, parse, sign, verify
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Outbound, Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.codes import AnyCode, Code
from ringfence.messages.credential import Reason
from ringfence.messages.operations import EventKind
from ringfence.messages.registry import (
    MAX_PROPOSAL_S,
    MAX_PROPOSALS,
    MAX_SECONDED,
    Command,
    CommandWithdraw,
    EmbeddedCommand,
    Proposal,
    ProposalStatus,
    SecondedCommand,
    SecondSignature,
)
from ringfence.messages.topics import PROPOSAL
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.lifecycle import (
    CommandRefusedError,
    command_subject,
)
from ringfence.model.records.api_access import Caller
from ringfence.model.records.command_chain import (
    LISTED,
    Authorised,
    ChainError,
    subject_spiffe,
    unverified_command,
)
from ringfence.model.records.directory import Directory
from ringfence.model.records.seconders import seconders
from ringfence.registry.domain import Waits, changed_since

_KEPT_MS: Final = 3_600_000
"""How long what became of a proposal stays on the topic after its day."""


class ProposalTable:
    """The proposals on the topic, by digest: only what a registry signed."""

    def __init__(self, trust: TrustStore) -> None:
        self._trust = trust
        self._proposals: dict[str, Proposal] = {}

    def on_records(self, records: Sequence[Received]) -> None:
        """Take records of the topic. Those that no registry signed, and what goes back in time, count for nothing."""
        for record in records:
            try:
                self._take(record)
            except InvalidMessageError:
                continue  # its writer is not the registry

    def _take(self, record: Received) -> None:
        known = self._proposals.get(record.key or "")
        if not record.value:
            if known is not None and record.appended_at_ms > known.ends_at_ms:
                del self._proposals[known.digest]
            return
        find = self._trust.finder(*Proposal.signed_by, at_s=record.appended_at_ms / 1000)
        claims = verify(parse(record.value), Proposal, find, audience=self._trust.trust_domain).claims
        if claims.digest == record.key:
            self.put(claims)

    def put(self, proposal: Proposal) -> None:
        """Take a proposal. What ended stays so."""
        known = self._proposals.get(proposal.digest)
        if known is None or known.status == "open":
            self._proposals[proposal.digest] = proposal

    def drop(self, proposal: Proposal) -> None:
        self._proposals.pop(proposal.digest, None)

    def get(self, digest: str) -> Proposal | None:
        """Return the proposal with this digest, or None."""
        return self._proposals.get(digest)

    def all(self) -> list[Proposal]:
        """Return all proposals, those that have ended too, oldest first."""
        return sorted(self._proposals.values(), key=lambda one: (one.command.appended_at_ms, one.digest))

    def open(self) -> list[Proposal]:
        """Return the proposals that wait, oldest first."""
        return [one for one in self.all() if one.status == "open"]


@dataclass(slots=True, eq=False)
class Proposals:
    """Takes proposals, second signatures and withdrawals, one after the other."""

    runtime: Runtime
    directory: Directory
    table: ProposalTable

    # --- proposing ---

    async def propose(self, authorised: Authorised, waits: Waits, traceparent: str | None) -> str:
        """Publish a proposal. Returns who may second it, and how, for its author.

        Raises CommandRefusedError if the author has too many of them.
        """
        claims, proposed_ms = authorised.claims, authorised.appended_at_ms
        key = proposal_digest(parse(authorised.signed.compact))
        self.check_limit(claims, key)
        proposal = Proposal(
            iss=self.runtime.key.id,
            aud=self.runtime.settings.trust_domain,
            iat=proposed_ms // 1000,
            jti=derived_id("proposal", key, "open"),
            digest=key,
            command=authorised.embedded,
            sub=subject_spiffe(self.runtime.settings.trust_domain, waits.state),
            revision=waits.revision,
            ends_at_ms=proposed_ms + MAX_PROPOSAL_S * 1000,
            status="open",
            at_ms=proposed_ms,
        )
        await self._publish(proposal, traceparent)
        people = ", ".join(self.seconders(authorised.embedded)) or "nobody yet: it takes another operator"
        return (
            f"{claims.typ} waits for a second person until {utc_text(proposal.ends_at_ms / 1000)}; who may: {people}; "
            f"by: ringfence proposal second {key[:12]}"
        )

    def check_limit(self, command: Command, digest: str) -> None:
        """Raise CommandRefusedError if an author has as many open proposals besides this one as are allowed: of users
        and keys, which are seconded in a list, one list; of all others `MAX_PROPOSALS`.
        """
        listed = isinstance(command, LISTED)
        open_ones = [unverified_command(one.command) for one in self.table.open() if one.digest != digest]
        others = [one for one in open_ones if one.iss == command.iss and isinstance(one, LISTED) == listed]
        if len(others) >= (MAX_SECONDED if listed else MAX_PROPOSALS):
            what = "of users and keys" if listed else "of other changes"
            raise CommandRefusedError(
                f"{command.iss.rpartition('/')[2]} has {len(others)} open proposals {what}, and no more can be; have "
                "one seconded, or withdraw one with: ringfence proposal withdraw",
                code=Code.TOO_MANY_PROPOSED,
            )

    def seconders(self, command: EmbeddedCommand) -> list[str]:
        """Return the ids of the users who may second a proposed command now, sorted."""
        return seconders(self.directory, command, max(self.runtime.clock.now_ms(), command.appended_at_ms))

    # --- the second person ---

    def required(self, about: SecondedCommand | CommandWithdraw, at_ms: int) -> Proposal:
        """Return the open proposal that a command is about. Raises CommandRefusedError."""
        proposal = self.table.get(about.proposal)
        if proposal is None or (
            isinstance(about, SecondedCommand)
            and (about.author, about.command)
            != (author_of(proposal), unverified_command(proposal.command).jti)
        ):
            raise CommandRefusedError(
                "there is no such proposal; see: ringfence proposal list", code=Code.PROPOSAL_UNKNOWN
            )
        if proposal.status == "open" and at_ms < proposal.ends_at_ms:
            return proposal
        if proposal.status in ("open", "lapsed") and proposal.code != Code.SUBJECT_CHANGED:
            raise CommandRefusedError(
                "nobody seconded the proposal within a day; propose it anew", code=Code.PROPOSAL_LAPSED
            )
        if proposal.code == Code.SUBJECT_CHANGED:
            raise _subject_changed(proposal)
        if proposal.code == Code.KEY_ENDED:
            raise CommandRefusedError(
                "the key of its author has ended; propose it anew with another", code=Code.KEY_ENDED
            )
        by = f" by {proposal.by.rpartition('/')[2]}" if proposal.by else ""
        raise CommandRefusedError(f"the proposal was {proposal.status}{by} before", code=Code.PROPOSAL_CLOSED)

    def seconded(self, second: Authorised, one: SecondedCommand) -> Authorised:
        """Return a proposed command that a second person names, with their signature, as of the append of that.

        Raises CommandRefusedError, ChainError; InvalidMessageError if the author's key has ended.
        """
        at_ms = second.appended_at_ms
        proposal = self.required(one, at_ms)
        signature = SecondSignature(jws=second.signed.compact, proposed_at_ms=proposal.command.appended_at_ms)
        given = self.directory.chains.authorise(parse(proposal.command.jws), at_ms, None, signature)
        entry = self.directory.entry(*command_subject(given.claims, given.command_id))
        if one.revision != proposal.revision or changed_since(entry, proposal):
            raise _subject_changed(proposal)
        return given

    def seconded_before(self, embedded: EmbeddedCommand) -> Authorised:
        """Return a command that a record embeds with its second signature. Raises ChainError, InvalidMessageError."""
        jws = parse(embedded.jws)
        return self.directory.chains.authorise(jws, embedded.appended_at_ms, None, embedded.second)

    async def close(
        self,
        proposal: Proposal,
        status: ProposalStatus,
        at_ms: int,
        by: str | None = None,
        code: AnyCode | None = None,
    ) -> None:
        """Publish what became of a proposal."""
        key = self.runtime.key
        claims = proposal.model_copy(
            update={
                "iss": key.id, "iat": at_ms // 1000, "jti": derived_id("proposal", proposal.digest, status),
                "status": status, "by": by, "code": code, "at_ms": at_ms,
            }
        )  # fmt: skip
        await self._publish(claims, None)

    async def settle(self, at_ms: int, *, forget: bool = False) -> None:
        """End the proposals that can no longer take effect at `at_ms`: their day is over, their subject has changed, or
        the key of their author has ended. With `forget`, also delete those whose day was over an hour ago.
        """
        for proposal in self.table.all():
            if proposal.status == "open":
                if (end := self._end_of(proposal, at_ms)) is not None:
                    status, code, message = end
                    await self.close(proposal, status, at_ms, code=code)
                    kind: EventKind = "lapsed" if status == "lapsed" else "withdrawn"
                    await self.report(kind, proposal, Reason(code=code, message=message))
            elif forget and at_ms > proposal.ends_at_ms + _KEPT_MS:
                await self._delete(proposal)

    def _end_of(self, proposal: Proposal, at_ms: int) -> tuple[ProposalStatus, Code, str] | None:
        if at_ms >= proposal.ends_at_ms:
            return "lapsed", Code.PROPOSAL_LAPSED, "nobody seconded it within a day"
        jws = parse(proposal.command.jws)
        claims = unverified_command(proposal.command)
        try:
            entry = self.directory.entry(*command_subject(claims, message_id(claims.iss, claims.jti)))
            key = self.directory.chains.command_key(claims.iss, jws.header.kid, at_ms)
        except ChainError:
            return None  # nothing is done on a record that does not verify
        record = entry.record if entry else None
        if record is not None and any(one.jws == proposal.command.jws for one in record.commands):
            return None  # seconded; the second signature is delivered again, if its answer is missing
        if changed_since(entry, proposal):
            return "lapsed", Code.SUBJECT_CHANGED, "its subject has changed since"
        if key is None:
            return "withdrawn", Code.KEY_ENDED, "the key of its author has ended"
        return None

    async def report(self, kind: EventKind, proposal: Proposal, reason: Reason | None = None) -> None:
        """Publish an event about a proposal, as the answer to its author."""
        claims = unverified_command(proposal.command)
        await self.runtime.event(
            kind,
            claims.typ,
            about=(proposal.digest,),
            reasons=(reason,) if reason else (),
            actor=claims.iss,
            ref=claims.jti,
            result=proposal.digest,
            agent_id=subject_of(self.runtime.settings.trust_domain, proposal.sub, "agent"),
        )

    async def _publish(self, proposal: Proposal, traceparent: str | None) -> None:
        compact = sign(proposal, self.runtime.key)
        sent = await self.runtime.publisher.send(
            PROPOSAL,
            Proposal.typ,
            Outbound(proposal.digest, compact, id=proposal.jti, traceparent=traceparent),
        )
        await sent
        self.table.put(proposal)

    async def _delete(self, proposal: Proposal) -> None:
        sent = await self.runtime.publisher.send(
            PROPOSAL, Proposal.typ, Outbound(proposal.digest, b"", id=f"{proposal.jti}.deleted")
        )
        await sent
        self.table.drop(proposal)


def proposal_digest(jws: UnverifiedJws) -> str:
    """Return the digest of a proposed command: SHA-256 of its JWS Signing Input, so that one command has one."""
    return digest(jws.signing_input)


def author_of(proposal: Proposal) -> str:
    """Return the `iss` of a proposed command, which the registry verified."""
    return unverified_command(proposal.command).iss


def _subject_changed(proposal: Proposal) -> CommandRefusedError:
    what = proposal.sub.rpartition("/")[2]
    return CommandRefusedError(
        f"{what} has changed since it was proposed; look at the change, and propose it anew",
        code=Code.SUBJECT_CHANGED,
    )


def may_see(proposal: Proposal, caller: Caller) -> bool:
    """Return whether a person may see a proposal. Operators and auditors see all; others their own, those about
    themselves, and, as a sponsor, those about agents, which sponsors may second.
    """
    if caller.sees_all:
        return True
    user = caller.user
    claims = unverified_command(proposal.command)
    own = claims.iss.endswith(f"/user/{user.user_id}") or proposal.sub.endswith(f"/user/{user.user_id}")
    return own or ("sponsor" in user.roles and "/agent/" in proposal.sub)
