"""What attackers ask of the console, and what they get: other people's things, frames, forms, stolen cookies."""

from __future__ import annotations

import asyncio
import random
import re
import time
import urllib.parse
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, cast

import httpx
import pytest
from playwright.async_api import Error as PlaywrightError
from playwright.async_api import Page, Route, expect
from starlette.routing import Route as AppRoute

from ringfence.client.errors import RequestDeniedError
from ringfence.client.reports.read_api import ReadApi
from ringfence.console.commands import KINDS
from ringfence.console.http import Site as ConsoleSite
from ringfence.console.views.pages import PAGES
from ringfence.kernel.base.ids import digest
from ringfence.kernel.crypto.jws import parse, sign, sign_payload
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import Outbound
from ringfence.messages.api import CONSOLE_ROUTES, ConsoleToken, api_audience
from ringfence.messages.approval import Approval
from ringfence.messages.base import ServiceRole
from ringfence.messages.credential import CredentialRequest
from ringfence.messages.operations import DeadLetter
from ringfence.messages.registry import BackendSettings, SessionStatement, VerbFloor
from ringfence.messages.topics import APPROVAL_RESPONSE, CREDENTIAL_REQUEST, DEAD_LETTER
from ringfence.model.requests.facts import load_records
from tests.console.conftest import Visitor
from tests.console.test_approvals import HOSTILE, ask, ask_about_one_action, asking
from tests.console.test_findings import use_break_glass
from tests.passkeys.browser import Person
from tests.passkeys.organisation import Organisation

SESSION_COOKIE = "__Host-ringfence"


async def cookie_of(page: Page) -> str:
    """The value of the session's cookie."""
    (cookie,) = [one for one in await page.context.cookies() if one["name"] == SESSION_COOKIE]
    return str(cookie["value"])


def as_owner(cookie: str) -> dict[str, str]:
    return {"Cookie": f"{SESSION_COOKIE}={cookie}"}


# --- other people's things --------------------------------------------------------------------------------------------


@dataclass
class Theirs:
    """What belongs to sponsor B, by what it is; and sponsor A, who is signed in."""

    ids: dict[str, str]
    texts: list[str]
    a: Visitor
    cookie: str


@pytest.fixture
async def theirs(sponsor: Visitor, organisation: Organisation, other_person: Person) -> AsyncIterator[Theirs]:
    """B is the realm's sponsor, with one of everything. A sponsors nothing."""
    realm = organisation.realm
    a = Visitor(other_person, realm.name("bob"), sponsor.site)
    await organisation.enrol(other_person, a.user_id)
    page = await sponsor.sign_in("/approvals")
    async with asking(organisation, "granted") as (request,):
        await page.get_by_text("Approve ahead").first.click()
        await sponsor.signs("Approve ahead")
        granted = await request
    await sponsor.open("/grants")
    grant = await page.locator("article").get_attribute("id")
    used = await use_break_glass(organisation)
    async with realm.as_agent() as agent:
        waiting = asyncio.create_task(
            agent.request(
                task=realm.task, target=realm.target, verbs=["write"], resources=["env/staging/other"],
                reason="their secret reason", ttl_s=600, timeout_s=1200,
            )
        )  # fmt: skip
        await sponsor.open("/approvals")
        pending = await page.locator("article.request input[name=id]").first.get_attribute("value")
        ids = {
            "agent": realm.agent, "task": realm.task, "lease": granted.lease_id, "request": str(pending),
            "grant": str(grant).removeprefix("grant-"), "use": used,
            "action": await ask_about_one_action(organisation, sponsor.user_id, granted.lease_id),
        }  # fmt: skip
        await expect(page.locator("article.action")).to_have_count(0)  # it is not of this page
        await sponsor.open("/approvals")
        await expect(page.locator("article.action")).to_have_count(1)
        own = await a.sign_in("/approvals")
        texts = [realm.agent, realm.task, granted.lease_id, str(pending), "their secret reason", used]
        yield Theirs(ids, texts, a, await cookie_of(own))
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


# By the path of a route: the ids of B to ask it with.
IDS_OF_ROUTE = {
    "/approvals/{id}": ("request",),
    "/agents/{id}": ("agent",),
    "/leases/{id}": ("lease",),
    "/tasks/{id}": ("task",),
    "/trace/{id}": ("request", "agent", "lease", "task", "use"),
    "/offers/{id}": ("agent", "request"),
}
# Not about anybody: probes, files, sign-in, what has tests of its own.
OPEN_ROUTES = {
    "/healthz", "/readyz", "/metrics", "/static/{name}", "/sign-in", "/sign-in/find", "/sign-in/begin",
    "/sign-in/finish", "/sign-out", "/questions/{path}", "/live", "/", "/trace", "/sign/{kind}", "/offer",
}  # fmt: skip
# By the form: what B's things are called in it. A form that reads nothing about anybody asks services nothing.
FORMS = {
    "approve": {"id": "request"},
    "deny": {"id": "request"},
    "grant": {"id": "request", "count": "1", "hours": "1"},
    "withdraw-grant": {"id": "grant", "reason": "x"},
    "approve-action": {"id": "action"},
    "deny-action": {"id": "action"},
    "review": {"id": "use", "note": "x"},
    "suspend": {"id": "agent", "reason": "x"},
    "resume": {"id": "agent", "reason": "x"},
    "narrow": {"id": "agent"},
    "transfer": {"id": "agent", "sponsor": "x"},
    "take-over": {"offer": "agent"},
    "end-task": {"id": "task", "reason": "x"},
    "revoke-lease": {"id": "lease", "reason": "x"},
    "second": {"id": "proposal"},
    "withdraw-proposal": {"id": "proposal"},
}


def all_routes() -> list[AppRoute]:
    """The routes of the application, as it is."""
    made = ConsoleSite(cast(Any, None)).application()
    return [one for one in made.routes if isinstance(one, AppRoute)]


def test_every_route_and_form_is_tried() -> None:
    with_ids = {one.path for one in all_routes() if "{" in one.path} - OPEN_ROUTES
    assert with_ids == set(IDS_OF_ROUTE)
    assert set(KINDS) == {*FORMS, "revoke-all"}


async def test_a_sponsor_gets_nothing_of_anothers(theirs: Theirs) -> None:
    base, owner = theirs.a.site.session, as_owner(theirs.cookie)
    async with httpx.AsyncClient(base_url=base, headers=owner, timeout=30) as http:
        for route in all_routes():
            if route.path in OPEN_ROUTES:
                continue
            for what in IDS_OF_ROUTE.get(route.path, ()):
                path = route.path.replace("{id}", theirs.ids[what])
                for asked in (path, f"/live?{urllib.parse.urlencode({'page': path})}"):
                    answer = await http.get(asked)
                    assert answer.status_code == 404, asked
                    assert "their secret reason" not in answer.text
            if "{" not in route.path:
                # A list, and with every filter that there is.
                for query in ({}, {"show": "all"}, *({name: id} for name, id in theirs.ids.items())):
                    answer = await http.get(route.path, params=query)
                    assert answer.status_code == 200, route.path
                    shown = re.sub(r'value="[^"]*"|href="[^"]*"|look=[^"]*|of agent [^<;.]*', "", answer.text)
                    assert [text for text in theirs.texts if text in shown] == [], (route.path, query)
        for kind, form in FORMS.items():
            filled = {name: theirs.ids.get(value, value) for name, value in form.items()}
            answer = await http.post(f"/sign/{kind}", data=filled, headers={"Origin": base})
            assert answer.status_code == 404, kind
        offered = await http.post("/offer", data={"id": theirs.ids["agent"]}, headers={"Origin": base})
        assert offered.status_code == 404


async def test_a_list_stream_tells_nothing_of_anothers(
    theirs: Theirs, sponsor: Visitor, organisation: Organisation
) -> None:
    """B's own stream of the agents says what A's streams of all lists leave out."""
    base, realm = theirs.a.site.session, organisation.realm
    lists = [path for path in PAGES if "{" not in path]
    told: dict[str, list[str]] = {}
    news = asyncio.Event()

    async def follow(name: str, path: str, cookie: str) -> None:
        async with (
            httpx.AsyncClient(base_url=base, headers=as_owner(cookie), timeout=60) as http,
            http.stream("GET", "/live", params={"page": path}) as stream,
        ):
            assert stream.status_code == 200
            assert stream.headers["x-accel-buffering"] == "no"
            async for line in stream.aiter_lines():
                told.setdefault(name, []).append(line)
                news.set()

    async def until(found: Callable[[], bool]) -> None:
        while not found():
            news.clear()
            await news.wait()

    async with AsyncExitStack() as exits:
        olga = await exits.enter_async_context(realm.as_operator())
        group = await exits.enter_async_context(asyncio.TaskGroup())
        followers = [
            group.create_task(follow("B", "/agents", await cookie_of(sponsor.page))),
            *(group.create_task(follow(path, path, theirs.cookie)) for path in lists),
        ]
        await until(lambda: {"B", *lists} <= set(told))
        # Each time B is told, A's streams have looked since the time before.
        for turn in range(1, 5):
            await (olga.resume_agent if turn % 2 == 0 else olga.suspend_agent)(realm.agent, reason="odd")
            await until(lambda turn=turn: told["B"].count("event: changed") >= turn)  # type: ignore[misc]
        for one in followers:
            one.cancel()
    assert {path: [line for line in told[path] if line.startswith("event")] for path in lists} == {
        path: [] for path in lists
    }
    own = httpx.get(f"{base}/agents", headers=as_owner(theirs.cookie), timeout=30)
    assert realm.agent not in own.text


# --- questions that are superseded ------------------------------------------------------------------------------------


async def test_a_superseded_question_disappears_and_signing_it_anyway_is_stale(
    sponsor: Visitor, organisation: Organisation
) -> None:
    realm = organisation.realm
    page = await sponsor.sign_in("/approvals")
    async with asking(organisation) as (request,):
        await expect(page.locator("article")).to_have_count(1)
        link = await page.locator("article .requestline a").get_attribute("href")
        other = await page.context.new_page()
        await other.goto(sponsor.url("/approvals"))
        await expect(other.locator("article")).to_have_count(1)
        await sponsor.asks("Approve")
        async with realm.as_operator() as olga:
            await olga.set_target(
                realm.target, description="another shop", backend=BackendSettings(kind="jwt"),
                verbs=[VerbFloor(verb="read"), VerbFloor(verb="write", floor="sponsor")],
                keys=[realm.key("target", realm.target)],
            )  # fmt: skip
        await expect(other.locator("#none")).to_be_visible(timeout=30_000)
        await other.goto(sponsor.url(str(link)))
        await expect(other.locator("#superseded")).to_contain_text("approval_stale")
        await other.close()
        assert not request.done()
        await page.get_by_role("button", name="Approve", exact=True).click()
        await expect(page.locator("#notice")).to_contain_text("Signed and sent: approve request")
        with pytest.raises(RequestDeniedError) as denied:
            await request
        assert [one.code for one in denied.value.reasons] == ["approval_stale"]


# --- browsers led astray ----------------------------------------------------------------------------------------------


async def led_to(page: Page, address: str, html: str) -> None:
    """Open a page of an attacker, who owns the name in `address`."""

    async def answer(route: Route) -> None:
        await route.fulfill(status=200, content_type="text/html", body=html)

    await page.route(address, answer)
    await page.goto(address)


async def without(page: Page, address: str, *headers: str) -> None:
    """Take headers off what the console answers: a control, which shows that they are what protects."""

    async def answer(route: Route) -> None:
        fetched = await route.fetch(max_redirects=0)
        left = {name: value for name, value in fetched.headers.items() if name not in headers}
        await route.fulfill(response=fetched, headers=left)

    await page.route(address, answer)


@pytest.mark.parametrize("attacker", ["http://evil.example/", "http://localhost:1/"])
async def test_no_page_is_shown_in_a_frame(sponsor: Visitor, attacker: str) -> None:
    page = await sponsor.sign_in("/approvals")
    for path in ("/approvals", "/sign-in", "/agents"):
        await led_to(page, attacker, f'<iframe src="{sponsor.url(path)}"></iframe>')
        frame = page.frames[1]
        await expect(frame.locator("body")).not_to_contain_text("Ringfence")
        assert frame.url.startswith("chrome-error://")
    # Each of the two headers suffices. Without both of them the page is shown.
    of_policy, of_old = "content-security-policy", "x-frame-options"
    for taken, shown in (((of_policy,), False), ((of_old,), False), ((of_policy, of_old), True)):
        await without(page, sponsor.url("/**"), *taken)
        await led_to(page, attacker, f'<iframe src="{sponsor.url("/sign-out")}"></iframe>')
        if shown:
            await expect(page.frames[1].locator("body")).to_contain_text("Ringfence")
        else:
            await page.frames[1].wait_for_url("chrome-error://**")
        await page.unroute(sponsor.url("/**"))
    sponsor.person.complaints.clear()  # of the refusals


async def test_a_script_that_is_not_the_consoles_does_not_run(sponsor: Visitor) -> None:
    """Neither one that somebody put into a page, nor the console's own where it was changed, nor text made HTML."""
    page = await sponsor.sign_in("/approvals")
    ours = re.search(r"/static/console-\w+\.js", await page.content())
    assert ours is not None
    taken: list[str] = []

    async def add_a_script(route: Route) -> None:
        fetched = await route.fetch()
        text = (await fetched.text()).replace("</body>", "<script>var theirs = 1</script></body>")
        headers = {name: value for name, value in fetched.headers.items() if name not in taken}
        await route.fulfill(response=fetched, body=text, headers=headers)

    async def change(route: Route) -> None:
        fetched = await route.fetch()
        await route.fulfill(response=fetched, body="window.changed = 1;" + await fetched.text())

    await page.route(sponsor.url("/approvals"), add_a_script)
    await page.route(sponsor.site.session + ours.group(), change)
    # Without the policy the same script runs: it is the policy that protects.
    for runs in (False, True):
        taken[:] = ["content-security-policy"] if runs else []
        await page.goto(sponsor.url("/approvals"))
        await expect(page.get_by_role("heading", level=1)).to_be_visible()
        assert await page.evaluate("typeof changed") == "undefined"  # its digest stands in the page too
        assert await page.evaluate("typeof theirs") == ("number" if runs else "undefined")
        made = page.evaluate("document.getElementById('announce').innerHTML = '<b>text</b>'")
        if runs:
            await made
        else:
            with pytest.raises(PlaywrightError, match="TrustedHTML"):
                await made
    sponsor.person.complaints.clear()  # of the refusals


async def test_no_form_of_another_site_does_anything(sponsor: Visitor, organisation: Organisation) -> None:
    page = await sponsor.sign_in("/approvals")
    cookie = await cookie_of(page)
    agent = organisation.realm.agent
    for attacker in ("http://evil.example/", "http://localhost:1/"):
        for path in ("/sign-out", "/sign/suspend", "/offer", "/sign-in/finish", "/sign-in/begin"):
            await led_to(
                page,
                attacker,
                f'<form method="post" action="{sponsor.url(path)}"><input name="id" value="{agent}">'
                '<input name="reason" value="odd"><button>Win a prize</button></form>',
            )
            await page.get_by_role("button").click()
            await expect(page.get_by_text("another site asked for this; nothing was done")).to_be_visible()
            await page.unroute(attacker)
    assert await cookie_of(page) == cookie
    assert httpx.get(sponsor.url("/sign-out"), headers=as_owner(cookie)).status_code == 404
    await sponsor.open("/agents")
    await expect(page.get_by_role("button", name="Sign out")).to_be_visible()
    sponsor.person.complaints.clear()  # of the refusals


async def test_a_session_that_somebody_planted_is_replaced_and_stays_theirs(
    sponsor: Visitor, organisation: Organisation, other_person: Person
) -> None:
    mallory = Visitor(other_person, organisation.realm.name("mallory"), sponsor.site)
    await organisation.enrol(other_person, mallory.user_id)
    planted = await cookie_of(await mallory.sign_in("/agents"))
    context = sponsor.page.context
    await sponsor.open("/sign-in")
    await context.add_cookies(
        [
            {
                "name": SESSION_COOKIE, "value": planted, "url": "https://localhost/", "secure": True,
                "httpOnly": True, "sameSite": "Strict",
            }
        ]
    )  # fmt: skip
    # Whoever looks sees that it is not their session. Signing in makes another cookie.
    page = await sponsor.open("/agents")
    await expect(page.get_by_text(mallory.user_id, exact=True).first).to_be_visible()
    await page.get_by_role("button", name="Sign out").click()
    await page.get_by_role("button", name="Sign in").click()
    await expect(page.get_by_role("button", name="Sign out")).to_be_visible()
    own = await cookie_of(page)
    assert own.partition(".")[0] != planted.partition(".")[0]
    seen = httpx.get(sponsor.url("/agents"), headers=as_owner(planted))
    assert organisation.realm.agent not in seen.text
    # A secret that was known before sign-in begins no session: the console makes its own.
    await page.get_by_role("button", name="Sign out").click()
    known = "k" * 43
    await context.add_cookies(
        [
            {
                "name": SESSION_COOKIE, "value": f"{known}.a.b.c", "url": "https://localhost/", "secure": True,
                "httpOnly": True, "sameSite": "Strict",
            }
        ]
    )  # fmt: skip
    await page.get_by_role("button", name="Sign in").click()
    await expect(page.get_by_role("button", name="Sign out")).to_be_visible()
    assert (await cookie_of(page)).partition(".")[0] != known
    mixed = f"{planted.partition('.')[0]}.{own.partition('.')[2]}"
    assert httpx.get(sponsor.url("/agents"), headers=as_owner(mixed)).status_code == 303


# --- texts ------------------------------------------------------------------------------------------------------------


async def test_a_reason_of_64_kib_violates_nothing(sponsor: Visitor, organisation: Organisation) -> None:
    """As an agent may send it, with all that is odd; and as long as services take it."""
    realm = organisation.realm
    dialogs: list[str] = []
    sponsor.page.on("dialog", lambda dialog: dialogs.append(dialog.message))
    page = await sponsor.sign_in("/approvals")
    odd = HOSTILE + "\x00\u2066\u202e\u200f" + '"><svg onload=alert(1)>' + "<style>*{display:none}</style>"
    too_long = (odd * (64 * 1024 // len(odd) + 1))[: 64 * 1024]
    async with realm.as_agent() as agent, realm.publisher() as publisher, realm.seen(DEAD_LETTER) as seen:
        key = realm.key("agent", realm.agent)
        now = int(time.time())
        claims = CredentialRequest.model_construct(
            iss=key.id, aud=realm.settings.trust_domain, iat=now, exp=now + 600, jti=str(uuid.uuid4()),
            task_id=realm.task, scope=(realm.permission(["write"], "env/staging/web"),), ttl_s=600, delivery="agent",
            reason=too_long, reply_key=key.public,
        )  # fmt: skip
        payload = claims.model_dump_json(exclude_none=True).encode()
        compact = sign_payload(CredentialRequest, payload, key)
        acknowledged = await publisher.send(
            CREDENTIAL_REQUEST, CredentialRequest.typ, Outbound(realm.agent, compact, id=claims.jti)
        )
        await acknowledged
        await seen.until(lambda: seen.of(DEAD_LETTER), "what is too long is dead-lettered")
        waiting = asyncio.create_task(ask(organisation, agent, (odd * 20)[:2048]))
        await expect(page.locator("article")).to_have_count(1)
        link = await page.locator("article .requestline a").get_attribute("href")
        for path in (
            str(link),
            "/audit",
            f"/audit?agent={realm.agent}",
            "/findings",
            f"/trace/{realm.agent}",
        ):
            await sponsor.open(path)
            await expect(page.get_by_role("heading", level=1)).to_be_visible()
            assert await page.locator("main svg[onload], main img, main script, main style").count() == 0
            assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        # And on the page where people sign.
        await sponsor.open("/approvals")
        await sponsor.asks("Deny")
        await expect(page.locator("dl")).to_contain_text("‹U+202E›")
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    assert dialogs == []
    assert sponsor.person.complaints == []


async def test_a_person_says_no_more_than_an_address_holds(
    sponsor: Visitor, organisation: Organisation
) -> None:
    page = await sponsor.sign_in("/agents")
    hardly_compressed = "".join(
        chr(random.Random(number).randrange(0x4E00, 0x9FFF)) for number in range(1000)
    )
    for reason, status in (
        ("<b>\x00\u202e" * 201, 400), ("x" * 1001, 400), ("x" * 70_000, 413), ("é" * 1000, 303),
        (hardly_compressed, 303),
    ):  # fmt: skip
        answer = await page.request.post(
            sponsor.url("/sign/suspend"), form={"id": organisation.realm.agent, "reason": reason},
            headers={"Origin": sponsor.site.session}, max_redirects=0,
        )  # fmt: skip
        assert answer.status == status, reason[:9]
        assert len(answer.headers.get("location", "")) < 8 * 1024


# --- cookies and consoles in other hands ------------------------------------------------------------------------------


def token(service: ServiceRole, statement: str, by: SigningKey, console_id: str, trust_domain: str) -> str:
    now = int(time.time())
    claims = ConsoleToken(
        iss=console_id, aud=api_audience(trust_domain, service), iat=now, exp=now + 60, jti=str(uuid.uuid4()),
        session=statement,
    )  # fmt: skip
    return f"Bearer {sign(claims, by)}"


def paths_of(service: ServiceRole, ids: dict[str, str]) -> list[str]:
    """The routes that a console may read, about these things."""
    by_prefix = {
        "/v1/agents": "agent", "/v1/tasks": "task", "/v1/leases": "lease", "/v1/approvals": "request",
        "/v1/decisions": "request", "/v1/trace": "lease", "/v1/targets": "target", "/v1/users": "user",
        "/v1/grants": "grant", "/v1/action-approvals": "action", "/v1/runs": "run",
    }  # fmt: skip
    found = []
    for route in CONSOLE_ROUTES[service]:
        what = next((what for prefix, what in by_prefix.items() if route.startswith(prefix)), "")
        found.append(re.sub(r"\{\w+\}", ids.get(what, "nothing"), route))
    return found


async def test_a_stolen_cookie_reads_nothing_without_the_consoles_key(
    sponsor: Visitor, organisation: Organisation
) -> None:
    realm = organisation.realm
    statement = (await cookie_of(await sponsor.sign_in("/agents"))).partition(".")[2]
    console_id = SigningKey.load(realm.stack.trust.service_key("console")).id
    thieves = [SigningKey.generate(console_id), SigningKey.load(realm.stack.trust.service_key("gateway"))]
    async with httpx.AsyncClient(timeout=30) as http:
        for service in CONSOLE_ROUTES:
            for path in paths_of(service, {"agent": realm.agent}):
                bearers = [f"Bearer {statement}"]
                bearers += [
                    token(service, statement, thief, id, realm.settings.trust_domain)
                    for thief in thieves
                    for id in (console_id, thief.id)
                ]
                for bearer in bearers:
                    answer = await http.get(
                        realm.stack.url(service) + path, headers={"Authorization": bearer}
                    )
                    assert answer.status_code == 401, path


async def test_a_console_taken_over_reads_what_its_people_may_and_no_more(
    theirs: Theirs, organisation: Organisation, sponsor: Visitor
) -> None:
    """The attacker has the console's key and the session of A, who may see nothing of B's."""
    realm = organisation.realm
    key = SigningKey.load(realm.stack.trust.service_key("console"))
    domain, statement = realm.settings.trust_domain, theirs.cookie.partition(".")[2]
    ids = {**theirs.ids, "user": sponsor.user_id}
    async with httpx.AsyncClient(timeout=30) as http:

        async def ask_it(service: ServiceRole, path: str, method: str = "GET") -> httpx.Response:
            headers = {"Authorization": token(service, statement, key, key.id, domain)}
            return await http.request(method, realm.stack.url(service) + path, headers=headers)

        for service in CONSOLE_ROUTES:
            for path in paths_of(service, ids):
                answer = await ask_it(service, path)
                about = any(id in path for id in ids.values())
                assert answer.status_code in ((404,) if about else (200, 400, 404)), path
                assert [text for text in theirs.texts if text in answer.text and text not in path] == []
            for method in ("POST", "PUT", "DELETE"):
                assert (await ask_it(service, paths_of(service, ids)[0], method)).status_code in (403, 405)
        for service, path in (
            ("policy", "/access/v1/evaluation"), ("policy", "/v1/reach"), ("audit", "/v1/export"),
            ("audit", "/v1/checkpoints"), ("revoker", "/v1/pools"), ("issuer", "/v1/leases"),
        ):  # fmt: skip
            assert (await ask_it(service, path)).status_code in (401, 403, 404, 405), path


async def test_a_console_taken_over_approves_nothing(sponsor: Visitor, organisation: Organisation) -> None:
    """Neither its own signature nor a statement that somebody signed there is an approval."""
    realm = organisation.realm
    key = SigningKey.load(realm.stack.trust.service_key("console"))
    page = await sponsor.sign_in("/approvals")
    statement = (await cookie_of(page)).partition(".")[2]
    async with (
        asking(organisation),
        realm.as_agent() as agent,
        realm.publisher() as publisher,
        realm.seen(DEAD_LETTER) as seen,
    ):
        card = page.locator("article")
        await expect(card).to_have_count(1)
        request_id = await card.locator("input[name=id]").first.input_value()
        (view,) = [one for one in await pending_of(realm, organisation) if one["request_id"] == request_id]
        records = load_records(await agent.connection.directory(), realm.agent, realm.task, realm.target)
        now = int(time.time())
        person_id = parse(statement).unverified_claims(SessionStatement).iss
        for iss in (key.id, person_id):
            approval = Approval(
                iss=iss, aud=realm.settings.trust_domain, iat=now, exp=now + 300, jti=str(uuid.uuid4()),
                verdict="approved", request=view["request"], request_id=request_id,
                request_digest=digest(view["request"]), ttl_s=view["ttl_s"], delivery=view["delivery"],
                revisions=records.revisions(view["revisions"]["policy"]),
            )  # fmt: skip
            await publisher.publish_signed(APPROVAL_RESPONSE, realm.agent, approval, key)
        acknowledged = await publisher.send(
            APPROVAL_RESPONSE, Approval.typ, Outbound(realm.agent, statement, id=str(uuid.uuid4()))
        )
        await acknowledged

        def refused() -> list[str]:
            letters = [DeadLetter.model_validate_json(one.value or b"{}") for one in seen.of(DEAD_LETTER)]
            return [one.code for one in letters if one.service == "policy"]

        # It is the signatures that are refused: nothing else is wrong with them. Policy takes all three at once.
        await seen.until(lambda: len(refused()) >= 3, "policy refuses all three")
        assert sorted(refused()) == ["key_unknown", "key_unknown", "typ_unexpected"]
        await sponsor.asks("Deny")
        await page.get_by_role("button", name="Deny", exact=True).click()
        await expect(page.locator("#none")).to_be_visible()
    decision = await decision_of(realm, request_id)
    assert decision["outcome"] == "denied"


async def pending_of(realm: Any, organisation: Organisation) -> list[dict[str, Any]]:
    async with ReadApi(organisation.operator(), realm.settings) as api:
        listed: list[dict[str, Any]] = (await api.get("policy", "approvals"))["approvals"]
        return listed


async def decision_of(realm: Any, request_id: str) -> dict[str, Any]:
    async with ReadApi(realm.stack.trust.user_key(realm.stack.options.operator), realm.settings) as api:
        found: dict[str, Any] = await api.get("policy", "decisions", request_id)
        return found
