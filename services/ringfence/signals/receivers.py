"""Who may hear of what: the operator's word, in a file. A receiver chooses within it, and widens nothing."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ringfence.kernel.base.errors import SettingsError
from ringfence.kernel.base.secret_refs import SecretRef
from ringfence.kernel.crypto.jws import explain
from ringfence.messages.base import NonEmpty, TargetId
from ringfence.messages.lease import EndKind, Lease
from ringfence.signals.settings import safe_url

EVERY = "*"
_SETTING = "RINGFENCE_SIGNALS_RECEIVERS"


class Receiver(BaseModel):
    """One receiver, as the operator declares it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    """The name of its token."""
    audience: NonEmpty
    """The `aud` of its events."""
    targets: Annotated[tuple[TargetId, ...] | tuple[str], Field(min_length=1)]
    """It hears of leases at these; `["*"]`: at all."""
    ends: tuple[EndKind, ...] | None = None
    """It hears of ends for these causes; of all where not set."""
    push: Annotated[str, AfterValidator(safe_url)] | None = None
    """The one URL that may be pushed to. Without it, it polls."""
    authorization: SecretRef | None = None
    """Where the `Authorization` header of pushes is read."""
    ca_file: Path | None = None
    """The authority (PEM) of its certificate, where it is none of the machine's."""

    @model_validator(mode="after")
    def _fits(self) -> Receiver:
        if self.push is None and (self.authorization or self.ca_file):
            raise ValueError("authorization and ca_file are of no use without push")
        return self

    def accepts(self, lease: Lease) -> bool:
        """Whether the end of a lease is its business."""
        if self.targets != (EVERY,) and lease.target_id not in self.targets:
            return False
        return self.ends is None or (lease.cause is not None and lease.cause.kind in self.ends)


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    receiver: tuple[Receiver, ...] = ()


def read_receivers(file: Path) -> Mapping[str, Receiver]:
    """The receivers in a file by their names. Raises SettingsError."""
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
