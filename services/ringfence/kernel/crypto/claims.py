"""Checks of the registered JWT claims that every signed message has: `aud`, `iat`, `nbf` and `exp` (RFC 7519, 4.1)."""

from __future__ import annotations

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.messages.base import Claims, ExpiringClaims
from ringfence.messages.codes import Code

MAX_LIFE_S = 24 * 3600
"""The longest life (`exp` - `iat`, in seconds) of a command or an approval."""
LEEWAY_S = 30
"""How many seconds a signer's clock may be ahead of the broker's."""


class ExpiredError(InvalidMessageError):
    """A message reached the broker after its `exp`, is dated in the broker's future, or has a longer life than is
    allowed.
    """

    code = Code.EXPIRED


def check_audience(aud: str, audience: str) -> None:
    """Raises InvalidMessageError if `aud` is not `audience`, the trust domain."""
    if aud != audience:
        raise InvalidMessageError(
            f"aud is {aud[:80]!r}; this trust domain is {audience!r}", code=Code.AUD_UNEXPECTED
        )


def check_times(claims: Claims, appended_at_ms: int) -> None:
    """Check `iat`, `nbf` and `exp` against the broker's append time of the record, in ms.

    Raises ExpiredError if `iat` or `nbf` is more than `LEEWAY_S` later, if `exp` is not later, or if `exp` - `iat`
    exceeds `MAX_LIFE_S`.
    """
    at_s = appended_at_ms / 1000
    nbf = claims.model_extra.get("nbf") if claims.model_extra else None
    if nbf is not None and not (isinstance(nbf, int | float) and nbf <= at_s + LEEWAY_S):
        raise ExpiredError("nbf lies ahead of the broker; send it once it counts", code=Code.NOT_YET)
    if claims.iat > at_s + LEEWAY_S:
        raise ExpiredError(
            f"iat lies {claims.iat - at_s:.0f} s ahead of the broker; set the clock", code=Code.IAT_IN_FUTURE
        )
    if isinstance(claims, ExpiringClaims):
        if claims.exp - claims.iat > MAX_LIFE_S:
            raise ExpiredError(
                f"exp lies more than {MAX_LIFE_S} s after iat; sign it shorter", code=Code.LIFE_TOO_LONG
            )
        if at_s >= claims.exp:
            raise ExpiredError(f"reached the broker {at_s - claims.exp:.1f} s after its exp; sign it anew")
