"""The HTTP API for agents: publishes posted messages, returns sealed replies, and shows an agent its tasks.

It serves `POST /v1/requests`, `GET /v1/requests/ID`, `GET /v1/tasks/ID` and `GET /v1/trust`. It verifies the sender
of a message, decides nothing else, and cannot read a reply. Over a task's socket it accepts only that task's
messages, over a run's socket only those of its instance. Elsewhere each call needs a DPoP proof (RFC 9449) by the key
that signed the message. The view of a task has its terms, and the leases that requests through this gateway may use.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import parse_qsl

import orjson

from ringfence.client.errors import TokenRejectedError
from ringfence.client.resource_server.dpop_proofs import ProofChecker
from ringfence.gateway.agent_api.publications import (
    MAX_BYTES,
    PostedMessage,
    PostedMessageVerifier,
    Publication,
    Publications,
)
from ringfence.gateway.agent_api.replies import SealedReplies, WaitingRequests
from ringfence.gateway.contract import Answer, ApiRequest, PresentedIdentity
from ringfence.gateway.dataplane.limits import SenderLimits
from ringfence.gateway.decision.sender import AgentKeys, unverified_thumbprint
from ringfence.gateway.domain import run_id_of_lease
from ringfence.gateway.state.leases import LeaseTable
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import InvalidMessageError, UnavailableError
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.http1.head import RequestRefusedError, problem_answer
from ringfence.kernel.tracing.api import well_formed
from ringfence.messages.base import UUID, Scope
from ringfence.messages.codes import Code, ReceivedCode
from ringfence.messages.credential import CredentialRequest, RequestWithdraw
from ringfence.messages.lease import RevocationRequest
from ringfence.messages.registry import AgentRenewKey, TaskState
from ringfence.messages.run import Run
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.lifecycle import CommandRefusedError
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.records.instances import enrolment_of
from ringfence.model.verdict import ALLOWED, Refused, Verdict, refused


def task_view(task: TaskState, leases: LeaseTable, run_id: str | None, now_s: float) -> dict[str, Any]:
    """The task as JSON. It holds no secret: leases are named by their ids, which are their handles.

    `run_id`: of the socket that the call came through. Then only leases of that run are listed, as only they count
    there.
    """
    targets = dict.fromkeys(permission.target for permission in task.scope)
    usable = [lease for target in targets for lease in leases.usable(task.agent_id, task.task_id, target)]
    return {
        "task_id": task.task_id,
        "agent_id": task.agent_id,
        "purpose": task.purpose,
        "status": "ended" if task.not_after <= now_s else task.status,
        "ends_at": task.not_after,
        "on_behalf_of": task.on_behalf_of,
        "scope": _scope_view(task.scope),
        "leases": [
            {
                "lease_id": lease.lease_id,
                "target": lease.target_id,
                "scope": _scope_view(lease.scope),
                "ends_at": lease.deadline,
            }
            for lease in usable
            if run_id is None or run_id_of_lease(lease) == run_id
        ],
    }


def _scope_view(scope: Scope) -> list[dict[str, Any]]:
    return [permission.model_dump(mode="json") for permission in scope]


JOSE: Final = "application/jose"
MAX_WAIT_S: Final = 60.0
_REQUESTS: Final = "/v1/requests"
_TASKS: Final = "/v1/tasks"
_TRUST: Final = "/v1/trust"
_DURATION: Final = re.compile(r"(?:([0-9]{1,2})m)?(?:([0-9]{1,4})s)?")
_AFTER: Final = re.compile(r"[0-9]{1,4}")
_POLL_AFTER_S: Final = 1
_RENEWED_WITHIN_S: Final = 10.0
_RENEWED_POLL_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class PostedMessages:
    verifier: PostedMessageVerifier
    limits: SenderLimits
    """The limits of each agent's posts."""
    publications: Publications


@dataclass(frozen=True, slots=True)
class AwaitedReplies:
    """The replies, and the requests that wait for one."""

    sealed: SealedReplies
    waiting: WaitingRequests


@dataclass(frozen=True, slots=True)
class CallerProofs:
    """The authentication of callers outside of task sockets."""

    keys: AgentKeys
    checker: ProofChecker
    """That of the whole gateway, so that a proof counts once."""


class AgentRequestsApi:
    """The `AgentApi` of the data plane."""

    def __init__(
        self,
        directory: Directory,
        leases: LeaseTable,
        trust: TrustStore,
        posted: PostedMessages,
        replies: AwaitedReplies,
        proofs: CallerProofs,
        clock: Clock,
    ) -> None:
        self._directory = directory
        self._leases = leases
        self._trust = trust
        self._verifier = posted.verifier
        self._publications = posted.publications
        self._posts = posted.limits
        self._replies = replies.sealed
        self._waiting = replies.waiting
        self._keys = proofs.keys
        self._proofs = proofs.checker
        self._clock = clock

    async def answer(self, request: ApiRequest) -> Answer:
        """Answer one call. Raises RequestRefusedError."""
        if request.path == _REQUESTS:
            _require_method(request, "POST")
            return await self._post(request)
        root, _, id = request.path.rpartition("/")
        if root == _REQUESTS and UUID.fullmatch(id):
            _require_method(request, "GET")
            return await self._get_reply(request, id)
        if root == _TASKS and UUID.fullmatch(id):
            _require_method(request, "GET")
            return await self._get_task(request, id)
        if request.path == _TRUST:
            _require_method(request, "GET")
            return HTTPStatus.OK, {"Content-Type": JOSE, **self._fresh_nonce(request)}, self._trust.compact
        raise RequestRefusedError(
            Code.API_PATH_UNKNOWN, f"there are {_REQUESTS}, {_REQUESTS}/ID, {_TASKS}/ID and {_TRUST} here"
        )

    # --- POST /v1/requests ---

    async def _post(self, request: ApiRequest) -> Answer:
        """Publish a posted message. Raises RequestRefusedError; the checks:

        1. It is announced as a JWS (415), by a caller who shows evidence (401).
        2. It is not too long (413).
        3. It is valid (`PostedMessageVerifier.verify`).
        4. On a run's socket it is of the run's instance; on a task's socket, of that task.
        5. Elsewhere it is of the certificate's agent, if there is one, and comes with a proof by its key.
        6. The rate limits of its agent allow one more call (429).
        7. A message whose time is over is one that was published before.
        8. The limits of its agent's posts allow one more (429).
        9. The registry would take it, if it is the renewal of a key (`_check_renewal`).
        10. Kafka takes it (`Publications.publish`).
        """
        if (request.content_type or "").partition(";")[0].strip().lower() != JOSE:
            raise RequestRefusedError(Code.CONTENT_TYPE_UNEXPECTED, f"post one compact JWS, as {JOSE}")
        self._require_evidence(request.presented)
        body = b"" if (request.length or 0) > MAX_BYTES else await request.read_body(MAX_BYTES)
        if len(body) > MAX_BYTES or (request.length or 0) > MAX_BYTES:
            raise RequestRefusedError(Code.TOO_LARGE, f"a message has at most {MAX_BYTES} bytes")
        message = await self._verifier.verify(body)
        presented = request.presented
        if presented.task_id is not None:
            if presented.run_id is not None:
                self._require_run(presented.run_id, message)
            self._require_task(presented.task_id, message)
        else:
            self._require_certificate_of(message.agent_id, presented)
            if (challenge := await self._check_proof(request, message.kid)) is not None:
                return challenge
        with _attributed_to(message.agent_id):
            self._check_limits(request, message.agent_id)
            if message.late is not None and not self._publications.is_published(message):
                raise RequestRefusedError(message.late.code, message.late.message, status=400)
            self._posts.charge(f"agent:{message.agent_id}")
            renewal = self._check_renewal(message)
            await self._publications.publish(message, well_formed(request.traceparent))
            if isinstance(renewal, Refused):
                raise RequestRefusedError(ReceivedCode(renewal.reason.code), renewal.reason.message)
        if isinstance(message.claims, AgentRenewKey):
            return await self._renewed(request, message, message.claims)
        return self._accepted(request, message)

    def _check_renewal(self, message: PostedMessage) -> Verdict:
        """Check whether the registry would renew the key now.

        Returns the refusal of a renewal that the registry has to see all the same: it proves that a former key is used.
        Raises RequestRefusedError for any other.
        """
        if not isinstance(message.claims, AgentRenewKey):
            return ALLOWED
        compact, at_ms = message.signed.compact, self._clock.now_ms()
        try:
            after = self._directory.chains.agent_after(message.agent_id, compact, at_ms)
        except (CommandRefusedError, InvalidMessageError, ChainError) as error:
            if error.code == Code.KEY_REUSED_LATE:
                return refused(error.code, str(error))
            raise RequestRefusedError(error.code, str(error), status=403) from None
        if after is not None and message.kid in after.compromised:
            return refused(
                Code.KEY_REUSED,
                f"key {message.kid} was renewed before; ask {after.sponsor} for another key of the agent",
            )
        return ALLOWED

    async def _renewed(self, request: ApiRequest, message: PostedMessage, claims: AgentRenewKey) -> Answer:
        """The end of the renewed key (200), or 202 if the registry has not renewed it yet.

        The same bytes may be posted again.
        """
        fields: dict[str, Any] = {"id": message.id}
        headers = {"Content-Type": "application/json", **self._fresh_nonce(request)}
        loop = asyncio.get_running_loop()
        until = loop.time() + _RENEWED_WITHIN_S
        while loop.time() < until:
            entry = self._directory.agent(message.agent_id)
            key = next((one for one in entry.state.keys if one.jwk == claims.key), None) if entry else None
            if key is not None:
                return HTTPStatus.OK, headers, orjson.dumps({**fields, "not_after": key.not_after})
            await asyncio.sleep(_RENEWED_POLL_S)
        return HTTPStatus.ACCEPTED, headers, orjson.dumps(fields)

    def _accepted(self, request: ApiRequest, message: PostedMessage) -> Answer:
        claims, fields = message.claims, {"id": message.id}
        headers = {"Content-Type": "application/json", **self._fresh_nonce(request)}
        if not isinstance(claims, RevocationRequest):  # nobody replies to a release
            id = claims.request_id if isinstance(claims, RequestWithdraw) else message.id
            fields["status"] = headers["Location"] = f"{request.base}{_REQUESTS}/{id}"
        return HTTPStatus.ACCEPTED, headers, orjson.dumps(fields)

    def _require_task(self, task_id: str, message: PostedMessage) -> None:
        """On a task's socket only messages of its agent count, and only those about this task."""
        claims = message.claims
        if self._agent_of(task_id) != message.agent_id:
            raise RequestRefusedError(Code.SOCKET_OTHER_AGENT, "this socket is for the task of another agent")
        about: str | None = None
        if isinstance(claims, CredentialRequest):
            about = claims.task_id
        elif isinstance(claims, RequestWithdraw):
            request = self._publications.find(claims.request_id)
            about = request.task_id if request is not None else None
        elif isinstance(claims, RevocationRequest) and claims.lease_id is not None:
            lease = self._leases.get(claims.lease_id)
            about = lease.task_id if lease is not None else None
        if about is not None and about != task_id:
            raise RequestRefusedError(Code.SOCKET_OTHER_TASK, "this socket is for another task of the agent")

    def _require_run(self, run_id: str, message: PostedMessage) -> None:
        """On a run's socket only messages of its instance count, and only those about what is the instance's own."""
        claims, is_own = message.claims, True
        if isinstance(claims, AgentRenewKey):
            raise RequestRefusedError(
                Code.SOCKET_OTHER_RUN, "the key of a run's instance ends with the run, and is not renewed"
            )
        enrolment = enrolment_of(claims)
        run = enrolment.run if enrolment is not None else None
        self._require_run_key(run_id, message.kid if run is not None and run.run_id == run_id else None)
        if isinstance(claims, RequestWithdraw):
            request = self._publications.find(claims.request_id)
            is_own = request is not None and request.kid == message.kid
        elif isinstance(claims, RevocationRequest) and claims.lease_id is not None:
            lease = self._leases.get(claims.lease_id)
            is_own = lease is None or run_id_of_lease(lease) == run_id
        if not is_own:
            raise RequestRefusedError(
                Code.SOCKET_OTHER_RUN, "the instance of a run withdraws and gives back only what it asked for "
                "itself; where the gateway has forgotten a request, post the request again before it is withdrawn",
            )  # fmt: skip

    def _require_run_key(self, run_id: str, kid: str | None) -> None:
        """Raise RequestRefusedError if the run is over, or if `kid` is not the key that was made in it."""
        if self._require_running(run_id).key_thumbprint != kid:
            raise RequestRefusedError(
                Code.SOCKET_OTHER_RUN,
                "this socket is for the instance of one run: sign with the key that was made in "
                "it, and send its enrolment",
            )

    def _require_running(self, run_id: str) -> Run:
        """The run. Raises RequestRefusedError if it is over or unknown."""
        runs = self._directory.runs
        run = runs.get(run_id)
        if run is None or not runs.goes_on(run_id) or self._clock.now_ms() / 1000 >= run.deadline:
            raise RequestRefusedError(
                Code.RUN_ENDED, f"run {run_id} has ended, and with it everything that its instance may"
            )
        return run

    # --- GET /v1/requests/ID ---

    async def _get_reply(self, request: ApiRequest, id: str) -> Answer:
        self._require_evidence(request.presented)
        wait_s, after = _read_query(request.query)
        agent_id, challenge = await self._entitled(request, id)
        if challenge is not None:
            return challenge
        with _attributed_to(agent_id):
            self._check_limits(request, agent_id)
            reply = self._replies.get(agent_id, id, after)
            if reply is None and wait_s > 0:
                with self._waiting.place(agent_id, request.sender):
                    # Requests that only wait must not take the places of others of this sender and agent.
                    request.release_slot()
                    reply = await self._replies.next(
                        agent_id, id, after, wait_s=wait_s, on_disconnect=request.on_disconnect
                    )
        headers = self._fresh_nonce(request)
        status = f"{request.base}{_REQUESTS}/{id}"
        if reply is None:
            pending = orjson.dumps({"id": id, "status": status})
            headers |= {"Content-Type": "application/json", "Retry-After": str(_POLL_AFTER_S)}
            return HTTPStatus.ACCEPTED, headers, pending
        headers |= {"Content-Type": JOSE, "Link": f'<{status}?after={after + 1}>; rel="next"'}
        return HTTPStatus.OK, headers, reply

    async def _entitled(self, request: ApiRequest, id: str) -> tuple[str, Answer | None]:
        """The agent whose request it is, if the caller posted it; and the challenge that it must answer first.

        Of requests that another process took, or that are forgotten, only the agent is known: any of its keys and tasks
        may fetch the reply, which is sealed to the request's key. Raises RequestRefusedError (404) for all others.
        """
        presented, publication = request.presented, self._publications.find(id)
        if presented.task_id is not None:
            agent_id = self._agent_of(presented.task_id)
            if presented.run_id is not None:
                entitled = self._entitled_run(presented.run_id, agent_id, publication)
            elif publication is not None:
                entitled = agent_id == publication.agent_id and publication.task_id == presented.task_id
            else:
                entitled = agent_id is not None and self._replies.has(agent_id, id)
            if not entitled or agent_id is None:
                raise _unknown_request()
            return agent_id, None
        kid = unverified_thumbprint(presented.proof or "")
        if publication is not None:
            agent_id = publication.agent_id if publication.kid == kid else None
        elif kid is not None:
            now_s = self._clock.now_ms() / 1000
            agent_id = self._keys.owner(self._trust.trust_domain, kid, now_s)
            if agent_id is not None and not self._replies.has(agent_id, id):
                agent_id = None
        else:
            agent_id = None
        if agent_id is None or kid is None:
            raise _unknown_request()
        self._require_certificate_of(agent_id, presented)
        return agent_id, await self._check_proof(request, kid)

    def _entitled_run(self, run_id: str, agent_id: str | None, publication: Publication | None) -> bool:
        """Whether a request is of a run's instance. Of forgotten ones that is unknown: to post it again proves it."""
        if publication is None or publication.agent_id != agent_id:
            return False
        self._require_run_key(run_id, publication.kid)
        return True

    # --- GET /v1/tasks/ID ---

    async def _get_task(self, request: ApiRequest, id: str) -> Answer:
        self._require_evidence(request.presented)
        presented, task = request.presented, self._task(id)
        if presented.task_id is not None:
            if task is None or presented.task_id != id:
                raise _unknown_task()
            if presented.run_id is not None:
                self._require_running(presented.run_id)
        else:
            kid, now_s = unverified_thumbprint(presented.proof or ""), self._clock.now_ms() / 1000
            owner = self._keys.owner(self._trust.trust_domain, kid, now_s) if kid is not None else None
            if task is None or kid is None or owner != task.agent_id:
                raise _unknown_task()
            self._require_certificate_of(owner, presented)
            if (challenge := await self._check_proof(request, kid)) is not None:
                return challenge
        with _attributed_to(task.agent_id):
            self._check_limits(request, task.agent_id)
        view = task_view(task, self._leases, presented.run_id, self._clock.now_ms() / 1000)
        headers = {"Content-Type": "application/json", **self._fresh_nonce(request)}
        return HTTPStatus.OK, headers, orjson.dumps(view)

    # --- who calls ---

    def _require_evidence(self, presented: PresentedIdentity) -> None:
        if presented.task_id is None and presented.proof is None:
            raise RequestRefusedError(
                Code.PROOF_MISSING, "send a DPoP proof by the key that signed the message; it has no ath",
                headers=self._challenge(Code.INVALID_DPOP_PROOF),
            )  # fmt: skip

    def _require_certificate_of(self, agent_id: str, presented: PresentedIdentity) -> None:
        certificate = presented.certificate
        if certificate is not None and subject_of(self._trust.trust_domain, certificate, "agent") != agent_id:
            raise RequestRefusedError(
                Code.CERTIFICATE_OTHER_AGENT, "the client certificate is another agent's"
            )

    async def _check_proof(self, request: ApiRequest, kid: str) -> Answer | None:
        """Check the proof of a call outside task sockets. Returns the answer that asks for one with a nonce, or None.

        Raises RequestRefusedError. The key is an agent's: strangers cannot fill the replay memory.
        """
        presented = request.presented
        try:
            await self._proofs.check(
                presented.proof or "", method=request.method, url=presented.htu or "", access_token=None,
                thumbprint=kid,
            )  # fmt: skip
        except TokenRejectedError as error:
            refused = RequestRefusedError(
                error.code, str(error), status=401, headers=self._challenge(error.code)
            )
            if error.code != Code.USE_DPOP_NONCE:
                raise refused from None
            return problem_answer(refused)
        except UnavailableError as error:
            raise RequestRefusedError(Code.PROOFS_FULL, str(error), headers={"Retry-After": "1"}) from None
        return None

    def _challenge(self, error: str) -> dict[str, str]:
        nonce = self._proofs.nonce()
        headers = {"WWW-Authenticate": f'DPoP error="{error}", algs="ES256 EdDSA"'}
        return {**headers, "DPoP-Nonce": nonce} if nonce is not None else headers

    def _fresh_nonce(self, request: ApiRequest) -> dict[str, str]:
        """The nonce for the caller's next proof (RFC 9449, 8.2)."""
        nonce = self._proofs.nonce() if request.presented.task_id is None else None
        return {"DPoP-Nonce": nonce} if nonce is not None else {}

    def _check_limits(self, request: ApiRequest, agent_id: str) -> None:
        """Count the call for its agent, once that is certain: strangers use up nobody's share."""
        if isinstance(rate := request.check_agent(agent_id), Refused):
            raise RequestRefusedError(
                ReceivedCode(rate.reason.code), rate.reason.message, status=429, headers={"Retry-After": "1"}
            )

    def _agent_of(self, task_id: str) -> str | None:
        task = self._task(task_id)
        return task.agent_id if task is not None else None

    def _task(self, task_id: str) -> TaskState | None:
        try:
            entry = self._directory.task(task_id)
        except ChainError:
            return None
        return entry.state if entry is not None else None


@contextlib.contextmanager
def _attributed_to(agent_id: str) -> Iterator[None]:
    """Attribute refusals to the agent that has proved that it sent the request."""
    try:
        yield
    except RequestRefusedError as error:
        error.agent_id = agent_id
        raise


def _require_method(request: ApiRequest, method: str) -> None:
    if request.method != method:
        raise RequestRefusedError(
            Code.METHOD_UNEXPECTED, f"this takes {method} alone", headers={"Allow": method}
        )


def _unknown_request() -> RequestRefusedError:
    return RequestRefusedError(
        Code.REQUEST_UNKNOWN,
        "no such request of yours is known here: its reply is too old, or it was posted elsewhere or long ago and has "
        "no reply yet; post the same bytes again",
    )  # fmt: skip


def _unknown_task() -> RequestRefusedError:
    return RequestRefusedError(
        Code.TASK_UNKNOWN,
        "no such task of yours is known here: name a task of this agent, or this socket's own",
        status=404,
    )


def _read_query(query: str) -> tuple[float, int]:
    """`wait` in seconds, and `after`. Raises RequestRefusedError (400) for anything else."""
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError:
        pairs = [("", "")]
    fields: Mapping[str, str] = dict(pairs)
    if len(fields) != len(pairs) or not fields.keys() <= {"wait", "after"}:
        raise RequestRefusedError(Code.QUERY_INVALID, "the query has wait and after, each at most once")
    wait, after = fields.get("wait", "0s"), fields.get("after", "0")
    match = _DURATION.fullmatch(wait)
    wait_s = float(int(match[1] or 0) * 60 + int(match[2] or 0)) if match and wait else -1.0
    if not 0 <= wait_s <= MAX_WAIT_S:
        raise RequestRefusedError(
            Code.QUERY_INVALID, "wait is a duration with its unit, at most 60s: wait=30s"
        )
    if not _AFTER.fullmatch(after):
        raise RequestRefusedError(Code.QUERY_INVALID, "after is the number of replies that you have: after=1")
    return wait_s, int(after)
