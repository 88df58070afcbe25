"""SSF 1.0, RFC 8935 and RFC 8936 as a receiver that knows nothing else of the transmitter: plain HTTP, and joserfc."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from joserfc import jwt
from joserfc.jwk import KeySet

from ringfence.messages.topics import SIGNAL_STREAM
from tests.flows.test_signals import ended
from tests.support.benches.issuer_bench import IssuerBench, another
from tests.support.benches.signal_receivers import POLL, PUSH, Endpoint, Office, until

SSF = "https://schemas.openid.net/secevent/ssf/event-type/"
CAEP = "https://schemas.openid.net/secevent/caep/event-type/"
WITHIN_S = 60
NOWHERE = ("f67e39a0a4d34d56b3aa1bc4cff0069f", "00000000-0000-4000-8000-000000000000", "")


@pytest.fixture
async def desk(company: IssuerBench) -> IssuerBench:
    return await another(company)


@pytest.fixture
def office(company: IssuerBench, tmp_path: Path) -> Office:
    return Office(company.world, tmp_path)


class Stranger:
    """Has the issuer's URL and a token, and finds all else in the metadata."""

    def __init__(self, http: httpx.AsyncClient, about: dict[str, Any], audience: str) -> None:
        self.http = http
        self.about = about
        self.audience = audience

    async def call(
        self, method: str, endpoint: str, body: Any = None, **query: str
    ) -> tuple[int, Any, httpx.Headers]:
        response = await self.http.request(
            method, self.about.get(endpoint, endpoint), json=body, params=query
        )
        assert response.headers["cache-control"] == "no-store"
        return response.status_code, response.json() if response.content else None, response.headers

    async def made(self, **wanted: Any) -> dict[str, Any]:
        status, stream, _ = await self.call("POST", "configuration_endpoint", wanted)
        assert status == 201, stream
        assert stream["iss"] == self.about["issuer"]
        found: dict[str, Any] = stream
        return found

    async def set_of(self, compact: str) -> dict[str, Any]:
        """The claims of a SET (RFC 8417), verified, with all that SSF asks of them."""
        keys = KeySet.import_key_set((await self.http.get(self.about["jwks_uri"])).json())
        token = jwt.decode(compact, keys, algorithms=["ES256", "EdDSA"])
        assert token.header["typ"] == "secevent+jwt"
        claims: dict[str, Any] = token.claims
        assert (claims["iss"], claims["aud"]) == (self.about["issuer"], self.audience)
        assert {"jti", "iat", "txn", "sub_id", "events"} <= claims.keys()
        assert not {"sub", "exp"} & claims.keys()
        assert len(claims["events"]) == 1
        return claims

    async def poll(self, stream: dict[str, Any], **body: Any) -> dict[str, Any]:
        """The answer of RFC 8936, 2.3, of a transmitter that has the stream."""
        async with asyncio.timeout(WITHIN_S):
            while True:
                status, found, _ = await self.call("POST", stream["delivery"]["endpoint_url"], body)
                if status != 503:
                    assert status == 200, found
                    assert found.keys() <= {"sets", "moreAvailable"}
                    answer: dict[str, Any] = found
                    return answer

    async def more(self, stream: dict[str, Any], **body: Any) -> dict[str, Any]:
        """The first answer that says that more is available."""
        async with asyncio.timeout(WITHIN_S):
            while (answer := await self.poll(stream, **body)).get("moreAvailable") is not True:
                pass  # it has not come from Kafka yet
            return answer

    async def some(self, stream: dict[str, Any], **body: Any) -> dict[str, dict[str, Any]]:
        """The next events, by their ids."""
        sets: dict[str, str] = {}
        async with asyncio.timeout(WITHIN_S):
            while not sets:
                sets = (await self.poll(stream, **body))["sets"]
        read = {jti: await self.set_of(compact) for jti, compact in sets.items()}
        assert all(claims["jti"] == jti for jti, claims in read.items())
        return read


@asynccontextmanager
async def stranger(office: Office, name: str) -> AsyncIterator[Stranger]:
    """One that reads the metadata before anything else."""
    client = office.client(name)
    async with client.http as http:
        response = await http.get(f"{office.url}/.well-known/ssf-configuration")
        about = response.json()
        assert response.headers["content-type"] == "application/json"
        assert about["issuer"] == office.url
        assert {"spec_urn": "urn:ietf:rfc:6750"} in about["authorization_schemes"]
        assert about["default_subjects"] == "ALL"
        assert all(about.values())  # what has no elements is left out
        yield Stranger(http, about, client.audience)


async def test_polls_as_in_the_rfc(desk: IssuerBench, office: Office) -> None:
    office.declare("poller")
    async with office.running(), stranger(office, "poller") as receiver:
        response = await receiver.http.post(receiver.about["configuration_endpoint"])
        assert response.status_code == 201  # nothing has to be said: then it polls
        stream = response.json()
        assert stream["delivery"]["method"] == POLL
        leases = {await ended(desk)}
        seen: dict[str, dict[str, Any]] = {}
        first = await receiver.some(stream, maxEvents=1)
        leases.add(await ended(desk))  # it comes in a batch of its own: the first one was read already
        answer = await receiver.more(stream, maxEvents=1)
        assert answer["sets"].keys() == first.keys()  # not acknowledged, and so it is there again
        # By any other name it is no acknowledgement.
        await receiver.poll(stream, maxEvents=0, acks=list(first))
        assert (await receiver.some(stream, maxEvents=1)).keys() == first.keys()
        second = await receiver.some(stream, ack=list(first))
        seen = {**first, **second}
        assert {one["sub_id"]["session"]["id"] for one in seen.values()} == leases
        for claims in seen.values():
            event = claims["events"][CAEP + "session-revoked"]
            assert event["initiating_entity"] in ("admin", "user", "policy", "system")
            assert all(isinstance(text, str) and text for text in event["reason_admin"].values())
            assert isinstance(event["event_timestamp"], int)
        assert await receiver.poll(stream, maxEvents=0, ack=[*second, "never sent"]) == {"sets": {}}
        empty = await receiver.http.post(stream["delivery"]["endpoint_url"])
        assert (empty.status_code, empty.json()) == (200, {"sets": {}})

        asked = {"stream_id": stream["stream_id"], "state": "VGhpcyBpcyBhbiBleGFtcGxl"}
        assert (await receiver.call("POST", "verification_endpoint", asked))[0] == 204
        ((jti, told),) = (await receiver.some(stream, returnImmediately=True)).items()
        assert told["events"] == {SSF + "verification": {"state": asked["state"]}}
        assert told["sub_id"] == {"format": "opaque", "id": stream["stream_id"]}
        wrong = {jti: {"err": "invalid_state", "description": "not what was asked for"}}
        assert await receiver.poll(stream, maxEvents=0, setErrs=wrong) == {"sets": {}}
        assert await receiver.poll(stream, returnImmediately=True) == {"sets": {}}
        status, _, fields = await receiver.call("POST", "verification_endpoint", asked)
        assert (status, fields["retry-after"]) == (429, str(stream["min_verification_interval"]))


async def test_more_is_available_across_batches(desk: IssuerBench, office: Office) -> None:
    office.declare("slow")
    async with office.running(), stranger(office, "slow") as receiver:
        stream = await receiver.made()
        leases = list[str]()
        jtis = list[str]()
        for count in range(1, 4):  # each is in the answer before the next one ends: three batches
            leases.append(await ended(desk))
            async with asyncio.timeout(WITHIN_S):
                while len(sets := (await receiver.poll(stream))["sets"]) < count:
                    pass
            jtis = list(sets)
        answer = await receiver.poll(stream, maxEvents=2)
        assert (list(answer["sets"]), answer["moreAvailable"]) == (jtis[:2], True)
        assert await receiver.poll(stream, maxEvents=0) == {"sets": {}, "moreAvailable": True}
        assert (await receiver.poll(stream, returnImmediately=True)).keys() == {"sets"}
        # The second is settled before the first: only what is not acknowledged counts.
        answer = await receiver.poll(stream, maxEvents=1, ack=jtis[1:2])
        assert (list(answer["sets"]), answer["moreAvailable"]) == (jtis[:1], True)
        answer = await receiver.poll(stream, maxEvents=1, ack=jtis[:1])
        assert (list(answer["sets"]), answer.get("moreAvailable")) == (jtis[2:], None)
        leases.append(await ended(desk))
        answer = await receiver.more(stream, maxEvents=1)
        assert list(answer["sets"]) == jtis[2:]
        every = await receiver.poll(stream)
        assert len(every["sets"]) == 2
        # Of two batches at once.
        assert await receiver.poll(stream, maxEvents=0, ack=list(every["sets"])) == {"sets": {}}
        assert await receiver.poll(stream, returnImmediately=True) == {"sets": {}}


async def test_acknowledged_event_stays_committed_when_later_batches_do_not(
    desk: IssuerBench, office: Office
) -> None:
    office.declare("restarted")
    async with office.running(), stranger(office, "restarted") as receiver:
        stream = await receiver.made()
        done, kept = await ended(desk), ""
        (first,) = await receiver.some(stream)
        kept = await ended(desk)
        await receiver.more(stream, maxEvents=1)
        (second,) = await receiver.some(stream, ack=[first])
    async with office.running(), stranger(office, "restarted") as receiver:
        told = await receiver.some(stream)
        assert [one["sub_id"]["session"]["id"] for one in told.values()] == [kept]
        assert list(told) == [second]
        assert done != kept
        assert await receiver.poll(stream, maxEvents=0, ack=[second]) == {"sets": {}}


async def test_a_long_poll_is_woken_by_what_ends(desk: IssuerBench, office: Office) -> None:
    office.declare("patient")
    async with office.running(poll_s=300), stranger(office, "patient") as receiver:
        stream = await receiver.made()
        (passed,) = [await ended(desk)]
        (first,) = await receiver.some(stream)
        assert await receiver.poll(stream, maxEvents=0, ack=[first]) == {"sets": {}}
        polling = asyncio.create_task(receiver.some(stream))
        woken = await ended(desk)
        told = await asyncio.wait_for(polling, WITHIN_S)
        assert [one["sub_id"]["session"]["id"] for one in told.values()] == [woken] != [passed]


async def test_pushes_as_in_the_rfc(desk: IssuerBench, office: Office, tmp_path: Path) -> None:
    secret = tmp_path / "authorization"
    secret.write_text("Bearer s3cret-of-the-receiver")
    secret.chmod(0o600)
    async with Endpoint().running() as endpoint:
        office.declare("pushed", push=f'"{endpoint.url}"', authorization=f'"file:{secret}"')
        async with office.running(), stranger(office, "pushed") as receiver:
            delivery = {"method": PUSH, "endpoint_url": endpoint.url}
            for wrong in ("Bearer of another", "", 7, "\ud7ff"):
                other = {**delivery, "authorization_header": wrong}
                status, said, _ = await receiver.call("POST", "configuration_endpoint", {"delivery": other})
                assert (status, said["err"]) == (400, "invalid_request")
                assert "s3cret" not in str(said)
            with_secret = {**delivery, "authorization_header": "Bearer s3cret-of-the-receiver"}
            stream = await receiver.made(delivery=with_secret, events_requested=[CAEP + "session-revoked"])
            assert stream["delivery"] == delivery
            lease_id = await ended(desk)
            await until(lambda: endpoint.got)
            claims = await receiver.set_of(endpoint.got[0])
            assert claims["sub_id"]["session"]["id"] == lease_id
            fields = endpoint.asked[0]
            assert fields["content-type"] == "application/secevent+jwt"
            assert fields["accept"] == "application/json"
            assert fields["authorization"] == "Bearer s3cret-of-the-receiver"
            assert not any(b"s3cret" in one.value for one in await desk.world.records(SIGNAL_STREAM))


async def test_a_configuration_that_was_read_may_be_sent_back(desk: IssuerBench, office: Office) -> None:
    office.declare("editor")
    async with office.running(), stranger(office, "editor") as receiver:
        wanted = [CAEP + "session-revoked", CAEP + "credential-change"]
        stream = await receiver.made(events_requested=wanted, description="d" * 2000)
        assert stream["description"] == "d" * 512
        assert (stream["events_requested"], stream["events_delivered"]) == (wanted, wanted[:1])
        query = {"stream_id": stream["stream_id"]}
        assert (await receiver.call("GET", "configuration_endpoint", **query))[:2] == (200, stream)
        for method in ("PUT", "PATCH"):
            assert (await receiver.call(method, "configuration_endpoint", stream))[:2] == (200, stream)
        listed = {**stream, "aud": [stream["aud"]]}
        assert (await receiver.call("PUT", "configuration_endpoint", listed))[:2] == (200, stream)
        for name, value in {
            "iss": "https://other.example",
            "aud": "https://other.example",
            "events_supported": [],
            "events_delivered": wanted,
            "min_verification_interval": 0,
            "inactivity_timeout": 1,
        }.items():
            for method in ("PUT", "PATCH"):
                status, said, _ = await receiver.call(
                    method, "configuration_endpoint", {**stream, name: value}
                )
                assert (status, said["err"]) == (400, "invalid_request")
        # What it delivers is compared with what was delivered before the change.
        fewer = {**stream, "events_requested": wanted[1:]}
        status, changed, _ = await receiver.call("PATCH", "configuration_endpoint", fewer)
        assert (status, changed["events_delivered"]) == (200, [])
        whole = {"stream_id": stream["stream_id"], "delivery": stream["delivery"]}
        status, replaced, _ = await receiver.call("PUT", "configuration_endpoint", whole)
        assert status == 200
        assert not {"description", "events_requested"} & replaced.keys()
        assert replaced["events_delivered"] == wanted[:1]


async def test_a_stream_that_is_not_there_is_a_404_everywhere(desk: IssuerBench, office: Office) -> None:
    office.declare("lost")
    subject = {"format": "email", "email": "maria@acme.example"}
    async with office.running(), stranger(office, "lost") as receiver:
        for id in NOWHERE:
            body = {"stream_id": id}
            for method, endpoint, sent in (
                ("PATCH", "configuration_endpoint", body),
                ("PUT", "configuration_endpoint", body),
                ("POST", "status_endpoint", {**body, "status": "paused"}),
                ("POST", "add_subject_endpoint", {**body, "subject": subject, "verified": True}),
                ("POST", "remove_subject_endpoint", {**body, "subject": subject}),
                ("POST", "verification_endpoint", body),
            ):
                assert (await receiver.call(method, endpoint, sent))[0] == 404
            for method, endpoint in (
                ("GET", "configuration_endpoint"),
                ("DELETE", "configuration_endpoint"),
                ("GET", "status_endpoint"),
            ):
                assert (await receiver.call(method, endpoint, **body))[0] == 404
        assert (await receiver.call("POST", f"{office.url}/ssf/poll/{NOWHERE[0]}", {}))[0] == 404
        assert (await receiver.call("GET", "configuration_endpoint"))[:2] == (200, [])


async def test_a_subject_that_is_added_is_heard_of_though_more_was_removed(
    desk: IssuerBench, office: Office
) -> None:
    office.declare("chooser")
    async with office.running(), stranger(office, "chooser") as receiver:
        stream = await receiver.made()
        stream_id = stream["stream_id"]
        maria = {"format": "uri", "uri": desk.maria.id}
        bot = {"format": "uri", "uri": desk.bot.id}

        async def say(what: str, subject: dict[str, Any]) -> int:
            body = {"stream_id": stream_id, "subject": subject}
            return (await receiver.call("POST", f"{what}_subject_endpoint", body))[0]

        assert await say("remove", bot) == 204
        await ended(desk)
        passed = await ended(await another(desk))  # heard of, so what came before it was passed over
        told = await receiver.some(stream)
        assert [one["sub_id"]["session"]["id"] for one in told.values()] == [passed]
        assert await say("add", {"format": "complex", "user": maria, "application": bot}) == 200
        heard = await ended(desk)
        told = await receiver.some(stream, ack=list(told))
        assert [one["sub_id"]["session"]["id"] for one in told.values()] == [heard]
        # What is removed stands in one record: it has an end before Kafka's.
        large = {"format": "opaque", "id": "x" * 2000}
        said = {await say("remove", {**large, "n": n}) for n in range(140)}
        assert said == {204, 400}
        assert (await receiver.call("GET", "status_endpoint", stream_id=stream_id))[1]["status"] == "enabled"


async def test_a_stream_that_may_be_pushed_nowhere_says_that_it_is_held(
    desk: IssuerBench, office: Office, tmp_path: Path
) -> None:
    async with Endpoint().running() as endpoint:
        office.declare("moved", push=f'"{endpoint.url}"')
        async with office.running(), stranger(office, "moved") as receiver:
            stream = await receiver.made(delivery={"method": PUSH, "endpoint_url": endpoint.url})
        before = office.take_back("push")
        async with office.running(), stranger(office, "moved") as receiver:
            id = stream["stream_id"]
            status = (await receiver.call("GET", "status_endpoint", stream_id=id))[1]
            assert status["status"] == "paused"
            assert "no URL" in status["reason"]
            shown = (await receiver.call("GET", "configuration_endpoint", stream_id=id))[1]
            assert shown["delivery"] == {"method": PUSH}
            held = await ended(desk)
        office.restore(before)
        async with office.running(), stranger(office, "moved") as receiver:
            await until(lambda: endpoint.got)
            told = await receiver.set_of(endpoint.got[0])
            assert told["sub_id"]["session"]["id"] == held
