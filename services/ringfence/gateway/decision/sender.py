"""Authentication of senders: by their task's unix socket, mTLS, or a lease handle with a DPoP proof (RFC 9449).

Detects agent keys that two addresses use at the same time, from DPoP proofs, and reports them as findings.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable

import orjson
from pydantic import ValidationError

from ringfence.client.errors import TokenRejectedError
from ringfence.client.resource_server.dpop_proofs import MAX_PROOF_BYTES, ProofChecker
from ringfence.gateway.contract import Attempt, PresentedIdentity
from ringfence.gateway.domain import UNAUTHORIZED, Leases, Refusal, Sender, refuse
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import RingfenceError, UnavailableError
from ringfence.kernel.crypto.keys import b64decode, thumbprint
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.base import UUID, PublicJwk
from ringfence.messages.codes import Code
from ringfence.messages.credential import Reason
from ringfence.messages.lease import Lease
from ringfence.messages.operations import ActionDecided
from ringfence.messages.registry import AgentRecord
from ringfence.model.identity.spiffe_ids import SubjectKind, spiffe_id, subject_of
from ringfence.model.records.agent_keys import WINDOW_MS, KeyUses
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.verdict import ALLOWED, Allowed

log = logging.getLogger(__name__)

_MAX_QUEUED = 1000


class SharedKeys:
    """Detects without an await, and reports in the background: no request is delayed."""

    def __init__(self, runtime: Runtime, uses: KeyUses) -> None:
        self._runtime = runtime
        self._uses = uses
        self._findings: asyncio.Queue[tuple[str, str, str, str, int]] = asyncio.Queue(_MAX_QUEUED)

    def used(self, agent_id: str, kid: str, address: str | None) -> None:
        """Note a valid proof by a key, and the sender's address."""
        at_ms = self._runtime.clock.now_ms()
        other_address = self._uses.saw(agent_id, kid, address, at_ms)
        if other_address is not None and address is not None and not self._findings.full():
            self._findings.put_nowait((agent_id, kid, address, other_address, at_ms))

    async def report(self) -> None:
        while True:
            sharing = await self._findings.get()
            try:
                await self._report(*sharing)
            except (RingfenceError, OSError) as error:
                log.warning("a shared key of agent %s was not reported: %s", sharing[0], error)

    async def _report(self, agent_id: str, kid: str, address: str, other_address: str, at_ms: int) -> None:
        message = (
            f"the key {kid} of agent {agent_id} is used from {address} and {other_address} at once, so that nobody can "
            "tell what which of them did; give each a key of its own, or let instances enrol theirs"
        )
        await self._runtime.event(
            "finding",
            ActionDecided.__name__,
            about=("key_shared", agent_id, kid, at_ms // WINDOW_MS),
            reasons=(Reason(code=Code.KEY_SHARED, message=message),),
            actor=spiffe_id(self._runtime.settings.trust_domain, "agent", agent_id),
            agent_id=agent_id,
        )


class AgentKeys:
    """An index from key thumbprints to agents. It holds unverified records: what it finds is verified afterwards."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._owners: dict[str, str] = {}
        directory.on_change(self._on_change)

    def owner(self, trust_domain: str, kid: str, at_s: float) -> str | None:
        """The agent whose key this is and counts at `at_s`, or None."""
        agent_id = self._owners.get(kid)
        if agent_id is None:
            return None
        try:
            key = self._directory.agent_key(spiffe_id(trust_domain, "agent", agent_id), kid, at_s)
        except ChainError:
            return None
        return agent_id if key is not None else None

    def _on_change(self, kind: SubjectKind, id: str) -> None:
        record = self._directory.unverified(kind, id) if kind == "agent" else None
        if isinstance(record, AgentRecord):
            for key in record.state.keys:
                self._owners[key.kid] = id


class SenderAuthenticator:
    """Authenticates senders of requests."""

    def __init__(
        self,
        trust_domain: str,
        directory: Directory,
        leases: Leases,
        proofs: ProofChecker,
        clock: Clock,
        on_use: Callable[[str, str, str | None], None] = lambda agent_id, kid, address: None,
    ) -> None:
        """`on_use` is called for each valid proof with the agent, its key's thumbprint, and the peer address."""
        self._trust_domain = trust_domain
        self._directory = directory
        self._leases = leases
        self._proofs = proofs
        self._clock = clock
        self._on_use = on_use
        self._keys = AgentKeys(directory)

    def nonce(self) -> str | None:
        return self._proofs.nonce()

    def without_proof(self, presented: PresentedIdentity) -> Sender | None:
        """The sender, if socket or certificate shows it; None otherwise, or if that is not certain."""
        handle = presented.handle
        if handle is not None and not UUID.fullmatch(handle):
            return None
        if presented.task_id is not None:
            sender = self._by_task(presented.task_id, handle, presented.run_id)
        elif presented.certificate is not None:
            sender = self._by_certificate(presented.certificate, handle)
        else:
            return None
        return sender if isinstance(sender, Sender) else None

    async def authenticate(self, presented: PresentedIdentity, attempt: Attempt) -> Sender | Refusal:
        """Authenticate. The strongest evidence counts: the socket, then the certificate, then the handle with its
        proof. The checks:

        1. A handle is a UUID (`handle_malformed`).
        2. On a task's socket: see `_by_task`.
        3. With a client certificate: see `_by_certificate`.
        4. Otherwise there is a handle (`no_credentials`), with a proof (`proof_missing`): see `_by_proof`.
        """
        handle = presented.handle
        if handle is not None and not UUID.fullmatch(handle):
            return refuse(Code.HANDLE_MALFORMED, "a handle is the id of a lease")
        if presented.task_id is not None:
            return self._by_task(presented.task_id, handle, presented.run_id)
        if presented.certificate is not None:
            return self._by_certificate(presented.certificate, handle)
        if handle is None:
            message = "say who you are: Authorization: DPoP LEASE, with a DPoP proof by the agent's key"
            return refuse(Code.NO_CREDENTIALS, message)
        if presented.proof is None or presented.htu is None:
            message = "a handle alone counts on the socket of its task only: send a DPoP proof with it"
            return refuse(Code.PROOF_MISSING, message)
        return await self._by_proof(handle, presented.proof, presented.htu, attempt.method, presented.address)

    def _by_task(self, task_id: str, handle: str | None, run_id: str | None) -> Sender | Refusal:
        """The sender on the socket of a task or run.

        1. The record of the task can be trusted (`record_untrusted`), and there is one (`task_unknown`).
        2. On a run's socket: the run goes on, and is of this task (`_check_run`).
        """
        try:
            task = self._directory.task(task_id)
        except ChainError as error:
            return refuse(Code.RECORD_UNTRUSTED, str(error))
        if task is None:
            return refuse(Code.TASK_UNKNOWN, f"there is no task {task_id}; have one assigned")
        if run_id is not None:
            run = self._check_run(run_id, task_id, task.state.agent_id)
            if isinstance(run, Refusal):
                return run
        return Sender(task.state.agent_id, task_id, handle, run_id)

    def _check_run(self, run_id: str, task_id: str, agent_id: str) -> Allowed | Refusal:
        """Check whether requests on the socket of a run are accepted:

        1. The run goes on (`run_ended`). Its socket may be open for a moment longer.
        2. It is of this agent and task (`run_mismatch`).
        """
        run, now_s = self._directory.runs.get(run_id), self._clock.now_ms() / 1000
        if run is None or not self._directory.runs.goes_on(run_id) or now_s >= run.deadline:
            return refuse(
                Code.RUN_ENDED, f"run {run_id} has ended, and with it everything that its instance may"
            )
        if (run.agent_id, run.task_id) != (agent_id, task_id):
            return refuse(Code.RUN_MISMATCH, f"run {run_id} is of another agent or task")
        return ALLOWED

    def _by_certificate(self, certificate: str, handle: str | None) -> Sender | Refusal:
        """The sender with a client certificate.

        1. The certificate is an agent's (`certificate_unknown`).
        2. The handle, if it is a known lease, is that agent's (`handle_other_agent`).
        """
        agent_id = subject_of(self._trust_domain, certificate, "agent")
        if agent_id is None:
            message = "the certificate is no agent's of this trust domain"
            return refuse(Code.CERTIFICATE_UNKNOWN, message)
        sender = Sender(agent_id, None, handle)
        lease = self._leases.get(handle) if handle is not None else None
        if lease is not None and lease.agent_id != agent_id:
            return _other_agents_handle(lease, agent_id)
        return sender

    async def _by_proof(
        self, handle: str, proof: str, htu: str, method: str, address: str | None
    ) -> Sender | Refusal:
        """The sender with a handle and a DPoP proof (RFC 9449).

        1. The handle is a known lease (`handle_unknown`).
        2. The proof names its key (`invalid_dpop_proof`).
        3. The key is an agent's (`proof_by_stranger`): before verification, so that strangers do not fill the replay
           cache.
        4. The proof is valid (`ProofChecker.check`), except that its nonce may be missing.
        5. The key's agent is the lease's (`handle_other_agent`).
        6. The lease is bound to no other key (`proof_other_key`).
        7. The proof has a nonce, if one is required (`use_dpop_nonce`).
        """
        lease = self._leases.get(handle)
        if lease is None:
            message = "there is no such lease, or it ended long ago"
            return refuse(Code.HANDLE_UNKNOWN, message)
        kid = unverified_thumbprint(proof)
        if kid is None:
            message = "not a proof: a JWT with typ dpop+jwt, alg ES256 or EdDSA and a public jwk"
            return refuse(Code.INVALID_DPOP_PROOF, message)
        now_s = self._clock.now_ms() / 1000
        # The lease's instance first: a record that lists its key for another agent must not take the lease from it.
        owner = (
            _agent_of_instance_key(lease, kid, now_s)
            or self._keys.owner(self._trust_domain, kid, now_s)
            or self._agent_of_renewed_key(lease, kid)
        )
        if owner is None:
            message = "the proof is by a key that is no agent's, or counts no more"
            return refuse(Code.PROOF_BY_STRANGER, message)
        try:
            await self._proofs.check(proof, method=method, url=htu, access_token=handle, thumbprint=kid)
            wants_nonce = False
        except TokenRejectedError as error:
            wants_nonce = error.code == Code.USE_DPOP_NONCE
            if not wants_nonce:
                return refuse(error.code, str(error), status=UNAUTHORIZED)
        except UnavailableError as error:
            return refuse(Code.PROOFS_FULL, str(error))
        if owner != lease.agent_id:
            return _other_agents_handle(lease, owner)
        if lease.key_thumbprint not in (None, kid):
            message = "the lease is bound to another key of the agent: use that, or ask for a new credential"
            return refuse(Code.PROOF_OTHER_KEY, message)
        if wants_nonce:
            message = "make the proof with the nonce of this answer"
            return refuse(Code.USE_DPOP_NONCE, message)
        self._on_use(lease.agent_id, kid, address)
        # A lease of a run names its key: `proof_other_key` has refused any other.
        return Sender(lease.agent_id, lease.task_id, handle, key_proved=lease.key_thumbprint is not None)

    def _agent_of_renewed_key(self, lease: Lease, kid: str) -> str | None:
        """The agent of a lease that was requested with a key that the agent renewed since.

        Such a key proves its own leases and nothing else.
        """
        try:
            agent = self._directory.agent(lease.agent_id) if lease.key_thumbprint == kid else None
        except ChainError:
            return None
        if agent is None or kid in agent.state.compromised:
            return None
        return lease.agent_id if any(one.kid == kid for one in agent.state.renewed) else None


def _agent_of_instance_key(lease: Lease, kid: str, now_s: float) -> str | None:
    """The agent of a lease that an enrolled instance requested with this key. The issuer verified its enrolment."""
    if lease.instance is None or lease.key_thumbprint != kid or now_s >= lease.instance.not_after:
        return None
    return lease.agent_id


def _other_agents_handle(lease: Lease, by: str) -> Refusal:
    """A refusal that is attributed to the agent that showed another agent's handle."""
    message = f"the handle is a lease of agent {lease.agent_id}, and agent {by} showed it"
    return refuse(Code.HANDLE_OTHER_AGENT, message, sender=Sender(by, None, lease.lease_id))


def unverified_thumbprint(proof: str) -> str | None:
    """The thumbprint of the key in a proof's header. The proof is verified against that key next."""
    return _thumbprint_in(proof.partition(".")[0]) if len(proof) <= MAX_PROOF_BYTES else None


@functools.lru_cache(maxsize=1024)
def _thumbprint_in(header: str) -> str | None:
    """Cached, since all proofs of an agent have the same header."""
    try:
        jwk = orjson.loads(b64decode(header))["jwk"]
        return thumbprint(PublicJwk(**{name: jwk[name] for name in ("kty", "crv", "x", "y") if name in jwk}))
    except (ValueError, TypeError, KeyError, IndexError, ValidationError):
        return None
