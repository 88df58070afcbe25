"""Consent of users, embedded in commands of others: to a task on their behalf, or to a transfer of an agent to them.

A user may also consent to a task by an OIDC ID token over its terms, in the style of RFC 8693: the token is the
subject's, and whoever assigns the task is the actor. Its `nonce` is the SHA-256 of the terms. So the issuer vouches for
this user and these terms, and for nothing else.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.jws import message_digest
from ringfence.kernel.crypto.keys import b64encode
from ringfence.kernel.crypto.oidc import (
    IdentityToken,
    JwksError,
    TokenError,
    unverified_issuer,
    verify_token,
)
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.messages.codes import Code
from ringfence.messages.registry import AgentTransferConsent, TaskTerms, UserState
from ringfence.messages.trust import OidcIssuer

MAX_AGE_S = 600
"""The greatest age of an ID token when the assignment is appended."""


@dataclass(frozen=True, slots=True)
class Consent:
    """A verified consent: the user, and the key by which it is remembered. It counts once."""

    user_id: str
    mark: tuple[str, str]
    kid: str | None = None
    """The key that signed it; None of an ID token."""
    transfer: AgentTransferConsent | None = None
    """The terms, if the consent is to a transfer of an agent."""
    address_unverified: bool = False
    """Whether it depends on an `email` that the token does not call verified.

    The registry refuses such a command. Readers accept its record: the root may have changed what it says of the issuer
    (`emails_verified`) after the task was assigned.
    """


def canonical_terms(terms: TaskTerms) -> bytes:
    """Return the terms as canonical JSON (RFC 8785): sorted members, no blanks, UTF-8. Unset members are left out."""
    return json.dumps(
        terms.model_dump(mode="json", exclude_none=True),
        sort_keys=True, separators=(",", ":"), ensure_ascii=False,
    ).encode()  # fmt: skip


def nonce_of(terms: TaskTerms) -> str:
    """Return the `nonce` by which an ID token consents to these terms: base64url of their SHA-256."""
    return b64encode(hashlib.sha256(canonical_terms(terms)).digest())


def unverified_mark(token: str) -> tuple[str, str]:
    """Return the key by which an unverified token is remembered. Raises TokenError if it is no token."""
    return unverified_issuer(token), message_digest(token)


def verified_consent(
    token: str, terms: TaskTerms, user: UserState | None, trust: TrustStore, at_ms: int
) -> Consent:
    """Verify that an ID token is `user`'s consent to these terms, as of the append time of the command.

    Raises InvalidMessageError with the reason if it is not.
    """
    at_s = at_ms / 1000
    try:
        issuer = trust.oidc_issuer(unverified_issuer(token), "users", at_s)
        if issuer is None or not issuer.keys:
            raise InvalidMessageError(
                "no keys of its issuer are pinned for users in the trust bundle", code=Code.ISSUER_NOT_PINNED
            )
        verified = verify_token(
            token, issuer.keys,
            issuer=issuer.issuer, audience=trust.trust_domain, at_s=at_s, max_age_s=MAX_AGE_S,
        )  # fmt: skip
    except (TokenError, JwksError) as error:
        raise InvalidMessageError(f"the ID token does not count: {error}", code=error.code) from None
    if verified.claims.get("nonce") != nonce_of(terms):
        raise InvalidMessageError(
            "the nonce of the ID token is not that of these terms (ringfence task nonce)",
            code=Code.CONSENT_OTHER_TERMS,
        )
    if user is None or user.status != "active" or user.delegation is not None:
        raise InvalidMessageError("the ID token is for no active user", code=Code.USER_DISABLED)
    if not _is_theirs(verified, issuer, user):
        raise InvalidMessageError(
            f"the ID token is not {user.user_id}'s, by its claim {issuer.user_claim}", code=Code.USER_MISMATCH
        )
    unsaid = issuer.user_claim == "email" and "email_verified" not in verified.claims
    return Consent(
        user.user_id,
        (verified.issuer, verified.digest),
        address_unverified=unsaid and not issuer.emails_verified,
    )


def _is_theirs(token: IdentityToken, issuer: OidcIssuer, user: UserState) -> bool:
    claim = token.claims.get(issuer.user_claim)
    if not isinstance(claim, str) or not claim:
        return False
    # OpenID Connect Core 5.1: an address that the issuer has not verified is the user's own claim.
    if issuer.user_claim == "email" and token.claims.get("email_verified", True) not in (True, "true"):
        return False
    if issuer.user_match == "id":
        suffix = issuer.user_suffix or ""
        return claim.endswith(suffix) and claim.removesuffix(suffix) == user.user_id
    return user.provisioned is not None and user.provisioned.external_id == claim
