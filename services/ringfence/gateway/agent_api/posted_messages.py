"""Verifies what an agent posts: exactly the messages that agents may sign, by the rules of those who act on them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ringfence.gateway.errors import RequestRefusedError
from ringfence.kernel.base.errors import InvalidMessageError, SignatureError
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.jwe import check_reply_key
from ringfence.kernel.crypto.jws import Signed, parse
from ringfence.messages.base import Topic, typ_header
from ringfence.messages.credential import MAX_REQUEST_BYTES, CredentialRequest, RequestWithdraw
from ringfence.messages.lease import RevocationRequest
from ringfence.messages.topics import CREDENTIAL_REQUEST, REVOCATION_REQUEST
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.leases.revocations import BY_AGENTS
from ringfence.model.records.directory import Directory
from ringfence.model.records.signed_messages import verify_message

Message = CredentialRequest | RequestWithdraw | RevocationRequest
MAX_BYTES: Final = MAX_REQUEST_BYTES

_MODELS: Final[Mapping[str, type[Message]]] = {
    typ_header(model): model for model in (CredentialRequest, RequestWithdraw, RevocationRequest)
}
_TOPICS: Final[Mapping[type[Message], Topic[Any]]] = {
    CredentialRequest: CREDENTIAL_REQUEST,
    RequestWithdraw: CREDENTIAL_REQUEST,
    RevocationRequest: REVOCATION_REQUEST,
}


@dataclass(frozen=True, slots=True)
class PostedMessage:
    """A message whose signature by an agent was verified."""

    signed: Signed[Message]
    id: str
    """The UUIDv5 of (`iss`, `jti`): of a request, its id."""
    agent_id: str
    kid: str
    """The thumbprint of the key that signed it."""
    late: InvalidMessageError | None = None
    """Set if its time is over: it may only be a repeat."""

    @property
    def claims(self) -> Message:
        return self.signed.claims

    @property
    def topic(self) -> Topic[Any]:
        return _TOPICS[type(self.claims)]


class PostedMessageVerifier:
    """Verifies posted messages against the gateway's records. It decides nothing: policy and revoker do."""

    def __init__(
        self,
        directory: Directory,
        *,
        audience: str,
        now_ms: Callable[[], int],
        catch_up: Callable[[], Awaitable[object]],
    ) -> None:
        """`now_ms`: the broker's time as far as it is known; `catch_up`: see `verify_message`."""
        self._directory = directory
        self._audience = audience
        self._now_ms = now_ms
        self._catch_up = catch_up

    async def verify(self, body: bytes) -> PostedMessage:
        """Verify a message. One that is only too late is returned as such.

        Raises RequestRefusedError with the code of what is wrong.
        """
        try:
            jws = parse(body)
            model = _MODELS.get(jws.header.typ)
            if model is None:
                raise InvalidMessageError(
                    "post a credential.request, a request.withdraw or a release (revocation.request)",
                    code="typ_unexpected",
                )
            signed, late = await verify_message(
                body, model, self._directory, audience=self._audience, at_ms=self._now_ms(),
                max_bytes=MAX_BYTES, catch_up=self._catch_up,
            )  # fmt: skip
            _check_claims(signed.claims)
        except SignatureError as error:
            raise RequestRefusedError(403, error.code, error.message) from None
        except InvalidMessageError as error:
            raise RequestRefusedError(400, error.code, error.message) from None
        claims = signed.claims
        agent_id = subject_of(self._audience, claims.iss, "agent")
        if agent_id is None:
            raise RequestRefusedError(403, "key_unknown", "only agents post messages")
        return PostedMessage(signed, message_id(claims.iss, claims.jti), agent_id, jws.header.kid, late)


def _check_claims(claims: Message) -> None:
    """Check the claims whose violation would be dead-lettered, and so never answered. Raises InvalidMessageError."""
    if isinstance(claims, CredentialRequest):
        check_reply_key(claims.reply_key)
    if isinstance(claims, RevocationRequest) and (claims.kind not in BY_AGENTS or claims.lease_id is None):
        raise InvalidMessageError(
            "an agent gives back one lease: kind release, and its lease_id", code="kind_unexpected"
        )
