"""HTTP API of the transmitter: metadata and stream management (SSF 1.0, 7 and 8.1), polls (RFC 8936)."""

from __future__ import annotations

import hmac
import json
import logging
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from ringfence.kernel.base import metrics
from ringfence.kernel.base.errors import RingfenceError, UnavailableError
from ringfence.kernel.base.secret_refs import PlaceError, read_secret
from ringfence.kernel.base.strict_json import json_object
from ringfence.kernel.service.bearer_tokens import WRONG_WINDOW_MS, Tokens, WrongTokens
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.codes import AnyCode, Code
from ringfence.messages.credential import Reason
from ringfence.messages.operations import EventSubject
from ringfence.signals.delivery import POLL, PUSH, Delivery, DeliverySupervisor
from ringfence.signals.events import SUPPORTED, removed_without, verification
from ringfence.signals.requests import (
    DeliveryRequest,
    InvalidRequestError,
    PollRequest,
    Receiver,
    RequestTooLargeError,
    StatusChange,
    StreamChange,
    StreamConfiguration,
    SubjectChange,
    VerificationRequest,
    parse_request,
)
from ringfence.signals.settings import SignalsSettings
from ringfence.signals.streams import SignalStreamState, StreamTable

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 1024 * 1024
MAX_REMOVED = 1000
MAX_REMOVED_BYTES = 256 * 1024
"""All removed subjects are in one signed record of at most 512 KiB, in base64url."""
METADATA = "/.well-known/ssf-configuration"
JWKS = "/.well-known/jwks.json"
STREAMS, STATUS, VERIFY = "/ssf/streams", "/ssf/status", "/ssf/verify"
ADD, REMOVE, POLLS = "/ssf/subjects/add", "/ssf/subjects/remove", "/ssf/poll"
_CACHEABLE = {"Cache-Control": "public, max-age=300"}
_NO_STORE = {"Cache-Control": "no-store"}
_TRANSMITTER_MEMBERS = (
    "iss",
    "aud",
    "events_supported",
    "events_delivered",
    "min_verification_interval",
    "inactivity_timeout",
)
"""Members of a stream configuration that the transmitter sets. A receiver may send them back unchanged."""

_EMPTY_BODY = b"{}"
"""All members of the request are optional, and so is the body."""

Endpoint = Callable[[Request, Receiver], Awaitable[Response]]


class StreamNotFoundError(RingfenceError):
    """The receiver has no such stream. It cannot tell whether another receiver has."""

    code = Code.NOT_FOUND


@dataclass(slots=True, eq=False)
class SignalsApi:
    runtime: Runtime
    settings: SignalsSettings
    streams: StreamTable
    deliveries: DeliverySupervisor
    receivers: Mapping[str, Receiver]
    tokens: Tokens
    _wrong_tokens: WrongTokens = field(init=False, default_factory=WrongTokens)
    _verified_ms: dict[str, int] = field(init=False, default_factory=dict)

    def routes(self) -> list[BaseRoute]:
        guarded: tuple[tuple[str, str, Endpoint], ...] = (
            ("POST", STREAMS, self._create),
            ("GET", STREAMS, self._read_stream),
            ("PATCH", STREAMS, self._update),
            ("PUT", STREAMS, self._replace),
            ("DELETE", STREAMS, self._delete),
            ("GET", STATUS, self._status),
            ("POST", STATUS, self._set_status),
            ("POST", ADD, self._add_subject),
            ("POST", REMOVE, self._remove_subject),
            ("POST", VERIFY, self._verify),
            ("POST", POLLS + "/{stream_id}", self._poll),
        )
        return [
            Route(METADATA, self._metadata),
            Route(JWKS, self._jwks),
            *(Route(path, self._guarded(endpoint, path), methods=[verb]) for verb, path, endpoint in guarded),
        ]

    # --- for everybody ---

    async def _metadata(self, _: Request) -> Response:
        url = self.settings.url
        return JSONResponse(
            {
                "spec_version": "1_0",
                "issuer": url,
                "jwks_uri": url + JWKS,
                "delivery_methods_supported": [PUSH, POLL],
                "configuration_endpoint": url + STREAMS,
                "status_endpoint": url + STATUS,
                "add_subject_endpoint": url + ADD,
                "remove_subject_endpoint": url + REMOVE,
                "verification_endpoint": url + VERIFY,
                "authorization_schemes": [{"spec_urn": "urn:ietf:rfc:6750"}],
                "default_subjects": "ALL",
            },
            headers=_CACHEABLE,
        )

    async def _jwks(self, _: Request) -> Response:
        """All currently valid keys of this service, including the next one."""
        now_s = self.runtime.clock.now_ms() / 1000
        keys = [
            {**key.jwk.model_dump(exclude_none=True), "kid": key.kid, "use": "sig", "alg": _alg(key.jwk.kty)}
            for service in self.runtime.trust.require(now_s).services
            if service.id == self.runtime.key.id
            for key in service.keys
            if key.not_before <= now_s < key.not_after
        ]
        return JSONResponse({"keys": keys}, headers=_CACHEABLE)

    # --- streams ---

    async def _create(self, request: Request, receiver: Receiver) -> Response:
        asked_for = parse_request(StreamConfiguration, await _read_body(request) or _EMPTY_BODY)
        delivery = asked_for.delivery or DeliveryRequest(method=POLL)
        _check_delivery(delivery, receiver)
        stream = await self.streams.create(receiver.name, delivery.method, **_configuration_fields(asked_for))
        if stream is None:
            return _failure(
                409, Code.INVALID_REQUEST, "there is a stream of yours already; each receiver has one"
            )
        await self.deliveries.reconciled()
        log.info("receiver %s has a stream: %s", receiver.name, stream.id)
        return JSONResponse(self._stream_view(stream, receiver), 201)

    async def _read_stream(self, request: Request, receiver: Receiver) -> Response:
        await self.streams.caught_up()
        stream_id = request.query_params.get("stream_id")
        if stream_id is None:
            stream = self.streams.of(receiver.name)
            return _json_response([] if stream is None else [self._stream_view(stream, receiver)])
        return _json_response(self._stream_view(self._own_stream(receiver, stream_id), receiver))

    async def _update(self, request: Request, receiver: Receiver) -> Response:
        body = await _read_body(request)
        asked_for = parse_request(StreamChange, body)
        members = json_object(body).keys() & {"events_requested", "description"}
        changed = {name: value for name, value in _configuration_fields(asked_for).items() if name in members}
        return await self._changed(receiver, asked_for, body, changed)

    async def _replace(self, request: Request, receiver: Receiver) -> Response:
        body = await _read_body(request)
        asked_for = parse_request(StreamChange, body)
        if asked_for.delivery is None:
            asked_for = asked_for.model_copy(update={"delivery": DeliveryRequest(method=POLL)})
        return await self._changed(receiver, asked_for, body, _configuration_fields(asked_for))

    async def _changed(
        self, receiver: Receiver, asked_for: StreamChange, body: bytes, changed: dict[str, Any]
    ) -> Response:
        await self.streams.caught_up()
        view = self._stream_view(self._own_stream(receiver, asked_for.stream_id), receiver)
        members = json_object(body)
        for name in _TRANSMITTER_MEMBERS:
            if name in members and members[name] not in (view.get(name), [view.get(name)]):
                raise InvalidRequestError(f"{name} is not the receiver's to set")
        if asked_for.delivery is not None:
            _check_delivery(asked_for.delivery, receiver, own_poll_url=self._poll_url(asked_for.stream_id))
            changed["method"] = asked_for.delivery.method
        return _json_response(
            self._stream_view(await self._change(receiver, asked_for.stream_id, **changed), receiver)
        )

    async def _delete(self, request: Request, receiver: Receiver) -> Response:
        stream_id = request.query_params.get("stream_id", "")
        await self.streams.caught_up()
        self._own_stream(receiver, stream_id)
        await self._change(receiver, stream_id, status="deleted")
        self._verified_ms.pop(stream_id, None)
        return Response(status_code=204)

    # --- status, subjects, verification ---

    async def _status(self, request: Request, receiver: Receiver) -> Response:
        await self.streams.caught_up()
        stream = self._own_stream(receiver, request.query_params.get("stream_id", ""))
        return _json_response(_status_of(stream, receiver))

    async def _set_status(self, request: Request, receiver: Receiver) -> Response:
        asked_for = parse_request(StatusChange, await _read_body(request))
        changed = {"status": asked_for.status, "reason": asked_for.reason}
        return _json_response(
            _status_of(await self._change(receiver, asked_for.stream_id, **changed), receiver)
        )

    async def _add_subject(self, request: Request, receiver: Receiver) -> Response:
        """Add a subject again. What the operator does not allow stays silent, and the answer does not tell."""
        asked_for = parse_request(SubjectChange, await _read_body(request))
        stream = await self._current_stream(receiver, asked_for.stream_id)
        remaining = tuple(removed_without(stream.claims.removed, asked_for.subject))
        if len(remaining) < len(stream.claims.removed):
            await self._change(receiver, asked_for.stream_id, removed=remaining)
        return Response(status_code=200)

    async def _remove_subject(self, request: Request, receiver: Receiver) -> Response:
        asked_for = parse_request(SubjectChange, await _read_body(request))
        removed = (await self._current_stream(receiver, asked_for.stream_id)).claims.removed
        if asked_for.subject not in removed:
            more = (*removed, asked_for.subject)
            if len(more) > MAX_REMOVED or len(json.dumps(more)) > MAX_REMOVED_BYTES:
                most = f"{MAX_REMOVED} removed subjects, of {MAX_REMOVED_BYTES} bytes together"
                raise InvalidRequestError(f"a stream has at most {most}; add some again")
            await self._change(receiver, asked_for.stream_id, removed=more)
        return Response(status_code=204)

    async def _verify(self, request: Request, receiver: Receiver) -> Response:
        asked_for = parse_request(VerificationRequest, await _read_body(request))
        stream = await self._current_stream(receiver, asked_for.stream_id)
        delivery = self.deliveries.of(stream.id)
        if delivery is None:
            raise InvalidRequestError(f"the stream is {stream.claims.status}, and carries nothing now")
        now_ms = self.runtime.clock.now_ms()
        wait_ms = self.settings.verification_interval_s * 1000
        if now_ms - self._verified_ms.get(stream.id, -wait_ms) < wait_ms:
            why = "too soon after the one before: see min_verification_interval"
            wait = {"Retry-After": str(self.settings.verification_interval_s)}
            return _failure(429, Code.INVALID_REQUEST, why, wait)
        self._verified_ms[stream.id] = now_ms
        delivery.verify(
            verification(
                stream_id=stream.id,
                issuer=self.settings.url,
                audience=receiver.audience,
                state=asked_for.state,
                now_ms=now_ms,
                jti=str(uuid.uuid4()),
            )
        )
        return Response(status_code=204)

    # --- polls ---

    async def _poll(self, request: Request, receiver: Receiver) -> Response:
        stream = self._own_stream(receiver, request.path_params["stream_id"])
        asked_for = parse_request(PollRequest, await _read_body(request) or _EMPTY_BODY)
        if stream.claims.method != POLL:
            raise InvalidRequestError("this stream is pushed; change its delivery to poll")
        delivery = self.deliveries.of(stream.id)
        if delivery is None:
            return _json_response({"sets": {}})
        await _settle(delivery, asked_for, receiver)
        wait_s = 0.0 if asked_for.return_immediately else self.settings.poll_s
        events, more = await delivery.window.next_batch(asked_for.max_events, wait_s)
        if not events and asked_for.max_events and not delivery.is_owner:
            raise UnavailableError("another replica has this stream, or none yet; ask again")
        sets = {event.jti: delivery.sign(event) for event in events}
        return _json_response({"sets": sets, **({"moreAvailable": True} if more else {})})

    # --- what they share ---

    def _own_stream(self, receiver: Receiver, stream_id: str) -> SignalStreamState:
        """The receiver's stream with this id. Raises StreamNotFoundError."""
        stream = self.streams.of(receiver.name)
        if stream is None or stream.id != stream_id:
            raise _stream_not_found()
        return stream

    async def _current_stream(self, receiver: Receiver, stream_id: str) -> SignalStreamState:
        await self.streams.caught_up()
        return self._own_stream(receiver, stream_id)

    async def _change(self, receiver: Receiver, stream_id: str, **changed: Any) -> SignalStreamState:
        stream = await self.streams.change(receiver.name, stream_id, **changed)
        if stream is None:
            raise _stream_not_found()
        await self.deliveries.reconciled()  # what is paused says nothing once this is answered
        return stream

    def _poll_url(self, stream_id: str) -> str:
        return f"{self.settings.url}{POLLS}/{stream_id}"

    def _stream_view(self, stream: SignalStreamState, receiver: Receiver) -> dict[str, Any]:
        """A stream's configuration (SSF 1.0, 8.1.1)."""
        claims = stream.claims
        url = receiver.push if claims.method == PUSH else self._poll_url(stream.id)
        delivery = {"method": claims.method, **({} if url is None else {"endpoint_url": url})}
        view: dict[str, Any] = {
            "stream_id": stream.id,
            "iss": self.settings.url,
            "aud": receiver.audience,
            "delivery": delivery,
            "events_supported": list(SUPPORTED),
            "events_delivered": list(stream.delivered),
            "min_verification_interval": self.settings.verification_interval_s,
        }
        if claims.events_requested is not None:
            view["events_requested"] = list(claims.events_requested)
        if claims.description is not None:
            view["description"] = claims.description
        return view

    # --- around each ---

    def _guarded(self, endpoint: Endpoint, path: str) -> Callable[[Request], Awaitable[Response]]:
        """Authenticate the receiver by its bearer token, and turn errors into answers."""

        async def guarded(request: Request) -> Response:
            name = self.tokens.name_of(request.headers.get("authorization"))
            if name is None:
                response = await self._refuse_unauthenticated(request)
            elif (receiver := self.receivers.get(name)) is None:
                response = _failure(403, Code.ACCESS_DENIED, f"the operator declared no receiver {name}")
            else:
                response = await _respond(endpoint, request, receiver)
            response.headers.update(_NO_STORE)
            metrics.HTTP_REQUESTS.labels(f"{request.method} {path}", response.status_code).inc()
            return response

        return guarded

    async def _refuse_unauthenticated(self, request: Request) -> Response:
        what = "this needs a bearer token of a receiver"
        if not self._wrong_tokens.add(self.runtime.clock.now_ms()):
            wait = {"Retry-After": str(WRONG_WINDOW_MS // 1000)}
            return _failure(
                429, Code.AUTHENTICATION_FAILED, "too many calls without a token that is let in", wait
            )
        where = request.client.host if request.client else "unknown"
        log.warning("a call from %s without a token that is let in", where)
        reason = Reason(
            code=Code.TOKEN_UNKNOWN, message=f"a call from {where} without a token that is let in"
        )
        await self.runtime.event("refused", EventSubject.SIGNALS, about=(uuid.uuid4(),), reasons=(reason,))
        return _failure(401, Code.AUTHENTICATION_FAILED, what, {"WWW-Authenticate": 'Bearer realm="signals"'})


async def _settle(delivery: Delivery, asked_for: PollRequest, receiver: Receiver) -> None:
    """Settle the events that the receiver acknowledged or refused."""
    for jti in asked_for.ack:
        if delivery.window.settle(jti) is not None:
            metrics.SIGNALS.labels("delivered").inc()
    for jti, error in asked_for.set_errs.items():
        event = delivery.window.settle(jti)
        if event is not None:
            await delivery.refused(event, error.err)


async def _respond(endpoint: Endpoint, request: Request, receiver: Receiver) -> Response:
    try:
        return await endpoint(request, receiver)
    except StreamNotFoundError as error:
        return _failure(404, error.code, str(error))
    except UnavailableError as error:
        return _failure(503, error.code, str(error), {"Retry-After": "1"})
    except RequestTooLargeError as error:
        return _failure(413, error.code, str(error))
    except RingfenceError as error:
        return _failure(400, error.code, str(error))


def _check_delivery(asked_for: DeliveryRequest, receiver: Receiver, own_poll_url: str | None = None) -> None:
    """Raise InvalidRequestError where the delivery differs from what the operator declared: receivers choose no URL
    (SSRF).
    """
    if asked_for.authorization_header is not None and not _is_declared_header(
        asked_for.authorization_header, receiver
    ):
        raise InvalidRequestError(
            "authorization_header is a secret, and kept by the operator: give it to them, and leave it out here"
            " or repeat it exactly"
        )
    if asked_for.method == POLL:
        if asked_for.endpoint_url not in (None, own_poll_url):
            raise InvalidRequestError("the endpoint_url of polls is not the receiver's to set; leave it out")
    elif receiver.push is None:
        raise InvalidRequestError("the operator declared no URL to push to; poll, or ask them for it")
    elif asked_for.endpoint_url != receiver.push:
        raise InvalidRequestError(
            "endpoint_url is not the one that the operator declared; ask them to change it"
        )


def _is_declared_header(header: object, receiver: Receiver) -> bool:
    """Whether the header equals the declared `Authorization` header, in constant time."""
    if receiver.authorization is None or not isinstance(header, str):
        return False
    try:
        declared = read_secret(
            receiver.authorization, f"the Authorization header of receiver {receiver.name}"
        )
    except PlaceError:
        return False
    return hmac.compare_digest(header.encode(errors="replace"), declared.encode())


def _configuration_fields(asked_for: StreamConfiguration) -> dict[str, Any]:
    events = asked_for.events_requested
    return {
        "events_requested": None if events is None else tuple(events),
        "description": asked_for.description,
    }


def _status_of(stream: SignalStreamState, receiver: Receiver) -> dict[str, Any]:
    """The stream's status. A push stream whose receiver has no declared URL is reported as paused."""
    if stream.claims.status == "enabled" and stream.claims.method == PUSH and receiver.push is None:
        return {
            "stream_id": stream.id,
            "status": "paused",
            "reason": "the operator declares no URL to push to",
        }
    reason = {} if stream.claims.reason is None else {"reason": stream.claims.reason}
    return {"stream_id": stream.id, "status": stream.claims.status, **reason}


def _alg(kty: str) -> str:
    return "ES256" if kty == "EC" else "EdDSA"


def _stream_not_found() -> StreamNotFoundError:
    return StreamNotFoundError("you have no stream of that id")


async def _read_body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise RequestTooLargeError(f"a request has at most {MAX_BODY_BYTES} bytes")
    return body


def _json_response(content: Any) -> Response:
    return JSONResponse(content)


def _failure(
    status: int, code: AnyCode, description: str, headers: Mapping[str, str] | None = None
) -> Response:
    return JSONResponse({"err": code, "description": description}, status, headers)
