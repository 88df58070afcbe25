"""Sources of a platform's identity token for a running instance: a file, GitHub Actions, Google's metadata server."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ringfence.client.errors import InvalidCallError
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.crypto.oidc import MAX_TOKEN_BYTES
from ringfence.messages.codes import Code

if TYPE_CHECKING:
    import httpx

_TIMEOUT_S = 10.0
_GOOGLE = "http://metadata.google.internal"
SYNTAX = "file:PATH, github or gcp"


class TokenSourceError(RingfenceError):
    """Raised when the platform gave no identity token. The message says what to set up there."""

    code = Code.NO_PLATFORM_TOKEN


class TokenSource(Protocol):
    """Returns identity tokens of the platform that this process runs on."""

    async def token(self, bound_audience: str) -> str:
        """Return a token. Raises TokenSourceError.

        `bound_audience`: the audience to request where the platform lets its caller choose. The token is then valid for
        one key alone.
        """
        ...


def source_of(text: str, environ: Mapping[str, str] = os.environ) -> TokenSource:
    """Return the source that `file:PATH`, `github` or `gcp` names. Raises InvalidCallError."""
    kind, _, rest = text.partition(":")
    if kind == "file" and rest:
        return TokenFile(Path(rest))
    if text == "github":
        return GitHubActions(environ)
    if text == "gcp":
        return GoogleMetadata()
    raise InvalidCallError(f"{text!r} names no source of identity tokens; write {SYNTAX}")


@dataclass(frozen=True)
class TokenFile:
    """A token file that the platform renews: a projected Kubernetes service account token, or a JWT-SVID from a SPIFFE
    helper.

    Its audience is configured at the platform: `spiffe://TRUST-DOMAIN/enrol`.
    """

    path: Path

    async def token(self, bound_audience: str) -> str:
        """Read the token in the file. `bound_audience` is not used. Raises TokenSourceError."""
        try:
            text = await asyncio.to_thread(self.path.read_text)
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise TokenSourceError(f"cannot read the platform's token in {self.path}: {reason}") from None
        return _checked_token(text, str(self.path))


@dataclass(frozen=True)
class GitHubActions:
    """The OIDC token of a GitHub Actions job, which needs `permissions: id-token: write`."""

    environ: Mapping[str, str] = field(default_factory=lambda: os.environ, repr=False)

    async def token(self, bound_audience: str) -> str:
        """Request a token of this job, with the audience `bound_audience`: so it is bound to one key.

        Raises TokenSourceError.
        """
        url, secret = (self.environ.get(f"ACTIONS_ID_TOKEN_REQUEST_{name}") for name in ("URL", "TOKEN"))
        if not url or not secret:
            raise TokenSourceError(
                "this is no job of GitHub Actions that may ask for identity tokens; give it the permission "
                "id-token: write"
            )
        answer = await _get(
            url, {"audience": bound_audience}, {"Authorization": f"bearer {secret}"}, "GitHub"
        )
        try:
            return _checked_token(answer.json()["value"], "GitHub")
        except (ValueError, KeyError, TypeError):
            raise TokenSourceError("GitHub answered without a token") from None


@dataclass(frozen=True)
class GoogleMetadata:
    """The identity token of a Google Cloud machine, from its metadata server."""

    url: str = _GOOGLE

    async def token(self, bound_audience: str) -> str:
        """Request a token of this machine, with the audience `bound_audience`: so it is bound to one key.

        Raises TokenSourceError.
        """
        answer = await _get(
            f"{self.url}/computeMetadata/v1/instance/service-accounts/default/identity",
            {"audience": bound_audience, "format": "full"},
            {"Metadata-Flavor": "Google"},
            "Google's metadata server",
        )
        return _checked_token(answer.text, "Google's metadata server")


async def _get(url: str, query: dict[str, str], headers: dict[str, str], who: str) -> httpx.Response:
    import httpx

    try:
        async with httpx.AsyncClient(timeout=_TIMEOUT_S, trust_env=False) as http:
            # Existing parts of the URL stay.
            answer = await http.get(httpx.URL(url).copy_merge_params(query), headers=headers)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise TokenSourceError(f"{who} does not answer ({type(error).__name__})") from None
    if answer.status_code != 200:
        raise TokenSourceError(f"{who} gave no identity token: it answered {answer.status_code}")
    return answer


def _checked_token(text: object, where: str) -> str:
    token = text.strip() if isinstance(text, str) else ""
    if token.count(".") != 2 or len(token) > MAX_TOKEN_BYTES:
        raise TokenSourceError(f"what {where} has is no JWT")
    return token
