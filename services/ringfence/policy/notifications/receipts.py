"""Webhook receipts: policy notifies a person of what their passkey signed, so that they notice a misused touch.

An attacker who controls the sign page could show one message and have another signed. A receipt comes by another
channel, from the records on Kafka. It says what was signed, not whether it counts: that is up to the service that acts
on it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from typing import Any, Final

import orjson

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import derived_id, message_id
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.crypto.webauthn import WEBAUTHN_ALG
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.base import Claims, typ_header
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
_MODELS: Final[Mapping[str, type[Claims]]] = {
    typ_header(model): model for model in _SIGNED if model.passkey_use == "sign"
}
_NOT_SHOWN: Final = frozenset({"iss", "aud", "iat", "exp", "jti"})
"""What every message has. Embedded messages are left out as well: the rest names what they are about."""
_MAX_LINES: Final = 20


def receipt_sender(
    runtime: Runtime, directory: Directory, notices: Notices
) -> Callable[[Received], Awaitable[None]]:
    """Return a handler of what people publish, which sends each signer a receipt of what their passkey signed."""

    async def tell(record: Received) -> None:
        audience = runtime.settings.trust_domain
        try:
            jws = parse(record.value)
            model = _MODELS.get(jws.header.typ)
            if jws.header.alg != WEBAUTHN_ALG or model is None:
                return
            claims = jws.unverified_claims(model)
        except InvalidMessageError:
            return  # for the service that it is addressed to
        user_id = subject_of(audience, claims.iss, "user")
        ends_ms = record.appended_at_ms + LIFE_S * 1000
        if user_id is None or ends_ms <= runtime.clock.now_ms():
            return
        id = derived_id("receipt", message_id(claims.iss, claims.jti))
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
        lines = list(_lines(claims.model_dump(mode="json", exclude_none=True)))
        notices.deliver(
            Notice(
                id,
                user_id,
                f"{model.typ} {message_id(claims.iss, claims.jti)}",
                ends_ms // 1000,
                lambda: True,
                partial(body_of_receipt, user_id, jws.header.kid, model.typ, claims.iat, lines),
            )
        )

    return tell


def _lines(claims: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield name and text of what a message says, besides what every message has."""
    shown = [(name, value) for name, value in claims.items() if name not in _NOT_SHOWN]
    for name, value in shown[:_MAX_LINES]:
        if isinstance(value, str):
            if value.count(".") == 2 and value.startswith("eyJ"):
                continue
            yield name, value
        else:
            yield name, orjson.dumps(value).decode()
