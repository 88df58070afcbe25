"""API tokens, which callers sign for themselves: one for each call, for the one service that is called."""

from __future__ import annotations

import uuid

from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.api import MAX_API_TOKEN_S, ApiToken, api_audience
from ringfence.messages.base import ServiceRole


def api_token(key: SigningKey, service: ServiceRole, *, now_ms: int) -> str:
    """Return a token by `key` for one call of `service` in the trust domain of the key's id. It is accepted once."""
    trust_domain = key.id.removeprefix("spiffe://").partition("/")[0]
    now_s = now_ms // 1000
    claims = ApiToken(
        iss=key.id,
        aud=api_audience(trust_domain, service),
        iat=now_s,
        exp=now_s + MAX_API_TOKEN_S,
        jti=str(uuid.uuid4()),
    )
    return sign(claims, key)
