"""Firefox with a virtual authenticator, driven by its own protocol, Marionette: Playwright wants a build of its own.

Frames are `LENGTH:JSON`; a command is `[0, id, name, parameters]`, its answer `[1, id, error, result]`.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from ringfence.dev.processes import StackError

FIREFOX = os.environ.get("RINGFENCE_TEST_FIREFOX") or "firefox-esr"
WITHIN_S = 60.0
_PREFERENCES = {
    "security.webauth.webauthn_enable_softtoken": True,
    "security.webauth.webauthn_enable_usbtoken": False,
    # Firefox asks the person before it tells a page which authenticator they have; nobody is there to answer.
    "security.webauthn.always_allow_direct_attestation": True,
    "browser.shell.checkDefaultBrowser": False,
    "datareporting.policy.dataSubmissionEnabled": False,
    "app.update.disabledForTesting": True,
}
_AUTHENTICATOR = {
    "protocol": "ctap2",
    "transport": "internal",
    "hasResidentKey": True,
    "hasUserVerification": True,
    "isUserConsenting": True,
    "isUserVerified": True,
}


class FirefoxError(AssertionError):
    """A command that the browser refused."""


class Firefox:
    """A window of a browser of its own, with one authenticator that touches and verifies by itself."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._commands = 0
        self.version = ""

    async def begin(self) -> None:
        """Open the session, and plug in the authenticator."""
        await self._read()  # the greeting
        session = await self._call("WebDriver:NewSession", capabilities={"alwaysMatch": {}})
        self.version = session["capabilities"]["browserVersion"]
        await self._call("WebAuthn:AddVirtualAuthenticator", **_AUTHENTICATOR)

    async def open(self, url: str) -> None:
        """Open a link, also where only the part after `#` differs."""
        await self._call("WebDriver:Navigate", url="about:blank")
        await self._call("WebDriver:Navigate", url=url)

    async def click(self, label: str) -> None:
        """Press the button with this text, once it is there."""
        found = await self._until(f"//button[normalize-space()={json.dumps(label)} and not(@disabled)]")
        await self._call("WebDriver:ElementClick", id=found)

    async def heading(self, text: str) -> None:
        """Wait until the page has this heading."""
        await self._until(f"//h1[normalize-space()={json.dumps(text)}]")

    async def text(self, path: str) -> None:
        """Wait until something on the page contains this text."""
        await self._until(f"//*[contains(text(), {json.dumps(path)})]")

    async def value(self, selector: str) -> str:
        """The value of a field, by its CSS selector."""
        script = "return document.querySelector(arguments[0])?.value"
        return str((await self._call("WebDriver:ExecuteScript", script=script, args=[selector]))["value"])

    async def _until(self, xpath: str) -> str:
        """Wait for an element. Returns its id; fails the test with what the page says instead."""
        try:
            async with asyncio.timeout(WITHIN_S):
                while True:
                    elements = await self._call("WebDriver:FindElements", using="xpath", value=xpath)
                    if elements:
                        return str(next(iter(elements[0].values())))
                    await asyncio.sleep(0.05)
        except TimeoutError:
            script = "return document.body.innerText"
            said = (await self._call("WebDriver:ExecuteScript", script=script, args=[]))["value"]
            raise FirefoxError(f"nothing is at {xpath}; the page says: {said[:1000]}") from None

    async def _call(self, name: str, **parameters: Any) -> Any:
        self._commands += 1
        frame = json.dumps([0, self._commands, name, parameters]).encode()
        self._writer.write(b"%d:%s" % (len(frame), frame))
        await self._writer.drain()
        _, _, error, result = await self._read()
        if error is not None:
            raise FirefoxError(f"{name}: {error['error']}: {error['message']}")
        return result

    async def _read(self) -> Any:
        size = await self._reader.readuntil(b":")
        return json.loads(await self._reader.readexactly(int(size[:-1])))


@asynccontextmanager
async def firefox(profile: Path) -> AsyncIterator[Firefox]:
    """The browser of this machine, with a new profile in this folder. Raises StackError where it is missing."""
    program = shutil.which(FIREFOX)
    if program is None:
        raise StackError(
            f"there is no {FIREFOX}: install it (Debian: apt-get install firefox-esr), or name one by "
            "RINGFENCE_TEST_FIREFOX"
        )
    port = _free_port()
    preferences = {**_PREFERENCES, "marionette.port": port}
    lines = [f'user_pref("{name}", {json.dumps(value)});' for name, value in preferences.items()]
    (profile / "user.js").write_text("\n".join(lines))
    process = await asyncio.create_subprocess_exec(
        program, "--headless", "--marionette", "--no-remote", "--profile", str(profile),
        env={"PATH": os.environ["PATH"], "HOME": str(profile), "MOZ_HEADLESS": "1"},
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        reader, writer = await _connected(port, process)
        made = Firefox(reader, writer)
        await made.begin()
        yield made
        writer.close()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


async def _connected(
    port: int, process: asyncio.subprocess.Process
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    async with asyncio.timeout(WITHIN_S):
        while process.returncode is None:
            try:
                return await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
    raise StackError(f"{FIREFOX} ended with status {process.returncode} before it listened")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
