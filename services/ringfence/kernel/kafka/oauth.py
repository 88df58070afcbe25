"""Sign-in to Kafka with OAuth bearer tokens: SASL OAUTHBEARER (RFC 7628, KIP-255).

`TokenProvider` reads tokens from a token endpoint, a file or a command. `SessionConnection` completes aiokafka, which
takes a refused token for an accepted one, and never signs in again on an open connection (KIP-368). Without that, the
broker closes each connection at its token's end, in the middle of a request.

No token and no secret is in a log line, an error or a repr.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shlex
import time
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass, field
from subprocess import DEVNULL, PIPE
from typing import Any, Final
from urllib.parse import quote_plus
from weakref import WeakKeyDictionary

from aiokafka import conn
from aiokafka.abc import AbstractTokenProvider
from aiokafka.conn import AIOKafkaConnection, CloseReason
from aiokafka.errors import KafkaError, SaslAuthenticationFailed
from aiokafka.protocol.admin import ApiVersionRequest, SaslAuthenticateRequest, SaslHandShakeRequest

from ringfence.kernel.base.clock import Clock, SystemClock
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.http_client import tls_by, web_client
from ringfence.kernel.base.programs import find_program
from ringfence.kernel.base.retry import backoff
from ringfence.kernel.base.secret_refs import read_secret
from ringfence.kernel.base.settings import BusSettings
from ringfence.kernel.base.strict_json import json_object
from ringfence.kernel.crypto.keys import b64decode

log = logging.getLogger(__name__)

WITHIN_S: Final = 10.0
"""For a token endpoint or a command to give a token in."""
_MAX_TOKEN: Final = 64 * 1024
_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/-]+=*")
"""RFC 6750, 2.1. Other characters would end the token, and begin another field of the message to the broker."""
_OAUTH_ERROR: Final = re.compile(r"[a-z_]{1,40}")
_RENEWED_AT: Final = 0.7
"""The part of its life after which a token is replaced. Sessions end later: their tokens are there in time."""
_SIGNED_IN_AGAIN_AT: Final = 0.85
_SESSION_AT_LEAST_S: Final = 1.1
"""Brokers reject a client that signs in twice within a second (KIP-368)."""


class TokenError(KafkaError):  # type: ignore[misc]
    """Raised when there is no token. aiokafka tries again, as it does for a broker that does not answer."""

    retriable = True


@dataclass(frozen=True, slots=True)
class _Token:
    value: str = field(repr=False)
    renew_s: float
    """The times of its renewal and of its end, in seconds since the epoch."""
    ends_s: float


class TokenProvider(AbstractTokenProvider):  # type: ignore[misc]
    """The tokens of one source. All clients of a process with the same settings share one provider."""

    def __init__(self, settings: BusSettings, clock: Clock | None = None) -> None:
        self._settings = settings
        self._clock = clock or SystemClock()
        self._kind, _, self._place = settings.kafka_sasl_token_source.partition(":")
        self._token = _Token("", 0, 0)
        self._error: TokenError | None = None
        self._delays = _delays()
        self._again_s = 0.0
        # A lock belongs to one event loop, and a program may have several.
        self._locks = WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock]()

    async def token(self) -> str:
        """Return a token, which is renewed in time. Raises TokenError, which says what to do.

        While a renewal fails, the former token is returned until its end. The source is asked again with backoff.
        """
        async with self._locks.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
            if self._now_s() >= max(self._token.renew_s, self._again_s):
                try:
                    self._token = await self._renewed()
                    self._error, self._delays = None, _delays()
                except TokenError as error:
                    self._error, self._again_s = error, self._now_s() + next(self._delays)
                    if self._now_s() < self._token.ends_s:
                        log.warning("the token for Kafka is not renewed yet, trying again: %s", error)
            if self._error is not None and self._now_s() >= self._token.ends_s:
                raise TokenError(*self._error.args)
            return self._token.value

    def _now_s(self) -> float:
        return self._clock.now_ms() / 1000

    async def _renewed(self) -> _Token:
        now_s, life_s = self._now_s(), None
        try:
            async with asyncio.timeout(WITHIN_S):
                if self._kind == "https":
                    value, life_s = await self._from_endpoint()
                elif self._kind == "file":
                    value = read_secret(self._settings.kafka_sasl_token_source, "the token for Kafka")
                else:
                    value = await self._from_command()
        except TimeoutError:
            raise self._failed(f"gave no token within {WITHIN_S:g} s") from None
        except RingfenceError as error:
            raise TokenError(error.message) from None
        if len(value) > _MAX_TOKEN or not _TOKEN.fullmatch(value):
            raise self._failed("gave something that is no bearer token (RFC 6750, 2.1)")
        ends_s = now_s + life_s if life_s is not None else _unverified_end(value)
        if ends_s is None:
            return _Token(value, now_s, now_s)  # its end is not known: another one for each sign-in
        if ends_s <= now_s:
            raise self._failed("gave a token that has expired; see what renews it, and this machine's clock")
        # A file is cheap to read, and the program that writes it decides when to renew the token.
        part = 0 if self._kind == "file" else _RENEWED_AT
        return _Token(value, now_s + (ends_s - now_s) * part, ends_s)

    def _failed(self, what: str) -> TokenError:
        match self._kind:
            case "https":
                named = f"the token endpoint https:{self._place}"
            case "file":
                named = f"the file {self._place}"
            case _:
                named = f"the command {shlex.split(self._place)[0]}"  # its arguments may be private
        return TokenError(f"{named} {what} (RINGFENCE_KAFKA_SASL_TOKEN_SOURCE)")

    async def _from_endpoint(self) -> tuple[str, float | None]:
        """Client credentials (RFC 6749, 4.4), by HTTP Basic (2.3.1). Returns the token and its life in seconds."""
        import httpx

        settings = self._settings
        assert settings.kafka_sasl_password is not None  # the settings see to it
        secret = read_secret(settings.kafka_sasl_password, "the client secret for Kafka's tokens")
        form = {"grant_type": "client_credentials"} | (
            {"scope": settings.kafka_sasl_scope} if settings.kafka_sasl_scope else {}
        )
        auth = quote_plus(settings.kafka_sasl_username), quote_plus(secret)
        try:
            verify = tls_by(settings.kafka_sasl_ca_file) if settings.kafka_sasl_ca_file else None
            async with web_client(timeout_s=WITHIN_S, verify=verify) as http:
                answer = await http.post(settings.kafka_sasl_token_source, data=form, auth=auth)
        except httpx.HTTPError as error:
            raise self._failed(f"does not answer ({type(error).__name__}: {error})") from None
        try:
            members = json_object(answer.content)
        except ValueError:
            members = {}
        if answer.status_code != 200:
            code = members.get("error")
            code = f" ({code})" if isinstance(code, str) and _OAUTH_ERROR.fullmatch(code) else ""
            remedy = (
                "; see RINGFENCE_KAFKA_SASL_USERNAME, _SASL_PASSWORD and _SASL_SCOPE"
                if answer.status_code < 500
                else "; see its own log"
            )
            raise self._failed(f"answered {answer.status_code}{code}{remedy}")
        value, life_s = members.get("access_token"), members.get("expires_in")
        if not isinstance(value, str):
            raise self._failed("answered 200 without an access_token")
        return value, life_s if isinstance(life_s, int | float) and not isinstance(life_s, bool) else None

    async def _from_command(self) -> str:
        """Return the output of the command. Its errors are not read: they could quote the token."""
        name, *arguments = shlex.split(self._place)
        program = find_program(name)
        if program is None:
            raise self._failed("is not there; give its absolute path")
        try:
            process = await asyncio.create_subprocess_exec(
                program, *arguments, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL
            )
        except OSError as error:
            raise self._failed(f"does not start ({error.strerror})") from None
        try:
            assert process.stdout is not None
            printed = await process.stdout.read(_MAX_TOKEN + 1)
            while len(printed) <= _MAX_TOKEN and (part := await process.stdout.read(_MAX_TOKEN)):
                printed += part
            status = await process.wait() if len(printed) <= _MAX_TOKEN else 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if status != 0:
            raise self._failed(f"ended with status {status}; run it by hand as this user")
        if not printed.strip():
            raise self._failed("printed nothing; run it by hand as this user")
        return printed.decode("ascii", "replace").strip()


def _delays() -> Iterator[float]:
    return backoff(0.5, 10)


def _unverified_end(token: str) -> float | None:
    """The `exp` of a JWT in seconds, None for another token. Only the broker verifies it: here it sets a timer."""
    try:
        end = json.loads(b64decode(token.split(".")[1]))["exp"]
        return float(end)
    except (ValueError, LookupError, TypeError):
        return None


class SessionConnection(AIOKafkaConnection):  # type: ignore[misc]
    """A connection that reports a refused token, and signs in again before the broker ends its session (KIP-368).

    A renewal begins with a request after most of the session. Requests go on while a token is awaited, and wait during
    the two messages of the sign-in, between which a broker accepts nothing else.
    """

    _renew_at_s = _ends_at_s = float("inf")  # of the monotonic clock
    _signing_in = False
    _renewal: asyncio.Task[None] | None = None

    def send(self, request: Any, expect_response: bool = True) -> Awaitable[Any]:
        if not isinstance(self._sasl_oauth_token_provider, TokenProvider):
            return super().send(request, expect_response)  # type: ignore[no-any-return]
        if isinstance(request, SaslAuthenticateRequest):
            return self._authenticated(super().send(request))
        if not isinstance(request, SaslHandShakeRequest | ApiVersionRequest):
            now_s = time.monotonic()
            if self._renewal is None and now_s >= self._renew_at_s:
                self._renewal = asyncio.create_task(self._sign_in_again(), name="renewal of a Kafka session")
            if self._renewal is not None and (self._signing_in or now_s >= self._ends_at_s):
                return self._send_after(self._renewal, request, expect_response)
        return super().send(request, expect_response)  # type: ignore[no-any-return]

    def close(self, reason: Any = None, exc: Any = None) -> Any:
        if self._renewal is not None and self._renewal is not asyncio.current_task():
            self._renewal.cancel()
        return super().close(reason, exc)

    async def _send_after(self, renewal: asyncio.Task[None], request: Any, expect_response: bool) -> Any:
        await asyncio.wait([renewal])
        return await super().send(request, expect_response)

    async def _authenticated(self, answer: Awaitable[Any]) -> Any:
        """The answer to a token. Raises SaslAuthenticationFailed if it is a refusal, which is a JSON object in an
        answer that is no error (RFC 7628, 3.2.2)."""
        sent_s = time.monotonic()  # the broker counts from its answer, which takes a while to arrive
        response = await answer
        if response.error_code == 0 and response.sasl_auth_bytes:
            raise SaslAuthenticationFailed(
                f"the broker refused the token ({_status(response.sasl_auth_bytes)})"
            )
        if life_s := getattr(response, "session_lifetime_ms", 0) / 1000:
            self._ends_at_s = sent_s + life_s
            self._renew_at_s = sent_s + max(life_s * _SIGNED_IN_AGAIN_AT, _SESSION_AT_LEAST_S)
        return response

    async def _sign_in_again(self) -> None:
        try:
            await self._sasl_oauth_token_provider.token()
            self._signing_in = True
            await self._do_sasl_handshake()
        except TokenError:  # the provider has logged it; the session may last a while
            self._renew_at_s = time.monotonic() + _SESSION_AT_LEAST_S
        except (KafkaError, OSError, TimeoutError) as error:
            log.error("Kafka at %s:%s ended the session, signing in again: %s", self.host, self.port, error)
            self.close(CloseReason.AUTH_FAILURE, error)
        finally:
            self._signing_in, self._renewal = False, None


def _status(refusal: bytes) -> str:
    try:
        status = json_object(refusal).get("status")
    except ValueError:
        status = None
    return status if isinstance(status, str) and _OAUTH_ERROR.fullmatch(status) else "it does not say why"


class _NoTokens(logging.Filter):
    """Drops aiokafka's debug lines with whole requests and answers of a sign-in."""

    def filter(self, record: logging.LogRecord) -> bool:
        args = record.args if isinstance(record.args, tuple) else ()
        return not any(type(arg).__name__.startswith("SaslAuthenticate") for arg in args)


_PROVIDERS: Final[dict[tuple[object, ...], TokenProvider]] = {}


def provider_of(settings: BusSettings) -> TokenProvider:
    """The provider that all clients of this process with these settings share."""
    conn.AIOKafkaConnection = (
        SessionConnection  # aiokafka's `create_conn` makes it; without our provider nothing differs
    )
    if not any(isinstance(one, _NoTokens) for one in conn.log.filters):
        conn.log.addFilter(_NoTokens())
    names = ("token_source", "username", "password", "scope", "ca_file")
    key = tuple(getattr(settings, f"kafka_sasl_{name}") for name in names)
    return _PROVIDERS.setdefault(key, TokenProvider(settings))


async def sign_in(host: str, port: int, options: dict[str, Any]) -> None:
    """Connect to one broker and sign in. Raises KafkaError, OSError or TimeoutError.

    `options` are those of an aiokafka client, without its addresses.
    """
    opened = await conn.create_conn(host, port, **options)
    opened.close()
