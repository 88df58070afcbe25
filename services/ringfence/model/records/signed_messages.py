"""Verifies messages that agents and people signed, and publishes an event for each sign-in at a console.

Policy verifies messages as they arrive, gateways before they publish them.

A console has no right to publish anything itself. So each service that takes session statements records them, once
each: an attacker who took over a console reads nowhere unnoticed. Only the browser knows of a sign-out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError, SignatureError
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.base.replay_memory import BoundedDict
from ringfence.kernel.base.text import with_article
from ringfence.kernel.crypto.claims import ExpiredError
from ringfence.kernel.crypto.jws import KeyFinder, Signed, parse, verify
from ringfence.kernel.crypto.webauthn import VerificationKey
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.base import Claims
from ringfence.messages.codes import Code
from ringfence.messages.registry import SessionStatement
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.records.instances import keys_of_agents
from ringfence.model.records.key_reuse import ReuseReporter, ended_by_renewal, renewed_key

log = logging.getLogger(__name__)

_MOST: Final = 20_000
"""Sessions that a process remembers to have reported. A repeated report is the same event."""


class SessionEvents:
    """Publishes a `service.event` for each session statement that this process sees for the first time."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._told: BoundedDict[str, None] = BoundedDict(_MOST)
        self._tasks: set[asyncio.Task[None]] = set()

    def __call__(self, statement: Signed[SessionStatement]) -> None:
        """Note a verified statement, by which somebody reads here now."""
        if statement.digest in self._told:
            return
        self._told[statement.digest] = None
        task = asyncio.get_running_loop().create_task(self._tell(statement))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(self, statement: Signed[SessionStatement]) -> None:
        said = statement.claims
        try:
            await self._runtime.event(
                "accepted",
                SessionStatement.typ,
                about=(statement.digest,),
                actor=said.iss,
                ref=said.jti,
                at_ms=said.iat * 1000,  # of the sign-in: then a repeat says the same
            )
        except RingfenceError as error:
            self._told.pop(statement.digest, None)  # the next call tells it
            log.warning("a sign-in could not be told yet: %s", error, extra=rate_limited("session"))


C = TypeVar("C", bound=Claims)

FindKey = Callable[[str, str, float, KeyFinder], VerificationKey | None]
"""Maps (`iss`, `kid`, time, key finder of agents) to the key that may sign for that issuer."""


def key_of_agent(iss: str, kid: str, at_s: float, of_agents: KeyFinder) -> VerificationKey | None:
    """The `FindKey` of messages that only agents sign. A record that does not hold has no keys."""
    try:
        return of_agents(iss, kid)
    except ChainError:
        return None


@dataclass(frozen=True, slots=True)
class SignedMessageVerifier:
    """Verifies messages by the keys of a directory's records."""

    directory: Directory
    audience: str
    """The trust domain."""
    catch_up: Callable[[], Awaitable[object]]
    """Reads the records to their end. It is awaited once if the key is unknown: a recently registered signer is not
    refused while their record is on its way."""
    report_reuse: ReuseReporter | None = None

    async def verify(
        self, value: bytes, model: type[C], find_key: FindKey = key_of_agent, *, at_ms: int, max_bytes: int
    ) -> tuple[Signed[C], ExpiredError | None]:
        """Verify a message, and return it, and the error if it came too late.

        Args:
            value: the compact JWS.
            model: the message that it must be.
            at_ms: when it arrived: its append time, or now if it is not on Kafka yet.
            max_bytes: the longest that it may be.

        Raises InvalidMessageError for everything but a message that came too late.
        """
        if len(value) > max_bytes:
            raise InvalidMessageError(
                f"{with_article(model.typ)} of {len(value)} bytes; the limit is {max_bytes}",
                code=Code.TOO_LARGE,
            )
        jws, at_s = parse(value), at_ms / 1000
        of_agents = keys_of_agents(self.directory, jws, model, at_s)
        for known_here in (False, True):
            try:
                signed = verify(
                    jws, model, lambda iss, kid: find_key(iss, kid, at_s, of_agents),
                    audience=self.audience, appended_at_ms=at_ms,
                )  # fmt: skip
            except ExpiredError as error:
                # Decided after the signature check: these claims are verified.
                return Signed(jws.unverified_claims(model), jws.compact), error
            except SignatureError as error:
                if error.code != Code.KEY_UNKNOWN:
                    raise
                if (renewed := renewed_key(self.directory, jws)) is not None:
                    if self.report_reuse is not None:
                        await self.report_reuse(*renewed, jws)
                    raise ended_by_renewal(jws.header.kid) from None
                if known_here:
                    raise
                await self.catch_up()
            else:
                return signed, None
        raise AssertionError("not reached")
