"""Enrolment of agent instances: a platform's identity token and a fresh key come in, a signed enrolment goes out.

The token arrives by HTTP and is stored nowhere before it is spent. Once Kafka has the event, the token is valid for the
key that it came with and for no other. The memory of spent tokens is rebuilt from these events.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError, UnavailableError
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.base.replay_memory import BoundedDict
from ringfence.kernel.crypto.claims import LEEWAY_S
from ringfence.kernel.crypto.jws import Signed, parse, sign, verify
from ringfence.kernel.crypto.keys import PublicKey, public_key
from ringfence.kernel.crypto.oidc import (
    IdentityToken,
    TokenError,
    unverified_issuer,
    unverified_kid,
    verify_token,
)
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.base import KeyRecord
from ringfence.messages.codes import Code, inactive_agent
from ringfence.messages.credential import Reason
from ringfence.messages.enrolment import (
    AttestationSelector,
    EnrolledInstance,
    InstanceEnrol,
    InstanceEnrolment,
    RunRef,
)
from ringfence.messages.operations import ServiceEvent
from ringfence.messages.registry import AgentState
from ringfence.messages.trust import OidcIssuer, OidcKey
from ringfence.model.identity.attestation import bound_audience, matching, selector_id
from ringfence.model.identity.runners import issuer_of_instances, runner_name
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.records.instances import MAX_TOKEN_AGE_S, audiences, instance_id, run_of
from ringfence.model.unknown_fields import describe_unknown, unknown_fields
from ringfence.registry.store import Memory

log = logging.getLogger(__name__)

MAX_ENROL_BYTES = 32 * 1024
TOKENS_REMEMBERED_S = MAX_TOKEN_AGE_S + 10 * 60
"""The longest validity of a token, and ten minutes more."""
_SWEEP_EVERY = 10_000
_MOST_REFUSALS = 10_000
_BY_STRANGERS = frozenset(
    {
        Code.TOKEN_MALFORMED,
        Code.ALG_NOT_ALLOWED,
        Code.KEY_UNKNOWN,
        Code.SIGNATURE_INVALID,
        Code.ISSUER_UNTRUSTED,
    }
)
"""Codes of tokens that no platform signed. Anybody can send those, so they appear in the log alone."""

_FINDINGS = frozenset({Code.TOKEN_REPLAYED, Code.KEY_TAKEN})
"""Codes of acts that no honest instance commits."""


class EnrolRefusedError(RingfenceError):
    """Raised when an instance is not enrolled; `code` says why."""

    code = Code.ENROL_REFUSED


class KeysByDiscovery(Protocol):
    """Source of the keys of an issuer that publishes them."""

    async def keys(self, issuer: str, kid: str) -> Sequence[OidcKey]:
        """Return the issuer's keys, read again if `kid` is not among the known ones.

        Raises UnavailableError if the issuer cannot be asked.
        """
        ...


class _Admission(NamedTuple):
    """The agent that an instance is enrolled for, and the rule that admits it."""

    agent: AgentState
    revision: int
    selector: AttestationSelector
    claims: Mapping[str, str]
    token: IdentityToken
    pinned: bool
    run: RunRef | None
    """The run that a runner says the instance is of."""


class _Spent(NamedTuple):
    """The agent and key that a token was used for."""

    agent_id: str
    enrolled: EnrolledInstance


class Enroller:
    """Enrols instances of agents."""

    def __init__(
        self,
        runtime: Runtime,
        directory: Directory,
        memory: Memory,
        discovery: KeysByDiscovery,
        ready: Callable[[], str | None],
        recalled: Callable[[], Awaitable[bool]],
    ) -> None:
        """`ready` returns the reason why this replica enrols nobody now, or None.

        `recalled` returns whether it has read all its own events.
        """
        self._runtime = runtime
        self._directory = directory
        self._memory = memory
        self._discovery = discovery
        self._ready = ready
        self._recalled = recalled
        self._spent: dict[str, _Spent] = {}
        self._unconfirmed: set[str] = set()
        """Tokens whose use Kafka has not confirmed yet. The caller gets no answer before."""
        self._reported_refusals: BoundedDict[str, None] = BoundedDict(_MOST_REFUSALS)

    async def enrol(self, compact: str | bytes) -> str:
        """Enrol the key that signed an `instance.enrol` message. Returns the signed enrolment as a compact JWS.

        Raises EnrolRefusedError, TokenError or InvalidMessageError if nobody is enrolled, and UnavailableError if the
        registry cannot enrol now.
        """
        if reason := self._ready():
            raise UnavailableError(reason)
        signed = self._verified_request(compact)
        try:
            admission = await self._admit(signed)
            if not await self._recalled():
                raise UnavailableError(
                    "which tokens are spent cannot be read from Kafka now; ask again later"
                )
            enrolled, fresh = self._spend(admission, signed)
        except (EnrolRefusedError, TokenError) as error:
            await self._report_refusal(signed, error)
            raise
        if fresh:
            self._unconfirmed.add(enrolled.token_digest)
            try:
                await self._publish_enrolment(signed, admission, enrolled)
            except BaseException:
                self._spent.pop(enrolled.token_digest, None)
                raise
            finally:
                self._unconfirmed.discard(enrolled.token_digest)
        elif enrolled.token_digest in self._unconfirmed:
            raise UnavailableError("this token is being spent just now; ask again")
        log.info("instance %s of agent %s enrolled", enrolled.instance_id, admission.agent.agent_id)
        return self._certificate(signed, admission, enrolled)

    # --- the requesting agent ---

    def _verified_request(self, compact: str | bytes) -> Signed[InstanceEnrol]:
        """Verify the request and the proof that its sender holds the key that it names."""
        jws = parse(compact)
        claims = jws.unverified_claims(InstanceEnrol)
        try:
            key = public_key(claims.key)
        except ValueError as error:
            raise InvalidMessageError(
                f"the key to be enrolled cannot be used: {error}", code=Code.KEY_INVALID
            ) from None

        def find(iss: str, kid: str) -> PublicKey | None:
            return key if kid == key.kid else None

        trust_domain = self._runtime.settings.trust_domain
        return verify(
            jws, InstanceEnrol, find, audience=trust_domain, appended_at_ms=self._runtime.clock.now_ms()
        )

    async def _admit(self, signed: Signed[InstanceEnrol]) -> _Admission:
        claims, trust_domain = signed.claims, self._runtime.settings.trust_domain
        issuer = self._issuer(claims.token)
        kid = public_key(claims.key).kid
        keys: Sequence[OidcKey] = issuer.keys
        if issuer.discovery:
            keys = await self._discovery.keys(issuer.issuer, unverified_kid(claims.token))
        token = verify_token(
            claims.token, keys, issuer=issuer.issuer, audience=audiences(trust_domain, kid),
            at_s=self._runtime.clock.now_ms() / 1000, max_age_s=MAX_TOKEN_AGE_S,
        )  # fmt: skip
        for message, what in (
            (claims, "what the instance signed"),
            (issuer, f"issuer {issuer.issuer} in the trust bundle"),
        ):
            if fields := unknown_fields(message):
                raise EnrolRefusedError(describe_unknown(fields, what), code=Code.UNKNOWN_FIELD)
        agent, revision = self._agent(claims.iss)
        if self._memory.registered_by(kid):
            raise _key_in_use()
        selectors = agent.attestation
        if not self._is_bound(token, kid):
            selectors = tuple(selector for selector in selectors if not selector.key_bound)
        match = matching(selectors, issuer.issuer, token.claims)
        run = None
        if runner_name(trust_domain, issuer.issuer) is not None:
            run = run_of(token)
            # Whose run it is says the runner, and the agent lets its own runs in alone.
            if token.subject != claims.iss or (match is not None and match[0].runner is None):
                match = None
        elif match is not None and match[0].runner is not None:
            match = None
        if match is None:
            raise EnrolRefusedError(
                f"no selector of agent {agent.agent_id} lets in {token.subject[:200]} of {issuer.issuer}; compare "
                "with: ringfence agent show",
                code=Code.INSTANCE_UNMATCHED,
            )
        return _Admission(agent, revision, *match, token, not issuer.discovery, run)

    def _is_bound(self, token: IdentityToken, kid: str) -> bool:
        """Return whether a token is for this key and for no other."""
        bound = bound_audience(self._runtime.settings.trust_domain, kid)
        return token.claims["aud"] in (bound, [bound])

    def _issuer(self, token: str) -> OidcIssuer:
        name, now_s = unverified_issuer(token), self._runtime.clock.now_ms() / 1000
        issuer = issuer_of_instances(self._runtime.trust, name, now_s)
        if issuer is None:
            raise EnrolRefusedError(
                f"the trust bundle does not believe {name[:200]} about instances; the root adds it with: "
                "ringfence init --oidc-issuer",
                code=Code.ISSUER_UNTRUSTED,
            )
        return issuer

    def _agent(self, iss: str) -> tuple[AgentState, int]:
        agent_id = subject_of(self._runtime.settings.trust_domain, iss, "agent")
        try:
            entry = self._directory.agent(agent_id) if agent_id else None
        except ChainError as error:
            raise EnrolRefusedError(
                f"the record of {iss} counts for nothing: {error}", code=error.code
            ) from None
        if entry is None:
            raise EnrolRefusedError(f"there is no agent {agent_id or iss}", code=Code.AGENT_UNKNOWN)
        if entry.state.status != "active":
            raise EnrolRefusedError(
                f"agent {agent_id} is {entry.state.status}", code=inactive_agent(entry.state.status)
            )
        return entry.state, entry.revision

    # --- a token is valid for one key ---

    def _spend(self, admission: _Admission, signed: Signed[InstanceEnrol]) -> tuple[EnrolledInstance, bool]:
        """Mark a token as spent. Returns the instance that it was spent on, and whether this call spent it.

        Nothing is awaited between look-up and mark, so that two requests cannot spend one token.
        """
        kid, digest = public_key(signed.claims.key).kid, admission.token.digest
        now_s = self._runtime.clock.now_ms() // 1000
        spent = self._spent.get(digest)
        if spent is not None and (spent.agent_id, spent.enrolled.kid) != (admission.agent.agent_id, kid):
            raise EnrolRefusedError(
                "another key, or the same for another agent, was enrolled with this token; get a new token for each",
                code=Code.TOKEN_REPLAYED,
            )
        if spent is not None:
            return spent.enrolled, False
        if self._memory.enrolled_by(kid) not in (None, admission.agent.agent_id):
            raise _key_in_use()
        not_after = now_s + admission.selector.max_life_s - LEEWAY_S
        if admission.run is not None:
            not_after = min(not_after, admission.token.expires_at_s)
        ref = EnrolledInstance(
            instance_id=instance_id(digest, kid),
            issuer=admission.token.issuer,
            subject=admission.token.subject,
            selector=selector_id(admission.selector),
            not_after=not_after,
            run=admission.run,
            kid=kid,
            token_digest=digest,
            enrolled_at=now_s,
        )
        self._remember(_Spent(admission.agent.agent_id, ref))
        return ref, True

    def _remember(self, spent: _Spent) -> None:
        self._spent.setdefault(spent.enrolled.token_digest, spent)
        self._memory.enrol(spent.enrolled.kid, spent.agent_id, spent.enrolled.not_after)
        if len(self._spent) % _SWEEP_EVERY == 0:
            now_s = self._runtime.clock.now_ms() // 1000
            horizon_s = now_s - TOKENS_REMEMBERED_S
            self._spent = {k: v for k, v in self._spent.items() if v.enrolled.enrolled_at >= horizon_s}
            self._memory.forget_enrolled(now_s)

    def on_event(self, event: ServiceEvent) -> None:
        """Read back an event of this registry or of the replica before it."""
        if event.kind == "accepted" and event.enrolled is not None:
            self._remember(_Spent(event.agent_id or "", event.enrolled))

    # --- events ---

    def _certificate(
        self, signed: Signed[InstanceEnrol], admission: _Admission, enrolled: EnrolledInstance
    ) -> str:
        key, trust_domain = self._runtime.key, self._runtime.settings.trust_domain
        certificate = InstanceEnrolment(
            iss=key.id,
            aud=trust_domain,
            iat=enrolled.enrolled_at,
            jti=derived_id("instance.enrolment", enrolled.instance_id),
            sub=signed.claims.iss,
            instance_id=enrolled.instance_id,
            key=KeyRecord(
                kid=enrolled.kid,
                jwk=signed.claims.key,
                not_before=enrolled.enrolled_at - LEEWAY_S,
                not_after=enrolled.not_after,
            ),
            issuer=enrolled.issuer,
            subject=enrolled.subject,
            selector=selector_id(admission.selector),
            claims=dict(admission.claims),
            token_digest=enrolled.token_digest,
            key_bound=self._is_bound(admission.token, enrolled.kid),
            agent_revision=admission.revision,
            token=signed.claims.token if admission.pinned else None,
            run=enrolled.run,
        )
        return sign(certificate, key)

    async def _publish_enrolment(
        self, signed: Signed[InstanceEnrol], admission: _Admission, enrolled: EnrolledInstance
    ) -> None:
        await self._runtime.event(
            "accepted",
            InstanceEnrol.typ,
            about=(enrolled.instance_id,),
            actor=signed.claims.iss,
            ref=signed.claims.jti,
            result=enrolled.instance_id,
            agent_id=admission.agent.agent_id,
            enrolled=enrolled,
        )

    async def _report_refusal(self, signed: Signed[InstanceEnrol], error: RingfenceError) -> None:
        """Publish one event for a refused request whose token a platform did sign."""
        agent_id = subject_of(self._runtime.settings.trust_domain, signed.claims.iss, "agent")
        mark = f"{error.code} {agent_id} {signed.claims.key.x}"
        log.info("nobody is let in (%s)", error.code)
        if error.code in _BY_STRANGERS or mark in self._reported_refusals:
            return
        self._reported_refusals[mark] = None
        entry = self._directory.unverified("agent", agent_id) if agent_id else None
        await self._runtime.event(
            "finding" if error.code in _FINDINGS else "refused",
            InstanceEnrol.typ,
            about=(signed.claims.iss, mark),
            ref=signed.claims.jti,
            reasons=(Reason(code=error.code, message=str(error)[:2048]),),
            agent_id=agent_id if entry is not None else None,
        )


def _key_in_use() -> EnrolRefusedError:
    return EnrolRefusedError("that key belongs to somebody already; make a fresh one", code=Code.KEY_TAKEN)


# `POST /v1/enrol`: a running instance enrols. The signed body authenticates its sender, and nothing else does.


class EnrolApi:
    """HTTP route for one `Enroller`."""

    def __init__(self, enroller: Enroller) -> None:
        self._enroller = enroller

    def routes(self) -> list[BaseRoute]:
        """Return the routes to add to those of the runtime."""
        return [Route("/v1/enrol", self._enrol, methods=["POST"])]

    async def _enrol(self, request: Request) -> Response:
        enrolment = await self._enroller.enrol(await _body(request))
        return JSONResponse({"enrolment": enrolment}, headers={"Cache-Control": "no-store"})


async def _body(request: Request) -> bytes:
    body = b""
    try:
        async for part in request.stream():
            body += part
            if len(body) > MAX_ENROL_BYTES:
                raise InvalidMessageError(f"more than {MAX_ENROL_BYTES} bytes", code=Code.TOO_LARGE)
    except ClientDisconnect:
        raise InvalidMessageError("the sender went away", code=Code.NOT_A_JWS) from None
    return body.strip()
