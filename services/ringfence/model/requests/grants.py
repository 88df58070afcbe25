"""Grants, which are approvals given ahead: what each covers, and a local table of grants and withdrawals."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.crypto.jws import Signed, parse, verify
from ringfence.kernel.crypto.webauthn import VerificationKey
from ringfence.messages.approval import MAX_GRANT_LIFE_S, Grant, GrantWithdraw
from ringfence.messages.base import typ_header
from ringfence.messages.codes import Code
from ringfence.messages.credential import Delivery, Reason, Revisions
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.requests.facts import RequestContext
from ringfence.model.scope.scope import missing
from ringfence.model.unknown_fields import describe_unknown, is_understood, unknown_fields
from ringfence.model.verdict import ALLOWED, Refused, Verdict, refused

if TYPE_CHECKING:
    from ringfence.kernel.kafka.record import Received

log = logging.getLogger(__name__)

KEEP_MS = (MAX_GRANT_LIFE_S + 3600) * 1000
_FORGET_EVERY_MS = 60_000
MOST_OF_ONE = 1000
"""The most remembered grants of one person, and the most withdrawals by one person of unknown grants.

So nobody fills the memory of others.
"""


def id_of(grant: Grant) -> str:
    """Return the id of a grant, by which leases and withdrawals name it."""
    return message_id(grant.iss, grant.jti)


def signer_of(grant: Grant) -> str | None:
    """Return the id of the user who signed the grant; None if the signer is no user."""
    return subject_of(grant.aud, grant.iss, "user")


def check_grant(
    grant: Grant, facts: RequestContext, *, at_ms: int, ttl_s: int, delivery: Delivery, revisions: Revisions
) -> Verdict:
    """Check that a verified grant covers this request, issued at `at_ms`.

    1. It has no field that is unknown here.
    2. It lives no longer than a grant may.
    3. It is for this agent and task.
    4. The request is no break glass.
    5. The scope of the request is within its scope, at its one target.
    6. The life of the credential is within its own, and the delivery is the same.
    7. It has not ended by `at_ms`.
    8. No record that it was given on has changed since.

    Other checks decide whether its signer may give what is needed, how often it was used, and whether it was withdrawn.
    """
    agent, task = facts.agent.state, facts.task.state
    understood = check_understood(grant)
    if isinstance(understood, Refused):
        return understood
    if grant.exp - grant.iat > MAX_GRANT_LIFE_S:
        return refused(
            Code.GRANT_TOO_LONG, f"a grant lives {MAX_GRANT_LIFE_S // 3600} h at most; sign a shorter one"
        )
    if (grant.agent_id, grant.task_id) != (agent.agent_id, task.task_id):
        return refused(Code.GRANT_OTHER_TASK, "the grant was given for another task or agent")
    if facts.break_glass:
        return refused(Code.GRANT_BREAKS_NO_GLASS, "break glass takes signatures over the very request")
    one_target = len({permission.target for permission in grant.scope}) == 1  # it has one target's revision
    if not one_target or missing(facts.request.claims.scope, grant.scope):
        return refused(Code.GRANT_OTHER_SCOPE, "the request reaches beyond the scope of the grant")
    if ttl_s > grant.ttl_s or delivery != grant.delivery:
        return refused(Code.GRANT_OTHER_TERMS, "the grant was given for a shorter life or another delivery")
    if at_ms >= grant.exp * 1000:
        return refused(Code.GRANT_ENDED, "the time of the grant is over; ask anew")
    if grant.revisions != revisions:
        return refused(
            Code.GRANT_STALE,
            "agent, user, task, target or policy changed since the grant was given; ask anew",
        )
    return ALLOWED


def check_understood(grant: Grant) -> Verdict:
    """Check that a grant has no unknown field: it may limit the grant, so such a grant covers nothing."""
    if is_understood(grant):
        return ALLOWED
    message = describe_unknown(unknown_fields(grant), "the grant")[:2048]
    return Refused(Reason(code=Code.GRANT_NOT_UNDERSTOOD, message=message))


@dataclass(frozen=True, slots=True)
class SignedGrant:
    """A grant that a user signed, and its position on Kafka."""

    signed: Signed[Grant]
    partition: int
    offset: int
    appended_at_ms: int


class GrantTable:
    """Recent grants and withdrawals from `approval.response`. The first record of each id counts.

    It holds only what a user signed. The caller decides whether it is valid.
    """

    def __init__(self, directory: Directory, trust_domain: str) -> None:
        self._directory = directory
        self._trust_domain = trust_domain
        self._grants: dict[str, SignedGrant] = {}
        self._by_task: dict[str, list[str]] = {}
        self._withdrawn: dict[str, tuple[int, frozenset[str]]] = {}
        self._given_by: Counter[str] = Counter()
        self._withdrawn_unheard: Counter[str] = Counter()
        self._unread: list[Received] | None = []
        self._forgot_ms = 0

    def on_records(self, records: Sequence[Received]) -> None:
        """Add records of `approval.response`. Approvals are ignored."""
        for record in records:
            if kind_of(record) is None:
                continue
            if self._unread is None:
                self._read(record)
            else:
                self._unread.append(record)

    def settle(self) -> None:
        """Verify what was read so far. Call it once the tables of users are complete, before anything is decided."""
        aside, self._unread = self._unread or [], None
        for record in aside:
            self._read(record)

    def keep(
        self, grant: Signed[Grant], partition: int, offset: int, appended_at_ms: int
    ) -> SignedGrant | None:
        """Add a verified grant. Returns the first grant with that id, or None if its signer gave too many."""
        id, signer = id_of(grant.claims), grant.claims.iss
        first = self._grants.get(id)
        if first is None and self._given_by[signer] < MOST_OF_ONE:
            first = self._grants[id] = SignedGrant(grant, partition, offset, appended_at_ms)
            self._by_task.setdefault(grant.claims.task_id, []).append(id)
            self._given_by[signer] += 1
        return first

    def take_back(self, grant_id: str, user_id: str, at_ms: int) -> None:
        """Note that a user withdrew a grant, at an append time (ms)."""
        _, users = self._withdrawn.get(grant_id, (0, frozenset()))
        if user_id in users:
            return
        if grant_id not in self._grants:  # withdrawals of known grants are as few as those
            if self._withdrawn_unheard[user_id] >= MOST_OF_ONE:
                return
            self._withdrawn_unheard[user_id] += 1
        self._withdrawn[grant_id] = (at_ms, users | {user_id})

    def get(self, grant_id: str) -> SignedGrant | None:
        """Return a grant that somebody signed, or None."""
        return self._grants.get(grant_id)

    def of_task(self, task_id: str) -> list[Signed[Grant]]:
        """Return all grants for a task, withdrawn ones included, the one that ends first at the front."""
        grants = (self._grants[id].signed for id in self._by_task.get(task_id, ()))
        return sorted(grants, key=lambda signed: signed.claims.exp)

    def all(self) -> Iterable[Signed[Grant]]:
        """Return all remembered grants."""
        return [given.signed for given in self._grants.values()]

    def is_withdrawn(self, grant: Grant, *, sponsor: str, on_behalf_of: str) -> bool:
        """Return whether a person who may do so withdrew it: its signer, the sponsor, or the user that it is on
        behalf of.
        """
        _, users = self._withdrawn.get(id_of(grant), (0, frozenset[str]()))
        return not users.isdisjoint({signer_of(grant), sponsor, on_behalf_of})

    def _forget(self, now_ms: int) -> None:
        """Drop expired grants, at intervals."""
        if now_ms - self._forgot_ms < _FORGET_EVERY_MS:
            return
        self._forgot_ms = now_ms
        grants = [one for one in self._grants.values() if one.signed.claims.exp * 1000 + KEEP_MS >= now_ms]
        self._grants = {id_of(one.signed.claims): one for one in grants}
        self._by_task, self._given_by = {}, Counter()
        for id, given in self._grants.items():
            self._by_task.setdefault(given.signed.claims.task_id, []).append(id)
            self._given_by[given.signed.claims.iss] += 1
        self._withdrawn = {id: one for id, one in self._withdrawn.items() if one[0] + KEEP_MS >= now_ms}
        self._withdrawn_unheard = Counter(
            user for id, (_, users) in self._withdrawn.items() if id not in self._grants for user in users
        )

    def _read(self, record: Received) -> None:
        at_s = record.appended_at_ms / 1000

        def find(iss: str, kid: str) -> VerificationKey | None:
            return self._directory.user_key(iss, kid, at_s)

        try:
            jws, model = parse(record.value), Grant if kind_of(record) == Grant.typ else GrantWithdraw
            signed = verify(
                jws, model, find, audience=self._trust_domain, appended_at_ms=record.appended_at_ms
            )
        except (InvalidMessageError, ChainError) as error:
            log.warning(
                "ignored %s at %s@%d: %s",
                kind_of(record),
                record.topic_name,
                record.offset,
                error,
                extra=rate_limited(record.topic_name, error.code),
            )
            return
        claims = signed.claims
        if isinstance(claims, GrantWithdraw):
            user_id = subject_of(self._trust_domain, claims.iss, "user") or ""
            self.take_back(claims.grant_id, user_id, record.appended_at_ms)
        elif isinstance(claims, Grant) and record.key == claims.agent_id:
            self.keep(Signed(claims, signed.compact), record.partition, record.offset, record.appended_at_ms)
        self._forget(record.appended_at_ms)


def kind_of(record: Received) -> str | None:
    """Return `grant` or `grant.withdraw` if a record of `approval.response` claims to be one. Nothing is verified."""
    try:
        return _KINDS.get(parse(record.value).header.typ)
    except InvalidMessageError:
        return None


_KINDS = {typ_header(Grant): Grant.typ, typ_header(GrantWithdraw): GrantWithdraw.typ}
