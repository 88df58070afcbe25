"""Verification of audited records: signatures, command chains, replays; and a bounded memory of verified facts.

Each signature is verified once. A decision embeds the request that came before it, and a lease follows from both; so
verified messages are remembered by their exact text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from ringfence.audit.events.ocsf import VerifiedMessage, permission, privileges, scope_text, scrubbed, user_of
from ringfence.audit.memory import LeaseFacts, RequestFacts, SeenMessages, Sighting
from ringfence.audit.settings import AuditSettings
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import derived_id, digest, message_id
from ringfence.kernel.base.replay_memory import BoundedDict
from ringfence.kernel.base.text import with_article
from ringfence.kernel.crypto.claims import ExpiredError
from ringfence.kernel.crypto.jws import KeyFinder, UnverifiedJws, parse, verify
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.crypto.webauthn import VerificationKey
from ringfence.kernel.kafka.record import Received
from ringfence.messages.approval import ActionApproval, ActionRequest, Approval, BreakGlassReview, Grant
from ringfence.messages.base import Claims, ExpiringClaims, Message, ServiceRole
from ringfence.messages.codes import AnyCode, Code
from ringfence.messages.credential import CredentialDecision, CredentialRequest, RequestWithdraw
from ringfence.messages.lease import Lease, RevocationAck, RevocationRequest
from ringfence.messages.registry import AgentTransfer, AnyRecord, TaskAssign, TaskState
from ringfence.messages.run import Run
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.leases.lifecycle import statement
from ringfence.model.lifecycle import KeyOrigin, agents_of
from ringfence.model.records.command_chain import COMMAND_OF_TYP, SIGNED_COMMANDS, ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.records.instances import enrolment_of, keys_of_agents, ref_of
from ringfence.model.requests.approvals import append_time_of
from ringfence.model.requests.approver_keys import check_key_origin
from ringfence.model.requests.grants import id_of, signer_of
from ringfence.model.verdict import ALLOWED, Refused, Verdict, refused

C = TypeVar("C", bound=Claims)
P = TypeVar("P", bound=Message)

_REMEMBERED_BYTES, _REMEMBERED_PERMISSIONS = 16 * 1024, 16
"""Larger messages are not remembered, and are verified again wherever they are embedded."""
_REMEMBERED_EMBEDDED = 2000
_REMEMBERED = 20_000
"""Requests and leases, to name agent, task and people in later events."""
_ALL_ROLES: tuple[ServiceRole, ...] = get_args(ServiceRole)

_REVOCATION_FIELDS = (
    "revocation", "cause", "selector", "lease", "agent", "act", "delegators", "task", "sponsor", "on_behalf_of",
    "request", "request_digest", "policy_revision", "target",
)  # fmt: skip
"""Fields of a revocation's event that its acknowledgements share."""


def _content_mark(signed: VerifiedMessage[Any]) -> str:
    """A mark that distinguishes messages with one id: the signature, unless the message may be signed again."""
    match signed.claims:
        case Lease() as lease if lease.epoch is not None:
            return digest(statement(lease))  # a revoker repeats an end in a later epoch
        case RevocationAck() as ack:
            return ack.revocation_id  # a gateway acknowledges each copy of a revocation
        case RevocationRequest() as revocation if user_of(revocation.iss)["type"] == "System":
            # A revoker that does not know whether its revocation was written sends it again.
            return digest(revocation.model_dump_json(exclude={"iat"}))
        case _:
            return signed.compact[-43:]


class OutdatedError(InvalidMessageError):
    """The signature holds, but the message reached the broker outside its validity. `signed` is the message."""

    def __init__(self, signed: VerifiedMessage[Any], code: AnyCode) -> None:
        super().__init__("outside its time", code=code)
        self.signed = signed


def require_trust(trust: TrustStore, batch: Iterable[Received], now_ms: int) -> None:
    """Require a trust bundle in force for a batch. Without one no signature can be judged, so the batch waits.

    The broker's timestamps count as well: its clock may be ahead of `now_ms`. Raises UnavailableError.
    """
    trust.require(max(now_ms, *(record.appended_at_ms for record in batch)) / 1000)


class RecordVerifier:
    """Verifies records, finds replays, and remembers facts about requests, leases, grants and revocations.

    The memory is bounded by the setting `remembered_messages`, and by `_REMEMBERED` requests and leases.
    """

    def __init__(self, trust: TrustStore, directory: Directory, settings: AuditSettings) -> None:
        self._trust = trust
        self._directory = directory
        self._seen = SeenMessages(settings.remembered_messages)
        self._requests: BoundedDict[str, RequestFacts] = BoundedDict(_REMEMBERED)
        self._embedded: BoundedDict[str, CredentialRequest] = BoundedDict(_REMEMBERED_EMBEDDED)
        """By text: requests verified while embedded, whose own records may be read later."""
        self._leases: BoundedDict[str, LeaseFacts] = BoundedDict(_REMEMBERED)
        self._revocations: BoundedDict[str, Mapping[str, Any]] = BoundedDict(_REMEMBERED)
        self._approvals: BoundedDict[str, str] = BoundedDict(_REMEMBERED)
        self._grants: BoundedDict[str, dict[str, Any]] = BoundedDict(_REMEMBERED)
        self._revisions: dict[str, tuple[int, int, int]] = {}

    # --- signatures: each method raises InvalidMessageError or ChainError if verification fails ---

    def request(self, record: Received) -> VerifiedMessage[CredentialRequest]:
        jws = parse(record.value)
        find = self._agents(jws, CredentialRequest, record.appended_at_ms)
        return self._verify(record, jws, CredentialRequest, find, self._embedded.get(jws.compact))

    def request_withdrawal(self, record: Received) -> VerifiedMessage[RequestWithdraw]:
        jws = parse(record.value)
        find = self._agents(jws, RequestWithdraw, record.appended_at_ms)
        return self._verify(record, jws, RequestWithdraw, find)

    def by_service(self, record: Received, model: type[C], *roles: ServiceRole) -> VerifiedMessage[C]:
        """Verify a message signed by a service with one of these roles; with any role if none is given."""
        finder = self._trust.finder(*(roles or _ALL_ROLES), at_s=record.appended_at_ms / 1000)
        return self._verify(record, parse(record.value), model, finder)

    def by_user(self, record: Received, model: type[C]) -> VerifiedMessage[C]:
        """Verify a message signed by a person, with a key that was valid at the append time."""
        return self._verify(record, parse(record.value), model, self._users(record.appended_at_ms))

    def by_anyone(self, record: Received, model: type[C]) -> VerifiedMessage[C]:
        """Verify a message that agents, people, and the services in `model.signed_by` may sign."""
        at_ms, jws = record.appended_at_ms, parse(record.value)
        finders = (
            self._agents(jws, model, at_ms),
            self._users(at_ms),
            self._trust.finder(*model.signed_by, at_s=at_ms / 1000),
        )

        def find(iss: str, kid: str) -> VerificationKey | None:
            return next((key for finder in finders if (key := finder(iss, kid))), None)

        return self._verify(record, jws, model, find)

    def command(self, record: Received) -> tuple[VerifiedMessage[ExpiringClaims], str | None]:
        """Verify a registry command, signed by a person, a provisioner, the root or an agent.

        Returns it, and who validly signed the consent that it embeds, if anybody did.
        """
        at_ms = record.appended_at_ms
        jws = parse(record.value)
        model = SIGNED_COMMANDS.get(jws.header.typ)
        if model is None:
            raise InvalidMessageError("typ names no command", code=Code.TYP_UNEXPECTED)
        chains = self._directory.chains

        signed = self._verify(record, jws, model, lambda iss, kid: chains.signer_key(model, iss, kid, at_ms))
        consent_by: str | None = None
        claims = signed.claims
        if (isinstance(claims, TaskAssign) and (claims.consent or claims.id_token)) or (
            isinstance(claims, AgentTransfer) and claims.consent
        ):
            # Without a valid consent it still is its signer's command; the registry refuses it.
            with contextlib.suppress(InvalidMessageError, ChainError):
                consent_by = chains.authorise(jws, at_ms).consent_by
        return signed, consent_by

    def record(
        self, record: Received, model: type[AnyRecord]
    ) -> tuple[VerifiedMessage[AnyRecord], ExpiringClaims]:
        """Verify a record of the registry and its chain of commands. Returns it, and the last command of the chain."""
        jws = parse(record.value)
        find = self._trust.finder(*model.signed_by, at_s=record.appended_at_ms / 1000)
        signed: VerifiedMessage[AnyRecord] = self._verify(record, jws, model, find)
        claims = signed.claims
        if subject_of(self._trust.trust_domain, claims.sub, record.topic.what) is None:  # type: ignore[arg-type]
            raise InvalidMessageError("another kind of subject", code=Code.WRONG_SUBJECT)
        self._directory.chains.verify(claims)
        last = parse(claims.commands[-1].jws)
        return signed, last.unverified_claims(COMMAND_OF_TYP[last.header.typ])  # the chain verified it

    def parse_unsigned(self, record: Received, model: type[P]) -> P:
        """Parse an unsigned message. Its contents are unverified: anybody who can write to the topic can forge them."""
        try:
            return model.model_validate_json(record.value)
        except ValidationError as error:
            code = Code.NOT_JSON if error.errors()[0]["type"] == "json_invalid" else Code.CLAIMS_INVALID
            raise InvalidMessageError(f"not {with_article(model.__name__)}", code=code) from None

    def embedded_request(self, compact: str, request_id: str, appended_at_ms: int) -> RequestFacts | None:
        """Facts of a request embedded in another message, or None if its signature or its id does not match."""
        facts = self.facts(request_id)
        if facts is not None and facts.compact == compact:
            return facts
        try:
            jws = parse(compact)
            claims = verify(
                jws, CredentialRequest, self._agents(jws, CredentialRequest, appended_at_ms),
                audience=self._trust.trust_domain,
            ).claims  # fmt: skip
        except (InvalidMessageError, ChainError):
            return None
        if message_id(claims.iss, claims.jti) != request_id:
            return None
        if len(compact) <= _REMEMBERED_BYTES:
            self._embedded[compact] = claims
        return self.remember_request(compact, claims)

    def approver(self, compact: str, decision: CredentialDecision, record: Received) -> str | None:
        """The user who signed an approval that a decision embeds, or None if the signature fails.

        `record` is the decision's. A passkey's signature is judged by its own append time, as policy gives it.
        """
        user = self._approvals.get(digest(compact))
        if user is not None:
            return user
        try:
            at_ms = append_time_of(decision, compact) or record.appended_at_ms
            claims = verify(
                parse(compact), Approval, self._users(at_ms), audience=self._trust.trust_domain
            ).claims
        except (InvalidMessageError, ChainError):
            return None
        return self.remember_approval(compact, claims)

    def embedded_action_request(self, answer: ActionApproval, appended_at_ms: int) -> ActionRequest | None:
        """The gateway's action request embedded in an answer, or None if signature, digest or agent do not match."""
        find = self._trust.finder(*ActionRequest.signed_by, at_s=appended_at_ms / 1000)
        try:
            signed = verify(parse(answer.request), ActionRequest, find, audience=self._trust.trust_domain)
        except InvalidMessageError:
            return None
        claims = signed.claims
        same = (signed.digest, claims.agent_id) == (answer.request_digest, answer.agent_id)
        return claims if same else None

    def grantor(self, compact: str, decision: CredentialDecision, record: Received) -> str | None:
        """The user who signed a grant that a decision embeds, or None if the signature fails. See `approver`."""
        try:
            at_ms = append_time_of(decision, compact) or record.appended_at_ms
            find, audience = self._users(at_ms), self._trust.trust_domain
            claims = verify(parse(compact), Grant, find, audience=audience).claims
        except (InvalidMessageError, ChainError):
            return None
        return signer_of(claims)

    # --- replays ---

    def first_sighting(self, signed: VerifiedMessage[Any]) -> tuple[Sighting, bool] | None:
        """(first sighting, whether the content is identical) of a replayed message; None at its first sighting."""
        record = signed.record
        sighting = Sighting(record.partition, record.offset, _content_mark(signed))
        first = self._seen.first(record.topic.what, signed.claims.iss, signed.claims.jti, sighting)
        return None if first is None else (first, first.signature == sighting.signature)

    def newer_revision(self, signed: VerifiedMessage[AnyRecord]) -> int | None:
        """The higher revision that was published before this record, or None if there is none."""
        record, claims = signed.record, signed.claims
        last = self._revisions.get(claims.sub)
        if last is None or claims.revision >= last[0]:
            self._revisions[claims.sub] = (claims.revision, record.partition, record.offset)
            return None
        revision, partition, offset = last
        later = record.partition != partition or record.offset > offset
        return revision if later else None

    def run_of(self, run_id: str) -> Run | None:
        """The current state of the run with this id; None if no valid record of it exists."""
        return self._directory.runs.get(run_id)

    def run_counted(self, record: Received, claims: Run) -> bool | None:
        """Whether a verified record of a run took the run forward. None if the local table has not read it yet."""
        return self._directory.runs.counted(claims.run_id, record.partition, record.offset)

    # --- facts ---

    def facts(self, request_id: str) -> RequestFacts | None:
        """Facts of a verified request by id, with sponsor and user looked up again if they were missing."""
        facts = self._requests.get(request_id)
        if facts is not None and (facts.sponsor is None or facts.on_behalf_of is None):
            facts.sponsor = self.sponsor_of(facts.agent)
            facts.on_behalf_of = self._on_behalf_of(facts.agent, facts.task)
        return facts

    def lease(self, lease_id: str) -> LeaseFacts | None:
        return self._leases.get(lease_id)

    def remember_request(
        self, compact: str, claims: CredentialRequest, traceparent: str | None = None
    ) -> RequestFacts:
        """Remember the facts of a verified request. The first request with an id counts."""
        request_id = message_id(claims.iss, claims.jti)
        first = self.facts(request_id)
        if first is not None and first.compact == compact:
            return first
        agent = subject_of(self._trust.trust_domain, claims.iss, "agent") or ""
        enrolment = enrolment_of(claims)
        facts = RequestFacts(
            request_id=request_id,
            compact=compact,
            digest=digest(compact),
            signer=claims.iss,
            agent=agent,
            act=self._act(agent, claims.task_id),
            task=claims.task_id,
            target=claims.scope[0].target,
            permissions=[permission(one) for one in claims.scope],
            privileges=privileges(claims.scope),
            scope_text=scope_text(claims.scope),
            ttl_s=claims.ttl_s,
            delivery=claims.delivery,
            reason=scrubbed(claims.reason),
            sponsor=self.sponsor_of(agent),
            on_behalf_of=self._on_behalf_of(agent, claims.task_id),
            break_glass=claims.break_glass is True,
            instance=ref_of(enrolment).model_dump(exclude_none=True) if enrolment else None,
            traceparent=traceparent,
        )
        if first is None and len(compact) <= _REMEMBERED_BYTES:
            self._requests[request_id] = facts
        return facts

    def remember_approval(self, compact: str, claims: Approval) -> str | None:
        user = subject_of(self._trust.trust_domain, claims.iss, "user")
        if user is None or claims.verdict != "approved":
            return None
        self._approvals[digest(compact)] = user
        return user

    def remember_grant(self, claims: Grant) -> dict[str, Any]:
        """Remember and return the fields of a verified grant's subject."""
        fields = {
            "agent": claims.agent_id,
            "act": list(self._act(claims.agent_id, claims.task_id)),
            "task": claims.task_id,
            "sponsor": self.sponsor_of(claims.agent_id),
            "on_behalf_of": self._on_behalf_of(claims.agent_id, claims.task_id),
        }
        self._grants[id_of(claims)] = fields
        return fields

    def grant(self, grant_id: str) -> dict[str, Any]:
        """Event fields of a grant's subject; empty if the grant was not seen."""
        return self._grants.get(grant_id) or {}

    def remember_revocation(self, claims: RevocationRequest, fields: Mapping[str, Any]) -> None:
        shared_fields = {name: fields[name] for name in _REVOCATION_FIELDS if fields.get(name) is not None}
        self._revocations[derived_id("revocation", claims.iss, claims.jti)] = shared_fields

    def revocation(self, revocation_id: str) -> Mapping[str, Any]:
        """Event fields of a revocation; empty if it was not seen lately."""
        return self._revocations.get(revocation_id) or {}

    def remember_lease(self, claims: Lease) -> LeaseFacts:
        """Remember and return the facts of a verified lease record. They are the same in all records of a lease."""
        first = self._leases.get(claims.lease_id)
        if first is not None:
            return first
        lease = LeaseFacts(
            lease_id=claims.lease_id,
            request_id=claims.request_id,
            agent=claims.agent_id,
            act=claims.act,
            delegators=claims.delegators or (),
            sponsor=claims.sponsor,
            on_behalf_of=claims.on_behalf_of,
            task=claims.task_id,
            target=claims.target_id,
            privileges=privileges(claims.scope),
            permissions=[permission(one) for one in claims.scope],
            scope_text=scope_text(claims.scope),
            traceparent=claims.traceparent,
        )
        if len(claims.scope) <= _REMEMBERED_PERMISSIONS:
            self._leases[claims.lease_id] = lease
        return lease

    def sponsor_of(self, agent: str) -> str | None:
        try:
            entry = self._directory.agent(agent)
        except ChainError:
            return None
        return entry.state.sponsor if entry is not None else None

    def sponsors_of(self, agents: Sequence[str]) -> list[str]:
        return list(dict.fromkeys(filter(None, map(self.sponsor_of, agents))))

    def key_origin(self, user: str, kid: str) -> KeyOrigin | None:
        """The origin of a user's key, by the present records."""
        try:
            return self._directory.key_history(user).origins.get(kid)
        except ChainError:
            return None

    def with_key_fields(self, signed: VerifiedMessage[C], *embedded: str) -> VerifiedMessage[C]:
        """The message with the vouchers of its key, if somebody else added it to the person who signed."""
        user = subject_of(self._trust.trust_domain, signed.claims.iss, "user")
        origin = self.key_origin(user, signed.kid) if user else None
        fields: dict[str, Any] = {}
        if origin is not None and origin.vouchers:
            fields = {"vouched_by": sorted(origin.vouchers), "counts_from_ms": origin.counts_from_ms}
        return signed._replace(embedded=embedded, key_fields=fields)

    def check_review_key(self, signed: VerifiedMessage[BreakGlassReview], use: Mapping[str, Any]) -> Verdict:
        """Check that the key of a review counts for it (`model.requests.approver_keys`).

        1. A record says where the key comes from.
        2. It counts beside the people who took part in the use.
        3. No key by which the use was approved rests on the word of the reviewer.

        `use`: the `unmapped` fields of the use's event.
        """
        reviewer = subject_of(self._trust.trust_domain, signed.claims.iss, "user") or ""
        origin = self.key_origin(reviewer, signed.kid)
        if origin is None:
            return refused(Code.KEY_UNKNOWN, "no record says where this key comes from")
        named = (*(use.get("approvers") or ()), use.get("sponsor"), use.get("on_behalf_of"))
        verdict = check_key_origin(
            origin, reviewer, self._directory, [one for one in named if one], signed.record.appended_at_ms
        )
        if isinstance(verdict, Refused):
            return verdict
        for one in use.get("approver_keys") or ():
            lent = self.key_origin(str(one.get("user")), str(one.get("kid")))
            if lent is not None and reviewer in lent.vouchers:
                message = f"{one.get('user')} approved with a key that rests on the word of {reviewer}"
                return refused(Code.KEY_BESIDE_VOUCHER, f"{message}; somebody else reviews it")
        return ALLOWED

    def roles_of(self, user: str) -> tuple[str, ...]:
        """The present roles of a user; empty if there is no such user, or they are disabled."""
        try:
            entry = self._directory.user(user)
        except ChainError:
            return ()
        return entry.state.roles if entry is not None and entry.state.status == "active" else ()

    def task_of(self, task: str) -> TaskState | None:
        try:
            entry = self._directory.task(task)
        except ChainError:
            return None
        return entry.state if entry is not None else None

    def _on_behalf_of(self, agent: str, task: str) -> str | None:
        state = self._own_task(agent, task)
        return state.on_behalf_of if state is not None else None

    def _act(self, agent: str, task: str) -> tuple[str, ...]:
        """All acting agents of a request: the agent, and those that delegated the task to it."""
        state = self._own_task(agent, task)
        return agents_of(state) if state is not None else (agent,)

    def _own_task(self, agent: str, task: str) -> TaskState | None:
        """The task if it belongs to the agent: the user of another agent's task is not whom this agent acts for."""
        state = self.task_of(task)
        return state if state is not None and state.agent_id == agent else None

    # --- keys ---

    def _verify(
        self,
        record: Received,
        jws: UnverifiedJws,
        model: type[C],
        find: KeyFinder,
        verified: C | None = None,
    ) -> VerifiedMessage[C]:
        """Verify a JWS. `verified`: see `kernel.crypto.jws.verify`. Raises OutdatedError if only its time is wrong."""
        audience, at_ms = self._trust.trust_domain, record.appended_at_ms
        try:
            signed = verify(jws, model, find, audience=audience, appended_at_ms=at_ms, verified=verified)
        except ExpiredError as error:  # its signature was verified before its time was looked at
            late = verified or jws.unverified_claims(model)
            raise OutdatedError(
                VerifiedMessage(record, late, jws.compact, jws.header.kid), error.code
            ) from None
        return VerifiedMessage(record, signed.claims, jws.compact, jws.header.kid)

    def _agents(self, jws: UnverifiedJws, model: type[Claims], at_ms: int) -> KeyFinder:
        return keys_of_agents(self._directory, jws, model, at_ms / 1000)

    def _users(self, at_ms: int) -> KeyFinder:
        chains = self._directory.chains
        return lambda iss, kid: chains.user_key(iss, kid, at_ms)
