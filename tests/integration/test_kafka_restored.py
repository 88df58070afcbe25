"""Kafka is lost and restored from a snapshot, as `docs/operators/backup-and-restore.md` has it, by the page's commands.

What Kafka holds after that is older than what everybody else remembers: services, Redis, auditors, a SIEM.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from ringfence.client.errors import TokenRejectedError
from ringfence.client.resource_server.verifier import TokenVerifier
from ringfence.dev.redis import EmbeddedRedis
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import Topic, typ_header
from ringfence.messages.lease import LeaseEpoch
from ringfence.messages.topics import AUDIT, CREDENTIAL_DECISION, DEAD_LETTER, LEASE
from ringfence.model.audit_log.chain import event_of
from tests.brokers.apache import ApacheKafka
from tests.site.page_commands import ROOT, run_page, section_of
from tests.support.installation import THIS_CLONE, WITHIN_S, Installation, lease, organise, request

pytestmark = pytest.mark.apache

PAGE = ROOT / "docs/operators/backup-and-restore.md"
STARTED = ("audit", "gateway", "revoker", "issuer", "policy", "registry")
"""In the order of the page: readers before writers."""
Disks = Literal["of one moment", "groups later", "groups earlier"]
"""How well the parts of a snapshot fit: `__consumer_offsets` and `__transaction_state` may stand on a broker whose disk
was copied a little later, or earlier, than those of the topics.
"""
_OF_GROUPS = ("__consumer_offsets-*", "__transaction_state-*")
_OFTEN = {"RINGFENCE_AUDIT_CHECKPOINT_S": "1"}
_REDIS_CLI = """\
#!{python} -P
import sys, redis
_, flag, url, *command = sys.argv
assert flag == "-u"
print(redis.Redis.from_url(url).execute_command(*command))
"""
"""Where the machine has no `redis-cli`: the only thing of it that the page uses."""


@dataclass
class Place:
    """An installation, the servers that it has now, and what they held."""

    here: Installation
    folder: Path
    kafka: ApacheKafka
    tokens: dict[str, str] = field(default_factory=dict)

    def issue(self, task: str, ttl: str) -> str:
        """A new lease whose credential is remembered."""
        answer = request(self.here, task, ttl)
        self.tokens[answer["lease_id"]] = answer["value"]
        return str(answer["lease_id"])

    def issues(self, task: str) -> bool:
        """Whether an agent gets a credential now."""
        words = ("--reason", "to look", "--allow", "shop:read:env/staging", "--ttl", "1m")
        return self.here.run("request", "--task", task, *words, who="bot").returncode == 0

    def page(self, heading: str, *numbers: int) -> str:
        """Run blocks of the page under a heading, by their numbers from 1 on; all of them where none is named."""
        blocks = section_of(PAGE, heading)
        some = [blocks[number - 1] for number in numbers] if numbers else blocks
        environment = self.here.environment("olga")
        environment["PATH"] += f":{self.folder}"
        return run_page(PAGE, self.here.folder, environment, blocks=some)

    def lose_kafka(self, *snapshots: Path, disks: Disks) -> None:
        """Its disks are gone. Another broker, at another address, begins with a snapshot."""
        self.kafka.stop()
        earlier, later = snapshots
        whole, groups = (later, earlier) if disks == "groups earlier" else (earlier, later)
        if disks != "of one moment":
            for pattern in _OF_GROUPS:
                for old in whole.glob(pattern):
                    shutil.rmtree(old)
                for new in groups.glob(pattern):
                    shutil.copytree(new, whole / new.name)
        self.kafka = _own_kafka(self.folder / "second", whole)
        self.here.change(kafka=self.kafka.bootstrap)

    async def verdict(self, lease_id: str, *, introspect: bool = True) -> str:
        """What a resource server says of the credential of a lease: `accepted`, or the code of its refusal."""
        key = SigningKey.load(self.here.identity("shop"))
        asked = key if introspect else None
        async with TokenVerifier(self.here.url("issuer"), key.id, asked) as verifier:
            try:
                await verifier.verify(self.tokens[lease_id])
            except TokenRejectedError as error:
                return error.code
            return "accepted"

    async def until(self, holds: Callable[[], Any], what: str) -> Any:
        """What `holds` returns, awaited, once it is true."""
        try:
            async with asyncio.timeout(3 * WITHIN_S):
                while not (found := await holds()):
                    await asyncio.sleep(0.5)
                return found
        except TimeoutError:
            raise AssertionError(f"did not come to be: {what}") from None

    async def trail_is_whole(self) -> bool:
        """Whether `ringfence audit verify` finds nothing. Fails where it finds what no event to come makes good."""
        done = await asyncio.to_thread(self.here.run, "audit", "verify", "--settle", "0", who="olga")
        faults = json.loads(done.stdout)["faults"]
        assert {fault["kind"] for fault in faults} <= {"missing"}, faults
        return done.returncode == 0

    async def stand(self, topic: Topic[Any]) -> dict[tuple[int, int], bytes]:
        """What stands on a topic, by partition and offset."""
        return {(one.partition, one.offset): one.value for one in await self.here.records(topic)}


def _own_kafka(folder: Path, restored_from: Path | None = None) -> ApacheKafka:
    folder.mkdir()
    kafka = ApacheKafka(folder, restored_from=restored_from)
    kafka.start()
    return kafka


@contextmanager
def placed(folder: Path) -> Iterator[Place]:
    """A running installation on servers that no other test uses."""
    program = folder / "redis-cli"
    program.write_text(_REDIS_CLI.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (folder / "installation").mkdir()
    redis = EmbeddedRedis(folder / "redis")
    redis.start()
    own = _own_kafka(folder / "first")
    here = Installation(
        THIS_CLONE, folder / "installation",
        kafka=own.bootstrap, embedded_broker=False, redis_url=redis.url,
    )  # fmt: skip
    place = Place(here, folder, own)
    try:
        here.make()
        here.start(settings=_OFTEN)
        yield place
    finally:
        here.end()
        redis.stop()
        place.kafka.stop()


def people(here: Installation) -> str:
    """Beside sam and bot: ali, an auditor; maria, who sponsors helper. Returns the task of bot."""
    task = organise(here)
    for who, role in (("ali", "auditor"), ("maria", "sponsor")):
        here.say("user", "add", who, "--name", who, "--role", role, "--allow", "shop:read:env/**",
                 "--new-key", str(here.identity(who)), who="olga")  # fmt: skip
    here.say("agent", "register", "helper", "--description", "helps", "--allow", "shop:read:env/**",
             "--new-key", str(here.identity("helper")), who="maria")  # fmt: skip
    return task


def first_of_each_lease(records: list[Received]) -> dict[str, Received]:
    first: dict[str, Received] = {}
    for record in records:
        if record.key is not None:
            first.setdefault(record.key, record)
    return first


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "disks",
    ["of one moment", "groups later", "groups earlier"],
)
async def test_kafka_is_lost_and_restored(tmp_path: Path, disks: Disks) -> None:
    with placed(tmp_path) as place:
        here = place.here
        task = people(here)
        kept = place.issue(task, "30m")
        revoked = place.issue(task, "30m")
        here.say("revoke", "--lease", revoked, "--reason", "odd", "--yes", who="olga")
        living = place.issue(task, "30m")
        await place.until(lambda: here.ends(revoked), "the end of what was revoked")
        await place.until(place.trail_is_whole, "an event of every record")
        here.say("audit", "verify", "--witness", who="ali")
        decisions, trail = await place.stand(CREDENTIAL_DECISION), await place.stand(AUDIT)

        earlier, later = tmp_path / "earlier", tmp_path / "later"
        await asyncio.to_thread(place.kafka.snapshot, earlier)
        # The broker was away meanwhile: services deny until each has heard from it again.
        await place.until(lambda: asyncio.to_thread(place.issues, task), "that credentials are issued again")
        if disks != "of one moment":
            here.say("release", lease(here, task, "10m"), who="bot")
            await place.until(place.trail_is_whole, "an event of every record")
            await asyncio.to_thread(place.kafka.snapshot, later)

        # What is going to be lost, the dangerous things among it: ends, a disabled user, a suspension, a stolen key.
        lost = place.issue(task, "30m")
        here.say("revoke", "--lease", living, "--reason", "odd", "--yes", who="olga")
        here.say("user", "disable", "maria", "--reason", "left", "--yes", who="olga")
        here.say("agent", "suspend", "helper", "--reason", "odd", who="olga")
        here.say("init", "--rotate-service", "policy", "--compromised", "--publish")
        await place.until(lambda: here.ends(living), "the end of what is revoked now")
        await place.until(place.trail_is_whole, "an event of every record")
        here.say("audit", "verify", "--heads", "heads.json", "--witness", who="ali")
        seen_by_siem = {event.uid: one for one in await here.records(AUDIT) if (event := event_of(one.value))}
        assert await place.verdict(lost) == "accepted"
        assert await place.verdict(living) == "inactive"

        # 1. and 2.
        here.stop()
        await asyncio.to_thread(place.lose_kafka, earlier, later, disks=disks)
        place.page("Kafka was lost", 1)
        assert lost not in first_of_each_lease(await here.records(LEASE))
        begun = dict(sorted(await place.stand(LEASE)))
        # 3. and 4.
        place.page("Kafka was lost", 2, 3)
        # 5. One revoker is held back, to see that nothing is issued without it.
        token_key = here.folder / "issuer-token-2.json"
        if disks == "of one moment":
            here.say("key", "new", str(token_key), "--id", "spiffe://acme.example/service/issuer")
        new_key = {"RINGFENCE_ISSUER_TOKEN_KEY_FILE": str(token_key)} if disks == "of one moment" else {}
        for name in STARTED:
            if name != "revoker":
                here.launch(name, {**_OFTEN, **new_key})
        await place.until(
            lambda: asyncio.to_thread(lambda: "not known to be complete" in (here.unready("issuer") or "")),
            "an issuer that knows that Redis is not complete",
        )
        refused = here.run("request", "--task", task, "--reason", "to look", "--allow", "shop:read:env/staging",
                           "--timeout", "5s", who="bot")  # fmt: skip
        assert refused.returncode != 0
        here.launch("revoker")
        for name in STARTED:
            here.await_ready(name)

        # What was before the snapshot is there; what came after it is not, however bad that is.
        assert {kept, living} <= here.leases()
        assert not {lost, revoked} & here.leases()
        assert len(await here.ends(revoked)) == 1
        stand = await place.stand(CREDENTIAL_DECISION)
        assert decisions.items() <= stand.items()
        stand = await place.stand(AUDIT)
        assert trail.items() <= stand.items()
        assert here.say("user", "show", "maria", who="olga")["state"]["status"] == "active"
        assert here.say("agent", "show", "helper", who="olga")["state"]["status"] == "active"
        # Nothing was issued before the new epoch, so before Redis was rebuilt.
        epochs = {one.partition: one.offset for one in await here.records(LEASE)
                  if parse(one.value).header.typ == typ_header(LeaseEpoch)}  # fmt: skip
        new = lease(here, task, "10m")
        for id, first in first_of_each_lease(await here.records(LEASE)).items():
            if id in here.leases() and first.offset > begun.get(first.partition, -1):
                assert first.offset > epochs[first.partition], id
        # The credential of the lost lease: whoever asks the issuer refuses it, and with new keys whoever asks nobody.
        if disks == "of one moment":
            assert await place.verdict(lost) == await place.verdict(lost, introspect=False) == "invalid_token"
            assert await place.verdict(kept) == "invalid_token"
        else:
            assert await place.verdict(lost) == "inactive"
            assert await place.verdict(lost, introspect=False) == "accepted"
            assert await place.verdict(kept) == await place.verdict(living) == "accepted"
        # The thief of policy's former key is refused again: the bundle was published again.
        ready = json.loads(here.text("policy", "/readyz"))
        assert ready["trust_bundle"] == 2
        assert ready["signs_by"] == SigningKey.load(here.trust.path / "keys/policy-next.json").kid

        # 6. What people did is done again, and takes effect: no reader waits behind what is not there.
        here.say("user", "disable", "maria", "--reason", "left", "--yes", who="olga")
        here.say("agent", "suspend", "helper", "--reason", "odd", who="olga")
        here.say("revoke", "--lease", living, "--reason", "odd", "--yes", who="olga")
        await place.until(lambda: here.ends(living), "the end of what is revoked again")
        here.say("release", new, who="bot")
        await place.until(lambda: here.ends(new), "the end of what is released")
        assert kept in here.leases()
        assert not {living, new} & here.leases()

        # 7.
        await place.until(place.trail_is_whole, "an event of every record")
        said = place.page("Kafka was lost", 4, 5)
        assert (
            "a signed head says that there were" in said or "this is not the chain that was signed" in said
        ), said
        here.say("audit", "trace", kept, who="olga")
        # New events stand where lost ones stood, and have their uids: a SIEM that drops repeated uids misses them.
        events = {event.uid: one for one in await here.records(AUDIT) if (event := event_of(one.value))}
        assert [
            uid for uid, one in events.items() if uid in seen_by_siem and seen_by_siem[uid].value != one.value
        ]
        if disks == "of one moment":
            assert not await here.records(DEAD_LETTER)
