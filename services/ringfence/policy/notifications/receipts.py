"""Webhook receipts: policy notifies a person of what their passkey signed, so that they notice a misused touch.

An attacker who controls the sign page could show one message and have another signed. A receipt comes by another
channel, from the records on Kafka. It says what was signed, not whether it counts: that is up to the service that acts
on it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any, Final

import orjson

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import derived_id, digest, message_id
from ringfence.kernel.crypto.jws import UnverifiedJws, parse, verify
from ringfence.kernel.crypto.webauthn import WEBAUTHN_ALG
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.base import Claims, typ_header
from ringfence.messages.registry import AgentTransferConsent, TaskConsent
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.policy.notifications.notices import Notice, Notices
from ringfence.policy.notifications.webhook import body_of_receipt
from ringfence.policy.subscribers import SIGNED_BY_PEOPLE

LIFE_S: Final = 24 * 3600
"""How long after its append a message is worth a receipt."""
_SIGNED: Final[tuple[type[Claims], ...]] = tuple(
    model for topic in SIGNED_BY_PEOPLE for model in topic.models
)
EMBEDDED: Final[tuple[type[Claims], ...]] = (TaskConsent, AgentTransferConsent)
"""What passkeys sign for others to embed in a command. A `KeyPossession` has a notice of its own, of the added key."""
_MODELS: Final[Mapping[str, type[Claims]]] = {typ_header(model): model for model in (*_SIGNED, *EMBEDDED)}
_NOT_SHOWN: Final = frozenset({"iss", "aud", "iat", "exp", "jti"})
"""What every message has. Embedded messages are left out as well: the rest names what they are about."""
_MAX_LINES: Final = 20


def receipt_sender(
    runtime: Runtime, directory: Directory, notices: Notices
) -> Callable[[Received], Awaitable[None]]:
    """Return a handler of what people publish, which sends each signer a receipt of what their passkey signed."""

    async def tell(record: Received) -> None:
        for jws, claims in _messages(record.value):
            if jws.header.alg == WEBAUTHN_ALG and claims.passkey_use == "sign":
                await tell_signer(record, jws, claims)

    async def tell_signer(record: Received, jws: UnverifiedJws, claims: Claims) -> None:
        audience, model = runtime.settings.trust_domain, type(claims)
        user_id = subject_of(audience, claims.iss, "user")
        ends_ms = record.appended_at_ms + LIFE_S * 1000
        if user_id is None or ends_ms <= runtime.clock.now_ms():
            return
        message = message_id(claims.iss, claims.jti)
        # The page chooses the `jti`: a second message with the same one has a receipt of its own.
        id = derived_id("receipt", message, digest(jws.signing_input))
        if not notices.wants(user_id, id):
            return
        await runtime.tables_caught_up(runtime.settings.grace_s)
        try:
            verify(
                jws, model, lambda iss, kid: directory.user_key(iss, kid, record.appended_at_ms / 1000),
                audience=audience,
            )  # fmt: skip
        except (InvalidMessageError, ChainError):
            return  # it counts for nothing anywhere
        lines = list(islice(_lines(claims.model_dump(mode="json", exclude_none=True)), _MAX_LINES))
        notices.deliver(
            Notice(
                id,
                user_id,
                f"{model.typ} {message}",
                ends_ms // 1000,
                lambda: True,
                partial(body_of_receipt, user_id, jws.header.kid, model.typ, claims.iat, lines),
            )
        )

    return tell


def _messages(text: bytes | str) -> Iterator[tuple[UnverifiedJws, Claims]]:
    """Yield a message of people, and those that it embeds. Malformed ones are left out.

    Nothing is verified: an embedded message is its own signer's, whoever signed the one around it.
    """
    try:
        jws = parse(text)
        model = _MODELS[jws.header.typ]
        claims = jws.unverified_claims(model)
    except (InvalidMessageError, KeyError):
        return  # for the service that it is addressed to
    yield jws, claims
    if model not in EMBEDDED:
        for name in model.model_fields:
            if isinstance(value := getattr(claims, name), str) and _is_jws(value):
                yield from (one for one in _messages(value) if isinstance(one[1], EMBEDDED))


def _is_jws(text: str) -> bool:
    return text.startswith("eyJ") and text.count(".") == 2


def _lines(claims: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield name and text of what a message says, besides what every message has. Members of members have own lines:
    each text is cut by itself.
    """
    for name, value in claims.items():
        if isinstance(value, dict):
            yield from _lines(value, f"{prefix}{name}.")
        elif not isinstance(value, str):
            yield f"{prefix}{name}", orjson.dumps(value).decode()
        elif not _is_jws(value) and (prefix or name not in _NOT_SHOWN):
            yield f"{prefix}{name}", value
