"""A running stack with a console and a sign page, and people at browsers who sign in there."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.async_api import Browser, Error, Page, expect

from ringfence.client.admin.trust_setup import SERVICE_ROLES
from ringfence.dev.stack import Stack
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.passkeys.browser import Person
from tests.passkeys.organisation import Organisation
from tests.support.sign_page import Site, browser, frozen_bundle, person, site
from tests.support.stack import RunningStack, options_of_stack, realm_in

__all__ = ["browser", "person", "site"]

expect.set_options(timeout=20_000)  # where other programs have the machine, pages take their time


@pytest.fixture(scope="session")
def stack(kafka: Kafka, redis_server: RedisServer) -> Iterator[Stack]:
    """All services as processes, and a console."""
    with tempfile.TemporaryDirectory(prefix="ringfence-console-") as folder:
        bundle = frozen_bundle(Path(folder))
        options = options_of_stack(
            Path(folder),
            kafka,
            redis_server,
            "console",
            services=(*SERVICE_ROLES, "console"),
            sign_page=True,
            environment={"RINGFENCE_CONSOLE_REFRESH_MS": "300", "RINGFENCE_POLICY_BUNDLE": str(bundle)},
        )
        with Stack(options) as running:
            yield running
            log = running.child("console").log_path.read_text()
        assert "Traceback" not in log, "\n".join(line for line in log.splitlines() if "Traceback" in line)


@dataclass
class Visitor:
    """Somebody with a passkey at a browser, and the console in it."""

    person: Person
    user_id: str
    site: Site

    @property
    def page(self) -> Page:
        return self.person.page

    def url(self, path: str) -> str:
        return self.site.session + path

    async def open(self, path: str) -> Page:
        """Open a page of the console."""
        try:
            await self.page.goto(self.url(path))
        except Error as error:
            if "interrupted by another navigation" not in error.message:
                raise
            await self.page.goto(self.url(path))  # a live page had begun to load itself again
        return self.page

    async def sign_in(self, path: str = "/") -> Page:
        """Sign in on the way to a page."""
        page = await self.open(path)
        await page.get_by_role("button", name="Sign in").click()
        await expect(page.get_by_role("button", name="Sign out")).to_be_visible()
        return page

    async def signs(self, button: str, sign: str | None = None, *, within: str | None = None) -> Page:
        """Press a button of the console, then the one that signs on the sign page. It leads back. Returns the page."""
        await self.asks(button, within=within)
        await self.page.get_by_role("button", name=sign or button, exact=True).click()
        await self.page.wait_for_url(f"{self.site.session}/**")
        return self.page

    async def asks(self, button: str, *, within: str | None = None) -> Page:
        """Press a button of the console that leads to the sign page. Returns that page."""
        scope = self.page.locator(within) if within else self.page
        await scope.get_by_role("button", name=button, exact=True).click()
        await self.page.wait_for_url(f"{self.site.sign}/**")
        await expect(self.page.get_by_role("button", name="Sign nothing")).to_be_visible()
        return self.page


@pytest.fixture
async def realm(stack: Stack, site: Site) -> AsyncIterator[RunningStack]:
    """A small organisation of this test's own."""
    async with realm_in(stack) as made:
        yield made


@pytest.fixture
async def organisation(realm: RunningStack, site: Site, tmp_path: Path) -> AsyncIterator[Organisation]:
    """Its people who sign with passkeys."""
    async with Organisation(realm, site.environment, tmp_path) as made:
        yield made


@pytest.fixture
async def other_person(browser: Browser) -> AsyncIterator[Person]:
    """Somebody else, at a browser of their own."""
    made = await Person.at(browser)
    yield made
    await made.leave()


@pytest.fixture
async def sponsor(organisation: Organisation, person: Person, site: Site) -> AsyncIterator[Visitor]:
    """The sponsor of the realm's agent, who has a passkey alone."""
    made = Visitor(person, await organisation.sponsor(person), site)
    yield made
    assert person.complaints == []
