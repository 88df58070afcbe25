"""Two processes of one console: any of them answers anything, and their metrics are for who asks them directly."""

from __future__ import annotations

import os
import sys
import urllib.parse
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.async_api import expect

from ringfence.dev.processes import LOOPBACK, free_port, spawn
from ringfence.dev.stack import Stack
from ringfence.kernel.crypto.jws import parse
from tests.console.conftest import Visitor
from tests.console.test_attacks import as_owner, cookie_of
from tests.passkeys.organisation import Organisation


@pytest.fixture(scope="module")
def other_replica(stack: Stack) -> Iterator[str]:
    """The address of a second process with the key and the origin of the first."""
    address = f"{LOOPBACK}:{free_port()}"
    environment = {
        **os.environ,
        **stack.environment(),
        "RINGFENCE_CONFIG": os.devnull,
        "RINGFENCE_HTTP": address,
        "RINGFENCE_INSTANCE": "console-2",
        "RINGFENCE_KEY_FILE": str(stack.trust.service_key("console")),
        "RINGFENCE_CONSOLE_ORIGIN": stack.origins["session"],
    }
    child = spawn(
        "console-2",
        [sys.executable, "-P", "-m", "ringfence.cli.main", "serve", "console"],
        env=environment,
        log_path=stack.options.state / "logs" / "console-2.log",
    )
    try:
        child.wait_until(lambda: _ready(address), 60, "was ready")
        yield f"http://{address}"
    finally:
        child.stop()


def _ready(address: str) -> bool:
    try:
        return httpx.get(f"http://{address}/readyz", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


async def test_any_replica_shows_pages_and_takes_answers(
    sponsor: Visitor, organisation: Organisation, other_replica: str
) -> None:
    page = await sponsor.sign_in("/agents")
    host = {"Host": urlsplit(sponsor.site.session).netloc}
    seen = httpx.get(f"{other_replica}/agents", headers=host | as_owner(await cookie_of(page)))
    assert seen.status_code == 200
    assert organisation.realm.agent in seen.text
    # A question of the first is answered at the second, and the person comes back to the first.
    asked = await page.request.post(
        sponsor.url("/sign/suspend"), form={"id": organisation.realm.agent, "reason": "a test"},
        headers={"Origin": sponsor.site.session, "Referer": sponsor.url("/agents?status=active")},
        max_redirects=0,
    )  # fmt: skip
    question = urllib.parse.unquote(asked.headers["location"].partition("#from=")[2])
    elsewhere = other_replica + urlsplit(question).path
    mine = host | {"Origin": sponsor.site.sign}
    assert httpx.get(elsewhere, headers=mine).json()["return_to"] == question
    taken = httpx.post(elsewhere, headers=mine, json={"refused": True}).json()
    assert taken["next"].startswith(sponsor.url("/agents?status=active&notice="))
    await page.goto(taken["next"])
    await expect(page.locator("#notice")).to_have_text(
        f"Not signed: suspend agent {organisation.realm.agent}"
    )
    assert page.url == sponsor.url("/agents?status=active")


async def test_an_ended_passkey_ends_the_session_at_every_replica(
    sponsor: Visitor, organisation: Organisation, other_replica: str
) -> None:
    """A sign-out ends it at one of them, as docs/console.md says."""
    page = await sponsor.sign_in("/agents")
    value = await cookie_of(page)
    cookie, passkey = as_owner(value), parse(value.partition(".")[2]).header.kid
    host = {"Host": urlsplit(sponsor.site.session).netloc}
    signed_out = httpx.post(sponsor.url("/sign-out"), headers=cookie | {"Origin": sponsor.site.session})
    assert signed_out.headers["location"] == "/sign-in"
    assert httpx.get(sponsor.url("/agents"), headers=cookie).status_code == 303
    assert httpx.get(f"{other_replica}/agents", headers=host | cookie).status_code == 200
    ended = await organisation.run(
        "user", "end-key", sponsor.user_id, passkey, "--reason", "a cookie was copied", "--yes",
        identity=organisation.operator_file,
    )  # fmt: skip
    await ended.result()
    async with httpx.AsyncClient(headers=host | cookie, timeout=30) as http:
        while (answer := await http.get(f"{other_replica}/agents")).status_code == 200:
            pass
        assert answer.headers["location"].startswith("/sign-in?ended=1")


def test_metrics_are_for_who_asks_the_process(stack: Stack, other_replica: str) -> None:
    found = httpx.get(f"{other_replica}/metrics")
    assert found.status_code == 200
    assert "ringfence_console_page_seconds" in found.text
    assert "ringfence_console_sign_ins_total" in found.text
    # By a name with dots, browsers may be led here from another site (DNS rebinding).
    port = urlsplit(other_replica).port
    for name in (
        urlsplit(stack.origins["session"]).netloc,
        f"evil.example:{port}",
        "evil.example",
        "127.0.0.1.evil",
    ):
        assert httpx.get(f"{other_replica}/metrics", headers={"Host": name}).status_code == 404
    for name in ("127.0.0.1", f"[::1]:{port}", f"console:{port}"):
        assert httpx.get(f"{other_replica}/metrics", headers={"Host": name}).status_code == 200
