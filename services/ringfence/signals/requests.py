"""The receivers that the operator declares in a TOML file, and the request bodies that receivers send.

Bodies are those of stream management (SSF 1.0, 8.1) and of polls (RFC 8936, 2.2). The file limits what each receiver
may learn; a receiver can only narrow it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from ringfence.kernel.base.errors import RingfenceError, SettingsError
from ringfence.kernel.base.secret_refs import SecretRef
from ringfence.kernel.base.strict_json import json_object
from ringfence.kernel.base.validation_problems import explain
from ringfence.messages.base import NonEmpty, TargetId
from ringfence.messages.codes import Code
from ringfence.messages.lease import EndKind, Lease
from ringfence.messages.operations import DeliveryMethod
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


_Text = Annotated[str, Field(max_length=512)]
_Jti = Annotated[str, Field(max_length=128)]
_StreamId = Annotated[str, Field(max_length=128)]
"""Any text: an unknown id is a missing stream (404), not a malformed request (400)."""
_MAX_SUBJECT_BYTES = 2048
_MAX_DESCRIPTION = 512
"""Longer descriptions are truncated, as SSF allows."""
MAX_ACKS = 10_000

A = TypeVar("A", bound="SsfModel")


class InvalidRequestError(RingfenceError):
    """A malformed or impossible request; `code` is the `err` of RFC 8935 where one fits."""

    code = Code.INVALID_REQUEST


class RequestTooLargeError(InvalidRequestError):
    """The body is larger than the API accepts (status 413)."""


class SsfModel(BaseModel):
    """Base class. Unknown members are ignored, since later versions of SSF may add some."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class DeliveryRequest(SsfModel):
    """The delivery method that a receiver asks for. The URL of polls is chosen by the transmitter."""

    method: DeliveryMethod
    endpoint_url: _Text | None = None
    authorization_header: Any = None


class StreamConfiguration(SsfModel):
    """The part of a stream's configuration that its receiver chooses."""

    delivery: DeliveryRequest | None = None
    events_requested: Annotated[list[_Text], Field(max_length=100)] | None = None
    description: Annotated[str, AfterValidator(lambda text: text[:_MAX_DESCRIPTION])] | None = None


class StreamChange(StreamConfiguration):
    """A new configuration of an existing stream."""

    stream_id: _StreamId


class StatusChange(SsfModel):
    """A stream is to be enabled, paused or disabled."""

    stream_id: _StreamId
    status: Annotated[str, Field(pattern=r"^(enabled|paused|disabled)$")]
    reason: _Text | None = None


class SubjectChange(SsfModel):
    """A subject (RFC 9493) is to be added to a stream, or removed."""

    stream_id: _StreamId
    subject: dict[str, Any]

    @field_validator("subject")
    @classmethod
    def _check_format(cls, subject: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(subject.get("format"), str) or len(subject) < 2:
            raise ValueError("a subject identifier has a format and what belongs to it (RFC 9493)")
        if len(orjson.dumps(subject)) > _MAX_SUBJECT_BYTES:
            raise ValueError(f"a subject identifier has at most {_MAX_SUBJECT_BYTES} bytes")
        return subject


class VerificationRequest(SsfModel):
    """A request for a verification event, which shows that the stream works."""

    stream_id: _StreamId
    state: _Text | None = None


class SetError(SsfModel):
    """Why a receiver refuses an event."""

    err: _Text
    description: _Text | None = None


class PollRequest(SsfModel):
    """A poll: how many events to return, and which ones were acknowledged or refused."""

    max_events: Annotated[int, Field(ge=0, alias="maxEvents")] = 100
    return_immediately: Annotated[bool, Field(alias="returnImmediately")] = False
    ack: Annotated[list[_Jti], Field(max_length=MAX_ACKS)] = []
    set_errs: Annotated[dict[_Jti, SetError], Field(alias="setErrs", max_length=MAX_ACKS)] = {}


def parse_request(model: type[A], body: bytes) -> A:
    """Parse a request body. Raises InvalidRequestError."""
    try:
        return model.model_validate(json_object(body))
    except ValidationError as error:
        raise InvalidRequestError(explain(error)) from None
    except ValueError as error:
        raise InvalidRequestError(f"the body is no JSON object: {error}") from None
