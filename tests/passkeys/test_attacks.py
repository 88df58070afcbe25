"""What the sign page refuses, whoever composed the question: nothing of it is shown, and nothing is signed.

An attacker may write to every topic, compose questions, open links in a person's browser, and hold the keys of agents.
They do not hold the sign page. Where a test gives them the key of a service too, it says so.
"""

from __future__ import annotations

import base64
import json
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from playwright.async_api import Page, Route, expect

from ringfence.client.admin.trust_setup import load_root_and_bundle
from ringfence.kernel.base.ids import digest, message_id
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey, b64decode, b64encode
from ringfence.kernel.crypto.webauthn import WEBAUTHN_ALG, challenge_of
from ringfence.kernel.kafka.record import Outbound
from ringfence.messages.approval import Approval, ApprovalRequest
from ringfence.messages.base import Claims, typ_header
from ringfence.messages.credential import CredentialRequest
from ringfence.messages.registry import AgentRecord, TaskRecord
from ringfence.messages.topics import APPROVAL_RESPONSE, DEAD_LETTER
from ringfence.messages.trust import Origin
from tests.passkeys.browser import Person
from tests.passkeys.organisation import Organisation
from tests.passkeys.questions import Asked, Question, altered, broken, claims_of, open_question, signed_by
from tests.support.sign_page import Site


async def refused(page: Page, reason: str) -> None:
    """Nothing can be signed there, nothing of the question is shown, and it is said why."""
    await expect(page.get_by_role("alert")).to_contain_text(re.compile(re.escape(reason), re.IGNORECASE))
    await expect(page.get_by_role("heading", level=1)).to_have_text("This cannot be signed here")
    assert await page.get_by_role("button").count() == 0
    assert await page.locator("dl").count() == 0


async def test_the_question_is_in_order(asked: Asked, person: Person) -> None:
    page = await person.open(asked.link(asked.question()))
    await expect(page.get_by_role("button", name="Approve")).to_be_visible()
    assert "#" not in page.url
    assert person.complaints == []


# --- evidence that does not verify ------------------------------------------------------------------------------------

Change = Callable[[Asked, Question], None]


def record(question: Question, kind: str) -> tuple[int, str]:
    """Where the record of an agent, task, ... stands, and the record."""
    return next(
        (at, jws)
        for at, jws in enumerate(question["evidence"]["records"])
        if f"/{kind}/" in claims_of(jws)["sub"]
    )


def change_record(kind: str, change: Callable[[Asked, str], str]) -> Change:
    def apply(asked: Asked, question: Question) -> None:
        at, jws = record(question, kind)
        question["evidence"]["records"][at] = change(asked, jws)

    return apply


def by_policy(asked: Asked, jws: str) -> str:
    """The task's record with another purpose, signed by policy, which was taken over."""
    claims = claims_of(jws)
    claims["iss"] = claims["iss"].replace("registry", "policy")
    claims["state"]["purpose"] = "a harmless purpose"
    return signed_by(asked.service_key("policy"), TaskRecord, claims)


def by_stranger(asked: Asked, jws: str) -> str:
    claims = claims_of(jws)
    return signed_by(SigningKey.generate(claims["iss"]), AgentRecord, claims)


def other_revision(asked: Asked, jws: str) -> str:
    """Another state of the task, by a registry that was taken over: not the one that is signed."""
    claims = claims_of(jws)
    claims["revision"] += 1
    return signed_by(asked.service_key("registry"), TaskRecord, claims)


def twice(asked: Asked, question: Question) -> None:
    question["evidence"]["records"].append(record(question, "task")[1])


def without(kind: str) -> Change:
    def apply(asked: Asked, question: Question) -> None:
        del question["evidence"]["records"][record(question, kind)[0]]

    return apply


def wider_request(asked: Asked, question: Question) -> None:
    """The agent's request with another scope, and policy's question about that, but not their signatures."""
    wider = altered(question["message"]["claims"]["request"], ttl_s=86_400)
    question["message"]["claims"]["request"] = wider
    question["evidence"]["question"] = altered(question["evidence"]["question"], request=wider)


def forged_request(asked: Asked, question: Question) -> None:
    """Policy was taken over, and asks about what no agent asked for."""
    claims = claims_of(question["message"]["claims"]["request"])
    forged = signed_by(SigningKey.generate(claims["iss"]), CredentialRequest, claims)
    ask_about(asked, question, forged)


def ask_about(asked: Asked, question: Question, request: str) -> None:
    said = claims_of(question["evidence"]["question"])
    question["evidence"]["question"] = signed_by(
        asked.service_key("policy"), ApprovalRequest, {**said, "request": request}
    )
    question["message"]["claims"]["request"] = request


def two_readings(asked: Asked, question: Question) -> None:
    """An agent signs what one reader takes for another reason than the next, and policy was taken over."""
    claims = claims_of(question["message"]["claims"]["request"])
    text = json.dumps(claims)[:-1] + ',"reason":"to look"}'
    agent = asked.organisation.realm.key("agent", asked.organisation.realm.agent)
    ask_about(asked, question, signed_by(agent, CredentialRequest, text))


def question_of_issuer(asked: Asked, question: Question) -> None:
    said = claims_of(question["evidence"]["question"])
    said["iss"] = said["iss"].replace("policy", "issuer")
    question["evidence"]["question"] = signed_by(asked.service_key("issuer"), ApprovalRequest, said)


def say(**claims: Any) -> Change:
    def apply(asked: Asked, question: Question) -> None:
        question["message"]["claims"].update(claims)

    return apply


def evidence(**changed: Any) -> Change:
    def apply(asked: Asked, question: Question) -> None:
        question["evidence"].update(changed)

    return apply


def ask_for(typ: str) -> Change:
    def apply(asked: Asked, question: Question) -> None:
        question["message"]["typ"] = typ

    return apply


def as_user(user_id: str) -> Change:
    def apply(asked: Asked, question: Question) -> None:
        question["user"] = user_id or asked.organisation.realm.stack.options.operator

    return apply


def of_maria(asked: Asked, question: Question) -> None:
    question["user"] = asked.organisation.realm.name("maria")


def break_question(asked: Asked, question: Question) -> None:
    question["evidence"]["question"] = broken(question["evidence"]["question"])


def break_trust(asked: Asked, question: Question) -> None:
    question["evidence"]["trust"] = broken(question["evidence"]["trust"])


def other_root(asked: Asked, question: Question) -> None:
    """A whole installation of the attacker's own, of the same name."""
    root, bundle = load_root_and_bundle(asked.organisation.realm.stack.trust)
    question["evidence"]["trust"] = sign(bundle, SigningKey.generate(root.id), header_jwk=True)


def bundle_with(**changed: Any) -> Change:
    def apply(asked: Asked, question: Question) -> None:
        root, bundle = load_root_and_bundle(asked.organisation.realm.stack.trust)
        question["evidence"]["trust"] = sign(bundle.model_copy(update=changed), root, header_jwk=True)

    return apply


def to(url: str) -> Change:
    def apply(asked: Asked, question: Question) -> None:
        question["return_to"] = url

    return apply


ELSEWHERE = "neither this machine nor a console"
LATER = int(time.time()) + 86_400
WRONG: dict[str, tuple[Change, str]] = {
    "a record with a broken signature": (
        change_record("task", lambda _, jws: broken(jws)), "signature does not verify",
    ),
    "a record with another state": (
        change_record("agent", lambda _, jws: altered(jws, revision=7)), "signature does not verify",
    ),
    "a record of policy's": (change_record("task", by_policy), "signed by no registry"),
    "a record by a stranger's key": (change_record("agent", by_stranger), "signed by no registry"),
    "a record of another revision": (change_record("task", other_revision), "another one is signed"),
    "a record that comes twice": (twice, "comes twice"),
    "no record of the agent": (without("agent"), "record of agent"),
    "no record of the target": (without("target"), "record of target"),
    "a request that was altered": (wider_request, "signature does not verify"),
    "a request that no agent signed": (forged_request, "signed by no valid key of agent"),
    "a request with two readings": (two_readings, "comes twice"),
    "policy's question broken": (break_question, "signature does not verify"),
    "policy's question by the issuer": (question_of_issuer, "signed by no policy"),
    "no question of policy's": (evidence(question=None), "is no JWS"),
    "the trust bundle broken": (break_trust, "signature does not verify"),
    "a trust bundle of another root": (other_root, "this page is for"),
    "a trust bundle that has expired": (bundle_with(exp=int(time.time()) - 1), "expired"),
    "a trust bundle without this page": (bundle_with(origins=()), "does not name"),
    "a trust bundle with another rpId": (bundle_with(rp_id="example.com"), "does not name"),
    "no trust bundle": (evidence(trust="x"), "is no JWS"),
    "another verdict": (say(verdict="perhaps"), "neither yes nor no"),
    "a longer life": (say(ttl_s=3600), "not to the question that policy signed"),
    "another delivery": (say(delivery="gateway"), "not to the question that policy signed"),
    "another digest": (say(request_digest="0" * 64), "not to the question that policy signed"),
    "another request id": (say(request_id=str(uuid.uuid4())), "not to the question that policy signed"),
    "an end that is too late": (say(exp=LATER), "no longer waits"),
    "an end that is over": (say(exp=int(time.time()) - 1), "its time is over"),
    "a member that the page does not know": (say(also="this"), "does not know the member"),
    "a jti": (say(jti="chosen"), "for this page to say"),
    "an issuer": (say(iss="spiffe://acme.example/user/olga"), "for this page to say"),
    "a message that passkeys do not sign": (ask_for("user.set"), "no passkey signs"),
    "a session": (ask_for("session.statement"), "no passkey signs"),
    "somebody without a passkey": (of_maria, "no passkey of this page"),
    "a user whose record did not come": (as_user("nobody"), "record of user nobody"),
    "an answer to a stranger": (to("https://evil.example/"), ELSEWHERE),
    "an answer to what looks like this machine": (to("http://127.0.0.1.evil.example/"), ELSEWHERE),
    "an answer with a password": (to("http://x@127.0.0.1:8080/"), ELSEWHERE),
    "an answer to another port of the page's host": (to("http://localhost:1/"), ELSEWHERE),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
async def test_a_question_that_is_not_in_order_is_refused(asked: Asked, person: Person, what: str) -> None:
    change, reason = WRONG[what]
    question = asked.question()
    change(asked, question)
    await refused(await person.open(asked.link(question)), reason)
    assert person.complaints == []


async def test_a_registry_that_lies_shows_another_purpose_and_no_other_request(
    asked: Asked, person: Person
) -> None:
    """The page believes the registry's signature. A registry that was taken over can have it show another purpose of a
    task; but not a request by a key that the registry made up for the agent: policy did not ask about that.
    """
    registry = asked.service_key("registry")

    def with_state(jws: str, model: type[Claims], **state: Any) -> str:
        claims = claims_of(jws)
        return signed_by(registry, model, claims | {"state": claims["state"] | state})

    question = asked.question()
    at, task = record(question, "task")
    question["evidence"]["records"][at] = with_state(task, TaskRecord, purpose="a harmless purpose")
    page = await person.open(asked.link(question))
    await expect(page.locator("dl").get_by_text("a harmless purpose")).to_be_visible()

    at, agent = record(question, "agent")
    request = claims_of(question["message"]["claims"]["request"])
    made_up = SigningKey.generate(request["iss"])
    keys = [made_up.record(int(time.time()) + 3600).model_dump(exclude_none=True)]
    question["evidence"]["records"][at] = with_state(agent, AgentRecord, keys=keys)
    forged = signed_by(
        made_up, CredentialRequest, request | {"jti": "another", "reason": "a harmless reason"}
    )
    claims = question["message"]["claims"]
    claims |= {
        "request": forged, "request_digest": digest(forged), "request_id": message_id(request["iss"], "another"),
    }  # fmt: skip
    await refused(await person.open(asked.link(question)), "not to the question that policy signed")


async def test_a_member_that_comes_twice_is_refused(asked: Asked, person: Person) -> None:
    text = asked.text[:-1] + ',"user":"olga"}'
    await refused(await person.open(asked.link(text)), "comes twice")


async def test_a_bundle_that_was_replaced_is_refused(asked: Asked, person: Person) -> None:
    root, bundle = load_root_and_bundle(asked.organisation.realm.stack.trust)
    newer = asked.question()
    newer["evidence"]["trust"] = sign(
        bundle.model_copy(update={"version": bundle.version + 5}), root, header_jwk=True
    )
    page = await person.open(asked.link(newer))
    await expect(page.get_by_role("button", name="Approve")).to_be_visible()
    await refused(await person.open(asked.link(asked.question())), "has seen version")


def question_about_agent(asked: Asked, typ: str, agent: str, **claims: Any) -> Question:
    """A question to sign a command about the agent, with this record of it."""
    question = asked.question()
    id = claims_of(agent)["state"]["agent_id"]
    question["message"] = {"typ": typ, "claims": {"agent_id": id, **claims, "exp": int(time.time()) + 600}}
    question["evidence"] = {
        "trust": question["evidence"]["trust"],
        "records": [record(question, "user")[1], agent],
    }
    return question


async def test_outdated_record_is_refused_for_what_gives_and_warned_of_for_what_takes(
    asked: Asked, person: Person
) -> None:
    """Anybody may keep a record that the registry signed, and show it later as what the agent may hold now."""
    _, wide = record(asked.question(), "agent")
    claims = claims_of(wide)
    narrow = signed_by(
        asked.service_key("registry"), AgentRecord,
        claims | {"revision": claims["revision"] + 1, "state": claims["state"] | {"ceiling": []}},
    )  # fmt: skip
    ceiling = {"ceiling": claims["state"]["ceiling"]}
    page = await person.open(asked.link(question_about_agent(asked, "agent.set-ceiling", wide, **ceiling)))
    await expect(page.get_by_text(f"May hold, by revision {claims['revision']}")).to_be_visible()
    await expect(page.locator("dl")).to_contain_text(f": revision {claims['revision']}, signed ")
    page = await person.open(asked.link(question_about_agent(asked, "agent.set-ceiling", narrow, **ceiling)))
    await expect(page.get_by_role("button", name="Replace the ceiling")).to_be_visible()
    seen = f"has seen revision {claims['revision'] + 1}"
    await refused(
        await person.open(asked.link(question_about_agent(asked, "agent.set-ceiling", wide, **ceiling))), seen
    )
    await refused(
        await person.open(asked.link(question_about_agent(asked, "agent.resume", wide, reason="x"))), seen
    )
    page = await person.open(asked.link(question_about_agent(asked, "agent.suspend", wide, reason="x")))
    await expect(page.get_by_role("note")).to_contain_text(seen)
    await expect(page.get_by_role("button", name="Suspend")).to_be_visible()


async def test_a_console_takes_answers_only_while_the_root_names_it(
    asked: Asked, site: Site, person: Person
) -> None:
    question = asked.question()
    question["return_to"] = f"{site.session}/answers/1"
    page = await person.open(asked.link(question))
    await expect(page.get_by_role("button", name="Approve")).to_be_visible()
    only_page = (Origin(origin=site.sign, use="sign", not_before=0),)
    bundle_with(origins=only_page)(asked, question)
    await refused(await person.open(asked.link(question)), "neither this machine nor a console")


async def test_the_page_works_on_no_other_origin(asked: Asked, site: Site, person: Person) -> None:
    """The same files, on an origin of the attacker's: the server does not answer there, and the page would not work."""
    question = asked.link(asked.question()).partition("#")[2]

    async def copy(route: Route) -> None:
        path = route.request.url.partition("9/")[2].partition("#")[0]
        answer = await route.fetch(url=f"{site.sign}/{path}")
        await route.fulfill(response=answer)

    await person.page.route("http://localhost:9/**", copy)
    await refused(await person.open(f"http://localhost:9/#{question}"), "this page is for")


async def test_a_module_that_was_changed_does_not_run(asked: Asked, site: Site, person: Person) -> None:
    """Somebody changed a file, and not the page that names its digest."""

    async def change(route: Route) -> None:
        answer = await route.fetch()
        await route.fulfill(response=answer, body=await answer.text() + "\n// harmless?\n")

    await person.page.route("**/messages.js", change)
    page = await person.open(asked.link(asked.question()))
    await expect(page.get_by_role("heading", level=1)).to_have_text("One moment")
    assert any("integrity" in line for line in person.complaints), person.complaints


async def test_the_page_cannot_be_framed(asked: Asked, site: Site, person: Person) -> None:
    frame = f'<iframe src="{site.sign}/"></iframe>'
    await person.page.route(
        "http://localhost:9/**", lambda route: route.fulfill(body=frame, content_type="text/html")
    )
    await person.page.goto("http://localhost:9/")
    await person.page.wait_for_load_state("networkidle")
    (inside,) = person.page.frames[1:]
    assert inside.url.startswith("chrome-error:")


async def test_a_server_that_sends_no_header_does_not_help_a_frame(
    asked: Asked, site: Site, person: Person
) -> None:
    async def without_header(route: Route) -> None:
        answer = await route.fetch()
        kept = {
            name: value
            for name, value in answer.headers.items()
            if name not in ("content-security-policy", "x-frame-options", "cross-origin-resource-policy")
        }
        await route.fulfill(response=answer, headers=kept)

    frame = f'<iframe src="{asked.link(asked.question())}"></iframe>'
    await person.page.route(f"{site.sign}/**", without_header)
    await person.page.route(
        "http://localhost:9/**", lambda route: route.fulfill(body=frame, content_type="text/html")
    )
    await person.page.goto("http://localhost:9/")
    inside = person.page.frame_locator("iframe")
    await expect(inside.get_by_role("alert")).to_contain_text("does not work inside of another one")
    assert await inside.get_by_role("button").count() == 0


# --- the session origin -----------------------------------------------------------------------------------------------

TOUCH = """async ([challenge, id]) => {
  const bytes = (text) => Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
  const made = await navigator.credentials.get({publicKey: {
    challenge: bytes(challenge), rpId: "localhost", userVerification: "required",
    allowCredentials: [{type: "public-key", id: bytes(id)}],
  }});
  const text = (buffer) => btoa(String.fromCharCode(...new Uint8Array(buffer)));
  const {authenticatorData, clientDataJSON, signature} = made.response;
  return [authenticatorData, clientDataJSON, signature].map(text);
}"""


async def test_signature_of_the_session_origin_approves_nothing(
    organisation: Organisation, site: Site, person: Person
) -> None:
    """The console was taken over: it has real touches of a sponsor, and write access to every topic."""
    realm = organisation.realm
    user_id = await organisation.sponsor(person)
    async with open_question(organisation, site.sign, user_id) as asked:
        question = asked.question()
        user = next(
            claims_of(jws)["state"]
            for jws in question["evidence"]["records"]
            if f"user/{user_id}" in claims_of(jws)["sub"]
        )
        (key,) = user["keys"]
        claims = {
            "iss": f"spiffe://{realm.settings.trust_domain}/user/{user_id}", "aud": realm.settings.trust_domain,
            "iat": int(time.time()), "jti": uuid.uuid4().hex, **question["message"]["claims"],
        }  # fmt: skip
        header = {"alg": WEBAUTHN_ALG, "kid": key["kid"], "typ": typ_header(Approval)}
        signing_input = ".".join(b64encode(json.dumps(part).encode()) for part in (header, claims))
        await person.page.route(
            f"{site.session}/**",
            lambda route: route.fulfill(body="<p>a console</p>", content_type="text/html"),
        )
        await person.page.goto(f"{site.session}/")
        challenge = base64.b64encode(challenge_of(signing_input.encode())).decode()
        parts = await person.page.evaluate(
            TOUCH, [challenge, base64.b64encode(b64decode(key["credential_id"])).decode()]
        )
        third = dict(
            zip(("ad", "cd", "sig"), (b64encode(base64.b64decode(part)) for part in parts), strict=True)
        )
        compact = f"{signing_input}.{b64encode(json.dumps(third, separators=(',', ':')).encode())}"
        async with realm.seen(DEAD_LETTER) as seen, realm.publisher() as publisher:
            delivery = await publisher.send(
                APPROVAL_RESPONSE, Approval.typ, Outbound(realm.agent, compact, id=str(claims["jti"]))
            )
            at = await delivery

            def rejected() -> list[dict[str, Any]]:
                letters = [json.loads(one.value) for one in seen.of(DEAD_LETTER)]
                return [
                    one
                    for one in letters
                    if one["source"]["offset"] == at.offset and one["source"]["topic"] == at.topic
                ]

            letters = await seen.until(rejected, "policy's refusal")
            assert any("no sign origin" in one["reason"] for one in letters), letters
