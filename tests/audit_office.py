"""An organisation without a broker: real keys and signatures, the local table fed by hand, and one record of each kind.

olga is an operator (by the root), sam sponsors deploy-bot, maria gave it a task. For tests of audit.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, get_args

import orjson

from ringfence.audit.believing import Believer
from ringfence.audit.handlers import AuditHandlers
from ringfence.audit.intake import Intake, Told
from ringfence.audit.settings import AuditSettings
from ringfence.kernel.clock import Clock, SystemClock
from ringfence.kernel.envelope import EncryptionKey, enclose
from ringfence.kernel.ids import derived_id, digest, lease_id, message_id
from ringfence.kernel.jws import parse, sign
from ringfence.kernel.kafka import Received
from ringfence.kernel.keys import SigningKey
from ringfence.kernel.seal import ReplyKey, seal
from ringfence.kernel.trust import TrustStore
from ringfence.messages.approval import (
    ActionApproval,
    ActionRequest,
    Approval,
    ApprovalRequest,
    BreakGlassReview,
    Grant,
    GrantWithdraw,
)
from ringfence.messages.base import Claims, ExpiringClaims, Message, Topic
from ringfence.messages.credential import (
    Coordinates,
    CredentialDecision,
    CredentialRequest,
    Reason,
    Revisions,
)
from ringfence.messages.instances import AttestationSelector, EnrolledInstance
from ringfence.messages.lease import EndCause, Lease, LeaseEpoch, RevocationAck, RevocationRequest, Selector
from ringfence.messages.operations import ActionAnswered, ActionDecided, DeadLetter, EventKind, ServiceEvent
from ringfence.messages.permission import Permission
from ringfence.messages.registry import (
    AgentActivate,
    AgentDecommission,
    AgentRecord,
    AgentRegister,
    AgentResume,
    AgentRotateKey,
    AgentSetAttestation,
    AgentSetCeiling,
    AgentSuspend,
    AgentTransfer,
    AnyRecord,
    AnyState,
    BackendSettings,
    Delegation,
    EmbeddedCommand,
    Entitlements,
    GroupDelegation,
    GroupLink,
    ProvisionerLink,
    ProvisionerSet,
    Role,
    TargetRecord,
    TargetRemove,
    TargetSet,
    TargetState,
    TaskAssign,
    TaskConsent,
    TaskDelegate,
    TaskEnd,
    TaskRecord,
    TaskState,
    TaskTerms,
    UserDisable,
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
    REGISTRY_COMMAND,
    REVOCATION_ACK,
    REVOCATION_REQUEST,
    SERVICE_EVENT,
    TARGET,
    TASK,
    TRUST,
    USER,
)
from ringfence.messages.trust import ServiceIdentity, ServiceRole, TrustBundle
from ringfence.model.directory import Directory
from ringfence.model.lease_epochs import marker_key
from ringfence.model.lifecycle import Actor, Context, apply

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


_SELECTOR = AttestationSelector(
    issuer="https://token.actions.githubusercontent.com", claims={"repository_id": "74"}
)


class KeptEvents(Intake):
    """Keeps what is handed over to be chained."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.ids: list[str] = []
        self.fail_next = 0

    async def hand_over(self, events: Iterable[Told]) -> None:
        if self.fail_next:
            self.fail_next -= 1
            raise OSError("the broker went away")
        for told in events:
            self.events.append(orjson.loads(told.body))
            assert told.event == self.events[-1], "what is not parsed again must be what would be parsed"
            self.keys.append(told.key)
            self.ids.append(told.uid)


class Office:
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
        bundle = TrustBundle(**self._head(self.root, expires=True), version=1, services=services)
        self.bundle = bundle
        self.trust.load(sign(bundle, self.root, header_jwk=True), self.now_ms / 1000)
        self.directory = Directory(self.trust, SystemClock(), grace_ms=None)
        self.own = AuditSettings(**{"settle_ms": 0, **settings})
        self.believer = Believer(self.trust, self.directory, self.own)
        self.published = KeptEvents()
        self.uses: dict[str, dict[str, Any]] = {}
        self.handlers = AuditHandlers(
            self.published,
            self.believer,
            clock or SystemClock(),
            self.trust,
            self.uses.get,
            settle_ms=self.own.settle_ms,
        )
        self.directory.on_change(self.handlers.on_change)
        self.batches = self.handlers.batches()
        self.states: dict[tuple[Topic[Any], str], tuple[int, AnyState, tuple[EmbeddedCommand, ...]]] = {}
        self.scope = (Permission(target="staging", verbs=("deploy",), resources=("env/staging/*",)),)
        self.task = ""

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
            await self.batches[record.topic]([record])
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
        context = Context(
            actor=Actor(person, frozenset() if agent is not None else everything, agent=agent),
            task_at=lambda task_id: chains.task_at(task_id, self.now_ms),
            at_s=self.now_ms // 1000,
            command_id=message_id(claims.iss, claims.jti),
            roles_of=lambda user: frozenset({"operator", "sponsor"}),
        )
        state = apply(state, claims, context)  # type: ignore[arg-type]
        commands = (*commands, EmbeddedCommand(jws=sign(claims, by), appended_at_ms=self.now_ms))
        self.states[topic, id] = (revision + 1, state, commands)
        record = self.record_of(topic, id)
        problem = self.directory.admit(topic.what, record.topic_name, 0, record.value, record.appended_at_ms)  # type: ignore[arg-type]
        assert problem is None, problem
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
            purpose="deploy the staging build",
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
            "task_id": self.task, "scope": self.scope, "ttl_s": 300, "reason": "deploy build 421",
            "reply_key": REPLY_KEY.public, **fields,
        })  # fmt: skip

    def credential(self, end: str = "released", *, approved: bool = True, **fields: Any) -> Story:
        """All records of one credential from the request to its end, with their claims by name."""
        return Story(self, end, approved, **fields)

    def commands(self) -> dict[str, Received]:
        """One record of every command, by its typ."""
        sam, maria, olga = (self.key("user", name) for name in ("sam", "maria", "olga"))
        key = self.key("user", "newcomer").record(self.now_ms // 1000 + 86_400)
        terms = TaskTerms(
            agent_id="deploy-bot", purpose="x", scope=self.scope, not_after=self.now_ms // 1000 + 60
        )
        consent = sign(self.claims(TaskConsent, maria, terms=terms), maria)
        bot = {"agent_id": "deploy-bot"}
        given: list[tuple[type[ExpiringClaims], SigningKey, dict[str, Any]]] = [
            (UserSet, olga, {
                "user_id": "newcomer", "name": "New", "keys": (key,), "roles": ("sponsor",),
                "entitlements": Entitlements(scope=self.scope, source="cli", as_of=1),
            }),
            (UserDisable, olga, {"user_id": "maria", "reason": "left"}),
            (ProvisionerSet, olga, {
                "provisioner_id": "scim", "name": "Directory", "keys": (key,), "delegation": self.delegation(),
            }),
            (AgentRegister, sam, {
                "agent_id": "second", "sponsor": "sam", "description": "x", "keys": (key,), "ceiling": self.scope,
            }),
            (AgentSetAttestation, sam, {**bot, "attestation": (_SELECTOR,)}),
            (AgentActivate, sam, bot),
            (AgentRotateKey, sam, {**bot, "key": key, "overlap_s": 60}),
            (AgentSetCeiling, sam, {**bot, "ceiling": self.scope}),
            (AgentTransfer, sam, {**bot, "sponsor": "maria"}),
            (AgentSuspend, sam, {**bot, "reason": "odd requests overnight"}),
            (AgentResume, sam, {**bot, "reason": "explained"}),
            (AgentDecommission, sam, {**bot, "reason": "replaced"}),
            (TargetSet, olga, {
                "target_id": "other", "description": "x", "backend": BackendSettings(kind="jwt"),
                "verbs": (VerbFloor(verb="read"),),
            }),
            (TargetRemove, olga, {"target_id": "staging", "reason": "moved"}),
            (TaskAssign, sam, {"terms": terms, "on_behalf_of": "maria", "consent": consent}),
            (TaskDelegate, self.key("agent", "deploy-bot"), {"parent": self.task, "terms": terms}),
            (TaskEnd, maria, {"task_id": self.task, "reason": "done"}),
        ]  # fmt: skip
        return {
            model.typ: self.signed(REGISTRY_COMMAND, self.claims(model, by, **more), by)
            for model, by, more in given
        }

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

    def question(self, lease_id: str, **fields: Any) -> ActionRequest:
        """What a gateway asks about one action of the agent."""
        given: dict[str, Any] = {
            "action_id": str(uuid.uuid4()), "agent_id": "deploy-bot", "task_id": self.task, "lease_id": lease_id,
            "target_id": "staging", "verb": "deploy", "resource": "env/staging/web", "method": "PUT",
            "url": "https://staging.example/env/web?token=in-the-url", "body_digest": "ab" * 32, "body_bytes": 7,
            "required": "sponsor", "revisions": Revisions(agent=1, user=1, task=1, target=1, policy=BUNDLE),
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

    def __init__(self, office: Office, end: str, approved: bool, **fields: Any) -> None:
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
            asked = ApprovalRequest(
                **self.common, approver="sam", required=("sponsor",), expires_at=expires_at,
                reasons=(Reason(code="floor", message="staging wants its sponsor"),),
            )  # fmt: skip
            self.asked = office.received(APPROVAL_REQUEST, asked, key="sam")
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


def every_record(office: Office) -> dict[str, Received]:
    """A record of everything that audit reads, in every shape that makes another event; names for test reports."""
    found: dict[str, Received] = {f"record {i} {r.topic.what}": r for i, r in enumerate(office.staff())}
    found |= {f"command {typ}": record for typ, record in office.commands().items()}
    for end in ("released", "revoked", "expired"):
        story = office.credential(end)
        found |= {f"{end} {i} {r.topic.what}": r for i, r in enumerate(story.all)}
    story = office.credential(approved=False)
    found["unapproved request"] = story.request
    found["unapproved decision"] = story.allowed
    issuer, sam = office.key("service", "issuer"), office.key("user", "sam")
    beyond = Reason(
        code="beyond_scope", message="entitlements:maria does not allow it", permission=office.scope[0],
        side="entitlements:maria",
    )  # fmt: skip
    denied = office.credential(approved=False)
    found["denied request"] = denied.request
    found["denied decision"] = denied.decision("denied", ttl_s=None, reasons=(beyond,))
    found["decision without records"] = denied.decision(
        "denied", ttl_s=None, revisions=None, input_digest=None
    )
    no = office.claims(
        Approval, sam, verdict="denied", request=denied.request_jws, request_id=denied.request_id,
        request_digest=digest(denied.request_jws), ttl_s=300, delivery="agent", revisions=denied.revisions,
    )  # fmt: skip
    found["denied approval"] = office.signed(APPROVAL_RESPONSE, no, sam)
    grant = office.claims(
        Grant, sam, agent_id="deploy-bot", task_id=office.task, scope=office.scope, count=5, ttl_s=300,
        delivery="agent", revisions=denied.revisions, comment="release 41",
    )  # fmt: skip
    found["grant"] = office.signed(APPROVAL_RESPONSE, grant, sam)
    granted = office.credential(approved=False)
    found["granted request"] = granted.request
    found["granted decision"] = granted.decision("allowed", grants=(sign(grant, sam),))
    found["granted lease"] = granted.lease("active", 1, issuer, grants=(message_id(sam.id, grant.jti),))
    for name, grant_id in (("grant", message_id(sam.id, grant.jti)), ("unknown grant", str(uuid.uuid4()))):
        back = office.claims(GrantWithdraw, sam, grant_id=grant_id, reason="the release is off")
        found[f"{name} withdrawn"] = office.signed(APPROVAL_RESPONSE, back, sam)
    for status in ("minting", "ending", "aborted"):
        found[f"lease {status}"] = story.lease(
            status, 3, issuer, cause=EndCause(kind="mint_failed", at_ms=office.now_ms)
        )
    found["lease epoch"] = office.epoch("2.bbbbbbbb")
    found["lease void"] = story.lease("expired", 2, office.key("service", "revoker"), epoch="1.aaaaaaaa")
    found["lease tombstone"] = office.received(LEASE, b"", key=story.lease_id)
    seal_key = EncryptionKey.generate("spiffe://acme.example/service/gateway").record(2**40)
    for name, request_id in (("known", story.request_id), ("unknown", str(uuid.uuid4()))):
        found[f"delivery of {name} request"] = office.received(
            CREDENTIAL_REPLY, enclose(b"{}", [seal_key], about=request_id), key="deploy-bot"
        )
    found["reply to an unknown request"] = office.received(
        CREDENTIAL_REPLY, seal(b"{}", REPLY_KEY.public, kid=str(uuid.uuid4()))
    )
    for selector in (
        Selector(agent_id="deploy-bot"), Selector(task_id=office.task), Selector(sponsor="sam"),
        Selector(target_id="staging"), Selector(user_id="maria"), Selector(all=True),
    ):  # fmt: skip
        olga = office.key("user", "olga")
        ask = office.claims(RevocationRequest, olga, kind="revocation", selector=selector, reason="incident")
        found[f"revocation {selector.model_dump(exclude_defaults=True)}"] = office.signed(
            REVOCATION_REQUEST, ask, olga
        )
    ask = office.claims(RevocationRequest, sam, kind="revocation", lease_id=str(uuid.uuid4()), reason="x")
    found["revocation of an unknown lease"] = office.signed(REVOCATION_REQUEST, ask, sam)
    by_revoker = office.key("service", "revoker")
    ask = office.claims(
        RevocationRequest, by_revoker, kind="task_ended", selector=Selector(task_id=office.task), reason="x"
    )
    found["revocation by a service"] = office.signed(REVOCATION_REQUEST, ask, by_revoker)
    gateway = office.key("service", "gateway")
    for what, id in (
        ("the last order", derived_id("revocation", ask.iss, ask.jti)),
        ("an unknown order", "x"),
    ):
        ack = office.claims(RevocationAck, gateway, revocation_id=id, cut_at_ms=office.now_ms)
        found[f"ack of {what}"] = office.signed(REVOCATION_ACK, ack, gateway)
    reason = (Reason(code="name_taken", message="the name was given before"),)
    about: dict[str, Any] = {"actor": sam.id, "ref": "j1", "source": office.coordinates(REGISTRY_COMMAND)}
    for subject in ("agent.register", "user.set", "target.set", "task.assign"):
        agent = "deploy-bot" if subject.startswith(("agent", "task")) else None
        found[f"refused {subject}"] = office.service_event(
            "refused", subject, reasons=reason, agent_id=agent, **about
        )
        found[f"accepted {subject}"] = office.service_event(
            "accepted", subject, result="x", agent_id="deploy-bot", **about
        )
    found["refused request"] = office.service_event(
        "refused", "credential.request", "policy", reasons=reason, request_id=story.request_id, **about
    )
    found["issuer refused"] = office.service_event(
        "refused", "credential.decision", "issuer", reasons=reason, request_id=story.request_id, **about
    )
    found["refused release"] = office.service_event(
        "refused", "revocation.request", "revoker", reasons=reason, lease_id=story.lease_id, **about
    )
    found["accepted release"] = office.service_event(
        "accepted", "revocation.request", "revoker", lease_id=story.lease_id, **about
    )
    found["service started"] = office.service_event("started", "policy", "policy")
    found["service stopped"] = office.service_event("stopped", "policy", "policy")
    found["replay told"] = office.service_event(
        "replayed", "credential.request", "policy", request_id=story.request_id, agent_id="deploy-bot", **about
    )  # fmt: skip
    ending = (Reason(code="key_ending", message="for sam, the sponsor: a key ends soon"),)
    found["key that ends"] = office.service_event(
        "finding", "key", reasons=ending, agent_id="deploy-bot", sponsor="sam"
    )
    found["finding"] = office.service_event(
        "finding", "record", "policy", reasons=reason, result=office.key("agent", "deploy-bot").id
    )
    for code in ("key_shared", "key_taken", "token_replayed"):
        why = (Reason(code=code, message="two at once"),)
        found[code] = office.service_event("finding", "x", "policy", reasons=why, agent_id="deploy-bot")
    enrolled = EnrolledInstance(
        instance_id=str(uuid.uuid4()), issuer=_SELECTOR.issuer, subject="repo:acme/deploy", selector="0" * 64,
        not_after=1, kid="k", token_digest="1" * 64, enrolled_at=1,
    )  # fmt: skip
    found["instance enrolled"] = office.service_event(
        "accepted", "instance.enrol", agent_id="deploy-bot", enrolled=enrolled, **about
    )
    found["dead letter"] = office.dead_letter()
    found |= actions(office, story.lease_id)
    found |= asked(office, story.lease_id)
    found |= broken_glass(office)
    found |= unbelievable(office)
    found |= trusted(office)
    found |= changes(office)
    return found


def trusted(office: Office) -> dict[str, Received]:
    """Bundles that come into force, stand there again, are older, or no root's; after garbage on the same topic."""
    stranger = SigningKey.generate(office.root.id)
    first, second = office.trust_bundle(1), office.trust_bundle(2)
    fewer = office.trust_bundle(3, services=office.bundle.services[1:])
    return {
        "first bundle": first,
        "second bundle": second,
        "bundle without a service": fewer,
        "bundle again": office.received(TRUST, fewer.value, key="3"),
        "bundle of before": office.trust_bundle(2),
        "bundle of another root": office.trust_bundle(4, stranger),
        "deleted bundle": office.received(TRUST, b"", key="3"),
    }


def broken_glass(office: Office) -> dict[str, Received]:
    """Asked for, used, reviewed, and reviewed by somebody who had a part in it."""
    why = (
        Reason(code="break_glass", message="two operators"),
        Reason(code="frozen", message="no changes now"),
    )
    story = office.credential(break_glass=True)
    olga = office.key("user", "olga")
    use = story.decision("allowed", reasons=why, approvals=(story.approval_jws,))
    found = {
        "break glass request": story.request,
        "break glass asked": story.decision("approval_required", reasons=why, required=("break_glass",) * 2),
        "break glass used": use,
        "break glass issued": story.lease("active", 1, office.key("service", "issuer"), break_glass=True),
    }
    given = {
        "request_id": story.request_id,
        "decision_digest": digest(use.value.decode()),
        "agent_id": "deploy-bot",
        "note": "the runbook was followed",
    }
    office.uses[story.request_id] = {
        "decision_digest": given["decision_digest"], "approvers": ["sam"], "agent": "deploy-bot",
        "act": ["deploy-bot"], "task": office.task, "on_behalf_of": "maria", "sponsor": "sam",
        "request_digest": digest(story.request_jws), "policy_revision": BUNDLE,
    }  # fmt: skip
    for name, by in (("reviewed", olga), ("review refused", office.key("user", "sam"))):
        review = office.claims(BreakGlassReview, by, **given)
        found[f"break glass {name}"] = office.signed(APPROVAL_RESPONSE, review, by, key="deploy-bot")
    return found


def changes(office: Office) -> dict[str, Received]:
    """Records of everything that can become of users, agents, targets and tasks after they were made."""
    sam, maria, olga = (office.key("user", name) for name in ("sam", "maria", "olga"))
    office.user("petra", "sponsor")
    target = office.states[TARGET, "staging"][1]
    assert isinstance(target, TargetState)
    bot, first = {"agent_id": "deploy-bot"}, office.record_of(AGENT, "deploy-bot")
    ends_s = office.now_ms // 1000 + 86_400
    keys = [SigningKey.generate(f"spiffe://{TD}/agent/deploy-bot").record(ends_s) for _ in range(2)]
    sleeper = {"agent_id": "sleeper", "sponsor": "sam", "description": "x", "keys": (keys[0],), "ceiling": ()}
    register = office.claims(AgentRegister, olga, **sleeper, inactive=True)
    office.carry_out(AGENT, "sleeper", register, olga)
    stolen = {**bot, "key": keys[1], "compromised": True, "reason": "it was in a log"}
    _, handed_on = office.hand_on()
    orders: list[tuple[Topic[Any], str, type[ExpiringClaims], SigningKey, dict[str, Any]]] = [
        (AGENT, "deploy-bot", AgentSuspend, sam, {**bot, "reason": "odd"}),
        (AGENT, "deploy-bot", AgentResume, sam, {**bot, "reason": "explained"}),
        (AGENT, "deploy-bot", AgentSetAttestation, sam, {**bot, "attestation": (_SELECTOR,)}),
        (AGENT, "deploy-bot", AgentRotateKey, sam, {**bot, "key": keys[0], "overlap_s": 60}),
        (AGENT, "deploy-bot", AgentSetCeiling, sam, {**bot, "ceiling": ()}),
        (AGENT, "deploy-bot", AgentTransfer, sam, {**bot, "sponsor": "petra"}),
        (AGENT, "sleeper", AgentActivate, sam, {"agent_id": "sleeper"}),
        (AGENT, "deploy-bot", AgentDecommission, olga, {**bot, "reason": "replaced"}),
        (TASK, office.task, TaskEnd, maria, {"task_id": office.task, "reason": "done"}),
        (TARGET, "staging", TargetSet, olga, {
            "target_id": "staging", "description": "x", "backend": target.backend, "verbs": target.verbs,
        }),
        (TARGET, "staging", TargetRemove, olga, {"target_id": "staging", "reason": "moved"}),
    ]  # fmt: skip
    compromised = office.carry_out(AGENT, "deploy-bot", office.claims(AgentRotateKey, sam, **stolen), sam)
    found = {
        f"changed by {model.typ}": office.carry_out(topic, id, office.claims(model, by, **fields), by)
        for topic, id, model, by, fields in orders
    }
    found["compromised"] = compromised
    found["changed by task.delegate"] = handed_on
    found["changed by user.set"] = office.user("maria", "sponsor")
    disable = office.claims(UserDisable, olga, user_id="maria", reason="left")
    found["changed by user.disable"] = office.carry_out(USER, "maria", disable, olga)
    scim = office.key("user", "scim")
    key = scim.record(office.now_ms // 1000 + 86_400)
    given = {"provisioner_id": "scim", "name": "Directory", "keys": (key,), "delegation": office.delegation()}
    for name in ("created", "changed"):
        command = office.claims(ProvisionerSet, olga, **given)
        found[f"provisioner {name}"] = office.carry_out(USER, "scim", command, olga)
        given["name"] = "Another directory"
    link = office.claims(ProvisionerLink, scim, provisioner_id="scim", groups=(GroupLink(group="Leads"),))
    found["command provisioner.link"] = office.signed(REGISTRY_COMMAND, link, scim)
    found["changed by provisioner.link"] = office.carry_out(USER, "scim", link, scim)
    found["first record again"] = office.received(AGENT, first.value, key="deploy-bot")
    return found


def unbelievable(office: Office) -> dict[str, Received]:
    """Records that nobody is to be believed for, and those that count for nothing though their signature holds."""
    thief = SigningKey.generate(f"spiffe://{TD}/agent/deploy-bot")
    stolen = SigningKey.generate(f"spiffe://{TD}/service/registry")
    found: dict[str, Received] = {
        f"garbage on {topic.what}": office.received(topic, b"\x00\xffno message") for topic in office.batches
    }
    request = office.request()
    found["forged request"] = office.signed(CREDENTIAL_REQUEST, request, thief)
    found["forged record"] = office.record_of(AGENT, "deploy-bot", stolen, revision=9, jti="forged")
    found["record of a lying registry"] = office.record_of(
        AGENT, "deploy-bot", revision=9, jti="lie",
        state=office.states[AGENT, "deploy-bot"][1].model_copy(update={"sponsor": "maria"}),
    )  # fmt: skip
    found["deleted record"] = office.received(AGENT, b"", key="deploy-bot")
    old = office.request(iat=office.now_ms // 1000 - 900, exp=office.now_ms // 1000 - 600)
    found["expired request"] = office.signed(CREDENTIAL_REQUEST, old, office.key("agent", "deploy-bot"))
    first = office.credential()
    found["replayed: first"] = first.request
    found["replayed: again"] = office.received(CREDENTIAL_REQUEST, first.request_jws, key="deploy-bot")
    found["repeated: first"] = first.ended
    found["repeated: again"] = office.received(LEASE, first.ended.value, key=first.lease_id)
    return found


def steps(events: Sequence[dict[str, Any]]) -> list[str]:
    """The names of the steps that events tell of."""
    return [event["metadata"]["event_code"] for event in events]


Predicate = Callable[[dict[str, Any]], bool]


def asked(office: Office, lease_id: str) -> dict[str, Received]:
    """A gateway asks about one action, and people answer; also what no gateway asked."""
    gateway, sam = office.key("service", "gateway"), office.key("user", "sam")
    question = office.question(lease_id)
    compact = sign(question, gateway)
    other = sign(question, office.key("service", "policy"))

    def answer(request: str, **fields: Any) -> Received:
        given = {
            "verdict": "approved",
            "agent_id": "deploy-bot",
            "request": request,
            "request_digest": digest(request),
        }
        claims = office.claims(ActionApproval, sam, **{**given, **fields})
        return office.signed(APPROVAL_RESPONSE, claims, sam, key="deploy-bot")

    return {
        "action asked about": office.received(APPROVAL_REQUEST, compact, key="sam"),
        "action approved": answer(compact, comment="reviewed it"),
        "action denied by a person": answer(compact, verdict="denied"),
        "action that no gateway asked about": answer(other),
        "another action than that of its digest": answer(compact, request_digest="0" * 64),
    }


def actions(office: Office, lease_id: str) -> dict[str, Received]:
    """What gateways say of requests, in every shape that makes another event."""
    why = Reason(
        code="beyond_lease", message="no live lease allows it", permission=office.scope[0], side="lease"
    )
    stolen = Reason(code="handle_other_agent", message="the handle is a lease of another agent")
    no = {"allowed": False, "reasons": (why,)}
    word = {"request_id": str(uuid.uuid4()), "request_digest": "ab" * 32, "waited_ms": 5000}
    every: dict[str, dict[str, Any]] = {
        "allowed": {"lease_id": lease_id},
        "read": {"method": "GET", "access": "read", "lease_id": lease_id},
        "created": {"method": "POST", "label": "pull-request", "lease_id": lease_id},
        "deleted": {"method": "DELETE", "lease_id": lease_id},
        "with a method of its own": {"method": "PURGE", "lease_id": lease_id},
        "denied": no,
        "observed": {**no, "observed": True},
        "approved": {"asked": {**word, "by": "sam"}, "lease_id": lease_id},
        "not answered": {**no, "asked": word},
        "with a stolen handle": {**no, "reasons": (stolen,), "lease_id": lease_id},
        "by nobody known": {
            "agent_id": None, "task_id": None, "target_id": None, "verb": None, "resource": None, "method": None,
            **no,
        },
        "that were never decided": {
            "verb": None, "resource": None, "access": None, "method": None, "request_digest": None,
            "latency_us": None, **no, "count": 999,
        },
    }  # fmt: skip
    answers: dict[str, dict[str, Any]] = {
        "with a result": {"lease_id": lease_id},
        "that it was heard": {"answer": "accepted", "lease_id": lease_id},
        "with a tool's error": {"answer": "tool_error"},
        "with an error of JSON-RPC": {"answer": "rpc_error", "rpc_code": -32602},
        "with an error of HTTP": {"answer": "transport_error", "http_status": 502},
        "by nobody known": {"answer": "none", "http_status": None, "agent_id": None, "task_id": None},
    }
    return {f"action {name}": office.action(**fields) for name, fields in every.items()} | {
        f"answer {name}": office.answer(**fields) for name, fields in answers.items()
    }
