"""Keys of an issuer that publishes them: over HTTPS, from itself alone, and not more often than need be."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from ringfence.kernel.base.errors import SettingsError, UnavailableError
from ringfence.registry.oidc_discovery import MAX_DOCUMENT_BYTES, Discovery
from tests.gateway.certificates import Certificates
from tests.support.in_memory_registry import FixedClock
from tests.support.oidc_tokens import TokenIssuer
from tests.support.servers.oidc import CONFIGURATION, OidcServer


class Place:
    def __init__(self, folder: Path) -> None:
        self.certificates = Certificates(folder)
        self.clock = FixedClock()
        self.issuer = OidcServer("ES256")
        self.discovery = Discovery(self.clock, self.certificates.file)

    async def kids(self, kid: str) -> set[str]:
        return {key.kid for key in await self.discovery.keys(self.issuer.issuer, kid)}


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    place = Place(tmp_path)
    async with place.issuer.running(place.certificates.server("127.0.0.1")):
        yield place
    await place.discovery.close()


async def test_keys_are_read_once_and_kept(place: Place) -> None:
    assert await place.kids("key-1") == {"key-1"}
    assert await place.kids("key-1") == {"key-1"}
    assert place.issuer.asked == [CONFIGURATION, "/keys"]


async def test_a_key_that_is_not_known_is_asked_for_now_and_then(place: Place) -> None:
    await place.kids("key-1")
    place.issuer.publish(TokenIssuer("x", "ES256", kid="key-2"))
    assert await place.kids("key-2") == {"key-1"}, "it was asked a moment ago"
    place.clock.ms += 31_000
    assert await place.kids("key-2") == {"key-1", "key-2"}
    before = len(place.issuer.asked)
    for n in range(5):
        await place.kids(f"made-up-{n}")
    assert len(place.issuer.asked) == before


async def test_a_key_that_was_taken_back_counts_for_an_hour_at_most(place: Place) -> None:
    await place.kids("key-1")
    place.issuer.kid = "key-9"
    place.issuer.publish()
    place.clock.ms += 3_599_000
    assert await place.kids("key-1") == {"key-1"}
    place.clock.ms += 2_000
    assert await place.kids("key-1") == {"key-9"}


async def test_an_issuer_that_is_away_leaves_what_is_fresh(place: Place) -> None:
    await place.kids("key-1")
    place.issuer.answers.clear()
    place.clock.ms += 60_000
    assert await place.kids("key-1") == {"key-1"}
    with pytest.raises(UnavailableError, match="answered 404"):
        await place.kids("key-2")
    place.clock.ms += 3_600_000
    with pytest.raises(UnavailableError):
        await place.kids("key-1")


def other_issuer(issuer: OidcServer) -> None:
    issuer.publish(issuer="https://other.example")


def plain_http(issuer: OidcServer) -> None:
    issuer.publish(jwks_uri=f"http://127.0.0.1:{issuer.port}/keys")


def no_address(issuer: OidcServer) -> None:
    issuer.publish(jwks_uri=None)


def elsewhere(issuer: OidcServer) -> None:
    issuer.answers["/moved"] = issuer.answers["/keys"]
    issuer.answers["/keys"] = (302, {"Location": f"{issuer.issuer}/moved"}, b"")


def too_large(issuer: OidcServer) -> None:
    status, headers, body = issuer.answers["/keys"]
    issuer.answers["/keys"] = (status, headers, body + b" " * MAX_DOCUMENT_BYTES)


def no_keys(issuer: OidcServer) -> None:
    issuer.answers["/keys"] = (200, {}, b'{"keys": []}')


def no_json(issuer: OidcServer) -> None:
    issuer.answers[CONFIGURATION] = (200, {}, b"<html>")


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (other_issuer, "its configuration is of 'https://other.example'"),
        (plain_http, "no https address"),
        (no_address, "no https address"),
        (elsewhere, "answered 302"),
        (too_large, "larger than"),
        (no_keys, "has no key for"),
        (no_json, "could not be read"),
    ],
)
async def test_configuration_not_from_the_issuer_gives_no_keys(
    place: Place, broken: Callable[[OidcServer], None], says: str
) -> None:
    broken(place.issuer)
    with pytest.raises(UnavailableError, match=says):
        await place.kids("key-1")


async def test_a_certificate_that_nobody_vouches_for_is_refused(place: Place, tmp_path: Path) -> None:
    strangers = Discovery(place.clock)
    with pytest.raises(UnavailableError, match="could not be read"):
        await strangers.keys(place.issuer.issuer, "key-1")
    await strangers.close()
    assert place.issuer.asked == []
    with pytest.raises(SettingsError, match="RINGFENCE_REGISTRY_OIDC_CA_FILE"):
        Discovery(place.clock, tmp_path / "none.pem")
