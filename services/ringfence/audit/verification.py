"""Who is believed to have said what: signatures, chains, replays, and the facts that later records are read with.

Each signature is verified once: a decision embeds the request that came before it, and a lease follows from both, so
what was verified is remembered by its exact text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar, get_args

from pydantic import ValidationError

from ringfence.audit.events.ocsf import in_words, permission, privileges, scrubbed, user_of
from ringfence.audit.memory import LeaseFacts, Recent, RequestFacts, SeenMessages, Sighting
from ringfence.audit.settings import AuditSettings
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import derived_id, digest, message_id
from ringfence.kernel.base.text import with_article
from ringfence.kernel.crypto.claims import ExpiredError
from ringfence.kernel.crypto.jws import KeyFinder, UnverifiedJws, parse, verify
from ringfence.kernel.crypto.keys import PublicKey
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.messages.approval import ActionApproval, ActionRequest, Approval, Grant
from ringfence.messages.base import Claims, ExpiringClaims, Message, ServiceRole
from ringfence.messages.credential import CredentialRequest
from ringfence.messages.lease import Lease, RevocationAck, RevocationRequest
from ringfence.messages.registry import AgentTransfer, AnyRecord, TaskAssign, TaskState
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.leases.lifecycle import statement
from ringfence.model.lifecycle import agents_of
from ringfence.model.records.command_chain import BY_AGENTS, COMMAND_OF_TYP, ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.records.instances import enrolment_of, keys_of_agents, ref_of
from ringfence.model.requests.grants import id_of, signer_of

C = TypeVar("C", bound=Claims)
P = TypeVar("P", bound=Message)

_REMEMBERED_BYTES, _REMEMBERED_PERMISSIONS = 16 * 1024, 16
"""What is larger is verified again where it is embedded: it must not fill the memory."""
_REMEMBERED_EMBEDDED = 2000
_ALL_ROLES: tuple[ServiceRole, ...] = get_args(ServiceRole)

_OF_ORDERS = (
    "revocation", "cause", "selector", "lease", "agent", "act", "delegators", "task", "sponsor", "on_behalf_of",
    "request", "request_digest", "policy_revision", "target",
)  # fmt: skip
"""What an event about an order says that is true of its confirmations too."""


def _mark(signed: VerifiedMessage[Any]) -> str:
    """What tells two messages of one id apart: the signature, but for what is the same though it was signed anew."""
    match signed.claims:
        case Lease() as lease if lease.epoch is not None:
            return digest(statement(lease))  # a revoker says an end again in a later epoch
        case RevocationAck() as ack:
            return ack.revocation_id  # a gateway confirms an order wherever it stands again
        case RevocationRequest() as order if user_of(order.iss)["type"] == "System":
            # A revoker that does not know whether it gave an order gives it again.
            return digest(order.model_dump_json(exclude={"iat"}))
        case _:
            return signed.compact[-43:]


class OutdatedError(InvalidMessageError):
    """The signature holds, but the message reached the broker outside its time."""

    def __init__(self, believed: VerifiedMessage[Any], code: str) -> None:
        super().__init__("outside its time", code=code)
        self.believed = believed


def require_trust(trust: TrustStore, batch: Iterable[Received], now_ms: int) -> None:
    """While no trust bundle is in force nobody is believed, and nothing is to be held against anybody: it waits.

    What the broker stamped is judged by its clock, which may be ahead of ours. Raises UnavailableError.
    """
    trust.require(max(now_ms, *(record.appended_at_ms for record in batch)) / 1000)


class VerifiedMessage(NamedTuple, Generic[C]):
    """A verified message: its claims, the exact text, and the key that signed it."""

    claims: C
    compact: str
    kid: str

    def verified(self, *embedded: str) -> dict[str, Any]:
        """`unmapped.verified`: whose signature holds, by which key, and what embedded messages were verified too."""
        said: dict[str, Any] = {"by": self.claims.iss, "kid": self.kid}
        if embedded:
            said["embedded"] = list(embedded)
        return said


class MessageVerifier:
    """Turns records into verified messages, and remembers what they say about requests and leases."""

    def __init__(self, trust: TrustStore, directory: Directory, settings: AuditSettings) -> None:
        self._trust = trust
        self._directory = directory
        self._seen = SeenMessages(settings.remembered_messages)
        self._requests: Recent[str, RequestFacts] = Recent(settings.remembered_requests)
        self._embedded: Recent[str, CredentialRequest] = Recent(_REMEMBERED_EMBEDDED)
        """By their text: requests that were verified where they are embedded, and that may be read themselves later."""
        self._leases: Recent[str, LeaseFacts] = Recent(settings.remembered_requests)
        self._orders: Recent[str, Mapping[str, Any]] = Recent(settings.remembered_requests)
        self._approvals: Recent[str, str] = Recent(settings.remembered_requests)
        self._grants: Recent[str, dict[str, Any]] = Recent(settings.remembered_requests)
        self._revisions: dict[str, tuple[int, int, int]] = {}

    # --- signatures: each raises InvalidMessageError, or ChainError, where nobody is believed ---

    def request(self, record: Received) -> VerifiedMessage[CredentialRequest]:
        """A request, signed by an agent."""
        at_ms, jws = record.appended_at_ms, parse(record.value)
        find = self._agents(jws, CredentialRequest, at_ms)
        return self._open(jws, CredentialRequest, find, at_ms, self._embedded.get(jws.compact))

    def by_service(self, record: Received, model: type[C], *roles: ServiceRole) -> VerifiedMessage[C]:
        """A message that services of these roles sign; of any role where none is named."""
        at_ms = record.appended_at_ms
        finder = self._trust.finder(*(roles or _ALL_ROLES), at_s=at_ms / 1000)
        return self._open(parse(record.value), model, finder, at_ms)

    def by_user(self, record: Received, model: type[C]) -> VerifiedMessage[C]:
        """A message that a person signs, with a key that counted when it was appended."""
        at_ms = record.appended_at_ms
        return self._open(parse(record.value), model, self._users(at_ms), at_ms)

    def by_anyone(self, record: Received, model: type[C]) -> VerifiedMessage[C]:
        """A message that agents, people and the services that revoke may sign."""
        at_ms, jws = record.appended_at_ms, parse(record.value)
        finders = (
            self._agents(jws, model, at_ms),
            self._users(at_ms),
            self._trust.finder(*model.signed_by, at_s=at_ms / 1000),
        )

        def find(iss: str, kid: str) -> PublicKey | None:
            return next((key for finder in finders if (key := finder(iss, kid))), None)

        return self._open(jws, model, find, at_ms)

    def command(self, record: Received) -> tuple[VerifiedMessage[ExpiringClaims], str | None]:
        """A command by whoever may give such: a person, a provisioner, the root, an agent. And who validly signed the
        consent that it embeds.
        """
        at_ms = record.appended_at_ms
        jws = parse(record.value)
        model = COMMAND_OF_TYP.get(jws.header.typ)
        if model is None:
            raise InvalidMessageError("typ names no command", code="typ_unexpected")
        chains = self._directory.chains

        def find(iss: str, kid: str) -> PublicKey | None:
            key = self._trust.root_key(iss, kid, at_ms / 1000) or chains.command_key(iss, kid, at_ms)
            return key or (chains.agent_key(iss, kid, at_ms) if model in BY_AGENTS else None)

        signed = self._open(jws, model, find, at_ms)
        consent_by: str | None = None
        claims = signed.claims
        if (isinstance(claims, TaskAssign) and (claims.consent or claims.id_token)) or (
            isinstance(claims, AgentTransfer) and claims.consent
        ):
            # Without a consent that holds it is its signer's command all the same; the registry refuses it.
            with contextlib.suppress(InvalidMessageError, ChainError):
                consent_by = chains.authorise(jws, at_ms).consent_by
        return signed, consent_by

    def record(
        self, record: Received, model: type[AnyRecord]
    ) -> tuple[VerifiedMessage[AnyRecord], ExpiringClaims]:
        """A record by the registry whose chain holds, and the command that it came from."""
        jws = parse(record.value)
        at_ms = record.appended_at_ms
        signed: VerifiedMessage[AnyRecord] = self._open(
            jws, model, self._trust.finder(*model.signed_by, at_s=at_ms / 1000), at_ms
        )
        claims = signed.claims
        if subject_of(self._trust.trust_domain, claims.sub, record.topic.what) is None:  # type: ignore[arg-type]
            raise InvalidMessageError("another kind of subject", code="wrong_subject")
        self._directory.chains.verify(claims)
        last = parse(claims.commands[-1].jws)
        return signed, last.unverified_claims(COMMAND_OF_TYP[last.header.typ])  # the chain verified it

    def plain(self, record: Received, model: type[P]) -> P:
        """A message that nobody signs. Nothing that it says is more than its writer's word."""
        try:
            return model.model_validate_json(record.value)
        except ValidationError as error:
            code = "not_json" if error.errors()[0]["type"] == "json_invalid" else "claims_invalid"
            raise InvalidMessageError(f"not {with_article(model.__name__)}", code=code) from None

    def embedded_request(self, compact: str, request_id: str, appended_at_ms: int) -> RequestFacts | None:
        """The facts of a request that another message embeds, or None where its signature does not hold."""
        known = self.facts(request_id)
        if known is not None and known.compact == compact:
            return known
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
            self._embedded.put(compact, claims)
        return self.remember_request(VerifiedMessage(claims, compact, jws.header.kid))

    def approver(self, compact: str, appended_at_ms: int) -> str | None:
        """The person who signed an embedded approval, or None where the signature does not hold."""
        known = self._approvals.get(digest(compact))
        if known is not None:
            return known
        try:
            claims = verify(
                parse(compact), Approval, self._users(appended_at_ms), audience=self._trust.trust_domain
            ).claims
        except (InvalidMessageError, ChainError):
            return None
        return self.remember_approval(compact, claims)

    def embedded_question(self, answer: ActionApproval, appended_at_ms: int) -> ActionRequest | None:
        """What a gateway asked that an answer is over, or None where no gateway signed it, or it is over another."""
        find = self._trust.finder(*ActionRequest.signed_by, at_s=appended_at_ms / 1000)
        try:
            signed = verify(parse(answer.request), ActionRequest, find, audience=self._trust.trust_domain)
        except InvalidMessageError:
            return None
        claims = signed.claims
        same = (signed.digest, claims.agent_id) == (answer.request_digest, answer.agent_id)
        return claims if same else None

    def grantor(self, compact: str, appended_at_ms: int) -> str | None:
        """The person who signed an embedded grant, or None where the signature does not hold."""
        try:
            find, audience = self._users(appended_at_ms), self._trust.trust_domain
            claims = verify(parse(compact), Grant, find, audience=audience).claims
        except (InvalidMessageError, ChainError):
            return None
        return signer_of(claims)

    # --- replays ---

    def seen_before(self, record: Received, signed: VerifiedMessage[Any]) -> tuple[Sighting, bool] | None:
        """Where the same message was seen first, and whether it is the same to the letter; None the first time."""
        here = Sighting(record.partition, record.offset, _mark(signed))
        first = self._seen.first(record.topic.what, signed.claims.iss, signed.claims.jti, here)
        return None if first is None else (first, first.signature == here.signature)

    def fell_below(self, record: Received, claims: AnyRecord) -> int | None:
        """The higher revision that was seen before this record, or None where it is as high."""
        known = self._revisions.get(claims.sub)
        if known is None or claims.revision >= known[0]:
            self._revisions[claims.sub] = (claims.revision, record.partition, record.offset)
            return None
        revision, partition, offset = known
        later = record.partition != partition or record.offset > offset
        return revision if later else None

    # --- facts ---

    def facts(self, request_id: str) -> RequestFacts | None:
        """What is known of a request."""
        facts = self._requests.get(request_id)
        if facts is not None and (facts.sponsor is None or facts.on_behalf_of is None):
            facts.sponsor = self.sponsor_of(facts.agent)
            facts.on_behalf_of = self._on_behalf_of(facts.agent, facts.task)
        return facts

    def lease(self, lease_id: str) -> LeaseFacts | None:
        """What is known of a lease."""
        return self._leases.get(lease_id)

    def remember_request(
        self, signed: VerifiedMessage[CredentialRequest], traceparent: str | None = None
    ) -> RequestFacts:
        """Take down what a verified request is about. The first request with an id stands."""
        claims = signed.claims
        request_id = message_id(claims.iss, claims.jti)
        known = self.facts(request_id)
        if known is not None and known.compact == signed.compact:
            return known
        agent = subject_of(self._trust.trust_domain, claims.iss, "agent") or ""
        enrolment = enrolment_of(claims)
        facts = RequestFacts(
            request_id=request_id,
            compact=signed.compact,
            digest=digest(signed.compact),
            signer=claims.iss,
            agent=agent,
            act=self._act(agent, claims.task_id),
            task=claims.task_id,
            target=claims.scope[0].target,
            permissions=[permission(one) for one in claims.scope],
            privileges=privileges(claims.scope),
            words=in_words(claims.scope),
            ttl_s=claims.ttl_s,
            delivery=claims.delivery,
            reason=scrubbed(claims.reason),
            sponsor=self.sponsor_of(agent),
            on_behalf_of=self._on_behalf_of(agent, claims.task_id),
            break_glass=claims.break_glass is True,
            instance=ref_of(enrolment).model_dump() if enrolment else None,
            traceparent=traceparent,
        )
        if known is None and len(signed.compact) <= _REMEMBERED_BYTES:
            self._requests.put(request_id, facts)
        return facts

    def remember_approval(self, compact: str, claims: Approval) -> str | None:
        """Take down who signed a verified approval, if it is a yes."""
        user = subject_of(self._trust.trust_domain, claims.iss, "user")
        if user is None or claims.verdict != "approved":
            return None
        self._approvals.put(digest(compact), user)
        return user

    def remember_grant(self, claims: Grant) -> dict[str, Any]:
        """Take down whom a verified grant is about; in the words of events."""
        words = {
            "agent": claims.agent_id,
            "act": list(self._act(claims.agent_id, claims.task_id)),
            "task": claims.task_id,
            "sponsor": self.sponsor_of(claims.agent_id),
            "on_behalf_of": self._on_behalf_of(claims.agent_id, claims.task_id),
        }
        self._grants.put(id_of(claims), words)
        return words

    def grant(self, grant_id: str) -> dict[str, Any]:
        """What is known of a grant, in the words of events; nothing where it was not seen."""
        return self._grants.get(grant_id) or {}

    def remember_order(self, claims: RevocationRequest, words: Mapping[str, Any]) -> None:
        """Take down what a verified order is about, for the word of gateways that it is followed."""
        about = {word: words[word] for word in _OF_ORDERS if words.get(word) is not None}
        self._orders.put(derived_id("revocation", claims.iss, claims.jti), about)

    def order(self, revocation_id: str) -> Mapping[str, Any]:
        """What is known of an order; nothing where it was not seen lately."""
        return self._orders.get(revocation_id) or {}

    def remember_lease(self, claims: Lease) -> LeaseFacts:
        """Take down what a verified lease record says. What a lease is about is the same in all of its records."""
        known = self._leases.get(claims.lease_id)
        if known is not None:
            return known
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
            words=in_words(claims.scope),
            traceparent=claims.traceparent,
        )
        if len(claims.scope) <= _REMEMBERED_PERMISSIONS:
            self._leases.put(claims.lease_id, lease)
        return lease

    def sponsor_of(self, agent: str) -> str | None:
        """The sponsor of an agent by the present records."""
        try:
            entry = self._directory.agent(agent)
        except ChainError:
            return None
        return entry.state.sponsor if entry is not None else None

    def sponsors_of(self, agents: Sequence[str]) -> list[str]:
        """The sponsors of agents by the present records, each once."""
        return list(dict.fromkeys(filter(None, map(self.sponsor_of, agents))))

    def roles_of(self, user: str) -> tuple[str, ...]:
        """The roles of a user by the present records; none where there is no such user, or they are disabled."""
        try:
            entry = self._directory.user(user)
        except ChainError:
            return ()
        return entry.state.roles if entry is not None and entry.state.status == "active" else ()

    def task_of(self, task: str) -> TaskState | None:
        """A task by the present records."""
        try:
            entry = self._directory.task(task)
        except ChainError:
            return None
        return entry.state if entry is not None else None

    def _on_behalf_of(self, agent: str, task: str) -> str | None:
        """Whom an agent acts for in a task."""
        state = self._own_task(agent, task)
        return state.on_behalf_of if state is not None else None

    def _act(self, agent: str, task: str) -> tuple[str, ...]:
        """The agents that act where an agent asks for something in a task."""
        state = self._own_task(agent, task)
        return agents_of(state) if state is not None else (agent,)

    def _own_task(self, agent: str, task: str) -> TaskState | None:
        """The task, where it is the agent's: whoever assigned one to another agent is not who this one acts for."""
        state = self.task_of(task)
        return state if state is not None and state.agent_id == agent else None

    # --- keys ---

    def _open(
        self, jws: UnverifiedJws, model: type[C], find: KeyFinder, at_ms: int, verified: C | None = None
    ) -> VerifiedMessage[C]:
        """`verified`: see `verify`."""
        audience = self._trust.trust_domain
        try:
            claims = verify(
                jws, model, find, audience=audience, appended_at_ms=at_ms, verified=verified
            ).claims
        except ExpiredError as error:  # it was verified before its time was looked at
            late = verify(jws, model, find, audience=audience, verified=verified).claims
            raise OutdatedError(VerifiedMessage(late, jws.compact, jws.header.kid), error.code) from None
        return VerifiedMessage(claims, jws.compact, jws.header.kid)

    def _agents(self, jws: UnverifiedJws, model: type[Claims], at_ms: int) -> KeyFinder:
        return keys_of_agents(self._directory, jws, model, at_ms / 1000)

    def _users(self, at_ms: int) -> KeyFinder:
        chains = self._directory.chains
        return lambda iss, kid: chains.user_key(iss, kid, at_ms)
