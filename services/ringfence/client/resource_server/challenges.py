"""Reads the access token of an HTTP request, and builds 401 and 403 answers with challenges (RFC 6750, RFC 9449)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import orjson

from ringfence.client.agent.dpop import NONCE_HEADER
from ringfence.client.errors import TokenRejectedError
from ringfence.client.resource_server.dpop_proofs import PROOF_ALGORITHMS
from ringfence.kernel.base.errors import RingfenceError
from ringfence.messages.codes import Code, status_of

Headers = Mapping[str, str] | Iterable[tuple[str, str]]
Scheme = Literal["Bearer", "DPoP"]

_SCHEMES: Final[dict[str, Scheme]] = {"bearer": "Bearer", "dpop": "DPoP"}
_ALGORITHMS: Final = f'algs="{" ".join(PROOF_ALGORITHMS)}"'
_WORDS: Final = {Code.INACTIVE: Code.INVALID_TOKEN, Code.TOKEN_REJECTED: Code.INVALID_TOKEN}
"""Error codes of the RFCs for codes of ours."""
_UNQUOTABLE: Final = re.compile(r"[^\x20-\x21\x23-\x5b\x5d-\x7e]")
"""Characters that `error_description` must not have (RFC 6750 3)."""


@dataclass(frozen=True, slots=True)
class PresentedToken:
    """The unverified token and proofs of a request."""

    scheme: Scheme
    token: str = field(repr=False)
    proofs: tuple[str, ...] = field(repr=False)


def read_presented_token(headers: Headers) -> PresentedToken:
    """Read the token of a request and its DPoP proofs. Nothing is verified.

    Raises TokenRejectedError: `token_missing` if no known scheme is used, `invalid_request` if there are several
    Authorization headers.
    """
    pairs = list(headers.items() if isinstance(headers, Mapping) else headers)
    authorizations = [value for name, value in pairs if name.lower() == "authorization"]
    if len(authorizations) > 1:
        raise TokenRejectedError("send one Authorization header, and no more", code=Code.INVALID_REQUEST)
    name, _, token = "".join(authorizations).partition(" ")
    scheme = _SCHEMES.get(name.lower())
    if scheme is None or not token.strip():
        raise TokenRejectedError(
            "send Authorization: Bearer or DPoP with a token of Ringfence", code=Code.TOKEN_MISSING
        )
    proofs = tuple(value for name, value in pairs if name.lower() == "dpop")
    return PresentedToken(scheme, token.strip(), proofs)


@dataclass(frozen=True, slots=True)
class HttpRefusal:
    """A complete HTTP answer that refuses a request."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    """JSON: `error`, a code for programs, and `message`."""


def refusal(error: RingfenceError, *, require_proof: bool = False, nonce: str | None = None) -> HttpRefusal:
    """Return 400, 401 or 403 with a challenge that says what is wrong with the token; 503 where it could not be
    verified.

    Args:
        require_proof: bearer tokens are not accepted.
        nonce: the nonce that the next proof should have.
    """
    headers = [("Content-Type", "application/json"), ("Cache-Control", "no-store")]
    if not isinstance(error, TokenRejectedError):
        # The issuer's name, and which service does not answer, are for the operators of this server.
        message = "tokens cannot be verified now; try again"
        return HttpRefusal(503, (*headers, ("Retry-After", "1")), _error_body(error.code, message))
    headers += [("WWW-Authenticate", challenge) for challenge in _challenges(error, require_proof)]
    if nonce is not None:
        headers.append((NONCE_HEADER, nonce))
    return HttpRefusal(status_of(error.code, 401), tuple(headers), _error_body(error.code, error.message))


def not_mapped(allowed_methods: Sequence[str]) -> HttpRefusal:
    """405 with the methods that are allowed at this path (RFC 9110, 15.5.6), or 403 where there are none."""
    headers = [("Content-Type", "application/json"), ("Cache-Control", "no-store")]
    if not allowed_methods:
        return HttpRefusal(
            403, tuple(headers), _error_body(Code.PATH_UNMAPPED, "no access is defined for this path")
        )
    headers.append(("Allow", ", ".join(allowed_methods)))
    message = f"this path takes {', '.join(allowed_methods)}"
    return HttpRefusal(405, tuple(headers), _error_body(Code.METHOD_UNMAPPED, message))


def _challenges(error: TokenRejectedError, require_proof: bool) -> list[str]:
    """Return challenges of the scheme that was used, else of each accepted scheme."""
    if error.code == Code.TOKEN_MISSING:  # RFC 6750 3.1: a request without authentication gets no error code
        return [f"DPoP {_ALGORITHMS}"] if require_proof else ["Bearer", f"DPoP {_ALGORITHMS}"]
    error_code = _WORDS.get(error.code, error.code)
    described = f'error="{error_code}", error_description="{_UNQUOTABLE.sub("?", error.message)}"'
    if error.scheme == "DPoP":
        return [f"DPoP {described}, {_ALGORITHMS}"]
    if error.scheme is None or not require_proof:
        return [f"Bearer {described}"]
    return [f"DPoP {described}, {_ALGORITHMS}"]


def _error_body(code: str, message: str) -> bytes:
    return orjson.dumps({"error": code, "message": message})
