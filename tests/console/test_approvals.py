"""Approvals in the console: what people see, sign on the sign page, and what becomes of it."""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from playwright.async_api import expect

from ringfence.client.agent.agent import Agent
from ringfence.client.errors import RequestDeniedError
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.approval import ActionApproval, ActionRequest, Approval
from ringfence.messages.topics import APPROVAL_REQUEST, APPROVAL_RESPONSE
from ringfence.model.requests.facts import load_records
from tests.console.conftest import Visitor
from tests.passkeys.browser import Person
from tests.passkeys.organisation import Organisation

HOSTILE = "<img src=x onerror=alert(1)> \u202egnp.exe\x07 {{ 7*7 }}\n</blockquote><script>alert(1)</script>"


@asynccontextmanager
async def asking(
    organisation: Organisation, reason: str = "to deploy", count: int = 1
) -> AsyncIterator[list[Any]]:
    """The realm's agent asks for what its sponsor has to approve."""
    realm = organisation.realm
    async with realm.as_agent() as agent:
        requests = [asyncio.create_task(ask(organisation, agent, reason)) for _ in range(count)]
        yield requests
        for request in requests:
            request.cancel()
        await asyncio.gather(*requests, return_exceptions=True)


async def ask(
    organisation: Organisation, agent: Agent, reason: str, resource: str = "env/staging/web"
) -> Any:
    realm = organisation.realm
    return await agent.request(
        task=realm.task, target=realm.target, verbs=["write"], resources=[resource], reason=reason,
        ttl_s=600, timeout_s=600,
    )  # fmt: skip


async def test_a_resource_does_not_pass_for_words_of_the_page(
    sponsor: Visitor, organisation: Organisation
) -> None:
    page = await sponsor.sign_in("/approvals")
    resource = "env/staging/web at nothing, read on other"
    async with organisation.realm.as_agent() as agent:
        asked = asyncio.create_task(ask(organisation, agent, "to deploy", resource))
        chip = page.locator("article .scope .chip")
        await expect(chip).to_have_text(resource)
        ground = "(one) => getComputedStyle(one).backgroundColor"
        assert await chip.evaluate(ground) != await page.locator("article").evaluate(ground)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)


async def test_a_sponsor_approves_with_one_look_and_one_touch(
    sponsor: Visitor, organisation: Organisation
) -> None:
    page = await sponsor.sign_in("/approvals")
    await expect(page.get_by_text("Nothing waits for you.")).to_be_visible()
    realm = organisation.realm
    async with asking(organisation) as (request,), realm.seen(APPROVAL_RESPONSE) as seen:
        # The page follows by itself.
        card = page.locator("article")
        await expect(card).to_have_count(1)
        await expect(card.get_by_role("heading")).to_have_text(
            re.compile(rf"^\s*{realm.agent} wants to\s+write env/staging/web\s+at {realm.target}")
        )
        await expect(card).to_contain_text(f"write on env/staging/web at {realm.target}")
        await expect(card).to_contain_text("to deploy")
        await expect(card).to_contain_text(realm.name("maria"))
        await card.get_by_label("Your comment").fill("go ahead")
        await sponsor.signs("Approve")
        assert (await request).lease_id
        (answer,) = await seen.until(
            lambda: [one for one in seen.of(APPROVAL_RESPONSE) if one.key == realm.agent], "the approval"
        )
        assert parse(answer.value).unverified_claims(Approval).comment == "go ahead"
        await expect(card).to_have_count(0)
        await expect(page.get_by_text("Signed and sent: approve request")).to_be_visible()


async def test_buttons_of_a_request_are_in_the_first_screen_of_a_phone(
    sponsor: Visitor, organisation: Organisation
) -> None:
    page = await sponsor.sign_in("/approvals")
    await page.set_viewport_size({"width": 360, "height": 740})
    async with asking(organisation):
        button = page.locator("article").get_by_role("button", name="Approve", exact=True)
        await expect(button).to_be_in_viewport(ratio=1)


async def test_hidden_characters_of_a_reason_are_marked(sponsor: Visitor, organisation: Organisation) -> None:
    page = await sponsor.sign_in("/approvals")
    async with asking(organisation, "to de\u200bploy \\u200b"):
        reason = page.locator("article blockquote").first
        await expect(reason).to_have_text("to de‹U+200B›ploy \\u200b")
        await expect(reason.locator("mark")).to_have_text(["‹U+200B›"])


async def test_a_denial_reaches_the_agent(sponsor: Visitor, organisation: Organisation) -> None:
    await sponsor.sign_in("/approvals")
    async with asking(organisation) as (request,):
        await expect(sponsor.page.locator("article")).to_have_count(1)
        await sponsor.signs("Deny")
        with pytest.raises(RequestDeniedError):
            await request


async def test_request_within_a_grant_is_not_asked_again(
    sponsor: Visitor, organisation: Organisation
) -> None:
    page = await sponsor.sign_in("/approvals")
    async with asking(organisation) as (request,):
        await page.get_by_text("Approve ahead").first.click()
        await page.get_by_label("Credentials like this one").fill("2")
        await sponsor.signs("Approve ahead")
        assert (await request).lease_id
    async with organisation.realm.as_agent() as agent:
        assert (await ask(organisation, agent, "again")).lease_id


async def test_grant_is_withdrawn_in_the_console(sponsor: Visitor, organisation: Organisation) -> None:
    page = await sponsor.sign_in("/approvals")
    async with asking(organisation) as (request,):
        await page.get_by_text("Approve ahead").first.click()
        await sponsor.signs("Approve ahead")
        assert (await request).lease_id
    await page.get_by_role("link", name="Approved ahead").click()
    card = page.locator("article")
    await expect(card).to_contain_text("1 of 5")
    await card.get_by_text("Take it back").first.click()
    await card.get_by_label("Your reason").fill("the release is off")
    await sponsor.signs("Take it back", "Take back", within="article")
    await expect(page.locator("#none")).to_be_visible()
    await page.get_by_role("link", name="All of them").click()
    await expect(card).to_contain_text("taken back")
    async with asking(organisation, "once more"):
        await sponsor.open("/approvals")
        await expect(page.locator("article")).to_have_count(1)


async def test_equivalent_requests_are_one_card(sponsor: Visitor, organisation: Organisation) -> None:
    page = await sponsor.sign_in("/approvals")
    async with asking(organisation, count=3):
        await expect(page.get_by_text("3 alike")).to_be_visible()
        await expect(page.locator("article")).to_have_count(1)


async def test_typed_text_survives_a_page_update(sponsor: Visitor, organisation: Organisation) -> None:
    page = await sponsor.sign_in("/approvals")
    async with asking(organisation):
        comment = page.locator("article").get_by_label("Your comment").first
        await comment.fill("go ahead")
        written = await comment.get_attribute("id")
        async with asking(organisation):
            await expect(page.get_by_text("2 alike")).to_be_visible()
            await expect(page.locator(f"#{written}")).to_have_value("go ahead")


async def test_text_of_agents_is_text(sponsor: Visitor, organisation: Organisation) -> None:
    page = await sponsor.sign_in("/approvals")
    async with asking(organisation, HOSTILE):
        quote = page.locator("article blockquote").first
        await expect(quote).to_have_text(
            "<img src=x onerror=alert(1)> ‹U+202E›gnp.exe‹U+0007› {{ 7*7 }}\n</blockquote><script>alert(1)</script>"
        )
        assert await page.locator("article img, article script").count() == 0


async def test_a_reason_as_long_as_may_be_breaks_nothing(
    sponsor: Visitor, organisation: Organisation
) -> None:
    page = await sponsor.sign_in("/approvals")
    await page.set_viewport_size({"width": 360, "height": 800})
    async with asking(organisation, "<b>\u202e&" + "w" * 2000):
        await expect(page.locator("article")).to_have_count(1)
        width = await page.evaluate("document.documentElement.scrollWidth")
        assert width <= 360


async def test_another_sponsor_sees_nothing_of_it(
    sponsor: Visitor, organisation: Organisation, other_person: Person
) -> None:
    other = Visitor(other_person, organisation.realm.name("bob"), sponsor.site)
    await organisation.enrol(other_person, other.user_id)
    await sponsor.sign_in("/approvals")
    page = await other.sign_in("/approvals?show=all")
    async with asking(organisation):
        link = sponsor.page.locator("article .requestline a")
        await expect(link).to_have_count(1)
        path = await link.get_attribute("href") or ""
        answer = await page.request.get(other.url(path))
        assert answer.status == 404
        assert "deploy" not in await answer.text()
        for path in (f"/agents/{organisation.realm.agent}",):
            assert (await page.request.get(other.url(path))).status == 404
        await other.open("/approvals?show=all")
        await expect(page.locator("article")).to_have_count(0)
        form = {"id": path.rpartition("/")[2]}
        for kind in ("approve", "grant", "suspend"):
            refused = await page.request.post(
                other.url(f"/sign/{kind}"), form={**form, "reason": "x", "count": "1", "hours": "1"},
                headers={"Origin": other.site.session}, max_redirects=0,
            )  # fmt: skip
            assert refused.status == 404
    assert other_person.complaints == []


async def test_a_question_about_what_changed_since_is_refused(
    sponsor: Visitor, organisation: Organisation
) -> None:
    page = await sponsor.sign_in("/approvals")
    async with asking(organisation):
        await expect(page.locator("article")).to_have_count(1)
        before = await page.locator("article input[name=digest]").input_value()
        request_id = await page.locator("article input[name=id]").input_value()
        refused = await page.request.post(
            sponsor.url("/sign/approve"), form={"id": request_id, "digest": before[::-1]},
            headers={"Origin": sponsor.site.session}, max_redirects=0,
        )  # fmt: skip
        assert refused.status == 400
        assert "changed since it was shown" in await refused.text()


async def ask_about_one_action(organisation: Organisation, sponsor_id: str, lease_id: str) -> str:
    """A gateway holds an action by this lease. Returns the id of its question."""
    realm = organisation.realm
    gateway = SigningKey.load(realm.stack.trust.service_key("gateway"))
    async with realm.as_agent() as agent, realm.publisher() as publisher:
        records = load_records(await agent.connection.directory(), realm.agent, realm.task, realm.target)
        now = int(time.time())
        question = ActionRequest(
            iss=gateway.id, aud=realm.settings.trust_domain, iat=now, exp=now + 300, jti=secrets.token_urlsafe(32),
            action_id="an-action", agent_id=realm.agent, task_id=realm.task, lease_id=lease_id,
            target_id=realm.target, verb="read", resource="env/staging/web", method="GET",
            url="https://shop.example/env/staging/web", body_digest=hashlib.sha256().hexdigest(), body_bytes=0,
            headers_digest=hashlib.sha256().hexdigest(), headers=(), required="sponsor",
            revisions=records.revisions("some-policy"),
        )  # fmt: skip
        await publisher.publish_signed(APPROVAL_REQUEST, sponsor_id, question, gateway)
        return message_id(question.iss, question.jti)


async def test_a_question_about_one_action_is_answered(sponsor: Visitor, organisation: Organisation) -> None:
    realm = organisation.realm
    page = await sponsor.sign_in("/approvals")
    async with realm.as_agent() as agent, realm.seen(APPROVAL_RESPONSE) as seen:
        lease = await realm.read(agent)
        await ask_about_one_action(organisation, sponsor.user_id, lease.lease_id)
        card = page.locator("article.action")
        await expect(card).to_contain_text("GET https://shop.example/env/staging/web")
        await sponsor.signs("Approve once")
        (answer,) = await seen.until(
            lambda: [one for one in seen.of(APPROVAL_RESPONSE) if one.key == realm.agent], "the answer"
        )
        assert parse(answer.value).unverified_claims(ActionApproval).verdict == "approved"
        await expect(card).to_have_count(0)
