"""Signed commands of sponsors, operators and the root: users, agents, targets, tasks and revocations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from ringfence.client.admin.command_client import UNKNOWN_OUTCOME, Accepted, CommandClient
from ringfence.client.admin.preview import Preview, preview, unknown_names
from ringfence.client.admin.proposals import ProposedCommand
from ringfence.client.admin.target_backends import backend_problem
from ringfence.client.admin.unknown_subjects import similar_id, unknown_subject
from ringfence.client.arguments import instances, permissions, roles_of, texts
from ringfence.client.connection import Connection, subject
from ringfence.client.errors import IdentityError, InvalidCallError, RefusedError, checked, require_understood
from ringfence.client.passkeys.questions import LIFE_S
from ringfence.client.signed_messages import task_terms
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.crypto.claims import MAX_LIFE_S
from ringfence.kernel.crypto.keys import SigningKey, thumbprint
from ringfence.messages.base import ExpiringClaims, KeyRecord, Permission, PublicJwk
from ringfence.messages.codes import Code
from ringfence.messages.enrolment import AttestationSelector
from ringfence.messages.lease import RevocationRequest, Selector
from ringfence.messages.registry import (
    AGENT_KEY_S,
    AgentActivate,
    AgentDecommission,
    AgentRegister,
    AgentResume,
    AgentRotateKey,
    AgentSetAttestation,
    AgentSetCeiling,
    AgentSuspend,
    AgentTransfer,
    AgentTransferConsent,
    BackendSettings,
    CommandSecond,
    CommandWithdraw,
    Delegation,
    Delivery,
    Entitlements,
    HeldSubject,
    Hold,
    ModelLimits,
    ProvisionerSet,
    Provisioning,
    RequestRule,
    Role,
    SecondedCommand,
    TargetRemove,
    TargetSet,
    TaskAssign,
    TaskConsent,
    TaskEnd,
    TaskTerms,
    UserAddKey,
    UserDisable,
    UserEndKey,
    UserReviewCompromise,
    UserSet,
    VerbFloor,
)
from ringfence.messages.run import Mount, RunLimits, RunOrder, RunStop
from ringfence.messages.topics import RUN_ORDER
from ringfence.model.http_targets import RequestMap
from ringfence.model.identity.spiffe_ids import SubjectKind
from ringfence.model.records.runs import run_id_of
from ringfence.model.requests.run_orders import check_order, check_stop, order_id_of
from ringfence.model.scope.scope import validate_scope
from ringfence.model.target_settings import delivery_problem
from ringfence.model.verdict import Refused

KEY_LIFE_S = 365 * 24 * 3600
"""The default validity of a key, in seconds."""

ORDER_LIFE_S = 3600
"""How long an order of a run may wait for a runner, unless said otherwise."""

AnyKey = SigningKey | PublicJwk | KeyRecord


@dataclass(frozen=True, slots=True)
class OrderedRun:
    """An order that is on Kafka, and the run that it will be."""

    order_id: str
    run_id: str
    agent_id: str


def _by_root(connection: Connection) -> bool:
    return connection.key.id == connection.trust.root_id


_UNKNOWN_SUBJECTS: Final[Mapping[str, SubjectKind]] = {
    Code.UNKNOWN_AGENT: "agent", Code.UNKNOWN_TARGET: "target", Code.UNKNOWN_USER: "user",
}  # fmt: skip
"""By the registry's code: the kind of subject that it does not know, and that has an id which people spell."""
_REVOCATION_TIMEOUT_HINT = (
    "The order stands on Kafka and does not expire: what it covers is refused as soon as a revoker and the gateways "
    "have read it. The answer comes when all of that has ended, and very many leases take longer "
    "(ringfence lease list); ringfence doctor says whether the revoker runs"
)


class Administrator(CommandClient):
    """A person (or the root) who sends commands, connected. Each method waits for the service's signed answer.

    ```python
    async with Administrator.connect(key="maria.json") as maria:
        await maria.register_agent("deploy-bot", description="deploys", keys=[bot_key], ceiling=ceiling)
        task_id = await maria.assign_task("deploy-bot", purpose="release 41", scope=scope, ends_in_s=3600)
    ```

    Common parameters:
        user_id, agent_id, target_id, task_id, provisioner_id: an id, without the trust domain.
        name, description, purpose: text for people.
        reason: why, in a sentence. It stands in the audit trail.
        keys: public keys, or signing keys, of which only the public half is sent. A key without an end is valid for a
            year, an agent's for 30 days. Keys that are not listed end.
        ceiling, scope: permissions, each with a target, verbs and resources (globs).
        ends_in_s, not_after: the end of a task: seconds from now, or seconds since 1970. Give one of them.
        terms: what `terms` returned.
        revision: of the record as you saw it (`VerifiedRecord.named_revision`; 0: there was none). If it has changed
            since, a command that gives more is refused (`revision_stale`). None: not compared.
        on_behalf_of: the user whose rights the task uses; None: whoever signs.
        timeout_s: how long to wait for each answer, in seconds.

    Each command raises RefusedError with the reasons of the service, ProposedError if it waits for a second person now,
    NotAnsweredError after `timeout_s`,
    InvalidCallError or ScopeError where nothing was sent, and UnavailableError where Kafka did not take it.
    """

    @property
    def is_root(self) -> bool:
        """Whether the key is the root's, and no user's."""
        return _by_root(self.connection)

    @staticmethod
    def _signer_id(connection: Connection) -> str:
        return "root" if _by_root(connection) else subject(connection.key, "user", connection.settings)

    # --- proposals ---

    async def second(self, *proposals: ProposedCommand) -> Accepted:
        """Second widening commands of others, which take effect then: all, or none.

        `proposals`: what `ringfence.client.admin.proposals.read_proposal` returned. More than one, at most
        `MAX_SECONDED`: only of users and keys.
        """
        with checked("the list of proposals"):
            commands = tuple(
                SecondedCommand(
                    author=one.command.iss,
                    command=one.command.jti,
                    proposal=one.digest,
                    revision=one.revision,
                )
                for one in proposals
            )
        return await self._command(CommandSecond, commands=commands)

    async def withdraw(self, digest: str) -> Accepted:
        """Withdraw an own widening command that waits.

        `digest`: that of the proposal.
        """
        return await self._command(CommandWithdraw, proposal=digest)

    # --- users ---

    async def set_user(
        self,
        user_id: str,
        *,
        name: str,
        roles: Sequence[Role] = (),
        keys: Sequence[AnyKey] = (),
        entitlements: Sequence[Permission] = (),
        source: str = "operator",
        as_of: int | None = None,
        provisioned: Provisioning | None = None,
        revision: int | None = None,
    ) -> Accepted:
        """Create or replace a user. Keys that are not listed end now.

        Args:
            roles: of `sponsor`, `operator` and `auditor`.
            entitlements: what the human may do; `source`: where that is known from; `as_of`: since when, in seconds
                since 1970 (None: now).
            provisioned: keeps a provisioned user with their provisioner; None takes them over.
        """
        roles, scope = roles_of(roles), permissions("entitlements", entitlements)
        validate_scope(scope, allow_empty=True)
        as_of = self._now_s() if as_of is None else as_of
        with checked("the entitlements"):
            entitled = Entitlements(scope=scope, source=source, as_of=as_of)
        return await self._command(
            UserSet,
            user_id=user_id,
            name=name,
            roles=roles,
            keys=self.key_records(keys),
            entitlements=entitled,
            provisioned=provisioned,
            revision=revision,
        )

    async def disable_user(self, user_id: str, *, reason: str) -> Accepted:
        """Disable a user: they may no longer act, and their agents become orphans."""
        return await self._command(UserDisable, user_id=user_id, reason=reason)

    async def add_user_key(
        self,
        user_id: str,
        key: KeyRecord,
        *,
        invitation: str,
        possession: str,
        endorsement: str | None = None,
    ) -> Accepted:
        """Add one key to a user, as an operator or with a key file of that user. See `client.admin.user_keys`.

        Args:
            invitation: the `user.invite` that the new key answers.
            possession: the `key.possession` by the new key.
            endorsement: a `key.endorsement` by a second operator: then the key counts for approvals at once.
        """
        return await self._command(
            UserAddKey,
            user_id=user_id,
            key=key,
            invitation=invitation,
            possession=possession,
            endorsement=endorsement,
        )

    async def end_user_key(
        self,
        user_id: str,
        kid: str,
        *,
        reason: str,
        compromised: bool = False,
        since_ms: int | None = None,
        holds: Sequence[HeldSubject] = (),
    ) -> Accepted:
        """End the key `kid` of a user, as that user or as an operator. What it signed stays valid.

        Args:
            compromised: it may be in other hands; the keys that the user added with it end as well, and it never comes
                back.
            since_ms: of a compromised key, and then required: the append time since which it may have been in other
                hands. Where an operator signs, no key of others that it gave since then approves anything; 0 of an
                operator's key may be the whole organisation. More than 30 days back, nothing happens until a second
                operator reports the same key.
            holds: what else rests on the key (`KeyCompromise.resting`), at most `MAX_HELD`. It is refused until
                somebody entitled sets it anew.
        """
        return await self._command(
            UserEndKey,
            user_id=user_id,
            kid=kid,
            reason=reason,
            compromised=compromised or None,
            since_ms=since_ms,
            holds=instances("holds", holds, HeldSubject, "[HeldSubject(...)]") or None,
        )

    async def review_compromise(
        self, user_id: str, hold: Hold, outcome: Literal["void", "lift"], *, reason: str
    ) -> Accepted:
        """Confirm (`void`) or lift a report of a compromised key, as an operator who is neither its signer nor
        `user_id`, and rests on neither; or as the root.

        Args:
            hold: the report, as the record of the key's user has it.
            outcome: `void` confirms it, `lift` frees what it holds.
        """
        return await self._command(
            UserReviewCompromise,
            user_id=user_id,
            report=hold.report,
            report_digest=hold.report_digest,
            outcome=outcome,
            reason=reason,
        )

    async def set_provisioner(
        self,
        provisioner_id: str,
        *,
        name: str,
        keys: Sequence[AnyKey],
        delegation: Delegation,
        revision: int | None = None,
    ) -> Accepted:
        """Create or replace a provisioner: a key that sets users within the groups delegated to it.

        `delegation`: the groups, and what each may give its members.
        """
        return await self._command(
            ProvisionerSet,
            provisioner_id=provisioner_id,
            name=name,
            keys=self.key_records(keys),
            delegation=delegation,
            revision=revision,
        )

    # --- agents ---

    async def register_agent(
        self,
        agent_id: str,
        *,
        description: str,
        keys: Sequence[AnyKey],
        ceiling: Sequence[Permission],
        sponsor: str | None = None,
        inactive: bool = False,
        attestation: Sequence[AttestationSelector] = (),
        limits: ModelLimits | None = None,
    ) -> Accepted:
        """Register an agent. `sponsor` defaults to the signer; only an operator may name another.

        With `inactive` nothing is issued before the sponsor accepts it with `activate_agent`. With `attestation` it
        needs no key: its running instances enrol their own. `limits`: of what each of its tasks uses of models.
        """
        ceiling, attestation = permissions("ceiling", ceiling), _selectors(attestation)
        validate_scope(ceiling, allow_empty=True)
        return await self._command(
            AgentRegister,
            agent_id=agent_id,
            sponsor=sponsor or self._user_id("name the sponsor"),
            description=description,
            keys=self._key_records(keys, AGENT_KEY_S),
            ceiling=ceiling,
            limits=limits,
            attestation=attestation,
            inactive=inactive or None,
        )

    async def set_attestation(
        self, agent_id: str, attestation: Sequence[AttestationSelector], *, revision: int | None = None
    ) -> Accepted:
        """Replace the selectors (`attestation`) of instances that may enrol a key.

        Instances that match none get nothing new.
        """
        return await self._command(
            AgentSetAttestation,
            agent_id=agent_id,
            attestation=_selectors(attestation),
            revision=revision,
        )

    async def activate_agent(self, agent_id: str) -> Accepted:
        """Accept, as its sponsor, an agent that was registered as inactive."""
        return await self._command(AgentActivate, agent_id=agent_id)

    async def rotate_key(
        self,
        agent_id: str,
        key: AnyKey | None,
        *,
        overlap_s: int = 3600,
        replaces: Sequence[str] | None = None,
        compromised: bool = False,
        reason: str | None = None,
    ) -> Accepted:
        """Give the agent a new key, one that was never registered before.

        Args:
            key: None, with `compromised`: the replaced keys end, and nothing takes their place.
            overlap_s: how long the replaced keys stay valid, in seconds; 7 days at most.
            replaces: thumbprints of the replaced keys; None replaces all.
            compromised: the replaced keys may be stolen: they end at once, whatever `overlap_s` says, and so do the
                keys that renewals made of them, and the leases that were requested with any of these.
        """
        return await self._command(
            AgentRotateKey,
            agent_id=agent_id,
            key=None if key is None else self._key_records([key], AGENT_KEY_S)[0],
            replaces=None if replaces is None else texts("replaces", replaces),
            overlap_s=0 if compromised else overlap_s,
            compromised=compromised or None,
            reason=reason,
        )

    async def set_ceiling(
        self,
        agent_id: str,
        ceiling: Sequence[Permission],
        *,
        limits: ModelLimits | None = None,
        revision: int | None = None,
    ) -> Accepted:
        """Replace the agent's ceiling, the most that it may ever hold. Leases beyond it end.

        `limits`: of what each of its tasks uses of models. They are part of the ceiling: None removes them.
        """
        ceiling = permissions("ceiling", ceiling)
        validate_scope(ceiling, allow_empty=True)
        return await self._command(
            AgentSetCeiling, agent_id=agent_id, ceiling=ceiling, limits=limits, revision=revision
        )

    async def transfer_agent(
        self, agent_id: str, *, sponsor: str, consent: str | None = None, without_consent: bool = False
    ) -> Accepted:
        """Make another user the agent's sponsor.

        Args:
            consent: the new sponsor's `consent_to_transfer`; not needed where the new sponsor signs this command.
            without_consent: an operator transfers without asking the new sponsor; record and audit trail say so.
        """
        return await self._command(
            AgentTransfer,
            agent_id=agent_id,
            sponsor=sponsor,
            consent=consent,
            without_consent=without_consent or None,
        )

    async def consent_to_transfer(self, agent_id: str, *, life_s: int = 3600) -> str:
        """Sign this user's consent to become the sponsor of an agent as it is now. The present sponsor embeds it.

        It is valid once, for `life_s` seconds (by a passkey for ten minutes at most), and no longer once the agent's
        record changes. Raises InvalidCallError if there is no such agent.
        """
        user = self._user_id("the root answers for no agents")
        directory = await self.connection.current_directory()
        entry = directory.agent(agent_id)
        if entry is None:
            raise unknown_subject(directory, "agent", agent_id)
        if entry.state.sponsor == user:
            raise InvalidCallError(f"{user} is the sponsor of {agent_id} already")
        claims = self.connection.compose(
            AgentTransferConsent,
            life_s=self._consent_life_s(life_s),
            agent_id=agent_id,
            from_sponsor=entry.state.sponsor,
            revision=entry.revision,
        )
        return (await self.connection.sign(claims)).compact

    async def suspend_agent(self, agent_id: str, *, reason: str) -> Accepted:
        """Suspend the agent; its leases end."""
        return await self._command(AgentSuspend, agent_id=agent_id, reason=reason)

    async def resume_agent(self, agent_id: str, *, reason: str) -> Accepted:
        """Resume a suspended agent."""
        return await self._command(AgentResume, agent_id=agent_id, reason=reason)

    async def decommission_agent(self, agent_id: str, *, reason: str) -> Accepted:
        """Decommission the agent for ever. Its id is never given again."""
        return await self._command(AgentDecommission, agent_id=agent_id, reason=reason)

    # --- targets ---

    async def set_target(
        self,
        target_id: str,
        *,
        description: str,
        verbs: Sequence[VerbFloor],
        backend: BackendSettings,
        requests: Sequence[RequestRule] = (),
        max_ttl_s: int = 3600,
        delivery: Delivery | None = None,
        keys: Sequence[AnyKey] = (),
        anyway: bool = False,
        revision: int | None = None,
    ) -> Accepted:
        """Create or replace a target. `keys`: those of its resource server, with which it calls introspection.

        `max_ttl_s`: how long a credential may live at the most, in seconds. `requests`: the map from requests to verbs,
        for a gateway. `delivery`: `gateway` denies all requests for delivery to the agent. None takes `gateway` where
        `requests` is given and the gateway can inject the credential, else `agent`; for kind `http` always `gateway`.

        `anyway`: accept a backend of another package that is not installed here.

        Raises RequestMapError if a rule of `requests` is invalid or has conditions on the stronger verb,
        InvalidCallError if the backend is unknown or does not take these settings; nothing was sent then.
        """
        verbs = instances("verbs", verbs, VerbFloor, '[VerbFloor(verb="read")]')
        requests = instances("requests", requests, RequestRule, "[RequestRule(...)]")
        RequestMap(requests).check_order(verbs)
        wrong = backend_problem(backend, anyway=anyway)
        if wrong := wrong or (delivery_problem(backend, delivery) if delivery else None):
            raise InvalidCallError(wrong)
        return await self._command(
            TargetSet,
            target_id=target_id,
            description=description,
            backend=backend,
            verbs=verbs,
            requests=requests,
            max_ttl_s=max_ttl_s,
            delivery=delivery,
            keys=self.key_records(keys),
            revision=revision,
        )

    async def remove_target(self, target_id: str, *, reason: str) -> Accepted:
        """Remove the target: nothing more is issued for it, and its leases end."""
        return await self._command(TargetRemove, target_id=target_id, reason=reason)

    # --- tasks ---

    def terms(
        self,
        agent_id: str,
        *,
        purpose: str,
        scope: Sequence[Permission],
        ends_in_s: int | None = None,
        not_after: int | None = None,
        limits: ModelLimits | None = None,
    ) -> TaskTerms:
        """Build the terms of a task. Nothing is sent. Raises InvalidCallError where they cannot be.

        Give its end as one of `ends_in_s` (seconds from now) and `not_after` (seconds since 1970). `limits`: of what it
        uses of models.
        """
        return task_terms(
            agent_id, purpose, scope, self._now_s(), ends_in_s=ends_in_s, not_after=not_after, limits=limits
        )

    async def preview(self, terms: TaskTerms, *, on_behalf_of: str | None = None) -> Preview:
        """Preview what a task would allow, and what each limit removes from it.

        See `ringfence.client.admin.preview`.
        """
        return preview(
            await self.directory(),
            terms,
            on_behalf_of or self._user_id("say on behalf of whom"),
            now_s=self.connection.clock.now_ms() / 1000,
            entitlements_max_age_s=self.connection.settings.entitlements_max_age_s,
        )

    async def unknown_names(self, scope: Sequence[Permission]) -> list[str]:
        """Return sentences about targets, and verbs of targets, in a ceiling or an entitlement that do not exist
        now.
        """
        scope = permissions("scope", scope)
        return unknown_names(await self.connection.targets(), scope) if scope else []

    async def consent_to_task(self, terms: TaskTerms, *, life_s: int = 3600) -> str:
        """Sign the terms of a task that somebody else assigns on this user's behalf, and who embeds the signature.

        `life_s`: for how many seconds it counts; by a passkey for ten minutes at most.
        """
        self._user_id("the root consents to no tasks")
        require_understood(terms, "the terms of the task")
        claims = self.connection.compose(TaskConsent, life_s=self._consent_life_s(life_s), terms=terms)
        return (await self.connection.sign(claims)).compact

    def _consent_life_s(self, life_s: int) -> int:
        """How long a consent counts from now: the person with a passkey takes the time to sign it first."""
        return min(life_s, LIFE_S if self.connection.passkey_user else MAX_LIFE_S)

    async def assign_task(
        self,
        agent_id: str,
        *,
        purpose: str,
        scope: Sequence[Permission],
        ends_in_s: int | None = None,
        not_after: int | None = None,
        on_behalf_of: str | None = None,
        consent: str | None = None,
        limits: ModelLimits | None = None,
    ) -> str:
        """Assign a task; returns its id.

        `on_behalf_of` is whoever signs where None. For another user, `consent` is their `consent_to_task` over the very
        same terms (use `assign_terms`, so that they are). `limits`: of what the task uses of models.
        """
        terms = self.terms(
            agent_id, purpose=purpose, scope=scope, ends_in_s=ends_in_s, not_after=not_after, limits=limits
        )
        return await self.assign_terms(terms, on_behalf_of=on_behalf_of, consent=consent)

    async def assign_terms(
        self,
        terms: TaskTerms,
        *,
        on_behalf_of: str | None = None,
        consent: str | None = None,
        id_token: str | None = None,
    ) -> str:
        """Assign a task of these terms; returns its id. See `assign_task`.

        `id_token`, in place of `consent`: an OIDC ID token of the user, with the nonce of the terms
        (`ringfence.nonce_of`).
        """
        accepted = await self._command(
            TaskAssign,
            terms=terms,
            on_behalf_of=on_behalf_of or self._user_id("the root assigns no tasks"),
            consent=consent,
            id_token=id_token,
        )
        return accepted.command_id

    async def end_task(self, task_id: str, *, reason: str) -> Accepted:
        """End a task; its leases end."""
        return await self._command(TaskEnd, task_id=task_id, reason=reason)

    # --- leases ---

    async def revoke(
        self,
        *,
        reason: str,
        lease_id: str | None = None,
        agent_id: str | None = None,
        task_id: str | None = None,
        sponsor: str | None = None,
        target_id: str | None = None,
        user_id: str | None = None,
        all: bool = False,
    ) -> Accepted:
        """Revoke one lease, or all that one condition covers: give exactly one, or `all`.

        Args:
            lease_id: one lease; it may come with the `agent_id` of who holds it.
            agent_id, task_id, sponsor, target_id: all leases of it.
            user_id: all leases on behalf of this user.

        A condition covers every lease whose request was made before. Raises InvalidCallError unless exactly one is
        given.
        """
        conditions = {
            "agent_id": agent_id, "task_id": task_id, "sponsor": sponsor, "target_id": target_id, "user_id": user_id
        }  # fmt: skip
        selector = None
        if lease_id is None:
            with checked("the revocation"):
                selector = Selector(**conditions, all=all)
        elif task_id or sponsor or target_id or user_id or all:
            raise InvalidCallError("the revocation: name a lease or a condition, and not both")
        claims = self.connection.compose(
            RevocationRequest, kind="revocation", lease_id=lease_id, selector=selector, reason=reason
        )
        signed = await self.connection.sign(claims, await self._lease_evidence(lease_id))
        return await self._outcomes.send(
            signed, key=(agent_id or lease_id) if lease_id else None, timeout_s=self.timeout_s,
            timeout_hint=UNKNOWN_OUTCOME if lease_id else _REVOCATION_TIMEOUT_HINT,
        )  # fmt: skip

    async def _lease_evidence(self, lease_id: str | None) -> Mapping[str, str]:
        """For the sign page: the record of a lease that is to be revoked."""
        if lease_id is None or self.connection.passkey_user is None:
            return {}
        from ringfence.client.kafka_lookups import find_lease

        record = await find_lease(self.connection, lease_id)
        return {"lease": record} if record else {}

    # --- runs ---

    async def order_run(
        self,
        task_id: str,
        *,
        pool: str,
        command: Sequence[str],
        limits: RunLimits,
        ttl_s: int,
        mounts: Sequence[Mount] = (),
        image: str | None = None,
        valid_s: int = ORDER_LIFE_S,
        labels: Mapping[str, str] | None = None,
    ) -> OrderedRun:
        """Order a run of a task's agent in a pool. Returns once Kafka has the order; a runner of the pool takes it.

        Args:
            command: the program, and its arguments.
            ttl_s: how long the run may take, in seconds.
            limits: the most processor, memory and processes; None: what the pool has as its own.
            mounts: folders, by the names that the pool has for them.
            image: the digest of a container image; None: the pool's default.
            valid_s: how long the order may wait, in seconds.
            labels: labels that the pool must have. `ReadApi.pools` finds such a pool.

        Raises RefusedError if, by the current records, no runner would accept it.
        """
        words = texts("command", command)
        folders = instances("mounts", mounts, Mount, '[Mount(name="sources")]')
        directory = await self.connection.current_directory()
        task = directory.task(task_id)
        if task is None:
            raise InvalidCallError(f"there is no task {task_id}").with_remedy("ringfence task list")
        order = self.connection.compose(
            RunOrder,
            life_s=valid_s,
            pool=pool,
            agent_id=task.state.agent_id,
            task_id=task_id,
            command=words,
            image=image,
            mounts=folders,
            limits=limits,
            ttl_s=ttl_s,
            labels=dict(labels) if labels else None,
        )
        verdict = check_order(
            order, self.connection.key.kid, directory, self.connection.clock.now_ms() / 1000
        )
        if isinstance(verdict, Refused):
            raise RefusedError(order.typ, (verdict.reason,), "client")
        order_id = order_id_of(order)
        await self.connection.publish(RUN_ORDER, pool, order)
        return OrderedRun(order_id, run_id_of("", order_id=order_id), order.agent_id)

    async def stop_run(
        self,
        run_id: str,
        *,
        reason: str,
        agent_id: str | None = None,
        task_id: str | None = None,
        ordered_by: str | None = None,
    ) -> None:
        """Order the end of a run (`run_id`), or of an order that waits. Returns once Kafka has it; the runner decides.

        `agent_id`, `task_id`, `ordered_by`: of the run, if they are known. Then RefusedError is raised if the caller
        may not stop it, by the records as they are now.
        """
        stop = self.connection.compose(RunStop, run_id=run_id, reason=reason)
        if agent_id is not None and task_id is not None:
            directory = await self.connection.current_directory()
            verdict = check_stop(stop, directory, agent_id=agent_id, task_id=task_id, ordered_by=ordered_by)
            if isinstance(verdict, Refused):
                raise RefusedError(stop.typ, (verdict.reason,), "client")
        await self.connection.publish(RUN_ORDER, run_id, stop)

    # --- ---

    def key_records(self, keys: Sequence[AnyKey]) -> tuple[KeyRecord, ...]:
        """Return keys in the form of commands. A key without an end is valid for a year."""
        return self._key_records(keys, KEY_LIFE_S)

    def _key_records(self, keys: Sequence[AnyKey], life_s: int) -> tuple[KeyRecord, ...]:
        end = self._now_s() + life_s
        given = instances(
            "keys", keys, (SigningKey, PublicJwk, KeyRecord), '[SigningKey.load(Path("agent.json"))]'
        )
        return tuple(_record(key, end) for key in given)

    def _now_s(self) -> int:
        return self.connection.clock.now_ms() // 1000

    async def _command(self, model: type[ExpiringClaims], **fields: Any) -> Accepted:
        try:
            return await super()._command(model, **fields)
        except RefusedError as error:
            raise await self._with_suggestion(error, fields) from None

    async def _with_suggestion(self, error: RefusedError, fields: Mapping[str, Any]) -> RefusedError:
        """Return the refusal of a command about an unknown subject, with the closest id that there is."""
        kind = _UNKNOWN_SUBJECTS.get(error.code)
        id = fields.get(f"{kind}_id")
        if kind is None or not isinstance(id, str):
            return error
        try:
            near = similar_id(await self.connection.directory(), kind, id)
        except RingfenceError:
            return error  # the refusal says what matters
        first, *others = error.reasons
        first = first.model_copy(update={"message": first.message + near})
        return RefusedError(error.command, (first, *others), error.by)

    def _user_id(self, remedy: str) -> str:
        if self.is_root:
            raise IdentityError(f"the root is no user: {remedy}")
        return self.id


def _selectors(attestation: Sequence[AttestationSelector]) -> tuple[AttestationSelector, ...]:
    return instances("attestation", attestation, AttestationSelector, "[AttestationSelector(...)]")


def _record(key: AnyKey, end: int) -> KeyRecord:
    if isinstance(key, KeyRecord):
        return key
    if isinstance(key, SigningKey):
        return key.record(end)
    return KeyRecord(kid=thumbprint(key), jwk=key, not_after=end)
