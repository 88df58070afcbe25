"""An organisation without a broker: real keys and signatures, and the local table fed by hand.

olga is an operator (by the root), sam sponsors deploy-bot, maria gave it a task. For tests of audit.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, get_args

import orjson

from ringfence.audit.records import AuditHandlers
from ringfence.audit.settings import AuditSettings
from ringfence.audit.trail.handover import Intake, PendingEvent
from ringfence.audit.verification import RecordVerifier
from ringfence.kernel.base.clock import Clock, SystemClock
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import derived_id, digest, lease_id, message_id
from ringfence.kernel.crypto.jwe import ReplyKey, seal
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.messages.approval import ActionRequest, Approval, ApprovalRequest
from ringfence.messages.base import Claims, ExpiringClaims, Message, Permission, ServiceRole, Topic
from ringfence.messages.credential import (
    Coordinates,
    CredentialDecision,
    CredentialRequest,
    Reason,
    Revisions,
)
from ringfence.messages.lease import EndCause, Lease, LeaseEpoch, RevocationRequest
from ringfence.messages.operations import (
    ActionAnswered,
    ActionDecided,
    DeadLetter,
    Destination,
    EventKind,
    RelayEnded,
    ServiceEvent,
)
from ringfence.messages.registry import (
    AgentRecord,
    AgentRegister,
    AgentRenewKey,
    AgentReportReuse,
    AgentState,
    AgentTransfer,
    AgentTransferConsent,
    AnyRecord,
    AnyState,
    BackendSettings,
    Delegation,
    EmbeddedCommand,
    Entitlements,
    GroupDelegation,
    Role,
    TargetRecord,
    TargetSet,
    TaskAssign,
    TaskDelegate,
    TaskRecord,
    TaskState,
    TaskTerms,
    UserAddKey,
    UserRecord,
    UserSet,
    VerbFloor,
)
from ringfence.messages.topics import (
    ACTION,
    AGENT,
    APPROVAL_REQUEST,
    APPROVAL_RESPONSE,
    CREDENTIAL_DECISION,
    CREDENTIAL_REPLY,
    CREDENTIAL_REQUEST,
    DEAD_LETTER,
    LEASE,
    REVOCATION_REQUEST,
    SERVICE_EVENT,
    TARGET,
    TASK,
    TRUST,
    USER,
)
from ringfence.messages.trust import ServiceIdentity, TrustBundle
from ringfence.model.leases.epochs import marker_key
from ringfence.model.lifecycle import NO_HISTORY, Actor, Context, apply
from ringfence.model.records.directory import Directory
from ringfence.model.verdict import ALLOWED

TD = "acme.example"
PREFIX = "ringfence"
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
TRACE_ID = TRACE.split("-")[1]
BUNDLE = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
C = TypeVar("C", bound=Claims)

_RECORDS: dict[Topic[Any], type[AnyRecord]] = {
    USER: UserRecord,
    AGENT: AgentRecord,
    TARGET: TargetRecord,
    TASK: TaskRecord,
}


class KeptEvents(Intake):
    """Keeps what is handed over to be chained."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.ids: list[str] = []
        self.fail_next = 0

    async def hand_over(self, events: Iterable[PendingEvent]) -> None:
        if self.fail_next:
            self.fail_next -= 1
            raise OSError("the broker went away")
        for told in events:
            self.events.append(orjson.loads(told.body))
            assert told.event == self.events[-1], "what is not parsed again must be what would be parsed"
            self.keys.append(told.key)
            self.ids.append(told.uid)


class AuditFixtures:
    """See the module."""

    def __init__(self, clock: Clock | None = None, **settings: Any) -> None:
        self.now_ms = int(time.time()) * 1000
        self._offsets: dict[str, int] = {}
        self.root = SigningKey.generate(f"spiffe://{TD}/root")
        self.keys: dict[str, SigningKey] = {}
        self.trust = TrustStore(TD, self.root.kid)
        services = tuple(
            ServiceIdentity(
                id=self.key("service", role).id,
                roles=(role,),
                keys=(self.key("service", role).record(self.now_ms // 1000 + 86_400),),
            )
            for role in get_args(ServiceRole)
        )
        head = {**self._head(self.root), "exp": self.now_ms // 1000 + 7 * 86_400}
        bundle = TrustBundle(**head, version=1, services=services)
        self.bundle = bundle
        self.trust.load(sign(bundle, self.root, header_jwk=True), self.now_ms / 1000)
        self.directory = Directory(self.trust, SystemClock(), grace_ms=None)
        self.own = AuditSettings(**{"settle_ms": 0, **settings})
        self.published = KeptEvents()
        self.uses: dict[str, dict[str, Any]] = {}
        self.buried: list[tuple[str, str]] = []
        self._clock = clock or SystemClock()
        self.restart()
        self.states: dict[tuple[Topic[Any], str], tuple[int, AnyState, tuple[EmbeddedCommand, ...]]] = {}
        self.scope = (Permission(target="staging", verbs=("deploy",), resources=("env/staging/*",)),)
        self.task = ""

    def restart(self) -> None:
        """Audit starts anew: what it remembered of earlier records is lost."""
        self.verifier = RecordVerifier(self.trust, self.directory, self.own)
        self.handlers = AuditHandlers(
            self.published,
            self.verifier,
            self._clock,
            self.trust,
            self.uses.get,
            send_dead_letter=self.bury,
            settle_ms=self.own.settle_ms,
        )
        self.directory.on_change(self.handlers.on_change)

    async def bury(self, record: Received, error: InvalidMessageError) -> None:
        """Keeps what audit sent to the dead letters."""
        self.buried.append((record.topic.what, error.code))

    # --- keys and claims ---

    def key(self, kind: str, name: str) -> SigningKey:
        """The key of `spiffe://<td>/<kind>/<name>`; made when first asked for."""
        id = f"spiffe://{TD}/{kind}/{name}"
        if id not in self.keys:
            self.keys[id] = SigningKey.generate(id)
        return self.keys[id]

    def _head(self, by: SigningKey, *, expires: bool = False) -> dict[str, Any]:
        now_s = self.now_ms // 1000
        head: dict[str, Any] = {"iss": by.id, "aud": TD, "iat": now_s, "jti": str(uuid.uuid4())}
        return {**head, "exp": now_s + 300} if expires else head

    def claims(self, model: type[C], by: SigningKey, **fields: Any) -> C:
        """Claims of a model with a fresh head."""
        return model(**{**self._head(by, expires=issubclass(model, ExpiringClaims)), **fields})

    def transfer_consent(self, sponsor: str, agent_id: str = "deploy-bot") -> str:
        """The consent of a new sponsor to take an agent over as it is now."""
        revision, state, _ = self.states[AGENT, agent_id]
        by = self.key("user", sponsor)
        assert isinstance(state, AgentState)
        return sign(
            self.claims(
                AgentTransferConsent, by, agent_id=agent_id, from_sponsor=state.sponsor, revision=revision
            ),
            by,
        )

    # --- records ---

    def received(
        self,
        topic: Topic[Any],
        value: str | bytes | Message,
        *,
        key: str | None = None,
        offset: int | None = None,
        partition: int = 0,
        trace: str | None = TRACE,
    ) -> Received:
        """A record as it would arrive, a millisecond after the one before."""
        self.now_ms += 1
        if offset is None:
            offset = self._offsets.get(topic.what, 0)
        self._offsets[topic.what] = max(self._offsets.get(topic.what, 0), offset + 1)
        if isinstance(value, Message):
            value = value.model_dump_json(exclude_none=True)
        return Received(
            topic,
            topic.name(PREFIX),
            partition,
            offset,
            self.now_ms,
            key,
            value.encode() if isinstance(value, str) else value,
            [("traceparent", trace.encode())] if trace else [],
        )

    def signed(self, topic: Topic[Any], claims: Claims, by: SigningKey, **more: Any) -> Received:
        """A record with these claims, signed."""
        return self.received(topic, sign(claims, by), **more)

    def epoch(self, epoch: str) -> Received:
        """A marker of a rebuild of Redis."""
        by = self.key("service", "revoker")
        return self.signed(
            LEASE, self.claims(LeaseEpoch, by, epoch=epoch, partition=0), by, key=marker_key(epoch)
        )

    def trust_bundle(self, version: int, by: SigningKey | None = None, **fields: Any) -> Received:
        """A trust bundle on its topic, signed by the root (or by whoever is named)."""
        bundle = self.bundle.model_copy(update={"version": version, "jti": f"bundle-{version}", **fields})
        return self.received(TRUST, sign(bundle, by or self.root, header_jwk=True), key=str(version))

    async def audit(self, *records: Received) -> list[dict[str, Any]]:
        """The events that audit makes of records, in order."""
        before = len(self.published.events)
        for record in records:
            await self.handlers.handle_batch([record])
        return self.published.events[before:]

    async def event(self, record: Received) -> dict[str, Any]:
        """The one event that audit makes of a record."""
        (event,) = await self.audit(record)
        return event

    # --- the registry's part ---

    def carry_out(self, topic: Topic[Any], id: str, claims: ExpiringClaims, by: SigningKey) -> Received:
        """Fold a command into its subject as a registry would, admit the record, and return it."""
        self.now_ms += 1000
        revision, state, commands = self.states.get((topic, id), (0, None, ()))
        name = by.id.rpartition("/")[2]
        chains, everything = self.directory.chains, frozenset[Role]({"operator", "sponsor"})
        agent = chains.agent_at(name, self.now_ms) if "/agent/" in by.id else None
        person = None if by is self.root or agent is not None else name
        jws = sign(claims, by)
        given = (
            chains.authorise(parse(jws), self.now_ms)
            if isinstance(claims, UserAddKey | AgentTransfer)
            else None
        )
        context = Context(
            actor=Actor(person, frozenset() if agent is not None else everything, agent=agent, kid=by.kid),
            at_ms=self.now_ms,
            command_digest=digest(jws),
            task_at=lambda task_id: chains.task_at(task_id, self.now_ms),
            at_s=self.now_ms // 1000,
            command_id=message_id(claims.iss, claims.jti),
            roles_of=lambda user: frozenset({"operator", "sponsor"}),
            key_history=self.directory.key_history(id) if topic is USER else NO_HISTORY,
            transfer_consent=given.consent.transfer if given and given.consent else None,
            key_proof=given.key_proof if given else None,
            key_proof_problem=given.key_proof_problem if given else None,
        )
        if isinstance(claims, AgentRenewKey | AgentReportReuse):
            state = chains.agent_after(id, jws, self.now_ms)
            assert state is not None
        else:
            state = apply(state, claims, context)  # type: ignore[arg-type]
        commands = (*commands, EmbeddedCommand(jws=jws, appended_at_ms=self.now_ms))
        self.states[topic, id] = (revision + 1, state, commands)
        record = self.record_of(topic, id)
        verdict = self.directory.admit(topic.what, record.topic_name, 0, record.value, record.appended_at_ms)  # type: ignore[arg-type]
        assert verdict == ALLOWED, verdict
        return record

    def record_of(self, topic: Topic[Any], id: str, by: SigningKey | None = None, **fields: Any) -> Received:
        """The present record of a subject, signed by the registry (or by whoever is named)."""
        revision, state, commands = self.states[topic, id]
        model: type[AnyRecord] = _RECORDS[topic]
        claims = self.claims(
            model,
            self.key("service", "registry"),
            **{
                "sub": f"spiffe://{TD}/{topic.what}/{id}",
                "revision": revision,
                "commands": commands,
                "state": state,
                "jti": derived_id(topic.what, id, revision),
                **fields,
            },
        )
        return self.signed(topic, claims, by or self.key("service", "registry"), key=id)

    def user(self, name: str, *roles: str, by: SigningKey | None = None, **fields: Any) -> Received:
        """Set a user."""
        by = by or self.key("user", "olga")
        claims = self.claims(
            UserSet,
            by,
            **{
                "user_id": name,
                "name": name.title(),
                "roles": roles,
                "keys": (self.key("user", name).record(self.now_ms // 1000 + 86_400),),
                "entitlements": Entitlements(scope=self.scope, source="test", as_of=self.now_ms // 1000),
                **fields,
            },
        )
        return self.carry_out(USER, name, claims, by)

    def staff(self) -> list[Received]:
        """olga, sam, maria, deploy-bot, staging, and a task: all records, in order."""
        olga = self.key("user", "olga")
        records = [
            self.user("olga", "operator", by=self.root),
            self.user("sam", "sponsor"),
            self.user("maria"),
        ]
        target = self.claims(
            TargetSet,
            olga,
            target_id="staging",
            description="the staging platform",
            backend=BackendSettings(kind="jwt", audience="https://staging.acme.example"),
            verbs=(VerbFloor(verb="read"), VerbFloor(verb="deploy", floor="sponsor")),
        )
        records.append(self.carry_out(TARGET, "staging", target, olga))
        records.append(self.agent("deploy-bot"))
        self.task, assigned = self.assign()
        records.append(assigned)
        return records

    def agent(self, name: str, sponsor: str = "sam") -> Received:
        """Register an agent."""
        by = self.key("user", sponsor)
        key = self.key("agent", name).record(self.now_ms // 1000 + 86_400)
        claims = self.claims(
            AgentRegister, by, agent_id=name, sponsor=sponsor, description="deploys", keys=(key,), ceiling=self.scope
        )  # fmt: skip
        return self.carry_out(AGENT, name, claims, by)

    def assign(
        self, agent: str = "deploy-bot", by: str = "maria", purpose: str = "deploy the staging build"
    ) -> tuple[str, Received]:
        """Assign a task: its id and record."""
        key = self.key("user", by)
        terms = TaskTerms(
            agent_id=agent,
            purpose=purpose,
            scope=self.scope,
            not_after=self.now_ms // 1000 + 3600,
        )
        claims = self.claims(TaskAssign, key, terms=terms, on_behalf_of=by)
        id = message_id(claims.iss, claims.jti)
        return id, self.carry_out(TASK, id, claims, key)

    def hand_on(self, to: str = "migrate-bot", sponsor: str = "sam") -> tuple[str, Received]:
        """deploy-bot hands on a part of its task to another agent, a new one: its id and record."""
        self.agent(to, sponsor)
        bot = self.key("agent", "deploy-bot")
        terms = TaskTerms(
            agent_id=to, purpose="migrate it first", scope=self.scope, not_after=self.now_ms // 1000 + 600
        )
        claims = self.claims(TaskDelegate, bot, parent=self.task, terms=terms)
        id = message_id(claims.iss, claims.jti)
        return id, self.carry_out(TASK, id, claims, bot)

    # --- one credential, message by message ---

    def request(self, **fields: Any) -> CredentialRequest:
        """deploy-bot asks to deploy to staging."""
        bot = self.key("agent", "deploy-bot")
        return self.claims(CredentialRequest, bot, **{
            "task_id": self.task, "scope": self.scope, "ttl_s": 300, "delivery": "agent", "reason": "deploy build 421",
            "reply_key": REPLY_KEY.public, **fields,
        })  # fmt: skip

    def credential(self, end: str = "released", *, approved: bool = True, **fields: Any) -> Story:
        """All records of one credential from the request to its end, with their claims by name."""
        return Story(self, end, approved, **fields)

    def delegation(self) -> Delegation:
        """What an operator lets a directory give."""
        return Delegation(
            source="scim", groups=(GroupDelegation(group="Leads", roles=("sponsor",), scope=self.scope),)
        )

    def service_event(
        self, kind: EventKind, subject: str, role: ServiceRole = "registry", **fields: Any
    ) -> Received:
        """What a service says about itself."""
        key = self.key("service", role)
        claims = self.claims(ServiceEvent, key, kind=kind, subject=subject, at_ms=self.now_ms, **fields)
        return self.signed(SERVICE_EVENT, claims, key, key=role)

    def action(self, **fields: Any) -> Received:
        """What a gateway decided on one request of the agent."""
        given: dict[str, Any] = {
            "action_id": str(uuid.uuid4()), "gateway": "spiffe://acme.example/service/gateway",
            "agent_id": "deploy-bot", "task_id": self.task, "target_id": "staging", "verb": "deploy",
            "resource": "env/staging/web", "allowed": True, "access": "write", "method": "PUT",
            "request_digest": "ab" * 32, "latency_us": 180,
            "at_ms": self.now_ms,
        }  # fmt: skip
        claims = ActionDecided(**{**given, **fields})
        return self.received(ACTION, claims.model_dump_json(exclude_none=True).encode(), key="deploy-bot")

    def answer(self, **fields: Any) -> Received:
        """What came of a request of the agent at an endpoint of MCP."""
        given: dict[str, Any] = {
            "action_id": str(uuid.uuid4()), "agent_id": "deploy-bot", "task_id": self.task, "target_id": "staging",
            "verb": "deploy", "resource": "env/staging/web", "answer": "result", "http_status": 200,
            "at_ms": self.now_ms,
        }  # fmt: skip
        claims = ActionAnswered(**{**given, **fields})
        return self.received(ACTION, claims.model_dump_json(exclude_none=True).encode(), key="deploy-bot")

    def relay_end(self, lease_id: str, **fields: Any) -> Received:
        """The end of a relay of a run."""
        given: dict[str, Any] = {
            "action_id": str(uuid.uuid4()), "gateway": "spiffe://acme.example/service/gateway",
            "agent_id": "deploy-bot", "task_id": self.task, "run_id": str(uuid.uuid4()), "lease_id": lease_id,
            "target_id": "staging", "destination": Destination(host="db.example", port=5432), "sent_bytes": 120,
            "received_bytes": 4096, "duration_ms": 1500, "at_ms": self.now_ms,
        }  # fmt: skip
        claims = RelayEnded(**{**given, **fields})
        return self.received(ACTION, claims.model_dump_json(exclude_none=True).encode(), key="deploy-bot")

    def question(self, lease_id: str, **fields: Any) -> ActionRequest:
        """What a gateway asks about one action of the agent."""
        given: dict[str, Any] = {
            "action_id": str(uuid.uuid4()), "agent_id": "deploy-bot", "task_id": self.task, "lease_id": lease_id,
            "target_id": "staging", "verb": "deploy", "resource": "env/staging/web", "method": "PUT",
            "url": "https://staging.example/env/web?token=in-the-url", "body_digest": "ab" * 32, "body_bytes": 7,
            "headers_digest": "cd" * 32, "headers": (), "required": "sponsor",
            "revisions": Revisions(agent=1, user=1, task=1, target=1, policy=BUNDLE),
        }  # fmt: skip
        return self.claims(ActionRequest, self.key("service", "gateway"), **{**given, **fields})

    def dead_letter(self, **fields: Any) -> Received:
        """A dead letter of policy."""
        letter = DeadLetter(**{
            "source": self.coordinates(CREDENTIAL_REQUEST), "service": "policy", "code": "not_a_jws",
            "reason": "not a JWS in compact serialisation", "at_ms": self.now_ms, **fields,
        })  # fmt: skip
        return self.received(DEAD_LETTER, letter)

    def coordinates(self, topic: Topic[Any]) -> Coordinates:
        """Some place on a topic."""
        return Coordinates(topic=topic.name(PREFIX), partition=0, offset=7, appended_at_ms=self.now_ms)


class Story:
    """The records of one credential, each signed by who signs it, in the order in which they would be appended."""

    def __init__(self, office: AuditFixtures, end: str, approved: bool, **fields: Any) -> None:
        self.office = office
        bot, issuer = (
            office.key("agent", "deploy-bot"),
            office.key("service", "issuer"),
        )
        revoker, sam = office.key("service", "revoker"), office.key("user", "sam")
        self.request_claims = office.request(**fields)
        self.request_jws = sign(self.request_claims, bot)
        self.request_id = message_id(bot.id, self.request_claims.jti)
        self.lease_id = lease_id(self.request_id)
        self.revisions = Revisions(agent=1, user=1, task=1, target=1, policy=BUNDLE)
        self.request = office.received(CREDENTIAL_REQUEST, self.request_jws, key="deploy-bot")
        terms: dict[str, Any] = {"ttl_s": 300, "delivery": "agent", "revisions": self.revisions}
        self.common: dict[str, Any] = {
            "request_id": self.request_id,
            "request": self.request_jws,
            "source": self.request.coordinates,
            **terms,
        }
        self.all: list[Received] = [self.request]
        approvals: tuple[str, ...] = ()
        if approved:
            expires_at = office.now_ms // 1000 + 600
            self.all.append(self.decision("approval_required", required=("sponsor",), expires_at=expires_at))
            policy = office.key("service", "policy")
            asked = office.claims(
                ApprovalRequest, policy, **self.common, approver="sam", required=("sponsor",), expires_at=expires_at,
                reasons=(Reason(code="floor", message="staging wants its sponsor"),),
            )  # fmt: skip
            self.asked = office.signed(APPROVAL_REQUEST, asked, policy, key="sam")
            yes = office.claims(
                Approval, sam, verdict="approved", request=self.request_jws, request_id=self.request_id,
                request_digest=digest(self.request_jws), comment="build 421 is the one we tested", **terms,
            )  # fmt: skip
            self.approval_jws = sign(yes, sam)
            self.approval = office.received(APPROVAL_RESPONSE, self.approval_jws, key="deploy-bot")
            self.all += [self.asked, self.approval]
            approvals = (self.approval_jws,)
        self.allowed = self.decision("allowed", approvals=approvals)
        self.active = self.lease("active", 1, issuer)
        self.reply = office.received(
            CREDENTIAL_REPLY, seal(b"{}", REPLY_KEY.public, kid=self.request_id), key="deploy-bot"
        )
        self.all += [self.allowed, self.active, self.reply]
        cause: dict[str, Any] = {"kind": "deadline", "at_ms": office.now_ms}
        if end != "expired":
            by = bot if end == "released" else sam
            kind = "release" if end == "released" else "revocation"
            ask = office.claims(
                RevocationRequest, by, kind=kind, lease_id=self.lease_id, reason="done with it"
            )
            self.asked_to_end = office.signed(REVOCATION_REQUEST, ask, by, key="deploy-bot", trace=None)
            self.all.append(self.asked_to_end)
            cause = {**cause, "kind": kind, "by": by.id, "ref": ask.jti, "reason": "done with it"}
        self.ended = self.lease(end, 2, revoker, cause=EndCause(**cause))
        self.all.append(self.ended)

    def decision(self, outcome: str, **fields: Any) -> Received:
        policy = self.office.key("service", "policy")
        claims = self.office.claims(
            CredentialDecision, policy, **{**self.common, "outcome": outcome, "input": {"request": {}},
            "input_digest": BUNDLE, **fields},
        )  # fmt: skip
        return self.office.signed(CREDENTIAL_DECISION, claims, policy, key="deploy-bot")

    def lease(self, status: str, seq: int, by: SigningKey, **fields: Any) -> Received:
        task = self.office.states[TASK, self.request_claims.task_id][1]
        assert isinstance(task, TaskState)
        decision = parse(self.allowed.value)
        claims = self.office.claims(Lease, by, **{
            "lease_id": self.lease_id, "seq": seq, "status": status, "request_id": self.request_id,
            "decision_id": decision.unverified_claims(CredentialDecision).jti,
            "decision_digest": digest(decision.compact), "agent_id": "deploy-bot", "act": ("deploy-bot",),
            "sponsor": "sam", "on_behalf_of": task.on_behalf_of, "task_id": task.task_id, "target_id": "staging",
            "backend": "jwt", "delivery": "agent", "scope": self.office.scope,
            "requested_at_ms": self.request.appended_at_ms, "deadline": self.office.now_ms // 1000 + 300,
            "key_thumbprint": "x", "traceparent": TRACE, **fields,
        })  # fmt: skip
        return self.office.signed(LEASE, claims, by, key=self.lease_id)


REPLY_KEY = ReplyKey()


def steps(events: Sequence[dict[str, Any]]) -> list[str]:
    """The names of the steps that events tell of."""
    return [event["metadata"]["event_code"] for event in events]
