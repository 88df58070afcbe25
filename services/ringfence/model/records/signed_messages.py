"""Verification of messages of agents and people: by policy as they arrive, by gateways before they publish them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from ringfence.kernel.base.errors import InvalidMessageError, SignatureError
from ringfence.kernel.base.text import with_article
from ringfence.kernel.crypto.claims import ExpiredError
from ringfence.kernel.crypto.jws import KeyFinder, Signed, parse, verify
from ringfence.kernel.crypto.webauthn import VerificationKey
from ringfence.messages.base import Claims
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.records.instances import keys_of_agents

C = TypeVar("C", bound=Claims)

FindKey = Callable[[str, str, float, KeyFinder], VerificationKey | None]
"""Maps (`iss`, `kid`, time, key finder of agents) to the key that may sign for that issuer."""


def key_of_agent(iss: str, kid: str, at_s: float, of_agents: KeyFinder) -> VerificationKey | None:
    """The `FindKey` of messages that only agents sign. A record that does not hold has no keys."""
    try:
        return of_agents(iss, kid)
    except ChainError:
        return None


async def verify_message(
    value: bytes,
    model: type[C],
    directory: Directory,
    find_key: FindKey = key_of_agent,
    *,
    audience: str,
    at_ms: int,
    max_bytes: int,
    catch_up: Callable[[], Awaitable[object]],
) -> tuple[Signed[C], ExpiredError | None]:
    """Verify a message, and return it, and the error if it came too late.

    Args:
        value: the compact JWS.
        model: the message that it must be.
        directory: the records whose keys count.
        audience: the trust domain.
        at_ms: when it arrived: its append time, or now if it is not on Kafka yet.
        max_bytes: the longest that it may be.
        catch_up: reads the records to their end. It is awaited once if the key is unknown: a recently registered signer
            is not refused while their record is on its way.

    Raises InvalidMessageError for everything but a message that came too late.
    """
    if len(value) > max_bytes:
        raise InvalidMessageError(
            f"{with_article(model.typ)} of {len(value)} bytes; the limit is {max_bytes}", code="too_large"
        )
    jws, at_s = parse(value), at_ms / 1000
    of_agents = keys_of_agents(directory, jws, model, at_s)
    for known_here in (False, True):
        try:
            signed = verify(
                jws, model, lambda iss, kid: find_key(iss, kid, at_s, of_agents),
                audience=audience, appended_at_ms=at_ms,
            )  # fmt: skip
        except ExpiredError as error:
            # Decided after the signature check: these claims are verified.
            return Signed(jws.unverified_claims(model), jws.compact), error
        except SignatureError as error:
            if known_here or error.code != "key_unknown":
                raise
            await catch_up()
        else:
            return signed, None
    raise AssertionError("not reached")
