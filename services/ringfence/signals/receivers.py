"""The receivers that the operator declares in a TOML file, and what each may be told. A receiver can only narrow it."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ringfence.kernel.base.errors import SettingsError
from ringfence.kernel.base.secret_refs import SecretRef
from ringfence.kernel.base.validation_problems import explain
from ringfence.messages.base import NonEmpty, TargetId
from ringfence.messages.lease import EndKind, Lease
from ringfence.signals.settings import safe_url

EVERY = "*"
_SETTING = "RINGFENCE_SIGNALS_RECEIVERS"


class Receiver(BaseModel):
    """One declared receiver."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    """Also the name of its bearer token."""
    audience: NonEmpty
    """The `aud` of its events."""
    targets: Annotated[tuple[TargetId, ...] | tuple[str], Field(min_length=1)]
    """The targets whose leases it is told about; `["*"]`: all."""
    ends: tuple[EndKind, ...] | None = None
    """The causes of lease ends that it is told about; None: all."""
    push: Annotated[str, AfterValidator(safe_url)] | None = None
    """The only URL that may be pushed to. Without it, the receiver polls."""
    authorization: SecretRef | None = None
    """Where the `Authorization` header of pushes is read."""
    ca_file: Path | None = None
    """The certificate authority (PEM) of its server, where the system does not trust it."""

    @model_validator(mode="after")
    def _fits(self) -> Receiver:
        if self.push is None and (self.authorization or self.ca_file):
            raise ValueError("authorization and ca_file are of no use without push")
        return self

    def accepts(self, lease: Lease) -> bool:
        """Whether this receiver is to be told about the end of a lease."""
        if self.targets != (EVERY,) and lease.target_id not in self.targets:
            return False
        return self.ends is None or (lease.cause is not None and lease.cause.kind in self.ends)


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    receiver: tuple[Receiver, ...] = ()


def read_receivers(file: Path) -> Mapping[str, Receiver]:
    """Read the receivers from a file, by name. Raises SettingsError."""
    try:
        declared = _File.model_validate(tomllib.loads(file.read_text()))
    except OSError as error:
        raise SettingsError(f"{_SETTING}: cannot read {file}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{_SETTING}: {file} is no TOML: {error}") from None
    except ValidationError as error:
        raise SettingsError(f"{_SETTING}: {file}: {explain(error)}") from None
    by_name = {receiver.name: receiver for receiver in declared.receiver}
    if len(by_name) < len(declared.receiver):
        raise SettingsError(f"{_SETTING}: {file} names a receiver twice")
    return by_name
