"""Sources of secrets: the environment, files, and the KV engine of Vault or OpenBao."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.secret_refs import PlaceError, read_secret, read_variable
from ringfence.messages.codes import Code

if TYPE_CHECKING:
    import httpx

KEPT_S: Final = 10.0
"""How long a secret from Vault is cached, which is the longest delay until a replaced secret is used."""
_ANSWER_S: Final = 3.0


class AccessError(RingfenceError):
    """Raised when the broker's own credentials for a target are not configured, or not where the reference says.

    Never quotes them.
    """

    code = Code.ACCESS_MISSING


class SecretSource(Protocol):
    """Interface of one kind of source."""

    async def read(self, where: str, what: str) -> str:
        """Return the current secret at `where`. `what` names it in messages. Raises AccessError."""
        ...

    def at_hand(self, where: str, what: str) -> str | None:
        """Return the same as `read` if that needs no I/O to another service, else None. Raises AccessError."""
        ...

    async def close(self) -> None:
        """Close all connections."""
        ...


class LocalSource:
    """Source on this machine: the environment of this process, and files that nobody else can read."""

    def __init__(self, kind: Literal["env", "file"]) -> None:
        self._kind = kind

    async def read(self, where: str, what: str) -> str:
        """Return the value of the variable or file of this name. Raises AccessError."""
        return self.at_hand(where, what)

    def at_hand(self, where: str, what: str) -> str:
        try:
            return read_variable(where, what) if self._kind == "env" else read_secret(f"file:{where}", what)
        except PlaceError as error:
            raise AccessError(str(error)) from None

    async def close(self) -> None:
        """Do nothing: there is no connection."""


class VaultSource:
    """Source in the KV engine, version 2, of Vault or OpenBao.

    `where` is `MOUNT/data/PATH#FIELD`, the path as in its API.
    """

    def __init__(
        self,
        url: str,
        token_file: Path,
        *,
        ca_file: Path | None = None,
        namespace: str | None = None,
        seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        """`seconds` is a monotonic clock. Raises AccessError if the CA file cannot be read."""
        self._token, self._token_file = LocalSource("file"), str(token_file)
        self._seconds = seconds
        self._headers = {"X-Vault-Request": "true"} | (
            {"X-Vault-Namespace": namespace} if namespace is not None else {}
        )
        try:
            verify = ssl.create_default_context(cafile=ca_file)
        except OSError:
            raise AccessError(f"cannot read {ca_file}, the certificate of Vault's authority") from None
        import httpx

        self._client = httpx.AsyncClient(
            base_url=url.rstrip("/") + "/v1/", verify=verify, timeout=_ANSWER_S, trust_env=False
        )
        self._kept: dict[str, tuple[float, str]] = {}

    async def read(self, where: str, what: str) -> str:
        """Return the field of the newest version. Raises AccessError."""
        cached = self.at_hand(where, what)
        if cached is not None:
            return cached
        value = await self._fetch(where, await self._token.read(self._token_file, "Vault's token"))
        self._kept[where] = (self._seconds(), value)
        return value

    def at_hand(self, where: str, what: str) -> str | None:
        """Return the cached secret if it is recent enough, else None."""
        at, value = self._kept.get(where, (0.0, ""))
        return value if value and self._seconds() - at < KEPT_S else None

    async def close(self) -> None:
        """Close the HTTP client."""
        self._kept.clear()
        await self._client.aclose()

    async def _fetch(self, where: str, token: str) -> str:
        import httpx

        path, _, field = where.partition("#")
        headers = {**self._headers, "X-Vault-Token": token}
        try:
            answer = await self._client.get(httpx.URL(path=path), headers=headers)
        except httpx.HTTPError as error:
            raise AccessError(f"Vault does not answer ({type(error).__name__})") from None
        match answer.status_code:
            case 200:
                return _field(answer, path, field)
            case 403:
                raise AccessError(f"Vault's token may not read {path}; give it a policy that says so")
            case 404:
                raise AccessError(f"Vault has nothing at {path}; a path is MOUNT/data/PATH#FIELD")
            case status:
                raise AccessError(f"Vault answered {status} for {path}")


def _field(answer: httpx.Response, path: str, field: str) -> str:
    try:
        body: Any = answer.json()
        value = body["data"]["data"][field]
    except (ValueError, TypeError, KeyError):
        value = None
    if not isinstance(value, str) or not value.strip():
        raise AccessError(f"Vault has no text as the field {field!a} at {path}")
    return value.strip()
