"""Sources of secrets: the environment, files, and the KV engine of Vault or OpenBao.

Secret references: where the broker's own credentials for targets are stored, and how they are read.

These credentials never appear on Kafka or in Redis.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Protocol

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.secret_refs import PlaceError, read_secret, read_variable
from ringfence.kernel.base.settings import RingfenceSettings
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

    async def close(self) -> None: ...


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


SecretPlace = Annotated[str, Field(pattern=r"^(env|file|vault):.+$")]
"""`env:NAME`, `file:PATH`, or `vault:MOUNT/data/PATH#FIELD`."""
_LOCAL_FILE: Final = LocalSource("file")
_LOCAL: Mapping[str, SecretSource] = {"env": LocalSource("env"), "file": _LOCAL_FILE}


class BackendSettings(RingfenceSettings):
    """Settings shared by issuer and revoker: `RINGFENCE_BACKENDS_*`, or the table `[backends]`."""

    model_config = SettingsConfigDict(env_prefix="RINGFENCE_BACKENDS_", extra="ignore", frozen=True)

    access: dict[str, SecretPlace] = Field(default_factory=dict)
    """By target: where the URL stands with which Ringfence itself works there."""
    secrets: Path | None = None
    """A folder with one file of mode 0600 for each target that `access` does not name. The file has the target's id as
    its name and the secret as its content, or the name `TARGET.vault` and the content `MOUNT/data/PATH#FIELD`. A new
    file is used at once, without a restart."""
    vault_url: str | None = None
    """Where Vault or OpenBao is, e.g. `https://vault.example:8200`."""
    vault_token_file: Path | None = None
    """A file of mode 0600 with the token; read each time, so that an agent of Vault's can renew it."""
    vault_ca_file: Path | None = None
    """The certificate of the authority that signed Vault's; the machine's own authorities if not set."""
    vault_namespace: str | None = None
    """The namespace, where there are any."""


class TargetAccess:
    """Reads the secrets that the settings name, each time it needs one.

    A replaced secret takes effect without a restart.
    """

    def __init__(self, places: Mapping[str, str], sources: Mapping[str, SecretSource] | None = None) -> None:
        """`places` maps a target to its secret reference.

        `sources` maps the prefix before the colon to a source; by default `env` and `file`.
        """
        self._places = dict(places)
        self._folder: Path | None = None
        self._sources = sources or _LOCAL
        self._read_at: dict[str, tuple[SecretSource, str, str]] = {}
        """By target: the source of its secret, the location, and what messages call it."""

    @classmethod
    def of(cls, settings: BackendSettings) -> TargetAccess:
        """Return an instance from the settings.

        Raises AccessError if a reference points to Vault and no Vault is configured.
        """
        sources = dict(_LOCAL)
        if settings.vault_url is not None and settings.vault_token_file is not None:
            sources["vault"] = VaultSource(
                settings.vault_url,
                settings.vault_token_file,
                ca_file=settings.vault_ca_file,
                namespace=settings.vault_namespace,
            )
        access = cls(settings.access, sources)
        access._folder = settings.secrets
        for target_id in settings.access:
            access.check(target_id)
        return access

    def check(self, target_id: str) -> None:
        """Raise AccessError if no secret reference for this target is set, or none that this process can read.

        Reads no secret.
        """
        kind = self._place_of(target_id).partition(":")[0]
        if kind not in self._sources:
            raise AccessError(
                f"the rights at target {target_id} are in {kind}; set RINGFENCE_BACKENDS_VAULT_URL and "
                "RINGFENCE_BACKENDS_VAULT_TOKEN_FILE"
            )

    async def read(self, target_id: str) -> str:
        """Return the URL for a target, with the broker's credentials. Raises AccessError."""
        source, location, name = self._source_of(target_id)
        return await source.read(location, name)

    def at_hand(self, target_id: str) -> str | None:
        """Return the same as `read` if that needs no I/O to another service, else None. Raises AccessError."""
        source, location, name = self._read_at.get(target_id) or self._source_of(target_id)
        try:
            return source.at_hand(location, name)
        except AccessError:
            self._read_at.pop(target_id, None)  # its secret may be elsewhere by now
            raise

    def _place_of(self, target_id: str) -> str:
        """Return the secret reference of a target. Raises AccessError if there is none."""
        if target_id in self._places:
            return self._places[target_id]
        if self._folder is not None:
            if (file := self._folder / target_id).is_file():
                return f"file:{file}"
            if (reference := self._folder / f"{target_id}.vault").is_file():
                return (
                    f"vault:{_LOCAL_FILE.at_hand(str(reference), f'the path in Vault of target {target_id}')}"
                )
        beside = "" if self._folder is None else f", or write the file {self._folder / target_id}"
        raise AccessError(
            f"no rights at target {target_id} are named; name where they are in RINGFENCE_BACKENDS_ACCESS{beside}"
        )

    def _source_of(self, target_id: str) -> tuple[SecretSource, str, str]:
        self.check(target_id)
        kind, _, location = self._place_of(target_id).partition(":")
        found = self._read_at[target_id] = self._sources[kind], location, f"the rights at target {target_id}"
        return found

    async def close(self) -> None:
        for source in self._sources.values():
            await source.close()
