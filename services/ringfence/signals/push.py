"""Delivers events to receivers: by push with retries (RFC 8935), and by poll from a bounded window (RFC 8936).

Push retries each event until its receiver takes it, or refuses it repeatedly. Poll keeps the events of one stream
that wait for their receiver; further events wait on Kafka.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Awaitable, Callable, Iterable

import httpx

from ringfence.kernel.base import metrics
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.base.retry import backoff
from ringfence.kernel.base.secret_refs import PlaceError, read_secret
from ringfence.kernel.base.strict_json import json_object
from ringfence.kernel.base.text import visible
from ringfence.messages.codes import Code
from ringfence.signals.events import UnsignedSet
from ringfence.signals.requests import Receiver
from ringfence.signals.settings import SignalsSettings

WINDOW_SIZE = 500
"""Records taken from Kafka at a time, and the number of waiting events at which no more are taken."""
MAX_SETS_PER_POLL = WINDOW_SIZE // 2
"""The most SETs in one answer. Less than a full window, so that `moreAvailable` is true when it is full."""


class Window:
    """The events that a poll can return now. Bounded, which puts backpressure on Kafka."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiting: dict[str, UnsignedSet] = {}
        self._changed = asyncio.Event()
        self.waiting_since_ms: int | None = None
        """Since when nothing was taken, though something is there."""

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, jti: str) -> bool:
        return jti in self._waiting

    @property
    def full(self) -> bool:
        """Whether so many events wait that no more may be added."""
        return len(self._waiting) >= WINDOW_SIZE

    def add(self, events: Iterable[UnsignedSet]) -> None:
        self._waiting |= {event.jti: event for event in events}
        if self._waiting and self.waiting_since_ms is None:
            self.waiting_since_ms = self._clock.now_ms()
        self._notify()

    def discard(self, jtis: Iterable[str]) -> None:
        """Remove events without settling them: another replica delivers them."""
        for jti in jtis:
            self._waiting.pop(jti, None)
        if not self._waiting:
            self.waiting_since_ms = None
        self._notify()

    @property
    def changed(self) -> asyncio.Event:
        """Set when the next event is added or settled."""
        return self._changed

    def settle(self, jti: str) -> UnsignedSet | None:
        """Remove an event that the receiver acknowledged or refused. None if it did not wait."""
        event = self._waiting.pop(jti, None)
        if event is not None:
            self.waiting_since_ms = self._clock.now_ms() if self._waiting else None
            self._notify()
        return event

    async def next_batch(self, limit: int, wait_s: float) -> tuple[list[UnsignedSet], bool]:
        """The oldest waiting events, and whether there are more. Waits up to `wait_s` seconds for the first one.

        `limit` is the receiver's own; no answer has more than `MAX_SETS_PER_POLL`.
        """
        limit = min(limit, MAX_SETS_PER_POLL)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while not self._waiting and limit:
                    await self._changed.wait()
        events = list(self._waiting.values())
        return events[:limit], len(events) > limit

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


log = logging.getLogger(__name__)
logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of every request

_MAX_CONCURRENT_PUSHES = 8
_TIMEOUT_S = 10.0
_MAX_ANSWER_BYTES = 4096
MAX_REFUSALS = 5
"""So many refusals of an event are retried, e.g. until the receiver has fetched new keys. Then it counts as refused."""
_TRANSMITTER_ERRORS = (Code.AUTHENTICATION_FAILED, Code.ACCESS_DENIED)
"""Errors of RFC 8935, 2.4, about the transmitter: a retry with the right token may succeed."""

OnRefused = Callable[[UnsignedSet, str], Awaitable[None]]
"""Called with an event that its receiver refused, and the error code."""


class Pusher:
    """Pushes events to one receiver. A slow receiver delays no other."""

    def __init__(
        self, receiver: Receiver, settings: SignalsSettings, clock: Clock, on_refused: OnRefused
    ) -> None:
        """Raises UnavailableError if the receiver's CA file cannot be read."""
        assert receiver.push is not None
        self._url = receiver.push
        self._receiver = receiver
        self._settings = settings
        self._clock = clock
        self._on_refused = on_refused
        self._limit = asyncio.Semaphore(_MAX_CONCURRENT_PUSHES)
        self._http = httpx.AsyncClient(
            verify=_tls_context(receiver),
            timeout=_TIMEOUT_S,
            follow_redirects=False,
            trust_env=False,
        )
        self.failing_since_ms: int | None = None
        """Since when nothing was taken, though something is there."""
        self.problem = ""

    async def close(self) -> None:
        await self._http.aclose()

    async def deliver(self, event: UnsignedSet, signed: Callable[[], str]) -> None:
        """Return once the receiver has taken the event, or refused it `MAX_REFUSALS` times.

        `sign` is called for each try, since the signing key may have been rotated.
        """
        async with self._limit:  # with the waiting between: whoever is down is asked by few
            await self._deliver(event, signed)

    async def _deliver(self, event: UnsignedSet, signed: Callable[[], str]) -> None:
        refusals, delays_s = 0, backoff(self._settings.first_delay_s, self._settings.longest_delay_s)
        while True:
            problem, refusal = await self._post(signed())
            if problem is None:
                self.failing_since_ms, self.problem = None, ""
                metrics.SIGNALS.labels("delivered").inc()
                return
            refusals = refusals + 1 if refusal is not None else 0
            if refusal is not None and refusals >= MAX_REFUSALS:
                await self._on_refused(event, refusal)
                return
            self._failed(problem)
            await asyncio.sleep(next(delays_s))

    def _failed(self, problem: str) -> None:
        metrics.SIGNALS.labels("failed").inc()
        if problem != self.problem:
            log.warning("receiver %s is told later: %s", self._receiver.name, problem)
        self.problem = problem
        if self.failing_since_ms is None:
            self.failing_since_ms = self._clock.now_ms()

    async def _post(self, compact: str) -> tuple[str | None, str | None]:
        """Try once.

        Returns the problem, or None; and the error code where the receiver finds the event itself wrong.
        """
        try:
            headers = self._headers()
            async with (
                asyncio.timeout(_TIMEOUT_S),
                self._http.stream("POST", self._url, content=compact.encode(), headers=headers) as response,
            ):
                if response.status_code == httpx.codes.ACCEPTED:
                    return None, None
                if response.status_code == httpx.codes.BAD_REQUEST:
                    return _parse_refusal(await _read_limited(response))
                return f"it answered {response.status_code}, where 202 was expected", None
        except PlaceError as error:
            return str(error), None
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, OSError) as error:
            return type(error).__name__, None

    def _headers(self) -> dict[str, str]:
        headers = {
            "Content-Type": "application/secevent+jwt",
            "Accept": "application/json",
            "User-Agent": "Ringfence",
        }
        if self._receiver.authorization is not None:
            what = f"the Authorization header of receiver {self._receiver.name}"
            headers["Authorization"] = read_secret(self._receiver.authorization, what)
        return headers


def _tls_context(receiver: Receiver) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=receiver.ca_file)
    except (OSError, ssl.SSLError):
        raise UnavailableError(
            f"cannot read {receiver.ca_file}, the ca_file of receiver {receiver.name}"
        ) from None


async def _read_limited(response: httpx.Response) -> bytes:
    body = b""
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > _MAX_ANSWER_BYTES:
            break
    return body


def _parse_refusal(body: bytes) -> tuple[str, str | None]:
    """The problem in a 400 answer (RFC 8935, 2.3), and its code where it is about the event itself."""
    try:
        code = json_object(body).get("err")
    except ValueError:
        code = None
    if not isinstance(code, str):
        return "it answered 400 without a reason", None
    code = visible(code)[:64]
    return f"it answered 400: {code}", None if code in _TRANSMITTER_ERRORS else code
