"""Revocations: verifies who signed one, and judges whether they may. Revokers and gateways act on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.crypto.jws import Signed, parse, verify
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.crypto.webauthn import VerificationKey
from ringfence.messages.codes import Code
from ringfence.messages.credential import Coordinates
from ringfence.messages.lease import EndCause, EndKind, Lease, RevocationRequest
from ringfence.messages.registry import AnyState
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory, VerifiedRecord
from ringfence.model.records.instances import enrolment_of, keys_of_agents
from ringfence.model.verdict import ALLOWED, Verdict, refused

if TYPE_CHECKING:  # rules use this module, and import nothing that does I/O
    from ringfence.kernel.kafka.record import Received

S = TypeVar("S", bound=AnyState)

BY_USERS: frozenset[EndKind] = frozenset({"revocation"})
BY_AGENTS: frozenset[EndKind] = frozenset({"release"})
BY_SERVICES: frozenset[EndKind] = frozenset(
    {
        "revocation",
        "task_ended",
        "agent_suspended",
        "agent_decommissioned",
        "user_disabled",
        "target_removed",
        "scope_narrowed",
        "key_compromised",
        "agent_orphaned",
        "run_ended",
    }
)


@dataclass(frozen=True, slots=True)
class Revocation:
    """A verified revocation, and its position on Kafka."""

    signed: Signed[RevocationRequest]
    at: Coordinates
    traceparent: str | None = None

    @property
    def claims(self) -> RevocationRequest:
        return self.signed.claims

    @property
    def id(self) -> str:
        """Return the id of the revocation: the same for the same message at any position."""
        return derived_id("revocation", self.claims.iss, self.claims.jti)

    def cause(self) -> EndCause:
        """The cause in the records of the leases that it ends."""
        claims = self.claims
        return EndCause(
            kind=claims.kind,
            at_ms=self.at.appended_at_ms,
            by=claims.iss,
            ref=claims.jti,
            reason=claims.reason,
        )


def check_revocation(revocation: Revocation, lease: Lease | None, directory: Directory) -> Verdict:
    """Check that the signer of a revocation may ask for it. `lease`: the one that it names, if Redis knows it.

    1. An end of this kind is for an agent, a user or a service to ask for, whichever the signer is.
    2. The lease that it names is known.
    3. An agent gives back only its own leases, and a run only those of the run.
    4. A user is entitled to revoke the lease or those that the selector describes.

    A person must be entitled when Kafka appends the revocation, or later. So a revocation that was valid once stays
    valid for every reader, whatever the registry accepts after it. A gateway that acknowledged it may start again, and
    a slow revoker may read it after a transfer.
    """
    claims = revocation.claims
    agent_id = subject_of(claims.aud, claims.iss, "agent")
    user_id = subject_of(claims.aud, claims.iss, "user")
    kinds = BY_AGENTS if agent_id else BY_USERS if user_id else BY_SERVICES
    if claims.kind not in kinds:
        return refused(Code.KIND_UNEXPECTED, f"{claims.iss} may not ask for an end of kind {claims.kind}")
    if claims.lease_id is not None and lease is None:
        return refused(Code.LEASE_UNKNOWN, f"there is no lease {claims.lease_id}, or it ended long ago")
    if agent_id is None and user_id is None:
        return ALLOWED  # a service: its signature was accepted for its role
    if agent_id is not None:
        entitled = lease is not None and lease.agent_id == agent_id and not _is_of_another_run(claims, lease)
        rule = "an agent gives back its own leases only, and a run those of the run"
    else:
        entitled = _user_may(user_id or "", revocation, lease, directory)
        rule = (
            "leases are revoked by the sponsor of an agent that acts, the task's assigner, the user they are on "
            "behalf of, or an operator"
        )
    return ALLOWED if entitled else refused(Code.NOT_ENTITLED, rule)


def _is_of_another_run(claims: RevocationRequest, lease: Lease) -> bool:
    """Whether the instance of a run signed, and the lease is not of that run."""
    enrolment = enrolment_of(claims)
    if enrolment is None or enrolment.run is None:
        return False
    run = lease.instance.run if lease.instance is not None else None
    return run is None or run.run_id != enrolment.run.run_id


def _user_may(user_id: str, revocation: Revocation, lease: Lease | None, directory: Directory) -> bool:
    selector, since_ms = revocation.claims.selector, revocation.at.appended_at_ms
    try:
        states = _states_since(
            directory.user(user_id), since_ms, lambda at_ms: directory.chains.user_at(user_id, at_ms)
        )
        active = [user for user in states if user.status == "active"]
        if not active:
            return False
        if any("operator" in user.roles for user in active):
            return True
        if lease is not None:
            held = [(lease.agent_id, lease.task_id)]
            held += [(one.agent_id, one.task_id) for one in lease.delegators or ()]
            return user_id == lease.on_behalf_of or any(
                _answers_for(user_id, since_ms, directory, agent_id=agent_id, task_id=task_id)
                for agent_id, task_id in held
            )
        if selector is None:
            return False
        return user_id in (selector.sponsor, selector.user_id) or _answers_for(
            user_id, since_ms, directory, agent_id=selector.agent_id, task_id=selector.task_id
        )
    except ChainError:
        return False


def _answers_for(
    user_id: str, since_ms: int, directory: Directory, *, agent_id: str | None, task_id: str | None
) -> bool:
    """Whether the user sponsors the agent (or the task's), or did since then, or the task is theirs.

    A task is theirs if they assigned it, or if it is on their behalf; neither ever changes.
    """
    task = directory.task(task_id) if task_id is not None else None
    if task is not None and user_id in (task.state.assigned_by, task.state.on_behalf_of):
        return True
    agent_id = agent_id or (task.state.agent_id if task else "")
    agents = _states_since(
        directory.agent(agent_id), since_ms, lambda at_ms: directory.chains.agent_at(agent_id, at_ms)
    )
    return any(agent.sponsor == user_id for agent in agents)


def _states_since(
    entry: VerifiedRecord[S] | None, since_ms: int, state_before: Callable[[int], S | None]
) -> Iterator[S]:
    """The states of a user or an agent from `since_ms` on, the present one first. Nearly always it is the only one.

    `state_before` returns the state just before a time in ms. Each later command ended one of the states.
    """
    if entry is None:
        return
    yield entry.state
    for command in entry.record.commands:
        if command.appended_at_ms >= since_ms:
            state = state_before(command.appended_at_ms)
            if state is not None:
                yield state


def agent_of_task(task_id: str, directory: Directory) -> str | None:
    """The only agent that has leases of a task; None if it is not known.

    A task belongs to one agent for good, and no other gets a credential for it. For delegated parts see `Delegations`.
    """
    try:
        task = directory.task(task_id)
    except ChainError:
        return None
    return task.state.agent_id if task is not None else None


def verify_revocation(record: Received, directory: Directory, trust: TrustStore) -> Revocation:
    """Verify that a known agent, user or service signed a revocation, and return it. Raises InvalidMessageError.

    The key of a user who was disabled after that counts as well. A service's signature also counts after the trust
    bundle has expired. Otherwise its revocation would wait for the next bundle, and people's revocations behind it.
    Ending a lease gives nobody anything.
    """
    at_s, jws = record.appended_at_ms / 1000, parse(record.value)
    agents = keys_of_agents(directory, jws, RevocationRequest, at_s)

    def find(iss: str, kid: str) -> VerificationKey | None:
        try:
            return (
                agents(iss, kid)
                or directory.user_key(iss, kid, at_s)
                or directory.chains.user_key(iss, kid, record.appended_at_ms)
                or trust.service_key(iss, kid, RevocationRequest.signed_by, trust.no_later_s(at_s))
            )
        except ChainError:
            return None

    signed = verify(jws, RevocationRequest, find, audience=trust.trust_domain)
    return Revocation(signed, record.coordinates, record.traceparent)
