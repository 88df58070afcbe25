"""Ends of leases, by the real revoker, as receivers of shared signals hear of them: pushed, polled, and held back."""

from __future__ import annotations

import asyncio
import json
import uuid
from pathlib import Path

import pytest

from ringfence.kernel.crypto.jws import sign
from ringfence.messages.operations import SignalStream
from ringfence.messages.topics import LEASE, SERVICE_EVENT, SIGNAL_STREAM
from ringfence.signals.push import MAX_REFUSALS
from tests.gateway.certificates import Certificates
from tests.support.benches.issuer_bench import IssuerBench, another
from tests.support.benches.signal_receivers import (
    POLL,
    PUSH,
    Client,
    Endpoint,
    Office,
    is_verification,
    lease_of,
    until,
)
from tests.support.http_client import plain_client

CAEP = "https://schemas.openid.net/secevent/caep/event-type/session-revoked"


@pytest.fixture
async def desk(company: IssuerBench) -> IssuerBench:
    return await another(company)


@pytest.fixture
def office(company: IssuerBench, tmp_path: Path) -> Office:
    return Office(company.world, tmp_path)


async def ended(desk: IssuerBench, reason: str = "s3cret reason") -> str:
    """The id of a lease that was issued, and revoked by the operator."""
    asked, _ = await desk.issued("read")
    claims, _ = await desk.revoke(desk.world.operator, lease_id=asked.lease_id, reason=reason)
    await desk.verdict(claims)
    await desk.lease(asked.lease_id, "revoked", "expired")
    return asked.lease_id


async def test_a_push_receiver_gets_exactly_the_ends_that_it_may_hear_of(
    desk: IssuerBench, office: Office, tmp_path: Path
) -> None:
    certificates = Certificates(tmp_path)
    (tmp_path / "authorization").write_text("Bearer of the receiver\n")
    (tmp_path / "authorization").chmod(0o600)
    async with Endpoint(certificates.server("127.0.0.1")).running() as near, Endpoint().running() as far:
        office.declare(
            "near",
            targets='["staging"]',
            push=f'"{near.url}"',
            authorization=f'"file:{tmp_path / "authorization"}"',
            ca_file=f'"{certificates.file}"',
        )
        office.declare("far", targets='["elsewhere"]', push=f'"{far.url}"')
        before = await ended(desk)
        async with office.running():
            client, other = office.client("near"), office.client("far")
            await client.create(near.url)
            await other.create(far.url)
            lease_id = await ended(desk)
            again = await ended(desk)
            told = {lease_of(one): one for one in await client.pushed(near, 2)}
            assert told.keys() == {lease_id, again}
            first = told[lease_id]
            assert before not in (lease_id, again)  # what ended before there was a stream is not told
            td = desk.world.td
            assert first["sub_id"] == {
                "format": "complex",
                "session": {"format": "opaque", "id": lease_id},
                "user": {"format": "uri", "uri": desk.maria.id},
                "application": {"format": "uri", "uri": desk.bot.id},
                "tenant": {"format": "opaque", "id": td},
            }
            event = first["events"][CAEP]
            assert event["initiating_entity"] == "admin"
            assert abs(event["event_timestamp"] - first["iat"]) < 60
            assert "s3cret" not in json.dumps(first)
            assert near.asked[0]["authorization"] == "Bearer of the receiver"
            assert near.asked[0]["content-type"] == "application/secevent+jwt"

            # An event of its own comes through what comes to the other, and nothing comes before it.
            await other.call("POST", "/ssf/verify", {"stream_id": other.stream_id, "state": "x"}, 204)
            (only,) = await other.pushed(far, 1)
            assert is_verification(only)
            assert len(near.got) == 2  # the cut, and what follows it, are one event


async def test_a_receiver_that_was_down_misses_nothing_and_delays_nobody(
    desk: IssuerBench, office: Office
) -> None:
    async with Endpoint().running() as up:
        down = Endpoint()
        office.declare("down", push=f'"{down.url}"')
        office.declare("up", push=f'"{up.url}"')
        async with office.running(stuck_s=1):
            lost, heard = office.client("down"), office.client("up")
            await lost.create(down.url)
            await heard.create(up.url)
            ids = [await ended(desk) for _ in range(3)]
            assert sorted(map(lease_of, await heard.pushed(up, 3))) == sorted(ids)

            async def warned() -> bool:
                readiness = (await lost.http.get("/readyz")).json()
                return any("receiver down has taken nothing" in one for one in readiness.get("warnings", ()))

            while not await warned():
                pass
            assert "ringfence_signals_stuck_receivers 1.0" in (await lost.http.get("/metrics")).text
        # It is stopped meanwhile, and started anew: what is outstanding stands on Kafka.
        async with office.running():
            ids.append(await ended(desk))
            async with down.running():
                late = await lost.pushed(down, 4)
                assert sorted(map(lease_of, late)) == sorted(ids)
                assert len({one["jti"] for one in late}) == 4
            told = {one["jti"]: lease_of(one) for one in await heard.pushed(up, 4)}
            assert sorted(told.values()) == sorted(ids)


async def test_polls_give_until_they_are_acknowledged(desk: IssuerBench, office: Office) -> None:
    office.declare("poller", targets='["staging"]')
    async with office.running():
        client = office.client("poller")
        made = await client.create()
        assert made["delivery"] == {
            "method": POLL,
            "endpoint_url": f"{office.url}/ssf/poll/{client.stream_id}",
        }
        ids = [await ended(desk) for _ in range(2)]
        first = await client.polled(1, maxEvents=1)
        assert list(await client.polled(1, maxEvents=1)) == list(first)  # again, as it was not acknowledged
        acked = await client.polled(1, ack=list(first))
        assert sorted(map(lease_of, (*first.values(), *acked.values()))) == sorted(ids)
        assert await client.poll(maxEvents=0, ack=list(acked)) == {"sets": {}}
        assert await client.poll(returnImmediately=True) == {"sets": {}}
        third = await ended(desk)
        assert [lease_of(one) for one in (await client.polled(1)).values()] == [third]
    async with office.running():  # not acknowledged before the stop, and so it is there again
        (jti, told), *others = (await client.polled(1)).items()
        assert (lease_of(told), others) == (third, [])
        assert await client.poll(setErrs={jti: {"err": "invalid_key"}}, returnImmediately=True) == {
            "sets": {}
        }
        found = await desk.world.event_where(lambda e: e.lease_id == third and e.iss.endswith("/signals"))
        assert found.reasons[0].code == "signal_refused"
        assert "invalid_key" in found.reasons[0].message


async def test_a_paused_stream_is_held_and_a_disabled_one_is_not(desk: IssuerBench, office: Office) -> None:
    async with Endpoint().running() as endpoint:
        office.declare("pauser", push=f'"{endpoint.url}"')
        async with office.running():
            client = office.client("pauser")
            await client.create(endpoint.url)
            await client.status("paused")
            held = await ended(desk)
            await client.call("POST", "/ssf/verify", {"stream_id": client.stream_id}, 400)
            assert endpoint.got == []
            await client.status("enabled")
            assert [lease_of(one) for one in await client.pushed(endpoint, 1)] == [held]
            await client.status("disabled")
            await ended(desk)
            await client.status("enabled")
            heard = await ended(desk)
            assert [lease_of(one) for one in await client.pushed(endpoint, 2)] == [held, heard]


async def test_subjects_are_left_out_and_heard_of_again(desk: IssuerBench, office: Office) -> None:
    office.declare("chooser")
    async with office.running():
        client = office.client("chooser")
        await client.create()
        bot = {"format": "complex", "application": {"format": "uri", "uri": desk.bot.id}}
        body = {"stream_id": client.stream_id, "subject": bot}
        await client.call("POST", "/ssf/subjects/remove", body, 204)
        await ended(desk)
        other = await another(desk)
        heard = await ended(other)
        told = await client.polled(1)
        assert [lease_of(one) for one in told.values()] == [heard]
        await client.call("POST", "/ssf/subjects/add", body)
        again = await ended(desk)
        assert [lease_of(one) for one in (await client.polled(1, ack=list(told))).values()] == [again]


async def test_an_event_that_is_refused_again_and_again_is_told_and_passed_over(
    desk: IssuerBench, office: Office
) -> None:
    async with Endpoint().running() as endpoint:
        office.declare("picky", push=f'"{endpoint.url}"')
        async with office.running():
            client = office.client("picky")
            await client.create(endpoint.url)
            endpoint.answer = (400, {}, b'{"err": "invalid_key", "description": "?"}')
            lost = await ended(desk)
            found = await desk.world.event_where(lambda e: e.lease_id == lost and e.iss.endswith("/signals"))
            assert found.reasons[0].code == "signal_refused"
            assert len(endpoint.asked) == MAX_REFUSALS
            # A redirect is followed nowhere, and a wrong token is no matter of the event: both are tried again.
            endpoint.answer = (307, {"Location": endpoint.url + "/elsewhere"}, b"")
            kept = await ended(desk)
            await until(lambda: len(endpoint.asked) > MAX_REFUSALS + 1)
            endpoint.answer = (400, {}, b'{"err": "authentication_failed"}')
            asked = len(endpoint.asked)
            await until(lambda: len(endpoint.asked) > asked + MAX_REFUSALS + 1)
            endpoint.answer = (202, {}, b"")
            assert [lease_of(one) for one in await client.pushed(endpoint, 1)] == [kept]


async def test_streams_are_their_receivers_own(desk: IssuerBench, office: Office) -> None:
    office.declare("one", push='"https://one.example/events"')
    office.declare("two")
    async with office.running():
        one, two = office.client("one"), office.client("two")
        made = await one.create()
        assert await two.call("GET", "/ssf/streams") == []
        assert await one.call("GET", "/ssf/streams") == [made]
        assert await one.call("GET", "/ssf/streams", stream_id=one.stream_id) == made
        theirs = {"stream_id": one.stream_id}
        await two.call("GET", "/ssf/streams", status=404, **theirs)
        await two.call("DELETE", "/ssf/streams", status=404, **theirs)
        await two.call("GET", "/ssf/status", status=404, **theirs)
        await two.call("PATCH", "/ssf/streams", {**theirs, "description": "mine now"}, 404)
        await two.call("POST", "/ssf/status", {**theirs, "status": "disabled"}, 404)
        await two.call("POST", "/ssf/verify", theirs, 404)
        await two.call("POST", f"/ssf/poll/{one.stream_id}", {}, 404)
        subject = {"format": "opaque", "id": "x"}
        await two.call("POST", "/ssf/subjects/remove", {**theirs, "subject": subject}, 404)

        assert (await one.call("POST", "/ssf/streams", {}, 409))["err"] == "invalid_request"
        changed = await one.call("PATCH", "/ssf/streams", {**theirs, "description": "ours"})
        assert changed == {**made, "description": "ours"}
        to_push = {"method": PUSH, "endpoint_url": "https://one.example/events"}
        whole = {**theirs, "delivery": to_push, "events_requested": ["https://example.org/unknown"]}
        replaced = await one.call("PUT", "/ssf/streams", whole)
        assert (replaced["delivery"], replaced["events_delivered"]) == (to_push, [])
        assert "description" not in replaced
        group = f"signals-{one.stream_id}"
        await one.call("PATCH", "/ssf/streams", {**theirs, "delivery": {"method": POLL}})
        while group not in (await one.http.get("/metrics")).text:
            pass
        await one.call("DELETE", "/ssf/streams", status=204, **theirs)
        assert await one.call("GET", "/ssf/streams") == []
        assert group not in (await one.http.get("/metrics")).text
        assert (await one.create())["stream_id"] != made["stream_id"]


async def test_unsupported_stream_settings_are_refused(desk: IssuerBench, office: Office) -> None:
    office.declare("asker", push='"https://asker.example/events"')
    async with office.running():
        client = office.client("asker")

        async def refused(delivery: object, word: str) -> None:
            answer = await client.call("POST", "/ssf/streams", {"delivery": delivery}, 400)
            assert word in answer["description"]

        await refused({"method": PUSH, "endpoint_url": "http://169.254.169.254/latest"}, "operator")
        await refused({"method": PUSH}, "operator")
        await refused({"method": POLL, "endpoint_url": "https://asker.example/"}, "leave it out")
        await refused({"method": "urn:example:mail"}, "delivery.method")
        secret = {"method": POLL, "authorization_header": "Bearer s3cret"}
        await refused(secret, "kept by the operator")
        await client.create()
        body = {"stream_id": client.stream_id, "aud": "https://another.example"}
        await client.call("PATCH", "/ssf/streams", body, 400)
        await client.call("POST", "/ssf/status", {"stream_id": client.stream_id, "status": "deleted"}, 400)
        await client.call("POST", f"/ssf/poll/{client.stream_id}", {"maxEvents": -1}, 400)
        broken = await client.http.post("/ssf/verify", content=b"[]")
        assert broken.status_code == 400
        topics = [record.value for record in await desk.world.records(SIGNAL_STREAM)]
        assert not any(b"s3cret" in value for value in topics)


async def test_strangers_are_turned_away(desk: IssuerBench, office: Office) -> None:
    office.declare("known")
    async with office.running():
        office.declare("undeclared")  # has a token from now on, and is in no file that the service read
        office.settings(office.url)
        stranger = Client(office.url, "stranger", "no-such-token")
        for method, path in (("GET", "/ssf/streams"), ("POST", "/ssf/poll/x"), ("POST", "/ssf/verify")):
            response = await stranger.http.request(method, path, json={})
            assert (response.status_code, response.json()["err"]) == (401, "authentication_failed")
            assert response.headers["www-authenticate"].startswith("Bearer")
        told = [
            event.reasons[0].code
            for event in map(desk.world.event, await desk.world.records(SERVICE_EVENT))
            if event.subject == "signals" and event.kind == "refused" and event.reasons
        ]
        assert told.count("token_unknown") == 3
        await office.client("undeclared").call("GET", "/ssf/streams", status=403)


async def test_public_pages_are_served_without_a_token(desk: IssuerBench, office: Office) -> None:
    office.declare("reader")
    async with office.running(), plain_client(base_url=office.url, timeout=60) as http:
        about = (await http.get("/.well-known/ssf-configuration")).json()
        assert about["spec_version"] == "1_0"
        assert about["issuer"] == office.url
        assert about["delivery_methods_supported"] == [PUSH, POLL]
        (key,) = (await http.get(about["jwks_uri"])).json()["keys"]
        assert key["kid"] == desk.world.key("signals").kid
        assert "d" not in key
        assert (await http.get("/readyz")).status_code == 200
        assert "ringfence_signals_total" in (await http.get("/metrics")).text


async def test_one_verification_after_the_other(desk: IssuerBench, office: Office) -> None:
    office.declare("careful")
    async with office.running(verification_interval_s=3600):
        client = office.client("careful")
        await client.create()
        body = {"stream_id": client.stream_id, "state": "VGhpcyBpcw"}
        await client.call("POST", "/ssf/verify", body, 204)
        (told,) = (await client.polled(1)).values()
        assert told["sub_id"] == {"format": "opaque", "id": client.stream_id}
        (event,) = told["events"].values()
        assert event == {"state": "VGhpcyBpcw"}
        await client.call("POST", "/ssf/verify", body, 429)


async def test_stream_status_of_another_signer_is_ignored(desk: IssuerBench, office: Office) -> None:
    office.declare("victim")
    world = desk.world
    async with office.running():
        client = office.client("victim")
        await client.create()
        await client.status("paused")
        paused = [one.value for one in await world.records(SIGNAL_STREAM) if one.key == "victim"][-1]
        await client.status("enabled")
        enabled = [one for one in await world.records(SIGNAL_STREAM) if one.key == "victim"][-1]
        claims = world.opened(enabled, SignalStream, "signals")
        forged = claims.model_copy(update={"revision": 99, "status": "disabled"})
        await world.send(SIGNAL_STREAM, "victim", paused)  # sent again
        await world.send(SIGNAL_STREAM, "victim", sign(forged, world.key("issuer")))  # who may not
        await world.send(SIGNAL_STREAM, "victim", b"")
        another_key = claims.model_copy(update={"revision": 98, "receiver": "somebody"})
        await world.send(SIGNAL_STREAM, "victim", sign(another_key, world.key("signals")))
        assert (await client.call("GET", "/ssf/status", stream_id=client.stream_id))["status"] == "enabled"
        lease_id = await ended(desk)
        assert [lease_of(one) for one in (await client.polled(1)).values()] == [lease_id]


async def test_lease_end_of_an_unauthorised_signer_sends_no_signal(desk: IssuerBench, office: Office) -> None:
    office.declare("wary")
    async with office.running():
        client = office.client("wary")
        await client.create()
        lease_id = await ended(desk)
        record = (await desk.records(lease_id))[-1].claims
        other = record.model_copy(update={"lease_id": str(uuid.uuid4())})
        void = record.model_copy(update={"lease_id": str(uuid.uuid4()), "epoch": "1.00000000"})
        await desk.world.send(LEASE, other.lease_id, sign(other, desk.world.key("gateway")))
        await desk.world.send(LEASE, void.lease_id, sign(void, desk.world.key("revoker")))
        last = await ended(desk)
        first = await client.polled(1)
        told = {**first, **await client.polled(0, ack=list(first), returnImmediately=True)}
        async with asyncio.timeout(60):
            while last not in (heard := [lease_of(one) for one in told.values()]):
                told |= await client.polled(0, ack=list(told), returnImmediately=True)
        assert sorted(heard) == sorted((lease_id, last))
