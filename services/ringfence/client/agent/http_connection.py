"""An agent's connection by the gateway's HTTP API (`RINGFENCE_DOOR`), without Kafka, and the id of this process.

It carries requests, withdrawals and releases, sealed replies and the trust bundle, and needs no credentials for
Kafka. Commands and records need Kafka. The process id is random: it tells processes with the same key apart; a forked
child gets its own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn
from urllib.parse import quote, urlsplit

import httpx

from ringfence.client.agent.dpop import NONCE_HEADER, proof
from ringfence.client.agent.httpx_auth import wants_nonce
from ringfence.client.connection import Connection, Coordinate
from ringfence.client.errors import InvalidCallError, RefusedError, require_understood
from ringfence.client.instance_enrolment import EnrolledInstanceKey
from ringfence.client.settings import ClientSettings
from ringfence.client.task_view import TaskView
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import InvalidMessageError, SettingsError, UnavailableError
from ringfence.kernel.base.http_client import service_client
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.base.replay_memory import BoundedDict
from ringfence.kernel.base.retry import backoff
from ringfence.kernel.crypto.jws import Signed, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import Claims, Topic
from ringfence.messages.codes import AnyCode, Code, ReceivedCode
from ringfence.messages.credential import CredentialRequest, Reason, RequestWithdraw
from ringfence.messages.lease import RevocationRequest
from ringfence.messages.registry import AgentRenewKey
from ringfence.messages.topics import CREDENTIAL_REPLY, CREDENTIAL_REQUEST, REVOCATION_REQUEST
from ringfence.model.target_settings import RESERVED_NAME

_process_id = secrets.token_urlsafe(12)


def process_id() -> str:
    """The id of this process."""
    return _process_id


def _renew_process_id() -> None:
    global _process_id
    _process_id = secrets.token_urlsafe(12)


os.register_at_fork(after_in_child=_renew_process_id)


log = logging.getLogger(__name__)

GIVE_UP_S: Final = 15.0
"""How long to try to post a message while the gateway or Kafka is away. As with Kafka itself."""
NOWHERE: Final[Coordinate] = ("", -1, -1)
"""The coordinates of what was posted: a gateway does not tell them."""
_WAIT_S, _CROWDED_WAIT_S, _MANY = 30, 2, 32
"""The wait of one call for a reply, in seconds. Above so many open requests calls wait less, as connections are
limited.
"""
_ANSWER_WITHIN_S: Final = _WAIT_S + 30.0
_MISSES: Final = 5
"""So often a gateway may not know a request before it counts as never posted."""
_MAX_POSTED: Final = 1000
"""As many as a gateway remembers of an agent."""
_TRUST_EVERY_S: Final = 60.0
_UNIX: Final = "unix:"
_LONGEST_ADDRESS: Final = 107
"""The most bytes of a unix socket's address (unix(7))."""
_JOSE: Final = {"Content-Type": "application/jose"}
_NOT_FOUND, _OK, _ACCEPTED, _TOO_MANY, _UNAVAILABLE = 404, 200, 202, 429, 503

OnReplies = Callable[[Sequence[Received]], None]


class HttpConnection(Connection):
    """See the module. Everything that it does not carry raises InvalidCallError."""

    def __init__(
        self,
        door: str,
        key: SigningKey | Path | str | None,
        settings: ClientSettings,
        clock: Clock | None = None,
        *,
        attested: EnrolledInstanceKey | None = None,
    ) -> None:
        """`door`: the value of `RINGFENCE_DOOR`; for the others, and what is raised, see `Connection`."""
        super().__init__(key, settings, clock, attested=attested)
        self._door = door.rstrip("/")
        self._socket = self._door.removeprefix(_UNIX) if self._door.startswith(_UNIX) else None
        if self._socket is not None and len(os.fsencode(self._socket)) > _LONGEST_ADDRESS:
            raise SettingsError(
                f"RINGFENCE_DOOR: the path of a socket has at most {_LONGEST_ADDRESS} bytes; write a relative one"
            )
        self._url = api_url(self._door)
        self._http: httpx.AsyncClient | None = None
        self._nonce: str | None = None
        self._trust_read_s = 0.0
        self._agent_id = ""
        self._on_replies: OnReplies = lambda records: None
        self._keys: dict[str, SigningKey] = {}
        """By the id of a request that is open: the key that signed it."""
        self._polls: dict[str, asyncio.Task[None]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._posted: BoundedDict[str, tuple[str, SigningKey]] = BoundedDict(_MAX_POSTED)
        """The last requests by id, with the key that signed each: a gateway that has forgotten one gets it again."""

    # --- life ---

    async def start(self) -> None:
        """Read the trust bundle. Raises UnavailableError if the gateway does not answer, or has none that counts."""
        try:
            await self.renew()
            self._http = self._client()
            await self._read_trust()
            self.trust.require(self.clock.now_ms() / 1000)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Stop waiting for replies, and disconnect. Idempotent."""
        for request_id in list(self._keys):
            self.forget_replies(request_id)
        await asyncio.gather(*self._ending, return_exceptions=True)
        http, self._http = self._http, None
        if http is not None:
            await http.aclose()

    def _client(self) -> httpx.AsyncClient:
        if self._socket is None:
            return service_client(self.settings, timeout_s=_ANSWER_WITHIN_S)
        transport = httpx.AsyncHTTPTransport(uds=self._socket)
        return httpx.AsyncClient(transport=transport, timeout=_ANSWER_WITHIN_S, trust_env=False)

    async def follow(self, topics: Sequence[Topic[Any]], *args: Any, **options: Any) -> None:
        """Raises InvalidCallError: no topic can be read over HTTP."""
        _needs_kafka(
            f"this call waits for answers on Kafka ({', '.join(topic.what for topic in topics)}), and so"
        )

    # --- messages out ---

    async def publish(
        self,
        topic: Topic[Any],
        key: str,
        claims: Claims,
        *,
        compact: str | None = None,
        traceparent: str | None = None,
    ) -> Coordinate:
        """Sign a message and post it. Returns once Kafka acknowledged it.

        Raises:
            RefusedError: the gateway refused it, with the reason.
            UnavailableError: the gateway, or Kafka behind it, did not take it within `GIVE_UP_S`.
            InvalidCallError: it cannot be sent over HTTP, or has an unknown field; nothing was sent.
        """
        if topic not in (CREDENTIAL_REQUEST, REVOCATION_REQUEST):
            _needs_kafka(f"a {claims.typ}")
        if not isinstance(claims, RevocationRequest):
            require_understood(claims, f"the {claims.typ}")
        request_id = message_id(claims.iss, claims.jti)
        signer = self._keys.get(request_id, self.key)
        compact = compact or sign(claims, signer)
        try:
            await self._post_or_repeat(claims, compact, signer, traceparent)
        except asyncio.CancelledError:
            # It may have been taken all the same. A credential that still comes is given back.
            self._start_to_poll(request_id, signer, claims.typ, None)
            raise
        self._start_to_poll(request_id, signer, claims.typ, compact)
        return NOWHERE

    async def renew_agent_key(self, renewal: Signed[AgentRenewKey], signer: SigningKey) -> int:
        """Post the renewal of a key. Returns the end of the new key, in seconds since 1970. Raises as `publish`."""
        answer = await self._post(AgentRenewKey.typ, renewal.compact, signer, None)
        if answer.status_code == _OK:
            try:
                return int(answer.json()["not_after"])
            except (ValueError, KeyError, TypeError):
                pass
        raise UnavailableError("the registry has not renewed the key yet")

    async def _post_or_repeat(
        self, claims: Claims, compact: str, signer: SigningKey, traceparent: str | None
    ) -> None:
        """Post a message. A request that the gateway has forgotten is posted again before it is withdrawn."""
        try:
            await self._post(claims.typ, compact, signer, traceparent)
        except RefusedError as error:
            forgotten = None
            if isinstance(claims, RequestWithdraw) and error.code == Code.SOCKET_OTHER_RUN:
                forgotten = self._posted.get(claims.request_id)
            if forgotten is None:
                raise
            await self._post(CredentialRequest.typ, forgotten[0], forgotten[1], traceparent)
            await self._post(claims.typ, compact, signer, traceparent)
        if isinstance(claims, CredentialRequest):
            self._posted[message_id(claims.iss, claims.jti)] = (compact, signer)

    def _start_to_poll(self, request_id: str, signer: SigningKey, typ: str, compact: str | None) -> None:
        if request_id in self._keys and request_id not in self._polls:
            poll = asyncio.create_task(self._poll(request_id, signer, typ, compact))
            self._polls[request_id] = poll

    async def _post(
        self, typ: str, compact: str, signer: SigningKey, traceparent: str | None
    ) -> httpx.Response:
        headers = {**_JOSE, "traceparent": traceparent} if traceparent is not None else _JOSE
        delays, loop = backoff(0.2, 3.0), asyncio.get_running_loop()
        until = loop.time() + GIVE_UP_S
        while True:
            delay_s = next(delays)
            try:
                answer = await self._call("POST", "/requests", signer, content=compact, headers=headers)
            except UnavailableError as error:
                problem = error
            else:
                if answer.status_code in (_OK, _ACCEPTED):
                    return answer
                code, detail = _problem(answer)
                if answer.status_code not in (_TOO_MANY, _UNAVAILABLE):
                    raise RefusedError(typ, (Reason(code=code, message=detail),), "gateway")
                problem = UnavailableError(
                    f"the gateway at {self._door} did not take the {typ}: {detail}", code=code
                )
                delay_s = max(delay_s, _retry_after_s(answer))
            if loop.time() + delay_s >= until:
                raise problem
            await asyncio.sleep(delay_s)

    # --- replies in ---

    async def listen_for_replies(self, agent_id: str, on_replies: OnReplies) -> None:
        self._agent_id, self._on_replies = agent_id, on_replies

    def expect_replies(self, request_id: str, key: SigningKey) -> None:
        self._keys[request_id] = key

    def forget_replies(self, request_id: str) -> None:
        self._keys.pop(request_id, None)
        poll = self._polls.pop(request_id, None)
        if poll is not None:
            poll.cancel()
            self._ending.add(poll)
            poll.add_done_callback(self._ending.discard)

    async def _poll(self, request_id: str, signer: SigningKey, typ: str, compact: str | None) -> None:
        """Fetch the replies to one request, in order, until it is forgotten.

        `compact`: the request; None if it is not known whether it was posted, and nobody waits for it.
        """
        count, misses, delays, loop = 0, 0, backoff(0.2, 5.0), asyncio.get_running_loop()
        while True:
            wait_s, begun = _WAIT_S if len(self._polls) <= _MANY else _CROWDED_WAIT_S, loop.time()
            try:
                answer = await self._call(
                    "GET",
                    f"/requests/{request_id}",
                    signer,
                    params={"wait": f"{wait_s}s", "after": str(count)},
                )
                if answer.status_code in (_OK, _ACCEPTED):
                    misses = 0
                if answer.status_code == _OK:
                    count, delays = count + 1, backoff(0.2, 5.0)
                    await self._refresh_trust()
                    self._on_replies([self._received(answer.content, count)])
                    continue
                if answer.status_code == _ACCEPTED:
                    if loop.time() - begun < 1:  # it did not wait
                        await asyncio.sleep(next(delays))
                    continue
                if answer.status_code == _NOT_FOUND:
                    misses += 1
                    if compact is None and misses == _MISSES:
                        return
                    if compact is not None:
                        # The gateway has started again without its memory. The same bytes count once.
                        if misses > 1:
                            await asyncio.sleep(next(delays))
                        await self._post(typ, compact, signer, None)
                        continue
                delay_s = max(next(delays), _retry_after_s(answer))
                log.info("no reply to request %s yet: %s", request_id, _problem(answer)[1])
            except (UnavailableError, RefusedError) as error:
                delay_s = next(delays)
                log.info("no reply to request %s yet: %s", request_id, error)
            await asyncio.sleep(delay_s)

    def _received(self, value: bytes, number: int) -> Received:
        """A reply as `read_reply` takes it: verified by the keys that count now, as it arrived just now."""
        topic = CREDENTIAL_REPLY
        name = topic.name(self.settings.topic_prefix)
        return Received(topic, name, 0, number, self.clock.now_ms(), self._agent_id, value)

    # --- tasks ---

    async def task(self, agent_id: str, task_id: str) -> TaskView:
        """See `Connection.task`: the gateway answers."""
        answer = await self._call("GET", f"/tasks/{quote(task_id, safe='')}", self.key)
        if answer.status_code == _OK:
            try:
                return TaskView.of_answer(answer.json())
            except ValueError:
                raise UnavailableError(f"the gateway at {self._door} answered no JSON") from None
        code, detail = _problem(answer)
        if answer.status_code in (_TOO_MANY, _UNAVAILABLE):
            raise UnavailableError(f"the gateway at {self._door} does not say now: {detail}", code=code)
        raise RefusedError("the look at a task", (Reason(code=code, message=detail),), "gateway")

    # --- trust ---

    async def _refresh_trust(self) -> None:
        """Read the trust bundle again now and then: a reply may be signed by a key that is newer."""
        if asyncio.get_running_loop().time() - self._trust_read_s >= _TRUST_EVERY_S:
            try:
                await self._read_trust()
            except UnavailableError as error:
                log.warning("the trust bundle was not read again: %s", error)

    async def _read_trust(self) -> None:
        answer = await self._call("GET", "/trust", None)
        if answer.status_code != _OK:
            raise UnavailableError(
                f"the gateway at {self._door} gives no trust bundle ({answer.status_code}: {_problem(answer)[1]}); is "
                "its HTTP API for agents switched on (RINGFENCE_GATEWAY_AGENT_API)?"
            )
        self._trust_read_s = asyncio.get_running_loop().time()
        try:
            self.trust.load(answer.content, self.clock.now_ms() / 1000)
        except InvalidMessageError as error:
            log.error("ignored a trust bundle of the gateway at %s: %s", self._door, error)

    # --- HTTP ---

    async def _call(
        self,
        method: str,
        path: str,
        signer: SigningKey | None,
        *,
        content: str | None = None,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """One call, with a proof by `signer`, and once more with the nonce that it lacked.

        Raises UnavailableError if the gateway does not answer.
        """
        if self._http is None:
            raise UnavailableError("not connected: use async with, or start")
        url = f"{self._url}{path}"
        try:
            for last in (False, True):
                given = dict(headers or {})
                if signer is not None and self._socket is None:
                    now_s = self.clock.now_ms() // 1000
                    given["DPoP"] = proof(
                        signer, method, url, access_token=None, now_s=now_s, nonce=self._nonce
                    )
                answer = await self._http.request(method, url, content=content, params=params, headers=given)
                self._nonce = answer.headers.get(NONCE_HEADER, self._nonce)
                if last or answer.status_code != httpx.codes.UNAUTHORIZED or not wants_nonce(answer):
                    return answer
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise UnavailableError(
                f"the gateway at {self._door} does not answer ({type(error).__name__}); is it running? Its address is "
                "RINGFENCE_DOOR"
            ) from None
        raise AssertionError("not reached")


def api_url(door: str) -> str:
    """The URL of the API behind `RINGFENCE_DOOR`, up to `/v1`.

    `http://ringfence` is the API's own host, and a socket leads there. At any other host it has a path.
    """
    if door.startswith(_UNIX):
        return f"http://{RESERVED_NAME}/v1"
    base = "" if (urlsplit(door).hostname or "").lower() == RESERVED_NAME else f"/{RESERVED_NAME}"
    return f"{door.rstrip('/')}{base}/v1"


def _needs_kafka(what: str) -> NoReturn:
    raise InvalidCallError(
        f"{what} needs Kafka: the gateway's HTTP API carries credential requests, withdrawals and releases alone. "
        "Unset RINGFENCE_DOOR, and connect to Kafka"
    )


def _problem(answer: httpx.Response) -> tuple[AnyCode, str]:
    """Code and text of the problem details (RFC 9457) in an answer."""
    try:
        body = answer.json()
        return ReceivedCode(str(body["code"])[:100]), str(body["detail"])[:1000]
    except (ValueError, KeyError, TypeError):
        return Code.HTTP_STATUS, f"it answered {answer.status_code}"


def _retry_after_s(answer: httpx.Response) -> float:
    text = answer.headers.get("Retry-After", "")
    return float(min(int(text), 10)) if text.isascii() and text.isdigit() and len(text) < 6 else 0.0
