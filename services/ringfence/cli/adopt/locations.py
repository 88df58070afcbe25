"""Where Ringfence's own secret for an adopted target is: a file of mode 0600, or a path in Vault or OpenBao.

Both are found by services without a restart: by a file with the target's id, or with `.vault` behind it, in the folder
of secrets (`RINGFENCE_BACKENDS_SECRETS`).
"""

from __future__ import annotations

import pwd
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ringfence.backends.secret_sources import BackendSettings
from ringfence.cli.adopt.adoption import Adoption, AdoptStoppedError
from ringfence.kernel.base.private_files import write_private
from ringfence.kernel.base.secret_refs import read_secret
from ringfence.kernel.base.settings import load


class SecretLocation(Protocol):
    """Its methods raise AdoptStoppedError, PlaceError or OSError if the secret cannot be reached."""

    def __str__(self) -> str: ...

    def read(self) -> str | None:
        """Return the secret that is there, without surrounding blanks; None if there is none."""
        ...

    def create(self, secret: str) -> None:
        """Write the secret where none is."""
        ...

    def delete(self) -> None: ...

    def readable_by(self, user: str) -> bool:
        """Return whether a user of this machine can read it, by owner and mode."""
        ...


def location_of(adoption: Adoption) -> SecretLocation:
    """Return the location of an adoption's secret. Raises AdoptStoppedError where Vault is not configured."""
    if adoption.vault is None:
        return FileLocation(adoption.place)
    return VaultLocation.of(adoption.vault, adoption.place, adoption.vault_token)


@dataclass(frozen=True, slots=True)
class FileLocation:
    """A file of this machine."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def read(self) -> str | None:
        try:
            return self.path.read_text().strip()
        except FileNotFoundError:
            return None

    def create(self, secret: str) -> None:
        write_private(self.path, secret, durable=True)  # whole or not at all

    def delete(self) -> None:
        self.path.unlink(missing_ok=True)

    def readable_by(self, user: str) -> bool:
        try:
            uid = pwd.getpwnam(user).pw_uid
        except KeyError:
            raise AdoptStoppedError(f"there is no user {user} on this machine") from None
        status = self.path.stat()
        return uid in (0, status.st_uid) or bool(status.st_mode & 0o077)


@dataclass(frozen=True, slots=True)
class VaultLocation:
    """A path of the KV engine, version 2, that has this secret alone, and a reference to it in the folder."""

    where: str
    """`MOUNT/data/PATH#FIELD`."""
    reference: Path
    token: Path
    """The file with the token of the person who adopts. It may create and destroy at the path."""
    settings: BackendSettings

    @classmethod
    def of(cls, where: str, reference: Path, token: Path | None) -> VaultLocation:
        """Raises AdoptStoppedError if there is no Vault in the settings."""
        settings = load(BackendSettings)
        if settings.vault_url is None:
            raise AdoptStoppedError(
                "no Vault is configured; set RINGFENCE_BACKENDS_VAULT_URL and RINGFENCE_BACKENDS_VAULT_TOKEN_FILE for "
                "issuer, revoker and gateway, and the URL here"
            )
        return cls(where, reference, token or Path.home() / ".vault-token", settings)

    def __str__(self) -> str:
        return f"vault:{self.where}"

    def read(self) -> str | None:
        return self._current()[1]

    def create(self, secret: str) -> None:
        version, _ = self._current()
        path, _, field = self.where.partition("#")
        # The reference first: after a crash between the two, the secret would be there without it.
        write_private(self.reference, self.where, durable=True)
        # Check-and-set: another process may have written meanwhile.
        self._call("POST", path, {"options": {"cas": version}, "data": {field: secret}})

    def delete(self) -> None:
        """Destroy the version that is there. Vault keeps no copy of it."""
        version, secret = self._current()
        if secret is not None:
            path = self.where.partition("#")[0].replace("/data/", "/destroy/", 1)
            self._call("PUT", path, {"versions": [version]})
        self.reference.unlink(missing_ok=True)

    def readable_by(self, user: str) -> bool:
        """Return False: policies of Vault decide it, and no user of this machine as such."""
        return False

    def _current(self) -> tuple[int, str | None]:
        """Return the newest version, 0 before the first, and its secret."""
        path, _, field = self.where.partition("#")
        answer = self._call("GET", path)
        data = (answer or {}).get("data") or {}
        fields = data.get("data") or {}
        if fields and list(fields) != [field]:
            raise AdoptStoppedError(
                f"Vault has other fields at {path}; name a path of its own: --vault MOUNT/data/PATH#FIELD"
            )
        value = fields.get(field)
        return int((data.get("metadata") or {}).get("version", 0)), value.strip() if value else None

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        """Return the answer's JSON, also of 404, which describes a destroyed version. Raises AdoptStoppedError."""
        import httpx

        settings = self.settings
        headers = {
            "X-Vault-Request": "true",
            "X-Vault-Token": read_secret(f"file:{self.token}", "your token for Vault"),
        }
        if settings.vault_namespace is not None:
            headers["X-Vault-Namespace"] = settings.vault_namespace
        verify = ssl.create_default_context(cafile=settings.vault_ca_file)
        try:
            with httpx.Client(base_url=f"{settings.vault_url}/v1/", verify=verify, trust_env=False) as client:
                answer = client.request(method, httpx.URL(path=path), json=body, headers=headers)
        except httpx.HTTPError as error:
            raise AdoptStoppedError(f"Vault does not answer ({type(error).__name__})") from None
        if not answer.is_success and answer.status_code != httpx.codes.NOT_FOUND:
            raise AdoptStoppedError(
                f"Vault answered {answer.status_code} to {method} {path}; your token needs create, update and read "
                "there, and update at the same path under destroy"
            )
        return answer.json() if answer.content else None
