"""Request bodies of receivers: stream management (SSF 1.0, 8.1) and polls (RFC 8936, 2.2)."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import orjson
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.strict_json import json_object
from ringfence.kernel.base.validation_problems import explain
from ringfence.messages.signals import DeliveryMethod

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

    code = "invalid_request"


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
