"""A running stack, a sign page, and people at browsers with authenticators."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.async_api import Browser

from ringfence.client.admin.trust_setup import load_root_and_bundle, publish_bundle, sign_next_bundle
from ringfence.dev.processes import LOOPBACK, PRIVATE, Child, StackError, free_port, spawn
from ringfence.dev.stack import Stack, StackOptions
from ringfence.messages.trust import Origin
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.passkeys.browser import Person, chromium
from tests.passkeys.organisation import Organisation
from tests.support.stack import realm_in

RP_ID = "localhost"


@dataclass(frozen=True, slots=True)
class Site:
    """The origins of this stack: where people sign, and where a console would be."""

    sign: str
    session: str
    environment: dict[str, str]
    """For the command line."""


@pytest.fixture(scope="session")
async def browser(request: pytest.FixtureRequest) -> AsyncIterator[Browser]:
    """Chromium. A run that wants it and cannot have it fails."""
    async with AsyncExitStack() as exits:
        try:
            started = await exits.enter_async_context(chromium())
        except StackError as error:
            request.session.shouldfail = error.message
            pytest.fail(error.message, pytrace=False)
        yield started


@pytest.fixture(scope="session")
def stack(kafka: Kafka, redis_server: RedisServer) -> Iterator[Stack]:
    """All services as processes, with passkeys in their trust bundle."""
    with tempfile.TemporaryDirectory(prefix="ringfence-passkeys-") as folder:
        options = StackOptions(
            Path(folder) / "state",
            trust_domain="acme.example",
            kafka=kafka.bootstrap,
            embedded_broker=kafka.embedded,
            redis_url=redis_server.url,
            topic_prefix="passkeys",
            redis_prefix="passkeys",
            keep_bytes=1024 * 1024,
        )
        with Stack(options) as running:
            yield running


@pytest.fixture(scope="session")
def site(stack: Stack) -> Iterator[Site]:
    """`ringfence serve sign-page` on a port of localhost that the trust bundle names."""
    port, console = free_port(), free_port()
    made = Site(f"http://localhost:{port}", f"http://localhost:{console}", stack.environment())
    root, bundle = load_root_and_bundle(stack.trust)
    now_s = int(time.time())
    sign_next_bundle(
        stack.trust, bundle, root, now_s,
        rp_id=RP_ID,
        origins=(
            Origin(origin=made.sign, use="sign", not_before=now_s),
            Origin(origin=made.session, use="session", not_before=now_s),
        ),
    )  # fmt: skip
    asyncio.run(publish_bundle(stack.trust, stack.settings()))
    server = serve_sign_page(stack, made, port)
    yield made
    server.kill()


def serve_sign_page(stack: Stack, site: Site, port: int) -> Child:
    """Start the program, and wait until it serves."""
    child = spawn(
        "sign-page",
        [sys.executable, "-P", "-m", "ringfence.cli.main", "serve", "sign-page"],
        env={
            **os.environ,
            **site.environment,
            "RINGFENCE_CONFIG": os.devnull,
            "RINGFENCE_SIGN_PAGE_ORIGIN": site.sign,
            "RINGFENCE_SIGN_PAGE_SESSION_ORIGINS": f'["{site.session}"]',
            "RINGFENCE_SIGN_PAGE_HTTP": f"{LOOPBACK}:{port}",
        },
        log_path=stack.options.state / "logs" / "sign-page.log",
        umask=PRIVATE,
    )

    def serves() -> bool:
        try:
            with urllib.request.urlopen(site.sign) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    child.wait_until(serves, 60.0, "served the page")
    return child


@pytest.fixture
async def person(browser: Browser) -> AsyncIterator[Person]:
    """Somebody at a browser that has seen no page before."""
    made = await Person.at(browser)
    yield made
    await made.leave()


@pytest.fixture
async def organisation(stack: Stack, site: Site) -> AsyncIterator[Organisation]:
    """A small organisation of this test's own, in which sam has no key file."""
    async with realm_in(stack) as realm, Organisation(realm, site.environment) as made:
        yield made
