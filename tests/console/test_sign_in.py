"""Sign-in at the console: whose session it is, what its cookie is, and what others make of it."""

from __future__ import annotations

import asyncio
import json
import urllib.parse
from typing import Any

import httpx
from playwright.async_api import Route, expect

from ringfence.kernel.crypto.jws import parse
from ringfence.messages.registry import SessionStatement
from ringfence.messages.topics import AUDIT
from tests.console.conftest import Visitor
from tests.passkeys.organisation import Organisation


async def test_a_passkey_signs_in_and_the_second_time_with_one_touch(sponsor: Visitor) -> None:
    page = await sponsor.sign_in("/agents?status=active")
    assert page.url == sponsor.url("/agents?status=active")
    await expect(page.get_by_text(sponsor.user_id, exact=True).first).to_be_visible()
    (cookie,) = [one for one in await page.context.cookies() if one["name"] == "__Host-ringfence"]
    assert cookie["secure"]
    assert cookie["httpOnly"]
    assert cookie["sameSite"] == "Strict"
    await page.get_by_role("button", name="Sign out").click()
    await page.get_by_role("button", name=f"Sign in as {sponsor.user_id}").click()
    await expect(page.get_by_role("button", name="Sign out")).to_be_visible()


async def test_a_sign_in_is_audited_by_the_services_that_answer(
    sponsor: Visitor, organisation: Organisation
) -> None:
    realm = organisation.realm
    async with realm.seen(AUDIT) as seen:
        page = await sponsor.sign_in("/approvals")
        (cookie,) = [one for one in await page.context.cookies() if one["name"] == "__Host-ringfence"]
        statement = parse(str(cookie["value"]).partition(".")[2]).unverified_claims(SessionStatement)

        def events() -> dict[str, dict[str, Any]]:
            found = [json.loads(record.value or b"{}") for record in seen.of(AUDIT)]
            return {
                one["unmapped"]["said_by"]: one
                for one in found
                if one["metadata"].get("event_code") == "session.begun"
                and one["actor"]["session"]["uid"] == statement.jti
            }

        told = await seen.until(lambda: events() if {"registry", "policy"} <= set(events()) else None, "both")
        assert told["registry"]["user"]["name"] == sponsor.user_id
        # Once for each service, however often it is asked.
        await sponsor.open("/agents")
        await sponsor.open("/approvals")
        await seen.up_to_now()
        all_told = [one for one in seen.of(AUDIT) if statement.jti.encode() in (one.value or b"")]
        assert len(all_told) <= 4


async def test_pages_redirect_to_sign_in_without_a_session(sponsor: Visitor) -> None:
    for path in ("/approvals", "/agents", "/agents/x"):
        page = await sponsor.open(path)
        assert page.url.startswith(sponsor.url("/sign-in?next="))
    answer = httpx.get(sponsor.url("/live"), params={"page": "/agents"})
    assert answer.status_code == 204


async def test_a_cookie_that_signed_out_is_over(sponsor: Visitor) -> None:
    page = await sponsor.sign_in()
    (cookie,) = [one for one in await page.context.cookies() if one["name"] == "__Host-ringfence"]
    header = {"Cookie": f"{cookie['name']}={cookie['value']}"}
    assert httpx.get(sponsor.url("/agents"), headers=header).status_code == 200
    await page.get_by_role("button", name="Sign out").click()
    await page.wait_for_url("**/sign-in")
    assert httpx.get(sponsor.url("/agents"), headers=header).status_code == 303


async def test_the_statement_in_a_cookie_is_for_its_secret_alone(sponsor: Visitor) -> None:
    page = await sponsor.sign_in()
    (cookie,) = [one for one in await page.context.cookies() if one["name"] == "__Host-ringfence"]
    secret, _, statement = cookie["value"].partition(".")
    for value in (f"{'x' * len(secret)}.{statement}", statement, f"{secret}.", secret):
        answer = httpx.get(sponsor.url("/agents"), headers={"Cookie": f"__Host-ringfence={value}"})
        assert answer.status_code == 303


async def test_disabled_user_is_signed_out_of_an_open_page(
    sponsor: Visitor, organisation: Organisation
) -> None:
    page = await sponsor.sign_in("/agents")
    await expect(page.locator("#live-state")).to_have_text("Live")
    async with organisation.realm.as_operator() as olga:
        await olga.transfer_agent(
            organisation.realm.agent, sponsor=organisation.realm.name("sam"), without_consent=True
        )
        # First what changes the page, which is then fetched anew: it is the stream that has to say the rest.
        await expect(page.get_by_text("No agent that you may see fits.")).to_be_visible()
        await olga.disable_user(sponsor.user_id, reason="left")
    await expect(page.get_by_text("Your session ended")).to_be_visible()


async def test_requests_of_other_hosts_and_origins_do_nothing(sponsor: Visitor) -> None:
    port = sponsor.site.session.rpartition(":")[2]
    other = httpx.get(sponsor.url("/sign-in"), headers={"Host": f"evil.example:{port}"})
    assert other.status_code == 421
    for origin in ({}, {"Origin": "null"}, {"Origin": sponsor.site.sign}, {"Origin": "https://evil.example"}):
        for path in ("/sign-out", "/sign/suspend", "/sign-in/begin", "/sign-in/finish", "/sign-in/find"):
            assert httpx.post(sponsor.url(path), headers=origin, json={}).status_code == 403


async def test_headers_of_every_answer(sponsor: Visitor) -> None:
    for path in ("/sign-in", "/nothing", "/static/none.js", "/questions/x"):
        headers = httpx.get(sponsor.url(path)).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "require-trusted-types-for 'script'" in policy
        assert "unsafe" not in policy
        assert headers["x-frame-options"] == "DENY"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
    page = await sponsor.sign_in("/agents")
    script = await page.locator("script").get_attribute("src")
    assert "immutable" in httpx.get(sponsor.url(str(script))).headers["cache-control"]


async def test_expired_session_returns_to_the_page_after_sign_in(
    sponsor: Visitor, organisation: Organisation
) -> None:
    page = await sponsor.sign_in(f"/agents/{organisation.realm.agent}?kept=1")
    await page.get_by_label("Your reason").first.fill("it behaves oddly")
    await page.route("**/live?*", lambda route: route.abort())  # so that the page does not see it first
    await page.context.clear_cookies()
    await page.get_by_role("button", name="Suspend the agent").click()
    await expect(page.get_by_text("Your session ended")).to_be_visible()
    await page.get_by_role("button", name="Sign in").click()
    await expect(page.get_by_role("button", name="Sign out")).to_be_visible()
    assert page.url == sponsor.url(f"/agents/{organisation.realm.agent}?kept=1")
    sponsor.person.complaints.clear()  # of the stream


async def test_a_hidden_page_holds_no_stream_and_catches_up(
    sponsor: Visitor, organisation: Organisation
) -> None:
    agent = organisation.realm.agent
    page = await sponsor.sign_in(f"/agents/{agent}")
    state, live = page.locator("#facts .state"), page.locator("#live-state")
    await expect(live).to_have_text("Live")
    hide = """(hidden) => {
        Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    await page.evaluate(hide, True)
    await expect(live).to_have_text("Not live")
    async with organisation.realm.as_operator() as olga:
        await olga.suspend_agent(agent, reason="odd")
    await page.evaluate(hide, False)
    await expect(live).to_have_text("Live")
    await expect(state).to_have_text("suspended")


async def test_a_page_says_that_it_is_not_live_while_the_console_does_not_answer(
    sponsor: Visitor, organisation: Organisation
) -> None:
    agent = organisation.realm.agent
    page = await sponsor.sign_in(f"/agents/{agent}")
    await expect(page.locator("#live-state")).to_have_text("Live")
    reason = page.get_by_label("Your reason").first
    await reason.fill("it behaves oddly")
    here, away = sponsor.url(f"/agents/{agent}"), asyncio.Event()

    async def answer(route: Route) -> None:
        away.set()
        await route.fulfill(status=503, body="a proxy has no console to ask")

    await page.route(here, answer)
    async with organisation.realm.as_operator() as olga:
        await olga.suspend_agent(agent, reason="odd")
        await away.wait()
        await expect(page.locator("#live-state")).to_have_text("Not live")
        await expect(reason).to_have_value("it behaves oddly")
        await page.unroute(here)
        await expect(page.locator("#facts .state")).to_have_text("suspended")
        await expect(page.locator("#live-state")).to_have_text("Live")
    sponsor.person.complaints.clear()  # of the proxy


async def test_a_cookie_that_somebody_planted_is_not_the_session(sponsor: Visitor) -> None:
    planted = "p" * 43
    begun = httpx.post(
        sponsor.url("/sign-in/begin"), json={"user_id": sponsor.user_id},
        headers={"Origin": sponsor.site.session, "Cookie": f"__Host-ringfence={planted}"},
    )  # fmt: skip
    assert begun.status_code == 200
    assert begun.headers["set-cookie"].startswith("__Host-ringfence=")
    assert planted not in begun.headers["set-cookie"]


async def test_a_question_is_given_to_the_sign_page_alone(
    sponsor: Visitor, organisation: Organisation
) -> None:
    page = await sponsor.sign_in()
    asked = await page.request.post(
        sponsor.url("/sign/suspend"), form={"id": organisation.realm.agent, "reason": "a test"},
        headers={"Origin": sponsor.site.session}, max_redirects=0,
    )  # fmt: skip
    assert asked.status == 303
    link = asked.headers["location"]
    assert link.startswith(f"{sponsor.site.sign}/#from=")
    question = urllib.parse.unquote(link.partition("#from=")[2])
    for origin in ({}, {"Origin": sponsor.site.session}, {"Origin": "https://evil.example"}):
        assert httpx.get(question, headers=origin).status_code == 404
        assert httpx.post(question, headers=origin, json={"refused": True}).status_code == 404
    mine = {"Origin": sponsor.site.sign}
    assert httpx.get(question, headers=mine).json()["user"] == sponsor.user_id
    assert httpx.post(question, headers=mine, json={"answer": "a.b.c"}).status_code == 422
    refused = httpx.post(question, headers=mine, json={"refused": True})
    assert refused.json()["next"].startswith(sponsor.url("/?notice="))
    assert httpx.get(question, headers=mine).status_code == 410
    assert httpx.get(question[:-4] + "AAAA", headers=mine).status_code == 404
