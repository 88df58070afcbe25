"""Checks a request against the verified records: the invariant of the design, for policy and issuer. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.jws import Signed, kid_of
from ringfence.messages.base import Permission, Scope
from ringfence.messages.codes import AnyCode, Code, ReceivedCode, inactive_agent
from ringfence.messages.credential import CredentialRequest, DelegatorRevisions, Delivery, Reason, Revisions
from ringfence.messages.enrolment import InstanceEnrolment
from ringfence.messages.lease import Delegator
from ringfence.messages.registry import (
    AgentRegister,
    AgentState,
    AgentTransfer,
    AnyState,
    ApprovalClass,
    TargetState,
    TaskState,
    UserState,
)
from ringfence.messages.run import Run
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.lifecycle import hold_of, hold_text
from ringfence.model.records.command_chain import ChainError, unverified_command
from ringfence.model.records.directory import Directory, VerifiedRecord
from ringfence.model.records.instances import check_enrolment, enrolment_of, ref_of
from ringfence.model.records.runs import run_violations
from ringfence.model.scope.globs import ScopeError
from ringfence.model.scope.rule import Limit, are_in_force, exceeding, limits_of
from ringfence.model.scope.scope import validate_scope
from ringfence.model.unknown_fields import is_understood, names_of, unknown_fields
from ringfence.model.verdict import ALLOWED, Refused, Verdict

_CACHED_SCOPES = 512
"""Each cache entry keeps the records that it was computed from in memory, though newer ones may have followed."""


class DeniedError(RingfenceError):
    """A request that cannot be evaluated, because something that it names does not exist. `reason` says what."""

    code = Code.DENIED

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.message, code=ReceivedCode(reason.code))
        self.reason = reason


@dataclass(frozen=True, slots=True)
class DelegationStep:
    """One step of a delegation chain: an agent that handed on its task, its sponsor, and the task."""

    agent: VerifiedRecord[AgentState]
    sponsor: VerifiedRecord[UserState] | None
    task: VerifiedRecord[TaskState]
    kid: str
    """The key that signed the delegation."""
    vouchers: Verdict = ALLOWED
    """Whether that key rests on no compromised key (`Directory.check_vouchers`)."""


@dataclass(frozen=True, slots=True)
class RecordContext:
    """The verified records that a request, or a grant, is checked against."""

    agent: VerifiedRecord[AgentState]
    sponsor: VerifiedRecord[UserState] | None
    task: VerifiedRecord[TaskState]
    user: VerifiedRecord[UserState]
    target: VerifiedRecord[TargetState]
    delegations: tuple[DelegationStep, ...] = field(default=(), kw_only=True)
    """How the task was delegated to its agent, if it was; the last step first."""

    @property
    def act(self) -> tuple[str, ...]:
        """The ids of the acting agents: first the one that asks, then those that delegated the task."""
        return (self.agent.state.agent_id, *(step.agent.state.agent_id for step in self.delegations))

    @property
    def sponsors(self) -> frozenset[str]:
        """The present and former sponsors of the acting agents. A former sponsor may still have the agent's key."""
        return frozenset().union(*map(_sponsors_of, self._agents))

    def delegators(self) -> tuple[Delegator, ...] | None:
        """The agents that delegated the task, as a lease names them; None if nobody did."""
        found = tuple(
            Delegator(
                agent_id=step.agent.state.agent_id,
                task_id=step.task.state.task_id,
                sponsor=step.agent.state.sponsor,
                key_thumbprint=step.kid,
            )
            for step in self.delegations
        )
        return found or None

    def limits(self, now_s: float, entitlements_max_age_s: int) -> tuple[Limit, ...]:
        """All limits that a request must be within. Entitlements that are too old count for nothing."""
        return _limits_of(
            self.task, self._agents, self.user, entitled=self._entitled(now_s, entitlements_max_age_s)
        )

    def beyond(self, wanted: Scope, now_s: float, entitlements_max_age_s: int) -> tuple[Reason, ...]:
        """A reason for each part of `wanted` that exceeds a limit."""
        return _beyond(
            wanted,
            self.task,
            self._agents,
            self.user,
            entitled=self._entitled(now_s, entitlements_max_age_s),
        )

    @property
    def _agents(self) -> tuple[VerifiedRecord[AgentState], ...]:
        return (self.agent, *(step.agent for step in self.delegations))

    def _entitled(self, now_s: float, entitlements_max_age_s: int) -> bool:
        return are_in_force(self.user.state.entitlements, now_s, entitlements_max_age_s)

    def revisions(self, policy: str) -> Revisions:
        """The revisions of the records and of the policy bundle that an approval or a decision is based on."""
        return Revisions(
            agent=self.agent.named_revision,
            user=self.user.named_revision,
            task=self.task.revision,
            target=self.target.revision,
            policy=policy,
            delegators=tuple(
                DelegatorRevisions(agent=step.agent.named_revision, task=step.task.revision)
                for step in self.delegations
            )
            or None,
        )


@dataclass(frozen=True, slots=True)
class RequestContext(RecordContext):
    """A request, and the verified records that it is checked against."""

    request: Signed[CredentialRequest]
    request_id: str
    instance: InstanceEnrolment | None = None
    """The running instance that asks, if it is one."""
    run: Run | None = None
    """The run that the instance is of, if it is of one that is there."""
    vouchers: Verdict = ALLOWED
    """Whether the key of the request rests on no compromised key (`Directory.check_vouchers`)."""

    @property
    def not_after(self) -> int:
        """The latest end of the credential, in seconds: the end of the task, or of the instance's key."""
        task_end: int = self.task.state.not_after
        return min(task_end, self.instance.key.not_after) if self.instance else task_end

    @property
    def delivery(self) -> Delivery:
        """To whom the credential goes: as the request says, or else as the target does."""
        return self.request.claims.delivery or self.target.state.delivery

    @property
    def break_glass(self) -> bool:
        """Whether the agent asks for an exception that policy denies, and that two operators may allow once."""
        return self.request.claims.break_glass is True

    @property
    def verbs(self) -> frozenset[str]:
        return frozenset(verb for permission in self.request.claims.scope for verb in permission.verbs)

    def floors(self) -> frozenset[ApprovalClass]:
        """The approval classes that the target demands for the requested verbs, whatever policy says."""
        wanted = self.verbs
        return frozenset(v.floor for v in self.target.state.verbs if v.verb in wanted and v.floor != "none")


def load_context(
    directory: Directory, request: Signed[CredentialRequest], request_id: str | None = None
) -> RequestContext:
    """Load the records that a verified request names. Its id is derived if it is not given.

    Raises DeniedError if a record is missing, or if its chain is broken.
    """
    claims = request.claims
    targets = {permission.target for permission in claims.scope}
    if len(targets) != 1:
        raise DeniedError(
            _reason(Code.SEVERAL_TARGETS, "a request is for one target; ask for each with its own request")
        )
    agent_id = subject_of(claims.aud, claims.iss, "agent") or ""
    (target_id,) = targets
    records = load_records(directory, agent_id, claims.task_id, target_id)
    enrolment = enrolment_of(claims)
    signed = request.compact  # what an enforcement point asks is signed by nobody
    vouchers = directory.check_vouchers(claims.iss, kid_of(signed)) if signed else ALLOWED
    return RequestContext(
        records.agent, records.sponsor, records.task, records.user, records.target,
        request, request_id or message_id(claims.iss, claims.jti), enrolment, directory.runs.of(enrolment),
        vouchers, delegations=records.delegations,
    )  # fmt: skip


def load_records(directory: Directory, agent_id: str, task_id: str, target_id: str) -> RecordContext:
    """Load the records for an agent, a task and a target.

    Raises DeniedError if a record is missing, or if its chain is broken.
    """
    try:
        agent = directory.agent(agent_id)
        if agent is None:
            raise DeniedError(_reason(Code.AGENT_UNKNOWN, f"there is no agent {agent_id}"))
        task = directory.task(task_id)
        if task is None:
            raise DeniedError(_reason(Code.TASK_UNKNOWN, f"there is no task {task_id}; have one assigned"))
        user = directory.user(task.state.on_behalf_of)
        if user is None:
            raise DeniedError(_reason(Code.USER_UNKNOWN, f"there is no user {task.state.on_behalf_of}"))
        target = directory.target(target_id)
        if target is None:
            raise DeniedError(_reason(Code.TARGET_UNKNOWN, f"there is no target {target_id}"))
        sponsor = directory.user(agent.state.sponsor)
        delegations = tuple(_delegations(directory, task))
    except ChainError as error:
        raise DeniedError(_reason(Code.RECORD_UNTRUSTED, str(error))) from None
    return RecordContext(agent, sponsor, task, user, target, delegations=delegations)


def _delegations(directory: Directory, task: VerifiedRecord[TaskState]) -> Iterator[DelegationStep]:
    """The delegation chain of a task, the last step first. Verified tasks have chains of bounded length, so this ends.

    Raises DeniedError, ChainError.
    """
    while task.state.parent is not None:
        parent = directory.task(task.state.parent)
        agent = directory.agent(parent.state.agent_id) if parent else None
        if parent is None or agent is None:
            state = task.state
            message = (
                f"task {state.task_id} is a part of {state.parent}, which is not there, or whose agent is not"
            )
            raise DeniedError(_reason(Code.TASK_UNKNOWN, message))
        kid = kid_of(task.record.commands[0].jws)  # no command of a task is dropped
        vouchers = directory.check_vouchers(agent.record.sub, kid)
        yield DelegationStep(agent, directory.user(agent.state.sponsor), parent, kid, vouchers)
        task = parent


def violations(facts: RequestContext, now_s: float, entitlements_max_age_s: int) -> tuple[Reason, ...]:
    """All violations of the invariant by a request, whatever policy says. Empty if there is none.

    `now_s` is a time on the broker's clock, an append time, so that a retry gives the same result.
    """
    admitted = check_enrolment(facts.instance, facts.agent.state) if facts.instance else ALLOWED
    return (
        *_signature(facts),
        *violations_of(facts, facts.request.claims.scope, now_s, entitlements_max_age_s),
        *((admitted.reason,) if isinstance(admitted, Refused) else ()),
        *_of_run(facts, now_s),
    )


def _of_run(facts: RequestContext, now_s: float) -> tuple[Reason, ...]:
    """Violations by the instance of a run: outside its task, or once the run is over."""
    if facts.instance is None:
        return ()
    return run_violations(
        ref_of(facts.instance), facts.run, agent_id=facts.agent.state.agent_id,
        task_id=facts.request.claims.task_id, kid=facts.instance.key.kid, now_s=now_s,
    )  # fmt: skip


def violations_of(
    records: RecordContext, wanted: Scope, now_s: float, entitlements_max_age_s: int
) -> tuple[Reason, ...]:
    """All violations by `wanted`: the scope of a request, or a single action."""
    return (
        *_status_violations(records, wanted, now_s),
        *records.beyond(wanted, now_s, entitlements_max_age_s),
    )


def _signature(facts: RequestContext) -> tuple[Reason, ...]:
    """A violation if the request is signed with a compromised key, or with one that rests on such a key.

    Whoever had the key may have made the request, though the key was valid when it was appended.
    """
    agent, compact = facts.agent.state, facts.request.compact
    if compact and kid_of(compact) in agent.compromised:
        return (key_compromised(agent.agent_id),)
    if isinstance(facts.vouchers, Refused):
        message = f"{facts.vouchers.reason.message}; sign the request with another key"
        return (_reason(Code.KEY_VOUCHER_COMPROMISED, message),)
    return ()


def key_compromised(agent_id: str) -> Reason:
    """The reason for refusing what rests on a compromised key."""
    message = (
        f"it was asked for with a key of agent {agent_id} that is compromised; ask anew with the new one"
    )
    return _reason(Code.KEY_COMPROMISED, message)


def _status_violations(records: RecordContext, wanted: Scope, now_s: float) -> list[Reason]:
    found: list[Reason] = []
    agent, task, user, target = (
        records.agent.state,
        records.task.state,
        records.user.state,
        records.target.state,
    )
    found += _held(records)
    found += _agent_violations(agent, records.sponsor)
    for step in records.delegations:
        found += _agent_violations(step.agent.state, step.sponsor)
        if step.kid in step.agent.state.compromised:
            message = (
                f"the task was handed on with a key of agent {step.agent.state.agent_id} that is compromised"
            )
            found.append(_reason(Code.KEY_COMPROMISED, message))
        elif isinstance(step.vouchers, Refused):
            why = step.vouchers.reason.message
            message = f"the task was handed on with a key that gives nothing: {why}"
            found.append(_reason(Code.KEY_VOUCHER_COMPROMISED, message))
        above = step.task.state
        if above.status != "active" or above.not_after <= now_s:
            message = (
                f"task {above.task_id} of agent {above.agent_id} has ended, and with it every part of it"
            )
            found.append(_reason(Code.TASK_ENDED, message))
    if task.agent_id != agent.agent_id:
        found.append(_reason(Code.TASK_OTHER_AGENT, f"task {task.task_id} was assigned to another agent"))
    if task.status != "active" or task.not_after <= now_s:
        found.append(_reason(Code.TASK_ENDED, f"task {task.task_id} has ended; have a new one assigned"))
    if user.status != "active":
        found.append(
            _reason(Code.USER_DISABLED, f"user {user.user_id}, whom the task is on behalf of, is disabled")
        )
    if target.status != "active":
        found.append(_reason(Code.TARGET_REMOVED, f"target {target.target_id} was removed"))
    known = {floor.verb: floor for floor in target.verbs}
    for permission in wanted:
        for verb in permission.verbs:
            if verb in known and not is_understood(known[verb]):
                # Passing over the floor would leave the verb without one: it is no verb that anybody could be given.
                message = (
                    f"the floor of {verb} at {target.target_id} has a field that is not known here, and may limit it: "
                    f"{names_of(unknown_fields(known[verb]))}; upgrade, or have an operator set the target without it"
                )
                found.append(_reason(Code.VERB_NOT_UNDERSTOOD, message, permission, "target"))
        unknown = [verb for verb in permission.verbs if verb not in known]
        if unknown:
            message = (
                f"{target.target_id} has no verb {', '.join(unknown)}; it has {', '.join(sorted(known))}"
            )
            found.append(_reason(Code.VERB_UNKNOWN, message, permission, "target"))
    return found


def _held(records: RecordContext) -> Iterator[Reason]:
    """A violation for each record that rests on a compromised key."""
    states: dict[str, AnyState] = {}
    for agent, sponsor, task in (
        (records.agent, records.sponsor, records.task),
        *((step.agent, step.sponsor, step.task) for step in records.delegations),
    ):
        states[f"agent {agent.state.agent_id}"] = agent.state
        states[f"task {task.state.task_id}"] = task.state
        if sponsor is not None:
            states[f"user {sponsor.state.user_id}"] = sponsor.state
    states[f"user {records.user.state.user_id}"] = records.user.state
    states[f"target {records.target.state.target_id}"] = records.target.state
    for what, state in states.items():
        if (hold := hold_of(state)) is not None:
            yield _reason(Code.RESTS_ON_COMPROMISED, hold_text(what, hold))


def _agent_violations(agent: AgentState, sponsored_by: VerifiedRecord[UserState] | None) -> Iterator[Reason]:
    """Violations that concern one agent of the chain, whatever is wanted."""
    if agent.status != "active":
        yield _reason(inactive_agent(agent.status), f"agent {agent.agent_id} is {agent.status}")
    sponsor = sponsored_by.state if sponsored_by else None
    if sponsor is None or sponsor.status != "active" or "sponsor" not in sponsor.roles:
        message = (
            f"the sponsor {agent.sponsor} of {agent.agent_id} is no active sponsor; transfer the agent first"
        )
        yield _reason(Code.AGENT_ORPHANED, message)


@lru_cache(maxsize=_CACHED_SCOPES)
def _sponsors_of(agent: VerifiedRecord[AgentState]) -> frozenset[str]:
    """The present and former sponsors of an agent: its record keeps every transfer."""
    commands = map(unverified_command, agent.record.commands)
    named = (one.sponsor for one in commands if isinstance(one, AgentRegister | AgentTransfer))
    return frozenset((agent.state.sponsor, *named))


def _limits_of(
    task: VerifiedRecord[TaskState],
    agents: Sequence[VerifiedRecord[AgentState]],
    user: VerifiedRecord[UserState],
    *,
    entitled: bool,
) -> tuple[Limit, ...]:
    return limits_of(
        task.state.scope,
        [(agent.state.agent_id, agent.state.ceiling) for agent in agents],
        user.state.user_id,
        user.state.entitlements.scope if entitled else (),
    )


@lru_cache(maxsize=_CACHED_SCOPES)
def _beyond(
    wanted: Scope,
    task: VerifiedRecord[TaskState],
    agents: tuple[VerifiedRecord[AgentState], ...],
    user: VerifiedRecord[UserState],
    *,
    entitled: bool,
) -> tuple[Reason, ...]:
    """Cached by all that the result depends on: agents repeat the same requests on the same records."""
    try:
        validate_scope(wanted)
    except ScopeError as error:
        return (_reason(Code.SCOPE_INVALID, str(error)),)
    found: list[Reason] = []
    for excess in exceeding(wanted, _limits_of(task, agents, user, entitled=entitled)):
        verbs, resources = ", ".join(excess.permission.verbs), ", ".join(excess.permission.resources)
        names = f"{verbs} on {resources} at {excess.permission.target}"
        found.append(
            _reason(
                Code.BEYOND_SCOPE, f"{excess.limit} does not allow {names}", excess.permission, excess.limit
            )
        )
    return tuple(found)


def _reason(
    code: AnyCode, message: str, permission: Permission | None = None, side: str | None = None
) -> Reason:
    # A scope of many long globs is longer than a message may be; `permission` names it whole.
    short = message if len(message) <= 1000 else f"{message[:997]}..."
    return Reason(code=code, message=short, permission=permission, side=side)
