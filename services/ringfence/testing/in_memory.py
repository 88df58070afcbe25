"""`InMemoryRingfence`: people, agents, targets and tasks for a test; approvals, revocations and time at its command,
and a gateway to send requests through."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import httpx

from ringfence.client.admin.administrator import Administrator
from ringfence.client.agent.agent import Agent
from ringfence.client.approvals.action_approvals import PendingAction
from ringfence.client.approvals.history_comparison import PendingApproval
from ringfence.client.approvals.sponsor import Sponsor
from ringfence.client.arguments import instances, permissions, roles_of, texts
from ringfence.client.errors import InvalidCallError, RefusedError, StaleApprovalError, checked
from ringfence.client.resource_server.dpop_proofs import Nonces
from ringfence.client.resource_server.verifier import TokenVerifier
from ringfence.client.settings import ClientSettings
from ringfence.client.signed_messages import compose, key_of, stamp, task_terms
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import ExpiringClaims, KeyRecord, Permission, Scope
from ringfence.messages.codes import Code
from ringfence.messages.lease import Lease
from ringfence.messages.operations import ActionDecided, ServiceEvent
from ringfence.messages.registry import (
    AGENT_KEY_S,
    ActionClass,
    AgentRegister,
    AgentSetCeiling,
    ApprovalClass,
    BackendSettings,
    Delivery,
    Entitlements,
    RequestRule,
    Role,
    TargetSet,
    TaskAssign,
    TaskConsent,
    UserSet,
    UserState,
    VerbFloor,
)
from ringfence.messages.topics import ACTION, APPROVAL_REQUEST, REGISTRY_COMMAND, SERVICE_EVENT
from ringfence.model.http_targets import RequestMap
from ringfence.model.scope.scope import missing, validate_scope
from ringfence.rego.bundle import load_bundle
from ringfence.testing.clock import MovableClock
from ringfence.testing.gateway import GATEWAY_NAME, GatewayTransport, Server
from ringfence.testing.parts import InMemoryConnection, run_at_once
from ringfence.testing.services import Services, create_context

Verdict = Literal["approved", "denied"]
P = TypeVar("P", PendingApproval, PendingAction)

TRUST_DOMAIN: Final = "ringfence.test"
ISSUER_URL: Final = "https://issuer.ringfence.test"
_COMMAND_LIFE_S: Final = 120
_KEY_LIFE_S: Final = 10 * 365 * 86_400
_TOPIC_PREFIX: Final = "ringfence"


class NothingPendingError(RingfenceError):
    """No request came to wait for an approval within the time that the test gave."""

    code = Code.NOTHING_PENDING


class People:
    """Names of the people whom every in-memory Ringfence has."""

    OPERATOR: Final = "olga"
    SECOND_OPERATOR: Final = "otto"
    SPONSOR: Final = "sam"
    SECOND_SPONSOR: Final = "suzy"
    USER: Final = "uma"


@dataclass(slots=True)
class _Person:
    roles: tuple[Role, ...]
    entitlements: Scope = ()
    fixed: bool = False
    """The test said what they are entitled to: tasks do not add to it."""


@dataclass(slots=True)
class _Registered:
    sponsor: str
    ceiling: Scope
    fixed: bool
    """The test gave the ceiling: tasks do not add to it."""
    agent: Agent = field(repr=False)


class InMemoryRingfence:
    """A Ringfence of one test: real rules, real signatures and tokens, no Kafka, no Redis, no network.

    `user`, `target`, `agent` and `task` set it up, and need no event loop. What is set up is what a person would have
    signed: a scope that the rules do not allow is refused here, too.

    Unless the test says otherwise, the ceiling of an agent and the entitlements of a user grow with the tasks that are
    made for them, so that the task's scope alone is the limit.

    Common parameters:
        user_id, target_id, agent_id: an id. Whoever is not known yet is made.
        comment, reason, purpose: text for people.
        by: the user who answers or acts.
        within_s: how many seconds to wait, of real time.
    """

    def __init__(self, *, policy: Path | str | None = None) -> None:
        """`policy`: the folder of a Rego bundle; None takes the one that comes with Ringfence. Raises BundleError.

        The gateway takes it as well, if it has the rule `data.ringfence.action.decision`.
        """
        self.clock = MovableClock()
        self._root = SigningKey.generate(f"spiffe://{TRUST_DOMAIN}/root")
        common: dict[str, Any] = {
            "trust_domain": TRUST_DOMAIN,
            "trust_root": self._root.kid,
            "topic_prefix": _TOPIC_PREFIX,
            "issuer_url": ISSUER_URL,
        }
        # Constructed, not read: nothing in the environment of a test run changes what is decided.
        self.settings: ClientSettings = ClientSettings.model_construct(**common)
        service_settings = ServiceSettings.model_construct(**common)
        self._context = create_context(self._root, service_settings, self.clock)
        self._bus = self._context.bus
        self._credentials: dict[str, str] = {}
        bundle = None if policy is None else load_bundle(Path(policy))
        self._services = Services(self._context, bundle, self._credentials.get)
        self._keys: dict[str, SigningKey] = {}
        self._people: dict[str, _Person] = {}
        self._agents: dict[str, _Registered] = {}
        self._sponsors: dict[str, Sponsor] = {}
        self._verdict: tuple[Verdict, str | None] | None = None
        self._answered: set[str] = set()
        self._bus.consume({APPROVAL_REQUEST: self._on_question})
        self._add_people()

    # --- who and what there is ---

    def user(
        self,
        user_id: str,
        *,
        roles: Sequence[Role] = (),
        entitlements: Sequence[Permission] | None = None,
    ) -> None:
        """Add a user, or replace what is known of one.

        Args:
            roles: of "sponsor", "operator" and "auditor".
            entitlements: what they may do; None has them grow with their tasks.

        Raises InvalidCallError, ScopeError; RefusedError by the registry.
        """
        given = None if entitlements is None else permissions("entitlements", entitlements)
        person = _Person(roles_of(roles), given or (), given is not None)
        self._set_user(user_id, person, by=People.OPERATOR)

    def target(
        self,
        target_id: str,
        *,
        verbs: Sequence[str] | Mapping[str, ApprovalClass],
        kind: str = "jwt",
        max_ttl_s: int = 3600,
        audience: str | None = None,
        dpop: bool = False,
        credential: str | None = None,
        requests: Sequence[RequestRule] = (),
        delivery: Delivery | None = None,
        ask: Mapping[str, ActionClass] | None = None,
        server: Server | None = None,
        **settings: Any,
    ) -> None:
        """Add a target, or replace it.

        Args:
            verbs: the verbs; as a mapping, with the approval that each needs at least ("none", "sponsor",
                "second_person" or "operator").
            kind: of its credentials. Tokens ("jwt") are real; of all other kinds `credential` is what agents get.
            max_ttl_s: how long a credential may live at the most, in seconds.
            requests: the map from HTTP requests to verbs, for the gateway.
            delivery: `gateway` denies delivery to the agent; None takes the default of `Administrator.set_target`.
            ask: the verbs of which the gateway asks a person about each request: `{"merge": "sponsor"}`.
            server: what answers the requests that the gateway forwards: an httpx transport, an ASGI application, or a
                function from `httpx.Request` to `httpx.Response`. Without it no connection to the target can be had.
            audience: the `aud` of its tokens; None takes its SPIFFE ID.
            dpop: tokens are bound to the agent's key (RFC 9449).
            settings: further fields of the backend's settings, e.g. `sslmode` of a PostgreSQL server. With `server`,
                `url` is `https://TARGET.ringfence.test` where none is given.

        Raises InvalidCallError, RequestMapError; RefusedError by the registry.
        """
        floors: Mapping[str, ApprovalClass] = (
            verbs if isinstance(verbs, Mapping) else dict.fromkeys(texts("verbs", verbs), "none")
        )
        if dpop:
            settings["dpop"] = "required"
        if server is not None:
            url = str(settings.setdefault("url", f"https://{target_id}.{TRUST_DOMAIN}"))
            self._services.gateway.serve(url, server)
        asked = ask or {}
        rules = instances("requests", requests, RequestRule, "[RequestRule(...)]")
        with checked("the target"):
            backend = BackendSettings(kind=kind, audience=audience, **settings)
            verb_floors = tuple(
                VerbFloor(verb=verb, floor=floor, ask=asked.get(verb)) for verb, floor in floors.items()
            )
        RequestMap(rules).check_order(verb_floors)
        self._command(
            TargetSet,
            by=f"user/{People.OPERATOR}",
            target_id=target_id,
            description=f"target {target_id} of a test",
            backend=backend,
            verbs=verb_floors,
            requests=rules,
            max_ttl_s=max_ttl_s,
            delivery=delivery,
            keys=(self._key_record(self.key(f"target/{target_id}")),),
        )
        if credential is not None:
            self._credentials[target_id] = credential

    def agent(
        self,
        agent_id: str,
        *,
        ceiling: Sequence[Permission] | None = None,
        sponsor: str = People.SPONSOR,
        key_file: Path | str | None = None,
    ) -> Agent:
        """The agent with this id, registered when it is first asked for. It is connected, and may be entered as well.

        Args:
            ceiling: the most that it may ever hold; None has it grow with its tasks.
            sponsor: who answers for it, where it is registered.
            key_file: the file of its key, which is made where there is none and lives for 30 days. The agent renews it.
                Each call is another process of the agent, which reads the file when it is entered.

        Raises InvalidCallError, ScopeError; RefusedError by the registry.
        """
        given = None if ceiling is None else permissions("ceiling", ceiling)
        known = self._agents.get(agent_id) or self._registered(agent_id)
        if known is None:
            self._command(
                AgentRegister,
                by=f"user/{sponsor}",
                agent_id=agent_id,
                sponsor=sponsor,
                description=f"agent {agent_id} of a test",
                keys=(self._agent_key(agent_id, key_file),),
                ceiling=given or (),
            )
            known = _Registered(sponsor, given or (), given is not None, self._connected(agent_id))
            self._agents[agent_id] = known
        elif given is not None:
            known.fixed = True
            self._set_ceiling(agent_id, known, given)
        if key_file is not None:
            return Agent(InMemoryConnection(self._bus, Path(key_file), self.settings, self.clock))
        return known.agent

    def task(
        self,
        agent_id: str,
        scope: Sequence[Permission],
        *,
        purpose: str = "made for a test",
        on_behalf_of: str = People.USER,
        ends_in_s: int = 3600,
    ) -> str:
        """Assign a task to an agent, by its sponsor and with the user's consent. Returns the task's id.

        Args:
            scope: the most that the task allows: permissions at targets that are set up.
            on_behalf_of: the user whose rights it uses.
            ends_in_s: its end, in seconds from now.

        Raises InvalidCallError, ScopeError; RefusedError by the registry.
        """
        scope = permissions("scope", scope)
        validate_scope(scope)
        self.agent(agent_id)
        known, person = self._agents[agent_id], self._person(on_behalf_of)
        if not known.fixed and missing(scope, known.ceiling):
            self._set_ceiling(agent_id, known, (*known.ceiling, *missing(scope, known.ceiling)))
        if not person.fixed and missing(scope, person.entitlements):
            person.entitlements = (*person.entitlements, *missing(scope, person.entitlements))
            self._set_user(on_behalf_of, person, by=People.OPERATOR)
        now_s = self.clock.now_ms() // 1000
        terms = task_terms(agent_id, purpose, scope, now_s, ends_in_s=ends_in_s, not_after=None)
        user_key = self.key(f"user/{on_behalf_of}")
        consent = None
        if on_behalf_of != known.sponsor:
            consent = sign(TaskConsent(**self._stamp(user_key), terms=terms), user_key)
        return self._command(
            TaskAssign,
            by=f"user/{known.sponsor}",
            terms=terms,
            on_behalf_of=on_behalf_of,
            consent=consent,
        )

    def key(self, whose: str) -> SigningKey:
        """The private key of somebody, the same each time.

        `whose`: such as "user/sam", "agent/deploy-bot", "target/staging".
        """
        if whose not in self._keys:
            self._keys[whose] = SigningKey.generate(f"spiffe://{TRUST_DOMAIN}/{whose}")
        return self._keys[whose]

    # --- people at work ---

    def sponsor(self, user_id: str = People.SPONSOR) -> Sponsor:
        """A person who approves, connected: for tests of what approves by program."""
        if user_id not in self._sponsors:
            self._person(user_id)
            sponsor = Sponsor(self._connection(self.key(f"user/{user_id}")))
            run_at_once(sponsor.start())
            self._sponsors[user_id] = sponsor
        return self._sponsors[user_id]

    def administrator(self, user_id: str = People.OPERATOR) -> Administrator:
        """A person who sends commands, connected: suspends agents, ends tasks, narrows ceilings."""
        self._person(user_id)
        administrator = Administrator(self._connection(self.key(f"user/{user_id}")))
        run_at_once(administrator.start())
        return administrator

    def pending(self) -> list[PendingApproval]:
        """The requests that wait for people now, oldest first."""
        return self.sponsor(People.OPERATOR).pending(everyone=True)

    async def approve(
        self,
        request: PendingApproval | str | None = None,
        *,
        by: str | None = None,
        comment: str | None = None,
        within_s: float = 5.0,
    ) -> PendingApproval:
        """Approve a pending request. Returns it as it was pending.

        Args:
            request: the request, or its id; None takes the only one, and waits until there is one.
            by: who approves; None: for each needed approval, a user who may give it.
            within_s: how long to wait for a request, in seconds of real time.

        Raises NothingPendingError; InvalidCallError if several wait; NotYoursError if `by` may not approve it;
        StaleApprovalError if it is no longer open.
        """
        return await self._answer(request, "approved", by, comment, within_s)

    async def deny(
        self,
        request: PendingApproval | str | None = None,
        *,
        by: str | None = None,
        comment: str | None = None,
        within_s: float = 5.0,
    ) -> PendingApproval:
        """Deny a request that waits. See `approve`."""
        return await self._answer(request, "denied", by, comment, within_s)

    def pending_actions(self) -> list[PendingAction]:
        """The single actions about which the gateway asks people now, oldest first."""
        return self.sponsor(People.OPERATOR).actions(everyone=True)

    async def approve_action(
        self,
        action: PendingAction | str | None = None,
        *,
        by: str | None = None,
        comment: str | None = None,
        within_s: float = 5.0,
    ) -> PendingAction:
        """Approve a single action that waits at the gateway. Returns it as it was pending. See `approve`."""
        return await self._answer_action(action, "approved", by, comment, within_s)

    async def deny_action(
        self,
        action: PendingAction | str | None = None,
        *,
        by: str | None = None,
        comment: str | None = None,
        within_s: float = 5.0,
    ) -> PendingAction:
        """Deny a single action that waits at the gateway. See `approve`."""
        return await self._answer_action(action, "denied", by, comment, within_s)

    def answer_all(self, verdict: Verdict | None, *, comment: str | None = None) -> None:
        """Answer each request for a credential, and each single action, that comes to wait from now on, at once.

        `verdict`: `approved` or `denied`; None leaves requests to wait again.
        """
        self._verdict = None if verdict is None else (verdict, comment)

    async def revoke(
        self,
        *,
        lease: str | None = None,
        agent: str | None = None,
        task: str | None = None,
        target: str | None = None,
        user: str | None = None,
        everything: bool = False,
        reason: str = "revoked by a test",
    ) -> int:
        """End what one condition covers, as an operator (the kill switch). Returns how many leases were ended.

        Give one of `lease`, `agent`, `task`, `target` and `user` (an id), or `everything`.

        Raises InvalidCallError if not exactly one condition is given; RefusedError by the revoker.
        """
        accepted = await self.administrator().revoke(
            reason=reason,
            lease_id=lease,
            agent_id=agent,
            task_id=task,
            target_id=target,
            user_id=user,
            all=everything,
        )
        return int(accepted.result or 0)

    # --- time ---

    async def advance(self, seconds: float | timedelta) -> None:
        """Move the clock forward by so many `seconds`: leases and tasks end, and open questions are denied.

        Raises ValueError if `seconds` is negative.
        """
        await self._bus.settle()
        self.clock.advance(seconds.total_seconds() if isinstance(seconds, timedelta) else seconds)
        await self._bus.settle()
        await self._services.end_due_leases()
        await self._bus.settle()

    # --- what there is ---

    def leases(self, *, agent: str | None = None) -> list[Lease]:
        """The latest record of each lease, the oldest lease first; `status` says what became of it.

        `agent`: only of this agent.
        """
        return [one for one in self._services.store.latest() if agent in (None, one.agent_id)]

    def actions(self, *, agent: str | None = None) -> list[ActionDecided]:
        """What the gateway recorded of each request, allowed or denied, in order.

        `agent`: only of this agent.
        """
        decided = (
            ActionDecided.model_validate_json(record.value)
            for record in self._bus.of(ACTION)
            if b'"allowed"' in record.value  # not the outcome of an action at an MCP endpoint
        )
        return [one for one in decided if agent in (None, one.agent_id)]

    # --- the gateway ---

    @property
    def gateway_url(self) -> str:
        """The URL at which agents address the gateway through `gateway()`: `{gateway_url}/TARGET/...`."""
        return f"https://{GATEWAY_NAME}"

    def gateway(self, *, task: str | None = None) -> GatewayTransport:
        """The way to the gateway, for `httpx.AsyncClient` and `httpx.Client`.

        A request is decided, answered and recorded as by a real gateway, and goes to the `server` of its target.

        Args:
            task: the socket of this task, which needs no proof; None is the listener, for `credential.auth()`.
        """
        return self._services.gateway.transport(task)

    # --- resource servers ---

    @property
    def issuer_url(self) -> str:
        """The `iss` of tokens; reached through `transport`."""
        return ISSUER_URL

    def transport(self) -> httpx.AsyncBaseTransport:
        """Where the issuer's HTTP is: discovery, published keys and introspection."""
        return httpx.ASGITransport(app=self._services.issuer_http)

    def verifier(
        self,
        target_id: str,
        *,
        introspect: bool = True,
        require_proof: bool = False,
        nonces: Nonces | None = None,
    ) -> TokenVerifier:
        """The verifier of a resource server that has this target's key; see `ringfence.TokenVerifier`.

        `introspect`: ask about each token, so that it is refused as soon as its lease is cut. `require_proof` and
        `nonces`: as of `TokenVerifier`. Raises InvalidCallError where there is no such target.
        """
        entry = self._services.directory.target(target_id)
        if entry is None:
            raise InvalidCallError(f'there is no target {target_id}: target("{target_id}", verbs=[...])')
        audience = entry.state.backend.audience or f"spiffe://{TRUST_DOMAIN}/target/{target_id}"
        return TokenVerifier(
            ISSUER_URL,
            audience,
            self.key(f"target/{target_id}") if introspect else None,
            require_proof=require_proof,
            nonces=nonces,
            http=httpx.AsyncClient(transport=self.transport()),
            clock=self.clock,
        )

    # --- how ---

    def _add_people(self) -> None:
        self._set_user(People.OPERATOR, _Person(("operator",)), by=None)
        self._set_user(People.SECOND_OPERATOR, _Person(("operator",)), by=None)
        for sponsor in (People.SPONSOR, People.SECOND_SPONSOR):
            self._set_user(sponsor, _Person(("sponsor",)), by=People.OPERATOR)
        self._set_user(People.USER, _Person(()), by=People.OPERATOR)

    def _set_user(self, user_id: str, person: _Person, *, by: str | None) -> None:
        validate_scope(person.entitlements, allow_empty=True)
        self._command(
            UserSet,
            by=None if by is None else f"user/{by}",
            user_id=user_id,
            name=user_id.title(),
            roles=person.roles,
            keys=(self._key_record(self.key(f"user/{user_id}")),),
            entitlements=Entitlements(
                scope=person.entitlements, source="a test", as_of=self.clock.now_ms() // 1000
            ),
        )
        self._people[user_id] = person

    def _set_ceiling(self, agent_id: str, known: _Registered, ceiling: Scope) -> None:
        validate_scope(ceiling, allow_empty=True)
        by = f"user/{known.sponsor}"
        self._command(AgentSetCeiling, by=by, agent_id=agent_id, ceiling=ceiling)
        known.ceiling = ceiling

    def _registered(self, agent_id: str) -> _Registered | None:
        """An agent that an `Administrator` registered."""
        entry = self._services.directory.agent(agent_id)
        if entry is None:
            return None
        known = _Registered(entry.state.sponsor, entry.state.ceiling, True, self._connected(agent_id))
        self._agents[agent_id] = known
        return known

    def _connected(self, agent_id: str) -> Agent:
        agent = Agent(self._connection(self.key(f"agent/{agent_id}")))
        run_at_once(agent.start())
        return agent

    def _person(self, user_id: str) -> _Person:
        """Somebody whom `user` added, or an `Administrator`."""
        if user_id in self._people:
            return self._people[user_id]
        entry = self._services.directory.user(user_id)
        if entry is None:
            raise InvalidCallError(f'there is no user {user_id}: user("{user_id}")')
        return _Person(entry.state.roles, entry.state.entitlements.scope, fixed=True)

    def _agent_key(self, agent_id: str, key_file: Path | str | None) -> KeyRecord:
        if key_file is None:
            return self._key_record(self.key(f"agent/{agent_id}"))
        key = self.key(f"agent/{agent_id}")
        if not Path(key_file).exists():
            key.save(key_file)
        return SigningKey.load(key_file).record(self.clock.now_ms() // 1000 + AGENT_KEY_S)

    def _connection(self, key: SigningKey) -> InMemoryConnection:
        return InMemoryConnection(self._bus, key, self.settings, self.clock)

    def _key_record(self, key: SigningKey) -> KeyRecord:
        return key.record(self.clock.now_ms() // 1000 + _KEY_LIFE_S)

    def _stamp(self, key: SigningKey) -> dict[str, Any]:
        return stamp(key.id, TRUST_DOMAIN, self.clock.now_ms() // 1000, _COMMAND_LIFE_S)

    def _command(self, model: type[ExpiringClaims], *, by: str | None, **fields: Any) -> str:
        """Have the registry carry out a command at once. Returns its id. Raises RefusedError, InvalidCallError."""
        signer = self._root if by is None else self.key(by)
        with checked(f"the {model.typ}"):
            claims = compose(model, self._stamp(signer), **fields)
        at = self._bus.append_unconsumed(REGISTRY_COMMAND, key_of(claims), sign(claims, signer).encode())
        run_at_once(self._services.registry.on_command(at))
        for event in _events(reversed(self._bus.of(SERVICE_EVENT))):
            if event.ref == claims.jti and event.kind == "refused":
                raise RefusedError(claims.typ, event.reasons, "registry")
            if event.ref == claims.jti:
                break
        return message_id(claims.iss, claims.jti)

    async def _answer(
        self,
        request: PendingApproval | str | None,
        verdict: Verdict,
        by: str | None,
        comment: str | None,
        within_s: float,
    ) -> PendingApproval:
        arrivals = self.sponsor(People.OPERATOR).watch(everyone=True)
        pending = await self._wanted(request, self.pending, arrivals, within_s)
        await self._give(pending, verdict, by, comment)
        return pending

    async def _answer_action(
        self,
        action: PendingAction | str | None,
        verdict: Verdict,
        by: str | None,
        comment: str | None,
        within_s: float,
    ) -> PendingAction:
        arrivals = self.sponsor(People.OPERATOR).watch_actions(everyone=True)
        pending = await self._wanted(action, self.pending_actions, arrivals, within_s)
        await self._give_action(pending, verdict, by, comment)
        return pending

    async def _wanted(
        self,
        request: P | str | None,
        waiting: Callable[[], list[P]],
        arrivals: AsyncIterator[P],
        within_s: float,
    ) -> P:
        if request is not None and not isinstance(request, str):
            return request
        await self._bus.settle()
        try:
            async with asyncio.timeout(within_s):
                async for pending in arrivals:
                    if request is None:
                        _require_one(waiting())
                    if request in (None, pending.request_id):
                        return pending
        except TimeoutError:
            pass
        which = "no request" if request is None else f"no request {request}"
        raise NothingPendingError(f"{which} came to wait for an approval within {within_s:g} s")

    async def _give(
        self, pending: PendingApproval, verdict: Verdict, by: str | None, comment: str | None
    ) -> None:
        lacking = list(pending.required)
        for user_id in self._people_who_may_answer(by):
            sponsor = self.sponsor(user_id)
            theirs = sponsor.find(pending.request_id)
            mine = theirs.mine if theirs is not None else ()
            if by is None and not set(mine) & set(lacking):
                continue
            if verdict == "denied":
                await sponsor.deny(theirs or pending, comment)
                return
            await sponsor.approve(theirs or pending, comment)
            # A person counts once, for one of the classes.
            counted = next((one for one in lacking if one in mine), None)
            if counted is not None:
                lacking.remove(counted)
            if by is not None or not lacking:
                return
        raise StaleApprovalError(
            f"request {pending.request_id} is no longer open, or nobody may give it: {', '.join(lacking)}"
        )

    async def _give_action(
        self, pending: PendingAction, verdict: Verdict, by: str | None, comment: str | None
    ) -> None:
        for user_id in self._people_who_may_answer(by):
            sponsor = self.sponsor(user_id)
            theirs = sponsor.find_action(pending.request_id)
            if by is None and (theirs is None or not theirs.mine):
                continue
            answer = sponsor.approve_action if verdict == "approved" else sponsor.deny_action
            await answer(theirs or pending, comment)
            return
        raise StaleApprovalError(
            f"action {pending.request_id} is no longer open, or nobody may give it: {pending.required}"
        )

    def _people_who_may_answer(self, by: str | None) -> list[str]:
        if by is not None:
            return [by]
        users = self._services.directory.entries("user")
        return [one.state.user_id for one in users if isinstance(one.state, UserState)]

    async def _on_question(self, batch: Sequence[Received]) -> None:
        if self._verdict is None:
            return
        verdict, comment = self._verdict
        for pending in self.pending():
            if pending.request_id not in self._answered:
                self._answered.add(pending.request_id)
                await self._give(pending, verdict, None, comment)
        for action in self.pending_actions():
            if action.request_id not in self._answered:
                self._answered.add(action.request_id)
                await self._give_action(action, verdict, None, comment)


def _require_one(waiting: Sequence[PendingApproval | PendingAction]) -> None:
    if len(waiting) > 1:
        ids = ", ".join(one.request_id for one in waiting)
        raise InvalidCallError(f"{len(waiting)} requests wait; say which: {ids}")


def _events(records: Iterable[Received]) -> Iterable[ServiceEvent]:
    for record in records:
        yield parse(record.value).unverified_claims(ServiceEvent)
