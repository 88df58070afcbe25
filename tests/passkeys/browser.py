"""Debian's Chromium with a virtual authenticator (WebAuthn Level 3, 11), driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from playwright.async_api import Browser, CDPSession, Page, async_playwright
from playwright.async_api import Error as PlaywrightError

from ringfence.dev.processes import StackError

CHROMIUM = os.environ.get("RINGFENCE_TEST_CHROMIUM") or "chromium"
WITHIN_MS = 30_000
_OPTIONS = {
    "protocol": "ctap2",
    "transport": "internal",
    "hasResidentKey": True,
    "hasUserVerification": True,
    "isUserVerified": True,
    "automaticPresenceSimulation": True,
}


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """The browser of this machine. Raises StackError where it is missing, or does not start."""
    program = shutil.which(CHROMIUM)
    if program is None:
        raise StackError(
            f"there is no {CHROMIUM}: install it (Debian: apt-get install chromium), or name one by "
            "RINGFENCE_TEST_CHROMIUM"
        )
    async with async_playwright() as playwright:
        try:
            # Root has no sandbox in Chromium; what it loads here is ours.
            arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
            browser = await playwright.chromium.launch(executable_path=program, args=arguments)
        except PlaywrightError as error:
            raise StackError(f"{program} does not start: {error}") from None
        yield browser
        await browser.close()


class Person:
    """A person at a browser of their own, with one authenticator built in. It touches and verifies by itself."""

    def __init__(self, page: Page, session: CDPSession, authenticator: str) -> None:
        self.page = page
        self.complaints: list[str] = []
        """Errors on the console of the page, violations of its policy (CSP) among them."""
        self._session = session
        self._authenticator = authenticator
        page.set_default_timeout(WITHIN_MS)
        page.on("console", lambda line: self.complaints.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    @classmethod
    async def at(cls, browser: Browser) -> Person:
        """Somebody who has seen no page before."""
        context = await browser.new_context()
        page = await context.new_page()
        session = await context.new_cdp_session(page)
        await session.send("WebAuthn.enable")
        made = await session.send("WebAuthn.addVirtualAuthenticator", {"options": _OPTIONS})
        return cls(page, session, made["authenticatorId"])

    async def use_keys_at(self, page: Page) -> None:
        """Have the same keys at another page of this browser: the virtual authenticator is that of one page."""
        held = await self._session.send("WebAuthn.getCredentials", {"authenticatorId": self._authenticator})
        session = await page.context.new_cdp_session(page)
        await session.send("WebAuthn.enable")
        made = await session.send("WebAuthn.addVirtualAuthenticator", {"options": _OPTIONS})
        for credential in held["credentials"]:
            await session.send("WebAuthn.addCredential", {**made, "credential": credential})

    async def set_verified(self, verified: bool) -> None:
        """Whether the authenticator recognises the person from now on."""
        await self._session.send(
            "WebAuthn.setUserVerified",
            {"authenticatorId": self._authenticator, "isUserVerified": verified},
        )

    async def lose_keys(self) -> None:
        """The device is lost: a new one holds nothing."""
        await self._session.send("WebAuthn.clearCredentials", {"authenticatorId": self._authenticator})

    async def open(self, link: str) -> Page:
        """Open a link."""
        await self.page.goto("about:blank")
        await self.page.goto(link)
        return self.page

    async def leave(self) -> None:
        """Close the browser's profile."""
        await self.page.context.close()
