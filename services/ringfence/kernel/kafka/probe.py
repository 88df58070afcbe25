"""A probe of the address where Kafka should be: it finds the reason of a failure that a Kafka client cannot explain.

It only asks what anybody may ask. It sends no password, and shows its certificate to no untrusted server.

One log line instead of hundreds while Kafka is unreachable.

Clients of Kafka log every failed attempt. This filter logs the first, then one line every `REPORT_EVERY_S` seconds, and
one when Kafka is back.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from aiokafka.conn import collect_hosts
from aiokafka.errors import KafkaConnectionError, NodeNotReadyError, RequestTimedOutError

from ringfence.kernel.base.log_limiter import RepeatCounter
from ringfence.kernel.base.retry import run_periodically
from ringfence.kernel.base.settings import BusSettings

log = logging.getLogger(__name__)

REPORT_EVERY_S = 30.0
_QUIET_S = 2.0
"""Kafka counts as back after so many seconds without a complaint: clients retry several times a second."""
_CHECK_EVERY_S = 0.5
_CLIENTS = (
    "aiokafka",
    *(f"ringfence.kernel.kafka.{name}" for name in ("consumer", "fetch_control", "producer", "table_reader")),
)
_NO_CONNECTION = (KafkaConnectionError, NodeNotReadyError, RequestTimedOutError, OSError)
_WHATEVER_WHY = ("Unable connect to ", "Unable to update metadata ", "Unable to request metadata ")
"""Beginnings of aiokafka's messages about connections, which may come without such an error."""
_COMES_OF_IT = ("Marking the coordinator dead ", "not known to be caught up with ", "not known where ")
"""Beginnings of messages that are only to be expected during an outage."""
_FIRST_TIME = 'Unable connect to "'
"""A client that is being created: its creator gets an error, and reports it."""


class OutageLog(logging.Filter):
    """A logging filter that drops messages about connections that fail. `watch` reports the outage instead."""

    def __init__(self, settings: BusSettings, now_s: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._settings = settings
        self._now_s = now_s
        self._lock = threading.Lock()
        self._since_s: float | None = None
        self._counter = self._new_counter(0.0)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log a record. The first one of an outage is logged, reworded to name Kafka."""
        if not _is_of_a_client(record.name) or record.levelno < logging.WARNING:
            return True
        trouble, message = _is_outage(record), record.getMessage()
        with self._lock:
            if not trouble:
                expected = self._since_s is not None and str(record.msg).startswith(_COMES_OF_IT)
                self._counter.left_out += expected
                return not expected
            now_s = self._now_s()
            if self._since_s is None:
                self._since_s, self._counter = now_s, self._new_counter(now_s)
            if str(record.msg).startswith(_FIRST_TIME):
                self._counter.suppress(message, now_s)
                return False
            if should_log := self._counter.should_log(message, now_s):
                record.msg = "Kafka at %s does not answer as it should, trying again until it does: %s"
                record.args = (self._settings.kafka, message)
            return should_log

    async def watch(self) -> None:
        """Report the state of an outage, for ever."""
        # If it ended, everything would be suppressed from then on, silently.
        await run_periodically(_CHECK_EVERY_S, self.report_state, "not known whether Kafka is back", log)

    async def report_state(self) -> None:
        """Log that Kafka is back, or still unreachable, if it is time to."""
        since_s = self._since_s
        if since_s is None:
            return
        if self._now_s() - self._counter.latest_s >= _QUIET_S and await answers(self._settings):
            self._report_recovery(since_s)
        elif self._counter.due(self._now_s()):
            with self._lock:
                left_out = self._counter.take_suppressed(self._now_s())
            log.warning(
                "Kafka at %s has not answered as it should for %.0f s; left out %d messages about it, the last: %s",
                self._settings.kafka,
                self._now_s() - since_s,
                left_out,
                self._counter.last,
            )

    def _report_recovery(self, since_s: float) -> None:
        with self._lock:
            if self._now_s() - self._counter.latest_s < _QUIET_S:  # it went on while we asked
                return
            lasted_s, left_out = self._counter.latest_s - since_s, self._counter.left_out
            self._since_s = None
        log.warning(
            "Kafka at %s is back after %.1f s; left out %d messages about it",
            self._settings.kafka,
            lasted_s,
            left_out,
        )

    def _new_counter(self, now_s: float) -> RepeatCounter:
        return RepeatCounter(now_s, first=1, every_s=REPORT_EVERY_S)


def _is_outage(record: logging.LogRecord) -> bool:
    args = record.args if isinstance(record.args, tuple) else ()
    return any(isinstance(arg, _NO_CONNECTION) for arg in args) or str(record.msg).startswith(_WHATEVER_WHY)


def _is_of_a_client(name: str) -> bool:
    return name in _CLIENTS or name.startswith("aiokafka.")


WITHIN_S = 3.0
"""For one listener to answer in."""
_MAX_ASKED = 5
_MAX_ANSWER = 1024 * 1024
_API_VERSIONS, _SASL_HANDSHAKE = (18, 0), (17, 1)
"""Key and version of requests (https://kafka.apache.org/protocol): what any client may ask before anything else."""
_UNSUPPORTED_MECHANISM, _NO_SASL_HERE = 33, 34
_CORRELATION = 0x52464E43
"""By which an answer is known as one to us."""


@dataclass(frozen=True, slots=True)
class Listener:
    """A Kafka listener, as probed."""

    tls: bool
    sasl: bool | None
    """None if it does not say, for example because it wants to see a certificate first."""
    mechanisms: tuple[str, ...] = ()
    disbelieved: str = ""
    """Why its certificate is not trusted by the settings, if it was checked."""

    @property
    def protocol(self) -> str:
        """As `RINGFENCE_KAFKA_SECURITY_PROTOCOL` names it."""
        wire = "SSL" if self.tls else "PLAINTEXT"
        return f"SASL_{wire}" if self.sasl else wire


@dataclass(frozen=True, slots=True)
class Silence:
    """No Kafka was found there, and why."""

    why: str


Found = Listener | Silence


def addresses(settings: BusSettings) -> list[tuple[str, int]]:
    """The brokers' addresses by the settings, as the client itself reads them."""
    return [(host, port) for host, port, _ in collect_hosts(settings.kafka, randomize=False)]


async def look(settings: BusSettings, context: ssl.SSLContext | None) -> dict[str, Found]:
    """Probe the first few addresses of the settings. `context`: how certificates are verified, with TLS."""
    probed = addresses(settings)[:_MAX_ASKED]
    found = await asyncio.gather(*(_probe_listener(host, port, context) for host, port in probed))
    return {f"{host}:{port}": one for (host, port), one in zip(probed, found, strict=True)}


async def answers(settings: BusSettings) -> bool:
    """Whether anything takes connections at any of the addresses."""
    found = await asyncio.gather(*(_connects(host, port) for host, port in addresses(settings)[:_MAX_ASKED]))
    return None in found


async def _probe_listener(host: str, port: int, context: ssl.SSLContext | None) -> Found:
    if silence := await _connects(host, port):
        return Silence(silence)
    if (sasl := await _sasl_of(host, port, None)) is not None:
        return Listener(False, *sasl)
    if (sasl := await _sasl_of(host, port, _trust_all_context())) is None:
        return Silence("something listens there that is no Kafka, or does not answer")
    return Listener(
        True, *sasl, disbelieved=await _certificate_problem(host, port, context) if context else ""
    )


async def _connects(host: str, port: int) -> str | None:
    """Why there is no connection, or None if there is one."""
    try:
        async with asyncio.timeout(WITHIN_S):
            _, writer = await asyncio.open_connection(host, port)
    except TimeoutError:
        return f"nothing answered within {WITHIN_S:g} s"
    except socket.gaierror:
        return f"there is no host {host}"
    except OSError as error:
        refused = isinstance(error, ConnectionRefusedError)
        return "nothing listens there" if refused else f"no way there ({error.strerror or error})"
    writer.close()
    return None


async def _sasl_of(
    host: str, port: int, context: ssl.SSLContext | None
) -> tuple[bool | None, tuple[str, ...]] | None:
    """Whether SASL is spoken there, and by which mechanisms; None if this is no way to speak to it at all."""
    writer, spoken = None, False
    try:
        async with asyncio.timeout(WITHIN_S):
            reader, writer = await asyncio.open_connection(host, port, ssl=context)
            spoken = context is not None
            await _exchange(reader, writer, _API_VERSIONS, b"")
            spoken = True
            answer = await _exchange(reader, writer, _SASL_HANDSHAKE, struct.pack(">h", 1) + b"?")
            return _mechanisms(answer)
    except (OSError, EOFError, ValueError, struct.error):
        # With TLS 1.3 who wants to see a certificate says so only after the handshake.
        return (None, ()) if spoken else None
    finally:
        if writer is not None:
            writer.close()


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, api: tuple[int, int], body: bytes
) -> bytes:
    """One question and its answer, without its header. Raises ValueError if it is not Kafka's."""
    request = struct.pack(">hhi", *api, _CORRELATION) + struct.pack(">h", -1) + body
    writer.write(struct.pack(">i", len(request)) + request)
    await writer.drain()
    size, correlation = struct.unpack(">ii", await reader.readexactly(8))
    if correlation != _CORRELATION or not 4 <= size <= _MAX_ANSWER:
        raise ValueError("no answer of Kafka")
    return await reader.readexactly(size - 4)


def _mechanisms(answer: bytes) -> tuple[bool | None, tuple[str, ...]]:
    code, count = struct.unpack_from(">hi", answer)
    if code == _NO_SASL_HERE:
        return False, ()
    if code != _UNSUPPORTED_MECHANISM:
        return None, ()
    found, at = [], 6
    for _ in range(min(count, 100)):
        (length,) = struct.unpack_from(">h", answer, at)
        found.append(answer[at + 2 : at + 2 + length].decode("ascii", "replace"))
        at += 2 + length
    return True, tuple(found)


def _trust_all_context() -> ssl.SSLContext:
    """Accepts every certificate: it only asks for the protocol, and sends nothing else."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def _certificate_problem(host: str, port: int, context: ssl.SSLContext) -> str:
    try:
        async with asyncio.timeout(WITHIN_S):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
    except ssl.SSLCertVerificationError as error:
        return str(error.verify_message)
    except OSError:
        return ""
    writer.close()
    return ""
