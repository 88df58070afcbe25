"""People are told by webhook, on a real HTTP server; what comes back decides nothing, what hangs holds up nothing."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ringfence.kernel.base import metrics
from ringfence.kernel.crypto.jws import sign
from ringfence.messages.base import ServiceRole
from ringfence.messages.lease import RevocationRequest, Selector
from ringfence.messages.registry import (
    AgentResume,
    AgentSuspend,
    AgentTransfer,
    AgentTransferConsent,
    TaskAssign,
    TaskConsent,
    TaskTerms,
)
from ringfence.messages.topics import APPROVAL_RESPONSE, CREDENTIAL_REQUEST, REVOCATION_REQUEST
from ringfence.policy.settings import PolicySettings
from tests.flows.test_proposals import Office
from tests.support.benches.policy_bench import DEPLOY, READ, PolicyBench, rewind
from tests.support.passkeys import SoftwarePasskey, add_passkey
from tests.support.user_keys import give_key
from tests.support.world import World, scope

KEY = b"0123456789abcdef0123456789abcdef"
PATH = "/services/T0SECRET/B0SECRET/verysecret"


@dataclass
class Receiver:
    """What a sponsor's chat would be."""

    url: str
    answers: list[int] = field(default_factory=list)
    """The statuses to come; 200 after them."""
    got: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    first_key: dict[str, bytes] = field(default_factory=dict)
    """The notice of their first key, by its id: it is not among `got`, and is answered with 200."""
    released: threading.Event = field(default_factory=threading.Event)
    hangs: bool = False

    def ids(self) -> list[str]:
        return [headers["webhook-id"] for _, headers, _ in self.got]


@contextmanager
def receiving() -> Iterator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            id, status = self.headers["webhook-id"], 200
            if b"A key was added to you" in body and receiver.first_key.keys() <= {id}:
                receiver.first_key[id] = body
            else:
                receiver.got.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                if receiver.hangs:
                    receiver.released.wait(60)
                status = receiver.answers.pop(0) if receiver.answers else 200
            answer = json.dumps({"verdict": "approved", "text": "approved"}).encode()
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("location", f"{receiver.url}/elsewhere")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver = Receiver(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        receiver.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(name="receiver")
def receiver_of_sam() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


def settings(folder: Path, **webhooks: Receiver) -> dict[ServiceRole, Any]:
    """Policy that tells these people."""
    places = {}
    for name, one in webhooks.items():
        file = folder / f"{name}.webhook"
        file.write_text(f"{one.url}{PATH}\nwhsec_{base64.b64encode(KEY).decode()}\n")
        file.chmod(0o600)
        places[name] = f"file:{file}"
    return {"policy": PolicySettings(webhooks=places)}


@asynccontextmanager
async def office(world: World, own: dict[ServiceRole, Any]) -> AsyncIterator[PolicyBench]:
    async with world.running("registry", "policy", own=own):
        # The first try comes again soon.
        notices(world)._first_delay_s = 0.01
        yield await PolicyBench.open(world)


def notices(world: World) -> Any:
    """The notices of the policy that runs."""
    (close,) = [one for one in world.runtimes["policy"]._closing if "Notices" in one.__qualname__]
    return close.__self__  # type: ignore[attr-defined]


async def told(world: World, receiver: Receiver, count: int) -> None:
    await world.until(lambda: True if len(receiver.got) >= count else None, f"{count} notices")


async def settled(world: World) -> None:
    await world.until(lambda: None if notices(world)._under_way else True, "all notices")


def verified(headers: dict[str, str], body: bytes) -> bool:
    """As Standard Webhooks has it."""
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
    recent = abs(time.time() - int(headers["webhook-timestamp"])) < 300
    return recent and headers["webhook-signature"] == f"v1,{expected}"


async def test_a_sponsor_is_told_and_nothing_that_comes_back_decides(
    world: World, receiver: Receiver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    receiver.answers = [500, 307, 200]
    async with office(world, settings(tmp_path, sam=receiver)) as desk:
        asked = await desk.ask(DEPLOY, reason="build 421")
        await told(world, receiver, 3)
        await settled(world)
        assert [path for path, _, _ in receiver.got] == [PATH] * 3  # the redirect was not followed
        assert len(set(receiver.ids())) == 1
        assert all(verified(headers, body) for _, headers, body in receiver.got)
        text = json.loads(receiver.got[0][2])["text"]
        for part in ("deploy-bot", "platform:deploy:env/staging/web", "maria", "build 421", asked.id):
            assert part in text
        # The answers said "approved"; it waits all the same, until somebody signs.
        assert await desk.outcomes(asked) == {"approval_required": 1}
        await desk.approve(await desk.question(asked, desk.sam), desk.sam)
        assert (await desk.final(asked)).outcome == "allowed"
    assert "verysecret" not in caplog.text
    assert base64.b64encode(KEY).decode() not in caplog.text


async def test_similar_requests_are_notified_once_while_pending(
    world: World, receiver: Receiver, tmp_path: Path
) -> None:
    async with office(world, settings(tmp_path, sam=receiver)) as desk:
        asked = [await desk.ask(DEPLOY, reason=f"build {n}") for n in range(3)]
        for one in asked:
            await desk.question(one, desk.sam)
        await told(world, receiver, 1)
        await desk.question(await desk.ask(scope("platform", ["deploy"], ["env/test/web"])), desk.sam)
        await told(world, receiver, 2)  # another thing
        await settled(world)
        assert len(receiver.got) == 2
        for one in asked:
            await desk.approve(await desk.question(one, desk.sam), desk.sam)
            await desk.final(one)
        await desk.ask(DEPLOY)
        await told(world, receiver, 3)  # the others do not wait any more
        assert len(set(receiver.ids())) == 3


async def test_a_webhook_that_hangs_holds_up_neither_decisions_nor_others(
    world: World, receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "ringfence.policy.notifications.notices._TIMEOUT_S", 600.0
    )  # it hangs for as long as this takes
    with receiving() as other:
        receiver.hangs = True
        async with office(world, settings(tmp_path, sam=receiver, petra=other)) as desk:
            waiting = [await desk.ask(scope("platform", ["deploy"], [f"env/{n}"])) for n in range(12)]
            for one in waiting:
                assert (await desk.decision(one)).outcome == "approval_required"
            assert (await desk.final(await desk.ask(READ))).outcome == "allowed"
            await desk.ask(scope("platform", ["drop"], ["env/staging/web"]))  # wants a second person: petra
            await told(world, other, 1)
            assert len(receiver.got) == 1
            receiver.hangs = False
            receiver.released.set()
            await told(world, receiver, 12)


async def test_notice_stops_after_the_answer_and_after_http_410(
    world: World, receiver: Receiver, tmp_path: Path
) -> None:
    with receiving() as other:
        other.answers = [410]
        receiver.answers = [503] * 50
        async with office(world, settings(tmp_path, sam=receiver, petra=other)) as desk:
            notices(world)._first_delay_s = 0.2  # all tries together take minutes
            asked = await desk.ask(DEPLOY)
            await told(world, receiver, 2)
            await desk.approve(await desk.question(asked, desk.sam), desk.sam)
            await desk.final(asked)
            await desk.ask(scope("platform", ["drop"], ["env/staging/web"]))
            await told(world, other, 1)
            await settled(world)
            assert len(receiver.got) < 10
            assert len(other.got) == 1


async def test_a_redelivery_tells_nobody_twice_or_under_the_same_id(
    world: World, receiver: Receiver, tmp_path: Path
) -> None:
    own = settings(tmp_path, sam=receiver)
    async with world.running("registry"):
        async with world.running("policy", own=own):
            desk = await PolicyBench.open(world)
            await desk.question(await desk.ask(DEPLOY), desk.sam)
            await told(world, receiver, 1)
        await rewind(world, "policy", CREDENTIAL_REQUEST, APPROVAL_RESPONSE)
        async with world.running("policy", own=own):
            await told(world, receiver, 2)  # whether it arrived, a process that died could not know
        assert len(set(receiver.ids())) == 1


async def test_a_flood_is_cut_off(world: World, receiver: Receiver, tmp_path: Path) -> None:
    receiver.hangs = True
    own = settings(tmp_path, sam=receiver)
    own["policy"] = own["policy"].model_copy(update={"agent_pending_approvals": 0})
    async with office(world, own) as desk:
        dropped = metrics.NOTICES.labels("dropped")._value
        before = dropped.get()
        for n in range(110):
            await desk.ask(scope("platform", ["deploy"], [f"env/{n}"]))
        await world.until(lambda: True if dropped.get() == before + 10 else None, "ten that are dropped")
        assert len(notices(world)._under_way) == 100
        receiver.released.set()


async def test_a_webhook_that_cannot_be_used_is_said_and_stops_nothing(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "sam.webhook"
    file.write_text(f"http://hooks.slack.com{PATH} whsec_{base64.b64encode(KEY).decode()}")
    file.chmod(0o600)
    own: dict[ServiceRole, Any] = {
        "policy": PolicySettings(webhooks={"sam": f"file:{file}", "petra": "env:NOT_SET"})
    }
    async with office(world, own) as desk:
        asked = await desk.ask(DEPLOY)
        await desk.question(asked, desk.sam)
        await settled(world)
    assert "sam is not told of what waits: the URL of a webhook is https://" in caplog.text
    assert "petra is not told of what waits: NOT_SET is not set" in caplog.text
    assert "verysecret" not in caplog.text


async def test_a_person_is_told_of_a_key_that_was_added_to_them(
    world: World, receiver: Receiver, tmp_path: Path
) -> None:
    async with office(world, settings(tmp_path, sam=receiver)) as bench:
        lent = await give_key(world, world.operator, bench.sam)
        await told(world, receiver, 1)
        ((_, headers, body),) = receiver.got
        assert verified(headers, body)
        text = json.loads(body)["text"]
        for part in (
            lent.key.kid,
            f"`{world.operator.name}`",
            "user end-key sam",
            "It counts for approvals from",
        ):
            assert part in text
        # Each key once, and none of another change of the user.
        keys = (bench.sam.key_record(), lent.key_record())
        await world.accepted(
            world.user_set(world.operator, bench.sam, ("sponsor",), keys=keys), world.operator
        )
        second = await give_key(world, bench.sam, bench.sam)
        await told(world, receiver, 2)
        assert second.key.kid in json.loads(receiver.got[1][2])["text"]
        await settled(world)
        assert len(receiver.got) == 2
        (first,) = receiver.first_key.values()
        assert bench.sam.key.kid in json.loads(first)["text"]


async def test_a_person_has_a_receipt_of_what_their_passkey_signed(
    world: World, receiver: Receiver, tmp_path: Path
) -> None:
    async with office(world, settings(tmp_path, sam=receiver)) as bench:
        sam = await add_passkey(world, bench.sam)
        assert isinstance(sam.key, SoftwarePasskey)
        await told(world, receiver, 1)  # of the key
        suspension = world.claims(AgentSuspend, sam, agent_id=bench.bot.name, reason="*it* is <odd>")
        revocation = world.claims(
            RevocationRequest,
            sam,
            kind="revocation",
            selector=Selector(agent_id=bench.bot.name),
            reason="all",
        )
        await world.accepted(suspension, sam)
        compact = sign(revocation, sam.key)
        await world.send(REVOCATION_REQUEST, bench.bot.name, compact)
        await told(world, receiver, 3)
        texts = [json.loads(body)["text"] for _, _, body in receiver.got[1:]]
        (of_command,) = [text for text in texts if "`agent.suspend`" in text]
        (of_revocation,) = [text for text in texts if "`revocation.request`" in text]
        assert all(sam.key.kid[:8] in text and f"end-key sam {sam.key.kid}" in text for text in texts)
        assert f"agent_id: `{bench.bot.name}`" in of_command
        assert "reason: `*it* is &lt;odd&gt;`" in of_command
        assert bench.bot.name in of_revocation
        # None of what a key file signs, of what the passkey did not sign, or of what came before.
        await world.send(REVOCATION_REQUEST, bench.bot.name, compact)
        other = sign(revocation.model_copy(update={"jti": "another"}), sam.key)
        forged = f"{other.rpartition('.')[0]}.{compact.rpartition('.')[2]}"
        await world.send(REVOCATION_REQUEST, bench.bot.name, forged)
        await world.accepted(
            world.claims(AgentResume, bench.sam, agent_id=bench.bot.name, reason="x"), bench.sam
        )
        again = world.claims(AgentSuspend, sam, agent_id=bench.bot.name, reason="the last")
        await world.accepted(again, sam)
        await told(world, receiver, 4)
        await settled(world)
        assert len(receiver.got) == 4
        assert "`the last`" in json.loads(receiver.got[3][2])["text"]


async def test_embedded_message_of_a_passkey_has_a_receipt_for_its_signer(
    world: World, receiver: Receiver, tmp_path: Path
) -> None:
    with receiving() as of_maria:
        async with office(world, settings(tmp_path, sam=receiver, maria=of_maria)) as bench:
            maria = await add_passkey(world, bench.maria)
            await told(world, of_maria, 1)  # of the key
            terms = TaskTerms(
                agent_id=bench.bot.name, purpose="long " * 200, scope=DEPLOY, not_after=int(time.time()) + 600
            )
            consent = world.claims(TaskConsent, maria, terms=terms)

            def assignment(consent: TaskConsent) -> TaskAssign:
                return world.claims(
                    TaskAssign,
                    bench.sam,
                    terms=consent.terms,
                    on_behalf_of="maria",
                    consent=sign(consent, maria.key),
                )

            await world.accepted(assignment(consent), bench.sam)
            await told(world, of_maria, 2)
            text = json.loads(of_maria.got[1][2])["text"]
            for part in (
                "`task.consent`",
                f"terms.agent_id: `{bench.bot.name}`",
                '"deploy"',
                f"end-key maria {maria.key.kid}",
            ):
                assert part in text
            # The same message has one receipt. Another one with the same id has its own, also where it is refused.
            await world.command(assignment(consent), bench.sam)
            other = terms.model_copy(update={"purpose": "something else"})
            await world.command(assignment(consent.model_copy(update={"terms": other})), bench.sam)
            await told(world, of_maria, 3)
            assert "`something else`" in json.loads(of_maria.got[2][2])["text"]
            takeover = world.claims(
                AgentTransferConsent, maria, agent_id=bench.bot.name, from_sponsor="sam", revision=1
            )
            transfer = world.claims(
                AgentTransfer,
                bench.sam,
                agent_id=bench.bot.name,
                sponsor="maria",
                consent=sign(takeover, maria.key),
            )
            await world.send_command(transfer, bench.sam)
            await told(world, of_maria, 4)
            assert "`agent.transfer-consent`" in json.loads(of_maria.got[3][2])["text"]
            await settled(world)
            assert len(of_maria.got) == 4
            assert receiver.got == []  # sam signed with a key file


async def test_people_who_may_second_a_proposal_are_told_of_it(
    world: World, receiver: Receiver, tmp_path: Path
) -> None:
    places = settings(tmp_path, otto=receiver, olga=receiver)
    async with world.running("registry", "policy", own=places):
        staff = Office(world)
        await staff.staff()
        receiver.got.clear()
        command = staff.ceiling(staff.olga)
        event = await staff.propose(command, staff.olga)
        await world.until(
            lambda: [one for one in receiver.got if b"proposal" in one[2]] or None, "the notice to otto"
        )
        bodies = [json.loads(body)["text"] for _, _, body in receiver.got if b"proposal" in body]
        assert len(bodies) == 1
        wanted = (
            "`olga` proposes `agent.set-ceiling`",
            "`agent bot`",
            f"proposal second {str(event.result)[:12]}",
        )
        for part in wanted:
            assert part in bodies[0]
