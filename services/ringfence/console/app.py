"""`ringfence serve console`: the process, which has a key, and neither Redis nor a right to read Kafka."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

from ringfence.client.errors import ApiError
from ringfence.client.settings import ClientSettings
from ringfence.console.commands import Commands
from ringfence.console.http import Console, Site
from ringfence.console.offers import Offers
from ringfence.console.page_templates import PageDigests
from ringfence.console.questions import Questions
from ringfence.console.reads import SessionReads
from ringfence.console.security import Guard, SealedValues, Sessions
from ringfence.console.settings import ConsoleSettings
from ringfence.kernel.base.clock import Clock, SystemClock
from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError, SettingsError
from ringfence.kernel.base.http_client import service_client
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.base.settings import ServiceSettings, load
from ringfence.kernel.crypto.keys import KeyFileError, SigningKey
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.producer import Publisher
from ringfence.kernel.kafka.record import Outbound
from ringfence.kernel.service.http import HttpServer
from ringfence.kernel.service.server_tls import http_tls
from ringfence.messages.api import CONSOLE_PORT
from ringfence.messages.base import Claims, Topic

log = logging.getLogger(__name__)
# It logs every read of every open page.
logging.getLogger("httpx").setLevel(logging.WARNING)

_READ_TIMEOUT_S = 10.0
_TRUST_EVERY_S = 15.0
_TRUST_AGAIN_S = 1.0


class ConsoleServer:
    """The console as a process of its own or beside services."""

    role = "console"

    def __init__(
        self, settings: ServiceSettings, own: ConsoleSettings, clients: ClientSettings, clock: Clock
    ) -> None:
        """Raises KeyFileError, SettingsError."""
        if own.origin is None:
            raise SettingsError(
                "RINGFENCE_CONSOLE_ORIGIN is not set: it is where people open the console, and the trust bundle names "
                "it (ringfence init --session-origin)"
            )
        self._key_file = settings.key_file or settings.key_dir / "console.json"
        self._key = SigningKey.load(self._key_file)
        self._origin = own.origin
        self._settings = settings
        self._clients = clients
        self._clock = clock
        self._trust = TrustStore(settings.trust_domain, settings.trust_root)
        self._publisher = Publisher(settings, self._key.id, clock)
        self._http = service_client(settings, timeout_s=_READ_TIMEOUT_S)
        self._connected = False
        sealed = SealedValues(lambda: self._key)
        sessions = Sessions(lambda: self._key, clock, settings.trust_domain, own.session_s)
        offers = Offers(sealed, sessions, self._reads)
        questions = Questions(sealed, self._trust, clock, settings.trust_domain, self._publish)
        site = Site(
            Console(
                sessions=sessions,
                questions=questions,
                commands=Commands(questions, self._trust, offers),
                sealed=sealed,
                offers=offers,
                trust=self._trust,
                clock=clock,
                origin=own.origin,
                trust_domain=settings.trust_domain,
                digests=PageDigests(own.refresh_ms),
                reads=self._reads,
                unready=self.unready,
            )
        )
        host, _, port = settings.http.partition(":")
        self._server = HttpServer(
            Guard(site.application(), own.origin, own.hosts, self._sign_origin),
            host,
            int(port or CONSOLE_PORT),
            connections=settings.http_connections,
            tls=http_tls(settings),
        )

    def unready(self) -> list[str]:
        """Why it cannot work now; empty if it can."""
        now_s = self._clock.now_ms() / 1000
        reason = self._trust.unready() or self._trust.expired(now_s)
        reasons = [reason] if reason else []
        if not reasons and not any(
            one.use == "session" and one.origin == self._origin for one in self._trust.origins(now_s)
        ):
            reasons.append(
                f"the trust bundle has no session origin {self._origin}: ringfence init --session-origin"
            )
        if not self._connected:
            reasons.append("Kafka was not reached yet")
        return reasons

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set. Raises HttpListenError if the address is not available."""
        serving = asyncio.create_task(self._server.run_until_stopped())
        jobs = [asyncio.create_task(self._follow_trust()), asyncio.create_task(self._connect())]
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((serving, stopping, *jobs), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._server.should_exit = True
            for task in (*jobs, stopping):
                task.cancel()
            await asyncio.gather(*jobs, stopping, return_exceptions=True)
            await serving
            await self._http.aclose()
            with contextlib.suppress(TimeoutError, RingfenceError):
                async with asyncio.timeout(5):
                    await self._publisher.stop()

    def reload_keys(self) -> None:
        """Read the key file again. With another key, people sign in again."""
        try:
            self._key = SigningKey.load(self._key_file)
        except KeyFileError as error:
            log.error("going on with the key of before: %s", error)

    def _reads(self, statement: str | None) -> SessionReads:
        return SessionReads(self._key, self._clients, self._clock, self._http, statement)

    def _sign_origin(self) -> str | None:
        found = self._trust.origins(self._clock.now_ms() / 1000)
        return next((one.origin for one in found if one.use == "sign"), None)

    async def _publish(self, topic: Topic[Any], key: str, compact: str, claims: Claims) -> None:
        acknowledged = await self._publisher.send(topic, claims.typ, Outbound(key, compact, id=claims.jti))
        await acknowledged

    async def _connect(self) -> None:
        """Connect to Kafka, and try again until it answers. Ends never."""
        while True:
            try:
                await self._publisher.start()
                self._connected = True
                await asyncio.Event().wait()
            except RingfenceError as error:
                log.warning("nothing can be sent yet: %s", error, extra=rate_limited("kafka"))
                await asyncio.sleep(_TRUST_AGAIN_S)

    async def _follow_trust(self) -> None:
        """Keep the trust bundle up to date. Whoever answers: only what the pinned root signed counts."""
        while True:
            try:
                self._trust.load(await self._reads(None).trust(), self._clock.now_ms() / 1000)
                await asyncio.sleep(_TRUST_EVERY_S)
            except (ApiError, InvalidMessageError) as error:
                log.warning("the trust bundle could not be read: %s", error, extra=rate_limited("trust"))
                await asyncio.sleep(_TRUST_AGAIN_S)


def build(
    settings: ServiceSettings, own: ConsoleSettings | None = None, clock: Clock | None = None
) -> ConsoleServer:
    """Build the console from the settings. Raises KeyFileError, SettingsError."""
    return ConsoleServer(settings, own or load(ConsoleSettings), load(ClientSettings), clock or SystemClock())
