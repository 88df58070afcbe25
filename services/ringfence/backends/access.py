"""Secret references: where the broker's own credentials for targets are stored, and how they are read.

These credentials never appear on Kafka or in Redis.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from ringfence.backends.secret_sources import AccessError, LocalSource, SecretSource, VaultSource
from ringfence.kernel.base.settings import RingfenceSettings

SecretPlace = Annotated[str, Field(pattern=r"^(env|file|vault):.+$")]
"""`env:NAME`, `file:PATH`, or `vault:MOUNT/data/PATH#FIELD`."""
_LOCAL: Mapping[str, SecretSource] = {"env": LocalSource("env"), "file": LocalSource("file")}


class BackendSettings(RingfenceSettings):
    """Settings shared by issuer and revoker: `RINGFENCE_BACKENDS_*`, or the table `[backends]`."""

    model_config = SettingsConfigDict(env_prefix="RINGFENCE_BACKENDS_", extra="ignore", frozen=True)

    access: dict[str, SecretPlace] = Field(default_factory=dict)
    """By target: where the URL stands with which Ringfence itself works there."""
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
        for target_id in settings.access:
            access.check(target_id)
        return access

    def check(self, target_id: str) -> None:
        """Raise AccessError if no secret reference for this target is set, or none that this process can read.

        Reads no secret.
        """
        if target_id not in self._places:
            raise AccessError(
                f"no rights at target {target_id} are named; name where they are in RINGFENCE_BACKENDS_ACCESS"
            )
        kind = self._places[target_id].partition(":")[0]
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
        return source.at_hand(location, name)

    def _source_of(self, target_id: str) -> tuple[SecretSource, str, str]:
        self.check(target_id)
        kind, _, location = self._places[target_id].partition(":")
        found = self._read_at[target_id] = self._sources[kind], location, f"the rights at target {target_id}"
        return found

    async def close(self) -> None:
        """Close all connections."""
        for source in self._sources.values():
            await source.close()
